"""Cell embeddings: right rows and numbers whatever the batches; foreign tokenizers and NaN refused.

Needs no data. Run: pytest tests/test_embedding.py
"""

import copy
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch

from modeling_scdiva.configuration_scdiva import ScDivaConfig
from modeling_scdiva.modeling_scdiva import (
    ScDivaForMaskedDiffusion,
    ScDivaForSequenceClassification,
    ScDivaModel,
)
from modeling_scdiva.tasks import embedding as embedding_module
from modeling_scdiva.tasks.embedding import embed_cells
from tokenization_scdiva.synthetic import synthetic_cells
from tokenization_scdiva.tokenization_scdiva import ScDivaTokenizer
from tokenization_scdiva.vocabulary_scdiva import GeneVocabulary

WIDTH = 32
TOLERANCE = 1e-5


def make_tokenizer(adata, **kwargs):
    entropy = np.linspace(0.1, 2.0, adata.n_vars)
    vocabulary = GeneVocabulary(list(adata.var_names), list(adata.var["gene_symbols"]), gene_entropy=entropy)
    return ScDivaTokenizer(vocabulary=vocabulary, max_genes=60, **kwargs)


def make_config(tokenizer, **kwargs):
    return ScDivaConfig(
        vocab_size=len(tokenizer),
        vocabulary_hash=tokenizer.vocabulary.content_hash,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        **kwargs,
    )


@pytest.fixture(scope="module")
def adata():
    cells = synthetic_cells(n_cells=53, n_genes=90, seed=3)
    # Unequal lengths, so that sorting by length moves every cell.
    rng = np.random.default_rng(0)
    keep = rng.random(cells.shape) < rng.uniform(0.05, 1.0, (cells.n_obs, 1))
    keep[:, 0] = True
    dense = cells.X.toarray() * keep
    dense[:, 0] = 1
    cells.X = type(cells.X)(dense.astype(np.float32))
    return cells


@pytest.fixture(scope="module")
def tokenizer(adata):
    return make_tokenizer(adata)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return ScDivaModel(make_config(tokenizer)).eval()


def embed(adata, model, tokenizer, **kwargs):
    return embed_cells(adata, model=model, tokenizer=tokenizer, **({"show_progress": False} | kwargs))


@pytest.mark.parametrize("pooling", ["lat", "mean"])
def test_equals_one_cell_at_a_time(adata, model, tokenizer, pooling):
    found = embed(adata, model, tokenizer, batch_size=8, pooling=pooling)
    assert found.shape == (adata.n_obs, WIDTH)
    assert found.dtype == np.float32
    for row in range(adata.n_obs):
        with torch.no_grad():
            states = model(**tokenizer.encode_anndata(adata[row])).last_hidden_state[0]  # (S, D), no padding
        expected = states[0] if pooling == "lat" else states[1:].mean(dim=0)
        np.testing.assert_allclose(found[row], expected.numpy(), atol=TOLERANCE)


@pytest.mark.parametrize("batch_size", [1, 5, 64, 5000])
def test_batch_size_and_blocks_change_nothing(adata, model, tokenizer, batch_size, monkeypatch):
    expected = embed(adata, model, tokenizer)
    monkeypatch.setattr(embedding_module, "BLOCK_SIZE", 10)
    found = embed(adata, model, tokenizer, batch_size=batch_size)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def test_rows_follow_the_cells(adata, model, tokenizer):
    order = np.random.default_rng(1).permutation(adata.n_obs)
    found = embed(adata[order], model, tokenizer)
    np.testing.assert_allclose(found, embed(adata, model, tokenizer)[order], atol=TOLERANCE)


def test_gene_order_of_the_file_changes_nothing(adata, model, tokenizer):
    order = np.random.default_rng(1).permutation(adata.n_vars)
    found = embed(adata[:, order].copy(), model, tokenizer)
    np.testing.assert_allclose(found, embed(adata, model, tokenizer), atol=TOLERANCE)


def test_backed_file_is_read_in_blocks(adata, model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding_module, "BLOCK_SIZE", 16)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    block_sizes = []

    class WatchedTokenizer(ScDivaTokenizer):
        def pad_cells(self, cells, **kwargs):
            block_sizes.append(cells.n_cells)
            return super().pad_cells(cells, **kwargs)

    watched = WatchedTokenizer(vocabulary=tokenizer.vocabulary, max_genes=tokenizer.max_genes)
    found = embed(backed, model, watched, batch_size=8)
    assert block_sizes == [16, 16, 16, 5]
    np.testing.assert_allclose(found, embed(adata, model, tokenizer), atol=TOLERANCE)


def test_heads_are_left_aside(adata, model, tokenizer):
    expected = embed(adata, model, tokenizer)
    for model_class in (ScDivaForMaskedDiffusion, ScDivaForSequenceClassification):
        with_head = model_class(copy.deepcopy(model.config)).train()
        with_head.model.load_state_dict(model.state_dict())
        np.testing.assert_allclose(embed(adata, with_head, tokenizer), expected, atol=TOLERANCE)


def test_mode_of_every_part_comes_back(adata, model, tokenizer):
    with_dropout = ScDivaModel(make_config(tokenizer, hidden_dropout=0.5)).train()
    with_dropout.load_state_dict(model.state_dict())
    with_dropout.layers[0].eval()
    modes = [module.training for module in with_dropout.modules()]
    first, second = (embed(adata, with_dropout, tokenizer) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, embed(adata, model, tokenizer), atol=TOLERANCE)
    with pytest.raises(ValueError, match="express no gene"):
        embed(with_empty_cell(adata), with_dropout, tokenizer)
    assert [module.training for module in with_dropout.modules()] == modes
    assert all(parameter.grad is None for parameter in with_dropout.parameters())


def test_max_genes_cuts(adata, model, tokenizer):
    short = make_tokenizer(adata)
    short.max_genes = 4
    found = embed(adata, model, tokenizer, max_genes=4)
    np.testing.assert_allclose(found, embed(adata, model, short), atol=TOLERANCE)
    assert np.abs(found - embed(adata, model, tokenizer)).max() > 1e-3


def test_reading_arguments_arrive(adata, model, tokenizer):
    expected = embed(adata, model, tokenizer)
    other = adata.copy()
    other.layers["molecules"] = other.X.copy()
    other.X = other.X * 0.5
    np.testing.assert_allclose(embed(other, model, tokenizer, layer="molecules"), expected, atol=TOLERANCE)
    library_size = np.asarray(adata.X.sum(axis=1))
    other.X = np.log1p(adata.X.toarray() / library_size * 1e4).astype(np.float32)
    found = embed(other, model, tokenizer, layer="X", expression_is_log1p=True)
    np.testing.assert_allclose(found, expected, atol=1e-4)  # the values themselves are rounded
    other.var["mine"], other.var_names = list(other.var_names), [f"x{i}" for i in range(other.n_vars)]
    del other.var["gene_symbols"]
    found = embed(other, model, tokenizer, layer="molecules", gene_id_key="mine")
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    with pytest.raises(TypeError, match="layers"):
        embed(adata, model, tokenizer, layers="molecules")


def with_empty_cell(adata):
    dense = adata.X.toarray()
    dense[7] = 0
    return ad.AnnData(dense, obs=adata.obs, var=adata.var)


def test_empty_cell_is_kept_on_request(adata, model, tokenizer):
    found = embed(with_empty_cell(adata), model, tokenizer, keep_empty_cells=True, pooling="mean")
    np.testing.assert_array_equal(found[7], np.zeros(WIDTH))


def test_low_precision_model_stays_as_it_is(adata, model, tokenizer):
    low = copy.deepcopy(model).to(torch.bfloat16)
    found = embed(adata, low, tokenizer)
    assert found.dtype == np.float32
    assert low.dtype == torch.bfloat16
    np.testing.assert_allclose(found, embed(adata, model, tokenizer), atol=0.2)


def test_foreign_tokenizer_is_refused(adata, model):
    other = synthetic_cells(n_cells=4, n_genes=91)
    with pytest.raises(ValueError, match="tokenizer has 96 tokens and the model 95"):
        embed(adata, model, make_tokenizer(other))
    reordered = make_tokenizer(adata[:, ::-1])
    with pytest.raises(ValueError, match="same token would be another gene"):
        embed(adata, model, reordered)


def test_nan_is_never_returned(adata, model, tokenizer):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.norm.weight[3] = torch.nan
    with pytest.raises(FloatingPointError, match=r"53 of cells 0 to 52 .* first 'cell_0'"):
        embed(adata, broken, tokenizer)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"pooling": "max"}, "pooling must be .* got 'max'"),
    ],
)
def test_impossible_arguments(adata, model, tokenizer, argument, message):
    with pytest.raises(ValueError, match=message):
        embed(adata, model, tokenizer, **argument)


@pytest.mark.parametrize("path", ["cells.h5ad", Path("cells.h5ad")])
def test_a_path_is_refused(model, tokenizer, path):
    with pytest.raises(TypeError, match=r"got a path \(cells\.h5ad\); open it with anndata\.read_h5ad"):
        embed(path, model, tokenizer)


def test_lost_cells_are_noticed(adata, model, tokenizer):
    class LosingTokenizer(ScDivaTokenizer):
        def iter_cells(self, adata, **kwargs):
            return super().iter_cells(adata[:10], **kwargs)

    losing = LosingTokenizer(vocabulary=tokenizer.vocabulary)
    with pytest.raises(ValueError, match="10 cells of 53"):
        embed(adata, model, losing)


def test_progress_counts_cells(adata, model, tokenizer, capsys):
    embed(adata, model, tokenizer, show_progress=True)
    assert "53/53" in capsys.readouterr().err
