"""What generation refuses, and by which words: sizes, tokens, settings and inputs that cannot be.

Scope: `generate`, `denoise`, `complete` and `impute` of `ScDivaForMaskedDiffusion`, on the CPU.
Run: pytest tests/test_generation_refusals.py
"""

import itertools

import pytest
import torch

MASK = 1


@pytest.fixture(scope="module")
def model(small_network):
    return small_network()


@pytest.fixture(scope="module")
def conditional(small_network):
    conditions = {"cell_type": ["B", "T", "NK"], "library_size": [300.0, 600.0]}
    return small_network(conditions=conditions, latent_loss_weight=1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_cells": 2, "n_genes": 31}, "n_genes=31 is more than the 30 genes of the vocabulary"),
        ({"n_cells": 2, "n_genes": 0}, "A cell has at least one gene, got n_genes=0"),
        ({"n_cells": 2, "n_genes": [3, 4, 5]}, "n_genes one number per cell, got 2 and 3"),
        ({"n_cells": 0, "n_genes": 3}, "n_cells must be at least 1"),
        ({"n_genes": 3}, "n_cells did not come. Say how many cells to make, or pass input_ids"),
        ({"n_cells": 2}, "n_genes did not come, and this checkpoint has no law of cell sizes"),
        ({"n_cells": 2, "n_genes": 3, "strength": 0.5}, "strength need input_ids, cells to start from"),
        ({"n_cells": 2, "n_genes": 3, "size_factors": 0.0}, "size_factors must be 2 positive numbers"),
        ({"n_cells": 2, "n_genes": 3, "size_factors": torch.ones(3)}, r"got shape \(3,\)"),
        ({"n_cells": 2, "n_genes": 3, "ranking_weights": [1.0]}, r"must have shape \(35,\), got \(1,\)"),
        ({"n_cells": 2, "n_genes": 3, "guidance_scale": 2.0}, "guidance_scale=2 came, and this network was"),
        ({"n_cells": 2, "n_genes": 3, "condition_ids": [1]}, "condition_ids came, and this network was"),
        ({"n_cells": 2, "n_genes": 3, "step": 5}, "Generation has no setting 'step'. Settings: steps"),
        ({"n_cells": 2, "n_genes": 3, "remask": "quality"}, "This model has no quality head"),
    ],
)
def test_new_cells_that_cannot_be_are_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**arguments)


def test_cells_longer_than_the_network_are_refused(small_network, small_cells):
    model = small_network(max_position_embeddings=10)
    model.generate(n_cells=1, n_genes=9)
    with pytest.raises(ValueError, match="`<lat>` need 11 positions, and the network was made for 10"):
        model.generate(n_cells=1, n_genes=10)
    with pytest.raises(ValueError, match="need 11 positions"):
        model.complete(**small_cells((3,)), n_genes=10)


def with_token(cells, token):
    ids = cells["input_ids"].clone()
    ids[1, 2] = token
    return cells | {"input_ids": ids}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda cells: with_token(cells, 35),
            r"hold the token 35, which is outside the vocabulary \(0 .. 34\)",
        ),
        (lambda cells: with_token(cells, -1), "hold the token -1"),
        (lambda cells: with_token(cells, int(cells["input_ids"][1, 1])), r"Cell 1 shows the gene \d+ twice"),
        (lambda cells: cells | {"strength": 1.2}, r"strength must lie in \[0, 1\] .*, got 1.2"),
        (lambda cells: cells | {"strength": -0.1}, "strength must lie in"),
        (lambda cells: cells | {"strength": float("nan")}, "strength must lie in"),
        (lambda cells: cells | {"n_cells": 3}, "n_cells and n_genes are for new cells; input_ids came"),
        (lambda cells: cells | {"n_genes": 3}, "n_cells and n_genes are for new cells; input_ids came"),
        (lambda cells: cells | {"expression_values": None}, r"shape of input_ids, \(3, 13\), got None"),
        (lambda cells: cells | {"expression_values": torch.ones(3, 12)}, r"got \(3, 12\)"),
        (lambda cells: cells | {"attention_mask": torch.ones(3)}, r"attention_mask must .*, got \(3,\)"),
        (lambda cells: cells | {"size_factors": torch.ones(2)}, r"size_factors must be 3 .*shape \(2,\)"),
        (lambda cells: cells | {"size_factors": torch.full((3,), torch.nan)}, "size_factors must be 3"),
    ],
)
def test_cells_that_cannot_be_are_refused(model, small_cells, change, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**change(small_cells()))


def test_a_hidden_gene_twice_is_no_repetition_and_padding_is_not_read(model, small_cells):
    cells = with_token(with_token(small_cells(), MASK), MASK)
    cells["input_ids"][1, 3] = MASK
    cells["input_ids"][1, 9:] = 99
    made = model.complete(**cells)
    assert made.is_generated.sum(dim=1).tolist() == [0, 2, 0]


def test_what_does_not_go_together_is_refused(model, conditional, small_network, small_cells):
    cells = small_cells()
    refusals = [
        (model.complete, {"n_genes": 5}, "Cell 0 has 12 genes and n_genes=5 are wanted; given genes stay"),
        (model.complete, {"n_genes": [12, 12]}, r"one number or 3, one per cell, got shape \(2,\)"),
        (model.complete, {"strength": 0.5}, "no setting 'strength'"),
        (model.impute, {}, "Pass is_masked .* or query_ids .*: one of the two"),
        (
            model.impute,
            {"is_masked": cells["input_ids"] > 4, "query_ids": torch.tensor([5])},
            "one of the two",
        ),
        (model.impute, {"is_masked": torch.ones(3, 4)}, r"shape of input_ids, \(3, 13\), got \(3, 4\)"),
        (model.impute, {"query_ids": torch.tensor([5])}, "This model has no gene-query decoder"),
        (conditional.impute, {"query_ids": torch.tensor([5, 2])}, "hold the token 2, which is no gene"),
        (conditional.impute, {"query_ids": torch.tensor([35])}, "hold the token 35, which is no gene"),
        (conditional.impute, {"query_ids": torch.tensor([5]), "stepz": 3}, "no setting 'stepz'"),
        (
            conditional.complete,
            {"guidance_scale": 2.0},
            "guidance_scale=2 sharpens conditions, and a cell has",
        ),
        (conditional.complete, {"condition_ids": torch.ones(3, 3)}, r"shape \(3, 2\), got \(3, 3\)"),
        (conditional.generate, {"condition_ids": torch.tensor([4, 0])}, r"is 4, and condition 0 has"),
        (small_network(value_head="scalar").complete, {}, "Pass ranking_weights=tokenizer.ranking_weights"),
    ]
    for method, arguments, message in refusals:
        with pytest.raises(ValueError, match=message):
            method(**cells, **arguments)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=2)))
def test_a_scalar_head_needs_ranking_weights_only_for_the_order(small_network, gene_weights, needs):
    model = small_network(value_head="scalar")
    options = dict(zip(("canonicalize", "rank_consistent"), needs, strict=True))
    if any(needs):
        with pytest.raises(ValueError, match="does not know the ranking weights"):
            model.generate(n_cells=2, n_genes=4, **options)
    else:
        assert model.generate(n_cells=2, n_genes=4, **options).order_violations is None
    made = model.generate(n_cells=2, n_genes=4, **options, ranking_weights=gene_weights.numpy())
    assert made.order_violations is not None


def test_a_wrong_kind_of_configuration_is_refused(model):
    with pytest.raises(TypeError, match="generation_config must be a ScDivaGenerationConfig, got dict"):
        model.generate(n_cells=1, n_genes=2, generation_config={"steps": 3})
