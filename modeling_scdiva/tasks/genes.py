"""Genes that a user names, as tokens of the vocabulary, and back."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from modeling_scdiva.tasks.cells import shown

logger = logging.getLogger(__name__)


def gene_token(name: str, vocabulary: Any) -> int | None:
    """Look one gene up by its id, its symbol or another name of it.

    Args:
        name: Ensembl id, symbol or alias.
        vocabulary: `GeneVocabulary` of the tokenizer.

    Returns:
        Its token, or None if the vocabulary has no such gene.
    """
    token = vocabulary.gene_token_ids.get(name, vocabulary.symbol_token_ids.get(name))
    return vocabulary.gene_token_ids.get(vocabulary.aliases.get(name, "")) if token is None else token


def gene_tokens(names: Sequence[str], *, vocabulary: Any, what: str) -> np.ndarray:
    """Look genes up; all of them must be known.

    Args:
        names: Ensembl ids, symbols or aliases.
        vocabulary: `GeneVocabulary` of the tokenizer.
        what: What they are for, for the message ("targets").

    Returns:
        Token of each, int64.

    Raises:
        TypeError: If one text comes instead of a list.
        KeyError: If a gene is not in the vocabulary.
    """
    if isinstance(names, str):
        msg = f"{what} must be a list of names, got the text {names!r}."
        raise TypeError(msg)
    tokens = [gene_token(str(name), vocabulary) for name in names]
    unknown = [name for name, token in zip(names, tokens, strict=True) if token is None]
    if unknown:
        msg = (
            f"{len(unknown)} of {len(tokens)} {what} are not among the {vocabulary.n_genes:,} genes of the "
            f"vocabulary: {shown(unknown)}. Leave them out, or give the name of a gene that is there."
        )
        raise KeyError(msg)
    return np.array(tokens, dtype=np.int64)


def asked_tokens(names: Sequence[str], *, vocabulary: Any, what: str) -> np.ndarray:
    """Look up genes that an answer is wanted for: one at least, all known, each named once.

    Args:
        names: Ensembl ids, symbols or aliases.
        vocabulary: `GeneVocabulary` of the tokenizer.
        what: What they are for, for the message ("genes").

    Returns:
        Token of each, int64.

    Raises:
        ValueError: If there is no gene, or two names are the same gene.
    """
    tokens = gene_tokens(names, vocabulary=vocabulary, what=what)
    if not len(tokens):
        msg = f"No {what} are named. Name one at least, or leave the argument out for the default."
        raise ValueError(msg)
    found, n_times = np.unique(tokens, return_counts=True)
    if len(found) < len(tokens):
        same = [name for name, token in zip(names, tokens, strict=True) if token == found[n_times > 1][0]]
        msg = f"Two {what} are the same gene: {shown(same)}. Name each gene once."
        raise ValueError(msg)
    return tokens


def find_genes(names: Sequence[str] | str, vocabulary: Any, *, what: str) -> tuple[dict[int, str], list[str]]:
    """Look genes up of which some may be unknown; these are reported.

    Args:
        names: Ensembl ids, symbols or aliases, or a single one.
        vocabulary: `GeneVocabulary` of the tokenizer.
        what: What the genes are, for messages.

    Returns:
        Token -> name as given (the first where two name one gene), and the names that are unknown.

    Raises:
        KeyError: If none is known.
    """
    names = [names] if isinstance(names, str) else list(dict.fromkeys(map(str, names)))
    tokens = {name: gene_token(name, vocabulary) for name in names}
    unknown = [name for name, token in tokens.items() if token is None]
    if len(unknown) == len(names):
        msg = (
            f"None of the {len(names)} {what} is in the vocabulary ({shown(names)}); it has genes such as "
            f"{shown(vocabulary.gene_symbols[vocabulary.n_special_tokens :][:3])}."
        )
        raise KeyError(msg)
    if unknown:
        logger.warning(
            "%d of %d %s are not in the vocabulary: %s.", len(unknown), len(names), what, shown(unknown)
        )
    found: dict[int, str] = {}
    for name, token in tokens.items():
        if token is not None:
            found.setdefault(token, name)
    return found, unknown


def gene_name(token: int, vocabulary: Any) -> str:
    """Name a gene by its symbol where that is its own, else by its id."""
    symbol = vocabulary.gene_symbols[token]
    return symbol if vocabulary.symbol_token_ids.get(symbol) == token else vocabulary.gene_ids[token]
