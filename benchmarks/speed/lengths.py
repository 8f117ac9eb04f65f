"""Training step on shallow cells: batches of similar length against padding every cell to the longest.

Lengths have a median of 800 genes and end at 1,200. `CellBatchSampler` makes the batches; four of them, at
even places of its epoch when sorted by length, stand for all. Widths are those of the published network;
depth and vocabulary are a sixth, which leaves the share of the gene head what it is. No optimiser: its cost
has nothing to do with length.

    python benchmarks/speed/lengths.py
"""

import numpy as np
import torch
from paper_network import MAX_GENES, masked_cells, paper_model
from side_by_side import interleave, number_line, ratio_line, report

from modeling_scdiva.training_metrics import train_flops
from tokenization_scdiva import CellBatchSampler

N_LAYERS, VOCAB_SIZE = 2, 6_970
N_CORPUS, N_CELLS, N_BATCHES = 4_000, 4, 4
MEDIAN_GENES, SPREAD = 800, 0.45


def shallow_lengths() -> np.ndarray:
    """(N,) genes of each cell: log-normal, cut at the cap."""
    rng = np.random.default_rng(0)
    drawn = MEDIAN_GENES * np.exp(SPREAD * rng.standard_normal(N_CORPUS))
    return drawn.astype(int).clip(50, MAX_GENES)


def grouped_lengths(lengths: np.ndarray) -> list[list[int]]:
    """Take the batches of an epoch that stand for all of it: lengths of the cells of each."""
    sampler = CellBatchSampler(lengths, batch_size=N_CELLS, max_genes=MAX_GENES)
    batches = [[int(lengths[draw.cell]) for draw in batch] for batch in sampler]
    batches.sort(key=sum)
    places = (np.arange(N_BATCHES) + 0.5) / N_BATCHES * len(batches)
    return [batches[int(place)] for place in places]


def main() -> None:
    """Measure."""
    torch.set_num_threads(1)
    model = paper_model(num_hidden_layers=N_LAYERS, vocab_size=VOCAB_SIZE)
    groups = grouped_lengths(shallow_lengths())
    grouped = [masked_cells(model.config, lengths) for lengths in groups]
    padded = [masked_cells(model.config, lengths, width=MAX_GENES) for lengths in groups]

    def steps(batches: list[dict[str, torch.Tensor]]) -> None:
        for batch in batches:
            model(**batch).loss.backward()
            model.zero_grad(set_to_none=True)

    timings = interleave({"grouped": lambda: steps(grouped), "padded": lambda: steps(padded)})
    real = torch.tensor(groups).flatten() + 1
    n_masked = sum(int(batch["is_masked"].sum()) for batch in grouped)
    least = train_flops(model.config, real, n_masked)
    most = train_flops(model.config, torch.full_like(real, 1 + MAX_GENES), n_masked)
    report(
        "lengths",
        [
            ratio_line(
                "shallow cells, step in length groups over padding to the cap",
                timings["grouped"],
                timings["padded"],
                floor=0.72,
                aim=0.65,
                better="lower",
            ),
            number_line("shallow cells, FLOPs without any padding over padding to the cap", [least / most]),
        ],
        timings,
        n_genes=groups,
        median_genes=float(np.median(shallow_lengths())),
    )


if __name__ == "__main__":
    main()
