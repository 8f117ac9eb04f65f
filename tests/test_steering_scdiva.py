"""Steering: a classifier's pull against finite differences, particles against laws that can be listed.

Run: pytest tests/test_steering_scdiva.py
"""

from dataclasses import replace

import pytest
import torch

from modeling_scdiva import ScDivaConfig, ScDivaForSequenceClassification
from modeling_scdiva.denoiser_scdiva import ScDivaDenoiser
from modeling_scdiva.enumerated_law import EnumeratedLaw
from modeling_scdiva.sampling_scdiva import CellNoise
from modeling_scdiva.steering_scdiva import Steering, _ParticleFilter
from modeling_scdiva.unmask_scdiva import CellState, UnmaskSettings

MASK = 1
ONE_BY_ONE = UnmaskSettings(tokens_per_step=1, rank_consistent=False)


@pytest.fixture(scope="module")
def classifier(small_network):
    torch.manual_seed(3)
    fields = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
              "initializer_range")  # fmt: skip
    network = {name: getattr(small_network().config, name) for name in fields}
    return ScDivaForSequenceClassification(ScDivaConfig(**network, num_labels=3, hidden_dropout=0.3)).eval()


@pytest.fixture
def state(small_cells):
    """Three cells with every second gene hidden."""
    cells = small_cells((9, 7, 3))
    is_masked = (cells["input_ids"] >= 5) & (torch.arange(10) % 2 == 1)
    return CellState(
        cells["input_ids"].masked_fill(is_masked, MASK),
        cells["expression_values"].masked_fill(is_masked, 0.0),
        cells["attention_mask"].bool(),
        is_masked,
        cell_index=torch.tensor([2, 0, 1]),
    )


def log_odds(classifier, state, embeds=None):
    with torch.no_grad():
        return classifier(
            state.input_ids, state.expression_values, state.attention_mask.long(), state.is_masked,
            inputs_embeds=embeds,
        ).logits.log_softmax(dim=1)  # fmt: skip


def test_the_pull_is_the_slope_of_the_classifier(classifier, state):
    """Central differences: the embedding of `<mask>` moves a little way to that of a gene."""
    double = classifier.double()
    labels = torch.tensor([0, 2, 1])
    bias = Steering(classifier=double, labels=labels, classifier_scale=1.7).gene_bias(state)
    cells, places = state.is_masked.nonzero(as_tuple=True)
    pull = bias(cells, places)
    table = double.get_input_embeddings().weight.detach()
    embeds, step = table[state.input_ids], 1e-5
    wanted = labels[state.cell_index]  # of the cells in sight
    for slot, (cell, place) in enumerate(zip(cells.tolist(), places.tolist(), strict=True)):
        for gene in (5, 17, 34):
            moved = []
            for sign in (1, -1):
                there = embeds.clone()
                there[cell, place] += sign * step * (table[gene] - table[MASK])
                moved.append(log_odds(double, state, there)[cell, wanted[cell]])
            slope = float(moved[0] - moved[1]) / (2 * step)
            assert float(pull[slot, gene]) == pytest.approx(1.7 * slope, rel=1e-3, abs=1e-4)
    assert pull.dtype == torch.float32
    assert pull.abs().max() > 0.05
    classifier.float()


def test_steering_says_what_it_is(classifier):
    classifier.config.id2label = {0: "B", 1: "T", 2: "NK"}
    steering = Steering(classifier=classifier, labels=torch.tensor([2, 0, 2]), classifier_scale=1.5)
    assert steering.describe() == {"kind": "classifier", "classifier_scale": 1.5, "labels": ["B", "NK"]}
    steering = Steering(reward=lambda *_: torch.zeros(1), n_particles=4, resample="end")
    assert steering.describe() == {
        "kind": "reward",
        "reward": "<lambda>",
        "n_particles": 4,
        "resample": "end",
    }


def test_small_steps_of_the_embedding_do_what_the_pull_says(classifier, state):
    """Real genes, first order: with an embedding table shrunk to a point the prediction becomes exact."""
    small = ScDivaForSequenceClassification(classifier.config).eval()
    small.load_state_dict(classifier.state_dict())
    with torch.no_grad():
        small.model.embed_tokens.weight.mul_(1e-2)
    labels = torch.tensor([1, 1, 0])
    bias = Steering(classifier=small, labels=labels).gene_bias(state)
    before = log_odds(small, state)
    for gene in (9, 21, 30):
        revealed = state.input_ids.clone()
        revealed[:, 1] = gene
        table = small.get_input_embeddings().weight
        change = log_odds(small, state, table[revealed]) - before
        wanted = change.gather(1, labels[state.cell_index].unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(
            bias(torch.arange(3), torch.ones(3, dtype=torch.long))[:, gene], wanted, atol=2e-3, rtol=0.1
        )


def test_the_pull_is_added_to_the_gene_logits(small_network, classifier, state):
    model, labels = small_network(), torch.tensor([0, 1, 2])
    cells, places = state.is_masked.nonzero(as_tuple=True)
    logits = []
    for steering in (None, Steering(classifier=classifier, labels=labels, classifier_scale=3.0)):
        denoiser = ScDivaDenoiser(model, gene_bias=None if steering is None else steering.gene_bias)
        with torch.no_grad():
            logits.append(denoiser.gene_logits(denoiser.encode(state), cells, places)[:, 5:])
    bias = steering.gene_bias(state)(cells, places)[:, 5:]
    torch.testing.assert_close(logits[1] - logits[0], bias, atol=1e-4, rtol=1e-4)
    assert all(parameter.grad is None for parameter in classifier.parameters())


def test_classifier_guidance_finds_its_class(small_network, classifier):
    model, labels = small_network(), torch.arange(24) % 3
    asked = {"n_cells": 24, "n_genes": 8, "tokens_per_step": 1}

    def hits(scale):
        steering = Steering(classifier=classifier, labels=labels, classifier_scale=scale)
        made = model.generate(**asked, steering=steering)
        with torch.no_grad():
            nats = classifier(made.input_ids, made.expression_values).logits.log_softmax(dim=1)
        return made, float(nats.gather(1, labels.unsqueeze(1)).mean())

    free = model.generate(**asked)
    still, nats = hits(0.0)
    for name in ("input_ids", "expression_values", "gene_log_prob"):
        assert torch.equal(still[name], free[name])
    assert hits(4.0)[1] > nats + 0.3
    assert hits(-4.0)[1] < nats - 0.3


def test_labels_belong_to_cells_in_any_batches(small_network, classifier):
    model, lengths = small_network(), torch.tensor([3, 9, 6, 5, 8])
    steering = Steering(classifier=classifier, labels=torch.tensor([0, 1, 2, 1, 0]), classifier_scale=5.0)
    made = [model.generate(n_genes=lengths, steering=steering, batch_size=n) for n in (1, 2, 32)]
    assert all(torch.equal(made[0].input_ids, other.input_ids) for other in made[1:])
    other = Steering(classifier=classifier, labels=torch.tensor([2, 1, 2, 1, 0]), classifier_scale=5.0)
    changed = model.generate(n_genes=lengths, steering=other).input_ids != made[0].input_ids
    assert changed.any(dim=1).tolist() == [True, False, False, False, False]


def test_a_classifier_in_training_mode_is_as_good_and_stays_in_it(small_network, classifier):
    model = small_network()
    steering = Steering(classifier=classifier, labels=torch.tensor([0, 1]), classifier_scale=5.0)
    made = model.generate(n_cells=2, n_genes=7, steering=steering)
    classifier.train()
    state = torch.get_rng_state()
    again = model.generate(n_cells=2, n_genes=7, steering=steering)
    assert torch.equal(torch.get_rng_state(), state)
    assert classifier.training
    assert torch.equal(again.input_ids, made.input_ids)
    classifier.eval()


# Particles.


def enumerated_reward(ids, values, mask):
    """Likes gene 6 anywhere and gene 7 first, dislikes gene 9 last."""
    return 1.5 * (ids == 6).any(dim=1) + 1.0 * (ids[:, 1] == 7) - 0.8 * (ids[:, 3] == 9)


def share_of_cells(law, input_ids):
    return torch.bincount(law.index_of(input_ids), minlength=len(law.cells)).double() / len(input_ids)


def test_particles_follow_the_tilted_law():
    """Drawn one gene at a time, cells come as p(cell) * exp(reward) / Z, the closer the more particles."""
    law, n_cells = EnumeratedLaw(n_genes=5, n_slots=3, seed=1, concentration=1.0), 2000
    rewards = enumerated_reward(law.clean_cells().input_ids, None, None).double()
    tilted = law.probabilities * rewards.exp()
    tilted /= tilted.sum()
    distance = {1: 0.5 * float((law.probabilities - tilted).abs().sum())}
    for n_particles in (2, 4, 32):
        steering = Steering(reward=enumerated_reward, n_particles=n_particles)
        done = steering.run(law.hidden_cells(n_cells), law, ONE_BY_ONE, torch.arange(n_cells) * 1000)
        share = share_of_cells(law, done.state.input_ids)
        distance[n_particles] = 0.5 * float((share - tilted).abs().sum())
    assert distance[1] > distance[2] > distance[4] > distance[32]
    # What a perfect sampler would be away by: half the mean absolute deviations of the counts.
    noise = 0.5 * float((2 * tilted * (1 - tilted) / (torch.pi * n_cells)).sqrt().sum())
    assert distance[32] < 1.4 * noise
    assert distance[2] > 3 * noise


def test_the_best_of_the_finished_is_taken():
    law, n_cells, n_particles = EnumeratedLaw(n_genes=5, n_slots=3, seed=1, concentration=1.0), 1500, 3
    asked = []

    def reward(ids, values, mask):
        asked.append(enumerated_reward(ids, values, mask))
        return asked[-1]

    steering = Steering(reward=reward, n_particles=n_particles, resample="end")
    done = steering.run(law.hidden_cells(n_cells), law, ONE_BY_ONE, torch.arange(n_cells) * 1000)
    assert len(asked) == 1  # only the finished
    chosen = enumerated_reward(done.state.input_ids, None, None)
    torch.testing.assert_close(chosen, asked[0].view(n_cells, n_particles).max(dim=1).values)
    # Particles are independent draws: P(best <= x) = P(one <= x)^3.
    rewards = enumerated_reward(law.clean_cells().input_ids, None, None)
    for level in (-0.5, 0.5, 1.2, 1.6):
        expected = float(law.probabilities[rewards <= level].sum()) ** n_particles
        error = (expected * (1 - expected) / n_cells) ** 0.5
        assert abs(float((chosen <= level).double().mean()) - expected) < 4 * error + 1e-9
    assert (done.n_network_calls == 3 * n_particles).all()


def test_weights_and_parents_by_hand():
    """Three cells of four particles: even weights go on, uneven ones are drawn anew, absent ones wait."""
    law = EnumeratedLaw(n_genes=5, n_slots=3)
    rewards = torch.tensor([0.5, 0.5, 0.5, 0.5, 9.0, 0.0, 0.0, 0.0, 9.0, 0.0, 0.0, 7.0])
    steering = Steering(reward=lambda ids, values, mask: rewards[: len(ids)], n_particles=4)
    particles = _ParticleFilter(steering, law, CellNoise([1, 2, 3]), 3)
    state = law.hidden_cells(11)  # the last particle of the last cell has no slot in this step
    parents = particles(state, law.encode(state), torch.arange(11))
    assert parents.tolist() == [0, 1, 2, 3, 4, 4, 4, 4, 8, 9, 10]
    assert particles.log_weights.tolist() == [[0.5] * 4, [0.0] * 4, [9.0, 0.0, 0.0, 0.0]]
    assert particles.potentials.tolist() == [[0.5] * 4, [9.0] * 4, [9.0, 0.0, 0.0, 0.0]]
    # The next look: only what has changed since counts.
    rewards = torch.tensor([0.5, 0.5, 0.5, 0.5, 9.0, 9.0, 9.0, 9.0])
    parents = particles(law.hidden_cells(8), law.encode(law.hidden_cells(8)), torch.arange(8))
    assert parents.tolist() == list(range(8))
    assert particles.log_weights[:2].tolist() == [[0.5] * 4, [0.0] * 4]


def test_cells_never_mix_and_need_no_company():
    """Cells of different lengths with a gene of their own; alone each comes out as among the others."""
    law = EnumeratedLaw(n_genes=7, n_slots=4, seed=2, concentration=1.0)
    n_cells, seeds = 30, torch.arange(30) * 1000
    ids = law.hidden_cells(n_cells).input_ids
    ids[:, 1] = 5 + torch.arange(n_cells) % 7
    ids[::2, 2] = 5 + (torch.arange(0, n_cells, 2) + 1) % 7
    ids[::3, 4] = 5 + (torch.arange(0, n_cells, 3) + 2) % 7
    state = replace(law.hidden_cells(n_cells), input_ids=ids, is_masked=ids == MASK)
    steering = Steering(reward=lambda ids, values, mask: 3.0 * (ids == 6).any(dim=1), n_particles=4)
    together = steering.run(state, law, ONE_BY_ONE, seeds)
    assert torch.equal(together.state.input_ids[ids != MASK], ids[ids != MASK])
    for cell in range(n_cells):
        rows = torch.tensor([cell])
        alone = steering.run(state.select(rows), law, ONE_BY_ONE, seeds[rows])
        assert torch.equal(alone.state.input_ids[0], together.state.input_ids[cell])
        assert alone.n_network_calls == together.n_network_calls[cell] == 4 * (ids[cell] == MASK).sum()


@pytest.mark.parametrize("resample", ["steps", "end"])
def test_particles_through_generate(small_network, resample):
    model = small_network()

    def reward(ids, values, mask):
        return 4.0 * (ids == 11).any(dim=1) + (values * mask).sum(dim=1) / 100

    lengths = torch.tensor([6, 9, 3, 6, 8] * 4)
    asked = {"n_genes": lengths, "tokens_per_step": 1, "size_factors": 0.05}
    steering = Steering(reward=reward, n_particles=4, resample=resample)
    made = model.generate(**asked, steering=steering)
    assert torch.equal(made.n_network_calls, 4 * lengths)
    free = model.generate(**asked)
    n_liked = [int((cells.input_ids == 11).any(dim=1).sum()) for cells in (free, made)]
    assert n_liked[1] >= n_liked[0] + 4
    state = torch.get_rng_state()
    for batch_size in (1, 2):
        again = model.generate(**asked, steering=steering, batch_size=batch_size)
        assert torch.equal(again.input_ids, made.input_ids)
        torch.testing.assert_close(again.expression_values, made.expression_values)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(model.generate(**asked, steering=steering, seed=1).input_ids, made.input_ids)


def test_a_reward_that_is_the_same_everywhere_is_no_steering():
    law, n_cells = EnumeratedLaw(n_genes=4, n_slots=3, seed=5, concentration=1.0), 3000
    steering = Steering(reward=lambda ids, values, mask: torch.full((len(ids),), 2.0), n_particles=2)
    done = steering.run(law.hidden_cells(n_cells), law, ONE_BY_ONE, torch.arange(n_cells) * 1000)
    expected = n_cells * law.probabilities
    seen = n_cells * share_of_cells(law, done.state.input_ids)
    chi_square = float(((seen - expected) ** 2 / expected.clamp(min=1e-9)).sum())
    assert chi_square < len(expected) + 4 * (2 * len(expected)) ** 0.5


def test_forbidden_cells_are_never_chosen():
    law = EnumeratedLaw(n_genes=4, n_slots=2, seed=5, concentration=5.0)
    steering = Steering(
        reward=lambda ids, values, mask: torch.where(ids[:, 1] == 5, -torch.inf, 0.0), n_particles=12
    )
    done = steering.run(law.hidden_cells(100), law, ONE_BY_ONE, torch.arange(100) * 1000)
    assert (done.state.input_ids[:, 1] != 5).all()


# Refusals.


def test_misuse_is_refused(classifier):
    labels, reward = torch.zeros(2, dtype=torch.long), enumerated_reward
    for arguments, message in (
        ({}, "a classifier with labels, or a reward with n_particles: one of the two"),
        ({"classifier": classifier, "labels": labels, "reward": reward}, "one of the two"),
        ({"classifier": classifier}, "Classifier guidance needs labels, one per cell, and has no particles"),
        ({"classifier": classifier, "labels": labels, "n_particles": 4}, "and has no particles"),
        ({"reward": reward}, "n_particles must be at least 2, got 1"),
        ({"reward": reward, "n_particles": 0}, "n_particles must be at least 2, got 0"),
        ({"reward": reward, "n_particles": 4, "resample": "often"}, '"steps" or "end", got \'often\''),
    ):
        with pytest.raises(ValueError, match=message):
            Steering(**arguments)


def test_labels_and_vocabularies_that_do_not_fit_are_refused(small_network, classifier):
    model = small_network()
    for labels, message in (
        ([0, 1], r"labels must be 3 classes in 0 .. 2, one per cell, got shape \(2,\)"),
        ([0, 1, 2, 0], r"one per cell, got shape \(4,\)"),
        ([0, 1, 3], r"got shape \(3,\) and \[0, 1, 3\]"),
        ([0, -1, 2], "labels must be 3 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(
                n_cells=3, n_genes=4, steering=Steering(classifier=classifier, labels=torch.tensor(labels))
            )
    for changes in ({"vocab_size": 36}, {"vocabulary_hash": "b" * 64}):
        other = small_network(value_head="scalar", **({"vocabulary_hash": "a" * 64} | changes))
        judge = ScDivaForSequenceClassification(
            ScDivaConfig(**(classifier.config.to_diff_dict() | {"vocabulary_hash": "a" * 64}))
        )
        with pytest.raises(ValueError, match="the same token would be another gene"):
            other.generate(
                n_cells=1, n_genes=4, canonicalize=False, rank_consistent=False,
                steering=Steering(classifier=judge, labels=torch.tensor([0])),
            )  # fmt: skip


@pytest.mark.parametrize(
    ("reward", "found"),
    [
        (lambda ids, values, mask: torch.zeros(len(ids), 1), r"shape \(4, 1\)"),
        (lambda ids, values, mask: torch.zeros(len(ids) // 2), r"shape \(2,\)"),
        (lambda ids, values, mask: 1.0, r"shape \(\)"),
        (lambda ids, values, mask: torch.full((len(ids),), torch.nan), "not NaN or inf"),
        (lambda ids, values, mask: torch.full((len(ids),), torch.inf), "not NaN or inf"),
    ],
)
@pytest.mark.parametrize("resample", ["steps", "end"])
def test_rewards_that_cannot_be_are_refused(small_network, reward, found, resample):
    steering = Steering(reward=reward, n_particles=2, resample=resample)
    with pytest.raises(ValueError, match=rf"The reward must be one number per cell, \(4,\).*{found}"):
        small_network().generate(n_cells=2, n_genes=3, steering=steering)
