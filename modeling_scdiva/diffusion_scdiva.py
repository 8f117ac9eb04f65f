"""Masked diffusion as small pure functions: noise schedule, losses per cell, genes that a cell excludes.

Notable choices:
- The schedule is linear, alpha(t) = 1 - t, and is written here once. Its functions take floats, numpy arrays
  and torch tensors alike, because the collator draws with numpy and the sampler works on tensors.
- The reduction is the objective: losses are averaged over the masked positions of each cell first. With
  t ~ U(0, 1) that mean has the expectation NELBO / (L + 1); a mean over all masked positions has not.

Dimensions: B cells in a loader batch, S positions, V vocabulary, n masked positions in the loader batch.
Source: METHOD.md sections 2 and 4.
"""

from typing import TypeVar

import numpy as np
import torch
from torch import nn

Array = TypeVar("Array", float, np.ndarray, torch.Tensor)
Vector = TypeVar("Vector", np.ndarray, torch.Tensor)


def alpha(timestep: Array) -> Array:
    """Give the kept share: the probability that a gene token is still visible.

    Args:
        timestep: Diffusion time in [0, 1]; 0 is the clean cell.

    Returns:
        Kept share in [0, 1], same kind and shape.
    """
    return 1.0 - timestep


def alpha_derivative(timestep: Array) -> Array:
    """Give the slope of the kept share over time.

    Args:
        timestep: Diffusion time in [0, 1].

    Returns:
        d alpha / dt, which is -1 everywhere, same kind and shape.
    """
    return 0.0 * timestep - 1.0


def masking_rate(timestep: Array) -> Array:
    """Give the probability that a gene token is masked.

    Args:
        timestep: Diffusion time in [0, 1].

    Returns:
        1 - alpha(t) in [0, 1], same kind and shape.
    """
    return 1.0 - alpha(timestep)


def loss_weight(timestep: Array) -> Array:
    """Give the weight of the summed masked loss in the continuous-time bound.

    Args:
        timestep: Diffusion time in (0, 1].

    Returns:
        -alpha'(t) / (1 - alpha(t)), which is 1 / t, same kind and shape.
    """
    return -alpha_derivative(timestep) / masking_rate(timestep)


def stratified_timesteps(uniforms: Vector, strata: Vector, n_strata: int | None = None) -> Vector:
    """Spread diffusion times evenly: one draw in each of ``n_strata`` equal intervals.

    Every time by itself is uniform on (0, 1] when the strata are a random permutation; together they vary far
    less than independent draws. Whoever holds a part of a batch passes that part and the size of the whole.

    Args:
        uniforms: (B,) independent draws from [0, 1).
        strata: (B,) index of the interval of each cell, from a random permutation of 0 .. n_strata - 1.
        n_strata: Number of intervals; the number of cells when not given.

    Returns:
        (B,) times in (0, 1], same kind.

    Raises:
        ValueError: If the shapes differ.
    """
    if np.shape(uniforms) != np.shape(strata):
        msg = f"uniforms and strata must have one shape, got {np.shape(uniforms)} and {np.shape(strata)}."
        raise ValueError(msg)
    return (strata + (1.0 - uniforms)) / (n_strata or len(strata))


def per_cell_mean(losses: torch.Tensor, cell_index: torch.Tensor, n_cells: int) -> torch.Tensor:
    """Average values over the masked positions of each cell.

    Args:
        losses: (n,) one value per masked position.
        cell_index: (n,) int64, the cell of each position, in 0 .. n_cells - 1.
        n_cells: Number of cells B.

    Returns:
        (B,) mean per cell; 0 for a cell without a masked position, still part of the graph.
    """
    totals = losses.new_zeros(n_cells).index_add(0, cell_index, losses)
    n_masked = losses.new_zeros(n_cells).index_add(0, cell_index, torch.ones_like(losses))
    return totals / n_masked.clamp(min=1.0)


def gene_nats(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute the cross-entropy of genes.

    Args:
        logits: (n, V) gene logits; -inf is probability zero.
        labels: (n,) int64 true gene tokens.

    Returns:
        (n,) float32 nats.
    """
    # bf16 logits would lose the small differences that make up a loss near its floor.
    return nn.functional.cross_entropy(logits.float(), labels, reduction="none")


def masked_expression_loss(
    predictions: torch.Tensor, targets: torch.Tensor, cell_index: torch.Tensor, n_cells: int
) -> torch.Tensor:
    """Compute the mean squared error of the hidden expression values of each cell.

    Args:
        predictions: (n,) predicted expression values at the hidden positions, log1p of normalised counts.
        targets: (n,) values of the clean cell, same unit.
        cell_index: (n,) int64, the cell of each position.
        n_cells: Number of cells B.

    Returns:
        (B,) float32 squared log1p units; 0 for a cell without a hidden value.
    """
    losses = (predictions.float() - targets.float()).square()  # (n,)
    return per_cell_mean(losses, cell_index, n_cells)


def gene_query_loss(
    expressed_logits: torch.Tensor,
    predictions: torch.Tensor,
    targets: torch.Tensor,
    is_query: torch.Tensor,
    log_sampling_ratio: torch.Tensor,
) -> torch.Tensor:
    """Compute the loss of asking a cell for the state of some genes: is it expressed, and how much.

    Expressed genes are few, so they are asked more often than their share. Adding the log ratio of both
    sampling rates to the log-odds in training (case-control sampling) leaves the log-odds themselves those of
    a gene drawn at its natural share: they need no correction afterwards.

    Args:
        expressed_logits: (B, Q) log-odds that the gene is detected in the cell.
        predictions: (B, Q) predicted values if it is, log1p of normalised counts.
        targets: (B, Q) values of the clean cell; 0 is a measured gene that is not expressed.
        is_query: (B, Q) bool, False at empty slots.
        log_sampling_ratio: (B,) log of (share of the expressed genes asked / share of the silent ones asked).

    Returns:
        (B,) float32 mean cross-entropy in nats over the queries + mean squared error in squared log1p units
        over the expressed ones; 0 for a cell without queries.
    """
    is_expressed = (targets > 0) & is_query  # (B, Q)
    log_odds = expressed_logits.float() + log_sampling_ratio.float().unsqueeze(1)
    nats = nn.functional.binary_cross_entropy_with_logits(log_odds, (targets > 0).float(), reduction="none")
    squares = (predictions.float() - targets.float()).square()
    return _mean_where(nats, is_query) + _mean_where(squares, is_expressed)


def _mean_where(losses: torch.Tensor, is_counted: torch.Tensor) -> torch.Tensor:
    """Average (B, Q) over the slots that count, for each cell; 0 where none does."""
    weights = is_counted.to(losses.dtype)
    return (losses * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)


def visible_gene_mask(input_ids: torch.Tensor, n_special_tokens: int, vocab_size: int) -> torch.Tensor:
    """Mark the genes which a cell already shows. A gene occurs once per cell, so it cannot be masked as well.

    Args:
        input_ids: (B, S) gene tokens; masked genes and padding carry special ids.
        n_special_tokens: The first ids of the vocabulary, which are no genes.
        vocab_size: Size V of the vocabulary.

    Returns:
        (B, V) bool, True at visible genes, False at every special id.
    """
    is_visible = torch.zeros(input_ids.shape[0], vocab_size, dtype=torch.bool, device=input_ids.device)
    is_visible.scatter_(1, input_ids, value=True)  # (B, V)
    is_visible[:, :n_special_tokens] = False
    return is_visible


__all__ = [
    "alpha",
    "alpha_derivative",
    "gene_nats",
    "gene_query_loss",
    "loss_weight",
    "masked_expression_loss",
    "masking_rate",
    "per_cell_mean",
    "stratified_timesteps",
    "visible_gene_mask",
]
