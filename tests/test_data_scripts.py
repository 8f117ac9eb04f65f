"""The two data scripts, run as a user runs them, and what they print and leave behind.

Needs no data. Run: pytest tests/test_data_scripts.py
"""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tokenization_scdiva import CellBatchSampler, CellCorpus, ScDivaDataCollator

DATA = Path(__file__).resolve().parents[1] / "data"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a script in this process and return what it printed."""

    def run_script(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(DATA / name), run_name="__main__")
        return capsys.readouterr().out

    return run_script


def test_from_files_to_masked_batches(run, cell_files, tmp_path):
    cells = next(iter(cell_files.values())).parent
    out = run(
        "build_vocabulary.py", cells, "--output", tmp_path / "tokenizer", "--n_genes", 70, "--max_genes", 33,
        "--entropy_epsilon", 0.5, "--min_gene_overlap", 0.2,
    )  # fmt: skip
    assert "Building a gene vocabulary from 2 files." in out
    assert "second: 90 cells from X; genes 60: 60 by id" in out
    assert "70 genes, with entropies" in out.splitlines()[-1]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert (tokenizer.max_genes, tokenizer.entropy_epsilon, len(tokenizer)) == (33, 0.5, 75)
    reports = json.loads((tmp_path / "tokenizer" / "vocabulary_report.json").read_text())
    assert [report["n_cells"] for report in reports] == [150, 90]

    corpus = tmp_path / "corpus"
    arguments = [
        cells / "*.h5ad", "--tokenizer", tmp_path / "tokenizer", "--output", corpus, "--num-shards", 2,
        "--validation_fraction", 0.25, "--obs_keys", "cell_type", "donor_id",
    ]  # fmt: skip
    assert "Built shards [1] of 2" in run("build_corpus.py", *arguments, "--shard", 1)
    assert "not whole yet" in run("build_corpus.py", *arguments, "--shard", 1)
    out = run("build_corpus.py", *arguments)
    assert re.search(
        r"second \(X\): cells kept 90, dropped none; genes matched \d+ of 60 with \d+\.\d% of", out
    )
    summary = (
        r"2 files, 240 of 240 cells kept \(train (\d+), validation (\d+)\), 4 Arrow files, "
        r"[\d,]+ bytes per cell, [\d,]+ cells/s"
    )
    sizes = re.search(summary, out).groups()

    saved = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    assert saved.ranking_settings == tokenizer.ranking_settings
    for split, size in zip(("train", "validation"), sizes, strict=True):
        rows = CellCorpus(corpus, split, ranking_settings=saved.ranking_settings)
        assert len(rows) == int(size)
        sampler = CellBatchSampler(rows.n_genes, batch_size=8, max_genes=33, shuffle=False)
        inputs = ScDivaDataCollator.from_tokenizer(saved)(rows.__getitems__(next(iter(sampler))))
        assert inputs["input_ids"].shape[0] == 8
        assert inputs["labels"].max() < len(tokenizer)
        assert set(rows.describe(0)) == {"dataset", "cell_index", "library_size", "cell_type", "donor_id"}


def test_wrong_inputs_are_named(run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No cells at .*nowhere"):
        run("build_vocabulary.py", tmp_path / "nowhere", "--output", tmp_path / "tokenizer")
    assert not (tmp_path / "tokenizer").exists()
