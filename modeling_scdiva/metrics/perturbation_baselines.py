"""What one would predict for a perturbation without a foundation model, and how well it could be predicted.

Notable choices:
- All of them see the changes of the training perturbations only.
- The linear baseline is that of Ahlmann-Eltze et al.: changes = gene factors x W x perturbation factors plus
  the mean change, two ridge penalties of 0.1, ten factors. A perturbation without factors (its target is not
  measured) gets the mean change, and the caller can count it.
- The ceiling is the data's own noise: half of the cells predict the other half.

Dimensions: P training perturbations, Q perturbations to predict, G genes, K factors, n and m cells.
Source: Ahlmann-Eltze, Huber and Anders 2025, Nature Methods; Vinas Torne et al. 2025 (Systema); Csendes et
al. 2025 (random forest).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

RIDGE = 0.1
N_FACTORS = 10
N_NEAREST = 5


def no_change(n_perturbations: int, n_genes: int) -> np.ndarray:
    """Predict that nothing happens.

    Args:
        n_perturbations: Q.
        n_genes: G.

    Returns:
        (Q, G) zeros.
    """
    return np.zeros((n_perturbations, n_genes))


def perturbed_mean(training_deltas: np.ndarray, n_perturbations: int) -> np.ndarray:
    """Predict the mean change of the training perturbations, each counted once.

    Args:
        training_deltas: (P, G) changes.
        n_perturbations: Q.

    Returns:
        (Q, G) equal rows.
    """
    return np.tile(_checked(training_deltas).mean(axis=0), (n_perturbations, 1))


def control_matched_mean(
    group_deltas: Mapping[str, np.ndarray], shares: Sequence[Mapping[str, float]]
) -> np.ndarray:
    """Predict the mean change of all training cells of the same groups (batch, donor, cell type).

    Args:
        group_deltas: Group -> (G,) mean change of its perturbed training cells against its controls.
        shares: For each perturbation to predict, group -> share of its cells there. The shares of groups
            without training cells are spread over the others; where none is left, all groups count alike.

    Returns:
        (Q, G) changes.

    Raises:
        ValueError: If there is no group.
    """
    if not group_deltas:
        msg = "control_matched_mean needs the change of at least one group of training cells, got none."
        raise ValueError(msg)
    names = list(group_deltas)
    deltas = np.stack([group_deltas[name] for name in names])  # (groups, G)
    weights = np.array([[wanted.get(name, 0.0) for name in names] for wanted in shares])
    totals = weights.sum(axis=1, keepdims=True)
    weights = np.where(totals > 0, weights / np.where(totals > 0, totals, 1.0), 1.0 / len(names))
    return weights @ deltas


def additive(
    single_deltas: Mapping[str, np.ndarray], parts: Sequence[Sequence[str]], *, fallback: np.ndarray
) -> np.ndarray:
    """Predict a combination as the sum of the changes of its parts.

    Args:
        single_deltas: Target -> (G,) change of the single training perturbation.
        parts: The targets of each perturbation to predict.
        fallback: (G,) change taken for a part without a training perturbation, such as the mean.

    Returns:
        (Q, G) changes.
    """
    return np.stack(
        [np.sum([single_deltas.get(part, fallback) for part in targets], axis=0) for targets in parts]
    )


def matching_mean(
    single_deltas: Mapping[str, np.ndarray], parts: Sequence[Sequence[str]], *, fallback: np.ndarray
) -> np.ndarray:
    """Predict a combination as the mean of the changes of its parts, which assumes that they saturate.

    Args:
        single_deltas: Target -> (G,) change of the single training perturbation.
        parts: The targets of each perturbation to predict, one at least.
        fallback: (G,) change taken for a part without a training perturbation, such as the mean.

    Returns:
        (Q, G) changes.
    """
    sums = additive(single_deltas, parts, fallback=fallback)
    return sums / np.array([[len(targets)] for targets in parts])


def gene_factors(training_deltas: np.ndarray, *, n_factors: int = N_FACTORS) -> np.ndarray:
    """Describe genes by how they respond: principal components over the training perturbations.

    Args:
        training_deltas: (P, G) changes.
        n_factors: Components asked for; there are at most P - 1 and at most G.

    Returns:
        (G, K) scores of the genes, K at least 1.
    """
    deltas = _checked(training_deltas)
    centred = deltas.T - deltas.T.mean(axis=0)  # genes are the observations
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    n_factors = max(1, min(n_factors, len(deltas) - 1, len(sizes)))
    return left[:, :n_factors] * sizes[:n_factors]


def linear_model(
    training_deltas: np.ndarray,
    training_factors: np.ndarray,
    *,
    test_factors: np.ndarray,
    gene_side: np.ndarray,
    ridge: float = RIDGE,
) -> np.ndarray:
    """Predict changes bilinearly from factors of genes and of perturbations.

    Args:
        training_deltas: (P, G) changes.
        training_factors: (P, K) factors of the training perturbations; rows with NaN have none and only enter
            the mean.
        test_factors: (Q, K) factors of the perturbations to predict; rows with NaN get the mean.
        gene_side: (G, L) factors of the genes.
        ridge: Penalty on either side, positive.

    Returns:
        (Q, G) changes, ``mean + gene_side W factors``.

    Raises:
        ValueError: If a shape or the penalty is impossible.
    """
    deltas = _checked(training_deltas)
    if training_factors.shape[0] != len(deltas) or training_factors.shape[1] != test_factors.shape[1]:
        msg = (
            f"Factors (P, K) and (Q, K) are needed for {len(deltas)} training perturbations, got "
            f"{training_factors.shape} and {test_factors.shape}."
        )
        raise ValueError(msg)
    if gene_side.shape[0] != deltas.shape[1] or not ridge > 0:
        msg = f"gene_side needs {deltas.shape[1]} rows and a positive ridge, got {gene_side.shape}, {ridge}."
        raise ValueError(msg)
    mean = deltas.mean(axis=0)
    prediction = np.tile(mean, (len(test_factors), 1))
    is_known = np.isfinite(training_factors).all(axis=1)
    is_predicted = np.isfinite(test_factors).all(axis=1)
    if not (is_known.any() and is_predicted.any()):
        return prediction
    factors = training_factors[is_known]  # (P', K)
    gene_gram = gene_side.T @ gene_side + ridge * np.eye(gene_side.shape[1])
    factor_gram = factors.T @ factors + ridge * np.eye(factors.shape[1])
    projected = np.linalg.solve(gene_gram, gene_side.T @ (deltas[is_known] - mean).T)  # (L, P')
    weights = np.linalg.solve(factor_gram, (projected @ factors).T).T  # (L, K)
    prediction[is_predicted] += test_factors[is_predicted] @ weights.T @ gene_side.T
    return prediction


def nearest_perturbations(
    training_deltas: np.ndarray, training_factors: np.ndarray, *, test_factors: np.ndarray
) -> np.ndarray:
    """Predict the mean change of the five perturbations with the nearest factors, of all if there are fewer.

    Args:
        training_deltas: (P, G) changes.
        training_factors: (P, K) factors; rows with NaN have none and are nobody's neighbour.
        test_factors: (Q, K) factors of the perturbations to predict; rows with NaN get the mean of all.

    Returns:
        (Q, G) changes.
    """
    from sklearn.neighbors import KNeighborsRegressor

    n_known = int(np.isfinite(training_factors).all(axis=1).sum())
    regressor = KNeighborsRegressor(n_neighbors=max(1, min(N_NEAREST, n_known)))
    return _regression(regressor, training_deltas, training_factors, test_factors)


def random_forest(
    training_deltas: np.ndarray, training_factors: np.ndarray, *, test_factors: np.ndarray, seed: int = 0
) -> np.ndarray:
    """Predict changes from factors of the perturbations with a random forest, settings as they come.

    Args:
        training_deltas: (P, G) changes.
        training_factors: (P, K) factors; rows with NaN have none and only enter the mean.
        test_factors: (Q, K) factors of the perturbations to predict; rows with NaN get the mean.
        seed: Of the forest.

    Returns:
        (Q, G) changes.
    """
    from sklearn.ensemble import RandomForestRegressor

    regressor = RandomForestRegressor(random_state=seed)
    return _regression(regressor, training_deltas, training_factors, test_factors)


def split_half_deltas(
    perturbed: Sequence[np.ndarray], control: np.ndarray, *, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Measure changes twice, each time with half of the perturbed cells and half of the controls.

    All perturbations of a half share its controls: separate halves would overlap between perturbations and
    make the others, not the own, look alike.

    Args:
        perturbed: Q times (n, G) log1p values, n at least 2.
        control: (m, G) log1p values, m at least 2.
        rng: Source of the split.

    Returns:
        Two (Q, G) arrays of changes from disjoint cells.

    Raises:
        ValueError: If a group has fewer than two cells.
    """
    smallest = min([len(control), *map(len, perturbed)])
    if smallest < 2:
        msg = f"Two halves need two cells of each kind, got {smallest}. Leave the perturbation out."
        raise ValueError(msg)
    control_halves = _half_means(control, rng)
    halves = [_half_means(cells, rng) - control_halves for cells in perturbed]  # (2, G) each
    return np.stack([half[0] for half in halves]), np.stack([half[1] for half in halves])


def _regression(
    regressor: Any, training_deltas: np.ndarray, training_factors: np.ndarray, test_factors: np.ndarray
) -> np.ndarray:
    deltas = _checked(training_deltas)
    prediction = np.tile(deltas.mean(axis=0), (len(test_factors), 1))
    is_known = np.isfinite(training_factors).all(axis=1)
    is_predicted = np.isfinite(test_factors).all(axis=1)
    if is_known.any() and is_predicted.any():
        known = deltas[is_known]
        fitted = regressor.fit(training_factors[is_known], known.ravel() if known.shape[1] == 1 else known)
        prediction[is_predicted] = fitted.predict(test_factors[is_predicted]).reshape(-1, deltas.shape[1])
    return prediction


def _half_means(cells: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(2, G) means of two random halves."""
    order, middle = rng.permutation(len(cells)), len(cells) // 2
    return np.stack([cells[part].mean(axis=0, dtype=np.float64) for part in (order[:middle], order[middle:])])


def _checked(training_deltas: np.ndarray) -> np.ndarray:
    deltas = np.asarray(training_deltas, dtype=np.float64)
    if deltas.ndim != 2 or 0 in deltas.shape or not np.isfinite(deltas).all():
        msg = f"Training changes must be finite, (perturbations, genes) and not empty, got {deltas.shape}."
        raise ValueError(msg)
    return deltas
