"""Training step of the published network on full-length cells: against the peak, and against plain torch.

The peak is the rate of a 2048 x 2048 matrix product in fp32 in the same process, between the same steps;
FLOPs are counted by the formula of modeling_scdiva/training_metrics.py. The plain step does the same work
without any library (plain_network.py). A step is forward, backward, clip and AdamW, on one thread, and the
allocator keeps what is freed (see `keep_freed_memory`).

    python benchmarks/speed/training.py
"""

import torch
from paper_network import (
    MAX_GENES,
    keep_freed_memory,
    masked_cells,
    paper_model,
    product_rates,
    square_product,
    training_step,
)
from plain_network import PlainNetwork
from side_by_side import interleave, number_line, ratio_line, report

from modeling_scdiva.training_metrics import train_flops

N_CELLS = 2


def main() -> None:
    """Measure."""
    torch.set_num_threads(1)
    keep_freed_memory()
    model = paper_model()
    batch = masked_cells(model.config, [MAX_GENES] * N_CELLS)
    plain = PlainNetwork(model.config).train()
    timings = interleave(
        {
            "product": square_product,
            "ours": training_step(model, lambda: model(**batch).loss),
            "plain": training_step(plain, lambda: plain(batch)),
        }
    )
    lengths = torch.full((N_CELLS,), 1 + MAX_GENES)
    flops = train_flops(model.config, lengths, int(batch["is_masked"].sum()))
    peaks = product_rates(timings["product"])
    shares = [flops / seconds / peak for seconds, peak in zip(timings["ours"].cpu, peaks, strict=True)]
    report(
        "training",
        [
            number_line("training step, share of the matrix-product rate", shares, floor=0.65, aim=0.75),
            ratio_line(
                "training step, speed over plain torch", timings["plain"], timings["ours"], floor=0.9, aim=1.0
            ),
        ],
        timings,
        n_cells=N_CELLS,
        n_positions=1 + MAX_GENES,
        flops=flops,
        peak_flops_per_s=peaks,
    )


if __name__ == "__main__":
    main()
