"""Generate cells: new ones, real ones edited by a chosen strength, or completed ones. AnnData out.

    python examples/generate_cells.py --checkpoint scdiva --n_cells 200 --conditions "cell_type=B cells"
    python examples/generate_cells.py --checkpoint scdiva --mode denoise --data cells.h5ad --strength 0.3
    python examples/generate_cells.py --checkpoint scdiva --mode complete --data panel.h5ad --n_genes 400
    accelerate launch examples/generate_cells.py --checkpoint scdiva --markers CD3E CD3D --n_particles 8

The h5ad holds log1p values in X, whole counts in `layers["counts"]` where depths are known, `is_generated`
and the conditions in `obs`, and in `uns["scdiva"]` the checkpoint and every setting. `--guidance_scale` above
1 sharpens conditions at the price of variety; `--markers` draws cells towards a programme of genes. For new
cells with `--data`, library sizes and numbers of genes are those of its cells, and the generated cells are
compared with them. Without `--checkpoint`, random weights generate; their cells mean nothing.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import anndata
from accelerate import Accelerator
from transformers import AutoTokenizer

from modeling_scdiva import ScDivaForMaskedDiffusion, Steering
from modeling_scdiva.evaluation.generation import compare_generated
from modeling_scdiva.fresh_model import fresh_model
from modeling_scdiva.size_law_scdiva import fit_size_law
from modeling_scdiva.tasks import complete_cells, denoise_cells, generate_cells, marker_reward
from modeling_scdiva.tasks.cells import read_cells
from tokenization_scdiva import synthetic_cells, synthetic_tokenizer

CONFIG = Path(__file__).parent / "configs" / "tiny.json"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", help="folder or hub name; default: random weights, to see how it runs"
    )
    parser.add_argument("--mode", choices=["new", "denoise", "complete"], default="new")
    parser.add_argument("--data", type=Path, help="h5ad with raw counts; default: made-up cells")
    parser.add_argument("--n_cells", type=int, default=64, help="new cells")
    parser.add_argument("--n_genes", type=int, help="genes of each cell; default: drawn to fit the depth")
    parser.add_argument("--library_size", type=float, help="molecules of each new cell; default: drawn")
    parser.add_argument("--strength", type=float, default=0.5, help="share of the genes to make anew")
    parser.add_argument("--conditions", nargs="+", default=[], help="name=category, as in training")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="1: the conditional law itself")
    parser.add_argument("--markers", nargs="+", help="genes to draw cells towards")
    parser.add_argument("--marker_weight", type=float, default=5.0, help="nats per log1p unit")
    parser.add_argument("--n_particles", type=int, default=8, help="tries side by side, with --markers")
    parser.add_argument("--steps", type=int, default=64, help="network calls per cell")
    parser.add_argument("--order", choices=["random", "rank", "margin", "entropy"], default="random")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--remask", choices=["none", "random", "quality"], default="none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=32, help="cells in one call")
    parser.add_argument("--output", type=Path, default=Path("generated.h5ad"), help="file to write")
    return parser.parse_args()


def load(arguments: argparse.Namespace) -> tuple[anndata.AnnData | None, Any, Any]:
    """Return cells, model and tokenizer; made up where nothing was named."""
    cells = None if arguments.data is None else anndata.read_h5ad(arguments.data)
    if arguments.checkpoint is None:
        print("No --checkpoint: random weights. Their cells mean nothing.")
        cells = synthetic_cells(n_cells=60) if cells is None else cells
        tokenizer = synthetic_tokenizer(cells, max_genes=64)
        model = fresh_model(json.loads(CONFIG.read_text("utf-8")), tokenizer)
        read = read_cells(cells, tokenizer=tokenizer)
        limits = {"max_genes": tokenizer.max_genes, "target_sum": tokenizer.target_sum}
        size_law = fit_size_law(read.n_genes, read.library_size, **limits)
        model.generation_config = model.generation_config.updated(size_law=size_law)
        return cells, model, tokenizer
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    model = ScDivaForMaskedDiffusion.from_pretrained(arguments.checkpoint)
    if cells is None and arguments.mode != "new":
        genes = tokenizer.vocabulary.gene_ids[tokenizer.vocabulary.n_special_tokens :][:300]
        cells = synthetic_cells(n_cells=60, gene_ids=genes)
    return cells, model, tokenizer


def generate(
    arguments: argparse.Namespace, cells: anndata.AnnData | None, model: Any, tokenizer: Any
) -> anndata.AnnData:
    """Generate as asked."""
    steering = None
    if arguments.markers:
        reward = marker_reward(arguments.markers, tokenizer=tokenizer, weight=arguments.marker_weight)
        steering = Steering(reward=reward, n_particles=arguments.n_particles)
    options: dict[str, Any] = {
        "conditions": dict(entry.split("=", 1) for entry in arguments.conditions),
        "steering": steering,
        "show_progress": True,
    }
    names = ("guidance_scale", "steps", "order", "temperature", "remask", "seed", "batch_size")
    options |= {name: getattr(arguments, name) for name in names}
    if arguments.mode == "denoise":
        return denoise_cells(cells, model=model, tokenizer=tokenizer, strength=arguments.strength, **options)
    if arguments.mode == "complete":
        return complete_cells(cells, model=model, tokenizer=tokenizer, n_genes=arguments.n_genes, **options)
    is_like = cells is not None and arguments.n_genes is None and arguments.library_size is None
    return generate_cells(
        arguments.n_cells,
        model=model,
        tokenizer=tokenizer,
        n_genes=arguments.n_genes,
        library_size=arguments.library_size,
        like=cells if is_like else None,
        **options,
    )


def main() -> None:
    """Generate, write, compare."""
    arguments = parse_arguments()
    accelerator = Accelerator()
    accelerator.end_training()  # one process does it
    if not accelerator.is_main_process:
        return
    cells, model, tokenizer = load(arguments)
    made = generate(arguments, cells, model.to(accelerator.device), tokenizer)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    made.write_h5ad(arguments.output)
    if cells is not None and arguments.mode == "new":
        print("\nBeside the cells of --data, and beside one half of them against the other:")
        print(compare_generated(made, cells, tokenizer=tokenizer).round(3).to_string())
    n_calls = made.obs["n_network_calls"]
    print(
        f"\nWrote {arguments.output}: {made.n_obs} cells, {made.X.getnnz(axis=1).mean():.0f} genes a cell, "
        f"{n_calls.mean():.0f} network calls a cell."
    )


if __name__ == "__main__":
    main()
