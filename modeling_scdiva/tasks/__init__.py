"""What one does with a trained model: one task a file, AnnData and model in, arrays or AnnData out.

Each task is imported on first use: most need libraries that an embedding does not.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modeling_scdiva.tasks.annotation import AnnotatorSettings, annotate_cells, finetune_annotator
    from modeling_scdiva.tasks.annotator_files import load_annotator, save_annotator
    from modeling_scdiva.tasks.cells import CellTokenizer
    from modeling_scdiva.tasks.clamping import ClampSettings, clamp_genes
    from modeling_scdiva.tasks.embedding import embed_cells
    from modeling_scdiva.tasks.gene_network import (
        NetworkSettings,
        infer_gene_network,
        network_matrix,
        regulon,
    )
    from modeling_scdiva.tasks.generation import (
        complete_cells,
        conditions_from_obs,
        denoise_cells,
        generate_cells,
        marker_reward,
    )
    from modeling_scdiva.tasks.imputation import impute_expression
    from modeling_scdiva.tasks.integration import IntegratedCells, integrate_batches
    from modeling_scdiva.tasks.integration_network import IntegrationArguments
    from modeling_scdiva.tasks.perturbation import finetune_perturbation, predict_perturbation
    from modeling_scdiva.tasks.perturbation_data import control_cells, unknown_targets
    from modeling_scdiva.tasks.perturbation_network import ScDivaForPerturbation
    from modeling_scdiva.tasks.perturbation_training import PerturbationSettings, with_delta_decoder
    from modeling_scdiva.tasks.reconstruction import ReconstructedCells, reconstruct_cells
    from modeling_scdiva.tasks.reference_mapping import MappingSettings, map_to_reference
    from modeling_scdiva.tasks.scoring import gene_surprisal, score_cells, score_labels

__all__ = [
    "AnnotatorSettings",
    "CellTokenizer",
    "ClampSettings",
    "IntegratedCells",
    "IntegrationArguments",
    "MappingSettings",
    "NetworkSettings",
    "PerturbationSettings",
    "ReconstructedCells",
    "ScDivaForPerturbation",
    "annotate_cells",
    "clamp_genes",
    "complete_cells",
    "conditions_from_obs",
    "control_cells",
    "denoise_cells",
    "embed_cells",
    "finetune_annotator",
    "finetune_perturbation",
    "gene_surprisal",
    "generate_cells",
    "impute_expression",
    "infer_gene_network",
    "integrate_batches",
    "load_annotator",
    "map_to_reference",
    "marker_reward",
    "network_matrix",
    "predict_perturbation",
    "reconstruct_cells",
    "regulon",
    "save_annotator",
    "score_cells",
    "score_labels",
    "unknown_targets",
    "with_delta_decoder",
]

# Module of each name.
LAZY_NAMES = {
    "AnnotatorSettings": "annotation",
    "CellTokenizer": "cells",
    "ClampSettings": "clamping",
    "IntegratedCells": "integration",
    "IntegrationArguments": "integration_network",
    "MappingSettings": "reference_mapping",
    "NetworkSettings": "gene_network",
    "PerturbationSettings": "perturbation_training",
    "ReconstructedCells": "reconstruction",
    "ScDivaForPerturbation": "perturbation_network",
    "annotate_cells": "annotation",
    "clamp_genes": "clamping",
    "complete_cells": "generation",
    "conditions_from_obs": "generation",
    "control_cells": "perturbation_data",
    "denoise_cells": "generation",
    "embed_cells": "embedding",
    "finetune_annotator": "annotation",
    "finetune_perturbation": "perturbation",
    "gene_surprisal": "scoring",
    "generate_cells": "generation",
    "impute_expression": "imputation",
    "infer_gene_network": "gene_network",
    "integrate_batches": "integration",
    "load_annotator": "annotator_files",
    "map_to_reference": "reference_mapping",
    "marker_reward": "generation",
    "network_matrix": "gene_network",
    "predict_perturbation": "perturbation",
    "reconstruct_cells": "reconstruction",
    "regulon": "gene_network",
    "save_annotator": "annotator_files",
    "score_cells": "scoring",
    "score_labels": "scoring",
    "unknown_targets": "perturbation_data",
    "with_delta_decoder": "perturbation_training",
}


def __getattr__(name: str) -> Any:
    if name not in LAZY_NAMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(f"{__name__}.{LAZY_NAMES[name]}"), name)
