"""Imputation: what is missing and what is silent, hidden slots, refusals, and the protocol.

Needs: both packages; no files, no GPU.
Run: python -m pytest tests/test_imputation.py
"""

import anndata
import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from modeling_scdiva.evaluation import format_result, write_result
from modeling_scdiva.evaluation.imputation import evaluate_imputation, imputation_figures
from modeling_scdiva.evaluation.imputation_tasks import ScoredCells, entry_task
from modeling_scdiva.metrics.imputation import (
    thin_cells,
)
from modeling_scdiva.tasks.cells import read_cells
from modeling_scdiva.tasks.genes import gene_tokens
from modeling_scdiva.tasks.imputation import decode_cells, impute_expression
from tokenization_scdiva import ScDivaTokenizer, synthetic_cells


@pytest.fixture(scope="module")
def adata() -> anndata.AnnData:
    return synthetic_cells(n_cells=20, n_genes=120, seed=9)


@pytest.fixture(scope="module")
def model(fresh_tiny_model):
    # Weights wide enough that every gene of a cell moves the predictions.
    return fresh_tiny_model(latent_loss_weight=1.0, initializer_range=0.3)


# --- the task ---


def test_layers_of_the_file_by_hand(adata, model, tokenizer):
    """Observed values stay, silent genes get probability times value of the decoder."""
    imputed = impute_expression(adata, model=model, tokenizer=tokenizer, batch_size=6)
    assert imputed.var_names.equals(adata.var_names)
    assert imputed.obs_names.equals(adata.obs_names)
    sizes = np.asarray(adata.X.sum(axis=1)).ravel()
    observed = np.log1p(1e4 * adata.X.toarray() / sizes[:, None])
    np.testing.assert_allclose(imputed.layers["scdiva_observed"], observed, rtol=1e-5)
    tokens = gene_tokens(list(adata.var_names), vocabulary=tokenizer.vocabulary, what="genes")
    cells = read_cells(adata, tokenizer=tokenizer)
    model.eval()
    with torch.no_grad():
        states = model.model(**cells.batch(np.arange(20))).last_hidden_state[:, 0]
        logits, values = model.decode_genes(states, torch.from_numpy(tokens))
    probability = np.where(observed > 0, 1.0, logits.sigmoid().numpy())
    np.testing.assert_allclose(imputed.layers["scdiva_probability"], probability, atol=1e-5)
    np.testing.assert_allclose(imputed.layers["scdiva_value"], values.numpy(), atol=1e-4)
    expected = np.where(observed > 0, observed, probability * values.numpy())
    np.testing.assert_allclose(imputed.layers["scdiva_imputed"], expected, atol=1e-4)
    assert imputed.uns["scdiva"]["n_genes_measured"] == 120
    predicted = impute_expression(adata, model=model, tokenizer=tokenizer, keep_observed=False)
    np.testing.assert_allclose(
        predicted.layers["scdiva_imputed"], (logits.sigmoid() * values).numpy(), atol=1e-4
    )


def test_named_genes_in_their_order_whatever_the_batches(adata, model, tokenizer, monkeypatch):
    genes = [adata.var_names[40], adata.var["gene_symbols"].iloc[3], adata.var_names[7]]
    found = impute_expression(adata, model=model, tokenizer=tokenizer, genes=genes, batch_size=20)
    assert list(found.var_names) == genes
    everything = impute_expression(adata, model=model, tokenizer=tokenizer, batch_size=3)
    for name in ("scdiva_imputed", "scdiva_probability", "scdiva_observed"):
        np.testing.assert_allclose(found.layers[name], everything.layers[name][:, [40, 3, 7]], atol=1e-5)
    monkeypatch.setattr("modeling_scdiva.tasks.imputation.GENES_PER_QUERY", 7)
    cells = read_cells(adata, tokenizer=tokenizer)
    tokens = gene_tokens(list(adata.var_names), vocabulary=tokenizer.vocabulary, what="genes")
    logits, _ = decode_cells(cells, model=model, gene_ids=tokens)
    silent = np.isfinite(everything.layers["scdiva_observed"]) & (everything.layers["scdiva_observed"] == 0)
    expected = 1 / (1 + np.exp(-logits[silent]))
    np.testing.assert_allclose(everything.layers["scdiva_probability"][silent], expected, atol=1e-5)


def test_what_was_not_measured_is_missing_and_never_seen(adata, model, tokenizer):
    measured = list(adata.var_names[:50])
    found = impute_expression(adata, model=model, tokenizer=tokenizer, measured_genes=measured)
    assert found.var["is_measured"].to_numpy().nonzero()[0].tolist() == list(range(50))
    observed = found.layers["scdiva_observed"]
    assert np.isnan(observed[:, 50:]).all()
    assert np.isfinite(observed[:, :50]).all()
    assert np.isfinite(found.layers["scdiva_imputed"]).all()
    # Whatever stands in the columns that were not measured changes nothing.
    changed = adata.copy()
    counts = changed.X.toarray()
    counts[:, 50:] = np.random.default_rng(0).permuted(counts[:, 50:], axis=1)
    changed.X = csr_matrix(counts)
    again = impute_expression(changed, model=model, tokenizer=tokenizer, measured_genes=measured)
    for name in found.layers:
        np.testing.assert_array_equal(found.layers[name], again.layers[name])
    # Neither does it differ from a file that has the panel alone, at the same library size.
    sizes = np.asarray(adata.X.sum(axis=1)).ravel()
    panel = impute_expression(
        adata[:, :50].copy(),
        model=model,
        tokenizer=tokenizer,
        genes=list(adata.var_names),
        library_size=sizes,
        min_gene_overlap=0.0,
    )
    for name in found.layers:
        np.testing.assert_allclose(found.layers[name], panel.layers[name], atol=1e-5)


def test_measured_genes_are_cut_after_the_others_left(adata, model, tokenizer):
    """Genes of the panel that rank behind max_genes in the whole cell are seen."""
    measured = list(adata.var_names[60:])
    settings = {"model": model, "tokenizer": tokenizer, "measured_genes": measured}
    short, long = (impute_expression(adata, max_genes=n, **settings) for n in (4, 48))
    assert (short.layers["scdiva_observed"][:, 60:] > 0).sum() == (long.layers["scdiva_observed"] > 0).sum()
    assert not np.allclose(short.layers["scdiva_value"], long.layers["scdiva_value"], atol=1e-6)


def test_genes_that_the_vocabulary_lacks_stay_nan(adata, model, tokenizer):
    names = list(adata.var_names)
    names[5] = "not_a_gene"
    other = adata.copy()
    other.var = other.var.drop(columns="gene_symbols")
    other.var_names = names
    found = impute_expression(other, model=model, tokenizer=tokenizer)
    assert not found.var["is_known"].iloc[5]
    for name in found.layers:
        assert np.isnan(found.layers[name][:, 5]).all()
        assert np.isfinite(np.delete(found.layers[name], 5, axis=1)).all()


@pytest.mark.parametrize("value_head", ["gene", "scalar"])
def test_hidden_values_at_their_slots(adata, fresh_tiny_model, tokenizer, value_head):
    model = fresh_tiny_model(value_head=value_head)  # needs no decoder
    rng = np.random.default_rng(2)
    hidden = (rng.random(adata.shape) < 0.3) & (adata.X.toarray() > 0)
    found = impute_expression(adata, model=model, tokenizer=tokenizer, hidden_entries=hidden, batch_size=3)
    again = impute_expression(
        adata, model=model, tokenizer=tokenizer, hidden_entries=csr_matrix(hidden), batch_size=20
    )
    np.testing.assert_allclose(found.layers["scdiva_imputed"], again.layers["scdiva_imputed"], atol=1e-4)
    sizes = np.asarray(adata.X.sum(axis=1)).ravel()
    observed = np.log1p(1e4 * adata.X.toarray() / sizes[:, None])
    np.testing.assert_allclose(found.layers["scdiva_imputed"][~hidden], observed[~hidden], rtol=1e-5)
    assert np.isnan(found.layers["scdiva_observed"][hidden]).all()
    # Second implementation, one cell: tokens in ranking order, hidden values not shown.
    cells, row = read_cells(adata, tokenizer=tokenizer), 4
    inputs = cells.batch(np.array([row]))
    columns = [tokenizer.vocabulary.gene_ids[token] for token in inputs["input_ids"][0, 1:]]
    places = adata.var_names.get_indexer(columns)
    is_masked = torch.from_numpy(np.concatenate([[False], hidden[row, places]]))[None]
    if value_head == "gene":  # the gene goes to the head alone
        inputs["labels"] = inputs["input_ids"].masked_fill(~is_masked, -100)
        inputs["input_ids"] = inputs["input_ids"].masked_fill(is_masked, 1)
    with torch.no_grad():
        outputs = model.eval()(**inputs, is_masked=is_masked)
    expected = outputs.expression_predictions[is_masked].numpy()
    chosen = places[hidden[row, places]]
    np.testing.assert_allclose(found.layers["scdiva_imputed"][row, chosen], expected, atol=1e-4)
    # Genes behind max_genes have no slot: counted, and NaN.
    n_lost = found.uns["scdiva"]["n_hidden_without_slot"]
    assert n_lost == np.isnan(found.layers["scdiva_imputed"]).sum()
    assert n_lost > 0


def test_hidden_values_have_no_say(adata, fresh_tiny_model, tokenizer):
    model = fresh_tiny_model()
    hidden = np.zeros(adata.shape, dtype=bool)
    cells = read_cells(adata, tokenizer=tokenizer)
    top = tokenizer.vocabulary.gene_ids[int(cells.token_ids[0])]
    column = adata.var_names.get_loc(top)
    hidden[0, column] = True
    sizes = np.asarray(adata.X.sum(axis=1)).ravel() + 500
    louder = adata.copy()
    louder.X[0, column] += 200  # still first in the cell, library size as given
    settings = {"model": model, "tokenizer": tokenizer, "hidden_entries": hidden, "library_size": sizes}
    found, again = (impute_expression(cells, **settings) for cells in (adata, louder))
    np.testing.assert_array_equal(
        found.layers["scdiva_imputed"][0, column], again.layers["scdiva_imputed"][0, column]
    )


def test_bad_input_is_refused(adata, model, fresh_tiny_model, tokenizer):
    settings = {"model": model, "tokenizer": tokenizer}
    nothing = np.zeros(adata.shape, dtype=bool)
    with pytest.raises(ValueError, match=r"leave genes, measured_genes and keep_observed out"):
        impute_expression(adata, hidden_entries=nothing, keep_observed=False, **settings)
    with pytest.raises(ValueError, match=r"no gene-query decoder .*latent_loss_weight > 0"):
        impute_expression(adata, model=fresh_tiny_model(), tokenizer=tokenizer)
    with pytest.raises(KeyError, match=r"2 of 3 genes are not among the .* vocabulary: 'FOO', 'BAR'"):
        impute_expression(adata, genes=["FOO", adata.var_names[0], "BAR"], **settings)
    with pytest.raises(ValueError, match=r"No genes are named"):
        impute_expression(adata, genes=[], **settings)
    with pytest.raises(TypeError, match="genes must be a list of names, got the text 'CD3E'"):
        impute_expression(adata, genes="CD3E", **settings)
    with pytest.raises(ValueError, match="Two genes are the same gene"):
        impute_expression(adata, genes=[adata.var_names[0], adata.var["gene_symbols"].iloc[0]], **settings)
    with pytest.raises(ValueError, match="None of measured_genes is a gene of the file"):
        impute_expression(adata[:, :60].copy(), measured_genes=[adata.var_names[100]], **settings)
    with pytest.raises(ValueError, match="leave genes, measured_genes and keep_observed out"):
        impute_expression(adata, genes=[adata.var_names[0]], hidden_entries=np.zeros((1, 1)), **settings)
    with pytest.raises(ValueError, match=r"must be bool of shape \(20, 120\), got float64 of shape \(1, 1\)"):
        impute_expression(adata, hidden_entries=np.zeros((1, 1)), **settings)
    with pytest.raises(TypeError, match="got a path"):
        impute_expression("cells.h5ad", **settings)
    quiet = adata.copy()
    counts = quiet.X.toarray()
    counts[3, :50] = 0
    quiet.X = csr_matrix(counts)
    measured = list(adata.var_names[:50])
    with pytest.raises(ValueError, match="1 cells express none of the 50 measured genes, first 'cell_3'"):
        impute_expression(quiet, measured_genes=measured, **settings)
    found = impute_expression(quiet, measured_genes=measured, keep_empty_cells=True, **settings)
    assert np.isfinite(found.layers["scdiva_imputed"]).all()
    raw = adata[:, :60].copy()
    raw.raw = adata
    with pytest.raises(ValueError, match=r"adata.raw with 120 genes, and adata.var has 60"):
        impute_expression(raw, **settings)


def test_the_mode_of_the_model_comes_back(adata, fresh_tiny_model, tokenizer):
    model = fresh_tiny_model(latent_loss_weight=1.0, hidden_dropout=0.5).train()
    first, second = (impute_expression(adata, model=model, tokenizer=tokenizer) for _ in range(2))
    np.testing.assert_array_equal(first.layers["scdiva_imputed"], second.layers["scdiva_imputed"])
    assert model.training


# --- the protocol ---


def test_evaluation_gives_rows_of_every_task(model, tokenizer, tmp_path):
    cells = synthetic_cells(n_cells=40, n_genes=120, seed=9)
    result = evaluate_imputation(
        cells, model=model, tokenizer=tokenizer, name="toy", seeds=(0, 1), max_test_cells=8
    )
    data = {row["data"] for row in result["numbers"]}
    assert len(data) == 9  # slots and entries at three shares, depth twice, panel
    for task in data:
        methods = {row["method"] for row in result["baselines"] if row["data"] == task}
        simple = (
            {"gene mean", "rank score", "neighbour score", "scDiVa, random weights, gene in sight"}
            if "slots" in task
            else {"identity", "gene mean", "gene mean x depth", "kNN smoothing"}
        )
        assert methods == simple | {"scDiVa, random weights"}
    rows = {(row["data"], row["method"]): row for row in result["baselines"]}
    assert all(row["n_seeds"] == 2 for row in rows.values())
    for row in [*result["numbers"], *rows.values()]:
        assert row["mae_low"] <= row["mae"] <= row["mae_high"]
    some = result["numbers"][0]
    assert f"[{some['mae_low']:.3f}, {some['mae_high']:.3f}]" in format_result(result)
    assert rows["toy, 0.25 x depth, genes without a molecule", "identity"]["auroc"] == 0.5
    assert rows["toy, 0.25 x depth, all genes", "gene mean"]["gene_pearson"] == 0.0
    for share in (10, 50, 90):  # what is hidden is not in what is seen
        row = rows[f"toy, {share} % of expressed entries and as many silent ones hidden", "identity"]
        assert row["pearson"] == 0.0
        assert row["auroc"] == 0.5
    entry = rows["toy, 50 % of expressed entries and as many silent ones hidden", "gene mean x depth"]
    assert entry["expressed_share"] > 0.45
    assert entry["auroc"] > 0.6
    path = write_result(result, tmp_path / "result.json", "imputation", imputation_figures(result), ["run"])
    assert (tmp_path / f"{path.stem}_calibration.png").stat().st_size > 5_000


def test_probabilities_are_shifted_to_the_share_of_the_hidden_entries():
    """Expressed entries are a tenth of all and half of the hidden ones; gene means stay calibrated."""
    cells = synthetic_cells(n_cells=150, n_genes=400, seed=3)
    counts = thin_cells(cells.X, 0.1)
    part = ScoredCells(
        counts=counts[:50],
        training_counts=counts[50:],
        columns=np.arange(400),
        gene_ids=np.array(cells.var_names),
        var=cells.var,
        name="toy",
        seed=0,
        include_scvi=False,
        units=np.arange(50),
    )
    assert (counts > 0).mean() < 0.15
    row = entry_task(part, {})["toy, 50 % of expressed entries and as many silent ones hidden", "gene mean"]
    assert row["expressed_share"] == pytest.approx(0.5, abs=0.02)
    assert row["calibration_error"] < 0.1


def test_a_model_without_decoder_has_rows_where_it_can(adata, fresh_tiny_model, tokenizer):
    result = evaluate_imputation(
        adata, model=fresh_tiny_model(), tokenizer=tokenizer, seeds=(0,), max_test_cells=4
    )
    assert all("known slots" in row["data"] for row in result["numbers"])
    assert "no gene-query decoder" in result["note"]
    assert {row["method"] for row in result["baselines"] if "a panel of genes measured" in row["data"]} == {
        "identity", "gene mean", "gene mean x depth", "kNN smoothing",
    }  # fmt: skip


def test_evaluation_refuses_what_it_cannot_use(adata, model, tokenizer):
    settings = {"model": model, "tokenizer": tokenizer}
    logged = adata.copy()
    logged.X = logged.X.log1p()
    with pytest.raises(ValueError, match="Raw counts are needed"):
        evaluate_imputation(logged, **settings)
    with pytest.raises(KeyError, match=r"no layer 'nope'; present are \[\]"):
        evaluate_imputation(adata, layer="nope", **settings)
    with pytest.raises(KeyError, match=r"no column 'nope'.*cell_type"):
        evaluate_imputation(adata, split_key="nope", **settings)
    with pytest.raises(ValueError, match="seeds is empty"):
        evaluate_imputation(adata, seeds=(), **settings)
    million = ScDivaTokenizer(vocabulary=tokenizer.vocabulary, max_genes=tokenizer.max_genes, target_sum=1e6)
    with pytest.raises(ValueError, match=r"scales cells to 1,000,000 molecules and the baselines to 10,000"):
        evaluate_imputation(adata, model=model, tokenizer=million)
