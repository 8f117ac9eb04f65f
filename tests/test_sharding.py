"""Sharded training: two processes equal one, checkpoints go from sharded to plain runs and back, refusals.

The two processes are started with this file as their script, once, and once more for the slow tests.
Run: pytest tests/test_sharding.py
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator, DistributedType
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from modeling_scdiva import ScDivaForMaskedDiffusion
from modeling_scdiva.fresh_model import fresh_model
from modeling_scdiva.hardware import has_bf16
from modeling_scdiva.sharding import sharding_settings
from modeling_scdiva.training import PretrainingArguments, pretrain
from modeling_scdiva.training_checkpoint import latest_checkpoint
from tokenization_scdiva import ScDivaTokenizer, corpus_loader

REPOSITORY = Path(__file__).resolve().parents[1]
FSDP2 = REPOSITORY / "examples" / "accelerate" / "fsdp2.yaml"
NETWORK = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 64, "hidden_dropout": 0.0, "exclude_visible_genes": True,
    "value_head": "gene", "latent_loss_weight": 1.0,
}  # fmt: skip
N_STEPS, N_MICRO = 6, 2
LOSSES = ("train_loss", "train_gene_loss", "train_latent_loss", "eval_loss", "eval_n_cells", "n_cells_seen")


def train(corpus, folder, *, resume=False, mixed_precision=None, **settings):
    """Train a little network."""
    accelerator = Accelerator(mixed_precision=mixed_precision)
    tokenizer = ScDivaTokenizer.from_pretrained(corpus / "tokenizer")
    process = (accelerator.process_index, accelerator.num_processes)
    loaders = {
        split: corpus_loader(
            corpus, split, tokenizer=tokenizer, batch_size=8, process=process, n_gene_queries=16
        )
        for split in ("train", "validation")
    }
    model = fresh_model(NETWORK, tokenizer)
    if settings.pop("gradient_checkpointing", False):
        model.gradient_checkpointing_enable()
    arguments = PretrainingArguments(
        n_steps=N_STEPS, gradient_accumulation_steps=N_MICRO, log_every=1, eval_every=3, save_every=2,
        learning_rate=1e-3, max_grad_norm=0.5, **({"ema_decay": 0.5} | settings),
    )  # fmt: skip
    log = pretrain(
        model, train_loader=loaders["train"], eval_loader=loaders["validation"], arguments=arguments,
        accelerator=accelerator, output_dir=folder, resume=resume,
    )  # fmt: skip
    return model, log, accelerator


def killed_at_step_five(whole, folder):
    """Leave of a finished run what a kill after the fifth step would: the log is ahead of the checkpoint."""
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoint-00000006")
    (folder / "model.safetensors").unlink()
    assert latest_checkpoint(folder).name == "checkpoint-00000004"


def work(corpus, folder):
    """What each process does: a whole run, one in two parts, one taken over from a single process."""
    model, _, accelerator = train(corpus, folder / "whole")
    report = {
        "n_units": sum(isinstance(module, FSDPModule) for module in model.modules()),
        "n_sharded": sum(isinstance(parameter, DTensor) for parameter in model.parameters()),
        "n_parameters": sum(1 for _ in model.parameters()),
        "n_here": sum(parameter.to_local().numel() for parameter in model.parameters()),
        "n_all": sum(parameter.numel() for parameter in model.parameters()),
    }
    (folder / f"report{accelerator.process_index}.json").write_text(json.dumps(report))
    del model
    if accelerator.is_main_process:
        killed_at_step_five(folder / "whole", folder / "parts")
    accelerator.wait_for_everyone()
    train(corpus, folder / "parts", resume=True)
    train(corpus, folder / "taken_over", resume=True)
    accelerator.end_training()


def work_on_variants(corpus, folder):
    """The whole run in other ways."""
    _, _, accelerator = train(corpus, folder / "checkpointing", gradient_checkpointing=True, ema_decay=0.0)
    # As on GPUs, where Accelerate itself says that the run is sharded.
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    for name in (DistributedType.FSDP, DistributedType.MULTI_CPU):
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = name
        if name == DistributedType.FSDP:
            train(corpus, folder / "as_on_gpus")
    if has_bf16(accelerator.device):
        AcceleratorState._reset_state()
        accelerator = train(corpus, folder / "bf16", mixed_precision="bf16")[2]
    accelerator.end_training()


def lines(folder):
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def launch_environment(*changes):
    """What accelerate launch tells its processes."""
    words = [*changes, "--config_file", str(FSDP2), "examples/pretrain.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    environment = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in environment.items() if name.startswith(("FSDP_", "ACCELERATE_"))}


def in_two_processes(work_of_each, corpus, folder):
    environment = os.environ | launch_environment() | {
        "ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1",
        "NUMBA_NUM_THREADS": "1",
    }  # fmt: skip
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*torchrun, __file__, work_of_each.__name__, str(corpus), str(folder)],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Sharding the network over 2 processes (FSDP2)." in done.stdout


@pytest.fixture(scope="module")
def runs(corpus_folder, tmp_path_factory):
    """Folder of the runs of two sharded processes, beside ``plain``, the same run of this process."""
    folder = tmp_path_factory.mktemp("runs")
    train(corpus_folder, folder / "plain")
    killed_at_step_five(folder / "plain", folder / "taken_over")
    in_two_processes(work, corpus_folder, folder)
    return folder


@pytest.fixture(scope="module")
def variants(corpus_folder, tmp_path_factory):
    """Folder of further runs of two sharded processes."""
    folder = tmp_path_factory.mktemp("variants")
    in_two_processes(work_on_variants, corpus_folder, folder)
    return folder


def test_each_process_holds_its_share(runs):
    reports = [json.loads((runs / f"report{rank}.json").read_text()) for rank in range(2)]
    for report in reports:
        assert report["n_units"] == NETWORK["num_hidden_layers"] + 1
        assert report["n_sharded"] == report["n_parameters"]
        assert report["n_here"] == pytest.approx(report["n_all"] / 2, rel=0.01)
    assert sum(report["n_here"] for report in reports) == reports[0]["n_all"]


def test_two_sharded_processes_equal_one(runs):
    plain, sharded = lines(runs / "plain"), lines(runs / "whole")
    assert len(plain) == len(sharded) == N_STEPS + 3
    assert plain[0]["eval_n_cells"] % 8 == 1  # one of the two processes has no cell of the last batch
    assert max(line["grad_norm"] for line in plain if "grad_norm" in line) > 0.5  # the clip is at work
    for one, two in zip(plain, sharded, strict=True):
        for key in LOSSES:
            assert (key in one) == (key in two)
            if key in one:
                assert two[key] == pytest.approx(one[key], rel=2e-7, abs=1e-5), (one["step"], key)
        if "grad_norm" in one:
            assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)


def test_a_resume_equals_an_uninterrupted_run_bit_for_bit(runs):
    kept = [{key: line[key] for key in LOSSES if key in line} for line in lines(runs / "whole")]
    assert [{key: line[key] for key in LOSSES if key in line} for line in lines(runs / "parts")] == kept
    whole, parts = (load_file(runs / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_checkpoints_go_from_one_process_to_two_and_back(runs, corpus_folder, tmp_path):
    expected = lines(runs / "plain")[-1]["eval_loss"]
    assert lines(runs / "taken_over")[-1]["eval_loss"] == pytest.approx(expected, abs=1e-5)
    killed_at_step_five(runs / "whole", tmp_path / "back")
    _, log, _ = train(corpus_folder, tmp_path / "back", resume=True)
    assert log[-1]["eval_loss"] == pytest.approx(expected, abs=1e-5)


def test_the_saved_model_is_whole_and_nothing_is_pickled(runs):
    sharded, plain = (ScDivaForMaskedDiffusion.from_pretrained(runs / name) for name in ("whole", "plain"))
    for (name, found), expected in zip(
        sharded.state_dict().items(), plain.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4, msg=name)
    assert sharded.config.architectures == ["ScDivaForMaskedDiffusion"]
    endings = {path.suffix for path in (runs / "whole").rglob("*") if path.is_file()}
    assert endings <= {".safetensors", ".json", ".jsonl", ".py"}


@pytest.mark.slow
def test_on_gpus_the_same_is_done(runs, variants):
    one, two = (load_file(run / "model.safetensors") for run in (runs / "whole", variants / "as_on_gpus"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(runs, variants):
    pairs = zip(lines(runs / "whole"), lines(variants / "checkpointing"), strict=True)
    losses = [(one["train_loss"], two["train_loss"]) for one, two in pairs if "train_loss" in one]
    assert len(losses) == N_STEPS
    for one, two in losses:
        assert two == pytest.approx(one, rel=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not has_bf16(torch.device("cpu")), reason="this CPU has no bf16")
def test_bf16_computes_like_float32_and_keeps_float32_weights(runs, variants):
    for one, two in zip(lines(runs / "whole"), lines(variants / "bf16"), strict=True):
        for key in ("train_loss", "eval_loss"):
            assert (key in one) == (key in two)
            if key in one:
                assert two[key] == pytest.approx(one[key], rel=5e-3)
                assert two[key] != one[key]
    saved = load_file(variants / "bf16" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_the_config_file_is_what_the_launcher_reads(monkeypatch):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # the plugin writes it
    environment = launch_environment()
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    assert sharding_settings(launched_on_gpus(plugin)) is plugin
    stored = yaml.safe_load(FSDP2.read_text())["fsdp_config"]
    for name, value in stored.items():
        assert environment[name.upper()] == str(value).lower()


def launched_on_gpus(plugin):
    return SimpleNamespace(
        distributed_type=DistributedType.FSDP,
        state=SimpleNamespace(fsdp_plugin=plugin),
        parallelism_config=None,
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fsdp_version": 1}, "needs fsdp_version: 2"),
        ({"cpu_offload": True}, "needs fsdp_offload_params: false"),
        ({"activation_checkpointing": True}, r"needs fsdp_activation_checkpointing: false \(pass --gradient"),
        ({"cpu_ram_efficient_loading": True}, "needs fsdp_cpu_ram_efficient_loading: false"),
    ],
)
def test_settings_that_are_not_built_are_refused(settings, message, monkeypatch):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # the plugin writes it
    plugin = FullyShardedDataParallelPlugin(**({"fsdp_version": 2} | settings))
    with pytest.raises(ValueError, match=message):
        sharding_settings(launched_on_gpus(plugin))


def test_one_process_is_not_sharded():
    assert sharding_settings(Accelerator(cpu=True)) is None


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"work": work, "work_on_variants": work_on_variants}[sys.argv[1]](*map(Path, sys.argv[2:]))
