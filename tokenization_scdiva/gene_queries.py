"""Gene queries: which genes a cell is asked for in training, half of them expressed, half silent.

Silent means measured and not expressed. A gene that the cell's file does not measure is never asked for: its
zero would be a lie. Draws are hashes of (cell, place) like every other corruption.

Dimensions: B cells, Q queries per cell, T gene tokens of all cells, V vocabulary.
Source: METHOD.md section 3.
"""

import base64
import zlib

import numpy as np

from tokenization_scdiva.ranking_scdiva import FlatCells, hashed_uniform

# Streams of random numbers of one cell: counters far above any gene's place.
EXPRESSED_STREAM, SILENT_STREAM = np.uint64(2**41), np.uint64(2**42)


def draw_gene_queries(
    cells: FlatCells, is_measured: np.ndarray, *, n_queries: int, cell_seed: np.ndarray, pad_token_id: int
) -> dict[str, np.ndarray]:
    """Draw expressed and silent genes of each cell, with replacement.

    Args:
        cells: All genes of the B clean cells, uncut.
        is_measured: (B, V) bool, the genes that the cell's file measures.
        n_queries: Queries Q per cell, an even number; half are expressed genes and half silent ones.
        cell_seed: (B,) uint64, one hash per cell.
        pad_token_id: Stands where a cell has no gene of a kind.

    Returns:
        ``query_ids`` (B, Q) int64, ``query_labels`` (B, Q) float32 log1p values, 0 at silent genes, and
        ``query_log_ratio`` (B,) float32, the log of (share of the expressed genes asked / share of the silent
        genes asked), which makes log-odds learnt on this draw those of the natural share; 0 where a cell has
        only one kind.
    """
    n_cells, half = cells.n_cells, n_queries // 2
    n_expressed = cells.n_genes  # (B,)
    is_silent = is_measured.copy()
    is_silent[np.repeat(np.arange(n_cells), n_expressed), cells.token_ids] = False
    n_silent = is_silent.sum(axis=1)  # (B,)
    silent_ids = np.nonzero(is_silent)[1]
    silent_starts = np.cumsum(n_silent) - n_silent

    places = np.arange(half, dtype=np.uint64)
    chosen = {}
    for kind, stream, starts, n_genes in (
        ("expressed", EXPRESSED_STREAM, cells.offsets[:-1], n_expressed),
        ("silent", SILENT_STREAM, silent_starts, n_silent),
    ):
        uniforms = hashed_uniform(cell_seed[:, None], stream + places)  # (B, Q / 2)
        chosen[kind] = starts[:, None] + (uniforms * n_genes[:, None]).astype(np.int64)
    query_ids = np.full((n_cells, 2 * half), pad_token_id, dtype=np.int64)
    query_labels = np.zeros((n_cells, 2 * half), dtype=np.float32)
    has_expressed, has_silent = n_expressed > 0, n_silent > 0
    entries = chosen["expressed"][has_expressed]
    query_ids[has_expressed, :half] = cells.token_ids[entries]
    query_labels[has_expressed, :half] = cells.values[entries]
    query_ids[has_silent, half:] = silent_ids[chosen["silent"][has_silent]]
    has_both = has_expressed & has_silent
    log_ratio = np.zeros(n_cells, dtype=np.float32)
    log_ratio[has_both] = np.log(n_silent[has_both] / n_expressed[has_both])
    return {"query_ids": query_ids, "query_labels": query_labels, "query_log_ratio": log_ratio}


def pack_measured_genes(token_ids: np.ndarray, vocab_size: int) -> str:
    """Write down which tokens a file measures, small enough for a manifest.

    Args:
        token_ids: (G,) token of each column of the file, negative where it has none.
        vocab_size: V.

    Returns:
        Base64 of the compressed bits, one bit per token.
    """
    is_measured = np.zeros(vocab_size, dtype=bool)
    is_measured[token_ids[token_ids >= 0]] = True
    return base64.b64encode(zlib.compress(np.packbits(is_measured).tobytes(), 9)).decode("ascii")


def unpack_measured_genes(packed: str, vocab_size: int) -> np.ndarray:
    """Read what `pack_measured_genes` wrote.

    Args:
        packed: Its text.
        vocab_size: V.

    Returns:
        (V,) bool.
    """
    bits = np.frombuffer(zlib.decompress(base64.b64decode(packed)), dtype=np.uint8)
    return np.unpackbits(bits, count=vocab_size).astype(bool)
