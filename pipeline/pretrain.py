"""Stage 1: a causal language model from plain text, from nothing or continued from a checkpoint.

accelerate launch pipeline/pretrain.py --config recipes/demo/pretrain.yaml
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.pretrain import PretrainArguments
from pipeline.config.stages import SUPPORT
from pipeline.data.cache import DataCache
from pipeline.data.collators import BlockCollator
from pipeline.data.documents import Documents, encode_blocks, split_documents
from pipeline.data.mixing import mixture_indices, rows_of_each
from pipeline.data.packing import Block, Chosen, Joined, lazy_dataset, pack_documents
from pipeline.data.sources import fingerprint, read_sources
from pipeline.data.streaming import HubStream, StreamedBlocks
from pipeline.evaluation.language import bits_per_byte, mean_loss, perplexity
from pipeline.models.experts import set_router_loss
from pipeline.models.loading import check_batched_length, load_causal_lm, new_causal_lm
from pipeline.models.tokenizer_training import train_bpe, with_roles
from pipeline.models.tokenizers import assign_pad, load_tokenizer
from pipeline.models.trials import ONE_PER_BLOCK, isolates_packed_documents, require_causal
from pipeline.training.identity import tokenizer_hashes
from pipeline.training.lineage import verify_parent
from pipeline.training.run import Run
from pipeline.training.sharded_trainer import sharding_of
from pipeline.training.stage import launch
from pipeline.training.streaming import StreamPosition, open_stream
from pipeline.training.trainer import (
    StageTrainer,
    measure_tokens,
    prepare_trainer,
    save_whole,
    train,
    training_arguments,
)

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

logger = logging.getLogger("pipeline.pretrain")  # __name__ is __main__ under accelerate launch


def main(run: Run[PretrainArguments]) -> None:
    args = run.args
    parent = verify_parent(args.parent, SUPPORT["pretrain"].parents) if args.parent else None
    stream = open_stream(run, args.datasets[0], args.held_out_fraction)
    sources = (
        [stream.held_out(args.held_out_documents, args.data_cache)]
        if stream
        else read_sources(args.datasets, "document", args.data_root, args.data_cache)
    )
    folder = parent.path if parent else args.tokenizer
    given = load_tokenizer(folder) if folder else None
    if parent and given:
        parent.check_tokenizer(given)
    run.output.inputs = {
        "parent": parent and parent.as_inputs(given),
        "tokenizer": given and tokenizer_hashes(given),
        "data": [{**data, "revision": stream.revision} if stream else data for data in fingerprint(sources)],
    }
    if run.already_done():
        return

    documents = [split_documents(source, args.held_out_fraction) for source in sources]
    tokenizer = given or new_tokenizer(args, documents)
    if parent:
        model = load_causal_lm(parent.path)
        check_batched_length(model.config, args.block_tokens, "block_tokens")
    else:
        set_seed(args.seed)
        model = new_causal_lm(args.config_class, args.model_config, tokenizer, args.block_tokens)
    if note := assign_pad(tokenizer, model):
        logger.warning("pretrain: %s", note)
    require_causal(model, args.parent or str(args.config_class))
    isolated = isolates_packed_documents(model)
    if not isolated:
        logger.warning("pretrain: packing: %s", ONE_PER_BLOCK)

    if stream:
        text = streamed_text(args, stream, documents[0], tokenizer, isolated)
    else:
        text = mixed_text(args, documents, tokenizer, isolated)
    parameters = model.num_parameters()
    logger.info(
        "pretrain: %s blocks of %d tokens, %d held out, %.2f M parameters",
        "streamed" if stream else len(text.training), args.block_tokens, len(text.held_out), parameters / 1e6,
    )  # fmt: skip

    trainer = PretrainTrainer(
        model=model,
        sharding=sharding_of(run),
        args=training_arguments(TrainingArguments, run, ignore_data_skip=bool(stream)),
        train_dataset=text.training,
        eval_dataset=text.held_out,
        data_collator=BlockCollator(
            tokenizer.pad_token_id, position_ids=isolated, width=args.block_tokens if stream else 0
        ),
        processing_class=tokenizer,
    )
    shares = trainer.args.gradient_accumulation_steps * trainer.args.world_size
    if note := set_router_loss(model, args.router_aux_loss, shares):
        logger.warning("pretrain: %s", note)
    trainer.asks_router_logits = bool(args.router_aux_loss)
    if isinstance(text.training, StreamedBlocks):
        trainer.add_callback(StreamPosition(text.training, run, trainer))
    prepare_trainer(trainer, run)
    resumed = train(trainer, run)

    metrics = {key.removeprefix("eval_"): value for key, value in trainer.evaluate().items()}
    metrics["bits_per_byte"] = bits_per_byte(metrics.pop("nll"), text.held_out_bytes)
    metrics |= {"held_out_bytes": text.held_out_bytes, "parameters": parameters, "steps": trainer.state.global_step}
    seen = run.processes.from_main(lambda: text.seen(trainer.state.global_step * args.examples_per_step))
    save_whole(trainer, tokenizer)
    run.finish(
        parents=[parent.record()] if parent else [],
        datasets=[{**source.provenance(), **facts} for source, facts in zip(sources, seen, strict=True)],
        tokenizer=tokenizer,
        metrics=metrics,
        flops=trainer.state.total_flos,
        resumed_from=resumed,
        summary=f"perplexity {metrics['perplexity']:.2f}, {metrics['bits_per_byte']:.3f} bits per byte held out, "
        + ", ".join(f"{source.name} {_seen_in_words(facts)}" for source, facts in zip(sources, seen, strict=True)),
    )


def _seen_in_words(facts: dict[str, Any]) -> str:
    if "epochs_seen" in facts:
        return f"seen {facts['epochs_seen']:.2f}×"
    left_out = f", {facts['rows_left_out']:,} left out" if facts["rows_left_out"] else ""
    return f"streamed: {facts['train_tokens']:,} tokens of {facts['rows']:,} rows{left_out}"


@dataclass(frozen=True)
class Text:
    """Blocks to train on and to evaluate. seen: what lineage says of each source after a number of trained blocks."""

    training: Any
    held_out: Sequence[Block]
    held_out_bytes: int
    seen: Callable[[int], list[dict[str, Any]]]


def mixed_text(
    args: PretrainArguments, documents: Sequence[Documents], tokenizer: PreTrainedTokenizerBase, isolated: bool
) -> Text:
    """The blocks of all sources in the data cache, mixed by weight."""
    blocks = encode_blocks(documents, tokenizer, args.block_tokens, isolated)
    sizes = [len(part) for part in blocks.training]
    epoch = mixture_indices(sizes, [part.source.weight for part in documents], args.seed)

    def seen(trained: int) -> list[dict[str, Any]]:
        """Passes over the epoch times how often each source's blocks stand in it."""
        passes, rows = trained / len(epoch), rows_of_each(epoch, sizes)
        return [
            {"epochs_seen": round(passes * n / max(size, 1), 4), "train_tokens": part.tokens}
            for n, size, part in zip(rows, sizes, blocks.training, strict=True)
        ]

    training = lazy_dataset(Chosen(Joined(blocks.training), epoch))
    return Text(training, Joined(blocks.held_out), blocks.held_out_bytes, seen)


def streamed_text(
    args: PretrainArguments, stream: HubStream, held_out: Documents, tokenizer: PreTrainedTokenizerBase, isolated: bool
) -> Text:
    """Blocks that are read while they are trained on; those held out come from the data cache."""
    blocks = StreamedBlocks(
        stream, tokenizer, args.block_tokens, isolated=isolated, seed=args.seed, ahead=2 * args.examples_per_step
    )

    def seen(trained: int) -> list[dict[str, Any]]:
        facts = blocks.seen(trained)
        return [
            {"rows": facts.rows, "rows_left_out": facts.left_out, "passes": facts.passes, "train_tokens": facts.tokens}
        ]

    packed = pack_documents(held_out.encode(tokenizer), args.block_tokens, isolated=isolated)
    return Text(blocks, packed, held_out.texts(held_out.held_out).bytes, seen)


class PretrainTrainer(StageTrainer, Trainer):
    """Trainer over packed blocks, with our held-out measure."""

    def measure(self) -> dict[str, float]:
        nll, tokens, _ = measure_tokens(self, self.eval_dataset, self.eval_rows)
        return {
            "perplexity": perplexity(nll, tokens),
            "loss": mean_loss(nll, tokens),
            "nll": nll,
            "held_out_tokens": tokens,
        }

    asks_router_logits = False  # for the load-balancing loss, which the model then adds

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        options = {"use_cache": False} | ({"output_router_logits": True} if self.asks_router_logits else {})
        return super().compute_loss(model, {**inputs, **options}, *args, **kwargs)


def new_tokenizer(args: PretrainArguments, documents: Sequence[Documents]) -> PreTrainedTokenizerBase:
    """A tokenizer trained on the training documents; the data cache keeps its vocabulary."""
    assert args.train_tokenizer is not None
    size = args.train_tokenizer.vocab_size

    def build(folder: Path) -> dict[str, Any]:
        texts = (text for part in documents for text in part.texts(part.training))
        train_bpe(texts, size).save(str(folder / "tokenizer.json"))
        return {}

    identity = {
        "vocab_size": size,
        "held_out_fraction": args.held_out_fraction,
        "trained_on": [[part.source.records.keys, part.source.single_document] for part in documents],
        "code": Path(train_bpe.__code__.co_filename).read_text(encoding="utf-8"),
    }
    names = ", ".join(part.source.name for part in documents)
    entry = DataCache(args.data_cache).entry(f"tokenizer of {names}", identity, build)
    return with_roles(Tokenizer.from_file(str(entry.folder / "tokenizer.json")))


if __name__ == "__main__":
    launch("pretrain", PretrainArguments, main)
