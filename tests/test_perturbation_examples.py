"""The perturbation example in both modes, and the benchmark, on made-up cells in this process.

Needs no data. Run: pytest tests/test_perturbation_examples.py
"""

import json
import runpy
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from modeling_scdiva.tasks.perturbation_network import ScDivaForPerturbation
from tokenization_scdiva import synthetic_cells

ROOT = Path(__file__).parents[1]


def run(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    return runpy.run_path(str(ROOT / script), run_name="__main__")


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_fine_tune_and_predict(monkeypatch, capsys):
    run(monkeypatch, "examples/predict_perturbation.py", "--n_epochs", 1, "--max_cells", 8)
    assert "(predicting no change: 1)" in capsys.readouterr().out
    found = anndata.read_h5ad("results/expression_delta.h5ad")
    assert found.shape == (6, 300)
    assert "ENSG00000000001+ENSG00000000002" in found.obs_names
    assert np.isfinite(found.X).all()
    model = ScDivaForPerturbation.from_pretrained("results/scdiva_perturbation")
    assert model.delta_decoder.mean_deltas.any()


def test_clamp(monkeypatch, capsys):
    arguments = ("--mode", "clamp", "--off", "ENSG00000000005", "--n_cells", 12, "--n_random_sets", 3)
    run(monkeypatch, "examples/predict_perturbation.py", *arguments)
    assert "read out from slots" in capsys.readouterr().out
    table = pd.read_csv("results/clamped_genes.csv", index_col="gene_id")
    assert table["p_value"].dropna().between(0.25, 1).all()


def test_what_is_missing_is_told(monkeypatch):
    cells = synthetic_cells(n_cells=20, n_genes=60)
    cells.obs["perturbation"] = np.resize(["NT", "GENE1"], 20)
    cells.write_h5ad("screen.h5ad")
    script, words = "examples/predict_perturbation.py", ("--data", "screen.h5ad")
    with pytest.raises(
        KeyError, match=r"no column 'guide' .* Columns: 'cell_type', 'donor_id', 'perturbation'"
    ):
        run(monkeypatch, script, *words, "--perturbation_key", "guide")
    with pytest.raises(
        ValueError, match=r"no control \(control_label='control'\)\. Labels: 'GENE1', 'NT'\. Name the label"
    ):
        run(monkeypatch, script, *words, "--mode", "clamp")


def test_benchmark(monkeypatch, capsys, fresh_tiny_model, tokenizer):
    fresh_tiny_model().save_pretrained("model")
    tokenizer.save_pretrained("model")
    cells = synthetic_cells(n_cells=210, n_genes=120, seed=3)
    cells.obs["perturbation"] = np.resize(["control", "GENE1", "GENE2", "control", "GENE3", "JAK2"], 210)
    cells.write_h5ad("screen.h5ad")
    arguments = ("--n_folds", 2, "--seeds", 0, "--n_epochs", 1, "--n_control_cells", 8, "--max_cells", 8)
    files = ("--model", "model", "--data", "screen.h5ad", "--output", "results", "--device", "cpu")
    run(monkeypatch, "benchmarks/run_perturbation.py", *files, *arguments)
    assert "1 perturbations have no target in the vocabulary" in capsys.readouterr().out
    path = next(Path("results").glob("*.json"))
    result = json.loads(path.read_text())
    assert result["bare_targets"] == ["JAK2"]
    assert result["numbers"][0]["n_units"] == 4
    assert path.with_name(f"{path.stem}_delta.png").exists()
