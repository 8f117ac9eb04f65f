"""The network as the reverse process sees it: laws of slots by hand, and classifier-free guidance.

Run: pytest tests/test_denoiser_scdiva.py
"""

import itertools
from dataclasses import replace

import pytest
import torch

from modeling_scdiva.denoiser_scdiva import ScDivaDenoiser
from modeling_scdiva.sampling_scdiva import gene_log_law
from modeling_scdiva.unmask_scdiva import CellState, excluded_genes

MASK = 1
CONDITIONS = {"cell_type": ["B", "T", "NK"], "library_size": [300.0, 600.0]}
GIVEN = torch.tensor([[1, 2], [3, 0], [2, 1]])
SCALES = [0.0, 0.5, 2.0, 5.0]


@pytest.fixture(scope="module")
def conditional(small_network):
    return small_network(conditions=CONDITIONS)


@pytest.fixture
def state(small_cells):
    """Three cells with every second gene hidden."""
    cells = small_cells()
    is_masked = (cells["input_ids"] >= 5) & (torch.arange(13) % 2 == 1)
    return CellState(
        cells["input_ids"].masked_fill(is_masked, MASK),
        cells["expression_values"].masked_fill(is_masked, 0.0),
        cells["attention_mask"].bool(),
        is_masked,
        condition_ids=GIVEN,
    )


def slots_of(state):
    return state.is_masked.nonzero(as_tuple=True)


def forward(model, state, condition_ids):
    """All logits and laws of values from `forward` and the heads, without the denoiser."""
    with torch.no_grad():
        return model(
            state.input_ids,
            state.expression_values,
            state.attention_mask.long(),
            state.is_masked,
            condition_ids=condition_ids,
            output_all_logits=True,
        )


def law_of(model, state, scale):
    """(n, V) gene laws of the slots, as they are drawn from."""
    denoiser = ScDivaDenoiser(model, guidance_scale=scale)
    cells, places = slots_of(state)
    with torch.no_grad():
        logits = denoiser.gene_logits(denoiser.encode(state), cells, places)
    return gene_log_law(logits, excluded_genes(state, denoiser)[cells])


def test_answers_are_those_of_the_network(conditional, state):
    denoiser = ScDivaDenoiser(conditional)
    cells, places = slots_of(state)
    with torch.no_grad():
        encoded = denoiser.encode(state)
        logits = denoiser.gene_logits(encoded, cells, places)
        genes = torch.arange(len(cells)) % 30 + 5
        location, scale = denoiser.value_law(encoded, cells, places, genes)
        output = forward(conditional, state, GIVEN)
        law = conditional.predict_value_law(output.last_hidden_state[cells, places], genes)
    assert encoded.shape == (3, 1, 13, 16)
    assert logits[:, :5].isneginf().all()
    is_hidden = output.logits[cells, places].isneginf()  # `forward` leaves visible genes out already
    torch.testing.assert_close(
        logits.masked_fill(is_hidden, 0), output.logits[cells, places].masked_fill(is_hidden, 0)
    )
    torch.testing.assert_close((location, scale), law)
    nats = law_of(conditional, state, 1.0)
    torch.testing.assert_close(nats.float(), output.logits[cells, places].log_softmax(1))


def test_a_known_gene_whose_value_is_hidden_is_shown_as_in_training(small_network, state):
    """With ``value_head="gene"`` the encoder sees a mask there; a scalar head has nothing but the encoder."""
    known = replace(state, input_ids=torch.where(state.is_masked, torch.arange(13) + 20, state.input_ids))
    states = {}
    for value_head in ("gene", "scalar"):
        model = small_network(value_head=value_head, conditions=CONDITIONS)
        with torch.no_grad():
            encoded = [ScDivaDenoiser(model).encode(cells) for cells in (state, known)]
        states[value_head] = bool((encoded[0] - encoded[1]).abs().max() > 1e-4)
    assert states == {"gene": False, "scalar": True}


@pytest.mark.parametrize("scale", SCALES)
def test_guided_gene_logits_by_hand(conditional, state, scale):
    denoiser = ScDivaDenoiser(conditional, guidance_scale=scale)
    cells, places = slots_of(state)
    with torch.no_grad():
        encoded = denoiser.encode(state)
        found = denoiser.gene_logits(encoded, cells, places)
    with_condition, without = (
        forward(conditional, state, ids).logits[cells, places] for ids in (GIVEN, None)
    )
    is_possible = ~with_condition.isneginf()
    expected = scale * with_condition + (1 - scale) * without
    assert encoded.shape == (3, 2, 13, 16)
    torch.testing.assert_close(found[is_possible], expected[is_possible], atol=1e-4, rtol=1e-4)
    assert found[:, :5].isneginf().all()
    assert not found.isnan().any()
    assert torch.equal(state.condition_ids, GIVEN)


@pytest.mark.parametrize("scale", SCALES)
def test_guided_value_laws_by_hand(conditional, state, scale):
    """A product of powers: precisions and weighted centres add up; where no law is left, the conditional."""
    denoiser = ScDivaDenoiser(conditional, guidance_scale=scale)
    cells, places = slots_of(state)
    genes = torch.arange(len(cells)) % 30 + 5
    with torch.no_grad():
        location, width = denoiser.value_law(denoiser.encode(state), cells, places, genes)
        states = (forward(conditional, state, ids).last_hidden_state[cells, places] for ids in (GIVEN, None))
        (centre, spread), (null_centre, null_spread) = (
            conditional.predict_value_law(s, genes) for s in states
        )
    precision = scale / spread**2 + (1 - scale) / null_spread**2
    mixed = (scale * centre / spread**2 + (1 - scale) * null_centre / null_spread**2) / precision
    expected = torch.where(precision > 0, mixed, centre).clamp(min=0)
    torch.testing.assert_close(location, expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(
        width, torch.where(precision > 0, precision.abs().rsqrt(), spread), atol=1e-3, rtol=1e-3
    )


def test_a_larger_scale_moves_genes_towards_the_condition(conditional, state):
    """Guidance tilts the law by its own log-ratio: the mean of that rises with the scale, slot by slot."""
    with_condition, without = law_of(conditional, state, 1.0), law_of(conditional, state, 0.0)
    ratio = (with_condition - without).masked_fill(with_condition.isneginf(), 0.0)
    means = [(law_of(conditional, state, scale).exp() * ratio).sum(dim=1) for scale in (0.0, 1.0, 2.0, 5.0)]
    for lower, higher in itertools.pairwise(means):
        assert (higher > lower).all()
    sharp = law_of(conditional, state, 200.0).exp()
    assert (sharp.gather(1, ratio.argmax(dim=1, keepdim=True)) > 0.9).double().mean() > 0.8


def test_a_cell_without_conditions_is_not_moved(conditional, state):
    free = replace(state, condition_ids=torch.zeros_like(GIVEN))
    torch.testing.assert_close(
        law_of(conditional, free, 3.0), law_of(conditional, free, 1.0), atol=1e-4, rtol=0
    )


# Through `generate`.


def test_scale_one_is_no_guidance_to_the_last_bit(conditional):
    asked = {"n_genes": torch.tensor([9, 12, 4]), "condition_ids": GIVEN, "size_factors": 0.05}
    plain, one = conditional.generate(**asked), conditional.generate(**asked, guidance_scale=1.0)
    for name in ("input_ids", "expression_values", "gene_log_prob", "value_log_prob", "n_network_calls"):
        assert torch.equal(plain[name], one[name])
    assert not torch.equal(plain.input_ids, conditional.generate(**asked, guidance_scale=3.0).input_ids)


def test_scale_zero_forgets_the_condition(conditional):
    asked = {"n_genes": torch.tensor([9, 12, 4]), "tokens_per_step": 2}
    forgotten = conditional.generate(**asked, condition_ids=GIVEN, guidance_scale=0.0)
    free = conditional.generate(**asked)
    assert torch.equal(forgotten.input_ids, free.input_ids)
    torch.testing.assert_close(forgotten.expression_values, free.expression_values, atol=1e-3, rtol=1e-3)
    assert torch.equal(forgotten.n_network_calls, free.n_network_calls)  # twice the cells, as many calls


def test_guided_cells_are_more_typical_of_their_condition(conditional):
    """log p(first gene | condition) - log p(first gene) of what is drawn rises with the scale."""
    first = CellState(
        torch.tensor([[2, MASK]]), torch.zeros(1, 2), torch.ones(1, 2) > 0, torch.tensor([[False, True]]),
        condition_ids=torch.tensor([[2, 0]]),
    )  # fmt: skip
    ratio = (law_of(conditional, first, 1.0) - law_of(conditional, first, 0.0))[0]
    means = []
    for scale in (0.0, 1.0, 3.0):
        made = conditional.generate(
            n_cells=400, n_genes=1, condition_ids=torch.tensor([2, 0]), guidance_scale=scale, batch_size=400
        )
        drawn = ratio[made.input_ids[:, 1]]
        law = law_of(conditional, first, scale)[0].exp()
        finite = ratio.masked_fill(law == 0, 0.0)
        expected = float((law * finite).sum())
        error = float((law * (finite - expected) ** 2).sum() / 400) ** 0.5
        assert abs(float(drawn.mean()) - expected) < 4 * error
        means.append(expected)
    assert means[0] < means[1] < means[2]
