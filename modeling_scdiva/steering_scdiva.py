"""Steering the reverse process: by a classifier's gradient, or by particles and any reward.

Classifier guidance adds to the logit of each gene what putting it at a slot would do to log p(label | cell)
to first order: the slope of the classifier at the embedding of `<mask>` there, along the gene's embedding.
The classifier must have seen masked cells.

Particles need nothing but numbers. Each cell is sampled several times side by side; at each step the finished
cell is guessed from the same network call and rewarded; where the weights have become uneven, the particles
of one cell are drawn anew among themselves. The law of the result is p(cell) * exp(reward) in the limit of
many particles (twisted sequential Monte Carlo). With ``resample="end"`` the best of the finished is taken.

Dimensions: B cells in a loader batch, S positions, V vocabulary, D width, P particles of a cell, n slots.
Source: METHOD.md section 5.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from .denoiser_scdiva import ScDivaDenoiser, SlotBias
from .sampling_scdiva import CellNoise, gene_log_law, invert_law
from .unmask_scdiva import CellState, UnmaskedCells, UnmaskSettings, unmask

# (B, S) tokens, (B, S) values, (B, S) 1 = real -> (B,) reward in nats.
Reward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
RESAMPLING_SEED = 0x5CD3


@dataclass
class Steering:
    """What to steer by: a classifier with labels, or a reward with particles.

    Attributes:
        classifier: A `ScDivaForSequenceClassification` with the gene vocabulary of the generating network.
        labels: (N,) int64 class wanted of each cell.
        classifier_scale: Factor of the classifier's pull; 1 is Bayes' rule for a perfect classifier.
        reward: Called with tokens, values and attention mask of cells; gives nats, higher is better.
        n_particles: Particles of each cell P.
        resample: "steps" draws among the particles on the way, "end" takes the best of the finished ones.
    """

    classifier: Any = None
    labels: torch.Tensor | None = None
    classifier_scale: float = 1.0
    reward: Reward | None = None
    n_particles: int = 1
    resample: Literal["steps", "end"] = "steps"

    def __post_init__(self) -> None:
        if (self.classifier is None) == (self.reward is None):
            msg = "Steering takes a classifier with labels, or a reward with n_particles: one of the two."
            raise ValueError(msg)
        if self.classifier is not None and (self.labels is None or self.n_particles != 1):
            msg = "Classifier guidance needs labels, one per cell, and has no particles."
            raise ValueError(msg)
        if self.reward is not None and self.n_particles < 2:
            msg = f"A reward chooses among particles: n_particles must be at least 2, got {self.n_particles}."
            raise ValueError(msg)
        if self.resample not in ("steps", "end"):
            msg = f'resample must be "steps" or "end", got {self.resample!r}.'
            raise ValueError(msg)

    def check(self, n_cells: int, network: Any) -> None:
        """Refuse labels and a classifier that do not fit.

        Args:
            n_cells: Cells to generate N.
            network: `ScDivaConfig` of the generating network.

        Raises:
            ValueError: If labels are not one class per cell, or the classifier has another vocabulary.
        """
        if self.classifier is None or self.labels is None:
            return
        judge = self.classifier.config
        hashes = {judge.vocabulary_hash, network.vocabulary_hash} - {None}
        if judge.vocab_size != network.vocab_size or len(hashes) > 1:
            msg = (
                f"The classifier has another gene vocabulary ({judge.vocab_size:,} tokens, the network has "
                f"{network.vocab_size:,}): the same token would be another gene. Train one for this network."
            )
            raise ValueError(msg)
        is_class = (self.labels >= 0) & (self.labels < judge.num_labels)
        if self.labels.shape != (n_cells,) or not is_class.all():
            msg = (
                f"labels must be {n_cells} classes in 0 .. {judge.num_labels - 1}, one per cell, got shape "
                f"{tuple(self.labels.shape)} and {sorted(set(self.labels.flatten().tolist()))[:5]}."
            )
            raise ValueError(msg)

    def describe(self) -> dict[str, Any]:
        """Say in plain values what steers, for the record of generated cells.

        Returns:
            ``kind`` and the numbers that go with it.
        """
        if self.classifier is not None and self.labels is not None:
            names = self.classifier.config.id2label
            wanted = sorted({str(names[label]) for label in self.labels.tolist()})
            return {"kind": "classifier", "classifier_scale": self.classifier_scale, "labels": wanted}
        name = getattr(self.reward, "__name__", type(self.reward).__name__)
        return {
            "kind": "reward",
            "reward": name,
            "n_particles": self.n_particles,
            "resample": self.resample,
        }

    @property
    def gene_bias(self) -> Callable[[CellState], SlotBias] | None:
        """What the denoiser calls at each look; None without a classifier."""
        return None if self.classifier is None else self._classifier_bias

    def _classifier_bias(self, state: CellState) -> SlotBias:
        """Find the slope of log p(label) at the gene embedding of each position.

        Returns:
            Function of slots that gives the pull on each gene there.
        """
        network = self.classifier
        embedding = network.get_input_embeddings().weight  # (V, D)
        with torch.enable_grad():
            inputs_embeds = embedding[state.input_ids].detach().requires_grad_(requires_grad=True)
            logits = network(
                input_ids=state.input_ids,
                expression_values=state.expression_values,
                attention_mask=state.attention_mask.long(),
                is_masked=state.is_masked,
                inputs_embeds=inputs_embeds,
            ).logits
            labels = self.labels.to(logits.device)[state.cell_index]  # type: ignore[union-attr]
            chosen = logits.log_softmax(dim=1).gather(1, labels.unsqueeze(1)).sum()
            slope = torch.autograd.grad(chosen, inputs_embeds)[0]  # (B, S, D)

        def bias(cells: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                pull = slope[cells, places] @ (embedding - embedding[network.config.mask_token_id]).T
                return self.classifier_scale * pull.float()

        return bias

    def run(
        self, state: CellState, denoiser: ScDivaDenoiser, settings: UnmaskSettings, seeds: torch.Tensor
    ) -> UnmaskedCells:
        """Unmask all particles of some cells together, and keep one of each cell.

        Args:
            state: B cells.
            denoiser: The network.
            settings: How to sample.
            seeds: (B,) seeds of the cells.

        Returns:
            The chosen particles, with the network calls of all particles of a cell.
        """
        n_particles, n_cells = self.n_particles, len(seeds)
        rows = torch.arange(n_cells).repeat_interleave(n_particles)
        copies = seeds[rows] + torch.arange(n_particles).repeat(n_cells)
        particles = state.select(rows.to(state.input_ids.device))
        device = state.input_ids.device
        filter_ = _ParticleFilter(
            self, denoiser, CellNoise((seeds ^ RESAMPLING_SEED).tolist(), device), n_cells
        )
        steer = filter_ if self.resample == "steps" else None
        done = unmask(particles, denoiser, settings, CellNoise(copies.tolist(), device), steer=steer)
        rewards = self._rewards(done.state).view(n_cells, n_particles)
        if self.resample == "steps":
            log_weights = filter_.log_weights + rewards - filter_.potentials
            everyone = torch.ones(n_cells, dtype=torch.bool, device=device)
            kept = invert_law(log_weights.log_softmax(dim=1), filter_.uniforms(everyone))
        else:
            kept = rewards.argmax(dim=1)
        chosen = torch.arange(n_cells, device=kept.device) * n_particles + kept
        n_calls = done.n_network_calls.view(n_cells, n_particles).sum(dim=1)
        return UnmaskedCells(
            state=done.state.select(chosen),
            gene_log_prob=done.gene_log_prob[chosen],
            value_log_prob=done.value_log_prob[chosen],
            n_network_calls=n_calls,
            n_drawn=done.n_drawn[chosen],
        )

    def _rewards(self, state: CellState) -> torch.Tensor:
        """Ask for the rewards (B,) of cells, and check them.

        Returns:
            (B,) float64.

        Raises:
            ValueError: If they are not one finite number per cell.
        """
        reward: Any = self.reward
        given = reward(state.input_ids, state.expression_values, state.attention_mask.long())
        rewards = torch.as_tensor(given, device=state.input_ids.device).double()
        if rewards.shape != (len(state.input_ids),) or rewards.isnan().any() or rewards.isposinf().any():
            msg = (
                f"The reward must be one number per cell, ({len(state.input_ids)},), not NaN or inf; got "
                f"shape {tuple(rewards.shape)}."
            )
            raise ValueError(msg)
        return rewards.clamp(min=-1e9)


class _ParticleFilter:
    """Weights of particles and drawing among them; called by `unmask` after each look."""

    def __init__(self, steering: Steering, denoiser: ScDivaDenoiser, noise: CellNoise, n_cells: int) -> None:
        self.steering, self.denoiser, self.noise = steering, denoiser, noise
        shape = (n_cells, steering.n_particles)
        self.log_weights = torch.zeros(shape, dtype=torch.float64, device=noise.device)
        self.potentials = torch.zeros_like(self.log_weights)
        self.n_cells = n_cells

    def uniforms(self, is_asked: torch.Tensor) -> torch.Tensor:
        """(B,) one draw of each cell asked (B,); the others use none up, so that cells stay independent."""
        asked = is_asked.nonzero().squeeze(1)
        draws = torch.full((self.n_cells,), 0.5, dtype=torch.float64, device=self.noise.device)
        real = torch.ones(len(asked), 1, dtype=torch.bool)
        draws[asked] = self.noise.uniforms(asked, real, 1)[0, :, 0]
        return draws

    def __call__(self, state: CellState, encoded: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Update the weights of the particles in sight, and say whose place each takes.

        Args:
            state: (B,) particles that this step changes.
            encoded: What the denoiser made of them.
            rows: (B,) their numbers among all particles.

        Returns:
            (B,) place, among these, of the particle that each goes on as.
        """
        n_particles = self.steering.n_particles
        cells, members = rows // n_particles, rows % n_particles
        rewards = self.steering._rewards(self._guess(state, encoded))
        self.log_weights[cells, members] += rewards - self.potentials[cells, members]
        self.potentials[cells, members] = rewards
        law = self.log_weights.softmax(dim=1)
        is_uneven = 1.0 / law.square().sum(dim=1) < 0.5 * n_particles  # effective number of particles
        # Particles of a cell have slots in step; a cell of which some are absent goes on as it is.
        n_present = torch.zeros(self.n_cells, dtype=torch.long, device=rows.device)
        n_present.index_add_(0, cells, torch.ones_like(cells))
        is_drawn = is_uneven & (n_present == n_particles)
        place_of = torch.full_like(self.log_weights, -1, dtype=torch.long)
        place_of[cells, members] = torch.arange(len(rows), device=rows.device)
        offsets = self.uniforms(n_present > 0).unsqueeze(1)
        levels = (torch.arange(n_particles, device=rows.device) + offsets) / n_particles
        parent_members = torch.searchsorted(law.cumsum(dim=1), levels).clamp(max=n_particles - 1)
        parents = torch.arange(len(rows), device=rows.device)
        moves = is_drawn[cells]
        parents[moves] = place_of[cells, parent_members[cells, members]][moves]
        self.potentials[is_drawn] = self.potentials.gather(1, parent_members)[is_drawn]
        self.log_weights[is_drawn] = 0.0
        return parents

    def _guess(self, state: CellState, encoded: torch.Tensor) -> CellState:
        """Fill all slots at once with the likeliest genes and the centres of their values."""
        denoiser = self.denoiser
        cells, places = (state.is_masked & state.attention_mask).nonzero(as_tuple=True)
        ids, values = state.input_ids.clone(), state.expression_values.clone()
        genes = ids[cells, places]
        asked = (genes == denoiser.mask_token_id).nonzero().squeeze(1)
        if len(asked):
            logits = denoiser.gene_logits(encoded, cells[asked], places[asked])
            none = torch.zeros_like(logits, dtype=torch.bool)
            genes[asked] = gene_log_law(logits, none).argmax(dim=1)
        ids[cells, places] = genes
        values[cells, places] = denoiser.value_law(encoded, cells, places, genes)[0].to(values.dtype)
        return replace(state, input_ids=ids, expression_values=values)


__all__ = ["Reward", "Steering"]
