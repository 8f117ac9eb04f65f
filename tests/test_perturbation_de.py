"""Significance of predicted responses: by hand, and equal to SciPy and cell-eval2.

Needs no data; cell-eval2 where installed. Run: pytest tests/test_perturbation_de.py
"""

import numpy as np
import pytest
from scipy import stats

from modeling_scdiva.metrics.perturbation import mean_scores
from modeling_scdiva.metrics.perturbation_de import (
    de_call_scores,
    dynamic_range,
    unbiased_squares,
    welch_test,
    welch_test_of_moments,
)


def test_welch_equals_scipy():
    rng = np.random.default_rng(1)
    perturbed, control = rng.normal(0.3, 1, (30, 8)), rng.normal(0, 2, (50, 8))
    perturbed[:, 3] = control[:, 3] = 1.0
    found = welch_test(perturbed, control)
    varied = [0, 1, 2, 4, 5, 6, 7]
    expected = stats.ttest_ind(perturbed[:, varied], control[:, varied], equal_var=False)
    np.testing.assert_allclose(found["t"][varied], expected.statistic)
    np.testing.assert_allclose(found["p_values"][varied], expected.pvalue)
    assert (found["t"][3], found["p_values"][3], found["fdr"][3]) == (0.0, 1.0, 1.0)
    np.testing.assert_allclose(found["fdr"], stats.false_discovery_control(found["p_values"]))
    np.testing.assert_allclose(
        found["t"][varied] * found["standard_errors"][varied],
        (perturbed.mean(axis=0) - control.mean(axis=0))[varied],
    )
    with pytest.raises(ValueError, match="two cells in each group, got 1 and 5"):
        welch_test(np.ones((1, 2)), np.ones((5, 2)))


def test_moments_give_the_test_of_the_cells():
    rng = np.random.default_rng(2)
    perturbed, control = rng.normal(0.3, 1, (30, 8)), rng.normal(0, 2, (50, 8))
    spreads = perturbed.std(axis=0, ddof=1), control.std(axis=0, ddof=1)
    change = perturbed.mean(axis=0) - control.mean(axis=0)
    found = welch_test_of_moments(change, spreads=spreads, n_cells=(30, 50))
    for name, values in welch_test(perturbed, control).items():
        np.testing.assert_allclose(found[name], values, err_msg=name)


def test_calls_by_hand():
    # Genes: right, wrong sign, missed, called in vain, quiet, the target itself.
    true = np.array([[2.0, -1.0, 1.0, 0.0, 0.1, -9.0]])
    predicted = np.array([[1.0, 1.0, 0.2, 3.0, 0.0, -9.0]])
    p_values = np.array([[1e-6, 1e-5, 0.9, 1e-4, 1.0, 1e-9]])
    is_de = np.array([[True, True, True, False, False, True]])
    own = np.array([[False] * 5 + [True]])
    found = de_call_scores(predicted, true, predicted_p=p_values, is_de=is_de, is_own_target=own)
    assert found["significance_jaccard"] == pytest.approx(2 / 4)
    # Called in vain has no measured direction: one of the two judged calls is right, three genes respond.
    assert found["direction_fidelity"] == pytest.approx(1 / 3)
    assert found["direction_reach"] == pytest.approx(1 / 3)  # the second in the order is wrong
    assert found["de_overlap"] == pytest.approx(2 / 3)
    assert np.isnan(found["lfc_nmae"])  # three genes are too few
    with_target = de_call_scores(predicted, true, predicted_p=p_values, is_de=is_de)
    assert with_target["significance_jaccard"] == pytest.approx(3 / 5)


def test_perfect_and_silent_predictions():
    rng = np.random.default_rng(3)
    true = rng.normal(size=(4, 50))
    is_de = np.abs(true) > 0.8
    p_values = np.where(is_de, 1e-9, 1.0)
    perfect = mean_scores(de_call_scores(true, true, predicted_p=p_values, is_de=is_de))
    assert perfect == {name: 0.0 if name == "lfc_nmae" else 1.0 for name in perfect}
    silent = de_call_scores(np.zeros_like(true), true, predicted_p=np.ones_like(true), is_de=is_de)
    assert mean_scores(silent) == {name: 1.0 if name == "lfc_nmae" else 0.0 for name in silent}
    nothing = np.zeros_like(is_de)
    quiet = de_call_scores(np.zeros_like(true), true, predicted_p=np.ones_like(true), is_de=nothing)
    assert (quiet["significance_jaccard"] == 1).all()
    assert all(np.isnan(quiet[name]).all() for name in quiet if name != "significance_jaccard")


def test_calls_equal_cell_eval2():
    pl = pytest.importorskip("polars")
    de = pytest.importorskip("cell_eval2.de")
    calls = pytest.importorskip("cell_eval2.metrics.de")
    direction = pytest.importorskip("cell_eval2.metrics.direction")
    rng = np.random.default_rng(4)
    n_perturbations, n_genes = 12, 80
    true = rng.normal(size=(n_perturbations, n_genes))
    true[:, 70:] = 0.0  # without direction
    predicted = 0.6 * true + rng.normal(size=true.shape)
    predicted[rng.random(true.shape) < 0.1] = 0.0
    real_p, predicted_p = (np.clip(rng.random(true.shape) ** 5, 0, 1) for _ in range(2))
    real_p, predicted_p[1] = np.where(np.abs(true) > 1, real_p * 1e-3, 1.0), 1.0
    real_p[2] = 1.0

    def table(changes, p_values):
        return pl.DataFrame(
            {
                "target": np.repeat([f"gene_{row}" for row in range(n_perturbations)], n_genes),
                "feature": np.tile([f"gene_{gene}" for gene in range(n_genes)], n_perturbations),
                "log2_fold_change": changes.ravel(),
                "p_value": p_values.ravel(),
                "p_adj": stats.false_discovery_control(p_values, axis=1).ravel(),
            }
        )

    prepared = de.prepare_de(table(predicted, predicted_p), table(true, real_p), control="non-targeting")
    found = de_call_scores(
        predicted,
        true,
        predicted_p=predicted_p,
        is_de=stats.false_discovery_control(real_p, axis=1) < 0.05,
        is_own_target=np.eye(n_perturbations, n_genes, dtype=bool),
    )
    theirs = {
        "significance_jaccard": calls.de_sig_jaccard(prepared),
        "direction_fidelity": direction.de_direction_fidelity_yield_raw(prepared),
        "direction_reach": direction.de_direction_reach(prepared, corrected=False),
        "lfc_nmae": calls.de_lfc_nmae(prepared),
    }
    for name, of_targets in theirs.items():
        expected = [of_targets.get(f"gene_{row}", np.nan) for row in range(n_perturbations)]
        np.testing.assert_allclose(found[name], expected, atol=1e-12, err_msg=name)
        assert np.isfinite(found[name]).sum() > n_perturbations / 2, name


def test_noise_of_the_truth_is_taken_away():
    rng = np.random.default_rng(5)
    effect, error = rng.normal(0, 0.5, (40, 500)), 0.5
    true = effect + rng.normal(0, error, effect.shape)

    def normalised(predicted):
        squares = unbiased_squares(predicted, true, standard_errors=np.full(effect.shape, error))
        return mean_scores(squares)["normalised_squared_error"]

    assert normalised(effect) == pytest.approx(0.0, abs=0.1)
    assert normalised(np.zeros_like(effect)) == 1.0
    assert normalised(-effect) == pytest.approx(4.0, rel=0.1)
    silent = unbiased_squares(effect, 0 * true, standard_errors=np.full(effect.shape, error))
    assert np.isnan(mean_scores(silent)["normalised_squared_error"])


def test_dynamic_range():
    assert dynamic_range(0.75, 0.5, perfect=1.0) == 0.5
    assert dynamic_range(0.02, 0.1, perfect=0.0) == pytest.approx(0.8)
    assert dynamic_range(-3.0, 0.5, perfect=1.0) == -1.0
    assert np.isnan(dynamic_range(0.5, 1.0, perfect=1.0))


def test_bad_input_is_refused():
    true = np.ones((2, 5))
    is_de = true > 0
    with pytest.raises(ValueError, match=r"predicted_p must have the shape \(2, 5\) of true, got \(5,\)"):
        de_call_scores(true, true, predicted_p=np.ones(5), is_de=is_de)
    with pytest.raises(ValueError, match="give a gene that cannot be tested the p-value 1"):
        de_call_scores(true, true, predicted_p=np.full((2, 5), np.nan), is_de=is_de)
