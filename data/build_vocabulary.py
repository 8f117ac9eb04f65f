"""Build a tokenizer (gene vocabulary with population entropies) from files of cells.

    python data/build_vocabulary.py cells/*.h5ad --gene_table hgnc.parquet gencode.parquet --output tokenizer
    python data/build_vocabulary.py cells/*.h5ad --gene_table hgnc.parquet --output tokenizer --engine ray
    python data/build_vocabulary.py atlas_folder --n_genes 4096 --max_genes 256 --output small_tokenizer

Writes a folder of about 5 MB per 40,000 genes: `gene_vocabulary.json`, `tokenizer_config.json`, the
tokenizer's code, and `vocabulary_report.json`, which says for every file how its genes were matched.
`AutoTokenizer` loads the folder.
"""

import argparse
import logging
import time
from pathlib import Path

from tokenization_scdiva import ScDivaTokenizer, build_vocabulary, find_cell_files, read_gene_tables
from tokenization_scdiva.engines import ENGINES
from tokenization_scdiva.files import open_cells, write_json
from tokenization_scdiva.genes_scdiva import ensembl_id, gene_name_columns


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
    parser.add_argument("--output", type=Path, required=True, help="tokenizer folder to write")
    parser.add_argument(
        "--gene_table", nargs="+", type=Path, help="HGNC or GENCODE tables that say what names mean"
    )
    parser.add_argument("--layer", help="layer with the counts; default: counts, raw.X or X, as printed")
    parser.add_argument("--gene_id_key", help="var column with gene ids; default: all known ones")
    parser.add_argument(
        "--expression_is_log1p", action="store_true", help="the files hold log1p values, not counts"
    )
    parser.add_argument("--min_cells", type=int, default=1, help="leave out genes seen in fewer cells")
    parser.add_argument("--n_genes", type=int, help="keep only the most variable genes")
    parser.add_argument(
        "--keep_genes",
        nargs="+",
        default=[],
        help="and these: gene names, or h5ad files whose genes are meant",
    )
    parser.add_argument(
        "--min_gene_overlap", type=float, default=0.1, help="least share of a file's genes in the gene table"
    )
    parser.add_argument("--max_genes", type=int, default=1200, help="genes kept of a cell")
    parser.add_argument("--target_sum", type=float, default=1e4, help="molecules every cell is scaled to")
    parser.add_argument("--gene_order", choices=["entropy", "expression", "random"], default="entropy")
    parser.add_argument("--entropy_epsilon", type=float, default=1.0, help="nats added to every entropy")
    parser.add_argument(
        "--engine", choices=sorted(ENGINES), default="serial", help="what runs the entropy statistics"
    )
    return parser.parse_args()


def gene_names(entries: list[str]) -> list[str]:
    """Read the names of genes where an entry is a file; an Ensembl id where there is one."""
    names: list[str] = []
    for entry in entries:
        if not entry.endswith(".h5ad"):
            names.append(entry)
            continue
        with open_cells(Path(entry)) as adata:
            columns = gene_name_columns(adata)
        for written in zip(*columns.values(), strict=True):
            known = [str(name) for name in written if name]
            names += sorted(known, key=lambda name: not ensembl_id(name))[:1]
    return names


def main() -> None:
    """Build the vocabulary and save the tokenizer."""
    args = parse_arguments()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    start = time.perf_counter()
    files = find_cell_files(args.inputs)
    table = read_gene_tables(args.gene_table) if args.gene_table else None
    print(f"Building a gene vocabulary from {len(files)} files" + (f" with {table!r}." if table else "."))
    vocabulary, reports = build_vocabulary(
        files,
        gene_table=table,
        layer=args.layer,
        gene_id_key=args.gene_id_key,
        expression_is_log1p=args.expression_is_log1p,
        target_sum=args.target_sum,
        min_cells=args.min_cells,
        n_genes=args.n_genes,
        keep_genes=gene_names(args.keep_genes),
        min_gene_overlap=args.min_gene_overlap,
        run_units=ENGINES[args.engine],
    )
    tokenizer = ScDivaTokenizer(
        vocabulary=vocabulary,
        max_genes=args.max_genes,
        target_sum=args.target_sum,
        gene_order=args.gene_order,
        entropy_epsilon=args.entropy_epsilon,
    )
    tokenizer.save_pretrained(args.output)
    write_json(args.output / "vocabulary_report.json", reports)
    for report in reports:
        genes = report["genes"]
        print(
            f"  {report['name']}: {report['n_cells']:,} cells from {report['source']}; genes "
            f"{genes['n_genes']:,}: {genes['by_id']:,} by id, {genes['by_symbol']:,} by symbol, "
            f"{genes['by_alias']:,} by alias, {genes['duplicates']:,} duplicate, {genes['unknown']:,} "
            f"unknown, {genes['null']:,} without name"
        )
    print(f"Saved {args.output}: {vocabulary!r}, in {time.perf_counter() - start:.1f} s.")


if __name__ == "__main__":
    main()
