"""Fine-tuning: one plain Accelerate loop for every task, with early stopping on the task's own score.

Notable choices:
- A task gives a module whose output has a ``loss``, and a function that makes a batch of any rows; shuffling,
  rates, devices and stopping are here.
- Rows of a batch depend on (seed, epoch) alone and are dealt out to the processes. The mean of a process
  counts by its rows, so a loss that is a mean over cells trains the same weights at any world size.
- Every process follows the score of the first, so that all stop after the same epoch.
- The weights of the best epoch are restored at the end: the score is the task's, on its validation cells.
- The process group is the caller's: a script that may run in several processes ends with
  ``accelerator.end_training()`` and keeps no wrapped model until then, or the interpreter's exit aborts now
  and then.

Source: METHOD.md section 7.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, broadcast_object_list
from torch import nn
from tqdm import tqdm

from modeling_scdiva.adapters import trainable_state
from modeling_scdiva.hardware import refuse_precision
from modeling_scdiva.sharding import sharding_settings

Batch = Mapping[str, torch.Tensor]
PLAIN_DATA_PARALLEL = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


@dataclass(frozen=True)
class FinetuningArguments:
    """Numbers of a fine-tuning run.

    Attributes:
        n_epochs: Passes over the examples, at most.
        batch_size: Examples per optimiser step, over all processes.
        learning_rate: Peak learning rate.
        weight_decay: On matrices; not on norms, biases and embeddings.
        warmup_fraction: Share of the steps in which the rate rises; then it falls linearly to zero.
        max_grad_norm: Gradients are clipped to this norm.
        patience: Epochs without a better validation score before stopping; 0 for never.
        seed: Of the shuffle and of dropout.
    """

    n_epochs: int = 30
    batch_size: int = 32
    learning_rate: float = 5e-5
    weight_decay: float = 0.01
    warmup_fraction: float = 0.1
    max_grad_norm: float = 1.0
    patience: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n_epochs", "batch_size"):
            if getattr(self, name) < 1:
                msg = f"{name} must be at least 1, got {getattr(self, name)}."
                raise ValueError(msg)
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                msg = f"{name} must be positive, got {getattr(self, name)}."
                raise ValueError(msg)
        if not 0.0 <= self.warmup_fraction <= 1.0:
            msg = f"warmup_fraction must lie in [0, 1], got {self.warmup_fraction}."
            raise ValueError(msg)
        if self.patience < 0:
            msg = f"patience must not be negative, got {self.patience}."
            raise ValueError(msg)


def finetune(
    model: nn.Module,
    *,
    n_examples: int,
    make_batch: Callable[[np.ndarray, int], Batch],
    arguments: FinetuningArguments,
    accelerator: Accelerator | None = None,
    validate: Callable[[], float] | None = None,
    show_progress: bool = True,
) -> list[dict[str, float]]:
    """Train what requires a gradient, in place; torch's global generators stay as they were.

    A gradient or a score that is not finite raises ``FloatingPointError``.

    Args:
        model: Its output, a mapping, holds the scalar ``loss``; other entries that end in "loss" are logged.
        n_examples: Number of training examples.
        make_batch: (rows, epoch) -> inputs of the model; rows index the examples.
        arguments: Run numbers.
        accelerator: Where the run happens; default one on the current device.
        validate: Called after each epoch; a higher score is better. Without it, the last weights stay.
        show_progress: Show a progress bar.

    Returns:
        One mapping per epoch: ``epoch``, the mean of each loss, and ``score`` if there is one.

    Raises:
        ValueError: If there is nothing to train, or nothing to train on, or the launch is not supported.
    """
    accelerator = Accelerator() if accelerator is None else accelerator
    _refuse_unsupported(accelerator)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if n_examples < 1 or not parameters:
        msg = f"Nothing to train: {n_examples} examples, {len(parameters)} trainable tensors."
        raise ValueError(msg)
    n_batches = math.ceil(n_examples / arguments.batch_size)
    n_steps = arguments.n_epochs * n_batches
    model.to(accelerator.device)
    optimizer = _optimizer(model, arguments)
    if accelerator.ddp_handler is None:  # a task need not use every head of a checkpoint
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    wrapped = accelerator.prepare_model(model)
    history: list[dict[str, float]] = []
    best_score, best_state, n_without_better, step = -math.inf, None, 0, 0
    is_quiet = not (show_progress and accelerator.is_main_process)
    bar = tqdm(total=n_steps, unit=" steps", desc="Fine-tuning", disable=is_quiet)
    with bar, torch.random.fork_rng(devices=_cuda_devices(accelerator)):
        for epoch in range(arguments.n_epochs):
            model.train()
            sums: dict[str, float] = {}
            for rows, weight in _epoch_rows(n_examples, epoch, arguments, accelerator):
                _set_rate(optimizer, step, n_steps, arguments)
                torch.manual_seed(_dropout_seed(arguments.seed, step, accelerator.process_index))
                batch = make_batch(rows, epoch)
                losses = _take_step((model, wrapped), optimizer, batch, weight, arguments, accelerator)
                for name, loss in losses.items():
                    sums[name] = sums.get(name, 0.0) + loss
                step += 1
                bar.update(1)
            sums = _mean_over_processes(sums, accelerator)
            line = {"epoch": epoch + 1} | {name: total / n_batches for name, total in sums.items()}
            history.append(line)
            if validate is None:
                continue
            line["score"] = score = _common_score(validate(), accelerator)
            bar.set_postfix(score=f"{score:.4f}")
            if score > best_score:
                best_score, best_state, n_without_better = score, trainable_state(model), 0
            else:
                n_without_better += 1
            if arguments.patience and n_without_better >= arguments.patience:
                break
    if best_state is not None:
        model.load_state_dict(best_state, strict=False)
    return history


def _refuse_unsupported(accelerator: Accelerator) -> None:
    refuse_precision(accelerator)
    is_sharded = sharding_settings(accelerator) is not None  # asked for, also where Accelerate drops it
    if is_sharded or accelerator.distributed_type not in PLAIN_DATA_PARALLEL:
        asked = "FSDP" if is_sharded else accelerator.distributed_type.value
        msg = (
            f"{asked} is not supported in fine-tuning: whole weights are kept and restored. "
            "Launch with plain data parallelism (accelerate launch --multi_gpu)."
        )
        raise ValueError(msg)


def _cuda_devices(accelerator: Accelerator) -> list[torch.device]:
    return [accelerator.device] if accelerator.device.type == "cuda" else []


def _mean_over_processes(sums: dict[str, float], accelerator: Accelerator) -> dict[str, float]:
    if accelerator.num_processes == 1:
        return sums
    found = accelerator.reduce(torch.tensor(list(sums.values()), device=accelerator.device), "mean")
    return dict(zip(sums, found.tolist(), strict=True))


def _common_score(score: float, accelerator: Accelerator) -> float:
    """Return the score of the first process: rounding must not let one stop while another goes on."""
    score = float(broadcast_object_list([float(score)])[0]) if accelerator.num_processes > 1 else float(score)
    if not math.isfinite(score):
        msg = f"The validation score is {score}: no epoch can be chosen by it. Lower the learning rate."
        raise FloatingPointError(msg)
    return score


def _optimizer(model: nn.Module, arguments: FinetuningArguments) -> torch.optim.AdamW:
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[parameter.ndim >= 2 and id(parameter) not in embeddings].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": arguments.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=arguments.learning_rate,
    )


def _epoch_rows(
    n_examples: int, epoch: int, arguments: FinetuningArguments, accelerator: Accelerator
) -> Iterator[tuple[np.ndarray, float]]:
    """Yield this process's part of every batch of one epoch, and the weight of its mean among all."""
    order = np.random.default_rng((arguments.seed, epoch)).permutation(n_examples)
    n_processes, process = accelerator.num_processes, accelerator.process_index
    for start in range(0, n_examples, arguments.batch_size):
        rows = order[start : start + arguments.batch_size]
        own = rows[process::n_processes]
        # A process without a row of its own takes part with one that does not count.
        yield own if len(own) else rows[:1], len(own) * n_processes / len(rows)


def _take_step(
    models: tuple[nn.Module, Any],
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    weight: float,
    arguments: FinetuningArguments,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Update models (plain, wrapped for the processes) once; return the losses of this process."""
    model, wrapped = models
    inputs = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
    outputs = wrapped(**inputs)
    accelerator.backward(weight * outputs["loss"])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norm = float(nn.utils.clip_grad_norm_(trained, arguments.max_grad_norm))
    if not math.isfinite(norm):
        msg = f"A gradient is {norm}: training stops before the weights are spoilt. Lower the learning rate."
        raise FloatingPointError(msg)
    optimizer.step()
    torch.clear_autocast_cache()  # inside a caller's autocast the old weights would live on
    optimizer.zero_grad(set_to_none=True)
    names = [
        name
        for name, part in outputs.items()
        if name.endswith("loss") and part is not None and part.ndim == 0
    ]
    return {name: weight * float(outputs[name].detach()) for name in names}


def _set_rate(
    optimizer: torch.optim.Optimizer, step: int, n_steps: int, arguments: FinetuningArguments
) -> None:
    n_warmup = max(1, round(arguments.warmup_fraction * n_steps))
    share = (step + 1) / n_warmup if step < n_warmup else (n_steps - step) / max(1, n_steps - n_warmup)
    for group in optimizer.param_groups:
        group["lr"] = arguments.learning_rate * share


def _dropout_seed(*place: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(place).encode()).digest()[:7], "little")
