"""What one would annotate cells with instead of a network: regressions of several kinds, the largest class.

Notable choices:
- Everything is fitted on the training cells: gene selection, scaling, components, weights. The strength of
  regularisation is chosen on the validation cells. Test cells are only ever predicted.
- Each baseline takes training, validation and test features and returns probabilities for the latter two, so
  that it can be calibrated exactly as a network is.
- CellTypist's recipe in short: scaled genes, a quick stochastic-gradient fit that picks genes per class, one
  regression per class on those. Its downloaded models are not used.

Dimensions: N cells, G genes, C classes.
Source: Boiarsky et al. 2024 (logistic regression); Dominguez Conde et al. 2022 (CellTypist); Satija et al.
2015 (variable genes by dispersion in bins of the mean).
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, issparse
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, SGDClassifier
from sklearn.metrics import f1_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.preprocessing import StandardScaler

STRENGTHS = (0.01, 0.1, 1.0, 10.0)  # C of the regression: the smaller, the stronger
MAX_ITERATIONS = 500
CELLTYPIST_GENES_PER_CLASS = 300
CELLTYPIST_CLIP = 10.0
N_DISPERSION_BINS = 20


@dataclass(frozen=True)
class ClassProbabilities:
    """What a method says of validation and test cells.

    Attributes:
        classes: (C,) class names, sorted; columns of the probabilities.
        validation: (n, C) probabilities of the validation cells.
        test: (n, C) probabilities of the test cells.
        notes: What was chosen on the way (strength, numbers of genes).
    """

    classes: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    notes: dict[str, Any]


@dataclass(frozen=True)
class LabelledParts:
    """Features or expression of three parts of the cells, and the classes of two.

    Attributes:
        train: (n, G) training cells, dense or CSR.
        validation: (n, G) validation cells.
        test: (n, G) test cells.
        train_labels: (n,) classes of the training cells.
        validation_labels: (n,) classes of the validation cells.
    """

    train: Any
    validation: Any
    test: Any
    train_labels: np.ndarray
    validation_labels: np.ndarray

    def map(self, function: Callable[[Any], Any]) -> "LabelledParts":
        """Apply a function to the features of every part."""
        train, validation, test = (function(part) for part in (self.train, self.validation, self.test))
        return LabelledParts(train, validation, test, self.train_labels, self.validation_labels)


def majority_class(parts: LabelledParts) -> ClassProbabilities:
    """Name the largest class for every cell, with the shares of the training cells as probabilities.

    Args:
        parts: Cells; their features are not read.

    Returns:
        The same probabilities for every cell.
    """
    classes, sizes = np.unique(_classes_of(parts), return_counts=True)
    shares = sizes / sizes.sum()
    n_validation, n_test = (part.shape[0] for part in (parts.validation, parts.test))
    return ClassProbabilities(classes, np.tile(shares, (n_validation, 1)), np.tile(shares, (n_test, 1)), {})


def logistic_probe(
    parts: LabelledParts,
    *,
    strengths: Sequence[float] = STRENGTHS,
    is_scaled: bool = True,
    seed: int = 0,
) -> ClassProbabilities:
    """Fit a logistic regression.

    Args:
        parts: (n, D) dense features: frozen embeddings, principal components, depth.
        strengths: Values of C to choose from by macro-F1, then log-loss, of the validation cells.
        is_scaled: Scale each feature to unit variance first.
        seed: Of the solver, where it uses one.

    Returns:
        Probabilities; ``notes["strength"]``, and ``notes["is_converged"]`` for the chosen one.

    Raises:
        ValueError: If the training cells have one class only.
    """
    labels = _classes_of(parts)
    scaled = parts.map(StandardScaler().fit(parts.train).transform) if is_scaled else parts
    best: tuple[tuple[float, float], float, Any] | None = None
    for strength in sorted(strengths):
        regression = LogisticRegression(C=strength, max_iter=MAX_ITERATIONS, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # reported in the notes
            regression.fit(scaled.train, labels)
        score = _validation_score(parts, regression, scaled.validation)
        if best is None or score > best[0]:
            best = score, strength, regression
    if best is None:
        msg = "logistic_probe needs at least one strength, got none."
        raise ValueError(msg)
    _, strength, regression = best
    notes = {"strength": strength, "is_converged": bool(regression.n_iter_.max() < MAX_ITERATIONS)}
    validation, test = (regression.predict_proba(part) for part in (scaled.validation, scaled.test))
    return ClassProbabilities(regression.classes_, validation, test, notes)


def pca_logistic(parts: LabelledParts, *, n_components: int = 50, seed: int = 0) -> ClassProbabilities:
    """Fit a logistic regression on the principal components of the training cells.

    Args:
        parts: (n, G) log-normalised expression, dense or CSR.
        n_components: Components; fewer where the training cells or genes are not enough.
        seed: Of the decomposition.

    Returns:
        Probabilities, with ``notes["n_components"]``.
    """
    components = pca_parts(parts, n_components=n_components, seed=seed)
    found = logistic_probe(components, seed=seed)
    notes = found.notes | {"n_components": components.train.shape[1]}
    return ClassProbabilities(found.classes, found.validation, found.test, notes)


def pca_parts(parts: LabelledParts, *, n_components: int = 50, seed: int = 0) -> LabelledParts:
    """Project all parts on the principal components of the training cells.

    Args:
        parts: (n, G) log-normalised expression, dense or CSR.
        n_components: Components; fewer where the training cells or genes are not enough.
        seed: Of the decomposition.

    Returns:
        (n, K) components.
    """
    n_components = min(n_components, *(size - 1 for size in parts.train.shape))
    solver = "arpack" if issparse(parts.train) else "full"
    pca = PCA(n_components, svd_solver=solver, random_state=seed).fit(parts.train)
    return parts.map(pca.transform)


def variable_genes_logistic(
    parts: LabelledParts, *, n_top_genes: int = 2_000, seed: int = 0
) -> ClassProbabilities:
    """Fit a logistic regression on the genes that vary most among the training cells.

    Args:
        parts: (n, G) log-normalised expression, dense or CSR.
        n_top_genes: Genes; fewer where fewer vary.
        seed: Of the solver, where it uses one.

    Returns:
        Probabilities, with ``notes["n_genes"]``.
    """
    genes = select_variable_genes(parts.train, n_top_genes=n_top_genes)
    chosen = parts.map(lambda part: _dense(part[:, genes]))
    found = logistic_probe(chosen, is_scaled=False, seed=seed)  # scaled, rare noise would count as markers do
    return ClassProbabilities(
        found.classes, found.validation, found.test, found.notes | {"n_genes": len(genes)}
    )


def celltypist_style(
    parts: LabelledParts, *, genes_per_class: int = CELLTYPIST_GENES_PER_CLASS, seed: int = 0
) -> ClassProbabilities:
    """Fit what CellTypist fits: a quick fit that picks genes per class, then one regression against all.

    Args:
        parts: (n, G) log-normalised expression, dense or CSR.
        genes_per_class: Genes that the quick fit gives to each class.
        seed: Of the stochastic gradient.

    Returns:
        Probabilities, the classes' sigmoids scaled to sum 1; ``notes["n_genes"]``.
    """
    labels = _classes_of(parts)
    expressed = np.flatnonzero(np.asarray((parts.train != 0).sum(axis=0)).ravel())
    scaler = StandardScaler(with_mean=False).fit(parts.train[:, expressed])
    quick = SGDClassifier(loss="log_loss", alpha=1e-4, max_iter=100, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        quick.fit(scaler.transform(parts.train[:, expressed]), labels)
    heaviest = np.argsort(-np.abs(quick.coef_), axis=1, kind="stable")[:, :genes_per_class]
    genes = expressed[np.unique(heaviest)]
    scaler = StandardScaler().fit(_dense(parts.train[:, genes]))

    def scale(part: Any) -> np.ndarray:
        return np.minimum(scaler.transform(_dense(part[:, genes])), CELLTYPIST_CLIP)

    regression = OneVsRestClassifier(LogisticRegression(C=1.0, max_iter=MAX_ITERATIONS, random_state=seed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        regression.fit(scale(parts.train), labels)
    validation, test = (regression.predict_proba(scale(part)) for part in (parts.validation, parts.test))
    return ClassProbabilities(regression.classes_, validation, test, {"n_genes": len(genes)})


def select_variable_genes(expression: Any, *, n_top_genes: int = 2_000) -> np.ndarray:
    """Rank genes by their dispersion among genes of similar mean, as scanpy's flavour "seurat" does.

    Args:
        expression: (N, G) log1p of normalised counts of training cells, dense or CSR.
        n_top_genes: Genes wanted.

    Returns:
        (n,) sorted columns, n <= ``n_top_genes``; genes without a count are never among them.
    """
    n_cells, linear = expression.shape[0], expression.astype(np.float64)
    if issparse(linear):
        linear = linear.expm1()
        mean = np.asarray(linear.mean(axis=0)).ravel()
        square = np.asarray(linear.multiply(linear).mean(axis=0)).ravel()
    else:
        linear = np.expm1(linear)
        mean, square = linear.mean(axis=0), (linear**2).mean(axis=0)
    variance = np.maximum(square - mean**2, 0.0) * n_cells / max(1, n_cells - 1)
    mean[mean == 0] = 1e-12
    dispersion = variance / mean
    dispersion[dispersion == 0] = np.nan
    table = pd.DataFrame({"dispersion": np.log(dispersion)})
    table["bin"] = pd.cut(np.log1p(mean), bins=N_DISPERSION_BINS)
    groups = table.groupby("bin", observed=True)["dispersion"]
    centre, spread = groups.transform("mean"), groups.transform("std")
    # A gene alone in its bin has no spread; scanpy gives it the normalised dispersion 1.
    is_alone = spread.isna()
    spread[is_alone] = centre[is_alone]
    centre[is_alone] = 0.0
    normalised = ((table["dispersion"] - centre) / spread).to_numpy()
    order = np.argsort(-np.nan_to_num(normalised, nan=-np.inf), kind="stable")
    return np.sort(order[: min(n_top_genes, int(np.isfinite(normalised).sum()))])


def _classes_of(parts: LabelledParts) -> np.ndarray:
    labels = np.asarray(parts.train_labels).astype(str)
    n_classes = len(set(labels))
    if n_classes < 2:
        found = ", ".join(sorted(set(labels))) or "none"
        msg = f"The training cells have one class only ({found}); two are needed to tell cells apart."
        raise ValueError(msg)
    if len(labels) != parts.train.shape[0]:
        msg = f"There are {parts.train.shape[0]} training cells and {len(labels)} labels."
        raise ValueError(msg)
    return labels


def _validation_score(parts: LabelledParts, regression: Any, features: np.ndarray) -> tuple[float, float]:
    """Return macro-F1, and minus the log-loss over cells of a known class, which decides between equals."""
    truth = np.asarray(parts.validation_labels).astype(str)
    macro_f1 = f1_score(truth, regression.predict(features), average="macro", zero_division=0.0)
    places = np.searchsorted(regression.classes_, truth).clip(max=len(regression.classes_) - 1)
    is_known = regression.classes_[places] == truth
    of_truth = regression.predict_proba(features)[is_known, places[is_known]]
    log_loss = -np.log(np.maximum(of_truth, 1e-12)).mean() if is_known.any() else 0.0
    return float(macro_f1), -float(log_loss)


def _dense(part: Any) -> np.ndarray:
    return part.toarray() if issparse(part) else np.asarray(part)


BASELINES: dict[str, Callable[..., ClassProbabilities]] = {
    "PCA-50 + logistic regression": pca_logistic,
    "2,000 variable genes + logistic regression": variable_genes_logistic,
    "CellTypist-style": celltypist_style,
}


def as_parts(
    features: Any,
    labels: np.ndarray,
    train: np.ndarray,
    validation: np.ndarray,
    test: np.ndarray,
) -> LabelledParts:
    """Cut one table of cells into the three parts.

    Args:
        features: (N, G) dense or sparse.
        labels: (N,) classes.
        train: Rows of training.
        validation: Rows of validation.
        test: Rows of test; their labels are left behind.

    Returns:
        The parts.
    """
    table = csr_matrix(features) if issparse(features) else np.asarray(features)
    labels = np.asarray(labels)
    return LabelledParts(table[train], table[validation], table[test], labels[train], labels[validation])
