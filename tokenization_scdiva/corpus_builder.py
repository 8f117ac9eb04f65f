"""From files of cells to an Arrow corpus, in constant memory, restartable, shard by shard.

Where a cell goes (split, shard, place in the shard) is a hash of the seed, its data set's name and its row, and of
nothing else. So cells of all files are shuffled across shards, a shard built alone has the same bytes as one built
with all others, and a second build gives the same bytes as the first.

Two passes: every input file becomes a *part* (its ranked cells in file order); then every shard gathers its rows
from the memory-mapped parts in shuffled order. Parts and shards take their final names only when whole, and what is
finished is not made again. Parts need as much disk as the shards being built, until these are done.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Value, concatenate_datasets
from datasets.arrow_writer import ArrowWriter
from tqdm import tqdm

from tokenization_scdiva.corpus import (
    CORPUS_FORMAT,
    CORPUS_FORMAT_VERSION,
    MANIFEST_FILE,
    SPLITS,
    corpus_features,
    shard_name,
)
from tokenization_scdiva.counts_scdiva import read_counts
from tokenization_scdiva.files import atomic_path, errors_name, file_sha256, open_cells, write_json
from tokenization_scdiva.genes_scdiva import check_count_overlap
from tokenization_scdiva.ranking_scdiva import FlatCells, rank_cells, select_cells, splitmix64
from tokenization_scdiva.tokenization_scdiva import ScDivaTokenizer, iter_flat_cells

logger = logging.getLogger(__name__)

ROWS_PER_WRITE = 1000
# Columns of a part that say where its rows go; they do not reach the shards.
ROUTE_COLUMNS = {"shard": Value("uint32"), "is_validation": Value("bool"), "order": Value("uint64")}
DATASET_ID_KEY = "dataset_id"


@dataclass(frozen=True)
class CorpusSettings:
    """What decides the content of a corpus, beside its files and its tokenizer.

    Attributes:
        n_shards: Shards per split.
        seed: Of the shuffle and the split.
        validation_fraction: Share of cells, or of groups of ``validation_key``, that are held out.
        validation_key: Column of ``obs`` whose groups are held out whole (a donor); ``dataset_id`` holds out files.
        validation_values: Groups to hold out; empty draws ``validation_fraction`` of them.
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
        if self.count_dtype not in ("uint16", "uint32"):
            msg = f"count_dtype must be 'uint16' or 'uint32', got {self.count_dtype!r}."
            raise ValueError(msg)
        if self.min_genes < 1:
            msg = f"min_genes must be at least 1, got {self.min_genes}; a cell without genes teaches nothing."
            raise ValueError(msg)


def build_corpus(
    files: Mapping[str, Path],
    output: str | Path,
    *,
    tokenizer: ScDivaTokenizer,
    settings: CorpusSettings,
    shards: Sequence[int] | None = None,
    show_progress: bool = True,
) -> dict[str, Any] | None:
    """Build a corpus, or some of its shards.

    Args:
        files: Data set name -> file, as `find_cell_files` returns them.
        output: Corpus folder; finished shards in it are kept.
        tokenizer: Says which genes are kept, and in which order.
        settings: See `CorpusSettings`.
        shards: Shards to build; default all. Any part of the work can be done on any machine.
        show_progress: Show a progress bar.

    Returns:
        The manifest if the corpus is now whole, else None: other shards are still to be built.

    Raises:
        KeyError: If an ``obs`` column is in none of the files, or the validation column not in all.
        ValueError: If the folder holds a corpus of other arguments, or a file is refused (the message names it).
    """
    output = Path(output)
    wanted = range(settings.n_shards) if shards is None else shards
    if any(not 0 <= shard < settings.n_shards for shard in wanted):
        msg = f"Shards must lie in [0, {settings.n_shards}), got {list(wanted)}."
        raise ValueError(msg)
    build = _build_identity(files, tokenizer, settings)
    missing = [shard for shard in wanted if not _shard_is_finished(output, shard, settings.n_shards, build)]
    if missing:
        _check_obs_keys(files, settings)
        # All wanted shards, not only the missing ones, so that parts survive an interruption between two shards.
        label = hashlib.sha256(json.dumps([build["hash"], list(wanted)]).encode()).hexdigest()[:16]
        parts_folder = output / f".parts-{label}"
        n_cells = {name: _n_cells(path) for name, path in files.items()}
        bar = tqdm(total=sum(n_cells.values()), unit=" cells", desc="tokenize", disable=not show_progress)
        reports = []
        for dataset_id, (name, path) in enumerate(files.items()):
            part = _Part(parts_folder, name, dataset_id, path, frozenset(wanted))
            reports.append(part.make(tokenizer, settings, bar))
        bar.close()
        rows = _open_parts(parts_folder, reports)
        for shard in tqdm(missing, unit=" shards", desc="shuffle", disable=not show_progress):
            _write_shard(output, shard, rows, reports, build, settings, len(tokenizer.vocabulary))
        del rows
        shutil.rmtree(parts_folder)
    return _write_manifest(output, build, settings)


def _build_identity(
    files: Mapping[str, Path], tokenizer: ScDivaTokenizer, settings: CorpusSettings
) -> dict[str, Any]:
    """Everything that decides the bytes of the shards, and its hash."""
    identity: dict[str, Any] = {
        "format": CORPUS_FORMAT,
        "format_version": CORPUS_FORMAT_VERSION,
        "ranking": tokenizer.ranking_settings,
        "settings": asdict(settings) | {"validation_values": list(settings.validation_values)},
        "value_kind": "log1p" if settings.expression_is_log1p else "counts",
        "files": {name: [path.name, path.stat().st_size if path.is_file() else 0] for name, path in files.items()},
    }
    text = json.dumps(identity, sort_keys=True)
    return identity | {"hash": hashlib.sha256(text.encode()).hexdigest()}


def _sidecar(output: Path, shard: int, n_shards: int) -> Path:
    return output / f"shard-{shard:05d}-of-{n_shards:05d}.json"


def _shard_is_finished(output: Path, shard: int, n_shards: int, build: Mapping[str, Any]) -> bool:
    path = _sidecar(output, shard, n_shards)
    if not path.exists():
        others = sorted(output.glob("shard-*.json")) if output.exists() else []
        if others and f"-of-{n_shards:05d}.json" not in others[0].name:
            msg = f"{output} holds shards of another number ({others[0].name}). Choose another folder or delete it."
            raise ValueError(msg)
        return False
    sidecar = json.loads(path.read_text("utf-8"))
    if sidecar["build_hash"] != build["hash"]:
        msg = (
            f"{output} holds a corpus built from other files, another tokenizer or other settings ({path.name} says "
            f"{sidecar['build_hash'][:12]}, now {build['hash'][:12]}). Choose another folder or delete this one."
        )
        raise ValueError(msg)
    files = [(output / entry["file"], entry["n_bytes"]) for entry in sidecar["shards"].values()]
    return all(file.exists() and file.stat().st_size == n_bytes for file, n_bytes in files)


def _n_cells(path: Path) -> int:
    with open_cells(path) as adata:
        return adata.n_obs


def _check_obs_keys(files: Mapping[str, Path], settings: CorpusSettings) -> None:
    columns: dict[str, list[str]] = {}
    for name, path in files.items():
        with open_cells(path) as adata:
            columns[name] = [str(column) for column in adata.obs.columns]
    everywhere = sorted({column for present in columns.values() for column in present})
    for key in settings.obs_keys:
        if key not in everywhere:
            msg = f"No file has the obs column {key!r}. Columns there are: {', '.join(everywhere)}."
            raise KeyError(msg)
    key = settings.validation_key
    lacking = [name for name, present in columns.items() if key not in present]
    if key not in (None, DATASET_ID_KEY) and lacking:
        msg = f"The validation column {key!r} is missing in {lacking[0]!r}, which has: {', '.join(columns[lacking[0]])}."
        raise KeyError(msg)


@dataclass(frozen=True)
class _Part:
    """One input file on its way into the shards."""

    folder: Path
    name: str
    dataset_id: int
    path: Path
    shards: frozenset[int]

    def make(self, tokenizer: ScDivaTokenizer, settings: CorpusSettings, bar: tqdm) -> dict[str, Any]:
        """Tokenize the file unless that is done, and return its report."""
        report_path = self.folder / f"{self.name}.json"
        if report_path.exists():
            report = json.loads(report_path.read_text("utf-8"))
            bar.update(report["n_cells"])
            return report
        part_path = self.folder / f"{self.name}.arrow"
        with errors_name(self.path), open_cells(self.path) as adata, atomic_path(part_path) as partial:
            report = self._write(adata, partial, tokenizer, settings, bar)
        write_json(report_path, report)
        return report

    def _write(
        self, adata: anndata.AnnData, partial: Path, tokenizer: ScDivaTokenizer, settings: CorpusSettings, bar: tqdm
    ) -> dict[str, Any]:
        counts = read_counts(
            adata, layer=settings.layer, expression_is_log1p=settings.expression_is_log1p, block_size=ROWS_PER_WRITE
        )
        match = tokenizer.match_genes(
            adata, counts, gene_id_key=settings.gene_id_key, min_gene_overlap=settings.min_gene_overlap
        )
        routes = _routes(self.name, adata, settings)
        features = _features(counts.kind, settings, len(tokenizer.vocabulary))
        obs = {key: _text_column(adata, key) for key in settings.obs_keys}
        weights, matched, total, n_kept, n_written = tokenizer.ranking_weights, 0.0, 0.0, 0, 0
        with ArrowWriter(features=Features(features | ROUTE_COLUMNS), path=str(partial)) as writer:
            for start, cells, block_total in iter_flat_cells(
                counts, match.token_ids, target_sum=tokenizer.target_sum
            ):
                rows = np.arange(start, start + cells.n_cells)
                amounts = cells.values if cells.counts is None else cells.counts
                matched, total = matched + float(amounts.sum(dtype=np.float64)), total + block_total
                is_kept = cells.n_genes >= settings.min_genes
                n_kept += int(is_kept.sum())
                is_kept &= np.isin(routes["shard"][rows], list(self.shards))
                ranked = rank_cells(
                    select_cells(cells, is_kept),
                    gene_order=tokenizer.gene_order, ranking_weights=weights, max_genes=None,
                )  # fmt: skip
                columns = _row_columns(ranked, rows[is_kept], self.dataset_id, settings, adata.obs_names)
                columns |= {key: pa.array(column[rows[is_kept]]) for key, column in obs.items()}
                columns |= {key: pa.array(route[rows[is_kept]]) for key, route in routes.items()}
                if ranked.n_cells:
                    writer.write_table(pa.table(columns))
                n_written += ranked.n_cells
                bar.update(len(rows))
            if n_written == 0:  # an Arrow file needs a schema even without rows
                writer.write_table(Features(features | ROUTE_COLUMNS).arrow_schema.empty_table())
            writer.finalize()
        check_count_overlap(match.report, matched, total, min_count_overlap=settings.min_count_overlap)
        n_dropped = counts.n_cells - n_kept
        return {
            "name": self.name,
            "file": self.path.name,
            "source": counts.source,
            "n_cells": counts.n_cells,
            "n_cells_kept": n_kept,
            "n_cells_dropped": {f"fewer than {settings.min_genes} vocabulary genes": n_dropped} if n_dropped else {},
            "genes": match.report.to_dict(),
            "matched_fraction_of_counts": matched / total if total else 0.0,
            "n_rows": n_written,
        }


def _features(value_kind: str, settings: CorpusSettings, vocab_size: int) -> Features:
    return corpus_features(
        value_kind=value_kind, vocab_size=vocab_size, count_dtype=settings.count_dtype, obs_keys=settings.obs_keys
    )


def _text_column(adata: anndata.AnnData, key: str) -> np.ndarray:
    """Return an ``obs`` column as text with None where it is missing."""
    if key not in adata.obs:
        return np.full(adata.n_obs, None, dtype=object)
    column = adata.obs[key].astype(object)
    return column.where(column.notna(), None).map(lambda entry: entry if entry is None else str(entry)).to_numpy()


def _routes(name: str, adata: anndata.AnnData, settings: CorpusSettings) -> dict[str, np.ndarray]:
    """Say for every cell of a file which split, shard and place it gets, from hashes alone."""
    cells = splitmix64(np.arange(adata.n_obs, dtype=np.uint64) + _text_hash(f"{settings.seed}/{name}"))
    shard = (splitmix64(cells ^ np.uint64(1)) >> np.uint64(32)) % np.uint64(settings.n_shards)
    if settings.validation_key is None:
        is_validation = _uniform(splitmix64(cells ^ np.uint64(2))) < settings.validation_fraction
    else:
        by_file = settings.validation_key == DATASET_ID_KEY
        groups = np.full(adata.n_obs, name) if by_file else adata.obs[settings.validation_key].astype(str).to_numpy()
        is_validation = np.isin(groups, _held_out_groups(set(groups), settings))
    return {
        "shard": shard.astype(np.uint32),
        "is_validation": is_validation,
        "order": splitmix64(cells ^ np.uint64(3)),
    }


def _held_out_groups(groups: Iterable[str], settings: CorpusSettings) -> list[str]:
    if settings.validation_values:
        return list(settings.validation_values)
    hashes = {group: _text_hash(f"{settings.seed}/group/{group}") for group in groups}
    return [group for group, word in hashes.items() if _uniform(word) < settings.validation_fraction]


def _text_hash(text: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little"))


def _uniform(words: Any) -> Any:
    return (words >> np.uint64(11)) * 2.0**-53


def _row_columns(
    cells: FlatCells, rows: np.ndarray, dataset_id: int, settings: CorpusSettings, obs_names: Any
) -> dict[str, pa.Array]:
    offsets = pa.array(cells.offsets.astype(np.int32))
    token_ids = pa.array(cells.token_ids.astype(np.uint32))
    columns: dict[str, Any] = {"gene_ids": pa.ListArray.from_arrays(offsets, token_ids)}
    if cells.counts is None or cells.library_size is None:
        values = pa.array(cells.values.astype(np.float16))
        columns["expression_values"] = pa.ListArray.from_arrays(offsets, values)
    else:
        largest = np.iinfo(settings.count_dtype).max
        if cells.counts.max(initial=0) > largest:
            entry = int(cells.counts.argmax())
            cell = rows[np.searchsorted(cells.offsets, entry, side="right") - 1]
            msg = (
                f"The cell {str(obs_names[cell])!r} has {cells.counts[entry]:,} molecules of one gene, more than "
                f"{settings.count_dtype} holds ({largest:,}). Build this corpus with count_dtype 'uint32'."
            )
            raise ValueError(msg)
        columns["counts"] = pa.ListArray.from_arrays(offsets, pa.array(cells.counts))
        columns["library_size"] = pa.array(cells.library_size.astype(np.float32))
    columns["dataset_id"] = pa.array(np.full(cells.n_cells, dataset_id, dtype=np.uint16))
    columns["cell_index"] = pa.array(rows.astype(np.uint32))
    return columns


def _open_parts(folder: Path, reports: Sequence[Mapping[str, Any]]) -> Dataset | None:
    files = [folder / f"{report['name']}.arrow" for report in reports if report["n_rows"]]
    return concatenate_datasets([Dataset.from_file(str(file)) for file in files]) if files else None


def _write_shard(
    output: Path,
    shard: int,
    rows: Dataset | None,
    reports: Sequence[Mapping[str, Any]],
    build: Mapping[str, Any],
    settings: CorpusSettings,
    vocab_size: int,
) -> None:
    features = _features(build["value_kind"], settings, vocab_size)
    routes = {name: rows.data.column(name).to_numpy() if rows else np.empty(0) for name in ROUTE_COLUMNS}
    written = {}
    for split in SPLITS:
        is_here = (routes["shard"] == shard) & (routes["is_validation"] == (split == "validation"))
        here = np.flatnonzero(is_here)
        here = here[np.argsort(routes["order"][here], kind="stable")]
        path = output / shard_name(split, shard, settings.n_shards)
        with atomic_path(path) as partial:
            with ArrowWriter(features=features, path=str(partial)) as writer:
                for start in range(0, len(here), ROWS_PER_WRITE):
                    indices = here[start : start + ROWS_PER_WRITE].tolist()
                    table = rows.with_format("arrow")[indices].select(list(features))  # type: ignore[union-attr]
                    writer.write_table(table.combine_chunks().replace_schema_metadata(None))
                if len(here) == 0:
                    writer.write_table(features.arrow_schema.empty_table())
                writer.finalize()
            n_bytes, sha256 = partial.stat().st_size, file_sha256(partial)
        written[split] = {"file": path.name, "n_cells": len(here), "n_bytes": n_bytes, "sha256": sha256}
    datasets = [{key: value for key, value in report.items() if key != "n_rows"} for report in reports]
    write_json(
        _sidecar(output, shard, settings.n_shards),
        {"build_hash": build["hash"], "shards": written, "datasets": datasets},
    )


def _write_manifest(output: Path, build: Mapping[str, Any], settings: CorpusSettings) -> dict[str, Any] | None:
    paths = [_sidecar(output, shard, settings.n_shards) for shard in range(settings.n_shards)]
    if not all(path.exists() for path in paths):
        return None
    sidecars = [json.loads(path.read_text("utf-8")) for path in paths]
    manifest = {key: build[key] for key in ("format", "format_version", "ranking", "settings", "value_kind")}
    manifest |= {"build_hash": build["hash"], "datasets": sidecars[0]["datasets"], "splits": {}}
    for split in SPLITS:
        shards = [sidecar["shards"][split] for sidecar in sidecars]
        manifest["splits"][split] = {"n_cells": sum(shard["n_cells"] for shard in shards), "shards": shards}
    write_json(output / MANIFEST_FILE, manifest)
    return manifest
