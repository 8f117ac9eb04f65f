"""Conditional generation: do cells get the type they were asked for, and do they stay different?

A classifier that never sees generated cells (logistic regression on principal components, fitted on real
training cells) reads the type of each generated cell. Agreement with the type asked for is set beside its
accuracy on held-out real cells. Diversity is the mean distance between cells of one type, over that of real
cells of the type; guidance buys agreement with diversity, and both are printed.

Dimensions: N cells, C types.
Source: METHOD.md section 5.
"""

from collections.abc import Sequence
from typing import Any

import anndata
import numpy as np
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from modeling_scdiva.evaluation.generation import draw_baselines, generated_profile, kept_profile
from modeling_scdiva.metrics.generation import fit_projection
from modeling_scdiva.tasks.generation import generate_cells

COLUMNS = ("data", "method", "agreement", "diversity", "n_cells", "n_types")
NOTE = (
    "Agreement: share of cells that a classifier fitted on real training cells gives the type they were "
    "asked for (for real cells its accuracy). Diversity: mean distance between cells of one type on 30 "
    "principal components over that of held-out real cells of the type, mean over types; 1 is that of real "
    "cells."
)
# Types with fewer training or held-out cells are left out.
MIN_REFERENCE, MIN_HELD_OUT = 20, 5


def evaluate_guidance(
    reference: anndata.AnnData,
    held_out: anndata.AnnData,
    *,
    model: Any,
    tokenizer: Any,
    condition: str = "cell_type",
    guidance_scales: Sequence[float] = (1.0, 1.5, 2.0, 3.0),
    n_cells_per_type: int = 20,
    **options: Any,
) -> dict[str, Any]:
    """Generate cells of each type over guidance scales.

    Args:
        reference: Real training cells with raw counts in X and ``obs[condition]``.
        held_out: Real cells to compare with.
        model: A diffusion model with this condition.
        tokenizer: Its tokenizer.
        condition: Name of the condition.
        guidance_scales: Scales of classifier-free guidance; 1 is none.
        n_cells_per_type: Cells generated of each type and scale.
        **options: As in `generate_cells`.

    Returns:
        Result as `modeling_scdiva.evaluation.report` describes it.

    Raises:
        ValueError: If fewer than two types are left.
    """
    types = frequent_types(reference.obs[condition], held_out.obs[condition])
    if len(types) < 2:
        msg = (
            f"Two types with {MIN_REFERENCE} reference and {MIN_HELD_OUT} held-out cells are needed, got "
            f"{types}."
        )
        raise ValueError(msg)
    reference = reference[reference.obs[condition].isin(types)].copy()
    held_out = held_out[held_out.obs[condition].isin(types)].copy()
    known, real = kept_profile(reference, tokenizer)[0], kept_profile(held_out, tokenizer)[0]
    reader = _TypeReader(known, reference.obs[condition].to_numpy(), real, held_out.obs[condition].to_numpy())

    asked = np.repeat(types, n_cells_per_type)
    rows = []
    for scale in guidance_scales:
        made = generate_cells(
            len(asked),
            model=model,
            tokenizer=tokenizer,
            conditions={condition: asked},
            guidance_scale=scale,
            **options,
        )
        scores = reader.scores(generated_profile(made)[0], asked)
        rows.append({"data": condition, "method": f"scDiVa, guidance {scale:g}", **scores})
    baselines = [
        {
            "data": condition,
            "method": "real held-out cells",
            **reader.scores(real, held_out.obs[condition].to_numpy()),
        }
    ]
    marginals = _drawn_marginals(reference, reference.obs[condition], n_cells_per_type, tokenizer)
    scores = reader.scores(kept_profile(marginals, tokenizer)[0], marginals.obs["asked"].to_numpy())
    baselines.append({"data": condition, "method": "gene marginals of the type", **scores})
    return {
        "title": "Conditional generation",
        "numbers": rows,
        "baselines": baselines,
        "columns": COLUMNS,
        "note": NOTE,
        "details": {"types": list(types), "n_reference": reference.n_obs, "n_held_out": held_out.n_obs},
    }


def _drawn_marginals(
    reference: anndata.AnnData, reference_types: Any, n_cells_per_type: int, tokenizer: Any
) -> anndata.AnnData:
    """Draw the genes of each type on their own; ``obs["asked"]`` is the type."""
    parts = []
    for place, name in enumerate(np.unique(reference_types)):  # one at a time, so that each is asked for
        cells = reference[(reference_types == name).to_numpy()]
        drawn = draw_baselines(
            cells, n_cells_per_type, labels=None, tokenizer=tokenizer, include_scvi=False, seed=place
        )
        parts.append(drawn["gene marginals"])
        parts[-1].obs["asked"] = name
    return anndata.concat(parts, index_unique="-")


def frequent_types(reference: Any, held_out: Any) -> list[str]:
    """List the types with enough cells on both sides.

    Args:
        reference: Types of the training cells, a pandas Series; missing ones count for nothing.
        held_out: Types of the held-out cells.

    Returns:
        Sorted names.
    """
    counted, tested = reference.value_counts(), held_out.value_counts()
    return sorted(
        str(name)
        for name, n_cells in counted.items()
        if name and n_cells >= MIN_REFERENCE and tested.get(name, 0) >= MIN_HELD_OUT
    )


class _TypeReader:
    """A classifier of real cells and the spread of real cells of each type."""

    def __init__(
        self, known: csr_matrix, known_types: np.ndarray, real: csr_matrix, real_types: np.ndarray
    ) -> None:
        self.projection = fit_projection(known, n_components=min(30, *(size - 1 for size in known.shape)))
        self.classifier = make_pipeline(
            StandardScaler(), LogisticRegression(max_iter=2000, class_weight="balanced")
        )
        self.classifier.fit(self._project(known), known_types)
        points = self._project(real)
        self.spread = {name: _mean_distance(points[real_types == name]) for name in np.unique(real_types)}

    def _project(self, cells: csr_matrix) -> np.ndarray:
        return self.projection.transform(np.asarray(cells.todense()))

    def scores(self, cells: csr_matrix, asked: np.ndarray) -> dict[str, Any]:
        """Score cells (N, G) by the types (N,) they were asked for."""
        points = self._project(cells)
        ratios = [
            _mean_distance(points[asked == name]) / self.spread[name]
            for name in np.unique(asked)
            if (asked == name).sum() > 1
        ]
        return {
            "agreement": float((self.classifier.predict(points) == asked).mean()),
            "diversity": float(np.mean(ratios)),
            "n_cells": len(asked),
            "n_types": len(np.unique(asked)),
        }


def _mean_distance(points: np.ndarray) -> float:
    """Mean Euclidean distance between different points (N, K)."""
    squares = (points**2).sum(axis=1)
    distances = np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * points @ points.T, 0))
    return float(distances[np.triu_indices(len(points), 1)].mean())
