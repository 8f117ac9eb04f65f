"""Cell embeddings: one vector per cell from the frozen encoder.

Notable choices:
- Cells are read and tokenised in blocks, so the memory for a backed file does not grow with the file. Inside
  a block they are sorted by length, which saves padding, and their vectors go back to their own rows.

Dimensions: N cells in a file, B cells in a loader batch, P positions that are pooled, D width.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from modeling_scdiva.outputs_scdiva import pool_cells, pooled_positions
from modeling_scdiva.pretrained_scdiva import evaluation_mode
from modeling_scdiva.tasks.cells import BLOCK_SIZE, CellTokenizer, check_vocabulary, encoder_of, refuse_path

POOLINGS = ("lat", "mean")


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
    raises ``FloatingPointError``; a path instead of an AnnData, ``TypeError``.

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
        ValueError: If ``batch_size`` or ``pooling`` is impossible, or the vocabularies of tokenizer and model
            differ.
    """
    refuse_path(adata)
    if batch_size < 1:
        msg = f"batch_size must be at least 1 cell, got {batch_size}."
        raise ValueError(msg)
    if pooling not in POOLINGS:
        msg = f'pooling must be "lat" or "mean", got {pooling!r}.'
        raise ValueError(msg)
    check_vocabulary(model, tokenizer)
    encoder = encoder_of(model)
    # A whole number of batches per block, so that no block ends in a small batch.
    block_size = batch_size * max(1, round(BLOCK_SIZE / batch_size))
    blocks = tokenizer.iter_cells(adata, max_genes=max_genes, block_size=block_size, **reading)

    embeddings = np.empty((adata.n_obs, model.config.hidden_size), dtype=np.float32)
    start = 0
    bar = tqdm(total=adata.n_obs, unit=" cells", desc="Embedding", disable=not show_progress)
    with bar, evaluation_mode(encoder), torch.inference_mode():
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
        states = encoder(**batch, output_positions=pooled_positions(pooling)).last_hidden_state  # (B, P, D)
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
