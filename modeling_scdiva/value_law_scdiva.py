"""The law of an expression value: a logistic on the log1p scale, as a probability mass on whole counts.

Expression values of counted molecules lie on a lattice: with c molecules of a gene in a cell of N molecules
the value is y(c) = log1p(c / f), where f = N / target_sum is the cell's size factor. A density there can grow
without bound and means nothing; a probability mass cannot. So the logistic law of location m and scale s is
integrated from c - 1/2 to c + 1/2 molecules and conditioned on c >= 1, because tokens are detected genes:

    P(c) = [F(y(c + 1/2)) - F(y(c - 1/2))] / [1 - F(y(1/2))],   F(y) = sigmoid((y - m) / s)

Notable choices:
- Differences of sigmoids are taken as log F(b) + log(1 - F(a)) + log(1 - exp(a - b)), exact in both tails;
  the width of a lattice step is log1p(1 / (f + c - 1/2)), no difference of two large numbers.
- A network trained with a squared error has no scale of its own. Its error is a Gaussian likelihood with
  variance 1 / (2 * weight); it is read here as the logistic of that variance, so that there is one law.

Dimensions: n positions of a loader batch.
Source: METHOD.md sections 4 and 6.
"""

import math

import torch
from torch import nn

# More molecules than any cell holds.
MOST_MOLECULES = 1e12


def fixed_scale(expression_loss_weight: float) -> float:
    """Give the logistic scale that a squared error of some weight stands for.

    Args:
        expression_loss_weight: Weight of the squared error beside the nats of the genes, > 0.

    Returns:
        Scale in log1p units: the logistic's variance, (pi * scale)^2 / 3, is 1 / (2 * weight).

    Raises:
        ValueError: If the weight is not positive.
    """
    if not expression_loss_weight > 0:
        msg = (
            f"expression_loss_weight is {expression_loss_weight}: values of this network have no law. Train "
            "with a positive weight."
        )
        raise ValueError(msg)
    return math.sqrt(3.0 / (2.0 * expression_loss_weight)) / math.pi


def counts_from_values(values: torch.Tensor, size_factors: torch.Tensor) -> torch.Tensor:
    """Go back from expression values to the counts they were made of.

    Args:
        values: (...) log1p of counts / size factor.
        size_factors: Broadcastable to it, molecules of the cell / target_sum.

    Returns:
        (...) float64 whole counts.
    """
    return (values.double().expm1() * size_factors.double()).round()


def values_from_counts(counts: torch.Tensor, size_factors: torch.Tensor) -> torch.Tensor:
    """Turn counts into expression values.

    Args:
        counts: (...) counts.
        size_factors: Broadcastable to it, molecules of the cell / target_sum.

    Returns:
        (...) float64 log1p of counts / size factor.
    """
    return (counts.double() / size_factors.double()).log1p()


def log_interval(lower: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
    """Give the log-probability of an interval under the standard logistic law, exact in both tails.

    Args:
        lower: (...) lower ends, may be -inf.
        upper: (...) upper ends, above the lower ones, may be inf.

    Returns:
        (...) log of sigmoid(upper) - sigmoid(lower).
    """
    return _log_interval(lower, upper, upper - lower)


def _log_interval(lower: torch.Tensor, upper: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
    """The same where the width is known better than the difference of the ends."""
    return nn.functional.logsigmoid(upper) + nn.functional.logsigmoid(-lower) + (-torch.expm1(-width)).log()


def count_log_prob(
    counts: torch.Tensor, size_factors: torch.Tensor, location: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Compute the log-probability of counts of detected genes.

    Args:
        counts: (n,) whole counts, at least 1.
        size_factors: (n,) molecules of the cell / target_sum.
        location: (n,) centre of the law, log1p units.
        scale: (n,) scale of the law, log1p units, > 0.

    Returns:
        (n,) nats, never positive, same type as ``location``; exp of it sums to 1 over counts 1, 2, 3, ...
    """
    counts, size_factors = counts.to(location.dtype), size_factors.to(location.dtype)
    lower = (((counts - 0.5) / size_factors).log1p() - location) / scale
    width = (1.0 / (size_factors + counts - 0.5)).log1p() / scale
    first = ((0.5 / size_factors).log1p() - location) / scale
    return _log_interval(lower, lower + width, width) - nn.functional.logsigmoid(-first)


def draw_logistic(uniforms: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
    """Draw from the standard logistic law between two ends by inverting its distribution function.

    The tail that lies nearer is inverted, in logarithms, so that an interval far out keeps its law.

    Args:
        uniforms: (n,) float64 draws from [0, 1).
        lower: (n,) float64 lower ends, may be -inf.
        upper: (n,) float64 upper ends, not below the lower ones, may be inf.

    Returns:
        (n,) float64 draws in [lower, upper].
    """
    is_left = lower + upper < 0  # False where both are infinite
    near, far = torch.where(is_left, -upper, lower), torch.where(is_left, -lower, upper)
    uniforms = torch.where(is_left, 1.0 - uniforms, uniforms)
    log_near, log_far = nn.functional.logsigmoid(-near), nn.functional.logsigmoid(-far)  # of what lies beyond
    log_beyond = log_near + torch.log1p(uniforms * torch.expm1(log_far - log_near))
    draws = (-torch.expm1(log_beyond)).log() - log_beyond
    draws = torch.where(is_left, -draws, draws)
    return torch.minimum(torch.maximum(draws, lower), upper)


def draw_counts(
    uniforms: torch.Tensor,
    size_factors: torch.Tensor,
    location: torch.Tensor,
    scale: torch.Tensor,
    fewest: torch.Tensor,
    most: torch.Tensor,
    *,
    targets: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw counts of detected genes between two counts.

    Args:
        uniforms: (n,) float64 draws from [0, 1).
        size_factors: (n,) molecules of the cell / target_sum.
        location: (n,) centre of the law, log1p units.
        scale: (n,) scale of the law; 0 takes the count next to the location.
        fewest: (n,) smallest count allowed, at least 1.
        most: (n,) largest count allowed, not below ``fewest``, may be inf.
        targets: (n,) counts to take instead of drawing, for the likelihood of a given cell.

    Returns:
        (n,) float64 counts, and (n,) float64 their log-probabilities under the law between the two counts;
        0 where the scale is.
    """
    size_factors, location, scale = size_factors.double(), location.double(), scale.double()
    is_drawn = scale > 0
    safe_scale = torch.where(is_drawn, scale, 1.0)
    most = most.clamp(max=MOST_MOLECULES)  # an infinite end has no gradient
    lower = (((fewest - 0.5) / size_factors).log1p() - location) / safe_scale
    upper = (((most + 0.5) / size_factors).log1p() - location) / safe_scale
    counts = targets
    if counts is None:
        draws = torch.where(is_drawn, draw_logistic(uniforms, lower, upper), 0.0)
        counts = ((location + draws * scale).expm1() * size_factors).round()
        counts = torch.minimum(torch.maximum(counts, fewest), most)
    log_probs = count_log_prob(counts, size_factors, location, safe_scale)
    # `count_log_prob` is conditioned on c >= 1; condition on the two ends instead.
    first = ((0.5 / size_factors).log1p() - location) / safe_scale
    log_probs = log_probs + nn.functional.logsigmoid(-first) - log_interval(lower, upper)
    log_probs = log_probs.masked_fill((counts < fewest) | (counts > most), -torch.inf)
    return counts, torch.where(is_drawn, log_probs, 0.0)


def guided_law(
    law: tuple[torch.Tensor, torch.Tensor], null_law: tuple[torch.Tensor, torch.Tensor], guidance_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Combine a conditional and an unconditional law of values as classifier-free guidance combines genes.

    Densities are multiplied with the powers g and 1 - g. For laws of one shape that is the precision-weighted
    mean of their centres; where the combined precision would not be positive, the conditional law stands.

    Args:
        law: (n,) location and (n,) scale with the condition.
        null_law: (n,) location and (n,) scale without it.
        guidance_scale: g; 1 is the conditional law, 0 the unconditional one.

    Returns:
        (n,) location, not negative, and (n,) scale.
    """
    (location, scale), (null_location, null_scale) = law, null_law
    weight, null_weight = guidance_scale / scale.square(), (1.0 - guidance_scale) / null_scale.square()
    precision = weight + null_weight
    is_law = precision > 0
    safe = torch.where(is_law, precision, 1.0)
    mixed = (weight * location + null_weight * null_location) / safe
    return (
        torch.where(is_law, mixed, location).clamp(min=0.0),
        torch.where(is_law, safe.rsqrt(), scale),
    )


__all__ = [
    "count_log_prob",
    "counts_from_values",
    "draw_counts",
    "draw_logistic",
    "fixed_scale",
    "guided_law",
    "log_interval",
    "values_from_counts",
]
