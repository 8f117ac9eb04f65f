"""The network as the reverse process sees it: states, gene laws and value laws of slots, with guidance.

Classifier-free guidance runs each cell twice in one call, with its conditions and with none, and combines

    log p = g * log p(gene | condition) + (1 - g) * log p(gene | nothing)      (up to a constant)

and the laws of the values in the same way; how many slots a step reveals is not touched (arXiv 2412.10193).

Dimensions: B cells in a loader batch, S positions, P positions asked for, V vocabulary, D width, n slots.
Source: METHOD.md section 5.
"""

from collections.abc import Callable
from typing import Any

import torch

from .conditions_scdiva import NOT_GIVEN
from .unmask_scdiva import CellState
from .value_law_scdiva import guided_law

# (n,) cell and (n,) position of slots -> (n, V) numbers to add to their gene logits.
SlotBias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class ScDivaDenoiser:
    """A `ScDivaForMaskedDiffusion` that answers the questions of `unmask`.

    Args:
        model: The network, in evaluation mode.
        ranking_weights: (V,) H_g + eps, by which values of neighbours bound each other; None for no bounds.
        guidance_scale: g; 1 asks with the conditions only.
        gene_bias: Called with the state at each look; gives a function of slots, (n, V) numbers to add to
            their gene logits, for classifier guidance.
    """

    def __init__(
        self,
        model: Any,
        *,
        ranking_weights: torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        gene_bias: Callable[[CellState], SlotBias] | None = None,
    ) -> None:
        self.model, self.ranking_weights = model, ranking_weights
        self.guidance_scale, self.gene_bias = guidance_scale, gene_bias
        self.mask_token_id: int = model.config.mask_token_id
        self.n_special_tokens: int = model.config.n_special_tokens
        self.vocab_size: int = model.config.vocab_size
        self._bias: SlotBias | None = None

    @property
    def is_guided(self) -> bool:
        """Whether cells are looked at twice."""
        return self.guidance_scale != 1.0

    def encode(self, state: CellState, is_asked: torch.Tensor | None = None) -> torch.Tensor:
        """Run the network once.

        Args:
            state: B cells.
            is_asked: (B, S) bool, positions whose states will be read; None for all. The last layer is
                computed for these alone.

        Returns:
            (B, 1, S, D) last hidden states, or (B, 2, S, D) with those without conditions second; NaN where
            a state was neither asked for nor computed.
        """
        input_ids = state.input_ids
        if self.model.value_head.is_gene_conditioned:
            # In training a hidden value stands at a hidden gene; a known gene is told to the value head only.
            input_ids = input_ids.masked_fill(state.is_masked & state.attention_mask, self.mask_token_id)
        inputs = {
            "input_ids": input_ids,
            "expression_values": state.expression_values,
            "attention_mask": state.attention_mask.long(),
            "is_masked": state.is_masked,
        }
        if state.condition_ids is not None:
            inputs["condition_ids"] = state.condition_ids
        if self.is_guided:
            inputs = {name: torch.cat((entries, entries)) for name, entries in inputs.items()}
            inputs["condition_ids"][len(input_ids) :] = NOT_GIVEN
        if self.gene_bias is not None:
            self._bias = self.gene_bias(state)
        positions = None
        if is_asked is not None:
            n_asked = max(1, int(is_asked.sum(dim=1).max()))
            positions = is_asked.long().argsort(dim=1, descending=True, stable=True)[:, :n_asked]
            positions = positions.repeat(2 if self.is_guided else 1, 1)  # (B or 2 B, P)
        states = self.model.model(**inputs, output_positions=positions).last_hidden_state
        if positions is not None:
            place = positions.unsqueeze(-1).expand_as(states)  # (B or 2 B, P, D)
            empty = states.new_full((len(states), *input_ids.shape[1:], states.shape[-1]), torch.nan)
            states = empty.scatter_(1, place, states)  # (B or 2 B, S, D)
        return states.unflatten(0, (-1, len(input_ids))).transpose(0, 1)

    def gene_logits(self, encoded: torch.Tensor, cells: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Score the genes of slots.

        Args:
            encoded: What `encode` returned.
            cells: (n,) int64 cell of each slot.
            places: (n,) int64 position of each slot.

        Returns:
            (n, V) float32 logits, -inf at special tokens.
        """
        logits = self.model.predict_gene_logits(encoded[cells, 0, places]).float()
        if self.is_guided:
            null_logits = self.model.predict_gene_logits(encoded[cells, 1, places]).float()
            mixed = self.guidance_scale * logits + (1.0 - self.guidance_scale) * null_logits
            logits = mixed.masked_fill(logits.isneginf(), -torch.inf)
        return logits if self._bias is None else logits + self._bias(cells, places)

    def value_law(
        self, encoded: torch.Tensor, cells: torch.Tensor, places: torch.Tensor, gene_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the laws of the values of genes.

        Args:
            encoded: What `encode` returned.
            cells: (n,) int64 cell of each slot.
            places: (n,) int64 position of each slot.
            gene_ids: (n,) int64 gene that stands there.

        Returns:
            (n,) float32 location and (n,) float32 scale, log1p units.
        """
        law = self.model.predict_value_law(encoded[cells, 0, places], gene_ids)
        if not self.is_guided:
            return law
        null_law = self.model.predict_value_law(encoded[cells, 1, places], gene_ids)
        return guided_law(law, null_law, self.guidance_scale)

    def quality(self, encoded: torch.Tensor, cells: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Judge visible genes.

        Args:
            encoded: What `encode` returned.
            cells: (n,) int64 cell of each gene.
            places: (n,) int64 position of each gene.

        Returns:
            (n,) float32 log-odds that the gene is right.
        """
        return self.model.predict_quality(encoded[cells, 0, places])


__all__ = ["ScDivaDenoiser", "SlotBias"]
