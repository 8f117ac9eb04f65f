"""The integration protocol: same cells for every method, labels named where they were seen, controls present.

Needs the eval extra (scib-metrics, harmonypy, scanpy); no real data.
Run: pytest tests/test_integration_evaluation.py
"""

import json
import runpy
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from modeling_scdiva.evaluation import print_result, write_result
from modeling_scdiva.evaluation.integration import (
    IntegrationProtocol,
    evaluate_integration,
)
from modeling_scdiva.model_card import result_section
from modeling_scdiva.tasks.integration import IntegrationArguments
from tokenization_scdiva import synthetic_cells

for package in ("scib_metrics", "harmonypy", "scanpy"):
    pytest.importorskip(package)

ROOT = Path(__file__).resolve().parents[1]
ARGUMENTS = IntegrationArguments(n_epochs=1, batch_size=32, projection_size=8, lora_rank=2)
# As wide as the network: every new shape is compiled.
PROTOCOL = IntegrationProtocol(data_name="made up", n_components=32, n_scvi_epochs=0, with_kbet=False)


@pytest.fixture(scope="module")
def adata():
    cells = synthetic_cells(n_cells=80, n_genes=120, seed=11)
    cells.obs["plate"] = np.where(np.arange(80) // 4 % 2, "first", "second")
    cells.obs["gated"] = np.where(np.arange(80) < 8, "unassigned", cells.obs["cell_type"])
    return cells


@pytest.fixture(scope="module")
def result(adata, tokenizer, fresh_tiny_model):
    before = adata.copy()
    found = evaluate_integration(
        adata, model=fresh_tiny_model(), tokenizer=tokenizer, batch_key="plate", label_key="gated",
        seeds=(0, 1), arguments=ARGUMENTS, protocol=PROTOCOL,
    )  # fmt: skip
    assert not adata.obsm
    assert "scdiva" not in adata.uns
    assert list(adata.obs) == list(before.obs)
    return found


def test_rows_say_which_labels_were_seen(result):
    rows = {row["method"]: row for row in result["numbers"] + result["baselines"]}
    assert {name: row["labels_seen"] for name, row in rows.items()} == {
        "scDiVa, frozen": "no",
        "scDiVa, label-free": "no",
        "scDiVa, label-informed": "yes",
        "PCA-32, not integrated": "no",
        "Harmony": "no",
        "random-weights scDiVa, frozen": "no",
        "control: label-informed scDiVa on permuted labels": "permuted",
        "control: random Gaussian": "no",
        "control: sequencing depth only": "no",
        "control: label one-hot": "yes",
    }
    assert [row["method"] for row in result["numbers"]] == list(rows)[:3]
    assert {row["n_seeds"] for row in rows.values()} == {2}
    assert {row["data"] for row in rows.values()} == {"made up (72 cells, 2 batches)"}
    # No integration is compared with itself; the trivial rows are where they must be.
    assert rows["PCA-32, not integrated"]["pcr_comparison"] == pytest.approx(0.0, abs=1e-3)
    assert rows["control: label one-hot"]["avg_bio"] > 0.9
    assert rows["control: random Gaussian"]["avg_bio"] < 0.5
    assert rows["random-weights scDiVa, frozen"]["asw_label_sd"] > 0
    assert rows["scDiVa, frozen"]["asw_label_sd"] == 0


def test_unlabelled_cells_are_integrated_and_not_scored(result):
    details = result["details"]
    assert details["n_cells"] == {"in_file": 80, "integrated": 80, "scored": 72}
    assert {len(vectors) for vectors in details["embeddings"].values()} == {72}
    assert "unassigned" not in details["labels"]
    assert "80 were integrated and, of these, the 72 labelled ones scored" in result["note"]
    assert f"scib-metrics {details['settings']['versions']['scib-metrics']}" in result["note"]


def test_result_becomes_a_file_and_a_table(result, tmp_path, capsys):
    path = write_result(result, tmp_path, "integration", arguments=["run_integration.py"])
    content = json.loads(path.read_text("utf-8"))
    assert "embeddings.Harmony" in content["details_left_out"]
    assert content["details"]["arguments"]["n_epochs"] == 1
    print_result(result)
    assert "labels seen" in capsys.readouterr().out
    assert "control: label one-hot" in result_section(path)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"seeds": ()}, ValueError, "at least one seed"),
        ({"label_key": "typo"}, KeyError, r"no column 'typo' \(cell types\)"),
        ({"batch_key": "typo"}, KeyError, r"no column 'typo' \(technical batches\)"),
        ({"label_key": "empty"}, ValueError, r"obs\['empty'\] labels no cell"),
        ({"protocol": IntegrationProtocol(reading={"expression_is_log1p": True})}, ValueError, "raw counts"),
        ({"protocol": IntegrationProtocol(reading={"layer": "log"})}, ValueError, "log does not hold whole"),
    ],
)
def test_requests_that_cannot_be_met(adata, tokenizer, fresh_tiny_model, changes, error, message):
    adata = adata.copy()
    adata.obs["empty"] = [None, *["unassigned"] * 79]
    adata.layers["log"] = adata.X.log1p()
    arguments = {"batch_key": "plate", "label_key": "gated"} | changes
    with pytest.raises(error, match=message):
        evaluate_integration(adata, model=fresh_tiny_model(), tokenizer=tokenizer, **arguments)


def test_path_is_refused(tokenizer, fresh_tiny_model):
    with pytest.raises(TypeError, match=r"got a path \(cells\.h5ad\)"):
        evaluate_integration(
            "cells.h5ad", model=fresh_tiny_model(), tokenizer=tokenizer, batch_key="plate", label_key="gated"
        )


# Scripts


@pytest.fixture
def model_folder(tokenizer, fresh_tiny_model, tmp_path):
    fresh_tiny_model().save_pretrained(tmp_path / "scdiva")
    tokenizer.save_pretrained(tmp_path / "scdiva")
    return tmp_path / "scdiva"


def run_script(monkeypatch, path, *arguments):
    monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
    runpy.run_path(str(ROOT / path), run_name="__main__")


def test_example_integrates_and_says_where(adata, model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    adata.write_h5ad("mine.h5ad")
    common = ("--checkpoint", model_folder, "--n_epochs", 1, "--batch_size", 32, "--output", "out.h5ad")
    run_script(
        monkeypatch, "examples/integrate_batches.py", *common, "--data", "mine.h5ad", "--batch_key", "plate",
        "--label_key", "cell_type", "--mode", "label_informed", "--save_model", "adapter",
    )  # fmt: skip
    out = capsys.readouterr().out
    assert 'obsm["X_scdiva_integrated_label_informed"]' in out
    assert "labels seen: yes" in out
    assert "X_scdiva_integrated_label_informed" in ad.read_h5ad("out.h5ad").obsm
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    run_script(monkeypatch, "examples/integrate_batches.py", *common)  # cells made on the spot
    assert "labels seen: no" in capsys.readouterr().out
    assert "X_scdiva_integrated" in ad.read_h5ad("out.h5ad").obsm


@pytest.mark.slow  # draws UMAPs
def test_benchmark_writes_its_result(adata, model_folder, tmp_path, monkeypatch):
    folder = tmp_path / "cells"
    folder.mkdir()
    renamed = adata.copy()
    renamed.obs["batch"] = renamed.obs["plate"]
    renamed.write_h5ad(folder / "cellmix_celseq2_tian2019.h5ad")
    run_script(
        monkeypatch, "benchmarks/run_integration.py", "--model", model_folder, "--data", folder,
        "--datasets", "cellmix_celseq2_tian2019", "--output", tmp_path / "result.json", "--n_epochs", 1,
        "--batch_size", 64, "--seeds", 0, "--n_scvi_epochs", 0, "--no_kbet",
    )  # fmt: skip
    content = json.loads((tmp_path / "result.json").read_text("utf-8"))
    assert {row["data"].split(" (")[0] for row in content["numbers"]} == {"cellmix_celseq2_tian2019, plates"}
    assert any(name.endswith("_cellmix_celseq2_tian2019.png") for name in content["figures"])
    assert str(tmp_path) not in json.dumps(content)
