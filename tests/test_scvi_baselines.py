"""scVI and scANVI as baselines: they integrate, use labels, impute, repeat, and leave the generators alone.

Needs the eval-full extra (scvi-tools); no real data. Run: pytest tests/test_scvi_baselines.py
"""

import numpy as np
import pytest
import torch

from modeling_scdiva.metrics import scvi_baselines
from modeling_scdiva.metrics.imputation import profile_correlations, thin_cells
from modeling_scdiva.metrics.imputation_baselines import gene_mean, log_expression
from modeling_scdiva.metrics.scvi_baselines import ScviImputer, has_scvi, scvi_embeddings
from tokenization_scdiva import synthetic_cells

needs_scvi = pytest.mark.skipif(not has_scvi(), reason="scvi-tools is not installed: scdiva[eval-full]")


@pytest.fixture(scope="module")
def cells():
    return synthetic_cells(n_cells=160, n_genes=120, seed=9)


def distance_ratio(vectors, groups):
    """Mean distance between centres of groups over the mean distance of a cell from its own."""
    centres = {name: vectors[groups == name].mean(axis=0) for name in set(groups)}
    spread = np.mean(
        [np.linalg.norm(cell - centres[name]) for cell, name in zip(vectors, groups, strict=True)]
    )
    points = np.stack(list(centres.values()))
    return np.linalg.norm(points[:, None] - points[None], axis=-1).sum() / (
        len(points) * (len(points) - 1) * spread
    )


@needs_scvi
def test_labels_pull_the_types_apart(cells):
    batches, types = np.arange(160) // 4 % 2, cells.obs["cell_type"].to_numpy().astype(str)
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    (plain,) = scvi_embeddings(cells.X, batches, n_epochs=5, seed=1).values()
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert plain.shape == (160, 10)
    assert plain.dtype == np.float32
    half_labelled = np.where(np.arange(160) % 8 < 6, types, "")
    with torch.autocast("cpu", dtype=torch.bfloat16):  # for the network beside it
        both = scvi_embeddings(cells.X, batches, labels=half_labelled, n_epochs=5, seed=1)
    assert set(both) == {"scVI", "scANVI"}
    np.testing.assert_array_equal(both["scVI"], plain)  # never saw the labels
    assert both["scANVI"].shape == (160, 10)
    assert distance_ratio(both["scANVI"], types) > 1.2 * distance_ratio(plain, types)


@needs_scvi
def test_imputation_beats_the_mean(cells):
    counts, sizes = cells.X, np.asarray(cells.X.sum(axis=1)).ravel()
    test, train = np.arange(40), np.arange(40, 160)
    imputer = ScviImputer(counts[train], max_epochs=120, seed=2)
    thin = thin_cells(counts[test], 0.5)
    found = imputer.impute(thin, sizes[test])
    assert found.expected.shape == found.probability.shape == (40, 120)
    assert 0.0 <= found.probability.min() <= found.probability.max() <= 1.0
    again = imputer.impute(thin, sizes[test])
    np.testing.assert_array_equal(found.expected, again.expected)
    truth = log_expression(counts[test], sizes[test])
    own = profile_correlations(truth, found.expected)["gene_pearson"]
    mean = profile_correlations(truth, gene_mean(counts[train], sizes[train], 40).expected)["gene_pearson"]
    assert own > mean + 0.1


def test_without_the_library_one_reads_what_to_install(cells, monkeypatch):
    monkeypatch.setattr(scvi_baselines, "has_scvi", lambda: False)
    for call in (lambda: scvi_embeddings(cells.X, np.zeros(160)), lambda: ScviImputer(cells.X)):
        with pytest.raises(ImportError, match=r'pip install "scdiva\[eval-full\]"'):
            call()
