"""Probes of frozen embeddings against hand-computed numbers and scikit-learn, and their baselines.

Needs no data. Run: pytest tests/test_annotation_metrics.py
"""

import json

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_validate
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from modeling_scdiva.metrics import depth_features, log_normalise, pca_features, probe_embedding
from tokenization_scdiva.ranking_scdiva import normalise_counts
from tokenization_scdiva.synthetic import synthetic_cells

SCORES = ("knn_accuracy", "knn_macro_f1", "logistic_accuracy", "logistic_macro_f1")


def make_blobs(seed=0, n_cells=120, n_classes=3, width=6, spread=1.0):
    rng = np.random.default_rng(seed)
    classes = np.arange(n_cells) % n_classes
    centres = rng.normal(size=(n_classes, width)) * 2
    return centres[classes] + rng.normal(size=(n_cells, width)) * spread, np.array(list("abcdefgh"))[classes]


def test_constant_features_by_hand():
    # 60 a, 40 b, nothing to tell them apart: every fold (12 a, 8 b) is called a.
    # Accuracy 0.6; F1 of a = 2 * 0.6 * 1 / 1.6 = 0.75, of b = 0; macro 0.375.
    labels = ["a"] * 60 + ["b"] * 40
    found = probe_embedding(np.ones((100, 3)), labels, n_neighbors=80)
    for name in ("knn", "logistic"):
        assert found[f"{name}_accuracy"] == pytest.approx(0.6)
        assert found[f"{name}_macro_f1"] == pytest.approx(0.375)
        assert found[f"{name}_accuracy_sd"] == 0.0
    assert found["majority_accuracy"] == pytest.approx(0.6)
    assert (found["n_cells"], found["n_classes"]) == (100, 2)


def test_separated_classes_are_found():
    features, labels = make_blobs(spread=0.01)
    found = probe_embedding(features, labels)
    assert [found[name] for name in SCORES] == [1.0] * 4
    assert found["n_folds_not_converged"] == 0
    json.dumps(found, allow_nan=False)


def test_equals_cross_validation_of_scikit_learn():
    features, labels = make_blobs(spread=2.5)
    features[:, 0] *= 50
    found = probe_embedding(features, labels, seed=3, n_neighbors=9)
    folds = StratifiedKFold(5, shuffle=True, random_state=3)
    for name, method in (
        ("knn", KNeighborsClassifier(9)),
        ("logistic", make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))),
    ):
        expected = cross_validate(method, features, labels, cv=folds, scoring=["accuracy", "f1_macro"])
        for ours, theirs in (("accuracy", "test_accuracy"), ("macro_f1", "test_f1_macro")):
            assert found[f"{name}_{ours}"] == pytest.approx(expected[theirs].mean())
            assert found[f"{name}_{ours}_sd"] == pytest.approx(expected[theirs].std(ddof=1))


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_names_units_and_rotations_change_nothing(seed):
    features, labels = make_blobs(seed, n_cells=60, spread=2.0)
    found = probe_embedding(features, labels, n_neighbors=5)
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(6, 6)))[0]
    renamed = probe_embedding(
        features @ rotation * 7.0 + 3.0, [f"type {name}" for name in labels], n_neighbors=5
    )
    assert all(0.0 <= found[name] <= 1.0 for name in SCORES)
    assert renamed["knn_accuracy"] == pytest.approx(found["knn_accuracy"])
    assert renamed["knn_macro_f1"] == pytest.approx(found["knn_macro_f1"])


def test_permuted_labels_fall_to_chance():
    features, labels = make_blobs(n_cells=300)
    found = probe_embedding(features, np.random.default_rng(0).permutation(labels))
    assert all(found[name] < 0.45 for name in SCORES)


def test_small_classes_are_left_out_and_reported():
    features, labels = make_blobs()
    expected = probe_embedding(features, labels)
    more = np.concatenate([np.full((4, 6), 1e3), features])
    found = probe_embedding(more, pd.Categorical(["rare"] * 3 + ["rarer"] + list(labels)))
    assert found["left_out_classes"] == {"rare": 3, "rarer": 1}
    assert (found["n_cells_left_out"], found["n_cells"], found["n_classes"]) == (4, 120, 3)
    assert [found[name] for name in SCORES] == [expected[name] for name in SCORES]


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda x, y: (x[:, 0], y), {}, r"features must be \(N, D\)"),
        (lambda x, y: (x[:-1], y), {}, r"labels \(N,\), got \(119, 6\) and \(120,\)"),
        (
            lambda x, y: (np.where(x == x[4, 2], np.nan, x), y),
            {},
            "1 cells have features that are not finite",
        ),
        (lambda x, y: (x, [None, np.nan, *y[2:]]), {}, "2 labels are missing"),
        (lambda x, y: (x, ["a"] * 119 + ["b"]), {}, "Two classes with at least n_folds=5 cells"),
        (lambda x, y: (x, y), {"n_folds": 1}, "n_folds must be at least 2, got 1"),
        (lambda x, y: (x, y), {"n_neighbors": 97}, "n_neighbors=97 exceeds the 96 training cells"),
    ],
)
def test_refusals(change, arguments, message):
    features, labels = change(*make_blobs())
    with pytest.raises(ValueError, match=message):
        probe_embedding(features, labels, **arguments)


def test_depth_by_hand():
    counts = np.array([[3, 0, 1], [0, 0, 0], [1, 1, 1]])
    expected = np.log1p([[4, 2], [0, 0], [3, 3]])
    for matrix in (counts, sp.csc_matrix(counts), sp.csr_array(counts)):
        found = depth_features(matrix)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    for bad in (-1.0, np.nan):
        with pytest.raises(ValueError, match="finite and not negative"):
            depth_features(np.array([[bad, 1.0]]))
        with pytest.raises(ValueError, match="finite and not negative"):
            log_normalise(np.array([[bad, 1.0]]))


def test_log_normalise_by_hand():
    counts = np.array([[3, 0, 1], [0, 0, 0]])
    found = log_normalise(counts, target_sum=100)
    np.testing.assert_allclose(found.toarray(), np.log1p([[75, 0, 25], [0, 0, 0]]), rtol=1e-6)
    assert counts[0, 0] == 3
    unsorted = sp.csr_matrix((np.array([1.0, 3.0]), np.array([2, 0]), np.array([0, 2, 2])), shape=(2, 3))
    np.testing.assert_allclose(log_normalise(unsorted, target_sum=100).toarray(), found.toarray())
    assert unsorted.data.tolist() == [1.0, 3.0]


def test_log_normalise_equals_the_tokenizer():
    counts = synthetic_cells(n_cells=20, n_genes=80).X
    library_size = np.repeat(np.asarray(counts.sum(axis=1)).ravel(), np.diff(counts.indptr))
    expected = normalise_counts(counts.data, library_size, 1e4)
    np.testing.assert_allclose(log_normalise(counts).data, expected, rtol=1e-6)


def test_pca_equals_singular_values_of_centred_cells():
    expression = log_normalise(synthetic_cells(n_cells=60, n_genes=80).X)
    found = pca_features(expression, n_components=5)
    assert (found.shape, found.dtype) == ((60, 5), np.float32)
    dense = expression.toarray().astype(np.float64)
    left, singular_values, _ = np.linalg.svd(dense - dense.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(found), np.abs(left * singular_values)[:, :5], atol=1e-4)
    np.testing.assert_allclose(pca_features(dense, n_components=5), found, atol=1e-4)
    np.testing.assert_array_equal(pca_features(expression, n_components=5), found)


def test_pca_tells_synthetic_types_apart_better_than_depth():
    adata = synthetic_cells(n_cells=200, n_genes=200)
    by_pca = probe_embedding(pca_features(log_normalise(adata.X), n_components=10), adata.obs["cell_type"])
    by_depth = probe_embedding(depth_features(adata.X), adata.obs["cell_type"])
    assert by_pca["logistic_accuracy"] > 0.9 > by_depth["logistic_accuracy"]


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        (np.array([[0.0, 5.0], [2.0, 1.0]]), "raw counts"),
        (np.array([[0.0, -0.5], [2.0, 1.0]]), "finite and not negative"),
        (np.full((3, 3), np.inf), "finite and not negative"),
        (np.full((3, 9), 0.5), r"n_components=3 must be below .* \(3, 9\)"),
    ],
)
def test_pca_refusals(expression, message):
    with pytest.raises(ValueError, match=message):
        pca_features(sp.csr_matrix(expression), n_components=3)
