"""Masked-diffusion pretraining: a plain Accelerate loop that can be stopped anywhere and goes on bit for bit.

Why not `Trainer`: its resume replays neither masks nor dropout exactly, and its loss bookkeeping counts
labels before masking. Here nothing is random but by number: cells, masks and depth come from (seed, epoch,
cell) through the loader, dropout from (seed, micro-step, process). A resume therefore needs weights,
optimiser and three counters, and no generator state; everything is safetensors and JSON.

A *step* is one optimiser update over `gradient_accumulation_steps` global micro-batches. Learning rates,
optimiser numbers and the clip are those of METHOD.md section 7.

Dimensions: B cells of one process's micro-batch, S positions, V vocabulary, D width.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator, DistributedType
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

from modeling_scdiva.hardware import refuse_precision
from modeling_scdiva.modeling_scdiva import ScDivaForMaskedDiffusion
from modeling_scdiva.sharding import (
    local_gradients,
    reshard,
    run_idle,
    shard_model,
    sharding_settings,
    whole_tensors,
)
from modeling_scdiva.training_checkpoint import (
    Progress,
    TrainingLog,
    check_settings,
    gather_state,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from modeling_scdiva.training_metrics import LossMeter, SpeedMeter

# Arguments that change what is written, not what is computed.
BOOKKEEPING = ("log_every", "eval_every", "save_every", "keep_checkpoints")
DATA_PARALLEL = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.FSDP,
)


class EpochSampler(Protocol):
    """What the loop needs of the loader's batch sampler."""

    batches_per_epoch: int
    settings: dict[str, Any]

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch, and how many of its batches to leave out."""


@dataclass(frozen=True)
class PretrainingArguments:
    """Run numbers of pretraining; those of the network are in `ScDivaConfig`.

    Attributes:
        n_steps: Optimiser updates.
        gradient_accumulation_steps: Global micro-batches per update.
        learning_rate: Peak learning rate of AdamW.
        betas: AdamW's averaging rates.
        weight_decay: Decay of matrices; norms, biases and embeddings have none.
        warmup_fraction: Share of the steps with a rising rate.
        final_learning_rate_fraction: Where the cosine ends, as a share of the peak.
        max_grad_norm: Gradients are clipped to this norm.
        ema_decay: Keep an exponential average of the weights with this decay and save it as the model; 0 for
            none.
        seed: Of dropout. (Cells and masks have the loader's.)
        log_every: Steps between lines of the log.
        eval_every: Steps between evaluations; 0 for the end only.
        save_every: Steps between checkpoints; 0 for the end only.
        keep_checkpoints: Older ones are deleted.
    """

    n_steps: int
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    warmup_fraction: float = 0.02
    final_learning_rate_fraction: float = 0.1
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0
    seed: int = 0
    log_every: int = 10
    eval_every: int = 500
    save_every: int = 500
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name in ("n_steps", "gradient_accumulation_steps", "log_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                msg = f"{name} must be at least 1, got {getattr(self, name)}."
                raise ValueError(msg)
        if self.save_every % self.log_every:
            msg = (
                f"save_every ({self.save_every}) must be a multiple of log_every ({self.log_every}), so "
                "that a resumed run logs the same means."
            )
            raise ValueError(msg)
        for name in ("warmup_fraction", "final_learning_rate_fraction", "ema_decay"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                msg = f"{name} must lie in [0, 1], got {getattr(self, name)}."
                raise ValueError(msg)


def learning_rate_at(step: int, arguments: PretrainingArguments) -> float:
    """Give the learning rate of one step: linear warm-up, then a cosine to a fraction of the peak.

    Args:
        step: Step, from 0.
        arguments: Run numbers.

    Returns:
        Learning rate, > 0.
    """
    n_warmup = max(1, round(arguments.warmup_fraction * arguments.n_steps))
    if step < n_warmup:
        return arguments.learning_rate * (step + 1) / n_warmup
    progress = (step - n_warmup) / max(1, arguments.n_steps - n_warmup)
    floor = arguments.final_learning_rate_fraction
    return arguments.learning_rate * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress)))


def make_optimizer(model: nn.Module, arguments: PretrainingArguments) -> torch.optim.AdamW:
    """Make AdamW with weight decay on matrices only.

    Args:
        model: Its parameters are taken.
        arguments: Run numbers.

    Returns:
        The optimiser, fused.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        is_matrix = parameter.ndim >= 2 and id(parameter) not in embeddings
        (decayed if is_matrix else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": arguments.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=arguments.learning_rate, betas=arguments.betas, fused=True)


def pretrain(
    model: ScDivaForMaskedDiffusion,
    *,
    train_loader: DataLoader,
    eval_loader: DataLoader | None,
    arguments: PretrainingArguments,
    accelerator: Accelerator,
    output_dir: str | Path,
    resume: bool = False,
    on_save: Callable[[Path], Any] | None = None,
) -> list[dict[str, float]]:
    """Train a model and save it to ``output_dir``, with checkpoints on the way.

    A gradient that is not finite stops the run with a ``FloatingPointError``; checkpoints stay as they are.

    Args:
        model: Model to train, in place.
        train_loader: Yields collated micro-batches; its ``batch_sampler`` is an `EpochSampler` of this
            process.
        eval_loader: Held-out cells with fixed masks, or None.
        arguments: Run numbers.
        accelerator: Says where the run happens: processes, device, precision.
        output_dir: Folder of the model, of ``training_log.jsonl`` and of the checkpoints.
        resume: Go on from the newest checkpoint in ``output_dir``; without one, start.
        on_save: Called with every folder a model is saved to, checkpoints too (the tokenizer goes there).

    Returns:
        The lines of the log, one mapping per logged step or evaluation.

    Raises:
        FileExistsError: If ``output_dir`` holds checkpoints and ``resume`` is not set.
    """
    _refuse_unsupported(accelerator)
    _refuse_idle_decoder(model, train_loader)
    _refuse_corrupted_depth(model, train_loader)
    output_dir = Path(output_dir)
    found = latest_checkpoint(output_dir)
    if found is not None and not resume:
        msg = (
            f"{output_dir} holds {found.name} of an earlier run. Pass resume (--resume) or choose another "
            "folder."
        )
        raise FileExistsError(msg)
    run = _Run(model, arguments, accelerator, output_dir, on_save)
    run.settings = run_settings(arguments, train_loader, accelerator)
    if resume:
        run.resume(found)
    log = TrainingLog(output_dir / "training_log.jsonl", run.progress.step, accelerator)
    losses, speed = LossMeter(accelerator), SpeedMeter(model.config, accelerator)
    bar = tqdm(
        total=arguments.n_steps,
        initial=run.progress.step,
        unit=" steps",
        disable=not accelerator.is_main_process,
    )
    if eval_loader is not None and run.progress.step == 0:
        log.write({"step": 0} | run.evaluate(eval_loader))  # where the curves start
        speed.restart()
    batches = _micro_batches(train_loader, run.progress)
    while run.progress.step < arguments.n_steps:
        run.take_step(batches, losses, speed)
        step = run.progress.step
        is_last = step == arguments.n_steps
        if step % arguments.log_every == 0 or is_last:
            line = {"step": step} | losses.pop("train") | speed.pop() | run.last_numbers()
            log.write(line)
            bar.set_postfix(loss=f"{line['train_loss']:.4f}", cells_per_s=f"{line['cells_per_s']:.1f}")
        if eval_loader is not None and (
            is_last or (arguments.eval_every and step % arguments.eval_every == 0)
        ):
            log.write({"step": step} | run.evaluate(eval_loader))
            speed.restart()
        if is_last or (arguments.save_every and step % arguments.save_every == 0):
            run.save_checkpoint()
            speed.restart()
        bar.update(1)
    bar.close()
    run.save_model(output_dir)
    return log.lines


def run_settings(
    arguments: PretrainingArguments, train_loader: DataLoader, accelerator: Accelerator
) -> dict[str, Any]:
    """Collect what decides the numbers of a run; a checkpoint is resumed only with the same.

    Args:
        arguments: Run numbers; how often things are logged and saved does not matter.
        train_loader: Its sampler, corpus and collator add their ``settings``.
        accelerator: Adds the precision.

    Returns:
        Name -> value, as JSON would give it back.
    """
    settings: dict[str, Any] = {"mixed_precision": accelerator.mixed_precision}
    settings |= {name: value for name, value in asdict(arguments).items() if name not in BOOKKEEPING}
    for part in (train_loader.batch_sampler, train_loader.dataset, train_loader.collate_fn):
        settings |= getattr(part, "settings", {})
    return json.loads(json.dumps(settings))


def _refuse_unsupported(accelerator: Accelerator) -> None:
    if accelerator.distributed_type not in DATA_PARALLEL:
        msg = (
            f"{accelerator.distributed_type.value} is not supported. Launch with plain data parallelism "
            "(accelerate launch --multi_gpu), or, for networks that one device cannot hold, with FSDP2 "
            "(accelerate launch --config_file examples/accelerate/fsdp2.yaml)."
        )
        raise ValueError(msg)
    refuse_precision(accelerator)


def _refuse_corrupted_depth(model: ScDivaForMaskedDiffusion, train_loader: DataLoader) -> None:
    depth_corruption = getattr(train_loader.collate_fn, "depth_corruption", "none")
    if model.config.exclude_unfit_genes and depth_corruption != "none":
        msg = (
            "exclude_unfit_genes compares the values in sight with whole counts of the clean cell; corrupted "
            f"values do not fit. Set depth_corruption='none', got {depth_corruption!r}."
        )
        raise ValueError(msg)


def _refuse_idle_decoder(model: ScDivaForMaskedDiffusion, train_loader: DataLoader) -> None:
    if model.query_decoder is not None and not getattr(train_loader.collate_fn, "n_gene_queries", 0):
        msg = (
            "The network has a gene-query decoder (latent_loss_weight="
            f"{model.config.latent_loss_weight}), and the loader asks for no genes: it would stay random. "
            "Load with n_gene_queries=256, or set latent_loss_weight=0."
        )
        raise ValueError(msg)


def evaluate(
    model: ScDivaForMaskedDiffusion, loader: DataLoader, *, accelerator: Accelerator
) -> dict[str, float]:
    """Average the losses over held-out cells with the loader's fixed masks.

    Args:
        model: Model, not wrapped; sharded or not.
        loader: Collated micro-batches of this process; for a sharded model, its ``batch_sampler`` is an
            `EpochSampler`.
        accelerator: Where the run happens.

    Returns:
        ``eval_loss``, ``eval_gene_loss`` (nats), ``eval_expression_loss`` (squared log1p units), the gene
        loss in ten bins of diffusion time, and ``eval_n_cells``.
    """
    meter = LossMeter(accelerator)
    was_training = model.training
    model.eval()
    with torch.no_grad(), accelerator.autocast():
        n_batches = 0
        for batch in loader:
            n_batches += 1
            inputs = {
                name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()
            }
            timestep = inputs.pop("timestep")
            meter.update(model(**inputs), timestep)
        run_idle(model, loader, n_batches)
    reshard(model)
    model.train(was_training)
    return meter.pop("eval")


class _Run:
    """The parts of a run that change with every step."""

    def __init__(
        self,
        model: ScDivaForMaskedDiffusion,
        arguments: PretrainingArguments,
        accelerator: Accelerator,
        output_dir: Path,
        on_save: Callable[[Path], Any] | None,
    ) -> None:
        self.arguments, self.accelerator, self.output_dir, self.on_save = (
            arguments,
            accelerator,
            output_dir,
            on_save,
        )
        self.model = model.train()
        self.average = None
        if arguments.ema_decay:
            self.average = AveragedModel(
                self.model, multi_avg_fn=get_ema_multi_avg_fn(arguments.ema_decay), use_buffers=False
            )
        sharding = sharding_settings(accelerator)
        if sharding is not None:
            accelerator.print(f"Sharding the network over {accelerator.num_processes} processes (FSDP2).")
        for network in (self.model, None if self.average is None else self.average.module):
            if network is not None and sharding is not None:
                shard_model(network, sharding, accelerator)
            elif network is not None:
                network.to(accelerator.device)
        self.optimizer = make_optimizer(self.model, arguments)
        # Only the network is wrapped (DDP, autocast): rates, clip and resume are done here, in the open.
        self.wrapped = accelerator.prepare_model(self.model, evaluation_mode=sharding is not None)
        self.progress = Progress()
        self.settings: dict[str, Any] = {}
        self.grad_norm = self.learning_rate = 0.0

    def resume(self, checkpoint: Path | None) -> None:
        """Take up the run of a checkpoint, and say so; without one, start."""
        if checkpoint is None:
            self.accelerator.print(f"{self.output_dir} holds no checkpoint: starting at step 0.")
            return
        check_settings(checkpoint, self.settings)
        self.progress = load_checkpoint(checkpoint, self.model, self.optimizer, self.average)
        self.accelerator.print(f"Resuming from {checkpoint} at step {self.progress.step:,}.")

    def take_step(
        self, batches: Iterator[dict[str, torch.Tensor]], losses: LossMeter, speed: SpeedMeter
    ) -> None:
        """Do one optimiser update."""
        self.learning_rate = learning_rate_at(self.progress.step, self.arguments)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        n_micro = self.arguments.gradient_accumulation_steps
        for micro in range(n_micro):
            with speed.waiting():
                batch = next(batches)
            inputs = {
                name: tensor.to(self.accelerator.device, non_blocking=True) for name, tensor in batch.items()
            }
            timestep = inputs.pop("timestep")
            torch.manual_seed(self._dropout_seed(micro))
            is_last = micro == n_micro - 1
            with nullcontext() if is_last else local_gradients(self.wrapped, self.accelerator):
                outputs = self.wrapped(**inputs)
                (outputs.loss / n_micro).backward()
            losses.update(outputs, timestep)
            speed.update(batch)
            self.progress.n_cells += len(timestep) * self.accelerator.num_processes
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.arguments.max_grad_norm)
        self.grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if not math.isfinite(self.grad_norm):
            msg = (
                f"The gradient of step {self.progress.step + 1} is {self.grad_norm}. Training stops before "
                f"the weights are spoilt; checkpoints in {self.output_dir} are good. Look for broken cells, "
                "or lower the rate."
            )
            raise FloatingPointError(msg)
        self.optimizer.step()
        torch.clear_autocast_cache()  # inside a caller's autocast the old weights would live on
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.progress.step += 1

    def last_numbers(self) -> dict[str, float]:
        """Numbers of the newest step for the log."""
        return {
            "learning_rate": self.learning_rate,
            "grad_norm": self.grad_norm,
            "epoch": self.progress.epoch,
            "n_cells_seen": self.progress.n_cells,
        }

    def evaluate(self, loader: DataLoader) -> dict[str, float]:
        """Evaluate the weights that would be saved."""
        return evaluate(self._saved_model(), loader, accelerator=self.accelerator)

    def save_checkpoint(self) -> None:
        """Save all that a resume needs, and delete the oldest checkpoints."""
        state = gather_state(self.model, self.optimizer, self.average, self.accelerator)
        if self.accelerator.is_main_process:
            save_checkpoint(
                self.output_dir,
                self.model,
                state,
                self.progress,
                settings=self.settings,
                keep=self.arguments.keep_checkpoints,
                on_save=self.on_save,
            )
        self.accelerator.wait_for_everyone()

    def save_model(self, folder: Path) -> None:
        """Save the finished model, whole."""
        model = self._saved_model()
        weights = whole_tensors(model.state_dict(keep_vars=True), self.accelerator)
        if self.accelerator.is_main_process:
            model.save_pretrained(folder, state_dict=weights)
            if self.on_save is not None:
                self.on_save(folder)
        self.accelerator.wait_for_everyone()

    def _saved_model(self) -> ScDivaForMaskedDiffusion:
        return self.model if self.average is None else self.average.module  # type: ignore[return-value]

    def _dropout_seed(self, micro: int) -> int:
        place = f"{self.arguments.seed}/{self.progress.step}/{micro}/{self.accelerator.process_index}"
        return int.from_bytes(hashlib.sha256(place.encode()).digest()[:7], "little")


def _micro_batches(loader: DataLoader, progress: Progress) -> Iterator[dict[str, torch.Tensor]]:
    """Endless micro-batches from where ``progress`` stands, which is moved along."""
    sampler: EpochSampler = loader.batch_sampler  # type: ignore[assignment]
    while True:
        sampler.set_epoch(progress.epoch, progress.next_batch)
        for batch in loader:
            progress.next_batch += 1
            yield batch
        progress.epoch, progress.next_batch = progress.epoch + 1, 0
