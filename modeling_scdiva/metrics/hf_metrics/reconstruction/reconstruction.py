"""Predicted genes of hidden positions, or the legacy copy test, against the true genes.

    evaluate.load("modeling_scdiva/metrics/hf_metrics/reconstruction")

Thin: the numbers are those of `modeling_scdiva.metrics.reconstruction`.
"""

from typing import Any

import datasets
import evaluate
import numpy as np

from modeling_scdiva.metrics.reconstruction import (
    cell_gene_scores,
    copy_test,
    mean_over_cells,
    score_gene_laws,
)

DESCRIPTION = (
    "Gene loss, accuracy, set and order scores of hidden genes; with the configuration copy, the copy test."
)
INPUTS = """
Args:
    predictions: Per cell, the log-probabilities (hidden positions, vocabulary); with
        evaluate.load(..., "copy") the arg-max token at each position of the clean cell.
    references: Per cell, the true tokens of these positions; with "copy" the tokens of the cell.
"""


class Reconstruction(evaluate.Metric):
    """The metric as the library `evaluate` wants it."""

    def _info(self) -> evaluate.MetricInfo:
        tokens = datasets.Sequence(datasets.Value("int64"))
        laws = datasets.Sequence(datasets.Sequence(datasets.Value("float64")))
        features = {"predictions": tokens if self.config_name == "copy" else laws, "references": tokens}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, Any]:
        if self.config_name == "copy":
            cells = [[np.asarray(cell) for cell in cells] for cells in (references, predictions)]
            return copy_test(*cells)
        scores = []
        for laws, tokens in zip(predictions, references, strict=True):
            true_genes = np.asarray(tokens)
            scores.append(cell_gene_scores(score_gene_laws(np.asarray(laws), true_genes), true_genes))
        return mean_over_cells(scores)
