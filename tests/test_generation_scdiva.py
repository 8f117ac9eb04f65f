"""Generation with small random networks: what comes out, what stays, what a cell may depend on.

Scope: `generate`, `denoise`, `complete` and `impute` of `ScDivaForMaskedDiffusion`, on the CPU.
Run: pytest tests/test_generation_scdiva.py
"""

import pytest
import torch
from torch import nn
from transformers.utils import logging

from modeling_scdiva.size_law_scdiva import fit_size_law
from modeling_scdiva.steering_scdiva import Steering

PAD, MASK, LAT, PERT = 0, 1, 2, 4
CONDITIONS = {"cell_type": ["B", "T", "NK"], "library_size": [300.0, 600.0]}
LENGTHS = torch.tensor([12, 1, 30, 7, 2])
SETTINGS = [
    {},
    {"tokens_per_step": 1},
    {"steps": 4, "schedule": "cosine", "order": "rank"},
    {"steps": 5, "order": "margin", "temperature": 0.5, "top_p": 0.8},
    {"order": "entropy", "entropy_bound": 1.5},
    {"steps": 9, "remask": "random", "remask_rate": 0.3, "value_temperature": 0.0},
    {"steps": 6, "remask": "quality", "remask_rate": 0.3, "rank_consistent": False},
]


@pytest.fixture(scope="module")
def model(small_network):
    return small_network()


@pytest.fixture(scope="module")
def conditional(small_network):
    return small_network(conditions=CONDITIONS, latent_loss_weight=1.0)


def pairs(cells, cell, *, given_only=False):
    """(gene, bits of its value) of one cell; with ``given_only`` of those that are not generated."""
    is_kept = cells["attention_mask"][cell].bool() & (cells["input_ids"][cell] >= 5)
    if given_only:
        is_kept &= ~cells["is_generated"][cell]
    bits = cells["expression_values"].view(torch.int32)
    return set(zip(cells["input_ids"][cell, is_kept].tolist(), bits[cell, is_kept].tolist(), strict=True))


def assert_whole(made, lengths, weights, *, factors=None):
    """Right layout, exactly as many different genes as asked for, whole counts, and ranking order."""
    width = made.input_ids.shape[1]
    assert made.input_ids.shape == made.expression_values.shape == made.is_generated.shape
    assert made.input_ids.dtype == made.attention_mask.dtype == torch.int64
    assert (made.expression_values.dtype, made.is_generated.dtype) == (torch.float32, torch.bool)
    is_real = torch.arange(width) <= lengths.unsqueeze(1)
    assert torch.equal(made.attention_mask.bool(), is_real)
    assert (made.input_ids[:, 0] == LAT).all()
    assert (made.input_ids[~is_real] == PAD).all()
    is_gene = is_real.clone()
    is_gene[:, 0] = False
    assert (made.expression_values[~is_gene] == 0).all()
    assert (made.expression_values[is_gene] > 0).all()
    for ids, values, n in zip(made.input_ids, made.expression_values, lengths.tolist(), strict=True):
        genes, shown = ids[1 : n + 1], values[1 : n + 1]
        assert len(set(genes.tolist())) == n
        assert (genes >= 5).all()
        scores = (shown / weights[genes]).float()
        assert (scores.diff() <= 0).all()
        assert (genes.diff()[scores.diff() == 0] > 0).all()  # ties by token
    if factors is not None:
        counts = made.expression_values.double().expm1() * factors.unsqueeze(1)
        assert ((counts - counts.round()).abs() < 1e-3 + 1e-5 * counts)[is_gene].all()  # float32
        assert (counts.round() >= 1)[is_gene].all()


def same_cells(one, other, **tolerance):
    assert torch.equal(one.input_ids, other.input_ids)
    torch.testing.assert_close(one.expression_values, other.expression_values, **tolerance)
    assert torch.equal(one.is_generated, other.is_generated)


class CallCounter:
    """Counts forward calls of the encoder, and the cells in them."""

    def __init__(self, model):
        self.sizes = []
        self.handle = model.model.register_forward_hook(self, with_kwargs=True)

    def __call__(self, module, inputs, kwargs, outputs):
        self.sizes.append(len(outputs.last_hidden_state))

    def __enter__(self):
        return self.sizes

    def __exit__(self, *_):
        self.handle.remove()


# What comes out.


@pytest.mark.parametrize("value_head", ["scalar", "gene"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_new_cells_are_whole_cells(small_network, gene_weights, settings, value_head):
    model = small_network(value_head=value_head, objective="paper", quality_head=True)
    factors = torch.linspace(0.05, 0.5, 5, dtype=torch.float64)
    extra = {} if value_head == "gene" else {"ranking_weights": gene_weights}
    made = model.generate(n_genes=LENGTHS, size_factors=factors, batch_size=3, **extra, **settings)
    assert_whole(made, LENGTHS, gene_weights, factors=factors)
    assert torch.equal(made.is_generated, made.attention_mask.bool() & (made.input_ids != LAT))
    assert torch.equal(made.size_factors, factors)
    for nats in (made.gene_log_prob, made.value_log_prob):
        assert nats.dtype == torch.float64
        assert (nats <= 0).all()
        assert nats.isfinite().all()
    assert ((made.order_violations >= 0) & (made.order_violations <= 1)).all()


def test_values_without_molecules_are_no_counts(model, gene_weights):
    made = model.generate(n_cells=4, n_genes=9)
    assert_whole(made, torch.full((4,), 9), gene_weights)
    assert made.size_factors is made.value_log_prob is None


def test_ranking_order_is_put_at_the_end_and_changes_nothing_else(model, gene_weights):
    settings = {"n_genes": LENGTHS, "rank_consistent": False, "seed": 4}
    drawn, made = (model.generate(**settings, canonicalize=is_sorted) for is_sorted in (False, True))
    assert_whole(made, LENGTHS, gene_weights)
    assert [pairs(drawn, i) for i in range(5)] == [pairs(made, i) for i in range(5)]
    scores = (drawn.expression_values / gene_weights[drawn.input_ids]).float()
    n_wrong = [int((scores[i, 1 : n + 1].diff() > 0).sum()) for i, n in enumerate(LENGTHS.tolist())]
    share = torch.tensor(n_wrong).double() / (LENGTHS - 1).clamp(min=1)
    torch.testing.assert_close(drawn.order_violations, share)
    assert torch.equal(drawn.order_violations, made.order_violations)
    assert share.sum() > 0.5


def test_values_between_their_neighbours_leave_no_violation(model):
    made = model.generate(n_genes=LENGTHS, tokens_per_step=1)
    # A cell of all genes can run out of those that fit.
    is_whole = made.attention_mask.sum(dim=1) - 1 == 30
    assert is_whole.sum() == 1
    assert not made.order_violations[~is_whole].any()


def test_probability_of_the_genes_by_hand(model):
    """One gene at a time from left to right: the sum of the logs of what `forward` gives them."""
    made = model.generate(
        n_genes=6, n_cells=3, order="rank", tokens_per_step=1, canonicalize=False, rank_consistent=False
    )
    nats = torch.zeros(3, dtype=torch.float64)
    with torch.no_grad():
        for place in range(1, 7):
            shown = torch.arange(7) < place
            ids = torch.where(shown, made.input_ids, MASK)
            values = torch.where(shown, made.expression_values, 0.0)
            logits = model(ids, values, output_all_logits=True).logits[:, place].double()
            nats += logits.log_softmax(1).gather(1, made.input_ids[:, place : place + 1]).squeeze(1)
    torch.testing.assert_close(made.gene_log_prob, nats, atol=1e-5, rtol=1e-5)


def test_sizes_come_from_the_law_where_they_do_not_come(small_network, gene_weights):
    model = small_network()
    law = fit_size_law(
        torch.randint(3, 20, (200,)).numpy(),
        torch.randint(200, 900, (200,)).double().numpy(),
        max_genes=20,
        target_sum=1e4,
    )
    model.generation_config = model.generation_config.updated(size_law=law, steps=3)
    made = model.generate(n_cells=30)
    lengths = made.attention_mask.sum(dim=1) - 1
    assert_whole(made, lengths, gene_weights, factors=made.size_factors)
    assert 1 <= lengths.min() < lengths.max() <= 20
    assert 0.02 <= made.size_factors.min() < made.size_factors.max() <= 0.09
    more = model.generate(n_cells=40)
    assert torch.equal(more.size_factors[:30], made.size_factors)
    given = model.generate(n_cells=30, n_genes=5)  # depth is drawn for this length
    assert ((given.attention_mask.sum(dim=1) - 1) == 5).all()
    assert len(given.size_factors.unique()) > 5
    deep = model.generate(n_cells=30, size_factors=0.03)
    assert (deep.size_factors == 0.03).all()
    assert len(deep.attention_mask.sum(dim=1).unique()) > 3


def test_a_half_precision_network_generates(small_network, gene_weights):
    model = small_network().to(torch.bfloat16)
    made = model.generate(n_genes=LENGTHS, size_factors=0.1)
    weights = model.value_head.gene_weights.double()
    assert_whole(made, LENGTHS, weights, factors=made.size_factors)


# What stays.


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("settings", SETTINGS[:6], ids=str)
def test_what_is_kept_is_bit_equal(model, small_cells, gene_weights, settings, strength):
    cells = small_cells((12, 7, 3, 30))
    made = model.denoise(**cells, strength=strength, **settings)
    assert_whole(made, torch.tensor([12, 7, 3, 30]), gene_weights, factors=cells["size_factors"])
    for i, n in enumerate((12, 7, 3, 30)):
        assert made.is_generated[i].sum() == round(strength * n)
        assert pairs(made, i, given_only=True) <= pairs(cells, i)
    if strength == 0.0:
        for name in ("input_ids", "expression_values", "attention_mask"):
            assert torch.equal(made[name], cells[name])
        assert not made.gene_log_prob.any()
        assert not made.n_network_calls.any()


def test_denoise_is_generate_from_cells_and_hides_other_genes_with_another_seed(model, small_cells):
    cells = small_cells((20, 11))
    made = model.denoise(**cells, strength=0.5)
    same_cells(made, model.generate(**cells, strength=0.5))
    other = model.denoise(**cells, strength=0.5, seed=9)
    assert pairs(made, 0, given_only=True) != pairs(other, 0, given_only=True)


def test_inputs_are_not_changed(model, small_cells):
    cells = small_cells()
    before = {name: tensor.clone() for name, tensor in cells.items()}
    model.denoise(**cells, strength=0.7)
    model.complete(**cells, n_genes=14)
    model.impute(**cells, is_masked=cells["input_ids"] >= 5)
    assert all(torch.equal(cells[name], before[name]) for name in cells)


def test_complete_fills_hidden_genes_at_their_rank(model, small_cells):
    cells = without_molecules(small_cells((9, 6)))
    hidden = torch.zeros_like(cells["input_ids"], dtype=torch.bool)
    hidden[0, [2, 5]] = hidden[1, 1] = True
    masked = cells | {"input_ids": cells["input_ids"].masked_fill(hidden, MASK)}
    masked["expression_values"] = cells["expression_values"].masked_fill(hidden, torch.nan)
    made = model.complete(**masked, canonicalize=False)
    assert torch.equal(made.is_generated, hidden)
    for name in ("input_ids", "expression_values"):
        assert torch.equal(made[name][~hidden], cells[name][~hidden])
    assert (made.input_ids[hidden] >= 5).all()
    assert not made.order_violations.any()  # values lie between those of their neighbours


def without_molecules(cells):
    """Then values are no counts, and some value lies between any two."""
    return {name: tensor for name, tensor in cells.items() if name != "size_factors"}


@pytest.mark.parametrize("n_genes", [12, torch.tensor([12, 9, 20])], ids=["one", "each"])
def test_complete_adds_genes_behind_those_given(model, small_cells, gene_weights, n_genes):
    cells = without_molecules(small_cells())
    made = model.complete(**cells, n_genes=n_genes, tokens_per_step=1)
    lengths = torch.as_tensor(n_genes).expand(3)
    assert_whole(made, lengths, gene_weights)
    drawn = model.complete(**cells, n_genes=n_genes, tokens_per_step=1, canonicalize=False)
    for i, n in enumerate((12, 7, 3)):
        assert pairs(made, i, given_only=True) == pairs(cells, i)
        assert torch.equal(drawn.input_ids[i, : n + 1], cells["input_ids"][i, : n + 1])
        width = drawn.input_ids.shape[1]
        assert drawn.is_generated[i].tolist() == [n < place <= lengths[i] for place in range(width)]
    assert not drawn.order_violations.any()


def test_one_molecule_is_the_least_where_none_fits(model, small_cells):
    cells = small_cells((30,)) | {"size_factors": torch.tensor([0.05])}
    cells["expression_values"] = cells["expression_values"].clamp(max=0.001)  # below one molecule
    hidden = cells["input_ids"] == cells["input_ids"][0, 9]
    made = model.impute(**cells, is_masked=hidden)
    torch.testing.assert_close(made.expression_values[hidden], torch.tensor([21.0]).log())


def test_complete_leaves_a_whole_cell_alone(model, small_cells):
    cells = small_cells((8, 8))
    made = model.complete(**cells, n_genes=8)
    assert torch.equal(made.input_ids, cells["input_ids"])
    assert torch.equal(made.expression_values, cells["expression_values"])


def test_a_perturbation_token_stays_in_front(model, small_cells, gene_weights):
    cells = small_cells((6, 4))
    ids = torch.cat([cells["input_ids"][:, :1], torch.full((2, 1), PERT), cells["input_ids"][:, 1:]], dim=1)
    values = nn.functional.pad(cells["expression_values"], (1, 0))
    made = model.complete(ids, values, n_genes=9)
    assert made.input_ids[:, :2].tolist() == [[LAT, PERT]] * 2
    assert (made.input_ids[:, 2:] >= 5).all()
    assert made.is_generated.sum(dim=1).tolist() == [3, 5]


# Values of known genes.


def test_impute_gives_the_counts_next_to_the_centres_in_one_call(model, small_cells, gene_weights):
    cells = small_cells((10, 6))
    is_wanted = torch.zeros_like(cells["input_ids"], dtype=torch.bool)
    is_wanted[0, [1, 4, 9]] = is_wanted[1, [2, 4]] = True
    everywhere = is_wanted | (cells["input_ids"] < 5)  # `<lat>` and padding have no value
    with CallCounter(model) as sizes:
        made = model.impute(**cells, is_masked=everywhere, rank_consistent=False)
    assert sizes == [2]
    assert torch.equal(made.is_generated, is_wanted)
    assert torch.equal(made.input_ids, cells["input_ids"])
    assert torch.equal(made.expression_values[~is_wanted], cells["expression_values"][~is_wanted])
    shown = cells["input_ids"].masked_fill(is_wanted, MASK)  # as in training
    with torch.no_grad():
        states = model.model(shown, cells["expression_values"], is_masked=is_wanted).last_hidden_state
        centres = model.predict_expression(states[is_wanted], cells["input_ids"][is_wanted])
    factors = cells["size_factors"].unsqueeze(1).expand(is_wanted.shape)[is_wanted]
    expected = ((centres.double().expm1() * factors).round().clamp(min=1) / factors).log1p().float()
    torch.testing.assert_close(made.expression_values[is_wanted], expected)
    bounded = model.impute(**without_molecules(cells), is_masked=everywhere)
    scores = bounded.expression_values / gene_weights[cells["input_ids"]]
    assert (scores[:, 2:] <= scores[:, 1:-1] + 1e-5).all()


def test_impute_draws_when_asked(model, small_cells):
    cells = small_cells((20, 20))
    is_wanted = cells["input_ids"] >= 5
    centre = model.impute(**cells, is_masked=is_wanted, seed=5)
    assert torch.equal(centre.expression_values, model.impute(**cells, is_masked=is_wanted).expression_values)
    draws = [
        model.impute(**cells, is_masked=is_wanted, seed=seed, value_temperature=1.0, steps=4)
        for seed in (5, 6)
    ]
    assert (draws[0].expression_values != draws[1].expression_values).any()
    assert (draws[0].n_network_calls == 4).all()
    assert all(torch.equal(drawn.input_ids, cells["input_ids"]) for drawn in draws)


def test_queries_give_expected_values(conditional, small_cells):
    cells = small_cells()
    queries, given = torch.tensor([7, 30, 12, 7]), torch.tensor([1, 2])
    answer = conditional.impute(**cells, query_ids=queries, condition_ids=given)
    inputs = {name: cells[name] for name in ("input_ids", "expression_values", "attention_mask")}
    with torch.no_grad():
        states = conditional.model(**inputs, condition_ids=given.expand(3, 2)).last_hidden_state
        log_odds, values = conditional.decode_genes(states[:, 0], queries)
    torch.testing.assert_close(answer.expression_values, log_odds.sigmoid() * values)
    assert answer.input_ids.tolist() == [queries.tolist()] * 3
    assert answer.is_generated.all()
    assert not answer.expression_values.requires_grad
    each = conditional.impute(**cells, query_ids=queries.expand(3, 4), condition_ids=given.expand(3, 2))
    torch.testing.assert_close(each.expression_values, answer.expression_values)
    free = conditional.impute(**cells, query_ids=queries)
    assert (free.expression_values - answer.expression_values).abs().max() > 1e-4


# What a cell may depend on.


@pytest.mark.parametrize("settings", [*SETTINGS[:6], {"guidance_scale": 2.0, "steps": 4}], ids=str)
def test_network_calls_are_those_of_the_network(conditional, small_cells, settings):
    given = {"condition_ids": torch.tensor([2, 1])}
    cells = small_cells((11, 4, 1, 7))
    together = conditional.denoise(**cells, **given, **settings, strength=0.8)
    for i in range(4):
        alone = {name: tensor[i : i + 1] for name, tensor in cells.items()}
        generator = torch.Generator().manual_seed(0)
        torch.randint(2**62, (i,), generator=generator)  # the seed of the i-th cell comes next
        with CallCounter(conditional) as sizes:
            made = conditional.denoise(**alone, **given, **settings, strength=0.8, generator=generator)
        assert sizes == [2 if "guidance_scale" in settings else 1] * int(made.n_network_calls)
        assert made.n_network_calls == together.n_network_calls[i]
    with CallCounter(conditional) as sizes:
        conditional.denoise(**cells, **given, **settings, strength=0.8)
    n_times = 2 if "guidance_scale" in settings else 1
    assert sum(sizes) == n_times * int(together.n_network_calls.sum())
    # Cells of a batch share calls, but for short ones that a step leaves as they are.
    assert together.n_network_calls.max() <= len(sizes) < together.n_network_calls.sum()


@pytest.mark.parametrize("settings", SETTINGS[:6], ids=str)
def test_a_seed_gives_the_same_cells_in_any_company(model, settings):
    lengths = torch.tensor([9, 5, 14, 14, 2, 7])
    made = model.generate(n_genes=lengths, size_factors=0.05, **settings)
    for batch_size in (1, 4):
        again = model.generate(n_genes=lengths, size_factors=0.05, **settings, batch_size=batch_size)
        same_cells(made, again, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(made.gene_log_prob, again.gene_log_prob, atol=1e-4, rtol=0)
        torch.testing.assert_close(made.value_log_prob, again.value_log_prob, atol=1e-4, rtol=0)
        assert torch.equal(made.n_network_calls, again.n_network_calls)
    fewer = model.generate(n_genes=lengths[:2], size_factors=0.05, **settings)
    assert [pairs(fewer, i) for i in range(2)] == [pairs(made, i) for i in range(2)]
    other = model.generate(n_genes=lengths, size_factors=0.05, **settings, seed=1)
    assert all(pairs(other, i) != pairs(made, i) for i in (0, 2, 3))
    assert pairs(made, 2) != pairs(made, 3)  # cells of one length have seeds of their own


def test_a_generator_gives_the_seeds(model):
    def make(seed):
        generator = torch.Generator().manual_seed(seed)
        return [model.generate(n_cells=2, n_genes=8, generator=generator) for _ in range(2)]

    (one, two), (again, _), (other, _) = make(3), make(3), make(4)
    same_cells(one, again)
    assert not torch.equal(one.input_ids, two.input_ids)  # it goes on
    assert not torch.equal(one.input_ids, other.input_ids)


def test_the_global_generator_is_left_alone(small_network, small_cells):
    model, cells = small_network(hidden_dropout=0.2).train(), small_cells()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    made = [model.generate(n_cells=2, n_genes=5), model.denoise(**cells, strength=0.5)]
    model.complete(**cells, n_genes=13)
    model.impute(**cells, is_masked=cells["input_ids"] >= 5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    same_cells(made[0], model.generate(n_cells=2, n_genes=5))


def test_modes_come_back_also_after_an_error(small_network, small_cells):
    model, cells = small_network(hidden_dropout=0.2).train(), small_cells()
    model.value_head.eval()
    before = {name: module.training for name, module in model.named_modules()}
    model.denoise(**cells, strength=0.5)
    assert {name: module.training for name, module in model.named_modules()} == before

    def broken(*_):
        raise KeyboardInterrupt

    handle = model.lm_head.register_forward_hook(broken)
    with pytest.raises(KeyboardInterrupt):
        model.denoise(**cells, strength=0.5)
    handle.remove()
    assert {name: module.training for name, module in model.named_modules()} == before


@pytest.mark.parametrize("given", [None, torch.tensor([[1, 0], [3, 2], [0, 0]])], ids=["free", "conditions"])
def test_padding_on_either_side_and_neighbours_change_nothing(conditional, small_cells, given):
    cells = small_cells((13, 8, 5))
    options = {"strength": 0.6, "steps": 5, "seed": 2}
    made = conditional.denoise(**cells, condition_ids=given, **options)
    width = cells["input_ids"].shape[1]
    shifts = (width - cells["attention_mask"].sum(dim=1)).tolist()
    left = {
        name: torch.stack([row.roll(shift) for row, shift in zip(tensor, shifts, strict=True)])
        for name, tensor in cells.items()
        if name != "size_factors"
    }
    wide = {name: nn.functional.pad(tensor, (2, 3)) for name, tensor in left.items()}
    wide["input_ids"] = torch.where(wide["attention_mask"] == 0, 9, wide["input_ids"])  # never read
    for other in (left, wide):
        again = conditional.denoise(
            **other, size_factors=cells["size_factors"], condition_ids=given, **options
        )
        for i in range(3):
            n = int(cells["attention_mask"][i].sum())
            assert torch.equal(again.input_ids[i, :n], made.input_ids[i, :n])
            assert torch.equal(again.attention_mask[i].bool(), torch.arange(again.input_ids.shape[1]) < n)
            assert pairs(again, i) == pairs(made, i)
        torch.testing.assert_close(again.gene_log_prob, made.gene_log_prob, atol=1e-4, rtol=0)


def test_conditions_change_what_is_made(conditional):
    def made(ids):
        return conditional.generate(n_cells=4, n_genes=10, condition_ids=ids)

    one = made(torch.tensor([1, 0]))
    same_cells(one, made(torch.tensor([[1, 0]] * 4)))
    assert not torch.equal(one.input_ids, made(torch.tensor([2, 0])).input_ids)
    same_cells(made(None), made(torch.tensor([0, 0])))


@pytest.fixture
def progress_bars():
    """Switched on in transformers, which other tests may have switched off."""
    was_on = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    yield
    if not was_on:
        logging.disable_progress_bar()


@pytest.mark.usefixtures("progress_bars")
def test_progress_is_shown_on_request(model, capsys):
    model.generate(n_cells=2, n_genes=4)
    assert capsys.readouterr().err == ""
    model.generate(n_cells=2, n_genes=4, show_progress=True)
    assert "8/8" in capsys.readouterr().err


def test_particles_go_through_every_way_to_generate(model, small_cells):
    cells = small_cells((6, 4))
    steering = Steering(reward=lambda ids, values, mask: (ids == 11).any(dim=1).double() * 4, n_particles=3)
    made = [
        model.generate(n_cells=2, n_genes=6, steering=steering),
        model.denoise(**cells, strength=0.5, steering=steering),
        model.complete(**cells, n_genes=9, steering=steering),
    ]
    for cell in made:
        assert (cell.n_network_calls % 3 == 0).all()
