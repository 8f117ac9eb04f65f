"""A vocabulary from files: genes are joined, entropies are those of one pass, unmeasured is not zero.

Needs no data. Run: pytest tests/test_vocabulary_builder.py
"""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from tokenization_scdiva import GeneVocabulary, build_vocabulary, synthetic_cells
from tokenization_scdiva.gene_table import read_gene_tables


def write(folder, **adatas):
    """Files of cells, by data set name."""
    for name, adata in adatas.items():
        adata.write_h5ad(folder / f"{name}.h5ad")
    return {name: folder / f"{name}.h5ad" for name in adatas}


def build(files, **settings) -> GeneVocabulary:
    return build_vocabulary(files, show_progress=False, **settings)[0]


def cells_of(genes, counts, symbols=None):
    adata = ad.AnnData(sp.csr_matrix(np.array(counts, dtype=np.float32)))
    adata.var_names = genes
    if symbols is not None:
        adata.var["gene_symbols"] = symbols
    return adata


def entropy_of(vocabulary):
    return dict(zip(vocabulary.gene_ids[5:], vocabulary.gene_entropy[5:], strict=True))


A, B, C, D = (f"ENSG0000000000{i}" for i in range(1, 5))


def dense_entropy(counts, n_bins=32):
    """A second implementation: numpy histograms of the whole dense matrix."""
    values = np.log1p(1e4 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))
    edges = np.linspace(0, np.log1p(1e4), n_bins + 1)
    entropies = []
    for column in values.T:
        n = np.histogram(column[column > 0], edges)[0]
        share = np.concatenate([[np.sum(column == 0)], n]) / len(column)
        entropies.append(-np.sum(share[share > 0] * np.log(share[share > 0])))
    return np.array(entropies)


def test_entropy_by_hand(tmp_path):
    # Gene A is 1/2 of two cells and 0 in two others: two bins of one half, ln 2. Gene B fills the cells.
    files = write(tmp_path, cells=cells_of([A, B], [[5, 5], [5, 5], [0, 5], [0, 5]]))
    entropy = entropy_of(build(files))
    assert entropy[A] == pytest.approx(np.log(2))
    assert entropy[B] == pytest.approx(np.log(2))  # half of the cells at 1/2, half at 1: also two bins


def test_files_equal_one_pass(tmp_path):
    whole = synthetic_cells(n_cells=150, n_genes=90, seed=2)
    parts = write(tmp_path, a=whole[:40].copy(), b=whole[40:41].copy(), c=whole[41:].copy())
    one = write(tmp_path, whole=whole)
    vocabulary = build(one)
    assert build(parts).content_hash == vocabulary.content_hash
    entropy = entropy_of(vocabulary)
    wanted = dense_entropy(whole.X.toarray().astype(np.float64))
    is_seen = np.asarray(whole.X.sum(axis=0)).ravel() > 0
    found = np.array([entropy.get(name, np.nan) for name in whole.var_names])
    np.testing.assert_array_equal(np.isfinite(found), is_seen)
    np.testing.assert_allclose(found[is_seen], wanted[is_seen], rtol=1e-6)
    assert vocabulary.source["n_cells"] == 150
    assert vocabulary.source["datasets"] == ["whole"]


def test_unmeasured_is_not_zero(tmp_path):
    both = cells_of([A, B], [[5, 5], [3, 7], [0, 5]])
    alone = build(write(tmp_path, both=both))
    # A file that does not measure A says nothing about A, ...
    with_other = build(write(tmp_path, both=both, other=cells_of([B], [[4], [9]])))
    assert entropy_of(with_other)[A] == entropy_of(alone)[A]
    assert entropy_of(with_other)[B] != entropy_of(alone)[B]
    # ... one that measures it and finds none does.
    with_zeros = build(write(tmp_path, both=both, zeros=cells_of([A, B], [[0, 4], [0, 9]])))
    assert entropy_of(with_zeros)[A] != entropy_of(alone)[A]


@pytest.mark.parametrize("names", [("a", "b", "c"), ("c", "b", "a"), ("b", "a", "c")])
def test_symbols_join_ensembl_genes_in_any_order_of_files(tmp_path, names):
    ids_alone = cells_of([f"{A}.3", B], [[1, 2], [3, 4]])
    ids_and_symbols = cells_of([A, C], [[1, 2], [3, 4]], ["AA", "CC"])
    symbols_alone = cells_of(["AA", "CC", "DD"], [[1, 2, 1], [3, 4, 1]])
    adatas = dict(zip(names, (ids_alone, ids_and_symbols, symbols_alone), strict=True))
    vocabulary = build(write(tmp_path, **dict(sorted(adatas.items()))))
    assert vocabulary.gene_ids[5:] == ["DD", A, B, C]
    assert vocabulary.gene_symbols[5:] == ["DD", "AA", B, "CC"]
    joined = build(write(tmp_path, only=cells_of([A, C, "DD"], [[1, 2, 1], [3, 4, 1]])))
    doubled = build(write(tmp_path, x=cells_of([A, C, "DD"], [[1, 2, 1], [3, 4, 1]]), y=symbols_alone,
                          z=cells_of([A, C], [[1, 2], [3, 4]], ["AA", "CC"])))  # fmt: skip
    assert entropy_of(doubled)["DD"] == entropy_of(joined)["DD"]


def test_a_symbol_of_two_genes_joins_neither(tmp_path):
    two = cells_of([A, B], [[1, 2], [3, 4]], ["SAME", "SAME"])
    vocabulary, reports = build_vocabulary(
        write(tmp_path, two=two, symbol=cells_of(["SAME"], [[1], [2]])), show_progress=False
    )
    assert vocabulary.gene_ids[5:] == [A, B, "SAME"]
    assert [report["genes"]["unknown"] for report in reports] == [0, 0]


def test_gene_table_says_what_names_mean(tmp_path):
    table = pd.DataFrame({
        "symbol": ["NEW", "CC"], "ensembl_gene_id": [A, C], "prev_symbol": ["OLD", ""],
        "alias_symbol": ["", "C2"],
    })  # fmt: skip
    table.to_csv(tmp_path / "hgnc.tsv", sep="\t", index=False)
    files = write(tmp_path, a=cells_of(["OLD", "CC", "NOVEL"], [[1, 2, 3], [4, 5, 6]]))
    vocabulary, (report,) = build_vocabulary(
        files, gene_table=read_gene_tables([tmp_path / "hgnc.tsv"]), show_progress=False
    )
    assert vocabulary.gene_ids[5:] == [A, C]
    assert vocabulary.gene_symbols[5:] == ["NEW", "CC"]
    assert vocabulary.aliases["OLD"] == A
    assert (report["genes"]["by_alias"], report["genes"]["unknown"]) == (1, 1)


def test_files_that_the_gene_table_does_not_know_are_refused(tmp_path):
    symbols = ["CD3D", "CD3E", "MALAT1", "TSPAN6", "ACTB", "GAPDH", "CD19", "CD4", "CD8A", "MS4A1"]
    ids = [f"ENSG{i:011}" for i in range(10)]
    frame = pd.DataFrame({"gene_id": ids, "gene_name": symbols})
    frame.to_csv(tmp_path / "gencode.tsv", sep="\t", index=False)
    table = read_gene_tables(tmp_path / "gencode.tsv")
    human = cells_of(symbols, np.ones((2, 10)))
    mouse = cells_of([*(s.capitalize() for s in symbols[1:]), "CD3D"], np.ones((2, 10)))
    files = write(tmp_path, human=human, mouse=mouse)
    message = (
        r"mouse\.h5ad: Only 1 of 10 genes are in the gene table of 10: an overlap of 10\.0%, at least 20% is "
        r"needed \(min_gene_overlap\).*such as \['Cd3e'.*the gene table \['ENSG00000000000 / CD3D'.*"
        r"These look like mouse or rat genes, the vocabulary is human: map them to orthologs"
    )
    with pytest.raises(ValueError, match=message):
        build(files, gene_table=table, min_gene_overlap=0.2)
    assert len(build(files, gene_table=table)) == 15
    turned = cells_of(["c1", "c2"], np.ones((2, 2)))
    turned.obs_names = ["CD3D", "CD4"]
    files = write(tmp_path, turned=turned)
    with pytest.raises(ValueError, match=r"2 of 2 cell names are genes: is the matrix transposed\?"):
        build(files, gene_table=table)


def test_two_species_are_refused(tmp_path):
    human, mouse = cells_of([A, B], [[1, 2], [3, 4]]), cells_of(["ENSMUSG01.2", "Cd3d"], [[1, 2], [3, 4]])
    message = r"of several species: human in .*a\.h5ad, .*b\.h5ad; mouse in .*c\.h5ad\. Build one vocabulary"
    with pytest.raises(ValueError, match=message):
        build(write(tmp_path, a=human, b=human, c=mouse))
    both = cells_of([A, "ENSMUSG01"], [[1, 2], [3, 4]])
    with pytest.raises(ValueError, match=r"of several species: human in .*d\.h5ad; mouse in .*d\.h5ad\."):
        build(write(tmp_path, d=both))
    assert build(write(tmp_path, c=mouse)).gene_ids[5:] == ["Cd3d", "ENSMUSG01"]


def test_n_genes_keeps_the_most_variable(tmp_path):
    counts = [[1, 20, 50, 9], [90, 20, 50, 0], [1, 20, 50, 0], [90, 20, 50, 9]]
    files = write(tmp_path, cells=cells_of([A, B, C, D], counts))
    assert build(files, n_genes=2).gene_ids[5:] == [A, D]
    whole = entropy_of(build(files))
    assert entropy_of(build(files, n_genes=2)) == {A: whole[A], D: whole[D]}
    assert build(files, n_genes=100).gene_ids[5:] == [A, B, C, D]


def test_keep_genes_come_on_top_of_the_most_variable(tmp_path, caplog):
    counts = [[1, 20, 50, 9, 0], [90, 20, 50, 0, 0], [1, 20, 50, 0, 0], [90, 20, 50, 9, 0]]
    symbols = ["AA", "BB", "CC", "DD", "EE"]
    files = write(tmp_path, cells=cells_of([A, B, C, D, "ENSG00000000005"], counts, symbols))
    built = build(files, n_genes=2, min_cells=3, keep_genes=["DD", D, A, "EE", "nothing"])
    assert built.gene_ids[5:] == [A, C, D]  # A and C vary most, D is seen in two cells
    assert built.source["keep_genes_missing"] == ["EE", "nothing"]
    assert (
        "2 of 5 genes to keep are expressed in no cell of the files and left out: EE, nothing." in caplog.text
    )
    assert entropy_of(built)[D] == entropy_of(build(files))[D]
    assert build(files, n_genes=2).source["keep_genes_missing"] == []


def test_min_cells_leaves_rare_genes_out(tmp_path):
    files = write(tmp_path, cells=cells_of([A, B, C], [[1, 1, 0], [1, 0, 0], [1, 0, 0]]))
    assert build(files).gene_ids[5:] == [A, B]  # C is seen in no cell
    assert build(files, min_cells=2).gene_ids[5:] == [A]
    with pytest.raises(ValueError, match="No gene is expressed in 4 cells or more; lower min_cells"):
        build(files, min_cells=4)


def test_files_are_read_as_asked(tmp_path):
    adata = synthetic_cells(n_cells=50, n_genes=90, seed=4)
    wanted = build(write(tmp_path, plain=adata))
    other = ad.AnnData(
        adata.X * 0.5, var=adata.var.rename(index=lambda name: f"x{name}"), layers={"umi": adata.X}
    )
    other.var["my_ids"] = list(adata.var_names)
    files = write(tmp_path, other=other)
    found = build(files, layer="umi", gene_id_key="my_ids")
    assert entropy_of(found) == entropy_of(wanted)
    with pytest.raises(ValueError, match=r"other\.h5ad: X does not hold raw counts.*pass layer='umi'"):
        build(files)
    counts = adata.X.toarray().astype(np.float64)
    adata.X = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True)).astype(np.float32)
    log1p = build(write(tmp_path, log1p=adata), expression_is_log1p=True)
    assert entropy_of(log1p) == entropy_of(wanted)
