"""Integration of donors, conditions, plates and technologies, beside PCA, Harmony, scVI and controls.

    python benchmarks/run_integration.py --model scdiva --data FOLDER_OF_H5AD --output benchmarks/results \
        --n_epochs 20 --batch_size 64 --learning_rate 1e-3 --max_genes 128

Four tasks: six donors of one study; control and IFN-beta cells; three plates of cell lines; blood cells of
four files and three chemistries on their shared genes, one of them unlabelled (integrated, not scored). Three
seeds, nine fine-tunings a task: on two cores hours, so take `--max_cells` and few epochs; on a GPU minutes.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from modeling_scdiva.evaluation import print_result, write_result
from modeling_scdiva.evaluation.figures import draw_umap
from modeling_scdiva.evaluation.integration import IntegrationProtocol, evaluate_integration
from modeling_scdiva.provenance import result_path
from modeling_scdiva.tasks.integration import IntegrationArguments

DEFAULTS = IntegrationArguments()
DRAWN = {"": "scDiVa, label-free", "_frozen": "scDiVa, frozen"}
# File and its column of cell types.
BLOOD_LABELS = {
    "pbmc_facs_zheng2017": "cell_type_coarse",
    "kang2018_ifnb_pbmc": "cell_type",
    "pbmc_eccite_adt_gated": "cell_type",
    "pbmc_protein_5k_10k_mini": None,
}
# Blood cell types that all files tell apart.
BLOOD_TYPES = {
    "T cell": "T cell", "CD4 T cells": "T cell", "CD8 T cells": "T cell",
    "CD4 T": "T cell", "CD8 T": "T cell",
    "B cell": "B cell", "B cells": "B cell", "B": "B cell",
    "NK cell": "NK cell", "NK cells": "NK cell", "NK": "NK cell",
    "CD14+": "monocyte", "CD14+ Monocytes": "monocyte", "FCGR3A+ Monocytes": "monocyte",
    "CD14+ Mono": "monocyte",
    "CD34+": "CD34+", "Dendritic cells": "dendritic cell", "Megakaryocytes": "megakaryocyte",
}  # fmt: skip


def one_file(name: str) -> Callable[[Path], anndata.AnnData]:
    """Read a file as it is."""
    return lambda folder: anndata.read_h5ad(folder / f"{name}.h5ad")


def blood_of_four_files(folder: Path) -> anndata.AnnData:
    """Put blood cells together on their shared genes; batch is the file, labels are coarse."""
    parts = []
    for name, label_key in BLOOD_LABELS.items():
        cells = anndata.read_h5ad(folder / f"{name}.h5ad")
        if name == "kang2018_ifnb_pbmc":  # labels of the stimulated cells were transferred
            cells = cells[(cells.obs["condition"] == "ctrl").to_numpy()]
        gene_ids = cells.var["ensembl_id"].astype(str)
        cells = cells[:, ((gene_ids != "") & ~gene_ids.duplicated()).to_numpy()].copy()
        labels = [""] * cells.n_obs if label_key is None else cells.obs[label_key].map(BLOOD_TYPES)
        cells.var_names = cells.var["ensembl_id"].astype(str)
        cells.var = cells.var[["gene_symbol"]].copy()
        cells.obs = cells.obs[[]].assign(batch=name, cell_type=np.asarray(labels, dtype=object))
        parts.append(cells)
    together = anndata.concat(parts, join="inner", merge="first", index_unique="-")
    together.obs["cell_type"] = together.obs["cell_type"].astype(object).fillna("")
    return together


# Kind of batch, how to read, and the files that are read.
TASKS: dict[str, tuple[str, Callable[[Path], anndata.AnnData], tuple[str, ...]]] = {
    name: (kind, one_file(name), (name,))
    for name, kind in (
        ("kang2018_ctrl_6donors", "donors"),
        ("kang2018_ifnb_pbmc", "conditions"),
        ("cellmix_celseq2_tian2019", "plates"),
    )
}
TASKS["blood_four_files"] = ("studies and chemistries", blood_of_four_files, tuple(BLOOD_LABELS))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="checkpoint with tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="folder with the h5ad files")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder or .json")
    parser.add_argument("--datasets", nargs="+", choices=TASKS, default=list(TASKS), help="tasks to run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run of all each")
    parser.add_argument("--trainable", default="lora", help="what is fine-tuned")
    parser.add_argument("--pooling", default=DEFAULTS.pooling, help="lat or mean")
    parser.add_argument("--negatives", default=DEFAULTS.negatives, help="all or same_batch")
    parser.add_argument("--max_genes", type=int, help="genes kept of a cell; default the tokenizer's")
    parser.add_argument("--max_cells", type=int, default=3000, help="more are subsampled")
    parser.add_argument("--n_epochs", type=int, default=DEFAULTS.n_epochs, help="passes over the cells")
    parser.add_argument("--batch_size", type=int, default=DEFAULTS.batch_size, help="cells per update")
    parser.add_argument("--learning_rate", type=float, default=DEFAULTS.learning_rate, help="peak rate")
    parser.add_argument("--n_scvi_epochs", type=int, default=400, help="epochs of scVI; 0 leaves it out")
    parser.add_argument("--no_kbet", action="store_true", help="leave kBET out")
    parser.add_argument("--bf16", action="store_true", help="run the network under bf16 autocast")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    """Run every task, print, write one file."""
    args = parse_arguments()
    output = result_path(args.output, "integration")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForMaskedLM.from_pretrained(args.model).to(args.device)
    pretrained_on = set(tokenizer.vocabulary.source.get("datasets", []))
    arguments = IntegrationArguments(
        n_epochs=args.n_epochs, batch_size=args.batch_size, learning_rate=args.learning_rate,
        pooling=args.pooling, negatives=args.negatives, max_genes=args.max_genes,
    )  # fmt: skip
    whole: dict[str, Any] = {"numbers": [], "baselines": [], "details": {}}
    figures: dict[str, Any] = {}
    for name in args.datasets:
        batch_kind, read, files = TASKS[name]
        protocol = IntegrationProtocol(
            data_name=f"{name}, {batch_kind}", max_cells=args.max_cells, trainable=args.trainable,
            n_scvi_epochs=args.n_scvi_epochs, with_kbet=not args.no_kbet,
        )  # fmt: skip
        with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.bf16):
            result = evaluate_integration(
                read(args.data), model=model, tokenizer=tokenizer, batch_key="batch", label_key="cell_type",
                seeds=args.seeds, arguments=arguments, protocol=protocol,
            )  # fmt: skip
        print_result(result)
        details = result.pop("details")
        whole["numbers"] += result.pop("numbers")
        whole["baselines"] += result.pop("baselines")
        whole["details"][name] = details | {"in_pretraining_corpus": sorted(pretrained_on & set(files))}
        whole = whole | result
        colours = {"cell type": details["labels"].tolist(), "batch": details["batches"].tolist()}
        for ending, method in DRAWN.items():
            figures[f"{name}{ending}"] = draw_umap(details["embeddings"][method], colours)
    whole["note"] += " Cells of files in the pretraining corpus were seen there without labels; see details."
    if "kang2018_ifnb_pbmc" in args.datasets:  # no stimulated cell has a curated label
        whole["note"] += " kang2018_ifnb_pbmc: types of stimulated cells were transferred by a classifier."
    whole |= {"benchmark": "integration", "config": model.config.to_diff_dict() | {"auto_map": None}}
    path = write_result(whole, output, "integration", figures)
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
