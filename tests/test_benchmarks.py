"""The benchmark scripts, run in-process on made-up cells: they finish, and their files hold what they must.

Needs: the examples extra (matplotlib); no real data, no GPU.
Run: python -m pytest tests/test_benchmarks.py
"""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modeling_scdiva import ScDivaForMaskedDiffusion
from modeling_scdiva.model_card import result_section
from tokenization_scdiva import ScDivaTokenizer, synthetic_cells

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
STATED = {"command", "commit", "date", "versions", "hardware", "seed", "config", "benchmark"}

pytest.importorskip("matplotlib")


@pytest.fixture
def model_folder(
    fresh_tiny_model: Callable[..., ScDivaForMaskedDiffusion], tokenizer: ScDivaTokenizer, tmp_path: Path
) -> Path:
    fresh_tiny_model().save_pretrained(tmp_path / "scdiva")
    tokenizer.save_pretrained(tmp_path / "scdiva")
    log = [{"step": 1, "train_gene_loss": 5.0, "train_expression_loss": 1.0, "epoch": 0, "n_cells_seen": 8}]
    log.append({"step": 1, "eval_gene_loss": 4.9, "eval_expression_loss": 0.9})
    (tmp_path / "scdiva" / "training_log.jsonl").write_text("\n".join(map(json.dumps, log)))
    return tmp_path / "scdiva"


def run(script: str, monkeypatch: pytest.MonkeyPatch, output: Path, **arguments: Any) -> dict[str, Any]:
    words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", [script, *words, "--output", str(output)])
    runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
    return json.loads(output.read_text("utf-8"))


def test_denoising(
    model_folder: Path,
    corpus_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "results" / "denoising.json"
    arguments = {"model": model_folder, "corpus": corpus_folder, "batch_size": 8, "device": "cpu"}
    result = run("run_denoising.py", monkeypatch, output, **arguments)
    assert result.keys() >= STATED
    assert result["training"] == {"step": 1, "epoch": 0, "n_cells_seen": 8}
    n_cells = result["corpus"]["n_cells"]["validation"]
    losses = result["gene_loss"]
    assert {entry["n_cells"] for entry in losses.values()} == {n_cells}
    # Made-up cells have favourite genes and ranks; a network that was never trained knows neither.
    assert losses["rank_unigram"]["mean"] < losses["unigram"]["mean"] < losses["uniform"]["mean"]
    gain = result["gene_gain_of_model_over"]["rank_unigram"]
    assert gain["mean"] == pytest.approx(losses["rank_unigram"]["mean"] - losses["model"]["mean"])
    # Excluding visible genes is all that an untrained network of this kind knows.
    assert result["gene_gain_of_model_over"]["rank_unigram_excluding_visible"]["mean"] < 0
    assert len(gain["by_time_bin"]) == 10
    assert str(tmp_path) not in output.read_text("utf-8")
    for picture in ("denoising_time_bins.png", "denoising_training.png"):
        assert (output.parent / picture).read_bytes().startswith(b"\x89PNG")
    told = capsys.readouterr().out
    assert "model better than rank_unigram by " in told
    assert "model better than lattice_counts by " in told.splitlines()[-1]
    again = run("run_denoising.py", monkeypatch, tmp_path / "again.json", **arguments, n_mask_draws=2)
    assert again["gene_loss"]["model"]["n_cells"] == 2 * n_cells


def test_denoising_of_a_network_trained_on_the_bound(
    fresh_tiny_model: Callable[..., ScDivaForMaskedDiffusion],
    model_folder: Path,
    corpus_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"objective": "elbo", "exclude_unfit_genes": True, "value_head": "gene"}
    conditions = {"cell_type": ["type_0", "type_1"], "library_size": [400.0]}
    fresh_tiny_model(**settings, conditions=conditions).save_pretrained(model_folder)
    arguments = {"model": model_folder, "corpus": corpus_folder, "batch_size": 8, "device": "cpu"}
    result = run("run_denoising.py", monkeypatch, tmp_path / "elbo.json", **arguments)
    # Without training, it knows which genes fit between visible neighbours, and no more.
    losses = {name: entry["mean"] for name, entry in result["gene_loss"].items()}
    assert 1.0 < losses["model"] < losses["uniform_excluding_visible"] - 0.5
    # Squared errors, not nats of counts: those of an untrained network are about the squares of the values.
    assert 0.1 < result["expression_loss"]["model"]["mean"] < 30


@pytest.fixture
def labelled_folder(tmp_path: Path) -> Path:
    """Three files under the names the script knows, none of them in the corpus."""
    folder = tmp_path / "labelled"
    folder.mkdir()
    for seed, name in enumerate(("pbmc_facs_zheng2017", "kang2018_ifnb_pbmc", "crohn_gut_scp1884")):
        adata = synthetic_cells(n_cells=150, n_genes=120, seed=seed)
        adata.obs["cell_type_coarse"] = np.where(np.arange(150) < 20, "unspecified", adata.obs["cell_type"])
        adata.obs["cell_type_source"] = np.where(np.arange(150) < 30, "transferred", "curated")
        adata.write_h5ad(folder / f"{name}.h5ad")
    return folder


def test_embedding_probes(
    model_folder: Path,
    corpus_folder: Path,
    labelled_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "probes.json"
    arguments = {"model": model_folder, "data": labelled_folder, "corpus": corpus_folder, "device": "cpu"}
    result = run("run_embedding_probes.py", monkeypatch, output, **arguments)
    assert result.keys() >= STATED
    n_scored = {name: entry["in_pretraining"]["of_cells"] for name, entry in result["results"].items()}
    assert n_scored == {"pbmc_facs_zheng2017": 150, "kang2018_ifnb_pbmc": 120, "crohn_gut_scp1884": 130}
    for entry in result["results"].values():
        assert set(entry["all_cells"]) == {"scdiva_lat", "random_weights_lat", "pca_50", "depth"}
        # The corpus of the fixtures has other files, so every cell counts as held out.
        assert entry["in_pretraining"]["train"] == 0
        assert entry["held_out_cells"] == entry["all_cells"]
        assert entry["all_cells"]["pca_50"]["logistic_accuracy"] > 0.9


def test_held_out_rows_are_those_of_the_corpus(corpus_folder: Path, tokenizer: ScDivaTokenizer) -> None:
    script = runpy.run_path(str(BENCHMARKS / "run_embedding_probes.py"))
    rows = {
        split: script["pretraining_rows"](
            script["CellCorpus"](corpus_folder, split, ranking_settings=tokenizer.ranking_settings)
        )
        for split in ("train", "validation")
    }
    for name, n_cells in (("first", 150), ("second", 90)):
        assert rows["train"][name].isdisjoint(rows["validation"][name])
        assert rows["train"][name] | rows["validation"][name] == set(range(n_cells))


def test_corpus(
    cell_files: dict[str, Path], corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["run_corpus.py", *map(str, cell_files.values()), "--tokenizer",
                      str(corpus_folder / "tokenizer"), "--output", str(tmp_path / "corpus.json")],
    )  # fmt: skip
    runpy.run_path(str(BENCHMARKS / "run_corpus.py"), run_name="__main__")
    result = json.loads((tmp_path / "corpus.json").read_text("utf-8"))
    assert result["rebuilding_gives_identical_bytes"]
    assert result["shards_built_apart_equal_the_whole"]
    assert result["n_cells_read"] == result["n_cells_kept"] == 240
    assert [dataset["name"] for dataset in result["datasets"]] == ["first", "second"]


def test_results_become_tables(
    model_folder: Path,
    corpus_folder: Path,
    labelled_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    denoising, probes = tmp_path / "denoising.json", tmp_path / "probes.json"
    common = {"model": model_folder, "corpus": corpus_folder, "device": "cpu"}
    result = run("run_denoising.py", monkeypatch, denoising, batch_size=8, **common)
    table = result_section(denoising)
    assert f"| **scDiVa** | {result['gene_loss']['model']['mean']:.3f} |" in table
    assert f"| rank_unigram | {result['gene_loss']['rank_unigram']['mean']:.3f} | - |" in table
    run("run_embedding_probes.py", monkeypatch, probes, data=labelled_folder, **common)
    table = result_section(probes)
    rows = [
        line for line in table.splitlines() if line.startswith("| pbmc_facs_zheng2017, all cells (150) |")
    ]
    assert [row.split("|")[2].strip() for row in rows] == [
        "**scdiva_lat**", "random_weights_lat", "pca_50", "depth",
    ]  # fmt: skip


def test_ablations_go_on_where_they_stopped(
    cell_files: dict[str, Path],
    corpus_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    network = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    network |= {"exclude_visible_genes": True, "value_head": "gene", "normalize_embeddings": True}
    (tmp_path / "network.json").write_text(json.dumps(network))
    words = ["--data", *map(str, cell_files.values()), "--tokenizer", str(corpus_folder / "tokenizer")]
    words += ["--config", str(tmp_path / "network.json"), "--run", str(tmp_path / "run"), "--n_steps", "2"]
    words += [
        "--batch_size",
        "8",
        "--n_cells",
        "6",
        "--n_probe_cells",
        "80",
        "--output",
        str(tmp_path / "out"),
    ]

    def call(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["run_ablations.py", *words, *more])
        runpy.run_path(str(BENCHMARKS / "run_ablations.py"), run_name="__main__")
        return capsys.readouterr().out

    assert "Not all variants: no result file." in call("--variants", "embeddings normalised", "no anchor")
    first = (tmp_path / "run" / "no_anchor" / "scores.json").stat().st_mtime_ns
    assert "wrote " in call()
    assert (tmp_path / "run" / "no_anchor" / "scores.json").stat().st_mtime_ns == first  # not run again
    (path,) = (tmp_path / "out").glob("*_ablations.json")
    rows = {row["method"]: row for row in json.loads(path.read_text("utf-8"))["numbers"]}
    assert len(rows) == 12
    pictures = {picture.name for picture in path.parent.glob("*.png")}
    assert pictures == {f"{path.stem}_depths.png", f"{path.stem}_mask_ratios.png"}
    assert rows["no rotary positions"]["published"] == "F1 0.83, with them 0.84"
    assert "lat_f1_at_depth_1" not in rows["no anchor"]
    losses = {name: row["gene_loss"] for name, row in rows.items()}
    assert len(set(losses.values())) == 12  # every switch changes something
    for name in ("base", "embeddings_normalised"):
        settings = json.loads((tmp_path / "run" / name / "network.json").read_text("utf-8"))
        assert settings["normalize_embeddings"] == (name != "base")
