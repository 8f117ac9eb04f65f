"""Likelihoods of cells: parts by hand, exact values by teacher forcing, what they may depend on, refusals.

Scope: `compute_nll` and `exact_nll` of `ScDivaForMaskedDiffusion`, small random networks on the CPU.
Run: pytest tests/test_likelihood_scdiva.py
"""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from modeling_scdiva.size_law_scdiva import fit_size_law, length_log_prob
from modeling_scdiva.value_law_scdiva import count_log_prob, counts_from_values

MASK = 1
CONDITIONS = {"cell_type": ["B", "T", "NK"]}
NUMBERS = ("nll", "gene_nll", "value_nll")


@pytest.fixture(scope="module")
def model(small_network):
    return small_network(hidden_dropout=0.2)


@pytest.fixture(scope="module")
def conditional(small_network):
    return small_network(conditions=CONDITIONS)


def near(one, other, atol=1e-4):
    for name in NUMBERS:
        torch.testing.assert_close(one[name], other[name], atol=atol, rtol=1e-5)


def in_forward(model, cells, is_hidden):
    """Cells with genes hidden as `forward` takes them in training: (B,) gene and (B,) count loss."""
    ids = cells["input_ids"].expand(is_hidden.shape)
    values = cells["expression_values"].expand(is_hidden.shape)
    with torch.no_grad():
        output = model(
            ids.masked_fill(is_hidden, MASK),
            values.masked_fill(is_hidden, 0.0),
            is_masked=is_hidden,
            labels=ids.masked_fill(~is_hidden, -100),
            expression_labels=values,
            size_factors=cells["size_factors"].expand(len(is_hidden)),
        )
    return output.cell_gene_loss.double(), output.cell_expression_loss.double()


# Both ways.


@pytest.mark.parametrize("method", ["compute_nll", "exact_nll"])
def test_parts_add_up(small_network, small_cells, method):
    model, cells = small_network(), small_cells()
    lengths = torch.tensor([12, 7, 3])
    score = getattr(model, method)
    scored = score(**cells, n_genes_detected=torch.tensor([15, 7, 3]))
    torch.testing.assert_close(scored.nll, scored.gene_nll + scored.value_nll)
    assert scored.length_nll is None
    assert torch.equal(scored.n_tokens, lengths)
    assert scored.is_truncated.tolist() == [True, False, False]
    for name in NUMBERS:
        assert scored[name].dtype == torch.float64
        assert (scored[name] > 0).all()
    law = fit_size_law(np.arange(1, 21), np.arange(100, 2100, 100), max_genes=20, target_sum=1e4)
    model.generation_config = model.generation_config.updated(size_law=law)
    sized = score(**cells)
    expected = -length_log_prob(law, lengths.numpy(), (cells["size_factors"] * 1e4).numpy())
    torch.testing.assert_close(sized.length_nll, torch.from_numpy(expected))
    torch.testing.assert_close(sized.nll, scored.nll + sized.length_nll)
    assert sized.is_truncated is None
    genes = score(**cells, genes_only=True)
    assert genes.value_nll is None
    torch.testing.assert_close(genes.gene_nll, scored.gene_nll, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(genes.nll, genes.gene_nll + sized.length_nll)
    del cells["size_factors"]
    assert torch.isfinite(score(**cells, genes_only=True).nll).all()  # the mean over depths


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("compute_nll", {"n_draws": 6}),
        ("exact_nll", {}),
        ("exact_nll", {"order": "margin", "tokens_per_step": 3}),
    ],
)
def test_padding_and_neighbours_change_nothing(conditional, small_cells, method, options):
    cells, given = small_cells(), torch.tensor([[1], [3], [0]])
    score = getattr(conditional, method)
    scored = score(**cells, condition_ids=given, **options)
    for batch_size in (1, 2, 7):
        near(score(**cells, condition_ids=given, **options, batch_size=batch_size), scored)
    first = {name: tensor[:1] for name, tensor in cells.items()}
    alone = score(**first, condition_ids=given[:1], **options)
    for name in NUMBERS:
        torch.testing.assert_close(alone[name][0], scored[name][0], atol=1e-4, rtol=1e-5)
    shifts = (13 - cells["attention_mask"].sum(dim=1)).tolist()
    left = {
        name: torch.stack([row.roll(shift) for row, shift in zip(tensor, shifts, strict=True)])
        for name, tensor in cells.items()
        if name != "size_factors"
    }
    wide = {name: nn.functional.pad(tensor, (1, 4)) for name, tensor in left.items()}
    for padded in (left, wide):
        near(score(**padded, size_factors=cells["size_factors"], condition_ids=given, **options), scored)
    del left["attention_mask"]
    near(score(**left, size_factors=cells["size_factors"], condition_ids=given, **options), scored)


def test_the_order_of_the_cells(model, small_cells):
    """Exact values go with their cells; estimates have seeds by place and agree within their errors."""
    cells = small_cells((9, 7, 3, 9))
    turned = {name: tensor.flip(0) for name, tensor in cells.items()}
    exact, again = model.exact_nll(**cells), model.exact_nll(**turned)
    for name in NUMBERS:
        torch.testing.assert_close(again[name].flip(0), exact[name], atol=1e-4, rtol=1e-5)
    scored, again = model.compute_nll(**cells), model.compute_nll(**turned)
    error = (scored.standard_error**2 + again.standard_error.flip(0) ** 2).sqrt()
    assert ((scored.nll - again.nll.flip(0)).abs() < 4 * error).all()


@pytest.mark.parametrize("method", ["compute_nll", "exact_nll"])
def test_conditions_count_and_guidance_does_not(conditional, small_cells, method):
    cells, score = small_cells(), getattr(conditional, method)
    free, given = score(**cells), score(**cells, condition_ids=torch.tensor([2]))
    assert ((free.gene_nll - given.gene_nll).abs() > 1e-2).all()
    near(score(**cells, condition_ids=torch.full((3, 1), 2)), given)
    near(score(**cells, condition_ids=torch.tensor([0])), free)
    config = conditional.generation_config
    conditional.generation_config = config.updated(guidance_scale=3.0, temperature=0.5, seed=5)
    near(score(**cells, condition_ids=torch.tensor([2])), given)
    conditional.generation_config = config


@pytest.mark.parametrize("method", ["compute_nll", "exact_nll"])
def test_scoring_leaves_modes_and_generators_alone(small_network, small_cells, method):
    model, cells = small_network(hidden_dropout=0.2).train(), small_cells()
    model.value_head.eval()
    before, state = {name: m.training for name, m in model.named_modules()}, torch.get_rng_state()
    one, other = (getattr(model, method)(**cells) for _ in range(2))
    assert torch.equal(one.nll, other.nll)
    assert {name: m.training for name, m in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), state)
    assert not one.nll.requires_grad


# The bound.


def test_bound_is_the_mean_over_all_masks(model, small_cells):
    """L / k * sum over the hidden, averaged over every k and every set of k genes, with `forward` itself."""
    cells = small_cells((5,))
    masks = torch.tensor([(False, *m) for m in itertools.product([False, True], repeat=5)][1:])
    n_hidden = masks.sum(dim=1)
    genes, counts = in_forward(model, cells, masks)  # means over the hidden: L / k * sum = L * mean
    expected = {
        name: 5 * torch.stack([part[n_hidden == k].mean() for k in range(1, 6)]).mean()
        for name, part in (("gene_nll", genes), ("value_nll", counts), ("nll", genes + counts))
    }
    scored = model.compute_nll(**cells, n_draws=3000, batch_size=3000)
    for name, value in expected.items():
        assert abs(scored[name] - value) < 4 * scored.standard_error + 1e-3, name
    assert scored.standard_error < 0.01 * scored.nll


def test_more_draws_and_other_seeds(model, small_cells):
    cells = small_cells((25, 14))
    few, many = (model.compute_nll(**cells, n_draws=n) for n in (8, 512))
    assert (few.standard_error > 0).all()
    assert (many.standard_error < 0.35 * few.standard_error).all()
    assert ((few.nll - many.nll).abs() < 4 * few.standard_error).all()
    other = model.compute_nll(**cells, n_draws=8, seed=1)
    assert (other.nll != few.nll).all()
    assert torch.equal(model.compute_nll(**cells, n_draws=8).nll, few.nll)
    assert many.gene_surprisal is None


def test_one_gene_has_no_error(model, small_cells):
    """With one gene there is one mask: the bound is exact, and so is the error of zero."""
    cells = small_cells((1,))
    scored, exact = model.compute_nll(**cells, n_draws=4), model.exact_nll(**cells)
    near(scored, exact)
    assert scored.standard_error == pytest.approx(0.0, abs=1e-6)


def test_surprisals_average_to_the_bound(model, small_cells):
    """A gene's surprisal is its mean over the draws that hid it, of cells of one and two genes by hand."""
    cells = small_cells((2, 8, 1))  # scored longest first, two at a time
    scored = model.compute_nll(**cells, n_draws=400, per_gene=True, batch_size=2)
    is_gene = cells["input_ids"] >= 5
    assert torch.equal(~scored.gene_surprisal.isnan(), is_gene)
    assert (scored.gene_surprisal[is_gene] > 0).all()
    torch.testing.assert_close(scored.gene_surprisal[2, 1], scored.gene_nll[2])
    # Two genes: half of the draws hide both, half one of them with weight 2.
    masks = torch.tensor([[False, True, True], [False, True, False], [False, False, True]])
    pair = {name: tensor[:1, :3] if tensor.ndim == 2 else tensor[:1] for name, tensor in cells.items()}
    with torch.no_grad():
        ids = pair["input_ids"].expand(3, 3)
        logits = model.eval()(
            ids.masked_fill(masks, MASK),
            pair["expression_values"].masked_fill(masks, 0.0),
            is_masked=masks,
            output_all_logits=True,
        ).logits.log_softmax(dim=2)
    nats = -logits.gather(2, ids.unsqueeze(2)).squeeze(2).double()
    # A gene is hidden in all draws of the first kind and in half of those of the second.
    expected = torch.tensor([(2 * nats[0, 1] + nats[1, 1]) / 3, (2 * nats[0, 2] + nats[2, 2]) / 3])
    torch.testing.assert_close(scored.gene_surprisal[0, 1:3], expected.double(), atol=0.15, rtol=0.05)
    few = [model.compute_nll(**cells, n_draws=2, per_gene=True, seed=seed) for seed in range(5)]
    assert any(scored.gene_surprisal[1, 1:9].isnan().any() for scored in few)  # never hidden


def test_a_trained_cell_is_likelier_than_a_shuffled_one(small_network, small_cells):
    """A network that has seen only one cell prefers it to the same genes with other counts or places."""
    model, cells = small_network(hidden_dropout=0.0, initializer_range=0.05).train(), small_cells((8,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(120):
        hidden = torch.zeros(8, 9, dtype=torch.bool)
        for row, k in enumerate(range(1, 9)):
            hidden[row, 1 + torch.randperm(8, generator=generator)[:k]] = True
        ids, values = cells["input_ids"].expand(8, 9), cells["expression_values"].expand(8, 9)
        loss = model(
            ids.masked_fill(hidden, MASK), values.masked_fill(hidden, 0.0), is_masked=hidden,
            labels=ids.masked_fill(~hidden, -100), expression_labels=values,
            size_factors=cells["size_factors"].expand(8),
        ).loss  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seen = model.compute_nll(**cells)
    assert seen.gene_nll < 0.25 * 8 * np.log(30)
    other = small_cells((8,), seed=5)
    assert model.compute_nll(**other).nll > seen.nll + 20
    assert model.exact_nll(**other).nll > model.exact_nll(**cells).nll + 20
    assert model.exact_nll(**cells).nll < seen.nll + 4 * seen.standard_error + 8


# The exact value.


def test_rank_order_is_teacher_forcing_from_left_to_right(small_network, small_cells):
    """A hand-written loop: one gene after the other, each given all before it."""
    model, cells = small_network(initializer_range=0.2), small_cells()
    scored = model.exact_nll(**cells, order="rank", tokens_per_step=1)
    for cell, n_genes in enumerate((12, 7, 3)):
        ids = cells["input_ids"][cell, : n_genes + 1]
        values = cells["expression_values"][cell, : n_genes + 1]
        factor = cells["size_factors"][cell : cell + 1]
        gene_nats = value_nats = 0.0
        for place in range(1, n_genes + 1):
            is_shown = torch.arange(n_genes + 1) < place
            with torch.no_grad():
                output = model(
                    torch.where(is_shown, ids, MASK)[None],
                    torch.where(is_shown, values, 0.0)[None],
                    output_all_logits=True,
                )
                location, scale = model.predict_value_law(output.last_hidden_state[0, place], ids[place])
            gene_nats -= float(output.logits[0, place].double().log_softmax(0)[ids[place]])
            count = counts_from_values(values[place : place + 1], factor)
            value_nats -= float(count_log_prob(count, factor, location.double()[None], scale.double()[None]))
        assert float(scored.gene_nll[cell]) == pytest.approx(gene_nats, abs=1e-3)
        assert float(scored.value_nll[cell]) == pytest.approx(value_nats, abs=1e-3)
    assert scored.standard_error is None


@pytest.mark.parametrize("order", ["rank", "margin", "entropy"])
@pytest.mark.parametrize("tokens_per_step", [1, 2])
def test_exact_values_are_those_the_sampler_reports(model, order, tokens_per_step):
    """What `generate` says of the path it took, `exact_nll` says of the cell, in the order it was drawn."""
    settings = {"order": order, "tokens_per_step": tokens_per_step}
    made = model.generate(
        n_genes=torch.tensor([6, 9, 2]),
        size_factors=0.05,
        **settings,
        canonicalize=False,
        rank_consistent=False,
    )
    names = ("input_ids", "expression_values", "attention_mask", "size_factors")
    scored = model.exact_nll(**{name: made[name] for name in names}, **settings)
    torch.testing.assert_close(scored.gene_nll, -made.gene_log_prob, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(scored.value_nll, -made.value_log_prob, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("order", ["rank", "margin", "entropy"])
def test_exact_probabilities_add_up_to_one(small_network, order):
    """All 60 cells of three of five genes, values left out."""
    model = small_network(vocab_size=10, value_head="scalar")
    ids = torch.tensor([(2, *genes) for genes in itertools.permutations(range(5, 10), 3)])
    for tokens_per_step in (1, 2, 3):
        scored = model.exact_nll(
            ids,
            torch.zeros(ids.shape),
            order=order,
            tokens_per_step=tokens_per_step,
            genes_only=True,
            batch_size=60,
        )
        # Values of revealed genes are zero in all of them, so that the order sees the genes alone.
        assert float((-scored.gene_nll).exp().sum()) == pytest.approx(1.0, abs=1e-5)


# Bounds by the neighbours' ranking scores.


def test_bounds_of_neighbours_make_genes_and_counts_likelier(model, small_cells, gene_weights, small_network):
    """What cannot be is left out, and the true gene and count always can be: draw by draw no more nats."""
    cells = small_cells((20, 15))
    for score, options in ((model.exact_nll, {"order": "rank"}), (model.compute_nll, {"n_draws": 8})):
        free = score(**cells, **options)
        bound = score(**cells, **options, rank_consistent=True)
        assert (bound.gene_nll < free.gene_nll - 0.1).all()
        assert (bound.value_nll < free.value_nll - 0.1).all()
    scalar = small_network(value_head="scalar")
    for method in (scalar.exact_nll, scalar.compute_nll):
        with pytest.raises(ValueError, match="This network does not know the ranking weights"):
            method(**cells, rank_consistent=True)
        assert method(**cells, rank_consistent=True, ranking_weights=gene_weights).nll.isfinite().all()
        assert method(**cells).nll.isfinite().all()


def bounded_nats(model, cells, mask, weights):
    """(k, 2) nats of the genes and counts that ``mask`` hides in one cell; what fits is found by trying."""
    ids, values = cells["input_ids"][0], cells["expression_values"][0].double()
    factor = cells["size_factors"][:1]
    with torch.no_grad():
        output = model(
            ids.masked_fill(mask, MASK)[None],
            values.float().masked_fill(mask, 0.0)[None],
            is_masked=mask[None],
            output_all_logits=True,
        )
    counts = torch.arange(1, 20_001, dtype=torch.float64)
    lattice, scores = (counts / factor).log1p(), values / weights[ids]
    shown = (~mask).nonzero().flatten()[1:].tolist()
    nats = []
    for place in mask.nonzero().flatten().tolist():
        low = max((float(scores[p]) for p in shown if p > place), default=0.0)
        high = min((float(scores[p]) for p in shown if p < place), default=torch.inf)
        law = output.logits[0, place].double()
        for gene in range(5, 35):
            fits = (lattice >= low * weights[gene] - 1e-6) & (lattice <= high * weights[gene] + 1e-6)
            if not fits.any():
                law[gene] = -torch.inf
        gene = int(ids[place])
        centre, width = model.predict_value_law(output.last_hidden_state[0, place], ids[place])
        masses = count_log_prob(counts, factor.expand(20_000), centre.double(), width.double()).exp().detach()
        fits = (lattice >= low * weights[gene] - 1e-6) & (lattice <= high * weights[gene] + 1e-6)
        share = (
            masses[fits].sum()
            if high < torch.inf
            else 1.0 - masses[lattice < low * weights[gene] - 1e-6].sum()
        )
        count = round(float(values[place].expm1() * factor))
        nats.append((-law.log_softmax(0)[gene], -(masses[count - 1] / share).log()))
    return torch.tensor(nats)


def test_bounded_laws_by_trying_all_counts(small_network, small_cells, gene_weights):
    """Every mask of a cell of four genes, each with its weight in the bound; and the chain from the left."""
    model, cells = small_network(initializer_range=0.2), small_cells((4,), seed=3)
    masks = [(False, *mask) for mask in itertools.product([False, True], repeat=4)][1:]
    nats = {mask: bounded_nats(model, cells, torch.tensor(mask), gene_weights) for mask in masks}
    # L * the mean over k of the mean over the hidden, k from 1 to L = 4.
    bound = sum(
        torch.stack([nats[m].mean(dim=0) for m in masks if sum(m) == k]).mean(dim=0) for k in range(1, 5)
    )
    scored = model.compute_nll(**cells, rank_consistent=True, n_draws=2000, batch_size=2000)
    for found, expected in zip((scored.gene_nll, scored.value_nll), bound.tolist(), strict=True):
        assert abs(float(found) - expected) < 4 * float(scored.standard_error) + 1e-3
    chain = sum(nats[tuple(place > shown for place in range(5))][0] for shown in range(4))
    exact = model.exact_nll(**cells, rank_consistent=True, order="rank", tokens_per_step=1)
    assert float(exact.gene_nll) == pytest.approx(float(chain[0]), abs=1e-3)
    assert float(exact.value_nll) == pytest.approx(float(chain[1]), abs=1e-2)


def test_a_bounded_sampler_reports_what_is_scored(model):
    """In rank order one gene at a time; cells that needed sorting are refused."""
    made = model.generate(
        n_cells=12, n_genes=6, size_factors=0.5, order="rank", tokens_per_step=1, canonicalize=False
    )
    is_sorted = made.order_violations == 0
    assert is_sorted.sum() > 3
    names = ("input_ids", "expression_values", "attention_mask", "size_factors")
    kept = {name: made[name][is_sorted] for name in names}
    scored = model.exact_nll(**kept, order="rank", rank_consistent=True)
    torch.testing.assert_close(scored.gene_nll, -made.gene_log_prob[is_sorted], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(scored.value_nll, -made.value_log_prob[is_sorted], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("method", ["compute_nll", "exact_nll"])
def test_cells_out_of_order_have_no_bounded_likelihood(model, small_cells, method):
    cells = small_cells((9, 6))
    turned = cells["input_ids"].clone(), cells["expression_values"].clone()
    for entries in turned:
        entries[1, 2:5] = entries[1, 2:5].flip(0)
    wrong = cells | dict(zip(("input_ids", "expression_values"), turned, strict=True))
    with pytest.raises(
        ValueError, match=r"Cell 1 is not in ranking order: the gene at position [34] outranks"
    ):
        getattr(model, method)(**wrong, rank_consistent=True)
    assert getattr(model, method)(**wrong).nll.isfinite().all()


# Refusals.


def hidden(cells):
    return cells | {"input_ids": cells["input_ids"].masked_fill(torch.arange(13) == 2, MASK)}


def other_depth(cells):
    return cells | {"size_factors": cells["size_factors"] * 1.37}


def no_molecule(cells):
    values = cells["expression_values"].clone()
    values[1, 2] = 0.0
    return cells | {"expression_values": values}


@pytest.mark.parametrize("method", ["compute_nll", "exact_nll"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (hidden, "3 genes are hidden. Only whole cells have a likelihood"),
        (other_depth, r"do not give whole counts; one gives \d+\.\d+. Pass the library"),
        (no_molecule, "do not give whole counts; one gives 0.000"),
        (
            lambda cells: cells | {"size_factors": None},
            r"size_factors \(molecules .*\) did not come. Pass them",
        ),
        (lambda cells: cells | {"size_factors": torch.ones(2)}, "size_factors must be 3 positive numbers"),
        (lambda cells: cells | {"expression_values": torch.ones(3, 2)}, r"shape of input_ids, \(3, 13\)"),
        (lambda cells: cells | {"input_ids": cells["input_ids"] + 25}, "which is outside the vocabulary"),
        (lambda cells: cells | {"condition_ids": torch.tensor([1])}, "this network was trained without cond"),
    ],
)
def test_cells_that_cannot_be_scored_are_refused(model, small_cells, method, change, message):
    with pytest.raises(ValueError, match=message):
        getattr(model, method)(**change(small_cells()))


def test_values_that_are_no_counts_can_be_scored_by_genes(model, small_cells):
    cells = other_depth(small_cells())
    assert model.compute_nll(**cells, genes_only=True, n_draws=4).nll.isfinite().all()
    assert model.exact_nll(**cells, genes_only=True).nll.isfinite().all()


def test_numbers_that_cannot_be_are_refused(model, small_cells):
    cells = small_cells()
    for n_draws in (1, 0, -3):
        with pytest.raises(
            ValueError, match=f"n_draws must be at least 2, for a standard error, got {n_draws}"
        ):
            model.compute_nll(**cells, n_draws=n_draws)
    for order in ("random", "left"):
        with pytest.raises(ValueError, match=f"rank, margin, entropy, got '{order}'.* compute_nll bounds it"):
            model.exact_nll(**cells, order=order)
