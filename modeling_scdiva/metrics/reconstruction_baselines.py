"""What arithmetic alone tells of a hidden gene: laws of genes from frequency, rank and the lattice of counts.

Cells are sorted by s = log1p(u * c) / w, with c a whole number of molecules, u the value of one molecule
(target_sum / library size) and w the known weight of the gene. Between two visible neighbours, only genes fit
that have a whole c with s between the neighbours' scores; where scores tie, the token id decides. No biology
is in that. A gene loss is worth something only below these baselines.

Notable choices:
- The value of one molecule is found from the visible values of the same cell, which are its multiples;
  nothing is used that the network does not see. If few values are visible, they may all be multiples of 2, 3
  or 4 molecules: these lattices are mixed in, by the probability k ** -m that m counts are multiples of k.
- Visible genes of the cell are ruled out in every law.
- Each law keeps `GUARD` of the rank-conditional unigram law, so that rounding or a misjudged lattice costs a
  bounded number of nats, and gene-rich gaps cost next to nothing.

Dimensions: B cells of a batch, S positions, V vocabulary, n hidden genes of one cell, m visible ones, J gaps.
Source: METHOD.md section 8.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from modeling_scdiva.metrics.denoising_baselines import IGNORED_LABEL, DenoisingBaselines

GUARD = 0.01
# float32 log1p values give counts to about these shares of one molecule and of the count.
COUNT_TOLERANCE, RELATIVE_TOLERANCE = 1e-3, 4e-6
MOST_MOLECULES = 64  # of the least expressed visible gene
COARSEST_LATTICE = 4
LEAST_LATTICE_WEIGHT = 1e-3
SORT_TOLERANCE = 1e-4
LATTICE_LAWS = ("lattice_unigram", "lattice_rank_unigram", "lattice_counts")


def molecule_value(values: np.ndarray) -> float | None:
    """Find what one molecule is worth in a cell, from values that are whole multiples of it.

    Args:
        values: (m,) expression values, log1p of normalised counts, above zero.

    Returns:
        The largest number of which every ``expm1(value)`` is a whole multiple: ``target_sum / library_size``,
        or a multiple of it if the counts have a common divisor. None for no values, or for values that come
        from no counts.
    """
    if not len(values):
        return None
    amounts = np.expm1(np.asarray(values, dtype=np.float64))
    least = amounts.min()
    for n_molecules in range(1, MOST_MOLECULES + 1):
        counts = amounts * (n_molecules / least)
        whole = np.rint(counts)
        if (np.abs(counts - whole) <= COUNT_TOLERANCE + RELATIVE_TOLERANCE * counts).all():
            return float((amounts * whole).sum() / (whole**2).sum())
    return None


def lattice_range(
    bounds: tuple[np.ndarray, np.ndarray],
    neighbours: tuple[np.ndarray, np.ndarray],
    *,
    ranking_weights: np.ndarray,
    unit: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Give the counts with which each gene fits between two neighbours.

    Args:
        bounds: (J,) score of the visible gene before each gap, infinite where there is none, and (J,) of the
            one behind it, 0 where there is none.
        neighbours: (J,) token of the gene before, and (J,) of the one behind; -1 where there is none.
        ranking_weights: (V,) divisor of the score.
        unit: What one molecule is worth, in normalised counts.

    Returns:
        (J, V) least and (J, V) largest whole count; the gene does not fit where least exceeds largest.
    """
    tokens = np.arange(len(ranking_weights))

    def counts_at(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # 600 is far above any log1p value, and exp(600) is still finite.
        counts = np.expm1(np.minimum(scores[:, None] * ranking_weights, 600.0)) / unit  # (J, V)
        whole = np.rint(counts)
        return np.where(
            np.abs(counts - whole) <= COUNT_TOLERANCE + RELATIVE_TOLERANCE * counts, whole, np.nan
        ), counts

    tied, counts = counts_at(bounds[0])
    # Equal scores stand in ascending order of the token: behind a neighbour come larger ids only.
    may_tie = tokens > neighbours[0][:, None]
    largest = np.where(np.isnan(tied), np.floor(counts), np.where(may_tie, tied, tied - 1))
    tied, counts = counts_at(bounds[1])
    may_tie = tokens < neighbours[1][:, None]
    least = np.where(np.isnan(tied), np.ceil(counts), np.where(may_tie, tied, tied + 1))
    return np.maximum(least, 1.0), largest


def iter_gene_laws(
    batch: Mapping[str, torch.Tensor], baselines: DenoisingBaselines, *, with_lattice: bool = True
) -> Iterator[tuple[int, str, np.ndarray]]:
    """Yield the law that each baseline gives to the hidden genes of each cell.

    ``unigram`` and ``rank_unigram`` know how often genes occur, in all and at that rank. ``lattice_unigram``
    and ``lattice_rank_unigram`` are the same, restricted to the genes that fit between visible neighbours.
    ``lattice_counts`` weighs each gene that fits by its frequency and by the probability of the fitting
    counts, geometric around the gene's mean value. All know which genes are visible.

    Args:
        batch: ``input_ids``, ``labels``, ``expression_values`` and ``is_masked`` (B, S), cut at the
            ``max_genes`` of the baselines.
        baselines: Fitted on training cells.
        with_lattice: Give the lattice laws; they need cells in ranking order.

    Yields:
        Cell, name of the law, and (n, V) float64 probabilities, rows in the order of the positions; cells one
        after the other.

    Raises:
        ValueError: If lattice laws are asked for and the visible genes of a cell are not in ranking order.
    """
    labels, input_ids = batch["labels"].cpu().numpy(), batch["input_ids"].cpu().numpy()
    values, is_masked = batch["expression_values"].cpu().double().numpy(), batch["is_masked"].cpu().numpy()
    n_special, weights = baselines.n_special_tokens, baselines.ranking_weights.numpy()
    tables = {name: table.numpy() for name, table in baselines.gene_tables.items() if name != "uniform"}
    bins = baselines.gene_bins.numpy()
    for cell in range(len(labels)):
        hidden = np.flatnonzero(labels[cell] != IGNORED_LABEL)  # (n,)
        if not len(hidden):
            continue
        if hidden[-1] > len(bins):
            msg = (
                f"A hidden gene has rank {hidden[-1] - 1}, the baselines were fitted with max_genes="
                f"{len(bins)}. Fit and evaluate with the same max_genes."
            )
            raise ValueError(msg)
        is_possible = np.ones(len(weights))
        is_possible[input_ids[cell]] = 0.0
        is_possible[:n_special] = 0.0
        priors = {}
        for name, table in tables.items():
            columns = bins[hidden - 1] if table.shape[1] > 1 else np.zeros(len(hidden), dtype=np.int64)
            priors[name] = _normalised(table[:, columns].T * is_possible)  # (n, V)
            yield cell, name, priors[name]
        if with_lattice:
            visible = np.flatnonzero((input_ids[cell] >= n_special) & ~is_masked[cell] & (values[cell] > 0))
            shown = (visible, input_ids[cell][visible], values[cell][visible])
            laws = _lattice_laws(hidden, shown, priors, baselines=baselines)
            for name in LATTICE_LAWS:
                yield cell, name, laws[name]


def _lattice_laws(
    hidden: np.ndarray,
    shown: tuple[np.ndarray, np.ndarray, np.ndarray],
    priors: Mapping[str, np.ndarray],
    *,
    baselines: DenoisingBaselines,
) -> dict[str, np.ndarray]:
    """Restrict the priors (n, V) of one cell to the genes that fit, and guard them.

    Returns:
        Name of each of `LATTICE_LAWS` -> (n, V) probabilities.

    Raises:
        ValueError: If the visible genes are not in ranking order.
    """
    visible, tokens, values = shown  # (m,) each
    weights = baselines.ranking_weights.numpy()
    scores = values / weights[tokens]
    if (np.diff(scores) > SORT_TOLERANCE * scores[1:]).any():
        msg = (
            "The visible genes of a cell are not in the order of value / ranking weight. Fit the baselines "
            "with the tokenizer's ranking_weights; a random gene order has no lattice, pass "
            "with_lattice=False."
        )
        raise ValueError(msg)
    unit = molecule_value(values)
    fallback = priors["rank_unigram"]
    if unit is None:
        return {"lattice_unigram": priors["unigram"]} | dict.fromkeys(LATTICE_LAWS[1:], fallback)
    gaps, gap_of = np.unique(np.searchsorted(visible, hidden), return_inverse=True)  # (J,), (n,)
    padded = np.concatenate([[np.inf], scores, [0.0]])
    ids = np.concatenate([[-1], tokens, [-1]])
    divisors = np.arange(1, COARSEST_LATTICE + 1)
    shares = divisors ** -float(len(values))
    divisors, shares = divisors[shares >= LEAST_LATTICE_WEIGHT], shares[shares >= LEAST_LATTICE_WEIGHT]
    laws = {name: np.zeros_like(fallback) for name in LATTICE_LAWS}
    for divisor, share in zip(divisors, shares / shares.sum(), strict=True):
        least, largest = lattice_range(
            (padded[gaps], padded[gaps + 1]),
            (ids[gaps], ids[gaps + 1]),
            ranking_weights=weights,
            unit=unit / divisor,
        )
        fits = (least <= largest)[gap_of]  # (n, V)
        mean_count = np.maximum(np.expm1(baselines.gene_mean.numpy()) * divisor / unit, 1.0 + 1e-6)
        log_ratio = np.log1p(-1.0 / mean_count)  # (V,) of a geometric law on c >= 1
        mass = np.exp((least - 1.0) * log_ratio) - np.exp(largest * log_ratio)  # (J, V)
        restricted = (
            priors["unigram"] * fits,
            priors["rank_unigram"] * fits,
            priors["unigram"] * np.maximum(mass, 0.0)[gap_of] * fits,
        )
        for name, law in zip(LATTICE_LAWS, restricted, strict=True):
            laws[name] += share * _normalised(law, otherwise=fallback)
    return {name: (1.0 - GUARD) * law + GUARD * fallback for name, law in laws.items()}


def _normalised(law: np.ndarray, otherwise: np.ndarray | None = None) -> np.ndarray:
    """Let each row of (n, V) sum to one; rows without any mass are taken from `otherwise`."""
    totals = law.sum(axis=1, keepdims=True)
    scaled = law / np.maximum(totals, np.finfo(np.float64).tiny)
    return scaled if otherwise is None else np.where(totals > 0, scaled, otherwise)


def value_predictions(
    batch: Mapping[str, torch.Tensor], baselines: DenoisingBaselines
) -> dict[str, np.ndarray]:
    """Predict the hidden values from frequency, rank and the visible neighbours' scores.

    Args:
        batch: As `DenoisingBaselines.expression_losses` takes it.
        baselines: Fitted on training cells.

    Returns:
        Name -> (n,) predictions at the hidden values, cell after cell: ``gene_mean`` knows the gene,
        ``rank_score`` also the rank, ``neighbour_score`` also the visible scores around it.
    """
    input_ids, labels = batch["input_ids"].cpu(), batch["labels"].cpu()
    genes = torch.where(labels == IGNORED_LABEL, input_ids, labels)
    is_hidden = batch["is_masked"].cpu() & (genes >= baselines.n_special_tokens)
    cells, positions = is_hidden.nonzero(as_tuple=True)  # (n,) both
    true_genes, ranks = genes[cells, positions], baselines.ranks_of(positions)
    scored = baselines.rank_score[ranks] * baselines.ranking_weights[true_genes]
    ratio = baselines.neighbour_ratio(batch, cells, ranks)
    predictions = {
        "gene_mean": baselines.gene_mean[true_genes],
        "rank_score": scored,
        "neighbour_score": scored * ratio,
    }
    return {name: predicted.numpy() for name, predicted in predictions.items()}
