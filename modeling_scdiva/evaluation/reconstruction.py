"""Reconstruction of hidden genes and values beside frequency, rank and arithmetic; and the legacy copy test.

Notable choices:
- Every method predicts the same hidden genes of the same held-out cells; a larger share hides the same genes
  and more.
- Baselines are fitted on the other cells. A held-out cell may still have been in pretraining: only the caller
  can know, and has to say so.
- The share of visible genes that the gene head repeats stands in a column of its own and in no average.

Dimensions: N cells, V vocabulary, n hidden genes.
Source: METHOD.md section 8.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from modeling_scdiva.evaluation.report import summarise
from modeling_scdiva.fresh_model import random_weights
from modeling_scdiva.metrics.denoising_baselines import BaselineFitter, DenoisingBaselines
from modeling_scdiva.metrics.intervals import MIN_GROUPS_FOR_INTERVAL, bootstrap_interval, ratio_of_sums
from modeling_scdiva.metrics.reconstruction import (
    cell_gene_scores,
    cell_value_scores,
    copy_test,
    mean_over_cells,
    score_gene_laws,
)
from modeling_scdiva.metrics.reconstruction_baselines import iter_gene_laws, value_predictions
from modeling_scdiva.tasks.cells import (
    TokenizedCells,
    check_vocabulary,
    obs_column,
    read_cells,
    refuse_path,
)
from modeling_scdiva.tasks.reconstruction import (
    check_diffusion_model,
    copy_accuracy,
    entry_scores,
    masked_batches,
    predict_hidden,
    repeat_cells,
)

MASK_RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9, 0.95)
TEST_FRACTION = 0.3
BATCH_SIZE = 32
N_COPY_CELLS = 10
MODEL, RANDOM_MODEL = "scDiVa", "scDiVa, random weights"
COLUMNS = (
    "data", "method", "gene_loss", "top_1_accuracy", "top_10_accuracy", "gene_set_f1", "order_spearman",
    "value_rmse", "value_pearson", "visible_copy_accuracy", "copy_edit_distance", "copy_bleu",
    "copy_spearman", "n_cells",
)  # fmt: skip
PER_CELL = "per_cell"
BOUNDED = {"gene_loss": "gene_loss", "value_rmse": "value_rmse"}
NOTE = (
    "Gene loss in nats per hidden gene, values in log1p units; means over cells, at hidden places only; "
    "spread over seeds, in brackets the 95 % bootstrap interval over cells, or over groups where "
    "these are held out. "
    "Baselines know the other cells of the same data. lattice: genes that fit arithmetically between the "
    "visible neighbours, weighted by frequency (unigram), by frequency at that rank (rank unigram) or by "
    "frequency and count (counts); neighbour score is the same arithmetic for values. A model that does not "
    "beat them has learned no more than the sort gives away. Copy columns: legacy test on clean input, which "
    "repeating the next gene passes."
)


def split_cells(
    adata: Any, split_key: str | None = None, *, seed: int = 0, test_fraction: float = TEST_FRACTION
) -> tuple[np.ndarray, np.ndarray]:
    """Divide cells into those that baselines are fitted on and those that are scored.

    Args:
        adata: AnnData with N cells.
        split_key: Column of ``obs`` (donor, technical batch) whose groups stay together; None to split
            single cells.
        seed: Equal seed, equal split.
        test_fraction: Share of the cells, or of the groups, that is scored; one group at least.

    Returns:
        Rows to fit on and rows to score, both sorted.

    Raises:
        ValueError: If there are fewer than two cells or groups, or the share lies outside (0, 1).
    """
    if not 0.0 < test_fraction < 1.0:
        msg = f"test_fraction must lie in (0, 1), got {test_fraction}."
        raise ValueError(msg)
    groups = (
        np.arange(adata.n_obs) if split_key is None else obs_column(adata, split_key, what="split groups")
    )
    names = np.unique(groups)
    if len(names) < 2:
        what = f"obs[{split_key!r}] has one group, {names[0]!r}" if len(names) else "the AnnData has no cells"
        what = what if split_key is not None or not len(names) else "there is one cell"
        msg = f"Cells to fit on and cells to score are needed, and {what}. Name another split_key, or None."
        raise ValueError(msg)
    n_test = min(len(names) - 1, max(1, round(test_fraction * len(names))))
    is_test = np.isin(groups, np.random.default_rng(seed).permutation(names)[:n_test])
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def fit_baselines(cells: TokenizedCells, *, tokenizer: Any) -> DenoisingBaselines:
    """Fit the baselines of hidden genes and values.

    Args:
        cells: Training cells.
        tokenizer: Gives the ranking weights and the number of special tokens.

    Returns:
        The baselines.
    """
    max_genes = max(1, int(cells.n_genes.max()), tokenizer.max_genes)
    n_special = tokenizer.vocabulary.n_special_tokens
    fitter = BaselineFitter(tokenizer.ranking_weights, max_genes, n_special_tokens=n_special)
    fitter.update(cells.token_ids, cells.values, cells.offsets)
    return fitter.finish()


def evaluate_reconstruction(
    adata: Any,
    *,
    model: Any,
    tokenizer: Any,
    name: str = "cells",
    split_key: str | None = None,
    mask_ratios: Sequence[float] = MASK_RATIOS,
    seeds: Sequence[int] = (0, 1, 2),
    max_test_cells: int = 50,
    **reading: Any,
) -> dict[str, Any]:
    """Reconstruct held-out cells at several shares of hidden genes, beside every baseline.

    Args:
        adata: AnnData with N cells.
        model: A `ScDivaForMaskedDiffusion`.
        tokenizer: The tokenizer of this model.
        name: Of the data, for the table.
        split_key: Column of ``obs`` whose groups stay together; None to split single cells.
        mask_ratios: Shares of a cell's genes that are hidden.
        seeds: One run each, with its own split, hidden genes and random weights.
        max_test_cells: Held-out cells that are scored, drawn among them.
        **reading: How to read the AnnData, as in `ScDivaTokenizer.iter_cells`.

    Returns:
        A result: rows of scDiVa and of the baselines for each share and for the copy test. ``details`` holds
        ``mask_ratios`` and, for the figures, ``gene_loss`` and ``value_rmse`` of each method over them. No
        seed raises ``ValueError``.
    """
    check_request(adata, model, tokenizer, seeds)
    units = resampling_units(adata, split_key)
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for seed in seeds:
        train, test = split_cells(adata, split_key, seed=seed)
        test = np.sort(np.random.default_rng(seed).permutation(test)[:max_test_cells])
        baselines_cells = read_cells(adata[train], tokenizer=tokenizer, **reading)
        baselines = fit_baselines(baselines_cells, tokenizer=tokenizer)
        cells = read_cells(adata[test], tokenizer=tokenizer, **reading)
        models = {MODEL: model, RANDOM_MODEL: random_weights(model, seed=seed)}
        for ratio in mask_ratios:
            data = f"{name}, {100 * ratio:g} % hidden"
            found = masked_scores(
                cells,
                models,
                baselines=baselines,
                mask_ratio=ratio,
                seed=seed,
                with_lattice=tokenizer.gene_order != "random",
                units=units[test],
            )
            for method, scores in found.items():
                runs.setdefault((data, method), []).append(scores)
        data = f"{name}, clean input, legacy copy test"
        for method, scores in copy_scores(cells, models, training_cells=baselines_cells, seed=seed).items():
            runs.setdefault((data, method), []).append(scores)
    rows = result_rows(runs)
    curves = {
        score: {
            method: [row.get(score) for row in rows if row["method"] == method and "% hidden" in row["data"]]
            for method in dict.fromkeys(row["method"] for row in rows if score in row)
        }
        for score in ("gene_loss", "value_rmse")
    }
    return {
        "title": f"Reconstruction of held-out cells: {name}",
        "numbers": [row for row in rows if row["method"] == MODEL],
        "baselines": [row for row in rows if row["method"] != MODEL],
        "columns": list(COLUMNS),
        "note": NOTE,
        "details": {"mask_ratios": list(mask_ratios), "split_key": split_key, "seeds": list(seeds)} | curves,
    }


def check_request(adata: Any, model: Any, tokenizer: Any, seeds: Sequence[int]) -> None:
    """Refuse what neither reconstruction nor imputation can be evaluated on.

    Args:
        adata: An AnnData, not a path.
        model: A `ScDivaForMaskedDiffusion`.
        tokenizer: The tokenizer of this model.
        seeds: One at least.

    Raises:
        ValueError: If there is no seed.
    """
    refuse_path(adata)
    check_diffusion_model(model)
    check_vocabulary(model, tokenizer)
    if not len(seeds):
        msg = "seeds is empty; one run needs one seed."
        raise ValueError(msg)


def result_rows(runs: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Average the runs of every row of a table, and bound the averages by resampling units.

    Args:
        runs: (data, method) -> numbers of each run; a number that a run lacks is undefined in the mean.
            ``per_cell`` may hold, for some of the numbers, arrays (cells, 3) of the unit of each cell, a
            total and how much went into it. Units of all runs are resampled; one that occurs in several runs
            stays one.

    Returns:
        Flat rows.
    """
    rows = []
    for (data, method), of_runs in runs.items():
        names = dict.fromkeys(name for run in of_runs for name in run if name != PER_CELL)
        complete = [{name: run.get(name) for name in names} for run in of_runs]
        row = {"data": data, "method": method} | summarise(complete)
        for name in of_runs[0].get(PER_CELL, {}):
            parts = [run[PER_CELL].get(name, np.empty((0, 3))) for run in of_runs]
            units, sums, sizes = np.concatenate(parts).T
            places = np.unique(units, return_inverse=True)[1]
            totals, counts = np.bincount(places, weights=sums), np.bincount(places, weights=sizes)
            if row[name] is not None and len(totals) > 1:
                row[f"{name}_low"], row[f"{name}_high"] = bootstrap_interval(
                    np.arange(len(totals)), statistic=ratio_of_sums(totals, counts)
                )
        rows.append(row)
    return rows


def resampling_units(adata: Any, split_key: str | None) -> np.ndarray:
    """Say what is resampled for an interval: groups where the split keeps enough of them, else cells.

    Args:
        adata: AnnData with N cells.
        split_key: As in `split_cells`.

    Returns:
        (N,) number of the unit of each cell.
    """
    if split_key is None:
        return np.arange(adata.n_obs)
    groups = obs_column(adata, split_key, what="split groups")
    names, places = np.unique(groups, return_inverse=True)
    return places if len(names) >= MIN_GROUPS_FOR_INTERVAL else np.arange(adata.n_obs)


def with_cells(
    of_cells: Sequence[tuple[int, Mapping[str, float]]], bounded: Mapping[str, str], units: np.ndarray
) -> dict[str, Any]:
    """Average the scores of cells and keep those that get an interval.

    Args:
        of_cells: Row and scores of each cell.
        bounded: Score of a cell -> name of its mean in the row.
        units: (N,) what is resampled, for each row.

    Returns:
        Name -> mean, and ``per_cell`` as `result_rows` takes it.
    """
    kept = {}
    for score, name in bounded.items():
        found = [(units[row], scores[score], 1.0) for row, scores in of_cells if score in scores]
        if found:
            kept[name] = np.array(found)
    return mean_over_cells([scores for _, scores in of_cells]) | {PER_CELL: kept}


def masked_scores(
    cells: TokenizedCells,
    models: Mapping[str, Any],
    *,
    baselines: DenoisingBaselines,
    mask_ratio: float,
    seed: int,
    with_lattice: bool = True,
    units: np.ndarray | None = None,
) -> dict[str, dict[str, Any]]:
    """Score models and baselines on the same hidden genes.

    Args:
        cells: Held-out cells.
        models: Name -> `ScDivaForMaskedDiffusion`; one at least.
        baselines: Fitted on other cells.
        mask_ratio: Share of a cell's genes that is hidden.
        seed: Of the draws.
        with_lattice: Score the lattice laws; they need cells in ranking order.
        units: (N,) what an interval resamples; default single cells.

    Returns:
        Method -> means over cells: gene scores, value scores, or both; ``per_cell`` for `result_rows`.
    """
    mask_token_id = next(iter(models.values())).config.mask_token_id
    units = np.arange(len(cells.n_genes)) if units is None else units
    of_cells: dict[str, list[tuple[int, dict[str, float]]]] = {method: [] for method in models}
    for rows, batch in masked_batches(
        cells, mask_ratio=mask_ratio, mask_token_id=mask_token_id, seed=seed, batch_size=BATCH_SIZE
    ):
        for method, model in models.items():
            leaks = copy_accuracy(model, batch)
            for row, entry, leak in zip(rows, predict_hidden(model, batch), leaks, strict=True):
                leaked = {"visible_copy_accuracy": float(leak)} if np.isfinite(leak) else {}
                of_cells[method].append((row, entry_scores(entry) | leaked))
        labels = batch["labels"].numpy()
        for cell, law_name, law in iter_gene_laws(batch, baselines, with_lattice=with_lattice):
            genes = labels[cell][labels[cell] >= 0]
            with np.errstate(divide="ignore"):
                scores = cell_gene_scores(score_gene_laws(np.log(law), genes), genes)
            of_cells.setdefault(law_name.replace("_", " "), []).append((rows[cell], scores))
        is_masked = batch["is_masked"].numpy()
        true = batch["expression_labels"].numpy()
        ends = np.cumsum(is_masked.sum(axis=1))[:-1]
        for value_name, predicted in value_predictions(batch, baselines).items():
            for cell, part in enumerate(np.split(predicted, ends)):
                if len(part):
                    scores = cell_value_scores(true[cell][is_masked[cell]], part)
                    of_cells.setdefault(value_name.replace("_", " "), []).append((rows[cell], scores))
    # One set of names for every run of a method: what is undefined in all cells is not there in any.
    return {
        method: with_cells([(row, scores) for row, scores in found if scores], BOUNDED, units)
        for method, found in of_cells.items()
    }


def copy_scores(
    cells: TokenizedCells, models: Mapping[str, Any], *, training_cells: TokenizedCells, seed: int
) -> dict[str, dict[str, float]]:
    """Run the legacy copy test on ten cells: what models repeat, and what needs no model.

    Args:
        cells: Held-out cells.
        models: Name -> `ScDivaForMaskedDiffusion`.
        training_cells: Cells that tell the mean rank of each gene.
        seed: Of the choice of cells.

    Returns:
        Method -> the numbers of `copy_test`. "repeat the next gene" looks at its input alone; "mean rank
        order" sorts the genes of the input by their mean relative rank in the training cells.
    """
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(cells.n_genes > 1))[:N_COPY_CELLS]
    scores = {}
    for method, model in models.items():
        inputs, outputs = repeat_cells(cells, model=model, rows=rows, batch_size=N_COPY_CELLS)
        scores[method] = copy_test(inputs, outputs)
    inputs = [cells.token_ids[cells.offsets[row] : cells.offsets[row + 1]] for row in rows]
    shifted = [np.append(tokens[1:], cells.pad_token_id) for tokens in inputs]
    lengths = np.repeat(training_cells.n_genes, training_cells.n_genes)
    starts = np.repeat(training_cells.offsets[:-1], training_cells.n_genes)
    relative = (np.arange(len(starts)) - starts) / lengths
    size = int(max(training_cells.token_ids.max(), cells.token_ids.max())) + 1
    totals = np.bincount(training_cells.token_ids, relative, size)
    n_cells = np.bincount(training_cells.token_ids, minlength=size)
    mean_rank = np.divide(totals, n_cells, out=np.full(size, 1.0), where=n_cells > 0)
    ordered = [tokens[np.lexsort((tokens, mean_rank[tokens]))] for tokens in inputs]
    scores["repeat the next gene"] = copy_test(inputs, shifted)
    scores["mean rank order"] = copy_test(inputs, ordered)
    return {method: of_method | {"n_cells": len(rows)} for method, of_method in scores.items()}


def reconstruction_figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """Draw gene loss and value error over the share of hidden genes.

    Args:
        result: What `evaluate_reconstruction` returned.

    Returns:
        Name -> Matplotlib figure.
    """
    from modeling_scdiva.evaluation.figures import draw_mask_curve

    details = result["details"]
    labels = {"gene_loss": "gene loss, nats per hidden gene", "value_rmse": "value error (RMSE), log1p"}
    return {
        score: draw_mask_curve(details["mask_ratios"], details[score], "share of genes hidden", label)
        for score, label in labels.items()
    }
