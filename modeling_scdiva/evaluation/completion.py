"""Completion: a share of a cell's genes is observed, the others are made; how near is the whole profile?

Hidden genes are made by the sampler, at the ranks that are hidden; the mean over several draws is the
posterior mean of the profile, and one draw a possible cell. Both are compared with the true cell on the genes
that were not observed, beside the mean of the training cells and the mean of the nearest ones by the observed
genes.

The model knows the ranks of what it sees and how many genes are missing; baselines do not need them. That is
an advantage which a real experiment would not give it, and the note says so.

Dimensions: N cells, G genes of the vocabulary.
Source: METHOD.md section 5.
"""

from collections.abc import Sequence
from typing import Any

import anndata
import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from modeling_scdiva.evaluation.generation import kept_profile
from modeling_scdiva.tasks.cells import TokenizedCells, read_cells
from modeling_scdiva.tasks.generation import condition_ids_of

COLUMNS = ("data", "method", "rmse", "pearson", "auroc", "n_cells")
N_NEIGHBORS = 20
NOTE = (
    "On the genes of the vocabulary that a cell does not observe: root mean squared error of log1p values (0 "
    "where a gene is silent), Pearson correlation within the cell, and AUROC of which genes are detected, "
    "means over cells. The model sees the ranks of the observed genes and how many are hidden; the baselines "
    f"see the observed values only. kNN: mean of the {N_NEIGHBORS} training cells nearest on these genes."
)


def evaluate_completion(
    reference: anndata.AnnData,
    held_out: anndata.AnnData,
    *,
    model: Any,
    tokenizer: Any,
    observed_shares: Sequence[float] = (0.1, 0.5, 0.9),
    n_samples: int = 4,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Complete held-out cells and compare with means and neighbours.

    Args:
        reference: Real training cells with raw counts in X.
        held_out: Cells to complete.
        model: A diffusion model.
        tokenizer: Its tokenizer.
        observed_shares: Shares of the gene tokens that are observed.
        n_samples: Draws per cell.
        seed: Of hidden genes and draws.
        **options: Settings of `ScDivaGenerationConfig`.

    Returns:
        Result as `modeling_scdiva.evaluation.report` describes it.
    """
    known = np.asarray(kept_profile(reference, tokenizer)[0].todense())
    truth = np.asarray(kept_profile(held_out, tokenizer)[0].todense())
    sizes = held_out.obs["library_size"].to_numpy() if "library_size" in held_out.obs else None
    reading: dict[str, Any] = {"min_gene_overlap": 0.0, "min_count_overlap": 0.0, "library_size": sizes}
    cells = read_cells(held_out, tokenizer=tokenizer, **reading)
    rows: dict[str, list[dict[str, Any]]] = {"numbers": [], "baselines": []}
    for share in observed_shares:
        name = f"{share:.0%} observed"
        inputs, observed = _partly_hidden(cells, share, model, tokenizer, seed)
        draws = [
            _dense(model.complete(**inputs, seed=seed + sample, **options), tokenizer)
            for sample in range(n_samples)
        ]
        mean = np.mean(draws, axis=0)
        found = np.mean([draw > 0 for draw in draws], axis=0)
        made_rows = {
            f"scDiVa, mean of {n_samples} draws": (mean, found + 1e-3 * mean),
            "scDiVa, one draw": (draws[0], draws[0]),
        }
        for method, prediction in made_rows.items():
            scores = completion_scores(*prediction, truth, observed)
            rows["numbers"].append({"data": name, "method": method} | scores)
        average = np.repeat(known.mean(axis=0)[None], len(truth), axis=0)
        rate = np.repeat((known > 0).mean(axis=0)[None], len(truth), axis=0)
        neighbours = nearest_means(known, truth, observed)
        for method, prediction in {"gene mean": (average, rate), "kNN": neighbours}.items():
            scores = completion_scores(*prediction, truth, observed)
            rows["baselines"].append({"data": name, "method": method} | scores)
    return {
        "title": "Completion",
        **rows,
        "columns": COLUMNS,
        "note": NOTE,
        "details": {"n_reference": reference.n_obs, "n_samples": n_samples},
    }


def _partly_hidden(
    cells: TokenizedCells, share: float, model: Any, tokenizer: Any, seed: int
) -> tuple[dict[str, Any], np.ndarray]:
    """Hide all but a share of the genes of each cell.

    Returns:
        Inputs of `complete`, and (N, G) bool, the genes of the vocabulary that stay in sight.
    """
    inputs: dict[str, Any] = dict(cells.batch(np.arange(cells.n_cells)))
    rng = np.random.default_rng(seed)
    ids, n_special = inputs["input_ids"], tokenizer.vocabulary.n_special_tokens
    observed = np.zeros((cells.n_cells, tokenizer.vocab_size - n_special), dtype=bool)
    for cell, n_genes in enumerate(cells.n_genes):
        n_hidden = round((1.0 - share) * n_genes)
        hidden = 1 + rng.permutation(n_genes)[:n_hidden]
        ids[cell, hidden] = model.config.mask_token_id
        shown = ids[cell].numpy()
        observed[cell, shown[shown >= n_special] - n_special] = True
    sizes = cells.library_size
    return inputs | {
        "size_factors": None if sizes is None else torch.from_numpy(sizes / tokenizer.target_sum),
        "condition_ids": condition_ids_of({}, cells.n_cells, sizes, model),
        "ranking_weights": tokenizer.ranking_weights,
    }, observed


def _dense(made: Any, tokenizer: Any) -> np.ndarray:
    """(N, G) log1p values of generated cells."""
    return np.asarray(tokenizer.decode_anndata(made).X.todense())


def nearest_means(
    known: np.ndarray, truth: np.ndarray, observed: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Average the training cells that are nearest on the observed genes.

    Args:
        known: (M, G) log1p values of the training cells.
        truth: (N, G) log1p values; only observed ones are read.
        observed: (N, G) bool.

    Returns:
        (N, G) mean values and (N, G) detection rates of the nearest cells.
    """
    means, rates = np.zeros_like(truth), np.zeros_like(truth)
    for cell in range(len(truth)):
        genes = observed[cell]
        distances = ((known[:, genes] - truth[cell, genes]) ** 2).sum(axis=1)
        nearest = np.argsort(distances, kind="stable")[:N_NEIGHBORS]
        means[cell], rates[cell] = known[nearest].mean(axis=0), (known[nearest] > 0).mean(axis=0)
    return means, rates


def completion_scores(
    prediction: np.ndarray, detection: np.ndarray, truth: np.ndarray, observed: np.ndarray
) -> dict[str, Any]:
    """Compare profiles on what was not observed.

    Args:
        prediction: (N, G) log1p values.
        detection: (N, G) score, higher where a gene is more likely detected.
        truth: (N, G) log1p values.
        observed: (N, G) bool.

    Returns:
        ``rmse``, ``pearson``, ``auroc`` and ``n_cells``, means over cells.
    """
    errors, correlations, areas = [], [], []
    for cell in range(len(truth)):
        hidden = ~observed[cell]
        true, predicted = truth[cell, hidden], prediction[cell, hidden]
        errors.append(np.sqrt(((true - predicted) ** 2).mean()))
        if true.std() > 0 and predicted.std() > 0:
            correlations.append(np.corrcoef(true, predicted)[0, 1])
        if 0 < (true > 0).sum() < len(true):
            areas.append(roc_auc_score(true > 0, detection[cell, hidden]))
    return {
        "rmse": float(np.mean(errors)),
        "pearson": float(np.mean(correlations)) if correlations else None,
        "auroc": float(np.mean(areas)) if areas else None,
        "n_cells": len(truth),
    }
