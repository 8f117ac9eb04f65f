"""Measure the speed of every stage, side by side with its peer, and fail where one became slower.

    make bench                    # all stages, below 20 minutes on two cores
    make bench STAGE=ranking      # one of them
    make bench DATA="a.h5ad b.h5ad"    # with these files as well
    python benchmarks/run_speed.py --output benchmarks/results    # keep the numbers

Each stage is a script in benchmarks/speed, run in a process of its own, and says by `--help` what it does. It
fails when a floor is missed, and when a ratio is more than 20 % worse than in the stored result.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modeling_scdiva.provenance import collect_provenance, result_path
from tokenization_scdiva.files import write_json

HERE = Path(__file__).resolve().parent
# In this order; the longest last.
STAGES = ("startup", "ranking", "corpus", "loader", "lengths", "head", "embedding", "sampling", "training")
WORST_REGRESSION = 0.2


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", help=f"default: all of {', '.join(STAGES)}")
    parser.add_argument("--data", nargs="+", default=[], help="real h5ad files, for a stage of their own")
    parser.add_argument("--output", type=Path, help="JSON file or folder, to keep the numbers")
    parser.add_argument("--stored", type=Path, help="result to compare with; default: the newest stored one")
    arguments = parser.parse_args()
    arguments.stages = tuple(arguments.stages) or STAGES
    if unknown := [stage for stage in arguments.stages if stage not in STAGES]:
        parser.error(f"there is no stage {', '.join(unknown)}; choose from {', '.join(STAGES)}.")
    return arguments


def measure(stage: str, files: Sequence[str] = ()) -> dict[str, Any]:
    """Run the script of a stage; what it prints is shown."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "stage.json"
        script = HERE / "speed" / f"{stage}.py"
        words = [sys.executable, str(script), *files, "--output", str(output)]
        done = subprocess.run(words, check=False)
        if not output.exists():
            sys.exit(f"The stage {stage} broke off with code {done.returncode}; see above.")
        return json.loads(output.read_text("utf-8"))


def newest_result() -> Path | None:
    """Find the newest stored result that holds all stages."""
    return max((HERE / "results").glob("*_speed*.json"), default=None, key=lambda path: path.name)


def tables(measured: dict[str, Any]) -> dict[str, Any]:
    """Make the rows of the table in README: judged numbers, and the seconds of all ways they come from."""
    numbers = [
        {
            "data": stage,
            "method": line["name"],
            "value": line["value"],
            "value_low": line["spread"][0],
            "value_high": line["spread"][1],
            "unit": line["unit"],
            "floor": line["floor"],
            "aim": line["aim"],
        }
        for stage, result in measured.items()
        for line in result["lines"]
    ]
    ways = [
        {"data": stage, "method": way, "value": statistics.median(timing["cpu"]), "unit": "CPU s"}
        for stage, result in measured.items()
        for way, timing in result["timings"].items()
    ]
    note = (
        "Value: median of at least five interleaved repeats, with the smallest and the largest. In bold what "
        "is judged by floor and aim; below it the CPU seconds of each way, for which only the ratios count."
    )
    columns = ["data", "method", "value", "unit", "floor", "aim"]
    title = "Speed, stage by stage"
    return {"title": title, "columns": columns, "numbers": numbers, "baselines": ways, "note": note}


def regressions(measured: dict[str, Any], stored: dict[str, Any]) -> list[str]:
    """Say which ratios are more than 20 % worse than the stored ones."""
    told = []
    for stage, numbers in measured.items():
        before = {line["name"]: line for line in stored.get(stage, {"lines": []})["lines"]}
        for line in numbers["lines"]:
            old = before.get(line["name"])
            if old is None or not line["is_compared"]:
                continue
            ratio = line["value"] / old["value"]
            worse = 1 / ratio if line["better"] == "higher" else ratio
            if worse > 1 + WORST_REGRESSION:
                told.append(f"{stage}: {line['name']} was {old['value']:.3g}, is {line['value']:.3g}")
    return told


def main() -> None:
    """Measure, compare, keep."""
    arguments = parse_arguments()
    output = None if arguments.output is None else result_path(arguments.output, "speed")
    start = time.perf_counter()
    measured = {}
    for stage in arguments.stages:
        print(f"--- {stage}", flush=True)
        measured[stage] = measure(stage)
    if arguments.data:
        print("--- real_files", flush=True)
        measured["real_files"] = measure("real_files", arguments.data)
    missed = [
        f"{stage}: {line['name']} misses its floor, {line['value']:.3g} instead of {line['floor']:g}"
        for stage, numbers in measured.items()
        for line in numbers["lines"]
        if not line["is_met"]
    ]
    stored = arguments.stored or newest_result()
    if stored is None:
        print("There is no stored result to compare with.")
    else:
        missed += regressions(measured, json.loads(stored.read_text("utf-8"))["stages"])
    if output is not None:
        content = collect_provenance() | {"benchmark": "speed", "seed": 0, "stages": measured}
        write_json(output, content | tables(measured))
        print(f"Wrote {output}.")
    compared = "" if stored is None else f", compared with {stored.name}"
    print(f"{len(measured)} stages in {time.perf_counter() - start:.0f} s{compared}.")
    if missed:
        sys.exit("\n".join(missed))


if __name__ == "__main__":
    main()
