"""Imputation and denoising of held-out cells beside what one would do without a network.

Four tasks with known truth, all of raw counts:

1. values hidden at known slots: the gene and its rank are known, its value is not;
2. entries hidden: expressed genes and as many silent ones are taken out, value and on/off are predicted;
3. depth: a quarter of the molecules is kept, the full profile and the lost genes are predicted;
4. panel: a few hundred genes are measured, all others are predicted.

Notable choices:
- Cells that baselines are fitted on and cells that are scored are different ones, by group where a column
  says so. The genes of the panel are chosen on the former.
- In tasks 1 and 2 the library size is known, as where single genes drop out; in task 3 it is that of the thin
  cell; in task 4 that of the panel, divided by the panel's share of the molecules in the training cells.
- Tasks 2 to 4 need a gene-query decoder; without one, scDiVa has no row there.

Dimensions: N scored cells, M training cells, G genes of the file, Q genes of file and vocabulary.
Source: METHOD.md section 8.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import anndata
import numpy as np
from scipy.sparse import csr_matrix

from modeling_scdiva.evaluation.imputation_tasks import (
    HIDDEN_FRACTIONS,
    IN_SIGHT,
    Imputer,
    ScoredCells,
    depth_task,
    entry_task,
    panel_task,
    slot_scores,
)
from modeling_scdiva.evaluation.reconstruction import (
    MODEL,
    RANDOM_MODEL,
    check_request,
    resampling_units,
    result_rows,
    split_cells,
)
from modeling_scdiva.fresh_model import random_weights
from modeling_scdiva.metrics.imputation import checked_counts
from modeling_scdiva.metrics.imputation_baselines import TARGET_SUM, Imputation
from modeling_scdiva.tasks.imputation import IMPUTED, PROBABILITY, impute_expression

COLUMNS = (
    "data", "method", "mae", "rmse", "pearson", "gene_pearson", "auroc", "brier_score", "calibration_error",
    "over_imputation_rate", "n_cells",
)  # fmt: skip
NOTE = (
    "Values in log1p of counts per 10,000; spread over seeds, in brackets the 95 % bootstrap interval over "
    "cells, or over groups where these are held out. auroc, Brier score and calibration error are those of "
    "the probability that a gene is detected, at the entries that were hidden or lost; where as many silent "
    "as expressed entries are hidden, probabilities are shifted to that share first. Over-imputation: share "
    "of true zeros at which a prediction rounds to one molecule. scVI takes what is hidden or not measured "
    "for zero. Gene mean x depth knows the mean profile and the depth of the cell and nothing else. Values "
    "at known slots can be had from the neighbours in the sort (neighbour score). Panel: 300 genes, or half "
    "of those detected in 5 % of the training cells."
)


def evaluate_imputation(
    adata: Any,
    *,
    model: Any,
    tokenizer: Any,
    name: str = "cells",
    split_key: str | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    max_test_cells: int = 100,
    include_scvi: bool = False,
    **reading: Any,
) -> dict[str, Any]:
    """Run the four tasks.

    Args:
        adata: AnnData with raw counts in ``layers[layer]``, ``layers["counts"]`` or ``X``.
        model: A `ScDivaForMaskedDiffusion`; tasks 2 to 4 need its gene-query decoder.
        tokenizer: The tokenizer of this model.
        name: Of the data, for the table.
        split_key: Column of ``obs`` whose groups stay together; None to split single cells.
        seeds: One run each, with its own split, corruption and random weights.
        max_test_cells: Held-out cells that are scored, drawn among them.
        include_scvi: Train scVI, too: minutes on a CPU.
        **reading: ``layer``, ``gene_id_key``, ``max_genes`` and overlaps, as in `ScDivaTokenizer.iter_cells`.

    Returns:
        A result. ``details`` holds ``has_decoder``, ``hidden_fractions``, ``auroc`` and ``mae`` of each
        method over them, and ``calibration``, method -> confidences and shares of bins of the silent genes
        at a quarter of the depth, last seed. No seed, values that are no raw counts, or a tokenizer of
        another scale than the baselines' raise ``ValueError``.
    """
    check_request(adata, model, tokenizer, seeds)
    _check_scale(tokenizer)
    bare, columns, gene_ids, reading = _bare_cells(adata, tokenizer, reading)
    has_decoder = getattr(model, "query_decoder", None) is not None
    units = resampling_units(adata, split_key)
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    calibration: dict[str, Any] = {}
    for seed in seeds:
        train, test = split_cells(adata, split_key, seed=seed)
        test = np.sort(np.random.default_rng(seed).permutation(test)[:max_test_cells])
        part = ScoredCells(
            counts=bare.X[test],
            training_counts=bare.X[train],
            columns=columns,
            gene_ids=gene_ids,
            var=bare.var,
            name=name,
            seed=seed,
            include_scvi=include_scvi,
            units=units[test],
        )
        models = {MODEL: model, RANDOM_MODEL: random_weights(model, seed=seed)}
        found = slot_scores(part, models, tokenizer=tokenizer, **reading)
        imputers = _imputers(models if has_decoder else {}, tokenizer, reading)
        of_depth, calibration = depth_task(part, imputers)
        found |= entry_task(part, imputers) | of_depth | panel_task(part, imputers)
        for key, scores in found.items():
            runs.setdefault(key, []).append(scores)
    rows = result_rows(runs)
    return {
        "title": f"Imputation of held-out cells: {name}",
        "numbers": [row for row in rows if row["method"] in (MODEL, f"{MODEL}{IN_SIGHT}")],
        "baselines": [row for row in rows if row["method"] not in (MODEL, f"{MODEL}{IN_SIGHT}")],
        "columns": list(COLUMNS),
        "note": NOTE if has_decoder else f"{NOTE} This checkpoint has no gene-query decoder.",
        "details": {
            "has_decoder": has_decoder,
            "split_key": split_key,
            "seeds": list(seeds),
            "hidden_fractions": list(HIDDEN_FRACTIONS),
            "calibration": calibration,
        }
        | {score: _curves(rows, score) for score in ("auroc", "mae")},
    }


def _check_scale(tokenizer: Any) -> None:
    """Refuse a tokenizer that scales to another number of molecules than the baselines."""
    if tokenizer.target_sum != TARGET_SUM:
        msg = (
            f"The tokenizer scales cells to {tokenizer.target_sum:,.0f} molecules and the baselines to "
            f"{TARGET_SUM:,.0f}; errors would be in two units. Evaluate a checkpoint with "
            f"target_sum={TARGET_SUM:g}."
        )
        raise ValueError(msg)


def imputation_figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """Draw detection over the share of hidden entries, and the calibration of the on/off probability.

    Args:
        result: What `evaluate_imputation` returned.

    Returns:
        Name -> Matplotlib figure.
    """
    from modeling_scdiva.evaluation.figures import draw_calibration, draw_mask_curve

    details = result["details"]
    x, label = details["hidden_fractions"], "share of expressed entries hidden"
    return {
        "detection": draw_mask_curve(x, details["auroc"], label, "AUROC of expressed against silent"),
        "calibration": draw_calibration(details["calibration"]),
    }


def _bare_cells(
    adata: Any, tokenizer: Any, reading: dict[str, Any]
) -> tuple[anndata.AnnData, np.ndarray, np.ndarray, dict[str, Any]]:
    """Take counts and genes out of an AnnData.

    Returns:
        AnnData with checked counts as X, the (Q,) columns that the vocabulary knows, their (Q,) gene ids in
        the vocabulary, and how to read it.

    Raises:
        KeyError: If there is no such layer.
    """
    reading = dict(reading)
    layer = reading.pop("layer", "counts" if "counts" in adata.layers else None)
    if layer is not None and layer not in adata.layers:
        msg = f"There is no layer {layer!r}; present are {list(adata.layers)}. Without layer=, X is taken."
        raise KeyError(msg)
    counts = checked_counts(adata.X if layer is None else adata.layers[layer])
    bare = anndata.AnnData(counts, var=adata.var.copy())
    known = {name: reading[name] for name in ("gene_id_key", "min_gene_overlap") if name in reading}
    tokens = np.asarray(tokenizer.match_genes(bare, **known).token_ids)
    columns = np.flatnonzero(tokens >= 0)
    gene_ids = np.array(tokenizer.convert_ids_to_tokens(tokens[columns].tolist()), dtype=object)
    return bare, columns, gene_ids, reading


def _imputers(models: Mapping[str, Any], tokenizer: Any, reading: dict[str, Any]) -> dict[str, Imputer]:
    """Wrap models as functions of a matrix of visible counts, its genes and library sizes."""

    def wrap(model: Any) -> Imputer:
        def impute(
            part: ScoredCells, visible: csr_matrix, sizes: np.ndarray, shown: np.ndarray
        ) -> Imputation:
            found = impute_expression(
                anndata.AnnData(visible, var=part.var),
                model=model,
                tokenizer=tokenizer,
                genes=part.gene_ids.tolist(),
                measured_genes=part.gene_ids[shown[part.columns]].tolist(),
                keep_observed=False,
                library_size=sizes,
                **(reading | {"keep_empty_cells": True, "min_count_overlap": 0.0}),
            )
            return Imputation(*(found.layers[key].astype(np.float64) for key in (IMPUTED, PROBABILITY)))

        return impute

    return {name: wrap(model) for name, model in models.items()}


def _curves(rows: Sequence[Mapping[str, Any]], score: str) -> dict[str, list[float]]:
    """Collect a score of task 2 over the shares, by method."""
    chosen = [row for row in rows if "silent ones hidden" in row["data"] and score in row]
    methods = dict.fromkeys(row["method"] for row in chosen)
    return {method: [row[score] for row in chosen if row["method"] == method] for method in methods}
