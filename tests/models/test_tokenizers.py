"""Tokenizers: what ends a response, what is never sampled, pad tokens; and that these rules have one home."""

from __future__ import annotations

import ast
import copy
import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from helpers.chat_templates import FAMILIES, with_family
from helpers.launches import ROOT
from pipeline.data.encoding import ChatEncoder
from pipeline.errors import UserError
from pipeline.models.tokenizer_training import train_tokenizer
from pipeline.models.tokenizers import (
    complete_chat_model,
    forbidden_token_ids,
    load_tokenizer,
    require_pad,
    set_stop_tokens,
    stop_token_ids,
)

import pytest
from tokenizers import AddedToken


def names(tokenizer: Any, ids: Any) -> set[str]:
    return set(tokenizer.convert_ids_to_tokens(list(ids)))


ENDS = {
    "chatml": {"<|im_end|>"}, "chatml on a base": {"<|endoftext|>", "<|im_end|>"}, "gemma": {"<|endoftext|>", "<end_of_turn>"},
    "llama 3": {"<|endoftext|>", "<|eot_id|>"}, "llama 2": {"<|endoftext|>"}, "zephyr": {"<|endoftext|>"}, "phi 3": {"<|endoftext|>", "<|end|>"},
    "gpt-oss": {"<|return|>"}, "deepseek r1": {"<|endoftext|>"}, "glm": {"<|endoftext|>"}, "qwen 3": {"<|im_end|>"}, "vicuna": {"<|endoftext|>"},
}  # fmt: skip


@pytest.mark.parametrize("family", sorted(ENDS))
def test_a_response_ends_at_eos_and_at_the_templates_own_end_of_turn(family: str, tokenizer: Any) -> None:
    changed = with_family(tokenizer, family)
    stops = stop_token_ids(ChatEncoder(changed))
    assert names(changed, stops) == ENDS[family]
    assert stops[0] == changed.eos_token_id


def test_a_response_ends_at_every_token_of_the_parents_generation_config(tokenizer: Any) -> None:
    encoder = ChatEncoder(tokenizer)
    for listed, expected in ((None, [0]), (7, [0, 7]), ([9, 0, 7], [0, 9, 7]), ([9, 10**6], [0, 9])):
        assert stop_token_ids(encoder, SimpleNamespace(eos_token_id=listed)) == expected
    assert stop_token_ids(encoder, None, ["b", "b"]) == [0, tokenizer.convert_tokens_to_ids("b")]
    with pytest.raises(UserError, match=r"stop_tokens: 'b c d' is \d tokens of this tokenizer; a stop token is one"):
        stop_token_ids(encoder, None, ["b c d"])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_turn_tokens_are_forbidden_and_stop_tokens_never(family: str, tokenizer: Any) -> None:
    changed = with_family(tokenizer, family)
    encoder = ChatEncoder(changed)
    stops = stop_token_ids(encoder, SimpleNamespace(eos_token_id=[12]))
    forbidden = forbidden_token_ids(changed, len(changed) + 2, stops)
    assert not set(stops) & set(forbidden)
    assert changed.pad_token_id in forbidden
    assert forbidden[-2:] == [len(changed), len(changed) + 1]
    turns = (set(encoder.prompt_ids([{"role": "user", "content": ""}])) & encoder.text.control) - set(stops)
    thoughts = {changed.convert_tokens_to_ids("<think>")} if "<think>" in FAMILIES[family].ordinary else set()
    assert turns - thoughts <= set(forbidden)
    assert not thoughts & set(forbidden), "an answer may think"


def test_special_tokens_that_are_only_in_the_added_tokens_are_forbidden_and_unread(tokenizer: Any) -> None:
    """Llama 3's reserved tokens: no attribute of the tokenizer names them."""
    changed = copy.deepcopy(tokenizer)
    changed.add_tokens([AddedToken("<|reserved_7|>", special=True)], special_tokens=False)
    changed.add_tokens(["kettle"])
    reserved, word = changed.convert_tokens_to_ids(["<|reserved_7|>", "kettle"])
    encoder = ChatEncoder(changed)
    forbidden = forbidden_token_ids(changed, len(changed), stop_token_ids(encoder))
    assert reserved in forbidden
    assert word not in forbidden
    assert encoder.texts([[*encoder.text_ids("a kettle"), reserved, encoder.eos_id]]) == ["a kettle"]
    assert word in encoder.text_ids("a kettle"), "an added word is a word"


def test_markup_is_a_control_token_whether_or_not_the_template_writes_it_and_html_is_text(tokenizer: Any) -> None:
    """Qwen 3 on a ChatML template of the recipe still knows `<think>`; Gemma's tokenizer holds `<table>` as a word."""
    changed = with_family(tokenizer, "chatml")
    changed.add_tokens(["<think>", "</think>", "<tool_call>", "<table>", "<|fim_prefix|>", "        "])
    encoder = ChatEncoder(changed)
    ids = dict(
        zip(
            ["<think>", "<tool_call>", "<table>", "<|fim_prefix|>"],
            changed.convert_tokens_to_ids(["<think>", "<tool_call>", "<table>", "<|fim_prefix|>"]),
            strict=True,
        )
    )
    for text, token in ids.items():
        assert (token in encoder.text_ids(f"a {text} b")) == (text == "<table>"), text
        assert text in changed.decode(encoder.text_ids(f"a {text} b"))


def test_a_thought_that_the_prompt_opens_may_be_closed(tokenizer: Any) -> None:
    changed = with_family(tokenizer, "deepseek r1")
    changed.add_special_tokens({"extra_special_tokens": ["<think>", "</think>"]}, replace_extra_special_tokens=False)
    forbidden = forbidden_token_ids(changed, len(changed), [changed.eos_token_id])
    assert changed.convert_tokens_to_ids("</think>") not in forbidden


def test_a_response_that_ended_anywhere_is_read_where_answers_are_trained_to_end(tokenizer: Any) -> None:
    changed = with_family(tokenizer, "gemma")
    encoder = ChatEncoder(changed)
    stops = stop_token_ids(encoder, None, ["b"])
    text = encoder.text_ids("fine")
    for stop in stops:
        assert encoder.finished_ids([*text, stop], stops) == [*text, encoder.end_id]
    assert encoder.finished_ids(text, stops) == text
    assert encoder.finished_ids([], stops) == []
    assert encoder.response_ids("fine") == encoder.finished_ids([*text, encoder.eos_id], stops)


def test_pad_in_the_parents_list_of_ends_is_no_end(tokenizer: Any) -> None:
    """Qwen lists it so; pad is never sampled, and behind an answer it is padding."""
    encoder, pad = ChatEncoder(tokenizer), tokenizer.pad_token_id
    stops = stop_token_ids(encoder, SimpleNamespace(eos_token_id=[0, pad, 7]))
    assert stops == [0, 7]
    assert pad in forbidden_token_ids(tokenizer, len(tokenizer), stops)
    with pytest.raises(UserError, match=r"stop_tokens: .* is this tokenizer's pad, which is never sampled"):
        stop_token_ids(encoder, None, [tokenizer.pad_token])


def test_the_saved_generation_config_stops_everywhere(tiny_lm: Any) -> None:
    model = copy.deepcopy(tiny_lm)
    set_stop_tokens(model, [0, 7])
    assert model.generation_config.eos_token_id == [0, 7]
    set_stop_tokens(model, [0])
    assert model.generation_config.eos_token_id == 0


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "{}"), ("tokenizer.json", "[]"), ("tokenizer.json", "null"), ("tokenizer.json", "junk"),
        ("tokenizer.json", '{"added_tokens": [], "model": {"type": "No"}}'),
        ("tokenizer_config.json", "[]"), ("tokenizer_config.json", "null"), ("tokenizer_config.json", '{"eos_token": 5}'),
        ("tokenizer_config.json", '{"tokenizer_class": 3}'), ("config.json", "[]"), ("config.json", "null"),
    ],
)  # fmt: skip
def test_damaged_tokenizer_files_are_told_in_one_line(tokenizer: Any, tmp_path: Path, file: str, content: str) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=r"no tokenizer can be loaded from .*: .+") as refusal:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(refusal.value)


def test_a_folder_without_a_tokenizer_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the folder holds none; name a model's folder"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("path", ["/none/at/all", "runs/demo", "./sft", "runs/demo/rewrd"])
def test_a_folder_that_is_missing_is_told_as_one(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no such folder"):
        load_tokenizer(path)


def test_pad_apart_from_eos_is_required(tokenizer: Any) -> None:
    require_pad(tokenizer, "here")
    changed = copy.deepcopy(tokenizer)
    changed.pad_token = changed.eos_token
    with pytest.raises(UserError, match="'here' has no pad token apart from EOS"):
        require_pad(changed, "here")


def test_text_without_a_space_trains_a_tokenizer_in_seconds() -> None:
    text = "".join(random.Random(0).choices("abcdefghij", k=500_000))
    started = time.monotonic()
    trained = train_tokenizer([text, "two words"], 400)
    assert time.monotonic() - started < 60
    assert len(trained) == 400
    assert trained.decode(trained("two words")["input_ids"]) == "two words"


def test_only_one_file_lists_stop_and_forbidden_ids() -> None:
    """No other call in the package makes such a list, and none but the text tokenizer asks which tokens are special."""
    homes = {"pipeline/models/tokenizers.py", "pipeline/data/control_tokens.py", "pipeline/data/encoding.py"}
    for path in sorted((ROOT / "pipeline").rglob("*.py")):
        name = str(path.relative_to(ROOT))
        if name in homes:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            where = f"{name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("all_special_ids", "added_tokens_decoder"), f"{where}: ask forbidden_token_ids"
            if isinstance(node, ast.List | ast.Set | ast.Tuple):
                inside = {n.attr for e in node.elts for n in [e] if isinstance(n, ast.Attribute)}
                assert not inside & {"eos_id", "end_id", "eos_token_id"}, (
                    f"{where}: a list of stop ids; ask stop_token_ids"
                )
            if isinstance(node, ast.keyword) and node.arg in ("stop_ids", "forbidden"):
                assert not isinstance(node.value, ast.List | ast.Set | ast.ListComp), (
                    f"{where}: {node.arg} is made here"
                )


def test_a_pad_that_ends_answers_is_replaced_and_never_taken_as_it_is(
    tokenizer: Any, tiny_lm: Any, tmp_path: Path
) -> None:
    """ChatML's end as pad, with another EOS: an answer's end would be masked as padding."""
    changed = with_family(tokenizer, "chatml on a base")
    changed.pad_token = "<|im_end|>"
    with pytest.raises(UserError, match=r"here' pads with '<\|im_end\|>', which ends an answer"):
        require_pad(changed, "here")
    encoder, notes = complete_chat_model(changed, copy.deepcopy(tiny_lm), None, str(tmp_path))
    assert changed.pad_token_id not in (encoder.end_id, encoder.eos_id)
    assert encoder.end_id == changed.convert_tokens_to_ids("<|im_end|>")
    assert any("pad ended answers too" in note for note in notes)
    require_pad(changed, "here")
