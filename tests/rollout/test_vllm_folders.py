"""Finished models whose answers a server samples: each folder's own answers, and servers that cannot give them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from helpers.runs import make_run
from helpers.vllm_servers import FakeVLLM, served
from helpers.worlds import make_policy
from pipeline.cli import main as rlhf
from pipeline.errors import UserError
from pipeline.evaluation.answers import Sampler, load_sampler
from pipeline.evaluation.report import ReportOptions, write_report
from pipeline.rollout.engine import LocalEngine
from pipeline.rollout.vllm_folders import ServedFolders, ServerLost

import pytest

RECIPE: dict[str, Any] = {"max_response_tokens": 6}


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return make_policy(tmp_path / "sft", "abcdefgh")


def greedy(sampler: Sampler) -> tuple[list[list[int]], list[list[int]]]:
    """Of the sampler's engine and of this process."""
    prompts = [sampler.encoder.prompt_ids([{"role": "user", "content": text}]) for text in "abcdefgh"]
    local = LocalEngine(sampler.settings).sample(sampler.model, prompts, None)
    return [r.ids for r in sampler.engine.sample(sampler.model, prompts, None)], [r.ids for r in local]


def test_each_folder_answers_with_its_own_weights_which_are_sent_once(policy: Path, tmp_path: Path) -> None:
    other = make_policy(tmp_path / "other" / "sft", "abcdefgh", seed=1)
    fake = FakeVLLM(policy)
    with served(fake) as url:
        server = ServedFolders.connect(url)
        answers = [greedy(load_sampler(folder, RECIPE, server)) for folder in (policy, other, other, policy)]
    assert all(asked == own for asked, own in answers)
    assert answers[0] != answers[1]
    assert fake.loads == [str(policy), str(other), str(policy)]


def test_servers_that_cannot_answer_for_a_folder_are_refused(policy: Path, tmp_path: Path) -> None:
    large = make_policy(tmp_path / "large" / "sft", "abcdefgh", layers=2)
    seed = make_policy(tmp_path / "seed" / "sft", "abcdefgh", seed=1)
    letters = make_policy(tmp_path / "letters" / "sft", "hgfedcba")
    others = {
        "a model of other sizes": FakeVLLM(large),
        r"differ from those computed here by": FakeVLLM(seed, reload_works=False),
        "context of 8 tokens is less than the longest prompt and its response": FakeVLLM(policy, context=8),
        "another tokenizer": FakeVLLM(letters),
        "takes no weights": FakeVLLM(policy, development_mode=False),
    }
    for words, fake in others.items():
        with served(fake) as url, pytest.raises(UserError, match=words):
            greedy(load_sampler(policy, RECIPE, ServedFolders.connect(url)))
        assert len(fake.loads) == ("differ" in words), "other sizes would end a vLLM server"


def test_a_server_that_is_down_or_fails_ends_with_one_line(policy: Path) -> None:
    with pytest.raises(UserError, match="no answer"):
        ServedFolders.connect("http://127.0.0.1:9")
    for address, words in (
        ("localhost:8000", "is no address"),
        ("http://host:port", "is no address"),
        ("http://a:b@host:1", "no keys"),
    ):
        with pytest.raises(UserError, match=words):
            ServedFolders.connect(address)
    fake = FakeVLLM(policy)
    with served(fake) as url:
        sampler = load_sampler(policy, RECIPE, ServedFolders.connect(url))
        fake.failures = 1
        with pytest.raises(ServerLost, match="start it by"):
            greedy(sampler)
        asked, own = greedy(sampler)
    assert asked == own
    assert len(fake.loads) == 2, "it may have restarted"


def test_weights_that_somebody_else_sends_are_noticed(policy: Path, tmp_path: Path) -> None:
    """Another run on the same server, or a restart that no request noticed."""
    fake = FakeVLLM(make_policy(tmp_path / "seed" / "sft", "abcdefgh", seed=1))
    with served(fake) as url:
        sampler = load_sampler(policy, RECIPE, ServedFolders.connect(url))
        greedy(sampler)
        fake.restart()
        with pytest.raises(ServerLost, match="other weights than it was sent"):
            greedy(sampler)


def test_what_is_no_folder_or_cannot_be_compared_is_refused(policy: Path, tmp_path: Path) -> None:
    fake = FakeVLLM(policy)
    with served(fake) as url:
        server = ServedFolders.connect(url)
        sampler = load_sampler(policy, RECIPE, server)
        with pytest.raises(UserError, match="no folder with a model"):
            server.engine(Path("some/model"), None, sampler.settings)
        with pytest.raises(UserError, match="take at most 4"):
            load_sampler(policy, {**RECIPE, "temperature": 9.0}, server)
        server.model = dataclasses.replace(server.model, root="/nowhere")
        with pytest.raises(UserError, match="nobody knows whether its sizes fit"):
            greedy(sampler)
    assert not fake.loads


def test_a_report_ends_when_its_server_does(tmp_path: Path, tokenizer: Any) -> None:
    """And leaves the report that was there."""
    run = make_run(tmp_path / "run", tokenizer)
    fake = FakeVLLM(run / "sft", context=128)

    def spoil(choice: dict[str, Any]) -> None:
        if len(fake.loads) > 1:
            choice["finish_reason"] = "abort"

    fake.spoil = spoil
    with served(fake) as url, pytest.raises(ServerLost, match="then this command again"):
        write_report(str(run), ReportOptions(num_prompts=4, best_of=0, engine_url=url))
    assert not (run / "report").exists()


def test_a_report_whose_answers_a_server_samples(tmp_path: Path, tokenizer: Any) -> None:
    run = make_run(tmp_path / "run", tokenizer)
    fake = FakeVLLM(run / "sft", context=128)
    with served(fake) as url:
        write_report(str(run), ReportOptions(num_prompts=8, best_of=2, engine_url=url))
    found = json.loads((run / "report" / "report.json").read_text())
    assert found["notes"] == []
    assert (found["engine"]["engine"], found["engine"]["dtype"]) == ("vllm", "float32")
    assert set(found["engine"]["drift"]) == {"pretrain", "sft", "ppo"}
    assert max(found["engine"]["drift"].values()) < 1e-4
    assert "sampled by a vLLM 0.32.0 server (float32; " in (run / "report" / "index.html").read_text()
    assert {row["candidate"] for row in found["win_rates"]} == {"sft", "best_of_2", "ppo"}
    assert [Path(folder).name for folder in fake.loads] == ["pretrain", "sft", "ppo", "sft"]
    assert len(fake.seeds) == 8 * (3 + 2) + 4, "each stage's, two more of SFT, and the probes"


def test_best_of_n_whose_answers_a_server_samples(policy: Path, tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(
        "def score(prompts, responses, rows):\n    return [float(r.count('b')) for r in responses]\n"
    )
    fake = FakeVLLM(policy)
    with served(fake) as url, pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        command = ["best-of", "--policy", policy, "--reward", "rewards:score", "--prompts", tmp_path / "prompts.jsonl"]
        command += ["--output", tmp_path / "best.jsonl", "-n", 3, "--max-response-tokens", 12, "--engine-url", url]
        with pytest.raises(SystemExit) as ended:
            rlhf([str(part) for part in command])
    assert ended.value.code == 0
    rows = [json.loads(line) for line in (tmp_path / "best.jsonl").read_text().splitlines()]
    assert all(row["score"] == row["response"].count("b") for row in rows)
    assert len(fake.seeds) == 3 * 16 + 1
