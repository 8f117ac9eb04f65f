"""From an h5ad file to an embedding: everything scDiVa does, in a few minutes on two CPU cores.

    python examples/quickstart.py                       # 700 blood cells that come with scanpy
    python examples/quickstart.py --input my_cells.h5ad --label_key cell_type

Vocabulary, corpus, a short pretraining, save, `AutoModel.from_pretrained`, embedding; then 5-fold kNN and logistic
regression of cell types on the frozen embedding, beside PCA on the same cells and the same network with random
weights. The built-in cells are log-normalised, so they need `expression_is_log1p=True`: scDiVa refuses values that
are not counts unless told. This is a demonstration: a few hundred cells make no foundation model.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import anndata
import matplotlib
import numpy as np
import scanpy
import torch
import transformers
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer

from modeling_scdiva import ScDivaConfig, ScDivaForMaskedDiffusion, ScDivaModel
from modeling_scdiva.metrics import pca_features, probe_embedding
from modeling_scdiva.tasks import embed_cells
from modeling_scdiva.training import PretrainingArguments, pretrain
from tokenization_scdiva import (
    CellBatchSampler,
    CellCorpus,
    CorpusSettings,
    ScDivaDataCollator,
    ScDivaTokenizer,
    build_corpus,
    build_vocabulary,
)

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402 (the back end comes first)

MODEL_FOLDER = Path("scdiva")
MARKER = "quickstart.json"  # says that a folder is this script's to replace


def parse_arguments() -> argparse.Namespace:
    """Read the command line.

    Returns:
        The arguments.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, help="your h5ad with raw counts; default: 700 PBMC from scanpy")
    parser.add_argument("--label_key", default="cell_type", help="obs column with cell types")
    parser.add_argument("--expression_is_log1p", action="store_true", help="your values are log1p, not counts")
    parser.add_argument("--config", type=Path, default=Path(__file__).parent / "configs" / "tiny.json")
    parser.add_argument("--work_dir", type=Path, default=Path("demo"), help="cells, corpus, pictures")
    parser.add_argument("--n_steps", type=int, default=500, help="optimiser updates")
    return parser.parse_args()


def get_cells(args: argparse.Namespace) -> anndata.AnnData:
    """Read the user's cells, or take the built-in ones, and write them where the corpus is built from.

    Args:
        args: Command line.

    Returns:
        The cells.
    """
    if args.input is None:
        cells = scanpy.datasets.pbmc68k_reduced().raw.to_adata()  # 700 cells x 765 genes, log1p of counts per 10,000
        cells.obs[args.label_key] = cells.obs["bulk_labels"]
        args.expression_is_log1p = True
    else:
        cells = anndata.read_h5ad(args.input)
    if args.label_key not in cells.obs:
        msg = f"{args.input} has no obs column {args.label_key!r}; it has {list(cells.obs)}. Name one as --label_key."
        raise SystemExit(msg)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    cells.write_h5ad(args.work_dir / "cells.h5ad")
    return cells


def prepare_folders(args: argparse.Namespace) -> None:
    """Remove what an earlier quickstart left, and refuse to touch anything else.

    Args:
        args: Command line.
    """
    for folder in (MODEL_FOLDER, args.work_dir):
        if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
            msg = f"{folder.resolve()} exists and is not from this script. Move it away or start elsewhere."
            raise SystemExit(msg)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / MARKER).write_text("{}", "utf-8")


def train(args: argparse.Namespace, tokenizer: ScDivaTokenizer) -> list[dict[str, float]]:
    """Pretrain on the corpus and save to ``scdiva``.

    Args:
        args: Command line.
        tokenizer: The corpus' tokenizer.

    Returns:
        The training log.
    """
    loaders = {}
    for split in ("train", "validation"):
        corpus = CellCorpus(args.work_dir / "corpus", split, ranking_settings=tokenizer.ranking_settings)
        is_train = split == "train"
        sampler = CellBatchSampler(
            corpus.n_genes, batch_size=32, max_genes=tokenizer.max_genes, shuffle=is_train
        )
        collator = ScDivaDataCollator.from_tokenizer(tokenizer, depth_corruption="scale" if is_train else "none")
        loaders[split] = DataLoader(corpus, batch_sampler=sampler, collate_fn=collator)
    torch.manual_seed(0)
    settings = json.loads(args.config.read_text("utf-8"))
    settings |= {"vocab_size": len(tokenizer), "vocabulary_hash": tokenizer.vocabulary.content_hash}
    model = ScDivaForMaskedDiffusion(ScDivaConfig(**settings))
    if model.config.value_head == "gene":
        model.set_gene_weights(tokenizer.ranking_weights)
    n_cells = len(loaders["train"].dataset)
    print(f"Pretraining {model.num_parameters():,} parameters on {n_cells} cells for {args.n_steps} steps.")
    arguments = PretrainingArguments(
        n_steps=args.n_steps, learning_rate=2e-3, log_every=10, eval_every=50, save_every=0
    )
    return pretrain(
        model,
        train_loader=loaders["train"],
        eval_loader=loaders["validation"],
        arguments=arguments,
        accelerator=Accelerator(cpu=True),
        output_dir=MODEL_FOLDER,
        on_save=tokenizer.save_pretrained,
    )


def draw(args: argparse.Namespace, log: list[dict[str, float]], cells: anndata.AnnData) -> None:
    """Draw the loss curve and the UMAP of the embedding.

    Args:
        args: Command line.
        log: Training log.
        cells: Cells with ``obsm["X_scdiva"]``.
    """
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for panel, name, unit in zip(panels, ("gene", "expression"), ("nats", "squared log1p"), strict=True):
        for split in ("train", "eval"):
            points = [(line["step"], line[key]) for line in log if (key := f"{split}_{name}_loss") in line]
            panel.plot(*zip(*points, strict=True), label={"train": "training", "eval": "held out"}[split])
        panel.set(xlabel="step", ylabel=f"{name} loss ({unit})")
        panel.legend()
    figure.savefig(args.work_dir / "loss.png", dpi=120)
    scanpy.pp.neighbors(cells, use_rep="X_scdiva", random_state=0)
    scanpy.tl.umap(cells, random_state=0)
    picture = scanpy.pl.umap(cells, color=args.label_key, show=False, return_fig=True, title="scDiVa embedding")
    picture.savefig(args.work_dir / "umap.png", dpi=120, bbox_inches="tight")


def main() -> None:
    """Run all steps and print the table."""
    start = time.perf_counter()
    args = parse_arguments()
    transformers.utils.logging.disable_progress_bar()
    prepare_folders(args)
    cells = get_cells(args)
    print(f"{cells.n_obs} cells x {cells.n_vars} genes, {cells.obs[args.label_key].nunique()} cell types.")

    files = {"cells": args.work_dir / "cells.h5ad"}
    vocabulary, _ = build_vocabulary(files, expression_is_log1p=args.expression_is_log1p, show_progress=False)
    tokenizer = ScDivaTokenizer(vocabulary=vocabulary, max_genes=256)
    settings = CorpusSettings(expression_is_log1p=args.expression_is_log1p)
    build_corpus(files, args.work_dir / "corpus", tokenizer=tokenizer, settings=settings, show_progress=False)
    log = train(args, tokenizer)
    held_out = [line for line in log if "eval_loss" in line]

    model, tokenizer = AutoModel.from_pretrained(str(MODEL_FOLDER)), AutoTokenizer.from_pretrained(str(MODEL_FOLDER))
    torch.manual_seed(1)
    networks = {"scDiVa": model, "same network, random weights": ScDivaModel(model.config).eval()}
    features = {
        name: embed_cells(
            cells, model=network, tokenizer=tokenizer, pooling="mean",
            expression_is_log1p=args.expression_is_log1p, show_progress=False,
        )
        for name, network in networks.items()
    }  # fmt: skip
    cells.obsm["X_scdiva"] = features["scDiVa"]
    log1p = cells.X if args.expression_is_log1p else scanpy.pp.log1p(scanpy.pp.normalize_total(cells, copy=True), copy=True).X
    features["PCA, 50 components"] = pca_features(log1p, n_components=50)
    draw(args, log, cells)

    print(f"\nHeld-out gene loss {held_out[0]['eval_gene_loss']:.3f} -> {held_out[-1]['eval_gene_loss']:.3f} nats "
          f"(uniform: {np.log(vocabulary.n_genes):.3f}), value loss {held_out[0]['eval_expression_loss']:.3f} -> "
          f"{held_out[-1]['eval_expression_loss']:.3f}.")  # fmt: skip
    print(f"\n{'frozen features, 5 folds':30} {'kNN accuracy':>13} {'macro-F1':>9} {'logistic':>9} {'macro-F1':>9}")
    for name, matrix in features.items():
        scores = probe_embedding(matrix, cells.obs[args.label_key].to_numpy())
        numbers = [scores[key] for key in ("knn_accuracy", "knn_macro_f1", "logistic_accuracy", "logistic_macro_f1")]
        print(f"{name:30} {numbers[0]:13.3f} {numbers[1]:9.3f} {numbers[2]:9.3f} {numbers[3]:9.3f}")
    print(f"\nModel in {MODEL_FOLDER}/, pictures in {args.work_dir}/umap.png and {args.work_dir}/loss.png.")
    print(f"Done in {time.perf_counter() - start:.0f} s. Held-out gene loss {held_out[-1]['eval_gene_loss']:.3f} nats.")


if __name__ == "__main__":
    main()
