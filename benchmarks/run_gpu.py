"""What a GPU does with the network: training MFU, wait for data, embedding, compiled or not, largest batches.

    python benchmarks/run_gpu.py --output benchmarks/results
    python benchmarks/run_gpu.py --device cpu --tiny --output /tmp/results    # tries the script out

One device, bf16 unless told otherwise, cells made up: 41,813 genes, some 2,000 of them expressed in a cell,
so that most cells fill their 1,200 places. Training is `pretrain` itself, with its loader; the numbers are
medians of the second half of its log. Several GPUs: examples/pretrain.py under accelerate launch, which logs
the same numbers.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import torch
from accelerate import Accelerator
from scipy.sparse import csr_matrix

from modeling_scdiva import ScDivaForMaskedDiffusion
from modeling_scdiva.fresh_model import fresh_model
from modeling_scdiva.hardware import compile_layers, peak_flops, refuse_precision
from modeling_scdiva.provenance import collect_provenance, result_path
from modeling_scdiva.tasks import embed_cells
from modeling_scdiva.training import PretrainingArguments, pretrain
from modeling_scdiva.training_metrics import train_flops
from tokenization_scdiva import (
    CorpusSettings,
    ScDivaTokenizer,
    build_corpus,
    build_vocabulary,
    corpus_loader,
)
from tokenization_scdiva.files import write_json

CONFIGS = Path(__file__).resolve().parents[1] / "examples" / "configs"
# Floor and aim of one GPU (H100 or A100) with the paper's network.
TARGETS = {"mfu": {"floor": 0.30, "aim": 0.45}, "data_wait_fraction": {"floor": 0.03, "aim": 0.01}}
CARD_SIZES_GB = (16, 24, 80)
USABLE_SHARE = 0.9  # of a card; the rest is CUDA's own and fragments
WIDTHS = {"eager": 1, "compiled": 304}  # 304, 608, 912 and 1,201 positions
GIB = 2**30


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=CONFIGS / "paper.json", help="ScDivaConfig file")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small network and few cells: no result")
    parser.add_argument("--precision", choices=["bf16", "no"], help="default: bf16 on CUDA, no on CPU")
    parser.add_argument("--compile", choices=["both", "off"], default="both", help="measure compiled, too")
    parser.add_argument("--batch_size", type=int, default=64, help="cells per step of training and embedding")
    parser.add_argument("--n_steps", type=int, default=100, help="training steps per measurement")
    parser.add_argument("--n_cells", type=int, default=8192, help="made-up cells")
    parser.add_argument("--num_workers", type=int, default=4, help="loader processes")
    parser.add_argument("--n_repeats", type=int, default=5, help="passes of the embedding")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="JSON file, or folder")
    return parser.parse_args()


def deep_cells(n_cells: int, n_genes: int, n_expressed: int, seed: int) -> anndata.AnnData:
    """Make cells as deep as those of large atlases: some genes of ``n_genes``, about four molecules each."""
    rng = np.random.default_rng(seed)
    n_drawn = np.clip(n_expressed * rng.lognormal(sigma=0.35, size=n_cells), 20, n_genes // 2).astype(int)
    rows = [np.unique((n_genes * rng.random(n) ** 2).astype(np.int32)) for n in n_drawn]  # some genes often
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    counts = rng.geometric(0.25, size=indptr[-1]).astype(np.float32)
    adata = anndata.AnnData(csr_matrix((counts, np.concatenate(rows), indptr), shape=(n_cells, n_genes)))
    adata.var_names = [f"ENSG{gene:011d}" for gene in range(1, n_genes + 1)]
    adata.obs_names = [f"cell_{cell}" for cell in range(n_cells)]
    return adata


def make_corpus(adata: anndata.AnnData, folder: Path, max_genes: int) -> ScDivaTokenizer:
    """Write a vocabulary of all genes and a corpus of all cells."""
    adata.write_h5ad(folder / "cells.h5ad")
    files = {"cells": folder / "cells.h5ad"}
    vocabulary, _ = build_vocabulary(files, show_progress=False)
    tokenizer = ScDivaTokenizer(vocabulary=vocabulary, max_genes=max_genes)
    settings = CorpusSettings(validation_fraction=0.0)
    build_corpus(files, folder / "corpus", tokenizer=tokenizer, settings=settings, show_progress=False)
    return tokenizer


def measure_training(
    model: ScDivaForMaskedDiffusion,
    tokenizer: ScDivaTokenizer,
    folder: Path,
    arguments: argparse.Namespace,
    kind: str,
) -> dict[str, float]:
    """Pretrain for some steps; medians of the second half of the log."""
    if kind == "compiled":
        compile_layers(model)
    loader = corpus_loader(
        folder / "corpus",
        "train",
        tokenizer=tokenizer,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        num_workers=arguments.num_workers,
        n_gene_queries=256 if model.config.latent_loss_weight else 0,
        pad_to_multiple_of=WIDTHS[kind],
    )
    log_every = max(1, arguments.n_steps // 20)
    log = pretrain(
        model,
        train_loader=loader,
        eval_loader=None,
        arguments=PretrainingArguments(n_steps=arguments.n_steps, log_every=log_every, save_every=0),
        accelerator=Accelerator(cpu=arguments.device == "cpu", mixed_precision=arguments.precision),
        output_dir=folder / f"training_{kind}",
    )
    late = log[len(log) // 2 :]
    names = ("cells_per_s", "tokens_per_s", "mfu", "data_wait_fraction")
    medians = {name: statistics.median(line[name] for line in late) for name in names}
    spread = [line["cells_per_s"] for line in late]
    return medians | {"slowest_cells_per_s": min(spread), "fastest_cells_per_s": max(spread)}


def full_batch(model: ScDivaForMaskedDiffusion, n_cells: int, n_genes: int) -> dict[str, torch.Tensor]:
    """Cells without padding, every other gene masked."""
    config = model.config
    shape, generator = (n_cells, 1 + n_genes), torch.Generator().manual_seed(0)
    ids = torch.stack(
        [torch.randperm(config.vocab_size - config.n_special_tokens, generator=generator)[: 1 + n_genes]]
        * n_cells
    )
    ids = (ids + config.n_special_tokens).index_fill_(1, torch.tensor([0]), config.lat_token_id)
    is_masked = torch.zeros(shape, dtype=torch.bool)
    is_masked[:, 1::2] = True
    batch = {
        "input_ids": ids.masked_fill(is_masked, config.mask_token_id),
        "expression_values": torch.ones(shape),
        "is_masked": is_masked,
        "labels": ids.masked_fill(~is_masked, -100),
        "expression_labels": torch.ones(shape),
        "size_factors": torch.ones(n_cells),
    }
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def held_bytes(step: Callable[[], Any], device: str) -> int:
    """Memory at its peak during a step; on a CPU, where nobody counts, what is kept for the backward pass."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    held: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step()
    return sum(held.values())


def measure_memory(
    model: ScDivaForMaskedDiffusion, n_genes: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Peak memory of a training step by cells in it, and the largest batch of full cells on a card."""
    model.train()
    accelerator = Accelerator(cpu=arguments.device == "cpu", mixed_precision=arguments.precision)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    table: dict[str, Any] = {"usable_share": USABLE_SHARE}
    for kind in ("stored", "gradient_checkpointing"):
        if kind == "gradient_checkpointing":
            model.gradient_checkpointing_enable()

        def step(n_cells: int) -> None:
            with accelerator.autocast():
                loss = model(**full_batch(model, n_cells, n_genes)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        step(1)  # makes the moments
        sizes = [2, 4, 8]
        peaks = [held_bytes(lambda n=size: step(n), arguments.device) for size in sizes]
        per_cell, fixed = np.polyfit(sizes, peaks, 1)
        largest = {
            f"{size} GB": int(max(0, (USABLE_SHARE * size * GIB - fixed) // per_cell))
            for size in CARD_SIZES_GB
        }
        table[kind] = {
            "gib_by_cells": dict(zip(map(str, sizes), [peak / GIB for peak in peaks], strict=True)),
            "fixed_gib": fixed / GIB,
            "mib_per_cell": per_cell / 2**20,
            "largest_batch": largest,
        }
    model.gradient_checkpointing_disable()
    return table


def repeated_rate(call: Callable[[], Any], n_cells: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Cells per second of a call: median, slowest and fastest of some repeats, after one that warms up."""
    accelerator = Accelerator(cpu=arguments.device == "cpu", mixed_precision=arguments.precision)
    rates = []
    for _ in range(1 + arguments.n_repeats):
        start = time.perf_counter()
        with accelerator.autocast(), torch.inference_mode():
            call()
        if arguments.device == "cuda":
            torch.cuda.synchronize()
        rates.append(n_cells / (time.perf_counter() - start))
    counted = rates[1:]
    return {"cells_per_s": statistics.median(counted), "slowest": min(counted), "fastest": max(counted)}


def measure_embedding(
    model: ScDivaForMaskedDiffusion,
    tokenizer: ScDivaTokenizer,
    adata: anndata.AnnData,
    arguments: argparse.Namespace,
    kind: str,
) -> dict[str, Any]:
    """Embed full cells in the network alone and, with any width, all cells from their counts."""
    model.eval()
    batch = full_batch(model, arguments.batch_size, tokenizer.max_genes)
    inputs = {name: batch[name] for name in ("input_ids", "expression_values", "is_masked")}
    rates = {"network": repeated_rate(lambda: model.model(**inputs), arguments.batch_size, arguments)}
    if kind == "eager":
        settings = {"batch_size": arguments.batch_size, "show_progress": False}
        rates["from_counts"] = repeated_rate(
            lambda: embed_cells(adata, model=model, tokenizer=tokenizer, **settings), adata.n_obs, arguments
        )
    return rates


def check_targets(training: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Set the best of eager and compiled beside floor and aim."""
    best = max(training.values(), key=lambda numbers: numbers["mfu"])
    signs = {"mfu": 1, "data_wait_fraction": -1}  # the second is better when lower
    return {
        name: limits
        | {"measured": best[name]}
        | {f"meets_{kind}": signs[name] * best[name] >= signs[name] * limits[kind] for kind in limits}
        for name, limits in TARGETS.items()
    }


def main() -> None:
    """Measure, write, print."""
    arguments = parse_arguments()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        msg = (
            "torch sees no CUDA device, and this benchmark is about one. Run it where there is one; "
            "--device cpu --tiny only tries the script out."
        )
        raise SystemExit(msg)
    arguments.precision = arguments.precision or ("bf16" if arguments.device == "cuda" else "no")
    accelerator = Accelerator(cpu=arguments.device == "cpu", mixed_precision=arguments.precision)
    refuse_precision(accelerator)
    output = result_path(arguments.output, "gpu")
    network = json.loads((CONFIGS / "tiny.json" if arguments.tiny else arguments.config).read_text("utf-8"))
    n_genes, max_genes, n_expressed = (120, 48, 80) if arguments.tiny else (41813, 1200, 2400)
    kinds = ["eager"] if arguments.compile == "off" else ["eager", "compiled"]
    training, embedding = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        adata = deep_cells(arguments.n_cells, n_genes, n_expressed, arguments.seed)
        tokenizer = make_corpus(adata, folder, max_genes)
        for kind in kinds:
            model = fresh_model(network, tokenizer, seed=arguments.seed)
            training[kind] = measure_training(model, tokenizer, folder, arguments, kind)
            embedding[kind] = measure_embedding(model, tokenizer, adata, arguments, kind)
            print(f"{kind}: {training[kind]}, embedding {embedding[kind]}")
        model = fresh_model(network, tokenizer, seed=arguments.seed).to(accelerator.device)
        memory = measure_memory(model, max_genes, arguments)
    config = {key: value for key, value in model.config.to_diff_dict().items() if key != "auto_map"}
    full_cell = train_flops(model.config, torch.tensor([1 + max_genes]), max_genes // 2)
    settings = ("seed", "precision", "tiny", "batch_size", "n_steps", "n_cells", "num_workers", "n_repeats")
    result = collect_provenance() | {name: getattr(arguments, name) for name in settings}
    result |= {
        "benchmark": "gpu",
        "config": config,
        "peak_tflops": peak_flops(accelerator) / 1e12,
        "gflops_per_full_cell": full_cell / 1e9,
        "training": training,
        "embedding": embedding,
        "memory": memory,
        "targets": check_targets(training),
        "is_result": arguments.device == "cuda" and not arguments.tiny,
    }
    write_json(output, result)
    for name, verdict in result["targets"].items():
        print(f"{name}: {verdict['measured']:.3f} (floor {verdict['floor']}, aim {verdict['aim']})")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
