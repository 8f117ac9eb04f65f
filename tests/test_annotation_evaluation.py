"""The annotation protocol: all methods on the same held-out cells, nothing of the test seen, results whole.

Needs no data. Run: pytest tests/test_annotation_evaluation.py
"""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from modeling_scdiva.evaluation.annotation import AnnotationProtocol, evaluate_annotation
from modeling_scdiva.evaluation.annotation_methods import (
    METHOD_NAMES,
    MethodRunner,
    TrainingChoices,
    join_tables,
    read_table,
)
from modeling_scdiva.evaluation.report import print_result, write_result
from modeling_scdiva.splits import leave_groups_out
from modeling_scdiva.tasks.cells import whole_counts
from modeling_scdiva.tasks.reference_mapping import map_to_reference
from tokenization_scdiva import synthetic_cells

CHOICES = TrainingChoices(arguments={"n_epochs": 1, "batch_size": 64})
QUICK = ("frozen", "pca", "majority")


def made_up(n_cells=160, seed=5):
    adata = synthetic_cells(n_cells=n_cells, n_genes=120, seed=seed)
    adata.obs["donor_id"] = [f"donor_{cell // 4 % 5}" for cell in range(n_cells)]
    return adata


@pytest.fixture(scope="module")
def model(fresh_tiny_model):
    return fresh_tiny_model(hidden_dropout=0.0)


def evaluate(model, tokenizer, adata=None, *, test=None, **protocol):
    settings = {"label_key": "cell_type", "methods": QUICK, "seeds": (0, 1), "choices": CHOICES} | protocol
    return evaluate_annotation(
        made_up() if adata is None else adata,
        model=model,
        tokenizer=tokenizer,
        protocol=AnnotationProtocol(**settings),
        test=test,
        show_progress=False,
    )


def row_of(result, method):
    rows = result["numbers"] + result["baselines"]
    return next(row for row in rows if row["method"] == METHOD_NAMES[method])


def test_all_methods_run_on_the_same_cells(model, tokenizer, tmp_path, capsys):
    result = evaluate(
        model, tokenizer, group_key="donor_id", n_folds=2, methods=tuple(METHOD_NAMES), seeds=(0,)
    )
    assert {row["method"] for row in result["numbers"] + result["baselines"]} == set(METHOD_NAMES.values())
    assert all(row["method"].startswith("scDiVa") for row in result["numbers"])
    assert not any(row["method"].startswith("scDiVa") for row in result["baselines"])
    for row in result["numbers"] + result["baselines"]:
        assert (row["n_cells"], row["n_classes"], row["n_seeds"]) == (160, 4, 1)
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
    assert row_of(result, "pca")["accuracy"] > 0.9
    assert row_of(result, "pca_nearest")["accuracy"] > 0.9
    assert row_of(result, "majority")["accuracy"] == pytest.approx(0.25, abs=0.1)
    print_result(result)
    assert "scDiVa, LoRA" in capsys.readouterr().out
    assert write_result(result, tmp_path, "annotation").is_file()


def test_numbers_are_those_of_the_pooled_cells(model, tokenizer):
    result = evaluate(model, tokenizer, group_key="donor_id", seeds=(3,))
    details = result["details"]
    for method in QUICK:
        row, predicted = row_of(result, method), details["predicted"][method]
        assert row["accuracy"] == pytest.approx(accuracy_score(details["labels"], predicted))
        assert row["macro_f1"] == pytest.approx(f1_score(details["labels"], predicted, average="macro"))
        assert np.mean(details["is_correct"][method]) == pytest.approx(row["accuracy"])
        assert sum(line["support"] for line in details["classes"][method].values()) == 160
    assert details["interval_unit"] == "group"
    splits = details["splits"]["seed 3"]
    assert list(splits) == [f"donor_{n}" for n in range(5)]
    assert all(split["validation_kind"] == "groups" for split in splits.values())
    assert set(details["differences"]) == {"frozen"}
    difference = row_of(result, "frozen")["accuracy"] - row_of(result, "pca")["accuracy"]
    assert details["differences"]["frozen"]["difference"] == pytest.approx(difference)


def test_seeds_give_mean_and_spread(model, tokenizer):
    both = row_of(evaluate(model, tokenizer, seeds=(0, 1)), "frozen")
    alone = [row_of(evaluate(model, tokenizer, seeds=(seed,)), "frozen")["macro_f1"] for seed in (0, 1)]
    assert both["macro_f1"] == pytest.approx(np.mean(alone))
    assert both["macro_f1_sd"] == pytest.approx(np.std(alone, ddof=1))
    assert both["n_seeds"] == 2


def test_nearest_cells_are_those_of_reference_mapping(model, tokenizer):
    adata = made_up(100)
    labels = adata.obs["cell_type"].to_numpy(dtype=str)
    table = read_table(adata, labels, groups=adata.obs["donor_id"].to_numpy(), tokenizer=tokenizer)
    split = next(leave_groups_out(table.labels, table.groups))
    found = MethodRunner(table, model, CHOICES).run("nearest", split, 0)
    mapping = map_to_reference(
        adata[split.test], reference=adata[split.train], label_key="cell_type", model=model,
        tokenizer=tokenizer, show_progress=False,
    )  # fmt: skip
    np.testing.assert_allclose(found.test, mapping.votes, atol=1e-5)
    assert found.classes.tolist() == mapping.label_names


METHODS_WITH_LABELS = [
    "frozen", "nearest", "lora", "pca", "pca_nearest", "variable_genes", "celltypist", "depth",
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS_WITH_LABELS)
def test_labels_of_test_cells_are_never_read(model, tokenizer, method):
    """Other labels on the held-out donor, equal predictions."""
    adata = made_up(100)
    labels = adata.obs["cell_type"].to_numpy(dtype=str)
    table = read_table(adata, labels, groups=adata.obs["donor_id"].to_numpy(), tokenizer=tokenizer)
    split = next(leave_groups_out(table.labels, table.groups))
    expected = MethodRunner(table, model, CHOICES).run(method, split, 0)
    table.labels[split.test] = "type_0"
    found = MethodRunner(table, model, CHOICES).run(method, split, 0)
    np.testing.assert_array_equal(found.test, expected.test)


@pytest.mark.parametrize("method", ["frozen", "lora", "pca", "variable_genes", "celltypist"])
def test_values_of_other_test_cells_change_nothing(model, tokenizer, method):
    """The same validation predictions, and the same for a test cell whose neighbours are gone."""
    adata = made_up(100)
    labels = adata.obs["cell_type"].to_numpy(dtype=str)
    table = read_table(adata, labels, groups=adata.obs["donor_id"].to_numpy(), tokenizer=tokenizer)
    split = next(leave_groups_out(table.labels, table.groups))
    fewer = type(split)(split.train, split.validation, split.test[:1], "one", split.validation_kind)
    expected = MethodRunner(table, model, CHOICES).run(method, split, 0)
    found = MethodRunner(table, model, CHOICES).run(method, fewer, 0)
    np.testing.assert_allclose(found.validation, expected.validation, atol=1e-6)
    np.testing.assert_allclose(found.test, expected.test[:1], atol=1e-5)


def test_another_study_with_a_label_map(model, tokenizer):
    """Coarse names in the test file; one type of it was never trained, another is left out."""
    train, test = made_up(), made_up(80, seed=5)
    test.obs["cell_type"] = test.obs["cell_type"].map(
        {"type_0": "low", "type_1": "low", "type_2": "new", "type_3": "doublet"}
    )
    test = test[:, ::-1].copy()  # another order of genes
    label_map = {"type_0": "low", "type_1": "low", "type_2": "high", "doublet": None}
    result = evaluate(model, tokenizer, train, test=test, label_map=label_map)
    row = row_of(result, "pca")
    assert (row["n_cells"], row["n_without_class"]) == (40, 20)
    assert row["accuracy"] > 0.9
    assert 0.0 <= row["novel_auroc"] <= 1.0
    assert result["details"]["left_out"] == {"doublet": 20}
    assert set(result["details"]["labels"]) == {"low"}
    assert "tested on 60 cells of another" in result["note"]
    assert "Left out: doublet (20)" in result["note"]


def test_small_classes_are_left_out_of_folds_and_counted(model, tokenizer):
    adata = made_up()
    labels = adata.obs["cell_type"].to_numpy(dtype=object)
    labels[:3] = "rare"
    adata.obs["cell_type"] = labels
    result = evaluate(model, tokenizer, adata, n_folds=4)
    assert result["details"]["left_out"] == {"rare": 3}
    assert row_of(result, "pca")["n_cells"] == 157
    assert result["details"]["interval_unit"] == "cell"


def test_a_type_of_one_donor_is_counted_not_scored(model, tokenizer):
    adata = made_up()
    labels = adata.obs["cell_type"].to_numpy(dtype=object)
    labels[(adata.obs["donor_id"] == "donor_2").to_numpy() & (labels == "type_1")] = "private"
    adata.obs["cell_type"] = labels
    row = row_of(evaluate(model, tokenizer, adata, group_key="donor_id"), "pca")
    assert row["n_without_class"] == 8
    assert row["n_cells"] == 152


def test_files_without_common_genes_are_refused(tokenizer):
    adata = made_up(20)
    table = read_table(adata, adata.obs["cell_type"].to_numpy(), tokenizer=tokenizer)
    renamed = type(table)(**{**vars(table), "gene_names": np.array([f"x{n}" for n in range(120)])})
    with pytest.raises(ValueError, match=r"share 0 gene names of 120 .* gene_id_key="):
        join_tables(table, renamed)


def test_model_stays_as_it_is(model, tokenizer):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(model, tokenizer, methods=("lora", "full", "majority"), seeds=(0,), n_folds=2)
    assert all((tensor == before[name]).all() for name, tensor in model.state_dict().items())


def test_baselines_see_the_counts_that_the_network_sees(tokenizer):
    adata = made_up(40)
    labels = adata.obs["cell_type"].to_numpy(dtype=str)
    expected = read_table(adata, labels, tokenizer=tokenizer)
    adata.layers["counts"] = adata.X.copy()
    adata.X = np.log1p(adata.X.toarray())
    found = read_table(adata, labels, tokenizer=tokenizer)
    np.testing.assert_array_equal(found.expression.toarray(), expected.expression.toarray())
    np.testing.assert_array_equal(found.cells.values, expected.cells.values)
    with pytest.raises(ValueError, match="X does not hold whole counts, which the baselines need"):
        whole_counts(adata, layer="X")
    with pytest.raises(KeyError, match=r"no layer 'raw'\. Layers: 'counts', and X"):
        whole_counts(adata, layer="raw")


def test_bad_input(model, tokenizer):
    with pytest.raises(KeyError, match=r"no column 'type' \(cell types\)"):
        evaluate(model, tokenizer, label_key="type")
    with pytest.raises(KeyError, match="no column 'plate'"):
        evaluate(model, tokenizer, group_key="plate")
    with pytest.raises(TypeError, match="got a path"):
        evaluate(model, tokenizer, "cells.h5ad")
    other = made_up(80)
    other.obs["cell_type"] = other.obs["cell_type"].astype(str) + "x"
    with pytest.raises(ValueError, match=r"No test cell has a type that was trained\. Test: 'type_0x'"):
        evaluate(model, tokenizer, test=other)
    with pytest.raises(ValueError, match="leaves 1 types to tell apart"):
        evaluate(model, tokenizer, label_map={"type_1": "type_0", "type_2": "type_0", "type_3": None})
    with pytest.raises(ValueError, match=r"Unknown or no methods \['svm'\]"):
        AnnotationProtocol("cell_type", methods=("lora", "svm"))
    with pytest.raises(ValueError, match="and one baseline"):
        AnnotationProtocol("cell_type", methods=("lora", "frozen"))
    with pytest.raises(ValueError, match="at least one seed"):
        AnnotationProtocol("cell_type", seeds=())
