"""One fold of the perturbation protocol: which cells train and test, what was measured, what baselines say.

Notable choices:
- Leaving targets out splits the controls too: training and test changes are taken against other controls, so
  the noise of the control mean is not shared between truth and prediction.
- A perturbation is tested where any of its targets is held out; none of its cells trains there. Combinations
  are tested once more in a fold that holds none of their targets, if there is one: with all targets seen.
- The panel, factors, weights and principal components come from training cells.

Dimensions: N cells, P test perturbations, G genes of the panel.
Source: EVALUATION protocol of METHOD.md section 8; Ahlmann-Eltze et al. 2025; Systema.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from modeling_scdiva.metrics import perturbation_baselines as baselines
from modeling_scdiva.metrics.perturbation_de import welch_test_of_moments
from modeling_scdiva.tasks.perturbation_data import (
    CONTROL,
    Effects,
    PerturbedCells,
    control_means,
    gene_weights,
    measure_effects,
    split_perturbation,
)

CEILING = "split-half ceiling"
N_COMPONENTS = 50
MAX_CELLS_FOR_COMPONENTS = 1000


@dataclass(frozen=True)
class Fold:
    """Training and test cells of one fold, with controls on both sides.

    Attributes:
        train: (n,) rows.
        test: (m,) rows.
        name: What is held out.
        holdout: (N,) level of each cell where levels (cell types) are left out, None for targets.
    """

    train: np.ndarray
    test: np.ndarray
    name: str
    holdout: np.ndarray | None = None


def leave_targets_out(cells: PerturbedCells, rows: np.ndarray, *, n_folds: int, seed: int) -> Iterator[Fold]:
    """Hold every target out once.

    Args:
        cells: The screen.
        rows: Cells to use.
        n_folds: Parts into which the targets are dealt.
        seed: Of the deal and of the halves of the controls.

    Yields:
        One fold per part of the targets.

    Raises:
        ValueError: If there are fewer targets than folds, or one fold only.
    """
    names = sorted(set(cells.perturbations[rows]) - {CONTROL})
    parts = {name: split_perturbation(name) for name in names}
    targets = sorted({part for of_name in parts.values() for part in of_name})
    if n_folds < 2 or len(targets) < n_folds:
        msg = (
            f"Leaving targets out needs 2 folds or more and a target for each, got {n_folds}, {targets[:8]}."
        )
        raise ValueError(msg)
    rng = np.random.default_rng((seed, 10))
    is_test_control = np.zeros(len(cells.perturbations), dtype=bool)
    for group in sorted(set(cells.groups[rows])):
        controls = rng.permutation(rows[cells.is_control[rows] & (cells.groups[rows] == group)])
        is_test_control[controls[: len(controls) // 2]] = True
    is_control = cells.is_control[rows]
    of_folds = [set(held.tolist()) for held in np.array_split(rng.permutation(targets), n_folds)]
    for held, dealt in zip(of_folds, _deal_combinations(parts, of_folds, seed), strict=True):
        tested = [name for name in names if set(parts[name]) & held or name in dealt]
        is_tested = np.isin(cells.perturbations[rows], tested)
        yield Fold(
            train=rows[~is_tested & ~(is_control & is_test_control[rows])],
            test=rows[is_tested | (is_control & is_test_control[rows])],
            name=", ".join(sorted(held)),
        )


def _deal_combinations(
    parts: Mapping[str, Sequence[str]], of_folds: Sequence[set[str]], seed: int
) -> list[set[str]]:
    """Deal each combination to one of the folds that hold none of its targets, evenly."""
    rng = np.random.default_rng((seed, 14))
    dealt: list[set[str]] = [set() for _ in of_folds]
    for name in rng.permutation([name for name, targets in parts.items() if len(targets) > 1]).tolist():
        free = [fold for fold, held in enumerate(of_folds) if not held & set(parts[name])]
        if free:
            dealt[min(free, key=lambda fold: len(dealt[fold]))].add(name)
    return dealt


def leave_levels_out(cells: PerturbedCells, rows: np.ndarray, *, levels: np.ndarray) -> Iterator[Fold]:
    """Hold every level (cell type, donor) out once, with its controls.

    Args:
        cells: The screen.
        rows: Cells to use.
        levels: (N,) level of each cell.

    Yields:
        One fold per level.

    Raises:
        ValueError: If there is one level only.
    """
    names = sorted(set(levels[rows]))
    if len(names) < 2:
        msg = f"Leaving levels out needs two of them, got {names}. Name another column as holdout_key."
        raise ValueError(msg)
    for name in names:
        is_test = levels[rows] == name
        yield Fold(rows[~is_test], rows[is_test], name, levels)


class FoldData:
    """What is measured in one fold, on one panel.

    Args:
        cells: The screen.
        fold: Its cells.
        gene_ids: (G,) tokens of the panel, chosen on training cells.
        targets: Perturbation -> tokens of its targets.
        gene_embeddings: (V, D) embeddings of the pretrained model, for one of the baselines.
    """

    def __init__(
        self,
        cells: PerturbedCells,
        fold: Fold,
        *,
        gene_ids: np.ndarray,
        targets: Mapping[str, np.ndarray],
        gene_embeddings: np.ndarray,
    ) -> None:
        self.cells, self.fold, self.gene_ids = cells, fold, gene_ids
        self.targets, self.gene_embeddings = targets, gene_embeddings
        self.truth = measure_effects(cells, fold.test, gene_ids)
        self.pooled = measure_effects(cells, fold.train, gene_ids)
        self.weights = gene_weights(self.pooled)
        all_targets = np.concatenate([targets[name] for name in self.truth.names + self.pooled.names])
        self.is_target = np.isin(gene_ids, all_targets)
        self.is_own_target = np.stack([np.isin(gene_ids, targets[name]) for name in self.truth.names])
        seen = {part for name in self.pooled.names for part in split_perturbation(name)}
        parts = [split_perturbation(name) for name in self.truth.names]
        # "1/2": of two targets one occurs in a training perturbation.
        self.n_seen = [f"{len(seen & set(targets))}/{len(targets)}" for targets in parts]

    @cached_property
    def training(self) -> list[tuple[str, str, Effects]]:
        """(level, perturbation, effect) of the training side; one entry each where targets are left out."""
        if self.fold.holdout is None:
            return [("", name, self.pooled) for name in self.pooled.names]
        levels = self.fold.holdout[self.fold.train]
        found = []
        for level in sorted(set(levels)):
            effects = measure_effects(self.cells, self.fold.train[levels == level], self.gene_ids)
            found += [(level, name, effects) for name in effects.names]
        return found

    @cached_property
    def training_deltas(self) -> np.ndarray:
        """(training perturbations, G) changes, one row per perturbation and level."""
        return np.stack([effects.deltas[effects.names.index(name)] for _, name, effects in self.training])

    @property
    def training_mean(self) -> np.ndarray:
        """(G,) mean training change."""
        return self.training_deltas.mean(axis=0)

    def baseline_deltas(self) -> dict[str, np.ndarray]:
        """Predict the test changes without a network.

        Returns:
            Method -> (P, G) changes.
        """
        n_tests = len(self.truth.names)
        found = {
            "no change": baselines.no_change(n_tests, len(self.gene_ids)),
            "perturbed mean": baselines.perturbed_mean(self.training_deltas, n_tests),
            "control-matched mean": self._matched_mean(),
        }
        if self.fold.holdout is not None:
            return found | {"linear on control profile": self._linear_on_controls()}
        parts = [split_perturbation(name) for name in self.truth.names]
        # Of every fold if of any: all rows of the table are over the same units.
        if any(len(split_perturbation(name)) > 1 for name in self.truth.names + self.pooled.names):
            singles = dict(zip(self.pooled.names, self.pooled.deltas, strict=True))
            found["additive"] = baselines.additive(singles, parts, fallback=self.training_mean)
            found["matching mean"] = baselines.matching_mean(singles, parts, fallback=self.training_mean)
        responses = baselines.gene_factors(self.training_deltas)
        found["linear on gene PCA"] = self._linear_on_targets(responses, self.gene_ids)
        embeddings = self.gene_embeddings - self.gene_embeddings[self.gene_ids].mean(axis=0)
        _, _, axes = np.linalg.svd(embeddings[self.gene_ids], full_matrices=False)
        factors = embeddings @ axes[: baselines.N_FACTORS].T
        factors /= factors[self.gene_ids].std()  # trained embeddings are small, and the penalty is fixed
        every_token = np.arange(len(factors))
        found["linear on scDiVa genes"] = self._linear_on_targets(factors, every_token)
        known, wanted = self._target_factors(embeddings, every_token)
        for method, predict in (
            ("nearest targets by scDiVa genes", baselines.nearest_perturbations),
            ("random forest on scDiVa genes", baselines.random_forest),
        ):
            found[method] = predict(self.training_deltas, known, test_factors=wanted)
        return found

    def split_halves(self, *, n_splits: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Measure the test changes twice on disjoint halves of the cells.

        Args:
            n_splits: Splits.
            seed: Of the splits.

        Yields:
            Two (P, G) arrays of changes, groups matched.
        """
        rng = np.random.default_rng((seed, 11))
        perturbed = [self._residuals(self._test_cells(name)) for name in self.truth.names]
        controls = self._residuals(self._test_controls)
        for _ in range(n_splits):
            yield baselines.split_half_deltas(perturbed, controls, rng=rng)

    def predicted_p_values(
        self, name: str, change: np.ndarray, *, spread: np.ndarray | None = None, n_parts: int = 1
    ) -> np.ndarray:
        """Test a predicted change as if it had been measured on the cells of the truth.

        Args:
            name: Test perturbation.
            change: (G,) predicted change.
            spread: (G,) standard deviation of the predicted cells within their groups; default that of the
                measured ones.
            n_parts: Parts into which the cells, perturbed and controls, are split; one is tested on.

        Returns:
            (G,) p-values of Welch's t, 1 for genes that vary in neither group.
        """
        spread = self._residuals(self._test_cells(name)).std(axis=0, ddof=1) if spread is None else spread
        n_perturbed = int(self.truth.n_cells[self.truth.names.index(name)])
        n_cells = n_perturbed // n_parts, len(self._test_controls) // n_parts
        test = welch_test_of_moments(change, spreads=(spread, self._control_spread), n_cells=n_cells)
        return test["p_values"]

    def moved_spread(self, controls: np.ndarray, deltas: np.ndarray) -> np.ndarray:
        """(G,) standard deviation within groups of controls, rows (n,), that are moved by (G,) or (n, G)."""
        return (self._residuals(controls) + deltas).std(axis=0, ddof=1)

    def draw_controls(self, name: str, *, n_cells: int, seed: int) -> np.ndarray:
        """Draw test controls from the groups of the perturbed cells, in their proportions.

        Args:
            name: Test perturbation.
            n_cells: Cells drawn, or all controls where there are fewer.
            seed: Of the draw.

        Returns:
            Rows of controls; one may come twice where a group has few.
        """
        groups = self.cells.groups[self._test_cells(name)]
        controls = self._test_controls
        rng = np.random.default_rng((seed, 12))
        drawn = rng.choice(groups, min(n_cells, len(controls)))
        rows = []
        for group in sorted(set(drawn)):
            own = controls[self.cells.groups[controls] == group]
            n_own = int((drawn == group).sum())
            rows.append(rng.choice(own, n_own, replace=n_own > len(own)))
        return np.concatenate(rows)

    def draw_perturbed(self, name: str, *, n_cells: int, seed: int) -> np.ndarray:
        """Draw perturbed test cells without replacement."""
        return np.random.default_rng((seed, 13)).permutation(self._test_cells(name))[:n_cells]

    @cached_property
    def components(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (G,) and principal axes (G, 50) of training cells, in which clouds of cells are compared."""
        rows = np.random.default_rng(0).permutation(self.fold.train)[:MAX_CELLS_FOR_COMPONENTS]
        values = self.cells.dense(rows, self.gene_ids).astype(np.float64)
        mean = values.mean(axis=0)
        _, _, axes = np.linalg.svd(values - mean, full_matrices=False)
        return mean, axes[:N_COMPONENTS].T

    @cached_property
    def _test_controls(self) -> np.ndarray:
        return self.fold.test[self.cells.is_control[self.fold.test]]

    @cached_property
    def control_expression(self) -> np.ndarray:
        """(G,) mean of the test controls."""
        return self.cells.dense(self._test_controls, self.gene_ids).mean(axis=0, dtype=np.float64)

    @cached_property
    def _control_spread(self) -> np.ndarray:
        return self._residuals(self._test_controls).std(axis=0, ddof=1)

    @cached_property
    def _test_means(self) -> dict[str, np.ndarray]:
        return control_means(self.cells, self.fold.test, self.gene_ids)

    def _test_cells(self, name: str) -> np.ndarray:
        return self.fold.test[self.cells.perturbations[self.fold.test] == name]

    def _residuals(self, rows: np.ndarray) -> np.ndarray:
        means = np.stack([self._test_means[group] for group in self.cells.groups[rows]])
        return self.cells.dense(rows, self.gene_ids) - means

    def _matched_mean(self) -> np.ndarray:
        """Change of the training cells of the same groups; of the same perturbation where levels are out."""
        rows = self.fold.train[~self.cells.is_control[self.fold.train]]
        means = control_means(self.cells, self.fold.train, self.gene_ids)
        predicted = []
        for name in self.truth.names:
            own = rows
            if self.fold.holdout is not None and (self.cells.perturbations[rows] == name).any():
                own = rows[self.cells.perturbations[rows] == name]
            groups = self.cells.groups[own]
            deltas = {
                group: self.cells.dense(own[groups == group], self.gene_ids).mean(axis=0) - means[group]
                for group in sorted(set(groups))
            }
            wanted, sizes = np.unique(
                self.cells.groups[self._test_cells(name)].astype(str), return_counts=True
            )
            shares = dict(zip(wanted.tolist(), (sizes / sizes.sum()).tolist(), strict=True))
            predicted.append(baselines.control_matched_mean(deltas, [shares])[0])
        return np.stack(predicted)

    def _linear_on_targets(self, factors: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Predict from factors (n, K) of the genes ``tokens`` (n,); a target outside them has none."""
        row_of = {int(token): row for row, token in enumerate(tokens)}
        known, wanted = self._target_factors(factors, tokens)
        return baselines.linear_model(
            self.training_deltas,
            known,
            test_factors=wanted,
            gene_side=factors[[row_of[int(token)] for token in self.gene_ids]],
        )

    def _target_factors(self, factors: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean factors of the targets of training and test perturbations, NaN where one has none."""
        row_of = {int(token): row for row, token in enumerate(tokens)}

        def of_perturbations(names: Sequence[str]) -> np.ndarray:
            found = np.full((len(names), factors.shape[1]), np.nan)
            for row, name in enumerate(names):
                own = [row_of[int(token)] for token in self.targets[name] if int(token) in row_of]
                if own and len(own) == len(self.targets[name]):
                    found[row] = factors[own].mean(axis=0)
            return found

        return of_perturbations(self.pooled.names), of_perturbations(self.truth.names)

    def _linear_on_controls(self) -> np.ndarray:
        """Predict from principal components of the control profile of a level."""
        levels = np.asarray(self.fold.holdout)
        controls = self.fold.train[self.cells.is_control[self.fold.train]]
        names = sorted(set(levels[controls]))
        profiles = np.stack(
            [
                self.cells.dense(controls[levels[controls] == name], self.gene_ids).mean(axis=0)
                for name in names
            ]
        )
        centre = profiles.mean(axis=0)
        _, _, axes = np.linalg.svd(profiles - centre, full_matrices=False)
        axes = axes[: max(1, min(baselines.N_FACTORS, len(names) - 1))]
        of_level = dict(zip(names, (profiles - centre) @ axes.T, strict=True))
        own = (self.cells.dense(self._test_controls, self.gene_ids).mean(axis=0) - centre) @ axes.T
        return baselines.linear_model(
            self.training_deltas,
            np.stack([of_level[level] for level, _, _ in self.training]),
            test_factors=np.tile(own, (len(self.truth.names), 1)),
            gene_side=baselines.gene_factors(self.training_deltas),
        )
