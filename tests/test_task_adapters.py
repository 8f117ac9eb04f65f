"""Adapters of perturbation and integration: all of them learn, the base stays, and they load elsewhere.

Those of annotation: test_adapters.py. Two fresh processes. Needs no data.
Run: pytest tests/test_task_adapters.py
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForMaskedLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from modeling_scdiva import ScDivaConfig, ScDivaForMaskedDiffusion, ScDivaModel
from modeling_scdiva.adapters import LORA_TARGET_MODULES, load_adapter, make_trainable, save_adapter
from modeling_scdiva.finetuning import FinetuningArguments
from modeling_scdiva.tasks.embedding import embed_cells
from modeling_scdiva.tasks.integration import integrate_batches
from modeling_scdiva.tasks.integration_network import IntegrationArguments
from modeling_scdiva.tasks.perturbation import finetune_perturbation, predict_perturbation
from modeling_scdiva.tasks.perturbation_network import ScDivaForPerturbation
from modeling_scdiva.tasks.perturbation_training import PerturbationSettings, with_delta_decoder
from tokenization_scdiva import synthetic_cells

ROOT = Path(__file__).parents[1]
N_LAYERS = 2
MERGE_TOLERANCE = 1e-5
TASKS = ("perturbation", "integration")
LOADED_AS: dict[str, dict[str, Any]] = {
    "perturbation": {"wrap": with_delta_decoder},
    "integration": {"auto_class": AutoModelForMaskedLM},
}


@pytest.fixture(scope="module")
def cells():
    adata = synthetic_cells(n_cells=60, n_genes=120, seed=7)
    adata.obs["perturbation"] = np.resize(["control", "GENE1", "GENE2"], 60)
    adata.obs["plate"] = np.where(np.arange(60) // 3 % 2, "first", "second")
    return adata


def fit(task, base, adata, tokenizer):
    """Fine-tune a LoRA adapter as the task does."""
    if task == "integration":
        arguments = IntegrationArguments(n_epochs=2, batch_size=20, learning_rate=1e-2, projection_size=8)
        return integrate_batches(
            adata.copy(), model=base, tokenizer=tokenizer, batch_key="plate", arguments=arguments,
            show_progress=False,
        ).model  # fmt: skip
    return finetune_perturbation(
        adata,
        model=with_delta_decoder(base),
        tokenizer=tokenizer,
        perturbation_key="perturbation",
        settings=PerturbationSettings(trainable="lora", validation_fraction=0.0),
        arguments=FinetuningArguments(n_epochs=3, batch_size=10, learning_rate=1e-2),
        accelerator=Accelerator(cpu=True),
    ).model


def answers(task, model, adata, tokenizer):
    """What the fine-tuned model says of cells."""
    if task == "integration":
        return embed_cells(adata, model=model, tokenizer=tokenizer, show_progress=False)
    return predict_perturbation(
        adata, model=model, tokenizer=tokenizer, perturbations=["GENE1"], show_progress=False
    ).X


@pytest.fixture(scope="module", params=TASKS)
def fitted(request, base_folder, cells, tokenizer):
    base = ScDivaForMaskedDiffusion.from_pretrained(base_folder)
    return request.param, fit(request.param, base, cells, tokenizer)


def test_every_matrix_learned_and_the_base_did_not(fitted, base_folder):
    _, model = fitted
    raised = [name for name, tensor in model.named_parameters() if "lora_B" in name and tensor.any()]
    assert len(raised) == len(LORA_TARGET_MODULES) * N_LAYERS  # B starts at zero
    before = ScDivaModel.from_pretrained(base_folder).state_dict()
    encoder = model.get_base_model().base_model
    after = {
        name.replace(".base_layer", ""): tensor
        for name, tensor in encoder.state_dict().items()
        if ".lora_" not in name
    }
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_merged_model_says_the_same(fitted, cells, tokenizer):
    task, model = fitted
    expected = answers(task, model, cells[:9], tokenizer)
    merged = copy.deepcopy(model).merge_and_unload()
    assert not hasattr(merged, "peft_config")
    found = answers(task, merged, cells[:9], tokenizer)
    np.testing.assert_allclose(found, expected, atol=MERGE_TOLERANCE, rtol=0)


FRESH_PROCESS = """
import sys
import numpy as np
from transformers import AutoTokenizer
sys.path.insert(0, sys.argv[4])
from test_task_adapters import LOADED_AS, answers
from modeling_scdiva.adapters import base_of, load_adapter
from tokenization_scdiva import synthetic_cells

task, folder, output = sys.argv[1:4]
tokenizer = AutoTokenizer.from_pretrained(base_of(folder))
cells = synthetic_cells(n_cells=60, n_genes=120, seed=7)[:9]
np.save(output, answers(task, load_adapter(folder, **LOADED_AS[task]), cells, tokenizer))
"""


def test_fresh_process_says_the_same(fitted, cells, tokenizer, base_folder, tmp_path):
    task, model = fitted
    save_adapter(model, tmp_path / "adapter")
    named = json.loads((tmp_path / "adapter/adapter_config.json").read_text("utf-8"))
    assert named["base_model_name_or_path"] == str(base_folder)
    expected = answers(task, model, cells[:9], tokenizer)
    paths = [task, tmp_path / "adapter", tmp_path / "found.npy", ROOT / "tests"]
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FRESH_PROCESS, *map(str, paths)]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, timeout=300)
    np.testing.assert_array_equal(np.load(tmp_path / "found.npy"), expected)


@pytest.mark.parametrize("task", TASKS)
def test_base_with_its_own_code(task, base_folder, cells, tokenizer, tmp_path):
    """Trained over the code that the checkpoint brings, loaded over that of this package."""
    reference = ScDivaConfig.from_pretrained(base_folder).auto_map["AutoModelForMaskedLM"]
    remote = get_class_from_dynamic_module(reference, base_folder).from_pretrained(base_folder)
    assert type(remote).__module__.startswith("transformers_modules")
    model = fit(task, remote, cells, tokenizer)
    save_adapter(model, tmp_path / "adapter")
    assert "transformers_modules" not in (tmp_path / "adapter/adapter_config.json").read_text("utf-8")
    loaded = load_adapter(tmp_path / "adapter", **LOADED_AS[task])
    np.testing.assert_array_equal(
        answers(task, loaded, cells[:9], tokenizer), answers(task, model, cells[:9], tokenizer)
    )


@pytest.mark.parametrize("task", TASKS)
def test_adapters_are_small_beside_the_published_size(task):
    """Rank 8, with the decoder of changes: below 5 % of the base at paper.json."""
    settings = json.loads((ROOT / "examples/configs/paper.json").read_text("utf-8"))
    with torch.device("meta"):
        model_class = ScDivaForPerturbation if task == "perturbation" else ScDivaForMaskedDiffusion
        model = model_class(ScDivaConfig(**settings))
        n_base = sum(parameter.numel() for parameter in model.base_model.parameters())
        heads = ("delta_decoder",) if task == "perturbation" else ()
        adapted = make_trainable(model, "lora", modules_to_save=heads)
    n_trained = sum(tensor.numel() for tensor in adapted.parameters() if tensor.requires_grad)
    assert 0 < n_trained < 0.05 * n_base


def test_what_is_not_its_adapter_is_refused(fitted, base_folder, tmp_path):
    task, model = fitted
    save_adapter(model, tmp_path / "adapter")
    other = {} if task == "integration" else {"auto_class": AutoModelForMaskedLM}
    with pytest.raises(ValueError, match=r"does not fit a ScDiva\w+: .* missing or left over.*Pass as auto"):
        load_adapter(tmp_path / "adapter", **other)
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config\.json: load a whole model with"):
        load_adapter(base_folder)
