"""Which genes does a transcription factor seem to inform on? Hypotheses from a trained model.

    python examples/infer_gene_network.py                     # made-up cells, random weights
    python examples/infer_gene_network.py --checkpoint scdiva --data cells.h5ad --tfs STAT1 IRF7 SPI1 \
        --reference dorothea.parquet --confidences A B C

`--method attention` takes one forward pass per cell; `conditional` hides every TF in turn and takes
n_groups x (1 + TFs of the cell), so draw fewer cells for it (`--n_cells`). Writes one table per network, the
regulons of the five TFs with the strongest scores, and with `--reference` (columns tf, target, perhaps sign
and confidence) how well known edges are found, beside co-expression, popularity and random weights. Runs
under `accelerate launch`, too.
"""

import argparse
from pathlib import Path
from typing import Any

import anndata
import numpy as np
from accelerate import Accelerator
from transformers import AutoModelForMaskedLM, AutoTokenizer

import modeling_scdiva  # noqa: F401 - registers the classes
from modeling_scdiva.evaluation import print_result, write_result
from modeling_scdiva.evaluation.gene_network import (
    NetworkProtocol,
    evaluate_gene_network,
    network_figures,
    read_reference_network,
)
from modeling_scdiva.fresh_model import fresh_model
from modeling_scdiva.provenance import result_path
from modeling_scdiva.tasks.gene_network import NetworkSettings, infer_gene_network, network_matrix, regulon
from tokenization_scdiva import synthetic_cells, synthetic_tokenizer

CONFIG = Path(__file__).parent / "configs" / "tiny.json"
N_SHOWN_TFS, N_SHOWN_TARGETS = 5, 8


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", help="folder or hub name; default: random weights, to see how it runs"
    )
    parser.add_argument("--data", type=Path, help="h5ad with raw counts; default: made-up cells")
    parser.add_argument("--tfs", nargs="+", help="TFs by symbol or id; default: those of the reference")
    parser.add_argument("--targets", nargs="+", help="targets; default: all genes that enough cells show")
    parser.add_argument("--method", choices=["attention", "conditional"], default="attention")
    parser.add_argument("--reference", type=Path, help="table of known edges, to score against")
    parser.add_argument("--confidences", nargs="+", help="classes of the reference to keep; default all")
    parser.add_argument("--n_cells", type=int, default=300, help="cells drawn; choose one kind of cells")
    parser.add_argument("--min_cells", type=int, default=10, help="cells that must show both genes")
    parser.add_argument("--n_groups", type=int, default=4, help="parts in which targets are hidden")
    parser.add_argument("--seed", type=int, default=0, help="of the cells drawn and the groups")
    parser.add_argument("--output", type=Path, default=Path("gene_network"), help="folder to write to")
    return parser.parse_args()


def load(arguments: argparse.Namespace) -> tuple[anndata.AnnData, Any, Any]:
    """Return cells, model and tokenizer; made up where nothing was named."""
    cells = anndata.read_h5ad(arguments.data) if arguments.data else synthetic_cells(n_cells=200)
    if arguments.checkpoint:
        tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
        return cells, AutoModelForMaskedLM.from_pretrained(arguments.checkpoint), tokenizer
    print("No --checkpoint: random weights. Their network means nothing.")
    tokenizer = synthetic_tokenizer(cells, max_genes=256)
    return cells, fresh_model(CONFIG, tokenizer, seed=arguments.seed), tokenizer


def main() -> None:
    """Infer, write, show, score."""
    arguments = parse_arguments()
    accelerator = Accelerator()
    accelerator.end_training()  # one process does it
    if not accelerator.is_main_process:
        return
    cells, model, tokenizer = load(arguments)
    model = model.to(accelerator.device).eval()
    reference = None
    if arguments.reference:
        result_path(arguments.output, "gene_network")  # refuses a name that is taken before the work
        reference = read_reference_network(arguments.reference, confidences=arguments.confidences)
    tfs = arguments.tfs
    if tfs is None and reference is not None:
        tfs = sorted(set(reference["tf"].astype(str)))
    if tfs is None:
        symbols = list(cells.var.get("gene_symbols", cells.var_names))
        shares = np.asarray((cells.X > 0).mean(axis=0)).ravel()
        tfs = [str(symbols[gene]) for gene in np.argsort(-shares, kind="stable")[:N_SHOWN_TFS]]
        print(f"No --tfs and no --reference: the genes most cells express, {', '.join(tfs)}.")
    settings = NetworkSettings(arguments.min_cells, n_groups=arguments.n_groups, seed=arguments.seed)
    drawn = np.random.default_rng(arguments.seed).permutation(cells.n_obs)[: arguments.n_cells]
    chosen = cells[np.sort(drawn)].copy()
    network = infer_gene_network(
        chosen, model=model, tokenizer=tokenizer, tfs=tfs, targets=arguments.targets,
        method=arguments.method, settings=settings,
    )  # fmt: skip

    arguments.output.mkdir(parents=True, exist_ok=True)
    network.to_csv(arguments.output / f"{arguments.method}.csv")
    chosen.varp["scdiva_network"] = network_matrix(network, chosen, tokenizer=tokenizer)
    chosen.uns["scdiva_network"] = {key: network.attrs[key] for key in ("method", "n_cells", "note")}
    chosen.write_h5ad(arguments.output / "cells.h5ad")
    best = network.abs().max(axis=1).sort_values(ascending=False).index[:N_SHOWN_TFS]
    for tf in [name for name in best if network.loc[name].notna().any()]:
        table = regulon(network, tf)
        table.to_csv(arguments.output / f"{arguments.method}_{tf}.csv", index=False)
        shown = ", ".join(
            f"{row.target} {row.score:+.3f}" for row in table.head(N_SHOWN_TARGETS).itertuples()
        )
        print(f"{tf}: {shown}")
    scored = int(network.notna().to_numpy().sum())
    note = network.attrs["note"]
    print(f"{len(network)} TFs, {scored:,} pairs scored in {chosen.n_obs} cells. {note}")
    if reference is not None:
        score(arguments, cells, model, tokenizer, reference)
    print(f"Wrote {arguments.output}")


def score(
    arguments: argparse.Namespace, cells: anndata.AnnData, model: Any, tokenizer: Any, reference: Any
) -> None:
    """Compare with known edges, beside the baselines."""
    protocol = NetworkProtocol(
        n_cells=arguments.n_cells,
        methods=(arguments.method,),
        settings=NetworkSettings(arguments.min_cells, n_groups=arguments.n_groups),
    )
    result = evaluate_gene_network(
        cells, model=model, tokenizer=tokenizer, reference=reference, protocol=protocol,
        data_name=f"{arguments.data.stem if arguments.data else 'made up'}, {arguments.reference.stem}",
    )  # fmt: skip
    print_result(result)
    path = write_result(result, arguments.output, "gene_network", network_figures(result))
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
