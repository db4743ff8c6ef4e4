"""Chat templates of many families: training sees the ids that serving gives, and answers end where the template ends them."""

from __future__ import annotations

import copy
import datetime
import errno
import logging
import os
from pathlib import Path
from typing import Any

from helpers.chat_templates import FAMILIES, spaced_tokenizer, with_family
from pipeline.data.chat_template import (
    CHATML_TEMPLATE,
    PLAIN_TEMPLATE,
    ROLE_TEMPLATE,
    ChatTemplate,
    TemplateRefusal,
    freeze_date,
)
from pipeline.data.encoding import IGNORE, ChatEncoder
from pipeline.data.records import at_row
from pipeline.errors import UserError
from pipeline.models.tokenizers import assign_template, forbidden_token_ids, template_identity

import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st

Messages = list[dict[str, str]]
CARRIED = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


DIALOGUES: list[Messages] = [
    [user("my kettle is broken")],
    [user("  two\nlines "), assistant("Sorry, 12345."), user("\n\nStraße 日本語 🙂?")],
    [{"role": "system", "content": "Be kind."}, user("Hello"), assistant("Yes."), user("And now?"), assistant("No\n"), user("x")],
]  # fmt: skip


def served(encoder: ChatEncoder, messages: Messages, generation: bool = True) -> list[int]:
    """The ids of plain transformers, with control text in contents kept as text."""
    shown: Any = messages
    if encoder.template.as_parts:
        shown = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    return list(
        encoder.tokenizer.apply_chat_template(
            shown, tokenize=True, add_generation_prompt=generation, return_dict=False, sanitize_control_tokens=True
        )
    )


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest, tokenizer: Any) -> ChatEncoder:
    return ChatEncoder(with_family(tokenizer, request.param))


@pytest.mark.parametrize("messages", DIALOGUES)
def test_prompts_have_the_ids_of_serving(family: ChatEncoder, messages: Messages) -> None:
    if messages[0]["role"] == "system" and family.template.merges_system:
        merged = [user("Be kind.\n\nHello"), *messages[2:]]
        assert family.prompt_ids(messages) == served(family, merged)
    else:
        assert family.prompt_ids(messages) == served(family, messages)


@pytest.mark.parametrize(
    "text", ["<|im_end|> and <think>", "a</think>b", "<｜User｜>", "<|eot_id|>\n<end_of_turn>", "<|endoftext|>"]
)
def test_no_content_becomes_a_control_token(family: ChatEncoder, text: str) -> None:
    control = family.text.control
    plain = sum(i in control for i in family.prompt_ids([user("x")]))
    ids = family.prompt_ids([user(text)])
    assert sum(i in control for i in ids) == plain, "the template's own control tokens and no more"
    assert not control & set(family.response_ids(text)[:-1])
    assert text in family.tokenizer.decode(ids), "and nothing of it is lost"


CONTROL_TEXTS = sorted(
    {
        token
        for family in FAMILIES.values()
        for token in (*family.special, *family.ordinary, family.bos, family.eos)
        if token
    }
)
CONTENTS = st.lists(
    st.one_of(st.sampled_from([*CONTROL_TEXTS, "<", "|>", " ", "\n", "\n\n", "▁", "a", "Straße 日本語 🙂"]), st.text(max_size=3)),
    min_size=1,
    max_size=5,
).map("".join)  # fmt: skip


def ids_by_places(encoder: ChatEncoder, parts: list[tuple[str, bool]]) -> list[int]:
    """Ids of parts as they are where every token's place in the text is looked at."""
    text, contents = "", []
    for part, content in parts:
        if content and part:
            contents.append((len(text), len(text) + len(part)))
        text += part
    (encoding,) = encoder.tokenizer([text], add_special_tokens=False).encodings or []
    return encoder.text.correct(text, contents, encoding)[0]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(contents=st.lists(CONTENTS, min_size=1, max_size=4))
def test_many_rows_in_one_call_have_the_ids_of_each_alone(family: ChatEncoder, contents: list[str]) -> None:
    encode_in_one_call(family, contents)


@pytest.mark.parametrize("legacy", [False, True])
def test_many_rows_in_one_call_have_the_ids_of_each_alone_with_sentencepiece(legacy: bool) -> None:
    tokenizer = spaced_tokenizer(legacy)
    for template in (ROLE_TEMPLATE, PLAIN_TEMPLATE, FAMILIES["llama 2"].template):
        tokenizer.chat_template = template
        for content in ("a kettle", " a", "<|user|>", "x<s>y", "\n</s>", "▁", "a<|assistant|>", "<|user|>\n my"):
            encode_in_one_call(ChatEncoder(tokenizer), [content, "of course", content + content])


def encode_in_one_call(encoder: ChatEncoder, contents: list[str]) -> None:
    prompts = [[user(text)] for text in contents] + [[user(contents[0]), assistant("Yes."), user(contents[-1])]]
    parts = [encoder.prompt_parts(prompt) for prompt in prompts]
    together = [tokenized.ids for tokenized in encoder.text.tokenize(parts)]
    assert together == [encoder.prompt_ids(prompt) for prompt in prompts] == [ids_by_places(encoder, p) for p in parts]
    answers = encoder.text.tokenize([encoder.response_parts(text) for text in contents])
    assert [encoder.finish_response(answer) for answer in answers] == [encoder.response_ids(text) for text in contents]
    for answer in answers:
        assert answer.ids == ids_by_places(encoder, list(answer.parts))
    dialogues = [[*prompt, assistant(text)] for prompt, text in zip(prompts, contents, strict=False)]
    planned = [dialogue for messages in dialogues for dialogue in encoder.dialogues(messages)]
    assert list(encoder.encode_dialogues(planned)) == [example for d in dialogues for example in encoder.examples(d)]


def test_an_answer_follows_the_prompt_and_ends_where_the_template_ends_it(family: ChatEncoder) -> None:
    messages = [*DIALOGUES[1], assistant("Yes, of course.")]
    ids, labels = family.dialogue(messages)
    prompt, response = family.prompt_ids(messages[:-1]), family.response_ids("Yes, of course.")
    assert ids == prompt + response
    assert labels[len(prompt) :] == response
    assert response[-1] == family.end_id
    assert family.texts([response]) == ["Yes, of course."]
    whole = served(family, messages, generation=False)
    if family.trains_earlier and "<think>" not in family.tokenizer.chat_template:
        assert ids[:-1] == whole[: len(ids) - 1]
        following = whole[len(ids) - 1 : len(ids)]
        assert ids[-1:] == following or not following or following[0] not in family.text.control
    assert family.end_id in whole or family.end_id == family.eos_id


def test_every_trained_answer_of_a_dialogue_learns_its_end(family: ChatEncoder) -> None:
    messages = [*DIALOGUES[1], assistant("Yes, of course.")]
    trained = [label for _, labels in family.examples(messages) for label in labels if label != IGNORE]
    ends = {family.end_id, family.eos_id}
    shown = family.tokenizer.decode([i for i in trained if i not in ends])
    assert "".join(shown.split()) == "Sorry,12345.Yes,ofcourse."
    writes_ends = family.end_id in served(family, DIALOGUES[1]) or not family.trains_earlier
    assert sum(i in ends for i in trained) == 1 + writes_ends


@pytest.mark.parametrize("path", CARRIED, ids=lambda p: p.stem)
def test_templates_that_trl_carries_are_taken(path: Path, tokenizer: Any) -> None:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = path.read_text(encoding="utf-8")
    encoder = ChatEncoder(changed)
    messages = DIALOGUES[1]
    ids = encoder.prompt_ids(messages)
    assert ids == served(encoder, messages)
    assert encoder.dialogue([*messages, assistant("Yes.")])[0] == ids + encoder.response_ids("Yes.")


@pytest.mark.parametrize("legacy", [False, True], ids=["first", "legacy"])
@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ '<|' + m.role + '|>' + '\n' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' + '\n' }}{% endif %}",
        FAMILIES["llama 2"].template,
        FAMILIES["mistral"].template,
        PLAIN_TEMPLATE,
        "{{ bos_token }}" + PLAIN_TEMPLATE,
    ],
)
def test_the_space_that_sentencepiece_puts_before_a_word_is_where_serving_has_it(template: str, legacy: bool) -> None:
    tokenizer = spaced_tokenizer(legacy)
    tokenizer.chat_template = template
    encoder = ChatEncoder(tokenizer)
    messages = [user("my kettle"), assistant("sorry"), user("we will send </s> a new one")]
    assert encoder.prompt_ids(messages) == served(encoder, messages)
    answered = [*messages[:1], assistant("sorry about that")]
    ids = encoder.dialogue(answered)[0]
    assert (
        ids[:-1] == served(encoder, answered, generation=False)[: len(ids) - 1]
        or template == FAMILIES["llama 2"].template
    )
    assert encoder.notes == [] or template == FAMILIES["llama 2"].template


def test_a_prompt_is_the_same_tomorrow(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = with_family(tokenizer, "llama 3.2 with a date")
    note = assign_template(changed, folder=tmp_path)
    today = datetime.date.today()
    assert f"frozen to {today:%Y-%m-%d}" in str(note)
    encoder = ChatEncoder(changed)
    shown = tokenizer.decode(encoder.prompt_ids([user("Hi")]))
    assert f"Today Date: {today:%d %b %Y}" in shown
    changed.save_pretrained(tmp_path / "saved")
    again = type(changed).from_pretrained(tmp_path / "saved")
    assert assign_template(again, folder=tmp_path) is None, "later stages take it as it is"
    (tmp_path / "template_date.txt").write_text("2024-07-26\n", encoding="utf-8")
    resumed = with_family(tokenizer, "llama 3.2 with a date")
    assign_template(resumed, folder=tmp_path)
    assert "26 Jul 2024" in resumed.decode(ChatEncoder(resumed).prompt_ids([user("Hi")])), "a resumed run keeps its day"


def test_the_date_is_kept_on_a_filesystem_without_hard_links(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assign_template(with_family(tokenizer, "llama 3.2 with a date"), folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["template_date.txt"]
    assert (tmp_path / "template_date.txt").read_text().strip() == datetime.date.today().isoformat()


def test_a_frozen_date_reaches_a_template_that_names_its_format_elsewhere(tokenizer: Any) -> None:
    changed = copy.deepcopy(tokenizer)
    template = "{% set f = '%Y' %}{% if strftime_now is defined %}{{ strftime_now(f) }}{% endif %}\n" + PLAIN_TEMPLATE
    changed.chat_template = freeze_date(template, datetime.date(2020, 1, 2))
    assert changed.apply_chat_template([user("Hi")], tokenize=False).startswith("2020")
    changed.chat_template = freeze_date("{{ strftime_now('%' + 'Y') }}" + PLAIN_TEMPLATE, datetime.date(2020, 1, 2))
    with pytest.raises(TemplateRefusal, match="a date in a format that the template does not spell out"):
        ChatEncoder(changed)


def test_what_a_file_holds_identifies_the_recipes_template(tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_text(CHATML_TEMPLATE, encoding="utf-8")
    before = template_identity(str(file))
    file.write_text(CHATML_TEMPLATE + " ", encoding="utf-8")
    assert template_identity(str(file)) != before
    assert template_identity(None) is None
    assert template_identity("chatml") == "chatml"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("m.content | upper", "changes the text of system messages"),
        ("m.content | e", "changes the text of system messages"),
        ("m.content | replace('\n', ' ')", "changes the text of system messages"),
        ("m.content[:5]", "drops or reorders|changes the text"),
        ("m.content + m.content", "drops or reorders"),
        ("m.missing.thing", "refuses messages of roles"),
        ("1 // 0", "refuses messages of roles"),
    ],
)
def test_a_template_that_changes_contents_is_refused(change: str, reason: str, tokenizer: Any) -> None:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = "{% for m in messages %}{{ m.role + ': ' }}{{ " + change + " }}\n{% endfor %}assistant: "
    with pytest.raises(UserError, match=reason):
        ChatEncoder(changed)


def test_contents_are_stripped_as_the_template_strips_them(tokenizer: Any) -> None:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = (
        "{% for m in messages %}{{ m.role + ':\n' + (m.content | trim if m.role == 'user' else m.content.lstrip('\n')) + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}"
    )
    encoder = ChatEncoder(changed)
    messages = [user("  x \n"), assistant("\n\n y "), user(" z")]
    assert encoder.prompt_ids(messages) == served(encoder, messages)
    assert encoder.texts([encoder.response_ids("\n y ")]) == [" y "]


def test_a_role_that_the_template_does_not_know_is_refused(tokenizer: Any) -> None:
    for name, template in (("role", tokenizer.chat_template), ("plain", PLAIN_TEMPLATE)):
        changed = copy.deepcopy(tokenizer)
        changed.chat_template = template
        with pytest.raises(TemplateRefusal, match="only the roles system, user and assistant"):
            ChatEncoder(changed).prompt_ids([user("x"), {"role": "tool", "content": name}])
    gemma = ChatEncoder(with_family(tokenizer, "gemma"))
    with pytest.raises(TemplateRefusal, match="roles must alternate"):
        gemma.prompt_ids([user("x"), user("y")])
    with pytest.raises(TemplateRefusal, match="no system role"):
        gemma.prompt_ids([{"role": "system", "content": "x"}])


def test_a_system_message_without_a_role_joins_the_first_user_turn_and_the_first_row_is_named_once(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = ChatEncoder(with_family(tokenizer, "gemma"))
    with caplog.at_level(logging.WARNING, "pipeline"):
        for line in (42, 43):
            with at_row({"file": "d.jsonl", "line": line}):
                ids = encoder.prompt_ids([{"role": "system", "content": "Be kind."}, user("Hello")])
    assert ids == encoder.prompt_ids([user("Be kind.\n\nHello")])
    assert (
        caplog.text.count("no system role; system messages are put before the first user turn (first in d.jsonl:42)")
        == 1
    )
    assert "d.jsonl:43" not in caplog.text


@pytest.mark.parametrize("given", ["plain", "chatml", "file", "text"])
def test_a_recipe_gives_a_template(given: str, tokenizer: Any, tiny_lm: Any, tmp_path: Path) -> None:
    changed, model = copy.deepcopy(tokenizer), copy.deepcopy(tiny_lm)
    (tmp_path / "t.jinja").write_text(CHATML_TEMPLATE, encoding="utf-8")
    name = {"file": str(tmp_path / "t.jinja"), "text": CHATML_TEMPLATE}.get(given, given)
    assert assign_template(changed, model, name) is not None
    assert ChatTemplate(changed).header == (
        "\n\nAssistant:\n" if given == "plain" else "<|im_end|>\n<|im_start|>assistant\n"
    )
    assert model.get_input_embeddings().weight.shape[0] >= len(changed)
    assert (ChatEncoder(changed).end_id != changed.eos_token_id) == (given == "chatml")
    with pytest.raises(UserError, match="there is no file 'none'; give a file, `chatml`, `plain`"):
        assign_template(changed, model, "none")


def test_a_base_model_gets_the_start_token_that_its_tokenizer_adds() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = spaced_tokenizer()
    tokenizer.chat_template = None
    assign_template(tokenizer)
    assert ChatEncoder(tokenizer).prompt_ids([user("my kettle")])[0] != tokenizer.bos_token_id
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assign_template(tokenizer)
    ids = ChatEncoder(tokenizer).prompt_ids([user("my kettle")])
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_the_plain_template_has_the_same_ids_whole_and_apart(tokenizer: Any) -> None:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = None
    assign_template(changed)
    encoder = ChatEncoder(changed)
    words = "where is my parcel please"
    ids = encoder.prompt_ids([user(words)])
    assert encoder.notes == []
    apart = encoder.text_ids(words)
    assert any(ids[i : i + len(apart)] == apart for i in range(len(ids))), "no lone space before the first word"


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OPENED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def with_chatml(tokenizer: Any, template: str, **tokens: str) -> Any:
    changed = with_family(tokenizer, "chatml on a base")
    changed.add_special_tokens(tokens)
    changed.chat_template = template
    return changed


def test_a_template_that_ignores_the_generation_prompt_is_refused(tokenizer: Any) -> None:
    with pytest.raises(
        UserError, match=r"ignores add_generation_prompt but writes '<\|im_start\|>assistant\\n' before an answer"
    ):
        ChatEncoder(with_chatml(tokenizer, CHATML))


def test_of_two_tokens_that_end_an_answer_the_first_is_trained(tokenizer: Any) -> None:
    """The template's text up to the first is what serving shows; the second would stand where the first belongs."""
    template = CHATML.replace("<|im_end|>\n", "<|im_end|>{{ eos_token }}") + OPENED
    encoder = ChatEncoder(with_chatml(tokenizer, template))
    messages = [user("a kettle"), assistant("Sorry."), user("And?"), assistant("Yes.")]
    ids, labels = encoder.dialogue(messages)
    whole = served(encoder, messages, generation=False)
    assert ids == whole[: len(ids)]
    assert encoder.tokenizer.decode([i for i in labels if i != IGNORE]) == "Sorry.<|im_end|>Yes.<|im_end|>"


def test_a_template_without_a_token_that_ends_an_answer_is_named(tokenizer: Any) -> None:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    assert any("writes no token that ends an answer" in note for note in ChatEncoder(changed).notes)


def test_a_template_that_ends_the_last_answer_only_is_named(tokenizer: Any) -> None:
    """Falcon 3's: earlier answers are trained without an end, and multi-turn files teach less of it than they seem to."""
    changed = copy.deepcopy(tokenizer)
    ended = "{% if loop.last %}{{ eos_token }}{% endif %}"
    changed.chat_template = (
        "{% for m in messages %}{{ m.role + ':\n' + m.content }}{% if m.role == 'assistant' %}"
        + ended
        + "{% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}"
    )
    assert any("ends the last answer of a dialogue only" in note for note in ChatEncoder(changed).notes)
    changed.chat_template = changed.chat_template.replace(ended, "{{ eos_token }}")
    assert not any("only" in note for note in ChatEncoder(changed).notes)


def test_unknown_text_is_read_where_its_token_pads_too() -> None:
    """The row was refused: 'ß' was called a control token."""
    tokenizer = spaced_tokenizer()
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.chat_template = FAMILIES["chatml"].template.replace("<|im_end|>", "</s>")
    encoder = ChatEncoder(tokenizer)
    assert encoder.prompt_ids([user("a ß b")]) == served(encoder, [user("a ß b")])
    assert tokenizer.unk_token_id in encoder.response_ids("a ß b")
    assert tokenizer.pad_token_id in forbidden_token_ids(tokenizer, len(tokenizer), [encoder.end_id])


def test_a_template_that_cuts_long_contents_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="changes the text of"):
        ChatEncoder(with_chatml(tokenizer, CHATML.replace("m.content", "m.content[:500]") + OPENED))


def test_thoughts_that_the_template_leaves_out_of_history_are_left_out_in_training(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    written = "{{ m.content.split('</think>')[-1] | trim if m.role == 'assistant' and not loop.last else m.content }}"
    encoder = ChatEncoder(with_chatml(tokenizer, CHATML.replace("{{ m.content }}", written) + OPENED))
    messages = [user("a kettle"), assistant("<think>\nhm\n</think>\n\nSorry."), user("And?")]
    assert encoder.prompt_ids(messages) == served(encoder, messages)
    assert "rewrites assistant messages that hold text such as '</think>'" in caplog.text
    # Each answer is learnt with its thought, after the prompt that it followed.
    examples = encoder.examples([*messages, assistant("Yes.")])
    learnt = [encoder.texts([[i for i in labels if i != IGNORE]])[0] for _, labels in examples]
    assert learnt == ["<think>\nhm\n</think>\n\nSorry.", "Yes."]


def test_a_template_that_reads_contents_and_changes_what_is_around_them_refuses_the_row(tokenizer: Any) -> None:
    mode = "{% if '/think' in messages[-1].content %}<|im_start|>system\nThink.<|im_end|>\n{% endif %}"
    encoder = ChatEncoder(with_chatml(tokenizer, mode + CHATML + OPENED))
    assert encoder.prompt_ids([user("a kettle")])
    record: Any = {"file": "chats.jsonl", "line": 7}
    with (
        pytest.raises(UserError, match="writes other text around a user message that holds '/think'") as refusal,
        at_row(record),
    ):
        encoder.prompt_ids([user("a kettle /think")])
    assert str(refusal.value).startswith("chats.jsonl:7: ")


def test_system_text_that_the_template_writes_into_the_last_turn_is_there_in_training(tokenizer: Any) -> None:
    """Mistral's templates since v3."""
    template = (
        "{% if messages[0].role == 'system' %}{% set first = messages[0].content %}{% set rest = messages[1:] %}"
        "{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}"
        "[INST] {% if loop.last and first is defined %}{{ first + '\n\n' }}{% endif %}{{ m.content }}[/INST]"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    )
    encoder = ChatEncoder(with_chatml(tokenizer, template, bos_token="<s>"))
    for messages in DIALOGUES:
        assert encoder.prompt_ids(messages) == served(encoder, messages)
    assert "Be kind.\n\nx[/INST]" in encoder.tokenizer.decode(encoder.prompt_ids(DIALOGUES[2]))
    labels = encoder.dialogue([*DIALOGUES[2], assistant("fine")], [False, False, True, False, False, False, True])[1]
    assert encoder.tokenizer.decode([i for i in labels if i != IGNORE]).split() == [
        "Yes.<|endoftext|>",
        "fine<|endoftext|>",
    ]


def test_control_text_in_data_is_named_once_with_its_row(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    encoder = ChatEncoder(with_family(tokenizer, "qwen 3"))
    caplog.clear()
    for line in (3, 4):
        record: Any = {"file": "chats.jsonl", "line": line}
        with at_row(record):
            encoder.prompt_ids([user("what does <think> do?")])
    said = [record.message for record in caplog.records if "stays text" in record.message]
    assert said == ["text that looks like a control token stays text in data: '<think>' (first in chats.jsonl:3)"]
