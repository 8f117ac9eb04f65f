"""From counts to ranked cells: normalise, score, sort, cut (METHOD: "From counts to tokens").

Cells travel through the package as flat, ragged arrays: one long array per quantity and `offsets` that say
where each cell begins. No Python object per cell and per gene, no padding before the very end.

The sort is exact and total: score descending, ties by token id ascending. It therefore depends neither on the
order of genes in a file nor on how cells are cut into blocks. Compiled kernels do the work where numba is
installed (`kernels_scdiva`); what stands here beside them is plain NumPy with the same result. There a score
and its token id are packed into one 64-bit key: NumPy sorts unsigned integers with vector instructions, and
no separate tie rule is needed.

Dimensions: B cells, T gene tokens of all these cells together, V vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from .counts_scdiva import Counts
from .kernels_scdiva import compiled_kernels

TARGET_SUM = 10_000.0
# Counts below this are looked up in a table of each cell; more of them are rare.
TABLE_WIDTH = 64
GENE_ORDERS = ("entropy", "expression", "random")
TOKEN_BITS = np.uint64(32)
TOKEN_MASK = np.uint64(0xFFFFFFFF)
# Constants of splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators").
SPLITMIX_GAMMA = np.uint64(0x9E3779B97F4A7C15)
SPLITMIX_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
SPLITMIX_MIX_2 = np.uint64(0x94D049BB133111EB)


class FlatCells(NamedTuple):
    """Ragged cells in flat arrays; cell ``i`` owns the entries ``offsets[i]:offsets[i + 1]``.

    Attributes:
        offsets: (B + 1,) int64.
        token_ids: (T,) int32 gene tokens.
        values: (T,) float32 expression, log1p of counts per ``target_sum`` molecules.
        counts: (T,) int32 molecules, or None where only log1p values are known.
        library_size: (B,) float64 molecules over all genes of the file, or None with ``counts``.
    """

    offsets: np.ndarray
    token_ids: np.ndarray
    values: np.ndarray
    counts: np.ndarray | None
    library_size: np.ndarray | None

    @property
    def n_cells(self) -> int:
        """Number of cells B."""
        return len(self.offsets) - 1

    @property
    def n_genes(self) -> np.ndarray:
        """(B,) gene tokens of each cell."""
        return np.diff(self.offsets)


def splitmix64(counter: np.ndarray) -> np.ndarray:
    """Hash 64-bit counters to 64 random bits; the whole generator is this function.

    Args:
        counter: uint64 array of any shape. Distinct counters give independent-looking words.

    Returns:
        uint64 array of the same shape.
    """
    with np.errstate(over="ignore"):
        word = np.asarray(counter, dtype=np.uint64) * SPLITMIX_GAMMA + SPLITMIX_GAMMA
        word = (word ^ (word >> np.uint64(30))) * SPLITMIX_MIX_1
        word = (word ^ (word >> np.uint64(27))) * SPLITMIX_MIX_2
    return word ^ (word >> np.uint64(31))


def hashed_uniform(seeds: np.ndarray, counter: np.ndarray | np.uint64) -> np.ndarray:
    """Draw numbers that are a function of seed and counter alone.

    Args:
        seeds: uint64 hashes.
        counter: uint64 places in the stream, of a shape that fits.

    Returns:
        float64 in [0, 1) with 53 random bits.
    """
    with np.errstate(over="ignore"):
        return (splitmix64(seeds + splitmix64(counter)) >> np.uint64(11)) * 2.0**-53  # type: ignore[arg-type]


def normalise_counts(counts: np.ndarray, library_size: np.ndarray, target_sum: float) -> np.ndarray:
    """Turn molecules into expression values, v = log1p(target_sum * c / N).

    Args:
        counts: (T,) molecules.
        library_size: (T,) molecules of the cell that each entry belongs to, > 0 where ``counts`` is.
        target_sum: Molecules to which every cell is scaled.

    Returns:
        (T,) float32.
    """
    scaled = counts.astype(np.float64)
    scaled *= target_sum
    scaled /= library_size
    return np.log1p(scaled).astype(np.float32)


def map_counts(
    offsets: np.ndarray, counts: np.ndarray, function: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    """Evaluate a function of a count and its cell at every entry: by a table, because most counts are small.

    Args:
        offsets: (B + 1,) cell boundaries.
        counts: (T,) integer molecules.
        function: Takes n counts and n cells (0 to B - 1), gives n float32.

    Returns:
        (T,) float32.
    """
    n_cells, kernels = len(offsets) - 1, compiled_kernels()
    if kernels is None:
        return function(counts, np.repeat(np.arange(n_cells), np.diff(offsets)))
    with np.errstate(divide="ignore", invalid="ignore"):  # an empty cell has a row too, and looks nothing up
        table = function(np.tile(np.arange(TABLE_WIDTH), n_cells), np.repeat(np.arange(n_cells), TABLE_WIDTH))
    values = np.empty(len(counts), dtype=np.float32)
    kernels.look_up(offsets, counts, table.reshape(n_cells, TABLE_WIDTH), values)
    entries = np.flatnonzero(counts >= TABLE_WIDTH)
    values[entries] = function(counts[entries], np.searchsorted(offsets, entries, side="right") - 1)
    return values


def cell_values(
    offsets: np.ndarray, counts: np.ndarray, library_size: np.ndarray, target_sum: float
) -> np.ndarray:
    """Turn the molecules of cells into expression values.

    Args:
        offsets: (B + 1,) cell boundaries.
        counts: (T,) integer molecules.
        library_size: (B,) molecules of each cell, > 0 where it has counts.
        target_sum: Molecules to which every cell is scaled.

    Returns:
        (T,) float32, those of `normalise_counts`.
    """
    return map_counts(
        offsets, counts, lambda some, cells: normalise_counts(some, library_size[cells], target_sum)
    )


def score_keys(values: np.ndarray, token_ids: np.ndarray, ranking_weights: np.ndarray) -> np.ndarray:
    """Sort keys of the ranking score s = v / (H_g + eps); a smaller key ranks earlier.

    Args:
        values: (T,) float32 expression, > 0.
        token_ids: (T,) gene tokens.
        ranking_weights: (V,) H_g + eps; ones give plain expression order.

    Returns:
        (T,) uint32. Bits of positive float32 numbers order as the numbers do, so the complement orders
        descending.
    """
    scores = (values / ranking_weights[token_ids]).astype(np.float32)
    return ~scores.view(np.uint32)


def random_keys(offsets: np.ndarray, token_ids: np.ndarray, values: np.ndarray, seed: int) -> np.ndarray:
    """Sort keys of a random gene order that is a function of the cell's content alone.

    Args:
        offsets: (B + 1,) cell boundaries.
        token_ids: (T,) gene tokens.
        values: (T,) float32 expression.
        seed: Another seed, another order.

    Returns:
        (T,) uint32. The cell enters through a sum of hashes, which no order of its genes changes.
    """
    content = splitmix64(token_ids.astype(np.uint64) << TOKEN_BITS | values.view(np.uint32).astype(np.uint64))
    with np.errstate(over="ignore"):
        running = np.concatenate([np.zeros(1, np.uint64), np.cumsum(content, dtype=np.uint64)])
        cell_hash = splitmix64(running[offsets[1:]] - running[offsets[:-1]] + np.uint64(seed))
        words = splitmix64(np.repeat(cell_hash, np.diff(offsets)) + token_ids.astype(np.uint64))
    return (words >> TOKEN_BITS).astype(np.uint32)


def ranked_order(
    offsets: np.ndarray, token_ids: np.ndarray, keys: np.ndarray, *, max_genes: int | None, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Order the genes of every cell by key, ties by token id, and keep the first ``max_genes``.

    Args:
        offsets: (B + 1,) cell boundaries.
        token_ids: (T,) gene tokens, each at most once in a cell.
        keys: (T,) uint32, smaller first.
        max_genes: Genes kept of a cell; None keeps all.
        vocab_size: V, an upper bound of the token ids.

    Returns:
        ``order`` (K,) int64 positions in the flat arrays, and the new ``offsets`` (B + 1,).
    """
    new_offsets = _cut_offsets(offsets, max_genes)
    order = np.empty(new_offsets[-1], dtype=np.int64)
    packed = keys.astype(np.uint64) << TOKEN_BITS | token_ids.astype(np.uint64)
    place_of_token = np.empty(vocab_size, dtype=np.int64)
    places = np.arange(len(token_ids), dtype=np.int64)
    for cell, n_kept in enumerate(np.diff(new_offsets)):  # a cell fits the cache, a block does not
        entries = slice(offsets[cell], offsets[cell + 1])
        place_of_token[token_ids[entries]] = places[entries]
        ranked_tokens = np.sort(packed[entries])[:n_kept] & TOKEN_MASK
        order[new_offsets[cell] : new_offsets[cell + 1]] = place_of_token[ranked_tokens.astype(np.int64)]
    return order, new_offsets


def rank_cells(
    cells: FlatCells, *, gene_order: str, ranking_weights: np.ndarray, max_genes: int | None, seed: int = 0
) -> FlatCells:
    """Put the genes of every cell in ranking order and cut the tail.

    Args:
        cells: Cells with their genes in any order; values > 0.
        gene_order: ``entropy``, ``expression`` or ``random``.
        ranking_weights: (V,) H_g + eps, read in entropy order.
        max_genes: Genes kept of a cell; None keeps all.
        seed: Of the random order.

    Returns:
        The same cells, ordered and cut.

    Raises:
        ValueError: If ``gene_order`` is none of the three.
    """
    if gene_order not in GENE_ORDERS:
        msg = f"gene_order must be 'entropy', 'expression' or 'random', got {gene_order!r}."
        raise ValueError(msg)
    keys = None
    if gene_order == "random":
        keys = random_keys(cells.offsets, cells.token_ids, cells.values, seed)
    weights = ranking_weights if gene_order == "entropy" else np.ones(len(ranking_weights))
    kernels = compiled_kernels()
    if kernels is not None:
        return _rank_compiled(kernels, cells, keys, weights, max_genes)
    keys = score_keys(cells.values, cells.token_ids, weights) if keys is None else keys
    order, offsets = ranked_order(
        cells.offsets, cells.token_ids, keys, max_genes=max_genes, vocab_size=len(weights)
    )
    return FlatCells(
        offsets=offsets,
        token_ids=cells.token_ids[order],
        values=cells.values[order],
        counts=None if cells.counts is None else cells.counts[order],
        library_size=cells.library_size,
    )


def _rank_compiled(
    kernels: Any, cells: FlatCells, keys: np.ndarray | None, weights: np.ndarray, max_genes: int | None
) -> FlatCells:
    """`rank_cells` in compiled code."""
    offsets = _cut_offsets(cells.offsets, max_genes)
    amounts = cells.values if cells.counts is None else cells.counts
    given_keys = np.empty(0, np.uint32) if keys is None else keys
    ranked = tuple(np.empty(offsets[-1], array.dtype) for array in (cells.token_ids, cells.values, amounts))
    kernels.rank_rows(
        cells.offsets, cells.token_ids, cells.values, amounts, weights, given_keys, offsets, ranked
    )
    kept = None if cells.counts is None else ranked[2]
    return FlatCells(offsets, ranked[0], ranked[1], kept, cells.library_size)


def _cut_offsets(offsets: np.ndarray, max_genes: int | None) -> np.ndarray:
    """(B + 1,) int64 cell boundaries after the cut."""
    lengths = np.diff(offsets)
    kept = lengths if max_genes is None else np.minimum(lengths, max_genes)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(kept)])


def keep_vocabulary_genes(
    indptr: np.ndarray, columns: np.ndarray, amounts: np.ndarray, column_tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Replace file columns by token ids and leave out columns that have none.

    Args:
        indptr: (B + 1,) row boundaries of a CSR block.
        columns: (nnz,) column of each entry.
        amounts: (nnz,) counts or log1p values.
        column_tokens: (G,) token id of each column, -1 for none.

    Returns:
        ``offsets`` (B + 1,), ``token_ids`` (T,) int32 and ``amounts`` (T,).
    """
    kernels = compiled_kernels()
    if kernels is not None:
        offsets = np.empty(len(indptr), np.int64)
        token_ids, kept = np.empty(len(columns), np.int32), np.empty(len(columns), amounts.dtype)
        n_kept = kernels.keep_genes(indptr, columns, amounts, column_tokens, offsets, token_ids, kept)
        return offsets, token_ids[:n_kept], kept[:n_kept]
    tokens = column_tokens[columns]
    is_kept = tokens >= 0
    kept_before = np.concatenate([np.zeros(1, np.int64), np.cumsum(is_kept)])
    return kept_before[indptr], tokens[is_kept].astype(np.int32), amounts[is_kept]


def iter_flat_cells(
    counts: Counts, column_tokens: np.ndarray, *, library_size: np.ndarray | None = None, target_sum: float
) -> Iterator[tuple[int, FlatCells, float]]:
    """Turn proven count blocks into flat cells of vocabulary genes, still unranked.

    Args:
        counts: What `read_counts` returned.
        column_tokens: (G,) token id of each column, -1 for none.
        library_size: (N,) molecules per cell; default the row sums over all genes of the file.
        target_sum: Molecules to which every cell is scaled.

    Yields:
        Index of the block's first cell, its cells, and the sum of all its entries, known genes or not.

    Raises:
        ValueError: If a cell holds more molecules than ``library_size`` says.
    """
    for block in counts.blocks():
        totals = block.row_sums()
        offsets, token_ids, amounts = keep_vocabulary_genes(
            block.indptr, block.indices, block.data, column_tokens
        )
        if counts.kind == "log1p":
            yield block.start, FlatCells(offsets, token_ids, amounts, None, None), float(totals.sum())
            continue
        sizes = totals if library_size is None else library_size[block.start : block.start + len(totals)]
        if not (sizes >= totals).all():
            cell = int(np.argmin(sizes >= totals))
            msg = (
                f"library_size of cell {block.start + cell} is {sizes[cell]:g}, but its genes here hold "
                f"{totals[cell]:,} molecules. Give molecules per cell, counted before genes were left out."
            )
            raise ValueError(msg)
        values = cell_values(offsets, amounts, sizes, target_sum)
        yield block.start, FlatCells(offsets, token_ids, values, amounts, sizes), float(totals.sum())


def pad_cells(offsets: np.ndarray, flat: np.ndarray, *, first: float, fill: float) -> np.ndarray:
    """Lay ragged cells out as a rectangle with one leading entry, the place of the anchor token.

    Args:
        offsets: (B + 1,) cell boundaries.
        flat: (T,) entries of all cells.
        first: Value of column 0.
        fill: Value to the right of each cell's last gene.

    Returns:
        (B, S) array of the type of ``flat``, S = 1 + longest cell.
    """
    lengths = np.diff(offsets)
    width = 1 + int(lengths.max(initial=0))
    padded = np.full((len(lengths), width), fill, dtype=flat.dtype)
    padded[:, 0] = first
    padded[:, 1:][np.arange(width - 1) < lengths[:, None]] = flat
    return padded


def select_cells(cells: FlatCells, is_kept: np.ndarray) -> FlatCells:
    """Keep some of the cells.

    Args:
        cells: B cells.
        is_kept: (B,) bool.

    Returns:
        The kept cells in the same order.
    """
    if is_kept.all():
        return cells
    lengths = cells.n_genes
    entry_is_kept = np.repeat(is_kept, lengths)
    return FlatCells(
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths[is_kept])]),
        token_ids=cells.token_ids[entry_is_kept],
        values=cells.values[entry_is_kept],
        counts=None if cells.counts is None else cells.counts[entry_is_kept],
        library_size=None if cells.library_size is None else cells.library_size[is_kept],
    )


def first_genes(cells: FlatCells, max_genes: int) -> FlatCells:
    """Cut the tail of every cell.

    Args:
        cells: B ranked cells.
        max_genes: Genes kept of a cell.

    Returns:
        The cells; they themselves where none is longer.
    """
    if (cells.n_genes <= max_genes).all():
        return cells
    offsets = _cut_offsets(cells.offsets, max_genes)
    bounds = list(
        zip(cells.offsets[:-1].tolist(), (cells.offsets[:-1] + np.diff(offsets)).tolist(), strict=True)
    )

    def cut(flat: np.ndarray) -> np.ndarray:
        return np.concatenate([flat[start:stop] for start, stop in bounds])

    counts = None if cells.counts is None else cut(cells.counts)
    return FlatCells(offsets, cut(cells.token_ids), cut(cells.values), counts, cells.library_size)


def select_genes(cells: FlatCells, is_kept: np.ndarray) -> FlatCells:
    """Keep some of the genes.

    Args:
        cells: B cells with T gene tokens.
        is_kept: (T,) bool.

    Returns:
        All cells, with the kept genes in the same order.
    """
    kept_before = np.concatenate([np.zeros(1, np.int64), np.cumsum(is_kept)])
    return FlatCells(
        offsets=kept_before[cells.offsets],
        token_ids=cells.token_ids[is_kept],
        values=cells.values[is_kept],
        counts=None if cells.counts is None else cells.counts[is_kept],
        library_size=cells.library_size,
    )
