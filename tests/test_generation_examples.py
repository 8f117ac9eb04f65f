"""The examples and benchmarks of generation and likelihood, run in this process on tiny settings.

Needs: both packages, the eval-full extra for scVI, skipped without; no real data, no GPU.
Run: python -m pytest tests/test_generation_examples.py
"""

import json
import runpy
import shutil
import sys
from pathlib import Path

import anndata
import numpy as np
import pytest

from modeling_scdiva import ScDivaForMaskedDiffusion
from modeling_scdiva.metrics.scvi_baselines import has_scvi
from modeling_scdiva.model_card import result_section
from tokenization_scdiva import CellCorpus, synthetic_cells

ROOT = Path(__file__).resolve().parents[1]
TYPES = ["type_0", "type_1", "type_2", "type_3"]


@pytest.fixture(autouse=True)
def few_trees(monkeypatch):
    """Forests are most of the time of a comparison, and their accuracy is not the question here."""
    monkeypatch.setattr("modeling_scdiva.metrics.generation.N_TREES", 5)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a script in a folder of its own; keywords are its options."""

    def run(script, *flags, **options):
        words = [part for name, given in options.items() for part in (f"--{name}", *np.atleast_1d(given))]
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *map(str, [*words, *flags])])
        return runpy.run_path(str(ROOT / script), run_name="__main__")

    return run


@pytest.fixture(scope="module")
def checkpoint(fresh_tiny_model, tokenizer, corpus_folder, tmp_path_factory):
    """A checkpoint with conditions, a law of cell sizes and a quality head."""
    folder = tmp_path_factory.mktemp("checkpoint") / "scdiva"
    conditions = {"cell_type": TYPES, "library_size": [400.0, 700.0]}
    model = fresh_tiny_model(conditions=conditions, quality_head=True)
    corpus = CellCorpus(corpus_folder, "train", ranking_settings=tokenizer.ranking_settings)
    model.generation_config = model.generation_config.updated(size_law=corpus.size_law(48))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "mine.h5ad"
    synthetic_cells(n_cells=50, n_genes=120, seed=6).write_h5ad(path)
    return path


# --- examples ---


def read_generated(path, task):
    made = anndata.read_h5ad(path)
    assert made.obs["is_generated"].all()
    assert made.uns["scdiva"]["task"] == task
    counts = made.layers["counts"]
    assert counts.data.min() >= 1
    expected = np.log1p(1e4 * counts.toarray() / made.obs["library_size"].to_numpy()[:, None])
    np.testing.assert_allclose(made.X.toarray(), expected, rtol=1e-5)
    return made


GENERATE = "examples/generate_cells.py"


def test_new_cells_of_random_weights(run, tmp_path, capsys):
    run(GENERATE, n_cells=12, steps=3, seed=2)
    out = capsys.readouterr().out
    assert "No --checkpoint: random weights. Their cells mean nothing." in out
    assert "other real cells" in out
    assert out.strip().splitlines()[-1].startswith("Wrote generated.h5ad: 12 cells, ")
    assert out.strip().endswith(" genes a cell, 3 network calls a cell.")
    made = read_generated(tmp_path / "generated.h5ad", "generate_cells")
    assert made.n_obs == 12
    settings = made.uns["scdiva"]["settings"]
    assert (settings["steps"], settings["seed"], settings["order"]) == (3, 2, "random")


def test_new_cells_of_a_condition(run, checkpoint, tmp_path, capsys):
    run(
        GENERATE, checkpoint=checkpoint, conditions="cell_type=type_2", guidance_scale=1.5, n_cells=8,
        steps=3, order="margin", temperature=0.9, output="folder/made.h5ad",
    )  # fmt: skip
    made = read_generated(tmp_path / "folder" / "made.h5ad", "generate_cells")
    assert made.obs["cell_type"].tolist() == ["type_2"] * 8
    assert made.uns["scdiva"]["checkpoint"] == "scdiva"
    settings = made.uns["scdiva"]["settings"]
    assert (settings["guidance_scale"], settings["temperature"]) == (1.5, 0.9)
    assert len(set(made.obs["library_size"])) > 4  # drawn
    assert "other real cells" not in capsys.readouterr().out  # nothing to compare with


def test_new_cells_like_those_of_a_file(run, checkpoint, data, tmp_path, capsys):
    run(GENERATE, checkpoint=checkpoint, data=data, n_cells=12, steps=2, remask="quality")
    sizes = set(np.asarray(anndata.read_h5ad(data).X.sum(axis=1)).ravel())
    made = read_generated(tmp_path / "generated.h5ad", "generate_cells")
    assert set(made.obs["library_size"]) <= sizes
    assert "other real cells" in capsys.readouterr().out
    run(GENERATE, checkpoint=checkpoint, data=data, n_cells=12, steps=2, n_genes=7, library_size=333)
    made = read_generated(tmp_path / "generated.h5ad", "generate_cells")
    assert (made.X.getnnz(axis=1) == 7).all()
    assert (made.obs["library_size"] == 333).all()


def test_cells_drawn_towards_markers(run, checkpoint, tmp_path):
    means = {}
    for weight in (0.0, 20.0):
        run(
            GENERATE, checkpoint=checkpoint, n_cells=6, steps=4, markers=["GENE3", "GENE4", "GENE5"],
            marker_weight=weight, n_particles=8,
        )  # fmt: skip
        made = read_generated(tmp_path / "generated.h5ad", "generate_cells")
        assert set(made.obs["n_network_calls"]) <= {8, 16, 24, 32}  # of all particles of a cell
        places = made.var["gene_symbols"].isin(["GENE3", "GENE4", "GENE5"]).to_numpy()
        means[weight] = made.X[:, places].mean()
        said = made.uns["scdiva"]["steering"]
        assert said["reward"] == f"marker_reward(GENE3, GENE4, GENE5; weight={weight:g})"
        assert (said["kind"], said["n_particles"], said["resample"]) == ("reward", 8, "steps")
    assert means[20.0] > means[0.0] + 0.5


def test_real_cells_are_edited(run, checkpoint, data, tmp_path):
    run(
        GENERATE, mode="denoise", checkpoint=checkpoint, data=data, strength=0.3, steps=2,
        conditions="cell_type=type_1",
    )  # fmt: skip
    made = read_generated(tmp_path / "generated.h5ad", "denoise_cells")
    cells = anndata.read_h5ad(data)
    assert made.obs_names.equals(cells.obs_names)
    assert set(made.obs["cell_type"]) == {"type_1"}
    assert made.uns["scdiva"]["strength"] == 0.3
    lengths = made.X.getnnz(axis=1)
    np.testing.assert_allclose(made.layers["is_generated"].sum(axis=1).A1, np.rint(0.3 * lengths))
    run(GENERATE, mode="denoise", checkpoint=checkpoint, strength=0.2, steps=2)  # made-up cells
    assert read_generated(tmp_path / "generated.h5ad", "denoise_cells").n_obs == 60


def test_real_cells_are_completed(run, checkpoint, data, tmp_path):
    run(GENERATE, mode="complete", checkpoint=checkpoint, data=data, n_genes=55, steps=2)
    made = read_generated(tmp_path / "generated.h5ad", "complete_cells")
    assert (made.X.getnnz(axis=1) == 55).all()
    run(GENERATE, mode="complete", checkpoint=checkpoint, data=data, steps=2)  # by the law of sizes
    drawn = read_generated(tmp_path / "generated.h5ad", "complete_cells").X.getnnz(axis=1)
    assert (drawn <= 48).all()
    run(GENERATE, mode="complete", n_genes=64, steps=2)  # random weights
    assert (read_generated(tmp_path / "generated.h5ad", "complete_cells").X.getnnz(axis=1) == 64).all()
    run(GENERATE, mode="complete", steps=2)
    assert read_generated(tmp_path / "generated.h5ad", "complete_cells").n_obs == 60


def test_what_the_network_does_not_know_is_said(run, checkpoint):
    with pytest.raises(ValueError, match=r"knows no cell_type 'B cells'. Known: 'type_0'"):
        run(GENERATE, checkpoint=checkpoint, conditions="cell_type=B cells", n_cells=2)
    with pytest.raises(KeyError, match=r"1 of 1 markers are not among the 120 genes"):
        run(GENERATE, checkpoint=checkpoint, markers="CD3E", n_cells=2)


def test_scores_of_made_up_cells(run, tmp_path, capsys):
    run("examples/score_cells.py", n_draws=2, max_test_cells=6)
    out = capsys.readouterr().out
    assert "No --checkpoint: random weights" in out
    assert "made-up cells: doublets" in out
    assert out.strip().splitlines()[-1].endswith("of the cells cut at 256 genes.")
    (path,) = (tmp_path / "results").glob("*_scoring_made-up_cells.h5ad")
    scored = anndata.read_h5ad(path).obs
    assert len(scored) == 120
    np.testing.assert_allclose(scored["scdiva_nll"], scored["scdiva_gene_nll"] + scored["scdiva_value_nll"])
    (result,) = (tmp_path / "results").glob("*_scoring.json")
    assert "| made-up cells: thinned | **scDiVa, nats per token** |" in result_section(result)
    with pytest.raises(FileExistsError, match="never overwritten"):
        run("examples/score_cells.py", n_draws=2)


def test_scores_of_ones_own_cells_and_their_labels(run, checkpoint, data, tmp_path):
    cells = anndata.read_h5ad(data)
    cells.obs["cell_type"] = ["type_0", "type_9"] * 25
    cells.write_h5ad(tmp_path / "own.h5ad")
    run(
        "examples/score_cells.py", checkpoint=checkpoint, data="own.h5ad", label_key="cell_type", n_draws=2,
        max_test_cells=5, output="here/run.json",
    )  # fmt: skip
    scored = anndata.read_h5ad(tmp_path / "here" / "run_own.h5ad").obs
    assert scored["scdiva_label_log_prob"].isna().tolist() == [False, True] * 25
    assert (scored["scdiva_label_log_prob"].dropna() < 0).all()
    assert scored["scdiva_is_truncated"].dtype == bool
    assert json.loads((tmp_path / "here" / "run.json").read_text("utf-8"))["title"] == "Scoring cells"


# --- benchmarks ---


@pytest.fixture
def benchmark_result(run, checkpoint, corpus_folder, tmp_path, capsys):
    def benchmark(script, *flags, **options):
        output = tmp_path / f"result_{len(list(tmp_path.glob('result_*.json')))}.json"
        common = {"checkpoint": checkpoint, "corpus": corpus_folder, "batch_size": 16}
        run(f"benchmarks/{script}", *flags, output=output, **common | options)
        assert capsys.readouterr().out.strip().splitlines()[-1] == f"Wrote {output}."
        result = json.loads(output.read_text("utf-8"))
        assert result.keys() >= {"command", "commit", "versions", "hardware", "numbers", "baselines"}
        assert "scDiVa" in result_section(output) or options["task"] in ("exact", "objectives", "correctors")
        return result

    return benchmark


def methods(rows):
    return [row["method"] for row in rows]


def test_generation_over_calls(benchmark_result):
    result = benchmark_result("run_generation.py", task="calls", calls=[1, 3], n_cells=12, steps=2)
    assert methods(result["numbers"]) == [
        "scDiVa, 1 calls", "scDiVa, 3 calls", "scDiVa, a call per gene",
        "scDiVa, 2 calls, types and depths of training cells",
    ]  # fmt: skip
    calls = [row["n_network_calls"] for row in result["numbers"]]
    assert calls[0] == 1.0 < calls[1] <= 3.0  # fewer only for cells of one or two genes
    assert 20 < calls[2] <= 48
    assert methods(result["baselines"]) == [
        "other real cells", "gene marginals", "gene marginals per type",
    ]  # fmt: skip
    assert result["details"]["n_held_out"] == result["details"]["n_reference"] == 41
    assert set(result["details"]["seconds"]) == set(methods(result["numbers"]))
    short = benchmark_result("run_generation.py", "--skip_full", task="calls", calls=2, n_cells=12)
    assert methods(short["numbers"])[0] == "scDiVa, 2 calls"
    assert len(short["numbers"]) == 2


def test_generation_with_correctors(benchmark_result):
    result = benchmark_result("run_generation.py", "--bf16", task="correctors", steps=6, n_cells=10)
    rows = {row["method"]: row for row in result["numbers"]}
    assert len(rows) == 16
    assert {"rank order", "re-masking 0.1", "quality re-masking 0.1", "entropy bound 20"} <= set(rows)
    assert 5.0 < rows["random order"]["n_network_calls"] <= 6.0
    assert rows["entropy bound 20"]["n_network_calls"] > 6.0
    distances = {row["energy_distance"] for row in rows.values()}
    assert len(distances) == 16  # every setting reaches the sampler


def test_some_correctors_by_name(benchmark_result):
    options = {"task": "correctors", "steps": 2, "n_cells": 8}
    result = benchmark_result("run_generation.py", **options, only=["top-p 0.9", "random order"])
    assert methods(result["numbers"]) == ["top-p 0.9", "random order"]
    with pytest.raises(
        SystemExit, match=r"No settings of these names: \['top-p 2'\]. Known: \['random order'"
    ):
        benchmark_result("run_generation.py", **options, only="top-p 2")


def test_a_quality_head_is_trained_where_there_is_none(
    benchmark_result, fresh_tiny_model, checkpoint, tmp_path
):
    folder = tmp_path / "without"
    shutil.copytree(checkpoint, folder)
    conditions = {"cell_type": TYPES, "library_size": [400.0, 700.0]}
    fresh_tiny_model(objective="elbo", conditions=conditions).save_pretrained(folder)
    options = {"task": "correctors", "checkpoint": folder, "steps": 2, "n_cells": 6, "batch_size": 8}
    assert len(benchmark_result("run_generation.py", **options)["numbers"]) == 14
    judged = benchmark_result(
        "run_generation.py", "--bf16", **options, quality_steps=30
    )  # longer than one epoch
    assert methods(judged["numbers"])[-2:] == ["quality re-masking 0.02", "quality re-masking 0.1"]


def test_generation_of_types(benchmark_result):
    options = {"task": "guidance", "steps": 2, "n_cells": 80}
    first, second = (benchmark_result("run_generation.py", seed=seed, **options) for seed in (0, 1))
    assert methods(first["numbers"]) == [f"scDiVa, guidance {scale:g}" for scale in (1, 1.5, 2, 3)]
    assert methods(first["baselines"]) == ["real held-out cells", "gene marginals of the type"]
    assert first["details"]["types"] == TYPES
    assert first["baselines"] == second["baselines"]  # all cells of the corpus
    assert first["numbers"] != second["numbers"]


def test_generation_of_what_is_missing(benchmark_result):
    result = benchmark_result("run_generation.py", task="completion", steps=2, n_cells=6)
    assert len(result["numbers"]) == len(result["baselines"]) == 6
    assert {row["n_cells"] for row in result["numbers"]} == {6}
    assert result["details"]["n_reference"] == 199


def test_cost_of_a_generated_cell(benchmark_result):
    result = benchmark_result("run_generation.py", task="cost", steps=4)
    (row,) = result["numbers"]
    assert row["cost_low"] <= row["cost"] <= row["cost_high"]
    assert row["n_cells"] == 16
    assert 4 < row["formula"] < 8  # calls, and the gene head once for each slot
    assert len(result["details"]["embedding_seconds"]) == len(result["details"]["generation_seconds"]) == 5


def test_a_checkpoint_without_a_law_takes_that_of_the_corpus(benchmark_result, checkpoint, tmp_path):
    model = ScDivaForMaskedDiffusion.from_pretrained(checkpoint)
    model.generation_config = model.generation_config.updated(size_law=None)
    model.save_pretrained(tmp_path / "lawless")
    (tmp_path / "lawless" / "gene_vocabulary.json").write_bytes(
        (checkpoint / "gene_vocabulary.json").read_bytes()
    )
    name = "tokenizer_config.json"
    (tmp_path / "lawless" / name).write_bytes((checkpoint / name).read_bytes())
    options = {"task": "files", "n_draws": 2, "n_cells": 4}
    with_law = benchmark_result("run_likelihood.py", **options)
    without = benchmark_result("run_likelihood.py", **options | {"checkpoint": tmp_path / "lawless"})
    assert with_law["numbers"] == without["numbers"]


def test_likelihoods_of_files(benchmark_result):
    result = benchmark_result("run_likelihood.py", task="files", n_draws=2, n_cells=5)
    assert [row["data"] for row in result["numbers"]] == ["first", "second"]
    assert [row["n_cells"] for row in result["numbers"]] == [5, 5]
    assert set(methods(result["baselines"])) == {"uniform, genes only"}


def test_likelihoods_of_spoilt_cells(benchmark_result, data, tmp_path):
    mouse = anndata.read_h5ad(data)
    names = [name.capitalize() for name in mouse.var["gene_symbols"]]
    names[1] = names[0].lower()  # two symbols that are one in capitals
    mouse.var_names = names
    mouse.write_h5ad(tmp_path / "mouse.h5ad")
    result = benchmark_result(
        "run_likelihood.py", task="spoilt", data=data, mouse=tmp_path / "mouse.h5ad", n_draws=2, n_cells=8
    )
    kinds = {row["data"] for row in result["numbers"]}
    assert kinds == {f"mine: {kind}" for kind in (
        "genes shuffled", "doublets", "ambient molecules", "thinned", "mouse cells"
    )}  # fmt: skip
    assert result["details"]["nll_per_cell"]["mouse cells"]["n_cells"] == 8


def test_only_held_out_cells_of_a_file_of_the_corpus_are_spoilt(
    benchmark_result, cell_files, corpus_folder, tokenizer
):
    corpus = CellCorpus(corpus_folder, "validation", ranking_settings=tokenizer.ranking_settings)
    n_held_out = int((corpus.to_anndata(range(len(corpus)), tokenizer).obs["dataset"] == "first").sum())
    with pytest.raises(
        ValueError, match=f"40 cells at least, half of them to fit detectors, got {n_held_out}."
    ):
        benchmark_result("run_likelihood.py", task="spoilt", data=cell_files["first"], n_draws=2, n_cells=8)


def test_wrong_labels_of_a_file_of_the_corpus(benchmark_result):
    result = benchmark_result("run_likelihood.py", task="labels", dataset="first", n_draws=2, n_cells=15)
    assert methods(result["numbers"]) == ["scDiVa, log-probability of the label"]
    assert len(result["baselines"]) == 3
    (row,) = result["numbers"]
    assert (row["data"], row["n_normal"] + row["n_abnormal"]) == ("first", 15)


def test_mouse_genes_get_human_names(run):
    script = runpy.run_path(str(ROOT / "benchmarks" / "run_likelihood.py"))
    mouse = anndata.AnnData(np.arange(8, dtype=np.float32).reshape(2, 4))
    mouse.var_names = ["Cd3e", "Actb", "ACTB", "mt-Nd1"]
    mouse.var["gene_symbols"] = "wrong"
    human = script["human_names"](mouse)
    assert human.var_names.tolist() == ["CD3E", "ACTB", "MT-ND1"]
    assert human.X.tolist() == [[0, 1, 3], [4, 5, 7]]
    assert not len(human.var.columns)
    assert mouse.var_names[0] == "Cd3e"


def test_exact_likelihoods(benchmark_result):
    result = benchmark_result("run_likelihood.py", task="exact", n_draws=2, n_cells=3)
    assert len(result["numbers"]) == 8
    assert {row["n_cells"] for row in result["numbers"]} == {6}  # three of each file
    assert methods(result["baselines"]) == ["bound"]


def test_likelihoods_of_two_objectives(benchmark_result, checkpoint, fresh_tiny_model, tokenizer, tmp_path):
    conditions = {"cell_type": TYPES, "library_size": [400.0, 700.0]}
    fresh_tiny_model(objective="elbo", conditions=conditions).save_pretrained(tmp_path / "elbo")
    tokenizer.save_pretrained(tmp_path / "elbo")
    result = benchmark_result(
        "run_likelihood.py",
        task="objectives",
        checkpoint=tmp_path / "elbo",
        other=checkpoint,
        n_draws=2,
        n_cells=6,
    )
    assert methods(result["numbers"]) == ["elbo"]
    assert methods(result["baselines"]) == ["paper"]
    assert result["numbers"][0]["n_cells"] == 12


@pytest.mark.slow
@pytest.mark.skipif(not has_scvi(), reason="scvi-tools is not installed: scdiva[eval-full]")
def test_likelihoods_beside_scvi(benchmark_result):
    result = benchmark_result("run_likelihood.py", task="scvi", n_draws=2)
    (row,), (scvi,) = result["numbers"], result["baselines"]
    assert row["n_cells"] == scvi["n_cells"] == 15
    assert scvi["nll_per_cell"] < row["nll_per_cell"]  # random weights
