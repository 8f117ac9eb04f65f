"""Models with random weights: one to be pretrained, and the baseline of one that was."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.utils import set_seed

from modeling_scdiva.configuration_scdiva import ScDivaConfig
from modeling_scdiva.modeling_scdiva import ScDivaForMaskedDiffusion

# Parts of the network that a checkpoint may lack when training goes on from it.
OPTIONAL_PARTS = frozenset({"condition_embedding", "query_decoder", "quality_head"})


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
    config: str | Path | Mapping[str, Any], tokenizer: RankingTokenizer, *, seed: int = 0
) -> ScDivaForMaskedDiffusion:
    """Make a model with random weights for a vocabulary.

    Args:
        config: `ScDivaConfig` file, or its fields; ``vocab_size`` gives way to the tokenizer's.
        tokenizer: Gives vocabulary size and hash, and the gene weights of ``value_head="gene"``.
        seed: Of the weights; set for all generators.

    Returns:
        The model.

    Raises:
        ValueError: If the tokenizer keeps more genes of a cell than the network has positions.
    """
    if isinstance(config, str | Path):
        config = json.loads(Path(config).read_text("utf-8"))
    settings: dict[str, Any] = dict(config)  # type: ignore[arg-type]
    settings["vocab_size"] = len(tokenizer)
    settings["vocabulary_hash"] = tokenizer.ranking_settings["vocabulary_hash"]
    network = ScDivaConfig(**settings)
    if tokenizer.max_genes + 1 > network.max_position_embeddings:
        msg = (
            f"The tokenizer keeps max_genes={tokenizer.max_genes} genes of a cell and the anchor, the "
            f"network has {network.max_position_embeddings} positions. Raise "
            "max_position_embeddings, or build the tokenizer with fewer genes."
        )
        raise ValueError(msg)
    set_seed(seed)
    model = ScDivaForMaskedDiffusion(network)
    if network.value_head == "gene":
        model.set_gene_weights(tokenizer.ranking_weights)
    return model


def take_weights(model: ScDivaForMaskedDiffusion, checkpoint: str | Path) -> list[str]:
    """Start a model from the weights of a checkpoint instead of at random.

    Parts that the checkpoint lacks (conditions, gene-query decoder, quality head) stay as they are; nothing
    else may be missing, left over or of another shape.

    Args:
        model: A model with random weights, changed in place.
        checkpoint: Folder or Hub id of a `ScDivaForMaskedDiffusion`.

    Returns:
        Names of the parts that stay random.

    Raises:
        ValueError: If the vocabularies or the networks differ.
    """
    source = ScDivaForMaskedDiffusion.from_pretrained(checkpoint)
    known, wanted = source.config.vocabulary_hash, model.config.vocabulary_hash
    if known != wanted:
        msg = (
            f"{checkpoint} was trained with the vocabulary {str(known)[:12]}, this run has "
            f"{str(wanted)[:12]}: the same token would be another gene. Use the tokenizer and a corpus of "
            "that checkpoint."
        )
        raise ValueError(msg)
    weights, own = source.state_dict(), model.state_dict()
    differing = [name for name in weights if name not in own or weights[name].shape != own[name].shape]
    fresh = {name.removeprefix("model.").split(".")[0] for name in own if name not in weights}
    if differing or not fresh <= OPTIONAL_PARTS:
        names = ", ".join([*differing, *sorted(fresh - OPTIONAL_PARTS)][:6])
        msg = f"{checkpoint} has another network: {names}. Use its configuration, objective included."
        raise ValueError(msg)
    model.load_state_dict(weights, strict=False)
    return sorted(fresh)


def random_weights(model: Any, *, seed: int = 0) -> Any:
    """Make a model of the same shape that has learned nothing, the baseline of every pretrained one.

    Args:
        model: Any scDiVa model.
        seed: Of the weights; the global generator is left as it was.

    Returns:
        A model of the same class and config on the same device, in evaluation mode; it knows the ranking
        weights of genes where the original does.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(model)(model.config)
    if getattr(getattr(model, "value_head", None), "is_gene_conditioned", False):
        fresh.set_gene_weights(model.value_head.gene_weights)
    return fresh.to(device=model.device, dtype=model.dtype).eval()
