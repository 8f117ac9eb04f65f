"""Predict how expression responds to perturbations, seen and unseen; or clamp genes in silico, untrained.

    accelerate launch examples/predict_perturbation.py --checkpoint scdiva --data screen.h5ad \
        --match_keys batch --perturbations JAK2 STAT1+IRF1 --target IFNb=IFNB1
    python examples/predict_perturbation.py --checkpoint scdiva --mode clamp --data cells.h5ad --off SPI1

`--mode finetune` learns the changes of a screen, saves the model and writes an h5ad (perturbations x genes)
whose `X` is the change of mean log1p expression against the controls; examples/evaluate.py scores that.
`--mode clamp` switches genes off or up and compares with random genes: an association, no measurement.
"""

import argparse
from pathlib import Path
from typing import Any

import anndata
import numpy as np
from accelerate import Accelerator
from transformers import AutoTokenizer

from modeling_scdiva import ScDivaForMaskedDiffusion
from modeling_scdiva.adapters import save_adapter
from modeling_scdiva.finetuning import FinetuningArguments
from modeling_scdiva.fresh_model import fresh_model
from modeling_scdiva.tasks.cells import obs_column
from modeling_scdiva.tasks.clamping import ClampSettings, clamp_genes
from modeling_scdiva.tasks.perturbation import finetune_perturbation, predict_perturbation
from modeling_scdiva.tasks.perturbation_data import control_cells, unknown_targets
from modeling_scdiva.tasks.perturbation_training import PerturbationSettings, with_delta_decoder
from tokenization_scdiva import GeneVocabulary, ScDivaTokenizer, synthetic_cells

CONFIG = Path(__file__).parent / "configs" / "tiny.json"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mode", choices=("finetune", "clamp"), default="finetune")
    parser.add_argument("--checkpoint", help="folder or hub name; default: random weights")
    parser.add_argument("--data", type=Path, help="h5ad with raw counts; default: a made-up screen")
    parser.add_argument("--perturbation_key", default="perturbation", help="obs column, pairs as A+B")
    parser.add_argument("--control_label", default="control", help="its entry for controls")
    parser.add_argument("--match_keys", nargs="*", default=[], help="obs columns shared with the controls")
    parser.add_argument("--perturbations", nargs="+", help="what to predict; default: those of the screen")
    parser.add_argument("--target", action="append", default=[], help="NAME=GENE,GENE of what is no gene")
    parser.add_argument("--bare_unknown", action="store_true", help="keep targets the vocabulary lacks")
    parser.add_argument("--trainable", default="full", help="lora, full, last_layers or head")
    parser.add_argument("--pairing", default="mean", help="mean or optimal_transport")
    parser.add_argument("--n_epochs", type=int, default=10)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--max_cells", type=int, default=50, help="of a perturbation and group, in training")
    parser.add_argument("--off", nargs="*", default=[], help="clamp: genes to switch off")
    parser.add_argument("--up", nargs="*", default=[], help="clamp: genes to raise")
    parser.add_argument("--n_cells", type=int, default=100, help="clamp: cells to read, controls where known")
    parser.add_argument("--n_random_sets", type=int, default=20, help="clamp: sets of random genes")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for what is written")
    return parser.parse_args()


def made_up_screen(gene_ids: list[str]) -> anndata.AnnData:
    """Make cells in which each of five targets raises eight genes."""
    cells = synthetic_cells(n_cells=420)
    cells.var_names = gene_ids or list(cells.var_names)
    del cells.var["gene_symbols"]
    targets = list(cells.var_names[:5])
    names = np.resize(["control", *targets, f"{targets[0]}+{targets[1]}"], cells.n_obs)
    counts, rng = cells.X.toarray(), np.random.default_rng(0)
    for place, target in enumerate(targets):
        is_hit = np.array([target in name.split("+") for name in names])
        counts[is_hit, 100 + 8 * place : 108 + 8 * place] += rng.poisson(20, (is_hit.sum(), 8))
    cells.X = counts
    cells.obs["perturbation"] = names
    return cells


def load(arguments: argparse.Namespace) -> tuple[anndata.AnnData, Any, Any]:
    """Return cells, a diffusion model and its tokenizer; made up where nothing was named."""
    if arguments.checkpoint is None:
        print("No --checkpoint: random weights.")
        cells = made_up_screen([]) if arguments.data is None else anndata.read_h5ad(arguments.data)
        vocabulary = GeneVocabulary(list(cells.var_names), gene_entropy=np.ones(cells.n_vars))
        tokenizer = ScDivaTokenizer(vocabulary=vocabulary, max_genes=128)
        return cells, fresh_model(CONFIG, tokenizer), tokenizer
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    genes = tokenizer.vocabulary.gene_ids[tokenizer.vocabulary.n_special_tokens :][:300]
    cells = made_up_screen(genes) if arguments.data is None else anndata.read_h5ad(arguments.data)
    return cells, ScDivaForMaskedDiffusion.from_pretrained(arguments.checkpoint), tokenizer


def learn(arguments: argparse.Namespace, cells: anndata.AnnData, model: Any, tokenizer: Any) -> None:
    """Fine-tune on the screen (some of it decides when to stop), save, predict, write."""
    labels = obs_column(cells, arguments.perturbation_key, what="perturbations")
    named_controls = {
        "perturbation_key": arguments.perturbation_key, "control_label": arguments.control_label
    }  # fmt: skip
    named = (entry.partition("=") for entry in arguments.target)
    genes = {name: [gene for gene in listed.split(",") if gene] for name, _, listed in named}
    reading = {"vocabulary": tokenizer.vocabulary, "control_label": arguments.control_label}
    unknown = unknown_targets(labels, perturbation_genes=genes, **reading)
    if unknown and arguments.bare_unknown:
        print(f"Targets that the vocabulary lacks, so a bare <pert>: {', '.join(unknown)}.")
        genes |= {name: [] for name in unknown}
    fit = finetune_perturbation(
        cells,
        model=with_delta_decoder(model),
        tokenizer=tokenizer,
        **named_controls,
        settings=PerturbationSettings(
            match_keys=arguments.match_keys,
            perturbation_genes=genes,
            pairing=arguments.pairing,
            trainable=arguments.trainable,
            max_cells=arguments.max_cells,
        ),
        arguments=FinetuningArguments(n_epochs=arguments.n_epochs, learning_rate=arguments.learning_rate),
        keep_empty_cells=True,
    )
    if not Accelerator().is_main_process:
        return
    first, last = (fit.history[epoch]["delta_loss"] for epoch in (0, -1))
    print(f"Loss {first:.3f} -> {last:.3f} (predicting no change: 1).")
    save_adapter(fit.model, arguments.output / "scdiva_perturbation", tokenizer=tokenizer)
    predicted = predict_perturbation(
        control_cells(cells, **named_controls),
        model=fit.model,
        tokenizer=tokenizer,
        perturbations=arguments.perturbations or [*fit.perturbations, *fit.validation],
        perturbation_genes=genes,
        keep_empty_cells=True,
    )
    predicted.write_h5ad(arguments.output / "expression_delta.h5ad")
    for name, row in zip(predicted.obs_names, predicted.X, strict=True):
        strongest = np.argsort(-np.abs(row))[:5]
        text = [f"{predicted.var['gene_symbols'].iloc[gene]} {row[gene]:+.2f}" for gene in strongest]
        print(f"{name}: {', '.join(text)}")
    print("Held out, beside the perturbed mean and other baselines: evaluate.py --task perturbation.")
    print(f"{predicted.n_obs} perturbations x {predicted.n_vars} genes, model: {arguments.output.resolve()}")


def clamp(arguments: argparse.Namespace, cells: anndata.AnnData, model: Any, tokenizer: Any) -> None:
    """Clamp genes in control cells, print what moves most, write the table."""
    if arguments.perturbation_key in cells.obs:
        key, label = arguments.perturbation_key, arguments.control_label
        cells = control_cells(cells, perturbation_key=key, control_label=label)
    chosen = np.random.default_rng(0).permutation(cells.n_obs)[: arguments.n_cells]
    off = arguments.off or ([] if arguments.up else [cells.var_names[int(np.argmax(cells.X.sum(axis=0)))]])
    found = clamp_genes(
        cells[np.sort(chosen)],
        model=model,
        tokenizer=tokenizer,
        off=off,
        up=arguments.up,
        settings=ClampSettings(n_random_sets=arguments.n_random_sets),
        keep_empty_cells=True,
    )
    table = found.effects.sort_values("p_value", kind="stable")
    table.to_csv(arguments.output / "clamped_genes.csv")
    print(f"Off: {off}, up: {arguments.up}; {found.n_cells} cells changed; read out from {found.readout}.")
    print(table.head(10).to_string(float_format="{:.4f}".format))
    print(f"The embedding moves by {found.embedding_shift:.5f}; p = {found.embedding_p_value:.3f}.")
    print(f"Wrote {(arguments.output / 'clamped_genes.csv').resolve()}")


def main() -> None:
    """Run the mode that was asked for."""
    arguments = parse_arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    cells, model, tokenizer = load(arguments)
    accelerator = Accelerator()
    if arguments.mode == "finetune":
        learn(arguments, cells, model, tokenizer)
    elif accelerator.is_main_process:  # one process does it
        clamp(arguments, cells, model.to(accelerator.device), tokenizer)
    accelerator.end_training()


if __name__ == "__main__":
    main()
