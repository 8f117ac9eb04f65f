"""Shared fixtures: made-up cells, their tokenizer, a small corpus, a tiny network, all seeded."""

import os

# Before anything reads it: tests never reach for the network, a hub name that is no folder fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from modeling_scdiva import ScDivaConfig, ScDivaForMaskedDiffusion
from modeling_scdiva.fresh_model import fresh_model
from tokenization_scdiva import (
    CorpusSettings,
    ScDivaTokenizer,
    build_corpus,
    build_vocabulary,
    synthetic_cells,
)
from tokenization_scdiva.kernels_scdiva import compiled_kernels

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Small tensors, and equal sums on every machine; other libraries change the number while they run."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    if not REAL_DATA.is_dir():
        pytest.skip("needs the real single-cell files in ../shared/data beside the checkout")
    return REAL_DATA


@pytest.fixture(params=["compiled", "numpy"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run a test by the compiled kernels, and again by plain NumPy."""
    monkeypatch.setenv("SCDIVA_COMPILED", "1" if request.param == "compiled" else "0")
    compiled_kernels.cache_clear()
    assert (compiled_kernels() is not None) == (request.param == "compiled")
    yield request.param
    compiled_kernels.cache_clear()


@pytest.fixture(scope="session")
def cell_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two h5ad files of synthetic cells, the second with half of the genes."""
    folder = tmp_path_factory.mktemp("cells")
    synthetic_cells(n_cells=150, n_genes=120, seed=1).write_h5ad(folder / "first.h5ad")
    synthetic_cells(n_cells=90, n_genes=120, seed=2)[:, :60].copy().write_h5ad(folder / "second.h5ad")
    return {"first": folder / "first.h5ad", "second": folder / "second.h5ad"}


@pytest.fixture(scope="session")
def tokenizer(cell_files: dict[str, Path]) -> ScDivaTokenizer:
    vocabulary, _ = build_vocabulary(cell_files, show_progress=False)
    return ScDivaTokenizer(vocabulary=vocabulary, max_genes=48)


@pytest.fixture(scope="session")
def corpus_folder(
    cell_files: dict[str, Path], tokenizer: ScDivaTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    settings = CorpusSettings(n_shards=2, validation_fraction=0.2, obs_keys=("cell_type",))
    build_corpus(cell_files, folder, tokenizer=tokenizer, settings=settings, show_progress=False)
    return folder


# Two layers of width 32, with every switch of the recommended preset on.
TINY_NETWORK = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "hidden_dropout": 0.1,
    "exclude_visible_genes": True,
    "value_head": "gene",
}


@pytest.fixture(scope="session")
def fresh_tiny_model(
    tokenizer: ScDivaTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., ScDivaForMaskedDiffusion]:
    """Make tiny models for the tokenizer; keywords change the network."""

    def make(**changes: object) -> ScDivaForMaskedDiffusion:
        config_file = tmp_path_factory.mktemp("config") / "config.json"
        config_file.write_text(json.dumps(TINY_NETWORK | changes))
        return fresh_model(config_file, tokenizer)

    return make


# Thirty genes, two layers of width 16 and weights so large that laws differ from slot to slot.
SMALL_NETWORK = {
    "vocab_size": 35,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "initializer_range": 0.4,
    "exclude_visible_genes": True,
    "value_head": "gene",
    "objective": "elbo",
}


@pytest.fixture(scope="session")
def gene_weights() -> torch.Tensor:
    """(V,) ranking weights of the small networks."""
    return 1.0 + torch.arange(35, dtype=torch.float64) * 7 % 11 / 8


@pytest.fixture(scope="session")
def small_network(gene_weights: torch.Tensor) -> Callable[..., ScDivaForMaskedDiffusion]:
    """Make networks that need no tokenizer, for generation and likelihoods; keywords change them."""

    def make(*, seed: int = 0, **changes: object) -> ScDivaForMaskedDiffusion:
        torch.manual_seed(seed)
        model = ScDivaForMaskedDiffusion(ScDivaConfig(**(SMALL_NETWORK | changes))).eval()
        if model.config.value_head == "gene":
            model.set_gene_weights(gene_weights)
        return model

    return make


@pytest.fixture(scope="session")
def small_cells(gene_weights: torch.Tensor) -> Callable[..., dict[str, torch.Tensor]]:
    """Make cells of whole counts in ranking order, `<lat>` first, padded on the right."""

    def make(n_genes: Sequence[int] = (12, 7, 3), *, seed: int = 0) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shape = (len(n_genes), 1 + max(n_genes))
        ids, values = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
        ids[:, 0] = 2
        factors = 0.02 + 0.08 * torch.rand(len(n_genes), generator=generator, dtype=torch.float64)
        for cell, n in enumerate(n_genes):
            genes = torch.randperm(30, generator=generator)[:n].sort().values + 5
            counts = torch.rand(n, generator=generator).mul(-0.95).log1p().mul(-4).ceil()
            shown = (counts.double() / factors[cell]).log1p().float()
            order = (shown / gene_weights[genes]).float().argsort(descending=True, stable=True)
            ids[cell, 1 : n + 1], values[cell, 1 : n + 1] = genes[order], shown[order]
        mask = (ids > 0).long()
        return {
            "input_ids": ids, "expression_values": values, "attention_mask": mask, "size_factors": factors,
        }  # fmt: skip

    return make


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-golden", action="store_true", help="write tests/golden anew")


@pytest.fixture(scope="module")
def base_folder(
    fresh_tiny_model: Callable[..., ScDivaForMaskedDiffusion],
    tokenizer: ScDivaTokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A pretrained checkpoint: the diffusion model and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    fresh_tiny_model(hidden_dropout=0.0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
