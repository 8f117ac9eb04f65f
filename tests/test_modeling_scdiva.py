"""Tests of the network: what a cell's answer may depend on, the heads, the losses, gradients and precision.

Scope: `ScDivaModel`, `ScDivaForMaskedDiffusion`, `ScDivaForSequenceClassification` at a tiny size on the CPU.
Run: pytest tests/test_modeling_scdiva.py
"""

import copy
import itertools
import math
from math import comb

import pytest
import torch
from torch import nn

from modeling_scdiva import (
    ScDivaConfig,
    ScDivaForMaskedDiffusion,
    ScDivaForSequenceClassification,
    ScDivaModel,
)

VOCAB_SIZE = 60
N_GENES = VOCAB_SIZE - 5
PAD, MASK, LAT, PERT = 0, 1, 2, 4
VARIANTS = [
    {},
    {"exclude_visible_genes": True},
    {"value_head": "gene"},
    {"exclude_visible_genes": True, "value_head": "gene"},
]


def tiny_config(**changes) -> ScDivaConfig:
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return ScDivaConfig(**(sizes | {"intermediate_size": 48} | changes))


def diffusion_model(seed: int = 0, **changes) -> ScDivaForMaskedDiffusion:
    torch.manual_seed(seed)
    return ScDivaForMaskedDiffusion(tiny_config(**changes)).eval()


def make_inputs(n_genes=(12, 7, 3), masking_rate=0.4, seed=0) -> dict[str, torch.Tensor]:
    """Cells of different length, `<lat>` first, padded on the right; genes and values are masked together."""
    generator = torch.Generator().manual_seed(seed)
    n_cells, length = len(n_genes), max(n_genes) + 1
    input_ids = torch.full((n_cells, length), PAD)
    for i, n in enumerate(n_genes):
        input_ids[i, 0] = LAT
        input_ids[i, 1 : n + 1] = torch.randperm(N_GENES, generator=generator)[:n] + 5
    is_gene = input_ids >= 5
    values = torch.rand(input_ids.shape, generator=generator) * 5 * is_gene
    is_masked = is_gene & (torch.rand(input_ids.shape, generator=generator) < masking_rate)
    is_masked[:, 1] = is_gene[:, 1] & (masking_rate > 0)  # at least one each
    return {
        "input_ids": input_ids.masked_fill(is_masked, MASK),
        "expression_values": values.masked_fill(is_masked, 0.0),
        "attention_mask": (input_ids != PAD).long(),
        "is_masked": is_masked,
        "labels": input_ids.masked_fill(~is_masked, -100),
        "expression_labels": values,
    }


def assert_near(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def without_targets(inputs):
    return {name: tensor for name, tensor in inputs.items() if "labels" not in name}


# What an answer may depend on.


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_do_not_depend_on_padding_or_on_other_cells(variant, attention):
    model = diffusion_model(attn_implementation=attention, **variant)
    inputs = make_inputs()
    together = model(**inputs, output_all_logits=True)
    for i, length in enumerate((13, 8, 4)):
        for n_pads in (0, 5):
            alone = {name: tensor[i : i + 1, :length] for name, tensor in inputs.items()}
            fill = {"input_ids": PAD, "labels": -100}
            padded = {n: nn.functional.pad(t, (0, n_pads), value=fill.get(n, 0)) for n, t in alone.items()}
            output = model(**padded, output_all_logits=True)
            assert_near(output.logits[0, :length], together.logits[i, :length])
            assert_near(
                output.expression_predictions[0, :length], together.expression_predictions[i, :length]
            )
            assert_near(output.last_hidden_state[0, 0], together.last_hidden_state[i, 0])
            assert_near(output.cell_gene_loss[0], together.cell_gene_loss[i])


def test_attention_mask_is_derived_from_padding():
    model = diffusion_model()
    inputs = make_inputs()
    with_mask = model(**inputs)
    del inputs["attention_mask"]
    torch.testing.assert_close(model(**inputs).logits, with_mask.logits, atol=0, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_behind_hidden_and_empty_slots_gets_through(variant):
    model = diffusion_model(**variant)
    inputs = make_inputs()
    clean = model(**inputs)
    poisoned = dict(inputs)
    unread = inputs["is_masked"] | (inputs["input_ids"] < 5)
    poisoned["expression_values"] = inputs["expression_values"].masked_fill(unread, torch.nan)
    poisoned["expression_labels"] = inputs["expression_labels"].masked_fill(~inputs["is_masked"], torch.nan)
    output = model(**poisoned)
    for name in ("loss", "logits", "expression_predictions", "last_hidden_state"):
        torch.testing.assert_close(output[name], clean[name], atol=0, rtol=0)
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_tokens_in_padded_slots_do_not_matter():
    model = diffusion_model(exclude_visible_genes=True)
    inputs = make_inputs()
    clean = model(**inputs)
    inputs["input_ids"] = torch.where(inputs["attention_mask"] == 0, 30, inputs["input_ids"])
    inputs["labels"] = torch.where(inputs["attention_mask"] == 0, 30, inputs["labels"])
    torch.testing.assert_close(model(**inputs).logits, clean.logits, atol=0, rtol=0)


def test_eager_equals_sdpa():
    model = diffusion_model(attn_implementation="eager")
    faster = copy.deepcopy(model)
    faster.set_attn_implementation("sdpa")
    inputs = make_inputs()
    slow, fast = model(**inputs), faster(**inputs)
    assert_near(fast.logits, slow.logits)
    assert_near(fast.loss, slow.loss)


def test_values_of_special_tokens_are_not_read_but_those_of_genes_are():
    torch.manual_seed(0)
    model = ScDivaModel(tiny_config()).eval()
    input_ids = torch.tensor([[LAT, PERT, 7, 8]])
    values = torch.tensor([[0.0, 0.0, 1.0, 2.0]])
    states = model(input_ids, values).last_hidden_state
    torch.testing.assert_close(
        model(input_ids, values + torch.tensor([9.0, 9.0, 0, 0])).last_hidden_state, states
    )
    changed = model(input_ids, values + torch.tensor([0, 0, 1.0, 0])).last_hidden_state
    assert (changed - states).abs().max() > 1e-4


def test_hidden_value_and_hidden_gene_are_told_apart():
    torch.manual_seed(0)
    model = ScDivaModel(tiny_config()).eval()
    values = torch.tensor([[0.0, 1.0, 2.0]])
    known, masked = torch.tensor([[LAT, 7, 8]]), torch.tensor([[LAT, MASK, 8]])
    nothing, first = torch.tensor([[False] * 3]), torch.tensor([[False, True, False]])
    states = [
        model(ids, values, is_masked=hidden).last_hidden_state
        for ids, hidden in ((known, nothing), (known, first), (masked, nothing), (masked, first))
    ]
    for one, other in itertools.combinations(states, 2):
        assert (one - other).abs().max() > 1e-4
    torch.testing.assert_close(
        model(masked, values).last_hidden_state, states[3]
    )  # the default: hidden together


def test_inputs_embeds_stand_in_for_tokens():
    model = diffusion_model()
    inputs = without_targets(make_inputs())
    expected = model(**inputs)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    torch.testing.assert_close(model(**inputs, inputs_embeds=embeds).logits, expected.logits)
    only_genes = {
        "expression_values": inputs["expression_values"][:1, 1:],
        "is_masked": inputs["is_masked"][:1, 1:],
    }
    by_token = model(inputs["input_ids"][:1, 1:], **only_genes)
    by_vector = model(inputs_embeds=embeds[:1, 1:], **only_genes)
    torch.testing.assert_close(by_vector.logits, by_token.logits)


# Heads and losses.


def zero_heads(model):
    for layer in (model.lm_head, model.value_head.out_proj):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_zero_heads_give_the_log_of_the_predictable_genes(variant):
    model = zero_heads(diffusion_model(**variant))
    inputs = make_inputs()
    output = model(**inputs)
    n_visible = (
        ((inputs["input_ids"] >= 5).sum(dim=1)) if variant.get("exclude_visible_genes") else torch.zeros(3)
    )
    torch.testing.assert_close(output.cell_gene_loss, torch.log(N_GENES - n_visible.float()))
    torch.testing.assert_close(
        output.expression_predictions, torch.full((3, 13), math.log(2.0))
    )  # softplus(0)


def test_loss_is_the_weighted_sum_of_means_per_cell():
    model = diffusion_model(expression_loss_weight=3.0)
    inputs = make_inputs()
    output = model(**inputs, output_all_logits=True)
    gene, value = [], []
    for i in range(3):
        here = inputs["is_masked"][i]
        gene.append(nn.functional.cross_entropy(output.logits[i, here], inputs["labels"][i, here]))
        value.append(
            nn.functional.mse_loss(
                output.expression_predictions[i, here], inputs["expression_labels"][i, here]
            )
        )
    torch.testing.assert_close(output.cell_gene_loss, torch.stack(gene))
    torch.testing.assert_close(output.cell_expression_loss, torch.stack(value))
    torch.testing.assert_close(output.gene_loss, sum(gene) / 3)
    torch.testing.assert_close(output.expression_loss, sum(value) / 3)
    torch.testing.assert_close(output.loss, sum(gene) / 3 + 3.0 * sum(value) / 3)


def test_each_target_brings_its_own_loss():
    model = diffusion_model()
    inputs = make_inputs()
    both = model(**inputs)
    values_only = model(**{name: t for name, t in inputs.items() if name != "labels"})
    genes_only = model(**{name: t for name, t in inputs.items() if name != "expression_labels"})
    assert values_only.gene_loss is None
    assert genes_only.expression_loss is None
    torch.testing.assert_close(values_only.loss, 10.0 * both.expression_loss)
    torch.testing.assert_close(genes_only.loss, both.gene_loss)
    assert model(**without_targets(inputs)).loss is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_masked_logits_equal_the_rows_of_all_logits(variant):
    model = diffusion_model(**variant)
    inputs = make_inputs()
    everything = model(**inputs, output_all_logits=True)
    for these in (inputs, without_targets(inputs)):
        masked = model(**these)
        assert masked.logits.shape == (int(inputs["is_masked"].sum()), VOCAB_SIZE)
        assert_near(masked.logits, everything.logits[inputs["is_masked"]])
    assert everything.logits.shape == (3, 13, VOCAB_SIZE)
    torch.testing.assert_close(model(**inputs).loss, everything.loss)


def test_config_can_ask_for_all_logits():
    assert diffusion_model(sparse_prediction=False)(**make_inputs()).logits.shape == (3, 13, VOCAB_SIZE)


@pytest.mark.parametrize("excludes", [False, True])
def test_which_genes_have_probability_zero(excludes):
    model = diffusion_model(exclude_visible_genes=excludes)
    inputs = make_inputs()
    logits = model(**inputs, output_all_logits=True).logits
    for i, cell in enumerate(inputs["input_ids"].tolist()):
        expected = set(range(5)) | ({token for token in cell if token >= 5} if excludes else set())
        for position in range(13):
            assert set(logits[i, position].isneginf().nonzero().flatten().tolist()) == expected


def test_excluding_visible_genes_can_only_lower_the_loss():
    plain, excluding = diffusion_model(), diffusion_model(exclude_visible_genes=True)
    for seed in range(5):
        inputs = make_inputs(seed=seed)
        assert (excluding(**inputs).cell_gene_loss <= plain(**inputs).cell_gene_loss).all()


def test_labels_that_cannot_be_predicted_are_refused():
    inputs = make_inputs()
    special = dict(inputs, labels=inputs["labels"].masked_fill(inputs["is_masked"], LAT))
    with pytest.raises(ValueError, match=r"labels can never be predicted, the first is 2, a special token"):
        diffusion_model()(**special)
    shown = int(inputs["input_ids"][0][inputs["input_ids"][0] >= 5][0])
    visible = dict(inputs, labels=inputs["labels"].masked_fill(inputs["is_masked"], shown))
    with pytest.raises(ValueError, match=f"the first is {shown}, visible in the same cell"):
        diffusion_model(exclude_visible_genes=True)(**visible)
    assert diffusion_model()(**visible).loss.isfinite()


def test_gene_head_for_values_takes_label_then_visible_gene_then_likeliest():
    model = diffusion_model(value_head="gene")
    inputs = make_inputs()
    output = model(**inputs, output_all_logits=True)
    true_ids = torch.where(inputs["is_masked"], inputs["labels"], inputs["input_ids"])
    expected = model.predict_expression(output.last_hidden_state, true_ids)
    torch.testing.assert_close(output.expression_predictions, expected)
    guessed = torch.where(inputs["is_masked"], output.logits.argmax(-1), inputs["input_ids"])
    expected = model.predict_expression(output.last_hidden_state, guessed)
    torch.testing.assert_close(model(**without_targets(inputs)).expression_predictions, expected)


def test_inputs_that_are_missing_are_named():
    model = diffusion_model()
    inputs = make_inputs()
    with pytest.raises(ValueError, match="expression_values did not come"):
        model(inputs["input_ids"])
    with pytest.raises(ValueError, match="neither input_ids nor inputs_embeds"):
        model(expression_values=inputs["expression_values"])
    with pytest.raises(ValueError, match=r"attention_mask must be \(cells, positions\)"):
        model(**(inputs | {"attention_mask": torch.ones(3, 1, 13, 13)}))
    with pytest.raises(ValueError, match="exclude_visible_genes needs input_ids"):
        diffusion_model(exclude_visible_genes=True)(
            inputs_embeds=torch.zeros(1, 4, 32), expression_values=torch.zeros(1, 4)
        )


def test_expected_loss_of_the_network_is_the_bound_divided_by_length_plus_one():
    """All masks of one cell with four genes, each with its exact weight under t ~ U(0, 1)."""
    model = diffusion_model()
    cell, values = torch.tensor([LAT, 9, 30, 17, 52]), torch.tensor([0.0, 3.0, 2.0, 1.0, 0.5])
    masks = torch.tensor([(False, *m) for m in itertools.product([False, True], repeat=4)])
    n_masked = masks.sum(dim=1)
    with torch.no_grad():
        output = model(
            cell.masked_fill(masks, MASK),
            values.expand(16, 5),
            labels=cell.expand(16, 5).masked_fill(~masks, -100),
            output_all_logits=True,
        )
    weight = torch.tensor([1.0 / (5 * comb(4, int(k))) for k in n_masked])
    expected_loss = weight @ output.cell_gene_loss
    # The bound as a sum over k of the mean loss at exactly k masks, from the logits alone.
    log_p = output.logits.log_softmax(-1).gather(-1, cell.expand(16, 5).unsqueeze(-1)).squeeze(-1)
    nelbo = sum(-log_p[n_masked == k][masks[n_masked == k]].mean() for k in range(1, 5))
    assert_near(5 * expected_loss, nelbo)


# Gradients, precision, reproducibility.


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_reaches_every_parameter(variant):
    model = diffusion_model(**variant).train()
    model(**make_inputs()).loss.backward()
    unreached = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert unreached == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_batch_without_masked_tokens_has_loss_zero_and_stays_connected(variant):
    model = diffusion_model(**variant).train()
    output = model(**make_inputs(masking_rate=0.0))
    assert output.loss.item() == output.gene_loss.item() == output.expression_loss.item() == 0.0
    assert output.logits.shape == (0, VOCAB_SIZE)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("n_genes", [(6, 1), (6, 0), (1,)])
@pytest.mark.parametrize("masking_rate", [0.0, 0.5, 1.0])
def test_degenerate_cells_have_finite_losses_and_gradients(n_genes, masking_rate, variant, attention):
    model = diffusion_model(attn_implementation=attention, **variant).train()
    inputs = make_inputs(n_genes, masking_rate)
    fill = {"input_ids": PAD, "labels": -100}  # of a last cell that is all padding
    inputs = {n: nn.functional.pad(t, (0, 0, 0, 1), value=fill.get(n, 0)) for n, t in inputs.items()}
    output = model(**inputs)
    output.loss.backward()
    assert all(
        torch.isfinite(output[name]).all() for name in ("loss", "expression_predictions", "last_hidden_state")
    )
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_cell_without_masked_tokens_contributes_zero():
    model = diffusion_model()
    inputs = make_inputs()
    keep = inputs["is_masked"].clone()
    keep[1] = False
    inputs["input_ids"][1, 1:8] = torch.arange(5, 12)
    inputs |= {"is_masked": keep, "labels": inputs["labels"].masked_fill(~keep, -100)}
    output = model(**inputs)
    assert output.cell_gene_loss[1] == output.cell_expression_loss[1] == 0.0
    torch.testing.assert_close(output.gene_loss, output.cell_gene_loss.sum() / 3)


def test_checkpointed_gradients_equal_plain_ones():
    plain = diffusion_model(hidden_dropout=0.0).train()
    saving = copy.deepcopy(plain)
    enable = getattr(saving, "activation_checkpointing_enable", None) or saving.gradient_checkpointing_enable
    enable()
    inputs = make_inputs()
    plain(**inputs).loss.backward()
    saving(**inputs).loss.backward()
    for one, other in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_autocast_and_weights_work(variant):
    model = diffusion_model(**variant)
    inputs = make_inputs()
    expected = model(**inputs).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.train()(**inputs).loss
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    half = copy.deepcopy(model).eval().to(torch.bfloat16)(**inputs)
    assert half.logits.dtype == torch.bfloat16
    assert half.loss.dtype == torch.float32
    torch.testing.assert_close(half.loss, expected, atol=0.5, rtol=0.02)


def test_same_seed_same_loss_with_dropout():
    model = diffusion_model(hidden_dropout=0.3, attention_dropout=0.3).train()
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(model(**make_inputs()).loss.item())
    assert losses[0] == losses[1] != losses[2]


def test_a_few_steps_learn_one_batch():
    model = diffusion_model(exclude_visible_genes=True, value_head="gene", hidden_dropout=0.0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    inputs = make_inputs()
    losses = []
    for _ in range(60):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


# Outputs, resizing, classification.


def test_hidden_states_and_attentions_are_returned_when_asked():
    model = diffusion_model(attn_implementation="eager")
    inputs = without_targets(make_inputs())
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in output.hidden_states] == [(3, 13, 32)] * 3
    assert [tuple(weights.shape) for weights in output.attentions] == [(3, 4, 13, 13)] * 2
    torch.testing.assert_close(output.hidden_states[-1], output.last_hidden_state)
    to_pads = output.attentions[0][1, :, :, 8:]
    assert not to_pads.any()
    as_tuple = model(**inputs, return_dict=False)
    torch.testing.assert_close(as_tuple[0], output.logits)


def test_resizing_keeps_genes_and_their_weights():
    model = diffusion_model(value_head="gene")
    model.set_gene_weights(torch.arange(1.0, VOCAB_SIZE + 1))
    inputs = make_inputs()
    before = model(**inputs)
    model.resize_token_embeddings(VOCAB_SIZE + 3)
    after = model(**inputs)
    assert after.logits.shape[1] == model.config.vocab_size == VOCAB_SIZE + 3
    torch.testing.assert_close(after.logits[:, :VOCAB_SIZE], before.logits)
    torch.testing.assert_close(after.expression_predictions, before.expression_predictions)
    assert model.value_head.gene_weights.tolist() == [*range(1, VOCAB_SIZE + 1), 1, 1, 1]


@pytest.mark.parametrize("cell_pooling", ["lat", "mean"])
def test_classifier_does_not_depend_on_padding(cell_pooling):
    torch.manual_seed(0)
    model = ScDivaForSequenceClassification(tiny_config(num_labels=4, cell_pooling=cell_pooling)).eval()
    inputs = without_targets(make_inputs())
    together = model(**inputs).logits
    for i, length in enumerate((13, 8, 4)):
        alone = model(**{name: tensor[i : i + 1, :length] for name, tensor in inputs.items()}).logits
        assert_near(alone[0], together[i])


@pytest.mark.parametrize(
    ("num_labels", "labels", "reference"),
    [
        (4, torch.tensor([0, 3, 1]), nn.functional.cross_entropy),
        (1, torch.tensor([0.5, 1.5, -1.0]), lambda out, y: nn.functional.mse_loss(out.squeeze(), y)),
        (4, torch.eye(4)[:3], nn.functional.binary_cross_entropy_with_logits),
    ],
)
def test_classifier_losses_are_those_of_transformers(num_labels, labels, reference):
    torch.manual_seed(0)
    model = ScDivaForSequenceClassification(tiny_config(num_labels=num_labels)).eval()
    output = model(**without_targets(make_inputs()), labels=labels)
    torch.testing.assert_close(output.loss, reference(output.logits, labels))
    assert output.logits.shape == (3, num_labels)


def test_trainer_averages_over_micro_batches_itself():
    model = diffusion_model()
    assert model.accepts_loss_kwargs is False
    inputs = make_inputs()
    assert model(**inputs, num_items_in_batch=torch.tensor(999)).loss == model(**inputs).loss
