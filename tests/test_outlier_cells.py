"""Abnormal cells: what each maker changes and keeps, scores by hand, detectors by second implementations.

Needs: both packages; no files, no GPU. Scrublet needs scanpy.
Run: python -m pytest tests/test_outlier_cells.py
"""

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.sparse import csr_matrix, vstack
from scipy.spatial.distance import cdist
from sklearn.metrics import average_precision_score, roc_auc_score

from modeling_scdiva.metrics.annotation import depth_features, log_normalise, pca_features
from modeling_scdiva.metrics.outlier_baselines import (
    DepthDetector,
    KNNDistanceDetector,
    PCAResidualDetector,
    knn_label_disagreement,
    scrublet_scores,
)
from modeling_scdiva.metrics.outlier_cells import (
    add_ambient,
    detection_scores,
    make_doublets,
    shuffle_genes,
    thin_cells,
    wrong_labels,
)
from modeling_scdiva.tasks.cells import read_cells
from tokenization_scdiva import synthetic_cells
from tokenization_scdiva.synthetic import synthetic_tokenizer


@pytest.fixture(scope="module")
def training() -> anndata.AnnData:
    return synthetic_cells(n_cells=500, n_genes=120, seed=9)[:300].copy()


@pytest.fixture(scope="module")
def normal() -> anndata.AnnData:
    return synthetic_cells(n_cells=500, n_genes=120, seed=9)[300:].copy()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def cells_of(counts):
    return anndata.AnnData(csr_matrix(np.asarray(counts)))


def sizes_of(adata):
    return np.asarray(adata.X.sum(axis=1)).ravel()


def n_detected(adata):
    return np.asarray((adata.X > 0).sum(axis=1)).ravel()


MAKERS = {
    "shuffled": lambda adata, rng, **where: shuffle_genes(adata, rng, **where),
    "doublets": lambda adata, rng, **where: make_doublets(adata, 30, rng, keep_depth="parent", **where),
    "ambient": lambda adata, rng, **where: add_ambient(adata, 0.3, rng, **where),
    "thin": lambda adata, rng, **where: thin_cells(adata, 0.3, rng, **where),
}


# --- all makers ---


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_made_cells_are_counts_of_the_same_genes_that_a_tokenizer_reads(normal, make):
    given = normal.copy()
    given.layers["counts"], given.X = normal.X, log_normalise(normal.X)
    found = make(given, np.random.default_rng(0))
    assert isinstance(found.X, csr_matrix)
    assert found.X.dtype == np.int64
    assert found.X.data.min() > 0
    assert not found.layers
    pd.testing.assert_frame_equal(found.var, normal.var)
    # Equal state, equal cells; the layer of counts is named or found; what was given is as it was.
    again = make(given, np.random.default_rng(0), layer="counts")
    np.testing.assert_array_equal(found.X.toarray(), again.X.toarray())
    np.testing.assert_array_equal(given.layers["counts"].toarray(), normal.X.toarray())
    assert (make(given, np.random.default_rng(1)).X != found.X).nnz
    tokens = read_cells(found, tokenizer=synthetic_tokenizer(normal), max_genes=120)
    np.testing.assert_array_equal(tokens.n_genes, n_detected(found))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_makers_refuse_what_is_no_cell_and_no_count(normal, rng, make):
    with pytest.raises(TypeError, match="taken from an AnnData, got a path"):
        make("cells.h5ad", rng)
    with pytest.raises(ValueError, match="has no cells"):
        make(normal[:0].copy(), rng)
    with pytest.raises(ValueError, match="does not hold whole counts"):
        make(anndata.AnnData(log_normalise(normal.X)), rng)
    with pytest.raises(ValueError, match="Raw counts are needed"):
        make(cells_of([[1.0, np.inf], [1.0, 1.0]]), rng)
    with pytest.raises(KeyError, match="no layer 'spliced'"):
        make(normal, rng, layer="spliced")


# --- shuffled genes ---


@pytest.mark.parametrize("among", ["all", "detected"])
def test_shuffling_keeps_the_counts_of_a_cell_and_moves_them(normal, rng, among):
    found = shuffle_genes(normal, rng, among=among)
    before, after = normal.X.toarray(), found.X.toarray()
    np.testing.assert_array_equal(np.sort(before, axis=1), np.sort(after, axis=1))
    np.testing.assert_array_equal(n_detected(normal), n_detected(found))
    assert (before != after).any(axis=1).all()
    assert ((before > 0) == (after > 0)).all() == (among == "detected")
    pd.testing.assert_frame_equal(found.obs, normal.obs)


def test_each_gene_is_as_likely_to_get_a_count(rng):
    found = shuffle_genes(cells_of(np.tile([7, 0, 2, 0], (4000, 1))), rng).X.toarray()
    for count in (7, 2):
        shares = (found == count).mean(axis=0)
        np.testing.assert_allclose(shares, 0.25, atol=5 * np.sqrt(0.25 * 0.75 / 4000))
    with pytest.raises(ValueError, match="among must be 'all' or 'detected', got 'expressed'"):
        shuffle_genes(cells_of([[1, 2]]), rng, among="expressed")


# --- doublets ---


def test_doublets_are_the_sum_of_two_cells_of_different_types(normal, rng):
    types = normal.obs["cell_type"]
    found = make_doublets(normal, 50, rng, cell_types=types)
    first, second = normal[found.obs["parent_1"]], normal[found.obs["parent_2"]]
    np.testing.assert_array_equal(found.X.toarray(), first.X.toarray() + second.X.toarray())
    assert (found.obs["cell_type_1"].to_numpy() == first.obs["cell_type"].to_numpy()).all()
    assert (found.obs["cell_type_2"].to_numpy() == second.obs["cell_type"].to_numpy()).all()
    assert (found.obs["cell_type_1"].to_numpy() != found.obs["cell_type_2"].to_numpy()).all()
    assert found.obs_names[0] == "doublet_0"
    two = make_doublets(cells_of([[4, 0, 6], [1, 5, 0]]), 3, rng)
    assert two.X.toarray().tolist() == [[5, 5, 6]] * 3
    assert (two.obs["parent_1"] != two.obs["parent_2"]).all()
    assert list(two.obs) == ["parent_1", "parent_2"]


def test_doublets_at_the_depth_of_cells(normal, rng):
    sizes = pd.Series(sizes_of(normal), normal.obs_names)
    for keep_depth in ("mean", "parent"):
        found = make_doublets(normal, 60, rng, keep_depth=keep_depth)
        first, second = (sizes[found.obs[name]].to_numpy() for name in ("parent_1", "parent_2"))
        wanted = first if keep_depth == "parent" else np.rint((first + second) / 2)
        np.testing.assert_array_equal(sizes_of(found), wanted)
        whole = normal[found.obs["parent_1"]].X + normal[found.obs["parent_2"]].X
        assert (found.X.toarray() <= whole.toarray()).all()


def test_all_pairs_of_different_types_are_equally_likely(rng):
    adata = cells_of(np.eye(4, dtype=int))
    found = make_doublets(adata, 8000, rng, cell_types=["a", "b", "a", "c"])
    pairs = pd.Series(found.obs["parent_1"].astype(str) + found.obs["parent_2"].astype(str)).value_counts()
    wanted = {"01", "03", "12", "23", "13"}
    assert set(pairs.index) == wanted | {pair[::-1] for pair in wanted}
    np.testing.assert_allclose(pairs / 8000, 0.1, atol=5 * np.sqrt(0.09 / 8000))


def test_doublets_that_cannot_be_made(normal, rng):
    with pytest.raises(ValueError, match="n_doublets must be at least 1, got 0"):
        make_doublets(normal, 0, rng)
    with pytest.raises(ValueError, match="keep_depth must be 'mean', 'parent' or None, got True"):
        make_doublets(normal, 5, rng, keep_depth=True)
    with pytest.raises(ValueError, match="needs two different cells, got 1"):
        make_doublets(normal[:1].copy(), 5, rng)
    with pytest.raises(ValueError, match="one type per cell, got 2 types and 3 cells"):
        make_doublets(normal[:3].copy(), 5, rng, cell_types=["a", "b"])
    with pytest.raises(ValueError, match="1 of 3 cell_types are missing"):
        make_doublets(normal[:3].copy(), 5, rng, cell_types=["a", None, "b"])
    with pytest.raises(ValueError, match="cell_types must be of two classes at least, got 1"):
        make_doublets(normal[:3].copy(), 5, rng, cell_types=["a"] * 3)


# --- ambient molecules and depth ---


def test_ambient_molecules_replace_a_share_of_the_cells_own(normal, rng):
    found = add_ambient(normal, 0.3, rng)
    np.testing.assert_array_equal(sizes_of(found), sizes_of(normal))
    n_kept = np.minimum(found.X.toarray(), normal.X.toarray()).sum(axis=1)
    assert (n_kept >= sizes_of(normal) - np.rint(0.3 * sizes_of(normal))).all()
    pd.testing.assert_frame_equal(found.obs, normal.obs)
    # Three quarters of all molecules are of the second gene, so the first cell keeps 600 and gets 100 back.
    two = add_ambient(cells_of([[1000, 0], [0, 3000]]), 0.4, rng).X.toarray()
    assert abs(two[0, 0] - 700) < 5 * np.sqrt(400 * 0.25 * 0.75)
    assert two.sum(axis=1).tolist() == [1000, 3000]
    soup = add_ambient(cells_of([[1000, 0], [0, 3000]]), 1.0, rng).X.toarray()
    assert abs(soup[0, 0] - 250) < 5 * np.sqrt(1000 * 0.25 * 0.75)


def test_an_empty_cell_stays_empty_and_only_empty_cells_are_refused(rng):
    assert add_ambient(cells_of([[4, 2], [0, 0]]), 0.5, rng).X.toarray()[1].tolist() == [0, 0]
    with pytest.raises(ValueError, match="The 2 cells hold no molecule"):
        add_ambient(cells_of([[0, 0], [0, 0]]), 0.5, rng)


def test_thinning_is_never_above_and_keeps_the_expected_share(normal, rng):
    found = thin_cells(normal, 0.25, rng)
    assert (found.X.toarray() <= normal.X.toarray()).all()
    share = found.X.sum() / normal.X.sum()
    assert abs(share - 0.25) < 5 * np.sqrt(0.25 * 0.75 / normal.X.sum())
    np.testing.assert_array_equal(thin_cells(normal, 1.0, rng).X.toarray(), normal.X.toarray())


@pytest.mark.parametrize("share", [0.0, 1.1, np.nan])
def test_shares_out_of_range_are_refused(normal, rng, share):
    with pytest.raises(ValueError, match=r"fraction must lie in \(0, 1\], got"):
        add_ambient(normal, share, rng)
    with pytest.raises(ValueError, match=r"keep_fraction must lie in \(0, 1\], got"):
        thin_cells(normal, share, rng)
    with pytest.raises(ValueError, match=r"fraction must lie in \(0, 1\), got"):
        wrong_labels(["a", "b"], share, rng)


# --- wrong labels ---


def test_wrong_labels_are_of_another_class_as_often_as_it_occurs(rng):
    labels = np.repeat(["a", "b", "c"], [6000, 3000, 1000])
    changed, is_wrong = wrong_labels(labels, 0.4, rng)
    assert is_wrong.sum() == 4000
    np.testing.assert_array_equal(changed != labels, is_wrong)
    of_a = changed[(labels == "a") & is_wrong]  # three of four other cells are of class b
    assert abs((of_a == "b").mean() - 0.75) < 5 * np.sqrt(0.75 * 0.25 / len(of_a))
    assert abs(is_wrong[labels == "c"].mean() - 0.4) < 5 * np.sqrt(0.4 * 0.6 / 1000)
    assert wrong_labels(["a", "b"], 0.5, rng)[0].tolist() in (["a", "a"], ["b", "b"])


def test_labels_that_cannot_be_changed(rng):
    with pytest.raises(ValueError, match=r"fraction=0\.1 of 4 cells is less than one cell"):
        wrong_labels(list("abab"), 0.1, rng)
    with pytest.raises(ValueError, match="1 of 3 labels are missing"):
        wrong_labels(["a", np.nan, "b"], 0.5, rng)
    with pytest.raises(ValueError, match="labels must be of two classes at least, got 1"):
        wrong_labels(["a", "a"], 0.5, rng)


# --- scores ---


def test_detection_scores_by_hand():
    scores = detection_scores([0.0, 1.0], [1.0, 2.0, 3.0])
    assert scores["auroc"] == pytest.approx(5.5 / 6)  # one tie among six pairs
    # 3 and 2 come first, then one abnormal and one normal cell together: (1 + 1 + 3 / 4) / 3.
    assert scores["average_precision"] == pytest.approx(2.75 / 3)
    assert scores["base_rate"] == 0.6
    assert (scores["n_normal"], scores["n_abnormal"]) == (2, 3)
    nothing = detection_scores(np.zeros(5), np.zeros(15))
    assert nothing["auroc"] == nothing["auroc_low"] == nothing["auroc_high"] == 0.5
    assert nothing["average_precision"] == nothing["base_rate"] == 0.75


def test_scores_equal_scikit_learn_and_the_interval_scipy(rng):
    normal, abnormal = rng.normal(size=150).round(1), rng.normal(0.8, size=90).round(1)
    found = detection_scores(normal, abnormal, seed=1)
    truth, pooled = np.arange(240) >= 150, np.concatenate([normal, abnormal])
    assert found["auroc"] == roc_auc_score(truth, pooled)
    assert found["average_precision"] == average_precision_score(truth, pooled)

    def auroc(first, second):
        return stats.mannwhitneyu(second, first).statistic / (len(first) * len(second))

    interval = stats.bootstrap((normal, abnormal), auroc, method="percentile", n_resamples=2000, rng=rng)
    np.testing.assert_allclose(
        [found["auroc_low"], found["auroc_high"]], interval.confidence_interval, atol=0.01
    )
    assert found == detection_scores(normal, abnormal, seed=1)
    assert found["auroc_low"] != detection_scores(normal, abnormal, seed=2)["auroc_low"]


def test_pairs_that_have_much_in_common_have_a_narrower_interval(rng):
    normal = rng.normal(size=100)
    abnormal = normal + 0.5
    apart, paired = (detection_scores(normal, abnormal, is_paired=is_paired) for is_paired in (False, True))
    assert apart["auroc"] == paired["auroc"]
    assert paired["auroc_high"] - paired["auroc_low"] < 0.5 * (apart["auroc_high"] - apart["auroc_low"])


def test_scores_that_cannot_be_compared():
    with pytest.raises(ValueError, match=r"normal must hold one score .* got shape \(0,\)"):
        detection_scores([], [1.0])
    with pytest.raises(ValueError, match=r"abnormal must hold one score .* got shape \(1, 2\)"):
        detection_scores([1.0], [[1.0, 2.0]])
    with pytest.raises(ValueError, match="1 of 2 abnormal scores are not finite"):
        detection_scores([1.0], [1.0, np.nan])
    with pytest.raises(ValueError, match="of the same cells in the same order, got 1 and 2"):
        detection_scores([1.0], [1.0, 2.0], is_paired=True)
    with pytest.raises(ValueError, match="n_resamples must be at least 1, got 0"):
        detection_scores([1.0], [2.0], n_resamples=0)


# --- detectors ---


def test_depth_distance_by_scipy_and_by_sides(training, normal):
    depth, reference = (depth_features(cells.X).astype(float) for cells in (normal, training))
    spread = np.cov(reference, rowvar=False) + 1e-4 * np.eye(2)
    offsets = depth - reference.mean(axis=0)
    wanted = cdist(depth, reference.mean(axis=0)[None], "mahalanobis", VI=np.linalg.inv(spread))[:, 0] ** 2
    np.testing.assert_allclose(DepthDetector(training.X).score_cells(normal.X), wanted, rtol=1e-6)
    low, high = (DepthDetector(training.X, side=side).score_cells(normal.X) for side in ("low", "high"))
    np.testing.assert_allclose(high, (offsets / np.sqrt(np.diag(spread))).mean(axis=1), rtol=1e-6)
    np.testing.assert_array_equal(low, -high)


def test_cells_of_equal_depth_tell_other_depths():
    scores = DepthDetector([[2, 2, 2], [1, 4, 1], [3, 2, 1]]).score_cells([[2, 3, 1], [1, 1, 1]])
    # All have six molecules of three genes: log(7 / 4) in hundredths, squared.
    np.testing.assert_allclose(scores, [0.0, (np.log(7 / 4) / 0.01) ** 2], rtol=1e-6, atol=1e-6)


def test_residual_and_subspace_by_dense_algebra(training, normal):
    expression, scored = (log_normalise(cells.X).toarray().astype(float) for cells in (training, normal))
    mean = expression.mean(axis=0)
    axes = np.linalg.svd(expression - mean, full_matrices=False)[2][:5]
    left_over = [((cells - mean) - (cells - mean) @ axes.T @ axes) ** 2 for cells in (expression, scored)]
    variances = ((expression - mean) @ axes.T).var(axis=0, ddof=1)
    noise = left_over[0].sum(axis=1).mean() / (120 - 5)
    wanted = {
        "residual": left_over[1].sum(axis=1),
        "subspace": (((scored - mean) @ axes.T) ** 2 / variances).sum(axis=1),
    }
    for part, scores in wanted.items():
        found = PCAResidualDetector(training.X, part=part, n_components=5).score_cells(normal.X)
        np.testing.assert_allclose(found, scores, rtol=1e-5)
    # Second implementation of both: the density of probabilistic PCA.
    covariance = (axes.T * variances) @ axes + noise * (np.eye(120) - axes.T @ axes)
    law = stats.multivariate_normal(mean, covariance)
    both = PCAResidualDetector(training.X, part="both", n_components=5).score_cells(normal.X)
    np.testing.assert_allclose(both, -2 * (law.logpdf(scored) - law.logpdf(mean)), rtol=1e-5)


def test_distance_to_neighbours_by_all_distances(training, normal):
    detector = KNNDistanceDetector(training.X, n_neighbors=4, n_components=6)
    places = [detector.pca.transform(log_normalise(cells.X).astype(float)) for cells in (normal, training)]
    wanted = np.sort(cdist(*places), axis=1)[:, :4].mean(axis=1)
    np.testing.assert_allclose(detector.score_cells(normal.X), wanted)
    itself = KNNDistanceDetector(training.X, n_neighbors=1).score_cells(training.X)
    np.testing.assert_allclose(itself, 0.0, atol=1e-5)


def test_detectors_find_what_they_are_made_for(training, normal, rng):
    detectors = {
        "depth": DepthDetector(training.X),
        "shallow": DepthDetector(training.X, side="low"),
        "residual": PCAResidualDetector(training.X, n_components=10),
        "neighbours": KNNDistanceDetector(training.X, n_components=10),
    }
    made = {"thin": thin_cells(normal, 0.2, rng), "shuffled": shuffle_genes(normal, rng)}
    found = {
        (cells, name): detection_scores(
            detector.score_cells(normal.X), detector.score_cells(adata.X), n_resamples=10
        )["auroc"]
        for cells, adata in made.items()
        for name, detector in detectors.items()
    }
    assert all(found["thin", name] > 0.9 for name in detectors)
    assert all(found["shuffled", name] > 0.9 for name in ("residual", "neighbours"))
    assert found["shuffled", "depth"] == found["shuffled", "shallow"] == 0.5


def test_scrublet_finds_doublets_and_leaves_the_global_generator(training, normal, rng):
    pytest.importorskip("scanpy")
    doublets = make_doublets(normal, 40, rng, cell_types=normal.obs["cell_type"], keep_depth="parent")
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    scores = scrublet_scores(training.X, vstack([normal.X, doublets.X]), seed=1)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    assert detection_scores(scores[:200], scores[200:], n_resamples=10)["auroc"] > 0.75
    assert ((scores > 0) & (scores < 1)).all()
    poor = csr_matrix(([5.0], ([0], [0])), shape=(1, 120))
    with pytest.raises(ValueError, match="1 of 201 scored cells have fewer than 3 genes for Scrublet"):
        scrublet_scores(training.X, vstack([normal.X, poor]))


def test_detectors_refuse_what_they_cannot_use(training, normal):
    for detector in (DepthDetector, PCAResidualDetector, KNNDistanceDetector):
        with pytest.raises(ValueError, match="Raw counts are needed"):
            detector(log_normalise(training.X))
        with pytest.raises(ValueError, match="3 training cells are needed at least, got 2"):
            detector(training.X[:2])
        fitted = detector(training.X)
        with pytest.raises(ValueError, match="have 120 genes and the scored ones 100"):
            fitted.score_cells(normal.X[:, :100])
        with pytest.raises(ValueError, match="There is no cell to score"):
            fitted.score_cells(normal.X[:0])
    with pytest.raises(ValueError, match="side must be 'both', 'low' or 'high', got 'up'"):
        DepthDetector(training.X, side="up")
    with pytest.raises(ValueError, match="part must be 'residual', 'subspace' or 'both', got 'all'"):
        PCAResidualDetector(training.X, part="all")
    with pytest.raises(ValueError, match="n_components must be at least 1, got 0"):
        PCAResidualDetector(training.X, n_components=0)
    with pytest.raises(ValueError, match=r"two cells and two genes at least, got \(300, 1\)"):
        KNNDistanceDetector(training.X[:, :1])
    with pytest.raises(ValueError, match="All 3 training cells have one profile"):
        KNNDistanceDetector(training.X[[0, 0, 0]], n_neighbors=1)
    for n_neighbors in (0, 301):
        with pytest.raises(ValueError, match=f"1 to the 300 training cells, got {n_neighbors}"):
            KNNDistanceDetector(training.X, n_neighbors=n_neighbors)


@pytest.mark.parametrize("part", ["subspace", "both"])
def test_a_part_without_a_unit_is_refused(training, part):
    repeated = training.X[[0, 1, 2] * 3]
    with pytest.raises(ValueError, match=f"8 components describe the 9 .* part='{part}' has no unit"):
        PCAResidualDetector(repeated, part=part)


# --- labels of neighbours ---


def test_disagreement_of_neighbours_by_hand():
    places = np.array([[0.0], [1.0], [2.1], [10.0], [11.0], [12.1]])
    labels = ["a", "a", "b", "b", "b", "b"]
    wanted = [0.5, 0.5, 1.0, 0.0, 0.0, 0.0]
    assert knn_label_disagreement(places, labels, n_neighbors=2).tolist() == wanted
    assert knn_label_disagreement(csr_matrix(places), labels, n_neighbors=2).tolist() == wanted
    # A cell is no neighbour of itself, also where another lies at the same place.
    assert knn_label_disagreement(np.zeros((2, 3)), ["a", "b"], n_neighbors=1).tolist() == [1.0, 1.0]


def test_neighbours_find_wrong_labels(training, rng):
    labels, is_wrong = wrong_labels(training.obs["cell_type"], 0.1, rng)
    components = pca_features(log_normalise(training.X), n_components=10)
    share = knn_label_disagreement(components, labels)
    assert detection_scores(share[~is_wrong], share[is_wrong], n_resamples=10)["auroc"] > 0.95


def test_labels_and_features_that_do_not_fit():
    places, labels = np.zeros((3, 2)), ["a", "b", "a"]
    with pytest.raises(ValueError, match=r"labels \(N,\), got \(3, 2\) and \(2,\)"):
        knn_label_disagreement(places, labels[:2])
    with pytest.raises(ValueError, match="features must be finite"):
        knn_label_disagreement(places + np.nan, labels)
    with pytest.raises(ValueError, match="1 of 3 labels are missing"):
        knn_label_disagreement(places, ["a", np.nan, "b"])
    for n_neighbors in (0, 3):
        with pytest.raises(ValueError, match=f"1 to the 2 other cells, got {n_neighbors}"):
            knn_label_disagreement(places, labels, n_neighbors=n_neighbors)
