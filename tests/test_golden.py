"""Frozen numbers: three tokenised cells, twenty training losses, four embeddings. They change only by `make
golden`.

Run: pytest tests/test_golden.py
"""

import json
from pathlib import Path

import pytest
from accelerate import Accelerator

from modeling_scdiva.tasks import embed_cells
from modeling_scdiva.training import PretrainingArguments, pretrain
from tokenization_scdiva import corpus_loader, synthetic_cells

GOLDEN = Path(__file__).parent / "golden" / "golden.json"


@pytest.fixture(scope="module")
def numbers(corpus_folder, tokenizer, fresh_tiny_model, tmp_path_factory):
    model = fresh_tiny_model()
    log = pretrain(
        model,
        train_loader=corpus_loader(corpus_folder, "train", tokenizer=tokenizer, batch_size=8),
        eval_loader=None,
        arguments=PretrainingArguments(n_steps=20, log_every=1, save_every=0, learning_rate=1e-3),
        accelerator=Accelerator(cpu=True),
        output_dir=tmp_path_factory.mktemp("golden"),
    )
    cells = synthetic_cells(n_cells=4, n_genes=120, seed=3)
    encoded = tokenizer.encode_anndata(cells[:3], return_tensors="np")
    embeddings = embed_cells(cells, model=model, tokenizer=tokenizer, show_progress=False)
    return {
        "input_ids": encoded["input_ids"].tolist(),
        "expression_values": encoded["expression_values"].round(5).astype(float).tolist(),
        "train_loss": [line["train_loss"] for line in log],
        "cell_embeddings": embeddings[:, :8].astype(float).tolist(),
    }


@pytest.fixture(scope="module")
def golden(request, numbers):
    if request.config.getoption("--write-golden"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(numbers, indent=1) + "\n", "utf-8")
    return json.loads(GOLDEN.read_text("utf-8"))


def test_tokens_are_frozen(numbers, golden):
    assert numbers["input_ids"] == golden["input_ids"]
    for found, expected in zip(numbers["expression_values"], golden["expression_values"], strict=True):
        assert found == pytest.approx(expected, abs=2e-5)


def test_training_losses_are_frozen(numbers, golden):
    # Sums in another order differ in the last bits from machine to machine, and training spreads that.
    assert numbers["train_loss"] == pytest.approx(golden["train_loss"], rel=2e-4)


def test_embeddings_are_frozen(numbers, golden):
    for found, expected in zip(numbers["cell_embeddings"], golden["cell_embeddings"], strict=True):
        assert found == pytest.approx(expected, abs=2e-3)
