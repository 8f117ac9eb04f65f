"""Tests that networks are imported when they are needed, and are then known to transformers.

A fresh interpreter for each, so they are slow. Run: pytest tests/test_auto_classes.py -m slow
"""

import pickle
import subprocess
import sys

import pytest

from modeling_scdiva import ScDivaConfig

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
NETWORKS = "'transformers.modeling_utils' in sys.modules"


def run(*lines: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], check=True, capture_output=True, text=True, timeout=300
    )
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("package", ["modeling_scdiva", "tokenization_scdiva"])
def test_importing_a_package_imports_no_network(package):
    assert run("import sys", f"import {package}", f"print({NETWORKS})") == "False"


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        f"AutoConfig.for_model('scdiva', **{SIZES})",
        f"pickle.loads({pickle.dumps(ScDivaConfig(**SIZES))!r})",
    ],
)
def test_first_configuration_fills_the_auto_classes(make):
    found = run(
        "import pickle",
        "import modeling_scdiva",
        "from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM",
        "from transformers.pipelines import PIPELINE_REGISTRY",
        f"config = {make}",
        "print(type(AutoModel.from_config(config)).__name__)",
        "print(type(AutoModelForMaskedLM.from_config(config)).__name__)",
        "print('cell-embedding' in PIPELINE_REGISTRY.get_supported_tasks())",
    )
    assert found.split() == ["ScDivaModel", "ScDivaForMaskedDiffusion", "True"]


@pytest.mark.slow
def test_unknown_names_are_no_attributes():
    found = run(
        "import modeling_scdiva",
        "print(hasattr(modeling_scdiva, 'ScDivaModels'))",
        "print(all(hasattr(modeling_scdiva, name) for name in modeling_scdiva.__all__))",
    )
    assert found.split() == ["False", "True"]
