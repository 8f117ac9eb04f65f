"""Where a number comes from: command, commit, versions and hardware, for result files and model cards.

Result files are published, so absolute paths are shortened to their last part, and neither user nor host is
named.
"""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "scdiva", "torch", "transformers", "accelerate", "datasets", "peft", "anndata", "numpy", "scipy",
    "pandas", "scikit-learn", "scanpy", "umap-learn", "scib-metrics", "harmonypy", "POT", "scvi-tools",
    "pyarrow", "h5py", "numba", "ray", "tiledbsoma",
)  # fmt: skip
CPU_INFO = Path("/proc/cpuinfo")
GIT_TIMEOUT_SECONDS = 10


def collect_provenance(
    arguments: Sequence[str] | None = None, *, repository: str | Path | None = None
) -> dict[str, Any]:
    """Say what ran, on what, when.

    Args:
        arguments: Words of the command; default those of this process.
        repository: A folder of the Git checkout whose commit is named; default the one that holds this file.

    Returns:
        ``command``, ``commit`` and ``has_uncommitted_changes`` (None outside a checkout), ``date`` (UTC),
        ``versions`` (package -> version, absent ones left out) and ``hardware``.
    """
    repository = Path(__file__).parent if repository is None else Path(repository)
    commit = _git(repository, "rev-parse", "HEAD")
    changes = _git(repository, "status", "--porcelain") if commit else None
    return {
        "command": shlex.join(_published(word) for word in (sys.argv if arguments is None else arguments)),
        "commit": commit,
        "has_uncommitted_changes": None if changes is None else bool(changes),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
        "hardware": _hardware(),
    }


def result_path(output: str | Path, slug: str) -> Path:
    """Name a new result file; results are added, never changed.

    Args:
        output: A ``.json`` file, or a folder, which gives ``YYYY-MM-DD_slug.json`` in it, dated in UTC.
        slug: What was measured, for the name in a folder.

    Returns:
        Path of a file that does not exist yet.

    Raises:
        FileExistsError: If it exists.
    """
    path = Path(output)
    if path.suffix != ".json":
        path /= f"{datetime.now(UTC):%Y-%m-%d}_{slug}.json"
    if path.exists():
        msg = f"{path} exists, and results are never overwritten. Choose another name with --output."
        raise FileExistsError(msg)
    return path


def _published(word: str) -> str:
    """Shorten an absolute path, also behind ``--option=``, to its last part."""
    if Path(word).is_absolute():
        return Path(word).name
    option, equals, path = word.partition("=")
    return option + equals + Path(path).name if Path(path).is_absolute() else word


def _git(folder: Path, *words: str) -> str | None:
    """Ask Git; None where there is no Git, no checkout or no commit yet."""
    command = ["git", "-C", str(folder), *words]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=GIT_TIMEOUT_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _hardware() -> dict[str, Any]:
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "processor": _processor_name(),
        "n_cores": n_cores,
        "n_threads": torch.get_num_threads(),
        "gpus": gpus,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor_name() -> str:
    if CPU_INFO.exists():
        for line in CPU_INFO.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
