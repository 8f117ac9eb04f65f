"""The examples of annotation and the benchmark run on made-up cells, in one process and in two.

Needs no data. Run: pytest tests/test_annotation_examples.py
"""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import anndata
import pytest

from modeling_scdiva.tasks.annotation import UNKNOWN
from modeling_scdiva.tasks.annotator_files import load_annotator
from tokenization_scdiva import synthetic_cells

ROOT = Path(__file__).parents[1]


def run(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(str(ROOT / script), run_name="__main__")


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_fine_tune_then_predict(monkeypatch, capsys):
    script = "examples/finetune_annotation.py"
    run(monkeypatch, script, "--n_epochs", 1)
    printed = capsys.readouterr().out
    assert "80 held-out cells" in printed
    assert "PCA-50 + logistic regression" in printed
    types = load_annotator("annotator").label_names
    assert types == ["type_0", "type_1", "type_2", "type_3"]
    run(monkeypatch, script, "--predict", "--checkpoint", "annotator", "--output", "named.h5ad")
    named = anndata.read_h5ad("named.h5ad").obs
    assert set(named["scdiva_cell_type"]) <= {*types, UNKNOWN}
    assert named["scdiva_cell_type_probability"].between(0, 1).all()


def test_what_cannot_be_done_is_said_before_training(monkeypatch):
    script = "examples/finetune_annotation.py"
    with pytest.raises(
        SystemExit, match=r"--test_groups \['nobody'\] are not all in obs\['donor_id'\]: \{.*'donor_0'"
    ):
        run(monkeypatch, script, "--test_groups", "nobody")
    with pytest.raises(SystemExit, match="--predict needs --checkpoint"):
        run(monkeypatch, script, "--predict")
    with pytest.raises(SystemExit, match="--reference and --query go together"):
        run(monkeypatch, "examples/map_reference.py", "--query", "query.h5ad")


@pytest.mark.parametrize(
    ("script", "last_line"),
    [
        ("finetune_annotation.py --n_epochs 1", "Annotator in annotator/."),
        ("map_reference.py", "Types, confidences and distances are in obs of mapped.h5ad."),
    ],
)
def test_two_processes_end_well_and_write_once(script, last_line):
    name, *arguments = script.split()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, ROOT / "examples" / name, *arguments], env=environment,
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(last_line) == 1


def test_map_to_a_reference(monkeypatch, capsys):
    run(monkeypatch, "examples/map_reference.py", "--output", "mapped.h5ad")
    assert "scDiVa, nearest cells" in capsys.readouterr().out
    mapped = anndata.read_h5ad("mapped.h5ad").obs
    assert len(mapped) == 100
    assert mapped["scdiva_distance_percentile"].between(0, 1).all()


def test_benchmark_writes_rows_and_figures(monkeypatch, fresh_tiny_model, tokenizer, tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    adata = synthetic_cells(n_cells=90, n_genes=120, n_cell_types=3, seed=1)
    adata.obs["batch"] = [f"plate_{cell // 3 % 3}" for cell in range(90)]
    (tmp_path / "data").mkdir()
    adata.write_h5ad(tmp_path / "data" / "cellmix_celseq2_tian2019.h5ad")
    fresh_tiny_model().save_pretrained("scdiva")
    tokenizer.save_pretrained("scdiva")
    choices = ["--datasets", "cellmix_plates", "--methods", "frozen", "lora", "pca", "majority"]
    paths = ["--model", "scdiva", "--data", "data", "--output", "result.json", "--device", "cpu"]
    run(monkeypatch, "benchmarks/run_annotation.py", *paths, *choices, "--seeds", 0, "--n_epochs", 1)
    result = json.loads((tmp_path / "result.json").read_text("utf-8"))
    assert [row["method"] for row in result["numbers"]] == [
        "scDiVa, frozen + logistic regression",
        "scDiVa, LoRA",
    ]
    assert {row["n_cells"] for row in result["numbers"] + result["baselines"]} == {90}
    details = result["details"]["cellmix_plates"]
    assert set(details["splits"]["seed 0"]) == {"plate_0", "plate_1", "plate_2"}
    assert details["classes"]["lora"]["type_0"]["support"] == 30
    assert len(result["figures"]) == 2
    assert all((tmp_path / name).is_file() for name in result["figures"])
