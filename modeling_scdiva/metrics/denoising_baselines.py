"""Baselines of masked gene and value prediction, fitted in one pass over training cells.

A masked gene is partly given away by simple facts: some genes are everywhere, the ranking puts certain genes
at certain ranks, and a gene that is visible cannot be masked as well. A masked value is given away by its
rank, because cells are sorted by s = value / weight. The baselines know these facts and nothing else; what a
model predicts beyond them it has learned about cells.

Notable choices:
- The objective is a mean over cells of a mean over genes. To be fitted for it, a gene of a training cell with
  L genes weighs 1 / L.
- Rank bins are one rank wide at the top of a cell and grow to a fixed share of the rank.
- Gene tables are mixtures of the frequency in the rank bin, in the bins around it, in the corpus, and the
  uniform law. Mixture weights come from the leave-one-out likelihood of the training cells (deleted
  interpolation), never from held-out cells. As a gene occurs once per cell, leaving out one token leaves out
  its cell.

Dimensions: B cells of a batch, S positions, T gene tokens, V vocabulary, R rank bins, n masked genes.
Source: METHOD.md sections 4 and 8. Deleted interpolation: Jelinek and Mercer 1980, "Interpolated estimation
of Markov source parameters from sparse data".
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from modeling_scdiva.diffusion_scdiva import masked_expression_loss, per_cell_mean, visible_gene_mask

# A bin that begins at rank r is max(1, r // divisor) ranks wide. Genes share a rank's counts among V classes
# and need wider bins than values, of which a bin estimates only one number.
GENE_BIN_DIVISOR = 8
VALUE_BIN_DIVISOR = 32
NEIGHBOUR_BINS = 2  # a rank bin also learns from so many bins on each side
MIXTURE_STEPS = 200
MIXTURE_TOLERANCE = 1e-6
EXCLUDING = "_excluding_visible"
IGNORED_LABEL = -100


def rank_bins(max_genes: int, divisor: int) -> np.ndarray:
    """Group ranks into bins of growing width.

    Args:
        max_genes: Ranks of the longest cell.
        divisor: A bin that begins at rank r is max(1, r // divisor) ranks wide.

    Returns:
        (max_genes,) int64, the bin of each rank, from 0, never falling.

    Raises:
        ValueError: If either number is below 1.
    """
    if max_genes < 1 or divisor < 1:
        msg = f"max_genes and divisor must be at least 1, got {max_genes} and {divisor}."
        raise ValueError(msg)
    starts = [0]
    while starts[-1] < max_genes:
        starts.append(starts[-1] + max(1, starts[-1] // divisor))
    return np.searchsorted(starts, np.arange(max_genes), side="right") - 1


class BaselineFitter:
    """Collects in one pass over training cells what the baselines need; memory does not grow with the cells.

    Args:
        ranking_weights: (V,) H_g + eps, the divisor of the ranking score; ones for plain expression order.
        max_genes: Genes kept of a cell; the rest of longer cells is not counted.
        n_special_tokens: The first ids of the vocabulary, which are no genes.
    """

    def __init__(self, ranking_weights: np.ndarray, max_genes: int, *, n_special_tokens: int = 5) -> None:
        self.ranking_weights = np.asarray(ranking_weights, dtype=np.float64)
        self.max_genes, self.n_special_tokens = max_genes, n_special_tokens
        self.gene_bins = rank_bins(max_genes, GENE_BIN_DIVISOR)
        self.value_bins = rank_bins(max_genes, VALUE_BIN_DIVISOR)
        vocab_size, n_value_bins = len(self.ranking_weights), int(self.value_bins[-1]) + 1
        # Per rank bin and gene: tokens, and tokens times their weight 1 / L.
        self._tokens = np.zeros((int(self.gene_bins[-1]) + 1, vocab_size), dtype=np.int64)
        self._mass = np.zeros(self._tokens.shape)
        self._value_of_gene = np.zeros(vocab_size)
        # Per rank bin: weight, value, value times gene weight, gene weight squared.
        self._of_rank = np.zeros((4, n_value_bins))
        self.n_cells = 0

    def update(self, token_ids: np.ndarray, values: np.ndarray, offsets: np.ndarray) -> None:
        """Count some training cells.

        Args:
            token_ids: (T,) gene tokens of all cells, each cell in ranking order, uncut or cut.
            values: (T,) expression values, log1p of normalised counts.
            offsets: (B + 1,) where each cell begins.

        Raises:
            ValueError: If the arrays do not fit together, or a token is no gene.
        """
        if not len(token_ids) == len(values) == offsets[-1]:
            msg = (
                f"token_ids has {len(token_ids)} entries, values {len(values)}, and offsets end at "
                f"{offsets[-1]}; all three must be equal: pass the flat arrays of whole cells."
            )
            raise ValueError(msg)
        vocab_size = len(self.ranking_weights)
        if len(token_ids) and not self.n_special_tokens <= token_ids.min() <= token_ids.max() < vocab_size:
            msg = (
                f"token_ids must be genes, {self.n_special_tokens} to {vocab_size - 1}, got "
                f"{token_ids.min()} to {token_ids.max()}. Pass cells made with the same vocabulary."
            )
            raise ValueError(msg)
        lengths = np.diff(offsets)
        ranks = np.arange(len(token_ids)) - np.repeat(offsets[:-1], lengths)
        is_kept = ranks < self.max_genes
        kept_lengths = np.minimum(lengths, self.max_genes)
        ranks, genes = ranks[is_kept], np.asarray(token_ids[is_kept], dtype=np.int64)
        values = np.asarray(values[is_kept], dtype=np.float64)
        token_weights = 1.0 / np.repeat(kept_lengths, kept_lengths)

        cells_of_table = self.gene_bins[ranks] * vocab_size + genes
        shape, size = self._tokens.shape, self._tokens.size
        self._tokens += np.bincount(cells_of_table, minlength=size).reshape(shape)
        self._mass += np.bincount(cells_of_table, token_weights, size).reshape(shape)
        self._value_of_gene += np.bincount(genes, token_weights * values, vocab_size)
        bins, gene_weights = self.value_bins[ranks], self.ranking_weights[genes]
        factors = (np.ones_like(values), values, values * gene_weights, gene_weights**2)
        for row, factor in enumerate(factors):
            self._of_rank[row] += np.bincount(bins, token_weights * factor, self._of_rank.shape[1])
        self.n_cells += int((lengths > 0).sum())

    def finish(self) -> "DenoisingBaselines":
        """Turn the counts into baselines.

        Returns:
            The baselines; counting may go on afterwards.

        Raises:
            ValueError: If no cell was counted.
        """
        if not self.n_cells:
            msg = (
                "The baselines need training cells with genes, got none: update them with the training split."
            )
            raise ValueError(msg)
        n_genes = len(self.ranking_weights) - self.n_special_tokens
        uniform = np.full(len(self.ranking_weights), 1.0 / n_genes)
        uniform[: self.n_special_tokens] = 0.0
        tokens, mass = self._tokens.sum(axis=0), self._mass.sum(axis=0)
        unigram = _mix([(mass, tokens)], mass, tokens, uniform)
        by_rank = []
        for row, of_bin in enumerate(zip(self._mass, self._tokens, strict=True)):
            around = slice(max(0, row - NEIGHBOUR_BINS), row + NEIGHBOUR_BINS + 1)
            of_window = (self._mass[around].sum(axis=0), self._tokens[around].sum(axis=0))
            sources = [of_bin, of_window, (mass, tokens)]
            by_rank.append(_mix(sources, *of_bin, uniform) if of_bin[1].any() else unigram)
        tables = {"uniform": [uniform], "unigram": [unigram], "rank_unigram": by_rank}

        weight, value, scored_value, squared_weight = _fill_empty_bins(self._of_rank)
        mean_value = self._value_of_gene.sum() / mass.sum()
        # One token of average weight at the overall mean: steadies rare genes and stands for unseen ones.
        one_token = mass.sum() / tokens.sum()
        gene_mean = (self._value_of_gene + one_token * mean_value) / (mass + one_token)
        return DenoisingBaselines(
            gene_tables={name: torch.from_numpy(np.stack(rows, axis=1)) for name, rows in tables.items()},
            gene_bins=torch.from_numpy(self.gene_bins),
            gene_mean=torch.from_numpy(gene_mean),
            rank_mean=torch.from_numpy((value / weight)[self.value_bins]),
            # Least squares of value = s(rank) * weight: the best population score for the squared error.
            rank_score=torch.from_numpy((scored_value / squared_weight)[self.value_bins]),
            ranking_weights=torch.from_numpy(self.ranking_weights),
            n_special_tokens=self.n_special_tokens,
            n_cells=self.n_cells,
        )


def _mix(
    sources: list[tuple[np.ndarray, np.ndarray]], mass: np.ndarray, tokens: np.ndarray, uniform: np.ndarray
) -> np.ndarray:
    """Mix frequencies of nested sources and the uniform law, weighted by leave-one-out likelihood.

    Args:
        sources: Pairs of (V,) weighted and plain token counts, the narrowest source first.
        mass: (V,) weighted counts of the tokens to be predicted, which are part of every source.
        tokens: (V,) plain counts of the same.
        uniform: (V,) uniform law over the genes.

    Returns:
        (V,) probabilities that sum to one, positive at every gene.
    """
    seen = np.flatnonzero(tokens)
    left_out = mass[seen] / tokens[seen]  # typical weight of one token of each gene
    estimates = [
        np.where(counts[seen] > 1, np.maximum(source[seen] - left_out, 0.0), 0.0)
        / np.maximum(source.sum() - left_out, np.finfo(np.float64).tiny)
        for source, counts in sources
    ]
    estimates.append(uniform[seen])
    left_out_laws = np.stack(estimates)  # (K, seen genes)
    shares = mass[seen] / mass[seen].sum()
    weights = np.full(len(left_out_laws), 1.0 / len(left_out_laws))
    for _ in range(MIXTURE_STEPS):  # expectation-maximisation; the likelihood is concave in the weights
        joint = weights[:, None] * left_out_laws
        updated = (joint / joint.sum(axis=0) * shares).sum(axis=1)
        change, weights = np.abs(updated - weights).max(), updated
        if change < MIXTURE_TOLERANCE:
            break
    # The uniform law keeps the weight of one token: a gene that was never seen stays possible.
    weights[-1] = max(weights[-1], 1.0 / (1 + tokens.sum()))
    weights /= weights.sum()
    laws = [source / source.sum() for source, _ in sources] + [uniform]
    return sum(weight * law for weight, law in zip(weights, laws, strict=True))  # type: ignore[return-value]


def _fill_empty_bins(of_rank: np.ndarray) -> np.ndarray:
    """Give rank bins that no training cell reached the sums of the last one that some did.

    Args:
        of_rank: (4, R) sums per bin, the first of them the weight.

    Returns:
        (4, R) sums.
    """
    last_seen = np.maximum.accumulate(np.where(of_rank[0] > 0, np.arange(of_rank.shape[1]), 0))
    return of_rank[:, last_seen]


@dataclass(frozen=True)
class DenoisingBaselines:
    """Gene laws and value predictors that know ranks, frequencies and ranking weights, and no context.

    Attributes:
        gene_tables: Name -> (V, R) or (V, 1) float64, probability of each gene in each rank bin.
        gene_bins: (ranks,) rank bin of each rank in the tables that have several.
        gene_mean: (V,) mean value of each gene.
        rank_mean: (ranks,) mean value at each rank, whatever the gene.
        rank_score: (ranks,) population score at each rank.
        ranking_weights: (V,) H_g + eps.
        n_special_tokens: The first ids of the vocabulary, which are no genes.
        n_cells: Training cells they were fitted on.
    """

    gene_tables: dict[str, torch.Tensor]
    gene_bins: torch.Tensor
    gene_mean: torch.Tensor
    rank_mean: torch.Tensor
    rank_score: torch.Tensor
    ranking_weights: torch.Tensor
    n_special_tokens: int
    n_cells: int

    def gene_losses(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Give each baseline's cross-entropy of the masked genes.

        Args:
            batch: ``input_ids`` and ``labels`` (B, S) from the collator, cut at the same ``max_genes``.

        Returns:
            Name -> (B,) float64 nats per masked gene, 0 for a cell without one: ``uniform``, ``unigram`` and
            ``rank_unigram``, and each again as ``*_excluding_visible``, with the visible genes of the cell
            ruled out and the rest renormalised.
        """
        labels = batch["labels"].cpu()
        cells, positions = (labels != IGNORED_LABEL).nonzero(as_tuple=True)  # (n,) both
        genes, bins = labels[cells, positions], self.gene_bins[self.ranks_of(positions)]
        n_cells, vocab_size = len(labels), len(self.ranking_weights)
        is_visible = visible_gene_mask(batch["input_ids"].cpu(), self.n_special_tokens, vocab_size)
        is_possible = (~is_visible).double()  # (B, V)
        losses = {}
        for name, table in self.gene_tables.items():
            columns = bins if table.shape[1] > 1 else torch.zeros_like(bins)
            surprise = -table[genes, columns].log()  # (n,)
            left_over = (is_possible @ table)[cells, columns]  # (n,) probability of all that is not visible
            losses[name] = per_cell_mean(surprise, cells, n_cells)
            losses[name + EXCLUDING] = per_cell_mean(surprise + left_over.log(), cells, n_cells)
        return losses

    def expression_losses(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Give each baseline's squared error of the hidden values.

        Args:
            batch: ``input_ids``, ``expression_values``, ``is_masked``, ``labels`` and ``expression_labels``
                (B, S) from the collator, cut at the same ``max_genes``.

        Returns:
            Name -> (B,) squared log1p units, 0 for a cell without a hidden value. ``rank_mean`` knows the
            rank, as a scalar head does; ``gene_mean`` the true gene; ``rank_score`` both, as s(rank) * weight
            of the gene; ``neighbour_score`` also the scores of the visible genes around it, and with them the
            arithmetic of the sort.
        """
        wanted = ("input_ids", "is_masked", "labels", "expression_labels")
        inputs = {name: batch[name].cpu() for name in wanted}
        genes = torch.where(inputs["labels"] == IGNORED_LABEL, inputs["input_ids"], inputs["labels"])
        cells, positions = (inputs["is_masked"] & (genes >= self.n_special_tokens)).nonzero(as_tuple=True)
        true_genes, ranks = genes[cells, positions], self.ranks_of(positions)
        scores = self.rank_score[ranks]  # (n,)
        gene_weights = self.ranking_weights[true_genes]
        predictions = {
            "rank_mean": self.rank_mean[ranks],
            "gene_mean": self.gene_mean[true_genes],
            "rank_score": scores * gene_weights,
            "neighbour_score": scores * self.neighbour_ratio(batch, cells, ranks) * gene_weights,
        }
        targets = inputs["expression_labels"][cells, positions]
        return {
            name: masked_expression_loss(predicted, targets, cells, len(genes)).double()
            for name, predicted in predictions.items()
        }

    def ranks_of(self, positions: torch.Tensor) -> torch.Tensor:
        """Turn positions into ranks.

        Args:
            positions: (n,) positions in the cell, from 1.

        Returns:
            (n,) ranks from 0.

        Raises:
            ValueError: If a rank lies beyond the cells the baselines were fitted on.
        """
        ranks = positions - 1  # position 0 is <lat>
        if len(ranks) and ranks.max() >= len(self.gene_bins):
            msg = (
                f"A masked gene has rank {int(ranks.max())}, the baselines were fitted with max_genes="
                f"{len(self.gene_bins)}. Fit and evaluate with the same max_genes."
            )
            raise ValueError(msg)
        return ranks

    def neighbour_ratio(
        self, batch: Mapping[str, torch.Tensor], cells: torch.Tensor, ranks: torch.Tensor
    ) -> torch.Tensor:
        """Interpolate how far a cell's scores lie above the population's, between its visible genes.

        Args:
            batch: Inputs of the model.
            cells: (n,) cell of each hidden value.
            ranks: (n,) its rank.

        Returns:
            (n,) ratio of scores; its logarithm is linear in rank between visible genes and constant beyond
            them, and the ratio is 1 where nothing is visible.
        """
        input_ids, values = batch["input_ids"].cpu(), batch["expression_values"].cpu().double()
        is_visible = (input_ids >= self.n_special_tokens) & ~batch["is_masked"].cpu() & (values > 0)
        ratio = torch.ones(len(ranks), dtype=torch.float64)
        for cell in cells.unique().tolist():
            positions = is_visible[cell].nonzero().squeeze(1)
            if not len(positions):
                continue
            known_ranks = self.ranks_of(positions)
            visible_scores = values[cell, positions] / self.ranking_weights[input_ids[cell, positions]]
            log_ratio = (visible_scores / self.rank_score[known_ranks]).log()
            of_cell = cells == cell
            ratio[of_cell] = torch.from_numpy(
                np.exp(np.interp(ranks[of_cell].numpy(), known_ranks.numpy(), log_ratio.numpy()))
            )
        return ratio
