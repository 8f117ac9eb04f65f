"""Reconstruction of cells: hidden places, predictions cell by cell, refusals, and the protocol.

Needs: both packages, rapidfuzz, nltk; no files, no GPU.
Run: python -m pytest tests/test_reconstruction.py
"""

import anndata
import numpy as np
import pytest
import torch

from modeling_scdiva import ScDivaModel
from modeling_scdiva.evaluation.reconstruction import (
    MODEL,
    RANDOM_MODEL,
    evaluate_reconstruction,
    fit_baselines,
    reconstruction_figures,
    split_cells,
)
from modeling_scdiva.fresh_model import random_weights
from modeling_scdiva.metrics.reconstruction import copy_test
from modeling_scdiva.model_card import result_section
from modeling_scdiva.tasks.cells import read_cells
from modeling_scdiva.tasks.reconstruction import (
    copy_accuracy,
    hidden_places,
    masked_batches,
    predict_hidden,
    reconstruct_cells,
    repeat_cells,
)
from tokenization_scdiva import synthetic_cells

N_SPECIAL = 5


@pytest.fixture(scope="module")
def adata() -> anndata.AnnData:
    return synthetic_cells(n_cells=24, n_genes=120, seed=7)


# --- the task ---


def test_hidden_places_are_exact_nested_and_fixed():
    small, large = (hidden_places(40, ratio, seed=3, row=5) for ratio in (0.3, 0.7))
    assert small.sum() == 12
    assert large.sum() == 28
    assert (large | ~small).all()
    np.testing.assert_array_equal(small, hidden_places(40, 0.3, seed=3, row=5))
    assert (small != hidden_places(40, 0.3, seed=3, row=6)).any()
    assert (small != hidden_places(40, 0.3, seed=4, row=5)).any()
    assert hidden_places(3, 0.01, seed=0, row=0).sum() == 1
    assert hidden_places(0, 0.5, seed=0, row=0).sum() == 0
    with pytest.raises(ValueError, match=r"mask_ratio must lie in \(0, 1\], got 1.5"):
        hidden_places(3, 1.5, seed=0, row=0)


@pytest.mark.parametrize("masking_target", ["joint", "expression"])
@pytest.mark.parametrize("value_head", ["gene", "scalar"])
def test_batches_change_nothing_and_losses_are_those_of_the_model(
    adata, tokenizer, fresh_tiny_model, masking_target, value_head
):
    model = fresh_tiny_model(value_head=value_head)
    settings = {"model": model, "tokenizer": tokenizer, "masking_target": masking_target, "mask_ratio": 0.4}
    found = reconstruct_cells(adata, batch_size=5, **settings)
    again = reconstruct_cells(adata, batch_size=24, **settings)
    for name in ("positions", "true_genes", "true_values", "offsets"):
        np.testing.assert_array_equal(getattr(found, name), getattr(again, name))
    for name in ("gene_loss", "predicted_values"):
        np.testing.assert_allclose(getattr(found, name), getattr(again, name), atol=2e-4)
    cells = read_cells(adata, tokenizer=tokenizer)
    model.eval()
    for rows, batch in masked_batches(
        cells, mask_ratio=0.4, mask_token_id=1, masking_target=masking_target, batch_size=24
    ):
        with torch.no_grad():
            outputs = model(**batch)
        for place, row in enumerate(rows):
            part = slice(found.offsets[row], found.offsets[row + 1])
            squared = (found.true_values[part] - found.predicted_values[part]) ** 2
            assert squared.mean() == pytest.approx(float(outputs.cell_expression_loss[place]), rel=1e-3)
            if masking_target == "joint":
                expected = float(outputs.cell_gene_loss[place])
                assert found.gene_loss[part].mean() == pytest.approx(expected, rel=1e-4)
                assert found.cell_scores[row]["gene_loss"] == pytest.approx(expected, rel=1e-4)
            else:
                assert "gene_loss" not in found.cell_scores[row]


def test_true_genes_and_values_are_those_of_the_cell(adata, tokenizer, fresh_tiny_model):
    model = fresh_tiny_model()
    found = reconstruct_cells(adata, model=model, tokenizer=tokenizer, mask_ratio=1.0)
    cells = read_cells(adata, tokenizer=tokenizer)
    np.testing.assert_array_equal(found.true_genes, cells.token_ids)
    np.testing.assert_array_equal(found.true_values, cells.values)
    np.testing.assert_array_equal(found.offsets, cells.offsets)


def test_logits_everywhere_give_the_same(adata, tokenizer, fresh_tiny_model):
    sparse = fresh_tiny_model()
    dense = fresh_tiny_model(sparse_prediction=False)
    dense.load_state_dict(sparse.state_dict())
    found = [
        reconstruct_cells(adata, model=model, tokenizer=tokenizer, mask_ratio=0.3).gene_loss
        for model in (sparse, dense)
    ]
    np.testing.assert_allclose(*found, atol=1e-4)


def test_copying_is_seen_where_it_happens(adata, tokenizer, fresh_tiny_model):
    """A network whose gene head is its gene table, and whose layers do nothing, repeats what it sees."""
    model = fresh_tiny_model()
    cells = read_cells(adata, tokenizer=tokenizer)
    (_, batch) = next(masked_batches(cells, mask_ratio=0.5, mask_token_id=1, batch_size=24))
    assert copy_accuracy(model, batch).mean() < 0.2
    inputs, outputs = repeat_cells(cells, model=model, rows=np.array([3, 0]))
    np.testing.assert_array_equal(inputs[0], cells.token_ids[cells.offsets[3] : cells.offsets[4]])
    assert all((genes >= N_SPECIAL).all() for genes in outputs)

    class Repeat(torch.nn.Module):
        def __init__(self, rows):
            super().__init__()
            self.rows = rows

        def forward(self, states):
            return states @ self.rows.T

    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.value_embedding.out_proj.weight.zero_()
        model.model.value_embedding.out_proj.bias.zero_()
        normal = model.model.norm(model.model.embed_tokens.weight)
        model.gene_transform = torch.nn.Identity()
        model.lm_head = Repeat(torch.nn.functional.normalize(normal, dim=-1))
    np.testing.assert_allclose(copy_accuracy(model, batch), 1.0)
    inputs, outputs = repeat_cells(cells, model=model, rows=np.arange(10))
    assert copy_test(inputs, outputs)["copy_edit_distance"] == 0


def test_what_cannot_be_reconstructed_is_refused(adata, tokenizer, fresh_tiny_model):
    model = fresh_tiny_model()
    encoder = ScDivaModel(model.config)
    with pytest.raises(TypeError, match="got ScDivaModel, which has no gene head"):
        reconstruct_cells(adata, model=encoder, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="joint, expression, got 'both'"):
        reconstruct_cells(adata, model=model, tokenizer=tokenizer, masking_target="both")
    with pytest.raises(TypeError, match="got a path"):
        reconstruct_cells("cells.h5ad", model=model, tokenizer=tokenizer)


# --- the protocol ---


def test_splits_keep_groups_together(adata):
    fit, score = split_cells(adata, seed=1)
    assert len(score) == 7
    assert sorted([*fit, *score]) == list(range(24))
    fit, score = split_cells(adata, "donor_id", seed=1)
    donors = adata.obs["donor_id"].to_numpy()
    assert set(donors[fit]).isdisjoint(donors[score])
    with pytest.raises(KeyError, match=r"no column 'nope'.*cell_type"):
        split_cells(adata, "nope")
    with pytest.raises(ValueError, match="'type_0'"):
        split_cells(adata[adata.obs["cell_type"] == "type_0"], "cell_type")
    with pytest.raises(ValueError, match="test_fraction must lie"):
        split_cells(adata, test_fraction=1.0)


def test_random_weights_are_seeded_and_know_the_gene_weights(fresh_tiny_model):
    model = fresh_tiny_model()
    state = torch.random.get_rng_state()
    first, second, other = (random_weights(model, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.random.get_rng_state())
    torch.testing.assert_close(first.state_dict(), second.state_dict())
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert torch.equal(first.value_head.gene_weights, model.value_head.gene_weights)


def test_evaluation_gives_rows_of_everything(adata, tokenizer, fresh_tiny_model, tmp_path):
    from modeling_scdiva.evaluation import write_result

    result = evaluate_reconstruction(
        adata,
        model=fresh_tiny_model(),
        tokenizer=tokenizer,
        name="toy",
        mask_ratios=(0.3, 0.9),
        seeds=(0, 1),
        max_test_cells=5,
    )
    assert {row["method"] for row in result["numbers"]} == {MODEL}
    of_ratio = [row for row in result["baselines"] if row["data"] == "toy, 30 % hidden"]
    assert {row["method"] for row in of_ratio} == {
        RANDOM_MODEL, "unigram", "rank unigram", "lattice unigram", "lattice rank unigram",
        "lattice counts", "gene mean", "rank score", "neighbour score",
    }  # fmt: skip
    legacy = [row for row in result["baselines"] if "legacy copy test" in row["data"]]
    by_method = {row["method"]: row for row in legacy}
    assert by_method["repeat the next gene"]["copy_edit_distance"] <= 6
    assert "gene_loss" not in by_method["repeat the next gene"]
    losses = result["details"]["gene_loss"]
    assert all(len(curve) == 2 for curve in losses.values())
    assert losses["lattice counts"][0] < losses["unigram"][0]
    figures = reconstruction_figures(result)
    path = write_result(result, tmp_path / "result.json", "reconstruction", figures, ["run"])
    table = result_section(path)
    assert "| **scDiVa** |" in table
    assert (tmp_path / "result_gene_loss.png").stat().st_size > 5_000
    with pytest.raises(ValueError, match="seeds is empty"):
        evaluate_reconstruction(adata, model=fresh_tiny_model(), tokenizer=tokenizer, seeds=())


def test_baselines_do_not_know_the_scored_cells(adata, tokenizer):
    fit, score = split_cells(adata, seed=0)
    before = fit_baselines(read_cells(adata[fit], tokenizer=tokenizer), tokenizer=tokenizer)
    changed = adata.copy()
    counts = changed.X.toarray()
    counts[score] = counts[score][:, ::-1]
    changed.X = type(adata.X)(counts)
    after = fit_baselines(read_cells(changed[fit], tokenizer=tokenizer), tokenizer=tokenizer)
    assert torch.equal(before.gene_mean, after.gene_mean)
    assert torch.equal(before.gene_tables["rank_unigram"], after.gene_tables["rank_unigram"])


def test_predictions_of_a_batch_come_cell_by_cell(adata, tokenizer, fresh_tiny_model):
    model = fresh_tiny_model()
    cells = read_cells(adata, tokenizer=tokenizer)
    rows, batch = next(masked_batches(cells, mask_ratio=0.5, mask_token_id=1, batch_size=8))
    entries = list(predict_hidden(model, batch))
    assert len(entries) == len(rows) == 8
    for place, entry in enumerate(entries):
        np.testing.assert_array_equal(entry["positions"], batch["is_masked"][place].nonzero()[:, 0])
        np.testing.assert_array_equal(entry["true_genes"], batch["labels"][place, entry["positions"]])
