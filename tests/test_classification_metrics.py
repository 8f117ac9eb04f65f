"""Class scores: hand-computed, equal to scikit-learn's, indifferent to names and order, bad input refused.

Needs no data. Run: pytest tests/test_classification_metrics.py
"""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, classification_report, f1_score

from modeling_scdiva.metrics.classification import class_scores, classification_scores

TRUTH = ["a", "a", "a", "b", "b"]
FOUND = ["a", "a", "c", "b", "a"]


def test_by_hand():
    # a: precision 2/3, recall 2/3, F1 2/3. b: precision 1, recall 1/2, F1 2/3. c: only predicted, F1 0.
    scores = classification_scores(TRUTH, FOUND)
    assert scores["accuracy"] == pytest.approx(3 / 5)
    assert scores["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert scores["macro_f1_test_classes"] == pytest.approx(2 / 3)
    assert scores["weighted_f1"] == pytest.approx(2 / 3)
    # Agreement by chance: (3 * 3 + 2 * 1 + 0 * 1) / 25.
    assert scores["cohen_kappa"] == pytest.approx((3 / 5 - 11 / 25) / (1 - 11 / 25))
    assert (scores["n_cells"], scores["n_classes"]) == (5, 2)


def test_classes_one_by_one():
    rows = class_scores(TRUTH, FOUND)
    assert [row["class"] for row in rows] == ["a", "b", "c"]
    assert [row["support"] for row in rows] == [3, 2, 0]
    assert [row["recall"] for row in rows] == pytest.approx([2 / 3, 1 / 2, 0])
    assert [row["precision"] for row in rows] == pytest.approx([2 / 3, 1, 0])


def test_equal_to_scikit_learn():
    rng = np.random.default_rng(0)
    truth, found = rng.integers(0, 5, (2, 300)).astype(str)
    scores = classification_scores(truth, found)
    assert scores["macro_f1"] == pytest.approx(f1_score(truth, found, average="macro"))
    assert scores["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(truth, found))
    report = classification_report(truth, found, output_dict=True)
    for row in class_scores(truth, found):
        assert row["f1"] == pytest.approx(report[row["class"]]["f1-score"])
        assert row["support"] == report[row["class"]]["support"]


def test_names_and_order_of_cells_do_not_matter():
    rng = np.random.default_rng(1)
    truth, found = rng.integers(0, 4, (2, 80))
    order = rng.permutation(80)
    renamed = np.array(["z", "k", "q", "b"])
    expected = classification_scores(truth, found)
    assert classification_scores(renamed[truth[order]], renamed[found[order]]) == pytest.approx(expected)


def test_perfect_and_single_class():
    assert classification_scores(["a", "b"], ["a", "b"])["macro_f1"] == 1.0
    assert classification_scores(["a", "a"], ["a", "a"])["cohen_kappa"] is None


@pytest.mark.parametrize(
    ("labels", "predicted", "message"),
    [
        ([], [], r"N >= 1, got \(0,\), \(0,\)"),
        (["a"], ["a", "b"], r"of equal length, .* got \(1,\), \(2,\)"),
        (["a", None], ["a", "b"], "1 cells have no true or no predicted class"),
    ],
)
@pytest.mark.parametrize("function", [classification_scores, class_scores])
def test_bad_input(function, labels, predicted, message):
    with pytest.raises(ValueError, match=message):
        function(labels, predicted)
