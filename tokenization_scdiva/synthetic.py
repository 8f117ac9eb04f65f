"""Small made-up cells with real structure, for tests, documentation and dry runs.

Gamma-Poisson counts: every gene has a base rate, every cell type raises its own marker genes, every cell has
its own depth. That is enough for a model to learn something and for an embedding to separate types; it is no
benchmark.
"""

import anndata
import numpy as np
from scipy.sparse import csr_matrix

MARKERS_PER_TYPE = 15
MARKER_FOLD_CHANGE = 12.0
MEDIAN_LIBRARY_SIZE = 600.0
GAMMA_SHAPE = 2.0


def synthetic_cells(
    *, n_cells: int = 200, n_genes: int = 300, n_cell_types: int = 4, seed: int = 0
) -> anndata.AnnData:
    """Make cells of several types with integer counts.

    Args:
        n_cells: Number of cells N.
        n_genes: Number of genes G, at least 15 per cell type.
        n_cell_types: Number of types; cells are spread evenly over them.
        seed: Equal seed, equal cells.

    Returns:
        AnnData (N, G): ``X`` CSR float32 raw counts, ``obs["cell_type"]``, ``obs["donor_id"]`` (two donors),
        ``var_names`` Ensembl-like ids, ``var["gene_symbols"]``.

    Raises:
        ValueError: If there are too few genes for the markers.
    """
    if n_genes < MARKERS_PER_TYPE * n_cell_types:
        msg = (
            f"{n_cell_types} cell types need {MARKERS_PER_TYPE * n_cell_types} marker genes, got "
            f"n_genes={n_genes}."
        )
        raise ValueError(msg)
    rng = np.random.default_rng(seed)
    base_rate = rng.lognormal(mean=0.0, sigma=1.5, size=n_genes)
    rates = np.tile(base_rate, (n_cell_types, 1))
    for cell_type in range(n_cell_types):
        markers = slice(cell_type * MARKERS_PER_TYPE, (cell_type + 1) * MARKERS_PER_TYPE)
        rates[cell_type, markers] *= MARKER_FOLD_CHANGE
    types = np.arange(n_cells) % n_cell_types
    depth = MEDIAN_LIBRARY_SIZE * rng.lognormal(sigma=0.4, size=n_cells)
    mean = rates[types] / rates[types].sum(axis=1, keepdims=True) * depth[:, None]
    counts = rng.poisson(mean * rng.gamma(GAMMA_SHAPE, 1.0 / GAMMA_SHAPE, size=mean.shape))

    adata = anndata.AnnData(csr_matrix(counts.astype(np.float32)))
    adata.obs_names = [f"cell_{cell}" for cell in range(n_cells)]
    adata.var_names = [f"ENSG{gene:011d}" for gene in range(1, n_genes + 1)]
    adata.var["gene_symbols"] = [f"GENE{gene}" for gene in range(1, n_genes + 1)]
    adata.obs["cell_type"] = [f"type_{cell_type}" for cell_type in types]
    adata.obs["donor_id"] = [f"donor_{cell % 2}" for cell in range(n_cells)]
    return adata
