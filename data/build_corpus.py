"""Tokenize files of cells into a sharded Arrow corpus.

    python data/build_corpus.py cells/*.h5ad --tokenizer tokenizer --output corpus --num-shards 8
    python data/build_corpus.py cells/*.h5ad --tokenizer tokenizer --output corpus --num-shards 8 --shard 3
    python data/build_corpus.py cells/*.h5ad --tokenizer tokenizer --output corpus --num-shards 8 --engine ray

The second line builds one part. Any part can be built by itself, on any machine; the parts together are the
same bytes as a build in one go, and so is what a Ray cluster builds (third line; data/SCALING.md). An
interrupted build goes on where it stopped when started again. Size: 4 bytes per stored gene and cell (2 kB
for a shallow PBMC, 10 kB for a deep cell), and as much again until the build is done.
"""

import argparse
import logging
import time
from pathlib import Path

from tokenization_scdiva import CorpusSettings, ScDivaTokenizer, build_corpus, find_cell_files
from tokenization_scdiva.engines import ENGINES


def parse_arguments() -> argparse.Namespace:
    """Read the command line.

    Returns:
        The arguments.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "inputs", nargs="+", help="h5ad files, 10x .h5 files, 10x folders, globs, or folders of these"
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of data/build_vocabulary.py")
    parser.add_argument("--output", type=Path, required=True, help="corpus folder to write")
    parser.add_argument("--num-shards", type=int, default=1, help="shards per split")
    parser.add_argument("--shard", type=int, nargs="+", help="build these shards only, from 0")
    parser.add_argument("--seed", type=int, default=0, help="of shuffle and split")
    parser.add_argument(
        "--validation_fraction", type=float, default=0.1, help="share of cells or groups held out"
    )
    parser.add_argument(
        "--validation_key", help="obs column whose groups are held out whole; dataset_id for files"
    )
    parser.add_argument("--validation_values", nargs="+", default=(), help="the groups to hold out")
    parser.add_argument("--obs_keys", nargs="+", default=(), help="obs columns to keep")
    parser.add_argument("--layer", help="layer with the counts; default: counts, raw.X or X, as printed")
    parser.add_argument("--gene_id_key", help="var column with gene ids; default: all known ones")
    parser.add_argument(
        "--expression_is_log1p", action="store_true", help="the files hold log1p values, not counts"
    )
    parser.add_argument("--count_dtype", choices=["uint16", "uint32"], default="uint16")
    parser.add_argument("--min_genes", type=int, default=1, help="drop cells with fewer vocabulary genes")
    parser.add_argument(
        "--min_gene_overlap", type=float, default=0.1, help="least share of known genes in a file"
    )
    parser.add_argument(
        "--min_count_overlap", type=float, default=0.5, help="least share of molecules in them"
    )
    parser.add_argument("--engine", choices=sorted(ENGINES), default="serial", help="what runs the work")
    return parser.parse_args()


def main() -> None:
    """Build the corpus and say what it holds."""
    args = parse_arguments()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    start = time.perf_counter()
    files = find_cell_files(args.inputs)
    tokenizer = ScDivaTokenizer.from_pretrained(args.tokenizer)
    settings = CorpusSettings(
        n_shards=args.num_shards,
        seed=args.seed,
        validation_fraction=args.validation_fraction,
        validation_key=args.validation_key,
        validation_values=tuple(args.validation_values),
        obs_keys=tuple(args.obs_keys),
        layer=args.layer,
        gene_id_key=args.gene_id_key,
        expression_is_log1p=args.expression_is_log1p,
        count_dtype=args.count_dtype,
        min_genes=args.min_genes,
        min_gene_overlap=args.min_gene_overlap,
        min_count_overlap=args.min_count_overlap,
    )
    manifest = build_corpus(
        files,
        args.output,
        tokenizer=tokenizer,
        settings=settings,
        shards=args.shard,
        run_units=ENGINES[args.engine],
    )
    elapsed = time.perf_counter() - start
    if manifest is None:
        print(
            f"Built shards {args.shard} of {args.num_shards} in {elapsed:.1f} s; the corpus is not whole yet."
        )
        return
    n_read = n_kept = 0
    for dataset in manifest["datasets"]:
        genes = dataset["genes"]
        n_matched = genes["by_id"] + genes["by_symbol"] + genes["by_alias"]
        n_read, n_kept = n_read + dataset["n_cells"], n_kept + dataset["n_cells_kept"]
        dropped = ", ".join(f"{n:,} {reason}" for reason, n in dataset["n_cells_dropped"].items()) or "none"
        print(
            f"  {dataset['name']} ({dataset['source']}): cells kept {dataset['n_cells_kept']:,}, dropped "
            f"{dropped}; genes matched {n_matched:,} of {genes['n_genes']:,} with "
            f"{dataset['matched_fraction_of_counts']:.1%} of the counts ({genes['duplicates']:,} duplicate, "
            f"{genes['unknown']:,} not in the vocabulary)"
        )
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    n_bytes = sum(shard["n_bytes"] for shard in shards)
    splits = ", ".join(f"{split} {content['n_cells']:,}" for split, content in manifest["splits"].items())
    print(
        f"Corpus {args.output}: {len(files)} files, {n_kept:,} of {n_read:,} cells kept ({splits}), "
        f"{len(shards)} Arrow files, {n_bytes / max(n_kept, 1):,.0f} bytes per cell, "
        f"{n_read / elapsed:,.0f} cells/s."
    )


if __name__ == "__main__":
    main()
