"""The published network on made-up cells, for the stages that measure it.

Dimensions: B cells in a loader batch, S positions, V vocabulary, D width, H heads, K head width.
"""

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from side_by_side import Timing
from torch import nn

from modeling_scdiva import ScDivaConfig, ScDivaForMaskedDiffusion
from modeling_scdiva.hardware import GEMM_SIZE
from modeling_scdiva.training import PretrainingArguments, make_optimizer

CONFIG = Path(__file__).resolve().parents[2] / "examples" / "configs" / "paper.json"
MAX_GENES = 1_200
# Names in malloc.h of how many blocks get a mapping of their own, and how much free memory is kept.
MMAP_MAX, TRIM_THRESHOLD = -4, -1
# Several rounds of one product are timed: one alone takes a tenth of a second.
N_PRODUCTS = 8


def paper_config(**changes: Any) -> ScDivaConfig:
    """Read the published configuration.

    Args:
        **changes: Fields to set otherwise.

    Returns:
        The configuration.
    """
    return ScDivaConfig(**(json.loads(CONFIG.read_text("utf-8")) | changes))


def paper_model(**changes: Any) -> ScDivaForMaskedDiffusion:
    """Make the published network with fresh weights, always the same.

    Args:
        **changes: Fields of the configuration to set otherwise.

    Returns:
        The network in training mode.
    """
    torch.manual_seed(0)
    return ScDivaForMaskedDiffusion(paper_config(**changes)).train()


def masked_cells(
    config: ScDivaConfig, lengths: list[int], *, width: int | None = None, masked_share: float = 0.5
) -> dict[str, torch.Tensor]:
    """Make up a loader batch of cells with a share of their genes hidden, gene and value together.

    Args:
        config: Network.
        lengths: Genes of each cell.
        width: Genes to pad to; the longest cell when not given.
        masked_share: Share of the genes of each cell that is hidden.

    Returns:
        What the collator gives: inputs and targets (B, S); an attention mask where something is padded.
    """
    rng = torch.Generator().manual_seed(0)
    width = max(lengths) if width is None else width
    n_cells = len(lengths)
    scores = torch.rand(n_cells, config.vocab_size - config.n_special_tokens, generator=rng)
    genes = scores.argsort(dim=1)[:, :width] + config.n_special_tokens  # (B, S - 1), different in a cell
    values = torch.rand(n_cells, width, generator=rng).sort(dim=1, descending=True).values * 4.0
    is_real = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    n_hidden = (torch.tensor(lengths) * masked_share).long().unsqueeze(1)
    noise = torch.rand(n_cells, width, generator=rng).masked_fill(~is_real, 2.0)
    is_masked = noise.argsort(dim=1).argsort(dim=1) < n_hidden
    lat = torch.full((n_cells, 1), config.lat_token_id)
    no = torch.zeros(n_cells, 1, dtype=torch.bool)
    labels = torch.where(is_masked, genes, -100)
    genes = genes.masked_fill(is_masked, config.mask_token_id).masked_fill(~is_real, config.pad_token_id)
    shown = values.masked_fill(is_masked | ~is_real, 0.0)
    batch = {
        "input_ids": torch.cat((lat, genes), dim=1),
        "expression_values": torch.nn.functional.pad(shown, (1, 0)),
        "is_masked": torch.cat((no, is_masked), dim=1),
        "labels": torch.nn.functional.pad(labels, (1, 0), value=-100),
        "expression_labels": torch.nn.functional.pad(values.masked_fill(~is_real, 0.0), (1, 0)),
    }
    if not is_real.all():
        batch["attention_mask"] = torch.nn.functional.pad(is_real, (1, 0), value=True).long()
    return batch


def training_step(model: nn.Module, loss_of: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """Make the step of a network; its optimiser keeps its state from step to step."""
    arguments = PretrainingArguments(n_steps=1)
    optimizer = make_optimizer(model, arguments)

    def step() -> None:
        loss_of().backward()
        nn.utils.clip_grad_norm_(model.parameters(), arguments.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next ones, instead of giving it back each time.

    Pages that are given back are cleared and mapped again by the kernel, 300,000 of them in a training step.
    Users of CPUs get the same by ``MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1`` in the environment. Without
    glibc nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, -1)


def square_product() -> None:
    """Multiply two fp32 matrices of 2048 x 2048, `N_PRODUCTS` times."""
    matrix = torch.ones(GEMM_SIZE, GEMM_SIZE)
    for _ in range(N_PRODUCTS):
        torch.mm(matrix, matrix)


def product_rates(products: Timing) -> list[float]:
    """Give the FLOP rates that `square_product` reached.

    Args:
        products: Its times.

    Returns:
        FLOP per CPU second, repeat by repeat.
    """
    return [2.0 * GEMM_SIZE**3 * N_PRODUCTS / seconds for seconds in products.cpu]
