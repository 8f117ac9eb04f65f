"""A corpus as one writes it first: plain NumPy and `Dataset.from_generator`, the peer of `build_corpus`."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from tokenization_scdiva import CorpusSettings, ScDivaTokenizer, build_corpus
from tokenization_scdiva.corpus import corpus_features

TARGET_SUM = 1e4


def build(files: dict[str, Path], tokenizer: ScDivaTokenizer) -> dict[str, Any]:
    """Build a corpus in a folder that is thrown away.

    Args:
        files: Data set name -> file.
        tokenizer: The corpus' tokenizer.

    Returns:
        Its manifest.
    """
    with tempfile.TemporaryDirectory() as corpus:
        settings = CorpusSettings(validation_fraction=0.0)
        manifest = build_corpus(files, corpus, tokenizer=tokenizer, settings=settings, show_progress=False)
    assert manifest is not None
    return manifest


def plain_cell(counts: np.ndarray, token_ids: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """Rank one cell.

    Args:
        counts: (n,) molecules.
        token_ids: (n,) token of each gene, -1 for none.
        weights: (V,) ranking weights.

    Returns:
        Columns of the cell, but for where it comes from.
    """
    library_size = counts.sum()
    is_known = token_ids >= 0
    counts, token_ids = counts[is_known], token_ids[is_known]
    values = np.log1p(counts * TARGET_SUM / library_size).astype(np.float32)
    order = np.argsort(-(values / weights[token_ids]), kind="stable")
    return {
        "gene_ids": token_ids[order].astype(np.uint16),
        "counts": counts[order].astype(np.uint16),
        "library_size": library_size,
    }


def build_plainly(
    plain_rows: Callable[..., Iterator[dict[str, Any]]], files: dict[str, Path], tokenizer: ScDivaTokenizer
) -> int:
    """Let `datasets` write cells.

    Args:
        plain_rows: Generator of rows; takes ``files`` and ``tokenizer``.
        files: Data set name -> file.
        tokenizer: The corpus' tokenizer.

    Returns:
        Number of cells.
    """
    features = corpus_features(
        value_kind="counts", vocab_size=len(tokenizer.vocabulary), count_dtype="uint16", obs_keys=()
    )
    keywords = {"files": files, "tokenizer": tokenizer}
    with tempfile.TemporaryDirectory() as cache:
        rows = Dataset.from_generator(
            plain_rows, features=features, cache_dir=cache, gen_kwargs=keywords, fingerprint="plain"
        )
        return len(rows)
