"""The examples, run in this process on tiny settings, as their users run them.

Run: pytest tests/test_examples.py
"""

import ast
import json
import runpy
import sys
from pathlib import Path

import pytest
from transformers import AutoModel

from modeling_scdiva import ScDivaModel
from tokenization_scdiva import CorpusSettings, build_corpus, synthetic_cells

REPOSITORY = Path(__file__).resolve().parents[1]
EXAMPLES = REPOSITORY / "examples"


@pytest.fixture
def run_example(monkeypatch, tmp_path):
    def run(name, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return run


def test_pretrain_logs_saves_and_says_how_to_load(run_example, corpus_folder, tmp_path, capsys, monkeypatch):
    run_example(
        "pretrain.py", "--corpus", corpus_folder, "--config", EXAMPLES / "configs" / "tiny.json",
        "--n_steps", 4, "--batch_size", 8, "--gradient_accumulation_steps", 2, "--log_every", 1,
        "--save_every", 2, "--eval_every", 2, "--report_to", "tensorboard", "--depth_corruption", "thin",
    )  # fmt: skip
    first, *_, last = capsys.readouterr().out.strip().splitlines()
    assert first.startswith("Pretraining scDiVa (0.4 M parameters")
    assert "4 steps of 8 cells on 1 x cpu (no precision)." in first
    assert last.startswith("Saved scdiva, held-out gene loss ")
    assert 'AutoModel.from_pretrained("scdiva")' in last
    lines = [
        json.loads(line) for line in (tmp_path / "scdiva" / "training_log.jsonl").read_text().splitlines()
    ]
    needed = {"train_loss", "train_gene_loss", "train_expression_loss", "learning_rate", "cells_per_s",
              "tokens_per_s", "mfu", "data_wait_fraction", "n_cells_seen"}  # fmt: skip
    assert needed <= set(lines[1])
    assert [line["step"] for line in lines if "eval_gene_loss" in line] == [0, 2, 4]
    assert list((tmp_path / "scdiva" / "logs").rglob("events.out.tfevents*"))
    assert isinstance(AutoModel.from_pretrained("scdiva"), ScDivaModel)  # from the folder that holds it


def test_pretrain_refuses_a_batch_that_does_not_divide(run_example, corpus_folder):
    with pytest.raises(SystemExit, match="--batch_size 9 is no multiple of 2 micro-batches"):
        run_example(
            "pretrain.py", "--corpus", corpus_folder, "--config", EXAMPLES / "configs" / "tiny.json",
            "--batch_size", 9, "--gradient_accumulation_steps", 2,
        )  # fmt: skip


def test_quickstart_on_ones_own_counts(run_example, tmp_path, capsys):
    synthetic_cells(n_cells=120, n_genes=80, seed=5).write_h5ad(tmp_path / "mine.h5ad")
    run_example("quickstart.py", "--input", "mine.h5ad", "--n_steps", 20)
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith(("scDiVa, ", "random weights", "PCA"))]
    assert len(rows) == 3
    assert all(0.0 <= float(number) <= 1.0 for row in rows for number in row.split()[-4:])
    assert out.strip().splitlines()[-1].startswith("Done in ")
    for picture in ("umap.png", "loss.png"):
        assert (tmp_path / "demo" / picture).stat().st_size > 5_000
    # A second run replaces what the first one made, and nothing else.
    (tmp_path / "scdiva" / "quickstart.json").unlink()
    with pytest.raises(SystemExit, match="scdiva exists and is not from this script"):
        run_example("quickstart.py", "--input", "mine.h5ad")


def test_quickstart_refuses_log_values_without_the_flag(run_example, tmp_path):
    cells = synthetic_cells(n_cells=60, n_genes=80)
    cells.X = cells.X.log1p()
    cells.write_h5ad(tmp_path / "log.h5ad")
    with pytest.raises(ValueError, match="expression_is_log1p"):
        run_example("quickstart.py", "--input", "log.h5ad")


def test_quickstart_never_deletes_its_input(run_example, tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "quickstart.json").write_text("{}")
    path = tmp_path / "demo" / "mine.h5ad"
    synthetic_cells(n_cells=60, n_genes=80).write_h5ad(path)
    with pytest.raises(SystemExit, match="lies in a folder that this script replaces"):
        run_example("quickstart.py", "--input", "demo/mine.h5ad")
    assert path.exists()
    with pytest.raises(SystemExit, match=r"No obs column 'nope'; there are .*cell_type"):
        run_example(
            "quickstart.py", "--input", "demo/mine.h5ad", "--work_dir", "other", "--label_key", "nope"
        )
    assert path.exists()


def test_pretrain_says_that_a_folder_is_no_corpus(run_example):
    with pytest.raises(FileNotFoundError, match="nothere is no corpus, or its building was interrupted"):
        run_example("pretrain.py", "--corpus", "nothere", "--config", EXAMPLES / "configs" / "tiny.json")


def test_pretrain_does_without_held_out_cells(run_example, cell_files, tokenizer, tmp_path, capsys):
    settings = CorpusSettings(validation_fraction=0.0)
    build_corpus(cell_files, tmp_path / "all", tokenizer=tokenizer, settings=settings, show_progress=False)
    tokenizer.save_pretrained(tmp_path / "all" / "tokenizer")
    run_example(
        "pretrain.py", "--corpus", "all", "--config", EXAMPLES / "configs" / "tiny.json", "--n_steps", 2,
        "--batch_size", 8, "--masking_target", "gene",
    )  # fmt: skip
    assert "Saved scdiva, held-out loss unknown." in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short_public_and_listed(path):
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= 180
    assert f"`{path.name}`" in (EXAMPLES / "README.md").read_text("utf-8")
    names = [
        alias.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom)
        and node.module.startswith(("modeling_scdiva", "tokenization_scdiva"))
        for alias in node.names
    ]
    assert names
    assert not [name for name in names if name.startswith("_")]


SOURCES = [
    path for folder in ("modeling_scdiva", "tokenization_scdiva", "data", "examples", "benchmarks", "tests")
    for path in sorted((REPOSITORY / folder).rglob("*.py"))
]  # fmt: skip


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_files_and_functions_stay_short(path):
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= 500
    if path.is_relative_to(REPOSITORY / "tests"):
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False) or ""
            n_lines = node.end_lineno - node.lineno + 1 - docstring.count("\n")
            assert n_lines <= 60, f"{node.name} has {n_lines} lines beside its docstring"
