"""Held-out denoising losses of a checkpoint beside every baseline, on the same fixed masks.

    python benchmarks/run_denoising.py --model scdiva --corpus corpus --output benchmarks/results

Fits the baselines on the training split of the corpus, masks its validation split with fixed times and no
depth corruption, and writes losses in total and per bin of diffusion time, and by how much the model beats
each baseline. Beside the JSON: a PNG of the losses over diffusion time and, if the model folder holds
`training_log.jsonl`, one of the training curves. Two minutes on two cores for 1,400 cells and `small.json`.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from modeling_scdiva import ScDivaForMaskedDiffusion
from modeling_scdiva.metrics.denoising import evaluate_denoising, report_denoising
from modeling_scdiva.metrics.denoising_baselines import BaselineFitter, DenoisingBaselines
from modeling_scdiva.provenance import collect_provenance, result_path
from modeling_scdiva.tasks.cells import check_vocabulary
from tokenization_scdiva import CellBatchSampler, CellCorpus, ScDivaDataCollator
from tokenization_scdiva.files import atomic_path, write_json

CELLS_PER_READ = 512
MAIN_BASELINE = {"gene": "rank_unigram", "expression": "rank_score"}
CURVES = {
    "gene": ("unigram", "rank_unigram", "rank_unigram_excluding_visible", "lattice_counts", "model"),
    "expression": ("rank_mean", "gene_mean", "rank_score", "neighbour_score", "model"),
}
MODEL_STYLE = {"linewidth": 2.5, "color": "black", "marker": "o"}
UNITS = {"gene": "gene loss, nats per masked gene", "expression": "value loss, squared log1p units"}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder with weights and tokenizer")
    parser.add_argument("--corpus", type=Path, required=True, help="corpus with a validation split")
    parser.add_argument("--output", type=Path, required=True, help="JSON file, or folder")
    parser.add_argument("--batch_size", type=int, default=32, help="cells, and strata of diffusion time")
    parser.add_argument("--n_mask_draws", type=int, default=1, help="masks drawn of every held-out cell")
    parser.add_argument("--seed", type=int, default=0, help="of masks and times")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def fit_baselines(corpus: CellCorpus, tokenizer: Any) -> DenoisingBaselines:
    """Fit all baselines on the training split."""
    fitter = BaselineFitter(
        tokenizer.ranking_weights, tokenizer.max_genes, n_special_tokens=tokenizer.vocabulary.n_special_tokens
    )
    for start in range(0, len(corpus), CELLS_PER_READ):
        cells = corpus.__getitems__(range(start, min(start + CELLS_PER_READ, len(corpus)))).cells
        fitter.update(cells.token_ids, cells.values, cells.offsets)
    return fitter.finish()


def masked_batches(
    corpus: CellCorpus, tokenizer: Any, arguments: argparse.Namespace, objective: str
) -> Iterator[Any]:
    """Yield every held-out cell with fixed masks, once per draw."""
    collator = ScDivaDataCollator.from_tokenizer(
        tokenizer,
        seed=arguments.seed,
        depth_corruption="none",
        condition_dropout=(0.0, 0.0),
        objective=objective,
        mean_n_genes=float(np.minimum(corpus.n_genes, tokenizer.max_genes).mean()),
    )
    settings = {"batch_size": arguments.batch_size, "max_genes": tokenizer.max_genes, "seed": arguments.seed}
    sampler = CellBatchSampler(corpus.n_genes, **settings, shuffle=False)
    for draw in range(arguments.n_mask_draws):
        sampler.set_epoch(draw)
        yield from DataLoader(corpus, batch_sampler=sampler, collate_fn=collator)


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Write a PNG that is whole or not there."""
    figure.tight_layout()
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png", dpi=150)
    plt.close(figure)
    print(f"wrote {path}")


def draw_time_bins(numbers: dict[str, Any], path: Path) -> None:
    """Draw the losses over diffusion time."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    for axis, (kind, names) in zip(axes, CURVES.items(), strict=True):
        for name in (name for name in names if name in numbers[f"{kind}_loss"]):
            losses = numbers[f"{kind}_loss"][name]["by_time_bin"]
            style = MODEL_STYLE if name == "model" else {"linestyle": "--"}
            centres = [(index + 0.5) / len(losses) for index in range(len(losses))]
            heights = [float("nan") if loss is None else loss for loss in losses]
            axis.plot(centres, heights, label=name.replace("_", " "), **style)
        axis.set(xlabel="diffusion time (share of genes masked)", ylabel=UNITS[kind], xlim=(0, 1))
        axis.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    axes[1].set_yscale("log")  # the baselines lie decades apart
    save_figure(figure, path)


def draw_training(lines: list[dict[str, float]], numbers: dict[str, Any], path: Path) -> None:
    """Draw gene and value loss over the steps of a run, and the main baselines as lines."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    for axis, kind in zip(axes, UNITS, strict=True):
        for prefix, style in (("train", {"alpha": 0.6}), ("eval", {"marker": "o", "color": "black"})):
            points = [(row["step"], row[key]) for row in lines if (key := f"{prefix}_{kind}_loss") in row]
            if points:
                axis.plot(*zip(*points, strict=True), label=prefix, **style)
        name = MAIN_BASELINE[kind]
        axis.axhline(numbers[f"{kind}_loss"][name]["mean"], color="gray", linestyle="--", label=name)
        axis.set(xlabel="step", ylabel=UNITS[kind])
        axis.legend()
    axes[1].set_yscale("log")
    save_figure(figure, path)


def card_rows(numbers: dict[str, Any]) -> dict[str, Any]:
    """Give the losses in the form that model cards and the README print."""
    losses = {kind: numbers[f"{kind}_loss"] for kind in UNITS}
    rows = [
        {"method": name}
        | {f"{kind}_loss": of_kind[name]["mean"] for kind, of_kind in losses.items() if name in of_kind}
        for name in dict.fromkeys(name for of_kind in losses.values() for name in of_kind)
    ]
    n_cells = losses["gene"]["model"]["n_cells"]
    return {
        "title": f"Denoising of {n_cells:,} held-out cells",
        "numbers": [row | {"method": "scDiVa"} for row in rows if row["method"] == "model"],
        "baselines": [row for row in rows if row["method"] != "model"],
        "columns": ["method", "gene_loss", "expression_loss"],
        "note": "Gene loss in nats per masked gene, expression loss in squared log1p units, means over "
        "cells; the same masks for every row. lattice rows and neighbour_score are the arithmetic of the "
        "sort: a loss above them is no more than arithmetic.",
    }


def print_table(numbers: dict[str, Any]) -> None:
    """Print losses, and gains with their standard errors."""
    for kind in UNITS:
        print(f"\n{UNITS[kind]}\n{'':34}{'loss':>10}{'model better by':>24}{'%':>9}")
        gains = numbers[f"{kind}_gain_of_model_over"]
        for name, loss in numbers[f"{kind}_loss"].items():
            gain = gains.get(name)
            told = "{mean:16.4f} ± {standard_error:.4f}{percent:9.1f}".format(**gain) if gain else ""
            print(f"  {name:32}{loss['mean']:10.4f}{told}")


def main() -> None:
    """Evaluate, write, draw, print."""
    arguments = parse_arguments()
    output = result_path(arguments.output, "denoising")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = ScDivaForMaskedDiffusion.from_pretrained(arguments.model).to(arguments.device).eval()
    check_vocabulary(model, tokenizer)
    splits = {
        split: CellCorpus(
            arguments.corpus,
            split,
            ranking_settings=tokenizer.ranking_settings,
            conditions=model.config.conditions,
        )
        for split in ("train", "validation")
    }
    baselines = fit_baselines(splits["train"], tokenizer)
    batches = masked_batches(splits["validation"], tokenizer, arguments, model.config.objective)
    with_lattice = tokenizer.gene_order != "random" and splits["train"].value_kind == "counts"
    losses = evaluate_denoising(batches, baselines=baselines, model=model, with_lattice=with_lattice)
    numbers = report_denoising(losses)
    config = model.config.to_diff_dict()
    log = arguments.model / "training_log.jsonl"
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()] if log.exists() else []
    result = collect_provenance() | numbers | card_rows(numbers)
    result |= {
        "benchmark": "denoising",
        "seed": arguments.seed,
        "batch_size": arguments.batch_size,
        "n_mask_draws": arguments.n_mask_draws,
        "masks": "joint gene and value, t stratified over the batch, depth_corruption none",
        "max_genes": tokenizer.max_genes,
        "n_cells_of_baselines": baselines.n_cells,
        "corpus": {key: splits["train"].manifest[key] for key in ("build_hash", "ranking")}
        | {"n_cells": {split: len(corpus) for split, corpus in splits.items()}}
        | {"datasets": [dataset["name"] for dataset in splits["train"].manifest["datasets"]]},
        "config": {key: value for key, value in config.items() if key != "auto_map"},
        "n_parameters": model.num_parameters(),
        "training": {
            key: row[key] for row in lines for key in ("step", "epoch", "n_cells_seen") if key in row
        },
    }
    write_json(output, result)
    print(f"wrote {output}")
    draw_time_bins(numbers, output.with_name(f"{output.stem}_time_bins.png"))
    if lines:
        draw_training(lines, numbers, output.with_name(f"{output.stem}_training.png"))
    print_table(numbers)
    for name in (MAIN_BASELINE["gene"], "lattice_counts") if with_lattice else (MAIN_BASELINE["gene"],):
        gain = numbers["gene_gain_of_model_over"][name]
        of_bins = " ".join("-" if entry is None else f"{entry:+.3f}" for entry in gain["by_time_bin"])
        told = f"{gain['mean']:+.4f} nats per masked gene ({gain['percent']:+.1f} %)"
        print(f"\ngain over {name} by bin of diffusion time, nats: {of_bins}")
        print(f"model better than {name} by {told}")


if __name__ == "__main__":
    main()
