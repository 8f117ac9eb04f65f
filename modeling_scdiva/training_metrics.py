"""What a training run says of itself: losses by diffusion time, speed, and the share of the hardware's peak.

FLOPs of one cell, multiply-add = 2, forward and backward = 3 x forward, with S positions, m masked genes,
width D, inner width F, V tokens:

    forward = layers * (8 S D^2 + 4 S^2 D + 6 S D F) + 2 S D^2 + 2 h S D^2 + m (2 D^2 + 2 D V)

(projections, attention, SwiGLU; value encoder; value head, h = 2 if it reads the gene, else 1; gene head).
Only real positions count, so padding shows as a lower MFU.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from modeling_scdiva.configuration_scdiva import ScDivaConfig

N_TIME_BINS = 10
# Vendors' dense bf16 peaks in TFLOP/s; other devices are measured with a matrix product.
PEAK_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0}
GEMM_SIZE = 2048


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


def train_flops(config: ScDivaConfig, lengths: torch.Tensor, n_masked: int) -> float:
    """Count the FLOPs of training on some cells, by the formula of this module.

    Args:
        config: Network.
        lengths: (B,) real positions of each cell.
        n_masked: Masked genes of all cells.

    Returns:
        FLOPs of forward and backward.
    """
    width, inner = config.hidden_size, config.intermediate_size
    positions, squares = float(lengths.sum()), float(lengths.double().square().sum())
    layer = (8 * width**2 + 6 * width * inner) * positions + 4 * width * squares
    value_parts = 3 if config.value_head == "gene" else 2  # encoder and head
    genes = n_masked * (2 * width**2 + 2 * width * config.vocab_size)
    return 3.0 * (config.num_hidden_layers * layer + 2 * value_parts * width**2 * positions + genes)


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
        self._flops += train_flops(self.config, lengths, n_masked)
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


def peak_flops(accelerator: Accelerator) -> float:
    """Give the peak of this process's device, the denominator of MFU.

    Args:
        accelerator: Device and precision.

    Returns:
        FLOP/s: the vendor's bf16 peak for a known GPU, else the rate of a square matrix product in the run's
        precision, measured here.
    """
    device = accelerator.device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, tflops in PEAK_TFLOPS.items():
            if known in name:
                return tflops * 1e12
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    matrix = torch.ones(GEMM_SIZE, GEMM_SIZE, dtype=dtype, device=device)
    rates = []
    for _ in range(3):
        start = time.perf_counter()
        float((matrix @ matrix)[0, 0])
        rates.append(2 * GEMM_SIZE**3 / (time.perf_counter() - start))
    return max(rates)
