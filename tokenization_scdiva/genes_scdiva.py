"""Which gene of the vocabulary each entry of a file is, entry by entry, with a report.

One file may mix Ensembl ids and symbols, carry versions, old names, repeated names and no names. For each
entry the best evidence wins: Ensembl id, then symbol, then alias. Nothing is dropped unseen: every entry
ends in exactly one line of the report, and a file that shares too little with the vocabulary is refused.

Dimensions: G entries (genes in the file), V vocabulary.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np

from .vocabulary_scdiva import GeneVocabulary

logger = logging.getLogger(__name__)

ID_COLUMNS = ("ensembl_id", "ensembl_ids", "ensembl_gene_id", "ensembl", "gene_ids", "gene_id", "feature_id")
SYMBOL_COLUMNS = (
    "gene_symbols", "gene_symbol", "symbol", "symbols", "feature_name", "gene_name", "gene_names",
    "gene_short_name", "hgnc_symbol",
)  # fmt: skip
VAR_NAMES = "var_names"

N_EXAMPLES = 5
NULL_NAMES = frozenset({"", "nan", "none", "na", "n/a", "<na>", "null", "-"})
_ENSEMBL_ID = re.compile(r"(ENS[A-Z]*G)(R?)(\d+)(?:\.\d+)?(_PAR_Y)?")
_UNIQUE_SUFFIX = re.compile(r"(.+)-([1-9]\d*)")  # what anndata's var_names_make_unique appends
_GENOME_PREFIX = re.compile(r"(GRCh3\d|GRCm3\d|hg19|hg38|mm10|mm9)_+", re.IGNORECASE)
_MOUSE_SYMBOL = re.compile(r"[A-Z][a-z]+[a-z0-9-]*|mt-[A-Z]\w*")
_SPECIES = {
    "ENSG": "human", "ENSMUSG": "mouse", "ENSRNOG": "rat", "ENSDARG": "zebrafish", "ENSSSCG": "pig",
    "ENSMMUG": "rhesus macaque", "ENSMFAG": "crab-eating macaque", "ENSGALG": "chicken",
}  # fmt: skip

Names = Sequence[str | None]
Gene = TypeVar("Gene")


@dataclass(frozen=True)
class GeneMatchReport:
    """What became of each entry; the six numbers after ``n_genes`` add up to it.

    Attributes:
        n_genes: Entries in the file.
        by_id: Entries used, matched by gene id.
        by_symbol: Entries used, matched by current symbol.
        by_alias: Entries used, matched by another name.
        duplicates: Entries not used: another entry is the same gene and more expressed.
        unknown: Entries not used: no name of theirs is known.
        null: Entries not used: they have no name.
        unknown_examples: Up to five names of unknown entries.
    """

    n_genes: int
    by_id: int
    by_symbol: int
    by_alias: int
    duplicates: int
    unknown: int
    null: int
    unknown_examples: tuple[str, ...] = ()

    @property
    def n_matched(self) -> int:
        """Entries used, each a different gene."""
        return self.by_id + self.by_symbol + self.by_alias

    def to_dict(self) -> dict[str, Any]:
        """Give the report as plain JSON-serialisable values.

        Returns:
            Field name -> value.
        """
        return {**asdict(self), "unknown_examples": list(self.unknown_examples)}

    def __str__(self) -> str:
        share = 100 * self.n_matched / max(self.n_genes, 1)
        examples = f" (such as {', '.join(self.unknown_examples)})" if self.unknown_examples else ""
        return (
            f"matched {self.n_matched:,} of {self.n_genes:,} genes ({share:.1f} %): {self.by_id:,} by id, "
            f"{self.by_symbol:,} by symbol, {self.by_alias:,} by alias; not used: {self.duplicates:,} "
            f"duplicates, {self.unknown:,} unknown{examples}, {self.null:,} without a name"
        )


@dataclass(frozen=True)
class GeneMatch:
    """Token of each entry of a file.

    Attributes:
        token_ids: (G,) int64 token of each entry, -1 where it is not used; no token occurs twice.
        report: What became of each entry.
    """

    token_ids: np.ndarray
    report: GeneMatchReport


def gene_name_columns(
    adata: Any, *, use_raw: bool = False, gene_id_key: str | None = None
) -> dict[str, list[str | None]]:
    """Collect every name that a file gives its genes.

    Args:
        adata: AnnData; only ``var`` (or ``raw.var``) is read.
        use_raw: Take the genes of ``adata.raw`` (see ``Counts.use_raw``).
        gene_id_key: Column of ``var`` that alone is to be believed; None takes ``var_names`` and all
            recognised columns.

    Returns:
        Column name -> (G,) names, None where there is none; ``"var_names"`` is the index.

    Raises:
        KeyError: If ``gene_id_key`` is not a column.
    """
    var = adata.raw.var if use_raw else adata.var
    if gene_id_key is not None and gene_id_key not in var.columns:
        place = "raw.var" if use_raw else "var"
        msg = f"{place} has no column '{gene_id_key}' (gene_id_key); it has {list(var.columns)}."
        raise KeyError(msg)
    if gene_id_key is not None:
        columns = {gene_id_key: var[gene_id_key]}
    else:
        known = {*ID_COLUMNS, *SYMBOL_COLUMNS}
        columns = {VAR_NAMES: var.index}
        columns |= {str(key): var[key] for key in var.columns if str(key).lower() in known}
    logger.info("Gene names are taken from %s.", ", ".join(columns))
    return {key: [clean_name(name) for name in column.tolist()] for key, column in columns.items()}


def clean_name(name: Any) -> str | None:
    """Bring one gene name to text.

    Args:
        name: Anything a column may hold.

    Returns:
        The name without surrounding space; None if it is null or looks like it ("", "nan", "None", "NA").
    """
    if name is None:
        return None
    text = (name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)).strip()
    return None if text.lower() in NULL_NAMES else text


def ensembl_id(name: str) -> str | None:
    """Read an Ensembl gene id.

    Args:
        name: Gene name.

    Returns:
        The id without version; None if the name is no Ensembl gene id (symbols such as "AL391845.2" keep
        their number).
    """
    found = _read_ensembl(name)
    return found[1] + found[3] if found else None


def ensembl_prefix(name: str) -> str | None:
    """Read the species part of an Ensembl gene id.

    Args:
        name: Gene name.

    Returns:
        Such as "ENSG" (human) or "ENSMUSG" (mouse); None if the name is no Ensembl gene id.
    """
    found = _read_ensembl(name)
    return found[1] if found else None


def is_par_y(name: str) -> bool:
    """Tell the Y copy of a gene that lies on X and Y: "ENSG00000182378.15_PAR_Y" or "ENSGR0000182378".

    Args:
        name: Gene name.

    Returns:
        Whether the name is such a copy, whose molecules belong to the gene on X.
    """
    found = _read_ensembl(name)
    return bool(found and (found[2] or found[4]))


# Species, Y copy of old releases, number, Y copy; the pattern is tried on names only that may fit.
def _read_ensembl(name: str) -> re.Match[str] | None:
    return _ENSEMBL_ID.fullmatch(name) if name.startswith("ENS") else None


def without_unique_suffix(name: str, names: set[str | None]) -> str | None:
    """Undo ``var_names_make_unique`` where it has happened.

    A suffix "-3" is only believed where the name without it, with "-1" and with "-2" occur too: "NKX2-1" and
    "IGHV3-30-3" are symbols.

    Args:
        name: Gene name.
        names: All names of the same column.

    Returns:
        The name without the suffix; None if it has no such suffix.
    """
    found = _UNIQUE_SUFFIX.fullmatch(name)
    if found is None or found[1] not in names:
        return None
    return found[1] if all(f"{found[1]}-{i}" in names for i in range(1, int(found[2]))) else None


def match_genes(
    name_columns: Mapping[str, Names],
    vocabulary: GeneVocabulary,
    *,
    gene_totals: np.ndarray | Callable[[], np.ndarray] | None = None,
    min_gene_overlap: float = 0.1,
    cell_names: Sequence[str] | None = None,
) -> GeneMatch:
    """Find the token of each entry of a file.

    Per entry: an Ensembl id in any column, then a symbol in any column, then an alias in any column. An
    entry whose Ensembl ids are all of a species that the vocabulary does not hold is unknown, whatever its
    symbol. The Y copy of a gene on X and Y counts as a duplicate.

    Args:
        name_columns: Column name -> (G,) names, from :func:`gene_name_columns`.
        vocabulary: Genes to be found.
        gene_totals: (G,) molecules of each entry in the file; of entries that are one gene the largest is
            used, ties go to the first. Needed only where this happens: a function that gives them (such as
            ``Counts.gene_totals``, a pass over the file) is called only then.
        min_gene_overlap: Least share of distinct genes matched, of the smaller of file and vocabulary.
        cell_names: Names of the cells; tells a transposed file in the error message.

    Returns:
        Tokens and report.

    Raises:
        ValueError: If there are no entries, if columns or totals differ in length, if entries are one gene
            but ``gene_totals`` is None, or if the overlap is below ``min_gene_overlap``.
    """
    columns = {key: [clean_name(name) for name in names] for key, names in name_columns.items()}
    n_genes = n_entries(columns)
    if gene_totals is not None and not callable(gene_totals) and len(gene_totals) != n_genes:
        msg = f"gene_totals needs one number per gene: {n_genes:,} genes, got {len(gene_totals):,} numbers."
        raise ValueError(msg)

    # 1. Token and evidence of each entry, as if it were alone.
    entries = list(zip(*columns.values(), strict=True))
    aliases = {name: vocabulary.token_ids[gene_id] for name, gene_id in vocabulary.aliases.items()}
    found = find_genes(columns, vocabulary.gene_token_ids, vocabulary.symbol_token_ids, aliases)
    token_ids = np.array([-1 if token is None else token for token, _ in found], dtype=np.int64)
    evidence = np.array([how for _, how in found], dtype=object)  # object: text keeps its length

    # 2. Of entries that are one gene, the most expressed is used.
    is_matched = token_ids >= 0
    if len(np.unique(token_ids[is_matched])) < is_matched.sum():
        if gene_totals is None:
            msg = "Several entries are the same gene; pass gene_totals, so that the most expressed is used."
            raise ValueError(msg)
        is_lesser = _lesser_duplicates(
            token_ids, np.asarray(gene_totals() if callable(gene_totals) else gene_totals)
        )
        token_ids[is_lesser], evidence[is_lesser] = -1, "duplicates"

    # 3. Say what happened, and refuse a file that shares too little.
    report = make_report(evidence, entries)
    check_gene_overlap(report, columns, vocabulary, min_gene_overlap=min_gene_overlap, cell_names=cell_names)
    logger.info("Genes: %s.", report)
    return GeneMatch(token_ids, report)


def check_gene_overlap(
    report: GeneMatchReport,
    name_columns: Mapping[str, Names],
    vocabulary: GeneVocabulary,
    *,
    min_gene_overlap: float,
    cell_names: Sequence[str] | None = None,
    called: str = "vocabulary",
) -> None:
    """Refuse a file that shares too few genes with the vocabulary.

    Args:
        report: What became of the entries.
        name_columns: Column name -> (G,) names, cleaned.
        vocabulary: Genes that were looked for.
        min_gene_overlap: Least share of distinct genes matched, of the smaller of file and vocabulary.
        cell_names: Names of the cells; tells a transposed file in the message.
        called: What the message calls the vocabulary.

    Raises:
        ValueError: If the share is below ``min_gene_overlap``; says what the names look like.
    """
    overlap = report.n_matched / min(report.n_genes, vocabulary.n_genes)
    if overlap < min_gene_overlap:
        entries = list(zip(*name_columns.values(), strict=True))
        msg = (
            f"Only {report.n_matched:,} of {report.n_genes:,} genes are in the {called} of "
            f"{vocabulary.n_genes:,}: an overlap of {overlap:.1%}, at least {min_gene_overlap:.0%} is needed "
            f"(min_gene_overlap). The file has names such as {_examples(entries)}, "
            f"the {called} {_vocabulary_examples(vocabulary)}."
            f"{_likely_cause(entries, vocabulary, cell_names)}"
        )
        raise ValueError(msg)


def check_count_overlap(
    report: GeneMatchReport, matched_counts: float, total_counts: float, *, min_count_overlap: float = 0.5
) -> None:
    """Refuse a file most of whose molecules lie in genes that the vocabulary does not have.

    Args:
        report: Report of :func:`match_genes`.
        matched_counts: Molecules in entries that are used.
        total_counts: Molecules in all entries.
        min_count_overlap: Least share of molecules in entries that are used.

    Raises:
        ValueError: If there are no molecules, or the share is below ``min_count_overlap``.
    """
    if not total_counts > 0:
        msg = f"The file holds no molecules ({total_counts:g} counts in all); there is nothing to tokenize."
        raise ValueError(msg)
    overlap = matched_counts / total_counts
    if overlap < min_count_overlap:
        msg = (
            f"Only {overlap:.1%} of the counts lie in genes of the vocabulary, "
            f"at least {min_count_overlap:.0%} is needed (min_count_overlap): {report}. "
            "Check gene_id_key and species, or build a vocabulary that has these genes."
        )
        raise ValueError(msg)


def n_entries(columns: Mapping[str, Names]) -> int:
    """Count the entries that all columns name.

    Args:
        columns: Column name -> (G,) names.

    Returns:
        G.

    Raises:
        ValueError: If there is no entry, or columns differ in length.
    """
    lengths = {key: len(names) for key, names in columns.items()}
    if len(set(lengths.values())) != 1 or not max(lengths.values()):
        msg = f"Gene name columns need one name per gene, and at least one gene; got lengths {lengths}."
        raise ValueError(msg)
    return next(iter(lengths.values()))


def make_report(
    evidence: Sequence[str] | np.ndarray, entries: Sequence[tuple[str | None, ...]]
) -> GeneMatchReport:
    """Count what became of each entry.

    Args:
        evidence: (G,) field of the report that each entry belongs to.
        entries: (G,) names of each entry, for examples.

    Returns:
        The report.
    """
    n_of = Counter(evidence)
    unknown = (names for names, how in zip(entries, evidence, strict=True) if how == "unknown")
    first_names = dict.fromkeys(next(name for name in names if name) for names in unknown)
    return GeneMatchReport(
        n_genes=len(entries),
        **{how: n_of[how] for how in ("by_id", "by_symbol", "by_alias", "duplicates", "unknown", "null")},
        unknown_examples=tuple(first_names)[:N_EXAMPLES],
    )


def find_genes(
    columns: Mapping[str, Names],
    ids: Mapping[str, Gene],
    symbols: Mapping[str, Gene],
    aliases: Mapping[str, Gene],
) -> list[tuple[Gene | None, str]]:
    """Find the gene of each entry, by the rule of :func:`match_genes`.

    Args:
        columns: Column name -> (G,) names.
        ids: Gene id -> gene.
        symbols: Current symbol -> gene.
        aliases: Other name -> gene.

    Returns:
        (G,) pairs of the gene (None if there is none) and the field of the report that the entry belongs to.
    """
    tables = ((ids, "by_id"), (symbols, "by_symbol"), (aliases, "by_alias"))
    own_prefixes = set(map(ensembl_prefix, ids)) - {None}
    column_names = [set(names) for names in columns.values()]

    def find(names: tuple[str | None, ...]) -> tuple[Gene | None, str]:
        present = [name for name in names if name]
        if not present:
            return None, "null"
        # 1. An Ensembl id says most, also that a gene is of another species or the Y copy of one on X.
        prefixes = set()
        for name in present:
            if (found := _read_ensembl(name)) is not None:
                if found[2] or found[4]:
                    return None, "duplicates"
                if (gene_id := found[1] + found[3]) in ids:
                    return ids[gene_id], "by_id"
                prefixes.add(found[1])
        if prefixes and own_prefixes and not prefixes & own_prefixes:
            return None, "unknown"
        # 2. Then the names as they are, then without what var_names_make_unique has appended.
        stems = [
            without_unique_suffix(name, others)
            for name, others in zip(names, column_names, strict=True)
            if name
        ]
        for candidates in (present, [stem for stem in stems if stem]):
            for table, how in tables:
                for name in candidates:
                    if name in table:
                        return table[name], how
        return None, "unknown"

    return [find(names) for names in zip(*columns.values(), strict=True)]


# Entries that another entry with the same token beats: by molecules, then by coming first.
def _lesser_duplicates(token_ids: np.ndarray, gene_totals: np.ndarray) -> np.ndarray:
    matched = np.flatnonzero(token_ids >= 0)
    order = matched[np.lexsort((matched, -gene_totals[matched], token_ids[matched]))]
    is_best = np.concatenate([[True], token_ids[order][1:] != token_ids[order][:-1]])
    is_lesser = np.zeros(len(token_ids), dtype=bool)
    is_lesser[order[~is_best]] = True
    return is_lesser


def _examples(entries: Sequence[tuple[str | None, ...]]) -> list[str]:
    named = (" / ".join(dict.fromkeys(name for name in names if name)) for names in entries)
    return [name for name, _ in zip((text for text in named if text), range(N_EXAMPLES), strict=False)]


def _vocabulary_examples(vocabulary: GeneVocabulary) -> list[str]:
    first = vocabulary.n_special_tokens
    pairs = zip(vocabulary.gene_ids[first:], vocabulary.gene_symbols[first:], strict=True)
    return _examples([pair for pair, _ in zip(pairs, range(N_EXAMPLES), strict=False)])


# The likely reason for a small overlap, as sentences to append; "" if there is none to see.
def _likely_cause(
    entries: Sequence[tuple[str | None, ...]], vocabulary: GeneVocabulary, cell_names: Sequence[str] | None
) -> str:
    causes = []
    lookup = (vocabulary.gene_token_ids, vocabulary.symbol_token_ids, vocabulary.aliases)
    cells = [clean_name(name) or "" for name in (cell_names if cell_names is not None else [])]
    n_gene_like = sum(any((ensembl_id(name) or name) in table for table in lookup) for name in cells)
    if cells and n_gene_like > 0.5 * min(len(cells), vocabulary.n_genes):
        causes.append(
            f"{n_gene_like:,} of {len(cells):,} cell names are genes: is the matrix transposed? Use adata.T."
        )
    names = [name for entry in entries for name in entry if name]
    prefixes = {_GENOME_PREFIX.match(name)[0] for name in names if _GENOME_PREFIX.match(name)}  # type: ignore[index]
    if prefixes:
        causes.append(f"Names carry genome prefixes {sorted(prefixes)}: keep one species and strip them.")
    species = likely_species(names)
    own_species = likely_species([*vocabulary.gene_ids, *vocabulary.gene_symbols])
    if species is not None and species != own_species:
        causes.append(
            f"These look like {species} genes"
            f"{f', the vocabulary is {own_species}' if own_species else ''}: map them to orthologs first."
        )
    if names and sum(name.isdigit() for name in names) > 0.5 * len(names):
        causes.append("Names are numbers: name the column with Ensembl ids or symbols as gene_id_key.")
    return "".join(f" {cause}" for cause in causes)


def likely_species(names: Sequence[str]) -> str | None:
    """Guess the species of gene names, for messages only.

    Args:
        names: Gene names, of any kind.

    Returns:
        Such as "human", "mouse" or "mouse or rat"; None if most names do not tell.
    """
    prefixes = [prefix for prefix in map(ensembl_prefix, names) if prefix]
    if prefixes:
        most = max(set(prefixes), key=prefixes.count)
        return _SPECIES.get(most, f"{most} (Ensembl)")
    symbols = [name for name in names if name and name[0] not in "<0123456789"]
    n_title_case = sum(bool(_MOUSE_SYMBOL.fullmatch(name)) for name in symbols)
    if symbols and n_title_case > 0.5 * len(symbols):
        return "mouse or rat"
    n_upper_case = sum(name.isupper() for name in symbols)
    return "human" if symbols and n_upper_case > 0.5 * len(symbols) else None
