"""Abnormal cells made out of normal ones, and scores of how well a number per cell tells the two apart.

Each maker takes an AnnData of raw counts and returns a new one with the abnormal counts in ``X``. What it
leaves as it was is what a detector cannot have used.

Notable choices:
- Molecules are moved as whole molecules: ambient ones replace as many of the cell's own, drawn without
  replacement, and a doublet at the depth of single cells has exactly that depth.
- Doublets are drawn evenly from all pairs of different cells, or of cells of different types.
- A wrong label is drawn as the labels of the other classes occur, so that a rare label is no sign of error.
- The interval of an AUROC resamples normal and abnormal cells apart, or cell by cell where both are versions
  of the same cells; `bootstrap_interval` has no way to draw two groups.
- No layer, embedding or annotation of ``uns`` is taken over. Columns of ``obs`` are, also those that were
  computed from the old counts, such as ``total_counts``.

Dimensions: N cells, G genes, M doublets.
Source: METHOD.md section 6. Doublets: Wolock et al. 2019 (Scrublet), Cell Systems 8. Ambient molecules: Young
and Behjati 2020 (SoupX), GigaScience 9.
"""

from collections.abc import Sequence
from typing import Any, Literal

import anndata
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix
from sklearn.metrics import average_precision_score, roc_auc_score

from modeling_scdiva.metrics.imputation import checked_counts
from modeling_scdiva.tasks.cells import refuse_path, whole_counts

INTERVAL_LEVEL = 0.95


def shuffle_genes(
    adata: Any,
    rng: np.random.Generator,
    *,
    among: Literal["all", "detected"] = "all",
    layer: str | None = None,
) -> anndata.AnnData:
    """Permute the counts of each cell among the genes; library size and number of detected genes stay.

    Args:
        adata: AnnData with N cells and G genes. Leave genes out beforehand that a detector does not read:
            counts would move there and be lost to it.
        rng: Source of randomness; equal state, equal result.
        among: ``all`` genes of the file, or only those ``detected`` in the cell, which keeps its set of genes
            and changes their ranking.
        layer: Where the counts are, as in `whole_counts`.

    Returns:
        AnnData (N, G), cell by cell the cells of ``adata``: ``X`` CSR int64, same ``obs`` and ``var``.

    Raises:
        ValueError: If ``among`` is neither of the two.
    """
    if among not in {"all", "detected"}:
        msg = f"among must be 'all' or 'detected', got {among!r}."
        raise ValueError(msg)
    counts = _counts_of(adata, layer)
    for row in range(counts.shape[0]):
        entries = slice(counts.indptr[row], counts.indptr[row + 1])
        genes = counts.indices[entries] if among == "detected" else counts.shape[1]
        counts.indices[entries] = rng.choice(genes, entries.stop - entries.start, replace=False)
    counts.has_sorted_indices = False
    return _with_counts(adata, counts)


def make_doublets(
    adata: Any,
    n_doublets: int,
    rng: np.random.Generator,
    *,
    cell_types: Sequence[Any] | np.ndarray | None = None,
    keep_depth: Literal["mean", "parent"] | None = None,
    layer: str | None = None,
) -> anndata.AnnData:
    """Add up the counts of two different cells.

    Doublets form within one capture: pass the cells of one donor or plate at a time.

    Args:
        adata: AnnData with N cells and G genes.
        n_doublets: Doublets M, at least 1; a pair may come twice.
        rng: Source of randomness; equal state, equal result.
        cell_types: (N,) type of each cell; parents are of different types then.
        keep_depth: Molecules that are kept of the sum, drawn without replacement: as many as the parents have
            on average (``mean``), which is more than half of single cells have where depths are skewed, or as
            many as one parent has (``parent``), which is distributed as the depth of single cells is. All of
            them by default.
        layer: Where the counts are, as in `whole_counts`.

    Returns:
        AnnData (M, G): ``X`` CSR int64, same ``var``, ``obs["parent_1"]`` and ``obs["parent_2"]`` the names
        of the parents; with ``cell_types`` also ``obs["cell_type_1"]`` and ``obs["cell_type_2"]``.

    Raises:
        ValueError: If ``n_doublets`` is not positive, ``keep_depth`` is unknown, there are fewer than two
            cells, or types are missing, of another length or all the same.
    """
    if n_doublets < 1:
        msg = f"n_doublets must be at least 1, got {n_doublets}."
        raise ValueError(msg)
    if keep_depth not in {None, "mean", "parent"}:
        msg = f"keep_depth must be 'mean', 'parent' or None, got {keep_depth!r}."
        raise ValueError(msg)
    counts = _counts_of(adata, layer)
    n_cells = counts.shape[0]
    if n_cells < 2:
        msg = f"A doublet needs two different cells, got {n_cells}. Pass more cells."
        raise ValueError(msg)
    types = np.arange(n_cells) if cell_types is None else _checked_labels(cell_types, "cell_types")
    if len(types) != n_cells:
        msg = f"cell_types must hold one type per cell, got {len(types)} types and {n_cells} cells."
        raise ValueError(msg)
    first, second = _pairs_of_different(types, n_doublets, rng)
    doublets = csr_matrix(counts[first] + counts[second])
    if keep_depth is not None:
        sizes = np.asarray(counts.sum(axis=1)).ravel()
        depth = sizes[first] if keep_depth == "parent" else np.rint((sizes[first] + sizes[second]) / 2)
        doublets = _draw_molecules(doublets, depth.astype(np.int64), rng)
    names = np.asarray(adata.obs_names)
    obs = pd.DataFrame({"parent_1": names[first], "parent_2": names[second]})
    obs.index = pd.Index([f"doublet_{row}" for row in range(n_doublets)])
    if cell_types is not None:
        obs["cell_type_1"], obs["cell_type_2"] = types[first], types[second]
    return _with_counts(adata, doublets, obs=obs)


def add_ambient(
    adata: Any, fraction: float, rng: np.random.Generator, *, layer: str | None = None
) -> anndata.AnnData:
    """Replace a share of the molecules of each cell by molecules of the mean profile; library size stays.

    Args:
        adata: AnnData with N cells and G genes; all their molecules together are the mean profile.
        fraction: Share of the molecules that is replaced, in (0, 1], rounded to whole molecules in each cell.
        rng: Source of randomness; equal state, equal result.
        layer: Where the counts are, as in `whole_counts`.

    Returns:
        AnnData (N, G), cell by cell the cells of ``adata``: ``X`` CSR int64, same ``obs`` and ``var``.

    Raises:
        ValueError: If ``fraction`` lies outside (0, 1], or there is no molecule.
    """
    if not 0.0 < fraction <= 1.0:
        msg = f"fraction must lie in (0, 1], got {fraction}. It is the share of molecules to replace."
        raise ValueError(msg)
    counts = _counts_of(adata, layer)
    totals = np.asarray(counts.sum(axis=0), dtype=np.float64).ravel()
    if not totals.any():
        msg = f"The {counts.shape[0]} cells hold no molecule, so they have no mean profile. Check the counts."
        raise ValueError(msg)
    sizes = np.asarray(counts.sum(axis=1)).ravel()
    n_replaced = np.rint(fraction * sizes).astype(np.int64)
    rows = []
    for n_ambient in n_replaced:
        ambient = rng.multinomial(n_ambient, totals / totals.sum())
        genes = np.flatnonzero(ambient)
        rows.append((genes, ambient[genes]))
    genes, molecules = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    offsets = np.cumsum([0, *(len(of_cell) for of_cell, _ in rows)])
    ambient_counts = csr_matrix((molecules, genes, offsets), shape=counts.shape)
    return _with_counts(adata, _draw_molecules(counts, sizes - n_replaced, rng) + ambient_counts)


def thin_cells(
    adata: Any, keep_fraction: float, rng: np.random.Generator, *, layer: str | None = None
) -> anndata.AnnData:
    """Simulate a shallower run by keeping each molecule with a fixed probability.

    Args:
        adata: AnnData with N cells and G genes.
        keep_fraction: Probability that one molecule is kept, in (0, 1].
        rng: Source of randomness; equal state, equal result.
        layer: Where the counts are, as in `whole_counts`.

    Returns:
        AnnData (N, G), cell by cell the cells of ``adata``: ``X`` CSR int64, nowhere above the input, a cell
        may be left without a molecule; same ``obs`` and ``var``.

    Raises:
        ValueError: If ``keep_fraction`` lies outside (0, 1].
    """
    if not 0.0 < keep_fraction <= 1.0:
        msg = f"keep_fraction must lie in (0, 1], got {keep_fraction}. Use 1.0 to keep every molecule."
        raise ValueError(msg)
    counts = _counts_of(adata, layer)
    counts.data = rng.binomial(counts.data, keep_fraction)
    return _with_counts(adata, counts)


def wrong_labels(
    labels: Sequence[Any] | np.ndarray, fraction: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Give a share of the cells the label of another class.

    Args:
        labels: (N,) class of each cell, at least two classes.
        fraction: Share of the cells that get a wrong label, in (0, 1), rounded to whole cells.
        rng: Source of randomness; equal state, equal result.

    Returns:
        (N,) labels, a copy, and (N,) bool, True where the label is wrong.

    Raises:
        ValueError: If ``fraction`` lies outside (0, 1) or is less than one cell, or labels are missing or all
            the same.
    """
    if not 0.0 < fraction < 1.0:
        msg = f"fraction must lie in (0, 1), got {fraction}. It is the share of cells to label wrongly."
        raise ValueError(msg)
    names = _checked_labels(labels, "labels")
    n_wrong = round(fraction * len(names))
    if not n_wrong:
        msg = f"fraction={fraction} of {len(names)} cells is less than one cell. Raise it or pass more cells."
        raise ValueError(msg)
    rows = rng.permutation(len(names))[:n_wrong]
    changed, is_wrong = names.copy(), np.zeros(len(names), dtype=bool)
    changed[rows] = names[_cells_of_other_types(names, rows, rng)]
    is_wrong[rows] = True
    return changed, is_wrong


def detection_scores(
    normal: Sequence[float] | np.ndarray,
    abnormal: Sequence[float] | np.ndarray,
    *,
    is_paired: bool = False,
    n_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, float]:
    """Score how well a number per cell tells abnormal cells from normal ones.

    Args:
        normal: (n,) scores of normal cells, higher for what looks abnormal.
        abnormal: (m,) scores of abnormal cells.
        is_paired: Entry i of both is about one cell, before and after; cells are resampled in pairs then.
        n_resamples: Bootstrap resamples of cells, at least 1. They say what other cells of the same donors
            would give, not what other donors would.
        seed: Of the resamples; equal seed, equal interval.

    Returns:
        ``auroc``, probability that an abnormal cell scores above a normal one, ties half, 1 best, 0.5 for
        chance; ``auroc_low`` and ``auroc_high``, its 95 % percentile interval; ``average_precision``, 1 best,
        ``base_rate`` for chance; ``base_rate``, share of abnormal cells; ``n_normal`` and ``n_abnormal``.

    Raises:
        ValueError: If a list is empty, not one number per cell or not finite, paired lists differ in length,
            or ``n_resamples`` is not positive.
    """
    groups = _checked_scores(normal, "normal"), _checked_scores(abnormal, "abnormal")
    n_normal, n_abnormal = map(len, groups)
    if is_paired and n_normal != n_abnormal:
        msg = f"Paired scores are of the same cells in the same order, got {n_normal} and {n_abnormal}."
        raise ValueError(msg)
    if n_resamples < 1:
        msg = f"n_resamples must be at least 1, got {n_resamples}."
        raise ValueError(msg)
    scores = np.concatenate(groups)
    is_abnormal = np.arange(len(scores)) >= n_normal
    places = np.unique(scores, return_inverse=True)[1]
    resampled = _resampled_auroc(
        places[:n_normal], places[n_normal:], is_paired=is_paired, n_resamples=n_resamples, seed=seed
    )
    tail = (1.0 - INTERVAL_LEVEL) / 2
    low, high = np.quantile(resampled, [tail, 1.0 - tail])
    return {
        "auroc": float(roc_auc_score(is_abnormal, scores)),
        "auroc_low": float(low),
        "auroc_high": float(high),
        "average_precision": float(average_precision_score(is_abnormal, scores)),
        "base_rate": float(is_abnormal.mean()),
        "n_normal": n_normal,
        "n_abnormal": n_abnormal,
    }


def _checked_scores(scores: Sequence[float] | np.ndarray, name: str) -> np.ndarray:
    """Refuse what is not one finite number per cell."""
    numbers = np.asarray(scores, dtype=np.float64)
    if numbers.ndim != 1 or not len(numbers):
        msg = f"{name} must hold one score for each of at least 1 cell, got shape {numbers.shape}."
        raise ValueError(msg)
    n_bad = int((~np.isfinite(numbers)).sum())
    if n_bad:
        msg = (
            f"{n_bad} of {len(numbers)} {name} scores are not finite. Give such a cell the worst score, or "
            "leave it out for every method."
        )
        raise ValueError(msg)
    return numbers


def _resampled_auroc(
    normal: np.ndarray, abnormal: np.ndarray, *, is_paired: bool, n_resamples: int, seed: int
) -> np.ndarray:
    """Compute the AUROC of resamples of cells, whose scores are places (n,), (m,) among all values."""
    rng = np.random.default_rng(seed)
    n_values = int(max(normal.max(), abnormal.max())) + 1
    found = np.empty(n_resamples)
    for resample in range(n_resamples):
        rows = rng.integers(len(normal), size=len(normal))
        other_rows = rows if is_paired else rng.integers(len(abnormal), size=len(abnormal))
        n_here = np.bincount(normal[rows], minlength=n_values)
        n_below = np.cumsum(n_here) - 0.5 * n_here  # ties are half below
        found[resample] = n_below[abnormal[other_rows]].mean() / len(normal)
    return found


def _counts_of(adata: Any, layer: str | None) -> csr_matrix:
    """Take the raw counts (N, G) of an AnnData as integers, a copy without stored zeros."""
    refuse_path(adata)
    if adata.n_obs == 0:
        msg = "The AnnData has no cells. Check the selection of cells that made it."
        raise ValueError(msg)
    return checked_counts(whole_counts(adata, layer=layer)).astype(np.int64)


def _with_counts(adata: Any, counts: csr_matrix, obs: pd.DataFrame | None = None) -> anndata.AnnData:
    """Make an AnnData of new counts with the genes of an old one, and its cells unless others are given."""
    matrix = csr_matrix(counts).astype(np.int64)
    matrix.eliminate_zeros()
    matrix.sort_indices()
    return anndata.AnnData(matrix, obs=adata.obs.copy() if obs is None else obs, var=adata.var.copy())


def _draw_molecules(counts: csr_matrix, n_molecules: np.ndarray, rng: np.random.Generator) -> csr_matrix:
    """Keep so many (N,) molecules of each cell, drawn without replacement."""
    kept = counts.copy()
    for row, n_kept in enumerate(n_molecules):
        entries = slice(kept.indptr[row], kept.indptr[row + 1])
        kept.data[entries] = rng.multivariate_hypergeometric(kept.data[entries], n_kept, method="marginals")
    return kept


def _checked_labels(labels: Sequence[Any] | np.ndarray, name: str) -> np.ndarray:
    """Refuse labels (N,) that are missing or all the same."""
    # As text a missing label of a list would be the class "nan".
    values = labels if isinstance(labels, np.ndarray) else np.asarray(labels, dtype=object)
    n_missing = int(pd.isna(values).sum())
    if n_missing:
        msg = f"{n_missing} of {len(values)} {name} are missing. Leave these cells out."
        raise ValueError(msg)
    n_classes = len(np.unique(values.astype(str)))
    if n_classes < 2:
        msg = f"{name} must be of two classes at least, got {n_classes}. Pass cells of several classes."
        raise ValueError(msg)
    return values


def _cells_of_other_types(types: np.ndarray, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw for each cell of ``rows`` (n,) one cell evenly from those that are not of its type."""
    codes = np.unique(types.astype(str), return_inverse=True)[1]
    order = np.argsort(codes, kind="stable")
    sizes = np.bincount(codes)
    ends = np.cumsum(sizes)
    # In the sorted cells, those of other types follow the end of the own type, and begin anew after the last.
    steps = rng.integers(len(codes) - sizes[codes[rows]])
    return order[(ends[codes[rows]] + steps) % len(codes)]


def _pairs_of_different(
    types: np.ndarray, n_pairs: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw pairs evenly from all ordered pairs of cells of different types."""
    _, codes, sizes = np.unique(types.astype(str), return_inverse=True, return_counts=True)
    n_partners = (len(codes) - sizes[codes]).astype(np.float64)
    first = rng.choice(len(codes), n_pairs, p=n_partners / n_partners.sum())
    return first, _cells_of_other_types(types, first, rng)
