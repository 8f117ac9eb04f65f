"""Switches of the network that ablations turn: the anchor, rotary positions, normalised embeddings.

Needs no data. Run: pytest tests/test_network_switches.py
"""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError

from modeling_scdiva import ScDivaConfig, ScDivaModel

LAT = 2
GENES, VALUES = torch.tensor([[LAT, 7, 8, 9]]), torch.tensor([[0.0, 3.0, 2.0, 1.0]])


def network(**switches) -> ScDivaModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return ScDivaModel(ScDivaConfig(**sizes, intermediate_size=48, **switches)).eval()


def states_of(model, tokens=GENES, values=VALUES) -> torch.Tensor:
    return model(tokens, values).last_hidden_state.detach()


def test_without_the_anchor_no_gene_sees_it():
    moves = []
    for switches in ({}, {"use_anchor": False, "cell_pooling": "mean"}):
        model = network(**switches)
        before = states_of(model)
        with torch.no_grad():
            model.embed_tokens.weight[LAT] += torch.randn(32)
        moves.append((states_of(model) - before)[:, 1:].abs().max())
    assert moves[0] > 1e-3
    assert moves[1] == 0.0


@pytest.mark.parametrize("changes", [{}, {"cell_pooling": "mean", "latent_loss_weight": 1.0}])
def test_what_reads_the_anchor_needs_it(changes):
    with pytest.raises(
        StrictDataclassClassValidationError, match="use_anchor=False leaves the anchor without a cell"
    ):
        network(use_anchor=False, **changes)


def test_without_rotary_positions_a_cell_is_a_set():
    order = torch.tensor([0, 3, 1, 2])
    moves = []
    for switches in ({}, {"use_rotary_positions": False}):
        model = network(**switches)
        moved = states_of(model, GENES[:, order], VALUES[:, order]) - states_of(model)[:, order]
        moves.append(moved.abs().max())
    assert moves[0] > 1e-3
    assert moves[1] < 1e-5


def test_normalised_embeddings_share_a_token_evenly():
    others = torch.tensor([[LAT, 17, 18, 19]])
    moves = {}
    for is_normalised in (False, True):
        model = network(normalize_embeddings=is_normalised)
        states = []
        for _ in range(2):  # values ever louder, as training makes them
            with torch.no_grad():
                for parameter in model.value_embedding.out_proj.parameters():
                    parameter.mul_(100.0)
            states.append([states_of(model, tokens) for tokens in (GENES, others)])
        moves[is_normalised] = [(one - other).norm() for one, other in states]
    torch.testing.assert_close(states[1][0], states[0][0], rtol=0.0, atol=1e-3)
    assert moves[False][1] < 0.1 * moves[False][0]  # the genes are drowned
    assert moves[True][1] > 0.9 * moves[True][0]
