"""Loader: shuffled cells fetched, corrupted and collated, beside `with_format("torch")` item by item.

Both sides use the same cells in the same batches and the same collator. What a GPU could consume at best is
arithmetic: 1,900 full cells of the paper's network a second on an H100 at all of its peak.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from inputs import make_counts, make_tokenizer, write_cells
from side_by_side import interleave, number_line, ratio_line, report

from tokenization_scdiva import CellCorpus, CorpusSettings, ScDivaTokenizer, build_corpus
from tokenization_scdiva.batch_sampler import CellBatchSampler
from tokenization_scdiva.collation import ScDivaDataCollator
from tokenization_scdiva.corpus import CellBatch, CellDraw
from tokenization_scdiva.ranking_scdiva import FlatCells, normalise_counts

N_CELLS, BATCH_SIZE = 4_000, 64
H100_CELLS_PER_SECOND = 1_900


def fetch_items(rows: Dataset, draws: Sequence[CellDraw], measured_genes: np.ndarray) -> CellBatch:
    """Fetch cell by cell, as `DataLoader` does with a data set in torch format."""
    items = [rows[draw.cell] for draw in draws]
    offsets = np.concatenate([[0], np.cumsum([len(item["gene_ids"]) for item in items])])
    token_ids = torch.cat([item["gene_ids"] for item in items]).numpy().astype(np.int32)
    counts = torch.cat([item["counts"] for item in items]).numpy().astype(np.int32)
    library_size = np.array([float(item["library_size"]) for item in items])
    dataset_ids = np.array([int(item["dataset_id"]) for item in items])
    values = normalise_counts(counts, np.repeat(library_size, np.diff(offsets)), 1e4)
    cells = FlatCells(offsets, token_ids, values, counts, library_size)
    return CellBatch(cells, np.array(draws, dtype=np.int64), dataset_ids, measured_genes)


def open_corpus(folder: Path, tokenizer: ScDivaTokenizer) -> CellCorpus:
    """Build a corpus of made-up cells and open it."""
    write_cells(folder / "cells.h5ad", make_counts(N_CELLS))
    settings = CorpusSettings(validation_fraction=0.0)
    files = {"cells": folder / "cells.h5ad"}
    build_corpus(files, folder / "corpus", tokenizer=tokenizer, settings=settings, show_progress=False)
    settings = tokenizer.ranking_settings
    return CellCorpus(folder / "corpus", "train", ranking_settings=settings, max_genes=tokenizer.max_genes)


def main() -> None:
    """Measure."""
    disable_progress_bars()
    tokenizer = make_tokenizer()
    with tempfile.TemporaryDirectory() as scratch:
        corpus = open_corpus(Path(scratch), tokenizer)
        collate = ScDivaDataCollator.from_tokenizer(tokenizer)
        sampler = CellBatchSampler(corpus.n_genes, batch_size=BATCH_SIZE, max_genes=tokenizer.max_genes)
        batches = list(sampler)
        file = Path(scratch) / "corpus" / "train-00000-of-00001.arrow"
        rows = Dataset.from_file(str(file)).with_format("torch")
        measured = corpus.measured_genes

        for name, tensor in collate(corpus.__getitems__(batches[0])).items():
            assert torch.equal(tensor, collate(fetch_items(rows, batches[0], measured))[name]), name

        def by_batch() -> None:
            for batch in batches:
                collate(corpus.__getitems__(batch))

        def by_item() -> None:
            for batch in batches:
                collate(fetch_items(rows, batch, measured))

        timings = interleave({"by batch": by_batch, "by item": by_item})
    n_cells = len(batches) * BATCH_SIZE
    speeds = [n_cells / seconds for seconds in timings["by batch"].cpu]
    need = [speed / H100_CELLS_PER_SECOND for speed in speeds]
    lines = [
        ratio_line("batches over items", timings["by item"], timings["by batch"], floor=10.0, aim=25.0),
        number_line(
            "per core, over an H100 at its peak", need, floor=5.0, aim=20.0, is_compared=False
        ),
        number_line("cells per CPU second", speeds, unit="cells/s", is_compared=False),
    ]  # fmt: skip
    report("loader", lines, timings, n_cells=n_cells, batch_size=BATCH_SIZE)


if __name__ == "__main__":
    main()
