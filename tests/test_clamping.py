"""Clamping: tokens and values by hand, nothing but the clamp differs, random genes as the yardstick.

Needs no data. Run: pytest tests/test_clamping.py
"""

import anndata as ad
import numpy as np
import pytest
import torch
from scipy import stats

from modeling_scdiva import ScDivaModel
from modeling_scdiva.tasks.cells import read_cells
from modeling_scdiva.tasks.clamping import (
    ClampSettings,
    _Clamp,
    _effects,
    _random_clamp,
    _Runner,
    clamp_genes,
)
from tokenization_scdiva import synthetic_cells

FEW = ClampSettings(n_random_sets=4, seed=1)


@pytest.fixture(scope="module")
def adata():
    return synthetic_cells(n_cells=24, n_genes=120, seed=5)


@pytest.fixture(scope="module")
def model(fresh_tiny_model):
    torch.manual_seed(0)
    return fresh_tiny_model().eval()


@pytest.fixture(scope="module")
def cells(adata, tokenizer):
    return read_cells(adata, tokenizer=tokenizer)


def clamp(adata, model, tokenizer, **kwargs):
    kwargs = {"settings": FEW, "show_progress": False} | kwargs
    return clamp_genes(adata, model=model, tokenizer=tokenizer, **kwargs)


def runner(model, tokenizer, cells, **settings):
    return _Runner(model, tokenizer, cells, np.unique(cells.token_ids), ClampSettings(**settings))


def nothing_up(*genes):
    return _Clamp(np.array(genes, dtype=np.int64), {})


# --- what a clamp does to a cell ---


def test_off_takes_the_token_away(model, tokenizer, cells):
    run = runner(model, tokenizer, cells)
    tokens, values = run.cell(0)
    found = run.clamped(0, nothing_up(tokens[3]))
    np.testing.assert_array_equal(found[0], np.delete(tokens, 3))
    np.testing.assert_array_equal(found[1], np.delete(values, 3))


def test_zero_keeps_the_token_without_a_value_at_the_end(model, tokenizer, cells):
    run = runner(model, tokenizer, cells, off_mode="zero")
    tokens, values = run.cell(0)
    found = run.clamped(0, nothing_up(tokens[3]))
    np.testing.assert_array_equal(found[0], [*np.delete(tokens, 3), tokens[3]])
    np.testing.assert_array_equal(found[1], [*np.delete(values, 3), 0.0])


def test_up_raises_and_ranks_anew(adata, model, tokenizer, cells):
    """The clamped cell is the one the tokenizer makes of a cell with these values."""
    run = runner(model, tokenizer, cells)
    tokens, values = run.cell(0)
    silent = int(np.setdiff1d(np.unique(cells.token_ids), tokens)[0])
    last = int(tokens[-1])
    found = run.clamped(0, _Clamp(np.array([], dtype=np.int64), {silent: 6.0, last: 7.0}))
    expression = np.zeros((1, 120), dtype=np.float32)
    expression[0, tokens - 5] = values
    expression[0, silent - 5], expression[0, last - 5] = 6.0, 7.0
    made = ad.AnnData(expression, var=adata.var)
    expected = read_cells(made, tokenizer=tokenizer, expression_is_log1p=True, max_genes=100)
    np.testing.assert_array_equal(found[0], expected.token_ids)
    np.testing.assert_allclose(found[1], expected.values)


def test_up_never_lowers(model, tokenizer, cells):
    run = runner(model, tokenizer, cells)
    tokens, values = run.cell(0)
    chosen = _Clamp(np.array([], dtype=np.int64), {int(tokens[0]): 0.01})
    np.testing.assert_array_equal(run.clamped(0, chosen)[1], values)
    assert 0 not in run.changed_cells(chosen)


def test_only_cells_that_express_a_gene_can_lose_it(model, tokenizer, cells):
    run = runner(model, tokenizer, cells)
    gene = int(cells.token_ids[-1])
    expected = [row for row in range(cells.n_cells) if gene in run.cell(row)[0]]
    assert run.changed_cells(nothing_up(gene)).tolist() == expected


# --- what is compared ---


def test_differences_by_hand(model, tokenizer, cells):
    run = runner(model, tokenizer, cells, batch_size=5)
    tokens, _ = run.cell(2)
    chosen = nothing_up(tokens[1])
    total, number, shift = run.compare(chosen)
    sums, counts, shifts = np.zeros(len(run.asked)), np.zeros(len(run.asked), dtype=int), []
    for row in run.changed_cells(chosen):
        states, values = [], []
        hidden = run._hidden(row, chosen, 0)
        assert tokens[1] not in hidden
        for own, shown in (run.cell(row), run.clamped(row, chosen)):
            is_hidden = np.isin(own, hidden)
            ids = torch.tensor([[2, *np.where(is_hidden, 1, own)]])
            with torch.no_grad():
                last = model.model(ids, torch.tensor([[0.0, *shown]])).last_hidden_state
                predicted = model.predict_expression(last, torch.tensor([[2, *own]]))[0, 1:].numpy()
            states.append(last[0, 0])
            values.append(dict(zip(own[is_hidden].tolist(), predicted[is_hidden], strict=True)))
        assert values[0].keys() == values[1].keys() == set(hidden.tolist())
        for gene in hidden.tolist():
            place = int(np.flatnonzero(run.asked == gene)[0])
            sums[place] += values[1][gene] - values[0][gene]
            counts[place] += 1
        shifts.append(1 - float(torch.cosine_similarity(*states, dim=0)))
    np.testing.assert_array_equal(number, counts)
    np.testing.assert_allclose(total, sums, atol=1e-5)
    assert shift == pytest.approx(np.mean(shifts), abs=1e-6)


def test_clamping_nothing_changes_nothing(model, tokenizer, cells):
    run = runner(model, tokenizer, cells)
    tokens = run.cell(0)[0]
    chosen = _Clamp(np.array([], dtype=np.int64), {int(tokens[0]): 0.0})
    assert 0 not in run.changed_cells(chosen)
    read = run._read([run.cell(0)], [tokens[4:9]]), run._read([run.clamped(0, chosen)], [tokens[4:9]])
    np.testing.assert_array_equal(read[0][0], read[1][0])


def test_random_genes_are_detected_about_as_often(cells):
    genes, n_cells = np.unique(cells.token_ids, return_counts=True)
    gene = int(genes[n_cells.argmax()])
    rng = np.random.default_rng(0)
    sets = [_random_clamp(cells, nothing_up(gene), FEW, rng) for _ in range(50)]
    drawn = np.concatenate([chosen.genes for chosen in sets])
    assert gene not in drawn
    assert len(set(drawn)) > 10
    chosen_counts = n_cells[np.searchsorted(genes, drawn)]
    assert chosen_counts.min() >= np.sort(n_cells)[-51]  # the 50 nearest, the gene itself aside


def test_numbers_of_the_table(adata, model, tokenizer):
    found = clamp(adata, model, tokenizer, off=["GENE1"], up=["GENE2"])
    table = found.effects
    own = table.loc["ENSG00000000001"]
    assert own.n_readouts == 0
    assert np.isnan(own.expression_delta)
    assert np.isnan(own.p_value)
    tested = table[table["p_value"].notna()]
    assert len(tested) > 50
    assert tested["p_value"].between(1 / 5, 1).all()
    np.testing.assert_allclose(tested["fdr"], stats.false_discovery_control(tested["p_value"]))
    score = (tested["expression_delta"] - tested["random_mean"]) / tested["random_sd"]
    np.testing.assert_allclose(tested["z_score"], score)
    assert [len(genes) for genes in found.random_sets] == [2] * 4
    assert found.readout == "slots"
    assert 0 < found.n_cells <= 24
    expected = (1 + (found.random_embedding_shifts >= found.embedding_shift).sum()) / 5
    assert found.embedding_p_value == pytest.approx(expected)


def test_same_seed_same_table_whatever_the_batches(adata, model, tokenizer):
    first = clamp(adata, model, tokenizer, off=["GENE3"])
    other = clamp(
        adata, model, tokenizer, off=["GENE3"], settings=ClampSettings(n_random_sets=4, seed=1, batch_size=3)
    )
    np.testing.assert_allclose(
        first.effects["expression_delta"], other.effects["expression_delta"], atol=1e-5
    )
    assert first.random_sets == other.random_sets
    assert clamp(adata, model, tokenizer, off=["GENE3"]).effects.equals(first.effects)


def test_decoder_reads_any_gene(adata, fresh_tiny_model, tokenizer):
    model = fresh_tiny_model(latent_loss_weight=0.1)
    found = clamp(adata, model, tokenizer, off=["GENE3"], genes=["GENE3", "GENE119"])
    assert found.readout == "decoder"
    assert list(found.effects["gene_symbols"]) == ["GENE3", "GENE119"]
    assert (found.effects["n_readouts"] == found.n_cells).all()
    assert np.isnan(found.effects["p_value"].iloc[0])  # the clamped gene itself is no finding
    assert np.isfinite(found.effects["p_value"].iloc[1])


def test_significance_by_hand(tokenizer):
    one = np.ones(3, dtype=int)
    sums = [[4.0, 0.5, 0.0], [1.0, 1.0, 0.0], [3.0, -1.0, 0.0], [-2.0, 0.0, 0.0]]
    counts = [2 * one, one, one, np.array([1, 0, 0])]
    found = [(np.array(total), number, 0.0) for total, number in zip(sums, counts, strict=True)]
    table = _effects(found, np.array([5, 6, 7]), nothing_up(7), tokenizer.vocabulary)
    assert table["expression_delta"].tolist() == [2.0, 0.25, 0.0]
    # Random sets: 1, 3, -2 for the first gene, of which 3 and -2 are as far from zero as 2.
    assert table["p_value"].tolist()[0] == pytest.approx(3 / 4)
    assert table["random_mean"].tolist()[0] == pytest.approx(2 / 3)
    assert table["random_sd"].tolist()[0] == pytest.approx(np.std([1, 3, -2], ddof=1))
    # The second was read out in two random sets; both went farther. The third is the clamped gene.
    assert table["p_value"].tolist()[1] == 1.0
    assert np.isnan(table["p_value"].tolist()[2])


# --- refusals ---


def test_refusals(adata, model, tokenizer):
    with pytest.raises(ValueError, match=r"each in one of them; got none"):
        clamp(adata, model, tokenizer)
    with pytest.raises(ValueError, match=r"each in one of them; got 'GENE1' in both"):
        clamp(adata, model, tokenizer, off=["GENE1"], up=["GENE1"])
    with pytest.raises(KeyError, match=r"1 of 1 genes to switch off are not among the 120 genes .*'SPI1'"):
        clamp(adata, model, tokenizer, off=["SPI1"])
    with pytest.raises(TypeError, match=r"needs ScDivaForMaskedDiffusion, .* got ScDivaModel"):
        clamp(adata, ScDivaModel(model.config), tokenizer, off=["GENE1"])
    with pytest.raises(TypeError, match=r"got a path \(cells\.h5ad\)"):
        clamp("cells.h5ad", model, tokenizer, off=["GENE1"])
    with pytest.raises(ValueError, match="No genes to read out are named"):
        clamp(adata, model, tokenizer, off=["GENE1"], genes=[])
    with pytest.raises(ValueError, match="no gene-query decoder"):
        clamp(adata, model, tokenizer, off=["GENE1"], settings=ClampSettings(readout="decoder"))


def test_silent_gene_is_refused(adata, model, tokenizer):
    silent = adata.copy()
    dense = silent.X.toarray()
    dense[:, 4] = 0
    silent.X = dense
    with pytest.raises(ValueError, match=r"None of the 24 cells is changed: 'GENE5' are silent"):
        clamp(silent, model, tokenizer, off=["GENE5"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"off_mode": "mask"}, "off_mode must be"),
        ({"readout": "all"}, "readout must be one of auto, slots, decoder"),
        ({"hidden_fraction": 1.0}, r"hidden_fraction must lie in \(0, 1\)"),
        ({"up_value": 0.0}, "up_value must be a log1p value above 0"),
        ({"n_random_sets": 1}, "n_random_sets must be at least 2"),
    ],
)
def test_impossible_settings(change, message):
    with pytest.raises(ValueError, match=message):
        ClampSettings(**change)
