"""All evaluations under one roof: which tasks a file allows, each run by its own protocol, its figures.

Notable choices:
- A task needs columns; one that a file does not have is reported with its reason, never skipped in silence.
- The settings here are few. Whoever wants another protocol calls `evaluate_<task>` itself.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from modeling_scdiva.evaluation.annotation import AnnotationProtocol, evaluate_annotation
from modeling_scdiva.evaluation.annotation_methods import TrainingChoices
from modeling_scdiva.evaluation.figures import (
    draw_calibration,
    draw_confusion,
    draw_delta_scatter,
    draw_umap,
)
from modeling_scdiva.evaluation.gene_network import (
    NetworkProtocol,
    evaluate_gene_network,
    network_figures,
)
from modeling_scdiva.evaluation.imputation import evaluate_imputation, imputation_figures
from modeling_scdiva.evaluation.integration import IntegrationProtocol, evaluate_integration
from modeling_scdiva.evaluation.perturbation import PerturbationProtocol, evaluate_perturbation
from modeling_scdiva.evaluation.reconstruction import evaluate_reconstruction, reconstruction_figures
from modeling_scdiva.finetuning import FinetuningArguments
from modeling_scdiva.metrics.calibration import reliability_curve
from modeling_scdiva.metrics.scvi_baselines import require_scvi
from modeling_scdiva.tasks.cells import obs_column
from modeling_scdiva.tasks.gene_network import NetworkSettings
from modeling_scdiva.tasks.integration_network import IntegrationArguments
from modeling_scdiva.tasks.perturbation_data import unknown_targets
from modeling_scdiva.tasks.perturbation_training import PerturbationSettings

ANNOTATION_METHODS = (
    "frozen", "lora", "random_frozen", "pca", "variable_genes", "celltypist", "depth", "majority",
)  # fmt: skip


@dataclass(frozen=True)
class SuiteSettings:
    """What the file is called, which columns it has, and how much is run.

    Attributes:
        data_name: Name of the cells in the tables.
        label_key: Column of ``obs`` with cell types; annotation and integration need it.
        batch_key: Column with technical batches; integration needs it.
        group_key: Column with donors that are left out or stay together; None for single cells.
        perturbation_key: Column with perturbations; perturbation needs it.
        control_label: Its entry for controls.
        holdout_key: Column whose levels are left out of the perturbation task; None leaves targets out.
        match_keys: Columns that a perturbed cell and its controls share.
        perturbation_genes: Part of a perturbation's name -> its targeted genes, where it is no gene itself.
        reference: Known edges with ``tf`` and ``target``; gene networks need it.
        seeds: One run each.
        n_epochs: Epochs of every fine-tuning.
        max_test_cells: Held-out cells scored per seed in reconstruction and imputation.
        n_network_cells: Cells per seed in gene networks.
        with_scvi: Train scVI and scANVI in integration and scVI in imputation, minutes on a CPU.

    Raises:
        ImportError: If scVI is wanted and scvi-tools is not installed.
    """

    data_name: str = "cells"
    label_key: str | None = None
    batch_key: str | None = None
    group_key: str | None = None
    perturbation_key: str | None = None
    control_label: str = "control"
    holdout_key: str | None = None
    match_keys: Sequence[str] = ()
    perturbation_genes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    reference: pd.DataFrame | None = None
    seeds: Sequence[int] = (0, 1, 2)
    n_epochs: int = 10
    max_test_cells: int = 50
    n_network_cells: int = 100
    with_scvi: bool = False

    def __post_init__(self) -> None:
        if self.with_scvi:
            require_scvi()


NEEDS = {
    "annotation": ("label_key",),
    "integration": ("batch_key", "label_key"),
    "reconstruction": (),
    "imputation": (),
    "perturbation": ("perturbation_key",),
    "gene_network": ("reference",),
}
TASKS = tuple(NEEDS)


def missing_for(task: str, settings: SuiteSettings) -> list[str]:
    """Name the settings that a task needs and has not.

    Args:
        task: One of ``TASKS``.
        settings: What is known of the file.

    Returns:
        Names of fields; empty if the task can run.

    Raises:
        ValueError: If there is no such task.
    """
    if task not in NEEDS:
        msg = f"task must be one of {', '.join(TASKS)}, got {task!r}."
        raise ValueError(msg)
    return [name for name in NEEDS[task] if getattr(settings, name) is None]


def evaluate_task(
    task: str, adata: Any, *, model: Any, tokenizer: Any, settings: SuiteSettings
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run one evaluation.

    Args:
        task: One of ``TASKS``.
        adata: AnnData with raw counts and the columns that the task needs.
        model: A `ScDivaForMaskedDiffusion`, on the device to use; stays as it is.
        tokenizer: Its tokenizer.
        settings: Columns and sizes.

    Returns:
        The result, as `modeling_scdiva.evaluation.report` describes it, and name -> Matplotlib figure.

    Raises:
        ValueError: If the task needs a setting that is None.
    """
    missing = missing_for(task, settings)
    if missing:
        msg = f"The task {task} needs {' and '.join(missing)}."
        raise ValueError(msg)
    evaluate = {
        "annotation": _annotation,
        "integration": _integration,
        "reconstruction": _reconstruction,
        "imputation": _imputation,
        "perturbation": _perturbation,
        "gene_network": _gene_network,
    }[task]
    result = evaluate(adata, {"model": model, "tokenizer": tokenizer}, settings)
    return result, FIGURES[task](result)


def annotation_figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """Draw confusions of the first scDiVa method, and the calibration of all methods with probabilities.

    Args:
        result: From `evaluate_annotation`.

    Returns:
        Name -> Matplotlib figure.
    """
    details = result["details"]
    method = next(iter(details["predicted"]))
    curves = {}
    for name, confidence in details["confidence"].items():
        curve = reliability_curve(np.asarray(confidence), np.asarray(details["is_correct"][name]))
        curves[name] = (curve["confidence"], curve["accuracy"])
    return {
        "confusion": draw_confusion(details["labels"], details["predicted"][method]),
        "calibration": draw_calibration(curves),
    }


def integration_figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """Draw UMAPs of every embedding of scDiVa and of what was not integrated, by type and batch.

    Args:
        result: From `evaluate_integration`.

    Returns:
        Name -> Matplotlib figure.
    """
    details = result["details"]
    colours = {"cell type": details["labels"], "technical batch": details["batches"]}
    chosen = [name for name in details["embeddings"] if name.startswith(("scDiVa", "PCA"))]
    figures = {}
    for name in chosen:
        slug = "".join(letter if letter.isalnum() else "_" for letter in name.lower())
        figures[f"umap_{slug}"] = draw_umap(np.asarray(details["embeddings"][name]), colours, 0)
    return figures


def perturbation_figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """Draw the predicted over the measured changes of scDiVa, first seed.

    Args:
        result: From `evaluate_perturbation`.

    Returns:
        Name -> Matplotlib figure.
    """
    details = result["details"]
    predicted = np.asarray(details["predicted_delta"])
    return {"delta": draw_delta_scatter(np.asarray(details["true_delta"]), predicted, details["units"])}


def _annotation(adata: Any, models: dict[str, Any], settings: SuiteSettings) -> dict[str, Any]:
    protocol = AnnotationProtocol(
        label_key=str(settings.label_key),
        group_key=settings.group_key,
        methods=ANNOTATION_METHODS,
        seeds=tuple(settings.seeds),
        choices=TrainingChoices(arguments={"n_epochs": settings.n_epochs}),
    )
    return evaluate_annotation(
        adata, protocol=protocol, data_name=settings.data_name, show_progress=False, **models
    )


def _integration(adata: Any, models: dict[str, Any], settings: SuiteSettings) -> dict[str, Any]:
    epochs: dict[str, Any] = {} if settings.with_scvi else {"n_scvi_epochs": 0}
    return evaluate_integration(
        adata,
        batch_key=str(settings.batch_key),
        label_key=str(settings.label_key),
        seeds=settings.seeds,
        arguments=IntegrationArguments(n_epochs=settings.n_epochs),
        protocol=IntegrationProtocol(data_name=settings.data_name, with_kbet=False, **epochs),
        **models,
    )


def _reconstruction(adata: Any, models: dict[str, Any], settings: SuiteSettings) -> dict[str, Any]:
    return evaluate_reconstruction(
        adata,
        name=settings.data_name,
        split_key=settings.group_key,
        seeds=settings.seeds,
        max_test_cells=settings.max_test_cells,
        **models,
    )


def _imputation(adata: Any, models: dict[str, Any], settings: SuiteSettings) -> dict[str, Any]:
    return evaluate_imputation(
        adata,
        name=settings.data_name,
        split_key=settings.group_key,
        seeds=settings.seeds,
        max_test_cells=settings.max_test_cells,
        include_scvi=settings.with_scvi,
        **models,
    )


def _perturbation(adata: Any, models: dict[str, Any], settings: SuiteSettings) -> dict[str, Any]:
    # A target that the vocabulary lacks is a bare <pert>; the note of the result counts them.
    unknown = unknown_targets(
        obs_column(adata, str(settings.perturbation_key), what="perturbations").tolist(),
        vocabulary=models["tokenizer"].vocabulary,
        perturbation_genes=settings.perturbation_genes,
        control_label=settings.control_label,
    )
    genes = {**settings.perturbation_genes, **{name: [] for name in unknown}}
    return evaluate_perturbation(
        adata,
        perturbation_key=str(settings.perturbation_key),
        protocol=PerturbationProtocol(
            data_name=settings.data_name,
            control_label=settings.control_label,
            holdout_key=settings.holdout_key,
            seeds=tuple(settings.seeds),
        ),
        settings=PerturbationSettings(match_keys=settings.match_keys, perturbation_genes=genes),
        arguments=FinetuningArguments(learning_rate=1e-4, n_epochs=settings.n_epochs),
        **models,
    )


def _gene_network(adata: Any, models: dict[str, Any], settings: SuiteSettings) -> dict[str, Any]:
    reference: Any = settings.reference
    return evaluate_gene_network(
        adata,
        reference=reference,
        data_name=settings.data_name,
        seeds=settings.seeds,
        protocol=NetworkProtocol(
            n_cells=settings.n_network_cells, settings=NetworkSettings(n_groups=2, show_progress=False)
        ),
        **models,
    )


FIGURES: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "annotation": annotation_figures,
    "integration": integration_figures,
    "reconstruction": reconstruction_figures,
    "imputation": imputation_figures,
    "perturbation": perturbation_figures,
    "gene_network": network_figures,
}
