"""Cell-type annotation, measured: which cells are held out, which methods compete, which numbers are printed.

Notable choices:
- Three protocols: groups (donors, plates) left out one by one or in folds; stratified folds, where groups
  say nothing or are the types themselves; and another study as the test.
- Each test cell is predicted once per seed; scores are over all of them together, since a small group may
  hold few types. Rows give mean and spread over seeds, which change validation cells, fresh weights, order of
  the batches and, in stratified folds, the folds.
- Cells of a type that the training side lacks cannot be right. They are left out of the scores of every
  method alike, counted, and used for ``novel_auroc``: does low confidence tell them from the others?
- ``ece`` is of the probabilities as they come, ``ece_scaled`` after one temperature from validation cells.
  ``coverage`` and ``accepted_accuracy`` are at the threshold that promises ``wanted_accuracy`` there.
- Bootstrap intervals of accuracy resample whole groups where there are at least five, else cells; a group
  counts by its cells, as it does in the accuracy.

Dimensions: N cells, C classes.
Source: METHOD.md section 7.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.special import softmax
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from modeling_scdiva.evaluation.annotation_methods import (
    METHOD_NAMES,
    MODEL_METHODS,
    CellTable,
    MethodRunner,
    TrainingChoices,
    join_tables,
    read_table,
)
from modeling_scdiva.evaluation.report import summarise
from modeling_scdiva.metrics.annotation_baselines import ClassProbabilities
from modeling_scdiva.metrics.calibration import LOWEST_PROBABILITY, calibration_scores
from modeling_scdiva.metrics.classification import class_scores, classification_scores
from modeling_scdiva.metrics.intervals import (
    MIN_GROUPS_FOR_INTERVAL,
    bootstrap_interval,
    paired_bootstrap_difference,
    ratio_of_sums,
)
from modeling_scdiva.splits import CellSplit, leave_groups_out, split_validation, stratified_folds
from modeling_scdiva.tasks.annotation import calibrate
from modeling_scdiva.tasks.cells import CellTokenizer, check_vocabulary, obs_column, refuse_path, shown
from modeling_scdiva.tasks.classifier import encode_labels

DEFAULT_METHODS = (
    "frozen", "nearest", "lora", "full", "random_frozen", "random_nearest", "random_lora", "pca",
    "pca_nearest", "variable_genes", "celltypist", "depth", "majority",
)  # fmt: skip
COLUMNS = [
    "data", "method", "macro_f1", "macro_f1_test_classes", "accuracy", "balanced_accuracy", "cohen_kappa",
    "ece", "ece_scaled", "accepted_accuracy", "coverage",
]  # fmt: skip
# The baseline that paired differences are taken against.
REFERENCE_METHOD = "pca"


@dataclass(frozen=True)
class AnnotationProtocol:
    """What is compared on which cells.

    Attributes:
        label_key: Column of ``obs`` with the cell types.
        group_key: Column of donors or technical batches that are left out; None for stratified folds. With a
            test file, validation cells are whole groups of the training file where there are enough.
        n_folds: Folds; default one per group, or five stratified ones.
        label_map: Type -> other name, or None to leave its cells out; types that are not in it stay. For both
            files, where there are two.
        methods: Keys of `annotation_methods.METHOD_NAMES`.
        seeds: One complete run each.
        wanted_accuracy: What thresholds promise on validation cells.
        choices: How networks are trained and run.
        reading: ``max_genes``, and how to read the AnnData, as in `ScDivaTokenizer.iter_cells`.
    """

    label_key: str
    group_key: str | None = None
    n_folds: int | None = None
    label_map: Mapping[str, str | None] = field(default_factory=dict)
    methods: Sequence[str] = DEFAULT_METHODS
    seeds: Sequence[int] = (0, 1, 2)
    wanted_accuracy: float = 0.95
    choices: TrainingChoices = field(default_factory=TrainingChoices)
    reading: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = [method for method in self.methods if method not in METHOD_NAMES]
        if unknown or not self.methods:
            msg = f"Unknown or no methods {unknown}; there are {', '.join(METHOD_NAMES)}."
            raise ValueError(msg)
        if not set(self.methods) & set(MODEL_METHODS) or not set(self.methods) - set(MODEL_METHODS):
            msg = f"methods must hold one of {', '.join(MODEL_METHODS)} and one baseline, got {self.methods}."
            raise ValueError(msg)
        if not self.seeds:
            msg = "seeds must hold at least one seed."
            raise ValueError(msg)


def evaluate_annotation(
    adata: Any,
    *,
    model: Any,
    tokenizer: CellTokenizer,
    protocol: AnnotationProtocol,
    test: Any = None,
    data_name: str = "cells",
    show_progress: bool = True,
) -> dict[str, Any]:
    """Compare ways to annotate cells.

    Args:
        adata: AnnData with labelled cells.
        model: Pretrained scDiVa model of any class, on the device to use; it stays as it is.
        tokenizer: Its tokenizer.
        protocol: What is compared.
        test: AnnData of another study with the same columns; None to hold out cells of ``adata``.
        data_name: How the cells are called in the table.
        show_progress: Show a progress bar.

    Returns:
        A result as `modeling_scdiva.evaluation.report` describes it. ``details``: ``labels`` (true types of
        the scored cells), ``predicted``, ``confidence`` and ``is_correct`` per method in the order of these
        (first seed), ``classes`` (per type with support, first seed), ``splits``, ``left_out`` (type: cells),
        ``differences`` (paired bootstrap against PCA), ``interval_unit``.
    """
    check_vocabulary(model, tokenizer)
    table, n_train_cells, left_out = _read(adata, test, tokenizer, protocol)
    runner = MethodRunner(table, model, protocol.choices)
    runs: dict[str, list[_Run]] = {method: [] for method in protocol.methods}
    splits_made: dict[str, dict[str, Any]] = {}
    for seed in protocol.seeds:
        splits = list(_splits(table, protocol, seed, n_train_cells))
        splits_made[f"seed {seed}"] = {split.name: _described(split) for split in splits}
        for method in tqdm(protocol.methods, desc=f"{data_name}, seed {seed}", disable=not show_progress):
            found = [runner.run(method, split, seed) for split in splits]
            runs[method].append(_pool(table, splits, found, protocol))
    n_scored = int(runs[protocol.methods[0]][0].is_known.sum())
    name = f"{data_name} ({n_scored:,} cells)"
    rows = {method: _row(runs[method], table) for method in protocol.methods}
    labelled = {method: {"data": name, "method": METHOD_NAMES[method]} | row for method, row in rows.items()}
    return {
        "title": "Cell types of new cells",
        "numbers": [row for method, row in labelled.items() if method in MODEL_METHODS],
        "baselines": [row for method, row in labelled.items() if method not in MODEL_METHODS],
        "columns": COLUMNS,
        "note": _note(table, protocol, test, left_out, len(table.labels) - n_train_cells),
        "details": _details(runs, table, protocol)
        | {"splits": splits_made, "left_out": left_out, "n_genes_of_baselines": len(table.gene_names)},
    }


@dataclass(frozen=True)
class _Run:
    """Pooled predictions of one method and seed; entries are test cells.

    Attributes:
        rows: (n,) rows of the table.
        predicted: (n,) types.
        confidence: (n,) probability of the predicted type.
        is_known: (n,) whether the training side has the true type.
        is_accepted: (n,) whether confidence reaches the calibrated threshold.
        numbers: Scores.
    """

    rows: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    is_known: np.ndarray
    is_accepted: np.ndarray
    numbers: dict[str, Any]


def _read(
    adata: Any, test: Any, tokenizer: CellTokenizer, protocol: AnnotationProtocol
) -> tuple[CellTable, int, dict[str, int]]:
    """Read one or two files.

    Returns:
        The table, how many of its first cells may train (all for one file), and the cells left out by type.
    """
    tables: list[CellTable] = []
    left_out = Counter[str]()
    for part in (adata,) if test is None else (adata, test):
        refuse_path(part)
        labels = obs_column(part, protocol.label_key, what="cell types")
        mapped = np.array([protocol.label_map.get(label, label) for label in labels], dtype=object)
        is_kept = np.array([label is not None for label in mapped])
        if test is None and protocol.group_key is None:
            n_folds = _n_folds(protocol)
            sizes = Counter(mapped[is_kept].tolist())
            is_kept &= np.array([sizes[label] >= n_folds for label in mapped])
        left_out.update(labels[~is_kept].tolist())
        _refuse_one_class(mapped[is_kept], protocol, labels)
        part = part[is_kept].copy()
        groups = None
        if protocol.group_key is not None and part.n_obs and not tables:
            groups = obs_column(part, protocol.group_key, what="donors or technical batches")
        tables.append(
            read_table(part, mapped[is_kept], groups=groups, tokenizer=tokenizer, **protocol.reading)
        )
    if test is None:
        return tables[0], len(tables[0].labels), dict(left_out)
    joined = join_tables(*tables)
    n_test_cells = len(tables[1].labels)
    if tables[0].groups is not None:
        groups = np.concatenate([tables[0].groups, np.full(n_test_cells, "")])
        joined = CellTable(**{**vars(joined), "groups": groups})
    return joined, len(tables[0].labels), dict(left_out)


def _n_folds(protocol: AnnotationProtocol) -> int:
    return 5 if protocol.n_folds is None else protocol.n_folds


def _refuse_one_class(kept: np.ndarray, protocol: AnnotationProtocol, labels: np.ndarray) -> None:
    n_types = len(set(kept.tolist()))
    if n_types < 2:
        msg = (
            f"obs[{protocol.label_key!r}] leaves {n_types} types to tell apart, two are needed. "
            f"Types before label_map and fold sizes: {shown(sorted(set(labels)))}."
        )
        raise ValueError(msg)


def _splits(
    table: CellTable, protocol: AnnotationProtocol, seed: int, n_train_cells: int
) -> Iterator[CellSplit]:
    fraction = protocol.choices.validation_fraction
    n_cells = len(table.labels)
    if n_train_cells < n_cells:
        groups = None if table.groups is None else table.groups[:n_train_cells]
        train, validation, kind = split_validation(
            table.labels[:n_train_cells], groups, fraction=fraction, seed=seed
        )
        yield CellSplit(train, validation, np.arange(n_train_cells, n_cells), "other study", kind)
    elif table.groups is None:
        yield from stratified_folds(
            table.labels, n_folds=_n_folds(protocol), validation_fraction=fraction, seed=seed
        )
    else:
        yield from leave_groups_out(
            table.labels, table.groups, n_folds=protocol.n_folds, validation_fraction=fraction, seed=seed
        )


def _pool(
    table: CellTable,
    splits: Sequence[CellSplit],
    found: Iterable[ClassProbabilities],
    protocol: AnnotationProtocol,
) -> _Run:
    """Put the test cells of all splits together and score them."""
    names = np.unique(table.labels)
    parts: dict[str, list[np.ndarray]] = {
        key: [] for key in ("rows", "predicted", "raw", "scaled", "is_accepted", "is_known")
    }
    for split, result in zip(splits, found, strict=True):
        columns = np.searchsorted(names, result.classes)
        codes = encode_labels(table.labels[split.validation], result.classes)
        logs = np.log(np.maximum(result.validation, LOWEST_PROBABILITY))
        calibration = calibrate(logs, codes, wanted_accuracy=protocol.wanted_accuracy)
        logits = np.log(np.maximum(result.test, LOWEST_PROBABILITY))
        scaled = softmax(logits / calibration.temperature, axis=1)
        parts["rows"].append(split.test)
        parts["predicted"].append(result.classes[result.test.argmax(axis=1)])
        parts["is_accepted"].append(scaled.max(axis=1) >= calibration.threshold)
        parts["is_known"].append(np.isin(table.labels[split.test], result.classes))
        for key, values in (("raw", result.test), ("scaled", scaled)):
            wide = np.zeros((len(split.test), len(names)))
            wide[:, columns] = values
            parts[key].append(wide)
    whole = {key: np.concatenate(arrays) for key, arrays in parts.items()}
    rows, is_known = whole["rows"], whole["is_known"]
    truth = table.labels[rows]
    if not is_known.any():
        trained = sorted({name for split in splits for name in table.labels[split.train].tolist()})
        msg = (
            f"No test cell has a type that was trained. Test: {shown(sorted(set(truth)))}; training: "
            f"{shown(trained)}. Bring the names together with label_map."
        )
        raise ValueError(msg)
    numbers = classification_scores(truth[is_known], whole["predicted"][is_known])
    codes = encode_labels(truth, names)
    numbers |= calibration_scores(whole["raw"][is_known], codes[is_known])
    numbers["ece_scaled"] = calibration_scores(whole["scaled"][is_known], codes[is_known])["ece"]
    is_accepted = whole["is_accepted"]
    is_correct = truth == whole["predicted"]
    accepted = is_accepted & is_known
    numbers["coverage"] = float(is_accepted[is_known].mean())
    numbers["accepted_accuracy"] = float(is_correct[accepted].mean()) if accepted.any() else None
    confidence = whole["raw"].max(axis=1)
    numbers["n_without_class"] = int((~is_known).sum())
    numbers["novel_auroc"] = None if is_known.all() else float(roc_auc_score(~is_known, -confidence))
    return _Run(rows, whole["predicted"], confidence, is_known, is_accepted, numbers)


def _row(runs: Sequence[_Run], table: CellTable) -> dict[str, Any]:
    right, sizes = _unit_counts(runs, table)
    low, high = bootstrap_interval(np.arange(len(sizes)), statistic=ratio_of_sums(right, sizes))
    return summarise([run.numbers for run in runs]) | {"accuracy_low": low, "accuracy_high": high}


def _unit_counts(runs: Sequence[_Run], table: CellTable) -> tuple[np.ndarray, np.ndarray]:
    """Count cells by unit: a group where there are enough, else a single cell.

    Returns:
        (n,) cells that are right, averaged over seeds, and (n,) cells; the same units for every method.
    """
    totals, counts = np.zeros(len(table.labels)), np.zeros(len(table.labels))
    for run in runs:
        rows = run.rows[run.is_known]
        totals[rows] += run.predicted[run.is_known] == table.labels[rows]
        counts[rows] += 1
    is_scored = counts > 0
    values = totals[is_scored] / counts[is_scored]
    if _interval_unit(table) == "cell" or table.groups is None:
        return values, np.ones(len(values))
    units = np.unique(table.groups[is_scored], return_inverse=True)[1]
    return np.bincount(units, weights=values), np.bincount(units).astype(np.float64)


def _interval_unit(table: CellTable) -> str:
    has_groups = table.groups is not None and "" not in table.groups
    return "group" if has_groups and len(set(table.groups)) >= MIN_GROUPS_FOR_INTERVAL else "cell"  # type: ignore[arg-type]


def _details(
    runs: Mapping[str, Sequence[_Run]], table: CellTable, protocol: AnnotationProtocol
) -> dict[str, Any]:
    first = next(iter(runs.values()))[0]
    known = first.is_known
    truth = table.labels[first.rows[known]]
    predicted = {method: of_seeds[0].predicted[known].tolist() for method, of_seeds in runs.items()}
    details: dict[str, Any] = {
        "labels": truth.tolist(),
        "predicted": predicted,
        "confidence": {method: of_seeds[0].confidence[known].tolist() for method, of_seeds in runs.items()},
        "is_correct": {method: (truth == np.array(found)).tolist() for method, found in predicted.items()},
        "classes": {
            method: {row.pop("class"): row for row in class_scores(truth, found)}
            for method, found in predicted.items()
        },
        "interval_unit": _interval_unit(table),
        "seeds": list(protocol.seeds),
    }
    if REFERENCE_METHOD in runs:
        reference, sizes = _unit_counts(runs[REFERENCE_METHOD], table)
        places = np.arange(len(sizes))
        details["differences"] = {
            method: paired_bootstrap_difference(
                places,
                places + len(sizes),
                statistic=ratio_of_sums(
                    np.concatenate([_unit_counts(of_seeds, table)[0], reference]), np.tile(sizes, 2)
                ),
            )
            for method, of_seeds in runs.items()
            if method in MODEL_METHODS
        }
    return details


def _described(split: CellSplit) -> dict[str, Any]:
    sizes = {f"n_{part}": len(getattr(split, part)) for part in ("train", "validation", "test")}
    return {"validation_kind": split.validation_kind} | sizes


def _note(
    table: CellTable,
    protocol: AnnotationProtocol,
    test: Any,
    left_out: Mapping[str, int],
    n_test_cells: int,
) -> str:
    if test is not None:
        held_out = f"Trained on one study, tested on {n_test_cells:,} cells of another"
    elif protocol.group_key is None:
        held_out = f"{_n_folds(protocol)} stratified folds of cells, not of donors"
    else:
        held_out = f"Held out by {protocol.group_key}"
    dropped = ", ".join(f"{name} ({size})" for name, size in sorted(left_out.items()))
    seeds = ", ".join(map(str, protocol.seeds))
    return (
        f"{held_out}; mean and standard deviation over seeds {seeds}. Every method is fitted on the same "
        "training cells, tuned on the same validation cells. macro_f1 averages over the types of truth and "
        "prediction, macro_f1_test_classes over those of the truth. accepted_accuracy and coverage: cells "
        f"above the threshold that promises {protocol.wanted_accuracy:.0%} on validation cells. Baselines "
        f"see {len(table.gene_names):,} genes." + (f" Left out: {dropped}." if dropped else "")
    )
