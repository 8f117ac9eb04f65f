"""benchmarks/run_gpu.py, tried out on this CPU, and on a GPU where there is one.

Run: pytest tests/test_gpu_benchmark.py
"""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "run_gpu.py"
SMALL = [
    "--tiny",
    "--n_steps",
    "20",
    "--n_cells",
    "64",
    "--batch_size",
    "8",
    "--num_workers",
    "0",
    "--n_repeats",
    "2",
]


@pytest.fixture
def run(monkeypatch, tmp_path):
    def run_script(*words):
        monkeypatch.setattr(sys, "argv", ["run_gpu.py", *words, "--output", str(tmp_path / "gpu.json")])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return json.loads((tmp_path / "gpu.json").read_text("utf-8"))

    return run_script


def check(result, kinds):
    assert set(result["training"]) == set(result["embedding"]) == set(kinds)
    for numbers in result["training"].values():
        assert 0.0 <= numbers["data_wait_fraction"] < 1.0
        assert numbers["mfu"] > 0.0
        assert numbers["slowest_cells_per_s"] <= numbers["cells_per_s"] <= numbers["fastest_cells_per_s"]
        # The made-up cells have some 45 genes each, and the log counts what was trained on.
        assert 20 < numbers["tokens_per_s"] / numbers["cells_per_s"] <= 49
    assert result["embedding"]["eager"]["from_counts"]["cells_per_s"] > 0
    memory = result["memory"]
    for kind in ("stored", "gradient_checkpointing"):
        largest = list(memory[kind]["largest_batch"].values())
        assert largest == sorted(largest)
        assert largest[0] > 0
        assert memory[kind]["gib_by_cells"]["8"] > memory[kind]["gib_by_cells"]["2"]
    assert memory["gradient_checkpointing"]["mib_per_cell"] < memory["stored"]["mib_per_cell"]
    best = max(numbers["mfu"] for numbers in result["training"].values())
    verdict = result["targets"]["mfu"]
    assert verdict == {
        "floor": 0.3,
        "aim": 0.45,
        "measured": best,
        "meets_floor": best >= 0.3,
        "meets_aim": best >= 0.45,
    }
    assert {"command", "commit", "versions", "hardware", "config", "seed", "peak_tflops"} <= set(result)
    assert result["is_result"] is False


def test_tried_out_on_a_cpu(run):
    check(run("--device", "cpu", "--compile", "off", *SMALL), ["eager"])


def test_without_a_gpu_it_says_so(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"torch sees no CUDA device.* --device cpu --tiny only tries"):
        run()


@pytest.mark.slow
def test_compiled_on_a_cpu(run):
    check(run("--device", "cpu", *SMALL), ["eager", "compiled"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tried_out_on_a_gpu(run):
    result = run("--device", "cuda", *SMALL)
    check(result | {"is_result": False}, ["eager", "compiled"])
    assert result["precision"] == "bf16"
