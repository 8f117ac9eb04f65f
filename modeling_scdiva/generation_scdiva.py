"""Generation: new cells, edited cells, completed cells, hidden values; every one of them through `unmask`.

Notable choices:
- What a cell shows at the start is in the result unchanged, to the last bit; `is_generated` tells the rest.
- Every cell has its own seed, so the same seed gives the same cells whatever the batch size. Logits of one
  cell in other company differ by rounding, which once in a great many draws picks another gene.
- Nothing is guessed: conditions, genes and sizes that the network does not know are refused by name.

Dimensions: N cells, B cells of one call, S positions, V vocabulary, K conditions.
Source: METHOD.md section 5.
"""

import json
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers.utils.logging import tqdm

from .cell_layout_scdiva import (
    cell_seeds,
    check_lengths,
    check_tokens,
    checked_conditions,
    checked_factors,
    collected,
    hide_share,
    n_new_cells,
    trimmed,
    with_slots,
)
from .conditions_scdiva import encode_conditions
from .denoiser_scdiva import ScDivaDenoiser
from .generation_config_scdiva import ScDivaGenerationConfig, ScDivaGenerationOutput
from .outputs_scdiva import pooled_positions
from .pretrained_scdiva import evaluation_mode
from .sampling_scdiva import CellNoise
from .size_law_scdiva import draw_sizes
from .steering_scdiva import Steering
from .unmask_scdiva import CellState, unmask

# Tells the seed that draws the size of a cell from the one that draws its genes.
SIZE_SEED = 0x5CD1
LOADING = (
    "cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder",
)  # fmt: skip
# What every way to generate takes beside settings.
FINISHING = ("condition_ids", "ranking_weights", "steering", "show_progress")


class ScDivaGenerationMixin:
    """What `ScDivaForMaskedDiffusion` generates with."""

    generation_config_class: Any = ScDivaGenerationConfig
    generation_config: Any
    config: Any
    device: Any
    value_head: Any

    def adjust_generation_fn(
        self,
        generation_config: Any,
        from_auto_class: Any,
        from_pipeline: Any,
        pretrained_model_name_or_path: Any,
        **kwargs: Any,
    ) -> None:
        """Load the settings of generation beside the weights; `from_pretrained` calls this.

        Args:
            generation_config: Settings to take instead.
            from_auto_class: Unused.
            from_pipeline: Unused.
            pretrained_model_name_or_path: Checkpoint folder or Hub id.
            **kwargs: How to reach it.

        Raises:
            OSError: If their file is damaged.
        """
        loading = {name: kwargs[name] for name in LOADING if name in kwargs}
        if generation_config is not None:
            self.generation_config = ScDivaGenerationConfig.from_dict(generation_config.to_dict())
            return
        if pretrained_model_name_or_path is None:  # weights came as a state_dict
            return
        try:
            self.generation_config = ScDivaGenerationConfig.from_pretrained(
                pretrained_model_name_or_path, **loading
            )
        except OSError as error:
            if isinstance(error.__context__, json.JSONDecodeError | UnicodeDecodeError):
                raise  # the file is there, and damaged
            self.generation_config = ScDivaGenerationConfig()  # a checkpoint from before there were any

    def generate(  # noqa: PLR0913 - the inputs of the network, what is wanted, and how
        self,
        input_ids: torch.Tensor | None = None,
        expression_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        n_cells: int | None = None,
        n_genes: int | torch.Tensor | None = None,
        strength: float = 1.0,
        size_factors: torch.Tensor | None = None,
        condition_ids: torch.Tensor | None = None,
        ranking_weights: Any = None,
        steering: Steering | None = None,
        generation_config: ScDivaGenerationConfig | None = None,
        generator: torch.Generator | None = None,
        show_progress: bool = False,
        **overrides: Any,
    ) -> ScDivaGenerationOutput:
        """Make new cells, or start from real ones and make a share of their genes anew.

        Args:
            input_ids: (N, S) cells to start from; none makes new cells.
            expression_values: (N, S) their values.
            attention_mask: (N, S) 1 = real.
            n_cells: Number of new cells.
            n_genes: Gene tokens of each new cell, one number or (N,); drawn from the size law if not given.
            strength: Share of the genes of the cells to start from that is made anew, in [0, 1].
            size_factors: (N,) molecules of the cell / target_sum; drawn from the size law for new cells if
                not given. Without them values are no counts.
            condition_ids: (N, K) or (K,) categories, 0 = not given; see `encode_conditions`.
            ranking_weights: (V,) weights H_g + eps, ``tokenizer.ranking_weights``; known to a network with
                ``value_head="gene"``.
            steering: Classifier guidance or particles with a reward.
            generation_config: Settings; those of the checkpoint if not given.
            generator: Gives the seeds of the cells, instead of the ``seed`` setting.
            show_progress: Show a bar.
            **overrides: Single settings, before those of the configuration.

        Returns:
            The cells.

        Raises:
            ValueError: If the request cannot be met; the message says which part.
        """
        config = self._settings(generation_config, overrides)
        if input_ids is not None:
            if n_cells is not None or n_genes is not None:
                msg = "n_cells and n_genes are for new cells; input_ids came, which are cells to start from."
                raise ValueError(msg)
            state = self._given_state(input_ids, expression_values, attention_mask, size_factors)
            seeds = cell_seeds(len(input_ids), config.seed, generator)
            state = hide_share(state, seeds, strength, self.config)
        else:
            if expression_values is not None or attention_mask is not None or strength != 1.0:
                msg = "expression_values, attention_mask and strength need input_ids, cells to start from."
                raise ValueError(msg)
            n_cells = n_new_cells(n_cells, n_genes)
            seeds = cell_seeds(n_cells, config.seed, generator)
            state = self._new_state(n_cells, n_genes, size_factors, seeds, config)
        return self._finish(
            state,
            seeds,
            config,
            condition_ids=condition_ids,
            ranking_weights=ranking_weights,
            steering=steering,
            show_progress=show_progress,
        )

    def denoise(
        self,
        input_ids: torch.Tensor,
        expression_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        strength: float,
        **options: Any,
    ) -> ScDivaGenerationOutput:
        """Hide a share of the genes of real cells and make them anew; the others stay what they are.

        Args:
            input_ids: (N, S) cells.
            expression_values: (N, S) their values.
            attention_mask: (N, S) 1 = real.
            strength: Share of the genes of each cell, in [0, 1].
            **options: As in `generate`.

        Returns:
            The cells.
        """
        return self.generate(input_ids, expression_values, attention_mask, strength=strength, **options)

    def complete(
        self,
        input_ids: torch.Tensor,
        expression_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        n_genes: int | torch.Tensor | None = None,
        **options: Any,
    ) -> ScDivaGenerationOutput:
        """Fill in what cells hide, and add genes up to a number; the genes given stay what they are.

        Args:
            input_ids: (N, S) cells; ``mask_token_id`` stands for a gene to fill in at that rank.
            expression_values: (N, S) their values, anything where the gene is hidden.
            attention_mask: (N, S) 1 = real.
            n_genes: Gene tokens of each finished cell, one number or (N,); the new ones rank behind those
                given. Default: as many as there are.
            **options: As in `generate`.

        Returns:
            The cells.
        """
        size_factors, generator = options.pop("size_factors", None), options.pop("generator", None)
        finishing = {name: options.pop(name) for name in FINISHING if name in options}
        config = self._settings(options.pop("generation_config", None), options)
        state = self._given_state(input_ids, expression_values, attention_mask, size_factors)
        if n_genes is not None:
            state = with_slots(state, n_genes, self.config)
        return self._finish(state, cell_seeds(len(input_ids), config.seed, generator), config, **finishing)

    def encode_conditions(self, columns: dict[str, Any], n_cells: int) -> torch.Tensor:
        """Turn names of conditions into ``condition_ids``.

        Args:
            columns: Name -> category of all cells or (N,) categories, such as ``{"cell_type": "B cell"}``.
            n_cells: Number of cells N.

        Returns:
            (N, K) int64 ids, 0 = not given.
        """
        return encode_conditions(columns, n_cells, self.config.conditions or {})

    @torch.no_grad()
    def impute(
        self,
        input_ids: torch.Tensor,
        expression_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        is_masked: torch.Tensor | None = None,
        query_ids: torch.Tensor | None = None,
        **options: Any,
    ) -> ScDivaGenerationOutput:
        """Predict values: at slots whose gene is known, or of any genes that are asked for.

        Args:
            input_ids: (N, S) cells.
            expression_values: (N, S) their values, anything where hidden.
            attention_mask: (N, S) 1 = real.
            is_masked: (N, S) bool, True where the value is wanted. One network call gives the centres of the
                laws; ``value_temperature=1`` and ``steps`` draw from them instead.
            query_ids: (Q,) or (N, Q) genes to ask the gene-query decoder for.
            **options: As in `generate`.

        Returns:
            The cells with these values; for ``query_ids`` the genes asked for and their expected values.

        Raises:
            ValueError: If not exactly one of ``is_masked`` and ``query_ids`` came, or of another shape.
        """
        if (is_masked is None) == (query_ids is None):
            msg = "Pass is_masked for values at slots, or query_ids for any genes: one of the two."
            raise ValueError(msg)
        size_factors, generator = options.pop("size_factors", None), options.pop("generator", None)
        finishing = {name: options.pop(name) for name in FINISHING if name in options}
        posterior_mean = {"steps": 1, "value_temperature": 0.0, "canonicalize": False}
        config = self._settings(options.pop("generation_config", None), posterior_mean | options)
        state = self._given_state(input_ids, expression_values, attention_mask, size_factors)
        if query_ids is not None:
            given = finishing.get("condition_ids")
            ids = checked_conditions(given, len(state.input_ids), self.config, config, self.device)
            return self._answer_queries(replace(state, condition_ids=ids), query_ids)
        is_wanted = torch.as_tensor(is_masked, device=self.device).bool()
        if is_wanted.shape != state.input_ids.shape:
            wanted, found = tuple(state.input_ids.shape), tuple(is_wanted.shape)
            msg = f"is_masked must have the shape of input_ids, {wanted}, got {found}."
            raise ValueError(msg)
        is_gene = state.attention_mask & (state.input_ids >= self.config.n_special_tokens)
        state = replace(state, is_masked=state.is_masked | (is_wanted & is_gene))
        return self._finish(state, cell_seeds(len(input_ids), config.seed, generator), config, **finishing)

    def _answer_queries(self, state: CellState, query_ids: torch.Tensor) -> ScDivaGenerationOutput:
        """Ask the gene-query decoder; probability times value is the expected value.

        Returns:
            The genes asked for, with these values.

        Raises:
            ValueError: If a token asked for is no gene.
        """
        model: Any = self
        query_ids = torch.as_tensor(query_ids, device=self.device)
        is_gene = (query_ids >= self.config.n_special_tokens) & (query_ids < self.config.vocab_size)
        if not is_gene.all():
            msg = f"query_ids hold the token {int(query_ids[~is_gene][0])}, which is no gene."
            raise ValueError(msg)
        with evaluation_mode(model):
            states = model.model(
                state.input_ids,
                state.expression_values,
                state.attention_mask.long(),
                state.is_masked,
                condition_ids=state.condition_ids,
                output_positions=pooled_positions("lat"),
            ).last_hidden_state
            log_odds, values = model.decode_genes(states[:, 0], query_ids)
        expected = log_odds.sigmoid() * values
        ones = torch.ones(expected.shape, dtype=torch.long, device=self.device)
        return ScDivaGenerationOutput(
            input_ids=query_ids.expand(expected.shape),
            expression_values=expected,
            attention_mask=ones,
            is_generated=ones.bool(),
        )

    def _settings(
        self, generation_config: ScDivaGenerationConfig | None, overrides: dict[str, Any]
    ) -> ScDivaGenerationConfig:
        """Merge settings: single ones first, then the configuration passed, then the checkpoint's."""
        config = self.generation_config if generation_config is None else generation_config
        if not isinstance(config, ScDivaGenerationConfig):
            msg = f"generation_config must be a ScDivaGenerationConfig, got {type(config).__name__}."
            raise TypeError(msg)
        return config.updated(**overrides)

    def _given_state(
        self,
        input_ids: torch.Tensor,
        expression_values: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        size_factors: torch.Tensor | None,
    ) -> CellState:
        """Check cells that came, and bring them to the device.

        Returns:
            Their state; hidden is what carries the mask token.

        Raises:
            ValueError: If shapes differ.
        """
        if expression_values is None or expression_values.shape != input_ids.shape:
            found = None if expression_values is None else tuple(expression_values.shape)
            msg = (
                f"expression_values must have the shape of input_ids, {tuple(input_ids.shape)}, got {found}."
            )
            raise ValueError(msg)
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            wanted, found = tuple(input_ids.shape), tuple(attention_mask.shape)
            msg = f"attention_mask must have the shape of input_ids, {wanted}, got {found}."
            raise ValueError(msg)
        input_ids, config = input_ids.to(self.device), self.config
        is_attended = input_ids != config.pad_token_id
        if attention_mask is not None:
            is_attended = attention_mask.to(self.device).bool()
        input_ids = input_ids.masked_fill(~is_attended, config.pad_token_id)  # what was there is not read
        check_tokens(input_ids, config)
        values = expression_values.to(self.device, torch.float32)
        return CellState(
            input_ids=input_ids,
            expression_values=values.masked_fill(~is_attended, 0.0),
            attention_mask=is_attended,
            is_masked=(input_ids == config.mask_token_id) & is_attended,
            size_factors=checked_factors(size_factors, len(input_ids), self.device),
        )

    def _new_state(
        self,
        n_cells: int,
        n_genes: int | torch.Tensor | None,
        size_factors: torch.Tensor | None,
        seeds: torch.Tensor,
        config: ScDivaGenerationConfig,
    ) -> CellState:
        """Lay out cells with every gene hidden.

        Returns:
            Their state.

        Raises:
            ValueError: If sizes are missing.
        """
        factors = checked_factors(size_factors, n_cells, self.device)
        lengths = None
        if n_genes is not None:
            lengths = torch.as_tensor(n_genes, dtype=torch.long).expand(n_cells).cpu().numpy()
        if config.size_law is not None and (lengths is None or factors is None):
            noise = CellNoise((seeds ^ SIZE_SEED).tolist())
            draws = noise.uniforms(torch.arange(n_cells), torch.ones(n_cells, 1, dtype=torch.bool), 3)
            target_sum = config.size_law["target_sum"]
            sizes = None if factors is None else factors.cpu().numpy() * target_sum
            lengths, drawn = draw_sizes(
                config.size_law, draws[:, :, 0].T.numpy(), n_genes=lengths, library_sizes=sizes
            )
            if factors is None and drawn is not None:
                factors = torch.from_numpy(drawn / target_sum).to(self.device)
        if lengths is None:
            msg = (
                "n_genes did not come, and this checkpoint has no law of cell sizes. Pass n_genes, or set "
                "generation_config.size_law by fit_size_law."
            )
            raise ValueError(msg)
        check_lengths(lengths, self.config)
        width = 1 + int(lengths.max(initial=0))
        is_attended = torch.arange(width) <= torch.from_numpy(np.asarray(lengths)).unsqueeze(1)
        input_ids = torch.where(is_attended, self.config.mask_token_id, self.config.pad_token_id)
        input_ids[:, 0] = self.config.lat_token_id
        is_masked = is_attended.clone()
        is_masked[:, 0] = False
        values = torch.zeros(n_cells, width)
        tensors = (part.to(self.device) for part in (input_ids, values, is_attended, is_masked))
        new: Any = CellState(*tensors)
        return replace(new, size_factors=factors)

    def _finish(
        self,
        state: CellState,
        seeds: torch.Tensor,
        config: ScDivaGenerationConfig,
        *,
        condition_ids: torch.Tensor | None = None,
        ranking_weights: Any = None,
        steering: Steering | None = None,
        show_progress: bool = False,
    ) -> ScDivaGenerationOutput:
        """Unmask all cells in batches of nearly equal length, and put them into ranking order.

        Returns:
            The cells in the order they came.
        """
        n_cells = len(state.input_ids)
        weights = self._ranking_weights(ranking_weights, config)
        state = replace(
            state,
            condition_ids=checked_conditions(condition_ids, n_cells, self.config, config, self.device),
            cell_index=torch.arange(n_cells, device=self.device),
        )
        order = state.attention_mask.sum(dim=1).argsort(descending=True, stable=True)
        done = []
        n_hidden = int((state.is_masked & state.attention_mask).sum())
        if steering is not None:
            steering.check(n_cells, self.config)
        judging = nullcontext() if steering is None else evaluation_mode(steering.classifier)
        bar = tqdm(total=n_hidden, unit=" genes", disable=not show_progress)
        with evaluation_mode(self), judging, bar:
            for rows in order.split(config.batch_size):
                denoiser = ScDivaDenoiser(
                    self,
                    ranking_weights=weights,
                    guidance_scale=config.guidance_scale,
                    gene_bias=None if steering is None else steering.gene_bias,
                )
                part = trimmed(state.select(rows))
                start = int((part.is_masked & part.attention_mask).sum())
                row_seeds = seeds[rows.cpu()]
                if steering is None or steering.n_particles == 1:
                    noise = CellNoise(row_seeds.tolist(), self.device)
                    left = [start]  # hidden after each step, for the bar

                    def advance(n_hidden: int, left: list[int] = left) -> None:
                        bar.update(left.pop() - n_hidden)
                        left.append(n_hidden)

                    settings = config.unmask_settings()
                    done.append(unmask(part, denoiser, settings, noise, on_step=advance))
                else:
                    done.append(steering.run(part, denoiser, config.unmask_settings(), row_seeds))
                    bar.update(start)
        return collected(done, order, state, weights, self.config, is_canonical=config.canonicalize)

    def _ranking_weights(self, given: Any, config: ScDivaGenerationConfig) -> torch.Tensor | None:
        """Take the ranking weights from where they are.

        Returns:
            (V,) float64, or None where nothing needs them.

        Raises:
            ValueError: If they are needed and nowhere, or of another size.
        """
        if given is not None:
            weights = torch.as_tensor(given, dtype=torch.float64, device=self.device)
            if weights.shape != (self.config.vocab_size,):
                wanted = (self.config.vocab_size,)
                msg = f"ranking_weights must have shape {wanted}, got {tuple(weights.shape)}."
                raise ValueError(msg)
            return weights
        if self.value_head.is_gene_conditioned:
            return self.value_head.gene_weights.double()
        if config.canonicalize or config.rank_consistent:
            msg = (
                "This network does not know the ranking weights. Pass "
                "ranking_weights=tokenizer.ranking_weights, or set canonicalize=False and "
                "rank_consistent=False."
            )
            raise ValueError(msg)
        return None
