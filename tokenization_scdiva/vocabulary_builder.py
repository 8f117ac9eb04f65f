"""From files of cells to a gene vocabulary with population entropies, in constant memory.

Two passes: the first collects gene names and settles which entries of which file are one gene; the second
streams the cells into one histogram per gene. A cell counts for a gene only where its file measures that
gene: unmeasured is not zero.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anndata
import numpy as np
from tqdm import tqdm

from tokenization_scdiva.counts_scdiva import Counts, read_counts
from tokenization_scdiva.engines import Engine, Progress, run_serially
from tokenization_scdiva.files import errors_name, open_cells
from tokenization_scdiva.gene_entropy import GeneEntropy
from tokenization_scdiva.gene_table import GeneTable, canonical_genes
from tokenization_scdiva.genes_scdiva import (
    check_gene_overlap,
    clean_name,
    ensembl_id,
    ensembl_prefix,
    find_genes,
    gene_name_columns,
    likely_species,
    match_genes,
)
from tokenization_scdiva.ranking_scdiva import TARGET_SUM, iter_flat_cells
from tokenization_scdiva.vocabulary_scdiva import GeneVocabulary

logger = logging.getLogger(__name__)


def build_vocabulary(  # noqa: PLR0913 (the arguments of data/build_vocabulary.py)
    files: Mapping[str, Path],
    *,
    gene_table: GeneTable | None = None,
    layer: str | None = None,
    gene_id_key: str | None = None,
    expression_is_log1p: bool = False,
    target_sum: float = TARGET_SUM,
    min_cells: int = 1,
    n_genes: int | None = None,
    keep_genes: Sequence[str] = (),
    min_gene_overlap: float = 0.1,
    run_units: Engine = run_serially,
    show_progress: bool = True,
) -> tuple[GeneVocabulary, list[dict[str, Any]]]:
    """Build a vocabulary from all genes of some files.

    A file that is refused stops the build; the message names it. Refused are also, with a table, files that
    share too few genes with it, and, without one, Ensembl ids of several species.

    Args:
        files: Data set name -> file, as `find_cell_files` returns them.
        gene_table: What names mean; entries it does not know are left out and counted. None takes names as
            written.
        layer: Layer with the counts; default see `read_counts`.
        gene_id_key: Column of ``var`` with gene ids; default all known ones.
        expression_is_log1p: The files hold log1p values instead of counts.
        target_sum: Molecules to which every cell is scaled; the tokenizer must use the same.
        min_cells: Genes seen in fewer cells are left out.
        n_genes: Keep only this many genes, those whose log1p expression varies most over all cells. For small
            models.
        keep_genes: Names of genes to keep on top of these, such as the panel and the targets of a screen,
            whatever ``n_genes`` and ``min_cells`` say. A warning and ``source["keep_genes_missing"]`` tell
            those that no cell expresses.
        min_gene_overlap: Least share of a file's genes that the table must know.
        run_units: Runs the second pass over the files: `run_serially`, or `run_on_ray` for a cluster. Equal
            results.
        show_progress: Show a progress bar.

    Returns:
        The vocabulary, and one report per file: cells, matched genes, entries left out.
    """
    reading = _Reading(layer, gene_id_key, expression_is_log1p)
    candidates, reports = _collect_genes(files, gene_table, reading, min_gene_overlap)
    entropy = GeneEntropy(candidates.n_genes, target_sum=target_sum)
    n_cells = sum(report["n_cells"] for report in reports)
    of_file = partial(_file_entropy, candidates=candidates, reading=reading, target_sum=target_sum)
    with tqdm(total=n_cells, unit=" cells", disable=not show_progress) as bar:
        for histograms in run_units(of_file, list(files.values()), bar):
            entropy.merge(histograms)
    wanted, missing = _wanted_genes(keep_genes, entropy, candidates)
    kept = np.union1d(_kept_genes(entropy, min_cells=min_cells, n_genes=n_genes), wanted)
    ids = [candidates.gene_ids[candidates.n_special_tokens + gene] for gene in kept]
    symbols = [candidates.gene_symbols[candidates.n_special_tokens + gene] for gene in kept]
    aliases: Mapping[str, str] = {}
    if gene_table is not None:
        symbols, aliases = gene_table.names_for_vocabulary(ids)
    source = {
        "datasets": [report["name"] for report in reports],
        "n_cells": entropy.n_cells,
        "target_sum": target_sum,
        "n_bins": entropy.n_bins,
        "value_kind": "log1p" if expression_is_log1p else "counts",
        "min_cells": min_cells,
        "n_genes_requested": n_genes,
        "n_genes_found": candidates.n_genes,
        "n_keep_genes": len(keep_genes),
        "keep_genes_missing": missing,
    }
    vocabulary = GeneVocabulary(
        ids, symbols, aliases=aliases, gene_entropy=entropy.entropy()[kept], source=source
    )
    return vocabulary, reports


@dataclass(frozen=True)
class _Reading:
    """How every file is read."""

    layer: str | None
    gene_id_key: str | None
    expression_is_log1p: bool

    @contextmanager
    def open(self, path: Path) -> Iterator[tuple[anndata.AnnData, Counts, dict[str, list[str | None]]]]:
        with open_cells(path) as adata, errors_name(path):
            counts = read_counts(adata, layer=self.layer, expression_is_log1p=self.expression_is_log1p)
            names = gene_name_columns(adata, use_raw=counts.use_raw, gene_id_key=self.gene_id_key)
            yield adata, counts, names


def _collect_genes(
    files: Mapping[str, Path], gene_table: GeneTable | None, reading: _Reading, min_gene_overlap: float
) -> tuple[GeneVocabulary, list[dict[str, Any]]]:
    """Settle all genes of all files, and report what became of the entries of each file."""
    symbols: dict[str, str] = {}
    reports = []
    known = None if gene_table is None else _vocabulary_of(gene_table, gene_table.symbols)
    species: dict[str, list[Path]] = defaultdict(list)
    for name, path in files.items():
        with reading.open(path) as (adata, counts, columns):
            gene_ids, report = canonical_genes(columns, gene_table)
            if known is None:
                _refuse_second_species(species, gene_ids, path)
            else:
                check_gene_overlap(
                    report, columns, known, min_gene_overlap=min_gene_overlap, cell_names=adata.obs_names,
                    called="gene table",
                )  # fmt: skip
            reports.append(
                {"name": name, "n_cells": counts.n_cells, "source": counts.source, "genes": report.to_dict()}
            )
        for gene_id, *names in zip(gene_ids, *columns.values(), strict=True):
            # The first symbol that any file gives; until then the id stands for it.
            if gene_id is not None and symbols.get(gene_id, gene_id) == gene_id:
                symbols[gene_id] = next((n for n in names if n and not ensembl_id(n)), gene_id)
    if gene_table is not None:
        return _vocabulary_of(gene_table, sorted(symbols)), reports
    # A gene known by symbol alone is the one gene that has this symbol and an Ensembl id, if there is one.
    n_owners = Counter(symbol for gene_id, symbol in symbols.items() if ensembl_id(gene_id))
    ids = sorted(gene_id for gene_id in symbols if ensembl_id(gene_id) or n_owners[gene_id] != 1)
    return GeneVocabulary(ids, [symbols[gene_id] for gene_id in ids]), reports


def _vocabulary_of(gene_table: GeneTable, gene_ids: Iterable[str]) -> GeneVocabulary:
    ids = list(gene_ids)
    symbols, aliases = gene_table.names_for_vocabulary(ids)
    return GeneVocabulary(ids, symbols, aliases=aliases)


def _refuse_second_species(
    species: dict[str, list[Path]], gene_ids: Sequence[str | None], path: Path
) -> None:
    examples = {ensembl_prefix(gene_id): gene_id for gene_id in gene_ids if gene_id and ensembl_id(gene_id)}
    for gene_id in examples.values():
        species[str(likely_species([gene_id]))].append(path)
    if len(species) > 1:
        found = "; ".join(f"{name} in {', '.join(map(str, paths[:3]))}" for name, paths in species.items())
        msg = (
            f"The Ensembl ids are of several species: {found}. Build one vocabulary per species, or map the "
            "genes to orthologs first."
        )
        raise ValueError(msg)


def _file_entropy(
    path: Path, bar: Progress, *, candidates: GeneVocabulary, reading: _Reading, target_sum: float
) -> GeneEntropy:
    """One unit of the second pass: the histograms of a file, in which only genes it measures have zeros."""
    entropy = GeneEntropy(candidates.n_genes, target_sum=target_sum)
    with reading.open(path) as (_, counts, columns):
        match = match_genes(columns, candidates, gene_totals=counts.gene_totals, min_gene_overlap=0.0)
        column_genes = np.where(match.token_ids < 0, -1, match.token_ids - candidates.n_special_tokens)
        is_measured = np.zeros(entropy.n_genes, dtype=bool)
        is_measured[column_genes[column_genes >= 0]] = True
        for _, cells, _ in iter_flat_cells(counts, column_genes, target_sum=entropy.target_sum):
            entropy.update(cells.token_ids, cells.values, cells.n_cells, measured=is_measured)
            bar.update(cells.n_cells)
    return entropy


def _wanted_genes(
    names: Sequence[str], entropy: GeneEntropy, candidates: GeneVocabulary
) -> tuple[np.ndarray, list[str]]:
    """Find genes by name; names of genes that no cell expresses come back as missing."""
    if not names:
        return np.zeros(0, dtype=np.int64), []
    aliases = {name: candidates.token_ids[gene_id] for name, gene_id in candidates.aliases.items()}
    columns = {"keep_genes": [clean_name(name) for name in names]}
    found = find_genes(columns, candidates.gene_token_ids, candidates.symbol_token_ids, aliases)
    genes = np.array([-1 if token is None else token - candidates.n_special_tokens for token, _ in found])
    is_expressed = np.append(entropy.histogram[:, 1:].sum(axis=1) > 0, False)  # the last: not found
    is_found = is_expressed[genes]
    missing = [name for name, found in zip(names, is_found, strict=True) if not found]
    if missing:
        logger.warning(
            "%d of %d genes to keep are expressed in no cell of the files and left out: %s.",
            len(missing), len(names), ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else ""),
        )  # fmt: skip
    return genes[is_found], missing


def _kept_genes(entropy: GeneEntropy, *, min_cells: int, n_genes: int | None) -> np.ndarray:
    n_expressing = entropy.histogram[:, 1:].sum(axis=1)
    kept = np.flatnonzero(n_expressing >= max(min_cells, 1))
    if len(kept) == 0:
        msg = f"No gene is expressed in {min_cells} cells or more; lower min_cells."
        raise ValueError(msg)
    if n_genes is not None and n_genes < len(kept):
        _, variance = entropy.mean_variance()
        most_variable = np.argsort(-variance[kept], kind="stable")[:n_genes]
        kept = np.sort(kept[most_variable])
    return kept
