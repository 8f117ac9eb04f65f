"""Perturbation response as it is judged: targets or cell types left out, beside baselines and the ceiling.

Notable choices:
- A perturbation (or a left-out level) is one unit: scores are means over units, intervals resample units.
- Where there are combinations, rows of their own tell how many of the targets occur in training: 0/1 for
  single ones; 0/2, 1/2 and 2/2 for pairs. A combination counts each time it is tested; intervals average its
  tests of one group first.
- The same network with random weights, fine-tuned alike, is a baseline; the difference is what pretraining
  gives.
- The ceiling is one half of the real cells predicting the other. It is scored against half of the cells, so
  with few cells a method that shares noise with nothing may come near it.
- Clouds of cells: every method moves the same real controls by its change and is compared with real perturbed
  cells by energy distance and maximum mean discrepancy in principal components of training cells.

Dimensions: N cells, P perturbations, G genes.
Source: METHOD.md sections 7 and 8; Ahlmann-Eltze et al. 2025; Vinas Torne et al. 2025 (Systema); cell-eval2.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from accelerate import Accelerator

from modeling_scdiva.evaluation.perturbation_folds import (
    CEILING,
    Fold,
    FoldData,
    leave_levels_out,
    leave_targets_out,
)
from modeling_scdiva.evaluation.report import summarise
from modeling_scdiva.finetuning import FinetuningArguments
from modeling_scdiva.metrics.intervals import bootstrap_interval, paired_bootstrap_difference
from modeling_scdiva.metrics.perturbation import (
    energy_distance,
    expression_scores,
    is_degenerate,
    maximum_mean_discrepancy,
    mean_scores,
    perturbation_discrimination,
    perturbation_scores,
)
from modeling_scdiva.metrics.perturbation_de import de_call_scores, dynamic_range, unbiased_squares
from modeling_scdiva.tasks.cells import (
    CellTokenizer,
    check_vocabulary,
    encoder_of,
    obs_column,
    refuse_path,
    shown,
)
from modeling_scdiva.tasks.perturbation import cell_deltas, fit_cells
from modeling_scdiva.tasks.perturbation_data import (
    CONTROL,
    PerturbedCells,
    read_perturbed_cells,
    target_tokens,
)
from modeling_scdiva.tasks.perturbation_training import (
    PerturbationSettings,
    panel_genes,
    with_delta_decoder,
)

MODEL, RANDOM_WEIGHTS, REFERENCE = (
    "scDiVa, fine-tuned",
    "scDiVa, random weights, fine-tuned",
    "perturbed mean",
)
COLUMNS = (
    "data", "method", "pearson_delta", "pearson_delta_centroid", "pearson_delta_top20",
    "mean_squared_top20_error", "weighted_squared_error", "weighted_r2", "de_auprc", "lfc_spearman",
    "hit_rate_20", "discrimination", "normalised_squared_error", "significance_jaccard",
    "direction_fidelity", "direction_reach", "lfc_nmae", "energy_distance", "mmd", "n_degenerate", "n_units",
    "n_seeds",
)  # fmt: skip
ERRORS = {name for name in COLUMNS if "error" in name} | {"lfc_nmae"}  # best 0; the other scores 1
HEADLINES = ("pearson_delta", "pearson_delta_centroid", "weighted_squared_error", "discrimination")


@dataclass(frozen=True)
class PerturbationProtocol:
    """How a screen is split and scored.

    Attributes:
        data_name: Name of the data in the table.
        control_label: Entry of the perturbation column for controls.
        holdout_key: Column of ``obs`` whose levels (cell types) are left out one by one; None leaves targets
            out.
        n_folds: Folds of the targets.
        seeds: One full run each: splits, controls, fresh decoder, training.
        min_cells: Perturbations (and levels) with fewer perturbed cells are left out, and reported.
        n_control_cells: Controls from which a change is predicted.
        n_distance_cells: Perturbed cells in a distance between clouds.
        n_splits: Splits of the ceiling.
        with_random_weights: Also fine-tune the network from random weights.
    """

    data_name: str = "screen"
    control_label: str = CONTROL
    holdout_key: str | None = None
    n_folds: int = 4
    seeds: Sequence[int] = (0, 1, 2)
    min_cells: int = 20
    n_control_cells: int = 128
    n_distance_cells: int = 200
    n_splits: int = 5
    with_random_weights: bool = True


@dataclass
class _Scores:
    """Scores of one method in one seed, unit by unit, and what cross-fold scores need."""

    units: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    predicted: list[np.ndarray] = field(default_factory=list)
    true: list[np.ndarray] = field(default_factory=list)


def evaluate_perturbation(
    adata: Any,
    *,
    model: Any,
    tokenizer: CellTokenizer,
    perturbation_key: str,
    protocol: PerturbationProtocol | None = None,
    settings: PerturbationSettings | None = None,
    arguments: FinetuningArguments | None = None,
    accelerator: Accelerator | None = None,
    **reading: Any,
) -> dict[str, Any]:
    """Fine-tune and score on held-out perturbations or cell types, beside the baselines.

    A screen without any perturbation of enough cells is refused.

    Args:
        adata: AnnData of a screen with controls.
        model: Any pretrained scDiVa model; its encoder is copied for each run and stays as it is.
        tokenizer: The tokenizer of this model.
        perturbation_key: Column of ``obs`` that names the perturbation of each cell.
        protocol: How to split and score.
        settings: What is learned, as in `finetune_perturbation`. A column whose levels are left out is
            matched by, too.
        arguments: Numbers of a fine-tuning run; its seed gives way to that of the protocol.
        accelerator: Where it runs.
        **reading: How to read the AnnData, as in `ScDivaTokenizer.iter_cells`.

    Returns:
        ``title``, ``numbers``, ``baselines``, ``columns``, ``note``, and ``details``: scores per unit,
        bootstrap intervals, differences to the perturbed mean, and changes of the first seed for figures.
    """
    refuse_path(adata)
    check_vocabulary(model, tokenizer)
    protocol = PerturbationProtocol() if protocol is None else protocol
    settings = PerturbationSettings() if settings is None else settings
    arguments = FinetuningArguments(learning_rate=1e-4) if arguments is None else arguments
    levels = None
    if protocol.holdout_key is not None:
        levels = obs_column(adata, protocol.holdout_key, what="levels that are left out")
        match_keys = tuple(dict.fromkeys((*settings.match_keys, protocol.holdout_key)))
        settings = replace(settings, validation_unit="group", match_keys=match_keys)
    cells = read_perturbed_cells(
        adata,
        tokenizer=tokenizer,
        perturbation_key=perturbation_key,
        control_label=protocol.control_label,
        match_keys=settings.match_keys,
        **reading,
    )
    rows, left_out = _enough_cells(cells, levels, protocol.min_cells)
    names, genes = sorted(set(cells.perturbations[rows]) - {CONTROL}), settings.perturbation_genes
    targets = target_tokens(names, vocabulary=tokenizer.vocabulary, perturbation_genes=genes)
    embeddings = encoder_of(model).embed_tokens.weight.detach().float().cpu().numpy()
    methods = (MODEL, RANDOM_WEIGHTS) if protocol.with_random_weights else (MODEL,)
    runs: dict[str, list[_Scores]] = defaultdict(list)
    for seed in protocol.seeds:
        run: dict[str, _Scores] = defaultdict(_Scores)
        for fold in _folds(cells, rows, levels, protocol, seed):
            gene_ids = panel_genes(cells, fold.train, vocabulary=tokenizer.vocabulary, settings=settings)
            data = FoldData(cells, fold, gene_ids=gene_ids, targets=targets, gene_embeddings=embeddings)
            _add_baselines(run, data, protocol, seed)
            for method in methods:
                fitted = fit_cells(
                    cells,
                    fold.train,
                    model=with_delta_decoder(model, seed=seed, keep_weights=method == MODEL),
                    vocabulary=tokenizer.vocabulary,
                    settings=settings,
                    arguments=replace(arguments, seed=seed),
                    accelerator=accelerator,
                    show_progress=False,
                ).model
                _add_model(run[method], fitted, data, protocol, seed)
        for method, scores in run.items():
            if levels is not None and method != CEILING:
                _score_across_folds(scores)
            runs[method].append(scores)
    return _result(runs, protocol, left_out, n_without_target=sum(len(targets[name]) == 0 for name in names))


def _enough_cells(
    cells: PerturbedCells, levels: np.ndarray | None, min_cells: int
) -> tuple[np.ndarray, dict[str, int]]:
    """Keep the cells of perturbations (in each level) with enough cells on both sides; count the others."""
    units = np.full(len(cells.groups), "", dtype=object) if levels is None else levels
    is_kept, left_out = np.zeros(len(units), dtype=bool), {}
    for unit in sorted(set(units)):
        own = units == unit
        is_control = own & cells.is_control
        kept_any = False
        for name in sorted(set(cells.perturbations[own]) - {CONTROL}):
            chosen = own & (cells.perturbations == name)
            if min(chosen.sum(), is_control.sum()) >= min_cells:
                is_kept |= chosen
                kept_any = True
            else:
                left_out[f"{name} {unit}".strip()] = int(chosen.sum())
        if kept_any:
            is_kept |= is_control
    if not is_kept.any():
        msg = f"No perturbation has min_cells={min_cells} cells and as many controls: {shown(left_out)}."
        raise ValueError(msg)
    return np.flatnonzero(is_kept), left_out


def _folds(
    cells: PerturbedCells,
    rows: np.ndarray,
    levels: np.ndarray | None,
    protocol: PerturbationProtocol,
    seed: int,
) -> Iterator[Fold]:
    if levels is not None:
        return leave_levels_out(cells, rows, levels=levels)
    return leave_targets_out(cells, rows, n_folds=protocol.n_folds, seed=seed)


def _add_baselines(
    run: dict[str, _Scores], data: FoldData, protocol: PerturbationProtocol, seed: int
) -> None:
    for method, deltas in data.baseline_deltas().items():
        clouds = [_move_controls(data, name, delta, protocol, seed) for name, delta in _named(data, deltas)]
        _add(run[method], data, deltas, data.truth.deltas, clouds=clouds)
    halves = []
    for one, other in data.split_halves(n_splits=protocol.n_splits, seed=seed):
        p_values = [data.predicted_p_values(name, delta, n_parts=2) for name, delta in _named(data, one)]
        halves.append(_scored(data, one, other, p_values=p_values, n_parts=2))
    means = {name: np.mean([half[name] for half in halves], axis=0) for name in halves[0]}
    ceiling = run[CEILING]
    _add_units(ceiling, data)
    for name, values in means.items():
        ceiling.values[name] += values.tolist()


def _add_model(
    scores: _Scores, model: Any, data: FoldData, protocol: PerturbationProtocol, seed: int
) -> None:
    deltas, clouds = [], []
    for name in data.truth.names:
        controls = data.draw_controls(name, n_cells=protocol.n_control_cells, seed=seed)
        moved = np.zeros((len(controls), len(data.gene_ids)))
        for places, found in cell_deltas(
            model, data.cells.inputs, controls, target=data.targets[name], gene_ids=data.gene_ids
        ):
            moved[places] = found
        deltas.append(moved.mean(axis=0))
        clouds.append(_move_controls(data, name, moved, protocol, seed))
    _add(scores, data, np.stack(deltas), data.truth.deltas, clouds=clouds)


def _move_controls(
    data: FoldData, name: str, delta: np.ndarray, protocol: PerturbationProtocol, seed: int
) -> dict[str, Any]:
    """Move controls by a change, (G,) or one per control (n, G): distances to perturbed cells, p-values."""
    controls = data.draw_controls(name, n_cells=protocol.n_control_cells, seed=seed)
    perturbed = data.draw_perturbed(name, n_cells=protocol.n_distance_cells, seed=seed)
    mean, axes = data.components
    moved = data.cells.dense(controls, data.gene_ids) + delta
    clouds = (moved - mean) @ axes, (data.cells.dense(perturbed, data.gene_ids) - mean) @ axes
    change = np.atleast_2d(delta).mean(axis=0)
    return {
        "energy_distance": energy_distance(*clouds),
        "mmd": maximum_mean_discrepancy(*clouds),
        "p_values": data.predicted_p_values(name, change, spread=data.moved_spread(controls, delta)),
    }


def _named(data: FoldData, deltas: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    return zip(data.truth.names, deltas, strict=True)


def _add_units(scores: _Scores, data: FoldData) -> None:
    names = data.truth.names
    if data.fold.holdout is not None:
        scores.units += [f"{name} in {data.fold.name}" for name in names]
        scores.groups += [""] * len(names)
        return
    scores.groups += data.n_seen
    scores.units += [
        name if group == "0/1" else f"{name} ({group} seen)"
        for name, group in zip(names, data.n_seen, strict=True)
    ]


def _scored(
    data: FoldData,
    predicted: np.ndarray,
    true: np.ndarray,
    *,
    p_values: Sequence[np.ndarray],
    n_parts: int = 1,
) -> dict[str, np.ndarray]:
    """Score changes against those measured on the test cells, or on one of so many parts of them."""
    without = {"discrimination": np.full(len(true), np.nan)}  # where a single perturbation is tested
    errors = data.truth.standard_errors * np.sqrt(n_parts)
    calls = {"is_de": data.truth.is_de, "is_own_target": data.is_own_target}
    return (
        without
        | perturbation_scores(
            predicted,
            true,
            de_scores=np.abs(data.truth.t),
            is_de=data.truth.is_de,
            training_mean=data.training_mean,
            gene_weights=data.weights,
            is_target=None if data.is_target.all() else data.is_target,
        )
        | de_call_scores(predicted, true, predicted_p=np.stack(p_values), **calls)
        | unbiased_squares(predicted, true, standard_errors=errors)
        | expression_scores(predicted, true, control_expression=data.control_expression)
        | {"is_degenerate": is_degenerate(predicted).astype(float)}
    )


def _add(
    scores: _Scores,
    data: FoldData,
    predicted: np.ndarray,
    true: np.ndarray,
    *,
    clouds: list[dict[str, Any]],
) -> None:
    _add_units(scores, data)
    p_values = [of_perturbation["p_values"] for of_perturbation in clouds]
    for name, values in _scored(data, predicted, true, p_values=p_values).items():
        scores.values[name] += values.tolist()
    for of_perturbation in clouds:
        for name in ("energy_distance", "mmd"):
            scores.values[name].append(of_perturbation[name])
    for row, wanted in zip(predicted, true, strict=True):
        full = np.full((2, int(data.gene_ids.max()) + 1), np.nan)
        full[0, data.gene_ids], full[1, data.gene_ids] = row, wanted
        scores.predicted.append(full[0])
        scores.true.append(full[1])


def _score_across_folds(scores: _Scores) -> None:
    """Let levels that were left out one by one compete with each other, on the genes of all panels."""
    if len(scores.units) > 1:
        predicted, true = _common_genes(scores)
        scores.values["discrimination"] = perturbation_discrimination(predicted, true).tolist()


def _common_genes(scores: _Scores) -> tuple[np.ndarray, np.ndarray]:
    """Cut the changes of all units to the genes that every fold predicts: two arrays (units, genes)."""
    width = min(map(len, scores.predicted))
    predicted, true = (np.stack([row[:width] for row in part]) for part in (scores.predicted, scores.true))
    is_common = np.isfinite(predicted).all(axis=0) & np.isfinite(true).all(axis=0)
    return predicted[:, is_common], true[:, is_common]


def _result(
    runs: Mapping[str, list[_Scores]],
    protocol: PerturbationProtocol,
    left_out: Mapping[str, int],
    *,
    n_without_target: int,
) -> dict[str, Any]:
    unit = "targets" if protocol.holdout_key is None else f"each {protocol.holdout_key}"
    data = f"{protocol.data_name}, leave {unit} out"
    groups = sorted({group for of_seeds in runs.values() for scores in of_seeds for group in scores.groups})
    rows = []
    for group in [None, *groups] if len(groups) > 1 else [None]:
        what = data if group is None else f"{data}: {group} targets seen"
        for method, of_seeds in runs.items():
            # A deal without units of the group has no numbers of it.
            numbers = [_row_numbers(run, group) for run in of_seeds if group is None or group in run.groups]
            rows.append({"data": what, "method": method} | summarise(numbers))
    per_unit = {method: _by_unit(of_seeds) for method, of_seeds in runs.items()}
    intervals = _intervals(per_unit)
    for row in rows:
        of_method = intervals.get(row["method"], {}) if row["data"] == data else {}
        for name, found in of_method.items():
            row[f"{name}_low"], row[f"{name}_high"] = found["low"], found["high"]
    ranges = _dynamic_ranges([row for row in rows if row["data"] == data])
    shown_ranges = ", ".join(f"{name} {value:.2f}" for name, value in ranges.items())
    first = runs[MODEL][0]
    predicted, true = _common_genes(first)
    return {
        "title": "Perturbation response",
        "numbers": [row for row in rows if row["method"] == MODEL],
        "baselines": [row for row in rows if row["method"] != MODEL],
        "columns": list(COLUMNS),
        "note": f"{_note(protocol, left_out, n_without_target)} Where the ceiling stands on the way from the "
        f"perturbed mean (0) to perfect (1), the dynamic range of a score: {shown_ranges}.",
        "details": {
            "per_unit": per_unit,
            "intervals": intervals,
            "units": first.units,
            "predicted_delta": predicted,
            "true_delta": true,
            "dynamic_range": ranges,
            "left_out": dict(left_out),
        },
    }


def _row_numbers(scores: _Scores, group: str | None) -> dict[str, Any]:
    """Average one seed over its tests, or over those of one group."""
    is_chosen = np.array([group in (None, own) for own in scores.groups])
    values = {name: np.array(of_tests)[is_chosen] for name, of_tests in scores.values.items()}
    counts = {
        "n_degenerate": round(float(values.pop("is_degenerate").sum())),
        "n_without_de": int(np.isnan(values["de_auprc"]).sum()),
        "n_units": int(is_chosen.sum()),
    }
    return dict.fromkeys(COLUMNS[2:-3]) | mean_scores(values) | counts


def _by_unit(of_seeds: Sequence[_Scores]) -> dict[str, dict[str, float]]:
    """Average each score of each unit over folds and seeds that have it: score -> unit -> value."""
    collected: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for scores in of_seeds:
        for name, values in scores.values.items():
            for unit, value in zip(scores.units, values, strict=True):
                collected[name][unit] += [] if np.isnan(value) else [value]
    return {
        name: {unit: float(np.mean(values)) if values else float("nan") for unit, values in units.items()}
        for name, units in collected.items()
    }


def _intervals(per_unit: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Bound headline scores over their units; ``scaled`` is 0 for the perturbed mean, 1 for the ceiling."""
    found: dict[str, Any] = {}
    for method, scores in per_unit.items():
        for name in HEADLINES:
            of_units = {unit: value for unit, value in scores[name].items() if np.isfinite(value)}
            if len(of_units) < 2:
                continue
            values = np.array(list(of_units.values()))
            low, high = bootstrap_interval(values)
            entry = {"mean": float(values.mean()), "low": low, "high": high, "n_units": len(values)}
            reference, ceiling = (
                np.array([per_unit[other][name][unit] for unit in of_units]) for other in (REFERENCE, CEILING)
            )
            if method not in (REFERENCE, CEILING):
                entry |= paired_bootstrap_difference(values, reference)
                span = float(ceiling.mean() - reference.mean())
                entry["scaled"] = entry["difference"] / span if span else float("nan")
            found.setdefault(method, {})[name] = entry
    return found


def _dynamic_ranges(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How far from the perturbed mean towards perfect a replicate comes, score by score."""
    (baseline,) = (row for row in rows if row["method"] == REFERENCE)
    (replicate,) = (row for row in rows if row["method"] == CEILING)
    return {
        name: dynamic_range(replicate[name], baseline[name], perfect=0.0 if name in ERRORS else 1.0)
        for name in COLUMNS[2:-3]
        if replicate[name] is not None and baseline[name] is not None
    }


def _note(protocol: PerturbationProtocol, left_out: Mapping[str, int], n_without_target: int) -> str:
    parts = [
        "Changes of mean log1p CP10k against real held-out controls; mean over units, spread over seeds, "
        "in brackets the 95 % bootstrap interval over units. A "
        "constant prediction has correlation -1 (n_degenerate of them). Centroid: after the training mean is "
        "taken away, which leaves nothing of the perturbed mean (-1), and of no change that mean with its "
        "noise. Discrimination: 0.5 is no information, a fold with one perturbation has none. Predictions "
        "are called significant as if measured on the cells of the truth; the normalised error is divided by "
        "the effect, both without the noise of the truth. The ceiling is scored on half of the cells.",
    ]
    if left_out:
        parts.append(f"Left out with fewer than {protocol.min_cells} cells: {', '.join(left_out)}.")
    if n_without_target:
        parts.append(f"{n_without_target} perturbations have no target in the vocabulary: a bare <pert>.")
    return " ".join(parts)
