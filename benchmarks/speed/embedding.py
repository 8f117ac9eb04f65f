"""Embedding of full-length cells by the published network, against the training forward with all gene logits.

An embedding needs no gene head, and the last layer at `<lat>` alone. What is called is what `embed_cells`
calls for each batch; the forward pass it is compared with is that of training, losses included, with gene
logits at every position instead of the masked ones.

    python benchmarks/speed/embedding.py
"""

import torch
from paper_network import MAX_GENES, masked_cells, paper_model
from side_by_side import interleave, ratio_line, report

from modeling_scdiva.tasks.embedding import _embed_block

N_CELLS = 2


def main() -> None:
    """Measure."""
    torch.set_num_threads(1)
    model = paper_model()
    batch = masked_cells(model.config, [MAX_GENES] * N_CELLS)
    cells = masked_cells(model.config, [MAX_GENES] * N_CELLS, masked_share=0.0)
    cells = {name: cells[name] for name in ("input_ids", "expression_values")}
    cells["attention_mask"] = torch.ones_like(cells["input_ids"])

    def embed() -> None:
        model.eval()
        with torch.inference_mode():
            list(_embed_block(model.model, cells, N_CELLS, "lat"))

    def encode() -> None:
        model.eval()
        with torch.inference_mode():
            model.model(**cells)

    def training_forward() -> None:
        model.train()
        model(**batch, output_all_logits=True)

    timings = interleave({"embed": embed, "encode": encode, "training_forward": training_forward})
    report(
        "embedding",
        [
            ratio_line(
                "embedding, cells per second over the training forward with all logits",
                timings["training_forward"],
                timings["embed"],
                floor=1.4,
                aim=1.6,
            ),
            ratio_line(
                "embedding, cells per second over all last states", timings["encode"], timings["embed"]
            ),
        ],
        timings,
        n_cells=N_CELLS,
        n_positions=1 + MAX_GENES,
        cells_per_cpu_s=N_CELLS / timings["embed"].seconds,
    )


if __name__ == "__main__":
    main()
