"""The four imputation tasks, each a corruption of held-out cells that every method has to undo.

See `modeling_scdiva.evaluation.imputation`, which runs them.

Dimensions: N scored cells, M training cells, G genes of the file, Q genes of file and vocabulary.
Source: METHOD.md section 8.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import anndata
import numpy as np
from scipy.sparse import csr_matrix

from modeling_scdiva.evaluation.reconstruction import BATCH_SIZE, PER_CELL, fit_baselines, with_cells
from modeling_scdiva.metrics.calibration import reliability_curve
from modeling_scdiva.metrics.denoising_baselines import DenoisingBaselines
from modeling_scdiva.metrics.imputation import (
    detection_scores,
    draw_hidden_entries,
    hide_entries,
    over_imputation_rate,
    profile_correlations,
    shift_prevalence,
    thin_cells,
    value_scores,
)
from modeling_scdiva.metrics.imputation_baselines import (
    Imputation,
    gene_mean,
    gene_mean_depth,
    given_silent,
    identity,
    knn_smoothing,
    log_expression,
)
from modeling_scdiva.metrics.reconstruction import cell_value_scores
from modeling_scdiva.metrics.reconstruction_baselines import value_predictions
from modeling_scdiva.metrics.scvi_baselines import ScviImputer
from modeling_scdiva.tasks.cells import read_cells
from modeling_scdiva.tasks.reconstruction import entry_scores, masked_batches, predict_hidden

HIDDEN_FRACTIONS = (0.1, 0.5, 0.9)
KEEP_FRACTION = 0.25
N_PANEL_GENES = 300
DEPTH_ONLY, SCVI = "gene mean x depth", "scVI"
POISSON_METHODS = (DEPTH_ONLY, SCVI)
IN_SIGHT = ", gene in sight"
PANEL_DETECTION = 0.05  # of the training cells, at least
LEAST_PANEL_MOLECULES = 1
Scores = dict[tuple[str, str], dict[str, Any]]


@dataclass(frozen=True)
class ScoredCells:
    """One split of one file, as the four tasks take it.

    Attributes:
        counts: (N, G) raw counts of the scored cells.
        training_counts: (M, G) raw counts of the others.
        columns: (Q,) columns whose gene is in the vocabulary.
        gene_ids: (Q,) what the vocabulary calls them.
        var: Table of the G genes.
        name: Of the data.
        seed: Of this run.
        include_scvi: Train scVI on the training cells, once for tasks 2 to 4.
        units: (N,) what an interval resamples, for each scored cell.
    """

    counts: csr_matrix
    training_counts: csr_matrix
    columns: np.ndarray
    gene_ids: np.ndarray
    var: Any
    name: str
    seed: int
    include_scvi: bool
    units: np.ndarray

    @property
    def library_size(self) -> np.ndarray:
        """(N,) molecules over all genes of the file."""
        return np.asarray(self.counts.sum(axis=1)).ravel()

    @property
    def training_library_size(self) -> np.ndarray:
        """(M,) molecules of the training cells."""
        return np.asarray(self.training_counts.sum(axis=1)).ravel()

    @cached_property
    def scvi(self) -> ScviImputer:
        """Network of scVI that knows the training cells."""
        return ScviImputer(self.training_counts[:, self.columns], seed=self.seed)

    def label(self, what: str) -> str:
        """Name of a task for the table."""
        return f"{self.name}, {what}"  # nothing in it that changes with the seed


def slot_scores(part: ScoredCells, models: Mapping[str, Any], *, tokenizer: Any, **reading: Any) -> Scores:
    """Task 1: predict values hidden at known slots.

    Args:
        part: Split of one file.
        models: Name -> `ScDivaForMaskedDiffusion`.
        tokenizer: Their tokenizer.
        **reading: As in `ScDivaTokenizer.iter_cells`.

    Returns:
        (data, method) -> ``mae``, ``rmse``, ``pearson`` and ``spearman``, means over cells. A model whose
        value head uses the gene is told it there alone, as in training, and once more with the gene in sight
        of the encoder.
    """
    training, scored = (
        read_cells(anndata.AnnData(counts, var=part.var), tokenizer=tokenizer, **reading)
        for counts in (part.training_counts, part.counts)
    )
    baselines = fit_baselines(training, tokenizer=tokenizer)
    mask_token_id = next(iter(models.values())).config.mask_token_id
    scores: Scores = {}
    for fraction in HIDDEN_FRACTIONS:
        of_cells: dict[str, list[tuple[int, dict[str, float]]]] = {}
        for target in ("joint", "expression"):
            batches = masked_batches(
                scored,
                mask_ratio=fraction,
                mask_token_id=mask_token_id,
                masking_target=target,
                seed=part.seed,
                batch_size=BATCH_SIZE,
            )
            for rows, batch in batches:
                for method, found in _slot_entries(batch, models, baselines, target):
                    scored_rows = [(row, cell) for row, cell in zip(rows, found, strict=True) if cell]
                    of_cells.setdefault(method, []).extend(scored_rows)
        data = part.label(f"{100 * fraction:g} % of values hidden at known slots")
        for method, of_method in of_cells.items():
            means = with_cells(of_method, {"value_mae": "mae"}, part.units)
            scores[data, method] = {
                name.removeprefix("value_"): means[name]
                for name in (
                    "value_mae",
                    "value_rmse",
                    "value_pearson",
                    "value_spearman",
                    "n_cells",
                    PER_CELL,
                )
                if name in means
            }
    return scores


def _slot_entries(
    batch: Mapping[str, Any], models: Mapping[str, Any], baselines: DenoisingBaselines, target: str
) -> Iterator[tuple[str, list[dict[str, float]]]]:
    """Yield what each method that takes part in this way of hiding gets in the cells of a batch."""
    for method, model in models.items():
        is_told = model.value_head.is_gene_conditioned
        if target == "joint" and is_told:
            yield method, [entry_scores(entry) for entry in predict_hidden(model, batch)]
        if target == "expression":
            name = f"{method}{IN_SIGHT}" if is_told else method
            yield name, [entry_scores(entry) for entry in predict_hidden(model, batch)]
    if target == "expression":
        is_masked, true = batch["is_masked"].numpy(), batch["expression_labels"].numpy()
        ends = np.cumsum(is_masked.sum(axis=1))[:-1]
        for name, predicted in value_predictions(batch, baselines).items():
            parts = np.split(predicted, ends)
            yield (
                name.replace("_", " "),
                [
                    cell_value_scores(true[cell][is_masked[cell]], values) if len(values) else {}
                    for cell, values in enumerate(parts)
                ],
            )


Imputer = Callable[..., Imputation]


def entry_task(part: ScoredCells, imputers: Mapping[str, Imputer]) -> Scores:
    """Task 2: predict expressed and silent entries that are taken out.

    Args:
        part: Split of one file.
        imputers: Name -> network with decoder.

    Returns:
        (data, method) -> value and detection scores at the hidden entries.
    """
    is_candidate = np.zeros(part.counts.shape[1], dtype=bool)
    is_candidate[part.columns] = True
    truth = log_expression(part.counts, part.library_size)[:, part.columns]
    n_expressed = (truth > 0).sum(axis=1)
    place_of = np.cumsum(is_candidate) - 1
    scores: Scores = {}
    for fraction in HIDDEN_FRACTIONS:
        entries = draw_hidden_entries(part.counts, fraction, seed=part.seed, is_candidate=is_candidate)
        visible = hide_entries(part.counts, entries)
        hidden = (entries.rows, place_of[entries.columns])
        data = part.label(f"{100 * fraction:g} % of expressed entries and as many silent ones hidden")
        silent = ~entries.is_expressed
        # By design expressed entries are drawn so many times more often than silent ones.
        odds_ratio = ((truth.shape[1] - n_expressed) / np.maximum(n_expressed, 1))[entries.rows]
        for method, imputed in _predictions(part, visible, part.library_size, imputers).items():
            predicted = imputed.expected[hidden]
            probability = shift_prevalence(imputed.probability[hidden], odds_ratio)
            of_method = value_scores(truth[hidden], predicted)
            of_method |= detection_scores(probability, entries.is_expressed)
            of_method |= _errors_of_units(truth[hidden], predicted, part.units[entries.rows])
            of_method["over_imputation_rate"] = over_imputation_rate(
                predicted[silent], part.library_size[entries.rows[silent]]
            )
            scores[data, method] = of_method | {"n_cells": len(truth)}
    return scores


def depth_task(
    part: ScoredCells, imputers: Mapping[str, Imputer]
) -> tuple[Scores, dict[str, tuple[list[float], list[float]]]]:
    """Task 3: predict the full profile from a quarter of the molecules.

    Args:
        part: Split of one file.
        imputers: Name -> network with decoder.

    Returns:
        (data, method) -> scores of all entries, and of the silent ones alone, where detection is scored too;
        and method -> confidences and shares of the bins of its on/off probability.
    """
    thin = thin_cells(part.counts, KEEP_FRACTION, seed=part.seed)
    truth = log_expression(part.counts, part.library_size)[:, part.columns]
    thin_size = np.asarray(thin.sum(axis=1)).ravel()
    is_silent = thin[:, part.columns].toarray() == 0
    is_zero = truth == 0
    sizes = np.repeat(part.library_size[:, None], truth.shape[1], axis=1)
    data = part.label(f"{KEEP_FRACTION:g} x depth, all genes")
    lost = part.label(f"{KEEP_FRACTION:g} x depth, genes without a molecule")
    scores: Scores = {}
    calibration: dict[str, tuple[list[float], list[float]]] = {}
    found = _predictions(part, thin, thin_size, imputers, full_size=thin_size / KEEP_FRACTION)
    for method, imputed in found.items():
        expected = imputed.expected
        scores[data, method] = value_scores(truth, expected) | profile_correlations(truth, expected)
        everywhere, where_silent = np.repeat(part.units, truth.shape[1]), part.units[np.nonzero(is_silent)[0]]
        scores[data, method] |= _errors_of_units(truth.ravel(), expected.ravel(), everywhere)
        scores[data, method]["n_cells"] = len(truth)
        scores[data, method]["over_imputation_rate"] = over_imputation_rate(expected[is_zero], sizes[is_zero])
        if method in POISSON_METHODS:  # they can be told that a gene is silent, and are better for it
            imputed = given_silent(imputed, thin_size / KEEP_FRACTION, kept_fraction=KEEP_FRACTION)
        probability, is_expressed = imputed.probability[is_silent], ~is_zero[is_silent]
        scores[lost, method] = value_scores(truth[is_silent], imputed.expected[is_silent])
        scores[lost, method] |= _errors_of_units(truth[is_silent], imputed.expected[is_silent], where_silent)
        scores[lost, method] |= detection_scores(probability, is_expressed) | {"n_cells": len(truth)}
        if method != "identity":
            curve = reliability_curve(probability, is_expressed)
            calibration[method] = (curve["confidence"].tolist(), curve["accuracy"].tolist())
    return scores, calibration


def panel_task(part: ScoredCells, imputers: Mapping[str, Imputer]) -> Scores:
    """Task 4: predict all genes that a panel of a few hundred does not measure.

    Args:
        part: Split of one file.
        imputers: Name -> network with decoder.

    Returns:
        (data, method) -> value and detection scores of the genes outside the panel; empty where the file has
        too few genes for a panel.
    """
    detected = np.asarray((part.training_counts > 0).mean(axis=0)).ravel()
    usable = part.columns[detected[part.columns] >= PANEL_DETECTION]
    n_panel = min(N_PANEL_GENES, len(usable) // 2)
    if n_panel < 3:
        return {}
    panel = np.sort(np.random.default_rng(part.seed).permutation(usable)[:n_panel])
    is_panel = np.zeros(part.counts.shape[1], dtype=bool)
    is_panel[panel] = True
    molecules = np.asarray(part.counts[:, panel].sum(axis=1)).ravel()
    is_kept = molecules >= LEAST_PANEL_MOLECULES
    share = part.training_counts[:, panel].sum() / max(part.training_counts.sum(), 1.0)
    kept = replace(part, counts=part.counts[is_kept], units=part.units[is_kept])
    sizes = np.maximum(np.rint(molecules[is_kept] / share), molecules[is_kept])
    visible = csr_matrix(kept.counts.multiply(is_panel[None, :]))
    truth = log_expression(kept.counts, kept.library_size)[:, part.columns]
    outside = ~is_panel[part.columns]
    is_zero = truth[:, outside] == 0
    full_sizes = np.repeat(kept.library_size[:, None], int(outside.sum()), axis=1)
    data = kept.label("a panel of genes measured, the others predicted")
    sizes_of_task = {"n_cells": len(truth), "n_panel_genes": n_panel, "n_predicted_genes": int(outside.sum())}
    scores: Scores = {}
    for method, imputed in _predictions(kept, visible, sizes, imputers, is_visible=is_panel).items():
        expected, probability = imputed.expected[:, outside], imputed.probability[:, outside]
        scores[data, method] = value_scores(truth[:, outside], expected)
        scores[data, method] |= profile_correlations(truth[:, outside], expected)
        units = np.repeat(kept.units, is_zero.shape[1])
        scores[data, method] |= _errors_of_units(truth[:, outside].ravel(), expected.ravel(), units)
        scores[data, method] |= detection_scores(probability, ~is_zero) | sizes_of_task
        scores[data, method]["over_imputation_rate"] = over_imputation_rate(
            expected[is_zero], full_sizes[is_zero]
        )
    return scores


def _errors_of_units(true: np.ndarray, predicted: np.ndarray, units: np.ndarray) -> dict[str, Any]:
    """Absolute errors of entries (n,) summed by their unit (n,), and how many each unit has."""
    names, places = np.unique(units, return_inverse=True)
    totals, counts = np.bincount(places, weights=np.abs(predicted - true)), np.bincount(places)
    return {PER_CELL: {"mae": np.stack([names, totals, counts], axis=1)}}


def _predictions(
    part: ScoredCells,
    visible: csr_matrix,
    sizes: np.ndarray,
    imputers: Mapping[str, Imputer],
    *,
    full_size: np.ndarray | None = None,
    is_visible: np.ndarray | None = None,
) -> dict[str, Imputation]:
    """Let every method predict the (N, Q) genes of file and vocabulary from the same visible counts."""
    full_size = sizes if full_size is None else full_size
    shown = np.ones(visible.shape[1], dtype=bool) if is_visible is None else is_visible
    found = {method: impute(part, visible, sizes, shown) for method, impute in imputers.items()}
    columns, training = part.columns, part.training_counts
    known, known_size = training[:, columns], part.training_library_size
    found["identity"] = identity(visible[:, columns], sizes)
    found["gene mean"] = gene_mean(known, known_size, visible.shape[0])
    found[DEPTH_ONLY] = gene_mean_depth(known, known_size, full_size)
    found["kNN smoothing"] = knn_smoothing(
        visible[:, columns],
        training_counts=known,
        training_library_size=known_size,
        is_visible=shown[columns],
        seed=part.seed,
    )
    if part.include_scvi:
        found[SCVI] = part.scvi.impute(visible[:, columns], full_size)
    return found
