"""Impute expression: a dense profile of every cell, and how good it is on entries whose truth is known.

    python examples/impute_dropout.py --checkpoint scdiva
    accelerate launch examples/impute_dropout.py --checkpoint scdiva --data cells.h5ad --genes CD3E MS4A1 \
        --measured_genes panel.txt --split_key donor_id

Writes an h5ad with `layers["scdiva_imputed"]` (expected log1p value), `layers["scdiva_probability"]` that the
gene is detected, `layers["scdiva_value"]` and `layers["scdiva_observed"]` (NaN: not measured). Then it hides
expressed and silent entries, thins the counts to a quarter and measures a panel only, and compares with gene
means, the sequencing depth, smoothing over neighbours and, with `--scvi`, scVI. Any gene can be asked for if
the checkpoint was pretrained with latent_loss_weight > 0; else only values at known slots are scored.

Without `--data`, made-up cells are imputed; without `--checkpoint`, random weights impute them. Do not run
differential tests on imputed values.
"""

import argparse
import json
from pathlib import Path

from accelerate import Accelerator

from modeling_scdiva.evaluation import print_result, write_result
from modeling_scdiva.evaluation.imputation import evaluate_imputation, imputation_figures
from modeling_scdiva.provenance import result_path
from modeling_scdiva.tasks.imputation import impute_expression
from tokenization_scdiva import open_or_make_up

CONFIG = Path(__file__).parent / "configs" / "tiny.json"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", help="folder or hub name; default: random weights, to see how it runs"
    )
    parser.add_argument("--data", type=Path, help="h5ad with raw counts; default: made-up cells")
    parser.add_argument("--genes", nargs="+", help="gene ids or symbols to impute; default those of the file")
    parser.add_argument(
        "--measured_genes", type=Path, help="text file, a gene a line: the others are missing"
    )
    parser.add_argument("--split_key", help="obs column whose groups stay together, such as a donor")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one evaluation each")
    parser.add_argument("--max_test_cells", type=int, default=50, help="held-out cells scored in each")
    parser.add_argument("--scvi", action="store_true", help="train scVI as a baseline, too: minutes")
    parser.add_argument("--batch_size", type=int, default=32, help="cells per forward pass")
    parser.add_argument(
        "--output", type=Path, default=Path("results"), help="folder of imputed cells and JSON"
    )
    return parser.parse_args()


def main() -> None:
    """Impute, evaluate, print, write."""
    arguments = parse_arguments()
    accelerator = Accelerator()
    accelerator.end_training()  # one process does it
    if not accelerator.is_main_process:
        return
    output = result_path(arguments.output, "imputation")  # refuses a name that is taken before the run
    if arguments.checkpoint is None:
        print("No --checkpoint: random weights. Their numbers are those of a model that learned nothing.")
    network = json.loads(CONFIG.read_text("utf-8")) | {"latent_loss_weight": 1.0}  # it has the decoder
    cells, model, tokenizer = open_or_make_up(arguments.checkpoint, arguments.data, network)
    model = model.to(accelerator.device).eval()
    name = "made-up cells" if arguments.data is None else arguments.data.stem

    # 1. Impute.
    if model.query_decoder is None:
        print(
            "This checkpoint has no gene-query decoder (latent_loss_weight=0): no dense profile is written."
        )
    else:
        measured = arguments.measured_genes
        imputed = impute_expression(
            cells,
            model=model,
            tokenizer=tokenizer,
            genes=arguments.genes,
            measured_genes=None if measured is None else measured.read_text("utf-8").split(),
            batch_size=arguments.batch_size,
        )
        path = output.with_name(f"{output.stem}_{name.replace(' ', '_')}.h5ad")
        path.parent.mkdir(parents=True, exist_ok=True)
        imputed.write_h5ad(path)
        print(f"{imputed.n_obs} cells x {imputed.n_vars} genes in {path}, {list(imputed.layers)}.")

    # 2. What it is worth where the truth is known.
    result = evaluate_imputation(
        cells,
        model=model,
        tokenizer=tokenizer,
        name=name,
        split_key=arguments.split_key,
        seeds=arguments.seeds,
        max_test_cells=arguments.max_test_cells,
        include_scvi=arguments.scvi,
    )
    print_result(result)
    path = write_result(result, output, "imputation", imputation_figures(result))
    rows = [row for row in [*result["numbers"], *result["baselines"]] if "without a molecule" in row["data"]]
    print(f"\nWrote {path} and its pictures.")
    print("AUROC of genes lost at a quarter of the depth: ", end="")
    print(", ".join(f"{row['method']} {row['auroc']:.3f}" for row in rows))


if __name__ == "__main__":
    main()
