"""The pretraining loop: resume bit for bit, one process equals two, rates, logs, checkpoints, refusals.

Run: pytest tests/test_training.py
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from modeling_scdiva.training import (
    PretrainingArguments,
    evaluate,
    learning_rate_at,
    make_optimizer,
    pretrain,
)
from modeling_scdiva.training_checkpoint import latest_checkpoint
from modeling_scdiva.training_metrics import LossMeter
from tokenization_scdiva import ScDivaTokenizer, corpus_loader

REPOSITORY = Path(__file__).resolve().parents[1]
# What a line of the log says of the cells and the weights, and not of the clock.
EXACT_KEYS = (
    "train_loss",
    "train_gene_loss",
    "train_expression_loss",
    "learning_rate",
    "grad_norm",
    "eval_loss",
)


@pytest.fixture
def make_loader(corpus_folder, tokenizer):
    def make(split, **settings):
        return corpus_loader(
            corpus_folder, split, tokenizer=tokenizer, batch_size=8, depth_corruption="thin", **settings
        )

    return make


@pytest.fixture
def make_model(fresh_tiny_model):
    return fresh_tiny_model


def run(make_model, make_loader, folder, *, n_steps, save_every=0, resume=False, stop_at=None, **settings):
    """Train; with ``stop_at`` the loader breaks down after that many micro-batches, as a kill would."""
    model = make_model()
    train_loader = make_loader("train", num_workers=settings.pop("num_workers", 0))
    if stop_at is not None:
        collate, seen = train_loader.collate_fn, []

        def breaking(batch):
            seen.append(1)
            if len(seen) > stop_at:
                raise KeyboardInterrupt
            return collate(batch)

        breaking.settings = collate.settings
        train_loader.collate_fn = breaking
    arguments = PretrainingArguments(
        n_steps=n_steps, log_every=1, eval_every=5, save_every=save_every, learning_rate=1e-3, **settings
    )
    log = pretrain(
        model,
        train_loader=train_loader,
        eval_loader=make_loader("validation"),
        arguments=arguments,
        accelerator=Accelerator(cpu=True),
        output_dir=folder,
        resume=resume,
    )
    return model, log


def exact(log):
    return [{key: line[key] for key in EXACT_KEYS if key in line} | {"step": line["step"]} for line in log]


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_accumulation_steps": 2, "ema_decay": 0.9}],
    ids=["plain", "accumulation_and_ema"],
)
def test_resume_equals_an_uninterrupted_run_bit_for_bit(make_model, make_loader, tmp_path, settings):
    # 24 batches an epoch: step 15 lies inside an epoch, 36 steps reach into the next one. Dropout is on.
    whole, whole_log = run(make_model, make_loader, tmp_path / "whole", n_steps=36, save_every=15, **settings)
    n_micro = settings.get("gradient_accumulation_steps", 1)
    with pytest.raises(KeyboardInterrupt):
        run(
            make_model,
            make_loader,
            tmp_path / "parts",
            n_steps=36,
            save_every=15,
            stop_at=20 * n_micro,
            **settings,
        )
    assert latest_checkpoint(tmp_path / "parts").name == "checkpoint-00000015"
    parts, parts_log = run(
        make_model, make_loader, tmp_path / "parts", n_steps=36, save_every=15, resume=True, **settings
    )
    assert exact(parts_log) == exact(whole_log)
    for (name, expected), found in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(expected, found), name
    saved = [load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "parts")]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


def test_inside_autocast_the_new_weights_are_used(make_model, make_loader, tmp_path):
    _, plain = run(make_model, make_loader, tmp_path / "plain", n_steps=12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, inside = run(make_model, make_loader, tmp_path / "inside", n_steps=12)
    losses = [[line["eval_loss"] for line in log if "eval_loss" in line] for log in (plain, inside)]
    assert losses[0][-1] < 0.9 * losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)  # bfloat16 is that close


def test_loader_workers_change_nothing(make_model, make_loader, tmp_path):
    _, alone = run(make_model, make_loader, tmp_path / "alone", n_steps=6)
    _, helped = run(make_model, make_loader, tmp_path / "helped", n_steps=6, num_workers=2)
    assert exact(alone) == exact(helped)


def test_training_lowers_the_held_out_loss(make_model, make_loader, tmp_path):
    untrained = evaluate(make_model(), make_loader("validation"), accelerator=Accelerator(cpu=True))
    _, log = run(make_model, make_loader, tmp_path, n_steps=60)
    trained = [line for line in log if "eval_loss" in line][-1]
    assert trained["eval_gene_loss"] < untrained["eval_gene_loss"] - 0.1
    assert trained["eval_expression_loss"] < 0.5 * untrained["eval_expression_loss"]
    # Fixed masks: the same weights give the same number again.
    assert untrained == evaluate(make_model(), make_loader("validation"), accelerator=Accelerator(cpu=True))


def test_two_processes_equal_one_with_the_same_global_batch(corpus_folder, fresh_tiny_model, tmp_path):
    network = fresh_tiny_model().config.to_diff_dict()
    fields = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "value_head")
    config = {field: network[field] for field in fields} | {"hidden_dropout": 0.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ["--corpus", corpus_folder, "--config", tmp_path / "config.json", "--batch_size", "8",
                 "--n_steps", "5", "--log_every", "1", "--save_every", "0", "--eval_every", "0"]  # fmt: skip
    script = [REPOSITORY / "examples" / "pretrain.py", *arguments]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    runs = [
        subprocess.Popen(
            [str(part) for part in [*launcher, *script, "--output_dir", tmp_path / name]],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for name, launcher in (("one", [sys.executable]), ("two", torchrun))
    ]  # fmt: skip
    outputs = [process.communicate(timeout=240)[0] for process in runs]
    assert [process.returncode for process in runs] == [0, 0], "\n".join(outputs)
    assert "on 2 x cpu" in outputs[1]
    logs = [
        [json.loads(line) for line in (tmp_path / name / "training_log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert len(logs[0]) == len(logs[1]) == 7
    for one, two in zip(*logs, strict=True):
        for key in ("train_loss", "train_gene_loss", "eval_loss", "n_cells_seen", "eval_n_cells"):
            assert (key in one) == (key in two)
            if key in one:
                assert two[key] == pytest.approx(one[key], abs=1e-5), (one["step"], key)


def test_learning_rate_rises_then_follows_a_cosine():
    arguments = PretrainingArguments(n_steps=100, learning_rate=1.0, warmup_fraction=0.1)
    rates = [learning_rate_at(step, arguments) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)  # half way between the peak and its tenth
    assert rates[99] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 89 / 90)))


def test_only_matrices_decay(make_model):
    model = make_model()
    decayed, others = (
        group["params"] for group in make_optimizer(model, PretrainingArguments(n_steps=1)).param_groups
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert len(decayed) + len(others) == len(names)
    assert all(parameter.ndim >= 2 for parameter in decayed)
    assert "model.embed_tokens.weight" in {names[id(parameter)] for parameter in others}
    assert "lm_head.weight" in {names[id(parameter)] for parameter in decayed}


def test_time_bins_hold_the_means_of_their_cells():
    class Outputs:
        loss = torch.tensor(3.0)
        cell_gene_loss = torch.tensor([1.0, 2.0, 6.0])
        cell_expression_loss = torch.tensor([0.1, 0.2, 0.3])
        cell_latent_loss = torch.tensor([0.4, 0.6, 0.8])

    meter = LossMeter(Accelerator(cpu=True))
    meter.update(Outputs(), torch.tensor([0.05, 0.1, 1.0]))  # 0.1 belongs to the first bin, (0, 0.1]
    numbers = meter.pop("eval")
    assert numbers["eval_gene_loss_t0"] == pytest.approx(1.5)
    assert numbers["eval_gene_loss_t9"] == pytest.approx(6.0)
    assert "eval_gene_loss_t5" not in numbers
    assert numbers["eval_gene_loss"] == pytest.approx(3.0)
    assert numbers["eval_latent_loss_t0"] == pytest.approx(0.5)
    assert numbers["eval_latent_loss"] == pytest.approx(0.6)
    assert numbers["eval_n_cells"] == 3
    assert meter.pop("eval")["eval_gene_loss"] == 0.0


def test_checkpoints_rotate_by_step_number(make_model, make_loader, tmp_path):
    run(make_model, make_loader, tmp_path, n_steps=12, save_every=3, keep_checkpoints=2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-00000009",
        "checkpoint-00000012",
    ]
    assert not list(tmp_path.glob(".*partial"))


def test_an_earlier_run_is_not_overwritten(make_model, make_loader, tmp_path):
    run(make_model, make_loader, tmp_path, n_steps=2)
    with pytest.raises(FileExistsError, match=r"holds checkpoint-00000002 of an earlier run\. Pass resume"):
        run(make_model, make_loader, tmp_path, n_steps=2)


def test_a_checkpoint_without_its_optimiser_is_refused(make_model, make_loader, tmp_path):
    run(make_model, make_loader, tmp_path, n_steps=2)
    (tmp_path / "checkpoint-00000002" / "optimizer.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks optimizer\.safetensors"):
        run(make_model, make_loader, tmp_path, n_steps=2, resume=True)


def test_moments_of_another_model_are_refused(make_model, make_loader, tmp_path):
    run(make_model, make_loader, tmp_path, n_steps=2)
    path = tmp_path / "checkpoint-00000002" / "optimizer.safetensors"
    moments = load_file(path)
    moments.pop("lm_head.weight/exp_avg")
    save_file(moments, path)
    with pytest.raises(ValueError, match=r"no exp_avg of lm_head\.weight: it belongs to another model"):
        run(make_model, make_loader, tmp_path, n_steps=2, resume=True)


def test_weights_of_another_network_are_refused(make_model, make_loader, tmp_path):
    run(make_model, make_loader, tmp_path, n_steps=2)
    with pytest.raises(ValueError, match="does not fit the model of this run"):
        run(lambda: make_model(num_hidden_layers=3), make_loader, tmp_path, n_steps=2, resume=True)


def test_a_gradient_that_is_not_finite_stops_the_run(make_model, make_loader, tmp_path):
    def spoilt():
        model = make_model()
        model.lm_head.weight.data[7] = math.nan
        return model

    with pytest.raises(FloatingPointError, match="gradient of step 1 is nan"):
        run(spoilt, make_loader, tmp_path, n_steps=2)
    assert latest_checkpoint(tmp_path) is None


def test_the_gene_query_decoder_learns_and_is_never_left_random(fresh_tiny_model, make_loader, tmp_path):
    def with_decoder():
        return fresh_tiny_model(latent_loss_weight=1.0)

    def asking(split, **settings):
        return make_loader(split, n_gene_queries=32, **settings)

    _, log = run(with_decoder, asking, tmp_path / "asked", n_steps=60)
    held_out = [line["eval_latent_loss"] for line in log if "eval_latent_loss" in line]
    assert held_out[-1] < held_out[0] - 1.0
    assert {"train_latent_loss", "train_gene_loss"} <= set(log[1])
    with pytest.raises(ValueError, match=r"asks for no genes: it would stay random\. Load with n_gene"):
        run(with_decoder, make_loader, tmp_path / "idle", n_steps=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_steps": 0}, "n_steps must be at least 1, got 0"),
        ({"n_steps": 1, "warmup_fraction": 1.5}, r"warmup_fraction must lie in \[0, 1\], got 1.5"),
        ({"n_steps": 1, "save_every": 15}, r"save_every \(15\) must be a multiple of log_every \(10\)"),
    ],
)
def test_arguments_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PretrainingArguments(**settings)


def test_a_tokenizer_with_longer_cells_than_the_network_is_refused(fresh_tiny_model):
    with pytest.raises(ValueError, match=r"max_genes=48 genes .* has 40 positions"):
        fresh_tiny_model(max_position_embeddings=40)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 5}, r"seed 0 -> 5"),
        ({"ema_decay": 0.9}, r"ema_decay 0\.0 -> 0\.9"),
        ({"n_steps": 9}, r"n_steps 4 -> 9"),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(make_model, make_loader, tmp_path, changes, message):
    run(make_model, make_loader, tmp_path, n_steps=4, save_every=2)
    with pytest.raises(
        ValueError, match=rf"checkpoint-00000004 is of a run with other settings \({message}\)"
    ):
        run(make_model, make_loader, tmp_path, resume=True, **({"n_steps": 4, "save_every": 2} | changes))


def test_a_run_is_not_resumed_on_other_batches_or_masks(make_model, corpus_folder, tokenizer, tmp_path):
    def train(**settings):
        loader = corpus_loader(corpus_folder, "train", tokenizer=tokenizer, **({"batch_size": 8} | settings))
        pretrain(
            make_model(), train_loader=loader, eval_loader=None, arguments=PretrainingArguments(n_steps=2),
            accelerator=Accelerator(cpu=True), output_dir=tmp_path, resume=True,
        )  # fmt: skip

    train()
    with pytest.raises(ValueError, match=r"batch_size 8 -> 4"):
        train(batch_size=4)
    with pytest.raises(ValueError, match=r"corruption_masking_target joint -> gene"):
        train(masking_target="gene")


def test_every_saved_folder_has_its_tokenizer(make_model, make_loader, tokenizer, tmp_path):
    pretrain(
        make_model(), train_loader=make_loader("train"), eval_loader=None,
        arguments=PretrainingArguments(n_steps=2), accelerator=Accelerator(cpu=True), output_dir=tmp_path,
        on_save=tokenizer.save_pretrained,
    )  # fmt: skip
    for folder in (tmp_path, tmp_path / "checkpoint-00000002"):
        assert ScDivaTokenizer.from_pretrained(folder).ranking_settings == tokenizer.ranking_settings


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("_mixed_precision", "fp16", "mixed_precision='fp16' needs loss scaling"),
        (
            "distributed_type",
            DistributedType.DEEPSPEED,
            "DEEPSPEED is not supported",
        ),
    ],
)
def test_unsupported_launches_are_refused(
    make_model, make_loader, tmp_path, monkeypatch, entry, value, message
):
    accelerator = Accelerator(cpu=True)
    monkeypatch.setitem(AcceleratorState._shared_state, entry, value)
    with pytest.raises(ValueError, match=message):
        pretrain(
            make_model(), train_loader=make_loader("train"), eval_loader=None,
            arguments=PretrainingArguments(n_steps=2), accelerator=accelerator, output_dir=tmp_path,
        )  # fmt: skip


def test_held_out_masks_depend_on_nothing_but_the_corpus(corpus_folder, tokenizer):
    def times(**settings):
        loader = corpus_loader(corpus_folder, "validation", tokenizer=tokenizer, **settings)
        return torch.cat([batch["timestep"] for batch in loader])

    expected = times(batch_size=16)
    for settings in ({"batch_size": 4}, {"batch_size": 64}, {"batch_size": 16, "seed": 7}):
        assert torch.equal(times(**settings), expected)
