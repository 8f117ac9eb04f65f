"""Results: averages over seeds, tables, files that model cards can read.

Needs no data. Run: pytest tests/test_report.py
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from modeling_scdiva.evaluation.figures import draw_mask_curve
from modeling_scdiva.evaluation.report import (
    data_names,
    format_result,
    join_results,
    print_result,
    summarise,
    write_result,
)
from modeling_scdiva.model_card import result_section

RESULT = {
    "title": "Cell types",
    "numbers": [{"data": "b", "method": "scDiVa", "macro_f1": 0.81, "macro_f1_sd": 0.02, "n_cells": 1200}],
    "baselines": [
        {"data": "a", "method": "PCA", "macro_f1": 0.9},
        {"data": "b", "method": "PCA", "macro_f1": None, "n_cells": 1200},
    ],
    "note": "Two data sets.",
}


def test_summary_by_hand():
    found = summarise(
        [{"score": 1.0, "n_cells": 40}, {"score": 2.0, "n_cells": 40}, {"score": 6.0, "n_cells": 40}]
    )
    assert found == {"score": 3.0, "score_sd": pytest.approx(math.sqrt(7.0)), "n_cells": 40, "n_seeds": 3}
    assert isinstance(found["n_cells"], int)


def test_one_run_has_no_spread():
    assert summarise([{"score": np.float32(0.5), "split": "donor"}]) == {
        "score": 0.5, "split": "donor", "n_seeds": 1,
    }  # fmt: skip


def test_equal_runs_have_no_spread_from_rounding():
    assert summarise([{"score": 0.1}] * 3)["score_sd"] == 0.0
    assert summarise([{"score": 0.0}, {"score": 1e-15}])["score_sd"] > 0.0


def test_counts_that_differ_are_averaged():
    assert summarise([{"n_epochs": 3}, {"n_epochs": 5}])["n_epochs"] == 4.0


@pytest.mark.parametrize("undefined", [None, math.nan, math.inf])
def test_undefined_in_one_run_is_undefined(undefined):
    found = summarise([{"score": 1.0, "other": 1.0}, {"score": undefined, "other": 3.0}])
    assert found["score"] is None
    assert "score_sd" not in found
    assert found["other"] == 2.0


def test_runs_that_cannot_be_averaged():
    with pytest.raises(ValueError, match="at least one run"):
        summarise([])
    with pytest.raises(ValueError, match=r"Run 1 and run 0 differ in \['ece', 'score'\]"):
        summarise([{"score": 1.0}, {"ece": 1.0}])
    with pytest.raises(ValueError, match="'split' is 'a' in one run"):
        summarise([{"split": "a"}, {"split": "b"}])
    with pytest.raises(TypeError, match=r"'curve' holds \[1\] \(list\)"):
        summarise([{"curve": [1]}])


def test_joined_results_keep_every_row():
    other = RESULT | {"numbers": [{"data": "c", "method": "scDiVa", "macro_f1": 0.5}], "note": "One."}
    whole = {"columns": ["method", "macro_f1"], "details": {"seeds": [0]}}
    joined = join_results({"first": RESULT | whole, "second": other | whole})
    assert joined["numbers"] == RESULT["numbers"] + other["numbers"]
    assert joined["baselines"] == 2 * RESULT["baselines"]
    assert joined["details"] == {"first": {"seeds": [0]}, "second": {"seeds": [0]}}
    assert joined["note"] == "first: Two data sets. second: One."
    assert join_results({"a": RESULT | whole, "b": RESULT | whole})["note"] == "Two data sets."


def test_files_of_one_name_would_replace_each_other():
    paths = [Path("a/blood.h5ad"), Path("a/gut.h5ad")]
    assert data_names(paths) == {"blood": paths[0], "gut": paths[1]}
    with pytest.raises(ValueError, match=r"a/blood\.h5ad and b/blood\.h5ad would both be called 'blood'"):
        data_names([*paths, Path("b/blood.h5ad")])


def test_table_keeps_rows_of_one_data_set_together(capsys):
    print_result(RESULT)
    title, head, rule, first, second, third, note = capsys.readouterr().out.strip().splitlines()
    assert title == "Cell types"
    assert head.split() == ["data", "method", "macro", "f1", "n", "cells"]
    assert set(rule) == {"-"}
    assert first.split() == ["b", "scDiVa", "0.810", "±", "0.020", "1,200"]
    assert second.split() == ["b", "PCA", "-", "1,200"]
    assert third.split() == ["a", "PCA", "0.900", "-"]
    assert note == "Two data sets."


def test_spread_and_interval_stand_behind_their_number(tmp_path):
    row = {"data": "b", "method": "scDiVa", "mae": 0.3, "mae_sd": 0.01, "mae_low": 0.28, "mae_high": 0.33}
    result = RESULT | {"numbers": [row], "columns": None}
    assert "0.300 ± 0.010 [0.280, 0.330]" in format_result(result)
    assert "mae low" not in format_result(result)
    path = write_result(result, tmp_path / "found.json", "toy", arguments=["run"])
    assert "0.300 ± 0.010 [0.280, 0.330]" in result_section(path)


def test_columns_are_those_named():
    table = format_result(RESULT | {"columns": ["method", "macro_f1"]})
    assert table.splitlines()[1].split() == ["method", "macro", "f1"]


@pytest.mark.parametrize("key", ["title", "numbers", "baselines"])
def test_a_result_without_baselines_is_refused(key, tmp_path):
    lacking = {name: value for name, value in RESULT.items() if name != key}
    with pytest.raises(ValueError, match=f"lacks {key}"):
        format_result(lacking)
    with pytest.raises(ValueError, match=f"lacks {key}"):
        write_result(lacking, tmp_path, "types")
    assert list(tmp_path.iterdir()) == []


def test_file_is_what_a_model_card_reads(tmp_path):
    row = {"data": "b", "method": "scDiVa", "f1": np.float32(0.5), "n": np.int64(7), "auroc": math.nan}
    details = {
        "classes": ["B", "T"],
        "umap": np.zeros((40, 2)),
        "per_class": {"f1": [0.1, math.inf], "probabilities": [[0.5, 0.5]] * 33},
        "n_left_out": np.int64(3),
    }
    figure = draw_mask_curve([0.1, 0.5], {"scDiVa": [1.0, None]}, "share hidden", "accuracy")
    result = RESULT | {"numbers": [row], "details": details}
    path = write_result(
        result, tmp_path / "new", "types", {"curve": figure}, arguments=["run.py", "--seed", "0"]
    )
    assert path.name.endswith("_types.json")
    written = json.loads(path.read_text("utf-8"))
    assert written["numbers"] == [{"data": "b", "method": "scDiVa", "f1": 0.5, "n": 7, "auroc": None}]
    assert written["details"] == {"classes": ["B", "T"], "per_class": {"f1": [0.1, None]}, "n_left_out": 3}
    assert written["details_left_out"] == ["umap", "per_class.probabilities"]
    assert written["command"] == "run.py --seed 0"
    assert {"commit", "date", "versions", "hardware"} <= set(written)
    assert written["figures"] == [f"{path.stem}_curve.png"]
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, f"{path.stem}_curve.png"]
    assert (path.parent / f"{path.stem}_curve.png").read_bytes().startswith(b"\x89PNG")
    section = result_section(path)
    assert "| data | method | f1 | n | auroc | macro f1 | n cells |" in section  # in order of appearance
    assert "| b | **scDiVa** | 0.500 | 7 | - | - | - |" in section
    assert "`run.py --seed 0`" in section


def test_results_are_never_replaced(tmp_path):
    path = write_result(RESULT, tmp_path / "one.json", "types")
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="never overwritten"):
        write_result(RESULT, path, "types")
    assert path.read_bytes() == before
