"""Wrong labels whose truth is known: does the network find them, beside what needs no network?

Some of the held-out cells get the label of another class. The network scores a cell by the log-probability of
the label it was given, by Bayes' rule over the likelihoods of all labels; it never sees which are wrong.

Dimensions: N held-out cells, C labels.
Source: METHOD.md section 6.
"""

from typing import Any

import anndata
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from modeling_scdiva.evaluation.generation import kept_profile
from modeling_scdiva.evaluation.likelihood import reading_of
from modeling_scdiva.metrics.generation import fit_projection
from modeling_scdiva.metrics.outlier_baselines import knn_label_disagreement
from modeling_scdiva.metrics.outlier_cells import detection_scores, wrong_labels
from modeling_scdiva.tasks.scoring import score_labels

COLUMNS = ("data", "method", "auroc", "average_precision", "base_rate", "n_normal")
WRONG_FRACTION = 0.3
MIN_REFERENCE = 20  # training cells of a label
NOTE = (
    f"AUROC of telling held-out cells with a wrong label ({WRONG_FRACTION:.0%} of them, another class drawn "
    "as often as it occurs) from those with their own, 95 % bootstrap interval over cells. Regressions and "
    "neighbours know the labels of the training cells, as the network does."
)


def evaluate_label_errors(
    training: anndata.AnnData,
    cells: anndata.AnnData,
    *,
    model: Any,
    tokenizer: Any,
    condition: str = "cell_type",
    name: str = "cells",
    seed: int = 0,
    **estimation: Any,
) -> dict[str, Any]:
    """Give some cells a wrong label and look for it.

    Args:
        training: Training cells with raw counts in X, ``obs["library_size"]`` and ``obs[condition]``.
        cells: Held-out cells of the same kind.
        model: A diffusion model with this condition.
        tokenizer: Its tokenizer.
        condition: Name of the condition that holds the labels.
        name: Of the data, for the table.
        seed: Of labels and hidden genes.
        **estimation: ``n_draws`` and ``batch_size`` of `score_labels`.

    Returns:
        Result as `modeling_scdiva.evaluation.report` describes it.

    Raises:
        ValueError: If fewer than two labels have enough training cells.
    """
    counted = training.obs[condition].value_counts()
    labels = sorted(
        label for label in model.config.conditions[condition] if counted.get(label, 0) >= MIN_REFERENCE
    )
    if len(labels) < 2:
        msg = f"Two labels with {MIN_REFERENCE} training cells are needed, got {labels}."
        raise ValueError(msg)
    training, cells = (part[part.obs[condition].isin(labels)].copy() for part in (training, cells))
    known = training.obs[condition].astype(str).to_numpy()
    given, is_wrong = wrong_labels(
        cells.obs[condition].astype(str).to_numpy(), WRONG_FRACTION, np.random.default_rng(seed)
    )
    posterior = score_labels(
        cells,
        model=model,
        tokenizer=tokenizer,
        condition=condition,
        labels=labels,
        seed=seed,
        **estimation,
        **reading_of(cells),
    )
    places = np.array([labels.index(label) for label in given])
    rows = {"scDiVa, log-probability of the label": -posterior.to_numpy()[np.arange(len(given)), places]}
    rows |= _baselines(training, known, cells, given, tokenizer)
    scored = [
        {"data": name, "method": method} | detection_scores(scores[~is_wrong], scores[is_wrong], seed=seed)
        for method, scores in rows.items()
    ]
    return {
        "title": "Wrong labels",
        "numbers": scored[:1],
        "baselines": scored[1:],
        "columns": COLUMNS,
        "note": NOTE,
        "details": {"labels": labels, "n_training": training.n_obs, "n_wrong": int(is_wrong.sum())},
    }


def _baselines(
    training: anndata.AnnData, known: np.ndarray, cells: anndata.AnnData, given: np.ndarray, tokenizer: Any
) -> dict[str, np.ndarray]:
    """Score given labels (N,) by principal components, by neighbours and by depth alone."""
    values = [np.asarray(kept_profile(part, tokenizer)[0].todense()) for part in (training, cells)]
    projection = fit_projection(values[0], n_components=min(50, *(size - 1 for size in values[0].shape)))
    components = [projection.transform(part) for part in values]
    depths = [
        np.stack([np.log(part.obs["library_size"].to_numpy()), (value > 0).sum(axis=1)], axis=1)
        for part, value in zip((training, cells), values, strict=True)
    ]
    scores = {}
    for method, features in {
        "PCA + logistic regression": components,
        "depth + logistic regression": depths,
    }.items():
        regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(
            features[0], known
        )
        law = regression.predict_log_proba(features[1])
        scores[method] = -law[np.arange(len(given)), np.searchsorted(regression.classes_, given)]
    together = knn_label_disagreement(np.concatenate(components), np.concatenate([known, given]))
    return scores | {"PCA + nearest neighbours": together[len(known) :]}
