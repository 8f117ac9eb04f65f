"""What integration is compared with: PCA, Harmony, and controls that show what a score is worth.

scVI and scANVI are in `modeling_scdiva.metrics.scvi_baselines`.

Notable choices:
- PCA, Harmony and the two of scvi-tools get the same genes: highly variable ones, chosen within batches,
  without labels.
- The label one-hot control knows the labels and nothing else. It wins Avg-Bio and Avg-Batch, which shows what
  these averages say about a method that has seen the labels.
- Random vectors win the batch silhouette, which shows what that one is worth.
- Nothing is held out here: integration embeds the cells it is fitted on, and no method here but the control
  is given labels.

Dimensions: N cells, G genes, D components.
Source: Korsunsky et al. 2019 (Harmony); Luecken et al. 2022 (recipe).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from modeling_scdiva.metrics.annotation import log_normalise, pca_features

ONE_HOT_NOISE = 0.1


def highly_variable_genes(
    counts: Any, batches: Sequence[Any] | np.ndarray, *, n_top_genes: int = 2000
) -> np.ndarray:
    """Choose genes that vary within the batches (scanpy, flavour "seurat").

    Args:
        counts: (N, G) raw counts, dense or sparse.
        batches: (N,) technical batch of each cell.
        n_top_genes: Genes to choose; all that are detected if there are no more.

    Returns:
        (G,) bool.

    Raises:
        ImportError: If scanpy is not installed.
    """
    matrix = csr_matrix(counts)
    is_detected = np.asarray((matrix > 0).sum(axis=0)).ravel() > 0
    if is_detected.sum() <= n_top_genes:
        return is_detected
    try:
        import anndata
        import scanpy
    except ImportError as error:
        msg = 'Highly variable genes are chosen with scanpy: pip install "scdiva[eval]"'
        raise ImportError(msg) from error
    names = pd.Categorical(np.asarray(batches).astype(str))
    adata = anndata.AnnData(log_normalise(matrix)[:, is_detected])
    adata.obs["batch"] = names
    chosen = scanpy.pp.highly_variable_genes(
        adata, n_top_genes=n_top_genes, flavor="seurat", batch_key="batch", inplace=False
    )
    is_chosen = np.zeros(matrix.shape[1], dtype=bool)
    is_chosen[np.flatnonzero(is_detected)[chosen["highly_variable"].to_numpy()]] = True
    return is_chosen


def pca_embedding(counts: Any, is_chosen: np.ndarray, *, n_components: int = 50, seed: int = 0) -> np.ndarray:
    """Compute principal components of log-normalised cells: no integration.

    Args:
        counts: (N, G) raw counts; the library size is that of all genes.
        is_chosen: (G,) bool, genes to use.
        n_components: Components D; fewer if there are fewer cells or genes.
        seed: Of the start vector.

    Returns:
        (N, D) float32.
    """
    expression = log_normalise(counts)[:, np.flatnonzero(is_chosen)]
    n_components = min(n_components, min(expression.shape) - 1)
    return pca_features(expression, n_components=n_components, seed=seed)


def harmony_embedding(
    components: np.ndarray, batches: Sequence[Any] | np.ndarray, *, seed: int = 0
) -> np.ndarray:
    """Integrate principal components with Harmony, settings as they come.

    Args:
        components: (N, D) principal components.
        batches: (N,) technical batch of each cell.
        seed: Of its clustering.

    Returns:
        (N, D) float32.

    Raises:
        ImportError: If harmonypy is not installed.
    """
    try:
        import harmonypy
    except ImportError as error:
        msg = 'Harmony needs harmonypy: pip install "scdiva[eval]"'
        raise ImportError(msg) from error
    table = pd.DataFrame({"batch": np.asarray(batches).astype(str)})
    found = harmonypy.run_harmony(
        np.asarray(components, dtype=np.float64), table, "batch", random_state=seed, verbose=False, ncores=1
    )
    corrected = np.asarray(found.Z_corr)
    # Older releases keep the cells in columns.
    corrected = corrected if corrected.shape == np.shape(components) else corrected.T
    return np.ascontiguousarray(corrected, dtype=np.float32)


def random_embedding(n_cells: int, *, n_components: int = 50, seed: int = 0) -> np.ndarray:
    """Draw Gaussian vectors that know nothing.

    Args:
        n_cells: Number of cells N.
        n_components: Width D.
        seed: Equal seed, equal vectors.

    Returns:
        (N, D) float32.
    """
    return np.random.default_rng(seed).normal(size=(n_cells, n_components)).astype(np.float32)


def label_one_hot(labels: Sequence[Any] | np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Encode the labels themselves, with a little noise: the control that cheats.

    Args:
        labels: (N,) cell type of each cell.
        seed: Of the noise, standard deviation 0.1.

    Returns:
        (N, C) float32.
    """
    names, codes = np.unique(np.asarray(labels).astype(str), return_inverse=True)
    noise = np.random.default_rng(seed).normal(scale=ONE_HOT_NOISE, size=(len(codes), len(names)))
    return (np.eye(len(names))[codes] + noise).astype(np.float32)
