"""Cells and a model to try a script with: made up where nothing is named, opened where something is.

Tiny networks on CPU. Run: pytest tests/test_synthetic.py
"""

import numpy as np
import torch

from tokenization_scdiva import open_or_make_up, synthetic_cells

NETWORK = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 300,
}  # fmt: skip


def test_everything_is_made_up_where_nothing_is_named():
    cells, model, tokenizer = open_or_make_up(None, None, NETWORK)
    assert cells.n_obs == 120
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer(cells[:2]).input_ids.shape[0] == 2


def test_cells_of_a_file_and_weights_of_a_checkpoint(base_folder, tokenizer, tmp_path):
    wanted = synthetic_cells(n_cells=9, n_genes=120, seed=5)
    wanted.write_h5ad(tmp_path / "cells.h5ad")
    cells, model, opened = open_or_make_up(str(base_folder), tmp_path / "cells.h5ad", NETWORK)
    np.testing.assert_array_equal(cells.X.toarray(), wanted.X.toarray())
    assert opened.vocabulary.content_hash == tokenizer.vocabulary.content_hash == model.config.vocabulary_hash
    again = open_or_make_up(str(base_folder), None, NETWORK)
    assert torch.equal(again[1].lm_head.weight, model.lm_head.weight)
    assert set(again[0].var_names) <= set(tokenizer.vocabulary.gene_ids)
