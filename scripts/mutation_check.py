"""Put known bugs back, one at a time, and see a test fail for each: do the tests hold what they promise?

    python scripts/mutation_check.py [--only NAME] [--list] [--jobs 2]

Each bug is one that the papers' details warn of, or one that an implementation had. It is a function that stands in for
one of the pipeline's own. The named test must pass without it, and fail with it by an assertion of its own, not by an
error. Everything is imported once; each bug lives in a forked process. The last line is `caught N of N`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pipeline

import mutations.of_models_and_data
import mutations.of_ppo  # noqa: F401
import pytest
import torch
from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parent.parent
# An assertion of the test's own, a refusal that did not come, a comparison of torch.testing.
CAUGHT = re.compile(
    r"^E +(AssertionError|assert |Failed: DID NOT RAISE|Mismatched elements|Scalars are not)", re.MULTILINE
)
# Where CI is set, pytest explains a failed comparison by a full diff, which takes minutes for long lists.
PYTEST = ("-q", "-x", "-p", "no:cacheprovider", "-o", "addopts=", "--assert=plain")
LONGEST_TEST = 300.0  # seconds

# ---------------------------------------------------------------------------------------------- running them


def resolve(target: str) -> tuple[Any, str, Any]:
    """Owner (a module or class), name and object of a target; a function of a class as it stands there."""
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *classes, name = path.split(".")
    for part in classes:
        owner = getattr(owner, part)
    return owner, name, vars(owner)[name]


def apply(bug: Mutation) -> None:
    """Replace a target in its owner, and in every module of the pipeline or the tests that imported it by name."""
    owner, name, target = resolve(bug.target)
    static = isinstance(target, staticmethod)
    original = target.__func__ if static else target

    @functools.wraps(original)
    def wrong(*args: Any, **kwargs: Any) -> Any:
        return bug.wrong(original, *args, **kwargs)

    setattr(owner, name, staticmethod(wrong) if static else wrong)
    for module in our_modules():
        for other, value in list(vars(module).items()):
            if value is target:
                setattr(module, other, wrong)


def our_modules() -> Iterator[ModuleType]:
    for module in list(sys.modules.values()):
        file = Path(getattr(module, "__file__", None) or "/")
        if any(file.is_relative_to(ROOT / folder) for folder in ("pipeline", "tests")):
            yield module


def import_tests(bugs: Sequence[Mutation]) -> None:
    """Collect the tests here, so that forked processes find everything imported."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = pytest.main([*PYTEST, "--collect-only", *tests_of(bugs)])
    if code != 0:
        raise SystemExit(f"the tests cannot be collected:\n{output.getvalue()[-4000:]}")


def tests_of(bugs: Sequence[Mutation]) -> list[str]:
    return sorted({bug.test for bug in bugs})


def run_tests(tests: Sequence[str], folder: Path, bug: Mutation | None = None) -> tuple[int | None, str]:
    """pytest's exit code (None: it took too long) and output, in a forked process."""
    folder.mkdir()
    process = multiprocessing.get_context("fork").Process(target=_run_here, args=(tests, folder, bug))
    process.start()
    process.join(LONGEST_TEST * len(tests))
    if process.exitcode is None:
        process.kill()
        process.join()
        return None, "it took too long"
    return process.exitcode, (folder / "output.txt").read_text(encoding="utf-8", errors="replace")


def _run_here(tests: Sequence[str], folder: Path, bug: Mutation | None) -> None:
    with (folder / "output.txt").open("w", encoding="utf-8") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.stdout = sys.stderr = output
        if bug is not None:
            apply(bug)
        code = pytest.main([*PYTEST, "--basetemp", str(folder / "tmp"), *tests])
        output.flush()
        os._exit(code)


def try_bug(bug: Mutation, folder: Path) -> str | None:
    """None if the bug is caught; else why it is not."""
    code, output = run_tests([bug.test], folder, bug)
    if code == 0:
        return f"{bug.test} passes with it"
    if code != 1 or not CAUGHT.search(output):
        return f"{bug.test} ends by something else than an assertion:\n{output[-1500:]}"
    return None


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", help="bugs whose name holds this")
    parser.add_argument("--list", action="store_true", help="name the bugs and end")
    parser.add_argument("--jobs", type=int, default=2, help="bugs tried at a time")
    args = parser.parse_args(argv)
    bugs = [bug for bug in MUTATIONS if not args.only or args.only.lower() in bug.name.lower()]
    if args.list:
        print("\n".join(f"{bug.name}: {bug.test}" for bug in bugs))
        return
    if not Path(pipeline.__file__).is_relative_to(ROOT):
        raise SystemExit(f"`pipeline` is imported from {pipeline.__file__}, not from {ROOT}; set PYTHONPATH={ROOT}")
    os.chdir(ROOT)
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    import_tests(bugs)
    caught = 0
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(args.jobs) as pool:
        folder = Path(name)
        shares = [share for i in range(args.jobs) if (share := tests_of(bugs)[i :: args.jobs])]
        for code, output in pool.map(lambda i: run_tests(shares[i], folder / f"without-{i}"), range(len(shares))):
            if code != 0:
                raise SystemExit(f"the tests fail without any bug:\n{output[-4000:]}")
        results = pool.map(lambda i: try_bug(bugs[i], folder / str(i)), range(len(bugs)))
        for bug, reason in zip(bugs, results, strict=True):
            caught += reason is None
            print(f"MISSED: {bug.name}: {reason}" if reason else f"caught: {bug.name}", flush=True)
    print(f"caught {caught} of {len(bugs)}")
    raise SystemExit(0 if caught == len(bugs) else 1)


if __name__ == "__main__":
    main()
