"""Integrate technical batches: fine-tune a checkpoint without labels until its embedding mixes them.

    python examples/integrate_batches.py                    # made-up cells, untrained network: the mechanics
    accelerate launch examples/integrate_batches.py --checkpoint scdiva --data cells.h5ad --batch_key donor

    ... --score_key cell_type             # scores, before and after, on labels, beside PCA and Harmony
    ... --mode label_informed --label_key cell_type            # trains on labels

The first mode reads no label, early stopping included; `--score_key` names labels that are used for scores
afterwards only. The second trains on labels: its scores on the same labels say nothing about integration, and
its embedding is named so. The AnnData is written with the embedding in `obsm` and the run in `uns["scdiva"]`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import anndata
import numpy as np
from accelerate import Accelerator
from scipy.sparse import csr_matrix
from transformers import AutoModelForMaskedLM, AutoTokenizer

from modeling_scdiva.adapters import TRAINABLE, save_adapter
from modeling_scdiva.fresh_model import fresh_model
from modeling_scdiva.metrics.integration import integration_scores, integration_settings
from modeling_scdiva.metrics.integration_baselines import (
    harmony_embedding,
    highly_variable_genes,
    pca_embedding,
)
from modeling_scdiva.tasks import embed_cells
from modeling_scdiva.tasks.integration import INTEGRATED_KEYS, IntegrationArguments, integrate_batches
from tokenization_scdiva import synthetic_cells, synthetic_tokenizer

CONFIG = Path(__file__).parent / "configs" / "tiny.json"
DEFAULTS = IntegrationArguments()


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", help="folder or Hub id; default: an untrained tiny network")
    parser.add_argument("--data", type=Path, help="h5ad with raw counts; default: made-up cells of 2 plates")
    parser.add_argument("--batch_key", default="plate", help="obs column with the technical batch")
    parser.add_argument("--label_key", help="obs column with cell types to TRAIN on; label_informed only")
    parser.add_argument("--score_key", help="obs column with cell types for scores, never trained on")
    parser.add_argument("--mode", choices=list(INTEGRATED_KEYS), default="label_free", help="see above")
    parser.add_argument("--trainable", choices=TRAINABLE, default="lora", help="what is fine-tuned")
    parser.add_argument("--pooling", default=DEFAULTS.pooling, help="lat or mean: the cell embedding")
    parser.add_argument("--max_genes", type=int, help="genes kept of a cell; default the tokenizer's")
    parser.add_argument("--n_epochs", type=int, default=DEFAULTS.n_epochs, help="passes over the cells")
    parser.add_argument("--batch_size", type=int, default=DEFAULTS.batch_size, help="cells per update")
    parser.add_argument("--learning_rate", type=float, default=DEFAULTS.learning_rate, help="peak rate")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    parser.add_argument("--output", type=Path, default=Path("integrated.h5ad"), help="AnnData to write")
    parser.add_argument("--save_model", type=Path, help="folder for the adapter or the trained model")
    return parser.parse_args()


def made_up_cells(gene_ids: list[str] | None = None) -> anndata.AnnData:
    """Make cells of four types on two plates, of which the second captures each gene less or more well."""
    gene_ids = None if gene_ids is None else gene_ids[:120]
    cells = synthetic_cells(n_cells=240, n_genes=120, gene_ids=gene_ids)
    is_second = np.arange(cells.n_obs) // 4 % 2 == 1  # types come in turn, so both plates have all four
    rng = np.random.default_rng(0)
    counts = cells.X.toarray().astype(np.int64)
    counts[is_second] = rng.binomial(counts[is_second], rng.uniform(0.2, 1.0, size=cells.n_vars))
    cells.X = csr_matrix(counts.astype(np.float32))
    cells.obs["plate"] = np.where(is_second, "plate_2", "plate_1")
    return cells


def untrained(cells: anndata.AnnData) -> tuple[Any, Any]:
    """Make a tiny network with random weights, and a tokenizer, for the genes of some cells."""
    tokenizer = synthetic_tokenizer(cells, max_genes=64)
    return fresh_model(CONFIG, tokenizer), tokenizer


def print_scores(cells: anndata.AnnData, args: argparse.Namespace, embeddings: dict[str, np.ndarray]) -> None:
    """Score the embeddings before and after on labels, beside what one would have used without the model."""
    labels, batches = cells.obs[args.score_key].to_numpy(), cells.obs[args.batch_key].to_numpy()
    components = pca_embedding(cells.X, highly_variable_genes(cells.X, batches), seed=args.seed)
    embeddings["PCA-50, not integrated"] = components
    embeddings["Harmony"] = harmony_embedding(components, batches, seed=args.seed)
    shown = ("avg_bio", "avg_bio_resolution_1", "avg_batch", "bras", "ilisi")
    print(f"\n{'':28}" + "".join(f"{name:>22}" for name in shown))
    for name, vectors in embeddings.items():
        scores = integration_scores(vectors, labels, batches, with_kbet=False)
        print(f"{name:28}" + "".join(f"{scores[column]:22.3f}" for column in shown))
    settings = integration_settings(cells.n_obs)
    print(f"avg_bio at the best resolution by the labels (oracle). {settings['versions']}")


def main() -> None:
    """Integrate, score, write."""
    args = parse_arguments()
    accelerator = Accelerator()
    if args.save_model and args.checkpoint is None:
        sys.exit("--save_model saves what was trained on top of a --checkpoint; name one.")
    if args.checkpoint is None:
        cells = made_up_cells() if args.data is None else anndata.read_h5ad(args.data)
        model, tokenizer = untrained(cells)
    else:
        model = AutoModelForMaskedLM.from_pretrained(args.checkpoint)
        tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
        gene_ids = tokenizer.vocabulary.gene_ids[tokenizer.vocabulary.n_special_tokens :]
        cells = made_up_cells(gene_ids) if args.data is None else anndata.read_h5ad(args.data)
    for key in filter(None, (args.batch_key, args.label_key, args.score_key)):
        if key not in cells.obs:
            sys.exit(f"No obs column {key!r}; there are {list(cells.obs)}.")
    arguments = IntegrationArguments(
        n_epochs=args.n_epochs, batch_size=args.batch_size, learning_rate=args.learning_rate, seed=args.seed,
        pooling=args.pooling, max_genes=args.max_genes,
    )  # fmt: skip
    is_main = accelerator.is_main_process
    reading = {"max_genes": args.max_genes, "pooling": args.pooling, "show_progress": is_main}
    frozen = embed_cells(cells, model=model.to(accelerator.device), tokenizer=tokenizer, **reading)

    found = integrate_batches(
        cells, model=model, tokenizer=tokenizer, batch_key=args.batch_key, label_key=args.label_key,
        mode=args.mode, trainable=args.trainable, arguments=arguments,
        show_progress=is_main,
    )  # fmt: skip
    accelerator.end_training()
    if not is_main:
        return
    first, last = found.history[0], found.history[-1]
    n_batches = cells.obs[args.batch_key].nunique()
    print(f"\n{cells.n_obs} cells of {n_batches} batches, {len(found.history)} epochs, mode {args.mode}.")
    for name in ("reconstruction_loss", "adversarial_loss", "contrastive_loss"):
        print(f"  {name:20} {first[name]:8.3f} -> {last[name]:.3f}")
    if args.score_key:
        print_scores(cells, args, {"frozen": frozen, f"integrated, {args.mode}": found.embeddings})
    cells.write_h5ad(args.output)
    if args.save_model:
        save_adapter(found.model, args.save_model, tokenizer=tokenizer)
        print(f"Model in {args.save_model}.")
    labels_seen = "yes" if args.mode == "label_informed" else "no"
    print(f'Wrote {args.output} with obsm["{found.obsm_key}"], labels seen: {labels_seen}.')


if __name__ == "__main__":
    main()
