"""Integration scores against scikit-learn and their definitions; baselines; controls.

Needs the eval extra (scib-metrics, harmonypy); no real data. kBET compiles for twenty seconds and is slow.
Run: pytest tests/test_integration_metrics.py
"""

import importlib.metadata
import json

import numpy as np
import pytest
from scipy.sparse.csgraph import connected_components
from sklearn.metrics import pairwise_distances, silhouette_samples, silhouette_score
from sklearn.neighbors import kneighbors_graph

from modeling_scdiva.metrics import integration as scores_module
from modeling_scdiva.metrics.annotation import log_normalise, pca_features
from modeling_scdiva.metrics.integration import integration_scores, integration_settings
from modeling_scdiva.metrics.integration_baselines import (
    harmony_embedding,
    highly_variable_genes,
    label_one_hot,
    pca_embedding,
    random_embedding,
)
from tokenization_scdiva import synthetic_cells

pytest.importorskip("scib_metrics")
N_CELLS, WIDTH = 96, 5


def make_cells(n_batches=3, shift=0.0, spread=1.0):
    """Three types, batches in turn inside each; ``shift`` moves the batches apart."""
    rng = np.random.default_rng(0)
    types = np.repeat(["a", "b", "c"], N_CELLS // 3)
    batches = np.array([f"batch_{cell % n_batches}" for cell in range(N_CELLS)])
    centres = 6.0 * np.eye(3, WIDTH)[np.repeat([0, 1, 2], N_CELLS // 3)]
    vectors = centres + spread * rng.normal(size=(N_CELLS, WIDTH))
    vectors[:, -1] += shift * (np.arange(N_CELLS) % n_batches)
    return vectors.astype(np.float32), types, batches


@pytest.fixture(scope="module")
def shifted():
    vectors, types, batches = make_cells(shift=2.5)
    scores = integration_scores(vectors, types, batches, unintegrated=2.0 * vectors, with_kbet=False)
    return vectors, types, batches, scores


def test_silhouettes_equal_scikit_learn(shifted):
    vectors, types, batches, scores = shifted
    assert scores["asw_label"] == pytest.approx((silhouette_score(vectors, types) + 1) / 2, abs=1e-4)
    of_types = [
        np.mean(1 - np.abs(silhouette_samples(vectors[types == name], batches[types == name])))
        for name in np.unique(types)
    ]
    assert scores["asw_batch"] == pytest.approx(np.mean(of_types), abs=1e-4)


def test_bras_equals_its_definition(shifted):
    vectors, types, batches, scores = shifted
    of_types = []
    for name in np.unique(types):
        inside = types == name
        distances = pairwise_distances(vectors[inside].astype(np.float64), metric="cosine")
        same = batches[inside][:, None] == batches[inside][None, :]
        own = (distances * same).sum(axis=1) / (same.sum(axis=1) - 1)
        other = (distances * ~same).sum(axis=1) / (~same).sum(axis=1)
        of_types.append(np.mean(1 - np.abs((other - own) / np.maximum(own, other))))
    assert scores["bras"] == pytest.approx(np.mean(of_types), abs=1e-3)


def test_graph_connectivity_equals_components(shifted):
    vectors, types, _, scores = shifted
    shares = []
    graph = kneighbors_graph(vectors, 14)  # and the cell itself: 15
    for name in np.unique(types):
        inside = types == name
        _, members = connected_components(graph[inside][:, inside], connection="strong")
        shares.append(np.bincount(members).max() / inside.sum())
    assert scores["graph_connectivity"] == pytest.approx(np.mean(shares))


def test_averages_are_those_of_their_parts(shifted):
    *_, scores = shifted
    parts = [scores[name] for name in ("nmi_best_resolution", "ari_best_resolution", "asw_label")]
    assert scores["avg_bio"] == pytest.approx(np.mean(parts))
    parts = [scores[name] for name in ("nmi_resolution_1", "ari_resolution_1", "asw_label")]
    assert scores["avg_bio_resolution_1"] == pytest.approx(np.mean(parts))
    assert scores["avg_batch"] == pytest.approx((scores["asw_batch"] + scores["graph_connectivity"]) / 2)
    assert scores["nmi_best_resolution"] >= scores["nmi_resolution_1"]
    assert scores["kbet"] is None
    json.dumps(scores, allow_nan=False)


def test_scale_does_not_matter_and_pcr_compares_shares(shifted):
    *_, scores = shifted
    # The embedding before is twice the one after: the batch explains the same share of both.
    assert scores["pcr_comparison"] == pytest.approx(0.0, abs=1e-3)


def test_pcr_equals_a_regression_on_components(shifted):
    vectors, types, batches, _ = shifted
    mixed, *_ = make_cells()

    def explained(matrix):
        centred = matrix - matrix.mean(axis=0)
        components = np.linalg.svd(centred, full_matrices=False)
        coordinates = components.U * components.S
        between = np.zeros(len(components.S))
        for name in np.unique(batches):
            inside = batches == name
            between += inside.sum() * coordinates[inside].mean(axis=0) ** 2
        return (between / (coordinates**2).sum(axis=0)) @ components.S**2 / (components.S**2).sum()

    scores = integration_scores(mixed, types, batches, unintegrated=vectors, with_kbet=False)
    expected = (explained(vectors) - explained(mixed)) / explained(vectors)
    assert scores["pcr_comparison"] == pytest.approx(expected, abs=1e-3)
    assert scores["pcr_comparison"] > 0.8
    assert scores["ilisi"] > 0.6


def test_batches_that_lie_apart_do_not_mix(shifted):
    vectors, types, batches, scores = shifted
    far = vectors.copy()
    far[:, -1] += 1000 * (np.arange(N_CELLS) % 3)
    apart = integration_scores(far, types, batches, with_kbet=False)
    # With 90 neighbours of 96 cells, perplexity 30: the 31 others of the own batch are nearer by far.
    assert apart["ilisi"] == pytest.approx(0.0, abs=1e-3)
    assert apart["bras"] < scores["bras"]
    assert apart["pcr_comparison"] is None


def test_order_and_names_change_nothing(shifted):
    vectors, types, batches, scores = shifted
    order = np.random.default_rng(1).permutation(N_CELLS)
    renamed = np.array([{"a": "z", "b": "y", "c": "x"}[name] for name in types])
    found = integration_scores(vectors[order], renamed[order], batches[order], with_kbet=False)
    for name in ("asw_label", "asw_batch", "graph_connectivity", "bras", "ilisi"):
        assert found[name] == pytest.approx(scores[name], abs=1e-4), name


def test_controls_show_what_a_score_is_worth():
    _, types, batches = make_cells()
    cheating = integration_scores(label_one_hot(types), types, batches, with_kbet=False)
    assert cheating["avg_bio"] > 0.9
    assert cheating["avg_batch"] > 0.9
    ignorant = integration_scores(
        random_embedding(N_CELLS, n_components=WIDTH), types, batches, with_kbet=False
    )
    assert ignorant["avg_bio"] < 0.4
    assert ignorant["asw_batch"] > 0.9  # wins what hardly tells anything


@pytest.mark.slow
def test_kbet_accepts_mixed_batches_and_rejects_others():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(240, WIDTH))
    types, batches = np.repeat(["a", "b"], 120), np.tile(["x", "y"], 120)
    vectors[:120, 0] += 8
    mixed = integration_scores(vectors, types, batches)["kbet"]
    vectors[batches == "x", 1] += 6
    apart = integration_scores(vectors, types, batches)["kbet"]
    assert mixed > 0.8
    assert apart < 0.2
    # Every type too small, or in one batch: nothing to test, which is not 0.
    few = np.array([f"type_{cell // 6}" for cell in range(240)])
    assert integration_scores(vectors, few, batches)["kbet"] is None


def test_settings_state_libraries_and_neighbours():
    settings = integration_settings(60)
    assert settings["versions"]["scib-metrics"] == importlib.metadata.version("scib-metrics")
    assert settings["neighbors"] == {"clustering": 15, "kbet": 50, "lisi": 60}
    assert settings["neighbor_search"] == "exact"
    assert "oracle" in settings["resolutions"]
    assert "pynndescent" in integration_settings(30_000)["neighbor_search"]


def test_equal_cells_are_their_own_first_neighbour():
    vectors = np.repeat(np.random.default_rng(0).normal(size=(10, 3)), 4, axis=0).astype(np.float32)
    found = scores_module._nearest_neighbors(vectors, 6)
    np.testing.assert_array_equal(found.indices[:, 0], np.arange(40))
    assert all(len(set(row)) == 6 for row in found.indices.tolist())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding": np.zeros(96)}, r"embedding must be \(N, D\) with at least 16 cells"),
        ({"embedding": np.zeros((3, 2))}, r"at least 16 cells, got shape \(3, 2\)"),
        ({"embedding": np.full((96, 2), np.nan)}, "96 of 96 cells have embeddings that are not finite"),
        ({"labels": ["a"] * 95}, r"labels must be \(96,\), one per cell, got \(95,\)"),
        ({"labels": ["a"] * 96}, "at least two labels, got only 'a'"),
        ({"batches": ["x"] * 96}, "at least two batches, got only 'x'"),
        ({"batches": [None, *["x"] * 95]}, "1 batches are missing"),
        ({"batches": ["x"] * 32 + ["y"] * 32 + ["z"] * 32}, "None of the 3 labels lies in two batches"),
        ({"unintegrated": np.zeros((95, 2))}, r"unintegrated must be finite and \(96, D\)"),
    ],
)
def test_input_that_cannot_be_scored(change, message):
    vectors, types, batches = make_cells()
    arguments = {"embedding": vectors, "labels": types, "batches": batches, "with_kbet": False} | change
    with pytest.raises(ValueError, match=message):
        integration_scores(**arguments)


# Baselines


@pytest.fixture(scope="module")
def counts():
    adata = synthetic_cells(n_cells=80, n_genes=120, seed=4)
    dense = adata.X.toarray()
    batches = np.where(np.arange(80) // 4 % 2, "x", "y")  # types come in turn: both batches have all
    dense[batches == "x", 60:] *= 3  # a batch effect
    return dense, batches, adata.obs["cell_type"].to_numpy()


def test_pca_is_that_of_the_chosen_genes(counts):
    dense, *_ = counts
    is_chosen = np.arange(120) < 70
    found = pca_embedding(dense, is_chosen, n_components=6, seed=1)
    expected = pca_features(log_normalise(dense)[:, :70], n_components=6, seed=1)
    np.testing.assert_array_equal(found, expected)
    assert pca_embedding(dense, np.arange(120) < 7).shape == (80, 6)  # never more than there are


def test_variable_genes_are_found_within_batches(counts):
    pytest.importorskip("scanpy")
    dense, batches, _ = counts
    dense = dense.copy()
    dense[:, 100] = np.where(batches == "x", 0, 9)  # differs between the batches only
    dense[:, 101] = 0  # never detected
    chosen = highly_variable_genes(dense, batches, n_top_genes=40)
    assert chosen.sum() == 40
    assert not chosen[100]
    assert not chosen[101]
    assert highly_variable_genes(dense, batches, n_top_genes=500).sum() == 119


def test_harmony_mixes_batches(counts):
    pytest.importorskip("harmonypy")
    dense, batches, types = counts
    components = pca_embedding(dense, np.ones(120, dtype=bool), n_components=10)
    corrected = harmony_embedding(components, batches)
    assert corrected.shape == components.shape

    def gap(vectors):
        inside = [[vectors[(types == name) & (batches == batch)] for batch in "xy"] for name in set(types)]
        return np.mean([np.linalg.norm(x.mean(axis=0) - y.mean(axis=0)) for x, y in inside])

    assert gap(corrected) < 0.7 * gap(components)
    np.testing.assert_array_equal(corrected, harmony_embedding(components, batches))


def test_controls_are_seeded():
    np.testing.assert_array_equal(random_embedding(5, seed=3), random_embedding(5, seed=3))
    assert not np.array_equal(random_embedding(5, seed=3), random_embedding(5, seed=4))
    encoded = label_one_hot(["b", "a", "b"], seed=0)
    assert encoded.shape == (3, 2)
    np.testing.assert_array_equal(encoded.argmax(axis=1), [1, 0, 1])
