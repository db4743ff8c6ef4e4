"""`rlhf check RECIPE`: is it sane, before anything is launched: YAML, data, tokenizer, template, lengths, hand-offs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pipeline.config import arguments
from pipeline.config.arguments import KINDS, STAGES, recipe_stages
from pipeline.config.functions import import_from, import_function
from pipeline.data.encoding import ChatEncoder, document_ids
from pipeline.data.records import Record
from pipeline.data.sources import Source, read_sources
from pipeline.errors import UserError
from pipeline.models.loading import assign_template, load_tokenizer
from pipeline.models.tokenizer_training import train_tokenizer
from pipeline.training.lineage import verify_parent

from rich.console import Console
from rich.table import Table

PARENTS = {
    "pretrain": ("pretrain", "sft", "ppo"),
    "sft": ("pretrain", "sft", "ppo"),
    "reward": ("pretrain", "sft", "reward", "ppo"),
    "ppo": ("sft", "ppo"),
}


def check_recipe(recipe: str, data_root: str | None) -> int:
    """Check every stage; prints one table, raises UserError at the first thing that is wrong."""
    path = Path(recipe)
    stages = {path.stem: path} if path.is_file() else {name: path / f"{name}.yaml" for name in recipe_stages(path)}
    for name in stages:
        if name not in STAGES:
            raise UserError(f"{recipe!r}: a stage's file is called one of {', '.join(f'{s}.yaml' for s in STAGES)}")
    table = Table("stage", "dataset", "rows", "tokens: median / longest", "parent", title=f"{recipe}: fine")
    tokenizer: Any = None
    outputs: set[str] = set()
    for name, file in stages.items():
        import_from(file.parent)
        flags = ["--config", str(file), *(["--data_root", data_root] if data_root else [])]
        args: Any = arguments.load(STAGES[name], flags)
        sources = read_sources(args.datasets, KINDS[name], args.data_root)
        read_sources(getattr(args, "center_on", []), "demonstration", args.data_root)
        eval_sources = read_sources(getattr(args, "eval_datasets", []), "prompt", args.data_root)
        for function in [
            getattr(args, "truth", None),
            *getattr(args, "judges", []),
            *(s.function for s in [*getattr(args, "reward", []), *getattr(args, "score", [])]),
        ]:
            if function:
                import_function(function)
        parent = args.parent
        if parent and os.path.normpath(parent) not in outputs:  # else an earlier stage of this recipe writes it
            folder = verify_parent(parent, PARENTS[name])
            tokenizer = load_tokenizer(folder.path)
        for source in getattr(args, "reward", []):
            if source.model and os.path.normpath(source.model) not in outputs:
                verify_parent(source.model, ("reward",))
        if name == "pretrain" and not parent:
            texts = [record["text"] for source in sources for record in source.records]
            tokenizer = (
                load_tokenizer(args.tokenizer)
                if args.tokenizer
                else train_tokenizer(texts, args.train_tokenizer.vocab_size)
            )
        for source in [*sources, *eval_sources]:
            lengths = sorted(_lengths(name, source, tokenizer))
            _refuse_lengths(name, source, lengths, args)
            table.add_row(
                name,
                source.name,
                f"{len(source.records):,}",
                f"{lengths[len(lengths) // 2]} / {lengths[-1]}",
                parent or "—",
            )
        outputs.add(os.path.normpath(args.output_dir))
    Console().print(table)
    return 0


def _lengths(stage: str, source: Source, tokenizer: Any) -> list[int]:
    records = source.records
    if stage == "pretrain":
        return [len(ids) for ids in document_ids(tokenizer, [r["text"] for r in records])]
    assign_template(tokenizer)
    encoder = ChatEncoder(tokenizer)
    return [_length(stage, record, encoder) for record in records]


def _length(stage: str, record: Record, encoder: ChatEncoder) -> int:
    if stage == "sft":
        return len(encoder.dialogue(record["messages"])[0])
    prompt = len(encoder.prompt_ids(record["prompt"]))
    if stage == "ppo":
        return prompt
    return prompt + max(len(encoder.response_ids(response)) for response in record["responses"])


def _refuse_lengths(stage: str, source: Source, lengths: list[int], args: Any) -> None:
    """More than half of the rows too long is no accident of the data but of the recipe."""
    limit = args.max_prompt_tokens if stage == "ppo" else getattr(args, "max_tokens", None)
    if limit is None:
        return
    over = sum(length > limit for length in lengths)
    if over * 2 > len(lengths) or (stage == "ppo" and over and args.long_prompts == "error"):
        key = "max_prompt_tokens" if stage == "ppo" else "max_tokens"
        raise UserError(
            f"{stage}: {over} of {len(lengths)} rows of {source.name} exceed {key} ({limit}); raise it"
            + (", or say `long_prompts: drop`" if stage == "ppo" else "")
        )
