"""Gene networks from a model: against pair-by-pair forward passes, whatever the batches; names and refusals.

Needs no data. Run: pytest tests/test_gene_network.py
"""

import logging

import numpy as np
import pytest
import torch

from modeling_scdiva import ScDivaModel
from modeling_scdiva.tasks.gene_network import (
    NetworkSettings,
    eager_attention,
    infer_gene_network,
    network_matrix,
    rank_pairs,
    regulon,
)
from modeling_scdiva.tasks.genes import find_genes
from tokenization_scdiva import synthetic_cells

# Genes that most of the cells show.
TFS = ["GENE1", "GENE22", "GENE47", "GENE82"]
OFTEN = ["GENE99", "GENE112", "GENE38"]
QUIET = {"show_progress": False}


@pytest.fixture(scope="module")
def adata():
    cells = synthetic_cells(n_cells=12, n_genes=120, seed=3)
    # Unequal lengths, so that cells are padded and sorted.
    keep = np.random.default_rng(0).random(cells.shape) < np.linspace(0.2, 1.0, 12)[:, None]
    cells.X = type(cells.X)(cells.X.toarray() * keep)
    return cells


@pytest.fixture(scope="module", params=[True, False], ids=["excluding visible genes", "not excluding"])
def model(request, fresh_tiny_model):
    torch.manual_seed(0)
    model = fresh_tiny_model(exclude_visible_genes=request.param, initializer_range=0.3)
    return model.eval()


def infer(adata, model, tokenizer, method, *, tfs=TFS, targets=None, **settings):
    settings = NetworkSettings(**({"min_cells": 1} | QUIET | settings))
    return infer_gene_network(
        adata, model=model, tokenizer=tokenizer, tfs=tfs, targets=targets, method=method, settings=settings
    )


def symbols(tokenizer, token_ids):
    return [tokenizer.vocabulary.gene_symbols[token] for token in token_ids]


def attention_by_hand(adata, model, tokenizer):
    """One cell at a time, all attentions kept, pairs in dictionaries."""
    ranks = {}
    for row in range(adata.n_obs):
        inputs = tokenizer.encode_anndata(adata[row])
        with eager_attention(model.model), torch.no_grad():
            attentions = model.model(**inputs, output_attentions=True).attentions
        weights = torch.stack(attentions).mean(dim=(0, 1, 2)).numpy()[1:, 1:]
        names = symbols(tokenizer, inputs["input_ids"][0, 1:].tolist())
        pairs = [(weights[j, i], i, j) for i in range(len(names)) for j in range(len(names)) if i != j]
        for rank, (_, i, j) in enumerate(sorted(pairs), start=1):
            ranks.setdefault((names[i], names[j]), []).append(rank / len(pairs))
    return ranks


def test_attention_equals_one_cell_at_a_time(adata, model, tokenizer):
    network = infer(adata, model, tokenizer, "attention", batch_size=5)
    expected = attention_by_hand(adata, model, tokenizer)
    n_compared = 0
    for tf in TFS:
        for target in network.columns:
            ranks = expected.get((tf, target))
            assert (ranks is None) == np.isnan(network.loc[tf, target])
            if ranks is not None:
                # Two attentions may be closer than rounding, and change places.
                assert network.loc[tf, target] == pytest.approx(np.mean(ranks), abs=5e-4)
                n_compared += 1
    assert n_compared > 200
    assert network.attrs["method"] == "attention"
    assert network.attrs["n_cells"] == 12


def conditional_by_hand(model, tokenizer, cell, tf, target, hidden):
    """Log-probability of the target with the TF in sight less that without, by plain forward passes."""
    inputs = tokenizer.encode_anndata(cell)
    names = symbols(tokenizer, inputs["input_ids"][0].tolist())
    tf_id, target_id = (int(inputs["input_ids"][0, names.index(name)]) for name in (tf, target))
    found = {}
    for is_tf_hidden in (False, True):
        gone = (set(hidden) - {tf}) | ({tf} if is_tf_hidden else set())
        is_masked = torch.tensor([[name in gone for name in names]])
        batch = dict(inputs) | {"input_ids": inputs["input_ids"].masked_fill(is_masked, 1)}
        with torch.no_grad():
            logits = model(**batch, is_masked=is_masked, output_all_logits=True).logits
        logits = logits[0, names.index(target)]
        logits[tf_id] = -torch.inf
        found[is_tf_hidden] = float(logits.double().log_softmax(0)[target_id])
    return found[False] - found[True]


def test_conditional_equals_plain_forward_passes(adata, model, tokenizer):
    cell = adata[10]
    names = symbols(tokenizer, tokenizer.encode_anndata(cell)["input_ids"][0, 1:].tolist())
    tfs, targets = [names[3], names[20]], [*names[5:11], names[3]]
    # One group: all targets are hidden at once, among them a TF.
    network = infer(cell, model, tokenizer, "conditional", tfs=tfs, targets=targets, n_groups=1)
    for tf in tfs:
        for target in targets:
            if tf == target:
                assert np.isnan(network.loc[tf, target])
                continue
            expected = conditional_by_hand(model, tokenizer, cell, tf, target, targets)
            assert network.loc[tf, target] == pytest.approx(expected, abs=2e-5)
    assert np.nanmax(np.abs(network)) > 1e-3
    # More groups than targets: each is hidden alone.
    network = infer(cell, model, tokenizer, "conditional", tfs=tfs, targets=targets, n_groups=99)
    for target in targets[:-1]:
        expected = conditional_by_hand(model, tokenizer, cell, tfs[1], target, [target])
        assert network.loc[tfs[1], target] == pytest.approx(expected, abs=2e-5)


def test_conditional_averages_over_cells_and_not_over_batches(adata, model, tokenizer):
    together = infer(adata, model, tokenizer, "conditional", batch_size=3)
    other = infer(adata, model, tokenizer, "conditional", batch_size=64)
    np.testing.assert_allclose(other, together, atol=2e-5)
    assert (together < 0).to_numpy().any()
    assert (together > 0).to_numpy().any()
    # With one group there is no draw: the network of all cells is the mean of the cells' networks.
    settings = {"tfs": OFTEN, "targets": ["GENE1", *OFTEN], "n_groups": 1}
    alone = [infer(adata[row], model, tokenizer, "conditional", **settings) for row in range(3, 12)]
    pooled = infer(adata[3:], model, tokenizer, "conditional", **settings)
    np.testing.assert_allclose(
        pooled, np.ma.masked_invalid(np.stack(alone)).mean(axis=0).filled(np.nan), atol=2e-5
    )


def test_pairs_of_few_cells_have_no_score(adata, model, tokenizer):
    token_ids = [set(tokenizer.encode_anndata(adata[row])["input_ids"][0].tolist()) for row in range(12)]
    network = infer(adata, model, tokenizer, "attention", min_cells=8)
    for tf in TFS:
        for target in network.columns:
            pair = set(find_genes([tf, target], tokenizer.vocabulary, what="genes")[0])
            n_together = sum(pair <= of_cell for of_cell in token_ids)
            is_scored = len(pair) == 2 and n_together >= 8
            assert np.isfinite(network.loc[tf, target]) == is_scored
    with pytest.raises(ValueError, match=r"both shown by min_cells=13 of 12 cells\. TFs: 'GENE1'"):
        infer(adata, model, tokenizer, "attention", targets=OFTEN, min_cells=13)


def test_attention_implementation_and_mode_come_back(adata, model, tokenizer):
    model.set_attn_implementation("sdpa")
    model.model.layers[0].train()
    modes = [module.training for module in model.modules()]
    n_hooks = [len(layer.self_attn._forward_hooks) for layer in model.model.layers]
    first, second = (infer(adata, model, tokenizer, "attention") for _ in range(2))
    assert model.config._attn_implementation == "sdpa"
    assert [module.training for module in model.modules()] == modes
    assert [len(layer.self_attn._forward_hooks) for layer in model.model.layers] == n_hooks
    np.testing.assert_array_equal(first, second)  # dropout is off
    broken = ScDivaModel(model.config)
    broken.layers[1].mlp = None
    with pytest.raises(TypeError, match="not callable"):
        infer(adata, broken, tokenizer, "attention")
    assert broken.config._attn_implementation == "sdpa"
    model.eval()


def test_ranks_by_hand():
    ranks = rank_pairs(np.array([[9.0, 0.1, 0.3], [0.3, 9.0, 0.2], [0.5, 0.6, 9.0]]))
    expected = np.array([[np.nan, 1.0, 3.5], [3.5, np.nan, 2.0], [5.0, 6.0, np.nan]]) / 6
    np.testing.assert_allclose(ranks, expected)
    assert rank_pairs(np.ones((1, 1))).shape == (1, 1)


def test_encoder_is_enough_for_attention_only(adata, model, tokenizer):
    encoder = model.model
    assert isinstance(encoder, ScDivaModel)
    np.testing.assert_array_equal(
        infer(adata, encoder, tokenizer, "attention"), infer(adata, model, tokenizer, "attention")
    )
    with pytest.raises(TypeError, match="gene head of ScDivaForMaskedDiffusion, not ScDivaModel"):
        infer(adata, encoder, tokenizer, "conditional")


def test_names_are_ids_or_symbols_and_the_unknown_are_reported(adata, model, tokenizer, caplog):
    by_symbol = infer(adata, model, tokenizer, "attention", targets=["GENE99"])
    with caplog.at_level(logging.WARNING):
        by_id = infer(
            adata, model, tokenizer, "attention",
            tfs=["ENSG00000000001", "STAT1", *TFS],
            targets=["ENSG00000000099", "IRF7"],
        )  # fmt: skip
    np.testing.assert_array_equal(by_symbol, by_id)
    assert by_id.index[0] == "ENSG00000000001"  # the first name of a gene stays
    assert by_id.attrs["unknown_tfs"] == ["STAT1"]
    assert by_id.attrs["unknown_targets"] == ["IRF7"]
    assert "1 of 6 TFs are not in the vocabulary: 'STAT1'" in caplog.text
    assert list(find_genes("GENE7", tokenizer.vocabulary, what="TFs")[0].values()) == ["GENE7"]
    with pytest.raises(KeyError, match=r"None of the 2 TFs is in the vocabulary \('STAT1', 'IRF7'\)"):
        infer(adata, model, tokenizer, "attention", tfs=["STAT1", "IRF7"])


def test_regulon_is_ranked_by_strength(adata, model, tokenizer):
    network = infer(adata, model, tokenizer, "conditional")
    table = regulon(network, "GENE1", n_targets=7)
    assert list(table.columns) == ["target", "score", "sign"]
    assert len(table) == 7
    strongest = network.loc["GENE1"].abs().sort_values(ascending=False).dropna()[:7]
    assert set(table["target"]) == set(strongest.index)
    assert (np.diff(table["score"].abs()) <= 0).all()
    np.testing.assert_array_equal(table["sign"], np.sign(table["score"]))
    assert "Hypotheses" in table.attrs["note"]
    assert len(regulon(network, "GENE1")) == network.loc["GENE1"].notna().sum()
    with pytest.raises(KeyError, match=r"no TF 'GENE2'\. TFs: 'GENE1', 'GENE22'"):
        regulon(network, "GENE2")


def test_matrix_lies_over_the_genes_of_the_file(adata, model, tokenizer):
    shuffled = adata[:, np.random.default_rng(0).permutation(adata.n_vars)].copy()
    network = infer(shuffled, model, tokenizer, "conditional")
    shuffled.varp["scdiva_network"] = network_matrix(network, shuffled, tokenizer=tokenizer)
    matrix = shuffled.varp["scdiva_network"]
    names = list(shuffled.var["gene_symbols"])
    assert matrix.nnz == int(network.notna().to_numpy().sum())
    for tf in TFS:
        for target in network.columns[::7]:
            value = matrix[names.index(tf), names.index(target)]
            assert value == (network.loc[tf, target] if np.isfinite(network.loc[tf, target]) else 0.0)
    with pytest.raises(ValueError, match="genes of the network are not in this AnnData: 'GENE"):
        network_matrix(network, adata[:, :80].copy(), tokenizer=tokenizer)


def test_refusals(adata, model, tokenizer):
    with pytest.raises(ValueError, match="got 'gradient'"):
        infer(adata, model, tokenizer, "gradient")
    with pytest.raises(TypeError, match=r"got a path \(cells\.h5ad\)"):
        infer("cells.h5ad", model, tokenizer, "attention")
    with pytest.raises(ValueError, match="n_groups must be at least 1, got 0"):
        NetworkSettings(n_groups=0)
