"""From real files to Arrow corpus, beside plain NumPy with `Dataset.from_generator`; needs their names.

Reading, proving counts and matching genes are ours on both sides; ranking and writing differ.
"""

import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars
from plain_corpus import build, build_plainly, plain_cell
from side_by_side import interleave, number_line, ratio_line, report

from tokenization_scdiva import (
    ScDivaTokenizer,
    build_vocabulary,
    find_cell_files,
    open_cells,
    read_counts,
)


def plain_rows(files: dict[str, Path], tokenizer: ScDivaTokenizer) -> Iterator[dict[str, Any]]:
    """Rank cell by cell."""
    for dataset_id, path in enumerate(files.values()):
        with open_cells(path) as adata:
            counts = read_counts(adata)
            tokens = tokenizer.match_genes(adata, counts).token_ids
            weights = tokenizer.ranking_weights
            for block in counts.blocks():
                for row, (start, stop) in enumerate(pairwise(block.indptr)):
                    genes = tokens[block.indices[start:stop]]
                    cell = plain_cell(block.data[start:stop], genes, weights)
                    yield cell | {"dataset_id": dataset_id, "cell_index": block.start + row}


def main() -> None:
    """Measure."""
    disable_progress_bars()
    files = find_cell_files([word for word in sys.argv[1:] if word.endswith(".h5ad")])
    vocabulary, _ = build_vocabulary(files, show_progress=False)
    tokenizer = ScDivaTokenizer(vocabulary=vocabulary)
    n_cells = build(files, tokenizer)["splits"]["train"]["n_cells"]
    timings = interleave(
        {
            "corpus": lambda: build(files, tokenizer),
            "from_generator": lambda: build_plainly(plain_rows, files, tokenizer),
        }
    )
    speeds = [n_cells / seconds for seconds in timings["corpus"].cpu]
    lines = [
        ratio_line("corpus over from_generator", timings["from_generator"], timings["corpus"]),
        number_line("cells per CPU second", speeds, unit="cells/s", is_compared=False),
    ]
    report("real files", lines, timings, n_cells=n_cells, files=sorted(files))


if __name__ == "__main__":
    main()
