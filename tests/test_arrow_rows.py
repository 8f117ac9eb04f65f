"""Rows of Arrow files come back as `datasets` gives them, in any order, cut or whole, pickled or not.

Needs no data. Run: pytest tests/test_arrow_rows.py
"""

import pickle
from itertools import pairwise

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter

from tokenization_scdiva.arrow_rows import ArrowRows

FEATURES = Features({
    "genes": List(Value("uint16")), "counts": List(Value("uint16")), "size": Value("float32"),
    "name": Value("string"),
})  # fmt: skip


@pytest.fixture
def dataset(tmp_path):
    """37 rows in record batches of 10, lists of 0 to 8 entries."""
    rng = np.random.default_rng(0)
    rows = []
    for row in range(37):
        n = int(rng.integers(0, 9))
        lists = {key: rng.integers(0, 60_000, n).tolist() for key in ("genes", "counts")}
        rows.append(lists | {"size": float(row) / 4, "name": f"cell {row}" if row % 5 else None})
    path = tmp_path / "rows.arrow"
    with ArrowWriter(features=FEATURES, path=str(path)) as writer:
        for start in range(0, 37, 10):
            batch = {key: [row[key] for row in rows[start : start + 10]] for key in FEATURES}
            writer.write_table(Dataset.from_dict(batch, features=FEATURES).data.table)
        writer.finalize()
    dataset = Dataset.from_file(str(path))
    assert dataset.data.column("genes").num_chunks == 4
    assert dataset.to_list() == rows
    return dataset


@pytest.mark.parametrize("rows", [[0], [36, 0, 9, 10, 10, 19, 20], list(range(37))[::-1]])
def test_rows_are_those_of_datasets(dataset, rows):
    wanted = [dataset[row] for row in rows]
    reader = pickle.loads(pickle.dumps(ArrowRows(dataset)))
    table = reader.table(np.array(rows), list(FEATURES))
    assert table.to_pylist() == wanted
    assert table.column("genes").type == dataset.data.column("genes").type
    offsets, (entries, counts) = reader.lists(("genes", "counts"), np.array(rows))
    assert entries.dtype == np.uint16
    assert [entries[a:b].tolist() for a, b in pairwise(offsets)] == [row["genes"] for row in wanted]
    assert counts.tolist() == [count for row in wanted for count in row["counts"]]
    sizes = reader.numbers("size", np.array(rows))
    assert (sizes.dtype, sizes.tolist()) == (np.float32, [row["size"] for row in wanted])


def test_lists_are_cut_while_they_are_fetched(dataset):
    offsets, (entries,) = ArrowRows(dataset).lists(["counts"], np.arange(37), 3)
    assert [entries[a:b].tolist() for a, b in pairwise(offsets)] == [row["counts"][:3] for row in dataset]


def test_lengths(dataset):
    assert ArrowRows(dataset).list_lengths().tolist() == [len(row["genes"]) for row in dataset]


def test_what_is_pickled_is_the_name_of_the_file_not_its_content(dataset):
    reader = ArrowRows(dataset)
    before = len(pickle.dumps(reader))
    reader.lists(["genes"], np.arange(37))
    assert len(pickle.dumps(reader)) == before


def test_lists_of_different_length_are_refused(dataset):
    rows = dataset.to_list()
    rows[11]["counts"].append(1)
    with pytest.raises(ValueError, match="The lists 'genes' and 'counts' differ in length"):
        ArrowRows(Dataset.from_list(rows, features=FEATURES)).lists(["genes"], np.arange(3))


@pytest.mark.parametrize("row", [-1, 37, 10**6])
def test_rows_that_are_not_there_are_refused(dataset, row):
    reader = ArrowRows(dataset)
    for read in (lambda rows: reader.lists(["genes"], rows), lambda rows: reader.numbers("size", rows)):
        with pytest.raises(
            IndexError, match=rf"Rows must lie in \[0, 37\), got {min(row, 3)} to {max(row, 3)}"
        ):
            read(np.array([3, row]))
