"""How well predicted changes of expression match the measured ones: correlation, error, ranking, cells.

A change (delta) is a mean of log1p of normalised counts minus that of matched controls; with a pseudo-count
of one normalised molecule it is the log fold change, in nats.

Notable choices:
- Absolute profiles correlate above 0.96 whatever one predicts; everything here is computed on changes, always
  against the real controls.
- A prediction without any variation over the genes has no correlation. It gets -1, the worst value, and is
  counted as degenerate; leaving it out would reward a method for predicting nothing.
- Ties are broken by neither name nor order: they share the mid-rank (`perturbation_discrimination`) or the
  expected number of hits (`hit_rates`), so that no information gives exactly chance.
- Truth that cannot be scored (no gene responds) is left out of the two scores that need such genes, and
  counted.
- `pearson_delta_centroid` takes the mean change of the training perturbations away first: what all
  perturbations share earns nothing there. Its noise stands on both sides then, so a prediction that leaves it
  out, such as no change, may correlate without any skill.

Dimensions: P perturbations (or other conditions), G genes, n and m cells, D width.
Source: Vinas Torne et al. 2025 (Systema); cell-eval2, whose discrimination score is the same; scGPT and GEARS
for the scores on the 20 genes that respond most.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats
from scipy.spatial.distance import cdist

N_TOP_GENES = 20
N_HIGHEST_GENES = 1000
# Gaussian kernels of the maximum mean discrepancy, in median distances.
MMD_WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
# Variation over genes below this share of the largest change is rounding.
ROUNDING = 1e-6


def score_perturbations(
    predicted: np.ndarray,
    true: np.ndarray,
    *,
    de_scores: np.ndarray,
    is_de: np.ndarray,
    training_mean: np.ndarray | None = None,
    gene_weights: np.ndarray | None = None,
    is_target: np.ndarray | None = None,
) -> dict[str, float]:
    """Average all scores over the perturbations.

    Args:
        predicted: (P, G) predicted changes, log1p units.
        true: (P, G) measured changes against real controls.
        de_scores: (P, G) strength of the evidence that a gene responds, such as absolute t; its 20 largest
            name the genes of the ``_top20`` scores.
        is_de: (P, G) bool, genes that respond significantly in truth.
        training_mean: (G,) mean change of the training perturbations; default zero.
        gene_weights: (G,) weights of ``weighted_squared_error``, from training perturbations; default ones.
        is_target: (G,) bool, genes that some perturbation targets; left out of the discrimination score.

    Returns:
        The mean of each score of `perturbation_scores` over the perturbations that have it, and
        ``n_perturbations``, ``n_without_de`` (no ``de_auprc``, no ``lfc_spearman``), ``n_degenerate``
        (constant prediction).
    """
    scores = perturbation_scores(
        predicted,
        true,
        de_scores=de_scores,
        is_de=is_de,
        training_mean=training_mean,
        gene_weights=gene_weights,
        is_target=is_target,
    )
    return mean_scores(scores) | {
        "n_perturbations": len(true),
        "n_without_de": int((~np.asarray(is_de, dtype=bool).any(axis=1)).sum()),
        "n_degenerate": int(is_degenerate(predicted).sum()),
    }


def perturbation_scores(
    predicted: np.ndarray,
    true: np.ndarray,
    *,
    de_scores: np.ndarray,
    is_de: np.ndarray,
    training_mean: np.ndarray | None = None,
    gene_weights: np.ndarray | None = None,
    is_target: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Score each perturbation.

    Args:
        predicted: (P, G) predicted changes, log1p units.
        true: (P, G) measured changes against real controls.
        de_scores: (P, G) strength of the evidence that a gene responds.
        is_de: (P, G) bool, genes that respond significantly in truth.
        training_mean: (G,) mean change of the training perturbations; default zero.
        gene_weights: (G,) weights of ``weighted_squared_error``; default ones.
        is_target: (G,) bool, genes that some perturbation targets.

    Returns:
        Name -> (P,) values. ``pearson_delta``, ``pearson_delta_centroid`` (after subtracting
        ``training_mean``), both also over the 20 strongest genes of the truth (``_top20``), in [-1, 1], best
        1; ``mean_squared_error``, also ``_top20_error``, and ``weighted_squared_error``, best 0;
        ``weighted_r2``, the share of the weighted variance over the genes that is explained, best 1;
        ``de_auprc`` and ``lfc_spearman``, NaN where nothing responds; ``hit_rate_20``, ``de_precision_20``;
        ``discrimination`` when there are two perturbations or more, 0.5 without information, best 1.
    """
    from sklearn.metrics import r2_score

    predicted, true = _checked_pair(predicted, true)
    de_scores, is_de = np.asarray(de_scores, dtype=np.float64), np.asarray(is_de, dtype=bool)
    _check_shape("de_scores", de_scores, true.shape)
    _check_shape("is_de", is_de, true.shape)
    n_genes = true.shape[1]
    centre = np.zeros(n_genes) if training_mean is None else np.asarray(training_mean, dtype=np.float64)
    weights = np.ones(n_genes) if gene_weights is None else np.asarray(gene_weights, dtype=np.float64)
    _check_shape("training_mean", centre, (n_genes,))
    _check_shape("gene_weights", weights, (n_genes,))
    top = np.argsort(-de_scores, axis=1, kind="stable")[:, :N_TOP_GENES]  # (P, 20)
    top_pair = np.take_along_axis(predicted, top, 1), np.take_along_axis(true, top, 1)
    squared = (predicted - true) ** 2
    scores = {
        "pearson_delta": pearson_delta(predicted, true),
        "pearson_delta_centroid": pearson_delta(predicted, true, reference=centre),
        "pearson_delta_top20": pearson_delta(*top_pair),
        "pearson_delta_centroid_top20": pearson_delta(*top_pair, reference=centre[top]),
        "mean_squared_error": squared.mean(axis=1),
        "mean_squared_top20_error": np.take_along_axis(squared, top, 1).mean(axis=1),
        "weighted_squared_error": squared @ weights / weights.sum(),
        "weighted_r2": r2_score(true.T, predicted.T, sample_weight=weights, multioutput="raw_values"),
        "de_auprc": de_auprc(predicted, is_de),
        "lfc_spearman": lfc_spearman(predicted, true, is_de),
        "hit_rate_20": hit_rates(predicted, top_genes(np.abs(true))),
        "de_precision_20": hit_rates(predicted, is_de),
    }
    if len(true) > 1:
        scores["discrimination"] = perturbation_discrimination(predicted, true, is_target=is_target)
    return scores


def mean_scores(scores: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Average scores over the perturbations that have them.

    Args:
        scores: Name -> (P,) values, NaN where a perturbation cannot have the score.

    Returns:
        Name -> mean; NaN where no perturbation has it. Where `unbiased_squares` are among the scores, also
        their ratio ``normalised_squared_error``, NaN where the perturbations have no effect above noise.
    """
    means = {}
    for name, values in scores.items():
        known = values[~np.isnan(values)]
        means[name] = float(known.mean()) if len(known) else float("nan")
    if "unbiased_squared_effect" in means:
        effect, error = means["unbiased_squared_effect"], means["unbiased_squared_error"]
        means["normalised_squared_error"] = error / effect if effect > 0 else float("nan")
    return means


def is_degenerate(predicted: np.ndarray) -> np.ndarray:
    """Find predictions that do not vary over the genes, which have no correlation.

    Args:
        predicted: (P, G) predicted changes.

    Returns:
        (P,) bool.
    """
    return _is_constant(np.asarray(predicted, dtype=np.float64))


def pearson_delta(
    predicted: np.ndarray, true: np.ndarray, *, reference: np.ndarray | None = None
) -> np.ndarray:
    """Correlate predicted and measured changes over the genes, one perturbation at a time.

    Args:
        predicted: (P, G) predicted changes.
        true: (P, G) measured changes.
        reference: (G,) or (P, G) change that is subtracted from both; default none.

    Returns:
        (P,) Pearson correlations, best 1; -1 where either side does not vary.
    """
    predicted, true = _checked_pair(predicted, true)
    centre = 0.0 if reference is None else np.asarray(reference, dtype=np.float64)
    is_lost = _is_constant(predicted, centre) | _is_constant(true, centre)
    left, right = predicted - centre, true - centre
    left, right = left - left.mean(axis=1, keepdims=True), right - right.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    correlations = (left * right).sum(axis=1) / np.where(norms > 0, norms, 1.0)
    return np.where(is_lost | (norms == 0), -1.0, np.clip(correlations, -1.0, 1.0))


def expression_scores(
    predicted: np.ndarray, true: np.ndarray, *, control_expression: np.ndarray
) -> dict[str, np.ndarray]:
    """Score whole profiles, not changes: what earlier work reports, and what no change already does well.

    Args:
        predicted: (P, G) predicted changes.
        true: (P, G) measured changes.
        control_expression: (G,) mean of the controls, log1p units.

    Returns:
        ``pearson_expression`` (P,), of control plus change over all genes; ``l2_distance_top1000`` (P,),
        Euclidean distance over the 1,000 genes that are highest in controls, all of them where there are
        fewer.
    """
    predicted, true = _checked_pair(predicted, true)
    control = np.asarray(control_expression, dtype=np.float64)
    _check_shape("control_expression", control, true.shape[1:])
    highest = np.argsort(-control, kind="stable")[:N_HIGHEST_GENES]
    return {
        "pearson_expression": pearson_delta(predicted + control, true + control),
        "l2_distance_top1000": np.linalg.norm((predicted - true)[:, highest], axis=1),
    }


def lfc_spearman(predicted: np.ndarray, true: np.ndarray, is_de: np.ndarray) -> np.ndarray:
    """Correlate the ranks of the changes over the genes that respond significantly.

    Args:
        predicted: (P, G) predicted changes.
        true: (P, G) measured changes.
        is_de: (P, G) bool.

    Returns:
        (P,) Spearman correlations, best 1; -1 for a prediction that does not vary over these genes; NaN where
        fewer than two genes respond.
    """
    predicted, true = _checked_pair(predicted, true)
    values = np.full(len(true), np.nan)
    for row, chosen in enumerate(np.asarray(is_de, dtype=bool)):
        if chosen.sum() < 2:
            continue
        is_flat = _is_constant(predicted[row : row + 1, chosen])[0] or np.ptp(true[row, chosen]) == 0
        values[row] = -1.0 if is_flat else stats.spearmanr(predicted[row, chosen], true[row, chosen])[0]
    return values


def de_auprc(predicted: np.ndarray, is_de: np.ndarray) -> np.ndarray:
    """Measure how well the size of the predicted change finds the genes that respond.

    Args:
        predicted: (P, G) predicted changes; the score of a gene is the absolute value.
        is_de: (P, G) bool, the genes to be found.

    Returns:
        (P,) average precision, best 1; a constant prediction gets the share of responding genes; NaN where
        none responds.
    """
    from sklearn.metrics import average_precision_score

    is_de = np.asarray(is_de, dtype=bool)
    sizes = np.abs(np.asarray(predicted, dtype=np.float64))
    _check_shape("is_de", is_de, sizes.shape)
    return np.array(
        [
            average_precision_score(found, size) if found.any() else np.nan
            for found, size in zip(is_de, sizes, strict=True)
        ]
    )


def top_genes(sizes: np.ndarray, *, n_genes: int = N_TOP_GENES) -> np.ndarray:
    """Mark the genes with the largest values, ties to the earlier gene.

    Args:
        sizes: (P, G) what to rank by.
        n_genes: Genes marked; all of them where there are fewer.

    Returns:
        (P, G) bool.
    """
    chosen = np.argsort(-np.asarray(sizes), axis=1, kind="stable")[:, :n_genes]
    is_top = np.zeros(np.shape(sizes), dtype=bool)
    np.put_along_axis(is_top, chosen, values=True, axis=1)
    return is_top


def hit_rates(predicted: np.ndarray, is_wanted: np.ndarray, *, n_genes: int = N_TOP_GENES) -> np.ndarray:
    """Count how many of the genes predicted to change most are wanted.

    Args:
        predicted: (P, G) predicted changes, ranked by absolute value.
        is_wanted: (P, G) bool.
        n_genes: Genes taken, the k of hit rate at k; all where there are fewer.

    Returns:
        (P,) share in [0, 1]; tied genes at the limit count by their expectation, so that a constant
        prediction gets the share of wanted genes.
    """
    sizes, is_wanted = np.abs(np.asarray(predicted, dtype=np.float64)), np.asarray(is_wanted, dtype=bool)
    _check_shape("is_wanted", is_wanted, sizes.shape)
    n_genes = min(n_genes, sizes.shape[1])
    limit = -np.sort(-sizes, axis=1)[:, n_genes - 1 : n_genes]  # (P, 1)
    is_above, is_tied = sizes > limit, sizes == limit
    share = (n_genes - is_above.sum(axis=1)) / is_tied.sum(axis=1)
    return ((is_above & is_wanted).sum(axis=1) + share * (is_tied & is_wanted).sum(axis=1)) / n_genes


def perturbation_discrimination(
    predicted: np.ndarray, true: np.ndarray, *, is_target: np.ndarray | None = None
) -> np.ndarray:
    """Ask whether a predicted change is nearer to its own true change than to those of the others.

    Cosine distance; all targeted genes are left out for all perturbations, so that knowing the targets is
    worth nothing.

    Args:
        predicted: (P, G) predicted changes.
        true: (P, G) measured changes.
        is_target: (G,) bool, genes that some perturbation targets.

    Returns:
        (P,) 1 - k / (P - 1), k the mid-rank of the own effect; best 1, exactly 0.5 without information.

    Raises:
        ValueError: If there are fewer than two perturbations or no gene is left.
    """
    predicted, true = _checked_pair(predicted, true)
    if len(true) < 2:
        msg = f"The discrimination score needs at least two perturbations to tell apart, got {len(true)}."
        raise ValueError(msg)
    if is_target is not None:
        is_target = np.asarray(is_target, dtype=bool)
        _check_shape("is_target", is_target, (true.shape[1],))
        if is_target.all():
            msg = f"All {true.shape[1]} genes are targets, none is left to compare. Give a wider panel."
            raise ValueError(msg)
        predicted, true = predicted[:, ~is_target], true[:, ~is_target]
    # Zero has no direction: similarity 0 to everything, as in cell-eval2.
    norms = np.outer(np.linalg.norm(predicted, axis=1), np.linalg.norm(true, axis=1))
    distances = 1.0 - predicted @ true.T / np.where(norms > 0, norms, np.inf)
    own = np.diagonal(distances)[:, None]
    # Equal predictions have to tie whatever the order of a sum.
    is_tied = np.isclose(distances, own, rtol=0.0, atol=1e-12)
    n_nearer = ((distances < own) & ~is_tied).sum(axis=1)
    return 1.0 - (n_nearer + (is_tied.sum(axis=1) - 1) / 2) / (len(true) - 1)


def energy_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Compare two clouds of cells by the energy distance, without the bias of comparing a cell with itself.

    Args:
        first: (n, D) cells, for example principal components; n at least 2.
        second: (m, D) cells.

    Returns:
        2 E|x - y| - E|x - x'| - E|y - y'|, Euclidean; expectation 0 for equal distributions, so slightly
        negative values occur.
    """
    first, second = _checked_clouds(first, second)
    within = sum(cdist(cells, cells).sum() / (len(cells) * (len(cells) - 1)) for cells in (first, second))
    return float(2.0 * cdist(first, second).mean() - within)


def maximum_mean_discrepancy(first: np.ndarray, second: np.ndarray) -> float:
    """Compare two clouds of cells by the squared maximum mean discrepancy, unbiased.

    The kernel is the mean of five Gaussians whose widths are 1/4, 1/2, 1, 2 and 4 times the median distance
    between different cells of ``second``; give the real cells there, so that all methods are measured alike.

    Args:
        first: (n, D) predicted cells, n at least 2.
        second: (m, D) real cells, not all of them equal.

    Returns:
        E k(x, x') + E k(y, y') - 2 E k(x, y); expectation 0 for equal distributions, so slightly negative
        values occur, and at most 2.

    Raises:
        ValueError: If all cells of ``second`` are one and the same point.
    """
    first, second = _checked_clouds(first, second)
    real = cdist(second, second)
    if not real.any():
        msg = "All cells of the second cloud are the same point: their distances give the kernel no width."
        raise ValueError(msg)
    width = float(np.median(real[real > 0]))

    def kernel(distances: np.ndarray) -> np.ndarray:
        return np.mean([np.exp(-0.5 * (distances / (scale * width)) ** 2) for scale in MMD_WIDTHS], axis=0)

    within = 0.0
    for distances in (cdist(first, first), real):
        n_cells = len(distances)
        within += (kernel(distances).sum() - n_cells) / (n_cells * (n_cells - 1))  # not a cell with itself
    return float(within - 2.0 * kernel(cdist(first, second)).mean())


def wasserstein_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Compare two clouds of cells by the cost of moving one onto the other (exact, by POT).

    Args:
        first: (n, D) cells.
        second: (m, D) cells.

    Returns:
        1-Wasserstein distance with Euclidean cost, best 0; two finite samples of one distribution stay above.

    Raises:
        ImportError: If POT is not installed.
    """
    try:
        import ot
    except ImportError as error:
        msg = 'Optimal transport needs POT: pip install "scdiva[eval]".'
        raise ImportError(msg) from error
    first, second = _checked_clouds(first, second)
    return float(ot.emd2(ot.unif(len(first)), ot.unif(len(second)), cdist(first, second)))


def _is_constant(changes: np.ndarray, centre: Any = 0.0) -> np.ndarray:
    """(P,) bool: what is left of changes (P, G) after the centre varies over the genes by rounding only."""
    scale = np.maximum(np.abs(changes).max(axis=1), np.abs(centre).max(axis=-1) if np.ndim(centre) else 0.0)
    return np.ptp(changes - centre, axis=1) <= ROUNDING * scale


def _checked_pair(predicted: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    predicted, true = np.asarray(predicted, dtype=np.float64), np.asarray(true, dtype=np.float64)
    if true.ndim != 2 or 0 in true.shape or predicted.shape != true.shape:
        msg = (
            f"predicted and true must be (perturbations, genes) alike, got {predicted.shape} and "
            f"{true.shape}. Bring both to the same perturbations and genes in the same order."
        )
        raise ValueError(msg)
    for name, changes in (("predicted", predicted), ("true", true)):
        n_broken = int((~np.isfinite(changes)).sum())
        if n_broken:
            msg = (
                f"{n_broken} of {changes.size} {name} changes are not finite. Unmeasured genes have no "
                "change: leave them out for all perturbations."
            )
            raise ValueError(msg)
    return predicted, true


def _checked_clouds(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if min(len(first), len(second)) < 2 or first.ndim != 2 or first.shape[1:] != second.shape[1:]:
        msg = f"Two (cells, width) arrays of two cells or more are needed, got {first.shape}, {second.shape}."
        raise ValueError(msg)
    return first, second


def _check_shape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        msg = f"{name} must have the shape {shape}, got {array.shape}."
        raise ValueError(msg)
