"""Runs transformers' own `ModelTesterMixin` and `ConfigTester`, as released, against our classes.

Scope: what transformers asks of a model in its tree: saving, loading, initialisation from nothing, resizing,
tying, attention backends, checkpointing, outputs, plans for parallel runs, compilation.
Needs: the package index, once per release of transformers; then `.cache/`. About a minute on two cores.
Run: make test-upstream, which is pytest tests/upstream -m upstream
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import pytest
import transformers

pytestmark = pytest.mark.upstream

REPOSITORY = Path(__file__).parents[2]
CACHE = REPOSITORY / ".cache" / "transformers-tests" / transformers.__version__
SUITE = CACHE / "suite"
TESTER = Path(__file__).parent / "scdiva_model_tester.py"
TIMEOUT_S = 1_800
MIN_PASSED = 100

# Modules the tests import which the source distribution lacks; we test neither exporters nor text generation.
STUBS = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": """config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["BertModel"],
    "id2label": {0: "label"},
    "label2id": {"label": "0"},
    "problem_type": "regression",
}
""",
}

# Tests that may be skipped: name, upstream's reason, and why that is right for this model. A skip that no
# line allows is a failure, and so is a line whose tests are gone.
ALLOWED_SKIPS = [
    (
        r".*flash_attn_.*",
        r"test requires (Flash Attention.*|the kernels library|MPS)",
        "needs a GPU and its kernels",
    ),
    (r"test_kernels_can_load_without_crashing", r"test requires the kernels library", "optional kernels"),
    (r".*_with_deepspeed.*", r"test requires deepspeed", "DeepSpeed is no dependency"),
    (
        r"test_(can_load_with_.*|cpu_offload|disk_offload_.*|flex_attention_with_grads|model_parallelism"
        r"|sdpa_can_compile_dynamic|sdpa_can_dispatch_on_flash|torch_compile_for_training)",
        r"test requires (multiple accelerators|accelerator)",
        "runs where there is a GPU",
    ),
    (
        r"test_eager_matches_sdpa_inference_\d+_fp32_pad_left_output_attentions",
        r"Model does not support output_attentions",
        "asked for through **kwargs, as in every new model; test_attention_outputs covers it",
    ),
    (r".*composite_models?", r".*(composite|does not support SDPA).*", "one flat configuration, one encoder"),
    (r"test_internal_model_config_and_subconfig_are_same", r"No subconfigs.*", "one flat configuration"),
    (
        r"test_(can_load_from_already_mapped_keys|reverse_loading_mapping)",
        r"No conversion found.*",
        "no old names",
    ),
    (r"test_(causal_lm|encoder_decoder)_loss_.*", r"No .* language modeling head.*", "an encoder"),
    (r"test_(moe_models|output_router_logits|eager_matches_batched_and_grouped)_.*", r".*", "no experts"),
    (r"test_keep_in_fp32_modules(_exist)?", r".*_keep_in_fp32_modules.*", "no weight needs float32"),
    (r"test_model_rope_with_partial_rotation", r".*partial rope.*", "every coordinate is rotated"),
    (r"test_vision_axial_rope", r".*no axial RoPE.*", "no images"),
    (r"test_resize_position_vector_embeddings", r".*position embeddings", "rotary positions have no table"),
    (r"test_sliding_window_mask", r".*sliding window.*", "attention over the whole cell"),
]


@dataclass
class Report:
    """What the suite said, by test name."""

    passed: list[str]
    failed: dict[str, str]
    skipped: list[tuple[str, str]]  # name and reason; a test with parts may skip several times


def download_tests() -> Path:
    """Fetch the source distribution of the installed release and unpack its tests; nothing is installed."""
    archive = CACHE / f"transformers-{transformers.__version__}.tar.gz"
    if not archive.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            "transformers",
        ]
        command += ["--dest", str(CACHE), f"transformers=={transformers.__version__}"]
        subprocess.run(command, check=True, timeout=300)
    unpacked = CACHE / f"transformers-{transformers.__version__}" / "tests"
    if not unpacked.exists():
        with tarfile.open(archive) as tar:
            members = [m for m in tar.getmembers() if re.fullmatch(r"[^/]+/tests/test_\w+\.py", m.name)]
            tar.extractall(CACHE, members=members, filter="data")
    return unpacked


def build_suite() -> None:
    """Lay out upstream's tests, the stubs and our tester as one package, fresh each time."""
    shutil.rmtree(SUITE, ignore_errors=True)
    tests = SUITE / "tests"
    shutil.copytree(download_tests(), tests)
    for name, text in STUBS.items():
        path = tests / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    ours = tests / "models" / "scdiva"
    ours.mkdir(parents=True)
    shutil.copy(TESTER, ours / "test_modeling_scdiva.py")
    for folder in (tests, *(path for path in tests.rglob("*") if path.is_dir())):
        (folder / "__init__.py").touch()
    # Keeps pytest from taking the settings of this repository.
    (SUITE / "pytest.ini").write_text("[pytest]\n")


@pytest.fixture(scope="module")
def report() -> Report:
    """Run the suite in its own process: upstream reads its switches from the environment at import."""
    build_suite()
    results = SUITE / "results.xml"
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "RUN_SLOW": "1",
        "PYTHONPATH": str(REPOSITORY),
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "-m", "pytest", "tests/models/scdiva", "-q", "-p", "no:cacheprovider"]
    command += [f"--junitxml={results}", "-W", "ignore"]
    run = subprocess.run(
        command, cwd=SUITE, env=environment, timeout=TIMEOUT_S, capture_output=True, text=True, check=False
    )
    assert results.exists(), run.stdout[-4_000:] + run.stderr[-4_000:]
    report = Report([], {}, [])
    for case in ElementTree.parse(results).iter("testcase"):
        name = case.get("name", "")
        if (problem := next((e for e in case if e.tag in {"failure", "error"}), None)) is not None:
            report.failed[name] = problem.get("message", "")[:500]
        elif (skip := case.find("skipped")) is not None:
            report.skipped.append((name, skip.get("message", "")))
        else:
            report.passed.append(name)
    print(f"{len(report.passed)} passed, {len(report.skipped)} skipped, {len(report.failed)} failed")
    return report


def test_nothing_fails(report: Report) -> None:
    assert report.failed == {}


def test_most_of_the_suite_runs(report: Report) -> None:
    assert len(report.passed) >= MIN_PASSED


def test_every_skip_is_allowed(report: Report) -> None:
    unexpected = [
        (name, reason)
        for name, reason in report.skipped
        if not any(
            re.fullmatch(test, name) and re.fullmatch(cause, reason, re.DOTALL)
            for test, cause, _ in ALLOWED_SKIPS
        )
    ]
    assert unexpected == []


def test_every_allowed_skip_names_a_test(report: Report) -> None:
    names = [*report.passed, *report.failed, *(name for name, _ in report.skipped)]
    gone = [test for test, _, _ in ALLOWED_SKIPS if not any(re.fullmatch(test, name) for name in names)]
    assert gone == []
