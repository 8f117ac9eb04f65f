"""What a likelihood is worth: spoilt cells whose truth is known, beside detectors that know less.

Normal cells are held-out cells of a file; spoilt ones are made of them: genes shuffled within a cell,
doublets of the depth of one parent, ambient molecules mixed in, molecules lost. Detectors are fitted on the
other cells of the file; the model is as it came, so pass cells that it was not trained on. Scores are higher
for worse cells.

Notable choices:
- Depth alone tells much, so a detector that sees only depth stands beside every number, and the likelihood is
  given per cell and per token.
- All cells are cut to the genes of the vocabulary first, so nobody sees more than the model.

Dimensions: N normal cells, G genes of file and vocabulary.
Source: METHOD.md sections 6 and 8.
"""

from collections.abc import Mapping
from typing import Any

import anndata
import numpy as np
from scipy.sparse import csr_matrix, vstack

from modeling_scdiva.metrics.outlier_baselines import (
    DepthDetector,
    KNNDistanceDetector,
    PCAResidualDetector,
    scrublet_scores,
)
from modeling_scdiva.metrics.outlier_cells import (
    add_ambient,
    detection_scores,
    make_doublets,
    shuffle_genes,
    thin_cells,
)
from modeling_scdiva.tasks.cells import whole_counts
from modeling_scdiva.tasks.scoring import score_cells

PER_CELL, PER_TOKEN = "scDiVa, nats per cell", "scDiVa, nats per token"
AMBIENT_FRACTION, KEEP_FRACTION = 0.3, 0.5
COLUMNS = (
    "data", "method", "auroc", "average_precision", "base_rate", "n_normal",
)  # fmt: skip
NOTE = (
    "AUROC of telling spoilt from normal held-out cells, with its 95 % bootstrap interval over cells; 0.5 is "
    "chance, below it a score calls spoilt cells more normal. Doublets are thinned to the depth of one of "
    f"their two cells; ambient: {AMBIENT_FRACTION:.0%} of the molecules come from the mean profile; thinned: "
    f"{KEEP_FRACTION:.0%} of the molecules are kept. Depth sees library size and number of genes only."
)


def evaluate_scoring(
    adata: anndata.AnnData,
    *,
    model: Any,
    tokenizer: Any,
    name: str = "cells",
    max_test_cells: int = 100,
    seed: int = 0,
    others: Mapping[str, anndata.AnnData] | None = None,
    **estimation: Any,
) -> dict[str, Any]:
    """Score normal and spoilt cells with the model and with simple detectors.

    Args:
        adata: AnnData with raw counts.
        model: A `ScDivaForMaskedDiffusion`.
        tokenizer: Its tokenizer.
        name: Of the data, for the table.
        max_test_cells: Normal cells, and spoilt cells of each kind.
        seed: Of splits, spoilt cells and hidden genes.
        others: Further kinds of abnormal cells, name -> AnnData, such as cells of another study; seen through
            the genes of ``adata``.
        **estimation: ``n_draws`` and ``batch_size`` of `score_cells`.

    Returns:
        Result as `modeling_scdiva.evaluation.report` describes it.

    Raises:
        ValueError: If there are fewer than 40 cells.
    """
    if adata.n_obs < 40:
        msg = f"Scoring is evaluated on 40 cells at least, half of them to fit detectors, got {adata.n_obs}."
        raise ValueError(msg)
    cells = vocabulary_cells(adata, tokenizer)
    rng = np.random.default_rng(seed)
    order = rng.permutation(cells.n_obs)
    n_test = min(max_test_cells, cells.n_obs // 2)
    normal, training = cells[np.sort(order[:n_test])].copy(), cells[np.sort(order[n_test:])].copy()
    kinds = spoilt_cells(normal, rng) | {
        kind: vocabulary_cells(other, tokenizer, like=cells)[:n_test].copy()
        for kind, other in (others or {}).items()
    }
    detectors = {
        "depth, both sides": DepthDetector(training.X),
        "PCA residual": PCAResidualDetector(training.X, n_components=_n_components(training)),
        "distance to the nearest cells": KNNDistanceDetector(
            training.X, n_components=_n_components(training)
        ),
    }
    how = {
        "model": model,
        "tokenizer": tokenizer,
        "seed": seed,
        "min_gene_overlap": 0.0,
        "min_count_overlap": 0.0,
        **estimation,
    }
    scored = {kind: _all_scores(group, detectors, how) for kind, group in {"": normal, **kinds}.items()}
    details = _add_scrublet(scored, training, normal, kinds["doublets"], seed)
    rows: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for kind in kinds:
        is_whole = len(scored[kind][PER_CELL]) == n_test  # none was left out
        is_paired = is_whole and kind not in (others or {}) and kind != "doublets"
        for method, scores in scored[kind].items():
            row = detection_scores(scored[""][method], scores, is_paired=is_paired, seed=seed)
            rows[method in (PER_CELL, PER_TOKEN)].append({"data": f"{name}: {kind}", "method": method} | row)
    return {
        "title": "Scoring cells",
        "numbers": rows[True],
        "baselines": rows[False],
        "columns": COLUMNS,
        "note": NOTE,
        "details": {
            "nll_per_cell": {kind or "normal": _summary(entry[PER_CELL]) for kind, entry in scored.items()},
            "nll_per_token": {kind or "normal": _summary(entry[PER_TOKEN]) for kind, entry in scored.items()},
        }
        | details,
    }


def vocabulary_cells(
    adata: anndata.AnnData, tokenizer: Any, *, like: anndata.AnnData | None = None
) -> anndata.AnnData:
    """Cut cells to the genes the model reads; their library sizes become those of these genes.

    Args:
        adata: AnnData with raw counts.
        tokenizer: Tokenizer of the model.
        like: Cells cut already, whose genes to take, in their order; genes that ``adata`` lacks are silent.

    Returns:
        AnnData of counts over the known genes, cells without any of them left out.
    """
    layer = "counts" if "counts" in adata.layers else "X"
    tokens = np.asarray(tokenizer.match_genes(adata, layer=layer).token_ids)
    columns, var = np.flatnonzero(tokens >= 0), adata.var[tokens >= 0]
    places = np.arange(len(columns))
    if like is not None:
        wanted, var = np.asarray(tokenizer.match_genes(like).token_ids), like.var
        _, columns, places = np.intersect1d(tokens, wanted, return_indices=True)
    chosen = csr_matrix((np.ones(len(places)), (columns, places)), shape=(len(tokens), len(var)))
    counts = csr_matrix(whole_counts(adata, layer=layer) @ chosen).astype(np.float32)
    kept = anndata.AnnData(counts, obs=adata.obs.copy(), var=var.copy())
    return kept[np.asarray(counts.sum(axis=1)).ravel() > 0].copy()


def spoilt_cells(normal: anndata.AnnData, rng: np.random.Generator) -> dict[str, anndata.AnnData]:
    """Make abnormal cells of normal ones.

    Args:
        normal: AnnData with N cells of counts in X.
        rng: Source of randomness.

    Returns:
        Name -> AnnData of as many cells.
    """
    return {
        "genes shuffled": shuffle_genes(normal, rng),
        "doublets": make_doublets(normal, normal.n_obs, rng, keep_depth="parent"),
        "ambient molecules": add_ambient(normal, AMBIENT_FRACTION, rng),
        "thinned": thin_cells(normal, KEEP_FRACTION, rng),
    }


def _n_components(training: anndata.AnnData) -> int:
    return max(2, min(50, training.n_obs - 1, training.n_vars - 1) // 2)


def _all_scores(
    cells: anndata.AnnData, detectors: Mapping[str, Any], how: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """(N,) score of each cell by each method; cells that lost every molecule are left out."""
    cells = cells[np.asarray(cells.X.sum(axis=1)).ravel() > 0].copy()
    table = score_cells(cells, **how)
    scores = {
        PER_CELL: table["scdiva_nll"].to_numpy(),
        PER_TOKEN: table["scdiva_nll_per_token"].to_numpy(),
    }
    return scores | {method: detector.score_cells(cells.X) for method, detector in detectors.items()}


def _add_scrublet(
    scored: dict[str, dict[str, np.ndarray]],
    training: anndata.AnnData,
    normal: anndata.AnnData,
    doublets: anndata.AnnData,
    seed: int,
) -> dict[str, Any]:
    """Let Scrublet look for the doublets, if scanpy is there and the cells have enough genes."""
    try:
        scores = scrublet_scores(training.X, csr_matrix(vstack([normal.X, doublets.X])), seed=seed)
    except (ImportError, ValueError) as error:
        return {"scrublet_left_out": str(error)}
    scored[""]["Scrublet"], scored["doublets"]["Scrublet"] = np.split(scores, [normal.n_obs])
    return {}


def _summary(nats: np.ndarray) -> dict[str, float]:
    return {
        "mean": float(nats.mean()),
        "standard_error": float(nats.std(ddof=1) / len(nats) ** 0.5) if len(nats) > 1 else 0.0,
        "n_cells": len(nats),
    }
