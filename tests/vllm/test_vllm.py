"""The engine vllm against the real server (`make test-vllm`): vLLM in an environment of its own, on a CPU."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from helpers.launches import ROOT
from helpers.ppo_training import one_rollout, with_training
from helpers.worlds import distance, make_policy, train
from pipeline import ppo
from pipeline.rollout.engine import LocalEngine, per_row_uniforms
from pipeline.rollout.vllm_engine import VLLMEngine
from pipeline.training import history

import httpx
import pytest

PYTHON = os.environ.get("VLLM_PYTHON", ".venv-vllm/bin/python")
BANDIT = "return {'a': 0.2, 'b': 1.0, 'c': -0.5, 'd': 0.7}.get(response, 0.1 if prompt == 'a' else 0.0)"
START_SECONDS = 300.0
pytestmark = pytest.mark.vllm


def bandit(prompt: str, text: str, stopped: bool) -> float:
    return {"a": 0.2, "b": 1.0, "c": -0.5, "d": 0.7}.get(text, 0.1 if prompt == "a" else 0.0)


@contextlib.contextmanager
def started(
    policy: Path, log: Path, port: int = 0, *, flags: Sequence[str] = ()
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`scripts/rollout_server.sh` on a model, from when it answers until the end of the block."""
    if subprocess.run([PYTHON, "-c", "import vllm"], capture_output=True).returncode:
        pytest.skip(f"{PYTHON} has no vLLM that can be imported; `make test-vllm` installs one")
    if not port:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    command = [
        str(ROOT / "scripts" / "rollout_server.sh"),
        str(policy),
        str(port),
        "--max-model-len",
        "64",
        "--dtype",
        "float32",
        *flags,
    ]
    keep = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0", "PYTHON": PYTHON, "PYTHONPATH": ""}
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **keep}, stdout=output, stderr=output, start_new_session=True
        )
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    try:
        while not _answers(url):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(1)
        yield url, process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url + "/health", trust_env=False).is_success
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("world") / "sft", "abcdefgh", head_size=32)  # vLLM's smallest on a CPU


@pytest.fixture(scope="module")
def server(policy: Path) -> Iterator[str]:
    with started(policy, policy.parent / "server.log") as (url, _):
        yield url


def greedy_answers(training: ppo.Training) -> tuple[list[list[int]], list[list[int]]]:
    """Of the trainer and of the server, each to its own weights."""
    collector = training.collector
    assert isinstance(collector.engine, LocalEngine)
    assert isinstance(collector.server, VLLMEngine)
    prompts = [prompt.ids for prompt in training.prompts.held_out[:8]]
    with collector.networks.sampler("policy") as model:
        own = collector.engine.sample(model, prompts, None)
    return [r.ids for r in own], [r.ids for r in collector.server.sample(prompts, None)]


@pytest.fixture(scope="module")
def server_of_adapters(policy: Path) -> Iterator[str]:
    with started(policy, policy.parent / "adapters.log", flags=["--enable-lora", "--max-lora-rank", "8"]) as (url, _):
        yield url


@pytest.mark.parametrize("adapter", [False, True], ids=["weights", "adapter alone"])
def test_greedy_answers_agree_after_each_transfer_and_drift_is_rounding(
    policy: Path, tmp_path: Path, adapter: bool, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue("server_of_adapters" if adapter else "server")
    changes = {"roles": "adapters", "lora": {"r": 8, "alpha": 16}} if adapter else {}
    check_ten_rollouts(tmp_path / "run", policy, engine_url=url, temperature=0.8, prompts_per_rollout=32, **changes)


def test_another_model_from_a_folder(tmp_path: Path) -> None:
    """The same of a stage's folder that is named in the environment, such as SFT's of a model of 135 million parameters."""
    if not os.environ.get("VLLM_TEST_POLICY"):
        pytest.skip("VLLM_TEST_POLICY names no folder of a stage")
    policy = tmp_path / "policy"
    policy.symlink_to(Path(os.environ["VLLM_TEST_POLICY"]).resolve())
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "Write a word with {x}"}}\n' for x in "abcdefgh"))
    changes = {"prompts_per_rollout": 8, "max_prompt_tokens": 48, "learning_rate": 1e-4, "value_learning_rate": 1e-4}
    with started(policy, tmp_path / "server.log") as (url, _):
        check_ten_rollouts(tmp_path / "run", policy, engine_url=url, **changes)


def check_ten_rollouts(folder: Path, policy: Path, **changes: Any) -> None:
    def ten_rollouts(training: ppo.Training, run: Any) -> tuple[list[Any], list[float]]:
        answers, drifts = [], []
        for _ in range(10):
            rollout, metrics = one_rollout(training, run)
            answers.append(greedy_answers(training))
            drifts.append(metrics["sampling_drift_worst_response"])
            training.learner.update(rollout, metrics)
            training.state.rollout += 1
        return answers, drifts

    settings: dict[str, Any] = {"max_response_tokens": 12, "engine": "vllm", **changes}
    body = "return float(response.count('b'))"
    answers, drifts = with_training(folder, policy, body, ten_rollouts, **settings)
    assert all(own == served for own, served in answers)
    assert answers[0] != answers[-1], "the weights did change"
    assert max(drifts) < 1e-4, drifts


def test_a_request_is_answered_the_same_alone_and_among_others(server: str, policy: Path, tmp_path: Path) -> None:
    def use(training: ppo.Training, run: Any) -> None:
        engine = training.collector.server
        assert engine is not None
        prompts = [prompt.ids for prompt in training.prompts.held_out[:6]]
        uniforms = per_row_uniforms(3, range(6), 12)
        together = engine.sample(prompts, uniforms)
        alone = [engine.sample([ids], uniforms[[row]])[0] for row, ids in enumerate(prompts)]
        assert [r.ids for r in together] == [r.ids for r in alone]

    settings = {"max_response_tokens": 12, "engine": "vllm", "engine_url": server}
    with_training(tmp_path / "run", policy, "return 0.0", use, **settings)


def test_the_kl_bandit_reaches_its_optimum_through_the_server(server: str, policy: Path, tmp_path: Path) -> None:
    settings = {
        "total_rollouts": 60,
        "prompts_per_rollout": 128,
        "generation_rows": 64,
        "learning_rate": 2e-3,
        "value_learning_rate": 5e-3,
        "engine": "vllm",
        "engine_url": server,
    }
    assert distance(policy, policy, bandit, 0.5, 1) > 0.1, "there is something to learn"
    train(tmp_path / "run", policy, BANDIT, kl_coef=0.5, **settings)
    drifts = [row["sampling_drift"] for row in history.read(tmp_path / "run" / "out") if "sampling_drift" in row]
    assert max(drifts) < 1e-4
    assert distance(tmp_path / "run" / "out", policy, bandit, 0.5, 1) < 0.03


def test_a_server_killed_and_started_again_gets_the_weights_again(policy: Path, tmp_path: Path) -> None:
    with contextlib.ExitStack() as servers:
        url, process = servers.enter_context(started(policy, tmp_path / "first.log"))

        def use(training: ppo.Training, run: Any) -> float:
            rollout, metrics = one_rollout(training, run)
            for _ in range(3):
                training.learner.update(rollout, metrics)
            one_rollout(training, run)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            servers.enter_context(started(policy, tmp_path / "second.log", int(url.rsplit(":", 1)[1])))
            return float(one_rollout(training, run)[1]["sampling_drift_worst_response"])

        settings = {"prompts_per_rollout": 16, "max_response_tokens": 8, "engine": "vllm", "engine_url": url}
        assert with_training(tmp_path / "run", policy, "return float('b' in response)", use, **settings) < 1e-4
