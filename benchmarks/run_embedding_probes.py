"""Cell types from the frozen embedding of a checkpoint, beside PCA, random weights and sequencing depth.

    python benchmarks/run_embedding_probes.py --model scdiva --data FOLDER_OF_H5AD --corpus corpus \
        --output benchmarks/results

k nearest neighbours and logistic regression, five stratified folds, the same folds for every method, on three
labelled data sets of raw counts. With `--corpus`, the corpus the model was pretrained on, the result says how
many of the scored cells were in pretraining (without their labels), and scores the others by themselves, too.
Files and data sets of the corpus are matched by name. About a quarter of an hour on two cores for
`small.json`, nearly all of it forward passes.
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
from modeling_scdiva.provenance import collect_provenance, result_path
from modeling_scdiva.tasks import embed_cells
from modeling_scdiva.tasks.cells import whole_counts
from tokenization_scdiva import CellCorpus
from tokenization_scdiva.files import write_json

N_FOLDS, N_NEIGHBORS = 5, 15
NO_TYPE = ("", "unspecified")
# Fewer held-out cells than this make five folds of a handful of cells per type.
MIN_HELD_OUT_CELLS = 50
SCORES = ("knn_accuracy", "knn_macro_f1", "logistic_accuracy", "logistic_macro_f1")


@dataclass(frozen=True)
class LabelledCells:
    """Which cells of a file are scored, by which labels."""

    label_key: str
    keep: tuple[str, str] | None = None  # column of obs and the value it must have
    note: str = ""


DATASETS = {
    "pbmc_facs_zheng2017": LabelledCells("cell_type", note="sorting gates; each type is one technical batch"),
    "kang2018_ifnb_pbmc": LabelledCells(
        "cell_type", ("cell_type_source", "curated"), note="labels transferred by a classifier are left out"
    ),
    "crohn_gut_scp1884": LabelledCells("cell_type_coarse", note="'unspecified' is no type and left out"),
}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder with weights and tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="folder with the labelled h5ad files")
    parser.add_argument("--corpus", type=Path, help="corpus of the pretraining, to know the held-out cells")
    parser.add_argument("--output", type=Path, required=True, help="JSON file, or folder")
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
    is_scored = (labels.notna() & ~labels.isin(NO_TYPE)).to_numpy()
    if task.keep is not None:
        is_scored &= (adata.obs[task.keep[0]] == task.keep[1]).to_numpy()
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
    counts = whole_counts(adata)
    components = pca_features(log_normalise(counts), n_components=50, seed=arguments.seed)
    return features | {"pca_50": components, "depth": depth_features(counts)}


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


def card_rows(results: dict[str, Any]) -> dict[str, Any]:
    """Give the scores in the form that model cards and the README print."""
    numbers, baselines = [], []
    for dataset, entry in results.items():
        for part in ("all_cells", "held_out_cells"):
            scores = entry.get(part, {})
            for name, values in scores.items() if "not_scored" not in scores else ():
                row = {"data": f"{dataset}, {part.replace('_', ' ')} ({values['n_cells']})", "method": name}
                row |= {key: values[key] for score in SCORES for key in (score, f"{score}_sd")}
                (numbers if name.startswith("scdiva") else baselines).append(row)
    return {
        "title": "Cell types from the frozen embedding",
        "numbers": numbers,
        "baselines": baselines,
        "note": "Five stratified folds, mean and standard deviation over folds. Held out: cells that were "
        "not in pretraining; they are few, so folds spread widely. PCA: 50 components of the same "
        "log-normalised cells, "
        "all genes. Depth: library size and number of genes.",
    }


def main() -> None:
    """Embed, probe, write, print."""
    arguments = parse_arguments()
    output = result_path(arguments.output, "embedding_probes")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    trained = ScDivaModel.from_pretrained(arguments.model).to(arguments.device)
    torch.manual_seed(arguments.seed)
    models = {"scdiva": trained, "random_weights": ScDivaModel(trained.config).to(arguments.device)}
    ranking = tokenizer.ranking_settings
    splits = {
        split: pretraining_rows(CellCorpus(arguments.corpus, split, ranking_settings=ranking))
        for split in (("train", "validation") if arguments.corpus else ())
    }
    results: dict[str, Any] = {}
    for name, task in DATASETS.items():
        adata, rows = read_labelled(arguments.data / f"{name}.h5ad", task)
        labels = adata.obs[task.label_key].astype(str).to_numpy()
        features = all_features(adata, models, tokenizer, arguments)
        everywhere = np.ones(len(rows), dtype=bool)
        entry: dict[str, Any] = {"label_key": task.label_key, "note": task.note}
        entry["all_cells"] = probe(features, labels, everywhere, arguments.seed)
        print_table(f"{name}, all cells", entry["all_cells"])
        if splits:
            known = {split: np.isin(rows, list(of_split.get(name, ()))) for split, of_split in splits.items()}
            counted = {split: int(is_known.sum()) for split, is_known in known.items()}
            entry["in_pretraining"] = counted | {"of_cells": len(rows), "labels_used": False}
            entry["held_out_cells"] = probe(features, labels, ~known["train"], arguments.seed)
            print_table(f"{name}, held-out cells", entry["held_out_cells"])
        else:
            entry["in_pretraining"] = "not known: no --corpus was given"
        results[name] = entry
    settings = {key: getattr(arguments, key) for key in ("pooling", "seed", "batch_size")}
    result = collect_provenance() | settings | {"benchmark": "embedding_probes", "results": results}
    result |= card_rows(results)
    config = trained.config.to_diff_dict()
    result["config"] = {key: value for key, value in config.items() if key != "auto_map"}
    write_json(output, result)
    print(f"\nwrote {output}")


if __name__ == "__main__":
    main()
