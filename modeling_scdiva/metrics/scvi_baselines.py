"""scVI and scANVI as baselines of integration and imputation; everything that needs scvi-tools.

Notable choices:
- Settings as they come, ten latent dimensions; the caller says how long to train, and says so in its table.
- scvi-tools seeds the global generators; they are put back afterwards. Where it is not installed, calls raise
  ImportError and say what to install.

Dimensions: N cells, M training cells, G genes.
Source: Lopez et al. 2018 (scVI); Xu et al. 2021 (scANVI).
"""

import importlib.util
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy.sparse import csr_matrix

from modeling_scdiva.metrics.imputation import checked_counts
from modeling_scdiva.metrics.imputation_baselines import Imputation, of_share

N_LATENT = 10
# Passes of scANVI after those of scVI, as its authors have it.
N_SCANVI_EPOCHS = 20
QUIET = {
    "accelerator": "auto", "devices": 1, "enable_progress_bar": False, "logger": False,
    "enable_checkpointing": False, "enable_model_summary": False,
}  # fmt: skip


def has_scvi() -> bool:
    """Say whether scvi-tools is installed, without importing it."""
    return importlib.util.find_spec("scvi") is not None


def require_scvi() -> None:
    """Refuse to go on without scvi-tools.

    Raises:
        ImportError: If it is not installed.
    """
    if not has_scvi():
        msg = 'This baseline needs scvi-tools: pip install "scdiva[eval-full]"'
        raise ImportError(msg)


def scvi_embeddings(
    counts: Any,
    batches: Sequence[Any] | np.ndarray,
    *,
    labels: Sequence[str] | np.ndarray | None = None,
    n_epochs: int = 20,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Integrate with scVI and, where labels are given, scANVI: posterior means of the latent space.

    Args:
        counts: (N, G) raw counts of the genes to use.
        batches: (N,) technical batch of each cell.
        labels: (N,) cell types, "" for a cell without one. scANVI alone sees them; it starts from scVI.
        n_epochs: Passes of scVI over the cells; its authors take up to 400, so few make a weak baseline.
        seed: Of initialisation, shuffle and draws.

    Returns:
        "scVI", and "scANVI" where labels are given -> (N, 10) float32.
    """
    with _scvi_tools(seed) as scvi:
        adata = AnnData(csr_matrix(counts, dtype=np.float32))
        adata.obs["batch"] = pd.Categorical(np.asarray(batches).astype(str))
        if labels is not None:
            adata.obs["label"] = pd.Categorical(np.asarray(labels).astype(str))
        labels_key = None if labels is None else "label"
        scvi.model.SCVI.setup_anndata(adata, batch_key="batch", labels_key=labels_key)
        network = scvi.model.SCVI(adata, n_latent=N_LATENT)
        network.train(max_epochs=n_epochs, **QUIET)
        found = {"scVI": network.get_latent_representation()}
        if labels is not None:
            informed = scvi.model.SCANVI.from_scvi_model(network, unlabeled_category="")
            informed.train(max_epochs=N_SCANVI_EPOCHS, **QUIET)
            found["scANVI"] = informed.get_latent_representation()
        return {name: np.asarray(embedding, dtype=np.float32) for name, embedding in found.items()}


def scvi_marginal_nll(
    training_counts: Any, counts: Any, *, max_epochs: int = 400, n_samples: int = 500, seed: int = 0
) -> np.ndarray:
    """Train scVI and give the negative marginal log-likelihood of other cells, by importance sampling.

    Args:
        training_counts: (M, G) raw counts.
        counts: (N, G) raw counts of the cells to score, over the same genes.
        max_epochs: Passes over the training cells; stopped early when a tenth of them stops improving.
        n_samples: Importance samples of each cell.
        seed: Of initialisation, shuffle and draws.

    Returns:
        (N,) float64 nats per cell, given the sum of the cell's counts.
    """
    with _scvi_tools(seed) as scvi:
        training = AnnData(csr_matrix(training_counts, dtype=np.float32))
        scvi.model.SCVI.setup_anndata(training)
        network = scvi.model.SCVI(training, n_latent=N_LATENT)
        network.train(max_epochs=max_epochs, train_size=0.9, early_stopping=True, **QUIET)
        cells = AnnData(csr_matrix(counts, dtype=np.float32))
        nats = network.get_marginal_ll(
            cells, n_mc_samples=n_samples, n_mc_samples_per_pass=25, return_mean=False
        )
    return -np.asarray(nats, dtype=np.float64).ravel()


class ScviImputer:
    """scVI, trained once on the training cells of a split, that decodes other cells.

    Args:
        training_counts: (M, G) raw counts, in full.
        max_epochs: Passes over the training cells.
        seed: Of initialisation, shuffle and draws.
    """

    def __init__(self, training_counts: Any, *, max_epochs: int = 100, seed: int = 0) -> None:
        self.seed = seed
        with _scvi_tools(seed) as scvi:
            training = AnnData(checked_counts(training_counts).astype(np.float32))
            scvi.model.SCVI.setup_anndata(training)
            self.network = scvi.model.SCVI(training, n_latent=N_LATENT)
            self.network.train(max_epochs=max_epochs, **QUIET)

    def impute(self, counts: Any, library_size: np.ndarray) -> Imputation:
        """Decode cells.

        Args:
            counts: (N, G) raw counts that are visible of the scored cells; scVI takes what is not for zero.
            library_size: (N,) molecules of the scored cells at full depth, known or extrapolated.

        Returns:
            Expected value and probability of Poisson counts of the decoded shares.
        """
        with _scvi_tools(self.seed) as scvi:
            scored = AnnData(checked_counts(counts).astype(np.float32))
            scvi.model.SCVI.setup_anndata(scored)
            share = self.network.get_normalized_expression(scored, library_size=1.0)
        return of_share(np.asarray(share, dtype=np.float64), library_size)


@contextmanager
def _scvi_tools(seed: int) -> Iterator[Any]:
    """Give the seeded library, outside a caller's autocast; put the global generators back that it seeds."""
    require_scvi()
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))))
            for device in ("cpu", "cuda"):
                stack.enter_context(torch.autocast(device, enabled=False))
            import scvi

            scvi.settings.seed = seed
            yield scvi
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
