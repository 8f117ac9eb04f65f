"""Gene networks against a reference: hand cases, scikit-learn, networkx, popularity, refusals.

Needs no data. Run: pytest tests/test_network_metrics.py
"""

import numpy as np
import pytest
from scipy import stats
from scipy.sparse import csr_matrix
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score

from modeling_scdiva.metrics.network import (
    early_precision,
    network_metrics,
    network_universe,
    sign_agreement,
    tf_metrics,
)
from modeling_scdiva.metrics.network_baselines import (
    coexpression_network,
    degree_network,
    mean_expression_network,
    random_network,
)

EVERYWHERE = dict.fromkeys("ABCD", 0.5)


def test_universe_by_hand():
    edges = [
        ("A", "B", 1),
        ("A", "B", 1),
        ("A", "A", 1),
        ("B", "C", -2),
        ("B", "C", 1),
        ("A", "X"),
        ("A", "D"),
    ]
    universe = network_universe(edges, expressed_fraction=EVERYWHERE | {"D": 0.009})
    assert (universe.tfs, universe.targets) == (["A", "B"], ["A", "B", "C"])
    np.testing.assert_array_equal(universe.is_edge, [[0, 1, 0], [0, 0, 1]])
    np.testing.assert_array_equal(universe.is_candidate, [[0, 1, 1], [1, 0, 1]])
    np.testing.assert_array_equal(universe.signs, [[0, 1, 0], [0, 0, 0]])  # B -> C is said to do both
    assert universe.left_out == {"self_loops": 1, "gene_not_scored": 1, "gene_rarely_expressed": 1}


def test_universe_agrees_with_networkx():
    networkx = pytest.importorskip("networkx")
    rng = np.random.default_rng(0)
    genes = [f"g{i:02d}" for i in range(30)]
    edges = [(genes[a], genes[b]) for a, b in rng.integers(0, 30, (80, 2))]
    shares = dict(zip(genes, rng.random(30) * 0.05, strict=True))
    universe = network_universe(edges, expressed_fraction=shares)
    graph = networkx.DiGraph(edges)
    graph.remove_edges_from(list(networkx.selfloop_edges(graph)))
    graph = graph.subgraph([gene for gene in genes if shares[gene] >= 0.01])
    assert universe.tfs == sorted(node for node, degree in graph.out_degree if degree)
    assert universe.is_edge.sum() == graph.number_of_edges()
    in_degree = [graph.in_degree(gene) if gene in graph else 0 for gene in universe.targets]
    np.testing.assert_array_equal(universe.is_edge.sum(axis=0), in_degree)


def test_universe_refuses():
    with pytest.raises(ValueError, match=r"None of the 1 edges joins .* by symbol\?"):
        network_universe([("a", "b")], expressed_fraction=EVERYWHERE)
    with pytest.raises(ValueError, match="All 1 pairs of the universe are edges"):
        network_universe([("A", "B")], expressed_fraction={"A": 1.0, "B": 1.0})


def test_metrics_by_hand():
    scores = [[0.9, 0.8, 0.1], [0.7, np.nan, 0.2]]
    is_edge = [[True, False, False], [True, True, False]]
    found = network_metrics(scores, is_edge)
    # Ranked: edge, other, edge, other, other, edge (without a score: last).
    assert found["auprc"] == pytest.approx((1 + 2 / 3 + 3 / 6) / 3)
    assert found["auprc_ratio"] == pytest.approx(found["auprc"] / 0.5)
    assert found["auroc"] == pytest.approx((3 + 2 + 0) / 9)
    assert found["early_precision"] == pytest.approx(2 / 3)
    assert found["early_precision_ratio"] == pytest.approx(4 / 3)
    assert found["tf_auprc"] == pytest.approx((1 + (1 + 2 / 3) / 2) / 2)
    assert found["tf_auroc"] == pytest.approx((1 + 1 / 2) / 2)
    assert {name: found[name] for name in ("n_pairs", "n_edges", "n_tfs", "n_unscored")} == {
        "n_pairs": 6, "n_edges": 3, "n_tfs": 2, "n_unscored": 1,
    }  # fmt: skip


def test_metrics_agree_with_scikit_learn():
    rng = np.random.default_rng(0)
    is_edge = rng.random((12, 40)) < 0.15
    scores = np.round(rng.random((12, 40)) + 0.3 * is_edge, 1)  # many ties
    is_candidate = rng.random((12, 40)) < 0.9
    truth, ranked = is_edge[is_candidate], scores[is_candidate]
    found = network_metrics(scores, is_edge, is_candidate=is_candidate)
    assert found["auroc"] == pytest.approx(roc_auc_score(truth, ranked))
    assert found["auprc"] == pytest.approx(average_precision_score(truth, ranked))
    precision, recall, _ = precision_recall_curve(truth, ranked)
    assert found["auprc"] == pytest.approx(auc(recall, precision), abs=0.05)
    assert found["auprc_ratio"] > 1.2
    # Whatever keeps the order keeps the numbers.
    assert network_metrics(np.exp(scores), is_edge, is_candidate=is_candidate) == pytest.approx(found)
    order = rng.permutation(40)
    moved = network_metrics(scores[:, order], is_edge[:, order], is_candidate=is_candidate[:, order])
    assert moved == pytest.approx(found)


def test_perfect_and_uninformative_scores():
    is_edge = np.random.default_rng(0).random((10, 30)) < 0.2
    perfect = network_metrics(is_edge.astype(float), is_edge)
    assert [perfect[name] for name in ("auprc", "auroc", "early_precision", "tf_auprc")] == [1.0] * 4
    for same in (np.zeros((10, 30)), np.full((10, 30), np.nan)):
        flat = network_metrics(same, is_edge)
        assert flat["auprc_ratio"] == flat["early_precision_ratio"] == 1.0
        assert flat["auroc"] == flat["tf_auroc"] == 0.5


def test_early_precision_takes_all_ties():
    assert early_precision([3, 2, 2, 2, 1], [True, True, False, False, False]) == 2 / 4
    assert early_precision([3, 2, 1], [True, False, False]) == 1.0
    with pytest.raises(ValueError, match="at least one edge"):
        early_precision([1.0, 2.0], [False, False])


def test_tfs_without_a_choice_have_no_number():
    found = tf_metrics(np.zeros((3, 2)), [[True, True], [False, False], [True, False]])
    np.testing.assert_array_equal(np.isnan(found["auprc"]), [True, True, False])
    assert found["auprc"][2] == found["auroc"][2] == 0.5


@pytest.mark.parametrize(
    ("scores", "is_edge", "message"),
    [
        (np.zeros((2, 2)), np.zeros((2, 2), bool), "0 of 4 pairs are edges"),
        (np.zeros((2, 2)), np.ones((2, 2), bool), "4 of 4 pairs are edges"),
        (np.zeros((2, 3)), np.ones((2, 2), bool), r"got \(2, 3\), \(2, 2\)"),
        (np.full((1, 2), np.inf), [[True, False]], "must be finite, or NaN"),
    ],
)
def test_impossible_input(scores, is_edge, message):
    with pytest.raises(ValueError, match=message):
        network_metrics(scores, is_edge)


def test_signs_by_hand():
    scores = [[1.0, -1.0, 2.0, 0.0, np.nan, 5.0]]
    signs = [[1, -1, -1, 1, 1, 0]]
    found = sign_agreement(scores, signs)
    assert found["n_signed_edges"] == 3
    assert found["sign_accuracy"] == found["majority_sign_accuracy"] == pytest.approx(2 / 3)
    assert found["balanced_sign_accuracy"] == pytest.approx((1 + 0.5) / 2)
    assert sign_agreement([[1.0]], [[0]])["sign_accuracy"] is None
    assert sign_agreement([[1.0]], [[1]])["balanced_sign_accuracy"] is None
    with pytest.raises(ValueError, match=r"scores \(1, 1\) and signs \(1, 2\)"):
        sign_agreement([[1.0]], [[1, 0]])


def test_correlations_agree_with_numpy_and_scipy():
    expression = np.random.default_rng(0).poisson(0.8, (50, 9)).astype(float)
    expression[:, 4] = 2.0
    tfs, targets = [0, 4], [1, 5, 8]
    pearson = coexpression_network(csr_matrix(expression), tfs, targets)
    np.testing.assert_allclose(pearson[0], np.corrcoef(expression[:, [0, *targets]].T)[0, 1:])
    assert np.isnan(pearson[1]).all()  # a constant gene
    spearman = coexpression_network(expression, tfs, targets, correlation="spearman")
    expected = [stats.spearmanr(expression[:, 0], expression[:, target]).statistic for target in targets]
    np.testing.assert_allclose(spearman[0], expected)
    with pytest.raises(ValueError, match="got 'kendall'"):
        coexpression_network(expression, tfs, targets, correlation="kendall")
    with pytest.raises(ValueError, match="at least 3 cells, got 2"):
        coexpression_network(expression[:2], tfs, targets)


def test_popularity_is_the_same_for_every_tf():
    expression = csr_matrix([[0.0, 1.0, 2.0], [0.0, 3.0, 0.0]])
    np.testing.assert_array_equal(mean_expression_network(expression, 2, [1, 2]), [[2.0, 1.0]] * 2)
    is_edge = np.array([[True, True, False], [True, False, False]])
    np.testing.assert_array_equal(degree_network(is_edge), [[1, 0, 0], [1, 1, 0]])


def test_random_scores_are_seeded_and_at_chance():
    np.testing.assert_array_equal(random_network(3, 4, seed=1), random_network(3, 4, seed=1))
    is_edge = np.random.default_rng(1000).random((30, 100)) < 0.1
    draws = [network_metrics(random_network(30, 100, seed=seed), is_edge) for seed in range(12)]
    # A draw spreads by sqrt(1 / 12 / 300 edges) = 0.017, the mean of 12 by 0.005.
    assert np.mean([found["auroc"] for found in draws]) == pytest.approx(0.5, abs=0.015)
    assert np.mean([found["early_precision_ratio"] for found in draws]) == pytest.approx(1.0, abs=0.2)
