"""Splits of cells: nothing on two sides, groups whole, every class kept, validation from training cells only.

Needs no data. Run: pytest tests/test_splits.py
"""

import numpy as np
import pytest
from sklearn.model_selection import LeaveOneGroupOut

from modeling_scdiva.splits import leave_groups_out, split_validation, stratified_folds, stratified_subset


def cells(n_cells=240, n_groups=6, seed=0):
    rng = np.random.default_rng(seed)
    return rng.choice(["a", "b", "c"], n_cells), rng.integers(0, n_groups, n_cells).astype(str)


def check(split, n_cells):
    parts = [split.train, split.validation, split.test]
    joined = np.concatenate(parts)
    assert len(np.unique(joined)) == len(joined) == n_cells
    assert all(len(part) for part in parts)


@pytest.mark.parametrize("n_folds", [None, 2, 4])
def test_groups_stay_whole(n_folds):
    labels, groups = cells()
    splits = list(leave_groups_out(labels, groups, n_folds=n_folds))
    assert len(splits) == (n_folds or 6)
    for split in splits:
        check(split, 240)
        assert split.validation_kind == "groups"
        sides = [set(groups[part]) for part in (split.train, split.validation, split.test)]
        assert sum(map(len, sides)) == len(set.union(*sides)) == 6
        assert set(labels[split.train]) == set(labels)
    tested = np.concatenate([split.test for split in splits])
    assert sorted(tested) == list(range(240))


def test_one_fold_per_group_is_scikit_learns():
    labels, groups = cells()
    expected = [test.tolist() for _, test in LeaveOneGroupOut().split(labels, groups=groups)]
    assert [split.test.tolist() for split in leave_groups_out(labels, groups)] == expected


def test_folds_are_balanced():
    groups = np.repeat(list("abcd"), [60, 30, 20, 10])
    labels = np.tile(["x", "y"], 60)
    sizes = [len(split.test) for split in leave_groups_out(labels, groups, n_folds=2)]
    assert sizes == [60, 60]


def test_two_training_groups_validate_by_cell():
    labels, groups = cells(n_groups=3)
    for split in leave_groups_out(labels, groups):
        assert split.validation_kind == "cells"
        assert set(groups[split.validation]) == set(groups[split.train])
        assert not set(groups[split.test]) & set(groups[split.train])


def test_a_class_of_one_group_stays_in_training():
    labels, groups = np.repeat(["a", "b"], 50).astype(object), np.tile(list("uvwxy"), 20)
    labels[groups == "u"] = "only_u"
    for seed in range(10):
        train, validation, kind = split_validation(labels, groups, seed=seed)
        assert kind == "groups"
        assert "only_u" in labels[train]
        assert "u" not in groups[validation]


def test_stratified_folds_hold_every_class():
    labels, _ = cells()
    splits = list(stratified_folds(labels, n_folds=4))
    for split in splits:
        check(split, 240)
        for part in (split.train, split.validation, split.test):
            assert set(labels[part]) == {"a", "b", "c"}
    assert sorted(np.concatenate([split.test for split in splits])) == list(range(240))


def test_a_class_is_never_emptied():
    labels = np.array(["rare"] + ["pair"] * 2 + ["large"] * 20)
    train, validation, _ = split_validation(labels, fraction=0.5)
    assert set(labels[train]) == {"rare", "pair", "large"}
    assert sorted(labels[validation]) == ["large"] * 10 + ["pair"]


def test_share_and_seed():
    labels, groups = cells(2000, 20)
    _, validation, _ = split_validation(labels, groups, fraction=0.2)
    assert abs(len(validation) / 2000 - 0.2) < 0.06
    _, single, _ = split_validation(labels, fraction=0.2)
    assert abs(len(single) / 2000 - 0.2) < 0.01
    same, other = (split_validation(labels, groups, fraction=0.2, seed=seed)[1] for seed in (0, 1))
    np.testing.assert_array_equal(same, validation)
    assert not np.array_equal(other, validation)


def test_bad_input():
    labels, groups = cells()
    with pytest.raises(ValueError, match=r"needs two groups at least .* got 1 groups \(0\)"):
        list(leave_groups_out(labels, np.full(240, "0")))
    with pytest.raises(ValueError, match="n_folds=9"):
        list(leave_groups_out(labels, groups, n_folds=9))
    with pytest.raises(ValueError, match="class 'd' with 1 cells"):
        list(stratified_folds(np.append(labels, "d")))
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\), got 1.0"):
        split_validation(labels, fraction=1.0)
    with pytest.raises(ValueError, match="equal length, got 240 and 3"):
        split_validation(labels, groups[:3])
    with pytest.raises(ValueError, match="2 cells of 2 classes are too few"):
        split_validation(np.array(["a", "b"]))


def test_subset_keeps_the_share_of_every_stratum():
    rng = np.random.default_rng(0)
    batches = rng.choice(["x", "y"], 1000, p=[0.8, 0.2]).astype(object)
    labels = rng.choice(["a", "b", ""], 1000, p=[0.7, 0.2, 0.1]).astype(object)
    rows = stratified_subset(batches, labels, n_cells=100)
    assert len(rows) == len(set(rows)) == 100
    assert (np.diff(rows) > 0).all()
    for batch in "xy":
        for label in ("a", "b", ""):
            in_all = ((batches == batch) & (labels == label)).sum()
            in_sample = ((batches[rows] == batch) & (labels[rows] == label)).sum()
            assert abs(in_sample - in_all / 10) <= 1
    assert set(stratified_subset(batches, labels, n_cells=100, seed=1)) != set(rows)
    np.testing.assert_array_equal(stratified_subset(batches, n_cells=1000), np.arange(1000))
