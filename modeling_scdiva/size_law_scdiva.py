"""How large cells are: the law of library size and of the number of gene tokens, counted on training cells.

A cell's likelihood has three parts, its number of genes, the genes, and their counts; and whoever makes a
cell from nothing must first know how many genes to make. Both read this table: classes of library size with
equally many training cells each, and in each class a histogram of the number of gene tokens, uniform within a
bin, with one pseudo-cell spread over all lengths so that no length is impossible.

It is a plain mapping of lists, because it is saved in ``generation_config.json``.

Dimensions: N cells, K depth classes, M length bins.
Source: METHOD.md section 4, the term -log p(L).
"""

from typing import Any

import numpy as np

SizeLaw = dict[str, Any]


def fit_size_law(
    n_genes: np.ndarray,
    library_sizes: np.ndarray | None,
    *,
    max_genes: int,
    target_sum: float,
    n_depth_classes: int = 16,
    n_length_bins: int = 24,
) -> SizeLaw:
    """Count how large cells are.

    Args:
        n_genes: (N,) gene tokens of training cells, cut at ``max_genes``, at least 1.
        library_sizes: (N,) molecules per cell, or None where they are unknown.
        max_genes: Genes kept of a cell; a cell cut there counts as exactly that long.
        target_sum: Molecules to which every cell is scaled.
        n_depth_classes: Classes of depth K.
        n_length_bins: Bins of length M, about equally full over all cells.

    Returns:
        ``library_size_edges`` (K + 1,) molecules or None, ``n_genes_edges`` (M + 1,) first length of each bin
        and the end, ``counts`` (K, M) cells, ``target_sum``.

    Raises:
        ValueError: If there is no cell, or a length lies outside 1 .. ``max_genes``.
    """
    n_genes = np.asarray(n_genes, dtype=np.int64)
    if not len(n_genes) or n_genes.min() < 1 or n_genes.max() > max_genes:
        found = f"{n_genes.min()} to {n_genes.max()}" if len(n_genes) else "no cell"
        msg = f"A size law needs cells of 1 to max_genes={max_genes} genes, got {found}."
        raise ValueError(msg)
    inner = np.quantile(n_genes, np.linspace(0, 1, n_length_bins + 1)[1:-1]).round().astype(np.int64)
    # The atom of cells cut at max_genes is a bin of its own.
    edges = np.unique(np.concatenate([[1], inner, [max_genes, max_genes + 1]]))
    depth_edges = None
    classes = np.zeros(len(n_genes), dtype=np.int64)
    if library_sizes is not None:
        depth_edges = np.unique(np.quantile(library_sizes, np.linspace(0, 1, n_depth_classes + 1)))
        if len(depth_edges) == 1:
            depth_edges = np.repeat(depth_edges, 2)
        classes = _depth_class(depth_edges, np.asarray(library_sizes))
    n_classes = 1 if depth_edges is None else len(depth_edges) - 1
    counts = np.zeros((n_classes, len(edges) - 1), dtype=np.int64)
    np.add.at(counts, (classes, np.searchsorted(edges, n_genes, side="right") - 1), 1)
    return {
        "library_size_edges": None if depth_edges is None else [float(edge) for edge in depth_edges],
        "n_genes_edges": edges.tolist(),
        "counts": counts.tolist(),
        "target_sum": float(target_sum),
    }


def length_log_prob(size_law: SizeLaw, n_genes: np.ndarray, library_sizes: np.ndarray | None) -> np.ndarray:
    """Give the log-probability of a cell's number of gene tokens, given its depth where that is known.

    Args:
        size_law: By `fit_size_law`.
        n_genes: (N,) gene tokens.
        library_sizes: (N,) molecules per cell, or None to average over the depth classes.

    Returns:
        (N,) float64 nats, -inf at lengths the tokenizer cannot give.
    """
    edges = np.asarray(size_law["n_genes_edges"])
    law = _length_law(size_law)  # (K, M)
    n_genes = np.asarray(n_genes, dtype=np.int64)
    is_possible = (n_genes >= edges[0]) & (n_genes < edges[-1])
    bins = np.clip(np.searchsorted(edges, n_genes, side="right") - 1, 0, law.shape[1] - 1)
    if library_sizes is None or size_law["library_size_edges"] is None:
        probabilities = (_class_law(size_law) @ law)[bins]
    else:
        depth_edges = np.asarray(size_law["library_size_edges"])
        probabilities = law[_depth_class(depth_edges, np.asarray(library_sizes)), bins]
    return np.where(is_possible, np.log(probabilities / np.diff(edges)[bins]), -np.inf)


def draw_sizes(
    size_law: SizeLaw,
    uniforms: np.ndarray,
    *,
    n_genes: np.ndarray | None = None,
    library_sizes: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Draw how large new cells are.

    Args:
        size_law: By `fit_size_law`.
        uniforms: (N, 3) in [0, 1), of the depth class, the depth in it, and the length.
        n_genes: (N,) gene tokens where they are given; depth is then drawn for them.
        library_sizes: (N,) molecules where they are given; lengths are then drawn for them.

    Returns:
        (N,) int64 gene tokens, and (N,) float64 molecules per cell, None where the law knows no depth.
    """
    law, edges = _length_law(size_law), np.asarray(size_law["n_genes_edges"])
    n_cells = len(uniforms)
    classes = np.zeros(n_cells, dtype=np.int64)
    if size_law["library_size_edges"] is not None:
        depth_edges = np.asarray(size_law["library_size_edges"])
        if library_sizes is None:
            weights = np.repeat(_class_law(size_law)[None], n_cells, axis=0)  # (N, K)
            if n_genes is not None:
                bins = np.clip(np.searchsorted(edges, n_genes, side="right") - 1, 0, law.shape[1] - 1)
                weights = weights * law[:, bins].T
            classes = _invert(weights, uniforms[:, 0])
            low, high = depth_edges[classes], depth_edges[classes + 1]
            fewest = 1.0 if n_genes is None else n_genes  # a token is at least one molecule
            library_sizes = np.maximum(fewest, np.rint(low * (high / low) ** uniforms[:, 1]))
        else:
            classes = _depth_class(depth_edges, library_sizes)
    if n_genes is None:
        bins = _invert(law[classes], uniforms[:, 2])
        below = np.concatenate([np.zeros((len(law), 1)), law.cumsum(axis=1)], axis=1)[classes, bins]
        within = np.clip((uniforms[:, 2] - below) / law[classes, bins], 0.0, 1.0 - 1e-12)
        n_genes = edges[bins] + (within * np.diff(edges)[bins]).astype(np.int64)
        if library_sizes is not None:
            n_genes = np.minimum(n_genes, np.maximum(1, np.floor(library_sizes)).astype(np.int64))
    return np.asarray(n_genes, dtype=np.int64), library_sizes


def _depth_class(edges: np.ndarray, library_sizes: np.ndarray) -> np.ndarray:
    return np.clip(np.searchsorted(edges, library_sizes, side="right") - 1, 0, len(edges) - 2)


def _length_law(size_law: SizeLaw) -> np.ndarray:
    """(K, M) probability of each bin of lengths in each depth class."""
    counts = np.asarray(size_law["counts"], dtype=np.float64)
    widths = np.diff(size_law["n_genes_edges"])
    smoothed = counts + widths / widths.sum()
    return smoothed / smoothed.sum(axis=1, keepdims=True)


def _class_law(size_law: SizeLaw) -> np.ndarray:
    """(K,) share of the training cells in each depth class."""
    n_cells = np.asarray(size_law["counts"], dtype=np.float64).sum(axis=1)
    return n_cells / n_cells.sum()


def _invert(weights: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    cumulative = weights.cumsum(axis=1)
    return np.minimum(
        (cumulative <= uniforms[:, None] * cumulative[:, -1:]).sum(axis=1), weights.shape[1] - 1
    )


__all__ = ["draw_sizes", "fit_size_law", "length_log_prob"]
