"""Calibration: errors by hand and against torchmetrics, risk by hand, temperature and threshold recovered.

Needs no data. Run: pytest tests/test_calibration.py
"""

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import brier_score_loss, log_loss

from modeling_scdiva.metrics.calibration import (
    calibration_error,
    calibration_scores,
    choose_threshold,
    fit_temperature,
    reliability_curve,
    risk_coverage,
)


def random_logits(n_cells=400, n_classes=4, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_classes, n_cells)
    logits = rng.normal(size=(n_cells, n_classes)) * 1.5
    logits[np.arange(n_cells), labels] += 1.0
    return logits, labels


def test_errors_by_hand():
    confidence = np.array([0.9, 0.8, 0.6, 0.6])
    is_correct = np.array([True, False, True, False])
    # Two bins of equal width: all four are above 0.5: mean confidence 0.725, accuracy 0.5.
    assert calibration_error(confidence, is_correct, n_bins=2) == pytest.approx(0.225)
    # Ten bins, open below: 0.9 | 0.8 | 0.6 0.6 with accuracies 1, 0, 0.5.
    assert calibration_error(confidence, is_correct, n_bins=10) == pytest.approx((0.1 + 0.8 + 0.2) / 4)
    # Two groups of two cells: (0.6, 0.6) with 0.5 right, (0.8, 0.9) with 0.5 right.
    found = calibration_error(confidence, is_correct, n_bins=2, binning="mass")
    assert found == pytest.approx((0.1 + 0.35) / 2)
    curve = reliability_curve(confidence, is_correct, n_bins=10)
    assert curve["n_cells"].tolist() == [2, 1, 1]
    assert curve["accuracy"].tolist() == [0.5, 0.0, 1.0]


def test_equal_to_torchmetrics():
    classification = pytest.importorskip("torchmetrics.functional.classification")
    import torch

    logits, labels = random_logits()
    probabilities = softmax(logits, axis=1)
    expected = classification.multiclass_calibration_error(
        torch.tensor(probabilities), torch.tensor(labels), num_classes=4, n_bins=15, norm="l1"
    )
    assert calibration_scores(probabilities, labels)["ece"] == pytest.approx(float(expected), abs=1e-6)


def test_brier_and_log_loss_are_scikit_learns():
    logits, labels = random_logits()
    probabilities = softmax(logits, axis=1)
    scores = calibration_scores(probabilities, labels)
    assert scores["log_loss"] == pytest.approx(log_loss(labels, probabilities))
    one_by_one = [brier_score_loss(labels == c, probabilities[:, c]) for c in range(4)]
    assert scores["brier"] == pytest.approx(sum(one_by_one))
    assert scores["n_without_class"] == 0


def test_cells_without_a_class_are_always_wrong():
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1]])
    scores = calibration_scores(probabilities, np.array([0, -1]))
    assert scores["ece"] == pytest.approx(0.4)
    assert scores["brier"] == pytest.approx(0.02)
    assert scores["n_without_class"] == 1
    assert calibration_scores(probabilities, np.array([-1, -1]))["brier"] is None


def test_certain_and_right_is_best():
    scores = calibration_scores(np.eye(3), np.arange(3))
    assert [scores[name] for name in ("ece", "ece_equal_mass", "brier", "aurc")] == [0, 0, 0, 0]


def test_risk_by_hand():
    coverage, risk = risk_coverage(np.array([0.5, 0.9, 0.7]), np.array([False, True, False]))
    assert coverage.tolist() == pytest.approx([1 / 3, 2 / 3, 1])
    assert risk.tolist() == pytest.approx([0, 1 / 2, 2 / 3])


def test_ties_have_no_order():
    confidence, is_correct = np.full(4, 0.5), np.array([True, False, False, True])
    for order in ([0, 1, 2, 3], [1, 2, 0, 3]):
        assert risk_coverage(confidence, is_correct[order])[1].tolist() == [0.5] * 4


def test_scores_ignore_the_order_of_cells():
    logits, labels = random_logits()
    probabilities = softmax(logits, axis=1)
    order = np.random.default_rng(1).permutation(len(labels))
    found = calibration_scores(probabilities[order], labels[order])
    assert found == pytest.approx(calibration_scores(probabilities, labels))


def test_temperature_is_recovered():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6000, 3)) * 2
    labels = np.array([rng.choice(3, p=row) for row in softmax(logits, axis=1)])
    assert fit_temperature(3.0 * logits, labels) == pytest.approx(3.0, rel=0.05)
    probabilities = softmax(3.0 * logits / fit_temperature(3.0 * logits, labels), axis=1)
    before = calibration_scores(softmax(3.0 * logits, axis=1), labels)["ece"]
    assert calibration_scores(probabilities, labels)["ece"] < 0.3 * before
    unknown = np.concatenate([labels, [-1]])
    same = fit_temperature(np.concatenate([3.0 * logits, np.ones((1, 3))]), unknown)
    assert same == pytest.approx(fit_temperature(3.0 * logits, labels))


def test_threshold_by_hand():
    confidence = np.array([0.95, 0.9, 0.8, 0.7, 0.6])
    is_correct = np.array([True, True, True, False, True])
    chosen = choose_threshold(confidence, is_correct, wanted_accuracy=0.9, min_cells=1)
    assert chosen == {"threshold": 0.8, "accuracy": 1.0, "coverage": 0.6, "is_reached": True, "n_cells": 5}
    # All five: 4 of 5 right, so every cell is accepted, also less confident ones to come.
    chosen = choose_threshold(confidence, is_correct, wanted_accuracy=0.8, min_cells=1)
    assert (chosen["threshold"], chosen["coverage"]) == (0.0, 1.0)


def test_threshold_out_of_reach():
    confidence = np.array([0.9, 0.9, 0.6])
    is_correct = np.array([True, False, False])
    chosen = choose_threshold(confidence, is_correct, wanted_accuracy=0.99, min_cells=1)
    assert not chosen["is_reached"]
    assert chosen["threshold"] == 0.9
    assert chosen["accuracy"] == 0.5
    # One lucky cell is no evidence.
    chosen = choose_threshold(np.array([0.9, 0.8, 0.7]), is_correct, wanted_accuracy=0.99, min_cells=2)
    assert not chosen["is_reached"]


def test_threshold_keeps_its_promise():
    logits, labels = random_logits(2000)
    probabilities = softmax(logits, axis=1)
    confidence, is_correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    for wanted in (0.5, 0.7, 0.8):
        chosen = choose_threshold(confidence, is_correct, wanted_accuracy=wanted)
        accepted = confidence >= chosen["threshold"]
        assert is_correct[accepted].mean() >= wanted
        assert accepted.mean() == pytest.approx(chosen["coverage"])


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        (np.ones((2, 2)), np.zeros(2, int), "sum to 1"),
        (np.full((2, 2), np.nan), np.zeros(2, int), "sum to 1"),
        (np.eye(2), np.zeros(3, int), r"got \(2, 2\) and \(3,\)"),
        (np.eye(2), np.array([0, 2]), r"lie in -1 \.\. 1, got 0 \.\. 2"),
        (np.eye(2), np.array([0.0, 1.0]), "class numbers"),
        (np.empty((0, 2)), np.empty(0, int), r"got \(0, 2\)"),
    ],
)
def test_bad_probabilities(probabilities, labels, message):
    with pytest.raises(ValueError, match=message):
        calibration_scores(probabilities, labels)


def test_bad_settings():
    ones = np.ones(2)
    with pytest.raises(ValueError, match="n_bins must be at least 1"):
        reliability_curve(ones, ones, n_bins=0)
    with pytest.raises(ValueError, match="'quantile'"):
        reliability_curve(ones, ones, binning="quantile")
    with pytest.raises(ValueError, match=r"wanted_accuracy must lie in \(0, 1\], got 0"):
        choose_threshold(ones, ones, wanted_accuracy=0)
    with pytest.raises(ValueError, match=r"confidence must lie in \[0, 1\]"):
        risk_coverage(2 * ones, ones)
    with pytest.raises(ValueError, match="of equal length"):
        risk_coverage(ones, np.ones(3))
    with pytest.raises(ValueError, match="No validation cell has a class"):
        fit_temperature(np.eye(2), np.array([-1, -1]))
    with pytest.raises(ValueError, match=r"logits must be \(N, C\), finite"):
        fit_temperature(np.full((2, 2), np.inf), np.array([0, 1]))
