"""Gene tables: what a name of today, of yesterday or of a paper means, as an Ensembl gene id.

Two public forms are read: HGNC (approved symbols with previous and alias symbols) and GENCODE (Ensembl ids
with symbols). A name counts only if it points to one gene: a current symbol is never an alias of another
gene, and a previous symbol or alias that several genes share resolves to none of them.

Sources: genenames.org complete set; gencodegenes.org annotation, as cut to a table by CELLxGENE.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pandas as pd

from tokenization_scdiva.genes_scdiva import (
    ID_COLUMNS,
    SYMBOL_COLUMNS,
    GeneMatchReport,
    Names,
    clean_name,
    ensembl_id,
    find_genes,
    is_par_y,
    make_report,
    n_entries,
)

HGNC_COLUMNS = ("symbol", "ensembl_gene_id", "prev_symbol", "alias_symbol")
GENCODE_ID_COLUMNS = ("ensembl_id", "gene_id", "ensembl_gene_id", "feature_id")
GENCODE_SYMBOL_COLUMNS = ("gene_symbol", "gene_name", "symbol", "feature_name")


@dataclass(frozen=True)
class GeneTable:
    """Names of genes; a gene id is the Ensembl id without version, or the symbol where none is known.

    Attributes:
        symbols: Current symbol of each gene id.
        symbol_ids: Gene id of each current symbol that means one gene.
        alias_ids: Gene id of each other name that means one gene and is nobody's current symbol.
    """

    symbols: Mapping[str, str]
    symbol_ids: Mapping[str, str]
    alias_ids: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.symbols)

    def __repr__(self) -> str:
        return f"GeneTable({len(self.symbols):,} genes, {len(self.alias_ids):,} other names)"

    def names_for_vocabulary(self, gene_ids: Iterable[str]) -> tuple[list[str], dict[str, str]]:
        """Collect what a vocabulary of these genes should know beside their ids.

        A symbol that several of the genes share goes to the aliases of the one it means, if it means one.

        Args:
            gene_ids: Genes of the vocabulary.

        Returns:
            One symbol per gene, and other name -> gene id.
        """
        gene_ids = list(gene_ids)
        symbols = [self.symbols.get(gene_id, gene_id) for gene_id in gene_ids]
        aliases = {name: gene_id for gene_id in gene_ids for name in self._other_names.get(gene_id, ())}
        shared = (symbol for symbol, n in Counter(symbols).items() if n > 1)
        present = set(gene_ids)
        aliases |= {
            symbol: self.symbol_ids[symbol] for symbol in shared if self.symbol_ids.get(symbol) in present
        }
        return symbols, aliases

    @cached_property
    def _other_names(self) -> dict[str, list[str]]:
        names = defaultdict(list)
        for name, gene_id in sorted(self.alias_ids.items()):
            names[gene_id].append(name)
        return dict(names)


def read_gene_tables(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
) -> GeneTable:
    """Read gene tables in HGNC or GENCODE form and join them.

    Where tables disagree HGNC wins, then the table given first; the other symbol of a gene becomes an alias.
    Withdrawn HGNC entries and phenotypes are left out.

    Args:
        paths: One or several files: .parquet, .tsv, .txt or .csv, the last three also as .gz.

    Returns:
        The joined table.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If no file is given, or a file has another ending, neither form, or no gene.
    """
    paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not paths:
        msg = "At least one gene table is needed, got none."
        raise ValueError(msg)
    hgnc: list[_Row] = []
    gencode: list[_Row] = []
    for path in map(Path, paths):
        if not path.is_file():
            msg = f"Gene table {path} does not exist."
            raise FileNotFoundError(msg)
        frame = _read_frame(path)
        is_hgnc = set(HGNC_COLUMNS) <= set(frame.columns)
        rows = list(_hgnc_rows(frame) if is_hgnc else _gencode_rows(frame, path))
        if not rows:
            msg = f"Gene table {path} has {len(frame):,} rows, but no gene in them."
            raise ValueError(msg)
        (hgnc if is_hgnc else gencode).extend(rows)
    return _join(_with_ensembl_ids(hgnc, gencode), gencode)


def canonical_genes(
    name_columns: Mapping[str, Names], table: GeneTable | None = None
) -> tuple[list[str | None], GeneMatchReport]:
    """Find the gene id of each entry of a file, to build a vocabulary from it.

    With a table entries are matched as a vocabulary would match them: Ensembl id, symbol, alias. Without
    one, an entry is its Ensembl id, else its symbol as it is written.

    Args:
        name_columns: Column name -> (G,) names, from :func:`gene_name_columns`.
        table: What names mean.

    Returns:
        (G,) gene id of each entry, None where it has no name, is unknown to the table, or is the Y copy of a
        gene on X and Y; and the report, in which every entry after the first of a gene is a duplicate.
    """
    n_entries(name_columns)  # refuses columns that do not fit each other
    columns = {key: [clean_name(name) for name in names] for key, names in name_columns.items()}
    if table is None:
        found = _genes_as_written(columns)
    else:
        ids = dict(zip(table.symbols, table.symbols, strict=True))
        found = find_genes(columns, ids, table.symbol_ids, table.alias_ids)

    gene_ids = [gene_id for gene_id, _ in found]
    seen: set[str] = set()
    evidence = []
    for gene_id, how in found:
        evidence.append("duplicates" if gene_id in seen else how)
        seen |= {gene_id} if gene_id is not None else set()
    return gene_ids, make_report(evidence, list(zip(*columns.values(), strict=True)))


@dataclass(frozen=True)
class _Row:
    """One gene of one table."""

    gene_id: str  # "" where the table knows none
    symbol: str
    other_names: tuple[str, ...] = ()


# Read a table as text, column names in lower case, "" where there is nothing.
def _read_frame(path: Path) -> pd.DataFrame:
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        frame = pd.read_parquet(path)
    elif kind in {"tsv", "txt", "csv"}:
        separator = "," if kind == "csv" else "\t"
        frame = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False)
    else:
        msg = f"Gene table {path} must end in .parquet, .tsv, .txt or .csv (the last three also .gz)."
        raise ValueError(msg)
    frame.columns = [str(column).strip().lower() for column in frame.columns]
    return frame


def _hgnc_rows(frame: pd.DataFrame) -> Iterator[_Row]:
    is_gene = pd.Series(data=True, index=frame.index)
    if "status" in frame:
        is_gene &= frame["status"].eq("Approved")
    if "locus_group" in frame:  # a phenotype has a symbol, but no transcript
        is_gene &= frame["locus_group"].ne("phenotype")
    for symbol, gene_id, previous, aliases in frame.loc[is_gene, list(HGNC_COLUMNS)].itertuples(index=False):
        others = [name for text in (previous, aliases) for name in (clean_name(text) or "").split("|")]
        if name := clean_name(symbol):
            yield _Row(ensembl_id(clean_name(gene_id) or "") or "", name, tuple(filter(clean_name, others)))


def _gencode_rows(frame: pd.DataFrame, path: Path) -> Iterator[_Row]:
    id_column = next((name for name in GENCODE_ID_COLUMNS if name in frame), None)
    symbol_column = next((name for name in GENCODE_SYMBOL_COLUMNS if name in frame), None)
    if id_column is None or symbol_column is None:
        msg = (
            f"Gene table {path} has the columns {list(frame.columns)}. Wanted is the HGNC form, with all of "
            f"{list(HGNC_COLUMNS)}, or the GENCODE form, with one of {list(GENCODE_ID_COLUMNS)} "
            f"and one of {list(GENCODE_SYMBOL_COLUMNS)}."
        )
        raise ValueError(msg)
    for name, symbol in zip(frame[id_column], frame[symbol_column], strict=True):
        name = clean_name(name) or ""
        gene_id = ensembl_id(name)
        if gene_id is not None and not is_par_y(name):
            yield _Row(gene_id, clean_name(symbol) or gene_id)


# HGNC genes without an Ensembl id take that of the only GENCODE gene with their symbol, else the symbol.
def _with_ensembl_ids(hgnc: list[_Row], gencode: list[_Row]) -> list[_Row]:
    ids_of_symbol = defaultdict(set)
    for row in gencode:
        ids_of_symbol[row.symbol].add(row.gene_id)
    taken = {row.gene_id for row in hgnc}
    rows = []
    for row in hgnc:
        if not row.gene_id:
            candidates = ids_of_symbol[row.symbol] - taken
            row = replace(row, gene_id=candidates.pop() if len(candidates) == 1 else row.symbol)
        rows.append(row)
    return rows


def _join(hgnc: list[_Row], gencode: list[_Row]) -> GeneTable:
    symbols: dict[str, str] = {}
    symbol_ids: dict[str, str] = {}
    others: dict[str, set[str]] = defaultdict(set)
    for rows in (hgnc, gencode):
        # 1. A gene keeps the first symbol that it is given; any other one is another name.
        for row in rows:
            if symbols.setdefault(row.gene_id, row.symbol) != row.symbol:
                others[row.symbol].add(row.gene_id)
            for name in row.other_names:
                others[name].add(row.gene_id)
        # 2. A symbol means the gene that has it here, if no better table gave it away, and only one has it.
        owners: dict[str, set[str]] = defaultdict(set)
        for row in rows:
            if symbols[row.gene_id] == row.symbol:
                owners[row.symbol].add(row.gene_id)
        new = {symbol: next(iter(ids)) for symbol, ids in owners.items() if len(ids) == 1}
        symbol_ids = new | symbol_ids

    # 3. Another name is believed if one gene has it and it is nobody's symbol or id today.
    today = {*symbols, *symbols.values()}
    alias_ids = {
        name: next(iter(ids))
        for name, ids in sorted(others.items())
        if len(ids) == 1 and name not in today and ensembl_id(name) is None
    }
    return GeneTable(symbols, symbol_ids, alias_ids)


# Without a table a gene is its Ensembl id, else its symbol; symbol columns say more than var_names.
def _genes_as_written(columns: Mapping[str, Names]) -> list[tuple[str | None, str]]:
    order = sorted(columns, key=lambda key: (key.lower() not in SYMBOL_COLUMNS, key.lower() in ID_COLUMNS))
    found: list[tuple[str | None, str]] = []
    for names in zip(*(columns[key] for key in order), strict=True):
        present = [name for name in names if name]
        ids = [name for name in present if ensembl_id(name)]
        if not present:
            found.append((None, "null"))
        elif any(is_par_y(name) for name in ids):
            found.append((None, "duplicates"))
        else:
            found.append((ensembl_id(ids[0]), "by_id") if ids else (present[0], "by_symbol"))
    return found
