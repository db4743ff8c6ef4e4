"""Rankings kept together against the same pairs shuffled, epoch by epoch: does it overfit as InstructGPT found (section 3.5)?

    python scripts/study_shuffled_pairs.py --parent runs/demo/sft --data data_cards/demo_comparisons/train.jsonl --rankings 700

Both arms start from the same folder and head, see the same pairs as often, with as many pairs per step and a constant learning rate; after
each epoch both are measured on the same held-out rankings. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from pipeline.config.reward import RewardArguments
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
import numpy as np
import torch
from transformers import TrainerCallback, set_seed
from trl import RewardConfig


class Measure(TrainerCallback):
    """Held-out loss (mean over rankings of the mean over pairs) and accuracy after every epoch."""

    def __init__(self, rows: list[dict[str, Any]], pad_id: int):
        self.rows, self.pad_id = rows, pad_id
        self.epochs: list[dict[str, float]] = []

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        model.eval()
        pairs = score_rankings(lambda ids: score_ids(model, ids, self.pad_id), self.rows)
        model.train()
        losses = np.logaddexp(0.0, -pairs.margin)
        means = np.bincount(pairs.ranking, weights=losses) / np.bincount(pairs.ranking)
        self.epochs.append({"loss": float(means.mean()), "accuracy": pairs.accuracy().accuracy})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parent", required=True)
    parser.add_argument("--data", required=True, help="JSONL of rankings")
    parser.add_argument("--rankings", type=int, default=700, help="trained on")
    parser.add_argument("--held-out", type=int, default=200, help="rankings measured on")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rankings-per-step", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = load_tokenizer(args.parent)
    recipe = RewardArguments(
        output_dir="-", parent=args.parent, datasets=[DatasetEntry(path=args.data)], max_tokens=args.max_tokens
    )
    train, held_out = split_records(read_records(Path(args.data), PARSERS["ranking"]), 0.1)
    encoder = ChatEncoder(tokenizer)
    together = [
        r
        for r in encode_rankings(
            encoder, train[: args.rankings], RankingOptions(max_tokens=recipe.max_tokens), "training"
        )
        if r["pairs"]
    ]
    test = [
        r
        for r in encode_rankings(
            encoder, held_out[: args.held_out], RankingOptions(max_tokens=recipe.max_tokens), "held-out"
        )
        if r["pairs"]
    ]
    apart = [
        {
            **row,
            "ids": [row["ids"][p["better"]], row["ids"][p["worse"]]],
            "pairs": [{**p, "better": 0, "worse": 1}],
            "num_pairs": 1,
        }
        for row in together
        for p in row["pairs"]
    ]
    pairs_per_step = round(args.rankings_per_step * len(apart) / len(together))
    results: dict[str, list[list[dict[str, float]]]] = {"together": [], "shuffled": []}
    for seed in range(args.seeds):
        for arm, rows, batch in (("together", together, args.rankings_per_step), ("shuffled", apart, pairs_per_step)):
            mixed = list(rows)
            random.Random(seed).shuffle(mixed)
            set_seed(seed)
            model = load_scalar_model(args.parent)
            model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
            init_head(model, None, seed)
            disable_noise(model)
            measure = Measure(test, tokenizer.pad_token_id)
            with tempfile.TemporaryDirectory() as folder:
                config = RewardConfig(
                    output_dir=folder, seed=seed, data_seed=seed, per_device_train_batch_size=batch, num_train_epochs=args.epochs,
                    learning_rate=args.learning_rate, lr_scheduler_type="constant_with_warmup", warmup_steps=20, adam_beta2=0.95, bf16=False,
                    use_cpu=True, gradient_checkpointing=False, remove_unused_columns=False, save_strategy="no", report_to="none",
                    disable_tqdm=True, logging_steps=10**6, max_length=None, disable_dropout=False, dataloader_pin_memory=False,
                )  # fmt: skip
                trainer: Any = RankingTrainer(
                    model=model, args=config, processing_class=tokenizer, data_collator=RankingCollator(tokenizer.pad_token_id),
                    train_dataset=datasets.Dataset.from_list([for_training(r) for r in mixed], features=FEATURES), callbacks=[measure],
                )  # fmt: skip
                trainer.log = lambda *_: None
                trainer.train()
            results[arm].append(measure.epochs)
            line = ", ".join(f"{m['loss']:.4f} ({m['accuracy']:.1%})" for m in measure.epochs)
            print(f"seed {seed} {arm}: held-out loss (accuracy) after each epoch: {line}", flush=True)
    print(
        json.dumps(
            {
                "rankings": len(together), "pairs": len(apart), "held_out_rankings": len(test),
                **{arm: {key: [[round(m[key], 4) for m in run] for run in runs] for key in ("loss", "accuracy")} for arm, runs in results.items()},
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
