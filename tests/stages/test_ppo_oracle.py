"""The whole update against a slow, independent one in NumPy float64 (section D, 9): rewards, advantages, returns, losses
and gradients, on the same rollouts, for every option that shapes them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from pipeline.config.ppo import PPOArguments
from pipeline.config.rewards import RewardSource
from pipeline.data.entries import DatasetEntry
from pipeline.models.networks import Batch, Roles
from pipeline.ppo import Loop, State
from pipeline.rollout.rollout import rollout_figures
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


class TableRoles(Roles):
    """Log-probabilities and values are parameters themselves, so their gradients are the loss's own derivatives."""

    def __init__(self, logprobs: np.ndarray, values: np.ndarray):
        super().__init__(lambda: torch.autocast("cpu", enabled=False))
        self.logprobs = torch.nn.Parameter(torch.tensor(logprobs))
        self.values = torch.nn.Parameter(torch.tensor(values))
        self.trained = {"policy": [self.logprobs], "value": [self.values]}
        self.parameters = {"policy": 1, "value": 1}
        self.policy: Any = SimpleNamespace(forbidden=torch.tensor([], dtype=torch.long))

    def passes(self, batch: Batch, train_policy: bool = True) -> Iterator[Batch]:
        rows, width = batch["input_ids"][:, 0], batch["mask"].shape[1]  # a row's prompt is its number
        if train_policy:
            picked = self.logprobs[rows, :width]
            yield {"logprobs": picked, "entropy": torch.zeros_like(picked)}
        yield {"values": self.values[rows, :width]}


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


def loop_of(args: PPOArguments, data: dict[str, Any]) -> Loop:
    run: Any = SimpleNamespace(args=args, processes=Processes(), is_main=True)
    encoder: Any = SimpleNamespace(eos_id=STOP, tokenizer=SimpleNamespace(pad_token_id=0))
    accelerator: Any = SimpleNamespace(device=torch.device("cpu"))
    roles = TableRoles(data["new"], data["new_values"])
    return Loop(run, accelerator, roles, encoder, None, [], [], State(args.kl_coef))  # type: ignore[arg-type]


def answers(args: PPOArguments, data: dict[str, Any]) -> list[dict[str, Any]]:
    after = args.score_position == "after"
    return [
        {
            "row": i,
            "response": data["responses"][i],
            "score": data["scores"][i],
            "logprobs": data["old"][i, :n].tolist(),
            "ref_logprobs": data["ref"][i, :n].tolist(),
            "values": data["values"][i, : n + after].tolist(),
        }
        for i, n in enumerate(data["lengths"])
    ]


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


@pytest.mark.parametrize(("options", "seed"), itertools.product(OPTIONS, (0, 1)))
def test_d9_the_update_is_the_oracles(options: dict[str, Any], seed: int) -> None:
    args = arguments(**options)
    data = world(seed, width=6)
    loop = loop_of(args, data)
    rollout = loop.assemble([{"ids": [i]} for i in range(ROWS)], answers(args, data))
    minibatch = [4, 0, 7, 1, 5]
    expected = oracle(args, data, minibatch)
    assert rollout.scores.tolist() == pytest.approx(expected["scores"].tolist(), rel=1e-9)
    for i, n in enumerate(data["lengths"]):
        wide = n + int(args.score_position == "after")
        assert rollout.rewards[i, :wide].tolist() == pytest.approx(expected["rewards"][i], abs=1e-9)
        assert rollout.advantages[i, :n].tolist() == pytest.approx(expected["advantages"][i], abs=1e-6)
        assert rollout.returns[i, :wide].tolist() == pytest.approx(expected["returns"][i], abs=1e-9)
        for name in ("rewards", "advantages", "returns"):
            assert not getattr(rollout, name)[i, wide:].any(), "nothing past the end"
    figures = loop.backward(rollout, minibatch)
    assert figures["policy_loss"] == pytest.approx(expected["policy_loss"], abs=1e-9)
    assert figures["value_loss"] == pytest.approx(expected["value_loss"], abs=1e-9)
    roles: Any = loop.roles
    assert np.abs(roles.logprobs.grad.numpy() - expected["policy_gradient"]).max() < 1e-6
    assert np.abs(roles.values.grad.numpy() - expected["value_gradient"]).max() < 1e-6
    assert np.abs(expected["policy_gradient"]).max() > 1e-3


def test_d11_uneven_micro_batches_give_the_same_gradient() -> None:
    """One minibatch whole, and as micro-batches of one to a few rows: a mean over tokens, not a mean of means (A28)."""
    found = []
    for tokens in (1, 9, 12, 10_000):
        args = arguments(micro_batch_tokens=tokens)
        data = world(3, width=6)
        loop = loop_of(args, data)
        rollout = loop.assemble([{"ids": [i]} for i in range(ROWS)], answers(args, data))
        loop.backward(rollout, list(range(ROWS)))
        roles: Any = loop.roles
        found.append((roles.logprobs.grad.clone(), roles.values.grad.clone()))
    for policy, value in found[1:]:
        torch.testing.assert_close(policy, found[0][0], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(value, found[0][1], rtol=1e-12, atol=1e-14)


def test_a24_garbage_after_the_end_changes_nothing() -> None:
    """What networks say about padding, even NaN, reaches neither figures nor gradients."""
    args = arguments()
    data = world(4, width=6)
    clean = loop_of(args, data)
    rollout = clean.assemble([{"ids": [i]} for i in range(ROWS)], answers(args, data))
    expected, measured = clean.backward(rollout, list(range(ROWS))), rollout_figures(rollout)
    dirty_data = {**data, "new": data["new"].copy(), "new_values": data["new_values"].copy()}
    for i, n in enumerate(data["lengths"]):
        dirty_data["new"][i, n:], dirty_data["new_values"][i, n:] = np.nan, 1e30
        for name in ("logprobs", "ref_logprobs", "values", "advantages", "returns"):
            getattr(rollout, name)[i, n:] = float("nan")
    dirty = loop_of(args, dirty_data)
    assert dirty.backward(rollout, list(range(ROWS))) == expected
    assert rollout_figures(rollout) == measured
    clean_roles: Any = clean.roles
    dirty_roles: Any = dirty.roles
    for i, n in enumerate(data["lengths"]):
        assert torch.equal(dirty_roles.logprobs.grad[i, :n], clean_roles.logprobs.grad[i, :n])
        assert torch.equal(dirty_roles.values.grad[i, :n], clean_roles.values.grad[i, :n])
