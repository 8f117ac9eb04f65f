"""Cells that one would generate without a network, and those of scVI, to stand beside generated cells.

Notable choices:
- Marginals are those of training cells as they are, with no law fitted: every detection rate, mean and
  variance of a gene is right, and whatever goes wrong is how genes go together. Independent genes give all
  cells nearly the same depth.
- Marginals within types keep what differs between types; what is lost then are depth and variation within.
- scVI needs scvi-tools. By default the latent variable and the library size of a draw are those of one
  training cell, so scVI has seen every depth it uses and need not model it; its prior is rarely near what it
  encodes, and there the library size is drawn on its own.

Dimensions: M training cells, n drawn cells, G genes.
Source: Lopez et al. 2018 (scVI and its posterior predictive draws); METHOD.md section 8.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy.sparse import csc_matrix, csr_matrix, vstack

from modeling_scdiva.metrics.imputation import checked_counts
from modeling_scdiva.metrics.scvi_baselines import ScviImputer, require_scvi

# Cells decoded at once; each holds a few dense rows of all genes.
CELLS_AT_ONCE = 256
MIN_SCVI_CELLS = 16


def independent_marginals(counts: Any, n_cells: int, rng: np.random.Generator) -> csr_matrix:
    """Draw every gene of every cell on its own, from the counts of that gene in the training cells.

    Args:
        counts: (M, G) raw counts of training cells, dense or sparse, or AnnData with them in ``X``.
        n_cells: Cells drawn.
        rng: Source of randomness; equal state, equal result.

    Returns:
        (n_cells, G) CSR float32, whole numbers.
    """
    return _drawn_marginals(_training_counts(counts, n_cells), n_cells, rng)


def type_marginals(
    counts: Any, cell_types: Sequence[str] | np.ndarray, n_cells: int, rng: np.random.Generator
) -> tuple[csr_matrix, np.ndarray]:
    """Draw a type by its frequency, then every gene on its own from the training cells of this type.

    Args:
        counts: (M, G) raw counts of training cells, dense or sparse, or AnnData with them in ``X``.
        cell_types: (M,) type of each training cell.
        n_cells: Cells drawn.
        rng: Source of randomness; equal state, equal result.

    Returns:
        (n_cells, G) CSR float32, whole numbers; (n_cells,) types, text.

    Raises:
        ValueError: If there is not one type for each cell or one is missing.
    """
    training = _training_counts(counts, n_cells)
    given = np.asarray(cell_types, dtype=object)
    n_missing = int(pd.isna(given).sum())
    if given.shape != training.shape[:1] or n_missing:
        msg = (
            f"cell_types must be one for each of the {training.shape[0]} cells, got shape {given.shape} with "
            f"{n_missing} missing. Leave cells without a type out."
        )
        raise ValueError(msg)
    types = given.astype(str)
    drawn_types = types[rng.integers(len(types), size=n_cells)]
    parts, places = [], []
    for name in np.unique(drawn_types):
        of_type = np.flatnonzero(drawn_types == name)
        parts.append(_drawn_marginals(training[types == name], len(of_type), rng))
        places.append(of_type)
    order = np.argsort(np.concatenate(places), kind="stable")
    return vstack(parts, format="csr")[order], drawn_types


def scvi_draws(
    counts: Any,
    n_cells: int,
    *,
    latent: Literal["posterior", "prior"] = "posterior",
    max_epochs: int = 100,
    seed: int = 0,
) -> csr_matrix:
    """Train scVI on training cells and draw cells from it; ``ImportError`` where scvi-tools is not installed.

    Args:
        counts: (M, G) raw counts of training cells, dense or sparse, or AnnData with them in ``X``.
        n_cells: Cells drawn.
        latent: "posterior" draws a training cell, the latent variable from its posterior, and takes its
            library size: a noisy copy of a cell that was seen. "prior" draws the latent variable from the
            standard normal and the library size from the training cells, each on its own.
        max_epochs: Passes over the training cells.
        seed: Of training and draws.

    Returns:
        (n_cells, G) CSR float32, whole numbers from the decoded zero-inflated negative binomial.

    Raises:
        ValueError: If ``latent`` is unknown, there are too few cells, or one of them is empty.
    """
    require_scvi()
    training = _training_counts(counts, n_cells)
    if latent not in ("posterior", "prior"):
        msg = f"latent must be 'posterior' or 'prior', got {latent!r}."
        raise ValueError(msg)
    library_size = np.asarray(training.sum(axis=1)).ravel()
    n_empty = int((library_size == 0).sum())
    if n_empty or len(library_size) < MIN_SCVI_CELLS:
        msg = (
            f"scVI needs {MIN_SCVI_CELLS} training cells at least and none without molecules, got "
            f"{len(library_size)} with {n_empty} empty. Give more cells and filter the empty ones."
        )
        raise ValueError(msg)
    network = ScviImputer(training, max_epochs=max_epochs, seed=seed).network
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(library_size), size=n_cells)  # training cells
    # Neither the caller's generators nor its autocast: scVI decodes in float32.
    with (
        torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
        torch.inference_mode(),
    ):
        torch.manual_seed(seed)
        mean, variance = network.get_latent_representation(return_dist=True)  # (M, 10) both
        noise = rng.standard_normal((n_cells, mean.shape[1]))
        places = noise if latent == "prior" else mean[chosen] + np.sqrt(variance[chosen]) * noise
        return _decoded(network.module.eval(), places, library_size[chosen])


def _decoded(module: Any, places: np.ndarray, library_size: np.ndarray) -> csr_matrix:
    """Draw counts (n, G) at latent places (n, 10) and library sizes (n,)."""
    parts = []
    for start in range(0, len(places), CELLS_AT_ONCE):
        rows = slice(start, start + CELLS_AT_ONCE)
        log_size = torch.as_tensor(np.log(library_size[rows]), dtype=torch.float32)[:, None]
        decoded = module.generative(
            z=torch.as_tensor(places[rows], dtype=torch.float32),
            library=log_size,
            batch_index=torch.zeros_like(log_size, dtype=torch.int64),
        )
        parts.append(csr_matrix(decoded["px"].sample().cpu().numpy().astype(np.float32)))
    return vstack(parts, format="csr")


def _drawn_marginals(training: csr_matrix, n_cells: int, rng: np.random.Generator) -> csr_matrix:
    by_gene = csc_matrix(training)
    n_training, n_genes = by_gene.shape
    rows, values, n_entries = [], [], np.zeros(n_genes + 1, dtype=np.int64)
    for gene in range(n_genes):
        expressed = by_gene.data[by_gene.indptr[gene] : by_gene.indptr[gene + 1]]
        # A place among the training cells, those that express the gene first: the empirical marginal.
        drawn = rng.integers(n_training, size=n_cells)
        is_expressed = drawn < len(expressed)
        rows.append(np.flatnonzero(is_expressed))
        values.append(expressed[drawn[is_expressed]])
        n_entries[gene + 1] = len(rows[-1])
    entries = np.concatenate(values).astype(np.float32), np.concatenate(rows), np.cumsum(n_entries)
    return csc_matrix(entries, shape=(n_cells, n_genes)).tocsr()


def _training_counts(counts: Any, n_cells: int) -> csr_matrix:
    training = checked_counts(counts.X if isinstance(counts, AnnData) else counts)
    if 0 in training.shape:
        msg = f"counts must be (cells, genes) with one of each at least, got {training.shape}."
        raise ValueError(msg)
    if n_cells < 1:
        msg = f"n_cells must be 1 at least, got {n_cells}."
        raise ValueError(msg)
    return training
