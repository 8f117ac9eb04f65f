"""What finds abnormal cells without a network: depth, principal components, neighbours, simulated doublets.

A detector is fitted on training cells when it is made, and gives every other cell a number: the higher, the
more abnormal. `modeling_scdiva.metrics.outlier_cells` makes abnormal cells and scores the numbers.

Notable choices:
- Depth is a confounder of every other detector: what `DepthDetector` finds, nothing else deserves credit for.
- Cells are compared by log1p of counts per 10,000, in principal components fitted on training cells. The
  residual of shallow cells is larger by this normalisation alone.
- ``part="both"`` of `PCAResidualDetector` is minus twice the log-density of probabilistic PCA, up to a
  constant.
- Scored cells must not be training cells: a cell is its own nearest neighbour.

Dimensions: N scored cells, M training cells, G genes, P components.
Source: METHOD.md section 8. Tipping and Bishop 1999, "Probabilistic principal component analysis", JRSS B 61.
Wolock et al. 2019 (Scrublet), Cell Systems 8.
"""

from collections.abc import Sequence
from typing import Any, Literal

import anndata
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, issparse, vstack
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from modeling_scdiva.metrics.annotation import depth_features, log_normalise
from modeling_scdiva.metrics.imputation import checked_counts

N_NEIGHBORS, N_COMPONENTS = 15, 50
# Depths that differ by less than a percent are one depth, also where all training cells are of equal depth.
DEPTH_RESOLUTION = 0.01
FLAT = 1e-9  # variance that is rounding, as a share of that of the first component
FEWEST_TRAINING_CELLS = 3
FEWEST_GENES_OF_SCRUBLET = 3


class DepthDetector:
    """How far log library size and log number of detected genes are from those of the training cells.

    Args:
        training_counts: (M, G) raw counts, at least three cells.
        side: ``both``: squared Mahalanobis distance of the two. ``low`` and ``high``: how many standard
            deviations they are, on average, below or above the training mean; negative on the other side.

    Raises:
        ValueError: If ``side`` is none of the three.
    """

    def __init__(self, training_counts: Any, *, side: Literal["both", "low", "high"] = "both") -> None:
        if side not in {"both", "low", "high"}:
            msg = f"side must be 'both', 'low' or 'high', got {side!r}."
            raise ValueError(msg)
        training = _training_counts(training_counts)
        depth = depth_features(training).astype(np.float64)
        self.side, self.n_genes = side, training.shape[1]
        self.mean = depth.mean(axis=0)
        self.covariance = np.cov(depth, rowvar=False) + DEPTH_RESOLUTION**2 * np.eye(2)

    def score_cells(self, counts: Any) -> np.ndarray:
        """Score cells by their depth.

        Args:
            counts: (N, G) raw counts.

        Returns:
            (N,) float64, higher for what is farther from the training cells, on the chosen side.
        """
        offsets = depth_features(_scored_counts(counts, self.n_genes)) - self.mean
        if self.side == "both":
            return (offsets * np.linalg.solve(self.covariance, offsets.T).T).sum(axis=1)
        standard = (offsets / np.sqrt(np.diag(self.covariance))).mean(axis=1)
        return -standard if self.side == "low" else standard


class PCAResidualDetector:
    """How badly the principal components of the training cells describe a cell.

    Args:
        training_counts: (M, G) raw counts, at least three cells.
        part: ``residual``: squared norm of what the components leave over. ``subspace``: squared Mahalanobis
            distance from the training mean within the components. ``both``: the second plus the first in
            units of its mean per dimension among the training cells.
        n_components: Components P; fewer where there are fewer cells or genes.
        seed: Of the components' start vector.

    Raises:
        ValueError: If ``part`` is none of the three, or the training cells do not vary along all components,
            or have nothing left over beside them, where ``part`` measures by that.
    """

    def __init__(
        self,
        training_counts: Any,
        *,
        part: Literal["residual", "subspace", "both"] = "residual",
        n_components: int = N_COMPONENTS,
        seed: int = 0,
    ) -> None:
        if part not in {"residual", "subspace", "both"}:
            msg = f"part must be 'residual', 'subspace' or 'both', got {part!r}."
            raise ValueError(msg)
        expression = _expression(_training_counts(training_counts))
        self.part, self.n_genes = part, expression.shape[1]
        self.pca = _fitted_pca(expression, n_components, seed)
        left_over = self._residual(expression, self.pca.transform(expression)).mean()
        self.noise_variance = float(left_over) / (self.n_genes - self.pca.n_components_)
        units = {"residual": 1.0, "subspace": self.pca.explained_variance_[-1], "both": self.noise_variance}
        if not units[part] > FLAT * self.pca.explained_variance_[0]:
            msg = (
                f"{self.pca.n_components_} components describe the {expression.shape[0]} training cells in "
                f"full, so part={part!r} has no unit. Pass more training cells or lower n_components."
            )
            raise ValueError(msg)

    def score_cells(self, counts: Any) -> np.ndarray:
        """Score cells by their place beside and within the components.

        Args:
            counts: (N, G) raw counts.

        Returns:
            (N,) float64, not negative.
        """
        expression = _expression(_scored_counts(counts, self.n_genes))
        components = self.pca.transform(expression)  # (N, P)
        if self.part == "residual":
            return self._residual(expression, components)
        distance = (components**2 / self.pca.explained_variance_).sum(axis=1)
        if self.part == "subspace":
            return distance
        return distance + self._residual(expression, components) / self.noise_variance

    def _residual(self, expression: csr_matrix, components: np.ndarray) -> np.ndarray:
        """Squared norm (N,) of the centred cells less that of their components; nothing is made dense."""
        mean = self.pca.mean_
        squares = np.asarray(expression.multiply(expression).sum(axis=1)).ravel()
        total = squares - 2.0 * (expression @ mean) + mean @ mean
        return np.maximum(total - (components**2).sum(axis=1), 0.0)  # rounding


class KNNDistanceDetector:
    """How far a cell is from the training cells that are nearest to it.

    Args:
        training_counts: (M, G) raw counts, at least three cells.
        n_neighbors: Training cells whose distances are averaged, 1 to M.
        n_components: Components of the space in which cells are compared; fewer where there are fewer cells
            or genes.
        seed: Of the components' start vector.

    Raises:
        ValueError: If ``n_neighbors`` is not positive or exceeds the training cells.
    """

    def __init__(
        self,
        training_counts: Any,
        *,
        n_neighbors: int = N_NEIGHBORS,
        n_components: int = N_COMPONENTS,
        seed: int = 0,
    ) -> None:
        expression = _expression(_training_counts(training_counts))
        if not 1 <= n_neighbors <= expression.shape[0]:
            msg = f"n_neighbors must be 1 to the {expression.shape[0]} training cells, got {n_neighbors}."
            raise ValueError(msg)
        self.n_genes = expression.shape[1]
        self.pca = _fitted_pca(expression, n_components, seed)
        self.search = NearestNeighbors(n_neighbors=n_neighbors).fit(self.pca.transform(expression))

    def score_cells(self, counts: Any) -> np.ndarray:
        """Average the distances to the nearest training cells.

        Args:
            counts: (N, G) raw counts.

        Returns:
            (N,) float64, Euclidean distance in log1p units.
        """
        places = self.pca.transform(_expression(_scored_counts(counts, self.n_genes)))
        return self.search.kneighbors(places)[0].mean(axis=1)


def scrublet_scores(training_counts: Any, counts: Any, *, seed: int = 0) -> np.ndarray:
    """Score cells by the simulated doublets among their neighbours (Scrublet, settings as they come).

    Scrublet takes what it is given for cells of one capture with few doublets, simulates doublets from all of
    them, and needs no fitting. So the scored cells, normal and abnormal in one call, are put beside training
    cells of the same capture, of which there should be many more.

    Args:
        training_counts: (M, G) raw counts of cells that are single.
        counts: (N, G) raw counts of the scored cells, each with three detected genes at least.
        seed: Of simulation and components; neighbours are exact.

    Returns:
        (N,) float64 doublet scores, in (0, 1).

    Raises:
        ImportError: If scanpy is not installed.
        ValueError: If scored cells have too few genes for a score.
    """
    try:
        import scanpy
    except ImportError as error:
        msg = 'Scrublet is that of scanpy: pip install "scdiva[eval]"'
        raise ImportError(msg) from error
    training = _training_counts(training_counts)
    scored = _scored_counts(counts, training.shape[1])
    adata = anndata.AnnData(csr_matrix(vstack([training, scored])).astype(np.float32))
    # Scores are all that is wanted: any threshold will do, and to look for one takes another package.
    scanpy.pp.scrublet(adata, threshold=0.0, use_approx_neighbors=False, random_state=seed, verbose=False)
    scores = adata.obs["doublet_score"].to_numpy(dtype=np.float64)[training.shape[0] :]
    n_missing = int(np.isnan(scores).sum())
    if n_missing:
        msg = (
            f"{n_missing} of {len(scores)} scored cells have fewer than {FEWEST_GENES_OF_SCRUBLET} genes for "
            "Scrublet to look at. Leave them out for every method alike."
        )
        raise ValueError(msg)
    return scores


def knn_label_disagreement(
    features: Any, labels: Sequence[Any] | np.ndarray, *, n_neighbors: int = N_NEIGHBORS
) -> np.ndarray:
    """Say for each cell how many of the cells nearest to it have another label.

    Cells of a class with fewer than ``n_neighbors`` others score above zero whatever their label is.

    Args:
        features: (N, D) embedding or principal components, or log-normalised expression, dense or sparse.
        labels: (N,) class of each cell, some of them wrong.
        n_neighbors: Other cells asked (Euclidean distance, equal votes), 1 to N - 1.

    Returns:
        (N,) share of the neighbours with another label, in [0, 1].

    Raises:
        ValueError: If shapes differ, a feature is not finite, a label is missing, or ``n_neighbors`` is out
            of range.
    """
    points = csr_matrix(features) if issparse(features) else np.asarray(features, dtype=np.float64)
    names = np.asarray(labels, dtype=object)
    if points.ndim != 2 or names.shape != points.shape[:1]:
        msg = f"features must be (N, D) and labels (N,), got {points.shape} and {names.shape}."
        raise ValueError(msg)
    if not np.isfinite(points.data if issparse(points) else points).all():
        msg = "features must be finite. Look for cells without molecules, or leave such cells out."
        raise ValueError(msg)
    n_missing = int(pd.isna(names).sum())
    if n_missing:
        msg = f"{n_missing} of {len(names)} labels are missing. Leave these cells out."
        raise ValueError(msg)
    if not 1 <= n_neighbors < len(names):
        msg = f"n_neighbors must be 1 to the {len(names) - 1} other cells, got {n_neighbors}."
        raise ValueError(msg)
    # Asked for no points in particular, the search leaves each cell itself out.
    neighbors = NearestNeighbors(n_neighbors=n_neighbors).fit(points).kneighbors(return_distance=False)
    return (names[neighbors] != names[:, None]).mean(axis=1)


def _training_counts(counts: Any) -> csr_matrix:
    """Refuse training cells that are no raw counts or too few."""
    training = checked_counts(counts)
    if training.shape[0] < FEWEST_TRAINING_CELLS:
        msg = f"{FEWEST_TRAINING_CELLS} training cells are needed at least, got {training.shape[0]}."
        raise ValueError(msg)
    return training


def _scored_counts(counts: Any, n_genes: int) -> csr_matrix:
    """Refuse cells that are no raw counts, none at all, or of other genes than the training cells."""
    scored = checked_counts(counts)
    if scored.shape[1] != n_genes:
        msg = (
            f"The training cells have {n_genes} genes and the scored ones {scored.shape[1]}. Pass the same "
            "genes in the same order."
        )
        raise ValueError(msg)
    if not scored.shape[0]:
        msg = "There is no cell to score. Check the selection of cells."
        raise ValueError(msg)
    return scored


def _expression(counts: csr_matrix) -> csr_matrix:
    """Give log1p of counts per 10,000 (N, G), in double precision for differences of norms."""
    return log_normalise(counts).astype(np.float64)


def _fitted_pca(expression: csr_matrix, n_components: int, seed: int) -> PCA:
    """Fit components, fewer than asked for where there are fewer cells or genes."""
    if n_components < 1:
        msg = f"n_components must be at least 1, got {n_components}."
        raise ValueError(msg)
    n_components = min(n_components, min(expression.shape) - 1)
    if n_components < 1:
        msg = f"Components need two cells and two genes at least, got {expression.shape}."
        raise ValueError(msg)
    if not (expression.max(axis=0) != expression.min(axis=0)).nnz:
        msg = f"All {expression.shape[0]} training cells have one profile, so no components. Pass others."
        raise ValueError(msg)
    # arpack is the solver that centres sparse matrices without filling them.
    return PCA(n_components, svd_solver="arpack", random_state=seed).fit(expression)
