"""Every entry of a file finds its gene by the best evidence there is, or a line in the report.

Needs no data. Run: pytest tests/test_genes_scdiva.py
"""

import json
import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from tokenization_scdiva.gene_table import canonical_genes, read_gene_tables
from tokenization_scdiva.genes_scdiva import (
    GeneMatchReport,
    check_count_overlap,
    clean_name,
    ensembl_id,
    gene_name_columns,
    is_par_y,
    likely_species,
    match_genes,
    without_unique_suffix,
)
from tokenization_scdiva.vocabulary_scdiva import GeneVocabulary

GENES = {
    "ENSG00000000003": "TSPAN6",
    "ENSG00000167286": "CD3D",
    "ENSG00000206503": "HLA-A",
    "ENSG00000136352": "NKX2-1",
    "ENSG00000284770": "TBCE",
    "ENSG00000184640": "SEPTIN9",
    "ENSG00000182378": "PLCXD1",
}


@pytest.fixture
def vocabulary():
    return GeneVocabulary(list(GENES), list(GENES.values()), aliases={"SEPT9": "ENSG00000184640"})


def symbols_of(match, vocabulary):
    return [None if token < 0 else vocabulary.gene_symbols[token] for token in match.token_ids]


def test_hand_made_file(vocabulary):
    columns = {
        "var_names": [
            "ENSG00000000003.15",
            "CD3D",
            "SEPT9",
            "nan",
            "AL391845.2",
            "TBCE",
            "TBCE-1",
            "hla-a",
            "X",
        ],
        "gene_ids": [None, None, "", float("nan"), None, None, "NA", None, "ENSG00000206503"],
    }
    totals = np.array([5, 5, 5, 5, 5, 1, 2, 5, 5])
    match = match_genes(columns, vocabulary, gene_totals=totals)
    assert symbols_of(match, vocabulary) == [
        "TSPAN6", "CD3D", "SEPTIN9", None, None, None, "TBCE", None, "HLA-A",
    ]  # fmt: skip
    assert match.token_ids.dtype == np.int64
    assert match.report == GeneMatchReport(9, 2, 2, 1, 1, 2, 1, ("AL391845.2", "hla-a"))
    assert json.loads(json.dumps(match.report.to_dict()))["unknown_examples"] == ["AL391845.2", "hla-a"]
    assert str(match.report) == (
        "matched 5 of 9 genes (55.6 %): 2 by id, 2 by symbol, 1 by alias; not used: 1 duplicates, "
        "2 unknown (such as AL391845.2, hla-a), 1 without a name"
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ENSG00000000003", "ENSG00000000003"),
        ("ENSG00000000003.15", "ENSG00000000003"),
        ("ENSMUSG00000024798.3", "ENSMUSG00000024798"),
        ("ENSG00000182378.15_PAR_Y", "ENSG00000182378"),
        ("AL391845.2", None),
        ("RP11-34P13.7", None),
        ("ENSG", None),
        ("ENSG00000000003-1", None),
        ("ensg00000000003", None),
        ("", None),
    ],
)
def test_ensembl_ids(name, expected):
    assert ensembl_id(name) == expected


def test_y_copies_are_duplicates(vocabulary):
    assert is_par_y("ENSG00000182378.15_PAR_Y")
    assert is_par_y("ENSGR0000182378")
    assert not is_par_y("ENSG00000182378.1")
    columns = {
        "gene_ids": ["ENSG00000182378.15_PAR_Y", "ENSG00000182378.15", "ENSGR0000182378"],
        "gene_symbols": ["PLCXD1"] * 3,
    }
    match = match_genes(columns, vocabulary)
    assert symbols_of(match, vocabulary) == [None, "PLCXD1", None]
    assert match.report.duplicates == 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (" CD3D ", "CD3D"), (b"CD3D", "CD3D"), (7157, "7157"), (None, None), (np.nan, None), (pd.NA, None),
        ("", None), ("NaN", None), ("none", None), ("NA", None), ("NANS", "NANS"), ("NONO", "NONO"),
    ],
)  # fmt: skip
def test_clean_name(name, expected):
    assert clean_name(name) == expected


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_make_unique_is_undone_only_where_it_happened(vocabulary):
    names = {"TBCE", "TBCE-1", "TBCE-3", "IGHV3-30", "IGHV3-30-3", "NKX2-1"}
    assert without_unique_suffix("TBCE-1", names) == "TBCE"
    for name in ("TBCE-3", "IGHV3-30-3", "NKX2-1", "HLA-A", "TBCE"):
        assert without_unique_suffix(name, names) is None
    # What anndata itself makes of repeated names comes back to one gene, the most expressed.
    adata = ad.AnnData(
        np.ones((1, 6)), var=pd.DataFrame(index=["TBCE", "HLA-A", "TBCE", "NKX2-1", "TBCE", "CD3D"])
    )
    adata.var_names_make_unique()
    match = match_genes(gene_name_columns(adata), vocabulary, gene_totals=np.array([1, 1, 3, 1, 3, 1]))
    assert symbols_of(match, vocabulary) == [None, "HLA-A", "TBCE", "NKX2-1", None, "CD3D"]
    # A suffix whose name does not occur is no suffix.
    match = match_genes({"var_names": ["TBCE-1", "CD3D"]}, vocabulary)
    assert symbols_of(match, vocabulary) == [None, "CD3D"]


def test_id_beats_symbol_beats_alias(vocabulary):
    # One entry each whose columns disagree, whatever the order of the columns.
    a, b = {"x": ["CD3D"]}, {"y": ["ENSG00000206503"]}
    for columns in (a | b, b | a):
        assert symbols_of(match_genes(columns, vocabulary), vocabulary) == ["HLA-A"]
    a, b = {"x": ["SEPT9"]}, {"y": ["CD3D"]}
    for columns in (a | b, b | a):
        assert symbols_of(match_genes(columns, vocabulary), vocabulary) == ["CD3D"]


def test_retired_id_falls_back_to_the_symbol_but_another_species_does_not(vocabulary):
    columns = {
        "id": ["ENSG99999999999", "ENSMUSG00000000001", "ENSG00000206503"],
        "s": ["CD3D", "TSPAN6", "HLA-A"],
    }
    match = match_genes(columns, vocabulary)
    assert symbols_of(match, vocabulary) == ["CD3D", None, "HLA-A"]
    assert match.report.unknown_examples == ("ENSMUSG00000000001",)


def test_special_tokens_are_no_genes(vocabulary):
    match = match_genes({"var_names": ["<mask>", "<pad>", "CD3D"]}, vocabulary)
    assert match.token_ids.tolist() == [-1, -1, vocabulary.token_ids["ENSG00000167286"]]


def test_ambiguous_symbol_needs_an_alias():
    ids, symbols = ["ENSG1", "ENSG2", "ENSG3"], ["TBCE", "TBCE", "CD3D"]
    columns = {"var_names": ["TBCE", "CD3D"]}
    assert match_genes(columns, GeneVocabulary(ids, symbols)).token_ids.tolist() == [-1, 7]
    decided = GeneVocabulary(ids, symbols, aliases={"TBCE": "ENSG2"})
    assert match_genes(columns, decided).token_ids.tolist() == [6, 7]


def match_by_loop(names, totals, vocabulary):
    """Second implementation for one column of symbols, ids and aliases: plain loops."""
    tokens = []
    for name in names:
        gene_id = vocabulary.aliases.get(name, name.split(".")[0])
        by_symbol = {s: i for i, s in enumerate(vocabulary.gene_symbols)}
        tokens.append(vocabulary.token_ids.get(gene_id, by_symbol.get(name, -1)))
    for token in set(tokens) - {-1}:
        same = [i for i, other in enumerate(tokens) if other == token]
        best = max(same, key=lambda i: (totals[i], -i))
        for i in same:
            tokens[i] = token if i == best else -1
    return tokens


@pytest.mark.parametrize("seed", range(20))
def test_random_files_equal_plain_loops(vocabulary, seed):
    rng = np.random.default_rng(seed)
    pool = [
        *GENES,
        *GENES.values(),
        *(f"{gene_id}.{i}" for i, gene_id in enumerate(GENES)),
        "SEPT9",
        "U1",
        "U2",
    ]
    names = rng.choice(pool, 30).tolist()
    totals = rng.integers(0, 4, 30)
    match = match_genes({"var_names": names}, vocabulary, gene_totals=totals)
    assert match.token_ids.tolist() == match_by_loop(names, totals, vocabulary)
    used = match.token_ids[match.token_ids >= 0]
    assert len(set(used.tolist())) == len(used) == match.report.n_matched
    r = match.report
    assert r.n_genes == r.n_matched + r.duplicates + r.unknown + r.null == 30
    # The order of the genes in the file changes nothing but ties.
    totals = rng.permutation(30)
    order = rng.permutation(30)
    straight = match_genes({"var_names": names}, vocabulary, gene_totals=totals).token_ids
    permuted = match_genes({"v": [names[i] for i in order]}, vocabulary, gene_totals=totals[order]).token_ids
    np.testing.assert_array_equal(permuted, straight[order])


def test_name_columns(caplog):
    var = pd.DataFrame(
        {
            "Gene_Ids": pd.Categorical(["ENSG1", "ENSG2", None]),
            "feature_name": ["A", np.nan, " C "],
            "mean": [1.0, 2.0, 3.0],
        },
        index=["a", "b", "nan"],
    )
    adata = ad.AnnData(np.ones((2, 3)), var=var)
    with caplog.at_level(logging.INFO, logger="tokenization_scdiva.genes_scdiva"):
        columns = gene_name_columns(adata)
    assert columns == {
        "var_names": ["a", "b", None],
        "Gene_Ids": ["ENSG1", "ENSG2", None],
        "feature_name": ["A", None, "C"],
    }
    assert "taken from var_names, Gene_Ids, feature_name" in caplog.text
    assert gene_name_columns(adata, gene_id_key="feature_name") == {"feature_name": ["A", None, "C"]}
    with pytest.raises(
        KeyError, match=r"var has no column 'symbol' .*\['Gene_Ids', 'feature_name', 'mean'\]"
    ):
        gene_name_columns(adata, gene_id_key="symbol")


def test_raw_has_its_own_names():
    adata = ad.AnnData(np.ones((2, 3)), var=pd.DataFrame({"gene_ids": list("xyz")}, index=list("abc")))
    adata.raw = adata.copy()
    adata = adata[:, :1].copy()
    assert gene_name_columns(adata)["var_names"] == ["a"]
    assert gene_name_columns(adata, use_raw=True) == {"var_names": list("abc"), "gene_ids": list("xyz")}
    with pytest.raises(KeyError, match=r"raw.var has no column 'symbol'"):
        gene_name_columns(adata, use_raw=True, gene_id_key="symbol")


MOUSE = ["Cd3d", "Tspan6", "Xkr4", "Gm1992", "Rp1", "Sox17", "Mrpl15", "Lypla1", "mt-Nd1", "H2-K1"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            MOUSE,
            r"Only 0 of 10 genes .*'Cd3d'.*'ENSG00000000003 / TSPAN6'.* mouse or rat genes.*is human",
        ),
        ([f"ENSMUSG{i:011d}" for i in range(9)], "look like mouse genes, the vocabulary is human: map them"),
        ([f"ENSDARG{i:011d}.2" for i in range(9)], "look like zebrafish genes"),
        ([f"ENSXYZG{i:011d}" for i in range(9)], r"look like ENSXYZG \(Ensembl\) genes"),
        (
            [f"GRCh38_G{i}" for i in range(5)] + [f"mm10___G{i}" for i in range(5)],
            r"\['GRCh38_', 'mm10___'\]",
        ),
        ([str(i) for i in range(9)], "Names are numbers: name the column"),
        (
            [f"ENSG9{i:010d}" for i in range(9)],
            r"an overlap of 0.0%, at least 10% is needed \(min_gene_overlap\)",
        ),
    ],
)
def test_small_overlap_is_refused_with_its_likely_cause(vocabulary, names, message):
    with pytest.raises(ValueError, match=message):
        match_genes({"var_names": names}, vocabulary)


def test_transposed_file_is_recognised(vocabulary):
    with pytest.raises(ValueError, match=r"7 of 7 cell names are genes: is the matrix"):
        match_genes({"var_names": ["AAAC-1", "AAAG-1"]}, vocabulary, cell_names=list(GENES.values()))
    with pytest.raises(ValueError, match=r"'AAAG-1'\], the vocabulary \[[^]]*\]\.$"):
        match_genes({"var_names": ["AAAC-1", "AAAG-1"]}, vocabulary, cell_names=["c1", "c2"])


def test_overlap_is_of_the_smaller_side(vocabulary):
    many = [*GENES, *(f"U{i}" for i in range(1000))]
    assert match_genes({"v": many}, vocabulary, min_gene_overlap=1.0).report.n_matched == len(GENES)
    assert match_genes({"v": ["CD3D"]}, vocabulary, min_gene_overlap=1.0).report.n_matched == 1
    with pytest.raises(ValueError, match=r"an overlap of 50.0%, at least 60% is needed"):
        match_genes({"v": ["CD3D", "U1"]}, vocabulary, min_gene_overlap=0.6)


def test_wrong_arguments_are_refused(vocabulary):
    with pytest.raises(ValueError, match="Several entries are the same gene; pass gene_totals"):
        match_genes({"v": ["CD3D", "CD3D"]}, vocabulary)
    with pytest.raises(ValueError, match="gene_totals needs one number per gene: 2 genes, got 1"):
        match_genes({"v": ["CD3D", "TBCE"]}, vocabulary, gene_totals=np.ones(1))
    with pytest.raises(ValueError, match=r"got lengths \{'v': 2, 'w': 1\}"):
        match_genes({"v": ["CD3D", "TBCE"], "w": ["x"]}, vocabulary)
    for columns in ({}, {"v": []}):
        with pytest.raises(ValueError, match="at least one gene; got lengths"):
            match_genes(columns, vocabulary)


def test_count_overlap():
    report = GeneMatchReport(3, 1, 0, 0, 0, 2, 0, ("U1", "U2"))
    check_count_overlap(report, 5, 10)
    with pytest.raises(ValueError, match=r"Only 40.0% of the counts .*at least 50% .*such as U1, U2"):
        check_count_overlap(report, 4, 10)
    for total in (0, np.nan):
        with pytest.raises(ValueError, match="holds no molecules"):
            check_count_overlap(report, 0, total)


def test_likely_species():
    assert likely_species(["CD3D", "TSPAN6", "MALAT1", "C1orf112"]) == "human"
    assert likely_species(MOUSE) == "mouse or rat"
    assert likely_species(["ENSG00000000003", "Xyz"]) == "human"
    assert likely_species(["1", "2"]) is None
    assert likely_species([]) is None


@pytest.mark.real_data
def test_real_files(real_data):
    reference = real_data / "reference"
    table = read_gene_tables([reference / "hgnc_human.parquet", reference / "gencode_human.parquet"])
    symbols, aliases = table.names_for_vocabulary(table.symbols)
    vocabulary = GeneVocabulary(list(table.symbols), symbols, aliases=aliases)
    for name, least in {
        "pbmc_facs_zheng2017": 0.97,
        "kang2018_ifnb_pbmc": 0.97,
        "crohn_gut_scp1884": 0.87,
    }.items():
        adata = ad.read_h5ad(real_data / f"{name}.h5ad", backed="r")
        columns = gene_name_columns(adata)
        match = match_genes(columns, vocabulary, gene_totals=adata.var["n_cells"].to_numpy())
        assert match.report.n_matched >= least * adata.n_vars
        # A vocabulary with all of a table's names finds the genes that the table itself finds.
        gene_ids, _ = canonical_genes(columns, table)
        used = match.token_ids >= 0
        assert [vocabulary.gene_ids[i] for i in match.token_ids[used]] == [
            gene_id for gene_id, is_used in zip(gene_ids, used, strict=True) if is_used
        ]
    mouse = ad.read_h5ad(real_data / "mouse_brain_merfish_mini.h5ad", backed="r")
    with pytest.raises(ValueError, match="look like mouse genes, the vocabulary is human"):
        match_genes(gene_name_columns(mouse), vocabulary)
    with pytest.raises(ValueError, match="look like mouse or rat genes"):
        match_genes({"var_names": mouse.var_names.tolist()}, vocabulary)
