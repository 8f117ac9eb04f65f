"""Peaks, bf16 where there is bf16, compiled layers with the results of those that are not.

Needs: a C++ compiler for the slow test.
Run: pytest tests/test_hardware.py
"""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from modeling_scdiva.hardware import compile_layers, has_bf16, peak_flops, refuse_precision
from modeling_scdiva.layers_scdiva import ScDivaLayer

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def accelerator(device, mixed_precision):
    return SimpleNamespace(device=device, mixed_precision=mixed_precision)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989), ("NVIDIA H100 NVL", 835),
    ],
)  # fmt: skip
def test_peaks_are_the_vendors(name, tflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(accelerator(GPU, "bf16")) == tflops * 1e12


def test_the_peak_of_a_cpu_is_measured():
    assert 1e8 < peak_flops(Accelerator(cpu=True)) < 1e15


@pytest.mark.parametrize(
    ("abilities", "expected"),
    [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"bf16": True}, True),
     ({"avx512_bf16": False, "avx2": True}, False), ({}, False)],
)  # fmt: skip
def test_bf16_is_used_only_where_the_processor_has_it(abilities, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: abilities)
    assert has_bf16(CPU) is expected
    refuse_precision(accelerator(CPU, "no"))
    if expected:
        refuse_precision(accelerator(CPU, "bf16"))
    else:
        with pytest.raises(
            ValueError, match=r"This CPU has no bf16 instructions .* Use mixed_precision='no'"
        ):
            refuse_precision(accelerator(CPU, "bf16"))


def test_a_gpu_that_imitates_bf16_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    with pytest.raises(ValueError, match="Tesla V100 has no bf16 instructions"):
        refuse_precision(accelerator(GPU, "bf16"))


@pytest.mark.slow
def test_compiled_layers_train_like_plain_ones(fresh_tiny_model):
    plain, compiled = (fresh_tiny_model(hidden_dropout=0.0) for _ in range(2))
    compile_layers(compiled)
    compilations = torch._dynamo.utils.counters["stats"]
    compilations.clear()
    vocabulary = plain.config.vocab_size
    for width in (9, 17, 9, 17):
        ids = torch.randperm(vocabulary - 5)[: 2 * width].reshape(2, width) + 5
        ids[:, 0] = plain.config.lat_token_id
        inputs = {
            "input_ids": ids.clone(), "expression_values": torch.rand(2, width),
            "labels": torch.full((2, width), -100), "expression_labels": torch.rand(2, width),
        }  # fmt: skip
        inputs["labels"][:, 3:6] = ids[:, 3:6]
        inputs["input_ids"][:, 3:6] = plain.config.mask_token_id
        losses = [model(**inputs).loss for model in (plain, compiled)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    for one, two in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, rtol=1e-3, atol=1e-5)
    # One graph a width, not one a width and layer.
    assert sum(isinstance(module, ScDivaLayer) for module in compiled.modules()) == 2
    assert compilations["unique_graphs"] == 2
