"""Entropy of each gene's expression over any number of cells, in constant memory.

Each gene has a histogram of its log1p-normalised values: one bin for zero and ``n_bins`` equal bins on
(0, ln(1 + target_sum)]. The edges are fixed, so histograms of blocks, files and workers add up exactly.

Source: METHOD.md section 1, gene entropy.
"""

import math

import numpy as np


class GeneEntropy:
    """Integer histograms of expression values, one per gene, and what follows from them.

    Attributes:
        histogram: (n_genes, 1 + n_bins) int64 number of cells; column 0 counts the zeros.
        n_cells: Cells seen in all updates.
        target_sum: Molecules per cell that values were normalised to before log1p.
        n_bins: Number of equal bins for values above zero.

    Args:
        n_genes: Number of genes.
        target_sum: Molecules per cell after normalisation; sets the last edge, ln(1 + target_sum).
        n_bins: Number of equal bins for values above zero.

    Raises:
        ValueError: If ``n_genes`` or ``n_bins`` is below 1, or ``target_sum`` is not above 0.
    """

    def __init__(self, n_genes: int, *, target_sum: float = 1e4, n_bins: int = 32) -> None:
        if n_genes < 1 or n_bins < 1 or not (math.isfinite(target_sum) and target_sum > 0):
            msg = (
                "GeneEntropy needs n_genes >= 1, n_bins >= 1 and a finite target_sum above 0, "
                f"got n_genes={n_genes}, n_bins={n_bins}, target_sum={target_sum}."
            )
            raise ValueError(msg)
        self.target_sum = float(target_sum)
        self.n_bins = int(n_bins)
        self.n_cells = 0
        self.histogram = np.zeros((n_genes, 1 + n_bins), dtype=np.int64)

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return self.histogram.shape[0]

    @property
    def bin_width(self) -> float:
        """Width of one bin, in units of log1p of normalised molecules."""
        return math.log1p(self.target_sum) / self.n_bins

    def update(
        self,
        gene_index: np.ndarray,
        values: np.ndarray,
        n_cells: int,
        measured: np.ndarray | None = None,
    ) -> None:
        """Add a block of cells, given by its values above zero.

        Args:
            gene_index: (nnz,) gene of each value, in [0, n_genes); a gene at most once per cell.
            values: (nnz,) log1p-normalised expression above zero. Values beyond the last edge, which only
                values normalised to a larger sum can reach, count in the last bin.
            n_cells: Cells in the block, those without any value included.
            measured: (n_genes,) bool, genes that the file measures; others get no zeros. None means all.

        Raises:
            ValueError: If shapes do not fit, an index is out of range, a value is not finite or not above
                zero, a value belongs to a gene that was not measured, or a gene has more values than cells.
        """
        gene_index, values = np.asarray(gene_index), np.asarray(values)
        is_measured = (
            np.ones(self.n_genes, dtype=bool) if measured is None else np.asarray(measured, dtype=bool)
        )
        self._check_block(gene_index, values, is_measured)

        # 1. Bin the values above zero. float64, so that a float32 value lands in the same bin everywhere.
        bins = np.minimum((values.astype(np.float64) / self.bin_width).astype(np.int64), self.n_bins - 1)
        slots = gene_index.astype(np.int64) * self.n_bins + bins
        added = np.bincount(slots, minlength=self.n_genes * self.n_bins).reshape(self.n_genes, self.n_bins)

        # 2. What is left of the cells is zero, for genes that were looked for.
        n_expressing = added.sum(axis=1)
        if (n_expressing > np.where(is_measured, n_cells, 0)).any():
            gene = int(np.argmax(n_expressing - np.where(is_measured, n_cells, 0)))
            msg = (
                f"Gene {gene} has {n_expressing[gene]} values in {n_cells} cells"
                f"{'' if is_measured[gene] else ' but is not among the measured genes'}; "
                "a gene may occur once per cell, in cells that measured it."
            )
            raise ValueError(msg)
        self.histogram[:, 1:] += added
        self.histogram[:, 0] += np.where(is_measured, n_cells - n_expressing, 0)
        self.n_cells += int(n_cells)

    def merge(self, other: "GeneEntropy") -> None:
        """Add the histograms of other cells, exactly as if these had been seen here.

        Args:
            other: Histograms with the same genes and bins.

        Raises:
            ValueError: If genes or bins differ.
        """
        ours = (self.n_genes, self.target_sum, self.n_bins)
        theirs = (other.n_genes, other.target_sum, other.n_bins)
        if ours != theirs:
            msg = f"Histograms differ in (n_genes, target_sum, n_bins): {ours} here, {theirs} there."
            raise ValueError(msg)
        self.histogram += other.histogram
        self.n_cells += other.n_cells

    def entropy(self) -> np.ndarray:
        """Compute the Shannon entropy of each gene's histogram.

        Returns:
            (n_genes,) float64 nats in [0, ln(1 + n_bins)]; genes never seen above zero get the median of
            the others.

        Raises:
            ValueError: If no gene was seen above zero.
        """
        is_seen = self.histogram[:, 1:].any(axis=1)
        if not is_seen.any():
            msg = f"No expression was seen in {self.n_cells} cells, so there is no entropy. Add cells first."
            raise ValueError(msg)
        share = self.histogram[is_seen] / self.histogram[is_seen].sum(axis=1, keepdims=True)
        terms = np.zeros_like(share)
        np.log(share, out=terms, where=share > 0)
        # Adding 0 turns the -0.0 of a gene with one single bin into 0.0.
        seen_entropy = -(share * terms).sum(axis=1) + 0.0
        entropy = np.full(self.n_genes, np.median(seen_entropy))
        entropy[is_seen] = seen_entropy
        return entropy

    def mean_variance(self) -> tuple[np.ndarray, np.ndarray]:
        """Estimate mean and variance of each gene's log1p value, each value standing at its bin's centre.

        Returns:
            Mean (n_genes,) and population variance (n_genes,), float64; NaN for genes never measured.
        """
        centres = np.concatenate([[0.0], (np.arange(self.n_bins) + 0.5) * self.bin_width])
        n_measured = self.histogram.sum(axis=1)
        total = np.maximum(n_measured, 1)
        mean = self.histogram @ centres / total
        variance = (self.histogram * (centres - mean[:, None]) ** 2).sum(axis=1) / total
        mean[n_measured == 0] = np.nan
        variance[n_measured == 0] = np.nan
        return mean, variance

    # Refuse a block whose arrays do not fit each other.
    def _check_block(self, gene_index: np.ndarray, values: np.ndarray, is_measured: np.ndarray) -> None:
        if gene_index.ndim != 1 or gene_index.shape != values.shape:
            msg = f"gene_index and values need one shape (nnz,), got {gene_index.shape} and {values.shape}."
            raise ValueError(msg)
        if is_measured.shape != (self.n_genes,):
            msg = f"measured needs one entry per gene, ({self.n_genes},), got {is_measured.shape}."
            raise ValueError(msg)
        if gene_index.size and not (gene_index.min() >= 0 and gene_index.max() < self.n_genes):
            msg = (
                f"gene_index must lie in [0, {self.n_genes}), "
                f"got {gene_index.min()} to {gene_index.max()}. Leave unmatched genes out."
            )
            raise ValueError(msg)
        is_positive = np.isfinite(values) & (values > 0)
        if not is_positive.all():
            first = values[~is_positive][0]
            msg = (
                f"values must be finite and above zero, got {int((~is_positive).sum())} others "
                f"(first: {first}). Zeros are implied by n_cells."
            )
            raise ValueError(msg)
