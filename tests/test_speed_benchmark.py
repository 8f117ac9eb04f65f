"""The speed benchmark judges floors and regressions as it says.

Needs no data. Run: pytest tests/test_speed_benchmark.py
"""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def side_by_side():
    return runpy.run_path(str(BENCHMARKS / "speed" / "side_by_side.py"), run_name="side_by_side")


@pytest.fixture(scope="module")
def run_speed():
    return runpy.run_path(str(BENCHMARKS / "run_speed.py"), run_name="run_speed")


def stage(value, better="higher", **line):
    return {
        "a stage": {
            "lines": [{"name": "a over b", "value": value, "better": better, "is_compared": True} | line]
        }
    }


@pytest.mark.parametrize(
    ("before", "now", "better", "is_worse"),
    [(10.0, 8.4, "higher", False), (10.0, 8.2, "higher", True), (10.0, 99.0, "higher", False),
     (0.50, 0.59, "lower", False), (0.50, 0.61, "lower", True), (0.50, 0.05, "lower", False)],
)  # fmt: skip
def test_more_than_a_fifth_worse_is_a_regression(run_speed, before, now, better, is_worse):
    told = run_speed["regressions"](stage(now, better), stage(before, better))
    assert bool(told) == is_worse
    if told:
        assert told == [f"a stage: a over b was {before:.3g}, is {now:.3g}"]


def test_absolute_speeds_and_new_lines_are_not_compared(run_speed):
    assert run_speed["regressions"](stage(1.0, is_compared=False), stage(9.0)) == []
    assert run_speed["regressions"](stage(1.0), {}) == []


def test_ratio_is_taken_within_each_repeat(side_by_side):
    timing = side_by_side["Timing"]
    slow, fast = timing([2.0, 30.0, 4.0], [0.0] * 3), timing([1.0, 10.0, 2.0], [0.0] * 3)
    line = side_by_side["ratio_line"]("slow over fast", slow, fast, floor=2.5, aim=3.0)
    assert (line.value, line.spread, line.is_met) == (2.0, (2.0, 3.0), False)
    assert side_by_side["describe"](line) == "slow over fast: 2 x (2 to 3), floor 2.5 MISSED, aim 3"


def test_ways_are_run_in_turn(side_by_side):
    calls = []
    ways = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = side_by_side["interleave"](ways, n_repeats=3, n_warm_up=1)
    assert calls == list("abababab")
    assert [len(timings[name].cpu) for name in "ab"] == [3, 3]


def test_every_stage_has_its_script(run_speed):
    assert all((BENCHMARKS / "speed" / f"{name}.py").exists() for name in run_speed["STAGES"])


def test_an_unknown_stage_is_refused():
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "run_speed.py", "flying"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "there is no stage flying; choose from startup, ranking" in done.stderr
