"""Where a number comes from: what a result file says about its run.

Needs: git; no files, no GPU.
Run: python -m pytest tests/test_provenance.py
"""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

from modeling_scdiva.provenance import collect_provenance, result_path


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=Somebody", "-c", "user.email=somebody@example.org"]
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *words], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_says_commit_and_changes(tmp_path: Path) -> None:
    assert collect_provenance([], repository=tmp_path)["commit"] is None
    git(tmp_path, "init", "--quiet")
    assert collect_provenance([], repository=tmp_path)["commit"] is None  # no commit yet
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "--quiet", "--message", "one")
    clean = collect_provenance([], repository=tmp_path)
    assert clean["commit"] == git(tmp_path, "rev-parse", "HEAD")
    assert clean["has_uncommitted_changes"] is False
    (tmp_path / "file").write_text("two")
    assert collect_provenance([], repository=tmp_path)["has_uncommitted_changes"] is True


def test_command_names_no_folder_of_the_machine() -> None:
    words = [
        "/home/somebody/run.py",
        "--model",
        "/scratch/scdiva",
        "--out=/scratch/a b.json",
        "--rate=1/2",
        "x/y",
        "/a=b/c",
    ]
    command = collect_provenance(words)["command"]
    assert command == "run.py --model scdiva '--out=a b.json' --rate=1/2 x/y c"


def test_is_plain_json_with_versions_and_hardware() -> None:
    provenance = json.loads(json.dumps(collect_provenance()))
    assert provenance["versions"]["torch"] == torch.__version__
    assert provenance["hardware"]["n_cores"] >= 1
    assert provenance["hardware"]["processor"]


def test_results_are_named_by_date_and_never_overwritten(tmp_path: Path) -> None:
    path = result_path(tmp_path, "denoising")
    assert path.parent == tmp_path
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}_denoising\.json", path.name)
    named = tmp_path / "new" / "result.json"
    assert result_path(named, "denoising") == named
    path.touch()
    with pytest.raises(FileExistsError, match=r"_denoising\.json exists, and results are never overwritten"):
        result_path(tmp_path, "denoising")
