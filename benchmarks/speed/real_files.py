"""From real files to Arrow corpus, beside plain NumPy with `Dataset.from_generator`; needs their names.

Reading, proving counts and matching genes are ours on both sides; ranking and writing differ.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, disable_progress_bars
from side_by_side import interleave, number_line, ratio_line, report

from tokenization_scdiva import (
    CorpusSettings,
    ScDivaTokenizer,
    build_corpus,
    build_vocabulary,
    find_cell_files,
    open_cells,
    read_counts,
)
from tokenization_scdiva.corpus import corpus_features


def build(files: dict[str, Path], tokenizer: ScDivaTokenizer) -> int:
    """Build a corpus in a folder that is thrown away; return its number of cells."""
    with tempfile.TemporaryDirectory() as corpus:
        settings = CorpusSettings(validation_fraction=0.0)
        manifest = build_corpus(files, corpus, tokenizer=tokenizer, settings=settings, show_progress=False)
    assert manifest is not None
    return manifest["splits"]["train"]["n_cells"]


def plain_rows(files: dict[str, Path], tokenizer: ScDivaTokenizer) -> Iterator[dict[str, Any]]:
    """Rank cell by cell."""
    weights = tokenizer.ranking_weights
    for dataset_id, path in enumerate(files.values()):
        with open_cells(path) as adata:
            counts = read_counts(adata)
            tokens = tokenizer.match_genes(adata, counts).token_ids
            for block in counts.blocks():
                for row, (start, stop) in enumerate(zip(block.indptr[:-1], block.indptr[1:], strict=True)):
                    amounts, token_ids = block.data[start:stop], tokens[block.indices[start:stop]]
                    library_size = amounts.sum()
                    amounts, token_ids = amounts[token_ids >= 0], token_ids[token_ids >= 0]
                    values = np.log1p(amounts * 1e4 / library_size).astype(np.float32)
                    order = np.argsort(-(values / weights[token_ids]), kind="stable")
                    yield {
                        "gene_ids": token_ids[order].astype(np.uint16),
                        "counts": amounts[order].astype(np.uint16),
                        "library_size": library_size,
                        "dataset_id": dataset_id,
                        "cell_index": block.start + row,
                    }


def build_plainly(files: dict[str, Path], tokenizer: ScDivaTokenizer) -> int:
    """Let `datasets` write what `plain_rows` yields; return the number of cells."""
    features = corpus_features(
        value_kind="counts", vocab_size=len(tokenizer), count_dtype="uint16", obs_keys=()
    )
    with tempfile.TemporaryDirectory() as cache:
        keywords = {"files": files, "tokenizer": tokenizer}
        rows = Dataset.from_generator(
            plain_rows, features=features, cache_dir=cache, gen_kwargs=keywords, fingerprint="plain"
        )
        return len(rows)


def main() -> None:
    """Measure."""
    disable_progress_bars()
    files = find_cell_files([word for word in sys.argv[1:] if word.endswith(".h5ad")])
    vocabulary, _ = build_vocabulary(files, show_progress=False)
    tokenizer = ScDivaTokenizer(vocabulary=vocabulary)
    n_cells = build(files, tokenizer)
    timings = interleave(
        {
            "corpus": lambda: build(files, tokenizer),
            "from_generator": lambda: build_plainly(files, tokenizer),
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
