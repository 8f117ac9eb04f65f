"""Cells before and after the reverse process: what may come in, what is hidden, and the order that goes out.

Dimensions: N cells, B cells of one call, S positions, V vocabulary, K conditions.
Source: METHOD.md section 5.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from .conditions_scdiva import NOT_GIVEN
from .generation_config_scdiva import ScDivaGenerationConfig, ScDivaGenerationOutput
from .sampling_scdiva import CellNoise
from .unmask_scdiva import CellState, UnmaskedCells

# Tells the seed that picks the genes to hide from the one that draws them.
STRENGTH_SEED = 0x5CD2


def cell_seeds(n_cells: int, seed: int, generator: torch.Generator | None) -> torch.Tensor:
    """Give every cell a seed of its own; the first cells have the same whatever their number.

    Args:
        n_cells: Number of cells N.
        seed: Where they come from.
        generator: Where they come from instead.

    Returns:
        (N,) int64.
    """
    generator = torch.Generator().manual_seed(seed) if generator is None else generator
    return torch.randint(2**62, (n_cells,), generator=generator, device=generator.device).cpu()


def n_new_cells(n_cells: int | None, n_genes: Any) -> int:
    """Say how many cells to make.

    Args:
        n_cells: The number, if it was given.
        n_genes: Gene tokens of each, one number or one per cell.

    Returns:
        Number of cells N.

    Raises:
        ValueError: If no number was given, or two that differ.
    """
    n_lengths = len(n_genes) if hasattr(n_genes, "__len__") and np.ndim(n_genes) else None
    if n_cells is None and n_lengths is None:
        msg = "n_cells did not come. Say how many cells to make, or pass input_ids to start from."
        raise ValueError(msg)
    n_cells = n_cells if n_lengths is None or n_cells is not None else n_lengths
    if n_cells is None or n_cells < 1 or n_lengths not in (None, n_cells):
        msg = f"n_cells must be at least 1 and n_genes one number per cell, got {n_cells} and {n_lengths}."
        raise ValueError(msg)
    return n_cells


def check_lengths(lengths: np.ndarray, network: Any) -> None:
    """Refuse cells that are empty or longer than can be.

    Args:
        lengths: (N,) gene tokens of each cell.
        network: `ScDivaConfig`.

    Raises:
        ValueError: If one is.
    """
    n_known = network.vocab_size - network.n_special_tokens
    longest, shortest = int(lengths.max(initial=1)), int(lengths.min(initial=1))
    if shortest < 1:
        msg = f"A cell has at least one gene, got n_genes={shortest}."
        raise ValueError(msg)
    if longest > n_known:
        msg = (
            f"n_genes={longest:,} is more than the {n_known:,} genes of the vocabulary; a gene occurs once "
            "in a cell. Ask for fewer."
        )
        raise ValueError(msg)
    if longest + 1 > network.max_position_embeddings:
        msg = (
            f"n_genes={longest:,} and `<lat>` need {longest + 1:,} positions, and the network was made for "
            f"{network.max_position_embeddings:,}. Ask for fewer."
        )
        raise ValueError(msg)


def check_tokens(input_ids: torch.Tensor, network: Any) -> None:
    """Refuse tokens outside the vocabulary, and cells that show a gene twice.

    Args:
        input_ids: (N, S) tokens, the pad token at padding.
        network: `ScDivaConfig`.

    Raises:
        ValueError: If there is one.
    """
    is_outside = (input_ids < 0) | (input_ids >= network.vocab_size)
    if is_outside.any():
        msg = (
            f"input_ids hold the token {int(input_ids[is_outside][0])}, which is outside the vocabulary "
            f"(0 .. {network.vocab_size - 1}). Take tokens from the tokenizer of this checkpoint."
        )
        raise ValueError(msg)
    ordered = input_ids.sort(dim=1).values
    is_repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= network.n_special_tokens)
    if is_repeated.any():
        cell, place = is_repeated.nonzero()[0].tolist()
        msg = f"Cell {cell} shows the gene {int(ordered[cell, place])} twice; a gene occurs once in a cell."
        raise ValueError(msg)


def checked_factors(size_factors: Any, n_cells: int, device: Any) -> torch.Tensor | None:
    """Check the size factors of cells.

    Args:
        size_factors: One number or (N,), or None.
        n_cells: Number of cells N.
        device: Where to.

    Returns:
        (N,) float64, or None.

    Raises:
        ValueError: If there are not as many as cells, or one is not positive.
    """
    if size_factors is None:
        return None
    factors = torch.as_tensor(size_factors, dtype=torch.float64, device=device)
    factors = factors.expand(n_cells) if factors.ndim == 0 else factors
    if factors.shape != (n_cells,) or not (factors > 0).all() or not factors.isfinite().all():
        msg = (
            f"size_factors must be {n_cells} positive numbers (molecules of the cell / target_sum), got "
            f"shape {tuple(factors.shape)}"
            + (f", smallest {float(factors.min())}." if factors.numel() else ".")
        )
        raise ValueError(msg)
    return factors


def checked_conditions(
    condition_ids: Any, n_cells: int, network: Any, config: ScDivaGenerationConfig, device: Any
) -> torch.Tensor | None:
    """Check the conditions of cells against the network and the guidance.

    Args:
        condition_ids: (N, K) or (K,) categories, 0 = not given, or None.
        n_cells: Number of cells N.
        network: `ScDivaConfig`.
        config: Its ``guidance_scale`` is read.
        device: Where to.

    Returns:
        (N, K) int64, or None for a network without conditions.

    Raises:
        ValueError: If the network has no conditions and some came, or guidance was asked for; if guidance has
            nothing to guide to; or if the shape is wrong.
    """
    is_guided = config.guidance_scale != 1.0
    if not network.conditions:
        if condition_ids is not None or is_guided:
            what = f"guidance_scale={config.guidance_scale:g}" if is_guided else "condition_ids"
            msg = f"{what} came, and this network was trained without conditions. Leave it out."
            raise ValueError(msg)
        return None
    n_conditions = len(network.conditions)
    if condition_ids is None:
        condition_ids = torch.full((n_conditions,), NOT_GIVEN)
    ids = torch.as_tensor(condition_ids, dtype=torch.long, device=device)
    ids = ids.expand(n_cells, -1) if ids.ndim == 1 else ids
    if ids.shape != (n_cells, n_conditions):
        msg = f"condition_ids must have shape {(n_cells, n_conditions)}, got {tuple(ids.shape)}."
        raise ValueError(msg)
    if is_guided and (ids == NOT_GIVEN).all(dim=1).any():
        msg = (
            f"guidance_scale={config.guidance_scale:g} sharpens conditions, and a cell has none. Give one, "
            "or leave guidance_scale at 1."
        )
        raise ValueError(msg)
    return ids


def hide_share(state: CellState, seeds: torch.Tensor, strength: float, network: Any) -> CellState:
    """Hide a share of the visible genes of each cell, gene and value.

    Args:
        state: N cells.
        seeds: (N,) seeds of the cells.
        strength: Share to hide, in [0, 1], rounded to whole genes.
        network: `ScDivaConfig`.

    Returns:
        The cells with genes hidden.

    Raises:
        ValueError: If the share lies outside [0, 1].
    """
    if not 0.0 <= strength <= 1.0:
        msg = f"strength must lie in [0, 1] (share of the genes to make anew), got {strength}."
        raise ValueError(msg)
    is_gene = state.attention_mask & (state.input_ids >= network.n_special_tokens)  # (N, S)
    noise = CellNoise((seeds ^ STRENGTH_SEED).tolist(), state.input_ids.device)
    uniforms = noise.uniforms(torch.arange(len(seeds)), state.attention_mask, 1)[0]
    turn = uniforms.masked_fill(~is_gene, torch.inf).argsort(dim=1).argsort(dim=1)
    n_hidden = (strength * is_gene.sum(dim=1)).round()
    is_hidden = is_gene & (turn < n_hidden.unsqueeze(1))
    return replace(
        state,
        input_ids=state.input_ids.masked_fill(is_hidden, network.mask_token_id),
        expression_values=state.expression_values.masked_fill(is_hidden, 0.0),
        is_masked=state.is_masked | is_hidden,
    )


def with_slots(state: CellState, n_genes: Any, network: Any) -> CellState:
    """Add hidden genes behind those of each cell, up to a number.

    Args:
        state: N cells.
        n_genes: Gene tokens of each finished cell, one number or (N,).
        network: `ScDivaConfig`.

    Returns:
        The cells, padded on the right.

    Raises:
        ValueError: If a cell has more genes than that, or the number cannot be.
    """
    n_cells = len(state.input_ids)
    wanted = torch.as_tensor(n_genes, dtype=torch.long, device=state.input_ids.device)
    if wanted.ndim and wanted.shape != (n_cells,):
        msg = f"n_genes must be one number or {n_cells}, one per cell, got shape {tuple(wanted.shape)}."
        raise ValueError(msg)
    wanted = wanted.expand(n_cells)
    check_lengths(wanted.cpu().numpy(), network)
    is_front = state.attention_mask & _is_front(state.input_ids, network)
    n_given = (state.attention_mask & ~is_front).sum(dim=1)
    if (n_given > wanted).any():
        cell = int((n_given > wanted).nonzero()[0])
        msg = (
            f"Cell {cell} has {int(n_given[cell])} genes and n_genes={int(wanted[cell])} are wanted; given "
            "genes stay. Ask for more, or give fewer."
        )
        raise ValueError(msg)
    lengths = is_front.sum(dim=1) + wanted
    width = max(int(lengths.max()), 1)
    order = (~state.attention_mask).long().argsort(dim=1, stable=True)  # real positions to the left
    n_real = state.attention_mask.sum(dim=1)
    ids = state.input_ids.gather(1, order)[:, :width]
    values = state.expression_values.gather(1, order)[:, :width]
    hidden = state.is_masked.gather(1, order)[:, :width]
    extra = width - ids.shape[1]
    ids, values, hidden = (torch.nn.functional.pad(part, (0, extra)) for part in (ids, values, hidden))
    places = torch.arange(width, device=ids.device)
    is_real = places < lengths.unsqueeze(1)
    is_new = is_real & (places >= n_real.unsqueeze(1))
    ids = ids.masked_fill(is_new, network.mask_token_id).masked_fill(~is_real, network.pad_token_id)
    return replace(
        state,
        input_ids=ids,
        expression_values=values.masked_fill(is_new | ~is_real, 0.0),
        attention_mask=is_real,
        is_masked=(hidden & is_real) | is_new,
    )


def trimmed(state: CellState) -> CellState:
    """Cut the columns that are padding in all cells.

    Args:
        state: B cells.

    Returns:
        The same cells, narrower.
    """
    kept = state.attention_mask.any(dim=0)
    return replace(
        state,
        input_ids=state.input_ids[:, kept],
        expression_values=state.expression_values[:, kept],
        attention_mask=state.attention_mask[:, kept],
        is_masked=state.is_masked[:, kept],
    )


def canonical_order(
    input_ids: torch.Tensor,
    expression_values: torch.Tensor,
    attention_mask: torch.Tensor,
    ranking_weights: torch.Tensor,
    network: Any,
) -> torch.Tensor:
    """Say in which order the tokenizer would put genes: by ranking score, ties by token.

    Args:
        input_ids: (N, S) tokens.
        expression_values: (N, S) float32 values.
        attention_mask: (N, S) bool.
        ranking_weights: (V,) float64.
        network: `ScDivaConfig`.

    Returns:
        (N, S) int64 positions to gather; `<lat>` and `<pert>` come first, padding last.
    """
    scores = (expression_values / ranking_weights[input_ids]).float()  # as the tokenizer compares them
    is_front = _is_front(input_ids, network)
    scores = scores.masked_fill(is_front, torch.inf).masked_fill(~attention_mask, -torch.inf)
    by_token = torch.where(is_front, 0, input_ids).argsort(dim=1, stable=True)
    by_score = scores.gather(1, by_token).argsort(dim=1, descending=True, stable=True)
    return by_token.gather(1, by_score)


def order_violations(
    input_ids: torch.Tensor,
    expression_values: torch.Tensor,
    attention_mask: torch.Tensor,
    ranking_weights: torch.Tensor,
    network: Any,
) -> torch.Tensor:
    """Count neighbours that do not stand in ranking order.

    Args:
        input_ids: (N, S) tokens, padding on the right.
        expression_values: (N, S) float32 values.
        attention_mask: (N, S) bool.
        ranking_weights: (V,) float64.
        network: `ScDivaConfig`.

    Returns:
        (N,) float64 share of the neighbouring genes; 0 for a cell of one gene.
    """
    scores = (expression_values / ranking_weights[input_ids]).float()
    is_gene = attention_mask & (input_ids >= network.n_special_tokens)
    is_pair = is_gene[:, 1:] & is_gene[:, :-1]
    is_wrong = is_pair & (scores[:, 1:] > scores[:, :-1])
    return is_wrong.sum(dim=1).double() / is_pair.sum(dim=1).clamp(min=1)


def collected(
    parts: Sequence[UnmaskedCells],
    order: torch.Tensor,
    start: CellState,
    ranking_weights: torch.Tensor | None,
    network: Any,
    *,
    is_canonical: bool,
) -> ScDivaGenerationOutput:
    """Join batches, in the order the cells came, and put genes into ranking order.

    Args:
        parts: Finished batches.
        order: (N,) which cell each of their rows is.
        start: The N cells before.
        ranking_weights: (V,) float64, or None.
        network: `ScDivaConfig`.
        is_canonical: Put genes into ranking order.

    Returns:
        The cells.
    """
    ids, values, is_real = start.input_ids.clone(), start.expression_values.clone(), start.attention_mask
    numbers: dict[str, Any] = {
        name: torch.cat([getattr(part, name) for part in parts])[order.argsort()]
        for name in ("gene_log_prob", "value_log_prob", "n_network_calls")
    }
    done = 0
    for part in parts:
        rows = order[done : done + len(part.state.input_ids)]
        kept = start.attention_mask[rows].any(dim=0).nonzero().squeeze(1)
        where = (rows.unsqueeze(1), kept.unsqueeze(0))
        ids[where], values[where] = part.state.input_ids, part.state.expression_values
        done += len(rows)
    is_generated = start.is_masked & is_real
    violations = None
    if ranking_weights is not None:
        violations = order_violations(ids, values, is_real, ranking_weights, network)
        if is_canonical:
            places = canonical_order(ids, values, is_real, ranking_weights, network)
            ids, values, is_real, is_generated = (
                entries.gather(1, places) for entries in (ids, values, is_real, is_generated)
            )
    if start.size_factors is None:
        numbers["value_log_prob"] = None
    return ScDivaGenerationOutput(
        input_ids=ids,
        expression_values=values,
        attention_mask=is_real.long(),
        is_generated=is_generated,
        size_factors=start.size_factors,
        order_violations=violations,
        **numbers,
    )


def _is_front(input_ids: torch.Tensor, network: Any) -> torch.Tensor:
    """Tokens that are no genes and stand before them."""
    return (input_ids == network.lat_token_id) | (input_ids == network.pert_token_id)


__all__ = [
    "canonical_order",
    "cell_seeds",
    "check_lengths",
    "check_tokens",
    "checked_conditions",
    "checked_factors",
    "collected",
    "hide_share",
    "n_new_cells",
    "order_violations",
    "trimmed",
    "with_slots",
]
