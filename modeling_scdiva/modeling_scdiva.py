"""scDiVa: a masked discrete diffusion encoder of single cells, its diffusion heads and a classification head.

Notable choices:
- A cell is a ranked list of genes with `<lat>` in front; token = gene embedding + MLP(expression value).
- No time embedding: the visible share of masks carries the diffusion time.
- Gene logits are computed at masked positions only; special tokens have probability zero.
- Padding is invisible, and so are the values behind hidden and empty slots.

Dimensions: B cells in a loader batch, S positions, V vocabulary, D width, H heads, C classes, n
positions to predict.
Source: METHOD.md sections 3 and 4.
"""

from typing import Any

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_scdiva import ScDivaConfig
from .diffusion_scdiva import (
    gene_query_loss,
    masked_expression_loss,
    masked_gene_loss,
    visible_gene_mask,
)
from .layers_scdiva import (
    ScDivaGeneQueryDecoder,
    ScDivaGeneTransform,
    ScDivaLayer,
    ScDivaRMSNorm,
    ScDivaRotaryEmbedding,
    ScDivaValueEmbedding,
    ScDivaValueHead,
)
from .outputs_scdiva import ScDivaMaskedDiffusionOutput, pool_cells
from .pretrained_scdiva import ScDivaPreTrainedModel


class ScDivaModel(ScDivaPreTrainedModel):
    """The encoder: cells in, hidden states out. The last state of `<lat>`, at position 0, embeds the cell."""

    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012 - declared so by the base class
        r"^lm_head\.",
        r"^gene_transform\.",
        r"^value_head\.",
        r"^query_decoder\.",
        r"^classifier\.",
        r"^delta_decoder\.",
    ]

    def __init__(self, config: ScDivaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.value_embedding = ScDivaValueEmbedding(config)
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
            **kwargs: ``output_hidden_states``, ``output_attentions``, ``return_dict``, and what kernels take.

        Returns:
            The last hidden state (B, S, D) and, when asked for, all states and attention weights.

        Raises:
            ValueError: If ``expression_values`` did not come.
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
        value_states = self.value_embedding(
            expression_values, masks.is_measured, masks.is_hidden
        )  # (B, S, D)
        if self.config.normalize_embeddings:
            width, eps = (self.config.hidden_size,), self.config.rms_norm_eps
            gene_states = nn.functional.rms_norm(gene_states, width, eps=eps)
            value_states = nn.functional.rms_norm(value_states, width, eps=eps)
        hidden_states = self.dropout(gene_states + value_states)  # (B, S, D)

        if position_ids is None:
            position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device).unsqueeze(0)
        if not self.config.use_rotary_positions:
            position_ids = torch.zeros_like(position_ids)
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        bidirectional_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=masks.is_attended
        )
        for layer in self.layers:
            hidden_states = layer(
                hidden_states, position_embeddings, bidirectional_mask, position_ids=position_ids, **kwargs
            )
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))


class ScDivaForMaskedDiffusion(ScDivaPreTrainedModel):
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
        self.post_init()

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Change the size of the vocabulary; genes that are added get the weight 1.

        Args:
            *args: As in `PreTrainedModel.resize_token_embeddings`.
            **kwargs: As in `PreTrainedModel.resize_token_embeddings`.

        Returns:
            The gene embedding.
        """
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        if self.value_head.is_gene_conditioned:
            old = self.value_head.gene_weights
            n_kept = min(len(old), self.config.vocab_size)
            self.value_head.gene_weights = old.new_ones(self.config.vocab_size)
            self.value_head.gene_weights[:n_kept] = old[:n_kept]
        return embeddings

    def set_gene_weights(self, gene_weights: Any) -> None:
        """Store the weights H_g + eps by which the tokenizer ranks genes; they travel with the checkpoint.

        Args:
            gene_weights: (V,) positive weights, special tokens included, array or tensor.

        Raises:
            ValueError: If the value head does not use the gene, or the weights have another shape or are not
                positive numbers.
        """
        if not self.value_head.is_gene_conditioned:
            msg = f'gene weights need value_head="gene", this model has {self.config.value_head!r}.'
            raise ValueError(msg)
        weights = torch.as_tensor(gene_weights)
        if weights.shape != (self.config.vocab_size,):
            msg = f"gene_weights must have shape ({self.config.vocab_size},), got {tuple(weights.shape)}."
            raise ValueError(msg)
        is_good = torch.isfinite(weights) & (weights > 0)
        if not is_good.all():
            token_id = int((~is_good).nonzero()[0])
            msg = f"gene_weights must be finite and positive, got {weights[token_id]} for token {token_id}."
            raise ValueError(msg)
        self.value_head.gene_weights.copy_(weights)

    def predict_expression(
        self, hidden_states: torch.Tensor, gene_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Predict expression values from hidden states, and from the genes where the value head uses them.

        Args:
            hidden_states: (..., D) last hidden states.
            gene_ids: (...) int64 gene tokens that stand there; needed for ``value_head="gene"``.

        Returns:
            (...) float32 predicted log1p of normalised counts, not negative.

        Raises:
            ValueError: If the value head needs genes and none came.
        """
        if not self.value_head.is_gene_conditioned:
            return self.value_head(hidden_states)
        if gene_ids is None:
            msg = 'value_head="gene" predicts the value of a gene. Pass gene_ids here, input_ids to forward.'
            raise ValueError(msg)
        return self.value_head(hidden_states, gene_ids, self.model.embed_tokens(gene_ids))

    def decode_genes(
        self, cell_embeddings: torch.Tensor, gene_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict any genes from cell embeddings, whether the cells showed them or not.

        Args:
            cell_embeddings: (B, D) last hidden states of `<lat>`.
            gene_ids: (Q,) int64 gene tokens to ask all cells for, or (B, Q).

        Returns:
            (B, Q) log-odds that the gene is detected in the cell, and (B, Q) its log1p value if it is, both
            float32.

        Raises:
            ValueError: If the network has no gene-query decoder.
        """
        if self.query_decoder is None:
            msg = (
                "This model has no gene-query decoder: it was trained with latent_loss_weight=0. Load a "
                "checkpoint that has one, or pretrain with latent_loss_weight > 0."
            )
            raise ValueError(msg)
        answers = self.query_decoder(cell_embeddings, self.model.embed_tokens(gene_ids))  # (B, Q, 2)
        return answers[..., 0], nn.functional.softplus(answers[..., 1])

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
        output_all_logits: bool | None = None,
        **kwargs: Any,
    ) -> tuple | ScDivaMaskedDiffusionOutput:
        """Predict what is hidden and, when targets come, compute the losses.

        Logits stand for the positions with a label or, without labels, for the masked genes, cell after cell.
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
            output_all_logits: Return (B, S, V) logits; when not given, the opposite of ``sparse_prediction``.
            **kwargs: ``output_hidden_states``, ``output_attentions``, ``return_dict``, and what kernels take.

        Returns:
            Losses, logits, expression predictions and states.
        """
        kwargs.pop("num_items_in_batch", None)  # Trainer's count of labels; our losses are means per cell
        masks = self._position_masks(input_ids, inputs_embeds, attention_mask, is_masked)
        outputs = self.model(
            input_ids, expression_values, attention_mask, is_masked, position_ids, inputs_embeds, **kwargs
        )
        hidden_states, n_cells = outputs.last_hidden_state, len(outputs.last_hidden_state)  # (B, S, D)
        # 1. Genes at n positions.
        is_wanted = masks.is_gene_masked if labels is None else masks.is_attended & (labels != -100)  # (B, S)
        rows = is_wanted.nonzero(as_tuple=True)  # cell and position of each, (n,) both
        if output_all_logits or (output_all_logits is None and not self.config.sparse_prediction):
            cell_index = torch.arange(n_cells, device=hidden_states.device).unsqueeze(1)  # (B, 1)
            logits = self._gene_logits(hidden_states, cell_index, input_ids, masks.is_attended)  # (B, S, V)
            row_logits = logits[rows]  # (n, V)
        else:
            logits = row_logits = self._gene_logits(
                hidden_states[rows], rows[0], input_ids, masks.is_attended
            )

        # 2. Values at all positions.
        value_genes = self._value_genes(input_ids, rows, row_logits, labels)
        expression_predictions = self.predict_expression(hidden_states, value_genes)  # (B, S)

        # 3. Losses: first over the positions of a cell, then over the cells.
        cell_losses = dict.fromkeys(("gene", "expression", "latent"))  # (B,) each
        if labels is not None:
            self._refuse_impossible_labels(row_logits, labels[rows])
            cell_losses["gene"] = masked_gene_loss(row_logits, labels[rows], rows[0], n_cells)
        if expression_labels is not None:
            rows = masks.is_hidden.nonzero(as_tuple=True)
            cell_losses["expression"] = masked_expression_loss(
                expression_predictions[rows], expression_labels[rows], rows[0], n_cells
            )
        queries = (query_ids, query_labels, query_log_ratio)
        cell_losses["latent"] = self._latent_loss(hidden_states[:, 0], *queries)
        return ScDivaMaskedDiffusionOutput(
            **self._mean_losses(cell_losses),
            logits=logits,
            expression_predictions=expression_predictions,
            last_hidden_state=hidden_states,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _gene_logits(
        self,
        hidden_states: torch.Tensor,
        cell_index: torch.Tensor,
        input_ids: torch.Tensor | None,
        is_attended: torch.Tensor,
    ) -> torch.Tensor:
        """Compute the gene logits of states (..., D) that belong to the cells ``cell_index`` (...).

        Returns:
            (..., V) logits, -inf at special tokens and at excluded genes.

        Raises:
            ValueError: If visible genes are to be excluded and no tokens say which those are.
        """
        logits = self.lm_head(self.gene_transform(hidden_states))  # (..., V)
        n_special_tokens, vocab_size = self.config.n_special_tokens, self.config.vocab_size
        is_excluded = torch.arange(vocab_size, device=logits.device) < n_special_tokens  # (V,)
        if self.config.exclude_visible_genes:
            if input_ids is None:
                msg = "exclude_visible_genes needs input_ids: embeddings do not say which genes are visible."
                raise ValueError(msg)
            shown_ids = input_ids.masked_fill(~is_attended, self.config.pad_token_id)
            is_visible = visible_gene_mask(shown_ids, n_special_tokens, vocab_size)  # (B, V)
            is_excluded = (is_excluded | is_visible)[cell_index]  # (..., V)
        return logits.masked_fill(is_excluded, -torch.inf)

    def _value_genes(
        self,
        input_ids: torch.Tensor | None,
        rows: tuple[torch.Tensor, ...],
        row_logits: torch.Tensor,
        labels: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Say which gene the value head is told at each position: the label, the likeliest, the visible one.

        Returns:
            (B, S) int64 tokens; as they came where the value head does not use them.
        """
        if input_ids is None or not self.value_head.is_gene_conditioned:
            return input_ids
        row_genes = row_logits.argmax(dim=-1) if labels is None else labels[rows]  # (n,)
        return input_ids.index_put(rows, row_genes)

    def _refuse_impossible_labels(self, row_logits: torch.Tensor, row_labels: torch.Tensor) -> None:
        """Refuse labels (n,) that have probability zero in the logits (n, V); their loss would be infinite.

        Raises:
            ValueError: If there is one.
        """
        if torch.compiler.is_compiling():
            return  # a branch on data would break the graph
        is_impossible = row_logits.gather(1, row_labels.unsqueeze(1)).squeeze(1).isneginf()  # (n,)
        if is_impossible.any():
            label = int(row_labels[is_impossible][0])
            reason = "a special token" if label < self.config.n_special_tokens else "visible in the same cell"
            msg = (
                f"{int(is_impossible.sum())} labels can never be predicted, the first is {label}, {reason}. "
                "Label hidden genes only, and use -100 everywhere else."
            )
            raise ValueError(msg)

    def _latent_loss(
        self,
        cell_embeddings: torch.Tensor,
        query_ids: torch.Tensor | None,
        query_labels: torch.Tensor | None,
        query_log_ratio: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Ask the cell embeddings (B, D) for genes (B, Q).

        Returns:
            (B,) latent loss of each cell; None without decoder or without queries.

        Raises:
            ValueError: If the answers did not come.
        """
        if self.query_decoder is None or query_ids is None:
            return None
        if query_labels is None or query_log_ratio is None:
            msg = "query_ids came without query_labels or query_log_ratio. Pass all three, or none."
            raise ValueError(msg)
        is_query = query_ids != self.config.pad_token_id
        log_odds, predictions = self.decode_genes(cell_embeddings, query_ids)
        return gene_query_loss(log_odds, predictions, query_labels, is_query, query_log_ratio)

    def _mean_losses(self, cell_losses: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
        """Average the losses (B,) over the cells and add them up with their weights.

        Returns:
            The seven loss fields of the output.
        """
        weights = {
            "gene": 1.0,
            "expression": self.config.expression_loss_weight,
            "latent": self.config.latent_loss_weight,
        }
        losses = {kind: part.mean() for kind, part in cell_losses.items() if part is not None}
        total = torch.stack([weights[kind] * part for kind, part in losses.items()]).sum() if losses else None
        fields = {f"{kind}_loss": losses.get(kind) for kind in cell_losses}
        return {"loss": total} | fields | {f"cell_{kind}_loss": part for kind, part in cell_losses.items()}


class ScDivaForSequenceClassification(ScDivaPreTrainedModel):
    """The encoder with a classifier of whole cells, for example of cell types."""

    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012 - declared so by the base class
        r"^lm_head\.",
        r"^gene_transform\.",
        r"^value_head\.",
        r"^query_decoder\.",
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
            **kwargs: ``output_hidden_states``, ``output_attentions``, ``return_dict``, and what kernels take.

        Returns:
            The loss when labels came, the (B, C) logits, and states and attention weights when asked for.
        """
        kwargs.pop("num_items_in_batch", None)  # Trainer's count; the loss is a mean over cells
        masks = self._position_masks(input_ids, inputs_embeds, attention_mask, is_masked)
        outputs = self.model(
            input_ids, expression_values, attention_mask, is_masked, position_ids, inputs_embeds, **kwargs
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
