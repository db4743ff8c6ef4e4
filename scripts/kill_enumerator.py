"""Shows that a stage killed at any file operation and started again ends as if nothing had happened.

    python scripts/kill_enumerator.py                          # every operation of all four stages, in both variants
    python scripts/kill_enumerator.py --stages sft --sample 20

Each stage runs at tiny size, once undisturbed. In a second run its folder is copied before each file operation (open for
writing, rename, unlink, mkdir, rmdir, chmod, a library's save, also with that file half written), from the first checkpoint
to the end. SIGKILL does not undo what the system has accepted, so the copy is what a kill at that moment leaves. Every copy
is then resumed; weights, metrics, FLOPs and history must be bit for bit those of the undisturbed run.
The last line is `identical N of N`; the exit code is 0 if all are.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {
    "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}  # fmt: skip

from pipeline.config.stages import STAGES
from pipeline.training import history
from pipeline.training.identity import weights_sha256
from pipeline.training.stage import launch

import safetensors.torch
import torch
import yaml

MODULES = {stage: importlib.import_module(f"pipeline.{stage}") for stage in STAGES}  # imports are paid for once
VARIANTS = ("steps", "epochs")
TIMEOUT = 300  # seconds of one run
SPEEDS = ("seconds", "tokens_per_second", "model_flops_per_second", "episodes_per_second", "response_tokens_per_second")
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "two",
    "dogs",
    "ran",
    "past",
    "an",
    "old",
    "red",
    "barn",
    "and",
    "sang",
    "of",
    "rain",
]
EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.symlink"}
SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}  # fmt: skip
SHARED: dict[str, Any] = {
    "precision": "fp32", "threads": 1, "learning_rate": 1e-3, "logging_steps": 2, "save_steps": 4, "held_out_fraction": 0.2,
}  # fmt: skip
TRAINER: dict[str, Any] = {
    **SHARED,
    "examples_per_step": 4,
    "examples_per_device": 2,
    "eval_steps": 4,
    "warmup_steps": 2,
}


# ---------------------------------------------------------------------------------------------- tiny stages


def write_data(folder: Path) -> None:
    chance = random.Random(0)

    def text(words: int) -> str:
        return " ".join(chance.choices(WORDS, k=words))

    rows: dict[str, list[dict[str, Any]]] = {
        "corpus": [{"text": text(30)} for _ in range(20)],
        "demonstrations": [{"prompt": text(5), "response": text(6)} for _ in range(20)],
        "comparisons": [{"prompt": text(5), "chosen": text(8), "rejected": text(4)} for _ in range(20)],
        "prompts": [{"prompt": text(5)} for _ in range(24)],
    }
    for name, records in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def recipe(folder: Path, stage: str, variant: str) -> dict[str, Any]:
    """A stage of a few steps: `steps` ends within an epoch, `epochs` saves at every step, the edges of epochs too."""
    data = {"pretrain": "corpus", "sft": "demonstrations", "reward": "comparisons", "ppo": "prompts"}[stage]
    values: dict[str, Any] = {"datasets": [{"path": str(folder / f"{data}.jsonl")}]}
    if stage == "ppo":
        values |= {
            **SHARED, "parent": str(folder / "sft"), "reward": str(folder / "reward"), "total_rollouts": 5, "prompts_per_rollout": 8,
            "minibatches": 2, "max_prompt_tokens": 32, "max_response_tokens": 8, "save_steps": 2, "eval_rollouts": 2,
            "eval_prompts": 4, "kl_control": "adaptive", "kl_target": 0.1, "scale_scores": "running",
        }  # fmt: skip
        return values | ({"best_metric": "score"} if variant == "epochs" else {"ema_decay": 0.9})
    values |= TRAINER
    each_step = {"logging_steps": 1, "save_steps": 1, "eval_steps": 1}
    values |= {"max_steps": 10} if variant == "steps" else {"epochs": 2.0, **each_step}
    if stage == "pretrain":
        values |= {
            "config_class": "LlamaConfig", "model_config": SIZES, "train_tokenizer": {"vocab_size": 300}, "block_tokens": 64,
        }  # fmt: skip
    else:
        values |= {"parent": str(folder / ("pretrain" if stage == "sft" else "sft")), "max_tokens": 64}
    if stage == "sft":
        values |= {"best_metric": "loss", "packing": False}
    return values


def run_stage(recipe_file: Path, stage: str, output: Path) -> int:
    """The stage in a child process; returns its exit code, or 124 where it hung."""

    def body() -> None:
        launch(stage, STAGES[stage], MODULES[stage].main, ["--config", str(recipe_file), "--output_dir", str(output)])

    return in_child(body, output.with_name(output.name + ".log"))


def in_child(body: Callable[[], None], log: Path) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with log.open("ab") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            body()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return wait_for(child)


def wait_for(child: int) -> int:
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return 124


# ---------------------------------------------------------------------------------------------- file operations


class Operations:
    """Counts the file operations in a folder from its first checkpoint on, and copies it before chosen ones.

    Args:
        chosen: numbers of operations to copy the folder before, or None: all are counted and none copied.
    """

    def __init__(self, folder: Path, copies: Path, chosen: set[int] | None):
        self.folder, self.copies, self.chosen = folder, copies, chosen
        self.count, self.busy, self.names = 0, False, []  # type: ignore[var-annotated]

    def start(self) -> None:
        sys.addaudithook(self._audit)
        serialize, save = safetensors.torch.serialize_file, torch.save

        def serialize_file(tensors: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            serialize(tensors, path, *args, **kwargs)
            self._written(path)

        def torch_save(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            save(value, path, *args, **kwargs)
            self._written(path)

        safetensors.torch.serialize_file = serialize_file
        torch.save = torch_save

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.busy:
            return
        if event == "open":
            _, mode, flags = arguments
            writes = any(letter in (mode or "") for letter in "wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
            if not writes:
                return
        elif event not in EVENTS:
            return
        path = arguments[0]
        if not isinstance(path, str | bytes | os.PathLike):
            return
        name = os.fsdecode(path)
        if not os.path.isabs(name) or Path(name).is_relative_to(
            self.folder
        ):  # rmtree names entries relative to a handle
            self._operation(f"{event} {name.removeprefix(str(self.folder))}")

    def _written(self, path: Any) -> None:
        """A library wrote a file past Python's hooks: a kill may leave it half written, or whole."""
        if isinstance(path, str | os.PathLike) and Path(path).is_relative_to(self.folder):
            self._operation(f"half of {path}", torn=Path(path))
            self._operation(f"after {path}")

    def _operation(self, name: str, torn: Path | None = None) -> None:
        if not any(entry.startswith("checkpoint-") for entry in os.listdir(self.folder)):
            return
        if self.chosen is None or self.count in self.chosen:
            self.busy = True
            if self.chosen is not None:
                copy = self.copies / str(self.count)
                shutil.copytree(self.folder, copy, symlinks=True)
                if torn is not None:
                    os.truncate(copy / torn.relative_to(self.folder), torn.stat().st_size // 2)
            self.busy = False
        self.names.append(name)
        self.count += 1


def watched_run(recipe_file: Path, stage: str, output: Path, copies: Path, chosen: set[int] | None) -> list[str]:
    """Run a stage and return the names of its file operations; copies of its folder before the chosen ones in `copies`."""
    copies.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True)
    operations = Operations(output, copies, chosen)

    def body() -> None:
        operations.start()
        try:
            launch(
                stage, STAGES[stage], MODULES[stage].main, ["--config", str(recipe_file), "--output_dir", str(output)]
            )
        finally:
            operations.busy = True
            (copies / "names.json").write_text(json.dumps(operations.names))

    code = in_child(body, output.with_name(output.name + ".log"))
    if code:
        raise SystemExit(f"{stage} failed undisturbed: {output.with_name(output.name + '.log').read_text()[-3000:]}")
    names: list[str] = json.loads((copies / "names.json").read_text())
    return names


# ---------------------------------------------------------------------------------------------- comparison


def result(folder: Path) -> dict[str, Any]:
    """Everything of a finished folder that a kill may not change."""
    lineage = json.loads((folder / "lineage.json").read_text())
    kept = ("weights_sha256", "config_sha256", "adapter_sha256", "fingerprint", "metrics", "flops", "tokenizer_sha256")
    rows = [{k: v for k, v in row.items() if not k.startswith(SPEEDS)} for row in history.read(folder)]
    parts = {part: weights_sha256(folder / part) for part in ("value", "ema") if (folder / part).is_dir()}
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.name not in ("log.txt", ".lock"))
    return {**{key: lineage[key] for key in kept}, "history": rows, "parts": parts, "files": names}


def difference(folder: Path, expected: dict[str, Any]) -> str | None:
    if not (folder / "lineage.json").is_file():
        return "not finished"
    actual = result(folder)
    return ", ".join(key for key in expected if actual[key] != expected[key]) or None


def enumerate_kills(work: Path, stage: str, variant: str, sample: int | None, seed: int) -> tuple[int, int]:
    """(identical, tried) of one stage and variant."""
    place = work / f"{stage}-{variant}"
    place.mkdir()
    recipe_file = place / f"{stage}.yaml"
    recipe_file.write_text(yaml.safe_dump({**recipe(work, stage, variant), "output_dir": "unused"}))
    names = watched_run(recipe_file, stage, place / "whole", place / "none", None)
    expected = result(place / "whole")
    numbers = list(range(len(names)))
    if sample is not None and sample < len(numbers):
        numbers = sorted(random.Random(f"{seed} {stage} {variant}").sample(numbers, sample))
    names = watched_run(recipe_file, stage, place / "again", place / "copies", set(numbers))
    reasons = {len(names): difference(place / "again", expected)}  # undisturbed, as a control
    for number in numbers:
        copy = place / "copies" / str(number)
        if not copy.is_dir():
            reasons[number] = "not reached"
            continue
        code = run_stage(recipe_file, stage, copy)
        reasons[number] = f"exit code {code}" if code else difference(copy, expected)
        if reasons[number] is None:
            shutil.rmtree(copy)
    for number, reason in reasons.items():
        if reason:
            name = names[number] if number < len(names) else "undisturbed"
            print(f"{stage} {variant}: operation {number} ({name}): {reason}", flush=True)
    right = sum(reason is None for reason in reasons.values())
    print(f"{stage} {variant}: {len(names)} operations, identical {right} of {len(reasons)}", flush=True)
    return right, len(reasons)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--sample", type=int, metavar="K", help="operations of each stage and variant; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--keep", metavar="FOLDER", help="work here and leave what differs")
    args = parser.parse_args()
    work = Path(args.keep or tempfile.mkdtemp(prefix="kills-")).resolve()
    work.mkdir(parents=True, exist_ok=True)
    write_data(work)
    last = max(list(STAGES).index(stage) for stage in args.stages)
    for stage in list(STAGES)[:last]:  # the parents of the stages that are killed
        recipe_file = work / f"{stage}.yaml"
        recipe_file.write_text(yaml.safe_dump({**recipe(work, stage, "steps"), "output_dir": "unused"}))
        if run_stage(recipe_file, stage, work / stage):
            raise SystemExit(f"{stage} failed: {(work / (stage + '.log')).read_text()[-3000:]}")
    counts = [
        enumerate_kills(work, stage, variant, args.sample, args.seed)
        for stage in args.stages
        for variant in args.variants
    ]
    right, tried = (sum(column) for column in zip(*counts, strict=True))
    if args.keep is None:
        shutil.rmtree(work)
    print(f"identical {right} of {tried}")
    return 0 if right == tried else 1


if __name__ == "__main__":
    sys.exit(main())
