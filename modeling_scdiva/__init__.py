"""The tensor side of scDiVa: configuration, network, training, tasks. Importing it fills the Auto classes.

Networks are imported when they are first asked for, by name or by a configuration, because the base class of
networks takes as long to import as all of torch. Names not in `__all__` are reached by their module's path.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig

from modeling_scdiva.configuration_scdiva import ScDivaConfig

if TYPE_CHECKING:
    from modeling_scdiva.generation_config_scdiva import ScDivaGenerationConfig, ScDivaGenerationOutput
    from modeling_scdiva.likelihood_scdiva import ScDivaLikelihoodOutput
    from modeling_scdiva.modeling_scdiva import (
        ScDivaForMaskedDiffusion,
        ScDivaForSequenceClassification,
        ScDivaModel,
    )
    from modeling_scdiva.outputs_scdiva import ScDivaMaskedDiffusionOutput, pool_cells
    from modeling_scdiva.pretrained_scdiva import ScDivaPreTrainedModel
    from modeling_scdiva.steering_scdiva import Steering

__all__ = [
    "ScDivaConfig",
    "ScDivaForMaskedDiffusion",
    "ScDivaForSequenceClassification",
    "ScDivaGenerationConfig",
    "ScDivaGenerationOutput",
    "ScDivaLikelihoodOutput",
    "ScDivaMaskedDiffusionOutput",
    "ScDivaModel",
    "ScDivaPreTrainedModel",
    "Steering",
    "pool_cells",
]

# Module of each name that is imported on first use.
LAZY_NAMES = {
    "ScDivaForMaskedDiffusion": "modeling_scdiva",
    "ScDivaForSequenceClassification": "modeling_scdiva",
    "ScDivaGenerationConfig": "generation_config_scdiva",
    "ScDivaGenerationOutput": "generation_config_scdiva",
    "ScDivaLikelihoodOutput": "likelihood_scdiva",
    "ScDivaMaskedDiffusionOutput": "outputs_scdiva",
    "ScDivaModel": "modeling_scdiva",
    "ScDivaPreTrainedModel": "pretrained_scdiva",
    "Steering": "steering_scdiva",
    "pool_cells": "outputs_scdiva",
}


def __getattr__(name: str) -> Any:
    if name not in LAZY_NAMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(f"{__name__}.{LAZY_NAMES[name]}"), name)


AutoConfig.register(ScDivaConfig.model_type, ScDivaConfig, exist_ok=True)
ScDivaConfig.register_for_auto_class()
# The Auto classes of networks look up the class of a configuration, so they are filled when there is one.
ScDivaConfig.before_first_object = lambda: import_module(f"{__name__}.auto_classes")

# Last, and the one exception to the direction of imports: either package registers AutoTokenizer as well.
import tokenization_scdiva  # noqa: E402, F401, TID251
