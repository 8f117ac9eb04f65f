"""Tests of the law of expression values: a logistic integrated over whole counts.

Scope: everything in `value_law_scdiva`; the reference is the same formula in decimal numbers of 500 digits.
Run: pytest tests/test_value_law_scdiva.py
"""

import itertools
import math
from decimal import Decimal, localcontext
from functools import cache

import numpy as np
import pytest
import torch
from scipy import stats

from modeling_scdiva.value_law_scdiva import (
    count_log_prob,
    counts_from_values,
    draw_counts,
    draw_logistic,
    fixed_scale,
    guided_law,
    log_interval,
    values_from_counts,
)

INF = math.inf
# Location and scale in log1p units, size factor: the usual, the narrow, the broad, and both tails.
LAWS = [
    (1.5, 0.2, 0.6),
    (0.0, 0.3, 0.6),
    (2.0, 0.01, 3.0),
    (3.0, 1.5, 0.05),
    (9.0, 0.02, 0.3),
    (0.1, 0.02, 0.01),
    (4.0, 0.5, 40.0),
    (30.0, 0.05, 1.0),
    (1.0, 5.0, 1.0),
]


def float64(*numbers):
    return [torch.as_tensor(number, dtype=torch.float64).reshape(-1) for number in numbers]


def decimal_law(counts, size_factor, location, scale, fewest=1, most=INF):
    """Log-probabilities of counts between two counts, by the definition."""
    with localcontext() as context:
        context.prec = 500  # 1 - F differs from 1 by as little as exp(-600)
        factor, location, scale = Decimal(size_factor), Decimal(location), Decimal(scale)

        @cache
        def beyond(count):
            """1 - F at count - 1/2."""
            if count == INF:
                return Decimal(0)
            value = (1 + (Decimal(count) - Decimal("0.5")) / factor).ln()
            return 1 / (1 + ((value - location) / scale).exp())

        between = beyond(fewest) - beyond(most + 1)
        return np.array([float(((beyond(c) - beyond(c + 1)) / between).ln()) for c in counts])


# The mass of counts.


@pytest.mark.parametrize("law", LAWS)
def test_mass_equals_the_definition_in_500_digits(law):
    location, scale, size_factor = law
    counts = [1, 2, 3, 10, 500, 20_000, 100_000]
    arguments = float64(counts, [size_factor] * 7, [location] * 7, [scale] * 7)
    nats = count_log_prob(*arguments)
    expected = decimal_law(counts, size_factor, location, scale)
    np.testing.assert_allclose(nats, expected, rtol=1e-11, atol=1e-13)
    assert (nats <= 0).all()
    in_float32 = count_log_prob(*(argument.float() for argument in arguments))
    assert in_float32.dtype == torch.float32
    # Beyond the rounding of the arguments themselves, which a narrow law far from its centre enlarges.
    np.testing.assert_allclose(in_float32, expected, rtol=2e-4, atol=1e-4)


def test_mass_by_hand():
    # f = 1/2, m = ln 4, s = 1/2: exp((y(c) - m) / s) = ((1 + 2 c) / 4)^2, so 1 - F = 1 / (1 + that).
    # At c = 1/2, 3/2, 5/2 these are 1 / (1 + 1/4) = 4/5, 1/2, 4/13.
    nats = count_log_prob(*float64([1, 2], [0.5, 0.5], [math.log(4)] * 2, [0.5] * 2))
    assert nats.exp().tolist() == pytest.approx([(4 / 5 - 1 / 2) / (4 / 5), (1 / 2 - 4 / 13) / (4 / 5)])


@pytest.mark.parametrize("law", LAWS)
def test_mass_sums_to_one(law):
    location, scale, size_factor = law
    n_counts = 200_000
    counts = torch.arange(1, n_counts + 1, dtype=torch.float64)
    rest = [torch.full_like(counts, number) for number in (size_factor, location, scale)]
    total = count_log_prob(counts, *rest).exp().sum()
    ends = [(math.log1p((c + 0.5) / size_factor) - location) / scale for c in (0, n_counts)]
    # What lies beyond the last count, by its own formula: broad laws have heavy tails.
    beyond = stats.logistic.logsf(ends[1]) - stats.logistic.logsf(ends[0])
    assert total.item() + math.exp(beyond) == pytest.approx(1.0, abs=1e-10)


def test_gradients_are_finite_at_the_edges():
    counts, factors, locations, scales = map(
        torch.tensor,
        zip(
            *itertools.product([1.0, 2.0, 1e5], [1e-2, 1.0, 50.0], [0.0, 1e-8, 9.0], [1e-3, 0.3, 5.0]),
            strict=True,
        ),
    )
    locations.requires_grad_()
    scales.requires_grad_()
    nats = -count_log_prob(counts, factors, locations, scales)
    assert nats.isfinite().all()
    nats.sum().backward()
    assert locations.grad.isfinite().all()
    assert scales.grad.isfinite().all()
    # One molecule and a centre far below: the mass is 1, nothing pulls. Far above: it pulls down.
    low, high = torch.tensor([-6.0], requires_grad=True), torch.tensor([6.0], requires_grad=True)
    one, scale = torch.ones(1), torch.full((1,), 0.1)
    (-count_log_prob(one, one, low, scale) - count_log_prob(one, one, high, scale)).backward()
    assert low.grad.abs() < 1e-6
    assert high.grad.item() == pytest.approx(10.0, rel=1e-4)


def test_gradients_equal_differences():
    arguments = float64([1, 3, 40], [0.5, 0.5, 2.0], [0.2, 1.5, 2.5], [0.1, 0.4, 1.0])
    arguments[2].requires_grad_()
    arguments[3].requires_grad_()
    assert torch.autograd.gradcheck(lambda m, s: count_log_prob(*arguments[:2], m, s), arguments[2:])


def test_intervals_are_exact_in_both_tails():
    ends = [
        (-INF, INF),
        (-1.0, 2.0),
        (-INF, -800.0),
        (700.0, INF),
        (500.0, 500.5),
        (-90.0, -40.0),
        (30.0, 31.0),
    ]
    lower, upper = (torch.tensor(side, dtype=torch.float64) for side in zip(*ends, strict=True))
    nats = log_interval(lower, upper).tolist()
    assert nats[0] == 0.0
    expected = stats.logistic.cdf(2.0) - stats.logistic.cdf(-1.0)
    assert math.exp(nats[1]) == pytest.approx(expected, rel=1e-12)
    assert nats[2:4] == [-800.0, -700.0]
    assert nats[4] == pytest.approx(-500.0 + math.log1p(-math.exp(-0.5)), rel=1e-12)
    assert nats[5] == pytest.approx(-40.0 + math.log1p(-math.exp(-50.0)), rel=1e-12)
    mirrored = log_interval(-upper, -lower)
    torch.testing.assert_close(mirrored, torch.tensor(nats, dtype=torch.float64), rtol=1e-12, atol=0.0)


def test_fixed_scale_has_the_variance_of_the_squared_error():
    for weight in (0.1, 1.0, 10.0):
        assert stats.logistic(scale=fixed_scale(weight)).var() == pytest.approx(1 / (2 * weight))
    for weight in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"expression_loss_weight is .*Train with a positive weight"):
            fixed_scale(weight)


# Counts and values.


def test_counts_come_back_from_float32_values():
    rng = np.random.default_rng(0)
    counts = np.concatenate([np.arange(1, 2000), rng.integers(1, 100_001, 20_000), [99_999, 100_000]])
    counts = torch.from_numpy(counts.astype(np.float64))
    for size_factor in (0.01, 0.1, 0.63, 5.0, 100.0):
        factors = torch.tensor([size_factor])
        values = values_from_counts(counts, factors)
        torch.testing.assert_close(values.expm1() * factors.double(), counts)
        assert values.dtype == torch.float64
        assert torch.equal(counts_from_values(values.float(), factors), counts)


def test_values_by_hand():
    # 3 molecules of 6,000, scaled to 10,000: log1p(5)
    value = values_from_counts(torch.tensor([3]), torch.tensor([0.6]))
    assert value.item() == pytest.approx(math.log(6), rel=1e-7)
    assert counts_from_values(torch.tensor([1.79]), torch.tensor([0.6])).item() == 3.0


# Draws.


def test_draws_invert_the_distribution_function():
    uniforms = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    for lower, upper in [(-INF, INF), (-2.0, 1.0), (0.5, INF), (-INF, 3.0), (-4.0, -3.0), (2.0, 2.5)]:
        ends = [torch.full_like(uniforms, end) for end in (lower, upper)]
        draws = draw_logistic(uniforms, *ends)
        assert (draws >= lower).all()
        assert (draws <= upper).all()
        assert (draws.diff() > 0).all()
        low, high = stats.logistic.cdf([lower, upper])
        level = (stats.logistic.cdf(draws.numpy()) - low) / (high - low)
        np.testing.assert_allclose(level, uniforms, atol=1e-12)


def test_draws_keep_their_law_far_out():
    uniforms = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    for start in (40.0, 300.0, 5000.0):
        # Far out the logistic is an exponential law: 1 - u = exp(-distance), cut at a width.
        for width in (INF, 3.0, 1e-6):
            lower, upper = torch.full_like(uniforms, start), torch.full_like(uniforms, start + width)
            inside = -math.expm1(-width)
            expected = start - torch.log1p(-uniforms * inside)
            draws = draw_logistic(uniforms, lower, upper)
            torch.testing.assert_close(draws, expected, rtol=1e-13, atol=1e-11)
            mirrored = draw_logistic(1.0 - uniforms, -upper, -lower)
            torch.testing.assert_close(mirrored, -expected, rtol=1e-13, atol=1e-11)
    point = torch.full((3,), 17.0, dtype=torch.float64)
    assert draw_logistic(torch.tensor([0.0, 0.5, 1 - 2.0**-53]).double(), point, point).tolist() == [17.0] * 3


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53])
def test_the_last_levels_give_finite_counts(uniform):
    for location, scale, size_factor in LAWS:
        arguments = float64(uniform, size_factor, location, scale, 1.0, INF)
        counts, nats = draw_counts(*arguments)
        assert counts.isfinite().all()
        assert nats.isfinite().all()
        assert (counts >= 1).all()


@pytest.mark.parametrize(
    ("law", "fewest", "most"),
    [
        ((1.5, 0.2, 0.6), 1, INF),
        ((1.5, 0.2, 0.6), 2, 3),
        ((1.5, 0.2, 0.6), 4, INF),
        ((8.0, 0.3, 0.6), 1, 9),  # the centre lies at 1,800 molecules
        ((0.1, 0.02, 0.5), 50, INF),  # the centre lies at none
        ((0.1, 0.02, 0.5), 50, 52),
        ((3.0, 0.7, 0.2), 1, 30),
        ((2.0, 1e-3, 5.0), 1, INF),
        ((2.0, 1e-3, 5.0), 33, 40),
    ],
)
def test_counts_get_their_share_of_levels(law, fewest, most):
    """Levels in equal steps leave no chance: each count has its mass, to one level in 20,000."""
    location, scale, size_factor = law
    n_levels = 20_000
    levels = (torch.arange(n_levels, dtype=torch.float64) + 0.5) / n_levels
    arguments = [torch.full_like(levels, n) for n in (size_factor, location, scale, fewest, most)]
    counts, nats = draw_counts(levels, *arguments)
    assert (counts >= fewest).all()
    assert (counts <= most).all()
    assert (counts.diff() >= 0).all()
    first, last = int(counts.min()), int(counts.max())
    masses = np.exp(decimal_law(range(first, last + 1), size_factor, location, scale, fewest, most))
    share = np.bincount(counts.long().numpy())[first:] / n_levels
    np.testing.assert_allclose(share, masses, rtol=0, atol=1.5 / n_levels)
    np.testing.assert_allclose(nats.exp(), masses[counts.long().numpy() - first], rtol=1e-8)


def test_random_counts_follow_the_mass():
    generator = torch.Generator().manual_seed(0)
    n_draws = 100_000
    uniforms = torch.rand(n_draws, generator=generator, dtype=torch.float64)
    for location, scale, size_factor in [(1.5, 0.2, 0.6), (1.0, 0.6, 0.3), (4.0, 0.02, 0.5)]:
        arguments = [torch.full_like(uniforms, n) for n in (size_factor, location, scale, 1.0, INF)]
        counts = draw_counts(uniforms, *arguments)[0].clamp(max=60).long().numpy()
        masses = np.exp(decimal_law(range(1, 60), size_factor, location, scale))
        is_common = n_draws * masses >= 5
        drawn = np.bincount(counts, minlength=61)[1:60][is_common]
        observed = np.append(drawn, n_draws - drawn.sum())
        expected = n_draws * np.append(masses[is_common], 1 - masses[is_common].sum())
        assert stats.chisquare(observed, expected).pvalue > 0.001


def test_without_scale_the_count_next_to_the_centre_is_taken():
    factors, centre = 0.6, math.log1p(5.4)  # 3.24 molecules
    uniforms = torch.tensor([0.0, 0.3, 0.999], dtype=torch.float64)
    for fewest, most, expected in [(1.0, INF, 3.0), (4.0, 8.0, 4.0), (1.0, 2.0, 2.0)]:
        arguments = [torch.full_like(uniforms, n) for n in (factors, centre, 0.0, fewest, most)]
        counts, nats = draw_counts(uniforms, *arguments)
        assert counts.tolist() == [expected] * 3
        assert nats.tolist() == [0.0] * 3
    none = draw_counts(uniforms, *(torch.full_like(uniforms, n) for n in (factors, 0.0, 0.0, 1.0, INF)))
    assert none[0].tolist() == [1.0] * 3  # a detected gene has a molecule


def test_given_counts_are_taken_and_scored_between_the_ends():
    targets = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    uniforms = torch.full_like(targets, 0.5)
    arguments = [torch.full_like(targets, n) for n in (0.6, 1.5, 0.3, 2.0, 4.0)]
    counts, nats = draw_counts(uniforms, *arguments, targets=targets)
    assert torch.equal(counts, targets)
    assert nats[[0, 4]].tolist() == [-INF, -INF]
    assert nats.exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    whole = [torch.full_like(targets, n) for n in (0.6, 1.5, 0.3, 1.0, INF)]
    _, nats = draw_counts(uniforms, *whole, targets=targets)
    torch.testing.assert_close(nats, count_log_prob(targets, *whole[:3]), rtol=1e-12, atol=1e-13)


# Guidance.


def test_guidance_by_hand():
    law, null_law = float64([2.0], [0.5]), float64([1.0], [1.0])
    location, scale = guided_law(law, null_law, 2.0)
    # Precisions 2 / .25 = 8 and -1 / 1: 7 in all; (8 * 2 - 1 * 1) / 7
    assert (location.item(), scale.item()) == pytest.approx((15 / 7, 7**-0.5))
    one = guided_law(law, null_law, 1.0)
    assert (one[0].item(), one[1].item()) == pytest.approx((2.0, 0.5))
    null = guided_law(law, null_law, 0.0)
    assert (null[0].item(), null[1].item()) == pytest.approx((1.0, 1.0))


def test_guidance_of_equal_scales_is_linear_and_never_negative():
    generator = torch.Generator().manual_seed(0)
    here, there = 4 * torch.rand(2, 200, generator=generator, dtype=torch.float64)
    scale = 0.1 + torch.rand(200, generator=generator, dtype=torch.float64)
    for guidance in (0.0, 0.5, 1.0, 3.0):
        location, mixed = guided_law((here, scale), (there, scale), guidance)
        linear = there + guidance * (here - there)
        torch.testing.assert_close(location, linear.clamp(min=0.0))
        torch.testing.assert_close(mixed, scale)
    assert (location == 0.0).any()


def test_guidance_without_a_positive_precision_keeps_the_conditional_law():
    law, null_law = float64([2.0, 2.0], [1.0, 0.5]), float64([1.0, 1.0], [0.5, 1.0])
    location, scale = guided_law(law, null_law, 2.0)  # 2 / 1 - 1 / .25 = -2, and 7
    assert (location[0].item(), scale[0].item()) == (2.0, 1.0)
    assert location[1].item() == pytest.approx(15 / 7)
