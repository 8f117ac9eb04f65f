"""Fully sharded training (FSDP2) of networks that are too large for one device.

The launch says that a run is sharded (examples/accelerate/fsdp2.yaml); torch's `fully_shard` does it, layer
by layer. Not through `Accelerator.prepare`, for two reasons: on CPUs Accelerate (1.15, `AcceleratorState`)
drops the settings and starts plain data parallelism, and its precision policy rounds values and targets to
bf16. Like this, CPUs and GPUs run the same lines.

Checkpoints hold whole tensors whoever wrote them, so a run goes on with any number of processes, sharded or
not.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from modeling_scdiva.layers_scdiva import ScDivaLayer


def sharding_settings(accelerator: Accelerator) -> FullyShardedDataParallelPlugin | None:
    """Give the FSDP settings of a launch, and refuse those that are not built.

    Args:
        accelerator: Says how the run was launched.

    Returns:
        The settings; None for a run that is not sharded.

    Raises:
        ValueError: If a setting is not built.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
    elif accelerator.distributed_type == DistributedType.MULTI_CPU and _is_asked_for():
        plugin = FullyShardedDataParallelPlugin()  # reads the launch's environment
    else:
        return None
    wanted = {
        "fsdp_version: 2": plugin.fsdp_version == 2,
        "fsdp_offload_params: false": not isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_activation_checkpointing: false (pass --gradient_checkpointing)": (
            not plugin.activation_checkpointing
        ),
        # With it, transformers would load --init_checkpoint in the first process only.
        "fsdp_cpu_ram_efficient_loading: false": not plugin.cpu_ram_efficient_loading,
        "no fsdp_ignored_modules": not plugin.ignored_modules,
        "no parallelism_config": not accelerator.parallelism_config,
    }
    refused = [setting for setting, is_met in wanted.items() if not is_met]
    if refused:
        msg = (
            f"Sharded training here needs {', '.join(refused)}. Take examples/accelerate/fsdp2.yaml and "
            "change the number of processes and machines only."
        )
        raise ValueError(msg)
    return plugin


def _is_asked_for() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def shard_model(model: nn.Module, settings: FullyShardedDataParallelPlugin, accelerator: Accelerator) -> None:
    """Shard a model in place over all processes: each layer a unit, the rest another.

    With bf16, layers gather and compute in bf16 and add gradients up in float32; what goes between layers,
    embeddings, heads and losses have the precision of an unsharded run under autocast.

    Args:
        model: The same weights in every process, on any device.
        settings: Of `sharding_settings`.
        accelerator: Processes, device, precision. Parameters go to the device of this process.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    precision = MixedPrecisionPolicy()
    if accelerator.mixed_precision == "bf16":
        precision = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    for module in list(model.modules()):
        if isinstance(module, ScDivaLayer):
            fully_shard(
                module, mesh=mesh, mp_policy=precision, reshard_after_forward=settings.reshard_after_forward
            )
    # The rest is used first and last in every step, so it is gathered once and stays until the backward pass.
    fully_shard(model, mesh=mesh)


@contextmanager
def local_gradients(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Keep the gradients of a micro-batch in the process: the last one of a step adds them up for all.

    Args:
        model: Wrapped or sharded model.
        accelerator: Does it for models that are not sharded.
    """
    if not isinstance(model, FSDPModule):
        with accelerator.no_sync(model):
            yield
        return
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def run_idle(model: PreTrainedModel, loader: Any, n_batches: int) -> None:
    """Take part in the forward passes of a short last batch: processes of a sharded model run it together.

    Args:
        model: Any model; one that is not sharded has nobody to wait for it.
        loader: Its ``batch_sampler`` knows ``batches_per_epoch``, those of the process with most of them.
        n_batches: Batches that this process had.
    """
    if isinstance(model, FSDPModule):
        for _ in range(loader.batch_sampler.batches_per_epoch - n_batches):
            model(**model.dummy_inputs)


def reshard(model: nn.Module) -> None:
    """Free the weights that a forward pass without backward leaves gathered.

    Args:
        model: Any model; nothing is done to one that is not sharded.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_tensors(tensors: Mapping[str, torch.Tensor], accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """Gather tensors in the main process; every process has to call this.

    Args:
        tensors: Name -> tensor, sharded or not.
        accelerator: Knows the main process.

    Returns:
        Name -> whole tensor on the CPU in the main process, nothing in the others.
    """
    gathered: dict[str, torch.Tensor] = {}
    first_names: dict[int, str] = {}
    for name, tensor in tensors.items():
        first_name = first_names.setdefault(id(tensor), name)
        detached = tensor.detach()
        whole = detached.full_tensor() if isinstance(detached, DTensor) else detached
        if accelerator.is_main_process:  # tied weights stay one tensor
            gathered[name] = whole.cpu().contiguous() if first_name == name else gathered[first_name]
    return gathered


def placed_like(whole: torch.Tensor, model_tensor: torch.Tensor) -> torch.Tensor:
    """Put a whole tensor where another is, and cut out this process's share if that one is sharded.

    Args:
        whole: The same in every process.
        model_tensor: Tensor of the model.

    Returns:
        ``whole`` on that device, sharded like ``model_tensor``.
    """
    whole = whole.to(model_tensor.device)
    if not isinstance(model_tensor, DTensor):
        return whole
    return distribute_tensor(whole, model_tensor.device_mesh, model_tensor.placements, src_data_rank=None)
