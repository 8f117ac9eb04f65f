"""Cell types of held-out donors, plates, cells and studies: scDiVa fine-tuned and frozen beside baselines.

    python benchmarks/run_annotation.py --model scdiva --data FOLDER_OF_H5AD --output benchmarks/results

Every data set has the hold-out that its columns allow; what they are stands in `DATASETS` and in the result.
Baselines are fitted on the same training cells and tuned on the same validation cells. Fine-tuning wants a
GPU; without one choose with `--datasets`, `--methods`, `--max_cells`, `--n_folds`, `--max_genes`. All rows, a
confusion matrix and a calibration curve per data set go to one JSON and PNGs beside it.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata
import torch
from transformers import AutoModel, AutoTokenizer

from modeling_scdiva.evaluation.annotation import (
    COLUMNS,
    DEFAULT_METHODS,
    AnnotationProtocol,
    evaluate_annotation,
)
from modeling_scdiva.evaluation.annotation_methods import METHOD_NAMES, TrainingChoices
from modeling_scdiva.evaluation.figures import draw_calibration, draw_confusion
from modeling_scdiva.evaluation.report import print_result, write_result
from modeling_scdiva.metrics.calibration import reliability_curve
from modeling_scdiva.provenance import result_path
from modeling_scdiva.splits import stratified_subset

# Sorting gates of Zheng et al. 2017 -> the types that surface proteins tell apart.
GATES = {
    "CD19+ B": "B",
    "CD14+ Monocyte": "CD14+ Mono",
    "CD56+ NK": "NK",
    "CD8+ Cytotoxic T": "CD8 T",
    "CD8+/CD45RA+ Naive Cytotoxic": "CD8 T",
    "CD4+ T Helper2": "CD4 T",
    "CD4+/CD45RO+ Memory": "CD4 T",
    "CD4+/CD25 T Reg": "CD4 T",
    "CD4+/CD45RA+/CD25- Naive T": "CD4 T",
}
# What is drawn, and too long for the file.
PER_CELL = ("labels", "predicted", "confidence", "is_correct")


@dataclass(frozen=True)
class Task:
    """Which cells of a file, by which labels; held out are groups, stratified cells or another file."""

    file: str
    label_key: str = "cell_type"
    group_key: str | None = None
    test_file: str | None = None
    keep: tuple[str, str] | None = None  # column of obs and the value it must have
    label_map: Mapping[str, str | None] = field(default_factory=dict)
    note: str = ""


DATASETS = {
    "pbmc_facs": Task("pbmc_facs_zheng2017", note="each sorted type is one technical batch"),
    "kang_donors": Task(
        "kang2018_ifnb_pbmc",
        group_key="donor",
        keep=("cell_type_source", "curated"),
        note="labels transferred by a classifier are left out",
    ),
    "crohn": Task(
        "crohn_gut_scp1884",
        label_key="cell_type_coarse",
        label_map={"unspecified": None},
        note="its donor column is not reliable",
    ),
    "cellmix_plates": Task("cellmix_celseq2_tian2019", group_key="batch"),
    "facs_to_zheng68k": Task(
        "pbmc_facs_zheng2017",
        test_file="zheng68k_mini",
        note="another run of the same study; dendritic cells were never trained",
    ),
    "facs_to_eccite": Task(
        "pbmc_facs_zheng2017",
        test_file="pbmc_eccite_adt_gated",
        label_map=GATES | {"unassigned": None},
        note="types gated by surface proteins",
    ),
}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder with weights and tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="folder with the labelled h5ad files")
    parser.add_argument("--output", type=Path, required=True, help="JSON file, or folder")
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS), choices=list(DATASETS))
    parser.add_argument("--methods", nargs="+", default=list(DEFAULT_METHODS), choices=list(METHOD_NAMES))
    parser.add_argument("--max_cells", type=int, help="more labelled cells of a file are subsampled")
    parser.add_argument("--n_folds", type=int, help="default: five, or one per donor or plate")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one complete run each")
    parser.add_argument("--n_epochs", type=int, default=30, help="of fine-tuning, at most")
    parser.add_argument("--batch_size", type=int, default=32, help="cells per step of fine-tuning")
    parser.add_argument("--lora_rank", type=int, default=8, help="rank of the adapters")
    parser.add_argument("--pooling", default="lat", choices=["lat", "mean"], help="of the frozen embedding")
    parser.add_argument("--max_genes", type=int, help="genes kept of a cell; default the tokenizer's")
    parser.add_argument("--wanted_accuracy", type=float, default=0.95, help="of cells that keep their type")
    parser.add_argument("--bf16", action="store_true", help="run the network under bf16 autocast")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def read_cells_of(
    task: Task, arguments: argparse.Namespace
) -> tuple[anndata.AnnData, anndata.AnnData | None]:
    """Read training and test file of a task; the test file is never subsampled."""
    folder = arguments.data
    cells = anndata.read_h5ad(folder / f"{task.file}.h5ad")
    if task.keep is not None:
        cells = cells[(cells.obs[task.keep[0]] == task.keep[1]).to_numpy()].copy()
    if arguments.max_cells is not None:
        columns = [cells.obs[key].to_numpy() for key in (task.label_key, task.group_key) if key is not None]
        cells = cells[stratified_subset(*columns, n_cells=arguments.max_cells)].copy()
    if task.test_file is None:
        return cells, None
    return cells, anndata.read_h5ad(folder / f"{task.test_file}.h5ad")


def title_of(task: Task, n_folds: int | None) -> str:
    """Name the cells and what is held out."""
    if task.test_file is not None:
        return f"{task.file} to {task.test_file}"
    if task.group_key is None:
        return f"{task.file}, {n_folds or 5} folds of cells out"
    held_out = f"each {task.group_key}" if n_folds is None else f"{n_folds} folds by {task.group_key}"
    return f"{task.file}, {held_out} out"


def protocol_of(task: Task, arguments: argparse.Namespace) -> AnnotationProtocol:
    """Say what is compared."""
    training = {"n_epochs": arguments.n_epochs, "batch_size": arguments.batch_size}
    return AnnotationProtocol(
        label_key=task.label_key,
        group_key=task.group_key,
        n_folds=arguments.n_folds,
        label_map=task.label_map,
        methods=arguments.methods,
        seeds=arguments.seeds,
        wanted_accuracy=arguments.wanted_accuracy,
        choices=TrainingChoices(lora_rank=arguments.lora_rank, arguments=training, pooling=arguments.pooling),
        reading={} if arguments.max_genes is None else {"max_genes": arguments.max_genes},
    )


def draw(name: str, details: Mapping[str, Any]) -> dict[str, Any]:
    """Draw what the first seed predicted."""
    curves = {}
    for method, confidence in details["confidence"].items():
        if method in ("frozen", "lora", "full", "pca"):
            curve = reliability_curve(confidence, details["is_correct"][method], n_bins=10)
            curves[METHOD_NAMES[method]] = (curve["confidence"], curve["accuracy"])
    shown = "lora" if "lora" in details["predicted"] else next(iter(details["predicted"]))
    figures = {f"{name}_confusion_{shown}": draw_confusion(details["labels"], details["predicted"][shown])}
    return figures | ({f"{name}_calibration": draw_calibration(curves)} if curves else {})


def main() -> None:
    """Evaluate, draw, write, print."""
    arguments = parse_arguments()
    output = result_path(arguments.output, "annotation")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModel.from_pretrained(arguments.model).to(arguments.device)
    whole: dict[str, Any] = {"title": "Cell types of new cells", "numbers": [], "baselines": []}
    details, figures, notes = {}, {}, []
    for name in arguments.datasets:
        task = DATASETS[name]
        train, test = read_cells_of(task, arguments)
        title = title_of(task, arguments.n_folds)
        with torch.autocast(arguments.device, dtype=torch.bfloat16, enabled=arguments.bf16):
            result = evaluate_annotation(
                train,
                model=model,
                tokenizer=tokenizer,
                protocol=protocol_of(task, arguments),
                test=test,
                data_name=title,
            )
        print_result(result)
        for part in ("numbers", "baselines"):
            whole[part] += result[part]
        figures |= draw(name, result["details"])
        short = {key: value for key, value in result["details"].items() if key not in PER_CELL}
        details[name] = short | {"note": result["note"], "remark": task.note}
        notes.append(f"{title}: {task.note}." if task.note else "")
    general = "Mean and standard deviation over seeds; equal cells, splits and tuning cells for all methods. "
    whole |= {"columns": COLUMNS, "note": general + " ".join(filter(None, notes)), "details": details}
    config = model.config.to_diff_dict()
    whole["config"] = {key: value for key, value in config.items() if key != "auto_map"}
    whole["settings"] = {
        key: value for key, value in vars(arguments).items() if key not in ("model", "data", "output")
    }
    print(f"\nwrote {write_result(whole, output, 'annotation', figures)}")


if __name__ == "__main__":
    main()
