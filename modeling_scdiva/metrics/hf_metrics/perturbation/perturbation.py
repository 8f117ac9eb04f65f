"""Predicted changes of expression against measured ones.

    evaluate.load("modeling_scdiva/metrics/hf_metrics/perturbation")

Thin: the numbers are those of `modeling_scdiva.metrics.perturbation`.
"""

from typing import Any

import datasets
import evaluate
import numpy as np

from modeling_scdiva.metrics.perturbation import score_perturbations

DESCRIPTION = "Scores of predicted changes against control, averaged over perturbations."
INPUTS = """
Args:
    predictions: Predicted change of each gene, one row per perturbation, log1p units.
    references: Measured change, the same shape.
    de_scores: Evidence that a gene responds, the same shape.
    is_de: Which genes respond significantly, the same shape.
    training_mean, gene_weights, is_target: As in score_perturbations; default none.
"""


class Perturbation(evaluate.Metric):
    """The metric as the library `evaluate` wants it."""

    def _info(self) -> evaluate.MetricInfo:
        rows = datasets.Sequence(datasets.Value("float64"))
        features = {"predictions": rows, "references": rows}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(features),
        )

    def _compute(
        self, predictions: Any, references: Any, de_scores: Any, is_de: Any, **optional: Any
    ) -> dict[str, Any]:
        arrays = {name: np.asarray(value) for name, value in optional.items() if value is not None}
        return score_perturbations(
            np.asarray(predictions),
            np.asarray(references),
            de_scores=np.asarray(de_scores),
            is_de=np.asarray(is_de, dtype=bool),
            **arrays,
        )
