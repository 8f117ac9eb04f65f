"""Measure ways of doing the same thing side by side, in one process, and judge their ratio.

Other work on a machine slows every way alike, so only ratios of interleaved runs are kept: A B C, A B C, ...
The unit is CPU time of this process (all its threads); wall time is written down beside it. The median over
the repeats of the ratio *within* a repeat is the result, its smallest and largest value the spread.

A stage is a script of this folder: it measures, and hands its lines to `report`.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tokenization_scdiva.files import write_json

N_REPEATS = 5


@dataclass(frozen=True)
class Timing:
    """Seconds of one way, repeat by repeat.

    Attributes:
        cpu: CPU seconds of the process.
        wall: Seconds by the clock.
    """

    cpu: list[float]
    wall: list[float]

    @property
    def seconds(self) -> float:
        """Median CPU seconds."""
        return statistics.median(self.cpu)


@dataclass(frozen=True)
class Line:
    """One judged number of a stage.

    Attributes:
        name: What is measured, over what.
        value: Median over the repeats, or the number itself where it is counted and not timed.
        spread: Smallest and largest over the repeats.
        floor: Worst value that is accepted.
        aim: Value to reach.
        better: Whether higher or lower is better.
        unit: Of the value; ``x`` for a ratio.
        is_compared: Whether a run of another day must come near; False for absolute speeds.
    """

    name: str
    value: float
    spread: tuple[float, float]
    floor: float | None = None
    aim: float | None = None
    better: Literal["higher", "lower"] = "higher"
    unit: str = "x"
    is_compared: bool = True

    @property
    def is_met(self) -> bool:
        """Whether the floor is reached."""
        if self.floor is None:
            return True
        return self.value >= self.floor if self.better == "higher" else self.value <= self.floor


def interleave(
    ways: Mapping[str, Callable[[], Any]], *, n_repeats: int = N_REPEATS, n_warm_up: int = 1
) -> dict[str, Timing]:
    """Run all ways in turn, again and again.

    Args:
        ways: Name -> what to time. Each does the same work every time it is called.
        n_repeats: Timed rounds.
        n_warm_up: Rounds before, that are not counted: compilation, caches, lazy imports.

    Returns:
        Name -> times.
    """
    timings = {name: Timing([], []) for name in ways}
    for repeat in range(-n_warm_up, n_repeats):
        for name, run in ways.items():
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            result = run()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            del result
            if repeat >= 0:
                timings[name].cpu.append(cpu)
                timings[name].wall.append(wall)
    return timings


def ratio_line(name: str, above: Timing, below: Timing, *, scale: float = 1.0, **judged: Any) -> Line:
    """Make a line of the ratio of two ways' times, taken within each repeat.

    Args:
        name: What is measured.
        above: Times in the numerator.
        below: Times in the denominator.
        scale: Factor, where both did not do equally much.
        judged: ``floor``, ``aim``, ``better`` and the like of `Line`.

    Returns:
        The line.
    """
    ratios = [scale * a / b for a, b in zip(above.cpu, below.cpu, strict=True)]
    return number_line(name, ratios, **judged)


def number_line(name: str, numbers: list[float], **judged: Any) -> Line:
    """Make a line of one number per repeat.

    Args:
        name: What is measured.
        numbers: One per repeat.
        judged: ``floor``, ``aim``, ``better`` and the like of `Line`.

    Returns:
        The line.
    """
    return Line(name, statistics.median(numbers), (min(numbers), max(numbers)), **judged)


def report(stage: str, lines: list[Line], timings: Mapping[str, Timing], **details: Any) -> None:
    """Print the lines of a stage, and write them where ``--output`` says.

    Args:
        stage: Name of the stage.
        lines: What was judged.
        timings: What was timed, kept in full.
        details: Sizes and settings that the numbers belong to.
    """
    parser = argparse.ArgumentParser(description=f"Speed of the stage {stage!r}.")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    output = parser.parse_known_args()[0].output
    for line in lines:
        print(describe(line))
    if output is not None:
        content = {
            "lines": [asdict(line) | {"is_met": line.is_met} for line in lines],
            "timings": {name: asdict(timing) for name, timing in timings.items()},
            "details": details,
        }
        write_json(output, content)
    if not all(line.is_met for line in lines):
        sys.exit(f"{stage}: a floor is not met.")


def describe(line: Line) -> str:
    """Say a line in words.

    Args:
        line: One judged number.

    Returns:
        Text of one line.
    """
    text = f"{line.name}: {line.value:.3g} {line.unit} ({line.spread[0]:.3g} to {line.spread[1]:.3g})"
    if line.floor is None:
        return text
    verdict = "met" if line.is_met else "MISSED"
    return f"{text}, floor {line.floor:g} {verdict}, aim {line.aim:g}"
