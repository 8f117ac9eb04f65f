"""Protocols of generation: closeness to real cells, conditional generation, completion.

Needs: both packages; the examples extra (matplotlib, umap-learn) for the figure, the eval-full extra for
scVI, skipped without; no GPU.
Run: python -m pytest tests/test_generation_evaluation.py
"""

import importlib.util
import json
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_matrix
from scipy.spatial.distance import pdist
from sklearn.decomposition import PCA

from modeling_scdiva.evaluation import completion, format_result, guidance, write_result
from modeling_scdiva.evaluation.completion import completion_scores, evaluate_completion, nearest_means
from modeling_scdiva.evaluation.generation import (
    FLOOR,
    compare_generated,
    draw_baselines,
    evaluate_generation,
    generated_profile,
    joint_umap,
    kept_profile,
)
from modeling_scdiva.evaluation.guidance import evaluate_guidance, frequent_types
from modeling_scdiva.metrics.scvi_baselines import has_scvi
from modeling_scdiva.tasks import generate_cells
from tokenization_scdiva import synthetic_cells

TYPES = ["type_0", "type_1", "type_2", "type_3"]


@pytest.fixture(autouse=True)
def few_trees(monkeypatch):
    """Forests are most of the time of a comparison, and their accuracy is not the question here."""
    monkeypatch.setattr("modeling_scdiva.metrics.generation.N_TREES", 5)


@pytest.fixture(scope="module")
def cells():
    return synthetic_cells(n_cells=160, n_genes=120, seed=4)


@pytest.fixture(scope="module")
def reference(cells):
    return cells[:100].copy()


@pytest.fixture(scope="module")
def held_out(cells):
    return cells[100:].copy()


@pytest.fixture(scope="module")
def model(fresh_tiny_model):
    return fresh_tiny_model()


@pytest.fixture(scope="module")
def made(model, tokenizer, cells):
    return generate_cells(24, model=model, tokenizer=tokenizer, like=cells, steps=4)


def as_generated(adata, tokenizer):
    """Real cells in the form of generated ones."""
    values, counts = kept_profile(adata, tokenizer)
    like = anndata.AnnData(values, obs=adata.obs.copy())
    like.layers["counts"] = counts
    return like


def rows_of(result, part):
    return {(row["data"], row["method"]): row for row in result[part]}


def written(result, tmp_path):
    """The result as its file has it."""
    path = write_result(result, tmp_path / "result.json", "some", {}, ["run"])
    return json.loads(path.read_text("utf-8"))


# --- closeness ---


def test_cells_are_compared_as_the_tokenizer_keeps_them(cells, tokenizer):
    values, counts = kept_profile(cells, tokenizer)
    columns = cells.var_names.get_indexer(tokenizer.vocabulary.gene_ids[5:])
    raw = cells.X.toarray()[:, columns]
    kept = counts.toarray()
    np.testing.assert_array_equal(kept[kept > 0], raw[kept > 0])
    assert (kept > 0).sum(axis=1).tolist() == np.minimum((raw > 0).sum(axis=1), 48).tolist()
    sizes = raw.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(values.toarray(), np.log1p(1e4 * kept / sizes), rtol=1e-5)
    # Library sizes in obs, and a layer of counts, come first.
    other = cells.copy()
    other.layers["counts"], other.X = cells.X, cells.X * 3
    other.obs["library_size"] = 2.0 * sizes.ravel()
    values, counts = kept_profile(other, tokenizer)
    kept = counts.toarray()
    np.testing.assert_array_equal(kept[kept > 0], raw[kept > 0])
    np.testing.assert_allclose(values.toarray(), np.log1p(1e4 * kept / (2 * sizes)), rtol=1e-5)


def test_real_cells_are_as_close_as_the_floor_and_those_of_random_weights_are_not(cells, made, tokenizer):
    table = compare_generated(made, cells, tokenizer=tokenizer, seed=1)
    assert table.index.tolist() == ["generated", FLOOR]
    assert table.at["generated", "nn_accuracy"] > 0.9
    assert 0.3 < table.at[FLOOR, "nn_accuracy"] < 0.7
    assert 0.9 < table.at[FLOOR, "mean_pearson"] < 0.9999  # not the held-out half itself
    assert table.at["generated", "energy_distance"] > 5 * abs(table.at[FLOOR, "energy_distance"]) > 0
    assert table["n_held_out"].tolist() == [54, 54]
    assert table["n_generated"].tolist() == [24, 24]
    same = cells[np.random.default_rng(5).permutation(160)[:24]]
    again = compare_generated(as_generated(same, tokenizer), cells, tokenizer=tokenizer, seed=1)
    assert again.at["generated", "nn_accuracy"] < 0.7
    assert again.at["generated", "mean_pearson"] > 0.95
    assert again.loc[FLOOR].equals(table.loc[FLOOR])


def test_evaluation_has_floor_and_baselines(made, tokenizer, tmp_path):
    cells = synthetic_cells(n_cells=220, n_genes=120, seed=4)
    reference, held_out = cells[:160].copy(), cells[160:].copy()
    bare = as_generated(held_out, tokenizer)
    del bare.layers["counts"]
    result = evaluate_generation(
        {"scDiVa": made, "held-out cells": bare},
        reference=reference,
        held_out=held_out,
        tokenizer=tokenizer,
        name="toy",
        label_key="cell_type",
    )
    numbers, baselines = rows_of(result, "numbers"), rows_of(result, "baselines")
    assert list(numbers) == [("toy", "scDiVa"), ("toy", "held-out cells")]
    assert list(baselines) == [("toy", FLOOR), ("toy", "gene marginals"), ("toy", "gene marginals per type")]
    assert numbers["toy", "scDiVa"]["n_network_calls"] == 4.0
    assert numbers["toy", "scDiVa"]["library_size_distance"] > 0
    # The held-out cells themselves: equal to what they are compared with, and without counts.
    same = numbers["toy", "held-out cells"]
    assert same["mmd"] == pytest.approx(0.0, abs=0.02)
    assert same["mean_pearson"] == pytest.approx(1.0)
    assert same["variance_ratio"] == pytest.approx(1.0)
    assert same["library_size_distance"] is None
    assert same["n_network_calls"] is None
    assert baselines["toy", FLOOR]["mean_pearson"] < 0.9999
    assert baselines["toy", FLOOR]["energy_distance"] < numbers["toy", "scDiVa"]["energy_distance"]
    # Independent genes have no co-expression beyond depth; those of a type keep that of the types.
    errors = {method: row["correlation_error"] for (_, method), row in baselines.items()}
    assert errors[FLOOR] < errors["gene marginals per type"] < errors["gene marginals"]
    assert result["details"] == {"n_reference": 100, "n_held_out": 60, "n_generated": 60}
    assert FLOOR in format_result(result)
    file = written(result, tmp_path)
    assert file["columns"] == list(result["columns"])
    assert set(file["columns"]) <= {*numbers["toy", "scDiVa"]}
    plain = evaluate_generation({"a": made}, reference=reference, held_out=held_out, tokenizer=tokenizer)
    assert [row["method"] for row in plain["baselines"]] == [FLOOR, "gene marginals"]
    assert plain["details"]["n_generated"] == plain["baselines"][0]["n_generated"] == 24
    assert plain["details"]["n_reference"] == 136
    with pytest.raises(ValueError, match=r"24 generated cells need 48 reference cells.*Got 40"):
        evaluate_generation({"a": made}, reference=held_out[:40], held_out=held_out, tokenizer=tokenizer)


def test_the_floor_is_not_what_the_components_were_fitted_to(tokenizer):
    cells = synthetic_cells(n_cells=560, n_genes=120, seed=4)
    cells.X.data = np.random.default_rng(0).permutation(cells.X.data)  # no structure but noise
    made, held_out, reference = cells[:140].copy(), cells[140:280].copy(), cells[280:].copy()
    made = as_generated(made, tokenizer)
    result = evaluate_generation({"a": made}, reference=reference, held_out=held_out, tokenizer=tokenizer)
    floor = result["baselines"][0]
    assert 0.35 < floor["nn_accuracy"] < 0.65
    assert 0.35 < floor["auc_forest"] < 0.65


@pytest.mark.slow
@pytest.mark.skipif(not has_scvi(), reason="scvi-tools is not installed: scdiva[eval-full]")
def test_scvi_stands_beside_where_it_is_wanted(reference, held_out, made, tokenizer):
    how = {"reference": reference, "held_out": held_out, "tokenizer": tokenizer}
    result = evaluate_generation({"a": made}, include_scvi=True, **how)
    rows = {row["method"]: row for row in result["baselines"]}
    assert set(rows) == {FLOOR, "gene marginals", "scVI, posterior of training cells", "scVI, prior"}
    assert (
        rows["scVI, posterior of training cells"]["energy_distance"] < result["numbers"][0]["energy_distance"]
    )


def test_baselines_draw_depth_beside_the_genes(reference, tokenizer):
    panel = reference[:, :30].copy()
    panel.obs["library_size"] = np.asarray(reference.X.sum(axis=1)).ravel()
    options = {"tokenizer": tokenizer, "include_scvi": False, "seed": 3}
    drawn = draw_baselines(panel, 400, labels=panel.obs["cell_type"].to_numpy(), **options)
    assert set(drawn) == {"gene marginals", "gene marginals per type"}
    for made in drawn.values():
        assert made.var_names.equals(panel.var_names)
        total = np.asarray(made.X.sum(axis=1)).ravel()
        sizes = made.obs["library_size"].to_numpy()
        assert (total > 0).all()
        assert (sizes >= total).all()
        assert sizes.mean() == pytest.approx(panel.obs["library_size"].mean(), rel=0.1)
        assert total.mean() == pytest.approx(float(panel.X.sum(axis=1).mean()), rel=0.1)
    again = draw_baselines(panel, 400, labels=None, **options)["gene marginals"]
    assert (again.X != drawn["gene marginals"].X).nnz == 0
    whole = draw_baselines(reference, 50, labels=None, **options)["gene marginals"]
    np.testing.assert_array_equal(whole.obs["library_size"], np.asarray(whole.X.sum(axis=1)).ravel())


def test_draws_without_a_gene_are_no_cells(reference, tokenizer):
    rare = anndata.AnnData(csr_matrix(np.eye(40, 120, dtype=np.float32)), var=reference.var.copy())
    rare.obs["library_size"] = 50.0
    options = {"labels": None, "tokenizer": tokenizer, "include_scvi": False, "seed": 0}
    drawn = draw_baselines(rare, 300, **options)["gene marginals"]
    assert 100 < drawn.n_obs < 260  # (1 - 1 / 40) ** 40 = 0.36 of the draws have none
    assert (np.asarray(drawn.X.sum(axis=1)).ravel() > 0).all()
    assert (drawn.obs["library_size"] >= 49).all()


def test_generated_cells_keep_what_they_have(made):
    values, counts = generated_profile(made)
    assert (values != made.X).nnz == 0
    assert (counts != made.layers["counts"]).nnz == 0
    bare = made.copy()
    del bare.layers["counts"]
    assert generated_profile(bare)[1] is None


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("umap") is None or importlib.util.find_spec("matplotlib") is None,
    reason="umap-learn or matplotlib is not installed: scdiva[examples]",
)
def test_generated_and_real_cells_share_a_map(made, held_out, tokenizer):
    figure = joint_umap(made, held_out, tokenizer=tokenizer)
    (axes,) = [panel for panel in figure.axes if panel.get_title() == "real and generated"]
    n_points = sum(len(points.get_offsets()) for points in axes.collections)
    assert n_points == 24 + 60
    assert {"generated", "real, held out"} <= {text.get_text() for text in figure.findobj(type(axes.title))}


# --- conditions ---


def test_frequent_types_by_hand():
    reference = pd.Series(["a"] * 20 + ["b"] * 19 + ["c"] * 30 + ["d"] * 25 + [""] * 40 + [None] * 40)
    held_out = pd.Series(["a"] * 5 + ["b"] * 9 + ["c"] * 4 + ["d"] * 6 + [""] * 9 + [None] * 9 + ["e"] * 50)
    assert frequent_types(reference, held_out) == ["a", "d"]
    assert frequent_types(reference.astype("category"), held_out.astype("category")) == ["a", "d"]
    assert frequent_types(reference, held_out[:3]) == []


def replaced_generator(monkeypatch, pool, tokenizer, *, choose):
    """Let `generate_cells` take real cells, those that ``choose`` names for the types asked for."""
    seen = []

    def generate(n_cells, *, conditions, guidance_scale, model, tokenizer, **options):
        asked = conditions["cell_type"]
        seen.append((n_cells, guidance_scale, options))
        return as_generated(anndata.AnnData(pool.X[choose(np.asarray(asked))], var=pool.var), tokenizer)

    monkeypatch.setattr(guidance, "generate_cells", generate)
    return seen


def test_agreement_and_diversity_of_known_generators(reference, held_out, tokenizer, monkeypatch):
    types = held_out.obs["cell_type"].to_numpy()
    places = {name: np.flatnonzero(types == name) for name in TYPES}

    def as_asked(asked):
        return np.concatenate([places[name][: (asked == name).sum()] for name in TYPES])

    def the_next_type(asked):
        return np.concatenate([places[TYPES[(n + 1) % 4]][: (asked == TYPES[n]).sum()] for n in range(4)])

    def the_same_cell(asked):
        return np.array([places[name][0] for name in asked])

    options = {"model": None, "tokenizer": tokenizer, "n_cells_per_type": 15, "guidance_scales": (1.0, 2.5)}
    rows = {}
    for choose in (as_asked, the_next_type, the_same_cell):
        seen = replaced_generator(monkeypatch, held_out, tokenizer, choose=choose)
        result = evaluate_guidance(reference, held_out, steps=7, **options)
        assert seen == [(60, 1.0, {"steps": 7}), (60, 2.5, {"steps": 7})]
        rows[choose.__name__] = result["numbers"][0]
    real, marginals = result["baselines"]
    assert real["method"] == "real held-out cells"
    assert real["agreement"] > 0.9
    assert real["diversity"] == pytest.approx(1.0)
    assert marginals["method"] == "gene marginals of the type"
    assert marginals["agreement"] > 0.8
    assert (marginals["n_cells"], marginals["n_types"]) == (60, 4)
    assert rows["as_asked"]["agreement"] == real["agreement"]  # all 15 of each type
    assert rows["as_asked"]["diversity"] == pytest.approx(1.0)
    assert rows["the_next_type"]["agreement"] < 0.1
    assert rows["the_same_cell"]["diversity"] == pytest.approx(0.0, abs=1e-3)
    assert result["details"] == {"types": TYPES, "n_reference": 100, "n_held_out": 60}


def test_diversity_by_another_implementation(reference, held_out, tokenizer, monkeypatch):
    """A generator that knows the first four held-out cells of each type."""
    types = held_out.obs["cell_type"].to_numpy()
    places = {name: np.flatnonzero(types == name) for name in TYPES}
    first = np.concatenate([places[name][:4] for name in TYPES])
    replaced_generator(monkeypatch, held_out, tokenizer, choose=lambda asked: first)
    options = {"model": None, "tokenizer": tokenizer, "n_cells_per_type": 4, "guidance_scales": [1.0]}
    result = evaluate_guidance(reference, held_out, **options)
    known, real = (kept_profile(part, tokenizer)[0].toarray() for part in (reference, held_out))
    space = PCA(30).fit(known)
    spreads = [
        pdist(space.transform(real[places[name][:4]])).mean()
        / pdist(space.transform(real[places[name]])).mean()
        for name in TYPES
    ]
    assert result["numbers"][0]["diversity"] == pytest.approx(np.mean(spreads), rel=0.01)


def test_evaluation_over_guidance_scales(reference, held_out, fresh_tiny_model, tokenizer, tmp_path, recwarn):
    model = fresh_tiny_model(conditions={"cell_type": TYPES})
    few = held_out.copy()
    few.obs["cell_type"] = few.obs["cell_type"].replace({"type_3": "unknown"}).astype("category")
    result = evaluate_guidance(
        reference,
        few,
        model=model,
        tokenizer=tokenizer,
        guidance_scales=(1.0, 2.0),
        n_cells_per_type=3,
        steps=2,
        like=reference,
    )
    assert [row["method"] for row in result["numbers"]] == ["scDiVa, guidance 1", "scDiVa, guidance 2"]
    assert {row["n_cells"] for row in result["numbers"]} == {9}
    assert result["details"] == {"types": TYPES[:3], "n_reference": 75, "n_held_out": 45}
    assert all(0 <= row["agreement"] <= 1 for row in result["numbers"])
    assert all(row["diversity"] > 0 for row in result["numbers"])
    assert written(result, tmp_path)["title"] == "Conditional generation"
    assert not [warning for warning in recwarn if "names are not unique" in str(warning.message)]


def test_conditions_need_two_types(reference, held_out, model, tokenizer):
    with pytest.raises(
        ValueError, match=r"Two types with 20 reference and 5 held-out cells are needed, got \[\]"
    ):
        evaluate_guidance(reference[:40].copy(), held_out, model=model, tokenizer=tokenizer)


# --- completion ---


def test_completion_scores_by_hand():
    truth = np.array([[0.0, 2.0, 0.0, 1.0], [3.0, 0.0, 0.0, 5.0], [0.0, 0.0, 7.0, 7.0]])
    observed = np.array([[0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 1, 1]], dtype=bool)
    prediction = np.array([[1.0, 1.0, 4.0, 9.0], [9.0, 0.0, 1.0, 2.0], [1.0, 2.0, 9.0, 9.0]])
    detection = np.array([[0.1, 0.5, 0.9, 9.0], [9.0, 0.1, 0.2, 0.7], [0.3, 0.4, 9.0, 9.0]])
    scores = completion_scores(prediction, detection, truth, observed)
    errors = [np.sqrt((1 + 1 + 16) / 3), np.sqrt((0 + 1 + 9) / 3), np.sqrt((1 + 4) / 2)]
    assert scores["rmse"] == pytest.approx(np.mean(errors))
    # Cell 0: (0, 2, 0) and (1, 1, 4), covariance -2, squared norms 8/3 and 6. Cell 1: (0, 0, 5) and
    # (0, 1, 2), covariance 5, squared norms 50/3 and 2. In cell 2 nothing hidden is detected.
    correlations = [-2 / np.sqrt(8 / 3 * 6), 5 / np.sqrt(50 / 3 * 2)]
    assert scores["pearson"] == pytest.approx(np.mean(correlations))
    assert scores["auroc"] == pytest.approx((0.5 + 1.0) / 2)
    assert scores["n_cells"] == 3
    silent = completion_scores(prediction[2:], detection[2:], truth[2:], observed[2:])
    assert silent == {"rmse": pytest.approx(errors[2]), "pearson": None, "auroc": None, "n_cells": 1}


def test_nearest_means_by_hand(monkeypatch):
    monkeypatch.setattr(completion, "N_NEIGHBORS", 2)
    known = np.array([[0.0, 4.0, 1.0], [1.0, 0.0, 3.0], [5.0, 5.0, 0.0], [0.0, 0.0, 9.0]])
    truth = np.array([[0.5, 9.0, 9.0], [9.0, 0.0, 8.0]])
    observed = np.array([[1, 0, 0], [0, 1, 1]], dtype=bool)
    means, rates = nearest_means(known, truth, observed)
    # By the first gene cells 0 and 1 are nearest (3 as near as 0, and later); by the others 3 and 1.
    np.testing.assert_allclose(means, [[0.5, 2.0, 2.0], [0.5, 0.0, 6.0]])
    np.testing.assert_allclose(rates, [[0.5, 0.5, 1.0], [0.5, 0.0, 1.0]])
    blind, _ = nearest_means(known, truth, np.zeros_like(observed))
    np.testing.assert_allclose(blind, np.tile(known[:2].mean(axis=0), (2, 1)))


class Oracle:
    """Completes cells by looking them up; every second draw finds silence."""

    def __init__(self, adata, tokenizer):
        self.truth = tokenizer.encode_anndata(adata)
        self.config = SimpleNamespace(mask_token_id=tokenizer.mask_token_id, conditions=None)
        self.asked = []

    def complete(self, *, input_ids, seed, **inputs):
        self.asked.append((input_ids.clone(), seed, inputs))
        is_known = input_ids != self.config.mask_token_id
        assert torch.equal(input_ids[is_known], self.truth["input_ids"][is_known])
        shown = is_known if seed % 2 else torch.ones_like(is_known)
        values = self.truth["expression_values"] * shown
        return {"input_ids": self.truth["input_ids"].where(shown, 0), "expression_values": values}


def test_an_oracle_completes_perfectly(reference, held_out, tokenizer):
    some = held_out[:12].copy()
    oracle = Oracle(some, tokenizer)
    result = evaluate_completion(
        reference, some, model=oracle, tokenizer=tokenizer, observed_shares=(0.25, 0.5), n_samples=2, steps=3
    )
    rows = rows_of(result, "numbers")
    for share in ("25% observed", "50% observed"):
        one, mean = (rows[share, f"scDiVa, {name}"] for name in ("one draw", "mean of 2 draws"))
        assert one["rmse"] == 0.0
        assert one["pearson"] == pytest.approx(1.0)
        assert one["auroc"] == mean["auroc"] == 1.0
        assert mean["pearson"] == pytest.approx(1.0)
        assert mean["rmse"] > 0.5  # half of every value
    lengths = (oracle.truth["input_ids"] > 4).sum(dim=1).numpy()
    sizes = np.asarray(some.X.sum(axis=1)).ravel()
    assert [seed for _, seed, _ in oracle.asked] == [0, 1, 0, 1]
    for (ids, _, inputs), share in zip(oracle.asked, (0.25, 0.25, 0.5, 0.5), strict=True):
        assert (ids == 1).sum(dim=1).tolist() == [round((1 - share) * length) for length in lengths]
        np.testing.assert_allclose(inputs["size_factors"].numpy(), sizes / 1e4)
        assert inputs["condition_ids"] is None
        assert inputs["steps"] == 3


def test_completion_stands_beside_means_and_neighbours(
    reference, held_out, fresh_tiny_model, tokenizer, tmp_path
):
    model = fresh_tiny_model(conditions={"library_size": [300.0, 600.0]})
    some = held_out[:10].copy()
    some.obs["library_size"] = np.asarray(some.X.sum(axis=1)).ravel()
    options = {"model": model, "tokenizer": tokenizer, "n_samples": 2, "steps": 2}
    result = evaluate_completion(reference, some, **options)
    shares = ["10% observed", "50% observed", "90% observed"]
    assert [row["data"] for row in result["baselines"]] == [share for share in shares for _ in range(2)]
    rows = rows_of(result, "numbers") | rows_of(result, "baselines")
    for share in shares:
        assert rows[share, "gene mean"]["auroc"] > 0.7
        assert rows[share, "kNN"]["rmse"] < rows[share, "gene mean"]["rmse"]
        assert rows[share, "scDiVa, mean of 2 draws"]["rmse"] < rows[share, "scDiVa, one draw"]["rmse"]
        assert rows[share, "scDiVa, one draw"]["n_cells"] == 10
    # What gene mean predicts for a gene does not depend on what is observed; recomputed for one cell.
    known, truth = (kept_profile(part, tokenizer)[0].toarray() for part in (reference, some))
    by_hand = completion_scores(
        np.tile(known.mean(axis=0), (10, 1)), np.tile((known > 0).mean(axis=0), (10, 1)), truth, truth < 0
    )
    none = evaluate_completion(reference, some, observed_shares=(0.0,), **options)
    assert {key: none["baselines"][0][key] for key in by_hand} == pytest.approx(by_hand)
    file = written(result, tmp_path)
    assert file["title"] == "Completion"
    assert file["details"] == {"n_reference": 100, "n_samples": 2}
