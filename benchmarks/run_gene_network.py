"""Gene networks of a checkpoint against DoRothEA and TRRUST, beside co-expression, popularity and chance.

    python benchmarks/run_gene_network.py --model scdiva --data cells.h5ad --confidences A B C \
        --reference dorothea_human.parquet trrust_human.parquet --output benchmarks/results

Three draws of cells; one table row per method, once over all pairs and once over those the model can score.
`--n_cells` cells a draw; conditional dependence costs n_groups x (1 + TFs of the cell) forward passes a cell,
attention one. With `small.json` about a second per cell and draw on one core for both together.
"""

import argparse
from pathlib import Path
from typing import Any

import anndata
import torch
from transformers import AutoTokenizer

from modeling_scdiva import ScDivaForMaskedDiffusion
from modeling_scdiva.evaluation import data_names, join_results, print_result, write_result
from modeling_scdiva.evaluation.gene_network import (
    NetworkProtocol,
    evaluate_gene_network,
    network_figures,
    read_reference_network,
)
from modeling_scdiva.provenance import result_path
from modeling_scdiva.tasks.gene_network import METHODS, NetworkSettings


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder with weights and tokenizer")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="h5ad files with raw counts")
    parser.add_argument("--reference", type=Path, nargs="+", required=True, help="tables of known edges")
    parser.add_argument("--confidences", nargs="+", help="kept where a table has a column confidence")
    parser.add_argument("--output", type=Path, required=True, help="JSON file, or folder")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--n_cells", type=int, default=300, help="cells drawn per seed")
    parser.add_argument("--min_cells", type=int, default=10, help="cells that must show both genes")
    parser.add_argument("--n_groups", type=int, default=4, help="parts in which targets are hidden")
    parser.add_argument("--batch_size", type=int, default=16, help="cells, or runs, per forward pass")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def read_edges(path: Path, confidences: list[str] | None) -> tuple[str, Any]:
    """Read a reference; confidence is asked for only where the table has it."""
    try:
        edges = read_reference_network(path, confidences=confidences)
    except KeyError as error:
        if confidences is None or "confidence" not in str(error):
            raise
        return path.stem, read_reference_network(path)
    return " ".join([path.stem, *([] if confidences is None else ["".join(confidences)])]), edges


def main() -> None:
    """Evaluate each file against each reference, write one result."""
    arguments = parse_arguments()
    output = result_path(arguments.output, "gene_network")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = ScDivaForMaskedDiffusion.from_pretrained(arguments.model).to(arguments.device).eval()
    settings = NetworkSettings(arguments.min_cells, arguments.batch_size, arguments.n_groups)
    protocol = NetworkProtocol(arguments.n_cells, arguments.methods, settings=settings)
    results: dict[str, dict[str, Any]] = {}
    figures: dict[str, Any] = {}
    for data, path in data_names(arguments.data).items():
        cells = anndata.read_h5ad(path)
        for reference in arguments.reference:
            name, edges = read_edges(reference, arguments.confidences)
            name = f"{data}, {name}"
            results[name] = result = evaluate_gene_network(
                cells, model=model, tokenizer=tokenizer, reference=edges, data_name=name,
                seeds=arguments.seeds, protocol=protocol,
            )  # fmt: skip
            print_result(result)
            drawn = network_figures(result)
            figures |= {f"{data}_{reference.stem}_{key}": drawn[key] for key in drawn}
    merged = join_results(results)
    merged |= {"benchmark": "gene_network", "seeds": arguments.seeds, "n_cells": arguments.n_cells}
    merged["config"] = {key: value for key, value in model.config.to_diff_dict().items() if key != "auto_map"}
    print(f"\nwrote {write_result(merged, output, 'gene_network', figures)}")


if __name__ == "__main__":
    main()
