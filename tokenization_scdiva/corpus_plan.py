"""What a corpus is to hold: its settings, and which split, shard and place each cell gets.

A cell's place is a hash of the seed, its data set's name and its row, and of nothing else, so that every part
of a corpus can be built anywhere. Groups are held out by a hash of their name, equal in every file.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
from datasets import Value

from tokenization_scdiva.files import errors_name, open_cells
from tokenization_scdiva.ranking_scdiva import splitmix64

# Columns of a part that say where its rows go; they do not reach the shards.
ROUTE_COLUMNS = {
    "route/shard": Value("uint32"),
    "route/is_validation": Value("bool"),
    "route/order": Value("uint64"),
}
DATASET_ID_KEY = "dataset_id"
OWN_COLUMNS = ("gene_ids", "counts", "library_size", "expression_values", "dataset_id", "cell_index")


@dataclass(frozen=True)
class CorpusSettings:
    """What decides the content of a corpus, beside its files and its tokenizer.

    Attributes:
        n_shards: Shards per split.
        seed: Of the shuffle and the split.
        validation_fraction: Share of cells, or of groups of ``validation_key``, that are held out.
        validation_key: Column of ``obs`` whose groups are held out whole (a donor); ``dataset_id`` holds out
            files.
        validation_values: Groups to hold out; empty draws each with probability ``validation_fraction``, and
            at least one.
        obs_keys: Columns of ``obs`` to keep, as text; null for a file without the column.
        layer: Layer with the counts; default see `read_counts`.
        gene_id_key: Column of ``var`` with gene ids; default all known ones.
        expression_is_log1p: The files hold log1p values; stored as float16.
        count_dtype: ``uint16``, or ``uint32`` for files with more than 65,535 molecules of a gene in a cell.
        min_genes: Cells with fewer vocabulary genes are dropped and counted.
        min_gene_overlap: Least share of genes that must be known in each file.
        min_count_overlap: Least share of molecules in known genes in each file.
    """

    n_shards: int = 1
    seed: int = 0
    validation_fraction: float = 0.1
    validation_key: str | None = None
    validation_values: tuple[str, ...] = ()
    obs_keys: tuple[str, ...] = ()
    layer: str | None = None
    gene_id_key: str | None = None
    expression_is_log1p: bool = False
    count_dtype: str = "uint16"
    min_genes: int = 1
    min_gene_overlap: float = 0.1
    min_count_overlap: float = 0.5

    def __post_init__(self) -> None:
        if self.n_shards < 1:
            msg = f"n_shards must be at least 1, got {self.n_shards}."
            raise ValueError(msg)
        if not 0.0 <= self.validation_fraction < 1.0:
            msg = f"validation_fraction must lie in [0, 1), got {self.validation_fraction}."
            raise ValueError(msg)
        if self.validation_values and self.validation_key is None:
            msg = "validation_values names groups; say of which column with validation_key."
            raise ValueError(msg)
        if clashing := set(self.obs_keys) & set(OWN_COLUMNS):
            msg = (
                f"obs_keys may not hold the corpus' own columns, got {sorted(clashing)}; rename them in obs."
            )
            raise ValueError(msg)
        if self.count_dtype not in ("uint16", "uint32"):
            msg = f"count_dtype must be 'uint16' or 'uint32', got {self.count_dtype!r}."
            raise ValueError(msg)
        if self.min_genes < 1:
            msg = f"min_genes must be at least 1, got {self.min_genes}; a cell without genes teaches nothing."
            raise ValueError(msg)


@dataclass(frozen=True)
class FileOutline:
    """What must be known of all files before the first is tokenized.

    Attributes:
        n_cells: Number of cells N.
        obs_columns: Columns of ``obs``.
        groups: Groups of the validation column; empty without one.
    """

    n_cells: int
    obs_columns: list[str]
    groups: frozenset[str]


def outline_file(name: str, path: Path, validation_key: str | None) -> FileOutline:
    """Look at a file without reading its matrix.

    Args:
        name: Data set name.
        path: File of cells.
        validation_key: Column of ``obs`` with the groups, ``dataset_id``, or None.

    Returns:
        Its outline.
    """
    with open_cells(path) as adata, errors_name(path):
        groups = _groups(name, adata, validation_key)
        return FileOutline(adata.n_obs, [str(key) for key in adata.obs.columns], frozenset(groups))


def _groups(name: str, adata: anndata.AnnData, validation_key: str | None) -> np.ndarray:
    """(N,) validation group of each cell, or nothing where the column is missing."""
    if validation_key == DATASET_ID_KEY:
        return np.full(adata.n_obs, name)
    return adata.obs[validation_key].astype(str).to_numpy() if validation_key in adata.obs else np.array([])


def check_obs_keys(outlines: Mapping[str, FileOutline], settings: CorpusSettings) -> None:
    """Refuse settings that name columns which the files do not have.

    Args:
        outlines: Data set name -> outline.
        settings: See `CorpusSettings`.

    Raises:
        KeyError: If no file has a column of ``obs_keys``, or one file lacks ``validation_key``.
    """
    everywhere = sorted({column for outline in outlines.values() for column in outline.obs_columns})
    for key in settings.obs_keys:
        if key not in everywhere:
            msg = f"No file has the obs column {key!r}. Columns there are: {', '.join(everywhere)}."
            raise KeyError(msg)
    if settings.validation_key in (None, DATASET_ID_KEY):
        return
    for name, outline in outlines.items():
        if settings.validation_key not in outline.obs_columns:
            msg = (
                f"The validation column {settings.validation_key!r} is missing in {name!r}, which has: "
                f"{', '.join(outline.obs_columns)}."
            )
            raise KeyError(msg)


def held_out_groups(outlines: Mapping[str, FileOutline], settings: CorpusSettings) -> tuple[str, ...]:
    """Choose the groups of cells that are held out.

    Args:
        outlines: Data set name -> outline, of all files, so that every part of a corpus chooses the same.
        settings: See `CorpusSettings`.

    Returns:
        Values of ``validation_key``; none when cells are held out one by one.

    Raises:
        ValueError: If a group of ``validation_values`` does not exist, or the draw leaves no group to train
            on.
    """
    groups = sorted({group for outline in outlines.values() for group in outline.groups})
    if settings.validation_values:
        unknown = [group for group in settings.validation_values if group not in groups]
        if unknown:
            msg = (
                f"No cell has {settings.validation_key} {', '.join(map(repr, unknown))} (validation_values). "
                f"There are {len(groups)} groups: {', '.join(groups[:10])}{', ...' if groups[10:] else ''}."
            )
            raise ValueError(msg)
        return settings.validation_values
    if settings.validation_key is None or settings.validation_fraction == 0.0:
        return ()
    draws = {group: _uniform(_text_hash(f"{settings.seed}/group/{group}")) for group in groups}
    held_out = [group for group in groups if draws[group] < settings.validation_fraction]
    held_out = held_out or [min(groups, key=lambda group: draws[group])]
    if len(held_out) == len(groups):
        msg = (
            f"All groups of {settings.validation_key!r} ({', '.join(groups[:10])}) would be held out, none "
            "left to train on. Name those to hold out with validation_values, or split by cells."
        )
        raise ValueError(msg)
    return tuple(held_out)


def cell_routes(
    name: str, adata: anndata.AnnData, settings: CorpusSettings, held_out: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """Say for every cell of a file which shard, split and place it gets.

    Args:
        name: Data set name.
        adata: The file's cells, N.
        settings: See `CorpusSettings`.
        held_out: What `held_out_groups` chose.

    Returns:
        (N,) arrays under the names of ``ROUTE_COLUMNS``: shard, whether held out, and a word to sort by.
    """
    cells = splitmix64(np.arange(adata.n_obs, dtype=np.uint64) + _text_hash(f"{settings.seed}/{name}"))
    shard = (splitmix64(cells ^ np.uint64(1)) >> np.uint64(32)) % np.uint64(settings.n_shards)
    if settings.validation_key is None:
        is_validation = _uniform(splitmix64(cells ^ np.uint64(2))) < settings.validation_fraction
    else:
        is_validation = np.isin(_groups(name, adata, settings.validation_key), held_out)
    order = splitmix64(cells ^ np.uint64(3))
    return dict(zip(ROUTE_COLUMNS, (shard.astype(np.uint32), is_validation, order), strict=True))


def _text_hash(text: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little"))


def _uniform(words: Any) -> Any:
    return (words >> np.uint64(11)) * 2.0**-53
