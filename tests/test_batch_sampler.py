"""Which cells make up which batch: every cell once, the same at any world size, restartable.

Needs no data. Run: pytest tests/test_batch_sampler.py
"""

import numpy as np
import pytest

from tokenization_scdiva import CellBatchSampler

N_CELLS, BATCH_SIZE = 1013, 8


def lengths(seed=0):
    return np.random.default_rng(seed).integers(1, 3000, N_CELLS)


def batches(*, epoch=0, first_batch=0, n_genes=None, **settings):
    defaults = {"batch_size": BATCH_SIZE, "max_genes": 1200, "seed": 4}
    sampler = CellBatchSampler(lengths() if n_genes is None else n_genes, **defaults | settings)
    sampler.set_epoch(epoch, first_batch)
    drawn = list(sampler)
    assert len(drawn) == len(sampler) or not settings.get("shuffle", True)
    return drawn


def cells_of(drawn):
    return [draw.cell for batch in drawn for draw in batch]


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_every_cell_at_most_once_per_epoch(epoch):
    drawn = batches(epoch=epoch)
    cells = cells_of(drawn)
    assert len(drawn) == N_CELLS // BATCH_SIZE
    assert len(set(cells)) == len(cells) == N_CELLS - N_CELLS % BATCH_SIZE
    assert set(cells) <= set(range(N_CELLS))
    for batch in drawn:
        assert sorted(draw.stratum for draw in batch) == list(range(BATCH_SIZE))
        assert {(draw.epoch, draw.n_strata) for draw in batch} == {(epoch, BATCH_SIZE)}


def test_left_over_cells_get_their_turn():
    seen = set()
    for epoch in range(4):
        seen |= set(cells_of(batches(epoch=epoch)))
    assert seen == set(range(N_CELLS))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world_size", [2, 4])
def test_world_size_changes_no_global_batch(world_size, shuffle):
    alone = batches(epoch=2, shuffle=shuffle)
    shares = [
        batches(epoch=2, shuffle=shuffle, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    for number, batch in enumerate(alone):
        parts = [draw for share in shares for draw in (share[number] if number < len(share) else [])]
        assert sorted(parts) == sorted(batch)
        if len(batch) == BATCH_SIZE:
            assert {len(share[number]) for share in shares} == {BATCH_SIZE // world_size}


@pytest.mark.parametrize("first_batch", [1, 60, 125, 126])
def test_resume_is_the_tail_of_the_epoch(first_batch):
    assert batches(epoch=3, first_batch=first_batch) == batches(epoch=3)[first_batch:]


def test_epoch_and_seed_change_the_order():
    first = cells_of(batches())
    assert first == cells_of(batches())
    assert first != cells_of(batches(epoch=1))
    assert first != cells_of(batches(seed=5))


def test_cells_of_similar_length_share_a_batch():
    n_genes = np.minimum(lengths(), 1200)
    drawn = [np.array([n_genes[draw.cell] for draw in batch]) for batch in batches()]
    padded = sum(len(batch) * batch.max() for batch in drawn)
    chance = np.random.default_rng(0).permutation(n_genes)[: len(drawn) * BATCH_SIZE].reshape(-1, BATCH_SIZE)
    real = sum(batch.sum() for batch in drawn)
    assert padded / real < 1.05 < (chance.max(axis=1) * BATCH_SIZE).sum() / real
    # But batches come in no order of length: a run must not see all short cells first.
    means = np.array([batch.mean() for batch in drawn])
    assert (np.diff(means) < 0).mean() > 0.2


def test_evaluation_covers_all_cells_once_with_fixed_times():
    drawn = batches(shuffle=False)
    assert sorted(cells_of(drawn)) == list(range(N_CELLS))
    assert [len(batch) for batch in drawn[:-1]] == [BATCH_SIZE] * (N_CELLS // BATCH_SIZE)
    assert len(drawn[-1]) == N_CELLS % BATCH_SIZE
    assert drawn == batches(shuffle=False)
    few = batches(shuffle=False, n_genes=np.array([3, 1, 2]))
    assert cells_of(few) == [1, 2, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 10, "world_size": 4}, "10 cells cannot be shared evenly by 4 processes"),
        ({"batch_size": 0}, "0 cells cannot be shared evenly"),
        ({"batch_size": 2000}, "has 1013 cells, fewer than one global batch of 2000"),
        ({"rank": 2, "world_size": 2}, r"rank must lie in \[0, 2\)"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        batches(**settings)
