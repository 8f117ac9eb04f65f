"""Gene tables resolve the names of today and yesterday to one gene, or to none where they mean several.

Needs no data. Run: pytest tests/test_gene_table.py
"""

import pandas as pd
import pytest

from tokenization_scdiva.gene_table import canonical_genes, read_gene_tables
from tokenization_scdiva.genes_scdiva import find_genes
from tokenization_scdiva.vocabulary_scdiva import GeneVocabulary

HGNC = pd.DataFrame(
    [
        # symbol, ensembl_gene_id, prev_symbol, alias_symbol, status, locus_group
        ("SEPTIN9", "ENSG01", "SEPT9|MSF", "AF17q25|SHARED", "Approved", "protein-coding gene"),
        ("TAFAZZIN", "ENSG02", "TAZ", "", "Approved", "protein-coding gene"),
        ("WWTR1", "ENSG03", "", "TAZ|SHARED", "Approved", "protein-coding gene"),
        ("MSF", "ENSG04", "", "", "Approved", "protein-coding gene"),  # a symbol of today, once SEPTIN9's
        ("NOID", "", "OLDNOID", "", "Approved", "non-coding RNA"),  # GENCODE knows the id
        ("NOWHERE", "", "", "", "Approved", "other"),  # nobody knows an id
        ("ARMC4", "ENSG07", "", "", "Approved", "protein-coding gene"),  # GENCODE says ODAD2
        ("GONE", "ENSG98", "", "", "Entry Withdrawn", "protein-coding gene"),
        ("DISEASE", "", "", "", "Approved", "phenotype"),
        ("TBCE", "ENSG08", "", "", "Approved", "protein-coding gene"),  # two genes in GENCODE
    ],
    columns=["symbol", "ensembl_gene_id", "prev_symbol", "alias_symbol", "status", "locus_group"],
)
GENCODE = pd.DataFrame(
    [
        ("ENSG01.7", "SEPTIN9"),
        ("ENSG05", "NOID"),
        ("ENSG07", "ODAD2"),
        ("ENSG08", "TBCE"),
        ("ENSG09", "TBCE"),
        ("ENSG10", "Y_RNA"),
        ("ENSG11", "Y_RNA"),
        ("ENSG12", "ENSG12"),
        ("ENSG13", ""),
        ("ENSG14", "NOVEL"),
        ("ENSG14_PAR_Y", "NOVEL"),
    ],
    columns=["ensembl_id", "gene_symbol"],
)


def resolve(table, names):
    """Gene and evidence of each of some different names, None for a name that means no gene or several."""
    ids = dict(zip(table.symbols, table.symbols, strict=True))
    found = find_genes({"names": [name or None for name in names]}, ids, table.symbol_ids, table.alias_ids)
    return [(gene_id, how.removeprefix("by_")) if gene_id else None for gene_id, how in found]


@pytest.fixture
def table(tmp_path):
    HGNC.to_parquet(tmp_path / "hgnc.parquet")
    GENCODE.to_csv(tmp_path / "gencode.csv.gz", index=False)
    return read_gene_tables([tmp_path / "gencode.csv.gz", tmp_path / "hgnc.parquet"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ENSG01", ("ENSG01", "id")),
        ("ENSG01.12", ("ENSG01", "id")),
        ("SEPTIN9", ("ENSG01", "symbol")),
        ("SEPT9", ("ENSG01", "alias")),
        ("AF17q25", ("ENSG01", "alias")),
        ("MSF", ("ENSG04", "symbol")),  # never an alias of SEPTIN9
        ("TAZ", None),  # once TAFAZZIN, alias of WWTR1
        ("SHARED", None),
        ("NOID", ("ENSG05", "symbol")),
        ("OLDNOID", ("ENSG05", "alias")),
        ("NOWHERE", ("NOWHERE", "id")),
        ("ARMC4", ("ENSG07", "symbol")),
        ("ODAD2", ("ENSG07", "alias")),
        ("TBCE", ("ENSG08", "symbol")),  # HGNC decides
        ("Y_RNA", None),
        ("ENSG11", ("ENSG11", "id")),
        ("ENSG12", ("ENSG12", "id")),
        ("ENSG13", ("ENSG13", "id")),
        ("NOVEL", ("ENSG14", "symbol")),
        ("GONE", None),
        ("DISEASE", None),
        ("septin9", None),
        ("", None),
    ],
)
def test_hand_made_tables(table, name, expected):
    assert resolve(table, [name]) == [expected]


def test_names_for_a_vocabulary(table):
    gene_ids = ["ENSG09", "ENSG08", "ENSG01", "ENSG10", "ENSG11", "ENSG99"]
    symbols, aliases = table.names_for_vocabulary(gene_ids)
    assert symbols == ["TBCE", "TBCE", "SEPTIN9", "Y_RNA", "Y_RNA", "ENSG99"]
    assert aliases == {"AF17q25": "ENSG01", "SEPT9": "ENSG01", "TBCE": "ENSG08"}
    assert GeneVocabulary(gene_ids, symbols, aliases=aliases).aliases == aliases


def test_every_name_resolves_to_its_gene(table):
    for gene_id in table.symbols:
        (symbol,), others = table.names_for_vocabulary([gene_id])
        (found,) = resolve(table, [symbol])
        assert found in {(gene_id, "symbol"), (gene_id, "id"), ("ENSG08", "symbol"), None}
        assert [found for name in others for found in resolve(table, [name])] == [
            (gene_id, "alias") for _ in others
        ]
    assert not set(table.alias_ids) & (set(table.symbols) | set(table.symbols.values()))


@pytest.mark.parametrize("ending", ["parquet", "tsv", "txt", "csv", "tsv.gz", "csv.gz"])
def test_file_kinds_agree(tmp_path, ending, table):
    for name, frame in {"hgnc": HGNC, "gencode": GENCODE}.items():
        path = tmp_path / f"{name}.{ending}"
        if ending == "parquet":
            frame.to_parquet(path)
        else:
            frame.to_csv(path, sep="," if "csv" in ending else "\t", index=False)
    again = read_gene_tables([tmp_path / f"hgnc.{ending}", str(tmp_path / f"gencode.{ending}")])
    assert again == table


def test_one_path_and_other_column_names(tmp_path):
    frame = GENCODE.rename(columns={"ensembl_id": "Gene_ID", "gene_symbol": "gene_name"})
    frame.to_csv(tmp_path / "genes.tsv", sep="\t", index=False)
    assert resolve(read_gene_tables(str(tmp_path / "genes.tsv")), ["NOVEL"]) == [("ENSG14", "symbol")]


def test_canonical_genes_with_a_table(table):
    columns = {
        "var_names": ["SEPT9", "SEPTIN9", "UNKNOWN", "nan", "MSF", "X", "TBCE", "TBCE-1", "Sept9"],
        "gene_ids": [None, None, "ENSG97", "", None, "ENSG02.3", None, None, "ENSMUSG01"],
    }
    gene_ids, report = canonical_genes(columns, table)
    assert gene_ids == ["ENSG01", "ENSG01", None, None, "ENSG04", "ENSG02", "ENSG08", "ENSG08", None]
    # The first entry of a gene counts, the others are duplicates.
    assert (report.by_id, report.by_symbol, report.by_alias) == (1, 2, 1)
    assert (report.duplicates, report.unknown, report.null) == (2, 2, 1)
    assert report.unknown_examples == ("UNKNOWN", "Sept9")


def test_canonical_genes_without_a_table():
    columns = {
        "var_names": ["row0", "row1", "TBCE-1", None, "row4", "row5"],
        "gene_symbols": ["CD3D", "MALAT1", None, "", "PLCXD1", "CD3D"],
        "feature_id": ["ENSG01.4", None, None, "NA", "ENSG14_PAR_Y", "ENSG01"],
    }
    gene_ids, report = canonical_genes(columns)
    assert gene_ids == ["ENSG01", "MALAT1", "TBCE-1", None, None, "ENSG01"]
    assert (report.by_id, report.by_symbol, report.duplicates, report.null, report.unknown) == (1, 2, 2, 1, 0)


def test_canonical_genes_refuses_columns_that_do_not_fit():
    with pytest.raises(ValueError, match=r"got lengths \{'a': 2, 'b': 1\}"):
        canonical_genes({"a": ["x", "y"], "b": ["x"]})


def test_wrong_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="At least one gene table"):
        read_gene_tables([])
    with pytest.raises(FileNotFoundError, match=r"none.tsv does not exist"):
        read_gene_tables(tmp_path / "none.tsv")
    (tmp_path / "genes.gtf").write_text("x")
    with pytest.raises(ValueError, match=r"genes.gtf must end in .parquet"):
        read_gene_tables(tmp_path / "genes.gtf")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"has the columns \['a', 'b'\]. Wanted is the HGNC form"):
        read_gene_tables(tmp_path / "other.csv")
    (tmp_path / "empty.csv").write_text("gene_id,gene_name\n7157,TP53\n")
    with pytest.raises(ValueError, match="has 1 rows, but no gene in them"):
        read_gene_tables(tmp_path / "empty.csv")


@pytest.mark.real_data
def test_real_tables(real_data):
    reference = real_data / "reference"
    table = read_gene_tables([reference / "hgnc_human.parquet", reference / "gencode_human.parquet"])
    expected = {
        "TSPAN6": ("ENSG00000000003", "symbol"),
        "SEPT9": ("ENSG00000184640", "alias"),
        "CD20": ("ENSG00000156738", "alias"),
        "HLA-A": ("ENSG00000206503", "symbol"),
        "NKX2-1": ("ENSG00000136352", "symbol"),
        "TBCE": ("ENSG00000284770", "symbol"),
        "Y_RNA": None,
    }
    assert {name: resolve(table, [name])[0] for name in expected} == expected
    # Second implementation, on the one-to-one part: a pandas join of symbol and id.
    hgnc = pd.read_parquet(reference / "hgnc_human.parquet")
    hgnc = hgnc[hgnc.status.eq("Approved") & hgnc.ensembl_gene_id.ne("")].drop_duplicates(
        "ensembl_gene_id", keep=False
    )
    found = resolve(table, hgnc.symbol.tolist())
    assert found == [(i, "symbol") for i in hgnc.ensembl_gene_id]
