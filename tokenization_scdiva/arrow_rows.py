"""Rows of memory-mapped Arrow files, gathered by index.

Lists (the genes of a cell) are copied straight from the mapped buffers, row by row: no row in between is
read, and nothing is made per gene. `datasets` keeps the files; what is cached here can be made again, and is
not pickled, so that loader workers can be started in any way.

Dimensions: N rows, B rows gathered, T list entries of these rows.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset


class ListBuffers(NamedTuple):
    """A column of lists as NumPy sees it, one array per record batch.

    Attributes:
        offsets: (n + 1,) int32 each, where the lists of a batch begin in its entries.
        entries: Entries of all lists of a batch, views of the mapped file.
    """

    offsets: list[np.ndarray]
    entries: list[np.ndarray]


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

    def list_lengths(self, name: str) -> np.ndarray:
        """Measure all lists of a column.

        Args:
            name: Column of lists.

        Returns:
            (N,) int32.
        """
        lengths = [np.diff(offsets) for offsets in self._lists[name].offsets]
        return np.concatenate(lengths).astype(np.int32)

    def lists(
        self, name: str, rows: np.ndarray, max_length: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Gather lists.

        Args:
            name: Column of lists.
            rows: (B,) int64 rows, in any order.
            max_length: Longer lists are cut.

        Returns:
            Boundaries (B + 1,) int64, and the entries (T,) in the type of the file.
        """
        offsets, entries = self._lists[name]
        parts = []
        for batch, place in zip(*self._places(rows), strict=True):
            start, stop = offsets[batch][place : place + 2].tolist()
            stop = stop if max_length is None else min(stop, start + max_length)
            parts.append(entries[batch][start:stop])
        lengths = [len(part) for part in parts]
        boundaries = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        return boundaries, np.concatenate(parts)

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
        columns: dict[str, Any] = {}
        for name in names:
            if name in self._lists:
                offsets, entries = self.lists(name, rows)
                columns[name] = pa.ListArray.from_arrays(
                    pa.array(offsets.astype(np.int32)), pa.array(entries)
                )
            else:
                columns[name] = self.column(name).take(pa.array(rows)).combine_chunks()
        return pa.table(columns)

    @cached_property
    def _lists(self) -> dict[str, ListBuffers]:
        columns = zip(self.column_names, self.dataset.data.columns, strict=True)
        return {
            name: ListBuffers(
                [chunk.offsets.to_numpy() for chunk in column.chunks],
                [chunk.values.to_numpy(zero_copy_only=True) for chunk in column.chunks],
            )
            for name, column in columns
            if pa.types.is_list(column.type)
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
        """Record batch of each row, and its place there."""
        batches = np.searchsorted(self._first_rows, rows, side="right") - 1
        return batches.tolist(), (rows - self._first_rows[batches]).tolist()
