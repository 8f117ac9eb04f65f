"""Tests of what is computed at some positions only: last states, classifiers, slots of a step, gene losses.

Scope: ``output_positions`` and ``loss_chunk_size``, each against the computation at all positions.
Run: pytest tests/test_partial_states.py
"""

from dataclasses import replace

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from modeling_scdiva import ScDivaConfig, ScDivaForSequenceClassification, pool_cells
from modeling_scdiva.denoiser_scdiva import ScDivaDenoiser
from modeling_scdiva.enumerated_law import RecordingLaw
from modeling_scdiva.sampling_scdiva import CellNoise
from modeling_scdiva.unmask_scdiva import CellState, UnmaskSettings, unmask

MASK = 1
POSITIONS = torch.tensor([[0, 3, 12], [0, 1, 2], [3, 0, 3]])


def assert_near(actual, expected):
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)


@pytest.fixture
def cells(small_cells):
    """Three padded cells with every third gene hidden, and their targets."""
    cells = small_cells()
    is_masked = (cells["input_ids"] >= 5) & (torch.arange(13) % 3 == 1)
    return cells | {
        "input_ids": cells["input_ids"].masked_fill(is_masked, MASK),
        "expression_values": cells["expression_values"].masked_fill(is_masked, 0.0),
        "is_masked": is_masked,
        "labels": cells["input_ids"].masked_fill(~is_masked, -100),
        "expression_labels": cells["expression_values"],
    }


def inputs_of(cells):
    return {name: cells[name] for name in ("input_ids", "expression_values", "attention_mask", "is_masked")}


def rows_at(states, positions):
    return torch.stack([row[places] for row, places in zip(states, positions, strict=True)])


# Last states.


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"conditions": {"cell_type": ["B", "T"]}},
        {"use_rotary_positions": False},
        {"num_hidden_layers": 1},
    ],
)
def test_states_asked_for_are_those_of_the_whole_cell(small_network, cells, attention, variant):
    encoder = small_network(attn_implementation=attention, **variant).model
    whole = encoder(**inputs_of(cells)).last_hidden_state
    some = encoder(**inputs_of(cells), output_positions=POSITIONS).last_hidden_state
    assert_near(some, rows_at(whole, POSITIONS))
    first = encoder(**inputs_of(cells), output_positions=torch.zeros(1, 1, dtype=torch.long))
    assert_near(first.last_hidden_state, whole[:, :1])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_whole_cell(small_network, cells, checkpointing):
    encoder = small_network(hidden_dropout=0.0).model.train()
    if checkpointing:
        enable = getattr(encoder, "activation_checkpointing_enable", None)
        (enable or encoder.gradient_checkpointing_enable)({"use_reentrant": False})
    gradients = []
    for asked in ({}, {"output_positions": POSITIONS}):
        states = encoder(**inputs_of(cells), **asked).last_hidden_state
        states = states if asked else rows_at(states, POSITIONS)
        encoder.zero_grad()
        states.square().sum().backward()
        gradients.append({name: weight.grad.clone() for name, weight in encoder.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-3, rtol=1e-4, msg=name)


def test_states_and_weights_of_inner_layers_stay_whole(small_network, cells):
    encoder = small_network(attn_implementation="eager", num_hidden_layers=3).model
    asked = {"output_hidden_states": True, "output_attentions": True}
    whole = encoder(**inputs_of(cells), **asked)
    some = encoder(**inputs_of(cells), **asked, output_positions=POSITIONS)
    for found, expected in zip(some.hidden_states[:-1], whole.hidden_states[:-1], strict=True):
        torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert_near(some.hidden_states[-1], rows_at(whole.hidden_states[-1], POSITIONS))
    assert_near(some.attentions[0], whole.attentions[0])
    last = rows_at(whole.attentions[-1].transpose(1, 2), POSITIONS).transpose(1, 2)
    assert_near(some.attentions[-1], last)


def test_flash_attention_takes_one_or_all_positions_of_padded_cells(small_network, cells):
    encoder = small_network().model
    encoder.config._attn_implementation_internal = "flash_attention_2"
    states, is_attended = torch.zeros(3, 13, 16), cells["attention_mask"].bool()
    with pytest.raises(ValueError, match="asks for 3 positions of padded cells"):
        encoder._query_mask(states, is_attended, POSITIONS)
    assert encoder._query_mask(states, is_attended, POSITIONS[:, :1]) is not None
    assert encoder._query_mask(states, torch.ones_like(is_attended), POSITIONS) is None


@pytest.mark.parametrize("pooling", ["lat", "mean"])
def test_classifier_reads_what_it_pools(small_network, cells, pooling):
    torch.manual_seed(0)
    config = small_network().config.to_dict() | {"num_labels": 4, "cell_pooling": pooling, "vocab_size": 35}
    model = ScDivaForSequenceClassification(ScDivaConfig.from_dict(config)).eval()
    inputs = inputs_of(cells)
    logits = model(**inputs).logits
    states = model.model(**inputs).last_hidden_state
    assert_near(logits, model.classifier(pool_cells(states, inputs["attention_mask"], pooling)))
    assert model(**inputs, output_hidden_states=True).hidden_states[-1].shape == states.shape


# Slots of a step.


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_denoiser_answers_at_slots_asked_for(small_network, cells, scale):
    model = small_network(conditions={"cell_type": ["B", "T"]})
    state = CellState(**(inputs_of(cells) | {"attention_mask": cells["attention_mask"].bool()}))
    state = replace(state, condition_ids=torch.tensor([[1], [2], [0]]))
    is_asked = torch.zeros_like(state.is_masked)
    is_asked[0, [1, 4, 7]] = is_asked[1, 4] = True
    denoiser = ScDivaDenoiser(model, guidance_scale=scale)
    with torch.no_grad():
        whole, some = denoiser.encode(state), denoiser.encode(state, is_asked)
    assert some.shape == whole.shape
    where = is_asked.nonzero(as_tuple=True)
    assert_near(some[where[0], :, where[1]], whole[where[0], :, where[1]])
    assert some[0, :, [2, 3, 12]].isnan().all()


class AskedLaw(RecordingLaw):
    """Forgets the laws of slots that were not asked for."""

    def encode(self, state, is_asked=None):
        encoded = super().encode(state, is_asked)
        self.n_asked = [*getattr(self, "n_asked", []), None if is_asked is None else is_asked.sum(dim=1)]
        return encoded if is_asked is None else encoded.masked_fill(~is_asked.unsqueeze(-1), torch.nan)


@pytest.mark.parametrize(
    ("settings", "n_asked"),
    [
        (UnmaskSettings(steps=4), [1, 1, 1, 1]),
        (UnmaskSettings(steps=2, order="rank"), [2, 2]),
        (UnmaskSettings(steps=4, order="entropy"), [4, 3, 2, 1]),
        (UnmaskSettings(steps=4, remask="quality", remask_rate=0.5), None),
        (UnmaskSettings(steps=4, remask="random", remask_rate=0.5), None),
        (UnmaskSettings(entropy_bound=0.5), None),
    ],
)
def test_no_more_slots_are_asked_for_than_a_step_reads(settings, n_asked):
    law, reference = AskedLaw(6, 4), RecordingLaw(6, 4)
    done = unmask(law.hidden_cells(50), law, settings, CellNoise(range(50)))
    expected = unmask(law.hidden_cells(50), reference, settings, CellNoise(range(50)))
    assert torch.equal(done.state.input_ids, expected.state.input_ids)
    assert torch.equal(done.gene_log_prob, expected.gene_log_prob)
    if n_asked is not None:
        assert [int(n.max()) for n in law.n_asked] == n_asked


# Gene losses.


@pytest.mark.parametrize("chunk", [1, 4, 1000])
@pytest.mark.parametrize("variant", [{}, {"exclude_unfit_genes": True}, {"objective": "paper"}])
def test_loss_in_chunks_is_the_loss(small_network, cells, chunk, variant):
    outputs, gradients = [], []
    for size in (None, chunk):
        model = small_network(hidden_dropout=0.0, loss_chunk_size=size, **variant).train()
        output = model(**cells)
        output.loss.backward()
        outputs.append(output)
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    torch.testing.assert_close(outputs[1].cell_gene_loss, outputs[0].cell_gene_loss, atol=1e-6, rtol=1e-6)
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).norm() <= 5e-6 * gradient.norm(), name
    assert outputs[0].logits is not None
    assert outputs[1].logits is None
    assert model(**cells, output_all_logits=True).logits.shape == (3, 13, 35)
    assert model(**inputs_of(cells)).logits is not None  # without labels there is no loss


def test_loss_in_chunks_of_cells_with_nothing_hidden(small_network, small_cells):
    model = small_network(loss_chunk_size=2)
    cells = small_cells()
    output = model(**cells, labels=torch.full((3, 13), -100))
    assert torch.equal(output.cell_gene_loss, torch.zeros(3))


def test_chunks_hold_a_position_at_least():
    with pytest.raises(StrictDataclassError, match="loss_chunk_size must be at least 1"):
        ScDivaConfig(loss_chunk_size=0)


def test_genes_that_cannot_be_drawn_get_no_gradient(small_network, cells):
    model = small_network(objective="paper")
    model(**cells).loss.backward()
    assert model.lm_head.weight.grad[5:].abs().sum() > 0
    assert torch.equal(model.lm_head.weight.grad[:5], torch.zeros(5, 16))
    assert torch.equal(model.lm_head.bias.grad[:5], torch.zeros(5))
