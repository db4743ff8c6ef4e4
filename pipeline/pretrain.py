"""Stage 1: a causal language model from plain text, from nothing or continued from a checkpoint.

accelerate launch pipeline/pretrain.py --config recipes/demo/pretrain.yaml
"""

from __future__ import annotations

import logging
from typing import Any

from pipeline.config.arguments import PretrainArguments
from pipeline.data.collators import BlockCollator
from pipeline.data.encoding import document_ids
from pipeline.data.packing import Block, pack_documents
from pipeline.data.sources import Source, fingerprint, read_sources, split_texts
from pipeline.errors import UserError
from pipeline.evaluation.metrics import BitsPerByte, Perplexity
from pipeline.models.loading import assign_pad, load_causal_lm, load_tokenizer, new_causal_lm, refuse_beyond_context
from pipeline.models.tokenizer_training import train_tokenizer
from pipeline.training.identity import tokenizer_hashes
from pipeline.training.lineage import verify_parent
from pipeline.training.stage import Run, launch
from pipeline.training.trainer import (
    StageTrainer,
    measure_tokens,
    prepare_trainer,
    save_whole,
    train,
    training_arguments,
)

import datasets
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

logger = logging.getLogger("pipeline.pretrain")  # __name__ is __main__ under accelerate launch


def main(run: Run[PretrainArguments]) -> None:
    args = run.args
    parent = verify_parent(args.parent, ("pretrain", "sft", "ppo")) if args.parent else None
    sources = read_sources(args.datasets, "document", args.data_root)
    folder = parent.path if parent else args.tokenizer
    given = load_tokenizer(folder) if folder else None
    if parent and given:
        parent.check_tokenizer(given)
    run.output.inputs = {
        "parent": parent and parent.as_inputs(given),
        "tokenizer": given and tokenizer_hashes(given),
        "data": fingerprint(sources),
    }
    if run.already_done():
        return

    texts = [split_texts(source, args.held_out_fraction) for source in sources]
    tokenizer = given or _new_tokenizer(args, [text for train_texts, _ in texts for text in train_texts])
    if parent:
        model = load_causal_lm(parent.path)
        refuse_beyond_context(model.config, args.block_tokens, "block_tokens")
    else:
        from transformers import set_seed

        set_seed(args.seed)
        model = new_causal_lm(args.config_class, args.model_config, tokenizer, args.block_tokens)
    if note := assign_pad(tokenizer, model):
        logger.warning("pretrain: %s", note)

    train_blocks = [pack_documents(document_ids(tokenizer, t), args.block_tokens) for t, _ in texts]
    held_out = [pack_documents(document_ids(tokenizer, t), args.block_tokens) for _, t in texts]
    mixed, counts = mix(sources, train_blocks, args.seed)
    if not any(held_out):
        raise UserError("no document was held out; raise held_out_fraction or give more documents")
    held_out_bytes = sum(len(text.encode()) for _, part in texts for text in part)
    logger.info(
        "pretrain: %d blocks of %d tokens, %d held out, %.2f M parameters",
        len(mixed),
        args.block_tokens,
        sum(map(len, held_out)),
        model.num_parameters() / 1e6,
    )

    trainer = PretrainTrainer(
        model=model,
        args=training_arguments(TrainingArguments, run),
        train_dataset=mixed,
        eval_dataset=[block for blocks in held_out for block in blocks],
        data_collator=BlockCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    prepare_trainer(trainer, run)
    resumed = train(trainer, run)

    metrics = {key.removeprefix("eval_"): value for key, value in trainer.evaluate().items()}
    metrics["bits_per_byte"] = BitsPerByte().compute(nll=[metrics.pop("nll")], num_bytes=[held_out_bytes])[
        "bits_per_byte"
    ]
    epochs = epochs_seen(sources, train_blocks, counts, trainer.state.global_step * args.examples_per_step / len(mixed))
    metrics |= {
        "held_out_bytes": held_out_bytes,
        "parameters": model.num_parameters(),
        "steps": trainer.state.global_step,
    }
    save_whole(trainer, tokenizer)
    run.finish(
        parents=[parent.record()] if parent else [],
        datasets=[
            {**s.provenance(), "epochs_seen": epochs[i], "train_tokens": _tokens(train_blocks[i])}
            for i, s in enumerate(sources)
        ],
        tokenizer=tokenizer,
        metrics=metrics,
        flops=trainer.state.total_flos,
        resumed_from=resumed,
        summary=f"perplexity {metrics['perplexity']:.2f}, {metrics['bits_per_byte']:.3f} bits per byte held out, "
        + ", ".join(f"{s.name} seen {epochs[i]:.2f}×" for i, s in enumerate(sources)),
    )


class PretrainTrainer(StageTrainer, Trainer):
    """Trainer over packed blocks, with our held-out measure."""

    def measure(self) -> dict[str, float]:
        nll, tokens, _ = measure_tokens(self, self.eval_dataset, self.eval_rows)
        return {**Perplexity().compute(nll=[nll], tokens=[tokens]), "nll": nll, "held_out_tokens": tokens}

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, {**inputs, "use_cache": False}, *args, **kwargs)


def _new_tokenizer(args: PretrainArguments, texts: list[str]) -> PreTrainedTokenizerBase:
    assert args.train_tokenizer is not None
    return train_tokenizer(texts, args.train_tokenizer.vocab_size)


def mix(sources: list[Source], blocks: list[list[Block]], seed: int) -> tuple[datasets.Dataset, list[int]]:
    """One epoch of the mixture: every block once, or drawn by the sources' weights until each was seen whole.

    Returns:
        mixture: a Dataset of blocks
        counts: blocks of each source in it
    """
    tables = [datasets.Dataset.from_list([{**b, "source": i} for b in part]) for i, part in enumerate(blocks)]
    weights = [source.weight for source in sources]
    if all(weight is None for weight in weights):
        mixed = datasets.concatenate_datasets(tables)
    elif any(weight is None for weight in weights):
        unweighted = next(s.name for s in sources if s.weight is None)
        raise UserError(f"datasets: {unweighted!r} has no weight but others do; give all or none")
    else:
        total = sum(w for w in weights if w is not None)
        shuffled = [table.shuffle(seed=seed) for table in tables]
        mixed = datasets.interleave_datasets(
            shuffled,
            probabilities=[w / total for w in weights if w is not None],
            seed=seed,
            stopping_strategy="all_exhausted",
        )
    drawn = list(mixed["source"])
    return mixed.remove_columns("source"), [drawn.count(i) for i in range(len(sources))]


def epochs_seen(sources: list[Source], blocks: list[list[Block]], counts: list[int], passes: float) -> list[float]:
    """How often each source's training blocks were seen: passes over the mixture times its share in it."""
    return [round(passes * counts[i] / len(blocks[i]), 4) for i in range(len(sources))]


def _tokens(blocks: list[Block]) -> int:
    return sum(len(block["input_ids"]) for block in blocks)


if __name__ == "__main__":
    launch("pretrain", PretrainArguments, main)
