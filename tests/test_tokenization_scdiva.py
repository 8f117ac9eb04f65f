"""Counts become gene tokens and expression values, and come back; saved tokenizers are the ones loaded.

Needs no data. Run: pytest tests/test_tokenization_scdiva.py
"""

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from transformers import AutoTokenizer

from tokenization_scdiva import GeneVocabulary, ScDivaTokenizer, synthetic_cells

GENE_IDS = ["ENSG00000000001", "ENSG00000000002", "ENSG00000000003"]
N_SPECIAL = 5


@pytest.fixture
def hand_tokenizer():
    """Three genes, tokens 5, 6, 7, with weights H + 1 of 1, 2 and 4."""
    vocabulary = GeneVocabulary(GENE_IDS, ["AA", "BB", "CC"], gene_entropy=[0.0, 1.0, 3.0])
    return ScDivaTokenizer(vocabulary=vocabulary, max_genes=2)


@pytest.fixture(scope="module")
def cells():
    return synthetic_cells(n_cells=40, n_genes=120, seed=1)


def encode(tokenizer, *args, **kwargs):
    """Encoding as nested lists, easy to compare."""
    encoding = tokenizer(*args, return_tensors="np", **kwargs)
    return {name: array.tolist() for name, array in encoding.items()}


def test_encoding_by_hand(hand_tokenizer):
    # N = 100. v = log1p(100 c): c = 10, 60, 30. Scores: v / weight = 6.909 / 1, 8.700 / 2, 8.007 / 4.
    counts = np.array([[10, 60, 30], [0, 0, 5]])
    encoding = hand_tokenizer(counts, gene_ids=GENE_IDS)
    assert encoding["input_ids"].tolist() == [[2, 5, 6], [2, 7, 0]]
    assert encoding["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    wanted = [[0, np.log1p(1000), np.log1p(6000)], [0, np.log1p(10000), 0]]
    np.testing.assert_allclose(encoding["expression_values"], wanted, rtol=1e-6)
    assert [encoding[name].dtype for name in ("input_ids", "expression_values", "attention_mask")] == [
        torch.int64, torch.float32, torch.int64,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "container",
    [
        np.asarray, np.asfortranarray, sp.csr_matrix, sp.csc_array, sp.coo_matrix, torch.tensor,
        pd.DataFrame, lambda counts: counts.tolist(), lambda counts: counts.astype(np.float64),
    ],
)  # fmt: skip
def test_every_container_gives_the_same(tokenizer, cells, container):
    counts = cells.X.toarray().astype(np.int64)
    gene_ids = list(cells.var_names)
    assert encode(tokenizer, container(counts), gene_ids=gene_ids) == encode(tokenizer, cells)


def test_one_cell_is_a_row(tokenizer, cells):
    counts = cells.X.toarray()
    alone = encode(tokenizer, counts[3], gene_ids=list(cells.var_names))
    assert alone == encode(tokenizer, cells[3])


def test_gene_names_of_any_kind_give_the_same(tokenizer, cells):
    counts = cells.X
    whole = encode(tokenizer, cells)
    assert (
        encode(tokenizer, counts, gene_ids=[f"{name}.{i}" for i, name in enumerate(cells.var_names)]) == whole
    )
    assert encode(tokenizer, counts, gene_ids=cells.var["gene_symbols"]) == whole
    mixed = [s if i % 2 else g for i, (g, s) in enumerate(cells.var["gene_symbols"].items())]
    assert encode(tokenizer, counts, gene_ids=mixed) == whole


def test_gene_columns_and_blocks_do_not_matter(tokenizer, cells):
    whole = encode(tokenizer, cells)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(cells.n_vars)
        assert encode(tokenizer, cells[:, order]) == whole
    for block_size in (1, 7, 40, 1000):
        assert encode(tokenizer, cells, block_size=block_size) == whole
    order = np.random.default_rng(9).permutation(cells.n_obs)
    shuffled = tokenizer(cells[order], return_tensors="np")
    assert shuffled["input_ids"].tolist() == [whole["input_ids"][cell] for cell in order]


def test_backed_file_equals_memory(tokenizer, cells, tmp_path):
    for name, matrix in {"csr": cells.X, "dense": cells.X.toarray()}.items():
        path = tmp_path / f"{name}.h5ad"
        ad.AnnData(matrix, obs=cells.obs, var=cells.var).write_h5ad(path)
        before = path.read_bytes()
        backed = ad.read_h5ad(path, backed="r")
        assert encode(tokenizer, backed, block_size=9) == encode(tokenizer, cells)
        backed.file.close()
        assert path.read_bytes() == before


def test_max_genes_keeps_the_head(tokenizer, cells):
    long, short = tokenizer(cells, max_genes=60), tokenizer(cells, max_genes=11)
    assert short["input_ids"].shape == (cells.n_obs, 12)
    assert long["input_ids"].shape[1] > 49
    assert torch.equal(long["input_ids"][:, :12], short["input_ids"])
    with pytest.raises(ValueError, match="max_genes must be at least 1, got 0"):
        tokenizer(cells, max_genes=0)


def test_library_size_is_that_of_all_genes(tokenizer, cells):
    few = cells[:, :80].copy()
    depth = np.asarray(cells.X.sum(axis=1)).ravel()
    values = {}
    for name, encoding in {
        "whole": tokenizer(cells, max_genes=120),
        "few": tokenizer(few, library_size=depth, max_genes=120),
        "wrong": tokenizer(few, max_genes=120),
    }.items():
        values[name] = tokenizer.decode_anndata(encoding)[:, list(few.var_names)].X.toarray()
    np.testing.assert_array_equal(values["few"], values["whole"])
    assert (values["wrong"] >= values["whole"]).all()
    assert (values["wrong"] > values["whole"]).any()


def test_library_size_is_checked(tokenizer, cells):
    depth = np.asarray(cells.X.sum(axis=1)).ravel()
    with pytest.raises(ValueError, match=r"library_size has 3 entries for 40 cells"):
        tokenizer(cells, library_size=depth[:3])
    depth[7] -= 1
    with pytest.raises(ValueError, match=r"library_size of cell 7 is .* but its genes here hold"):
        tokenizer(cells, library_size=depth, block_size=5)
    with pytest.raises(ValueError, match="library_size turns counts into expression"):
        tokenizer(log1p_cells(cells), expression_is_log1p=True, library_size=depth)


def log1p_cells(cells):
    counts = cells.X.toarray().astype(np.float64)
    expression = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True)).astype(np.float32)
    return ad.AnnData(sp.csr_matrix(expression), obs=cells.obs, var=cells.var)


def test_log1p_input_equals_counts(tokenizer, cells):
    expression = log1p_cells(cells)
    assert encode(tokenizer, expression, expression_is_log1p=True) == encode(tokenizer, cells)
    matrix = encode(tokenizer, expression.X, gene_ids=list(cells.var_names), expression_is_log1p=True)
    assert matrix == encode(tokenizer, cells)
    with pytest.raises(ValueError, match="expression_is_log1p=True"):
        tokenizer(expression)


@pytest.mark.parametrize("gene_order", ["entropy", "expression", "random"])
def test_gene_orders_hold_the_same_genes(tokenizer, cells, gene_order):
    ordered = ScDivaTokenizer(vocabulary=tokenizer.vocabulary, max_genes=500, gene_order=gene_order)
    encoding = ordered(cells, return_tensors="np")
    np.testing.assert_array_equal(
        ordered.decode_anndata(encoding).X.toarray(),
        tokenizer.decode_anndata(tokenizer(cells, max_genes=500)).X.toarray(),
    )
    n_genes = encoding["attention_mask"].sum(axis=1)
    falls = [
        (np.diff(v[1:n]) <= 0).all() for v, n in zip(encoding["expression_values"], n_genes, strict=True)
    ]
    assert all(falls) == (gene_order == "expression")


def test_large_epsilon_is_expression_order(tokenizer, cells):
    vocabulary = tokenizer.vocabulary
    plain = ScDivaTokenizer(vocabulary=vocabulary, gene_order="expression")
    flat = ScDivaTokenizer(vocabulary=vocabulary, entropy_epsilon=1e12)
    assert encode(plain, cells) == encode(flat, cells)


def test_entropy_order_needs_entropies(tokenizer):
    vocabulary = GeneVocabulary(tokenizer.vocabulary.gene_ids[N_SPECIAL:])
    with pytest.raises(ValueError, match="gene_order='entropy' needs a vocabulary with gene entropies"):
        ScDivaTokenizer(vocabulary=vocabulary)
    assert ScDivaTokenizer(vocabulary=vocabulary, gene_order="expression").gene_order == "expression"


def test_empty_cells_are_refused_or_carried(tokenizer, cells):
    counts = cells.X.toarray()
    counts[[4, 9]] = 0
    empty = ad.AnnData(counts, obs=cells.obs, var=cells.var)
    with pytest.raises(
        ValueError, match=r"2 cells express no gene of the vocabulary \(first: 'cell_4', 'cell_9'"
    ):
        tokenizer(empty)
    encoding = tokenizer(empty, keep_empty_cells=True)
    assert encoding["input_ids"][4].tolist() == [2] + [0] * (encoding["input_ids"].shape[1] - 1)
    assert encoding["attention_mask"].sum(axis=1)[[4, 9]].tolist() == [1, 1]
    assert torch.isfinite(encoding["expression_values"]).all()
    with pytest.raises(ValueError, match="holds no molecules"):
        tokenizer(empty[[4, 9]], keep_empty_cells=True)


def test_files_that_share_too_little_are_refused(tokenizer, cells):
    with pytest.raises(ValueError, match=r"Only 0 of 40 genes .* is the matrix transposed\? Use adata.T"):
        tokenizer(cells.T.copy())
    outside = [f"UNKNOWN{i}" for i in range(60)]
    counts = np.hstack([cells.X.toarray()[:, :60], np.full((40, 60), 500)])
    with pytest.raises(ValueError, match=r"of the counts lie in genes of the vocabulary"):
        tokenizer(counts, gene_ids=[*cells.var_names[:60], *outside])
    assert tokenizer(counts, gene_ids=[*cells.var_names[:60], *outside], min_count_overlap=0.0)


def test_wrong_calls_are_refused(tokenizer, cells):
    with pytest.raises(ValueError, match="needs gene_ids="):
        tokenizer(cells.X)
    with pytest.raises(ValueError, match="120 columns and gene_ids 3 entries"):
        tokenizer(cells.X, gene_ids=GENE_IDS)
    with pytest.raises(ValueError, match="choose a column of var with gene_id_key"):
        tokenizer(cells, gene_ids=list(cells.var_names))


@pytest.mark.parametrize(
    "numbers", [[[1, 2, 3], [4, 5, 6]], ((1.0, 2.0),), [1, 2, 3], [np.arange(3)], [[Path("x")]]]
)
def test_numbers_are_no_text(tokenizer, numbers):
    for call in ({"cells": numbers}, {"text": numbers}):
        with pytest.raises(ValueError, match=r"needs gene_ids="):
            tokenizer(**call)


def test_paths_are_refused(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cells").touch()
    message = r"got a path \((missing|cells)(\.h5ad|\.h5)?\); open it with anndata\.read_h5ad"
    for path in ("missing.h5ad", "missing.h5", "cells", Path("cells"), Path("missing")):
        for call in (tokenizer, tokenizer.encode_anndata, lambda path: next(tokenizer.iter_cells(path))):
            with pytest.raises(TypeError, match=message):
                call(path)
        with pytest.raises(TypeError, match=message):
            tokenizer(path, gene_ids=GENE_IDS)
    assert tokenizer("missing " * 1000)["input_ids"] == [2] + [3] * 1000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_genes": 0}, "max_genes must be at least 1, got 0"),
        ({"target_sum": 0.0}, "target_sum must be positive"),
        ({"entropy_epsilon": -1.0}, "entropy_epsilon must be positive"),
        ({"gene_order": "rank"}, "gene_order must be 'entropy', 'expression' or 'random', got 'rank'"),
        ({"mask_token": "[MASK]"}, r"must be among the vocabulary's own: <pad>, <mask>"),
    ],
)
def test_wrong_settings_are_refused(tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        ScDivaTokenizer(vocabulary=tokenizer.vocabulary, **settings)


def test_vocabulary_is_needed():
    with pytest.raises(ValueError, match=r"needs a gene vocabulary; pass vocabulary=\.\.\. or a gene_voc"):
        ScDivaTokenizer()


def test_a_folder_without_tokenizer_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"'nothere' does not exist; wanted is the folder of a saved"):
        ScDivaTokenizer.from_pretrained("nothere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty' holds no gene_vocabulary\.json; wanted is the folder"):
        ScDivaTokenizer.from_pretrained(tmp_path / "empty")


# --- back to AnnData ---


def test_decode_gives_back_counts(tokenizer, cells):
    depth = np.asarray(cells.X.sum(axis=1)).ravel()
    encoding = tokenizer(cells, max_genes=cells.n_vars)
    decoded = tokenizer.decode_anndata(encoding, obs_names=cells.obs_names, library_size=depth)
    assert list(decoded.obs_names) == list(cells.obs_names)
    assert decoded[:, "ENSG00000000007"].var["gene_symbols"].tolist() == ["GENE7"]
    counts = decoded[:, cells.var_names].layers["counts"].toarray()
    np.testing.assert_array_equal(counts, cells.X.toarray())
    # Encoding what was decoded changes nothing; deep cells of up to a million molecules a gene neither.
    assert encode(tokenizer, decoded, expression_is_log1p=True) == encode(tokenizer, cells)
    deep = np.array([[999_983, 17, 1]])
    encoding = tokenizer(deep, gene_ids=GENE_IDS)
    back = tokenizer.decode_anndata(encoding, library_size=[1_000_001])[:, GENE_IDS]
    np.testing.assert_array_equal(back.layers["counts"].toarray(), deep)


def test_decode_leaves_special_tokens_out(hand_tokenizer):
    inputs = {
        "input_ids": torch.tensor([[2, 5, 1, 0], [2, 7, 6, 0]]),
        "expression_values": torch.tensor([[9.0, 1.0, 2.0, 9.0], [9.0, 3.0, 4.0, 9.0]], requires_grad=True),
    }
    decoded = hand_tokenizer.decode_anndata(inputs)
    assert decoded.X.toarray().tolist() == [[1, 0, 0], [0, 4, 3]]
    inputs["input_ids"][1, 1] = 6
    with pytest.raises(ValueError, match="A gene occurs twice"):
        hand_tokenizer.decode_anndata(inputs)


# --- the base class ---


@pytest.mark.parametrize("load", [ScDivaTokenizer.from_pretrained, AutoTokenizer.from_pretrained])
def test_save_and_load(tokenizer, cells, tmp_path, load):
    tokenizer.save_pretrained(tmp_path / "first")
    loaded = load(tmp_path / "first")
    assert isinstance(loaded, ScDivaTokenizer)
    assert encode(loaded, cells) == encode(tokenizer, cells)
    assert loaded.ranking_settings == tokenizer.ranking_settings
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    loaded.save_pretrained(tmp_path / "second")
    load(tmp_path / "second").save_pretrained(tmp_path / "third")
    # The base class adds one key at the second save, which repeats a custom special token.
    configs = [json.loads((tmp_path / n / "tokenizer_config.json").read_text()) for n in ("first", "second")]
    assert configs[1].pop("model_specific_special_tokens") == {"pert_token": "<pert>"}
    assert configs[1] == configs[0]
    for name in ("tokenizer_config.json", "gene_vocabulary.json"):
        assert (tmp_path / "third" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_changed_settings_survive_saving(tokenizer, cells, tmp_path):
    tokenizer.save_pretrained(tmp_path / "first")
    changed = ScDivaTokenizer.from_pretrained(tmp_path / "first", max_genes=7, gene_order="expression")
    assert changed.model_max_length == 8
    changed.save_pretrained(tmp_path / "second")
    again = ScDivaTokenizer.from_pretrained(tmp_path / "second")
    assert (again.max_genes, again.gene_order, again.model_max_length) == (7, "expression", 8)
    assert encode(again, cells) == encode(changed, cells)
    assert again.ranking_settings != tokenizer.ranking_settings


def test_special_tokens_come_first(tokenizer):
    ids = [tokenizer.pad_token_id, tokenizer.mask_token_id, tokenizer.lat_token_id, tokenizer.unk_token_id]
    assert [*ids, tokenizer.pert_token_id] == [0, 1, 2, 3, 4]
    assert len(tokenizer) == tokenizer.vocab_size == len(tokenizer.get_vocab()) == len(tokenizer.vocabulary)


def test_text_is_gene_names(hand_tokenizer):
    vocabulary = GeneVocabulary(GENE_IDS, ["AA", "BB", "CC"], aliases={"OLD": GENE_IDS[2]})
    tokenizer = ScDivaTokenizer(vocabulary=vocabulary, gene_order="expression")
    encoding = tokenizer("ENSG00000000002 AA OLD NOVEL")
    assert encoding["input_ids"] == [2, 6, 5, 7, 3] == tokenizer(text="BB AA CC x")["input_ids"]
    wanted = "ENSG00000000002 ENSG00000000001 ENSG00000000003"
    assert tokenizer.decode(encoding["input_ids"][:4], skip_special_tokens=True) == wanted
    batch = tokenizer(["AA", "BB CC"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[2, 5, 0], [2, 6, 7]]
    assert hand_tokenizer("AA BB CC", truncation=True)["input_ids"] == [2, 5, 6]
    assert tokenizer("AA BB", return_special_tokens_mask=True)["special_tokens_mask"] == [1, 0, 0]


@pytest.mark.parametrize("side", ["right", "left"])
def test_pad_fills_what_travels_with_the_tokens(tokenizer, side):
    features = [
        {"input_ids": [2, 7, 8], "expression_values": [0.0, 1.5, 2.5], "labels": [-100, 7, -100],
         "expression_labels": [0.0, 3.5, 4.5], "is_masked": [False, True, False]},
        {"input_ids": [2, 9], "expression_values": [0.0, 4.5], "labels": [-100, -100],
         "expression_labels": [0.0, 4.5], "is_masked": [False, True]},
    ]  # fmt: skip
    padded = tokenizer.pad(features, padding_side=side, pad_to_multiple_of=4, return_tensors="pt")
    place = slice(0, 2) if side == "right" else slice(2, 4)
    pads = slice(2, 4) if side == "right" else slice(0, 2)
    for name, fill in {
        "input_ids": 0, "attention_mask": 0, "expression_values": 0.0, "labels": -100,
        "expression_labels": 0.0, "is_masked": False,
    }.items():  # fmt: skip
        assert padded[name].shape == (2, 4)
        assert padded[name][1, pads].tolist() == [fill, fill]
        assert padded[name][1, place].tolist() == features[1].get(name, [1, 1])
    assert padded["is_masked"].dtype == torch.bool


def test_pad_joins_encodings_of_single_cells(tokenizer, cells):
    singles = [
        {name: array[0] for name, array in tokenizer(cells[i], return_tensors="np").items()} for i in range(5)
    ]
    whole = tokenizer(cells[:5])
    padded = tokenizer.pad(singles, return_tensors="pt")
    for name, tensor in whole.items():
        assert torch.equal(padded[name].to(tensor.dtype), tensor)
