"""The quality head: what is judged, what is learned, what changes, and re-masking by it.

Needs: both packages; no files but the made-up corpus, no GPU.
Run: python -m pytest tests/test_quality.py
"""

import itertools

import pytest
import torch
from sklearn.metrics import roc_auc_score

from modeling_scdiva import ScDivaForMaskedDiffusion
from modeling_scdiva.quality import QualityArguments, judged_draws, train_quality_head, with_quality_head
from tokenization_scdiva import corpus_loader

MASK, IGNORED = 1, -100


@pytest.fixture
def judge(small_network):
    """A network of 30 genes whose head tells cells apart."""
    model = small_network(quality_head=True)
    torch.nn.init.normal_(model.quality_head.weight, generator=torch.Generator().manual_seed(1))
    return model


def masked(cells, is_hidden):
    """A training batch of cells with some genes hidden."""
    labels = cells["input_ids"].where(is_hidden, IGNORED)
    return cells | {
        "input_ids": cells["input_ids"].masked_fill(is_hidden, MASK),
        "expression_values": cells["expression_values"].masked_fill(is_hidden, 0.0),
        "labels": labels,
    }


def batches_of_few_genes(seed):
    """Cells of the same 6 of 30 genes, half of them hidden: what else is drawn cannot be right."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        genes = torch.stack([torch.randperm(6, generator=generator) for _ in range(24)]) + 5
        ids = torch.cat([torch.full((24, 1), 2), genes], dim=1)
        is_hidden = torch.rand(ids.shape, generator=generator) < 0.5
        is_hidden[:, 0], is_hidden[:, 1] = False, True
        values = torch.linspace(4.0, 3.0, 7).repeat(24, 1)
        yield masked({"input_ids": ids, "expression_values": values}, is_hidden)


# --- what is judged ---


def fitting_genes(judge, cells, cell, place, n_genes):
    """(genes,) bool: some count gives a score between those of the two neighbours."""
    weights = judge.value_head.gene_weights
    scores = cells["expression_values"][cell] / weights[cells["input_ids"][cell]]
    highest = scores[place - 1] if place > 1 else torch.inf
    lowest = scores[place + 1] if place < n_genes else 0.0
    values = (torch.arange(1, 2000) / cells["size_factors"][cell]).log1p()
    possible = values[:, None] / weights[None, 5:]
    return ((possible <= highest * (1 + 1e-6)) & (possible >= lowest * (1 - 1e-6))).any(dim=0)


def test_labels_and_judgements_by_hand(judge, small_cells):
    """One gene of each cell is hidden, and the law of genes leaves no choice."""
    cells = small_cells((12, 9, 7, 5), seed=3)
    favour = torch.randperm(30, generator=torch.Generator().manual_seed(4)).float() * 1e4
    favour[cells["input_ids"][0, 3] - 5] = 31e4  # the one that the first cell hides
    with torch.no_grad():
        judge.lm_head.bias[5:] = favour
    is_hidden = torch.zeros_like(cells["input_ids"], dtype=torch.bool)
    true, drawn = [], []
    for cell, (n_genes, place) in enumerate(((12, 3), (9, 2), (7, 5), (5, 4))):
        is_hidden[cell, place] = True
        true.append(int(cells["input_ids"][cell, place]))
        left = favour.clone()
        for other in range(1, n_genes + 1):
            if other != place:  # a visible gene is never drawn
                left[cells["input_ids"][cell, other] - 5] = -1.0
        fits = fitting_genes(judge, cells, cell, place, n_genes)  # nor one without a count for this rank
        drawn.append(5 + int(left.masked_fill(~fits, -2.0).argmax()))
    batch = masked(cells, is_hidden)
    logits, is_right = judged_draws(judge, batch, QualityArguments())
    assert is_right.tolist() == [one == other for one, other in zip(true, drawn, strict=True)]
    assert 0 < is_right.sum() < 4
    # The head reads the state of the drawn gene in the filled cell, at one of the few counts it can have.
    found = []
    for count in range(1, 400):
        filled = dict(batch)
        values = (count / cells["size_factors"]).log1p().float()
        filled["input_ids"] = batch["input_ids"].masked_scatter(is_hidden, torch.tensor(drawn))
        filled["expression_values"] = batch["expression_values"].masked_scatter(is_hidden, values)
        with torch.no_grad():
            names = ("input_ids", "expression_values", "attention_mask")
            states = judge.model(**{name: filled[name] for name in names}).last_hidden_state
            found.append(judge.predict_quality(states[is_hidden]))
    distance = (torch.stack(found) - logits.detach()).abs()
    assert (distance.min(dim=0).values < 1e-4).all()
    assert (distance.median(dim=0).values > 1e-3).all()


@pytest.mark.parametrize("fraction", [0.01, 0.25, 1.0])
def test_a_share_of_the_hidden_genes_is_filled(judge, small_cells, fraction):
    cells = small_cells((12, 7, 3))
    is_hidden = (cells["input_ids"] > 4) & (torch.arange(13) % 2 == 1)
    arguments = QualityArguments(filled_fraction=fraction)
    logits, is_right = judged_draws(judge, masked(cells, is_hidden), arguments)
    wanted = {0.01: 1 + 1 + 1, 0.25: 2 + 1 + 1, 1.0: 6 + 4 + 2}[fraction]
    assert logits.shape == is_right.shape == (wanted,)
    assert logits.dtype == torch.float32
    assert is_right.dtype == torch.bool


def test_draws_follow_seed_and_step_alone(judge, small_cells):
    cells = small_cells((12, 9, 7, 5))
    batch = masked(cells, (cells["input_ids"] > 4) & (torch.arange(13) % 3 > 0))
    judge.train()
    torch.manual_seed(7)
    first, _ = judged_draws(judge, batch, QualityArguments(seed=2), step=4)
    assert judge.training
    again, _ = judged_draws(judge.eval(), batch, QualityArguments(seed=2), step=4)
    assert torch.equal(first, again)
    for arguments, step in ((QualityArguments(seed=3), 4), (QualityArguments(seed=2), 5)):
        assert not torch.equal(first, judged_draws(judge, batch, arguments, step=step)[0])


# --- what is learned ---


def test_the_head_learns_which_genes_do_not_belong(small_network):
    # A random network, whose states tell genes apart; most of what it draws is none of the six.
    network = {"hidden_size": 32, "initializer_range": 0.1, "normalize_embeddings": True}
    model = with_quality_head(small_network(**network))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    arguments = QualityArguments(n_steps=150, learning_rate=0.02, seed=1)
    losses = train_quality_head(model, batches_of_few_genes(0), arguments=arguments)
    assert len(losses) == 150
    assert sum(losses[-20:]) < 0.6 * sum(losses[:20])
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {"quality_head.weight", "quality_head.bias"}
    assert {name for name, weight in model.named_parameters() if weight.grad is not None} == changed
    judged = [
        judged_draws(model, batch, QualityArguments(seed=9), step=step)
        for step, batch in enumerate(itertools.islice(batches_of_few_genes(5), 20))
    ]
    logits, is_right = (torch.cat(parts).detach() for parts in zip(*judged, strict=True))
    assert is_right.sum() > 10
    assert roc_auc_score(is_right, logits) > 0.85


@pytest.mark.parametrize("conditions", [None, {"cell_type": ["type_0", "type_1", "type_2", "type_3"]}])
@pytest.mark.parametrize("objective", ["paper", "elbo"])
def test_the_batches_of_training_are_taken(fresh_tiny_model, tokenizer, corpus_folder, objective, conditions):
    loader = corpus_loader(
        corpus_folder,
        "train",
        tokenizer=tokenizer,
        batch_size=16,
        objective=objective,
        conditions=conditions,
    )
    model = with_quality_head(fresh_tiny_model(objective=objective, conditions=conditions))
    losses = train_quality_head(model, loader, arguments=QualityArguments(n_steps=8, learning_rate=0.03))
    assert all(0 < loss < 2 for loss in losses)
    assert losses[-1] < losses[0]


def test_a_batch_without_hidden_genes_is_no_step(small_network):
    batches = list(itertools.islice(batches_of_few_genes(0), 3))
    empty = batches[0] | {"labels": torch.full_like(batches[0]["labels"], -100)}
    hidden = empty["input_ids"] == MASK
    empty["input_ids"] = torch.where(hidden, batches[0]["labels"], empty["input_ids"])
    arguments = QualityArguments(n_steps=2)
    judges = [with_quality_head(small_network()) for _ in range(2)]
    losses = train_quality_head(judges[0], [empty, *batches], arguments=arguments)
    assert len(losses) == 2
    assert all(0 < loss < 2 for loss in losses)
    with pytest.raises(ValueError, match="ended after 0 of 2 steps"):
        train_quality_head(judges[1], [empty, empty], arguments=arguments)


# --- what changes ---


def test_a_copy_with_a_head_is_the_same_network(fresh_tiny_model, small_cells):
    model = fresh_tiny_model(hidden_dropout=0.5, conditions={"donor": ["a", "b"]}).eval()
    model.generation_config = model.generation_config.updated(steps=3, order="rank")
    state = torch.get_rng_state()
    twin = with_quality_head(model, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert twin.config.quality_head
    assert not model.config.quality_head
    assert model.quality_head is None
    assert twin.generation_config.to_dict() == model.generation_config.to_dict()
    assert not twin.training
    cells = small_cells()
    inputs = {name: cells[name] for name in ("input_ids", "expression_values", "attention_mask")}
    with torch.no_grad():
        first, second = (network(**inputs, output_all_logits=True) for network in (model, twin))
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.expression_predictions, second.expression_predictions)
    with torch.no_grad():
        twin.model.norm.weight.zero_()
    assert model.model.norm.weight.any()  # a copy, no view
    heads = [with_quality_head(model, seed=seed).quality_head.weight for seed in (4, 4, 5)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_a_copy_of_half_precision_keeps_its_frequencies(small_network, small_cells, tmp_path):
    small_network().save_pretrained(tmp_path)
    model = ScDivaForMaskedDiffusion.from_pretrained(tmp_path, dtype=torch.bfloat16)
    twin = with_quality_head(model)
    assert twin.dtype == torch.bfloat16
    assert twin.quality_head.weight.dtype == torch.float32
    assert twin.predict_quality(torch.zeros(2, 3, model.config.hidden_size, dtype=torch.bfloat16)).shape == (
        2,
        3,
    )
    for (name, one), (other_name, other) in zip(model.named_buffers(), twin.named_buffers(), strict=True):
        assert name == other_name
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    cells = small_cells()
    inputs = {name: cells[name] for name in ("input_ids", "expression_values", "attention_mask")}
    with torch.no_grad():
        first, second = (network(**inputs, output_all_logits=True).logits for network in (model, twin))
    assert torch.equal(first, second)


def test_the_head_is_saved_and_loaded(judge, small_network, tmp_path):
    judge.save_pretrained(tmp_path)
    loaded = ScDivaForMaskedDiffusion.from_pretrained(tmp_path)
    states = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.predict_quality(states), judge.predict_quality(states))
    assert loaded.config.quality_head
    with pytest.raises(ValueError, match="This model has no quality head"):
        small_network().predict_quality(states)


# --- re-masking ---


def test_generation_hides_what_the_head_calls_wrong(judge, small_network):
    options = {"n_cells": 6, "n_genes": 12, "steps": 12, "remask_rate": 0.4}
    by_quality = judge.generate(remask="quality", **options)
    for made in (by_quality, judge.generate(remask="random", **options)):
        assert (made.input_ids[:, 1:] > 4).all()
        assert all(len(set(cell)) == 13 for cell in made.input_ids.tolist())
    assert not torch.equal(by_quality.input_ids, made.input_ids)
    with torch.no_grad():
        judge.quality_head.weight.neg_()
    assert not torch.equal(judge.generate(remask="quality", **options).input_ids, by_quality.input_ids)
    with pytest.raises(
        ValueError, match=r'no quality head. Train one .*, or re-mask at random: remask="random"'
    ):
        small_network().generate(remask="quality", **options)


# --- refusals ---


@pytest.mark.parametrize(
    "changes",
    [{"n_steps": 0}, {"learning_rate": 0.0}, {"filled_fraction": 0.0}, {"filled_fraction": 1.1}],
)
def test_run_numbers_that_cannot_be_are_refused(changes):
    with pytest.raises(ValueError, match=r"n_steps must be at least 1, .* filled_fraction in \(0, 1\], got"):
        QualityArguments(**changes)


def test_what_cannot_be_trained_is_refused(judge, small_network, small_cells):
    cells = small_cells()
    batch = masked(cells, cells["input_ids"] > 20)
    with pytest.raises(ValueError, match="This model has a quality head already"):
        with_quality_head(judge)
    with pytest.raises(ValueError, match=r"no quality head. Give it one by with_quality_head"):
        train_quality_head(small_network(), [batch])
    with pytest.raises(ValueError, match=r"The batches ended after 2 of 3 steps. Repeat the loader"):
        train_quality_head(judge, [batch, batch], arguments=QualityArguments(n_steps=3))
