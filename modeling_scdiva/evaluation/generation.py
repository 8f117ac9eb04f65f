"""How close generated cells come to real ones, beside generators without a network and beside real cells.

All cells are compared as the tokenizer keeps them: vocabulary genes, cut at `max_genes`, log1p of counts by
the library size over all genes. The floor is a second set of as many real cells; no generator can be expected
below it.

Notable choices:
- Baselines draw counts of the vocabulary genes and of one column for all other genes together, so that their
  library sizes, and with them the normalised values, are their own.
- The projection, the choice of genes and all baselines see the reference cells only, and these are not the
  floor: the cells to which components are fitted spread further along them than others do.

Dimensions: N cells of a set, G genes of the vocabulary.
Source: METHOD.md section 5.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import anndata
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, hstack

from modeling_scdiva.evaluation.figures import draw_umap
from modeling_scdiva.metrics.generation import fit_projection, generation_scores
from modeling_scdiva.metrics.generation_baselines import independent_marginals, scvi_draws, type_marginals

FLOOR = "other real cells"
COLUMNS = (
    "data", "method", "mmd", "energy_distance", "nn_accuracy", "auc_forest", "detection_pearson",
    "mean_pearson", "correlation_error", "zero_fraction_difference", "detected_genes_distance",
    "library_size_distance", "rare_gene_ratio", "variance_ratio", "n_network_calls",
)  # fmt: skip
NOTE = (
    "Against held-out real cells. MMD (squared, RBF) and energy distance on 50 principal components of the "
    "reference cells, 0 is best; 1-NN accuracy and the AUC of a random forest, 0.5 is best; Pearson of the "
    "detection rates and means per gene, 1 is best; RMS error of the gene-gene correlations, 0 is best; "
    "difference of the share of zeros; Wasserstein distance of the number of detected genes and of the log "
    "library size over kept genes; frequency of the genes that less than 1 % of the reference cells detect, "
    "and median variance per gene, each over that of real cells, 1 is best. As many other real cells are the "
    "floor."
)


def kept_profile(adata: anndata.AnnData, tokenizer: Any) -> tuple[csr_matrix, csr_matrix]:
    """Take cells as the tokenizer keeps them.

    Args:
        adata: AnnData with N cells of raw counts in X; ``obs["library_size"]`` where the AnnData no longer
            holds all genes of the run.
        tokenizer: `ScDivaTokenizer` of the model.

    Returns:
        (N, G) CSR log1p values and (N, G) CSR whole counts over the genes of the vocabulary.
    """
    given = adata.obs["library_size"].to_numpy() if "library_size" in adata.obs else None
    matrix = csr_matrix(adata.layers.get("counts", adata.X))
    counts = anndata.AnnData(matrix, obs=adata.obs[[]], var=adata.var)
    sizes = np.asarray(matrix.sum(axis=1)).ravel() if given is None else given
    encoded = tokenizer.encode_anndata(
        counts, library_size=sizes, min_gene_overlap=0.0, min_count_overlap=0.0
    )
    decoded = tokenizer.decode_anndata(encoded, library_size=sizes)
    return csr_matrix(decoded.X), csr_matrix(decoded.layers["counts"])


def generated_profile(adata: anndata.AnnData) -> tuple[csr_matrix, csr_matrix | None]:
    """Take cells that `generate_cells` made.

    Args:
        adata: Generated cells.

    Returns:
        (N, G) CSR log1p values, and (N, G) CSR whole counts where there are any.
    """
    counts = csr_matrix(adata.layers["counts"]) if "counts" in adata.layers else None
    return csr_matrix(adata.X), counts


def compare_generated(
    made: anndata.AnnData, real: anndata.AnnData, *, tokenizer: Any, seed: int = 0
) -> pd.DataFrame:
    """Compare generated cells with one third of real ones, and a second third with it.

    Args:
        made: Cells by `generate_cells`.
        real: AnnData with raw counts, at least 30 cells. Principal components are those of the last third.
        tokenizer: The tokenizer they were made with.
        seed: Of the thirds.

    Returns:
        DataFrame, a row for the generated cells and one for other real cells, a column per score.
    """
    thirds = np.array_split(np.random.default_rng(seed).permutation(real.n_obs), 3)
    thirds[1] = thirds[1][: made.n_obs]
    held_out, floor, reference = (kept_profile(real[np.sort(rows)], tokenizer) for rows in thirds)
    rows = {
        "generated": _scores(generated_profile(made), held_out, reference[0], seed),
        FLOOR: _scores(floor, held_out, reference[0], seed),
    }
    return pd.DataFrame(rows).T


def evaluate_generation(
    generated: Mapping[str, anndata.AnnData],
    *,
    reference: anndata.AnnData,
    held_out: anndata.AnnData,
    tokenizer: Any,
    name: str = "cells",
    label_key: str | None = None,
    include_scvi: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Score sets of generated cells beside baselines and the floor.

    Args:
        generated: Name of a generator -> its cells, by `generate_cells`.
        reference: Real training cells, raw counts in X. As many as were generated, drawn at random, are the
            floor; baselines are fitted on the others.
        held_out: Real cells to compare with.
        tokenizer: The tokenizer of the model.
        name: Of the data, for the table.
        label_key: Column of cell types in ``reference``, for the marginals per type.
        include_scvi: Train scVI and draw from it: minutes.
        seed: Of baselines and scores.

    Returns:
        Result as `modeling_scdiva.evaluation.report` describes it.

    Raises:
        ValueError: If fewer reference cells would be left than are taken for the floor.
    """
    n_cells = max(made.n_obs for made in generated.values())
    if reference.n_obs < 2 * n_cells:
        msg = (
            f"{n_cells:,} generated cells need {2 * n_cells:,} reference cells: as many are the floor, the "
            f"others fit the baselines. Got {reference.n_obs:,}."
        )
        raise ValueError(msg)
    order = np.random.default_rng(seed).permutation(reference.n_obs)
    floor, reference = (reference[np.sort(rows)].copy() for rows in (order[:n_cells], order[n_cells:]))
    real, known = kept_profile(held_out, tokenizer), kept_profile(reference, tokenizer)
    rows = []
    for method, made in generated.items():
        scores = _scores(generated_profile(made), real, known[0], seed)
        calls = float(made.obs["n_network_calls"].mean()) if "n_network_calls" in made.obs else None
        rows.append({"data": name, "method": method, "n_network_calls": calls} | scores)
    baselines = [
        {"data": name, "method": FLOOR} | _scores(kept_profile(floor, tokenizer), real, known[0], seed)
    ]
    labels = None if label_key is None else reference.obs[label_key].astype(str).to_numpy()
    draws = draw_baselines(
        reference, n_cells, labels=labels, tokenizer=tokenizer, include_scvi=include_scvi, seed=seed
    )
    for method, made in draws.items():
        scores = _scores(kept_profile(made, tokenizer), real, known[0], seed)
        baselines.append({"data": name, "method": method} | scores)
    return {
        "title": "Generation",
        "numbers": rows,
        "baselines": baselines,
        "columns": COLUMNS,
        "note": NOTE,
        "details": {"n_reference": reference.n_obs, "n_held_out": held_out.n_obs, "n_generated": n_cells},
    }


def joint_umap(made: anndata.AnnData, real: anndata.AnnData, *, tokenizer: Any, seed: int = 0) -> Any:
    """Draw generated and real cells on one UMAP of principal components of the real ones.

    Args:
        made: Generated cells.
        real: Real cells with raw counts in X.
        tokenizer: The tokenizer of the model.
        seed: Of the layout.

    Returns:
        A Matplotlib figure.
    """
    cells = [generated_profile(made)[0], kept_profile(real, tokenizer)[0]]
    projection = fit_projection(cells[1], n_components=min(30, *(size - 1 for size in cells[1].shape)))
    points = np.concatenate([projection.transform(np.asarray(part.todense())) for part in cells])
    origin = np.repeat(["generated", "real, held out"], [part.shape[0] for part in cells])
    return draw_umap(points, {"real and generated": origin}, seed=seed)


def draw_baselines(
    reference: anndata.AnnData,
    n_cells: int,
    *,
    labels: Sequence[str] | None,
    tokenizer: Any,
    include_scvi: bool,
    seed: int,
) -> dict[str, anndata.AnnData]:
    """Draw cells without a network, and from scVI.

    Args:
        reference: Real cells with raw counts in X.
        n_cells: Cells to draw.
        labels: (N,) cell types of the reference, or None.
        tokenizer: The tokenizer of the model.
        include_scvi: Train scVI.
        seed: Of the draws.

    Returns:
        Name -> AnnData (n_cells, G) of counts with ``obs["library_size"]``.
    """
    counts = csr_matrix(reference.X)
    sizes = np.asarray(counts.sum(axis=1)).ravel()
    if "library_size" in reference.obs:
        sizes = reference.obs["library_size"].to_numpy()
    others = csr_matrix(np.maximum(sizes - np.asarray(counts.sum(axis=1)).ravel(), 0)[:, None])
    whole = csr_matrix(hstack([counts, others]))
    rng = np.random.default_rng(seed)
    drawn = {"gene marginals": independent_marginals(whole, n_cells, rng)}
    if labels is not None:
        drawn["gene marginals per type"] = type_marginals(whole, labels, n_cells, rng)[0]
    if include_scvi:
        drawn["scVI, posterior of training cells"] = scvi_draws(whole, n_cells, seed=seed)
        drawn["scVI, prior"] = scvi_draws(whole, n_cells, latent="prior", seed=seed)
    return {method: _without_others(matrix, reference.var) for method, matrix in drawn.items()}


def _without_others(matrix: csr_matrix, var: pd.DataFrame) -> anndata.AnnData:
    """Keep the genes; the last column only counts towards the library size."""
    matrix = csr_matrix(matrix)
    genes = csr_matrix(matrix[:, :-1])
    is_cell = np.asarray(genes.sum(axis=1)).ravel() > 0  # a draw without a single gene is no cell
    made = anndata.AnnData(genes[is_cell], var=var.copy())
    made.obs["library_size"] = np.asarray(matrix.sum(axis=1)).ravel()[is_cell]
    return made


def _scores(
    made: tuple[csr_matrix, csr_matrix | None],
    real: tuple[csr_matrix, csr_matrix],
    reference: csr_matrix,
    seed: int,
) -> dict[str, Any]:
    """Compute all scores; a number that is undefined is None."""
    counts = None if made[1] is None else (made[1], real[1])
    n_components = min(50, reference.shape[0] - 1, reference.shape[1] - 1)
    scores = generation_scores(
        made[0], real[0], reference, counts=counts, n_components=n_components, seed=seed
    )
    scores.setdefault("library_size_distance", np.nan)
    return {key: float(value) if np.isfinite(value) else None for key, value in scores.items()}
