"""Scored pairs of transcription factor and target against known edges.

    evaluate.load("modeling_scdiva/metrics/hf_metrics/network")

Thin: the numbers are those of `modeling_scdiva.metrics.network`.
"""

from typing import Any

import datasets
import evaluate
import numpy as np

from modeling_scdiva.metrics.network import network_metrics

DESCRIPTION = "AUPRC and its ratio to the prevalence, AUROC and early precision of scored pairs."
INPUTS = """
Args:
    predictions: Score of each target, one row per TF; higher = rather an edge, NaN = no score.
    references: 1 for known edges, else 0, the same shape.
    is_candidate: Which pairs count, the same shape; default all.
"""


class Network(evaluate.Metric):
    """The metric as the library `evaluate` wants it."""

    def _info(self) -> evaluate.MetricInfo:
        features = {
            "predictions": datasets.Sequence(datasets.Value("float64")),
            "references": datasets.Sequence(datasets.Value("int64")),
        }
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, predictions: Any, references: Any, is_candidate: Any = None) -> dict[str, Any]:
        return network_metrics(np.asarray(predictions), np.asarray(references), is_candidate=is_candidate)
