"""Configuration of scDiVa: every number of the network, and nothing else.

Notable choices:
- Strict fields: a value of the wrong kind is refused when the object is built.
- Relations between fields are checked in one method, whose messages name both numbers.
- A keyword that is no field is refused; the base class would store a misspelt name in silence.
- Vocabulary and normalisation belong to the tokenizer, run numbers to the training arguments.

Source: METHOD.md sections 3 and 4. The defaults are the published network: 12 layers, width 512, 94 million
parameters.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Every Auto class must find its entry: `save_pretrained` by itself writes only that of the class being saved.
AUTO_MAP = {
    "AutoConfig": "configuration_scdiva.ScDivaConfig",
    "AutoModel": "modeling_scdiva.ScDivaModel",
    "AutoModelForMaskedLM": "modeling_scdiva.ScDivaForMaskedDiffusion",
    "AutoModelForPreTraining": "modeling_scdiva.ScDivaForMaskedDiffusion",
    "AutoModelForSequenceClassification": "modeling_scdiva.ScDivaForSequenceClassification",
}

# The condition whose entries are edges of depth classes instead of names.
LIBRARY_SIZE = "library_size"

# Keywords which are no fields of ours but which transformers itself passes or reads from a config.json.
BASE_KEYWORDS = frozenset(
    {
        "attn_implementation",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "per_layer_config",
        "quantization_config",
        "rope_scaling",
        "rope_theta",
        "tie_last_hidden_states",
        "torch_dtype",
    }
)


@strict
class ScDivaConfig(PreTrainedConfig):
    """Numbers of the scDiVa network.

    Attributes:
        vocab_size: Number of gene tokens V, special tokens included.
        hidden_size: Width D of the network.
        num_hidden_layers: Number of layers.
        num_attention_heads: Number of attention heads H; each is hidden_size / num_attention_heads wide.
        intermediate_size: Inner width of the SwiGLU block.
        hidden_act: Activation of the SwiGLU gate and of the heads.
        max_position_embeddings: Longest cell the network is meant for, in positions.
        rms_norm_eps: Added to the mean square before the root.
        hidden_dropout: Dropout on the token sum and on what each block adds, in [0, 1).
        attention_dropout: Dropout on attention weights, in [0, 1).
        classifier_dropout: Dropout before the classifier, in [0, 1).
        initializer_range: Standard deviation of fresh weights.
        rope_parameters: Rotary position settings; base 10,000 when not given.
        pad_token_id: Token of an empty slot.
        mask_token_id: Token of a gene that is hidden by diffusion.
        lat_token_id: Token of the anchor ``<lat>`` at position 0, whose last state is the cell embedding.
        unk_token_id: Token of a gene outside the vocabulary.
        pert_token_id: Token of a perturbation.
        n_special_tokens: The first ids of the vocabulary, which are never predicted.
        tie_word_embeddings: Share the weights of the gene embedding and the gene head.
        objective: Training objective of METHOD.md section 4; "paper" is the mean masked loss per cell, "elbo"
            the variational bound on genes and counts, which needs exclude_visible_genes and raw counts.
        expression_loss_weight: Weight of the expression loss beside the gene loss.
        exclude_visible_genes: Give genes that are visible in a cell probability zero at its masked positions.
        exclude_unfit_genes: Give genes of which no whole count fits between the ranking scores of a masked
            position's visible neighbours probability zero in the loss, and counts that do not fit as well:
            the arithmetic of the sort is then given, not learnt. Needs objective="elbo" and
            value_head="gene".
        value_head: "scalar" predicts a value from the position alone, "gene" from the position and the gene.
        latent_loss_weight: Weight of the loss of the gene-query decoder, which predicts any gene from the
            cell embedding; 0 leaves the decoder out of the network.
        normalize_embeddings: Bring gene and value embedding to the same root mean square before they are
            added; without it the value embedding, which grows in training, drowns the genes.
        use_anchor: Let the anchor take part; False hides it from all positions, for ablations.
        use_rotary_positions: Tell positions apart by rotation; False sees a cell as a set, for ablations.
        conditions: What generation can be steered by: name of a column of ``obs`` -> its categories. The name
            "library_size" stands for depth: its entries are the inner edges, in molecules, of the classes.
        quality_head: Add a head that judges visible genes, for re-masking; see modeling_scdiva.quality.
        sparse_prediction: Compute gene logits at masked positions only, unless all are asked for.
        loss_chunk_size: Positions whose gene logits are in memory at once for the gene loss; None = all. A
            number saves memory: logits are then computed again in the backward pass, and not returned.
        cell_pooling: What the classifier reads: "lat" (the anchor) or "mean" (mean over the gene positions).
        vocabulary_hash: Content hash of the vocabulary the weights belong to.
        auto_map: Where the Auto classes find the code beside a checkpoint; filled here.
    """

    model_type = "scdiva"
    default_theta = 10_000.0
    # What an evaluation loop must not gather over a whole data set.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["last_hidden_state", "hidden_states", "attentions"]
    base_model_tp_plan: ClassVar[dict[str, Any] | None] = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    # Called once, before the first object: where the package is installed it registers the networks.
    before_first_object: ClassVar[Callable[[], Any] | None] = None

    vocab_size: int = 41_818
    hidden_size: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    intermediate_size: int = 2_048
    hidden_act: str = "silu"
    max_position_embeddings: int = 1_280
    rms_norm_eps: float | int = 1e-5
    hidden_dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    classifier_dropout: float | int = 0.1
    initializer_range: float | int = 0.02
    rope_parameters: dict | None = None
    pad_token_id: int = 0
    mask_token_id: int = 1
    lat_token_id: int = 2
    unk_token_id: int = 3
    pert_token_id: int = 4
    n_special_tokens: int = 5
    tie_word_embeddings: bool = False
    objective: Literal["paper", "elbo"] = "paper"
    expression_loss_weight: float | int = 10.0
    exclude_visible_genes: bool = False
    exclude_unfit_genes: bool = False
    value_head: Literal["scalar", "gene"] = "scalar"
    latent_loss_weight: float | int = 0.0
    normalize_embeddings: bool = False
    use_anchor: bool = True
    use_rotary_positions: bool = True
    conditions: dict | None = None
    quality_head: bool = False
    sparse_prediction: bool = True
    loss_chunk_size: int | None = None
    cell_pooling: Literal["lat", "mean"] = "lat"
    vocabulary_hash: str | None = None
    auto_map: dict | None = None

    def __new__(cls, *_: Any, **__: Any) -> "ScDivaConfig":
        """Make an object, also for copies and pickles, which know no constructor.

        Args:
            *_: For the constructor.
            **__: For the constructor.

        Returns:
            The object.
        """
        first, ScDivaConfig.before_first_object = ScDivaConfig.before_first_object, None
        if first is not None:
            first()
        return super().__new__(cls)

    def __post_init__(self, **kwargs: Any) -> None:
        """Refuse keywords that are no fields, then fill what depends on other fields.

        A file that `save_pretrained` wrote may hold more, because training tools add entries of their own.
        They are kept with a warning, so that a finished checkpoint always loads.

        Args:
            **kwargs: Keywords that are no fields; transformers' own pass.

        Raises:
            ValueError: If a keyword is neither a field nor one of transformers' own.
        """
        unknown = sorted(key for key in kwargs if key not in BASE_KEYWORDS and not key.startswith("_"))
        if unknown and self.transformers_version is None:
            msg = (
                f"ScDivaConfig has no field {', '.join(map(repr, unknown))}. Correct or remove it. "
                f"Fields: {', '.join(field.name for field in fields(self))}."
            )
            raise ValueError(msg)
        if unknown:
            names = ", ".join(unknown)
            logger.warning(f"The saved configuration holds entries that this release does not use: {names}.")
        if self.auto_map is None:
            self.auto_map = dict(AUTO_MAP)
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Check the relations between fields; called on construction and before saving.

        Raises:
            ValueError: If two fields contradict each other or a number lies outside its range.
        """
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            if getattr(self, name) < 1:
                msg = f"{name} must be at least 1, got {getattr(self, name)}."
                raise ValueError(msg)
        if self.hidden_size % (2 * self.num_attention_heads) != 0:
            msg = (
                f"hidden_size ({self.hidden_size}) must be a multiple of twice num_attention_heads "
                f"({self.num_attention_heads}): rotary positions need an even head width."
            )
            raise ValueError(msg)
        if self.loss_chunk_size is not None and self.loss_chunk_size < 1:
            msg = f"loss_chunk_size must be at least 1 position, or None for all, got {self.loss_chunk_size}."
            raise ValueError(msg)
        for name in ("hidden_dropout", "attention_dropout", "classifier_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                msg = f"{name} must lie in [0, 1), got {getattr(self, name)}."
                raise ValueError(msg)
        for name in ("expression_loss_weight", "latent_loss_weight"):
            if getattr(self, name) < 0:
                msg = f"{name} must not be negative, got {getattr(self, name)}."
                raise ValueError(msg)
        if not self.use_anchor and (self.latent_loss_weight or self.cell_pooling == "lat"):
            msg = (
                "use_anchor=False leaves the anchor without a cell: set cell_pooling='mean' and "
                f"latent_loss_weight=0, got {self.cell_pooling!r} and {self.latent_loss_weight}."
            )
            raise ValueError(msg)
        if self.objective == "elbo" and not self.exclude_visible_genes:
            msg = (
                'objective="elbo" is a bound on cells in which a gene occurs once: set '
                "exclude_visible_genes=True, got False."
            )
            raise ValueError(msg)
        if self.exclude_unfit_genes and (self.objective, self.value_head) != ("elbo", "gene"):
            msg = (
                "exclude_unfit_genes reads counts and gene weights: set objective='elbo' and "
                f"value_head='gene', got {self.objective!r} and {self.value_head!r}."
            )
            raise ValueError(msg)
        self._validate_special_tokens()
        self._validate_conditions()

    @property
    def n_condition_categories(self) -> tuple[int, ...]:
        """Number of categories of each condition, without "not given"."""
        return tuple(
            len(entries) + (name == LIBRARY_SIZE) for name, entries in (self.conditions or {}).items()
        )

    def _validate_conditions(self) -> None:
        """Check that each condition has different categories, and depth rising edges.

        Raises:
            ValueError: If one has none, repeats one, or is not what its name says.
        """
        for name, entries in (self.conditions or {}).items():
            if not isinstance(entries, list) or not entries:
                msg = f"conditions[{name!r}] must be a list of categories, one at least, got {entries!r}."
                raise ValueError(msg)
            if name == LIBRARY_SIZE:
                is_number = all(isinstance(edge, int | float) for edge in entries)
                if not is_number or entries != sorted(set(entries)) or entries[0] <= 0:
                    msg = f"conditions[{name!r}] must be rising, positive edges in molecules, got {entries}."
                    raise ValueError(msg)
            elif not all(isinstance(entry, str) for entry in entries) or len(set(entries)) < len(entries):
                msg = f"conditions[{name!r}] must be different names, got {entries}."
                raise ValueError(msg)

    def _validate_special_tokens(self) -> None:
        """Check that the special tokens are the first, different ids of the vocabulary.

        Raises:
            ValueError: If ids repeat, lie outside the special range, or leave no gene to predict.
        """
        names = ("pad_token_id", "mask_token_id", "lat_token_id", "unk_token_id", "pert_token_id")
        token_ids = {name: getattr(self, name) for name in names}
        if len(set(token_ids.values())) != len(names):
            msg = f"special tokens must have different ids, got {token_ids}."
            raise ValueError(msg)
        outside = {name: i for name, i in token_ids.items() if not 0 <= i < self.n_special_tokens}
        if outside:
            msg = (
                f"special tokens must be among the first n_special_tokens ({self.n_special_tokens}) ids, got "
                f"{outside}; every later id is a gene."
            )
            raise ValueError(msg)
        if self.vocab_size <= self.n_special_tokens:
            msg = (
                f"vocab_size ({self.vocab_size}) must exceed n_special_tokens ({self.n_special_tokens}): "
                "there is no gene to predict."
            )
            raise ValueError(msg)


__all__ = ["LIBRARY_SIZE", "ScDivaConfig"]
