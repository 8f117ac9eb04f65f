"""Take over cell types from a labelled reference: nearest cells in embedding space vote, nothing is trained.

    python examples/map_reference.py --checkpoint scdiva --reference atlas.h5ad --query new_cells.h5ad \
        --label_key cell_type --output mapped.h5ad

Every query cell gets a type, the share of the votes it had, and how unusual its distance to the reference is;
`--threshold` and `--max_distance_percentile` turn doubtful and foreign cells into `Unknown`. Without files it
runs on made-up cells with random weights. If the query has types of its own in `--label_key`, the mapping is
scored against them beside the same vote on principal components of the reference.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import torch
from accelerate import Accelerator
from sklearn.decomposition import PCA
from transformers import AutoModel, AutoTokenizer

from modeling_scdiva.fresh_model import fresh_model
from modeling_scdiva.metrics.annotation import log_normalise
from modeling_scdiva.metrics.classification import classification_scores
from modeling_scdiva.tasks.cells import whole_counts
from modeling_scdiva.tasks.reference_mapping import MappingSettings, map_to_reference, transfer_labels
from tokenization_scdiva import synthetic_cells, synthetic_tokenizer

CONFIG = Path(__file__).parent / "configs" / "tiny.json"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", help="pretrained model; default: random weights")
    parser.add_argument(
        "--reference", type=Path, help="labelled h5ad with raw counts; default: made-up cells"
    )
    parser.add_argument("--query", type=Path, help="h5ad with raw counts; default: made-up cells")
    parser.add_argument("--label_key", default="cell_type", help="obs column with the reference's types")
    parser.add_argument("--output", type=Path, default=Path("mapped.h5ad"), help="the query with its types")
    parser.add_argument("--n_neighbors", type=int, default=15, help="reference cells that vote")
    parser.add_argument("--metric", default="cosine", choices=["cosine", "euclidean"], help="of the distance")
    parser.add_argument("--pooling", default="lat", choices=["lat", "mean"], help="of the embedding")
    parser.add_argument("--threshold", type=float, default=0.5, help="least share of votes of a type")
    parser.add_argument(
        "--max_distance_percentile",
        type=float,
        default=0.99,
        help="farther than this is Unknown; 1 for never",
    )
    parser.add_argument("--batch_size", type=int, default=64, help="cells per forward pass")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def read_data(args: argparse.Namespace) -> tuple[anndata.AnnData, anndata.AnnData]:
    """Read reference and query, or make some up."""
    if (args.reference is None) != (args.query is None):
        sys.exit("--reference and --query go together; without both, made-up cells are used.")
    if args.reference is not None:
        return anndata.read_h5ad(args.reference), anndata.read_h5ad(args.query)
    cells = synthetic_cells(n_cells=400, n_genes=300, seed=args.seed)
    return cells[:300].copy(), cells[300:].copy()


def load_model(args: argparse.Namespace, reference: anndata.AnnData) -> tuple[Any, Any]:
    """Load model and tokenizer, or make a small random model."""
    if args.checkpoint is not None:
        model = AutoModel.from_pretrained(args.checkpoint)
        return model.to(args.device), AutoTokenizer.from_pretrained(args.checkpoint)
    tokenizer = synthetic_tokenizer(reference)
    print("No --checkpoint: a small model with random weights stands in.")
    return fresh_model(CONFIG, tokenizer, seed=args.seed).to(args.device), tokenizer


def map_by_components(
    query: anndata.AnnData, reference: anndata.AnnData, args: argparse.Namespace, settings: MappingSettings
) -> np.ndarray:
    """Let the same neighbours vote on principal components that are fitted on the reference."""
    genes = reference.var_names.intersection(query.var_names)
    if len(genes) < 2:
        sys.exit("Query and reference share no names in var, which the comparison with components needs.")
    tables = [log_normalise(whole_counts(cells[:, genes])) for cells in (query, reference)]
    pca = PCA(min(50, *(size - 1 for size in tables[1].shape)), svd_solver="arpack", random_state=args.seed)
    of_reference = pca.fit_transform(tables[1])
    labels = reference.obs[args.label_key].astype(str).to_numpy()
    mapping = transfer_labels(pca.transform(tables[0]), of_reference, labels, settings=settings)
    return mapping.likeliest_cell_types


def main() -> None:
    """Map, write, score if that is possible."""
    args = parse_arguments()
    accelerator = Accelerator()
    accelerator.end_training()  # one process does it
    if not accelerator.is_main_process:
        return
    reference, query = read_data(args)
    model, tokenizer = load_model(args, reference)
    settings = MappingSettings(
        n_neighbors=args.n_neighbors,
        metric=args.metric,
        threshold=args.threshold,
        max_distance_percentile=args.max_distance_percentile,
        seed=args.seed,
    )
    mapping = map_to_reference(
        query,
        reference=reference,
        label_key=args.label_key,
        model=model,
        tokenizer=tokenizer,
        settings=settings,
        batch_size=args.batch_size,
        pooling=args.pooling,
    )
    query.obs["scdiva_cell_type"] = mapping.predicted_cell_types.astype(str)
    query.obs["scdiva_cell_type_probability"] = mapping.confidence
    query.obs["scdiva_distance_percentile"] = mapping.distance_percentile
    query.write_h5ad(args.output)
    if args.label_key in query.obs and query.obs[args.label_key].notna().any():
        has_type = query.obs[args.label_key].notna().to_numpy()
        truth = query.obs[args.label_key].astype(str).to_numpy()[has_type]
        components = map_by_components(query, reference, args, settings)
        print(f"\n{len(truth)} query cells with a type, {reference.n_obs} reference cells")
        print(f"{'':32}{'macro F1':>10}{'accuracy':>10}")
        for name, types in (("scDiVa", mapping.likeliest_cell_types), ("50 components", components)):
            numbers = classification_scores(truth, types[has_type])
            print(f"{name + ', nearest cells':32}{numbers['macro_f1']:10.3f}{numbers['accuracy']:10.3f}")
    print(f"\n{query.obs['scdiva_cell_type'].value_counts().to_string()}")
    print(f"\nTypes, confidences and distances are in obs of {args.output}.")


if __name__ == "__main__":
    main()
