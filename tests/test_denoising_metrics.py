"""Baselines of masked gene and value prediction: fitting, losses on given masks, reports by diffusion time.

Needs: both packages; no files, no GPU.
Run: python -m pytest tests/test_denoising_metrics.py
"""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_scdiva import ScDivaConfig, ScDivaForMaskedDiffusion
from modeling_scdiva.diffusion_scdiva import (
    gene_nats,
    masked_expression_loss,
    per_cell_mean,
    visible_gene_mask,
)
from modeling_scdiva.metrics.denoising import evaluate_denoising, gain_over, mean_by_time, report_denoising
from modeling_scdiva.metrics.denoising_baselines import BaselineFitter, rank_bins
from modeling_scdiva.metrics.reconstruction_baselines import iter_gene_laws
from modeling_scdiva.training import evaluate
from modeling_scdiva.training_metrics import LossMeter

N_SPECIAL, MASK, LAT = 5, 1, 2
N_GENES, MAX_GENES = 40, 20
VOCAB_SIZE = N_SPECIAL + N_GENES
A, B, C, D = range(N_SPECIAL, N_SPECIAL + 4)


def random_cells(seed: int, n_cells: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make ranked cells as flat token ids, values and offsets, some longer than MAX_GENES."""
    rng = np.random.default_rng(seed)
    weights = rng.gamma(0.5, size=N_GENES) + 0.02
    lengths = rng.integers(1, MAX_GENES + 5, size=n_cells)
    genes = [rng.choice(N_GENES, size=n, replace=False, p=weights / weights.sum()) for n in lengths]
    values = [np.sort(rng.gamma(2.0, size=n))[::-1].astype(np.float32) for n in lengths]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return N_SPECIAL + np.concatenate(genes), np.concatenate(values), offsets


def fitted(cells: tuple[np.ndarray, np.ndarray, np.ndarray], weights: np.ndarray | None = None):
    """Fit baselines on some cells."""
    fitter = BaselineFitter(np.ones(VOCAB_SIZE) if weights is None else weights, MAX_GENES)
    fitter.update(*cells)
    return fitter.finish()


def masked_batch(cells: tuple[np.ndarray, np.ndarray, np.ndarray], seed: int) -> dict[str, torch.Tensor]:
    """Mask cells as the joint objective does; a few stay whole, a few are masked entirely."""
    rng = np.random.default_rng(seed)
    tokens, values, offsets = cells
    n_cells = len(offsets) - 1
    shape = (n_cells, 1 + MAX_GENES)
    batch = {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, -100),
        "expression_values": torch.zeros(shape),
        "expression_labels": torch.zeros(shape),
        "is_masked": torch.zeros(shape, dtype=torch.bool),
        "timestep": torch.from_numpy(1.0 - rng.random(n_cells)).float(),
    }
    batch["timestep"][:2] = torch.tensor([1e-9, 1.0])
    for cell in range(n_cells):
        entries = slice(offsets[cell], min(offsets[cell + 1], offsets[cell] + MAX_GENES))
        genes, seen = torch.from_numpy(tokens[entries]), torch.from_numpy(values[entries].copy())
        places = slice(1, 1 + len(genes))
        is_masked = torch.from_numpy(rng.random(len(genes)) < float(batch["timestep"][cell]))
        batch["input_ids"][cell, 0] = LAT
        batch["input_ids"][cell, places] = torch.where(is_masked, MASK, genes)
        batch["labels"][cell, places] = torch.where(is_masked, genes, -100)
        batch["expression_values"][cell, places] = torch.where(is_masked, 0.0, seen)
        batch["expression_labels"][cell, places] = seen
        batch["is_masked"][cell, places] = is_masked
    return batch


def toy() -> tuple[object, dict[str, torch.Tensor]]:
    """Fit on two equal cells [A, B] of a vocabulary with genes A to D; evaluate [A, C] with A masked."""
    weights = np.array([1.0] * N_SPECIAL + [1.0, 2.0, 0.5, 1.0])
    fitter = BaselineFitter(weights, 3)
    fitter.update(np.array([A, B, A, B]), np.array([3.0, 2.0, 5.0, 4.0]), np.array([0, 2, 4]))
    batch = {
        "input_ids": torch.tensor([[LAT, MASK, C], [LAT, A, C]]),
        "labels": torch.tensor([[-100, A, -100], [-100, -100, -100]]),
        "expression_values": torch.tensor([[0.0, 0.0, 1.0], [0.0, 2.0, 1.0]]),
        "expression_labels": torch.tensor([[0.0, 2.0, 1.0], [0.0, 2.0, 1.0]]),
        "is_masked": torch.tensor([[False, True, False], [False, False, False]]),
    }
    return fitter.finish(), batch


def test_gene_losses_of_a_hand_computed_toy() -> None:
    baselines, batch = toy()
    losses = baselines.gene_losses(batch)
    # Corpus: A and B half each; left out, 1/3 against 1/4 of the uniform law, which keeps the weight of one
    # token in five: p(A) = (1/2 + 1/5 * 1/4) / (6/5) = 11/24, p(C) = p(D) = 1/24.
    # Rank 0: only A, seen twice; uniform law one token in three: p(A) = (1 + 1/3 * 1/4) / (4/3) = 13/16.
    expected = {
        "uniform": np.log(4),
        "uniform_excluding_visible": np.log(3),
        "unigram": -np.log(11 / 24),
        "unigram_excluding_visible": -np.log((11 / 24) / (23 / 24)),
        "rank_unigram": -np.log(13 / 16),
        "rank_unigram_excluding_visible": -np.log((13 / 16) / (15 / 16)),
    }
    assert set(losses) == set(expected)
    for name, loss in expected.items():
        assert losses[name][0].item() == pytest.approx(loss, abs=1e-5), name
        assert losses[name][1].item() == 0.0, name  # no masked gene


def test_expression_losses_of_a_hand_computed_toy() -> None:
    baselines, batch = toy()
    losses = baselines.expression_losses(batch)
    # Rank 0 holds 3 and 5. A has these two tokens and one of the overall mean 3.5: 11.5 / 3. s(0) is 4,
    # weight of A 1. Rank 1: s = (2 * 2 + 4 * 2) / (4 + 4) = 1.5; the visible C has s = 1 / 0.5 = 2 there, so
    # this cell lies above the population by 4/3.
    expected = {
        "rank_mean": (4.0 - 2.0) ** 2,
        "gene_mean": (11.5 / 3 - 2.0) ** 2,
        "rank_score": (4.0 - 2.0) ** 2,
        "neighbour_score": (4.0 * 4 / 3 - 2.0) ** 2,
    }
    assert set(losses) == set(expected)
    for name, loss in expected.items():
        assert losses[name].tolist() == pytest.approx([loss, 0.0], rel=1e-6), name


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_tables_are_laws_over_the_genes(seed: int) -> None:
    for table in fitted(random_cells(seed, n_cells=seed % 40 + 1)).gene_tables.values():
        assert torch.allclose(table.sum(dim=0), torch.ones(table.shape[1], dtype=torch.float64), atol=1e-12)
        assert (table[N_SPECIAL:] > 0).all()
        assert (table[:N_SPECIAL] == 0).all()


def test_uniform_is_the_logarithm_of_the_number_of_genes() -> None:
    cells = random_cells(3)
    batch = masked_batch(cells, seed=4)
    losses = fitted(cells).gene_losses(batch)["uniform"]
    has_masked = (batch["labels"] != -100).any(dim=1)
    assert has_masked.any()
    assert not has_masked.all()
    assert torch.allclose(losses[has_masked], torch.tensor(np.log(N_GENES)))
    assert (losses[~has_masked] == 0).all()


def test_visible_exclusion_equals_brute_force() -> None:
    baselines, batch = fitted(random_cells(5)), masked_batch(random_cells(6), seed=7)
    losses = baselines.gene_losses(batch)
    for name, table in baselines.gene_tables.items():
        for cell, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
            visible = {int(token) for token in ids if token >= N_SPECIAL}
            terms = []
            for position, label in enumerate(labels.tolist()):
                if label == -100:
                    continue
                column = int(baselines.gene_bins[position - 1]) if table.shape[1] > 1 else 0
                law = {gene: float(table[gene, column]) for gene in range(N_SPECIAL, VOCAB_SIZE)}
                allowed = sum(share for gene, share in law.items() if gene not in visible)
                terms.append(-np.log(law[label] / allowed))
            expected = np.mean(terms) if terms else 0.0
            assert losses[f"{name}_excluding_visible"][cell].item() == pytest.approx(expected, abs=1e-12)
        # Ruling out what cannot be is never a loss.
        assert (losses[f"{name}_excluding_visible"] <= losses[name] + 1e-12).all()


def test_reduction_equals_the_model_loss() -> None:
    baselines, batch = fitted(random_cells(8)), masked_batch(random_cells(9), seed=10)
    cells, positions = (batch["labels"] != -100).nonzero(as_tuple=True)
    labels, n_cells = batch["labels"][cells, positions], len(batch["labels"])
    losses = baselines.gene_losses(batch)
    table = baselines.gene_tables["rank_unigram"]
    logits = table[:, baselines.gene_bins[positions - 1]].T.log()  # (n, V)
    of_model = per_cell_mean(gene_nats(logits, labels), cells, n_cells)
    assert torch.allclose(losses["rank_unigram"].float(), of_model, atol=1e-5)
    is_visible = visible_gene_mask(batch["input_ids"], N_SPECIAL, VOCAB_SIZE)
    nats = gene_nats(logits.masked_fill(is_visible[cells], -torch.inf), labels)
    excluding = per_cell_mean(nats, cells, n_cells)
    assert torch.allclose(losses["rank_unigram_excluding_visible"].float(), excluding, atol=1e-5)
    predicted, true = baselines.gene_mean[labels], batch["expression_labels"][cells, positions]
    of_model = masked_expression_loss(predicted, true, cells, n_cells)
    assert torch.allclose(baselines.expression_losses(batch)["gene_mean"].float(), of_model, atol=1e-6)


def test_mixture_weight_maximises_the_leave_one_out_likelihood() -> None:
    tokens, values, offsets = random_cells(11, n_cells=25)
    of_cell = [tokens[start:end][:MAX_GENES].tolist() for start, end in pairwise(offsets)]
    baselines = fitted((tokens, values, offsets))
    # A second implementation: leave out each token in turn, search the weight of the corpus on a grid.
    mass = {g: sum(1 / len(c) for c in of_cell if g in c) for g in range(N_SPECIAL, VOCAB_SIZE)}
    count = {g: sum(g in c for c in of_cell) for g in mass}
    total = sum(mass.values())
    grid = np.linspace(0.001, 0.999, 999)
    likelihood = np.zeros(len(grid))
    for gene in (gene for gene in mass if count[gene]):
        one = mass[gene] / count[gene]
        left_out = (mass[gene] - one) / (total - one)
        likelihood += mass[gene] * np.log(grid * left_out + (1 - grid) / N_GENES)
    best = grid[likelihood.argmax()]
    law = {g: best * mass[g] / total + (1 - best) / N_GENES for g in mass}
    assert 0.05 < best < 0.99  # an inner optimum, or the test would say little
    assert baselines.gene_tables["unigram"][N_SPECIAL:, 0].tolist() == pytest.approx(
        list(law.values()), abs=2e-3
    )


def test_rank_unigram_learns_ranks_and_beats_the_unigram_on_new_cells() -> None:
    rng = np.random.default_rng(12)
    genes = np.stack([rng.permutation(N_GENES)[:8] for _ in range(400)])
    genes[:, 0] = rng.choice([0, 1], size=400)  # the first rank is nearly known
    cells = [np.unique(row, return_index=True)[1] for row in genes]
    rows = [row[np.sort(first)] for row, first in zip(genes, cells, strict=True)]
    flat = N_SPECIAL + np.concatenate(rows)
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    values = np.ones(len(flat), dtype=np.float32)
    split = int(offsets[200])
    baselines = fitted((flat[:split], values[:split], offsets[:201]))
    held_out = masked_batch((flat[split:], values[split:], offsets[200:] - split), seed=13)
    losses = {name: float(loss.mean()) for name, loss in baselines.gene_losses(held_out).items()}
    assert losses["rank_unigram"] < losses["unigram"] - 0.1


def test_fit_does_not_depend_on_how_cells_are_cut() -> None:
    tokens, values, offsets = random_cells(14)
    fitter = BaselineFitter(np.ones(VOCAB_SIZE), MAX_GENES)
    for first in range(0, len(offsets) - 1, 7):
        bounds = offsets[first : first + 8]
        entries = slice(bounds[0], bounds[-1])
        fitter.update(tokens[entries], values[entries], bounds - bounds[0])
    whole, parts = fitted((tokens, values, offsets)), fitter.finish()
    for name, table in whole.gene_tables.items():
        assert torch.allclose(table, parts.gene_tables[name], atol=1e-12)
    assert torch.allclose(whole.gene_mean, parts.gene_mean, atol=1e-12)
    assert torch.allclose(whole.rank_score, parts.rank_score, atol=1e-12)


def test_score_baselines_are_exact_where_scores_are() -> None:
    # Values are weight * curve(rank) * factor of the cell, and the neighbours give away the factor.
    rng = np.random.default_rng(15)
    weights = rng.uniform(0.5, 2.0, size=VOCAB_SIZE)
    curve = np.exp(-np.arange(6) / 4)
    genes = np.stack([rng.permutation(N_GENES)[:6] for _ in range(30)]) + N_SPECIAL
    factor = np.where(np.arange(30) % 2, 1.0, 3.0)[:, None]
    offsets = np.arange(31) * 6
    train = (genes.reshape(-1), (weights[genes] * curve).reshape(-1), offsets)
    shifted = (genes.reshape(-1), (weights[genes] * curve * factor).reshape(-1).astype(np.float32), offsets)
    batch = masked_batch(shifted, seed=16)
    losses = fitted(train, weights).expression_losses(batch)
    is_visible = (batch["input_ids"] >= N_SPECIAL).any(dim=1)
    has_masked = batch["is_masked"].any(dim=1)
    assert losses["neighbour_score"][is_visible].max() < 1e-9
    assert losses["rank_score"][1::2].max() < 1e-9
    assert losses["rank_score"][0::2][has_masked[0::2]].min() > 0.01
    assert torch.allclose(losses["neighbour_score"][~is_visible], losses["rank_score"][~is_visible])


def test_known_genes_with_hidden_values_are_scored() -> None:
    batch = masked_batch(random_cells(17), seed=18)
    baselines = fitted(random_cells(19))
    known = dict(batch) | {"labels": torch.full_like(batch["labels"], -100)}
    known["input_ids"] = torch.where(batch["is_masked"], batch["labels"], batch["input_ids"])
    of_known, of_hidden = baselines.expression_losses(known), baselines.expression_losses(batch)
    assert all(torch.equal(of_known[name], of_hidden[name]) for name in of_hidden)
    assert (baselines.gene_losses(known)["unigram"] == 0).all()


def test_means_by_time_equal_those_of_the_training_log() -> None:
    rng = np.random.default_rng(20)
    losses = rng.gamma(2.0, size=(2, 500))
    timestep = torch.from_numpy(1.0 - rng.random(500)).float()
    timestep[:11] = torch.tensor([0.1 * edge for edge in range(1, 11)] + [1e-9])  # edges of the bins
    timestep[timestep > 0.8] = 0.75  # leaves empty bins
    meter = LossMeter(Accelerator(cpu=True))
    gene, expression = torch.from_numpy(losses[0]), torch.from_numpy(losses[1])
    meter.update(
        SimpleNamespace(
            cell_gene_loss=gene, cell_expression_loss=expression, cell_latent_loss=None, loss=gene.mean()
        ),
        timestep,
    )
    log = meter.pop("eval")
    for row, name in enumerate(("gene", "expression")):
        report = mean_by_time(losses[row], timestep.double().numpy())
        assert report["mean"] == pytest.approx(log[f"eval_{name}_loss"], abs=1e-12)
        of_bins = [log.get(f"eval_{name}_loss_t{index}") for index in range(10)]
        assert report["by_time_bin"][-1] is of_bins[-1] is None
        assert report["by_time_bin"][:8] == pytest.approx(of_bins[:8], abs=1e-12)


def test_gain_is_paired() -> None:
    model, baseline = np.array([1.0, 3.0, 2.0, 4.0]), np.array([2.0, 4.0, 3.0, 5.0])
    gain = gain_over(model, baseline, np.array([0.05, 0.05, 0.95, 0.95]))
    assert gain["mean"] == pytest.approx(1.0)
    assert gain["standard_error"] == pytest.approx(0.0)  # the spread between cells does not matter
    assert gain["percent"] == pytest.approx(100 / 3.5)
    assert gain["percent_by_time_bin"][0] == pytest.approx(100 / 3)
    assert gain["percent_by_time_bin"][1:9] == [None] * 8


def test_model_is_evaluated_on_the_same_masks_as_in_training() -> None:
    torch.manual_seed(0)
    config = ScDivaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model = ScDivaForMaskedDiffusion(config).train()
    batches = [masked_batch(random_cells(seed, n_cells=9), seed) for seed in (21, 22)]
    losses = evaluate_denoising(iter(batches), baselines=fitted(random_cells(23)), model=model)
    assert model.training
    log = evaluate(model, batches, accelerator=Accelerator(cpu=True))
    assert losses.gene["model"].mean() == pytest.approx(log["eval_gene_loss"], rel=1e-6)
    assert losses.expression["model"].mean() == pytest.approx(log["eval_expression_loss"], rel=1e-6)
    assert {
        len(entry) for entry in (*losses.gene.values(), *losses.expression.values(), losses.timestep)
    } == {18}
    report = report_denoising(losses)
    gap = losses.gene["unigram"].mean() - losses.gene["model"].mean()
    assert report["gene_gain_of_model_over"]["unigram"]["mean"] == pytest.approx(gap)
    assert set(report["expression_loss"]) == {*report["expression_gain_of_model_over"], "model"}
    laws = [law for batch in batches for law in iter_gene_laws(batch, fitted(random_cells(23)))]
    true_genes = [row[row != -100].numpy() for batch in batches for row in batch["labels"]]
    expected = [
        -np.log(law[np.arange(len(genes)), genes]).mean()
        for genes, law in zip(
            [genes for genes in true_genes if len(genes)],
            [law for _, name, law in laws if name == "lattice_counts"],
            strict=True,
        )
    ]
    found = losses.gene["lattice_counts"]
    np.testing.assert_allclose(found[found > 0], expected)
    without = evaluate_denoising(batches, baselines=fitted(random_cells(23)), with_lattice=False)
    assert not [name for name in without.gene if name.startswith("lattice")]
    alone = report_denoising(evaluate_denoising(batches, baselines=fitted(random_cells(23))))
    assert alone["gene_gain_of_model_over"] == {}
    assert alone["gene_loss"] == {k: v for k, v in report["gene_loss"].items() if k != "model"}


@pytest.mark.parametrize("divisor", [1, 4, 8, 32])
def test_rank_bins_grow_to_a_share_of_the_rank(divisor: int) -> None:
    bins = rank_bins(1200, divisor)
    starts = np.flatnonzero(np.diff(bins, prepend=-1))
    assert bins[0] == 0
    assert (np.diff(bins) >= 0).all()
    assert np.diff(bins).max() == 1
    assert np.diff(starts).tolist() == [max(1, start // divisor) for start in starts[:-1]]


def test_refusals() -> None:
    fitter = BaselineFitter(np.ones(VOCAB_SIZE), MAX_GENES)
    with pytest.raises(ValueError, match="got none: update them with the training split"):
        fitter.finish()
    with pytest.raises(ValueError, match="token_ids has 2 entries, values 1, and offsets end at 2"):
        fitter.update(np.array([A, B]), np.ones(1), np.array([0, 2]))
    with pytest.raises(ValueError, match="must be genes, 5 to 44, got 1 to 5"):
        fitter.update(np.array([A, MASK]), np.ones(2), np.array([0, 2]))
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 8"):
        rank_bins(0, 8)
    fitter.update(np.array([A, B]), np.ones(2), np.array([0, 2]))
    batch = masked_batch(random_cells(24), seed=25)
    short = BaselineFitter(np.ones(VOCAB_SIZE), 3)
    short.update(np.array([A, B]), np.ones(2), np.array([0, 2]))
    with pytest.raises(ValueError, match="the baselines were fitted with max_genes=3"):
        short.finish().gene_losses(batch)
    with pytest.raises(ValueError, match="no batch to evaluate"):
        evaluate_denoising([], baselines=fitter.finish())
    with pytest.raises(ValueError, match=r"got shapes \(2,\) and \(3,\)"):
        mean_by_time(np.ones(2), np.ones(3))
