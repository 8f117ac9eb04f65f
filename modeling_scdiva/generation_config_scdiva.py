"""How cells are generated, and what comes back: configuration and output, shaped as in transformers.

Source: METHOD.md section 5.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import ModelOutput

from .sampling_scdiva import ORDERS, SCHEDULES
from .unmask_scdiva import UnmaskSettings

REMASKS = ("none", "random", "quality")
DEFAULTS: dict[str, Any] = {
    "steps": 64,
    "tokens_per_step": None,
    "schedule": "linear",
    "order": "random",
    "entropy_bound": None,
    "temperature": 1.0,
    "top_p": 1.0,
    "value_temperature": 1.0,
    "rank_consistent": True,
    "remask": "none",
    "remask_rate": 0.05,
    "guidance_scale": 1.0,
    "canonicalize": True,
    "batch_size": 32,
    "seed": 0,
    "size_law": None,
}
METADATA = ("_commit_hash", "_from_model_config", "transformers_version")


class ScDivaGenerationConfig(GenerationConfig):
    """Settings of `ScDivaForMaskedDiffusion.generate` and its kin; saved as ``generation_config.json``.

    Args:
        steps: Network calls per cell, unless ``tokens_per_step`` or ``entropy_bound`` say otherwise; a cell
            of fewer slots takes one call per slot.
        tokens_per_step: Genes drawn at each step, instead of ``steps``; 1 draws from the network's own law.
        schedule: "linear" draws equally many genes at each step, "cosine" few first and many last.
        order: Which slots come first: "random", the only order that matches the training bound; "rank";
            "margin" or "entropy", the surest first, at the price of diversity.
        entropy_bound: Draw at each step all slots whose gene entropies, but for the largest, add up to no
            more nats; ``steps`` then does not count.
        temperature: Divides the gene logits.
        top_p: Draw among the likeliest genes that together reach this probability.
        value_temperature: Scales the width of the value laws; 0 takes their centres.
        rank_consistent: Keep values between those that the visible neighbours' ranking scores allow.
        remask: Hide drawn genes again on the way: "none", "random" (ReMDM) or "quality" (the worst, by a
            quality head).
        remask_rate: Largest share of the drawn genes that a step hides again.
        guidance_scale: Classifier-free guidance; 1 is the conditional law, above sharpens it.
        canonicalize: Put finished cells into ranking order.
        batch_size: Cells in one call; no result depends on it beyond rounding.
        seed: Of the cells. With a ``generator`` the seeds of the cells come from there.
        size_law: Law of library sizes and lengths, by `fit_size_law`.
        **kwargs: What transformers stores beside these.

    Raises:
        ValueError: If a keyword is unknown or a value out of range.
    """

    steps: int
    tokens_per_step: int | None
    schedule: str
    order: str
    entropy_bound: float | None
    temperature: float
    top_p: float
    value_temperature: float
    rank_consistent: bool
    remask: str
    remask_rate: float
    guidance_scale: float
    canonicalize: bool
    batch_size: int
    seed: int
    size_law: dict[str, Any] | None

    def __init__(self, **kwargs: Any) -> None:
        # The base constructor is not called: beam widths and cache sizes mean nothing here.
        for name, default in DEFAULTS.items():
            setattr(self, name, kwargs.pop(name, default))
        for name in METADATA:
            setattr(self, name, kwargs.pop(name, None))
        if kwargs:
            msg = (
                f"Generation has no setting {', '.join(map(repr, kwargs))}. Settings: {', '.join(DEFAULTS)}."
            )
            raise ValueError(msg)
        self.validate()

    def validate(self, *_: Any, **__: Any) -> None:  # type: ignore[override]
        """Check ranges and combinations.

        Args:
            *_: Passed by transformers, unused.
            **__: The same.

        Raises:
            ValueError: If a value is out of range or two contradict each other.
        """
        for name, allowed in (("schedule", SCHEDULES), ("order", ORDERS), ("remask", REMASKS)):
            if getattr(self, name) not in allowed:
                msg = f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}."
                raise ValueError(msg)
        for name in ("steps", "tokens_per_step", "batch_size"):
            count = getattr(self, name)
            if (count is None and name != "tokens_per_step") or (count is not None and count < 1):
                msg = f"{name} must be at least 1, got {count}."
                raise ValueError(msg)
        for name, low, high in (
            ("top_p", 0.0, 1.0),
            ("remask_rate", 0.0, 1.0),
            ("temperature", 0.0, float("inf")),
            ("value_temperature", 0.0, float("inf")),
            ("guidance_scale", 0.0, float("inf")),
        ):
            number = getattr(self, name)
            is_open = name in ("temperature", "top_p")
            if not low <= number <= high or number == float("inf") or (is_open and number == 0.0):
                msg = f"{name} must lie in {'(' if is_open else '['}{low:g}, {high:g}], got {number}."
                raise ValueError(msg)
        if self.entropy_bound is not None:
            self._check_entropy_bound()
        if self.tokens_per_step is not None and self.schedule != "linear":
            msg = (
                f"tokens_per_step draws equally many genes at each step; schedule {self.schedule!r} does not."
            )
            raise ValueError(msg)

    def _check_entropy_bound(self) -> None:
        """Check what goes with an entropy bound.

        Raises:
            ValueError: If something does not.
        """
        if self.entropy_bound is not None and self.entropy_bound < 0:
            msg = f"entropy_bound must not be negative (nats), got {self.entropy_bound}."
            raise ValueError(msg)
        if self.order != "entropy" or self.remask != "none" or self.tokens_per_step is not None:
            msg = (
                "entropy_bound takes the surest slots first, as many as it allows: it needs order='entropy', "
                f"remask='none' and no tokens_per_step, got {self.order!r}, {self.remask!r} and "
                f"{self.tokens_per_step}."
            )
            raise ValueError(msg)

    def unmask_settings(self) -> UnmaskSettings:
        """Take out what the loop needs.

        Returns:
            Its settings.
        """
        names = UnmaskSettings.__dataclass_fields__
        return UnmaskSettings(**{name: getattr(self, name) for name in names})

    def updated(self, **overrides: Any) -> "ScDivaGenerationConfig":
        """Copy with some settings changed.

        Args:
            **overrides: Settings; an unknown one is refused.

        Returns:
            Another configuration.
        """
        return type(self)(**({name: getattr(self, name) for name in DEFAULTS} | overrides))

    @classmethod
    def from_model_config(cls, model_config: Any) -> "ScDivaGenerationConfig":  # type: ignore[override]
        """Give the defaults; the network's configuration holds no settings of generation.

        Args:
            model_config: Not read.

        Returns:
            The defaults.
        """
        return cls()

    def get_generation_mode(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: the modes of autoregressive generation do not apply.

        Args:
            *args: Unused.
            **kwargs: Unused.

        Raises:
            NotImplementedError: Always.
        """
        msg = "Cells are generated by masked diffusion, which has no autoregressive generation mode."
        raise NotImplementedError(msg)


@dataclass
class ScDivaGenerationOutput(ModelOutput):
    """Generated cells, `<lat>` first, padded to the longest.

    Args:
        input_ids: (N, S) int64 gene tokens.
        expression_values: (N, S) float32 log1p of normalised counts.
        attention_mask: (N, S) int64, 0 at padding.
        is_generated: (N, S) bool, True where the gene or its value was drawn; the rest came in like this.
        size_factors: (N,) float64 molecules of the cell / target_sum; None if values are no counts.
        gene_log_prob: (N,) float64 nats, log-probability of the genes drawn on the way.
        value_log_prob: (N,) float64 nats, of the counts drawn; None if values are no counts.
        n_network_calls: (N,) int64 calls that each cell took part in.
        order_violations: (N,) float64 share of neighbouring genes that were not in ranking order as drawn;
            None without ranking weights.
    """

    input_ids: torch.Tensor | None = None
    expression_values: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    is_generated: torch.Tensor | None = None
    size_factors: torch.Tensor | None = None
    gene_log_prob: torch.Tensor | None = None
    value_log_prob: torch.Tensor | None = None
    n_network_calls: torch.Tensor | None = None
    order_violations: torch.Tensor | None = None


__all__ = ["ScDivaGenerationConfig", "ScDivaGenerationOutput"]
