"""The compiled kernels give the same bytes as plain NumPy, on hostile rows too.

Needs numba, a dependency of the package; no data. Run: pytest tests/test_kernels_scdiva.py
"""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from tokenization_scdiva.counts_scdiva import CountBlock, read_counts
from tokenization_scdiva.kernels_scdiva import compiled_kernels
from tokenization_scdiva.ranking_scdiva import (
    GENE_ORDERS,
    TABLE_WIDTH,
    FlatCells,
    cell_values,
    keep_vocabulary_genes,
    rank_cells,
)

N_COLUMNS, VOCAB_SIZE = 70, 80


def tokenize(block: CountBlock, tokens: np.ndarray, weights: np.ndarray, **ranking: object) -> FlatCells:
    """CSR rows to ranked cells, with every kernel on the way."""
    sizes = block.row_sums().astype(np.float64)
    offsets, token_ids, counts = keep_vocabulary_genes(block.indptr, block.indices, block.data, tokens)
    values = cell_values(offsets, counts, sizes, 1e4)
    cells = FlatCells(offsets, token_ids, values, counts, sizes)
    return rank_cells(cells, ranking_weights=weights, **ranking)


@st.composite
def rows_of_counts(draw: st.DrawFn) -> tuple[CountBlock, np.ndarray, np.ndarray]:
    """Rows with many ties, counts on both sides of the table's width, empty rows, tokens in any order."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (draw(st.integers(1, 6)), N_COLUMNS)
    largest = draw(st.sampled_from([2, TABLE_WIDTH - 1, TABLE_WIDTH, TABLE_WIDTH + 1, 2**20]))
    dense = rng.integers(0, largest + 1, shape) * (rng.random(shape) < draw(st.sampled_from([0.0, 0.3, 1.0])))
    rows, columns = np.nonzero(dense)
    indptr = np.searchsorted(rows, np.arange(shape[0] + 1)).astype(np.int64)
    block = CountBlock(0, indptr, columns.astype(np.int32), dense[rows, columns].astype(np.int32))
    tokens = np.where(rng.random(N_COLUMNS) < 0.9, rng.permutation(N_COLUMNS) + 5, -1)
    weights = rng.choice(draw(st.sampled_from([[1.0], [1.0, 3.0], [1e-3, 1.0, 7.7, 1e3]])), VOCAB_SIZE)
    return block, tokens, weights


@given(rows_of_counts(), st.sampled_from(GENE_ORDERS), st.sampled_from([None, 1, 17, 69]))
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_compiled_and_numpy_agree_byte_for_byte(
    inputs: tuple[CountBlock, np.ndarray, np.ndarray], gene_order: str, max_genes: int | None
) -> None:
    results = []
    for switch in ("1", "0"):
        os.environ["SCDIVA_COMPILED"] = switch
        compiled_kernels.cache_clear()
        results.append(tokenize(*inputs, gene_order=gene_order, max_genes=max_genes))
    del os.environ["SCDIVA_COMPILED"]
    compiled_kernels.cache_clear()
    for compiled, plain in zip(*results, strict=True):
        assert compiled.dtype == plain.dtype
        assert compiled.tobytes() == plain.tobytes()


def test_numpy_takes_over_and_says_so_where_numba_is_missing() -> None:
    script = """
import sys, logging
sys.modules["numba"] = None  # what an environment without it answers
logging.basicConfig()
from tokenization_scdiva.kernels_scdiva import compiled_kernels
assert compiled_kernels() is None
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "numba is not installed: cells are ranked by plain NumPy" in done.stderr


def test_kernels_are_compiled_where_no_folder_can_keep_them() -> None:
    script = """
from numba.core import caching
caching.CompileResultCacheImpl._locator_classes = []  # what numba finds where nothing is writable
import numpy as np
from tokenization_scdiva.kernels_scdiva import compiled_kernels
sums = np.empty(1, np.int64)
compiled_kernels().row_sums(np.array([0, 2]), np.array([1, 2], np.int32), sums)
assert sums == [3]
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_numba_is_not_imported_before_it_is_needed() -> None:
    script = "import sys, tokenization_scdiva; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("column", [-1, N_COLUMNS, 10**6])
def test_a_column_that_the_matrix_lacks_is_refused(kernels: str, column: int) -> None:
    matrix = csr_matrix(np.ones((2, N_COLUMNS), np.float32))
    matrix.indices[-1] = column
    genes = [f"gene_{index}" for index in range(N_COLUMNS)]
    adata = SimpleNamespace(X=matrix, layers={}, raw=None, uns={}, obs_names=["a", "b"], var_names=genes)
    with pytest.raises(ValueError, match=r"names columns .* but has 70 genes: its index is damaged"):
        read_counts(adata)
