"""Which cells are held out, and which settings of a corpus are refused.

Needs no data. Run: pytest tests/test_corpus_plan.py
"""

import numpy as np
import pytest

from tokenization_scdiva import CellCorpus, CorpusSettings, build_corpus
from tokenization_scdiva.corpus_plan import FileOutline, held_out_groups


def build(files, folder, tokenizer, **settings):
    settings = CorpusSettings(**settings)
    return build_corpus(files, folder, tokenizer=tokenizer, settings=settings, show_progress=False)


def described(folder, tokenizer, split):
    """What each cell of a split is."""
    corpus = CellCorpus(folder, split, ranking_settings=tokenizer.ranking_settings)
    return [corpus.describe(index) for index in range(len(corpus))]


def test_validation_by_cells(tokenizer, corpus_folder):
    train, held_out = (
        {(row["dataset"], row["cell_index"]) for row in described(corpus_folder, tokenizer, split)}
        for split in ("train", "validation")
    )
    assert not train & held_out
    assert len(train) + len(held_out) == 240
    assert abs(len(held_out) - 48) < 4 * np.sqrt(240 * 0.2 * 0.8)


@pytest.mark.parametrize("key", ["donor_id", "dataset_id"])
def test_validation_by_groups(cell_files, tokenizer, tmp_path, key):
    settings = {"validation_key": key, "obs_keys": ("donor_id",), "n_shards": 2}
    column = {"donor_id": "donor_id", "dataset_id": "dataset"}[key]
    group = {"donor_id": "donor_1", "dataset_id": "second"}[key]
    build(cell_files, tmp_path / "named", tokenizer, **settings, validation_values=(group,))
    build(cell_files, tmp_path / "drawn", tokenizer, **settings, validation_fraction=0.01)
    for folder in ("named", "drawn"):
        groups = [
            {row[column] for row in described(tmp_path / folder, tokenizer, split)}
            for split in ("train", "validation")
        ]
        assert len(groups[0]) == len(groups[1]) == 1
        assert not groups[0] & groups[1]
        assert folder == "drawn" or groups[1] == {group}


def test_a_group_is_held_out_whatever_other_groups_there_are():
    """Of 400 groups about the wanted share is drawn; another file moves none of them."""
    settings = CorpusSettings(validation_key="donor_id", validation_fraction=0.2)
    groups = [frozenset(f"donor_{i}" for i in range(*ends)) for ends in ((0, 400), (300, 600))]
    outlines = [FileOutline(n_cells=400, obs_columns=["donor_id"], groups=group) for group in groups]
    alone = held_out_groups({"a": outlines[0]}, settings)
    both = held_out_groups({"a": outlines[0], "b": outlines[1]}, settings)
    assert abs(len(alone) - 80) < 4 * np.sqrt(400 * 0.2 * 0.8)
    assert set(both) & groups[0] == set(alone)
    assert set(both) != set(alone)
    other_seed = CorpusSettings(validation_key="donor_id", validation_fraction=0.2, seed=1)
    assert set(held_out_groups({"a": outlines[0]}, other_seed)) != set(alone)
    assert held_out_groups({"a": outlines[0]}, CorpusSettings()) == ()


def test_wrong_validation_groups_are_refused(cell_files, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"No cell has donor_id 'donor_9' .* 2 groups: donor_0, donor_1\."):
        build(cell_files, tmp_path, tokenizer, validation_key="donor_id", validation_values=("donor_9",))
    with pytest.raises(
        KeyError, match="validation column 'sex' is missing in 'first', which has: cell_type, donor_id"
    ):
        build(cell_files, tmp_path, tokenizer, validation_key="sex")
    with pytest.raises(
        KeyError, match=r"No file has the obs column 'sex'\. Columns there are: cell_type, donor_id"
    ):
        build(cell_files, tmp_path, tokenizer, obs_keys=("sex",))
    with pytest.raises(ValueError, match=r"All groups of 'dataset_id' \(first\) would be held out"):
        build({"first": cell_files["first"]}, tmp_path, tokenizer, validation_key="dataset_id")
    assert not list(tmp_path.glob("*.arrow"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_shards": 0}, "n_shards must be at least 1, got 0"),
        ({"validation_fraction": 1.0}, r"validation_fraction must lie in \[0, 1\), got 1.0"),
        ({"validation_values": ("a",)}, "say of which column with validation_key"),
        ({"obs_keys": ("counts", "x")}, r"obs_keys may not hold the corpus' own columns, got \['counts'\]"),
        ({"count_dtype": "int8"}, "count_dtype must be 'uint16' or 'uint32', got 'int8'"),
        ({"min_genes": 0}, "min_genes must be at least 1, got 0"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CorpusSettings(**settings)
