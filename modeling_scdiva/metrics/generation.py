"""How close generated cells are to held-out real cells: clouds, genes, depth, co-expression, discriminators.

No score is 0 or 0.5 exactly for two finite draws of one law. Score real training cells against the held-out
cells, too: that is the floor, and `generation_baselines` shows what is easy.

Notable choices:
- Three sets of cells: the reference (real, training) fixes the principal components, the variable and the
  rare genes; the held-out cells (real) are what generated cells are compared with. Generated cells fix
  nothing, so that all methods are measured alike.
- Clouds are compared with equally many cells on both sides, at most 3,000 (40 seconds, 1.6 GB): memory grows
  with the square, and chance is one half only then. Scores of genes and depth take all cells.
- Generated cells without any variation are scored, badly; real cells without variation are refused.
- The principal components are those of all genes; generated cells are centred with the reference means.
- Distances and the classifiers on components do not see what lies outside the components, such as noise in
  rare genes; the forest on genes and the gene scores do.

Dimensions: N cells, G genes, P components, n generated and m held-out cells, D width of any features.
Source: Gretton et al. 2012 (MMD); Szekely and Rizzo 2013 (energy distance); Marouf et al. 2020 (scGAN, which
has MMD and a random forest for cells); the others are named where they are computed.
"""

from typing import Any, Literal

import numpy as np
from scipy.sparse import csr_matrix
from scipy.spatial.distance import cdist
from scipy.stats import wasserstein_distance
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.sparsefuncs import mean_variance_axis, min_max_axis

from modeling_scdiva.metrics.imputation import checked_counts, value_scores
from modeling_scdiva.metrics.perturbation import energy_distance, maximum_mean_discrepancy

N_COMPONENTS, N_TOP_GENES, N_FOLDS = 50, 500, 5
# Genes that fewer of the reference cells show are rare, the others are expressed.
RARE_RATE = 0.01
MAX_COMPARED_CELLS = 3_000
N_TREES, MIN_CELLS_PER_LEAF, MAX_ITERATIONS = 100, 5, 2_000
MIN_GENES = 3
# Rows of a distance matrix that are held at once.
ROWS_AT_ONCE = 1_000
# Rounding leaves a constant gene a norm of 1e-16.
SMALLEST_NORM = 1e-9


def generation_scores(
    generated: Any,
    held_out: Any,
    reference: Any,
    *,
    counts: tuple[Any, Any] | None = None,
    n_components: int = N_COMPONENTS,
    n_top_genes: int = N_TOP_GENES,
    rare_rate: float = RARE_RATE,
    seed: int = 0,
) -> dict[str, float]:
    """Compute all scores of this module.

    Too few cells, other genes, values that are not finite or look like raw counts, and real cells without
    variation raise ``ValueError``.

    Args:
        generated: (n, G) log1p of normalised counts of generated cells, dense or sparse.
        held_out: (m, G) the same of real cells that neither the generator nor ``reference`` has seen.
        reference: (N, G) the same of real training cells.
        counts: (n, any) and (m, any) raw counts of the generated and the held-out cells, over the same genes,
            which need not be those above; without them there is no ``library_size_distance``.
        n_components: Principal components P of the reference.
        n_top_genes: Most variable genes of the reference, for ``correlation_error`` and the forest on genes.
        rare_rate: Share of reference cells below which a gene is rare, in (0, 1).
        seed: Of the cells compared, the components' start vector, the folds and the forests.

    Returns:
        Best 0: ``mmd`` (squared), ``energy_distance``, ``detection_rmse``, ``mean_rmse``,
        ``detected_genes_distance``, ``library_size_distance`` (where counts are given),
        ``zero_fraction_difference`` (generated minus real), ``correlation_error``. Best 0.5: ``nn_accuracy``,
        ``nn_accuracy_generated``, ``nn_accuracy_held_out``, ``auc_logistic`` and ``auc_forest`` (on
        components), ``auc_forest_genes``. Best 1: ``detection_pearson``, ``mean_pearson``,
        ``rare_gene_ratio`` (NaN where the held-out cells show no rare gene), ``variance_ratio``. And
        ``n_generated``, ``n_held_out``, ``n_compared`` (cells drawn of each side for clouds and classifiers).
    """
    generated, held_out, reference = _checked_cells(
        generated=generated, held_out=held_out, reference=reference
    )
    for name, cells in (("generated", generated), ("held_out", held_out)):
        _refuse_raw_counts(name, cells)
    _refuse_constant("held_out", held_out)
    depth = {}
    if counts is not None:
        _check_rows(counts, (generated.shape[0], held_out.shape[0]))
        depth["library_size_distance"] = library_size_distance(*counts)
    projection = fit_projection(reference, n_components=n_components, seed=seed)
    n_compared = min(generated.shape[0], held_out.shape[0], MAX_COMPARED_CELLS)
    rng = np.random.default_rng(seed)
    drawn = [cells[np.sort(rng.permutation(cells.shape[0])[:n_compared])] for cells in (generated, held_out)]
    components = [projection.transform(cells) for cells in drawn]  # (n_compared, P) each
    top = _top_genes(reference, n_top_genes)
    genes = [cells[:, top].toarray() for cells in drawn]
    scores = {
        "mmd": maximum_mean_discrepancy(*components),
        "energy_distance": energy_distance(*components),
        **nearest_neighbor_accuracy(*components),
        **gene_profile_scores(generated, held_out),
        "detected_genes_distance": detected_genes_distance(generated, held_out),
        "correlation_error": correlation_error(
            generated, held_out, reference=reference, n_top_genes=n_top_genes
        ),
        "auc_logistic": discriminator_auc(*components, classifier="logistic", seed=seed),
        "auc_forest": discriminator_auc(*components, classifier="forest", seed=seed),
        "auc_forest_genes": discriminator_auc(*genes, classifier="forest", seed=seed),
        "rare_gene_ratio": rare_gene_ratio(generated, held_out, reference=reference, rare_rate=rare_rate),
        "variance_ratio": variance_ratio(generated, held_out, reference=reference, rare_rate=rare_rate),
    }
    n_cells = {"n_generated": generated.shape[0], "n_held_out": held_out.shape[0], "n_compared": n_compared}
    return scores | depth | n_cells


def fit_projection(reference: Any, *, n_components: int = N_COMPONENTS, seed: int = 0) -> PCA:
    """Fit the space in which clouds of cells are compared, on reference cells alone.

    Args:
        reference: (N, G) log1p of normalised counts of real cells, dense or sparse; sparse is not made dense.
        n_components: Components P kept, below N and G.
        seed: Of the iteration's start vector.

    Returns:
        Its ``transform`` takes the reference means away from any cells (n, G) and gives (n, P), not whitened.

    Raises:
        ValueError: If there are too many components for the cells and genes, besides what is refused of
            cells: values that are not finite or look like raw counts, no variation.
    """
    (cells,) = _checked_cells(reference=reference)
    _refuse_raw_counts("reference", cells)
    _refuse_constant("reference", cells)
    if not 1 <= n_components < min(cells.shape):
        msg = (
            f"n_components={n_components} must be 1 at least and below the numbers of reference cells and "
            f"genes, {cells.shape}. Give more reference cells or ask for fewer components."
        )
        raise ValueError(msg)
    return PCA(n_components, svd_solver="arpack", random_state=seed).fit(cells)


def nearest_neighbor_accuracy(generated: np.ndarray, held_out: np.ndarray) -> dict[str, float]:
    """Ask of each cell whether its nearest other cell comes from the same side.

    Args:
        generated: (n, D) cells, for example principal components.
        held_out: (n, D) as many real cells.

    Returns:
        ``nn_accuracy``, ``nn_accuracy_generated`` and ``nn_accuracy_held_out``, shares in [0, 1], of all
        cells and of each side. Best 0.5 (a little less for few cells, n - 1 own to n others), 1 for clouds
        apart. Generated high and held-out low: generated cells crowd together; all well below 0.5: copies of
        the held-out cells. Neighbours at equal distance share the vote.

    Raises:
        ValueError: If the sides differ in number, so that chance is not one half.

    References:
        Lopez-Paz and Oquab 2017, arXiv 1610.06545; the two halves: Xu et al. 2018, arXiv 1806.07755.
    """
    first, second = _checked_features(generated, held_out)
    if len(first) != len(second):
        msg = (
            f"As many generated as held-out cells are wanted, got {len(first)} and {len(second)}: chance is "
            "not one half then. Draw equally many of both."
        )
        raise ValueError(msg)
    cells = np.concatenate([first, second])
    is_generated = np.arange(len(cells)) < len(first)
    own_share = np.empty(len(cells))
    for start in range(0, len(cells), ROWS_AT_ONCE):
        distances = cdist(cells[start : start + ROWS_AT_ONCE], cells)
        rows = np.arange(start, start + len(distances))
        distances[rows - start, rows] = np.inf  # a cell is not its own neighbour
        is_nearest = distances == distances.min(axis=1, keepdims=True)
        is_own = is_generated[rows, None] == is_generated
        own_share[rows] = (is_nearest & is_own).sum(axis=1) / is_nearest.sum(axis=1)
    return {
        "nn_accuracy": float(own_share.mean()),
        "nn_accuracy_generated": float(own_share[is_generated].mean()),
        "nn_accuracy_held_out": float(own_share[~is_generated].mean()),
    }


def gene_profile_scores(generated: Any, held_out: Any) -> dict[str, float]:
    """Compare detection rate and mean expression gene by gene.

    Args:
        generated: (n, G) log1p of normalised counts, dense or sparse.
        held_out: (m, G) the same of real cells.

    Returns:
        ``detection_pearson`` and ``mean_pearson`` over the genes, best 1, 0 where one side is equal for all
        genes; ``detection_rmse`` (share of cells) and ``mean_rmse`` (log1p units), best 0;
        ``zero_fraction_difference``, share of entries that are zero, generated minus real, best 0, negative
        where generated cells show too many genes.

    References:
        Crowell et al. 2023, Genome Biology 24:62; zeros: Cao et al. 2021 (SimBench), Nat. Commun. 12:6911.
    """
    first, second = _checked_cells(generated=generated, held_out=held_out)
    difference = float(_detection_rates(second).mean() - _detection_rates(first).mean())
    scores = {"zero_fraction_difference": difference}
    for name, profile in (("detection", _detection_rates), ("mean", _means)):
        of_genes = value_scores(profile(second), profile(first))
        scores[f"{name}_pearson"] = of_genes["pearson"]
        scores[f"{name}_rmse"] = of_genes["rmse"]
    return scores


def detected_genes_distance(generated: Any, held_out: Any) -> float:
    """Compare how many genes the cells show.

    Args:
        generated: (n, G) counts or expression, dense or sparse; what is above zero is detected.
        held_out: (m, G) the same of real cells.

    Returns:
        1-Wasserstein distance of the numbers of detected genes, in genes, best 0.

    References:
        Crowell et al. 2023, Genome Biology 24:62.
    """
    cells = _checked_cells(generated=generated, held_out=held_out)
    return float(wasserstein_distance(*(matrix.getnnz(axis=1) for matrix in cells)))


def library_size_distance(generated_counts: Any, held_out_counts: Any) -> float:
    """Compare how many molecules the cells have.

    Args:
        generated_counts: (n, G) raw counts, dense or sparse. What is not whole or negative is refused.
        held_out_counts: (m, G) the same of real cells.

    Returns:
        1-Wasserstein distance of log1p of the library sizes, in nats, best 0; 0.1 is about a tenth of the
        molecules. An empty cell counts as 0 nats.

    References:
        Crowell et al. 2023, Genome Biology 24:62.
    """
    cells = [
        checked_counts(matrix)
        for matrix in _checked_cells(generated_counts=generated_counts, held_out_counts=held_out_counts)
    ]
    return float(
        wasserstein_distance(*(np.log1p(np.asarray(matrix.sum(axis=1)).ravel()) for matrix in cells))
    )


def correlation_error(
    generated: Any, held_out: Any, *, reference: Any, n_top_genes: int = N_TOP_GENES
) -> float:
    """Compare which genes go together.

    Args:
        generated: (n, G) log1p of normalised counts, dense or sparse.
        held_out: (m, G) the same of real cells.
        reference: (N, G) real cells that choose the genes, none of those above.
        n_top_genes: Genes with the largest variance in the reference; all that vary where there are fewer.

    Returns:
        Root mean square of the differences of Pearson correlations over all pairs of different genes, in
        [0, 2], best 0. A gene that does not vary correlates with nothing. Sampling noise of few cells adds to
        it, about sqrt(1/n + 1/m).

    References:
        Sun et al. 2021 (scDesign2), Genome Biology 22:163; Crowell et al. 2023, Genome Biology 24:62.
    """
    first, second, third = _checked_cells(generated=generated, held_out=held_out, reference=reference)
    genes = _top_genes(third, n_top_genes)
    pairs = np.triu_indices(len(genes), k=1)
    difference = _correlations(first[:, genes].toarray()) - _correlations(second[:, genes].toarray())
    return float(np.sqrt(np.mean(difference[pairs] ** 2)))


def discriminator_auc(
    generated: np.ndarray,
    held_out: np.ndarray,
    *,
    classifier: Literal["logistic", "forest"] = "forest",
    n_folds: int = N_FOLDS,
    seed: int = 0,
) -> float:
    """Train a classifier to tell generated from real cells, and test it on cells that it has not seen.

    Args:
        generated: (n, D) features of cells, for example principal components.
        held_out: (m, D) the same of real cells.
        classifier: "logistic" on features of unit variance, or "forest" of 100 trees.
        n_folds: Stratified folds; each is the test set once.
        seed: Of folds and forest.

    Returns:
        Area under the ROC curve, mean over the folds. Best 0.5, 1 where the cells can be told apart; well
        below 0.5 where the same cells are on both sides.

    Raises:
        ValueError: If ``classifier`` is unknown or a side has fewer cells than folds.

    References:
        Lopez-Paz and Oquab 2017, arXiv 1610.06545; on cells: Marouf et al. 2020, Nat. Commun. 11:166.
    """
    first, second = _checked_features(generated, held_out)
    if classifier not in ("logistic", "forest"):
        msg = f"classifier must be 'logistic' or 'forest', got {classifier!r}."
        raise ValueError(msg)
    if not 2 <= n_folds <= min(len(first), len(second)):
        msg = (
            f"n_folds={n_folds} must be 2 at least and no more than the {len(first)} generated and the "
            f"{len(second)} held-out cells. Give more cells or ask for fewer folds."
        )
        raise ValueError(msg)
    estimator = (
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=MAX_ITERATIONS))
        if classifier == "logistic"
        else RandomForestClassifier(N_TREES, min_samples_leaf=MIN_CELLS_PER_LEAF, random_state=seed)
    )
    is_generated = np.repeat([1, 0], [len(first), len(second)])
    folds = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
    cells = np.concatenate([first, second])
    return float(cross_val_score(estimator, cells, is_generated, cv=folds, scoring="roc_auc").mean())


def rare_gene_ratio(generated: Any, held_out: Any, *, reference: Any, rare_rate: float = RARE_RATE) -> float:
    """Compare how often rare genes show, which averages over genes hardly see.

    Args:
        generated: (n, G) counts or expression, dense or sparse.
        held_out: (m, G) the same of real cells.
        reference: (N, G) real cells that choose the genes.
        rare_rate: Genes that a smaller share of the reference cells shows are rare, in (0, 1); those that
            none shows, too.

    Returns:
        Sum of the detection rates of rare genes, generated over held-out. Best 1, below where rare genes are
        lost, above where they are made up; NaN where the held-out cells show none.

    References:
        Our own; rare genes are what rounding and greedy decoding lose first.
    """
    first, second, third = _checked_cells(generated=generated, held_out=held_out, reference=reference)
    _check_rate(rare_rate)
    is_rare = _detection_rates(third) < rare_rate
    real = float(_detection_rates(second)[is_rare].sum())
    return float(_detection_rates(first)[is_rare].sum()) / real if real > 0 else float("nan")


def variance_ratio(generated: Any, held_out: Any, *, reference: Any, rare_rate: float = RARE_RATE) -> float:
    """Compare how much genes vary from cell to cell.

    Args:
        generated: (n, G) log1p of normalised counts, dense or sparse.
        held_out: (m, G) the same of real cells.
        reference: (N, G) real cells that choose the genes.
        rare_rate: Genes that at least this share of the reference cells shows are expressed, in (0, 1).

    Returns:
        Median over the expressed genes that vary in the held-out cells of generated over real variance. Best
        1, below where generated cells are too much alike.

    Raises:
        ValueError: If no such gene is left.

    References:
        Cao et al. 2021 (SimBench), Nat. Commun. 12:6911 (variance per gene; the ratio is ours).
    """
    first, second, third = _checked_cells(generated=generated, held_out=held_out, reference=reference)
    _check_rate(rare_rate)
    low, high = min_max_axis(second, axis=0)
    is_scored = (_detection_rates(third) >= rare_rate) & (high > low)
    if not is_scored.any():
        msg = (
            f"None of {second.shape[1]} genes shows in {rare_rate:g} of the reference cells and varies in "
            "the held-out cells. Give more cells or a lower rare_rate."
        )
        raise ValueError(msg)
    return float(np.median(_variances(first)[is_scored] / _variances(second)[is_scored]))


# --- profiles of genes, all (G,) ---


def _detection_rates(cells: csr_matrix) -> np.ndarray:
    return cells.getnnz(axis=0) / cells.shape[0]


def _means(cells: csr_matrix) -> np.ndarray:
    return mean_variance_axis(cells, axis=0)[0]


def _variances(cells: csr_matrix) -> np.ndarray:
    n_cells = cells.shape[0]
    return mean_variance_axis(cells, axis=0)[1] * n_cells / (n_cells - 1)


def _top_genes(reference: csr_matrix, n_top_genes: int) -> np.ndarray:
    """Find the genes that vary most, (n_top_genes,) in falling order, ties to the earlier gene."""
    low, high = min_max_axis(reference, axis=0)
    n_varying = int((high > low).sum())
    if min(n_top_genes, n_varying) < 2:
        msg = (
            f"n_top_genes={n_top_genes} of {n_varying} genes that vary among {reference.shape[0]} reference "
            "cells; two are needed for a pair. Give more cells or ask for more genes."
        )
        raise ValueError(msg)
    # A constant gene may keep a variance of rounding size.
    order = np.argsort(-np.where(high > low, _variances(reference), 0.0), kind="stable")
    return order[: min(n_top_genes, n_varying)]


def _correlations(expression: np.ndarray) -> np.ndarray:
    """Correlate genes, (N, G) to (G, G); 0 for genes that do not vary."""
    centred = expression - expression.mean(axis=0)
    norms = np.linalg.norm(centred, axis=0)
    scaled = centred / np.where(norms > SMALLEST_NORM, norms, np.inf)
    return scaled.T @ scaled


# --- what is refused ---


def _checked_cells(**cells: Any) -> list[csr_matrix]:
    """Give CSR float64 copies (n, G) without stored zeros, or refuse them."""
    matrices = {name: csr_matrix(given, dtype=np.float64, copy=True) for name, given in cells.items()}
    for name, matrix in matrices.items():
        if matrix.shape[0] < 2 or matrix.shape[1] < MIN_GENES:
            msg = f"{name} needs 2 cells and {MIN_GENES} genes at least, got the shape {matrix.shape}."
            raise ValueError(msg)
        n_broken = int((~(np.isfinite(matrix.data) & (matrix.data >= 0))).sum())
        if n_broken:
            msg = (
                f"{n_broken} values of {name} are NaN, infinite or negative; expression and counts are 0 or "
                "more. Leave genes that were not measured out of all sets."
            )
            raise ValueError(msg)
        matrix.sum_duplicates()
        matrix.eliminate_zeros()
    n_genes = {name: matrix.shape[1] for name, matrix in matrices.items()}
    if len(set(n_genes.values())) > 1:
        msg = f"All sets need the same genes in the same order, got {n_genes} genes. Keep the common ones."
        raise ValueError(msg)
    return list(matrices.values())


def _refuse_raw_counts(name: str, cells: csr_matrix) -> None:
    if cells.nnz and (cells.data == np.round(cells.data)).all() and cells.data.max() > 1:
        msg = f"{name} holds whole numbers only: raw counts? Give log_normalise(counts)."
        raise ValueError(msg)


def _refuse_constant(name: str, cells: csr_matrix) -> None:
    low, high = min_max_axis(cells, axis=0)
    if not (high > low).any():
        msg = f"All {cells.shape[0]} cells of {name} are the same; real cells vary. Is it the right matrix?"
        raise ValueError(msg)


def _check_rate(rare_rate: float) -> None:
    if not 0.0 < rare_rate < 1.0:
        msg = f"rare_rate must lie in (0, 1), got {rare_rate}. It is a share of cells: 0.01 for one percent."
        raise ValueError(msg)


def _check_rows(counts: tuple[Any, Any], n_cells: tuple[int, int]) -> None:
    n_rows = tuple(np.shape(matrix)[0] for matrix in counts)
    if n_rows != n_cells:
        msg = f"counts must be those of {n_cells} generated and held-out cells in this order, got {n_rows}."
        raise ValueError(msg)


def _checked_features(generated: Any, held_out: Any) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(generated, dtype=np.float64), np.asarray(held_out, dtype=np.float64)
    if first.ndim != 2 or first.shape[1:] != second.shape[1:] or min(len(first), len(second)) < 2:
        msg = f"Dense (cells, width) arrays of 2 cells or more are needed, got {first.shape}, {second.shape}."
        raise ValueError(msg)
    n_broken = [int((~np.isfinite(cells)).any(axis=1).sum()) for cells in (first, second)]
    if any(n_broken):
        msg = f"Cells with features that are not finite: {n_broken[0]} generated, {n_broken[1]} held-out."
        raise ValueError(msg)
    return first, second
