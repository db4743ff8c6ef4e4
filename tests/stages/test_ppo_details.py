"""The numbered details of section A that concern PPO's loop, on worlds of a few tokens, by the real stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.worlds import make_policy, train
from pipeline import ppo
from pipeline.algorithms.kl import adapt_kl_coef, k2, k3
from pipeline.algorithms.ppo import RunningMoments, shape_rewards, value_mask_of
from pipeline.algorithms.schedules import lr_factor
from pipeline.data.batching import endless
from pipeline.data.encoding import ChatEncoder
from pipeline.models.loading import load_causal_lm, load_tokenizer
from pipeline.rollout.rollout import LocalEngine, row_uniforms
from pipeline.training.identity import weights_sha256

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

COUNT_B = "return float(response.count('b'))"
SHORT: dict[str, Any] = {
    "prompts_per_rollout": 32,
    "total_rollouts": 4,
    "max_response_tokens": 3,
    "learning_rate": 3e-3,
}


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return make_policy(tmp_path / "sft", "abcd")


def rows(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "out" / "history.jsonl").read_text().splitlines()]
    return [row for row in found if "policy_lr" in row]


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> list[ppo.Loop]:
    """The loops that stages build while the test runs."""
    built: list[ppo.Loop] = []
    start = ppo.Loop.__init__

    def remember(self: ppo.Loop, *args: Any) -> None:
        start(self, *args)
        built.append(self)

    monkeypatch.setattr(ppo.Loop, "__init__", remember)
    return built


# ---------------------------------------------------------------------------------------------- sampling and scores


def test_a2_pad_and_unused_ids_are_never_sampled(policy: Path, tmp_path: Path) -> None:
    """Their logits are made huge; still they come out 0 times, and the loop's log-probabilities give them none."""
    model, tokenizer = load_causal_lm(str(policy)), load_tokenizer(str(policy))
    names = ("<|pad|>", "<|unk|>", "<|user|>", "<|assistant|>", "<|system|>")
    forbidden = [tokenizer.convert_tokens_to_ids(name) for name in names]
    with torch.no_grad():
        model.get_output_embeddings().weight[forbidden] *= 1000.0
    model.save_pretrained(policy)
    encoder = ChatEncoder(tokenizer)
    prompts = [encoder.prompt_ids([{"role": "user", "content": p}]) for p in "ab" * 50]
    engine = LocalEngine(3, [encoder.eos_id], tokenizer.pad_token_id, forbidden)
    found = engine.responses(model, prompts, row_uniforms(0, range(100), 3))
    assert not {token for response in found for token in response} & set(forbidden)
    train(tmp_path / "run", policy, COUNT_B, **SHORT)
    assert max(row["ratio_first_minibatch"] for row in rows(tmp_path / "run")) < 1e-5


def test_a19_responses_end_at_their_first_stop_token(policy: Path) -> None:
    model, tokenizer = load_causal_lm(str(policy)), load_tokenizer(str(policy))
    encoder = ChatEncoder(tokenizer)
    stop = encoder.text_ids("b")[0]
    prompts = [encoder.prompt_ids([{"role": "user", "content": "a"}])] * 200
    engine = LocalEngine(5, [encoder.eos_id, stop], tokenizer.pad_token_id, [0, 2, 3, 4, 5])
    found = engine.responses(model, prompts, row_uniforms(0, range(200), 5))
    for response in found:
        stops = [token in (encoder.eos_id, stop) for token in response]
        assert not any(stops[:-1])
        assert stops[-1] or len(response) == 5
    assert {len(response) for response in found} == {1, 2, 3, 4, 5}


def test_a20_any_stop_token_is_a_stop(policy: Path, tmp_path: Path) -> None:
    """The missing-EOS score asks for the stop tokens, EOS or not."""
    train(
        tmp_path / "run",
        policy,
        "return 1.0",
        **SHORT,
        stop_tokens=["b"],
        missing_eos="replace",
        missing_eos_score=-1.0,
    )
    samples = json.loads((tmp_path / "run" / "out" / "samples.json").read_text())
    metrics = json.loads((tmp_path / "run" / "out" / "metrics.json").read_text())
    for row in rows(tmp_path / "run"):
        assert row["score"] == pytest.approx(2 * row["stopped"] - 1, abs=1e-6)
    # Three tokens and no stop among them: nothing else is unfinished.
    unfinished = [s for s in samples if len(s["response"].replace(" ", "")) == 3 and "b" not in s["response"][-1]]
    assert metrics["stopped"] == pytest.approx(1 - len(unfinished) / len(samples))
    assert any(s["response"].endswith("b") for s in samples)


def test_a19_samples_do_not_depend_on_the_batch(policy: Path) -> None:
    model, tokenizer = load_causal_lm(str(policy)), load_tokenizer(str(policy))
    encoder = ChatEncoder(tokenizer)
    prompts = [encoder.prompt_ids([{"role": "user", "content": p * n}]) for n in (1, 5, 3, 2) for p in "abcd"]
    uniforms = row_uniforms(1, range(len(prompts)), 8)
    found = []
    for size in (1, 3, 16):
        engine = LocalEngine(8, [encoder.eos_id], tokenizer.pad_token_id, [0, 2, 3, 4, 5], rows=size)
        found.append(engine.responses(model, prompts, uniforms))
    assert found[0] == found[1] == found[2]


def test_a23_the_score_stands_once_also_at_full_length() -> None:
    """Σ rewards = score - β Σ k1 in both positions; "after" needs the free column even for the longest response."""
    torch.manual_seed(0)
    for position in ("last", "after"):
        extra = int(position == "after")
        mask = torch.arange(4 + extra)[None] < torch.tensor([[2], [4], [1]])
        logprobs, reference, scores = torch.randn(mask.shape), torch.randn(mask.shape), torch.tensor([1.0, -2.0, 0.5])
        rewards = shape_rewards(scores, logprobs, reference, mask, 0.1, position)
        kl = torch.where(mask, logprobs - reference, 0.0).sum(1)
        torch.testing.assert_close(rewards.sum(1), scores - 0.1 * kl)
        counted = value_mask_of(mask, position)
        assert counted.sum(1).tolist() == [2 + extra, 4 + extra, 1 + extra]
        assert not rewards[~counted].any()


def test_running_moments_are_those_of_everything_seen() -> None:
    torch.manual_seed(0)
    values, moments = 3 + 2 * torch.randn(100), RunningMoments()
    assert moments.std == 1.0
    for part in values.split([1, 9, 40, 50]):
        moments.update(part)
    assert (moments.count, moments.mean) == (100, pytest.approx(values.mean().item(), rel=1e-6))
    assert moments.std == pytest.approx(values.std().item(), rel=1e-6)


def test_scores_may_be_scaled_and_clipped(policy: Path, tmp_path: Path) -> None:
    """Scores a thousand times as large train alike once they are divided by their running deviation."""
    found = []
    for factor in (1, 1000):
        run = tmp_path / str(factor)
        train(
            run,
            policy,
            f"return {factor} * float(response.count('b'))",
            **SHORT,
            scale_scores="running",
            score_clip=2.0,
        )
        found.append(rows(run))
    for one, other in zip(*found, strict=True):
        assert other["score"] == pytest.approx(1000 * one["score"], rel=1e-4)
        assert other["reward"] == pytest.approx(one["reward"], rel=1e-3)
        assert other["policy_loss"] == pytest.approx(one["policy_loss"], abs=1e-4)
        assert abs(one["reward"]) < 2.5


# ---------------------------------------------------------------------------------------------- KL


def test_a21_k2_has_the_gradient_of_the_kl() -> None:
    """Over samples of π the mean gradient of k2 is that of KL(π‖ref); k1's is 0, k3's is another's."""
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    logprobs = torch.log_softmax(logits, 0)
    weights = logprobs.exp().detach()
    (exact,) = torch.autograd.grad((logprobs.exp() * (logprobs - reference)).sum(), logits, retain_graph=True)
    (second,) = torch.autograd.grad((weights * k2(logprobs, reference)).sum(), logits, retain_graph=True)
    (third,) = torch.autograd.grad((weights * k3(logprobs, reference)).sum(), logits, retain_graph=True)
    torch.testing.assert_close(second, exact)
    assert (third - exact).abs().max() > 0.01


def test_a22_adaptive_kl_by_hand() -> None:
    assert adapt_kl_coef(1.0, 12.0, 6.0, 512, 10_000) == pytest.approx(1.01024)  # twice the target: clipped to +20 %
    assert adapt_kl_coef(1.0, 6.6, 6.0, 512, 10_000) == pytest.approx(1 + 0.1 * 0.0512)
    assert adapt_kl_coef(0.5, 0.0, 6.0, 512, 10_000) == pytest.approx(0.5 * (1 - 0.2 * 0.0512))


def test_a22_the_coefficient_follows_the_summed_kl_of_each_rollout(policy: Path, tmp_path: Path) -> None:
    record = train(
        tmp_path / "run", policy, COUNT_B, **SHORT, kl_control="adaptive", kl_target=0.5, kl_horizon=100.0, kl_coef=0.2
    )
    expected = 0.2
    for row in rows(tmp_path / "run"):
        assert row["kl_coef"] == pytest.approx(expected, abs=1e-7)
        expected = adapt_kl_coef(expected, row["kl"], 0.5, 32, 100.0)
    assert record["metrics"]["kl_coef"] == pytest.approx(expected, abs=1e-7)


# ---------------------------------------------------------------------------------------------- the update


def test_a29_optimizer_steps_are_counted_over_dataset_epochs(
    policy: Path, tmp_path: Path, loops: list[ppo.Loop]
) -> None:
    """16 prompts, 24 a rollout: every second rollout crosses a boundary; each still takes epochs × minibatches steps."""
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        step = torch.optim.AdamW.step
        patch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: (steps.append(self), step(self, *a, **k))[1])
        settings = {**SHORT, "prompts_per_rollout": 24, "minibatches": 4, "ppo_epochs": 3, "micro_batch_tokens": 30}
        record = train(tmp_path / "run", policy, COUNT_B, **settings)
    expected = 4 * 3 * 4
    assert record["metrics"]["policy_steps"] == record["metrics"]["value_steps"] == expected
    taken = {name: sum(one is loops[0].optimizers[name] for one in steps) for name in ("policy", "value")}
    assert taken == {"policy": expected, "value": expected}


def test_a30_the_first_step_of_adam_by_hand(policy: Path, tmp_path: Path, loops: list[ppo.Loop]) -> None:
    """At t = 1 the bias-corrected step is lr · g / (|g| + ε), and nothing decays."""
    before = load_causal_lm(str(policy)).state_dict()
    gradients: dict[str, torch.Tensor] = {}
    clip = torch.nn.utils.clip_grad_norm_

    def spy(parameters: Any, limit: float) -> Any:
        norm = clip(parameters, limit)
        if not gradients:  # the policy comes first; its clipped gradient is what Adam sees
            named = loops[0].roles.policy.model.named_parameters()
            gradients.update({name: p.grad.clone() for name, p in named})
        return norm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
        settings = {**SHORT, "total_rollouts": 1, "minibatches": 1, "ppo_epochs": 1, "adam_epsilon": 1e-3}
        train(tmp_path / "run", policy, COUNT_B, **settings)
    after = load_causal_lm(str(tmp_path / "run" / "out")).state_dict()
    for name, gradient in gradients.items():
        expected = before[name] - 3e-3 * gradient / (gradient.abs() + 1e-3)
        torch.testing.assert_close(after[name], expected, atol=1e-7, rtol=1e-5)
    assert sum(g.abs().sum().item() for g in gradients.values()) > 0


def test_a31_learning_rates_by_rollout_in_all_groups(policy: Path, tmp_path: Path, loops: list[ppo.Loop]) -> None:
    train(
        tmp_path / "run", policy, COUNT_B, **{**SHORT, "total_rollouts": 6}, value_learning_rate=1e-2, warmup_rollouts=2,
        warmup_from=0.1, value_lr_schedule="constant",
    )  # fmt: skip
    found = rows(tmp_path / "run")
    expected = [0.55, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert [row["policy_lr"] / 3e-3 for row in found] == pytest.approx(expected, rel=1e-4)
    assert [row["value_lr"] / 1e-2 for row in found] == pytest.approx([0.55, 1, 1, 1, 1, 1], rel=1e-4)
    assert [lr_factor(i, 6, "linear", 2, warmup_from=0.1) for i in range(6)] == pytest.approx(expected)
    for name, last in (("policy", 0.25 * 3e-3), ("value", 1e-2)):
        for group in loops[0].optimizers[name].param_groups:
            assert group["lr"] == pytest.approx(last)


def test_a27_each_networks_gradient_is_clipped_by_its_own_norm(policy: Path, tmp_path: Path) -> None:
    """A tiny limit stops both networks, nearly: with ε far above the clipped gradient Adam hardly moves."""
    train(tmp_path / "run", policy, COUNT_B, **SHORT, max_grad_norm=1e-9, adam_epsilon=1e-2)
    before, after = (load_causal_lm(str(path)).state_dict() for path in (policy, tmp_path / "run" / "out"))
    assert max((before[name] - after[name]).abs().max().item() for name in before) < 1e-6
    assert all(row["policy_grad_norm"] > 1e-4 for row in rows(tmp_path / "run")), "the norm before clipping is reported"


def test_value_warm_up_trains_the_value_alone(policy: Path, tmp_path: Path) -> None:
    for roles in ("separate", "shared_trunk"):
        run = tmp_path / roles
        record = train(run, policy, COUNT_B, **SHORT, value_warmup_rollouts=3, roles=roles)
        assert record["metrics"]["policy_steps"] == 1 * 2 * 2
        assert record["metrics"]["value_steps"] == 4 * 2 * 2
        found = rows(run)
        assert all(abs(row["kl"]) < 1e-6 for row in found), "the policy is the reference until the last update"
        assert "policy_loss" not in found[0]
        assert found[0]["value_loss"] > 0


def test_epochs_end_early_on_kl(policy: Path, tmp_path: Path) -> None:
    settings = {**SHORT, "ppo_epochs": 6, "learning_rate": 3e-2}
    record = train(tmp_path / "run", policy, COUNT_B, **settings, max_update_kl=1e-3)
    epochs = [row["epochs"] for row in rows(tmp_path / "run")]
    assert min(epochs) < 6
    assert record["metrics"]["policy_steps"] == sum(epochs) * 2
    train(tmp_path / "free", policy, COUNT_B, **settings, max_update_kl=1e9)
    assert [row["epochs"] for row in rows(tmp_path / "free")] == [6] * 4


def test_a33_ptx_adds_its_gradient_before_the_step(policy: Path, tmp_path: Path, loops: list[ppo.Loop]) -> None:
    """g = g_ppo + ptx_coef · g_lm, the latter a mean over its tokens; the history logs the loss."""
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": "abcd" * (1 + i % 5)}) + "\n" for i in range(40)))
    documents = [{"path": str(corpus)}]
    found: dict[float, dict[str, torch.Tensor]] = {}
    clip = torch.nn.utils.clip_grad_norm_
    for coef in (0.0, 1e-9, 27.8):
        with pytest.MonkeyPatch.context() as patch:

            def spy(parameters: Any, limit: float, coef: float = coef) -> Any:
                if coef not in found:
                    named = loops[-1].roles.policy.model.named_parameters()
                    found[coef] = {name: p.grad.clone() for name, p in named}
                return clip(parameters, limit)

            patch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
            ptx = {"ptx_coef": coef, "ptx_datasets": documents, "ptx_block_tokens": 16} if coef else {}
            train(tmp_path / f"run{coef}", policy, COUNT_B, **{**SHORT, "total_rollouts": 1}, **ptx)
    # The same blocks, their mean loss by plain transformers.
    loop, model = loops[-1], load_causal_lm(str(policy))
    total, tokens = torch.zeros(()), 0
    number = round(8.0 * 16)
    for i in endless(len(loop.blocks), 0, number, 1):
        ids = torch.tensor([loop.blocks[i]["input_ids"]])
        positions = torch.tensor([loop.blocks[i]["position_ids"]])
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, :-1]
        targets = torch.tensor(loop.blocks[i]["labels"])[1:]
        counted = targets != -100
        total = total + torch.nn.functional.cross_entropy(logits[counted], targets[counted], reduction="sum")
        tokens += int(counted.sum())
    (total / tokens).backward()
    assert rows(tmp_path / "run27.8")[0]["ptx_loss"] > 0
    for name, parameter in model.named_parameters():
        expected = found[0.0][name] + 27.8 * parameter.grad
        torch.testing.assert_close(found[27.8][name], expected, atol=2e-5, rtol=1e-3)
        torch.testing.assert_close(found[1e-9][name], found[0.0][name], atol=1e-6, rtol=1e-4)


def test_a34_the_moving_average_in_closed_form(policy: Path, tmp_path: Path) -> None:
    """Saved beside the policy: Σ (1-d) d^(n-i) θ_i + d^n θ_0 over the rollouts' weights; sampling uses the raw ones."""
    weights = [load_causal_lm(str(policy)).state_dict()]
    update = ppo.Loop.update

    def spy(self: ppo.Loop, *args: Any) -> Any:
        figures = update(self, *args)
        weights.append({k: v.clone() for k, v in self.roles.policy.model.state_dict().items()})
        return figures

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo.Loop, "update", spy)
        train(tmp_path / "run", policy, COUNT_B, **SHORT, ema_decay=0.8)
    average = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "out" / "ema").state_dict()
    final = load_causal_lm(str(tmp_path / "run" / "out")).state_dict()
    for name in average:
        expected = 0.8**4 * weights[0][name] + sum(0.2 * 0.8 ** (4 - i) * weights[i][name] for i in range(1, 5))
        torch.testing.assert_close(average[name], expected, atol=1e-6, rtol=1e-5)
        assert torch.equal(final[name], weights[-1][name])
    assert any(not torch.equal(average[name], final[name]) for name in final)


def test_a35_master_weights_are_fp32_under_bf16(policy: Path, tmp_path: Path, loops: list[ppo.Loop]) -> None:
    train(tmp_path / "run", policy, COUNT_B, **{**SHORT, "precision": "bf16"})
    for parameters in loops[0].roles.trained.values():
        assert {p.dtype for p in parameters} == {torch.float32}
    assert max(row["ratio_first_minibatch"] for row in rows(tmp_path / "run")) < 2e-2


def test_d14_reference_and_reward_never_move(policy: Path, tmp_path: Path, loops: list[ppo.Loop]) -> None:
    train(tmp_path / "run", policy, COUNT_B, **{**SHORT, "total_rollouts": 10})
    roles: Any = loops[0].roles
    original = load_causal_lm(str(policy)).state_dict()
    assert all(torch.equal(original[name], value) for name, value in roles.reference.model.state_dict().items())
    assert any(not torch.equal(original[name], value) for name, value in roles.policy.model.state_dict().items())
    train(tmp_path / "one", policy, COUNT_B, **{**SHORT, "total_rollouts": 1, "minibatches": 1, "ppo_epochs": 1})
    (first,) = rows(tmp_path / "one")
    assert (first["kl"], first["clip_fraction"], first["ratio"]) == (0.0, 0.0, pytest.approx(1.0))


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_batch(policy: Path, tmp_path: Path) -> None:
    def broken(self: ppo.Loop, *args: Any) -> Any:
        rollout, figures = collect(self, *args)
        if self.state.rollout == 1:
            rollout.advantages[0, 0] = float("inf")
        return rollout, figures

    collect = ppo.Loop.collect
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo.Loop, "collect", broken)
        with pytest.raises(RuntimeError, match="is not finite at rollout 1; the rollout was saved to"):
            train(tmp_path / "run", policy, COUNT_B, **SHORT)
    saved = torch.load(tmp_path / "run" / "out" / "nonfinite_batch.pt", weights_only=False)
    assert saved["advantages"][0, 0] == float("inf")
    assert len(saved["response_ids"]) == 32
    assert not (tmp_path / "run" / "out" / "lineage.json").exists()


# ---------------------------------------------------------------------------------------------- evaluation


def test_the_best_rollout_is_kept(policy: Path, tmp_path: Path) -> None:
    """A judge that likes the start best: the output is the SFT policy; without the key it is the last policy."""
    judge = tmp_path / "run" / "judges.py"
    judge.parent.mkdir()
    judge.write_text("def few_b(prompts, responses, rows):\n    return [-float(r.count('b')) for r in responses]\n")
    settings: dict[str, Any] = {**SHORT, "judges": ["judges:few_b"], "eval_rollouts": 1, "learning_rate": 2e-2}
    record = train(tmp_path / "run", policy, COUNT_B, **settings, best_metric="judges")
    out = tmp_path / "run" / "out"
    assert record["metrics"]["best_rollout"] == 0
    before, after = (load_causal_lm(str(path)).state_dict() for path in (policy, out))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert record["metrics"]["judges"] == pytest.approx(record["metrics"]["best_judges"])
    assert not (out / "best.pt").exists()
    assert len(list((out / "samples").glob("rollout-*.json"))) == 5
    assert weights_sha256(out) == record["weights_sha256"]


def test_runs_end_on_kl_and_without_progress(policy: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        **SHORT,
        "total_rollouts": 30,
        "eval_rollouts": 1,
        "learning_rate": 2e-2,
        "kl_coef": 0.01,
    }
    record = train(tmp_path / "kl", policy, COUNT_B, **settings, stop_kl=0.5)
    assert "exceeds stop_kl (0.5)" in record["metrics"]["ended"]
    assert 0 < record["metrics"]["rollouts"] < 30
    record = train(tmp_path / "stale", policy, "return 1.0", **settings, best_metric="score", patience=3)
    assert record["metrics"]["ended"] == "3 evaluations without a better score"
    assert (record["metrics"]["rollouts"], record["metrics"]["best_rollout"]) == (3, 0)


@pytest.mark.parametrize("roles", ["separate", "shared_trunk", "adapters"])
def test_plain_transformers_loads_what_every_role_leaves(policy: Path, tmp_path: Path, roles: str) -> None:
    """Policy and value answer from their folders as they did in the loop."""
    lora = {"lora": {"r": 4, "alpha": 8}} if roles == "adapters" else {}
    prompts, responses = [[3, 7, 4], [3, 8, 4]], [[6, 7, 1], [9, 9]]
    kept: list[Any] = []
    final = ppo.Loop.save_final

    def spy(self: ppo.Loop, folder: Path) -> None:
        kept.append(self.roles.measure(self.tensors(prompts, responses), True))
        final(self, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo.Loop, "save_final", spy)
        train(tmp_path / "run", policy, COUNT_B, **{**SHORT, "learning_rate": 2e-2}, roles=roles, **lora)
    measured = kept[0]
    out = tmp_path / "run" / "out"
    model, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    value: Any = AutoModelForSequenceClassification.from_pretrained(out / "value")
    with torch.no_grad():
        for row, n in ((0, 3), (1, 2)):
            ids = torch.tensor([prompts[row] + responses[row]])
            logits = model(input_ids=ids).logits[0, 2:-1]
            logits[:, [0, 2, 3, 4, 5]] = float("-inf")
            expected = torch.log_softmax(logits, -1)[range(n), ids[0, 3:]]
            torch.testing.assert_close(measured["logprobs"][row, :n], expected, atol=1e-4, rtol=1e-4)
            states = value.base_model(input_ids=ids).last_hidden_state[0, 2:-1]
            expected = value.score(states)[:, 0] - getattr(value.config, "score_offset", 0.0)
            torch.testing.assert_close(measured["values"][row, :n], expected, atol=1e-4, rtol=1e-4)
    assert measured["values"].abs().max() > 0
    assert (measured["logprobs"] - measured["ref_logprobs"]).abs().max() > 1e-3
