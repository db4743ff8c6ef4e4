"""Stage 3: a reward model from labelers' comparisons and rankings, on TRL's RewardTrainer.

    accelerate launch pipeline/reward.py --config recipes/demo/reward.yaml

Every ranking is one example: each response is scored once, all its pairs enter one step, their mean is the prompt's
loss (InstructGPT, section 3.5). A comparison is a ranking of two. Scores are centred so that demonstrations average 0.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.algorithms.preference import ranking_loss
from pipeline.config.functions import import_function, source_sha256
from pipeline.config.reward import RewardArguments
from pipeline.config.stages import SUPPORT
from pipeline.data.batching import LengthGroupedSampler
from pipeline.data.collators import RankingCollator
from pipeline.data.comparisons import RankingSplit, labelers_of, split_rankings, stored_invalid_rankings, summary
from pipeline.data.encoded_rankings import RankingOptions, RankingTable, TrainingRows, store_rankings
from pipeline.data.encoding import ChatEncoder
from pipeline.data.mixing import mixture_indices
from pipeline.data.packing import Chosen, Joined, lazy_dataset
from pipeline.data.sources import Source, fingerprint, read_sources, replace_records
from pipeline.data.splits import labeler_folds
from pipeline.errors import UserError
from pipeline.evaluation.reward_model import Truth, measure_reward_model, reward_metrics
from pipeline.models.loading import check_batched_length, disable_noise
from pipeline.models.lora import lora_config
from pipeline.models.reward_model import init_head, load_scalar_model, no_cache, set_offset
from pipeline.models.tokenizers import complete_chat_model, load_tokenizer, template_identity
from pipeline.rollout.score_scale import (
    TrainedScores,
    distinct_prompts,
    mean_demonstration_score,
    scale_to_unit_variance,
)
from pipeline.training.lineage import verify_parent
from pipeline.training.run import Run
from pipeline.training.sharded_trainer import sharding_of
from pipeline.training.stage import launch
from pipeline.training.trainer import (
    StageTrainer,
    prepare_trainer,
    save_trained,
    share_batches,
    train,
    training_arguments,
)

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import set_seed
from trl import RewardConfig, RewardTrainer

logger = logging.getLogger("pipeline.reward")  # __name__ is __main__ under accelerate launch


def main(run: Run[RewardArguments]) -> None:
    args = run.args
    parent = verify_parent(args.parent, SUPPORT["reward"].parents)
    sources = read_sources(args.datasets, "ranking", args.data_root, args.data_cache)
    demonstrations = read_sources(args.center_on, "demonstration", args.data_root, args.data_cache)
    truth = import_function(args.truth) if args.truth else None
    tokenizer = load_tokenizer(parent.path)
    parent.check_tokenizer(tokenizer)
    run.output.inputs = {
        "parent": parent.as_inputs(tokenizer),
        "chat_template": template_identity(args.chat_template),
        "data": fingerprint(sources),
        "center_on": fingerprint(demonstrations),
        "truth": source_sha256(truth) if truth else None,
    }
    if run.already_done():
        return
    sources = [without_invalid_rankings(source, args) for source in sources]
    kept_out = held_out_labelers(sources, args)
    split = split_rankings(sources, args.held_out_fraction, kept_out)

    set_seed(args.seed)
    model = load_scalar_model(parent.path, args.quantization)
    encoder = prepare_model(model, tokenizer, new_head=parent.stage != "reward", args=args)
    rankings = encode_split(encoder, sources, split, args)
    rows, held_out = rankings.training, rankings.held_out

    trainer = RankingTrainer(
        model=model,
        sharding=sharding_of(run),
        args=training_arguments(RewardConfig, run, disable_dropout=False, max_length=None),
        train_dataset=lazy_dataset(rows),
        eval_dataset=lazy_dataset(Joined([TrainingRows(table) for table in rankings.held_out_tables])),
        data_collator=RankingCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        peft_config=lora_config(model, args.lora, "SEQ_CLS", tokenizer) if args.lora else None,
    )
    trainer.tie_margin = args.tie_margin if args.ties == "margin" else 0.0
    if args.group_by_length:
        trainer.order = LengthGroupedSampler(rankings.lengths, args.examples_per_step, args.seed)
    prepare_trainer(trainer, run)
    pairs = rankings.pairs
    logger.info("reward: %d rankings with %d pairs, %d held out", len(rows), pairs, len(held_out))
    resumed = train(trainer, run)

    save_trained(trainer, tokenizer, load_base=lambda: load_scalar_model(parent.path))
    run.round_saved_weights()  # before scores are measured
    run.processes.barrier()
    scores = TrainedScores.load(run, encoder)
    prompts = distinct_prompts(sources, split.training, args.unit_variance_samples or 0)
    metrics: dict[str, Any] = scale_and_center(scores, prompts, demonstrations, args)
    measured = measure_reward_model(
        scores, scores.reader, tokenizer.pad_token_id, list(held_out), list(rankings.held_out_labelers)
    )
    known = Truth(str(args.truth), truth) if truth else None  # the user's function may fail: then all processes end
    metrics |= run.processes.from_main(lambda: reward_metrics(measured, truth=known, tie_margin=trainer.tie_margin))
    metrics |= {
        "kept_out_labelers": kept_out,
        "rankings": len(rows),
        "pairs": pairs,
        "steps": trainer.state.global_step,
    }
    if run.is_main:
        scores.model.config.score_temperature = metrics.get("temperature", 1.0)
        scores.model.config.save_pretrained(args.output_dir)
    run.finish(
        parents=[parent.record()],
        datasets=[s.provenance() for s in [*sources, *demonstrations]],
        tokenizer=tokenizer,
        metrics=metrics,
        flops=trainer.state.total_flos,
        resumed_from=resumed,
        summary=_summary(metrics),
    )


def prepare_model(model: Any, tokenizer: Any, *, new_head: bool, args: RewardArguments) -> ChatEncoder:
    """Complete an external parent, draw a new head, switch noise off; returns the encoder."""
    check_batched_length(model.config, args.max_tokens, "max_tokens")
    encoder, notes = complete_chat_model(tokenizer, model, args.chat_template, args.output_dir)
    if args.epochs > 1:
        notes.append(f"{args.epochs:.3g} epochs; comparisons overfit past the first (InstructGPT)")
    for note in notes:
        logger.warning("reward: %s", note)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if new_head:
        std = init_head(model, args.head_std, args.seed)
        logger.info("reward: new head, weights from N(0, %.4f²)", std)
    if args.disable_dropout:
        disable_noise(model)
    return encoder


@dataclass(frozen=True)
class EncodedRankings:
    """training: one epoch of the mixture, lengths: of its rows, pairs: in all of it; held_out: unseen prompts;
    held_out_labelers: those of labelers kept out."""

    training: Sequence[Any]
    lengths: np.ndarray
    pairs: int
    held_out_tables: list[RankingTable]
    held_out_labelers: Sequence[Any]

    @property
    def held_out(self) -> Sequence[Any]:  # of EncodedRanking
        return Joined(self.held_out_tables)


def encode_split(
    encoder: ChatEncoder, sources: Sequence[Source], split: RankingSplit, args: RewardArguments
) -> EncodedRankings:
    """Encode every part of the split, and mix the training parts by the sources' weights."""
    options = RankingOptions(
        max_tokens=args.max_tokens,
        ties=args.ties,
        confidence=args.confidence,
        label_smoothing=args.label_smoothing,
        labeler_weights=args.labeler_weights,
    )

    def encoded(parts: Sequence[np.ndarray], name: str) -> list[RankingTable]:
        """The rows at some positions in each source."""
        return [
            store_rankings(encoder, source.records.select(positions), options, name)
            for source, positions in zip(sources, parts, strict=True)
        ]

    tables = encoded(split.training, "training")
    epoch = mixture_indices([len(table) for table in tables], [source.weight for source in sources], args.seed)
    training = Chosen(Joined([TrainingRows(table) for table in tables]), epoch)
    held_out = encoded(split.held_out, "held-out")
    others = Joined(encoded(split.held_out_labelers, "held-out labelers'"))
    if not len(training) or not any(map(len, held_out)):
        raise UserError(
            f"{len(training)} rankings to train on and {sum(map(len, held_out))} held out; both are needed: "
            "raise max_tokens, change held_out_fraction or give more rankings"
        )
    lengths, pairs = (np.concatenate([t.numbers(name) for t in tables])[epoch] for name in ("length", "num_pairs"))
    return EncodedRankings(training, lengths, int(pairs.sum()), held_out, others)


def scale_and_center(
    scores: TrainedScores, prompts: list[Any], demonstrations: Sequence[Source], args: RewardArguments
) -> dict[str, float]:
    """Scores of variance 1 over the parent's answers where the recipe asks for it, and of mean 0 over demonstrations."""
    scale = scale_to_unit_variance(scores, prompts, args) if prompts else 1.0
    offset = mean_demonstration_score(scores, demonstrations, args.max_tokens)
    set_offset(scores.model, offset)
    return {"score_offset": offset, "score_scale": scale}


def _summary(metrics: dict[str, Any]) -> str:
    if metrics["accuracy"] is None:
        return "no held-out ranking tells two responses apart; accuracy unknown"
    low, high = metrics["accuracy_ci95"]
    text = f"held-out accuracy {metrics['accuracy']:.1%} [{low:.1%}, {high:.1%}]"
    if metrics.get("noise_ceiling") is not None:
        text += f" of a ceiling of {metrics['noise_ceiling']:.1%}"
    if metrics.get("held_out_labeler_accuracy") is not None:
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
            better=inputs["better"],
            worse=inputs["worse"],
            target=inputs["target"],
            margin=inputs["margin"],
            pair_weight=inputs["pair_weight"],
            prompts=inputs["prompts"],
            tie=inputs["tie"],
            tie_margin=self.tie_margin,
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
        measured = {"loss": float(sums[0] / sums[1])}
        return measured | ({"accuracy": float(sums[2] / sums[3])} if sums[3] else {})  # none where all tie


def without_invalid_rankings(source: Source, args: RewardArguments) -> Source:
    """Drop (or refuse) rankings that cannot be trained on, saying how many, why and where."""
    valid, problems = stored_invalid_rankings(source.records, args.ties)
    if problems:
        if (source.problems or args.problems) == "error":
            line, reason = problems[0]
            raise UserError(
                f"{reason}; {len(problems)} such rankings in all, `problems: drop` leaves them out",
                file=source.location,
                line=line,
            )
        logger.warning("reward: %s", summary(problems, source.location))
    return replace_records(source, source.records.select(valid))


def held_out_labelers(sources: Sequence[Source], args: RewardArguments) -> list[str]:
    """Labelers kept out of training: those that the recipe names, or a fold."""
    labelers = labelers_of(sources)
    for key, names in (("held_out_labelers", args.held_out_labelers), ("labeler_weights", args.labeler_weights)):
        for name in names:
            if name not in labelers:
                raise UserError(f"{key}: no ranking by {name!r}; labelers: {', '.join(labelers) or 'none'}")
    if args.labeler_folds is None:
        return list(args.held_out_labelers)
    folds = labeler_folds(labelers, args.labeler_folds)
    fold = folds[args.labeler_fold]
    logger.info("reward: fold %d of %d keeps out %s", args.labeler_fold, len(folds), ", ".join(fold))
    return fold


if __name__ == "__main__":
    launch("reward", RewardArguments, main)
