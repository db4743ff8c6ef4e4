"""The page of `rlhf chat --web`: its answers, and who may ask for them."""

from __future__ import annotations

import json
from typing import Any

from helpers.runs import make_run
from pipeline.chat.app import make_app
from pipeline.chat.model import ChatModel, Reply, Sampling, load_chat_model

import pytest
from starlette.testclient import TestClient

QUESTION = [{"role": "user", "content": "My parcel never arrived."}]
OURS = {"Origin": "http://127.0.0.1:8766"}
SAMPLING = Sampling(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> list[ChatModel]:
    run = make_run(tmp_path_factory.mktemp("page") / "run", tokenizer)
    return [load_chat_model(str(run / stage)) for stage in ("ppo", "sft")]


@pytest.fixture(scope="module")
def client(models: list[ChatModel]) -> TestClient:
    return TestClient(make_app(models, SAMPLING, "Be <b>brief</b>."), base_url="http://127.0.0.1:8766")


def ask(client: TestClient, headers: dict[str, str] = OURS, **changes: Any) -> Any:
    return client.post("/api/answer", json={"model": 0, "seed": 1, "messages": QUESTION, **changes}, headers=headers)


def test_each_model_answers_as_in_the_terminal(client: TestClient, models: list[ChatModel]) -> None:
    for number, model in enumerate(models):
        answer = ask(client, model=number)
        lines = [json.loads(line) for line in answer.text.splitlines()]
        reply = Reply(model, QUESTION, SAMPLING)
        assert "".join(line["text"] for line in lines[:-1]) == "".join(reply)
        assert lines[-1] == {"ended": reply.ended}
        assert len(lines) > 3, "it comes in pieces"


def test_the_page_holds_names_and_system_prompt_as_text(client: TestClient, models: list[ChatModel]) -> None:
    page = client.get("/")
    assert "Be &lt;b&gt;brief&lt;/b&gt;." in page.text
    assert models[0].name in page.text
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    for asset in ("/chat/chat.js", "/chat/chat.css", "/static/text.js", "/static/page.css"):
        assert asset.removeprefix("/static/") in page.text + client.get("/chat/chat.js").text
        assert client.get(asset).status_code == 200


def test_only_the_page_itself_may_ask(client: TestClient) -> None:
    assert ask(client, {"Origin": "http://evil.example"}).status_code == 403
    assert ask(client, {}).status_code == 403
    assert ask(client, {**OURS, "Host": "evil.example"}).status_code == 421
    assert (
        client.post("/api/answer", content="model=0", headers={**OURS, "Content-Type": "text/plain"}).status_code == 415
    )
    assert client.get("/api/answer").status_code == 405


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": 2}, "There is no model 2."),
        ({"model": True}, "`model` must be a whole number."),
        ({"seed": -1}, "`seed` must be a whole number."),
        ({"messages": []}, "must be text or a list"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "unknown role"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": "x"}]}, "must end with a question"),
        ({"messages": [{"role": "user", "content": "word " * 500}]}, "reads at most 128; begin a new one"),
        ({"messages": [{"role": "tool", "content": "x"}, *QUESTION]}, "template"),
    ],
)
def test_a_request_that_cannot_be_answered_is_told_why(client: TestClient, changes: Any, message: str) -> None:
    answer = ask(client, **changes)
    assert answer.status_code == 422
    assert message in answer.json()["error"]


def test_a_request_that_is_too_long_is_refused(client: TestClient) -> None:
    assert ask(client, messages=[{"role": "user", "content": "x" * (1 << 20)}]).status_code == 413
