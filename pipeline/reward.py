"""Stage 3: a reward model from labelers' comparisons and rankings, on TRL's RewardTrainer.

    accelerate launch pipeline/reward.py --config recipes/demo/reward.yaml

Every ranking is one example: each response is scored once, all its pairs enter one step, their mean is the prompt's
loss (I22, section 3.5). A comparison is a ranking of two. Scores are centred so that demonstrations average 0.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.algorithms.preference import ranking_loss
from pipeline.config.functions import import_function, source_sha256
from pipeline.config.reward import RewardArguments
from pipeline.config.stages import SUPPORT
from pipeline.data.arrow_storage import SpooledRecords, arrow_rows
from pipeline.data.batching import LengthGroupedSampler
from pipeline.data.collators import RankingCollator
from pipeline.data.comparisons import digest, pairs_of, sift, summary
from pipeline.data.encoding import ChatEncoder
from pipeline.data.mixing import mixture_indices
from pipeline.data.records import Record
from pipeline.data.sources import Source, fingerprint, read_sources, replace_records
from pipeline.data.splits import is_held_out, labeler_folds
from pipeline.errors import UserError
from pipeline.evaluation.reward_model import Truth, evaluate_reward_model
from pipeline.models.loading import disable_noise, fit_embeddings, load_causal_lm, refuse_beyond_context
from pipeline.models.lora import lora_config, save_merged, scale_adapter_head
from pipeline.models.reward_model import init_head, load_scalar_model, no_cache, scale_head, score_ids, set_offset
from pipeline.models.tokenizers import (
    add_missing_rows,
    assign_pad,
    assign_template,
    forbidden_token_ids,
    load_tokenizer,
    stop_token_ids,
)
from pipeline.rollout.engine import LocalEngine, SamplingSettings, per_row_uniforms
from pipeline.training.lineage import verify_parent
from pipeline.training.run import Run
from pipeline.training.stage import launch
from pipeline.training.trainer import (
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
    parent = verify_parent(args.parent, SUPPORT["reward"].parents)
    sources = read_sources(args.datasets, "ranking", args.data_root, spool=True)
    demonstrations = read_sources(args.center_on, "demonstration", args.data_root)
    truth = import_function(args.truth) if args.truth else None
    tokenizer = load_tokenizer(parent.path)
    parent.check_tokenizer(tokenizer)
    run.output.inputs = {
        "parent": parent.as_inputs(tokenizer),
        "data": fingerprint(sources),
        "center_on": fingerprint(demonstrations),
        "truth": source_sha256(truth) if truth else None,
    }
    if run.already_done():
        return
    sources = [_sift(source, args) for source in sources]
    split = _split(sources, args)

    set_seed(args.seed)
    model = load_scalar_model(parent.path, args.quantization)
    refuse_beyond_context(model.config, args.max_tokens, "max_tokens")
    if note := assign_template(tokenizer, model, args.chat_template, args.output_dir):
        logger.warning("reward: %s", note)
    for note in (add_missing_rows(tokenizer, model), assign_pad(tokenizer, model)):
        if note:
            logger.warning("reward: %s", note)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if parent.stage != "reward":
        std = init_head(model, args.head_std, args.seed)
        logger.info("reward: new head, weights from N(0, %.4f²)", std)
    if args.disable_dropout:
        disable_noise(model)
    if args.epochs > 1:
        logger.warning("reward: %.3g epochs; comparisons overfit past the first (I22)", args.epochs)

    encoder = ChatEncoder(tokenizer)
    for note in encoder.notes:
        logger.warning("reward: %s", note)
    rows, eval_rows, outsider_rows = _encode_all(encoder, sources, split, args)
    if not len(rows) or not eval_rows:
        raise UserError(
            f"{len(rows)} rankings to train on and {len(eval_rows)} held out; both are needed: "
            "raise max_tokens, change held_out_fraction or give more rankings"
        )
    pairs = sum(rows["num_pairs"])
    trainer = RankingTrainer(
        model=model,
        args=training_arguments(
            RewardConfig,
            run,
            disable_dropout=False,
            max_length=None,
        ),
        train_dataset=rows,
        eval_dataset=datasets.Dataset.from_list([tensors_only(row) for row in eval_rows], features=FEATURES),
        data_collator=RankingCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        peft_config=lora_config(model, args.lora, "SEQ_CLS", tokenizer) if args.lora else None,
    )
    trainer.tie_margin = args.tie_margin if args.ties == "margin" else 0.0
    if args.group_by_length:
        trainer.order = LengthGroupedSampler(rows["length"], args.examples_per_step, args.seed)
    prepare_trainer(trainer, run)
    logger.info("reward: %d rankings with %d pairs, %d held out", len(rows), pairs, len(eval_rows))
    resumed = train(trainer, run)

    if args.lora is None:
        save_whole(trainer, tokenizer)
    elif run.is_main:
        trained = trainer.accelerator.unwrap_model(trainer.model)
        save_merged(trained, load_scalar_model(parent.path), tokenizer, Path(args.output_dir))
    run.processes.barrier()
    final = load_scalar_model(args.output_dir).to(trainer.accelerator.device).eval()
    if run.is_main:
        scale = _unit_variance(final, encoder, parent.path, sources, split, args)
        offset = _demonstration_mean(final, encoder, demonstrations, args, run)
        set_offset(final, offset)
        metrics = evaluate_reward_model(
            final,
            tokenizer.pad_token_id,
            eval_rows,
            outsider_rows,
            truth=Truth(str(args.truth), truth) if truth else None,
            tie_margin=trainer.tie_margin,
        )
        final.config.score_temperature = metrics.get("temperature", 1.0)
        final.config.save_pretrained(args.output_dir)
        metrics |= {
            "score_offset": offset,
            "score_scale": scale,
            "kept_out_labelers": split.kept_out,
            "rankings": len(rows),
            "pairs": pairs,
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

    tie_margin = 0.0
    order: LengthGroupedSampler | None = None  # of the training rows, instead of a random one

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.order or super()._get_train_sampler(train_dataset)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset  # encoded already

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **no_cache(model))
        loss = ranking_loss(
            outputs.logits[:, 0].float(),
            inputs["better"],
            inputs["worse"],
            inputs["target"],
            inputs["margin"],
            inputs["pair_weight"],
            inputs["prompts"],
            inputs["tie"],
            self.tie_margin,
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
                strict = ~batch["tie"]
                right = ((difference > 0).double() + 0.5 * (difference == 0).double())[strict].sum()
                prompts = batch["prompts"].item()
                sums += torch.tensor([loss.item() * prompts, prompts, right.item(), strict.sum().item()])
        sums = state.gather(sums.to(state.device)[None]).sum(0)
        return {"loss": float(sums[0] / sums[1]), "accuracy": float(sums[2] / sums[3].clamp(min=1))}


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
    assert isinstance(source.records, SpooledRecords)
    return replace_records(source, source.records.select(kept))


@dataclass
class Split:
    """Where each record of all sources goes: (source, position) in reading order."""

    trained: list[tuple[int, int]] = field(default_factory=list)
    held_out: list[tuple[int, int]] = field(default_factory=list)  # unseen prompts, labelers of the training data
    outsiders: list[tuple[int, int]] = field(default_factory=list)  # unseen prompts, labelers kept out
    kept_out: list[str] = field(default_factory=list)  # those labelers


def _split(sources: list[Source], args: RewardArguments) -> Split:
    """By labeler, then by the record's own `split` or its prompt's hash."""
    labelers = {record.get("labeler") for source in sources for record in source.records}
    known = sorted(str(name) for name in labelers if name)
    for key, names in (("held_out_labelers", args.held_out_labelers), ("labeler_weights", args.labeler_weights)):
        for name in names:
            if name not in labelers:
                raise UserError(f"{key}: no ranking by {name!r}; labelers: {', '.join(known) or 'none'}")
    split = Split(kept_out=list(args.held_out_labelers))
    if args.labeler_folds is not None:
        folds = labeler_folds(known, args.labeler_folds)
        split.kept_out = folds[args.labeler_fold]
        logger.info("reward: fold %d of %d keeps out %s", args.labeler_fold, len(folds), ", ".join(split.kept_out))
    seen: set[bytes] = set()
    strangers: list[tuple[int, int, bytes]] = []
    for number, source in enumerate(sources):
        for position, record in enumerate(source.records):
            prompt = digest(repr(record["prompt"]))
            if record.get("labeler") in split.kept_out:
                strangers.append((number, position, prompt))
            elif is_held_out(record, args.held_out_fraction):
                split.held_out.append((number, position))
            else:
                seen.add(prompt)
                split.trained.append((number, position))
    # An outsider may have ranked a prompt that insiders trained on; only prompts unseen in training count for him.
    split.outsiders = [(number, position) for number, position, prompt in strangers if prompt not in seen]
    return split


# Rows as the collator takes them; `length` and `num_pairs` are for batching and counting.
FEATURES = datasets.Features(
    {
        "ids": datasets.List(datasets.List(datasets.Value("int32"))),
        "pairs": datasets.List(
            {
                "better": datasets.Value("int32"),
                "worse": datasets.Value("int32"),
                "target": datasets.Value("float32"),
                "tie": datasets.Value("bool"),
            }
        ),
        "margin": datasets.Value("float32"),
        "weight": datasets.Value("float32"),
        "length": datasets.Value("int32"),
        "num_pairs": datasets.Value("int32"),
    }
)


def tensors_only(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in FEATURES}


def _encode_all(
    encoder: ChatEncoder, sources: list[Source], split: Split, args: RewardArguments
) -> tuple[datasets.Dataset, list[dict[str, Any]], list[dict[str, Any]]]:
    """(training rows on disk, held-out rows, held-out labelers' rows)."""

    def records(part: list[tuple[int, int]]) -> Iterator[Record]:
        return (sources[number].records[position] for number, position in part)

    tables = []
    for number in range(len(sources)):
        part = [place for place in split.trained if place[0] == number]
        tables.append(arrow_rows(map(tensors_only, encode(encoder, records(part), args, "training")), FEATURES))
    epoch = mixture_indices([len(table) for table in tables], [source.weight for source in sources], args.seed)
    rows = datasets.concatenate_datasets(tables).select(epoch)
    held_out = list(encode(encoder, records(split.held_out), args, "held-out"))
    return rows, held_out, list(encode(encoder, records(split.outsiders), args, "held-out labelers'"))


def encode(
    encoder: ChatEncoder, records: Iterable[Record], args: RewardArguments, name: str
) -> Iterator[dict[str, Any]]:
    """Token ids of every response with its prompt, and the pairs; rankings that are too long are counted and left out.

    Raises:
        UserError: a confidence that the recipe's use of it does not allow.
    """
    too_long, total = [], 0
    for record in records:
        total += 1
        prompt = encoder.prompt_ids(record["prompt"])
        ids = [prompt + encoder.response_ids(response) for response in record["responses"]]
        if max(map(len, ids)) > args.max_tokens:
            too_long.append(record["line"])
            continue
        target, weight = _trust(record, args)
        pairs = pairs_of(record["ranks"], args.ties, target)
        yield {
            "ids": ids,
            "pairs": pairs,
            "margin": float(record.get("margin", 0.0)),
            "weight": weight,
            "length": max(map(len, ids)),
            "num_pairs": len(pairs),
            "prompt_tokens": len(prompt),
            "record": record,
        }
    if too_long:
        lines = ", ".join(map(str, too_long[:5])) + (", …" if len(too_long) > 5 else "")
        logger.warning(
            "reward: %d of %d %s rankings hold a text over max_tokens (%d) and are left out (lines %s)",
            len(too_long),
            total,
            name,
            args.max_tokens,
            lines,
        )


def _trust(record: Record, args: RewardArguments) -> tuple[float, float]:
    """(target of the record's strict pairs, weight of its loss)."""
    target, weight = 1.0, args.labeler_weights.get(record.get("labeler", ""), 1.0)
    confidence = record.get("confidence")
    if confidence is not None and args.confidence == "target":
        if not 0.5 <= confidence <= 1:
            raise UserError(
                f"line {record['line']}: confidence {confidence} is no probability of being right (0.5 to 1); "
                "say `confidence: weight` or `ignore`"
            )
        target = float(confidence)
    if confidence is not None and args.confidence == "weight":
        if confidence < 0:
            raise UserError(
                f"line {record['line']}: confidence {confidence} cannot weigh a record; it must be 0 or more"
            )
        weight *= float(confidence)
    smoothing = args.label_smoothing
    return target * (1 - smoothing) + (1 - target) * smoothing, weight


def _unit_variance(
    model: Any, encoder: ChatEncoder, policy: str, sources: list[Source], split: Split, args: RewardArguments
) -> float:
    """Scale the head so that scores of the parent's own answers have variance 1 (Z19); returns the factor."""
    if args.unit_variance_samples is None:
        return 1.0
    prompts: dict[bytes, Any] = {}
    for number, position in split.trained:
        record = sources[number].records[position]
        prompts.setdefault(digest(repr(record["prompt"])), record["prompt"])
        if len(prompts) == args.unit_variance_samples:
            break
    ids = [encoder.prompt_ids(prompt) for prompt in prompts.values()]
    room = args.max_tokens - max(map(len, ids))
    if room < 1:
        raise UserError("unit_variance_samples: the prompts leave no room under max_tokens for an answer")
    answering = load_causal_lm(policy).to(next(model.parameters()).device).eval()
    tokenizer = encoder.tokenizer
    fit_embeddings(answering, len(tokenizer))
    stop_ids = stop_token_ids(encoder, answering.generation_config)
    settings = SamplingSettings(
        max_new_tokens=room,
        stop_ids=stop_ids,
        forbidden_ids=forbidden_token_ids(tokenizer, answering.config.get_text_config().vocab_size, stop_ids),
        pad_id=tokenizer.pad_token_id,
    )
    sampled = LocalEngine(settings).sample(answering, ids, per_row_uniforms(args.seed, range(len(ids)), room))
    answers = [response.ids for response in sampled]
    std = (
        score_ids(
            model,
            [p + encoder.finished_ids(a, stop_ids) for p, a in zip(ids, answers, strict=True)],
            tokenizer.pad_token_id,
        )
        .std()
        .item()
    )
    if not std > 0:
        raise UserError("unit_variance_samples: all answers of the parent score alike; leave the key out")
    scale_head(model, 1 / std)
    model.save_pretrained(args.output_dir)
    if args.lora is not None:
        scale_adapter_head(Path(args.output_dir) / "adapter", 1 / std)
    logger.info("reward: scores divided by %.3f, their deviation over %d answers of the parent", std, len(ids))
    return 1 / std


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


if __name__ == "__main__":
    launch("reward", RewardArguments, main)
