"""Tests of the parts of the reverse process: noise, schedules, choice of slots, gene laws, draws.

Scope: everything in `sampling_scdiva`, with laws small enough to count and one of 41,818 genes for the tail.
Run: pytest tests/test_sampling_scdiva.py
"""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from modeling_scdiva.sampling_scdiva import (
    ORDERS,
    SCHEDULES,
    CellNoise,
    choose_slots,
    draw_genes,
    gene_log_law,
    hidden_after,
    invert_law,
    law_certainty,
    n_entropy_bounded,
    n_remasked,
    neighbour_scores,
    slot_priority,
    without_unfit,
)

INF = math.inf
VOCAB_SIZE = 41_818


def attended(lengths, width=None, side="right"):
    """(B, S) bool, padded on one side."""
    width = width or max(lengths)
    places = torch.arange(width).expand(len(lengths), width)
    lengths = torch.tensor(lengths).unsqueeze(1)
    return places < lengths if side == "right" else places >= width - lengths


# Noise of cells.


def test_noise_of_a_cell_depends_on_its_seed_alone():
    seeds, lengths = [7, 11, 13], [4, 2, 3]
    alone = []
    for seed, length in zip(seeds, lengths, strict=True):
        noise = CellNoise([seed])
        alone.append([noise.uniforms(torch.tensor([0]), attended([length]), 2)[:, 0] for _ in range(2)])
    for order in itertools.permutations(range(3)):
        noise = CellNoise([seeds[cell] for cell in order])
        for call in range(2):
            together = noise.uniforms(torch.arange(3), attended([lengths[cell] for cell in order]), 2)
            for row, cell in enumerate(order):
                assert torch.equal(together[:, row, : lengths[cell]], alone[cell][call])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_takes_no_number(side):
    plain = CellNoise([5]).uniforms(torch.tensor([0]), attended([3]), 4)
    is_attended = attended([3], width=9, side=side)
    padded = CellNoise([5]).uniforms(torch.tensor([0]), is_attended, 4)
    assert torch.equal(padded[:, is_attended], plain[:, 0])
    assert (padded[:, ~is_attended] == 0.5).all()


def test_a_row_that_is_not_asked_keeps_its_numbers_for_later():
    noise, other = CellNoise([1, 2]), CellNoise([1, 2])
    other.uniforms(torch.tensor([0]), attended([6]), 3)  # cell 0 is a step ahead
    first = noise.uniforms(torch.tensor([1, 0]), attended([6, 6]), 3)
    assert torch.equal(other.uniforms(torch.tensor([1]), attended([6]), 3)[:, 0], first[:, 0])


def test_all_64_bits_of_a_seed_count():
    seeds = [5, 5 + 2**32, 5 + 2**61, 2**63 - 1]
    drawn = CellNoise(seeds).uniforms(torch.arange(4), attended([3] * 4), 1)[0]
    assert len({tuple(row) for row in drawn.tolist()}) == 4


def test_noise_is_uniform_float64_and_leaves_the_global_generator_alone():
    before, before_numpy = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    drawn = CellNoise(range(40)).uniforms(torch.arange(40), attended([250] * 40), 5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (np.random.get_state()[1] == before_numpy).all()  # noqa: NPY002
    assert drawn.shape == (5, 40, 250)
    assert drawn.dtype == torch.float64
    assert (drawn * 2**24 % 1 > 0).double().mean() > 0.99  # finer than float32
    for stream in drawn:
        assert stats.kstest(stream.flatten().numpy(), "uniform").pvalue > 0.001
    correlation = np.corrcoef(drawn.flatten(1).numpy())
    assert np.abs(correlation - np.eye(5)).max() < 0.05


# How many slots.


def test_schedules_by_hand():
    def hidden(n_slots, n_steps, **settings):
        counts = [
            hidden_after(torch.tensor([n_slots]), step, n_steps=n_steps, **settings)
            for step in range(n_steps + 1)
        ]
        return torch.cat(counts).tolist()

    assert hidden(10, 4, schedule="linear") == [10, 8, 5, 3, 0]  # 7.5 and 2.5 are rounded up
    assert hidden(2, 5, schedule="linear") == [2, 2, 1, 1, 0, 0]
    # 100 cos(0), cos(22.5 deg) = .9239, cos(45 deg) = .7071, cos(67.5 deg) = .3827
    assert hidden(100, 4, schedule="cosine") == [100, 92, 71, 38, 0]
    assert hidden(7, 4, schedule="linear", tokens_per_step=3) == [7, 4, 1, 0, 0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_fall_from_all_to_none(schedule):
    n_slots = torch.tensor([0, 1, 2, 5, 37, 1200])
    for n_steps in (1, 2, 3, 7, 64, 1300):
        steps = [hidden_after(n_slots, s, n_steps=n_steps, schedule=schedule) for s in range(n_steps + 1)]
        hidden = torch.stack(steps)
        assert hidden.dtype == torch.long
        assert torch.equal(hidden[0], n_slots)
        assert (hidden[-1] == 0).all()
        revealed = -hidden.diff(dim=0)
        assert (revealed >= 0).all()
        if schedule == "linear":
            assert ((revealed.max(dim=0).values - revealed.min(dim=0).values) <= 1).all()
        if schedule == "cosine" and n_steps == 64:
            assert revealed[:8, -1].sum() < revealed[-8:, -1].sum() / 5


@pytest.mark.parametrize("per_step", [1, 2, 7])
def test_tokens_per_step_reveals_as_many(per_step):
    n_slots = torch.tensor([0, 1, 6, 13])
    for step in range(15):
        hidden = hidden_after(n_slots, step, n_steps=3, schedule="cosine", tokens_per_step=per_step)
        assert hidden.tolist() == [max(0, n - per_step * step) for n in n_slots.tolist()]


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match=r"schedule must be one of linear, cosine, got 'sine'"):
        hidden_after(torch.tensor([3]), 1, n_steps=2, schedule="sine")


def test_entropy_bound_by_hand():
    entropy = torch.tensor([[0.5, 0.2, 9.0, 0.4], [3.0, 3.0, 3.0, 3.0], [0.0, 0.7, 0.0, 1.0]])
    is_hidden = torch.tensor([[True, True, False, True], [True] * 4, [True] * 4])
    assert n_entropy_bounded(entropy, is_hidden, 0.0).tolist() == [1, 1, 3]
    assert n_entropy_bounded(entropy, is_hidden, 0.3).tolist() == [2, 1, 3]
    assert n_entropy_bounded(entropy, is_hidden, 0.65).tolist() == [3, 1, 3]
    assert n_entropy_bounded(entropy, is_hidden, 6.0).tolist() == [3, 3, 4]
    assert n_entropy_bounded(entropy, is_hidden & False, 6.0).tolist() == [0, 0, 0]


def test_entropy_bound_is_monotone_and_keeps_to_its_row():
    generator = torch.Generator().manual_seed(0)
    entropy = 3 * torch.rand(40, 12, generator=generator, dtype=torch.float64)
    entropy[torch.rand(40, 12, generator=generator) < 0.2] = 0.0
    is_hidden = torch.rand(40, 12, generator=generator) < 0.6
    is_hidden[:, 0] = True
    last = torch.zeros(40, dtype=torch.long)
    for bound in (0.0, 0.1, 0.5, 1.0, 2.0, 5.0, 100.0):
        taken = n_entropy_bounded(entropy, is_hidden, bound)
        assert (taken >= last.clamp(min=1)).all()
        assert (taken >= ((entropy == 0) & is_hidden).sum(dim=1)).all()
        for row in range(40):
            rising = sorted(entropy[row][is_hidden[row]].tolist())
            n_taken = int(taken[row])
            assert sum(rising[: n_taken - 1]) <= bound + 1e-12
            assert n_taken == len(rising) or sum(rising[:n_taken]) > bound - 1e-12
            alone = n_entropy_bounded(entropy[row : row + 1], is_hidden[row : row + 1], bound)
            assert alone.item() == n_taken
        last = taken
    assert torch.equal(last, is_hidden.sum(dim=1))


def test_remasking_by_hand():
    def again(n_visible, n_left, rate, uniform):
        arguments = (torch.tensor([n_visible]), torch.tensor([n_left]), rate)
        return n_remasked(*arguments, torch.tensor([uniform], dtype=torch.float64)).item()

    assert again(8, 10, 0.3, 0.5) == 2  # 2.4 expected
    assert again(8, 10, 0.3, 0.7) == 3
    assert again(8, 1, 0.3, 0.99) == 1  # the schedule leaves no more hidden
    assert again(8, 10, 1.0, 0.999) == 8
    assert again(8, 0, 1.0, 0.999) == again(0, 8, 1.0, 0.999) == again(8, 8, 0.0, 0.999) == 0


def test_remasking_hides_the_expected_number():
    levels = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    for n_visible, n_left, rate in [(7, 9, 0.25), (7, 1, 0.25), (3, 2, 0.9), (5, 5, 0.05)]:
        counts = [torch.full((10_000,), n) for n in (n_visible, n_left)]
        again = n_remasked(*counts, rate, levels)
        assert again.double().mean() == pytest.approx(min(rate * n_visible, n_left), abs=1e-3)
        assert again.max() <= min(n_visible, n_left)


# Which slots.


def test_priorities_by_hand():
    is_hidden = torch.tensor([[True, False, True, True]])
    uniforms = torch.tensor([[0.1, 0.9, 0.8, 0.3]], dtype=torch.float64)
    certainty = torch.tensor([[-3.0, -0.1, -1.0, -2.0]], dtype=torch.float64)
    assert slot_priority("random", is_hidden, uniforms, None).tolist() == [[0.1, -INF, 0.8, 0.3]]
    assert slot_priority("rank", is_hidden, uniforms, None).tolist() == [[0.0, -INF, -2.0, -3.0]]
    for order in ("margin", "entropy"):
        priority = slot_priority(order, is_hidden, uniforms, certainty)
        assert priority.tolist() == [[-3.0, -INF, -1.0, -2.0]]
        with pytest.raises(ValueError, match=rf"order '{order}' reads the gene laws of all slots; none came"):
            slot_priority(order, is_hidden, uniforms, None)


def test_an_unknown_order_is_refused():
    is_hidden = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=rf"order must be one of {', '.join(ORDERS)}, got 'best'"):
        slot_priority("best", is_hidden, torch.zeros(1, 2), None)


def test_slots_by_hand_leftmost_among_equals():
    priority = torch.tensor([[0.5, -INF, 0.9, 0.5, 0.5], [-INF, 0.1, 0.2, -INF, 0.3], [1.0] * 5])
    cells, places, turns = choose_slots(priority, torch.tensor([3, 2, 0]))
    assert cells.tolist() == [0, 0, 0, 1, 1]
    assert places.tolist() == [2, 0, 3, 4, 2]
    assert turns.tolist() == [0, 1, 2, 0, 1]
    many = torch.zeros(1, 300)  # an unstable sort would shuffle so many ties
    assert choose_slots(many, torch.tensor([300]))[1].tolist() == list(range(300))


def test_random_order_prefers_no_ordered_choice():
    n_cells = 60_000
    is_hidden = torch.tensor([[True, False, True, True, True]]).expand(n_cells, 5)
    uniforms = torch.rand(n_cells, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    priority = slot_priority("random", is_hidden, uniforms, None)
    _, places, _ = choose_slots(priority, torch.full((n_cells,), 2))
    first, second = places.view(n_cells, 2).T
    counts = torch.bincount(5 * first + second, minlength=25)
    assert (counts > 0).sum() == 12
    assert stats.chisquare(counts[counts > 0].numpy()).pvalue > 0.001


# Gene laws.


def test_gene_law_by_hand():
    weights = torch.tensor([[0.0, 4.0, 1.0, 3.0, 2.0], [0.0, 1.0, 1.0, 1.0, 1.0]])
    is_excluded = torch.tensor([[False, True, False, False, False], [False, False, False, True, True]])
    law = gene_log_law(weights.log(), is_excluded).exp()
    torch.testing.assert_close(
        law, torch.tensor([[0, 0, 1 / 6, 3 / 6, 2 / 6], [0, 0.5, 0.5, 0, 0]], dtype=torch.float64)
    )
    cold = gene_log_law(weights.log(), is_excluded, temperature=0.5).exp()[0]  # squares: 1, 9, 4
    torch.testing.assert_close(cold, torch.tensor([0, 0, 1, 9, 4], dtype=torch.float64) / 14)
    # 3/6 alone falls short of .6, with 2/6 it does not; .5 is reached by the first gene.
    nucleus = gene_log_law(weights.log(), is_excluded, top_p=0.6).exp()[0]
    torch.testing.assert_close(nucleus, torch.tensor([0, 0, 0, 3, 2], dtype=torch.float64) / 5)
    assert gene_log_law(weights.log(), is_excluded, top_p=0.49).exp()[0].tolist() == [0, 0, 0, 1, 0]
    both = gene_log_law(weights.log(), is_excluded, temperature=0.5, top_p=0.65).exp()[0]  # 9/14 < .65
    torch.testing.assert_close(both, torch.tensor([0, 0, 0, 9, 4], dtype=torch.float64) / 13)


def test_gene_law_is_float64_normalised_and_leaves_logits_alone():
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(50, 30, generator=generator).bfloat16()
    is_excluded = torch.rand(50, 30, generator=generator) < 0.5
    before = logits.clone()
    for settings in ({}, {"temperature": 0.7}, {"top_p": 0.8}):
        law = gene_log_law(logits, is_excluded, **settings)
        assert law.dtype == torch.float64
        torch.testing.assert_close(law.exp().sum(dim=1), torch.ones(50, dtype=torch.float64))
        assert law[is_excluded].isneginf().all()
    assert torch.equal(logits, before)


def test_no_gene_left_is_refused():
    logits = torch.tensor([[-INF, 0.0, 1.0], [-INF, 0.0, 0.0]])
    is_excluded = torch.tensor([[False, True, True], [False, True, False]])
    with pytest.raises(ValueError, match=r"more slots than genes .* the vocabulary offers 2, .* fewer genes"):
        gene_log_law(logits, is_excluded)


def test_certainty_by_hand_and_by_scipy():
    entropy, margin = law_certainty(
        torch.tensor([[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0]]).double().log()
    )
    assert entropy.tolist() == pytest.approx([1.5 * math.log(2), 0.0], abs=1e-15)
    assert entropy[1] == 0.0
    assert margin.tolist() == pytest.approx([0.25, 1.0])
    law = torch.rand(20, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    law = law / law.sum(dim=1, keepdim=True)
    entropy, margin = law_certainty(law.log())
    np.testing.assert_allclose(entropy, stats.entropy(law.numpy(), axis=1), rtol=1e-12)
    falling = np.sort(law.numpy(), axis=1)[:, ::-1]
    np.testing.assert_allclose(margin, falling[:, 0] - falling[:, 1], rtol=1e-9)


# Draws.


def test_inversion_gives_every_gene_its_share_of_levels():
    law = torch.tensor([0.0, 0.1, 0.0, 0.25, 0.4, 0.0, 0.25, 0.0], dtype=torch.float64).log()
    n_levels = 1000
    levels = (torch.arange(n_levels, dtype=torch.float64) + 0.5) / n_levels
    genes = invert_law(law.expand(n_levels, 8), levels)
    assert torch.bincount(genes, minlength=8).tolist() == [0, 100, 0, 250, 400, 0, 250, 0]
    assert (genes.diff() >= 0).all()
    ends = torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64)
    assert invert_law(law.expand(2, 8), ends).tolist() == [1, 6]


def test_inversion_never_gives_an_impossible_gene():
    generator = torch.Generator().manual_seed(0)
    law = torch.rand(500, 40, generator=generator, dtype=torch.float64)
    law[torch.rand(500, 40, generator=generator) < 0.7] = 0.0
    law[:, 20] += 1e-3
    log_law = (law / law.sum(dim=1, keepdim=True)).log()
    for uniform in (0.0, 2.0**-53, 0.5, 1.0 - 2.0**-53):
        genes = invert_law(log_law, torch.full((500,), uniform, dtype=torch.float64))
        assert (law.gather(1, genes.unsqueeze(1)) > 0).all()
    reference = np.cumsum(log_law.exp().numpy(), axis=1)
    uniforms = torch.rand(500, generator=generator, dtype=torch.float64)
    expected = (reference <= (uniforms.numpy() * reference[:, -1])[:, None]).sum(axis=1)
    np.testing.assert_array_equal(invert_law(log_law, uniforms), expected)


def test_genes_of_one_step_by_hand():
    logits = torch.tensor([[1.0, 2.0, 1.0], [5.0, 4.0, 1.0], [1.0, 1.0, 2.0]]).log()
    cells, turns = torch.tensor([0, 0, 1]), torch.tensor([1, 0, 0])
    is_excluded = torch.tensor([[False, False, False], [False, False, True]])
    before = is_excluded.clone()
    uniforms = torch.tensor([0.6, 0.6, 0.4], dtype=torch.float64)
    genes, nats = draw_genes(logits, cells, turns, is_excluded, uniforms)
    # Turn 0 of cell 0 is the second slot: .6 lies in gene 1 of (.5, .4, .1). Its first slot then has genes 0
    # and 2, half each, and draws 2. Cell 1 may not take gene 2.
    assert genes.tolist() == [2, 1, 0]
    assert nats.exp().tolist() == pytest.approx([0.5, 0.4, 0.5])
    assert torch.equal(is_excluded, before)
    targets = torch.tensor([0, 2, 1])
    genes, nats = draw_genes(logits, cells, turns, is_excluded, uniforms, targets=targets)
    assert genes.tolist() == targets.tolist()
    assert nats.exp().tolist() == pytest.approx([1 / 3, 0.1, 0.5])
    _, nats = draw_genes(logits, cells, turns, is_excluded, uniforms, targets=torch.tensor([1, 1, 2]))
    assert nats.exp().tolist() == pytest.approx([0.0, 0.4, 0.0])  # the gene is there already
    nothing = torch.zeros(0, dtype=torch.long)
    genes, nats = draw_genes(torch.zeros(0, 3), nothing, nothing, is_excluded, uniforms[:0])
    assert len(genes) == len(nats) == 0


def test_genes_that_cannot_stand_at_a_slot_are_left_out_unless_none_is_left():
    logits = torch.tensor([[-INF, 0.0, 1.0, 2.0], [-INF, 0.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    is_excluded = torch.tensor(
        [[False, True, False, False], [False, True, False, False], [True] * 3 + [False]]
    )
    is_unfit = torch.tensor([[True, False, False, True], [False, False, True, True], [False] * 4])
    assert without_unfit(logits, is_excluded, is_unfit).tolist() == [
        [True, True, False, True],
        [False, True, False, False],  # the special token does not count as one that is left
        [True, True, True, False],
    ]
    cells, turns = torch.tensor([0, 0]), torch.tensor([1, 0])
    has_none = torch.zeros(1, 4, dtype=torch.bool)
    uniforms = torch.tensor([0.99, 0.99], dtype=torch.float64)
    asked = []

    def unfit(slots):
        asked.append(slots.tolist())
        return is_unfit[slots * 0]

    genes, nats = draw_genes(logits[:2], cells, turns, has_none, uniforms, unfit=unfit)
    # Genes 1 and 2 fit. The second slot is first and takes 2, then only 1 fits.
    assert genes.tolist() == [1, 2]
    assert nats.exp().tolist() == pytest.approx([1.0, math.e / (1 + math.e)])
    assert asked == [[1], [0]]


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5}, {"top_p": 0.7}])
def test_genes_of_one_step_follow_the_sequential_law(settings):
    n_cells = 100_000
    generator = torch.Generator().manual_seed(1)
    slots = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    cells = torch.arange(n_cells).repeat_interleave(2)
    turns = torch.arange(2).repeat(n_cells)
    uniforms = torch.rand(2 * n_cells, generator=generator, dtype=torch.float64)
    is_excluded = torch.zeros(n_cells, 5, dtype=torch.bool)
    genes, nats = draw_genes(slots.repeat(n_cells, 1), cells, turns, is_excluded, uniforms, **settings)
    pairs = (5 * genes[::2] + genes[1::2]).numpy()
    expected = np.zeros(25)
    first = gene_log_law(slots[:1], torch.zeros(1, 5, dtype=torch.bool), **settings)[0].exp()
    for gene in first.nonzero().flatten():
        without = torch.arange(5).eq(gene).unsqueeze(0)
        second = gene_log_law(slots[1:], without, **settings)[0].exp()
        expected[5 * gene : 5 * gene + 5] = (first[gene] * second).numpy()
    assert expected.sum() == pytest.approx(1.0)
    counts = np.bincount(pairs, minlength=25)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    assert stats.chisquare(counts[kept], n_cells * expected[kept]).pvalue > 0.001
    np.testing.assert_allclose((nats[::2] + nats[1::2]).exp(), expected[pairs], rtol=1e-9)


def zipf_law(exponent=2.0):
    """(V,) float64 probabilities of all genes, the rarest 3e-10."""
    weights = torch.arange(1, VOCAB_SIZE + 1, dtype=torch.float64) ** -exponent
    return weights / weights.sum()


def inverted_shares(law, genes, dtype, n_bits):
    """Probability of genes under `invert_law`: the share of all levels that a random number can take.

    The level where a gene begins is found by bisection among the multiples of 2 ** -n_bits.
    """
    bounds = torch.cat([genes, genes + 1])
    low, high = torch.zeros_like(bounds), torch.full_like(bounds, 2**n_bits)
    log_law = law.log().to(dtype).expand(len(bounds), -1)
    for _ in range(n_bits):
        middle = (low + high) // 2
        is_below = invert_law(log_law, middle.to(dtype) * 2.0**-n_bits) < bounds
        low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
    begin, end = high.double().view(2, -1) * 2.0**-n_bits
    return end - begin


def one_step_shares(law, genes, reveal_rate):
    """At most how likely genes are in one float32 Gumbel draw over all genes and "stay hidden".

    It is the probability that the key of the gene beats the key of staying, over all pairs of the 2 ** 24
    numbers that float32 noise can take; divided by what it should be.
    """
    uniforms = torch.arange(2**24, dtype=torch.float32) * 2.0**-24
    gumbel = -(-uniforms.clamp(min=torch.finfo(torch.float32).tiny).log()).log()
    staying = gumbel + math.log(1.0 - reveal_rate)  # rising
    shares = []
    for weight in (reveal_rate * law[genes]).tolist():
        keys = gumbel[gumbel + math.log(weight) > staying[0]] + math.log(weight)
        beaten = torch.searchsorted(staying, keys).double().sum().item() * 2.0**-48
        shares.append(beaten / (weight / (weight + 1.0 - reveal_rate)))
    return torch.tensor(shares, dtype=torch.float64)


def test_the_tail_of_the_gene_law_survives_two_stages_in_float64():
    law = zipf_law()
    genes = torch.tensor([0, 30, 1000, 24_650, 30_000, VOCAB_SIZE - 1])
    assert law[24_650] == pytest.approx(1e-9, rel=1e-3)
    error = inverted_shares(law, genes, torch.float64, 53) / law[genes] - 1.0
    assert error.abs().max() < 1e-6
    is_rare = law[genes] < 1e-8
    error = inverted_shares(law, genes, torch.float32, 24) / law[genes] - 1.0
    assert (error[is_rare] <= -0.9).all()  # the same in float32 draws no rare gene at all
    one_step = one_step_shares(law, genes, reveal_rate=1 / 1200) - 1.0
    assert one_step[0].abs() < 1e-3  # what is common survives
    assert (one_step[is_rare] < -0.99).all()
    assert (one_step[law[genes] < 1e-6] < -0.9).all()


# Neighbours.


def test_neighbour_scores_by_hand():
    scores = torch.tensor([[9.0, 7.0, 99.0, 99.0, 4.0, 99.0]], dtype=torch.float64)
    is_shown = torch.tensor([[False, True, False, False, True, False]])
    lowest, highest = neighbour_scores(scores, is_shown)
    assert lowest.tolist() == [[7.0, 7.0, 4.0, 4.0, 4.0, 0.0]]
    assert highest.tolist() == [[INF, 7.0, 7.0, 7.0, 4.0, 4.0]]
    lowest, highest = neighbour_scores(scores.flip(1), is_shown.flip(1))  # rising scores cross
    assert (lowest[0, 2], highest[0, 2]) == (7.0, 4.0)
    lowest, highest = neighbour_scores(scores, is_shown & False)
    assert lowest.tolist() == [[0.0] * 6]
    assert highest.tolist() == [[INF] * 6]


def test_neighbour_scores_equal_a_search():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(30, 11, generator=generator, dtype=torch.float64)
    is_shown = torch.rand(30, 11, generator=generator) < 0.3
    scores[~is_shown] = torch.nan  # what is not shown is not read
    lowest, highest = neighbour_scores(scores, is_shown)
    for row, place in itertools.product(range(30), range(11)):
        right = [scores[row, i].item() for i in range(place, 11) if is_shown[row, i]]
        left = [scores[row, i].item() for i in range(place + 1) if is_shown[row, i]]
        assert lowest[row, place] == (right[0] if right else 0.0)
        assert highest[row, place] == (left[-1] if left else INF)
