"""Imputation and denoising: corruptions whose truth is known, and scores of what is put in their place.

Notable choices:
- Thinning draws molecules and is valid for raw counts only; anything else is refused.
- Hidden entries are as many silent as expressed ones, so that "it is zero" is no good answer.
- An entry is over-imputed where the true count is zero and the prediction rounds to one molecule or more.
- Which entries are hidden depends on the seed and the cell's row alone.

Dimensions: N cells, G genes, n entries.
Source: METHOD.md section 8. Thinning: Batson et al. 2019, "Molecular cross-validation", bioRxiv 786269.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from modeling_scdiva.metrics.calibration import calibration_error

WHOLE_TOLERANCE = 1e-6
FEWEST_FOR_CORRELATION = 3


@dataclass(frozen=True)
class HiddenEntries:
    """Entries of a matrix of counts that are hidden from every method.

    Attributes:
        rows: (n,) cells.
        columns: (n,) genes.
        is_expressed: (n,) bool, True where the count is above zero.
    """

    rows: np.ndarray
    columns: np.ndarray
    is_expressed: np.ndarray


def checked_counts(counts: Any) -> csr_matrix:
    """Refuse what are no raw counts.

    Args:
        counts: (N, G) dense or sparse.

    Returns:
        (N, G) CSR float64 without stored zeros; a copy.

    Raises:
        ValueError: If a value is negative, not finite or not whole.
    """
    matrix = csr_matrix(counts, dtype=np.float64, copy=True)
    values = matrix.data
    if (
        not (np.isfinite(values) & (values >= 0)).all()
        or (np.abs(values - np.rint(values)) > WHOLE_TOLERANCE).any()
    ):
        msg = (
            "Raw counts are needed: whole numbers, finite and not negative. Log-normalised or corrected "
            "values cannot be thinned; pass the layer with counts."
        )
        raise ValueError(msg)
    matrix.eliminate_zeros()
    matrix.sum_duplicates()
    return matrix


def thin_cells(counts: Any, keep_fraction: float, *, seed: int = 0) -> csr_matrix:
    """Simulate a shallower run: keep each molecule with a fixed probability.

    Args:
        counts: (N, G) raw counts, dense or sparse.
        keep_fraction: Probability that one molecule is kept, in (0, 1].
        seed: Of the draws; a cell's draw depends on it, on the cell's row and on its counts.

    Returns:
        (N, G) CSR float64, nowhere above the input.

    Raises:
        ValueError: If ``keep_fraction`` lies outside (0, 1].
    """
    if not 0.0 < keep_fraction <= 1.0:
        msg = f"keep_fraction must lie in (0, 1], got {keep_fraction}. Use 1.0 to keep every molecule."
        raise ValueError(msg)
    thinned = checked_counts(counts)
    for row in range(thinned.shape[0]):
        entries = slice(thinned.indptr[row], thinned.indptr[row + 1])
        rng = np.random.default_rng([seed, row])
        thinned.data[entries] = rng.binomial(thinned.data[entries].astype(np.int64), keep_fraction)
    thinned.eliminate_zeros()
    return thinned


def draw_hidden_entries(
    counts: Any, fraction: float, *, seed: int = 0, is_candidate: np.ndarray | None = None
) -> HiddenEntries:
    """Choose a share of the expressed entries of each cell, and as many silent ones.

    Args:
        counts: (N, G) raw counts, dense or sparse.
        fraction: Share of the expressed entries that is hidden, in (0, 1).
        seed: Of the draws; a larger share hides the same entries and more.
        is_candidate: (G,) bool, genes that may be hidden; all when not given.

    Returns:
        The entries, cell after cell. A cell keeps one expressed gene in sight at least, and hides one where
        it has two; silent entries are as many as expressed ones, or all there are.

    Raises:
        ValueError: If ``fraction`` lies outside (0, 1).
    """
    if not 0.0 < fraction < 1.0:
        msg = f"fraction must lie in (0, 1), got {fraction}. It is the share of expressed entries to hide."
        raise ValueError(msg)
    matrix = checked_counts(counts)
    allowed = np.ones(matrix.shape[1], dtype=bool) if is_candidate is None else np.asarray(is_candidate)
    rows, columns, is_expressed = [], [], []
    for row in range(matrix.shape[0]):
        rng = np.random.default_rng([seed, row])
        expressed_here = np.zeros(matrix.shape[1], dtype=bool)
        expressed_here[matrix.indices[matrix.indptr[row] : matrix.indptr[row + 1]]] = True
        expressed = rng.permutation(np.flatnonzero(expressed_here & allowed))
        silent = rng.permutation(np.flatnonzero(~expressed_here & allowed))
        n_hidden = min(max(1, round(fraction * len(expressed))), len(expressed) - 1)
        if n_hidden < 1:
            continue
        chosen = np.concatenate([expressed[:n_hidden], silent[:n_hidden]])
        rows.append(np.full(len(chosen), row))
        columns.append(chosen)
        is_expressed.append(np.arange(len(chosen)) < n_hidden)
    if not rows:
        msg = "No cell has two expressed genes, so none can be hidden. Check the counts and the genes."
        raise ValueError(msg)
    return HiddenEntries(*(np.concatenate(parts) for parts in (rows, columns, is_expressed)))


def hide_entries(counts: Any, entries: HiddenEntries) -> csr_matrix:
    """Take hidden entries out of a matrix of counts.

    Args:
        counts: (N, G) raw counts, dense or sparse.
        entries: What `draw_hidden_entries` chose.

    Returns:
        (N, G) CSR, zero at the hidden entries; a copy.
    """
    matrix = checked_counts(counts)
    keys = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr)) * matrix.shape[1] + matrix.indices
    matrix.data[np.isin(keys, entries.rows * matrix.shape[1] + entries.columns)] = 0.0
    matrix.eliminate_zeros()
    return matrix


def value_scores(true: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Score predicted expression, all entries together.

    Args:
        true: (n,) log1p of counts per 10,000.
        predicted: (n,) predictions, same unit.

    Returns:
        ``mae``, ``rmse``, and from three entries on ``pearson`` and ``spearman`` (0 for a constant prediction
        or truth).

    Raises:
        ValueError: If shapes differ, there is no entry, or one is not finite.
    """
    true, predicted = (np.asarray(array, dtype=np.float64).ravel() for array in (true, predicted))
    if true.shape != predicted.shape or not len(true):
        msg = (
            f"As many predictions as true values are wanted, one at least; got {len(predicted)}, {len(true)}."
        )
        raise ValueError(msg)
    if not (np.isfinite(true).all() and np.isfinite(predicted).all()):
        msg = (
            f"{int((~np.isfinite(predicted)).sum())} predictions and {int((~np.isfinite(true)).sum())} true "
        )
        msg += "values are not finite. Genes that are not in the vocabulary are NaN; score the others."
        raise ValueError(msg)
    errors = predicted - true
    scores = {"mae": float(np.abs(errors).mean()), "rmse": float(np.sqrt((errors**2).mean()))}
    if len(true) >= FEWEST_FOR_CORRELATION:
        varies = np.ptp(true) > 0 and np.ptp(predicted) > 0
        scores["pearson"] = float(pearsonr(true, predicted).statistic) if varies else 0.0
        scores["spearman"] = float(spearmanr(true, predicted).statistic) if varies else 0.0
    return scores


def profile_correlations(true: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Correlate predicted and true profiles along genes and along cells.

    Args:
        true: (N, G) log1p of counts per 10,000.
        predicted: (N, G) predictions.

    Returns:
        ``cell_pearson``, over the genes of a cell, mean over cells: high for anything that knows gene means.
        ``gene_pearson``, over the cells of a gene, mean over genes that vary: 0 for anything that knows gene
        means only; a constant prediction counts as 0.
    """
    scores = {}
    for name, axis in (("cell_pearson", 1), ("gene_pearson", 0)):
        first, second = (np.asarray(array, dtype=np.float64) for array in (true, predicted))
        first = first - first.mean(axis=axis, keepdims=True)
        second = second - second.mean(axis=axis, keepdims=True)
        # Rounding leaves a constant profile a norm of 1e-16.
        norms = np.linalg.norm(first, axis=axis), np.linalg.norm(second, axis=axis)
        varies = norms[0] > 1e-9
        products = (first * second).sum(axis=axis)
        correlations = np.divide(
            products, norms[0] * norms[1], out=np.zeros_like(products), where=varies & (norms[1] > 1e-9)
        )
        scores[name] = float(correlations[varies].mean()) if varies.any() else 0.0
    return scores


def detection_scores(probability: np.ndarray, is_expressed: np.ndarray) -> dict[str, float]:
    """Score the probability that an entry is expressed.

    Args:
        probability: (n,) in [0, 1].
        is_expressed: (n,) bool.

    Returns:
        ``auroc``, ``average_precision`` (both 1 best), ``brier_score`` and ``calibration_error`` (15 equal
        bins, 0 best), ``expressed_share``.

    Raises:
        ValueError: If all entries are expressed or none is.
    """
    probability = np.asarray(probability, dtype=np.float64).ravel()
    is_expressed = np.asarray(is_expressed, dtype=bool).ravel()
    if is_expressed.all() or not is_expressed.any():
        msg = (
            f"Expressed and silent entries are both needed, got {int(is_expressed.sum())} expressed of "
            f"{len(is_expressed)}."
        )
        raise ValueError(msg)
    return {
        "auroc": float(roc_auc_score(is_expressed, probability)),
        "average_precision": float(average_precision_score(is_expressed, probability)),
        "brier_score": float(brier_score_loss(is_expressed, probability)),
        "calibration_error": calibration_error(probability, is_expressed),
        "expressed_share": float(is_expressed.mean()),
    }


def shift_prevalence(probability: np.ndarray, odds_ratio: np.ndarray) -> np.ndarray:
    """Carry probabilities over to entries that were drawn by a known rule.

    Args:
        probability: (n,) probability at the natural share of expressed entries.
        odds_ratio: (n,) how many times more often an expressed entry was drawn than a silent one.

    Returns:
        (n,) probability among the drawn entries; 0 and 1 stay.
    """
    probability = np.asarray(probability, dtype=np.float64)
    expressed = probability * odds_ratio
    total = expressed + (1.0 - probability)
    return np.divide(expressed, total, out=np.zeros_like(probability), where=total > 0)


def over_imputation_rate(
    predicted: np.ndarray, library_size: np.ndarray, *, target_sum: float = 10_000.0
) -> float:
    """Say how often silent entries are filled in.

    Args:
        predicted: (n,) predictions at entries whose true count is zero, log1p of normalised counts.
        library_size: (n,) molecules of the cell of each.
        target_sum: Molecules to which cells are scaled.

    Returns:
        Share of the entries at which the prediction rounds to one molecule or more, 0 best.

    Raises:
        ValueError: If there is no entry.
    """
    if not len(predicted):
        msg = "There is no silent entry to look at."
        raise ValueError(msg)
    molecules = np.expm1(np.asarray(predicted, dtype=np.float64)) * np.asarray(library_size) / target_sum
    return float((molecules >= 0.5).mean())
