"""From an h5ad file to an embedding: everything scDiVa does, in a few minutes on two CPU cores.

    python examples/quickstart.py                       # 700 blood cells that come with scanpy
    python examples/quickstart.py --input my_cells.h5ad --label_key cell_type

Vocabulary, corpus, a short pretraining, save, `AutoModel.from_pretrained`, embedding; then 5-fold kNN and
logistic regression of cell types on the frozen embedding, beside PCA and random weights. The built-in cells
are log-normalised, so they need `expression_is_log1p=True`. A few hundred cells make no foundation model.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

import anndata
import matplotlib
import numpy as np
import scanpy
import torch
from accelerate import Accelerator
from scipy.sparse import csr_matrix, vstack
from transformers import AutoModel, AutoTokenizer

from modeling_scdiva import ScDivaModel
from modeling_scdiva.fresh_model import fresh_model
from modeling_scdiva.metrics import log_normalise, pca_features, probe_embedding
from modeling_scdiva.tasks import embed_cells
from modeling_scdiva.training import PretrainingArguments, pretrain
from tokenization_scdiva import (
    CorpusSettings,
    ScDivaTokenizer,
    build_corpus,
    build_vocabulary,
    corpus_loader,
    read_counts,
)

matplotlib.use("Agg")
from matplotlib import pyplot as plt

CONFIG = Path(__file__).parent / "configs" / "tiny.json"
MODEL_FOLDER = Path("scdiva")
MARKER = "quickstart.json"  # says that a folder is this script's to replace


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--input", type=Path, help="your h5ad with raw counts; default: 700 PBMC from scanpy")
    parser.add_argument("--label_key", default="cell_type", help="obs column with cell types")
    parser.add_argument("--expression_is_log1p", action="store_true", help="your values are log1p, no counts")
    parser.add_argument("--work_dir", type=Path, default=Path("demo"), help="cells, corpus, pictures")
    parser.add_argument("--n_steps", type=int, default=600, help="optimiser updates")
    return parser.parse_args()


def prepare_folders(*folders: Path) -> None:
    """Remove what an earlier quickstart left; anything else is not touched."""
    for folder in folders:
        if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
            sys.exit(
                f"{folder.resolve()} exists and is not from this script. Move it away or start elsewhere."
            )
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / MARKER).write_text("{}", "utf-8")


def get_cells(args: argparse.Namespace) -> anndata.AnnData:
    """Read the user's cells, or take the built-in ones."""
    if args.input is None:
        cells = scanpy.datasets.pbmc68k_reduced().raw.to_adata()  # 765 genes, log1p of counts per 10,000
        cells.obs[args.label_key] = cells.obs["bulk_labels"]
        args.expression_is_log1p = True
    else:
        cells = anndata.read_h5ad(args.input)
    folders = {MODEL_FOLDER.resolve(), args.work_dir.resolve()}
    if args.input is not None and folders & set(args.input.resolve().parents):
        sys.exit(
            f"{args.input} lies in a folder that this script replaces. Move it, or name another --work_dir."
        )
    if args.label_key not in cells.obs:
        sys.exit(f"No obs column {args.label_key!r}; there are {list(cells.obs)}. Name one as --label_key.")
    return cells


def train(args: argparse.Namespace, tokenizer: ScDivaTokenizer) -> list[dict[str, float]]:
    """Pretrain on the corpus, save to ``scdiva`` and return the log."""
    loaders = {
        split: corpus_loader(args.work_dir / "corpus", split, tokenizer=tokenizer, batch_size=32)
        for split in ("train", "validation")
    }
    model = fresh_model(CONFIG, tokenizer)
    print(f"Pretraining {model.num_parameters():,} parameters for {args.n_steps} steps of 32 cells.")
    return pretrain(
        model,
        train_loader=loaders["train"],
        eval_loader=loaders["validation"],
        arguments=PretrainingArguments(
            n_steps=args.n_steps, learning_rate=2e-3, log_every=10, eval_every=50, save_every=0
        ),
        accelerator=Accelerator(cpu=True),
        output_dir=MODEL_FOLDER,
        on_save=tokenizer.save_pretrained,
    )


def draw(args: argparse.Namespace, log: list[dict[str, float]], cells: anndata.AnnData) -> None:
    """Draw the loss curves and the UMAP of ``obsm["X_scdiva"]``."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for panel, name, unit in zip(panels, ("gene", "expression"), ("nats", "squared log1p"), strict=True):
        for split, label in (("train", "training"), ("eval", "held out")):
            points = [(line["step"], line[key]) for line in log if (key := f"{split}_{name}_loss") in line]
            panel.plot(*zip(*points, strict=True), label=label)
        panel.set(xlabel="step", ylabel=f"{name} loss ({unit})")
        panel.legend()
    figure.savefig(args.work_dir / "loss.png", dpi=120)
    scanpy.pp.neighbors(cells, use_rep="X_scdiva", random_state=0)
    scanpy.tl.umap(cells, random_state=0)
    picture = scanpy.pl.umap(cells, color=args.label_key, title="scDiVa embedding", return_fig=True)
    picture.savefig(args.work_dir / "umap.png", dpi=120, bbox_inches="tight")


def main() -> None:
    """Run all steps and print the table."""
    start = time.perf_counter()
    args = parse_arguments()
    cells = get_cells(args)
    counts = read_counts(cells, expression_is_log1p=args.expression_is_log1p)  # refuses what is not
    prepare_folders(MODEL_FOLDER, args.work_dir)
    cells.write_h5ad(args.work_dir / "cells.h5ad")
    print(f"{cells.n_obs} cells x {cells.n_vars} genes, {cells.obs[args.label_key].nunique()} cell types.")

    # 1. Vocabulary, corpus, pretraining, all from the file.
    files, is_log1p = {"cells": args.work_dir / "cells.h5ad"}, args.expression_is_log1p
    vocabulary, _ = build_vocabulary(files, expression_is_log1p=is_log1p, show_progress=False)
    tokenizer = ScDivaTokenizer(vocabulary=vocabulary, max_genes=128)  # few, for speed
    settings = CorpusSettings(expression_is_log1p=is_log1p)
    build_corpus(files, args.work_dir / "corpus", tokenizer=tokenizer, settings=settings, show_progress=False)
    log = train(args, tokenizer)

    # 2. Load what was saved, and embed.
    model = AutoModel.from_pretrained(str(MODEL_FOLDER))
    tokenizer = AutoTokenizer.from_pretrained(str(MODEL_FOLDER))
    torch.manual_seed(1)
    networks = {"scDiVa": model, "random weights": ScDivaModel(model.config)}
    reading = {"expression_is_log1p": is_log1p, "pooling": "mean", "show_progress": False}
    features = {}
    for name, network in networks.items():
        vectors = embed_cells(cells, model=network, tokenizer=tokenizer, **reading)
        features[f"{name}, mean over genes"] = vectors
    blocks, n_genes = counts.blocks(), counts.n_genes
    matrix = vstack([csr_matrix((b.data, b.indices, b.indptr), (b.n_cells, n_genes)) for b in blocks])
    n_components = min(50, *(size - 1 for size in matrix.shape))
    expression = matrix if is_log1p else log_normalise(matrix)
    features[f"PCA, {n_components} components"] = pca_features(expression, n_components=n_components)
    cells.obsm["X_scdiva"] = features["scDiVa, mean over genes"]
    draw(args, log, cells)

    # 3. What it is worth.
    first, last = log[0], log[-1]  # held-out losses before and after
    for name, unit in (("gene", "nats"), ("expression", "squared log1p units")):
        key = f"eval_{name}_loss"
        print(f"Held-out {name} loss: {first[key]:.3f} -> {last[key]:.3f} {unit}")
    print(f"Uniform over all genes: {np.log(vocabulary.n_genes):.3f} nats\n")
    keys = ("knn_accuracy", "knn_macro_f1", "logistic_accuracy", "logistic_macro_f1")
    print(f"{'frozen features, 5 folds':32}" + "".join(f"{key:>20}" for key in keys))
    for name, matrix in features.items():
        scores = probe_embedding(matrix, cells.obs[args.label_key].to_numpy())
        print(f"{name:32}" + "".join(f"{scores[key]:20.3f}" for key in keys))
    print(f"\nModel in {MODEL_FOLDER}/, pictures in {args.work_dir}/umap.png and {args.work_dir}/loss.png.")
    seconds = time.perf_counter() - start
    print(f"Done in {seconds:.0f} s. Held-out gene loss {last['eval_gene_loss']:.3f} nats.")


if __name__ == "__main__":
    main()
