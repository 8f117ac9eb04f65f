"""scDiVa for perturbation response: a control cell and the targeted genes in, the change of any gene out.

A cell is `<lat> <pert> gene gene ...`. What stands at `<pert>` is the embedding of that token plus the mean
of the embeddings of the targeted genes, so combinations and targets that were never perturbed need no new
rows.

Notable choices:
- `<pert>` shares the position of `<lat>`: the genes stay at the positions they had in pretraining.
- The change of a gene is decoded from [gene embedding ; state of `<lat>` ; state of `<pert>`], for any gene,
  expressed or not, among the tokens of the cell or not.
- The decoder gives a size and a gate; change = mean change + sigmoid(gate) * size. Most genes do not respond.
- The mean change of each gene over the training perturbations is stored beside the decoder, zero until it is
  set: what all perturbations share need not be learned, and where the decoder is silent, that mean remains.
- Loss = weighted squared error + a ranking term that wants the genes that respond to change more than those
  that do not.

Dimensions: B cells in a loader batch, S positions, V vocabulary, D width, T targeted genes, Q genes asked
for.
Source: METHOD.md section 7.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from modeling_scdiva.configuration_scdiva import ScDivaConfig
from modeling_scdiva.layers_scdiva import ScDivaGeneQueryDecoder
from modeling_scdiva.modeling_scdiva import ScDivaModel
from modeling_scdiva.pretrained_scdiva import ScDivaPreTrainedModel

# Changes of mean log1p expression are of this size; the ranking term is steep on this scale.
RANKING_TEMPERATURE = 0.1
RANKING_LOSS_WEIGHT = 0.1


@dataclass
class ScDivaPerturbationOutput(ModelOutput):
    """What `ScDivaForPerturbation` returns; losses are there when targets came.

    Args:
        loss: Delta loss + 0.1 * ranking loss, the latter where ``is_de`` came.
        delta_loss: Weighted mean squared error of the changes, squared log1p units times the weights.
        ranking_loss: Mean over pairs of a responding and another gene of softplus(difference of sizes / 0.1).
        expression_deltas: (B, Q) float32 predicted changes, log1p of normalised counts.
        last_hidden_state: (B, S, D) states after the last norm.
        hidden_states: (B, S, D) states after the embedding and after each layer.
        attentions: (B, H, S, S) attention weights of each layer.
    """

    loss: torch.Tensor | None = None
    delta_loss: torch.Tensor | None = None
    ranking_loss: torch.Tensor | None = None
    expression_deltas: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class ScDivaDeltaDecoder(nn.Module):
    """Decode the change of genes from the states of `<lat>` and `<pert>`."""

    mean_deltas: torch.Tensor

    def __init__(self, config: ScDivaConfig) -> None:
        super().__init__()
        self.query_decoder = ScDivaGeneQueryDecoder(config, n_context=2)
        self.register_buffer("mean_deltas", torch.zeros(config.vocab_size))  # (V,)

    def forward(
        self, context: torch.Tensor, gene_ids: torch.Tensor, gene_embeddings: torch.Tensor
    ) -> torch.Tensor:
        """Decode changes.

        Args:
            context: (B, 2 D) states of `<lat>` and `<pert>`.
            gene_ids: (Q,) int64 genes asked for.
            gene_embeddings: (Q, D) their embeddings.

        Returns:
            (B, Q) float32 changes of log1p expression.
        """
        size, gate = self.query_decoder(context, gene_embeddings).unbind(dim=-1)
        return self.mean_deltas[gene_ids].float() + size * torch.sigmoid(gate)


class ScDivaForPerturbation(ScDivaPreTrainedModel):
    """The encoder with a decoder of expression changes."""

    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012 - declared so by the base class
        r"^lm_head\.",
        r"^gene_transform\.",
        r"^value_head\.",
        r"^query_decoder\.",
        r"^classifier\.",
    ]
    _fresh_head_prefix = "delta_decoder."

    def __init__(self, config: ScDivaConfig) -> None:
        super().__init__(config)
        self.model = ScDivaModel(config)
        self.delta_decoder = ScDivaDeltaDecoder(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ScDivaDeltaDecoder):
            init.zeros_(module.mean_deltas)

    def set_mean_deltas(self, gene_ids: Any, mean_deltas: Any) -> None:
        """Store the mean change of genes over the training perturbations; it travels with the checkpoint.

        Args:
            gene_ids: (G,) genes it is known for; all others get zero.
            mean_deltas: (G,) finite changes of log1p expression.

        Raises:
            ValueError: If the shapes differ or a change is not finite.
        """
        stored = self.delta_decoder.mean_deltas
        tokens = torch.as_tensor(gene_ids, device=stored.device)
        deltas = torch.as_tensor(mean_deltas, device=stored.device).to(stored.dtype)
        if tokens.shape != deltas.shape or not torch.isfinite(deltas).all():
            msg = (
                f"mean_deltas must be one finite change per gene, got {tuple(deltas.shape)} for "
                f"{tuple(tokens.shape)} genes. Leave genes that were not measured out of both."
            )
            raise ValueError(msg)
        stored.zero_()
        stored[tokens] = deltas

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        """Smallest inputs the model runs on: one cell, one target, two genes asked for."""
        input_ids, values = add_pert_token(
            super().dummy_inputs["input_ids"],
            super().dummy_inputs["expression_values"],
            pert_token_id=self.config.pert_token_id,
        )
        gene_ids = torch.arange(2, device=self.device) % (
            self.config.vocab_size - self.config.n_special_tokens
        )
        gene_ids = gene_ids + self.config.n_special_tokens
        inputs = {"input_ids": input_ids, "expression_values": values}
        return inputs | {"target_ids": gene_ids[:1].unsqueeze(0), "gene_ids": gene_ids}

    @can_return_tuple
    def forward(  # noqa: PLR0913 - the inputs of the encoder, the question and its targets
        self,
        input_ids: torch.Tensor | None = None,
        expression_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        is_masked: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        target_ids: torch.Tensor | None = None,
        gene_ids: torch.Tensor | None = None,
        delta_labels: torch.Tensor | None = None,
        gene_weights: torch.Tensor | None = None,
        is_de: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple | ScDivaPerturbationOutput:
        """Predict how the genes asked for change when the targeted genes are perturbed in these cells.

        Args:
            input_ids: (B, S) tokens of control cells with `<pert>` behind `<lat>`, see `add_pert_token`.
            expression_values: (B, S) log1p of normalised counts.
            attention_mask: (B, S) 1 = real, 0 = padding; derived from the padding tokens when not given.
            is_masked: (B, S) bool, True where the value is hidden.
            position_ids: (B, S) or (1, S) ranks; 0, 0, 1 .. S - 2 when not given.
            target_ids: (B, T) int64 targeted genes, ``pad_token_id`` behind the fewer; none leaves `<pert>`
                alone.
            gene_ids: (Q,) int64 genes asked for, the same for all cells.
            delta_labels: (B, Q) true changes.
            gene_weights: (Q,) weights of the squared error; ones when not given.
            is_de: (B, Q) bool, genes that respond to the perturbation of the cell.
            **kwargs: ``output_hidden_states``, ``output_attentions``, ``return_dict``, and what kernels take.

        Returns:
            The changes, the losses when targets came, and states.

        Raises:
            ValueError: If cells or genes did not come; also if a cell has no `<pert>` at position 1.
        """
        kwargs.pop("num_items_in_batch", None)  # Trainer's count; the loss is a mean over cells
        if input_ids is None or gene_ids is None:
            missing = "input_ids" if input_ids is None else "gene_ids"
            msg = f"{missing} did not come. Pass cells with `<pert>` and the genes whose change is asked for."
            raise ValueError(msg)
        self._refuse_other_cells(input_ids)
        if position_ids is None:
            position_ids = (torch.arange(input_ids.shape[1], device=input_ids.device) - 1).clamp(min=0)[None]
        outputs = self.model(
            input_ids,
            expression_values,
            attention_mask,
            is_masked,
            position_ids,
            self._embed_perturbation(input_ids, target_ids),
            **kwargs,
        )
        context = outputs.last_hidden_state[:, :2].flatten(start_dim=1)  # (B, 2 D)
        deltas = self.delta_decoder(context, gene_ids, self.model.embed_tokens(gene_ids))  # (B, Q)
        loss = delta_loss = ranking_loss = None
        if delta_labels is not None:
            squared = (deltas - delta_labels.float()) ** 2
            loss = delta_loss = (squared if gene_weights is None else squared * gene_weights.float()).mean()
            if is_de is not None:
                ranking_loss = de_ranking_loss(deltas, is_de)
                loss = delta_loss + RANKING_LOSS_WEIGHT * ranking_loss
        return ScDivaPerturbationOutput(
            loss=loss,
            delta_loss=delta_loss,
            ranking_loss=ranking_loss,
            expression_deltas=deltas,
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _embed_perturbation(self, input_ids: torch.Tensor, target_ids: torch.Tensor | None) -> torch.Tensor:
        """Embed the tokens (B, S) and add the mean embedding of the targets (B, T) at `<pert>`.

        Returns:
            (B, S, D) embeddings.
        """
        embeddings = self.model.embed_tokens(input_ids)
        if target_ids is None or target_ids.shape[1] == 0:
            return embeddings
        is_target = (target_ids != self.config.pad_token_id).unsqueeze(-1)  # (B, T, 1)
        total = (self.model.embed_tokens(target_ids) * is_target).sum(dim=1)  # (B, D)
        mean = total / is_target.sum(dim=1).clamp(min=1)
        is_pert = torch.arange(input_ids.shape[1], device=input_ids.device) == 1  # (S,)
        return embeddings + mean.unsqueeze(1) * is_pert[None, :, None]

    def _refuse_other_cells(self, input_ids: torch.Tensor) -> None:
        """Refuse cells (B, S) without `<pert>` in its place.

        Raises:
            ValueError: If there are such.
        """
        if torch.compiler.is_compiling():
            return  # a branch on data would break the graph
        is_pert = input_ids == self.config.pert_token_id
        if input_ids.shape[1] < 2 or not (is_pert[:, 1] & (is_pert.sum(dim=1) == 1)).all():
            msg = (
                f"Every cell needs the token {self.config.pert_token_id} (`<pert>`) once, at position 1 "
                "behind `<lat>`. Put it there with add_pert_token."
            )
            raise ValueError(msg)


def add_pert_token(
    input_ids: torch.Tensor,
    expression_values: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    pert_token_id: int,
) -> tuple[torch.Tensor, ...]:
    """Put `<pert>` behind `<lat>`.

    Args:
        input_ids: (B, S) tokens, `<lat>` first.
        expression_values: (B, S) values.
        attention_mask: (B, S) 1 = real, or None.
        pert_token_id: Token of `<pert>`.

    Returns:
        The same, each (B, S + 1); the mask only if one came.
    """
    widened = []
    for tensor, fill in ((input_ids, pert_token_id), (expression_values, 0), (attention_mask, 1)):
        if tensor is not None:
            column = torch.full_like(tensor[:, :1], fill)
            widened.append(torch.cat((tensor[:, :1], column, tensor[:, 1:]), dim=1))
    return tuple(widened)


def de_ranking_loss(deltas: torch.Tensor, is_de: torch.Tensor) -> torch.Tensor:
    """Ask that genes that respond are predicted to change more, up or down, than genes that do not.

    Args:
        deltas: (B, Q) predicted changes, float32.
        is_de: (B, Q) bool, genes that respond.

    Returns:
        Scalar: mean over the cells with both kinds of genes of the mean over all pairs of
        softplus((size of the other - size of the responding) / 0.1); 0 where there is no pair.
    """
    sizes = deltas.abs() / RANKING_TEMPERATURE
    pairs = nn.functional.softplus(sizes.unsqueeze(1) - sizes.unsqueeze(2))  # (B, Q responding, Q other)
    is_pair = (is_de.unsqueeze(2) & ~is_de.unsqueeze(1)).to(pairs.dtype)
    n_pairs = is_pair.sum(dim=(1, 2))  # (B,)
    cell_losses = (pairs * is_pair).sum(dim=(1, 2)) / n_pairs.clamp(min=1)
    return cell_losses.sum() / (n_pairs > 0).sum().clamp(min=1)


__all__ = ["ScDivaForPerturbation", "ScDivaPerturbationOutput", "add_pert_token", "de_ranking_loss"]
