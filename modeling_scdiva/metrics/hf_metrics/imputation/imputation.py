"""Imputed values, or the probability that a gene is on, against what was hidden.

    evaluate.load("modeling_scdiva/metrics/hf_metrics/imputation")

Thin: the numbers are those of `modeling_scdiva.metrics.imputation`.
"""

from typing import Any

import datasets
import evaluate
import numpy as np

from modeling_scdiva.metrics.imputation import detection_scores, profile_correlations, value_scores

DESCRIPTION = (
    "Errors and correlations of imputed values; with the configuration detection, of on/off probabilities."
)
INPUTS = """
Args:
    predictions: Imputed values, one row per cell; with evaluate.load(..., "detection") one probability
        per entry.
    references: True values, the same shape; with "detection" 1 where the gene is expressed, else 0.
"""


class Imputation(evaluate.Metric):
    """The metric as the library `evaluate` wants it."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name == "detection":
            features = {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
        else:
            rows = datasets.Sequence(datasets.Value("float64"))
            features = {"predictions": rows, "references": rows}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, Any]:
        predicted, true = np.asarray(predictions), np.asarray(references)
        if self.config_name == "detection":
            return detection_scores(predicted, true.astype(bool))
        return value_scores(true, predicted) | profile_correlations(true, predicted)
