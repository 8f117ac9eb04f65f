"""Corruption of cells: masks follow the diffusion time, targets are clean, randomness is the cell's own.

Needs no data. Run: pytest tests/test_collation.py
"""

import pickle

import numpy as np
import pytest
import torch

from modeling_scdiva.diffusion_scdiva import masking_rate
from tokenization_scdiva import CellCorpus, ScDivaDataCollator, thin_counts
from tokenization_scdiva.corpus import CellBatch, CellDraw
from tokenization_scdiva.ranking_scdiva import FlatCells, normalise_counts, rank_cells

VOCAB_SIZE, LAT, MASK, PAD = 400, 2, 1, 0
# Everything twice: compiled and by plain NumPy.
pytestmark = pytest.mark.usefixtures("kernels")


def make_batch(n_cells=8, n_genes=100, *, seed=0, depth=2000, epoch=0):
    """Ranked cells of varied length with raw counts; the library holds 10 % outside the vocabulary."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(n_genes // 2, n_genes + 1, n_cells)
    lengths[0] = n_genes
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.concatenate([rng.permutation(np.arange(5, VOCAB_SIZE))[:n] for n in lengths])
    counts = rng.geometric(np.repeat(lengths, lengths) / depth).astype(np.int32)
    library_size = np.floor(np.add.reduceat(counts, offsets[:-1]) * 1.1)
    values = normalise_counts(counts, np.repeat(library_size, lengths), 1e4)
    cells = FlatCells(offsets, tokens.astype(np.int32), values, counts, library_size)
    cells = rank_cells(cells, gene_order="entropy", ranking_weights=weights(), max_genes=None)
    return whole_batch(cells, draws([CellDraw(i, epoch, i, n_cells) for i in range(n_cells)]))


def whole_batch(cells, cell_draws):
    """All cells from one file that measures every gene."""
    is_measured = np.arange(VOCAB_SIZE)[None] >= 5
    return CellBatch(cells, cell_draws, np.zeros(cells.n_cells, np.int64), is_measured)


def draws(rows):
    return np.array(rows, dtype=np.int64)


def weights():
    return 1.0 + np.random.default_rng(5).uniform(0, 3, VOCAB_SIZE)


def collator(**settings):
    defaults = {"max_genes": 64, "target_sum": 1e4, "gene_order": "entropy", "depth_corruption": "none"}
    ids = {"lat_token_id": LAT, "mask_token_id": MASK, "pad_token_id": PAD}
    return ScDivaDataCollator(**{"ranking_weights": weights()} | defaults | ids | settings)


def take(batch, rows):
    """Some cells of a batch, in another order."""
    cells = batch.cells
    entries = np.concatenate([np.arange(cells.offsets[r], cells.offsets[r + 1]) for r in rows])
    offsets = np.concatenate([[0], np.cumsum(cells.n_genes[rows])])
    flat = (part[entries] for part in (cells.token_ids, cells.values, cells.counts))
    return whole_batch(FlatCells(offsets, *flat, cells.library_size[rows]), batch.draws[rows])


def clean_cell(batch, row, max_genes=64):
    entries = slice(
        batch.cells.offsets[row], min(batch.cells.offsets[row + 1], batch.cells.offsets[row] + max_genes)
    )
    return batch.cells.token_ids[entries], batch.cells.values[entries]


def only_cell(inputs, row, name):
    """One cell's genes of one tensor, without anchor and pads."""
    n_genes = int((inputs["input_ids"][row] != PAD).sum()) - 1
    return inputs[name][row, 1 : 1 + n_genes].numpy()


@pytest.mark.parametrize("target", ["joint", "expression", "gene"])
def test_what_is_hidden_and_what_is_asked(target):
    batch = make_batch()
    inputs = collator(masking_target=target)(batch)
    hides_gene, hides_value = target != "expression", target != "gene"
    for row in range(8):
        genes, values = clean_cell(batch, row)
        ids, seen, is_masked, labels, wanted = (
            only_cell(inputs, row, name)
            for name in ("input_ids", "expression_values", "is_masked", "labels", "expression_labels")
        )
        is_drawn = (ids == MASK) if hides_gene else is_masked
        assert 0 < is_drawn.sum() < len(genes) or row in (0, 7)
        np.testing.assert_array_equal(ids, np.where(is_drawn & hides_gene, MASK, genes))
        np.testing.assert_array_equal(labels, np.where(is_drawn & hides_gene, genes, -100))
        np.testing.assert_array_equal(is_masked, is_drawn & hides_value)
        np.testing.assert_array_equal(seen, np.where(is_drawn & hides_value, 0, values))
        np.testing.assert_array_equal(wanted, values)


def test_anchor_and_pads_are_never_touched():
    batch = make_batch()
    inputs = collator(pad_to_multiple_of=8, max_genes=120)(batch)
    width = inputs["input_ids"].shape[1]
    assert width == 104
    is_pad = torch.arange(width) > torch.tensor(batch.cells.n_genes)[:, None]
    assert torch.equal(inputs["attention_mask"], (~is_pad).long())
    assert (inputs["input_ids"][:, 0] == LAT).all()
    assert (inputs["input_ids"][is_pad] == PAD).all()
    for name, fill in {
        "labels": -100,
        "is_masked": False,
        "expression_values": 0,
        "expression_labels": 0,
    }.items():
        assert (inputs[name][is_pad] == fill).all()
        assert (inputs[name][:, 0] == fill).all()
    kinds = {name: tensor.dtype for name, tensor in inputs.items()}
    assert kinds == {
        "input_ids": torch.int64, "labels": torch.int64, "attention_mask": torch.int64,
        "is_masked": torch.bool, "timestep": torch.float32,
        "expression_values": torch.float32, "expression_labels": torch.float32,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("max_genes", "n_genes", "width"), [(60, 30, 32), (60, 40, 48), (60, 60, 61), (60, 99, 61)]
)
def test_padded_widths_are_few_and_full_cells_stay_unpadded(max_genes, n_genes, width):
    inputs = collator(pad_to_multiple_of=16, max_genes=max_genes)(make_batch(n_genes=n_genes))
    shapes = {tuple(tensor.shape) for tensor in inputs.values() if tensor.ndim == 2}
    assert shapes == {(8, width)}
    plain = collator(max_genes=max_genes)(make_batch(n_genes=n_genes))
    for name, tensor in plain.items():
        padded = inputs[name][:, : tensor.shape[1]] if tensor.ndim == 2 else inputs[name]
        assert torch.equal(padded, tensor)


def test_attention_mask_is_left_out_where_nothing_is_padded():
    assert "attention_mask" not in collator(max_genes=40)(make_batch())
    assert "attention_mask" in collator(max_genes=70)(make_batch())


def test_times_are_stratified_and_masks_follow_them():
    rows = [CellDraw(i, 0, int(s), 500) for i, s in enumerate(np.random.default_rng(0).permutation(500))]
    batch = make_batch(500, 80)._replace(draws=draws(rows))
    inputs = collator(max_genes=80)(batch)
    times = inputs["timestep"].numpy()
    np.testing.assert_array_equal(np.ceil(times * 500 - 1e-3) - 1, batch.draws[:, 2])  # one in each interval
    n_genes = np.minimum(batch.cells.n_genes, 80)
    n_masked = inputs["is_masked"].numpy().sum(axis=1)
    z_scores = (n_masked - n_genes * masking_rate(times)) / np.sqrt(n_genes * times * (1 - times) + 1e-9)
    middle = np.abs(times - 0.5) < 0.4
    assert abs(z_scores[middle].mean()) < 4 / np.sqrt(middle.sum())
    assert 0.85 < z_scores[middle].std() < 1.15
    # Places are drawn one by one: neighbours are no more alike than chance.
    is_masked = inputs["is_masked"].numpy()[:, 1:41].astype(float) - times[:, None]
    neighbours = (is_masked[:, 1:] * is_masked[:, :-1]).mean()
    assert abs(neighbours) < 4 * (is_masked**2).mean() / np.sqrt(is_masked.size)


def test_one_stratum_gives_uniform_times():
    batch = make_batch(400, 10)._replace(draws=draws([CellDraw(i, 3) for i in range(400)]))
    times = np.sort(collator()(batch)["timestep"].numpy())
    assert np.abs(times - (np.arange(400) + 0.5) / 400).max() < 1.95 / np.sqrt(400)  # Kolmogorov, 0.1 %


def test_same_cell_epoch_and_seed_give_the_same_corruption_anywhere():
    batch = make_batch(depth=6000)
    for depth_corruption in ("none", "scale", "thin"):
        collate = collator(depth_corruption=depth_corruption, depth_probability=1.0)
        whole = collate(batch)
        for rows in ([5], [7, 2, 5], [5, 0, 1, 6]):
            part = collate(take(batch, np.array(rows)))
            for place, row in enumerate(rows):
                assert part["timestep"][place] == whole["timestep"][row]
                for name in ("input_ids", "expression_values", "is_masked", "labels", "expression_labels"):
                    np.testing.assert_array_equal(only_cell(part, place, name), only_cell(whole, row, name))


def test_epoch_seed_and_cell_each_change_the_corruption():
    batch = make_batch()
    first = collator()(batch)["is_masked"]
    other_epoch = collator()(make_batch(epoch=1))["is_masked"]
    other_seed = collator(seed=1)(batch)["is_masked"]
    renamed = batch._replace(draws=batch.draws + np.array([100, 0, 0, 0]))
    for other in (other_epoch, other_seed, collator()(renamed)["is_masked"]):
        assert (first[2:6] != other[2:6]).any(dim=1).all()


def test_scale_by_hand():
    """r is 0.25 for every cell: v' = log1p(r expm1(v)), in the clean order, with clean targets."""
    batch = make_batch(masked := 3)
    inputs = collator(depth_corruption="scale", depth_probability=1.0, depth_range=(0.25, 0.25))(batch)
    for row in range(masked):
        _, values = clean_cell(batch, row)
        is_seen = ~only_cell(inputs, row, "is_masked")
        wanted = np.log1p(0.25 * np.expm1(values.astype(np.float64)))
        seen = only_cell(inputs, row, "expression_values")
        np.testing.assert_allclose(seen[is_seen], wanted[is_seen], rtol=1e-6)
        np.testing.assert_array_equal(only_cell(inputs, row, "expression_labels"), values)


def test_depth_law():
    """Half of the cells, r log-uniform in [0.1, 1]: read off one visible gene of each cell."""
    n_cells = 2000
    cells = FlatCells(
        np.arange(n_cells + 1), np.full(n_cells, 9, np.int32), np.ones(n_cells, np.float32), None, None
    )
    batch = whole_batch(
        cells, draws([CellDraw(i, 0, 0, 10**9) for i in range(n_cells)])
    )  # t = 0: nothing masked
    inputs = collator(depth_corruption="scale", max_genes=1)(batch)
    share = np.expm1(inputs["expression_values"][:, 1].double().numpy()) / np.expm1(1.0)
    is_shallow = share < 1 - 1e-6
    assert abs(is_shallow.mean() - 0.5) < 4 * 0.5 / np.sqrt(n_cells)
    assert share.min() >= 0.1 - 1e-6
    place = np.sort(np.log(share[is_shallow]) / np.log(0.1))
    assert np.abs(place - (np.arange(len(place)) + 0.5) / len(place)).max() < 1.95 / np.sqrt(len(place))


def test_thinning_drops_genes_ranks_again_and_keeps_clean_targets():
    batch = make_batch(40, 120, depth=600)
    all_visible = batch._replace(draws=draws([CellDraw(i, 0, 0, 10**9) for i in range(40)]))
    r = 0.3
    settings = {"depth_probability": 1.0, "depth_range": (r, r), "max_genes": 1000}
    inputs = collator(depth_corruption="thin", **settings)(all_visible)
    kept_molecules, kept_depth = [], []
    for row in range(40):
        genes, values = clean_cell(batch, row, 1000)
        clean = dict(zip(genes.tolist(), values.tolist(), strict=True))
        counts = dict(
            zip(genes.tolist(), batch.cells.counts[slice(*batch.cells.offsets[row : row + 2])], strict=True)
        )
        ids = only_cell(inputs, row, "input_ids")
        seen, wanted = (
            only_cell(inputs, row, "expression_values"),
            only_cell(inputs, row, "expression_labels"),
        )
        assert len(ids) < len(genes)
        assert set(ids) < set(genes)
        assert wanted.tolist() == [clean[gene] for gene in ids]
        scores = (seen / weights()[ids]).astype(np.float32)
        assert (np.lexsort((ids, -scores)) == np.arange(len(ids))).all()
        # Values are those of whole molecules, of which no gene has more than before.
        molecules = np.expm1(seen.astype(np.float64))
        depth = find_depth(molecules, batch.cells.library_size[row])
        unit = 1e4 / depth
        thinned = np.rint(molecules / unit)
        np.testing.assert_allclose(thinned * unit, molecules, rtol=1e-4)
        assert (thinned >= 1).all()
        assert all(t <= counts[g] for g, t in zip(ids, thinned, strict=True))
        kept_molecules.append(thinned.sum() / sum(counts.values()))
        kept_depth.append(depth / batch.cells.library_size[row])
    assert abs(np.mean(kept_molecules) - r) < 0.01
    assert abs(np.mean(kept_depth) - r) < 0.01  # molecules outside the vocabulary are thinned too


def find_depth(molecules, largest):
    """Smallest library size for which all values are whole molecules."""
    for depth in range(1, int(largest) + 1):
        counts = molecules * depth / 1e4
        if np.abs(counts - np.rint(counts)).max() < 1e-3 and counts.min() > 0.5:
            return depth
    pytest.fail("no library size explains the values")


def test_thinning_with_nothing_to_thin_is_no_corruption():
    batch = make_batch()
    plain = collator()(batch)
    for settings in ({"depth_probability": 0.0}, {"depth_probability": 1.0, "depth_range": (1.0, 1.0)}):
        thin = collator(depth_corruption="thin", **settings)(batch)
        for name, tensor in plain.items():
            assert torch.equal(thin[name], tensor)


def test_thinning_never_empties_a_cell():
    n_cells = 200
    counts, depth = np.ones(n_cells, np.int32), np.full(n_cells, 50.0)
    values = normalise_counts(counts, depth, 1e4)
    cells = FlatCells(np.arange(n_cells + 1), np.full(n_cells, 9, np.int32), values, counts, depth)
    batch = whole_batch(cells, draws([CellDraw(i, 0, 0, 10**9) for i in range(n_cells)]))
    inputs = collator(depth_corruption="thin", depth_probability=1.0, depth_range=(0.1, 0.1))(batch)
    assert (inputs["input_ids"] == torch.tensor([LAT, 9])).all()


def test_thinning_needs_counts():
    batch = make_batch()
    log1p = batch._replace(cells=batch.cells._replace(counts=None, library_size=None))
    with pytest.raises(
        ValueError, match="'thin' draws molecules and needs a corpus of raw counts; use 'scale'"
    ):
        collator(depth_corruption="thin")(log1p)
    assert collator(depth_corruption="scale")(log1p)


def test_thin_counts():
    counts = np.random.default_rng(0).poisson(20, (50, 60)).astype(np.int32)
    thinned = thin_counts(counts, 0.3, np.random.default_rng(1))
    assert (thinned.dtype, thinned.shape) == (counts.dtype, counts.shape)
    assert (thinned <= counts).all()
    assert abs(thinned.sum() / counts.sum() - 0.3) < 4 * np.sqrt(0.21 / counts.sum())
    assert (thin_counts(counts, 1.0, np.random.default_rng(1)) == counts).all()
    assert (thinned == thin_counts(counts, 0.3, np.random.default_rng(1))).all()
    for wrong in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"keep_fraction must lie in \(0, 1\], got"):
            thin_counts(counts, wrong, np.random.default_rng(1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"masking_target": "both"}, "masking_target must be one of joint, expression, gene, got 'both'"),
        ({"depth_corruption": "drop"}, "depth_corruption must be one of none, scale, thin, got 'drop'"),
        ({"gene_order": "rank"}, "gene_order must be one of entropy, expression, random, got 'rank'"),
        ({"depth_probability": 1.5}, r"depth_probability must lie in \[0, 1\], got 1.5"),
        ({"depth_range": (0.0, 1.0)}, r"depth_range must be an interval inside \(0, 1\]"),
        ({"depth_range": (0.5, 0.2)}, r"depth_range must be an interval inside \(0, 1\]"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        collator(**settings)


def test_collator_travels_to_loader_workers(tokenizer, corpus_folder):
    """What a spawned worker gets: corpus and collator through pickle, no tokenizer inside."""
    corpus = CellCorpus(corpus_folder, "train", ranking_settings=tokenizer.ranking_settings)
    collate = ScDivaDataCollator.from_tokenizer(tokenizer, seed=3, depth_corruption="thin")
    parcel = pickle.dumps((corpus, collate))
    assert b"ScDivaTokenizer" not in parcel
    there, collate_there = pickle.loads(parcel)
    keys = [CellDraw(i, 1, i, 16) for i in range(16)]
    here = collate(corpus.__getitems__(keys))
    for name, tensor in collate_there(there.__getitems__(keys)).items():
        assert torch.equal(tensor, here[name])
    assert here["input_ids"].shape[1] <= tokenizer.max_genes + 1
