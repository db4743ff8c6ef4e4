"""How fast the labeling page answers: many scripted labelers on one server, all on this machine.

    python scripts/benchmark_labeling.py --labelers 200 --every 3 --seconds 60 --items 100000

Prints, as JSON, the seconds of two starts (the first reads the rows, the second finds them in the database) and the median, the
95th percentile and the longest time in milliseconds of a page, of an item and of a submission.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import subprocess
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from pipeline.labeling.labelers import add_labeler
from pipeline.labeling.store import Store

import httpx
import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labelers", type=int, default=200)
    parser.add_argument("--every", type=float, default=3.0, help="seconds between two labels of a labeler")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--items", type=int, default=100_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl", args.items)
        with serving(folder) as (_, first):
            pass
        with contextlib.closing(Store(folder)) as store:
            tokens = [add_labeler(store, f"labeler {n}") for n in range(args.labelers)]
        with serving(folder) as (url, second):
            times = asyncio.run(load(url, tokens, args.every, args.seconds))
    result = {"start_s": {"reading": round(first, 2), "again": round(second, 2)}}
    for kind, values in times.items():
        median, p95, longest = np.percentile(values, [50, 95, 100])
        result[f"{kind}_ms"] = {
            "requests": len(values),
            "median": round(median, 1),
            "p95": round(p95, 1),
            "longest": round(longest, 1),
        }
    print(json.dumps(result, indent=2))


def write_rows(path: Path, count: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for n in range(count):
            row = {
                "prompt": f"Question {n}: what shall I do?",
                "responses": [f"Answer {k} to {n}. " * 10 for k in range(2)],
            }
            file.write(json.dumps(row) + "\n")


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[str, float]]:
    started = time.monotonic()
    command = [sys.executable, "-u", "-m", "pipeline.cli", "label", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if match := re.search(r"serving at (\S+);", line):
                    yield match[1], time.monotonic() - started
                    break
        finally:
            process.terminate()


async def load(url: str, tokens: list[str], every: float, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each kind of request."""
    times: dict[str, list[float]] = defaultdict(list)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits, verify=False) as client:
        end = time.monotonic() + seconds
        await asyncio.gather(*(labeler(client, token, every, end, times) for token in tokens))
    return times


async def labeler(
    client: httpx.AsyncClient, token: str, every: float, end: float, times: dict[str, list[float]]
) -> None:
    headers = {"authorization": f"Bearer {token}"}

    async def timed(kind: str, method: str, path: str, **options: object) -> httpx.Response:
        started = time.monotonic()
        response = await client.request(method, path, headers=headers, **options)  # type: ignore[arg-type]
        times[kind].append(1000 * (time.monotonic() - started))
        response.raise_for_status()
        return response

    await asyncio.sleep(random.uniform(0, every))
    await timed("page", "GET", "/")
    while time.monotonic() < end:
        item = (await timed("item", "GET", "/api/item")).json()["item"]
        await asyncio.sleep(random.uniform(0.8, 1.2) * every)
        body = {"item": item, "request": uuid.uuid4().hex, "answer": {"ranks": [1, 2], "strength": 2}, "seconds": every}
        await timed("submit", "POST", "/api/label", json=body)


if __name__ == "__main__":
    main()
