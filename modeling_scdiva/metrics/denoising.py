"""Held-out denoising losses of a model beside baselines on the same masks.

Losses are reduced as the model's are, mean over the masked genes of a cell, then over cells, and reported in
the ten bins of diffusion time of the training log. A cell without a masked gene contributes 0 in both.

Dimensions: N evaluated cells, B cells of a loader batch, S positions.
Source: METHOD.md sections 4 and 8.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from modeling_scdiva.metrics.denoising_baselines import IGNORED_LABEL, DenoisingBaselines
from modeling_scdiva.metrics.reconstruction_baselines import LATTICE_LAWS, iter_gene_laws
from modeling_scdiva.training_metrics import N_TIME_BINS, time_bin


@dataclass(frozen=True)
class DenoisingLosses:
    """Losses of single cells, by predictor, all on the same masks.

    Attributes:
        gene: Name -> (N,) float64 nats per masked gene; ``model`` is one of the names.
        expression: Name -> (N,) float64 squared log1p units.
        timestep: (N,) diffusion times in (0, 1].
    """

    gene: dict[str, np.ndarray]
    expression: dict[str, np.ndarray]
    timestep: np.ndarray


@torch.no_grad()
def evaluate_denoising(
    batches: Iterable[Mapping[str, torch.Tensor]],
    *,
    baselines: DenoisingBaselines,
    model: Any = None,
    with_lattice: bool = True,
) -> DenoisingLosses:
    """Compute the losses of a model and of all baselines on the same masked cells.

    Args:
        batches: Collated batches with fixed masks, ``timestep`` included; read once.
        baselines: Fitted on the training split.
        model: A `ScDivaForMaskedDiffusion`, or None for the baselines alone. Evaluated without dropout.
        with_lattice: Add the gene laws of the sort's arithmetic (`LATTICE_LAWS`); they need cells in ranking
            order.

    Returns:
        Losses of every cell.

    Raises:
        ValueError: If there is no batch.
    """
    rows: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]] = []
    was_training = model is not None and model.training
    if model is not None:
        model.eval()
    for batch in batches:
        gene, expression = baselines.gene_losses(batch), baselines.expression_losses(batch)
        if with_lattice:
            gene |= _lattice_losses(batch, baselines)
        if model is not None:
            inputs = {name: entry.to(model.device) for name, entry in batch.items() if name != "timestep"}
            outputs = model(**inputs)
            gene["model"] = outputs.cell_gene_loss.cpu()
            expression["model"] = _squared_errors(outputs.expression_predictions, inputs).cpu()
        rows.append((gene, expression, batch["timestep"]))
    if was_training:
        model.train()
    if not rows:
        msg = "There is no batch to evaluate: the validation split is empty."
        raise ValueError(msg)
    return DenoisingLosses(
        gene={name: _joined(row[0][name] for row in rows) for name in rows[0][0]},
        expression={name: _joined(row[1][name] for row in rows) for name in rows[0][1]},
        timestep=_joined(row[2] for row in rows),
    )


def _squared_errors(predictions: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Mean squared error (B,) of hidden values, whatever the objective made of them."""
    is_hidden = inputs["labels"] != IGNORED_LABEL
    squares = (predictions - inputs["expression_labels"]).double().square() * is_hidden
    return squares.sum(dim=1) / is_hidden.sum(dim=1).clamp(min=1)


def _lattice_losses(
    batch: Mapping[str, torch.Tensor], baselines: DenoisingBaselines
) -> dict[str, torch.Tensor]:
    """Give the cross-entropy (B,) of the genes that fit arithmetically between visible neighbours."""
    labels = batch["labels"].cpu().numpy()
    losses = {name: torch.zeros(len(labels), dtype=torch.float64) for name in LATTICE_LAWS}
    for cell, name, law in iter_gene_laws(batch, baselines):
        if name in losses:
            true_genes = labels[cell][labels[cell] != IGNORED_LABEL]
            losses[name][cell] = -np.log(law[np.arange(len(true_genes)), true_genes]).mean()
    return losses


def _joined(parts: Iterable[torch.Tensor]) -> np.ndarray:
    return torch.cat([part.double() for part in parts]).numpy()


def mean_by_time(cell_losses: np.ndarray, timestep: np.ndarray) -> dict[str, Any]:
    """Average the losses of cells, in all and in ten bins of diffusion time, as the training log does.

    Args:
        cell_losses: (N,) losses, or differences of losses.
        timestep: (N,) diffusion times in (0, 1].

    Returns:
        ``mean``, its ``standard_error`` over cells, ``by_time_bin`` (None for an empty bin) and ``n_cells``.

    Raises:
        ValueError: If the shapes differ or there is no cell.
    """
    if cell_losses.shape != timestep.shape or not len(timestep):
        msg = (
            f"One loss and one time per cell are wanted, got shapes {cell_losses.shape} and {timestep.shape}."
        )
        raise ValueError(msg)
    bins = time_bin(torch.as_tensor(timestep)).numpy()
    of_bins = [cell_losses[bins == row] for row in range(N_TIME_BINS)]
    n_cells = len(timestep)
    return {
        "mean": float(cell_losses.mean()),
        "standard_error": float(cell_losses.std() / max(1, n_cells - 1) ** 0.5),
        "by_time_bin": [float(losses.mean()) if len(losses) else None for losses in of_bins],
        "n_cells": n_cells,
    }


def gain_over(cell_losses: np.ndarray, baseline_losses: np.ndarray, timestep: np.ndarray) -> dict[str, Any]:
    """Say by how much a model beats a baseline, cell by cell on the same masks.

    Args:
        cell_losses: (N,) losses of the model.
        baseline_losses: (N,) losses of the baseline.
        timestep: (N,) diffusion times in (0, 1].

    Returns:
        As `mean_by_time` of baseline minus model (positive: the model is better), with ``percent`` of the
        baseline's loss and ``percent_by_time_bin``.
    """
    baseline = mean_by_time(baseline_losses, timestep)
    gain = mean_by_time(baseline_losses - cell_losses, timestep)
    gain["percent"] = _percent(gain["mean"], baseline["mean"])
    gain["percent_by_time_bin"] = [
        _percent(*pair) for pair in zip(gain["by_time_bin"], baseline["by_time_bin"], strict=True)
    ]
    return gain


def report_denoising(losses: DenoisingLosses) -> dict[str, Any]:
    """Reduce the losses of cells to the numbers of a result file.

    Args:
        losses: Of the model and all baselines, by `evaluate_denoising`.

    Returns:
        ``gene_loss`` and ``expression_loss``, name -> `mean_by_time`; and ``gene_gain_of_model_over`` and
        ``expression_gain_of_model_over``, name of a baseline -> `gain_over`, empty without a model.
    """
    numbers: dict[str, Any] = {}
    for kind, by_name in (("gene", losses.gene), ("expression", losses.expression)):
        numbers[f"{kind}_loss"] = {
            name: mean_by_time(entry, losses.timestep) for name, entry in by_name.items()
        }
        model = by_name.get("model")
        numbers[f"{kind}_gain_of_model_over"] = {
            name: gain_over(model, entry, losses.timestep)
            for name, entry in by_name.items()
            if model is not None and name != "model"
        }
    return numbers


def _percent(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else 100.0 * part / whole
