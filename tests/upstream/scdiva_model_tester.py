"""Our side of transformers' model tests: a tiny configuration, its inputs, and the classes to test.

Not collected here: `test_transformers_suite.py` copies this file into the unpacked tests of transformers,
where the relative imports below resolve.
"""

import functools
import unittest
from unittest import mock

import torch
from transformers.models.auto import modeling_auto
from transformers.testing_utils import require_torch, torch_device

from modeling_scdiva import (
    ScDivaConfig,
    ScDivaForMaskedDiffusion,
    ScDivaForSequenceClassification,
    ScDivaModel,
    ScDivaPreTrainedModel,
)

from ...test_configuration_common import ConfigTester  # noqa: TID252
from ...test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask  # noqa: TID252

# The mixin looks class names up in these tables, which registering with the Auto classes does not touch.
modeling_auto.MODEL_MAPPING_NAMES["scdiva"] = "ScDivaModel"
modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES["scdiva"] = "ScDivaForMaskedDiffusion"
modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["scdiva"] = "ScDivaForSequenceClassification"


class ScDivaModelTester:
    """Makes configurations and inputs. Cells hold genes only, so that they also run from embeddings alone."""

    config_class = ScDivaConfig
    base_model_class = ScDivaModel

    def __init__(self, parent):
        self.parent = parent
        self.batch_size = 5
        self.seq_length = 7
        self.is_training = True
        self.vocab_size = 99
        self.hidden_size = 32
        self.num_hidden_layers = 2
        self.num_attention_heads = 4
        self.intermediate_size = 64
        self.num_labels = 3

    def get_config(self):
        return ScDivaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=self.intermediate_size,
            sparse_prediction=False,  # the mixin expects logits at every position
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        shape = [self.batch_size, self.seq_length]
        genes = ids_tensor(shape, self.vocab_size - config.n_special_tokens) + config.n_special_tokens
        is_masked = torch.rand(shape, device=torch_device) < 0.3
        is_masked[:, 1] = True  # every cell has a value to predict
        inputs = {
            "input_ids": genes,
            "expression_values": 5.0 * torch.rand(shape, device=torch_device),
            "attention_mask": random_attention_mask(shape),
            "is_masked": is_masked,
        }
        return config, inputs


ENCODE = ScDivaModel.forward
GENE_LOGITS = ScDivaForMaskedDiffusion._gene_logits


@functools.wraps(ENCODE)
def with_some_values(self, input_ids=None, expression_values=None, *args, **kwargs):
    """Some tests call the encoder with tokens alone; ours insists on values."""
    if expression_values is None:
        expression_values = (input_ids % 7).float()
    return ENCODE(self, input_ids, expression_values, *args, **kwargs)


def with_finite_logits(self, *args):
    """One test forbids infinities; -inf is how our logits say probability zero."""
    return GENE_LOGITS(self, *args).nan_to_num(neginf=-1e4)


def with_nothing_refused(self, missing_keys):
    """One test loads an empty checkpoint on purpose; ours is refused."""
    return set()


# Where tests assume what our models refuse or do otherwise by design: test, class, method, and its stand-in.
ADAPTED = [
    ("test_batching_equivalence", ScDivaForMaskedDiffusion, "_gene_logits", with_finite_logits),
    ("test_eager_matches_sdpa_inference", ScDivaModel, "forward", with_some_values),
    ("test_load_with_mismatched_shapes", ScDivaModel, "forward", with_some_values),
    ("test_model_rope_scaling_from_config", ScDivaModel, "forward", with_some_values),
    (
        "test_can_init_all_missing_weights",
        ScDivaPreTrainedModel,
        "_refused_missing",
        with_nothing_refused,
    ),
]


@require_torch
class ScDivaModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (ScDivaModel, ScDivaForMaskedDiffusion, ScDivaForSequenceClassification)
    # Generation is masked diffusion with a `generate` of its own, which upstream's autoregressive tests
    # cannot call; tests/test_generation_scdiva.py and its neighbours test it.
    all_generative_model_classes = ()
    test_can_init_all_missing_weights_before_2023 = True
    _torch_compile_train_cls = ScDivaForMaskedDiffusion

    def setUp(self):
        self.model_tester = ScDivaModelTester(self)
        self.config_tester = ConfigTester(self, config_class=ScDivaConfig, hidden_size=32)
        for prefix, target, name, adapted in ADAPTED:
            if self._testMethodName.startswith(prefix):
                patcher = mock.patch.object(target, name, adapted)
                patcher.start()
                self.addCleanup(patcher.stop)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class is ScDivaForMaskedDiffusion:
            inputs["labels"] = inputs["input_ids"].clone()  # the mixin's zeros are padding, which we refuse
            inputs["expression_labels"] = torch.ones_like(inputs["expression_values"])
        return inputs

    def test_config(self):
        self.config_tester.run_common_tests()
