"""The variational bound as a training objective: what the collator masks and weights, and the loss by hand.

Run: pytest tests/test_objective_elbo.py
"""

import itertools

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from huggingface_hub.errors import StrictDataclassError

from modeling_scdiva import ScDivaConfig
from modeling_scdiva.bound_scdiva import masked_nats
from modeling_scdiva.denoiser_scdiva import ScDivaDenoiser
from modeling_scdiva.training import PretrainingArguments, pretrain
from modeling_scdiva.unmask_scdiva import CellState
from tokenization_scdiva import CellCorpus, ScDivaDataCollator, corpus_loader
from tokenization_scdiva.corpus import CellBatch, CellDraw
from tokenization_scdiva.ranking_scdiva import FlatCells, normalise_counts

VOCAB_SIZE, LAT, MASK, PAD, TARGET_SUM, MEAN = 200, 2, 1, 0, 1e4, 20.0
CHI_SQUARE_P001 = {9: 27.9, 19: 43.8}  # degrees of freedom -> 99.9 % quantile


def collator(**settings):
    defaults = {
        "ranking_weights": np.ones(VOCAB_SIZE), "max_genes": 64, "target_sum": TARGET_SUM,
        "gene_order": "entropy", "lat_token_id": LAT, "mask_token_id": MASK, "pad_token_id": PAD,
        "depth_corruption": "none", "objective": "elbo", "mean_n_genes": MEAN,
    }  # fmt: skip
    return ScDivaDataCollator(**(defaults | settings))


def make_batch(lengths, *, epochs=None, n_strata=1, seed=0):
    """Cells in ranking order, by equal weights; one in ten molecules lies outside the vocabulary."""
    rng = np.random.default_rng(seed)
    lengths = np.asarray(lengths)
    counts = [np.sort(rng.geometric(0.3, n))[::-1].astype(np.int32) for n in lengths]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.concatenate([np.sort(rng.permutation(np.arange(5, VOCAB_SIZE))[:n]) for n in lengths])
    flat = np.concatenate(counts)
    library = np.array([np.ceil(1.1 * c.sum()) for c in counts])
    values = normalise_counts(flat, np.repeat(library, lengths), TARGET_SUM)
    cells = FlatCells(offsets, tokens.astype(np.int32), values, flat, library)
    epochs = np.zeros(len(lengths), int) if epochs is None else epochs
    draws = [CellDraw(i, int(e), i % n_strata, n_strata) for i, e in enumerate(epochs)]
    is_measured = np.arange(VOCAB_SIZE)[None] >= 5
    return CellBatch(cells, np.array(draws, dtype=np.int64), np.zeros(len(lengths), np.int64), is_measured)


def n_hidden_of(inputs):
    return inputs["is_masked"].sum(dim=1)


def by_hand(location, scale, counts, factors):
    """Nats of counts from differences of the distribution function, in float64, from the nearer tail."""

    def standard(count):
        return ((count / factors).log1p() - location.double()) / scale.double()

    lower, upper = standard(counts.double() - 0.5), standard(counts.double() + 0.5)
    inside = torch.where(
        lower > 0, (-lower).sigmoid() - (-upper).sigmoid(), upper.sigmoid() - lower.sigmoid()
    )
    return -(inside / (-standard(torch.full_like(upper, 0.5))).sigmoid()).log()


# The collator.


def test_exactly_k_genes_are_hidden_and_the_time_says_so():
    batch = make_batch([30, 7, 1, 64, 90], n_strata=5)
    inputs = collator()(batch)
    lengths = torch.tensor([30, 7, 1, 64, 64])
    n_hidden = n_hidden_of(inputs)
    assert ((n_hidden >= 1) & (n_hidden <= lengths)).all()
    torch.testing.assert_close(inputs["timestep"], n_hidden / lengths)
    strata = torch.arange(5)
    assert (n_hidden >= torch.ceil(strata / 5 * lengths)).all()
    assert (n_hidden <= torch.ceil((strata + 1) / 5 * lengths)).all()
    assert torch.equal(inputs["is_masked"], inputs["labels"] != -100)
    assert torch.equal(inputs["is_masked"], inputs["input_ids"] == MASK)
    assert not inputs["is_masked"][:, 0].any()
    assert not inputs["expression_values"][inputs["is_masked"]].any()
    is_pad = torch.arange(65) > lengths[:, None]
    assert not inputs["is_masked"][is_pad].any()


@pytest.mark.parametrize("n_strata", [1, 20])
def test_the_number_hidden_is_uniform(n_strata):
    length, n_cells = 20, 4000
    inputs = collator()(make_batch([length] * n_cells, n_strata=n_strata))
    seen = torch.bincount(n_hidden_of(inputs), minlength=length + 1).double()
    assert seen[0] == 0
    if n_strata == length:
        assert (seen[1:] == n_cells / length).all()  # a stratum is one number
    else:
        expected = n_cells / length
        assert float(((seen[1:] - expected) ** 2 / expected).sum()) < CHI_SQUARE_P001[length - 1]


def test_every_set_of_k_genes_is_as_likely():
    """Ten pairs of five places."""
    inputs = collator()(make_batch([5] * 20_000))
    masks = inputs["is_masked"][n_hidden_of(inputs) == 2][:, 1:]
    patterns = (masks * 2 ** torch.arange(5)).sum(dim=1)
    seen = torch.bincount(patterns, minlength=32).double()
    seen = seen[seen > 0]
    assert len(seen) == 10
    assert float(((seen - seen.mean()) ** 2 / seen.mean()).sum()) < CHI_SQUARE_P001[9]


@pytest.mark.parametrize("depth_corruption", ["none", "scale", "thin"])
def test_factors_and_weights_are_those_of_the_clean_and_the_seen_cell(depth_corruption):
    batch = make_batch([30, 12, 90], n_strata=3)
    inputs = collator(depth_corruption=depth_corruption, depth_probability=1.0, depth_range=(0.3, 0.3))(batch)
    assert inputs["size_factors"].dtype == inputs["loss_weight"].dtype == torch.float32
    np.testing.assert_allclose(inputs["size_factors"], batch.cells.library_size / TARGET_SUM, rtol=1e-6)
    is_gene = inputs["input_ids"] > LAT
    is_gene |= inputs["is_masked"]
    lengths = is_gene.sum(dim=1)
    if depth_corruption == "thin":
        assert (lengths < torch.tensor([30, 12, 65])).all()
    else:
        assert lengths.tolist() == [30, 12, 64]  # after the cut
    torch.testing.assert_close(inputs["loss_weight"], (lengths / MEAN).float())
    # Targets are whole counts of the clean cell, whatever the network sees.
    counts = inputs["expression_labels"].double().expm1() * inputs["size_factors"].double()[:, None]
    for row in range(3):
        entries = slice(*batch.cells.offsets[row : row + 2])
        clean = dict(zip(batch.cells.token_ids[entries], batch.cells.counts[entries], strict=True))
        genes = torch.where(inputs["labels"] == -100, inputs["input_ids"], inputs["labels"])[row][
            is_gene[row]
        ]
        wanted = [clean[int(gene)] for gene in genes]
        np.testing.assert_allclose(counts[row][is_gene[row]], wanted, rtol=1e-4)


def test_the_corruption_is_the_cells_own():
    batch = make_batch([30, 12, 50, 7, 64])
    whole = collator()(batch)
    for rows in ([2], [4, 1]):
        cells = batch.cells
        entries = np.concatenate([np.arange(cells.offsets[r], cells.offsets[r + 1]) for r in rows])
        offsets = np.concatenate([[0], np.cumsum(cells.n_genes[rows])])
        flat = (entry[entries] for entry in (cells.token_ids, cells.values, cells.counts))
        part = batch._replace(
            cells=FlatCells(offsets, *flat, cells.library_size[rows]),
            draws=batch.draws[rows],
            dataset_ids=batch.dataset_ids[rows],
        )
        found = collator()(part)
        for place, row in enumerate(rows):
            n = int(cells.n_genes[row]) + 1
            for name in ("input_ids", "labels", "is_masked", "expression_values"):
                assert torch.equal(found[name][place, :n], whole[name][row, :n])
            for name in ("timestep", "size_factors", "loss_weight"):
                assert found[name][place] == whole[name][row]


def test_the_paper_objective_has_no_parts_of_the_bound():
    inputs = collator(objective="paper", mean_n_genes=0.0)(make_batch([30, 7]))
    assert not {"size_factors", "loss_weight"} & set(inputs)


def test_a_run_is_resumed_with_the_same_objective_only():
    assert collator().settings["corruption_objective"] == "elbo"
    assert collator(objective="paper").settings != collator().settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "nelbo"}, "objective must be one of paper, elbo, got 'nelbo'"),
        (
            {"masking_target": "gene"},
            "needs masking_target='joint' and the mean_n_genes .*, got 'gene' and 20.0",
        ),
        ({"masking_target": "expression"}, "got 'expression'"),
        ({"mean_n_genes": 0.0}, "got 'joint' and 0.0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        collator(**settings)


def test_values_that_are_no_counts_are_refused():
    batch = make_batch([30, 7])
    log1p = batch._replace(cells=batch.cells._replace(counts=None, library_size=None))
    with pytest.raises(ValueError, match="is a likelihood of counts and needs a corpus of them; use 'paper'"):
        collator()(log1p)


def test_the_loader_knows_the_mean_length(corpus_folder, tokenizer):
    for split in ("train", "validation"):
        loader = corpus_loader(corpus_folder, split, tokenizer=tokenizer, batch_size=16, objective="elbo")
        n_genes = CellCorpus(corpus_folder, split, ranking_settings=tokenizer.ranking_settings).n_genes
        mean = np.minimum(n_genes, tokenizer.max_genes).mean()
        assert loader.collate_fn.mean_n_genes == pytest.approx(mean)
        weights = torch.cat([batch["loss_weight"] for batch in loader])
        if split == "validation":  # every cell once, depth as it is
            assert float(weights.mean()) == pytest.approx(1.0, abs=1e-5)


# The loss.


def hidden_inputs(cells, n_hidden=(5, 7, 1)):
    """The cells of `small_cells` with their first k genes hidden."""
    ids, values = cells["input_ids"], cells["expression_values"]
    places = torch.arange(ids.shape[1])
    is_masked = (places >= 1) & (places <= torch.tensor(n_hidden)[:, None])
    return {
        "input_ids": ids.masked_fill(is_masked, MASK),
        "expression_values": values.masked_fill(is_masked, 0.0),
        "attention_mask": cells["attention_mask"],
        "is_masked": is_masked,
        "labels": ids.masked_fill(~is_masked, -100),
        "expression_labels": values,
        "size_factors": cells["size_factors"],
    }


@pytest.mark.parametrize("value_head", ["scalar", "gene"])
def test_loss_by_hand(small_network, small_cells, value_head):
    model, cells = small_network(value_head=value_head, initializer_range=0.15), small_cells()
    inputs, weight = hidden_inputs(cells), torch.tensor([2.0, 0.5, 1.5])
    output = model(**inputs, loss_weight=weight, output_all_logits=True)
    genes, counts = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for cell, k in enumerate((5, 7, 1)):
        here = slice(1, k + 1)
        ids, values = cells["input_ids"][cell, here], cells["expression_values"][cell, here].double()
        nats = output.logits[cell, here].double().log_softmax(dim=1)
        assert nats[:, cells["input_ids"][cell, k + 1 :]].isneginf().all()  # visible genes are left out
        genes[cell] = -nats.gather(1, ids.unsqueeze(1)).mean()
        factors = cells["size_factors"][cell]
        location, scale = model.predict_value_law(output.last_hidden_state[cell, here], ids)
        molecules = (values.expm1() * factors).round()
        counts[cell] = by_hand(location.detach(), scale.detach(), molecules, factors).mean()
    torch.testing.assert_close(output.cell_gene_loss.double(), genes, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.cell_expression_loss.double(), counts, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(output.gene_loss.double(), (weight * genes).mean(), atol=1e-4, rtol=1e-4)
    # Nats and nats: no weight between them.
    torch.testing.assert_close(output.loss.double(), (weight * (genes + counts)).mean(), atol=1e-3, rtol=1e-3)
    plain = model(**inputs)
    torch.testing.assert_close(plain.loss.double(), (genes + counts).mean(), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(plain.cell_gene_loss, output.cell_gene_loss)


def test_weights_belong_to_the_bound_alone(small_network, small_cells):
    model = small_network(latent_loss_weight=0.7)
    queries = {
        "query_ids": torch.tensor([[7, 9], [8, 10], [5, 6]]),
        "query_labels": torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]),
        "query_log_ratio": torch.zeros(3),
    }
    weight = torch.tensor([2.0, 0.5, 1.5])
    output = model(**hidden_inputs(small_cells()), **queries, loss_weight=weight)
    torch.testing.assert_close(output.latent_loss, output.cell_latent_loss.mean())
    total = output.gene_loss + output.expression_loss + 0.7 * output.latent_loss
    torch.testing.assert_close(output.loss, total)


def test_loss_does_not_depend_on_padding_or_neighbours(small_network, small_cells):
    model, inputs = small_network(), hidden_inputs(small_cells())
    together = model(**inputs)
    for cell, n_genes in enumerate((12, 7, 3)):
        alone = {
            name: tensor[cell : cell + 1, : n_genes + 1] if tensor.ndim == 2 else tensor[cell : cell + 1]
            for name, tensor in inputs.items()
        }
        output = model(**alone)
        for name in ("cell_gene_loss", "cell_expression_loss"):
            torch.testing.assert_close(output[name][0], together[name][cell], atol=1e-4, rtol=1e-4)


def test_expected_weighted_loss_is_the_bound(small_network, small_cells):
    """Second form of the bound: genes revealed one by one, averaged over all 24 orders of four genes."""
    model, cells = small_network(initializer_range=0.15), small_cells((4,))
    ids, values, factor = cells["input_ids"], cells["expression_values"], cells["size_factors"]
    masks = torch.tensor([(False, *m) for m in itertools.product([False, True], repeat=4)])
    with torch.no_grad():
        output = model(
            ids.masked_fill(masks, MASK), values.masked_fill(masks, 0.0), is_masked=masks,
            labels=ids.masked_fill(~masks, -100), expression_labels=values.expand(16, 5),
            size_factors=factor.expand(16), output_all_logits=True,
        )  # fmt: skip
        nats = -output.logits.double().log_softmax(dim=2).gather(2, ids.expand(16, 5).unsqueeze(2)).squeeze(2)
        location, scale = model.predict_value_law(output.last_hidden_state, ids.expand(16, 5))
    molecules = (values.double().expm1() * factor).round().expand(16, 5)
    nats += by_hand(location, scale, molecules, factor)
    row_of = {tuple(mask.tolist()): row for row, mask in enumerate(masks)}
    bound = 0.0
    for order in itertools.permutations(range(1, 5)):
        for turn, place in enumerate(order):
            still_hidden = tuple(p in order[turn:] for p in range(5))
            bound += float(nats[row_of[still_hidden], place]) / 24
    cell_loss = (output.cell_gene_loss + output.cell_expression_loss).double()
    n_hidden = masks.sum(dim=1)
    by_number = torch.stack([cell_loss[n_hidden == k].mean() for k in range(1, 5)]).mean()
    assert float(4 * by_number) == pytest.approx(bound, rel=1e-4)
    assert_collator_is_unbiased(model, cells, bound)


def assert_collator_is_unbiased(model, cells, bound):
    """Thousands of corruptions of the one cell: weight times loss, times the mean length, is the bound."""
    n_draws, n_genes = 3000, 4
    tokens, values = (cells[name][0, 1:].numpy() for name in ("input_ids", "expression_values"))
    library = float(cells["size_factors"] * TARGET_SUM)
    counts = np.rint(np.expm1(values.astype(np.float64)) * library / TARGET_SUM).astype(np.int32)
    batch = make_batch([n_genes] * n_draws, epochs=range(n_draws))
    same = FlatCells(
        batch.cells.offsets,
        np.tile(tokens, n_draws).astype(np.int32),
        np.tile(values, n_draws),
        np.tile(counts, n_draws),
        np.full(n_draws, library),
    )
    inputs = collator()(batch._replace(cells=same))
    del inputs["timestep"]
    with torch.no_grad():
        output = model(**inputs)
    estimates = MEAN * inputs["loss_weight"] * (output.cell_gene_loss + output.cell_expression_loss)
    error = float(estimates.std()) / n_draws**0.5
    assert abs(float(estimates.mean()) - bound) < 4 * error
    assert float(output.loss) * MEAN == pytest.approx(float(estimates.mean()), rel=1e-5)


@pytest.mark.parametrize("value_head", ["scalar", "gene"])
def test_gradient_reaches_every_parameter(small_network, small_cells, value_head):
    model = small_network(
        value_head=value_head, conditions={"type": ["a", "b"]}, latent_loss_weight=1.0
    ).train()
    queries = {"query_ids": torch.tensor([[7, 9]] * 3), "query_labels": torch.tensor([[1.0, 0.0]] * 3)}
    given = {"condition_ids": torch.tensor([[0], [1], [2]]), "loss_weight": torch.tensor([0.5, 1.0, 2.0])}
    model(**hidden_inputs(small_cells()), **queries, **given, query_log_ratio=torch.zeros(3)).loss.backward()
    unreached = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert unreached == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("shift", [-60.0, 60.0])
def test_laws_far_from_the_counts_have_finite_losses_and_gradients(small_network, small_cells, shift):
    """Centres near zero or far above, widths at their floor, one molecule and a hundred thousand."""
    model, cells = small_network().train(), small_cells()
    with torch.no_grad():
        model.value_head.out_proj.bias += torch.tensor([shift, -60.0])
    inputs = hidden_inputs(cells)
    inputs["expression_labels"][:, 1] = (
        (torch.tensor([1.0, 1.0, 1e5]) / cells["size_factors"]).log1p().float()
    )
    output = model(**inputs)
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_half_precision_works(small_network, small_cells):
    model, inputs = small_network(), hidden_inputs(small_cells())
    expected = model(**inputs).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**inputs).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, atol=0.3, rtol=0.1)


def test_parts_that_are_missing_are_named(small_network, small_cells):
    model, inputs = small_network(), hidden_inputs(small_cells())
    del inputs["size_factors"]
    with pytest.raises(ValueError, match='objective="elbo" is a likelihood of counts and needs size_factors'):
        model(**inputs)
    del inputs["expression_labels"]
    assert model(**inputs).loss == model(**inputs).gene_loss
    with pytest.raises(StrictDataclassError, match=r"set\s+exclude_visible_genes=True, got False"):
        ScDivaConfig(objective="elbo")


def test_training_lowers_the_bound(fresh_tiny_model, corpus_folder, tokenizer, tmp_path):
    def loader(split):
        settings = {"depth_corruption": "thin", "objective": "elbo"}
        return corpus_loader(corpus_folder, split, tokenizer=tokenizer, batch_size=8, **settings)

    log = pretrain(
        fresh_tiny_model(objective="elbo"),
        train_loader=loader("train"),
        eval_loader=loader("validation"),
        arguments=PretrainingArguments(n_steps=40, log_every=10, eval_every=40, learning_rate=2e-3),
        accelerator=Accelerator(cpu=True),
        output_dir=tmp_path,
    )
    before, after = (line for line in log if "eval_loss" in line)
    assert after["eval_gene_loss"] < before["eval_gene_loss"] - 0.1
    assert after["eval_expression_loss"] < before["eval_expression_loss"] - 0.1
    assert after["eval_loss"] < before["eval_loss"] - 0.3


# Without the genes that cannot stand between their neighbours.


def in_order(small_cells, lengths=(12, 7, 3)):
    """Every second gene hidden, so that most slots lie between two visible ones."""
    cells = small_cells(lengths)
    inputs = hidden_inputs(cells, n_hidden=lengths)
    is_masked = inputs["is_masked"] & (torch.arange(1 + max(lengths)) % 2 == 0)
    ids = cells["input_ids"]
    return inputs | {
        "input_ids": ids.masked_fill(is_masked, MASK),
        "expression_values": cells["expression_values"].masked_fill(is_masked, 0.0),
        "is_masked": is_masked,
        "labels": ids.masked_fill(~is_masked, -100),
    }


def test_loss_without_unfit_genes_is_the_bounded_likelihood(small_network, small_cells):
    """Second implementation: `masked_nats`, which scores the same slots for `compute_nll`."""
    model = small_network(exclude_unfit_genes=True, initializer_range=0.2)
    cells, inputs = small_cells(), in_order(small_cells)
    output = model(**inputs)
    clean = CellState(
        cells["input_ids"], cells["expression_values"], cells["attention_mask"].bool(),
        torch.zeros(cells["input_ids"].shape, dtype=torch.bool), size_factors=cells["size_factors"],
    )  # fmt: skip
    denoiser = ScDivaDenoiser(model, ranking_weights=model.value_head.gene_weights.double())
    with torch.no_grad():
        genes, counts, (rows, _) = masked_nats(clean, inputs["is_masked"], denoiser, rank_consistent=True)
    for found, nats in ((output.cell_gene_loss, genes), (output.cell_expression_loss, counts)):
        means = [nats[rows == cell].mean() for cell in range(3)]
        torch.testing.assert_close(found.double(), torch.stack(means), atol=1e-3, rtol=1e-3)
    plain = small_network(initializer_range=0.2)(**inputs)
    assert (output.cell_gene_loss <= plain.cell_gene_loss + 1e-5).all()
    assert (output.cell_expression_loss <= plain.cell_expression_loss + 1e-4).all()
    assert output.loss < plain.loss - 0.1
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_what_unfit_genes_need_is_refused(
    small_network, small_cells, fresh_tiny_model, corpus_folder, tokenizer, tmp_path
):
    inputs = in_order(small_cells)
    del inputs["size_factors"]
    with pytest.raises(
        ValueError, match="exclude_unfit_genes needs input_ids, expression_values and size_fac"
    ):
        small_network(exclude_unfit_genes=True)(**inputs)
    for changes in ({"objective": "paper"}, {"value_head": "scalar"}):
        with pytest.raises(StrictDataclassError, match="set objective='elbo' and value_head='gene', got"):
            small_network(exclude_unfit_genes=True, **changes)
    loader = corpus_loader(corpus_folder, "train", tokenizer=tokenizer, batch_size=8, objective="elbo")
    with pytest.raises(ValueError, match=r"Set depth_corruption='none', got 'scale'"):
        pretrain(
            fresh_tiny_model(objective="elbo", exclude_unfit_genes=True), train_loader=loader,
            eval_loader=None, arguments=PretrainingArguments(n_steps=1), accelerator=Accelerator(cpu=True),
            output_dir=tmp_path,
        )  # fmt: skip


def test_a_corpus_has_no_unfit_genes_of_its_own(fresh_tiny_model, corpus_folder, tokenizer):
    """Real rounding: no true gene of any cell and mask is called impossible."""
    model = fresh_tiny_model(objective="elbo", exclude_unfit_genes=True).eval()
    for split in ("train", "validation"):
        loader = corpus_loader(
            corpus_folder,
            split,
            tokenizer=tokenizer,
            batch_size=32,
            objective="elbo",
            depth_corruption="none",
        )
        for inputs in loader:
            del inputs["timestep"]
            with torch.no_grad():
                output = model(**inputs)  # refuses labels of probability zero
            assert output.cell_expression_loss.isfinite().all()
