"""Settings of generation: which win, which are refused, and that they travel with a checkpoint.

Run: pytest tests/test_generation_config_scdiva.py
"""

import json
from dataclasses import fields

import pytest
import torch
from transformers import AutoModelForMaskedLM, GenerationConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from modeling_scdiva import ScDivaForMaskedDiffusion, ScDivaModel
from modeling_scdiva.generation_config_scdiva import (
    DEFAULTS,
    ScDivaGenerationConfig,
    ScDivaGenerationOutput,
)
from modeling_scdiva.size_law_scdiva import fit_size_law
from modeling_scdiva.unmask_scdiva import UnmaskSettings

OTHERS = {
    "steps": 7,
    "tokens_per_step": 3,
    "schedule": "linear",
    "order": "margin",
    "temperature": 0.7,
    "top_p": 0.9,
    "value_temperature": 0.5,
    "rank_consistent": False,
    "remask": "random",
    "remask_rate": 0.2,
    "guidance_scale": 1.5,
    "canonicalize": False,
    "batch_size": 5,
    "seed": 11,
}


def size_law():
    lengths = torch.arange(3, 15).repeat(9).numpy()
    return fit_size_law(lengths, 40.0 * lengths, max_genes=14, target_sum=1e4)


@pytest.fixture
def folder(small_network, tmp_path):
    """A checkpoint with settings of its own."""
    model = small_network()
    model.generation_config = ScDivaGenerationConfig(steps=3, order="rank", size_law=size_law())
    model.save_pretrained(tmp_path)
    return tmp_path


def settings_of(config):
    return {name: getattr(config, name) for name in DEFAULTS}


def test_defaults_are_those_of_the_method():
    config = ScDivaGenerationConfig()
    assert settings_of(config) == DEFAULTS
    assert (config.steps, config.order, config.schedule, config.guidance_scale) == (64, "random", "linear", 1)
    assert ScDivaGenerationConfig.from_model_config(None) == config


def test_every_setting_of_the_loop_gets_there():
    asked = ScDivaGenerationConfig(**OTHERS).unmask_settings()
    for field in fields(UnmaskSettings):
        assert getattr(asked, field.name) == OTHERS.get(field.name, DEFAULTS[field.name])
    bounded = {"entropy_bound": 0.3, "order": "entropy"}
    assert ScDivaGenerationConfig(**bounded).unmask_settings().entropy_bound == 0.3
    assert ScDivaGenerationConfig(schedule="cosine").unmask_settings().schedule == "cosine"


def test_copies_change_what_they_say_and_nothing_else():
    config = ScDivaGenerationConfig(**OTHERS)
    copy = config.updated(steps=9, top_p=1.0)
    assert settings_of(copy) == DEFAULTS | OTHERS | {"steps": 9, "top_p": 1.0}
    assert settings_of(config) == DEFAULTS | OTHERS
    with pytest.raises(ValueError, match="Generation has no setting 'stepz'"):
        config.updated(stepz=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 5}, "no setting 'max_new_tokens'. Settings: steps, tokens_per_step"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": None}, "steps must be at least 1, got None"),
        ({"tokens_per_step": 0}, "tokens_per_step must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"schedule": "sine"}, "schedule must be one of linear, cosine, got 'sine'"),
        ({"order": "left"}, "order must be one of random, rank, margin, entropy, got 'left'"),
        ({"remask": "all"}, "remask must be one of none, random, quality, got 'all'"),
        ({"remask_rate": 1.1}, r"remask_rate must lie in \[0, 1\], got 1.1"),
        ({"temperature": 0.0}, r"temperature must lie in \(0, inf\], got 0.0"),
        ({"temperature": float("nan")}, "temperature must lie in"),
        ({"temperature": float("inf")}, "temperature must lie in"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.01}, r"top_p must lie in \(0, 1\], got 1.01"),
        ({"value_temperature": -1.0}, r"value_temperature must lie in \[0, inf\], got -1.0"),
        ({"guidance_scale": -0.5}, r"guidance_scale must lie in \[0, inf\], got -0.5"),
        ({"entropy_bound": -0.1, "order": "entropy"}, r"must not be negative \(nats\), got -0.1"),
        ({"entropy_bound": 0.1}, "entropy_bound takes the surest slots first"),
        (
            {"entropy_bound": 0.1, "order": "entropy", "remask": "random"},
            "it needs order='entropy', remask='n",
        ),
        ({"entropy_bound": 0.1, "order": "entropy", "tokens_per_step": 1}, "no tokens_per_step, got"),
        ({"tokens_per_step": 2, "schedule": "cosine"}, "tokens_per_step draws equally many genes"),
    ],
)
def test_settings_that_cannot_be_are_refused(small_network, settings, message):
    with pytest.raises(ValueError, match=message):
        ScDivaGenerationConfig(**settings)
    with pytest.raises(ValueError, match=message):
        small_network().generate(n_cells=1, n_genes=2, **settings)


def test_single_settings_win_over_a_configuration_and_that_over_the_checkpoint(small_network):
    model = small_network()
    model.generation_config = ScDivaGenerationConfig(steps=3, seed=1)
    asked = {"n_cells": 2, "n_genes": 20}

    def n_calls(**settings):
        return int(model.generate(**asked, **settings).n_network_calls[0])

    other = ScDivaGenerationConfig(steps=5)
    assert (n_calls(), n_calls(generation_config=other)) == (3, 5)
    assert (n_calls(steps=2), n_calls(generation_config=other, steps=2)) == (2, 2)
    assert n_calls(generation_config=other, tokens_per_step=1) == 20
    assert (model.generation_config.steps, other.steps) == (3, 5)
    by_checkpoint = model.generate(**asked)
    assert torch.equal(by_checkpoint.input_ids, model.generate(**asked, steps=3, seed=1).input_ids)
    assert not torch.equal(by_checkpoint.input_ids, model.generate(**asked, seed=0).input_ids)
    assert not torch.equal(  # a configuration replaces the checkpoint's as a whole
        by_checkpoint.input_ids, model.generate(**asked, generation_config=other, steps=3).input_ids
    )


# Saving and loading.


def test_every_setting_survives_a_file(tmp_path):
    for config in (
        ScDivaGenerationConfig(),
        ScDivaGenerationConfig(**OTHERS, size_law=size_law()),
        ScDivaGenerationConfig(schedule="cosine", order="entropy"),
        ScDivaGenerationConfig(entropy_bound=0.0, order="entropy"),
    ):
        config.save_pretrained(tmp_path)
        loaded = ScDivaGenerationConfig.from_pretrained(tmp_path)
        assert settings_of(loaded) == settings_of(config)
        assert type(loaded) is ScDivaGenerationConfig
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert set(saved) - set(DEFAULTS) <= {"transformers_version", "_from_model_config"}


def test_checkpoints_carry_their_settings(folder, small_network):
    saved = json.loads((folder / "generation_config.json").read_text())
    assert (saved["steps"], saved["order"]) == (3, "rank")
    made = small_network().generate(n_cells=4, steps=3, order="rank", size_law=size_law())
    for loader in (ScDivaForMaskedDiffusion, AutoModelForMaskedLM):
        model = loader.from_pretrained(folder)
        assert model.can_generate()
        assert settings_of(model.generation_config) == DEFAULTS | {
            "steps": 3, "order": "rank", "size_law": size_law(),
        }  # fmt: skip
        again = model.generate(n_cells=4)
        assert torch.equal(again.input_ids, made.input_ids)
        assert torch.equal(again.expression_values, made.expression_values)
    model.save_pretrained(folder / "second")
    assert json.loads((folder / "second" / "generation_config.json").read_text()) == saved


def test_settings_travel_with_the_code(folder, small_network):
    """The classes beside the weights, as `trust_remote_code` takes them, and not those installed."""
    model_class = get_class_from_dynamic_module("modeling_scdiva.ScDivaForMaskedDiffusion", folder)
    model = model_class.from_pretrained(folder)
    for thing in (model, model.generation_config):
        assert type(thing).__module__.startswith("transformers_modules.")
    assert settings_of(model.generation_config)["steps"] == 3
    made = small_network().generate(n_cells=3, steps=3, order="rank", size_law=size_law())
    again = model.generate(n_cells=3)
    assert torch.equal(again.input_ids, made.input_ids)
    assert torch.equal(again.expression_values, made.expression_values)
    nll = model.compute_nll(**inputs_of(made), n_draws=4)
    torch.testing.assert_close(
        nll.gene_nll, small_network().compute_nll(**inputs_of(made), n_draws=4).gene_nll
    )


def inputs_of(made):
    names = ("input_ids", "expression_values", "attention_mask", "size_factors")
    return {name: made[name] for name in names}


def test_an_older_checkpoint_loads_with_the_defaults(folder):
    (folder / "generation_config.json").unlink()
    model = ScDivaForMaskedDiffusion.from_pretrained(folder)
    assert settings_of(model.generation_config) == DEFAULTS
    with pytest.raises(ValueError, match="no law of cell sizes"):
        model.generate(n_cells=2)


def test_other_settings_can_be_taken_at_loading(folder):
    model = ScDivaForMaskedDiffusion.from_pretrained(
        folder, generation_config=ScDivaGenerationConfig(steps=9)
    )
    assert settings_of(model.generation_config) == DEFAULTS | {"steps": 9}


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ('{"steps": 3', OSError, "not a valid JSON file"),
        ('{"stepz": 3}', ValueError, "no setting 'stepz'"),
        ('{"steps": 0}', ValueError, "steps must be at least 1, got 0"),
    ],
)
def test_damaged_settings_are_refused(folder, text, kind, message):
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(kind, match=message):
        ScDivaForMaskedDiffusion.from_pretrained(folder)
    ScDivaModel.from_pretrained(folder)  # the encoder needs none


def test_autoregressive_settings_are_not_ours(small_network):
    with pytest.raises(TypeError, match="must be a ScDivaGenerationConfig, got GenerationConfig"):
        small_network().generate(n_cells=1, n_genes=2, generation_config=GenerationConfig())
    with pytest.raises(NotImplementedError, match="masked diffusion, which has no autoregressive"):
        ScDivaGenerationConfig().get_generation_mode()


def test_output_is_a_dictionary_of_what_there_is():
    output = ScDivaGenerationOutput(input_ids=torch.zeros(1, 2), size_factors=torch.ones(1))
    assert set(output) == {"input_ids", "size_factors"}
    assert output["size_factors"] is output.size_factors


def test_weights_without_a_folder_leave_the_defaults(fresh_tiny_model):
    model = fresh_tiny_model()
    again = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert again.generation_config.to_dict() == ScDivaGenerationConfig().to_dict()
