"""Fills the Auto classes and the pipelines with our networks when it is imported.

The first `ScDivaConfig` imports it, and so does whoever looks for the pipelines before there is any.
"""

from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
)

from modeling_scdiva.configuration_scdiva import ScDivaConfig
from modeling_scdiva.modeling_scdiva import (
    ScDivaForMaskedDiffusion,
    ScDivaForSequenceClassification,
    ScDivaModel,
)
from modeling_scdiva.pipelines import register_pipelines

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
