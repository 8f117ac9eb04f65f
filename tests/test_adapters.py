"""Adapters: every LoRA matrix learns, the base stays as it is, and what is saved predicts the same elsewhere.

One fresh process. Needs no data. Run: pytest tests/test_adapters.py
"""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file
from transformers import AutoModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from modeling_scdiva import ScDivaConfig, ScDivaForSequenceClassification, ScDivaModel
from modeling_scdiva.adapters import LORA_TARGET_MODULES, make_trainable, save_adapter, trainable_state
from modeling_scdiva.finetuning import FinetuningArguments, finetune
from modeling_scdiva.tasks.classifier import WeightedClassifier, make_classifier

ROOT = Path(__file__).parents[1]
NAMES = ["B", "NK", "T"]
N_LAYERS = 2
MERGE_TOLERANCE = 1e-5


@pytest.fixture
def classifier(base_folder):
    return make_classifier(ScDivaModel.from_pretrained(base_folder), NAMES)


def with_lora(classifier, **kwargs):
    return make_trainable(classifier, "lora", modules_to_save=("classifier",), **kwargs)


def cells(n_cells=6, *, width=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(5, 60, (n_cells, width), generator=generator)
    input_ids[:, 0] = 2
    values = torch.rand(n_cells, width, generator=generator) * 4
    return {"input_ids": input_ids, "expression_values": values, "labels": torch.arange(n_cells) % 3}


def logits_of(model, **kwargs):
    inputs = cells(**kwargs)
    del inputs["labels"]
    model.eval()
    with torch.no_grad():
        return model(**inputs).logits


def train(model, *, n_epochs=3):
    arguments = FinetuningArguments(n_epochs=n_epochs, batch_size=6, learning_rate=1e-2, warmup_fraction=0.0)
    batch = cells()
    return finetune(
        WeightedClassifier(model, None),
        n_examples=6,
        make_batch=lambda rows, epoch: {name: tensor[rows] for name, tensor in batch.items()},
        arguments=arguments,
        show_progress=False,
    )


def zero_gradients(model, part):
    return [
        name
        for name, parameter in model.named_parameters()
        if part in name and (parameter.grad is None or not parameter.grad.abs().max() > 0)
    ]


def test_gradients_reach_every_lora_matrix(classifier):
    """B starts at zero, so A has no gradient before the first step: look after one."""
    model = with_lora(classifier)
    matrices = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert len(matrices) == 2 * len(LORA_TARGET_MODULES) * N_LAYERS
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**cells()).loss.backward()
    assert zero_gradients(model, "lora_B") == []
    optimizer.step()
    optimizer.zero_grad()
    model(**cells()).loss.backward()
    assert zero_gradients(model, "lora_") == []
    assert zero_gradients(model, "classifier.modules_to_save") == []


def test_the_gradient_test_names_a_matrix_that_is_cut_off(classifier):
    model = with_lora(classifier)
    layer = model.get_base_model().model.layers[0].mlp.up_proj.lora_B["default"]
    layer.register_full_backward_hook(lambda module, into, out: tuple(torch.zeros_like(g) for g in into))
    layer.weight.register_hook(torch.zeros_like)
    model(**cells()).loss.backward()
    found = zero_gradients(model, "lora_B")
    assert len(found) == 1
    assert "layers.0.mlp.up_proj" in found[0]


def test_base_is_bit_identical_after_training(base_folder, classifier):
    before = load_file(base_folder / "model.safetensors")
    model = with_lora(classifier)
    start = trainable_state(model)
    history = train(model)
    assert history[-1]["loss"] < history[0]["loss"]
    after = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): parameter
        for name, parameter in model.named_parameters()
        if "lora_" not in name and "classifier" not in name
    }
    encoder_names = {name for name in before if name.startswith("model.")}
    assert set(after) == encoder_names
    for name in encoder_names:
        assert torch.equal(after[name].detach(), before[name]), name
    same = [name for name, tensor in trainable_state(model).items() if torch.equal(tensor, start[name])]
    assert same == []


def test_base_model_itself_is_never_touched(base_folder):
    base = ScDivaModel.from_pretrained(base_folder)
    before = copy.deepcopy(base.state_dict())
    for trainable in ("lora", "full"):
        train(make_trainable(make_classifier(base, NAMES), trainable, modules_to_save=("classifier",)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_fresh_adapter_changes_nothing(classifier):
    expected = logits_of(classifier)
    torch.testing.assert_close(logits_of(with_lora(classifier)), expected, atol=0, rtol=0)


def test_adapter_is_small_beside_a_small_base(tmp_path):
    """At the size of examples/configs/small.json, rank 8, adapter and head are below 5 % of the base."""
    settings = json.loads((ROOT / "examples/configs/small.json").read_text("utf-8"))
    model = ScDivaForSequenceClassification(ScDivaConfig(**settings, num_labels=10))
    n_base = sum(parameter.numel() for parameter in model.parameters())
    adapted = with_lora(model)
    save_adapter(adapted, tmp_path, base_model="someone/base")
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert 0 < size < 0.05 * 4 * n_base


def test_merged_model_is_the_same(classifier, tmp_path):
    model = with_lora(classifier)
    train(model)
    expected = logits_of(model)
    merged = model.merge_and_unload()
    assert type(merged) is ScDivaForSequenceClassification
    torch.testing.assert_close(logits_of(merged), expected, atol=MERGE_TOLERANCE, rtol=0)
    merged.save_pretrained(tmp_path)
    loaded = ScDivaForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(loaded), expected, atol=MERGE_TOLERANCE, rtol=0)
    assert loaded.config.id2label == dict(enumerate(NAMES))


FRESH_PROCESS = """
import importlib.abc, sys
import numpy as np, torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_scdiva", "tokenization_scdiva"):
            raise ImportError(name)

folder, inputs, output = sys.argv[1:]
cells = {name: torch.from_numpy(array) for name, array in np.load(inputs).items()}
blocked = Blocked()
sys.meta_path.insert(0, blocked)  # first without this project: the base brings its own code
remote = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=3, trust_remote_code=True)
assert type(remote.get_base_model()).__module__.startswith("transformers_modules")
with torch.no_grad():
    logits = remote.eval()(**cells).logits.numpy()

sys.meta_path.remove(blocked)
from modeling_scdiva.tasks.annotation import annotate_cells
from modeling_scdiva.adapters import base_of
from modeling_scdiva.tasks.annotator_files import load_annotator
from tokenization_scdiva import synthetic_cells
tokenizer = AutoTokenizer.from_pretrained(base_of(folder))
adata = synthetic_cells(n_cells=12, n_genes=120, seed=9)
found = annotate_cells(adata, model=load_annotator(folder), tokenizer=tokenizer, show_progress=False)
types = found.predicted_cell_types.astype(str)
np.savez(output, probabilities=found.probabilities, types=types, logits=logits)
"""


def test_fresh_process_predicts_the_same(base_folder, tokenizer, tmp_path, monkeypatch):
    """Fine-tune and save; another process in another folder loads it without and with this project."""
    from modeling_scdiva.tasks.annotation import AnnotatorSettings, annotate_cells, finetune_annotator
    from modeling_scdiva.tasks.annotator_files import save_annotator
    from tokenization_scdiva import synthetic_cells

    monkeypatch.chdir(base_folder.parent)  # a relative path, as a user types it
    base = ScDivaModel.from_pretrained(base_folder.name)
    adata = synthetic_cells(n_cells=60, n_genes=120, n_cell_types=3, seed=8)
    annotator = finetune_annotator(
        adata,
        model=base,
        tokenizer=tokenizer,
        label_key="cell_type",
        settings=AnnotatorSettings(wanted_accuracy=0.6),
        arguments=FinetuningArguments(n_epochs=2, learning_rate=1e-2),
        show_progress=False,
    )
    folder = tmp_path / "adapter"
    save_annotator(annotator, folder)
    assert not (folder / "config.json").exists()
    test_cells = synthetic_cells(n_cells=12, n_genes=120, seed=9)
    expected = annotate_cells(test_cells, model=annotator, tokenizer=tokenizer, show_progress=False)
    inputs = dict(tokenizer.encode_anndata(test_cells))
    np.savez(tmp_path / "inputs.npz", **{name: tensor.numpy() for name, tensor in inputs.items()})
    with torch.no_grad():
        logits = annotator.model(**inputs).logits

    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    paths = [folder, tmp_path / "inputs.npz", tmp_path / "found.npz"]
    command = [sys.executable, "-c", FRESH_PROCESS, *map(str, paths)]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run(command, check=True, cwd=elsewhere, env=environment, timeout=300)
    found = np.load(tmp_path / "found.npz")
    np.testing.assert_array_equal(found["probabilities"], expected.probabilities)
    np.testing.assert_array_equal(found["types"], expected.predicted_cell_types.astype(str))
    # PEFT alone, over the base's own code.
    np.testing.assert_array_equal(found["logits"], logits.numpy())


def test_works_on_remote_code(base_folder, classifier, tmp_path):
    """The base comes with its own code, under another module name, and adapters fit it alike."""
    local = with_lora(classifier)
    train(local)
    save_adapter(local, tmp_path / "adapter")
    # What AutoModel.from_pretrained(..., trust_remote_code=True) does where the package is not installed.
    reference = ScDivaConfig.from_pretrained(base_folder).auto_map["AutoModel"]
    remote = get_class_from_dynamic_module(reference, base_folder).from_pretrained(base_folder)
    assert type(remote).__module__.startswith("transformers_modules")
    remote_classifier = make_classifier(remote, NAMES)
    assert type(remote_classifier).__module__ == type(remote).__module__
    loaded = PeftModel.from_pretrained(remote_classifier, tmp_path / "adapter")
    torch.testing.assert_close(logits_of(loaded), logits_of(local), atol=0, rtol=0)
    remote_lora = with_lora(make_classifier(remote, NAMES))
    train(remote_lora)
    assert zero_parameters(remote_lora) == []
    merged = logits_of(copy.deepcopy(remote_lora).merge_and_unload())
    torch.testing.assert_close(merged, logits_of(remote_lora), atol=MERGE_TOLERANCE, rtol=0)


def test_peft_alone_reloads_the_adapter(classifier, tmp_path):
    model = with_lora(classifier)
    train(model)
    save_adapter(model, tmp_path)
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    torch.testing.assert_close(logits_of(loaded), logits_of(model), atol=0, rtol=0)


def zero_parameters(model):
    return [name for name, parameter in model.named_parameters() if "lora_B" in name and not parameter.any()]


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [
        ("full", {"model", "classifier"}),
        ("last_layers", {"model.layers.1", "model.norm", "classifier"}),
        ("head", {"classifier"}),
    ],
)
def test_what_is_trained(classifier, trainable, expected):
    model = make_trainable(classifier, trainable, n_last_layers=1, modules_to_save=("classifier",))
    assert model is classifier
    for name, parameter in model.named_parameters():
        is_expected = any(name == part or name.startswith(f"{part}.") for part in expected)
        assert parameter.requires_grad == is_expected, name


def test_modules_are_found_by_their_whole_name(classifier):
    model = make_trainable(classifier, "head", modules_to_save=("model.norm",))
    assert [name for name, part in model.named_parameters() if part.requires_grad] == ["model.norm.weight"]


def test_adapters_are_not_stacked(classifier):
    """What is trained on top of an adapter would be saved without it."""
    model = with_lora(classifier)
    for build in (with_lora, lambda adapted: make_classifier(adapted, NAMES)):
        for adapted in (model, model.get_base_model()):
            with pytest.raises(ValueError, match=r"carries an adapter already\. Merge it with"):
                build(adapted)


def test_whole_model_is_saved_with_its_tokenizer(classifier, tokenizer, tmp_path):
    model = make_trainable(classifier, "last_layers", n_last_layers=1, modules_to_save=("classifier",))
    train(model)
    save_adapter(model, tmp_path, tokenizer=tokenizer)
    loaded = ScDivaForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(loaded), logits_of(model), atol=0, rtol=0)
    assert (tmp_path / "gene_vocabulary.json").is_file()
    assert AutoModel.from_pretrained(tmp_path).config.vocab_size == len(tokenizer)


def test_adapter_names_its_base_from_anywhere(base_folder, classifier, tmp_path, monkeypatch):
    monkeypatch.chdir(base_folder.parent)
    model = with_lora(make_classifier(ScDivaModel.from_pretrained(base_folder.name), NAMES))
    save_adapter(model, tmp_path / "path")
    assert base_in(tmp_path / "path") == str(base_folder.resolve())
    save_adapter(with_lora(classifier), tmp_path / "hub", base_model="someone/scdiva")
    assert base_in(tmp_path / "hub") == "someone/scdiva"
    # The card is shown to everybody: it names a Hub id, and no local path.
    assert "base_model: someone/scdiva" in (tmp_path / "hub" / "README.md").read_text("utf-8")
    card = (tmp_path / "path" / "README.md").read_text("utf-8")
    assert str(base_folder) not in card
    assert "base_model:" not in card


def base_in(folder):
    return json.loads((folder / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"]


def test_adapter_without_a_base_is_refused(fresh_tiny_model, tmp_path):
    with pytest.raises(ValueError, match=r"never loaded from anywhere\. Save it .* base_model="):
        save_adapter(with_lora(make_classifier(fresh_tiny_model(), NAMES)), tmp_path)


def test_adapter_over_another_base_than_the_one_on_disk_is_refused(base_folder, tmp_path):
    """Fine-tune everything, then an adapter on top: the folder of the old base must not be named."""
    base = ScDivaModel.from_pretrained(base_folder)
    with torch.no_grad():
        base.layers[1].self_attn.q_proj.weight[3, 5] += 0.01
    model = with_lora(make_classifier(base, NAMES))
    with pytest.raises(
        ValueError, match=r"differs in 1 weights \(layers\.1\.self_attn\.q_proj\.weight\) .* pass its folder"
    ):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    base_again = copy.deepcopy(base)
    base_again.save_pretrained(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter", base_model=tmp_path / "base")
    assert base_in(tmp_path / "adapter") == str(tmp_path / "base")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no weights \(\*\.safetensors\)"):
        save_adapter(model, tmp_path / "adapter", base_model=tmp_path / "empty")
    narrow = ScDivaModel.from_pretrained(base_folder, dtype=torch.bfloat16)
    save_adapter(with_lora(make_classifier(narrow, NAMES)), tmp_path / "narrow")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trainable": "adapter"}, "trainable must be one of lora, full, last_layers, head, got 'adapter'"),
        ({"trainable": "lora", "lora_rank": 0}, "lora_rank must be at least 1, got 0"),
        ({"trainable": "lora", "lora_alpha": 0}, "lora_alpha must be positive .* got 0 and 0.0"),
        ({"trainable": "lora", "lora_dropout": 1.0}, r"lora_dropout lie in \[0, 1\), got 16 and 1.0"),
        ({"trainable": "last_layers", "n_last_layers": 3}, r"n_last_layers must lie in \[1, 2\], got 3"),
        ({"trainable": "head", "modules_to_save": ["score"]}, "no module 'score' to train; it has model"),
    ],
)
def test_impossible_choices(classifier, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_trainable(classifier, **arguments)


FROM_THE_CACHE = """
import sys
from modeling_scdiva.adapters import base_of
from modeling_scdiva.tasks.annotator_files import load_annotator

for repository in ("lab/adapter", "lab/whole"):
    for revision in ("v1", "v2"):
        annotator = load_annotator(repository, revision=revision)
        print(",".join(annotator.label_names), annotator.model.config.id2label, sep=";")
    print(load_annotator(repository).label_names[0], base_of(repository, revision="v1"), sep=";")
"""


def put_in_cache(cache, repository, revisions):
    """Lay folders out as huggingface_hub keeps them, one commit each."""
    place = cache / "hub" / f"models--{repository.replace('/', '--')}"
    for index, (revision, folder) in enumerate(revisions.items()):
        commit = f"{index + 1:040x}"
        shutil.copytree(folder, place / "snapshots" / commit)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / revision).write_text(commit)


def test_revision_is_that_of_the_annotator(base_folder, tokenizer, tmp_path):
    """Names of the classes, adapter and weights come from the revision that was asked for."""
    from modeling_scdiva.tasks.annotation import CellAnnotator
    from modeling_scdiva.tasks.annotator_files import save_annotator

    names = {"v1": ["B", "NK", "T"], "v2": ["mono", "B"], "main": ["latest", "T"]}
    cache = tmp_path / "cache"
    for kind in ("adapter", "whole"):
        folders = {}
        for revision, of_revision in names.items():
            model = make_classifier(ScDivaModel.from_pretrained(base_folder), of_revision)
            if kind == "adapter":
                model = with_lora(model)
            folders[revision] = tmp_path / kind / revision
            base_model = "lab/base" if kind == "adapter" else None
            annotator = CellAnnotator(model, max_genes=tokenizer.max_genes)
            save_annotator(annotator, folders[revision], base_model=base_model, tokenizer=tokenizer)
        put_in_cache(cache, f"lab/{kind}", folders)
    put_in_cache(cache, "lab/base", {"main": base_folder})
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT), "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-c", FROM_THE_CACHE]
    found = subprocess.run(
        command, check=True, cwd=tmp_path, env=environment, timeout=300, stdout=subprocess.PIPE, text=True
    ).stdout.splitlines()
    wanted = [f"{','.join(of)};{dict(enumerate(of))}" for of in names.values()]
    for start, base in ((0, "lab/base"), (3, "lab/whole")):
        assert found[start : start + 2] == wanted[:2]
        assert found[start + 2] == f"latest;{base}"
