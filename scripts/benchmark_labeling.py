"""How fast the labeling page answers: many scripted labelers on one server, all on this machine.

    python scripts/benchmark_labeling.py --labelers 200 --every 3 --seconds 60 --items 100000

Prints, as JSON, the seconds of two starts (the first reads the rows, the second finds them in the database) and the median, the
95th percentile and the longest time in milliseconds of a page, of an item and of a submission. On a busy machine look at the CPU
time per request: the other times are mostly waiting for a core, the client's too.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
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

import numpy as np
import psutil


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
        with serving(folder) as (_, first, _):
            pass
        with contextlib.closing(Store(folder)) as store:
            tokens = [add_labeler(store, f"labeler {n}") for n in range(args.labelers)]
        with serving(folder) as (url, second, server):
            times = asyncio.run(load(url, tokens, args.every, args.seconds))
            server_cpu = sum(psutil.Process(server).cpu_times()[:2])
    requests = sum(map(len, times.values()))
    result: dict[str, object] = {
        "start_s": {"reading": round(first, 2), "again": round(second, 2)},
        "server_cpu_ms_per_request": round(1000 * server_cpu / requests, 2),
        "client_cpu_ms_per_request": round(1000 * time.process_time() / requests, 2),
        "load_average": os.getloadavg()[0],
    }
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
def serving(folder: Path) -> Iterator[tuple[str, float, int]]:
    started = time.monotonic()
    command = [sys.executable, "-u", "-m", "pipeline.cli", "label", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if match := re.search(r"serving at (\S+);", line):
                    yield match[1], time.monotonic() - started, process.pid
                    break
        finally:
            process.terminate()


async def load(url: str, tokens: list[str], every: float, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each kind of request."""
    times: dict[str, list[float]] = defaultdict(list)
    host, port = url.removeprefix("http://").split(":")
    end = time.monotonic() + seconds
    await asyncio.gather(*(labeler(host, int(port), token, every, end, times) for token in tokens))
    return times


async def labeler(host: str, port: int, token: str, every: float, end: float, times: dict[str, list[float]]) -> None:
    """One labeler on one connection. HTTP is written by hand: a client library would need more of the machine than the server."""
    await asyncio.sleep(random.uniform(0, every))
    reader, writer = await asyncio.open_connection(host, port)

    async def timed(kind: str, line: str, body: bytes = b"") -> bytes:
        started = time.monotonic()
        head = f"{line} HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {token}\r\nContent-Length: {len(body)}\r\n"
        writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200 "), answer
        length = re.search(rb"content-length: (\d+)", answer)
        assert length
        content = await reader.readexactly(int(length[1]))
        times[kind].append(1000 * (time.monotonic() - started))
        return content

    await timed("page", "GET /")
    while time.monotonic() < end:
        item = json.loads(await timed("item", "GET /api/item"))["item"]
        await asyncio.sleep(random.uniform(0.8, 1.2) * every)
        answer = {"ranks": [1, 2], "strength": 2}
        label = {"item": item, "request": uuid.uuid4().hex, "answer": answer, "seconds": every}
        await timed("submit", "POST /api/label", json.dumps(label).encode())
    writer.close()


if __name__ == "__main__":
    main()
