"""The cost curve of a corpus is measured on real builds; the arithmetic of data/SCALING.md is the code's.

Tests marked scale need the extra ray. Run: pytest tests/test_scaling.py -m "scale or not scale"
"""

import json
import runpy
import sys
from pathlib import Path

import pytest

from modeling_scdiva.model_card import result_section
from tokenization_scdiva import open_cells

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "benchmarks" / "run_scaling.py"


@pytest.fixture
def measure(monkeypatch, tmp_path):
    """Run the script on a few cells and return what it wrote."""

    def run(*arguments):
        words = ["run_scaling.py", "--n_files", "2", "--output", str(tmp_path / "scaling.json"), *arguments]
        monkeypatch.setattr(sys, "argv", words)
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return json.loads((tmp_path / "scaling.json").read_text("utf-8"))

    return run


def test_gpu_hours_of_the_page_are_those_of_the_formula():
    assert runpy.run_path(str(SCRIPT))["gpu_table"]() in (REPOSITORY / "data" / "SCALING.md").read_text(
        "utf-8"
    )


def test_made_up_files_hold_what_they_should(tmp_path):
    script = runpy.run_path(str(SCRIPT))
    files = script["make_files"](tmp_path, n_cells=70, n_molecules=800, n_files=3, seed=0)
    n_cells, n_molecules = 0, 0.0
    for path in files.values():
        with open_cells(path) as adata:
            n_cells, n_molecules = n_cells + adata.n_obs, n_molecules + adata.X[:].sum()
    assert n_cells == 70
    assert n_molecules / 70 == pytest.approx(800 * 1.083, rel=0.2)  # the mean of a log-normal of sigma 0.4
    assert 250 < script["read_only"](files) / 70 < 550


def test_curve_of_the_serial_build(measure, tmp_path):
    arguments = ["--n_cells", "20", "40", "--n_molecules", "300", "--n_repeats", "2", "--workers"]
    result = measure(*arguments)
    assert [row["method"] for row in result["numbers"]] == ["serial", "serial"]
    assert [row["data"].split(" of ")[0] for row in result["numbers"]] == ["20 cells", "40 cells"]
    for row in result["numbers"]:
        hours = 59_162_450 / row["cells_per_core_s"] / 3600
        assert row["core_hours_of_59_million_cells"] == pytest.approx(hours, rel=0.5)  # mean against median
        assert row["cells_per_s_low"] <= row["cells_per_s"] <= row["cells_per_s_high"]
    faster = zip(result["baselines"], result["numbers"], strict=True)
    assert all(reading["cells_per_core_s"] > serial["cells_per_core_s"] for reading, serial in faster)
    assert "### Cost of a corpus" in result_section(tmp_path / "scaling.json")
    with pytest.raises(FileExistsError, match="results are never overwritten"):
        measure(*arguments)


@pytest.mark.scale
def test_curve_with_ray(measure):
    pytest.importorskip("ray", reason="needs Ray: pip install 'scdiva[ray]'")
    result = measure("--n_cells", "40", "--n_molecules", "300", "--n_repeats", "1", "--workers", "1")
    serial, through_ray = result["numbers"]
    assert through_ray["method"] == "Ray, 1 worker"
    assert through_ray["bytes_per_cell"] == serial["bytes_per_cell"]
    assert through_ray["times_the_serial_loop"] > 0
