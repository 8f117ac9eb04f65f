"""Results of a protocol: average the seeds, print the table, write the file that model cards and README read.

A result is what `modeling_scdiva.model_card` describes: ``title``, ``numbers`` (rows of scDiVa),
``baselines`` (rows of everything else on the same cells), ``columns``, ``note``, and ``details``, which holds
what figures are drawn from.

Notable choices:
- A number that is undefined in one run is undefined in the mean, and printed as "-": skipping the run would
  average over other runs than the row beside it.
- The spread is the sample standard deviation over runs, and stands behind its number; an interval stands
  behind that, in brackets.
- A result without baselines is refused, and so is one that would replace another.
"""

import io
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modeling_scdiva.model_card import SPREAD_ENDING, is_uncertainty, with_uncertainty
from modeling_scdiva.provenance import collect_provenance, result_path

NEEDED_KEYS = ("title", "numbers", "baselines")
# Longer sequences of `details` are for figures; the file keeps the shorter ones.
MAX_DETAIL_ENTRIES = 64
FIGURE_DPI = 150
ROUNDING = 1e-12


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Average the runs of one method.

    Args:
        runs: Numbers of each run (seed), all under the same names. Texts and bools may stand among them where
            every run has the same.

    Returns:
        The mean of each number; ``<name>_sd``, its sample standard deviation, from two runs on; ``n_seeds``.
        None, and no spread, for a number that is None or not finite in one of the runs.

    Raises:
        ValueError: If there is no run, or runs differ in their names.
    """
    if not runs:
        msg = "summarise needs the numbers of at least one run, got none."
        raise ValueError(msg)
    names = list(runs[0])
    for index, run in enumerate(runs):
        if set(run) != set(names):
            differing = sorted(set(run) ^ set(names))
            msg = f"Run {index} and run 0 differ in {differing}; all runs of a row report the same numbers."
            raise ValueError(msg)
    summary: dict[str, Any] = {}
    for name in names:
        summary |= _summarised(name, [run[name] for run in runs])
    return summary | {"n_seeds": len(runs)}


def data_names(paths: Sequence[Path]) -> dict[str, Path]:
    """Name files of cells for tables and result files.

    Args:
        paths: Files.

    Returns:
        File name without its ending -> path, in the order given.

    Raises:
        ValueError: If two files have the same name; one would replace the other in a result.
    """
    named: dict[str, Path] = {}
    for path in paths:
        if path.stem in named:
            msg = f"{named[path.stem]} and {path} would both be called {path.stem!r}. Rename or link one."
            raise ValueError(msg)
        named[path.stem] = path
    return named


def join_results(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Put the tables of several data sets below each other.

    Args:
        results: Result of each data set by its name, at least one.

    Returns:
        One result; ``details`` are those of each data set by name, a note that all share stands once.
    """
    notes = dict.fromkeys(result["note"] for result in results.values())
    named = (f"{name}: {result['note']}" for name, result in results.items())
    first = next(iter(results.values()))
    return {
        "title": first["title"],
        "columns": first["columns"],
        "numbers": [row for result in results.values() for row in result["numbers"]],
        "baselines": [row for result in results.values() for row in result["baselines"]],
        "note": next(iter(notes)) if len(notes) == 1 else " ".join(named),
        "details": {name: result["details"] for name, result in results.items()},
    }


def format_result(result: Mapping[str, Any]) -> str:
    """Lay a result out as text, rows of the same data together, spreads behind their numbers.

    Args:
        result: As this module describes it.

    Returns:
        Title, table and note.
    """
    _check(result)
    rows = [*result["numbers"], *result["baselines"]]
    data = list(dict.fromkeys(row.get("data") for row in rows))
    rows.sort(key=lambda row: data.index(row.get("data")))  # stable: scDiVa stays first
    columns = _columns(result)
    cells = [[name.replace("_", " ") for name in columns]]
    cells += [[_shown(row, name) for name in columns] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(columns))]
    is_text = [any(isinstance(row.get(name), str) for row in rows) for name in columns]
    lines = [
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(line, widths, is_text, strict=True)
        ).rstrip()
        for line in cells
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join([result["title"], *lines, *filter(None, [result.get("note")])])


def print_result(result: Mapping[str, Any]) -> None:
    """Print a result as `format_result` lays it out."""
    sys.stdout.write(f"\n{format_result(result)}\n")


def write_result(
    result: Mapping[str, Any],
    output: str | Path,
    slug: str,
    figures: Mapping[str, Any] | None = None,
    arguments: Sequence[str] | None = None,
) -> Path:
    """Write a result with where it comes from, and its figures beside it.

    A long run had better call `modeling_scdiva.provenance.result_path` before it starts and pass what that
    returns as ``output``: a name that is taken is then refused at once.

    Args:
        result: As this module describes it. NumPy numbers become plain ones, numbers that are not finite
            null; arrays and long lists in ``details`` are left out, their names stand in
            ``details_left_out``.
        output: A ``.json`` file, or a folder, which gives ``YYYY-MM-DD_slug.json`` in it.
        slug: What was measured, for the name in a folder.
        figures: Name -> Matplotlib figure, written as ``<stem of the JSON>_<name>.png``.
        arguments: Words of the command; default those of this process.

    Returns:
        Path of the JSON.
    """
    _check(result)
    path = result_path(output, slug)
    left_out: list[str] = []
    content = {key: _plain(value) for key, value in result.items() if key != "details"}
    # JSON sorts its keys; without the columns the order of the numbers would be lost.
    content["columns"] = _columns(result)
    content["details"] = _short(result.get("details") or {}, "", left_out)
    content["details_left_out"] = left_out
    content["figures"] = [f"{path.stem}_{name}.png" for name in figures or {}]
    content = collect_provenance(arguments) | content
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, figure in (figures or {}).items():
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=FIGURE_DPI, bbox_inches="tight")
        _write_whole(path.with_name(f"{path.stem}_{name}.png"), picture.getvalue())
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    _write_whole(path, text.encode("utf-8"))
    return path


def _check(result: Mapping[str, Any]) -> None:
    missing = [key for key in NEEDED_KEYS if not result.get(key)]
    if missing:
        msg = f"The result lacks {', '.join(missing)}. A number is shown beside its baselines or not at all."
        raise ValueError(msg)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _summarised(name: str, values: list[Any]) -> dict[str, Any]:
    """Return mean and spread of one number, or the text that all runs share."""
    if all(isinstance(value, str | bool | np.bool_) for value in values):
        if len(set(values)) > 1:
            msg = f"{name!r} is {values[0]!r} in one run and another in the next; it cannot be averaged."
            raise ValueError(msg)
        return {name: bool(values[0]) if isinstance(values[0], np.bool_) else values[0]}
    foreign = [value for value in values if value is not None and not _is_number(value)]
    if foreign:
        msg = f"{name!r} holds {foreign[0]!r} ({type(foreign[0]).__name__}); a row has numbers and texts."
        raise TypeError(msg)
    if any(value is None or not math.isfinite(value) for value in values):
        return {name: None}
    if all(isinstance(value, int | np.integer) for value in values) and len(set(values)) == 1:
        return {name: int(values[0])}  # a count that every run shares stays one, without a spread
    summary: dict[str, Any] = {name: float(np.mean(values))}
    if len(values) > 1:
        spread = float(np.std(values, ddof=1))
        # Equal numbers leave a spread of rounding, 1e-16, which would be printed.
        summary[name + SPREAD_ENDING] = spread if spread > ROUNDING * abs(summary[name]) else 0.0
    return summary


def _columns(result: Mapping[str, Any]) -> list[str]:
    """Return the columns to show: those named, else all in order of appearance, uncertainties left out."""
    if result.get("columns"):
        return list(result["columns"])
    found = dict.fromkeys(key for row in [*result["numbers"], *result["baselines"]] for key in row)
    first = [name for name in ("data", "method") if name in found]
    return first + [key for key in found if key not in first and not is_uncertainty(key, found)]


def _shown(row: Mapping[str, Any], name: str) -> str:
    return with_uncertainty(row, name, _written)


# A number to three decimals, or to three digits where it is small; "-" where it is undefined.
def _written(value: Any) -> str:
    if isinstance(value, bool | np.bool_ | str):
        return str(value)
    if value is None or not math.isfinite(value):
        return "-"
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:.3f}" if abs(value) >= 0.01 else f"{value:.3g}"


def _plain(value: Any) -> Any:
    """Turn a value into what JSON holds; numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple | set):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)


def _short(details: Mapping[str, Any], prefix: str, left_out: list[str]) -> dict[str, Any]:
    """Return what of the details is short, and name the rest."""
    kept: dict[str, Any] = {}
    for key, value in details.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            kept[str(key)] = _short(value, f"{name}.", left_out)
        elif _n_entries(value) > MAX_DETAIL_ENTRIES:
            left_out.append(name)
        else:
            kept[str(key)] = _plain(value)
    return kept


def _n_entries(value: Any) -> int:
    if isinstance(value, np.ndarray):
        return value.size
    if isinstance(value, Mapping):
        return sum(map(_n_entries, value.values()))
    return sum(map(_n_entries, value)) if isinstance(value, list | tuple | set) else 1


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file that is whole or not there."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
