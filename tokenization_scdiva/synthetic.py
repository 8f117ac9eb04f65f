"""Small made-up cells with real structure, for tests, documentation and dry runs.

Gamma-Poisson counts: every gene has a base rate, every cell type raises its own marker genes, every cell has
its own depth. That is enough for a model to learn something and for an embedding to separate types; it is no
benchmark.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np
from scipy.sparse import csr_matrix

from modeling_scdiva.fresh_model import fresh_model
from modeling_scdiva.modeling_scdiva import ScDivaForMaskedDiffusion
from tokenization_scdiva.tokenization_scdiva import ScDivaTokenizer
from tokenization_scdiva.vocabulary_builder import build_vocabulary

MARKERS_PER_TYPE = 15
MARKER_FOLD_CHANGE = 12.0
MEDIAN_LIBRARY_SIZE = 600.0
GAMMA_SHAPE = 2.0


def synthetic_cells(
    *,
    n_cells: int = 200,
    n_genes: int = 300,
    n_cell_types: int = 4,
    seed: int = 0,
    gene_ids: Sequence[str] | None = None,
) -> anndata.AnnData:
    """Make cells of several types with integer counts.

    Args:
        n_cells: Number of cells N.
        n_genes: Number of genes G, at least 15 per cell type.
        n_cell_types: Number of types; cells are spread evenly over them.
        seed: Equal seed, equal cells.
        gene_ids: Names of the genes, those of a tokenizer for example; ``n_genes`` is their number then.

    Returns:
        AnnData (N, G): ``X`` CSR float32 raw counts, ``obs["cell_type"]``, ``obs["donor_id"]`` (two donors,
        each with cells of all types), ``var_names`` the gene ids; without ``gene_ids`` made-up Ensembl-like
        ones, with ``var["gene_symbols"]``.

    Raises:
        ValueError: If there are too few genes for the markers.
    """
    n_genes = n_genes if gene_ids is None else len(gene_ids)
    if n_genes < MARKERS_PER_TYPE * n_cell_types:
        msg = (
            f"{n_cell_types} cell types need {MARKERS_PER_TYPE * n_cell_types} marker genes, got "
            f"n_genes={n_genes}."
        )
        raise ValueError(msg)
    rng = np.random.default_rng(seed)
    base_rate = rng.lognormal(mean=0.0, sigma=1.5, size=n_genes)
    rates = np.tile(base_rate, (n_cell_types, 1))
    for cell_type in range(n_cell_types):
        markers = slice(cell_type * MARKERS_PER_TYPE, (cell_type + 1) * MARKERS_PER_TYPE)
        rates[cell_type, markers] *= MARKER_FOLD_CHANGE
    types = np.arange(n_cells) % n_cell_types
    depth = MEDIAN_LIBRARY_SIZE * rng.lognormal(sigma=0.4, size=n_cells)
    mean = rates[types] / rates[types].sum(axis=1, keepdims=True) * depth[:, None]
    counts = rng.poisson(mean * rng.gamma(GAMMA_SHAPE, 1.0 / GAMMA_SHAPE, size=mean.shape))

    adata = anndata.AnnData(csr_matrix(counts.astype(np.float32)))
    adata.obs_names = [f"cell_{cell}" for cell in range(n_cells)]
    if gene_ids is None:
        adata.var_names = [f"ENSG{gene:011d}" for gene in range(1, n_genes + 1)]
        adata.var["gene_symbols"] = [f"GENE{gene}" for gene in range(1, n_genes + 1)]
    else:
        adata.var_names = list(gene_ids)
    adata.obs["cell_type"] = [f"type_{cell_type}" for cell_type in types]
    adata.obs["donor_id"] = [f"donor_{cell // n_cell_types % 2}" for cell in range(n_cells)]
    return adata


def synthetic_tokenizer(adata: anndata.AnnData, *, max_genes: int = 128) -> ScDivaTokenizer:
    """Make a tokenizer of the genes of a few cells, for dry runs of what needs a checkpoint.

    A tokenizer to pretrain with is built from files, by `build_vocabulary` (data/build_vocabulary.py).

    Args:
        adata: Raw counts, made up or not.
        max_genes: Genes kept of a cell.

    Returns:
        A tokenizer with the gene entropies of these cells.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cells.h5ad"
        adata.write_h5ad(path)
        vocabulary, _ = build_vocabulary({"cells": path}, show_progress=False)
    return ScDivaTokenizer(vocabulary=vocabulary, max_genes=max_genes)


def open_or_make_up(
    checkpoint: str | None, data: str | Path | None, network: str | Path | Mapping[str, Any]
) -> tuple[anndata.AnnData, ScDivaForMaskedDiffusion, ScDivaTokenizer]:
    """Open cells and a checkpoint; make up what is not named, so that a script runs before there is one.

    Args:
        checkpoint: Folder or Hub id of a diffusion model with its tokenizer; None for random weights.
        data: h5ad file of raw counts; None for 120 made-up cells, of genes the checkpoint knows.
        network: Configuration of the random weights, as in `fresh_model`.

    Returns:
        Cells, model and tokenizer.
    """
    cells = None if data is None else anndata.read_h5ad(data)
    if checkpoint is None:
        cells = synthetic_cells(n_cells=120) if cells is None else cells
        tokenizer = synthetic_tokenizer(cells, max_genes=256)
        return cells, fresh_model(network, tokenizer), tokenizer
    tokenizer = ScDivaTokenizer.from_pretrained(checkpoint)
    model = ScDivaForMaskedDiffusion.from_pretrained(checkpoint)
    if cells is None:
        genes = tokenizer.vocabulary.gene_ids[tokenizer.vocabulary.n_special_tokens :][:300]
        cells = synthetic_cells(n_cells=120, gene_ids=genes)
    return cells, model, tokenizer
