"""A language model as judge: both orders, planted preferences and biases, servers that fail, keys that stay secret."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from helpers.launches import rlhf_here
from helpers.runs import make_run
from pipeline.errors import UserError
from pipeline.evaluation import chat_server
from pipeline.evaluation.llm_judge import Judge, LocalJudge, RemoteJudge, choice_in, compare_answers, judge_from

import numpy as np
import pytest

SECRET = "sk-secret-0123456789"
PROMPTS = [f"question {i}" for i in range(40)]


def answers_of(question: str) -> tuple[str, str]:
    body = question.split("Answer A:\n")[1]
    first, rest = body.split("\n\nAnswer B:\n")
    return first, rest.split("\n\nWhich answer")[0]


def prefers(better: Callable[[str], float]) -> Judge:
    """A judge of a known taste."""

    def choose(questions: Any) -> list[Any]:
        return ["A" if better(a) >= better(b) else "B" for a, b in map(answers_of, questions)]

    return Judge("planted", choose)


def test_a_judge_of_known_taste() -> None:
    mine = [f"{'good' if i < 30 else 'bad'} {i}" for i in range(40)]
    theirs = [f"{'bad' if i < 30 else 'good'} {i}" for i in range(40)]
    taste = prefers(lambda text: float(text.startswith("good")))
    found = compare_answers(taste, PROMPTS, mine, theirs, [0] * 40)
    assert (found.win_rate, found.ties, found.first_chosen, found.prompts) == (0.75, 0.0, 0.5, 40)
    assert found.ci95 is not None
    assert found.ci95[0] < 0.75 < found.ci95[1]
    swapped = compare_answers(taste, PROMPTS, theirs, mine, [0] * 40)
    assert swapped.win_rate == 1 - found.win_rate
    always_first = Judge("first", lambda questions: ["A"] * len(questions))
    found = compare_answers(always_first, PROMPTS, mine, theirs, [0] * 40)
    assert (found.win_rate, found.ties, found.first_chosen) == (0.5, 1.0, 1.0), "order alone is no opinion"


def test_a_taste_for_length_is_taken_out() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, (2, 200))
    mine, theirs = (["x" * n for n in row] for row in (lengths[0] + 25, lengths[1]))
    longer = [len(a) - len(b) for a, b in zip(mine, theirs, strict=True)]
    noise = iter(rng.normal(0, 25, 10_000))
    found = compare_answers(
        prefers(lambda text: len(text) + next(noise)), [f"q{i}" for i in range(200)], mine, theirs, longer
    )
    assert found.win_rate is not None
    assert found.win_rate > 0.65, "it likes what is longer"
    assert found.length_controlled is not None
    assert abs(found.length_controlled - 0.5) < 0.15, "and nothing else"


def test_what_fails_counts_on_neither_side() -> None:
    def choose(questions: Any) -> list[Any]:
        return [UserError("timed out") if "question 3\n" in question else "A" for question in questions]

    found = compare_answers(Judge("flaky", choose), PROMPTS, PROMPTS, PROMPTS, [0] * 40)
    assert found.prompts == 39
    assert found.failed == [{"row": 3, "why": "timed out"}]
    found = compare_answers(Judge("dead", lambda q: [UserError("gone")] * len(q)), PROMPTS, PROMPTS, PROMPTS, [0] * 40)
    assert found.prompts == 0
    assert found.win_rate is None


@pytest.mark.parametrize(
    ("reply", "choice"),
    [
        ("A", "A"), (" b.".upper(), "B"), ("**A**", "A"), ("Answer B", "B"), ("A\n\nB is worse", "A"),
        ("A is vague and B is right.\n\nVerdict: B", "B"), ("<think>A? no</think>\n**Verdict: A**", "A"),
        ('{"reason": "A is short", "verdict": "B"}', "B"), ("The better answer is B.", "B"), ("Final answer: A", "A"),
    ],
)  # fmt: skip
def test_replies_are_read(reply: str, choice: str) -> None:
    assert choice_in(reply) == choice


@pytest.mark.parametrize(
    "reply",
    [
        "", "Both are good", "either A or B", "A good answer is B.", "A good answer would be longer.", "Answer A is worse",
        "A\nVerdict: B", "Verdict: A or B", "A worse answer is B", "Answer A is short. Answer B is long.", "The answer is Blue",
    ],
)  # fmt: skip
def test_replies_that_say_neither(reply: str) -> None:
    with pytest.raises(UserError, match="neither A nor B"):
        choice_in(reply)


# ---------------------------------------------------------------------------------------------- servers


class Server:
    """An OpenAI-compatible server on this machine; `behave` gives (status, reply) for the n-th request of a question."""

    def __init__(self, behave: Callable[[int, str], tuple[int, Any]]):
        self.seen: dict[str, int] = {}
        self.headers: list[str] = []
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path == "/v1/chat/completions"
                question = body["messages"][0]["content"]
                with lock:
                    number = server.seen[question] = server.seen.get(question, 0) + 1
                    server.headers.append(self.headers.get("Authorization", ""))
                status, text = behave(number, question)
                reply = {
                    "id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
                    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": str(text or "")}}],
                    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
                }  # fmt: skip
                raw = isinstance(text, bytes | Iterator)
                payload = text if raw else json.dumps(reply if status == 200 else {"error": text}).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                if status == 307:
                    self.send_header("Location", f"{text}/chat/completions")
                if isinstance(payload, bytes):
                    self.send_header("Content-Length", str(len(payload)))
                    payload = iter([payload])
                self.end_headers()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    for part in payload:
                        self.wfile.write(part)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    monkeypatch.setattr(chat_server, "PAUSE", 0.0)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv(chat_server.KEY, SECRET)
    started: list[Server] = []

    def start(behave: Callable[[int, str], tuple[int, Any]]) -> Server:
        started.append(Server(behave))
        return started[-1]

    yield start
    for server in started:
        server.http.shutdown()
        server.http.server_close()


def longest(_: int, question: str) -> tuple[int, str]:
    first, second = answers_of(question)
    return 200, "A" if len(first) >= len(second) else "B"


def test_a_server_judges(serve: Any) -> None:
    server = serve(longest)
    judge = judge_from(server.address, "some-model")
    assert judge.label == "llm:some-model"
    mine, theirs = ["long answer"] * 40, ["short"] * 40
    found = compare_answers(judge, PROMPTS, mine, theirs, [6] * 40)
    assert (found.failed, found.win_rate) == ([], 1.0)
    assert set(server.headers) == {f"Bearer {SECRET}"}
    assert len(server.seen) == 80
    assert set(server.seen.values()) == {1}


def test_a_hiccup_is_asked_again(serve: Any) -> None:
    server = serve(lambda n, q: (503, "busy") if n == 1 else (200, "no idea") if n == 2 else longest(n, q))
    judge = Judge("x", RemoteJudge(server.address, "m", pause=0.0))
    found = compare_answers(judge, PROMPTS[:5], ["long answer"] * 5, ["short"] * 5, [6] * 5)
    assert (found.win_rate, found.failed) == (1.0, [])
    assert set(server.seen.values()) == {3}


def test_a_question_that_always_fails_is_listed(serve: Any) -> None:
    server = serve(lambda n, q: (500, "boom") if "question 2\n" in q else longest(n, q))
    judge = Judge("x", RemoteJudge(server.address, "m", pause=0.0))
    found = compare_answers(judge, PROMPTS[:5], ["long answer"] * 5, ["short"] * 5, [6] * 5)
    assert found.failed == [{"row": 2, "why": "the server says 500"}]
    assert (found.win_rate, found.prompts) == (1.0, 4)


def test_a_first_question_that_fails_does_not_end_the_others(serve: Any) -> None:
    for behave in (
        lambda n, q: (400, "too long") if "question 0\n" in q else longest(n, q),
        lambda n, q: (200, "I cannot say.") if "question 0\n" in q else longest(n, q),
    ):
        judge = Judge("x", RemoteJudge(serve(behave).address, "m", pause=0.0))
        found = compare_answers(judge, PROMPTS[:5], ["long answer"] * 5, ["short"] * 5, [6] * 5)
        assert (found.prompts, [failure["row"] for failure in found.failed]) == (4, [0])


def test_a_refused_key_is_not_tried_again_and_a_dead_server_not_waited_for(serve: Any) -> None:
    server = serve(lambda *_: (401, f"bad key {SECRET}"))
    judge = Judge("x", RemoteJudge(server.address, "m", pause=0.0))
    found = compare_answers(judge, PROMPTS[:5], PROMPTS[:5], PROMPTS[:5], [0] * 5)
    assert {failure["why"] for failure in found.failed} == {"the server says 401"}
    assert len(server.headers) == 2, "once for each order"
    strange = serve(lambda *_: (200, None))
    judge = Judge("x", RemoteJudge(strange.address, "m", pause=0.0))
    assert compare_answers(judge, PROMPTS[:1], ["a"], ["b"], [0]).failed[0]["why"].startswith("replied ''")
    dead = Judge("x", RemoteJudge("http://127.0.0.1:9/v1", "m", pause=0.0))
    found = compare_answers(dead, PROMPTS, PROMPTS, PROMPTS, [0] * 40)
    assert {failure["why"] for failure in found.failed} == {"ConnectError"}


def test_addresses_hold_no_keys() -> None:
    for address in (f"https://user:{SECRET}@host/v1", f"https://host/v1?key={SECRET}"):
        with pytest.raises(UserError, match="no keys in an address") as error:
            judge_from(address, "m")
        assert SECRET not in str(error.value)
    with pytest.raises(UserError, match="needs --llm-judge-model"):
        judge_from("http://host/v1")


def test_keys_travel_encrypted_or_stay_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv(chat_server.KEY, SECRET)
    for address in ("https://host.example/v1", "http://localhost:8000/v1", "http://127.0.0.1:8000/v1"):
        assert RemoteJudge(address, "m").headers["Authorization"] == f"Bearer {SECRET}"
    for name in chat_server.KEYS:
        monkeypatch.delenv(chat_server.KEY)
        monkeypatch.setenv(name, SECRET)
        with pytest.raises(
            UserError, match=f"{name} is set and would go unencrypted to host.example; use https"
        ) as error:
            judge_from("http://host.example/v1", "m")
        assert SECRET not in str(error.value)
        monkeypatch.delenv(name)
        monkeypatch.setenv(chat_server.KEY, "")
    assert "Authorization" not in RemoteJudge("http://host.example/v1", "m").headers


@pytest.mark.parametrize("key", ["schlüssel", "two words", "a\nb"])
def test_a_key_that_is_no_header_is_one_line(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(chat_server.KEY, key)
    with pytest.raises(UserError, match="holds characters that no API key has") as error:
        judge_from("https://host.example/v1", "m")
    assert key not in str(error.value)
    monkeypatch.setenv(chat_server.KEY, f"{SECRET}\n")
    assert RemoteJudge("https://host.example/v1", "m").headers["Authorization"] == f"Bearer {SECRET}"


def test_a_redirect_takes_the_key_nowhere(serve: Any) -> None:
    elsewhere = serve(longest)
    server = serve(lambda *_: (307, elsewhere.address))
    judge = Judge("x", RemoteJudge(server.address, "m", pause=0.0))
    failed = compare_answers(judge, PROMPTS[:3], PROMPTS[:3], PROMPTS[:3], [0] * 3).failed
    assert {failure["why"] for failure in failed} == {"the server says 307"}
    assert elsewhere.headers == []


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (json.dumps({"choices": [{"message": {"content": ["A"]}}]}).encode(), "the reply is no chat completion"),
        (b"[" * 200_000, "the reply is no chat completion"),
        (b'{"choices": 7}', "the reply is no chat completion"),
        (b'{"choices": []}', "the reply is no chat completion"),
        (b"\xff\xfe", "the reply is no chat completion"),
        (b" " * (2**20 + 1) + b"{}", "the reply is longer than 1 MiB"),
    ],
    ids=["content is a list", "deep", "no list", "empty", "no text", "long"],
)
def test_replies_of_other_shapes_are_failures(serve: Any, payload: bytes, why: str) -> None:
    server = serve(lambda *_: (200, payload))
    judge = Judge("x", RemoteJudge(server.address, "m", pause=0.0))
    assert compare_answers(judge, PROMPTS[:1], ["a"], ["b"], [0]).failed == [{"row": 0, "why": why}]


def test_a_reply_that_never_ends_is_a_failure(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_server, "REPLY_SECONDS", 0.3)
    monkeypatch.setattr(chat_server, "TRIES", 1)

    def drip() -> Iterator[bytes]:
        for _ in range(100):
            time.sleep(0.05)
            yield b" "

    server = serve(lambda *_: (200, drip()))
    judge = Judge("x", RemoteJudge(server.address, "m", pause=0.0))
    started = time.monotonic()
    (failure,) = compare_answers(judge, PROMPTS[:1], ["a"], ["b"], [0]).failed
    assert failure["why"].startswith("the reply took longer than")
    assert time.monotonic() - started < 4


# ---------------------------------------------------------------------------------------------- local models


def test_a_local_judge_says_the_likelier_letter(tiny_lm: Any, tokenizer: Any, tmp_path: Path) -> None:
    import torch

    tokenizer.save_pretrained(tmp_path)
    tiny_lm.save_pretrained(tmp_path)
    judge = LocalJudge(str(tmp_path), rows=2)
    questions = ["a b", "c", "d e f g", "h", "x " * 500]
    found = judge(questions)
    assert isinstance(found[4], UserError)
    assert "exceed the judge's context" in str(found[4])
    for question, choice in zip(questions[:4], found, strict=False):
        ids = judge.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        with torch.no_grad():
            a, b = judge.model(input_ids=torch.tensor([ids])).logits[0, -1, judge.letters].tolist()
        assert choice == ("A" if a >= b else "B")


def test_a_report_with_a_server(tokenizer: Any, tmp_path: Path, serve: Any) -> None:
    """Rows of the judge stand among the win rates, its failures in a note; it reads whole dialogues; the key is in no file."""
    dialogue = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    run = make_run(tmp_path / "run", tokenizer, prompts=["Where is it?", dialogue, "refused"])
    server = serve(lambda n, q: (400, SECRET) if "refused" in q else longest(n, q))
    rlhf_here("report", run, "--best-of", 2, "--llm-judge", server.address, "--llm-judge-model", "m")
    report = json.loads((run / "report" / "report.json").read_text(encoding="utf-8"))
    pairs = [(row["candidate"], row["baseline"]) for row in report["llm_judge"]]
    assert pairs == [("sft", "pretrain"), ("ppo", "sft"), ("ppo", "best_of_2")]
    assert all(row["prompts"] + len(row["failed"]) == 3 for row in report["llm_judge"])
    assert any(row["judge"] == "llm:m" for row in report["win_rates"]) == any(
        row["prompts"] for row in report["llm_judge"]
    )
    assert any("system: Be brief.\n\nuser: Hi" in question for question in server.seen)
    assert any("were not judged" in note for note in report["notes"])
    for file in (run / "report").iterdir():
        assert SECRET not in file.read_text(encoding="utf-8")
