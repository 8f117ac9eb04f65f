"""The perturbation protocol: folds that leak nothing, baselines by hand, one table for all methods.

Needs no data. Run: pytest tests/test_perturbation_evaluation.py
"""

import anndata as ad
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from scipy import stats

from modeling_scdiva.evaluation.perturbation import (
    CEILING,
    MODEL,
    RANDOM_WEIGHTS,
    REFERENCE,
    PerturbationProtocol,
    evaluate_perturbation,
)
from modeling_scdiva.evaluation.perturbation_folds import FoldData, leave_levels_out, leave_targets_out
from modeling_scdiva.evaluation.report import format_result
from modeling_scdiva.finetuning import FinetuningArguments
from modeling_scdiva.tasks.perturbation_data import (
    CONTROL,
    control_means,
    read_perturbed_cells,
    split_perturbation,
    target_tokens,
    unknown_targets,
)
from modeling_scdiva.tasks.perturbation_training import PerturbationSettings, panel_genes
from tokenization_scdiva import synthetic_cells

NAMES = ["control", "GENE1", "GENE2", "GENE3", "control", "GENE1+GENE2", "GENE4"]
QUICK = {
    "arguments": FinetuningArguments(n_epochs=1, batch_size=32, learning_rate=1e-3),
    "accelerator": Accelerator(cpu=True),
    "perturbation_key": "perturbation",
}


def make_screen(n_cells=280):
    cells = synthetic_cells(n_cells=n_cells, n_genes=120, n_cell_types=4, seed=8)
    names = np.resize(NAMES, n_cells)
    counts, rng = cells.X.toarray(), np.random.default_rng(0)
    for place, target in enumerate(["GENE1", "GENE2", "GENE3", "GENE4"]):
        own = np.array([target in name for name in names])
        counts[own, 60 + 8 * place : 68 + 8 * place] += rng.poisson(20, (own.sum(), 8))
    screen = ad.AnnData(counts.astype(np.float32), obs=cells.obs, var=cells.var)
    screen.obs["perturbation"] = names
    return screen


@pytest.fixture(scope="module")
def screen():
    return make_screen()


@pytest.fixture(scope="module")
def cells(screen, tokenizer):
    return read_perturbed_cells(
        screen, tokenizer=tokenizer, perturbation_key="perturbation", match_keys=["donor_id"]
    )


def fold_data(cells, fold, tokenizer, **kwargs):
    names = sorted(set(cells.perturbations) - {CONTROL})
    settings = PerturbationSettings()
    return FoldData(
        cells,
        fold,
        gene_ids=panel_genes(cells, fold.train, vocabulary=tokenizer.vocabulary, settings=settings),
        targets=target_tokens(names, vocabulary=tokenizer.vocabulary),
        gene_embeddings=np.random.default_rng(0).normal(size=(tokenizer.vocab_size, 16)),
        **kwargs,
    )


def test_no_target_of_the_test_side_is_seen(cells):
    rows = np.arange(len(cells.perturbations))
    tested = []
    for fold in leave_targets_out(cells, rows, n_folds=2, seed=0):
        train, test = set(cells.perturbations[fold.train]), set(cells.perturbations[fold.test])
        held = set(fold.name.split(", "))
        assert not any(held & set(split_perturbation(name)) for name in train)
        single = {name for name in test - {CONTROL} if "+" not in name}
        assert all(held & set(split_perturbation(name)) for name in single)
        assert not test & train - {CONTROL}
        assert not set(fold.train) & set(fold.test)
        assert CONTROL in train & test
        assert sorted([*fold.train, *fold.test]) == rows.tolist()
        groups = cells.groups[fold.test[cells.is_control[fold.test]]]
        assert set(groups) == set(cells.groups)
        tested += sorted(test - {CONTROL})
    assert set(tested) == {"GENE1", "GENE2", "GENE3", "GENE4", "GENE1+GENE2"}


def test_combinations_are_told_apart_by_the_targets_seen(cells, tokenizer):
    """Each pair: in the folds of its targets, and once in a fold that holds neither."""
    rows = np.arange(len(cells.perturbations))
    found = []
    for fold in leave_targets_out(cells, rows, n_folds=4, seed=0):
        data = fold_data(cells, fold, tokenizer)
        held = fold.name
        for name, n_seen in zip(data.truth.names, data.n_seen, strict=True):
            found.append((name, n_seen, held in name))
    assert sorted(found) == [
        *[(name, "0/1", True) for name in ("GENE1",)],
        ("GENE1+GENE2", "1/2", True),
        ("GENE1+GENE2", "1/2", True),
        ("GENE1+GENE2", "2/2", False),
        *[(name, "0/1", True) for name in ("GENE2", "GENE3", "GENE4")],
    ]


def test_levels_are_left_out_with_their_controls(screen, cells):
    levels = screen.obs["cell_type"].to_numpy().astype(object)
    folds = list(leave_levels_out(cells, np.arange(screen.n_obs), levels=levels))
    assert [fold.name for fold in folds] == ["type_0", "type_1", "type_2", "type_3"]
    for fold in folds:
        assert set(levels[fold.test]) == {fold.name}
        assert fold.name not in levels[fold.train]


def test_nothing_is_fitted_on_test_cells(screen, tokenizer):
    """Other test cells: the same panel, weights, components and predictions."""
    found = []
    for change in (0, 40):
        other = screen.copy()
        read = read_perturbed_cells(other, tokenizer=tokenizer, perturbation_key="perturbation")
        fold = next(iter(leave_targets_out(read, np.arange(other.n_obs), n_folds=2, seed=0)))
        dense = np.asarray(other.X).copy()
        dense[fold.test, 100:120] += change
        other.X = dense
        read = read_perturbed_cells(other, tokenizer=tokenizer, perturbation_key="perturbation")
        data = fold_data(read, fold, tokenizer)
        found.append((data.gene_ids, data.weights, *data.components, *data.baseline_deltas().values()))
        truth = data.truth.deltas
    for one, same in zip(*found, strict=True):
        np.testing.assert_array_equal(one, same)
    assert np.isfinite(truth).all()


def test_baselines_by_hand(cells, tokenizer):
    rows = np.arange(len(cells.perturbations))
    fold = next(iter(leave_targets_out(cells, rows, n_folds=4, seed=1)))
    data = fold_data(cells, fold, tokenizer)
    found = data.baseline_deltas()
    assert set(found) >= {"no change", REFERENCE, "control-matched mean", "linear on gene PCA"}
    values, groups = cells.dense(rows, data.gene_ids).astype(np.float64), cells.groups
    means = control_means(cells, fold.train, data.gene_ids)
    for row in fold.train:
        values[row] -= means[groups[row]]
    names = cells.perturbations[fold.train]
    per_name = [values[fold.train[names == name]].mean(axis=0) for name in data.pooled.names]
    np.testing.assert_allclose(found[REFERENCE][0], np.mean(per_name, axis=0), atol=1e-5)
    test_name = data.truth.names[0]
    own = groups[fold.test[cells.perturbations[fold.test] == test_name]]
    perturbed = fold.train[names != CONTROL]
    expected = sum(
        (own == group).mean() * values[perturbed[groups[perturbed] == group]].mean(axis=0)
        for group in set(own)
    )
    np.testing.assert_allclose(found["control-matched mean"][0], expected, atol=1e-5)


def test_controls_follow_the_groups(cells, tokenizer):
    fold = next(iter(leave_targets_out(cells, np.arange(len(cells.perturbations)), n_folds=2, seed=0)))
    data = fold_data(cells, fold, tokenizer)
    rows = data.draw_controls(data.truth.names[0], n_cells=25, seed=0)
    assert len(rows) == 25
    assert cells.is_control[rows].all()
    assert set(rows) <= set(fold.test)


def test_the_measured_change_is_called_as_it_was_measured(cells, tokenizer):
    fold = next(iter(leave_targets_out(cells, np.arange(len(cells.perturbations)), n_folds=2, seed=0)))
    data = fold_data(cells, fold, tokenizer)
    n_called = 0
    for name, delta, is_de in zip(data.truth.names, data.truth.deltas, data.truth.is_de, strict=True):
        p_values = data.predicted_p_values(name, delta)
        np.testing.assert_array_equal(stats.false_discovery_control(p_values) < 0.05, is_de)
        assert (data.predicted_p_values(name, delta, n_parts=2) >= p_values - 1e-12).all()
        n_called += is_de.sum()
    assert n_called
    # Controls that all move alike keep their spread; the change of each cell adds to it.
    rows = data.draw_controls(data.truth.names[0], n_cells=25, seed=0)
    alike = data.moved_spread(rows, np.full(len(data.gene_ids), 0.3))
    np.testing.assert_allclose(alike, data.moved_spread(rows, np.zeros(len(data.gene_ids))))
    apart = np.random.default_rng(0).normal(0, 5, (25, len(data.gene_ids)))
    assert (data.moved_spread(rows, apart) > alike).all()


def check(result, methods):
    rows = [*result["numbers"], *result["baselines"]]
    assert {row["method"] for row in result["numbers"]} == {MODEL}
    assert {row["method"] for row in rows} >= methods
    rows = [row for row in rows if "seen" not in row["data"]]
    assert all(set(row) >= {"data", "method", "pearson_delta", "weighted_squared_error"} for row in rows)
    nothing = next(row for row in rows if row["method"] == "no change")
    assert nothing["pearson_delta"] == -1.0
    assert nothing["discrimination"] == 0.5
    assert (nothing["normalised_squared_error"], nothing["significance_jaccard"]) == (1.0, 0.0)
    assert nothing["direction_fidelity"] == nothing["de_overlap"] == 0.0
    assert nothing["pearson_expression"] > 0.7  # why changes are scored
    assert set(result["details"]["dynamic_range"]) >= {"pearson_delta", "direction_reach", "weighted_r2"}
    assert format_result(result)
    details = result["details"]
    assert details["predicted_delta"].shape == details["true_delta"].shape
    assert len(details["predicted_delta"]) == len(details["units"])
    return {row["method"]: row for row in rows}


def test_targets_left_out(screen, fresh_tiny_model, tokenizer):
    model = fresh_tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = evaluate_perturbation(
        screen,
        model=model,
        tokenizer=tokenizer,
        protocol=PerturbationProtocol(n_folds=4, seeds=(0, 1), n_control_cells=16, n_splits=2),
        settings=PerturbationSettings(match_keys=["donor_id"], max_cells=10),
        **QUICK,
    )
    methods = {RANDOM_WEIGHTS, REFERENCE, "additive", "matching mean", "linear on scDiVa genes", CEILING}
    rows = check(result, methods)
    assert rows[MODEL]["n_seeds"] == 2
    assert len({row["n_units"] for row in rows.values()}) == 1  # every method in every fold
    assert {rows[method]["n_degenerate"] for method in ("no change", MODEL)} == {rows[MODEL]["n_units"], 0}
    groups = {row["data"].partition(": ")[2] for row in result["baselines"]}
    assert groups >= {"", "0/1 targets seen", "2/2 targets seen"}
    # GENE3 or GENE4 is alone in its fold and has none; the others still count.
    assert rows[REFERENCE]["discrimination"] == pytest.approx(0.5)
    for score in ("pearson_delta", "significance_jaccard", "direction_fidelity", "direction_reach"):
        assert rows[CEILING][score] > rows[REFERENCE][score], score
        assert 0 < result["details"]["dynamic_range"][score] <= 1, score
    assert rows[CEILING]["normalised_squared_error"] < rows[REFERENCE]["normalised_squared_error"]
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    intervals = result["details"]["intervals"]
    assert intervals[MODEL]["pearson_delta"]["low"] <= intervals[MODEL]["pearson_delta"]["high"]
    means = {
        method: intervals[method]["pearson_delta"]["mean"] for method in ("additive", REFERENCE, CEILING)
    }
    found = intervals["additive"]["pearson_delta"]
    assert found["difference"] == pytest.approx(means["additive"] - means[REFERENCE])
    assert found["scaled"] == pytest.approx(found["difference"] / (means[CEILING] - means[REFERENCE]))


def test_cell_types_left_out(screen, fresh_tiny_model, tokenizer):
    stimulated = screen[screen.obs["perturbation"].isin(["control", "GENE1"])].copy()
    stimulated.obs["perturbation"] = stimulated.obs["perturbation"].astype(str).replace("GENE1", "IFN")
    keep = ~((stimulated.obs["cell_type"] == "type_3") & (np.arange(stimulated.n_obs) > 40))

    def evaluate(*match_keys):
        return evaluate_perturbation(
            stimulated[keep.to_numpy()],
            model=fresh_tiny_model(),
            tokenizer=tokenizer,
            protocol=PerturbationProtocol(
                holdout_key="cell_type", seeds=(0,), min_cells=8, n_splits=2, with_random_weights=False
            ),
            settings=PerturbationSettings(
                match_keys=match_keys, perturbation_genes={"IFN": ["GENE1"]}, max_cells=10, min_cells=5
            ),
            **QUICK,
        )

    result = evaluate()
    rows = check(result, {REFERENCE, "control-matched mean", "linear on control profile", CEILING})
    assert result["details"]["units"] == [f"IFN in type_{i}" for i in range(3)]
    assert "IFN type_3" in result["note"]
    assert rows[MODEL]["n_units"] == 3
    # The levels that are left out are matched by, named as a match key or not.
    assert evaluate("cell_type")["baselines"] == result["baselines"]


def test_unknown_targets_are_listed(tokenizer):
    names = ["GENE1", "JAK2", "GENE1+STAT1+ctrl", "NT", "IFN", "IFN"]
    found = unknown_targets(
        names, vocabulary=tokenizer.vocabulary, perturbation_genes={"IFN": []}, control_label="NT"
    )
    assert found == ["GENE1+STAT1", "JAK2"]


def test_refusals(screen, fresh_tiny_model, tokenizer, cells):
    model = fresh_tiny_model()
    with pytest.raises(ValueError, match=r"No perturbation has min_cells=1000 cells and as many controls"):
        evaluate_perturbation(
            screen, model=model, tokenizer=tokenizer, protocol=PerturbationProtocol(min_cells=1000), **QUICK
        )
    with pytest.raises(KeyError, match="no column 'tissue'"):
        evaluate_perturbation(
            screen,
            model=model,
            tokenizer=tokenizer,
            protocol=PerturbationProtocol(holdout_key="tissue"),
            **QUICK,
        )
    with pytest.raises(ValueError, match="2 folds or more and a target for each, got 9"):
        next(iter(leave_targets_out(cells, np.arange(20), n_folds=9, seed=0)))
    levels = np.full(len(cells.perturbations), "a", dtype=object)
    with pytest.raises(ValueError, match=r"needs two of them, got \['a'\]"):
        next(iter(leave_levels_out(cells, np.arange(20), levels=levels)))
    with pytest.raises(TypeError, match="got a path"):
        evaluate_perturbation("screen.h5ad", model=model, tokenizer=tokenizer, **QUICK)
