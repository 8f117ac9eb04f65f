"""Baselines of annotation: they learn, see no test cell in fitting, and select genes as scanpy does.

Needs no data. Run: pytest tests/test_annotation_baselines.py
"""

import numpy as np
import pytest
import scanpy
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.preprocessing import StandardScaler

from modeling_scdiva.metrics.annotation import depth_features, log_normalise
from modeling_scdiva.metrics.annotation_baselines import (
    as_parts,
    celltypist_style,
    logistic_probe,
    majority_class,
    pca_logistic,
    select_variable_genes,
    variable_genes_logistic,
)
from tokenization_scdiva import synthetic_cells

METHODS = [pca_logistic, variable_genes_logistic, celltypist_style]
TRAIN, VALIDATION, TEST = np.arange(100), np.arange(100, 140), np.arange(140, 200)


@pytest.fixture(scope="module")
def adata():
    return synthetic_cells(n_cells=200, n_genes=150, seed=4)


@pytest.fixture(scope="module")
def parts(adata):
    labels = adata.obs["cell_type"].to_numpy(dtype=str)
    return as_parts(log_normalise(adata.X), labels, TRAIN, VALIDATION, TEST)


def accuracy(adata, found):
    truth = adata.obs["cell_type"].to_numpy(dtype=str)[TEST]
    return (found.classes[found.test.argmax(axis=1)] == truth).mean()


@pytest.mark.parametrize("method", METHODS)
def test_types_are_learnt(adata, parts, method):
    found = method(parts)
    assert found.test.shape == (60, 4)
    np.testing.assert_allclose(found.test.sum(axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(found.validation.sum(axis=1), 1.0, atol=1e-5)
    assert accuracy(adata, found) > 0.9


@pytest.mark.parametrize("method", METHODS)
def test_sparse_equals_dense(parts, method):
    dense = parts.map(lambda part: part.toarray())
    np.testing.assert_allclose(method(dense).test, method(parts).test, atol=0.01)


@pytest.mark.parametrize("method", [*METHODS, logistic_probe])
def test_test_cells_change_nothing_that_is_fitted(parts, method):
    """Other test cells beside a cell leave its probabilities, and those of validation cells, as they are."""
    dense = parts.map(lambda part: part.toarray())
    rng = np.random.default_rng(0)
    others = rng.permuted(dense.test, axis=1) * 3.0
    changed = type(dense)(
        dense.train, dense.validation, np.vstack([dense.test[:1], others]), dense.train_labels,
        dense.validation_labels,
    )  # fmt: skip
    expected, found = method(dense), method(changed)
    np.testing.assert_allclose(found.validation, expected.validation, atol=1e-12)
    np.testing.assert_allclose(found.test[0], expected.test[0], atol=1e-12)


def test_probe_is_scikit_learns(parts):
    dense = parts.map(lambda part: part.toarray()[:, :20])
    found = logistic_probe(dense, strengths=[0.1])
    scaler = StandardScaler().fit(dense.train)
    expected = LogisticRegression(C=0.1, max_iter=500).fit(scaler.transform(dense.train), dense.train_labels)
    np.testing.assert_allclose(found.test, expected.predict_proba(scaler.transform(dense.test)))
    assert found.notes == {"strength": 0.1, "is_converged": True}


def test_strength_is_chosen_on_validation_cells():
    """Each strength is scored on the validation cells alone; the best wins, whichever comes first."""
    rng = np.random.default_rng(0)
    labels = np.where(np.arange(120) % 4 == 0, "rare", "common")
    features = rng.normal(size=(120, 5)) + 2.0 * (labels == "rare")[:, None]
    table = as_parts(features, labels, np.arange(60), np.arange(60, 100), np.arange(100, 120))

    def score(strength):
        found = logistic_probe(table, strengths=[strength])
        predicted = found.classes[found.validation.argmax(axis=1)]
        return f1_score(table.validation_labels, predicted, average="macro")

    weak, strong = 1.0, 1e-6
    assert score(weak) > score(strong)
    for strengths in ([weak, strong], [strong, weak]):
        assert logistic_probe(table, strengths=strengths).notes["strength"] == weak


def test_log_loss_decides_between_equals():
    """Far apart, every strength is right in all cells; the weakest regularisation is the surest."""
    labels = np.repeat(["a", "b"], 30)
    features = np.random.default_rng(0).normal(size=(60, 2)) * 0.1 + 5.0 * (labels == "b")[:, None]
    rows = np.random.default_rng(1).permutation(60)
    table = as_parts(features, labels, rows[:30], rows[30:50], rows[50:])
    assert logistic_probe(table, strengths=[0.01, 1.0]).notes["strength"] == 1.0
    unknown = type(table)(*table.map(np.copy).__dict__.values())
    unknown.validation_labels[:] = "zebra"
    assert np.isfinite(logistic_probe(unknown).test).all()


def test_variable_genes_are_scanpys(adata):
    other = adata.copy()
    other.X = log_normalise(other.X)
    scanpy.pp.highly_variable_genes(other, flavor="seurat", n_top_genes=40)
    expected = np.flatnonzero(other.var["highly_variable"])
    for expression in (other.X, other.X.toarray()):
        np.testing.assert_array_equal(select_variable_genes(expression, n_top_genes=40), expected)


def test_genes_without_a_count_are_never_chosen(adata):
    expression = log_normalise(adata.X).toarray()
    expression[:, 10:] = 0
    assert select_variable_genes(expression, n_top_genes=50).max() < 10


def test_majority_by_hand():
    labels = np.array(["b", "a", "b", "b", "a", "c"])
    parts = as_parts(np.zeros((6, 1)), labels, np.arange(4), np.array([4]), np.array([5]))
    found = majority_class(parts)
    assert found.classes.tolist() == ["a", "b"]
    np.testing.assert_allclose(found.test, [[0.25, 0.75]])
    np.testing.assert_allclose(found.validation, [[0.25, 0.75]])


def test_depth_tells_little_of_types(adata):
    labels = adata.obs["cell_type"].to_numpy(dtype=str)
    found = logistic_probe(as_parts(depth_features(adata.X), labels, TRAIN, VALIDATION, TEST))
    assert accuracy(adata, found) < 0.6


@pytest.mark.parametrize("method", [*METHODS, logistic_probe, majority_class])
def test_one_class_is_refused(method):
    labels = np.array(["B"] * 6)
    parts = as_parts(
        np.random.default_rng(0).random((6, 4)), labels, np.arange(2), np.arange(2, 4), np.arange(4, 6)
    )
    with pytest.raises(ValueError, match=r"one class only \(B\); two are needed"):
        method(parts)


def test_no_strength_is_refused(parts):
    with pytest.raises(ValueError, match="at least one strength"):
        logistic_probe(parts.map(lambda part: part.toarray()), strengths=[])
