"""Model cards: a template, and numbers that come from files only.

A result file is JSON with at least

    {"title": "Frozen embedding, cell types", "command": "...",
     "numbers":   [{"data": "pbmc", "method": "scDiVa", "knn_accuracy": 0.9, "knn_accuracy_sd": 0.01}],
     "baselines": [{"data": "pbmc", "method": "PCA-50", "knn_accuracy": 0.8, "knn_accuracy_sd": 0.01}]}

`numbers` are rows of this model, `baselines` rows of others on the same cells; a row is flat and holds texts
and numbers. `x_sd` is the spread of `x`, `x_low` and `x_high` bound it; they are printed behind it. Rows of
the same `data` stand together, this model first.
Optional: `note`, a sentence under the table; `columns`, those to show, in this order. Other keys (commit,
    seed, hardware, versions) are for the record.

The engine is `string.Template`: a card needs no more, and a template engine would be one more dependency.
"""

import json
import math
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from transformers import PreTrainedModel

NEEDED_KEYS = ("title", "command", "numbers", "baselines")
SPREAD_ENDING = "_sd"
INTERVAL_ENDINGS = ("_low", "_high")


def find_template(template: str | Path | None = None) -> Path:
    """Find the template of the card.

    Args:
        template: The one asked for; None for the project's own.

    Returns:
        Its path.

    Raises:
        FileNotFoundError: If it does not exist.
    """
    # The cards have a folder of their own that is not installed, and there must be one template only. The
    # wheel carries it into the package under the first name; in a checkout it is found where it is written.
    package = Path(__file__).parent
    own = [package / "model_card_template.md", package.parent / "model_cards" / "template.md"]
    candidates = own if template is None else [Path(template)]
    for path in candidates:
        if path.is_file():
            return path
    msg = f"No card template at {' or '.join(map(str, candidates))}. Pass template=... (--template)."
    raise FileNotFoundError(msg)


def fill_model_card(
    template: Path,
    *,
    model: PreTrainedModel,
    tokenizer: Any,
    results: Sequence[str | Path] = (),
    model_name: str,
) -> str:
    """Fill the template from the model, its tokenizer and result files.

    Args:
        template: Text with ``$model_name``, ``$network_table``, ``$training_table`` and ``$result_tables``.
        model: Gives the numbers of the network.
        tokenizer: Gives those of the vocabulary and the data it comes from.
        results: JSON files as this module describes them.
        model_name: Title, and what ``from_pretrained`` is shown to take.

    Returns:
        The card.

    Raises:
        ValueError: If a result file is incomplete, or the template asks for something unknown.
    """
    fields = {
        "model_name": model_name,
        "network_table": _table([{"": name, "value": value} for name, value in _network(model).items()]),
        "training_table": _table(
            [{"": name, "value": value} for name, value in _training(tokenizer).items()]
        ),
        "result_tables": "\n\n".join(result_section(Path(path)) for path in results)
        or "None were given when this folder was exported.",
    }
    try:
        return Template(template.read_text("utf-8")).substitute(fields)
    except (KeyError, ValueError) as error:
        msg = f"{template}: cannot fill {error}; a card has ${', $'.join(fields)}, and $$ for a dollar sign."
        raise ValueError(msg) from error


def _network(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config
    return {
        "class": type(model).__name__,
        "parameters": model.num_parameters(),
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "attention heads": config.num_attention_heads,
        "inner width": config.intermediate_size,
        "tokens": config.vocab_size,
        "objective": config.objective,
        "visible genes excluded": config.exclude_visible_genes,
        "value head": config.value_head,
        "dtype": str(model.dtype).removeprefix("torch."),
        "vocabulary": (config.vocabulary_hash or "not recorded")[:12],
    }


def _training(tokenizer: Any) -> dict[str, Any]:
    source = tokenizer.vocabulary.source
    facts = {
        "data sets": ", ".join(source.get("datasets", [])) or "not recorded",
        "cells": source.get("n_cells", "not recorded"),
        "values": source.get("value_kind", "not recorded"),
    }
    return facts | {
        "genes kept of a cell": tokenizer.max_genes,
        "gene order": tokenizer.gene_order,
        "molecules per cell after scaling": tokenizer.target_sum,
    }


def result_section(path: Path) -> str:
    """Write heading, table, note and command of one result file.

    Args:
        path: JSON file as this module describes it.

    Returns:
        Markdown.

    Raises:
        ValueError: If the file is incomplete, or a row holds what cannot be printed.
    """
    result = json.loads(path.read_text("utf-8"))
    missing = [key for key in NEEDED_KEYS if not result.get(key)]
    if missing:
        msg = (
            f"{path} lacks {', '.join(missing)}. Numbers go on a card with their baselines and command only."
        )
        raise ValueError(msg)
    rows = [row | {"method": f"**{row.get('method', 'scDiVa')}**"} for row in result["numbers"]]
    rows += result["baselines"]
    data = list(dict.fromkeys(row.get("data") for row in rows))
    rows.sort(key=lambda row: data.index(row.get("data")))  # stable: this model stays first
    try:
        table = _table(rows, result.get("columns"))
    except ValueError as error:
        msg = f"{path}: {error}"
        raise ValueError(msg) from error
    parts = [f"### {result['title']}", table, result.get("note", ""), f"`{result['command']}` ({path.name})"]
    return "\n\n".join(part for part in parts if part)


# Lay rows out as a Markdown table; columns in order of first appearance, spreads behind their numbers.
def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    if columns is None:
        found = dict.fromkeys(key for row in rows for key in row)
        first = [name for name in ("data", "method") if name in found]
        columns = first + [key for key in found if key not in first and not is_uncertainty(key, found)]
    lines = [
        "| " + " | ".join(name.replace("_", " ") for name in columns) + " |",
        "|" + " --- |" * len(columns),
    ]
    lines += [
        "| " + " | ".join(with_uncertainty(row, name, _written) for name in columns) + " |" for row in rows
    ]
    return "\n".join(lines)


def is_uncertainty(key: str, keys: Container[str]) -> bool:
    """Say whether a number of a row is the spread of another one, or bounds it."""
    endings = (SPREAD_ENDING, *INTERVAL_ENDINGS)
    return any(key.endswith(ending) and key.removesuffix(ending) in keys for ending in endings)


def with_uncertainty(row: Mapping[str, Any], name: str, written: Callable[[Any], str]) -> str:
    """Write a number of a row with its spread and interval, where it has them: 0.9 ± 0.01 [0.88, 0.92]."""
    spread, low, high = (row.get(name + ending) for ending in (SPREAD_ENDING, *INTERVAL_ENDINGS))
    text = written(row.get(name))
    if spread is not None:
        text += f" ± {written(spread)}"
    return text if low is None or high is None else f"{text} [{written(low)}, {written(high)}]"


# Write a number to three decimals, or to three digits where it is small; whole numbers with separators.
def _written(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool | str):
        return str(value).replace("|", "\\|").replace("\n", " ")
    if not isinstance(value, int | float) or not math.isfinite(value):
        msg = f"{value!r} is no finite number and no text; a row of a card holds nothing else."
        raise ValueError(msg)
    if isinstance(value, int) or value == int(value):
        return f"{int(value):,}"
    return f"{value:.3f}" if abs(value) >= 0.01 else f"{value:.3g}"
