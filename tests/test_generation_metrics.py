"""Generation: scores by hand and by second implementations, what they tell apart, and the baselines.

Needs: both packages; scvi-tools for two tests, skipped otherwise; no files, no GPU.
Run: python -m pytest tests/test_generation_metrics.py
"""

import random

import anndata
import numpy as np
import pytest
import torch
from scipy.sparse import coo_matrix, csr_matrix
from scipy.stats import wasserstein_distance
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import NearestNeighbors

from modeling_scdiva.metrics import generation, scvi_baselines
from modeling_scdiva.metrics.annotation import log_normalise
from modeling_scdiva.metrics.generation import (
    correlation_error,
    detected_genes_distance,
    discriminator_auc,
    fit_projection,
    gene_profile_scores,
    generation_scores,
    library_size_distance,
    nearest_neighbor_accuracy,
    rare_gene_ratio,
    variance_ratio,
)
from modeling_scdiva.metrics.generation_baselines import independent_marginals, scvi_draws, type_marginals
from modeling_scdiva.metrics.perturbation import energy_distance, maximum_mean_discrepancy
from modeling_scdiva.metrics.scvi_baselines import has_scvi
from tokenization_scdiva import synthetic_cells

needs_scvi = pytest.mark.skipif(not has_scvi(), reason="scvi-tools is not installed: scdiva[eval-full]")
SETTINGS = {"n_components": 10, "n_top_genes": 60, "seed": 3}

# Four cells, three genes; two cells show gene 0, all of them gene 1, one of them gene 2.
REAL = np.array([[1.0, 2.0, 0.0], [0.0, 1.5, 0.0], [3.0, 1.0, 0.5], [0.0, 0.5, 0.0]])


@pytest.fixture(scope="module")
def adata() -> anndata.AnnData:
    return synthetic_cells(n_cells=640, n_genes=120, n_cell_types=4, seed=4)


@pytest.fixture(scope="module")
def counts(adata):
    """Raw counts of the reference, of held-out cells, and of real cells that pass for generated ones."""
    return {"reference": adata.X[:320], "held_out": adata.X[320:480], "real": adata.X[480:]}


@pytest.fixture(scope="module")
def cells(counts):
    return {name: log_normalise(matrix) for name, matrix in counts.items()}


@pytest.fixture(scope="module")
def floor(cells, counts):
    """What real cells score."""
    return generation_scores(
        cells["real"],
        cells["held_out"],
        cells["reference"],
        counts=(counts["real"], counts["held_out"]),
        **SETTINGS,
    )


# --- scores together ---


def test_cells_of_one_law_score_near_the_best(floor):
    assert abs(floor["mmd"]) < 0.005
    assert abs(floor["energy_distance"]) < 0.1
    for name in ("nn_accuracy", "auc_logistic", "auc_forest", "auc_forest_genes"):
        assert floor[name] == pytest.approx(0.5, abs=0.1), name
    assert floor["nn_accuracy"] == pytest.approx(
        (floor["nn_accuracy_generated"] + floor["nn_accuracy_held_out"]) / 2
    )
    assert floor["detection_pearson"] > 0.98
    assert floor["mean_pearson"] > 0.98
    assert floor["detection_rmse"] < 0.06
    assert floor["mean_rmse"] < 0.3
    assert floor["detected_genes_distance"] < 4
    assert floor["library_size_distance"] < 0.1
    assert abs(floor["zero_fraction_difference"]) < 0.03
    # The noise of correlations of 160 cells on each side.
    assert floor["correlation_error"] == pytest.approx(np.sqrt(2 / 160), rel=0.15)
    assert floor["variance_ratio"] == pytest.approx(1.0, abs=0.1)
    assert floor["n_generated"] == floor["n_held_out"] == floor["n_compared"] == 160


def test_independent_genes_keep_the_marginals_alone(cells, counts, floor):
    drawn = independent_marginals(counts["reference"], 160, np.random.default_rng(0))
    found = generation_scores(
        log_normalise(drawn),
        cells["held_out"],
        cells["reference"],
        counts=(drawn, counts["held_out"]),
        **SETTINGS,
    )
    assert found["detection_pearson"] > 0.98
    assert abs(found["zero_fraction_difference"]) < 0.03
    for name in ("mmd", "energy_distance"):
        assert found[name] > 10 * max(floor[name], 0.005), name
    for name in ("nn_accuracy", "auc_forest", "auc_forest_genes"):
        assert found[name] > floor[name] + 0.15, name
    assert found["correlation_error"] > 1.5 * floor["correlation_error"]
    # All cells have nearly the same depth.
    assert found["library_size_distance"] > 3 * floor["library_size_distance"]
    assert found["detected_genes_distance"] > 3 * floor["detected_genes_distance"]


def test_cells_with_shuffled_gene_names_are_told_apart(cells, floor):
    shuffled = cells["real"][:, np.random.default_rng(1).permutation(120)]
    found = generation_scores(shuffled, cells["held_out"], cells["reference"], **SETTINGS)
    assert "library_size_distance" not in found
    for name in ("auc_logistic", "auc_forest", "auc_forest_genes", "nn_accuracy"):
        assert found[name] > 0.93, name
    for name in ("mmd", "energy_distance", "detection_rmse", "mean_rmse", "correlation_error"):
        assert found[name] > floor[name] + 0.05, name
    for name in ("detection_pearson", "mean_pearson"):
        assert found[name] < 0.5, name
    # What no shuffling of genes changes.
    for name in ("zero_fraction_difference", "detected_genes_distance"):
        assert found[name] == pytest.approx(floor[name]), name


def test_scores_repeat_and_do_not_depend_on_storage_or_gene_order(cells, floor):
    entries = cells["real"].tocoo()
    silent = np.argwhere(cells["real"].toarray() == 0)[:50].T
    places = np.hstack([np.stack([entries.row, entries.col]), silent])
    given = coo_matrix((np.append(entries.data, np.zeros(50)), places), shape=entries.shape).tocsr()
    order = np.random.default_rng(2).permutation(120)
    found = generation_scores(given, cells["held_out"].toarray(), cells["reference"], **SETTINGS)
    assert given.nnz == entries.nnz + 50  # stored zeros are no detected genes, and stay with the caller
    moved = generation_scores(
        *(cells[name][:, order] for name in ("real", "held_out", "reference")), **SETTINGS
    )
    for name, value in found.items():
        assert value == pytest.approx(floor[name], abs=1e-9, nan_ok=True), name
        if not name.startswith("auc"):  # logistic regression stops, forests draw genes by their place
            assert moved[name] == pytest.approx(floor[name], abs=1e-6, nan_ok=True), name


def test_generated_cells_without_variation_are_scored_badly(cells):
    for same in (np.tile(cells["held_out"].mean(axis=0), (30, 1)), np.zeros((30, 120))):
        found = generation_scores(np.asarray(same), cells["held_out"], cells["reference"], **SETTINGS)
        assert found["nn_accuracy_generated"] == 1.0
        assert found["auc_forest"] > 0.95
        assert found["variance_ratio"] == pytest.approx(0.0, abs=1e-12)
        assert found["energy_distance"] > 1.0
        assert found["n_compared"] == 30
    assert found["mean_pearson"] == found["detection_pearson"] == 0.0
    assert found["zero_fraction_difference"] > 0.2


def test_clouds_hold_equally_many_cells_up_to_the_limit(cells, monkeypatch):
    monkeypatch.setattr(generation, "MAX_COMPARED_CELLS", 25)
    found, again = (
        generation_scores(cells["real"], cells["held_out"], cells["reference"], **SETTINGS) for _ in range(2)
    )
    assert found["n_compared"] == 25
    np.testing.assert_equal(found, again)


# --- scores one by one ---


def test_the_projection_is_that_of_the_reference(cells):
    reference, others = cells["reference"].toarray().astype(np.float64), cells["real"]
    projection = fit_projection(cells["reference"], n_components=5, seed=1)
    _, sizes, axes = np.linalg.svd(reference - reference.mean(axis=0), full_matrices=False)
    expected = (others.toarray() - reference.mean(axis=0)) @ axes[:5].T
    np.testing.assert_allclose(np.abs(projection.transform(others)), np.abs(expected), atol=1e-4)
    np.testing.assert_allclose(projection.singular_values_, sizes[:5], rtol=1e-6)
    dense = fit_projection(reference, n_components=5, seed=1).transform(others)
    np.testing.assert_allclose(dense, projection.transform(others), atol=1e-6)


def test_the_cloud_distances_are_those_of_the_perturbations(cells, floor):
    projection = fit_projection(cells["reference"], n_components=10, seed=3)
    clouds = [projection.transform(cells[name].astype(np.float64)) for name in ("real", "held_out")]
    assert floor["mmd"] == pytest.approx(maximum_mean_discrepancy(*clouds), abs=1e-6)
    assert floor["energy_distance"] == pytest.approx(energy_distance(*clouds), abs=1e-6)


def test_nearest_neighbours_by_hand():
    # Generated 0 and 1 are each other's nearest; 9 is next to the real 8, and they to each other.
    found = nearest_neighbor_accuracy(np.array([[0.0], [1.0], [9.0]]), np.array([[8.0], [20.0], [21.0]]))
    assert found["nn_accuracy_generated"] == pytest.approx(2 / 3)
    assert found["nn_accuracy_held_out"] == pytest.approx(2 / 3)
    assert found["nn_accuracy"] == pytest.approx(2 / 3)
    # Ties share the vote: every cell has one of its own side and two of the other at distance 0.
    assert nearest_neighbor_accuracy(np.ones((2, 1)), np.ones((2, 1)))["nn_accuracy"] == pytest.approx(1 / 3)
    copies = np.array([[0.0], [5.0], [11.0]])
    assert nearest_neighbor_accuracy(copies, copies)["nn_accuracy"] == 0.0
    assert nearest_neighbor_accuracy(copies, copies + 100.0)["nn_accuracy"] == 1.0


def test_nearest_neighbours_equal_those_of_scikit_learn(monkeypatch):
    monkeypatch.setattr(generation, "ROWS_AT_ONCE", 7)
    rng = np.random.default_rng(5)
    first, second = rng.normal(size=(2, 40, 3))
    first = first * 0.5
    indices = NearestNeighbors(n_neighbors=1).fit(np.vstack([first, second])).kneighbors()[1].ravel()
    is_own = (indices < 40) == (np.arange(80) < 40)
    found = nearest_neighbor_accuracy(first, second)
    assert found["nn_accuracy"] == pytest.approx(is_own.mean())
    assert found["nn_accuracy_generated"] == pytest.approx(is_own[:40].mean())
    assert found["nn_accuracy_generated"] > found["nn_accuracy_held_out"]  # they crowd together


def test_gene_profiles_by_hand():
    generated = np.array([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    found = gene_profile_scores(generated, REAL)
    # Detection rates 0.5, 0.5, 0 against 0.5, 1, 0.25; means 0.5, 1, 0 against 1, 1.25, 0.125.
    assert found["detection_rmse"] == pytest.approx(np.sqrt((0.5**2 + 0.25**2) / 3))
    assert found["mean_rmse"] == pytest.approx(np.sqrt((0.5**2 + 0.25**2 + 0.125**2) / 3))
    assert found["detection_pearson"] == pytest.approx(np.corrcoef([0.5, 0.5, 0], [0.5, 1, 0.25])[0, 1])
    assert found["mean_pearson"] == pytest.approx(np.corrcoef([0.5, 1, 0], [1, 1.25, 0.125])[0, 1])
    assert found["zero_fraction_difference"] == pytest.approx(4 / 6 - 5 / 12)
    same = gene_profile_scores(csr_matrix(REAL), REAL)
    assert same["mean_rmse"] == same["detection_rmse"] == same["zero_fraction_difference"] == 0.0


def test_depth_by_hand_and_by_quantiles():
    # 0 and 2 detected genes against 1, 1, 2 and 3: by quantiles 0, 0, 2, 2 against 1, 1, 2, 3.
    generated = np.array([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    assert detected_genes_distance(generated, REAL) == pytest.approx((1 + 1 + 0 + 1) / 4)
    one, other = np.array([[9, 0, 0], [49, 50, 0]]), np.array([[0, 0, 0], [0, 1, 98]])
    assert library_size_distance(one, other) == pytest.approx(np.log(10.0) / 2)
    rng = np.random.default_rng(0)
    first, second = rng.poisson(5.0, size=(30, 8)), rng.poisson(7.0, size=(50, 8))
    sizes = [np.log1p(matrix.sum(axis=1)) for matrix in (first, second)]
    assert library_size_distance(first, csr_matrix(second)) == pytest.approx(wasserstein_distance(*sizes))
    assert library_size_distance(first * 2, first) == pytest.approx(np.log(2.0), abs=0.02)


def test_correlation_error_equals_numpys():
    rng = np.random.default_rng(7)
    generated, held_out, reference = rng.random(size=(3, 40, 6)) * [1, 5, 2, 4, 3, 0]
    genes = np.argsort(-reference.var(axis=0))[:4]
    expected = np.corrcoef(generated[:, genes].T) - np.corrcoef(held_out[:, genes].T)
    expected = np.sqrt(np.mean(expected[~np.eye(4, dtype=bool)] ** 2))
    found = correlation_error(generated, held_out, reference=reference, n_top_genes=4)
    assert found == pytest.approx(expected)
    # A gene without variation is not chosen by the reference, and correlates with nothing elsewhere.
    flat = np.tile([0.3, 0.1, 0.7, 0.2, 0.9, 0.0], (7, 1))  # their means are off by rounding
    real = np.corrcoef(held_out[:, :5].T)[np.triu_indices(5, k=1)]
    found = correlation_error(flat, held_out, reference=reference, n_top_genes=99)
    assert found == pytest.approx(np.sqrt(np.mean(real**2)))
    assert correlation_error(held_out, held_out, reference=reference) == 0.0


def test_the_discriminator_equals_a_second_cross_validation():
    rng = np.random.default_rng(8)
    scales = [1.0, 0.001, 1.0, 0.01]  # the penalty would hold small features down, were they not scaled
    first, second = rng.normal(size=(30, 4)) * scales, (rng.normal(size=(45, 4)) + 0.6) * scales
    cells, is_generated = np.vstack([first, second]), np.repeat([1, 0], [30, 45])
    areas = []
    for train, test in StratifiedKFold(3, shuffle=True, random_state=6).split(cells, is_generated):
        centre, scale = cells[train].mean(axis=0), cells[train].std(axis=0)
        fitted = LogisticRegression().fit((cells[train] - centre) / scale, is_generated[train])
        areas.append(
            roc_auc_score(is_generated[test], fitted.decision_function((cells[test] - centre) / scale))
        )
    found = discriminator_auc(first, second, classifier="logistic", n_folds=3, seed=6)
    assert found == pytest.approx(np.mean(areas))
    # Only the forest sees a cloud within a cloud.
    inner, outer = rng.normal(size=(100, 3)) * 0.2, rng.normal(size=(100, 3))
    assert discriminator_auc(inner, outer, classifier="forest") > 0.9
    assert discriminator_auc(inner, outer, classifier="logistic") < 0.65


def test_rare_genes_by_hand():
    reference = np.zeros((200, 4))
    reference[:1, 0] = reference[:2, 1] = reference[:150, 2] = 1.5  # 0.5 %, 1 %, 75 %, never
    held_out, generated = np.zeros((10, 4)), np.zeros((20, 4))
    held_out[:2, 0] = held_out[:, 1:3] = 0.7
    generated[:3, 0] = generated[:1, 3] = 0.7
    assert rare_gene_ratio(generated, held_out, reference=reference) == pytest.approx((0.15 + 0.05) / 0.2)
    wider = rare_gene_ratio(generated, held_out, reference=reference, rare_rate=0.5)
    assert wider == pytest.approx((0.15 + 0.05) / 1.2)
    assert np.isnan(rare_gene_ratio(held_out, generated[:, ::-1] * [0, 1, 1, 0], reference=reference))


def test_variance_ratio_by_hand():
    # Gene 2 shows in a quarter of the reference cells; genes 0 and 1 are expressed.
    generated = REAL * [2.0, 0.5, 7.0]
    settings = {"reference": REAL, "rare_rate": 0.3}
    assert variance_ratio(generated, REAL, **settings) == pytest.approx(np.median([4.0, 0.25]))
    # As many degrees of freedom as cells less one.
    ratio = np.var(REAL[:3, :2], axis=0, ddof=1) / np.var(REAL[:, :2], axis=0, ddof=1)
    assert variance_ratio(csr_matrix(REAL[:3]), REAL, **settings) == pytest.approx(np.median(ratio))


WRONG = np.where(REAL == 2.0, np.nan, REAL)
FLAT = np.ones((4, 3)) * 0.5
WIDE = np.hstack([REAL, REAL])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: generation_scores(WIDE, REAL, REAL), "'generated': 6, 'held_out': 3, 'reference': 3}"),
        (lambda: generation_scores(REAL[:1], REAL, REAL), r"generated needs 2 cells and 3 .*got .*\(1, 3\)"),
        (lambda: generation_scores(REAL, REAL[:, :2], REAL), r"held_out needs 2 cells and 3 genes"),
        (lambda: generation_scores(WRONG, REAL, REAL), "1 values of generated are NaN, infinite or negative"),
        (lambda: generation_scores(REAL, -REAL, REAL), "7 values of held_out are NaN, infinite or negative"),
        (lambda: generation_scores(REAL.round() * 4, REAL, REAL), "generated holds whole numbers only"),
        (lambda: generation_scores(REAL, FLAT, REAL), "All 4 cells of held_out are the same"),
        (lambda: generation_scores(REAL, REAL, FLAT), "All 4 cells of reference are the same"),
        (lambda: generation_scores(REAL, REAL, REAL), r"n_components=50 must be 1 .*\(4, 3\)"),
        (lambda: generation_scores(REAL, REAL, REAL, n_components=2), "n_folds=5 .* 4 generated"),
        (
            lambda: generation_scores(REAL, REAL, REAL, counts=(np.ones((4, 9)), np.ones((3, 9)))),
            r"counts must be those of \(4, 4\) .*, got \(4, 3\)",
        ),
        (lambda: library_size_distance(REAL, REAL), "Raw counts are needed"),
        (lambda: fit_projection(REAL, n_components=3), r"n_components=3 must be 1 at least and below"),
        (lambda: fit_projection(REAL, n_components=0), "n_components=0"),
        (lambda: fit_projection(np.eye(4) * 3), "reference holds whole numbers only"),
        (lambda: nearest_neighbor_accuracy(REAL, REAL[:3]), "got 4 and 3: chance is not one half"),
        (lambda: nearest_neighbor_accuracy(REAL, WIDE), r"got \(4, 3\), \(4, 6\)"),
        (lambda: discriminator_auc(REAL, REAL[:1]), r"2 cells or more are needed, got \(4, 3\), \(1, 3\)"),
        (lambda: discriminator_auc(REAL, WRONG), "not finite: 0 generated, 1 held-out"),
        (lambda: discriminator_auc(REAL, REAL, classifier="tree"), "classifier must be .* got 'tree'"),
        (lambda: discriminator_auc(REAL, REAL, n_folds=1), "n_folds=1 must be 2 at least"),
        (lambda: correlation_error(REAL, REAL, reference=REAL, n_top_genes=1), "n_top_genes=1 of 3 genes"),
        (lambda: correlation_error(REAL, REAL, reference=FLAT), "n_top_genes=500 of 0 genes that vary"),
        (lambda: rare_gene_ratio(REAL, REAL, reference=REAL, rare_rate=0.0), r"in \(0, 1\), got 0.0"),
        (lambda: variance_ratio(REAL, REAL, reference=REAL, rare_rate=1.0), r"in \(0, 1\), got 1.0"),
        (lambda: variance_ratio(REAL, FLAT, reference=REAL), "None of 3 genes shows in 0.01"),
    ],
)
def test_impossible_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- baselines ---


def test_marginals_are_those_of_the_training_cells_and_independent(adata):
    counts = adata.X[:320]
    drawn = independent_marginals(counts, 3_000, np.random.default_rng(0))
    assert drawn.shape == (3_000, 120)
    assert drawn.dtype == np.float32
    dense, training = drawn.toarray(), counts.toarray()
    for gene in range(0, 120, 7):
        assert set(dense[:, gene]) <= set(training[:, gene])
        shares = [np.mean(matrix[:, gene] > 0) for matrix in (dense, training)]
        assert abs(shares[0] - shares[1]) < 5 * np.sqrt(0.25 / 3_000)
        # Second implementation: each entry is a training cell's, drawn anew.
        assert wasserstein_distance(dense[:, gene], training[:, gene]) < 0.2 * training[:, gene].std() + 0.01
    assert np.abs(np.corrcoef(dense[:, :40].T) - np.eye(40)).max() < 0.1
    assert np.abs(np.corrcoef(training[:, :40].T) - np.eye(40)).max() > 0.3
    again = independent_marginals(adata[:320], 3_000, np.random.default_rng(0))
    np.testing.assert_array_equal(dense, again.toarray())


def test_one_training_cell_gives_copies():
    drawn = independent_marginals(np.array([[0, 3, 1]]), 4, np.random.default_rng(0))
    np.testing.assert_array_equal(drawn.toarray(), np.tile([0, 3, 1], (4, 1)))


def test_marginals_of_types_keep_what_differs_between_types():
    counts = np.repeat([[5, 0, 1], [0, 2, 1]], [300, 100], axis=0)
    counts[:150, 2] = 0  # within the first type gene 2 is there in half of the cells
    types = np.repeat(["T", "B"], [300, 100])
    drawn, drawn_types = type_marginals(csr_matrix(counts), types, 2_000, np.random.default_rng(1))
    is_first = drawn_types == "T"
    assert is_first.mean() == pytest.approx(0.75, abs=0.05)
    assert 0 < is_first[:50].sum() < 50  # in the order in which they are drawn
    np.testing.assert_array_equal(drawn[:, 0].toarray().ravel(), np.where(is_first, 5, 0))
    np.testing.assert_array_equal(drawn[:, 1].toarray().ravel(), np.where(is_first, 0, 2))
    assert drawn[is_first, 2].mean() == pytest.approx(0.5, abs=0.07)
    again, _ = type_marginals(anndata.AnnData(counts), types, 2_000, np.random.default_rng(1))
    np.testing.assert_array_equal(drawn.toarray(), again.toarray())


def test_marginals_of_types_beat_those_of_all_cells(adata, cells):
    training, types = adata.X[:320], adata.obs["cell_type"].to_numpy()[:320]
    alone = independent_marginals(training, 160, np.random.default_rng(0))
    of_types, _ = type_marginals(training, types, 160, np.random.default_rng(0))
    projection = fit_projection(cells["reference"], n_components=10)
    held_out = projection.transform(cells["held_out"])
    distances = [
        energy_distance(projection.transform(log_normalise(drawn)), held_out) for drawn in (of_types, alone)
    ]
    assert distances[0] < 0.5 * distances[1]


@needs_scvi
def test_scvi_draws_whole_counts_of_the_right_depth_and_repeats(counts, cells):
    python_state, numpy_state = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    torch_state = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # for the network beside it
        drawn = scvi_draws(counts["reference"], 300, max_epochs=40, seed=1)
    assert random.getstate() == python_state
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert drawn.shape == (300, 120)
    assert drawn.dtype == np.float32
    assert (drawn.data == np.rint(drawn.data)).all()
    assert drawn.data.min() > 0
    assert library_size_distance(drawn, counts["held_out"]) < 0.3
    assert gene_profile_scores(log_normalise(drawn), cells["held_out"])["mean_pearson"] > 0.9
    alone = independent_marginals(counts["reference"], 300, np.random.default_rng(0))
    projection = fit_projection(cells["reference"], n_components=10)
    held_out = projection.transform(cells["held_out"])
    distances = [
        energy_distance(projection.transform(log_normalise(matrix)), held_out) for matrix in (drawn, alone)
    ]
    assert distances[0] < distances[1]


@needs_scvi
def test_scvi_draws_repeat_and_the_prior_is_another_law(counts):
    few = counts["reference"][:64]
    one = scvi_draws(few, 20, max_epochs=2, seed=5)
    torch.rand(3)  # whatever the caller draws
    again = scvi_draws(few, 20, max_epochs=2, seed=5)
    prior = scvi_draws(few, 20, latent="prior", max_epochs=2, seed=5)
    np.testing.assert_array_equal(one.toarray(), again.toarray())
    assert (prior.toarray() != one.toarray()).any()
    assert prior.shape == (20, 120)


def test_without_scvi_one_reads_what_to_install(monkeypatch):
    monkeypatch.setattr(scvi_baselines, "has_scvi", lambda: False)
    with pytest.raises(ImportError, match=r'pip install "scdiva\[eval-full\]"'):
        scvi_draws(np.eye(20), 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda rng: independent_marginals(REAL, 3, rng), "Raw counts are needed"),
        (lambda rng: independent_marginals(np.eye(3), 0, rng), "n_cells must be 1 at least, got 0"),
        (lambda rng: independent_marginals(np.ones((0, 3)), 2, rng), r"one of each at least, got \(0, 3\)"),
        (lambda rng: type_marginals(np.eye(3), ["T", "B"], 2, rng), r"the 3 cells, got shape \(2,\)"),
        (lambda rng: type_marginals(np.eye(3), ["T", None, "B"], 2, rng), "with 1 missing"),
    ],
)
def test_impossible_training_cells_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.random.default_rng(0))


@needs_scvi
@pytest.mark.parametrize(
    ("counts", "latent", "message"),
    [
        (np.eye(20), "mean", "latent must be 'posterior' or 'prior', got 'mean'"),
        (np.eye(9), "prior", "16 training cells at least .* got 9 with 0 empty"),
        (np.eye(20) * (np.arange(20) > 1), "prior", "got 20 with 2 empty"),
    ],
)
def test_what_scvi_cannot_learn_from_is_refused(counts, latent, message):
    with pytest.raises(ValueError, match=message):
        scvi_draws(counts, 5, latent=latent)
