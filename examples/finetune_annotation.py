"""Teach a pretrained model your cell types, and name the types of new cells.

    accelerate launch examples/finetune_annotation.py --checkpoint scdiva --data my_cells.h5ad \
        --label_key cell_type --group_key donor_id --output annotator
    python examples/finetune_annotation.py --predict --checkpoint annotator --data new_cells.h5ad

Low-rank adapters (LoRA) and a new head by default; `--trainable full`, `last_layers` or `head` for others.
Donors or batches named by `--test_groups` are held out and scored beside logistic regression on principal
components. `annotator/` then holds the adapter, the names of the types and the threshold below which a cell
is `Unknown`; its base stays where it is. `--push_to` uploads it, with the base that `--base_model` names.
Without `--data` it runs on made-up cells, and without `--checkpoint` on a small model with random weights.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import anndata
import numpy as np
from accelerate import Accelerator
from huggingface_hub import HfApi
from transformers import AutoModel, AutoTokenizer

from modeling_scdiva.adapters import TRAINABLE, base_of
from modeling_scdiva.fresh_model import fresh_model
from modeling_scdiva.metrics.annotation import log_normalise
from modeling_scdiva.metrics.annotation_baselines import as_parts, pca_logistic
from modeling_scdiva.metrics.classification import classification_scores
from modeling_scdiva.splits import split_validation
from modeling_scdiva.tasks.annotation import (
    AnnotatorSettings,
    annotate_cells,
    default_arguments,
    finetune_annotator,
)
from modeling_scdiva.tasks.annotator_files import load_annotator, save_annotator
from modeling_scdiva.tasks.cells import obs_column, whole_counts
from tokenization_scdiva import synthetic_cells, synthetic_tokenizer

CONFIG = Path(__file__).parent / "configs" / "tiny.json"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", help="pretrained model; with --predict, the annotator")
    parser.add_argument("--data", type=Path, help="h5ad with raw counts; default: made-up cells")
    parser.add_argument("--label_key", default="cell_type", help="obs column with cell types")
    parser.add_argument("--group_key", help="obs column with donors or technical batches")
    parser.add_argument("--test_groups", nargs="*", default=[], help="groups held out to score")
    parser.add_argument(
        "--output", type=Path, default=Path("annotator"), help="folder; with --predict, an h5ad"
    )
    parser.add_argument("--trainable", default="lora", choices=TRAINABLE, help="what is trained")
    parser.add_argument("--accuracy", type=float, default=0.95, help="of cells that are not Unknown")
    parser.add_argument("--n_epochs", type=int, default=30, help="at most; stops early")
    parser.add_argument("--batch_size", type=int, default=32, help="cells per step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--predict", action="store_true", help="name the types of cells with an annotator")
    parser.add_argument("--push_to", help="Hub id to upload the annotator to")
    parser.add_argument("--base_model", help="Hub id of the checkpoint, for an adapter that is uploaded")
    return parser.parse_args()


def read_data(args: argparse.Namespace) -> anndata.AnnData:
    """Read the user's cells, or make some up."""
    if args.data is not None:
        return anndata.read_h5ad(args.data)
    cells = synthetic_cells(n_cells=400, n_genes=300, seed=args.seed)
    cells.obs["donor_id"] = [f"donor_{cell // 4 % 5}" for cell in range(cells.n_obs)]
    args.group_key = args.group_key or "donor_id"
    args.test_groups = args.test_groups or ["donor_4"]
    return cells


def load_base(args: argparse.Namespace, cells: anndata.AnnData) -> tuple[Any, Any]:
    """Load model and tokenizer, or write a small random base and load that."""
    folder = args.checkpoint
    if folder is None:
        folder = args.output.with_name(f"{args.output.name}_base")
        tokenizer = synthetic_tokenizer(cells)
        fresh_model(CONFIG, tokenizer, seed=args.seed).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        print(f"No --checkpoint: a small model with random weights stands in, {folder}/.")
    return AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def predict(args: argparse.Namespace, cells: anndata.AnnData) -> None:
    """Name the types of cells and write them into a copy of the file."""
    if args.checkpoint is None:
        sys.exit("--predict needs --checkpoint, the folder of an annotator.")
    annotator = load_annotator(args.checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(base_of(args.checkpoint))
    annotate_cells(cells, model=annotator, tokenizer=tokenizer, write_obs=True)
    output = args.output.with_suffix(".h5ad")
    cells.write_h5ad(output)
    print(cells.obs["scdiva_cell_type"].value_counts().to_string())
    print(f"\nTypes and probabilities of {cells.n_obs} cells are in obs of {output}.")


def held_out(args: argparse.Namespace, cells: anndata.AnnData) -> np.ndarray:
    """Say which cells belong to the groups that are held out."""
    if not args.test_groups:
        return np.zeros(cells.n_obs, dtype=bool)
    groups = obs_column(cells, args.group_key, what="groups to hold out")
    if not set(args.test_groups) <= set(groups):
        sys.exit(f"--test_groups {args.test_groups} are not all in obs[{args.group_key!r}]: {set(groups)}.")
    return np.isin(groups, args.test_groups)


def score(args: argparse.Namespace, cells: Any, is_test: np.ndarray, annotator: Any, tokenizer: Any) -> None:
    """Print how the held-out groups are annotated, beside a baseline on the same cells."""
    is_test = is_test & cells.obs[args.label_key].notna().to_numpy()  # cells without a type have no score
    found = annotate_cells(cells[is_test].copy(), model=annotator, tokenizer=tokenizer)
    labels = cells.obs[args.label_key].astype(str).to_numpy()
    groups = cells.obs[args.group_key].to_numpy()
    train, test = np.flatnonzero(~held_out(args, cells)), np.flatnonzero(is_test)
    fitted, tuned, _ = split_validation(labels[train], groups[train], seed=args.seed)
    parts = as_parts(log_normalise(whole_counts(cells)), labels, train[fitted], train[tuned], test)
    baseline = pca_logistic(parts)
    predictions = {
        f"scDiVa, {args.trainable}": found.likeliest_cell_types,
        "PCA-50 + logistic regression": baseline.classes[baseline.test.argmax(axis=1)],
    }
    print(f"\n{len(test)} held-out cells{'':20}{'macro F1':>10}{'accuracy':>10}")
    for name, types in predictions.items():
        numbers = classification_scores(labels[test], types)
        print(f"{name:40}{numbers['macro_f1']:10.3f}{numbers['accuracy']:10.3f}")
    print(f"Unknown: {(found.predicted_cell_types == 'Unknown').mean():.1%} of these cells.")


def main() -> None:
    """Fine-tune, score, save; or predict."""
    args = parse_arguments()
    cells = read_data(args)
    if args.predict:
        predict(args, cells)
        return
    accelerator = Accelerator()
    with accelerator.main_process_first():
        model, tokenizer = load_base(args, cells)
    is_test = held_out(args, cells)
    settings = AnnotatorSettings(args.trainable, group_key=args.group_key, wanted_accuracy=args.accuracy)
    numbers = {"n_epochs": args.n_epochs, "batch_size": args.batch_size, "seed": args.seed}
    annotator = finetune_annotator(
        cells[~is_test].copy(),
        model=model,
        tokenizer=tokenizer,
        label_key=args.label_key,
        settings=settings,
        arguments=default_arguments(args.trainable, **numbers),
        accelerator=accelerator,
    )
    accelerator.end_training()
    if not accelerator.is_main_process:
        return
    found, facts = annotator.calibration, annotator.facts
    print(
        f"{facts['n_train_cells']} cells trained, {facts['n_validation_cells']} validated, by "
        f"{facts['validation_kind']}. Named are cells from probability {found.threshold:.3f} on, which are "
        f"{found.coverage:.1%} of the validation cells, {found.accuracy:.1%} of them right."
    )
    if args.test_groups:
        score(args, cells, is_test, annotator, tokenizer)
    save_annotator(annotator, args.output, tokenizer=tokenizer, base_model=args.base_model)
    print(f"\nAnnotator in {args.output}/.")
    if args.push_to is not None:
        if args.trainable == "lora" and Path(base_of(args.output)).exists():
            sys.exit("The base of the adapter is a folder nobody else has. Name its Hub id: --base_model")
        HfApi().create_repo(args.push_to, exist_ok=True)
        HfApi().upload_folder(repo_id=args.push_to, folder_path=args.output)
        print(f"Uploaded to {args.push_to}.")


if __name__ == "__main__":
    main()
