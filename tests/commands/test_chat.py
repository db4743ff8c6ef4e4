"""`rlhf chat` in the terminal: what it loads, how it answers, what it refuses."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

from helpers.launches import rlhf_here
from helpers.runs import change_lineage, make_run
from pipeline.chat.model import Reply, Sampling, load_chat_model, text_pieces
from pipeline.chat.terminal import printable
from pipeline.evaluation.answers import load_sampler
from pipeline.rollout.engine import generate

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

QUESTION = "My parcel never arrived."
GREEDY = ("--temperature", "0", "--max-tokens", "12")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return make_run(tmp_path_factory.mktemp("chat") / "run", tokenizer)


@pytest.fixture
def own_run(run: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def greedy_ids(folder: Path, question: str = QUESTION) -> tuple[list[int], Any]:
    """The likeliest answer by the engine that PPO samples with."""
    sampler = load_sampler(folder, {"max_response_tokens": 12})
    ids = sampler.encoder.prompt_ids([{"role": "user", "content": question}])
    (response,) = generate(sampler.model, [ids], None, sampler.settings)
    return response.ids, sampler.encoder


def greedy_text(folder: Path, question: str = QUESTION) -> str:
    ids, encoder = greedy_ids(folder, question)
    return printable(encoder.texts([ids])[0])


def chat_with(lines: list[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> tuple[str, str]:
    """What the terminal shows, and what it says beside, for lines that a user types."""
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    return rlhf_here("chat", *words)


def test_one_question_is_answered_as_the_stages_sample(run: Path) -> None:
    out, _ = rlhf_here("chat", run, "--prompt", QUESTION, *GREEDY)
    assert out == greedy_text(run / "ppo") + "\n", "of a run, its last stage answers"
    out, _ = rlhf_here("chat", run / "sft", "--prompt", QUESTION, *GREEDY)
    assert out == greedy_text(run / "sft") + "\n"
    out, _ = rlhf_here("chat", run, "--compare", run / "sft", "--prompt", QUESTION, *GREEDY)
    assert out == f"— {run}/ppo:\n{greedy_text(run / 'ppo')}\n— {run}/sft:\n{greedy_text(run / 'sft')}\n"


def test_the_seed_decides_the_sample(run: Path) -> None:
    answers = [
        rlhf_here("chat", run, "--prompt", QUESTION, "--max-tokens", "12", "--seed", seed)[0] for seed in (1, 1, 2)
    ]
    assert answers[0] == answers[1] != answers[2]


def test_an_answer_ends_at_every_stop_token_of_the_model(own_run: Path) -> None:
    ids, encoder = greedy_ids(own_run / "sft")
    config = own_run / "sft" / "generation_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "eos_token_id": [encoder.eos_id, ids[3]]}))
    reply = Reply(load_chat_model(str(own_run / "sft")), [{"role": "user", "content": QUESTION}], Sampling(0, 12))
    text = "".join(reply)
    assert (reply.ids, reply.ended) == (ids[: ids.index(ids[3]) + 1], "stop")
    assert text == reply.text == encoder.texts([reply.ids])[0]


def test_samples_follow_the_saved_generation_config_and_nothing_else(own_run: Path) -> None:
    config = own_run / "sft" / "generation_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "do_sample": True, "temperature": 0.5, "top_p": 0.9, "max_new_tokens": 7}))
    chat = load_chat_model(str(own_run / "sft"))
    own = chat.generation_config(Sampling(), 100)
    assert (own.temperature, own.top_p, own.top_k, own.max_new_tokens) == (0.5, 0.9, 0, 7)
    asked = chat.generation_config(Sampling(temperature=2.0, max_tokens=50), 20)
    assert (asked.temperature, asked.top_p, asked.top_k, asked.max_new_tokens) == (2.0, None, 0, 20)
    plain = load_chat_model(str(own_run / "ppo")).generation_config(Sampling(), None)
    assert (plain.do_sample, plain.temperature, plain.top_k, plain.max_new_tokens) == (True, 1.0, 0, 512)
    assert chat.encoder.tokenizer.pad_token_id in plain.suppress_tokens


def test_a_character_of_several_tokens_is_shown_whole(run: Path) -> None:
    chat = load_chat_model(str(run / "sft"))
    text = "Ein Käse für 日本 🙂!"
    pieces = list(text_pieces(chat.encoder.text_ids(text), chat.encoder))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 10


def test_an_adapter_answers_on_its_base(run: Path, tmp_path: Path, tokenizer: Any) -> None:
    base = AutoModelForCausalLM.from_pretrained(run / "sft")
    torch.manual_seed(3)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "merged" / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    out, _ = rlhf_here("chat", tmp_path / "merged" / "adapter", "--prompt", QUESTION, *GREEDY)
    assert out == greedy_text(tmp_path / "merged") + "\n" != greedy_text(run / "sft") + "\n"
    config = tmp_path / "merged" / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "runs/gone"}))
    _, err = rlhf_here("chat", config.parent, "--prompt", QUESTION, code=2)
    assert f"{config}: its base 'runs/gone' is not there" in err


def test_a_conversation_in_the_terminal(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        QUESTION,
        "/retry",
        f"/compare {run / 'sft'}",
        "/new",
        " /etc/hosts is gone",
        "/compare",
        "/cheer",
        "/quit",
        "more",
    ]
    out, err = chat_with(lines, monkeypatch, run, *GREEDY)
    ours, theirs = (greedy_text(run / stage) for stage in ("ppo", "sft"))
    path = [greedy_text(run / stage, "/etc/hosts is gone") for stage in ("ppo", "sft")]
    assert out == "\n".join([ours, ours, theirs, *path]) + "\n"
    assert "(a new conversation)" in err
    assert f"— {run}/sft:" in err
    assert "error: there is no command /cheer; /help lists them" in err


def test_the_system_prompt_and_earlier_turns_are_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = load_chat_model(str(run / "ppo"))
    system = {"role": "system", "content": "Be brief."}
    turns = [system, {"role": "user", "content": QUESTION}]
    first = Reply(chat, turns, Sampling(0, 12))
    "".join(first)
    second = Reply(
        chat,
        [*turns, {"role": "assistant", "content": first.text}, {"role": "user", "content": "And?"}],
        Sampling(0, 12),
    )
    "".join(second)
    out, _ = chat_with([QUESTION, "And?"], monkeypatch, run, "--system", "Be brief.", *GREEDY)
    assert out == f"{printable(first.text)}\n{printable(second.text)}\n"
    out, _ = chat_with(["/system Be brief.", QUESTION], monkeypatch, run, *GREEDY)
    assert out == printable(first.text) + "\n"


def test_a_question_that_does_not_fit_is_told_and_forgotten(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = chat_with(["word " * 500, QUESTION], monkeypatch, run, *GREEDY)
    assert "reads at most 128; begin a new one" in err
    assert out == greedy_text(run / "ppo") + "\n"
    _, err = rlhf_here("chat", run, "--prompt", "word " * 500, code=2)
    assert len(err.splitlines()) == 1


def test_a_stopped_answer_ends_soon(run: Path) -> None:
    reply = Reply(load_chat_model(str(run / "sft")), [{"role": "user", "content": QUESTION}], Sampling(1.0, 100))
    with contextlib.closing(iter(reply)) as pieces:
        next(pieces)
    assert len(reply.ids) < 90
    assert reply.ended == "interrupted"


def test_what_steers_a_terminal_is_shown_by_its_code_point() -> None:
    assert printable("a\x1b[31mb\n\tc\u202ed\r") == "a<U+001B>[31mb\n\tc<U+202E>d<U+000D>"


def test_what_cannot_chat_is_refused_in_one_line(own_run: Path, tmp_path: Path) -> None:
    change_lineage(own_run, "sft", status="running")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "unfinished" / "sft" / "checkpoint-3").mkdir(parents=True)
    for words, message in (
        ((own_run / "reward",), "is a reward model, which scores answers and writes none"),
        ((own_run / "sft",), "did not finish; run it again, it will resume"),
        ((tmp_path / "unfinished",), "holds no finished stage"),
        ((tmp_path / "unfinished" / "sft",), "did not finish"),
        ((tmp_path / "none" / "none" / "none",), "is no folder; name a run's"),
        ((tmp_path / "file",), "is a file; name a model's folder"),
        ((tmp_path / "empty",), "no model can be loaded from"),
        (("https://huggingface.co/a/b",), "is an address; name the Hub id alone, 'a/b'"),
        ((own_run, "--temperature", "-1"), "--temperature -1 must lie between 0 and 100"),
        ((own_run, "--max-tokens", "0"), "--max-tokens 0 must be above 0"),
        ((own_run, "--prompt", " "), "--prompt is empty"),
        ((own_run, "--prompt", "x", "--web"), "give one of them"),
    ):
        words = words if len(words) > 1 else (*words, "--prompt", QUESTION)
        _, err = rlhf_here("chat", *words, code=2)
        assert message in err, (words, err)
        assert len(err.splitlines()) == 1
