"""The reverse process: one loop that turns hidden slots into genes and values, behind every way to generate.

Each step asks the denoiser once about the cells that still change, chooses slots, draws their genes and then
their values. What is visible at the start never changes. Whatever answers the `Denoiser` protocol can be
sampled: the network, and in tests a table of all cells whose law is known.

Notable choices:
- A cell that is finished, or that a step leaves as it is, is not computed again: the network knows no time.
  Where the choice of slots reads no gene laws, slots are chosen first and the denoiser is asked for these.
- Values are drawn with their gene from the same call, as whole counts between those that the ranking scores
  of the visible neighbours allow; a gene without such a count is not drawn.
- With targets instead of draws the same loop gives the exact likelihood of a cell under the sampler.

Dimensions: B cells in a loader batch, S positions, V vocabulary, D width, K conditions, n slots of one step.
Source: METHOD.md section 5.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch

from .diffusion_scdiva import visible_gene_mask
from .rank_bounds_scdiva import RankBounds, rank_bounds
from .sampling_scdiva import (
    CellNoise,
    choose_slots,
    draw_genes,
    gene_log_law,
    hidden_after,
    law_certainty,
    n_entropy_bounded,
    n_remasked,
    slot_priority,
    without_unfit,
)
from .value_law_scdiva import counts_from_values, draw_counts, values_from_counts

# Streams of random numbers of a step: slot, gene, value, what is hidden again, how many are.
N_STREAMS = 5
# Without molecules per cell values are drawn on a lattice this fine, which is as good as none.
FINE_LATTICE = 2.0**20
# Slots whose gene laws are held in memory at once where all laws of a cell are read.
SLOTS_AT_ONCE = 512


@dataclass(frozen=True)
class CellState:
    """Cells on their way; all tensors share the first dimension.

    Attributes:
        input_ids: (B, S) int64 gene tokens, the mask token where the gene is hidden.
        expression_values: (B, S) float32, read where not ``is_masked``.
        attention_mask: (B, S) bool, False at padding.
        is_masked: (B, S) bool, True where the value is hidden; wherever the gene is, and at known genes whose
            value alone is wanted.
        size_factors: (B,) float64 molecules of the cell / target_sum, or None where values are no counts.
        condition_ids: (B, K) int64, or None for a network without conditions.
        cell_index: (B,) int64 which of all cells each is, where something outside the network wants to know.
    """

    input_ids: torch.Tensor
    expression_values: torch.Tensor
    attention_mask: torch.Tensor
    is_masked: torch.Tensor
    size_factors: torch.Tensor | None = None
    condition_ids: torch.Tensor | None = None
    cell_index: torch.Tensor | None = None

    def select(self, rows: torch.Tensor) -> "CellState":
        """Take some cells.

        Args:
            rows: (B,) int64 cells, in any order; one may come twice.

        Returns:
            Their state.
        """
        parts: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        selected: dict[str, Any] = {
            name: None if part is None else part[rows] for name, part in parts.items()
        }
        return CellState(**selected)


class Denoiser(Protocol):
    """What the loop asks; slots are given as cell and position, both (n,)."""

    mask_token_id: int
    n_special_tokens: int
    vocab_size: int
    ranking_weights: torch.Tensor | None  # (V,) H_g + eps

    def encode(self, state: CellState, is_asked: torch.Tensor | None = None) -> torch.Tensor:
        """Look at cells: the one network call of a step. A tensor, its first dimension the cells.

        Only slots in ``is_asked`` (B, S) are read from it; None means all.
        """

    def gene_logits(self, encoded: torch.Tensor, cells: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """(n, V) logits, -inf at special tokens."""

    def value_law(
        self, encoded: torch.Tensor, cells: torch.Tensor, places: torch.Tensor, gene_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(n,) location and (n,) scale of the values of these genes."""

    def quality(self, encoded: torch.Tensor, cells: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """(n,) log-odds that the visible gene is right; asked for ``remask="quality"`` only."""


@dataclass(frozen=True)
class UnmaskSettings:
    """How to sample; see `ScDivaGenerationConfig`, whose fields these are."""

    steps: int = 64
    tokens_per_step: int | None = None
    schedule: str = "linear"
    order: str = "random"
    entropy_bound: float | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    value_temperature: float = 1.0
    rank_consistent: bool = True
    remask: str = "none"
    remask_rate: float = 0.0

    @property
    def reads_laws(self) -> bool:
        """Whether the choice of slots depends on the gene laws of all of them."""
        return self.order in ("margin", "entropy") or self.entropy_bound is not None


@dataclass
class UnmaskedCells:
    """What comes out of the loop.

    Attributes:
        state: The finished cells.
        gene_log_prob: (B,) float64 nats, log-probability of all genes drawn on the way.
        value_log_prob: (B,) float64 nats, of all counts drawn; without ``size_factors`` it means nothing.
        n_network_calls: (B,) int64 calls that each cell took part in.
        n_drawn: (B,) int64 slots drawn, those drawn again included.
    """

    state: CellState
    gene_log_prob: torch.Tensor
    value_log_prob: torch.Tensor
    n_network_calls: torch.Tensor
    n_drawn: torch.Tensor


@dataclass
class _Step:
    """One step of the cells that change in it; `rows` are their places in the whole batch."""

    rows: torch.Tensor
    state: CellState
    noise: torch.Tensor  # (N_STREAMS, B, S)
    n_left: torch.Tensor  # (B,) slots that the schedule leaves hidden
    n_again: torch.Tensor  # (B,) drawn genes to hide again
    is_drawn: torch.Tensor  # (B, S) bool, visible genes that may be hidden again
    encoded: Any = None  # what the denoiser made of the state
    bounds: RankBounds | None = None  # what visible neighbours leave possible


@torch.no_grad()
def unmask(
    state: CellState,
    denoiser: Denoiser,
    settings: UnmaskSettings,
    noise: CellNoise,
    *,
    targets: CellState | None = None,
    steer: Callable[[CellState, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    on_step: Callable[[int], Any] | None = None,
) -> UnmaskedCells:
    """Reveal everything that is hidden.

    Args:
        state: Cells with hidden slots; not changed.
        denoiser: Says what could stand there.
        settings: How to sample.
        noise: One source of random numbers per cell.
        targets: Take genes and values from these cells instead of drawing them.
        steer: Called after each look at the cells with their state, what the denoiser made of it, and their
            places in the batch (B,); returns for each cell the place, among these, of the one that takes its
            place. For sequential Monte Carlo.
        on_step: Called after each step with the number of slots still hidden.

    Returns:
        The cells with nothing hidden.
    """
    is_gene_slot = state.input_ids == denoiser.mask_token_id  # what may be hidden again
    n_slots = (state.is_masked & state.attention_mask).sum(dim=1)
    zeros = torch.zeros(len(n_slots), dtype=torch.float64, device=n_slots.device)
    out = UnmaskedCells(state, zeros, zeros.clone(), zeros.long(), zeros.long())
    step = 0
    while step < settings.steps or bool((out.state.is_masked & state.attention_mask).any()):
        step += 1
        current = _next_step(out.state, settings, noise, is_gene_slot, n_slots=n_slots, step=step)
        if current is None:
            if settings.remask == "none" and not (out.state.is_masked & state.attention_mask).any():
                break
            continue
        rows = current.rows
        out.n_network_calls[rows] += 1
        slots = None if settings.reads_laws or steer is not None else _choose(current, settings)
        is_asked = None if steer is not None else _asked(current, settings, slots)
        current.encoded = denoiser.encode(current.state, is_asked)
        if steer is not None:
            parents = steer(current.state, current.encoded, rows)
            _take_places(out, current, parents)
        current.bounds = rank_bounds(current.state, denoiser, rank_consistent=settings.rank_consistent)
        cells, places, turns = _choose(current, settings, denoiser) if slots is None else slots
        gene_ids, gene_nats = _draw_slot_genes(current, denoiser, settings, cells, places, turns, targets)
        values, value_nats = _draw_values(current, denoiser, settings, cells, places, gene_ids, targets)
        out.gene_log_prob.index_add_(0, rows[cells], gene_nats)
        out.value_log_prob.index_add_(0, rows[cells], value_nats)
        out.n_drawn.index_add_(0, rows[cells], torch.ones_like(cells))
        again = _choose_again(current, denoiser, settings)
        out.state = _written(out.state, rows[cells], places, gene_ids, values)
        out.state = _hidden(out.state, rows[again[0]], again[1], denoiser.mask_token_id)
        if on_step is not None:
            on_step(int((out.state.is_masked & state.attention_mask).sum()))
    return out


def _next_step(
    state: CellState,
    settings: UnmaskSettings,
    noise: CellNoise,
    is_gene_slot: torch.Tensor,
    *,
    n_slots: torch.Tensor,
    step: int,
) -> _Step | None:
    """Find the cells that this step changes, and how much; None if it changes none."""
    is_hidden = state.is_masked & state.attention_mask
    n_hidden = is_hidden.sum(dim=1)
    if settings.entropy_bound is not None:
        n_left = torch.zeros_like(n_hidden)  # as many as the laws allow
    else:
        n_left = hidden_after(
            n_slots,
            step if settings.tokens_per_step is not None else min(step, settings.steps),
            n_steps=settings.steps,
            schedule=settings.schedule,
            tokens_per_step=settings.tokens_per_step,
        )
    is_busy = n_hidden > n_left
    if settings.remask != "none":
        is_busy = is_busy | (n_left > 0)
    rows = is_busy.nonzero().squeeze(1)
    if not len(rows):
        return None
    part = state.select(rows)
    drawn = noise.uniforms(rows, part.attention_mask, N_STREAMS)
    n_again = torch.zeros_like(rows)
    if settings.remask != "none":
        first = drawn[4].gather(1, part.attention_mask.long().argmax(dim=1, keepdim=True)).squeeze(1)
        n_visible = (is_gene_slot[rows] & ~part.is_masked).sum(dim=1)
        n_again = n_remasked(n_visible, n_left[rows], settings.remask_rate, first)
    is_changed = (n_hidden[rows] > n_left[rows]) | (n_again > 0)
    if not is_changed.any():
        return None
    kept = is_changed.nonzero().squeeze(1)
    part, rows = part.select(kept), rows[kept]
    is_drawn = is_gene_slot[rows] & ~part.is_masked & part.attention_mask
    return _Step(rows, part, drawn[:, kept], n_left[rows], n_again[kept], is_drawn)


def _asked(current: _Step, settings: UnmaskSettings, slots: tuple[torch.Tensor, ...] | None) -> torch.Tensor:
    """(B, S) bool, where the denoiser is asked: at the slots, at all of them if they are not chosen yet."""
    is_asked = current.state.is_masked & current.state.attention_mask
    if slots is not None:
        is_asked = torch.zeros_like(is_asked).index_put(slots[:2], is_asked.new_ones(len(slots[0])))
    if settings.remask == "quality":
        is_asked = is_asked | current.is_drawn
    return is_asked


def _take_places(out: UnmaskedCells, current: _Step, parents: torch.Tensor) -> None:
    """Let cells go on as copies of others, as the steering asks for."""
    if bool((parents == torch.arange(len(parents), device=parents.device)).all()):
        return
    current.state = current.state.select(parents)
    current.encoded = current.encoded[parents]
    current.is_drawn = current.is_drawn[parents]
    source = current.rows[parents]
    parts = {field.name: getattr(out.state, field.name) for field in fields(out.state)}
    copied: dict[str, Any] = {}
    for name, part in parts.items():
        copied[name] = part if part is None else part.index_copy(0, current.rows, part[source])
    out.state = CellState(**copied)
    for name in ("gene_log_prob", "value_log_prob", "n_drawn"):
        entries = getattr(out, name)
        setattr(out, name, entries.index_copy(0, current.rows, entries[source]))


def excluded_genes(state: CellState, denoiser: Denoiser) -> torch.Tensor:
    """Find the genes that cells have: visible ones, and known ones whose value is hidden.

    Args:
        state: B cells.
        denoiser: Knows the vocabulary.

    Returns:
        (B, V) bool.
    """
    ids = state.input_ids.masked_fill(~state.attention_mask, denoiser.mask_token_id)
    return visible_gene_mask(ids, denoiser.n_special_tokens, denoiser.vocab_size)


def _choose(
    current: _Step, settings: UnmaskSettings, denoiser: Denoiser | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose the slots of a step: (n,) cell, (n,) position, (n,) turn; the denoiser tells laws if read."""
    is_hidden = current.state.is_masked & current.state.attention_mask
    certainty = entropy = None
    if settings.reads_laws and denoiser is not None:
        entropy, margin = _slot_certainty(current, denoiser, is_hidden)
        certainty = margin if settings.order == "margin" else -entropy
    if settings.entropy_bound is not None and entropy is not None:
        n_revealed = n_entropy_bounded(entropy, is_hidden, settings.entropy_bound)
    else:
        n_revealed = is_hidden.sum(dim=1) - current.n_left + current.n_again
    priority = slot_priority(settings.order, is_hidden, current.noise[0], certainty)
    return choose_slots(priority, n_revealed)


def _slot_certainty(
    current: _Step, denoiser: Denoiser, is_hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, S) entropy and (B, S) margin of the gene laws of all slots; 0 and 1 where the gene is known."""
    is_gene_hidden = is_hidden & (current.state.input_ids == denoiser.mask_token_id)
    entropy = torch.zeros(is_hidden.shape, dtype=torch.float64, device=is_hidden.device)
    margin = torch.ones_like(entropy)
    is_excluded = excluded_genes(current.state, denoiser)
    cells, places = is_gene_hidden.nonzero(as_tuple=True)
    unfit = None if current.bounds is None else current.bounds.unfit(cells, places)
    for start in range(0, len(cells), SLOTS_AT_ONCE):
        some = slice(start, start + SLOTS_AT_ONCE)
        logits = denoiser.gene_logits(current.encoded, cells[some], places[some])
        is_out = is_excluded[cells[some]]
        if unfit is not None:
            is_out = without_unfit(logits, is_out, unfit(torch.arange(len(cells), device=cells.device)[some]))
        law = gene_log_law(logits, is_out)
        entropy[cells[some], places[some]], margin[cells[some], places[some]] = law_certainty(law)
    return entropy, margin


def _draw_slot_genes(
    current: _Step,
    denoiser: Denoiser,
    settings: UnmaskSettings,
    cells: torch.Tensor,
    places: torch.Tensor,
    turns: torch.Tensor,
    targets: CellState | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw (n,) genes and give their (n,) log-probabilities; a known gene is taken with probability 1."""
    gene_ids = current.state.input_ids[cells, places]
    nats = torch.zeros(len(cells), dtype=torch.float64, device=cells.device)
    asked = (gene_ids == denoiser.mask_token_id).nonzero().squeeze(1)
    if len(asked):
        cell, place = cells[asked], places[asked]
        gene_ids[asked], nats[asked] = draw_genes(
            denoiser.gene_logits(current.encoded, cell, place),
            cell,
            turns[asked],
            excluded_genes(current.state, denoiser),
            current.noise[1, cell, place],
            targets=None if targets is None else targets.input_ids[current.rows[cell], place],
            unfit=None if current.bounds is None else current.bounds.unfit(cell, place),
            temperature=settings.temperature,
            top_p=settings.top_p,
        )
    return gene_ids, nats


def _draw_values(
    current: _Step,
    denoiser: Denoiser,
    settings: UnmaskSettings,
    cells: torch.Tensor,
    places: torch.Tensor,
    gene_ids: torch.Tensor,
    targets: CellState | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw (n,) float32 values of the genes and give the (n,) log-probabilities of their counts."""
    state = current.state
    location, scale = denoiser.value_law(current.encoded, cells, places, gene_ids)
    scale = scale.double() * settings.value_temperature
    fine = torch.full((len(state.input_ids),), FINE_LATTICE, dtype=torch.float64, device=cells.device)
    factors = (fine if state.size_factors is None else state.size_factors.double())[cells]
    fewest, most = torch.ones_like(factors), torch.full_like(factors, torch.inf)
    if current.bounds is not None:
        fewest, most = current.bounds.counts(cells, places, gene_ids, factors)
    counts = None
    if targets is not None:
        counts = counts_from_values(targets.expression_values[current.rows[cells], places], factors)
    counts, nats = draw_counts(
        current.noise[2, cells, places],
        factors,
        location,
        scale,
        fewest,
        most,
        targets=counts,
    )
    return values_from_counts(counts, factors).float(), nats


def _choose_again(
    current: _Step, denoiser: Denoiser, settings: UnmaskSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose genes that were visible before the step, and not given, to hide: (n,) cell, (n,) position."""
    is_drawn = current.is_drawn
    if settings.remask != "quality" or not current.n_again.any():
        priority = current.noise[3]
    else:
        cells, places = is_drawn.nonzero(as_tuple=True)
        priority = torch.zeros_like(current.noise[3])
        priority[cells, places] = -denoiser.quality(current.encoded, cells, places).double()
    cells, places, _ = choose_slots(priority.masked_fill(~is_drawn, -torch.inf), current.n_again)
    return cells, places


def _written(
    state: CellState, rows: torch.Tensor, places: torch.Tensor, gene_ids: torch.Tensor, values: torch.Tensor
) -> CellState:
    """Show genes and values at slots (n,)."""
    where = (rows, places)
    return replace(
        state,
        input_ids=state.input_ids.index_put(where, gene_ids),
        expression_values=state.expression_values.index_put(where, values.to(state.expression_values.dtype)),
        is_masked=state.is_masked.index_put(where, torch.zeros_like(rows, dtype=torch.bool)),
    )


def _hidden(state: CellState, rows: torch.Tensor, places: torch.Tensor, mask_token_id: int) -> CellState:
    """Hide gene and value at slots (n,)."""
    if not len(rows):
        return state
    where = (rows, places)
    return replace(
        state,
        input_ids=state.input_ids.index_put(where, torch.full_like(rows, mask_token_id)),
        expression_values=state.expression_values.index_put(
            where, torch.zeros_like(rows, dtype=state.expression_values.dtype)
        ),
        is_masked=state.is_masked.index_put(where, torch.ones_like(rows, dtype=torch.bool)),
    )


__all__ = [
    "CellState",
    "Denoiser",
    "UnmaskSettings",
    "UnmaskedCells",
    "excluded_genes",
    "unmask",
]
