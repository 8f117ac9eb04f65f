"""What a device can do: its peak, whether it computes in bf16, and compiled layers for it."""

import time

import torch
from accelerate import Accelerator
from torch import nn

from modeling_scdiva.layers_scdiva import ScDivaLayer

# Vendors' dense bf16 peaks in TFLOP/s, the more special name first; other devices are measured.
PEAK_TFLOPS = {
    "A100": 312.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "B200": 2250.0,
}
GEMM_SIZE = 2048
# A compiled layer is kept for each width, with and without padding, in training and in evaluation.
COMPILED_VARIANTS = 64


def peak_flops(accelerator: Accelerator) -> float:
    """Give the peak of this process's device, the denominator of MFU.

    Args:
        accelerator: Device and precision.

    Returns:
        FLOP/s: the vendor's bf16 peak for a known GPU, else the rate of a square matrix product in the run's
        precision, measured here.
    """
    device = accelerator.device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, tflops in PEAK_TFLOPS.items():
            if known in name:
                return tflops * 1e12
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    matrix = torch.ones(GEMM_SIZE, GEMM_SIZE, dtype=dtype, device=device)
    rates = []
    for _ in range(3):
        start = time.perf_counter()
        float((matrix @ matrix)[0, 0])
        rates.append(2 * GEMM_SIZE**3 / (time.perf_counter() - start))
    return max(rates)


def has_bf16(device: torch.device) -> bool:
    """Say whether a device has instructions for bf16, or would have to imitate them.

    Args:
        device: CPU, CUDA or another device; of others nothing is known, and they are taken at their word.

    Returns:
        True for CUDA from Ampere on, and for CPUs with AMX, AVX512-BF16 or Arm's BF16.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        abilities = torch.cpu.get_capabilities()
        return any(abilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    return True


def refuse_precision(accelerator: Accelerator) -> None:
    """Refuse a precision that is not built, or that the device does not have.

    Args:
        accelerator: Device and precision.

    Raises:
        ValueError: If the precision is neither float32 nor bf16, or bf16 is asked of a device without it.
    """
    precision, device = accelerator.mixed_precision, accelerator.device
    if precision not in ("no", "bf16"):
        msg = f"mixed_precision={precision!r} needs loss scaling, which is not built. Use bf16."
        raise ValueError(msg)
    if precision == "bf16" and not has_bf16(device):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "This CPU"
        msg = (
            f"mixed_precision='bf16', and {name} has no bf16 instructions (CUDA from Ampere on; on CPUs AMX, "
            "AVX512-BF16 or Arm's BF16): imitated, it is slower than float32. Use mixed_precision='no'."
        )
        raise ValueError(msg)


def compile_layers(model: nn.Module) -> None:
    """Compile each encoder layer in place, one kernel for all layers of a width; meant for GPUs.

    Widths are taken as fixed, so let loaders pad to few of them (``pad_to_multiple_of``). Layer by layer,
    because it compiles once instead of once per layer, and because sharded layers gather their weights in
    between.

    Args:
        model: Any model with an encoder.
    """
    settings = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, COMPILED_VARIANTS)
    for module in model.modules():
        if isinstance(module, ScDivaLayer):
            module.compile(dynamic=False)
