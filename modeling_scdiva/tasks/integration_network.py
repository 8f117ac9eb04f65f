"""The network, the losses and the corruption of batch integration; `integrate_batches` puts them together.

Notable choices:
- One contrastive loss serves both modes: with one class per cell SupCon is NT-Xent.
- What one cell is turned into depends on (seed, epoch, cell) alone, not on its neighbours in the batch.
- Both views of a cell travel in one tensor (B, 2, S), so that a batch can be cut along its first axis.
- With several processes each contrasts, and standardises for the discriminator, its own cells only: fewer
  negatives, so take a larger ``batch_size`` there.

Dimensions: N cells, B cells in a loader batch, S positions, D width, M views, P width of the projection.
Source: METHOD.md section 7; Ganin et al. 2016 (gradient reversal); Chen et al. 2020 (NT-Xent); Khosla et al.
2020 (SupCon).
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from modeling_scdiva.finetuning import FinetuningArguments
from modeling_scdiva.modeling_scdiva import pool_cells
from modeling_scdiva.tasks.cells import TokenizedCells
from modeling_scdiva.tasks.embedding import POOLINGS

DISCRIMINATOR_SIZES = (512, 256)
N_VIEWS = 2
IGNORED_LABEL = -100
# In the place of the epoch: the corruption of validation cells, the same after every epoch.
VALIDATION_STREAM = 2**31


@dataclass(frozen=True)
class IntegrationArguments(FinetuningArguments):
    """Numbers of an integration run; rate, batch and epochs are the published ones.

    Attributes:
        n_epochs: As in `FinetuningArguments`.
        batch_size: As in `FinetuningArguments`; every cell comes as two views.
        learning_rate: As in `FinetuningArguments`.
        patience: As in `FinetuningArguments`; needs validation cells.
        reconstruction_weight: Of the masked diffusion loss.
        adversarial_weight: Of the discriminator's loss.
        contrastive_weight: Of the contrastive loss.
        temperature: Of the contrastive loss.
        negatives: "all" contrasts a cell with all others of the loader batch, "same_batch" with those of its
            own technical batch, so that knowing the batch does not help.
        masking_range: Ends of the uniform law of the share of genes that a view hides.
        depth_range: Ends of the log-uniform law of the share of depth that a view keeps.
        projection_size: Width of the projection that is contrasted.
        pooling: "lat" or "mean", as in `embed_cells`; what is trained is what is returned.
        max_genes: Genes kept of a cell; None for the tokenizer's number.
        validation_fraction: Cells that only early stopping sees; 0 for none, and the last epoch.
        unlabeled_category: Cells with this label have none; label-informed mode treats them as label-free.
        lora_rank: Rank of the adapters of ``trainable="lora"``.
        n_last_layers: Layers that ``trainable="last_layers"`` trains.
    """

    n_epochs: int = 50
    batch_size: int = 256
    learning_rate: float = 1e-4
    patience: int = 10
    reconstruction_weight: float = 1.0
    adversarial_weight: float = 1.0
    contrastive_weight: float = 1.0
    temperature: float = 0.1
    negatives: Literal["all", "same_batch"] = "all"
    masking_range: tuple[float, float] = (0.15, 0.5)
    depth_range: tuple[float, float] = (0.1, 1.0)
    projection_size: int = 128
    pooling: str = "lat"
    max_genes: int | None = None
    validation_fraction: float = 0.1
    unlabeled_category: str = "Unknown"
    lora_rank: int = 8
    n_last_layers: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("reconstruction_weight", "adversarial_weight", "contrastive_weight"):
            if not getattr(self, name) >= 0:
                msg = f"{name} must not be negative, got {getattr(self, name)}."
                raise ValueError(msg)
        if not self.temperature > 0:
            msg = f"temperature must be positive, got {self.temperature}."
            raise ValueError(msg)
        for name in ("masking_range", "depth_range"):
            low, high = getattr(self, name)
            if not 0.0 < low <= high <= 1.0:
                msg = f"{name} must be an interval inside (0, 1], got {(low, high)}."
                raise ValueError(msg)
        for name, choices in (("negatives", ("all", "same_batch")), ("pooling", POOLINGS)):
            if getattr(self, name) not in choices:
                msg = f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}."
                raise ValueError(msg)
        if not 0.0 <= self.validation_fraction < 1.0:
            msg = f"validation_fraction must lie in [0, 1), got {self.validation_fraction}."
            raise ValueError(msg)


class GradientReversal(torch.autograd.Function):
    """The identity, whose gradient is multiplied by minus the strength."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Pass (M, D) states on; ``strength`` (M, 1) is for the way back."""
        ctx.save_for_backward(strength)
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Turn the gradient (M, D) round."""
        (strength,) = ctx.saved_tensors
        return -strength * gradients[0], None


def reversal_strength(progress: float) -> float:
    """Give the strength of the gradient reversal, 2 / (1 + exp(-10 p)) - 1 (Ganin et al. 2016).

    Args:
        progress: Share p of the training that is done, in [0, 1].

    Returns:
        Strength from 0 to nearly 1: the discriminator learns before the encoder is made to fool it.
    """
    return 2.0 / (1.0 + math.exp(-10.0 * progress)) - 1.0


def contrastive_loss(
    projections: torch.Tensor,
    classes: torch.Tensor,
    *,
    temperature: float,
    groups: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the supervised contrastive loss; with one class per cell it is NT-Xent.

    Args:
        projections: (M, P) unit vectors, one per view.
        classes: (M,) int64; views of equal class attract each other.
        temperature: Divides the cosines, > 0.
        groups: (M,) int64; when given, only views of the same group repel each other.

    Returns:
        Mean over the views of the mean over their positives of -log of the softmax over all other views,
        nats; views without a positive do not count.
    """
    cosines = projections @ projections.T / temperature  # (M, M)
    is_self = torch.eye(len(classes), dtype=torch.bool, device=classes.device)
    is_positive = (classes[:, None] == classes[None, :]) & ~is_self
    is_left_out = is_self
    if groups is not None:
        is_left_out = is_self | ~(is_positive | (groups[:, None] == groups[None, :]))
    log_probabilities = cosines.masked_fill(is_left_out, -torch.inf).log_softmax(dim=1)
    n_positives = is_positive.sum(dim=1)
    view_losses = -log_probabilities.masked_fill(~is_positive, 0.0).sum(dim=1) / n_positives.clamp(min=1)
    return view_losses.sum() / (n_positives > 0).sum().clamp(min=1)


class IntegrationModel(nn.Module):
    """Encoder and diffusion heads of a checkpoint, a batch discriminator and a projection, with their losses.

    Args:
        backbone: `ScDivaForMaskedDiffusion`, or a PEFT model around one.
        hidden_size: Width D.
        n_batches: Technical batches to tell apart.
        arguments: Weights of the losses.
    """

    def __init__(
        self, backbone: nn.Module, *, hidden_size: int, n_batches: int, arguments: IntegrationArguments
    ) -> None:
        super().__init__()
        self.arguments = arguments
        self.backbone = backbone
        # What cells differ in is small beside what they share, so the discriminator gets standardised states.
        # No running statistics: they would differ between processes, and with them the validation score.
        layers: list[nn.Module] = [nn.BatchNorm1d(hidden_size, affine=False, track_running_stats=False)]
        for size_in, size_out in pairwise((hidden_size, *DISCRIMINATOR_SIZES)):
            layers += [nn.Linear(size_in, size_out), nn.LeakyReLU(), nn.LayerNorm(size_out)]
        self.discriminator = nn.Sequential(*layers, nn.Linear(DISCRIMINATOR_SIZES[-1], n_batches))
        self.projection = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.ReLU(), nn.Linear(hidden_size, arguments.projection_size)
        )

    def forward(
        self,
        batch_labels: torch.Tensor,
        contrast_labels: torch.Tensor,
        reversal: torch.Tensor,
        **inputs: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Compute the losses of both views of some cells.

        Args:
            batch_labels: (B,) int64 technical batch.
            contrast_labels: (B,) int64; cells of equal label attract each other.
            reversal: (B,) strength of the gradient reversal.
            **inputs: Inputs and targets of the checkpoint, each (B, 2, S).

        Returns:
            ``loss``, their weighted sum, ``reconstruction_loss``, ``adversarial_loss`` and
            ``contrastive_loss``.
        """
        views = {name: tensor.flatten(0, 1) for name, tensor in inputs.items()}  # (M, S) with M = 2 B
        outputs = self.backbone(**views)
        states = outputs.last_hidden_state.float()
        embeddings = pool_cells(states, views["attention_mask"], self.arguments.pooling)  # (M, D)
        batches, classes, strength = (
            tensor.repeat_interleave(N_VIEWS) for tensor in (batch_labels, contrast_labels, reversal)
        )  # (M,)
        reversed_states = GradientReversal.apply(embeddings, strength.unsqueeze(1))
        adversarial_loss = nn.functional.cross_entropy(self.discriminator(reversed_states), batches)
        contrast = contrastive_loss(
            nn.functional.normalize(self.projection(embeddings), dim=1),
            classes,
            temperature=self.arguments.temperature,
            groups=batches if self.arguments.negatives == "same_batch" else None,
        )
        weights = self.arguments
        loss = (
            weights.reconstruction_weight * outputs.loss
            + weights.adversarial_weight * adversarial_loss
            + weights.contrastive_weight * contrast
        )
        return {
            "loss": loss,
            "reconstruction_loss": outputs.loss.detach(),
            "adversarial_loss": adversarial_loss.detach(),
            "contrastive_loss": contrast.detach(),
        }


@dataclass(frozen=True)
class CellViews:
    """Two corruptions of each cell, as inputs of `IntegrationModel`.

    Attributes:
        cells: The clean cells.
        batch_codes: (N,) technical batch of each.
        contrast_codes: (N,) class of each in the contrastive loss; without labels each cell is its own.
        mask_token_id: Token of a hidden gene.
        arguments: Law of the corruption, and its seed.
    """

    cells: TokenizedCells
    batch_codes: np.ndarray
    contrast_codes: np.ndarray
    mask_token_id: int
    arguments: IntegrationArguments

    def batch(self, rows: np.ndarray, epoch: int) -> dict[str, torch.Tensor]:
        """Corrupt some cells twice.

        Args:
            rows: (B,) cells.
            epoch: Another epoch, another corruption; from 0, or `VALIDATION_STREAM`.

        Returns:
            Inputs of `IntegrationModel.forward`.
        """
        clean = self.cells.batch(rows)
        width = clean["input_ids"].shape[1]
        coins = np.full((len(rows), N_VIEWS, width), 2.0)  # padding and <lat> are never drawn
        times, kept_shares = np.empty((2, len(rows), N_VIEWS))
        (low, high), (shallow, deep) = self.arguments.masking_range, self.arguments.depth_range
        for index, row in enumerate(rows):
            rng = np.random.default_rng((self.arguments.seed, epoch, int(row)))
            times[index] = rng.uniform(low, high, size=N_VIEWS)
            kept_shares[index] = np.exp(rng.uniform(np.log(shallow), np.log(deep), size=N_VIEWS))
            n_genes = int(self.cells.n_genes[row])
            coins[index, :, 1 : n_genes + 1] = rng.random((N_VIEWS, n_genes))
        views = corrupt_cells(clean, times, kept_shares, coins, self.mask_token_id)
        progress = (epoch + 0.5) / self.arguments.n_epochs
        strength = reversal_strength(min(1.0, progress))
        return views | {
            "batch_labels": torch.from_numpy(self.batch_codes[rows]),
            "contrast_labels": torch.from_numpy(self.contrast_codes[rows]),
            "reversal": torch.full((len(rows),), strength),
        }


def corrupt_cells(
    clean: dict[str, torch.Tensor],
    times: np.ndarray,
    kept_shares: np.ndarray,
    coins: np.ndarray,
    mask_token_id: int,
) -> dict[str, torch.Tensor]:
    """Scale depth down and hide genes with their values; targets stay those of the clean cell.

    Args:
        clean: ``input_ids``, ``expression_values`` and ``attention_mask``, (B, S).
        times: (B, W) share of the genes to hide in each of W views.
        kept_shares: (B, W) factor of the values before log1p, in (0, 1].
        coins: (B, W, S) uniform draws, above 1 where nothing can be hidden.
        mask_token_id: Token of a hidden gene.

    Returns:
        ``input_ids``, ``expression_values``, ``attention_mask``, ``is_masked``, ``labels`` and
        ``expression_labels``, each (B, W, S). In every view at least one gene is hidden.
    """
    is_lowest = coins == coins.min(axis=2, keepdims=True)
    is_masked = torch.from_numpy((coins < times[:, :, None]) | (is_lowest & (coins < 1.0)))
    genes, values, attended = (
        clean[name].unsqueeze(1).expand(is_masked.shape)
        for name in ("input_ids", "expression_values", "attention_mask")
    )
    share = torch.from_numpy(kept_shares).unsqueeze(2)
    seen = torch.log1p(share * torch.expm1(values.double())).float()
    return {
        "input_ids": genes.masked_fill(is_masked, mask_token_id),
        "expression_values": seen.masked_fill(is_masked, 0.0),
        "attention_mask": attended.contiguous(),
        "is_masked": is_masked,
        "labels": genes.masked_fill(~is_masked, IGNORED_LABEL),
        "expression_labels": values.contiguous(),
    }
