"""Files of cells: find them, open them, and write new ones so that half a file never bears its final name."""

import glob
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anndata

from tokenization_scdiva.soma import SOURCE_ENDING, is_soma, open_soma

CELL_FILE_ENDINGS = (".h5ad", ".h5")
MTX_NAMES = ("matrix.mtx", "matrix.mtx.gz")


def find_cell_files(inputs: Iterable[str | Path]) -> dict[str, Path]:
    """Resolve files, globs and folders to a sorted table of data sets.

    Args:
        inputs: h5ad files, 10x ``.h5`` files, 10x folders (``matrix.mtx[.gz]`` inside), SOMA experiments and
            ``.soma.json`` files that name one (see `soma`), globs, or folders of these.

    Returns:
        Data set name -> path, sorted by name; a file given twice counts once. The name is the file's stem (a
        folder's whole name), with the folder above before it where two are equal.

    Raises:
        FileNotFoundError: If an input matches nothing.
        ValueError: If two different files would still share a name.
    """
    paths: dict[Path, Path] = {}
    for entry in inputs:
        # A path that exists is taken as written: its name may hold characters that mean something in a glob.
        matches = [str(entry)] if Path(entry).exists() else sorted(glob.glob(str(entry)))  # noqa: PTH207
        found = [path for match in matches for path in _cell_files_at(Path(match))]
        if not found:
            msg = (
                f"No cells at {str(entry)!r}: wanted an .h5ad or 10x .h5 file, a 10x folder, a SOMA "
                f"experiment, a {SOURCE_ENDING} file, or a folder of these."
            )
            raise FileNotFoundError(msg)
        for path in found:
            paths.setdefault(path.resolve(), path.absolute())
    stems = [_dataset_name(path) for path in paths.values()]
    named: dict[str, Path] = {}
    for path in sorted(paths.values()):
        stem = _dataset_name(path)
        name = stem if stems.count(stem) == 1 else f"{path.parent.name}_{stem}"
        if name in named:
            msg = f"{named[name]} and {path} would both be called {name!r}; rename one of them."
            raise ValueError(msg)
        named[name] = path
    return dict(sorted(named.items()))


def _dataset_name(path: Path) -> str:
    if path.name.endswith(SOURCE_ENDING):
        return path.name.removesuffix(SOURCE_ENDING)
    return path.stem if path.suffix in CELL_FILE_ENDINGS else path.name


def _is_cells(path: Path) -> bool:
    if is_soma(path):
        return True
    if path.is_file():
        return path.suffix in CELL_FILE_ENDINGS
    return any((path / name).exists() for name in MTX_NAMES)


def _cell_files_at(path: Path) -> list[Path]:
    if path.is_file() or _is_cells(path):
        return [path] if _is_cells(path) else []
    return sorted(child for child in path.iterdir() if _is_cells(child))


def file_stamp(path: Path) -> int | str:
    """Say what tells a file of cells from another version of it.

    Args:
        path: File or folder of cells.

    Returns:
        Size in bytes, 0 for folders; of a ``.soma.json`` file its text.
    """
    if path.name.endswith(SOURCE_ENDING):
        return path.read_text("utf-8")
    return path.stat().st_size if path.is_file() else 0


@contextmanager
def open_cells(path: Path) -> Iterator[anndata.AnnData]:
    """Open a file of cells, h5ad and SOMA without loading the matrix, 10x formats through scanpy's readers.

    Args:
        path: h5ad file, 10x ``.h5`` file, 10x folder, SOMA experiment or ``.soma.json`` file.

    Yields:
        AnnData, backed for h5ad, or what is read like one (`SomaCells`); closed afterwards.

    Raises:
        OSError: If the file is damaged or of another kind.
    """
    if is_soma(path):
        with open_soma(path) as cells:
            yield cells  # type: ignore[misc]
        return
    if path.suffix != ".h5ad":
        _require_scanpy(path)
    try:
        adata = anndata.read_h5ad(path, backed="r") if path.suffix == ".h5ad" else _read_10x(path)
    # The readers raise whatever the damage makes them stumble over, scanpy also a plain Exception.
    except Exception as error:
        size = f"{path.stat().st_size:,} bytes" if path.is_file() else "a folder"
        msg = (
            f"{path} ({size}) cannot be read as cells: {error}. Is it cut off? Fetch it again or leave it "
            "out."
        )
        raise OSError(msg) from error
    try:
        yield adata
    finally:
        if adata.isbacked:
            adata.file.close()


def _require_scanpy(path: Path) -> None:
    if importlib.util.find_spec("scanpy") is None:
        msg = f"{path} is in a 10x format, which scanpy reads: pip install scanpy"
        raise ImportError(msg)


def _read_10x(path: Path) -> anndata.AnnData:
    import scanpy

    return scanpy.read_10x_mtx(path) if path.is_dir() else scanpy.read_10x_h5(path)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` that takes its name only when the block ends well.

    Args:
        path: Final file.

    Yields:
        Path to write to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb") as handle:
            os.fsync(handle.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def remove_partials(path: Path) -> None:
    """Delete what killed runs left of a file; only for files that nobody else can be writing.

    Args:
        path: Final file.
    """
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        stale.unlink()


@contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Put a file's path before the message of whatever its content is refused for.

    Args:
        path: File that is being read inside the block.

    Yields:
        Nothing.

    Raises:
        KeyError: The one raised inside, with the path before its message; and so the following.
        OSError: Of reading only; a full disk is no fault of the file.
        TypeError: As above.
        ValueError: As above.
    """
    try:
        yield
    except (KeyError, OSError, TypeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        msg = f"{path}: {error.args[0] if len(error.args) == 1 else error}"
        for kind in (KeyError, OSError, TypeError):
            if isinstance(error, kind):
                raise kind(msg) from error
        raise ValueError(msg) from error


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, equal content giving equal bytes.

    Args:
        path: File to write.
        content: What to write.
    """
    with atomic_path(path) as partial:
        partial.write_text(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text.

    Args:
        path: File to read.

    Returns:
        64 hexadecimal digits.
    """
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
