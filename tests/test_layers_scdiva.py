"""Tests of the blocks by themselves: norm, rotary positions, attention, value embedding, value head, pooling.

Scope: `layers_scdiva`, each block against a hand computation or a second implementation.
Run: pytest tests/test_layers_scdiva.py
"""

import math

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from modeling_scdiva import ScDivaConfig, ScDivaForMaskedDiffusion, ScDivaModel, pool_cells
from modeling_scdiva.layers_scdiva import (
    SCALE_SHIFT,
    SMALLEST_SCALE,
    ScDivaRMSNorm,
    ScDivaRotaryEmbedding,
    ScDivaValueEmbedding,
    ScDivaValueHead,
    apply_rotary,
)

VOCAB_SIZE = 20


def tiny_config(**changes) -> ScDivaConfig:
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    return ScDivaConfig(**(sizes | {"intermediate_size": 48} | changes))


def test_norm_by_hand_and_in_half_precision():
    norm = ScDivaRMSNorm(2, eps=0.0)
    norm.weight.data = torch.tensor([1.0, 10.0])
    root = math.sqrt((9.0 + 16.0) / 2)
    torch.testing.assert_close(norm(torch.tensor([[3.0, 4.0]])), torch.tensor([[3.0 / root, 40.0 / root]]))
    states = torch.randn(7, 2)
    torch.testing.assert_close(norm(states.bfloat16()).float(), norm(states), atol=0.1, rtol=0.02)
    assert norm(states.bfloat16()).dtype == torch.bfloat16
    assert "(2,)" in repr(norm)


def test_rotated_scores_depend_on_distance_only():
    rotary = ScDivaRotaryEmbedding(tiny_config())
    query, key = torch.randn(2, 1, 1, 1, 8)
    scores = []
    for start in (0, 5, 700):
        cos, sin = rotary(query, torch.tensor([[start, start + 3]]))
        rotated = [apply_rotary(x, cos[:, i : i + 1], sin[:, i : i + 1]) for i, x in enumerate((query, key))]
        scores.append((rotated[0] * rotated[1]).sum())
    torch.testing.assert_close(scores[1], scores[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scores[2], scores[0], atol=1e-3, rtol=1e-3)
    cos, sin = rotary(query, torch.tensor([[0]]))
    torch.testing.assert_close(apply_rotary(query, cos, sin), query)  # `<lat>`, at position 0, is not rotated


def test_attention_is_what_the_formula_says():
    """Second implementation: rotation by complex numbers, softmax head by head."""
    torch.manual_seed(0)
    model = ScDivaModel(tiny_config()).eval()
    attention = model.layers[0].self_attn
    states = torch.randn(1, 6, 32)
    mixed, _ = attention(states, model.rotary_emb(states, torch.arange(6).unsqueeze(0)))
    frequencies = 10_000.0 ** (-torch.arange(0, 8, 2) / 8)
    turn = torch.exp(1j * torch.arange(6)[:, None] * frequencies)  # (S, K / 2)
    heads = []
    for h in range(4):
        rows = slice(8 * h, 8 * h + 8)
        q, k = (states[0] @ w.weight[rows].T for w in (attention.q_proj, attention.k_proj))
        q, k = (torch.complex(x[:, :4], x[:, 4:]) * turn for x in (q, k))
        scores = (q @ k.conj().T).real / math.sqrt(8)
        heads.append(scores.softmax(-1) @ (states[0] @ attention.v_proj.weight[rows].T))
    expected = torch.cat(heads, dim=-1) @ attention.o_proj.weight.T
    torch.testing.assert_close(mixed[0], expected, atol=1e-5, rtol=1e-5)


def test_value_embedding_of_shown_hidden_and_missing_values():
    torch.manual_seed(0)
    embedding = ScDivaModel(tiny_config()).value_embedding
    values = torch.tensor([[1.5, torch.nan, torch.nan]])
    is_measured, is_hidden = torch.tensor([[True, False, False]]), torch.tensor([[False, True, False]])
    shown, hidden, missing = embedding(values, is_measured, is_hidden)[0]
    by_hand = nn.functional.silu(embedding.in_proj.weight[:, 0] * 1.5 + embedding.in_proj.bias)
    torch.testing.assert_close(shown, embedding.out_proj(by_hand))
    torch.testing.assert_close(hidden, embedding.hidden_value)
    assert not missing.any()


def test_fresh_value_and_gene_embeddings_have_one_scale():
    torch.manual_seed(0)
    model = ScDivaModel(tiny_config(hidden_size=256))
    values = torch.linspace(0.5, 6.0, 50).unsqueeze(0)
    shown = torch.ones(1, 50, dtype=torch.bool)
    value_scale = model.value_embedding(values, shown, ~shown).std()
    assert 0.3 < value_scale / model.embed_tokens.weight[5:].std() < 3.0
    assert isinstance(model.value_embedding, ScDivaValueEmbedding)


@pytest.mark.parametrize("objective", ["paper", "elbo"])
@pytest.mark.parametrize("value_head", ["scalar", "gene"])
def test_value_head_by_hand(value_head, objective):
    torch.manual_seed(0)
    network = tiny_config(value_head=value_head, objective=objective, exclude_visible_genes=True)
    head = ScDivaValueHead(network)
    states, gene_ids, genes = torch.randn(5, 32), torch.arange(5, 10), torch.randn(5, 32)
    entry = states
    if value_head == "gene":
        head.gene_weights.copy_(torch.arange(1.0, VOCAB_SIZE + 1))
        root = genes.square().mean(dim=-1, keepdim=True).add(1e-5).sqrt()
        entry = torch.cat([states, genes / root], dim=-1)
    scores = head.out_proj(nn.functional.silu(head.dense(entry)))
    weights = gene_ids + 1.0 if value_head == "gene" else 1.0
    location, scale = head(states, gene_ids, genes)
    torch.testing.assert_close(location, torch.log1p(scores[:, 0].exp()) * weights)
    assert (location >= 0).all()
    assert scores.shape == (5, 2 if objective == "elbo" else 1)
    if objective == "paper":
        assert scale is None
    else:
        floor = SMALLEST_SCALE + torch.log1p((scores[:, 1] + SCALE_SHIFT).exp())
        torch.testing.assert_close(scale, floor * weights)


def test_gene_head_for_values_uses_the_gene_and_its_weight():
    torch.manual_seed(0)
    model = ScDivaForMaskedDiffusion(tiny_config(value_head="gene"))
    states, gene_ids = torch.randn(4, 32), torch.tensor([5, 6, 7, 8])
    scores = model.predict_expression(states, gene_ids)
    assert (model.predict_expression(states, gene_ids.flip(0)) - scores).abs().max() > 1e-6
    weights = torch.rand(VOCAB_SIZE) + 0.5
    model.set_gene_weights(weights.numpy())
    torch.testing.assert_close(model.predict_expression(states, gene_ids), scores * weights[gene_ids])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(7), r"shape \(20,\), got \(7,\)"),
        (torch.zeros(VOCAB_SIZE), "finite and positive, got 0.0 for token 0"),
        (torch.full((VOCAB_SIZE,), torch.nan), "finite and positive, got nan"),
    ],
)
def test_bad_gene_weights_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        ScDivaForMaskedDiffusion(tiny_config(value_head="gene")).set_gene_weights(weights)


def test_gene_weights_need_their_head():
    with pytest.raises(ValueError, match="value_head=\"gene\", this model has 'scalar'"):
        ScDivaForMaskedDiffusion(tiny_config()).set_gene_weights(torch.ones(VOCAB_SIZE))
    with pytest.raises(ValueError, match="Pass gene_ids here"):
        ScDivaForMaskedDiffusion(tiny_config(value_head="gene")).predict_expression(torch.zeros(1, 32))


def test_pooling_by_hand():
    states = torch.tensor([[[1.0], [2.0], [4.0], [9.0]], [[5.0], [7.0], [9.0], [9.0]], [[3.0]] + [[9.0]] * 3])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]])
    assert pool_cells(states, mask, "lat").tolist() == [[1.0], [5.0], [3.0]]
    assert pool_cells(states, mask, "mean").tolist() == [[3.0], [7.0], [0.0]]
    with pytest.raises(ValueError, match='"lat" or "mean", got \'max\''):
        pool_cells(states, mask, "max")


class SeenMasks(TorchFunctionMode):
    """Note the mask of every call of scaled dot product attention."""

    def __init__(self):
        super().__init__()
        self.masks = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is nn.functional.scaled_dot_product_attention:
            self.masks.append(kwargs["attn_mask"])
        return function(*args, **(kwargs or {}))


def test_attention_gets_a_mask_only_where_something_is_padded(small_network, small_cells):
    """Without a mask the fast kernels apply."""
    network = small_network()
    for n_genes, is_masked in (((7, 7), False), ((7, 5), True)):
        cells = small_cells(n_genes)
        cells.pop("size_factors")
        for given in (cells, {name: cells[name] for name in ("input_ids", "expression_values")}):
            with SeenMasks() as seen, torch.no_grad():
                network(**given)
            assert [mask is not None for mask in seen.masks] == [is_masked] * 2
