"""FLOPs against a counter, speeds against the clock.

Run: pytest tests/test_training_metrics.py
"""

import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from modeling_scdiva import ScDivaConfig, ScDivaForMaskedDiffusion
from modeling_scdiva.training_metrics import SpeedMeter, train_flops

REPOSITORY = Path(__file__).resolve().parents[1]
N_CELLS, N_POSITIONS, N_QUERIES = 5, 33, 7
NETWORK = {
    "vocab_size": 305, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 80, "max_position_embeddings": 64,
}  # fmt: skip


def make_batch(config):
    """Cells of one length, half of them masked, with what the network reads besides."""
    generator = torch.Generator().manual_seed(0)
    shape = (N_CELLS, N_POSITIONS)
    genes = torch.stack([torch.randperm(300, generator=generator)[: N_POSITIONS - 1] for _ in range(N_CELLS)])
    ids = torch.cat([torch.full((N_CELLS, 1), config.lat_token_id), genes + 5], dim=1)
    is_masked = torch.rand(shape, generator=generator) < 0.5
    is_masked[:, 0] = False
    batch = {
        "input_ids": ids.masked_fill(is_masked, config.mask_token_id),
        "expression_values": torch.rand(shape, generator=generator),
        "is_masked": is_masked,
        "labels": ids.masked_fill(~is_masked, -100),
        "expression_labels": torch.ones(shape).log1p(),
    }
    if config.latent_loss_weight:
        batch["query_ids"] = ids[:, 1 : 1 + N_QUERIES]
        batch["query_labels"], batch["query_log_ratio"] = torch.rand(N_CELLS, N_QUERIES), torch.zeros(N_CELLS)
    if config.conditions:
        batch["condition_ids"] = torch.ones(N_CELLS, len(config.conditions), dtype=torch.long)
    if config.objective == "elbo":
        batch["size_factors"] = torch.ones(N_CELLS)
    return batch


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"value_head": "gene", "exclude_visible_genes": True},
        {"latent_loss_weight": 1.0},
        {"objective": "elbo", "exclude_visible_genes": True},
        {"conditions": {"cell_type": ["B cells", "T cells"], "donor": ["a"]}},
    ],
    ids=["paper", "gene_head", "query_decoder", "elbo", "conditions"],
)
def test_flop_formula_equals_a_counter(changes):
    config = ScDivaConfig(**(NETWORK | changes))
    model = ScDivaForMaskedDiffusion(config)
    model.set_attn_implementation("eager")  # the counter sees plain matrix products only
    batch = make_batch(config)
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    n_masked = int(batch["is_masked"].sum())
    n_queries = N_CELLS * N_QUERIES if config.latent_loss_weight else 0
    formula = train_flops(config, torch.full((N_CELLS,), N_POSITIONS), n_masked, n_queries)
    assert formula == counter.get_total_flops()
    meter = SpeedMeter(config, Accelerator(cpu=True))
    meter.peak = 1.0
    meter.update(batch)
    start = meter._start
    numbers = meter.pop()
    assert numbers["mfu"] == pytest.approx(formula * numbers["cells_per_s"] / N_CELLS)
    assert start < time.perf_counter()


def test_a_full_cell_costs_what_the_documentation_says():
    config = ScDivaConfig.from_json_file(REPOSITORY / "examples" / "configs" / "paper.json")
    gflops = train_flops(config, torch.tensor([1201]), 600) / 1e9
    assert f"{gflops:.0f} GFLOP" in (REPOSITORY / "METHOD.md").read_text("utf-8")


def test_padding_is_no_work():
    config = ScDivaConfig(**(NETWORK | {"latent_loss_weight": 1.0}))
    meter = SpeedMeter(config, Accelerator(cpu=True))
    batch = make_batch(config)
    meter.update(batch)
    alone = meter._flops, meter._tokens
    meter.restart()
    padded = {
        name: torch.nn.functional.pad(batch[name], (0, 9), value=fill)
        for name, fill in (
            ("input_ids", config.pad_token_id),
            ("labels", -100),
            ("query_ids", config.pad_token_id),
        )
    }
    padded["attention_mask"] = (padded["input_ids"] != config.pad_token_id).long()
    meter.update(padded)
    assert (meter._flops, meter._tokens) == alone


def test_speeds_are_those_of_the_clock():
    config = ScDivaConfig(**NETWORK)
    meter = SpeedMeter(config, Accelerator(cpu=True))
    batch = make_batch(config)
    start = time.perf_counter()
    meter.restart()
    for _ in range(3):
        with meter.waiting():
            time.sleep(0.05)
        meter.update(batch)
        time.sleep(0.05)
    numbers = meter.pop()
    elapsed = time.perf_counter() - start
    assert numbers["cells_per_s"] == pytest.approx(3 * N_CELLS / elapsed, rel=0.05)
    assert numbers["tokens_per_s"] == pytest.approx(3 * N_CELLS * N_POSITIONS / elapsed, rel=0.05)
    assert 0.15 / elapsed <= numbers["data_wait_fraction"] + 1e-3 < 0.8
    flops = 3 * train_flops(config, torch.full((N_CELLS,), N_POSITIONS), int(batch["is_masked"].sum()))
    assert numbers["mfu"] == pytest.approx(flops / elapsed / meter.peak, rel=0.05)
