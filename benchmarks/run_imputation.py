"""Imputation and denoising of held-out cells: a checkpoint beside gene means, depth, neighbours and scVI.

    python benchmarks/run_imputation.py --model scdiva --data cells.h5ad more.h5ad --scvi \
        --output benchmarks/results

Values hidden at known slots and entries hidden at 10, 50 and 90 %, a quarter of the depth by binomial
thinning, and a panel of 300 genes from which the others are predicted; three seeds. Everything but the first
needs a checkpoint with a gene-query decoder. About a minute a file with `small.json` on one core, with scVI
several. Beside the JSON: detection over the share of hidden entries, and calibration of the on/off
probability, for each file.
"""

import argparse
from pathlib import Path
from typing import Any

import anndata
import torch
from transformers import AutoTokenizer

from modeling_scdiva import ScDivaForMaskedDiffusion
from modeling_scdiva.evaluation import data_names, join_results, print_result, write_result
from modeling_scdiva.evaluation.imputation import evaluate_imputation, imputation_figures
from modeling_scdiva.provenance import result_path


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder with weights and tokenizer")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="h5ad files with raw counts")
    parser.add_argument("--output", type=Path, required=True, help="JSON file, or folder")
    parser.add_argument("--split_key", help="obs column whose groups stay together; default: single cells")
    parser.add_argument("--max_test_cells", type=int, default=100, help="held-out cells scored per seed")
    parser.add_argument("--scvi", action="store_true", help="train scVI for every seed and task")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    """Evaluate each file, write one result."""
    arguments = parse_arguments()
    output = result_path(arguments.output, "imputation")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = ScDivaForMaskedDiffusion.from_pretrained(arguments.model).to(arguments.device).eval()
    results: dict[str, dict[str, Any]] = {}
    figures: dict[str, Any] = {}
    for name, path in data_names(arguments.data).items():
        results[name] = result = evaluate_imputation(
            anndata.read_h5ad(path),
            model=model,
            tokenizer=tokenizer,
            name=name,
            split_key=arguments.split_key,
            seeds=arguments.seeds,
            max_test_cells=arguments.max_test_cells,
            include_scvi=arguments.scvi,
        )
        print_result(result)
        drawn = imputation_figures(result)
        figures |= {f"{name}_{kind}": figure for kind, figure in drawn.items()}
    merged = join_results(results) | {"benchmark": "imputation", "seeds": arguments.seeds}
    merged["config"] = {key: value for key, value in model.config.to_diff_dict().items() if key != "auto_map"}
    print(f"\nwrote {write_result(merged, output, 'imputation', figures)}")


if __name__ == "__main__":
    main()
