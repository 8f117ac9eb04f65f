"""Building blocks of the scDiVa network: norm, rotary positions, attention, SwiGLU, value embedding, heads.

Notable choices:
- Pre-norm encoder layers without biases: RMSNorm, rotary positions, bidirectional attention, SwiGLU.
- Attention runs through transformers' attention interface: eager, sdpa, flex and flash share one code path.
- Values that are hidden or missing are replaced before the value MLP sees them: not even a NaN gets through.

Dimensions: B cells in a loader batch, S positions, P positions asked for, V vocabulary, D width, H heads, K
head width.
Source: METHOD.md section 3.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_scdiva import ScDivaConfig

# Scale of a fresh value law: softplus(-2) = 0.13 log1p units, near the width of a lattice step. The smallest
# scale keeps gradients finite where a value is nearly certain.
SCALE_SHIFT, SMALLEST_SCALE = -2.0, 1e-3


class ScDivaRMSNorm(nn.Module):
    """Divide by the root mean square over the width, then scale; no centring, no bias."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension.

        Args:
            hidden_states: (..., D) states.

        Returns:
            (..., D) normalised states, same dtype; the mean square is taken in float32.
        """
        weight = self.weight.to(hidden_states.dtype)
        return nn.functional.rms_norm(hidden_states, weight.shape, weight, self.eps)

    def extra_repr(self) -> str:
        """Describe the module when it is printed.

        Returns:
            Width and epsilon.
        """
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class ScDivaRotaryEmbedding(nn.Module):
    """Rotary position embedding; the position of a gene is its place in the ranked cell."""

    inv_freq: torch.Tensor
    original_inv_freq: torch.Tensor

    def __init__(self, config: ScDivaConfig) -> None:
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        rope: Any = config.rope_parameters
        self.rope_type = rope["rope_type"]
        rope_init_fn: Callable = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init_fn(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: ScDivaConfig, **kwargs: Any) -> tuple[torch.Tensor, float]:
        """Compute the rotation frequencies of one head.

        Args:
            config: Configuration with the base and the head width.
            **kwargs: Device and length, which other rope types need.

        Returns:
            (K / 2,) frequencies in radians per position, and the scale of the rotation, 1.
        """
        head_dim = config.hidden_size // config.num_attention_heads
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim  # (K / 2,)
        rope: Any = config.rope_parameters
        return 1.0 / rope["rope_theta"] ** exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(
        self, hidden_states: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the rotation of each position.

        Args:
            hidden_states: (B, S, D) states; only their device and dtype are read.
            position_ids: (B, S) or (1, S) positions.

        Returns:
            Cosines and sines, both (B, S, K) or (1, S, K).
        """
        inv_freq = self.inv_freq.to(device=hidden_states.device, dtype=torch.float)
        angles = (
            position_ids[..., None].float() * inv_freq
        )  # (B, S, K / 2); float32: bf16 merges late positions
        angles = torch.cat((angles, angles), dim=-1)  # (B, S, K)
        cos = angles.cos() * self.attention_scaling
        sin = angles.sin() * self.attention_scaling
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate queries or keys by their positions; the pair of coordinate i is i + K / 2.

    Args:
        states: (B, S, H, K) queries or keys, as they lie in memory.
        cos: (B, S, K) or (1, S, K) cosines.
        sin: (B, S, K) or (1, S, K) sines.

    Returns:
        (B, S, H, K) rotated states.
    """
    half = states.shape[-1] // 2
    # The sign goes to the small factor: swapping halves is then one pass over the states, not three.
    turn = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
    return torch.addcmul(states * cos.unsqueeze(2), states.roll(half, dims=-1), turn.unsqueeze(2))


def take_positions(states: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """Take the states of some positions of each cell.

    Args:
        states: (B, S, D) or (1, S, D) states.
        positions: (B, P) or (1, P) int64 positions, or None for all.

    Returns:
        (B, P, D) states, or the states as they came.
    """
    return states if positions is None else states.take_along_dim(positions.unsqueeze(-1), dim=1)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention step by step: the reference for faster kernels, and the one that returns its weights.

    Args:
        module: Attention module, read for its training flag.
        query: (B, H, S, K) queries.
        key: (B, H, S, K) keys.
        value: (B, H, S, K) values.
        attention_mask: (B, 1, S, S) added to the scores, very negative at padding; None without padding.
        scaling: Factor of the scores.
        dropout: Dropout on the weights.
        **kwargs: What other kernels need.

    Returns:
        (B, S, H, K) mixed values and (B, H, S, S) weights.
    """
    scores = query @ key.transpose(2, 3) * scaling  # (B, H, S, S)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    mixed = (weights @ value).transpose(1, 2).contiguous()  # (B, S, H, K)
    return mixed, weights


class ScDivaAttention(nn.Module):
    """Bidirectional multi-head attention with rotary positions."""

    def __init__(self, config: ScDivaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: Any = None,
        output_positions: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mix the positions of each cell.

        Args:
            hidden_states: (B, S, D) normalised states.
            position_embeddings: Cosines and sines of the positions.
            attention_mask: Mask in the form the chosen attention implementation takes, for P queries.
            output_positions: (B, P) or (1, P) int64 positions whose mixed states are wanted; None for all.
            **kwargs: Passed on to the attention implementation.

        Returns:
            (B, P, D) mixed states and (B, H, P, S) weights, the latter only from eager attention.
        """
        asking = take_positions(hidden_states, output_positions)  # (B, P, D)
        head_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(asking).view(*asking.shape[:-1], -1, self.head_dim)  # (B, P, H, K)
        key = self.k_proj(hidden_states).view(head_shape)  # (B, S, H, K)
        value = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)  # (B, H, S, K)
        turns = (take_positions(turn, output_positions) for turn in position_embeddings)
        query = apply_rotary(query, *turns).transpose(1, 2)  # (B, H, P, K)
        key = apply_rotary(key, *position_embeddings).transpose(1, 2)  # (B, H, S, K)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        mixed, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(mixed.flatten(2)), weights


class ScDivaMLP(nn.Module):
    """SwiGLU feed-forward block."""

    def __init__(self, config: ScDivaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Transform each position by itself.

        Args:
            hidden_states: (B, S, D) normalised states.

        Returns:
            (B, S, D) transformed states.
        """
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class ScDivaLayer(GradientCheckpointingLayer):
    """One encoder layer: attention and feed-forward block, each normalised first and added to the stream."""

    def __init__(self, config: ScDivaConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = ScDivaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = ScDivaAttention(config, layer_idx)
        self.post_attention_layernorm = ScDivaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = ScDivaMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: Any = None,
        output_positions: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Run the layer.

        Args:
            hidden_states: (B, S, D) states.
            position_embeddings: Cosines and sines of the positions.
            attention_mask: Mask in the form the chosen attention implementation takes, for P queries.
            output_positions: (B, P) or (1, P) int64 positions whose states are wanted; None for all. The
                others are looked at and not computed.
            **kwargs: Passed on to the attention implementation.

        Returns:
            (B, P, D) states.
        """
        normed = self.input_layernorm(hidden_states)
        mixed, _ = self.self_attn(normed, position_embeddings, attention_mask, output_positions, **kwargs)
        hidden_states = take_positions(hidden_states, output_positions) + self.dropout(mixed)  # (B, P, D)
        transformed = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + self.dropout(transformed)  # (B, P, D)


class ScDivaValueEmbedding(nn.Module):
    """Turn expression values into vectors; a hidden value is one learned vector, a missing one is zero."""

    def __init__(self, config: ScDivaConfig) -> None:
        super().__init__()
        self.in_proj = nn.Linear(1, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.hidden_value = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(
        self, expression_values: torch.Tensor, is_measured: torch.Tensor, is_hidden: torch.Tensor
    ) -> torch.Tensor:
        """Embed the values of a loader batch.

        Args:
            expression_values: (B, S) log1p of normalised counts, dtype of the weights; read where measured.
            is_measured: (B, S) bool, True where a value is given.
            is_hidden: (B, S) bool, True where a value exists but is to be predicted.

        Returns:
            (B, S, D) value vectors.
        """
        # Selected before the MLP: afterwards a NaN would still reach the gradient as 0 * NaN.
        measured = expression_values.masked_fill(~is_measured, 0.0)  # (B, S)
        embedded = self.out_proj(self.act_fn(self.in_proj(measured.unsqueeze(-1))))  # (B, S, D)
        embedded = embedded.masked_fill(~is_measured.unsqueeze(-1), 0.0)
        return torch.where(is_hidden.unsqueeze(-1), self.hidden_value.to(embedded.dtype), embedded)


class ScDivaConditionEmbedding(nn.Module):
    """One token per condition of a cell: its category, or a learned vector for "not given"."""

    def __init__(self, config: ScDivaConfig) -> None:
        super().__init__()
        sizes = [1 + n_categories for n_categories in config.n_condition_categories]  # 0 is "not given"
        self.sizes = tuple(sizes)
        self.starts = tuple(sum(sizes[:place]) for place in range(len(sizes)))
        self.embedding = nn.Embedding(sum(sizes), config.hidden_size)
        self.norm = ScDivaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, condition_ids: torch.Tensor | None, n_cells: int) -> torch.Tensor:
        """Embed the conditions of a loader batch.

        Args:
            condition_ids: (B, K) int64 categories, 0 = not given; None = none of them given.
            n_cells: Number of cells B.

        Returns:
            (B, K, D) vectors of root mean square 1 before training, as the positions of the last layer.

        Raises:
            ValueError: If the shape is wrong or a category does not exist.
        """
        starts = torch.tensor(self.starts, device=self.embedding.weight.device)
        if condition_ids is None:
            return self.norm(self.embedding(starts)).expand(n_cells, -1, -1)
        if condition_ids.shape != (n_cells, len(self.sizes)):
            wanted = (n_cells, len(self.sizes))
            msg = f"condition_ids must have shape {wanted}, got {tuple(condition_ids.shape)}."
            raise ValueError(msg)
        if not torch.compiler.is_compiling():
            sizes = torch.tensor(self.sizes, device=condition_ids.device)
            is_wrong = (condition_ids < 0) | (condition_ids >= sizes)
            if is_wrong.any():
                cell, place = is_wrong.nonzero()[0].tolist()
                msg = (
                    f"condition_ids[{cell}, {place}] is {int(condition_ids[cell, place])}, and condition "
                    f"{place} has the categories 1 to {self.sizes[place] - 1} (0 = not given)."
                )
                raise ValueError(msg)
        return self.norm(self.embedding(condition_ids + starts))


class ScDivaGeneTransform(nn.Module):
    """Prepare hidden states for the gene head: dense, activation, norm."""

    def __init__(self, config: ScDivaConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.norm = ScDivaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Transform the states.

        Args:
            hidden_states: (..., D) states.

        Returns:
            (..., D) states, ready for the projection onto the vocabulary.
        """
        return self.norm(self.act_fn(self.dense(hidden_states)))


class ScDivaValueHead(nn.Module):
    """Predict an expression value from a hidden state and, for ``value_head="gene"``, from the gene there.

    The gene form predicts the ranking score s and returns s times the weight of the gene. Cells are sorted by
    s = value / weight: the position nearly gives the score, but not the value (METHOD.md sections 1 and 3).
    """

    gene_weights: torch.Tensor

    def __init__(self, config: ScDivaConfig) -> None:
        super().__init__()
        self.is_gene_conditioned = config.value_head == "gene"
        in_size = config.hidden_size
        if self.is_gene_conditioned:
            in_size *= 2
            # Gene embeddings start at the scale of initializer_range, hidden states at 1.
            self.gene_norm = ScDivaRMSNorm(config.hidden_size, config.rms_norm_eps)
            self.register_buffer("gene_weights", torch.ones(config.vocab_size))  # (V,)
        self.dense = nn.Linear(in_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]
        # A likelihood needs the width of the law as well; a squared error has a fixed one.
        self.has_scale = config.objective == "elbo"
        self.out_proj = nn.Linear(config.hidden_size, 2 if self.has_scale else 1)

    def forward(
        self,
        hidden_states: torch.Tensor,
        gene_ids: torch.Tensor | None = None,
        gene_embeddings: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Predict the laws of values.

        Args:
            hidden_states: (..., D) states.
            gene_ids: (...) gene tokens; needed by the gene form only.
            gene_embeddings: (..., D) embeddings of these genes; needed by the gene form only.

        Returns:
            (...) float32 centre, log1p of normalised counts, not negative; and for ``objective="elbo"`` the
            (...) float32 scale of the law, same unit, positive.
        """
        if self.is_gene_conditioned:
            gene_states = self.gene_norm(gene_embeddings).to(hidden_states.dtype)
            hidden_states = torch.cat((hidden_states, gene_states), dim=-1)  # (..., 2 D)
        scores = self.out_proj(self.act_fn(self.dense(hidden_states))).float()  # (..., 1 or 2)
        weights = self.gene_weights[gene_ids] if self.is_gene_conditioned else 1.0
        location = nn.functional.softplus(scores[..., 0]) * weights
        if not self.has_scale:
            return location, None
        scale = nn.functional.softplus(scores[..., 1] + SCALE_SHIFT) + SMALLEST_SCALE
        return location, scale * weights


class ScDivaGeneQueryDecoder(nn.Module):
    """Answer for any gene, whether the cell shows it or not, from vectors of the cell (METHOD.md section 3).

    An MLP on [gene embedding ; context], written as two projections that are added, so that each gene and
    each cell is projected once.
    """

    def __init__(self, config: ScDivaConfig, n_context: int = 1) -> None:
        super().__init__()
        # Gene embeddings start at the scale of initializer_range, states of the cell at 1.
        self.gene_norm = ScDivaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gene_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.context_proj = nn.Linear(n_context * config.hidden_size, config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.out_proj = nn.Linear(config.hidden_size, 2)

    def forward(self, context: torch.Tensor, gene_embeddings: torch.Tensor) -> torch.Tensor:
        """Decode genes of cells.

        Args:
            context: (B, n_context * D) vectors of the cells.
            gene_embeddings: (Q, D) embeddings of genes that all cells are asked for, or (B, Q, D).

        Returns:
            (B, Q, 2) float32, two numbers per cell and gene.
        """
        gene_states = self.gene_proj(self.gene_norm(gene_embeddings).to(context.dtype))  # (Q, D) or (B, Q, D)
        states = self.act_fn(gene_states + self.context_proj(context).unsqueeze(1))  # (B, Q, D)
        return self.out_proj(self.act_fn(self.dense(states))).float()
