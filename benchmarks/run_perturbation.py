"""Perturbation response of held-out targets or cell types: a checkpoint beside the baselines and the ceiling.

    python benchmarks/run_perturbation.py --model scdiva --data papalexi2021_eccite_299g.h5ad \
        --match_keys batch --output benchmarks/results
    python benchmarks/run_perturbation.py --model scdiva --data kang2018_ifnb_pbmc.h5ad \
        --match_keys cell_type --holdout_key cell_type --target IFNB=IFNB1 --output benchmarks/results

Each seed deals the targets into folds (or leaves every level of `--holdout_key` out), fine-tunes the
checkpoint and the same network from random weights, and scores both beside no change, the perturbed mean,
matched means, linear models and the split-half ceiling. Targets that the vocabulary lacks stay, as a bare
`<pert>`, and are counted. Half an hour a screen with `small.json` on two cores, minutes on a GPU.
"""

import argparse
from pathlib import Path

import anndata
import torch
from accelerate import Accelerator
from transformers import AutoTokenizer

from modeling_scdiva import ScDivaForMaskedDiffusion
from modeling_scdiva.evaluation import print_result, write_result
from modeling_scdiva.evaluation.figures import draw_delta_scatter
from modeling_scdiva.evaluation.perturbation import PerturbationProtocol, evaluate_perturbation
from modeling_scdiva.finetuning import FinetuningArguments
from modeling_scdiva.provenance import result_path
from modeling_scdiva.tasks.cells import obs_column
from modeling_scdiva.tasks.perturbation_data import unknown_targets
from modeling_scdiva.tasks.perturbation_training import PerturbationSettings


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder with weights and tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="h5ad with raw counts and controls")
    parser.add_argument("--output", type=Path, required=True, help="JSON file, or folder")
    parser.add_argument("--perturbation_key", default="perturbation", help="obs column, pairs as A+B")
    parser.add_argument("--control_label", default="control")
    parser.add_argument("--match_keys", nargs="*", default=[], help="obs columns shared with the controls")
    parser.add_argument("--holdout_key", help="leave the levels of this column out; default: targets")
    parser.add_argument("--target", action="append", default=[], help="NAME=GENE,GENE of what is no gene")
    parser.add_argument("--trainable", default="full", help="lora, full, last_layers or head")
    parser.add_argument("--pairing", default="mean", help="mean or optimal_transport")
    parser.add_argument("--n_folds", type=int, default=4)
    parser.add_argument("--n_epochs", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument(
        "--max_cells", type=int, default=16, help="training cells of a perturbation and group"
    )
    parser.add_argument("--max_genes", type=int, help="genes kept of a cell; default the tokenizer's")
    parser.add_argument(
        "--n_control_cells", type=int, default=128, help="controls a change is predicted from"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    """Evaluate, print, write."""
    arguments = parse_arguments()
    output = result_path(arguments.output, f"perturbation_{arguments.data.stem}")
    adata = anndata.read_h5ad(arguments.data)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = ScDivaForMaskedDiffusion.from_pretrained(arguments.model).to(arguments.device)
    genes = {}
    for entry in arguments.target:
        name, _, listed = entry.partition("=")
        genes[name] = [gene for gene in listed.split(",") if gene]
    reading = {"vocabulary": tokenizer.vocabulary, "control_label": arguments.control_label}
    labels = obs_column(adata, arguments.perturbation_key, what="perturbations")
    unknown = unknown_targets(labels.tolist(), perturbation_genes=genes, **reading)
    result = evaluate_perturbation(
        adata,
        model=model,
        tokenizer=tokenizer,
        perturbation_key=arguments.perturbation_key,
        protocol=PerturbationProtocol(
            data_name=arguments.data.stem,
            control_label=arguments.control_label,
            holdout_key=arguments.holdout_key,
            n_folds=arguments.n_folds,
            seeds=arguments.seeds,
            n_control_cells=arguments.n_control_cells,
        ),
        settings=PerturbationSettings(
            match_keys=arguments.match_keys,
            perturbation_genes=genes | {name: [] for name in unknown},
            pairing=arguments.pairing,
            trainable=arguments.trainable,
            max_cells=arguments.max_cells,
        ),
        arguments=FinetuningArguments(n_epochs=arguments.n_epochs, learning_rate=arguments.learning_rate),
        accelerator=Accelerator(cpu=arguments.device == "cpu"),
        keep_empty_cells=True,
        max_genes=arguments.max_genes,
    )
    result |= {"benchmark": "perturbation", "seeds": arguments.seeds, "bare_targets": unknown}
    result["config"] = {key: value for key, value in model.config.to_diff_dict().items() if key != "auto_map"}
    print_result(result)
    details = result["details"]
    figure = draw_delta_scatter(details["true_delta"], details["predicted_delta"], details["units"])
    print(f"\nwrote {write_result(result, output, 'perturbation', {'delta': figure})}")


if __name__ == "__main__":
    main()
