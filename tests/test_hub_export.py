"""The three ways to load a model: installed, not installed, and from an exported folder; and the model card.

Two fresh interpreters (about 10 s each): the one that the export itself starts, and one in which both
packages are blocked, which loads the trained and the exported folder and reads an AnnData file.
Needs no data. Run: pytest tests/test_hub_export.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import metadata_load
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

import modeling_scdiva
from modeling_scdiva import ScDivaConfig, ScDivaForMaskedDiffusion, export
from modeling_scdiva.export import export_model
from modeling_scdiva.model_card import fill_model_card, find_template
from modeling_scdiva.tasks.embedding import embed_cells
from tokenization_scdiva import ScDivaTokenizer
from tokenization_scdiva.synthetic import synthetic_cells
from tokenization_scdiva.vocabulary_scdiva import GeneVocabulary

N_CELLS = 12
RESULT = {
    "title": "Frozen embedding",
    "command": "python benchmarks/run_probe.py",
    "note": "Folds split cells.",
    "numbers": [
        {
            "data": "pbmc",
            "method": "scDiVa",
            "knn_accuracy": 0.91239,
            "knn_accuracy_sd": 0.0123,
            "n_cells": 3874,
        },
        {"data": "gut", "method": "scDiVa", "knn_accuracy": 0.5, "n_cells": 1020},
    ],
    "baselines": [
        {"data": "pbmc", "method": "PCA-50", "knn_accuracy": 0.861, "knn_accuracy_sd": 0.01, "n_cells": 3874},
        {"data": "gut", "method": "PCA-50", "knn_accuracy": 0.49, "n_cells": 1020},
    ],
}
# What somebody runs who has installed nothing of ours. Prints nothing; writes one embedding per folder.
STRANGER = """
import sys
sys.modules["modeling_scdiva"] = sys.modules["tokenization_scdiva"] = None
import anndata, numpy, torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer
cells, *folders = sys.argv[1:]
adata = anndata.read_h5ad(cells)

def made_inputs(made):
    return {name: made[name] for name in ("input_ids", "expression_values", "attention_mask")}

for folder in folders:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    whole = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
    for thing in (tokenizer, model, whole, model.config):
        assert type(thing).__module__.startswith("transformers_modules."), type(thing)
    with torch.no_grad():
        inputs = tokenizer.encode_anndata(adata)
        states = model(**inputs).last_hidden_state
        values = whole(**inputs).expression_predictions
    made = whole.generate(n_cells=3, n_genes=12, steps=4)
    nats = whole.compute_nll(**made_inputs(made), genes_only=True, n_draws=4).nll
    numpy.savez(folder + ".npz", embedding=states[:, 0].numpy(), values=values.numpy(),
                genes=made.input_ids.numpy(), nats=nats.numpy())
"""


def make_tokenizer(adata):
    vocabulary = GeneVocabulary(
        list(adata.var_names),
        gene_entropy=np.linspace(0.1, 2.0, adata.n_vars),
        source={"datasets": ["pbmc_one", "pbmc_two"], "n_cells": 4321, "value_kind": "counts"},
    )
    return ScDivaTokenizer(vocabulary=vocabulary, max_genes=70)


def make_model(tokenizer):
    torch.manual_seed(0)
    config = ScDivaConfig(
        vocab_size=len(tokenizer),
        vocabulary_hash=tokenizer.vocabulary.content_hash,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        value_head="gene",
    )
    model = ScDivaForMaskedDiffusion(config).eval()
    model.set_gene_weights(torch.as_tensor(tokenizer.ranking_weights, dtype=torch.float32))
    return model


@pytest.fixture(scope="module")
def adata():
    return synthetic_cells(n_cells=N_CELLS, n_genes=100)


@pytest.fixture(scope="module")
def root(adata, tmp_path_factory):
    """A folder with ``scdiva``, a trained folder, ``cells.h5ad`` and ``result.json``."""
    root = tmp_path_factory.mktemp("export")
    tokenizer = make_tokenizer(adata)
    make_model(tokenizer).save_pretrained(root / "scdiva")
    tokenizer.save_pretrained(root / "scdiva")
    adata.write_h5ad(root / "cells.h5ad")
    (root / "result.json").write_text(json.dumps(RESULT))
    return root


@pytest.fixture(scope="module")
def exported(root):
    """The folder ``hub`` made by the command line's function."""
    words = ["--model_name", "org/tiny", "--results", str(root / "result.json")]
    export.main([str(root / "scdiva"), str(root / "hub"), *words])
    return root / "hub"


def test_installed_needs_no_trust_flag(root, adata, monkeypatch):
    monkeypatch.chdir(root)
    model = AutoModel.from_pretrained("scdiva")
    whole = AutoModelForMaskedLM.from_pretrained("scdiva")
    tokenizer = AutoTokenizer.from_pretrained("scdiva")
    assert type(model) is modeling_scdiva.ScDivaModel
    assert type(whole) is ScDivaForMaskedDiffusion
    assert type(tokenizer) is ScDivaTokenizer
    expected = make_model(tokenizer)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name
    found = embed_cells(adata, model=model, tokenizer=tokenizer, show_progress=False)
    again = embed_cells(adata, model=expected, tokenizer=make_tokenizer(adata), show_progress=False)
    np.testing.assert_array_equal(found, again)


def test_a_stranger_gets_the_same_numbers(root, exported, adata):
    scratch = root / "scratch"
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(scratch / "home"),
        "HF_MODULES_CACHE": str(scratch / "modules"),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    folders = [str(root / "scdiva"), str(exported)]
    finished = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, str(root / "cells.h5ad"), *folders],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    tokenizer = AutoTokenizer.from_pretrained(root / "scdiva")
    model = ScDivaForMaskedDiffusion.from_pretrained(root / "scdiva")
    embedding = embed_cells(adata, model=model, tokenizer=tokenizer, show_progress=False)
    with torch.no_grad():
        values = model(**tokenizer.encode_anndata(adata)).expression_predictions.numpy()
    made = model.generate(n_cells=3, n_genes=12, steps=4)
    inputs = (made.input_ids, made.expression_values, made.attention_mask)
    nats = model.compute_nll(*inputs, genes_only=True, n_draws=4).nll
    for folder in folders:
        found = np.load(f"{folder}.npz")
        np.testing.assert_array_equal(found["genes"], made.input_ids)
        np.testing.assert_allclose(found["nats"], nats, atol=1e-4)
        np.testing.assert_allclose(found["embedding"], embedding, atol=1e-6)
        np.testing.assert_allclose(found["values"], values, atol=1e-6)


def test_exported_folder_is_whole(root, exported):
    names = {path.name for path in exported.iterdir()}
    packages = (
        Path(modeling_scdiva.__file__).parent,
        Path(sys.modules["tokenization_scdiva"].__file__).parent,
    )
    travelling = {path.name for package in packages for path in package.glob("*_scdiva.py")}
    assert travelling <= names
    assert names - travelling == {
        "README.md",
        "config.json",
        "gene_vocabulary.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer_config.json",
    }
    weights, source = (load_file(folder / "model.safetensors") for folder in (exported, root / "scdiva"))
    assert weights.keys() == source.keys()
    assert all(torch.equal(weights[name], source[name]) for name in source)
    for path in exported.glob("*.json"):
        assert str(root) not in path.read_text(), path.name
    assert not list(root.glob(".*"))


def test_card_shows_the_numbers_of_the_files(exported):
    card = (exported / "README.md").read_text()
    metadata = metadata_load(exported / "README.md")
    assert (metadata["license"], metadata["library_name"]) == ("apache-2.0", "transformers")
    assert {"custom_code", "single-cell"} <= set(metadata["tags"])
    assert metadata["pipeline_tag"] == "feature-extraction"
    assert card.count("# org/tiny\n") == 1
    assert 'AutoModel.from_pretrained("org/tiny", trust_remote_code=True)' in card
    assert 'pipeline("cell-embedding", model="org/tiny")' in card
    rows = [line for line in card.splitlines() if line.startswith(("| pbmc |", "| gut |"))]
    assert rows == [
        "| pbmc | **scDiVa** | 0.912 ± 0.012 | 3,874 |",
        "| pbmc | PCA-50 | 0.861 ± 0.010 | 3,874 |",
        "| gut | **scDiVa** | 0.500 | 1,020 |",
        "| gut | PCA-50 | 0.490 | 1,020 |",
    ]
    assert "`python benchmarks/run_probe.py` (result.json)" in card
    model = ScDivaForMaskedDiffusion.from_pretrained(exported)
    assert f"| parameters | {sum(p.numel() for p in model.parameters()):,} |" in card
    assert "| data sets | pbmc_one, pbmc_two |" in card
    assert "| cells | 4,321 |" in card
    assert "$" not in card


def test_refusals_leave_nothing_behind(root, adata, tmp_path):
    with pytest.raises(FileExistsError, match="scdiva exists"):
        export_model(root / "scdiva", root / "scdiva")
    (tmp_path / "half").mkdir()
    with pytest.raises(FileNotFoundError, match=r"lacks config\.json, .*, model\.safetensors"):
        export_model(tmp_path / "half", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"No card template at .*none\.md"):
        export_model(root / "scdiva", tmp_path / "out", template=tmp_path / "none.md")
    (tmp_path / "bad.json").write_text(json.dumps(RESULT | {"baselines": []}))
    with pytest.raises(ValueError, match=r"bad\.json lacks baselines"):
        export_model(root / "scdiva", tmp_path / "out", results=[tmp_path / "bad.json"])
    other = make_tokenizer(adata[:, ::-1])
    make_model(make_tokenizer(adata)).save_pretrained(tmp_path / "mixed")
    other.save_pretrained(tmp_path / "mixed")
    with pytest.raises(ValueError, match="same token would be another gene"):
        export_model(tmp_path / "mixed", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"half", "mixed", "bad.json"}


def test_other_embeddings_are_noticed():
    expected = np.ones((3, 2), np.float32)
    assert export._largest_difference(expected + np.float32(5e-7), expected) == pytest.approx(4.8e-7, rel=0.1)
    with pytest.raises(RuntimeError, match=r"differ by up to 1\.00e-03, allowed are 1e-06"):
        export._largest_difference(expected + np.float32(1e-3), expected)
    for bad in (expected[:2], expected * np.nan):
        with pytest.raises(RuntimeError, match=r"not all finite; wanted \(3, 2\)"):
            export._largest_difference(bad, expected)


@pytest.mark.slow
def test_an_export_that_does_not_load_is_no_export(root, tmp_path, monkeypatch):
    """Code that cannot travel: the fresh interpreter must fail, and the folder must not appear."""
    save = ScDivaTokenizer.save_pretrained

    def save_without_code(self, folder, **kwargs):
        names = save(self, folder, **kwargs)
        (Path(folder) / "ranking_scdiva.py").write_text("import tokenization_scdiva.ranking_scdiva\n")
        return names

    monkeypatch.setattr(ScDivaTokenizer, "save_pretrained", save_without_code)
    with pytest.raises(RuntimeError, match=r"does not load without the packages(.|\n)*tokenization_scdiva"):
        export_model(root / "scdiva", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"numbers": [{"method": "scDiVa", "loss": float("nan")}]}, "nan is no finite number"),
        ({"numbers": [{"method": "scDiVa", "loss": [1.0]}]}, r"\[1\.0\] is no finite number"),
        ({"command": ""}, r"result\.json lacks command\. Numbers go on a card with"),
    ],
)
def test_card_refuses_results(adata, tmp_path, result, message):
    (tmp_path / "result.json").write_text(json.dumps(RESULT | result))
    tokenizer = make_tokenizer(adata)
    with pytest.raises(ValueError, match=message):
        fill_model_card(
            find_template(),
            model=make_model(tokenizer),
            tokenizer=tokenizer,
            results=[tmp_path / "result.json"],
            model_name="tiny",
        )


def test_card_template_asks_for_known_fields_only(adata, tmp_path):
    tokenizer = make_tokenizer(adata)
    model = make_model(tokenizer)
    for text in ("$author", "5 $ and more"):
        (tmp_path / "card.md").write_text(text)
        with pytest.raises(ValueError, match=r"card\.md: cannot fill .* a card has \$model_name"):
            fill_model_card(tmp_path / "card.md", model=model, tokenizer=tokenizer, model_name="tiny")
    (tmp_path / "card.md").write_text("$$5 for $model_name: $result_tables")
    card = fill_model_card(tmp_path / "card.md", model=model, tokenizer=tokenizer, model_name="tiny")
    assert card == "$5 for tiny: None were given when this folder was exported."


def test_columns_of_a_result_can_be_chosen(adata, tmp_path):
    small = [{"method": "a|b", "loss": 0.00123, "loss_sd": 0.0001, "kept": None, "seed": 3}]
    result = {"numbers": small, "baselines": small, "columns": ["method", "loss", "kept"]}
    (tmp_path / "result.json").write_text(json.dumps(RESULT | result))
    (tmp_path / "card.md").write_text("$result_tables")
    tokenizer = make_tokenizer(adata)
    card = fill_model_card(
        tmp_path / "card.md",
        model=make_model(tokenizer),
        tokenizer=tokenizer,
        results=[tmp_path / "result.json"],
        model_name="tiny",
    )
    assert "| method | loss | kept |" in card
    assert "| a\\|b | 0.00123 ± 0.0001 | - |" in card
