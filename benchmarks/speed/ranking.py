"""Ranking kernel: CSR rows to the first 1,200 genes with their values, beside the plain loop over rows.

The loop is what one writes first: slice the row, normalise, score, stable argsort, cut. Both give the same
tokens and values, which is checked before anything is timed.
"""

from collections.abc import Iterator

import numpy as np
from inputs import make_counts, make_tokenizer
from side_by_side import interleave, number_line, ratio_line, report

from tokenization_scdiva.counts_scdiva import CountBlock
from tokenization_scdiva.kernels_scdiva import compiled_kernels
from tokenization_scdiva.ranking_scdiva import FlatCells, cell_values, keep_vocabulary_genes, rank_cells

N_CELLS, BLOCK_SIZE = 2_000, 500
TARGET_SUM, MAX_GENES = 1e4, 1200


def make_blocks() -> list[CountBlock]:
    """Cut made-up counts into proven blocks."""
    counts = make_counts(N_CELLS)
    blocks = []
    for start in range(0, N_CELLS, BLOCK_SIZE):
        rows = counts[start : start + BLOCK_SIZE]
        blocks.append(
            CountBlock(start, rows.indptr.astype(np.int64), rows.indices, rows.data.astype(np.int32))
        )
    return blocks


def by_kernels(blocks: list[CountBlock], tokens: np.ndarray, weights: np.ndarray) -> Iterator[FlatCells]:
    """Rank as the tokenizer does, block by block."""
    for block in blocks:
        sizes = block.row_sums()
        offsets, token_ids, counts = keep_vocabulary_genes(block.indptr, block.indices, block.data, tokens)
        values = cell_values(offsets, counts, sizes, TARGET_SUM)
        cells = FlatCells(offsets, token_ids, values, counts, sizes)
        yield rank_cells(cells, gene_order="entropy", ranking_weights=weights, max_genes=MAX_GENES)


def by_plain_loop(
    blocks: list[CountBlock], tokens: np.ndarray, weights: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rank row by row."""
    for block in blocks:
        for start, stop in zip(block.indptr[:-1], block.indptr[1:], strict=True):
            counts = block.data[start:stop]
            token_ids = tokens[block.indices[start:stop]]
            is_known = token_ids >= 0
            values = np.log1p(counts[is_known] * TARGET_SUM / counts.sum()).astype(np.float32)
            token_ids = token_ids[is_known]
            scores = (values / weights[token_ids]).astype(np.float32)
            order = np.argsort(-scores, kind="stable")[:MAX_GENES]
            yield token_ids[order], values[order]


def check_equal(blocks: list[CountBlock], tokens: np.ndarray, weights: np.ndarray) -> None:
    """Compare both ways; genes of equal score may stand in either order in the plain loop."""
    plain = by_plain_loop(blocks, tokens, weights)
    for cells in by_kernels(blocks, tokens, weights):
        for start, stop in zip(cells.offsets[:-1], cells.offsets[1:], strict=True):
            token_ids, values = next(plain)
            scores = (values / weights[token_ids]).astype(np.float32)
            order = np.lexsort((token_ids, -scores))
            last = scores > scores[-1]  # at the cut a tie may keep another gene
            ours = cells.token_ids[start:stop], cells.values[start:stop]
            np.testing.assert_array_equal(ours[0][last], token_ids[order][last])
            np.testing.assert_array_equal(ours[1][last], values[order][last])


def exhaust(cells: Iterator) -> None:
    """Take everything and keep nothing, as a writer would."""
    for _ in cells:
        pass


def main() -> None:
    """Measure."""
    blocks = make_blocks()
    tokenizer = make_tokenizer()
    names = {name: token for token, name in enumerate(tokenizer.vocabulary.gene_ids)}
    tokens = np.array([names.get(f"ENSG{gene:011d}", -1) for gene in range(33_000)], dtype=np.int32)
    inputs = (blocks, tokens, tokenizer.ranking_weights)
    check_equal(*inputs)
    timings = interleave(
        {"kernels": lambda: exhaust(by_kernels(*inputs)), "loop": lambda: exhaust(by_plain_loop(*inputs))},
        n_repeats=7,
    )
    speeds = [N_CELLS / seconds for seconds in timings["kernels"].cpu]
    report(
        "ranking",
        [
            ratio_line("kernels over plain loop", timings["loop"], timings["kernels"], floor=3.0, aim=4.5),
            number_line("cells per CPU second", speeds, unit="cells/s", is_compared=False),
        ],
        timings,
        n_cells=N_CELLS,
        is_compiled=compiled_kernels() is not None,
    )


if __name__ == "__main__":
    main()
