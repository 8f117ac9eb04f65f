"""Predicted cell types against true ones.

    evaluate.load("modeling_scdiva/metrics/hf_metrics/annotation")

Thin: the numbers are those of `modeling_scdiva.metrics.classification`.
"""

from typing import Any

import datasets
import evaluate

from modeling_scdiva.metrics.classification import classification_scores

DESCRIPTION = "Accuracy, balanced accuracy, macro and weighted F1 and Cohen's kappa of predicted cell types."
INPUTS = """
Args:
    predictions: Predicted type of each cell, text.
    references: True type of each cell, text.
"""


class Annotation(evaluate.Metric):
    """The metric as the library `evaluate` wants it."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, Any]:
        return classification_scores(references, predictions)
