"""`ScDivaForPerturbation`: the `<pert>` position, any gene out, losses by hand, strict loading, exact saving.

Needs no data. Run: pytest tests/test_perturbation_network.py
"""

import numpy as np
import pytest
import torch

from modeling_scdiva import ScDivaModel
from modeling_scdiva.tasks.perturbation_network import (
    RANKING_LOSS_WEIGHT,
    ScDivaForPerturbation,
    add_pert_token,
    de_ranking_loss,
)

LAT, PERT, PAD = 2, 4, 0


@pytest.fixture(scope="module")
def folder(fresh_tiny_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("pretrained")
    fresh_tiny_model().save_pretrained(path)
    return path


@pytest.fixture
def model(folder):
    return ScDivaForPerturbation.from_pretrained(folder)


def cells(n_cells=3, n_genes=6, seed=0):
    rng = np.random.default_rng(seed)
    input_ids = np.stack([[LAT, *rng.permutation(np.arange(5, 60))[:n_genes]] for _ in range(n_cells)])
    values = rng.random(input_ids.shape).astype(np.float32)
    ids, shown = add_pert_token(torch.from_numpy(input_ids), torch.from_numpy(values), pert_token_id=PERT)
    return {"input_ids": ids, "expression_values": shown}


def deltas(model, **kwargs):
    with torch.no_grad():
        return model(**kwargs).expression_deltas


def test_pert_token_goes_behind_lat():
    ids, values, mask = add_pert_token(
        torch.tensor([[LAT, 7, PAD]]),
        torch.tensor([[0.0, 1.5, 0.0]]),
        torch.tensor([[1, 1, 0]]),
        pert_token_id=PERT,
    )
    assert ids.tolist() == [[LAT, PERT, 7, PAD]]
    assert values.tolist() == [[0.0, 0.0, 1.5, 0.0]]
    assert mask.tolist() == [[1, 1, 1, 0]]


def test_any_gene_can_be_asked_for(model):
    inputs = cells() | {"target_ids": torch.tensor([[9], [10], [11]])}
    every = deltas(model, **inputs, gene_ids=torch.arange(5, model.config.vocab_size))
    assert every.shape == (3, model.config.vocab_size - 5)
    assert every.dtype == torch.float32
    some = deltas(model, **inputs, gene_ids=torch.tensor([70, 8]))
    torch.testing.assert_close(some, every[:, [65, 3]])
    assert every.std(dim=1).min() > 0


def test_pert_embedding_is_token_plus_mean_of_targets(model):
    inputs = cells(1)
    embeddings = model.model.embed_tokens.weight
    found = model._embed_perturbation(inputs["input_ids"], torch.tensor([[9, 20, PAD]]))
    expected = embeddings[inputs["input_ids"]].clone()
    expected[0, 1] = embeddings[PERT] + (embeddings[9] + embeddings[20]) / 2
    torch.testing.assert_close(found, expected)
    bare = model._embed_perturbation(inputs["input_ids"], torch.tensor([[PAD]]))
    torch.testing.assert_close(bare, embeddings[inputs["input_ids"]])


def test_targets_are_a_set(model):
    genes = torch.arange(5, 30)
    one = deltas(model, **cells(1), target_ids=torch.tensor([[9, 20]]), gene_ids=genes)
    other = deltas(model, **cells(1), target_ids=torch.tensor([[20, PAD, 9]]), gene_ids=genes)
    torch.testing.assert_close(one, other)
    single = deltas(model, **cells(1), target_ids=torch.tensor([[9]]), gene_ids=genes)
    assert (one - single).abs().max() > 1e-6
    nothing = deltas(model, **cells(1), gene_ids=genes)
    torch.testing.assert_close(
        nothing, deltas(model, **cells(1), target_ids=torch.zeros(1, 2, dtype=int), gene_ids=genes)
    )


def test_genes_keep_the_positions_of_pretraining(model):
    inputs = cells(1)
    positions = torch.tensor([[0, 0, 1, 2, 3, 4, 5, 6]])
    expected = deltas(model, **inputs, position_ids=positions, gene_ids=torch.arange(5, 15))
    torch.testing.assert_close(deltas(model, **inputs, gene_ids=torch.arange(5, 15)), expected)


def test_padding_and_neighbours_change_nothing(model):
    inputs, genes = cells(2), torch.arange(5, 30)
    targets = torch.tensor([[9], [30]])
    expected = deltas(model, **inputs, target_ids=targets, gene_ids=genes)
    ids = torch.nn.functional.pad(inputs["input_ids"], (0, 4), value=PAD)
    values = torch.nn.functional.pad(inputs["expression_values"], (0, 4), value=3.0)
    padded = deltas(model, input_ids=ids, expression_values=values, target_ids=targets, gene_ids=genes)
    torch.testing.assert_close(padded, expected)
    alone = {name: tensor[1:] for name, tensor in inputs.items()}
    torch.testing.assert_close(deltas(model, **alone, target_ids=targets[1:], gene_ids=genes), expected[1:])


def test_mean_change_is_the_start(model):
    genes = torch.arange(5, 30)
    before = deltas(model, **cells(), gene_ids=genes)
    model.set_mean_deltas([6, 8], [0.5, -1.0])
    shift = torch.zeros(25)
    shift[1], shift[3] = 0.5, -1.0
    torch.testing.assert_close(deltas(model, **cells(), gene_ids=genes), before + shift)
    model.set_mean_deltas([7], [1.0])
    assert model.delta_decoder.mean_deltas.count_nonzero() == 1
    with pytest.raises(ValueError, match=r"one finite change per gene, got \(1,\) for \(2,\) genes"):
        model.set_mean_deltas([6, 8], [0.5])


def test_losses_by_hand(model):
    inputs, genes = cells(), torch.arange(5, 9)
    found = deltas(model, **inputs, gene_ids=genes)
    labels, weights = torch.randn(3, 4), torch.tensor([1.0, 2.0, 0.0, 1.0])
    is_de = torch.tensor([[True, False, False, False]] * 3)
    outputs = model(**inputs, gene_ids=genes, delta_labels=labels, gene_weights=weights, is_de=is_de)
    expected = (weights * (found - labels) ** 2).mean()
    torch.testing.assert_close(outputs.delta_loss, expected)
    pairs = [
        torch.nn.functional.softplus((found[cell, other].abs() - found[cell, 0].abs()) / 0.1)
        for cell in range(3)
        for other in (1, 2, 3)
    ]
    torch.testing.assert_close(outputs.ranking_loss, torch.stack(pairs).mean())
    torch.testing.assert_close(outputs.loss, expected + RANKING_LOSS_WEIGHT * outputs.ranking_loss)
    plain = model(**inputs, gene_ids=genes, delta_labels=labels)
    assert plain.ranking_loss is None
    torch.testing.assert_close(plain.loss, ((found - labels) ** 2).mean())


def test_ranking_loss_without_pairs_is_zero():
    assert de_ranking_loss(torch.randn(2, 3), torch.tensor([[True] * 3, [False] * 3])) == 0.0
    good = de_ranking_loss(torch.tensor([[-2.0, 0.1]]), torch.tensor([[True, False]]))
    bad = de_ranking_loss(torch.tensor([[-2.0, 0.1]]), torch.tensor([[False, True]]))
    assert good < 1e-6 < 10 < bad


def test_gradients_reach_every_parameter(model):
    inputs = cells() | {"target_ids": torch.tensor([[9], [10], [11]]), "gene_ids": torch.arange(5, 20)}
    is_masked = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    is_masked[:, -1] = True  # so that the vector of hidden values takes part
    is_de = torch.rand(3, 15, generator=torch.Generator().manual_seed(0)) < 0.5
    model(**inputs, is_masked=is_masked, delta_labels=torch.randn(3, 15), is_de=is_de).loss.backward()
    silent = [
        name for name, part in model.named_parameters() if part.grad is None or not part.grad.abs().any()
    ]
    assert silent == []


def test_loads_from_a_diffusion_checkpoint_with_a_fresh_head_alone(folder, model, fresh_tiny_model):
    torch.testing.assert_close(
        model.model.embed_tokens.weight, ScDivaModel.from_pretrained(folder).embed_tokens.weight
    )
    assert not model.delta_decoder.mean_deltas.any()
    assert model.delta_decoder.query_decoder.dense.weight.std() > 0


def test_other_missing_weights_are_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    ScDivaForPerturbation.from_pretrained(folder).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = {name: tensor for name, tensor in weights.items() if "query_decoder.dense" not in name}
    save_file(lost, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"missing: delta_decoder\.query_decoder\.dense\.bias"):
        ScDivaForPerturbation.from_pretrained(tmp_path)


def test_saves_and_loads_exactly(model, tmp_path):
    model.set_mean_deltas([6, 8], [0.5, -1.0])
    model.save_pretrained(tmp_path)
    again = ScDivaForPerturbation.from_pretrained(tmp_path)
    inputs = cells() | {"target_ids": torch.tensor([[9], [10], [11]]), "gene_ids": torch.arange(5, 20)}
    assert torch.equal(deltas(model, **inputs), deltas(again, **inputs))


def test_a_gene_query_decoder_of_pretraining_is_left_aside(fresh_tiny_model, tmp_path):
    fresh_tiny_model(latent_loss_weight=0.1).save_pretrained(tmp_path)
    assert ScDivaForPerturbation.from_pretrained(tmp_path).config.latent_loss_weight == 0.1


def test_dummy_inputs_run(model):
    assert deltas(model, **model.dummy_inputs).shape == (1, 2)


def test_refusals(model):
    genes = torch.arange(5, 9)
    without = {"input_ids": torch.tensor([[LAT, 7, 8]]), "expression_values": torch.ones(1, 3)}
    with pytest.raises(ValueError, match=r"needs the token 4 \(`<pert>`\) once, at position 1"):
        model(**without, gene_ids=genes)
    with pytest.raises(ValueError, match=r"needs the token 4"):
        model(input_ids=torch.tensor([[LAT, PERT, PERT]]), expression_values=torch.ones(1, 3), gene_ids=genes)
    with pytest.raises(ValueError, match="gene_ids did not come"):
        model(**cells())
    with pytest.raises(ValueError, match="input_ids did not come"):
        model(expression_values=torch.ones(1, 3), gene_ids=genes)
