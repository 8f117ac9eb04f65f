"""Likelihoods of a trained checkpoint, one question a run, beside what knows less and beside scVI.

    python benchmarks/run_likelihood.py --checkpoint runs/elbo/scdiva --corpus runs/elbo/corpus --task files
    python benchmarks/run_likelihood.py ... --task spoilt --data pbmc.h5ad --mouse mouse.h5ad
    python benchmarks/run_likelihood.py ... --task labels --dataset pbmc
    python benchmarks/run_likelihood.py ... --task scvi
    python benchmarks/run_likelihood.py ... --task exact
    python benchmarks/run_likelihood.py ... --task objectives --other runs/paper/scdiva

files: nats of held-out cells of each file of the corpus. spoilt: shuffled, doubled, contaminated, thinned and
mouse cells told from normal ones; of a file of the corpus the held-out cells only. labels: wrong cell types
of held-out cells of a file of the corpus. scvi: the marginal likelihood of scVI on the same held-out cells
and genes, cells that fit the network only. exact: the exact likelihood of samplers that draw 1, 4, 19 and 38
genes at a step. objectives: two checkpoints of equal training on the same masks. Every run writes a new JSON.
"""

import argparse
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from transformers import AutoTokenizer

from modeling_scdiva import ScDivaForMaskedDiffusion
from modeling_scdiva.evaluation import print_result, write_result
from modeling_scdiva.evaluation.label_errors import evaluate_label_errors
from modeling_scdiva.evaluation.likelihood import (
    compare_objectives,
    evaluate_exact,
    evaluate_files,
    evaluate_scvi,
)
from modeling_scdiva.evaluation.scoring import evaluate_scoring
from modeling_scdiva.provenance import result_path
from tokenization_scdiva import CellCorpus, corpus_loader

TASKS = ("files", "spoilt", "labels", "scvi", "exact", "objectives")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="trained folder")
    parser.add_argument("--corpus", type=Path, required=True, help="the corpus it was trained on")
    parser.add_argument("--task", choices=list(TASKS), required=True)
    parser.add_argument("--data", type=Path, help="spoilt: h5ad with raw counts")
    parser.add_argument("--mouse", type=Path, help="spoilt: h5ad of mouse cells; symbols are upper-cased")
    parser.add_argument("--dataset", help="labels: name of the file in the corpus, without its ending")
    parser.add_argument("--other", help="objectives: the checkpoint to compare with")
    parser.add_argument("--n_cells", type=int, default=100, help="cells of each kind")
    parser.add_argument("--n_draws", type=int, default=128, help="network calls per cell")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", help="slug of the result file; default: the task")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def load_model(folder: str, corpus: Path, tokenizer: Any) -> Any:
    """Load a checkpoint; one without a law of cell sizes gets that of its training cells."""
    model = ScDivaForMaskedDiffusion.from_pretrained(folder).eval()
    if model.generation_config.size_law is None:
        cells = CellCorpus(corpus, "train", ranking_settings=tokenizer.ranking_settings)
        size_law = cells.size_law(tokenizer.max_genes)
        model.generation_config = model.generation_config.updated(size_law=size_law)
    return model


def human_names(mouse: anndata.AnnData) -> anndata.AnnData:
    """Give mouse genes the names of their human namesakes: the symbol in capitals."""
    names = pd.Series(mouse.var_names.astype(str)).str.upper()
    kept = ~names.duplicated().to_numpy()
    cells = mouse[:, kept].copy()
    cells.var = pd.DataFrame(index=names[kept].to_numpy())
    return cells


def held_out_cells(arguments: argparse.Namespace, tokenizer: Any, split: str) -> anndata.AnnData:
    """Take cells of the corpus, at most ``n_cells`` of each of its files, in random order."""
    corpus = CellCorpus(arguments.corpus, split, ranking_settings=tokenizer.ranking_settings)
    cells = corpus.to_anndata(range(len(corpus)), tokenizer)
    order = np.random.default_rng(arguments.seed).permutation(cells.n_obs)
    place = pd.Series(cells.obs["dataset"].to_numpy()[order])
    place = place.groupby(place).cumcount().to_numpy()
    return cells[np.sort(order[place < arguments.n_cells])].copy()


def spoilt(arguments: argparse.Namespace, how: dict[str, Any]) -> dict[str, Any]:
    """Tell spoilt cells, and mouse cells, from normal ones."""
    others = {}
    if arguments.mouse is not None:
        others["mouse cells"] = human_names(anndata.read_h5ad(arguments.mouse))
    cells = anndata.read_h5ad(arguments.data)
    corpus = CellCorpus(arguments.corpus, "validation", ranking_settings=how["tokenizer"].ranking_settings)
    origin = corpus.to_anndata(range(len(corpus)), how["tokenizer"]).obs
    of_file = origin.loc[origin["dataset"] == arguments.data.stem, "cell_index"]
    if len(of_file):  # the others were trained on
        cells = cells[np.sort(of_file.to_numpy())].copy()
    return evaluate_scoring(
        cells,
        name=arguments.data.stem,
        max_test_cells=arguments.n_cells,
        seed=arguments.seed,
        others=others,
        **how,
    )


def labels(arguments: argparse.Namespace, how: dict[str, Any]) -> dict[str, Any]:
    """Look for wrong cell types of held-out cells of one file."""
    name = arguments.dataset
    parts = []
    for split, n_cells in (("train", 10**9), ("validation", arguments.n_cells)):
        chosen = argparse.Namespace(**vars(arguments) | {"n_cells": n_cells})
        cells = held_out_cells(chosen, how["tokenizer"], split)
        parts.append(cells[cells.obs["dataset"] == name].copy())
    return evaluate_label_errors(*parts, name=name, seed=arguments.seed, **how)


def objectives(arguments: argparse.Namespace, how: dict[str, Any]) -> dict[str, Any]:
    """Compare two checkpoints on the same held-out cells and masks."""
    other = load_model(arguments.other, arguments.corpus, how["tokenizer"])
    loader = corpus_loader(
        arguments.corpus,
        "validation",
        tokenizer=how["tokenizer"],
        batch_size=arguments.batch_size,
        conditions=how["model"].config.conditions,
        objective="elbo",
    )
    cells = held_out_cells(arguments, how["tokenizer"], "validation")
    return compare_objectives({"elbo": how["model"], "paper": other}, loader, cells, **how)


def main() -> None:
    """Measure, print, write."""
    arguments = parse_arguments()
    output = result_path(arguments.output, arguments.name or f"likelihood_{arguments.task}")
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    how = {
        "model": load_model(arguments.checkpoint, arguments.corpus, tokenizer),
        "tokenizer": tokenizer,
        "n_draws": arguments.n_draws,
        "batch_size": arguments.batch_size,
    }
    if arguments.task == "spoilt":
        result = spoilt(arguments, how)
    elif arguments.task == "labels":
        result = labels(arguments, how)
    elif arguments.task == "objectives":
        result = objectives(arguments, how)
    else:
        cells = held_out_cells(arguments, tokenizer, "validation")
        if arguments.task == "files":
            result = evaluate_files(cells, seed=arguments.seed, **how)
        elif arguments.task == "exact":
            result = evaluate_exact(cells, **how)
        else:
            corpus = CellCorpus(arguments.corpus, "train", ranking_settings=tokenizer.ranking_settings)
            training = corpus.to_anndata(range(len(corpus)), tokenizer)  # all that the network saw
            result = evaluate_scvi(training, cells, seed=arguments.seed, **how)
    print_result(result)
    print(f"Wrote {write_result(result, output, f'likelihood_{arguments.task}', {})}.")


if __name__ == "__main__":
    main()
