"""What one would impute without a network: the observed values, gene means, neighbouring cells.

scVI is in `modeling_scdiva.metrics.scvi_baselines`.

Each takes what the network sees of the scored cells and other cells in full, and gives an expected value and
a probability of detection for every gene. Nothing is fitted on scored cells.

Notable choices:
- `gene_mean_depth` is what sequencing depth alone tells: Poisson counts of the mean profile at the depth of
  the cell.
- Where a method gives a share of molecules, counts at the depth of the cell are taken to be Poisson, and the
  expected value is probability times log1p of the mean count where there is one. log1p of the mean itself
  would be far above the mean of log1p for rare genes.
- `knn_smoothing` compares cells by the genes that are visible, log-normalised over these genes alone, in
  principal components fitted on the training cells.

Dimensions: N scored cells, M training cells, G genes, P components.
Source: METHOD.md section 8.
"""

from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from modeling_scdiva.metrics.annotation import log_normalise
from modeling_scdiva.metrics.imputation import checked_counts

TARGET_SUM = 10_000.0
N_NEIGHBORS, N_COMPONENTS = 15, 50


class Imputation(NamedTuple):
    """What a method says of every gene of every scored cell.

    Attributes:
        expected: (N, G) expected log1p of counts per 10,000.
        probability: (N, G) probability that the gene is detected at full depth.
    """

    expected: np.ndarray
    probability: np.ndarray


def log_expression(counts: Any, library_size: np.ndarray) -> np.ndarray:
    """Normalise counts by given library sizes.

    Args:
        counts: (N, G) raw counts, dense or sparse.
        library_size: (N,) molecules per cell; 0 is let through for an empty cell.

    Returns:
        (N, G) float64 dense, log1p(10,000 * c / N).
    """
    matrix = checked_counts(counts)
    sizes = np.asarray(library_size, dtype=np.float64)
    scale = np.divide(TARGET_SUM, sizes, out=np.zeros_like(sizes), where=sizes > 0)
    matrix.data = np.log1p(matrix.data * np.repeat(scale, np.diff(matrix.indptr)))
    return matrix.toarray()


def identity(counts: Any, library_size: np.ndarray) -> Imputation:
    """Leave the cells as they are.

    Args:
        counts: (N, G) raw counts that are visible.
        library_size: (N,) molecules per cell by which they are normalised.

    Returns:
        The observed values, and 1 where a gene is seen, else 0.
    """
    observed = log_expression(counts, library_size)
    return Imputation(observed, (observed > 0).astype(np.float64))


def gene_mean(training_counts: Any, training_library_size: np.ndarray, n_cells: int) -> Imputation:
    """Give every cell the mean value and the detection rate of each gene.

    Args:
        training_counts: (M, G) raw counts of other cells.
        training_library_size: (M,) their molecules.
        n_cells: Scored cells N.

    Returns:
        The same for each cell.
    """
    expression = log_expression(training_counts, training_library_size)
    rows = (n_cells, 1)
    return Imputation(np.tile(expression.mean(axis=0), rows), np.tile((expression > 0).mean(axis=0), rows))


def gene_mean_depth(
    training_counts: Any, training_library_size: np.ndarray, library_size: np.ndarray
) -> Imputation:
    """Give every cell the mean profile at its own full depth.

    Args:
        training_counts: (M, G) raw counts of other cells.
        training_library_size: (M,) their molecules.
        library_size: (N,) molecules of the scored cells at full depth, known or extrapolated.

    Returns:
        Expected value, and 1 - exp(-share * library size).
    """
    totals = np.asarray(checked_counts(training_counts).sum(axis=0)).ravel()
    share = totals / max(float(np.sum(training_library_size)), 1.0)  # (G,) of all molecules
    return of_share(share[None, :], library_size)


def of_share(share: np.ndarray, library_size: np.ndarray) -> Imputation:
    """Turn shares of molecules into what Poisson counts at a depth let expect.

    Args:
        share: (N, G) or (1, G) share of each gene in the molecules of a cell.
        library_size: (N,) molecules of the cells.

    Returns:
        Expected value, and 1 - exp(-share * library size).
    """
    sizes = np.asarray(library_size, dtype=np.float64)[:, None]
    mean_count = sizes * share
    probability = -np.expm1(-mean_count)
    count_if_detected = np.divide(
        mean_count, probability, out=np.ones_like(mean_count), where=probability > 0
    )
    value = np.log1p(TARGET_SUM * count_if_detected / np.maximum(sizes, 1.0))
    return Imputation(probability * value, probability)


def given_silent(imputed: Imputation, library_size: np.ndarray, *, kept_fraction: float) -> Imputation:
    """Tell a Poisson method that a gene showed no molecule in the share of the counts that was kept.

    What was kept and what was not are independent then: only the latter can still hold a molecule.

    Args:
        imputed: Of `gene_mean_depth` or `scvi_imputation`, for full depth.
        library_size: (N,) molecules at full depth.
        kept_fraction: Share of the molecules in which the gene is silent, in [0, 1).

    Returns:
        Expected value and probability where a gene is silent.
    """
    mean_count = -np.log1p(-np.minimum(imputed.probability, 1.0 - 1e-15)) * (1.0 - kept_fraction)
    sizes = np.maximum(np.asarray(library_size, dtype=np.float64)[:, None], 1.0)
    return of_share(mean_count / sizes, sizes[:, 0])


def knn_smoothing(
    counts: Any,
    *,
    training_counts: Any,
    training_library_size: np.ndarray,
    is_visible: np.ndarray | None = None,
    n_neighbors: int = N_NEIGHBORS,
    n_components: int = N_COMPONENTS,
    seed: int = 0,
) -> Imputation:
    """Average the nearest training cells.

    Args:
        counts: (N, G) raw counts that are visible of the scored cells.
        training_counts: (M, G) raw counts of other cells, in full.
        training_library_size: (M,) their molecules.
        is_visible: (G,) bool, genes by which cells are compared; all when not given.
        n_neighbors: Cells averaged, all with equal weight; at most M.
        n_components: Components of the space in which cells are compared; fewer where there are fewer cells
            or genes.
        seed: Of the components' start vector.

    Returns:
        Mean value and detection rate among the neighbours.

    Raises:
        ValueError: If there are fewer than three training cells or visible genes.
    """
    scored, training = checked_counts(counts), checked_counts(training_counts)
    columns = np.arange(training.shape[1]) if is_visible is None else np.flatnonzero(is_visible)
    n_components = min(n_components, training.shape[0] - 1, len(columns) - 1)
    if n_components < 2:
        n_cells = training.shape[0]
        msg = f"{n_cells} training cells and {len(columns)} visible genes are too few to compare cells."
        raise ValueError(msg)
    pca = PCA(n_components, svd_solver="arpack", random_state=seed)
    components = pca.fit_transform(log_normalise(training[:, columns]))
    places = pca.transform(log_normalise(scored[:, columns]))
    search = NearestNeighbors(n_neighbors=min(n_neighbors, training.shape[0])).fit(components)
    neighbors = search.kneighbors(places, return_distance=False)  # (N, k)
    expression = csr_matrix(log_expression(training, training_library_size))
    n_kept = neighbors.shape[1]
    weights = csr_matrix(
        (np.full(neighbors.size, 1.0 / n_kept), neighbors.ravel(), np.arange(len(neighbors) + 1) * n_kept),
        shape=(len(neighbors), training.shape[0]),
    )
    rate = (weights @ (expression > 0)).toarray()
    return Imputation((weights @ expression).toarray(), np.minimum(rate, 1.0))  # 15 fifteenths round above 1
