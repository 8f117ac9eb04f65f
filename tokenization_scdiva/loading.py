"""A corpus split as a loader of masked batches: corpus, sampler and collator put together."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from tokenization_scdiva.batch_sampler import CellBatchSampler
from tokenization_scdiva.collation import ScDivaDataCollator
from tokenization_scdiva.corpus import CellCorpus
from tokenization_scdiva.tokenization_scdiva import ScDivaTokenizer


def corpus_loader(
    corpus: str | Path,
    split: str,
    *,
    tokenizer: ScDivaTokenizer,
    batch_size: int,
    seed: int = 0,
    process: tuple[int, int] = (0, 1),
    num_workers: int = 0,
    conditions: Mapping[str, Sequence[Any]] | None = None,
    **corruption: Any,
) -> DataLoader:
    """Load one split of a corpus in masked batches.

    Training cells are shuffled and grouped by length. Validation cells come in a fixed order, with clean
    depth and with masks that depend on neither batch size, seed nor step, so that a loss on them compares
    between steps, runs and models of one corpus.

    Args:
        corpus: Corpus folder.
        split: ``train`` or ``validation``.
        tokenizer: The tokenizer the corpus was built with; another one is refused.
        batch_size: Cells of a batch, over all processes.
        seed: Of order and corruption of training cells.
        process: Number of this process and of all processes.
        num_workers: Loader processes.
        conditions: Of the network's config, see `CellCorpus`. Validation cells show all of theirs.
        **corruption: Settings of `ScDivaDataCollator`: ``masking_target``, ``depth_corruption``, ...; those
            of depth are for training cells only.

    Returns:
        A loader whose ``batch_sampler`` is a `CellBatchSampler`.
    """
    is_train = split == "train"
    needs_tail = corruption.get("depth_corruption") == "thin" or corruption.get("n_gene_queries")
    cells = CellCorpus(
        corpus,
        split,
        ranking_settings=tokenizer.ranking_settings,
        conditions=conditions,
        max_genes=None if needs_tail else tokenizer.max_genes,
    )
    rank, world_size = process
    if not is_train:
        seed, corruption["depth_corruption"], corruption["condition_dropout"] = 0, "none", (0.0, 0.0)
    if corruption.get("objective") == "elbo":
        corruption["mean_n_genes"] = float(np.minimum(cells.n_genes, tokenizer.max_genes).mean())
    sampler = CellBatchSampler(
        cells.n_genes,
        batch_size=batch_size,
        max_genes=tokenizer.max_genes,
        seed=seed,
        rank=rank,
        world_size=world_size,
        shuffle=is_train,
    )
    collator = ScDivaDataCollator.from_tokenizer(tokenizer, seed=seed, **corruption)
    # The corpus hands over a batch as one object, not the list of items that the type asks for.
    return DataLoader(cells, batch_sampler=sampler, collate_fn=collator, num_workers=num_workers)  # type: ignore[arg-type]
