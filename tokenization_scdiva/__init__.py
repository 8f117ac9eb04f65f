"""Counts in, tensors out: vocabulary, tokenizer, Arrow corpus and collator of scDiVa.

The tokenizer travels to the Hub with a checkpoint (`*_scdiva.py`); corpus and collator are used where one trains.
Importing this package registers the tokenizer with `AutoTokenizer`. Names not listed in `__all__` are reached by
their module's path and may change.
"""

from transformers import AutoTokenizer

from modeling_scdiva.configuration_scdiva import ScDivaConfig
from tokenization_scdiva.batch_sampler import CellBatchSampler
from tokenization_scdiva.collation import ScDivaDataCollator, thin_counts
from tokenization_scdiva.corpus import CellCorpus
from tokenization_scdiva.corpus_builder import CorpusSettings, build_corpus
from tokenization_scdiva.counts_scdiva import read_counts
from tokenization_scdiva.files import find_cell_files, open_cells
from tokenization_scdiva.gene_entropy import GeneEntropy
from tokenization_scdiva.synthetic import synthetic_cells
from tokenization_scdiva.tokenization_scdiva import ScDivaTokenizer
from tokenization_scdiva.vocabulary_builder import build_vocabulary
from tokenization_scdiva.vocabulary_scdiva import GeneVocabulary

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
    "find_cell_files",
    "open_cells",
    "read_counts",
    "synthetic_cells",
    "thin_counts",
]

AutoTokenizer.register(ScDivaConfig, tokenizer_class=ScDivaTokenizer, exist_ok=True)
ScDivaTokenizer.register_for_auto_class("AutoTokenizer")
