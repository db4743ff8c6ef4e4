"""Stage 2: supervised fine-tuning on demonstrations, on TRL's SFTTrainer with our own encoding.

accelerate launch pipeline/sft.py --config recipes/demo/sft.yaml
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config.sft import SFTArguments
from pipeline.config.stages import SUPPORT
from pipeline.data.collators import BlockCollator
from pipeline.data.encoded import encode_examples
from pipeline.data.encoding import ChatEncoder
from pipeline.data.mixing import mixture_indices
from pipeline.data.packing import Chosen, Joined, lazy_dataset, one_per_row, pack_examples
from pipeline.data.records import Record
from pipeline.data.sources import Source, fingerprint, read_sources
from pipeline.data.stored_records import StoredRecords
from pipeline.errors import UserError
from pipeline.evaluation.language import mean_loss, perplexity
from pipeline.models.loading import (
    check_batched_length,
    keep_router_logits_off,
    load_causal_lm,
)
from pipeline.models.lora import lora_config
from pipeline.models.sharding import gathered
from pipeline.models.tokenizers import (
    complete_chat_model,
    load_tokenizer,
    set_stop_tokens,
    stop_token_ids,
    template_identity,
)
from pipeline.models.trials import fused_head_gives_the_loss, isolates_packed_documents, require_causal
from pipeline.rollout.greedy import GreedyScore
from pipeline.rollout.rewards import ScoringSetup, build_scorer, identity
from pipeline.training.lineage import verify_parent
from pipeline.training.run import Run
from pipeline.training.sharded_trainer import sharding_of
from pipeline.training.stage import launch
from pipeline.training.trainer import (
    StageTrainer,
    measure_tokens,
    prepare_trainer,
    save_trained,
    train,
    training_arguments,
)

import numpy as np
from peft import PeftModel
from transformers import Trainer, set_seed
from trl import SFTConfig, SFTTrainer
from trl.trainer import utils

logger = logging.getLogger("pipeline.sft")  # __name__ is __main__ under accelerate launch
Example = tuple[list[int], list[int]]


def main(run: Run[SFTArguments]) -> None:
    args = run.args
    parent = verify_parent(args.parent, SUPPORT["sft"].parents)
    sources = read_sources(args.datasets, "demonstration", args.data_root, args.data_cache)
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
    require_causal(model, args.parent)
    check_batched_length(model.config, args.max_tokens, "max_tokens")
    encoder, notes = complete_chat_model(tokenizer, model, args.chat_template, args.output_dir)
    stop_ids = stop_token_ids(encoder, model.generation_config)
    set_stop_tokens(model, stop_ids)
    packing = args.packing and isolates_packed_documents(model)
    if args.packing and not packing:
        notes.append(
            "packing: examples that share a row would see each other in this model; each gets a row of its own"
        )
    for note in notes:
        logger.warning("sft: %s", note)

    demonstrations = encode_demonstrations(encoder, sources, args)
    training, held_out = demonstrations.training, demonstrations.held_out
    rows = pack_examples(training, args.max_tokens, demonstrations.lengths) if packing else one_per_row(training)
    logger.info("sft: %d demonstrations in %d rows, %d held out", len(training), len(rows), len(held_out))

    sharding = sharding_of(run)
    trainer = DemonstrationTrainer(
        model=model,
        sharding=sharding,
        args=training_arguments(
            SFTConfig,
            run,
            None if args.best_metric == "none" else args.best_metric,
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
            greater_is_better=args.best_metric not in ("none", "loss"),
        ),
        train_dataset=lazy_dataset(rows),
        eval_dataset=lazy_dataset(one_per_row(held_out)),
        data_collator=BlockCollator(tokenizer.pad_token_id, position_ids=packing),
        processing_class=tokenizer,
        peft_config=lora_config(model, args.lora, "CAUSAL_LM", tokenizer) if args.lora else None,
    )
    if args.score:
        scorer = build_scorer(
            args.score, ScoringSetup(encoder, trainer.accelerator.device, stop_ids, sharding=sharding)
        )
        records = list(demonstrations.held_out_records[: args.score_prompts])
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

    def __init__(self, **options: Any):
        super().__init__(**options)
        smoothed = self.label_smoother is not None
        self.keeps_trl_loss = self.aux_loss_enabled or smoothed or self.args.loss_type != "nll"
        self.labelled_only = not self.keeps_trl_loss and compute_labelled_logprobs_only(self)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's own loss, without TRL's metrics of every step, which nothing reads."""
        if self.keeps_trl_loss:
            return super().compute_loss(model, inputs, *args, **kwargs)
        options = {"fused_lm_head": True} if self.labelled_only else {"use_cache": False}
        return Trainer.compute_loss(self, model, {**inputs, **options}, *args, **kwargs)

    def measure(self) -> dict[str, float]:
        nll, tokens, hits = measure_tokens(self, self.eval_dataset, self.eval_rows)
        metrics = {
            "perplexity": perplexity(nll, tokens),
            "loss": mean_loss(nll, tokens),
            "token_accuracy": hits / max(tokens, 1),
        }
        if self.greedy_score is not None:
            with gathered(self.model):
                metrics["score"] = self.greedy_score.measure(self.model)
        return metrics


def compute_labelled_logprobs_only(trainer: Any) -> bool:
    """Replace TRL's (1.16) LM head in a SFTTrainer's model: no logits of tokens without a label, no entropy, no top token.

    TRL does the former on GPUs alone; `_use_triton` in trl.trainer.utils, which decides it, is private.

    Returns:
        whether the new head gives the model's own loss; if not, that is computed from all logits.
    """
    if not hasattr(utils, "_use_triton"):
        raise RuntimeError("trl.trainer.utils has no _use_triton: another version of TRL than 1.16 is installed")
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    utils._use_triton = lambda device: True  # noqa: ARG005 - mypy asks for the name
    utils.add_fused_lm_head(model)
    return fused_head_gives_the_loss(model)


@dataclass(frozen=True)
class Demonstrations:
    """training: one epoch of the mixture, lengths: of its examples; held_out: examples, and the records of that side."""

    training: Sequence[Example]
    lengths: np.ndarray
    held_out: Sequence[Example]
    held_out_records: Sequence[Record]


def encode_demonstrations(encoder: ChatEncoder, sources: list[Source], args: SFTArguments) -> Demonstrations:
    """Split every source, encode both parts, and mix the training parts by the sources' weights."""
    sides = [source.records.held_out(args.held_out_fraction) for source in sources]
    encoded = [encode(encoder, source, side, args) for source, side in zip(sources, sides, strict=True)]
    parts, held_out = [part for part, _, _ in encoded], Joined([part for _, _, part in encoded])
    if not any(map(len, parts)):
        if all(side.all() for side in sides):
            raise UserError("no demonstration is left to train on; lower held_out_fraction or give more demonstrations")
        raise UserError(f"no demonstration fits into max_tokens ({args.max_tokens}); raise it")
    if not held_out:
        raise UserError("no demonstration was held out; raise held_out_fraction or give more demonstrations")
    epoch = mixture_indices([len(part) for part in parts], [source.weight for source in sources], args.seed)
    return Demonstrations(
        training=Chosen(Joined(parts), epoch),
        lengths=np.concatenate([lengths for _, lengths, _ in encoded])[epoch],
        held_out=held_out,
        held_out_records=Joined(
            [s.records.select(np.flatnonzero(side)) for s, side in zip(sources, sides, strict=True)]
        ),
    )


def encode(
    encoder: ChatEncoder, source: Source, held_out: np.ndarray, args: SFTArguments
) -> tuple[Sequence[Example], np.ndarray, Sequence[Example]]:
    """The training examples that fit, their lengths, and the held-out ones; those that are left out are counted and named.

    A dialogue is one example, or one per answer where its template writes earlier answers otherwise than it prompts.

    Args:
        held_out: (records,) bool.
    """
    examples = encode_examples(source.records, encoder, args.loss_on)
    too_long = examples.lengths > args.max_tokens
    nothing_learnt = ~too_long & ~examples.learnt
    side = held_out[examples.record]
    for part, total in ((~side, (~held_out).sum()), (side, held_out.sum())):
        for left_out, why in (
            (too_long, f"are longer than max_tokens ({args.max_tokens})"),
            (nothing_learnt, "hold no token that is learnt"),
        ):
            warn_left_out(source, why, source.records.select(examples.record[left_out & part]), int(total))
    fits = ~too_long & ~nothing_learnt
    training = np.flatnonzero(fits & ~side)
    return Chosen(examples, training), examples.lengths[training], Chosen(examples, np.flatnonzero(fits & side))


def warn_left_out(source: Source, why: str, records: StoredRecords, total: int) -> None:
    if records:
        lines = [record["line"] for record in records[:5]]
        shown = ", ".join(map(str, lines)) + (", …" if len(records) > 5 else "")
        logger.warning(
            "sft: %s: %d of %d demonstrations %s and left out (lines %s)", source.name, len(records), total, why, shown
        )


if __name__ == "__main__":
    launch("sft", SFTArguments, main)
