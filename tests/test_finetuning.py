"""Fine-tuning loop: what is seen, what is kept, when it stops.

Scope: `finetuning`. Run: pytest tests/test_finetuning.py
"""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DistributedType
from torch import nn

from modeling_scdiva.finetuning import FinetuningArguments, finetune

N, WIDTH = 50, 3
FEATURES = torch.from_numpy(np.random.default_rng(0).normal(size=(N, WIDTH)).astype(np.float32))
TARGETS = FEATURES @ torch.tensor([1.0, -2.0, 0.5])


class Line(nn.Module):
    """A linear model that remembers the rows it was shown."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, 1, bias=False)
        self.frozen = nn.Linear(WIDTH, 1)
        self.frozen.requires_grad_(False)
        self.dropout = nn.Dropout(0.2)
        nn.init.zeros_(self.layer.weight)

    def forward(self, rows):
        predicted = self.layer(self.dropout(FEATURES[rows])).squeeze(1)
        loss = (predicted - TARGETS[rows]).square().mean()
        return {"loss": loss, "other_loss": 2 * loss.detach(), "no_loss": None, "rows": rows}


def run(model, **changes):
    shown = []

    def make_batch(rows, epoch):
        shown.append((epoch, rows))
        return {"rows": torch.from_numpy(rows)}

    validate = changes.pop("validate", None)
    settings = {"n_epochs": 4, "batch_size": 8, "learning_rate": 0.05, "weight_decay": 0.0}
    history = finetune(
        model,
        n_examples=N,
        make_batch=make_batch,
        arguments=FinetuningArguments(**(settings | changes)),
        validate=validate,
        show_progress=False,
    )
    return history, shown


def test_every_epoch_shows_every_example_once_in_a_new_order():
    _, shown = run(Line())
    orders = [np.concatenate([rows for at, rows in shown if at == epoch]) for epoch in range(4)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(N))
    assert not np.array_equal(orders[0], orders[1])


def test_it_learns_and_logs_means_over_the_examples():
    history, _ = run(Line(), n_epochs=40)
    assert [line["epoch"] for line in history] == list(range(1, 41))
    assert history[-1]["loss"] < 0.2 * history[0]["loss"]
    assert history[0]["other_loss"] == pytest.approx(2 * history[0]["loss"])
    assert set(history[0]) == {"epoch", "loss", "other_loss"}


def test_inside_autocast_the_new_weights_are_used():
    inside, outside = Line(), Line()
    plain = outside.forward
    outside.forward = torch.autocast("cpu", dtype=torch.bfloat16)(plain)  # a context of its own per call
    expected, _ = run(outside)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = run(inside)
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-6)
    torch.testing.assert_close(inside.layer.weight, outside.layer.weight)


def test_the_same_seed_gives_the_same_weights_whatever_ran_before():
    models = [Line(), Line(), Line()]
    for model, seed in zip(models, (3, 3, 4), strict=True):
        torch.rand(7)  # the state of the global generator must not matter
        run(model, seed=seed)
    assert torch.equal(models[0].layer.weight, models[1].layer.weight)
    assert not torch.equal(models[0].layer.weight, models[2].layer.weight)


def test_frozen_weights_stay_bit_for_bit():
    model = Line()
    before = model.frozen.weight.clone()
    run(model)
    assert torch.equal(model.frozen.weight, before)


def test_the_best_epoch_is_restored_and_patience_ends_the_run():
    model, scores, weights = Line(), iter([0.1, 0.7, 0.5, 0.7, 0.6, 0.9]), []

    def validate():
        weights.append(model.layer.weight.detach().clone())
        return next(scores)

    history, _ = run(model, n_epochs=6, patience=3, validate=validate)
    assert [line["score"] for line in history] == [0.1, 0.7, 0.5, 0.7, 0.6]  # a tie is not better
    assert torch.equal(model.layer.weight, weights[1])


def test_the_rate_rises_and_falls(monkeypatch):
    rates, step = [], torch.optim.AdamW.step

    def watch(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    run(Line(), n_epochs=4, batch_size=10, warmup_fraction=0.2, learning_rate=0.1)  # 20 steps, 4 of warm-up
    assert rates[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert rates[4] == pytest.approx(0.1)
    assert rates[-1] == pytest.approx(0.1 / 16)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[4:]))


def test_a_broken_gradient_stops_before_the_weights_are_spoilt():
    class Broken(Line):
        def forward(self, rows):
            return {"loss": self.layer.weight.sum() * math.inf}

    model = Broken()
    with pytest.raises(FloatingPointError, match="Lower the learning rate"):
        run(model)
    assert torch.isfinite(model.layer.weight).all()


def test_global_generators_stay_as_they_were():
    model = Line()
    before = torch.random.get_rng_state()
    run(model)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_score_that_is_not_finite_is_refused():
    with pytest.raises(FloatingPointError, match="The validation score is nan: no epoch can be chosen"):
        run(Line(), validate=lambda: math.nan)


TWO_PROCESSES = """
import json, os, sys, runpy
from pathlib import Path
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
found = runpy.run_path(sys.argv[1])["divided"](accelerator)
# Lines that two processes print may run into each other.
Path(__file__).with_name(f"found_{accelerator.process_index}.json").write_text(json.dumps(found))
accelerator.wait_for_everyone()
accelerator.end_training()
os._exit(0)  # gloo's threads abort the interpreter's exit now and then; what is tested is written
"""


def divided(accelerator):
    """Train with a last batch of one row, a head that is never used and, per process, another score."""
    model = Line()
    model.dropout = nn.Identity()
    model.unused = nn.Linear(2, 2)
    scores = iter([0.5, 0.9, 0.4, 0.3, 0.2]) if accelerator.is_main_process else itertools.count(1.0)
    history = finetune(
        model,
        n_examples=N - 1,
        make_batch=lambda rows, epoch: {"rows": torch.from_numpy(rows)},
        arguments=FinetuningArguments(n_epochs=5, batch_size=16, learning_rate=0.05, patience=2),
        accelerator=accelerator,
        validate=lambda: next(scores),
        show_progress=False,
    )
    return [len(history), history[-1]["loss"], *model.layer.weight.flatten().tolist()]


def test_two_processes_train_the_same_and_stop_together(tmp_path):
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    command = [*torchrun, str(tmp_path / "two.py"), __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    expected = divided(Accelerator(cpu=True))
    assert expected[0] == 4  # the second epoch was best, patience 2
    for process in range(2):
        found = json.loads((tmp_path / f"found_{process}.json").read_text("utf-8"))
        assert found == pytest.approx(expected, abs=1e-6)


def test_launches_that_are_not_supported_are_refused():
    accelerator = Accelerator(cpu=True)
    accelerator.state._mixed_precision = "fp16"
    try:
        with pytest.raises(ValueError, match="mixed_precision='fp16' needs loss scaling"):
            divided(accelerator)
    finally:
        accelerator.state._mixed_precision = "no"


def test_sharded_launches_are_refused_also_where_accelerate_drops_the_setting(monkeypatch):
    accelerator = Accelerator(cpu=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setitem(accelerator.state._shared_state, "distributed_type", DistributedType.MULTI_CPU)
    with pytest.raises(ValueError, match="FSDP is not supported in fine-tuning: whole weights are kept"):
        divided(accelerator)


def test_nothing_to_train_is_an_error():
    model = Line()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="Nothing to train: 50 examples, 0 trainable tensors"):
        run(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_epochs": 0}, "n_epochs must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"warmup_fraction": 1.5}, "warmup_fraction must lie in"),
        ({"patience": -1}, "patience must not be negative"),
    ],
)
def test_impossible_numbers_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        FinetuningArguments(**changes)
