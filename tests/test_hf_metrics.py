"""The metrics as `evaluate` modules: loaded by path without the network, the same numbers as the functions.

Needs no data. Run: pytest -m "" tests/test_hf_metrics.py
"""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from modeling_scdiva.metrics.calibration import calibration_scores
from modeling_scdiva.metrics.classification import classification_scores
from modeling_scdiva.metrics.imputation import detection_scores, profile_correlations, value_scores
from modeling_scdiva.metrics.network import network_metrics
from modeling_scdiva.metrics.perturbation import mean_scores, score_perturbations
from modeling_scdiva.metrics.perturbation_de import de_call_scores
from modeling_scdiva.metrics.reconstruction import (
    cell_gene_scores,
    copy_test,
    mean_over_cells,
    score_gene_laws,
)

FOLDER = Path(__file__).resolve().parents[1] / "modeling_scdiva" / "metrics" / "hf_metrics"
FAMILIES = [
    "annotation", "calibration", "imputation", "integration", "network", "perturbation", "reconstruction",
]  # fmt: skip

# Reads {name: [folder, configuration, arguments]}, prints {name: numbers}.
PROGRAM = """
import json, sys
import evaluate
found = {}
for name, (folder, configuration, arguments) in json.load(sys.stdin).items():
    metric = evaluate.load(folder, configuration)
    found[name] = metric.compute(**arguments) if arguments else metric.inputs_description
json.dump(found, sys.stdout)
"""


def test_every_family_has_a_folder_and_a_line_in_the_readme():
    assert sorted(path.name for path in FOLDER.iterdir() if path.is_dir()) == FAMILIES
    readme = (FOLDER / "README.md").read_text("utf-8")
    assert all(f"| `{family}`" in readme for family in FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_import_line_by_line_what_exists(family):
    tree = ast.parse((FOLDER / family / f"{family}.py").read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert len(node.names) == 1, "the loader of evaluate takes `import a, b` for a package named 'a,'"
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("modeling_scdiva"):
            module = importlib.import_module(node.module)
            assert all(callable(getattr(module, alias.name)) for alias in node.names)
    assert sum(isinstance(node, ast.ClassDef) for node in tree.body) == 1


def numbers_and_expectations():
    """Return name -> (folder, configuration, arguments), and name -> what the functions give."""
    rng = np.random.default_rng(0)
    labels, predicted = rng.choice(["B", "NK", "T"], 40).tolist(), rng.choice(["B", "T"], 40).tolist()
    probabilities = rng.dirichlet([1.0, 1.0, 1.0], 40)
    classes = rng.integers(-1, 3, 40)
    true, imputed = rng.random((6, 9)), rng.random((6, 9))
    is_on = (true > 0.5).ravel()
    changes, guesses, evidence = rng.normal(size=(3, 4, 30))
    is_de = evidence > 0.5
    weights, p_values = rng.random(30), rng.random((4, 30)) ** 6
    scores, is_edge = rng.random((5, 12)), rng.random((5, 12)) < 0.3
    scores[0, 0] = np.nan
    laws = [np.log(rng.dirichlet(np.ones(20), n)) for n in (4, 7)]
    genes = [rng.permutation(20)[: len(law)] for law in laws]
    cells = [rng.permutation(20)[:8] for _ in range(3)]
    copies = [np.roll(cell, -1) for cell in cells]
    asked = {
        "annotation": (None, predicted, labels, {}),
        "calibration": (None, probabilities, classes, {"n_bins": 7}),
        "imputation": (None, imputed, true, {}),
        "imputation detection": ("detection", imputed.ravel(), is_on.astype(int), {}),
        "network": (None, scores, is_edge.astype(int), {"is_candidate": np.ones((5, 12), bool)}),
        "perturbation": (
            None, guesses, changes, {"de_scores": evidence, "is_de": is_de, "gene_weights": weights},
        ),
        "perturbation calls": ("calls", guesses, changes, {"predicted_p": p_values, "is_de": is_de}),
        "reconstruction": (None, laws, genes, {}),
        "reconstruction copy": ("copy", copies, cells, {}),
    }  # fmt: skip
    of_cells = [cell_gene_scores(score_gene_laws(*pair), pair[1]) for pair in zip(laws, genes, strict=True)]
    expected = {
        "annotation": classification_scores(labels, predicted),
        "calibration": calibration_scores(probabilities, classes, n_bins=7),
        "imputation": value_scores(true, imputed) | profile_correlations(true, imputed),
        "imputation detection": detection_scores(imputed.ravel(), is_on),
        "network": network_metrics(scores, is_edge),
        "perturbation": score_perturbations(
            guesses, changes, de_scores=evidence, is_de=is_de, gene_weights=weights
        ),
        "perturbation calls": mean_scores(
            de_call_scores(guesses, changes, predicted_p=p_values, is_de=is_de)
        ),
        "reconstruction": mean_over_cells(of_cells),
        "reconstruction copy": copy_test(cells, copies),
    }
    return asked, expected


def plain(value):
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    return value.tolist() if isinstance(value, np.ndarray) else value


@pytest.mark.slow
def test_modules_give_the_numbers_of_the_functions_offline(tmp_path):
    asked, expected = numbers_and_expectations()
    requests = {
        name: (
            str(FOLDER / name.split()[0]),
            configuration,
            plain({"predictions": predictions, "references": references, **further}),
        )
        for name, (configuration, predictions, references, further) in asked.items()
    }
    # Loaded only: its numbers take scib-metrics half a minute, and their own tests check them.
    requests["integration"] = (str(FOLDER / "integration"), None, None)
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(requests), env=environment, cwd=FOLDER.parents[2],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "batches" in found.pop("integration")
    assert found.keys() == expected.keys()
    for name, numbers in expected.items():
        assert found[name].keys() == numbers.keys()
        for key, value in numbers.items():
            if value is None:
                assert found[name][key] is None
            else:
                assert found[name][key] == pytest.approx(value, nan_ok=True), (name, key)
