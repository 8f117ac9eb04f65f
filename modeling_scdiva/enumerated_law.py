"""Cells few enough to list, their law, and its perfect denoiser: the ground truth of samplers and bounds.

A cell is `<lat>` and L different genes in a row; all V! / (V - L)! cells have a probability. The denoiser
looks the answers up, so whatever a sampler or an estimator does beside the truth is its own error.

Dimensions: M cells of the law, B cells in a batch, S = L + 1 positions, V genes and special tokens.
"""

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from modeling_scdiva.unmask_scdiva import CellState

PAD, MASK, LAT, N_SPECIAL = 0, 1, 2, 5


class EnumeratedLaw:
    """A law over all cells of a few genes, answering as a `Denoiser` does.

    Args:
        n_genes: Genes, without special tokens.
        n_slots: Genes of a cell L.
        seed: Of the law.
        concentration: Of the Dirichlet draw that makes the law; small values give few likely cells.
    """

    mask_token_id = MASK
    n_special_tokens = N_SPECIAL
    ranking_weights: torch.Tensor | None = None

    def __init__(
        self, n_genes: int = 6, n_slots: int = 4, *, seed: int = 0, concentration: float = 0.3
    ) -> None:
        genes = range(N_SPECIAL, N_SPECIAL + n_genes)
        self.vocab_size = N_SPECIAL + n_genes
        self.n_slots = n_slots
        self.cells = torch.tensor(list(itertools.permutations(genes, n_slots)))  # (M, L)
        rng = np.random.default_rng(seed)
        self.probabilities = torch.from_numpy(rng.dirichlet(np.full(len(self.cells), concentration)))  # (M,)
        # One law of values per gene, whatever the cell.
        self.locations = torch.from_numpy(rng.uniform(0.5, 3.0, self.vocab_size))
        self.scales = torch.from_numpy(rng.uniform(0.05, 0.4, self.vocab_size))
        self.n_encoded = 0

    def entropy(self) -> float:
        """Entropy of the law in nats."""
        kept = self.probabilities[self.probabilities > 0]
        return float(-(kept * kept.log()).sum())

    def hidden_cells(self, n_cells: int) -> CellState:
        """Make cells with all genes hidden.

        Args:
            n_cells: Number of cells B.

        Returns:
            Their state.
        """
        ids = torch.full((n_cells, 1 + self.n_slots), MASK)
        ids[:, 0] = LAT
        return self._state(ids)

    def clean_cells(self) -> CellState:
        """Show all cells of the law.

        Returns:
            State of the M cells, their values zero.
        """
        return self._state(torch.nn.functional.pad(self.cells, (1, 0), value=LAT))

    def _state(self, ids: torch.Tensor) -> CellState:
        return CellState(ids, torch.zeros(ids.shape), torch.ones_like(ids, dtype=torch.bool), ids == MASK)

    def index_of(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Find cells in the list.

        Args:
            input_ids: (B, S) tokens, nothing hidden.

        Returns:
            (B,) int64 index of each cell.

        Raises:
            ValueError: If one is not a cell of the law.
        """
        powers = self.vocab_size ** torch.arange(self.n_slots)
        keys, order = (self.cells * powers).sum(dim=1).sort()
        found = (input_ids[:, 1:] * powers).sum(dim=1)
        places = torch.searchsorted(keys, found).clamp(max=len(keys) - 1)
        if (keys[places] != found).any():
            msg = "A cell repeats a gene, or holds a token that is no gene."
            raise ValueError(msg)
        return order[places]

    def encode(self, state: CellState, is_asked: torch.Tensor | None = None) -> torch.Tensor:
        """Look up the law of each slot given what is visible.

        Args:
            state: B cells.
            is_asked: (B, S) bool, slots whose laws will be read; all are looked up anyway.

        Returns:
            (B, S, V) float64 probabilities of genes.
        """
        self.n_encoded += len(state.input_ids)
        ids = state.input_ids.masked_fill(~state.attention_mask, PAD)[:, : 1 + self.n_slots]
        patterns, which = ids.unique(dim=0, return_inverse=True)  # (P, S)
        shown = patterns[:, None, 1:]  # (P, 1, L)
        is_possible = ((self.cells == shown) | (shown == MASK)).all(dim=2)  # (P, M)
        weights = is_possible * self.probabilities
        one_hot = torch.nn.functional.one_hot(self.cells, self.vocab_size).double()  # (M, L, V)
        law = torch.einsum("pm,mlv->plv", weights, one_hot)
        law = law / law.sum(dim=2, keepdim=True).clamp(min=1e-300)
        law = torch.nn.functional.pad(law, (0, 0, 1, 0))  # (P, S, V)
        return law[which]

    def gene_logits(self, encoded: torch.Tensor, cells: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """(n, V) log-probabilities at slots."""
        return encoded[cells, places].log()

    def value_law(
        self, encoded: torch.Tensor, cells: torch.Tensor, places: torch.Tensor, gene_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(n,) location and (n,) scale of the values of genes."""
        return self.locations[gene_ids], self.scales[gene_ids]

    def quality(self, encoded: torch.Tensor, cells: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """(n,) zeros: every gene is as good as the others."""
        return torch.zeros(len(cells), dtype=torch.float64)


class RecordingLaw(EnumeratedLaw):
    """Remembers the states it was asked about, in ``asked``."""

    def __init__(self, n_genes: int = 6, n_slots: int = 4, **settings: Any) -> None:
        super().__init__(n_genes, n_slots, **settings)
        self.asked: list[CellState] = []

    def encode(self, state: CellState, is_asked: torch.Tensor | None = None) -> torch.Tensor:
        """Remember, and look up."""
        self.asked.append(state)
        return super().encode(state, is_asked)


class SharedNoise:
    """Noise of many cells from one generator: faster than `CellNoise`, but the batch changes the draws.

    Args:
        seed: Of the generator.
        coins: For each look at the cells, the number that decides how many genes are hidden again.
    """

    def __init__(self, seed: int, coins: Iterable[float] | None = None) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.coins = None if coins is None else iter(coins)

    def uniforms(self, rows: torch.Tensor, is_attended: torch.Tensor, n_streams: int) -> torch.Tensor:
        """(n_streams, B, S) float64 in [0, 1)."""
        drawn = torch.rand(n_streams, *is_attended.shape, generator=self.generator, dtype=torch.float64)
        if self.coins is not None:
            drawn[4] = next(self.coins)
        return drawn
