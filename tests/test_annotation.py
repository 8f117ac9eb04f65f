"""Annotation: types are learnt, probabilities and thresholds kept, files complete, bad input refused.

Needs no data. Run: pytest tests/test_annotation.py
"""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import softmax

from modeling_scdiva import ScDivaModel
from modeling_scdiva.adapters import base_of, make_trainable
from modeling_scdiva.finetuning import FinetuningArguments
from modeling_scdiva.tasks.annotation import (
    OBS_KEYS,
    UNKNOWN,
    AnnotatorSettings,
    CellAnnotator,
    annotate_cells,
    annotate_logits,
    calibrate,
    default_arguments,
    finetune_annotator,
    hide_genes,
    validation_score,
)
from modeling_scdiva.tasks.annotator_files import ANNOTATOR_FILE, load_annotator, save_annotator
from modeling_scdiva.tasks.cells import read_cells
from modeling_scdiva.tasks.classifier import WeightedClassifier, make_classifier, predict_logits
from tokenization_scdiva import ScDivaTokenizer, build_vocabulary, synthetic_cells

TYPES = ["type_0", "type_1", "type_2", "type_3"]


def made_up(n_cells=120, seed=5):
    adata = synthetic_cells(n_cells=n_cells, n_genes=120, seed=seed)
    adata.obs["donor_id"] = [f"donor_{cell // 4 % 4}" for cell in range(n_cells)]
    return adata


def fit(adata, base, tokenizer, *, trainable="lora", n_epochs=8, **settings):
    return finetune_annotator(
        adata,
        model=base,
        tokenizer=tokenizer,
        label_key="cell_type",
        settings=AnnotatorSettings(trainable=trainable, **settings),
        arguments=FinetuningArguments(n_epochs=n_epochs, learning_rate=1e-2, batch_size=24),
        show_progress=False,
    )


@pytest.fixture(scope="module")
def base(fresh_tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    fresh_tiny_model(hidden_dropout=0.0).save_pretrained(folder)
    return ScDivaModel.from_pretrained(folder)


@pytest.fixture(scope="module")
def annotator(base, tokenizer):
    return fit(made_up(), base, tokenizer, group_key="donor_id", wanted_accuracy=0.9)


def annotate(adata, annotator, tokenizer, **kwargs):
    return annotate_cells(adata, model=annotator, tokenizer=tokenizer, show_progress=False, **kwargs)


def test_types_of_new_cells_are_learnt(annotator, tokenizer):
    adata = made_up(200)[120:].copy()  # other cells of the same types: equal seeds give equal rates
    found = annotate(adata, annotator, tokenizer, threshold=0.0)
    assert found.label_names == TYPES
    assert (found.predicted_cell_types == adata.obs["cell_type"].to_numpy()).mean() > 0.6
    assert annotator.history[-1]["loss"] < annotator.history[0]["loss"]
    assert annotator.facts["validation_kind"] == "groups"
    assert annotator.facts["n_train_cells"] + annotator.facts["n_validation_cells"] == 120


@pytest.mark.parametrize("trainable", ["full", "last_layers", "head"])
def test_every_variant_trains(base, tokenizer, trainable):
    found = fit(made_up(60), base, tokenizer, trainable=trainable, n_epochs=2, n_last_layers=4)
    assert found.label_names == TYPES
    assert np.isfinite(found.history[-1]["loss"])


def test_equal_seeds_give_equal_annotators(base, tokenizer):
    torch.manual_seed(1)
    first = fit(made_up(60), base, tokenizer, n_epochs=2)
    torch.manual_seed(2)
    second = fit(made_up(60), base, tokenizer, n_epochs=2)
    probabilities = [annotate(made_up(60), made, tokenizer).probabilities for made in (first, second)]
    np.testing.assert_array_equal(*probabilities)


def test_annotation_is_the_softmax_of_the_model(annotator, tokenizer):
    adata = made_up(17)
    found = annotate(adata, annotator, tokenizer, batch_size=5)
    with torch.no_grad():
        logits = annotator.model(**tokenizer.encode_anndata(adata)).logits.numpy()
    expected = softmax(logits / annotator.calibration.temperature, axis=1)
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-5)
    np.testing.assert_allclose(found.probability, expected.max(axis=1), atol=1e-5)
    np.testing.assert_array_equal(found.likeliest_cell_types, np.array(TYPES)[expected.argmax(axis=1)])


def test_rows_follow_the_cells(annotator, tokenizer):
    adata = made_up(40)
    order = np.random.default_rng(0).permutation(40)
    found = annotate(adata[order].copy(), annotator, tokenizer).probabilities
    np.testing.assert_allclose(found, annotate(adata, annotator, tokenizer).probabilities[order], atol=1e-5)


def test_unknown_below_the_threshold():
    logits = np.log([[0.6, 0.4], [0.9, 0.1], [0.5, 0.5]])
    found = annotate_logits(logits, ["B", "T"], threshold=0.6)
    assert found.predicted_cell_types.tolist() == ["B", "B", UNKNOWN]
    assert found.likeliest_cell_types.tolist() == ["B", "B", "B"]
    # A temperature of 2 flattens 0.9 to 0.75.
    hot = annotate_logits(logits, ["B", "T"], temperature=2.0, threshold=0.75 - 1e-6)
    assert hot.predicted_cell_types.tolist() == [UNKNOWN, "B", UNKNOWN]


def test_threshold_keeps_its_promise_on_validation_cells():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 500)
    logits = rng.normal(size=(500, 3)) * 2
    logits[np.arange(500), labels] += 2
    calibration = calibrate(logits, labels, wanted_accuracy=0.9)
    found = annotate_logits(
        logits, ["0", "1", "2"], temperature=calibration.temperature, threshold=calibration.threshold
    )
    accepted = found.predicted_cell_types != UNKNOWN
    assert calibration.is_reached
    assert (found.predicted_cell_types[accepted] == labels[accepted].astype(str)).mean() >= 0.9
    assert accepted.mean() == pytest.approx(calibration.coverage)
    assert 0.2 < accepted.mean() < 1.0


def test_obs_is_written_on_request_only(annotator, tokenizer):
    adata = made_up(10)
    before = list(adata.obs)
    found = annotate(adata, annotator, tokenizer)
    assert list(adata.obs) == before
    annotate(adata, annotator, tokenizer, write_obs=True, threshold=0.999999)
    assert list(adata.obs) == [*before, *OBS_KEYS]
    assert set(adata.obs["scdiva_cell_type"]) <= {*TYPES, UNKNOWN}
    assert UNKNOWN in set(adata.obs["scdiva_cell_type"])
    np.testing.assert_array_equal(adata.obs["scdiva_cell_type_probability"], found.probability)


def test_class_weights_by_hand(base):
    classifier = make_classifier(base, ["a", "b"])
    weights = torch.tensor([0.25, 4.0])
    inputs = {
        "input_ids": torch.tensor([[2, 7, 8], [2, 9, 7]]),
        "expression_values": torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 0.5]]),
    }
    labels = torch.tensor([0, 1])
    classifier.eval()
    found = WeightedClassifier(classifier, weights)(labels=labels, **inputs)
    losses = -torch.log_softmax(found["logits"], dim=-1)[[0, 1], labels]
    expected = (0.25 * losses[0] + 4.0 * losses[1]) / 2
    torch.testing.assert_close(found["loss"], expected)


def test_balanced_weights_help_a_rare_type(base, tokenizer):
    """Of a type with few cells, the balanced loss predicts more."""
    adata = made_up(120)
    rare = adata.obs["cell_type"].to_numpy() == "type_3"
    keep = ~rare | (np.cumsum(rare) <= 5)
    adata = adata[keep].copy()
    shares = {}
    for weights in ("balanced", None):
        made = fit(adata, base, tokenizer, trainable="head", n_epochs=3, class_weights=weights)
        shares[weights] = annotate(made_up(60, seed=9), made, tokenizer).probabilities[:, 3].mean()
    assert shares["balanced"] > 1.5 * shares[None]


@pytest.mark.parametrize("trainable", ["lora", "head"])
def test_saved_and_loaded_annotator_is_the_same(base, tokenizer, tmp_path, trainable):
    made = fit(made_up(60), base, tokenizer, trainable=trainable, n_epochs=2)
    save_annotator(made, tmp_path / "made", tokenizer=tokenizer)
    loaded = load_annotator(tmp_path / "made")
    assert loaded.calibration == made.calibration
    assert (loaded.label_names, loaded.max_genes) == (TYPES, tokenizer.max_genes)
    assert loaded.history == made.history
    assert loaded.model.config.label2id == {name: index for index, name in enumerate(TYPES)}
    adata = made_up(9)
    expected = annotate(adata, made, tokenizer)
    found = annotate(adata, loaded, tokenizer)
    np.testing.assert_array_equal(found.probabilities, expected.probabilities)
    np.testing.assert_array_equal(found.predicted_cell_types, expected.predicted_cell_types)
    whole = tmp_path / "made" if trainable == "head" else Path(base.config.name_or_path)
    assert Path(base_of(tmp_path / "made")) == whole
    assert (tmp_path / "made" / "config.json").exists() == (trainable == "head")


def test_bare_classifier_annotates(base, tokenizer):
    classifier = make_classifier(base, TYPES)
    adata = made_up(8)
    found = annotate(adata, classifier, tokenizer)
    assert UNKNOWN not in set(found.predicted_cell_types)
    logits = predict_logits(classifier, read_cells(adata, tokenizer=tokenizer), np.arange(8))
    np.testing.assert_allclose(found.probabilities, softmax(logits, axis=1), atol=1e-6)


def test_fewer_genes_in_training_are_remembered(base, tokenizer):
    made = finetune_annotator(
        made_up(60),
        model=base,
        tokenizer=tokenizer,
        label_key="cell_type",
        arguments=FinetuningArguments(n_epochs=1),
        show_progress=False,
        max_genes=7,
    )
    adata = made_up(8)
    found = annotate(adata, made, tokenizer).probabilities
    np.testing.assert_array_equal(found, annotate(adata, made, tokenizer, max_genes=7).probabilities)
    assert np.abs(found - annotate(adata, made, tokenizer, max_genes=40).probabilities).max() > 1e-4


def test_mode_comes_back(annotator, tokenizer):
    annotator.model.train()
    annotate(made_up(4), annotator, tokenizer)
    assert annotator.model.training
    annotator.model.eval()


def test_unreachable_accuracy_is_said(base, tokenizer, caplog):
    adata = made_up(80)
    adata.obs["cell_type"] = np.random.default_rng(0).permutation(adata.obs["cell_type"].to_numpy())
    made = fit(adata, base, tokenizer, trainable="head", n_epochs=1, wanted_accuracy=1.0)
    assert not made.calibration.is_reached
    assert "No threshold makes 100 % of the accepted validation cells right" in caplog.text


def test_bad_cells(base, tokenizer):
    with pytest.raises(KeyError, match=r"no column 'celltype' \(cell types\)\. Columns: 'cell_type'"):
        finetune_annotator(made_up(), model=base, tokenizer=tokenizer, label_key="celltype")
    with pytest.raises(KeyError, match="no column 'plate'"):
        fit(made_up(), base, tokenizer, group_key="plate")
    one = made_up()
    one.obs["cell_type"] = "B"
    with pytest.raises(ValueError, match=r"one class only \('B'\); at least two"):
        fit(one, base, tokenizer)
    unknown = made_up()
    unknown.obs["cell_type"] = ["Unknown"] * 7 + ["B"] * 50 + ["T"] * 63
    with pytest.raises(ValueError, match="7 cells have the type 'Unknown', which is the answer"):
        fit(unknown, base, tokenizer)
    gap = made_up()
    gap.obs["cell_type"] = gap.obs["cell_type"].astype(object)
    gap.obs.iloc[3, gap.obs.columns.get_loc("cell_type")] = None
    with pytest.raises(ValueError, match="missing for 1 of 120 cells, first 'cell_3'"):
        fit(gap, base, tokenizer)
    with pytest.raises(TypeError, match=r"got a path \(cells\.h5ad\)"):
        fit("cells.h5ad", base, tokenizer)
    with pytest.raises(ValueError, match="PeftModel carries an adapter already"):
        fit(made_up(), make_trainable(copy.deepcopy(base), "lora"), tokenizer)
    with pytest.raises(ValueError, match="has no cells"):
        annotate(made_up()[:0], make_classifier(base, TYPES), tokenizer)


def test_bad_model_and_settings(base, annotator, tokenizer, tmp_path):
    unnamed = make_classifier(base, ["LABEL_0", "LABEL_1"])
    with pytest.raises(ValueError, match="2 classes of the model have no names"):
        annotate(made_up(4), unnamed, tokenizer)
    with pytest.raises(ValueError, match=r"threshold must lie in \[0, 1\], got 2"):
        annotate(made_up(4), annotator, tokenizer, threshold=2)
    with pytest.raises(TypeError, match=r"got a path"):
        annotate(Path("cells.h5ad"), annotator, tokenizer)
    with pytest.raises(ValueError, match="class_weights must be"):
        AnnotatorSettings(class_weights="equal")
    with pytest.raises(ValueError, match=r"wanted_accuracy must lie in \(0, 1\], got 1.5"):
        AnnotatorSettings(wanted_accuracy=1.5)
    made_up(6).write_h5ad(tmp_path / "other.h5ad")
    other, _ = build_vocabulary({"other": tmp_path / "other.h5ad"}, show_progress=False)
    with pytest.raises(ValueError, match=r"The tokenizer has .* tokens and the model"):
        annotate(made_up(4), annotator, ScDivaTokenizer(vocabulary=other))


def test_not_finite_logits_are_refused(base, tokenizer):
    broken = make_classifier(base, TYPES)
    with torch.no_grad():
        broken.classifier.bias[0] = torch.nan
    with pytest.raises(FloatingPointError, match="4 of 4 cells have logits that are not finite"):
        annotate(made_up(4), broken, tokenizer)


def test_bad_files(base, annotator, tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"holds no {ANNOTATOR_FILE}"):
        load_annotator(tmp_path)
    save_annotator(annotator, tmp_path / "moved")
    tmp_path.joinpath("moved/adapter_config.json").write_text('{"base_model_name_or_path": "/no/such/base"}')
    with pytest.raises(
        FileNotFoundError, match=r"stands on /no/such/base, which is not there\. Pass base_mo"
    ):
        load_annotator(tmp_path / "moved")
    file = tmp_path / "moved" / ANNOTATOR_FILE
    content = file.read_text("utf-8")
    file.write_text(content.replace('"format_version": 1', '"format_version": 9'), "utf-8")
    with pytest.raises(ValueError, match="format version 9, this release reads 1"):
        load_annotator(tmp_path / "moved")
    other = copy.deepcopy(base)
    other.config.vocabulary_hash = "0" * 64
    other.save_pretrained(tmp_path / "other")
    save_annotator(annotator, tmp_path / "adapter", base_model=tmp_path / "other")  # equal weights
    with pytest.raises(ValueError, match=r"has 000000000000\. Pass the model it was trained on"):
        load_annotator(tmp_path / "adapter")


def test_epochs_are_compared_by_macro_f1_then_loss():
    codes = np.array([0, 1, 1, -1])
    right = np.array([[2.0, 0.0], [0.0, 2.0], [0.0, 2.0], [0.0, 0.0]])
    # Classes of truth and prediction: 0 (the fourth cell counts against it), 1, and the unknown -1.
    loss = np.log(1 + np.exp(-2.0))
    expected = (2 / 3 + 1 + 0) / 3 - 1e-3 * loss
    assert validation_score(right, codes) == pytest.approx(expected)
    assert validation_score(2 * right, codes) > validation_score(right, codes)
    assert validation_score(-right, codes) < validation_score(0.1 * right, codes)


def test_rates_follow_what_is_trained():
    assert default_arguments("lora").learning_rate > default_arguments("full").learning_rate
    assert default_arguments("full", learning_rate=1e-5, seed=3) == FinetuningArguments(
        learning_rate=1e-5, seed=3
    )
    assert CellAnnotator(model=None).calibration is None


def test_hidden_genes_are_a_share_of_each_cell(base, tokenizer):
    cells = read_cells(made_up(400), tokenizer=tokenizer)
    inputs = cells.batch(np.arange(cells.n_cells))
    hidden = hide_genes(inputs, base.config, np.random.default_rng(0))
    is_gene = inputs["input_ids"] >= base.config.n_special_tokens
    is_hidden = hidden["input_ids"] == base.config.mask_token_id
    assert not (is_hidden & ~is_gene).any()
    assert (hidden["expression_values"][is_hidden] == 0).all()
    kept = ~is_hidden
    for name in ("input_ids", "expression_values"):
        assert torch.equal(hidden[name][kept], inputs[name][kept])
    shares = (is_hidden.sum(dim=1) / is_gene.sum(dim=1)).numpy()
    # A share that is uniform on (0, 1), not one share for all cells.
    assert abs(shares.mean() - 0.5) < 0.06
    assert abs(shares.std() - 12**-0.5) < 0.05


def test_a_classifier_of_unfinished_cells_is_trained_on_them(base, tokenizer):
    plain = fit(made_up(), base, tokenizer, n_epochs=2)
    noisy = fit(made_up(), base, tokenizer, n_epochs=2, hides_genes=True)
    assert noisy.history[0]["loss"] != plain.history[0]["loss"]
    again = fit(made_up(), base, tokenizer, n_epochs=2, hides_genes=True)
    assert again.history[0]["loss"] == noisy.history[0]["loss"]
