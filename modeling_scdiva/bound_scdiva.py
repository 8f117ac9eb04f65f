"""The likelihood of cells under a denoiser: an estimate of the bound, and the exact value for fixed orders.

The bound. With k genes hidden, k uniform on 1 .. L and the hidden set uniform among those of its size,

    -log p(genes, counts | L, N) <= E[ L / k * sum over hidden (-log p(gene) - log p(count | gene)) ]

with the genes that are visible left out of each law, because a gene occurs once. Draws with few hidden genes
vary most, as 1 / k, so small k come more often, P(k) = 1 / (2 L) + (sqrt(k) - sqrt(k - 1)) / (2 sqrt(L)),
and weighted back: the estimate stays unbiased. One k comes from each of n equal strata: whole numbers, no
cut-off near zero. Together the variance is a small fraction of that of independent, uniform draws.

The exact value. An order that depends on nothing but what is visible makes the sampler a plain chain rule;
the same loop that samples then takes the true genes and adds up their log-probabilities (arXiv 2603.01367).

Dimensions: B cells of one call, S positions, V vocabulary, n draws per cell.
Source: METHOD.md sections 4 and 6.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .rank_bounds_scdiva import rank_bounds
from .sampling_scdiva import CellNoise, gene_log_law, without_unfit
from .unmask_scdiva import CellState, Denoiser, UnmaskSettings, excluded_genes, unmask
from .value_law_scdiva import counts_from_values, draw_counts

# Slots whose gene laws are held in memory at once, in float64.
SLOTS_AT_ONCE = 512
DETERMINISTIC_ORDERS = ("rank", "margin", "entropy")


@dataclass
class BoundEstimate:
    """Estimated bounds of cells, without the length term.

    Attributes:
        gene_nats: (B, n) float64 estimate of the gene part by each draw.
        value_nats: (B, n) float64 of the count part; zeros if counts were left out.
        gene_surprisal: (B, S) float64 mean nats of each gene where it was hidden; NaN where it never was.
        is_stratified: Whether draws come from strata.
    """

    gene_nats: torch.Tensor
    value_nats: torch.Tensor
    gene_surprisal: torch.Tensor
    is_stratified: bool

    @property
    def standard_error(self) -> torch.Tensor:
        """(B,) standard error of the mean over draws of genes and counts together."""
        draws = self.gene_nats + self.value_nats  # (B, n), by rising k
        n_draws = draws.shape[1]
        if self.is_stratified:
            # One draw per stratum has no spread of its own; neighbours have nearly the same mean. The first
            # stratum, few genes with a large weight, varies most and has one neighbour: it would count half.
            squares = draws.diff(dim=1).square()
            variance = (squares.sum(dim=1) + squares[:, 0]) / (2 * n_draws)
        else:
            variance = draws.var(dim=1)
        return (variance / n_draws).sqrt()


@torch.no_grad()
def estimate_bound(  # noqa: PLR0913 - cells, and how to estimate
    state: CellState,
    denoiser: Denoiser,
    noise: CellNoise,
    *,
    n_draws: int = 128,
    rows_at_once: int = 32,
    is_stratified: bool = True,
    with_values: bool = True,
    rank_consistent: bool = False,
    on_rows: Callable[[int], Any] | None = None,
) -> BoundEstimate:
    """Estimate the bound on the negative log-likelihood of cells, given their lengths.

    Args:
        state: B clean cells.
        denoiser: Says what could stand at hidden slots.
        noise: One source of random numbers per cell.
        n_draws: Draws per cell n, at least 2.
        rows_at_once: Masked cells in one network call.
        is_stratified: Draw k from strata; independent draws are for comparison.
        with_values: Score counts, too; needs ``size_factors``.
        rank_consistent: See `masked_nats`.
        on_rows: Called after each call with its number of masked cells.

    Returns:
        All draws, sorted by k.
    """
    is_gene = state.attention_mask & (state.input_ids >= denoiser.n_special_tokens)  # (B, S)
    lengths = is_gene.sum(dim=1)  # (B,)
    n_cells = len(is_gene)
    gene_nats = torch.zeros(n_cells, n_draws, dtype=torch.float64, device=is_gene.device)
    value_nats, surprisal = torch.zeros_like(gene_nats), torch.zeros_like(is_gene, dtype=torch.float64)
    n_hidden_times = torch.zeros_like(surprisal)
    rows = torch.arange(n_cells, device=is_gene.device)
    draws_at_once = max(1, rows_at_once // n_cells)
    for first in range(0, n_draws, draws_at_once):
        now = range(first, min(first + draws_at_once, n_draws))
        # Stream 0 holds the coins of the genes; the first real position of stream 1 the place in the stratum.
        uniforms = torch.stack([noise.uniforms(rows, state.attention_mask, 2) for _ in now])
        places = state.attention_mask.long().argmax(dim=1)  # (B,)
        within = uniforms[:, 1, rows, places]  # (n now, B)
        level = within
        if is_stratified:
            level = (torch.tensor(list(now), device=within.device).unsqueeze(1) + within) / n_draws
        share = ((1.0 + 8.0 * level).sqrt() - 1.0).square() / 4.0  # inverts the law of k / L
        n_hidden = (1 + (share * lengths).floor().long()).minimum(lengths)  # (n now, B)
        coins = uniforms[:, 0].masked_fill(~is_gene, torch.inf)  # (n now, B, S)
        is_hidden = (coins.argsort(dim=2).argsort(dim=2) < n_hidden.unsqueeze(2)).flatten(0, 1) & (
            is_gene.repeat(len(now), 1)
        )
        cells = rows.repeat(len(now))
        genes, values, where = masked_nats(
            state.select(cells),
            is_hidden,
            denoiser,
            with_values=with_values,
            rank_consistent=rank_consistent,
        )
        weight = draw_weight(n_hidden.flatten(), lengths[cells])
        for total, nats in ((gene_nats, genes), (value_nats, values)):
            sums = torch.zeros(len(cells), dtype=torch.float64, device=nats.device)
            sums.index_add_(0, where[0], nats)
            total[:, first : first + len(now)] = (weight * sums).view(len(now), n_cells).T
        surprisal.index_put_((cells[where[0]], where[1]), genes, accumulate=True)
        n_hidden_times.index_put_((cells[where[0]], where[1]), torch.ones_like(genes), accumulate=True)
        if on_rows is not None:
            on_rows(len(cells))
    surprisal = torch.where(n_hidden_times > 0, surprisal / n_hidden_times, torch.nan)
    return BoundEstimate(gene_nats, value_nats, surprisal, is_stratified)


def draw_weight(n_hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Weigh the summed nats of a draw: 1 / (k P(k)) makes them an unbiased estimate of the bound.

    Args:
        n_hidden: (B,) int64 genes hidden k.
        lengths: (B,) int64 genes of the cell L.

    Returns:
        (B,) float64; 0 for a cell without genes.
    """
    k, length = n_hidden.double(), lengths.double().clamp(min=1.0)
    rise = 1.0 / (k.clamp(min=1.0).sqrt() + (k - 1.0).clamp(min=0.0).sqrt())  # sqrt(k) - sqrt(k - 1)
    probability = 0.5 / length + 0.5 * rise / length.sqrt()
    return torch.where(n_hidden > 0, 1.0 / (k.clamp(min=1.0) * probability), 0.0)


def masked_nats(
    clean: CellState,
    is_hidden: torch.Tensor,
    denoiser: Denoiser,
    *,
    with_values: bool = True,
    rank_consistent: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Score the true genes and counts of hidden slots.

    Args:
        clean: B cells.
        is_hidden: (B, S) bool, genes to hide.
        denoiser: Says what could stand there.
        with_values: Score counts, too.
        rank_consistent: Leave out genes and counts that the visible neighbours' scores do not allow.

    Returns:
        (m,) float64 nats of the genes, (m,) of their counts (zeros without), and cell and position of each.
    """
    masked = replace(
        clean,
        input_ids=clean.input_ids.masked_fill(is_hidden, denoiser.mask_token_id),
        expression_values=clean.expression_values.masked_fill(is_hidden, 0.0),
        is_masked=is_hidden,
    )
    encoded = denoiser.encode(masked, is_hidden)
    cells, places = is_hidden.nonzero(as_tuple=True)
    genes = clean.input_ids[cells, places]
    is_excluded = excluded_genes(masked, denoiser)
    bounds = rank_bounds(masked, denoiser, rank_consistent=rank_consistent)
    unfit = None if bounds is None else bounds.unfit(cells, places)
    gene_nats = torch.zeros(len(cells), dtype=torch.float64, device=cells.device)
    for some in torch.arange(len(cells), device=cells.device).split(SLOTS_AT_ONCE):
        logits = denoiser.gene_logits(encoded, cells[some], places[some])
        is_out = is_excluded[cells[some]]
        if unfit is not None:
            is_out = without_unfit(logits, is_out, unfit(some))
        law = gene_log_law(logits, is_out)
        gene_nats[some] = -law.gather(1, genes[some].unsqueeze(1)).squeeze(1)
    value_nats = torch.zeros_like(gene_nats)
    if with_values and clean.size_factors is not None:
        factors = clean.size_factors.double()[cells]
        counts = counts_from_values(clean.expression_values[cells, places], factors)
        location, scale = denoiser.value_law(encoded, cells, places, genes)
        ends = torch.ones_like(factors), torch.full_like(factors, torch.inf)
        if bounds is not None:
            ends = bounds.counts(cells, places, genes, factors)
        value_nats = -draw_counts(counts, factors, location, scale, *ends, targets=counts)[1]
    return gene_nats, value_nats, (cells, places)


def exact_log_prob(
    state: CellState,
    denoiser: Denoiser,
    *,
    order: str,
    tokens_per_step: int = 1,
    rank_consistent: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the log-probability that a sampler of a deterministic order makes exactly these cells.

    Args:
        state: B clean cells.
        denoiser: Says what could stand at hidden slots.
        order: "rank", "margin" or "entropy".
        tokens_per_step: Genes drawn at each step.
        rank_consistent: Whether the sampler bounds values by the scores of their neighbours.

    Returns:
        (B,) float64 nats of the genes and (B,) of the counts given their lengths; the latter means nothing
        without ``size_factors``.

    Raises:
        ValueError: If the order is random.
    """
    if order not in DETERMINISTIC_ORDERS:
        msg = (
            f"order must be one of {', '.join(DETERMINISTIC_ORDERS)}, got {order!r}. The likelihood of a "
            "random order is a mean over all orders; compute_nll bounds it."
        )
        raise ValueError(msg)
    is_gene = state.attention_mask & (state.input_ids >= denoiser.n_special_tokens)
    hidden = replace(
        state,
        input_ids=state.input_ids.masked_fill(is_gene, denoiser.mask_token_id),
        expression_values=state.expression_values.masked_fill(is_gene, 0.0),
        is_masked=is_gene,
    )
    settings = UnmaskSettings(order=order, tokens_per_step=tokens_per_step, rank_consistent=rank_consistent)
    # Nothing is drawn: the order is fixed and the genes are given.
    noise = CellNoise([0] * len(state.input_ids), state.input_ids.device)
    done = unmask(hidden, denoiser, settings, noise, targets=state)
    return done.gene_log_prob, done.value_log_prob


__all__ = ["BoundEstimate", "estimate_bound", "exact_log_prob", "masked_nats"]
