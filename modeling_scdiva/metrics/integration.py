"""How well batches are mixed and cell types kept, by the scores of scIB, from scib-metrics.

Avg-Bio is the mean of NMI, ARI and the silhouette of the types; Avg-Batch the mean of the batch silhouette
and the graph connectivity, as scGPT and scDiVa define them. Avg-Batch hardly tells good from no integration,
so BRAS, iLISI and kBET, which do, stand beside it.

Notable choices:
- NMI and ARI with the Leiden resolution that is best by NMI against the labels are an oracle: nobody without
  labels could choose it. Both are given at resolution 1.0, too.
- Neighbours are exact up to 20,000 cells, and each cell is its own first neighbour, as scib-metrics counts.
- Silhouettes are those of all cells that are given; subsample before, for every method alike.
- The embedding is scored as it is, in float32: neither scaled nor normalised.
- A number that cannot be computed is None, never 0. kBET leaves types out that are small (fewer than ten
  cells) or lie in one batch.
- kBET draws a start vector without a seed inside scib-metrics and may move in the third decimal.

Dimensions: N cells, D width.
Source: Luecken et al. 2022 (scIB); Cui et al. 2024 (scGPT, the averages); Rautenstrauch and Ohler 2025
(BRAS).
"""

import math
import random
import warnings
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import numpy as np
import pandas as pd
from sklearn.neighbors import NearestNeighbors

# scIB's numbers of neighbours, the cell itself among them.
CLUSTERING_NEIGHBORS, KBET_NEIGHBORS, LISI_NEIGHBORS = 15, 50, 90
MAX_EXACT_CELLS = 20_000
FIXED_RESOLUTION = 1.0
MIN_CELLS = 16
VERSIONED_PACKAGES = ("scib-metrics", "scikit-learn", "igraph", "umap-learn", "pynndescent", "jax")


def integration_scores(
    embedding: np.ndarray,
    labels: Sequence[Any] | np.ndarray,
    batches: Sequence[Any] | np.ndarray,
    *,
    unintegrated: np.ndarray | None = None,
    with_kbet: bool = True,
    seed: int = 0,
) -> dict[str, float | None]:
    """Score one embedding of cells from several batches.

    Entries that are missing or not finite, one type or one batch only, and types of which none lies in two
    batches raise ``ValueError``.

    Args:
        embedding: (N, D) one vector per cell.
        labels: (N,) cell type of each cell.
        batches: (N,) technical batch of each cell.
        unintegrated: (N, D') principal components before integration, with which `pcr_comparison` compares.
        with_kbet: Compute kBET; its first call in a process compiles for about twenty seconds.
        seed: Of the Leiden clustering.

    Returns:
        All in [0, 1], best 1. Of the types: ``avg_bio``, ``nmi_best_resolution``, ``ari_best_resolution``
        (oracle: the resolution is chosen by the labels), ``asw_label``, and ``avg_bio_resolution_1``,
        ``nmi_resolution_1``, ``ari_resolution_1``. Of the batches: ``avg_batch``, ``asw_batch``,
        ``graph_connectivity``, ``bras``, ``ilisi``, ``kbet``, ``pcr_comparison``. None where one is
        undefined or was not asked for.

    Raises:
        ImportError: If scib-metrics is not installed.
    """
    vectors, types, batch_names = _checked(embedding, labels, batches)
    try:
        import scib_metrics
    except ImportError as error:
        msg = 'Integration is scored with scib-metrics: pip install "scdiva[eval]"'
        raise ImportError(msg) from error

    neighbors = _nearest_neighbors(vectors, LISI_NEIGHBORS)
    clustering_neighbors = neighbors.subset_neighbors(min(CLUSTERING_NEIGHBORS, neighbors.n_neighbors))
    best, fixed = _clustering_scores(clustering_neighbors, types, seed)
    scores = {
        "nmi_best_resolution": best["nmi"],
        "ari_best_resolution": best["ari"],
        "asw_label": scib_metrics.silhouette_label(vectors, types),
        "nmi_resolution_1": fixed["nmi"],
        "ari_resolution_1": fixed["ari"],
        "asw_batch": scib_metrics.silhouette_batch(vectors, types, batch_names),
        "graph_connectivity": scib_metrics.graph_connectivity(clustering_neighbors, types),
        "bras": scib_metrics.bras(vectors, types, batch_names),
        "ilisi": scib_metrics.ilisi_knn(neighbors, batch_names),
        "kbet": _kbet(neighbors, types, batch_names) if with_kbet else None,
        "pcr_comparison": _pcr_comparison(unintegrated, vectors, batch_names),
    }
    averages = {
        "avg_bio": ("nmi_best_resolution", "ari_best_resolution", "asw_label"),
        "avg_bio_resolution_1": ("nmi_resolution_1", "ari_resolution_1", "asw_label"),
        "avg_batch": ("asw_batch", "graph_connectivity"),
    }
    plain = {name: _plain(score) for name, score in scores.items()}
    return {name: _mean([plain[part] for part in parts]) for name, parts in averages.items()} | plain


def integration_settings(n_cells: int) -> dict[str, Any]:
    """State how `integration_scores` computes, for the note of a table.

    Args:
        n_cells: Number of cells N that were scored.

    Returns:
        Clustering, resolutions, neighbours, distances, and the versions of the libraries.
    """
    sizes = {"clustering": CLUSTERING_NEIGHBORS, "kbet": KBET_NEIGHBORS, "lisi": LISI_NEIGHBORS}
    return {
        "clustering": "Leiden (igraph, modularity) on UMAP connectivities",
        "resolutions": "0.2 to 2.0 by 0.2, best by NMI against the labels (oracle); fixed: 1.0",
        "neighbors": {name: min(size, n_cells) for name, size in sizes.items()},
        "neighbor_search": "exact" if n_cells <= MAX_EXACT_CELLS else "pynndescent, seed 0",
        "distance": "Euclidean; cosine for BRAS; embedding neither scaled nor normalised",
        "n_cells": n_cells,
        "versions": {name: metadata.version(name) for name in VERSIONED_PACKAGES if _is_installed(name)},
    }


def _clustering_scores(neighbors: Any, types: np.ndarray, seed: int) -> tuple[dict, dict]:
    """Return NMI and ARI at the resolution that is best by NMI, and at the fixed one."""
    import igraph
    from scib_metrics import nmi_ari_cluster_labels_leiden

    try:
        best = nmi_ari_cluster_labels_leiden(neighbors, types, seed=seed)
        fixed = nmi_ari_cluster_labels_leiden(
            neighbors, types, optimize_resolution=False, resolution=FIXED_RESOLUTION, seed=seed
        )
    finally:
        igraph.set_random_number_generator(random)  # scib-metrics puts a seeded one into igraph
    return best, fixed


def _nearest_neighbors(vectors: np.ndarray, n_neighbors: int) -> Any:
    """Find the nearest neighbours of each cell, the cell itself first."""
    from scib_metrics.nearest_neighbors import NeighborsResults, pynndescent

    n_cells = len(vectors)
    n_neighbors = min(n_neighbors, n_cells)
    if n_cells > MAX_EXACT_CELLS:
        return pynndescent(vectors, n_neighbors=n_neighbors, random_state=0)
    # Without a query a cell is not its own neighbour; among equal cells it need not come first.
    found = NearestNeighbors(n_neighbors=n_neighbors - 1, algorithm="brute").fit(vectors)
    distances, indices = found.kneighbors()
    return NeighborsResults(
        indices=np.column_stack([np.arange(n_cells), indices]).astype(np.int32),
        distances=np.column_stack([np.zeros(n_cells), distances]).astype(np.float32),
    )


def _kbet(neighbors: Any, types: np.ndarray, batch_names: np.ndarray) -> float:
    from scib_metrics import kbet_per_label

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)  # no type can be tested
        few = neighbors.subset_neighbors(min(KBET_NEIGHBORS, neighbors.n_neighbors))
        return float(kbet_per_label(few, batch_names, types))


def _pcr_comparison(
    unintegrated: np.ndarray | None, vectors: np.ndarray, batch_names: np.ndarray
) -> float | None:
    if unintegrated is None:
        return None
    before = np.ascontiguousarray(unintegrated, dtype=np.float32)
    if before.ndim != 2 or len(before) != len(vectors) or not np.isfinite(before).all():
        msg = f"unintegrated must be finite and ({len(vectors)}, D), got shape {before.shape}."
        raise ValueError(msg)
    from scib_metrics import pcr_comparison

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "PCR comparison score is negative")  # documented: it becomes 0
        return float(pcr_comparison(before, vectors, batch_names, categorical=True))


def _checked(
    embedding: np.ndarray, labels: Sequence[Any] | np.ndarray, batches: Sequence[Any] | np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    vectors = np.ascontiguousarray(embedding, dtype=np.float32)
    if vectors.ndim != 2 or len(vectors) < MIN_CELLS:
        msg = f"embedding must be (N, D) with at least {MIN_CELLS} cells, got shape {vectors.shape}."
        raise ValueError(msg)
    if not np.isfinite(vectors).all():
        n_broken = int((~np.isfinite(vectors)).any(axis=1).sum())
        msg = f"{n_broken} of {len(vectors)} cells have embeddings that are not finite."
        raise ValueError(msg)
    columns = []
    for name, entries in (("labels", labels), ("batches", batches)):
        column = np.asarray(entries, dtype=object)
        if column.shape != vectors.shape[:1]:
            msg = f"{name} must be ({len(vectors)},), one per cell, got {column.shape}."
            raise ValueError(msg)
        n_missing = int(pd.isna(column).sum())
        if n_missing:
            msg = f"{n_missing} {name} are missing. Leave these cells out, for every method alike."
            raise ValueError(msg)
        column = column.astype(str)
        if len(np.unique(column)) < 2:
            msg = f"Integration is scored on at least two {name}, got only {str(column[0])!r}."
            raise ValueError(msg)
        columns.append(column)
    pairs = pd.DataFrame({"type": columns[0], "batch": columns[1]})
    n_batches = pairs.groupby("type")["batch"].nunique()
    # A type whose cells lie in as many batches as there are cells has no batch silhouette either.
    if not ((n_batches >= 2) & (n_batches < pairs.groupby("type").size())).any():
        msg = (
            f"None of the {len(n_batches)} labels lies in two batches: taking the batch away cannot be told "
            "from taking the cell type away. Score on batches that share cell types."
        )
        raise ValueError(msg)
    return vectors, columns[0], columns[1]


def _plain(score: Any) -> float | None:
    """Turn a score into a float; what is not finite is undefined."""
    return None if score is None or not math.isfinite(score) else float(score)


def _mean(parts: Sequence[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) / len(known) if len(known) == len(parts) else None


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
