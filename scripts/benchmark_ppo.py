"""Episodes per second and peak memory of PPO, in alternation with a peer on the same folders, prompts and settings.

    python scripts/benchmark_ppo.py --policy runs/demo/sft --reward runs/demo/reward \
        --prompts data_cards/demo_prompts/train.jsonl --roles separate --rounds 5 --peer 'python their_ppo.py --their flags'

The peer is a command that takes --policy, --reward, --prompts, --rollouts, --prompts-per-rollout, --minibatches,
--ppo-epochs, --max-response-tokens, --threads and --bf16, and prints one JSON line with episodes_per_second,
import_rss_mb and peak_rss_mb. Each round runs both, in alternating order. Loading, evaluating and saving count on
neither side; memory is the peak above that of the imports. The last line is JSON; ratios are ours over the peer's,
memory_ratio too (below 1: ours needs less).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True, help="SFT folder: policy and reference")
    parser.add_argument("--reward", required=True, help="reward model's folder")
    parser.add_argument("--prompts", required=True, help="JSONL with a column `prompt`")
    parser.add_argument("--roles", choices=("separate", "shared_trunk", "adapters"), default="separate")
    parser.add_argument("--rounds", type=int, default=5, help="alternations")
    parser.add_argument("--peer", help="command of the other side; without it, ours alone")
    parser.add_argument("--rollouts", type=int, default=4, help="rollouts in one timed run")
    parser.add_argument("--prompts-per-rollout", type=int, default=64)
    parser.add_argument("--minibatches", type=int, default=4)
    parser.add_argument("--ppo-epochs", type=int, default=4)
    parser.add_argument("--max-response-tokens", type=int, default=48)
    parser.add_argument("--micro-batch-tokens", type=int, default=4096, help="ours: tokens of one pass with gradients")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--processes", type=int, default=1, help="ours; they share the threads")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="ours")
    parser.add_argument("--peer-precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--child", metavar="FOLDER", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def child(args: argparse.Namespace) -> None:
    """Our side of one round, in a process of its own."""
    import torch  # isort: skip
    from pipeline import ppo
    from pipeline.config.ppo import PPOArguments
    from pipeline.training import history
    from pipeline.training.run import Run
    from pipeline.training.stage import launch

    for late in ("datasets", "trl.trainer.utils"):  # the stage imports them when it needs them, the peer at its start
        importlib.import_module(late)
    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    recipe = Path(args.child) / f"ppo-{os.environ.get('RANK', 0)}.yaml"
    data = [{"path": str(Path(args.prompts).resolve())}]
    values: dict[str, Any] = {
        "parent": args.policy, "reward": args.reward, "output_dir": str(Path(args.child) / "out"), "datasets": data,
        "held_out_fraction": 0.02, "roles": args.roles, "precision": args.precision, "threads": args.threads // args.processes, "quiet": True,
        "total_rollouts": args.rollouts, "prompts_per_rollout": args.prompts_per_rollout, "minibatches": args.minibatches,
        "ppo_epochs": args.ppo_epochs, "max_prompt_tokens": 64, "long_prompts": "drop", "save_steps": 10**6,
        "max_response_tokens": args.max_response_tokens, "micro_batch_tokens": args.micro_batch_tokens, "learning_rate": 1e-5, "kl_coef": 0.05,
    }  # fmt: skip
    if args.roles == "adapters":
        values["lora"] = {"r": 16, "alpha": 32}
    recipe.write_text(json.dumps(values))  # JSON is YAML
    peak: list[int] = []

    def stage(run: Run[PPOArguments]) -> None:
        training = ppo.prepare(run, ppo.open_inputs(run))
        ppo.train(training, run)
        peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)  # before the final evaluation
        ppo.finish(training, run)

    launch("ppo", PPOArguments, stage, ["--config", str(recipe)])
    rows = [row for row in history.read(Path(args.child) / "out") if "seconds" in row]  # written by rank 0, read by all
    metrics = json.loads((Path(args.child) / "out" / "metrics.json").read_text(encoding="utf-8"))
    seconds = sum(row["seconds"] for row in rows)
    measured = {
        "episodes_per_second": round(args.rollouts * args.prompts_per_rollout / seconds, 3),
        "seconds": round(seconds, 2),
        "collect_seconds": round(sum(row["seconds_collect"] for row in rows), 2),
        "update_seconds": round(sum(row["seconds_update"] for row in rows), 2),
        "response_tokens_mean": round(statistics.mean(row["response_tokens"] for row in rows), 1),
        "optimizer_steps": metrics["policy_steps"],
        "import_rss_mb": imported,
        "peak_rss_mb": peak[0],
        "processes": args.processes,
        "threads": torch.get_num_threads(),
        "dtype": args.precision,
    }
    (Path(args.child) / f"measured-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(measured))


def output_of(command: list[str]) -> dict[str, Any]:
    """The JSON in a command's last line."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=tempfile.gettempdir())
    try:
        printed: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        raise SystemExit(f"{shlex.join(command)} gave no JSON line:\n{done.stdout}\n{done.stderr[-3000:]}") from None
    return printed


def ours(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        flags = [
            f"--{name.replace('_', '-')}={value}"
            for name, value in vars(args).items()
            if value is not None and name not in ("peer", "child", "rounds", "peer_precision")
        ]
        command = [sys.executable, __file__, *flags, "--child", folder]
        environment = dict(os.environ)
        if args.processes > 1:
            launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(args.processes)]
            config = ["--config_file", str(ROOT / "recipes" / "accelerate" / "ddp.yaml"), "--main_process_port", "0"]
            command[1:1] = [*launcher, *config]
            environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(args.threads // args.processes)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        files = sorted(Path(folder).glob("measured-*.json"))
        if len(files) != args.processes:
            raise SystemExit(f"{shlex.join(command)} failed:\n{done.stdout}\n{done.stderr[-3000:]}")
        ranks = [json.loads(file.read_text()) for file in files]
        for name in ("import_rss_mb", "peak_rss_mb"):
            ranks[0][name] = sum(rank[name] for rank in ranks)
        return dict(ranks[0])


def theirs(args: argparse.Namespace) -> dict[str, Any]:
    names = (
        "policy", "reward", "prompts", "rollouts", "prompts_per_rollout", "minibatches", "ppo_epochs",
        "max_response_tokens", "threads",
    )  # fmt: skip
    flags = [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    return output_of([*shlex.split(args.peer), *flags, *(["--bf16"] if args.peer_precision == "bf16" else [])])


def memory(measured: dict[str, Any]) -> int:
    """Peak above the imports, MB."""
    return max(1, measured["peak_rss_mb"] - measured["import_rss_mb"])


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    for name in ("policy", "reward", "prompts"):
        setattr(args, name, str(Path(getattr(args, name)).resolve()))
    if args.child:
        child(args)
        return
    pairs: list[tuple[dict[str, Any], dict[str, Any] | None]] = []
    for number in range(args.rounds):
        if args.peer and number % 2:
            other = theirs(args)
            own = ours(args)
        else:
            own = ours(args)
            other = theirs(args) if args.peer else None
        pairs.append((own, other))
        print(f"round {number + 1}: ours {json.dumps(own)}")
        if other:
            ratio = own["episodes_per_second"] / other["episodes_per_second"]
            print(f"round {number + 1}: peer {json.dumps(other)}\nround {number + 1}: ratio {ratio:.2f}", flush=True)
    runs = [own for own, _ in pairs]
    summary: dict[str, Any] = {
        "roles": args.roles,
        "dtype": args.precision,
        "processes": args.processes,
        "episodes_per_second": statistics.median(run["episodes_per_second"] for run in runs),
        "phase_share": {
            phase: round(sum(run[f"{phase}_seconds"] for run in runs) / sum(run["seconds"] for run in runs), 3)
            for phase in ("collect", "update")
        },
        "memory_mb": statistics.median(map(memory, runs)),
    }
    if args.peer:
        raced = [(own, other) for own, other in pairs if other]
        ratios = [own["episodes_per_second"] / other["episodes_per_second"] for own, other in raced]
        summary |= {
            "peer_dtype": args.peer_precision,
            "ratio_median": round(statistics.median(ratios), 2),
            "ratio_min": round(min(ratios), 2),
            "ratio_max": round(max(ratios), 2),
            "memory_ratio": round(statistics.median(memory(own) / memory(other) for own, other in raced), 3),
            "peer_episodes_per_second": statistics.median(other["episodes_per_second"] for _, other in raced),
        }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
