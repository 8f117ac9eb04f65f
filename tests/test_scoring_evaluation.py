"""Protocols of scoring: spoilt cells, likelihoods by file, beside scVI, exact, and of two objectives.

Needs: both packages; the eval-full extra for scVI, skipped without; no real data, no GPU.
Run: python -m pytest tests/test_scoring_evaluation.py
"""

import json

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_matrix
from scipy.stats import poisson

from modeling_scdiva.evaluation import format_result, likelihood, write_result
from modeling_scdiva.evaluation.likelihood import (
    GENES_PER_STEP,
    compare_objectives,
    evaluate_exact,
    evaluate_files,
    evaluate_scvi,
    masked_scores,
    nll_numbers,
    reading_of,
)
from modeling_scdiva.evaluation.scoring import (
    PER_CELL,
    PER_TOKEN,
    evaluate_scoring,
    spoilt_cells,
    vocabulary_cells,
)
from modeling_scdiva.metrics import scvi_baselines
from modeling_scdiva.metrics.scvi_baselines import has_scvi, scvi_marginal_nll
from modeling_scdiva.size_law_scdiva import fit_size_law
from modeling_scdiva.tasks import score_cells
from tokenization_scdiva import CellCorpus, CorpusSettings, build_corpus, corpus_loader, synthetic_cells
from tokenization_scdiva.corpus import corpus_conditions

DETECTORS = {"depth, both sides", "PCA residual", "distance to the nearest cells"}
SPOILT = ["genes shuffled", "doublets", "ambient molecules", "thinned"]


@pytest.fixture(scope="module")
def cells():
    return synthetic_cells(n_cells=100, n_genes=120, seed=4)


@pytest.fixture(scope="module")
def splits(corpus_folder, tokenizer):
    """Training and held-out split of the corpus."""
    settings = tokenizer.ranking_settings
    return {
        split: CellCorpus(corpus_folder, split, ranking_settings=settings)
        for split in ("train", "validation")
    }


@pytest.fixture(scope="module")
def held_out(splits, tokenizer):
    return splits["validation"].to_anndata(range(len(splits["validation"])), tokenizer)


@pytest.fixture(scope="module")
def model(fresh_tiny_model, splits):
    model = fresh_tiny_model()
    size_law = splits["train"].size_law(48)
    model.generation_config = model.generation_config.updated(size_law=size_law)
    return model


@pytest.fixture
def how(model, tokenizer):
    return {"model": model, "tokenizer": tokenizer, "n_draws": 4}


def written(result, tmp_path):
    """The result as its file has it."""
    path = write_result(result, tmp_path / "result.json", "some", {}, ["run"])
    return json.loads(path.read_text("utf-8"))


# --- cells of a corpus ---


def test_cells_of_a_corpus_are_those_of_its_files(splits, tokenizer, cell_files):
    files = {name: anndata.read_h5ad(path) for name, path in cell_files.items()}
    corpus = splits["validation"]
    rows = [3, 0, len(corpus) - 1, 11]
    taken = corpus.to_anndata(rows, tokenizer)
    assert taken.obs_names.tolist() == [f"cell_{row}" for row in rows]
    assert taken.var_names.tolist() == tokenizer.vocabulary.gene_ids[5:]
    assert taken.var["gene_symbols"].tolist() == tokenizer.vocabulary.gene_symbols[5:]
    assert set(taken.obs["dataset"]) == {"first", "second"}
    for row in range(4):
        said = taken.obs.iloc[row]
        source = files[said["dataset"]][int(said["cell_index"])]
        assert said["cell_type"] == source.obs["cell_type"].iloc[0]
        assert said["library_size"] == source.X.sum()
        counts = pd.Series(taken.X[row].toarray().ravel(), index=taken.var_names)
        assert counts[source.var_names].tolist() == source.X.toarray().ravel().tolist()
        assert counts.sum() == source.X.sum()  # and nothing elsewhere


def test_sizes_and_conditions_are_those_of_the_training_cells(splits, corpus_folder, tokenizer, cell_files):
    corpus = splits["train"]
    taken = corpus.to_anndata(range(len(corpus)), tokenizer)
    lengths = np.minimum(np.diff(taken.X.indptr), 48)
    sizes = taken.obs["library_size"].to_numpy()
    assert corpus.size_law(48) == fit_size_law(lengths, sizes, max_genes=48, target_sum=1e4)
    found = corpus_conditions(corpus_folder, ["library_size", "cell_type"], n_depth_classes=4)
    assert found["cell_type"] == ["type_0", "type_1", "type_2", "type_3"]
    assert found["library_size"] == np.quantile(sizes, [0.25, 0.5, 0.75]).tolist()
    with pytest.raises(
        KeyError, match=r"no column 'donor_id' for the conditions .*; it kept 'cell_type', 'lib"
    ):
        corpus_conditions(corpus_folder, ["donor_id"])


def test_a_corpus_of_log_values_has_no_counts_to_take(tokenizer, tmp_path):
    adata = synthetic_cells(n_cells=40, n_genes=120, seed=1)
    adata.X = csr_matrix(
        np.log1p(1e4 * adata.X.toarray() / np.asarray(adata.X.sum(axis=1))), dtype=np.float32
    )
    adata.obs["empty"] = ""
    adata.write_h5ad(tmp_path / "log.h5ad")
    settings = CorpusSettings(n_shards=1, expression_is_log1p=True, obs_keys=("empty",))
    build_corpus(
        {"log": tmp_path / "log.h5ad"}, tmp_path, tokenizer=tokenizer, settings=settings, show_progress=False
    )
    corpus = CellCorpus(tmp_path, "train", ranking_settings=tokenizer.ranking_settings)
    assert corpus.size_law(48)["library_size_edges"] is None
    with pytest.raises(ValueError, match="holds log1p values; an AnnData of counts cannot be made from it"):
        corpus.to_anndata([0], tokenizer)
    with pytest.raises(
        ValueError, match=r"No training cell of .* has an entry in 'empty'. Leave this condition"
    ):
        corpus_conditions(tmp_path, ["empty"])


# --- spoilt cells ---


def test_cells_are_cut_to_the_vocabulary(cells, tokenizer):
    foreign = cells.copy()
    foreign.var_names = [
        f"foreign_{gene}" if gene < 80 else name for gene, name in enumerate(cells.var_names)
    ]
    foreign.var = foreign.var[[]]
    counts = foreign.X.toarray()
    counts[3, 80:] = 0
    foreign.X = csr_matrix(counts)
    kept = vocabulary_cells(foreign, tokenizer)
    assert kept.var_names.tolist() == cells.var_names[80:].tolist()
    assert kept.n_obs == 99
    assert "cell_3" not in kept.obs_names
    np.testing.assert_array_equal(kept.X.toarray(), np.delete(counts, 3, axis=0)[:, 80:])
    assert kept.obs["cell_type"].tolist() == foreign.obs["cell_type"].drop("cell_3").tolist()


def test_cells_of_another_file_are_seen_through_the_genes_of_the_first(cells, tokenizer):
    """Other order, other names, a gene too few and one too many."""
    normal = vocabulary_cells(cells[:, :90].copy(), tokenizer)
    other = cells[:, [*range(100, 20, -1), 5, 3]].copy()
    other.var_names = other.var["gene_symbols"].astype(str)
    other.layers["counts"] = other.X.copy()
    other.X = other.X.log1p()
    kept = vocabulary_cells(other, tokenizer, like=normal)
    assert kept.var_names.tolist() == normal.var_names.tolist()
    expected = cells.X[:, :90].toarray()
    expected[:, [place for place in range(21) if place not in (3, 5)]] = 0
    np.testing.assert_array_equal(kept.X.toarray(), expected)
    whole = cells.copy()
    whole.raw = cells[:, ::-1].copy()  # not what is taken
    np.testing.assert_array_equal(vocabulary_cells(whole, tokenizer).X.toarray(), cells.X.toarray())


def test_spoilt_cells_are_as_many_and_of_the_stated_depth(cells):
    made = spoilt_cells(cells, np.random.default_rng(1))
    assert list(made) == SPOILT
    before = np.asarray(cells.X.sum(axis=1)).ravel()
    sums = {kind: np.asarray(group.X.sum(axis=1)).ravel() for kind, group in made.items()}
    assert {kind: len(group) for kind, group in sums.items()} == dict.fromkeys(SPOILT, 100)
    assert sums["genes shuffled"].tolist() == before.tolist()
    assert sums["ambient molecules"].mean() == pytest.approx(before.mean(), rel=0.02)
    assert sums["thinned"].sum() == pytest.approx(0.5 * before.sum(), rel=0.02)
    assert set(sums["doublets"]) <= set(before)


def test_scores_stand_beside_detectors(cells, how, tmp_path):
    other = synthetic_cells(n_cells=30, n_genes=120, seed=77)[:, 110::-1].copy()
    result = evaluate_scoring(
        cells, name="toy", max_test_cells=16, seed=3, others={"another study": other}, **how
    )
    numbers = {(row["data"], row["method"]): row for row in result["numbers"]}
    baselines = {(row["data"], row["method"]): row for row in result["baselines"]}
    kinds = [*SPOILT, "another study"]
    assert set(numbers) == {(f"toy: {kind}", method) for kind in kinds for method in (PER_CELL, PER_TOKEN)}
    assert set(baselines) == {
        *((f"toy: {kind}", method) for kind in kinds for method in DETECTORS),
        ("toy: doublets", "Scrublet"),
    }
    for row in [*numbers.values(), *baselines.values()]:
        assert row["auroc_low"] <= row["auroc"] <= row["auroc_high"]
        assert row["n_normal"] == row["n_abnormal"] == 16
    # Depth is blind to an exchange of genes, others are not; thinned cells have fewer nats and are shallow.
    assert baselines["toy: genes shuffled", "depth, both sides"]["auroc"] == 0.5
    assert baselines["toy: genes shuffled", "PCA residual"]["auroc"] > 0.9
    assert baselines["toy: another study", "distance to the nearest cells"]["auroc"] > 0.9
    assert numbers["toy: thinned", PER_CELL]["auroc"] < 0.4
    assert baselines["toy: thinned", "depth, both sides"]["auroc"] > 0.6
    details = result["details"]
    assert set(details["nll_per_cell"]) == set(details["nll_per_token"]) == {"normal", *kinds}
    assert details["nll_per_cell"]["thinned"]["mean"] < details["nll_per_cell"]["normal"]["mean"]
    assert details["nll_per_cell"]["normal"]["n_cells"] == 16
    assert details["nll_per_cell"]["normal"]["standard_error"] > 0
    assert "toy: doublets" in format_result(result)
    assert len(written(result, tmp_path)["numbers"]) == 10


def test_normal_cells_are_scored_as_they_are(cells, how, tokenizer):
    """The normal cells of a protocol, scored alone, have the same numbers."""
    result = evaluate_scoring(cells, max_test_cells=50, seed=0, **how)
    order = np.random.default_rng(0).permutation(100)[:50]
    table = score_cells(cells[np.sort(order)].copy(), seed=0, **how)
    summary = result["details"]["nll_per_token"]["normal"]
    assert summary["mean"] == pytest.approx(table["scdiva_nll_per_token"].mean())
    assert summary["standard_error"] == pytest.approx(table["scdiva_nll_per_token"].sem())


def test_cells_that_lose_every_molecule_are_left_out(cells, how):
    counts = np.random.default_rng(0).binomial(cells.X.toarray().astype(int), 0.005)
    counts[counts.sum(axis=1) == 0, 0] = 1
    shallow = anndata.AnnData(csr_matrix(counts.astype(np.float32)), var=cells.var.copy())
    result = evaluate_scoring(shallow, max_test_cells=40, **how)
    assert result["details"]["scrublet_left_out"]
    rows = {(row["data"], row["method"]): row for row in result["numbers"]}
    thinned = rows["cells: thinned", PER_CELL]
    assert thinned["n_normal"] == 40
    assert 20 < thinned["n_abnormal"] < 40
    assert rows["cells: genes shuffled", PER_CELL]["n_abnormal"] == 40


def test_few_cells_are_refused(cells, how):
    with pytest.raises(ValueError, match="on 40 cells at least, half of them to fit detectors, got 39"):
        evaluate_scoring(cells[:39].copy(), **how)
    logged = cells.copy()
    logged.X = logged.X.log1p()
    with pytest.raises(ValueError, match=r"X does not hold"):
        evaluate_scoring(logged, **how)


# --- likelihoods ---


def test_numbers_of_a_table_by_hand():
    table = pd.DataFrame(
        {
            "scdiva_nll": [30.0, 10.0, 20.0],
            "scdiva_n_tokens": [10, 2, 8],
            "scdiva_gene_nll": [20.0, 5.0, 10.0],
            "scdiva_value_nll": [8.0, 4.0, 8.0],
            "scdiva_nll_standard_error": [1.0, 0.4, 0.8],
            "scdiva_is_truncated": [True, False, True],
        }
    )
    assert nll_numbers(table) == pytest.approx(
        {
            "nll_per_cell": 20.0,
            "nll_per_cell_error": 10.0 / 3**0.5,
            "nll_per_token": 3.0,
            "gene_nll_per_token": 1.75,
            "value_nll_per_token": 1.0,
            "draw_error_per_token": 0.1,
            "truncated_share": 2 / 3,
            "n_cells": 3,
        }
    )
    one = nll_numbers(table[:1].assign(scdiva_value_nll=np.nan))
    assert one["nll_per_cell_error"] is None
    assert one["value_nll_per_token"] is None


def test_each_file_has_its_likelihood(held_out, how, tokenizer, tmp_path):
    result = evaluate_files(held_out, seed=2, **how)
    assert [row["data"] for row in result["numbers"]] == ["first", "second"]
    for row, uniform in zip(result["numbers"], result["baselines"], strict=True):
        group = held_out[held_out.obs["dataset"] == row["data"]].copy()
        table = score_cells(group, seed=2, **how, **reading_of(group))
        assert row == {"data": row["data"], "method": "scDiVa"} | nll_numbers(table)
        lengths = table["scdiva_n_tokens"]
        by_hand = sum(np.log(120 - place) for length in lengths for place in range(length)) / lengths.sum()
        assert uniform["gene_nll_per_token"] == pytest.approx(by_hand)
        # Random weights know no more than the uniform law, beside what the order of genes leaves possible.
        assert row["gene_nll_per_token"] < by_hand - 0.1
        free = nll_numbers(score_cells(group, seed=2, rank_consistent=False, **how, **reading_of(group)))
        assert free["gene_nll_per_token"] == pytest.approx(by_hand, abs=0.2)
        assert table["scdiva_library_size"].tolist() == group.obs["library_size"].tolist()
    assert sum(row["n_cells"] for row in result["numbers"]) == held_out.n_obs
    assert written(result, tmp_path)["columns"] == list(result["columns"])


def test_exact_likelihoods_of_samplers(held_out, how, tokenizer, tmp_path):
    some = held_out[:5].copy()
    result = evaluate_exact(some, batch_size=2, **how)
    inputs = dict(tokenizer.encode_anndata(some, **reading_of(some)))
    inputs["size_factors"] = torch.from_numpy(some.obs["library_size"].to_numpy() / 1e4)
    bounded = {"rank_consistent": True, "ranking_weights": tokenizer.ranking_weights}
    rows = {row["data"]: row for row in result["numbers"]}
    assert len(rows) == 2 * len(GENES_PER_STEP) == 8
    for order in ("rank", "margin"):
        for n_genes in (1, 19):
            exact = how["model"].exact_nll(**inputs, **bounded, order=order, tokens_per_step=n_genes)
            row = rows[f"{order} order, {n_genes} at a step"]
            n_tokens = float(exact.n_tokens.sum())
            assert row["nll_per_token"] == pytest.approx(float(exact.nll.sum()) / n_tokens, rel=1e-5)
            assert row["gene_nll_per_token"] == pytest.approx(
                float(exact.gene_nll.sum()) / n_tokens, rel=1e-5
            )
            assert row["value_nll_per_token"] == pytest.approx(
                float(exact.value_nll.sum()) / n_tokens, rel=1e-5
            )
            assert row["n_cells"] == 5
    bound = how["model"].compute_nll(**inputs, **bounded, n_draws=4)
    (baseline,) = result["baselines"]
    assert baseline["nll_per_token"] == pytest.approx(float(bound.nll.sum() / bound.n_tokens.sum()), rel=1e-5)
    assert len({round(row["nll_per_token"], 9) for row in rows.values()}) == 8  # every sampler has its own
    assert written(result, tmp_path)["title"] == "Exact likelihood of samplers"


@pytest.mark.parametrize("is_sparse", [True, False])
def test_scores_at_hidden_positions_by_a_loop(fresh_tiny_model, corpus_folder, tokenizer, is_sparse):
    model = fresh_tiny_model(sparse_prediction=is_sparse, initializer_range=0.2)
    loader = list(corpus_loader(corpus_folder, "validation", tokenizer=tokenizer, batch_size=8))
    scores = masked_scores(model, loader)
    accuracies, errors = [], []
    for batch in loader:
        with torch.no_grad():
            outputs = model(
                **{name: batch[name] for name in batch if name != "timestep"}, output_all_logits=True
            )
        for cell, labels in enumerate(batch["labels"]):
            places = labels != -100
            if not places.any():
                continue
            accuracies.append((outputs.logits[cell].argmax(dim=1) == labels)[places].double().mean())
            distance = outputs.expression_predictions[cell] - batch["expression_labels"][cell]
            errors.append(distance[places].double().square().mean())
    assert scores["accuracy"] == pytest.approx(float(torch.stack(accuracies).mean()))
    assert scores["value_mse"] == pytest.approx(float(torch.stack(errors).mean()), rel=1e-5)
    assert 0 < scores["accuracy"] < 0.2


def test_objectives_share_cells_and_masks(fresh_tiny_model, corpus_folder, held_out, model, how, tmp_path):
    elbo = fresh_tiny_model(objective="elbo")
    elbo.generation_config = model.generation_config
    loader = corpus_loader(
        corpus_folder, "validation", tokenizer=how["tokenizer"], batch_size=8, objective="elbo"
    )
    result = compare_objectives({"elbo": elbo, "paper": model}, loader, held_out, **how)
    (row,), (other,) = result["numbers"], result["baselines"]
    assert (row["method"], other["method"]) == ("elbo", "paper")
    batches = list(loader)
    for entry, network in ((row, elbo), (other, model)):
        table = score_cells(held_out, **(how | {"model": network}), **reading_of(held_out))
        expected = nll_numbers(table) | masked_scores(network, batches)
        assert {key: entry[key] for key in expected} == expected
    # A law whose width is fixed beforehand says less of counts than one that starts wide.
    assert row["value_nll_per_token"] < other["value_nll_per_token"]
    assert written(result, tmp_path)["baselines"][0]["method"] == "paper"


def test_the_bound_beside_another_likelihood(held_out, splits, model, how, tokenizer, monkeypatch, tmp_path):
    """Arithmetic of the protocol; what scVI says is replaced by two nats a gene."""
    training = splits["train"].to_anndata(range(40), tokenizer)
    asked = []

    def two_nats_a_gene(training_counts, counts, *, seed):
        asked.append((training_counts.shape, seed))
        return 2.0 * np.diff(csr_matrix(counts).indptr)

    monkeypatch.setattr(likelihood, "scvi_marginal_nll", two_nats_a_gene)
    result = evaluate_scvi(training, held_out, seed=5, **how)
    lengths = np.diff(held_out.X.indptr)
    fitting = held_out[lengths <= 48].copy()
    assert 0 < fitting.n_obs < held_out.n_obs
    assert asked == [((40, 120), 5)]
    table = score_cells(fitting, seed=5, **how, **reading_of(fitting))
    assert not table["scdiva_is_truncated"].any()
    (row,), (scvi,) = result["numbers"], result["baselines"]
    assert row["nll_per_cell"] == pytest.approx(table["scdiva_nll"].mean())
    nats = 2.0 * lengths[lengths <= 48]
    assert scvi["nll_per_cell"] == pytest.approx(nats.mean())
    assert scvi["nll_per_cell_error"] == pytest.approx(nats.std(ddof=1) / len(nats) ** 0.5)
    assert scvi["n_cells"] == row["n_cells"] == fitting.n_obs
    difference = table["scdiva_nll"] - nats
    assert result["details"]["mean_difference"] == pytest.approx(difference.mean())
    assert result["details"]["difference_error"] == pytest.approx(difference.sem())
    assert result["details"]["n_training"] == 40
    assert written(result, tmp_path)["title"] == "Likelihood beside scVI"


# --- scVI ---


@pytest.mark.slow
@pytest.mark.skipif(not has_scvi(), reason="scvi-tools is not installed: scdiva[eval-full]")
def test_scvi_learns_a_likelihood():
    cells = synthetic_cells(n_cells=240, n_genes=60, seed=2)
    training, new = cells.X[:200], cells.X[200:]
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    short, long = (
        scvi_marginal_nll(training, new, max_epochs=n_epochs, n_samples=50, seed=1) for n_epochs in (1, 60)
    )
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert short.shape == long.shape == (40,)
    assert long.dtype == np.float64
    assert long.mean() < short.mean()
    # Its counts are mixtures of Poisson laws: none gives a cell more than the law at the cell's own counts.
    own = poisson.logpmf(new.toarray(), np.maximum(new.toarray(), 1e-9)).sum(axis=1)
    assert (long > -own).all()


def test_without_the_library_one_reads_what_to_install(cells, monkeypatch):
    monkeypatch.setattr(scvi_baselines, "has_scvi", lambda: False)
    with pytest.raises(ImportError, match=r'pip install "scdiva\[eval-full\]"'):
        scvi_marginal_nll(cells.X, cells.X)
