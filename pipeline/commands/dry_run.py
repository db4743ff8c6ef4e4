"""`rlhf check RECIPE --dry-run`: one real step of every stage, hand-offs included, with a shrunk model of the same class.

Each stage runs as it will run, from its own recipe, in a process of its own; only sizes and counts are small. Rows are the recipe's own
where they are here, else those of a data card, and that is said. What a step cannot show is looked at beside it: packages, trackers,
sharding, disk.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.commands.check import PARENTS
from pipeline.config import arguments
from pipeline.config.arguments import KINDS, STAGES, recipe_stages
from pipeline.errors import UserError
from pipeline.planning.sizing import LAYER_NAMES, parameters
from pipeline.training.lineage import read_lineage, verify_parent
from pipeline.training.stage import ERROR_FILE, ROOT, accelerate_config
from pipeline.training.trackers import installed, wandb_login

import yaml
from rich.console import Console

WIDTH, HEADS, LAYERS, VOCABULARY = 64, 4, 2, 512
ROWS = 48  # of each dataset
SMALL: dict[str, Any] = {
    "max_steps": 1, "eval_steps": 1, "save_steps": 1, "logging_steps": 1, "examples_per_step": 2, "examples_per_device": 1,
    "eval_examples_per_device": 4, "warmup_steps": 0, "held_out_fraction": 0.3, "keep_checkpoints": 1, "threads": 1,
}  # fmt: skip
SMALL_PPO: dict[str, Any] = {
    "total_rollouts": 1, "prompts_per_rollout": 4, "minibatches": 2, "ppo_epochs": 1, "eval_rollouts": 1, "eval_prompts": 2,
    "save_steps": 1, "logging_steps": 1, "max_response_tokens": 8, "held_out_fraction": 0.3, "value_warmup_rollouts": 0, "ptx_ratio": 1.0,
    "keep_checkpoints": 1, "threads": 1,
}  # fmt: skip
CARDS = {
    "document": "demo_corpus",
    "demonstration": "demo_demonstrations",
    "ranking": "demo_comparisons",
    "prompt": "demo_prompts",
}


def dry_run(recipe: str, data_root: str | None = None, parent: str | None = None, accelerate: str | None = None) -> int:
    """Run it; prints a line a stage, warnings, and the first error.

    Raises:
        UserError: what would break the run, with the remedy.
    """
    import torch

    torch.set_num_threads(1)  # a forked child must not inherit a pool of threads
    started = time.perf_counter()
    folder = Path(recipe)
    console = Console(highlight=False)
    sharded = _sharded(accelerate)
    with tempfile.TemporaryDirectory(prefix="rlhf-dry-run-") as scratch:
        outputs: dict[str, Path] = {}
        for position, name in enumerate(recipe_stages(folder)):
            clock = time.perf_counter()
            flags = ["--config", str(folder / f"{name}.yaml")]
            flags += ["--data_root", data_root] if data_root else []
            flags += ["--parent", parent] if parent and position == 0 else []
            args: Any = arguments.load(STAGES[name], flags)
            warnings = [*_refuse_what_no_step_shows(name, args, sharded), *_disk(name, args)]
            values = _shrunk(name, args, Path(scratch), outputs, warnings)
            _run(name, values, folder, Path(scratch))
            outputs[os.path.normpath(args.output_dir)] = Path(scratch) / name
            lineage = read_lineage(Path(scratch) / name)
            assert lineage is not None, f"{name} left no lineage"
            console.print(f"{name}: one step, saved and read again · {time.perf_counter() - clock:.0f} s", markup=False)
            for warning in warnings:
                console.print(f"[yellow]warning[/]: {name}: ", end="")
                console.print(warning, markup=False)
    console.print(f"{recipe}: dry run passed · {time.perf_counter() - started:.0f} s", markup=False)
    return 0


# ------------------------------------------------------------------------------------------------ beside the step


def _sharded(accelerate: str | None) -> str | None:
    kind = accelerate_config(accelerate).get("distributed_type") if accelerate else None
    return kind if kind in ("FSDP", "DEEPSPEED") else None


def _refuse_what_no_step_shows(name: str, args: Any, sharded: str | None) -> list[str]:
    """Packages, trackers and sharding; returns warnings."""
    warnings = []
    if sharded and (name in ("reward", "ppo") or getattr(args, "lora", None) is not None):
        what = name if name in ("reward", "ppo") else f"{name} with lora"
        raise UserError(
            f"{what} does not run under {sharded}; start it with recipes/accelerate/ddp.yaml or one process"
        )
    needed = {"deepspeed": sharded == "DEEPSPEED"}
    needed["bitsandbytes"] = bool(getattr(args, "quantization", None)) or getattr(args, "optimizer", "") == "adamw_8bit"
    for tracker in args.trackers:
        needed[tracker] = True
    for package, wanted in needed.items():
        if wanted and not installed(package):
            raise UserError(f"{name}: {package} is not installed; pip install {package}, or drop what asks for it")
    if "wandb" in args.trackers and not wandb_login():
        warnings.append("wandb has no log-in here and will write offline; run `wandb login` or set WANDB_API_KEY")
    return warnings


def _disk(name: str, args: Any) -> list[str]:
    """Whether the stage's weights and checkpoints would fit on the disk that it writes to."""
    try:
        config = _config(args)
    except (UserError, OSError, ValueError):
        return []
    if config is None:
        return []
    size = parameters(config).total
    networks = 2 if name == "ppo" else 1  # policy and value
    kept = 12 * size * networks * (args.keep_checkpoints + 1)  # weights and both moments of Adam; one is being written
    needed = kept + 4 * size * networks
    place = Path(args.output_dir).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        return [
            f"the disk of {args.output_dir} has {free / 2**30:,.1f} GiB free; weights and {args.keep_checkpoints + 1} checkpoints need "
            f"{needed / 2**30:,.1f} GiB; free some, or point output_dir elsewhere"
        ]
    return []


# ------------------------------------------------------------------------------------------------ the shrunk recipe


def _config(args: Any) -> Any:
    """The config of the stage's own model, where it is not an earlier stage's."""
    import transformers

    if getattr(args, "config_class", None) and args.parent is None:
        vocabulary = args.train_tokenizer.vocab_size if args.train_tokenizer else 32_000
        return getattr(transformers, args.config_class)(**{"vocab_size": vocabulary, **args.model_config})
    if args.parent and Path(args.parent).is_dir():
        return transformers.AutoConfig.from_pretrained(args.parent)
    return None


def shrink(config: Any) -> Any:
    """The same architecture with few, narrow layers; vocabulary and context stay."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    groups = getattr(text, "num_key_value_heads", None)
    changes = dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size"), WIDTH)
    changes |= dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_ff"), 2 * WIDTH)
    changes |= dict.fromkeys(LAYER_NAMES, LAYERS) | dict.fromkeys(("num_attention_heads", "n_head", "num_heads"), HEADS)
    changes |= {"num_key_value_heads": HEADS if groups in (None, heads) else HEADS // 2, "head_dim": WIDTH // HEADS}
    for name, value in changes.items():
        if getattr(text, name, None) is not None:
            setattr(text, name, value)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:LAYERS]
    return small


def _shrunk(name: str, args: Any, scratch: Path, outputs: dict[str, Path], warnings: list[str]) -> dict[str, Any]:
    """The stage's recipe with small numbers, its inputs those of the dry run."""
    values = arguments.as_dict(args)
    values |= SMALL_PPO if name == "ppo" else SMALL
    values |= {"output_dir": str(scratch / name), "report_to": ["none"], "quiet": True, "data_root": "."}
    kinds = {
        "datasets": KINDS[name],
        "center_on": "demonstration",
        "eval_datasets": "prompt",
        "ptx_datasets": "document",
    }
    for key, kind in kinds.items():
        if values.get(key):
            values[key] = [_entry(entry, kind, args.data_root, warnings) for entry in getattr(args, key)]
    if args.parent:
        values["parent"] = _parent(args.parent, PARENTS[name], scratch / f"{name}-parent", outputs, warnings)
    elif name == "pretrain":
        small = shrink(_config(args))
        values["model_config"] = {key: getattr(small, key, None) for key in args.model_config}
        if args.train_tokenizer:
            values["train_tokenizer"] = {"vocab_size": min(args.train_tokenizer.vocab_size, VOCABULARY)}
        values["block_tokens"] = min(args.block_tokens, 128)
    for key in ("reward", "score"):
        if values.get(key):
            values[key] = [
                {
                    **source,
                    "model": _parent(
                        source["model"], ("reward",), scratch / f"{name}-{key}-{n}", outputs, warnings, True
                    ),
                }
                if source["model"]
                else source
                for n, source in enumerate(values[key])
            ]
    if values.get("held_out_labelers") or values.get("labeler_weights"):
        # The first rows may not hold every labeler that the whole file does; names are checked where the file is read.
        values["held_out_labelers"], values["labeler_weights"] = [], {}
    values["labeler_folds"] = None
    if values.get("unit_variance_samples"):
        values["unit_variance_samples"] = 16
    return {k: v for k, v in values.items() if v is not None and k in {f.name for f in dataclasses.fields(args)}}


def _entry(entry: Any, kind: str, data_root: str, warnings: list[str]) -> dict[str, Any]:
    """The first rows of a dataset; of a card's where the dataset is not here."""
    if entry.path and (path := Path(data_root) / entry.path).exists():
        found = {**dataclasses.asdict(entry), "path": str(path.resolve())}
        if path.suffix != ".txt":
            found["max_rows"] = min(entry.max_rows or ROWS, ROWS)
        return {k: v for k, v in found.items() if v is not None}
    where = entry.hub or str(Path(data_root) / entry.path)
    why = "is on the Hub" if entry.hub else "does not exist"
    warnings.append(f"dataset {where} {why}: its rows were not read, those of data_cards/{CARDS[kind]} stood in")
    return {"path": str(ROOT / "data_cards" / CARDS[kind]), "max_rows": ROWS}


def _parent(
    path: str,
    stages: tuple[str, ...],
    target: Path,
    outputs: dict[str, Path],
    warnings: list[str],
    scalar: bool = False,
) -> str:
    """Where the stage's parent is in the dry run: an earlier stage's folder, or a shrunk model of the parent's class."""
    if os.path.normpath(path) in outputs:
        return str(outputs[os.path.normpath(path)])
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        if Path(path).exists() or path.startswith((".", "/", "runs/")):
            raise UserError(
                f"parent {path!r}: {str(error).splitlines()[0]}; run the stage that writes it, or correct the path"
            ) from error
        warnings.append(f"{path} cannot be reached, so its class and tokenizer were not tried; a small Llama stood in")
        config = transformers.LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=4096)
        _stand_in_tokenizer(target)
    else:
        if Path(path).is_dir() and (Path(path) / "lineage.json").exists():
            verify_parent(path, stages)
        if Path(path).is_dir() and not any(Path(path).glob("*token*")):
            earlier = list(outputs.values())[-1:]
            whose = "an earlier stage's" if earlier else "one of the demo's corpus"
            warnings.append(f"{path} has no tokenizer; {whose} stood in")
            if earlier:
                transformers.AutoTokenizer.from_pretrained(earlier[0]).save_pretrained(target)
            else:
                _stand_in_tokenizer(target)
            config.vocab_size = VOCABULARY
        else:
            transformers.AutoTokenizer.from_pretrained(path).save_pretrained(target)
    auto: Any = transformers.AutoModelForSequenceClassification if scalar else transformers.AutoModelForCausalLM
    small = shrink(config)
    architecture = (config.architectures or [""])[0]
    if "ForMaskedLM" in architecture or architecture.endswith("PreTraining"):
        auto = transformers.AutoModelForMaskedLM
    if scalar:
        small.num_labels = config.num_labels
    auto.from_config(small).save_pretrained(target)
    return str(target)


def _stand_in_tokenizer(target: Path) -> None:
    from pipeline.data.records import PARSERS, read_jsonl
    from pipeline.models.tokenizer_training import train_tokenizer

    rows = read_jsonl(ROOT / "data_cards" / "demo_corpus" / "train.jsonl", PARSERS["document"], 100)
    train_tokenizer([row["text"] for row in rows], VOCABULARY).save_pretrained(target)


# ------------------------------------------------------------------------------------------------ a stage in its process


def _run(name: str, values: dict[str, Any], folder: Path, scratch: Path) -> None:
    """One stage in a forked process; its own words where it fails.

    Raises:
        UserError: what the stage said, or that it failed and how.
    """
    config = scratch / f"{name}.yaml"
    config.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    error_file, log = scratch / f"{name}-error.json", scratch / f"{name}.log"
    body = _body(name)
    process = multiprocessing.get_context("fork").Process(
        target=_child, args=(name, body, config, folder, error_file, log), daemon=False
    )
    process.start()
    process.join()
    if process.exitcode == 0:
        return
    if error_file.is_file():
        message = json.loads(error_file.read_text(encoding="utf-8"))["message"]
        raise UserError(f"{name}: {message}".replace(str(config), f"{folder / name}.yaml"))
    last = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()][-1:]
    raise UserError(f"{name}: its step fails: {last[0] if last else f'exit code {process.exitcode}'}")


def _body(name: str) -> Callable[[Any], None]:
    import importlib

    return importlib.import_module(f"pipeline.{name}").main  # type: ignore[no-any-return]


def _child(name: str, body: Any, config: Path, folder: Path, error_file: Path, log: Path) -> None:
    from pipeline.config.functions import import_from
    from pipeline.training.stage import launch

    with log.open("w", encoding="utf-8") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        os.environ |= {ERROR_FILE: str(error_file), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
        import_from(folder)
        try:
            launch(name, STAGES[name], body, ["--config", str(config)])
        except SystemExit as error:
            sys.stdout.flush()
            os._exit(error.code if isinstance(error.code, int) else 1)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)
