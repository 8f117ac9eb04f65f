"""Cells before and after the reverse process: seeds, checks, hidden and added slots, ranking order.

Run: pytest tests/test_cell_layout_scdiva.py
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modeling_scdiva.cell_layout_scdiva import (
    canonical_order,
    cell_seeds,
    check_lengths,
    check_tokens,
    checked_conditions,
    checked_factors,
    collected,
    hide_share,
    n_new_cells,
    order_violations,
    trimmed,
    with_slots,
)
from modeling_scdiva.generation_config_scdiva import ScDivaGenerationConfig
from modeling_scdiva.unmask_scdiva import CellState, UnmaskedCells
from tokenization_scdiva.ranking_scdiva import FlatCells, rank_cells

PAD, MASK, LAT, UNK, PERT = range(5)
NETWORK = SimpleNamespace(
    vocab_size=60,
    n_special_tokens=5,
    max_position_embeddings=20,
    pad_token_id=PAD,
    mask_token_id=MASK,
    lat_token_id=LAT,
    pert_token_id=PERT,
    conditions={"cell_type": ["B", "T"], "batch": ["one"]},
)
PLAIN, GUIDED = ScDivaGenerationConfig(), ScDivaGenerationConfig(guidance_scale=2.0)


def state_of(rows, values=None):
    """Cells from lists of tokens; 0 is padding."""
    ids = torch.tensor(rows)
    values = ids.float() / 10 if values is None else torch.tensor(values)
    return CellState(ids, values.masked_fill(ids == MASK, 0.0), ids != PAD, ids == MASK)


def test_the_first_cells_keep_their_seeds():
    few, many = cell_seeds(3, 7, None), cell_seeds(50, 7, None)
    assert torch.equal(few, many[:3])
    assert len(set(many.tolist())) == 50
    assert not torch.equal(few, cell_seeds(3, 8, None))
    assert torch.equal(few, cell_seeds(3, 99, torch.Generator().manual_seed(7)))  # it comes first


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((4, 9), 4),
        ((4, None), 4),
        ((None, [3, 4]), 2),
        ((2, torch.tensor([3, 4])), 2),
        ((1, torch.tensor(3)), 1),
    ],
)
def test_how_many_cells(arguments, expected):
    assert n_new_cells(*arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, None), "n_cells did not come"),
        ((None, torch.tensor(5)), "n_cells did not come"),
        ((0, None), "n_cells must be at least 1"),
        ((3, [1, 2]), "one number per cell, got 3 and 2"),
        ((None, []), "n_cells must be at least 1 .*, got 0"),
    ],
)
def test_numbers_of_cells_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        n_new_cells(*arguments)


def test_lengths_that_cannot_be():
    check_lengths(np.array([1, 19]), NETWORK)
    for lengths, message in (
        ([3, 0], "A cell has at least one gene, got n_genes=0"),
        ([56], "n_genes=56 is more than the 55 genes of the vocabulary"),
        ([20], "n_genes=20 and `<lat>` need 21 positions, and the network was made for 20"),
    ):
        with pytest.raises(ValueError, match=message):
            check_lengths(np.array(lengths), NETWORK)


def test_tokens_that_cannot_be():
    check_tokens(
        torch.tensor([[LAT, 7, MASK, MASK, 59, PAD, PAD], [LAT, UNK, UNK, PERT, 7, 8, PAD]]), NETWORK
    )
    for rows, message in (
        ([[LAT, 60]], r"hold the token 60, which is outside the vocabulary \(0 .. 59\)"),
        ([[LAT, -3]], "hold the token -3"),
        ([[LAT, 7, 8], [7, 9, 7]], "Cell 1 shows the gene 7 twice"),
    ):
        with pytest.raises(ValueError, match=message):
            check_tokens(torch.tensor(rows), NETWORK)


def test_size_factors_one_for_all_or_one_each():
    assert checked_factors(None, 3, "cpu") is None
    assert checked_factors(0.5, 3, "cpu").tolist() == [0.5] * 3
    assert checked_factors(np.array([1, 2]), 2, "cpu").dtype == torch.float64
    for wrong in ([1.0], [1.0, 0.0], [1.0, -2.0], [1.0, float("inf")], [[1.0, 2.0]], []):
        with pytest.raises(ValueError, match="size_factors must be 2 positive numbers"):
            checked_factors(wrong, 2, "cpu")


def test_conditions_one_for_all_or_one_each():
    def checked(ids, config=PLAIN, network=NETWORK):
        return checked_conditions(ids, 3, network, config, "cpu")

    assert checked(None).tolist() == [[0, 0]] * 3
    assert checked([2, 1]).tolist() == [[2, 1]] * 3
    assert checked(np.eye(3, 2, dtype=int)).tolist() == [[1, 0], [0, 1], [0, 0]]
    assert checked([2, 0], GUIDED).dtype == torch.int64
    bare = SimpleNamespace(conditions=None)
    assert checked(None, network=bare) is None
    for ids, config, network, message in (
        ([1, 1], PLAIN, bare, "condition_ids came, and this network was trained without conditions"),
        (None, GUIDED, bare, "guidance_scale=2 came, and this network was trained without"),
        (None, GUIDED, NETWORK, "guidance_scale=2 sharpens conditions, and a cell has none"),
        ([[1, 1], [0, 0], [0, 1]], GUIDED, NETWORK, "a cell has none"),
        ([1, 1, 1], PLAIN, NETWORK, r"condition_ids must have shape \(3, 2\), got \(3, 3\)"),
        ([[1, 1], [1, 1]], PLAIN, NETWORK, r"got \(2, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            checked(ids, config, network)


def test_a_share_is_hidden_gene_and_value():
    rows = [[LAT, *range(10, 20)], [LAT, PERT, UNK, 30, MASK, 31, 32, 33, PAD, PAD, PAD]]
    state, seeds = state_of(rows), torch.tensor([5, 6])
    part = hide_share(state, seeds, 0.5, NETWORK)
    is_new = part.is_masked & ~state.is_masked
    assert is_new.sum(dim=1).tolist() == [5, 2]
    assert (state.input_ids[is_new] >= 5).all()
    assert (part.input_ids[part.is_masked] == MASK).all()
    assert not part.expression_values[part.is_masked].any()
    assert torch.equal(part.input_ids[~is_new], state.input_ids[~is_new])
    assert torch.equal(part.expression_values[~is_new], state.expression_values[~is_new])
    assert torch.equal(hide_share(state, seeds, 0.0, NETWORK).input_ids, state.input_ids)
    everything = hide_share(state, seeds, 1.0, NETWORK)
    assert everything.input_ids.tolist() == [
        [LAT, *[MASK] * 10],
        [LAT, PERT, UNK, *[MASK] * 5, PAD, PAD, PAD],
    ]
    # A share of more holds that of less, and a cell's own seed decides.
    more = hide_share(state, seeds, 0.8, NETWORK)
    assert (more.is_masked >= part.is_masked).all()
    swapped = hide_share(state.select(torch.tensor([1, 0])), seeds.flip(0), 0.5, NETWORK)
    assert torch.equal(swapped.is_masked.flip(0), part.is_masked)


def test_every_gene_is_hidden_equally_often():
    n_cells, n_genes = 3000, 10
    state = state_of([[LAT, *range(10, 10 + n_genes)]] * n_cells)
    part = hide_share(state, cell_seeds(n_cells, 0, None), 0.3, NETWORK)
    share = part.is_masked.double().mean(dim=0)
    assert share[0] == 0
    assert (share[1:] - 0.3).abs().max() < 4 * (0.21 / n_cells) ** 0.5


def test_slots_are_added_behind_wherever_the_padding_is():
    values = [[0.2, 2.0, 0.0, 2.1, 9.9], [9.9, 9.9, 0.2, 0.4, 2.2]]  # something at padding
    state = state_of([[LAT, 20, MASK, 21, PAD], [PAD, PAD, LAT, PERT, 22]], values)
    grown = with_slots(state, torch.tensor([5, 2]), NETWORK)
    assert grown.input_ids.tolist() == [[LAT, 20, MASK, 21, MASK, MASK], [LAT, PERT, 22, MASK, PAD, PAD]]
    assert grown.is_masked.int().tolist() == [[0, 0, 1, 0, 1, 1], [0, 0, 0, 1, 0, 0]]
    assert torch.equal(grown.attention_mask, grown.input_ids != PAD)
    assert grown.expression_values[0].tolist() == pytest.approx([0.2, 2.0, 0, 2.1, 0, 0])
    assert grown.expression_values[1].tolist() == pytest.approx([0.2, 0.4, 2.2, 0, 0, 0])
    narrow = with_slots(state_of([[LAT, 7, PAD, PAD, PAD]]), 2, NETWORK)
    assert narrow.input_ids.tolist() == [[LAT, 7, MASK]]
    for n_genes, message in (
        ([2, 9], "Cell 0 has 3 genes and n_genes=2 are wanted; given genes stay"),
        ([5], r"n_genes must be one number or 2, one per cell, got shape \(1,\)"),
        (20, "need 21 positions"),
    ):
        with pytest.raises(ValueError, match=message):
            with_slots(state, n_genes, NETWORK)


def test_columns_of_padding_are_cut():
    part = trimmed(state_of([[PAD, LAT, 7, PAD, PAD], [PAD, PAD, LAT, 8, PAD]]))
    assert part.input_ids.tolist() == [[LAT, 7, PAD], [PAD, LAT, 8]]
    assert part.attention_mask.int().tolist() == [[1, 1, 0], [0, 1, 1]]
    assert part.is_masked.shape == part.expression_values.shape == (2, 3)


# Ranking order.


def test_ranking_order_is_the_tokenizers():
    """Second implementation: `rank_cells`, on whole counts with many ties."""
    rng = np.random.default_rng(0)
    weights = 1.0 + rng.integers(0, 4, 60) / 4
    for _ in range(20):
        n_genes = int(rng.integers(1, 19))
        genes = rng.permutation(np.arange(5, 60))[:n_genes]
        values = np.log1p(rng.integers(1, 4, n_genes) / 0.3).astype(np.float32)
        flat = FlatCells(np.array([0, n_genes]), genes.astype(np.int32), values, None, None)
        ranked = rank_cells(flat, gene_order="entropy", ranking_weights=weights, max_genes=None)
        n_pads = int(rng.integers(0, 4))
        ids = torch.tensor([[*[PAD] * n_pads, LAT, *genes, PAD]])
        padded = torch.tensor([[*[0.0] * (n_pads + 1), *values, 0.0]])
        places = canonical_order(ids, padded, ids != PAD, torch.from_numpy(weights), NETWORK)
        expected = [LAT, *ranked.token_ids.tolist(), *[PAD] * (n_pads + 1)]
        assert ids.gather(1, places).tolist() == [expected]
        ordered = (entries.gather(1, places) for entries in (ids, padded, ids != PAD))
        assert order_violations(*ordered, torch.from_numpy(weights), NETWORK) == 0


def test_front_tokens_stay_in_front():
    ids = torch.tensor([[30, PERT, 9, LAT, PAD]])
    values = torch.tensor([[30.0, 4.0, 9.0, 2.0, 99.0]])  # what stands at padding does not count
    places = canonical_order(ids, values, ids != PAD, torch.ones(60), NETWORK)
    assert sorted(places[0, :2].tolist()) == [1, 3]
    assert places[0, 2:].tolist() == [0, 2, 4]


def test_violations_by_hand():
    weights = torch.ones(60, dtype=torch.float64)
    weights[9] = 4.0
    ids = torch.tensor([[LAT, 7, 8, 9, 10], [LAT, 7, PAD, PAD, PAD], [PAD, LAT, 9, 7, 8]])
    values = torch.tensor([[9.0, 2, 3, 4, 1], [0, 1, 0, 0, 0], [0, 0, 4, 1, 2]])  # scores of 9: 1 and 1
    found = order_violations(ids, values, ids != PAD, weights, NETWORK)
    assert found.tolist() == pytest.approx([1 / 3, 0.0, 1 / 2])


def test_batches_go_back_to_their_cells():
    """Three cells in two batches, the longest first; each batch had its padding cut."""
    start = state_of([[LAT, MASK, PAD, PAD], [LAT, 7, MASK, MASK], [LAT, MASK, 9, PAD]])
    order = torch.tensor([1, 2, 0])

    def finished(rows, ids, nats):
        values = torch.tensor(ids).float()
        state = CellState(
            torch.tensor(ids), values, torch.tensor(ids) > 0, torch.zeros(len(rows), len(ids[0])) > 0
        )
        nats = torch.tensor(nats, dtype=torch.float64)
        return UnmaskedCells(state, nats, 2 * nats, nats.long(), nats.long())

    parts = [
        finished([1, 2], [[LAT, 7, 30, 20], [LAT, 40, 9, PAD]], [1.0, 2.0]),
        finished([0], [[LAT, 50]], [3.0]),
    ]
    plain = collected(parts, order, start, None, NETWORK, is_canonical=True)
    assert plain.input_ids.tolist() == [[LAT, 50, PAD, PAD], [LAT, 7, 30, 20], [LAT, 40, 9, PAD]]
    assert plain.gene_log_prob.tolist() == [3.0, 1.0, 2.0]
    assert plain.n_network_calls.tolist() == [3, 1, 2]
    assert plain.value_log_prob is plain.order_violations is plain.size_factors is None
    assert torch.equal(plain.is_generated, start.is_masked)
    ranked = collected(parts, order, start, torch.ones(60), NETWORK, is_canonical=True)
    assert ranked.input_ids.tolist() == [[LAT, 50, PAD, PAD], [LAT, 30, 20, 7], [LAT, 40, 9, PAD]]
    assert ranked.is_generated.int().tolist() == [[0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 0]]
    assert ranked.order_violations.tolist() == [0.0, 0.5, 0.0]
    assert start.input_ids.tolist() == [[LAT, MASK, PAD, PAD], [LAT, 7, MASK, MASK], [LAT, MASK, 9, PAD]]
