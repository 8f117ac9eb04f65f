"""Reconstruction and imputation by their examples and benchmarks, and the lattice on real counts.

Needs: both packages, matplotlib, rapidfuzz, nltk; one test the real files beside the checkout.
Run: python -m pytest tests/test_reconstruction_scripts.py
"""

import json
import runpy
import sys
from pathlib import Path

import anndata
import numpy as np
import pytest

from modeling_scdiva.evaluation.reconstruction import (
    evaluate_reconstruction,
    fit_baselines,
    masked_scores,
    resampling_units,
    result_rows,
)
from modeling_scdiva.metrics.intervals import bootstrap_interval, ratio_of_sums
from modeling_scdiva.metrics.reconstruction_baselines import molecule_value
from modeling_scdiva.tasks.cells import read_cells
from tokenization_scdiva import GeneVocabulary, ScDivaTokenizer, synthetic_cells

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a script in an empty folder."""

    def call(name: str, *arguments: object) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(REPOSITORY / name), run_name="__main__")

    return call


@pytest.fixture
def checkpoint(fresh_tiny_model, tokenizer, tmp_path):
    model = fresh_tiny_model(latent_loss_weight=1.0)
    model.save_pretrained(tmp_path / "scdiva")
    tokenizer.save_pretrained(tmp_path / "scdiva")
    return tmp_path / "scdiva"


@pytest.fixture
def cell_file(tmp_path):
    synthetic_cells(n_cells=30, n_genes=120, seed=4).write_h5ad(tmp_path / "mine.h5ad")
    return tmp_path / "mine.h5ad"


FEW = ("--max_test_cells", 4, "--seeds", 0)


def test_example_of_reconstruction(run, checkpoint, cell_file, tmp_path, capsys):
    run("examples/evaluate_reconstruction.py", "--mask_ratios", 0.5, *FEW)  # nothing named at all
    assert "random weights" in capsys.readouterr().out
    run(
        "examples/evaluate_reconstruction.py", "--checkpoint", checkpoint, "--data", cell_file,
        "--split_key", "donor_id", "--mask_ratios", 0.5, "--output", "second.json", *FEW,
    )  # fmt: skip
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("Gene loss with 50 % hidden: ")
    assert (tmp_path / "second_gene_loss.png").stat().st_size > 5_000


def test_intervals_resample_groups_and_a_cell_of_two_runs_once():
    """Two runs share cell 0; the interval is that of three units, each with what all runs measured."""
    per_run = [np.array([[0, 1.0, 1], [1, 3.0, 1]]), np.array([[0, 3.0, 1], [2, 5.0, 1]])]
    runs = {("cells", "x"): [{"mae": float(run[:, 1].mean()), "per_cell": {"mae": run}} for run in per_run]}
    (row,) = result_rows(runs)
    assert row["mae"] == pytest.approx(3.0)
    statistic = ratio_of_sums(np.array([4.0, 3.0, 5.0]), np.array([2.0, 1.0, 1.0]))
    assert (row["mae_low"], row["mae_high"]) == bootstrap_interval(np.arange(3), statistic=statistic)
    adata = synthetic_cells(n_cells=12)
    adata.obs["donor"] = np.repeat(list("abcdef"), 2)
    adata.obs["plate"] = np.repeat(["p", "q"], 6)
    np.testing.assert_array_equal(resampling_units(adata, "donor"), np.repeat(np.arange(6), 2))
    for key in ("plate", None):  # two groups are too few
        np.testing.assert_array_equal(resampling_units(adata, key), np.arange(12))


def test_random_gene_order_has_no_lattice(fresh_tiny_model, tokenizer):
    other = ScDivaTokenizer(
        vocabulary=tokenizer.vocabulary, max_genes=tokenizer.max_genes, gene_order="random"
    )
    result = evaluate_reconstruction(
        synthetic_cells(n_cells=30, n_genes=120, seed=4),
        model=fresh_tiny_model(),
        tokenizer=other,
        mask_ratios=(0.5,),
        seeds=(0,),
        max_test_cells=4,
    )
    assert {"unigram", "rank unigram"} <= set(result["details"]["gene_loss"])
    assert not [row for row in result["baselines"] if row["method"].startswith("lattice")]
    with pytest.raises(TypeError, match="got a path"):
        evaluate_reconstruction("cells.h5ad", model=fresh_tiny_model(), tokenizer=other)


def test_example_of_imputation(run, checkpoint, tmp_path, capsys):
    run("examples/impute_dropout.py", *FEW)
    capsys.readouterr()
    run("examples/impute_dropout.py", "--checkpoint", checkpoint, "--output", "second.json", *FEW)
    assert "AUROC of genes lost" in capsys.readouterr().out.strip().splitlines()[-1]
    imputed = anndata.read_h5ad(tmp_path / "second_made-up_cells.h5ad")
    assert set(imputed.layers) == {
        "scdiva_imputed", "scdiva_probability", "scdiva_value", "scdiva_observed",
    }  # fmt: skip
    assert np.isfinite(imputed.layers["scdiva_imputed"]).all()


@pytest.mark.parametrize("benchmark", ["reconstruction", "imputation"])
def test_benchmarks(run, checkpoint, cell_file, tmp_path, benchmark):
    ratios = ("--mask_ratios", 0.5) if benchmark == "reconstruction" else ()
    run(
        f"benchmarks/run_{benchmark}.py", "--model", checkpoint, "--data", cell_file, "--device", "cpu",
        "--output", tmp_path / "result.json", *FEW, *ratios,
    )  # fmt: skip
    result = json.loads((tmp_path / "result.json").read_text("utf-8"))
    assert result["benchmark"] == benchmark
    assert {row["method"].split(",")[0] for row in result["numbers"]} == {"scDiVa"}
    assert all(row["data"].startswith("mine, ") for row in result["baselines"])
    assert len(result["figures"]) == 2


@pytest.mark.real_data
def test_arithmetic_on_real_counts(real_data):
    """The library size is read from half of the values, and the sort gives away more than frequency."""
    cells = anndata.read_h5ad(real_data / "pbmc_facs_zheng2017.h5ad")[:212].copy()
    names = cells.var_names[np.argsort(-np.asarray(cells.X.sum(axis=0)).ravel())[:2_000]].tolist()
    vocabulary = GeneVocabulary(names, names, gene_entropy=np.full(len(names), 0.5))
    tokenizer = ScDivaTokenizer(vocabulary=vocabulary, max_genes=256)
    reading = {"tokenizer": tokenizer, "min_gene_overlap": 0.0}
    fitted, scored = (read_cells(part, **reading) for part in (cells[12:], cells[:12]))
    sizes = np.asarray(cells[:12].X.sum(axis=1)).ravel()
    rng = np.random.default_rng(0)
    for cell, size in enumerate(sizes):
        values = scored.values[scored.offsets[cell] : scored.offsets[cell + 1]]
        unit = molecule_value(values[rng.random(len(values)) < 0.5])
        assert unit == pytest.approx(1e4 / size, rel=1e-4)
    model = fresh_tiny_model_for(tokenizer)
    scores = masked_scores(
        scored,
        {"random": model},
        baselines=fit_baselines(fitted, tokenizer=tokenizer),
        mask_ratio=0.5,
        seed=0,
    )
    frequency, arithmetic = (scores[name]["gene_loss"] for name in ("rank unigram", "lattice rank unigram"))
    assert arithmetic < frequency - 0.5


def fresh_tiny_model_for(tokenizer):
    """Make a network of width 8 for another vocabulary than that of the fixtures."""
    from modeling_scdiva import ScDivaConfig, ScDivaForMaskedDiffusion

    return ScDivaForMaskedDiffusion(
        ScDivaConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
            max_position_embeddings=300,
        )
    )
