"""PPO's two engines on the same work: tokens per second of sampling, and seconds of a whole rollout with its update.

    PYTHON=vllm-env/bin/python scripts/rollout_server.sh runs/demo/sft 8000 --max-model-len 256 --dtype float32
    python scripts/benchmark_engines.py --policy runs/demo/sft --url http://localhost:8000 --rounds 5

Sampling: both engines answer the same prompts in turn, `--tokens` long each (nothing ends a response), so that both compute as
many tokens; the weights are sent before. A whole rollout: PPO with either engine, from prompts to updated weights, the transfer of
weights included; `--rollouts` of them in a process, the first of which does not count. `--threads` are the trainer's; the
server's are set where it is started. The last line is JSON: each round's figures, and the ratios vllm / local.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
REWARD = "def score(prompts, responses, rows):\n    return [float(len(set(r.split()))) for r in responses]\n"


def sampling(args: argparse.Namespace) -> dict[str, list[float]]:
    """Tokens per second of each round."""
    import torch  # isort: skip
    from pipeline.data.records import PARSERS, read_records
    from pipeline.evaluation.answers import load_sampler
    from pipeline.rollout.engine import LocalEngine, per_row_uniforms
    from pipeline.rollout.vllm_folders import ServedFolders

    torch.set_num_threads(args.threads)
    recipe = {"max_response_tokens": args.tokens, "generation_rows": args.prompts}
    sampler = load_sampler(Path(args.policy), recipe, ServedFolders.connect(args.url))
    settings = dataclasses.replace(sampler.settings, stop_ids=[])
    records = read_records(Path(args.data), PARSERS["prompt"])[: args.prompts]
    ids = [sampler.encoder.prompt_ids(record["prompt"]) for record in records]
    engines = {"local": LocalEngine(settings), "vllm": dataclasses.replace(sampler.engine, settings=settings)}
    speeds: dict[str, list[float]] = {"local": [], "vllm": []}
    for number in range(-1, args.rounds):  # the first warms up
        uniforms = per_row_uniforms(number, range(len(ids)), args.tokens)
        for name in ("local", "vllm") if number % 2 else ("vllm", "local"):
            start = time.perf_counter()
            responses = engines[name].sample(sampler.model, ids, uniforms)
            if number >= 0:
                speeds[name].append(sum(len(r.ids) for r in responses) / (time.perf_counter() - start))
    return speeds


def rollouts(args: argparse.Namespace, engine: str) -> dict[str, float]:
    """Mean seconds of a rollout of a PPO run with an engine: until it is collected, and its update; and the worst drift."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "rewards.py").write_text(REWARD)
        values: dict[str, Any] = {
            "parent": str(Path(args.policy).resolve()), "reward": "rewards:score", "output_dir": str(folder / "out"), "held_out_fraction": 0.05,
            "datasets": [{"path": str(Path(args.data).resolve())}], "prompts_per_rollout": args.prompts, "minibatches": 4,
            "total_rollouts": args.rollouts, "max_response_tokens": args.tokens, "max_prompt_tokens": args.prompt_tokens,
            "missing_eos": "none", "ppo_epochs": 1, "precision": "fp32", "threads": args.threads, "quiet": True, "learning_rate": 1e-5,
            "roles": args.roles, "engine": engine, **({"engine_url": args.url} if engine == "vllm" else {}),
        }  # fmt: skip
        (folder / "ppo.yaml").write_text(yaml.safe_dump(values))
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{folder}", "OMP_NUM_THREADS": str(args.threads)}
        command = [sys.executable, str(ROOT / "pipeline" / "ppo.py"), "--config", str(folder / "ppo.yaml")]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        rows = [json.loads(line) for line in (folder / "out" / "history.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "seconds_update" in row][1:]
    collect, update = (statistics.mean(row[f"seconds_{part}"] for row in rows) for part in ("collect", "update"))
    return {
        "collect": collect,
        "update": update,
        "drift": max(row.get("sampling_drift_worst_response", 0.0) for row in rows),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True, help="folder that the server was started with")
    parser.add_argument("--url", required=True, help="the server's address")
    parser.add_argument("--data", default="data_cards/demo_prompts/train.jsonl", help="JSONL with a column `prompt`")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="of a response")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of a prompt at most")
    parser.add_argument("--roles", choices=("separate", "shared_trunk", "adapters"), default="separate")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rollouts", type=int, default=0, help="of each PPO run; 0: sampling alone")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="the trainer's")
    args = parser.parse_args(argv)
    speeds = sampling(args)
    ratios = [a / b for a, b in zip(speeds["vllm"], speeds["local"], strict=True)]
    result: dict[str, Any] = {"tokens_per_second": speeds, "sampling_ratio": ratios}
    if args.rollouts:
        runs = {name: rollouts(args, name) for name in ("local", "vllm")}
        whole = {name: run["collect"] + run["update"] for name, run in runs.items()}
        result |= {"rollouts": runs, "rollout_ratio": whole["vllm"] / whole["local"]}
    for name in speeds:
        print(
            f"{name}: {statistics.median(speeds[name]):.1f} tokens/s ({min(speeds[name]):.1f}–{max(speeds[name]):.1f})"
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
