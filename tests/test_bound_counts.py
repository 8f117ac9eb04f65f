"""Tests of the likelihood of cells with their counts, of which all can be listed.

Scope: `bound_scdiva` with and without what visible neighbours allow, and draws of `unmask` against it.
Run: pytest tests/test_bound_counts.py
"""

from dataclasses import replace

import pytest
import torch
from scipy import stats

from modeling_scdiva.bound_scdiva import estimate_bound, exact_log_prob, masked_nats
from modeling_scdiva.enumerated_law import EnumeratedLaw, SharedNoise
from modeling_scdiva.unmask_scdiva import UnmaskSettings, unmask
from modeling_scdiva.value_law_scdiva import count_log_prob, counts_from_values, values_from_counts


def all_counts(n_counts=25):
    """A toy whose cells can be listed with their counts, and all of these cells."""
    law = EnumeratedLaw(3, 2, concentration=1.0)
    law.locations = torch.tensor([0, 0, 0, 0, 0, 1.1, 0.9, 0.5], dtype=torch.float64)
    law.scales = torch.tensor([1, 1, 1, 1, 1, 0.08, 0.06, 0.1], dtype=torch.float64)
    law.ranking_weights = torch.tensor([1, 1, 1, 1, 1, 1.0, 1.4, 0.8], dtype=torch.float64)
    counts = torch.cartesian_prod(*[torch.arange(1.0, n_counts + 1)] * 2).double()
    cells = torch.arange(6).repeat_interleave(len(counts))
    counts = torch.nn.functional.pad(counts.repeat(6, 1), (1, 0))
    factors = torch.full((len(cells),), 2.0, dtype=torch.float64)
    values = values_from_counts(counts, factors.unsqueeze(1)).float()
    state = replace(law.clean_cells().select(cells), expression_values=values, size_factors=factors)
    return law, state, cells, counts[:, 1:]


@pytest.mark.parametrize("order", ["rank", "margin", "entropy"])
@pytest.mark.parametrize("rank_consistent", [False, True])
def test_exact_probabilities_of_cells_and_counts_sum_to_one(order, rank_consistent):
    law, state, cells, counts = all_counts()
    genes, values = exact_log_prob(state, law, order=order, rank_consistent=rank_consistent)
    assert (genes + values).exp().sum().item() == pytest.approx(1.0, abs=1e-6)
    ids = state.input_ids[:, 1:]
    free = count_log_prob(counts, torch.tensor(2.0), law.locations[ids], law.scales[ids]).sum(dim=1)
    if rank_consistent:
        scores = state.expression_values[:, 1:] / law.ranking_weights[ids]
        is_sorted = scores[:, 0] >= scores[:, 1] - 1e-6
        assert (genes + values)[is_sorted].isfinite().all()
        assert (genes + values)[~is_sorted].exp().sum() < 0.05  # where no gene and count is left that fits
        assert (values - free)[is_sorted].max() > 0.1
    else:
        torch.testing.assert_close(genes, law.probabilities[cells].log())
        torch.testing.assert_close(values, free, rtol=1e-9, atol=1e-9)


def test_nats_between_neighbours_by_a_search():
    """One gene hidden beside the other: genes and counts that keep the order, out of all there are."""
    law, state, _, counts = all_counts()
    every = torch.arange(1.0, 400.0, dtype=torch.float64)
    every_score = (every / 2.0).log1p().unsqueeze(1) / law.ranking_weights  # (399, V)
    ids = state.input_ids[:, 1:]
    scores = (counts / 2.0).log1p() / law.ranking_weights[ids]
    rows = ((scores[:, 0] > scores[:, 1]) & (counts <= 4).all(dim=1)).nonzero().squeeze(1)
    n_tighter = 0
    for slot in (0, 1):
        is_hidden = torch.zeros(len(rows), 3, dtype=torch.bool).index_fill(
            1, torch.tensor([1 + slot]), value=True
        )
        genes, values, _ = masked_nats(state.select(rows), is_hidden, law, rank_consistent=True)
        for place, row in enumerate(rows.tolist()):
            neighbour, gene = scores[row, 1 - slot], int(ids[row, slot])
            is_allowed = every_score >= neighbour - 1e-9 if slot == 0 else every_score <= neighbour + 1e-9
            is_possible = law.cells[:, 1 - slot] == ids[row, 1 - slot]
            masses = law.probabilities[is_possible], law.cells[is_possible, slot]
            fits = is_allowed.any(dim=0)[masses[1]]
            gene_law = masses[0] * fits / (masses[0] * fits).sum()
            assert genes[place].item() == pytest.approx(-float(gene_law[masses[1] == gene].log()), abs=1e-9)
            n_tighter += int(not fits.all())
            of_gene = [torch.full_like(every, float(n)) for n in (2.0, law.locations[gene], law.scales[gene])]
            nats = count_log_prob(every, *of_gene)
            between = nats[is_allowed[:, gene]].logsumexp(dim=0)
            expected = float(between - nats[int(counts[row, slot]) - 1])
            assert values[place].item() == pytest.approx(expected, abs=1e-6)
    assert n_tighter >= 2  # next to one molecule of a gene of middling weight, the lightest does not fit


def nats_of_masks(state, law, rank_consistent):
    """(M, 4) nats of both slots where both are hidden, and of each where it alone is."""
    nats = []
    for hidden in ((1, 2), (1,), (2,)):
        is_hidden = torch.zeros_like(state.is_masked).index_fill(1, torch.tensor(hidden), value=True)
        genes, values, _ = masked_nats(state, is_hidden, law, rank_consistent=rank_consistent)
        nats.append((genes + values).view(-1, len(hidden)))
    return torch.cat(nats, dim=1)


def test_what_neighbours_allow_makes_the_bound_tighter_and_leaves_it_a_bound():
    law, state, _, _ = all_counts()
    free, bounded = (nats_of_masks(state, law, is_bounded) for is_bounded in (False, True))
    scores = state.expression_values[:, 1:] / law.ranking_weights[state.input_ids[:, 1:]]
    is_sorted = scores[:, 0] >= scores[:, 1] - 1e-6
    assert (bounded[is_sorted] <= free[is_sorted] + 1e-9).all()
    assert (bounded[is_sorted] < free[is_sorted] - 0.1).any()
    # Half of the sum with both hidden, and the other gene after the first: the mean over both orders.
    bound = 0.5 * bounded.sum(dim=1)
    assert 0.5 < (-bound).exp().sum() <= 1.0 + 1e-9
    # The estimate is of the same numbers.
    rows = is_sorted.nonzero().squeeze(1)[::97].repeat(40)
    estimate = estimate_bound(
        state.select(rows), law, SharedNoise(0), n_draws=64, rows_at_once=10_000, rank_consistent=True
    )
    means = (estimate.gene_nats + estimate.value_nats).mean(dim=1).view(40, -1)
    error = means.std(dim=0) / 40**0.5
    assert ((means.mean(dim=0) - bound[rows].view(40, -1)[0]).abs() <= 4 * error + 1e-9).all()


def test_drawn_cells_and_counts_have_their_exact_probabilities():
    law, state, _, _ = all_counts()
    hidden = replace(law.hidden_cells(50_000), size_factors=torch.full((50_000,), 2.0, dtype=torch.float64))
    done = unmask(hidden, law, UnmaskSettings(order="rank"), SharedNoise(0))
    index = law.index_of(done.state.input_ids)
    drawn = counts_from_values(done.state.expression_values[:, 1:], hidden.size_factors.unsqueeze(1))
    assert drawn.max() <= 25
    place = (index * 625 + (drawn[:, 0] - 1) * 25 + drawn[:, 1] - 1).long()
    genes, values = exact_log_prob(state, law, order="rank", rank_consistent=True)
    torch.testing.assert_close(done.gene_log_prob, genes[place], rtol=0, atol=1e-6)
    torch.testing.assert_close(done.value_log_prob, values[place], rtol=0, atol=1e-6)
    expected = 50_000 * (genes + values).exp()
    observed = torch.bincount(place, minlength=len(expected)).double()
    is_common = expected >= 5
    observed = [*observed[is_common].tolist(), float(observed[~is_common].sum())]
    expected = [*expected[is_common].tolist(), 50_000 - float(expected[is_common].sum())]
    assert stats.chisquare(observed, expected).pvalue > 0.001
