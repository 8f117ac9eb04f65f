"""The tensor side of scDiVa: configuration, network, training, tasks. Importing it fills the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
)

from modeling_scdiva.configuration_scdiva import ScDivaConfig
from modeling_scdiva.generation_config_scdiva import ScDivaGenerationConfig, ScDivaGenerationOutput
from modeling_scdiva.likelihood_scdiva import ScDivaLikelihoodOutput
from modeling_scdiva.modeling_scdiva import (
    ScDivaForMaskedDiffusion,
    ScDivaForSequenceClassification,
    ScDivaMaskedDiffusionOutput,
    ScDivaModel,
    ScDivaPreTrainedModel,
    pool_cells,
)
from modeling_scdiva.pipelines import register_pipelines
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

AutoConfig.register(ScDivaConfig.model_type, ScDivaConfig, exist_ok=True)
ScDivaConfig.register_for_auto_class()
for _auto_class, _model_class in (
    (AutoModel, ScDivaModel),
    (AutoModelForPreTraining, ScDivaForMaskedDiffusion),
    (AutoModelForMaskedLM, ScDivaForMaskedDiffusion),
    (AutoModelForSequenceClassification, ScDivaForSequenceClassification),
):
    _auto_class.register(ScDivaConfig, _model_class, exist_ok=True)
    # Makes save_pretrained copy the code beside the weights.
    _model_class.register_for_auto_class(_auto_class.__name__)
register_pipelines()

# Last, and the one exception to the direction of imports: either package registers AutoTokenizer as well.
import tokenization_scdiva  # noqa: E402, F401, TID251
