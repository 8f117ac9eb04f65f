"""The diffusion heads: from hidden states to genes, to laws of values, to any gene asked for, and to losses.

Dimensions: B cells in a loader batch, S positions, V vocabulary, D width, n positions to predict.
Source: METHOD.md sections 3, 4 and 6.
"""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .diffusion_scdiva import (
    gene_nats,
    gene_query_loss,
    masked_expression_loss,
    per_cell_mean,
)
from .layers_scdiva import ScDivaGeneQueryDecoder, ScDivaGeneTransform, ScDivaValueHead
from .pretrained_scdiva import PositionMasks, ScDivaPreTrainedModel
from .rank_bounds_scdiva import RankBounds, ShownCells
from .value_law_scdiva import count_log_prob, counts_from_values, draw_counts, fixed_scale


class ScDivaDiffusionHeads(ScDivaPreTrainedModel):
    """What `ScDivaForMaskedDiffusion` does behind its encoder."""

    model: Any
    gene_transform: ScDivaGeneTransform
    lm_head: nn.Linear
    value_head: ScDivaValueHead
    query_decoder: ScDivaGeneQueryDecoder | None
    quality_head: nn.Linear | None

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
            (...) float32 predicted log1p of normalised counts, not negative: the centre of the value's law.
        """
        return self._value_parameters(hidden_states, gene_ids)[0]

    def predict_value_law(
        self, hidden_states: torch.Tensor, gene_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict the logistic law of expression values.

        Args:
            hidden_states: (..., D) last hidden states.
            gene_ids: (...) int64 gene tokens that stand there; needed for ``value_head="gene"``.

        Returns:
            (...) float32 location and (...) float32 scale, log1p units. The scale is the network's own for
            ``objective="elbo"``, else the one that the weight of its squared error stands for.
        """
        location, scale = self._value_parameters(hidden_states, gene_ids)
        if scale is None:
            scale = torch.full_like(location, fixed_scale(self.config.expression_loss_weight))
        return location, scale

    def _value_parameters(
        self, hidden_states: torch.Tensor, gene_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Ask the value head.

        Returns:
            (...) location, and (...) scale where the head has one.

        Raises:
            ValueError: If the value head needs genes and none came.
        """
        if not self.value_head.is_gene_conditioned:
            return self.value_head(hidden_states)
        if gene_ids is None:
            msg = 'value_head="gene" predicts the value of a gene. Pass gene_ids here, input_ids to forward.'
            raise ValueError(msg)
        return self.value_head(hidden_states, gene_ids, self.model.embed_tokens(gene_ids))

    def predict_gene_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Score all genes.

        Args:
            hidden_states: (..., D) last hidden states.

        Returns:
            (..., V) logits, -inf at special tokens; genes that a cell shows are not excluded yet.
        """
        logits = self.lm_head(self.gene_transform(hidden_states))  # (..., V)
        # In place and unseen by autograd, here and below: where a law is zero a finite loss has no slope, and
        # copies of the largest tensors there are would cost a tenth of the head.
        with torch.no_grad():
            logits[..., : self.config.n_special_tokens] = -torch.inf
        return logits

    def predict_quality(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Judge visible genes: how likely is each the gene that belongs there (PRISM, arXiv 2510.01384).

        Args:
            hidden_states: (..., D) last hidden states of visible genes.

        Returns:
            (...) float32 log-odds that the gene is right given the rest of the cell.

        Raises:
            ValueError: If the network has no quality head.
        """
        if self.quality_head is None:
            msg = (
                "This model has no quality head. Train one with modeling_scdiva.quality.train_quality_head, "
                'or re-mask at random: remask="random".'
            )
            raise ValueError(msg)
        return self.quality_head(hidden_states.to(self.quality_head.weight.dtype)).squeeze(-1).float()

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

    def _logits_at(
        self,
        hidden_states: torch.Tensor,
        rows: tuple[torch.Tensor, ...],
        input_ids: torch.Tensor | None,
        is_attended: torch.Tensor,
        *,
        wants_all: bool,
    ) -> torch.Tensor:
        """Compute the gene logits of states (B, S, D) at positions, cell and place (n,) each, or at all.

        Returns:
            (n, V) or (B, S, V) logits.
        """
        if not wants_all:
            return self._gene_logits(hidden_states[rows], rows[0], input_ids, is_attended)
        cell_index = torch.arange(len(hidden_states), device=hidden_states.device).unsqueeze(1)  # (B, 1)
        return self._gene_logits(hidden_states, cell_index, input_ids, is_attended)

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
        logits = self.predict_gene_logits(hidden_states)  # (..., V)
        if not self.config.exclude_visible_genes:
            return logits
        if input_ids is None:
            msg = "exclude_visible_genes needs input_ids: embeddings do not say which genes are visible."
            raise ValueError(msg)
        shown_ids = input_ids.masked_fill(~is_attended, self.config.pad_token_id)[cell_index]  # (..., S)
        with torch.no_grad():  # special tokens are out already, so all that is shown can go
            logits.scatter_(-1, shown_ids.expand(*logits.shape[:-1], -1), -torch.inf)
        return logits

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
            reason = "visible in the same cell, or without a count that fits between its neighbours"
            reason = "a special token" if label < self.config.n_special_tokens else reason
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

    def _rank_bounds(
        self,
        cells: tuple[torch.Tensor | None, ...],
        size_factors: torch.Tensor | None,
        masks: PositionMasks,
    ) -> RankBounds | None:
        """Find what the visible neighbours leave possible at hidden positions; tokens and values come first.

        Returns:
            The bounds; None for a network that does not use them.

        Raises:
            ValueError: If it does, and tokens, values or size factors are missing.
        """
        if not self.config.exclude_unfit_genes:
            return None
        input_ids, expression_values = cells[:2]
        if input_ids is None or expression_values is None or size_factors is None:
            msg = "exclude_unfit_genes needs input_ids, expression_values and size_factors for the losses."
            raise ValueError(msg)
        shown = ShownCells(input_ids, expression_values, masks.is_attended, masks.is_hidden, size_factors)
        return RankBounds(shown, self.config.n_special_tokens, self.value_head.gene_weights)

    def _gene_nats(
        self,
        row_logits: torch.Tensor,
        labels: torch.Tensor,
        rows: tuple[torch.Tensor, ...],
        bounds: RankBounds | None = None,
    ) -> torch.Tensor:
        """Judge the logits (n, V) at positions, cell and place (n,) each, by the true genes (B, S).

        Returns:
            (n,) nats.
        """
        unfit = None if bounds is None else bounds.unfit(rows[0], rows[1])
        if unfit is not None:
            is_unfit = unfit(torch.arange(len(row_logits), device=row_logits.device))
            row_logits = row_logits.masked_fill(is_unfit, -torch.inf)
        self._refuse_impossible_labels(row_logits, labels[rows])
        return gene_nats(row_logits, labels[rows])

    def _gene_loss(
        self,
        row_logits: torch.Tensor | None,
        hidden_states: torch.Tensor,
        labels: torch.Tensor,
        rows: tuple[torch.Tensor, ...],
        input_ids: torch.Tensor | None,
        is_attended: torch.Tensor,
        bounds: RankBounds | None = None,
    ) -> torch.Tensor:
        """Judge genes as `_gene_nats` does; without logits from states (B, S, D), some positions at a time.

        Returns:
            (B,) mean nats of each cell.
        """
        n_cells = len(hidden_states)
        if row_logits is not None:
            return per_cell_mean(self._gene_nats(row_logits, labels, rows, bounds), rows[0], n_cells)

        def nats_of(states: torch.Tensor, *some: torch.Tensor) -> torch.Tensor:
            logits = self._gene_logits(states, some[0], input_ids, is_attended)
            return self._gene_nats(logits, labels, some, bounds)

        chunks = (part.split(self.config.loss_chunk_size) for part in (hidden_states[rows], *rows))
        nats = [
            checkpoint(nats_of, *chunk, use_reentrant=False, preserve_rng_state=False)
            for chunk in zip(*chunks, strict=True)
        ]
        return per_cell_mean(torch.cat(nats), rows[0], n_cells)

    def _expression_loss(
        self,
        law: tuple[torch.Tensor, torch.Tensor | None],
        expression_labels: torch.Tensor,
        size_factors: torch.Tensor | None,
        masks: PositionMasks,
        *,
        labels: torch.Tensor | None = None,
        bounds: RankBounds | None = None,
    ) -> torch.Tensor:
        """Judge the laws (B, S) of the values at the hidden positions by the true values (B, S).

        Returns:
            (B,) mean squared error of each cell or, for ``objective="elbo"``, mean nats of its counts.

        Raises:
            ValueError: If counts are to be judged and no size factors came.
        """
        rows = masks.is_hidden.nonzero(as_tuple=True)
        location, scale = law
        n_cells = len(location)
        if scale is None:
            return masked_expression_loss(location[rows], expression_labels[rows], rows[0], n_cells)
        if size_factors is None:
            msg = (
                'objective="elbo" is a likelihood of counts and needs size_factors (molecules of the cell / '
                "target_sum), which loaders of a corpus of raw counts give. Pass them, or leave "
                "expression_labels out."
            )
            raise ValueError(msg)
        row_factors = size_factors[rows[0]]
        counts = counts_from_values(expression_labels[rows], row_factors).clamp(min=1.0)
        if bounds is None or labels is None:
            nats = -count_log_prob(counts, row_factors, location[rows], scale[rows])
        else:
            cells, places = rows
            ends = bounds.counts(cells, places, labels[rows].clamp(min=0), row_factors.double())
            nats = -draw_counts(counts, row_factors, location[rows], scale[rows], *ends, targets=counts)[1]
        return per_cell_mean(nats.to(location.dtype), rows[0], n_cells)

    def _mean_losses(
        self, cell_losses: dict[str, torch.Tensor | None], loss_weight: torch.Tensor | None
    ) -> dict[str, torch.Tensor | None]:
        """Average the losses (B,) over the cells, each with its weight (B,), and add them up with theirs.

        Returns:
            The seven loss fields of the output.
        """
        weights = {
            "gene": 1.0,
            # Nats of counts need no weight beside nats of genes; a squared error does.
            "expression": 1.0 if self.config.objective == "elbo" else self.config.expression_loss_weight,
            "latent": self.config.latent_loss_weight,
        }
        bound = ("gene", "expression")  # the weight of a cell belongs to its bound alone
        losses = {
            kind: (part if loss_weight is None or kind not in bound else part * loss_weight).mean()
            for kind, part in cell_losses.items()
            if part is not None
        }
        total = torch.stack([weights[kind] * part for kind, part in losses.items()]).sum() if losses else None
        fields = {f"{kind}_loss": losses.get(kind) for kind in cell_losses}
        return {"loss": total} | fields | {f"cell_{kind}_loss": part for kind, part in cell_losses.items()}


__all__ = ["ScDivaDiffusionHeads"]
