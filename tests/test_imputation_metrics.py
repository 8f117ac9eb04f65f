"""Imputation: corruptions, scores and baselines by hand and by second implementations.

Needs: both packages; no files, no GPU.
Run: python -m pytest tests/test_imputation_metrics.py
"""

import anndata
import numpy as np
import pytest
from scipy.sparse import csr_matrix

from modeling_scdiva.metrics.imputation import (
    checked_counts,
    detection_scores,
    draw_hidden_entries,
    hide_entries,
    over_imputation_rate,
    profile_correlations,
    shift_prevalence,
    thin_cells,
    value_scores,
)
from modeling_scdiva.metrics.imputation_baselines import (
    gene_mean,
    gene_mean_depth,
    given_silent,
    identity,
    knn_smoothing,
    log_expression,
)
from tokenization_scdiva import synthetic_cells
from tokenization_scdiva.collation import thin_counts

COUNTS = np.array([[4, 0, 6, 0], [0, 5, 5, 10]])


@pytest.fixture(scope="module")
def adata() -> anndata.AnnData:
    return synthetic_cells(n_cells=20, n_genes=120, seed=9)


# --- corruptions ---


def test_thinning_keeps_the_expected_share_and_depends_on_the_row_alone(adata):
    thin = thin_cells(adata.X, 0.25, seed=3)
    assert (thin.toarray() <= adata.X.toarray()).all()
    share, total = thin.sum() / adata.X.sum(), adata.X.sum()
    assert abs(share - 0.25) < 5 * np.sqrt(0.25 * 0.75 / total)
    np.testing.assert_array_equal(thin[:7].toarray(), thin_cells(adata.X[:7], 0.25, seed=3).toarray())
    assert (thin.toarray() != thin_cells(adata.X, 0.25, seed=4).toarray()).any()
    np.testing.assert_array_equal(thin_cells(COUNTS, 1.0).toarray(), COUNTS)
    # Second implementation: the collator's thinning, on the same stream.
    row = checked_counts(adata.X)[2].data.astype(np.int64)
    expected = thin_counts(row, 0.25, np.random.default_rng([3, 2]))
    np.testing.assert_array_equal(thin[2].data, expected[expected > 0])


def test_hidden_entries_are_balanced_nested_and_of_candidates():
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.5, size=(12, 60))
    is_candidate = np.arange(60) < 50
    few, many = (
        draw_hidden_entries(counts, share, seed=1, is_candidate=is_candidate) for share in (0.1, 0.5)
    )
    for entries in (few, many):
        np.testing.assert_array_equal(counts[entries.rows, entries.columns] > 0, entries.is_expressed)
        assert entries.is_expressed.mean() == 0.5
        assert is_candidate[entries.columns].all()
    assert set(zip(few.rows, few.columns, strict=True)) <= set(zip(many.rows, many.columns, strict=True))
    left = hide_entries(counts, many).toarray()
    assert (left[many.rows, many.columns] == 0).all()
    is_hidden = np.zeros(counts.shape, dtype=bool)
    is_hidden[many.rows, many.columns] = True
    np.testing.assert_array_equal(left[~is_hidden], counts[~is_hidden])
    n_expressed = (counts[:, :50] > 0).sum(axis=1)
    hidden = np.bincount(many.rows[many.is_expressed], minlength=12)
    np.testing.assert_array_equal(hidden, np.round(0.5 * n_expressed))


def test_a_cell_keeps_its_last_gene():
    entries = draw_hidden_entries(np.array([[1, 0, 0], [2, 3, 0]]), 0.9)
    assert entries.rows.tolist() == [1, 1]
    with pytest.raises(ValueError, match="No cell has two expressed genes"):
        draw_hidden_entries(np.array([[1, 0, 0]]), 0.9)


@pytest.mark.parametrize("bad", [np.array([[0.5, 1.0]]), np.array([[-1.0, 1.0]]), np.array([[np.nan, 1.0]])])
def test_what_is_no_count_is_refused(bad):
    for corrupt in (lambda: thin_cells(bad, 0.5), lambda: draw_hidden_entries(bad, 0.5)):
        with pytest.raises(ValueError, match="Raw counts are needed"):
            corrupt()


# --- scores ---


def test_value_scores_by_hand():
    scores = value_scores(np.array([[0.0, 2.0], [3.0, 5.0]]), np.array([[0.0, 1.0], [3.0, 7.0]]))
    assert scores["mae"] == 0.75
    assert scores["rmse"] == pytest.approx(np.sqrt(5 / 4))
    assert scores["spearman"] == 1.0
    constant = value_scores(np.arange(4.0), np.ones(4))
    assert constant["pearson"] == constant["spearman"] == 0.0


def test_profile_correlations_equal_numpy_and_means_know_no_genes():
    rng = np.random.default_rng(0)
    true, predicted = rng.normal(size=(2, 9, 7))
    found = profile_correlations(true, predicted)
    of_cells = [np.corrcoef(a, b)[0, 1] for a, b in zip(true, predicted, strict=True)]
    of_genes = [np.corrcoef(a, b)[0, 1] for a, b in zip(true.T, predicted.T, strict=True)]
    assert found["cell_pearson"] == pytest.approx(np.mean(of_cells))
    assert found["gene_pearson"] == pytest.approx(np.mean(of_genes))
    means = profile_correlations(true, np.tile(true.mean(axis=0), (9, 1)))
    assert means["gene_pearson"] == 0.0
    assert means["cell_pearson"] > 0.1
    true[:, 3] = 2.0  # a gene that does not vary is no part of the mean
    of_genes.pop(3)
    assert profile_correlations(true, predicted)["gene_pearson"] == pytest.approx(np.mean(of_genes))


def test_detection_scores_by_hand():
    scores = detection_scores(np.array([0.9, 0.6, 0.6, 0.1]), np.array([True, True, False, False]))
    assert scores["auroc"] == 0.875  # one tie among four pairs
    assert scores["brier_score"] == pytest.approx((0.01 + 0.16 + 0.36 + 0.01) / 4)
    # Bins of 1/15: 0.9 (off by .1), twice 0.6 (half are right, off by .1), 0.1 (off by .1).
    assert scores["calibration_error"] == pytest.approx(0.1)
    assert scores["expressed_share"] == 0.5


def test_shifted_probabilities_are_calibrated_where_entries_were_drawn():
    rng = np.random.default_rng(0)
    probability = rng.beta(0.4, 3.0, size=200_000)
    is_expressed = rng.random(len(probability)) < probability
    # All expressed entries and every tenth silent one: an odds ratio of ten.
    is_drawn = is_expressed | (rng.random(len(probability)) < 0.1)
    natural = detection_scores(probability[is_drawn], is_expressed[is_drawn])
    shifted = detection_scores(
        shift_prevalence(probability[is_drawn], np.full(is_drawn.sum(), 10.0)), is_expressed[is_drawn]
    )
    assert natural["calibration_error"] > 0.2
    assert shifted["calibration_error"] < 0.01
    np.testing.assert_array_equal(shift_prevalence(np.array([0.0, 1.0]), np.array([7.0, 0.3])), [0.0, 1.0])


def test_over_imputation_counts_whole_molecules():
    library_size = np.array([5_000.0, 5_000.0, 50_000.0])
    one = np.log1p(10_000 / 5_000)
    assert over_imputation_rate(np.array([0.49 * one, one, 0.0]), library_size) == pytest.approx(1 / 3)
    # The same value is ten times as many molecules in a cell ten times as deep.
    assert over_imputation_rate(np.log1p(np.full(3, 0.2)), library_size) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: thin_cells(COUNTS, 0.0), r"keep_fraction must lie in \(0, 1\], got 0.0"),
        (lambda: draw_hidden_entries(COUNTS, 1.0), r"fraction must lie in \(0, 1\), got 1.0"),
        (lambda: value_scores(np.zeros(2), np.zeros(3)), "As many predictions as true values"),
        (lambda: value_scores(np.zeros(2), np.array([0, np.nan])), "1 predictions and 0 true values are not"),
        (lambda: detection_scores(np.ones(3), np.ones(3)), "got 3 expressed of 3"),
        (lambda: over_imputation_rate(np.array([]), np.array([])), "no silent entry"),
        (lambda: knn_smoothing(COUNTS, training_counts=COUNTS, training_library_size=np.ones(2)), "too few"),
    ],
)
def test_impossible_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- baselines ---


def test_baselines_by_hand():
    sizes = np.array([10.0, 20.0])
    expected = np.log1p(1e4 * COUNTS / sizes[:, None])
    np.testing.assert_allclose(log_expression(csr_matrix(COUNTS), sizes), expected)
    observed = identity(COUNTS, sizes)
    np.testing.assert_allclose(observed.expected, expected)
    np.testing.assert_array_equal(observed.probability, COUNTS > 0)
    mean = gene_mean(COUNTS, sizes, 3)
    np.testing.assert_allclose(mean.expected, np.tile(expected.mean(axis=0), (3, 1)))
    np.testing.assert_allclose(mean.probability[0], [0.5, 0.5, 1.0, 0.5])
    depth = gene_mean_depth(COUNTS, sizes, np.array([30.0]))
    share = COUNTS.sum(axis=0) / 30
    np.testing.assert_allclose(depth.probability[0], 1 - np.exp(-30 * share))
    count_if_detected = 30 * share / (1 - np.exp(-30 * share))
    expected = (1 - np.exp(-30 * share)) * np.log1p(1e4 * count_if_detected / 30)
    np.testing.assert_allclose(depth.expected[0], expected)
    # Near the mean of log1p over Poisson counts, where log1p of the mean is not.
    counts = np.random.default_rng(0).poisson(30 * share, size=(100_000, 4))
    drawn = np.log1p(1e4 * counts / 30).mean(axis=0)
    np.testing.assert_allclose(depth.expected[0], drawn, rtol=0.03)
    none = gene_mean_depth(np.array([[1, 0]]), np.array([1.0]), np.array([0.0]))
    assert np.isfinite(none.expected).all()


def test_a_silent_gene_may_only_be_in_the_rest_of_the_molecules():
    rng, sizes = np.random.default_rng(1), np.array([30.0])
    depth = gene_mean_depth(COUNTS, np.array([10.0, 20.0]), sizes)
    full = rng.poisson(COUNTS.sum(axis=0), size=(400_000, 4))
    is_silent = rng.binomial(full, 0.25) == 0
    found = given_silent(depth, sizes, kept_fraction=0.25)
    for gene in range(4):
        left = full[is_silent[:, gene], gene]
        assert found.probability[0, gene] == pytest.approx((left > 0).mean(), abs=0.005)
        assert found.expected[0, gene] == pytest.approx(np.log1p(1e4 * left / 30).mean(), rel=0.04)
    np.testing.assert_allclose(given_silent(depth, sizes, kept_fraction=0.0).expected, depth.expected)


def test_neighbours_are_those_of_the_visible_genes(adata):
    counts, sizes = adata.X, np.asarray(adata.X.sum(axis=1)).ravel()
    is_visible = np.arange(adata.n_vars) < 60
    settings = {"training_counts": counts, "training_library_size": sizes, "is_visible": is_visible}
    found = knn_smoothing(counts, n_neighbors=1, n_components=10, **settings)
    # Scored cells that are training cells are their own nearest neighbour.
    np.testing.assert_allclose(found.expected, log_expression(counts, sizes))
    blind = counts.toarray()
    blind[:, 60:] = 0
    again = knn_smoothing(blind, n_neighbors=5, n_components=10, **settings)
    np.testing.assert_allclose(
        again.expected, knn_smoothing(counts, n_neighbors=5, n_components=10, **settings).expected
    )
    everyone = knn_smoothing(counts, n_neighbors=99, **settings)
    np.testing.assert_allclose(everyone.expected[0], log_expression(counts, sizes).mean(axis=0))
    assert everyone.probability.max() <= 1.0


def test_neighbours_of_a_type_beat_the_mean(adata):
    cells = synthetic_cells(n_cells=200, n_genes=120, seed=9)
    counts, sizes = cells.X, np.asarray(cells.X.sum(axis=1)).ravel()
    test, train = np.arange(50), np.arange(50, 200)
    thin = thin_cells(counts[test], 0.5)
    truth = log_expression(counts[test], sizes[test])
    training = {"training_counts": counts[train], "training_library_size": sizes[train]}
    smooth = profile_correlations(truth, knn_smoothing(thin, **training).expected)
    mean = profile_correlations(truth, gene_mean(counts[train], sizes[train], 50).expected)
    assert smooth["gene_pearson"] > mean["gene_pearson"] + 0.1
