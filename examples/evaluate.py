"""Every task, beside its baselines: all tables, one JSON and its pictures per task.

    python examples/evaluate.py --checkpoint scdiva --task all
    accelerate launch examples/evaluate.py --checkpoint scdiva --task annotation integration \
        --data cells.h5ad --label_key cell_type --batch_key plate --group_key donor_id
    python examples/evaluate.py --checkpoint scdiva --task perturbation --data screen.h5ad \
        --perturbation_key perturbation

Without `--data`, made-up cells with planted types, batches, perturbations and edges are evaluated: how it
runs, not how good the model is. Without `--checkpoint`, random weights. A task whose column is not named is
reported and left out, or refused where it was asked for by name. The JSON files fill model cards.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from accelerate import Accelerator
from scipy.sparse import csr_matrix
from transformers import AutoTokenizer

from modeling_scdiva import ScDivaForMaskedDiffusion
from modeling_scdiva.evaluation import print_result, write_result
from modeling_scdiva.evaluation.gene_network import read_reference_network
from modeling_scdiva.evaluation.suite import TASKS, SuiteSettings, evaluate_task, missing_for
from modeling_scdiva.fresh_model import fresh_model
from modeling_scdiva.provenance import result_path
from tokenization_scdiva import synthetic_cells, synthetic_tokenizer

CONFIG = Path(__file__).parent / "configs" / "tiny.json"
KEYS = ("label_key", "batch_key", "group_key", "perturbation_key", "holdout_key")
N_GENES, N_PERTURBATIONS = 200, 6


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", help="folder or hub name; default: random weights")
    parser.add_argument("--task", nargs="+", default=["all"], choices=["all", *TASKS])
    parser.add_argument("--data", type=Path, help="h5ad with raw counts; default: made-up cells")
    parser.add_argument("--label_key", help="obs column with cell types")
    parser.add_argument("--batch_key", help="obs column with technical batches")
    parser.add_argument("--group_key", help="obs column with donors, left out as a whole")
    parser.add_argument("--perturbation_key", help="obs column with perturbations")
    parser.add_argument("--control_label", default="control", help="its entry for controls")
    parser.add_argument("--holdout_key", help="obs column whose levels the perturbation task leaves out")
    parser.add_argument("--match_keys", nargs="*", default=[], help="obs columns shared with controls")
    parser.add_argument("--target", action="append", default=[], help="NAME=GENE,GENE of what is no gene")
    parser.add_argument("--reference", type=Path, help="table of known edges: tf, target")
    parser.add_argument("--confidences", nargs="+", help="classes of the reference to keep; default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each")
    parser.add_argument("--n_epochs", type=int, default=10, help="epochs of every fine-tuning")
    parser.add_argument("--max_test_cells", type=int, default=50, help="in reconstruction and imputation")
    parser.add_argument("--n_network_cells", type=int, default=100, help="cells per seed in gene networks")
    parser.add_argument("--scvi", action="store_true", help="also train scVI, needs scdiva[eval-full]")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for JSON and PNG")
    return parser.parse_args()


def made_up_cells(gene_ids: list[str] | None) -> tuple[anndata.AnnData, pd.DataFrame]:
    """Make cells with everything that the tasks ask for, and the edges that were planted."""
    gene_ids = None if gene_ids is None else gene_ids[:N_GENES]
    cells = synthetic_cells(n_cells=480, n_genes=N_GENES, gene_ids=gene_ids)
    rng = np.random.default_rng(0)
    counts = cells.X.toarray().astype(np.int64)
    is_second = np.arange(cells.n_obs) // 4 % 2 == 1  # types come in turn: both plates hold all of them
    counts[is_second] = rng.binomial(counts[is_second], rng.uniform(0.3, 1.0, N_GENES))
    cells.obs["plate"] = np.where(is_second, "plate_2", "plate_1")
    cells.obs["donor"] = [f"donor_{cell // 160}" for cell in range(cells.n_obs)]
    often = np.argsort(-(counts > 0).mean(axis=0), kind="stable")[:60]
    names = np.full(cells.n_obs, "control", dtype=object)
    for number in range(N_PERTURBATIONS):  # each takes its target away and lowers ten more genes
        is_hit = np.arange(cells.n_obs) // 8 % (2 * N_PERTURBATIONS) == number
        genes = [often[number], *rng.choice(often[10:], 10, replace=False)]
        names[is_hit] = str(cells.var_names[genes[0]])
        shares = np.array([0.05] + [0.4] * 10)
        counts[np.ix_(is_hit, genes)] = rng.binomial(counts[np.ix_(is_hit, genes)], shares)
    cells.obs["perturbation"] = names
    cells.X = csr_matrix(counts.astype(np.float32))
    markers = [cells.var_names[15 * kind : 15 * kind + 15] for kind in range(4)]
    edges = [(kind[0], target) for kind in markers for target in kind[1:]]
    return cells, pd.DataFrame(edges, columns=["tf", "target"])


def load(arguments: argparse.Namespace) -> tuple[anndata.AnnData, Any, Any, pd.DataFrame | None]:
    """Return cells, model, tokenizer and known edges; made up where nothing was named."""
    tokenizer = model = gene_ids = None
    if arguments.checkpoint:
        tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
        model = ScDivaForMaskedDiffusion.from_pretrained(arguments.checkpoint)
        gene_ids = tokenizer.vocabulary.gene_ids[tokenizer.vocabulary.n_special_tokens :]
    if arguments.data:
        cells, edges = anndata.read_h5ad(arguments.data), None
        if arguments.reference:
            edges = read_reference_network(arguments.reference, confidences=arguments.confidences)
    else:
        cells, edges = made_up_cells(gene_ids)
        made_up = {
            "label_key": "cell_type",
            "batch_key": "plate",
            "group_key": "donor",
            "perturbation_key": "perturbation",
        }
        for key, column in made_up.items():
            setattr(arguments, key, getattr(arguments, key) or column)
    if model is None:
        print("No --checkpoint: random weights. Their numbers are those of a model that learned nothing.")
        tokenizer = synthetic_tokenizer(cells)
        network = json.loads(CONFIG.read_text("utf-8")) | {"latent_loss_weight": 1.0}  # has all decoders
        model = fresh_model(network, tokenizer, seed=100)  # others than those of the random-weights rows
    if not arguments.data and edges is not None:  # networks name genes as the vocabulary shows them
        symbol_of = dict(zip(tokenizer.vocabulary.gene_ids, tokenizer.vocabulary.gene_symbols, strict=True))
        edges = edges.map(symbol_of.get)
    return cells, model, tokenizer, edges


def main() -> None:
    """Run the tasks, print every table, write every result."""
    arguments = parse_arguments()
    accelerator = Accelerator()
    cells, model, tokenizer, edges = load(arguments)
    settings = SuiteSettings(
        data_name=arguments.data.stem if arguments.data else "made-up cells",
        reference=edges,
        **{key: getattr(arguments, key) for key in KEYS},
        control_label=arguments.control_label,
        match_keys=arguments.match_keys,
        perturbation_genes={
            name: [gene for gene in genes.split(",") if gene]
            for name, _, genes in (entry.partition("=") for entry in arguments.target)
        },
        seeds=arguments.seeds,
        n_epochs=arguments.n_epochs,
        max_test_cells=arguments.max_test_cells,
        n_network_cells=arguments.n_network_cells,
        with_scvi=arguments.scvi,
    )
    wanted = TASKS if "all" in arguments.task else tuple(dict.fromkeys(arguments.task))
    left_out = {task: missing_for(task, settings) for task in wanted}
    if "all" not in arguments.task and any(left_out.values()):
        task, missing = next((task, names) for task, names in left_out.items() if names)
        sys.exit(f"The task {task} needs --{' and --'.join(missing)}.")
    for task in wanted:
        if not left_out[task]:
            result_path(arguments.output, task)  # refuses a name that is taken before the run
    model, paths = model.to(accelerator.device).eval(), []
    for task in wanted:
        if left_out[task]:
            print(f"\n{task}: left out, needs --{' and --'.join(left_out[task])}.")
            continue
        result, figures = evaluate_task(task, cells, model=model, tokenizer=tokenizer, settings=settings)
        if accelerator.is_main_process:
            print_result(result)
            paths.append(write_result(result, arguments.output, task, figures))
            print(f"wrote {paths[-1]} and {len(figures)} pictures", flush=True)
    if accelerator.is_main_process:
        print(f"\n{len(paths)} of {len(wanted)} tasks evaluated; results in {arguments.output}.")
    accelerator.end_training()


if __name__ == "__main__":
    main()
