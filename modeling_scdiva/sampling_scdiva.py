"""Parts of the reverse process as pure functions on tensors: how many slots, which slots, which genes.

A *slot* is a hidden position. Every step draws in two stages: slots first, then genes at these slots only. A
single draw over genes and "stay hidden" in float32 would cut the tail of the gene law off (arXiv 2409.02908);
here one float64 uniform per slot is inverted through the float64 distribution function of its genes.

Notable choices:
- A gene occurs once per cell. Slots of one step draw one after the other in the order of their priority, each
  without the genes that are visible and without those just drawn; so the probability of a draw is exact.
- All counts are per cell, and so is the randomness: a cell's result depends on its own seed, not on the cells
  beside it, nor on padding.

Dimensions: B cells in a loader batch, S positions, V vocabulary, n slots drawn in one step.
Source: METHOD.md section 5.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

# (k,) indices of slots -> (k, V) bool, genes that cannot stand there.
UnfitGenes = Callable[[torch.Tensor], torch.Tensor]
ORDERS = ("random", "rank", "margin", "entropy")
SCHEDULES = ("linear", "cosine")


class CellNoise:
    """Uniform numbers of cells, each from a generator of its own.

    The generator is NumPy's Philox, which takes all 64 bits of a seed; torch's takes 32 on the CPU, too few
    for a hundred thousand cells.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.generators = [np.random.Generator(np.random.Philox(key=int(seed))) for seed in seeds]
        self.device = device

    def uniforms(self, rows: torch.Tensor, is_attended: torch.Tensor, n_streams: int) -> torch.Tensor:
        """Draw for each real position of some cells.

        Args:
            rows: (B,) which cells, as indices into ``seeds``.
            is_attended: (B, S) bool, False at padding; padding takes no number.
            n_streams: Numbers per position.

        Returns:
            (n_streams, B, S) float64 in [0, 1); 0.5 at padding.
        """
        noise = torch.full((*is_attended.shape, n_streams), 0.5, dtype=torch.float64)
        is_real = is_attended.cpu()
        for place, row in enumerate(rows.tolist()):
            n_real = int(is_real[place].sum())
            drawn = self.generators[row].random((n_real, n_streams))
            noise[place, is_real[place]] = torch.from_numpy(drawn)
        return noise.movedim(2, 0).to(self.device)


def hidden_after(
    n_slots: torch.Tensor, step: int, *, n_steps: int, schedule: str, tokens_per_step: int | None = None
) -> torch.Tensor:
    """Say how many slots of each cell are still hidden after a step.

    Args:
        n_slots: (B,) int64 slots at the start.
        step: Steps done, 0 .. n_steps.
        n_steps: Steps in all.
        schedule: "linear" reveals equally many at each step; "cosine" few first, many last.
        tokens_per_step: Reveal this many at each step instead, whatever ``n_steps`` and ``schedule``.

    Returns:
        (B,) int64, falling with the step, 0 at the end.

    Raises:
        ValueError: If the schedule is unknown.
    """
    if tokens_per_step is not None:
        return (n_slots - tokens_per_step * step).clamp(min=0)
    if schedule == "linear":
        return (2 * n_slots * (n_steps - step) + n_steps) // (2 * n_steps)  # rounded in whole numbers
    if schedule == "cosine":
        share = math.cos(0.5 * math.pi * step / n_steps) if step < n_steps else 0.0
        return (n_slots.double() * share).round().long()
    msg = f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}."
    raise ValueError(msg)


def slot_priority(
    order: str, is_hidden: torch.Tensor, uniforms: torch.Tensor, certainty: torch.Tensor | None
) -> torch.Tensor:
    """Rate the slots of each cell; the highest are revealed first, the leftmost among equals.

    Args:
        order: "random"; "rank", from the first place on; "margin" or "entropy", the surest gene law first.
        is_hidden: (B, S) bool.
        uniforms: (B, S) float64 in [0, 1), for the random order.
        certainty: (B, S) float64, margin or negative entropy of the gene laws; for these two orders.

    Returns:
        (B, S) float64, -inf where nothing is hidden.

    Raises:
        ValueError: If the order is unknown, or needs a certainty that did not come.
    """
    if order not in ORDERS:
        msg = f"order must be one of {', '.join(ORDERS)}, got {order!r}."
        raise ValueError(msg)
    if order == "random":
        priority = uniforms
    elif order == "rank":
        places = torch.arange(is_hidden.shape[1], dtype=torch.float64, device=is_hidden.device)
        priority = -places.expand(is_hidden.shape)
    elif certainty is None:
        msg = f"order {order!r} reads the gene laws of all slots; none came."
        raise ValueError(msg)
    else:
        priority = certainty
    return priority.masked_fill(~is_hidden, -torch.inf)


def choose_slots(
    priority: torch.Tensor, n_chosen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Take the slots of highest priority.

    Args:
        priority: (B, S) float64, -inf where nothing is to be taken.
        n_chosen: (B,) int64 slots to take of each cell.

    Returns:
        (n,) int64 cell, (n,) int64 position and (n,) int64 turn of each slot; turn 0 draws first in its cell.
    """
    by_priority = priority.argsort(dim=1, descending=True, stable=True)  # (B, S)
    turns = torch.arange(priority.shape[1], device=priority.device).expand(priority.shape)
    cells, turn = (turns < n_chosen.unsqueeze(1)).nonzero(as_tuple=True)
    return cells, by_priority[cells, turn], turn


def n_entropy_bounded(entropy: torch.Tensor, is_hidden: torch.Tensor, bound: float) -> torch.Tensor:
    """Count the slots that may be drawn together: the joint law of few sure slots is nearly their product.

    Slots are taken from the lowest entropy on while the entropies of all but the last add up to no more than
    the bound (arXiv 2505.24857). The first is always taken, and so are all slots without entropy.

    Args:
        entropy: (B, S) float64 nats.
        is_hidden: (B, S) bool.
        bound: Nats, not negative.

    Returns:
        (B,) int64, at least 1 where anything is hidden.
    """
    rising = entropy.masked_fill(~is_hidden, torch.inf).sort(dim=1).values  # (B, S)
    before = torch.nn.functional.pad(rising[:, :-1].cumsum(dim=1), (1, 0))
    return ((before <= bound) & rising.isfinite()).sum(dim=1)


def n_remasked(
    n_visible: torch.Tensor, n_hidden_after: torch.Tensor, rate: float, uniforms: torch.Tensor
) -> torch.Tensor:
    """Say how many drawn genes to hide again at a step (ReMDM with a capped rate, arXiv 2503.00307).

    The step reveals as many slots more, so that the number hidden afterwards stays that of the schedule. The
    expected number is rounded up or down at random.

    Args:
        n_visible: (B,) int64 drawn genes that are visible before the step.
        n_hidden_after: (B,) int64 slots that the schedule leaves hidden after it.
        rate: Largest share of the visible ones to hide; never more than the schedule leaves hidden.
        uniforms: (B,) float64 in [0, 1).

    Returns:
        (B,) int64, at most both of the first arguments.
    """
    expected = torch.minimum(rate * n_visible.double(), n_hidden_after.double())
    return torch.minimum((expected + uniforms).floor().long(), torch.minimum(n_visible, n_hidden_after))


def gene_log_law(
    logits: torch.Tensor, is_excluded: torch.Tensor, *, temperature: float = 1.0, top_p: float = 1.0
) -> torch.Tensor:
    """Turn logits into the law that a gene is drawn from.

    Args:
        logits: (n, V) of any float type, -inf at special tokens.
        is_excluded: (n, V) bool, genes the cell has already.
        temperature: Divides the logits, > 0.
        top_p: Keep the likeliest genes that together reach this probability; 1 keeps all.

    Returns:
        (n, V) float64 log-probabilities, -inf at genes that cannot be drawn.

    Raises:
        ValueError: If a slot has no gene left.
    """
    scores = logits.double().masked_fill(is_excluded, -torch.inf) / temperature
    if scores.isneginf().all(dim=1).any():
        n_allowed = int((~logits.isneginf()).sum(dim=1).max())
        msg = (
            f"A cell has more slots than genes are left for it: the vocabulary offers {n_allowed:,}, and a "
            "gene occurs once. Ask for fewer genes."
        )
        raise ValueError(msg)
    log_law = scores.log_softmax(dim=1)
    if top_p >= 1.0:
        return log_law
    falling, genes = log_law.sort(dim=1, descending=True)
    before = torch.nn.functional.pad(falling.exp().cumsum(dim=1)[:, :-1], (1, 0))
    is_cut = torch.zeros_like(is_excluded).scatter(1, genes, before >= top_p)
    return log_law.masked_fill(is_cut, -torch.inf).log_softmax(dim=1)


def invert_law(log_law: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Draw one gene per row by inverting its distribution function in float64.

    Args:
        log_law: (n, V) float64 log-probabilities.
        uniforms: (n,) float64 in [0, 1).

    Returns:
        (n,) int64 genes; one of probability zero is never among them.
    """
    cumulative = log_law.exp().cumsum(dim=1)
    total = cumulative[:, -1:]
    below_total = torch.nextafter(total, torch.zeros_like(total))  # the product may round up to the total
    levels = torch.minimum(uniforms.unsqueeze(1) * total, below_total)
    return torch.searchsorted(cumulative, levels, right=True).squeeze(1)


def draw_genes(  # noqa: PLR0913 - slots, what limits them, and how to draw
    logits: torch.Tensor,
    cells: torch.Tensor,
    turns: torch.Tensor,
    is_excluded: torch.Tensor,
    uniforms: torch.Tensor,
    *,
    targets: torch.Tensor | None = None,
    unfit: UnfitGenes | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the genes of the slots of one step, each without those its cell has by then.

    Args:
        logits: (n, V) of any float type, -inf at special tokens.
        cells: (n,) int64 cell of each slot.
        turns: (n,) int64 turn of each slot in its cell, from 0.
        is_excluded: (B, V) bool, genes that cells have before the step.
        uniforms: (n,) float64 in [0, 1).
        targets: (n,) int64 genes to take instead of drawing, for the likelihood of a given cell.
        unfit: Says which genes cannot stand at slots; a slot where no other gene is left does without.
        temperature: See `gene_log_law`.
        top_p: See `gene_log_law`.

    Returns:
        (n,) int64 genes and (n,) float64 log-probabilities with which they were drawn.
    """
    is_excluded = is_excluded.clone()
    genes = torch.zeros_like(cells)
    log_probs = torch.zeros(len(cells), dtype=torch.float64, device=logits.device)
    for turn in range(int(turns.max()) + 1 if len(turns) else 0):
        now = (turns == turn).nonzero().squeeze(1)
        is_out = is_excluded[cells[now]]
        if unfit is not None:
            is_out = without_unfit(logits[now], is_out, unfit(now))
        law = gene_log_law(logits[now], is_out, temperature=temperature, top_p=top_p)
        drawn = invert_law(law, uniforms[now]) if targets is None else targets[now]
        genes[now], log_probs[now] = drawn, law.gather(1, drawn.unsqueeze(1)).squeeze(1)
        is_excluded[cells[now], drawn] = True
    return genes, log_probs


def without_unfit(logits: torch.Tensor, is_excluded: torch.Tensor, is_unfit: torch.Tensor) -> torch.Tensor:
    """Exclude genes that cannot stand at a slot, unless that would leave none.

    Args:
        logits: (n, V), -inf at special tokens.
        is_excluded: (n, V) bool, genes the cell has already.
        is_unfit: (n, V) bool, genes that cannot stand there.

    Returns:
        (n, V) bool.
    """
    is_out = is_excluded | is_unfit
    has_none = (is_out | logits.isneginf()).all(dim=1, keepdim=True)
    return torch.where(has_none, is_excluded, is_out)


def law_certainty(log_law: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Say how sure gene laws are.

    Args:
        log_law: (n, V) float64 log-probabilities, V at least 2.

    Returns:
        (n,) entropy in nats and (n,) margin, the difference of the two highest probabilities.
    """
    law = log_law.exp()
    entropy = -(law * log_law.masked_fill(log_law.isneginf(), 0.0)).sum(dim=1)
    highest = law.topk(2, dim=1).values
    return entropy, highest[:, 0] - highest[:, 1]


def neighbour_scores(scores: torch.Tensor, is_shown: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the ranking scores between which a place must lie, in a cell whose scores fall from left to right.

    Args:
        scores: (B, S) float64 ranking scores, read where shown.
        is_shown: (B, S) bool, genes with a value in sight.

    Returns:
        (B, S) lowest and (B, S) highest score: of the nearest shown gene to the right (0 without one) and to
        the left (inf without one). Where shown scores do not fall, the two may cross.
    """
    width = scores.shape[1]
    places = torch.arange(width, device=scores.device).expand(scores.shape)
    left = torch.where(is_shown, places, -1).cummax(dim=1).values  # (B, S), itself where shown
    right = torch.where(is_shown, places, width).flip(1).cummin(dim=1).values.flip(1)
    highest = scores.gather(1, left.clamp(min=0)).masked_fill(left < 0, torch.inf)
    lowest = scores.gather(1, right.clamp(max=width - 1)).masked_fill(right == width, 0.0)
    return lowest, highest


__all__ = [
    "ORDERS",
    "SCHEDULES",
    "CellNoise",
    "UnfitGenes",
    "choose_slots",
    "draw_genes",
    "gene_log_law",
    "hidden_after",
    "invert_law",
    "law_certainty",
    "n_entropy_bounded",
    "n_remasked",
    "neighbour_scores",
    "slot_priority",
    "without_unfit",
]
