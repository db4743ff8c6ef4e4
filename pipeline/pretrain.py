"""Stage 1: a causal language model from plain text, from nothing or continued from a checkpoint.

accelerate launch pipeline/pretrain.py --config recipes/demo/pretrain.yaml
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config.pretrain import PretrainArguments
from pipeline.config.stages import SUPPORT
from pipeline.data.cache import DataCache
from pipeline.data.collators import BlockCollator
from pipeline.data.documents import Documents, encode_blocks, split_documents
from pipeline.data.mixing import mixture_indices, rows_of_each
from pipeline.data.packing import Chosen, Joined, lazy_dataset
from pipeline.data.sources import fingerprint, read_sources
from pipeline.evaluation.language import bits_per_byte, mean_loss, perplexity
from pipeline.models.experts import set_router_loss
from pipeline.models.loading import check_context_length, load_causal_lm, new_causal_lm
from pipeline.models.tokenizer_training import train_bpe, with_roles
from pipeline.models.tokenizers import assign_pad, load_tokenizer
from pipeline.models.trials import isolates_packed_documents
from pipeline.training.identity import tokenizer_hashes
from pipeline.training.lineage import verify_parent
from pipeline.training.run import Run
from pipeline.training.stage import launch
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
    sources = read_sources(args.datasets, "document", args.data_root, args.data_cache)
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

    documents = [split_documents(source, args.held_out_fraction) for source in sources]
    tokenizer = given or new_tokenizer(args, documents)
    if parent:
        model = load_causal_lm(parent.path)
        check_context_length(model.config, args.block_tokens, "block_tokens")
    else:
        set_seed(args.seed)
        model = new_causal_lm(args.config_class, args.model_config, tokenizer, args.block_tokens)
    if note := assign_pad(tokenizer, model):
        logger.warning("pretrain: %s", note)
    isolated = isolates_packed_documents(model)
    if not isolated:
        logger.warning("pretrain: documents that share a block would see each other in this model; one per block")

    blocks = encode_blocks(documents, tokenizer, args.block_tokens, isolated)
    sizes, held_out = [len(part) for part in blocks.training], Joined(blocks.held_out)
    epoch = mixture_indices(sizes, [source.weight for source in sources], args.seed)
    mixed = lazy_dataset(Chosen(Joined(blocks.training), epoch))
    parameters = model.num_parameters()
    logger.info(
        "pretrain: %d blocks of %d tokens, %d held out, %.2f M parameters",
        len(mixed), args.block_tokens, len(held_out), parameters / 1e6,
    )  # fmt: skip

    trainer = PretrainTrainer(
        model=model,
        args=training_arguments(TrainingArguments, run),
        train_dataset=mixed,
        eval_dataset=held_out,
        data_collator=BlockCollator(tokenizer.pad_token_id, position_ids=isolated),
        processing_class=tokenizer,
    )
    shares = trainer.args.gradient_accumulation_steps * trainer.args.world_size
    if note := set_router_loss(model, args.router_aux_loss, shares):
        logger.warning("pretrain: %s", note)
    trainer.asks_router_logits = bool(args.router_aux_loss)
    prepare_trainer(trainer, run)
    resumed = train(trainer, run)

    metrics = {key.removeprefix("eval_"): value for key, value in trainer.evaluate().items()}
    metrics["bits_per_byte"] = bits_per_byte(metrics.pop("nll"), blocks.held_out_bytes)
    # How often each source's blocks were seen: passes over the epoch times how often they stand in it.
    passes = trainer.state.global_step * args.examples_per_step / len(mixed)
    epochs = [round(passes * n / max(size, 1), 4) for n, size in zip(rows_of_each(epoch, sizes), sizes, strict=True)]
    metrics |= {"held_out_bytes": blocks.held_out_bytes, "parameters": parameters, "steps": trainer.state.global_step}
    save_whole(trainer, tokenizer)
    run.finish(
        parents=[parent.record()] if parent else [],
        datasets=[
            {**s.provenance(), "epochs_seen": epochs[i], "train_tokens": blocks.training[i].tokens}
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
