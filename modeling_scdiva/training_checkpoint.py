"""Checkpoints of a pretraining run: safetensors and JSON, whole or not there at all.

A checkpoint is a folder `checkpoint-00000500` with the model as `save_pretrained` writes it, the optimiser's
moments by parameter name, the average weights if there are any, and the counters. It is written under another
name, flushed to disk and renamed, so a kill at any moment leaves the old checkpoints or the new one, never
half of one.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import PreTrainedModel

from modeling_scdiva.sharding import placed_like, whole_tensors

PROGRESS_FILE = "progress.json"
OPTIMIZER_FILE = "optimizer.safetensors"
AVERAGE_FILE = "average.safetensors"
WEIGHTS_FILE = "model.safetensors"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class Progress:
    """How far a run has come; with the weights and moments, all that a resume needs.

    Attributes:
        step: Optimiser updates done.
        epoch: Current epoch, from 0.
        next_batch: Global micro-batches of this epoch already consumed.
        n_cells: Cells seen, over all processes.
    """

    step: int = 0
    epoch: int = 0
    next_batch: int = 0
    n_cells: int = 0


def latest_checkpoint(output_dir: Path) -> Path | None:
    """Find the newest whole checkpoint, by step number.

    Args:
        output_dir: Folder of the run.

    Returns:
        Its folder, or None.
    """
    found = [path for path in _checkpoints(output_dir) if (path / PROGRESS_FILE).exists()]
    return found[-1] if found else None


@dataclass
class RunState:
    """Whole tensors of a run on the CPU, name -> tensor; empty in all processes but the main one.

    Attributes:
        weights: Of the model in training.
        moments: Of its optimiser, ``parameter/moment``.
        averages: Average weights; None for a run without.
    """

    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    averages: dict[str, torch.Tensor] | None


def gather_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: AveragedModel | None,
    accelerator: Accelerator,
) -> RunState:
    """Gather what a checkpoint holds in the main process; every process has to call this.

    Args:
        model: Model in training, sharded or not.
        optimizer: Its optimiser.
        average: Its average weights, if any.
        accelerator: Knows the main process.

    Returns:
        The tensors.
    """
    moments = {
        f"{name}/{moment}": optimizer.state[parameter][moment]
        for name, parameter in model.named_parameters()
        for moment in MOMENTS
        if parameter in optimizer.state
    }
    return RunState(
        whole_tensors(model.state_dict(keep_vars=True), accelerator),
        whole_tensors(moments, accelerator),
        None if average is None else whole_tensors(average.state_dict(keep_vars=True), accelerator),
    )


def save_checkpoint(
    output_dir: Path,
    model: PreTrainedModel,
    state: RunState,
    progress: Progress,
    *,
    settings: Mapping[str, Any],
    keep: int,
    on_save: Callable[[Path], Any] | None = None,
) -> Path:
    """Write a checkpoint and delete the oldest ones; for the main process.

    Args:
        output_dir: Folder of the run.
        model: Model in training, for its configuration.
        state: Its tensors and those of its optimiser.
        progress: Counters.
        settings: What decides the numbers of the run.
        keep: Checkpoints that stay.
        on_save: Called with the folder while it is being written.

    Returns:
        The new folder.
    """
    folder = output_dir / f"checkpoint-{progress.step:08d}"
    partial = output_dir / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, state_dict=state.weights)
    if on_save is not None:
        on_save(partial)
    save_file(state.moments, partial / OPTIMIZER_FILE)
    if state.averages is not None:
        save_file(state.averages, partial / AVERAGE_FILE)
    stored = {"progress": asdict(progress), "settings": dict(settings)}
    (partial / PROGRESS_FILE).write_text(json.dumps(stored, indent=1), "utf-8")
    for path in [*partial.iterdir(), partial]:
        flush_to_disk(path)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    flush_to_disk(output_dir)
    for old in _checkpoints(output_dir)[:-keep]:
        shutil.rmtree(old)
    return folder


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: AveragedModel | None
) -> Progress:
    """Load a checkpoint into a run that was set up with the same settings.

    Args:
        folder: Checkpoint.
        model: Gets the weights; sharded or not.
        optimizer: Gets the moments.
        average: Gets the average weights, if the run keeps any.

    Returns:
        Counters.

    Raises:
        FileNotFoundError: If a part is missing; training never goes on with a fresh optimiser in silence.
        ValueError: If a part does not fit the model.
    """
    needed = [WEIGHTS_FILE, OPTIMIZER_FILE, PROGRESS_FILE] + ([AVERAGE_FILE] if average is not None else [])
    missing = [name for name in needed if not (folder / name).exists()]
    if missing:
        msg = f"{folder} lacks {', '.join(missing)}. Delete this checkpoint to resume from the one before it."
        raise FileNotFoundError(msg)
    _load_strictly(model, load_file(folder / WEIGHTS_FILE), folder / WEIGHTS_FILE)
    if average is not None:
        _load_strictly(average, load_file(folder / AVERAGE_FILE), folder / AVERAGE_FILE)
    moments = load_file(folder / OPTIMIZER_FILE)
    for name, parameter in model.named_parameters():
        lacking = [moment for moment in MOMENTS if f"{name}/{moment}" not in moments]
        if lacking:
            msg = f"{folder / OPTIMIZER_FILE} has no {lacking[0]} of {name}: it belongs to another model."
            raise ValueError(msg)
        optimizer.state[parameter] = {
            # The fused update wants its step counter, a single number, beside the parameter.
            moment: placed_like(moments[f"{name}/{moment}"], parameter)
            if moment != "step"
            else moments[f"{name}/{moment}"].to(parameter.device)
            for moment in MOMENTS
        }
    return Progress(**_stored(folder)["progress"])


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to resume a run with other settings.

    Args:
        folder: Checkpoint.
        settings: Of the run that is to go on.

    Raises:
        ValueError: If any setting differs; the message names all that do.
    """
    stored = _stored(folder)["settings"]
    names = sorted({*stored, *settings})
    differing = [name for name in names if stored.get(name) != settings.get(name)]
    if differing:
        details = ", ".join(f"{name} {stored.get(name)} -> {settings.get(name)}" for name in differing)
        msg = (
            f"{folder} is of a run with other settings ({details}). Resume with those it was started with, "
            "or start a new run in another folder."
        )
        raise ValueError(msg)


def _stored(folder: Path) -> dict[str, Any]:
    return json.loads((folder / PROGRESS_FILE).read_text("utf-8"))


def _load_strictly(model: nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    own = model.state_dict()
    placed = {
        name: placed_like(tensor, own[name]) if name in own else tensor for name, tensor in weights.items()
    }
    try:
        model.load_state_dict(placed, strict=True)
    except RuntimeError as error:
        msg = f"{path} does not fit the model of this run (another --config?): {error}"
        raise ValueError(msg) from error


def _checkpoints(output_dir: Path) -> list[Path]:
    if not output_dir.exists():
        return []
    found = [path for path in output_dir.iterdir() if re.fullmatch(r"checkpoint-\d{8}", path.name)]
    return sorted(found)


def flush_to_disk(path: Path) -> None:
    """Wait until a file or folder is on the disk, so that a rename after it never shows an empty one.

    Args:
        path: File or folder.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class TrainingLog:
    """Lines of numbers, in a JSON-lines file and in the trackers of Accelerate.

    Args:
        path: File; after a resume, lines past ``first_step`` are taken out first.
        first_step: Steps already done.
        accelerator: Only its main process writes.
    """

    def __init__(self, path: Path, first_step: int, accelerator: Accelerator) -> None:
        self.path, self.accelerator = path, accelerator
        self.lines: list[dict[str, float]] = []
        if not accelerator.is_main_process:
            return
        if first_step and path.exists():
            lines = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.endswith("}")]
            self.lines = [line for line in lines if line["step"] <= first_step]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in self.lines), "utf-8")

    def write(self, line: dict[str, Any]) -> None:
        """Append a line; it holds a ``step``."""
        self.lines.append(line)
        self.accelerator.log({key: value for key, value in line.items() if key != "step"}, step=line["step"])
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(line) + "\n")
