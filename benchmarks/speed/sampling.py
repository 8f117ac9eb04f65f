"""Sampling of a cell in 64 network calls, against 64 forward passes with all gene logits.

Width, depth and vocabulary are those of the published network; cells are shorter, so that a run takes
seconds. `generate` draws every gene of a cell, in random order and with the arithmetic of the sort, as it
does for users. A forward pass is one without losses in evaluation mode; they are all alike, and a few are
timed.

    python benchmarks/speed/sampling.py
"""

import torch
from paper_network import masked_cells, paper_model
from side_by_side import interleave, ratio_line, report

N_CELLS, N_GENES, N_CALLS, N_FORWARDS = 1, 200, 64, 16


def main() -> None:
    """Measure."""
    torch.set_num_threads(1)
    model = paper_model().eval()
    batch = masked_cells(model.config, [N_GENES] * N_CELLS)
    inputs = {name: batch[name] for name in ("input_ids", "expression_values", "is_masked")}
    size_factors = torch.full((N_CELLS,), 0.8, dtype=torch.float64)
    weights = torch.rand(model.config.vocab_size, generator=torch.Generator().manual_seed(0)) + 0.5
    n_calls = []

    def sample() -> None:
        made = model.generate(
            n_cells=N_CELLS,
            n_genes=N_GENES,
            steps=N_CALLS,
            seed=0,
            size_factors=size_factors,
            ranking_weights=weights,
        )
        n_calls.append(int(made.n_network_calls.max()))

    def forward() -> None:
        with torch.inference_mode():
            for _ in range(N_FORWARDS):
                model(**inputs, output_all_logits=True)

    timings = interleave({"sample": sample, "forward": forward})
    if set(n_calls) != {N_CALLS}:
        msg = f"Sampling took {sorted(set(n_calls))} network calls instead of {N_CALLS}."
        raise RuntimeError(msg)
    report(
        "sampling",
        [
            ratio_line(
                f"sampling, cost over {N_CALLS} forward passes with all logits",
                timings["sample"],
                timings["forward"],
                scale=N_FORWARDS / N_CALLS,
                floor=0.8,
                aim=0.6,
                better="lower",
            )
        ],
        timings,
        n_cells=N_CELLS,
        n_genes=N_GENES,
        n_calls=N_CALLS,
    )


if __name__ == "__main__":
    main()
