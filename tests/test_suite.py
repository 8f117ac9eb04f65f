"""All evaluations under one roof: what a task needs, its figures, and the example that runs them.

Needs no data. Run: pytest -m "" tests/test_suite.py
"""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from modeling_scdiva.evaluation.suite import (
    FIGURES,
    NEEDS,
    TASKS,
    SuiteSettings,
    annotation_figures,
    evaluate_task,
    integration_figures,
    missing_for,
    perturbation_figures,
)
from modeling_scdiva.metrics import scvi_baselines
from modeling_scdiva.model_card import result_section
from tokenization_scdiva import synthetic_cells

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def run_example(monkeypatch, tmp_path):
    def run(name, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return run


def test_every_task_says_what_it_needs():
    assert set(FIGURES) == set(NEEDS) == set(TASKS)
    settings = SuiteSettings(label_key="cell_type")
    assert missing_for("annotation", settings) == []
    assert missing_for("integration", settings) == ["batch_key"]
    assert missing_for("integration", SuiteSettings()) == ["batch_key", "label_key"]
    assert missing_for("reconstruction", SuiteSettings()) == []
    with pytest.raises(ValueError, match=r"task must be one of annotation, .* got 'generation'"):
        missing_for("generation", settings)
    with pytest.raises(ValueError, match="The task gene_network needs reference"):
        evaluate_task("gene_network", None, model=None, tokenizer=None, settings=settings)


def test_one_task_is_a_result_with_figures(fresh_tiny_model, tokenizer):
    cells = synthetic_cells(n_cells=60, n_genes=120, seed=1)
    settings = SuiteSettings(data_name="made up", seeds=(0,), max_test_cells=6)
    result, figures = evaluate_task(
        "reconstruction", cells, model=fresh_tiny_model(), tokenizer=tokenizer, settings=settings
    )
    assert all(row["data"].startswith("made up") for row in [*result["numbers"], *result["baselines"]])
    assert figures


def test_scvi_is_refused_before_anything_runs_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(scvi_baselines, "has_scvi", lambda: False)
    with pytest.raises(ImportError, match=r"scdiva\[eval-full\]"):
        SuiteSettings(with_scvi=True)
    assert not SuiteSettings().with_scvi


@pytest.mark.slow
@pytest.mark.skipif(not scvi_baselines.has_scvi(), reason="scvi-tools is not installed: scdiva[eval-full]")
@pytest.mark.parametrize("task", ["integration", "imputation"])
def test_scvi_is_a_baseline_where_it_is_wanted(fresh_tiny_model, tokenizer, task):
    cells = synthetic_cells(n_cells=80, n_genes=120, seed=1)
    cells.obs["plate"] = np.resize(["one", "one", "one", "one", "two", "two", "two", "two"], 80)
    settings = SuiteSettings(
        label_key="cell_type", batch_key="plate", seeds=(0,), n_epochs=1, max_test_cells=6, with_scvi=True
    )
    models = {"model": fresh_tiny_model(latent_loss_weight=1.0), "tokenizer": tokenizer}
    wanted, _ = evaluate_task(task, cells, settings=settings, **models)
    plain, _ = evaluate_task(task, cells, settings=replace(settings, with_scvi=False), **models)
    extra = {row["method"] for row in wanted["baselines"]} - {row["method"] for row in plain["baselines"]}
    assert extra == ({"scVI", "scANVI"} if task == "integration" else {"scVI"})


def test_targets_that_the_vocabulary_lacks_are_counted(fresh_tiny_model, tokenizer):
    cells = synthetic_cells(n_cells=160, n_genes=120, seed=1)
    cells.obs["guide"] = np.resize(["NT", "GENE1", "GENE2", "GENE3", "JAK2", "NT", "IFN", "NT"], 160)
    settings = SuiteSettings(
        perturbation_key="guide",
        control_label="NT",
        match_keys=["donor_id"],
        perturbation_genes={"IFN": ["GENE9"]},
        seeds=(0,),
        n_epochs=1,
    )
    result, _ = evaluate_task(
        "perturbation", cells, model=fresh_tiny_model(), tokenizer=tokenizer, settings=settings
    )
    assert "1 perturbations have no target in the vocabulary" in result["note"]
    assert result["numbers"][0]["n_units"] == 5
    wrong = replace(settings, perturbation_key="guides")
    with pytest.raises(KeyError, match=r"no column 'guides' .* Columns: .*'guide'"):
        evaluate_task("perturbation", cells, model=None, tokenizer=tokenizer, settings=wrong)


def test_figures_of_annotation_show_scdiva_first_and_all_curves():
    details = {
        "labels": ["B", "T", "T"],
        "predicted": {"frozen": ["B", "T", "B"], "pca": ["T", "T", "T"]},
        "confidence": {"frozen": [0.9, 0.8, 0.6], "pca": [0.5, 0.5, 0.9]},
        "is_correct": {"frozen": [True, True, False], "pca": [False, True, True]},
    }
    figures = annotation_figures({"details": details})
    labels = [text.get_text() for text in figures["confusion"].axes[0].get_yticklabels()]
    assert labels == ["B (1)", "T (2)"]
    np.testing.assert_allclose(figures["confusion"].axes[0].images[0].get_array(), [[1, 0], [0.5, 0.5]])
    assert {line.get_label() for line in figures["calibration"].axes[0].lines} == {"perfect", "frozen", "pca"}


def test_figures_of_integration_and_perturbation():
    points = np.random.default_rng(0).normal(size=(12, 2))
    embeddings = {"PCA-50, not integrated": points, "Harmony": points, "scDiVa, label-free": points}
    details = {"embeddings": embeddings, "labels": ["a", "b"] * 6, "batches": ["x"] * 12}
    assert set(integration_figures({"details": details})) == {
        "umap_pca_50__not_integrated", "umap_scdiva__label_free",
    }  # fmt: skip
    delta = np.random.default_rng(0).normal(size=(2, 5))
    details = {"true_delta": delta, "predicted_delta": delta, "units": ["STAT1", "IRF7"]}
    (figure,) = perturbation_figures({"details": details}).values()
    assert [panel.get_title() for panel in figure.axes] == ["STAT1 (r = 1.00)", "IRF7 (r = 1.00)"]


def test_example_of_gene_networks(run_example, tmp_path, capsys):
    (tmp_path / "edges.csv").write_text("tf,target\n" + "".join(f"GENE1,GENE{i}\n" for i in range(2, 9)))
    arguments = ("--n_cells", 40, "--min_cells", 3, "--reference", "edges.csv", "--tfs", "GENE1", "GENE271")
    run_example("infer_gene_network.py", *arguments)
    out = capsys.readouterr().out
    assert "random weights. Their network means nothing" in out
    assert "2 TFs, " in out
    assert "scDiVa, attention" in out
    assert out.strip().splitlines()[-1] == "Wrote gene_network"
    written = {path.name for path in (tmp_path / "gene_network").iterdir()}
    assert {"attention.csv", "cells.h5ad", "attention_GENE271.csv"} <= written
    (result,) = (tmp_path / "gene_network").glob("*_gene_network.json")
    assert "| made up, edges, all pairs | **scDiVa, attention** |" in result_section(result)
    with pytest.raises(FileExistsError, match="never overwritten"):
        run_example("infer_gene_network.py", *arguments)


def test_example_of_everything_tells_what_is_missing(run_example, tmp_path):
    synthetic_cells(n_cells=40, n_genes=80).write_h5ad(tmp_path / "mine.h5ad")
    with pytest.raises(SystemExit, match="The task integration needs --batch_key and --label_key"):
        run_example("evaluate.py", "--data", "mine.h5ad", "--task", "reconstruction", "integration")


def test_example_of_everything_on_ones_own_cells(run_example, tmp_path, capsys):
    synthetic_cells(n_cells=60, n_genes=80).write_h5ad(tmp_path / "mine.h5ad")
    run_example(
        "evaluate.py", "--data", "mine.h5ad", "--task", "reconstruction", "--seeds", 0, "--max_test_cells", 5
    )
    out = capsys.readouterr().out
    assert out.strip().splitlines()[-1] == "1 of 1 tasks evaluated; results in results."
    (result,) = (tmp_path / "results").glob("*_reconstruction.json")
    assert json.loads(result.read_text("utf-8"))["figures"]


@pytest.mark.slow
def test_example_of_everything(run_example, tmp_path, capsys):
    run_example("evaluate.py", "--seeds", 0, "--n_epochs", 1, "--max_test_cells", 5, "--n_network_cells", 30)
    assert "6 of 6 tasks evaluated" in capsys.readouterr().out
    for task in TASKS:
        (result,) = (tmp_path / "results").glob(f"*_{task}.json")
        assert "scDiVa" in result_section(result)
        assert list((tmp_path / "results").glob(f"*_{task}_*.png"))
