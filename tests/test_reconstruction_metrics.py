"""Reconstruction scores by hand and by second implementations, the lattice by brute force, the copy rules.

Needs: both packages, rapidfuzz, nltk; no files, no GPU.
Run: python -m pytest tests/test_reconstruction_metrics.py
"""

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau, spearmanr

from modeling_scdiva.metrics.denoising_baselines import BaselineFitter
from modeling_scdiva.metrics.reconstruction import (
    bleu,
    cell_gene_scores,
    cell_value_scores,
    copy_test,
    edit_distance,
    mean_over_cells,
    score_gene_laws,
)
from modeling_scdiva.metrics.reconstruction_baselines import (
    GUARD,
    LATTICE_LAWS,
    iter_gene_laws,
    lattice_range,
    molecule_value,
    value_predictions,
)

N_SPECIAL, TARGET_SUM = 5, 10_000.0


def ranked_cell(rng: np.random.Generator, weights: np.ndarray, n_genes: int) -> tuple[np.ndarray, ...]:
    """Make one cell sorted as the tokenizer sorts: tokens, float32 values, counts, value of one molecule."""
    tokens = N_SPECIAL + rng.permutation(len(weights) - N_SPECIAL)[:n_genes]
    counts = rng.geometric(0.3, size=n_genes)
    unit = TARGET_SUM / (counts.sum() + rng.integers(0, 2_000))
    values = np.log1p(unit * counts).astype(np.float32)
    scores = (values / weights[tokens]).astype(np.float32)
    order = np.lexsort((tokens, -scores))
    return tokens[order], values[order], counts[order], unit


# --- the lattice ---


def test_molecule_value_finds_the_library_size():
    rng = np.random.default_rng(0)
    for _ in range(50):
        library_size = int(rng.integers(500, 30_000))
        counts = rng.geometric(0.1, size=12) + rng.integers(0, 20)
        values = np.log1p(TARGET_SUM * counts / library_size).astype(np.float32)
        found = molecule_value(values)
        assert found == pytest.approx(np.gcd.reduce(counts) * TARGET_SUM / library_size, rel=1e-5)


def test_molecule_value_of_what_is_no_count():
    assert molecule_value(np.array([])) is None
    assert molecule_value(np.random.default_rng(0).gamma(2.0, size=30)) is None


@pytest.mark.parametrize("equal_weights", [False, True])
def test_lattice_range_equals_brute_force_of_the_sort(equal_weights):
    """A gene fits with a count exactly if the tokenizer would sort it between the two neighbours."""
    rng = np.random.default_rng(1)
    weights = np.ones(25) if equal_weights else rng.uniform(1.0, 3.0, size=25)
    unit, largest_count = 3.7, 40
    for _ in range(20):
        (high, count_high), (low, count_low) = zip(
            rng.choice(np.arange(N_SPECIAL, 25), 2, replace=False), rng.integers(1, 12, 2), strict=True
        )

        def key(token, count):
            return -np.float32(np.log1p(unit * count).astype(np.float32) / weights[token]), token

        if key(high, count_high) > key(low, count_low):
            (high, count_high), (low, count_low) = (low, count_low), (high, count_high)
        bounds = (
            np.array([np.log1p(unit * count_high) / weights[high]]),
            np.array([np.log1p(unit * count_low) / weights[low]]),
        )
        least, largest = lattice_range(
            bounds, (np.array([high]), np.array([low])), ranking_weights=weights, unit=unit
        )
        for token in set(range(N_SPECIAL, 25)) - {high, low}:
            fitting = [
                count
                for count in range(1, largest_count)
                if key(high, count_high) < key(token, count) < key(low, count_low)
            ]
            found = range(int(least[0, token]), int(min(largest[0, token], largest_count - 1)) + 1)
            assert list(found) == fitting, (token, high, low)


def test_lattice_range_at_the_ends_of_a_cell():
    ends = (np.array([np.inf]), np.array([0.0]))
    none = (np.array([-1]), np.array([-1]))
    least, largest = lattice_range(ends, none, ranking_weights=np.ones(9), unit=2.0)
    assert (least == 1).all()
    assert (largest > 1e100).all()


def lattice_case(seed: int, n_cells: int = 12):
    """Fit baselines on ranked cells; mask others by half."""
    rng = np.random.default_rng(seed)
    weights = np.concatenate([np.ones(N_SPECIAL), rng.uniform(1.0, 3.0, size=40)])
    cells = [ranked_cell(rng, weights, int(rng.integers(6, 16))) for _ in range(4 * n_cells)]
    fitter = BaselineFitter(weights, 20)
    training = cells[n_cells:]
    offsets = np.concatenate([[0], np.cumsum([len(cell[0]) for cell in training])])
    fitter.update(np.concatenate([c[0] for c in training]), np.concatenate([c[1] for c in training]), offsets)
    shape = (n_cells, 21)
    batch = {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "expression_values": torch.zeros(shape),
        "expression_labels": torch.zeros(shape),
        "is_masked": torch.zeros(shape, dtype=torch.bool),
        "labels": torch.full(shape, -100),
    }
    for row, (tokens, values, _, _) in enumerate(cells[:n_cells]):
        places = slice(1, 1 + len(tokens))
        is_masked = torch.from_numpy(rng.random(len(tokens)) < 0.5)
        is_masked[0] = True
        batch["input_ids"][row, 0] = 2
        batch["input_ids"][row, places] = torch.from_numpy(tokens).masked_fill(is_masked, 1)
        batch["expression_values"][row, places] = torch.from_numpy(values).masked_fill(is_masked, 0.0)
        batch["expression_labels"][row, places] = torch.from_numpy(values)
        batch["labels"][row, places] = torch.from_numpy(tokens).masked_fill(~is_masked, -100)
        batch["is_masked"][row, places] = is_masked
    return batch, fitter.finish()


def test_laws_are_laws_and_exclude_what_is_visible():
    batch, baselines = lattice_case(2)
    names = set()
    for cell, name, law in iter_gene_laws(batch, baselines):
        names.add(name)
        assert law.shape == (int((batch["labels"][cell] != -100).sum()), 45)
        np.testing.assert_allclose(law.sum(axis=1), 1.0, atol=1e-9)
        visible = batch["input_ids"][cell]
        assert (law[:, visible[visible >= N_SPECIAL]] == 0).all()
        assert (law[:, :N_SPECIAL] == 0).all()
    assert names == {"unigram", "rank_unigram", *LATTICE_LAWS}


def test_the_frequency_laws_agree_with_the_denoising_baselines():
    batch, baselines = lattice_case(3)
    expected = baselines.gene_losses(batch)
    for cell, name, law in iter_gene_laws(batch, baselines):
        if name in ("unigram", "rank_unigram"):
            labels = batch["labels"][cell][batch["labels"][cell] != -100].numpy()
            loss = score_gene_laws(np.log(law + 1e-300), labels)["gene_loss"].mean()
            assert loss == pytest.approx(float(expected[f"{name}_excluding_visible"][cell]), rel=1e-9)


def test_the_true_gene_always_fits_and_arithmetic_alone_beats_frequency():
    batch, baselines = lattice_case(4)
    losses: dict[str, list[float]] = {}
    for cell, name, law in iter_gene_laws(batch, baselines):
        labels = batch["labels"][cell][batch["labels"][cell] != -100].numpy()
        losses.setdefault(name, []).append(-np.log(law[np.arange(len(labels)), labels]).mean())
        if name == "lattice_unigram" and (batch["labels"][cell] == -100).sum() > 8:
            # Genes that do not fit keep the guard's mass alone; the true gene has far more.
            assert (law[np.arange(len(labels)), labels] > GUARD * 0.05).all()
    means = {name: np.mean(entries) for name, entries in losses.items()}
    assert means["lattice_unigram"] < means["unigram"] - 0.1
    assert means["lattice_rank_unigram"] < means["rank_unigram"] - 0.1
    assert means["lattice_counts"] < means["unigram"] - 0.1


def test_lattice_law_of_one_gap_by_hand():
    """Two visible genes around one hidden: the law is the prior over the genes that fit, and the guard."""
    batch, baselines = lattice_case(5)
    unit = 4.0
    tokens, counts = np.array([6, 9, 7]), np.array([9, 3, 1])
    for row in ("input_ids", "labels", "expression_values", "is_masked"):
        batch[row] = batch[row][:1].clone()
        batch[row][:] = {"labels": -100}.get(row, 0)
    weights_now = baselines.ranking_weights.numpy()
    values = np.log1p(unit * counts)
    order = np.argsort(-values / weights_now[tokens])
    tokens, values = tokens[order], values[order]
    batch["input_ids"][0, 1:4] = torch.tensor([tokens[0], 1, tokens[2]])
    batch["expression_values"][0, 1:4] = torch.tensor([values[0], 0.0, values[2]]).float()
    batch["is_masked"][0, 2] = True
    batch["labels"][0, 2] = int(tokens[1])
    laws = {name: law[0] for _, name, law in iter_gene_laws(batch, baselines)}
    scores = values / weights_now[tokens]
    # 2 visible counts: lattices of one to four times finer steps, weighted 1, 1/4, 1/9, 1/16.
    shown_unit = molecule_value(np.log1p(np.expm1(values[[0, 2]])))
    expected = np.zeros(len(weights_now))
    shares = np.array([1.0, 1 / 4, 1 / 9, 1 / 16])
    for share, divisor in zip(shares / shares.sum(), (1, 2, 3, 4), strict=True):
        fine = shown_unit / divisor
        fits = [
            any(
                scores[2] - 1e-7 <= np.log1p(fine * count) / weights_now[gene] <= scores[0] + 1e-7
                for count in range(1, 4_000)
            )
            for gene in range(len(weights_now))
        ]
        law = laws["unigram"] * np.array(fits)
        expected += share * law / law.sum()
    expected = (1 - GUARD) * expected + GUARD * laws["rank_unigram"]
    np.testing.assert_allclose(laws["lattice_unigram"], expected, atol=1e-9)


def test_cells_in_another_order_are_refused():
    batch, baselines = lattice_case(6)
    batch["expression_values"] = batch["expression_values"].flip(1)
    batch["input_ids"] = batch["input_ids"].flip(1)
    batch["is_masked"] = batch["is_masked"].flip(1)
    with pytest.raises(ValueError, match="not in the order of value / ranking weight"):
        list(iter_gene_laws(batch, baselines))
    assert {name for _, name, _ in iter_gene_laws(batch, baselines, with_lattice=False)} == {
        "unigram",
        "rank_unigram",
    }


def test_scaled_values_have_no_lattice():
    batch, baselines = lattice_case(7)
    batch["expression_values"] = batch["expression_values"] * np.float32(0.7312)  # keeps the order
    laws = {(cell, name): law for cell, name, law in iter_gene_laws(batch, baselines)}
    np.testing.assert_array_equal(laws[0, "lattice_rank_unigram"], laws[0, "rank_unigram"])
    np.testing.assert_array_equal(laws[0, "lattice_unigram"], laws[0, "unigram"])


def test_longer_cells_than_the_baselines_know_are_refused():
    batch, baselines = lattice_case(8)
    longer = {name: torch.nn.functional.pad(entry, (0, 5)) for name, entry in batch.items()}
    longer["labels"][0, -1] = 9
    with pytest.raises(ValueError, match="fitted with max_genes=20"):
        list(iter_gene_laws(longer, baselines))


def test_value_predictions_agree_with_the_denoising_baselines():
    batch, baselines = lattice_case(9)
    losses = baselines.expression_losses(batch)
    cells = batch["is_masked"].nonzero()[:, 0].numpy()
    targets = batch["expression_labels"][batch["is_masked"]].numpy()
    for name, predicted in value_predictions(batch, baselines).items():
        squared = (predicted - targets) ** 2
        means = [squared[cells == cell].mean() for cell in range(len(batch["labels"]))]
        np.testing.assert_allclose(means, losses[name].numpy(), rtol=1e-5)


# --- scores ---


def test_gene_scores_by_hand():
    laws = np.array([[0.5, 0.25, 0.25, 0.0], [0.25, 0.25, 0.25, 0.25]])
    with np.errstate(divide="ignore"):
        scores = score_gene_laws(np.log(laws), np.array([1, 0]))
    np.testing.assert_allclose(scores["gene_loss"], [np.log(4), np.log(4)])
    np.testing.assert_allclose(scores["top_1"], [0.0, 0.25])  # second, shared; one of four equal
    np.testing.assert_allclose(scores["top_10"], [1.0, 1.0])
    assert scores["predicted_genes"].tolist() == [0, 0]
    # Gene 1: 1/4 at both places, mean place 1/2. Gene 0: 1/2 at place 0, 1/4 at place 1, mean 1/3.
    np.testing.assert_allclose(scores["expected_place"], [0.5, 1 / 3])
    reduced = cell_gene_scores(scores, np.array([1, 0]))
    assert reduced["gene_set_precision"] == 1.0
    assert reduced["gene_set_recall"] == 0.5
    assert reduced["gene_set_f1"] == pytest.approx(2 / 3)
    assert reduced["edit_distance"] == 0.5  # [1, 0] -> [0, 0]
    assert "order_spearman" not in reduced


def test_gene_loss_equals_cross_entropy_and_top_k_equals_a_sort():
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(15, 60)))
    genes = rng.permutation(60)[:15]
    scores = score_gene_laws(logits.log_softmax(-1).numpy(), genes)
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(genes), reduction="none")
    np.testing.assert_allclose(scores["gene_loss"], expected.numpy())
    is_in = (logits.topk(10).indices.numpy() == genes[:, None]).any(axis=1)
    np.testing.assert_array_equal(scores["top_10"], is_in)


def test_order_scores_equal_scipy_and_a_perfect_law_is_perfect():
    genes = np.array([4, 9, 2, 7, 5])
    laws = np.full((5, 12), -20.0)
    laws[np.arange(5), genes] = -1e-6
    scores = cell_gene_scores(score_gene_laws(laws, genes), genes)
    for name in ("top_1_accuracy", "top_10_accuracy", "gene_set_f1", "order_spearman", "order_kendall"):
        assert scores[name] == pytest.approx(1.0), name
    assert scores["edit_distance"] == 0.0
    noise = np.log(np.random.default_rng(1).dirichlet(np.ones(12), size=5))
    of_genes = score_gene_laws(noise, genes)
    scores = cell_gene_scores(of_genes, genes)
    places = of_genes["expected_place"]
    assert scores["order_spearman"] == pytest.approx(spearmanr(range(5), places).statistic)
    assert scores["order_kendall"] == pytest.approx(kendalltau(range(5), places).statistic)


def test_value_scores_by_hand():
    scores = cell_value_scores(np.array([1.0, 2.0, 4.0]), np.array([1.0, 3.0, 5.0]))
    assert scores["value_mae"] == pytest.approx(2 / 3)
    assert scores["value_rmse"] == pytest.approx(np.sqrt(2 / 3))
    assert scores["value_slope"] == pytest.approx(6 / 8)  # Sxy = 6, Sxx = 8
    assert scores["value_spearman"] == 1.0
    constant = cell_value_scores(np.array([1.0, 2.0, 4.0]), np.ones(3))
    assert constant["value_pearson"] == constant["value_slope"] == 0.0
    assert set(cell_value_scores(np.ones(4), np.arange(4))) == {"value_mae", "value_rmse"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: score_gene_laws(np.zeros((2, 3)), np.arange(3)), r"must be \(n, V\)"),
        (lambda: score_gene_laws(np.zeros((2, 3)), np.array([1, 1])), "occurs twice"),
        (
            lambda: score_gene_laws(np.array([[-np.inf, 0.0]]), np.array([0])),
            "probability zero, the first is 0",
        ),
        (lambda: cell_value_scores(np.zeros(2), np.zeros(3)), r"with n > 0, got \(2,\), \(3,\)"),
        (lambda: cell_value_scores(np.zeros(2), np.full(2, np.nan)), "must be finite"),
        (lambda: copy_test([], []), "Each cell needs as many output tokens"),
        (lambda: copy_test([np.arange(3)], [np.arange(2)]), r"lengths \[\(3, 2\)\]"),
        (lambda: mean_over_cells([]), "no cell to score"),
    ],
)
def test_impossible_scores_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- the copy test: frozen behaviour of trivial rules ---


def copy_cells(n_genes: int, share_unmapped: float) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    cells = [rng.choice(25_000, n_genes, replace=False) for _ in range(10)]
    for cell in cells:
        cell[rng.random(n_genes) < share_unmapped] = 25_000
    return cells


@pytest.mark.parametrize(
    ("n_genes", "share_unmapped", "bleu_score", "spearman", "tolerance"),
    [(600, 0.0, 0.996, 0.990, 1e-3), (1_200, 0.0, 0.998, 0.995, 1e-3), (1_200, 0.3, 0.998, 0.795, 0.02)],
)
def test_repeating_the_next_gene_passes_the_copy_test(
    n_genes, share_unmapped, bleu_score, spearman, tolerance
):
    inputs = copy_cells(n_genes, share_unmapped)
    scores = copy_test(inputs, [np.append(cell[1:], 25_001) for cell in inputs])
    assert scores["copy_edit_distance"] == 11
    assert scores["copy_bleu"] == pytest.approx(bleu_score, abs=1e-3)
    assert scores["copy_spearman"] == pytest.approx(spearman, abs=tolerance)


def test_copy_test_of_identity_and_of_a_random_order():
    inputs = copy_cells(300, 0.0)
    scores = copy_test(inputs, inputs)
    assert scores["copy_edit_distance"] == 0
    assert scores["copy_bleu"] == pytest.approx(1.0)
    assert scores["copy_spearman"] == scores["copy_pearson"] == pytest.approx(1.0)
    rng = np.random.default_rng(1)
    shuffled = copy_test(inputs, [rng.permutation(cell) for cell in inputs])
    assert shuffled["copy_bleu"] == 0.0
    assert abs(shuffled["copy_spearman"]) < 0.05
    assert shuffled["copy_edit_distance"] > 2_000


def test_edit_distance_equals_dynamic_programming():
    rng = np.random.default_rng(2)
    for _ in range(20):
        first, second = (rng.integers(0, 4, size=rng.integers(0, 9)) for _ in range(2))
        table = np.add.outer(np.arange(len(first) + 1), np.arange(len(second) + 1))
        for i, a in enumerate(first, start=1):
            for j, b in enumerate(second, start=1):
                table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a != b))
        assert edit_distance(first, second) == table[-1, -1]


def test_bleu_by_hand():
    candidate, reference = [1, 2, 3, 4, 5], [1, 2, 3, 4, 6]
    # 4/5, 3/4, 2/3 and 1/2 of the n-grams agree; equal lengths, no penalty.
    assert bleu(candidate, reference) == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    assert bleu([1, 2, 3], [3, 2, 1]) == 0.0
