"""A corpus from a SOMA experiment is that of the h5ad file the experiment came from.

Tests marked scale need the extra census, those marked real_data real cells beside the checkout.
Run: pytest tests/test_soma.py -m "scale or not scale"
"""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from tokenization_scdiva import (
    CorpusSettings,
    ScDivaTokenizer,
    build_corpus,
    build_vocabulary,
    find_cell_files,
    open_cells,
    read_counts,
    soma,
    synthetic_cells,
)
from tokenization_scdiva.files import file_sha256

DATA = Path(__file__).resolve().parents[1] / "data"


@pytest.fixture(scope="module")
def tiledbsoma():
    """The package, with its own way from h5ad to SOMA."""
    pytest.importorskip("tiledbsoma", reason="needs TileDB-SOMA: pip install 'scdiva[census]'")
    return pytest.importorskip("tiledbsoma.io")


@pytest.fixture(scope="module")
def experiment(tiledbsoma, cell_files, tmp_path_factory):
    """150 cells of 120 genes with a layer of half the counts, and the AnnData they come from."""
    adata = synthetic_cells(n_cells=150, n_genes=120, seed=1)
    adata.layers["normalized"] = adata.X / 2
    adata.obs.index.name = "barcode"
    folder = tmp_path_factory.mktemp("soma") / "blood"
    tiledbsoma.from_anndata(str(folder), adata, measurement_name="RNA")
    return folder, adata


def write(folder, **source):
    path = folder / "blood.soma.json"
    path.write_text(json.dumps(source))
    return path


def shard_hashes(folder):
    return {path.name: file_sha256(path) for path in folder.glob("*.arrow")}


def build(files, folder, tokenizer, **settings):
    settings = CorpusSettings(**settings)
    return build_corpus(files, folder, tokenizer=tokenizer, settings=settings, show_progress=False)


@pytest.mark.scale
@pytest.mark.real_data
def test_corpus_of_real_cells_is_that_of_the_file(tiledbsoma, real_data, tmp_path):
    file = real_data / "pbmc_zheng2017_b_cd4_cd8.h5ad"
    tiledbsoma.from_h5ad(str(tmp_path / file.stem), str(file), measurement_name="RNA")
    corpora = []
    for index, files in enumerate((find_cell_files([file]), find_cell_files([tmp_path / file.stem]))):
        assert list(files) == ["pbmc_zheng2017_b_cd4_cd8"]
        vocabulary, reports = build_vocabulary(files, show_progress=False)
        settings = {"n_shards": 2, "obs_keys": ("cell_type",), "validation_key": "cell_type"}
        folder = tmp_path / f"corpus{index}"
        manifest = build(files, folder, ScDivaTokenizer(vocabulary=vocabulary), **settings)
        for dataset in manifest["datasets"]:
            del dataset["file"]
        entropy = vocabulary.gene_entropy.tolist()
        corpora.append((entropy, reports, manifest["datasets"], manifest["splits"], shard_hashes(folder)))
    assert corpora[0] == corpora[1]
    assert sum(split["n_cells"] for split in corpora[0][3].values()) == 756


@pytest.mark.scale
def test_cells_are_those_of_the_anndata(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(soma, "CELLS_PER_READ", 32)
    folder, adata = experiment
    with open_cells(folder) as cells:
        assert cells.n_obs == 150
        assert cells.obs_names.tolist() == adata.obs_names.tolist()
        assert cells.var_names.tolist() == adata.var_names.tolist()
        assert cells.obs["donor_id"].tolist() == adata.obs["donor_id"].tolist()
        assert set(cells.obs.columns) == set(adata.obs.columns)
        assert "barcode" not in cells.obs
        for block_size in (150, 40, 7):
            blocks = read_counts(cells, block_size=block_size).blocks()
            wanted = read_counts(adata, block_size=block_size).blocks()
            for block, other in zip(blocks, wanted, strict=True):
                for part in ("start", "indptr", "indices", "data"):
                    np.testing.assert_array_equal(getattr(block, part), getattr(other, part))
        with pytest.raises(ValueError, match=r"layers\['normalized'\] does not hold raw counts"):
            read_counts(cells, layer="normalized")


@pytest.mark.scale
def test_filter_and_range_choose_cells(experiment, tmp_path):
    folder, adata = experiment
    choice = {"obs_filter": "donor_id == 'donor_1'", "joinids": [30, 99]}
    with open_cells(write(tmp_path, uri=str(folder), measurement="RNA", **choice)) as cells:
        wanted = adata[30:100][adata.obs["donor_id"][30:100] == "donor_1"]
        assert cells.obs_names.tolist() == wanted.obs_names.tolist()
        assert cells.obs["cell_type"].tolist() == wanted.obs["cell_type"].tolist()
        (block,) = read_counts(cells).blocks()
        np.testing.assert_array_equal(block.row_sums(), np.asarray(wanted.X.sum(axis=1)).ravel())
    with open_cells(write(tmp_path, uri=str(folder), layer="normalized", joinids=[0, 9])) as cells:
        assert (cells.X[0:10] != adata.layers["normalized"][:10]).nnz == 0
        assert list(cells.layers) == ["data"]


@pytest.mark.scale
def test_pieces_hold_every_cell_once(experiment, tokenizer, tmp_path, monkeypatch, capsys):
    folder, adata = experiment
    arguments = [folder, "--cells_per_piece", 60, "--output", tmp_path / "pieces"]
    arguments += ["--obs_filter", "cell_type != 'type_2'", "--tiledb_config", "sm.io_concurrency_level=1"]
    monkeypatch.setattr(sys, "argv", ["split_soma.py", *map(str, arguments)])
    runpy.run_path(str(DATA / "split_soma.py"), run_name="__main__")
    n_wanted = int((adata.obs["cell_type"] != "type_2").sum())
    assert f"Wrote 3 pieces with {n_wanted} cells of {folder}" in capsys.readouterr().out
    files = find_cell_files([tmp_path / "pieces"])
    assert list(files) == ["blood-0000000000", "blood-0000000060", "blood-0000000120"]
    names = []
    for path in files.values():
        with open_cells(path) as cells:
            names += cells.obs_names.tolist()
    assert names == adata.obs_names[adata.obs["cell_type"] != "type_2"].tolist()
    build(files, tmp_path / "corpus", tokenizer)
    # The text of a piece, not only its size, tells whether the corpus is still the same.
    piece = files["blood-0000000060"]
    piece.write_text(piece.read_text().replace("type_2", "type_1"))
    with pytest.raises(ValueError, match="holds a corpus built from other files"):
        build(files, tmp_path / "corpus", tokenizer)


@pytest.mark.scale
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"uri": "nowhere"}, OSError, r"blood\.soma\.json: the experiment .*nowhere cannot be read"),
        ({"measurement": "ATAC"}, KeyError, r"no measurement 'ATAC'; name one of \['RNA'\]"),
        ({"obs_filter": "tissue == 3"}, OSError, "cannot be read: .*Column tissue does not exist"),
        ({"obs_filter": "cell_type == 'none'"}, ValueError, "no cell of .* passes obs_filter and joinids"),
        ({"layer": "raw"}, ValueError, r"blood\.soma\.json: X is absent; .* Raw counts: pass layer='data'"),
    ],
)
def test_wrong_sources_are_refused_by_name(experiment, tokenizer, tmp_path, changes, error, message):
    path = write(tmp_path, **({"uri": str(experiment[0])} | changes))
    with pytest.raises(error, match=message) as refusal:
        build({"blood": path}, tmp_path / "corpus", tokenizer)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[]", r'must hold \{"uri": ...\} .* it holds list'),
        ('{"url": "blood"}', "may hold measurement, layer, .* it holds url"),
        ('{"uri": "blood", "joinids": [3, 2]}', r"joinids must be .* got \[3, 2\]"),
        ('{"uri": "blood", "joinids": 7}', "joinids must be .* got 7"),
    ],
)
def test_source_files_are_checked(tmp_path, text, message):
    path = tmp_path / "blood.soma.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"blood\.soma\.json.* {message}|{message}"):
        soma.read_source(path)


def test_sources_are_found_and_the_extra_is_named(tmp_path, monkeypatch):
    source = soma.SomaSource("s3://bucket/human", layer="raw", joinids=(0, 9), tiledb_config={"a": "b"})
    soma.write_source(tmp_path / "blood.soma.json", source)
    assert soma.read_source(tmp_path / "blood.soma.json") == source
    write(tmp_path, uri="../blood")
    assert soma.read_source(tmp_path / "blood.soma.json").uri == str(tmp_path / ".." / "blood")
    files = find_cell_files([tmp_path])
    assert files == {"blood": tmp_path / "blood.soma.json"}
    monkeypatch.setitem(sys.modules, "tiledbsoma", None)
    with (
        pytest.raises(ImportError, match=r"blood\.soma\.json: .* pip install 'scdiva\[census\]'"),
        open_cells(files["blood"]),
    ):
        pass
