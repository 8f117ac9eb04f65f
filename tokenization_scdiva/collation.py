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
from tokenization_scdiva.kernels_scdiva import compiled_kernels
from tokenization_scdiva.ranking_scdiva import (
    FlatCells,
    cell_values,
    first_genes,
    hashed_uniform,
    map_counts,
    normalise_counts,
    pad_cells,
    rank_cells,
    select_genes,
    splitmix64,
)
from tokenization_scdiva.tokenization_scdiva import ScDivaTokenizer

IGNORED_LABEL = -100
# In the order of the kernel `lay_out`.
INPUT_TYPES = {
    "input_ids": np.int64,
    "expression_values": np.float32,
    "is_masked": np.bool_,
    "labels": np.int64,
    "expression_labels": np.float32,
}
# Streams of random numbers of one cell: counters far above any gene's place.
TIME_STREAM, COIN_STREAM, DEPTH_STREAM, THINNING_STREAM, CONDITION_STREAM = (
    np.uint64(2**40 + stream) for stream in range(5)
)


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


def lowest_coins(coins: np.ndarray, offsets: np.ndarray, n_lowest: np.ndarray) -> np.ndarray:
    """Mark a given number of the entries of each cell, those with the lowest coins: a uniform subset.

    Args:
        coins: (T,) independent uniform draws.
        offsets: (B + 1,) cell boundaries.
        n_lowest: (B,) entries to mark of each cell, at most its length.

    Returns:
        (T,) bool.
    """
    lengths = np.diff(offsets)
    order = np.lexsort((coins, np.repeat(np.arange(len(lengths)), lengths)))  # by cell, then by coin
    rank_in_cell = np.arange(len(coins)) - np.repeat(offsets[:-1], lengths)
    is_marked = np.empty(len(coins), dtype=bool)
    is_marked[order] = rank_in_cell < np.repeat(n_lowest, lengths)
    return is_marked


def cell_coins(cell_seed: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Draw one uniform number for every gene, a function of its cell's seed and its place in the cell.

    Args:
        cell_seed: (B,) uint64.
        offsets: (B + 1,) cell boundaries.

    Returns:
        (T,) float64 in [0, 1).
    """
    lengths = np.diff(offsets)
    places = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    return hashed_uniform(np.repeat(cell_seed, lengths), places.astype(np.uint64))


def draw_genes(cell_seed: np.ndarray, offsets: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """Draw genes independently, each with the rate of its cell.

    Args:
        cell_seed: (B,) uint64.
        offsets: (B + 1,) cell boundaries.
        rates: (B,) float64 probability of each gene of a cell.

    Returns:
        (T,) bool, whether the coin of `cell_coins` lies below the rate.
    """
    lengths, kernels = np.diff(offsets), compiled_kernels()
    if kernels is None:
        return cell_coins(cell_seed, offsets) < np.repeat(rates, lengths)
    is_drawn = np.empty(offsets[-1], dtype=np.bool_)
    hashed_places = splitmix64(np.arange(lengths.max(initial=0), dtype=np.uint64))
    kernels.draw_entries(offsets, cell_seed, hashed_places, rates, is_drawn)
    return is_drawn


def scale_depth(values: np.ndarray, kept_share: np.ndarray) -> np.ndarray:
    """Give the values that cells would show at a share of their depth.

    Args:
        values: (n,) float32 log1p of normalised counts.
        kept_share: (n,) share of the depth that is left.

    Returns:
        (n,) float32.
    """
    return np.log1p(kept_share * np.expm1(values.astype(np.float64))).astype(np.float32)


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
        objective: ``paper`` masks each gene with probability t; ``elbo`` masks exactly k of the L genes of a
            cell, k uniform on 1 .. L, and weights the cell by L / ``mean_n_genes``.
        mean_n_genes: Mean number of genes of a training cell after the cut; needed for ``elbo``, where it
            makes the loss nats per gene.
        condition_dropout: Probability that a condition of a cell is hidden from the network: of each by
            itself, and of all together.
        pad_to_multiple_of: Round the width of a batch up, at most to that of a full cell, for compiled runs:
            few widths, and full cells without padding.
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
    objective: Literal["paper", "elbo"] = "paper"
    mean_n_genes: float = 0.0
    condition_dropout: tuple[float, float] = (0.1, 0.1)
    pad_to_multiple_of: int = 1

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("masking_target", self.masking_target, ("joint", "expression", "gene")),
            ("depth_corruption", self.depth_corruption, ("none", "scale", "thin")),
            ("gene_order", self.gene_order, ("entropy", "expression", "random")),
            ("objective", self.objective, ("paper", "elbo")),
        ):
            if value not in allowed:
                msg = f"{name} must be one of {', '.join(allowed)}, got {value!r}."
                raise ValueError(msg)
        if self.objective == "elbo" and (self.masking_target != "joint" or self.mean_n_genes <= 0):
            msg = (
                "objective='elbo' bounds genes and counts together: it needs masking_target='joint' and the "
                f"mean_n_genes of the corpus, got {self.masking_target!r} and {self.mean_n_genes}."
            )
            raise ValueError(msg)
        if not all(0.0 <= rate <= 1.0 for rate in self.condition_dropout):
            msg = f"condition_dropout must be two rates in [0, 1], got {self.condition_dropout}."
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
            "objective",
            "condition_dropout",
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
            ``timestep`` (B,), ``attention_mask`` (B, S) where anything is padded, what `draw_gene_queries`
            returns where genes are asked for, ``condition_ids`` (B, K) where the corpus has conditions, and
            for ``elbo`` ``size_factors`` and ``loss_weight`` (B,). ``labels`` is -100 wherever no gene is to
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
        if self.objective == "elbo":
            n_masked = np.ceil(timestep * lengths).astype(np.int64)  # uniform on 1 .. L
            coins = cell_coins(cell_seed, clean.offsets)  # (T,)
            is_drawn = lowest_coins(coins, clean.offsets, n_masked)  # (T,)
            timestep = np.where(lengths > 0, n_masked / np.maximum(lengths, 1), timestep)
        else:
            is_drawn = draw_genes(cell_seed, clean.offsets, timestep)  # (T,)
        # 4. Inputs and targets.
        inputs = self._lay_out(clean, seen, is_drawn)
        inputs["timestep"] = torch.from_numpy(timestep.astype(np.float32))
        inputs |= self._extra_inputs(batch, cell_seed, lengths)
        return inputs

    def _lay_out(self, clean: FlatCells, seen: np.ndarray, is_drawn: np.ndarray) -> dict[str, torch.Tensor]:
        """Make what every network reads, (B, S) each; the attention mask only where anything is padded."""
        lengths = clean.n_genes
        width = -(-(1 + int(lengths.max(initial=0))) // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(lengths), min(width, 1 + self.max_genes))
        kinds: dict[str, np.ndarray] = {name: np.empty(shape, dtype) for name, dtype in INPUT_TYPES.items()}
        hides = self.masking_target != "expression", self.masking_target != "gene"
        tokens = (self.lat_token_id, self.mask_token_id, self.pad_token_id, IGNORED_LABEL)
        cells = (clean.token_ids, clean.values, seen)
        kernels = compiled_kernels()
        if kernels is not None:
            kernels.lay_out(clean.offsets, cells, is_drawn, hides, tokens, tuple(kinds.values()))
        else:
            _lay_out_plainly(clean, seen, is_drawn, hides, tokens, kinds)
        inputs = {name: torch.from_numpy(array) for name, array in kinds.items()}
        if (lengths + 1 < shape[1]).any():
            is_real = np.arange(shape[1]) <= lengths[:, None]
            inputs["attention_mask"] = torch.from_numpy(is_real.astype(np.int64))
        return inputs

    def _extra_inputs(
        self, batch: CellBatch, cell_seed: np.ndarray, lengths: np.ndarray
    ) -> dict[str, torch.Tensor]:
        """What only some networks read: the parts of the bound, conditions, gene queries."""
        extra: dict[str, np.ndarray] = {}
        if self.objective == "elbo":
            if batch.cells.library_size is None:
                msg = "objective='elbo' is a likelihood of counts and needs a corpus of them; use 'paper'."
                raise ValueError(msg)
            extra["size_factors"] = (batch.cells.library_size / self.target_sum).astype(np.float32)
            extra["loss_weight"] = (lengths / self.mean_n_genes).astype(np.float32)
        if batch.condition_ids is not None:
            each, joint = self.condition_dropout
            places = np.arange(batch.condition_ids.shape[1] + 1, dtype=np.uint64)
            streams = CONDITION_STREAM + (places << np.uint64(8))
            uniforms = hashed_uniform(cell_seed[:, None], streams)  # (B, K + 1)
            is_hidden = (uniforms[:, 1:] < each) | (uniforms[:, :1] < joint)
            extra["condition_ids"] = np.where(is_hidden, 0, batch.condition_ids)
        if self.n_gene_queries:
            extra |= draw_gene_queries(
                batch.cells,
                batch.measured_genes[batch.dataset_ids],
                n_queries=self.n_gene_queries,
                cell_seed=cell_seed,
                pad_token_id=self.pad_token_id,
            )
        return {name: torch.from_numpy(array) for name, array in extra.items()}

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
        clean = first_genes(cells, self.max_genes)
        if self.depth_corruption == "none":
            return clean, clean.values
        if clean.counts is None or clean.library_size is None:
            return clean, scale_depth(clean.values, np.repeat(kept_share, clean.n_genes))
        sizes = clean.library_size

        def seen(counts: np.ndarray, rows: np.ndarray) -> np.ndarray:
            return scale_depth(normalise_counts(counts, sizes[rows], self.target_sum), kept_share[rows])

        return clean, map_counts(clean.offsets, clean.counts, seen)

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
        values = cell_values(cells.offsets, counts, library_size, self.target_sum)
        # Ranked by the thinned values; the clean value of each gene travels along in the place of its count.
        both = FlatCells(cells.offsets, cells.token_ids, values, cells.values, None)
        ranked = rank_cells(
            select_genes(both, counts > 0),
            gene_order=self.gene_order,
            ranking_weights=self.ranking_weights,
            max_genes=self.max_genes,
        )
        return FlatCells(ranked.offsets, ranked.token_ids, ranked.counts, None, None), ranked.values  # type: ignore[arg-type]


def _lay_out_plainly(
    clean: FlatCells,
    seen: np.ndarray,
    is_drawn: np.ndarray,
    hides: tuple[bool, bool],
    tokens: tuple[int, int, int, int],
    padded: dict[str, np.ndarray],
) -> None:
    """The kernel `lay_out` in plain NumPy."""
    hides_gene, hides_value = hides
    lat, mask, pad, ignored = tokens
    genes = clean.token_ids
    flat = {
        "input_ids": (np.where(is_drawn & hides_gene, mask, genes), lat, pad),
        "expression_values": (np.where(is_drawn & hides_value, np.float32(0), seen), 0, 0),
        "is_masked": (is_drawn & hides_value, False, False),
        "labels": (np.where(is_drawn & hides_gene, genes, ignored), ignored, ignored),
        "expression_labels": (clean.values, 0, 0),
    }
    for name, (entries, first, fill) in flat.items():
        rows = pad_cells(clean.offsets, entries, first=first, fill=fill)
        padded[name][:] = fill
        padded[name][:, : rows.shape[1]] = rows
