"""Best-of-n by its exact distribution, rejection sampling as a command, and over-optimisation on a toy."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

from helpers.worlds import distribution, make_policy, texts, total_variation, train
from pipeline.cli import main as rlhf
from pipeline.data.encoding import ChatEncoder
from pipeline.models.loading import load_causal_lm
from pipeline.models.tokenizers import load_tokenizer
from pipeline.rollout.best_of_n import best_of_each, best_of_n, kl_bound
from pipeline.rollout.engine import LocalEngine, SamplingSettings
from pipeline.rollout.rewards import Answers, RewardPart, Scorer

import numpy as np
import pytest
import torch

SCORES = {"a": 0.3, "b": 1.0, "c": -0.5, "d": 0.7, "": 0.1}


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return make_policy(tmp_path / "sft", "abcd")


@pytest.mark.parametrize("n", [1, 2, 8])
def test_best_of_n_has_its_exact_distribution(policy: Path, n: int) -> None:
    """P(y) = F(y)^n - F(<y)^n over the ranking of scores; its KL stays below log n - (n-1)/n."""
    encoder = ChatEncoder(load_tokenizer(str(policy)))
    settings = SamplingSettings(1, [encoder.eos_id], [0, 2, 3, 4, 5], encoder.tokenizer.pad_token_id, rows=1000)
    engine = LocalEngine(settings)

    def compute(answers: Answers) -> torch.Tensor:
        return torch.tensor([SCORES[text.strip()] for text in answers.texts])

    scorer = Scorer([RewardPart("scores", 1.0, compute)])
    number = 4000
    records = [{"prompt": [{"role": "user", "content": "a"}], "row": {}}] * number
    found = best_of_n(engine, load_causal_lm(str(policy)).eval(), encoder, scorer, records, n=n, seed=3)
    reference = distribution(policy, "a", 1)
    said = texts(policy, reference)
    expected, below = {}, 0.0
    for ids in sorted(reference, key=lambda ids: SCORES[said[ids]]):
        upto = below + reference[ids]
        expected[ids] = upto**n - below**n
        below = upto
    counted = {ids: found.response_ids.count(list(ids)) / number for ids in reference}
    assert total_variation(counted, expected) < 0.03
    kl = sum(p * math.log(p / reference[ids]) for ids, p in expected.items() if p > 0)
    assert kl <= kl_bound(n) + 1e-9
    mean = sum(p * SCORES[said[ids]] for ids, p in reference.items())
    assert found.mean_score == pytest.approx(mean, abs=0.03)
    assert sum(found.scores) / number == pytest.approx(sum(p * SCORES[said[i]] for i, p in expected.items()), abs=0.03)


@pytest.mark.parametrize("finished_first", [True, False])
def test_a_finished_sample_is_taken_where_there_is_one(policy: Path, finished_first: bool) -> None:
    """The reward prefers long, unfinished responses; as demonstrations only finished ones are of use."""
    encoder = ChatEncoder(load_tokenizer(str(policy)))
    settings = SamplingSettings(3, [encoder.eos_id], [0, 2, 3, 4, 5], encoder.tokenizer.pad_token_id, rows=1000)
    scorer = Scorer([RewardPart("length", 1.0, lambda answers: torch.tensor([float(len(t)) for t in answers.texts]))])
    records = [{"prompt": [{"role": "user", "content": "a"}], "row": {}}] * 64
    model = load_causal_lm(str(policy)).eval()
    options = {"n": 4, "seed": 3, "finished_first": finished_first}
    found = best_of_n(LocalEngine(settings), model, encoder, scorer, records, **options)
    drawn = [[found.draws[draw][i] for draw in range(4)] for i in range(64)]
    possible = [any(ids[-1] == encoder.eos_id for ids in draws) for draws in drawn]
    taken = [ids[-1] == encoder.eos_id for ids in found.response_ids]
    assert 0 < sum(possible) < 64, "some prompts have no finished sample"
    if finished_first:
        assert taken == possible
    else:
        assert sum(taken) < sum(possible)


def test_rejection_sampling_writes_demonstrations(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "likes_b.py").write_text(
        "def score(prompts, responses, rows):\n    return [float(r.count('b')) for r in responses]\n"
    )
    target = tmp_path / "new" / "best.jsonl"
    command = [
        "best-of",
        "--policy",
        str(policy),
        "--reward",
        "likes_b:score",
        "--prompts",
        str(tmp_path / "prompts.jsonl"),
    ]
    command += ["--output", str(target), "-n", "12", "--max-response-tokens", "3"]
    with pytest.raises(SystemExit) as caught:
        rlhf(command)
    assert caught.value.code == 0
    said = capsys.readouterr().out
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert f"best-of: {len(rows)} demonstrations" in said
    assert len(rows) == 16 or f"{16 - len(rows)} prompts left out" in said
    for row in rows:
        assert row["prompt"][-1]["content"] in "ab"
        assert row["score"] == row["response"].count("b")
    assert sum(row["score"] for row in rows) / len(rows) > 0.8
    with pytest.raises(SystemExit) as caught:
        rlhf(command)
    assert caught.value.code == 2
    assert "exists; nothing was overwritten" in capsys.readouterr().err


def test_a_gold_metric_stops_before_the_proxy_is_overdone(policy: Path, tmp_path: Path) -> None:
    """Gold likes `b` and `d`, but not `ddd`; the proxy misses that and likes `d` best. Selecting by gold stops earlier."""
    proxy = "return response.count('b') + 1.5 * response.count('d')"
    settings: dict[str, Any] = {
        "prompts_per_rollout": 128, "total_rollouts": 60, "max_response_tokens": 3, "learning_rate": 1e-2, "kl_coef": 0.02,
        "eval_rollouts": 3, "judges": ["gold:score"],
    }  # fmt: skip
    for name in ("blind", "watched"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "gold.py").write_text(
            "def score(prompts, responses, rows):\n    return [r.count('b') + r.count('d') - 4.0 * (r.count('d') == 3) for r in responses]\n"
        )
    blind = train(tmp_path / "blind", policy, proxy, **settings)["metrics"]
    watched = train(tmp_path / "watched", policy, proxy, **settings, best_metric="gold", patience=4)["metrics"]
    assert blind["gold"] < watched["gold"] - 0.5
    assert watched["gold"] > 1.5
    assert blind["score"] > watched["score"]
    assert watched["best_rollout"] < watched["rollouts"] < blind["rollouts"]
    assert watched["gold"] == pytest.approx(watched["best_gold"], abs=0.3)


def test_best_of_each_is_the_mean_over_all_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    proxy, judge = torch.randn(6, 4, generator=generator), torch.randn(6, 4, generator=generator)
    found = best_of_each(judge, proxy)
    for k in range(1, 7):
        means = []
        for chosen in itertools.combinations(range(6), k):
            best = proxy[list(chosen)].argmax(0)
            means.append(judge[list(chosen)].gather(0, best[None])[0].double().mean().item())
        assert found[k - 1] == pytest.approx(np.mean(means), abs=1e-6)
    assert best_of_each(proxy, proxy) == sorted(best_of_each(proxy, proxy))
    assert kl_bound(1) == 0.0
