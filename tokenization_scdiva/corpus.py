"""The Arrow corpus: its schema, its manifest, and reading it at training time.

A corpus is a folder of Arrow stream files in the layout that the `datasets` library memory-maps, one pair of
files (train, validation) per shard, beside one `manifest.json`. A row is a cell: all its vocabulary genes in
ranking order with their raw counts, so that the uncorrupted cell needs no sort at training time and thinning
still finds the genes below the cut. Batches are fetched as Arrow tables by a list of indices; no Python
object per cell or gene.

Dimensions: N cells of a split, B cells of a batch, T gene tokens of a batch.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import Dataset, Features, List, Value, concatenate_datasets
from scipy.sparse import csr_matrix
from torch.utils.data import Dataset as TorchDataset

from modeling_scdiva.conditions_scdiva import category_ids
from modeling_scdiva.size_law_scdiva import fit_size_law
from tokenization_scdiva.arrow_rows import ArrowRows
from tokenization_scdiva.files import file_sha256
from tokenization_scdiva.gene_queries import unpack_measured_genes
from tokenization_scdiva.ranking_scdiva import FlatCells, cell_values

CORPUS_FORMAT = "scdiva-corpus"
CORPUS_FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
SPLITS = ("train", "validation")
# Token ids and counts fit 16 bits in nearly all corpora: 4 bytes per stored gene.
MAX_UINT16 = 2**16 - 1
# Splits up to this size are compared with their hashes when opened (seconds), larger ones by size only.
HASHED_BYTES = 2 * 2**30


def corpus_features(
    *, value_kind: str, vocab_size: int, count_dtype: str, obs_keys: Sequence[str]
) -> Features:
    """Return the schema of a corpus.

    Args:
        value_kind: ``counts`` or ``log1p``.
        vocab_size: V; decides the width of the token ids.
        count_dtype: ``uint16`` or ``uint32``.
        obs_keys: Columns of ``obs`` that are kept, as text.

    Returns:
        Features: ``gene_ids``, then ``counts`` and ``library_size`` or ``expression_values``, then
        ``dataset_id``, ``cell_index`` (row in its file) and the ``obs`` columns.
    """
    token_type = "uint16" if vocab_size <= MAX_UINT16 + 1 else "uint32"
    columns: dict[str, Any] = {"gene_ids": List(Value(token_type))}
    if value_kind == "counts":
        columns |= {"counts": List(Value(count_dtype)), "library_size": Value("float32")}
    else:
        columns |= {"expression_values": List(Value("float16"))}
    columns |= {"dataset_id": Value("uint16"), "cell_index": Value("uint32")}
    return Features(columns | {key: Value("string") for key in obs_keys})


def shard_name(split: str, shard: int, n_shards: int) -> str:
    """Return the file name of one shard of one split.

    Args:
        split: ``train`` or ``validation``.
        shard: Number of the shard, from 0.
        n_shards: Shards of the corpus.

    Returns:
        A name in the form the `datasets` library knows, ``train-00000-of-00008.arrow``.
    """
    return f"{split}-{shard:05d}-of-{n_shards:05d}.arrow"


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read and check the manifest of a corpus.

    Args:
        folder: Corpus folder.

    Returns:
        The manifest.

    Raises:
        FileNotFoundError: If there is none: not a corpus, or not yet finished.
        ValueError: If it is of another kind or version.
    """
    path = Path(folder) / MANIFEST_FILE
    if not path.exists():
        msg = (
            f"{path} does not exist: {folder} is no corpus, or its building was interrupted. Run "
            "data/build_corpus.py again with the same arguments; it goes on where it stopped."
        )
        raise FileNotFoundError(msg)
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        msg = (
            f"{path} is damaged ({error}). Delete it and run data/build_corpus.py again with the same "
            "arguments."
        )
        raise ValueError(msg) from error
    found = (manifest.get("format"), manifest.get("format_version"))
    if found != (CORPUS_FORMAT, CORPUS_FORMAT_VERSION):
        msg = (
            f"{path} is of format {found}, wanted {(CORPUS_FORMAT, CORPUS_FORMAT_VERSION)}. Build the "
            "corpus again."
        )
        raise ValueError(msg)
    return manifest


class CellDraw(NamedTuple):
    """One cell of one epoch as a sampler asks for it; corruption is a function of this and the seed alone.

    Attributes:
        cell: Index of the cell in its split.
        epoch: Number of the epoch.
        stratum: Stratum of the diffusion time, in [0, n_strata).
        n_strata: Strata in the loader batch; 1 leaves the time unstratified.
    """

    cell: int
    epoch: int = 0
    stratum: int = 0
    n_strata: int = 1


class CellBatch(NamedTuple):
    """What the corpus hands to the collator.

    Attributes:
        cells: Genes of the B cells in ranking order, all of them or as many as the corpus was told to fetch.
        draws: (B, 4) int64, the rows of `CellDraw`.
        dataset_ids: (B,) int64, the file of each cell.
        measured_genes: (files, V) bool, the genes that each file measures.
        condition_ids: (B, K) int64 category of each condition, 0 = not given; None where there are none.
    """

    cells: FlatCells
    draws: np.ndarray
    dataset_ids: np.ndarray
    measured_genes: np.ndarray
    condition_ids: np.ndarray | None = None


class CellCorpus(TorchDataset[CellBatch]):
    """One split of a corpus on disk, fetched by batches.

    Args:
        folder: Corpus folder.
        split: ``train`` or ``validation``.
        ranking_settings: ``tokenizer.ranking_settings``; a corpus made with others is refused.
        conditions: Of the network's config, name of a kept ``obs`` column (or "library_size") -> categories.
        max_genes: Genes fetched of a cell; None fetches all, which thinning and gene queries need.

    Raises:
        FileNotFoundError: If the corpus or a shard is missing.
        KeyError: If the corpus kept no column of a condition.
        ValueError: If the corpus was made with another vocabulary or other settings, a shard is not whole or
            not what was written, or the split is unknown or empty.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        *,
        ranking_settings: Mapping[str, Any],
        conditions: Mapping[str, Sequence[Any]] | None = None,
        max_genes: int | None = None,
    ) -> None:
        self.folder, self.split, self.conditions = Path(folder), split, dict(conditions or {})
        self.max_genes = max_genes
        self.manifest = read_manifest(folder)
        self.target_sum = float(self.manifest["ranking"]["target_sum"])
        self.value_kind: str = self.manifest["value_kind"]
        _check_ranking(self.folder, self.manifest["ranking"], ranking_settings)
        _check_conditions(self.folder, self.manifest, self.conditions)
        if split not in SPLITS:
            msg = f"split must be one of {', '.join(SPLITS)}, got {split!r}."
            raise ValueError(msg)
        shards = [shard for shard in self.manifest["splits"][split]["shards"] if shard["n_cells"]]
        if not shards:
            msg = (
                f"The split {split!r} of {folder} holds no cell. Build the corpus with another "
                "validation_fraction or validation_key."
            )
            raise ValueError(msg)
        is_hashed = sum(shard["n_bytes"] for shard in shards) <= HASHED_BYTES
        self._rows = ArrowRows(
            concatenate_datasets([_open_shard(self.folder, shard, is_hashed=is_hashed) for shard in shards])
        )
        self.n_genes = self._rows.list_lengths()
        vocab_size = self.manifest["vocab_size"]
        self.measured_genes = np.stack(
            [unpack_measured_genes(file["measured_genes"], vocab_size) for file in self.manifest["datasets"]]
        )  # (files, V)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def settings(self) -> dict[str, Any]:
        """Which corpus it is; a run can be resumed only with the same."""
        return {"corpus_build_hash": self.manifest["build_hash"]}

    def size_law(self, max_genes: int) -> dict[str, Any]:
        """Count how large the cells of this split are, for ``generation_config.size_law``.

        Args:
            max_genes: Genes kept of a cell.

        Returns:
            By `fit_size_law`.
        """
        sizes = self._rows.column("library_size").to_numpy() if self.value_kind == "counts" else None
        lengths = np.clip(self.n_genes, 1, max_genes)
        return fit_size_law(lengths, sizes, max_genes=max_genes, target_sum=self.target_sum)

    def __getitem__(self, draw: int | CellDraw) -> CellBatch:
        return self.__getitems__([draw])

    def __getitems__(self, draws: Sequence[int | CellDraw]) -> CellBatch:
        """Fetch a batch: the call `DataLoader` makes with all indices of a batch at once."""
        keys = np.array(
            [CellDraw(draw) if isinstance(draw, int | np.integer) else draw for draw in draws], dtype=np.int64
        )
        rows = keys[:, 0]
        amounts_name = "counts" if self.value_kind == "counts" else "expression_values"
        offsets, (token_ids, amounts) = self._rows.lists(("gene_ids", amounts_name), rows, self.max_genes)
        token_ids = token_ids.astype(np.int32)
        ids = [self._condition_ids(name, rows) for name in self.conditions]
        dataset_ids = self._rows.numbers("dataset_id", rows).astype(np.int64)
        origin = (dataset_ids, self.measured_genes, np.stack(ids, axis=1) if ids else None)
        if self.value_kind == "log1p":
            values = amounts.astype(np.float32)
            return CellBatch(FlatCells(offsets, token_ids, values, None, None), keys, *origin)
        counts = amounts.astype(np.int32)
        library_size = self._rows.numbers("library_size", rows).astype(np.float64)
        values = cell_values(offsets, counts, library_size, self.target_sum)
        return CellBatch(FlatCells(offsets, token_ids, values, counts, library_size), keys, *origin)

    def _condition_ids(self, name: str, rows: np.ndarray) -> np.ndarray:
        """(B,) int64 ids of one condition; a category that the network does not know is not given."""
        entries = self._rows.column(name).take(pa.array(rows)).to_pylist()
        return category_ids(name, entries, self.conditions, is_strict=False)

    def to_anndata(self, cells: Sequence[int], tokenizer: Any) -> Any:
        """Take cells out as an AnnData of raw counts over the genes of the vocabulary.

        Args:
            cells: Indices in the split.
            tokenizer: The corpus' tokenizer, for the names of the genes.

        Returns:
            AnnData (N, V - special tokens): X CSR counts, ``obs["library_size"]`` molecules over all genes of
            the file, ``obs["dataset"]`` and the kept columns.

        Raises:
            ValueError: If the corpus holds log1p values.
        """
        if self.value_kind != "counts":
            msg = "This corpus holds log1p values; an AnnData of counts cannot be made from it."
            raise ValueError(msg)
        flat = self.__getitems__(list(cells)).cells
        n_special = tokenizer.vocabulary.n_special_tokens
        shape = (len(cells), len(tokenizer) - n_special)
        counts = csr_matrix((flat.counts, flat.token_ids - n_special, flat.offsets), shape=shape)
        obs = pd.DataFrame([self.describe(int(cell)) for cell in cells])
        obs["library_size"] = flat.library_size
        obs.index = [f"cell_{cell}" for cell in cells]
        var = pd.DataFrame({"gene_symbols": tokenizer.vocabulary.gene_symbols[n_special:]})
        var.index = tokenizer.vocabulary.gene_ids[n_special:]
        return anndata.AnnData(counts, obs=obs, var=var)

    def describe(self, cell: int) -> dict[str, Any]:
        """Say which cell a row is: data set, row in its file and the kept ``obs`` columns.

        Args:
            cell: Index in the split.

        Returns:
            Column name -> value.
        """
        lists = ("gene_ids", "counts", "expression_values")
        names = [name for name in self._rows.column_names if name not in lists]
        described = self._rows.table(np.array([cell]), names).to_pylist()[0]
        described["dataset"] = self.manifest["datasets"][described.pop("dataset_id")]["name"]
        return described


def _check_ranking(folder: Path, corpus: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> None:
    differing = [name for name in corpus if corpus[name] != tokenizer[name]]
    if differing:
        details = ", ".join(
            f"{name}: corpus {corpus[name]}, tokenizer {tokenizer[name]}" for name in differing
        )
        msg = (
            f"The corpus {folder} was built with another tokenizer ({details}). Use the tokenizer it was "
            "built with, or build the corpus again with this one."
        )
        raise ValueError(msg)


def _check_conditions(
    folder: Path, manifest: Mapping[str, Any], conditions: Mapping[str, Sequence[Any]]
) -> None:
    kept = [*manifest["settings"]["obs_keys"], *(["library_size"] * (manifest["value_kind"] == "counts"))]
    missing = [name for name in conditions if name not in kept]
    if missing:
        msg = (
            f"The corpus {folder} has no column {', '.join(map(repr, missing))} for the conditions of the "
            f"network; it kept {', '.join(map(repr, kept)) or 'none'}. Build it again with --obs_keys "
            f"{' '.join(missing)}."
        )
        raise KeyError(msg)


def corpus_conditions(
    folder: str | Path, names: Sequence[str], *, n_depth_classes: int = 16
) -> dict[str, list[Any]]:
    """List the categories of conditions in the training cells of a corpus, for the network's config.

    Args:
        folder: Corpus folder.
        names: Kept ``obs`` columns; "library_size" asks for classes of depth.
        n_depth_classes: Classes of depth with equally many cells each, at least 2.

    Returns:
        Name -> sorted categories, or the inner edges of the depth classes in molecules.

    Raises:
        ValueError: If a column names no cell.
    """
    manifest = read_manifest(folder)
    conditions: dict[str, list[Any]] = {name: [] for name in names}
    _check_conditions(Path(folder), manifest, conditions)
    shards = [shard for shard in manifest["splits"]["train"]["shards"] if shard["n_cells"]]
    rows = concatenate_datasets([_open_shard(Path(folder), shard, is_hashed=False) for shard in shards])
    for name in names:
        column = rows.data.column(name)
        if name == "library_size":
            inner = np.linspace(0, 1, n_depth_classes + 1)[1:-1]
            edges = np.unique(np.quantile(column.to_numpy(), inner))
            conditions[name] = [float(edge) for edge in edges if edge > 0]
        else:
            conditions[name] = sorted({entry for entry in column.unique().to_pylist() if entry})
        if not conditions[name]:
            msg = f"No training cell of {folder} has an entry in {name!r}. Leave this condition out."
            raise ValueError(msg)
    return conditions


def _open_shard(folder: Path, shard: Mapping[str, Any], *, is_hashed: bool) -> Dataset:
    path = folder / shard["file"]
    repair = "Run data/build_corpus.py again with the same arguments to rebuild it."
    if not path.exists():
        msg = f"The shard {path} is missing. {repair}"
        raise FileNotFoundError(msg)
    size = path.stat().st_size
    if size != shard["n_bytes"]:
        msg = f"The shard {path} has {size:,} bytes and should have {shard['n_bytes']:,}. {repair}"
        raise ValueError(msg)
    if is_hashed and file_sha256(path) != shard["sha256"]:
        msg = f"The shard {path} does not hold what was written (SHA-256 mismatch). {repair}"
        raise ValueError(msg)
    return Dataset.from_file(str(path))
