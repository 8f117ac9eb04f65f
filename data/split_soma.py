r"""Split a SOMA experiment, such as the CELLxGENE Census, into pieces that are built one by one.

    python data/split_soma.py s3://.../census_data/homo_sapiens --layer raw --cells_per_piece 500000 \
        --obs_filter "is_primary_data == True" --output census \
        --tiledb_config vfs.s3.region=us-west-2 vfs.s3.no_sign_request=true
    python data/build_corpus.py census --tokenizer tokenizer --output corpus --num-shards 512 --engine ray

Writes one small `.soma.json` file a piece (`tokenization_scdiva/soma.py` says what it holds); cells are not
copied. Pieces are equal ranges of `soma_joinid`; a filter leaves some smaller, and empty ones are left out.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from tokenization_scdiva.soma import SOURCE_ENDING, SomaSource, count_cells, write_source


def parse_arguments() -> argparse.Namespace:
    """Read the command line.

    Returns:
        The arguments.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("uri", help="path or URI of the experiment")
    parser.add_argument("--output", type=Path, required=True, help="folder of the pieces")
    parser.add_argument("--cells_per_piece", type=int, default=500_000, help="join ids of a piece")
    parser.add_argument("--measurement", help="name in ms; default the only one")
    parser.add_argument("--layer", default="data", help="layer of X; raw in the Census")
    parser.add_argument("--obs_filter", help="TileDB value filter on obs")
    parser.add_argument("--tiledb_config", nargs="+", default=[], help="settings of TileDB as name=value")
    return parser.parse_args()


def main() -> None:
    """Count the cells of every range and write the pieces that have some."""
    args = parse_arguments()
    if args.cells_per_piece < 1:
        msg = f"--cells_per_piece must be at least 1, got {args.cells_per_piece}."
        raise SystemExit(msg)
    config = dict(setting.split("=", 1) for setting in args.tiledb_config)
    uri = args.uri if "://" in args.uri else str(Path(args.uri).resolve())
    whole = SomaSource(uri, args.measurement, args.layer, args.obs_filter, tiledb_config=config or None)
    pieces = count_cells(whole, args.cells_per_piece)
    args.output.mkdir(parents=True, exist_ok=True)
    for first in pieces:
        name = f"{Path(uri).name}-{first:010d}{SOURCE_ENDING}"
        ends = (first, first + args.cells_per_piece - 1)
        write_source(args.output / name, replace(whole, joinids=ends))
    print(f"Wrote {len(pieces)} pieces with {sum(pieces.values()):,} cells of {uri} to {args.output}.")


if __name__ == "__main__":
    main()
