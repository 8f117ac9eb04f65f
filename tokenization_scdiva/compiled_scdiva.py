"""The loops over genes that NumPy does slowly, compiled by numba; `kernels_scdiva` says how they are used.

A row (one cell, some thousand entries) fits the processor's first caches, a block of cells does not. So each
of these goes row by row and does everything with an entry while it is at hand, where NumPy would write a
temporary array per operation. Ranking sorts 32-bit keys by three counting passes (LSD radix sort), which is
stable; equal keys are put in token order afterwards.

Dimensions: B rows, T entries of all rows together, V vocabulary.
"""

# numba infers the types of its functions.
# mypy: allow-untyped-defs

from types import SimpleNamespace
from typing import Any

import numpy as np

try:
    from numba import njit
except ImportError as error:
    msg = "The compiled kernels need the package numba: pip install numba"
    raise ImportError(msg) from error

# As in `ranking_scdiva.splitmix64`.
SPLITMIX_GAMMA = np.uint64(0x9E3779B97F4A7C15)
SPLITMIX_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
SPLITMIX_MIX_2 = np.uint64(0x94D049BB133111EB)
MOST_BUCKETS = 2048  # 32 bits in three passes are 11 bits a pass
SMALL_RUN = 16  # equal keys up to this many are put in order by insertion


def _compiled(function: Any) -> Any:
    """Compile on first use; the machine code is kept on disk where some folder is writable."""
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # neither the package nor the home folder can be written
        return njit(nogil=True)(function)


@_compiled
def whole_counts(values, tolerance, limit, counts):
    """Convert values (T,) to counts (T,) int32, without a branch, so that the loop is done in vectors.

    Returns:
        Number of values outside [0, limit] or further than ``tolerance`` from a whole number (NaN is both),
        number of values that are not zero, and the largest count.
    """
    n_bad, n_nonzero, largest = 0, 0, np.int32(0)
    for entry in range(len(values)):
        value = values[entry]
        whole = np.rint(value)
        n_bad += not ((value >= 0) & (value <= limit) & (abs(value - whole) <= tolerance))
        n_nonzero += value != 0
        counts[entry] = np.int32(whole)
        largest = max(largest, counts[entry])
    return n_bad, n_nonzero, largest


@_compiled
def is_canonical(indptr, columns, n_columns):
    """Say whether columns rise within every row, and lie in [0, n_columns)."""
    for row in range(len(indptr) - 1):
        before = -1
        for entry in range(indptr[row], indptr[row + 1]):
            if columns[entry] <= before:
                return False
            before = columns[entry]
        if before >= n_columns:
            return False
    return True


@_compiled
def row_sums(indptr, counts, sums):
    """Add up the counts (T,) of every row, into ``sums`` (B,) int64."""
    for row in range(len(indptr) - 1):
        total = np.int64(0)
        for entry in range(indptr[row], indptr[row + 1]):
            total += counts[entry]
        sums[row] = total


@_compiled
def keep_genes(indptr, columns, amounts, column_tokens, offsets, token_ids, kept):
    """Write the entries of columns that have a token, and where their rows begin; return their number."""
    n_kept = 0
    offsets[0] = 0
    for row in range(len(indptr) - 1):
        for entry in range(indptr[row], indptr[row + 1]):
            token = column_tokens[columns[entry]]
            token_ids[n_kept], kept[n_kept] = token, amounts[entry]
            n_kept += token >= 0  # else the next entry takes its place
        offsets[row + 1] = n_kept
    return n_kept


@_compiled
def look_up(offsets, counts, table, values):
    """Write ``values[entry] = table[row, count]`` where the count is in the table."""
    for row in range(len(offsets) - 1):
        for entry in range(offsets[row], offsets[row + 1]):
            if counts[entry] < table.shape[1]:
                values[entry] = table[row, counts[entry]]


@_compiled
def draw_entries(offsets, seeds, hashed_places, rates, is_drawn):
    """Draw every entry with the rate of its cell, by the hash of the cell's seed and the entry's place."""
    for row in range(len(offsets) - 1):
        start = offsets[row]
        for entry in range(start, offsets[row + 1]):
            word = (seeds[row] + hashed_places[entry - start]) * SPLITMIX_GAMMA + SPLITMIX_GAMMA
            word = (word ^ (word >> np.uint64(30))) * SPLITMIX_MIX_1
            word = (word ^ (word >> np.uint64(27))) * SPLITMIX_MIX_2
            coin = np.float64((word ^ (word >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53
            is_drawn[entry] = coin < rates[row]


@_compiled
def lay_out(offsets, cells, is_drawn, hides, tokens, padded):
    """Write the rows (B, S) of all inputs and targets of the diffusion at once.

    ``cells``: token ids, clean values and seen values (T,). ``hides``: whether the gene and the value of
    drawn entries are hidden. ``tokens``: ids of anchor, mask and pad, and the label that is ignored.
    ``padded``: input ids, values, whether hidden, labels and value labels.
    """
    token_ids, values, seen = cells
    hides_gene, hides_value = hides
    lat, mask, pad, ignored = tokens
    input_ids, shown, is_masked, labels, targets = padded
    for row in range(len(offsets) - 1):
        start, n_entries = offsets[row], offsets[row + 1] - offsets[row]
        input_ids[row, 0], labels[row, 0] = lat, ignored
        shown[row, 0], targets[row, 0], is_masked[row, 0] = 0, 0, False
        for place in range(n_entries):
            entry = start + place
            gene, drawn = token_ids[entry], is_drawn[entry]
            input_ids[row, 1 + place] = mask if drawn and hides_gene else gene
            labels[row, 1 + place] = gene if drawn and hides_gene else ignored
            shown[row, 1 + place] = 0 if drawn and hides_value else seen[entry]
            is_masked[row, 1 + place] = drawn and hides_value
            targets[row, 1 + place] = values[entry]
        input_ids[row, 1 + n_entries :], labels[row, 1 + n_entries :] = pad, ignored
        shown[row, 1 + n_entries :], targets[row, 1 + n_entries :] = 0, 0
        is_masked[row, 1 + n_entries :] = False


@_compiled
def _order_row(keys, token_ids, places, spare_keys, spare_places, histogram, n_kept):
    """Sort keys (n,), ties by token; ``places`` says afterwards where the first ``n_kept`` entries were."""
    n_entries = len(keys)
    if n_entries == 0:
        return
    lowest, highest = np.uint32(0xFFFFFFFF), np.uint32(0)
    for entry in range(n_entries):
        lowest, highest = min(lowest, keys[entry]), max(highest, keys[entry])
    n_bits, span = 0, np.int64(highest) - np.int64(lowest)
    while span >> n_bits:
        n_bits += 1
    width = max(1, (n_bits + 2) // 3)  # bits a pass; narrow where keys lie close together
    n_buckets, twice = 1 << width, 2 * width
    last = np.uint32(n_buckets - 1)
    histogram[:, :n_buckets] = 0
    for entry in range(n_entries):
        key = np.uint32(keys[entry] - lowest)
        keys[entry] = key
        histogram[0, key & last] += 1
        histogram[1, (key >> width) & last] += 1
        histogram[2, key >> twice] += 1
    for counting in range(3):
        running = np.uint32(0)
        for bucket in range(n_buckets):
            n_here = histogram[counting, bucket]
            histogram[counting, bucket] = running
            running += n_here
    for entry in range(n_entries):
        key = keys[entry]
        slot = histogram[0, key & last]
        histogram[0, key & last] = slot + 1
        spare_keys[slot], spare_places[slot] = key, entry
    for entry in range(n_entries):
        key = spare_keys[entry]
        slot = histogram[1, (key >> width) & last]
        histogram[1, (key >> width) & last] = slot + 1
        keys[slot], places[slot] = key, spare_places[entry]
    for entry in range(n_entries):
        key = keys[entry]
        slot = histogram[2, key >> twice]
        histogram[2, key >> twice] = slot + 1
        spare_keys[slot], spare_places[slot] = key, places[entry]
    places[:n_entries] = spare_places[:n_entries]
    start = 0
    while start < n_kept:  # a run of equal keys that crosses the cut is put in order whole
        stop = start + 1
        while stop < n_entries and spare_keys[stop] == spare_keys[start]:
            stop += 1
        if stop - start > 1:
            _order_run(places[start:stop], token_ids)
        start = stop


@_compiled
def _order_run(places, token_ids):
    """Put places in the order of their tokens."""
    if len(places) > SMALL_RUN:
        packed = np.empty(len(places), np.uint64)
        for index in range(len(places)):
            packed[index] = np.uint64(token_ids[places[index]]) << np.uint64(32) | np.uint64(places[index])
        packed.sort()
        for index in range(len(places)):
            places[index] = np.int32(packed[index] & np.uint64(0xFFFFFFFF))
        return
    for index in range(1, len(places)):
        place, at = places[index], index
        while at > 0 and token_ids[places[at - 1]] > token_ids[place]:
            places[at] = places[at - 1]
            at -= 1
        places[at] = place


@_compiled
def rank_rows(offsets, token_ids, values, amounts, weights, given_keys, new_offsets, ranked):
    """Order the entries of every row by key and write the first of them.

    ``given_keys`` (T,) uint32 ascending, or empty: then by score ``values / weights[token]``, descending.
    ``ranked``: tokens, values and amounts of the kept entries, which begin at ``new_offsets``.
    """
    longest = 0
    for row in range(len(offsets) - 1):
        longest = max(longest, offsets[row + 1] - offsets[row])
    scores = np.empty(longest, np.float32)
    bits = scores.view(np.uint32)
    spare_keys = np.empty(longest, np.uint32)
    places, spare_places = np.empty(longest, np.int32), np.empty(longest, np.int32)
    histogram = np.empty((3, MOST_BUCKETS), np.uint32)
    ranked_tokens, ranked_values, ranked_amounts = ranked
    for row in range(len(offsets) - 1):
        low, high = offsets[row], offsets[row + 1]
        if len(given_keys):
            bits[: high - low] = given_keys[low:high]
        else:
            for entry in range(low, high):
                scores[entry - low] = np.float32(values[entry] / weights[token_ids[entry]])
            for entry in range(high - low):  # of positive floats the bits order as the numbers do
                bits[entry] = ~bits[entry]
        start, n_kept = new_offsets[row], new_offsets[row + 1] - new_offsets[row]
        tokens = token_ids[low:high]
        _order_row(bits[: high - low], tokens, places, spare_keys, spare_places, histogram, n_kept)
        for rank in range(n_kept):
            entry = low + places[rank]
            ranked_tokens[start + rank] = token_ids[entry]
            ranked_values[start + rank] = values[entry]
            ranked_amounts[start + rank] = amounts[entry]


KERNELS = SimpleNamespace(
    whole_counts=whole_counts,
    is_canonical=is_canonical,
    row_sums=row_sums,
    keep_genes=keep_genes,
    look_up=look_up,
    draw_entries=draw_entries,
    lay_out=lay_out,
    rank_rows=rank_rows,
)
