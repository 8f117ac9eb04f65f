"""Base class of all scDiVa models: fresh weights, strict loading, and what each position of a cell is.

Notable choices:
- Weights that are missing, left over, of the wrong shape or not finite raise; none starts random in silence.
- Padding is invisible even when no attention mask is given.

Dimensions: B cells in a loader batch, S positions, D width.
Source: METHOD.md section 3.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import logging

try:
    from safetensors import SafetensorError
except ImportError:  # never missing where transformers is; guarded because this file travels
    SafetensorError = OSError  # type: ignore[assignment, misc]

from .configuration_scdiva import ScDivaConfig
from .layers_scdiva import ScDivaAttention, ScDivaLayer, ScDivaValueEmbedding, ScDivaValueHead

logger = logging.get_logger(__name__)


@dataclass
class PositionMasks:
    """What each position of a loader batch is; all (B, S) bool."""

    is_attended: torch.Tensor  # not padding
    is_measured: torch.Tensor  # shows an expression value
    is_hidden: torch.Tensor  # has a value, which is to be predicted
    is_gene_masked: torch.Tensor  # the gene itself is to be predicted


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Switch dropout off, and give every submodule its own mode back, also after an error.

    Args:
        model: Any network, or None, which has no dropout.
    """
    modes = {} if model is None else {module: module.training for module in model.modules()}
    if model is not None:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class ScDivaPreTrainedModel(PreTrainedModel):
    """Base of all scDiVa models."""

    config_class = ScDivaConfig
    config: ScDivaConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    # Losses are means over cells, whatever the number of labels: Trainer has to average over micro-batches.
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    _no_split_modules = ["ScDivaLayer", "ScDivaValueEmbedding"]  # noqa: RUF012 - declared so by the base class
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ScDivaLayer, "attentions": ScDivaAttention}  # noqa: RUF012
    # Weights that checkpoints of other scDiVa classes do not hold, and which then may start fresh.
    _fresh_head_prefix: str | None = None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, ScDivaValueEmbedding):
            # A single input feature: at the usual scale the MLP would start linear in the value and far below
            # the gene embedding. Like this it starts curved, and both terms start equally large.
            init.uniform_(module.in_proj.weight, -1.0, 1.0)
            init.uniform_(module.in_proj.bias, -1.0, 1.0)
            init.normal_(module.out_proj.weight, std=std / self.config.hidden_size**0.5)
            init.normal_(module.hidden_value, std=std)
        elif isinstance(module, ScDivaValueHead) and module.is_gene_conditioned:
            init.ones_(module.gene_weights)

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        """Smallest inputs the models run on: one cell, `<lat>` and two genes."""
        gene_id = self.config.n_special_tokens
        input_ids = torch.tensor([[self.config.lat_token_id, gene_id, gene_id]], device=self.device)
        return {"input_ids": input_ids, "expression_values": torch.zeros(1, 3, device=self.device)}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        use_safetensors: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load weights, and refuse them unless they are exactly the weights of this network.

        Args:
            pretrained_model_name_or_path: Checkpoint folder or Hub id.
            *model_args: Passed on to the constructor.
            output_loading_info: Also return the loading report. Missing and unexpected weights are then the
                caller's to judge and do not raise.
            ignore_mismatched_sizes: Start weights of another shape afresh.
            use_safetensors: Anything but False; no other format is read.
            **kwargs: As in `PreTrainedModel.from_pretrained`.

        Returns:
            The model in evaluation mode, or the model and the loading report.

        Raises:
            ValueError: If ``use_safetensors`` is False.
            RuntimeError: If weights are missing, unexpected, of another shape or not finite, or their file is
                damaged.
        """
        if use_safetensors is False:
            msg = "scDiVa reads safetensors only, got use_safetensors=False. Save the weights in that format."
            raise ValueError(msg)
        try:
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path,
                *model_args,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # judged below, by name and shape
                use_safetensors=True,
                **kwargs,
            )
        except SafetensorError as error:
            msg = f"The weights of {pretrained_model_name_or_path} are damaged ({error}). Fetch them again."
            raise RuntimeError(msg) from error
        model, report = loaded
        problems = [f"not finite: {name}" for name in model._not_finite_weights()]
        if not ignore_mismatched_sizes:
            problems += [
                f"wrong shape: {name} is {tuple(found)}, wanted {tuple(wanted)}"
                for name, found, wanted in sorted(report["mismatched_keys"])
            ]
        if not output_loading_info:
            problems += [
                f"missing: {name}" for name in sorted(model._refused_missing(report["missing_keys"]))
            ]
            problems += [f"unexpected: {name}" for name in sorted(report["unexpected_keys"])]
        if problems:
            shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
            msg = (
                f"{pretrained_model_name_or_path} does not hold the weights of {cls.__name__}: {shown}. "
                "Load it with the class and the configuration it was saved with."
            )
            raise RuntimeError(msg)
        return (model, report) if output_loading_info else model

    def _refused_missing(self, missing_keys: set[str]) -> set[str]:
        """Take a head that is new to this class out of the missing weights, and say so.

        Returns:
            Names of the weights whose absence is an error.
        """
        prefix = self._fresh_head_prefix
        head = {name for name in self.state_dict() if prefix is not None and name.startswith(prefix)}
        is_other_class = type(self).__name__ not in (self.config.architectures or [])
        if head and head <= missing_keys and is_other_class:
            names = ", ".join(sorted(head))
            logger.warning(
                f"{type(self).__name__} starts {names} at random: not in this checkpoint, to be trained."
            )
            return missing_keys - head
        return missing_keys

    def _not_finite_weights(self) -> list[str]:
        """Look for NaN and infinity in all weights in memory; those offloaded to disk cannot be seen.

        Returns:
            Names of the weights that hold any.
        """
        tensors = {
            name: t for name, t in self.state_dict().items() if t.is_floating_point() and not t.is_meta
        }
        return [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]

    def _position_masks(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        is_masked: torch.Tensor | None,
    ) -> PositionMasks:
        """Derive what each position is; without token ids every position counts as a gene.

        Returns:
            Masks of the loader batch.

        Raises:
            ValueError: If there are no cells, or the attention mask is not (B, S).
        """
        if attention_mask is not None and attention_mask.ndim != 2:
            msg = f"attention_mask must be (cells, positions), got shape {tuple(attention_mask.shape)}."
            raise ValueError(msg)
        if input_ids is not None:
            is_gene_masked = input_ids == self.config.mask_token_id
            is_attended = input_ids != self.config.pad_token_id
            is_anchor = (input_ids == self.config.lat_token_id) | (input_ids == self.config.pert_token_id)
            is_gene = (input_ids != self.config.pad_token_id) & ~is_anchor
        elif inputs_embeds is not None:
            is_gene = torch.ones(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
            is_gene_masked = ~is_gene if is_masked is None else is_masked.bool()
            is_attended = is_gene
        else:
            msg = "neither input_ids nor inputs_embeds came. Pass what the tokenizer returns."
            raise ValueError(msg)
        if attention_mask is not None:
            is_attended = attention_mask.bool()
        if not self.config.use_anchor and input_ids is not None:
            is_attended = is_attended & (input_ids != self.config.lat_token_id)
        has_value = is_attended & is_gene
        is_hidden = has_value & (is_gene_masked if is_masked is None else is_masked.bool())
        return PositionMasks(is_attended, has_value & ~is_hidden, is_hidden, is_attended & is_gene_masked)
