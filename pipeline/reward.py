"""Stage 3: a reward model from labelers' comparisons and rankings, on TRL's RewardTrainer.

    accelerate launch pipeline/reward.py --config recipes/demo/reward.yaml

Every ranking is one example: each response is scored once, all its pairs enter one step, their mean is the prompt's
loss (I22, section 3.5). A comparison is a ranking of two. Scores are centred so that demonstrations average 0.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.algorithms.preference import ranking_loss
from pipeline.arguments import RewardArguments
from pipeline.checkpoints import tokenizer_hashes, verify_parent
from pipeline.data.collators import RankingCollator
from pipeline.data.comparisons import pairs_of, sift, summary
from pipeline.data.encoding import PLAIN_TEMPLATE, ChatEncoder
from pipeline.data.records import Record
from pipeline.data.sources import Source, fingerprint, read_sources, replace_records
from pipeline.data.splits import split_records
from pipeline.errors import UserError
from pipeline.metrics import PairAccuracy
from pipeline.models.adapters import lora_config, save_merged
from pipeline.models.loading import assign_pad, disable_dropout, load_tokenizer, refuse_beyond_context
from pipeline.models.scalar_head import init_head, load_scalar_model, score_ids, set_offset
from pipeline.scoring import call_function, import_function, source_sha256
from pipeline.stage import Run, launch, refuse_sharded
from pipeline.training import (
    StageTrainer,
    prepare_trainer,
    save_whole,
    share_batches,
    train,
    training_arguments,
)

import datasets
import torch
from torch.utils.data import DataLoader
from transformers import set_seed
from trl import RewardConfig, RewardTrainer

logger = logging.getLogger("pipeline.reward")  # __name__ is __main__ under accelerate launch


def main(run: Run[RewardArguments]) -> None:
    args = run.args
    refuse_sharded("reward scores in whole models")
    parent = verify_parent(args.parent, ("pretrain", "sft", "reward", "ppo"))
    sources = read_sources(args.datasets, "ranking", args.data_root)
    demonstrations = read_sources(args.center_on, "demonstration", args.data_root)
    truth = import_function(args.truth) if args.truth else None
    tokenizer = load_tokenizer(parent.path)
    parent.refuse_other_tokenizer(tokenizer)
    run.output.inputs = {
        "parent": parent.weights_sha256,
        "data": fingerprint(sources),
        "center_on": fingerprint(demonstrations),
        "tokenizer": tokenizer_hashes(tokenizer),
        "truth": source_sha256(truth) if truth else None,
    }
    if run.already_done():
        return
    sources = [_sift(source, args) for source in sources]
    records = [record for source in sources for record in source.records]
    trained, held_out, outsiders = _split(records, args)

    set_seed(args.seed)
    model = load_scalar_model(parent.path, args.quantization)
    refuse_beyond_context(model.config, args.max_tokens, "max_tokens")
    if not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_TEMPLATE
        logger.warning("reward: the parent has no chat template; a plain one was assigned and is saved")
    if note := assign_pad(tokenizer, model):
        logger.warning("reward: %s", note)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if parent.stage != "reward":
        std = init_head(model, args.head_std, args.seed)
        logger.info("reward: new head, weights from N(0, %.4f²)", std)
    if args.disable_dropout:
        disable_dropout(model)
    if args.epochs > 1:
        logger.warning("reward: %.3g epochs; comparisons overfit past the first (I22)", args.epochs)

    encoder = ChatEncoder(tokenizer)
    rows, eval_rows, outsider_rows = (
        encode(encoder, part, args, name)
        for part, name in ((trained, "training"), (held_out, "held-out"), (outsiders, "held-out labelers'"))
    )
    if not rows or not eval_rows:
        raise UserError(
            f"{len(rows)} rankings to train on and {len(eval_rows)} held out; both are needed: "
            "raise max_tokens, change held_out_fraction or give more rankings"
        )
    trainer = RankingTrainer(
        model=model,
        args=training_arguments(RewardConfig, run, disable_dropout=False, max_length=None),
        train_dataset=datasets.Dataset.from_list([_tensors_only(row) for row in rows]),
        eval_dataset=datasets.Dataset.from_list([_tensors_only(row) for row in eval_rows]),
        data_collator=RankingCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        peft_config=lora_config(model, args.lora, "SEQ_CLS") if args.lora else None,
    )
    prepare_trainer(trainer, run)
    logger.info(
        "reward: %d rankings with %d pairs, %d held out", len(rows), sum(len(r["pairs"]) for r in rows), len(eval_rows)
    )
    resumed = train(trainer, run)

    if args.lora is None:
        save_whole(trainer, tokenizer)
    elif run.is_main:
        trained = trainer.accelerator.unwrap_model(trainer.model)
        save_merged(trained, load_scalar_model(parent.path), tokenizer, Path(args.output_dir))
    run.barrier()
    final = load_scalar_model(args.output_dir).to(trainer.accelerator.device).eval()
    offset = _demonstration_mean(final, encoder, demonstrations, args, run)
    if run.is_main:
        set_offset(final, offset)
        final.config.save_pretrained(args.output_dir)
        metrics = measure(final, tokenizer.pad_token_id, eval_rows, outsider_rows, truth, args.truth)
        metrics |= {
            "score_offset": offset,
            "rankings": len(rows),
            "pairs": sum(len(r["pairs"]) for r in rows),
            "steps": trainer.state.global_step,
        }
        scores = metrics["scores"]
        logger.info("reward: held-out scores %.2f ± %.2f", scores["mean"], scores["std"])
    else:
        metrics = {}
    run.finish(
        parents=[parent.record()],
        datasets=[s.provenance() for s in [*sources, *demonstrations]],
        tokenizer=tokenizer,
        metrics=metrics,
        flops=trainer.state.total_flos,
        resumed_from=resumed,
        summary=_summary(metrics),
    )


def _summary(metrics: dict[str, Any]) -> str:
    if not metrics:
        return ""
    low, high = metrics["accuracy_ci95"]
    text = f"held-out accuracy {metrics['accuracy']:.1%} [{low:.1%}, {high:.1%}]"
    if "noise_ceiling" in metrics:
        text += f" of a ceiling of {metrics['noise_ceiling']:.1%}"
    if "held_out_labeler_accuracy" in metrics:
        text += f", held-out labelers {metrics['held_out_labeler_accuracy']:.1%}"
    return text


class RankingTrainer(StageTrainer, RewardTrainer):
    """RewardTrainer on whole rankings: every response scored once, all pairs of a prompt in one element."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset  # encoded already

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **_no_cache(model))
        loss = ranking_loss(
            outputs.logits[:, 0].float(),
            inputs["better"],
            inputs["worse"],
            inputs["target"],
            inputs["margin"],
            inputs["pair_weight"],
            inputs["prompts"],
        )
        return (loss, outputs) if return_outputs else loss

    def measure(self) -> dict[str, float]:
        """Held-out loss and accuracy: means over prompts and over pairs, over all processes."""
        state, sums = self.accelerator, torch.zeros(4, dtype=torch.float64)
        rows: Any = self.eval_dataset
        batches = DataLoader(rows, batch_size=self.eval_rows, collate_fn=self.data_collator)
        with torch.no_grad():
            for batch, counts in share_batches(batches, state):
                batch = {key: value.to(state.device) for key, value in batch.items()}
                loss, outputs = self.compute_loss(self.model, batch, return_outputs=True)
                if not counts:
                    continue
                difference = outputs.logits[batch["better"], 0] - outputs.logits[batch["worse"], 0]
                strict = batch["target"] != 0.5
                right = ((difference > 0).double() + 0.5 * (difference == 0).double())[strict].sum()
                prompts = batch["prompts"].item()
                sums += torch.tensor([loss.item() * prompts, prompts, right.item(), strict.sum().item()])
        sums = state.gather(sums.to(state.device)[None]).sum(0)
        return {"loss": float(sums[0] / sums[1]), "accuracy": float(sums[2] / sums[3].clamp(min=1))}


def _no_cache(model: Any) -> dict[str, bool]:
    config = model.module.config if hasattr(model, "module") else model.config
    return {"use_cache": False} if hasattr(config, "use_cache") else {}


def _sift(source: Source, args: RewardArguments) -> Source:
    """Drop (or refuse) rankings that cannot be trained on, saying how many, why and where."""
    kept, problems = sift(source.records, args.ties)
    if problems:
        if args.problems == "error":
            line, reason = problems[0]
            raise UserError(
                f"{reason}; {len(problems)} such rankings in all, `problems: drop` leaves them out",
                file=source.location,
                line=line,
            )
        logger.warning("reward: %s", summary(problems, source.location))
    return replace_records(source, kept)


def _split(records: list[Record], args: RewardArguments) -> tuple[list[Record], list[Record], list[Record]]:
    """(training, held-out prompts by training labelers, held-out prompts by held-out labelers)."""
    labelers = {record.get("labeler") for record in records}
    for name in args.held_out_labelers:
        if name not in labelers:
            known = ", ".join(sorted(str(x) for x in labelers if x)) or "none"
            raise UserError(f"held_out_labelers: no ranking by {name!r}; labelers: {known}")
    insiders = [r for r in records if r.get("labeler") not in args.held_out_labelers]
    outsiders = [r for r in records if r.get("labeler") in args.held_out_labelers]
    trained, held_out = split_records(insiders, args.held_out_fraction)
    # An outsider may have ranked a prompt that insiders trained on; only prompts unseen in training count for him.
    seen = {repr(r["prompt"]) for r in trained}
    return trained, held_out, [r for r in outsiders if repr(r["prompt"]) not in seen]


def encode(encoder: ChatEncoder, records: list[Record], args: RewardArguments, name: str) -> list[dict[str, Any]]:
    """Token ids of every response with its prompt, and the pairs; rankings that are too long are counted and left out."""
    rows, too_long = [], []
    for record in records:
        prompt = encoder.prompt_ids(record["prompt"])
        ids = [prompt + encoder.response_ids(response) for response in record["responses"]]
        if max(map(len, ids)) > args.max_tokens:
            too_long.append(record["line"])
            continue
        rows.append(
            {
                "ids": ids,
                "pairs": pairs_of(record["ranks"], args.ties),
                "margin": float(record.get("margin", 0.0)),
                "record": record,
            }
        )
    if too_long:
        lines = ", ".join(map(str, too_long[:5])) + (", …" if len(too_long) > 5 else "")
        logger.warning(
            "reward: %d of %d %s rankings hold a text over max_tokens (%d) and are left out (lines %s)",
            len(too_long),
            len(records),
            name,
            args.max_tokens,
            lines,
        )
    return rows


def _tensors_only(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("ids", "pairs", "margin")}


def _demonstration_mean(
    model: Any, encoder: ChatEncoder, demonstrations: list[Source], args: RewardArguments, run: Run[Any]
) -> float:
    """Mean raw score of demonstrations (A14): what the offset must take off."""
    rows, too_long = [], 0
    for source in demonstrations:
        for record in source.records:
            ids = encoder.prompt_ids(record["messages"][:-1]) + encoder.response_ids(record["messages"][-1]["content"])
            if len(ids) <= args.max_tokens:
                rows.append(ids)
            else:
                too_long += 1
    if too_long and run.is_main:
        logger.warning(
            "reward: center_on: %d demonstrations over max_tokens (%d) are left out", too_long, args.max_tokens
        )
    if not rows:
        logger.warning("reward: no demonstrations to centre scores on (`center_on:`); the offset is 0")
        return 0.0
    set_offset(model, 0.0)
    return float(score_ids(model, rows, encoder.tokenizer.pad_token_id).double().mean())


def measure(
    model: Any,
    pad_id: int,
    held_out: list[dict[str, Any]],
    outsiders: list[dict[str, Any]],
    truth: Callable[..., Any] | None,
    truth_name: str | None,
) -> dict[str, Any]:
    """Held-out accuracy with its interval over prompts, by labeler, and what the labelers' noise would allow."""
    judged = _judge(model, pad_id, held_out)
    overall = _accuracy(judged)
    metrics: dict[str, Any] = {
        "accuracy": overall["accuracy"],
        "accuracy_ci95": overall["ci95"],
        "held_out_pairs": overall["pairs"],
    }
    flat = torch.tensor([s for j in judged for s in j["scores"]])
    metrics["scores"] = {"mean": float(flat.mean()), "std": float(flat.std())}
    everyone = judged + (_judge(model, pad_id, outsiders) if outsiders else [])
    by_labeler: dict[str, list[dict[str, Any]]] = {}
    for item in everyone:
        by_labeler.setdefault(item["record"].get("labeler", "unnamed"), []).append(item)
    metrics["accuracy_by_labeler"] = {name: _accuracy(items)["accuracy"] for name, items in sorted(by_labeler.items())}
    if outsiders:
        metrics["held_out_labeler_accuracy"] = _accuracy(everyone[len(judged) :])["accuracy"]
    if truth is not None and truth_name is not None:
        for item in everyone:
            record = item["record"]
            prompt = record["prompt"][-1]["content"]
            n = len(record["responses"])
            item["scores"] = call_function(truth, truth_name, [prompt] * n, record["responses"], [record["row"]] * n)
        metrics["noise_ceiling"] = _accuracy(judged)["accuracy"]
        metrics["noise_ceiling_by_labeler"] = {
            name: _accuracy(items)["accuracy"] for name, items in sorted(by_labeler.items())
        }
    return metrics


def _judge(model: Any, pad_id: int, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    flat = score_ids(model, [ids for row in rows for ids in row["ids"]], pad_id).tolist()
    judged, start = [], 0
    for row in rows:
        judged.append({"record": row["record"], "pairs": row["pairs"], "scores": flat[start : start + len(row["ids"])]})
        start += len(row["ids"])
    return judged


def _accuracy(judged: list[dict[str, Any]]) -> dict[str, Any]:
    better, worse, groups = [], [], []
    for index, item in enumerate(judged):
        for pair in item["pairs"]:
            if pair["target"] != 0.5:
                better.append(item["scores"][pair["better"]])
                worse.append(item["scores"][pair["worse"]])
                groups.append(index)
    found: dict[str, Any] = PairAccuracy()._compute(better, worse, groups)
    return found


if __name__ == "__main__":
    launch("reward", RewardArguments, main)
