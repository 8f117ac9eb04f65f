"""Which cells make up which training batch, as a pure function of (seed, epoch, batch).

Batches are global: with W processes, process r takes every W-th cell of each, so that the run sees the same
cells with the same corruption at any world size. Cells of similar length share a batch (megabatches of 50
batches are sorted by length), which saves most padding without losing the shuffle.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from tokenization_scdiva.corpus import CellDraw

BATCHES_PER_MEGABATCH = 50
# Evaluation stratifies its times over this many cells whatever the batch size, so that masks stay the same.
EVALUATION_STRATA = 32


class CellBatchSampler(Sampler[list[CellDraw]]):
    """Endless-by-epoch source of global batches, restartable at any batch.

    Args:
        n_genes: (N,) genes of each cell, for grouping by length.
        batch_size: Cells of a global batch, over all processes.
        max_genes: Longer cells count as this long.
        seed: Another seed, another order.
        rank: This process, from 0.
        world_size: Number of processes; divides ``batch_size``.
        shuffle: False keeps the order and one fixed set of times, whatever the batch size, for evaluation.

    Raises:
        ValueError: If there is no such process, if the batch is empty or cannot be shared out evenly, or if
            there are fewer cells than one batch.
    """

    def __init__(
        self,
        n_genes: np.ndarray,
        *,
        batch_size: int,
        max_genes: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
    ) -> None:
        if not 0 <= rank < world_size:
            msg = f"rank must lie in [0, {world_size}), the number of processes, got {rank}."
            raise ValueError(msg)
        if batch_size < 1 or batch_size % world_size:
            msg = f"A global batch of {batch_size} cells cannot be shared evenly by {world_size} processes."
            raise ValueError(msg)
        if shuffle and len(n_genes) < batch_size:
            msg = (
                f"The corpus has {len(n_genes)} cells, fewer than one global batch of {batch_size}. Lower "
                "the batch size (--batch_size), or train on more cells."
            )
            raise ValueError(msg)
        self.lengths = np.minimum(n_genes, max_genes)
        self.batch_size, self.seed = batch_size, seed
        self.rank, self.world_size, self.shuffle = rank, world_size, shuffle
        self.epoch = self.first_batch = 0

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the batches; a run can be resumed only with the same."""
        return {"batch_size": self.batch_size, "order_seed": self.seed, "n_cells": len(self.lengths)}

    @property
    def _fixed_strata(self) -> np.ndarray:
        """(N or more,) strata of an evaluation, cell by cell in its fixed order, whatever the batch size."""
        n_groups = -(-len(self.lengths) // EVALUATION_STRATA)
        groups = [self._rng(1 + group).permutation(EVALUATION_STRATA) for group in range(n_groups)]
        return np.concatenate(groups)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose what the next iteration yields.

        Args:
            epoch: Epoch, from 0.
            first_batch: Batches of it to leave out, after a resume.
        """
        self.epoch, self.first_batch = epoch, first_batch

    @property
    def batches_per_epoch(self) -> int:
        """Global batches of an epoch; cells of an incomplete last one wait for the next epoch's shuffle."""
        n_cells = len(self.lengths)
        return n_cells // self.batch_size if self.shuffle else -(-n_cells // self.batch_size)

    def __len__(self) -> int:
        return self.batches_per_epoch - self.first_batch

    def __iter__(self) -> Iterator[list[CellDraw]]:
        batches = self._shuffled_batches() if self.shuffle else self._fixed_batches()
        for batch in range(self.first_batch, self.batches_per_epoch):
            cells = batches[batch]
            n_strata = self.batch_size if self.shuffle else EVALUATION_STRATA
            if self.shuffle:
                strata = self._rng(1 + batch).permutation(n_strata)
            else:
                first = batch * self.batch_size
                strata = self._fixed_strata[first : first + self.batch_size]
            draws = [
                CellDraw(int(cell), self.epoch, int(stratum), n_strata)
                for cell, stratum in zip(cells, strata, strict=False)
            ]
            share = draws[self.rank :: self.world_size]
            if share:  # only the short last batch of an evaluation can leave a process without cells
                yield share

    def _rng(self, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.epoch, stream])

    def _shuffled_batches(self) -> np.ndarray:
        """(batches, batch_size) shuffled cells, sorted by length in megabatches, batches shuffled again."""
        rng = self._rng(0)
        n_batches = self.batches_per_epoch
        cells = rng.permutation(len(self.lengths))[: n_batches * self.batch_size]
        megabatch = BATCHES_PER_MEGABATCH * self.batch_size
        for start in range(0, len(cells), megabatch):
            group = cells[start : start + megabatch]
            cells[start : start + megabatch] = group[np.argsort(self.lengths[group], kind="stable")]
        return cells.reshape(n_batches, self.batch_size)[rng.permutation(n_batches)]

    def _fixed_batches(self) -> list[np.ndarray]:
        """All cells once, longest last, the last batch short."""
        cells = np.argsort(self.lengths, kind="stable")
        return [cells[start : start + self.batch_size] for start in range(0, len(cells), self.batch_size)]
