"""Reconstruct hidden genes and values of held-out cells, beside frequency, rank and arithmetic.

    python examples/evaluate_reconstruction.py --checkpoint scdiva
    accelerate launch examples/evaluate_reconstruction.py --checkpoint scdiva --data cells.h5ad \
        --split_key donor_id

Hides 10 to 95 % of the genes of each held-out cell and scores the hidden ones only. The baselines are fitted
on the other cells: how often a gene occurs (at that rank), and which genes fit arithmetically between the
visible neighbours in the sorted cell. Rows that a model does not beat show nothing learned. The legacy copy
test (clean input, arg-max) stands apart; repeating the next gene passes it.

Without `--data`, made-up cells are scored; without `--checkpoint`, random weights. Writes a JSON and two
pictures.
"""

import argparse
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from modeling_scdiva.evaluation import print_result, write_result
from modeling_scdiva.evaluation.reconstruction import (
    MASK_RATIOS,
    evaluate_reconstruction,
    reconstruction_figures,
)
from modeling_scdiva.provenance import result_path
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
    parser.add_argument("--split_key", help="obs column whose groups stay together, such as a donor")
    parser.add_argument(
        "--mask_ratios", type=float, nargs="+", default=list(MASK_RATIOS), help="shares hidden"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each")
    parser.add_argument("--max_test_cells", type=int, default=50, help="held-out cells scored in each run")
    parser.add_argument("--max_genes", type=int, help="genes kept of a cell; default the tokenizer's")
    parser.add_argument("--output", type=Path, default=Path("results"), help="JSON file, or folder")
    return parser.parse_args()


def main() -> None:
    """Evaluate, print, write."""
    arguments = parse_arguments()
    accelerator = Accelerator()
    accelerator.end_training()  # one process does it
    if not accelerator.is_main_process:
        return
    output = result_path(arguments.output, "reconstruction")  # refuses a name that is taken before the run
    if arguments.checkpoint is None:
        print("No --checkpoint: random weights. Their numbers are those of a model that learned nothing.")
    cells, model, tokenizer = open_or_make_up(arguments.checkpoint, arguments.data, CONFIG)
    model = model.to(accelerator.device).eval()
    reading = {} if arguments.max_genes is None else {"max_genes": arguments.max_genes}
    result = evaluate_reconstruction(
        cells,
        model=model,
        tokenizer=tokenizer,
        name="made-up cells" if arguments.data is None else arguments.data.stem,
        split_key=arguments.split_key,
        mask_ratios=arguments.mask_ratios,
        seeds=arguments.seeds,
        max_test_cells=arguments.max_test_cells,
        **reading,
    )
    print_result(result)
    path = write_result(result, output, "reconstruction", reconstruction_figures(result))
    losses = result["details"]["gene_loss"]
    ratios = result["details"]["mask_ratios"]
    middle = int(np.argmin(np.abs(np.array(ratios) - 0.5)))
    best, baseline = min((curve[middle], name) for name, curve in losses.items() if "scDiVa" not in name)
    print(f"\nWrote {path} and its pictures.")
    print(
        f"Gene loss with {100 * ratios[middle]:g} % hidden: {losses['scDiVa'][middle]:.3f} nats, without a "
        f"network {best:.3f} nats ({baseline})."
    )


if __name__ == "__main__":
    main()
