"""Perturbed cells and their controls: names, targeted genes, matched changes, pairs of cells.

Notable choices:
- A perturbation is named by its targets, sorted and joined by "+". `GENE+ctrl` and `ctrl` are read and never
  written.
- A change is taken within match groups (cells of one batch, donor, cell type) and averaged over the groups by
  their perturbed cells, so a group that is rare among the perturbed does not pass for an effect.
- Tests of single genes see the cells after their group's control mean is taken away.

Dimensions: N cells in a file, V vocabulary, G genes of a panel, P perturbations.
Source: METHOD.md section 7.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from modeling_scdiva.metrics.perturbation_de import FDR_LIMIT, welch_test
from modeling_scdiva.tasks.cells import CellTokenizer, TokenizedCells, obs_column, read_cells, shown
from modeling_scdiva.tasks.genes import gene_tokens

CONTROL = "control"
# Written for a control in GEARS files; read, never written.
CONTROL_WORDS = frozenset({"ctrl", CONTROL})
ALL_CELLS = "all"
# What of the reading arguments also decides which columns are genes.
MATCHING_KEYS = ("layer", "expression_is_log1p", "gene_id_key", "min_gene_overlap")


@dataclass(frozen=True)
class PerturbedCells:
    """Cells of one screen.

    Attributes:
        inputs: The cells as the network reads them, cut to its length.
        values: (N, V) CSR float32 log1p of normalised counts, all genes of the vocabulary.
        perturbations: (N,) name of the perturbation, "control" for controls.
        groups: (N,) match group.
        measured_ids: (M,) tokens of the genes that the file measures.
    """

    inputs: TokenizedCells
    values: csr_matrix
    perturbations: np.ndarray
    groups: np.ndarray
    measured_ids: np.ndarray

    @property
    def is_control(self) -> np.ndarray:
        """(N,) bool."""
        return self.perturbations == CONTROL

    def dense(self, rows: np.ndarray, gene_ids: np.ndarray) -> np.ndarray:
        """Give the values of some cells and genes.

        Args:
            rows: (n,) cells.
            gene_ids: (G,) tokens.

        Returns:
            (n, G) float32.
        """
        return self.values[rows][:, gene_ids].toarray()


@dataclass(frozen=True)
class Effects:
    """Measured changes of perturbations against matched controls.

    Attributes:
        names: P perturbations.
        deltas: (P, G) float64 changes of mean log1p expression.
        t: (P, G) Welch's t of the cells, each minus the control mean of its group.
        is_de: (P, G) bool, genes that respond: false discovery rate below 0.05.
        standard_errors: (P, G) of the changes.
        n_cells: (P,) perturbed cells.
    """

    names: list[str]
    deltas: np.ndarray
    t: np.ndarray
    is_de: np.ndarray
    standard_errors: np.ndarray
    n_cells: np.ndarray


def split_perturbation(name: str, *, control_label: str = CONTROL) -> tuple[str, ...]:
    """Read the targets from the name of a perturbation.

    Args:
        name: Such as "A", "B+A", "A+ctrl", "ctrl".
        control_label: How controls are called.

    Returns:
        The targets, sorted, each once; none for a control.

    Raises:
        ValueError: If a part is empty.
    """
    if name == control_label:
        return ()
    parts = [part.strip() for part in str(name).split("+")]
    if not all(parts):
        msg = f"The perturbation {name!r} has an empty part. Write the targets joined by '+', such as 'A+B'."
        raise ValueError(msg)
    return tuple(sorted({part for part in parts if part != control_label and part not in CONTROL_WORDS}))


def perturbation_name(parts: Sequence[str]) -> str:
    """Name a perturbation by its targets, sorted and joined by "+"; none gives "control"."""
    return "+".join(sorted(parts)) or CONTROL


def read_perturbations(adata: Any, *, perturbation_key: str, control_label: str = CONTROL) -> np.ndarray:
    """Read what was done to each cell.

    Args:
        adata: AnnData with N cells, controls among them.
        perturbation_key: Column of ``obs`` that names the perturbation of each cell, pairs as "A+B".
        control_label: Entry of that column for controls.

    Returns:
        (N,) names as `perturbation_name` writes them, "control" for controls.

    Raises:
        ValueError: If there are no controls.
    """
    labels = obs_column(adata, perturbation_key, what="perturbations")
    names = {
        label: perturbation_name(split_perturbation(label, control_label=control_label))
        for label in sorted(set(labels))
    }
    # "ctrl" stands for the default label; any other label was named, and must be there.
    if CONTROL not in names.values() or control_label not in {*labels, *CONTROL_WORDS}:
        msg = (
            f"obs[{perturbation_key!r}] holds no control (control_label={control_label!r}). Labels: "
            f"{shown(sorted(names))}. Name the label of the controls."
        )
        raise ValueError(msg)
    return np.array([names[label] for label in labels], dtype=object)


def control_cells(adata: Any, *, perturbation_key: str, control_label: str = CONTROL) -> Any:
    """Take the controls out of a screen. A screen without any is refused, with the labels it has.

    Args:
        adata: AnnData with N cells.
        perturbation_key: Column of ``obs`` that names the perturbation of each cell.
        control_label: Entry of that column for controls.

    Returns:
        View of the controls, for `predict_perturbation` or `clamp_genes`.
    """
    names = read_perturbations(adata, perturbation_key=perturbation_key, control_label=control_label)
    return adata[names == CONTROL]


def read_perturbed_cells(
    adata: Any,
    *,
    tokenizer: CellTokenizer,
    perturbation_key: str,
    control_label: str = CONTROL,
    match_keys: Sequence[str] = (),
    **reading: Any,
) -> PerturbedCells:
    """Read a screen: tokens, values, names and match groups.

    Args:
        adata: AnnData with N cells, controls among them.
        tokenizer: Tokenizer of the model.
        perturbation_key: Column of ``obs`` that names the perturbation of each cell.
        control_label: Entry of that column for controls.
        match_keys: Columns of ``obs`` that a cell and its controls share; none compares with all controls.
        **reading: How to read the AnnData, as in `ScDivaTokenizer.iter_cells`, ``max_genes`` among it.

    Returns:
        The cells in the order of the file.

    Raises:
        ValueError: If there are controls only, or perturbed cells of a group without any control.
    """
    max_genes = reading.pop("max_genes", None) or tokenizer.max_genes
    everything = read_cells(adata, tokenizer=tokenizer, max_genes=tokenizer.vocab_size, **reading)
    perturbations = read_perturbations(adata, perturbation_key=perturbation_key, control_label=control_label)
    is_control = perturbations == CONTROL
    if is_control.all():
        msg = (
            f"obs[{perturbation_key!r}] holds controls only (control_label={control_label!r}). Give "
            "perturbed cells beside them."
        )
        raise ValueError(msg)
    columns = [obs_column(adata, key, what="cells that are matched") for key in match_keys]
    groups = np.array(
        [" | ".join(parts) for parts in zip(*columns, strict=True)] or [ALL_CELLS] * len(perturbations),
        dtype=object,
    )
    lonely = sorted(set(groups[~is_control]) - set(groups[is_control]))
    if lonely:
        n_cells = int(np.isin(groups, lonely).sum())
        msg = (
            f"{len(lonely)} groups of {list(match_keys)} hold {n_cells} perturbed cells and no control: "
            f"{shown(lonely)}. Leave these cells out, or match by fewer columns."
        )
        raise ValueError(msg)
    settings = {key: reading[key] for key in MATCHING_KEYS if key in reading}
    matched = np.asarray(tokenizer.match_genes(adata, **settings).token_ids)
    return PerturbedCells(
        inputs=cut_cells(everything, max_genes),
        values=cell_values(everything, tokenizer.vocab_size),
        perturbations=perturbations,
        groups=groups,
        measured_ids=np.unique(matched[matched >= 0]),
    )


def cut_cells(cells: TokenizedCells, max_genes: int) -> TokenizedCells:
    """Keep the first genes of each ranked cell.

    Args:
        cells: N cells in ranking order.
        max_genes: Genes kept, at least 1.

    Returns:
        The same cells, shorter.

    Raises:
        ValueError: If ``max_genes`` is not positive.
    """
    if max_genes < 1:
        msg = f"max_genes must be at least 1, got {max_genes}."
        raise ValueError(msg)
    lengths = np.minimum(cells.n_genes, max_genes)
    places = np.arange(len(cells.token_ids)) - np.repeat(cells.offsets[:-1], cells.n_genes)
    is_kept = places < max_genes
    return TokenizedCells(
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        token_ids=cells.token_ids[is_kept],
        values=cells.values[is_kept],
        lat_token_id=cells.lat_token_id,
        pad_token_id=cells.pad_token_id,
    )


def cell_values(cells: TokenizedCells, vocab_size: int) -> csr_matrix:
    """Lay the values of uncut cells out as a matrix.

    Args:
        cells: N cells with all their genes.
        vocab_size: V.

    Returns:
        (N, V) CSR float32; zero where a gene is silent or not measured.
    """
    shape = (cells.n_cells, vocab_size)
    matrix = csr_matrix((cells.values, cells.token_ids, cells.offsets), shape=shape)
    matrix.sort_indices()
    return matrix


def target_tokens(
    perturbations: Sequence[str],
    *,
    vocabulary: Any,
    perturbation_genes: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, np.ndarray]:
    """Find the targeted genes of perturbations.

    Args:
        perturbations: Names, such as "A" or "A+B".
        vocabulary: `GeneVocabulary` of the tokenizer.
        perturbation_genes: Part of a name (or a whole name) -> genes it stands for; an empty list leaves
            `<pert>` alone. Parts that are not listed are genes themselves.

    Returns:
        Name -> tokens of its targets, sorted, each once.

    Raises:
        KeyError: If a target is not in the vocabulary.
    """
    known = {
        perturbation_name(split_perturbation(name)): list(genes)
        for name, genes in (perturbation_genes or {}).items()
    }
    targets, unknown = {}, {}
    for name in perturbations:
        parts = [name] if name in known else split_perturbation(name)
        genes = [gene for part in parts for gene in known.get(part, [part])]
        try:
            targets[name] = np.unique(gene_tokens(genes, vocabulary=vocabulary, what="targets"))
        except KeyError:
            unknown[name] = genes
    if unknown:
        first = next(iter(unknown))
        msg = (
            f"{len(unknown)} of {len(perturbations)} perturbations target genes outside the vocabulary "
            f"({vocabulary.n_genes:,} genes): {shown(unknown)}. Leave them out, or say what they stand for: "
            f"perturbation_genes={{{first!r}: ['a gene it has']}}, or an empty list for no known target."
        )
        raise KeyError(msg)
    return targets


def unknown_targets(
    perturbations: Sequence[str],
    *,
    vocabulary: Any,
    perturbation_genes: Mapping[str, Sequence[str]] | None = None,
    control_label: str = CONTROL,
) -> list[str]:
    """List the perturbations whose targets the vocabulary lacks, to leave them out or list them as bare.

    Args:
        perturbations: Names, repeated or not, controls among them.
        vocabulary: `GeneVocabulary` of the tokenizer.
        perturbation_genes: As in `target_tokens`.
        control_label: How controls are called.

    Returns:
        Names as `perturbation_name` writes them, sorted.
    """
    found = set()
    for label in set(map(str, perturbations)):
        name = perturbation_name(split_perturbation(label, control_label=control_label))
        try:
            target_tokens([name], vocabulary=vocabulary, perturbation_genes=perturbation_genes)
        except KeyError:
            found.add(name)
    return sorted(found - {CONTROL})


def measure_effects(
    cells: PerturbedCells, rows: np.ndarray, gene_ids: np.ndarray, *, fdr_limit: float = FDR_LIMIT
) -> Effects:
    """Measure the change of every perturbation among some cells.

    Args:
        cells: The screen.
        rows: Cells to use, controls and perturbed.
        gene_ids: (G,) tokens of the panel.
        fdr_limit: A gene responds below this false discovery rate (Benjamini-Hochberg over the panel).

    Returns:
        The effects, perturbations sorted by name.

    Raises:
        ValueError: If a group has no controls among the rows, or a perturbation has a single cell.
    """
    rows = np.asarray(rows)
    is_control = cells.is_control[rows]
    means = control_means(cells, rows, gene_ids)
    names = sorted(set(cells.perturbations[rows[~is_control]]))
    missing = sorted(set(cells.groups[rows[~is_control]]) - set(means))
    if missing:
        msg = f"No control among the cells of {shown(missing)}. Every group needs controls to compare with."
        raise ValueError(msg)

    def residuals(of: np.ndarray) -> np.ndarray:
        return cells.dense(of, gene_ids) - np.stack([means[group] for group in cells.groups[of]])

    used = np.isin(cells.groups[rows], list(set(cells.groups[rows[~is_control]])))
    controls = residuals(rows[is_control & used])
    found: list[dict[str, Any]] = []
    for name in names:
        own = rows[cells.perturbations[rows] == name]
        if len(own) < 2:
            msg = f"The perturbation {name!r} has a single cell. Leave out perturbations with so few cells."
            raise ValueError(msg)
        changed = residuals(own)
        test = welch_test(changed, controls)
        found.append(
            {
                "deltas": changed.mean(axis=0, dtype=np.float64),
                "t": test["t"],
                "is_de": test["fdr"] < fdr_limit,
                "standard_errors": test["standard_errors"],
                "n_cells": len(own),
            }
        )
    return Effects(names, **{name: np.array([of_one[name] for of_one in found]) for name in found[0]})


def control_means(cells: PerturbedCells, rows: np.ndarray, gene_ids: np.ndarray) -> dict[str, np.ndarray]:
    """Average the controls of each match group.

    Args:
        cells: The screen.
        rows: Cells to use; perturbed ones are passed over.
        gene_ids: (G,) tokens.

    Returns:
        Group -> (G,) float64 mean log1p values.
    """
    controls = np.asarray(rows)[cells.is_control[rows]]
    groups = cells.groups[controls]
    return {
        group: cells.dense(controls[groups == group], gene_ids).mean(axis=0, dtype=np.float64)
        for group in sorted(set(groups))
    }


def gene_weights(effects: Effects) -> np.ndarray:
    """Weigh genes by how strongly they respond to the training perturbations.

    Args:
        effects: Of training perturbations only.

    Returns:
        (G,) 1 + mean absolute t, scaled to mean 1.
    """
    weights = 1.0 + np.abs(effects.t).mean(axis=0)
    return weights / weights.mean()


def transport_plan(perturbed: np.ndarray, control: np.ndarray, *, n_components: int = 30) -> np.ndarray:
    """Pair perturbed cells with controls so that together they move least (exact optimal transport, POT).

    Args:
        perturbed: (n, G) log1p values.
        control: (m, G) log1p values.
        n_components: Principal components, of both groups together, in which distances are taken.

    Returns:
        (n, m) row-stochastic matrix: with which controls each perturbed cell is paired.

    Raises:
        ImportError: If POT is not installed.
    """
    try:
        import ot
    except ImportError as error:
        msg = 'pairing="optimal_transport" needs POT: pip install "scdiva[eval]".'
        raise ImportError(msg) from error
    both = np.concatenate([perturbed, control]).astype(np.float64)
    both -= both.mean(axis=0)
    _, _, axes = np.linalg.svd(both, full_matrices=False)
    scores = both @ axes[:n_components].T
    costs = ot.dist(scores[: len(perturbed)], scores[len(perturbed) :])  # squared Euclidean
    plan = ot.emd(ot.unif(len(perturbed)), ot.unif(len(control)), costs)
    return plan / plan.sum(axis=1, keepdims=True)
