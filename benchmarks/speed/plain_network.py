"""The same network in plain torch, without any library: what a training step costs at best.

Same shapes, same blocks, same losses on the same rows; no masks, no checks, no outputs that nobody asked for.

Dimensions: B cells in a loader batch, S positions, V vocabulary, D width, H heads, K head width, n positions
to predict.
"""

import torch
from torch import nn
from torch.nn import functional

from modeling_scdiva import ScDivaConfig


class PlainLayer(nn.Module):
    """Attention and SwiGLU, each normalised first and added to the stream."""

    def __init__(self, config: ScDivaConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.n_heads, self.dropout = config.num_attention_heads, config.hidden_dropout
        self.norms = nn.ParameterList([nn.Parameter(torch.ones(width)) for _ in range(2)])
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Run the layer on states (B, S, D)."""
        width = states.shape[-1:]
        normed = functional.rms_norm(states, width, self.norms[0], 1e-5)
        query, key, value = (
            project(normed).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )  # (B, H, S, K)
        query, key = (
            part * cos + torch.cat((-part.chunk(2, -1)[1], part.chunk(2, -1)[0]), dim=-1) * sin
            for part in (query, key)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        states = states + functional.dropout(self.out(mixed), self.dropout, self.training)
        normed = functional.rms_norm(states, width, self.norms[1], 1e-5)
        transformed = self.down(functional.silu(self.gate(normed)) * self.up(normed))
        return states + functional.dropout(transformed, self.dropout, self.training)


class PlainNetwork(nn.Module):
    """Genes and values in, the loss out."""

    def __init__(self, config: ScDivaConfig) -> None:
        super().__init__()
        width, self.config = config.hidden_size, config
        self.genes = nn.Embedding(config.vocab_size, width)
        self.values = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.hidden_value = nn.Parameter(torch.zeros(width))
        self.layers = nn.ModuleList([PlainLayer(config) for _ in range(config.num_hidden_layers)])
        self.norms = nn.ParameterList([nn.Parameter(torch.ones(width)) for _ in range(2)])
        self.transform, self.head = nn.Linear(width, width), nn.Linear(width, config.vocab_size)
        self.value_head = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
        head_width = width // config.num_attention_heads
        frequencies = 10_000.0 ** (-torch.arange(0, head_width, 2) / head_width)
        angles = torch.arange(config.max_position_embeddings).unsqueeze(1) * frequencies
        self.cos, self.sin = (turn(torch.cat((angles, angles), dim=-1)) for turn in (torch.cos, torch.sin))

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Compute the loss of a loader batch without padding."""
        config, is_masked = self.config, batch["is_masked"]
        values = self.values(batch["expression_values"].unsqueeze(-1))  # (B, S, D)
        values = torch.where(is_masked.unsqueeze(-1), self.hidden_value, values)
        states = self.genes(batch["input_ids"]) + values
        states = functional.dropout(states, config.hidden_dropout, self.training)
        n_positions, width = states.shape[1:]
        for layer in self.layers:
            states = layer(states, self.cos[:n_positions], self.sin[:n_positions])
        states = functional.rms_norm(states, (width,), self.norms[0], 1e-5)[is_masked]  # (n, D)
        transformed = functional.rms_norm(
            functional.silu(self.transform(states)), (width,), self.norms[1], 1e-5
        )
        gene_loss = functional.cross_entropy(self.head(transformed), batch["labels"][is_masked])
        predictions = functional.softplus(self.value_head(states)).squeeze(-1)
        return gene_loss + config.expression_loss_weight * functional.mse_loss(
            predictions, batch["expression_labels"][is_masked]
        )
