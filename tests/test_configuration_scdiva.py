"""Tests of `ScDivaConfig` and of the configuration files in `examples/configs`.

Scope: fields, refusals, relations between fields, saving and loading, size of the published network.
Run: pytest tests/test_configuration_scdiva.py
"""

import json
import logging
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

import modeling_scdiva.modeling_scdiva
from modeling_scdiva import ScDivaConfig, ScDivaForMaskedDiffusion
from modeling_scdiva.configuration_scdiva import AUTO_MAP

CONFIGS = Path(__file__).parents[1] / "examples" / "configs"


def count_parameters(config: ScDivaConfig) -> int:
    with torch.device("meta"):
        model = ScDivaForMaskedDiffusion(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["tiny", "small", "paper"])
def test_example_configs_name_fields_only(name):
    saved = json.loads((CONFIGS / f"{name}.json").read_text())
    known = {field.name for field in fields(ScDivaConfig)} | {"model_type"}
    assert set(saved) <= known
    config = ScDivaConfig.from_json_file(CONFIGS / f"{name}.json")
    assert {key: getattr(config, key) for key in saved} == saved


def test_paper_config_is_the_published_network():
    config = ScDivaConfig.from_json_file(CONFIGS / "paper.json")
    assert config.to_dict() == ScDivaConfig().to_dict()
    assert not config.exclude_visible_genes
    assert config.value_head == "scalar"
    n_parameters = count_parameters(config)
    assert 93.5e6 <= n_parameters <= 95.0e6
    # By hand: embedding, layers of attention, SwiGLU and two norms, last norm, value embedding and its hidden
    # vector, gene transform, gene head, value head.
    d, v, f = 512, 41_818, 2_048
    layers = 12 * (4 * d * d + 3 * d * f + 2 * d)
    value_embedding = 2 * d + d * d + d + d
    heads = (d * d + d + d) + (d * v + v) + (d * d + d + d + 1)
    assert n_parameters == v * d + layers + d + value_embedding + heads == 93_998_427


def test_value_head_for_genes_adds_what_it_says():
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    plain, by_gene = (count_parameters(ScDivaConfig(**sizes, value_head=head)) for head in ("scalar", "gene"))
    assert by_gene - plain == 32 * 32 + 32  # a wider first layer and the norm of the gene embedding
    assert count_parameters(ScDivaConfig(**sizes, exclude_visible_genes=True)) == plain


def test_unknown_keyword_is_refused():
    with pytest.raises(ValueError, match="no field 'hiden_size'"):
        ScDivaConfig(hiden_size=64)
    with pytest.raises(ValueError, match="no field 'temperature'"):
        ScDivaConfig(temperature=0.5)  # the base class would swallow it


def test_hand_written_file_with_unknown_key_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"hidden_size": 64, "n_layers": 2}))
    with pytest.raises(ValueError, match="no field 'n_layers'"):
        ScDivaConfig.from_json_file(path)


def test_saved_file_with_foreign_entry_loads_with_a_warning(tmp_path, caplog):
    config = ScDivaConfig(vocab_size=50)
    config.eos_token_id = None  # as training tools do
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | {"eos_token_id": 7}))
    with caplog.at_level(logging.WARNING, logger="modeling_scdiva.configuration_scdiva"):
        loaded = ScDivaConfig.from_pretrained(tmp_path)
    assert loaded.vocab_size == 50
    assert "eos_token_id" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 100, "num_attention_heads": 8}, r"hidden_size \(100\) .* num_attention_heads \(8\)"),
        ({"hidden_size": 24, "num_attention_heads": 8}, "even head width"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
        ({"hidden_dropout": 1.0}, r"hidden_dropout must lie in \[0, 1\), got 1.0"),
        ({"attention_dropout": -0.1}, "attention_dropout must lie"),
        ({"expression_loss_weight": -1.0}, "expression_loss_weight must not be negative, got -1.0"),
        ({"mask_token_id": 0}, "different ids"),
        ({"pert_token_id": 9}, r"first n_special_tokens \(5\) ids, got {'pert_token_id': 9}"),
        ({"vocab_size": 5}, r"vocab_size \(5\) must exceed n_special_tokens \(5\)"),
        ({"hidden_size": "512"}, "hidden_size"),
        ({"value_head": "genes"}, "value_head"),
        ({"objective": "papers"}, "objective"),
    ],
)
def test_contradictions_are_refused(arguments, message):
    with pytest.raises(StrictDataclassError, match=message):
        ScDivaConfig(**arguments)


def test_head_width_is_accepted_exactly_when_it_is_even():
    for hidden_size in range(1, 40):
        for n_heads in range(1, 10):
            head_width, rest = divmod(hidden_size, n_heads)
            is_good = rest == 0 and head_width % 2 == 0 and head_width > 0
            try:
                ScDivaConfig(hidden_size=hidden_size, num_attention_heads=n_heads)
            except StrictDataclassError:
                assert not is_good
            else:
                assert is_good


def test_save_and_load_keep_every_field(tmp_path):
    sizes = {"vocab_size": 77, "hidden_size": 48, "num_attention_heads": 4}
    config = ScDivaConfig(**sizes, value_head="gene", vocabulary_hash="ab" * 32, num_labels=7)
    config.save_pretrained(tmp_path)
    assert ScDivaConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert isinstance(AutoConfig.from_pretrained(tmp_path), ScDivaConfig)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"] == AUTO_MAP
    assert (tmp_path / "configuration_scdiva.py").exists()


def test_auto_map_names_what_is_there():
    modules = {
        "configuration_scdiva": modeling_scdiva.configuration_scdiva,
        "modeling_scdiva": modeling_scdiva.modeling_scdiva,
    }
    for reference in AUTO_MAP.values():
        module, name = reference.split(".")
        assert hasattr(modules[module], name)


def test_rotary_base_is_that_of_the_paper():
    assert ScDivaConfig().rope_parameters == {"rope_theta": 10_000.0, "rope_type": "default"}
