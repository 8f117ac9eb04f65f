"""Score cells: how likely is each under the model, and which stand out?

    python examples/score_cells.py --checkpoint scdiva --data cells.h5ad
    accelerate launch examples/score_cells.py --checkpoint scdiva --data cells.h5ad --label_key cell_type

Writes an h5ad whose `obs` holds `scdiva_nll` (nats per cell, an upper bound, with its standard error and its
parts: number of genes, genes, counts), `scdiva_nll_per_token` and `scdiva_is_truncated`, and prints how well
this score finds spoilt cells (genes shuffled, doublets, ambient molecules, fewer molecules) beside detectors
that see depth alone, the residual of a PCA, and distances to other cells. With `--label_key`, for a
checkpoint that was trained with this column as a condition, `scdiva_label_log_prob` says how well each label
fits.

Without `--data`, made-up cells are scored; without `--checkpoint`, random weights score them.
"""

import argparse
from pathlib import Path

from accelerate import Accelerator

from modeling_scdiva.evaluation import print_result, write_result
from modeling_scdiva.evaluation.scoring import evaluate_scoring
from modeling_scdiva.provenance import result_path
from modeling_scdiva.tasks import score_cells, score_labels
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
    parser.add_argument("--label_key", help="obs column that is a condition of the checkpoint")
    parser.add_argument("--n_draws", type=int, default=64, help="network calls per cell")
    parser.add_argument("--max_test_cells", type=int, default=30, help="cells of each kind in the comparison")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=32, help="masked cells in one call")
    parser.add_argument(
        "--output", type=Path, default=Path("results"), help="folder of scored cells and JSON"
    )
    return parser.parse_args()


def main() -> None:
    """Score, write, compare."""
    arguments = parse_arguments()
    accelerator = Accelerator()
    accelerator.end_training()  # one process does it
    if not accelerator.is_main_process:
        return
    output = result_path(arguments.output, "scoring")  # refuses a name that is taken before the run
    if arguments.checkpoint is None:
        print("No --checkpoint: random weights. Their numbers are those of a model that learned nothing.")
    cells, model, tokenizer = open_or_make_up(arguments.checkpoint, arguments.data, CONFIG)
    model = model.to(accelerator.device).eval()
    name = "made-up cells" if arguments.data is None else arguments.data.stem
    how = {"model": model, "tokenizer": tokenizer, "batch_size": arguments.batch_size}

    # 1. Every cell.
    scores = score_cells(cells, n_draws=arguments.n_draws, seed=arguments.seed, show_progress=True, **how)
    cells.obs = cells.obs.join(scores)
    if arguments.label_key is not None:
        posterior = score_labels(cells, condition=arguments.label_key, seed=arguments.seed, **how)
        labels = cells.obs[arguments.label_key].astype(str)
        cells.obs["scdiva_label_log_prob"] = [
            posterior.at[cell, label] if label in posterior.columns else float("nan")
            for cell, label in labels.items()
        ]
    path = output.with_name(f"{output.stem}_{name.replace(' ', '_')}.h5ad")
    path.parent.mkdir(parents=True, exist_ok=True)
    cells.write_h5ad(path)
    print(f"Scored {cells.n_obs} cells into obs of {path}.")

    # 2. What the score is worth where spoilt cells are known.
    result = evaluate_scoring(
        cells,
        name=name,
        n_draws=arguments.n_draws,
        max_test_cells=arguments.max_test_cells,
        seed=arguments.seed,
        **how,
    )
    print_result(result)
    print(f"\nWrote {write_result(result, output, 'scoring', {})}.")
    print(
        f"Median {scores['scdiva_nll_per_token'].median():.3f} nats per token, "
        f"{scores['scdiva_is_truncated'].mean():.0%} of the cells cut at {tokenizer.max_genes} genes."
    )


if __name__ == "__main__":
    main()
