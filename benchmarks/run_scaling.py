"""What a corpus costs: seconds over the number of cells, of genes in a cell, and of workers, serial and Ray.

    python benchmarks/run_scaling.py --output benchmarks/results
    python benchmarks/run_scaling.py --workers 1 2 8 16 --n_cells 20000 200000 --output benchmarks/results
    python benchmarks/run_scaling.py --on_paper

Builds corpora of made-up cells (33,000 genes, counts drawn molecule by molecule) in a temporary folder. Rows
are medians over repeats, with the smallest and the largest; serial, Ray and plain reading of the same files
take turns. Workers have started and imported everything before they are timed; `start_s` is what that took.
Core-hours are 59 million cells times the measured cost of one. `--on_paper` prints the GPU-hours of
data/SCALING.md: FLOPs by the formula of modeling_scdiva/training_metrics.py, over assumed shares of the peak.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import torch
from scipy.sparse import csr_matrix
from tqdm import tqdm

from modeling_scdiva import ScDivaConfig
from modeling_scdiva.hardware import PEAK_TFLOPS
from modeling_scdiva.provenance import collect_provenance, result_path
from modeling_scdiva.training_metrics import train_flops
from tokenization_scdiva import (
    CorpusSettings,
    ScDivaTokenizer,
    build_corpus,
    open_cells,
    read_counts,
    synthetic_tokenizer,
)
from tokenization_scdiva.engines import Engine, run_on_ray, run_serially
from tokenization_scdiva.files import write_json

N_GENES = 33_000
GENE_SPREAD = 3.0  # of the log of the genes' rates: 8,000 molecules give about 2,000 genes
PAPER_CELLS = 59_162_450
PAPER_EPOCHS = 4
# Assumed lengths: 78 % of the cells reach the cap of 1,200 genes, mean 1,141, and <lat>.
PAPER_LENGTHS = [1_201] * 78 + [934] * 22
ASSUMED_MFU = (0.25, 0.35, 0.45, 0.55)
EMBEDDING_MFU = 0.40
CONFIG = Path(__file__).resolve().parents[1] / "examples" / "configs" / "paper.json"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n_cells", type=int, nargs="+", default=[5_000, 20_000, 80_000], help="sizes")
    parser.add_argument(
        "--n_molecules", type=int, nargs="+", default=[1_500, 8_000, 30_000], help="of a cell"
    )
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="of Ray; none leaves Ray out")
    parser.add_argument("--n_files", type=int, default=8, help="files the cells lie in: the units of work")
    parser.add_argument("--n_repeats", type=int, default=3, help="of every measurement")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file, or folder")
    parser.add_argument("--on_paper", action="store_true", help="print the GPU-hours and stop")
    arguments = parser.parse_args()
    if not arguments.on_paper and arguments.output is None:
        parser.error("--output is needed: a JSON file, or a folder")
    return arguments


def make_files(folder: Path, *, n_cells: int, n_molecules: int, n_files: int, seed: int) -> dict[str, Path]:
    """Write uncompressed h5ad files of made-up cells; the same genes for every seed."""
    rates = np.random.default_rng(0).lognormal(sigma=GENE_SPREAD, size=N_GENES)
    edges = np.cumsum(rates / rates.sum())
    files = {}
    for index, size in enumerate(np.diff(np.linspace(0, n_cells, n_files + 1).astype(int))):
        rng = np.random.default_rng([seed, index])
        depths = rng.poisson(n_molecules * rng.lognormal(sigma=0.4, size=size))
        genes = np.minimum(np.searchsorted(edges, rng.random(depths.sum())), N_GENES - 1)
        indptr = np.concatenate([[0], np.cumsum(depths)])
        counts = csr_matrix((np.ones(len(genes), np.float32), genes, indptr), shape=(size, N_GENES))
        counts.sum_duplicates()
        adata = anndata.AnnData(counts)
        adata.var_names = [f"ENSG{gene:011d}" for gene in range(N_GENES)]
        files[f"cells{index}"] = folder / f"cells{index}.h5ad"
        adata.write_h5ad(files[f"cells{index}"])
    return files


def read_only(files: dict[str, Path]) -> int:
    """Read and prove all counts of the files; return the number of stored values."""
    n_values = 0
    for path in files.values():
        with open_cells(path) as adata:
            n_values += sum(len(block.data) for block in read_counts(adata).blocks())
    return n_values


def measure(function: Callable[[], Any]) -> dict[str, Any]:
    """Run once: wall seconds, CPU seconds of this process, and what came back."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "result": result}


def build(files: dict[str, Path], tokenizer: ScDivaTokenizer, run_units: Engine) -> dict[str, Any]:
    """Build a corpus of as many shards as files, and throw it away."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = build_corpus(
            files, folder, tokenizer=tokenizer, settings=CorpusSettings(n_shards=len(files)),
            run_units=run_units, show_progress=False,
        )  # fmt: skip
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    return {"n_bytes": sum(shard["n_bytes"] for shard in shards), "sha256": [s["sha256"] for s in shards]}


def spread(name: str, values: list[float]) -> dict[str, float]:
    """Median, smallest and largest, as a table shows them."""
    return {name: statistics.median(values), f"{name}_low": min(values), f"{name}_high": max(values)}


def row(
    method: str, runs: list[dict[str, Any]], *, n_cells: int, n_values: int, has_cpu: bool
) -> dict[str, Any]:
    """One line of the table."""
    genes = n_values / n_cells
    line = {"data": f"{n_cells:,} cells of {genes:,.0f} genes", "method": method}
    line |= spread("cells_per_s", [n_cells / run["wall"] for run in runs])
    if has_cpu:
        line |= spread("cells_per_core_s", [n_cells / run["cpu"] for run in runs])
        seconds = statistics.median(run["cpu"] for run in runs)
        line["core_hours_of_59_million_cells"] = PAPER_CELLS / n_cells * seconds / 3600
    if isinstance(runs[0]["result"], dict):
        line["bytes_per_cell"] = runs[0]["result"]["n_bytes"] / n_cells
    return line


def curve(arguments: argparse.Namespace, *, n_cells: int, n_molecules: int, workers: list[int]) -> list[dict]:
    """Measure one size: reading, the serial loop, and Ray with every number of workers."""
    with tempfile.TemporaryDirectory() as folder:
        files = make_files(
            Path(folder), n_cells=n_cells, n_molecules=n_molecules, n_files=arguments.n_files,
            seed=arguments.seed,
        )  # fmt: skip
        tokenizer = synthetic_tokenizer(anndata.read_h5ad(files["cells0"])[:500].copy())
        n_values = read_only(files)
        size = {"n_cells": n_cells, "n_values": n_values}
        runs: dict[str, list[dict[str, Any]]] = {"reading alone": [], "serial": []}
        for _ in range(arguments.n_repeats):
            runs["reading alone"].append(measure(lambda: read_only(files)))
            runs["serial"].append(measure(lambda: build(files, tokenizer, run_serially)))
        rows = [row(method, taken, **size, has_cpu=True) for method, taken in runs.items()]
        rows += [ray_row(files, tokenizer, n, arguments.n_repeats, size) for n in workers]
    return rows


def ray_row(
    files: dict[str, Path], tokenizer: ScDivaTokenizer, n_workers: int, n_repeats: int, size: dict[str, int]
) -> dict[str, Any]:
    """Measure Ray with some workers, taking turns with the serial loop; refuse other bytes."""
    import ray

    start = time.perf_counter()
    ray.init(num_cpus=n_workers, include_dashboard=False, log_to_driver=False)
    list(run_on_ray(import_everything, range(2 * n_workers), tqdm(disable=True)))
    started = time.perf_counter() - start
    through_ray, serial = [], []
    for _ in range(n_repeats):
        through_ray.append(measure(lambda: build(files, tokenizer, run_on_ray)))
        serial.append(measure(lambda: build(files, tokenizer, run_serially)))
    ray.shutdown()
    if through_ray[0]["result"] != serial[0]["result"]:
        raise SystemExit("Ray and the serial loop gave different bytes.")  # noqa: EM101
    line = row(f"Ray, {n_workers} worker{'s' * (n_workers > 1)}", through_ray, **size, has_cpu=False)
    times = [one["wall"] / other["wall"] for one, other in zip(serial, through_ray, strict=True)]
    return line | spread("times_the_serial_loop", times) | {"start_s": started}


def import_everything(unit: int, progress: Any) -> int:
    """Make a worker import what a build needs."""
    from tokenization_scdiva import build_corpus  # noqa: F401

    time.sleep(1)  # so that every worker gets one
    return unit


def gpu_table() -> str:
    """GPU-hours of the paper's run on paper: FLOPs of a cell over assumed shares of the vendors' peaks.

    Returns:
        A Markdown table.
    """
    config = ScDivaConfig.from_json_file(CONFIG)
    lengths = torch.tensor(PAPER_LENGTHS)
    training = train_flops(config, lengths, int((lengths - 1).sum()) // 2) / len(lengths)
    embedding = train_flops(config, lengths, 0) / 3 / len(lengths)
    shares = [f"GPU-hours at {share:.0%}" for share in ASSUMED_MFU]
    lines = [
        " | ".join(
            ["", "peak, TFLOP/s", "cells/s at 100 %", *shares, f"embedding, cells/s at {EMBEDDING_MFU:.0%}"]
        ),
        " | ".join(["---"] * (4 + len(shares))),
    ]
    for name in ("A100", "H100"):
        peak = PEAK_TFLOPS[name] * 1e12
        hours = [PAPER_CELLS * PAPER_EPOCHS * training / (peak * share) / 3600 for share in ASSUMED_MFU]
        numbers = [PEAK_TFLOPS[name], peak / training, *hours, EMBEDDING_MFU * peak / embedding]
        lines.append(" | ".join([name, *(f"{number:,.0f}" for number in numbers)]))
    table = "\n".join(f"| {line.strip()} |" for line in lines)
    return f"{table}\n\nA cell: {training / 1e9:,.0f} GFLOP of training, {embedding / 1e9:,.0f} of embedding."


def main() -> None:
    """Measure, write, print."""
    arguments = parse_arguments()
    if arguments.on_paper:
        print(gpu_table())
        return
    output = result_path(arguments.output, "scaling")
    sizes, depths = sorted(arguments.n_cells), sorted(arguments.n_molecules)
    middle_size, middle_depth = sizes[len(sizes) // 2], depths[len(depths) // 2]
    settings = [(size, middle_depth) for size in sizes]
    settings += [(middle_size, depth) for depth in depths if depth != middle_depth]
    rows: list[dict[str, Any]] = []
    for n_cells, n_molecules in settings:
        is_largest = (n_cells, n_molecules) == (sizes[-1], middle_depth)
        workers = arguments.workers if is_largest else []
        rows += curve(arguments, n_cells=n_cells, n_molecules=n_molecules, workers=workers)
        print(f"measured {rows[-1]['data']}")
    note = (
        f"Uncompressed h5ad of made-up cells in {arguments.n_files} files. Medians of {arguments.n_repeats} "
        "runs [smallest, largest]; cells per second of wall time and of one core's time, core-hours "
        "by multiplication. Workers of Ray had started before."
    )
    result = collect_provenance() | {
        "benchmark": "scaling",
        "title": "Cost of a corpus",
        "seed": arguments.seed,
        "numbers": [line for line in rows if line["method"] != "reading alone"],
        "baselines": [line for line in rows if line["method"] == "reading alone"],
        "note": note,
    }
    write_json(output, result)
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
