"""Stage 2: supervised fine-tuning on demonstrations, on TRL's SFTTrainer with our own encoding.

accelerate launch pipeline/sft.py --config recipes/demo/sft.yaml
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from pipeline.config.sft import SFTArguments
from pipeline.config.stages import SUPPORT
from pipeline.data.collators import BlockCollator
from pipeline.data.encoding import IGNORE, ChatEncoder
from pipeline.data.mixing import mixture_indices
from pipeline.data.packing import join_examples, pack_examples
from pipeline.data.records import Record, at_row
from pipeline.data.sources import Source, fingerprint, read_sources
from pipeline.data.splits import split_records
from pipeline.errors import UserError
from pipeline.evaluation.language import mean_loss, perplexity
from pipeline.models.loading import check_context_length, keep_router_logits_off, load_causal_lm
from pipeline.models.lora import lora_config
from pipeline.models.tokenizers import (
    complete_chat_model,
    load_tokenizer,
    set_stop_tokens,
    stop_token_ids,
    template_identity,
)
from pipeline.models.trials import isolates_packed_documents
from pipeline.rollout.greedy import GreedyScore
from pipeline.rollout.rewards import ScoringSetup, build_scorer, identity
from pipeline.training.lineage import verify_parent
from pipeline.training.run import Run
from pipeline.training.stage import launch
from pipeline.training.trainer import (
    StageTrainer,
    measure_tokens,
    prepare_trainer,
    save_trained,
    train,
    training_arguments,
)

import datasets
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

logger = logging.getLogger("pipeline.sft")  # __name__ is __main__ under accelerate launch
Example = tuple[list[int], list[int]]


def main(run: Run[SFTArguments]) -> None:
    args = run.args
    parent = verify_parent(args.parent, SUPPORT["sft"].parents)
    sources = read_sources(args.datasets, "demonstration", args.data_root)
    tokenizer = load_tokenizer(parent.path)
    parent.check_tokenizer(tokenizer)
    run.output.inputs = {
        "parent": parent.as_inputs(tokenizer),
        "chat_template": template_identity(args.chat_template),
        "data": fingerprint(sources),
        "score": identity(args.score),
    }
    if run.already_done():
        return

    set_seed(args.seed)
    model = load_causal_lm(parent.path, args.quantization)
    check_context_length(model.config, args.max_tokens, "max_tokens")
    encoder, notes = complete_chat_model(tokenizer, model, args.chat_template, args.output_dir)
    stop_ids = stop_token_ids(encoder, model.generation_config)
    set_stop_tokens(model, stop_ids)
    packing = args.packing and isolates_packed_documents(model)
    if args.packing and not packing:
        notes.append("examples that share a row would see each other in this model; each gets a row of its own")
    for note in notes:
        logger.warning("sft: %s", note)

    demonstrations = encode_demonstrations(encoder, sources, args)
    training = demonstrations.training
    rows = pack_examples(training, args.max_tokens) if packing else [join_examples([e]) for e in training]
    held_out = demonstrations.held_out
    logger.info("sft: %d demonstrations in %d rows, %d held out", len(training), len(rows), len(held_out))

    trainer = DemonstrationTrainer(
        model=model,
        args=training_arguments(
            SFTConfig,
            run,
            None if args.best_metric == "none" else args.best_metric,
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
            greater_is_better=args.best_metric not in ("none", "loss"),
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        eval_dataset=datasets.Dataset.from_list([join_examples([e]) for e in held_out]),
        data_collator=BlockCollator(tokenizer.pad_token_id, position_ids=packing),
        processing_class=tokenizer,
        peft_config=lora_config(model, args.lora, "CAUSAL_LM", tokenizer) if args.lora else None,
    )
    if args.score:
        scorer = build_scorer(args.score, ScoringSetup(encoder, trainer.accelerator.device, stop_ids))
        records = demonstrations.held_out_records[: args.score_prompts]
        trainer.greedy_score = GreedyScore(encoder, scorer, records, args.max_response_tokens)
    keep_router_logits_off(model)  # TRL asks for them in its calls
    prepare_trainer(trainer, run)
    resumed = train(trainer, run)

    metrics = {key.removeprefix("eval_"): value for key, value in trainer.evaluate().items()}
    metrics |= {
        "demonstrations": len(training),
        "held_out_demonstrations": len(held_out),
        "steps": trainer.state.global_step,
    }
    if args.best_metric != "none" and trainer.state.best_global_step is not None:
        metrics["best_step"] = trainer.state.best_global_step
    save_trained(trainer, tokenizer, load_base=lambda: load_causal_lm(parent.path))
    run.finish(
        parents=[parent.record()],
        datasets=[s.provenance() for s in sources],
        tokenizer=tokenizer,
        metrics=metrics,
        flops=trainer.state.total_flos,
        resumed_from=resumed,
        summary=f"held-out response perplexity {metrics['perplexity']:.3f}, token accuracy {metrics['token_accuracy']:.1%}"
        + (f", best at step {metrics['best_step']}" if "best_step" in metrics else ""),
    )


class DemonstrationTrainer(StageTrainer, SFTTrainer):
    """SFTTrainer on rows that are encoded and packed already, with our held-out measure."""

    greedy_score: GreedyScore | None = None

    def measure(self) -> dict[str, float]:
        nll, tokens, hits = measure_tokens(self, self.eval_dataset, self.eval_rows)
        metrics = {
            "perplexity": perplexity(nll, tokens),
            "loss": mean_loss(nll, tokens),
            "token_accuracy": hits / max(tokens, 1),
        }
        if self.greedy_score is not None:
            metrics["score"] = self.greedy_score.measure(self.model)
        return metrics


@dataclass(frozen=True)
class Demonstrations:
    """training: one epoch of the mixture; held_out: examples, and the records that they come from."""

    training: list[Example]
    held_out: list[Example]
    held_out_records: list[Record]


def encode_demonstrations(encoder: ChatEncoder, sources: list[Source], args: SFTArguments) -> Demonstrations:
    """Split every source, encode both parts, and mix the training parts by the sources' weights."""
    splits = [split_records(source.records, args.held_out_fraction) for source in sources]
    parts = [encode(encoder, s, part, args) for s, (part, _) in zip(sources, splits, strict=True)]
    held_out = [e for s, (_, part) in zip(sources, splits, strict=True) for e in encode(encoder, s, part, args)]
    if not any(parts):
        if not any(part for part, _ in splits):
            raise UserError("no demonstration is left to train on; lower held_out_fraction or give more demonstrations")
        raise UserError(f"no demonstration fits into max_tokens ({args.max_tokens}); raise it")
    if not held_out:
        raise UserError("no demonstration was held out; raise held_out_fraction or give more demonstrations")
    examples = [example for part in parts for example in part]
    epoch = mixture_indices([len(part) for part in parts], [source.weight for source in sources], args.seed)
    return Demonstrations([examples[i] for i in epoch], held_out, [record for _, part in splits for record in part])


def encode(encoder: ChatEncoder, source: Source, records: list[Record], args: SFTArguments) -> list[Example]:
    """Token ids and labels of each demonstration that fits; the others are counted and named.

    A dialogue is one example, or one per answer where its template writes earlier answers otherwise than it prompts.
    """
    examples: list[Example] = []
    too_long: list[int] = []
    nothing_learnt: list[int] = []
    for record in records:
        with at_row(record):
            encoded = encoder.examples(record["messages"], record["trained"], args.loss_on)
        for ids, labels in encoded:
            if len(ids) > args.max_tokens:
                too_long.append(record["line"])
            elif all(label == IGNORE for label in labels[1:]):
                nothing_learnt.append(record["line"])
            else:
                examples.append((ids, labels))
    warn_left_out(source, f"are longer than max_tokens ({args.max_tokens})", too_long, len(records))
    warn_left_out(source, "hold no token that is learnt", nothing_learnt, len(records))
    return examples


def warn_left_out(source: Source, why: str, lines: list[int], total: int) -> None:
    if lines:
        shown = ", ".join(map(str, lines[:5])) + (", …" if len(lines) > 5 else "")
        logger.warning(
            "sft: %s: %d of %d demonstrations %s and left out (lines %s)", source.name, len(lines), total, why, shown
        )


if __name__ == "__main__":
    launch("sft", SFTArguments, main)
