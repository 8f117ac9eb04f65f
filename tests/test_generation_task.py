"""Generation for AnnData: new, edited and completed cells, their sizes, conditions, rewards and refusals.

Needs: both packages; no files, no GPU.
Run: python -m pytest tests/test_generation_task.py
"""

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_matrix

from modeling_scdiva import Steering
from modeling_scdiva.size_law_scdiva import draw_sizes, fit_size_law
from modeling_scdiva.tasks import (
    complete_cells,
    conditions_from_obs,
    denoise_cells,
    generate_cells,
    marker_reward,
)
from modeling_scdiva.tasks.cells import read_cells
from modeling_scdiva.tasks.generation import condition_ids_of
from tokenization_scdiva import ScDivaTokenizer, synthetic_cells, synthetic_tokenizer

TYPES = ["type_0", "type_1", "type_2", "type_3"]


@pytest.fixture(scope="module")
def adata():
    return synthetic_cells(n_cells=20, n_genes=120, seed=9)


@pytest.fixture(scope="module")
def logged(adata):
    sizes = np.asarray(adata.X.sum(axis=1))
    values = csr_matrix(np.log1p(1e4 * adata.X.toarray() / sizes).astype(np.float32))
    return anndata.AnnData(values, obs=adata.obs.copy(), var=adata.var.copy())


@pytest.fixture(scope="module")
def model(fresh_tiny_model):
    return fresh_tiny_model()


@pytest.fixture(scope="module")
def conditional(fresh_tiny_model):
    # Weights wide enough that a condition moves every draw.
    conditions = {"cell_type": TYPES, "library_size": [400.0, 700.0]}
    return fresh_tiny_model(conditions=conditions, initializer_range=0.2)


@pytest.fixture
def how(model, tokenizer):
    return {"model": model, "tokenizer": tokenizer, "steps": 4}


def assert_counts_agree(made):
    """Counts are whole, at least 1, small enough for float32, and give the values by the library size."""
    counts, values = made.layers["counts"], made.X
    assert counts.data.min() >= 1
    assert counts.data.max() < 2**24
    np.testing.assert_array_equal(counts.data, np.rint(counts.data))
    expected = np.log1p(1e4 * counts.toarray() / made.obs["library_size"].to_numpy()[:, None])
    np.testing.assert_allclose(values.toarray(), expected, rtol=1e-5)


# --- new cells ---


def test_new_cells_are_counts_over_all_genes_and_say_how_they_came_about(how, tokenizer):
    lengths, sizes = np.array([5, 12, 48, 1, 20, 33]), np.array([300.0, 500, 900, 200, 4000, 600])
    made = generate_cells(6, n_genes=lengths, library_size=sizes, **how)
    assert_counts_agree(made)
    assert made.X.getnnz(axis=1).tolist() == lengths.tolist()  # each gene once
    assert made.var_names.tolist() == tokenizer.vocabulary.gene_ids[5:]
    assert made.obs_names.tolist() == [f"generated_{cell}" for cell in range(6)]
    assert made.obs["is_generated"].all()
    assert made.obs["library_size"].tolist() == sizes.tolist()
    assert made.obs["n_network_calls"].tolist() == [4, 4, 4, 1, 4, 4]
    assert (made.obs["gene_log_prob"] < 0).all()
    said = made.uns["scdiva"]
    assert said["task"] == "generate_cells"
    assert said["vocabulary_hash"] == tokenizer.vocabulary.content_hash
    assert said["settings"]["steps"] == 4
    assert said["versions"]["torch"] == torch.__version__
    assert "size_law" not in said["settings"]


def test_equal_seeds_give_equal_cells_whatever_the_batches(how):
    first, again, other = (
        generate_cells(6, n_genes=15, library_size=500, **how, **options)
        for options in ({"seed": 3, "batch_size": 2}, {"seed": 3}, {"seed": 4})
    )
    np.testing.assert_array_equal(first.X.toarray(), again.X.toarray())
    assert (first.X != other.X).nnz


def test_without_depth_there_are_values_and_no_counts(how):
    made = generate_cells(3, n_genes=9, **how)
    assert made.X.getnnz(axis=1).tolist() == [9, 9, 9]
    assert (made.X.data > 0).all()
    assert "counts" not in made.layers
    assert "library_size" not in made.obs


def test_the_checkpoint_is_named_without_its_path(fresh_tiny_model, tokenizer, tmp_path):
    fresh_tiny_model().save_pretrained(tmp_path / "mine")
    model = type(fresh_tiny_model()).from_pretrained(tmp_path / "mine")
    made = generate_cells(1, model=model, tokenizer=tokenizer, n_genes=2)
    assert made.uns["scdiva"]["checkpoint"] == "mine"


def test_the_mode_of_the_model_comes_back_and_no_warning_is_given(fresh_tiny_model, tokenizer, recwarn):
    model = fresh_tiny_model(hidden_dropout=0.5).train()
    options = {"model": model, "tokenizer": tokenizer, "n_genes": 12, "library_size": 300.0}
    first, second = (generate_cells(3, **options) for _ in range(2))
    np.testing.assert_array_equal(first.X.toarray(), second.X.toarray())
    assert model.training
    assert not [str(warning.message) for warning in recwarn]


# --- sizes ---


@pytest.fixture(scope="module")
def size_law():
    """Shallow cells of 6 genes and deep ones of 30, many of each: bins of 6 .. 17 and 30 .. 47 genes."""
    lengths = np.repeat([6, 30], 500)
    sizes = np.where(lengths == 6, 200.0, 2000.0) * np.tile(np.linspace(1.0, 2.0, 500), 2)
    return fit_size_law(lengths, sizes, max_genes=48, target_sum=1e4)


def test_sizes_come_from_the_law_of_the_training_cells(how, size_law):
    made = generate_cells(40, size_law=size_law, seed=5, **how)
    drawn = draw_sizes(size_law, np.random.default_rng(5).random((40, 3)))
    assert made.X.getnnz(axis=1).tolist() == drawn[0].tolist()
    assert made.obs["library_size"].tolist() == drawn[1].tolist()
    is_deep = made.obs["library_size"].to_numpy() > 1000
    assert 5 < is_deep.sum() < 35
    lengths = made.X.getnnz(axis=1)
    assert (lengths[is_deep] >= 30).mean() > 0.9
    assert (lengths[~is_deep] < 18).mean() > 0.9
    assert_counts_agree(made)
    assert "size_law" not in made.uns["scdiva"]["settings"]


def test_the_law_completes_what_was_given(how, size_law):
    deep = generate_cells(12, library_size=3000.0, size_law=size_law, **how)
    assert (deep.obs["library_size"] == 3000).all()
    assert (deep.X.getnnz(axis=1) >= 30).sum() >= 11
    short = generate_cells(12, n_genes=6, size_law=size_law, **how)
    assert (short.X.getnnz(axis=1) == 6).all()
    assert (short.obs["library_size"] < 1200).sum() >= 11
    both = generate_cells(3, n_genes=6, library_size=3000, size_law=size_law, **how)
    assert both.X.getnnz(axis=1).tolist() == [6, 6, 6]
    assert both.obs["library_size"].tolist() == [3000, 3000, 3000]


def test_sizes_of_real_cells_stay_together(how, adata, tokenizer):
    cells = read_cells(adata, tokenizer=tokenizer)
    made = generate_cells(30, like=adata, seed=1, **how)
    found = set(zip(made.X.getnnz(axis=1).tolist(), made.obs["library_size"], strict=True))
    assert found <= set(zip(cells.n_genes.tolist(), cells.library_size, strict=True))
    assert len(found) > 10
    other = generate_cells(30, like=adata, seed=2, **how)
    assert other.obs["library_size"].tolist() != made.obs["library_size"].tolist()


# --- conditions ---


def test_conditions_are_recorded_and_matter(conditional, tokenizer, tmp_path):
    asked = ["type_1", "type_3", None, "type_1"]
    options = {"model": conditional, "tokenizer": tokenizer, "n_genes": 20, "library_size": 500.0, "steps": 5}
    made = generate_cells(4, conditions={"cell_type": asked}, **options)
    assert made.obs["cell_type"].tolist() == asked
    plain = generate_cells(4, **options)
    differs = made.obs["gene_log_prob"].to_numpy() != plain.obs["gene_log_prob"].to_numpy()
    assert differs.tolist() == [True, True, False, True]
    # A column of other cells is taken by its order; what no cell has is no column. All of it can be written.
    column = pd.Series(asked, index=list("wxyz"), dtype=object)
    same = generate_cells(4, conditions={"cell_type": column}, **options)
    np.testing.assert_array_equal(same.X.toarray(), made.X.toarray())
    assert same.obs["cell_type"].tolist() == asked
    none = generate_cells(4, conditions={"cell_type": [None] * 4, "library_size": None}, **options)
    assert "cell_type" not in none.obs
    assert none.obs["library_size"].tolist() == [500.0] * 4
    for name, cells in {"same": same, "none": none}.items():
        cells.write_h5ad(tmp_path / f"{name}.h5ad")
    written = anndata.read_h5ad(tmp_path / "same.h5ad").obs["cell_type"]
    assert written.iloc[[0, 1, 3]].tolist() == ["type_1", "type_3", "type_1"]
    assert written.isna().tolist() == [False, False, True, False]


def test_the_depth_condition_follows_the_library_size(conditional, tokenizer):
    sizes = np.array([399.0, 400.0, 699.0, 5000.0])
    ids = condition_ids_of({"cell_type": "type_2"}, 4, sizes, conditional)
    assert ids.tolist() == [[3, 1], [3, 2], [3, 2], [3, 3]]
    assert condition_ids_of({"library_size": None}, 4, sizes, conditional).tolist() == [[0, 0]] * 4
    assert condition_ids_of({}, 2, None, conditional).tolist() == [[0, 0]] * 2
    options = {"model": conditional, "tokenizer": tokenizer, "n_genes": 20, "library_size": sizes, "steps": 3}
    follows, named, left_open = (
        generate_cells(4, conditions=conditions, **options)
        for conditions in (None, {"library_size": [100, 650.0, 401, 701]}, {"library_size": None})
    )
    np.testing.assert_array_equal(follows.X.toarray(), named.X.toarray())
    assert named.obs["library_size"].tolist() == sizes.tolist()
    assert (follows.obs["gene_log_prob"] != left_open.obs["gene_log_prob"]).all()


@pytest.mark.parametrize(
    ("conditions", "error", "message"),
    [
        (
            {"library_size": 300},
            ValueError,
            r"library_size and the library size of cell 1 \(800 molecules\) contradict each other. Give one",
        ),
        (
            {"cell_type": ["type_9", "B", "type_9"]},
            ValueError,
            r"knows no cell_type 'B', 'type_9'. Known: 'type_0', 'type_1', 'type_2', 'type_3'\.",
        ),
        ({"tissue": "gut"}, KeyError, "no condition 'tissue'. Conditions: 'cell_type', 'library_size'"),
        ({"cell_type": ["type_1", "type_1"]}, ValueError, "cell_type has 2 entries for 3 cells; give one"),
        ({"library_size": -1.0}, ValueError, "library_size must be positive"),
    ],
)
def test_conditions_that_cannot_be_are_refused(conditional, tokenizer, conditions, error, message):
    options = {"model": conditional, "tokenizer": tokenizer, "conditions": conditions}
    with pytest.raises(error, match=message):
        generate_cells(3, n_genes=5, library_size=[350.0, 800, 350], **options)


@pytest.mark.parametrize(
    ("task", "more"), [(denoise_cells, {"strength": 0.5}), (complete_cells, {"n_genes": 48})]
)
def test_real_cells_get_no_conditions_that_cannot_be(conditional, tokenizer, adata, task, more):
    how = {"model": conditional, "tokenizer": tokenizer, **more}
    with pytest.raises(ValueError, match=r"The network knows no cell_type 'B'. Known: 'type_0'"):
        task(adata, conditions={"cell_type": "B"}, **how)
    with pytest.raises(KeyError, match="The network has no condition 'tissue'"):
        task(adata, conditions={"tissue": "gut"}, **how)
    with pytest.raises(ValueError, match=r"library size of cell \d+ \(\d+ molecules\) contradict each other"):
        task(adata, conditions={"library_size": 10_000}, **how)


def test_conditions_need_a_network_with_conditions(how, adata):
    message = r"Conditions came \(cell_type\), and this checkpoint was trained without any"
    conditions = {"cell_type": "type_1"}
    with pytest.raises(ValueError, match=message):
        generate_cells(2, n_genes=4, conditions=conditions, **how)
    with pytest.raises(ValueError, match=message):
        denoise_cells(adata, strength=0.1, conditions=conditions, **how)
    with pytest.raises(ValueError, match=message):
        complete_cells(adata, n_genes=48, conditions=conditions, **how)
    assert condition_ids_of({}, 3, None, how["model"]) is None


def test_conditions_are_read_from_real_cells(conditional, model, adata):
    cells = adata.copy()
    cells.obs["cell_type"] = ["type_0", "type_9"] * 10
    assert conditions_from_obs(cells, conditional) == {"cell_type": ["type_0", None] * 10}
    del cells.obs["cell_type"]
    cells.obs["library_size"] = 3.0
    assert conditions_from_obs(cells, conditional) == {}
    assert conditions_from_obs(adata, model) == {}
    cells.obs["cell_type"] = [None, "type_1"] * 10
    assert conditions_from_obs(cells, conditional) == {"cell_type": [None, "type_1"] * 10}
    cells.obs["cell_type"] = pd.Categorical(["type_0", np.nan] * 10)
    assert conditions_from_obs(cells, conditional) == {"cell_type": ["type_0", None] * 10}


# --- cells edited ---


def assert_given_stay(made, adata, tokenizer):
    """Values and counts of what was not drawn are those that came in, to the last bit."""
    came = tokenizer.decode_anndata(tokenizer.encode_anndata(adata)).X.toarray()
    is_drawn = made.layers["is_generated"].toarray().astype(bool)
    values = made.X.toarray()
    assert (values[is_drawn] > 0).all()
    is_given = (values > 0) & ~is_drawn
    np.testing.assert_array_equal(values[is_given], came[is_given])
    places = adata.var_names.get_indexer(made.var_names)
    if "counts" in made.layers:
        counts = made.layers["counts"].toarray()[is_given]
        np.testing.assert_array_equal(counts, adata.X.toarray()[:, places][is_given])
    return is_given, is_drawn, came > 0


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_a_share_of_the_genes_is_made_anew(how, adata, tokenizer, strength):
    made = denoise_cells(adata, strength=strength, **how)
    is_given, is_drawn, is_there = assert_given_stay(made, adata, tokenizer)
    lengths = is_there.sum(axis=1)
    n_drawn = np.rint(strength * lengths)
    assert is_drawn.sum(axis=1).tolist() == n_drawn.tolist()
    assert is_given.sum(axis=1).tolist() == (lengths - n_drawn).tolist()
    assert_counts_agree(made)
    assert made.obs_names.equals(adata.obs_names)
    assert made.obs["cell_type"].tolist() == adata.obs["cell_type"].tolist()
    assert made.uns["scdiva"]["task"] == "denoise_cells"
    assert made.uns["scdiva"]["strength"] == strength
    assert "is_generated" not in adata.obs


def test_another_condition_overrides_the_column_of_the_cells(conditional, tokenizer, adata):
    made = denoise_cells(
        adata, model=conditional, tokenizer=tokenizer, strength=0.5, conditions={"cell_type": "type_2"}
    )
    assert set(made.obs["cell_type"]) == {"type_2"}
    assert set(adata.obs["cell_type"]) == set(TYPES)
    assert made.obs["donor_id"].tolist() == adata.obs["donor_id"].tolist()


def test_cells_are_completed_to_a_number_of_genes(how, adata, tokenizer):
    panel = adata[:, :60].copy()
    whole = np.asarray(adata.X.sum(axis=1)).ravel()
    reading = {"library_size": whole, "max_genes": 15}
    made = complete_cells(panel, n_genes=40, reading=reading, **how)
    is_drawn = made.layers["is_generated"].toarray().astype(bool)
    assert (made.X.getnnz(axis=1) == 40).all()
    assert (is_drawn.sum(axis=1) == 25).all()
    came = tokenizer.decode_anndata(
        tokenizer.encode_anndata(panel, library_size=whole, max_genes=15), library_size=whole
    )
    is_given = (made.X.toarray() > 0) & ~is_drawn
    np.testing.assert_array_equal(is_given, came.X.toarray() > 0)
    for found, given in ((made.X, came.X), (made.layers["counts"], came.layers["counts"])):
        np.testing.assert_array_equal(found.toarray()[is_given], given.toarray()[is_given])
    assert_counts_agree(made)
    assert made.obs["library_size"].tolist() == whole.tolist()
    assert made.uns["scdiva"]["task"] == "complete_cells"


def test_the_law_says_how_many_genes_a_finished_cell_has(how, adata, tokenizer, size_law):
    cells = read_cells(adata, tokenizer=tokenizer, max_genes=10)
    made = complete_cells(adata, size_law=size_law, reading={"max_genes": 10}, seed=4, **how)
    uniforms = np.random.default_rng(4).random((20, 3))
    drawn = draw_sizes(size_law, uniforms, library_sizes=cells.library_size)[0]
    assert made.X.getnnz(axis=1).tolist() == np.maximum(drawn, cells.n_genes).tolist()
    assert (drawn < cells.n_genes).any()  # and what is given stays


def test_log_values_are_edited_without_counts(how, logged, tokenizer):
    reading = {"expression_is_log1p": True}
    came = tokenizer.decode_anndata(tokenizer.encode_anndata(logged, **reading)).X.toarray()
    edited = denoise_cells(logged, strength=0.4, reading=reading, **how)
    completed = complete_cells(logged, n_genes=48, reading=reading, **how)
    for made in (edited, completed):
        assert "counts" not in made.layers
        assert "library_size" not in made.obs
        is_given = (made.X.toarray() > 0) & (made.layers["is_generated"].toarray() == 0)
        np.testing.assert_array_equal(made.X.toarray()[is_given], came[is_given])
    assert (completed.X.getnnz(axis=1) == 48).all()
    for task, more in ((denoise_cells, {"strength": 0.1}), (complete_cells, {"n_genes": 48})):
        with pytest.raises(ValueError, match="expression_is_log1p=True"):
            task(logged, **more, **how)
    with pytest.raises(ValueError, match="X does not hold raw counts"):
        generate_cells(2, like=logged, **how)


# --- tokenizers without an order ---


def test_cells_without_an_order_stay_as_drawn(fresh_tiny_model, tokenizer, adata):
    unordered = ScDivaTokenizer(vocabulary=tokenizer.vocabulary, max_genes=48, gene_order="random")
    how = {"model": fresh_tiny_model(), "tokenizer": unordered, "steps": 4}
    made = generate_cells(5, n_genes=20, library_size=500.0, **how)
    settings = made.uns["scdiva"]["settings"]
    assert (settings["canonicalize"], settings["rank_consistent"]) == (False, False)
    assert_counts_agree(made)
    chosen = generate_cells(5, n_genes=20, library_size=500.0, rank_consistent=True, **how)
    assert chosen.uns["scdiva"]["settings"]["rank_consistent"]
    edited = denoise_cells(adata, strength=0.5, **how)
    assert_given_stay(edited, adata, unordered)
    assert (complete_cells(adata, n_genes=48, **how).X.getnnz(axis=1) == 48).all()


# --- rewards ---


def test_the_reward_is_the_mean_of_the_markers_by_hand(tokenizer):
    reward = marker_reward(["GENE3", "ENSG00000000007"], tokenizer=tokenizer, weight=2.0)
    first, second = (tokenizer.vocabulary.symbol_token_ids[name] for name in ("GENE3", "GENE7"))
    ids = torch.tensor([[2, first, second, 50], [2, 50, second, first], [2, 60, 61, 62]])
    values = torch.tensor([[0.0, 1.0, 4.0, 9.0], [0.0, 9.0, 3.0, 7.0], [0.0, 5.0, 6.0, 7.0]])
    attention = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])
    assert reward(ids, values, attention).tolist() == [5.0, 3.0, 0.0]
    suppressed = marker_reward(["GENE3", "GENE7"], tokenizer=tokenizer, weight=-2.0)
    assert suppressed(ids, values, attention).tolist() == [-5.0, -3.0, 0.0]
    with pytest.raises(KeyError, match=r"1 of 2 markers are not among the 120 genes .*: 'CD3E'"):
        marker_reward(["GENE3", "CD3E"], tokenizer=tokenizer)
    with pytest.raises(ValueError, match="No markers are named"):
        marker_reward([], tokenizer=tokenizer)
    with pytest.raises(ValueError, match="Two markers are the same gene: 'GENE3', 'ENSG00000000003'"):
        marker_reward(["GENE3", "ENSG00000000003"], tokenizer=tokenizer)


def test_particles_draw_cells_towards_the_markers(how, tokenizer):
    markers = [f"GENE{gene}" for gene in range(20, 26)]
    reward = marker_reward(markers, tokenizer=tokenizer, weight=6.0)
    means = {}
    for name, steering in (("plain", None), ("steered", Steering(reward=reward, n_particles=12))):
        made = generate_cells(12, n_genes=20, library_size=500.0, steering=steering, **how)
        places = made.var["gene_symbols"].isin(markers).to_numpy()
        means[name] = float(made.X[:, places].sum(axis=1).mean()) / len(markers)
        assert_counts_agree(made)
    assert means["steered"] > means["plain"] + 0.5
    assert (made.obs["n_network_calls"] == 48).all()  # of all particles


# --- refusals ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {},
            r"no law of cell sizes. Pass n_genes; for new cells library_size \(for counts\), or like=AnnData",
        ),
        ({"library_size": 500.0}, "no law of cell sizes"),
        ({"n_genes": [3, 4]}, r"n_genes must be one number, or one for each of 3 cells, got shape \(2,\)"),
        ({"n_genes": 3, "library_size": [9.0]}, r"library_size must be one number, .* got shape \(1,\)"),
        ({"n_genes": 3, "library_size": 0.0}, "must be 3 positive numbers"),
        ({"n_genes": 121}, "n_genes=121 is more than the 120 genes of the vocabulary"),
        ({"n_genes": 3, "stepz": 5}, "Generation has no setting 'stepz'. Settings: steps"),
        ({"n_genes": 3, "remask": "quality"}, "This model has no quality head"),
        (
            {"n_genes": 3, "guidance_scale": 2.0},
            "guidance_scale=2 came, and this network was trained without",
        ),
    ],
)
def test_new_cells_that_cannot_be_are_refused(model, tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate_cells(3, model=model, tokenizer=tokenizer, **arguments)


@pytest.mark.parametrize("given", [{"library_size": 500.0}, {"n_genes": 5}])
def test_sizes_are_given_or_those_of_real_cells(how, adata, given):
    with pytest.raises(ValueError, match="like gives library sizes and numbers of genes"):
        generate_cells(3, like=adata, **given, **how)


def test_shares_and_numbers_that_cannot_be_are_refused(how, adata):
    for strength in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"strength must lie in \[0, 1\] .*, got"):
            denoise_cells(adata, strength=strength, **how)
    with pytest.raises(
        ValueError, match=r"Cell \d+ has \d+ genes and n_genes=20 are wanted; given genes stay"
    ):
        complete_cells(adata, n_genes=20, **how)
    with pytest.raises(ValueError, match=r"no law of cell sizes. Pass n_genes"):
        complete_cells(adata, **how)


def test_other_models_tokenizers_and_paths_are_refused(how, model, adata):
    other = synthetic_tokenizer(synthetic_cells(n_cells=80, n_genes=119, seed=2), max_genes=48)
    same_size = synthetic_tokenizer(synthetic_cells(n_cells=200, n_genes=120, seed=1), max_genes=48)
    calls = [
        lambda **options: generate_cells(2, n_genes=3, **options),
        lambda **options: denoise_cells(adata, strength=0.5, **options),
        lambda **options: complete_cells(adata, n_genes=48, **options),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="The tokenizer has 124 tokens and the model 125"):
            call(model=model, tokenizer=other)
        with pytest.raises(ValueError, match="the same token would be another gene"):
            call(model=model, tokenizer=same_size)
        with pytest.raises(TypeError, match="got ScDivaModel, which has no gene head"):
            call(model=model.model, tokenizer=how["tokenizer"])
    message = r"got a path \(cells.h5ad\); open it with anndata\.read_h5ad"
    with pytest.raises(TypeError, match=message):
        generate_cells(2, like="cells.h5ad", **how)
    with pytest.raises(TypeError, match=message):
        denoise_cells("cells.h5ad", strength=0.5, **how)
    with pytest.raises(TypeError, match=message):
        complete_cells("cells.h5ad", n_genes=48, **how)
