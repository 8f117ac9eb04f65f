"""Perturbation baselines: by hand, against scikit-learn's ridge, and what they may not see.

Needs no data. Run: pytest tests/test_perturbation_baselines.py
"""

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge

from modeling_scdiva.metrics.perturbation import perturbation_discrimination
from modeling_scdiva.metrics.perturbation_baselines import (
    additive,
    control_matched_mean,
    gene_factors,
    linear_model,
    matching_mean,
    nearest_perturbations,
    no_change,
    perturbed_mean,
    random_forest,
    split_half_deltas,
)


@pytest.fixture
def deltas():
    return np.random.default_rng(0).normal(size=(12, 40))


def test_simple_baselines_by_hand():
    training = np.array([[1.0, 0.0], [3.0, 2.0]])
    np.testing.assert_array_equal(no_change(2, 3), np.zeros((2, 3)))
    np.testing.assert_array_equal(perturbed_mean(training, 2), [[2.0, 1.0], [2.0, 1.0]])
    singles = {"A": training[0], "B": training[1]}
    found = additive(singles, [("A", "B"), ("A", "C"), ("C",)], fallback=np.array([9.0, 9.0]))
    np.testing.assert_array_equal(found, [[4.0, 2.0], [10.0, 9.0], [9.0, 9.0]])
    found = matching_mean(singles, [("A", "B"), ("A", "C"), ("C",)], fallback=np.array([9.0, 9.0]))
    np.testing.assert_array_equal(found, [[2.0, 1.0], [5.0, 4.5], [9.0, 9.0]])


def test_control_matched_mean_follows_the_groups():
    groups = {"x": np.array([1.0, 0.0]), "y": np.array([0.0, 1.0])}
    found = control_matched_mean(groups, [{"x": 0.75, "y": 0.25}, {"x": 0.5, "new": 0.5}, {"new": 1.0}])
    np.testing.assert_allclose(found, [[0.75, 0.25], [1.0, 0.0], [0.5, 0.5]])
    with pytest.raises(ValueError, match="at least one group"):
        control_matched_mean({}, [{}])


def test_gene_factors_are_principal_components(deltas):
    found = gene_factors(deltas, n_factors=4)
    expected = PCA(4).fit_transform(deltas.T)
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-8)
    assert gene_factors(deltas[:3]).shape == (40, 2)
    assert gene_factors(deltas[:1]).shape == (40, 1)


def test_linear_model_is_two_ridge_regressions(deltas):
    rng = np.random.default_rng(1)
    genes, factors, new = rng.normal(size=(40, 5)), rng.normal(size=(12, 3)), rng.normal(size=(4, 3))
    found = linear_model(deltas, factors, test_factors=new, gene_side=genes, ridge=0.1)
    centred = (deltas - deltas.mean(axis=0)).T  # (G, P)
    inner = Ridge(alpha=0.1, fit_intercept=False).fit(genes, centred).coef_.T  # (L, P)
    weights = Ridge(alpha=0.1, fit_intercept=False).fit(factors, inner.T).coef_  # (L, K)
    expected = deltas.mean(axis=0) + (genes @ weights @ new.T).T
    np.testing.assert_allclose(found, expected, atol=1e-8)


def test_linear_model_recovers_a_bilinear_truth():
    rng = np.random.default_rng(2)
    genes, factors, new = rng.normal(size=(50, 3)), rng.normal(size=(30, 3)), rng.normal(size=(5, 3))
    factors -= factors.mean(axis=0)
    weights, shift = rng.normal(size=(3, 3)), rng.normal(size=50)
    truth = shift + new @ weights.T @ genes.T
    found = linear_model(
        shift + factors @ weights.T @ genes.T, factors, test_factors=new, gene_side=genes, ridge=1e-8
    )
    np.testing.assert_allclose(found, truth, atol=1e-5)


def test_perturbation_without_factors_gets_the_mean(deltas):
    rng = np.random.default_rng(1)
    genes, factors, new = rng.normal(size=(40, 5)), rng.normal(size=(12, 3)), rng.normal(size=(2, 3))
    new[1] = np.nan
    factors[0] = np.nan
    found = linear_model(deltas, factors, test_factors=new, gene_side=genes)
    np.testing.assert_allclose(found[1], deltas.mean(axis=0))
    assert np.abs(found[0] - deltas.mean(axis=0)).max() > 0.01
    nothing = linear_model(deltas, np.full((12, 3), np.nan), test_factors=new, gene_side=genes)
    np.testing.assert_allclose(nothing, np.tile(deltas.mean(axis=0), (2, 1)))


def test_nearest_perturbations_by_hand(deltas):
    rng = np.random.default_rng(3)
    factors, new = rng.normal(size=(12, 3)), rng.normal(size=(4, 3))
    factors[2], new[3] = np.nan, np.nan
    found = nearest_perturbations(deltas, factors, test_factors=new)
    for row in range(3):
        order = np.argsort(np.nan_to_num(((factors - new[row]) ** 2).sum(axis=1), nan=np.inf))
        np.testing.assert_allclose(found[row], deltas[order[:5]].mean(axis=0))
    np.testing.assert_allclose(found[3], deltas.mean(axis=0))
    few = nearest_perturbations(deltas[:2], factors[:2], test_factors=new)
    np.testing.assert_allclose(few, np.tile(deltas[:2].mean(axis=0), (4, 1)))
    nothing = nearest_perturbations(deltas, np.full((12, 3), np.nan), test_factors=new)
    np.testing.assert_allclose(nothing, np.tile(deltas.mean(axis=0), (4, 1)))


def test_random_forest_learns_from_factors():
    rng = np.random.default_rng(4)
    factors = rng.choice([-1.0, 1.0], size=(60, 2))
    changes = np.stack([factors[:, 0], 2 * factors[:, 1], factors.prod(axis=1)], axis=1)
    new = np.array([[1.0, 1.0], [-1.0, 1.0], [np.nan, 1.0]])
    found = random_forest(changes, factors, test_factors=new)
    np.testing.assert_allclose(found[:2], [[1, 2, 1], [-1, 2, -1]], atol=0.05)
    np.testing.assert_allclose(found[2], changes.mean(axis=0))
    one_gene = random_forest(changes[:, :1], factors, test_factors=new)
    assert one_gene.shape == (3, 1)
    np.testing.assert_array_equal(found, random_forest(changes, factors, test_factors=new))


def test_split_halves_are_disjoint():
    perturbed = [np.arange(10.0)[:, None], 2.0 ** np.arange(7)[:, None]]
    first, second = split_half_deltas(perturbed, np.zeros((6, 1)), rng=np.random.default_rng(0))
    np.testing.assert_allclose(5 * first[0] + 5 * second[0], 45.0)  # each cell in one half
    np.testing.assert_allclose(3 * first[1] + 4 * second[1], 127.0)
    again, _ = split_half_deltas(perturbed, np.zeros((6, 1)), rng=np.random.default_rng(0))
    np.testing.assert_array_equal(first, again)
    # All perturbations of a half are compared with the same controls.
    same = [np.ones((4, 1)), np.ones((8, 1))]
    first, second = split_half_deltas(same, np.arange(6.0)[:, None], rng=np.random.default_rng(1))
    assert first[0] == first[1] != second[1]
    assert first[0] + second[0] == pytest.approx(2 - 2 * 2.5)
    with pytest.raises(ValueError, match="two cells of each kind, got 1"):
        split_half_deltas([np.ones((1, 2))], np.zeros((6, 2)), rng=np.random.default_rng(1))


def test_no_effect_has_an_uninformative_ceiling():
    """Without any effect the two halves may not look alike, nor alike less than those of others."""
    rng = np.random.default_rng(0)
    scores = []
    for _ in range(40):
        perturbed = [rng.normal(size=(20, 30)) for _ in range(6)]
        halves = split_half_deltas(perturbed, rng.normal(size=(12, 30)), rng=rng)
        scores.append(perturbation_discrimination(*halves).mean())
    assert np.mean(scores) == pytest.approx(0.5, abs=3 * np.std(scores) / np.sqrt(40))


def test_refusals(deltas):
    with pytest.raises(ValueError, match=r"finite, \(perturbations, genes\) and not empty, got \(0, 4\)"):
        perturbed_mean(np.zeros((0, 4)), 2)
    with pytest.raises(ValueError, match=r"Factors \(P, K\) and \(Q, K\) are needed for 12"):
        linear_model(deltas, np.ones((3, 2)), test_factors=np.ones((1, 2)), gene_side=np.ones((40, 2)))
    with pytest.raises(ValueError, match="needs 40 rows and a positive ridge"):
        linear_model(deltas, np.ones((12, 2)), test_factors=np.ones((1, 2)), gene_side=np.ones((3, 2)))
