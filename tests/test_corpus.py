"""A corpus holds what the tokenizer gives, is the same bytes however built, and tells when it is not whole.

Needs no data. Run: pytest tests/test_corpus.py (the memory test: add -m slow)
"""

import gzip
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp

from tokenization_scdiva import (
    CellCorpus,
    CorpusSettings,
    GeneVocabulary,
    ScDivaTokenizer,
    build_corpus,
    corpus_builder,
    synthetic_cells,
)
from tokenization_scdiva import corpus as corpus_module
from tokenization_scdiva.ranking_scdiva import rank_cells


def build(files, folder, tokenizer, *, shards=None, **settings):
    settings = CorpusSettings(**settings)
    return build_corpus(
        files, folder, tokenizer=tokenizer, settings=settings, shards=shards, show_progress=False
    )


def open_corpus(folder, tokenizer, split="train"):
    return CellCorpus(folder, split, ranking_settings=tokenizer.ranking_settings)


def rows_of(folder, tokenizer, splits=("train", "validation")):
    """(data set, row in its file) -> (tokens, values) of every cell."""
    found = {}
    for split in splits:
        corpus = open_corpus(folder, tokenizer, split)
        batch = corpus.__getitems__(list(range(len(corpus))))
        for index in range(len(corpus)):
            entries = slice(*batch.cells.offsets[index : index + 2])
            described = corpus.describe(index)
            key = described["dataset"], described["cell_index"]
            assert key not in found
            found[key] = batch.cells.token_ids[entries].tolist(), batch.cells.values[entries].tolist()
    return found


def bytes_of(folder):
    paths = [*folder.glob("*"), *folder.glob("tokenizer/*")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.is_file()}


def write_cells(folder, name="cells", **changes):
    adata = synthetic_cells(n_cells=60, n_genes=90, seed=3)
    for column, entries in changes.items():
        adata.obs[column] = entries
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.h5ad"
    adata.write_h5ad(path)
    return {name: path}, adata


# --- what it holds ---


def test_corpus_holds_what_the_tokenizer_gives(corpus_folder, cell_files, tokenizer):
    found = rows_of(corpus_folder, tokenizer)
    n_cells = 0
    for name, path in cell_files.items():
        adata = ad.read_h5ad(path)
        for cells in tokenizer.iter_cells(adata, max_genes=10**6, block_size=50):
            for index in range(cells.n_cells):
                entries = slice(*cells.offsets[index : index + 2])
                wanted = cells.token_ids[entries].tolist(), cells.values[entries].tolist()
                assert found[name, n_cells + index] == wanted
            n_cells += cells.n_cells
        n_cells = 0
    assert len(found) == 240


def test_counts_depth_and_lengths(corpus_folder, cell_files, tokenizer):
    adatas = {name: ad.read_h5ad(path) for name, path in cell_files.items()}
    corpus = open_corpus(corpus_folder, tokenizer)
    for index in range(0, len(corpus), 7):
        described = corpus.describe(index)
        cell = adatas[described["dataset"]][described["cell_index"]]
        batch = corpus[index]
        assert batch.draws.tolist() == [[index, 0, 0, 1]]
        assert batch.cells.library_size.tolist() == [cell.X.sum()]
        assert described["cell_type"] == cell.obs["cell_type"].iloc[0]
        assert corpus.n_genes[index] == cell.X.nnz == batch.cells.counts.size
        counts = cell[
            :, [tokenizer.vocabulary.gene_ids[token] for token in batch.cells.token_ids]
        ].X.toarray()
        np.testing.assert_array_equal(batch.cells.counts, counts[0])


def test_cells_of_all_files_are_shuffled_across_shards(corpus_folder):
    manifest = json.loads((corpus_folder / "manifest.json").read_text())
    names = [dataset["name"] for dataset in manifest["datasets"]]
    assert names == ["first", "second"]
    for shard in manifest["splits"]["train"]["shards"]:
        table = corpus_module.Dataset.from_file(str(corpus_folder / shard["file"]))
        assert set(table["dataset_id"]) == {0, 1}
        cells = np.array(table["cell_index"])
        assert 0.35 < (np.diff(cells) > 0).mean() < 0.65  # neighbours in the file are none here
    assert manifest["splits"]["train"]["n_cells"] + manifest["splits"]["validation"]["n_cells"] == 240


def test_log1p_is_stored_as_float16(tokenizer, tmp_path):
    _, adata = write_cells(tmp_path)
    counts = adata.X.toarray().astype(np.float64)
    adata.X = sp.csr_matrix(np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True)).astype(np.float32))
    adata.write_h5ad(tmp_path / "cells.h5ad")
    files = {"cells": tmp_path / "cells.h5ad"}
    manifest = build(files, tmp_path / "corpus", tokenizer, expression_is_log1p=True)
    assert manifest["value_kind"] == "log1p"
    corpus = open_corpus(tmp_path / "corpus", tokenizer)
    assert corpus._rows.dataset.features["expression_values"].feature.dtype == "float16"
    cells = corpus.__getitems__(list(range(len(corpus)))).cells
    assert cells.counts is None
    assert cells.values.dtype == np.float32
    (whole,) = tokenizer.iter_cells(adata, expression_is_log1p=True, max_genes=10**6)
    for (_, row), (tokens, values) in rows_of(tmp_path / "corpus", tokenizer).items():
        entries = slice(*whole.offsets[row : row + 2])
        assert tokens == whole.token_ids[entries].tolist()
        np.testing.assert_allclose(values, whole.values[entries], rtol=2**-11)
    with pytest.raises(ValueError, match=r"cells\.h5ad: X does not hold raw counts"):
        build(files, tmp_path / "other", tokenizer)


def test_expression_order_needs_no_sort_when_read(cell_files, tokenizer, tmp_path):
    by_expression = ScDivaTokenizer(vocabulary=tokenizer.vocabulary, gene_order="expression")
    build(cell_files, tmp_path, by_expression)
    cells = open_corpus(tmp_path, by_expression).__getitems__(list(range(50))).cells
    ranked = rank_cells(
        cells, gene_order="expression", ranking_weights=by_expression.ranking_weights, max_genes=None
    )
    assert ranked.token_ids.tolist() == cells.token_ids.tolist()
    with pytest.raises(
        ValueError, match=r"another tokenizer \(gene_order: corpus expression, tokenizer entropy"
    ):
        open_corpus(tmp_path, tokenizer)


def test_dropped_cells_are_counted_with_their_reason(tokenizer, tmp_path):
    _, adata = write_cells(tmp_path)
    counts = adata.X.toarray()
    counts[5], counts[6] = 0, 0
    counts[6, :3] = 1
    adata.X = sp.csr_matrix(counts)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    files = {"cells": tmp_path / "cells.h5ad"}
    for min_genes, n_dropped in ((1, 1), (4, 2)):
        folder = tmp_path / f"corpus{min_genes}"
        (report,) = build(files, folder, tokenizer, min_genes=min_genes)["datasets"]
        assert report["n_cells_dropped"] == {f"fewer than {min_genes} vocabulary genes": n_dropped}
        assert (report["n_cells"], report["n_cells_kept"]) == (60, 60 - n_dropped)
        rows = {row for _, row in rows_of(folder, tokenizer)}
        assert rows == set(range(60)) - {5, 6}.intersection(range(5, 5 + n_dropped))


def test_obs_columns_are_kept_whatever_their_name(tokenizer, tmp_path):
    files, adata = write_cells(tmp_path, order=np.arange(60) * 2, shard=pd.Categorical(["a", None] * 30))
    files |= write_cells(tmp_path, "plain")[0]
    build(files, tmp_path / "corpus", tokenizer, obs_keys=("order", "shard", "donor_id"), n_shards=2)
    corpus = open_corpus(tmp_path / "corpus", tokenizer)
    for index in range(len(corpus)):
        row = corpus.describe(index)
        has_columns = row["dataset"] == "cells"
        assert row["order"] == (str(row["cell_index"] * 2) if has_columns else None)
        assert row["shard"] == ("a" if has_columns and row["cell_index"] % 2 == 0 else None)
        assert row["donor_id"] == adata.obs["donor_id"].iloc[row["cell_index"]]


def test_uint16_overflow_names_file_and_cell(tokenizer, tmp_path):
    files, adata = write_cells(tmp_path)
    counts = adata.X.toarray()
    counts[17, 4] = 70_000
    adata.X = sp.csr_matrix(counts)
    adata.write_h5ad(files["cells"])
    with pytest.raises(ValueError, match=r"cells\.h5ad: The cell 'cell_17' has 70,000 molecules .* 'uint32'"):
        build(files, tmp_path / "corpus", tokenizer)
    build(files, tmp_path / "wide", tokenizer, count_dtype="uint32", validation_fraction=0.0)
    corpus = open_corpus(tmp_path / "wide", tokenizer)
    cells = corpus.__getitems__(list(range(60))).cells
    assert cells.counts.max() == 70_000


# --- the same bytes however it is built ---


@pytest.fixture(scope="module")
def whole(cell_files, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    build(cell_files, folder, tokenizer, n_shards=3, validation_fraction=0.2)
    return bytes_of(folder)


def test_second_build_gives_the_same_bytes(cell_files, tokenizer, tmp_path, whole):
    build(cell_files, tmp_path, tokenizer, n_shards=3, validation_fraction=0.2)
    assert bytes_of(tmp_path) == whole
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.arrow")}
    build(cell_files, tmp_path, tokenizer, n_shards=3, validation_fraction=0.2)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.arrow")} == times
    assert bytes_of(tmp_path) == whole
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_shards_built_apart_equal_the_whole(cell_files, tokenizer, tmp_path, whole):
    for shards in ([2], [0], [2]):
        assert (
            build(cell_files, tmp_path, tokenizer, n_shards=3, validation_fraction=0.2, shards=shards) is None
        )
    with pytest.raises(
        FileNotFoundError, match=r"manifest\.json does not exist: .* its building was interrupted"
    ):
        open_corpus(tmp_path, tokenizer)
    manifest = build(cell_files, tmp_path, tokenizer, n_shards=3, validation_fraction=0.2, shards=[1])
    assert manifest == json.loads((tmp_path / "manifest.json").read_text())
    assert bytes_of(tmp_path) == whole


def test_the_tokenizer_is_part_of_the_corpus(cell_files, tokenizer, tmp_path, whole):
    names = {"tokenizer/gene_vocabulary.json", "tokenizer/tokenizer_config.json"}
    assert names <= set(whole)
    build(cell_files, tmp_path, tokenizer, n_shards=3, validation_fraction=0.2, shards=[1])
    assert {name for name in bytes_of(tmp_path) if name.startswith("tokenizer/")} >= names
    saved = ScDivaTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert saved.ranking_settings == tokenizer.ranking_settings
    shutil.rmtree(tmp_path / "tokenizer")  # a corpus that lost its tokenizer gets it back
    build(cell_files, tmp_path, tokenizer, n_shards=3, validation_fraction=0.2)
    assert bytes_of(tmp_path) == whole


def test_restart_after_a_file_that_fails_midway(cell_files, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_builder, "ROWS_PER_WRITE", 20)
    build(cell_files, tmp_path / "wanted", tokenizer, n_shards=2)
    files = {name: shutil.copy(path, tmp_path / path.name) for name, path in cell_files.items()}
    with h5py.File(files["second"], "r+") as handle:  # not a count, in the last block, at equal file size
        handle["X/data"][-1] = np.nan
    output = tmp_path / "corpus"
    with pytest.raises(
        ValueError, match=r"second\.h5ad: X does not hold raw counts: 1 values are not finite"
    ):
        build(files, output, tokenizer, n_shards=2)
    assert not list(output.glob("*.arrow"))
    (part,) = output.glob(".parts-*/first.arrow")
    assert [path.name for path in output.glob(".parts-*/*second*")] == []
    made = part.stat().st_mtime_ns, part.stat().st_ino
    shutil.copy(cell_files["second"], files["second"])
    seen = []
    monkeypatch.setattr(corpus_builder, "_write_shard", interrupt_at(1, seen, part))
    with pytest.raises(KeyboardInterrupt):
        build(files, output, tokenizer, n_shards=2)
    assert seen == [made, made]  # the finished part was not made again
    monkeypatch.undo()
    monkeypatch.setattr(corpus_builder, "ROWS_PER_WRITE", 20)
    build(files, output, tokenizer, n_shards=2)
    assert bytes_of(output) == bytes_of(tmp_path / "wanted")
    assert not list(output.glob(".*"))


def interrupt_at(number, seen, part):
    """A shard writer that is stopped by the user when it comes to one shard."""
    write = corpus_builder._write_shard

    def write_or_stop(output, shard, *args):
        seen.append((part.stat().st_mtime_ns, part.stat().st_ino))
        if shard == number:
            raise KeyboardInterrupt
        write(output, shard, *args)

    return write_or_stop


def test_full_disk_leaves_nothing_half(cell_files, tokenizer, tmp_path, whole):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            build(cell_files, tmp_path, tokenizer, n_shards=3, validation_fraction=0.2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.glob("**/*.partial"))
    assert not list(tmp_path.glob("*.arrow"))
    build(cell_files, tmp_path, tokenizer, n_shards=3, validation_fraction=0.2)
    assert bytes_of(tmp_path) == whole


def test_left_overs_of_killed_runs_are_removed(cell_files, tokenizer, tmp_path, whole):
    stale = [tmp_path / ".train-00001-of-00003.arrow.99.partial", tmp_path / ".parts-0123" / "first.arrow"]
    for path in stale:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    build(cell_files, tmp_path, tokenizer, n_shards=3, validation_fraction=0.2)
    assert bytes_of(tmp_path) == whole
    assert not list(tmp_path.glob(".*"))


def test_another_build_in_the_same_folder_is_refused(cell_files, tokenizer, tmp_path):
    build(cell_files, tmp_path, tokenizer, n_shards=2, shards=[0])
    with pytest.raises(
        ValueError, match="holds a corpus built from other files, another tokenizer or other settings"
    ):
        build(cell_files, tmp_path, tokenizer, n_shards=2, seed=1)
    with pytest.raises(ValueError, match=r"built from other files.*shard-00000-of-00002\.json says"):
        build(cell_files, tmp_path, tokenizer, n_shards=2, seed=1, shards=[1])
    with pytest.raises(ValueError, match="built from other files"):
        build({"first": cell_files["first"]}, tmp_path, tokenizer, n_shards=2, shards=[0])
    with pytest.raises(ValueError, match=r"holds shards of another number \(shard-00000-of-00002.json\)"):
        build(cell_files, tmp_path, tokenizer, n_shards=5)
    with pytest.raises(ValueError, match=r"Shards must lie in \[0, 2\), got \[2\]"):
        build(cell_files, tmp_path, tokenizer, n_shards=2, shards=[2])


# --- damage ---


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (Path.unlink, FileNotFoundError, "is missing"),
        (cut, ValueError, "bytes and should have"),
        (flip, ValueError, "SHA-256 mismatch"),
    ],
)
def test_damaged_shard_is_named_and_repaired(cell_files, tokenizer, tmp_path, whole, damage, error, message):
    (tmp_path / "tokenizer").mkdir()
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    damage(tmp_path / "train-00001-of-00003.arrow")
    wanted = rf"The shard .*train-00001-of-00003\.arrow.*{message}.*Run data/build_corpus\.py again"
    with pytest.raises(error, match=wanted):
        open_corpus(tmp_path, tokenizer)
    assert len(open_corpus(tmp_path, tokenizer, "validation"))
    build(cell_files, tmp_path, tokenizer, n_shards=3, validation_fraction=0.2)
    assert bytes_of(tmp_path) == whole


def test_large_corpora_are_compared_by_size_only(corpus_folder, tokenizer, tmp_path, monkeypatch):
    folder = shutil.copytree(corpus_folder, tmp_path / "corpus")
    corpus = open_corpus(folder, tokenizer)
    shard = folder / "train-00000-of-00002.arrow"
    counts = corpus._rows.column("counts").chunk(0).values.to_numpy().tobytes()
    content = shard.read_bytes()
    shard.write_bytes(content.replace(counts, counts[:-1] + bytes([counts[-1] ^ 1])))
    assert shard.read_bytes() != content
    with pytest.raises(ValueError, match="SHA-256"):
        open_corpus(folder, tokenizer)
    monkeypatch.setattr(corpus_module, "HASHED_BYTES", 1000)
    assert len(open_corpus(folder, tokenizer))
    flip(shard)  # in the bounds of the cells, which are looked at anyway
    with pytest.raises(ValueError, match="'gene_ids' and 'counts' differ in length"):
        open_corpus(folder, tokenizer)


def test_wrong_corpora_are_refused(corpus_folder, tokenizer, tmp_path):
    ids = tokenizer.vocabulary.gene_ids[5:]
    other = ScDivaTokenizer(vocabulary=GeneVocabulary(ids, gene_entropy=np.ones(len(ids))))
    with pytest.raises(ValueError, match=r"was built with another tokenizer .*vocabulary_hash"):
        open_corpus(corpus_folder, other)
    with pytest.raises(ValueError, match="split must be one of train, validation, got 'test'"):
        open_corpus(corpus_folder, tokenizer, "test")
    folder = shutil.copytree(corpus_folder, tmp_path / "corpus")
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text[:50])
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        open_corpus(folder, tokenizer)
    (folder / "manifest.json").write_text(text.replace('"format_version": 2', '"format_version": 99'))
    with pytest.raises(
        ValueError, match=r"is of format \('scdiva-corpus', 99\), wanted \('scdiva-corpus', 2\)"
    ):
        open_corpus(folder, tokenizer)


def test_empty_split_is_refused(cell_files, tokenizer, tmp_path):
    build(cell_files, tmp_path, tokenizer, validation_fraction=0.0)
    with pytest.raises(ValueError, match=r"The split 'validation' .* holds no cell"):
        open_corpus(tmp_path, tokenizer, "validation")
    assert len(open_corpus(tmp_path, tokenizer)) == 240


# --- other files ---


def test_foreign_files_are_refused_by_name(cell_files, tokenizer, tmp_path):
    adata = synthetic_cells(n_cells=20, n_genes=90)
    adata.var_names = [f"Gene{i}" for i in range(90)]
    del adata.var["gene_symbols"]
    adata.write_h5ad(tmp_path / "foreign.h5ad")
    files = cell_files | {"foreign": tmp_path / "foreign.h5ad"}
    with pytest.raises(ValueError, match=r"foreign\.h5ad: Only 0 of 90 genes are in the vocabulary"):
        build(files, tmp_path / "corpus", tokenizer)
    with pytest.raises(KeyError, match=r"first\.h5ad: There is no layer 'raw_counts'"):
        build(cell_files, tmp_path / "corpus", tokenizer, layer="raw_counts")
    (tmp_path / "foreign.h5ad").write_bytes(cell_files["first"].read_bytes()[:-1000])
    with pytest.raises(
        OSError, match=r"foreign\.h5ad .* cannot be read as cells: .* Is it cut off\?"
    ) as refusal:
        build(files, tmp_path / "corpus", tokenizer)
    assert str(refusal.value).count("foreign.h5ad") == 1


def write_10x(adata, folder):
    """The same cells as a 10x folder and a 10x h5 file."""
    counts = sp.csc_matrix(adata.X.T).astype(np.int32)
    genes = list(zip(adata.var_names, adata.var["gene_symbols"], strict=True))
    mtx = folder / "sample.v1"
    mtx.mkdir()
    with gzip.open(mtx / "matrix.mtx.gz", "wb") as handle:
        scipy.io.mmwrite(handle, counts)
    text = {"barcodes": adata.obs_names, "features": [f"{i}\t{s}\tGene Expression" for i, s in genes]}
    for name, lines in text.items():
        (mtx / f"{name}.tsv.gz").write_bytes(gzip.compress("\n".join([*lines, ""]).encode()))
    with h5py.File(folder / "sample.h5", "w") as handle:
        group = handle.create_group("matrix")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(counts, name)
        group["shape"] = np.array(counts.shape, np.int32)
        group["barcodes"] = np.array(adata.obs_names, "S")
        columns = {"id": adata.var_names, "name": adata.var["gene_symbols"]}
        columns |= {"feature_type": ["Gene Expression"] * adata.n_vars, "genome": ["GRCh38"] * adata.n_vars}
        for name, entries in columns.items():
            group[f"features/{name}"] = np.array(entries, "S")
        group["features/_all_tag_keys"] = np.array(["genome"], "S")
    return {"folder": mtx, "h5": folder / "sample.h5"}


def test_10x_files_equal_h5ad(tokenizer, tmp_path):
    pytest.importorskip("scanpy", reason="needs scanpy, which reads 10x formats")
    files, adata = write_cells(tmp_path)
    files |= write_10x(adata, tmp_path)
    build(files, tmp_path / "corpus", tokenizer, n_shards=2)
    found = rows_of(tmp_path / "corpus", tokenizer)
    for row in range(60):
        assert found["folder", row] == found["h5", row] == found["cells", row]


# --- memory ---

# The peak of this process alone: getrusage would carry over that of the process which started it.
MEASURE = """
import sys
from pathlib import Path
from tokenization_scdiva import CorpusSettings, ScDivaTokenizer, build_corpus
folder = Path(sys.argv[1])
build_corpus({"cells": folder / "cells.h5ad"}, folder / "corpus", show_progress=False,
             tokenizer=ScDivaTokenizer.from_pretrained(sys.argv[2]), settings=CorpusSettings(n_shards=2))
print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to read a peak of memory")
def test_memory_does_not_grow_with_the_corpus(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    peaks = []
    for n_cells in (4_000, 40_000):
        folder = tmp_path / str(n_cells)
        folder.mkdir()
        synthetic_cells(n_cells=n_cells, n_genes=120).write_h5ad(folder / "cells.h5ad")
        command = [sys.executable, "-c", MEASURE, str(folder), str(tmp_path / "tokenizer")]
        root = Path(__file__).resolve().parents[1]
        done = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True, check=True
        )
        peaks.append(float(done.stdout))
    assert peaks[1] - peaks[0] < 50  # MB
