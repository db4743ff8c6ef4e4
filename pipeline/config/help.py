"""`--help` of a stage: every key with its help, in groups, the common ones first."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
import types
import typing
from typing import Any, Literal

# In the order in which they are shown.
COMMON = (
    "parent", "output_dir", "datasets", "reward", "learning_rate", "epochs", "max_steps", "total_rollouts",
    "examples_per_step", "prompts_per_rollout", "max_tokens", "max_response_tokens", "kl_coef", "precision", "seed", "report_to",
)  # fmt: skip

# Groups that several stages have; a stage's own come before them.
SHARED = ("Optimization", "Batches", "Evaluation", "Data", "Run", "Logging", "Further options")


def help_text(stage: type[Any]) -> str:
    """Usage, the common keys, then the others under the groups that their dataclass names."""
    fields = {field.name: field for field in dataclasses.fields(stage)}
    hints = typing.get_type_hints(stage)
    groups: dict[str, list[str]] = {"Common keys": [name for name in COMMON if name in fields]}
    group = ""
    for name, field in fields.items():
        group = field.metadata["group"] or group
        if name not in COMMON:
            groups.setdefault(group, []).append(name)
    groups |= {title: groups.pop(title) for title in SHARED if title in groups}
    width = min(shutil.get_terminal_size().columns, 120)
    lines = ["usage: --config FILE [--key value …]", "", *textwrap.wrap(str(stage.__doc__), width), ""]
    lines += ["Every key may stand in the recipe (YAML) or be a flag; a flag overrides the recipe.", ""]
    for title, names in groups.items():
        lines += [f"{title}:", *(line for name in names for line in _entry(fields[name], hints[name], width)), ""]
    return "\n".join(lines)


def _entry(field: dataclasses.Field[Any], hint: Any, width: int) -> list[str]:
    text = str(field.metadata["help"])
    default = field.default
    if default not in (dataclasses.MISSING, None, "") and "default:" not in text:
        text += f" (default: {str(default).lower() if isinstance(default, bool) else default})"
    head = f"  --{field.name} {_kind(hint)}"
    start = f"{head:<34}" if len(head) < 33 else f"{head}\n{'':<34}"
    return (
        textwrap.fill(text, width, initial_indent=" " * 34, subsequent_indent=" " * 34)
        .replace(" " * 34, start, 1)
        .splitlines()
    )


def _kind(hint: Any) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _kind(next(part for part in parts if part is not type(None)))
    if origin is Literal:
        return "{" + ",".join(parts) + "}"
    if origin is list:
        return f"{_kind(parts[0])} …"
    if dataclasses.is_dataclass(hint) or origin is dict:
        return "YAML"
    return {int: "N", float: "X", bool: "true|false"}.get(hint, "TEXT")
