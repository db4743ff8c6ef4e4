"""Race a stage of this checkout against the same stage of another commit, alternating, on the same work.

    python scripts/benchmark_commits.py --base HEAD~20 --run runs/demo --stage ppo --rounds 5 -- --total_rollouts 4

Each run is a process of its own with the same recipe, parents and flags; both sides take their parents from `--run`, a finished
run of the demo. Times are those that the stage's history and lineage say, without imports; memory is the process's largest
resident set. The last line is JSON with the ratio of each round (this checkout / base), its median, lowest and highest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARENTS = {"pretrain": None, "sft": "pretrain", "reward": "sft", "ppo": "sft"}


def timed_stage(checkout: Path, stage: str, run: Path, flags: Sequence[str], threads: int) -> tuple[float, float]:
    """(seconds of the stage, largest resident set in MiB) of one run in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, str(checkout / "pipeline" / f"{stage}.py")]
        command += ["--config", str(checkout / "recipes" / "demo" / f"{stage}.yaml"), "--output_dir", f"{scratch}/out"]
        command += ["--report_to", "none", "--threads", str(threads), "--quiet", "true"]
        if parent := PARENTS[stage]:
            command += ["--parent", str(run / parent)]
        if stage == "ppo":
            command += ["--reward", str(run / "reward")]
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads)}
        with Path(f"{scratch}/log").open("w") as log:
            process = subprocess.Popen([*command, *flags], cwd=checkout, env=environment, stdout=log, stderr=log)
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{checkout}: {stage} failed\n{Path(f'{scratch}/log').read_text()[-2000:]}")
        lineage = json.loads(Path(f"{scratch}/out/lineage.json").read_text(encoding="utf-8"))
        return lineage["seconds"], usage.ru_maxrss / 1024


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="commit, or folder of another checkout")
    parser.add_argument("--run", required=True, type=Path, help="finished run whose stages are the parents")
    parser.add_argument("--stage", required=True, choices=PARENTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("flags", nargs="*", help="further flags of the stage, after --")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(args.base)
        if not base.is_dir():
            base = Path(scratch) / "base"
            subprocess.run(["git", "-C", ROOT, "worktree", "add", "--detach", base, args.base], check=True)
        try:
            ratios, memory = [], []
            for number in range(args.rounds):
                sides = {"base": base, "here": ROOT}
                order = list(sides) if number % 2 == 0 else list(sides)[::-1]
                runs = {
                    name: timed_stage(sides[name], args.stage, args.run.resolve(), args.flags, args.threads)
                    for name in order
                }
                (here, here_mib), (there, there_mib) = runs["here"], runs["base"]
                ratios.append(here / there)
                memory.append(here_mib / there_mib)
                print(
                    f"round {number + 1}: here {here:.1f} s, {here_mib:.0f} MiB; base {there:.1f} s, {there_mib:.0f} MiB; "
                    f"time {ratios[-1]:.3f}, memory {memory[-1]:.3f}",
                    flush=True,
                )
        finally:
            if base.parent == Path(scratch):
                subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", base], check=True)
    summary = {
        "stage": args.stage,
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_lowest": round(min(ratios), 3),
        "ratio_highest": round(max(ratios), 3),
        "memory_ratio_median": round(statistics.median(memory), 3),
        "rounds": args.rounds,
        "threads": args.threads,
        "flags": args.flags,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
