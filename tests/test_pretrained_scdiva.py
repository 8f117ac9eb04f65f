"""Tests of saving and loading: bit-equal, strict about weights, and right for every Auto class.

Scope: `save_pretrained`, `from_pretrained` and the Auto classes, on whole and on broken checkpoints.
Run: pytest tests/test_pretrained_scdiva.py
"""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from modeling_scdiva import (
    ScDivaConfig,
    ScDivaForMaskedDiffusion,
    ScDivaForSequenceClassification,
    ScDivaModel,
)

TRAVELLING_FILES = {
    "bound_scdiva.py",
    "cell_layout_scdiva.py",
    "conditions_scdiva.py",
    "configuration_scdiva.py",
    "denoiser_scdiva.py",
    "diffusion_heads_scdiva.py",
    "diffusion_scdiva.py",
    "generation_config_scdiva.py",
    "generation_scdiva.py",
    "layers_scdiva.py",
    "likelihood_scdiva.py",
    "modeling_scdiva.py",
    "outputs_scdiva.py",
    "pretrained_scdiva.py",
    "rank_bounds_scdiva.py",
    "sampling_scdiva.py",
    "size_law_scdiva.py",
    "steering_scdiva.py",
    "unmask_scdiva.py",
    "value_law_scdiva.py",
}


def tiny_config(**changes) -> ScDivaConfig:
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return ScDivaConfig(**(sizes | {"intermediate_size": 24} | changes))


def make_inputs():
    input_ids = torch.tensor([[2, 7, 1, 9], [2, 30, 8, 0]])
    return {"input_ids": input_ids, "expression_values": torch.rand(input_ids.shape)}


@pytest.fixture
def diffusion_folder(tmp_path):
    torch.manual_seed(0)
    model = ScDivaForMaskedDiffusion(tiny_config(value_head="gene"))
    model.set_gene_weights(torch.rand(40) + 0.5)
    model.save_pretrained(tmp_path)
    return tmp_path


def change_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("value_head", ["scalar", "gene"])
def test_save_and_load_are_bit_equal(tmp_path, value_head):
    torch.manual_seed(0)
    model = ScDivaForMaskedDiffusion(tiny_config(value_head=value_head)).eval()
    if value_head == "gene":
        model.set_gene_weights(torch.rand(40) + 0.5)
    inputs = make_inputs()
    expected = model(**inputs)
    model.save_pretrained(tmp_path / "first")
    once = ScDivaForMaskedDiffusion.from_pretrained(tmp_path / "first")
    once.save_pretrained(tmp_path / "second")
    twice = AutoModelForMaskedLM.from_pretrained(tmp_path / "second")
    for loaded in (once, twice):
        assert not loaded.training
        output = loaded(**inputs)
        torch.testing.assert_close(output.logits, expected.logits, atol=0, rtol=0)
        torch.testing.assert_close(
            output.expression_predictions, expected.expression_predictions, atol=0, rtol=0
        )
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_buffers_that_are_not_saved_are_rebuilt(diffusion_folder):
    loaded = ScDivaForMaskedDiffusion.from_pretrained(diffusion_folder)
    fresh = ScDivaForMaskedDiffusion(tiny_config(value_head="gene"))
    assert torch.equal(loaded.model.rotary_emb.inv_freq, fresh.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(
    ("auto_class", "model_class"),
    [
        (AutoModel, ScDivaModel),
        (AutoModelForMaskedLM, ScDivaForMaskedDiffusion),
        (AutoModelForPreTraining, ScDivaForMaskedDiffusion),
        (AutoModelForSequenceClassification, ScDivaForSequenceClassification),
    ],
)
def test_auto_classes_find_ours_without_a_trust_flag(diffusion_folder, auto_class, model_class):
    assert type(auto_class.from_pretrained(diffusion_folder)) is model_class


def test_checkpoint_carries_its_code_and_every_auto_class(diffusion_folder):
    assert {path.name for path in diffusion_folder.glob("*.py")} == TRAVELLING_FILES
    auto_map = json.loads((diffusion_folder / "config.json").read_text())["auto_map"]
    for auto_class in ("AutoModel", "AutoModelForMaskedLM", "AutoModelForPreTraining"):
        model_class = get_class_from_dynamic_module(auto_map[auto_class], diffusion_folder)
        assert model_class.__module__.startswith("transformers_modules.")
        loaded = model_class.from_pretrained(diffusion_folder)
        assert torch.equal(
            loaded.get_input_embeddings().weight,
            load_file(diffusion_folder / "model.safetensors")["model.embed_tokens.weight"],
        )


def test_encoder_loads_from_a_diffusion_checkpoint(diffusion_folder):
    model = ScDivaForMaskedDiffusion.from_pretrained(diffusion_folder)
    encoder = AutoModel.from_pretrained(diffusion_folder)
    inputs = make_inputs()
    torch.testing.assert_close(
        encoder(**inputs).last_hidden_state, model(**inputs).last_hidden_state, atol=0, rtol=0
    )


LOADERS = [ScDivaForMaskedDiffusion, AutoModelForMaskedLM, AutoModelForPreTraining, AutoModel]


@pytest.mark.parametrize("loader", LOADERS)
def test_missing_weights_raise(diffusion_folder, loader):
    change_weights(diffusion_folder, lambda weights: weights.pop("model.layers.0.self_attn.q_proj.weight"))
    with pytest.raises(RuntimeError, match=r"missing: .*layers\.0\.self_attn\.q_proj\.weight"):
        loader.from_pretrained(diffusion_folder)


@pytest.mark.parametrize("loader", LOADERS)
def test_unexpected_weights_raise(diffusion_folder, loader):
    change_weights(diffusion_folder, lambda weights: weights.update({"model.extra.weight": torch.zeros(2)}))
    with pytest.raises(RuntimeError, match=r"unexpected: .*extra\.weight"):
        loader.from_pretrained(diffusion_folder)


@pytest.mark.parametrize("loader", LOADERS)
def test_wrong_shapes_raise_and_name_both(diffusion_folder, loader):
    change_weights(diffusion_folder, lambda weights: weights.update({"model.norm.weight": torch.ones(17)}))
    with pytest.raises(RuntimeError, match=r"wrong shape: .*norm\.weight is \(17,\), wanted \(16,\)"):
        loader.from_pretrained(diffusion_folder)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_raise(diffusion_folder, loader, bad):
    def spoil(weights):
        weights["model.embed_tokens.weight"][3, 2] = bad

    change_weights(diffusion_folder, spoil)
    with pytest.raises(RuntimeError, match=r"not finite: .*embed_tokens\.weight"):
        loader.from_pretrained(diffusion_folder)


def test_remote_code_is_as_strict(diffusion_folder):
    model_class = get_class_from_dynamic_module("modeling_scdiva.ScDivaForMaskedDiffusion", diffusion_folder)
    change_weights(diffusion_folder, lambda weights: weights.pop("lm_head.bias"))
    with pytest.raises(RuntimeError, match=r"missing: lm_head\.bias"):
        model_class.from_pretrained(diffusion_folder)


@pytest.mark.parametrize("name", ["lm_head.weight", "value_head.gene_weights", "gene_transform.norm.weight"])
def test_missing_head_weights_raise(diffusion_folder, name):
    change_weights(diffusion_folder, lambda weights: weights.pop(name))
    with pytest.raises(RuntimeError, match=f"missing: {name}"):
        ScDivaForMaskedDiffusion.from_pretrained(diffusion_folder)
    ScDivaModel.from_pretrained(diffusion_folder)  # the encoder needs none of them


def test_diffusion_heads_never_start_at_random(tmp_path):
    ScDivaModel(tiny_config()).save_pretrained(tmp_path)
    with pytest.raises(
        RuntimeError, match=r"does not hold the weights of ScDivaForMaskedDiffusion: missing: .*lm_head"
    ):
        ScDivaForMaskedDiffusion.from_pretrained(tmp_path)


def test_long_lists_of_problems_are_cut(tmp_path):
    ScDivaModel(tiny_config()).save_pretrained(tmp_path)
    change_weights(tmp_path, lambda weights: [weights.pop(name) for name in list(weights)[1:]])
    with pytest.raises(RuntimeError, match=r"; and \d+ more\. Load it with"):
        ScDivaModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("source", [ScDivaForMaskedDiffusion, ScDivaModel])
def test_new_classifier_is_reported_by_name(tmp_path, caplog, source):
    torch.manual_seed(0)
    model = source(tiny_config())
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="modeling_scdiva.pretrained_scdiva"):
        classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert "starts classifier.bias, classifier.weight at random" in caplog.text
    assert classifier.classifier.weight.shape == (3, 16)
    assert torch.equal(classifier.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_trained_classifier_may_not_be_lost(tmp_path):
    ScDivaForSequenceClassification(tiny_config(num_labels=3)).save_pretrained(tmp_path)
    AutoModelForSequenceClassification.from_pretrained(tmp_path)
    change_weights(
        tmp_path, lambda weights: [weights.pop("classifier.weight"), weights.pop("classifier.bias")]
    )
    with pytest.raises(RuntimeError, match=r"missing: classifier\.bias; missing: classifier\.weight"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_half_a_classifier_is_refused(diffusion_folder):
    change_weights(
        diffusion_folder, lambda weights: weights.update({"classifier.weight": torch.zeros(2, 16)})
    )
    with pytest.raises(RuntimeError, match=r"missing: classifier\.bias"):
        ScDivaForSequenceClassification.from_pretrained(diffusion_folder)


def test_other_number_of_classes_needs_a_word(tmp_path):
    ScDivaForSequenceClassification(tiny_config(num_labels=3)).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"classifier\.weight is \(3, 16\), wanted \(5, 16\)"):
        ScDivaForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    model = ScDivaForSequenceClassification.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True
    )
    assert model.classifier.weight.shape == (5, 16)


def test_loading_report_goes_to_those_who_ask(diffusion_folder):
    model, report = ScDivaForSequenceClassification.from_pretrained(
        diffusion_folder, output_loading_info=True
    )
    assert isinstance(model, ScDivaForSequenceClassification)
    assert report["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert not report["unexpected_keys"]


def test_only_safetensors_are_read(diffusion_folder):
    with pytest.raises(ValueError, match="safetensors only"):
        ScDivaForMaskedDiffusion.from_pretrained(diffusion_folder, use_safetensors=False)
    weights = load_file(diffusion_folder / "model.safetensors")
    torch.save(weights, diffusion_folder / "pytorch_model.bin")
    (diffusion_folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        ScDivaForMaskedDiffusion.from_pretrained(diffusion_folder)


def test_cut_files_raise(diffusion_folder):
    path = diffusion_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RuntimeError, match=r"weights of .* are damaged \(.*not fully covered\)\. Fetch"):
        AutoModel.from_pretrained(diffusion_folder)


def test_weights_of_another_kind_of_model_raise(diffusion_folder):
    weights = {"bert.encoder.weight": torch.zeros(3)}
    save_file(weights, diffusion_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"missing: .*; and \d+ more"):
        AutoModel.from_pretrained(diffusion_folder)


def test_unknown_arguments_raise(diffusion_folder):
    with pytest.raises(TypeError, match="hiden_size"):
        ScDivaModel.from_pretrained(diffusion_folder, hiden_size=3)


def test_dtype_of_the_checkpoint_is_kept_and_can_be_chosen(diffusion_folder):
    model = ScDivaForMaskedDiffusion.from_pretrained(diffusion_folder, dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    model.save_pretrained(diffusion_folder / "half")
    assert AutoModel.from_pretrained(diffusion_folder / "half").dtype == torch.bfloat16
    assert AutoModel.from_pretrained(diffusion_folder / "half", dtype=torch.float32).dtype == torch.float32


def test_tied_embeddings_survive(tmp_path):
    torch.manual_seed(0)
    model = ScDivaForMaskedDiffusion(tiny_config(tie_word_embeddings=True)).eval()
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = ScDivaForMaskedDiffusion.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    inputs = make_inputs()
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, atol=0, rtol=0)


def test_shards_load_and_a_lost_shard_raises(tmp_path):
    torch.manual_seed(0)
    model = ScDivaForMaskedDiffusion(tiny_config()).eval()
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    inputs = make_inputs()
    loaded = ScDivaForMaskedDiffusion.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, atol=0, rtol=0)
    shards[-1].unlink()
    with pytest.raises((OSError, FileNotFoundError), match="model-"):
        ScDivaForMaskedDiffusion.from_pretrained(tmp_path)
