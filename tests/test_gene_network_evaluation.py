"""The protocol of gene networks: reading references, the universe, one row per method, refusals.

Needs no data. Run: pytest tests/test_gene_network_evaluation.py
"""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from modeling_scdiva.evaluation.gene_network import (
    NetworkProtocol,
    evaluate_gene_network,
    read_reference_network,
)
from modeling_scdiva.evaluation.report import format_result, write_result
from modeling_scdiva.metrics.annotation import log_normalise
from modeling_scdiva.metrics.network import network_metrics
from modeling_scdiva.tasks.gene_network import NetworkSettings
from tokenization_scdiva import synthetic_cells

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
PROTOCOL = NetworkProtocol(n_cells=40, settings=NetworkSettings(min_cells=3, n_groups=2, show_progress=False))


@pytest.fixture(scope="module")
def adata():
    return synthetic_cells(n_cells=60, n_genes=120, seed=1)


@pytest.fixture(scope="module")
def reference():
    """Genes raised in the same type of cells, and one gene that is not there."""
    genes = [[f"GENE{1 + 15 * cell_type + i}" for i in range(15)] for cell_type in range(4)]
    edges = [(of_type[0], target, 1) for of_type in genes for target in of_type[1:]]
    return pd.DataFrame([*edges, ("STAT1", "IRF7", -1)], columns=["tf", "target", "sign"])


@pytest.fixture(scope="module")
def result(adata, reference, fresh_tiny_model, tokenizer):
    model = fresh_tiny_model()
    before = torch.get_rng_state()
    found = evaluate_gene_network(
        adata, model=model, tokenizer=tokenizer, reference=reference, data_name="made up",
        seeds=(0, 1), protocol=PROTOCOL,
    )  # fmt: skip
    assert torch.equal(torch.get_rng_state(), before)
    return found


def test_every_method_is_scored_on_the_same_pairs(result):
    rows = [*result["numbers"], *result["baselines"]]
    methods = {row["method"] for row in rows}
    assert methods == {
        "scDiVa, attention", "scDiVa, conditional", "random weights, attention", "|Pearson|", "|Spearman|",
        "mean expression of the target", "other TFs of the target in the reference", "random",
    }  # fmt: skip
    assert {row["method"] for row in result["numbers"]} == {"scDiVa, attention", "scDiVa, conditional"}
    for part in ("all pairs", "pairs scDiVa scores"):
        of_part = [row for row in rows if row["data"] == f"made up, {part}"]
        assert {row["method"] for row in of_part} == methods
        assert len({(row["n_pairs"], row["n_edges"], row["prevalence"]) for row in of_part}) == 1
        assert all(row["n_seeds"] == 2 for row in of_part)
    reached = [row for row in rows if row["data"].endswith("scDiVa scores")]
    assert all(row["n_unscored"] == 0 for row in reached if row["method"].startswith("scDiVa"))


def test_co_expression_finds_planted_modules_and_chance_does_not(result):
    auroc = {row["method"]: row["auroc"] for row in result["baselines"] if row["data"].endswith("all pairs")}
    assert auroc["|Pearson|"] > 0.8
    assert abs(auroc["random"] - 0.5) < 0.15
    # Every target has one TF here: looking at the other TFs of the target tells its own edge apart.
    assert auroc["other TFs of the target in the reference"] < 0.5


def test_details_and_note(result):
    details = result["details"]
    universe = details["universe"]
    assert universe["left_out_edges"]["gene_not_scored"] == 1
    assert universe["n_tfs"] == len(details["tfs"]) == 4
    assert f"{universe['n_tfs']} TFs x {universe['n_targets']} targets" in result["note"]
    for method in ("scDiVa, attention", "scDiVa, conditional"):
        found = details["differences"][method]
        expected = np.mean(details["tf_auroc"][method]) - np.mean(details["tf_auroc"]["|Pearson|"])
        assert found["difference"] == pytest.approx(expected)
        assert found["difference_low"] <= found["difference"] <= found["difference_high"]
        assert f"{method} minus |Pearson|" in result["note"]


def test_result_is_a_table_and_a_file(result, tmp_path):
    assert "early precision ratio" in format_result(result)
    path = write_result(result, tmp_path, "gene_network")
    assert json.loads(path.read_text("utf-8"))["details"]["tfs"] == result["details"]["tfs"]


def test_pearson_row_is_that_of_numpy(adata, reference, result, tokenizer):
    dense = log_normalise(adata.X).toarray()
    names = list(adata.var["gene_symbols"])
    shares = (dense > 0).mean(axis=0)
    known = set(tokenizer.vocabulary.gene_symbols)
    genes = sorted(name for name in names if shares[names.index(name)] >= 0.01 and name in known)
    tfs = sorted(set(reference["tf"]) & set(genes))
    edges = set(zip(reference["tf"], reference["target"], strict=True))
    is_edge = [[(tf, gene) in edges for gene in genes] for tf in tfs]
    is_candidate = [[tf != gene for gene in genes] for tf in tfs]
    auprc = []
    for seed in (0, 1):
        rows = np.random.default_rng(seed).permutation(60)[:40]
        with np.errstate(invalid="ignore"):
            correlation = np.abs(np.corrcoef(dense[rows].T))
        scores = [[correlation[names.index(tf), names.index(gene)] for gene in genes] for tf in tfs]
        auprc.append(network_metrics(np.array(scores), is_edge, is_candidate=is_candidate)["auprc"])
    row = next(row for row in result["baselines"] if row["method"] == "|Pearson|" and "all" in row["data"])
    assert row["auprc"] == pytest.approx(np.mean(auprc), rel=1e-4)
    assert row["auprc_sd"] == pytest.approx(np.std(auprc, ddof=1), rel=1e-3)


@pytest.mark.parametrize("ending", ["parquet", "csv", "tsv", "csv.gz"])
def test_references_are_read_from_any_table(tmp_path, ending):
    table = pd.DataFrame(
        {
            "TF": ["A", "A", "B", "B"],
            "confidence": ["A", "B", "D", "A"],
            "target": ["X", "Y", "X", None],
            "mor": [1.0, -0.5, 1.0, 1.0],
        }
    )
    path = tmp_path / f"edges.{ending}"
    if ending == "parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, sep="\t" if ending == "tsv" else ",", index=False)
    edges = read_reference_network(path, confidences=["A", "B"])
    assert edges.to_dict("list") == {"tf": ["A", "A"], "target": ["X", "Y"], "sign": [1, -1]}
    assert len(read_reference_network(path)) == 3


def test_words_of_signs(tmp_path):
    signs = ["Activation", "Repression", "Unknown", "-1", None]
    table = pd.DataFrame({"tf": ["A"] * 5, "target": list("VWXYZ"), "mode": signs})
    table.to_csv(tmp_path / "words.csv", index=False)
    assert read_reference_network(tmp_path / "words.csv")["sign"].tolist() == [1, -1, 0, -1, 0]
    table.replace("Unknown", "up").to_csv(tmp_path / "other.csv", index=False)
    with pytest.raises(ValueError, match=r"other\.csv: a sign is a number or one of .* got 'up'"):
        read_reference_network(tmp_path / "other.csv")


def test_unusable_references(tmp_path):
    pd.DataFrame({"source": ["A"], "confidence": ["D"]}).to_csv(tmp_path / "a.csv")
    with pytest.raises(KeyError, match=r"a\.csv has no column 'target'\. Columns: .*'source', 'confidence'"):
        read_reference_network(tmp_path / "a.csv")
    table = pd.DataFrame({"source": ["A"], "target": ["X"]})
    table.to_csv(tmp_path / "b.csv", index=False)
    assert read_reference_network(tmp_path / "b.csv")["sign"].tolist() == [0]
    with pytest.raises(KeyError, match="has no column 'confidence'"):
        read_reference_network(tmp_path / "b.csv", confidences=["A"])
    table.assign(confidence="D").to_csv(tmp_path / "c.csv", index=False)
    with pytest.raises(ValueError, match=r"no edge of confidence \['A'\], only 'D'"):
        read_reference_network(tmp_path / "c.csv", confidences=["A"])
    with pytest.raises(ValueError, match=r"edges\.xlsx: a table of edges is"):
        read_reference_network(tmp_path / "edges.xlsx")


def test_refusals(adata, reference, fresh_tiny_model, tokenizer):
    def evaluate(cells, edges):
        return evaluate_gene_network(
            cells, model=fresh_tiny_model(), tokenizer=tokenizer, reference=edges, data_name="x", seeds=(0,)
        )

    with pytest.raises(TypeError, match="got a path"):
        evaluate("cells.h5ad", reference)
    with pytest.raises(KeyError, match=r"reference has no column 'target'\. Columns: 'tf', 'sign'"):
        evaluate(adata, reference.drop(columns="target"))
    with pytest.raises(ValueError, match=r"None of the 1 edges joins .* by symbol\?"):
        evaluate(adata, reference.iloc[[-1]])


def test_benchmark_writes_one_result_for_all_references(
    adata, reference, fresh_tiny_model, tokenizer, tmp_path, monkeypatch, capsys
):
    fresh_tiny_model().save_pretrained(tmp_path / "scdiva")
    tokenizer.save_pretrained(tmp_path / "scdiva")
    adata.write_h5ad(tmp_path / "made_up.h5ad")
    reference.assign(confidence="A").to_csv(tmp_path / "curated.csv", index=False)
    reference.to_parquet(tmp_path / "bare.parquet")
    words = "--model scdiva --data made_up.h5ad --reference curated.csv bare.parquet --confidences A"
    words += " --methods attention --n_cells 20 --min_cells 3 --seeds 0 1 --device cpu --output results"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run_gene_network.py", *words.split()])
    runpy.run_path(str(BENCHMARKS / "run_gene_network.py"), run_name="__main__")
    assert "wrote results" in capsys.readouterr().out
    (path,) = (tmp_path / "results").glob("*_gene_network.json")
    written = json.loads(path.read_text("utf-8"))
    data = {row["data"].removesuffix(", all pairs") for row in written["numbers"] if "all" in row["data"]}
    assert data == {"made_up, curated A", "made_up, bare"}  # bare has no confidence to choose by
    assert set(written["details"]) == data
    assert len(list((tmp_path / "results").glob("*.png"))) == 2
    assert written["config"]["hidden_size"] == 32
