"""What a training run says of itself: losses by diffusion time, speed, and the share of the hardware's peak.

MFU is the matrix products that a cell needs (METHOD.md section 9, `train_flops`) per second, over the peak of
the device. Only real positions count, and nothing that is computed twice: padding and gradient checkpointing
show as a lower MFU.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from modeling_scdiva.configuration_scdiva import ScDivaConfig
from modeling_scdiva.hardware import peak_flops

N_TIME_BINS = 10


def sum_over_processes(numbers: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """Add a tensor up over the processes of a run.

    Args:
        numbers: The same shape in every process.
        accelerator: Knows the processes.

    Returns:
        The sum, in every process.
    """
    if accelerator.num_processes == 1:
        return numbers
    return accelerator.reduce(numbers.to(accelerator.device), reduction="sum")


def time_bin(timestep: torch.Tensor) -> torch.Tensor:
    """Say in which of the ten bins (0, 0.1], (0.1, 0.2], ... of diffusion time each cell lies.

    Args:
        timestep: (B,) diffusion times in (0, 1].

    Returns:
        (B,) int64 bins, from 0. Taken in float32: 0.1 belongs to the first bin, and in float64 its float32
        neighbour would not.
    """
    return (timestep.float() * N_TIME_BINS).ceil().long().clamp(1, N_TIME_BINS) - 1


class LossMeter:
    """Mean losses over cells, in all and in ten bins of diffusion time, over all processes.

    Args:
        accelerator: Adds up over the processes.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._has_latent_loss = False
        self._reset()

    def _reset(self) -> None:
        # Rows: gene, expression and latent loss, weighted total, cells; columns: time bins. On the device, so
        # that no step waits for the numbers; float64, because sums run over many cells (Apple's GPUs have
        # float32 only).
        dtype = torch.float32 if self.accelerator.device.type == "mps" else torch.float64
        self._sums = torch.zeros(5, N_TIME_BINS, dtype=dtype, device=self.accelerator.device)

    @torch.no_grad()
    def update(self, outputs: Any, timestep: torch.Tensor) -> None:
        """Add one micro-batch.

        Args:
            outputs: Of the model, with ``cell_gene_loss`` and ``cell_expression_loss`` (B,), and with
                ``cell_latent_loss`` if the network has a gene-query decoder.
            timestep: (B,) diffusion times in (0, 1].
        """
        bins = time_bin(timestep)
        cell_losses = (outputs.cell_gene_loss, outputs.cell_expression_loss, outputs.cell_latent_loss)
        for row, cell_loss in enumerate(cell_losses):
            if cell_loss is not None:
                self._sums[row].index_add_(0, bins, cell_loss.to(self._sums))
        self._has_latent_loss = outputs.cell_latent_loss is not None
        self._sums[3, 0] += outputs.loss * len(timestep)
        self._sums[4].index_add_(0, bins, torch.ones_like(timestep).to(self._sums))

    def pop(self, prefix: str) -> dict[str, float]:
        """Return the means since the last call and start anew.

        Args:
            prefix: ``train`` or ``eval``.

        Returns:
            ``*_loss``, ``*_gene_loss``, ``*_expression_loss``, ``*_latent_loss`` where there is one,
            ``*_n_cells``, and the losses of each time bin.
        """
        sums = sum_over_processes(self._sums, self.accelerator).cpu()
        self._reset()
        n_cells = sums[4].sum().clamp(min=1.0)
        kinds = ("gene", "expression", "latent") if self._has_latent_loss else ("gene", "expression")
        numbers = {f"{prefix}_loss": float(sums[3].sum() / n_cells), f"{prefix}_n_cells": float(n_cells)}
        for row, kind in enumerate(kinds):
            numbers[f"{prefix}_{kind}_loss"] = float(sums[row].sum() / n_cells)
            for index in np.flatnonzero(sums[4] > 0):
                numbers[f"{prefix}_{kind}_loss_t{index}"] = float(sums[row, index] / sums[4, index])
        return numbers


def train_flops(config: ScDivaConfig, lengths: torch.Tensor, n_masked: int, n_queries: int = 0) -> float:
    """Count the FLOPs of training on some cells: their matrix products, a multiply-add as two.

    Args:
        config: Network.
        lengths: (B,) real positions of each cell, ``<lat>`` included, conditions not.
        n_masked: Masked genes of all cells.
        n_queries: Genes that the gene-query decoder is asked for, of all cells.

    Returns:
        FLOPs of forward and backward.

    References:
        METHOD.md section 9.
    """
    width, inner, n_cells = config.hidden_size, config.intermediate_size, len(lengths)
    tokens = lengths.double() + len(config.conditions or {})  # (B,) positions in the layers
    n_positions, n_tokens = float(lengths.sum()), float(tokens.sum())
    layer = (8 * width**2 + 6 * width * inner) * n_tokens + 4 * width * float(tokens.square().sum())
    value_encoder = (2 * width + 2 * width**2) * n_positions
    inputs = 2 if config.value_head == "gene" else 1
    numbers = 2 if config.objective == "elbo" else 1
    value_head = (2 * inputs * width**2 + 2 * numbers * width) * n_positions
    genes = (2 * width**2 + 2 * width * config.vocab_size) * n_masked
    queries = (4 * width**2 + 4 * width) * n_queries + 2 * width**2 * n_cells * (n_queries > 0)
    forward = config.num_hidden_layers * layer + value_encoder + value_head + genes + queries
    # Backward is twice forward, but nobody asks for the gradient of the values that come in.
    return 3.0 * forward - 2 * width * n_positions


class SpeedMeter:
    """Cells and tokens per second, model FLOP utilisation, and the share of time spent waiting for data.

    Args:
        config: Network, for the FLOPs.
        accelerator: Processes and device.
    """

    def __init__(self, config: ScDivaConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.peak = peak_flops(accelerator)
        self.restart()

    def restart(self) -> None:
        """Forget what was measured; called after anything that is not training."""
        self._start = time.perf_counter()
        self._wait = self._flops = 0.0
        self._cells = self._tokens = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time the wait for the loader."""
        start = time.perf_counter()
        yield
        self._wait += time.perf_counter() - start

    def update(self, batch: dict[str, torch.Tensor]) -> None:
        """Add one micro-batch.

        Args:
            batch: Model inputs as the loader gives them, not yet on the device.
        """
        n_cells, width = batch["input_ids"].shape
        mask = batch.get("attention_mask")
        lengths = torch.full((n_cells,), width) if mask is None else mask.sum(dim=1)
        n_masked = int((batch["labels"] != -100).sum())
        queries = batch.get("query_ids")
        n_queries = 0 if queries is None else int((queries != self.config.pad_token_id).sum())
        self._flops += train_flops(self.config, lengths, n_masked, n_queries)
        self._cells += n_cells
        self._tokens += int(lengths.sum())

    def pop(self) -> dict[str, float]:
        """Return the speeds since the last call and start anew.

        Returns:
            ``cells_per_s`` and ``tokens_per_s`` of the whole run, ``mfu`` and ``data_wait_fraction`` of one
            process.
        """
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        counted = torch.tensor([self._cells, self._tokens, self._flops], dtype=torch.float64)
        cells, tokens, flops = sum_over_processes(counted, self.accelerator).tolist()
        numbers = {
            "cells_per_s": cells / elapsed,
            "tokens_per_s": tokens / elapsed,
            "mfu": flops / elapsed / (self.peak * self.accelerator.num_processes),
            "data_wait_fraction": self._wait / elapsed,
        }
        self.restart()
        return numbers
