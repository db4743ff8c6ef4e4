"""One reader for recipes and flags: both are YAML nodes, checked against a stage's dataclass.

A recipe is composed with its marks, so that a wrong key, type or value is answered with its line. A flag's text
becomes a node of the same kind. Nothing in a recipe is executed, and a small file cannot become a large value.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pipeline.config.help import help_text
from pipeline.config.rewards import RewardSource, reward_source
from pipeline.config.stage import StageArguments
from pipeline.errors import UserError, shorten

import yaml

Arguments = TypeVar("Arguments", bound=StageArguments)
MAX_BYTES = 1_000_000  # of a recipe
MAX_VALUES = 10_000  # aliases counted each time that they are read
MAX_DEPTH = 30
TAG = "tag:yaml.org,2002:"
NUMBERS = ("int", "float", "timestamp")  # plain YAML of these kinds is text where text is wanted
KIND_NAMES = {"int": "a whole number", "float": "a number", "timestamp": "a date"}
NOT_DECIMAL = re.compile(r"[-+]?(0[0-7_]+|.*:.*)")  # of YAML 1.1's numbers: 010 is 8, and 1:30 is 90
TYPE_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
ACCESS_TOKEN = re.compile(r"\b(hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,})")


def load(stage: type[Arguments], argv: Sequence[str]) -> Arguments:
    """The stage's arguments from `--config FILE` and flags; `--help` prints all keys and exits.

    Raises:
        UserError: with the recipe's line, or the flag, of what is wrong.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(stage))
        raise SystemExit(0)
    path, flags = split_config(argv)
    values = read_recipe(path, stage) if path else {}
    given = read_flags(flags, stage)
    try:
        return stage(**{**values, **given})
    except ValueError as error:  # keys that do not go together
        raise UserError(str(error), file=None if given else path) from error


def split_config(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The file of `--config FILE` or `--config=FILE`, and the other flags."""
    path: Path | None = None
    others: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, text = word.partition("=")
        if name != "--config":
            others.append(word)
            continue
        text = text if equals else next(words, "")
        if not text:
            raise UserError("--config needs a file; e.g. --config recipes/demo/sft.yaml")
        path = Path(os.path.expanduser(text))
    return path, others


def read_recipe(path: Path, stage: type[Any]) -> dict[str, Any]:
    """A recipe's top-level values, checked and built into the stage's types."""
    node = _compose(_read(path), path)
    if node is None:
        raise UserError("the recipe is empty", file=path, line=1)
    return _Reader(path).mapping(node, stage)


def _read(path: Path) -> str:
    if path.is_dir():
        raise UserError("is a folder; name a recipe's file in it, e.g. sft.yaml", file=path)
    if path.exists() and not path.is_file():
        raise UserError("is no regular file; save the recipe to a file", file=path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"is larger than {MAX_BYTES:,} bytes; it is no recipe", file=path)
        raw = path.read_bytes()
        if b"\0" in raw:
            raise UserError("cannot be read: it is UTF-16 or holds NUL bytes; save the recipe as UTF-8", file=path)
        return raw.decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError("no such recipe; see recipes/ for examples", file=path) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"cannot be read: not UTF-8 (byte {error.start + 1}); save the recipe as UTF-8", file=path
        ) from error
    except OSError as error:
        raise UserError(f"cannot be read: {error}", file=path) from error


def _compose(text: str, path: Path | None, flag: str = "") -> yaml.Node | None:
    """The root node of a YAML text.

    Args:
        flag: start of the message where the text is a flag's.
    """
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else None
        problem = getattr(error, "problem", None)
        if isinstance(error, yaml.reader.ReaderError):
            line, problem = text.count("\n", 0, error.position) + 1, f"character #x{ord(text[error.position]):04x}"
        first = str(problem or error).splitlines()[0]
        raise UserError(f"{flag}not valid YAML: {first}", file=path, line=line if path else None) from error
    except RecursionError:
        raise UserError(f"{flag}not valid YAML: nested too deeply", file=path) from None


def read_flags(flags: Sequence[str], stage: type[StageArguments]) -> dict[str, Any]:
    """The values of `--key value`, `--key=value` and `--key a b c`; of a flag given twice the last counts."""
    reader = _Reader(None)
    fields = {field.name: field for field in dataclasses.fields(stage)}
    hints = typing.get_type_hints(stage)
    values: dict[str, Any] = {}
    words = list(flags)
    while words:
        word = words.pop(0)
        name, equals, text = word.partition("=")
        key = name.removeprefix("--").replace("-", "_")
        if not name.startswith("--") or key not in fields:
            _unknown_flag(name, list(fields))
        hint = _without_none(hints[key])
        texts = [text] if equals else []
        while words and not words[0].startswith("--") and (not texts or typing.get_origin(hint) is list):
            texts.append(words.pop(0))
        if not texts and hint is bool:
            texts = ["true"]
        if not texts:
            raise UserError(f"command line: --{key} needs a value; `--help` lists the keys")
        values[key] = reader.field(_flag_node(texts, hint, key), fields[key], hints[key])
    return values


def _unknown_flag(word: str, keys: list[str]) -> typing.NoReturn:
    near = difflib.get_close_matches(word, [f"--{key}" for key in keys], n=1)
    hint = f"did you mean {near[0]}?" if near else "`--help` lists the keys"
    raise UserError(f"command line: unknown flag {shorten(word)}; {hint}")


def _flag_node(texts: list[str], hint: Any, key: str) -> yaml.Node:
    """The YAML node that a flag's texts stand for: text stays as it is, mappings are YAML like `{r: 8}`."""
    if typing.get_origin(hint) is list:
        (item,) = typing.get_args(hint)
        return yaml.SequenceNode(TAG + "seq", [_flag_node([text], item, key) for text in texts])
    (text,) = texts
    if hint is str or typing.get_origin(hint) is Literal or hint is RewardSource:
        return yaml.ScalarNode(TAG + "str", text)
    if dataclasses.is_dataclass(hint) or typing.get_origin(hint) is dict:
        node = _compose(text, None, f"command line: {key}: ")
        return node if node is not None else yaml.ScalarNode(TAG + "null", text)
    return yaml.ScalarNode(yaml.SafeLoader("").resolve(yaml.ScalarNode, text, (True, False)), text)


def _without_none(hint: Any) -> Any:
    """`int` of `int | None`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(part for part in typing.get_args(hint) if part is not type(None))
    return hint


@dataclass
class _Reader:
    """Builds values from YAML nodes, refusing what a plain loader would let pass."""

    path: Path | None  # None: flags
    read: int = 0  # values so far
    open: list[int] = dataclasses.field(default_factory=list)  # ids of the nodes around the current one

    def fail(self, node: yaml.Node, message: str) -> typing.NoReturn:
        if self.path is None:
            raise UserError(f"command line: {message}")
        raise UserError(message, file=self.path, line=node.start_mark.line + 1)

    @contextlib.contextmanager
    def entered(self, node: yaml.Node, name: str) -> Iterator[None]:
        """Count a node; refuse endless and exploding ones."""
        self.read += 1
        if id(node) in self.open:
            self.fail(node, f"{name}: an alias refers to what it stands in; write the values out")
        if self.read > MAX_VALUES:
            self.fail(node, f"{name}: more than {MAX_VALUES:,} values, aliases included; write fewer")
        if len(self.open) >= MAX_DEPTH:
            self.fail(node, f"{name}: nested too deeply")
        self.open.append(id(node))
        yield
        self.open.pop()

    def mapping(self, node: yaml.Node, cls: Any) -> dict[str, Any]:
        """Checked values of a dataclass's keys."""
        if not isinstance(node, yaml.MappingNode) or node.tag != TAG + "map":
            self.fail(node, f"expected `key: value` lines for {cls.__name__}")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        hints = typing.get_type_hints(cls)
        values: dict[str, Any] = {}
        for name, name_node, value_node in self.pairs(node):
            if name not in fields:
                near = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(fields))}"
                self.fail(name_node, f"unknown key {shorten(name)}; {hint}")
            values[name] = self.field(value_node, fields[name], hints[name])
        return values

    def pairs(self, node: yaml.MappingNode) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
        """(key, its node, the value's node) of a mapping; keys are text, each stands once."""
        seen = set()
        for name_node, value_node in node.value:
            if not isinstance(name_node, yaml.ScalarNode):
                self.fail(name_node, "a list or mapping stands where a key must; write `key: value`")
            if name_node.tag == TAG + "merge":
                self.fail(name_node, "merge keys (<<) are not read; write the keys out")
            name = self.text(name_node, "a key")
            if name in seen:
                self.fail(name_node, f"key {shorten(name)} stands twice; keep one")
            seen.add(name)
            yield name, name_node, value_node

    def field(self, node: yaml.Node, field: dataclasses.Field[Any], hint: Any) -> Any:
        """The value of one key, in its range."""
        value = self.value(node, hint, field.name)
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]:
            self.check_range(node, field, part)
        if field.metadata.get("path") and isinstance(value, str):
            return self.expanded(node, value, field.name)
        return value

    def check_range(self, node: yaml.Node, field: dataclasses.Field[Any], value: Any) -> None:
        low, high = field.metadata.get("low"), field.metadata.get("high")
        if low is None or high is None or value is None or low <= value <= high:
            return
        self.fail(node, f"{field.name}: {shorten(value)} is out of range; it must lie between {low:g} and {high:g}")

    def expanded(self, node: yaml.Node, path: str, name: str) -> str:
        whole = os.path.expanduser(path)
        if whole.startswith("~"):
            self.fail(node, f"{name}: no home folder is known for {shorten(path)}; write the path out")
        return whole

    def value(self, node: yaml.Node, hint: Any, name: str) -> Any:
        """A value of the type that `hint` says."""
        with self.entered(node, name):
            if hint is not _without_none(hint):
                if isinstance(node, yaml.ScalarNode) and node.tag == TAG + "null":
                    return None
                hint = _without_none(hint)
            origin = typing.get_origin(hint)
            if dataclasses.is_dataclass(hint):
                return self.build(node, hint, name)
            if origin is list:
                return self.sequence(node, typing.get_args(hint)[0], name)
            if origin is dict:
                return self.dictionary(node, typing.get_args(hint)[1], name)
            if origin is Literal:
                return self.choice(node, typing.get_args(hint), name)
            return self.plain(node, name) if hint is Any else self.scalar(node, hint, name)

    def build(self, node: yaml.Node, cls: Any, name: str) -> Any:
        try:
            if cls is RewardSource and isinstance(node, yaml.ScalarNode):
                return reward_source(self.text(node, name))
            return cls(**self.mapping(node, cls))
        except ValueError as error:
            self.fail(node, str(error))

    def sequence(self, node: yaml.Node, item: Any, name: str) -> list[Any]:
        if item is RewardSource and not isinstance(node, yaml.SequenceNode):
            return [self.build(node, item, name)]  # `reward: runs/demo/reward` is the list's common case
        if not isinstance(node, yaml.SequenceNode) or node.tag != TAG + "seq":
            self.fail(node, f"{name}: expected a list (`- …` lines or [a, b])")
        return [self.value(part, item, name) for part in node.value]

    def dictionary(self, node: yaml.Node, item: Any, name: str) -> dict[str, Any]:
        if not isinstance(node, yaml.MappingNode) or node.tag != TAG + "map":
            self.fail(node, f"{name}: expected `key: value` lines")
        return {key: self.value(value, item, f"{name}.{key}") for key, _, value in self.pairs(node)}

    def choice(self, node: yaml.Node, known: tuple[str, ...], name: str) -> str:
        value = self.text(node, name)
        if value not in known:
            near = difflib.get_close_matches(value, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"one of: {', '.join(known)}"
            self.fail(node, f"{name}: {shorten(value)} is not known; {hint}")
        return value

    def plain(self, node: yaml.Node, name: str) -> Any:
        """Lists, mappings and scalars of any type, for keys that hand them on to a library."""
        if isinstance(node, yaml.MappingNode) and node.tag == TAG + "map":
            return self.dictionary(node, Any, name)
        if isinstance(node, yaml.SequenceNode) and node.tag == TAG + "seq":
            return self.sequence(node, Any, name)
        if node.tag == TAG + "timestamp":
            return self.text(node, name)
        value = self.constructed(node, name, "a plain value")
        if isinstance(value, float) and value != value:
            self.fail(node, f"{name}: NaN is not a number to train with")
        return self.text(node, name) if isinstance(value, str) else value

    def scalar(self, node: yaml.Node, hint: type, name: str) -> Any:
        if hint is str:
            return self.text(node, name)
        value = self.constructed(node, name, TYPE_NAMES[hint])
        with contextlib.suppress(ValueError, OverflowError):  # YAML 1.1 reads 1e-5 as text
            if hint is float and type(value) in (str, int):
                value = float(value)
        if hint is float and value != value:
            self.fail(node, f"{name}: NaN is not a number to train with")
        if type(value) is not hint:
            self.fail(node, f"{name}: expected {TYPE_NAMES[hint]}, got {shorten(value)}")
        return value

    def text(self, node: yaml.Node, name: str) -> str:
        if isinstance(node, yaml.ScalarNode) and node.tag.removeprefix(TAG) in (*NUMBERS, "str"):
            value = str(node.value)
        elif isinstance(node, yaml.ScalarNode) and node.tag == TAG + "bool":
            self.fail(
                node, f"{name}: expected text, but YAML reads {node.value} as true or false; write '{node.value}'"
            )
        else:
            self.fail(node, f"{name}: expected text, got {shorten(self.constructed(node, name, 'text'))}")
        if "\0" in value or any(0xD800 <= ord(character) < 0xE000 for character in value):
            self.fail(node, f"{name}: holds a character that no file can hold (NUL or half a surrogate pair)")
        if ACCESS_TOKEN.search(value):
            self.fail(
                node, f"{name}: holds an access token, which would be written to lineage.json; use the environment"
            )
        return value

    def constructed(self, node: yaml.Node, name: str, expected: str) -> Any:
        """A scalar's value by its YAML type."""
        if not isinstance(node, yaml.ScalarNode):
            self.fail(node, f"{name}: expected {expected}, got a list or mapping")
        if node.tag.removeprefix(TAG) not in (*NUMBERS, "str", "bool", "null"):
            self.fail(node, f"{name}: the tag {shorten(node.tag.removeprefix(TAG))} is not read; write a plain value")
        kind = node.tag.removeprefix(TAG)
        try:
            value = yaml.SafeLoader("").construct_object(node)
            if type(value) in (int, float) and NOT_DECIMAL.fullmatch(node.value):
                base = "base 60" if ":" in node.value else "octal"
                self.fail(node, f"{name}: YAML reads {node.value} as {value} ({base}); write the number out")
            return value
        except (ValueError, OverflowError, KeyError, yaml.YAMLError):
            self.fail(node, f"{name}: {shorten(node.value)} cannot be read as {KIND_NAMES.get(kind, kind)}")
