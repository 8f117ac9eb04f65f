"""Likelihoods of held-out cells: file by file, beside scVI, exact for samplers, and of two ways of training.

Nats per cell are upper bounds on -log p(cell | library size); nats per token are sums over cells divided by
sums of tokens.

Dimensions: N cells, G genes of the vocabulary.
Source: METHOD.md section 6.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import anndata
import numpy as np
import torch
from scipy.sparse import csr_matrix

from modeling_scdiva.metrics.scvi_baselines import scvi_marginal_nll
from modeling_scdiva.tasks.scoring import score_cells

FILE_COLUMNS = (
    "data", "method", "nll_per_cell", "nll_per_cell_error", "nll_per_token", "gene_nll_per_token",
    "value_nll_per_token", "draw_error_per_token", "truncated_share", "n_cells",
)  # fmt: skip
FILE_NOTE = (
    "Means over held-out cells of each file; the error is that over cells, draw_error that of the estimate "
    "of one cell per token. Uniform: every order of genes alike, -log of (V - i) added up, and no counts."
)
SCVI_NOTE = (
    "Negative log-likelihood of the counts of all vocabulary genes, zeros included, in nats per cell; lower "
    "is better. scDiVa: bound, given the molecules over all genes of the file. scVI: importance-sampled "
    "marginal likelihood, given the molecules over the vocabulary genes, which fixes the sum of the counts; "
    "trained on the same training cells. Only cells whose expressed genes all fit the network."
)
EXACT_NOTE = (
    "Exact negative log-probability, nats per token, of samplers that draw this many genes at a step in rank "
    "order, and in margin order; the bound of random order beside it."
)
OBJECTIVE_NOTE = (
    "The same held-out cells and hidden genes for both. Bound in nats per token; accuracy of the likeliest "
    "gene at hidden positions; mean squared error of values, given the true gene, in squared log1p units."
)
OBJECTIVE_COLUMNS = (
    "data", "method", "nll_per_token", "gene_nll_per_token", "value_nll_per_token", "accuracy", "value_mse",
    "n_cells",
)  # fmt: skip
EXACT_COLUMNS = (
    "data", "method", "nll_per_token", "gene_nll_per_token", "value_nll_per_token", "n_cells",
)  # fmt: skip
GENES_PER_STEP = (1, 4, 19, 38)


def reading_of(cells: anndata.AnnData) -> dict[str, Any]:
    """Say how to read cells of a corpus.

    Args:
        cells: AnnData over the genes of the vocabulary, with ``obs["library_size"]``.

    Returns:
        Keywords of `ScDivaTokenizer.iter_cells`.
    """
    return {
        "library_size": cells.obs["library_size"].to_numpy(),
        "min_gene_overlap": 0.0,
        "min_count_overlap": 0.0,
    }


def evaluate_files(
    cells: anndata.AnnData, *, model: Any, tokenizer: Any, seed: int = 0, **estimation: Any
) -> dict[str, Any]:
    """Give the likelihood of the cells of each file.

    Args:
        cells: Held-out cells with ``obs["dataset"]`` and ``obs["library_size"]``.
        model: A diffusion model.
        tokenizer: Its tokenizer.
        seed: Of hidden genes.
        **estimation: ``n_draws`` and ``batch_size``.

    Returns:
        Result as `modeling_scdiva.evaluation.report` describes it.
    """
    numbers, baselines = [], []
    for name in sorted(set(cells.obs["dataset"])):
        group = cells[cells.obs["dataset"] == name].copy()
        table = score_cells(
            group, model=model, tokenizer=tokenizer, seed=seed, **estimation, **reading_of(group)
        )
        numbers.append({"data": name, "method": "scDiVa"} | nll_numbers(table))
        n_known = tokenizer.vocab_size - tokenizer.vocabulary.n_special_tokens
        lengths = table["scdiva_n_tokens"].to_numpy()
        uniform = np.array([np.log(n_known - np.arange(length)).sum() for length in lengths])
        baselines.append(
            {
                "data": name,
                "method": "uniform, genes only",
                "gene_nll_per_token": float(uniform.sum() / lengths.sum()),
                "n_cells": len(lengths),
            }
        )
    return {
        "title": "Likelihood of held-out cells",
        "numbers": numbers,
        "baselines": baselines,
        "columns": FILE_COLUMNS,
        "note": FILE_NOTE,
        "details": {},
    }


def nll_numbers(table: Any) -> dict[str, Any]:
    """Reduce scores of cells to the numbers of a table.

    Args:
        table: By `score_cells`.

    Returns:
        Means per cell and per token.
    """
    nats, tokens = table["scdiva_nll"].to_numpy(), table["scdiva_n_tokens"].to_numpy()
    values = table["scdiva_value_nll"].to_numpy()
    errors = table["scdiva_nll_standard_error"].to_numpy() / tokens
    return {
        "nll_per_cell": float(nats.mean()),
        "nll_per_cell_error": float(nats.std(ddof=1) / len(nats) ** 0.5) if len(nats) > 1 else None,
        "nll_per_token": float(nats.sum() / tokens.sum()),
        "gene_nll_per_token": float(table["scdiva_gene_nll"].sum() / tokens.sum()),
        "value_nll_per_token": None if np.isnan(values).any() else float(values.sum() / tokens.sum()),
        "draw_error_per_token": float(np.median(errors)),
        "truncated_share": float(table["scdiva_is_truncated"].mean()),
        "n_cells": len(nats),
    }


def evaluate_scvi(
    training: anndata.AnnData,
    cells: anndata.AnnData,
    *,
    model: Any,
    tokenizer: Any,
    seed: int = 0,
    **estimation: Any,
) -> dict[str, Any]:
    """Set the bound beside scVI's marginal likelihood on the same cells and genes.

    Args:
        training: Training cells of the corpus, for scVI.
        cells: Held-out cells.
        model: A diffusion model with a law of cell sizes.
        tokenizer: Its tokenizer.
        seed: Of everything random.
        **estimation: ``n_draws`` and ``batch_size``.

    Returns:
        Result as `modeling_scdiva.evaluation.report` describes it.

    Raises:
        ValueError: If the model has no law of cell sizes: the comparison would lack the number of genes.
    """
    if model.generation_config.size_law is None:
        msg = "This checkpoint has no law of cell sizes. Set generation_config.size_law by fit_size_law."
        raise ValueError(msg)
    n_expressed = np.asarray((cells.X > 0).sum(axis=1)).ravel()
    cells = cells[(n_expressed <= tokenizer.max_genes) & (n_expressed > 0)].copy()
    table = score_cells(cells, model=model, tokenizer=tokenizer, seed=seed, **estimation, **reading_of(cells))
    row = {"data": "held-out cells that fit", "method": "scDiVa, bound"} | nll_numbers(table)
    nats = scvi_marginal_nll(csr_matrix(training.X), csr_matrix(cells.X), seed=seed)
    scvi = {
        "data": row["data"],
        "method": "scVI, marginal likelihood",
        "nll_per_cell": float(nats.mean()),
        "nll_per_cell_error": float(nats.std(ddof=1) / len(nats) ** 0.5),
        "n_cells": len(nats),
    }
    difference = table["scdiva_nll"].to_numpy() - nats
    return {
        "title": "Likelihood beside scVI",
        "numbers": [row],
        "baselines": [scvi],
        "columns": ("data", "method", "nll_per_cell", "nll_per_cell_error", "n_cells"),
        "note": SCVI_NOTE,
        "details": {
            "mean_difference": float(difference.mean()),
            "difference_error": float(difference.std(ddof=1) / len(difference) ** 0.5),
            "n_training": training.n_obs,
        },
    }


def evaluate_exact(
    cells: anndata.AnnData, *, model: Any, tokenizer: Any, n_draws: int = 128, batch_size: int = 32
) -> dict[str, Any]:
    """Give the exact likelihood of samplers over the number of genes drawn at a step.

    Args:
        cells: Held-out cells with ``obs["library_size"]``.
        model: A diffusion model.
        tokenizer: Its tokenizer.
        n_draws: Network calls of the bound.
        batch_size: Cells in one call.

    Returns:
        Result as `modeling_scdiva.evaluation.report` describes it.
    """
    sizes = cells.obs["library_size"].to_numpy()
    inputs = dict(tokenizer.encode_anndata(cells, **reading_of(cells)))
    inputs["size_factors"] = torch.from_numpy(sizes / tokenizer.target_sum)
    how = {"rank_consistent": True, "ranking_weights": tokenizer.ranking_weights}
    rows = []
    for order in ("rank", "margin"):
        for n_genes in GENES_PER_STEP:
            exact = model.exact_nll(
                **inputs, **how, order=order, tokens_per_step=n_genes, batch_size=batch_size
            )
            rows.append(
                {"data": f"{order} order, {n_genes} at a step", "method": "exact"} | _per_token(exact)
            )
    bound = model.compute_nll(**inputs, **how, n_draws=n_draws, batch_size=batch_size)
    baseline = {"data": "random order, 1 at a step", "method": "bound"} | _per_token(bound)
    return {
        "title": "Exact likelihood of samplers",
        "numbers": rows,
        "baselines": [baseline],
        "columns": EXACT_COLUMNS,
        "note": EXACT_NOTE,
        "details": {},
    }


def _per_token(scored: Any) -> dict[str, Any]:
    n_tokens = float(scored.n_tokens.sum())
    return {
        "nll_per_token": float(scored.nll.sum()) / n_tokens,
        "gene_nll_per_token": float(scored.gene_nll.sum()) / n_tokens,
        "value_nll_per_token": float(scored.value_nll.sum()) / n_tokens,
        "n_cells": len(scored.n_tokens),
    }


def compare_objectives(
    models: Mapping[str, Any],
    loader: Iterable[Mapping[str, torch.Tensor]],
    cells: anndata.AnnData,
    *,
    tokenizer: Any,
    model: Any = None,
    **estimation: Any,
) -> dict[str, Any]:
    """Compare networks of equal training on the same cells and masks.

    Args:
        models: Name -> model; the last one is the row that the others are compared with.
        loader: Masked held-out batches with fixed masks.
        cells: Held-out cells for the bound.
        tokenizer: The tokenizer of all of them.
        model: Not read; so that the same keywords serve every protocol.
        **estimation: ``n_draws`` and ``batch_size``.

    Returns:
        Result as `modeling_scdiva.evaluation.report` describes it.
    """
    rows = []
    batches = list(loader)
    for name, network in models.items():
        table = score_cells(cells, model=network, tokenizer=tokenizer, **estimation, **reading_of(cells))
        rows.append(
            {"data": "held-out cells", "method": name} | nll_numbers(table) | masked_scores(network, batches)
        )
    return {
        "title": "Objectives at equal budget",
        "numbers": rows[:-1],
        "baselines": rows[-1:],
        "columns": OBJECTIVE_COLUMNS,
        "note": OBJECTIVE_NOTE,
        "details": {},
    }


@torch.no_grad()
def masked_scores(model: Any, batches: Iterable[Mapping[str, torch.Tensor]]) -> dict[str, float]:
    """Score the predictions at hidden positions, mean over cells.

    Args:
        model: A diffusion model.
        batches: Masked batches.

    Returns:
        ``accuracy`` of the likeliest gene and ``value_mse``.
    """
    model.eval()
    right: list[torch.Tensor] = []
    errors: list[torch.Tensor] = []
    for batch in batches:
        inputs = {name: entries.to(model.device) for name, entries in batch.items() if name != "timestep"}
        labels, targets = inputs["labels"], inputs["expression_labels"]
        outputs = model(**inputs, output_all_logits=False)
        where = (labels != -100).nonzero(as_tuple=True)
        hits = (outputs.logits.argmax(dim=1) == labels[where]).double()
        squares = (outputs.expression_predictions - targets)[where].double().square()
        n_hidden = (labels != -100).sum(dim=1).double()
        kept = n_hidden > 0
        for store, entries in ((right, hits), (errors, squares)):
            sums = torch.zeros(len(labels), dtype=torch.float64).index_add_(0, where[0].cpu(), entries.cpu())
            store.append((sums / n_hidden.cpu().clamp(min=1))[kept.cpu()])
    return {"accuracy": float(torch.cat(right).mean()), "value_mse": float(torch.cat(errors).mean())}
