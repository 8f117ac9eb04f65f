"""A model to be pretrained, made from a config file and fitted to a tokenizer."""

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from accelerate.utils import set_seed

from modeling_scdiva.configuration_scdiva import ScDivaConfig
from modeling_scdiva.modeling_scdiva import ScDivaForMaskedDiffusion


class RankingTokenizer(Protocol):
    """What a fresh model takes from its tokenizer."""

    max_genes: int

    def __len__(self) -> int: ...

    @property
    def ranking_weights(self) -> np.ndarray:
        """(V,) weights H_g + eps."""

    @property
    def ranking_settings(self) -> dict[str, Any]:
        """Among them the vocabulary hash."""


def fresh_model(
    config_file: str | Path, tokenizer: RankingTokenizer, *, seed: int = 0
) -> ScDivaForMaskedDiffusion:
    """Make a model with random weights for a vocabulary.

    Args:
        config_file: `ScDivaConfig` file; its ``vocab_size`` gives way to the tokenizer's.
        tokenizer: Gives vocabulary size and hash, and the gene weights of ``value_head="gene"``.
        seed: Of the weights; set for all generators.

    Returns:
        The model.

    Raises:
        ValueError: If the tokenizer keeps more genes of a cell than the network has positions.
    """
    settings = json.loads(Path(config_file).read_text("utf-8"))
    settings["vocab_size"] = len(tokenizer)
    settings["vocabulary_hash"] = tokenizer.ranking_settings["vocabulary_hash"]
    config = ScDivaConfig(**settings)
    if tokenizer.max_genes + 1 > config.max_position_embeddings:
        msg = (
            f"The tokenizer keeps max_genes={tokenizer.max_genes} genes of a cell and the anchor, the "
            f"network of {config_file} has {config.max_position_embeddings} positions. Raise "
            "max_position_embeddings, or build the tokenizer with fewer genes."
        )
        raise ValueError(msg)
    set_seed(seed)
    model = ScDivaForMaskedDiffusion(config)
    if config.value_head == "gene":
        model.set_gene_weights(tokenizer.ranking_weights)
    return model
