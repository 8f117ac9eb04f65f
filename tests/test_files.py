"""Files of cells are found, named and opened; what is half written never bears its final name.

Needs no data. Run: pytest tests/test_files.py
"""

import hashlib
import json

import h5py
import numpy as np
import pytest

from tokenization_scdiva import find_cell_files, open_cells, synthetic_cells
from tokenization_scdiva.files import atomic_path, errors_name, file_sha256, write_json


@pytest.fixture
def folder(tmp_path):
    """Two h5ad files, a 10x file and a 10x folder, beside a file that holds no cells."""
    for name in ("a.h5ad", "b[1].h5ad", "c.h5", "notes.txt", "run.v2/matrix.mtx.gz", "more/a.h5ad"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return tmp_path


def test_files_globs_and_folders(folder):
    everything = {
        "a": folder / "a.h5ad", "b[1]": folder / "b[1].h5ad", "c": folder / "c.h5",
        "run.v2": folder / "run.v2",
    }  # fmt: skip
    assert find_cell_files([folder]) == everything
    assert find_cell_files([folder / "*"])["c"] == folder / "c.h5"
    assert list(find_cell_files([folder / "b[1].h5ad", folder / "c.h5"])) == ["b[1]", "c"]
    assert find_cell_files([folder / "run.v2"]) == {"run.v2": folder / "run.v2"}


def test_a_file_given_twice_counts_once(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert find_cell_files(["a.h5ad", folder / "a.h5ad", "more/../a.h5ad"]) == {"a": folder / "a.h5ad"}


def test_equal_names_take_their_folder(folder):
    found = find_cell_files([folder / "a.h5ad", folder / "more"])
    assert found == {f"{folder.name}_a": folder / "a.h5ad", "more_a": folder / "more" / "a.h5ad"}
    (folder / "x" / "more").mkdir(parents=True)
    (folder / "x" / "more" / "a.h5ad").touch()
    with pytest.raises(ValueError, match=r"would both be called 'more_a'; rename one"):
        find_cell_files([folder / "more", folder / "x" / "more"])


@pytest.mark.parametrize("name", ["nowhere.h5ad", "notes.txt", "*.loom"])
def test_inputs_without_cells_are_refused(folder, name):
    with pytest.raises(FileNotFoundError, match=r"No cells at .*wanted an \.h5ad or 10x \.h5 file"):
        find_cell_files([folder / "a.h5ad", folder / name])


@pytest.mark.parametrize("share", [0.0, 0.5, 0.98])
def test_truncated_files_are_named(tmp_path, share):
    path = tmp_path / "cells.h5ad"
    synthetic_cells(n_cells=20).write_h5ad(path)
    content = path.read_bytes()
    with open_cells(path) as adata:
        assert adata.shape == (20, 300)
    assert path.read_bytes() == content
    path.write_bytes(content[: int(share * len(content))])
    size = f"{path.stat().st_size:,}"
    message = rf"cells\.h5ad \({size} bytes\) cannot be read as cells: .* cut off"
    with pytest.raises(OSError, match=message), open_cells(path):
        pass


@pytest.mark.parametrize("name", ["text.h5ad", "text.h5", "foreign.h5ad", "foreign.h5", "folder"])
def test_foreign_files_are_named(tmp_path, name):
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        (path / "matrix.mtx").write_text("no matrix")
    elif name.startswith("text"):
        path.write_text("no cells")
    else:
        with h5py.File(path, "w") as handle:
            handle["matrix/x"] = np.arange(3)
    if not name.endswith(".h5ad"):
        pytest.importorskip("scanpy", reason="needs scanpy, which reads 10x formats")
    with pytest.raises(OSError, match=rf"{name} \(.*\) cannot be read as cells"), open_cells(path):
        pass


def test_atomic_path(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with atomic_path(path) as partial:
        partial.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"
    with pytest.raises(ZeroDivisionError), atomic_path(path) as partial:
        partial.write_text(f"two {1 / 0}")
    assert path.read_text() == "one"
    assert list(path.parent.iterdir()) == [path]


def test_json_and_hash(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1, "é"], "a": None})
    write_json(tmp_path / "b.json", {"a": None, "b": [1, "é"]})
    content = (tmp_path / "a.json").read_bytes()
    assert content == (tmp_path / "b.json").read_bytes()
    assert json.loads(content) == {"a": None, "b": [1, "é"]}
    assert file_sha256(tmp_path / "a.json") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("kind", [ValueError, KeyError, TypeError, OSError])
def test_errors_name_the_file(tmp_path, kind):
    with pytest.raises(kind, match=rf"{tmp_path}: it is broken"), errors_name(tmp_path):
        raise kind(*["it is broken"])


def test_a_full_disk_is_no_fault_of_the_file(tmp_path):
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left"), errors_name(tmp_path):
        raise OSError(28, "No space left")
