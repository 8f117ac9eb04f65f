"""Which genes respond significantly, and whether a prediction calls the same ones, with sign and size.

A prediction of a mean has no cells to test. `FoldData.predicted_p_values` says with what spread and how many
cells it is taken to have been measured; the test of moments and the scores are here.

Notable choices:
- The genes that a perturbation targets are left out for it: a knocked-down gene that falls is the experiment,
  not a prediction.
- A gene whose measured change is exactly zero has no direction and is not judged.
- The noise of the truth is known from its cells and taken away from squared errors; that of the prediction is
  not.

Dimensions: P perturbations, G genes.
Source: cell-eval2 (Virtual Cell Challenge 2026), whose scores of the same name are equal; the genes here are
those of the panel, there those above 5 counts per million in controls.
"""

import numpy as np
from scipy import stats

FDR_LIMIT = 0.05
# Share of right signs down to which a ranking of genes counts in `direction_reach`.
PURITY = 0.9
# Fewer responding genes make no ratio of fold changes.
MIN_RESPONDING = 10


def welch_test(perturbed: np.ndarray, control: np.ndarray) -> dict[str, np.ndarray]:
    """Test each gene for a change of its mean, with Welch's t and false discovery rates.

    Args:
        perturbed: (n, G) log1p values of perturbed cells, n at least 2.
        control: (m, G) the same of controls.

    Returns:
        As `welch_test_of_moments`.

    Raises:
        ValueError: If a group has fewer than two cells.
    """
    if min(len(perturbed), len(control)) < 2:
        msg = f"A test needs two cells in each group, got {len(perturbed)} and {len(control)}."
        raise ValueError(msg)
    means = [cells.mean(axis=0, dtype=np.float64) for cells in (perturbed, control)]
    spreads = [cells.std(axis=0, ddof=1, dtype=np.float64) for cells in (perturbed, control)]
    return welch_test_of_moments(
        means[0] - means[1], spreads=(spreads[0], spreads[1]), n_cells=(len(perturbed), len(control))
    )


def welch_test_of_moments(
    change: np.ndarray, *, spreads: tuple[np.ndarray, np.ndarray], n_cells: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Test each gene for a change of which only the size and the spread of the cells are known.

    Args:
        change: (G,) difference of the means.
        spreads: Standard deviations (G,) of perturbed cells and of controls.
        n_cells: Number of perturbed cells and of controls.

    Returns:
        ``t`` (G,), 0 for genes that vary in neither group; ``p_values`` and ``fdr`` (G,), 1 there; FDR by
        Benjamini and Hochberg over the genes. ``standard_errors`` (G,) of the change.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        t, p_values = stats.ttest_ind_from_stats(
            change, spreads[0], n_cells[0], np.zeros_like(change), spreads[1], n_cells[1], equal_var=False
        )
    is_untested = ~np.isfinite(t)
    t, p_values = np.where(is_untested, 0.0, t), np.where(is_untested, 1.0, p_values)
    errors = np.sqrt(spreads[0] ** 2 / n_cells[0] + spreads[1] ** 2 / n_cells[1])
    fdr = stats.false_discovery_control(p_values)
    return {"t": t, "p_values": p_values, "fdr": fdr, "standard_errors": errors}


def de_call_scores(
    predicted: np.ndarray,
    true: np.ndarray,
    *,
    predicted_p: np.ndarray,
    is_de: np.ndarray,
    is_own_target: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Compare the genes that are predicted to respond significantly with those that do.

    Args:
        predicted: (P, G) predicted changes, log1p units.
        true: (P, G) measured changes.
        predicted_p: (P, G) p-values of the predicted changes; false discovery rates by Benjamini and Hochberg
            over the genes.
        is_de: (P, G) bool, genes that respond significantly in truth.
        is_own_target: (P, G) bool, genes that the perturbation itself targets; default none.

    Returns:
        Name -> (P,) values: ``significance_jaccard``, shared over all significant genes, 1 where neither side
        has any; ``direction_fidelity``, significant predictions of the right sign over the larger of both
        numbers of significant genes; ``direction_reach``, the share of the responding genes, in the order of
        the prediction's evidence, down to which nine of ten signs are right; ``de_overlap``, responding genes
        among as many predicted ones of the largest change, significant ones alone; ``lfc_nmae``, mean
        absolute error over mean absolute change of the responding genes, 1 for no change and best 0. NaN
        where nothing responds, for ``lfc_nmae`` where fewer than ten genes do.

    Raises:
        ValueError: If a shape differs or a p-value is none.
    """
    predicted, true = np.asarray(predicted, dtype=np.float64), np.asarray(true, dtype=np.float64)
    predicted_p, is_de = np.asarray(predicted_p, dtype=np.float64), np.asarray(is_de, dtype=bool)
    own = np.zeros_like(is_de) if is_own_target is None else np.asarray(is_own_target, dtype=bool)
    given = {"predicted": predicted, "predicted_p": predicted_p, "is_de": is_de, "is_own_target": own}
    for name, array in given.items():
        if array.shape != true.shape:
            msg = f"{name} must have the shape {true.shape} of true, got {array.shape}."
            raise ValueError(msg)
    if not ((predicted_p >= 0) & (predicted_p <= 1)).all():
        msg = "predicted_p must lie between 0 and 1; give a gene that cannot be tested the p-value 1."
        raise ValueError(msg)
    is_called = stats.false_discovery_control(predicted_p, axis=1) < FDR_LIMIT
    rows = [
        _row_scores(*(part[row, ~own[row]] for part in (predicted, true, predicted_p, is_called, is_de)))
        for row in range(len(true))
    ]
    return {name: np.array([scores[name] for scores in rows]) for name in rows[0]}


def _row_scores(
    predicted: np.ndarray, true: np.ndarray, p_values: np.ndarray, is_called: np.ndarray, is_de: np.ndarray
) -> dict[str, float]:
    """Score one perturbation over (G,) genes."""
    n_de, n_either = int(is_de.sum()), int((is_called | is_de).sum())
    is_right = (np.sign(predicted) == np.sign(true)) & (predicted != 0)
    is_judged = is_called & (true != 0)
    n_most = max(int(is_judged.sum()), n_de)
    # Called genes first, as their false discovery rates are the smallest; then evidence, then size.
    order = np.lexsort((-np.abs(predicted), p_values))
    in_order = is_right[order][is_de[order] & (true[order] != 0)]
    depths = np.arange(1, len(in_order) + 1)
    pure = depths[np.cumsum(in_order) >= PURITY * depths - 1e-9]
    largest = np.argsort(np.where(is_called, -np.abs(predicted), np.inf), kind="stable")[:n_de]
    effect = np.abs(true[is_de]).mean() if n_de >= MIN_RESPONDING else np.nan
    missing = float("nan")
    return {
        "significance_jaccard": float((is_called & is_de).sum() / n_either) if n_either else 1.0,
        "direction_fidelity": float((is_judged & is_right).sum() / n_most) if n_most else missing,
        "direction_reach": float(pure.max(initial=0) / n_de) if n_de else missing,
        "de_overlap": float((is_de & is_called)[largest].sum() / n_de) if n_de else missing,
        "lfc_nmae": float(np.abs(predicted - true)[is_de].mean() / effect) if effect > 0 else missing,
    }


def unbiased_squares(
    predicted: np.ndarray, true: np.ndarray, *, standard_errors: np.ndarray
) -> dict[str, np.ndarray]:
    """Squared error and squared effect without what the noise of the measurement adds.

    Their ratio, over the sums of many perturbations, is 0 for a perfect prediction and 1 for no change; the
    ratio of one perturbation that hardly responds says nothing.

    Args:
        predicted: (P, G) predicted changes.
        true: (P, G) measured changes.
        standard_errors: (P, G) of the measured changes.

    Returns:
        ``unbiased_squared_error`` and ``unbiased_squared_effect`` (P,), means over the genes; either may be
        below zero by chance.
    """
    noise = np.square(np.asarray(standard_errors, dtype=np.float64))
    return {
        "unbiased_squared_error": (np.square(np.subtract(predicted, true)) - noise).mean(axis=1),
        "unbiased_squared_effect": (np.square(np.asarray(true, dtype=np.float64)) - noise).mean(axis=1),
    }


def dynamic_range(replicate: float, baseline: float, *, perfect: float) -> float:
    """Say whether a score can tell good from bad on a data set.

    Args:
        replicate: Score of the same experiment done again.
        baseline: Score of a prediction that knows nothing of the perturbation.
        perfect: Best value of the score.

    Returns:
        (replicate - baseline) / (perfect - baseline), cut to [-1, 1]; near 0, or below, the score cannot. NaN
        where the baseline is perfect.

    Source: CellSimBench, dynamic range fraction.
    """
    span = perfect - baseline
    return float(np.clip((replicate - baseline) / span, -1.0, 1.0)) if span else float("nan")
