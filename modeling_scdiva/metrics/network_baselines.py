"""What scores a pair of genes without a network: co-expression, popularity, chance.

Notable choices:
- Correlations are over all cells that are given, zeros included, of log1p normalised values.
- Popularity, mean expression or degree, gives every TF the same targets. A method not above it has learned
  which genes are studied or seen, not who regulates whom.
- Degree uses the reference itself, of the other TFs only.

Dimensions: N cells, G genes in a file, T TFs, K targets.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.sparse import issparse
from scipy.stats import rankdata

CORRELATIONS = ("pearson", "spearman")


def coexpression_network(
    expression: Any,
    tf_columns: Sequence[int] | np.ndarray,
    target_columns: Sequence[int] | np.ndarray,
    *,
    correlation: str = "pearson",
) -> np.ndarray:
    """Correlate TFs with targets over cells.

    Args:
        expression: (N, G) log1p of normalised counts, dense or sparse; the columns named are made dense.
        tf_columns: (T,) columns of the TFs.
        target_columns: (K,) columns of the targets.
        correlation: "pearson", or "spearman", with mean ranks for ties.

    Returns:
        (T, K) float64 signed correlations; NaN where a gene is constant. Take absolute values to rank edges.

    Raises:
        ValueError: If the correlation is another, or there are fewer than 3 cells.
    """
    if correlation not in CORRELATIONS:
        msg = f"correlation must be one of {CORRELATIONS}, got {correlation!r}."
        raise ValueError(msg)
    if expression.shape[0] < 3:
        msg = f"A correlation needs at least 3 cells, got {expression.shape[0]}."
        raise ValueError(msg)
    tfs, targets = (
        _standardised(expression, columns, correlation) for columns in (tf_columns, target_columns)
    )
    return np.clip(tfs.T @ targets, -1.0, 1.0)


def mean_expression_network(
    expression: Any, n_tfs: int, target_columns: Sequence[int] | np.ndarray
) -> np.ndarray:
    """Score a target by its mean expression, whatever the TF.

    Args:
        expression: (N, G) log1p of normalised counts, dense or sparse.
        n_tfs: T.
        target_columns: (K,) columns of the targets.

    Returns:
        (T, K) float64, equal rows.
    """
    means = np.asarray(expression.mean(axis=0), dtype=np.float64).ravel()[np.asarray(target_columns)]
    return np.tile(means, (n_tfs, 1))


def degree_network(is_edge: np.ndarray) -> np.ndarray:
    """Score a target by how many other TFs of the reference it has: what popularity among curators gives.

    Args:
        is_edge: (T, K) bool, known edges.

    Returns:
        (T, K) float64 number of the other TFs with an edge to the target.
    """
    is_edge = np.asarray(is_edge, dtype=bool)
    return (is_edge.sum(axis=0, keepdims=True) - is_edge).astype(np.float64)


def random_network(n_tfs: int, n_targets: int, *, seed: int = 0) -> np.ndarray:
    """Score pairs at random.

    Args:
        n_tfs: T.
        n_targets: K.
        seed: Equal seed, equal scores.

    Returns:
        (T, K) float64 in [0, 1).
    """
    return np.random.default_rng(seed).random((n_tfs, n_targets))


def _standardised(expression: Any, columns: Sequence[int] | np.ndarray, correlation: str) -> np.ndarray:
    """Return (N, n) columns with mean 0 and length 1, NaN where constant."""
    chosen = expression[:, np.asarray(columns)]
    matrix = np.asarray(chosen.toarray() if issparse(chosen) else chosen, dtype=np.float64)
    if correlation == "spearman":
        matrix = rankdata(matrix, axis=0)
    is_constant = np.ptp(matrix, axis=0) == 0
    matrix = matrix - matrix.mean(axis=0)
    lengths = np.linalg.norm(matrix, axis=0)
    lengths[is_constant] = np.nan
    return matrix / lengths
