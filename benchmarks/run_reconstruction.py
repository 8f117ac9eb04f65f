"""Hidden genes and values of held-out cells: a checkpoint beside frequency, rank and arithmetic.

    python benchmarks/run_reconstruction.py --model scdiva --data cells.h5ad more.h5ad \
        --output benchmarks/results

10 to 95 % of the genes of each held-out cell are hidden, three seeds. The lattice rows are what integer
counts and the sort give away by themselves; a gene loss above them shows no biology. The legacy copy test
(clean input, arg-max, ten cells joined) is a row of its own. About three minutes a file with `small.json` on
one core.
Beside the JSON: gene loss and value error over the share of hidden genes, for each file.
"""

import argparse
from pathlib import Path
from typing import Any

import anndata
import torch
from transformers import AutoTokenizer

from modeling_scdiva import ScDivaForMaskedDiffusion
from modeling_scdiva.evaluation import data_names, join_results, print_result, write_result
from modeling_scdiva.evaluation.reconstruction import (
    MASK_RATIOS,
    evaluate_reconstruction,
    reconstruction_figures,
)
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
    parser.add_argument("--mask_ratios", type=float, nargs="+", default=list(MASK_RATIOS))
    parser.add_argument("--max_test_cells", type=int, default=50, help="held-out cells scored per seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    """Evaluate each file, write one result."""
    arguments = parse_arguments()
    output = result_path(arguments.output, "reconstruction")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = ScDivaForMaskedDiffusion.from_pretrained(arguments.model).to(arguments.device).eval()
    results: dict[str, dict[str, Any]] = {}
    figures: dict[str, Any] = {}
    for name, path in data_names(arguments.data).items():
        results[name] = result = evaluate_reconstruction(
            anndata.read_h5ad(path),
            model=model,
            tokenizer=tokenizer,
            name=name,
            split_key=arguments.split_key,
            mask_ratios=arguments.mask_ratios,
            seeds=arguments.seeds,
            max_test_cells=arguments.max_test_cells,
        )
        print_result(result)
        drawn = reconstruction_figures(result)
        figures |= {f"{name}_{kind}": figure for kind, figure in drawn.items()}
    merged = join_results(results) | {"benchmark": "reconstruction", "seeds": arguments.seeds}
    merged["config"] = {key: value for key, value in model.config.to_diff_dict().items() if key != "auto_map"}
    print(f"\nwrote {write_result(merged, output, 'reconstruction', figures)}")


if __name__ == "__main__":
    main()
