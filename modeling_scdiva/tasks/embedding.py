"""Cell embeddings: one vector per cell from the frozen encoder.

Notable choices:
- The tokenizer comes as an argument and is known here by a `Protocol` only.
- Cells are read and tokenised in blocks, so the memory for a backed file does not grow with the file. Inside
  a block they are sorted by length, which saves padding, and their vectors go back to their own rows.
- A tokenizer of another vocabulary is refused: the tokens would be other genes, and nothing would show it.

Dimensions: N cells in a file, B cells in a loader batch, S positions, D width.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from modeling_scdiva.modeling_scdiva import pool_cells

# Cells tokenised at once, roughly: enough for batches of nearly equal length, few enough for any memory.
BLOCK_SIZE = 1024
POOLINGS = ("lat", "mean")


class CellTokenizer(Protocol):
    """What is needed of a tokenizer; `ScDivaTokenizer` has it."""

    vocabulary: Any  # with a content_hash

    @property
    def vocab_size(self) -> int:
        """Number of tokens V, specials included."""

    def iter_cells(
        self, adata: Any, *, max_genes: int | None, block_size: int, **kwargs: Any
    ) -> Iterator[Any]:
        """Tokenize an AnnData block by block, in the order of its cells."""

    def pad_cells(self, cells: Any, *, return_tensors: str) -> Mapping[str, torch.Tensor]:
        """Lay the cells of one block out as model inputs."""


def embed_cells(
    adata: Any,
    *,
    model: PreTrainedModel,
    tokenizer: CellTokenizer,
    batch_size: int = 64,
    max_genes: int | None = None,
    pooling: str = "lat",
    show_progress: bool = True,
    **reading: Any,
) -> np.ndarray:
    """Compute one vector per cell.

    The model runs where it is and as it is: on its device, in its dtype, in evaluation mode, which is undone
    afterwards. The result does not depend on ``batch_size`` beyond rounding. A vector that is not finite
    raises ``FloatingPointError``.

    Args:
        adata: AnnData with N cells, in memory or backed; a backed one is read in blocks.
        model: Encoder, or a model with a head, whose encoder is used.
        tokenizer: The tokenizer of this model.
        batch_size: Cells in one forward pass.
        max_genes: Genes kept of a cell; default the tokenizer's.
        pooling: "lat" takes the state of the anchor ``<lat>``, "mean" the mean state over the genes of the
            cell.
        show_progress: Show a progress bar.
        **reading: How to read the AnnData, as in `ScDivaTokenizer.iter_cells`: ``layer``,
            ``expression_is_log1p``, ``gene_id_key``, ``library_size``, ``keep_empty_cells``,
            ``min_gene_overlap``, ``min_count_overlap``.

    Returns:
        (N, D) float32, rows in the order of ``adata.obs_names``.

    Raises:
        TypeError: If a path comes instead of an AnnData.
        ValueError: If ``batch_size`` or ``pooling`` is impossible, or the vocabularies of tokenizer and model
            differ.
    """
    if isinstance(adata, str | os.PathLike):
        msg = f"Cells are taken from an AnnData, got a path ({adata}); open it with anndata.read_h5ad."
        raise TypeError(msg)
    if batch_size < 1:
        msg = f"batch_size must be at least 1 cell, got {batch_size}."
        raise ValueError(msg)
    if pooling not in POOLINGS:
        msg = f'pooling must be "lat" or "mean", got {pooling!r}.'
        raise ValueError(msg)
    check_vocabulary(model, tokenizer)
    encoder: Any = model.base_model
    # A whole number of batches per block, so that no block ends in a small batch.
    block_size = batch_size * max(1, round(BLOCK_SIZE / batch_size))
    blocks = tokenizer.iter_cells(adata, max_genes=max_genes, block_size=block_size, **reading)

    embeddings = np.empty((adata.n_obs, model.config.hidden_size), dtype=np.float32)
    start = 0
    bar = tqdm(total=adata.n_obs, unit=" cells", desc="Embedding", disable=not show_progress)
    with bar, _evaluation_mode(encoder), torch.inference_mode():
        for block in blocks:
            inputs = tokenizer.pad_cells(block, return_tensors="pt")
            stop = start + len(inputs["input_ids"])
            for rows, vectors in _embed_block(encoder, inputs, batch_size, pooling):
                embeddings[start + rows] = vectors
                bar.update(len(rows))
            _refuse_not_finite(embeddings[start:stop], start, adata)
            start = stop
    if start != adata.n_obs:
        msg = f"The tokenizer gave {start} cells of {adata.n_obs}; every cell must come, in order."
        raise ValueError(msg)
    return embeddings


def check_vocabulary(model: PreTrainedModel, tokenizer: CellTokenizer) -> None:
    """Refuse a tokenizer whose tokens are not those the model was trained with.

    Args:
        model: Any scDiVa model; without ``config.vocabulary_hash`` only the sizes can be compared.
        tokenizer: Tokenizer to go with it.

    Raises:
        ValueError: If the number of tokens or the content of the vocabularies differs.
    """
    config = model.config
    if tokenizer.vocab_size != config.vocab_size:
        msg = (
            f"The tokenizer has {tokenizer.vocab_size:,} tokens and the model {config.vocab_size:,}. "
            "Load the tokenizer from the folder of the model."
        )
        raise ValueError(msg)
    found = tokenizer.vocabulary.content_hash
    if config.vocabulary_hash is not None and found != config.vocabulary_hash:
        msg = (
            f"The model was trained with the vocabulary {config.vocabulary_hash[:12]} and the tokenizer has "
            f"{found[:12]}: the same token would be another gene. Load the tokenizer from the model's folder."
        )
        raise ValueError(msg)


def _embed_block(
    encoder: PreTrainedModel, inputs: Mapping[str, torch.Tensor], batch_size: int, pooling: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield rows (B,) of a block and their vectors (B, D), longest cells first."""
    lengths = inputs["attention_mask"].sum(dim=1)
    order = torch.argsort(
        lengths, descending=True, stable=True
    )  # the largest batch first: out of memory at once
    for rows in order.split(batch_size):
        width = int(lengths[rows].max())
        batch = {name: tensor[rows, :width].to(encoder.device) for name, tensor in inputs.items()}
        states = encoder(**batch).last_hidden_state  # (B, S, D)
        vectors = pool_cells(states.float(), batch["attention_mask"], pooling)  # (B, D)
        yield rows.numpy(), vectors.cpu().numpy()


def _refuse_not_finite(embeddings: np.ndarray, start: int, adata: Any) -> None:
    broken = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(broken):
        name = str(adata.obs_names[start + broken[0]])
        msg = (
            f"{len(broken)} of cells {start} to {start + len(embeddings) - 1} have embeddings that are not "
            f"finite, first {name!r}. Load the model with dtype=torch.float32; float16 overflows easily."
        )
        raise FloatingPointError(msg)


@contextmanager
def _evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Switch dropout off, and give every submodule its own mode back, also after an error."""
    modes = {submodule: submodule.training for submodule in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for submodule, mode in modes.items():
            submodule.training = mode
