"""How far a number would move with other units: bootstrap intervals, and paired differences of two methods.

Notable choices:
- The unit is the caller's, one entry of ``values``: a perturbation, a donor, a transcription factor, a seed;
  not a cell where the claim is about new donors.
- Two methods on the same units are compared pair by pair, which removes what the units have in common.
- Bias-corrected and accelerated intervals below 30 units, plain percentiles from there on.
- `scipy.stats.bootstrap` does the resampling.

Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 13 and 14.
"""

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats

MIN_UNITS_FOR_PERCENTILE = 30
# With fewer groups than these an interval over groups means little.
MIN_GROUPS_FOR_INTERVAL = 5
Statistic = Callable[..., Any]


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    *,
    statistic: Statistic = np.mean,
    n_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Bound a statistic of the units by resampling them with replacement.

    Args:
        values: (n,) one finite number per unit, n at least 2.
        statistic: (n,) numbers to one number; one with an argument ``axis`` is called once for all resamples.
        n_resamples: Resamples drawn.
        level: Share of the intervals that are to hold the true value, in (0, 1).
        seed: Equal seed, equal interval.

    Returns:
        Lower and upper bound; equal where all units are equal.
    """
    numbers = _checked(values, "values")
    _check_settings(n_resamples, level)
    return _interval((numbers,), statistic, n_resamples=n_resamples, level=level, seed=seed)


def paired_bootstrap_difference(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    *,
    statistic: Statistic = np.mean,
    n_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, float]:
    """Compare two methods on the same units.

    Args:
        first: (n,) one finite number per unit, such as a score of the model per perturbation.
        second: (n,) the same for the other method, in the same order.
        statistic: (n,) numbers to one number.
        n_resamples: Resamples drawn; both methods get the same units in each.
        level: Share of the intervals that are to hold the true difference, in (0, 1).
        seed: Equal seed, equal interval.

    Returns:
        ``difference``, statistic of the first minus that of the second, ``difference_low`` and
        ``difference_high``, its interval, and ``n_units``.

    Raises:
        ValueError: If the lists differ in length or are not two or more finite numbers, or a setting is
            impossible.
    """
    left, right = _checked(first, "first"), _checked(second, "second")
    if len(left) != len(right):
        msg = (
            f"first has {len(left)} units and second {len(right)}; a paired comparison needs the same units "
            "in the same order."
        )
        raise ValueError(msg)
    _check_settings(n_resamples, level)
    takes_axis = "axis" in inspect.signature(statistic).parameters

    def difference(one: np.ndarray, other: np.ndarray, axis: int = -1) -> Any:
        arguments = {"axis": axis} if takes_axis else {}
        return statistic(one, **arguments) - statistic(other, **arguments)

    low, high = _interval(
        (left, right),
        difference,
        n_resamples=n_resamples,
        level=level,
        seed=seed,
        vectorized=takes_axis,
    )
    return {
        "difference": float(difference(left, right)),
        "difference_low": low,
        "difference_high": high,
        "n_units": len(left),
    }


def ratio_of_sums(totals: np.ndarray, counts: np.ndarray) -> Statistic:
    """Make a statistic for units that weigh differently: sum of totals over sum of counts.

    Args:
        totals: (n,) what a unit adds up to, such as the absolute errors of a cell.
        counts: (n,) how much went into it, such as its entries; positive.

    Returns:
        Function of places in the two, for `bootstrap_interval(np.arange(n), statistic=...)`.
    """

    def ratio(places: np.ndarray, axis: int = -1) -> Any:
        chosen = places.astype(np.int64)
        return totals[chosen].sum(axis=axis) / counts[chosen].sum(axis=axis)

    return ratio


def _checked(values: Sequence[float] | np.ndarray, name: str) -> np.ndarray:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or len(numbers) < 2:
        msg = f"{name} must hold one number for each of at least 2 units, got shape {numbers.shape}."
        raise ValueError(msg)
    if not np.isfinite(numbers).all():
        msg = (
            f"{int((~np.isfinite(numbers)).sum())} of {len(numbers)} {name} are not finite. Give a "
            "degenerate unit the worst value, or leave it out for every method and report it."
        )
        raise ValueError(msg)
    return numbers


def _check_settings(n_resamples: int, level: float) -> None:
    if n_resamples < 1:
        msg = f"n_resamples must be at least 1, got {n_resamples}."
        raise ValueError(msg)
    if not 0.0 < level < 1.0:
        msg = f"level must lie between 0 and 1, got {level}; 0.95 asks for 95 % intervals."
        raise ValueError(msg)


def _interval(
    samples: tuple[np.ndarray, ...],
    statistic: Statistic,
    *,
    n_resamples: int,
    level: float,
    seed: int,
    vectorized: bool | None = None,
) -> tuple[float, float]:
    if all(np.ptp(numbers) == 0 for numbers in samples):
        constant = float(statistic(*samples))
        return constant, constant
    is_small = len(samples[0]) < MIN_UNITS_FOR_PERCENTILE
    for method in ("BCa", "percentile") if is_small else ("percentile",):
        with warnings.catch_warnings(), np.errstate(invalid="ignore"):
            # Undefined where all resamples, or all but one unit, agree: percentiles then.
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)
            found = stats.bootstrap(
                samples,
                statistic,
                paired=True,
                vectorized=vectorized,
                n_resamples=n_resamples,
                confidence_level=level,
                method=method,
                rng=np.random.default_rng(seed),
            ).confidence_interval
        if np.isfinite(found).all():
            break
    return float(found.low), float(found.high)
