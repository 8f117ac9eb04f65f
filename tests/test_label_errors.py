"""Tests of the search for wrong labels: `evaluation.label_errors`.

Needs: both packages; no real data, no GPU.
Run: python -m pytest tests/test_label_errors.py
"""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from modeling_scdiva.evaluation.label_errors import WRONG_FRACTION, evaluate_label_errors
from modeling_scdiva.evaluation.likelihood import reading_of
from modeling_scdiva.metrics.outlier_cells import wrong_labels
from modeling_scdiva.tasks import score_labels
from tokenization_scdiva import synthetic_cells

TYPES = ["type_0", "type_1", "type_2", "type_3"]


@pytest.fixture(scope="module")
def cells():
    adata = synthetic_cells(n_cells=240, n_genes=120, seed=4)
    adata.obs["library_size"] = np.asarray(adata.X.sum(axis=1)).ravel()
    return adata


@pytest.fixture(scope="module")
def how(fresh_tiny_model, tokenizer):
    model = fresh_tiny_model(objective="elbo", conditions={"cell_type": [*TYPES, "unseen"]})
    return {"model": model.eval(), "tokenizer": tokenizer, "n_draws": 4, "batch_size": 64}


def test_labels_are_scored_by_their_log_probability(cells, how):
    training, held_out = cells[:180].copy(), cells[180:].copy()
    result = evaluate_label_errors(training, held_out, name="toy", seed=3, **how)
    assert result["details"] == {"labels": TYPES, "n_training": 180, "n_wrong": 18}
    (row,) = result["numbers"]
    assert (row["data"], row["n_normal"], row["n_abnormal"], row["base_rate"]) == ("toy", 42, 18, 0.3)
    given, is_wrong = wrong_labels(held_out.obs["cell_type"], WRONG_FRACTION, np.random.default_rng(3))
    posterior = score_labels(
        held_out, condition="cell_type", labels=TYPES, seed=3, **how, **reading_of(held_out)
    )
    scores = [-posterior.at[cell, label] for cell, label in zip(held_out.obs_names, given, strict=True)]
    assert row["auroc"] == pytest.approx(roc_auc_score(is_wrong, scores))


def test_baselines_know_the_types_and_depth_does_not(cells, how):
    result = evaluate_label_errors(cells[:180].copy(), cells[180:].copy(), **how)
    aurocs = {row["method"]: row["auroc"] for row in result["baselines"]}
    assert aurocs["PCA + logistic regression"] > 0.9
    assert aurocs["PCA + nearest neighbours"] > 0.9
    assert 0.2 < aurocs["depth + logistic regression"] < 0.8
    assert len(aurocs) == 3


def test_labels_need_training_cells(cells, how):
    rare = cells[:180].copy()
    rare = rare[(rare.obs["cell_type"] == "type_1") | (np.arange(180) < 40)].copy()
    with pytest.raises(ValueError, match=r"Two labels with 20 training cells are needed, got \['type_1'\]"):
        evaluate_label_errors(rare, cells[180:].copy(), **how)
