"""The cell-embedding pipeline: from a model folder and cells to vectors, the same as `embed_cells`.

Needs no data. Run: pytest tests/test_pipelines.py
"""

import logging

import anndata as ad
import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from modeling_scdiva import ScDivaConfig, ScDivaForMaskedDiffusion, ScDivaModel
from modeling_scdiva.pipelines import TASK, CellEmbeddingPipeline, register_pipelines
from modeling_scdiva.tasks.embedding import embed_cells
from tokenization_scdiva.synthetic import synthetic_cells
from tokenization_scdiva.tokenization_scdiva import ScDivaTokenizer
from tokenization_scdiva.vocabulary_scdiva import GeneVocabulary


@pytest.fixture(scope="module")
def adata():
    return synthetic_cells(n_cells=30, n_genes=80)


@pytest.fixture(scope="module")
def folder(adata, tmp_path_factory):
    """A folder with ``scdiva``, a trained folder, and ``cells.h5ad``."""
    root = tmp_path_factory.mktemp("pipelines")
    vocabulary = GeneVocabulary(list(adata.var_names), gene_entropy=np.linspace(0.1, 2.0, adata.n_vars))
    tokenizer = ScDivaTokenizer(vocabulary=vocabulary, max_genes=60)
    config = ScDivaConfig(
        vocab_size=len(tokenizer),
        vocabulary_hash=vocabulary.content_hash,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    torch.manual_seed(0)
    ScDivaForMaskedDiffusion(config).save_pretrained(root / "scdiva")
    tokenizer.save_pretrained(root / "scdiva")
    adata.write_h5ad(root / "cells.h5ad")
    return root


@pytest.fixture
def embedder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return pipeline("cell-embedding", model="scdiva", device="cpu")


@pytest.fixture(scope="module")
def expected(adata, folder):
    model = AutoModel.from_pretrained(folder / "scdiva")
    tokenizer = AutoTokenizer.from_pretrained(folder / "scdiva")
    return {
        pooling: embed_cells(adata, model=model, tokenizer=tokenizer, pooling=pooling, show_progress=False)
        for pooling in ("lat", "mean")
    }


def test_loads_model_and_tokenizer_by_name(embedder):
    assert isinstance(embedder, CellEmbeddingPipeline)
    assert isinstance(embedder.model, ScDivaModel)
    assert isinstance(embedder.tokenizer, ScDivaTokenizer)


def test_takes_anndata_paths_and_lists(embedder, adata, expected, folder):
    backed = ad.read_h5ad(folder / "cells.h5ad", backed="r")
    for cells in (adata, "cells.h5ad", folder / "cells.h5ad", backed):
        found = embedder(cells, show_progress=False)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected["lat"], atol=1e-5)
    both = embedder([adata, "cells.h5ad"], batch_size=7, show_progress=False)
    assert len(both) == 2
    for found in both:
        np.testing.assert_allclose(found, expected["lat"], atol=1e-5)


def test_arguments_of_the_call_win(folder, adata, expected):
    embedder = pipeline(
        "cell-embedding",
        model=str(folder / "scdiva"),
        device="cpu",
        batch_size=4,
        pooling="mean",
        show_progress=False,
    )
    np.testing.assert_allclose(embedder(adata), expected["mean"], atol=1e-5)
    np.testing.assert_allclose(embedder(adata, pooling="lat"), expected["lat"], atol=1e-5)
    with pytest.raises(ValueError, match="batch_size must be at least 1 cell, got 0"):
        embedder(adata, batch_size=0)


def test_what_is_no_cells_is_refused(embedder, folder, tmp_path):
    with pytest.raises(TypeError, match=r"takes AnnData, paths of h5ad files, .* got ndarray"):
        embedder(np.zeros((2, 3)))
    with pytest.raises(FileNotFoundError, match=r"missing\.h5ad is no \.h5ad file"):
        embedder("missing.h5ad")
    with pytest.raises(FileNotFoundError, match=r"Read other formats first"):
        embedder(folder / "scdiva" / "config.json")
    with pytest.raises(TypeError, match="pool"):
        embedder(folder / "cells.h5ad", pool="lat")


def test_saves_a_folder_that_loads_again(embedder, adata, expected, tmp_path):
    embedder.save_pretrained(tmp_path / "again")
    again = pipeline("cell-embedding", model=str(tmp_path / "again"), device="cpu")
    np.testing.assert_array_equal(again(adata, show_progress=False), expected["lat"])
    assert not (tmp_path / "again" / "pipelines.py").exists()


def test_registering_again_changes_nothing(caplog):
    before = dict(PIPELINE_REGISTRY.supported_tasks)
    with caplog.at_level(logging.WARNING):
        register_pipelines()
    assert before == PIPELINE_REGISTRY.supported_tasks
    assert before[TASK]["impl"] is CellEmbeddingPipeline
    assert not caplog.records
