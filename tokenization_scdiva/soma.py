"""Cells of a SOMA experiment, such as the CELLxGENE Census, read like an AnnData, in constant memory.

A source is the folder of a local experiment, or a text file NAME.soma.json that names one anywhere:

    {"uri": "s3://.../census_data/homo_sapiens", "measurement": "RNA", "layer": "raw",
     "obs_filter": "is_primary_data == True and tissue_general == 'blood'", "joinids": [0, 499999],
     "tiledb_config": {"vfs.s3.region": "us-west-2", "vfs.s3.no_sign_request": "true"}}

Only ``uri`` is needed. Without ``measurement`` the experiment must have one only. ``layer`` is the layer of X
that is taken as ``X``, ``data`` by default, which is where `tiledbsoma.io.from_h5ad` puts it; all others are
``layers``. ``joinids`` are the first and the last ``soma_joinid`` that count: pieces of a large experiment
are files of their own, and units of work of their own (`data/split_soma.py` writes them). Cells come in the
order of their ``soma_joinid``; the column of ``obs`` that was the AnnData's index names them.

Memory holds names and join ids of the cells, one ``obs`` column at a time and 4,000 cells of the matrix.

Source: TileDB-SOMA, https://tiledbsoma.readthedocs.io.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

SOURCE_ENDING = ".soma.json"
CELLS_PER_READ = 4000  # of one query, some 250 MB; remote ones take a second however little they fetch
JOINID = "soma_joinid"
INDEX_NAME = "soma_dataframe_original_index_name"  # metadata that tiledbsoma.io writes


@dataclass(frozen=True)
class SomaSource:
    """Which cells of which experiment, as this module describes it.

    Attributes:
        uri: Path or URI of the experiment.
        measurement: Name in ``ms``; None if there is one only.
        layer: Layer of X that is taken as ``X``.
        obs_filter: TileDB value filter on ``obs``; None takes all cells.
        joinids: First and last ``soma_joinid``; None takes all cells.
        tiledb_config: Settings of TileDB, of its access to object stores for example.
    """

    uri: str
    measurement: str | None = None
    layer: str = "data"
    obs_filter: str | None = None
    joinids: tuple[int, int] | None = None
    tiledb_config: Mapping[str, str] | None = None


def write_source(path: Path, source: SomaSource) -> None:
    """Write a source as a file.

    Args:
        path: ``.soma.json`` file to write.
        source: What it names.
    """
    written = {key: value for key, value in vars(source).items() if value is not None}
    path.write_text(json.dumps(written, indent=1) + "\n", "utf-8")


def is_soma(path: Path) -> bool:
    """Say whether a path is a source of this module: a local experiment, or a file that names one.

    Args:
        path: Any path.

    Returns:
        Whether it looks like one; experiments are not opened.
    """
    if path.is_dir():
        return (path / "__tiledb_group.tdb").exists() and (path / "obs").is_dir() and (path / "ms").is_dir()
    return path.name.endswith(SOURCE_ENDING) and path.is_file()


def read_source(path: Path) -> SomaSource:
    """Read a source.

    Args:
        path: Folder of an experiment, or ``.soma.json`` file.

    Returns:
        What it names; a relative ``uri`` counts from the folder of the file.

    Raises:
        ValueError: If the file is not JSON as this module describes it.
    """
    if path.is_dir():
        return SomaSource(str(path))
    try:
        written = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        msg = f"{path} is no JSON: {error}."
        raise ValueError(msg) from error
    known = [field.name for field in fields(SomaSource)]
    unknown = [key for key in written if key not in known] if isinstance(written, dict) else known
    if unknown or not isinstance(written.get("uri"), str):
        found = ", ".join(written) if isinstance(written, dict) else type(written).__name__
        msg = f'{path} must hold {{"uri": ...}} and may hold {", ".join(known[1:])}; it holds {found}.'
        raise ValueError(msg)
    ends = written.pop("joinids", None)
    if ends is not None:
        is_range = isinstance(ends, list) and len(ends) == 2 and all(type(end) is int for end in ends)
        if not (is_range and 0 <= ends[0] <= ends[1]):
            msg = f"{path}: joinids must be the first and last soma_joinid, such as [0, 499999], got {ends}."
            raise ValueError(msg)
        ends = (ends[0], ends[1])
    source = SomaSource(**written, joinids=ends)
    if "://" in source.uri:
        return source
    return SomaSource(**vars(source) | {"uri": str(path.parent / source.uri)})


@contextmanager
def open_soma(path: Path) -> Iterator["SomaCells"]:
    """Open the cells of a source.

    Args:
        path: Folder of an experiment, or ``.soma.json`` file.

    Yields:
        The cells; closed afterwards.

    Raises:
        KeyError: If there is no such measurement.
        ValueError: If no cell passes the filter.
    """
    source = read_source(path)
    with _experiment(source, named=f"{path}: ") as experiment:
        names = list(experiment.ms)
        name = names[0] if source.measurement is None and len(names) == 1 else source.measurement
        if name not in names:
            msg = f"{path}: there is no measurement {name!r}; name one of {names} as measurement."
            raise KeyError(msg)
        with _soma_errors(f"{path}: the experiment {source.uri}"):
            cells = SomaCells(experiment.obs, experiment.ms[name], source)
        if not cells.n_obs:
            msg = f"{path}: no cell of {source.uri} passes obs_filter and joinids."
            raise ValueError(msg)
        yield cells


def count_cells(source: SomaSource, cells_per_piece: int) -> dict[int, int]:
    """Count the cells that pass the filter in consecutive ranges of join ids.

    Args:
        source: Which cells.
        cells_per_piece: Join ids of a range.

    Returns:
        First join id of a range -> its cells, for ranges that have some.
    """
    counts: Counter[int] = Counter()
    with _experiment(source) as experiment, _soma_errors(source.uri):
        for table in experiment.obs.read(value_filter=source.obs_filter, column_names=[JOINID]):
            counts.update((table[JOINID].to_numpy() // cells_per_piece).tolist())
    return {piece * cells_per_piece: counts[piece] for piece in sorted(counts)}


@contextmanager
def _experiment(source: SomaSource, named: str = "") -> Iterator[Any]:
    """Open an experiment; ``named`` goes before messages."""
    try:
        import tiledbsoma
    except ImportError as error:
        msg = f"{named}tiledbsoma reads SOMA experiments: pip install 'scdiva[census]'"
        raise ImportError(msg) from error
    context = tiledbsoma.SOMATileDBContext(tiledb_config=dict(source.tiledb_config or {}))
    with _soma_errors(f"{named}the experiment {source.uri}"):
        opened = tiledbsoma.Experiment.open(source.uri, context=context)
    with opened as experiment:
        yield experiment


@contextmanager
def _soma_errors(what: str) -> Iterator[None]:
    """Turn errors of tiledbsoma, which are of kinds of its own, into OSError."""
    import tiledbsoma

    try:
        yield
    except tiledbsoma.SOMAError as error:
        msg = f"{what} cannot be read: {str(error).splitlines()[0]}"  # the rest is where in tiledbsoma
        raise OSError(msg) from error


class SomaCells:
    """What the readers of this package use of an AnnData, over an open experiment.

    Attributes:
        obs: Columns of the cells, each read when it is asked for.
        var: Genes of the measurement, a DataFrame.
        X: The layer of X that the source names, or None.
        layers: The other layers of X.
        raw: None; a measurement of its own in a SOMA experiment.
        uns: Empty.
        isbacked: False; there is no file to close.
    """

    raw = None
    isbacked = False

    def __init__(self, obs: Any, measurement: Any, source: SomaSource) -> None:
        self.obs = SomaObs(obs, source)
        self._joinids = self.obs.joinids
        var = measurement.var.read().concat().to_pandas().sort_values(JOINID)
        index = _index_column(measurement.var, list(var.columns), "var_id")
        self.var = var.drop(columns=JOINID).set_index(index) if index else var.set_index(JOINID)
        self.uns: dict[str, Any] = {}
        genes = var[JOINID].to_numpy()
        matrices = {name: SomaMatrix(measurement.X[name], self._joinids, genes) for name in measurement.X}
        self.X = matrices.pop(source.layer, None)
        self.layers = matrices

    @property
    def n_obs(self) -> int:
        """Number of cells N."""
        return len(self._joinids)

    @property
    def var_names(self) -> pd.Index:
        """(G,) index of ``var``."""
        return self.var.index

    @cached_property
    def obs_names(self) -> pd.Index:
        """(N,) names of the cells; join ids where they have none."""
        index = self.obs.index
        return pd.Index(self._joinids.astype(str) if index is None else self.obs[index].astype(str))


class SomaObs:
    """Columns of ``obs``, each read when it is asked for.

    Attributes:
        joinids: (N,) join ids of the cells, ascending.
        index: Column that holds the names of the cells; None if there is none.
        columns: Names of all others.
    """

    def __init__(self, table: Any, source: SomaSource) -> None:
        self._table, self._source = table, source
        self.joinids = self._read().index.to_numpy()
        names = [name for name in table.keys() if name != JOINID]  # noqa: SIM118 (no mapping)
        self.index = _index_column(table, names, "obs_id")
        self.columns = [name for name in names if name != self.index]

    def __contains__(self, key: object) -> bool:
        return key in self.columns

    def __getitem__(self, key: str) -> pd.Series:
        return self._read(key)[key].reset_index(drop=True)

    def _read(self, *names: str) -> pd.DataFrame:
        coordinates = () if self._source.joinids is None else (slice(*self._source.joinids),)
        found = self._table.read(
            coordinates, value_filter=self._source.obs_filter, column_names=[JOINID, *names]
        )
        return found.concat().to_pandas().set_index(JOINID).sort_index()


class SomaMatrix:
    """A layer of X, (N, G), cut by cells into sparse blocks; consecutive blocks come from one query."""

    format = "csr"

    def __init__(self, array: Any, cells: np.ndarray, genes: np.ndarray) -> None:
        if array.soma_type != "SOMASparseNDArray":
            msg = f"{array.uri} is a {array.soma_type}; a SOMASparseNDArray is needed. Write X sparse."
            raise TypeError(msg)
        self._array, self._cells, self._genes = array, cells, genes
        self.shape = (len(cells), len(genes))
        self.dtype = np.dtype(array.schema.field("soma_data").type.to_pandas_dtype())
        self._start, self._read = 0, csr_matrix((0, len(genes)), dtype=self.dtype)

    def __getitem__(self, rows: slice) -> csr_matrix:
        start, stop, _ = rows.indices(len(self._cells))
        if not self._start <= start <= stop <= self._start + self._read.shape[0]:
            self._start = start
            self._read = self._query(start, max(stop, min(start + CELLS_PER_READ, len(self._cells))))
        return self._read[start - self._start : stop - self._start]

    def _query(self, start: int, stop: int) -> csr_matrix:
        cells = self._cells[start:stop]
        with _soma_errors(f"{self._array.uri}, cells {cells[0]} to {cells[-1]}"):
            found = self._array.read((cells, slice(None))).tables().concat()
        rows = np.searchsorted(cells, found["soma_dim_0"].to_numpy())
        columns = np.searchsorted(self._genes, found["soma_dim_1"].to_numpy())
        values = found["soma_data"].to_numpy()
        return csr_matrix((values, (rows, columns)), shape=(stop - start, len(self._genes)), dtype=self.dtype)


def _index_column(table: Any, columns: list[str], usual: str) -> str | None:
    """Column that was the index of the AnnData; None where there was none, as in the Census."""
    noted = json.loads(table.metadata.get(INDEX_NAME, "null"))
    return next((name for name in (noted, usual) if name in columns), None)
