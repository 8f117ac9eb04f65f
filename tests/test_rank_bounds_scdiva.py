"""Tests of what visible neighbours leave possible at a slot: counts, and genes.

Scope: everything in `rank_bounds_scdiva`; samplers and likelihoods under these bounds are tested with them.
Run: pytest tests/test_rank_bounds_scdiva.py
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from modeling_scdiva.rank_bounds_scdiva import RankBounds, ShownCells, count_range, rank_bounds
from modeling_scdiva.value_law_scdiva import values_from_counts

N_SPECIAL, VOCAB_SIZE = 5, 25


def sorted_cells(n_cells=40, n_genes=12, most=4, seed=0):
    """Cells in ranking order, a third of each hidden, with padding; their clean ids, counts and weights."""
    generator = torch.Generator().manual_seed(seed)
    weights = 0.5 + 2 * torch.rand(VOCAB_SIZE, generator=generator, dtype=torch.float64)
    ids = torch.stack([torch.randperm(20, generator=generator)[:n_genes] + 5 for _ in range(n_cells)])
    factors = 0.1 + torch.rand(n_cells, generator=generator, dtype=torch.float64)
    counts = torch.randint(1, most + 1, ids.shape, generator=generator).double()
    values = values_from_counts(counts, factors.unsqueeze(1)).float()
    order = (values / weights[ids]).argsort(dim=1, descending=True, stable=True)
    ids, counts, values = (part.gather(1, order) for part in (ids, counts, values))
    is_masked = torch.rand(ids.shape, generator=generator) < 0.35

    def framed(part, first):
        return torch.nn.functional.pad(torch.nn.functional.pad(part, (1, 0), value=first), (0, 2))

    clean, is_masked = framed(ids, 2), framed(is_masked, 0)
    attention_mask = torch.arange(n_genes + 3).expand(clean.shape) <= n_genes
    shown = framed(values, 0.0).masked_fill(is_masked, 777.0)  # what is hidden is not read
    is_unknown = is_masked & (
        torch.rand(clean.shape, generator=generator) < 0.5
    )  # else the value alone is hidden
    cells = ShownCells(clean.masked_fill(is_unknown, 1), shown, attention_mask, is_masked, factors)
    return cells, clean, framed(counts, 0.0), weights


def limits(lowest, highest, factor=0.5):
    ends = [torch.tensor([end], dtype=torch.float64) for end in (lowest, highest, factor)]
    return tuple(end.item() for end in count_range(*ends))


def test_count_range_by_hand():
    # Factor 1/2: 3 molecules have the value log1p(6).
    assert limits(math.log1p(4.1), math.log1p(10.3)) == (3.0, 5.0, True)
    assert limits(math.log1p(6), math.log1p(6)) == (3.0, 3.0, True)
    assert limits(0.0, math.inf) == (1.0, math.inf, True)
    assert limits(math.log1p(4.1), math.log1p(5.9)) == (2.0, 2.0, False)
    assert limits(math.log1p(8), math.log1p(2)) == (1.0, 1.0, False)  # neighbours that cross
    assert limits(0.0, math.log1p(1.9)) == (1.0, 1.0, False)  # less than one molecule
    assert limits(0.0, 0.0) == (1.0, 1.0, False)
    assert limits(math.log1p(2), math.log1p(2)) == (1.0, 1.0, True)


def test_a_stored_value_fits_itself():
    counts = torch.tensor([1.0, 2.0, 17.0, 999.0, 100_000.0], dtype=torch.float64)
    for factor in (0.03, 0.7, 20.0):
        factors = torch.full_like(counts, factor)
        stored = values_from_counts(counts, factors).float().double()
        fewest, most, fits = count_range(stored, stored, factors)
        assert torch.equal(fewest, counts)
        assert torch.equal(most, counts)
        assert fits.all()


def test_genes_and_counts_that_fit_equal_a_search():
    cells, _, _, weights = sorted_cells()
    bounds = RankBounds(cells, N_SPECIAL, weights)
    rows, places = cells.is_masked.nonzero(as_tuple=True)
    is_unfit = bounds.unfit(rows, places)(torch.arange(len(rows)))
    assert is_unfit.shape == (len(rows), VOCAB_SIZE)
    assert 0.05 < is_unfit[:, N_SPECIAL:].double().mean() < 0.95
    some = torch.tensor([7, 3, 11])
    assert torch.equal(bounds.unfit(rows, places)(some), is_unfit[some])
    molecules = torch.arange(1.0, 3000.0, dtype=torch.float64)
    for slot in range(0, len(rows), 5):
        row, place = int(rows[slot]), int(places[slot])
        is_shown = ~cells.is_masked[row] & (cells.input_ids[row] >= N_SPECIAL)
        scores = cells.expression_values[row].double() / weights[cells.input_ids[row]]
        left = scores[:place][is_shown[:place]].tolist()
        right = scores[place + 1 :][is_shown[place + 1 :]].tolist()
        highest, lowest = min(left, default=math.inf), max(right, default=0.0)
        every = molecules.unsqueeze(1).expand(-1, VOCAB_SIZE)
        score = values_from_counts(every, cells.size_factors[row]) / weights
        is_between = (score <= highest * (1 + 2e-7)) & (score >= lowest * (1 - 2e-7))
        assert torch.equal(is_between.any(dim=0)[N_SPECIAL:], ~is_unfit[slot, N_SPECIAL:])
        for gene in range(N_SPECIAL, VOCAB_SIZE, 3):
            one = torch.tensor([row]), torch.tensor([place]), torch.tensor([gene])
            fewest, most = bounds.counts(*one, cells.size_factors[one[0]])
            fitting = molecules[is_between[:, gene]].tolist()
            if fitting:
                assert fewest.item() == fitting[0]
                assert most.item() == (math.inf if highest == math.inf else fitting[-1])


@pytest.mark.parametrize("most", [1, 3, 50, 100_000])
def test_the_truth_always_fits(most):
    cells, clean, counts, weights = sorted_cells(n_cells=1000, most=most, seed=most)
    bounds = RankBounds(cells, N_SPECIAL, weights)
    rows, places = cells.is_masked.nonzero(as_tuple=True)
    genes, truth = clean[rows, places], counts[rows, places]
    is_unfit = bounds.unfit(rows, places)(torch.arange(len(rows)))
    assert not is_unfit.gather(1, genes.unsqueeze(1)).any()
    fewest, most = bounds.counts(rows, places, genes, cells.size_factors[rows])
    assert (fewest <= truth).all()
    assert (truth <= most).all()


def test_without_depths_all_genes_fit():
    cells, _, _, weights = sorted_cells()
    rows, places = cells.is_masked.nonzero(as_tuple=True)
    assert RankBounds(replace(cells, size_factors=None), N_SPECIAL, weights).unfit(rows, places) is None


def test_bounds_are_there_where_they_are_wanted_and_weights_are_known():
    cells, _, _, weights = sorted_cells()
    knows = SimpleNamespace(ranking_weights=weights, n_special_tokens=N_SPECIAL)
    bounds = rank_bounds(cells, knows, rank_consistent=True)
    expected = RankBounds(cells, N_SPECIAL, weights)
    assert torch.equal(bounds.lowest, expected.lowest)
    assert torch.equal(bounds.highest, expected.highest)
    assert rank_bounds(cells, knows, rank_consistent=False) is None
    knows_not = SimpleNamespace(ranking_weights=None, n_special_tokens=N_SPECIAL)
    assert rank_bounds(cells, knows_not, rank_consistent=True) is None
