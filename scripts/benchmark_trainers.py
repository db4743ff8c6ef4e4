"""Demonstrations or blocks per second of the SFT and the pretraining stage, against transformers' Trainer and TRL's SFTTrainer.

    python scripts/benchmark_trainers.py --stage sft --run runs/demo --rounds 5
    python scripts/benchmark_trainers.py --stage pretrain --run runs/demo --rounds 5 -- --max_steps 200

The stage runs as it is, with the demo's recipe. Before the race, one start of it writes down the rows that it trains on. The
others are given these rows with the same optimizer, schedule, rows per step, precision and steps (`same`), and, for SFT, the
examples of these rows one per padded row, with as many examples per step as the packed rows hold on average (`padded`). A
round runs every side once, each in a process of its own, in turns; only `Trainer.train` is timed, without evaluation and
checkpoints. The last line is JSON; ratios are ours over theirs: above 1, ours is faster.
"""

from __future__ import annotations

import argparse
import importlib
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

ROOT = Path(__file__).resolve().parent.parent
PEERS = {"sft": ("trainer", "trl", "trainer-padded", "trl-padded"), "pretrain": ("trainer", "trl")}
IGNORE = -100
TRAIN_ROWS, SETTINGS, RESULT = "rows.json", "settings.json", "result.json"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=PEERS, required=True)
    parser.add_argument("--run", required=True, help="a finished run of the demo, whose stages are the parents")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--peers", nargs="+", help="these alone, of: trainer, trl, trainer-padded, trl-padded")
    parser.add_argument("--cpu-time", action="store_true", help="ratios of CPU time, on a machine that others use too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*", help="further flags of the stage, after --")
    return parser.parse_args(argv)


def run_stage(args: argparse.Namespace, folder: Path, *, write_rows: bool) -> None:
    """The stage itself; its `train` is timed, or only writes down what would be trained on."""
    stage = importlib.import_module(f"pipeline.{args.stage}")
    from pipeline.config.stages import STAGES
    from pipeline.training.stage import launch

    train = stage.train

    def timed(trainer: Any, run: Any) -> Any:
        if write_rows:
            rows = [trainer.train_dataset[index] for index in range(len(trainer.train_dataset))]
            whole = [
                {name: [int(i) for i in row[name]] for name in ("input_ids", "position_ids", "labels")} for row in rows
            ]
            (folder / TRAIN_ROWS).write_text(json.dumps(whole), encoding="utf-8")
            theirs = trainer.args
            names = ("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "weight_decay",
                     "adam_beta2", "max_grad_norm", "warmup_steps", "num_train_epochs", "max_steps", "bf16", "logging_steps")  # fmt: skip
            settings = {name: getattr(theirs, name) for name in names}
            settings |= {
                "lr_scheduler_type": str(theirs.lr_scheduler_type.value),
                "lr_scheduler_kwargs": dict(theirs.lr_scheduler_kwargs or {}),
            }
            (folder / SETTINGS).write_text(json.dumps(settings), encoding="utf-8")
            trainer.model.save_pretrained(folder / "start")
            trainer.processing_class.save_pretrained(folder / "start")
            os._exit(0)
        trainer.args.save_strategy = "no"  # else the last step writes a checkpoint
        started = _clocks()
        result = train(trainer, run)
        _write_result(folder, started, trainer)
        return result

    stage.train = timed
    flags = [
        "--config",
        str(ROOT / "recipes" / "demo" / f"{args.stage}.yaml"),
        "--output_dir",
        str(folder / f"out-{time.time_ns()}"),
    ]
    flags += ["--report_to", "none", "--eval_steps", "null", "--save_steps", "1000000", "--threads", str(args.threads)]
    if args.stage == "sft":
        flags += ["--parent", str(Path(args.run) / "pretrain"), "--best_metric", "none"]
    launch(args.stage, STAGES[args.stage], stage.main, [*flags, *args.flags])


def run_peer(args: argparse.Namespace, folder: Path) -> None:
    """transformers' Trainer or TRL's SFTTrainer on the same rows."""
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(args.threads)
    set_seed(0)
    name, _, padded = args.child.partition("-")
    rows = json.loads((folder / TRAIN_ROWS).read_text(encoding="utf-8"))
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    if padded:
        packed = len(rows)
        rows = [example for row in rows for example in examples_of(row)]
        settings["per_device_train_batch_size"] = round(settings["per_device_train_batch_size"] * len(rows) / packed)
    tokenizer = AutoTokenizer.from_pretrained(folder / "start")
    model = AutoModelForCausalLM.from_pretrained(folder / "start", dtype=torch.float32)
    options: dict[str, Any] = {
        **settings, "output_dir": str(folder / "peer"), "seed": 0, "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "remove_unused_columns": False,
        "gradient_checkpointing": False, "dataloader_pin_memory": False,
    }  # fmt: skip

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in batch)
        fill = {
            "input_ids": lambda n: [tokenizer.pad_token_id] * n,
            "labels": lambda n: [IGNORE] * n,
            "position_ids": lambda n: list(range(n)),
        }
        names = ("input_ids", "labels") if padded else tuple(fill)
        tensors = {key: torch.tensor([row[key] + fill[key](longest - len(row[key])) for row in batch]) for key in names}
        if padded:
            lengths = torch.tensor([len(row["input_ids"]) for row in batch])
            tensors["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        return tensors

    shared: dict[str, Any] = {
        "model": model,
        "train_dataset": datasets.Dataset.from_list(rows),
        "data_collator": collate,
        "processing_class": tokenizer,
    }
    trainer: Any
    if name == "trl":
        trainer = SFTTrainer(
            args=SFTConfig(**options, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}), **shared
        )
    else:
        trainer = Trainer(args=TrainingArguments(**options), **shared)
    started = _clocks()
    trainer.train()
    _write_result(folder, started, trainer)


def examples_of(row: dict[str, list[int]]) -> list[dict[str, list[int]]]:
    """The examples of a packed row, cut where positions restart."""
    starts = [index for index, position in enumerate(row["position_ids"]) if position == 0]
    return [
        {name: values[start:end] for name, values in row.items()}
        for start, end in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True)
    ]


def _clocks() -> tuple[float, float]:
    """Wall and CPU seconds."""
    return time.perf_counter(), time.process_time()


def _write_result(folder: Path, started: tuple[float, float], trainer: Any) -> None:
    seconds, cpu_seconds = (now - then for now, then in zip(_clocks(), started, strict=True))
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    result = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "last_loss": losses[-1] if losses else None,
    }
    (folder / RESULT).write_text(json.dumps(result), encoding="utf-8")


def in_child(args: argparse.Namespace, side: str, folder: Path) -> dict[str, Any]:
    """One side in a process of its own."""
    (folder / RESULT).unlink(missing_ok=True)
    command = [sys.executable, __file__, "--stage", args.stage, "--run", args.run, "--threads", str(args.threads)]
    command += ["--child", side, "--folder", str(folder), "--", *args.flags]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(args.threads),
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    result = folder / RESULT
    if done.returncode or (side != "rows" and not result.is_file()):
        sys.exit(f"{side} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return json.loads(result.read_text(encoding="utf-8")) if side != "rows" else {}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.child:
        folder = Path(args.folder)
        if args.child in ("rows", "ours"):
            return run_stage(args, folder, write_rows=args.child == "rows")
        return run_peer(args, folder)
    sides = ("ours", *(side for side in PEERS[args.stage] if not args.peers or side in args.peers))
    clock = "cpu_seconds" if args.cpu_time else "seconds"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        in_child(args, "rows", folder)
        speeds: dict[str, list[float]] = {side: [] for side in sides}
        for number in range(args.rounds):
            for side in sides[number % len(sides) :] + sides[: number % len(sides)]:
                result = in_child(args, side, folder)
                speeds[side].append(result["epochs"] / result[clock])  # of the same rows: epochs per second compare
                print(f"round {number + 1} {side}: {result}", flush=True)
    ratios = {
        side: sorted(round(ours / theirs, 3) for ours, theirs in zip(speeds["ours"], speeds[side], strict=True))
        for side in sides[1:]
    }
    summary = {
        side: {"median": statistics.median(values), "lowest": values[0], "highest": values[-1]}
        for side, values in ratios.items()
    }
    print(
        json.dumps(
            {
                "stage": args.stage,
                "ratios": summary,
                "rounds": args.rounds,
                "threads": args.threads,
                "clock": clock,
                "flags": args.flags,
            }
        )
    )
    return None


if __name__ == "__main__":
    main()
