"""Entropy from streamed histograms equals entropy from the whole matrix, however cells are cut and merged.

Needs no data. Run: pytest tests/test_gene_entropy.py
"""

import math

import numpy as np
import pytest

from tokenization_scdiva.gene_entropy import GeneEntropy


def make_values(seed=0, n_cells=200, n_genes=12):
    """(n_cells, n_genes) log1p-normalised expression with zeros and a silent gene."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(0.5, 4, n_genes), (n_cells, n_genes))
    counts[:, 4] = 0
    return np.log1p(1e4 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)).astype(np.float32)


def update(entropy, values, measured=None):
    _, genes = np.nonzero(values)
    entropy.update(genes, values[values > 0], len(values), measured)


def reference_entropy(values, n_bins=32):
    """The definition, gene by gene, with numpy's histogram."""
    edges = np.linspace(0, math.log(10_001), n_bins + 1)
    result = []
    for column in values.T.astype(np.float64):
        histogram = np.concatenate([[np.sum(column == 0)], np.histogram(column[column > 0], edges)[0]])
        share = histogram[histogram > 0] / len(column)
        result.append(-np.sum(share * np.log(share)))
    is_silent = (values == 0).all(axis=0)
    return np.where(is_silent, np.median(np.array(result)[~is_silent]), result)


def test_hand_computed_entropy():
    # Four bins of width 1. Gene 0: two zeros, one value in bin 0, one in bin 2. Gene 1: all in bin 3.
    entropy = GeneEntropy(3, target_sum=math.expm1(4.0), n_bins=4)
    entropy.update(np.array([0, 1, 1]), np.array([0.5, 3.2, 4.0]), 2)
    entropy.update(np.array([0, 1, 1]), np.array([2.0, 3.9, 3.0]), 2)
    assert entropy.histogram.tolist() == [[2, 1, 0, 1, 0], [0, 0, 0, 0, 4], [4, 0, 0, 0, 0]]
    assert entropy.n_cells == 4
    expected = 0.5 * math.log(2) + 0.5 * math.log(4)
    np.testing.assert_allclose(entropy.entropy(), [expected, 0.0, expected / 2])  # the silent gene: median
    mean, variance = entropy.mean_variance()
    np.testing.assert_allclose(mean, [0.75, 3.5, 0])  # gene 0: 0, 0, 0.5, 2.5
    np.testing.assert_allclose(variance, [1.0625, 0, 0])


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_definition(seed):
    values = make_values(seed)
    entropy = GeneEntropy(values.shape[1])
    update(entropy, values)
    np.testing.assert_allclose(entropy.entropy(), reference_entropy(values), rtol=1e-12)
    mean, variance = entropy.mean_variance()
    np.testing.assert_allclose(mean, values.mean(axis=0), atol=entropy.bin_width / 2)
    np.testing.assert_allclose(np.sqrt(variance), values.std(axis=0), atol=entropy.bin_width / 2)


@pytest.mark.parametrize("seed", range(5))
def test_blocks_and_merges_equal_one_pass(seed):
    rng = np.random.default_rng(seed)
    values = make_values(seed)
    whole = GeneEntropy(values.shape[1])
    update(whole, values)
    parts = [GeneEntropy(values.shape[1]) for _ in range(3)]
    for block in np.array_split(rng.permutation(values), 17):
        update(parts[rng.integers(3)], block)
    merged = GeneEntropy(values.shape[1])
    for part in parts:
        merged.merge(part)
    np.testing.assert_array_equal(merged.histogram, whole.histogram)
    assert merged.n_cells == whole.n_cells
    np.testing.assert_array_equal(merged.entropy(), whole.entropy())


def test_values_fall_into_the_same_bins_in_any_precision():
    values = make_values(7)
    both = [GeneEntropy(values.shape[1]) for _ in range(2)]
    update(both[0], values)
    update(both[1], values.astype(np.float64))
    np.testing.assert_array_equal(both[0].histogram, both[1].histogram)


def test_unmeasured_genes_get_no_zeros():
    values = make_values()
    measured = np.arange(values.shape[1]) % 2 == 0
    entropy = GeneEntropy(values.shape[1])
    update(entropy, values * measured, measured)
    update(entropy, values)
    assert entropy.histogram.sum(axis=1).tolist() == [400 if is_measured else 200 for is_measured in measured]
    only_even = GeneEntropy(values.shape[1])
    update(only_even, values * measured, measured)
    mean, variance = only_even.mean_variance()
    assert np.isnan(mean[~measured]).all()
    assert np.isnan(variance[~measured]).all()
    seen = measured & values.any(axis=0)
    np.testing.assert_array_equal(only_even.entropy()[~measured], np.median(only_even.entropy()[seen]))


def test_values_beyond_the_last_edge_count_in_the_last_bin():
    entropy = GeneEntropy(1)
    entropy.update(np.array([0, 0]), np.array([math.log(10_001), 13.0]), 2)
    assert entropy.histogram[0, -1] == 2


def test_memory_is_constant():
    entropy = GeneEntropy(5)
    n_bytes = entropy.histogram.nbytes
    for _ in range(50):
        entropy.update(np.arange(5), np.full(5, 0.7), 10)
    assert entropy.histogram.nbytes == n_bytes == 5 * 33 * 8
    assert entropy.histogram.sum() == 5 * 500


@pytest.mark.parametrize(
    ("genes", "values", "n_cells", "measured", "message"),
    [
        ([0, 1], [1.0], 3, None, r"one shape \(nnz,\), got \(2,\) and \(1,\)"),
        ([0, 4], [1.0, 1.0], 3, None, r"must lie in \[0, 4\), got 0 to 4"),
        ([-1], [1.0], 3, None, r"must lie in \[0, 4\), got -1 to -1"),
        ([0, 1], [1.0, 0.0], 3, None, r"1 others \(first: 0.0\)"),
        ([0, 1], [np.nan, -1.0], 3, None, r"2 others \(first: nan\)"),
        ([2, 2], [1.0, 1.0], 1, None, "Gene 2 has 2 values in 1 cells;"),
        (
            [2],
            [1.0],
            3,
            [True, True, False, True],
            "Gene 2 has 1 values in 3 cells but is not among the measured",
        ),
        ([2], [1.0], 3, [True], r"one entry per gene, \(4,\), got \(1,\)"),
    ],
)
def test_wrong_blocks_are_refused_whole(genes, values, n_cells, measured, message):
    entropy = GeneEntropy(4)
    measured = None if measured is None else np.array(measured)
    with pytest.raises(ValueError, match=message):
        entropy.update(np.array(genes), np.array(values), n_cells, measured)
    assert entropy.n_cells == entropy.histogram.sum() == 0


def test_other_refusals():
    silent = GeneEntropy(2)
    silent.update(np.array([], dtype=int), np.array([]), 3)
    with pytest.raises(ValueError, match="No expression was seen in 3 cells"):
        silent.entropy()
    with pytest.raises(ValueError, match=r"differ in .*: \(2, 10000.0, 32\) here, \(2, 10000.0, 16\) there"):
        GeneEntropy(2).merge(GeneEntropy(2, n_bins=16))
    for arguments in ({"n_genes": 0}, {"n_genes": 2, "n_bins": 0}, {"n_genes": 2, "target_sum": math.inf}):
        with pytest.raises(ValueError, match="GeneEntropy needs n_genes >= 1"):
            GeneEntropy(**arguments)
