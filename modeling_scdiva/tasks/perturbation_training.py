"""What a model learns from a screen: settings, panel, examples and batches, and what is held out to stop.

Notable choices:
- An example is one perturbed cell: a control of its match group goes in, the change comes out. By default the
  change is that of the group's mean, which has little noise; with `pairing="optimal_transport"` it is the
  difference to the paired control.
- Gene weights, responding genes and the panel are taken from the training perturbations alone.
- Whole perturbations (or whole match groups) are held out to decide when to stop.

Dimensions: B cells in a loader batch, G genes of a panel, Q genes of a batch.
Source: METHOD.md section 7.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from modeling_scdiva.adapters import Trainable
from modeling_scdiva.tasks.cells import TokenizedCells, encoder_of, shown
from modeling_scdiva.tasks.genes import gene_tokens
from modeling_scdiva.tasks.perturbation_data import (
    Effects,
    PerturbedCells,
    control_means,
    gene_weights,
    transport_plan,
)
from modeling_scdiva.tasks.perturbation_network import ScDivaForPerturbation, add_pert_token

N_VALIDATION_CONTROLS = 64
MIN_UNITS_FOR_VALIDATION = 4
UNITS = ("perturbation", "group")


@dataclass(frozen=True)
class PerturbationSettings:
    """What is learned from a screen.

    Attributes:
        match_keys: Columns of ``obs`` that a cell and its controls share, such as batch, donor, cell type.
        perturbation_genes: Part of a perturbation's name -> its targeted genes, where it is no gene itself;
            an empty list for no known target.
        pairing: "mean" learns the change of the group's mean, "optimal_transport" the difference to a paired
            control (POT).
        trainable: "lora", "full", "last_layers" or "head"; the decoder of changes is always trained.
        genes: Genes to learn; default those detected in ``min_cells`` training cells.
        min_cells: See ``genes``.
        n_query_genes: Genes drawn for each batch from a wider panel.
        with_mean: Start from the mean change of the training perturbations instead of from no change.
        max_cells: Perturbed cells used of each perturbation and group, at most.
        validation_fraction: Share of perturbations (or groups) held out for early stopping; 0 for none.
        validation_unit: "perturbation", or "group" to hold out match groups.
    """

    match_keys: Sequence[str] = ()
    perturbation_genes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    pairing: Literal["mean", "optimal_transport"] = "mean"
    trainable: Trainable = "full"
    genes: Sequence[str] | None = None
    min_cells: int = 10
    n_query_genes: int = 256
    with_mean: bool = True
    max_cells: int = 200
    validation_fraction: float = 0.15
    validation_unit: Literal["perturbation", "group"] = "perturbation"

    def __post_init__(self) -> None:
        if isinstance(self.match_keys, str):
            msg = f"match_keys must be a list of columns, got the text {self.match_keys!r}."
            raise TypeError(msg)
        if self.pairing not in ("mean", "optimal_transport"):
            msg = f'pairing must be "mean" or "optimal_transport", got {self.pairing!r}.'
            raise ValueError(msg)
        if self.validation_unit not in UNITS:
            msg = f'validation_unit must be "perturbation" or "group", got {self.validation_unit!r}.'
            raise ValueError(msg)
        for name in ("min_cells", "n_query_genes", "max_cells"):
            if getattr(self, name) < 1:
                msg = f"{name} must be at least 1, got {getattr(self, name)}."
                raise ValueError(msg)
        if not 0.0 <= self.validation_fraction < 1.0:
            msg = f"validation_fraction must lie in [0, 1), got {self.validation_fraction}."
            raise ValueError(msg)


def with_delta_decoder(model: Any, *, seed: int = 0, keep_weights: bool = True) -> ScDivaForPerturbation:
    """Put a copy of a model's encoder under a fresh decoder of changes.

    Args:
        model: Any scDiVa model; stays as it is.
        seed: Of the fresh weights; the global generator stays as it is.
        keep_weights: False makes the encoder fresh too, the baseline of no pretraining.

    Returns:
        A model to be fine-tuned, on the device of the encoder.
    """
    encoder = encoder_of(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = ScDivaForPerturbation(copy.deepcopy(encoder.config))
    if keep_weights:
        fresh.model.load_state_dict(encoder.state_dict())
    return fresh.to(encoder.device)


class TrainingBatches:
    """Examples (perturbed cells) and the batches they make, a function of (rows, epoch) and the seed."""

    def __init__(
        self,
        cells: PerturbedCells,
        rows: np.ndarray,
        effects: Effects,
        *,
        gene_ids: np.ndarray,
        targets: Mapping[str, np.ndarray],
        settings: PerturbationSettings,
        seed: int,
    ) -> None:
        self.cells, self.gene_ids, self.targets = cells, gene_ids, targets
        self.settings, self.seed = settings, seed
        weights = gene_weights(effects)
        # In units of the training changes: predicting no change costs 1.
        self.weights = weights / max(float(((effects.deltas**2) @ weights).mean() / len(gene_ids)), 1e-12)
        self.is_de = dict(zip(effects.names, effects.is_de, strict=True))
        self.means = control_means(cells, rows, gene_ids)
        self.controls: dict[str, np.ndarray] = {}
        self.deltas: dict[tuple[str, str], np.ndarray] = {}
        self.plans: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        rng = np.random.default_rng((seed, 0))
        chosen = []
        is_control = cells.is_control[rows]
        for name in effects.names:
            own = rows[cells.perturbations[rows] == name]
            for group in sorted(set(cells.groups[own])):
                members = own[cells.groups[own] == group]
                controls = rows[is_control & (cells.groups[rows] == group)]
                self.controls[group] = controls
                self.deltas[name, group] = (
                    cells.dense(members, gene_ids).mean(axis=0, dtype=np.float64) - self.means[group]
                ).astype(np.float32)
                members = rng.permutation(members)[: settings.max_cells]
                chosen.append(members)
                if settings.pairing == "optimal_transport":
                    self._pair(members, rng.permutation(controls)[: 2 * settings.max_cells])
        self.examples = np.concatenate(chosen)

    @property
    def n_examples(self) -> int:
        """Number of perturbed cells."""
        return len(self.examples)

    def _pair(self, members: np.ndarray, controls: np.ndarray) -> None:
        plan = transport_plan(
            self.cells.dense(members, self.gene_ids), self.cells.dense(controls, self.gene_ids)
        )
        for member, shares in zip(members, plan, strict=True):
            partners = np.flatnonzero(shares > 0)
            self.plans[int(member)] = (controls[partners], shares[partners] / shares[partners].sum())

    def make(self, config: Any, rows: np.ndarray, epoch: int) -> dict[str, torch.Tensor]:
        """Make one batch.

        Args:
            config: `ScDivaConfig` of the model.
            rows: (B,) examples.
            epoch: Another epoch, other controls and genes.

        Returns:
            Controls, targets, genes asked for, changes, weights and responding genes.
        """
        rng = np.random.default_rng((self.seed, 1, epoch, *map(int, rows[:2])))
        cells = self.examples[rows]
        n_genes = len(self.gene_ids)
        queries = np.arange(n_genes)
        if n_genes > self.settings.n_query_genes:
            queries = np.sort(rng.choice(n_genes, self.settings.n_query_genes, replace=False))
        names, groups = self.cells.perturbations[cells], self.cells.groups[cells]
        if self.settings.pairing == "mean":
            controls = np.array([rng.choice(self.controls[group]) for group in groups])
            deltas = np.stack([self.deltas[key][queries] for key in zip(names, groups, strict=True)])
        else:
            controls = np.array([rng.choice(found, p=shares) for found, shares in map(self._partners, cells)])
            chosen = self.gene_ids[queries]
            deltas = self.cells.dense(cells, chosen) - self.cells.dense(controls, chosen)
        inputs = perturbation_inputs(
            config, self.cells.inputs, controls, [self.targets[name] for name in names]
        )
        return inputs | {
            "gene_ids": torch.from_numpy(self.gene_ids[queries]),
            "delta_labels": torch.from_numpy(deltas),
            "gene_weights": torch.from_numpy(self.weights[queries].astype(np.float32)),
            "is_de": torch.from_numpy(np.stack([self.is_de[name][queries] for name in names])),
        }

    def _partners(self, cell: int) -> tuple[np.ndarray, np.ndarray]:
        return self.plans[int(cell)]


def panel_genes(
    cells: PerturbedCells, rows: np.ndarray, *, vocabulary: Any, settings: PerturbationSettings
) -> np.ndarray:
    """Choose the genes whose change is learned.

    Args:
        cells: The screen.
        rows: Training cells.
        vocabulary: `GeneVocabulary` of the tokenizer.
        settings: ``genes`` and ``min_cells`` are read.

    Returns:
        (G,) tokens.

    Raises:
        ValueError: If a named gene is not measured, or no gene is left.
    """
    if settings.genes is not None:
        gene_ids = gene_tokens(settings.genes, vocabulary=vocabulary, what="genes")
        absent = [vocabulary.gene_symbols[token] for token in np.setdiff1d(gene_ids, cells.measured_ids)]
        if absent:
            msg = f"{len(absent)} genes are not measured in these cells: {shown(absent)}. Leave them out."
            raise ValueError(msg)
        return gene_ids
    n_detected = np.asarray((cells.values[rows] > 0).sum(axis=0)).ravel()
    gene_ids = cells.measured_ids[n_detected[cells.measured_ids] >= settings.min_cells]
    if len(gene_ids) == 0:
        msg = f"No gene is detected in min_cells={settings.min_cells} of {len(rows)} cells. Lower min_cells."
        raise ValueError(msg)
    return gene_ids


def perturbation_inputs(
    config: Any, cells: TokenizedCells, rows: np.ndarray, targets: Sequence[np.ndarray]
) -> dict[str, torch.Tensor]:
    """Lay control cells out with `<pert>` and their targets.

    Args:
        config: `ScDivaConfig` of the model.
        cells: Tokenised cells.
        rows: (B,) cells.
        targets: B times the tokens of the targeted genes.

    Returns:
        ``input_ids``, ``expression_values``, ``attention_mask``, each (B, S), and ``target_ids`` (B, T).
    """
    batch = cells.batch(rows)
    names = ("input_ids", "expression_values", "attention_mask")
    widened = add_pert_token(*(batch[name] for name in names), pert_token_id=config.pert_token_id)
    target_ids = np.full((len(targets), max(map(len, targets), default=0)), config.pad_token_id)
    for row, target in enumerate(targets):
        target_ids[row, : len(target)] = target
    return dict(zip(names, widened, strict=True)) | {
        "target_ids": torch.from_numpy(target_ids.astype(np.int64))
    }


def validation_units(
    cells: PerturbedCells, rows: np.ndarray, settings: PerturbationSettings, seed: int
) -> tuple[list[str], str]:
    """Choose perturbations or groups for early stopping.

    Args:
        cells: The screen.
        rows: Training cells.
        settings: ``validation_fraction`` and ``validation_unit`` are read.
        seed: Of the choice.

    Returns:
        The chosen, none where there are too few, and which of the two they are.
    """
    kind = settings.validation_unit
    perturbed = rows[~cells.is_control[rows]]
    column = cells.perturbations if kind == "perturbation" else cells.groups
    units = sorted(set(column[perturbed]))
    if settings.validation_fraction == 0 or len(units) < MIN_UNITS_FOR_VALIDATION:
        return [], kind
    n_held = max(1, round(settings.validation_fraction * len(units)))
    return sorted(np.random.default_rng((seed, 2)).permutation(units)[:n_held].tolist()), kind


def validation_controls(cells: PerturbedCells, rows: np.ndarray, seed: int) -> np.ndarray:
    """Draw controls for the validation, from the groups of its perturbed cells in their proportions.

    Args:
        cells: The screen.
        rows: Validation cells, with controls.
        seed: Of the draw.

    Returns:
        (64,) cells, some perhaps twice.
    """
    is_control = cells.is_control[rows]
    groups = cells.groups[rows[~is_control]]
    rng = np.random.default_rng((seed, 3))
    drawn = rng.choice(groups, N_VALIDATION_CONTROLS)
    return np.array([rng.choice(rows[is_control & (cells.groups[rows] == group)]) for group in drawn])
