"""Predicted changes of expression against measured ones.

    evaluate.load("modeling_scdiva/metrics/hf_metrics/perturbation")
    evaluate.load("modeling_scdiva/metrics/hf_metrics/perturbation", "calls")

Thin: the numbers are those of `modeling_scdiva.metrics.perturbation` and `perturbation_de`.
"""

from typing import Any

import datasets
import evaluate
import numpy as np

from modeling_scdiva.metrics.perturbation import mean_scores, score_perturbations
from modeling_scdiva.metrics.perturbation_de import de_call_scores

DESCRIPTION = "Scores of predicted changes against control, averaged over perturbations."
INPUTS = """
Args:
    predictions: Predicted change of each gene, one row per perturbation, log1p units.
    references: Measured change, the same shape.
    is_de: Which genes respond significantly, the same shape.
    de_scores: Evidence that a gene responds, the same shape; not in "calls".
    training_mean, gene_weights, is_target: As in score_perturbations; default none; not in "calls".
    predicted_p, is_own_target: As in de_call_scores; in "calls" alone.
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

    def _compute(self, predictions: Any, references: Any, is_de: Any, **further: Any) -> dict[str, Any]:
        arrays = {name: np.asarray(value) for name, value in further.items() if value is not None}
        arrays["is_de"] = np.asarray(is_de, dtype=bool)
        if self.config_name == "calls":
            return mean_scores(de_call_scores(np.asarray(predictions), np.asarray(references), **arrays))
        return score_perturbations(np.asarray(predictions), np.asarray(references), **arrays)
