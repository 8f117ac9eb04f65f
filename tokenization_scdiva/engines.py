"""Run one function over many units of work: one after the other, or on a Ray cluster.

`build_corpus` and `build_vocabulary` take either as ``run_units``; what a unit is, and what is done with it,
stands there and is the same for both. Results come back in the order of the units, so that sums, files and
the error that is raised are those of the serial loop.

A unit whose worker dies (killed, out of memory, machine lost) is run again by Ray; functions that write give
their files the final name last, so nothing of the dead worker is taken for whole. Input and output must lie
on a file system that all machines see under the same path.

Source: Ray Data (https://docs.ray.io/en/latest/data/data.html), one row and one task per unit.
"""

import pickle
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

MAX_ATTEMPTS = 5  # Ray Data itself would run a unit that kills its worker again and again, for ever


class Progress(Protocol):
    """What a function tells how far it is, such as a tqdm bar."""

    def update(self, n: int) -> Any:
        """Say that ``n`` more are done."""


UnitFunction = Callable[[Any, Progress], Any]
Engine = Callable[[UnitFunction, Sequence[Any], Progress], Iterator[Any]]


def run_serially(function: UnitFunction, units: Sequence[Any], progress: Progress) -> Iterator[Any]:
    """Run a function over units in this process.

    Args:
        function: Takes a unit and the progress to update.
        units: What to run it on.
        progress: Updated by the function.

    Yields:
        The results, in the order of the units.
    """
    for unit in units:
        yield function(unit, progress)


def run_on_ray(function: UnitFunction, units: Sequence[Any], progress: Progress) -> Iterator[Any]:
    """Run a function over units on the Ray cluster that this process is connected to, one core a unit.

    Without a connection, the cluster of ``RAY_ADDRESS`` or ``ray start`` is taken, else one is started here,
    with all cores of this machine. Whatever the function raises is raised here, for the first unit that it
    failed for, with equal type and message; the worker's traceback is its note.

    Args:
        function: Takes a unit and the progress to update; it and the units are pickled once, and held once in
            the memory of every machine.
        units: What to run it on.
        progress: Updated when a unit is done, by what the function told.

    Yields:
        The results, in the order of the units.

    Raises:
        ImportError: If ray is not installed.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        msg = "The Ray engine needs Ray Data, which is not installed: pip install 'scdiva[ray]'"
        raise ImportError(msg) from error
    if not units:
        return
    if not ray.is_initialized():
        ray.init()
    attempts = _attempt_counter(ray)
    job = ray.put((function, list(units)))
    tasks = ray.data.range(len(units), override_num_blocks=len(units)).map(
        partial(_run_unit, job=job, attempts=attempts), num_cpus=1
    )
    tasks.context.execution_options.preserve_order = True
    tasks.context.enable_progress_bars = False
    for row in tasks.iter_rows():
        progress.update(row["n_done"])
        outcome, is_error = pickle.loads(row["outcome"]), row["is_error"]
        if is_error:
            raise outcome
        yield outcome


# What scripts take as --engine.
ENGINES: dict[str, Engine] = {"serial": run_serially, "ray": run_on_ray}


class _Counter:
    """Progress on a worker: counts, to be told when the unit is done."""

    def __init__(self) -> None:
        self.n_done = 0

    def update(self, n: int) -> None:
        self.n_done += int(n)


def _attempt_counter(ray: Any) -> Any:
    """Start an actor that counts how often each unit was begun; it outlives the workers."""

    # Made here, the class travels by value, and its process starts without importing this package.
    class Attempts:
        def __init__(self) -> None:
            self.n_attempts: dict[int, int] = {}

        def begin(self, unit: int) -> int:
            self.n_attempts[unit] = self.n_attempts.get(unit, 0) + 1
            return self.n_attempts[unit]

    return ray.remote(num_cpus=0)(Attempts).remote()


def _run_unit(row: dict[str, Any], *, job: Any, attempts: Any) -> dict[str, Any]:
    """Run one unit on a worker; errors travel as results, so that the first unit's is raised first."""
    import ray

    function, units = ray.get(job)
    unit, counter, is_error = units[row["id"]], _Counter(), False
    try:
        n_attempts = ray.get(attempts.begin.remote(int(row["id"])))
        if n_attempts > MAX_ATTEMPTS:
            msg = (
                f"The unit {unit!r:.500} was begun {MAX_ATTEMPTS} times, and each time its worker died: out "
                "of memory, or a crash in a library? See the logs of Ray. What is finished is kept: start "
                "again to go on."
            )
            raise RuntimeError(msg)
        outcome: Any = function(unit, counter)
    # Whatever is raised is raised again where the units were handed out.
    except Exception as error:  # noqa: BLE001
        error.add_note(f"On a Ray worker:\n{traceback.format_exc()}")
        outcome, is_error = _portable(error), True
    return {"n_done": counter.n_done, "is_error": is_error, "outcome": pickle.dumps(outcome)}


def _portable(error: Exception) -> Exception:
    """Return an error that survives pickling, which one with arguments of its own may not: then its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
