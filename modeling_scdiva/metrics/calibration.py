"""Whether stated probabilities can be believed: calibration error, Brier, risk against coverage, temperature.

Notable choices:
- A cell whose true class the classifier does not know has class -1. Every prediction for it is wrong, which
  counts in calibration error and risk; Brier score and log-loss need a true class and leave such cells out,
  counted in ``n_without_class``.
- Calibration error stands twice, over bins of equal width, which is what others print, and over bins of equal
  numbers of cells, which has no nearly empty bins.
- Cells of equal confidence have no order: risk against coverage takes their mean.
- Temperature and threshold are fitted on validation cells, by the caller; nothing here sees test cells.

Dimensions: N cells, C classes.
Source: Guo et al. 2017, "On Calibration of Modern Neural Networks"; Geifman et al. 2019, "Bias-Reduced
Uncertainty Estimation for Deep Neural Classifiers" (risk against coverage).
"""

from typing import Any, Literal

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

Binning = Literal["width", "mass"]
SUM_TOLERANCE = 1e-3
# Temperatures that are tried lie between 1 / MAX_TEMPERATURE and MAX_TEMPERATURE.
MAX_TEMPERATURE = 100.0
LOWEST_PROBABILITY = 1e-12


def calibration_scores(probabilities: np.ndarray, labels: np.ndarray, *, n_bins: int = 15) -> dict[str, Any]:
    """Score stated probabilities; impossible shapes and values raise ``ValueError``.

    Args:
        probabilities: (N, C) probability of each class.
        labels: (N,) int true class, -1 for one that is none of the C.
        n_bins: Bins of the calibration errors.

    Returns:
        ``ece`` (equal width) and ``ece_equal_mass``, mean distance between confidence and accuracy, in
        [0, 1]; ``brier``, squared error summed over the classes, in [0, 2]; ``log_loss``, nats, both None
        where no cell has a class; ``aurc``, error rate averaged over coverage, in [0, 1]; best 0 for all of
        them; ``mean_confidence``; ``n_without_class``.
    """
    probabilities, labels = _checked(probabilities, labels)
    confidence, is_correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    has_class = labels >= 0
    known, truth = probabilities[has_class], labels[has_class]
    indicators = np.eye(probabilities.shape[1])[truth]
    of_truth = np.maximum(known[np.arange(len(truth)), truth], LOWEST_PROBABILITY)
    return {
        "ece": calibration_error(confidence, is_correct, n_bins=n_bins),
        "ece_equal_mass": calibration_error(confidence, is_correct, n_bins=n_bins, binning="mass"),
        "brier": float(((known - indicators) ** 2).sum(axis=1).mean()) if len(truth) else None,
        "log_loss": float(-np.log(of_truth).mean()) if len(truth) else None,
        "aurc": float(risk_coverage(confidence, is_correct)[1].mean()),
        "mean_confidence": float(confidence.mean()),
        "n_without_class": int((~has_class).sum()),
    }


def calibration_error(
    confidence: np.ndarray, is_correct: np.ndarray, *, n_bins: int = 15, binning: Binning = "width"
) -> float:
    """Measure the mean distance between confidence and accuracy over bins of cells (ECE).

    Args:
        confidence: (N,) probability of the predicted class.
        is_correct: (N,) bool.
        n_bins: Bins.
        binning: "width" cuts [0, 1] into equal parts, "mass" the sorted cells into groups of equal size.

    Returns:
        Mean over cells of |accuracy - confidence| of their bin, in [0, 1], best 0.
    """
    curve = reliability_curve(confidence, is_correct, n_bins=n_bins, binning=binning)
    return float(np.average(np.abs(curve["accuracy"] - curve["confidence"]), weights=curve["n_cells"]))


def reliability_curve(
    confidence: np.ndarray, is_correct: np.ndarray, *, n_bins: int = 15, binning: Binning = "width"
) -> dict[str, np.ndarray]:
    """Compare confidence and accuracy bin by bin.

    Args:
        confidence: (N,) probability of the predicted class.
        is_correct: (N,) bool.
        n_bins: Bins; empty ones are left out.
        binning: "width" cuts [0, 1] into equal parts, open below, "mass" the sorted cells into groups of
            equal size.

    Returns:
        ``confidence`` and ``accuracy``, means of the bins, and ``n_cells``, one entry per bin with cells.

    Raises:
        ValueError: If there are no cells, shapes differ, a confidence lies outside [0, 1], or the binning is
            impossible.
    """
    confidence, is_correct = _checked_confidence(confidence, is_correct)
    if n_bins < 1 or binning not in ("width", "mass"):
        msg = f'n_bins must be at least 1 and binning "width" or "mass", got {n_bins} and {binning!r}.'
        raise ValueError(msg)
    if binning == "width":
        bins = np.clip(np.ceil(confidence * n_bins) - 1, 0, n_bins - 1).astype(np.int64)
    else:
        bins = np.empty(len(confidence), dtype=np.int64)
        bins[np.argsort(confidence, kind="stable")] = np.arange(len(confidence)) * n_bins // len(confidence)
    n_cells = np.bincount(bins, minlength=n_bins)
    is_filled = n_cells > 0
    sums = [np.bincount(bins, weights=values, minlength=n_bins) for values in (confidence, is_correct)]
    means = [total[is_filled] / n_cells[is_filled] for total in sums]
    return {"confidence": means[0], "accuracy": means[1], "n_cells": n_cells[is_filled]}


def risk_coverage(confidence: np.ndarray, is_correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Say how the error rate grows as less and less confident cells are accepted.

    Args:
        confidence: (N,) probability of the predicted class.
        is_correct: (N,) bool.

    Returns:
        (N,) coverage 1/N .. 1 and (N,) error rate among the cells accepted at it; cells of equal confidence
        share their errors evenly.
    """
    confidence, is_correct = _checked_confidence(confidence, is_correct)
    levels, group = np.unique(-confidence, return_inverse=True)  # most confident first
    n_group = np.bincount(group, minlength=len(levels))
    error_rate = np.bincount(group, weights=1.0 - is_correct, minlength=len(levels)) / n_group
    n_accepted = np.arange(1, len(confidence) + 1)
    return n_accepted / len(confidence), np.cumsum(np.repeat(error_rate, n_group)) / n_accepted


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Find the temperature that makes the softmax of validation cells most likely.

    Args:
        logits: (N, C) logits, or log-probabilities, of validation cells.
        labels: (N,) int true classes; cells of class -1 are left out.

    Returns:
        Temperature > 0; divide logits by it. Above 1 the classifier was too sure of itself.

    Raises:
        ValueError: If shapes differ, a logit is not finite, or no cell has a class.
    """
    logits, labels = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not np.isfinite(logits).all():
        msg = f"logits must be (N, C), finite, and labels (N,), got {logits.shape} and {labels.shape}."
        raise ValueError(msg)
    logits, labels = logits[labels >= 0], labels[labels >= 0]
    if not len(labels):
        msg = "No validation cell has a class that the classifier knows, so no temperature can be fitted."
        raise ValueError(msg)
    rows = np.arange(len(labels))

    def loss(log_temperature: float) -> float:
        scaled = log_softmax(logits / np.exp(log_temperature), axis=1)
        return float(-scaled[rows, labels].mean())

    limit = float(np.log(MAX_TEMPERATURE))
    found = minimize_scalar(loss, bounds=(-limit, limit), method="bounded", options={"xatol": 1e-4})
    return float(np.exp(found.x))


def choose_threshold(
    confidence: np.ndarray, is_correct: np.ndarray, *, wanted_accuracy: float, min_cells: int = 20
) -> dict[str, Any]:
    """Choose the confidence from which validation cells are right often enough.

    The lowest threshold at which the accuracy of the accepted cells reaches ``wanted_accuracy``, so that as
    many cells as possible keep their type. Accuracy is measured on ``min_cells`` accepted cells at least, or
    on all there are if these are fewer. Where none reaches it, the threshold with the best accuracy is taken.

    Args:
        confidence: (N,) probability of the predicted class, validation cells.
        is_correct: (N,) bool.
        wanted_accuracy: In (0, 1].
        min_cells: Fewest accepted cells that an accuracy is believed of.

    Returns:
        ``threshold`` (accepted is ``confidence >= threshold``), ``accuracy`` and ``coverage`` of the accepted
        validation cells at it, ``is_reached``, ``n_cells``.

    Raises:
        ValueError: If there are no cells, shapes differ, or ``wanted_accuracy`` is out of range.
    """
    confidence, is_correct = _checked_confidence(confidence, is_correct)
    if not 0.0 < wanted_accuracy <= 1.0:
        msg = f"wanted_accuracy must lie in (0, 1], got {wanted_accuracy}."
        raise ValueError(msg)
    levels, group = np.unique(-confidence, return_inverse=True)  # most confident first
    n_accepted = np.cumsum(np.bincount(group, minlength=len(levels)))
    accuracy = np.cumsum(np.bincount(group, weights=is_correct, minlength=len(levels))) / n_accepted
    candidates = np.flatnonzero(n_accepted >= min(min_cells, len(confidence)))
    reaching = candidates[accuracy[candidates] >= wanted_accuracy]
    if len(reaching):
        chosen = int(reaching[-1])
    else:  # the largest coverage among the best
        chosen = int(candidates[::-1][np.argmax(accuracy[candidates[::-1]])])
    accepts_all = chosen == len(levels) - 1 and len(reaching) > 0
    return {
        "threshold": 0.0 if accepts_all else float(-levels[chosen]),
        "accuracy": float(accuracy[chosen]),
        "coverage": float(n_accepted[chosen] / len(confidence)),
        "is_reached": bool(len(reaching)),
        "n_cells": len(confidence),
    }


def _checked(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    probabilities, labels = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
        msg = f"probabilities must be (N, C) and labels (N,), got {probabilities.shape} and {labels.shape}."
        raise ValueError(msg)
    if not np.issubdtype(labels.dtype, np.integer):
        msg = f"labels must be class numbers 0 .. C - 1, or -1, got {labels.dtype}."
        raise ValueError(msg)
    if labels.min() < -1 or labels.max() >= probabilities.shape[1]:
        msg = f"labels must lie in -1 .. {probabilities.shape[1] - 1}, got {labels.min()} .. {labels.max()}."
        raise ValueError(msg)
    sums = probabilities.sum(axis=1)
    # A NaN fails both comparisons.
    if not ((probabilities >= 0).all() and (np.abs(sums - 1.0) <= SUM_TOLERANCE).all()):
        msg = "probabilities must not be negative and sum to 1 in every cell. Apply softmax to logits first."
        raise ValueError(msg)
    return probabilities, labels


def _checked_confidence(confidence: np.ndarray, is_correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    confidence = np.asarray(confidence, dtype=np.float64)
    is_correct = np.asarray(is_correct, dtype=np.float64)
    if confidence.ndim != 1 or confidence.shape != is_correct.shape or not len(confidence):
        msg = (
            "confidence and is_correct must be (N,) of equal length, N >= 1, got "
            f"{confidence.shape} and {is_correct.shape}."
        )
        raise ValueError(msg)
    if not ((confidence >= 0) & (confidence <= 1.0 + SUM_TOLERANCE)).all():
        msg = "confidence must lie in [0, 1]."
        raise ValueError(msg)
    return confidence, is_correct
