"""Conditions of a cell as numbers: from names and depths to the ids that the network reads.

A condition is a column of ``obs`` (cell type, tissue, technical batch, donor, ...) or depth. Its ids count
from 1; 0 means "not given", which training shows often enough for the network to know it.

Dimensions: N cells, B cells in a loader batch, K conditions.
Source: METHOD.md section 5.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .configuration_scdiva import LIBRARY_SIZE

NOT_GIVEN = 0
Conditions = Mapping[str, Sequence[Any]]


def category_ids(name: str, entries: Any, conditions: Conditions, *, is_strict: bool) -> np.ndarray:
    """Turn the entries of one column into ids.

    Args:
        name: Name of the condition.
        entries: (N,) categories as text, None where not given; for "library_size" molecules per cell.
        conditions: Of the network's config, name -> categories or edges.
        is_strict: Refuse an unknown category; else it counts as not given.

    Returns:
        (N,) int64 ids, 0 = not given.

    Raises:
        KeyError: If the network does not know the condition.
        ValueError: If it does not know a category, or a depth is not positive.
    """
    if name not in conditions:
        known = ", ".join(map(repr, conditions)) or "none: it was trained without conditions"
        msg = f"The network has no condition {name!r}. Conditions: {known}."
        raise KeyError(msg)
    if name == LIBRARY_SIZE:
        depths = np.array([np.nan if entry is None else float(entry) for entry in entries])
        is_given = ~np.isnan(depths)
        if (depths[is_given] <= 0).any():
            msg = f"library_size must be positive (molecules per cell), got {np.nanmin(depths)}."
            raise ValueError(msg)
        classes = 1 + np.searchsorted(np.asarray(conditions[name]), depths, side="right")
        return np.where(is_given, classes, NOT_GIVEN).astype(np.int64)
    ids = {entry: place + 1 for place, entry in enumerate(conditions[name])}
    if is_strict:
        unknown = sorted({str(entry) for entry in entries if entry is not None and entry not in ids})
        if unknown:
            listed = ", ".join(map(repr, conditions[name][:12]))
            more = f", ... ({len(ids)} in all)" if len(ids) > 12 else ""
            msg = f"The network knows no {name} {', '.join(map(repr, unknown[:5]))}. Known: {listed}{more}."
            raise ValueError(msg)
    return np.array([ids.get(entry, NOT_GIVEN) for entry in entries], dtype=np.int64)


def encode_conditions(
    columns: Mapping[str, Any], n_cells: int, conditions: Conditions, *, is_strict: bool = True
) -> torch.Tensor:
    """Turn conditions into what the network reads.

    Args:
        columns: Name -> one entry for all cells, or (N,) entries; None is "not given". Conditions of the
            network that are left out are not given.
        n_cells: Number of cells N.
        conditions: Of the network's config.
        is_strict: Refuse an unknown category; else it counts as not given.

    Returns:
        (N, K) int64 ids, 0 = not given.

    Raises:
        ValueError: If a column has another number of cells.
    """
    places = {name: place for place, name in enumerate(conditions)}
    ids = np.full((n_cells, len(places)), NOT_GIVEN, dtype=np.int64)
    for name, given in columns.items():
        is_one = given is None or isinstance(given, str | int | float | np.number)
        entries = [given] * n_cells if is_one else list(given)
        if len(entries) != n_cells:
            msg = f"{name} has {len(entries)} entries for {n_cells} cells; give one for all, or one each."
            raise ValueError(msg)
        column = category_ids(name, entries, conditions, is_strict=is_strict)
        ids[:, places[name]] = column
    return torch.from_numpy(ids)


__all__ = ["NOT_GIVEN", "category_ids", "encode_conditions"]
