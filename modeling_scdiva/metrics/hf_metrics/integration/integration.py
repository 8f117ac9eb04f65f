"""An embedding of cells from several batches: are types apart and batches mixed?

    evaluate.load("modeling_scdiva/metrics/hf_metrics/integration")

Thin: the numbers are those of `modeling_scdiva.metrics.integration`.
"""

from typing import Any

import datasets
import evaluate
import numpy as np

from modeling_scdiva.metrics.integration import integration_scores

DESCRIPTION = (
    "scIB scores of an embedding, with BRAS, iLISI and kBET beside the averages; needs scib-metrics."
)
INPUTS = """
Args:
    predictions: Embedding, one row per cell.
    references: Cell type of each cell, text.
    batches: Technical batch of each cell.
    with_kbet: Compute kBET, default True.
    seed: Of the Leiden clustering, default 0.
"""


class Integration(evaluate.Metric):
    """The metric as the library `evaluate` wants it."""

    def _info(self) -> evaluate.MetricInfo:
        features = {
            "predictions": datasets.Sequence(datasets.Value("float64")),
            "references": datasets.Value("string"),
        }
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(features),
        )

    def _compute(
        self, predictions: Any, references: Any, batches: Any, *, with_kbet: bool = True, seed: int = 0
    ) -> dict[str, Any]:
        return integration_scores(
            np.asarray(predictions), references, batches, with_kbet=with_kbet, seed=seed
        )
