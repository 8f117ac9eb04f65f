"""Gene head of the published network: its share of a training step, and the largest logits in memory.

Half of the genes of a full-length cell are hidden. The head is what comes behind the hidden states: taking
the masked ones, transform, projection onto the vocabulary, loss, and the way back. Memory is counted, not
timed: of all tensors that any operation makes, the largest one with the vocabulary as its last dimension may
hold as many rows as genes are masked, or as ``loss_chunk_size`` says.

    python benchmarks/speed/head.py
"""

from typing import Any

import torch
from paper_network import MAX_GENES, masked_cells, paper_model, training_step
from side_by_side import interleave, number_line, ratio_line, report
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling_scdiva import ScDivaForMaskedDiffusion
from modeling_scdiva.diffusion_scdiva import per_cell_mean

N_CELLS = 1
CHUNK = 64


class LargestLogits(TorchDispatchMode):
    """Counts the rows of the largest tensor whose last dimension is the vocabulary, weights (D, V) aside."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.width, self.vocab_size, self.n_rows = width, vocab_size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at what it made."""
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if not isinstance(tensor, torch.Tensor) or tensor.shape == (self.width, self.vocab_size):
                continue
            if tensor.ndim > 1 and tensor.shape[-1] == self.vocab_size:
                self.n_rows = max(self.n_rows, tensor.numel() // self.vocab_size)
        return made


def logits_rows(model: ScDivaForMaskedDiffusion, batch: dict[str, torch.Tensor]) -> int:
    """Count the rows of the largest logits of forward and backward."""
    with LargestLogits(model.config.hidden_size, model.config.vocab_size) as largest:
        model(**batch).loss.backward()
    model.zero_grad(set_to_none=True)
    return largest.n_rows


def main() -> None:
    """Measure."""
    torch.set_num_threads(1)
    model = paper_model()
    batch = masked_cells(model.config, [MAX_GENES] * N_CELLS)
    n_masked = int(batch["is_masked"].sum())
    states = torch.randn(N_CELLS, 1 + MAX_GENES, model.config.hidden_size)
    is_attended = torch.ones_like(batch["is_masked"])

    def head() -> None:
        """Do what `forward` does behind the encoder for the genes, and the way back."""
        hidden_states = states.clone().requires_grad_()
        rows = (batch["labels"] != -100).nonzero(as_tuple=True)
        logits = model._gene_logits(hidden_states[rows], rows[0], batch["input_ids"], is_attended)
        nats = model._gene_nats(logits, batch["labels"], rows)
        per_cell_mean(nats, rows[0], N_CELLS).mean().backward()
        model.zero_grad(set_to_none=True)

    n_rows = logits_rows(model, batch)
    model.config.loss_chunk_size = CHUNK
    n_chunk_rows = logits_rows(model, batch)
    model.config.loss_chunk_size = None
    step = training_step(model, lambda: model(**batch).loss)
    timings = interleave({"step": step, "head": head})
    name = "largest logits, rows over masked genes"
    report(
        "head",
        [
            ratio_line(
                "gene head, share of the training step",
                timings["head"],
                timings["step"],
                floor=0.22,
                aim=0.20,
                better="lower",
            ),
            number_line(name, [n_rows / n_masked], floor=1.0, aim=1.0, better="lower"),
            number_line(
                f"{name}, in chunks of {CHUNK}",
                [n_chunk_rows / n_masked],
                floor=CHUNK / n_masked,
                aim=CHUNK / n_masked,
                better="lower",
            ),
        ],
        timings,
        n_cells=N_CELLS,
        n_masked=n_masked,
        n_positions=N_CELLS * (1 + MAX_GENES),
    )


if __name__ == "__main__":
    main()
