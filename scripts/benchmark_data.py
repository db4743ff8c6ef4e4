"""Measures how a stage reads its data: memory, and the seconds to its first step, with and without the data cache.

    python scripts/benchmark_data.py                                    # all stages, 10, 100 and 1,000 MB
    python scripts/benchmark_data.py --stages pretrain --megabytes 10 100
    python scripts/benchmark_data.py --stages streamed --megabytes 10 100    # one pass over a streamed dataset, no training

The rows are made of lines of text files (`--corpus`, default: `shared/data/corpora` where it is, else words drawn at random
from a fixed list), in which every tenth word is replaced by a number, so that no two rows are alike. The tokenizer is a
byte-level BPE of 8,192 tokens, trained on the first 2 MB; the model has one layer of 16 units. The stage itself runs, in a
process of its own, up to its first step: once with an empty cache, once more with the filled one. `rss_mb` is the highest
resident memory of any one process above what it had when all imports were done. For pretrain the same texts also go
through `datasets.map` with the tokenizer alone, on as many processes as there are cores.

The last line is JSON, a list of one object per stage: `stage`, `megabytes`, `rss_mb`, `first_start_s`, `second_start_s`,
`rows`, `tokens_per_s`, and `map_s` for pretrain; lists stand in the order of the sizes.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("pretrain", "sft", "reward", "ppo")
TRAINED_ON = 2 << 20  # bytes of text for the tokenizer
VOCABULARY = 8192
SIZES = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------- rows


def lines_of(corpus: Path | None) -> list[list[str]]:
    """The words of the lines that rows are made of."""
    files = sorted(corpus.glob("*.txt")) if corpus and corpus.is_dir() else []
    if files:
        lines = [line.split() for file in files for line in file.read_text(encoding="utf-8").splitlines()]
        return [words for words in lines if len(words) > 3]
    chance = random.Random(0)
    words = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(2, 9))) for _ in range(20_000)]
    return [chance.choices(words, k=chance.randint(5, 60)) for _ in range(20_000)]


def rows(stage: str, lines: list[list[str]], seed: int = 0) -> Iterator[dict[str, Any]]:
    """Rows of a stage without an end; of the text, every tenth word is a number of its own."""
    chance, number = random.Random(seed), itertools.count()

    def text(parts: int) -> str:
        words = [word for _ in range(parts) for word in chance.choice(lines)]
        words[::10] = [f"{next(number)}" for _ in words[::10]]
        return " ".join(words)

    while True:
        if stage == "pretrain":
            yield {"text": text(12)}
        elif stage == "sft":
            yield {"prompt": text(1), "response": text(2)}
        elif stage == "reward":
            yield {
                "prompt": text(1),
                "chosen": text(1),
                "rejected": text(1),
                "labeler": f"labeler {chance.randrange(9)}",
            }
        else:
            yield {"prompt": text(1)}


def write_rows(path: Path, stage: str, megabytes: int, lines: list[list[str]]) -> int:
    """Rows up to a size in JSON Lines; returns their number."""
    size = count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows(stage, lines):
            size += file.write(json.dumps(row) + "\n")
            count += 1
            if size >= megabytes * 1_000_000:
                return count
    raise AssertionError


def make_parents(work: Path, lines: list[list[str]]) -> None:
    """A policy and a reward model of one layer, with a tokenizer of the text."""
    from pipeline.models.tokenizer_training import train_tokenizer

    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    texts = itertools.takewhile(lambda pair: pair[0] < TRAINED_ON, _with_size(rows("pretrain", lines, seed=1)))
    tokenizer = train_tokenizer((text for _, text in texts), VOCABULARY)
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    for name, cls in (("policy", LlamaForCausalLM), ("scalar", LlamaForSequenceClassification)):
        cls(LlamaConfig(vocab_size=len(tokenizer), num_labels=1, **SIZES, **ids)).save_pretrained(work / name)
        tokenizer.save_pretrained(work / name)


def _with_size(documents: Iterator[dict[str, Any]]) -> Iterator[tuple[int, str]]:
    size = 0
    for row in documents:
        size += len(row["text"])
        yield size, row["text"]


# ---------------------------------------------------------------------------------------------- one start


def recipe(stage: str, work: Path, data: Path) -> dict[str, Any]:
    values: dict[str, Any] = {
        "datasets": [{"path": str(data)}], "output_dir": str(work / "out"), "data_cache": str(work / "cache"), "precision": "fp32",
        "learning_rate": 1e-4, "held_out_fraction": 0.01, "parent": str(work / "policy"),
    }  # fmt: skip
    if stage == "ppo":
        return values | {"reward": str(work / "scalar"), "total_rollouts": 1, "prompts_per_rollout": 8, "long_prompts": "drop",
                         "max_prompt_tokens": 256, "max_response_tokens": 16}  # fmt: skip
    values |= {"examples_per_step": 2, "examples_per_device": 1, "max_steps": 10, "eval_steps": None}
    return values | ({"block_tokens": 256} if stage == "pretrain" else {"max_tokens": 256})


class Memory:
    """The highest resident memory of any one process of a tree, looked at ten times a second, in MB.

    Pages of the program that forked processes share count in each of them.
    """

    def __init__(self) -> None:
        import psutil

        self.process, self.highest = psutil.Process(), 0.0
        self.before = self.process.memory_info().rss / 1e6
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        import psutil

        while True:
            for process in [self.process, *self.process.children(recursive=True)]:
                try:
                    self.highest = max(self.highest, process.memory_info().rss / 1e6)
                except psutil.NoSuchProcess:
                    continue
            time.sleep(0.1)


class FirstStep(Exception):
    """The stage has come to its first step."""


def start(stage: str, recipe_file: Path) -> None:
    """Run a stage up to its first step and print seconds and memory as JSON."""
    from pipeline.config.stages import STAGES as ARGUMENTS
    from pipeline.training.stage import launch

    import torch
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    module = importlib.import_module(f"pipeline.{stage}")
    torch.set_num_threads(1)
    memory, began = Memory(), time.perf_counter()

    def stop(*_: Any, **__: Any) -> None:
        raise FirstStep

    handle = register_optimizer_step_pre_hook(stop)
    try:
        launch(stage, ARGUMENTS[stage], module.main, ["--config", str(recipe_file)])
    except FirstStep:
        seconds = time.perf_counter() - began
        time.sleep(0.2)  # the last look at the memory
        print(json.dumps({"seconds": seconds, "rss_mb": memory.highest - memory.before}), flush=True)
    finally:
        handle.remove()


def stream(folder: Path) -> None:
    """Ask for all blocks of one pass over a streamed folder and print seconds and memory as JSON."""
    import pipeline.pretrain  # noqa: F401 - what a run has imported
    from pipeline.data.entries import DatasetEntry
    from pipeline.data.streaming import HubStream, StreamedBlocks
    from pipeline.models.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(str(folder.parent / "policy"))
    memory, began = Memory(), time.perf_counter()
    source = HubStream(DatasetEntry(hub=str(folder), streaming=True), held_out_fraction=0.01)
    blocks = StreamedBlocks(source, tokenizer, 1024, isolated=True, seed=0, ahead=64)
    for number, _ in enumerate(blocks, 1):
        if number == 1:
            first = time.perf_counter() - began
        if number % 1000 == 0 and blocks.seen(number).passes:
            break
    seconds, tokens = time.perf_counter() - began, blocks.seen(number).tokens
    time.sleep(0.2)  # the last look at the memory
    result = {"rss_mb": round(memory.highest - memory.before), "first_block_s": round(first, 1)}
    print(json.dumps(result | {"tokens_per_s": round(tokens / seconds)}), flush=True)
    blocks.close()


def measured_start(stage: str, recipe_file: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--start", stage, str(recipe_file)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    if done.returncode:
        raise SystemExit(f"{stage} failed: {done.stderr[-3000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def map_seconds(data: Path, work: Path) -> tuple[float, int]:
    """(seconds, tokens) of `datasets.map` with the tokenizer alone over the same texts."""
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work / "policy")
    table = datasets.load_dataset("json", data_files=str(data), split="train", cache_dir=str(work / "hf"))
    began = time.perf_counter()
    mapped = table.map(
        lambda batch: {"ids": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]},
        batched=True,
        num_proc=os.cpu_count(),
        remove_columns=table.column_names,
    )
    seconds = time.perf_counter() - began
    tokens = sum(len(chunk.values) for chunk in mapped.data.column("ids").chunks)
    return seconds, tokens


# ---------------------------------------------------------------------------------------------- all of them


def measure(stage: str, megabytes: int, work: Path, lines: list[list[str]]) -> dict[str, Any]:
    if stage == "streamed":
        (work / stage).mkdir(exist_ok=True)
        write_rows(work / stage / "train.jsonl", "pretrain", megabytes, lines)
        result = {"megabytes": megabytes, **measured_start(stage, work / stage)}
        print(stage, json.dumps(result), flush=True)
        return result
    data, recipe_file = work / f"{stage}.jsonl", work / f"{stage}.yaml"
    result = {"megabytes": megabytes, "rows": write_rows(data, stage, megabytes, lines)}
    recipe_file.write_text(json.dumps(recipe(stage, work, data)))
    starts = []
    for _ in range(2):
        shutil.rmtree(work / "out", ignore_errors=True)
        starts.append(measured_start(stage, recipe_file))
    result |= {
        "rss_mb": round(max(s["rss_mb"] for s in starts)),
        "first_start_s": round(starts[0]["seconds"], 1),
        "second_start_s": round(starts[1]["seconds"], 1),
    }
    if stage == "pretrain":
        seconds, tokens = map_seconds(data, work)
        result |= {"map_s": round(seconds, 1), "tokens_per_s": round(tokens / starts[0]["seconds"])}
    result["mb_per_s"] = round(megabytes / starts[0]["seconds"], 2)
    for folder in ("cache", "hf"):
        shutil.rmtree(work / folder, ignore_errors=True)
    data.unlink()
    print(stage, json.dumps(result), flush=True)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=[*STAGES, "streamed"])
    parser.add_argument("--megabytes", nargs="+", type=int, default=[10, 100, 1000])
    parser.add_argument("--corpus", type=Path, default=ROOT.parent / "shared" / "data" / "corpora")
    parser.add_argument("--start", nargs=2, metavar=("STAGE", "RECIPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "ACCELERATE_USE_CPU": "true"}
    if args.start:
        name, path = args.start
        stream(Path(path)) if name == "streamed" else start(name, Path(path))
        return 0
    lines = lines_of(args.corpus)
    results = []
    with tempfile.TemporaryDirectory(prefix="benchmark-data-") as folder:
        make_parents(Path(folder), lines)
        for stage in args.stages:
            measured = [measure(stage, size, Path(folder), lines) for size in args.megabytes]
            names = dict.fromkeys(name for result in measured for name in result)
            results.append({"stage": stage, **{name: [result[name] for result in measured] for name in names}})
    print(json.dumps(results if len(results) > 1 else results[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
