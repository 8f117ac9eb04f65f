"""Which cells train, which choose, which test: by group (donor, plate) or by cell, and never both.

Notable choices:
- Groups are dealt out whole: all cells of a donor are on one side.
- Validation cells come out of the training cells: whole groups where enough of them remain and the training
  side keeps every class, else a stratified share of the cells. The split says which it was.
- A class is never emptied by taking validation cells from it.

Dimensions: N cells.
Source: METHOD.md section 7.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.model_selection import StratifiedKFold

# From this many groups on, validation may take whole ones.
MIN_GROUPS_FOR_VALIDATION = 3


@dataclass(frozen=True)
class CellSplit:
    """Rows of one table of cells.

    Attributes:
        train: (n,) rows to train on.
        validation: (n,) rows to stop and calibrate on; from the same groups or cells as ``train``.
        test: (n,) rows to score, seen once.
        name: What is held out.
        validation_kind: "groups" or "cells".
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    name: str
    validation_kind: str


def split_validation(
    labels: np.ndarray, groups: np.ndarray | None = None, *, fraction: float = 0.15, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, str]:
    """Take validation cells out of training cells.

    Args:
        labels: (N,) class of each cell.
        groups: (N,) group of each cell; None to take single cells.
        fraction: Share of the cells, about, in (0, 1).
        seed: Equal seed, equal split.

    Returns:
        Rows of training, rows of validation, both sorted, and "groups" or "cells".

    Raises:
        ValueError: If ``fraction`` is out of range, the lengths differ, or too few cells are there to divide.
    """
    labels = np.asarray(labels).astype(str)
    if not 0.0 < fraction < 1.0:
        msg = f"The validation fraction must lie in (0, 1), got {fraction}."
        raise ValueError(msg)
    if groups is not None and len(groups) != len(labels):
        msg = f"labels and groups must be of equal length, got {len(labels)} and {len(groups)}."
        raise ValueError(msg)
    rng = np.random.default_rng(seed)
    is_held = None if groups is None else _held_groups(labels, np.asarray(groups).astype(str), fraction, rng)
    kind = "cells" if is_held is None else "groups"
    if is_held is None:
        is_held = _held_cells(labels, fraction, rng)
    if not is_held.any() or is_held.all():
        msg = (
            f"{len(labels)} cells of {len(set(labels))} classes are too few to hold some out for validation."
        )
        raise ValueError(msg)
    return np.flatnonzero(~is_held), np.flatnonzero(is_held), kind


def leave_groups_out(
    labels: np.ndarray,
    groups: np.ndarray,
    *,
    n_folds: int | None = None,
    validation_fraction: float = 0.15,
    seed: int = 0,
) -> Iterator[CellSplit]:
    """Hold out every group once.

    Args:
        labels: (N,) class of each cell.
        groups: (N,) donor, plate or study of each cell.
        n_folds: Folds that the groups are dealt out to, the largest first to the smallest fold; default one
            fold per group.
        validation_fraction: Share of the training cells, about, that validate.
        seed: Of the validation cells, and of the order of equally large groups.

    Yields:
        One split per fold.

    Raises:
        ValueError: If there is one group only, or there are more folds than groups.
    """
    groups = np.asarray(groups).astype(str)
    names, sizes = np.unique(groups, return_counts=True)
    n_folds = len(names) if n_folds is None else n_folds
    if len(names) < 2 or not 2 <= n_folds <= len(names):
        msg = (
            f"Leaving groups out needs two groups at least and 2 to as many folds, got {len(names)} groups "
            f"({', '.join(names[:5])}) and n_folds={n_folds}."
        )
        raise ValueError(msg)
    if n_folds == len(names):
        folds = [[name] for name in names]
    else:
        folds, loads = [[] for _ in range(n_folds)], np.zeros(n_folds, dtype=np.int64)
        shuffled = np.random.default_rng(seed).permutation(len(names))
        for index in shuffled[np.argsort(-sizes[shuffled], kind="stable")]:
            smallest = int(loads.argmin())
            folds[smallest].append(names[index])
            loads[smallest] += sizes[index]
    for fold in folds:
        is_test = np.isin(groups, fold)
        name = ", ".join(fold)
        yield _with_validation(labels, groups, is_test, name, fraction=validation_fraction, seed=seed)


def stratified_folds(
    labels: np.ndarray, *, n_folds: int = 5, validation_fraction: float = 0.15, seed: int = 0
) -> Iterator[CellSplit]:
    """Hold out every cell once, the classes spread evenly over the folds.

    Args:
        labels: (N,) class of each cell.
        n_folds: Folds.
        validation_fraction: Share of the training cells that validate.
        seed: Of folds and validation cells.

    Yields:
        One split per fold.

    Raises:
        ValueError: If a class has fewer cells than there are folds.
    """
    labels = np.asarray(labels).astype(str)
    names, sizes = np.unique(labels, return_counts=True)
    if n_folds < 2 or sizes.min() < n_folds:
        msg = (
            f"Stratified folds need n_folds >= 2 and as many cells in each class, got n_folds={n_folds} and "
            f"class {str(names[sizes.argmin()])!r} with {sizes.min()} cells. Leave small classes out."
        )
        raise ValueError(msg)
    folds = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
    for number, (_, test) in enumerate(folds.split(labels, labels)):
        is_test = np.zeros(len(labels), dtype=bool)
        is_test[test] = True
        name = f"fold {number + 1}"
        yield _with_validation(labels, None, is_test, name, fraction=validation_fraction, seed=seed)


def stratified_subset(*columns: np.ndarray, n_cells: int, seed: int = 0) -> np.ndarray:
    """Choose cells so that each combination of entries keeps its share, rounded.

    Args:
        *columns: (N,) arrays such as labels and batches.
        n_cells: Cells to keep; all where there are no more.
        seed: Of the choice.

    Returns:
        (n,) rows, sorted.
    """
    n_there = len(columns[0])
    if n_there <= n_cells:
        return np.arange(n_there)
    shuffled = np.random.default_rng(seed).permutation(n_there)
    names = np.stack([np.asarray(column).astype(str) for column in columns])
    strata = np.unique(names, axis=1, return_inverse=True)[1].ravel()
    by_stratum = shuffled[np.argsort(strata[shuffled], kind="stable")]
    # Every k-th cell of the cells sorted by stratum.
    places = np.floor(np.arange(n_cells) * n_there / n_cells).astype(np.int64)
    return np.sort(by_stratum[places])


def _with_validation(
    labels: np.ndarray, groups: np.ndarray | None, is_test: np.ndarray, name: str, **settings: Any
) -> CellSplit:
    outer = np.flatnonzero(~is_test)
    of_groups = None if groups is None else groups[outer]
    train, validation, kind = split_validation(np.asarray(labels)[outer], of_groups, **settings)
    return CellSplit(outer[train], outer[validation], np.flatnonzero(is_test), name, kind)


def _held_groups(
    labels: np.ndarray, groups: np.ndarray, fraction: float, rng: np.random.Generator
) -> np.ndarray | None:
    """Choose whole groups of about the wanted share together; None where that is not possible."""
    names = np.unique(groups)
    if len(names) < MIN_GROUPS_FOR_VALIDATION:
        return None
    is_held = np.zeros(len(labels), dtype=bool)
    for name in rng.permutation(names):
        with_group = is_held | (groups == name)
        keeps_classes = set(labels[~with_group]) == set(labels)
        # Taken if that brings the share nearer to the wanted one, and the first in any case.
        is_nearer = abs(with_group.mean() - fraction) < abs(is_held.mean() - fraction)
        if keeps_classes and (is_nearer or (not is_held.any() and with_group.mean() <= 0.5)):
            is_held = with_group
    return is_held if is_held.any() else None


def _held_cells(labels: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Choose a share of the cells of each class, one at least where two are there."""
    is_held = np.zeros(len(labels), dtype=bool)
    for name in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == name))
        n_held = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        is_held[rows[:n_held]] = True
    return is_held
