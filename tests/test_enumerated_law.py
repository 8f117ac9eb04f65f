"""Tests of the enumerated law, the ground truth of the tests of samplers and bounds.

Scope: `EnumeratedLaw` against loops over all cells.
Run: pytest tests/test_enumerated_law.py
"""

import itertools
import math

import numpy as np
import pytest
import torch

from modeling_scdiva.enumerated_law import LAT, MASK, N_SPECIAL, PAD, EnumeratedLaw
from modeling_scdiva.unmask_scdiva import CellState


def conditional(law, shown):
    """(L, V) probability of each gene at each slot, given what is shown, by a loop over all cells."""
    table = np.zeros((law.n_slots, law.vocab_size))
    for cell, probability in zip(law.cells.tolist(), law.probabilities.tolist(), strict=True):
        if all(seen in (MASK, gene) for seen, gene in zip(shown, cell, strict=True)):
            for slot, gene in enumerate(cell):
                table[slot, gene] += probability
    return table / table[0].sum()


def patterns(law):
    """(P, S) all ways to hide some genes of some cell."""
    rows = set()
    for cell in law.cells.tolist():
        for hidden in itertools.product([False, True], repeat=law.n_slots):
            rows.add((LAT, *(MASK if hide else gene for gene, hide in zip(cell, hidden, strict=True))))
    return torch.tensor(sorted(rows))


def state_of(ids, is_attended=None):
    is_attended = torch.ones_like(ids, dtype=torch.bool) if is_attended is None else is_attended
    return CellState(ids, torch.zeros(ids.shape), is_attended, ids == MASK)


@pytest.mark.parametrize(("n_genes", "n_slots"), [(6, 4), (5, 3), (3, 1), (4, 4)])
def test_the_law_is_one_over_all_cells(n_genes, n_slots):
    law = EnumeratedLaw(n_genes, n_slots)
    assert len(law.cells) == math.perm(n_genes, n_slots) == len({tuple(cell) for cell in law.cells.tolist()})
    assert all(len(set(cell)) == n_slots for cell in law.cells.tolist())
    assert law.cells.min() == N_SPECIAL
    assert law.cells.max() == law.vocab_size - 1 == N_SPECIAL + n_genes - 1
    assert law.probabilities.sum().item() == pytest.approx(1.0, abs=1e-12)
    assert law.probabilities.dtype == torch.float64
    probabilities = law.probabilities.numpy()
    assert law.entropy() == pytest.approx(-(probabilities * np.log(probabilities)).sum(), abs=1e-12)


def test_entropy_by_hand():
    law = EnumeratedLaw(4, 1)
    law.probabilities = torch.tensor([0.5, 0.25, 0.25, 0.0], dtype=torch.float64)
    assert law.entropy() == pytest.approx(1.5 * math.log(2))


def test_seeds_and_concentration_set_the_law():
    first, again, other = EnumeratedLaw(seed=1), EnumeratedLaw(seed=1), EnumeratedLaw(seed=2)
    assert torch.equal(first.probabilities, again.probabilities)
    assert torch.equal(first.locations, again.locations)
    assert not torch.equal(first.probabilities, other.probabilities)
    assert EnumeratedLaw(concentration=0.05).entropy() < EnumeratedLaw(concentration=5.0).entropy()


def test_answers_equal_a_loop_over_all_cells():
    law = EnumeratedLaw(5, 3, seed=3)
    ids = patterns(law)
    assert len(ids) == 1 + 3 * 5 + 3 * 20 + 60
    encoded = law.encode(state_of(ids))
    assert encoded.dtype == torch.float64
    for shown, answer in zip(ids.tolist(), encoded.numpy(), strict=True):
        np.testing.assert_allclose(answer[1:], conditional(law, shown[1:]), atol=1e-14)
        assert (answer[0] == 0).all()
    cells, places = (ids == MASK).nonzero(as_tuple=True)
    logits = law.gene_logits(encoded, cells, places)
    torch.testing.assert_close(logits.exp(), encoded[cells, places])
    assert logits[:, :N_SPECIAL].isneginf().all()
    for row, cell in enumerate(cells.tolist()):
        assert logits[row, ids[cell][ids[cell] >= N_SPECIAL]].isneginf().all()  # a gene occurs once


def test_answers_depend_on_neither_batch_nor_padding():
    law = EnumeratedLaw(5, 3)
    ids = patterns(law)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    together = law.encode(state_of(ids))
    assert torch.equal(law.encode(state_of(ids[order])), together[order])
    assert law.n_encoded == 2 * len(ids)
    padded = torch.nn.functional.pad(ids, (0, 2), value=PAD)
    is_attended = padded != PAD
    padded[:, -1] = MASK  # what stands at padding is not read
    assert torch.equal(law.encode(state_of(padded, is_attended)), together)
    for row in range(0, len(ids), 17):
        assert torch.equal(law.encode(state_of(ids[row : row + 1]))[0], together[row])


def test_values_have_one_law_per_gene():
    law = EnumeratedLaw(4, 2)
    genes = torch.tensor([5, 8, 5])
    location, scale = law.value_law(torch.zeros(1), genes, genes, genes)
    assert location.tolist() == law.locations[genes].tolist()
    assert scale.tolist() == law.scales[genes].tolist()
    assert (law.scales > 0).all()
    assert law.quality(torch.zeros(1), genes, genes).tolist() == [0.0] * 3


def test_states_hide_all_or_nothing():
    law = EnumeratedLaw(4, 2)
    hidden, clean = law.hidden_cells(3), law.clean_cells()
    assert hidden.input_ids.tolist() == [[LAT, MASK, MASK]] * 3
    assert hidden.is_masked.tolist() == [[False, True, True]] * 3
    assert clean.input_ids[:, 1:].tolist() == law.cells.tolist()
    assert (clean.input_ids[:, 0] == LAT).all()
    assert not clean.is_masked.any()
    for state in (hidden, clean):
        assert state.attention_mask.all()
        assert state.expression_values.shape == state.input_ids.shape


def test_cells_are_found_in_the_list():
    law = EnumeratedLaw(6, 4)
    order = torch.randperm(len(law.cells), generator=torch.Generator().manual_seed(0))
    assert torch.equal(law.index_of(law.clean_cells().input_ids[order]), order)


@pytest.mark.parametrize("cell", [[5, 5, 6], [MASK, 5, 6], [5, 6, 10], [5, 6, PAD], [10, 9, 8]])
def test_what_is_no_cell_of_the_law_is_refused(cell):
    law = EnumeratedLaw(5, 3)
    ids = torch.tensor([[LAT, 5, 6, 7], [LAT, *cell]])
    with pytest.raises(ValueError, match="A cell repeats a gene, or holds a token that is no gene"):
        law.index_of(ids)
