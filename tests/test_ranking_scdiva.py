"""Genes of a cell come in one order: score descending, ties by token id, whatever the storage.

Needs no data. Run: pytest tests/test_ranking_scdiva.py
"""

import numpy as np
import pytest

from tokenization_scdiva.ranking_scdiva import (
    FlatCells,
    keep_vocabulary_genes,
    normalise_counts,
    pad_cells,
    rank_cells,
    select_cells,
    select_genes,
    splitmix64,
)

VOCAB_SIZE = 60
# Everything twice: compiled and by plain NumPy.
pytestmark = pytest.mark.usefixtures("kernels")
ORDERS = ("entropy", "expression", "random")


def flat_cells(token_lists, value_lists):
    """FlatCells of hand-written cells."""
    lengths = [len(tokens) for tokens in token_lists]
    return FlatCells(
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.concatenate([np.array(tokens, np.int32) for tokens in token_lists]),
        np.concatenate([np.array(values, np.float32) for values in value_lists]),
        None,
        None,
    )


def random_cells(seed, n_cells=12):
    """Cells of 0 to 40 genes whose values are so few that ties are the rule, and ranking weights."""
    rng = np.random.default_rng(seed)
    tokens = [5 + rng.permutation(VOCAB_SIZE - 5)[: rng.integers(0, 41)] for _ in range(n_cells)]
    values = [rng.choice([0.5, 1.0, 1.5, 3.0], size=len(cell)) for cell in tokens]
    weights = rng.choice([1.0, 1.5, 2.0, 3.0], size=VOCAB_SIZE)
    return flat_cells(tokens, values), weights


def cell(cells, index):
    entries = slice(cells.offsets[index], cells.offsets[index + 1])
    return cells.token_ids[entries].tolist(), cells.values[entries].tolist()


def test_normalise_counts_by_hand():
    # 10,000 * 3 / 6,000 = 5 and 10,000 * 1 / 10,000 = 1
    values = normalise_counts(np.array([3, 1]), np.array([6000.0, 10000.0]), 1e4)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, np.log([6.0, 2.0]), rtol=1e-7)


def test_order_by_hand():
    # Weights H + 1: token 5 -> 2, 6 -> 1, 7 -> 4, 8 -> 1. Scores: 6/2 = 3, 1/1 = 1, 8/4 = 2, 1/1 = 1.
    cells = flat_cells([[8, 7, 6, 5]], [[1.0, 8.0, 1.0, 6.0]])
    weights = np.array([1, 1, 1, 1, 1, 2, 1, 4, 1], dtype=np.float64)
    ranked = rank_cells(cells, gene_order="entropy", ranking_weights=weights, max_genes=None)
    assert cell(ranked, 0) == ([5, 7, 6, 8], [6.0, 8.0, 1.0, 1.0])  # 6 before 8: a tie goes to the lower id
    ranked = rank_cells(cells, gene_order="expression", ranking_weights=weights, max_genes=3)
    assert cell(ranked, 0) == ([7, 5, 6], [8.0, 6.0, 1.0])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("gene_order", ["entropy", "expression"])
def test_order_equals_lexsort(seed, gene_order):
    """A second implementation: plain lexsort, cell by cell."""
    cells, weights = random_cells(seed)
    ranked = rank_cells(cells, gene_order=gene_order, ranking_weights=weights, max_genes=17)
    divisor = weights if gene_order == "entropy" else np.ones(VOCAB_SIZE)
    for index in range(cells.n_cells):
        tokens, values = (np.array(part) for part in cell(cells, index))
        order = np.lexsort((tokens, -values / divisor[tokens.astype(int)]))[:17]
        assert cell(ranked, index) == (tokens[order].tolist(), values[order].tolist())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("gene_order", ORDERS)
def test_order_depends_neither_on_gene_order_nor_on_blocks(seed, gene_order):
    cells, weights = random_cells(seed)
    settings = {"gene_order": gene_order, "ranking_weights": weights, "max_genes": 9, "seed": 3}
    whole = rank_cells(cells, **settings)

    rng = np.random.default_rng(seed + 100)
    places = [start + rng.permutation(n) for start, n in zip(cells.offsets, cells.n_genes, strict=False)]
    places = np.concatenate(places)
    shuffled = cells._replace(token_ids=cells.token_ids[places], values=cells.values[places])
    again = rank_cells(shuffled, **settings)
    assert again.token_ids.tolist() == whole.token_ids.tolist()
    assert again.values.tolist() == whole.values.tolist()

    for index in range(cells.n_cells):
        alone = rank_cells(select_cells(shuffled, np.arange(cells.n_cells) == index), **settings)
        assert cell(alone, 0) == cell(whole, index)


def test_random_order_is_a_shuffle_of_its_own_in_every_cell_and_seed():
    tokens = [list(range(5, 45))] * 2
    cells = flat_cells(tokens, [np.linspace(1, 2, 40), np.linspace(1, 3, 40)])
    ones = np.ones(VOCAB_SIZE)
    first = rank_cells(cells, gene_order="random", ranking_weights=ones, max_genes=None, seed=0)
    other = rank_cells(cells, gene_order="random", ranking_weights=ones, max_genes=None, seed=1)
    assert sorted(cell(first, 0)[0]) == tokens[0]
    orders = {tuple(cell(ranked, index)[0]) for ranked in (first, other) for index in (0, 1)}
    assert len(orders) == 4


def test_random_order_prefers_no_gene():
    rng = np.random.default_rng(0)
    n_cells = 2000
    cells = flat_cells([list(range(5, 15))] * n_cells, list(rng.uniform(0.5, 2, (n_cells, 10))))
    ranked = rank_cells(cells, gene_order="random", ranking_weights=np.ones(15), max_genes=1)
    counts = np.bincount(ranked.token_ids, minlength=15)[5:]
    chi_square = ((counts - 200.0) ** 2 / 200.0).sum()
    assert chi_square < 27.9  # 99.9 % of 9 degrees of freedom


def test_counts_and_depths_travel_with_their_genes():
    cells = flat_cells([[5, 6], [7]], [[1.0, 2.0], [3.0]])
    cells = cells._replace(counts=np.array([10, 20, 30], np.int32), library_size=np.array([100.0, 200.0]))
    ranked = rank_cells(cells, gene_order="expression", ranking_weights=np.ones(9), max_genes=None)
    assert ranked.counts.tolist() == [20, 10, 30]
    assert ranked.library_size.tolist() == [100.0, 200.0]


def test_unknown_gene_order_is_refused():
    cells, weights = random_cells(0)
    with pytest.raises(
        ValueError, match="gene_order must be 'entropy', 'expression' or 'random', got 'rank'"
    ):
        rank_cells(cells, gene_order="rank", ranking_weights=weights, max_genes=None)


def test_keep_vocabulary_genes_against_dense():
    rng = np.random.default_rng(1)
    dense = rng.poisson(0.7, (7, 10))
    dense[2] = 0
    column_tokens = np.array([7, -1, 5, 9, -1, 6, -1, 8, 10, -1])
    rows, columns = np.nonzero(dense)
    indptr = np.searchsorted(rows, np.arange(8))
    offsets, tokens, amounts = keep_vocabulary_genes(indptr, columns, dense[rows, columns], column_tokens)
    back = np.zeros((7, 11), dtype=int)
    back[np.repeat(np.arange(7), np.diff(offsets)), tokens] = amounts
    wanted = np.zeros((7, 11), dtype=int)
    wanted[:, column_tokens[column_tokens >= 0]] = dense[:, column_tokens >= 0]
    np.testing.assert_array_equal(back, wanted)


def test_pad_cells_by_hand():
    padded = pad_cells(np.array([0, 2, 2, 3]), np.array([7, 8, 9]), first=2, fill=0)
    assert padded.tolist() == [[2, 7, 8], [2, 0, 0], [2, 9, 0]]
    assert pad_cells(np.array([0, 0]), np.array([], dtype=np.int64), first=2, fill=0).tolist() == [[2]]


def test_selections_by_hand():
    cells = flat_cells([[5, 6], [], [7, 8, 9]], [[1, 2], [], [3, 4, 5]])
    kept = select_cells(cells, np.array([False, True, True]))
    assert (kept.offsets.tolist(), kept.token_ids.tolist()) == ([0, 0, 3], [7, 8, 9])
    kept = select_genes(cells, np.array([False, True, True, False, True]))
    assert (kept.offsets.tolist(), kept.values.tolist()) == ([0, 1, 1, 3], [2.0, 3.0, 5.0])


def test_splitmix64_known_answers():
    """First words of the published generator with state 0 (Steele, Lea and Flood 2014)."""
    words = splitmix64(np.arange(3))
    assert [hex(int(word)) for word in words] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]
