"""Cells on their way into a task, and the columns tasks read.

Scope: `tasks/cells`. Run: pytest tests/test_task_cells.py
"""

import numpy as np
import pytest
import torch

from modeling_scdiva.adapters import make_trainable
from modeling_scdiva.tasks.cells import encoder_of, length_batches, obs_column, read_cells, shown
from tokenization_scdiva import synthetic_cells


@pytest.fixture(scope="module")
def adata():
    adata = synthetic_cells(n_cells=30, n_genes=120, seed=3)
    adata.obs["donor"] = [f"d{i % 3}" for i in range(30)]
    return adata


def test_any_rows_come_as_the_tokenizer_lays_them_out(adata, tokenizer):
    cells = read_cells(adata, tokenizer=tokenizer)
    rows = np.array([4, 0, 4, 29])
    batch = cells.batch(rows)
    whole = tokenizer.encode_anndata(adata)
    width = batch["input_ids"].shape[1]
    assert width == 1 + cells.n_genes[rows].max()
    for name, tensor in batch.items():
        assert torch.equal(tensor, whole[name][rows, :width])
        assert tensor.dtype == whole[name].dtype


def test_max_genes_cuts(adata, tokenizer):
    assert (read_cells(adata, tokenizer=tokenizer, max_genes=7).n_genes <= 7).all()


def test_batches_hold_every_cell_once_longest_first():
    lengths = np.array([3, 9, 9, 1, 5])
    batches = list(length_batches(lengths, 2))
    assert [rows.tolist() for rows in batches] == [[1, 2], [4, 0], [3]]
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        next(length_batches(lengths, 0))


def test_bad_cells_are_refused(adata, tokenizer):
    with pytest.raises(ValueError, match="has no cells"):
        read_cells(adata[:0], tokenizer=tokenizer)
    with pytest.raises(TypeError, match=r"open it with anndata\.read_h5ad"):
        read_cells("cells.h5ad", tokenizer=tokenizer)


def test_columns_are_read_as_text_and_gaps_are_refused(adata):
    assert obs_column(adata, "donor", what="donors").tolist()[:4] == ["d0", "d1", "d2", "d0"]
    with pytest.raises(KeyError, match=r"no column 'plate' \(batches\). Columns: .*'donor'"):
        obs_column(adata, "plate", what="batches")
    gaps = adata.copy()
    gaps.obs["donor"] = gaps.obs["donor"].astype("category").cat.remove_categories(["d1"])
    with pytest.raises(ValueError, match=rf"missing for 10 of 30 cells, first '{gaps.obs_names[1]}'"):
        obs_column(gaps, "donor", what="donors")


def test_long_lists_are_cut():
    assert shown(["a", "b"]) == "'a', 'b'"
    assert shown(range(20)).endswith("'11', ... (20 in all)")
    assert shown([]) == "none"


def test_the_encoder_is_found_behind_heads_and_adapters(fresh_tiny_model):
    model = fresh_tiny_model()
    assert encoder_of(model) is model.model
    assert encoder_of(model.model) is model.model
    encoder = model.model
    assert encoder_of(make_trainable(model, "lora")) is encoder
