"""Tests of the likelihood: forms of the bound, its estimate and standard error, the exact value.

Scope: `bound_scdiva`, on cells few enough to list and on long cells whose bound is a plain sum. What visible
neighbours allow is tested in `test_bound_counts.py`.
Run: pytest tests/test_bound_scdiva.py
"""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from modeling_scdiva.bound_scdiva import BoundEstimate, estimate_bound, exact_log_prob, masked_nats
from modeling_scdiva.enumerated_law import LAT, MASK, N_SPECIAL, PAD, EnumeratedLaw, RecordingLaw, SharedNoise
from modeling_scdiva.sampling_scdiva import CellNoise
from modeling_scdiva.unmask_scdiva import CellState
from modeling_scdiva.value_law_scdiva import count_log_prob, values_from_counts

TOYS = [(6, 4), (5, 3), (5, 5), (4, 1)]


class Uniform(EnumeratedLaw):
    """Knows nothing: every gene is as likely."""

    def gene_logits(self, encoded, cells, places):
        logits = torch.zeros(len(cells), self.vocab_size, dtype=torch.float64)
        logits[:, :N_SPECIAL] = -torch.inf
        return logits


class LongCells:
    """One cell of many genes, each of them harder the more are hidden: nats = 3.5 + 2.5 k / L + its own.

    The rest of the probability lies on a gene that no cell has, so that visible genes change nothing.
    """

    mask_token_id, n_special_tokens, ranking_weights = MASK, N_SPECIAL, None

    def __init__(self, n_slots, spread):
        self.n_slots = n_slots
        self.vocab_size = N_SPECIAL + n_slots + 1
        own = spread * torch.randn(n_slots, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.own = own.clamp(min=-3.0)
        shares = torch.arange(1, n_slots + 1, dtype=torch.float64) / n_slots
        self.bound = float((3.5 + 2.5 * shares).sum() + self.own.sum())

    def cells(self, n_cells):
        genes = torch.arange(N_SPECIAL, N_SPECIAL + self.n_slots)
        ids = torch.cat([torch.tensor([LAT]), genes]).repeat(n_cells, 1)
        return CellState(ids, torch.zeros(ids.shape), torch.ones_like(ids, dtype=torch.bool), ids == MASK)

    def encode(self, state, is_asked=None):
        return state.is_masked.double().mean(dim=1) * (self.n_slots + 1) / self.n_slots

    def gene_logits(self, encoded, cells, places):
        nats = 3.5 + 2.5 * encoded[cells] + self.own[places - 1]
        logits = torch.full((len(cells), self.vocab_size), -torch.inf, dtype=torch.float64)
        logits[:, -1] = (-torch.expm1(-nats)).log()
        return logits.scatter(1, (places + N_SPECIAL - 1).unsqueeze(1), -nats.unsqueeze(1))


def with_counts(law, seed=0):
    """All cells of a law with random counts and size factors."""
    rng = np.random.default_rng(seed)
    state = law.clean_cells()
    counts = torch.from_numpy(rng.integers(1, 9, state.input_ids.shape).astype(np.float64))
    factors = torch.from_numpy(rng.uniform(0.2, 2.0, len(counts)))
    values = values_from_counts(counts, factors.unsqueeze(1)).float()
    return replace(state, expression_values=values, size_factors=factors), counts


def nats_of_all_masks(state, denoiser, n_slots):
    """(M, 2 ** L, L) nats of every slot of every cell under every mask; 0 where not hidden."""
    masks = torch.tensor(list(itertools.product([False, True], repeat=n_slots)))
    n_cells = len(state.input_ids)
    cells = torch.arange(n_cells).repeat_interleave(len(masks))
    is_hidden = torch.nn.functional.pad(masks.repeat(n_cells, 1), (1, 0))
    genes, values, where = masked_nats(state.select(cells), is_hidden, denoiser)
    table = torch.zeros(is_hidden.shape, dtype=torch.float64).index_put(where, genes + values)
    return masks.numpy(), table[:, 1:].view(n_cells, len(masks), n_slots).numpy()


def bound_over_orders(masks, nats):
    """By its definition: the mean over all orders of the chain rule."""
    n_slots = masks.shape[1]
    which = {tuple(mask): place for place, mask in enumerate(masks.tolist())}
    total = np.zeros(len(nats))
    for order in itertools.permutations(range(n_slots)):
        for done, slot in enumerate(order):
            mask = tuple(other not in order[:done] for other in range(n_slots))
            total += nats[:, which[mask], slot]
    return total / math.factorial(n_slots)


def over_time(masks, function):
    """Integral over t of the mean of function(t) (M, 2 ** L) over Bernoulli masks; exact for polynomials."""
    nodes, weights = np.polynomial.legendre.leggauss(12)
    n_hidden = masks.sum(axis=1)
    total = 0.0
    for t, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        probability = t**n_hidden * (1 - t) ** (masks.shape[1] - n_hidden)
        total = total + weight * (function(t) * probability).sum(axis=-1)
    return total


def mean_by_count(masks, nats):
    """(M, L) mean nats of a hidden gene with k = 1 .. L hidden."""
    n_hidden = masks.sum(axis=1)
    return np.stack(
        [nats[:, n_hidden == k].sum(axis=2).mean(axis=1) / k for k in range(1, masks.shape[1] + 1)], axis=1
    )


# Forms of the bound.


@pytest.mark.parametrize(("n_genes", "n_slots"), TOYS)
def test_all_forms_of_the_bound_agree(n_genes, n_slots):
    """For any denoiser, counts included; so a wrong one is asked."""
    state, _ = with_counts(EnumeratedLaw(n_genes, n_slots))
    denoiser = EnumeratedLaw(n_genes, n_slots, seed=7, concentration=1.0)
    masks, nats = nats_of_all_masks(state, denoiser, n_slots)
    sums, n_hidden = nats.sum(axis=2), masks.sum(axis=1)
    bound = bound_over_orders(masks, nats)
    assert bound.std() > 0.1
    close = {"rtol": 0, "atol": 1e-10}
    np.testing.assert_allclose(over_time(masks, lambda t: sums / t), bound, **close)
    np.testing.assert_allclose(mean_by_count(masks, nats).sum(axis=1), bound, **close)
    cell_mean = over_time(masks, lambda t: sums / np.maximum(n_hidden, 1))
    np.testing.assert_allclose((n_slots + 1) * cell_mean, bound, **close)
    # A mean over all hidden genes of a batch weighs k, and is no bound.
    flat = over_time(masks, lambda t: sums) / over_time(masks, lambda t: n_hidden.astype(float))
    k = np.arange(1, n_slots + 1)
    np.testing.assert_allclose(flat, mean_by_count(masks, nats) @ k / k.sum(), **close)
    if n_slots > 1:
        assert np.abs(n_slots * flat - bound).max() > 0.1


@pytest.mark.parametrize(("n_genes", "n_slots"), TOYS)
def test_the_bound_of_the_perfect_denoiser_is_the_likelihood(n_genes, n_slots):
    law = EnumeratedLaw(n_genes, n_slots, concentration=1.0)
    bound = bound_over_orders(*nats_of_all_masks(law.clean_cells(), law, n_slots))
    np.testing.assert_allclose(bound, -law.probabilities.log(), rtol=0, atol=1e-10)
    probabilities = law.probabilities.numpy()
    assert probabilities @ bound == pytest.approx(law.entropy(), abs=1e-10)
    wrong = EnumeratedLaw(n_genes, n_slots, seed=7, concentration=1.0)
    bound = bound_over_orders(*nats_of_all_masks(law.clean_cells(), wrong, n_slots))
    assert probabilities @ bound > law.entropy() + 0.1


@pytest.mark.parametrize(("n_genes", "n_slots"), TOYS)
def test_the_bound_without_knowledge_counts_the_genes_left(n_genes, n_slots):
    uniform = Uniform(n_genes, n_slots)
    expected = sum(math.log(n_genes - i) for i in range(n_slots))
    bound = bound_over_orders(*nats_of_all_masks(uniform.clean_cells(), uniform, n_slots))
    np.testing.assert_allclose(bound, expected, rtol=0, atol=1e-10)
    # A draw of k hidden genes is worth log(V - L + k) / P(k), and that is right in the mean over k.
    law = law_of_sizes(n_slots)
    worth = np.array([math.log(n_genes - n_slots + k) for k in range(1, n_slots + 1)]) / law
    np.testing.assert_allclose(law @ worth, expected, rtol=0, atol=1e-10)
    noise = CellNoise(range(len(bound)))
    estimate = estimate_bound(uniform.clean_cells(), uniform, noise, n_draws=8)
    away = np.abs(estimate.gene_nats.numpy()[:, :, None] - worth).min(axis=2)
    np.testing.assert_allclose(away, 0.0, rtol=0, atol=1e-10)


def test_counts_are_scored_with_their_true_gene():
    law = EnumeratedLaw(5, 3)
    state, counts = with_counts(law)
    is_hidden = torch.zeros_like(state.is_masked)
    is_hidden[:, 2:] = True
    genes, values, (cells, places) = masked_nats(state, is_hidden, law)
    ids = state.input_ids[cells, places]
    expected = -count_log_prob(
        counts[cells, places], state.size_factors[cells], law.locations[ids], law.scales[ids]
    )
    torch.testing.assert_close(values, expected)
    for left in (
        masked_nats(state, is_hidden, law, with_values=False),
        masked_nats(law.clean_cells(), is_hidden, law),
    ):
        assert torch.equal(left[0], genes)
        assert (left[1] == 0).all()
        assert torch.equal(left[2][0], cells)


# The estimate.


@pytest.mark.parametrize("is_stratified", [True, False])
def test_estimates_scatter_about_the_bound_as_they_say(is_stratified):
    law = EnumeratedLaw(6, 4, seed=3)
    denoiser = EnumeratedLaw(6, 4, seed=4, concentration=1.0)
    cells = law.probabilities.topk(6).indices
    state = with_counts(law)[0].select(cells)
    exact = bound_over_orders(*nats_of_all_masks(state, denoiser, 4))
    state = state.select(torch.arange(6).repeat(250))
    estimate = estimate_bound(
        state, denoiser, SharedNoise(1), n_draws=64, rows_at_once=24_000, is_stratified=is_stratified
    )
    assert (estimate.value_nats > 0).all()
    means = (estimate.gene_nats + estimate.value_nats).mean(dim=1).view(250, 6).numpy()
    deviation = (means.mean(axis=0) - exact) / (means.std(axis=0) / 250**0.5)
    assert np.abs(deviation).max() < 3
    scores = (means - exact) / estimate.standard_error.view(250, 6).numpy()
    assert 0.9 < scores.std() < 1.1, f"z-scores have the standard deviation {scores.std():.3f}"


def test_strata_halve_the_standard_error():
    """Where genes that are visible say much about the others; how much is gained depends on the law."""
    law = EnumeratedLaw(5, 5, seed=1)
    chosen = torch.multinomial(law.probabilities, 12, generator=torch.Generator().manual_seed(0))
    state = law.clean_cells().select(chosen.repeat(200))
    spread = [
        estimate_bound(
            state, law, SharedNoise(1), n_draws=64, rows_at_once=24_000, is_stratified=is_stratified
        )
        .gene_nats.mean(dim=1)
        .view(200, 12)
        .std(dim=0)
        for is_stratified in (True, False)
    ]
    ratio = float((spread[0] / spread[1]).mean())
    assert ratio <= 0.5, f"standard error with strata / without: {ratio:.3f}"


def test_estimates_of_long_cells():
    toy = LongCells(200, spread=1.2)
    estimates = {
        is_stratified: estimate_bound(
            toy.cells(n_cells),
            toy,
            SharedNoise(2),
            n_draws=64,
            rows_at_once=1,
            is_stratified=is_stratified,
        )
        for is_stratified, n_cells in ((True, 200), (False, 60))
    }
    means = estimates[True].gene_nats.mean(dim=1)
    assert abs(float(means.mean()) - toy.bound) < 3 * float(means.std()) / 200**0.5
    scores = (means - toy.bound) / estimates[True].standard_error
    assert 0.9 < scores.std() < 1.1, f"z-scores have the standard deviation {scores.std():.3f}"
    ratio = float(means.std() / estimates[False].standard_error.square().mean().sqrt())
    assert ratio <= 0.35, f"standard error with strata / without: {ratio:.3f}"


def test_standard_error_by_hand():
    genes, values = torch.tensor([[3.0, 1.0, 2.0]]).double(), torch.tensor([[1.0, 1.0, 1.0]]).double()
    nothing = torch.zeros(1, 1)
    # Squared steps 4 and 1, the first once more: 9 / 2 in sum over three draws.
    stratified = BoundEstimate(genes, values, nothing, is_stratified=True)
    assert stratified.standard_error.item() == pytest.approx(math.sqrt(9 / 2) / 3)
    independent = BoundEstimate(genes, values, nothing, is_stratified=False)
    assert independent.standard_error.item() == pytest.approx(math.sqrt(1 / 3))


def law_of_sizes(n_slots):
    """(L,) probability of hiding 1 .. L genes: half uniform, half falling as the root's slope."""
    roots = np.sqrt(np.arange(n_slots + 1) / n_slots)
    return 0.5 / n_slots + 0.5 * np.diff(roots)


def test_masks_are_uniform_given_their_size_and_sizes_fill_their_strata():
    law = RecordingLaw(5, 3)
    n_cells, n_draws = 4000, 6
    state = law.clean_cells().select(torch.zeros(n_cells, dtype=torch.long))
    estimate = estimate_bound(state, law, SharedNoise(0), n_draws=n_draws, rows_at_once=n_cells)
    assert len(law.asked) == n_draws
    powers = torch.tensor([0, 1, 2, 4])
    ends = np.concatenate([[0.0], np.cumsum(law_of_sizes(3))])  # of the levels of 1, 2 and 3 hidden genes
    for draw, asked in enumerate(law.asked):
        assert not asked.is_masked[:, 0].any()
        assert torch.equal(asked.is_masked, asked.input_ids == MASK)
        sizes = asked.is_masked.sum(dim=1)
        patterns = (asked.is_masked * powers).sum(dim=1)
        for size in (1, 2, 3):
            low, high = max(ends[size - 1], draw / n_draws), min(ends[size], (draw + 1) / n_draws)
            share = float((sizes == size).double().mean())
            assert abs(share - max(0.0, high - low) * n_draws) < 4 * (0.25 / n_cells) ** 0.5
            if high - low < 0.02:
                continue
            sets = [sum(mask) == size for mask in itertools.product([False, True], repeat=3)]
            expected = torch.tensor(sets) / sum(sets)
            chosen = patterns[sizes == size]
            shares = torch.bincount(chosen, minlength=8) / len(chosen)
            assert (shares - expected).abs().max() < 4.5 * (0.25 / len(chosen)) ** 0.5
    totals, times = torch.zeros(2, n_cells, 4, dtype=torch.float64)
    for asked in law.asked[:n_draws]:
        nats, _, where = masked_nats(state, asked.is_masked, law)
        totals.index_put_(where, nats, accumulate=True)
        times.index_put_(where, torch.ones_like(nats), accumulate=True)
    torch.testing.assert_close(estimate.gene_surprisal, totals / times, equal_nan=True)
    assert estimate.gene_surprisal[:, 0].isnan().all()


def test_independent_draws_follow_the_law_of_sizes():
    law = RecordingLaw(5, 3)
    state = law.clean_cells().select(torch.zeros(3000, dtype=torch.long))
    estimate_bound(state, law, SharedNoise(0), n_draws=4, rows_at_once=3000, is_stratified=False)
    for asked in law.asked:
        shares = torch.bincount(asked.is_masked.sum(dim=1), minlength=4) / 3000
        assert (shares[1:] - torch.from_numpy(law_of_sizes(3))).abs().max() < 0.03


def padded(state, n_left, n_right):
    """The same cells with padding on both sides."""

    def pad(part, value):
        return torch.nn.functional.pad(part, (n_left, n_right), value=value)

    return replace(
        state,
        input_ids=pad(state.input_ids, PAD),
        expression_values=pad(state.expression_values, 0.0),
        attention_mask=pad(state.attention_mask, value=False),
        is_masked=pad(state.is_masked, value=False),
    )


def test_an_estimate_depends_on_nothing_but_its_cell_and_seed():
    law = EnumeratedLaw(5, 3, concentration=1.0)
    state, _ = with_counts(law)
    state, seeds = state.select(torch.tensor([3, 17, 40, 3])), [11, 12, 13, 14]

    def estimated(rows, rows_at_once, n_right=0):
        part = padded(state.select(torch.tensor(rows)), 0, n_right)
        noise = CellNoise([seeds[row] for row in rows])
        seen = []
        estimate = estimate_bound(
            part, law, noise, n_draws=10, rows_at_once=rows_at_once, on_rows=seen.append
        )
        assert sum(seen) == 10 * len(rows)
        assert max(seen) <= max(rows_at_once, len(rows))
        entries = (estimate.gene_nats, estimate.value_nats, estimate.gene_surprisal[:, :4])
        return dict(zip(rows, zip(*entries, strict=True), strict=True))

    together = estimated([0, 1, 2, 3], 64)
    assert not torch.equal(together[0][0], together[3][0])  # another seed, other draws
    settings = [([2, 0, 3, 1], 64, 0), ([0, 1, 2, 3], 1, 0), ([1, 2], 7, 3)]
    for rows, rows_at_once, n_right in [*settings, *(([row], 4, row) for row in range(4))]:
        for row, entries in estimated(rows, rows_at_once, n_right).items():
            for entry, expected in zip(entries, together[row], strict=True):
                assert torch.equal(entry.nan_to_num(-1.0), expected.nan_to_num(-1.0))


def test_cells_of_one_gene_and_of_none():
    law = EnumeratedLaw(4, 1)
    state = padded(law.clean_cells(), 0, 2)
    state.attention_mask[1, 1:] = False  # the second cell has no gene
    estimate = estimate_bound(state, law, CellNoise(range(4)), n_draws=3)
    expected = -law.probabilities.log()
    expected[1] = 0.0
    torch.testing.assert_close(estimate.gene_nats, expected.unsqueeze(1).expand(4, 3))
    assert (estimate.standard_error[[0, 2, 3]] < 1e-12).all()
    surprisal = estimate.gene_surprisal
    torch.testing.assert_close(surprisal[[0, 2, 3], 1], expected[[0, 2, 3]])
    assert surprisal[:, [0, 2, 3]].isnan().all()
    assert surprisal[1].isnan().all()


# The exact value.


@pytest.mark.parametrize("order", ["rank", "margin", "entropy"])
@pytest.mark.parametrize("tokens_per_step", [1, 2, 3])
def test_exact_probabilities_of_all_cells_sum_to_one(order, tokens_per_step):
    law = EnumeratedLaw(6, 4, concentration=1.0)
    wrong = EnumeratedLaw(6, 4, seed=7, concentration=1.0)
    for denoiser in (law, wrong, Uniform(6, 4)):
        nats, _ = exact_log_prob(law.clean_cells(), denoiser, order=order, tokens_per_step=tokens_per_step)
        assert nats.dtype == torch.float64
        assert nats.exp().sum().item() == pytest.approx(1.0, abs=1e-10)
    nats, _ = exact_log_prob(law.clean_cells(), law, order=order, tokens_per_step=tokens_per_step)
    if tokens_per_step == 1:
        torch.testing.assert_close(nats, law.probabilities.log(), rtol=0, atol=1e-10)
    else:
        assert 0.5 * (nats.exp() - law.probabilities).abs().sum() > 0.05


def test_exact_values_do_not_depend_on_the_cells_beside():
    law = EnumeratedLaw(5, 3, concentration=1.0)
    state, _ = with_counts(law)
    for order in ("rank", "entropy"):
        together = exact_log_prob(state, law, order=order, tokens_per_step=2)
        back = torch.arange(len(law.cells)).flip(0)
        reverse = exact_log_prob(padded(state.select(back), 0, 3), law, order=order, tokens_per_step=2)
        for row in range(0, len(law.cells), 13):
            alone = exact_log_prob(state.select(torch.tensor([row])), law, order=order, tokens_per_step=2)
            for part in range(2):
                assert torch.equal(alone[part][0], together[part][row])
                assert torch.equal(reverse[part][len(law.cells) - 1 - row], together[part][row])


def test_a_random_order_is_refused():
    law = EnumeratedLaw(4, 2)
    for order in ("random", "best"):
        with pytest.raises(ValueError, match=rf"order must be one of rank, margin, entropy, got '{order}'"):
            exact_log_prob(law.clean_cells(), law, order=order)
