"""What comes out of the models: the fields of the diffusion model's output, and one vector per cell.

Dimensions: B cells in a loader batch, S positions, V vocabulary, D width, H heads, n positions to predict.
"""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class ScDivaMaskedDiffusionOutput(ModelOutput):
    """What `ScDivaForMaskedDiffusion` returns; a loss is there when its targets came.

    Args:
        loss: Gene loss + ``expression_loss_weight`` * expression loss + ``latent_loss_weight`` * latent loss,
            as far as they are there.
        gene_loss: Mean over cells of the mean masked cross-entropy, nats.
        expression_loss: Mean over cells of the mean squared error at hidden values, squared log1p units.
        latent_loss: Mean over cells of the loss of their gene queries, nats + squared log1p units.
        logits: (n, V) gene logits, cell after cell, or (B, S, V) when all were asked for.
        expression_predictions: (B, S) predicted expression values, float32, at every position.
        cell_gene_loss: (B,) gene loss of each cell; 0 where no gene is masked.
        cell_expression_loss: (B,) expression loss of each cell; 0 where no value is hidden.
        cell_latent_loss: (B,) latent loss of each cell.
        last_hidden_state: (B, S, D) states after the last norm; the first position is the cell embedding.
        hidden_states: (B, S, D) states after the embedding and after each layer.
        attentions: (B, H, S, S) attention weights of each layer.
    """

    loss: torch.Tensor | None = None
    gene_loss: torch.Tensor | None = None
    expression_loss: torch.Tensor | None = None
    latent_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    expression_predictions: torch.Tensor | None = None
    cell_gene_loss: torch.Tensor | None = None
    cell_expression_loss: torch.Tensor | None = None
    cell_latent_loss: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


def pool_cells(hidden_states: torch.Tensor, attention_mask: torch.Tensor, cell_pooling: str) -> torch.Tensor:
    """Reduce the states of each cell to one vector.

    Args:
        hidden_states: (B, S, D) last hidden states, `<lat>` at position 0.
        attention_mask: (B, S) bool or 0/1, 0 at padding.
        cell_pooling: "lat" takes the state of `<lat>`, "mean" the mean over the positions behind it.

    Returns:
        (B, D) one vector per cell; zeros where "mean" finds a cell without genes.

    Raises:
        ValueError: If ``cell_pooling`` is neither.
    """
    if cell_pooling == "lat":
        return hidden_states[:, 0]
    if cell_pooling != "mean":
        msg = f'cell_pooling must be "lat" or "mean", got {cell_pooling!r}.'
        raise ValueError(msg)
    is_gene = attention_mask[:, 1:].to(hidden_states.dtype).unsqueeze(-1)  # (B, S - 1, 1)
    return (hidden_states[:, 1:] * is_gene).sum(dim=1) / is_gene.sum(dim=1).clamp(min=1.0)


def pooled_positions(cell_pooling: str) -> torch.Tensor | None:
    """Say which last states `pool_cells` reads, for ``output_positions`` of the encoder.

    Args:
        cell_pooling: "lat" or "mean".

    Returns:
        (1, 1) int64 position of `<lat>`; None where all are read.
    """
    return torch.zeros(1, 1, dtype=torch.long) if cell_pooling == "lat" else None


__all__ = ["ScDivaMaskedDiffusionOutput", "pool_cells", "pooled_positions"]
