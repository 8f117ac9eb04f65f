"""Perturbation response: names, matched changes, optimal transport, learning a made-up screen, any gene out.

Needs no data but for one test; POT where installed. Run: pytest tests/test_perturbation.py
"""

import anndata as ad
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from scipy import stats

from modeling_scdiva.finetuning import FinetuningArguments
from modeling_scdiva.metrics.annotation import log_normalise
from modeling_scdiva.metrics.perturbation import pearson_delta
from modeling_scdiva.tasks.perturbation import finetune_perturbation, mean_deltas, predict_perturbation
from modeling_scdiva.tasks.perturbation_data import (
    cut_cells,
    gene_weights,
    measure_effects,
    perturbation_name,
    read_perturbed_cells,
    split_perturbation,
    target_tokens,
    transport_plan,
)
from modeling_scdiva.tasks.perturbation_network import ScDivaForPerturbation
from modeling_scdiva.tasks.perturbation_training import (
    PerturbationSettings,
    TrainingBatches,
    panel_genes,
    validation_units,
)
from tokenization_scdiva import synthetic_cells

RESPONDING = slice(60, 70)  # genes that any perturbation of GENE1 or GENE2 raises
QUICK = FinetuningArguments(n_epochs=2, batch_size=16, learning_rate=1e-3)
CPU = {"accelerator": Accelerator(cpu=True)}


def make_screen(n_cells=240, seed=5):
    cells = synthetic_cells(n_cells=n_cells, n_genes=120, seed=seed)
    names = np.resize(["control", "GENE1", "GENE2+ctrl", "GENE3", "control", "GENE2+GENE1"], n_cells)
    rng = np.random.default_rng(seed)
    counts = cells.X.toarray()
    counts[np.isin(names, ["GENE1", "GENE2+ctrl", "GENE2+GENE1"]), RESPONDING] += rng.poisson(
        25, ((np.isin(names, ["GENE1", "GENE2+ctrl", "GENE2+GENE1"])).sum(), 10)
    )
    counts[names == "GENE3", 80:90] += rng.poisson(25, ((names == "GENE3").sum(), 10))
    screen = ad.AnnData(counts.astype(np.float32), obs=cells.obs, var=cells.var)
    screen.obs["perturbation"] = names
    screen.obs["batch"] = np.where(np.arange(n_cells) // 6 % 2, "one", "two")
    return screen


@pytest.fixture(scope="module")
def screen():
    return make_screen()


@pytest.fixture(scope="module")
def cells(screen, tokenizer):
    return read_perturbed_cells(
        screen, tokenizer=tokenizer, perturbation_key="perturbation", match_keys=["batch"]
    )


@pytest.fixture
def model(fresh_tiny_model, tmp_path):
    fresh_tiny_model().save_pretrained(tmp_path)
    torch.manual_seed(0)
    return ScDivaForPerturbation.from_pretrained(tmp_path)


def finetune(screen, model, tokenizer, **kwargs):
    settings = {"perturbation_key": "perturbation", "arguments": QUICK} | CPU | kwargs
    return finetune_perturbation(screen, model=model, tokenizer=tokenizer, **settings)


def predict(controls, model, tokenizer, **kwargs):
    kwargs = {"perturbations": ["GENE1"], "show_progress": False} | kwargs
    return predict_perturbation(controls, model=model, tokenizer=tokenizer, **kwargs)


# --- names ---


@pytest.mark.parametrize(
    ("name", "parts", "written"),
    [
        ("A", ("A",), "A"),
        ("B+A", ("A", "B"), "A+B"),
        ("A+ctrl", ("A",), "A"),
        ("ctrl+A", ("A",), "A"),
        ("A+A", ("A",), "A"),
        ("ctrl", (), "control"),
        ("control", (), "control"),
        ("NT", (), "control"),
        ("A+NT", ("A",), "A"),
    ],
)
def test_names_are_read_and_written(name, parts, written):
    assert split_perturbation(name, control_label="NT") == parts
    assert perturbation_name(parts) == written


def test_empty_part_of_a_name():
    with pytest.raises(ValueError, match=r"'A\+' has an empty part"):
        split_perturbation("A+")


def test_targets_by_symbol_id_and_mapping(tokenizer):
    vocabulary = tokenizer.vocabulary
    first, second = vocabulary.token_ids["ENSG00000000001"], vocabulary.token_ids["ENSG00000000002"]
    genes = {"IFN": ["GENE1", "ENSG00000000002"], "none": [], "GENE2+IFN": ["GENE2"]}
    found = target_tokens(
        ["GENE1", "IFN", "GENE1+IFN", "none", "GENE2+IFN"], vocabulary=vocabulary, perturbation_genes=genes
    )
    expected = [[first], [first, second], [first, second], [], [second]]
    assert [tokens.tolist() for tokens in found.values()] == expected
    with pytest.raises(
        KeyError, match=r"2 of 3 perturbations target genes outside .* perturbation_genes=\{'IFNb'"
    ):
        target_tokens(["GENE1", "IFNb", "X+GENE1"], vocabulary=vocabulary)


# --- matched changes ---


def test_changes_are_matched_by_group(screen, cells):
    rows = np.arange(screen.n_obs)
    gene_ids = cells.measured_ids
    found = measure_effects(cells, rows, gene_ids)
    assert found.names == ["GENE1", "GENE1+GENE2", "GENE2", "GENE3"]
    values = log_normalise(screen.X).toarray()
    names, batch = screen.obs["perturbation"].to_numpy(), screen.obs["batch"].to_numpy()
    columns = [int(cells_id) - 5 for cells_id in gene_ids]  # made-up genes are in vocabulary order
    order = np.argsort([screen.var_names[c] for c in range(120)])
    np.testing.assert_array_equal(order, np.arange(120))
    expected = np.zeros(len(gene_ids))
    for group in ("one", "two"):
        own = values[(names == "GENE3") & (batch == group)]
        expected += (
            len(own)
            * (own.mean(axis=0) - values[(names == "control") & (batch == group)].mean(axis=0))[columns]
        )
    expected /= (names == "GENE3").sum()
    np.testing.assert_allclose(found.deltas[3], expected, atol=1e-5)
    assert found.is_de[0, np.isin(columns, np.arange(60, 70))].all()
    assert found.is_de[3, np.isin(columns, np.arange(80, 90))].all()


def test_a_batch_effect_is_no_change(screen, tokenizer):
    """A batch that only holds perturbed cells of one kind would pass for its effect without matching."""
    shifted = screen.copy()
    is_other = (shifted.obs["batch"] == "two").to_numpy()
    dense = np.asarray(shifted.X).copy()
    dense[is_other, 100:110] += 40
    shifted.X = dense
    keep = ~(is_other & (shifted.obs["perturbation"] == "GENE1").to_numpy())
    both = {}
    for keys in ((), ("batch",)):
        read = read_perturbed_cells(
            shifted[keep], tokenizer=tokenizer, perturbation_key="perturbation", match_keys=keys
        )
        effects = measure_effects(read, np.arange(keep.sum()), np.arange(105, 115))
        both[keys] = effects.deltas[0]
    assert np.median(np.abs(both["batch",])) < 0.4 * np.median(np.abs(both[()]))


def test_tests_see_cells_minus_their_control_mean(screen, cells):
    gene_ids, rows = cells.measured_ids[:20], np.arange(screen.n_obs)
    values, groups = cells.dense(rows, gene_ids).astype(np.float64), cells.groups
    for group in ("one", "two"):
        values[groups == group] -= values[(groups == group) & cells.is_control].mean(axis=0)
    expected = stats.ttest_ind(
        values[cells.perturbations == "GENE3"], values[cells.is_control], equal_var=False
    ).statistic
    np.testing.assert_allclose(measure_effects(cells, rows, gene_ids).t[3], expected, rtol=1e-4)


def test_gene_weights_follow_training_effects(screen, cells):
    rows = np.arange(screen.n_obs)
    gene_ids = np.arange(5, 125)
    train = rows[cells.perturbations != "GENE3"]
    weights = gene_weights(measure_effects(cells, train, gene_ids))
    assert weights.mean() == pytest.approx(1.0)
    assert weights[60:70].min() > 2 * weights[80:90].max()


def test_cut_cells_keep_the_first_genes(cells, tokenizer, screen):
    inputs = tokenizer.encode_anndata(screen[:3], max_genes=7, return_tensors="np")
    cut = cut_cells(cells.inputs, 7)
    np.testing.assert_array_equal(cut.batch(np.arange(3))["input_ids"].numpy(), inputs["input_ids"])
    with pytest.raises(ValueError, match="max_genes must be at least 1"):
        cut_cells(cells.inputs, 0)


def test_transport_pairs_what_is_near():
    pytest.importorskip("ot")
    rng = np.random.default_rng(0)
    control = rng.normal(size=(8, 5)) * 10
    order = rng.permutation(8)
    plan = transport_plan(control[order] + 0.01, control, n_components=4)
    np.testing.assert_array_equal(plan.argmax(axis=1), order)
    uneven = transport_plan(rng.normal(size=(4, 5)), control)
    np.testing.assert_allclose(uneven.sum(axis=1), 1.0)
    np.testing.assert_allclose(uneven.sum(axis=0), 0.5)  # every control takes an equal share


# --- batches ---


@pytest.mark.parametrize("pairing", ["mean", "optimal_transport"])
def test_batches(screen, cells, tokenizer, model, pairing):
    if pairing == "optimal_transport":
        pytest.importorskip("ot")
    rows = np.arange(screen.n_obs)
    settings = PerturbationSettings(match_keys=["batch"], pairing=pairing, n_query_genes=15, max_cells=10)
    gene_ids = panel_genes(cells, rows, vocabulary=tokenizer.vocabulary, settings=settings)
    effects = measure_effects(cells, rows, gene_ids)
    targets = target_tokens(effects.names, vocabulary=tokenizer.vocabulary)
    batches = TrainingBatches(
        cells, rows, effects, gene_ids=gene_ids, targets=targets, settings=settings, seed=3
    )
    assert batches.n_examples == 4 * 2 * 10
    batch = batches.make(model.config, np.arange(16), 1)
    again, other = batches.make(model.config, np.arange(16), 1), batches.make(model.config, np.arange(16), 2)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert not torch.equal(batch["gene_ids"], other["gene_ids"])
    assert batch["delta_labels"].shape == batch["is_de"].shape == (16, 15)
    assert (batch["input_ids"][:, 1] == model.config.pert_token_id).all()
    assert torch.isfinite(model(**batch).loss)
    if pairing == "mean":
        first = batches.examples[0]
        columns = [int(np.flatnonzero(gene_ids == gene)[0]) for gene in batch["gene_ids"].tolist()]
        own = batches.deltas[cells.perturbations[first], cells.groups[first]][columns]
        np.testing.assert_array_equal(batch["delta_labels"][0].numpy(), own)


def test_panel_is_chosen_on_training_cells(screen, cells, tokenizer):
    settings = PerturbationSettings(min_cells=30)
    rows = np.arange(120)
    found = panel_genes(cells, rows, vocabulary=tokenizer.vocabulary, settings=settings)
    detected = (np.asarray(screen.X)[:120] > 0).sum(axis=0)
    np.testing.assert_array_equal(found, 5 + np.flatnonzero(detected >= 30))
    named = PerturbationSettings(genes=["GENE5", "GENE3"])
    assert panel_genes(cells, rows, vocabulary=tokenizer.vocabulary, settings=named).tolist() == [9, 7]
    with pytest.raises(ValueError, match="No gene is detected in min_cells=1000"):
        panel_genes(
            cells, rows, vocabulary=tokenizer.vocabulary, settings=PerturbationSettings(min_cells=1000)
        )


def test_validation_holds_whole_perturbations_out(screen, cells):
    rows = np.arange(screen.n_obs)
    held, kind = validation_units(cells, rows, PerturbationSettings(validation_fraction=0.3), 0)
    assert kind == "perturbation"
    assert len(held) == 1
    assert held[0] in {"GENE1", "GENE2", "GENE3", "GENE1+GENE2"}
    assert validation_units(cells, rows, PerturbationSettings(validation_fraction=0.0), 0)[0] == []
    few = PerturbationSettings(validation_unit="group")
    assert validation_units(cells, rows, few, 0) == ([], "group")


# --- learning and predicting ---


def test_learns_the_response_and_predicts_any_gene(screen, model, tokenizer):
    settings = PerturbationSettings(match_keys=["batch"], validation_fraction=0.0)
    arguments = FinetuningArguments(n_epochs=16, batch_size=16, learning_rate=5e-3)
    fit = finetune(screen, model, tokenizer, settings=settings, arguments=arguments)
    assert fit.perturbations == ["GENE1", "GENE1+GENE2", "GENE2", "GENE3"]
    assert fit.history[-1]["delta_loss"] < 0.7 * fit.history[0]["delta_loss"]
    controls = screen[screen.obs["perturbation"] == "control"].copy()
    found = predict(controls, fit.model, tokenizer, perturbations=["GENE2+GENE1", "GENE3"])
    assert list(found.obs_names) == ["GENE1+GENE2", "GENE3"]
    assert list(found.var_names) == list(screen.var_names)  # all genes, far more than the 48 tokens of a cell
    assert list(found.obs["target_genes"]) == ["GENE1+GENE2", "GENE3"]
    cells = read_perturbed_cells(screen, tokenizer=tokenizer, perturbation_key="perturbation")
    truth = measure_effects(cells, np.arange(screen.n_obs), np.arange(5, 125))
    own = truth.deltas[[truth.names.index(name) for name in found.obs_names]]
    assert pearson_delta(found.X, own).min() > 0.5
    assert pearson_delta(found.X, own, reference=own.mean(axis=0)).min() > 0.5  # each its own
    means = log_normalise(controls.X).toarray().mean(axis=0)
    np.testing.assert_allclose(found.layers["control_mean"][1], means, rtol=1e-4)


def test_untrained_decoder_starts_at_the_mean_change(screen, cells, model, tokenizer):
    torch.nn.init.zeros_(model.delta_decoder.query_decoder.out_proj.weight)
    arguments = FinetuningArguments(n_epochs=1, batch_size=500, learning_rate=1e-12)
    settings = PerturbationSettings(match_keys=["batch"], validation_fraction=0.0)
    fit = finetune(screen, model, tokenizer, settings=settings, arguments=arguments)
    effects = measure_effects(cells, np.arange(screen.n_obs), fit.gene_ids)
    found = mean_deltas(fit.model, cells.inputs, np.arange(4), targets=[np.array([5])], gene_ids=fit.gene_ids)
    np.testing.assert_allclose(found[0], effects.deltas.mean(axis=0), atol=1e-5)


def test_early_stopping_and_lora(screen, model, tokenizer):
    pytest.importorskip("peft")
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    settings = PerturbationSettings(trainable="lora", validation_fraction=0.25, max_cells=20)
    fit = finetune(screen, model, tokenizer, settings=settings)
    assert len(fit.validation) == 1
    assert fit.validation[0] not in fit.perturbations
    assert all(np.isfinite(line["score"]) for line in fit.history)
    after = fit.model.state_dict()
    for name, tensor in before.items():  # the base is as it was
        found = [
            part
            for key, part in after.items()
            if key.replace(".base_layer", "").endswith(f"model.model.{name}")
        ]
        assert any(torch.equal(part, tensor) for part in found), name
    found = predict(screen[:10], fit.model, tokenizer)
    assert np.isfinite(found.X).all()


def test_transported_pairs_train_and_predict(screen, model, tokenizer):
    """Each perturbed cell learns the difference to the controls it is moved from, not to the mean."""
    pytest.importorskip("ot")
    settings = PerturbationSettings(
        pairing="optimal_transport", with_mean=False, match_keys=["batch"], validation_fraction=0.0
    )
    arguments = FinetuningArguments(n_epochs=15, batch_size=16, learning_rate=3e-3)
    fit = finetune(screen, model, tokenizer, settings=settings, arguments=arguments)
    losses = [line["delta_loss"] for line in fit.history]
    assert losses[-1] < losses[0]
    controls = screen[screen.obs["perturbation"] == "control"]
    found = predict(controls, fit.model, tokenizer)
    assert np.isfinite(found.X).all()
    assert found.X[:, RESPONDING].mean() > found.X[:, 20:60].mean() + 0.5


def test_saved_and_loaded_predicts_the_same(screen, model, tokenizer, tmp_path):
    fit = finetune(
        screen, model, tokenizer, settings=PerturbationSettings(validation_fraction=0.0, max_cells=8)
    )
    expected = predict(screen[:12], fit.model, tokenizer).X
    fit.model.save_pretrained(tmp_path)
    again = ScDivaForPerturbation.from_pretrained(tmp_path)
    np.testing.assert_array_equal(predict(screen[:12], again, tokenizer).X, expected)


def test_same_seed_same_result(screen, fresh_tiny_model, tokenizer, tmp_path):
    fresh_tiny_model().save_pretrained(tmp_path)
    losses = []
    for _ in range(2):
        torch.manual_seed(7)
        model = ScDivaForPerturbation.from_pretrained(tmp_path)
        losses.append(finetune(screen, model, tokenizer, settings=PerturbationSettings(max_cells=8)).history)
    assert losses[0] == losses[1]


def test_prediction_does_not_depend_on_batches_or_names(screen, model, tokenizer):
    expected = predict(
        screen[:20],
        model,
        tokenizer,
        perturbations=["GENE1+GENE2", "IFN"],
        perturbation_genes={"IFN": ["GENE3"]},
    )
    found = predict(screen[:20], model, tokenizer, perturbations=["ctrl+GENE3", "GENE2+GENE1"], batch_size=3)
    np.testing.assert_allclose(found.X[::-1], expected.X, atol=1e-6)


def test_unmeasured_gene_has_a_change_and_no_control_mean(screen, model, tokenizer):
    few = screen[:20, :100].copy()
    found = predict(few, model, tokenizer, genes=["GENE5", "GENE110"])
    assert found.var["is_measured"].tolist() == [True, False]
    assert np.isfinite(found.X).all()
    assert np.isnan(found.layers["control_mean"][0]).tolist() == [False, True]


def test_mode_comes_back(screen, model, tokenizer):
    model.train()
    first, second = (predict(screen[:6], model, tokenizer).X for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert model.training


# --- refusals ---


def test_refused_columns_and_labels(screen, model, tokenizer):
    with pytest.raises(KeyError, match=r"no column 'target' \(perturbations\). Columns: .*'perturbation'"):
        finetune(screen, model, tokenizer, perturbation_key="target")
    with pytest.raises(KeyError, match=r"no column 'plate'"):
        finetune(screen, model, tokenizer, settings=PerturbationSettings(match_keys=["plate"]))
    perturbed = screen[~screen.obs["perturbation"].isin(["control"])]
    with pytest.raises(ValueError, match=r"holds no control \(control_label='NT'\). Labels: 'GENE1', "):
        finetune(perturbed, model, tokenizer, control_label="NT")
    controls = screen[screen.obs["perturbation"].isin(["control"])]
    with pytest.raises(ValueError, match=r"holds no control \(control_label='NT'\). .*'control'"):
        finetune(screen, model, tokenizer, control_label="NT")  # though there are cells called "control"
    with pytest.raises(ValueError, match=r"holds controls only"):
        finetune(controls, model, tokenizer)


def test_refused_group_without_controls(screen, model, tokenizer):
    other = screen.copy()
    other.obs["donor"] = np.where((other.obs["perturbation"] == "control"), "a", "b")
    with pytest.raises(
        ValueError, match=r"1 groups of \['donor'\] hold 160 perturbed cells and no control: 'b'"
    ):
        finetune(other, model, tokenizer, settings=PerturbationSettings(match_keys=["donor"]))


def test_refused_targets(screen, model, tokenizer):
    other = screen.copy()
    other.obs["perturbation"] = other.obs["perturbation"].astype(str).replace("GENE3", "JAK2")
    with pytest.raises(KeyError, match=r"1 of 4 perturbations target genes outside .*'JAK2'"):
        finetune(other, model, tokenizer)
    with pytest.raises(KeyError, match=r"perturbation_genes=\{'JAK2'"):
        predict(screen[:5], model, tokenizer, perturbations=["JAK2"])
    with pytest.raises(KeyError, match=r"1 of 2 genes are not among the 120 genes .*'NOGENE'"):
        predict(screen[:5], model, tokenizer, genes=["GENE1", "NOGENE"])


@pytest.mark.parametrize("names", [[], ["control"], ["GENE1", "GENE1+ctrl"]])
def test_refused_questions(screen, model, tokenizer, names):
    with pytest.raises(ValueError, match="at least one perturbation, each once and none the control"):
        predict(screen[:5], model, tokenizer, perturbations=names)


def test_refused_lists(screen, model, tokenizer):
    with pytest.raises(TypeError, match="perturbations must be a list of names, got the text 'GENE1'"):
        predict(screen[:5], model, tokenizer, perturbations="GENE1")
    with pytest.raises(ValueError, match="No genes are named"):
        predict(screen[:5], model, tokenizer, genes=[])
    with pytest.raises(ValueError, match="Two genes are the same gene: 'GENE1', 'GENE1'"):
        predict(screen[:5], model, tokenizer, genes=["GENE1", "GENE1"])
    with pytest.raises(TypeError, match="match_keys must be a list of columns, got the text 'batch'"):
        PerturbationSettings(match_keys="batch")


def test_refused_models_and_paths(screen, model, tokenizer, fresh_tiny_model):
    with pytest.raises(TypeError, match=r"need ScDivaForPerturbation, got ScDivaForMaskedDiffusion"):
        predict(screen[:5], fresh_tiny_model(), tokenizer)
    with pytest.raises(TypeError, match=r"got a path \(screen\.h5ad\)"):
        predict("screen.h5ad", model, tokenizer)
    with pytest.raises(TypeError, match=r"got a path \(screen\.h5ad\)"):
        finetune("screen.h5ad", model, tokenizer)


def test_single_cell_of_a_perturbation_is_refused(screen, model, tokenizer):
    other = screen.copy()
    names = other.obs["perturbation"].astype(str).to_numpy()
    other.obs["perturbation"] = np.where(np.arange(len(names)) == 3, "GENE9", names)
    with pytest.raises(ValueError, match="'GENE9' has a single cell"):
        finetune(other, model, tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairing": "nearest"}, "pairing must be"),
        ({"validation_unit": "cell"}, "validation_unit must be"),
        ({"validation_fraction": 1.0}, r"validation_fraction must lie in \[0, 1\)"),
        ({"max_cells": 0}, "max_cells must be at least 1"),
    ],
)
def test_impossible_settings(change, message):
    with pytest.raises(ValueError, match=message):
        PerturbationSettings(**change)


@pytest.mark.real_data
def test_known_effects_of_interferon(real_data, tokenizer):
    """The response of monocytes to interferon beta, as everybody finds it."""
    from tokenization_scdiva import ScDivaTokenizer, build_vocabulary

    path = real_data / "kang2018_ifnb_pbmc.h5ad"
    vocabulary, _ = build_vocabulary({"kang": path}, show_progress=False)
    own = ScDivaTokenizer(vocabulary=vocabulary)
    adata = ad.read_h5ad(path)
    read = read_perturbed_cells(
        adata, tokenizer=own, perturbation_key="perturbation", match_keys=["cell_type"]
    )
    rows = np.flatnonzero(read.groups == "CD14+ Monocytes")
    effects = measure_effects(read, rows, read.measured_ids)
    top = read.measured_ids[np.argsort(-effects.t[0])[:30]]
    raised = {own.vocabulary.gene_symbols[token] for token in top}
    assert {"ISG15", "IFIT1", "IFIT3", "ISG20", "CXCL10"} <= raised
