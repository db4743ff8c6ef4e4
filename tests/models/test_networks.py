"""Networks on one backbone or on adapters: right, non-zero gradients for each, and nothing else moves."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from helpers.ppo_training import one_rollout, train_all, with_training
from helpers.worlds import make_policy, train, train_reward
from pipeline import ppo
from pipeline.models.adapter_networks import AdapterNetworks
from pipeline.models.loading import load_causal_lm
from pipeline.models.reward_model import load_scalar_model, score_ids
from pipeline.training.stage import Run

import pytest
import torch
from safetensors.torch import load_file

COUNT_B = "return float(response.count('b'))"
SHORT: dict[str, Any] = {
    "prompts_per_rollout": 32,
    "total_rollouts": 4,
    "max_response_tokens": 3,
    "learning_rate": 3e-3,
}
LORA: dict[str, Any] = {"lora": {"r": 4, "alpha": 8}}
ROLES = ["separate", "shared_trunk", "adapters"]


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return make_policy(tmp_path / "sft", "abcd")


def trained(policy: Path, run: Path, roles: str, **changes: Any) -> tuple[ppo.Training, Any]:
    """A stage after its rollouts, and one more rollout."""

    def use(training: ppo.Training, running: Run[Any]) -> tuple[ppo.Training, Any]:
        ppo.train(training, running)
        rollout, _ = one_rollout(training, running)
        ppo.finish(training, running)
        return training, rollout

    lora = LORA if roles == "adapters" else {}
    return with_training(run, policy, COUNT_B, use, **SHORT, roles=roles, **lora, **changes)


def learner_of(training: ppo.Training, **changes: Any) -> ppo.Learner:
    """A learner of the same networks with other arguments."""
    args = dataclasses.replace(training.learner.args, **changes)
    return ppo.Learner(args, training.learner.processes, training.collector, None, training.state)


def gradients(learner: ppo.Learner, rollout: Any) -> dict[str, list[torch.Tensor]]:
    for parameters in learner.networks.trained.values():
        for parameter in parameters:
            parameter.grad = None
    learner.accumulate_gradients(rollout)
    return {
        name: [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        for name, parameters in learner.networks.trained.items()
    }


@pytest.mark.parametrize("roles", ROLES)
def test_gradients_are_those_of_the_losses_by_finite_differences(policy: Path, tmp_path: Path, roles: str) -> None:
    """Along random directions of each network's parameters the loss changes as its gradient says."""
    training, rollout = trained(policy, tmp_path / "run", roles)
    smooth = learner_of(training, vf_coef=1.0, clip_range=99.0, value_clip_range=99.0)
    computed = gradients(smooth, rollout)

    def total() -> float:
        metrics = smooth.accumulate_gradients(rollout)
        return metrics["policy_loss"] + metrics["value_loss"]

    for name, parameters in smooth.networks.trained.items():
        assert sum(g.abs().sum().item() for g in computed[name]) > 1e-4, f"{name} learns"
        torch.manual_seed(1)
        direction = [torch.randn_like(p) for p in parameters]
        slope = sum((g * d).sum().item() for g, d in zip(computed[name], direction, strict=True))
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p.add_(sign * 1e-3 * d)
            losses.append(total())
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p.sub_(sign * 1e-3 * d)
        assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(slope, rel=0.05, abs=2e-3), name


@pytest.mark.parametrize("roles", ROLES)
def test_micro_batches_do_not_change_any_networks_gradient(policy: Path, tmp_path: Path, roles: str) -> None:
    """Adapters are switched between micro-batches: the sums must still be those of one pass."""
    training, rollout = trained(policy, tmp_path / "run", roles)
    whole, cut = (gradients(learner_of(training, micro_batch_tokens=tokens), rollout) for tokens in (10_000, 20))
    for name in whole:
        one, two = (torch.cat([g.flatten() for g in part[name]]) for part in (whole, cut))
        assert one.norm() > 0
        assert ((one - two).norm() / one.norm()).item() < 1e-4, name


def test_adapters_train_nothing_but_themselves(policy: Path, tmp_path: Path) -> None:
    training, _ = trained(policy, tmp_path / "run", "adapters")
    networks: Any = training.collector.networks
    original = load_causal_lm(str(policy)).state_dict()
    base = {
        name.replace(".base_layer", ""): p
        for name, p in networks.policy.model.named_parameters()
        if "lora_" not in name
    }
    assert all(torch.equal(original[name], p) and p.grad is None for name, p in base.items() if name in original)
    assert len(base) >= 10
    for adapter in ("default", "value"):  # LoRA's B starts at 0
        moved = [p for name, p in networks.peft.named_parameters() if f"lora_B.{adapter}." in name]
        assert moved
        assert all(p.abs().max() > 0 for p in moved), f"{adapter} learns"
    trainable = {id(p) for parameters in networks.trained.values() for p in parameters}
    assert all(p.requires_grad == (id(p) in trainable) for p in networks.peft.parameters())
    adapter = tmp_path / "run" / "out" / "adapter" / "adapter_config.json"
    assert json.loads(adapter.read_text())["r"] == 4


def test_an_error_inside_leaves_the_policys_adapter_on(policy: Path, tmp_path: Path) -> None:
    def use(training: ppo.Training, run: Any) -> None:
        networks = training.collector.networks
        assert isinstance(networks, AdapterNetworks)
        for adapter in ("value", None):
            with pytest.raises(ZeroDivisionError), networks.active(adapter):
                raise ZeroDivisionError
            assert networks.peft.active_adapter == "default"
            assert all(parameter.requires_grad for parameter in networks.trained["policy"])

    with_training(tmp_path / "run", policy, COUNT_B, use, **SHORT, roles="adapters", **LORA)


def test_the_reference_of_adapters_is_the_base(policy: Path, tmp_path: Path) -> None:
    training, _ = trained(policy, tmp_path / "run", "adapters")
    networks: Any = training.collector.networks
    measured = networks.compute_logprobs_and_values(
        training.collector.batch([[3, 7, 4]], [[6, 7, 1]]), with_values=True
    )
    ids = torch.tensor([[3, 7, 4, 6, 7, 1]])
    with torch.no_grad():
        logits = load_causal_lm(str(policy))(input_ids=ids).logits[0, 2:-1]
    logits[:, [0, 2, 3, 4, 5]] = float("-inf")
    expected = torch.log_softmax(logits, -1)[range(3), [6, 7, 1]]
    torch.testing.assert_close(measured.ref_logprobs, expected, atol=1e-5, rtol=1e-5)
    assert (measured.logprobs - measured.ref_logprobs).abs().max() > 1e-3
    with networks.sampler("reference") as model, torch.no_grad():
        again = model(input_ids=ids).logits[0, 2:-1]
    again[:, [0, 2, 3, 4, 5]] = float("-inf")
    torch.testing.assert_close(torch.log_softmax(again, -1)[range(3), [6, 7, 1]], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_adapters_on_a_quantised_base(policy: Path, tmp_path: Path, quantization: str) -> None:
    """The policy moves, the output is fp32 with the adapter merged into the unrounded base."""
    record = train(
        tmp_path / "run", policy, COUNT_B, **{**SHORT, "learning_rate": 3e-2}, roles="adapters", quantization=quantization,
        **LORA,
    )  # fmt: skip
    assert record["metrics"]["kl"] > 0.01
    saved = load_causal_lm(str(tmp_path / "run" / "out"))
    assert {p.dtype for p in saved.parameters()} == {torch.float32}
    rows = [json.loads(line) for line in (tmp_path / "run" / "out" / "history.jsonl").read_text().splitlines()]
    assert all(row["policy_grad_norm"] > 0 for row in rows if "policy_grad_norm" in row)
    assert rows[-1]["value_grad_norm"] > 0


# ---------------------------------------------------------------------------------------------- a reward that is an adapter


def against(run: Path, policy: Path, reward_path: Path, use: Any, **changes: Any) -> Any:
    return with_training(run, policy, COUNT_B, use, **{**SHORT, "reward": str(reward_path), **changes})


def test_a_reward_adapter_shares_the_base(policy: Path, tmp_path: Path) -> None:
    """Its scores are those of the merged reward model; the value adapter starts from it, and the reward model stays."""
    folder = train_reward(tmp_path / "reward", policy, lora=True)
    merged: Any = load_scalar_model(str(folder))
    ids = [[3, 7, 4, 6, 7, 1], [3, 8, 4, 9, 1]]
    expected = score_ids(merged, ids, 0)

    def use(training: ppo.Training, run: Run[Any]) -> None:
        networks: Any = training.collector.networks
        torch.testing.assert_close(score_ids(networks.reward, ids, 0), expected, atol=1e-4, rtol=1e-4)
        batch = training.collector.batch([[3, 7, 4], [3, 8, 4]], [[6, 7, 1], [9, 1]])
        before = networks.compute_logprobs_and_values(batch, with_values=True).values
        # The value at the state of the end token is the score.
        torch.testing.assert_close(before[[3, 6]], expected, atol=1e-4, rtol=1e-4)
        train_all(training, run)
        torch.testing.assert_close(score_ids(networks.reward, ids, 0), expected, atol=1e-4, rtol=1e-4)
        after = networks.compute_logprobs_and_values(batch, with_values=True).values
        assert (after[3] - expected[0]).abs() > 1e-4

    against(tmp_path / "run", policy, folder, use, roles="adapters", score_position="after", **LORA)


def test_the_dropout_of_a_reward_adapter_is_off(policy: Path, tmp_path: Path) -> None:
    """A reward model trained with LoRA dropout scores the same text the same, also while the policy is in training mode."""
    folder = train_reward(tmp_path / "reward", policy, lora={"r": 4, "alpha": 8, "dropout": 0.5})

    def use(training: ppo.Training, run: Run[Any]) -> None:
        networks: Any = training.collector.networks
        assert networks.policy.training
        ids = [[3, 7, 4, 6, 7, 1], [3, 8, 4, 9, 1]]
        assert torch.equal(score_ids(networks.reward, ids, 0), score_ids(networks.reward, ids, 0))
        batch = training.collector.batch([[3, 7, 4]], [[6, 7, 1]])
        assert torch.equal(*(networks.compute_logprobs_and_values(batch, with_values=True).values for _ in range(2)))

    against(tmp_path / "run", policy, folder, use, roles="adapters", **LORA)


def test_the_value_at_the_state_of_the_end_token_is_the_score(policy: Path, tmp_path: Path) -> None:
    folder = train_reward(tmp_path / "reward", policy, lora=False)

    def use(training: ppo.Training, run: Run[Any]) -> None:
        batch = training.collector.batch([[3, 7, 4], [3, 8, 4]], [[6, 7, 1], [9, 1]])
        values = training.collector.networks.compute_logprobs_and_values(batch, with_values=True).values
        scores = score_ids(load_scalar_model(str(folder)), [[3, 7, 4, 6, 7, 1], [3, 8, 4, 9, 1]], 0)
        torch.testing.assert_close(values[[3, 6]], scores, atol=1e-5, rtol=1e-5)

    against(tmp_path / "run", policy, folder, use, score_position="after", total_rollouts=1)


def refusal(capsys: pytest.CaptureFixture[str], run: Path, policy: Path, **changes: Any) -> str:
    with pytest.raises(SystemExit) as caught:
        train(run, policy, COUNT_B, **{**SHORT, **changes})
    assert caught.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_adapters_refuse_a_reward_of_another_base(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_policy(tmp_path / "other", "abcd", seed=9)
    folder = train_reward(tmp_path / "reward", other, lora=True)
    line = refusal(capsys, tmp_path / "run", policy, reward=str(folder), roles="adapters", **LORA)
    assert "was trained on another base than the policy" in line
    assert "say `roles: separate`" in line


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"roles": "adapters"}, "go together, e.g. lora"),
        ({**LORA}, "go together, e.g. lora"),
        ({"quantization": "4bit"}, "quantization needs `roles: adapters`"),
        ({"kl_estimator": "k3"}, "kl_estimator: 'k3' is not known"),
        ({"ptx_coef": 27.8}, "ptx_coef and ptx_datasets go together"),
        ({"best_metric": "gold", "eval_rollouts": 1}, "no evaluation measures 'gold'; one of score"),
        ({"best_metric": "score"}, "best_metric and stop_kl look at evaluations"),
        ({"patience": 3}, "patience counts evaluations without a new best"),
        ({"value_warmup_rollouts": 4}, "leaves no rollout for the policy"),
        ({"roles": "shared_trunk", "value_init": "reward"}, "value_init: reward needs a reward model"),
        ({"minibatches": 5}, "must divide prompts_per_rollout"),
        ({"max_prompt_tokens": 63}, "exceed the model's context of 64"),
    ],
)
def test_what_cannot_run_is_refused(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], says: str
) -> None:
    assert says in refusal(capsys, tmp_path / "run", policy, **changes)
    assert not (tmp_path / "run" / "out" / "model.safetensors").exists()


def test_a_base_is_not_overwritten(policy: Path, tmp_path: Path) -> None:
    """Whatever the roles, the parent's folder stays as it was."""
    copy = tmp_path / "copy"
    shutil.copytree(policy, copy)
    for roles in ROLES:
        trained(policy, tmp_path / roles, roles)
    assert {p.name: p.read_bytes() for p in policy.iterdir()} == {p.name: p.read_bytes() for p in copy.iterdir()}


def test_policy_average_and_value_are_handed_on_in_bf16(policy: Path, tmp_path: Path) -> None:
    """The average is saved without a copy and the policy is the policy afterwards; the value's head stays fp32."""
    options: dict[str, Any] = {**SHORT, "total_rollouts": 2, "ema_decay": 0.5}
    train(tmp_path / "whole", policy, COUNT_B, **options)
    train(tmp_path / "half", policy, COUNT_B, save_dtype="bf16", **options)
    stored = {}
    for name in ("", "ema", "value"):
        full, half = (load_file(tmp_path / run / "out" / name / "model.safetensors") for run in ("whole", "half"))
        stored[name] = full
        for weight, tensor in half.items():
            assert tensor.dtype == (torch.float32 if weight == "score.weight" else torch.bfloat16)
            assert torch.equal(tensor, full[weight].to(tensor.dtype))
    assert any(not torch.equal(stored[""][weight], stored["ema"][weight]) for weight in stored[""])


@pytest.mark.parametrize("roles", ROLES)
def test_recomputed_activations_change_nothing(policy: Path, tmp_path: Path, roles: str) -> None:
    """A layer computes twice per update, once while nothing is trained, and samples with its cache; the weights are the same."""
    files, passes = [], []
    for recomputed in (False, True):
        folder = tmp_path / str(recomputed)
        training, rollout = trained(policy, folder, roles, gradient_checkpointing=recomputed)
        files.append(load_file(folder / "out" / "model.safetensors"))
        attention = training.learner.networks.policy.model.model.layers[0].self_attn
        calls: list[Any] = []
        hook = attention.register_forward_hook(lambda *_, calls=calls: calls.append(None))
        training.learner.accumulate_gradients(rollout)
        updates = len(calls)
        prompts = training.prompts.of_rollout(0, 4, 0)
        with training.collector.networks.sampler("policy") as model:
            caches = model(input_ids=torch.tensor([prompts[0].ids]), use_cache=True).past_key_values
        hook.remove()
        passes.append(updates)
        assert caches is not None
        assert caches.get_seq_length() == len(prompts[0].ids)
    assert passes[1] == 2 * passes[0] > 0
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
