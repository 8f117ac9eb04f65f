"""What the visible neighbours of a slot leave possible: a range of scores, of counts, and the genes that fit.

A cell is sorted by score = value / weight, counts are whole, library size and weights are known. Between two
visible neighbours many genes have no whole count that fits; leaving them out renormalises the gene law on
what can be. The true gene always fits, so a likelihood with these bounds is a tighter one, and cells drawn
with them need hardly any sorting at the end.

Dimensions: B cells in a loader batch, S positions, V vocabulary, n slots.
Source: METHOD.md sections 1 and 8.
"""

from dataclasses import dataclass
from typing import Any

import torch

from .sampling_scdiva import UnfitGenes, neighbour_scores


def count_range(
    lowest: torch.Tensor, highest: torch.Tensor, size_factors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Say which counts give a value between two values.

    Args:
        lowest: (...) float64 values, log1p units.
        highest: (...) float64 values, may be inf.
        size_factors: (...) float64 molecules of the cell / target_sum.

    Returns:
        (...) fewest and (...) most counts, both at least 1, and (...) bool, whether any count fits. Where
        none does, both are the one below ``highest``, or 1.
    """
    slack = 1e-6  # stored values are float32
    # In place behind the first step: over all genes these are the largest tensors there are.
    most = highest.expm1().mul_(size_factors * (1.0 + slack)).add_(slack).floor_()
    fewest = lowest.expm1().mul_(size_factors * (1.0 - slack)).sub_(slack).ceil_().clamp_(min=1.0)
    fits = fewest <= most
    most = most.clamp(min=1.0)
    return torch.minimum(fewest, most), most, fits


@dataclass(frozen=True)
class ShownCells:
    """What the bounds read of cells, all tensors (B, S) but the last.

    Attributes:
        input_ids: int64 tokens.
        expression_values: float32 values, read where shown.
        attention_mask: bool, False at padding.
        is_masked: bool, True where the value is hidden.
        size_factors: (B,) molecules of the cell / target_sum, or None.
    """

    input_ids: torch.Tensor
    expression_values: torch.Tensor
    attention_mask: torch.Tensor
    is_masked: torch.Tensor
    size_factors: torch.Tensor | None


class RankBounds:
    """Between which scores each slot of some cells lies, and what that leaves of counts and genes.

    Args:
        cells: B cells, with the attributes of `ShownCells`.
        n_special_tokens: The first ids of the vocabulary, which are no genes.
        weights: (V,) H_g + eps.
    """

    def __init__(self, cells: Any, n_special_tokens: int, weights: torch.Tensor) -> None:
        self.weights = weights.double()
        is_shown = cells.attention_mask & ~cells.is_masked & (cells.input_ids >= n_special_tokens)
        scores = cells.expression_values / self.weights[cells.input_ids]
        self.lowest, self.highest = neighbour_scores(scores, is_shown)
        self.size_factors = None if cells.size_factors is None else cells.size_factors.double()

    def counts(
        self, cells: torch.Tensor, places: torch.Tensor, gene_ids: torch.Tensor, factors: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(n,) fewest and (n,) most counts of genes at slots, of cells with size factors (n,)."""
        weights = self.weights[gene_ids]
        low, high = self.lowest[cells, places], self.highest[cells, places]
        return count_range(low * weights, high * weights, factors)[:2]

    def unfit(self, cells: torch.Tensor, places: torch.Tensor) -> UnfitGenes | None:
        """Genes without a count that fits, as a function of indices of these slots; None without depths."""
        if self.size_factors is None:
            return None
        factors = self.size_factors[cells]

        def of_slots(some: torch.Tensor) -> torch.Tensor:
            low = self.lowest[cells[some], places[some]].unsqueeze(1) * self.weights
            high = self.highest[cells[some], places[some]].unsqueeze(1) * self.weights
            return ~count_range(low, high, factors[some].unsqueeze(1))[2]

        return of_slots


def rank_bounds(state: Any, denoiser: Any, *, rank_consistent: bool) -> RankBounds | None:
    """Bound slots by their neighbours where that is wanted and the weights are known.

    Args:
        state: B cells.
        denoiser: Knows the weights, or not.
        rank_consistent: Whether it is wanted.

    Returns:
        The bounds, or None.
    """
    if not rank_consistent or denoiser.ranking_weights is None:
        return None
    return RankBounds(state, denoiser.n_special_tokens, denoiser.ranking_weights)


__all__ = ["RankBounds", "ShownCells", "count_range", "rank_bounds"]
