"""Rounds of the demo: simulated labelers answer through the labeling page's own HTTP interface.

    python scripts/demo_rounds.py --run runs/demo-rounds --rounds 3

Starts from runs/demo where it is finished, and otherwise makes what it lacks. Started again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "recipes" / "demo"))

import labelers  # noqa: E402

LABELERS = [name for name in labelers.LABELERS if name != labelers.KEPT_OUT]
STAGES = ("pretrain", "sft", "reward")


def rlhf(*words: str | Path) -> None:
    """A command of the pipeline.

    Raises:
        SystemExit: it failed; it has said why.
    """
    code = subprocess.run([sys.executable, "-m", "pipeline.cli", *map(str, words)], check=False).returncode
    if code:
        raise SystemExit(code)


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address of `rlhf label FOLDER`."""
    command = [sys.executable, "-m", "pipeline.cli", "label", str(folder), "--port", "0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stdout is not None
            found = next((m for line in server.stdout if (m := re.search(r"serving at (\S+);", line))), None)
            if found is None:
                raise SystemExit(f"the labeling page of {folder} did not start")
            yield found[1]
        finally:
            server.terminate()


def personal_link(folder: Path, name: str) -> str:
    """A labeler's token; the second start makes a new link."""
    for verb in ("add", "link"):
        command = [sys.executable, "-m", "pipeline.cli", "label", "users", verb, name, "--folder", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.rpartition("/in/")[2].strip()
    raise SystemExit(done.stderr)


def label(folder: Path, seed: int) -> int:
    """Every labeler answers, in turn, until nothing is left for anybody; returns the number of labels."""
    count = 0
    with serving(folder) as url:
        clients = {
            name: httpx.Client(base_url=url, headers={"Authorization": f"Bearer {personal_link(folder, name)}"})
            for name in LABELERS
        }
        rngs = {name: random.Random(f"{seed}:{name}") for name in LABELERS}
        busy = list(LABELERS)
        while busy:
            for name in list(busy):
                item = clients[name].get("/api/item").raise_for_status().json()
                if item["item"] is None:
                    busy.remove(name)
                    continue
                prompt = item["prompt"][-1]["content"]
                ranks = labelers.rank(prompt, item["responses"], name, rngs[name])
                body = {"item": item["item"], "request": uuid.uuid4().hex, "answer": {"ranks": ranks}, "seconds": 3.0}
                clients[name].post("/api/label", json={**body, "replaces": 0}).raise_for_status()
                count += 1
        for client in clients.values():
            client.close()
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--run", type=Path, default=Path("runs/demo-rounds"))
    parser.add_argument("--recipe", default="recipes/demo-rounds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the labelers' noise")
    args = parser.parse_args()
    started = time.monotonic()
    if not all((Path("runs/demo") / stage / "lineage.json").is_file() for stage in STAGES):
        rlhf("run", "recipes/demo", "--output-dir", "runs/demo", "--to", "reward")
    for number in range(1, args.rounds + 1):
        folder = args.run / f"round-{number}"
        if all((folder / stage / "lineage.json").is_file() for stage in ("reward", "ppo")):
            continue
        if not (folder / "labeling").is_dir():
            rlhf("round", "new", args.run, "--recipe", args.recipe)
        if not (folder / "labels").is_dir():
            print(
                f"round {number}: {label(folder / 'labeling', 1000 * args.seed + number)} new labels by simulated labelers"
            )
        rlhf("round", "train", args.run, "--quiet")
        print(f"round {number}: done after {time.monotonic() - started:.0f} s", flush=True)
    rlhf("round", "report", args.run)


if __name__ == "__main__":
    main()
