"""From files of cells to an Arrow corpus, in constant memory, restartable, shard by shard.

Where a cell goes (split, shard, place in the shard) is a hash of the seed, its data set's name and its row,
and of nothing else. So cells of all files are shuffled across shards, a shard built alone has the same bytes
as one built with all others, and a second build gives the same bytes as the first.

Two passes: every input file becomes a *part* (its ranked cells in file order); then every shard gathers its
rows from the memory-mapped parts in shuffled order. Parts and shards take their final names only when whole,
and what is finished is not made again. Parts need as much disk as the shards being built, until these are
done. Memory holds 13 bytes a cell for the shuffle, and else one block of cells.

A finished corpus knows its input files by name and size: after changing a file in place, build into another
folder.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, concatenate_datasets
from datasets.arrow_writer import ArrowWriter
from tqdm import tqdm

from tokenization_scdiva.arrow_rows import ArrowRows
from tokenization_scdiva.corpus import (
    CORPUS_FORMAT,
    CORPUS_FORMAT_VERSION,
    MANIFEST_FILE,
    SPLITS,
    corpus_features,
    shard_name,
)
from tokenization_scdiva.corpus_plan import (
    ROUTE_COLUMNS,
    CorpusSettings,
    cell_routes,
    check_obs_keys,
    held_out_groups,
    outline_file,
)
from tokenization_scdiva.counts_scdiva import read_counts
from tokenization_scdiva.engines import Engine, Progress, run_serially
from tokenization_scdiva.files import (
    atomic_path,
    errors_name,
    file_sha256,
    file_stamp,
    open_cells,
    remove_partials,
    write_json,
)
from tokenization_scdiva.gene_queries import pack_measured_genes
from tokenization_scdiva.genes_scdiva import check_count_overlap
from tokenization_scdiva.ranking_scdiva import (
    FlatCells,
    iter_flat_cells,
    rank_cells,
    select_cells,
)
from tokenization_scdiva.tokenization_scdiva import ScDivaTokenizer

logger = logging.getLogger(__name__)

ROWS_PER_WRITE = 1000


def build_corpus(
    files: Mapping[str, Path],
    output: str | Path,
    *,
    tokenizer: ScDivaTokenizer,
    settings: CorpusSettings,
    shards: Sequence[int] | None = None,
    run_units: Engine = run_serially,
    show_progress: bool = True,
) -> dict[str, Any] | None:
    """Build a corpus, or some of its shards, with its tokenizer in the folder ``tokenizer``.

    Args:
        files: Data set name -> file, as `find_cell_files` returns them.
        output: Corpus folder; finished shards in it are kept.
        tokenizer: Says which genes are kept, and in which order.
        settings: See `CorpusSettings`.
        shards: Shards to build; default all. Any part of the work can be done on any machine.
        run_units: Runs first the files, then the shards: `run_serially`, or `run_on_ray` for a cluster. Equal
            bytes, equal errors.
        show_progress: Show a progress bar.

    Returns:
        The manifest if the corpus is now whole, else None: other shards are still to be built.

    Raises:
        ValueError: If there is no such shard, or the folder holds a corpus of other arguments. A file that
            is damaged or refused raises what its reader raises, with its path in the message.
    """
    output = Path(output).absolute()  # workers may run in another folder
    wanted = range(settings.n_shards) if shards is None else sorted(set(shards))
    if any(not 0 <= shard < settings.n_shards for shard in wanted):
        msg = f"Shards must lie in [0, {settings.n_shards}), got {list(wanted)}."
        raise ValueError(msg)
    build = _build_identity(files, tokenizer, settings)
    _refuse_other_corpus(output, settings.n_shards, build)
    missing = [shard for shard in wanted if not _shard_is_finished(output, shard, settings.n_shards)]
    if missing:
        outlines = {name: outline_file(name, path, settings.validation_key) for name, path in files.items()}
        check_obs_keys(outlines, settings)
        held_out = held_out_groups(outlines, settings)
        # All wanted shards, not only the missing ones: parts survive an interruption between two shards.
        label = hashlib.sha256(json.dumps([build["hash"], list(wanted)]).encode()).hexdigest()[:16]
        folder = output / f".parts-{label}"
        n_cells = sum(outline.n_cells for outline in outlines.values())
        units = [
            _Part(folder, name, i, path, frozenset(wanted), held_out)
            for i, (name, path) in enumerate(files.items())
        ]
        make = partial(_make_part, tokenizer=tokenizer, settings=settings)
        with tqdm(total=n_cells, unit=" cells", desc="tokenize", disable=not show_progress) as bar:
            reports = list(run_units(make, units, bar))
        parts = _Parts.open(folder, reports)
        features = _features(build["value_kind"], settings, len(tokenizer.vocabulary))
        write = partial(_make_shard, output=output, content=(parts, build, settings, features))
        with tqdm(total=len(missing), unit=" shards", desc="shuffle", disable=not show_progress) as bar:
            for _ in run_units(write, missing, bar):
                pass
        del parts, write
        shutil.rmtree(folder, ignore_errors=True)
    _save_tokenizer(tokenizer, output / "tokenizer")
    manifest = _write_manifest(output, build, settings)
    if manifest is not None:
        for leftover in output.glob(".parts-*"):  # of interrupted builds of other shards
            shutil.rmtree(leftover, ignore_errors=True)
    return manifest


def _build_identity(
    files: Mapping[str, Path], tokenizer: ScDivaTokenizer, settings: CorpusSettings
) -> dict[str, Any]:
    """Everything that decides the bytes of the shards, and its hash."""
    identity: dict[str, Any] = {
        "format": CORPUS_FORMAT,
        "format_version": CORPUS_FORMAT_VERSION,
        "vocab_size": len(tokenizer.vocabulary),
        "ranking": tokenizer.ranking_settings,
        "settings": {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(settings).items()
        },
        "value_kind": "log1p" if settings.expression_is_log1p else "counts",
        "files": {name: [path.name, file_stamp(path)] for name, path in files.items()},
    }
    text = json.dumps(identity, sort_keys=True)
    return identity | {"hash": hashlib.sha256(text.encode()).hexdigest()}


def _save_tokenizer(tokenizer: ScDivaTokenizer, folder: Path) -> None:
    """Write the tokenizer file by file, so that builders of other shards may do it at the same time."""
    with tempfile.TemporaryDirectory() as written:
        tokenizer.save_pretrained(written)
        for path in sorted(Path(written).iterdir()):
            with atomic_path(folder / path.name) as partial:
                shutil.copyfile(path, partial)


def _sidecar(output: Path, shard: int, n_shards: int) -> Path:
    return output / f"shard-{shard:05d}-of-{n_shards:05d}.json"


def _refuse_other_corpus(output: Path, n_shards: int, build: Mapping[str, Any]) -> None:
    """Refuse a folder with shards of another build, also where these are not the wanted ones."""
    for path in sorted(output.glob("shard-*.json")):
        if not path.name.endswith(f"-of-{n_shards:05d}.json"):
            msg = (
                f"{output} holds shards of another number ({path.name}). Choose another folder or delete it."
            )
            raise ValueError(msg)
        found = json.loads(path.read_text("utf-8"))["build_hash"]
        if found != build["hash"]:
            msg = (
                f"{output} holds a corpus built from other files, another tokenizer or other settings "
                f"({path.name} says {found[:12]}, now {build['hash'][:12]}). Choose another folder or delete "
                "this one."
            )
            raise ValueError(msg)


def _shard_is_finished(output: Path, shard: int, n_shards: int) -> bool:
    path = _sidecar(output, shard, n_shards)
    if not path.exists():
        return False
    sidecar = json.loads(path.read_text("utf-8"))
    files = [(output / entry["file"], entry) for entry in sidecar["shards"].values()]
    return all(
        file.exists() and file.stat().st_size == entry["n_bytes"] and file_sha256(file) == entry["sha256"]
        for file, entry in files
    )


@dataclass(frozen=True)
class _Part:
    """One input file on its way into the shards."""

    folder: Path
    name: str
    dataset_id: int
    path: Path
    shards: frozenset[int]
    held_out: tuple[str, ...]

    def make(self, tokenizer: ScDivaTokenizer, settings: CorpusSettings, bar: Any) -> dict[str, Any]:
        """Tokenize the file unless that is done, and return its report."""
        report_path = self.folder / f"{self.name}.json"
        if report_path.exists():
            report = json.loads(report_path.read_text("utf-8"))
            bar.update(report["n_cells"])
            return report
        part_path = self.folder / f"{self.name}.arrow"
        remove_partials(part_path)
        with open_cells(self.path) as adata, errors_name(self.path), atomic_path(part_path) as partial:
            report = self._write(adata, partial, tokenizer, settings, bar)
        write_json(report_path, report)
        return report

    def _write(
        self,
        adata: anndata.AnnData,
        partial: Path,
        tokenizer: ScDivaTokenizer,
        settings: CorpusSettings,
        bar: tqdm,
    ) -> dict[str, Any]:
        counts = read_counts(
            adata,
            layer=settings.layer,
            expression_is_log1p=settings.expression_is_log1p,
            block_size=ROWS_PER_WRITE,
        )
        match = tokenizer.match_genes(
            adata, counts, gene_id_key=settings.gene_id_key, min_gene_overlap=settings.min_gene_overlap
        )
        routes = cell_routes(self.name, adata, settings, self.held_out)
        is_wanted = np.isin(routes["route/shard"], list(self.shards))
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
                is_kept &= is_wanted[rows]
                ranked = rank_cells(
                    select_cells(cells, is_kept),
                    gene_order=tokenizer.gene_order, ranking_weights=weights, max_genes=None,
                )  # fmt: skip
                columns = _row_columns(ranked, rows[is_kept], self.dataset_id, features, adata.obs_names)
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
        reason, n_dropped = f"fewer than {settings.min_genes} vocabulary genes", counts.n_cells - n_kept
        return {
            "name": self.name,
            "file": self.path.name,
            "source": counts.source,
            "n_cells": counts.n_cells,
            "n_cells_kept": n_kept,
            "n_cells_dropped": {reason: n_dropped} if n_dropped else {},
            "genes": match.report.to_dict(),
            "measured_genes": pack_measured_genes(match.token_ids, len(tokenizer.vocabulary)),
            "matched_fraction_of_counts": matched / total if total else 0.0,
            "n_rows": n_written,
        }


def _make_part(
    part: _Part, bar: Progress, *, tokenizer: ScDivaTokenizer, settings: CorpusSettings
) -> dict[str, Any]:
    """One unit of the first pass: a file becomes a part."""
    return part.make(tokenizer, settings, bar)


def _features(value_kind: str, settings: CorpusSettings, vocab_size: int) -> Features:
    return corpus_features(
        value_kind=value_kind,
        vocab_size=vocab_size,
        count_dtype=settings.count_dtype,
        obs_keys=settings.obs_keys,
    )


def _text_column(adata: anndata.AnnData, key: str) -> np.ndarray:
    """Return an ``obs`` column as text with None where it is missing."""
    if key not in adata.obs:
        return np.full(adata.n_obs, None, dtype=object)
    column = adata.obs[key].astype(object)
    return (
        column.where(column.notna(), None)
        .map(lambda entry: entry if entry is None else str(entry))
        .to_numpy()
    )


def _row_columns(
    cells: FlatCells, rows: np.ndarray, dataset_id: int, features: Features, obs_names: Any
) -> dict[str, pa.Array]:
    """Make the columns of cells in the very types of the schema, so that the writer casts nothing."""
    offsets = pa.array(cells.offsets.astype(np.int32))

    def lists(name: str, entries: np.ndarray) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, pa.array(entries.astype(features[name].feature.dtype)))

    columns: dict[str, Any] = {"gene_ids": lists("gene_ids", cells.token_ids)}
    if cells.counts is None or cells.library_size is None:
        columns["expression_values"] = lists("expression_values", cells.values)
    else:
        count_dtype = features["counts"].feature.dtype
        largest = np.iinfo(count_dtype).max
        if cells.counts.max(initial=0) > largest:
            entry = int(cells.counts.argmax())
            cell = rows[np.searchsorted(cells.offsets, entry, side="right") - 1]
            msg = (
                f"The cell {str(obs_names[cell])!r} has {cells.counts[entry]:,} molecules of one gene, more "
                f"than {count_dtype} holds ({largest:,}). Build this corpus with count_dtype 'uint32'."
            )
            raise ValueError(msg)
        columns["counts"] = lists("counts", cells.counts)
        columns["library_size"] = pa.array(cells.library_size.astype(np.float32))
    columns["dataset_id"] = pa.array(np.full(cells.n_cells, dataset_id, dtype=np.uint16))
    columns["cell_index"] = pa.array(rows.astype(np.uint32))
    return columns


@dataclass(frozen=True)
class _Parts:
    """All parts of a build: their rows, memory-mapped, where these go, and the reports of their files."""

    rows: ArrowRows | None
    routes: dict[str, np.ndarray]
    reports: list[dict[str, Any]]

    @classmethod
    def open(cls, folder: Path, reports: list[dict[str, Any]]) -> "_Parts":
        files = [folder / f"{report['name']}.arrow" for report in reports if report["n_rows"]]
        if not files:
            return cls(None, {name: np.empty(0) for name in ROUTE_COLUMNS}, reports)
        rows = ArrowRows(concatenate_datasets([Dataset.from_file(str(file)) for file in files]))
        return cls(rows, {name: rows.column(name).to_numpy() for name in ROUTE_COLUMNS}, reports)

    def rows_of(self, shard: int, *, is_validation: bool) -> np.ndarray:
        """Rows of one file of a shard, shuffled."""
        row_shard, row_is_validation, order = self.routes.values()
        rows = np.flatnonzero((row_shard == shard) & (row_is_validation == is_validation))
        return rows[np.argsort(order[rows], kind="stable")]


def _write_shard(
    output: Path,
    shard: int,
    parts: _Parts,
    build: Mapping[str, Any],
    settings: CorpusSettings,
    features: Features,
) -> None:
    written = {}
    for split in SPLITS:
        rows = parts.rows_of(shard, is_validation=split == "validation")
        path = output / shard_name(split, shard, settings.n_shards)
        remove_partials(path)
        with atomic_path(path) as partial:
            with ArrowWriter(features=features, path=str(partial)) as writer:
                for start in range(0, len(rows), ROWS_PER_WRITE):
                    some = rows[start : start + ROWS_PER_WRITE]
                    writer.write_table(parts.rows.table(some, list(features)))  # type: ignore[union-attr]
                if len(rows) == 0:
                    writer.write_table(features.arrow_schema.empty_table())
                writer.finalize()
            n_bytes, sha256 = partial.stat().st_size, file_sha256(partial)
        written[split] = {"file": path.name, "n_cells": len(rows), "n_bytes": n_bytes, "sha256": sha256}
    datasets = [{key: value for key, value in report.items() if key != "n_rows"} for report in parts.reports]
    write_json(
        _sidecar(output, shard, settings.n_shards),
        {"build_hash": build["hash"], "shards": written, "datasets": datasets},
    )


def _make_shard(shard: int, bar: Progress, *, output: Path, content: tuple[Any, ...]) -> None:
    """One unit of the second pass: a shard gathers its rows from the parts."""
    _write_shard(output, shard, *content)
    bar.update(1)


def _write_manifest(
    output: Path, build: Mapping[str, Any], settings: CorpusSettings
) -> dict[str, Any] | None:
    paths = [_sidecar(output, shard, settings.n_shards) for shard in range(settings.n_shards)]
    if not all(path.exists() for path in paths):
        return None
    sidecars = [json.loads(path.read_text("utf-8")) for path in paths]
    kept = ("format", "format_version", "ranking", "settings", "value_kind", "vocab_size")
    manifest = {key: build[key] for key in kept}
    manifest |= {"build_hash": build["hash"], "datasets": sidecars[0]["datasets"], "splits": {}}
    for split in SPLITS:
        shards = [sidecar["shards"][split] for sidecar in sidecars]
        manifest["splits"][split] = {"n_cells": sum(shard["n_cells"] for shard in shards), "shards": shards}
    write_json(output / MANIFEST_FILE, manifest)
    return manifest
