"""How much a frozen embedding knows of cell types, by kNN and logistic regression, beside its baselines.

Notable choices:
- Whatever is fitted here is fitted on the training folds.
- kNN takes the features as they are. Scaling each to unit variance, which logistic regression needs to
  converge, would blow the last principal components, mostly noise, up to the size of the first and make PCA a
  weak baseline.
- Macro-F1 is over all classes that take part; stratified folds hold each of them.
- Classes with fewer cells than folds cannot be in every fold. They are left out, for every method alike, and
  reported.
- Folds split cells, not donors: type and donor may go together, which flatters every method. Compare on equal
  folds.

Dimensions: N cells, G genes, D width, C classes.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import sklearn
from scipy.sparse import csr_matrix, issparse
from sklearn.base import BaseEstimator
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

MAX_ITERATIONS = 2_000


def probe_embedding(
    features: np.ndarray,
    labels: Sequence[Any],
    *,
    n_folds: int = 5,
    n_neighbors: int = 15,
    seed: int = 0,
) -> dict[str, Any]:
    """Predict classes from frozen features by k nearest neighbours and by logistic regression.

    Args:
        features: (N, D) one vector per cell.
        labels: (N,) class of each cell.
        n_folds: Stratified folds; each is the test set once.
        n_neighbors: Neighbours of kNN (Euclidean distance, equal votes).
        seed: Of the split; equal labels and seed, equal folds for every method.

    Returns:
        ``knn_accuracy``, ``knn_macro_f1``, ``logistic_accuracy`` and ``logistic_macro_f1``, each the mean
        over the folds, in [0, 1], best 1, and each with its sample standard deviation over the folds as
        ``*_sd``; ``majority_accuracy``, what naming the largest class gives; ``n_cells`` and ``n_classes``
        that took part, ``n_cells_left_out`` and ``left_out_classes`` (class: cells);
        ``n_folds_not_converged`` of the regression; ``n_folds``, ``n_neighbors``, ``seed`` and the version of
        scikit-learn.

    Raises:
        ValueError: If shapes differ, a feature is not finite, a label is missing, fewer than two classes are
            large enough, or the folds are too few or too small for the neighbours.
    """
    features, classes = _checked(features, labels, n_folds)
    sizes = Counter(classes.tolist())
    left_out = {name: size for name, size in sorted(sizes.items()) if size < n_folds}
    is_kept = np.array([name not in left_out for name in classes.tolist()])
    if len(sizes) - len(left_out) < 2:
        largest = dict(sizes.most_common(5))
        msg = f"Two classes with at least n_folds={n_folds} cells are needed, the largest are {largest}."
        raise ValueError(msg)
    features, classes = features[is_kept], classes[is_kept]

    scores: dict[str, list[float]] = {}
    n_not_converged = 0
    folds = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
    for train, test in folds.split(features, classes):
        if n_neighbors > len(train):
            msg = f"n_neighbors={n_neighbors} exceeds the {len(train)} training cells of a fold."
            raise ValueError(msg)
        knn = KNeighborsClassifier(n_neighbors).fit(features[train], classes[train])
        _add_scores(scores, "knn", knn, features[test], classes[test])
        scaler = StandardScaler().fit(features[train])
        logistic = LogisticRegression(max_iter=MAX_ITERATIONS).fit(
            scaler.transform(features[train]), classes[train]
        )
        _add_scores(scores, "logistic", logistic, scaler.transform(features[test]), classes[test])
        n_not_converged += int(logistic.n_iter_.max() >= MAX_ITERATIONS)
    numbers: dict[str, Any] = {}
    for name, values in scores.items():
        numbers[name] = float(np.mean(values))
        numbers[f"{name}_sd"] = float(np.std(values, ddof=1))
    return numbers | {
        "majority_accuracy": max(sizes.values()) / len(classes),
        "n_cells": len(classes),
        "n_classes": len(sizes) - len(left_out),
        "n_cells_left_out": sum(left_out.values()),
        "left_out_classes": left_out,
        "n_folds_not_converged": n_not_converged,
        "n_folds": n_folds,
        "n_neighbors": n_neighbors,
        "seed": seed,
        "scikit_learn": sklearn.__version__,
    }


def log_normalise(counts: Any, *, target_sum: float = 10_000.0) -> csr_matrix:
    """Scale every cell to one library size and take log1p, what `pca_features` wants.

    Args:
        counts: (N, G) raw counts, dense or sparse.
        target_sum: Molecules to which every cell is scaled.

    Returns:
        (N, G) float32 CSR, log1p(target_sum * c / N_c); cells without molecules stay zero.

    Raises:
        ValueError: If a count is negative or not finite.
    """
    matrix = csr_matrix(counts, dtype=np.float64, copy=True)
    if not (np.isfinite(matrix.data) & (matrix.data >= 0)).all():
        msg = "counts must be finite and not negative."
        raise ValueError(msg)
    library_size = np.asarray(matrix.sum(axis=1)).ravel()
    scale = np.divide(target_sum, library_size, out=np.zeros_like(library_size), where=library_size > 0)
    matrix.data = np.log1p(matrix.data * np.repeat(scale, np.diff(matrix.indptr)))
    return matrix.astype(np.float32)


def depth_features(counts: Any) -> np.ndarray:
    """Give what is known of a cell from its sequencing depth alone, the baseline every embedding must beat.

    Args:
        counts: (N, G) raw counts, dense or sparse.

    Returns:
        (N, 2) float32: log1p of the library size in molecules, log1p of the number of detected genes.

    Raises:
        ValueError: If a count is negative or not finite.
    """
    matrix = csr_matrix(counts, dtype=np.float64)
    if not (np.isfinite(matrix.data) & (matrix.data >= 0)).all():
        msg = "counts must be finite and not negative."
        raise ValueError(msg)
    library_size = np.asarray(matrix.sum(axis=1)).ravel()
    n_genes_detected = np.asarray((matrix > 0).sum(axis=1)).ravel()
    return np.log1p(np.stack([library_size, n_genes_detected], axis=1)).astype(np.float32)


def pca_features(expression: Any, *, n_components: int = 50, seed: int = 0) -> np.ndarray:
    """Compute principal components of log-normalised cells, the baseline of a learned embedding.

    Fitted on all cells that are given, test folds included, and without labels. A frozen network sees the
    cells of the test folds just as much: each is its input. So neither side has an advantage here.

    Args:
        expression: (N, G) log1p of normalised counts, dense or sparse; sparse is not made dense. All genes.
        n_components: Components kept.
        seed: Of the iteration's start vector.

    Returns:
        (N, n_components) float32, not whitened.

    Raises:
        ValueError: If the values are raw counts, negative or not finite, or there are too few cells or genes.
    """
    values = expression.data if issparse(expression) else np.asarray(expression)
    if not (np.isfinite(values) & (values >= 0)).all():
        msg = "expression must be finite and not negative (log1p of normalised counts)."
        raise ValueError(msg)
    if values.size and (values == np.round(values)).all() and values.max() > 1:
        msg = "expression holds whole numbers only: raw counts? Pass log_normalise(counts)."
        raise ValueError(msg)
    if n_components >= min(expression.shape):
        msg = f"n_components={n_components} must be below the numbers of cells and genes, {expression.shape}."
        raise ValueError(msg)
    # arpack is the solver that centres sparse matrices without filling them.
    pca = PCA(n_components, svd_solver="arpack", random_state=seed)
    return pca.fit_transform(csr_matrix(expression) if issparse(expression) else expression).astype(
        np.float32
    )


# Return features (N, D) float64 and class names (N,) text, or refuse them.
def _checked(features: np.ndarray, labels: Sequence[Any], n_folds: int) -> tuple[np.ndarray, np.ndarray]:
    features = np.asarray(features, dtype=np.float64)
    raw_labels = np.asarray(labels, dtype=object)
    if features.ndim != 2 or raw_labels.shape != features.shape[:1]:
        msg = f"features must be (N, D) and labels (N,), got {features.shape} and {raw_labels.shape}."
        raise ValueError(msg)
    if not np.isfinite(features).all():
        msg = f"{int((~np.isfinite(features)).any(axis=1).sum())} cells have features that are not finite."
        raise ValueError(msg)
    n_missing = int(pd.isna(raw_labels).sum())
    if n_missing:
        msg = f"{n_missing} labels are missing. Leave these cells out, for every method alike."
        raise ValueError(msg)
    if n_folds < 2:
        msg = f"n_folds must be at least 2, got {n_folds}."
        raise ValueError(msg)
    return features, raw_labels.astype(str)


def _add_scores(
    scores: dict[str, list[float]],
    method: str,
    classifier: BaseEstimator,
    features: np.ndarray,
    classes: np.ndarray,
) -> None:
    predicted = classifier.predict(features)
    scores.setdefault(f"{method}_accuracy", []).append(accuracy_score(classes, predicted))
    macro_f1 = f1_score(classes, predicted, average="macro", labels=classifier.classes_, zero_division=0.0)
    scores.setdefault(f"{method}_macro_f1", []).append(macro_f1)
