"""Tests of the diffusion maths: schedule, strata, losses per cell, visible genes, the bound behind the loss.

Scope: everything in `diffusion_scdiva`; the bound is checked by enumerating all masks of a toy cell.
Run: pytest tests/test_diffusion_scdiva.py
"""

import itertools
from math import comb, factorial, log

import numpy as np
import pytest
import torch
from torch import nn

from modeling_scdiva.diffusion_scdiva import (
    alpha,
    alpha_derivative,
    gene_nats,
    loss_weight,
    masked_expression_loss,
    masking_rate,
    per_cell_mean,
    stratified_timesteps,
    visible_gene_mask,
)


def masked_gene_loss(logits, labels, cell_index, n_cells):
    """The loss as the network puts it together."""
    return per_cell_mean(gene_nats(logits, labels), cell_index, n_cells)


def test_schedule_ends_and_slope():
    assert (alpha(0.0), alpha(1.0)) == (1.0, 0.0)
    assert (masking_rate(0.0), masking_rate(1.0)) == (0.0, 1.0)
    timestep = np.linspace(0.05, 1.0, 20)
    np.testing.assert_allclose(alpha(timestep) + masking_rate(timestep), 1.0)
    step = 1e-6
    slope = (alpha(timestep + step) - alpha(timestep - step)) / (2 * step)
    np.testing.assert_allclose(alpha_derivative(timestep), slope, atol=1e-8)
    np.testing.assert_allclose(loss_weight(timestep), 1.0 / timestep)


@pytest.mark.parametrize("function", [alpha, alpha_derivative, masking_rate, loss_weight])
def test_schedule_takes_floats_arrays_and_tensors(function):
    timestep = np.array([0.25, 0.5, 1.0])
    as_array, as_tensor = function(timestep), function(torch.from_numpy(timestep))
    assert isinstance(as_array, np.ndarray)
    np.testing.assert_array_equal(as_array, as_tensor.numpy())
    np.testing.assert_array_equal(as_array, [function(t) for t in timestep.tolist()])


def test_stratified_timesteps_by_hand():
    timestep = stratified_timesteps(np.array([0.0, 0.5, 0.75, 0.25]), np.array([3, 0, 1, 2]))
    np.testing.assert_allclose(timestep, [1.0, 0.125, 0.3125, 0.6875])


def test_every_stratum_is_hit_once_and_parts_make_the_whole():
    rng = np.random.default_rng(0)
    for n_cells in (1, 2, 7, 64):
        uniforms, strata = rng.random(n_cells), rng.permutation(n_cells)
        timestep = stratified_timesteps(uniforms, strata)
        assert timestep.min() > 0.0
        assert timestep.max() <= 1.0
        np.testing.assert_array_equal(np.ceil(timestep * n_cells) - 1, strata)
        half = n_cells // 2
        first = stratified_timesteps(uniforms[:half], strata[:half], n_cells)
        second = stratified_timesteps(uniforms[half:], strata[half:], n_cells)
        np.testing.assert_array_equal(np.concatenate([first, second]), timestep)
        as_tensor = stratified_timesteps(torch.from_numpy(uniforms), torch.from_numpy(strata))
        np.testing.assert_array_equal(as_tensor.numpy(), timestep)


def test_stratified_timesteps_refuse_different_shapes():
    with pytest.raises(ValueError, match=r"one shape, got \(3,\) and \(4,\)"):
        stratified_timesteps(np.zeros(3), np.arange(4))


def test_per_cell_mean_by_hand():
    losses = torch.tensor([1.0, 3.0, 10.0], requires_grad=True)
    means = per_cell_mean(losses, torch.tensor([0, 0, 2]), n_cells=4)
    assert means.tolist() == [2.0, 0.0, 10.0, 0.0]
    means.mean().backward()
    assert losses.grad.tolist() == [0.125, 0.125, 0.25]


def test_no_masked_position_gives_a_zero_that_stays_in_the_graph():
    logits = torch.zeros(0, 9, requires_grad=True)
    loss = masked_gene_loss(logits, torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), 3)
    assert loss.tolist() == [0.0, 0.0, 0.0]
    loss.sum().backward()
    assert logits.grad.shape == (0, 9)


def test_losses_equal_a_loop_over_cells():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        n_cells, n_genes = 5, 11
        is_masked = torch.rand(n_cells, 8, generator=generator) < 0.4
        logits = torch.randn(n_cells, 8, n_genes, generator=generator)
        labels = torch.randint(n_genes, (n_cells, 8), generator=generator)
        predictions, targets = torch.rand(2, n_cells, 8, generator=generator)
        cell_index = is_masked.nonzero(as_tuple=True)[0]
        gene = masked_gene_loss(logits[is_masked], labels[is_masked], cell_index, n_cells)
        value = masked_expression_loss(predictions[is_masked], targets[is_masked], cell_index, n_cells)
        for i in range(n_cells):
            here = is_masked[i]
            if not here.any():
                assert gene[i] == value[i] == 0.0
                continue
            torch.testing.assert_close(gene[i], nn.functional.cross_entropy(logits[i, here], labels[i, here]))
            torch.testing.assert_close(
                value[i], nn.functional.mse_loss(predictions[i, here], targets[i, here])
            )


def test_gene_loss_of_equal_logits_is_the_log_of_the_genes_left():
    logits = torch.zeros(2, 10)
    logits[:, :3] = -torch.inf
    loss = masked_gene_loss(logits, torch.tensor([3, 9]), torch.tensor([0, 1]), 2)
    torch.testing.assert_close(loss, torch.full((2,), log(7)))


def test_losses_are_float32_from_half_precision():
    logits = torch.randn(4, 6).bfloat16()
    labels, cell_index = torch.arange(4), torch.zeros(4, dtype=torch.long)
    assert masked_gene_loss(logits, labels, cell_index, 1).dtype == torch.float32
    assert masked_expression_loss(logits[:, 0], logits[:, 1], cell_index, 1).dtype == torch.float32


def test_visible_genes_by_hand_and_by_sets():
    input_ids = torch.tensor([[2, 7, 1, 5, 0], [2, 6, 6, 1, 1]])
    is_visible = visible_gene_mask(input_ids, n_special_tokens=5, vocab_size=8)
    assert is_visible.tolist() == [
        [False] * 5 + [True, False, True],
        [False] * 5 + [False, True, False],
    ]
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(40, (6, 12), generator=generator)
    is_visible = visible_gene_mask(input_ids, n_special_tokens=5, vocab_size=40)
    for row, shown in zip(input_ids.tolist(), is_visible, strict=True):
        assert set(shown.nonzero().flatten().tolist()) == {token for token in row if token >= 5}


class ToyDenoiser:
    """Any table of logits per mask pattern is a denoiser; the identities hold for all of them."""

    def __init__(self, n_genes: int, vocab_size: int, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.n_genes = n_genes
        self.cell = torch.randint(vocab_size, (n_genes,), generator=generator)
        self.masks = [m for m in itertools.product([False, True], repeat=n_genes) if any(m)]
        self.logits = {m: torch.randn(n_genes, vocab_size, generator=generator) for m in self.masks}

    def losses(self, mask: tuple[bool, ...]) -> torch.Tensor:
        """Cross-entropy at the masked positions."""
        here = torch.tensor(mask)
        return nn.functional.cross_entropy(self.logits[mask][here], self.cell[here], reduction="none")

    def nelbo_over_orders(self) -> float:
        """Mean over all orders of unmasking of the sum of losses: the bound by its definition."""
        total = 0.0
        for order in itertools.permutations(range(self.n_genes)):
            hidden = set(range(self.n_genes))
            for position in order:
                mask = tuple(i in hidden for i in range(self.n_genes))
                total += float(self.losses(mask)[sorted(hidden).index(position)])
                hidden.remove(position)
        return total / factorial(self.n_genes)

    def nelbo_over_time(self, n_points: int = 64) -> float:
        """Integral over time of the weighted masked losses; Gauss quadrature is exact for polynomials."""
        nodes, weights = np.polynomial.legendre.leggauss(n_points)
        total = 0.0
        for t, w in zip((nodes + 1) / 2, weights / 2, strict=True):
            for mask in self.masks:
                k = sum(mask)
                probability = masking_rate(t) ** k * alpha(t) ** (self.n_genes - k)
                total += w * loss_weight(t) * probability * float(self.losses(mask).sum())
        return total

    def expected_cell_loss(self) -> float:
        """Expectation of the shipped loss over t ~ U(0, 1) and masks; the integral is a Beta function."""
        rows = [torch.tensor(mask) for mask in self.masks]
        cell_index = torch.cat([torch.full((int(r.sum()),), i) for i, r in enumerate(rows)])
        logits = torch.cat([self.logits[m][r] for m, r in zip(self.masks, rows, strict=True)])
        labels = torch.cat([self.cell[r] for r in rows])
        losses = masked_gene_loss(logits, labels, cell_index, len(rows))
        probability = [1.0 / ((self.n_genes + 1) * comb(self.n_genes, sum(m))) for m in self.masks]
        return float(sum(p * loss for p, loss in zip(probability, losses.tolist(), strict=True)))


@pytest.mark.parametrize("n_genes", [1, 3, 5])
def test_mean_cell_loss_is_the_bound_divided_by_length_plus_one(n_genes):
    toy = ToyDenoiser(n_genes, vocab_size=7)
    nelbo = toy.nelbo_over_orders()
    assert toy.nelbo_over_time() == pytest.approx(nelbo, rel=1e-6)
    assert (n_genes + 1) * toy.expected_cell_loss() == pytest.approx(nelbo, rel=1e-6)


def test_a_mean_over_all_masked_positions_is_another_objective():
    toy = ToyDenoiser(5, vocab_size=7)
    probability = {mask: 1.0 / (6 * comb(5, sum(mask))) for mask in toy.masks}
    n_masked = sum(p * sum(mask) for mask, p in probability.items())
    flat = sum(p * float(toy.losses(mask).sum()) for mask, p in probability.items()) / n_masked
    assert abs(flat - toy.nelbo_over_orders() / 5) > 0.01


def test_strata_reach_the_bound_without_bias():
    toy = ToyDenoiser(3, vocab_size=7)
    rng = np.random.default_rng(0)
    estimates = []
    for _ in range(400):
        timestep = stratified_timesteps(rng.random(16), rng.permutation(16))
        for t, draws in zip(timestep, rng.random((16, 3)), strict=True):
            mask = tuple((draws < masking_rate(t)).tolist())
            estimates.append(float(toy.losses(mask).mean()) if any(mask) else 0.0)
    standard_error = np.std(estimates) / len(estimates) ** 0.5
    assert abs(np.mean(estimates) - toy.expected_cell_loss()) < 4 * standard_error
