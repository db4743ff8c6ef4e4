"""PPO whose policy samples on a server: what it asks, the weights that it sends, and a server that fails, restarts or is another's."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

from helpers.launches import FSDP2, kill_when, launch, lineage
from helpers.ppo_training import one_rollout, with_training
from helpers.vllm_servers import FakeVLLM, served
from helpers.worlds import make_policy, train, write_recipe
from pipeline import ppo
from pipeline.config.ppo import PPOArguments
from pipeline.config.reader import load
from pipeline.errors import UserError
from pipeline.models.loading import load_causal_lm
from pipeline.models.tokenizers import load_tokenizer
from pipeline.training import history

import pytest
import torch

REWARD = "return float(response.count('b'))"
SMALL: dict[str, Any] = {
    "prompts_per_rollout": 16, "total_rollouts": 3, "minibatches": 2, "max_response_tokens": 4, "save_steps": 1,
    "engine": "vllm", "engine_wait": 2.0, "kl_coef": 0.1,
}  # fmt: skip


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return make_policy(tmp_path / "sft", "abcdefgh")


def collected(folder: Path, policy: Path, url: str, **changes: Any) -> tuple[Any, dict[str, float]]:
    return with_training(folder, policy, REWARD, one_rollout, **{**SMALL, "engine_url": url, **changes})


def refusal(capsys: pytest.CaptureFixture[str], folder: Path, policy: Path, url: str, **changes: Any) -> str:
    """The one line with which the stage ends, before anything was learnt."""
    with pytest.raises(SystemExit) as exit:
        train(folder, policy, REWARD, **{**SMALL, "engine_url": url, **changes})
    assert exit.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    return line


def test_samples_end_at_stop_tokens_are_never_forbidden_and_do_not_depend_on_the_batch(
    policy: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(str(policy))
    with served(FakeVLLM(policy)) as url:
        rollout, metrics = collected(tmp_path / "one", policy, url, temperature=0.7)
        alone, _ = collected(tmp_path / "other", policy, url, temperature=0.7, generation_rows=1)
    special = set(tokenizer.all_special_ids) - {tokenizer.eos_token_id}
    for ids in rollout.response_ids:
        assert not special & set(ids)
        assert tokenizer.eos_token_id not in ids[:-1]
        assert len(ids) == 4 or ids[-1] == tokenizer.eos_token_id
    assert rollout.response_ids == alone.response_ids
    assert len(set(map(tuple, rollout.response_ids))) > 4, "each row has a seed of its own"
    assert metrics["sampling_drift"] < 1e-4


def test_weights_are_sent_after_each_update_and_the_samples_are_those_of_the_new_weights(
    policy: Path, tmp_path: Path
) -> None:
    fake = FakeVLLM(policy)
    with served(fake) as url:
        record = train(tmp_path / "run", policy, REWARD, **SMALL, engine_url=url, eval_rollouts=1)
    rows = history.read(tmp_path / "run" / "out")
    assert [Path(folder).name for folder in fake.loads] == [f"weights-00000{n}" for n in (1, 2, 3, 4)]
    assert max(row["sampling_drift"] for row in rows if "sampling_drift" in row) < 1e-4
    assert not list((tmp_path / "run" / "out").glob("engine/*")), "they were only for the server"
    trained = torch.cat([p.flatten() for p in fake.model.parameters()])
    assert (trained - torch.cat([p.flatten() for p in FakeVLLM(policy).model.parameters()])).abs().max() > 1e-3
    assert record["recipe"]["engine"] == "vllm"


@pytest.mark.parametrize("restarts", [False, True])
def test_a_server_that_fails_in_between_is_asked_again_with_the_weights_sent_anew(
    policy: Path, tmp_path: Path, restarts: bool
) -> None:
    """The samples are those of a server that did not fail."""
    fake = FakeVLLM(policy)

    def two_rollouts(training: ppo.Training, run: Any) -> list[Any]:
        rollout, metrics = one_rollout(training, run)
        training.learner.update(rollout, metrics)
        training.state.rollout += 1
        fake.failures, fake.restarts = failures, restarts
        return one_rollout(training, run)[0].response_ids  # type: ignore[no-any-return]

    answers = []
    with served(fake) as url:
        for failures in (0, 2):
            folder = tmp_path / str(failures)
            answers.append(with_training(folder, policy, REWARD, two_rollouts, **{**SMALL, "engine_url": url}))
            loads = len(fake.loads)
    assert answers[0] == answers[1]
    assert loads > 2 + 2, "two of each run, and another after a failure"
    assert "its weights are sent again" in (tmp_path / "2" / "out" / "log.txt").read_text()


def test_a_restart_that_no_request_noticed_is_found_by_the_probe(policy: Path, tmp_path: Path) -> None:
    fake = FakeVLLM(policy)

    def restarted(training: ppo.Training, run: Any) -> dict[str, float]:
        rollout, metrics = one_rollout(training, run)
        for _ in range(3):
            training.learner.update(rollout, metrics)
        one_rollout(training, run)
        fake.restart()
        return one_rollout(training, run)[1]  # type: ignore[no-any-return]

    with served(fake) as url:
        metrics = with_training(tmp_path / "run", policy, REWARD, restarted, **{**SMALL, "engine_url": url})
    assert metrics["sampling_drift"] < 1e-4
    assert len(fake.loads) == 3


def test_a_server_that_stays_away_ends_the_run_at_its_last_checkpoint(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeVLLM(policy)

    def spoil(choice: dict[str, Any]) -> None:
        if len(fake.seeds) > 40:
            choice["finish_reason"] = "abort"

    fake.spoil = spoil
    with served(fake) as url:
        line = refusal(capsys, tmp_path / "run", policy, url, engine_wait=0.5)
        assert "resumes from the last checkpoint" in line
        checkpoints = list((tmp_path / "run" / "out").glob("checkpoint-*"))
        assert checkpoints
        fake.spoil = None
        changes = {**SMALL, "engine_url": url, "engine_wait": 3.0}  # neither is of the run's identity
        assert train(tmp_path / "run", policy, REWARD, **changes)["resumed_from"]


def test_a_signal_ends_a_run_that_waits_for_its_server(policy: Path, tmp_path: Path) -> None:
    fake = FakeVLLM(policy)

    def spoil(choice: dict[str, Any]) -> None:
        if len(fake.seeds) > 40:
            choice["finish_reason"] = "abort"

    fake.spoil = spoil
    out = tmp_path / "run" / "out"
    with served(fake) as url:
        recipe = write_recipe(tmp_path / "run", policy, REWARD, **{**SMALL, "engine_url": url, "engine_wait": 600.0})

        def waits() -> bool:
            return (out / "log.txt").is_file() and "its weights are sent again" in (out / "log.txt").read_text()

        code = kill_when("ppo", ["--config", str(recipe)], waits, number=signal.SIGTERM)
        assert code == 128 + signal.SIGTERM
        fake.spoil = None
        launch("ppo", ["--config", str(recipe)])
    assert lineage(out)["resumed_from"]


SPOILT = {
    "too few": (lambda choice: [choice["token_ids"].__delitem__(slice(1, None)), choice["logprobs"]["token_logprobs"].__delitem__(slice(1, None))], "1 tokens without a stop token"),
    "forbidden": (lambda choice: choice["token_ids"].__setitem__(0, 0), "token 0, which is forbidden"),
    "lengths": (lambda choice: choice["logprobs"]["token_logprobs"].pop(), "log-probabilities"),
    "no ids": (lambda choice: choice.pop("token_ids"), "no token ids"),
}  # fmt: skip


@pytest.mark.parametrize("fault", list(SPOILT))
def test_useless_responses_are_refused(
    policy: Path, tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, words = SPOILT[fault]
    with served(FakeVLLM(policy, spoil=spoil)) as url:
        assert words in refusal(capsys, tmp_path / "run", policy, url, max_response_tokens=12)


def test_other_servers_are_refused_before_anything_is_sampled(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = {
        "takes no weights; start it with VLLM_SERVER_DEV_MODE=1": FakeVLLM(policy, development_mode=False),
        "context of 10 tokens is less than max_prompt_tokens + max_response_tokens (12)": FakeVLLM(policy, context=10),
        "has another tokenizer than the parent": FakeVLLM(make_policy(tmp_path / "letters" / "sft", "hgfedcba")),
        "does not load the weights": FakeVLLM(make_policy(tmp_path / "large" / "sft", "abcdefgh", layers=2)),
        "differ from those computed here by": FakeVLLM(make_policy(tmp_path / "seed" / "sft", "abcdefgh", 1), reload_works=False),
    }  # fmt: skip
    for number, (words, fake) in enumerate(others.items()):
        with served(fake) as url:
            assert words in refusal(capsys, tmp_path / str(number), policy, url)
    assert "no answer (ConnectError at /version)" in refusal(capsys, tmp_path / "down", policy, url)


def test_no_vllm_is_refused(policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Other(FakeVLLM):
        def reply(self, path: str, body: Any) -> tuple[int, Any]:
            return 404, {"error": "unknown path"}

    with served(Other(policy)) as url:
        assert "no vLLM server answers there" in refusal(capsys, tmp_path / "run", policy, url)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"engine": "vllm"}, "needs the server's address"),
        ({"engine": "vllm", "engine_url": "localhost:8000"}, "is no address"),
        ({"engine": "vllm", "engine_url": "http://u:p@host:8000"}, "no keys in an address"),
        ({"engine": "vllm", "engine_url": "http://host:8000", "temperature": 9.0}, "a bias of -100"),
    ],
)
def test_recipes_that_cannot_be_meant(policy: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load(PPOArguments, ["--config", str(write_recipe(tmp_path / "run", policy, REWARD, **changes))])


def test_adapters_are_sent_merged(policy: Path, tmp_path: Path) -> None:
    fake = FakeVLLM(policy)
    changes = {**SMALL, "roles": "adapters", "lora": {"r": 4, "alpha": 8}, "total_rollouts": 2}
    with served(fake) as url:
        train(tmp_path / "run", policy, REWARD, **changes, engine_url=url)
    rows = history.read(tmp_path / "run" / "out")
    assert max(row["sampling_drift"] for row in rows if "sampling_drift" in row) < 1e-4
    assert len(fake.loads) == 3 + 1, "the base too, whose responses the evaluation compares with"
    assert json.loads((tmp_path / "run" / "out" / "lineage.json").read_text())["status"] == "complete"


def test_an_adapter_is_sent_alone_to_a_server_that_takes_adapters(policy: Path, tmp_path: Path) -> None:
    """After the base, which is sent once and is the reference."""
    fake = FakeVLLM(policy, lora_rank=8)
    before = [p.clone() for p in fake.model.parameters()]
    changes = {**SMALL, "roles": "adapters", "lora": {"r": 4, "alpha": 8}}
    with served(fake) as url:
        record = train(tmp_path / "run", policy, REWARD, **changes, engine_url=url)
    rows = history.read(tmp_path / "run" / "out")
    assert max(row["sampling_drift"] for row in rows if "sampling_drift" in row) < 1e-4
    assert fake.files == [["model.safetensors"], *4 * [["adapter_model.safetensors"]]], (
        "three updates and the evaluation"
    )
    assert all(map(torch.equal, fake.model.parameters(), before))
    trained = torch.cat([(a - b).flatten() for a, b in zip(fake.adapted.parameters(), before, strict=True)])
    assert trained.abs().max() > 1e-3
    assert record["metrics"]["reference_response_tokens"] > 0


def test_a_restart_that_lost_the_adapter_is_a_failure_that_sends_it_again(policy: Path, tmp_path: Path) -> None:
    fake = FakeVLLM(policy, lora_rank=8)

    def restarted(training: ppo.Training, run: Any) -> dict[str, float]:
        rollout, metrics = one_rollout(training, run)
        training.learner.update(rollout, metrics)
        one_rollout(training, run)
        fake.restart()
        return one_rollout(training, run)[1]  # type: ignore[no-any-return]

    changes = {**SMALL, "roles": "adapters", "lora": {"r": 4, "alpha": 8}}
    with served(fake) as url:
        metrics = with_training(tmp_path / "run", policy, REWARD, restarted, **{**changes, "engine_url": url})
    assert metrics["sampling_drift"] < 1e-4
    assert "it has no adapter, so it restarted" in (tmp_path / "run" / "out" / "log.txt").read_text()


def test_what_an_earlier_run_left_on_the_server_is_replaced(policy: Path, tmp_path: Path) -> None:
    """Adapters belong to the trainer's base, not to the weights that the server happens to have."""
    other = make_policy(tmp_path / "seed" / "sft", "abcdefgh", 1)
    changes = {"roles": "adapters", "lora": {"r": 4, "alpha": 8}}
    with served(FakeVLLM(other, lora_rank=8)) as url:
        _, metrics = collected(tmp_path / "run", policy, url, **changes)
    assert metrics["sampling_drift"] < 1e-4


def test_servers_that_cannot_take_the_adapter_are_refused(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = {
        "after loading the policy's adapter its log-probabilities differ": FakeVLLM(
            policy, lora_rank=8, ignores_adapters=True
        ),
        "its --max-lora-rank of 2 is below `lora: r: 4`": FakeVLLM(policy, lora_rank=2),
    }
    changes = {"roles": "adapters", "lora": {"r": 4, "alpha": 8}}
    for number, (words, fake) in enumerate(others.items()):
        with served(fake) as url:
            assert words in refusal(capsys, tmp_path / str(number), policy, url, **changes)


@pytest.mark.parametrize("size", [8, 16])
def test_the_server_answers_as_the_reference_too_where_it_can_load_it(policy: Path, tmp_path: Path, size: int) -> None:
    """Off the device while nothing needs it; a reference of another size answers in the training process."""
    reference = make_policy(tmp_path / "other" / "sft", "abcdefgh", seed=1, head_size=size)
    fake = FakeVLLM(policy)
    changes: dict[str, Any] = {**SMALL, "reference": str(reference), "offload": "frozen", "total_rollouts": 1}
    with served(fake) as url:
        record = train(tmp_path / "run", policy, REWARD, **changes, engine_url=url)
    assert len(fake.loads) == 2 + (size == 8)
    loaded = [p.shape for p in fake.model.parameters()]
    expected = list(load_causal_lm(str(reference)).parameters())
    if size == 8:
        assert all(map(torch.equal, fake.model.parameters(), expected)), "the last that was asked for"
    else:
        assert loaded != [p.shape for p in expected]
    assert record["metrics"]["reference_response_tokens"] > 0


@pytest.mark.full
def test_two_processes_ddp_or_sharded_ask_for_the_same_samples_as_one(policy: Path, tmp_path: Path) -> None:
    rows, seeds = [], []
    for name, processes, more in (("one", 1, {}), ("ddp", 2, {}), ("fsdp2", 2, FSDP2)):
        fake = FakeVLLM(policy)
        with served(fake) as url:
            recipe = write_recipe(tmp_path / name, policy, REWARD, **SMALL, engine_url=url)
            launch("ppo", ["--config", str(recipe)], processes, more=more)
        rows.append(history.read(tmp_path / name / "out"))
        seeds.append(sorted(fake.seeds))
        assert len(fake.loads) == 4 + 1, "the reference at the end"
        assert max(row["sampling_drift"] for row in rows[-1] if "sampling_drift" in row) < 1e-4
    assert seeds[0] == seeds[1] == seeds[2]
    for other in rows[1:]:
        assert [row["score"] for row in other] == pytest.approx([row["score"] for row in rows[0]], abs=1e-6)


@pytest.mark.full
def test_both_processes_end_with_one_line_when_the_server_is_useless(policy: Path, tmp_path: Path) -> None:
    fake = FakeVLLM(policy, spoil=lambda choice: choice["token_ids"].__setitem__(0, 0))
    with served(fake) as url:
        recipe = write_recipe(tmp_path / "run", policy, REWARD, **SMALL, engine_url=url)
        ended = launch("ppo", ["--config", str(recipe)], 2, check=False)
    assert ended.returncode == 2
    assert "error: engine_url" in ended.stderr
    assert "Traceback" not in ended.stderr
