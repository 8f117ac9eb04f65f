"""The gene vocabulary: which gene has which token, what else it is called, and how variable it is.

Notable choices:
- special tokens come first, so that adding genes never moves them;
- a gene id is the Ensembl id without version, or the symbol where no Ensembl id is known;
- symbols are for people; two genes may share one, and then it identifies neither;
- one JSON file with a format version, its sources and a hash over everything that changes tokens, so that a
  corpus or a checkpoint can tell whether it belongs to this vocabulary.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

SPECIAL_TOKENS = ("<pad>", "<mask>", "<lat>", "<unk>", "<pert>")
VOCABULARY_FILE = "gene_vocabulary.json"
FORMAT = "scdiva_gene_vocabulary"
FORMAT_VERSION = 1

_VERSIONED_ENSEMBL_ID = re.compile(r"ENS[A-Z]*G\d+\.\d+\S*")


class GeneVocabulary:
    """Token id <-> gene id <-> symbol <-> other names, with one entropy per gene.

    Attributes:
        gene_ids: (V,) name of each token: the special tokens, then one id per gene.
        gene_symbols: (V,) text to show for each token; the gene id where there is no symbol.
        token_ids: Token id of each name in ``gene_ids``.
        aliases: Gene id of each other name.
        gene_entropy: (V,) float64 nats, 0 for special tokens; None if the vocabulary has no entropies.
        source: Where the vocabulary comes from (free form, not part of the hash).
        n_special_tokens: Number of special tokens, which are the first ids.
        content_hash: SHA-256 (hex) of everything that changes tokens or their order.

    Args:
        gene_ids: One id per gene, special tokens not included; their order gives the token ids.
        gene_symbols: One symbol per gene; None, or None for one gene, falls back to the gene id.
        aliases: Other name -> gene id (previous symbols and the like).
        gene_entropy: One entropy per gene in nats, finite and not negative.
        source: JSON-serialisable description, such as number of cells, files, ``target_sum``, ``n_bins``.

    Raises:
        ValueError: If ids are empty, repeated, versioned or named like a special token, if a length does
            not fit, if an alias points to no gene, or if an entropy is negative or not finite.
    """

    def __init__(
        self,
        gene_ids: Sequence[str],
        gene_symbols: Sequence[str | None] | None = None,
        *,
        aliases: Mapping[str, str] | None = None,
        gene_entropy: Sequence[float] | np.ndarray | None = None,
        source: Mapping[str, Any] | None = None,
    ) -> None:
        names = [str(gene_id) for gene_id in gene_ids]
        _check_gene_ids(names)
        symbols = names if gene_symbols is None else list(gene_symbols)
        _check_length("gene_symbols", len(symbols), len(names))

        self.gene_ids: list[str] = [*SPECIAL_TOKENS, *names]
        self.gene_symbols: list[str] = [
            *SPECIAL_TOKENS,
            *(str(s) if s else n for s, n in zip(symbols, names, strict=True)),
        ]
        self.token_ids: dict[str, int] = {name: i for i, name in enumerate(self.gene_ids)}
        self.aliases: dict[str, str] = {str(k): str(v) for k, v in sorted((aliases or {}).items())}
        self.gene_entropy = self._with_special_tokens(gene_entropy)
        self.source: dict[str, Any] = dict(source or {})
        self._check_aliases()

    @property
    def n_special_tokens(self) -> int:
        """Number of special tokens; token ids below it are no genes."""
        return len(SPECIAL_TOKENS)

    @property
    def n_genes(self) -> int:
        """Number of genes, special tokens not included."""
        return len(self.gene_ids) - self.n_special_tokens

    def __len__(self) -> int:
        return len(self.gene_ids)

    def __repr__(self) -> str:
        entropies = "with" if self.gene_entropy is not None else "without"
        return f"GeneVocabulary({self.n_genes:,} genes, {entropies} entropies, {self.content_hash[:12]})"

    @cached_property
    def gene_token_ids(self) -> dict[str, int]:
        """Token id of each gene id; special tokens left out, so that no gene can be matched to one."""
        return {name: i for name, i in self.token_ids.items() if i >= self.n_special_tokens}

    @cached_property
    def symbol_token_ids(self) -> dict[str, int]:
        """Token id of each symbol that belongs to exactly one gene."""
        symbols = self.gene_symbols[self.n_special_tokens :]
        n_owners = Counter(symbols)
        return {s: i for i, s in enumerate(symbols, start=self.n_special_tokens) if n_owners[s] == 1}

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 (hex) over format version, special tokens, ids, symbols, entropies and aliases."""
        content = [FORMAT_VERSION, list(SPECIAL_TOKENS), self._gene_rows(), self.aliases]
        text = json.dumps(content, ensure_ascii=True, separators=(",", ":"), sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def ranking_weights(self, entropy_epsilon: float) -> np.ndarray:
        """Give the divisor of each token's expression value in the ranking score.

        Args:
            entropy_epsilon: Nats added to each entropy, above 0; large values give plain expression order.

        Returns:
            (V,) float64 ``H_g + entropy_epsilon``; 1 for special tokens, which are never ranked.

        Raises:
            ValueError: If the vocabulary has no entropies, or ``entropy_epsilon`` is not above 0.

        References:
            METHOD.md section 1, ranking score.
        """
        if self.gene_entropy is None:
            msg = (
                "This vocabulary has no gene entropies, so genes cannot be ranked by entropy. "
                "Use gene_order='expression', or build one with entropies (data/build_vocabulary.py)."
            )
            raise ValueError(msg)
        if not (np.isfinite(entropy_epsilon) and entropy_epsilon > 0):
            msg = f"entropy_epsilon must be finite and above 0 nats, got {entropy_epsilon}."
            raise ValueError(msg)
        weights = self.gene_entropy + float(entropy_epsilon)
        weights[: self.n_special_tokens] = 1.0
        return weights

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the vocabulary as one JSON file; the file appears only when it is whole.

        Args:
            path: File to write, by custom ``gene_vocabulary.json``; missing folders are made.
        """
        path = Path(path)
        head = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "content_hash": self.content_hash,
            "source": self.source,
            "special_tokens": list(SPECIAL_TOKENS),
            "aliases": self.aliases,
        }
        # One gene a line: the file stays readable, and so do its differences.
        encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode  # dumps makes one for every row
        rows = ",\n".join(map(encode, self._gene_rows()))
        text = json.dumps(head, ensure_ascii=False, allow_nan=False, indent=1).removesuffix("\n}")
        _write_atomically(path, f'{text},\n "genes": [\n{rows}\n]\n}}\n')

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "GeneVocabulary":
        """Read a vocabulary and prove that it is the one that was written.

        Args:
            path: File written by :meth:`save`.

        Returns:
            The vocabulary.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, is no gene vocabulary, was written in a format this version
                cannot read, or does not have the content its hash states.
        """
        path = Path(path)
        if not path.is_file():
            msg = f"{path} does not exist; a gene vocabulary is one JSON file, by custom '{VOCABULARY_FILE}'."
            raise FileNotFoundError(msg)
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            msg = (
                f"{path} is not valid JSON ({error}): it is damaged or cut short. Copy or download it again."
            )
            raise ValueError(msg) from error
        _check_format(stored, path)
        try:
            ids, symbols, entropies = zip(*stored["genes"], strict=True)
            vocabulary = cls(
                ids,
                symbols,
                aliases=stored["aliases"],
                gene_entropy=None if all(value is None for value in entropies) else entropies,
                source=stored["source"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            msg = f"{path} is not a whole gene vocabulary ({error!r}). Copy or build it again."
            raise ValueError(msg) from error
        if vocabulary.content_hash != stored["content_hash"]:
            msg = (
                f"{path} does not hold what was written: its content has the hash "
                f"{vocabulary.content_hash[:12]}, it states {str(stored['content_hash'])[:12]}. "
                "It was edited or damaged; copy it again, or rebuild it with data/build_vocabulary.py."
            )
            raise ValueError(msg)
        return vocabulary

    def _gene_rows(self) -> list[list[Any]]:
        first = self.n_special_tokens
        entropies = [None] * self.n_genes if self.gene_entropy is None else self.gene_entropy[first:].tolist()
        rows = zip(self.gene_ids[first:], self.gene_symbols[first:], entropies, strict=True)
        return [list(row) for row in rows]

    def _with_special_tokens(self, gene_entropy: Sequence[float] | np.ndarray | None) -> np.ndarray | None:
        if gene_entropy is None:
            return None
        entropies = np.asarray(gene_entropy, dtype=np.float64)
        _check_length("gene_entropy", entropies.size, self.n_genes)
        is_wrong = ~(np.isfinite(entropies) & (entropies >= 0))
        if is_wrong.any():
            first = int(np.flatnonzero(is_wrong)[0])
            name = self.gene_ids[first + self.n_special_tokens]
            msg = (
                f"gene_entropy must be finite and not negative; {int(is_wrong.sum())} of {entropies.size} "
                f"are not (first: gene '{name}' = {entropies[first]})."
            )
            raise ValueError(msg)
        return np.concatenate([np.zeros(self.n_special_tokens), entropies])

    def _check_aliases(self) -> None:
        genes = self.gene_token_ids
        lost = [(name, gene_id) for name, gene_id in self.aliases.items() if gene_id not in genes]
        if lost:
            msg = (
                f"{len(lost)} aliases point to genes that are not in the vocabulary "
                f"(first: '{lost[0][0]}' -> '{lost[0][1]}'). Leave those aliases out."
            )
            raise ValueError(msg)


# Refuse ids which could not identify one gene each.
def _check_gene_ids(gene_ids: list[str]) -> None:
    if not gene_ids:
        msg = "A gene vocabulary needs at least one gene, got none."
        raise ValueError(msg)
    empty = [i for i, name in enumerate(gene_ids) if not name.strip()]
    if empty:
        msg = f"{len(empty)} gene ids are empty (first: entry {empty[0]}). Leave genes without a name out."
        raise ValueError(msg)
    special = sorted(set(gene_ids) & set(SPECIAL_TOKENS))
    if special:
        msg = f"Gene ids may not be special tokens, got {special}; these are added by the vocabulary itself."
        raise ValueError(msg)
    versioned = [name for name in gene_ids if _VERSIONED_ENSEMBL_ID.fullmatch(name)]
    if versioned:
        msg = (
            f"{len(versioned)} Ensembl ids carry a version (first: '{versioned[0]}'). "
            "Strip it: a gene keeps its token when its annotation is updated."
        )
        raise ValueError(msg)
    repeated = [name for name, n in Counter(gene_ids).items() if n > 1]
    if repeated:
        msg = f"Each gene has one token; {len(repeated)} ids are repeated, such as {repeated[:3]}."
        raise ValueError(msg)


# Refuse a per-gene list of another length than the genes.
def _check_length(name: str, n_found: int, n_genes: int) -> None:
    if n_found != n_genes:
        msg = f"{name} needs one entry per gene: {n_genes:,} genes, got {n_found:,} entries."
        raise ValueError(msg)


# Refuse other JSON files, formats of the future, and other special tokens.
def _check_format(stored: Any, path: Path) -> None:
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        msg = f'{path} is not a gene vocabulary: it lacks "format": "{FORMAT}". Give \'{VOCABULARY_FILE}\'.'
        raise ValueError(msg)
    version = stored.get("format_version")
    if version != FORMAT_VERSION:
        msg = (
            f"{path} has format version {version}; this code reads version {FORMAT_VERSION}. "
            "Install the version of scdiva that wrote it, or rebuild the file with data/build_vocabulary.py."
        )
        raise ValueError(msg)
    if stored.get("special_tokens") != list(SPECIAL_TOKENS):
        msg = (
            f"{path} has the special tokens {stored.get('special_tokens')}; expected {list(SPECIAL_TOKENS)}."
        )
        raise ValueError(msg)


# Write a text file under a temporary name, then rename it: a killed run leaves no half file.
def _write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
