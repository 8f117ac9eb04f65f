"""The quality head: which of the genes a sampler has drawn do not belong (PRISM, arXiv 2510.01384).

Training cells are masked as in pretraining; some hidden slots are then filled by the network's own draws, and
the head learns from the next look whether each filled gene is the true one. What minimises the cross-entropy
is the probability that the gene is right given the rest of the cell: the quantity by which to choose what to
hide again. The network itself is frozen; the head adds D + 1 numbers.

Dimensions: B cells in a loader batch, S positions, D width, n slots.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from modeling_scdiva.denoiser_scdiva import ScDivaDenoiser
from modeling_scdiva.modeling_scdiva import ScDivaForMaskedDiffusion
from modeling_scdiva.pretrained_scdiva import evaluation_mode
from modeling_scdiva.rank_bounds_scdiva import rank_bounds
from modeling_scdiva.sampling_scdiva import CellNoise, choose_slots, draw_genes
from modeling_scdiva.unmask_scdiva import FINE_LATTICE, CellState, excluded_genes
from modeling_scdiva.value_law_scdiva import draw_counts, values_from_counts


@dataclass(frozen=True)
class QualityArguments:
    """Run numbers of the quality head.

    Attributes:
        n_steps: Optimiser updates.
        learning_rate: Of AdamW.
        filled_fraction: Share of the hidden slots of a cell that are filled, at least one.
        seed: Of slots and draws.
    """

    n_steps: int = 500
    learning_rate: float = 3e-3
    filled_fraction: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_steps < 1 or self.learning_rate <= 0 or not 0.0 < self.filled_fraction <= 1.0:
            msg = (
                "n_steps must be at least 1, learning_rate positive and filled_fraction in (0, 1], got "
                f"{self.n_steps}, {self.learning_rate} and {self.filled_fraction}."
            )
            raise ValueError(msg)


def with_quality_head(model: ScDivaForMaskedDiffusion, *, seed: int = 0) -> ScDivaForMaskedDiffusion:
    """Copy a model and give it an untrained quality head.

    Args:
        model: A diffusion model without one.
        seed: Of the head's weights; the global generator is left as it was.

    Returns:
        The same network on the same device, in the same mode and precision, with a head in float32: in
        bfloat16 it could not learn small steps.

    Raises:
        ValueError: If it has one.
    """
    if model.quality_head is not None:
        msg = "This model has a quality head already."
        raise ValueError(msg)
    # A copy keeps modes and the exact rotary frequencies, which a cast of a fresh model would round.
    twin = copy.deepcopy(model)
    twin.config.quality_head = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(model.config.hidden_size, 1)
        twin._init_weights(head)
    twin.quality_head = head.to(model.device)
    return twin


def train_quality_head(
    model: ScDivaForMaskedDiffusion,
    batches: Iterable[Mapping[str, torch.Tensor]],
    *,
    arguments: QualityArguments | None = None,
) -> list[float]:
    """Train the quality head of a model in place; nothing else changes.

    Args:
        model: A diffusion model with a quality head.
        batches: Masked batches of a training corpus; read until ``n_steps`` are done. One without a hidden
            gene is no step.
        arguments: Run numbers.

    Returns:
        Loss of each step, nats per filled gene.

    Raises:
        ValueError: If the model has no quality head, or the batches end before the steps.
    """
    arguments = QualityArguments() if arguments is None else arguments
    if model.quality_head is None:
        msg = "This model has no quality head. Give it one by with_quality_head."
        raise ValueError(msg)
    optimizer = torch.optim.AdamW(model.quality_head.parameters(), lr=arguments.learning_rate)
    losses: list[float] = []
    for step, batch in enumerate(batches):
        if len(losses) == arguments.n_steps:
            break
        logits, is_right = judged_draws(model, batch, arguments, step=step)
        if not len(is_right):
            continue
        loss = nn.functional.binary_cross_entropy_with_logits(logits, is_right.float())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    if len(losses) < arguments.n_steps:
        msg = f"The batches ended after {len(losses)} of {arguments.n_steps} steps. Repeat the loader."
        raise ValueError(msg)
    return losses


def judged_draws(
    model: ScDivaForMaskedDiffusion,
    batch: Mapping[str, torch.Tensor],
    arguments: QualityArguments,
    *,
    step: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill some hidden slots by the network's own draws and let the head judge them.

    Args:
        model: A diffusion model with a quality head.
        batch: Masked cells with ``labels``.
        arguments: Run numbers.
        step: Number of the batch, for the randomness.

    Returns:
        (n,) float32 log-odds that each drawn gene is right, with a gradient, and (n,) bool whether it is.
    """
    state, labels = _masked_state(model, batch)
    seeds = range(len(labels))
    noise = CellNoise([arguments.seed + 1_000_003 * step + 7919 * row for row in seeds], model.device)
    rows = torch.arange(len(labels), device=model.device)
    uniforms = noise.uniforms(rows, state.attention_mask, 3)  # slot, gene, value
    weights = model.value_head.gene_weights if model.value_head.is_gene_conditioned else None
    denoiser = ScDivaDenoiser(model, ranking_weights=weights)
    with evaluation_mode(model):
        with torch.no_grad():
            is_hidden = state.is_masked & state.attention_mask
            n_filled = (arguments.filled_fraction * is_hidden.sum(dim=1)).ceil().long()
            cells, places, turns = choose_slots(uniforms[0].masked_fill(~is_hidden, -torch.inf), n_filled)
            encoded = denoiser.encode(state)
            bounds = rank_bounds(state, denoiser, rank_consistent=True)
            genes, _ = draw_genes(
                denoiser.gene_logits(encoded, cells, places),
                cells,
                turns,
                excluded_genes(state, denoiser),
                uniforms[1, cells, places],
                unfit=None if bounds is None else bounds.unfit(cells, places),
            )
            factors = torch.full((len(cells),), FINE_LATTICE, dtype=torch.float64, device=model.device)
            if state.size_factors is not None:
                factors = state.size_factors.double()[cells]
            ends = torch.ones_like(factors), torch.full_like(factors, torch.inf)
            if bounds is not None:
                ends = bounds.counts(cells, places, genes, factors)
            law = denoiser.value_law(encoded, cells, places, genes)
            counts, _ = draw_counts(uniforms[2, cells, places], factors, *law, *ends)
            where = (cells, places)
            filled = replace(
                state,
                input_ids=state.input_ids.index_put(where, genes),
                expression_values=state.expression_values.index_put(
                    where, values_from_counts(counts, factors).float()
                ),
                is_masked=state.is_masked.index_put(where, torch.zeros_like(cells, dtype=torch.bool)),
            )
            judged = denoiser.encode(filled)[cells, 0, places]
        logits = model.predict_quality(judged)
    return logits, genes == labels[cells, places]


def _masked_state(
    model: ScDivaForMaskedDiffusion, batch: Mapping[str, torch.Tensor]
) -> tuple[CellState, torch.Tensor]:
    """Lay a training batch out as the reverse process sees it; the second part are the true genes."""
    inputs: dict[str, Any] = {name: entries.to(model.device) for name, entries in batch.items()}
    input_ids = inputs["input_ids"]
    is_attended = input_ids != model.config.pad_token_id
    state = CellState(
        input_ids=input_ids,
        expression_values=inputs["expression_values"].float(),
        attention_mask=is_attended,
        is_masked=(input_ids == model.config.mask_token_id) & is_attended,
        size_factors=inputs.get("size_factors"),
        condition_ids=inputs.get("condition_ids"),
    )
    return state, inputs["labels"]
