"""The recipe that `rlhf init` writes: of each stage the keys that differ from their defaults, or that a reader must see."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.commands.look import Dataset, Lengths
from pipeline.config.stages import STAGES, SUPPORT

import numpy as np
import yaml

# Sizes of a model from nothing, by the bytes of its text; for more, start from a pretrained model.
NEW_MODELS = (
    (5_000_000, {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}, 2048),
    (100_000_000, {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}, 8192),
    (float("inf"), {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}, 16384),
)  # fmt: skip
NEW_CONTEXT = 1024
HELD_OUT = 0.1
FEW_ROWS = 5000


@dataclass(frozen=True)
class Key:
    """One line of a recipe. shown: even where the value is the default."""

    name: str
    value: Any
    comment: str = ""
    shown: bool = False


@dataclass
class Draft:
    """What a recipe is made from.

    Attributes:
        folder: of the recipe; its name is the run's.
        base: model to start from; None: one from nothing.
        context: tokens that the model reads at most, where known.
    """

    folder: Path
    task: str
    base: str | None
    data: Mapping[str, list[Dataset]]  # by kind
    lengths: Mapping[str, Lengths]  # by kind
    context: int | None = None
    reward: str | None = None
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)  # by stage: what the hardware asks for

    @property
    def stages(self) -> list[str]:
        """The stages that the data allow."""
        there = {SUPPORT[stage].rows: stage for stage in STAGES}
        stages = [there[kind] for kind in ("document", "demonstration", "ranking") if self.data.get(kind)]
        if self.data.get("prompt") and (self.reward or "reward" in stages):
            stages.append("ppo")
        return [stage for stage in STAGES if stage in stages]

    @property
    def small(self) -> bool:
        """Whether a model from nothing is trained, which takes larger steps than a pretrained one."""
        return self.base is None

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def output(self, stage: str) -> str:
        return f"runs/{self.name}/{stage}"

    def parent(self, stage: str) -> str | None:
        """The model that a stage starts from: the newest language model before it."""
        before = [
            s for s in ("pretrain", "sft") if s in self.stages and list(STAGES).index(s) < list(STAGES).index(stage)
        ]
        return self.output(before[-1]) if before else self.base

    def write(self) -> None:
        """Write the stages' files."""
        for stage in self.stages:
            (self.folder / f"{stage}.yaml").write_text(self.text(stage), encoding="utf-8")

    def text(self, stage: str) -> str:
        keys = {"pretrain": _pretrain, "sft": _sft, "reward": _reward, "ppo": _ppo}[stage](self)
        changes = self.changes.get(stage, {})
        keys = [key for key in keys if key.name not in changes]
        keys += [Key(name, value, "so that it fits the device: rlhf plan") for name, value in changes.items()]
        head = {
            "pretrain": "Language modelling on plain text.",
            "sft": "Supervised fine-tuning: learn from demonstrations; the loss is on the responses only.",
            "reward": "A reward model from comparisons.",
            "ppo": "PPO against the reward, with a KL penalty to the model that it starts from.",
        }[stage]
        lines = [f"# {head} Keys that are left out have their defaults: python pipeline/{stage}.py --help"]
        return "\n".join([*lines, *(_line(key) for key in keys if key.shown or _differs(stage, key))]) + "\n"


def readme(draft: Draft, hardware: str) -> str:
    """The recipe's README.md."""
    data = "\n".join(f"- {dataset.describe()}" for datasets in draft.data.values() for dataset in datasets)
    stages = "\n".join(f"- `{stage}.yaml` → `{draft.output(stage)}`" for stage in draft.stages)
    start = f"Starts from `{draft.base}`." if draft.base else "Starts from nothing."
    return f"""# {draft.name}

{draft.task or "What the model shall do: write it here."}

{start} Fitted to {hardware}.

## Stages

{stages}

## Data

{data}

## Commands

    rlhf check {draft.folder}              # data, tokenizer, template, lengths
    rlhf check {draft.folder} --dry-run    # one real step of every stage, with a small model
    rlhf run {draft.folder}                # all stages; an interrupted one resumes
    rlhf report runs/{draft.name}
    rlhf chat runs/{draft.name}
"""


def _differs(stage: str, key: Key) -> bool:
    """Whether a value is another than the default of its dataclass, the defaults' only home."""
    fields = {f.name: f for f in dataclasses.fields(STAGES[stage])}
    default = fields[key.name]
    value = default.default if default.default is not dataclasses.MISSING else default.default_factory()  # type: ignore[misc, operator]
    return bool(value != key.value)


def _line(key: Key) -> str:
    """A key as YAML: lists in lines of their own, mappings in one, the comment behind or above."""
    flow = None if isinstance(key.value, dict) else False
    options: dict[str, Any] = {"allow_unicode": True, "sort_keys": False, "width": 1000}
    text = yaml.safe_dump({key.name: key.value}, default_flow_style=flow, **options).rstrip("\n")
    if not key.comment:
        return text
    return f"# {key.comment}\n{text}" if "\n" in text else f"{text}  # {key.comment}"


def entries(datasets: Sequence[Dataset]) -> list[dict[str, Any]]:
    """The `datasets:` of a recipe."""
    fields = ("path", "hub", "columns")
    return [{name: value for name in fields if (value := getattr(d.entry, name))} for d in datasets]


def _rounded_up(values: Sequence[int], percent: float, step: int, most: int | None) -> int:
    """A percentile as a multiple of `step`, at most `most`."""
    wanted = int(-(-float(np.percentile(values, percent)) // step) * step) if values else step
    return max(8, min(wanted, most) if most is not None else wanted)


# ------------------------------------------------------------------------------------------------ stages


def _start(draft: Draft, stage: str) -> list[Key]:
    keys = [Key("parent", draft.parent(stage))] if draft.parent(stage) else []
    keys.append(Key("output_dir", draft.output(stage)))
    kind = SUPPORT[stage].rows
    if draft.small and stage != "ppo":
        keys.append(Key("examples_per_step", 8, "few rows and a small model: many small steps"))
    guessed = any(dataset.guessed for dataset in draft.data[kind])
    comment = "columns were guessed from their names: our name: the file's" if guessed else ""
    return [*keys, Key("datasets", entries(draft.data[kind]), comment)]


def _pretrain(draft: Draft) -> list[Key]:
    keys = _start(draft, "pretrain")
    if draft.base is not None:
        return [*keys, Key("block_tokens", min(draft.context or NEW_CONTEXT, NEW_CONTEXT), "tokens of one packed row"), Key("learning_rate", 2e-5, "of a pretrained model; from nothing: 1e-3")]  # fmt: skip
    size = sum(len(record["text"]) for dataset in draft.data["document"] for record in dataset.source.records)
    sizes, vocabulary = next((sizes, words) for most, sizes, words in NEW_MODELS if size <= most)
    return [
        *keys,
        Key("train_tokenizer", {"vocab_size": vocabulary}, "a byte-level BPE of the text itself"),
        Key("config_class", "LlamaConfig", "any configuration class of transformers", shown=True),
        Key("model_config", {**sizes, "max_position_embeddings": NEW_CONTEXT, "tie_word_embeddings": True}, f"chosen for {size:,} characters of text; larger ones need more"),
        Key("block_tokens", 256, "tokens of one packed row", shown=True),
        Key("epochs", 3.0),
        Key("warmup_steps", 50),
    ]  # fmt: skip


def _adapts(draft: Draft, stage: str, learning_rate: float) -> list[Key]:
    """What SFT and reward share."""
    found = draft.lengths[SUPPORT[stage].rows].together
    tokens = _rounded_up(found, 99, 64, draft.context)
    longest = max(found, default=0)
    keys = [
        Key("max_tokens", tokens, f"longer examples are left out and counted; the longest seen has about {longest}", shown=True),
        Key("held_out_fraction", HELD_OUT, "the same in all stages, so that the same prompts are held out"),
    ]  # fmt: skip
    if draft.small:
        keys.append(Key("learning_rate", learning_rate, "a small model takes larger steps than a pretrained one"))
    return keys


def _sft(draft: Draft) -> list[Key]:
    rows = sum(dataset.rows for dataset in draft.data["demonstration"])
    keys = [*_start(draft, "sft"), *_adapts(draft, "sft", 5e-4)]
    if rows < FEW_ROWS:
        keys.append(Key("epochs", 3.0, f"{rows:,} demonstrations are few; InstructGPT trained for 16 epochs"))
    return keys


def _reward(draft: Draft) -> list[Key]:
    keys = [*_start(draft, "reward"), *_adapts(draft, "reward", 1e-4)]
    if demonstrations := draft.data.get("demonstration"):
        keys.append(Key("center_on", entries(demonstrations), "their mean score becomes 0 (InstructGPT)"))
    return keys


def _ppo(draft: Draft) -> list[Key]:
    prompts = draft.lengths["prompt"].prompts
    responses = [
        n for kind in ("demonstration", "ranking") if kind in draft.lengths for n in draft.lengths[kind].responses
    ]
    response = _rounded_up(responses, 95, 16, min(512, (draft.context or 1024) // 2))
    room = draft.context - response if draft.context else None
    prompt = _rounded_up(prompts, 99, 32, room)
    keys = _start(draft, "ppo")
    keys.insert(
        1, Key("reward", draft.reward or draft.output("reward"), "a model, a function module:name, or a weighted list")
    )
    keys += [
        Key("held_out_fraction", HELD_OUT, "the same in all stages, so that the same prompts are held out"),
        Key("max_prompt_tokens", prompt, f"the longest seen has about {max(prompts, default=0)}", shown=True),
        Key("long_prompts", "drop", "they are counted; `error` refuses them"),
        Key("max_response_tokens", response, "95 % of the responses in the data are shorter", shown=True),
        Key("kl_coef", STAGES["ppo"].__dataclass_fields__["kl_coef"].default, "weight of the penalty; raise it if the report names over-optimisation", shown=True),
        Key("eval_rollouts", 20, "rollouts between two evaluations on held-out prompts"),
        Key("save_steps", 20),
    ]  # fmt: skip
    if draft.small:
        keys += [Key("learning_rate", 3e-5, "a small model takes larger steps"), Key("value_learning_rate", 2e-4)]
    return keys
