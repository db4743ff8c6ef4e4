"""Dialogues as files have them, to lists of {role, content}: messages, ShareGPT turns, text parts, `Human:`/`Assistant:` text.

Every key of a message is used, refused, or named by `unread_message_keys`.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from typing import Any

from pipeline.data.files import RecordError, UnusableRecord
from pipeline.errors import shorten

Message = dict[str, str]
ROLES = ("system", "user", "assistant", "tool")
# `from` of ShareGPT's {from, value}; a {role, content} message spells its role as in ROLES.
SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
_READ_KEYS = {"role", "content", "from", "value", "train", "weight"}
_CALLS = ("tool_calls", "function_call")
_WRITTEN_LIST = re.compile(r"\s*\[\s*\{.*\}\s*\]\s*", re.DOTALL)
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def parse_messages(value: Any, name: str, last_may_be_empty: bool = False) -> list[Message]:
    """A list of messages.

    Args:
        name: the column, for errors.
        last_may_be_empty: an empty last turn is for the caller to judge.

    Raises:
        UnusableRecord: a turn is empty.
        RecordError: it is no dialogue, or a key of a message cannot be used.
    """
    if not isinstance(value, list) or not value:
        raise RecordError(f"`{name}` must be text or a list of {{role, content}}, got {shorten(value)}")
    messages = [_message(item, f"`{name}`[{position}]") for position, item in enumerate(value)]
    for position, message in enumerate(messages):
        if message["role"] == "system" and position > 0:
            raise RecordError(f"`{name}`[{position}]: a system message stands first or not at all")
    for position, message in enumerate(messages):
        if not message["content"].strip() and not (last_may_be_empty and position == len(messages) - 1):
            raise UnusableRecord(f"`{name}`[{position}]: content is empty; fill it or remove the row")
    return messages


def _message(item: Any, where: str) -> Message:
    """One message; its content may be text, or parts of text."""
    if isinstance(item, dict) and "from" in item and "value" in item and "role" not in item:
        role = SHAREGPT_ROLES.get(item["from"]) if isinstance(item["from"], str) else None
        if role is None:
            raise RecordError(f"{where}: unknown `from` {shorten(item['from'])}; use human, gpt, system or tool")
        item = {**item, "role": role, "content": item["value"]}
    if isinstance(item, dict) and any(item.get(key) for key in _CALLS):
        key = next(key for key in _CALLS if item.get(key))
        raise RecordError(
            f"{where} has `{key}`, which no stage reads; write the call into its content as the model shall write it, "
            "or leave the row out"
        )
    content = _joined_parts(item.get("content"), where) if isinstance(item, dict) else None
    if not isinstance(item, dict) or not isinstance(content, str) or "role" not in item:
        raise RecordError(f"{where} must be {{role, content}} with text, got {shorten(item)}")
    if item["role"] not in ROLES:
        raise RecordError(f"{where}: unknown role {shorten(item['role'])}; use one of {', '.join(ROLES)}")
    return {"role": item["role"], "content": content}


def _joined_parts(content: Any, where: str) -> Any:
    """The text of a content that is a list of {type: text, text}; anything else as it is."""
    if not isinstance(content, list) or not content or not all(isinstance(part, dict) for part in content):
        return content
    for part in content:
        if part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            raise RecordError(f"{where}: a part of its content is no text: {shorten(part)}; only text is read")
    return "".join(part["text"] for part in content)


def trained_turns(value: list[Any], messages: list[Message], name: str) -> list[bool]:
    """Which turns are learnt: the assistant's, but for those that say `train: false` or `weight: 0`.

    Args:
        value: the messages as the file has them; messages: the same, parsed.
    """
    flags = []
    for position, (item, message) in enumerate(zip(value, messages, strict=True)):
        train, weight = item.get("train"), item.get("weight")
        if train is not None and not isinstance(train, bool):
            raise RecordError(f"`{name}`[{position}]: `train` must be true or false, got {shorten(train)}")
        if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
            raise RecordError(f"`{name}`[{position}]: `weight` of a message must be 0 or 1, got {shorten(weight)}")
        flags.append(message["role"] == "assistant" and train is not False and weight != 0)
    return flags


def unread_message_keys(row: dict[str, Any]) -> Iterator[str]:
    """Keys of a row's messages that no stage reads (a name, an account of the reasoning), where they hold anything."""
    for value in row.values():
        for message in value if isinstance(value, list) else ():
            if isinstance(message, dict) and (
                message.keys() >= {"role", "content"} or message.keys() >= {"from", "value"}
            ):
                for key, held in message.items():
                    if key not in _READ_KEYS and held not in (None, "", [], {}):
                        yield str(key)


def refuse_written_list(text: str, name: str) -> None:
    """Refuse text that is a list of messages as JSON or Python writes it, as pandas puts one into a CSV.

    Raises:
        RecordError: it is one; it would be trained on with its brackets and keys.
    """
    if not _WRITTEN_LIST.fullmatch(text):
        return
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if all(
            isinstance(m, dict) and (m.keys() >= {"role", "content"} or m.keys() >= {"from", "value"}) for m in value
        ):
            raise RecordError(f"`{name}` is a list of messages written as text; give the list itself, in a .jsonl file")
        return


def parse_hh_turns(text: str, name: str) -> list[Message]:
    """`\\n\\nHuman: … \\n\\nAssistant: …`, as Bai et al. (2022) publish dialogues."""
    parts = _HH_TURN.split(text if text.startswith("\n\n") else "\n\n" + text)
    if parts[0].strip() or len(parts) < 3:
        raise RecordError(f"no column `prompt`, and `{name}` is no `Human:`/`Assistant:` dialogue: {shorten(text)}")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": turn.strip()}
        for speaker, turn in zip(parts[1::2], parts[2::2], strict=True)
    ]


def parse_prompt_text(text: str) -> list[Message]:
    """A prompt given as text: one user's turn, or the turns of a `\\n\\nHuman: … \\n\\nAssistant:` dialogue."""
    if not text.startswith("\n\nHuman:"):
        return [{"role": "user", "content": text}]
    turns = parse_hh_turns(text, "prompt")
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns
