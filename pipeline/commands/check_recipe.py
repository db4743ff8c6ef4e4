"""`rlhf check RECIPE`: every stage's own code up to its first step, on the recipe's data and on the parents that are there.

The stage's `main` runs in a process of its own and is stopped where training would begin, so check refuses what the
stage refuses, in the same words. A parent that an earlier stage of the recipe has yet to write is replaced by a small
model with the earlier stage's tokenizer.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from pipeline.commands.stage_process import run_in_process, stage_body
from pipeline.commands.stand_ins import own_config, save_shrunk
from pipeline.config.functions import import_from
from pipeline.config.reader import load
from pipeline.config.stages import REWARD_PARENTS, STAGES, SUPPORT, recipe_stages
from pipeline.data.encoded import encode_documents, encode_examples, encode_prompts
from pipeline.data.encoded_rankings import tokenize_rankings
from pipeline.data.encoding import ChatEncoder
from pipeline.data.parallel import map_batches
from pipeline.data.sources import Source, read_sources
from pipeline.data.stored_records import StoredText, decode
from pipeline.errors import UserError
from pipeline.models.tokenizer_training import train_tokenizer
from pipeline.models.tokenizers import assign_template, load_tokenizer
from pipeline.training.lineage import read_lineage, verify_parent
from pipeline.training.logs import set_up_logging
from pipeline.training.output_folder import StageOutput
from pipeline.training.run import Run
from pipeline.training.stage import check_output_folder, prepare_process
from pipeline.training.trackers import check_installed

from rich.console import Console
from rich.table import Table

logger = logging.getLogger("pipeline")
FP32_PER_STORED_BYTE = 2  # checkpoints are often bf16; models load in fp32


class InputsAccepted(Exception):
    """A stage has accepted its inputs and would train now."""


class CheckedRun(Run[Any]):
    """A run that ends where training would begin."""

    def begin(self, checkpoint: Path | None) -> list[int]:
        raise InputsAccepted


@dataclasses.dataclass
class Checked:
    """Results of the stages checked so far."""

    scratch: Path
    outputs: dict[str, Path] = dataclasses.field(default_factory=dict)  # output_dir → a small model in its place
    config: Any = None  # of the model that the recipe trains
    tokenizer: Any = None

    def pending(self, path: str | None) -> bool:
        """Whether an earlier stage of the recipe has yet to write this model."""
        if not path or os.path.normpath(path) not in self.outputs:
            return False
        lineage = read_lineage(Path(path))
        return lineage is None or lineage.get("status") != "complete"


def check_recipe(recipe: str, data_root: str | None, parent: str | None = None) -> int:
    """Check every stage; prints one table, raises UserError at the first thing that is wrong."""
    import torch

    torch.set_num_threads(1)  # a forked child must not inherit a pool of threads
    path = Path(recipe)
    stages = {path.stem: path} if path.is_file() else {name: path / f"{name}.yaml" for name in recipe_stages(path)}
    for name in stages:
        if name not in STAGES:
            raise UserError(f"{recipe!r}: a stage's file is called one of {', '.join(f'{s}.yaml' for s in STAGES)}")
    table = Table("stage", "dataset", "rows", "tokens: median / longest", "parent", title=f"{recipe}: fine")
    messages: list[str] = []
    with tempfile.TemporaryDirectory(prefix="rlhf-check-") as scratch:
        checked = Checked(Path(scratch))
        for position, (name, file) in enumerate(stages.items()):
            flags = ["--config", str(file), *(["--data_root", data_root] if data_root else [])]
            flags += ["--parent", parent] if parent and position == 0 else []
            args: Any = load(STAGES[name], flags)
            import_from(file.parent)
            for row in dataset_rows(name, args, checked):
                table.add_row(name, *row, args.parent or "—")
            messages += check_stage(name, args, file, checked)
            stand_in(name, args, checked)
    for message in dict.fromkeys(messages):
        print(message)
    Console().print(table)
    return 0


# ---------------------------------------------------------------------------------------------- datasets


def dataset_rows(name: str, args: Any, checked: Checked) -> list[tuple[str, str, str]]:
    """(name, rows, median and longest length) of each dataset of a stage.

    Raises:
        UserError: a parent or a dataset cannot be read, or most of its rows are too long.
    """
    if args.parent and not checked.pending(args.parent):
        checked.tokenizer = load_tokenizer(verify_parent(args.parent, SUPPORT[name].parents).path)
    if name == "pretrain" and args.datasets[0].streaming:  # its tokenizer is the parent's or an existing one
        checked.tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else checked.tokenizer
        return [(str(args.datasets[0].name or args.datasets[0].hub), "streamed", "—")]
    sources = read_sources(args.datasets, SUPPORT[name].rows, args.data_root, args.data_cache)
    sources += read_sources(getattr(args, "eval_datasets", []), "prompt", args.data_root, args.data_cache)
    if name == "pretrain" and not args.parent:
        texts = (record["text"] for source in sources for record in source.records)
        checked.tokenizer = (
            load_tokenizer(args.tokenizer)
            if args.tokenizer
            else train_tokenizer(texts, args.train_tokenizer.vocab_size)
        )
    rows = []
    for source in sources:
        lengths = sorted(_lengths(name, source, checked.tokenizer, args))
        _check_lengths(name, source, lengths, args)
        rows.append((source.name, f"{len(source.records):,}", f"{lengths[len(lengths) // 2]} / {lengths[-1]}"))
    return rows


def _lengths(stage: str, source: Source, tokenizer: Any, args: Any) -> list[int]:
    """Tokens of each row, from the data cache where the stage has encoded them or will take them from there."""
    records = source.records
    if stage == "pretrain":
        return encode_documents(records, tokenizer).lengths.tolist()
    if stage != "ppo" or args.chat_template:  # PPO refuses a parent without one
        assign_template(tokenizer, chat_template=args.chat_template)
    if not tokenizer.chat_template:
        return [0 for _ in records]
    encoder = ChatEncoder(tokenizer)
    if stage == "sft":
        return encode_examples(records, encoder, args.loss_on).lengths.tolist()
    if stage == "ppo":
        return encode_prompts(records, encoder).lengths.tolist()

    def longest(batch: list[StoredText]) -> list[int]:
        return [len(prompt) + max(map(len, texts)) for prompt, texts in tokenize_rankings(encoder, decode(batch))]

    return [length for batch in map_batches(longest, records.in_batches()) for length in batch]


def _check_lengths(stage: str, source: Source, lengths: list[int], args: Any) -> None:
    """More than half of the rows too long is no accident of the data but of the recipe."""
    key = "max_prompt_tokens" if stage == "ppo" else "max_tokens"
    limit = getattr(args, key, None)
    if limit is None:
        return
    over = sum(length > limit for length in lengths)
    if over * 2 > len(lengths) or (stage == "ppo" and over and args.long_prompts == "error"):
        raise UserError(
            f"{stage}: {over} of {len(lengths)} rows of {source.name} exceed {key} ({limit}); raise it"
            + (", or say `long_prompts: drop`" if stage == "ppo" else "")
        )


# ---------------------------------------------------------------------------------------------- the stage's own code


def check_stage(name: str, args: Any, config: Path, checked: Checked) -> list[str]:
    """Run the stage's `main` up to where training begins; returns what it printed.

    Raises:
        UserError: what the stage refuses.
    """
    check_output_folder(Path(args.output_dir), args)
    check_installed(args.trackers)
    local, replaced = _with_stand_ins(args, checked)
    if replaced and getattr(args, "roles", "") == "adapters":
        return [f"{name}: {', '.join(replaced)} not there yet, so its networks were not built; --dry-run builds them"]
    if too_large := _too_large(name, local):
        return [f"{name}: {too_large} does not fit into this machine's memory and was not loaded; --dry-run shrinks it"]
    folder, body = checked.scratch / name, stage_body(name)
    folder.mkdir()
    local = dataclasses.replace(local, output_dir=str(folder), report_to=[])
    output = StageOutput(Path(args.output_dir), name, dataclasses.asdict(args), config=str(config))

    def work() -> None:
        processes, _ = prepare_process(name, local)
        set_up_logging(None, 0, quiet=True)
        try:
            body(CheckedRun(name, local, output, None, processes))
        except InputsAccepted:
            return

    return run_in_process(name, work, checked.scratch)


def _with_stand_ins(args: Any, checked: Checked) -> tuple[Any, list[str]]:
    """The arguments with small models for parents that are pending, and the paths of those."""
    replaced: list[str] = []

    def here(path: str | None) -> str | None:
        if path is None or not checked.pending(path):
            return path
        replaced.append(path)
        return str(checked.outputs[os.path.normpath(path)])

    changes: dict[str, Any] = {key: here(getattr(args, key)) for key in ("parent", "reference") if hasattr(args, key)}
    for key in ("reward", "score"):
        if sources := getattr(args, key, []):
            changes[key] = [dataclasses.replace(source, model=here(source.model)) for source in sources]
    return dataclasses.replace(args, **changes), replaced


def _too_large(name: str, args: Any) -> str | None:
    """A parent that would not fit into memory in fp32, as often as the stage holds it."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None
    copies = 3 if name == "ppo" and args.roles == "separate" else 1  # policy, reference, value
    for path in [args.parent, *(source.model for source in getattr(args, "reward", []))]:
        files = Path(path).glob("*.safetensors") if path else []
        if sum(file.stat().st_size for file in files) * FP32_PER_STORED_BYTE * copies > free:
            return str(path)
    return None


def stand_in(name: str, args: Any, checked: Checked) -> None:
    """A small model in the place of what the stage will write, with its tokenizer, for the stages after it."""
    if args.parent and not checked.pending(args.parent):
        checked.config = own_config(args) or checked.config
    elif not args.parent:
        checked.config = own_config(args)
    if checked.config is None or checked.tokenizer is None:
        return
    folder = checked.scratch / f"{name}-output"
    config = type(checked.config).from_dict({**checked.config.to_dict(), "vocab_size": len(checked.tokenizer)})
    config.num_labels = 1
    save_shrunk(config, folder, scalar=name in REWARD_PARENTS)
    checked.tokenizer.save_pretrained(folder)
    checked.outputs[os.path.normpath(args.output_dir)] = folder
