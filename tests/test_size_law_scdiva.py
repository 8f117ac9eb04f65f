"""Tests of the law of cell sizes: library sizes and numbers of gene tokens, counted on training cells.

Scope: everything in `size_law_scdiva`.
Run: pytest tests/test_size_law_scdiva.py
"""

import json
import math

import numpy as np
import pytest
from scipy import stats

from modeling_scdiva.size_law_scdiva import draw_sizes, fit_size_law, length_log_prob

MAX_GENES = 40


def training_cells(n_cells=3000, seed=0):
    """Deeper cells have more genes; every tenth or so is cut at ``MAX_GENES``."""
    rng = np.random.default_rng(seed)
    library_sizes = np.round(rng.lognormal(8.0, 0.6, n_cells))
    n_genes = np.clip(rng.poisson(library_sizes / 130), 1, MAX_GENES)
    return n_genes, library_sizes


def fitted(n_cells=3000, **settings):
    n_genes, library_sizes = training_cells(n_cells)
    arguments = {"max_genes": MAX_GENES, "target_sum": 1e4, "n_depth_classes": 4, "n_length_bins": 6}
    return fit_size_law(n_genes, library_sizes, **arguments | settings)


def uniform_rows(n_rows, seed=0):
    return np.random.default_rng(seed).random((n_rows, 3))


def class_depths(size_law):
    """A library size inside each depth class."""
    edges = np.array(size_law["library_size_edges"])
    return (edges[1:] + edges[:-1]) / 2


def test_law_by_hand():
    # Lengths 1 1 2 2 | 5 8 8 8, two bins of lengths: 1 .. 2, 3 .. 7 and the atom at 8.
    n_genes, library_sizes = np.array([1, 1, 2, 2, 5, 8, 8, 8]), np.arange(10.0, 90.0, 10.0)
    law = fit_size_law(
        n_genes, library_sizes, max_genes=8, target_sum=1e4, n_depth_classes=2, n_length_bins=2
    )
    assert law == {
        "library_size_edges": [10.0, 45.0, 80.0],
        "n_genes_edges": [1, 4, 8, 9],  # the median lies between 2 and 5 and is rounded to even
        "counts": [[4, 0, 0], [0, 1, 3]],
        "target_sum": 1e4,
    }
    # One pseudo-cell over 8 lengths: 3/8, 4/8 and 1/8 of it fall into the bins.
    expected = [(4 + 3 / 8) / 5 / 3, (4 / 8) / 5 / 4, (1 / 8) / 5]
    nats = length_log_prob(law, np.array([2, 7, 8]), np.array([10.0, 20.0, 44.0]))
    np.testing.assert_allclose(np.exp(nats), expected)
    mixed = length_log_prob(law, np.array([2, 8]), None)
    np.testing.assert_allclose(np.exp(mixed), [(4 + 6 / 8) / 10 / 3, (3 + 2 / 8) / 10])
    impossible = length_log_prob(law, np.array([0, 9, -3]), np.array([50.0] * 3))
    assert impossible.tolist() == [-math.inf] * 3


@pytest.mark.parametrize("n_cells", [1, 7, 3000])
@pytest.mark.parametrize("with_depth", [True, False])
def test_lengths_sum_to_one_in_every_depth_class(n_cells, with_depth):
    n_genes, library_sizes = training_cells(n_cells)
    law = fit_size_law(
        n_genes, library_sizes if with_depth else None, max_genes=MAX_GENES, target_sum=1e4, n_depth_classes=5
    )
    assert np.sum(law["counts"]) == n_cells
    lengths = np.arange(-2, MAX_GENES + 5)
    depths = [None] if not with_depth else [*class_depths(law), 0.5, 1e9, None]
    for depth in depths:
        given = None if depth is None else np.full(len(lengths), depth)
        probabilities = np.exp(length_log_prob(law, lengths, given))
        assert probabilities.sum() == pytest.approx(1.0, abs=1e-12)
        is_possible = (lengths >= 1) & (lengths <= MAX_GENES)
        assert (probabilities[is_possible] > 0).all()
        assert (probabilities[~is_possible] == 0).all()


def test_depth_classes_hold_equally_many_cells_and_cut_cells_are_an_atom():
    n_genes, _ = training_cells()
    law = fitted()
    np.testing.assert_allclose(np.sum(law["counts"], axis=1), 750, atol=2)
    assert law["n_genes_edges"][-2:] == [MAX_GENES, MAX_GENES + 1]
    assert np.sum(law["counts"], axis=0)[-1] == (n_genes == MAX_GENES).sum() > 100
    deepest = class_depths(law)[-1:]
    longest = [MAX_GENES - 1, MAX_GENES]
    before, atom = np.exp([length_log_prob(law, np.array([n]), deepest)[0] for n in longest])
    assert atom > 10 * before


def test_a_mean_over_depths_is_the_law_without_depth():
    law = fitted(n_depth_classes=6)
    lengths = np.arange(1, MAX_GENES + 1)
    by_class = [np.exp(length_log_prob(law, lengths, np.full(MAX_GENES, d))) for d in class_depths(law)]
    weights = np.sum(law["counts"], axis=1) / 3000
    np.testing.assert_allclose(np.exp(length_log_prob(law, lengths, None)), weights @ np.array(by_class))


@pytest.mark.parametrize("with_depth", [True, False])
def test_drawn_sizes_follow_the_law(with_depth):
    law = fitted() if with_depth else fit_size_law(training_cells()[0], None, max_genes=40, target_sum=1e4)
    n_cells = 100_000
    n_genes, library_sizes = draw_sizes(law, uniform_rows(n_cells))
    assert n_genes.dtype == np.int64
    lengths = np.arange(1, MAX_GENES + 1)
    expected = n_cells * np.exp(length_log_prob(law, lengths, None))
    observed = np.bincount(n_genes, minlength=MAX_GENES + 1)[1:]
    assert observed.sum() == n_cells
    assert stats.chisquare(observed, expected * n_cells / expected.sum()).pvalue > 0.001
    if not with_depth:
        assert library_sizes is None
        return
    edges = np.array(law["library_size_edges"])
    assert library_sizes.min() >= np.floor(edges[0])
    assert library_sizes.max() <= np.ceil(edges[-1])
    classes = np.clip(np.searchsorted(edges, library_sizes, side="right") - 1, 0, 3)
    assert stats.chisquare(np.bincount(classes), np.full(4, n_cells / 4)).pvalue > 0.001
    for depth_class in range(4):  # depths are spread evenly over the logarithms of their class
        low, high = np.log(edges[depth_class : depth_class + 2])
        level = (np.log(library_sizes[classes == depth_class]) - low) / (high - low)
        assert level.mean() == pytest.approx(0.5, abs=0.01)
        assert level.std() == pytest.approx(12**-0.5, abs=0.01)


def test_given_depths_are_kept_and_set_the_lengths():
    law = fitted()
    lengths = np.arange(1, MAX_GENES + 1)
    for depth in [*class_depths(law), 1e9]:
        given = np.full(20_000, depth)
        n_genes, library_sizes = draw_sizes(law, uniform_rows(20_000), library_sizes=given)
        np.testing.assert_array_equal(library_sizes, given)
        probabilities = np.exp(length_log_prob(law, lengths, np.full(MAX_GENES, depth)))
        observed = np.bincount(n_genes, minlength=MAX_GENES + 1)[1:]
        is_common = probabilities * 20_000 >= 5
        counted = np.append(observed[is_common], observed[~is_common].sum())
        expected = np.append(probabilities[is_common], probabilities[~is_common].sum()) * 20_000
        kept = expected > 0
        assert stats.chisquare(counted[kept], expected[kept] * 20_000 / expected.sum()).pvalue > 0.001


def test_given_lengths_are_kept_and_set_the_depths():
    law = fitted()
    counts = np.array(law["counts"], dtype=float)
    widths = np.diff(law["n_genes_edges"])
    for length in (3, 25, MAX_GENES):
        n_genes, library_sizes = draw_sizes(law, uniform_rows(20_000), n_genes=np.full(20_000, length))
        assert (n_genes == length).all()
        length_bin = np.searchsorted(law["n_genes_edges"], length, side="right") - 1
        smoothed = (counts + widths / widths.sum())[:, length_bin]  # Bayes, classes being equally likely
        classes = np.searchsorted(law["library_size_edges"], library_sizes, side="right") - 1
        observed = np.bincount(np.clip(classes, 0, 3), minlength=4)
        is_common = smoothed / smoothed.sum() * 20_000 >= 5
        expected = smoothed[is_common] / smoothed[is_common].sum() * observed[is_common].sum()
        assert stats.chisquare(observed[is_common], expected).pvalue > 0.001
        assert observed[~is_common].sum() < 20
    both = draw_sizes(law, uniform_rows(2), n_genes=np.array([3, 4]), library_sizes=np.array([90.0, 95.0]))
    assert [part.tolist() for part in both] == [[3, 4], [90.0, 95.0]]
    alone = fit_size_law(np.array([3, 4]), None, max_genes=8, target_sum=1e4)
    n_genes, library_sizes = draw_sizes(alone, uniform_rows(2), n_genes=np.array([5, 6]))
    assert (n_genes.tolist(), library_sizes) == ([5, 6], None)


def test_a_cell_has_no_more_genes_than_molecules():
    rng = np.random.default_rng(0)
    library_sizes = np.round(rng.uniform(5, 60, 500))
    n_genes = np.minimum(rng.integers(1, 31, 500), library_sizes).astype(int)
    law = fit_size_law(n_genes, library_sizes, max_genes=30, target_sum=1e4, n_depth_classes=3)
    lengths, depths = draw_sizes(law, uniform_rows(20_000))
    assert (lengths <= depths).all()
    lengths, depths = draw_sizes(law, uniform_rows(20_000), library_sizes=np.full(20_000, 6.0))
    assert lengths.max() == 6
    lengths, depths = draw_sizes(law, uniform_rows(20_000), n_genes=np.full(20_000, 30))
    assert (lengths == 30).all()
    assert (depths >= 30).all()


def test_equal_uniforms_equal_sizes_and_the_ends_are_reached():
    law = fitted()
    uniforms = uniform_rows(50)
    together = draw_sizes(law, uniforms)
    alone = [draw_sizes(law, uniforms[row : row + 1]) for row in range(50)]
    np.testing.assert_array_equal(together[0], np.concatenate([part[0] for part in alone]))
    np.testing.assert_array_equal(together[1], np.concatenate([part[1] for part in alone]))
    ends = np.array([[0.0] * 3, [1.0 - 2.0**-53] * 3])
    n_genes, library_sizes = draw_sizes(law, ends)
    assert n_genes.tolist() == [1, MAX_GENES]
    np.testing.assert_allclose(library_sizes, np.array(law["library_size_edges"])[[0, -1]])


@pytest.mark.parametrize("with_depth", [True, False])
def test_the_law_survives_json(with_depth):
    n_genes, library_sizes = training_cells(200)
    law = fit_size_law(n_genes, library_sizes if with_depth else None, max_genes=MAX_GENES, target_sum=1e4)
    again = json.loads(json.dumps(law))
    assert again == law
    for first, second in zip(
        draw_sizes(law, uniform_rows(99)), draw_sizes(again, uniform_rows(99)), strict=True
    ):
        assert np.array_equal(first, second) or first is second is None
    nats = length_log_prob(again, n_genes, library_sizes)
    np.testing.assert_array_equal(nats, length_log_prob(law, n_genes, library_sizes))


def test_cells_of_one_size_make_a_law():
    law = fit_size_law(np.full(5, 3), np.full(5, 700.0), max_genes=3, target_sum=1e4)
    n_genes, library_sizes = draw_sizes(law, uniform_rows(200))
    assert (library_sizes == 700.0).all()
    probabilities = np.exp(length_log_prob(law, np.array([1, 2, 3]), np.full(3, 700.0)))
    np.testing.assert_allclose(probabilities, [1 / 18, 1 / 18, 16 / 18])
    assert stats.chisquare(np.bincount(n_genes)[1:], 200 * probabilities).pvalue > 0.001


@pytest.mark.parametrize(
    ("lengths", "found"), [([], "no cell"), ([0, 3], "0 to 3"), ([2, 41], "2 to 41"), ([-1], "-1 to -1")]
)
def test_impossible_lengths_are_refused(lengths, found):
    with pytest.raises(ValueError, match=rf"cells of 1 to max_genes=40 genes, got {found}\."):
        fit_size_law(np.array(lengths), None, max_genes=40, target_sum=1e4)
