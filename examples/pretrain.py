"""Pretrain scDiVa on an Arrow corpus by masked diffusion.

    accelerate launch examples/pretrain.py --corpus corpus --config examples/configs/small.json

Four GPUs, networks of a billion parameters and more, two CPU processes, and going on after a stop:

    accelerate launch --multi_gpu --num_processes 4 --mixed_precision bf16 examples/pretrain.py ...
    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/pretrain.py ...
    ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2 examples/pretrain.py ...
    accelerate launch examples/pretrain.py ... --resume

The corpus comes from data/build_corpus.py. The finished folder holds weights, config, tokenizer and code:
`AutoModel.from_pretrained("scdiva")`.
"""

import argparse
import json
import sys
from pathlib import Path

import transformers
from accelerate import Accelerator
from torch.utils.data import DataLoader

from modeling_scdiva import ScDivaConfig, ScDivaForMaskedDiffusion
from modeling_scdiva.fresh_model import fresh_model, take_weights
from modeling_scdiva.hardware import compile_layers
from modeling_scdiva.training import PretrainingArguments, pretrain
from tokenization_scdiva import ScDivaTokenizer, corpus_loader
from tokenization_scdiva.corpus import corpus_conditions, read_manifest

COMPILED_WIDTHS = 304  # 304, 608, 912 and 1,201 positions for cells of up to 1,200 genes
RUN_NUMBERS = (
    "gradient_accumulation_steps", "learning_rate", "ema_decay", "seed", "log_every", "eval_every",
    "save_every", "keep_checkpoints",
)  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True, help="corpus folder of data/build_corpus.py")
    parser.add_argument("--config", type=Path, required=True, help="ScDivaConfig file, see examples/configs")
    parser.add_argument("--init_checkpoint", help="start from these weights, instead of at random")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder; default: the one inside the corpus")
    parser.add_argument("--output_dir", type=Path, default=Path("scdiva"), help="where the model goes")
    parser.add_argument("--resume", action="store_true", help="go on from its newest checkpoint")
    parser.add_argument("--n_epochs", type=float, default=4.0, help="passes over the corpus")
    parser.add_argument("--n_steps", type=int, help="optimiser updates, instead of --n_epochs")
    parser.add_argument("--batch_size", type=int, default=768, help="cells per update, over all processes")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1, help="micro-batches per update")
    parser.add_argument("--learning_rate", type=float, default=2e-4, help="peak of warm-up and cosine")
    parser.add_argument("--ema_decay", type=float, default=0.0, help="of averaged weights; 0: no average")
    parser.add_argument("--depth_corruption", choices=["scale", "thin", "none"], default="scale")
    parser.add_argument("--masking_target", choices=["joint", "expression", "gene"], default="joint")
    parser.add_argument(
        "--conditions",
        nargs="+",
        default=[],
        help="kept obs columns to steer generation by; library_size: depth",
    )
    parser.add_argument("--n_gene_queries", type=int, default=256, help="genes a cell is asked for")
    parser.add_argument("--log_every", type=int, default=10, help="steps between log lines")
    parser.add_argument("--eval_every", type=int, default=500, help="steps between evaluations; 0: at end")
    parser.add_argument("--save_every", type=int, default=500, help="steps between checkpoints; 0: at end")
    parser.add_argument("--keep_checkpoints", type=int, default=2, help="checkpoints that stay on disk")
    parser.add_argument("--num_workers", type=int, default=0, help="loader processes per training process")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="trade time for memory")
    parser.add_argument("--compile", action="store_true", help="torch.compile the layers (GPU)")
    parser.add_argument(
        "--pad_to_multiple_of", type=int, help="round widths up; default 304 with --compile, else 1"
    )
    parser.add_argument("--report_to", choices=["none", "tensorboard"], default="none")
    parser.add_argument("--seed", type=int, default=0, help="of weights, cells, masks and dropout")
    return parser.parse_args()


def make_model(
    args: argparse.Namespace, tokenizer: ScDivaTokenizer, accelerator: Accelerator
) -> ScDivaForMaskedDiffusion:
    """Make the network, with the conditions that were named and the weights of a checkpoint if one was."""
    network = json.loads(args.config.read_text("utf-8"))
    if args.conditions:
        network["conditions"] = corpus_conditions(args.corpus, args.conditions)
    model = fresh_model(network, tokenizer, seed=args.seed)
    if args.init_checkpoint and not args.resume:
        fresh = take_weights(model, args.init_checkpoint)
        accelerator.print(f"Starting from {args.init_checkpoint}; random: {', '.join(fresh) or 'nothing'}.")
    return model


def make_loaders(
    args: argparse.Namespace, tokenizer: ScDivaTokenizer, accelerator: Accelerator, network: ScDivaConfig
) -> dict[str, DataLoader]:
    """Open both splits; each process reads its share of every global micro-batch."""
    if args.batch_size % args.gradient_accumulation_steps:
        n_micro = args.gradient_accumulation_steps
        sys.exit(f"--batch_size {args.batch_size} is no multiple of {n_micro} micro-batches.")
    n_cells = {split: content["n_cells"] for split, content in read_manifest(args.corpus)["splits"].items()}
    return {
        split: corpus_loader(
            args.corpus,
            split,
            tokenizer=tokenizer,
            batch_size=args.batch_size // args.gradient_accumulation_steps,
            seed=args.seed,
            process=(accelerator.process_index, accelerator.num_processes),
            num_workers=args.num_workers,
            masking_target=args.masking_target,
            depth_corruption=args.depth_corruption,
            n_gene_queries=args.n_gene_queries if network.latent_loss_weight else 0,
            conditions=network.conditions,
            objective=network.objective,
            pad_to_multiple_of=args.pad_to_multiple_of or (COMPILED_WIDTHS if args.compile else 1),
        )
        for split in ("train", "validation")
        if split == "train" or n_cells[split]  # a corpus may do without held-out cells
    }


def main() -> None:
    """Train."""
    args = parse_arguments()
    transformers.utils.logging.disable_progress_bar()  # one bar is enough
    tracker = None if args.report_to == "none" else args.report_to
    accelerator = Accelerator(log_with=tracker, project_dir=args.output_dir / "logs")
    if tracker:
        accelerator.init_trackers("pretrain")
    read_manifest(args.corpus)  # first, because its message says what is wrong with the folder
    tokenizer = ScDivaTokenizer.from_pretrained(args.tokenizer or args.corpus / "tokenizer")

    model = make_model(args, tokenizer, accelerator)
    loaders = make_loaders(args, tokenizer, accelerator, model.config)
    size_law = loaders["train"].dataset.size_law(tokenizer.max_genes)
    model.generation_config = model.generation_config.updated(size_law=size_law)
    n_cells = {split: len(loader.dataset) for split, loader in loaders.items()}
    n_held_out = n_cells.get("validation", 0)
    steps_per_epoch = loaders["train"].batch_sampler.batches_per_epoch // args.gradient_accumulation_steps
    n_steps = max(1, round(args.n_epochs * steps_per_epoch)) if args.n_steps is None else args.n_steps

    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if args.compile:
        compile_layers(model)
    accelerator.print(
        f"Pretraining scDiVa ({model.num_parameters() / 1e6:.1f} M parameters, {len(tokenizer):,} tokens) on "
        f"{n_cells['train']:,} cells of {args.corpus} ({n_held_out:,} held out): {n_steps:,} "
        f"steps of {args.batch_size} cells on {accelerator.num_processes} x {accelerator.device.type} "
        f"({accelerator.mixed_precision} precision)."
    )
    log = pretrain(
        model,
        train_loader=loaders["train"],
        eval_loader=loaders.get("validation"),
        arguments=PretrainingArguments(
            n_steps=n_steps, **{name: getattr(args, name) for name in RUN_NUMBERS}
        ),
        accelerator=accelerator,
        output_dir=args.output_dir,
        resume=args.resume,
        on_save=tokenizer.save_pretrained,
    )
    numbers = log[-1]  # held-out losses, if the corpus holds any cells out
    kinds = ["gene", "expression"] if args.masking_target == "joint" else [args.masking_target]
    kinds += ["latent"] if model.query_decoder is not None else []
    told = [f"{kind} loss {numbers[f'eval_{kind}_loss']:.4f}" for kind in kinds if "eval_loss" in numbers]
    accelerator.print(
        f"Saved {args.output_dir}, held-out {' and '.join(told) or 'loss unknown'}. Load it from the folder "
        "above: "
        f'import modeling_scdiva; AutoModel.from_pretrained("{args.output_dir.resolve().name}")'
    )
    accelerator.end_training()


if __name__ == "__main__":
    main()
