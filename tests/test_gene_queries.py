"""Gene queries of training: which genes a cell is asked for, and the log-odds that come out.

Scope: `gene_queries`, `gene_query_loss`, and both through corpus, collator and model.
Run: pytest tests/test_gene_queries.py
"""

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from modeling_scdiva.diffusion_scdiva import gene_query_loss
from tokenization_scdiva import corpus_loader
from tokenization_scdiva.gene_queries import draw_gene_queries, pack_measured_genes, unpack_measured_genes
from tokenization_scdiva.ranking_scdiva import FlatCells, splitmix64

V = 40


def two_cells():
    """Cell 0 expresses genes 5 to 9, cell 1 genes 20 and 21; its file measures 20 to 29 only."""
    token_ids = np.array([5, 6, 7, 8, 9, 20, 21], dtype=np.int32)
    values = np.arange(1, 8, dtype=np.float32)
    is_measured = np.zeros((2, V), dtype=bool)
    is_measured[0, 5:] = True
    is_measured[1, 20:30] = True
    return FlatCells(np.array([0, 5, 7]), token_ids, values, None, None), is_measured


def ask(cells, is_measured, n_queries=4_000, seed=0):
    cell_seed = splitmix64(np.arange(cells.n_cells, dtype=np.uint64) + np.uint64(1_000 * seed))
    return draw_gene_queries(cells, is_measured, n_queries=n_queries, cell_seed=cell_seed, pad_token_id=0)


def test_half_of_the_queries_are_expressed_genes_with_their_values():
    cells, is_measured = two_cells()
    queries = ask(cells, is_measured)
    for cell, genes in ((0, {5: 1.0, 6: 2.0, 7: 3.0, 8: 4.0, 9: 5.0}), (1, {20: 6.0, 21: 7.0})):
        ids, labels = queries["query_ids"][cell], queries["query_labels"][cell]
        assert set(ids[:2_000]) == set(genes)
        assert all(genes[gene] == label for gene, label in zip(ids[:2_000], labels[:2_000], strict=True))
        assert (labels[2_000:] == 0).all()


def test_silent_queries_are_measured_genes_that_are_not_expressed_and_equally_likely():
    cells, is_measured = two_cells()
    silent = ask(cells, is_measured)["query_ids"][:, 2_000:]
    assert set(silent[0]) == set(range(10, V))
    assert set(silent[1]) == set(range(22, 30))
    counts = np.bincount(silent[1], minlength=V)[22:30]
    assert abs(counts - 250).max() < 5 * np.sqrt(250)


def test_the_log_ratio_is_that_of_the_shares_asked():
    cells, is_measured = two_cells()
    log_ratio = ask(cells, is_measured)["query_log_ratio"]
    np.testing.assert_allclose(log_ratio, np.log([(1 / 5) / (1 / 30), (1 / 2) / (1 / 8)]), rtol=1e-6)


def test_a_cell_without_silent_genes_is_asked_for_its_expressed_ones_only():
    cells, is_measured = two_cells()
    is_measured[1] = False
    is_measured[1, 20:22] = True
    queries = ask(cells, is_measured, n_queries=8)
    assert (queries["query_ids"][1, 4:] == 0).all()
    assert set(queries["query_ids"][1, :4]) <= {20, 21}
    assert queries["query_log_ratio"][1] == 0


def test_queries_of_a_cell_do_not_depend_on_its_neighbours():
    cells, is_measured = two_cells()
    together = ask(cells, is_measured, n_queries=16)
    alone = draw_gene_queries(
        FlatCells(np.array([0, 2]), cells.token_ids[5:], cells.values[5:], None, None),
        is_measured[1:],
        n_queries=16,
        cell_seed=splitmix64(np.array([1], dtype=np.uint64)),
        pad_token_id=0,
    )
    np.testing.assert_array_equal(together["query_ids"][1], alone["query_ids"][0])


def test_measured_genes_survive_packing():
    token_ids = np.array([7, -1, 39, 5, -1])
    is_measured = unpack_measured_genes(pack_measured_genes(token_ids, V), V)
    np.testing.assert_array_equal(np.flatnonzero(is_measured), [5, 7, 39])


def test_log_odds_learnt_on_balanced_queries_are_those_of_the_natural_share():
    """3 of 30 measured genes are expressed: a constant trained on half-half draws must find log(3 / 27)."""
    cells = FlatCells(np.array([0, 3]), np.array([5, 6, 7], np.int32), np.ones(3, np.float32), None, None)
    is_measured = np.zeros((1, V), dtype=bool)
    is_measured[0, 5:35] = True
    queries = {name: torch.from_numpy(array) for name, array in ask(cells, is_measured).items()}
    log_odds = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_odds], max_iter=50)

    def closure():
        optimizer.zero_grad()
        loss = gene_query_loss(
            log_odds.expand(1, 4_000),
            queries["query_labels"],
            queries["query_labels"],
            queries["query_ids"] > 0,
            queries["query_log_ratio"],
        ).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert log_odds.item() == pytest.approx(np.log(3 / 27), abs=1e-3)


def test_the_loss_against_scikit_learn():
    rng = np.random.default_rng(0)
    logits, predictions = rng.normal(size=(2, 1, 6)), rng.uniform(0, 3, (1, 6))
    logits = logits[0]
    targets = np.array([[1.5, 0.0, 0.7, 0.0, 2.0, 0.0]])
    is_query = np.array([[True, True, True, True, False, False]])
    loss = gene_query_loss(
        *(torch.from_numpy(part) for part in (logits, predictions, targets, is_query)), torch.tensor([0.4])
    )
    chances = 1 / (1 + np.exp(-(logits[0, :4] + np.float32(0.4))))
    nats = log_loss(targets[0, :4] > 0, chances)
    squares = np.mean((predictions[0, [0, 2]] - targets[0, [0, 2]]) ** 2)
    assert loss.item() == pytest.approx(nats + squares, rel=1e-5)


def test_corpus_and_collator_ask_only_for_genes_that_the_file_measures(corpus_folder, tokenizer):
    loader = corpus_loader(corpus_folder, "train", tokenizer=tokenizer, batch_size=16, n_gene_queries=32)
    corpus = loader.dataset
    assert corpus.measured_genes.sum(axis=1).tolist() == [120, 60]  # the second file has half of the genes
    for batch, draws in zip(loader, loader.batch_sampler, strict=True):
        fetched = corpus[draws[0]], [corpus.__getitems__([draw]) for draw in draws]
        for row, cell in enumerate(fetched[1]):
            ids = batch["query_ids"][row].numpy()
            assert corpus.measured_genes[cell.dataset_ids[0]][ids].all()
            np.testing.assert_array_equal(
                np.isin(ids, cell.cells.token_ids), batch["query_labels"][row].numpy() > 0
            )


def test_an_odd_number_of_queries_is_refused(corpus_folder, tokenizer):
    with pytest.raises(ValueError, match="n_gene_queries must be even and not negative, got 3"):
        corpus_loader(corpus_folder, "train", tokenizer=tokenizer, batch_size=4, n_gene_queries=3)


def test_the_model_adds_the_weighted_latent_loss(corpus_folder, tokenizer, fresh_tiny_model):
    loader = corpus_loader(corpus_folder, "train", tokenizer=tokenizer, batch_size=8, n_gene_queries=16)
    batch = next(iter(loader))
    batch.pop("timestep")
    model = fresh_tiny_model(latent_loss_weight=0.5).eval()
    outputs = model(**batch)
    parts = outputs.gene_loss + 10 * outputs.expression_loss + 0.5 * outputs.latent_loss
    assert outputs.loss.item() == pytest.approx(parts.item(), rel=1e-6)
    embeddings = outputs.last_hidden_state[:, 0]
    log_odds, values = model.decode_genes(embeddings, batch["query_ids"])
    by_gene = [model.decode_genes(embeddings, batch["query_ids"][cell]) for cell in range(8)]
    for cell in range(8):  # a list of genes for all cells, or one list per cell
        torch.testing.assert_close(by_gene[cell][0][cell], log_odds[cell])
        torch.testing.assert_close(by_gene[cell][1][cell], values[cell])
    outputs.loss.backward()
    assert all(weight.grad.abs().sum() > 0 for weight in model.query_decoder.parameters())


def test_only_a_network_with_the_decoder_answers(fresh_tiny_model):
    model = fresh_tiny_model()
    assert model.query_decoder is None
    with pytest.raises(ValueError, match=r"no gene-query decoder.*latent_loss_weight > 0"):
        model.decode_genes(torch.zeros(1, 32), torch.tensor([5]))
    model = fresh_tiny_model(latent_loss_weight=1.0)
    inputs = model.dummy_inputs | {"query_ids": torch.tensor([[6]])}
    with pytest.raises(ValueError, match="without query_labels or query_log_ratio"):
        model(**inputs)
