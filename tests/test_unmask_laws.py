"""Tests of the law of generated cells: each sampler against its own law, enumerated.

Scope: `unmask_scdiva.unmask` on cells few enough to list, with a denoiser that knows their law. One gene per
step gives that law; two per step, an entropy bound and genes hidden again give laws of their own.
Run: pytest tests/test_unmask_laws.py
"""

import itertools
import math
from functools import cache

import numpy as np
import pytest
import torch
from scipy import stats

from modeling_scdiva.enumerated_law import MASK, N_SPECIAL, EnumeratedLaw, RecordingLaw, SharedNoise
from modeling_scdiva.sampling_scdiva import ORDERS, hidden_after
from modeling_scdiva.unmask_scdiva import UnmaskSettings, unmask

N_DRAWS = 200_000


def p_value(drawn, probabilities):
    """Chi-square of drawn indices against probabilities; what is too rare is counted together."""
    drawn = torch.as_tensor(drawn)
    observed = np.bincount(drawn.numpy(), minlength=len(probabilities)).astype(float)
    expected = np.asarray(probabilities) * len(drawn)
    assert expected.sum() == pytest.approx(len(drawn), rel=1e-9)
    assert observed[expected == 0].sum() == 0
    is_common = expected >= 5
    observed, expected = (np.append(part[is_common], part[~is_common].sum()) for part in (observed, expected))
    if expected[-1] < 5:
        observed, expected = (np.append(part[1:-1], part[0] + part[-1]) for part in (observed, expected))
    return stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue


def total_variation(first, second):
    return 0.5 * float(np.abs(np.asarray(first) - np.asarray(second)).sum())


class ByHand:
    """The law of a sampler, by enumeration from the list of cells alone."""

    def __init__(self, law):
        self.cells = law.cells.numpy() - N_SPECIAL
        self.probabilities = law.probabilities.numpy()
        self.n_slots = law.n_slots
        self.places = {tuple(cell): place for place, cell in enumerate(self.cells.tolist())}
        self.table = cache(self._table)

    def _table(self, shown):
        """(L, genes) law of every slot, given what is shown; None is hidden."""
        slots = [slot for slot, gene in enumerate(shown) if gene is not None]
        fits = (self.cells[:, slots] == np.array([shown[slot] for slot in slots], dtype=int)).all(axis=1)
        table = np.zeros((self.n_slots, self.cells.max() + 1))
        for slot in range(self.n_slots):
            np.add.at(table[slot], self.cells[fits, slot], self.probabilities[fits])
        return table / self.probabilities[fits].sum()

    def revealed(self, shown, slots, weight=1.0):
        """[(probability, what is shown then)] after drawing slots in turn from one look at the cell."""
        ways = [(weight, shown)]
        for slot in slots:
            longer = []
            for probability, now in ways:
                left = self.table(shown)[slot].copy()
                left[[gene for gene in now if gene is not None]] = 0.0
                for gene in left.nonzero()[0].tolist():
                    then = (*now[:slot], gene, *now[slot + 1 :])
                    longer.append((probability * left[gene] / left.sum(), then))
            ways = longer
        return ways

    def law(self, choose):
        """(M,) probability of each cell; ``choose`` gives [(probability, slots in turn)] of a step."""

        @cache
        def finished(shown):
            hidden = [slot for slot, gene in enumerate(shown) if gene is None]
            total = np.zeros(len(self.cells))
            if not hidden:
                total[self.places[shown]] = 1.0
                return total
            for weight, slots in choose(self.table(shown), hidden):
                for probability, now in self.revealed(shown, slots, weight):
                    total += probability * finished(now)
            return total

        return finished((None,) * self.n_slots)

    def remasked_laws(self, n_steps, rate):
        """[{what is shown: probability}] after each step of random re-masking with the linear schedule."""
        laws = [{(None,) * self.n_slots: 1.0}]
        for step in range(1, n_steps + 1):
            n_left = math.floor(self.n_slots * (n_steps - step) / n_steps + 0.5)
            after = {}
            for shown, weight in laws[-1].items():
                hidden = [slot for slot, gene in enumerate(shown) if gene is None]
                visible = [slot for slot, gene in enumerate(shown) if gene is not None]
                expected = min(rate * len(visible), n_left)
                for n_again in (math.floor(expected), math.floor(expected) + 1):
                    chance = weight * (1.0 - abs(expected - n_again))
                    if chance == 0:
                        continue
                    turns = list(itertools.permutations(hidden, len(hidden) - n_left + n_again))
                    again = list(itertools.combinations(visible, n_again))
                    for slots, lost in itertools.product(turns, again):
                        for probability, now in self.revealed(shown, slots, chance / len(turns) / len(again)):
                            then = tuple(None if slot in lost else gene for slot, gene in enumerate(now))
                            after[then] = after.get(then, 0.0) + probability
            laws.append(after)
        return laws


def entropies(table, hidden):
    return stats.entropy(table[hidden], axis=1)


def margins(table, hidden):
    rising = np.sort(table[hidden], axis=1)
    return rising[:, -1] - rising[:, -2]


def random_slots(n_together):
    def choose(table, hidden):
        ways = list(itertools.permutations(hidden, min(n_together, len(hidden))))
        return [(1.0 / len(ways), slots) for slots in ways]

    return choose


def surest_slots(n_together, doubt=entropies):
    return lambda table, hidden: [(1.0, np.array(hidden)[doubt(table, hidden).argsort()][:n_together])]


def bounded_slots(bound):
    def choose(table, hidden):
        rising = np.sort(entropies(table, hidden))
        n_together = 1 + int((rising.cumsum()[:-1] <= bound).sum())
        return surest_slots(n_together)(table, hidden)

    return choose


def drawn_cells(law, n_draws=N_DRAWS, seed=0, **settings):
    noise = SharedNoise(seed, settings.pop("coins", None))
    done = unmask(law.hidden_cells(n_draws), law, UnmaskSettings(**settings), noise)
    assert not done.state.is_masked.any()
    return law.index_of(done.state.input_ids), done  # refuses a gene that comes twice


# The law of the cells.


@pytest.mark.parametrize("order", ORDERS)
def test_one_gene_per_step_gives_the_law(order):
    law = EnumeratedLaw(5, 3)
    index, done = drawn_cells(law, steps=3, order=order)
    assert p_value(index, law.probabilities) > 0.001
    torch.testing.assert_close(done.gene_log_prob, law.probabilities.log()[index], rtol=0, atol=1e-10)
    assert (done.n_network_calls == 3).all()
    assert (done.n_drawn == 3).all()


@pytest.mark.parametrize(
    ("order", "choose"),
    [
        ("random", random_slots(2)),
        ("rank", surest_slots(2, lambda table, hidden: np.array(hidden))),
        ("margin", surest_slots(2, lambda table, hidden: -margins(table, hidden))),
        ("entropy", surest_slots(2)),
    ],
    ids=ORDERS,
)
def test_two_genes_per_step_give_the_law_of_that_sampler(order, choose):
    law = EnumeratedLaw(6, 4)
    by_hand = ByHand(law)
    np.testing.assert_allclose(by_hand.law(random_slots(1)), law.probabilities, atol=1e-12)
    sampler = by_hand.law(choose)
    assert sampler.sum() == pytest.approx(1.0, abs=1e-12)
    distance = total_variation(sampler, law.probabilities)
    assert distance > 0.1, f"total variation {distance:.3f}"
    index, done = drawn_cells(law, order=order, tokens_per_step=2)
    assert p_value(index, sampler) > 0.001
    assert p_value(index, law.probabilities) < 1e-100
    shares = np.bincount(index, minlength=len(sampler)) / N_DRAWS
    assert total_variation(shares, law.probabilities) == pytest.approx(distance, abs=0.02)
    assert (done.n_network_calls == 2).all()
    if order != "random":  # one way to each cell, so the path has the probability of the cell
        np.testing.assert_allclose(done.gene_log_prob, np.log(sampler)[index], rtol=0, atol=1e-9)


@pytest.mark.parametrize("bound", [0.0, 1.0, 100.0])
def test_an_entropy_bound_gives_the_law_of_that_sampler(bound):
    law = EnumeratedLaw(5, 3)
    sampler = ByHand(law).law(bounded_slots(bound))
    index, done = drawn_cells(law, n_draws=100_000, order="entropy", entropy_bound=bound)
    assert p_value(index, sampler) > 0.001
    np.testing.assert_allclose(done.gene_log_prob, np.log(sampler)[index], rtol=0, atol=1e-9)
    distance = total_variation(sampler, law.probabilities)
    if bound == 0.0:
        assert distance < 1e-12
    else:
        assert distance > 0.02, f"total variation {distance:.3f}"
    if bound == 100.0:
        assert (done.n_network_calls == 1).all()


def test_a_larger_entropy_bound_takes_fewer_calls():
    law = EnumeratedLaw(6, 4)
    calls = [
        drawn_cells(law, 2000, order="entropy", entropy_bound=bound)[1].n_network_calls.double().mean()
        for bound in (0.0, 0.5, 1.0, 1.5, 3.0)
    ]
    assert calls == sorted(calls, reverse=True)
    assert calls[0] > 3.9
    assert calls[-1] < 2.5


def test_what_is_certain_is_drawn_at_once():
    law = EnumeratedLaw(6, 4)
    law.probabilities = torch.zeros(360, dtype=torch.float64).index_fill(0, torch.tensor([123]), 1.0)
    index, done = drawn_cells(law, 5, order="entropy", entropy_bound=0.0)
    assert index.tolist() == [123] * 5
    assert done.n_network_calls.tolist() == [1] * 5
    assert done.gene_log_prob.tolist() == [0.0] * 5


@pytest.mark.parametrize(
    ("settings", "power", "kept"), [({"temperature": 0.5}, 2.0, 6), ({"top_p": 0.5}, 1.0, None)]
)
def test_temperature_and_nucleus_shape_the_law(settings, power, kept):
    law = EnumeratedLaw(6, 1, concentration=1.0)
    probabilities = law.probabilities.numpy()
    falling = np.sort(probabilities)[::-1]
    kept = kept or 1 + int((falling.cumsum() < 0.5).sum())
    shaped = np.where(probabilities >= falling[kept - 1], probabilities, 0.0) ** power
    shaped /= shaped.sum()
    index, done = drawn_cells(law, 50_000, **settings)
    assert p_value(index, shaped) > 0.001
    np.testing.assert_allclose(done.gene_log_prob.exp(), shaped[index])


# Genes that are hidden again.


@pytest.mark.parametrize("rate", [0.2, 0.7, 1.0])
def test_remasking_pairs_of_genes_keeps_the_law(rate):
    """With two slots no step reveals both: whatever is hidden again, each step draws from a single law."""
    law = EnumeratedLaw(6, 2)
    index, done = drawn_cells(law, 100_000, steps=9, remask="random", remask_rate=rate)
    assert p_value(index, law.probabilities) > 0.001
    # Slots are revealed at steps 3 and 7; the three steps between hide the shown one again at this rate.
    assert done.n_drawn.double().mean() == pytest.approx(2 + 3 * rate, abs=0.02)
    assert torch.equal(done.n_drawn, done.n_network_calls)


def test_a_step_that_hides_as_many_as_it_reveals_leaves_the_law_of_masked_cells():
    """Steps that the schedule leaves idle exchange one gene; the others hide none."""
    law = RecordingLaw(5, 3)
    n_steps = 12
    left = [
        int(hidden_after(torch.tensor(3), step, n_steps=n_steps, schedule="linear")) for step in range(13)
    ]
    coins = [0.0 if before > after else 1.0 - 1e-12 for before, after in itertools.pairwise(left)]
    index, done = drawn_cells(law, 100_000, steps=n_steps, remask="random", remask_rate=0.4, coins=coins)
    assert p_value(index, law.probabilities) > 0.001
    n_exchanges = sum(
        coin > 0 and after < 3 and after > 0 for coin, after in zip(coins, left[1:], strict=True)
    )
    assert n_exchanges >= 5
    assert (done.n_drawn == 3 + n_exchanges).all()
    powers = law.vocab_size ** torch.arange(3)
    for state in law.asked[3 : 3 + n_exchanges]:
        n_hidden = int(state.is_masked[0].sum())
        assert (state.is_masked.sum(dim=1) == n_hidden).all()
        shown = {}
        for cell, probability in zip(law.cells, law.probabilities.tolist(), strict=True):
            for slots in itertools.combinations(range(3), n_hidden):
                key = int((cell.index_fill(0, torch.tensor(slots), MASK) * powers).sum())
                shown[key] = shown.get(key, 0.0) + probability / math.comb(3, n_hidden)
        keys = torch.tensor(sorted(shown))
        found = torch.searchsorted(keys, (state.input_ids[:, 1:] * powers).sum(dim=1))
        assert p_value(found, [shown[key] for key in keys.tolist()]) > 0.001


def test_remasking_at_any_rate_gives_the_law_of_that_sampler():
    """A step that reveals two genes, one for the schedule and one for what is hidden again, is not exact."""
    law = EnumeratedLaw(4, 3, concentration=1.0)
    by_hand = ByHand(law)
    laws = by_hand.remasked_laws(n_steps=5, rate=0.8)
    assert sum(laws[3].values()) == pytest.approx(1.0)
    sampler = np.zeros(len(law.cells))
    for cell, probability in laws[-1].items():
        sampler[by_hand.places[cell]] = probability
    distance = total_variation(sampler, law.probabilities)
    assert distance > 0.01, f"total variation {distance:.3f}"
    index, _ = drawn_cells(law, steps=5, remask="random", remask_rate=0.8)
    assert p_value(index, sampler) > 0.001
    assert p_value(index, law.probabilities) < 0.001
