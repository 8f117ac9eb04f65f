"""Counts in, tensors out: vocabulary, tokenizer, Arrow corpus and collator of scDiVa.

The tokenizer travels to the Hub with a checkpoint (`*_scdiva.py`); corpus and collator are used where one
trains, and are imported when they are first asked for, because AnnData and datasets take seconds to load.
Importing this package registers the tokenizer with `AutoTokenizer`. Names not in `__all__` are reached by
their module's path and may change.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer

from modeling_scdiva.configuration_scdiva import ScDivaConfig
from tokenization_scdiva.counts_scdiva import read_counts
from tokenization_scdiva.tokenization_scdiva import ScDivaTokenizer
from tokenization_scdiva.vocabulary_scdiva import GeneVocabulary

if TYPE_CHECKING:
    from tokenization_scdiva.batch_sampler import CellBatchSampler
    from tokenization_scdiva.collation import ScDivaDataCollator, thin_counts
    from tokenization_scdiva.corpus import CellCorpus
    from tokenization_scdiva.corpus_builder import CorpusSettings, build_corpus
    from tokenization_scdiva.files import find_cell_files, open_cells
    from tokenization_scdiva.gene_entropy import GeneEntropy
    from tokenization_scdiva.gene_table import read_gene_tables
    from tokenization_scdiva.loading import corpus_loader
    from tokenization_scdiva.synthetic import open_or_make_up, synthetic_cells, synthetic_tokenizer
    from tokenization_scdiva.vocabulary_builder import build_vocabulary

__all__ = [
    "CellBatchSampler",
    "CellCorpus",
    "CorpusSettings",
    "GeneEntropy",
    "GeneVocabulary",
    "ScDivaDataCollator",
    "ScDivaTokenizer",
    "build_corpus",
    "build_vocabulary",
    "corpus_loader",
    "find_cell_files",
    "open_cells",
    "open_or_make_up",
    "read_counts",
    "read_gene_tables",
    "synthetic_cells",
    "synthetic_tokenizer",
    "thin_counts",
]

# Module of each name that is imported on first use.
LAZY_NAMES = {
    "CellBatchSampler": "batch_sampler",
    "CellCorpus": "corpus",
    "CorpusSettings": "corpus_builder",
    "GeneEntropy": "gene_entropy",
    "ScDivaDataCollator": "collation",
    "build_corpus": "corpus_builder",
    "build_vocabulary": "vocabulary_builder",
    "corpus_loader": "loading",
    "find_cell_files": "files",
    "open_cells": "files",
    "open_or_make_up": "synthetic",
    "read_gene_tables": "gene_table",
    "synthetic_cells": "synthetic",
    "synthetic_tokenizer": "synthetic",
    "thin_counts": "collation",
}

AutoTokenizer.register(ScDivaConfig, tokenizer_class=ScDivaTokenizer, exist_ok=True)
ScDivaTokenizer.register_for_auto_class("AutoTokenizer")


def __getattr__(name: str) -> Any:
    if name not in LAZY_NAMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(f"{__name__}.{LAZY_NAMES[name]}"), name)
