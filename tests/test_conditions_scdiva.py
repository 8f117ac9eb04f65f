"""Tests of conditions: from names and depths to the ids that the network reads.

Scope: `category_ids` and `encode_conditions`; how the network reads ids is tested with the network.
Run: pytest tests/test_conditions_scdiva.py
"""

import numpy as np
import pandas as pd
import pytest
import torch

from modeling_scdiva.conditions_scdiva import NOT_GIVEN, category_ids, encode_conditions

CONDITIONS = {
    "cell_type": ["B cell", "T cell", "monocyte"],
    "library_size": [1000.0, 4000.0],
    "tissue": ["blood", "liver"],
}


def ids_of(name, entries, is_strict=True):
    return category_ids(name, entries, CONDITIONS, is_strict=is_strict)


def test_ids_by_hand():
    ids = ids_of("cell_type", ["monocyte", None, "B cell", "T cell"])
    assert ids.tolist() == [3, NOT_GIVEN, 1, 2]
    assert ids.dtype == np.int64
    assert NOT_GIVEN == 0
    assert ids_of("cell_type", []).tolist() == []


def test_depth_classes_by_hand():
    # An edge belongs to the class above it.
    depths = [0.5, 999.9, 1000, 3999.0, 4000.0, 1e9, None, float("nan")]
    ids = ids_of("library_size", depths)
    assert ids.tolist() == [1, 1, 2, 2, 3, 3, 0, 0]
    assert ids.dtype == np.int64
    assert ids_of("library_size", [None, None]).tolist() == [0, 0]
    assert category_ids("library_size", [7.0, None], {"library_size": []}, is_strict=True).tolist() == [1, 0]


@pytest.mark.parametrize("is_strict", [True, False])
@pytest.mark.parametrize("depth", [0.0, -3.0])
def test_a_depth_that_is_not_positive_is_refused(is_strict, depth):
    with pytest.raises(ValueError, match=rf"library_size must be positive .*, got {depth}"):
        ids_of("library_size", [500.0, None, depth], is_strict)


def test_an_unknown_condition_is_refused():
    with pytest.raises(
        KeyError, match=r"no condition 'donor'\. Conditions: 'cell_type', 'library_size', 'tissue'"
    ):
        ids_of("donor", ["d1"], is_strict=False)
    with pytest.raises(KeyError, match=r"no condition 'donor'\. Conditions: none: it was trained without"):
        category_ids("donor", ["d1"], {}, is_strict=True)
    with pytest.raises(KeyError, match=r"no condition 'donor'"):
        encode_conditions({"donor": "d1"}, 1, CONDITIONS)


def test_an_unknown_category_is_refused_or_not_given():
    entries = ["T cell", "neuron", None, "astrocyte", "neuron"]
    with pytest.raises(
        ValueError,
        match=r"knows no cell_type 'astrocyte', 'neuron'\. Known: 'B cell', 'T cell', 'monocyte'\.$",
    ):
        ids_of("cell_type", entries)
    assert ids_of("cell_type", entries, is_strict=False).tolist() == [2, 0, 0, 0, 0]
    with pytest.raises(ValueError, match=r"knows no cell_type 't cell'"):
        encode_conditions({"cell_type": "t cell"}, 2, CONDITIONS)
    assert encode_conditions({"cell_type": "x"}, 2, CONDITIONS, is_strict=False)[:, 0].tolist() == [0, 0]


def test_a_long_list_of_categories_is_shortened():
    many = {"donor": [f"d{i}" for i in range(30)]}
    with pytest.raises(ValueError, match=r"'d11', \.\.\. \(30 in all\)\.$") as caught:
        category_ids("donor", [f"x{i}" for i in range(9)], many, is_strict=True)
    assert "'d12'" not in str(caught.value)
    assert "'x4'. " in str(caught.value)
    assert "'x5'" not in str(caught.value)


def test_conditions_by_hand():
    ids = encode_conditions({"tissue": ["liver", None, "blood"], "library_size": 4500}, 3, CONDITIONS)
    assert ids.dtype == torch.long
    assert ids.tolist() == [[0, 3, 2], [0, 3, 0], [0, 3, 1]]


@pytest.mark.parametrize(
    "depth", [2000, 2000.0, np.float32(2000.0), np.int64(2000), [2000.0] * 4, np.full(4, 2000.0)]
)
def test_one_entry_stands_for_all_cells(depth):
    ids = encode_conditions({"library_size": depth, "cell_type": np.str_("T cell")}, 4, CONDITIONS)
    assert ids.tolist() == [[2, 2, 0]] * 4


def test_columns_of_tables_are_read():
    column = pd.Series(["T cell", None, "B cell"], index=[7, 8, 9])
    for given in (
        column,
        column.astype("category").astype(object).where(column.notna(), None),
        tuple(column),
    ):
        assert encode_conditions({"cell_type": given}, 3, CONDITIONS)[:, 0].tolist() == [2, 0, 1]


def test_what_is_left_out_or_none_is_not_given():
    for columns in ({}, {"tissue": None}, {"cell_type": [None, None], "library_size": None}):
        ids = encode_conditions(columns, 2, CONDITIONS)
        assert ids.tolist() == [[NOT_GIVEN] * 3] * 2
        ids[0, 0] = 5  # columns share no memory
        assert encode_conditions(columns, 2, CONDITIONS).sum() == 0
    assert encode_conditions({}, 0, CONDITIONS).shape == (0, 3)
    assert encode_conditions({}, 4, {}).shape == (4, 0)


@pytest.mark.parametrize("entries", [["blood"], ["blood"] * 3, []])
def test_another_number_of_entries_is_refused(entries):
    with pytest.raises(ValueError, match=rf"tissue has {len(entries)} entries for 2 cells; give one for all"):
        encode_conditions({"tissue": entries}, 2, CONDITIONS)


def test_random_entries_equal_a_lookup():
    rng = np.random.default_rng(0)
    names = [*CONDITIONS["cell_type"], None, "other"]
    entries = [names[i] for i in rng.integers(len(names), size=300)]
    depths = rng.lognormal(8, 1, 300)
    ids = encode_conditions({"cell_type": entries, "library_size": depths}, 300, CONDITIONS, is_strict=False)
    for entry, depth, row in zip(entries, depths, ids.tolist(), strict=True):
        known = CONDITIONS["cell_type"]
        assert row[0] == (known.index(entry) + 1 if entry in known else 0)
        assert row[1] == 1 + sum(depth >= edge for edge in CONDITIONS["library_size"])
