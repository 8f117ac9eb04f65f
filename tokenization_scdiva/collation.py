"""The collator: corrupt depth, rank, cut, pad, draw the diffusion time, mask (METHOD: "Forward process").

Everything is done on the flat arrays of a whole batch. Every random number is a hash of (seed, epoch, cell,
place), so a cell gets the same corruption at any world size, with any number of loader workers and after a
resume.

Dimensions: B cells, T gene tokens of all cells together, S positions, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from modeling_scdiva.diffusion_scdiva import stratified_timesteps
from tokenization_scdiva.corpus import CellBatch
from tokenization_scdiva.gene_queries import draw_gene_queries
from tokenization_scdiva.ranking_scdiva import (
    FlatCells,
    hashed_uniform,
    normalise_counts,
    pad_cells,
    rank_cells,
    select_genes,
    splitmix64,
)
from tokenization_scdiva.tokenization_scdiva import ScDivaTokenizer

IGNORED_LABEL = -100
# Streams of random numbers of one cell: counters far above any gene's place.
TIME_STREAM, COIN_STREAM, DEPTH_STREAM, THINNING_STREAM = (np.uint64(2**40 + stream) for stream in range(4))


def thin_counts(counts: np.ndarray, keep_fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Simulate a shallower run by keeping each molecule with a fixed probability.

    Args:
        counts: Raw molecule counts of any shape, non-negative integers.
        keep_fraction: Probability that one molecule is kept, in (0, 1].
        rng: Source of randomness; equal state, equal result.

    Returns:
        Thinned counts, same shape and type, nowhere above the input.

    Raises:
        ValueError: If ``keep_fraction`` lies outside (0, 1].

    References:
        METHOD.md section 2, depth corruption by thinning.
    """
    if not 0.0 < keep_fraction <= 1.0:
        msg = f"keep_fraction must lie in (0, 1], got {keep_fraction}. Use 1.0 to switch thinning off."
        raise ValueError(msg)
    return rng.binomial(counts, keep_fraction).astype(counts.dtype)


@dataclass
class ScDivaDataCollator:
    """Turn cells of a corpus into masked model inputs and their targets.

    Attributes:
        ranking_weights: (V,) divisor of the ranking score.
        max_genes: Genes kept of a cell.
        target_sum: Molecules to which every cell is scaled.
        gene_order: ``entropy``, ``expression`` or ``random``; order after thinning.
        lat_token_id: Id of the anchor token.
        mask_token_id: Id of a hidden gene.
        pad_token_id: Id of a pad.
        seed: Another seed, another corruption of every cell.
        masking_target: ``joint`` hides gene and value, ``expression`` the value of a known gene, ``gene`` the
            gene with its value in sight.
        depth_corruption: ``scale`` multiplies the values of a cell (before log1p), ``thin`` draws its
            molecules anew and ranks again, ``none`` leaves it. Targets always stay those of the clean cell.
        depth_probability: Share of cells whose depth is corrupted.
        depth_range: Ends of the log-uniform law of the kept share of depth.
        n_gene_queries: Genes a cell is asked for, half expressed and half silent, for a network with a
            gene-query decoder; 0 for none.
        pad_to_multiple_of: Round the width of a batch up, for compiled or tensor-core runs.
    """

    ranking_weights: np.ndarray
    max_genes: int
    target_sum: float
    gene_order: str
    lat_token_id: int
    mask_token_id: int
    pad_token_id: int
    seed: int = 0
    masking_target: Literal["joint", "expression", "gene"] = "joint"
    depth_corruption: Literal["none", "scale", "thin"] = "scale"
    depth_probability: float = 0.5
    depth_range: tuple[float, float] = (0.1, 1.0)
    n_gene_queries: int = 0
    pad_to_multiple_of: int = 1

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("masking_target", self.masking_target, ("joint", "expression", "gene")),
            ("depth_corruption", self.depth_corruption, ("none", "scale", "thin")),
            ("gene_order", self.gene_order, ("entropy", "expression", "random")),
        ):
            if value not in allowed:
                msg = f"{name} must be one of {', '.join(allowed)}, got {value!r}."
                raise ValueError(msg)
        if self.n_gene_queries < 0 or self.n_gene_queries % 2:
            msg = f"n_gene_queries must be even and not negative, got {self.n_gene_queries}."
            raise ValueError(msg)
        if not 0.0 <= self.depth_probability <= 1.0:
            msg = f"depth_probability must lie in [0, 1], got {self.depth_probability}."
            raise ValueError(msg)
        if not 0.0 < self.depth_range[0] <= self.depth_range[1] <= 1.0:
            msg = f"depth_range must be an interval inside (0, 1], got {self.depth_range}."
            raise ValueError(msg)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the corruption; a run can be resumed only with the same."""
        names = (
            "seed",
            "masking_target",
            "depth_corruption",
            "depth_probability",
            "depth_range",
            "max_genes",
            "n_gene_queries",
        )
        return {f"corruption_{name}": getattr(self, name) for name in names}

    @classmethod
    def from_tokenizer(cls, tokenizer: ScDivaTokenizer, **settings: Any) -> "ScDivaDataCollator":
        """Take ranking and special tokens from a tokenizer.

        Plain arrays and ids are kept, not the tokenizer, so that loader workers can be started in any way.

        Args:
            tokenizer: The corpus' tokenizer.
            settings: The other attributes.

        Returns:
            A collator.
        """
        defaults = {
            "ranking_weights": tokenizer.ranking_weights,
            "max_genes": tokenizer.max_genes,
            "target_sum": tokenizer.target_sum,
            "gene_order": tokenizer.gene_order,
            "lat_token_id": tokenizer.lat_token_id,
            "mask_token_id": tokenizer.mask_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        return cls(**(defaults | settings))

    def __call__(self, batch: CellBatch) -> dict[str, torch.Tensor]:
        """Corrupt and mask one batch; thinning refuses cells without raw counts.

        Args:
            batch: What `CellCorpus.__getitems__` returns.

        Returns:
            ``input_ids``, ``expression_values``, ``is_masked``, ``labels`` and ``expression_labels`` (B, S),
            ``timestep`` (B,), ``attention_mask`` (B, S) where anything is padded, and what
            `draw_gene_queries` returns where genes are asked for. ``labels`` is -100 wherever no gene is to
            be predicted; ``expression_labels`` are the clean values.
        """
        # 1. One hash per cell stands for all its random numbers.
        cell_seed = self._cell_seed(batch.draws)  # (B,)
        # 2. Depth: the network sees `seen`, the targets are `clean`.
        clean, seen = self._corrupt_depth(batch.cells, cell_seed)  # FlatCells; (T,)
        # 3. Diffusion time, stratified over the loader batch, and one coin per gene.
        strata, n_strata = batch.draws[:, 2], int(batch.draws[0, 3])
        timestep = stratified_timesteps(hashed_uniform(cell_seed, TIME_STREAM), strata, n_strata)  # (B,)
        lengths = clean.n_genes
        places = np.arange(len(clean.token_ids)) - np.repeat(clean.offsets[:-1], lengths)
        coins = hashed_uniform(np.repeat(cell_seed, lengths), places.astype(np.uint64))  # (T,)
        is_drawn = coins < np.repeat(timestep, lengths)  # (T,)
        # 4. Inputs and targets.
        genes = clean.token_ids.astype(np.int64)
        hides_gene, hides_value = self.masking_target != "expression", self.masking_target != "gene"
        flat = {
            "input_ids": (np.where(is_drawn & hides_gene, self.mask_token_id, genes), self.pad_token_id),
            "expression_values": (np.where(is_drawn & hides_value, np.float32(0), seen), 0.0),
            "is_masked": (is_drawn & hides_value, False),
            "labels": (np.where(is_drawn & hides_gene, genes, IGNORED_LABEL), IGNORED_LABEL),
            "expression_labels": (clean.values, 0.0),
        }
        first = {"input_ids": self.lat_token_id, "labels": IGNORED_LABEL}
        inputs = {
            name: self._pad(clean.offsets, entries, first=first.get(name, 0), fill=fill)
            for name, (entries, fill) in flat.items()
        }  # each (B, S)
        width = inputs["input_ids"].shape[1]
        if (lengths + 1 < width).any():
            inputs["attention_mask"] = torch.from_numpy(
                (np.arange(width) <= lengths[:, None]).astype(np.int64)
            )
        inputs["timestep"] = torch.from_numpy(timestep.astype(np.float32))
        if self.n_gene_queries:
            queries = draw_gene_queries(
                batch.cells,
                batch.measured_genes[batch.dataset_ids],
                n_queries=self.n_gene_queries,
                cell_seed=cell_seed,
                pad_token_id=self.pad_token_id,
            )
            inputs |= {name: torch.from_numpy(array) for name, array in queries.items()}
        return inputs

    def _cell_seed(self, draws: np.ndarray) -> np.ndarray:
        cells, epochs = draws[:, 0].astype(np.uint64), draws[:, 1].astype(np.uint64)
        return splitmix64(splitmix64(splitmix64(np.array(self.seed, np.uint64)) + epochs) + cells)

    def _corrupt_depth(self, cells: FlatCells, cell_seed: np.ndarray) -> tuple[FlatCells, np.ndarray]:
        is_shallow = hashed_uniform(cell_seed, COIN_STREAM) < self.depth_probability
        low, high = self.depth_range
        kept_share = low * (high / low) ** hashed_uniform(cell_seed, DEPTH_STREAM)
        kept_share = np.where(is_shallow, kept_share, 1.0)  # (B,)
        if self.depth_corruption == "thin":
            return self._thin(cells, kept_share, cell_seed)
        clean = select_genes(cells, self._first_genes(cells.n_genes))
        if self.depth_corruption == "none":
            return clean, clean.values
        share = np.repeat(kept_share, clean.n_genes)
        return clean, np.log1p(share * np.expm1(clean.values.astype(np.float64))).astype(np.float32)

    def _first_genes(self, lengths: np.ndarray) -> np.ndarray:
        """(T,) bool, the first `max_genes` of each cell."""
        places = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return places < self.max_genes

    def _thin(
        self, cells: FlatCells, kept_share: np.ndarray, cell_seed: np.ndarray
    ) -> tuple[FlatCells, np.ndarray]:
        """Draw molecules, normalise and rank again; genes that lose all molecules leave the cell."""
        if cells.counts is None or cells.library_size is None:
            msg = "depth_corruption='thin' draws molecules and needs a corpus of raw counts; use 'scale'."
            raise ValueError(msg)
        counts, library_size = cells.counts.copy(), cells.library_size.copy()
        for cell in np.flatnonzero(kept_share < 1.0):
            rng = np.random.Generator(np.random.Philox(key=int(cell_seed[cell] ^ THINNING_STREAM)))
            genes = slice(cells.offsets[cell], cells.offsets[cell + 1])
            thinned = thin_counts(counts[genes], kept_share[cell], rng)
            outside = int(library_size[cell] - counts[genes].sum())  # in genes that the corpus lacks
            if thinned.any():  # a cell that would lose its last gene stays as it is
                library_size[cell] = thinned.sum() + rng.binomial(max(outside, 0), kept_share[cell])
                counts[genes] = thinned
        values = normalise_counts(counts, np.repeat(library_size, cells.n_genes), self.target_sum)
        # Ranked by the thinned values; the clean value of each gene travels along in the place of its count.
        both = FlatCells(cells.offsets, cells.token_ids, values, cells.values, None)
        ranked = rank_cells(
            select_genes(both, counts > 0),
            gene_order=self.gene_order,
            ranking_weights=self.ranking_weights,
            max_genes=self.max_genes,
        )
        return FlatCells(ranked.offsets, ranked.token_ids, ranked.counts, None, None), ranked.values  # type: ignore[arg-type]

    def _pad(self, offsets: np.ndarray, flat: np.ndarray, *, first: float, fill: float) -> torch.Tensor:
        padded = pad_cells(offsets, flat, first=first, fill=fill, multiple=self.pad_to_multiple_of)
        return torch.from_numpy(padded)
