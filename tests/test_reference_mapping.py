"""Reference mapping: votes by hand, equal to scikit-learn where weights are equal, new cells noticed.

Needs no data. Run: pytest tests/test_reference_mapping.py
"""

from pathlib import Path

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from modeling_scdiva.tasks import embed_cells, reference_mapping
from modeling_scdiva.tasks.annotation import UNKNOWN
from modeling_scdiva.tasks.reference_mapping import MappingSettings, map_to_reference, transfer_labels
from tokenization_scdiva import synthetic_cells

TYPES = ["B", "NK", "T"]


def blobs(n_cells=150, *, width=8, distance=6.0, seed=0):
    rng = np.random.default_rng(seed)
    centres = np.eye(3, width) * distance
    types = np.arange(n_cells) % 3
    return (centres[types] + rng.normal(size=(n_cells, width))).astype(np.float32), np.array(TYPES)[types]


def test_votes_by_hand():
    """Reference on a line at 0, 1, 3, 7; own nearest distances 1, 1, 2, 4: median 1.5."""
    reference = np.array([[0.0], [1.0], [3.0], [7.0]])
    settings = MappingSettings(n_neighbors=1, metric="euclidean")
    found = transfer_labels(np.array([[0.4], [9.0]]), reference, list("abca"), settings=settings)
    assert found.predicted_cell_types.tolist() == ["a", "a"]
    assert found.neighbor_rows.tolist() == [[0], [3]]
    assert found.distances.ravel().tolist() == pytest.approx([0.4, 2.0])
    # 0.4 is below all own distances; 2.0 is above two of four (and equal to one).
    assert found.distance_percentile.tolist() == pytest.approx([0.0, 0.5])

    # Two neighbours: own distances (1, 3), (1, 2), (2, 3), (4, 6): median 2.5.
    settings = MappingSettings(n_neighbors=2, metric="euclidean")
    found = transfer_labels(np.array([[0.4]]), reference, list("abca"), settings=settings)
    weights = np.exp(-(np.array([0.4, 0.6]) ** 2) / (2 * 2.5**2))
    np.testing.assert_allclose(found.votes, [[weights[0], weights[1], 0] / weights.sum()], atol=1e-6)
    assert found.confidence[0] == pytest.approx(weights[0] / weights.sum(), abs=1e-6)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_neighbours_are_scikit_learns(metric):
    reference, labels = blobs()
    query, types = blobs(60, seed=1)
    found = transfer_labels(query, reference, labels, settings=MappingSettings(metric=metric))
    exact = NearestNeighbors(n_neighbors=15, metric=metric, algorithm="brute").fit(reference)
    distances, rows = exact.kneighbors(query)
    np.testing.assert_array_equal(found.neighbor_rows, rows)
    np.testing.assert_allclose(found.distances, distances, atol=1e-5)
    knn = KNeighborsClassifier(15, metric=metric, algorithm="brute").fit(reference, labels)
    assert (found.predicted_cell_types == knn.predict(query)).mean() > 0.97
    assert (found.predicted_cell_types == types).mean() > 0.97
    np.testing.assert_allclose(found.votes.sum(axis=1), 1.0, atol=1e-5)


@pytest.mark.slow  # pynndescent compiles itself
def test_large_references_are_searched_approximately(monkeypatch):
    reference, labels = blobs(900)
    query, _ = blobs(90, seed=1)
    exact = transfer_labels(query, reference, labels)
    monkeypatch.setattr(reference_mapping, "MAX_EXACT_CELLS", 100)
    found = transfer_labels(query, reference, labels)
    same = [len(set(a) & set(b)) / 15 for a, b in zip(found.neighbor_rows, exact.neighbor_rows, strict=True)]
    assert np.mean(same) > 0.95
    np.testing.assert_array_equal(found.predicted_cell_types, exact.predicted_cell_types)
    np.testing.assert_allclose(found.distance_percentile, exact.distance_percentile, atol=0.05)
    again = transfer_labels(query, reference, labels)
    np.testing.assert_array_equal(found.neighbor_rows, again.neighbor_rows)


def test_cells_unlike_the_reference_are_noticed():
    reference, labels = blobs()
    known, _ = blobs(60, seed=1)
    new = known[:20] + 40.0 * np.eye(8)[7]
    settings = MappingSettings(metric="euclidean", max_distance_percentile=0.999)
    found = transfer_labels(np.concatenate([known, new]), reference, labels, settings=settings)
    assert (found.predicted_cell_types[60:] == UNKNOWN).all()
    assert (found.distance_percentile[60:] == 1.0).all()
    # Confidence alone does not notice: every far neighbour weighs about the same, but some types win.
    assert (found.predicted_cell_types[:60] != UNKNOWN).mean() > 0.9
    assert found.distance_percentile[:60].mean() < 0.7


def test_doubtful_cells_become_unknown():
    reference, labels = blobs(distance=4.0)
    between = (reference[labels == "B"][:10] + reference[labels == "T"][:10]) / 2
    settings = MappingSettings(metric="euclidean", threshold=0.95)
    found = transfer_labels(np.concatenate([reference[:30], between]), reference, labels, settings=settings)
    is_unknown = found.predicted_cell_types == UNKNOWN
    np.testing.assert_array_equal(is_unknown, found.confidence < 0.95)
    assert is_unknown[30:].mean() > is_unknown[:30].mean()
    assert UNKNOWN not in set(found.likeliest_cell_types)


def test_equal_vectors_do_not_break_it():
    found = transfer_labels(np.ones((2, 3)), np.ones((20, 3)), ["a", "b"] * 10)
    assert np.isfinite(found.votes).all()
    np.testing.assert_allclose(found.votes.sum(axis=1), 1.0, atol=1e-6)


def test_order_of_reference_and_scale_do_not_matter():
    reference, labels = blobs()
    query, _ = blobs(30, seed=1)
    settings = MappingSettings(metric="euclidean")
    expected = transfer_labels(query, reference, labels, settings=settings)
    order = np.random.default_rng(0).permutation(len(reference))
    found = transfer_labels(3 * query, 3 * reference[order], labels[order], settings=settings)
    np.testing.assert_allclose(found.votes, expected.votes, atol=1e-4)
    np.testing.assert_allclose(found.distance_percentile, expected.distance_percentile, atol=1e-6)


@pytest.fixture(scope="module")
def cells():
    adata = synthetic_cells(n_cells=90, n_genes=120, seed=3)
    return adata[:60].copy(), adata[60:].copy()


def test_cells_are_mapped_by_their_embeddings(cells, fresh_tiny_model, tokenizer):
    reference, query = cells
    model = fresh_tiny_model()
    arguments = {"model": model, "tokenizer": tokenizer, "show_progress": False}
    found = map_to_reference(query, reference=reference, label_key="cell_type", pooling="mean", **arguments)
    for adata in cells:
        adata.obsm["X_scdiva"] = embed_cells(adata, pooling="mean", **arguments)
    stored = map_to_reference(
        query,
        reference=reference,
        label_key="cell_type",
        settings=MappingSettings(embedding_key="X_scdiva"),
    )
    np.testing.assert_allclose(found.votes, stored.votes, atol=1e-6)
    assert found.label_names == ["type_0", "type_1", "type_2", "type_3"]
    assert found.predicted_cell_types.shape == (30,)


def test_bad_cells(cells, fresh_tiny_model, tokenizer):
    reference, query = cells
    with pytest.raises(KeyError, match=r"no column 'type' \(cell types of the reference\)\. Columns: 'cell_"):
        map_to_reference(query, reference=reference, label_key="type")
    with pytest.raises(ValueError, match="needs model and tokenizer, or embedding_key"):
        map_to_reference(query, reference=reference, label_key="cell_type")
    settings = MappingSettings(embedding_key="X_pca")
    with pytest.raises(KeyError, match="obsm has no entry 'X_pca'"):
        map_to_reference(query, reference=reference, label_key="cell_type", settings=settings)
    with pytest.raises(TypeError, match="got a path"):
        map_to_reference(Path("query.h5ad"), reference=reference, label_key="cell_type")
    with pytest.raises(TypeError, match="got a path"):
        map_to_reference(query, reference="reference.h5ad", label_key="cell_type")


@pytest.mark.parametrize(
    ("query", "reference", "message"),
    [
        (np.ones((2, 3)), np.ones((20, 4)), r"do not fit, got \(2, 3\), \(20, 4\) and \(20,\)"),
        (np.ones((2, 3)), np.full((20, 3), np.nan), "must be finite"),
        (np.ones((2, 3)), np.ones((20, 3)), r"one type only \('a'\)"),
        (np.ones((2, 3)), np.ones((15, 3)), "n_neighbors=15 needs a larger reference than 15 cells"),
    ],
)
def test_bad_vectors(query, reference, message):
    with pytest.raises(ValueError, match=message):
        transfer_labels(query, reference, ["a"] * len(reference))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_neighbors": 0}, "n_neighbors must be at least 1"),
        ({"metric": "manhattan"}, "got 'manhattan'"),
        ({"threshold": 1.5}, r"threshold must lie in \[0, 1\], got 1.5"),
        ({"max_distance_percentile": -1.0}, r"max_distance_percentile must lie in \[0, 1\], got -1.0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        MappingSettings(**settings)
