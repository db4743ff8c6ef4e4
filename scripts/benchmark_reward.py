"""Comparisons per second of the reward stage on rankings, in alternation with TRL's RewardTrainer on the same pairs.

    python scripts/benchmark_reward.py --parent runs/demo/sft --data data_cards/demo_comparisons/train.jsonl --rounds 5

Both sides start from the same folder with the same head, read the same token ids, train one epoch with the same
optimizer, learning rate and pairs per step, and are measured on the same held-out pairs by the same code. Ours scores each
response of a ranking once; TRL's trainer knows pairs only, so each response goes through it once for each of its pairs.
Only training is timed. The last line is JSON; ratios are ours over TRL's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parent", required=True, help="folder of a causal LM with a chat template")
    parser.add_argument("--data", required=True, help="JSONL of rankings")
    parser.add_argument("--responses", type=int, default=4, help="K: rankings of so many responses are used")
    parser.add_argument("--rankings", type=int, default=600, help="rankings trained on in one round")
    parser.add_argument("--rounds", type=int, default=5, help="alternations")
    parser.add_argument("--rankings-per-step", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--child", choices=("ours", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def child(args: argparse.Namespace) -> None:
    """One side of one round, in a process of its own."""
    import torch  # isort: skip
    from pipeline.config.reward import RewardArguments
    from pipeline.data.batching import LengthGroupedSampler
    from pipeline.data.collators import RankingCollator
    from pipeline.data.encoded_rankings import FEATURES, RankingOptions, encode_rankings, for_training
    from pipeline.data.encoding import ChatEncoder
    from pipeline.data.entries import DatasetEntry
    from pipeline.data.records import PARSERS, read_records
    from pipeline.data.splits import split_records
    from pipeline.evaluation.reward_model import score_rankings
    from pipeline.models.loading import disable_noise
    from pipeline.models.reward_model import init_head, load_scalar_model, score_ids
    from pipeline.models.tokenizers import load_tokenizer
    from pipeline.reward import RankingTrainer

    import datasets
    from transformers import set_seed
    from trl import RewardConfig, RewardTrainer

    torch.set_num_threads(args.threads)
    tokenizer = load_tokenizer(args.parent)
    encoder = ChatEncoder(tokenizer)
    recipe = RewardArguments(
        output_dir=args.folder, parent=args.parent, datasets=[DatasetEntry(path=args.data)], max_tokens=args.max_tokens
    )
    records = [r for r in read_records(Path(args.data), PARSERS["ranking"]) if len(r["ranks"]) == args.responses]
    train, held_out = split_records(records, 0.1)
    rows = list(
        encode_rankings(encoder, train[: args.rankings], RankingOptions(max_tokens=recipe.max_tokens), "training")
    )
    rows = [row for row in rows if row["pairs"]]
    pairs = sum(len(row["pairs"]) for row in rows)
    test = [
        row
        for row in encode_rankings(encoder, held_out, RankingOptions(max_tokens=recipe.max_tokens), "held-out")
        if row["pairs"]
    ]

    set_seed(args.seed)
    model = load_scalar_model(args.parent)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    init_head(model, None, args.seed)
    disable_noise(model)
    per_step = args.rankings_per_step if args.child == "ours" else round(args.rankings_per_step * pairs / len(rows))
    config = RewardConfig(
        output_dir=args.folder, seed=args.seed, data_seed=args.seed, per_device_train_batch_size=per_step,
        num_train_epochs=1, learning_rate=args.learning_rate, lr_scheduler_type="linear", adam_beta2=0.95, bf16=False, use_cpu=True,
        gradient_checkpointing=False, remove_unused_columns=False, save_strategy="no", report_to="none", disable_tqdm=True,
        logging_steps=10**6, max_length=None, disable_dropout=False, optim="adamw_torch", dataloader_pin_memory=False,
    )  # fmt: skip
    shared: dict[str, Any] = {"model": model, "args": config, "processing_class": tokenizer}
    trainer: Any
    if args.child == "ours":
        table = datasets.Dataset.from_list([for_training(row) for row in rows], features=FEATURES)
        trainer = RankingTrainer(train_dataset=table, data_collator=RankingCollator(tokenizer.pad_token_id), **shared)
        trainer.order = LengthGroupedSampler(table["length"], args.rankings_per_step, args.seed)
        trainer.log = lambda *_: None  # the stage's own lines need the stage
    else:
        flat = [
            {"chosen_ids": row["ids"][pair["better"]], "rejected_ids": row["ids"][pair["worse"]]}
            for row in rows
            for pair in row["pairs"]
        ]
        trainer = RewardTrainer(train_dataset=datasets.Dataset.from_list(flat), **shared)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    model = trainer.model.eval()
    accuracy = score_rankings(lambda ids: score_ids(model, ids, tokenizer.pad_token_id), test).accuracy()
    print(
        json.dumps(
            {"comparisons_per_second": pairs / seconds, "seconds": seconds, "pairs": pairs, "steps": trainer.state.global_step,
             "accuracy": accuracy.accuracy, "ci95": accuracy.ci95, "held_out_pairs": accuracy.pairs, "threads": torch.get_num_threads()}
        )
    )  # fmt: skip


def main() -> None:
    args = parse()
    if args.child:
        return child(args)
    results: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    for number in range(args.rounds):
        for side in ("ours", "trl") if number % 2 == 0 else ("trl", "ours"):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, __file__, *sys.argv[1:], "--child", side, "--folder", folder]
                environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "ACCELERATE_USE_CPU": "true"}
                environment["PYTHONPATH"] = str(ROOT)
                done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
            result = json.loads(done.stdout.splitlines()[-1])
            results[side].append(result)
            print(
                f"round {number + 1} {side}: {result['comparisons_per_second']:.1f} comparisons/s, "
                f"{result['steps']} steps, {result['pairs']} pairs, accuracy {result['accuracy']:.1%} "
                f"[{result['ci95'][0]:.1%}, {result['ci95'][1]:.1%}]",
                flush=True,
            )
    ratios = [
        a["comparisons_per_second"] / b["comparisons_per_second"]
        for a, b in zip(results["ours"], results["trl"], strict=True)
    ]
    print(
        json.dumps(
            {
                "ratio_median": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "accuracy": {side: rounds[0]["accuracy"] for side, rounds in results.items()},
                "comparisons_per_second": {
                    side: statistics.median(r["comparisons_per_second"] for r in rounds)
                    for side, rounds in results.items()
                },
                "threads": args.threads,
            }
        )
    )
    return None


if __name__ == "__main__":
    main()
