"""Models with random weights, and models that go on from a checkpoint.

Tiny networks on CPU. Run: pytest tests/test_fresh_model.py
"""

import pytest
import torch

from modeling_scdiva.fresh_model import random_weights, take_weights


@pytest.fixture
def checkpoint(fresh_tiny_model, tmp_path):
    model = fresh_tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)  # no fresh model has these weights
    model.save_pretrained(tmp_path)
    return tmp_path


def test_takes_every_weight_of_the_same_network(fresh_tiny_model, checkpoint):
    model = fresh_tiny_model()
    assert take_weights(model, checkpoint) == []
    for name, weights in fresh_tiny_model().state_dict().items():
        if name != "value_head.gene_weights":
            torch.testing.assert_close(model.state_dict()[name], weights + 0.01)


def test_parts_that_are_new_stay_random_and_are_named(fresh_tiny_model, checkpoint):
    model = fresh_tiny_model(conditions={"cell_type": ["a", "b"]}, quality_head=True, latent_loss_weight=1.0)
    before = model.model.condition_embedding.embedding.weight.clone()
    assert take_weights(model, checkpoint) == ["condition_embedding", "quality_head", "query_decoder"]
    torch.testing.assert_close(model.model.condition_embedding.embedding.weight, before)


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": 64}, {"num_hidden_layers": 3}, {"objective": "elbo"}, {"value_head": "scalar"}],
)
def test_another_network_is_refused(fresh_tiny_model, checkpoint, changes):
    with pytest.raises(ValueError, match="has another network"):
        take_weights(fresh_tiny_model(**changes), checkpoint)


def test_another_vocabulary_is_refused(fresh_tiny_model, checkpoint):
    model = fresh_tiny_model()
    model.config.vocabulary_hash = "0" * 64
    with pytest.raises(ValueError, match="another gene"):
        take_weights(model, checkpoint)


def test_random_weights_have_the_same_shape_and_leave_the_generator_alone(fresh_tiny_model):
    model = fresh_tiny_model()
    state = torch.random.get_rng_state()
    other = random_weights(model, seed=7)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {name: w.shape for name, w in other.state_dict().items()} == {
        name: w.shape for name, w in model.state_dict().items()
    }
    assert not torch.equal(other.lm_head.weight, model.lm_head.weight)
    assert torch.equal(other.value_head.gene_weights, model.value_head.gene_weights)
