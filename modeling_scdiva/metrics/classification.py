"""Scores of predicted classes: accuracy, macro-F1 in both readings, agreement, and every class by itself.

Notable choices:
- Macro-F1 stands twice. ``macro_f1`` averages over the classes of truth *and* prediction, as scikit-learn
  does by default, so a class that is predicted without occurring counts as zero. ``macro_f1_test_classes``
  averages over the classes of the truth alone; it can exceed accuracy and is the more lenient.
- Balanced accuracy averages over the classes of the truth, whatever was predicted.
- No score without its support: `class_scores` gives the number of cells of each class.

Dimensions: N cells.
Source: scikit-learn's definitions; METHOD.md section 7.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import (
    accuracy_score,
    cohen_kappa_score,
    f1_score,
    precision_recall_fscore_support,
    recall_score,
)


def classification_scores(labels: Sequence[Any], predicted: Sequence[Any]) -> dict[str, Any]:
    """Score predicted classes; none at all, unequal lengths and missing classes raise ``ValueError``.

    Args:
        labels: (N,) true class of each cell.
        predicted: (N,) predicted class of each cell.

    Returns:
        ``accuracy``, ``balanced_accuracy``, ``macro_f1`` (classes of truth and prediction),
        ``macro_f1_test_classes`` (classes of the truth), ``weighted_f1``, all in [0, 1], best 1;
        ``cohen_kappa`` in [-1, 1], 0 for agreement by chance, None where truth and prediction are one and the
        same single class; ``n_cells``, ``n_classes`` (of the truth).
    """
    truth, found = _checked(labels, predicted)
    classes = sorted(set(truth))
    together = sorted(set(truth) | set(found))
    f1: dict[str, Any] = {"zero_division": 0.0}
    return {
        "accuracy": float(accuracy_score(truth, found)),
        "balanced_accuracy": float(recall_score(truth, found, labels=classes, average="macro", **f1)),
        "macro_f1": float(f1_score(truth, found, labels=together, average="macro", **f1)),
        "macro_f1_test_classes": float(f1_score(truth, found, labels=classes, average="macro", **f1)),
        "weighted_f1": float(f1_score(truth, found, labels=classes, average="weighted", **f1)),
        "cohen_kappa": float(cohen_kappa_score(truth, found)) if len(together) > 1 else None,
        "n_cells": len(truth),
        "n_classes": len(classes),
    }


def class_scores(labels: Sequence[Any], predicted: Sequence[Any]) -> list[dict[str, Any]]:
    """Score each class by itself; raises as `classification_scores` does.

    Args:
        labels: (N,) true class of each cell.
        predicted: (N,) predicted class of each cell.

    Returns:
        One row per class of truth or prediction, in the order of their names: ``class``, ``precision``,
        ``recall``, ``f1`` in [0, 1], 0 where undefined, and ``support``, cells that truly belong to it.
    """
    truth, found = _checked(labels, predicted)
    classes = sorted(set(truth) | set(found))
    columns = precision_recall_fscore_support(truth, found, labels=classes, zero_division=0.0)
    return [
        {"class": name, "precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
        for name, p, r, f, n in zip(classes, *columns, strict=True)
    ]


# Return both as (N,) text, or refuse them.
def _checked(labels: Sequence[Any], predicted: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    truth, found = (np.asarray(values, dtype=object) for values in (labels, predicted))
    if truth.ndim != 1 or truth.shape != found.shape or not len(truth):
        msg = f"labels and predicted must be (N,) of equal length, N >= 1, got {truth.shape}, {found.shape}."
        raise ValueError(msg)
    n_missing = int((pd.isna(truth) | pd.isna(found)).sum())
    if n_missing:
        msg = f"{n_missing} cells have no true or no predicted class. Leave them out for every method alike."
        raise ValueError(msg)
    return truth.astype(str), found.astype(str)
