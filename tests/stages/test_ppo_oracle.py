"""The whole update against a slow, independent one in NumPy float64: rewards, advantages, returns, losses and gradients, on
the same samples, for every option that shapes them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from pipeline.algorithms.ppo import RunningMoments
from pipeline.config.ppo import PPOArguments
from pipeline.config.rewards import RewardSource
from pipeline.data.entries import DatasetEntry
from pipeline.models.networks import Networks, PolicyLoss, ValueLoss
from pipeline.ppo import Learner
from pipeline.rollout.collect import ruled_scores, scaled_scores
from pipeline.rollout.rollout import Rollout, Sample, build_rollout, rollout_metrics, whiten_advantages
from pipeline.training.ppo_state import PPOState
from pipeline.training.processes import Processes

import numpy as np
import pytest
import torch

ROWS = 9
STOP = 7


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@dataclass(frozen=True)
class Rows:
    """A batch of `TableNetworks`: the number and the response's length of each sequence."""

    rows: list[int]
    lengths: list[int]
    after: bool

    def read(self, table: torch.Tensor, extra: int = 0) -> torch.Tensor:
        return torch.cat([table[row, : n + extra] for row, n in zip(self.rows, self.lengths, strict=True)])


class TableNetworks(Networks):
    """Log-probabilities and values are parameters themselves, so their gradients are the loss's own derivatives."""

    def __init__(self, logprobs: np.ndarray, values: np.ndarray):
        super().__init__(lambda: torch.autocast("cpu", enabled=False))
        self.logprobs = torch.nn.Parameter(torch.tensor(logprobs))
        self.values = torch.nn.Parameter(torch.tensor(values))
        self.trained = {"policy": [self.logprobs], "value": [self.values]}
        self.parameter_counts = {"policy": 1, "value": 1}

    def accumulate_gradients(self, batch: Any, policy_loss: PolicyLoss | None, value_loss: ValueLoss) -> None:
        if policy_loss is not None:
            picked = batch.read(self.logprobs)
            policy_loss(picked, torch.zeros_like(picked)).backward()
        value_loss(batch.read(self.values, int(batch.after))).backward()


def arguments(**changes: Any) -> PPOArguments:
    values: dict[str, Any] = {
        "output_dir": "out", "datasets": [DatasetEntry(path="p")], "parent": "p", "reward": [RewardSource(function="m:f")],
        "prompts_per_rollout": ROWS, "minibatches": 3, "kl_coef": 0.3, "gamma": 0.97, "gae_lambda": 0.9, "vf_coef": 0.2,
        "clip_range": 0.15, "value_clip_range": 0.25,
    }  # fmt: skip
    return PPOArguments(**{**values, **changes})


def world(seed: int, width: int) -> dict[str, Any]:
    """Random responses of uneven lengths with everything that a rollout measures; the new policy has moved a little."""
    draw = np.random.default_rng(seed)
    lengths = [1, width, *draw.integers(1, width + 1, ROWS - 2).tolist()]
    stopped = draw.random(ROWS) < 0.6
    responses = [[*([3] * (n - 1)), STOP if s else 3] for n, s in zip(lengths, stopped, strict=True)]
    shape = (ROWS, width + 1)
    old = -draw.gamma(2.0, 0.5, shape)
    values = draw.normal(size=shape)
    return {
        "lengths": lengths,
        "stopped": stopped,
        "responses": responses,
        "old": old,
        "ref": old + draw.normal(0, 0.3, shape),
        "values": values,
        "scores": draw.normal(1.0, 2.0, ROWS),
        "new": old + draw.normal(0, 0.2, shape),
        "new_values": values + draw.normal(0, 0.3, shape),
    }


def learner_of(args: PPOArguments, data: dict[str, Any]) -> tuple[Learner, TableNetworks]:
    networks = TableNetworks(data["new"], data["new_values"])

    def batch(prompt_ids: list[list[int]], response_ids: list[list[int]]) -> Rows:
        rows = [ids[0] for ids in prompt_ids]  # a sequence's prompt is its number
        return Rows(rows, [len(ids) for ids in response_ids], args.score_position == "after")

    collector: Any = SimpleNamespace(networks=networks, batch=batch, device=torch.device("cpu"))
    return Learner(args, Processes(), collector, None, PPOState(args.kl_coef)), networks


def rollout_of(args: PPOArguments, data: dict[str, Any]) -> tuple[Rollout, float]:
    """The rollout of the sampled data as it is trained on, and the standard deviation of its advantages before whitening."""
    after = int(args.score_position == "after")
    samples = [
        Sample(
            prompt=i,
            prompt_ids=[i],
            ids=data["responses"][i],
            finished=bool(data["stopped"][i]),
            score=float(data["scores"][i]),
            score_parts={},
            logprobs=torch.tensor(data["old"][i, :n]),
            ref_logprobs=torch.tensor(data["ref"][i, :n]),
            values=torch.tensor(data["values"][i, : n + after]),
            sampled_logprobs=torch.tensor(data["old"][i, :n]),
        )
        for i, n in enumerate(data["lengths"])
    ]
    scores, moments = ruled_scores(samples, args), RunningMoments()
    moments.update(scores)
    scores = scaled_scores(scores, args, moments)
    rollout = build_rollout(samples, scores, args.kl_coef if args.kl_estimator == "k1" else 0.0, args)
    deviation = rollout.advantages.std(unbiased=False).item()
    return whiten_advantages(rollout) if args.whiten_advantages else rollout, deviation


def oracle(args: PPOArguments, data: dict[str, Any], minibatch: list[int]) -> dict[str, Any]:
    """The update by its definitions, a token at a time."""
    scores = data["scores"].copy()
    for i in range(ROWS):
        if not data["stopped"][i]:
            if args.missing_eos == "replace":
                scores[i] = args.missing_eos_score
            elif args.missing_eos == "subtract":
                scores[i] -= abs(args.missing_eos_score)
    if args.scale_scores == "running":
        scores = scores / np.std(scores, ddof=1)
    if args.score_clip is not None:
        scores = np.minimum(np.maximum(scores, -args.score_clip), args.score_clip)
    after = int(args.score_position == "after")
    rewards = []
    for i, n in enumerate(data["lengths"]):
        beta = args.kl_coef if args.kl_estimator == "k1" else 0.0
        row = [-beta * (data["old"][i, t] - data["ref"][i, t]) for t in range(n)] + [0.0] * after
        row[-1] += scores[i]
        rewards.append(row)
    if args.whiten_rewards:
        flat = np.concatenate(rewards)
        mean, std = flat.mean(), np.sqrt(flat.var() + 1e-8)
        rewards = [[(r - mean) / std + mean for r in row] for row in rewards]
    advantages, returns = [], []
    for i, row in enumerate(rewards):
        n = len(row)
        values = [*data["values"][i, :n], 0.0]
        delta = [row[t] + args.gamma * values[t + 1] - values[t] for t in range(n)]
        decay = args.gamma * args.gae_lambda
        advantage = [sum(decay ** (s - t) * delta[s] for s in range(t, n)) for t in range(n)]
        advantages.append(advantage)
        returns.append([a + v for a, v in zip(advantage, values, strict=False)])
    flat = np.concatenate([row[:n] for row, n in zip(advantages, data["lengths"], strict=True)])
    white = advantages
    if args.whiten_advantages:
        white = [[(a - flat.mean()) / np.sqrt(flat.var() + 1e-8) for a in row] for row in advantages]
    tokens = sum(data["lengths"][i] for i in minibatch)
    value_tokens = tokens + after * len(minibatch)
    policy_loss = value_loss = 0.0
    policy_gradient, value_gradient = np.zeros_like(data["new"]), np.zeros_like(data["new"])
    beta2 = (
        args.kl_coef / ((flat.std() + 1e-8) if args.whiten_advantages else 1.0) if args.kl_estimator == "k2" else 0.0
    )
    for i in minibatch:
        for t in range(data["lengths"][i]):
            ratio, a = np.exp(data["new"][i, t] - data["old"][i, t]), white[i][t]
            low, high = 1 - args.clip_range, 1 + args.clip_range
            policy_loss += max(-a * ratio, -a * min(max(ratio, low), high)) / tokens
            outside = (a > 0 and ratio > high) or (a < 0 and ratio < low)
            policy_gradient[i, t] += 0.0 if outside else -a * ratio / tokens
            policy_gradient[i, t] += beta2 * (data["new"][i, t] - data["ref"][i, t]) / tokens
        for t in range(data["lengths"][i] + after):
            v, v_old, goal = data["new_values"][i, t], data["values"][i, t], returns[i][t]
            near = v_old + min(max(v - v_old, -args.value_clip_range), args.value_clip_range)
            value_loss += 0.5 * max((v - goal) ** 2, (near - goal) ** 2) / value_tokens
            if (v - goal) ** 2 >= (near - goal) ** 2:
                value_gradient[i, t] += args.vf_coef * (v - goal) / value_tokens
    return {
        "scores": scores,
        "rewards": rewards,
        "advantages": [row[:n] for row, n in zip(white, data["lengths"], strict=True)],
        "returns": returns,
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "policy_gradient": policy_gradient,
        "value_gradient": value_gradient,
    }


OPTIONS: list[dict[str, Any]] = [
    {},
    {"score_position": "after"},
    {"kl_estimator": "k2"},
    {"kl_estimator": "k2", "whiten_advantages": False, "score_position": "after"},
    {"whiten_rewards": True},
    {"whiten_rewards": True, "score_position": "after"},
    {"scale_scores": "running", "score_clip": 0.8},
    {"missing_eos": "subtract", "missing_eos_score": 1.5},
    {"missing_eos": "none", "score_clip": 1.0},
    {"gamma": 1.0, "gae_lambda": 1.0, "whiten_advantages": False},
    {"gamma": 1.0, "gae_lambda": 0.0},
    {"score_position": "after", "scale_scores": "running", "missing_eos": "subtract", "kl_estimator": "k2"},
]


@pytest.mark.parametrize(("options", "seed"), list(itertools.product(OPTIONS, (0, 1))))
def test_the_update_is_the_oracles(options: dict[str, Any], seed: int) -> None:
    args = arguments(**options)
    data = world(seed, width=6)
    learner, networks = learner_of(args, data)
    rollout, deviation = rollout_of(args, data)
    minibatch = [4, 0, 7, 1, 5]
    expected = oracle(args, data, minibatch)
    assert rollout.scores.tolist() == pytest.approx(expected["scores"].tolist(), rel=1e-9)
    assert rollout.rewards.tolist() == pytest.approx([r for row in expected["rewards"] for r in row], abs=1e-9)
    assert rollout.returns.tolist() == pytest.approx([r for row in expected["returns"] for r in row], abs=1e-9)
    assert rollout.advantages.tolist() == pytest.approx([a for row in expected["advantages"] for a in row], abs=1e-6)
    kl_loss_coef = 0.0
    if args.kl_estimator == "k2":
        kl_loss_coef = args.kl_coef / ((deviation + 1e-8) if args.whiten_advantages else 1.0)
    metrics = learner.accumulate_gradients(rollout.select(minibatch), kl_loss_coef=kl_loss_coef)
    assert metrics["policy_loss"] == pytest.approx(expected["policy_loss"], abs=1e-9)
    assert metrics["value_loss"] == pytest.approx(expected["value_loss"], abs=1e-9)
    assert np.abs(networks.logprobs.grad.numpy() - expected["policy_gradient"]).max() < 1e-6
    assert np.abs(networks.values.grad.numpy() - expected["value_gradient"]).max() < 1e-6
    assert np.abs(expected["policy_gradient"]).max() > 1e-3


def test_an_update_takes_the_k2_loss_in_the_units_of_the_advantages() -> None:
    """Whitening divides the advantages by their deviation, so an update divides the KL loss by it too."""
    args, data = arguments(kl_estimator="k2", minibatches=1, ppo_epochs=1, max_grad_norm=1e9), world(6, width=6)
    learner, networks = learner_of(args, data)
    rollout, deviation = rollout_of(args, data)
    gradients: list[np.ndarray] = []
    learner.optimizers["policy"].register_step_pre_hook(
        lambda *_: gradients.append(networks.logprobs.grad.numpy().copy())
    )
    learner.update(rollout, {"kl": 0.0, "advantage_std": deviation})
    (gradient,) = gradients
    assert np.abs(gradient - oracle(args, data, list(range(ROWS)))["policy_gradient"]).max() < 1e-6


def test_uneven_micro_batches_give_the_same_gradient() -> None:
    """One minibatch whole, and as micro-batches of one to a few sequences: a mean over tokens, not a mean of means."""
    gradients, metrics = [], []
    for tokens in (1, 9, 12, 10_000):
        args = arguments(micro_batch_tokens=tokens)
        data = world(3, width=6)
        learner, networks = learner_of(args, data)
        metrics.append(learner.accumulate_gradients(rollout_of(args, data)[0]))
        gradients.append((networks.logprobs.grad.clone(), networks.values.grad.clone()))
    for policy, value in gradients[1:]:
        torch.testing.assert_close(policy, gradients[0][0], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(value, gradients[0][1], rtol=1e-12, atol=1e-14)
    for part in metrics[1:]:
        assert part == pytest.approx(metrics[0], rel=1e-9, abs=1e-12)


def test_metrics_of_a_rollout_are_sums_over_each_response() -> None:
    """`kl` and `reward`: summed over a response's tokens, then a mean over responses."""
    args, data = arguments(score_position="after"), world(5, width=6)
    metrics = rollout_metrics(rollout_of(args, data)[0])
    kls = [(data["old"][i, :n] - data["ref"][i, :n]).sum() for i, n in enumerate(data["lengths"])]
    assert metrics["kl"] == pytest.approx(np.mean(kls), rel=1e-9)
    scores = np.where(data["stopped"], data["scores"], args.missing_eos_score)
    assert metrics["reward"] == pytest.approx(np.mean(scores - args.kl_coef * np.array(kls)), rel=1e-9)
    assert metrics["response_tokens"] == pytest.approx(np.mean(data["lengths"]))


def test_the_largest_ratio_is_that_of_all_minibatches() -> None:
    """One token far off in one minibatch of three must show: a mean over minibatches would hide it from the alarm."""
    args, data = arguments(learning_rate=0.0, ppo_epochs=1), world(6, width=6)
    learner, _ = learner_of(args, data)
    metrics = learner.update(rollout_of(args, data)[0], {"kl": 1.0, "advantage_std": 1.0})
    moved = [np.abs(data["new"][i, :n] - data["old"][i, :n]).max() for i, n in enumerate(data["lengths"])]
    assert metrics["max_log_ratio"] == pytest.approx(max(moved), rel=1e-6)
    assert metrics["first_minibatch_log_ratio"] <= metrics["max_log_ratio"]


def test_selecting_sequences_keeps_their_own_tokens() -> None:
    args = arguments(score_position="after")
    data = world(4, width=6)
    rollout, _ = rollout_of(args, data)
    picked = rollout.select([5, 2])
    starts, value_starts = (
        torch.cat([torch.zeros(1), x.cumsum(0)]).long() for x in (rollout.lengths, rollout.value_lengths)
    )
    expected = torch.cat([rollout.logprobs[starts[i] : starts[i + 1]] for i in (5, 2)])
    assert torch.equal(picked.logprobs, expected)
    expected = torch.cat([rollout.returns[value_starts[i] : value_starts[i + 1]] for i in (5, 2)])
    assert torch.equal(picked.returns, expected)
    assert picked.response_ids == [rollout.response_ids[5], rollout.response_ids[2]]


def test_the_kl_of_an_update_is_that_of_the_old_policy_from_the_new() -> None:
    """One token of 1,000 that loses 12 nats moves KL(old‖new) by 0.011 nats per token; the estimate must not explode."""
    from pipeline.ppo import policy_loss
    from pipeline.training.metric_sums import MetricSums

    old = torch.full((1000,), -1.0)
    new = old.clone()
    new[0] -= 12.0
    rollout: Any = SimpleNamespace(logprobs=old, advantages=torch.zeros(1000), ref_logprobs=old)
    sums = MetricSums()
    policy_loss(new, torch.zeros(1000), rollout, arguments(), kl_loss_coef=0.0, tokens=1000, sums=sums)
    assert sums.over(Processes(), torch.device("cpu"))["update_kl"] == pytest.approx(0.011, abs=1e-3)
