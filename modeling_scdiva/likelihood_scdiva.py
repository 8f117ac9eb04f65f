"""How likely a cell is: `compute_nll` bounds it, `exact_nll` gives it for samplers of a fixed order.

Both are upper bounds on -log p(cell | library size, conditions): a cell is a set, the model speaks of its
genes in ranking order, and that order is one of many the set could come in. They count nats of the number of
gene tokens, of the genes, and of their whole counts. Where every expressed gene is a token, silent genes are
accounted for as well, and the number compares with scVI's marginal likelihood on the same genes; a cell that
was cut at ``max_genes`` is flagged, its number is one of the kept genes only.

Dimensions: N cells, B cells of one call, S positions, n draws per cell.
Source: METHOD.md section 6.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.utils import ModelOutput
from transformers.utils.logging import tqdm

from .bound_scdiva import estimate_bound, exact_log_prob
from .cell_layout_scdiva import cell_seeds, checked_conditions, trimmed
from .denoiser_scdiva import ScDivaDenoiser
from .pretrained_scdiva import evaluation_mode
from .sampling_scdiva import CellNoise
from .size_law_scdiva import length_log_prob
from .unmask_scdiva import CellState


@dataclass
class ScDivaLikelihoodOutput(ModelOutput):
    """Negative log-likelihoods of cells, in nats per cell.

    Args:
        nll: (N,) float64 sum of the parts that are there.
        gene_nll: (N,) float64 of the genes, given their number.
        value_nll: (N,) float64 of the counts, given the genes; None if they were left out.
        length_nll: (N,) float64 of the number of genes, given the library size; None for a checkpoint that
            has no law of cell sizes.
        standard_error: (N,) float64 of ``nll``, from the draws of the bound; None where it is exact.
        n_tokens: (N,) int64 genes of each cell; ``nll / n_tokens`` is nats per token.
        is_truncated: (N,) bool, True for cells with expressed genes beyond those kept; None if nobody said
            how many are expressed.
        gene_surprisal: (N, S) float64 mean nats of each gene where it was hidden, NaN elsewhere; on request.
    """

    nll: torch.Tensor | None = None
    gene_nll: torch.Tensor | None = None
    value_nll: torch.Tensor | None = None
    length_nll: torch.Tensor | None = None
    standard_error: torch.Tensor | None = None
    n_tokens: torch.Tensor | None = None
    is_truncated: torch.Tensor | None = None
    gene_surprisal: torch.Tensor | None = None


class ScDivaLikelihoodMixin:
    """What `ScDivaForMaskedDiffusion` scores cells with."""

    config: Any
    device: Any
    generation_config: Any
    _given_state: Any
    _ranking_weights: Any

    def compute_nll(  # noqa: PLR0913 - the inputs of the network, and how to estimate
        self,
        input_ids: torch.Tensor,
        expression_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        size_factors: torch.Tensor | None = None,
        condition_ids: torch.Tensor | None = None,
        n_genes_detected: torch.Tensor | None = None,
        rank_consistent: bool = False,
        ranking_weights: Any = None,
        genes_only: bool = False,
        per_gene: bool = False,
        n_draws: int = 128,
        batch_size: int = 32,
        seed: int = 0,
        show_progress: bool = False,
    ) -> ScDivaLikelihoodOutput:
        """Estimate an upper bound on the negative log-likelihood of cells.

        Args:
            input_ids: (N, S) gene tokens, nothing hidden.
            expression_values: (N, S) log1p of normalised counts.
            attention_mask: (N, S) 1 = real.
            size_factors: (N,) molecules of the cell over all its genes / target_sum.
            condition_ids: (N, K) or (K,) categories that the likelihood is conditioned on, 0 = not given.
            n_genes_detected: (N,) vocabulary genes that each cell expresses, for the flag.
            rank_consistent: Leave out of each law the genes and counts that the scores of the visible
                neighbours do not allow: a tighter bound, of which the arithmetic of the sort takes its part.
            ranking_weights: (V,) as in `generate`; for ``rank_consistent``.
            genes_only: Leave the counts out; the only way for values that are no counts.
            per_gene: Return the surprisal of each gene.
            n_draws: Network calls per cell; 128 give about 0.02 nats per token.
            batch_size: Masked cells in one call; no result depends on it beyond rounding.
            seed: Of the draws.
            show_progress: Show a bar.

        Returns:
            Nats per cell, with standard errors.

        Raises:
            ValueError: If ``n_draws`` is below 2.
        """
        if n_draws < 2:
            msg = f"n_draws must be at least 2, for a standard error, got {n_draws}."
            raise ValueError(msg)
        state = self._clean_state(
            input_ids, expression_values, attention_mask, size_factors, genes_only=genes_only
        )
        state = replace(state, condition_ids=self._scored_conditions(condition_ids, len(state.input_ids)))
        denoiser = self._bounded_denoiser(state, ranking_weights, rank_consistent=rank_consistent)
        seeds = cell_seeds(len(state.input_ids), seed, None)
        order = state.attention_mask.sum(dim=1).argsort(descending=True, stable=True)
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in ("gene", "value", "error")}
        surprisal = torch.full(state.input_ids.shape, torch.nan, dtype=torch.float64)
        bar = tqdm(total=len(order) * n_draws, unit=" masked cells", disable=not show_progress)
        with evaluation_mode(self), bar:
            for rows in order.split(max(1, batch_size)):
                part = state.select(rows)
                estimate = estimate_bound(
                    trimmed(part),
                    denoiser,
                    CellNoise(seeds[rows.cpu()].tolist(), self.device),
                    n_draws=n_draws,
                    rows_at_once=batch_size,
                    with_values=not genes_only,
                    rank_consistent=rank_consistent,
                    on_rows=bar.update,
                )
                parts["gene"].append(estimate.gene_nats.mean(dim=1))
                parts["value"].append(estimate.value_nats.mean(dim=1))
                parts["error"].append(estimate.standard_error)
                if per_gene:
                    columns = part.attention_mask.any(dim=0).nonzero().squeeze(1).cpu()
                    surprisal[rows.cpu().unsqueeze(1), columns] = estimate.gene_surprisal.cpu()
        back = order.argsort()
        gene, value, error = (torch.cat(entries)[back] for entries in parts.values())
        output = self._with_length(state, gene, None if genes_only else value, n_genes_detected)
        output.standard_error = error
        if per_gene:
            output.gene_surprisal = surprisal
        return output

    def exact_nll(  # noqa: PLR0913 - the inputs of the network, and the sampler
        self,
        input_ids: torch.Tensor,
        expression_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        order: str = "rank",
        tokens_per_step: int = 1,
        rank_consistent: bool = False,
        size_factors: torch.Tensor | None = None,
        condition_ids: torch.Tensor | None = None,
        n_genes_detected: torch.Tensor | None = None,
        ranking_weights: Any = None,
        genes_only: bool = False,
        batch_size: int = 32,
    ) -> ScDivaLikelihoodOutput:
        """Compute the exact negative log-probability with which a sampler makes cells in ranking order.

        Args:
            input_ids: (N, S) gene tokens, nothing hidden.
            expression_values: (N, S) log1p of normalised counts.
            attention_mask: (N, S) 1 = real.
            order: "rank", "margin" or "entropy".
            tokens_per_step: Genes the sampler draws at each step; a cell of L genes takes L / this calls.
            rank_consistent: Whether the sampler bounds values by the ranking scores of their neighbours.
            size_factors: (N,) molecules of the cell over all its genes / target_sum.
            condition_ids: (N, K) or (K,) categories that the likelihood is conditioned on, 0 = not given.
            n_genes_detected: (N,) vocabulary genes that each cell expresses, for the flag.
            ranking_weights: (V,) as in `generate`; for ``rank_consistent``.
            genes_only: Leave the counts out.
            batch_size: Cells in one call.

        Returns:
            Nats per cell.
        """
        state = self._clean_state(
            input_ids, expression_values, attention_mask, size_factors, genes_only=genes_only
        )
        state = replace(state, condition_ids=self._scored_conditions(condition_ids, len(state.input_ids)))
        denoiser = self._bounded_denoiser(state, ranking_weights, rank_consistent=rank_consistent)
        rows = state.attention_mask.sum(dim=1).argsort(descending=True, stable=True)
        genes, values = [], []
        with evaluation_mode(self):
            for some in rows.split(batch_size):
                gene, value = exact_log_prob(
                    trimmed(state.select(some)),
                    denoiser,
                    order=order,
                    tokens_per_step=tokens_per_step,
                    rank_consistent=rank_consistent,
                )
                genes.append(-gene)
                values.append(-value)
        back = rows.argsort()
        value_nll = None if genes_only else torch.cat(values)[back]
        return self._with_length(state, torch.cat(genes)[back], value_nll, n_genes_detected)

    def _bounded_denoiser(
        self, state: CellState, ranking_weights: Any, *, rank_consistent: bool
    ) -> ScDivaDenoiser:
        """Ask the network, where wanted between the scores of the neighbours in the cells to be scored."""
        settings = self.generation_config.updated(canonicalize=False, rank_consistent=rank_consistent)
        weights = self._ranking_weights(ranking_weights, settings)
        if rank_consistent and state.size_factors is not None:
            self._refuse_disorder(state, weights)
        return ScDivaDenoiser(self, ranking_weights=weights)

    def _refuse_disorder(self, state: CellState, weights: torch.Tensor) -> None:
        """Refuse cells that no sampler with bounds makes.

        Raises:
            ValueError: If a cell is not in ranking order.
        """
        is_front = state.attention_mask & (state.input_ids < self.config.n_special_tokens)
        scores = (state.expression_values.double() / weights[state.input_ids]).masked_fill(
            is_front, torch.inf
        )
        pairs = state.attention_mask[:, 1:] & state.attention_mask[:, :-1]
        is_wrong = pairs & (scores[:, 1:] > scores[:, :-1] * (1 + 1e-5))
        if is_wrong.any():
            cell, place = is_wrong.nonzero()[0].tolist()
            msg = (
                f"Cell {cell} is not in ranking order: the gene at position {place + 1} outranks the one "
                "before. Take cells from the tokenizer of this checkpoint, or score with "
                "rank_consistent=False."
            )
            raise ValueError(msg)

    def _scored_conditions(self, condition_ids: Any, n_cells: int) -> torch.Tensor | None:
        """Check conditions; no guidance changes a likelihood."""
        plain = self.generation_config.updated(guidance_scale=1.0)
        return checked_conditions(condition_ids, n_cells, self.config, plain, self.device)

    def _clean_state(
        self,
        input_ids: torch.Tensor,
        expression_values: torch.Tensor,
        attention_mask: torch.Tensor | None,
        size_factors: torch.Tensor | None,
        *,
        genes_only: bool,
    ) -> CellState:
        """Check cells that are to be scored.

        Returns:
            Their state.

        Raises:
            ValueError: If something is hidden, a gene has no count, or depths are missing.
        """
        state = self._given_state(input_ids, expression_values, attention_mask, size_factors)
        if state.is_masked.any():
            msg = f"{int(state.is_masked.sum())} genes are hidden. Only whole cells have a likelihood."
            raise ValueError(msg)
        if genes_only:
            return state
        if state.size_factors is None:
            msg = (
                "Counts are scored, and size_factors (molecules of the cell / target_sum) did not come. Pass "
                "them, or score genes_only=True."
            )
            raise ValueError(msg)
        is_gene = state.attention_mask & (state.input_ids >= self.config.n_special_tokens)
        counts = state.expression_values.double().expm1() * state.size_factors.unsqueeze(1)
        is_whole = (counts - counts.round()).abs() < 0.01 + 1e-5 * counts
        if not (is_whole & (counts > 0.5))[is_gene].all():
            found = float(counts[is_gene & ~(is_whole & (counts > 0.5))][0])
            msg = (
                f"Values and size_factors do not give whole counts; one gives {found:.3f}. Pass the library "
                "size that the values were normalised by, or score genes_only=True."
            )
            raise ValueError(msg)
        return state

    def _with_length(
        self,
        state: CellState,
        gene_nll: torch.Tensor,
        value_nll: torch.Tensor | None,
        n_genes_detected: torch.Tensor | None,
    ) -> ScDivaLikelihoodOutput:
        """Add the length term and the flag."""
        is_gene = state.attention_mask & (state.input_ids >= self.config.n_special_tokens)
        lengths = is_gene.sum(dim=1)
        size_law, length_nll = self.generation_config.size_law, None
        if size_law is not None:
            sizes = None
            if state.size_factors is not None:
                sizes = (state.size_factors * size_law["target_sum"]).cpu().numpy()
            nats = -length_log_prob(size_law, lengths.cpu().numpy(), sizes)
            length_nll = torch.from_numpy(nats).to(gene_nll.device)
        is_truncated = None
        if n_genes_detected is not None:
            is_truncated = torch.as_tensor(n_genes_detected, device=lengths.device) > lengths
        parts = [part for part in (gene_nll, value_nll, length_nll) if part is not None]
        return ScDivaLikelihoodOutput(
            nll=torch.stack(parts).sum(dim=0),
            gene_nll=gene_nll,
            value_nll=value_nll,
            length_nll=length_nll,
            n_tokens=lengths,
            is_truncated=is_truncated,
        )


__all__ = ["ScDivaLikelihoodMixin", "ScDivaLikelihoodOutput"]
