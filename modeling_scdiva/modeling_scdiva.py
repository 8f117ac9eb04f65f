"""scDiVa: a masked discrete diffusion encoder of single cells, its diffusion heads and a classification head.

Notable choices:
- A cell is a ranked list of genes with `<lat>` in front; token = gene embedding + MLP(expression value).
- No time embedding: the visible share of masks carries the diffusion time.
- Gene logits are computed at masked positions only; special tokens have probability zero.
- Padding is invisible, and so are the values behind hidden and empty slots.

Dimensions: B cells in a loader batch, S positions, P positions asked for, V vocabulary, D width, H heads, C
classes, n positions to predict.
Source: METHOD.md sections 3 and 4.
"""

from typing import Any

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput
from transformers.utils.generic import (
    can_return_tuple,
    is_flash_attention_requested,
    merge_with_config_defaults,
)
from transformers.utils.output_capturing import capture_outputs

from .configuration_scdiva import ScDivaConfig
from .diffusion_heads_scdiva import ScDivaDiffusionHeads
from .generation_config_scdiva import ScDivaGenerationConfig
from .generation_scdiva import ScDivaGenerationMixin
from .layers_scdiva import (
    ScDivaConditionEmbedding,
    ScDivaGeneQueryDecoder,
    ScDivaGeneTransform,
    ScDivaLayer,
    ScDivaRMSNorm,
    ScDivaRotaryEmbedding,
    ScDivaValueEmbedding,
    ScDivaValueHead,
)
from .likelihood_scdiva import ScDivaLikelihoodMixin
from .outputs_scdiva import ScDivaMaskedDiffusionOutput, pool_cells, pooled_positions
from .pretrained_scdiva import ScDivaPreTrainedModel

OPTIONAL_STATES = ("output_hidden_states", "output_attentions")


class ScDivaModel(ScDivaPreTrainedModel):
    """The encoder: cells in, hidden states out. The last state of `<lat>`, at position 0, embeds the cell."""

    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012 - declared so by the base class
        r"^lm_head\.",
        r"^gene_transform\.",
        r"^value_head\.",
        r"^query_decoder\.",
        r"^quality_head\.",
        r"^classifier\.",
        r"^delta_decoder\.",
    ]

    def __init__(self, config: ScDivaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.value_embedding = ScDivaValueEmbedding(config)
        self.condition_embedding = ScDivaConditionEmbedding(config) if config.conditions else None
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.rotary_emb = ScDivaRotaryEmbedding(config)
        self.layers = nn.ModuleList([ScDivaLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = ScDivaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        expression_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        is_masked: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        condition_ids: torch.Tensor | None = None,
        *,
        output_positions: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple | BaseModelOutput:
        """Encode cells.

        Args:
            input_ids: (B, S) gene tokens, ``mask_token_id`` where the gene is hidden.
            expression_values: (B, S) log1p of normalised counts; read only at genes whose value is shown.
            attention_mask: (B, S) 1 = real, 0 = padding; derived from the padding tokens when not given.
            is_masked: (B, S) bool, True where the value is hidden; when not given, where the gene is hidden.
            position_ids: (B, S) or (1, S) ranks; 0 .. S - 1 when not given.
            inputs_embeds: (B, S, D) gene embeddings in place of the table's. Keep ``input_ids`` with them if
                there are special tokens, which show no value.
            condition_ids: (B, K) int64 category of each condition in ``config.conditions``, 0 = not given;
                all zeros when not given.
            output_positions: (B, P) or (1, P) int64 positions whose last states are wanted; None for all. The
                last layer is computed there alone.
            **kwargs: ``output_hidden_states``, ``output_attentions``, ``return_dict``, and what kernels take.

        Returns:
            The last hidden state (B, S, D), or (B, P, D) at ``output_positions``, and, when asked for, all
            states and attention weights; there the K condition tokens stand behind the S positions, and the
            last layer has the P alone.

        Raises:
            ValueError: If ``expression_values`` did not come, or conditions came that the network has not.
        """
        masks = self._position_masks(input_ids, inputs_embeds, attention_mask, is_masked)
        if expression_values is None:
            msg = (
                "expression_values did not come. Pass what the tokenizer returns for cells (text has no "
                "expression), or zeros if all are hidden."
            )
            raise ValueError(msg)
        gene_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # (B, S, D)
        expression_values = expression_values.to(gene_states.dtype)
        value_states = self.value_embedding(expression_values, masks.is_measured, masks.is_hidden)
        if self.config.normalize_embeddings:
            width, eps = (self.config.hidden_size,), self.config.rms_norm_eps
            gene_states = nn.functional.rms_norm(gene_states, width, eps=eps)
            value_states = nn.functional.rms_norm(value_states, width, eps=eps)
        hidden_states = self.dropout(gene_states + value_states)  # (B, S, D)

        n_cells, n_positions = hidden_states.shape[:2]
        if position_ids is None:
            position_ids = torch.arange(n_positions, device=hidden_states.device).unsqueeze(0)
        if not self.config.use_rotary_positions:
            position_ids = torch.zeros_like(position_ids)
        is_attended = masks.is_attended
        if self.condition_embedding is not None or condition_ids is not None:
            hidden_states, position_ids, is_attended = self._with_conditions(
                hidden_states, position_ids, is_attended, condition_ids
            )
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        bidirectional_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=is_attended
        )
        *inner_layers, last_layer = self.layers
        for layer in inner_layers:
            hidden_states = layer(
                hidden_states, position_embeddings, bidirectional_mask, position_ids=position_ids, **kwargs
            )
        if output_positions is None:
            hidden_states = last_layer(
                hidden_states, position_embeddings, bidirectional_mask, position_ids=position_ids, **kwargs
            )[:, :n_positions]
        else:
            output_positions = output_positions.to(hidden_states.device).expand(n_cells, -1)
            query_mask = self._query_mask(hidden_states, is_attended, output_positions)
            hidden_states = last_layer(
                hidden_states, position_embeddings, query_mask, output_positions, **kwargs
            )
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))

    def _with_conditions(
        self,
        hidden_states: torch.Tensor,
        position_ids: torch.Tensor,
        is_attended: torch.Tensor,
        condition_ids: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Put the conditions of the cells behind their genes in memory, and beside `<lat>` by position.

        Ranks stay what they are without them, on whichever side the padding is.

        Returns:
            (B, S + K, D) states, (B, S + K) positions, and (B, S + K) bool, what is attended.

        Raises:
            ValueError: If the network has no conditions.
        """
        if self.condition_embedding is None:
            msg = "condition_ids came, and this network was trained without conditions. Leave them out."
            raise ValueError(msg)
        n_cells = len(hidden_states)
        condition_states = self.condition_embedding(condition_ids, n_cells)  # (B, K, D)
        hidden_states = torch.cat((hidden_states, condition_states.to(hidden_states.dtype)), dim=1)
        n_conditions = condition_states.shape[1]
        position_ids = position_ids.expand(n_cells, -1)  # (B, S)
        beside = position_ids.gather(1, is_attended.long().argmax(dim=1, keepdim=True))  # (B, 1)
        position_ids = torch.cat((position_ids, beside.expand(-1, n_conditions)), dim=1)
        is_attended = nn.functional.pad(is_attended, (0, n_conditions), value=True)
        return hidden_states, position_ids, is_attended

    def _query_mask(
        self, hidden_states: torch.Tensor, is_attended: torch.Tensor, output_positions: torch.Tensor
    ) -> Any:
        """Make the mask for queries at some positions (B, P) and keys at all (B, S).

        Returns:
            The mask, in the form the attention implementation takes.

        Raises:
            ValueError: If flash attention is to leave out the padding of cells with several queries.
        """
        mask: Any = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=hidden_states[:, : output_positions.shape[1]],  # read for the number of queries
            attention_mask=is_attended,
            encoder_hidden_states=hidden_states,
        )
        if mask is not None and output_positions.shape[1] > 1 and is_flash_attention_requested(self.config):
            msg = (
                f"output_positions asks for {output_positions.shape[1]} positions of padded cells, and flash "
                "attention takes one or all of them. Leave output_positions out, or use "
                'attn_implementation="sdpa".'
            )
            raise ValueError(msg)
        return mask


class ScDivaForMaskedDiffusion(ScDivaGenerationMixin, ScDivaLikelihoodMixin, ScDivaDiffusionHeads):
    """The diffusion model: predicts the hidden genes and the hidden expression values of a cell."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - see the base class
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012

    def __init__(self, config: ScDivaConfig) -> None:
        super().__init__(config)
        self.model = ScDivaModel(config)
        self.gene_transform = ScDivaGeneTransform(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.value_head = ScDivaValueHead(config)
        self.query_decoder = ScDivaGeneQueryDecoder(config) if config.latent_loss_weight else None
        self.quality_head = nn.Linear(config.hidden_size, 1) if config.quality_head else None
        self.generation_config = ScDivaGenerationConfig()
        self.post_init()

    @can_return_tuple
    def forward(  # noqa: PLR0913 - the inputs of the encoder, the targets and one switch
        self,
        input_ids: torch.Tensor | None = None,
        expression_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        is_masked: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        expression_labels: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        *,
        query_ids: torch.Tensor | None = None,
        query_labels: torch.Tensor | None = None,
        query_log_ratio: torch.Tensor | None = None,
        condition_ids: torch.Tensor | None = None,
        size_factors: torch.Tensor | None = None,
        loss_weight: torch.Tensor | None = None,
        output_all_logits: bool | None = None,
        **kwargs: Any,
    ) -> tuple | ScDivaMaskedDiffusionOutput:
        """Predict what is hidden and, when targets come, compute the losses.

        Logits stand for the positions with a label or, without labels, for the masked genes, cell after cell;
        with labels and ``loss_chunk_size`` there are none, unless all are asked for.
        Values are predicted at every position; a head that uses the gene takes the label, else the visible
        gene, else the likeliest. Labels must be genes that can be predicted: special tokens are refused, and
        so are genes that the cell shows if ``exclude_visible_genes`` is set.

        Args:
            input_ids: (B, S) gene tokens, ``mask_token_id`` where the gene is hidden.
            expression_values: (B, S) log1p of normalised counts; read only at genes whose value is shown.
            attention_mask: (B, S) 1 = real, 0 = padding; derived from the padding tokens when not given.
            is_masked: (B, S) bool, True where the value is hidden; when not given, where the gene is hidden.
            position_ids: (B, S) or (1, S) ranks; 0 .. S - 1 when not given.
            labels: (B, S) int64 true gene tokens where they are to be predicted, -100 elsewhere.
            expression_labels: (B, S) true values, read where the value is hidden.
            inputs_embeds: (B, S, D) gene embeddings in place of the table's.
            query_ids: (B, Q) genes the gene-query decoder is asked for, ``pad_token_id`` at empty slots; read
                where the network has the decoder.
            query_labels: (B, Q) values of these genes in the clean cell, 0 where they are not expressed.
            query_log_ratio: (B,) log of (share of expressed genes asked / share of silent genes asked).
            condition_ids: (B, K) int64 category of each condition in ``config.conditions``, 0 = not given.
            size_factors: (B,) molecules of the cell / target_sum, for the counts of ``objective="elbo"``.
            loss_weight: (B,) weight of the cell's gene and expression loss in the mean over cells.
            output_all_logits: Return (B, S, V) logits; when not given, the opposite of ``sparse_prediction``.
            **kwargs: ``output_hidden_states``, ``output_attentions``, ``return_dict``, and what kernels take.

        Returns:
            Losses, logits, expression predictions and states.
        """
        kwargs.pop("num_items_in_batch", None)  # Trainer's count of labels; our losses are means per cell
        masks = self._position_masks(input_ids, inputs_embeds, attention_mask, is_masked)
        cells = (input_ids, expression_values, attention_mask, is_masked, position_ids, inputs_embeds)
        outputs = self.model(*cells, condition_ids, **kwargs)
        hidden_states = outputs.last_hidden_state  # (B, S, D)
        # 1. Genes at n positions.
        is_wanted = masks.is_gene_masked if labels is None else masks.is_attended & (labels != -100)  # (B, S)
        rows = is_wanted.nonzero(as_tuple=True)  # cell and position of each, (n,) both
        wants_all = not self.config.sparse_prediction if output_all_logits is None else output_all_logits
        is_chunked = labels is not None and self.config.loss_chunk_size is not None and not wants_all
        cells_shown = (input_ids, masks.is_attended)
        logits: Any = (
            None if is_chunked else self._logits_at(hidden_states, rows, *cells_shown, wants_all=wants_all)
        )
        row_logits = logits[rows] if wants_all else logits  # (n, V)

        # 2. Laws of values at all positions: (B, S), and (B, S) or None.
        law = self._value_parameters(hidden_states, self._value_genes(input_ids, rows, row_logits, labels))

        # 3. Losses: first over the positions of a cell, then over the cells.
        cell_losses = dict.fromkeys(("gene", "expression", "latent"))  # (B,) each
        bounds = None if labels is None else self._rank_bounds(cells, size_factors, masks)
        if labels is not None:
            ways = (row_logits, hidden_states)  # logits as they are, or in chunks from the states
            cell_losses["gene"] = self._gene_loss(*ways, labels, rows, *cells_shown, bounds)
        if expression_labels is not None:
            cell_losses["expression"] = self._expression_loss(
                law, expression_labels, size_factors, masks, labels=labels, bounds=bounds
            )
        queries = (query_ids, query_labels, query_log_ratio)
        cell_losses["latent"] = self._latent_loss(hidden_states[:, 0], *queries)
        return ScDivaMaskedDiffusionOutput(
            **self._mean_losses(cell_losses, loss_weight),
            logits=logits,
            expression_predictions=law[0],
            last_hidden_state=hidden_states,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class ScDivaForSequenceClassification(ScDivaPreTrainedModel):
    """The encoder with a classifier of whole cells, for example of cell types."""

    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012 - declared so by the base class
        r"^lm_head\.",
        r"^gene_transform\.",
        r"^value_head\.",
        r"^query_decoder\.",
        r"^quality_head\.",
    ]
    _fresh_head_prefix = "classifier."

    def __init__(self, config: ScDivaConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels or 0
        self.model = ScDivaModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, int(self.num_labels))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        expression_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        is_masked: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        condition_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple | SequenceClassifierOutput:
        """Classify cells.

        Args:
            input_ids: (B, S) gene tokens.
            expression_values: (B, S) log1p of normalised counts; read only at genes whose value is shown.
            attention_mask: (B, S) 1 = real, 0 = padding; derived from the padding tokens when not given.
            is_masked: (B, S) bool, True where the value is hidden; when not given, where the gene is hidden.
            position_ids: (B, S) or (1, S) ranks; 0 .. S - 1 when not given.
            labels: (B,) int64 classes, (B,) float targets or (B, C) float indicators, by ``problem_type``.
            inputs_embeds: (B, S, D) gene embeddings in place of the table's.
            condition_ids: (B, K) int64 category of each condition in ``config.conditions``, 0 = not given.
            **kwargs: ``output_hidden_states``, ``output_attentions``, ``return_dict``, and what kernels take.

        Returns:
            The loss when labels came, the (B, C) logits, and states and attention weights when asked for.
        """
        kwargs.pop("num_items_in_batch", None)  # Trainer's count; the loss is a mean over cells
        masks = self._position_masks(input_ids, inputs_embeds, attention_mask, is_masked)
        asked = [kwargs.get(name, getattr(self.config, name)) for name in OPTIONAL_STATES]
        if not self.training and not any(asked):  # in training dropout draws for all positions
            kwargs["output_positions"] = pooled_positions(self.config.cell_pooling)
        outputs = self.model(
            input_ids,
            expression_values,
            attention_mask,
            is_masked,
            position_ids,
            inputs_embeds,
            condition_ids,
            **kwargs,
        )
        cell_states = pool_cells(
            outputs.last_hidden_state, masks.is_attended, self.config.cell_pooling
        )  # (B, D)
        logits = self.classifier(self.dropout(cell_states))  # (B, C)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "ScDivaForMaskedDiffusion",
    "ScDivaForSequenceClassification",
    "ScDivaMaskedDiffusionOutput",
    "ScDivaModel",
    "ScDivaPreTrainedModel",
    "pool_cells",
]
