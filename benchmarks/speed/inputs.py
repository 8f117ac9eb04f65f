"""Made-up input of realistic size: cells of 33,000 genes, about 1,900 expressed, 8,300 molecules.

Gene rates and depths are lognormal and counts Poisson: 870 genes in a shallow cell (5th percentile), 3,300 in
a deep one (95th), more than half of the counts ones, four of five cells above the cut of 1,200 genes. That is
the shape of a deep 10x experiment, and the cost of a stage depends on little else.
"""

from pathlib import Path

import anndata
import numpy as np
from scipy.sparse import csr_matrix, vstack

from tokenization_scdiva import ScDivaTokenizer
from tokenization_scdiva.vocabulary_scdiva import GeneVocabulary

N_GENES = 33_000
MEDIAN_DEPTH, DEPTH_SIGMA, RATE_SIGMA = 6_600.0, 0.68, 2.95
CELLS_AT_ONCE = 200
UNKNOWN_FRACTION = 0.05  # of the columns; public files hold genes that a vocabulary lacks


def make_counts(n_cells: int, *, seed: int = 0, median_depth: float = MEDIAN_DEPTH) -> csr_matrix:
    """Draw molecule counts.

    Args:
        n_cells: Number of cells N.
        seed: Equal seed, equal cells.
        median_depth: Median molecules of a cell.

    Returns:
        (N, 33,000) float32 CSR, as public files store counts.
    """
    rng = np.random.default_rng(seed)
    rates = rng.lognormal(sigma=RATE_SIGMA, size=N_GENES)
    rates /= rates.sum()
    blocks = []
    for start in range(0, n_cells, CELLS_AT_ONCE):
        n_here = min(CELLS_AT_ONCE, n_cells - start)
        depth = median_depth * rng.lognormal(sigma=DEPTH_SIGMA, size=(n_here, 1))
        blocks.append(csr_matrix(rng.poisson(depth * rates).astype(np.float32)))
    return vstack(blocks, format="csr")


def make_tokenizer(*, seed: int = 0, max_genes: int = 1200) -> ScDivaTokenizer:
    """Make a tokenizer that knows 95 % of the columns, in an order of its own, with entropies.

    Args:
        seed: Equal seed, equal tokenizer.
        max_genes: Genes kept of a cell.

    Returns:
        A tokenizer of 31,350 genes.
    """
    rng = np.random.default_rng(seed)
    known = rng.permutation(N_GENES)[: round((1 - UNKNOWN_FRACTION) * N_GENES)]
    vocabulary = GeneVocabulary(
        [gene_name(gene) for gene in known], gene_entropy=rng.uniform(0.0, 5.0, len(known))
    )
    return ScDivaTokenizer(vocabulary=vocabulary, max_genes=max_genes)


def gene_name(column: int) -> str:
    """Name a column as Ensembl would.

    Args:
        column: Column of the matrix.

    Returns:
        Gene id.
    """
    return f"ENSG{column:011d}"


def write_cells(path: Path, counts: csr_matrix, *, compression: str | None = None) -> None:
    """Write counts as h5ad.

    Args:
        path: File to write.
        counts: (N, 33,000) counts.
        compression: ``gzip``, or None.
    """
    adata = anndata.AnnData(counts)
    adata.var_names = [gene_name(gene) for gene in range(counts.shape[1])]
    adata.obs_names = [f"cell_{cell}" for cell in range(counts.shape[0])]
    adata.write_h5ad(path, compression=compression)
