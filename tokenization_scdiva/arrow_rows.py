"""Rows of memory-mapped Arrow files, gathered by index.

Lists (the genes of a cell) are copied straight from the mapped buffers, row by row: no row in between is
read, and nothing is made per gene. `datasets` keeps the files; what is cached here can be made again, and is
not pickled, so that loader workers can be started in any way.

Dimensions: N rows, B rows gathered, T list entries of these rows.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset


class ArrowRows:
    """Rows of a data set in Arrow files, read without its formatting.

    Args:
        dataset: As `datasets` maps it, with all rows in file order.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getstate__(self) -> dict[str, Any]:
        return {"dataset": self.dataset}

    @property
    def column_names(self) -> list[str]:
        """Names of the columns."""
        return self.dataset.column_names

    def column(self, name: str) -> pa.ChunkedArray:
        """Give a whole column.

        Args:
            name: Column.

        Returns:
            The column, mapped, not copied.
        """
        return self.dataset.data.column(name)

    def list_lengths(self) -> np.ndarray:
        """Measure the lists of all rows.

        Returns:
            (N,) int32.
        """
        return np.concatenate([np.diff(offsets) for offsets in self._offsets]).astype(np.int32)

    def lists(
        self, names: Sequence[str], rows: np.ndarray, max_length: int | None = None
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Gather lists of several columns; in a row they are equally long.

        Args:
            names: Columns of lists.
            rows: (B,) int64 rows, in any order.
            max_length: Longer lists are cut.

        Returns:
            Boundaries (B + 1,) int64, and the entries (T,) of each column in the type of the file.
        """
        spans = []
        for batch, place in zip(*self._places(rows), strict=True):
            start, stop = self._offsets[batch][place : place + 2].tolist()
            spans.append((batch, start, stop if max_length is None else min(stop, start + max_length)))
        boundaries = np.cumsum([0, *(stop - start for _, start, stop in spans)], dtype=np.int64)
        columns = [self._entries[name] for name in names]
        return boundaries, [
            np.concatenate([column[batch][start:stop] for batch, start, stop in spans]) for column in columns
        ]

    def numbers(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Gather numbers.

        Args:
            name: Column of numbers.
            rows: (B,) int64 rows.

        Returns:
            (B,) in the type of the file.
        """
        entries = self._numbers[name]
        places = zip(*self._places(rows), strict=True)
        return np.array([entries[batch][place] for batch, place in places], dtype=entries[0].dtype)

    def table(self, rows: np.ndarray, names: Sequence[str]) -> pa.Table:
        """Gather rows whole.

        Args:
            rows: (B,) int64 rows.
            names: Columns wanted, in order.

        Returns:
            Table of one record batch.
        """
        list_names = [name for name in names if name in self._entries]
        boundaries, entries = self.lists(list_names, rows)
        offsets = pa.array(boundaries.astype(np.int32))
        lists = dict(zip(list_names, entries, strict=True))
        columns = {
            name: pa.ListArray.from_arrays(offsets, pa.array(lists[name]))
            if name in lists
            else self.column(name).take(pa.array(rows)).combine_chunks()
            for name in names
        }
        return pa.table(columns)

    @cached_property
    def _list_columns(self) -> dict[str, pa.ChunkedArray]:
        columns = zip(self.column_names, self.dataset.data.columns, strict=True)
        return {name: column for name, column in columns if pa.types.is_list(column.type)}

    @cached_property
    def _offsets(self) -> list[np.ndarray]:
        """(n + 1,) int32 for each record batch: where the lists of its rows begin, in any column."""
        (first, offsets), *others = (
            (name, [chunk.offsets.to_numpy() for chunk in column.chunks])
            for name, column in self._list_columns.items()
        )
        for name, theirs in others:
            if not all(map(np.array_equal, offsets, theirs)):
                msg = f"The lists {first!r} and {name!r} differ in length: build these damaged files again."
                raise ValueError(msg)
        return offsets

    @cached_property
    def _entries(self) -> dict[str, list[np.ndarray]]:
        """Entries of all lists of each record batch, views of the mapped file."""
        return {
            name: [chunk.values.to_numpy(zero_copy_only=True) for chunk in column.chunks]
            for name, column in self._list_columns.items()
        }

    @cached_property
    def _numbers(self) -> dict[str, list[np.ndarray]]:
        columns = zip(self.column_names, self.dataset.data.columns, strict=True)
        return {
            name: [chunk.to_numpy(zero_copy_only=True) for chunk in column.chunks]
            for name, column in columns
            if pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
        }

    @cached_property
    def _first_rows(self) -> np.ndarray:
        """(batches,) first row of each record batch."""
        lengths = [len(chunk) for chunk in self.dataset.data.columns[0].chunks]
        return np.cumsum([0, *lengths[:-1]])

    def _places(self, rows: np.ndarray) -> tuple[list[int], list[int]]:
        """Find rows (B,) in the record batches.

        Returns:
            The batch of each row, and its place there.

        Raises:
            IndexError: If there is no such row; iterating over a corpus ends by it.
        """
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            msg = f"Rows must lie in [0, {len(self)}), got {rows.min()} to {rows.max()}."
            raise IndexError(msg)
        batches = np.searchsorted(self._first_rows, rows, side="right") - 1
        return batches.tolist(), (rows - self._first_rows[batches]).tolist()
