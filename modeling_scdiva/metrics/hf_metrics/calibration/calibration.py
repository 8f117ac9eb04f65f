"""Stated probabilities of cell types against what is true.

    evaluate.load("modeling_scdiva/metrics/hf_metrics/calibration")

Thin: the numbers are those of `modeling_scdiva.metrics.calibration`.
"""

from typing import Any

import datasets
import evaluate
import numpy as np

from modeling_scdiva.metrics.calibration import calibration_scores

DESCRIPTION = "Calibration errors, Brier score, log loss and risk-coverage of stated probabilities."
INPUTS = """
Args:
    predictions: Probabilities of the C classes, one row per cell.
    references: True class of each cell, 0 to C - 1; -1 for one that is none of them.
    n_bins: Bins of the calibration errors, default 15.
"""


class Calibration(evaluate.Metric):
    """The metric as the library `evaluate` wants it."""

    def _info(self) -> evaluate.MetricInfo:
        features = {
            "predictions": datasets.Sequence(datasets.Value("float64")),
            "references": datasets.Value("int64"),
        }
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, predictions: Any, references: Any, n_bins: int = 15) -> dict[str, Any]:
        return calibration_scores(np.asarray(predictions), np.asarray(references), n_bins=n_bins)
