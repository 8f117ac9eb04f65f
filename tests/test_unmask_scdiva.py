"""Tests of the reverse process: what it never changes, what it costs, its values, steering.

Scope: `unmask_scdiva` but for the law of its cells, which `test_unmask_laws.py` enumerates.
Run: pytest tests/test_unmask_scdiva.py
"""

import itertools
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from scipy import stats

from modeling_scdiva.enumerated_law import LAT, MASK, N_SPECIAL, PAD, EnumeratedLaw, RecordingLaw, SharedNoise
from modeling_scdiva.rank_bounds_scdiva import RankBounds
from modeling_scdiva.sampling_scdiva import ORDERS, CellNoise, hidden_after
from modeling_scdiva.unmask_scdiva import CellState, UnmaskSettings, excluded_genes, unmask
from modeling_scdiva.value_law_scdiva import count_log_prob, counts_from_values, values_from_counts


class Recording(RecordingLaw):
    """The worst gene is the one with the highest id."""

    def quality(self, encoded, cells, places):
        return -self.asked[-1].input_ids[cells, places].double()


class LeftPadded(EnumeratedLaw):
    """The same law behind two positions of padding."""

    def encode(self, state, is_asked=None):
        parts = {field.name: getattr(state, field.name) for field in fields(state)}
        cut = {name: parts[name][:, 2:] for name in ("input_ids", "attention_mask")}
        return torch.nn.functional.pad(super().encode(replace(state, **cut)), (0, 0, 2, 0))


def partly_hidden(law, n_cells, seed=0, most=59):
    """Cells with values, of which 0 to all genes are hidden."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.multinomial(law.probabilities, n_cells, replacement=True, generator=generator)
    state = law.clean_cells().select(cells)
    is_masked = torch.rand(state.input_ids.shape, generator=generator) < torch.rand(
        n_cells, 1, generator=generator
    )
    is_masked[:, 0] = False
    counts = torch.randint(1, most + 1, state.input_ids.shape, generator=generator)
    factors = 0.2 + torch.rand(n_cells, generator=generator, dtype=torch.float64)
    values = values_from_counts(counts, factors.unsqueeze(1)).float()
    return replace(
        state,
        input_ids=state.input_ids.masked_fill(is_masked, MASK),
        expression_values=values.masked_fill(is_masked, 0.0),
        is_masked=is_masked,
        size_factors=factors,
    )


def widened(state, n_left, n_right):
    """The same cells with padding on both sides."""
    pads = {"input_ids": PAD, "expression_values": 7.0, "attention_mask": False, "is_masked": False}
    return replace(
        state,
        **{
            name: torch.nn.functional.pad(getattr(state, name), (n_left, n_right), value=value)
            for name, value in pads.items()
        },
    )


# What never changes, and what it costs.


@pytest.mark.parametrize("remask", ["random", "quality"])
def test_what_was_given_is_never_hidden_again(remask):
    law = Recording(6, 4)
    state = replace(partly_hidden(law, 200), cell_index=torch.arange(200))
    settings = UnmaskSettings(steps=16, remask=remask, remask_rate=0.7)
    done = unmask(state, law, settings, CellNoise(range(200)))
    law.index_of(done.state.input_ids)
    n_slots = state.is_masked.sum(dim=1)
    assert (done.n_drawn > n_slots).sum() > 50
    assert law.n_encoded == done.n_network_calls.sum()
    for seen in [*law.asked, done.state]:
        is_given = ~state.is_masked[seen.cell_index]
        assert torch.equal(seen.input_ids[is_given], state.input_ids[seen.cell_index][is_given])
        assert torch.equal(
            seen.expression_values[is_given], state.expression_values[seen.cell_index][is_given]
        )
        assert torch.equal(seen.is_masked, seen.input_ids == MASK)
        assert (seen.expression_values[seen.is_masked] == 0).all()  # the value goes with the gene


def test_the_worst_genes_are_hidden_again():
    law = Recording(6, 4)
    n_exchanges = 0
    for seed in range(20):
        law.asked.clear()
        done = unmask(
            law.hidden_cells(1),
            law,
            UnmaskSettings(steps=20, remask="quality", remask_rate=0.4),
            CellNoise([seed]),
        )
        states = [asked.input_ids[0] for asked in law.asked] + [done.state.input_ids[0]]
        for before, after in itertools.pairwise(states):
            drawn = before[before >= N_SPECIAL].tolist()
            again = before[(before >= N_SPECIAL) & (after == MASK)].tolist()
            assert sorted(again) == sorted(drawn)[len(drawn) - len(again) :]
            n_exchanges += len(again)
    assert n_exchanges > 50


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tokens_per_step", [1, 3])
def test_genes_are_unique_and_what_is_visible_stays(order, tokens_per_step):
    law = EnumeratedLaw(6, 4)
    state = widened(partly_hidden(law, 300), 0, 2)
    before = {field.name: getattr(state, field.name) for field in fields(state)}
    before = {name: None if part is None else part.clone() for name, part in before.items()}
    settings = UnmaskSettings(order=order, tokens_per_step=tokens_per_step)
    done = unmask(state, law, settings, SharedNoise(0))
    law.index_of(done.state.input_ids[:, :5])
    assert not done.state.is_masked.any()
    is_given = ~state.is_masked
    assert torch.equal(done.state.input_ids[is_given], state.input_ids[is_given])
    assert torch.equal(done.state.expression_values[is_given], state.expression_values[is_given])
    assert (done.state.expression_values[state.is_masked] > 0).all()
    assert done.state.expression_values.dtype == torch.float32
    for name, part in before.items():
        assert part is None or torch.equal(getattr(state, name), part)
    n_slots = state.is_masked.sum(dim=1)
    assert torch.equal(done.n_drawn, n_slots)
    assert torch.equal(done.n_network_calls, (n_slots + tokens_per_step - 1) // tokens_per_step)
    assert law.n_encoded == done.n_network_calls.sum()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("n_steps", [1, 3, 4, 11])
def test_only_cells_that_change_are_computed(schedule, n_steps):
    law = Recording(6, 4)
    state = partly_hidden(law, 60)
    left = []
    done = unmask(
        state,
        law,
        UnmaskSettings(steps=n_steps, schedule=schedule),
        CellNoise(range(60)),
        on_step=left.append,
    )
    n_slots = state.is_masked.sum(dim=1)
    hidden = torch.stack(
        [hidden_after(n_slots, step, n_steps=n_steps, schedule=schedule) for step in range(n_steps + 1)]
    )
    revealed = -hidden.diff(dim=0)
    assert torch.equal(done.n_network_calls, (revealed > 0).sum(dim=0))
    assert law.n_encoded == done.n_network_calls.sum()
    assert [len(asked.input_ids) for asked in law.asked] == [
        int((step > 0).sum()) for step in revealed if (step > 0).any()
    ]
    assert all(asked.is_masked.any(dim=1).all() for asked in law.asked)
    assert left == [int(h.sum()) for h, step in zip(hidden[1:], revealed, strict=True) if (step > 0).any()]
    assert left[-1] == 0


SAMPLERS = [
    {"steps": 2},
    {"order": "margin", "tokens_per_step": 2},
    {"order": "entropy", "entropy_bound": 0.8},
    {"order": "rank", "steps": 4, "schedule": "cosine", "temperature": 1.3, "top_p": 0.9},
    {"steps": 9, "remask": "random", "remask_rate": 0.5},
]


@pytest.mark.parametrize("settings", SAMPLERS)
def test_a_cell_depends_on_nothing_but_its_seed(settings):
    arguments = {"n_genes": 6, "n_slots": 4, "concentration": 1.0}
    weights = torch.linspace(1, 2, N_SPECIAL + 6, dtype=torch.float64)
    state, seeds = partly_hidden(EnumeratedLaw(**arguments), 24), torch.arange(100, 124)

    def made(rows, n_left=0, n_right=0):
        law = LeftPadded(**arguments) if n_left else EnumeratedLaw(**arguments)
        law.ranking_weights = weights
        part = widened(state.select(rows), n_left, n_right)
        done = unmask(part, law, UnmaskSettings(**settings), CellNoise(seeds[rows].tolist()))
        shown = [
            part[:, n_left : n_left + 5] for part in (done.state.input_ids, done.state.expression_values)
        ]
        return *shown, done.gene_log_prob, done.value_log_prob, done.n_network_calls, done.n_drawn

    whole = torch.arange(24)
    together = made(whole)
    assert together[0].unique(dim=0).shape[0] > 5
    shuffled = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    for rows, n_left, n_right in [
        (shuffled, 0, 0),
        (whole, 0, 3),
        (shuffled, 2, 1),
        *((row, 0, 0) for row in whole.split(1)),
        (whole[5:12], 0, 0),
    ]:
        for part, expected in zip(made(rows, n_left, n_right), together, strict=True):
            assert torch.equal(part, expected[rows])


# Values.


def test_values_are_counts_of_their_law():
    law = EnumeratedLaw(5, 3)
    state = replace(law.hidden_cells(300), size_factors=torch.linspace(0.1, 3.0, 300, dtype=torch.float64))
    done = unmask(state, law, UnmaskSettings(steps=2), SharedNoise(0))
    factors, ids = state.size_factors.unsqueeze(1), done.state.input_ids[:, 1:]
    values = done.state.expression_values[:, 1:]
    counts = counts_from_values(values, factors)
    assert (counts >= 1).all()
    torch.testing.assert_close(values_from_counts(counts, factors).float(), values, rtol=0, atol=0)
    nats = count_log_prob(counts, factors, law.locations[ids], law.scales[ids]).sum(dim=1)
    torch.testing.assert_close(done.value_log_prob, nats)
    centres = unmask(state, law, UnmaskSettings(steps=2, value_temperature=0.0), SharedNoise(0))
    ids = centres.state.input_ids[:, 1:]
    nearest = (law.locations[ids].expm1() * factors).round().clamp(min=1)
    assert torch.equal(counts_from_values(centres.state.expression_values[:, 1:], factors), nearest)
    assert (centres.value_log_prob == 0).all()


def test_counts_of_each_gene_follow_its_law_whatever_led_to_the_gene():
    law = EnumeratedLaw(4, 2, concentration=1.0)
    n_cells = 30_000
    state = replace(law.hidden_cells(n_cells), size_factors=torch.full((n_cells,), 0.5, dtype=torch.float64))
    done = unmask(state, law, UnmaskSettings(), SharedNoise(0))
    counts = counts_from_values(done.state.expression_values, state.size_factors.unsqueeze(1))
    every = torch.arange(1.0, 60.0, dtype=torch.float64)
    for gene in range(N_SPECIAL, law.vocab_size):
        for place in (1, 2):
            drawn = counts[done.state.input_ids[:, place] == gene, place]
            law_of_gene = (
                torch.full_like(every, float(n)) for n in (0.5, law.locations[gene], law.scales[gene])
            )
            expected = len(drawn) * count_log_prob(every, *law_of_gene).exp()
            is_common = expected >= 5
            observed = torch.bincount(drawn.long().clamp(max=60), minlength=61)[1:60][is_common]
            observed = [*observed.tolist(), len(drawn) - int(observed.sum())]
            expected = [*expected[is_common].tolist(), len(drawn) - float(expected[is_common].sum())]
            assert stats.chisquare(observed, expected).pvalue > 0.001


@pytest.mark.parametrize("tokens_per_step", [1, 3])
def test_values_lie_between_the_scores_of_visible_neighbours(tokens_per_step):
    law = EnumeratedLaw(5, 3)
    law.ranking_weights = torch.linspace(1, 2, law.vocab_size, dtype=torch.float64)
    state = law.hidden_cells(500)
    for is_consistent in (True, False):
        settings = UnmaskSettings(tokens_per_step=tokens_per_step, rank_consistent=is_consistent)
        done = unmask(state, law, settings, SharedNoise(0))
        scores = done.state.expression_values[:, 1:] / law.ranking_weights[done.state.input_ids[:, 1:]]
        is_rising = (scores.diff(dim=1) > 1e-5).any(dim=1)
        # Genes drawn together do not see each other.
        assert bool(is_rising.any()) != (is_consistent and tokens_per_step == 1)


def test_cells_of_counts_are_out_of_order_only_where_no_gene_fits():
    law = EnumeratedLaw(6, 4, concentration=1.0)
    weights = law.ranking_weights = torch.linspace(1, 3, law.vocab_size, dtype=torch.float64)
    law.locations = torch.full_like(law.locations, 1.3)
    state = replace(law.hidden_cells(2000), size_factors=torch.full((2000,), 0.5, dtype=torch.float64))
    done = unmask(state, law, UnmaskSettings(order="rank"), SharedNoise(0))
    ids = done.state.input_ids
    scores = done.state.expression_values / weights[ids]
    is_rising = scores[:, 2:] > scores[:, 1:-1] + 1e-5
    one_molecule = torch.full((2000, law.vocab_size), math.log1p(1 / 0.5)) / weights
    one_molecule[:, :N_SPECIAL] = torch.inf
    for place in range(2, 5):  # from left to right a gene fits if one molecule of it does
        one_molecule.scatter_(1, ids[:, place - 1 : place], torch.inf)
        has_none = one_molecule.min(dim=1).values > scores[:, place - 1] * (1 + 1e-6)
        assert torch.equal(is_rising[:, place - 2], has_none)
    assert 0.001 < is_rising.double().mean() < 0.5
    free = unmask(state, law, UnmaskSettings(order="rank", rank_consistent=False), SharedNoise(0))
    scores = free.state.expression_values[:, 1:] / weights[free.state.input_ids[:, 1:]]
    assert (scores.diff(dim=1) > 1e-5).double().mean() > 1.5 * is_rising.double().mean()


@pytest.mark.parametrize("order", ["entropy", "margin"])
def test_the_surest_slot_is_the_one_with_the_surest_gene_that_fits(order):
    law = Recording(6, 4, concentration=1.0)
    law.ranking_weights = torch.linspace(1, 3, law.vocab_size, dtype=torch.float64)
    state = partly_hidden(law, 600, most=3)
    state = state.select((state.is_masked.sum(dim=1) >= 2).nonzero().squeeze(1))
    first = {}
    for is_consistent in (True, False):
        law.asked.clear()
        settings = UnmaskSettings(order=order, tokens_per_step=1, rank_consistent=is_consistent)
        unmask(state, law, settings, SharedNoise(0))
        encoded = law.encode(state)
        bounds = RankBounds(state, N_SPECIAL, law.ranking_weights)
        doubt = torch.full(state.is_masked.shape, torch.inf, dtype=torch.float64)
        for row, place in state.is_masked.nonzero().tolist():
            where = torch.tensor([row]), torch.tensor([place])
            gene_law = encoded[row, place].clone()
            is_unfit = bounds.unfit(*where)(torch.tensor([0]))[0]
            if is_consistent and (gene_law * ~is_unfit).sum() > 0:
                gene_law[is_unfit] = 0.0
            gene_law = (gene_law / gene_law.sum()).numpy()
            best = np.sort(gene_law)
            doubt[row, place] = stats.entropy(gene_law) if order == "entropy" else best[-2] - best[-1]
        second = law.asked[1].is_masked  # those cells had two slots at least, so all are asked again
        revealed = (state.is_masked & ~second).long().argmax(dim=1)
        least = doubt.min(dim=1).values
        assert (doubt.gather(1, revealed.unsqueeze(1)).squeeze(1) <= least + 1e-9).all()
        first[is_consistent] = revealed
    assert (first[True] != first[False]).double().mean() > 0.05


def test_a_known_gene_gets_a_value_only():
    law = Recording(6, 4)
    state = partly_hidden(law, 50)
    clean = law.clean_cells().select(torch.arange(50))
    is_wanted = state.is_masked
    state = replace(state, input_ids=clean.input_ids, expression_values=clean.expression_values)
    for settings in (
        {"steps": 2},
        {"steps": 8, "remask": "random", "remask_rate": 1.0},
        {"order": "entropy"},
    ):
        done = unmask(state, law, UnmaskSettings(**settings), CellNoise(range(50)))
        assert torch.equal(done.state.input_ids, clean.input_ids)
        assert (done.gene_log_prob == 0).all()
        assert ((done.state.expression_values > 0) == is_wanted).all()
        assert torch.equal(done.n_drawn, is_wanted.sum(dim=1))
    law.asked.clear()
    mixed = replace(state, input_ids=state.input_ids.index_fill(1, torch.tensor([4]), MASK))
    mixed.is_masked[:, 4] = True
    first = UnmaskSettings(order="entropy", entropy_bound=0.0)
    unmask(mixed, law, first, CellNoise(range(50)))
    assert len(law.asked) == 1  # known genes have no entropy: they come along with the one that has
    law.asked.clear()
    unmask(mixed, law, UnmaskSettings(order="margin", tokens_per_step=1), CellNoise(range(50)))
    for asked in law.asked:  # what is known is sure: it comes before the gene that is not
        is_known = asked.is_masked & (asked.input_ids != MASK)
        assert ((asked.input_ids == MASK).any(dim=1) | ~is_known.any(dim=1)).all()


@pytest.mark.parametrize("order", ["rank", "entropy"])
def test_given_targets_are_taken_cell_by_cell(order):
    law = EnumeratedLaw(6, 4, concentration=1.0)
    hidden = partly_hidden(law, 60)
    chosen = torch.multinomial(law.probabilities, 60, generator=torch.Generator().manual_seed(0))
    wanted = law.clean_cells().select(chosen)
    counts = torch.randint(1, 30, wanted.input_ids.shape, generator=torch.Generator().manual_seed(1))
    values = values_from_counts(counts, hidden.size_factors.unsqueeze(1)).float()
    targets = replace(wanted, expression_values=values)
    is_masked = hidden.is_masked
    state = replace(
        hidden,
        input_ids=wanted.input_ids.masked_fill(is_masked, MASK),
        expression_values=values.masked_fill(is_masked, 0.0),
    )
    done = unmask(state, law, UnmaskSettings(order=order), SharedNoise(0), targets=targets)
    assert torch.equal(done.state.input_ids, targets.input_ids)
    assert torch.equal(done.state.expression_values, targets.expression_values)
    fits = (state.input_ids.unsqueeze(1) == MASK) | (
        state.input_ids.unsqueeze(1) == law.clean_cells().input_ids
    )
    given = (fits.all(dim=2) * law.probabilities).sum(dim=1)  # probability of what is visible
    expected = law.probabilities[chosen].log() - given.log()
    torch.testing.assert_close(done.gene_log_prob, expected, rtol=0, atol=1e-10)  # one at a time in 64 steps
    ids = targets.input_ids
    nats = count_log_prob(
        counts, hidden.size_factors.unsqueeze(1), law.locations[ids], law.scales[ids]
    ).masked_fill(~is_masked, 0.0)
    torch.testing.assert_close(done.value_log_prob, nats.sum(dim=1), rtol=1e-6, atol=1e-6)


# Steering, and states.


def test_steering_lets_cells_go_on_as_copies():
    law = EnumeratedLaw(6, 4)
    state, finished = law.hidden_cells(40), law.clean_cells()
    state.input_ids[:8] = finished.input_ids[:8]
    state.is_masked[:8] = False
    calls = []

    def steer(now, encoded, rows):
        calls.append((now.input_ids.clone(), rows.tolist(), tuple(encoded.shape)))
        parents = torch.arange(len(rows))
        return parents if len(calls) != 3 else parents // 4 * 4

    settings = UnmaskSettings(steps=4)
    done = unmask(state, law, settings, SharedNoise(0), steer=steer)
    assert torch.equal(done.state.input_ids[:8], finished.input_ids[:8])
    assert [rows for _, rows, _ in calls] == [list(range(8, 40))] * 4
    assert all(shape == (32, 5, law.vocab_size) for _, _, shape in calls)
    parents = calls[2][0][torch.arange(32) // 4 * 4]
    assert not torch.equal(parents, calls[2][0])
    assert ((calls[3][0] == parents) | (parents == MASK)).all()
    # Copies take their probability along; calls are counted where they were made.
    index = law.index_of(done.state.input_ids)[8:]
    torch.testing.assert_close(done.gene_log_prob[8:], law.probabilities.log()[index], rtol=0, atol=1e-10)
    assert done.n_drawn.tolist() == done.n_network_calls.tolist() == [0] * 8 + [4] * 32
    plain = unmask(state, law, settings, SharedNoise(0))
    same = unmask(state, law, settings, SharedNoise(0), steer=lambda _, __, rows: torch.arange(len(rows)))
    assert torch.equal(same.state.input_ids, plain.state.input_ids)
    assert not torch.equal(done.state.input_ids, plain.state.input_ids)


def test_excluded_genes_by_hand():
    law = EnumeratedLaw(4, 3)
    ids = torch.tensor([[LAT, 5, MASK, 8, 6], [LAT, 7, 6, MASK, PAD]])
    is_attended = torch.tensor([[True] * 4 + [False]] * 2)
    is_masked = torch.tensor([[False, False, True, True, False], [False, False, False, True, False]])
    state = CellState(ids, torch.zeros(2, 5), is_attended, is_masked)
    # Gene 8 is known though its value is hidden; gene 6 of the first cell stands at padding.
    assert excluded_genes(state, law)[:, 5:].tolist() == [
        [True, False, False, True],
        [False, True, True, False],
    ]
    assert not excluded_genes(state, law)[:, :5].any()


def test_states_are_selected_with_all_their_parts():
    state = replace(partly_hidden(EnumeratedLaw(5, 3), 6), cell_index=torch.arange(6))
    rows = torch.tensor([4, 0, 4])
    chosen = state.select(rows)
    for field in fields(state):
        part = getattr(state, field.name)
        if part is None:
            assert getattr(chosen, field.name) is None
        else:
            assert torch.equal(getattr(chosen, field.name), part[rows])
