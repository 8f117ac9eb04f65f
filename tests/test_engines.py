"""Corpora and vocabularies through Ray are those of the serial loop, whatever happens to the workers.

Needs no data; tests marked scale need the extra ray.
Run: pytest tests/test_engines.py -m "scale or not scale"
"""

import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest
from scipy.sparse import random as random_sparse

from tokenization_scdiva import (
    CorpusSettings,
    build_corpus,
    build_vocabulary,
    synthetic_cells,
)
from tokenization_scdiva.engines import run_on_ray, run_serially
from tokenization_scdiva.files import file_sha256
from tokenization_scdiva.soma import SomaSource, write_source


@pytest.fixture(scope="module")
def ray_cluster():
    """Two workers on this machine."""
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'scdiva[ray]'")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")  # tests never reach for the network
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test file
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000)
    yield ray
    ray.shutdown()
    monkeypatch.undo()


def hashes(folder):
    """Path -> SHA-256 of every file, those with hidden names too."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): file_sha256(path) for path in paths}


def build(files, folder, tokenizer, run_units, **settings):
    return build_corpus(
        files, folder, tokenizer=tokenizer, settings=CorpusSettings(**settings), run_units=run_units,
        show_progress=False,
    )  # fmt: skip


class Bar:
    n_done = 0

    def update(self, n):
        self.n_done += n


def square(unit, progress):
    if unit < 0:
        msg = f"{unit} is negative"
        raise KeyError(msg)
    progress.update(unit)
    return unit * unit


def end_process(unit, progress):
    if unit == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return unit


class UnpicklableError(Exception):
    def __init__(self, what, *, reason):
        super().__init__(f"{what} is refused because of {reason}")


def raise_unpicklable(unit, progress):
    raise UnpicklableError(unit, reason="a test")


def test_serial_results_come_one_by_one():
    bar = Bar()
    results = run_serially(square, [3, 2, -1, 5], bar)
    assert [next(results), next(results)] == [9, 4]
    assert bar.n_done == 5
    with pytest.raises(KeyError, match="-1 is negative"):
        next(results)


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"not installed: pip install 'scdiva\[ray\]'"):
        next(run_on_ray(square, [1], Bar()))


@pytest.mark.scale
def test_ray_gives_results_and_errors_in_order(ray_cluster):
    bar = Bar()
    assert list(run_on_ray(square, [3, 2, 1], bar)) == [9, 4, 1]
    assert bar.n_done == 6
    assert list(run_on_ray(square, [], bar)) == []
    results = run_on_ray(square, [2, -7, -8], bar)
    assert next(results) == 4
    with pytest.raises(KeyError, match="-7 is negative") as raised:
        next(results)
    assert raised.value.args == ("-7 is negative",)
    assert "in square" in raised.value.__notes__[0]
    with pytest.raises(RuntimeError, match="UnpicklableError: 1 is refused because of a test"):
        list(run_on_ray(raise_unpicklable, [1], bar))


@pytest.mark.scale
def test_a_unit_that_kills_every_worker_is_given_up(ray_cluster, monkeypatch):
    results = run_on_ray(end_process, [0, 1], Bar())
    assert next(results) == 0
    with pytest.raises(RuntimeError, match=r"The unit 1 was begun 5 times, and each time its worker died"):
        next(results)


@pytest.mark.scale
def test_corpus_through_ray_has_the_same_bytes(ray_cluster, cell_files, tokenizer, tmp_path):
    settings = {"n_shards": 3, "validation_fraction": 0.2, "obs_keys": ("cell_type",)}
    serial = build(cell_files, tmp_path / "serial", tokenizer, run_serially, **settings)
    assert build(cell_files, tmp_path / "ray", tokenizer, run_on_ray, **settings) == serial
    assert hashes(tmp_path / "ray") == hashes(tmp_path / "serial")
    assert "manifest.json" in hashes(tmp_path / "ray")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "ray").glob("*.arrow")}
    build(cell_files, tmp_path / "ray", tokenizer, run_on_ray, **settings)
    assert {path: path.stat().st_mtime_ns for path in times} == times  # what is finished is not made again


@pytest.mark.scale
def test_pieces_of_a_soma_experiment_through_ray(ray_cluster, cell_files, tokenizer, tmp_path):
    reason = "needs TileDB-SOMA: pip install 'scdiva[census]'"
    pytest.importorskip("tiledbsoma.io", reason=reason).from_h5ad(
        str(tmp_path / "first"), str(cell_files["first"]), measurement_name="RNA"
    )
    files = {}
    for first in (0, 100):
        files[f"piece{first}"] = tmp_path / f"piece{first}.soma.json"
        write_source(files[f"piece{first}"], SomaSource("first", joinids=(first, first + 99)))
    manifest = build(files, tmp_path / "serial", tokenizer, run_serially, n_shards=2)
    assert [dataset["n_cells"] for dataset in manifest["datasets"]] == [100, 50]
    build(files, tmp_path / "ray", tokenizer, run_on_ray, n_shards=2)
    assert hashes(tmp_path / "ray") == hashes(tmp_path / "serial")


@pytest.mark.scale
def test_vocabulary_through_ray_is_the_same(ray_cluster, cell_files):
    serial, serial_reports = build_vocabulary(cell_files, show_progress=False)
    through_ray, reports = build_vocabulary(cell_files, run_units=run_on_ray, show_progress=False)
    np.testing.assert_array_equal(through_ray.gene_entropy, serial.gene_entropy)
    assert through_ray.gene_ids == serial.gene_ids
    assert through_ray.source == serial.source
    assert reports == serial_reports


@pytest.mark.scale
def test_refused_files_raise_the_same_error(ray_cluster, cell_files, tokenizer, tmp_path):
    files = dict(cell_files)
    for name, entry in (("third", -1.0), ("fourth", 0.5)):
        files[name] = tmp_path / f"{name}.h5ad"
        synthetic_cells(n_cells=40, n_genes=90).write_h5ad(files[name])
        with h5py.File(files[name], "r+") as handle:
            handle["X/data"][-1] = entry
    raised = []
    for run_units in (run_serially, run_on_ray):
        for settings in ({}, {"layer": "raw_counts"}):
            with pytest.raises((ValueError, KeyError)) as refusal:
                build(files, tmp_path / run_units.__name__, tokenizer, run_units, **settings)
            raised.append((refusal.type, refusal.value.args))
    assert raised[:2] == raised[2:]
    assert raised[0][0] is ValueError
    assert raised[0][1][0].startswith(f"{files['third']}: X does not hold raw counts: 1 values are negative")
    assert raised[1][0] is KeyError


class Killer(threading.Thread):
    """Kill the first worker that is seen writing a file of this name, by the id in its temporary name."""

    def __init__(self, folder, pattern):
        super().__init__(daemon=True)
        self.folder, self.pattern, self.killed, self.is_over = folder, pattern, None, False

    def run(self):
        while self.killed is None and not self.is_over:
            for path in self.folder.glob(self.pattern):
                worker = int(path.name.split(".")[-2])
                assert worker != os.getpid()
                os.kill(worker, signal.SIGKILL)
                self.killed = worker
                break
            time.sleep(0.0005)


@pytest.mark.scale
@pytest.mark.parametrize("pattern", [".parts-*/.large.arrow.*.partial", ".train-*.arrow.*.partial"])
def test_a_killed_worker_loses_nothing(ray_cluster, cell_files, tokenizer, tmp_path, pattern):
    cells = random_sparse(
        20_000, tokenizer.vocabulary.n_genes, density=0.5, format="csr", rng=np.random.default_rng(0)
    )
    cells.data = np.ceil(cells.data * 9).astype(np.float32)
    large = ad.AnnData(cells.astype(np.float32))
    large.var_names = tokenizer.vocabulary.gene_ids[tokenizer.vocabulary.n_special_tokens :]
    large.write_h5ad(tmp_path / "large.h5ad")
    files = cell_files | {"large": tmp_path / "large.h5ad"}
    build(files, tmp_path / "serial", tokenizer, run_serially, n_shards=2)
    killer = Killer(tmp_path / "ray", pattern)
    killer.start()
    build(files, tmp_path / "ray", tokenizer, run_on_ray, n_shards=2)
    killer.is_over = True
    killer.join()
    assert killer.killed is not None
    assert hashes(tmp_path / "ray") == hashes(tmp_path / "serial")
    assert not list((tmp_path / "ray").glob(".*"))


@pytest.mark.scale
def test_script_through_ray(ray_cluster, cell_files, corpus_folder, tmp_path, monkeypatch, capsys):
    arguments = [*cell_files.values(), "--tokenizer", corpus_folder / "tokenizer", "--engine", "ray"]
    arguments += ["--output", tmp_path / "corpus", "--num-shards", 2, "--obs_keys", "cell_type"]
    arguments += ["--validation_fraction", 0.2]
    monkeypatch.setattr(sys, "argv", ["build_corpus.py", *map(str, arguments)])
    script = Path(__file__).resolve().parents[1] / "data" / "build_corpus.py"
    runpy.run_path(str(script), run_name="__main__")
    assert "2 files, 240 of 240 cells kept" in capsys.readouterr().out
    differing = dict(hashes(tmp_path / "corpus").items() ^ hashes(corpus_folder).items())
    assert differing.keys() <= {"tokenizer/tokenizer_config.json"}  # it was saved and loaded once more
