"""Perturbation metrics: SciPy, scikit-learn, cell-eval2 and POT agree; degenerate predictions get the worst.

Needs no data; cell-eval2 and POT where installed. Run: pytest tests/test_perturbation_metrics.py
"""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score
from sklearn.metrics.pairwise import rbf_kernel

from modeling_scdiva.metrics.perturbation import (
    de_auprc,
    energy_distance,
    expression_scores,
    hit_rates,
    lfc_spearman,
    maximum_mean_discrepancy,
    mean_scores,
    pearson_delta,
    perturbation_discrimination,
    perturbation_scores,
    score_perturbations,
    top_genes,
    wasserstein_distance,
)

P, G = 7, 60


@pytest.fixture
def changes():
    rng = np.random.default_rng(0)
    true = rng.normal(size=(P, G))
    predicted = 0.5 * true + rng.normal(size=(P, G))
    de_scores = np.abs(true) + rng.random((P, G))
    return predicted, true, de_scores, np.abs(true) > 1.2


def test_pearson_equals_scipy(changes):
    predicted, true, _, _ = changes
    reference = np.random.default_rng(1).normal(size=G)
    found, centred = pearson_delta(predicted, true), pearson_delta(predicted, true, reference=reference)
    for row in range(P):
        assert found[row] == pytest.approx(stats.pearsonr(predicted[row], true[row])[0], abs=1e-12)
        expected = stats.pearsonr(predicted[row] - reference, true[row] - reference)[0]
        assert centred[row] == pytest.approx(expected, abs=1e-12)


def test_pearson_and_discrimination_equal_cell_eval2(changes):
    delta = pytest.importorskip("cell_eval2.metrics.delta")
    discrimination = pytest.importorskip("cell_eval2.metrics.discrimination")
    predicted, true, _, _ = changes
    names = np.array([f"gene_{i}" for i in range(P)] + ["non-targeting"])
    genes = np.array([f"gene_{i}" for i in range(G)])  # the first P genes are targets
    control = np.random.default_rng(2).random((1, G))
    bulks = [(names, np.concatenate([part + control, control])) for part in (predicted, true)]
    found = delta.pearson_delta(pred_bulk=bulks[0], real_bulk=bulks[1], control_source="real")
    np.testing.assert_allclose(
        pearson_delta(predicted, true), [found[name] for name in names[:P]], atol=1e-10
    )
    predicted[2] = 0.0  # pasted controls
    bulks[0] = (names, np.concatenate([predicted + control, control]))
    found = discrimination.discrimination_score(
        pred_bulk=bulks[0],
        real_bulk=bulks[1],
        distance="cosine",
        rank_denominator="n-1",
        control_source="real",
        genes=genes,
    )
    own = perturbation_discrimination(predicted, true, is_target=np.arange(G) < P)
    np.testing.assert_allclose(own, [found[name] for name in names[:P]], atol=1e-10)
    assert own[2] == 0.5


def test_no_information_is_exactly_one_half(changes):
    _, true, _, _ = changes
    same = np.tile(np.random.default_rng(3).normal(size=G), (P, 1))
    assert perturbation_discrimination(same, true).mean() == pytest.approx(0.5, abs=1e-12)
    np.testing.assert_array_equal(perturbation_discrimination(np.zeros_like(true), true), 0.5)
    np.testing.assert_array_equal(perturbation_discrimination(true, true), 1.0)
    # Knowing nothing but the targets: spikes at their own genes earn nothing.
    spikes = np.eye(P, G) * -5.0
    targeted = perturbation_discrimination(spikes, true + spikes, is_target=np.arange(G) < P)
    np.testing.assert_array_equal(targeted, 0.5)


def test_discrimination_by_hand():
    true = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    predicted = np.array([[1.0, 0.1], [1.0, 0.2], [1.0, 1.0]])
    np.testing.assert_allclose(perturbation_discrimination(predicted, true), [1.0, 0.0, 1.0])


def test_whole_profiles_by_hand():
    control = np.arange(1200.0)[::-1] / 100  # the last 200 genes are lowest
    true = np.zeros((2, 1200))
    predicted = np.stack([np.r_[np.full(1000, 0.1), np.full(200, 9.0)], np.zeros(1200)])
    found = expression_scores(predicted, true, control_expression=control)
    np.testing.assert_allclose(found["l2_distance_top1000"], [0.1 * 1000**0.5, 0.0])
    expected = stats.pearsonr(control + predicted[0], control)[0]
    np.testing.assert_allclose(found["pearson_expression"], [expected, 1.0])  # no change is "perfect"
    with pytest.raises(ValueError, match="control_expression must have the shape"):
        expression_scores(predicted, true, control_expression=control[:5])


@pytest.mark.parametrize("constant", [0.0, 0.3])
def test_constant_prediction_is_worst_and_counted(changes, constant):
    _, true, de_scores, is_de = changes
    flat = np.full_like(true, constant)
    found = score_perturbations(flat, true, de_scores=de_scores, is_de=is_de)
    for name in ("pearson_delta", "pearson_delta_centroid", "pearson_delta_top20", "lfc_spearman"):
        assert found[name] == -1.0, name
    assert found["n_degenerate"] == P
    assert found["de_auprc"] == pytest.approx(is_de.mean(axis=1).mean())
    assert found["hit_rate_20"] == pytest.approx(20 / G)
    assert found["de_precision_20"] == pytest.approx(is_de.mean(axis=1).mean())
    assert found["discrimination"] == pytest.approx(0.5)


def test_the_training_mean_has_no_centroid_correlation(changes):
    _, true, de_scores, is_de = changes
    mean = true[:3].mean(axis=0)
    predicted = np.tile(mean.astype(np.float32), (P, 1))  # rounding is no information
    found = perturbation_scores(predicted, true, de_scores=de_scores, is_de=is_de, training_mean=mean)
    np.testing.assert_array_equal(found["pearson_delta_centroid"], -1.0)
    np.testing.assert_array_equal(found["pearson_delta_centroid_top20"], -1.0)
    assert (found["pearson_delta"] > -1.0).all()


def test_the_truth_gets_the_best_values(changes):
    _, true, de_scores, is_de = changes
    found = score_perturbations(true, true, de_scores=de_scores, is_de=is_de, training_mean=true.mean(axis=0))
    for name, value in found.items():
        if name.startswith("n_") or name == "de_precision_20":
            continue
        assert value == pytest.approx(0.0 if name.endswith("_error") else 1.0, abs=1e-12), name


def test_auprc_and_spearman_equal_their_libraries(changes):
    predicted, true, _, is_de = changes
    is_de[4] = False
    auprc, spearman = de_auprc(predicted, is_de), lfc_spearman(predicted, true, is_de)
    for row in set(range(P)) - {4}:
        assert auprc[row] == pytest.approx(average_precision_score(is_de[row], np.abs(predicted[row])))
        expected = stats.spearmanr(predicted[row, is_de[row]], true[row, is_de[row]])[0]
        assert spearman[row] == pytest.approx(expected)
    assert np.isnan(auprc[4])
    assert np.isnan(spearman[4])
    found = score_perturbations(predicted, true, de_scores=np.abs(true), is_de=is_de)
    assert found["n_without_de"] == 1
    assert found["de_auprc"] == pytest.approx(np.nanmean(auprc))


def test_hit_rate_by_hand_and_by_shuffling():
    is_wanted = np.array([[True, True, False, False, False]])
    assert hit_rates(np.array([[3.0, -2.0, 1.0, 0.0, 0.0]]), is_wanted, n_genes=2) == 1.0
    assert hit_rates(np.array([[1.0, 0.0, -3.0, 0.0, 0.0]]), is_wanted, n_genes=2) == 0.5
    # One sure miss, then one of four tied genes, of which two are wanted: (0 + 1/4 * 2) / 2.
    tied = np.array([[1.0, 1.0, 3.0, 1.0, 1.0]])
    assert hit_rates(tied, is_wanted, n_genes=2) == pytest.approx(0.25)
    rng = np.random.default_rng(0)
    draws = [hit_rates(tied + 1e-6 * rng.random((1, 5)), is_wanted, n_genes=2)[0] for _ in range(2000)]
    assert np.mean(draws) == pytest.approx(0.25, abs=0.03)


def test_top_genes_ties_go_to_the_earlier():
    np.testing.assert_array_equal(
        top_genes(np.array([[1.0, 2.0, 2.0, 2.0]]), n_genes=2), [[False, True, True, False]]
    )


def test_errors_by_hand():
    true, predicted = np.array([[0.0, 2.0, 0.0]]), np.array([[1.0, 2.0, 2.0]])
    found = perturbation_scores(
        predicted,
        true,
        de_scores=np.array([[0.0, 9.0, 0.0]]),
        is_de=np.array([[False, True, True]]),
        gene_weights=np.array([2.0, 1.0, 1.0]),
    )
    assert found["mean_squared_error"][0] == pytest.approx(5 / 3)
    assert found["weighted_squared_error"][0] == pytest.approx((2 * 1 + 4) / 4)
    assert "discrimination" not in found  # nothing to tell one perturbation from


def test_order_of_genes_and_perturbations_changes_nothing(changes):
    predicted, true, de_scores, is_de = changes
    rng = np.random.default_rng(5)
    rows, columns = rng.permutation(P), rng.permutation(G)
    arrays = [part[rows][:, columns] for part in (predicted, true, de_scores, is_de)]
    first = score_perturbations(predicted, true, de_scores=de_scores, is_de=is_de)
    second = score_perturbations(arrays[0], arrays[1], de_scores=arrays[2], is_de=arrays[3])
    assert first == pytest.approx(second)


def test_weighted_r2_by_hand(changes):
    predicted, true, de_scores, is_de = changes
    weights = np.random.default_rng(6).random(G)
    found = perturbation_scores(predicted, true, de_scores=de_scores, is_de=is_de, gene_weights=weights)[
        "weighted_r2"
    ]
    means = np.average(true, axis=1, weights=weights)[:, None]
    expected = 1 - ((predicted - true) ** 2 @ weights) / ((true - means) ** 2 @ weights)
    np.testing.assert_allclose(found, expected)


def test_maximum_mean_discrepancy_equals_scikit_learns_kernels_and_is_unbiased():
    rng = np.random.default_rng(5)
    first, second = rng.normal(size=(9, 4)), rng.normal(1.0, size=(12, 4))
    width = np.median([np.linalg.norm(a - b) for i, a in enumerate(second) for b in second[:i]])
    expected = 0.0
    for scale in (0.25, 0.5, 1, 2, 4):
        gamma = 0.5 / (scale * width) ** 2
        own = [rbf_kernel(cells, gamma=gamma) for cells in (first, second)]
        within = sum((kernel.sum() - len(kernel)) / (len(kernel) * (len(kernel) - 1)) for kernel in own)
        expected += (within - 2 * rbf_kernel(first, second, gamma=gamma).mean()) / 5
    assert maximum_mean_discrepancy(first, second) == pytest.approx(expected, abs=1e-12)
    same = [maximum_mean_discrepancy(rng.normal(size=(15, 3)), rng.normal(size=(25, 3))) for _ in range(200)]
    assert np.mean(same) == pytest.approx(0.0, abs=3 * np.std(same) / np.sqrt(200))
    assert maximum_mean_discrepancy(first, second) > maximum_mean_discrepancy(first + 1.0, second)
    with pytest.raises(ValueError, match="second cloud are the same point"):
        maximum_mean_discrepancy(first, np.ones((5, 4)))


def test_energy_distance_by_hand_and_unbiased():
    assert energy_distance([[0.0], [2.0]], [[1.0], [3.0]]) == pytest.approx(2 * 1.5 - 2 - 2)
    rng = np.random.default_rng(0)
    same = [energy_distance(rng.normal(size=(15, 3)), rng.normal(size=(25, 3))) for _ in range(200)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(200)
    # The biased form of SciPy, in one dimension, differs by the zero diagonal alone.
    x, y = rng.normal(size=12), rng.normal(1.0, size=9)
    within = [np.abs(part[:, None] - part).sum() for part in (x, y)]
    biased = stats.energy_distance(x, y) ** 2
    correction = sum(
        total / (n * n) - total / (n * (n - 1)) for total, n in zip(within, (12, 9), strict=True)
    )
    assert energy_distance(x[:, None], y[:, None]) == pytest.approx(biased + correction)


def test_wasserstein_equals_scipy():
    pytest.importorskip("ot")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=12), rng.normal(1.0, size=9)
    found = wasserstein_distance(x[:, None], y[:, None])
    assert found == pytest.approx(stats.wasserstein_distance(x, y))


def test_mean_scores_leaves_out_what_is_undefined():
    found = mean_scores({"a": np.array([1.0, np.nan, 3.0]), "b": np.array([np.nan])})
    assert found["a"] == 2.0
    assert np.isnan(found["b"])


def test_refusals(changes):
    predicted, true, de_scores, is_de = changes
    with pytest.raises(
        ValueError, match=r"must be \(perturbations, genes\) alike, got \(7, 59\) and \(7, 60\)"
    ):
        pearson_delta(predicted[:, 1:], true)
    broken = predicted.copy()
    broken[0, 0] = np.nan
    with pytest.raises(ValueError, match="1 of 420 predicted changes are not finite"):
        score_perturbations(broken, true, de_scores=de_scores, is_de=is_de)
    with pytest.raises(ValueError, match=r"gene_weights must have the shape \(60,\), got \(3,\)"):
        perturbation_scores(predicted, true, de_scores=de_scores, is_de=is_de, gene_weights=np.ones(3))
    with pytest.raises(ValueError, match="at least two perturbations to tell apart, got 1"):
        perturbation_discrimination(predicted[:1], true[:1])
    with pytest.raises(ValueError, match="All 60 genes are targets"):
        perturbation_discrimination(predicted, true, is_target=np.ones(G, dtype=bool))
    with pytest.raises(ValueError, match=r"of two cells or more are needed, got \(1, 2\)"):
        energy_distance(np.ones((1, 2)), np.ones((5, 2)))
