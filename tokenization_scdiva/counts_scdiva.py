"""Raw counts out of an AnnData: found, proven, and handed over in sparse blocks of cells.

Notable choices:
- one place is chosen by a fixed rule and said in the log; the search for counts never moves on because a
  place failed, the refusal names the places that would pass instead (only that for log1p expression moves on,
  from ``raw.X`` to ``X``);
- every stored value is looked at: counts are finite, not negative, whole and below 2**31;
- matrices are used by their shape and slots (``indptr``, ``indices``, ``data``), so that this file needs
  neither AnnData nor SciPy; sparse stays sparse, and of a dense matrix one block at a time is looked at;
- blocks are canonical whatever the storage: columns ascending, none twice in a row, no zeros.

Dimensions: N cells and G genes in the file, n cells and nnz values above zero in a block.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from .kernels_scdiva import compiled_kernels

logger = logging.getLogger(__name__)

WHOLE_TOLERANCE = 1e-6  # largest distance from a whole number that is rounding, not a fraction
LARGEST_COUNT = 2**31 - 1  # what int32 holds
LARGEST_LOG1P = float(np.log1p(1e6)) + 0.01  # a cell that is one gene, scaled to a million; room for rounding
FLOAT16_LIMIT = 2048  # float16 cannot tell whole numbers apart above this

Kind = Literal["counts", "log1p"]


@dataclass(frozen=True)
class CountBlock:
    """A block of consecutive cells in compressed sparse rows, canonical and proven.

    The arrays may share memory with the AnnData: do not write into them.

    Attributes:
        start: Index of the first cell of the block in the file.
        indptr: (n + 1,) int64 where each cell's values start and end.
        indices: (nnz,) int32 column in the file, ascending within a cell.
        data: (nnz,) values above zero; int32 molecules, or float32 log1p expression.
    """

    start: int
    indptr: np.ndarray
    indices: np.ndarray
    data: np.ndarray

    @property
    def n_cells(self) -> int:
        """Number of cells in the block."""
        return len(self.indptr) - 1

    def row_sums(self) -> np.ndarray:
        """Sum each cell's values; of counts this is the library size.

        Returns:
            (n,) int64 molecules for counts, float64 for log1p expression; 0 for empty cells.
        """
        kernels = compiled_kernels()
        if kernels is not None and self.data.dtype.kind == "i":
            sums = np.empty(self.n_cells, dtype=np.int64)
            kernels.row_sums(self.indptr, self.data, sums)
            return sums
        dtype = np.int64 if self.data.dtype.kind == "i" else np.float64
        running = np.concatenate([np.zeros(1, dtype), np.cumsum(self.data, dtype=dtype)])
        return running[self.indptr[1:]] - running[self.indptr[:-1]]


class Counts:
    """Proven counts of one AnnData, read in blocks of cells. Made by :func:`read_counts`.

    Attributes:
        source: Where the values come from: ``"X"``, ``"raw.X"`` or ``"layers['name']"``.
        use_raw: Whether genes are those of ``adata.raw.var`` instead of ``adata.var``.
        kind: ``"counts"`` or ``"log1p"``.
        n_cells: Number of cells, N.
        n_genes: Number of genes, G.
        block_size: Largest number of cells in a block.
    """

    def __init__(self, place: "_Place", kind: Kind, block_size: int) -> None:
        self.source = place.source
        self.use_raw = place.use_raw
        self.kind: Kind = kind
        self.n_cells, self.n_genes = (int(size) for size in place.matrix.shape)
        self.block_size = block_size
        self._place = place

    def __repr__(self) -> str:
        return f"Counts({self.kind} from {self.source}, {self.n_cells:,} cells, {self.n_genes:,} genes)"

    def blocks(self) -> Iterator[CountBlock]:
        """Read the file in blocks of cells, in order; each block is proven as it is read.

        Yields:
            Blocks of up to ``block_size`` cells that together hold every cell once.

        Raises:
            ValueError: If a value is not what ``kind`` promises (possible for backed files only: matrices in
                memory are proven before this object exists).
        """
        for start in range(0, self.n_cells, self.block_size):
            findings = _Findings()
            block = _read_block(self._place, start, self.block_size, self.kind, findings)
            if block is None:
                raise ValueError(_refusal(self._place, self.kind, findings))
            yield block

    def gene_totals(self) -> np.ndarray:
        """Sum each gene over all cells, in one pass over the file; kept for later calls.

        Returns:
            (G,) float64 molecules (or summed log1p expression).
        """
        return self._gene_totals.copy()

    @cached_property
    def _gene_totals(self) -> np.ndarray:
        totals = np.zeros(self.n_genes)
        for block in self.blocks():
            totals += np.bincount(block.indices, weights=block.data, minlength=self.n_genes)
        return totals


def read_counts(
    adata: Any,
    *,
    layer: str | None = None,
    expression_is_log1p: bool = False,
    block_size: int = 1000,
) -> Counts:
    """Find the raw counts of an AnnData and prove that they are counts.

    Taken are the named layer, else ``layers["counts"]``, else ``raw.X``, else ``X``. With
    ``expression_is_log1p`` they are the named layer, else ``raw.X`` if that passes as log1p expression, else
    ``X``. A matrix in memory is proven entirely, a backed one by its first block now and by each block as it
    is read. The matrix is never changed, and never made dense.

    Args:
        adata: AnnData, in memory, view or backed.
        layer: Layer to take; ``"X"`` and ``"raw.X"`` name these two where no layer has such a name.
        expression_is_log1p: The values are log1p of normalised counts, and that is wanted.
        block_size: Cells per block.

    Returns:
        The counts, to be read in blocks.

    Raises:
        KeyError: If there is no such layer.
        TypeError: If a path comes instead of an AnnData, or if the matrix does not hold numbers.
        ValueError: If there are no cells, no genes or no matrix, if ``block_size`` is below 1, if the
            logarithm has another base than e, or if the values are not counts (not log1p expression); the
            message says what was found and what would pass.
    """
    refuse_path(adata)
    if block_size < 1:
        msg = f"block_size must be at least 1 cell, got {block_size}."
        raise ValueError(msg)
    kind: Kind = "log1p" if expression_is_log1p else "counts"
    if expression_is_log1p:
        _check_log_base(adata.uns)
    places = _places(adata)
    if layer is not None and layer not in places:
        msg = f"There is no layer '{layer}'; present are {list(places)}. Name one of these as layer=..."
        raise KeyError(msg)
    place = places[layer or _choose(places, kind, block_size)]

    if place.matrix is None or 0 in place.matrix.shape:
        found = "is absent" if place.matrix is None else f"has (cells, genes) {tuple(place.matrix.shape)}"
        msg = f"{place.source} {found}; a matrix with at least one cell and one gene is needed."
        raise ValueError(msg + _advice(places, place, block_size))
    if not _is_numeric(place.matrix):
        msg = f"{place.source} has dtype {place.matrix.dtype}; bool, integers or floats are needed."
        raise TypeError(msg + _advice(places, place, block_size))
    findings = _prove(place, kind, block_size)
    if findings.fail(kind):
        raise ValueError(_refusal(place, kind, findings) + _advice(places, place, block_size))
    counts = Counts(place, kind, block_size)
    logger.info("Taking %s from %s: %d cells, %d genes.", kind, place.source, counts.n_cells, counts.n_genes)
    return counts


def refuse_path(cells: Any, *, is_text_allowed: bool = False) -> None:
    """Refuse the path of a file where its content is wanted.

    Args:
        cells: What came as cells.
        is_text_allowed: Let text through that neither ends like a file of cells nor names a file.

    Raises:
        TypeError: If a path came.
    """
    is_path = isinstance(cells, str | os.PathLike)
    if is_text_allowed and isinstance(cells, str):  # isfile: unlike Path.is_file it bears text of any length
        is_path = cells.endswith((".h5ad", ".h5")) or os.path.isfile(cells)  # noqa: PTH113
    if is_path:
        msg = f"Cells are taken from an AnnData, got a path ({cells}); open it with anndata.read_h5ad."
        raise TypeError(msg)


class _Place:
    """One matrix of an AnnData, read on first use, with the names its messages need."""

    def __init__(self, source: str, read: Callable[[], Any], cell_names: Any, gene_names: Any) -> None:
        self.source = source
        self.use_raw = source == "raw.X"
        self.cell_names = cell_names
        self.gene_names = gene_names
        self._read = read

    @cached_property
    def matrix(self) -> Any:
        """(N, G) the matrix as AnnData holds it; a file sorted by genes is brought into memory by cells."""
        matrix = self._read()
        if _format(matrix) in {None, "csr"}:
            return matrix
        if hasattr(matrix, "to_memory"):
            msg = (
                f"{self.source} is stored by genes (CSC) in the file, so all of it is read into memory, "
                "sparse, to be cut by cells. Write it once as CSR to read it in blocks."
            )
            warnings.warn(msg, UserWarning, stacklevel=2)
            matrix = matrix.to_memory()
        return matrix.tocsr()

    @property
    def is_in_memory(self) -> bool:
        """Whether proving every value costs no reading from disk."""
        return isinstance(self.matrix, np.ndarray) or hasattr(self.matrix, "indptr")


@dataclass
class _Findings:
    """What was seen in the values looked at: number and first example of each kind of fault."""

    n_values: int = 0
    n_fractional: int = 0
    largest: float = 0.0
    faults: dict[str, tuple[int, str]] | None = None

    def add(self, fault: str, n_found: int, example: str) -> None:
        self.faults = self.faults or {}
        n_before, first = self.faults.get(fault, (0, example))
        self.faults[fault] = (n_before + n_found, first)

    def fail(self, kind: Kind) -> bool:
        # Log1p of normalised counts without one fraction are counts that somebody called log1p.
        is_whole = kind == "log1p" and self.n_values > 0 and self.n_fractional == 0
        return bool(self.faults) or is_whole


# List the matrices of an AnnData by the name that ``layer`` takes, best known first.
def _places(adata: Any) -> dict[str, _Place]:
    cells, genes = adata.obs_names, adata.var_names
    places = {
        name: _Place(f"layers['{name}']", lambda name=name: adata.layers[name], cells, genes)  # type: ignore[misc]
        for name in adata.layers
        if name is not None  # some releases of anndata list X there, under None
    }
    if adata.raw is not None:
        raw = adata.raw
        places.setdefault("raw.X", _Place("raw.X", lambda: raw.X, cells, raw.var_names))
    places.setdefault("X", _Place("X", lambda: adata.X, cells, genes))
    return places


# scanpy notes the base of its log1p; None is e.
def _check_log_base(uns: Any) -> None:
    noted = uns.get("log1p")
    base = noted.get("base") if hasattr(noted, "get") else None
    if base is not None and not np.isclose(float(base), np.e):
        msg = (
            f"uns['log1p'] says that the logarithm has base {float(base):g}; the natural one is needed. "
            "Multiply the values by ln(base), and set uns['log1p']['base'] to None."
        )
        raise ValueError(msg)


# Choose where no layer is named, by the rule of read_counts.
def _choose(places: dict[str, _Place], kind: Kind, block_size: int) -> str:
    if kind == "counts" and "counts" in places:
        return "counts"
    if "raw.X" not in places:
        return "X"
    return "raw.X" if kind == "counts" or _passes(places["raw.X"], kind, block_size) else "X"


# Look at all values of a matrix in memory, or at the first block of a backed one.
def _prove(place: _Place, kind: Kind, block_size: int) -> _Findings:
    findings = _Findings()
    n_cells = place.matrix.shape[0] if place.is_in_memory else 1
    for start in range(0, n_cells, block_size):
        _read_block(place, start, block_size, kind, findings)
    return findings


# Whether a matrix would be accepted as this kind.
def _passes(place: _Place, kind: Kind, block_size: int) -> bool:
    matrix = place.matrix
    if matrix is None or 0 in matrix.shape or not _is_numeric(matrix):
        return False
    return not _prove(place, kind, block_size).fail(kind)


# How a sparse matrix is stored ("csr", "csc", ...); None for a dense one.
def _format(matrix: Any) -> str | None:
    return getattr(matrix, "format", None)


def _is_numeric(matrix: Any) -> bool:
    return np.dtype(matrix.dtype).kind in "buif"


# Read cells into canonical form and look at every value; None if one is at fault.
def _read_block(
    place: _Place, start: int, block_size: int, kind: Kind, findings: _Findings
) -> CountBlock | None:
    indptr, indices, values = _slice_rows(place.matrix, start, block_size)
    indptr, indices, values = _canonical(indptr, indices, values, place.matrix.shape[1])
    data = _checked_values(
        values, kind, findings, lambda i: _example(place, start, indptr, indices, values, i)
    )
    if data is None:
        return None
    if not (is_stored := data != 0).all():
        indptr = np.concatenate([[0], np.cumsum(is_stored)])[indptr]
        indices, data = indices[is_stored], data[is_stored]
    return CountBlock(start, indptr.astype(np.int64, copy=False), indices.astype(np.int32, copy=False), data)


# Cut cells out of a dense or sparse matrix as (indptr, indices, data), without copying if it can.
def _slice_rows(matrix: Any, start: int, block_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    stop = min(start + block_size, matrix.shape[0])
    if hasattr(matrix, "indptr"):  # in memory: slots are cut, not copied
        low, high = int(matrix.indptr[start]), int(matrix.indptr[stop])
        return matrix.indptr[start : stop + 1] - low, matrix.indices[low:high], matrix.data[low:high]
    block = matrix[start:stop]
    if hasattr(block, "compute"):  # a lazy array
        block = block.compute()
    if _format(block) is not None:
        block = block.tocsr()
        return block.indptr, block.indices, block.data
    block = np.asarray(block)
    rows, columns = np.nonzero(block)  # row by row; NaN counts as non-zero
    indptr = np.searchsorted(rows, np.arange(len(block) + 1))
    return indptr, columns, block[rows, columns]


# Sort columns within rows and add up what is stored twice.
def _canonical(
    indptr: np.ndarray, indices: np.ndarray, values: np.ndarray, n_genes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if _is_canonical(indptr, indices, n_genes):
        return indptr, indices, values
    if len(indices) and not 0 <= indices.min() <= indices.max() < n_genes:
        msg = (
            f"The sparse matrix names columns {indices.min()} to {indices.max()}, but has {n_genes} genes: "
            "its index is damaged. Fetch the file again or leave it out."
        )
        raise ValueError(msg)
    rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    keys = rows * np.int64(n_genes) + indices
    order = np.argsort(keys, kind="stable")
    keys, values = keys[order], values[order]
    first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    if len(first) < len(keys):  # sums are made wider than what they add up
        wide = np.float64 if values.dtype.kind == "f" else np.int64
        values = np.add.reduceat(values, first, dtype=wide)
        keys = keys[first]
    rows, columns = np.divmod(keys, n_genes)
    return np.searchsorted(rows, np.arange(len(indptr))), columns, values


# Whether columns rise within every row: none twice, all in order, all of them columns of the matrix.
def _is_canonical(indptr: np.ndarray, indices: np.ndarray, n_genes: int) -> bool:
    kernels = compiled_kernels()
    if kernels is not None:
        return kernels.is_canonical(indptr, indices, n_genes)
    is_rising = np.diff(indices) > 0
    first_of_row = indptr[1:-1]
    is_rising[first_of_row[(first_of_row > 0) & (first_of_row < len(indices))] - 1] = True
    return bool(is_rising.all()) and (len(indices) == 0 or 0 <= indices.min() <= indices.max() < n_genes)


# Convert float32 and float64 that are counts beyond doubt; None for anything else.
def _whole_counts(values: np.ndarray, findings: _Findings) -> np.ndarray | None:
    kernels = compiled_kernels()
    if kernels is None or values.dtype not in (np.float32, np.float64):
        return None
    counts = np.empty(len(values), dtype=np.int32)
    tolerance = values.dtype.type(WHOLE_TOLERANCE)
    limit = np.nextafter(values.dtype.type(LARGEST_COUNT), tolerance)  # float32 rounds it up
    n_bad, n_nonzero, largest = kernels.whole_counts(values, tolerance, limit, counts)
    if n_bad:
        return None
    findings.n_values += n_nonzero
    findings.largest = max(findings.largest, float(largest))
    return counts


# Look at every value and convert: int32 for counts, float32 for log1p; None if one is at fault.
def _checked_values(
    values: np.ndarray, kind: Kind, findings: _Findings, example: Callable[[int], str]
) -> np.ndarray | None:
    if kind == "counts" and (counts := _whole_counts(values, findings)) is not None:
        return counts
    findings.n_values += int(np.count_nonzero(values))
    if values.size == 0:
        return values.astype(np.int32 if kind == "counts" else np.float32)
    low, high = float(values.min()), float(values.max())  # NaN anywhere makes both NaN
    findings.largest = max(findings.largest, high) if np.isfinite(high) else findings.largest
    is_float16 = values.dtype == np.float16
    if values.dtype.kind == "f":
        values = values.astype(np.float32) if is_float16 else values
        with np.errstate(invalid="ignore"):  # inf - inf; what is not finite is found below
            is_fractional = np.abs(values - np.rint(values)) > WHOLE_TOLERANCE
        n_fractional = int(np.count_nonzero(is_fractional))
        findings.n_fractional += n_fractional
    else:
        is_fractional, n_fractional = None, 0

    limit = LARGEST_LOG1P if kind == "log1p" else FLOAT16_LIMIT if is_float16 else LARGEST_COUNT
    if low >= 0 and high <= limit and (kind == "log1p" or n_fractional == 0):
        if kind == "log1p":
            return values.astype(np.float32)
        return (np.rint(values) if values.dtype.kind == "f" else values).astype(np.int32)

    # Only a matrix that is refused anyway comes here: say what is wrong with it, fault by fault.
    is_finite = np.isfinite(values)
    faults = {"not finite": ~is_finite, "negative": is_finite & (values < 0)}
    if kind == "counts" and is_fractional is not None:
        faults["not whole"] = is_fractional & is_finite & (values > 0)
    above = f"above {limit:,.1f}" if kind == "log1p" else f"above {limit:,}"
    above += ", where float16 is no longer exact" if kind == "counts" and is_float16 else ""
    faults[above] = is_finite & (values > limit)
    for fault, is_at_fault in faults.items():
        if n_found := int(np.count_nonzero(is_at_fault)):
            findings.add(fault, n_found, example(int(np.argmax(is_at_fault))))
    return None


# Name one value by its cell and gene.
def _example(
    place: _Place, start: int, indptr: np.ndarray, indices: np.ndarray, values: np.ndarray, i: int
) -> str:
    cell = start + int(np.searchsorted(indptr, i, side="right")) - 1
    return f"cell '{place.cell_names[cell]}', gene '{place.gene_names[int(indices[i])]}' = {values[i]:g}"


# Say what was found instead of what was wanted, and what it looks like.
def _refusal(place: _Place, kind: Kind, findings: _Findings) -> str:
    wanted = "raw counts" if kind == "counts" else "log1p expression"
    if not findings.faults:
        return (
            f"{place.source} does not hold {wanted}: all {findings.n_values:,} values are whole numbers. "
            "These look like raw counts; leave expression_is_log1p out."
        )
    parts = [f"{n:,} values are {fault} (first: {first})" for fault, (n, first) in findings.faults.items()]
    text = f"{place.source} does not hold {wanted}: {'; '.join(parts)}."
    if "not finite" in findings.faults:
        return f"{text} Remove those cells or genes first."
    if "negative" in findings.faults:
        return f"{text} This looks like scaled or corrected expression."
    if kind == "log1p":
        return f"{text} This looks like counts, or like normalised expression before the logarithm."
    if "not whole" in findings.faults:
        if findings.largest <= LARGEST_LOG1P:
            return (
                f"{text} The largest is {findings.largest:.3g}: this looks like log1p expression; "
                "if it is, and there are no counts, pass expression_is_log1p=True."
            )
        return f"{text} This looks like corrected or normalised counts; the counts themselves are needed."
    return text


# Say which matrices exist, and which of them would be accepted with which argument.
def _advice(places: dict[str, _Place], refused: _Place, block_size: int) -> str:
    others = {name: place for name, place in places.items() if place is not refused}
    if not others:
        return " There is no other matrix: no layers, no raw."
    counts = [name for name, place in others.items() if _passes(place, "counts", block_size)]
    log1p = [name for name, place in others.items() if _passes(place, "log1p", block_size)]
    advice = [f" Other matrices: {list(others)}."]
    advice += [f"Raw counts: pass layer={name!r}." for name in counts]
    advice += [f"Log1p expression: pass layer={name!r}, expression_is_log1p=True." for name in log1p]
    return " ".join(advice if counts or log1p else [*advice, "None of them passes either."])
