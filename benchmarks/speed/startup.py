"""Start of a program: `import modeling_scdiva` against `import transformers` and torch.

Each import has an interpreter of its own; the CPU time of all its threads is counted. The package by itself
is what a tokenizer or a corpus build waits for; with a network it is compared with the base class of
networks, which any program with a transformers network imports.

    python benchmarks/speed/startup.py
"""

import resource
import subprocess
import sys
import time

from side_by_side import N_REPEATS, Timing, ratio_line, report

PROGRAMS = {
    "libraries": "import torch, transformers",
    "package": "import modeling_scdiva",
    "base_class": "import torch; from transformers import AutoModel, PreTrainedModel",
    "network": "from modeling_scdiva import ScDivaModel",
}


def run(program: str) -> tuple[float, float]:
    """Run a program in a new interpreter: its CPU seconds, and seconds by the clock."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", program], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return cpu, time.perf_counter() - start


def main() -> None:
    """Measure."""
    timings = {name: Timing([], []) for name in PROGRAMS}
    for repeat in range(-1, N_REPEATS):
        for name, program in PROGRAMS.items():
            cpu, wall = run(program)
            if repeat >= 0:
                timings[name].cpu.append(cpu)
                timings[name].wall.append(wall)
    report(
        "startup",
        [
            ratio_line(
                "import of the package over transformers and torch",
                timings["package"],
                timings["libraries"],
                floor=1.3,
                aim=1.1,
                better="lower",
            ),
            ratio_line(
                "import of a network over the base class of networks",
                timings["network"],
                timings["base_class"],
                floor=1.3,
                aim=1.1,
                better="lower",
            ),
        ],
        timings,
        programs=PROGRAMS,
    )


if __name__ == "__main__":
    main()
