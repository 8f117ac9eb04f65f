"""Conditions from the corpus to the network: tokens beside `<lat>`, their dropout, their categories.

Run: pytest tests/test_condition_tokens.py
"""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from torch import nn

from modeling_scdiva import (
    ScDivaConfig,
    ScDivaForMaskedDiffusion,
    ScDivaForSequenceClassification,
    ScDivaModel,
)
from modeling_scdiva.tasks.embedding import embed_cells
from modeling_scdiva.training import PretrainingArguments, pretrain
from tokenization_scdiva import (
    CellCorpus,
    CorpusSettings,
    ScDivaDataCollator,
    build_corpus,
    corpus_loader,
    synthetic_cells,
)
from tokenization_scdiva.corpus import CellBatch, CellDraw, corpus_conditions
from tokenization_scdiva.ranking_scdiva import FlatCells

CONDITIONS = {"cell_type": ["B", "T", "NK"], "library_size": [300.0, 600.0]}
GIVEN = torch.tensor([[1, 0], [3, 2], [0, 0]])


@pytest.fixture(scope="module")
def model(small_network):
    return small_network(conditions=CONDITIONS)


def inputs_of(cells):
    return {name: cells[name] for name in ("input_ids", "expression_values", "attention_mask")}


def states_of(model, cells, ids=None, **more):
    with torch.no_grad():
        return model.model(**inputs_of(cells), condition_ids=ids, **more).last_hidden_state


# The network.


def test_what_is_not_given_is_null(model, small_cells):
    cells = small_cells()
    free = states_of(model, cells)
    torch.testing.assert_close(states_of(model, cells, torch.zeros(3, 2, dtype=torch.long)), free)
    given = states_of(model, cells, GIVEN)
    changed = (given - free).abs().amax(dim=(1, 2))
    assert (changed[:2] > 1e-2).all()
    assert changed[2] < 1e-5  # a cell without any, among others with some


def test_every_category_is_another_vector(model):
    embedding = model.model.condition_embedding
    assert embedding.embedding.num_embeddings == 4 + 4  # names and classes, each with its null
    everything = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    vectors = embedding(everything, 16).detach()  # (16, 2, D)
    assert len(vectors.flatten(1).unique(dim=0)) == 16
    assert len(vectors[:, 0].unique(dim=0)) == len(vectors[:, 1].unique(dim=0)) == 4
    torch.testing.assert_close(vectors.square().mean(dim=2), torch.ones(16, 2), atol=1e-3, rtol=0)
    by_hand = embedding.norm(embedding.embedding.weight)
    torch.testing.assert_close(vectors[6], by_hand[[1, 4 + 2]].detach())
    assert torch.equal(embedding(None, 3), embedding(torch.zeros(3, 2, dtype=torch.long), 3))


def test_output_has_the_positions_of_the_cell(model, small_cells):
    cells = small_cells()
    with torch.no_grad():
        output = model(
            **inputs_of(cells), condition_ids=GIVEN, output_hidden_states=True, output_attentions=True
        )
        encoded = model.model(**inputs_of(cells), condition_ids=GIVEN)
    assert output.last_hidden_state.shape == encoded.last_hidden_state.shape == (3, 13, 16)
    assert output.expression_predictions.shape == (3, 13)
    assert output.hidden_states[0].shape == (3, 13 + 2, 16)  # there the condition tokens stand behind


def test_positions_of_genes_are_what_they_are_without_conditions(small_network, small_cells):
    """All positions moved alike change nothing; `<lat>` and the condition tokens move along."""
    model, cells = small_network(conditions=CONDITIONS), small_cells()
    places = torch.arange(13).unsqueeze(0)
    states = states_of(model, cells, GIVEN)
    torch.testing.assert_close(states_of(model, cells, GIVEN, position_ids=places), states)
    for moved in (places + 9, (places + 9).expand(3, -1)):
        torch.testing.assert_close(
            states_of(model, cells, GIVEN, position_ids=moved), states, atol=1e-4, rtol=1e-4
        )
    seen = []
    handle = model.model.rotary_emb.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    states_of(model, cells, GIVEN, position_ids=places + 9)
    handle.remove()
    assert seen[0].tolist() == [[*range(9, 22), 9, 9]] * 3  # beside `<lat>`


def test_conditions_attend_and_are_attended(small_network, small_cells):
    """Attention of the last layer: nobody looks at padding, everybody may look at the conditions."""
    model = small_network(conditions=CONDITIONS, attn_implementation="eager")
    with torch.no_grad():
        output = model(**inputs_of(small_cells()), condition_ids=GIVEN, output_attentions=True)
    weights = output.attentions[-1]  # (B, H, S + K, S + K)
    assert weights.shape[2:] == (15, 15)
    assert not weights[1, :, :, 8:13].any()
    assert (weights[:, :, :, 13:] > 0).all()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_neighbours_change_nothing(small_network, small_cells, attention, side):
    model, cells = small_network(conditions=CONDITIONS, attn_implementation=attention), small_cells()
    together = states_of(model, cells, GIVEN)
    for cell, length in enumerate((13, 8, 4)):
        for n_pads in (0, 5):
            pads = (n_pads, 0) if side == "left" else (0, n_pads)
            alone = {name: cells[name][cell : cell + 1, :length] for name in inputs_of(cells)}
            padded = {name: nn.functional.pad(tensor, pads) for name, tensor in alone.items()}
            kept = slice(n_pads, None) if side == "left" else slice(0, length)
            found = states_of(model, padded, GIVEN[cell : cell + 1])[0, kept]
            torch.testing.assert_close(found, together[cell, :length], atol=1e-4, rtol=1e-4)


def test_classifier_reads_conditions(small_cells):
    torch.manual_seed(0)
    network = ScDivaConfig(
        vocab_size=35, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        conditions=CONDITIONS, num_labels=3, initializer_range=0.4, cell_pooling="mean",
    )  # fmt: skip
    model, cells = ScDivaForSequenceClassification(network).eval(), inputs_of(small_cells())
    free, given = model(**cells).logits, model(**cells, condition_ids=GIVEN).logits
    assert (free - given).abs().amax(dim=1)[:2].min() > 1e-3
    assert given.shape == (3, 3)


def test_no_conditions_no_parameters(small_network, model):
    plain = small_network()
    extra = set(model.state_dict()) - set(plain.state_dict())
    assert extra == {"model.condition_embedding.embedding.weight", "model.condition_embedding.norm.weight"}
    assert plain.model.condition_embedding is None
    assert small_network(conditions={}).model.condition_embedding is None
    assert plain.config.n_condition_categories == ()
    assert model.config.n_condition_categories == (3, 3)  # two edges make three classes


def test_save_and_load(model, small_cells, tmp_path):
    model.save_pretrained(tmp_path)
    cells = small_cells()
    expected = states_of(model, cells, GIVEN)
    loaded = ScDivaForMaskedDiffusion.from_pretrained(tmp_path)
    assert loaded.config.conditions == CONDITIONS
    assert torch.equal(states_of(loaded, cells, GIVEN), expected)
    encoder = ScDivaModel.from_pretrained(tmp_path)
    with torch.no_grad():
        found = encoder(**inputs_of(cells), condition_ids=GIVEN).last_hidden_state
    assert torch.equal(found, expected)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"conditions": None}))
    with pytest.raises(RuntimeError, match=r"unexpected: model\.condition_embedding"):
        ScDivaForMaskedDiffusion.from_pretrained(tmp_path)
    assert "model.condition_embedding.embedding.weight" in load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1], [2], [0]], r"condition_ids must have shape \(3, 2\), got \(3, 1\)"),
        ([[1, 1]], r"must have shape \(3, 2\), got \(1, 2\)"),
        ([[0, 0], [4, 0], [0, 0]], r"condition_ids\[1, 0\] is 4, and condition 0 has the categories 1 to 3"),
        (
            [[0, 0], [0, 0], [1, -1]],
            r"condition_ids\[2, 1\] is -1, and condition 1 has the categories 1 to 3",
        ),
    ],
)
def test_conditions_that_cannot_be_are_refused(model, small_cells, ids, message):
    with pytest.raises(ValueError, match=message):
        states_of(model, small_cells(), torch.tensor(ids))


def test_a_network_without_conditions_takes_none(small_network, small_cells):
    with pytest.raises(ValueError, match="this network was trained without conditions"):
        states_of(small_network(), small_cells(), GIVEN)


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"type": []}, r"conditions\['type'\] must be a list of categories, one at least, got \[\]"),
        ({"type": "B"}, "must be a list of categories"),
        ({"type": ["B", "B"]}, "must be different names"),
        ({"type": ["B", 3]}, "must be different names"),
        ({"library_size": [500.0, 100.0]}, "must be rising, positive edges in molecules"),
        ({"library_size": [100.0, 100.0]}, "must be rising"),
        ({"library_size": [0.0, 100.0]}, "must be rising, positive"),
        ({"library_size": ["low"]}, "must be rising, positive"),
    ],
)
def test_categories_that_cannot_be_are_refused(conditions, message):
    with pytest.raises(StrictDataclassError, match=message):
        ScDivaConfig(conditions=conditions)


# The collator.


def make_batch(n_cells, categories=(3, 3), *, first=0, epoch=0):
    """Cells of one gene; every condition is given."""
    offsets = np.arange(n_cells + 1)
    values = np.ones(n_cells, np.float32)
    cells = FlatCells(offsets, np.full(n_cells, 9, np.int32), values, None, None)
    rows = np.array([CellDraw(first + i, epoch, 0, 1) for i in range(n_cells)], dtype=np.int64)
    ids = np.stack([(first + np.arange(n_cells)) % n + 1 for n in categories], axis=1)
    return CellBatch(cells, rows, np.zeros(n_cells, np.int64), np.arange(20)[None] >= 5, ids)


def collated(batch, **settings):
    defaults = {
        "ranking_weights": np.ones(20), "max_genes": 4, "target_sum": 1e4, "gene_order": "entropy",
        "lat_token_id": 2, "mask_token_id": 1, "pad_token_id": 0, "depth_corruption": "none",
    }  # fmt: skip
    return ScDivaDataCollator(**(defaults | settings))(batch)["condition_ids"]


@pytest.mark.parametrize(("each", "joint"), [(0.1, 0.1), (0.3, 0.0), (0.0, 0.25), (0.5, 0.2)])
def test_rates_of_hidden_conditions(each, joint):
    """Each is hidden by itself, or all together: P(hidden) = 1 - (1 - each)(1 - joint)."""
    n_cells, n_conditions = 12_000, 3
    batch = make_batch(n_cells, (3, 2, 5))
    found = collated(batch, condition_dropout=(each, joint))
    is_hidden = found == 0
    assert torch.equal(found[~is_hidden], torch.from_numpy(batch.condition_ids)[~is_hidden])
    for share, expected in (
        *((is_hidden[:, k], 1 - (1 - each) * (1 - joint)) for k in range(n_conditions)),
        (is_hidden.all(dim=1), joint + (1 - joint) * each**n_conditions),
        (~is_hidden.any(dim=1), (1 - joint) * (1 - each) ** n_conditions),
        (is_hidden[:, 0] & is_hidden[:, 1], joint + (1 - joint) * each**2),
    ):
        error = (expected * (1 - expected) / n_cells) ** 0.5
        assert abs(float(share.double().mean()) - expected) < 4 * error + 1e-9


def test_ends_of_the_rates():
    batch = make_batch(50)
    ids = torch.from_numpy(batch.condition_ids)
    assert torch.equal(collated(batch, condition_dropout=(0.0, 0.0)), ids)
    for rates in ((1.0, 0.0), (0.0, 1.0)):
        assert not collated(batch, condition_dropout=rates).any()
    assert collated(batch).dtype == torch.int64
    for rates in ((-0.1, 0.0), (0.0, 1.1)):
        with pytest.raises(ValueError, match=r"condition_dropout must be two rates in \[0, 1\]"):
            collated(batch, condition_dropout=rates)


def test_what_is_hidden_is_the_cells_own():
    whole = collated(make_batch(200), condition_dropout=(0.3, 0.2))
    assert torch.equal(collated(make_batch(200), condition_dropout=(0.3, 0.2)), whole)
    assert torch.equal(collated(make_batch(50, first=120), condition_dropout=(0.3, 0.2)), whole[120:170])
    others = (
        collated(make_batch(200, epoch=1), condition_dropout=(0.3, 0.2)),
        collated(make_batch(200), condition_dropout=(0.3, 0.2), seed=1),
    )
    for other in others:
        assert 0.1 < ((other == 0) != (whole == 0)).double().mean() < 0.6
    # A cell's other random numbers do not depend on its having conditions.
    batch = make_batch(200)
    collate = ScDivaDataCollator(np.ones(20), 4, 1e4, "entropy", 2, 1, 0)
    bare, given = collate(batch._replace(condition_ids=None)), collate(batch)
    assert "condition_ids" not in bare
    assert all(torch.equal(bare[name], given[name]) for name in bare)


# The corpus.


@pytest.fixture(scope="module")
def labelled(tokenizer, tmp_path_factory):
    """A corpus with types, a column with gaps and an empty one."""
    adata = synthetic_cells(n_cells=150, n_genes=120, seed=1)
    adata.obs["side"] = pd.Categorical(["left", "right", None, "right", ""] * 30)
    adata.obs["nothing"] = pd.Categorical([None] * 150, categories=["something"])
    folder = tmp_path_factory.mktemp("labelled")
    adata.write_h5ad(folder / "cells.h5ad")
    settings = CorpusSettings(n_shards=2, validation_fraction=0.3, obs_keys=("cell_type", "side", "nothing"))
    build_corpus(
        {"cells": folder / "cells.h5ad"},
        folder / "corpus",
        tokenizer=tokenizer,
        settings=settings,
        show_progress=False,
    )
    return folder / "corpus"


def test_categories_of_a_corpus(labelled, tokenizer):
    found = corpus_conditions(labelled, ["side", "cell_type", "library_size"], n_depth_classes=4)
    assert list(found) == ["side", "cell_type", "library_size"]
    assert found["side"] == ["left", "right"]
    assert found["cell_type"] == sorted(set(found["cell_type"]))
    cells = CellCorpus(labelled, "train", ranking_settings=tokenizer.ranking_settings)
    batch = cells.__getitems__(list(range(len(cells))))
    classes = np.searchsorted(found["library_size"], batch.cells.library_size, side="right")
    assert len(found["library_size"]) == 3
    assert np.bincount(classes, minlength=4).min() > 0.2 * len(cells)
    assert corpus_conditions(labelled, []) == {}
    ScDivaConfig(conditions=found)


def test_cells_carry_their_categories(labelled, tokenizer):
    conditions = {"library_size": [400.0], "side": ["right"], "cell_type": ["type_1", "type_0"]}
    cells = CellCorpus(labelled, "train", ranking_settings=tokenizer.ranking_settings, conditions=conditions)
    batch = cells.__getitems__(list(range(len(cells))))
    assert batch.condition_ids.shape == (len(cells), 3)
    for index in range(len(cells)):
        described = cells.describe(index)
        expected = [
            1 + (described["library_size"] >= 400.0),
            1 if described["side"] == "right" else 0,
            {"type_1": 1, "type_0": 2}.get(described["cell_type"], 0),  # unknown to the network: not given
        ]
        assert batch.condition_ids[index].tolist() == expected
    plain = CellCorpus(labelled, "train", ranking_settings=tokenizer.ranking_settings)
    assert plain[0].condition_ids is None


def test_columns_that_are_not_there_are_refused(labelled, corpus_folder, tokenizer, tmp_path):
    message = (
        r"no column 'donor_id' for the conditions .*; it kept 'cell_type', .*Build it again with --obs_keys"
    )
    with pytest.raises(KeyError, match=message):
        corpus_conditions(labelled, ["cell_type", "donor_id"])
    with pytest.raises(KeyError, match=message):
        CellCorpus(
            labelled, "train", ranking_settings=tokenizer.ranking_settings, conditions={"donor_id": ["a"]}
        )
    with pytest.raises(ValueError, match=r"No training cell of .* has an entry in 'nothing'\. Leave this"):
        corpus_conditions(labelled, ["nothing"])
    logged = synthetic_cells(n_cells=30, n_genes=120, seed=1)
    counts = logged.X.toarray()
    logged.X = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)
    logged.write_h5ad(tmp_path / "log.h5ad")
    settings = CorpusSettings(n_shards=1, validation_fraction=0.0, obs_keys=(), expression_is_log1p=True)
    build_corpus(
        {"log": tmp_path / "log.h5ad"},
        tmp_path / "log",
        tokenizer=tokenizer,
        settings=settings,
        show_progress=False,
    )
    with pytest.raises(KeyError, match=r"no column 'library_size' .*; it kept none"):
        corpus_conditions(tmp_path / "log", ["library_size"])


def test_held_out_cells_show_all_their_conditions(labelled, tokenizer):
    conditions = corpus_conditions(labelled, ["cell_type", "library_size"])

    def shares(split, **settings):
        loader = corpus_loader(
            labelled, split, tokenizer=tokenizer, batch_size=16, conditions=conditions, **settings
        )
        return torch.cat([batch["condition_ids"] for batch in loader]).eq(0).double().mean(dim=0)

    assert not shares("validation").any()
    assert not shares("validation", condition_dropout=(0.9, 0.9)).any()
    assert (shares("train") > 0.05).all()
    assert not shares("train", condition_dropout=(0.0, 0.0)).any()


def test_training_with_conditions_and_embedding_without(fresh_tiny_model, labelled, tokenizer, tmp_path):
    conditions = corpus_conditions(labelled, ["cell_type", "library_size"])
    model = fresh_tiny_model(conditions=conditions)
    before = model.model.condition_embedding.embedding.weight.detach().clone()
    loaders = [
        corpus_loader(labelled, split, tokenizer=tokenizer, batch_size=16, conditions=conditions)
        for split in ("train", "validation")
    ]
    log = pretrain(
        model, train_loader=loaders[0], eval_loader=loaders[1],
        arguments=PretrainingArguments(n_steps=20, log_every=10, eval_every=20, learning_rate=2e-3),
        accelerator=Accelerator(cpu=True), output_dir=tmp_path, on_save=tokenizer.save_pretrained,
    )  # fmt: skip
    losses = [line["eval_loss"] for line in log if "eval_loss" in line]
    assert losses[-1] < losses[0]
    loaded = ScDivaForMaskedDiffusion.from_pretrained(tmp_path)
    moved = (loaded.model.condition_embedding.embedding.weight - before).abs().amax(dim=1)
    assert (moved > 1e-4).all()  # every category, and every "not given"
    adata = synthetic_cells(n_cells=10, n_genes=120, seed=7)
    vectors = embed_cells(adata, model=loaded, tokenizer=tokenizer, show_progress=False)
    again = embed_cells(adata, model=loaded, tokenizer=tokenizer, show_progress=False, batch_size=3)
    np.testing.assert_allclose(vectors, again, atol=1e-5)
    assert vectors.shape == (10, 32)


def test_names_are_encoded_by_the_network_itself(fresh_tiny_model):
    network = fresh_tiny_model(conditions={"cell_type": ["a", "b"], "library_size": [100.0]})
    ids = network.encode_conditions({"cell_type": ["b", None], "library_size": 50}, 2)
    assert ids.tolist() == [[2, 1], [0, 1]]
    with pytest.raises(ValueError, match="knows no cell_type 'c'"):
        network.encode_conditions({"cell_type": "c"}, 2)
