"""Change one thing at a time in the core modules and count how many of the changes their tests notice.

    python -m tests.mutation.mutants                            # a sample of every module: `make mutants`
    python -m tests.mutation.mutants --modules mra.gallery.where --sample 0    # every mutant of one

Each mutant is tested in a process forked from one that has imported the libraries and no module of the project. Tests that
start commands in new processes run the unchanged source there and cannot notice anything. A mutant that behaves as the
original does is listed in equivalent.yaml, with the reason, and not counted.
"""

import argparse
import contextlib
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import yaml

from tests.mutation.operators import Mutant, make_mutants


ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
LIBRARIES = (
    "pytest",
    "hypothesis.strategies",
    "torch",
    "torchvision.transforms.v2",
    "timm",
    "datasets",
    "accelerate",
    "transformers.models.bert.modeling_bert",
    "pymilvus",
    "milvus_lite.db",
)
ENOUGH = 0.9
OUTPUT = "output"
_FAILED = 1  # exit code of pytest


class _MutantFinder(importlib.abc.MetaPathFinder, importlib.machinery.SourceFileLoader):
    """Loads one module from changed source."""

    def __init__(self, module: str, path: Path, source: str) -> None:
        super().__init__(module, str(path))
        self._source = source.encode()

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: object = None) -> object:
        if fullname == self.name:
            return importlib.util.spec_from_file_location(fullname, self.path, loader=self)
        return None

    def get_code(self, fullname: str) -> object:
        return compile(self._source, self.path, "exec", dont_inherit=True)


class Run:
    """Tests of a module against changed source, in a process of their own.

    Args:
        module: dotted name.
        source: to load in its place.
        tests: files.
        timeout: seconds after which the run is killed; None for no limit.
        cpu_limit: the same in seconds of processor time, so that an endless loop ends early on a busy machine too.

    Attributes:
        code: exit code of pytest once it has ended, None where it was killed.
        cpu: seconds of processor time that it took.
    """

    def __init__(
        self,
        module: str,
        source: str,
        tests: Sequence[str],
        timeout: float | None = None,
        cpu_limit: int = resource.RLIM_INFINITY,
    ) -> None:
        self.code: int | None = None
        self.cpu = 0.0
        self._scratch = tempfile.TemporaryDirectory(prefix="mutant-")
        self._end = None if timeout is None else time.monotonic() + timeout
        self._child = os.fork()
        if self._child == 0:
            resource.setrlimit(resource.RLIMIT_CPU, (cpu_limit, cpu_limit))
            _run_tests(_MutantFinder(module, _path(module), source), tests, self._scratch.name)

    def has_ended(self) -> bool:
        """Return whether the run has ended, and end it after its time."""
        done, status, usage = os.wait4(self._child, os.WNOHANG)
        if not done:
            if self._end is None or time.monotonic() < self._end:
                return False
            os.killpg(self._child, signal.SIGKILL)
            os.waitpid(self._child, 0)
        elif os.WIFEXITED(status):
            self.code = os.waitstatus_to_exitcode(status)
        self.cpu = usage.ru_utime + usage.ru_stime
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child, signal.SIGKILL)  # what its tests started ends with it
        self.output = (Path(self._scratch.name) / OUTPUT).read_text(errors="replace")
        self._scratch.cleanup()
        return True


def _run_tests(finder: _MutantFinder, tests: Sequence[str], scratch: str) -> NoReturn:
    os.setsid()
    descriptor = os.open(Path(scratch) / OUTPUT, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ["TMPDIR"] = tempfile.tempdir = scratch
    code = _FAILED
    try:
        import pytest

        sys.meta_path.insert(0, finder)
        options = ["-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-profile", "unshrunk"]
        code = int(pytest.main([*options, *tests]))
    finally:
        sys.stdout.flush()
        os._exit(code)


def run_all(runs: Iterable[Callable[[], Run]], jobs: int) -> list[Run]:
    """Make runs, so many at a time, and return them once all have ended, in order."""
    ended: list[Run] = []
    active: list[Run] = []
    waiting = list(runs)
    while waiting or active:
        while waiting and len(active) < jobs:
            active.append(waiting.pop(0)())
            ended.append(active[-1])
        active = [run for run in active if not run.has_ended()]
        time.sleep(0.02)
    return ended


def main(argv: list[str] | None = None) -> None:
    """Print the share of mutants that the tests notice, for each module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="+", help="some of those in modules.yaml")
    parser.add_argument("--sample", type=int, default=20, help="mutants of a module; 0 for all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants tested at a time")
    args = parser.parse_args(argv)

    listed = yaml.safe_load((HERE / "modules.yaml").read_text())
    unknown = set(args.modules or ()) - listed.keys()
    if unknown:
        parser.error(f"--modules: {', '.join(sorted(unknown))} is not in modules.yaml")
    equivalent = yaml.safe_load((HERE / "equivalent.yaml").read_text()) or {}
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"
    for library in LIBRARIES:
        importlib.import_module(library)
    import torch

    torch.set_num_threads(1)  # a fork copies no threads
    gc.freeze()  # pytest collects garbage at the end: not that of the libraries each time

    too_low = []
    for module in args.modules or listed:
        tests = listed[module]
        start = time.monotonic()
        (unchanged,) = run_all([partial(Run, module, _path(module).read_text(), tests)], 1)
        if unchanged.code != 0:
            sys.exit(f"{module}: its tests fail without any change:\n{unchanged.output}")
        patience = 30 + 10 * (time.monotonic() - start), int(10 + 2 * unchanged.cpu)
        mutants = choose(module, args.sample, args.seed, equivalent.get(module, {}))
        runs = run_all([partial(Run, module, mutant.source, tests, *patience) for mutant in mutants], args.jobs)
        missed = [mutant for mutant, run in zip(mutants, runs, strict=True) if run.code == 0]
        share = 1 - len(missed) / max(1, len(mutants))
        print(f"{module:36} {len(mutants) - len(missed):3} of {len(mutants):3} noticed, {share:4.0%}", flush=True)
        for mutant in missed:
            print(f"    line {mutant.line}, {mutant.function}: {mutant.change}", flush=True)
        if share < ENOUGH:
            too_low.append(module)
    if too_low:
        sys.exit(f"below {ENOUGH:.0%}: {', '.join(too_low)}")


def _path(module: str) -> Path:
    return ROOT / f"{module.replace('.', '/')}.py"


def choose(module: str, sample: int, seed: int, equivalent: dict[str, str]) -> list[Mutant]:
    """Return a sample of a module's mutants without those that are known to change nothing.

    Args:
        module: dotted name.
        sample: how many at most; 0 for all.
        seed: of the sample.
        equivalent: reasons by `function: before -> after`.
    """
    mutants = make_mutants(_path(module).read_text())
    mutants = [mutant for mutant in mutants if f"{mutant.function}: {mutant.change}" not in equivalent]
    if sample and len(mutants) > sample:
        mutants = random.Random(f"{seed} {module}").sample(mutants, sample)
    return sorted(mutants, key=lambda mutant: mutant.line)


if __name__ == "__main__":
    main()
