"""Generation of a trained checkpoint, one question a run, beside baselines and real cells.

    python benchmarks/run_generation.py --checkpoint runs/elbo/scdiva --corpus runs/elbo/corpus --task calls
    python benchmarks/run_generation.py ... --task correctors
    python benchmarks/run_generation.py ... --task guidance
    python benchmarks/run_generation.py ... --task completion
    python benchmarks/run_generation.py ... --task cost

calls: closeness to held-out cells against the number of network calls. correctors: orders, schedules,
re-masking (by a quality head where the checkpoint has one or --quality_steps trains one) and entropy bounds
at equal calls. guidance: agreement and diversity over guidance scales. completion: 10, 50 and 90 % observed.
cost: a generated cell in embedding forwards. Real cells come from the corpus: held-out cells from its
validation split, reference cells from its training split. Every run writes a new JSON.
"""

import argparse
import time
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import torch
from transformers import AutoTokenizer

from modeling_scdiva import ScDivaForMaskedDiffusion
from modeling_scdiva.evaluation import print_result, write_result
from modeling_scdiva.evaluation.completion import evaluate_completion
from modeling_scdiva.evaluation.generation import evaluate_generation, joint_umap
from modeling_scdiva.evaluation.guidance import evaluate_guidance, frequent_types
from modeling_scdiva.provenance import result_path
from modeling_scdiva.quality import QualityArguments, train_quality_head, with_quality_head
from modeling_scdiva.tasks import conditions_from_obs, embed_cells, generate_cells
from tokenization_scdiva import CellCorpus, corpus_loader

N_REPEATS = 5


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="trained folder")
    parser.add_argument("--corpus", type=Path, required=True, help="the corpus it was trained on")
    parser.add_argument(
        "--task", choices=["calls", "correctors", "guidance", "completion", "cost"], required=True
    )
    parser.add_argument("--n_cells", type=int, default=256, help="cells of each setting, all types together")
    parser.add_argument("--calls", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256])
    parser.add_argument("--steps", type=int, default=64, help="calls of the other tasks")
    parser.add_argument("--only", nargs="+", help="correctors: these settings, by name")
    parser.add_argument("--skip_full", action="store_true", help="calls: leave one call per gene out")
    parser.add_argument("--scvi", action="store_true", help="draw from scVI, too: minutes")
    parser.add_argument("--quality_steps", type=int, default=0, help="correctors: train a quality head first")
    parser.add_argument("--bf16", action="store_true", help="run the network in bfloat16")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", help="slug of the result file; default: the task")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def real_cells(arguments: argparse.Namespace, tokenizer: Any, split: str, n_cells: int) -> anndata.AnnData:
    """Draw real cells of one split of the corpus."""
    corpus = CellCorpus(arguments.corpus, split, ranking_settings=tokenizer.ranking_settings)
    rows = np.random.default_rng(arguments.seed).permutation(len(corpus))[:n_cells]
    return corpus.to_anndata(np.sort(rows).tolist(), tokenizer)


def settings_of(arguments: argparse.Namespace, *, has_quality_head: bool) -> dict[str, dict[str, Any]]:
    """Name the settings that are compared."""
    if arguments.task == "calls":
        named = {f"scDiVa, {n} calls": {"steps": n} for n in arguments.calls}
        return named if arguments.skip_full else named | {"scDiVa, a call per gene": {"tokens_per_step": 1}}
    steps = arguments.steps
    named = {
        "random order": {"steps": steps},
        "random order, cosine schedule": {"steps": steps, "schedule": "cosine"},
        "rank order": {"steps": steps, "order": "rank"},
        "margin order": {"steps": steps, "order": "margin"},
        "entropy order": {"steps": steps, "order": "entropy"},
        "temperature 0.9": {"steps": steps, "temperature": 0.9},
        "temperature 0.8": {"steps": steps, "temperature": 0.8},
        "top-p 0.95": {"steps": steps, "top_p": 0.95},
        "top-p 0.9": {"steps": steps, "top_p": 0.9},
        "free values": {"steps": steps, "rank_consistent": False},
        "re-masking 0.02": {"steps": steps, "remask": "random", "remask_rate": 0.02},
        "re-masking 0.1": {"steps": steps, "remask": "random", "remask_rate": 0.1},
        "entropy bound 10": {"order": "entropy", "entropy_bound": 10.0},
        "entropy bound 20": {"order": "entropy", "entropy_bound": 20.0},
    }
    if has_quality_head:
        for rate in (0.02, 0.1):
            named[f"quality re-masking {rate:g}"] = {"steps": steps, "remask": "quality", "remask_rate": rate}
    unknown = set(arguments.only or ()) - set(named)
    if unknown:
        msg = f"No settings of these names: {sorted(unknown)}. Known: {list(named)}."
        raise SystemExit(msg)
    return {name: named[name] for name in arguments.only or named}


def add_quality_head(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> Any:
    """Train a quality head on masked training cells; the network stays as it is."""
    loader = corpus_loader(
        arguments.corpus,
        "train",
        tokenizer=tokenizer,
        batch_size=arguments.batch_size,
        conditions=model.config.conditions,
        objective=model.config.objective,
    )
    judge = with_quality_head(model, seed=arguments.seed)
    run = QualityArguments(n_steps=arguments.quality_steps, seed=arguments.seed)
    losses = train_quality_head(judge, chain.from_iterable(repeat(loader)), arguments=run)
    print(f"Quality head: loss {np.mean(losses[:50]):.3f} -> {np.mean(losses[-50:]):.3f} nats per gene.")
    return judge.eval()


def compare_settings(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Generate with each setting and score against held-out cells."""
    held_out = real_cells(arguments, tokenizer, "validation", 10**9)
    reference = real_cells(arguments, tokenizer, "train", held_out.n_obs + arguments.n_cells)
    named = settings_of(arguments, has_quality_head=model.quality_head is not None)
    if arguments.task == "calls" and "cell_type" in (model.config.conditions or {}):
        rows = np.random.default_rng(arguments.seed).integers(reference.n_obs, size=arguments.n_cells)
        named[f"scDiVa, {arguments.steps} calls, types and depths of training cells"] = {
            "steps": arguments.steps,
            "conditions": conditions_from_obs(reference[rows], model),
            "library_size": reference.obs["library_size"].to_numpy()[rows],
        }
    generated, seconds = {}, {}
    for method, settings in named.items():
        start = time.perf_counter()
        generated[method] = generate_cells(
            arguments.n_cells,
            model=model,
            tokenizer=tokenizer,
            seed=arguments.seed,
            batch_size=arguments.batch_size,
            show_progress=True,
            **settings,
        )
        seconds[method] = time.perf_counter() - start
        print(f"{method}: {seconds[method]:.0f} s", flush=True)
    has_types = "cell_type" in reference.obs
    if has_types:
        reference.obs["cell_type"] = reference.obs["cell_type"].fillna("not given")
    result = evaluate_generation(
        generated,
        reference=reference,
        held_out=held_out,
        tokenizer=tokenizer,
        name="corpus",
        label_key="cell_type" if has_types else None,
        include_scvi=arguments.scvi,
        seed=arguments.seed,
    )
    result["details"]["seconds"] = seconds
    chosen = generated.get("scDiVa, 64 calls")
    if chosen is not None:
        result["figures"] = {"umap": joint_umap(chosen, held_out, tokenizer=tokenizer)}
    return result


def measure_cost(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Time a generated cell against an embedded one, interleaved, medians of CPU seconds."""
    cells = real_cells(arguments, tokenizer, "validation", arguments.batch_size)
    sizes = cells.obs["library_size"].to_numpy()
    reading = {"library_size": sizes, "min_gene_overlap": 0.0, "min_count_overlap": 0.0}
    lengths = np.diff(next(tokenizer.iter_cells(cells, block_size=cells.n_obs, **reading)).offsets)
    embedding, generation = [], []
    for seed in range(N_REPEATS):
        start = time.process_time()
        embed_cells(cells, model=model, tokenizer=tokenizer, batch_size=arguments.batch_size, **reading)
        embedding.append(time.process_time() - start)
        start = time.process_time()
        generate_cells(
            cells.n_obs,
            model=model,
            tokenizer=tokenizer,
            n_genes=lengths,
            library_size=sizes,
            steps=arguments.steps,
            batch_size=arguments.batch_size,
            seed=seed,
        )
        generation.append(time.process_time() - start)
    ratios = np.array(generation) / np.array(embedding)
    config = model.config
    width, inner, length = config.hidden_size, config.intermediate_size, float(lengths.mean())
    blocks = config.num_hidden_layers * ((8 * width + 6 * inner) * width * length + 4 * width * length**2)
    head = length * (2 * width**2 + 2 * width * config.vocab_size)
    row = {
        "data": f"{arguments.steps} calls",
        "method": "scDiVa",
        "cost": float(np.median(ratios)),
        "cost_low": float(ratios.min()),
        "cost_high": float(ratios.max()),
        "formula": arguments.steps + head / blocks,
        "n_cells": int(cells.n_obs),
    }
    embedded = {"data": row["data"], "method": "one embedding forward", "cost": 1.0, "formula": 1.0}
    return {
        "title": "Cost of a generated cell",
        "numbers": [row],
        "baselines": [embedded],
        "columns": ("data", "method", "cost", "formula", "n_cells"),
        "note": "CPU seconds of generating cells over those of embedding cells of the same lengths, median "
        f"of {N_REPEATS} interleaved repeats; formula: calls + FLOPs of the gene head at each slot / FLOPs "
        "of one forward.",
        "details": {"embedding_seconds": embedding, "generation_seconds": generation},
    }


def main() -> None:
    """Measure, print, write."""
    arguments = parse_arguments()
    output = result_path(arguments.output, arguments.name or f"generation_{arguments.task}")
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    model: Any = ScDivaForMaskedDiffusion.from_pretrained(arguments.checkpoint, dtype=dtype).eval()
    if model.generation_config.size_law is None:
        corpus = CellCorpus(arguments.corpus, "train", ranking_settings=tokenizer.ranking_settings)
        size_law = corpus.size_law(tokenizer.max_genes)
        model.generation_config = model.generation_config.updated(size_law=size_law)
    how = {
        "model": model,
        "tokenizer": tokenizer,
        "steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "seed": arguments.seed,
    }
    if arguments.task == "correctors" and arguments.quality_steps:
        model = add_quality_head(arguments, model, tokenizer)
    if arguments.task in ("calls", "correctors"):
        result = compare_settings(arguments, model, tokenizer)
    elif arguments.task == "cost":
        result = measure_cost(arguments, model, tokenizer)
    elif arguments.task == "guidance":
        reference, held_out = (
            real_cells(arguments, tokenizer, name, 10**9) for name in ("train", "validation")
        )
        types = frequent_types(reference.obs["cell_type"], held_out.obs["cell_type"])
        per_type = max(1, arguments.n_cells // max(1, len(types)))
        result = evaluate_guidance(reference, held_out, n_cells_per_type=per_type, **how)
    else:
        reference = real_cells(arguments, tokenizer, "train", 2000)
        held_out = real_cells(arguments, tokenizer, "validation", arguments.n_cells)
        result = evaluate_completion(reference, held_out, **how)
    print_result(result)
    figures = result.pop("figures", {})
    print(f"Wrote {write_result(result, output, f'generation_{arguments.task}', figures)}.")


if __name__ == "__main__":
    main()
