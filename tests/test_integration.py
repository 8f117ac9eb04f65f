"""Integration: losses against second implementations, labels never read without being asked, provenance.

Needs: peft; no real data. Run: pytest tests/test_integration.py
"""

import dataclasses
import math
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from torch.nn import functional

from modeling_scdiva import ScDivaModel
from modeling_scdiva.adapters import make_trainable
from modeling_scdiva.tasks.cells import read_cells
from modeling_scdiva.tasks.embedding import embed_cells
from modeling_scdiva.tasks.integration import integrate_batches
from modeling_scdiva.tasks.integration_network import (
    VALIDATION_STREAM,
    CellViews,
    GradientReversal,
    IntegrationArguments,
    IntegrationModel,
    contrastive_loss,
    corrupt_cells,
    reversal_strength,
)
from tokenization_scdiva import synthetic_cells

SHORT = IntegrationArguments(
    n_epochs=2, batch_size=16, learning_rate=3e-3, projection_size=8, lora_rank=2, n_last_layers=1
)
KEY, INFORMED_KEY = "X_scdiva_integrated", "X_scdiva_integrated_label_informed"


@pytest.fixture
def adata():
    cells = synthetic_cells(n_cells=48, n_genes=120, seed=7)
    cells.obs["cell_type"] = cells.obs["cell_type"].astype("category")
    return cells


def integrate(adata, model, tokenizer, **changes):
    arguments = {"batch_key": "donor_id", "arguments": SHORT, "show_progress": False} | changes
    return integrate_batches(adata, model=model, tokenizer=tokenizer, **arguments)


# Losses


def unit_vectors(n_views, width=5, seed=0):
    rng = np.random.default_rng(seed)
    return functional.normalize(torch.tensor(rng.normal(size=(n_views, width))), dim=1)


def test_contrastive_loss_by_hand():
    # Two cells, two views each, cosines 1 inside a cell and 0 between: -log(e / (e + 2)) for every view.
    projections = torch.eye(2).repeat_interleave(2, dim=0)
    found = contrastive_loss(projections, torch.tensor([0, 0, 1, 1]), temperature=1.0)
    assert float(found) == pytest.approx(-math.log(math.e / (math.e + 2)))


def test_one_class_per_cell_is_nt_xent():
    projections = unit_vectors(12)
    cosines = projections @ projections.T / 0.1
    cosines.fill_diagonal_(-torch.inf)
    partner = torch.arange(12) ^ 1  # views 2i and 2i + 1 belong together
    expected = functional.cross_entropy(cosines, partner)
    found = contrastive_loss(projections, torch.arange(6).repeat_interleave(2), temperature=0.1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("with_groups", [False, True])
def test_contrastive_loss_equals_loops(with_groups):
    projections = unit_vectors(10, seed=3).numpy()
    classes = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 3])  # the last one has no positive
    groups = np.array([0, 1, 0, 1, 0, 1, 0, 1, 0, 1])
    losses = []
    for anchor in range(10):
        others = [other for other in range(10) if other != anchor]
        positives = [other for other in others if classes[other] == classes[anchor]]
        if with_groups:
            others = [o for o in others if groups[o] == groups[anchor] or classes[o] == classes[anchor]]
        weights = {other: np.exp(projections[anchor] @ projections[other] / 0.2) for other in others}
        if positives:
            losses.append(np.mean([-np.log(weights[p] / sum(weights.values())) for p in positives]))
    found = contrastive_loss(
        torch.from_numpy(projections),
        torch.from_numpy(classes),
        temperature=0.2,
        groups=torch.from_numpy(groups) if with_groups else None,
    )
    assert float(found) == pytest.approx(np.mean(losses))


def test_reversal_ramp():
    assert reversal_strength(0.0) == 0.0
    assert reversal_strength(0.1) == pytest.approx(math.tanh(0.5))  # 2 / (1 + e^-x) - 1 = tanh(x / 2)
    assert reversal_strength(1.0) == pytest.approx(0.9999, abs=1e-4)


def test_gradient_is_reversed_behind_the_discriminator_only():
    states = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 1, 0])
    plain = torch.autograd.grad(functional.cross_entropy(states @ weight, labels), (states, weight))
    strength = torch.tensor([[0.0], [0.25], [0.5], [1.0]], dtype=torch.float64)
    loss = functional.cross_entropy(GradientReversal.apply(states, strength) @ weight, labels)
    reversed_ = torch.autograd.grad(loss, (states, weight))
    torch.testing.assert_close(reversed_[0], -strength * plain[0])
    torch.testing.assert_close(reversed_[1], plain[1])


# Corruption


def test_corruption_by_hand():
    clean = {
        "input_ids": torch.tensor([[2, 10, 11, 12], [2, 20, 0, 0]]),
        "expression_values": torch.tensor([[0.0, 3.0, 2.0, 1.0], [0.0, 4.0, 0.0, 0.0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
    }
    coins = np.array([[[2, 0.1, 0.9, 0.2], [2, 0.8, 0.7, 0.9]], [[2, 0.9, 2, 2], [2, 0.1, 2, 2]]])
    times, kept_shares = np.full((2, 2), 0.3), np.array([[1.0, 0.5], [1.0, 0.1]])
    found = corrupt_cells(clean, times, kept_shares, coins, mask_token_id=1)
    expected_masks = [[[0, 1, 0, 1], [0, 0, 1, 0]], [[0, 1, 0, 0], [0, 1, 0, 0]]]  # at least one a view
    assert found["is_masked"].int().tolist() == expected_masks
    assert found["input_ids"].tolist() == [
        [[2, 1, 11, 1], [2, 10, 1, 12]],
        [[2, 1, 0, 0], [2, 1, 0, 0]],
    ]
    assert found["labels"].tolist()[0] == [[-100, 10, -100, 12], [-100, -100, 11, -100]]
    np.testing.assert_allclose(found["expression_values"][0, 0], [0, 0, 2, 0])
    np.testing.assert_allclose(
        found["expression_values"][0, 1], [0, np.log1p(0.5 * np.expm1(3)), 0, np.log1p(0.5 * np.expm1(1))],
        rtol=1e-6,
    )  # fmt: skip
    np.testing.assert_array_equal(found["expression_labels"][0, 1], clean["expression_values"][0])


def make_views(adata, tokenizer, **changes):
    cells = read_cells(adata, tokenizer=tokenizer)
    codes = np.arange(cells.n_cells)
    arguments = dataclasses.replace(SHORT, **changes)
    return CellViews(cells, codes % 2, codes, tokenizer.mask_token_id, arguments)


def test_a_cell_is_corrupted_alike_in_any_company(adata, tokenizer):
    views = make_views(adata, tokenizer)
    together = views.batch(np.arange(12), epoch=1)
    for row in (0, 5, 11):
        alone = views.batch(np.array([row]), epoch=1)
        width = alone["input_ids"].shape[2]
        for name in ("input_ids", "expression_values", "is_masked", "labels"):
            torch.testing.assert_close(together[name][row, :, :width], alone[name][0], rtol=0, atol=0)
    assert not torch.equal(together["input_ids"], views.batch(np.arange(12), epoch=0)["input_ids"])
    assert not torch.equal(together["input_ids"][:, 0], together["input_ids"][:, 1])


def test_shares_hidden_and_kept_lie_in_their_ranges(adata, tokenizer):
    views = make_views(adata, tokenizer, masking_range=(0.4, 0.5), depth_range=(0.2, 0.4))
    batch = views.batch(np.arange(48), epoch=0)
    is_gene = batch["attention_mask"].bool() & (torch.arange(batch["attention_mask"].shape[2]) > 0)
    hidden = float(batch["is_masked"].sum() / is_gene.sum())
    assert hidden == pytest.approx(0.45, abs=0.03)
    is_seen = is_gene & ~batch["is_masked"]
    kept = torch.expm1(batch["expression_values"][is_seen]) / torch.expm1(batch["expression_labels"][is_seen])
    assert 0.199 < float(kept.min()) < 0.25
    assert 0.35 < float(kept.max()) < 0.401


# Network


def make_network(model, arguments=SHORT):
    torch.manual_seed(0)
    width = model.config.hidden_size
    return IntegrationModel(model, hidden_size=width, n_batches=2, arguments=arguments).eval()


def test_reconstruction_loss_is_the_checkpoint_s_own(adata, tokenizer, fresh_tiny_model):
    model = fresh_tiny_model().eval()
    batch = make_views(adata, tokenizer).batch(np.arange(6), epoch=0)
    losses = make_network(model)(**batch)
    names = ("input_ids", "expression_values", "attention_mask", "is_masked", "labels", "expression_labels")
    own = [model(**{name: batch[name][:, view] for name in names}).loss for view in (0, 1)]
    torch.testing.assert_close(losses["reconstruction_loss"], sum(own) / 2)
    total = sum(losses[f"{name}_loss"] for name in ("reconstruction", "adversarial", "contrastive"))
    torch.testing.assert_close(losses["loss"], total)


@pytest.mark.parametrize("pooling", ["lat", "mean"])
def test_weights_and_gradients_of_each_loss(adata, tokenizer, fresh_tiny_model, pooling):
    batch = make_views(adata, tokenizer).batch(np.arange(8), epoch=1)
    reached = {}
    for name in ("reconstruction", "adversarial", "contrastive"):
        others = {f"{other}_weight": 0.0 for other in ("reconstruction", "adversarial", "contrastive")}
        weights = others | {f"{name}_weight": 2.0}
        network = make_network(fresh_tiny_model(), dataclasses.replace(SHORT, pooling=pooling, **weights))
        losses = network(**batch)
        torch.testing.assert_close(losses["loss"], 2 * losses[f"{name}_loss"])
        losses["loss"].backward()
        reached[name] = {
            part
            for part in ("discriminator", "projection", "backbone.model", "backbone.value_head")
            if any(
                parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
                for place, parameter in network.named_parameters()
                if place.startswith(part)
            )
        }
    assert reached == {
        "reconstruction": {"backbone.model", "backbone.value_head"},
        "adversarial": {"discriminator", "backbone.model"},
        "contrastive": {"projection", "backbone.model"},
    }


def test_adversarial_training_unlearns_the_batch_and_keeps_the_type(tokenizer, fresh_tiny_model):
    adata = synthetic_cells(n_cells=96, n_genes=120, seed=7)
    is_second = np.arange(96) // 4 % 2 == 1  # types come in turn: both batches have all of them
    dense = adata.X.toarray()
    dense[is_second, :40] *= 6  # a batch effect on 40 genes
    adata = ad.AnnData(dense, obs=adata.obs, var=adata.var)
    adata.obs["plate"] = np.where(is_second, "second", "first")
    model = fresh_tiny_model(hidden_dropout=0.0)
    gaps, accuracies = [], []
    for weight in (0.0, 1.0):
        arguments = dataclasses.replace(
            SHORT, n_epochs=20, batch_size=32, learning_rate=2e-3, lora_rank=4, validation_fraction=0.0,
            pooling="mean", max_genes=24, adversarial_weight=weight,
        )  # fmt: skip
        vectors = integrate(adata, model, tokenizer, batch_key="plate", arguments=arguments).embeddings
        vectors = (vectors - vectors.mean(axis=0)) / vectors.std(axis=0)
        gaps.append(np.linalg.norm(vectors[is_second].mean(axis=0) - vectors[~is_second].mean(axis=0)))
        classifier = LogisticRegression(max_iter=500)
        accuracies.append(cross_val_score(classifier, vectors, adata.obs["cell_type"], cv=4).mean())
    assert gaps[1] < 0.85 * gaps[0]
    assert accuracies[1] > accuracies[0] - 0.05
    assert accuracies[1] > 0.75


# The task


def test_writes_embedding_and_provenance(adata, tokenizer, fresh_tiny_model, tmp_path):
    model = fresh_tiny_model()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adata.uns["scdiva"] = {"earlier": "kept"}
    torch_state = torch.random.get_rng_state()
    found = integrate(adata, model, tokenizer)
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert found.obsm_key == KEY
    np.testing.assert_array_equal(adata.obsm[KEY], found.embeddings)
    assert found.embeddings.shape == (48, 32)
    assert found.embeddings.dtype == np.float32
    # The model that came is as it was; the one that is returned makes this embedding.
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    again = embed_cells(adata, model=found.model, tokenizer=tokenizer, show_progress=False)
    np.testing.assert_array_equal(again, found.embeddings)
    frozen = embed_cells(adata, model=model, tokenizer=tokenizer, show_progress=False)
    assert np.abs(found.embeddings - frozen).max() > 1e-3
    assert [line["epoch"] for line in found.history] == [1, 2]
    assert {"reconstruction_loss", "adversarial_loss", "contrastive_loss", "score"} <= set(found.history[0])

    adata.write_h5ad(tmp_path / "integrated.h5ad")
    stored = ad.read_h5ad(tmp_path / "integrated.h5ad").uns["scdiva"]
    assert stored["earlier"] == "kept"
    assert stored["integration"]["mode"] == "label_free"
    assert not stored["integration"]["labels_seen"]
    assert stored["integration"]["batch_key"] == "donor_id"
    assert stored["integration"]["label_key"] == "none"
    assert stored["integration"]["arguments"]["temperature"] == SHORT.temperature


def test_validation_mixes_batches_that_lie_apart_in_the_file(adata, tokenizer, fresh_tiny_model, monkeypatch):
    """States are standardised within what is scored at once: one batch alone would look like none."""
    asked, batch = [], CellViews.batch

    def watch(self, rows, epoch):
        if epoch == VALIDATION_STREAM:
            asked.append(rows)
        return batch(self, rows, epoch)

    monkeypatch.setattr(CellViews, "batch", watch)
    adata.obs["plate"] = ["first"] * 24 + ["second"] * 24
    arguments = dataclasses.replace(SHORT, n_epochs=1, batch_size=12, validation_fraction=0.5)
    integrate(adata, fresh_tiny_model(), tokenizer, batch_key="plate", arguments=arguments)
    assert [len(rows) for rows in asked] == [12, 12]
    assert all(0 < (rows < 24).sum() < 12 for rows in asked)


def test_label_free_mode_never_reads_labels(adata, tokenizer, fresh_tiny_model):
    model = fresh_tiny_model()
    expected = integrate(adata, model, tokenizer)
    permuted, without = adata.copy(), adata.copy()
    permuted.obs["cell_type"] = np.random.default_rng(0).permutation(permuted.obs["cell_type"])
    del without.obs["cell_type"]
    for other in (permuted, without):
        found = integrate(other, model, tokenizer)
        np.testing.assert_array_equal(found.embeddings, expected.embeddings)
        assert found.history == expected.history  # early stopping included


def test_label_informed_mode_is_named_and_reads_them(adata, tokenizer, fresh_tiny_model):
    model = fresh_tiny_model()
    informed = {"mode": "label_informed", "label_key": "cell_type"}
    found = integrate(adata, model, tokenizer, **informed)
    assert found.obsm_key == INFORMED_KEY
    assert KEY not in adata.obsm
    assert adata.uns["scdiva"]["integration"]["mode"] == "label_informed"
    assert adata.uns["scdiva"]["integration"]["labels_seen"]
    permuted = adata.copy()
    permuted.obs["cell_type"] = np.random.default_rng(0).permutation(permuted.obs["cell_type"])
    other = integrate(permuted, model, tokenizer, **informed)
    assert np.abs(other.embeddings - found.embeddings).max() > 1e-4


def test_unlabelled_cells_are_label_free_in_label_informed_mode(adata, tokenizer, fresh_tiny_model):
    model = fresh_tiny_model()
    labels = adata.obs["cell_type"].astype(object)
    labels[4:] = "Unknown"
    labels[:4] = ["a", "b", "c", "d"]  # one cell each: no two cells of one type are left
    adata.obs["sparse"] = labels
    informed = integrate(adata, model, tokenizer, mode="label_informed", label_key="sparse")
    np.testing.assert_array_equal(informed.embeddings, integrate(adata, model, tokenizer).embeddings)


@pytest.mark.parametrize("trainable", ["full", "last_layers"])
def test_other_trainable_parts(adata, tokenizer, fresh_tiny_model, trainable):
    model = fresh_tiny_model()
    first, second = (integrate(adata, model, tokenizer, trainable=trainable) for _ in range(2))
    np.testing.assert_array_equal(first.embeddings, second.embeddings)
    seeded = integrate(
        adata, model, tokenizer, trainable=trainable, arguments=dataclasses.replace(SHORT, seed=1)
    )
    assert np.abs(seeded.embeddings - first.embeddings).max() > 1e-4
    changed = {
        name
        for (name, before), after in zip(model.named_parameters(), first.model.parameters(), strict=True)
        if not torch.equal(before, after)
    }
    assert ("model.embed_tokens.weight" in changed) == (trainable == "full")
    assert any(name.startswith("model.layers.1.") for name in changed)


def test_lora_leaves_the_base_as_it_is(adata, tokenizer, fresh_tiny_model):
    model = fresh_tiny_model()
    found = integrate(adata, model, tokenizer)
    base = dict(make_trainable(fresh_tiny_model(), "lora", lora_rank=2).named_parameters())
    for name, parameter in found.model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, base[name]), name


# Bad input


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch_key": "plate"}, KeyError, r"no column 'plate' \(technical batches\).*donor_id"),
        ({"batch_key": "one"}, ValueError, r"obs\['one'\] has one batch only \('x'\)"),
        ({"batch_key": "gaps"}, ValueError, "is missing for 1 of 48 cells"),
        ({"mode": "magic"}, ValueError, "mode must be one of label_free, label_informed, got 'magic'"),
        ({"mode": "label_informed"}, ValueError, "name their column as label_key"),
        ({"label_key": "cell_type"}, ValueError, 'came with mode="label_free", which never reads labels'),
        ({"mode": "label_informed", "label_key": "typo"}, KeyError, r"no column 'typo' \(cell types\)"),
        ({"mode": "label_informed", "label_key": "one"}, ValueError, "1 cell type besides 'Unknown'"),
        ({"trainable": "head"}, ValueError, "leaves the encoder, and so the embedding, as it is"),
        ({"trainable": "everything"}, ValueError, "trainable must be one of lora"),
    ],
)
def test_requests_that_cannot_be_met(adata, tokenizer, fresh_tiny_model, changes, error, message):
    adata.obs["one"] = "x"
    adata.obs["gaps"] = [None, *["a", "b"] * 23, "a"]
    with pytest.raises(error, match=message):
        integrate(adata, fresh_tiny_model(), tokenizer, **changes)


def test_wrong_model_tokenizer_or_path(adata, tokenizer, fresh_tiny_model):
    model = fresh_tiny_model()
    with pytest.raises(TypeError, match=r"arguments=IntegrationArguments\(max_genes=\.\.\.\)"):
        integrate(adata, fresh_tiny_model(), tokenizer, max_genes=8)
    with pytest.raises(TypeError, match=r"got a path \(cells\.h5ad\)"):
        integrate(Path("cells.h5ad"), model, tokenizer)
    with pytest.raises(ValueError, match="ScDivaModel has no diffusion heads"):
        integrate(adata, ScDivaModel(model.config), tokenizer)
    model.config.vocabulary_hash = "0" * 64
    with pytest.raises(ValueError, match="same token would be another gene"):
        integrate(adata, model, tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"adversarial_weight": -1.0}, "adversarial_weight must not be negative"),
        ({"masking_range": (0.5, 0.2)}, "masking_range must be an interval inside"),
        ({"depth_range": (0.0, 1.0)}, "depth_range must be an interval inside"),
        ({"negatives": "none"}, "negatives must be one of all, same_batch, got 'none'"),
        ({"pooling": "max"}, "pooling must be one of lat, mean, got 'max'"),
        ({"validation_fraction": 1.0}, "validation_fraction must lie in"),
        ({"n_epochs": 0}, "n_epochs must be at least 1"),
    ],
)
def test_impossible_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        IntegrationArguments(**changes)
