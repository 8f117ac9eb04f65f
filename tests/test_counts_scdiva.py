"""Counts are found by the stated rule, proven, and read in canonical blocks whatever the storage.

Needs no data. Run: pytest tests/test_counts_scdiva.py
"""

import hashlib
import logging
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from tokenization_scdiva.counts_scdiva import Counts, read_counts

N_CELLS, N_GENES = 23, 11
# Everything twice: compiled and by plain NumPy.
pytestmark = pytest.mark.usefixtures("kernels")


def make_counts(seed=0, n_cells=N_CELLS, n_genes=N_GENES):
    """Integer matrix with zeros, an empty cell and a silent gene."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.8, (n_cells, n_genes)) * rng.integers(1, 200, (n_cells, n_genes))
    counts[3] = 0
    counts[:, 5] = 0
    return counts


def make_adata(matrix, **kwargs):
    adata = ad.AnnData(matrix, **kwargs)
    adata.obs_names = [f"c{i}" for i in range(adata.n_obs)]
    adata.var_names = [f"g{i}" for i in range(adata.n_vars)]
    return adata


def log_normalised(counts):
    library_size = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return np.log1p(counts / library_size * 1e4).astype(np.float32)


def join_blocks(counts: Counts):
    """Dense (N, G) matrix from blocks, checking what blocks promise on the way."""
    dense = np.zeros((counts.n_cells, counts.n_genes), dtype=np.float64)
    next_cell = 0
    for block in counts.blocks():
        assert block.start == next_cell
        assert (block.indptr.dtype, block.indices.dtype) == (np.int64, np.int32)
        assert block.data.dtype == (np.int32 if counts.kind == "counts" else np.float32)
        assert block.indptr[0] == 0
        assert block.indptr[-1] == len(block.indices) == len(block.data)
        assert (block.data > 0).all()
        for i in range(block.n_cells):
            cell = slice(block.indptr[i], block.indptr[i + 1])
            assert (np.diff(block.indices[cell]) > 0).all()
            dense[block.start + i, block.indices[cell]] = block.data[cell]
        sums = [block.data[a:b].sum() for a, b in zip(block.indptr, block.indptr[1:], strict=False)]
        np.testing.assert_allclose(block.row_sums(), sums, rtol=1e-6)
        next_cell += block.n_cells
    assert next_cell == counts.n_cells
    return dense


def test_hand_computed_block():
    # Row 0: column 2 before column 0, column 2 twice, a stored zero. Row 1: empty. Row 2: one value.
    matrix = sp.csr_matrix((3, 4), dtype=np.float32)
    matrix.data = np.array([5, 1, 2, 0, 7], dtype=np.float32)
    matrix.indices = np.array([2, 0, 2, 3, 1], dtype=np.int32)
    matrix.indptr = np.array([0, 4, 4, 5], dtype=np.int32)
    adata = make_adata(matrix)
    (block,) = read_counts(adata).blocks()
    assert block.indptr.tolist() == [0, 2, 2, 3]
    assert block.indices.tolist() == [0, 2, 1]
    assert block.data.tolist() == [1, 7, 7]
    assert block.row_sums().tolist() == [8, 0, 7]
    assert adata.X.data.tolist() == [5, 1, 2, 0, 7]  # the matrix itself is not changed


CONTAINERS = {
    "dense": np.asarray,
    "fortran": np.asfortranarray,
    "matrix": np.asmatrix,
    "csr": sp.csr_matrix,
    "csc": sp.csc_matrix,
    "csr_array": sp.csr_array,
    "csc_array": sp.csc_array,
}
DTYPES = [np.int8, np.uint16, np.int64, np.uint64, np.float16, np.float32, np.float64]


@pytest.mark.filterwarnings("ignore:.*matrix:PendingDeprecationWarning", "ignore:.*np.matrix")
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_parity_over_containers_and_dtypes(container, dtype):
    if dtype is np.float16 and container not in {"dense", "fortran", "matrix"}:
        pytest.skip("SciPy has no sparse float16")
    expected = np.minimum(make_counts(), 127)
    adata = make_adata(np.zeros(expected.shape))
    adata.layers["counts"] = CONTAINERS[container](expected.astype(dtype))
    counts = read_counts(adata, block_size=5)
    np.testing.assert_array_equal(join_blocks(counts), expected)
    np.testing.assert_array_equal(counts.gene_totals(), expected.sum(axis=0))


def test_bool_is_counts():
    expected = make_counts() > 0
    np.testing.assert_array_equal(join_blocks(read_counts(make_adata(sp.csr_matrix(expected)))), expected)


@pytest.mark.parametrize("seed", range(20))
def test_random_storage_equals_scipy(seed):
    # Unsorted columns, repeated entries and stored zeros: SciPy's own sum is the second implementation.
    rng = np.random.default_rng(seed)
    n_cells, n_genes, nnz = rng.integers(1, 40), rng.integers(1, 30), rng.integers(0, 300)
    indptr = np.concatenate([[0], np.sort(rng.integers(0, nnz + 1, n_cells - 1)), [nnz]])
    matrix = sp.csr_matrix((n_cells, n_genes), dtype=np.float64)
    matrix.data = rng.integers(0, 9, nnz).astype(np.float64)
    matrix.indices = rng.integers(0, n_genes, nnz).astype(np.int32)
    matrix.indptr = indptr.astype(np.int32)
    counts = read_counts(make_adata(matrix), block_size=int(rng.integers(1, 50)))
    np.testing.assert_array_equal(join_blocks(counts), matrix.toarray())


def test_views_follow_their_cells_and_genes():
    expected = make_counts()
    adata = make_adata(sp.csr_matrix(expected), layers={"other": expected})
    cells, genes = [7, 2, 19, 3], [9, 0, 4]
    view = adata[cells, genes]
    for layer in (None, "other"):
        counts = read_counts(view, layer=layer, block_size=3)
        np.testing.assert_array_equal(join_blocks(counts), expected[np.ix_(cells, genes)])
    assert view.is_view


@pytest.mark.parametrize("kind", ["dense", "csr", "csc"])
def test_backed_equals_memory_and_leaves_the_file(kind, tmp_path):
    expected = make_counts()
    container = {"dense": np.asarray, "csr": sp.csr_matrix, "csc": sp.csc_matrix}[kind]
    adata = make_adata(container(expected.astype(np.float32)))
    path = tmp_path / "cells.h5ad"
    adata.write_h5ad(path)
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    backed = ad.read_h5ad(path, backed="r")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        counts = read_counts(backed, block_size=4)
    assert [("CSC" in str(w.message)) for w in caught if w.category is UserWarning] == [True] * (
        kind == "csc"
    )
    np.testing.assert_array_equal(join_blocks(counts), expected)
    cells = [20, 1, 5]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_array_equal(join_blocks(read_counts(backed[cells])), expected[cells])
    backed.file.close()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before


def test_backed_raw_is_read(tmp_path):
    expected = make_counts()
    adata = make_adata(sp.csr_matrix(expected.astype(np.float32)))
    adata.raw = adata.copy()
    adata = adata[:, :4].copy()
    adata.X = adata.X * 0.5
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    counts = read_counts(backed, block_size=4)
    assert (counts.source, counts.use_raw, counts.n_genes) == ("raw.X", True, N_GENES)
    np.testing.assert_array_equal(join_blocks(counts), expected)


def test_backed_is_refused_at_the_block_that_is_wrong(tmp_path):
    expected = make_counts().astype(np.float32)
    expected[15, 2] = 0.5
    make_adata(sp.csr_matrix(expected)).write_h5ad(tmp_path / "cells.h5ad")
    counts = read_counts(ad.read_h5ad(tmp_path / "cells.h5ad", backed="r"), block_size=10)
    blocks = counts.blocks()
    next(blocks)
    with pytest.raises(ValueError, match=r"1 values are not whole \(first: cell 'c15', gene 'g2' = 0.5\)"):
        next(blocks)


def test_lazy_arrays_are_read_in_blocks():
    class LazyMatrix:
        """Stands for a dask array: rows are cut first and computed then."""

        def __init__(self, matrix):
            self.matrix, self.dtype, self.shape = matrix, matrix.dtype, matrix.shape

        def __getitem__(self, rows):
            return LazyMatrix(self.matrix[rows])

        def compute(self):
            return self.matrix

    class Cells:
        def __init__(self, matrix):
            self.X, self.raw, self.layers, self.uns = LazyMatrix(matrix), None, {}, {}
            self.obs_names, self.var_names = range(N_CELLS), range(N_GENES)

    for matrix in (make_counts(), sp.csc_matrix(make_counts())):
        counts = read_counts(Cells(matrix), block_size=4)
        np.testing.assert_array_equal(join_blocks(counts), make_counts())


def test_order_of_sources(caplog):
    expected = make_counts()
    adata = make_adata(sp.csr_matrix(expected * 4))
    assert read_counts(adata).source == "X"
    adata.raw = make_adata(sp.csr_matrix(expected * 3))
    counts = read_counts(adata)
    assert (counts.source, counts.use_raw) == ("raw.X", True)
    adata.layers["counts"] = sp.csr_matrix(expected * 2)
    adata.layers["spliced"] = sp.csr_matrix(expected)
    with caplog.at_level(logging.INFO, logger="tokenization_scdiva.counts_scdiva"):
        assert read_counts(adata).source == "layers['counts']"
    assert "Taking counts from layers['counts']: 23 cells, 11 genes." in caplog.text
    for layer, factor in {"spliced": 1, "counts": 2, "raw.X": 3, "X": 4}.items():
        np.testing.assert_array_equal(join_blocks(read_counts(adata, layer=layer)), expected * factor)
    assert not read_counts(adata, layer="X").use_raw


def test_log1p_takes_raw_only_if_it_passes():
    expected = make_counts()
    values = log_normalised(expected)
    adata = make_adata(values)
    adata.raw = make_adata(expected)
    counts = read_counts(adata, expression_is_log1p=True)  # raw holds counts
    assert (counts.source, counts.kind) == ("X", "log1p")
    np.testing.assert_array_equal(join_blocks(counts), values)
    scaled = make_adata(values - 1)
    scaled.raw = make_adata(values)
    assert read_counts(scaled, expression_is_log1p=True).source == "raw.X"
    scaled.layers["log"] = values
    assert read_counts(scaled, layer="log", expression_is_log1p=True).source == "layers['log']"


def test_rounding_is_not_a_fraction():
    expected = make_counts()
    noisy = expected + np.where(expected > 0, 3e-7, 0)
    np.testing.assert_array_equal(join_blocks(read_counts(make_adata(noisy))), expected)


def refused(matrix, **kwargs):
    """Dense and sparse are refused alike; returns the message."""
    with pytest.raises(ValueError) as dense:  # noqa: PT011  # the message is matched by the caller
        read_counts(make_adata(matrix), **kwargs)
    with pytest.raises(ValueError) as sparse:  # noqa: PT011
        read_counts(make_adata(sp.csr_matrix(matrix)), **kwargs)
    assert str(dense.value) == str(sparse.value)
    return str(dense.value)


def test_not_finite_is_refused():
    matrix = make_counts().astype(float)
    matrix[17, 3], matrix[18, 0], matrix[22, 10] = np.nan, np.inf, -np.inf
    message = refused(matrix, block_size=4)
    assert "3 values are not finite (first: cell 'c17', gene 'g3' = nan)" in message
    assert "Remove those cells or genes first." in message


def test_negative_is_refused():
    matrix = make_counts().astype(float)
    matrix[4, 1] = -3
    message = refused(matrix, block_size=4)
    assert "1 values are negative (first: cell 'c4', gene 'g1' = -3). This looks like scaled" in message


def test_fractions_are_refused():
    matrix = make_counts() * 1.25
    message = refused(matrix, block_size=4)
    assert "values are not whole (first: cell 'c0'" in message
    assert "corrected or normalised counts" in message


def test_log_normalised_is_refused_with_the_way_in():
    message = refused(log_normalised(make_counts()))
    assert "pass expression_is_log1p=True" in message
    assert "no other matrix" in message


def test_too_large_is_refused():
    matrix = make_counts().astype(np.int64)
    matrix[2, 2] = 2**31
    assert "1 values are above 2,147,483,647" in refused(matrix)
    matrix[2, 2] = 2**31 - 1
    assert join_blocks(read_counts(make_adata(matrix)))[2, 2] == 2**31 - 1


def test_repeated_entries_may_not_add_up_beyond_the_limit():
    matrix = sp.csr_matrix((1, 2), dtype=np.int32)
    matrix.data = np.array([2**30, 2**30], dtype=np.int32)
    matrix.indices, matrix.indptr = np.array([1, 1], np.int32), np.array([0, 2], np.int32)
    with pytest.raises(ValueError, match=r"above 2,147,483,647 \(first: cell 'c0', gene 'g1'"):
        read_counts(make_adata(matrix))


def test_float16_beyond_its_exact_range_is_refused():
    adata = make_adata(np.zeros((2, 3)))
    adata.layers["counts"] = np.array([[2050, 0, 1], [0, 0, 2]], dtype=np.float16)
    with pytest.raises(ValueError, match="1 values are above 2,048, where float16 is no longer exact"):
        read_counts(adata)


def test_advice_names_the_matrices_that_pass():
    counts = make_counts()
    adata = make_adata(
        log_normalised(counts), layers={"spliced": counts, "scaled": log_normalised(counts) - 1}
    )
    with pytest.raises(ValueError, match=r"\['spliced', 'scaled'\]. Raw counts: pass layer='spliced'.$"):
        read_counts(adata)
    with pytest.raises(ValueError, match=r"Log1p expression: pass layer='X', expression_is_log1p=True.$"):
        read_counts(adata, layer="scaled", expression_is_log1p=True)
    adata.raw = make_adata(log_normalised(counts))  # raw fails, and nothing else is taken in its place
    with pytest.raises(ValueError, match=r"^raw.X does not hold raw counts.*pass layer='spliced'"):
        read_counts(adata)
    with pytest.raises(ValueError, match="None of them passes either"):
        read_counts(make_adata(counts * 0.5, layers={"half": counts * 0.25 + 100}))


def test_counts_called_log1p_are_refused():
    assert "values are whole numbers. These look like raw counts" in refused(
        np.minimum(make_counts(), 9), expression_is_log1p=True
    )
    assert "before the logarithm" in refused(make_counts() * 0.9, expression_is_log1p=True)


def test_other_base_of_the_logarithm_is_refused():
    adata = make_adata(log_normalised(make_counts()))
    adata.uns["log1p"] = {"base": 2}
    with pytest.raises(ValueError, match="base 2; the natural one is needed"):
        read_counts(adata, expression_is_log1p=True)
    adata.uns["log1p"] = {"base": None}
    assert read_counts(adata, expression_is_log1p=True).kind == "log1p"


def test_missing_layer_is_named():
    adata = make_adata(make_counts(), layers={"spliced": make_counts()})
    with pytest.raises(KeyError, match=r"no layer 'count'; present are \['spliced', 'X'\]"):
        read_counts(adata, layer="count")


@pytest.mark.parametrize("dtype", [object, "U3", complex])
def test_other_dtypes_are_refused(dtype):
    adata = make_adata(np.zeros((2, 3)))
    adata.layers["counts"] = np.array([[1, 0, 1], [0, 0, 2]]).astype(dtype)
    with pytest.raises(TypeError, match=r"layers\['counts'\] has dtype .*; bool, integers or floats"):
        read_counts(adata)


def test_nothing_to_read_is_refused():
    with pytest.raises(ValueError, match=r"X has \(cells, genes\) \(0, 5\)"):
        read_counts(ad.AnnData(np.zeros((0, 5))))
    with pytest.raises(ValueError, match=r"X has \(cells, genes\) \(5, 0\)"):
        read_counts(ad.AnnData(sp.csr_matrix((5, 0))))
    empty = make_adata(np.zeros((2, 3)), layers={"spliced": np.ones((2, 3))})
    empty.X = None
    with pytest.raises(ValueError, match=r"X is absent.*pass layer='spliced'"):
        read_counts(empty)
    with pytest.raises(ValueError, match="block_size must be at least 1 cell, got 0"):
        read_counts(make_adata(make_counts()), block_size=0)


def test_all_zero_and_single_gene_are_counts():
    counts = read_counts(make_adata(sp.csr_matrix((4, 1))))
    assert [block.data.size for block in counts.blocks()] == [0]
    assert counts.gene_totals().tolist() == [0]


def test_sparse_is_never_densified():
    # Dense, this would take 80 GB.
    rng = np.random.default_rng(0)
    cells, genes = rng.integers(0, 100_000, (2, 10_000))
    matrix = sp.csr_matrix((rng.integers(1, 9, 10_000), (cells, genes)), shape=(100_000, 100_000))
    counts = read_counts(ad.AnnData(matrix), block_size=50_000)
    assert counts.gene_totals().sum() == matrix.data.sum()


@pytest.mark.parametrize("cells", ["cells.h5ad", Path("cells.h5ad")])
def test_paths_are_refused(cells):
    with pytest.raises(TypeError, match=r"got a path \(cells\.h5ad\); open it with anndata\.read_h5ad"):
        read_counts(cells)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "refusal"),
    [
        ("pbmc_facs_zheng2017", None),
        ("zheng68k_mini", None),
        ("oligodendroglioma_tirosh2016_nonint", "corrected or normalised counts"),
        ("sciplex3_mini_lognorm", "pass expression_is_log1p=True"),
    ],
)
def test_real_files(real_data, name, refusal):
    adata = ad.read_h5ad(real_data / f"{name}.h5ad")
    if refusal is not None:
        with pytest.raises(ValueError, match=refusal):
            read_counts(adata)
        return
    totals = np.asarray(adata.X.sum(axis=0, dtype=np.float64)).ravel()
    np.testing.assert_array_equal(read_counts(adata).gene_totals(), totals)
