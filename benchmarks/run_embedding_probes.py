"""Cell types from the frozen embedding of a checkpoint, beside PCA, random weights and sequencing depth.

    python benchmarks/run_embedding_probes.py --model scdiva --data FOLDER_OF_H5AD --corpus corpus \
        --output benchmarks/results/YYYY-MM-DD_embedding_probes.json

k nearest neighbours and logistic regression, five stratified folds, the same folds for every method, on three
labelled data sets of raw counts. With `--corpus`, the corpus the model was pretrained on, the result says how many
of the scored cells were in pretraining (without their labels), and scores the held-out cells once more by
themselves. Some minutes on two cores for `small.json`.
"""

import argparse
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import torch
from transformers import AutoTokenizer

from modeling_scdiva import ScDivaModel
from modeling_scdiva.metrics.annotation import depth_features, log_normalise, pca_features, probe_embedding
from modeling_scdiva.provenance import collect_provenance
from modeling_scdiva.tasks import embed_cells
from tokenization_scdiva import CellCorpus
from tokenization_scdiva.files import write_json

N_COMPONENTS = 50
N_FOLDS, N_NEIGHBORS = 5, 15
# Fewer held-out cells than this make five folds of a handful of cells per type.
MIN_HELD_OUT_CELLS = 50
SCORES = ("knn_accuracy", "knn_macro_f1", "logistic_accuracy", "logistic_macro_f1")


@dataclass(frozen=True)
class LabelledCells:
    """Which cells of a file are scored, by which labels."""

    label_key: str
    keep: tuple[str, str] | None = None  # column of obs and the value it must have
    is_no_type: tuple[str, ...] = ()
    note: str = ""


DATASETS = {
    "pbmc_facs_zheng2017": LabelledCells(
        "cell_type",
        note="labels are sorting gates; each type is one library, so type and technical batch go together",
    ),
    "kang2018_ifnb_pbmc": LabelledCells(
        "cell_type",
        keep=("cell_type_source", "curated"),
        note="curated labels only; transferred ones come from a classifier",
    ),
    "crohn_gut_scp1884": LabelledCells(
        "cell_type_coarse",
        is_no_type=("unspecified",),
        note="coarse types; cells named 'unspecified' left out",
    ),
}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder with weights and tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="folder with the labelled h5ad files")
    parser.add_argument("--corpus", type=Path, help="corpus of the pretraining, to know the held-out cells")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of results")
    parser.add_argument(
        "--pooling", nargs="+", default=["lat"], choices=["lat", "mean"], help="all are reported"
    )
    parser.add_argument("--batch_size", type=int, default=32, help="cells per forward pass")
    parser.add_argument("--seed", type=int, default=0, help="of folds, PCA and random weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def read_labelled(path: Path, task: LabelledCells) -> tuple[anndata.AnnData, np.ndarray]:
    """Read the cells to score, raw counts in ``X``, and their rows in the file."""
    adata = anndata.read_h5ad(path)
    labels = adata.obs[task.label_key].astype(object)
    is_scored = (labels.notna() & ~labels.isin(["", *task.is_no_type])).to_numpy()
    if task.keep is not None:
        column, wanted = task.keep
        is_scored &= (adata.obs[column] == wanted).to_numpy()
    return adata[is_scored].copy(), np.flatnonzero(is_scored)


def pretraining_rows(corpus: CellCorpus) -> dict[str, set[int]]:
    """Return data set -> rows of its file that are in one split of the corpus."""
    rows: dict[str, set[int]] = {dataset["name"]: set() for dataset in corpus.manifest["datasets"]}
    for cell in range(len(corpus)):
        described = corpus.describe(cell)
        rows[described["dataset"]].add(described["cell_index"])
    return rows


def all_features(
    adata: anndata.AnnData, models: dict[str, Any], tokenizer: Any, arguments: argparse.Namespace
) -> dict[str, np.ndarray]:
    """Compute every representation of the same cells."""
    features = {
        f"{name}_{pooling}": embed_cells(
            adata, model=model, tokenizer=tokenizer, batch_size=arguments.batch_size, pooling=pooling
        )
        for name, model in models.items()
        for pooling in arguments.pooling
    }
    features[f"pca_{N_COMPONENTS}"] = pca_features(
        log_normalise(adata.X), n_components=N_COMPONENTS, seed=arguments.seed
    )
    return features | {"depth": depth_features(adata.X)}


def probe(
    features: dict[str, np.ndarray], labels: np.ndarray, is_scored: np.ndarray, seed: int
) -> dict[str, Any]:
    """Score every representation on some of the cells, or say why not."""
    n_large = sum(size >= N_FOLDS for size in Counter(labels[is_scored].tolist()).values())
    if is_scored.sum() < MIN_HELD_OUT_CELLS or n_large < 2:
        return {"not_scored": f"{int(is_scored.sum())} cells, {n_large} types of at least {N_FOLDS} cells"}
    return {
        name: probe_embedding(
            matrix[is_scored], labels[is_scored], n_folds=N_FOLDS, n_neighbors=N_NEIGHBORS, seed=seed
        )
        for name, matrix in features.items()
    }


def print_table(title: str, scores: dict[str, Any]) -> None:
    """Print accuracy and macro-F1 of every representation."""
    if "not_scored" in scores:
        print(f"\n{title}: not scored, {scores['not_scored']}")
        return
    first = next(iter(scores.values()))
    print(f"\n{title}: {first['n_cells']} cells, {first['n_classes']} types")
    print(f"  {'':22}" + "".join(f"{name:>20}" for name in SCORES))
    for name, numbers in scores.items():
        cells = "".join(f"{numbers[score]:12.3f} ± {numbers[f'{score}_sd']:.3f}" for score in SCORES)
        print(f"  {name:22}{cells}")


def main() -> None:
    """Embed, probe, write, print."""
    arguments = parse_arguments()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    trained = ScDivaModel.from_pretrained(arguments.model).to(arguments.device)
    torch.manual_seed(arguments.seed)
    models = {"scdiva": trained, "random_weights": ScDivaModel(trained.config).to(arguments.device)}
    splits = {} if arguments.corpus is None else {
        split: pretraining_rows(CellCorpus(arguments.corpus, split, ranking_settings=tokenizer.ranking_settings))
        for split in ("train", "validation")
    }  # fmt: skip
    results: dict[str, Any] = {}
    for name, task in DATASETS.items():
        adata, rows = read_labelled(arguments.data / f"{name}.h5ad", task)
        labels = adata.obs[task.label_key].astype(str).to_numpy()
        features = all_features(adata, models, tokenizer, arguments)
        everywhere = np.ones(len(rows), dtype=bool)
        entry: dict[str, Any] = {
            "label_key": task.label_key,
            "note": task.note,
            "in_pretraining": "not stated",
        }
        entry["all_cells"] = probe(features, labels, everywhere, arguments.seed)
        print_table(f"{name}, all cells", entry["all_cells"])
        if splits:
            known = {split: np.isin(rows, list(of_split.get(name, ()))) for split, of_split in splits.items()}
            entry["in_pretraining"] = {
                "without_labels": int(known["train"].sum()), "held_out": int(known["validation"].sum()),
                "of_cells": len(rows),
            }  # fmt: skip
            entry["held_out_cells"] = probe(features, labels, ~known["train"], arguments.seed)
            print_table(f"{name}, held-out cells", entry["held_out_cells"])
        results[name] = entry
    settings = {key: getattr(arguments, key) for key in ("pooling", "seed", "batch_size")}
    result = collect_provenance() | settings | {"benchmark": "embedding_probes", "results": results}
    result["config"] = {
        key: value for key, value in trained.config.to_diff_dict().items() if key != "auto_map"
    }
    write_json(arguments.output, result)
    print(f"\nwrote {arguments.output}")


if __name__ == "__main__":
    main()
