"""Scores of cells: likelihoods, surprisal gene by gene, labels by Bayes' rule, and refusals.

Needs: both packages; no files, no GPU.
Run: python -m pytest tests/test_scoring_task.py
"""

import anndata
import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix, hstack
from scipy.special import log_softmax

from modeling_scdiva.fresh_model import fresh_model
from modeling_scdiva.size_law_scdiva import fit_size_law, length_log_prob
from modeling_scdiva.tasks import gene_surprisal, score_cells, score_labels
from modeling_scdiva.tasks.cells import read_cells
from tokenization_scdiva import ScDivaTokenizer, synthetic_cells, synthetic_tokenizer

TYPES = ["type_0", "type_1", "type_2", "type_3"]
PARTS = ["scdiva_gene_nll", "scdiva_value_nll", "scdiva_length_nll"]


@pytest.fixture(scope="module")
def adata():
    return synthetic_cells(n_cells=20, n_genes=120, seed=9)


@pytest.fixture(scope="module")
def sizes(adata):
    return np.asarray(adata.X.sum(axis=1)).ravel().astype(np.float64)


@pytest.fixture(scope="module")
def logged(adata, sizes):
    values = csr_matrix(np.log1p(1e4 * adata.X.toarray() / sizes[:, None]).astype(np.float32))
    return anndata.AnnData(values, obs=adata.obs.copy(), var=adata.var.copy())


@pytest.fixture(scope="module")
def size_law(adata, sizes):
    lengths = np.minimum(np.diff(adata.X.indptr), 48)
    return fit_size_law(lengths, sizes, max_genes=48, target_sum=1e4, n_depth_classes=3)


@pytest.fixture(scope="module")
def model(fresh_tiny_model, size_law):
    # Weights wide enough that every gene has a law of its own.
    model = fresh_tiny_model(initializer_range=0.2, objective="elbo", hidden_dropout=0.3)
    model.generation_config = model.generation_config.updated(size_law=size_law)
    return model


@pytest.fixture(scope="module")
def conditional(fresh_tiny_model):
    conditions = {"cell_type": TYPES, "library_size": [400.0, 700.0]}
    return fresh_tiny_model(initializer_range=0.2, objective="elbo", conditions=conditions)


@pytest.fixture
def how(model, tokenizer):
    return {"model": model, "tokenizer": tokenizer, "n_draws": 6}


def inputs_of(adata, sizes, tokenizer):
    """What the network takes, by the tokenizer's own layout, with genes kept between their neighbours."""
    depth = {"size_factors": torch.from_numpy(sizes / tokenizer.target_sum)}
    bounds = {"rank_consistent": True, "ranking_weights": tokenizer.ranking_weights}
    return dict(tokenizer.encode_anndata(adata)) | depth | bounds


# --- cells ---


def test_scores_are_those_of_the_network_on_the_same_tokens(how, adata, sizes, tokenizer, size_law):
    table = score_cells(adata, seed=3, batch_size=7, **how)
    detected = np.diff(adata.X.indptr)
    scored = how["model"].compute_nll(
        **inputs_of(adata, sizes, tokenizer),
        n_genes_detected=torch.from_numpy(detected),
        n_draws=6,
        batch_size=7,
        seed=3,
    )
    for name in ("nll", "gene_nll", "value_nll", "length_nll"):
        np.testing.assert_allclose(table[f"scdiva_{name}"], getattr(scored, name).numpy(), rtol=1e-12)
    np.testing.assert_allclose(table["scdiva_nll_standard_error"], scored.standard_error.numpy(), rtol=1e-12)
    assert (table["scdiva_nll_standard_error"] > 0).all()
    lengths = np.minimum(detected, 48)
    assert table["scdiva_n_tokens"].tolist() == lengths.tolist()
    assert table["scdiva_n_genes_detected"].tolist() == detected.tolist()
    assert table["scdiva_library_size"].tolist() == sizes.tolist()
    assert table["scdiva_is_truncated"].tolist() == (detected > 48).tolist()
    assert 0 < table["scdiva_is_truncated"].sum() < 20
    np.testing.assert_allclose(table["scdiva_length_nll"], -length_log_prob(size_law, lengths, sizes))
    np.testing.assert_allclose(table["scdiva_nll"], table[PARTS].sum(axis=1))
    np.testing.assert_allclose(table["scdiva_nll_per_token"], table["scdiva_nll"] / lengths)


def test_scores_join_the_cells_and_can_be_written(how, adata, tmp_path):
    cells = adata[::-1].copy()
    table = score_cells(cells, **how)
    assert table.index.equals(cells.obs_names)
    cells.obs = cells.obs.join(table)
    cells.write_h5ad(tmp_path / "scored.h5ad")
    found = anndata.read_h5ad(tmp_path / "scored.h5ad").obs
    assert found["scdiva_nll"].tolist() == table["scdiva_nll"].tolist()
    assert found["scdiva_is_truncated"].dtype == bool
    assert found["cell_type"].tolist() == cells.obs["cell_type"].tolist()


def test_draws_follow_the_seed_and_not_the_batches(how, adata):
    first = score_cells(adata, seed=1, batch_size=32, **how)
    np.testing.assert_allclose(
        first["scdiva_nll"], score_cells(adata, seed=1, batch_size=5, **how)["scdiva_nll"]
    )
    assert (first["scdiva_nll"] != score_cells(adata, seed=2, **how)["scdiva_nll"]).all()


def test_the_mode_of_the_model_comes_back(how, adata):
    how["model"].train()
    first, second = (score_cells(adata, **how) for _ in range(2))
    assert how["model"].training
    assert first.equals(second)  # dropout was off


def test_genes_outside_the_vocabulary_count_for_depth_alone(how, adata, sizes):
    foreign = csr_matrix(np.full((20, 1), 100.0, dtype=np.float32))
    names = [*adata.var_names, "not_a_gene"]
    more = anndata.AnnData(csr_matrix(hstack([adata.X, foreign])), obs=adata.obs.copy())
    more.var_names = names
    table = score_cells(more, **how)
    assert table["scdiva_library_size"].tolist() == (sizes + 100).tolist()
    assert table["scdiva_n_genes_detected"].tolist() == np.diff(adata.X.indptr).tolist()
    given = score_cells(adata, library_size=sizes + 100, **how)
    np.testing.assert_allclose(given["scdiva_nll"], table["scdiva_nll"])


def test_a_lower_cut_is_said(how, adata):
    table = score_cells(adata, max_genes=10, **how)
    assert (table["scdiva_n_tokens"] == 10).all()
    assert table["scdiva_n_genes_detected"].tolist() == np.diff(adata.X.indptr).tolist()
    assert table["scdiva_is_truncated"].all()
    with pytest.raises(ValueError, match="max_genes must be at least 1, got 0"):
        score_cells(adata, max_genes=0, **how)


def test_cells_are_cut_by_hand(adata, tokenizer):
    cells = read_cells(adata, tokenizer=tokenizer)
    short = cells.cut(3)
    for cell in range(20):
        start, kept = cells.offsets[cell], slice(short.offsets[cell], short.offsets[cell + 1])
        assert short.token_ids[kept].tolist() == cells.token_ids[start : start + 3].tolist()
        assert short.values[kept].tolist() == cells.values[start : start + 3].tolist()
    direct = read_cells(adata, tokenizer=tokenizer, max_genes=20)
    assert (direct.n_genes < 48).all()
    for name in ("offsets", "token_ids", "values", "library_size"):
        np.testing.assert_array_equal(getattr(cells.cut(20), name), getattr(direct, name))
    assert cells.cut(48).n_genes.tolist() == cells.n_genes.tolist()


def test_parts_that_are_left_out_are_nan(fresh_tiny_model, how, adata, logged):
    plain = score_cells(adata, **(how | {"model": fresh_tiny_model()}))
    assert plain["scdiva_length_nll"].isna().all()
    np.testing.assert_allclose(plain["scdiva_nll"], plain["scdiva_gene_nll"] + plain["scdiva_value_nll"])
    genes, whole = (score_cells(adata, genes_only=flag, **how) for flag in (True, False))
    assert genes["scdiva_value_nll"].isna().all()
    np.testing.assert_allclose(genes["scdiva_gene_nll"], whole["scdiva_gene_nll"])
    np.testing.assert_allclose(genes["scdiva_nll"], genes[PARTS[0]] + genes[PARTS[2]])
    # Which genes fit between two neighbours is a matter of whole counts, which log values have not.
    from_logs = score_cells(logged, genes_only=True, expression_is_log1p=True, **how)
    free = score_cells(adata, genes_only=True, rank_consistent=False, **how)
    np.testing.assert_allclose(from_logs["scdiva_gene_nll"], free["scdiva_gene_nll"], rtol=1e-4)
    assert from_logs["scdiva_library_size"].isna().all()


def test_genes_that_cannot_stand_between_their_neighbours_are_left_out(how, adata, sizes, tokenizer):
    bounded, free = score_cells(adata, **how), score_cells(adata, rank_consistent=False, **how)
    plain = inputs_of(adata, sizes, tokenizer) | {"rank_consistent": False}
    np.testing.assert_allclose(free["scdiva_nll"], how["model"].compute_nll(**plain, n_draws=6).nll.numpy())
    for part in PARTS[:2]:
        assert (bounded[part] < free[part]).all()
    assert (bounded[PARTS[2]] == free[PARTS[2]]).all()


def test_cells_without_an_order_have_scores(fresh_tiny_model, tokenizer, adata, sizes):
    unordered = ScDivaTokenizer(vocabulary=tokenizer.vocabulary, max_genes=48, gene_order="random")
    model = fresh_tiny_model()
    table = score_cells(adata, model=model, tokenizer=unordered, n_draws=3)
    plain = inputs_of(adata, sizes, unordered) | {"rank_consistent": False}
    np.testing.assert_allclose(table["scdiva_nll"], model.compute_nll(**plain, n_draws=3).nll.numpy())
    assert table["scdiva_n_tokens"].tolist() == np.minimum(np.diff(adata.X.indptr), 48).tolist()


def test_conditions_are_what_the_likelihood_is_given(conditional, tokenizer, adata, sizes):
    how = {"model": conditional, "tokenizer": tokenizer, "n_draws": 4}
    depth = 1 + np.searchsorted([400, 700], sizes, side="right")
    codes = 1 + np.arange(20) % 4
    for conditions, first in (
        ({"cell_type": adata.obs["cell_type"]}, codes),
        ({}, np.zeros(20)),
        (None, 0 * codes),
    ):
        table = score_cells(adata, conditions=conditions, **how)
        ids = torch.from_numpy(np.stack([first, depth], axis=1)).long()
        scored = conditional.compute_nll(**inputs_of(adata, sizes, tokenizer), condition_ids=ids, n_draws=4)
        np.testing.assert_allclose(table["scdiva_nll"], scored.nll.numpy(), rtol=1e-12)
    open_depth = score_cells(adata, conditions={"library_size": None}, **how)
    assert (open_depth["scdiva_nll"] != table["scdiva_nll"]).all()


# --- genes ---


def test_surprisal_stands_at_the_genes_of_each_cell(how, adata, sizes, tokenizer):
    nats = gene_surprisal(adata, seed=2, **(how | {"n_draws": 30}))
    inputs = inputs_of(adata, sizes, tokenizer)
    wanted = how["model"].compute_nll(**inputs, n_draws=30, seed=2, genes_only=True, per_gene=True)
    assert nats.shape == (20, 120)
    assert nats.dtype == np.float32
    ids = inputs["input_ids"].numpy()
    assert np.diff(nats.indptr).tolist() == (ids >= 5).sum(axis=1).tolist()
    dense = nats.toarray()
    for cell in range(20):
        places = np.flatnonzero(ids[cell] >= 5)
        surprisal = wanted.gene_surprisal[cell].numpy()[places]
        np.testing.assert_allclose(dense[cell, ids[cell, places] - 5], surprisal, rtol=1e-6)
        assert np.isfinite(surprisal).all()
        assert (surprisal >= 0).all()
        assert surprisal.mean() > 1
    # A column is a gene of the vocabulary.
    column = tokenizer.vocabulary.gene_ids[5:].index(adata.var_names[7])
    is_token = (ids == tokenizer.vocabulary.gene_token_ids[adata.var_names[7]]).any(axis=1)
    stored = nats.tocsc()
    assert (
        sorted(stored.indices[stored.indptr[column] : stored.indptr[column + 1]])
        == np.flatnonzero(is_token).tolist()
    )
    assert 0 < is_token.sum() < 20


def test_genes_that_no_draw_hid_have_no_surprisal(how, adata, logged):
    options = how | {"n_draws": 2, "rank_consistent": False}
    nats = gene_surprisal(adata, **options)
    is_unknown = np.isnan(nats.data)
    assert 0 < is_unknown.sum() < nats.nnz / 2
    assert (nats.data[~is_unknown] > 0).all()
    from_logs = gene_surprisal(logged, expression_is_log1p=True, **options)
    np.testing.assert_allclose(from_logs.data, nats.data, rtol=1e-3)


# --- labels ---


def test_labels_by_bayes_rule(conditional, tokenizer, adata):
    how = {"model": conditional, "tokenizer": tokenizer, "n_draws": 5, "seed": 4, "batch_size": 20}
    table = score_labels(adata, condition="cell_type", **how)
    assert list(table.columns) == TYPES
    assert table.index.equals(adata.obs_names)
    np.testing.assert_allclose(np.exp(table).sum(axis=1), 1.0)
    nats = [score_cells(adata, conditions={"cell_type": name}, **how)["scdiva_nll"] for name in TYPES]
    np.testing.assert_allclose(table, log_softmax(-np.stack(nats, axis=1), axis=1), rtol=1e-9, atol=1e-9)
    two = score_labels(adata, condition="cell_type", labels=["type_3", "type_1"], **how)
    assert list(two.columns) == ["type_3", "type_1"]
    np.testing.assert_allclose(two["type_3"] - two["type_1"], table["type_3"] - table["type_1"], atol=1e-6)


def test_labels_need_no_counts(conditional, tokenizer, logged):
    how = {"model": conditional, "tokenizer": tokenizer, "n_draws": 3, "expression_is_log1p": True}
    table = score_labels(logged, condition="cell_type", **how)
    options = how | {"genes_only": True}
    nats = [score_cells(logged, conditions={"cell_type": name}, **options)["scdiva_nll"] for name in TYPES]
    np.testing.assert_allclose(table, log_softmax(-np.stack(nats, axis=1), axis=1), atol=1e-9)


def cells_of_two_types(n_cells, seed):
    """Cells of which each type expresses a dozen genes of its own."""
    rates = np.zeros((2, 24))
    rates[0, :12] = rates[1, 12:] = np.geomspace(60, 2, 12)
    counts = np.random.default_rng(seed).poisson(rates[np.arange(n_cells) % 2])
    adata = anndata.AnnData(csr_matrix(counts.astype(np.float32)))
    adata.var_names = [f"ENSG{gene:011d}" for gene in range(1, 25)]
    adata.obs["cell_type"] = [f"type_{cell % 2}" for cell in range(n_cells)]
    return adata


def test_a_trained_network_knows_the_type_of_new_cells():
    training, new = cells_of_two_types(100, seed=0), cells_of_two_types(40, seed=1)
    tokenizer = synthetic_tokenizer(training, max_genes=24)
    network = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    network |= {"hidden_dropout": 0.0, "initializer_range": 0.1, "exclude_visible_genes": True}
    network |= {"conditions": {"cell_type": ["type_0", "type_1"]}, "value_head": "gene", "objective": "elbo"}
    model = fresh_model(network | {"max_position_embeddings": 32}, tokenizer)
    cells = read_cells(training, tokenizer=tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    rng = np.random.default_rng(0)
    for _ in range(80):
        rows = rng.integers(100, size=16)
        clean = cells.batch(rows)
        ids = clean["input_ids"]
        is_hidden = torch.from_numpy(rng.random(ids.shape) < rng.random((16, 1))) & (ids > 4)
        loss = model(
            ids.masked_fill(is_hidden, 1),
            clean["expression_values"].masked_fill(is_hidden, 0.0),
            clean["attention_mask"],
            labels=ids.where(is_hidden, -100),
            expression_labels=clean["expression_values"],
            size_factors=torch.from_numpy(cells.library_size[rows] / 1e4),
            condition_ids=torch.from_numpy(1 + rows[:, None] % 2),
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    table = score_labels(new, model=model, tokenizer=tokenizer, condition="cell_type", n_draws=6)
    assert (table.idxmax(axis=1) == new.obs["cell_type"]).all()
    assert (table.max(axis=1) > np.log(0.99)).all()
    # The wrong label makes a cell less likely than none.
    options = {"model": model, "tokenizer": tokenizer, "n_draws": 6}
    right = score_cells(new, conditions={"cell_type": new.obs["cell_type"]}, **options)["scdiva_nll"]
    wrong = score_cells(new, conditions={"cell_type": new.obs["cell_type"].to_numpy()[::-1]}, **options)[
        "scdiva_nll"
    ]
    assert (right < wrong - 10).all()


# --- refusals ---


@pytest.mark.parametrize(
    ("condition", "labels", "error", "message"),
    [
        (
            "tissue",
            None,
            KeyError,
            "no labels of the condition 'tissue'. Conditions with labels: 'cell_type'",
        ),
        ("library_size", None, KeyError, "no labels of the condition 'library_size'"),
        ("cell_type", ["type_1", "B"], ValueError, r"knows no cell_type 'B'. Known: 'type_0', 'type_1'"),
    ],
)
def test_labels_that_the_network_lacks_are_refused(
    conditional, tokenizer, adata, condition, labels, error, message
):
    with pytest.raises(error, match=message):
        score_labels(adata, model=conditional, tokenizer=tokenizer, condition=condition, labels=labels)


def test_conditions_need_a_network_with_conditions(how, conditional, adata):
    with pytest.raises(ValueError, match=r"Conditions came \(cell_type\), and this checkpoint was trained"):
        score_cells(adata, conditions={"cell_type": "type_0"}, **how)
    with pytest.raises(KeyError, match="Conditions with labels: none"):
        score_labels(adata, condition="cell_type", **how)
    options = how | {"model": conditional}
    with pytest.raises(ValueError, match=r"knows no cell_type 'type_7'. Known: 'type_0'"):
        score_cells(adata, conditions={"cell_type": "type_7"}, **options)
    with pytest.raises(KeyError, match=r"no condition 'tissue'. Conditions: 'cell_type', 'library_size'"):
        score_cells(adata, conditions={"tissue": "gut"}, **options)


def test_values_that_are_no_counts_are_scored_by_their_genes_alone(how, logged):
    with pytest.raises(ValueError, match="expression_is_log1p=True"):
        score_cells(logged, **how)
    with pytest.raises(ValueError, match=r"Counts are scored, .* or score genes_only=True"):
        score_cells(logged, expression_is_log1p=True, **how)


def test_one_draw_has_no_error(how, adata):
    with pytest.raises(ValueError, match="n_draws must be at least 2, for a standard error, got 1"):
        score_cells(adata, **(how | {"n_draws": 1}))


def test_other_models_tokenizers_and_paths_are_refused(conditional, tokenizer, adata):
    other = synthetic_tokenizer(synthetic_cells(n_cells=200, n_genes=120, seed=1), max_genes=48)
    for score, more in ((score_cells, {}), (gene_surprisal, {}), (score_labels, {"condition": "cell_type"})):
        with pytest.raises(ValueError, match="the same token would be another gene"):
            score(adata, model=conditional, tokenizer=other, **more)
        with pytest.raises(TypeError, match="got ScDivaModel, which has no gene head"):
            score(adata, model=conditional.model, tokenizer=tokenizer, **more)
        with pytest.raises(TypeError, match=r"got a path \(cells.h5ad\)"):
            score("cells.h5ad", model=conditional, tokenizer=tokenizer, **more)
        with pytest.raises(ValueError, match="The AnnData has no cells"):
            score(adata[:0], model=conditional, tokenizer=tokenizer, **more)
