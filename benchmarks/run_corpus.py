"""A corpus of real files: what is matched and kept, and whether any way of building it gives the same bytes.

    python benchmarks/run_corpus.py cells/*.h5ad --tokenizer tokenizer --num-shards 2 --output
    benchmarks/results

Builds the corpus three times in a temporary folder: at once, at once again, and each shard by itself.
Compares the SHA-256 of every file, and writes the report of every input file, bytes per cell and cells per
second.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from modeling_scdiva.provenance import collect_provenance, result_path
from tokenization_scdiva import CorpusSettings, ScDivaTokenizer, build_corpus, find_cell_files
from tokenization_scdiva.files import file_sha256, write_json


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", nargs="+", help="files of cells, globs or folders")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of data/build_vocabulary.py")
    parser.add_argument("--num-shards", type=int, default=2, help="shards per split")
    parser.add_argument("--obs_keys", nargs="+", default=(), help="obs columns to keep")
    parser.add_argument("--output", type=Path, required=True, help="JSON file, or folder")
    return parser.parse_args()


def hashes(folder: Path) -> dict[str, str]:
    """Return file name -> SHA-256 of all files of a corpus."""
    return {path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}


def build(folder: Path, arguments: argparse.Namespace, *, shard_by_shard: bool) -> dict[str, Any]:
    """Build once; return the manifest, the hashes and the seconds."""
    files = find_cell_files(arguments.inputs)
    tokenizer = ScDivaTokenizer.from_pretrained(arguments.tokenizer)
    settings = CorpusSettings(n_shards=arguments.num_shards, obs_keys=tuple(arguments.obs_keys))
    parts = [[shard] for shard in reversed(range(arguments.num_shards))] if shard_by_shard else [None]
    start = time.perf_counter()
    for shards in parts:
        manifest = build_corpus(
            files, folder, tokenizer=tokenizer, settings=settings, shards=shards, show_progress=False
        )
    return {"manifest": manifest, "hashes": hashes(folder), "seconds": time.perf_counter() - start}


def main() -> None:
    """Build, compare, write, print."""
    arguments = parse_arguments()
    output = result_path(arguments.output, "corpus")
    with tempfile.TemporaryDirectory() as scratch:
        whole, again, apart = (
            build(Path(scratch) / name, arguments, shard_by_shard=name == "apart")
            for name in ("whole", "again", "apart")
        )
    manifest = whole["manifest"]
    n_read = sum(dataset["n_cells"] for dataset in manifest["datasets"])
    n_kept = sum(split["n_cells"] for split in manifest["splits"].values())
    n_bytes = sum(shard["n_bytes"] for split in manifest["splits"].values() for shard in split["shards"])
    result = collect_provenance() | {
        "benchmark": "corpus",
        "rebuilding_gives_identical_bytes": again["hashes"] == whole["hashes"],
        "shards_built_apart_equal_the_whole": apart["hashes"] == whole["hashes"],
        "hashes": whole["hashes"],
        "n_cells_read": n_read,
        "n_cells_kept": n_kept,
        "n_cells": {name: split["n_cells"] for name, split in manifest["splits"].items()},
        "bytes_per_cell": n_bytes / n_kept,
        "cells_per_s": n_read / whole["seconds"],
        "datasets": manifest["datasets"],
    }
    write_json(output, result)
    print(f"wrote {output}")
    for key in ("rebuilding_gives_identical_bytes", "shards_built_apart_equal_the_whole", "n_cells"):
        print(f"{key}: {result[key]}")
    if not (result["rebuilding_gives_identical_bytes"] and result["shards_built_apart_equal_the_whole"]):
        raise SystemExit("The builds differ.")  # noqa: EM101


if __name__ == "__main__":
    main()
