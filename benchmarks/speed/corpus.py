"""From h5ad to Arrow corpus: beside plain NumPy with `Dataset.from_generator`, and beside decompression.

Both sides store the same columns of the same cells in the same order of genes; ours also shuffles, splits,
hashes and reports. Memory is the peak that a process of its own reaches beyond mapped files, for 4,000 cells
and for 40,000; freed blocks go back to the system at once there (MALLOC_MMAP_THRESHOLD_), else the peak is as
much the allocator's as ours.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
from datasets import disable_progress_bars
from inputs import N_GENES, gene_name, make_counts, make_tokenizer, write_cells
from plain_corpus import build, build_plainly, plain_cell
from scipy.sparse import vstack
from side_by_side import N_REPEATS, Line, interleave, number_line, ratio_line, report

from tokenization_scdiva import ScDivaTokenizer

N_CELLS, BLOCK_SIZE = 16_000, 1000
FEW, MANY = 4_000, 40_000

# The peak of what is no mapped file, seen every few milliseconds: mapped pages can be dropped at any time.
MEASURE = """
import sys, threading
from pathlib import Path
from tokenization_scdiva import CorpusSettings, ScDivaTokenizer, build_corpus
peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]))
watcher = threading.Thread(target=watch)
watcher.start()
source, corpus, tokenizer = map(Path, sys.argv[1:])
build_corpus({"cells": source}, corpus, show_progress=False, settings=CorpusSettings(),
             tokenizer=ScDivaTokenizer.from_pretrained(tokenizer))
done.set()
watcher.join()
print(peak / 1024)
"""


def plain_rows(files: dict[str, Path], tokenizer: ScDivaTokenizer) -> Iterator[dict[str, Any]]:
    """Do the same cell by cell, reading included."""
    names = {name: token for token, name in enumerate(tokenizer.vocabulary.gene_ids)}
    weights = tokenizer.ranking_weights
    (source,) = files.values()
    adata = anndata.read_h5ad(source, backed="r")
    tokens = np.array([names.get(name, -1) for name in adata.var_names])
    for first in range(0, adata.n_obs, BLOCK_SIZE):
        block = adata.X[first : first + BLOCK_SIZE]
        for row, (start, stop) in enumerate(pairwise(block.indptr)):
            cell = plain_cell(block.data[start:stop], tokens[block.indices[start:stop]], weights)
            yield cell | {"dataset_id": 0, "cell_index": first + row}
    adata.file.close()


def decompress(source: Path) -> None:
    """Read the matrix of a file in blocks, and nothing else."""
    with h5py.File(source) as file:
        indptr = file["X/indptr"][:]
        for first in range(0, len(indptr) - 1, BLOCK_SIZE):
            start, stop = indptr[first], indptr[min(first + BLOCK_SIZE, len(indptr) - 1)]
            file["X/data"][start:stop], file["X/indices"][start:stop]


def peak_memory(source: Path, corpus: Path) -> float:
    """Build in a process of its own; return its peak in MB."""
    command = [sys.executable, "-c", MEASURE, str(source), str(corpus / source.stem)]
    done = subprocess.run(
        [*command, str(source.parent / "tokenizer")],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)},
    )
    return float(done.stdout)


def memory_line(scratch: Path, counts: Any, tokenizer: ScDivaTokenizer) -> Line:
    """Measure the growth of memory with the number of cells."""
    tokenizer.save_pretrained(scratch / "tokenizer")
    write_cells(scratch / "few.h5ad", counts[:FEW])
    write_cells(scratch / "many.h5ad", vstack([counts[:FEW]] * (MANY // FEW), format="csr"))
    growths = [
        peak_memory(scratch / "many.h5ad", scratch / f"{repeat}")
        - peak_memory(scratch / "few.h5ad", scratch / f"{repeat}")
        for repeat in range(N_REPEATS)
    ]
    return number_line(
        "memory, 4,000 to 40,000 cells", growths, floor=50.0, aim=20.0, better="lower", unit="MB",
        is_compared=False,
    )  # fmt: skip


def main() -> None:
    """Measure."""
    disable_progress_bars()
    counts, tokenizer = make_counts(N_CELLS), make_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        memory = memory_line(scratch, counts, tokenizer)
        raw, zipped = ({"cells": scratch / f"{name}.h5ad"} for name in ("raw", "zipped"))
        write_cells(raw["cells"], counts)
        write_cells(zipped["cells"], counts, compression="gzip")
        manifest = build(raw, tokenizer)
        timings = interleave(
            {
                "corpus": lambda: build(raw, tokenizer),
                "from_generator": lambda: build_plainly(plain_rows, raw, tokenizer),
                "corpus, gzip": lambda: build(zipped, tokenizer),
                "decompression": lambda: decompress(zipped["cells"]),
            }
        )
    known = np.array([gene_name(gene) in tokenizer.vocabulary.token_ids for gene in range(N_GENES)])
    n_genes = int(known[counts.indices].sum())
    n_bytes = sum(shard["n_bytes"] for shard in manifest["splits"]["train"]["shards"])
    size = n_bytes / (4 * n_genes)
    lines = [
        ratio_line(
            "corpus over from_generator", timings["from_generator"], timings["corpus"], floor=6.0, aim=12.0
        ),
        number_line(
            "cells per CPU second", [N_CELLS / seconds for seconds in timings["corpus"].cpu],
            unit="cells/s", is_compared=False,
        ),
        ratio_line(
            "gzip: share of decompression", timings["decompression"], timings["corpus, gzip"],
            floor=0.40, aim=0.55,
        ),
        memory,
        Line("bytes over 4 bytes a gene", size, (size, size), floor=1.25, aim=1.02, better="lower"),
    ]  # fmt: skip
    report("corpus", lines, timings, n_cells=N_CELLS, genes_per_cell=n_genes / N_CELLS)


if __name__ == "__main__":
    main()
