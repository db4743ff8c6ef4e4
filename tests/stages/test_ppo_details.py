"""Details of PPO's loop, on worlds of a few tokens, by the real stage."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.ppo_training import one_rollout, train_all, with_training
from helpers.worlds import make_policy, train
from pipeline import ppo
from pipeline.algorithms.kl import adapt_kl_coef, k2, k3
from pipeline.algorithms.schedules import lr_factor
from pipeline.data.batching import epoch_permutation_indices
from pipeline.data.encoding import ChatEncoder
from pipeline.errors import UserError
from pipeline.models.loading import load_causal_lm
from pipeline.models.tokenizers import load_tokenizer
from pipeline.rollout.engine import LocalEngine, SamplingSettings, per_row_uniforms
from pipeline.training.identity import weights_sha256
from pipeline.training.stage import Run

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


def engine_of(policy: Path, tokens: int, **changes: Any) -> tuple[LocalEngine, ChatEncoder]:
    """An engine that samples letters and EOS alone."""
    tokenizer = load_tokenizer(str(policy))
    encoder = ChatEncoder(tokenizer)
    settings = {
        "max_new_tokens": tokens,
        "stop_ids": [encoder.eos_id],
        "forbidden_ids": [0, 2, 3, 4, 5],
        "pad_id": tokenizer.pad_token_id,
    }
    return LocalEngine(SamplingSettings(**{**settings, **changes})), encoder


# ---------------------------------------------------------------------------------------------- sampling and scores


def test_pad_and_unused_ids_are_never_sampled(policy: Path, tmp_path: Path) -> None:
    """Their logits are made huge; still they come out 0 times, and the loop's log-probabilities give them none."""
    model, tokenizer = load_causal_lm(str(policy)), load_tokenizer(str(policy))
    names = ("<|pad|>", "<|unk|>", "<|user|>", "<|assistant|>", "<|system|>")
    forbidden = [tokenizer.convert_tokens_to_ids(name) for name in names]
    with torch.no_grad():
        model.get_output_embeddings().weight[forbidden] *= 1000.0
    model.save_pretrained(policy)
    engine, encoder = engine_of(policy, 3, forbidden_ids=forbidden)
    prompts = [encoder.prompt_ids([{"role": "user", "content": p}]) for p in "ab" * 50]
    sampled = engine.sample(model, prompts, per_row_uniforms(0, range(100), 3))
    assert not {token for response in sampled for token in response.ids} & set(forbidden)
    train(tmp_path / "run", policy, COUNT_B, **SHORT)
    assert max(row["first_minibatch_log_ratio"] for row in rows(tmp_path / "run")) < 1e-5


def test_responses_end_at_their_first_stop_token(policy: Path) -> None:
    model = load_causal_lm(str(policy))
    _, encoder = engine_of(policy, 5)
    stop = encoder.text_ids("b")[0]
    engine, _ = engine_of(policy, 5, stop_ids=[encoder.eos_id, stop])
    prompts = [encoder.prompt_ids([{"role": "user", "content": "a"}])] * 200
    responses = [s.ids for s in engine.sample(model, prompts, per_row_uniforms(0, range(200), 5))]
    for response in responses:
        stops = [token in (encoder.eos_id, stop) for token in response]
        assert not any(stops[:-1])
        assert stops[-1] or len(response) == 5
    assert {len(response) for response in responses} == {1, 2, 3, 4, 5}


def test_any_stop_token_is_a_stop(policy: Path, tmp_path: Path) -> None:
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


def test_samples_do_not_depend_on_the_batch(policy: Path) -> None:
    model = load_causal_lm(str(policy))
    _, encoder = engine_of(policy, 8)
    prompts = [encoder.prompt_ids([{"role": "user", "content": p * n}]) for n in (1, 5, 3, 2) for p in "abcd"]
    uniforms = per_row_uniforms(1, range(len(prompts)), 8)
    sampled = [
        [s.ids for s in engine_of(policy, 8, rows=size)[0].sample(model, prompts, uniforms)] for size in (1, 3, 16)
    ]
    assert sampled[0] == sampled[1] == sampled[2]


def test_the_engine_says_the_log_probabilities_of_training(policy: Path, tmp_path: Path) -> None:
    """Sampled with a cache, a token at a time, and measured in one pass: the same numbers, which the history watches."""
    train(tmp_path / "run", policy, COUNT_B, **SHORT)
    for row in rows(tmp_path / "run"):
        assert row["sampling_drift"] <= row["sampling_drift_worst_response"] < 1e-4


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


def test_k2_has_the_gradient_of_the_kl() -> None:
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


def test_adaptive_kl_by_hand() -> None:
    assert adapt_kl_coef(1.0, 12.0, 6.0, 512, 10_000) == pytest.approx(1.01024)  # twice the target: clipped to +20 %
    assert adapt_kl_coef(1.0, 6.6, 6.0, 512, 10_000) == pytest.approx(1 + 0.1 * 0.0512)
    assert adapt_kl_coef(0.5, 0.0, 6.0, 512, 10_000) == pytest.approx(0.5 * (1 - 0.2 * 0.0512))


def test_the_coefficient_follows_the_summed_kl_of_each_rollout(policy: Path, tmp_path: Path) -> None:
    record = train(
        tmp_path / "run", policy, COUNT_B, **SHORT, kl_control="adaptive", kl_target=0.5, kl_horizon=100.0, kl_coef=0.2
    )
    expected = 0.2
    for row in rows(tmp_path / "run"):
        assert row["kl_coef"] == pytest.approx(expected, abs=1e-7)
        expected = adapt_kl_coef(expected, row["kl"], 0.5, 32, 100.0)
    assert record["metrics"]["kl_coef"] == pytest.approx(expected, abs=1e-7)


# ---------------------------------------------------------------------------------------------- the update


def test_optimizer_steps_are_counted_over_dataset_epochs(policy: Path, tmp_path: Path) -> None:
    """16 prompts, 24 per rollout: every second rollout crosses a boundary; each still takes epochs × minibatches steps."""

    def use(training: ppo.Training, run: Run[Any]) -> dict[str, int]:
        counts = {"policy": 0, "value": 0}
        for name, optimizer in training.learner.optimizers.items():
            optimizer.register_step_post_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
        train_all(training, run)
        return counts

    settings = {**SHORT, "prompts_per_rollout": 24, "minibatches": 4, "ppo_epochs": 3, "micro_batch_tokens": 30}
    expected = 4 * 3 * 4
    assert with_training(tmp_path / "run", policy, COUNT_B, use, **settings) == {"policy": expected, "value": expected}
    metrics = json.loads((tmp_path / "run" / "out" / "metrics.json").read_text())
    assert metrics["policy_steps"] == metrics["value_steps"] == expected


def test_the_first_step_of_adam_by_hand(policy: Path, tmp_path: Path) -> None:
    """At t = 1 the bias-corrected step is lr · g / (|g| + ε), and nothing decays."""
    before = load_causal_lm(str(policy)).state_dict()

    def use(training: ppo.Training, run: Run[Any]) -> dict[str, torch.Tensor]:
        gradients: dict[str, torch.Tensor] = {}

        def remember(*_: Any) -> None:  # the clipped gradient is what Adam sees
            named = training.collector.networks.policy.model.named_parameters()
            gradients.update({name: p.grad.clone() for name, p in named})

        training.learner.optimizers["policy"].register_step_pre_hook(remember)
        train_all(training, run)
        return gradients

    settings = {**SHORT, "total_rollouts": 1, "minibatches": 1, "ppo_epochs": 1, "adam_epsilon": 1e-3}
    gradients = with_training(tmp_path / "run", policy, COUNT_B, use, **settings)
    after = load_causal_lm(str(tmp_path / "run" / "out")).state_dict()
    for name, gradient in gradients.items():
        expected = before[name] - 3e-3 * gradient / (gradient.abs() + 1e-3)
        torch.testing.assert_close(after[name], expected, atol=1e-7, rtol=1e-5)
    assert sum(g.abs().sum().item() for g in gradients.values()) > 0


def test_learning_rates_by_rollout(policy: Path, tmp_path: Path) -> None:
    train(
        tmp_path / "run", policy, COUNT_B, **{**SHORT, "total_rollouts": 6}, value_learning_rate=1e-2, warmup_rollouts=2,
        warmup_from=0.1, value_lr_schedule="constant",
    )  # fmt: skip
    history = rows(tmp_path / "run")
    expected = [0.55, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert [row["policy_lr"] / 3e-3 for row in history] == pytest.approx(expected, rel=1e-4)
    assert [row["value_lr"] / 1e-2 for row in history] == pytest.approx([0.55, 1, 1, 1, 1, 1], rel=1e-4)
    assert [lr_factor(i, 6, "linear", 2, warmup_from=0.1) for i in range(6)] == pytest.approx(expected)


def test_the_policys_learning_rate_waits_for_the_value_model(policy: Path, tmp_path: Path) -> None:
    """Each schedule counts its own network's rollouts: the value model's warm-up does not use up the policy's."""
    train(
        tmp_path / "run", policy, COUNT_B, **{**SHORT, "total_rollouts": 7}, value_warmup_rollouts=2, warmup_rollouts=5
    )
    history = rows(tmp_path / "run")
    assert [row["policy_lr"] / 3e-3 for row in history[2:]] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0], rel=1e-4)


def test_each_networks_gradient_is_clipped_by_its_own_norm(policy: Path, tmp_path: Path) -> None:
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


def test_ptx_adds_its_gradient_before_the_step(policy: Path, tmp_path: Path) -> None:
    """g = g_ppo + ptx_coef · g_lm, the latter a mean over its tokens; the metrics say the loss."""
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": "abcd" * (1 + i % 5)}) + "\n" for i in range(40)))

    def gradients(coef: float) -> tuple[dict[str, torch.Tensor], Any, dict[str, float]]:
        def use(training: ppo.Training, run: Run[Any]) -> tuple[dict[str, torch.Tensor], Any, dict[str, float]]:
            seen: dict[str, torch.Tensor] = {}

            def remember(*_: Any) -> None:
                named = training.collector.networks.policy.model.named_parameters()
                seen.update({name: p.grad.clone() for name, p in named})

            training.learner.optimizers["policy"].register_step_pre_hook(remember)
            rollout, _ = one_rollout(training, run)
            minibatch = rollout.select(next(iter(training.learner.minibatches(len(rollout), 0))))
            metrics = training.learner.step(minibatch, ("policy", "value"), kl_loss_coef=0.0)
            return seen, training.learner.pretraining, metrics

        documents = [{"path": str(corpus)}]
        ptx = {"ptx_coef": coef, "ptx_datasets": documents, "ptx_block_tokens": 16} if coef else {}
        settings = {**SHORT, "total_rollouts": 1, "max_grad_norm": 1e9}
        return with_training(tmp_path / f"run{coef}", policy, COUNT_B, use, **settings, **ptx)

    without, _, _ = gradients(0.0)
    tiny, _, _ = gradients(1e-9)
    full, pretraining, metrics = gradients(27.8)
    # The same blocks, their mean loss by plain transformers.
    model = load_causal_lm(str(policy))
    total, tokens = torch.zeros(()), 0
    for i in epoch_permutation_indices(len(pretraining.blocks), 0, round(8.0 * 16), 1):
        block = pretraining.blocks[i]
        ids, positions = torch.tensor([block["input_ids"]]), torch.tensor([block["position_ids"]])
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, :-1]
        targets = torch.tensor(block["labels"])[1:]
        counted = targets != -100
        total = total + torch.nn.functional.cross_entropy(logits[counted], targets[counted], reduction="sum")
        tokens += int(counted.sum())
    (total / tokens).backward()
    assert metrics["ptx_loss"] == pytest.approx((total / tokens).item(), rel=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(full[name], without[name] + 27.8 * parameter.grad, atol=2e-5, rtol=1e-3)
        torch.testing.assert_close(tiny[name], without[name], atol=1e-6, rtol=1e-4)


def test_ptx_reads_only_the_blocks_that_a_step_trains_on(policy: Path, tmp_path: Path) -> None:
    """A step costs as much as its own blocks, however many there are."""

    class Counting(list[Any]):
        reads = 0

        def __iter__(self) -> Any:
            self.reads += len(self)
            return super().__iter__()

    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": "abcd" * 4}) + "\n" for _ in range(40)))

    def use(training: ppo.Training, run: Run[Any]) -> int:
        assert training.learner.pretraining is not None
        blocks = Counting(training.learner.pretraining.blocks)
        pretraining = dataclasses.replace(training.learner.pretraining, blocks=blocks)
        for step in range(3):
            pretraining.accumulate_gradients(2, step)
        return blocks.reads // len(blocks)

    ptx = {"ptx_coef": 1.0, "ptx_datasets": [{"path": str(corpus)}], "ptx_block_tokens": 16}
    assert with_training(tmp_path / "run", policy, COUNT_B, use, **SHORT, **ptx) == 0, "passes over all blocks"


def test_the_moving_average_in_closed_form(policy: Path, tmp_path: Path) -> None:
    """Saved beside the policy: Σ (1-d) d^(n-i) θ_i + d^n θ_0 over the rollouts' weights; sampling uses the raw ones."""

    def use(training: ppo.Training, run: Run[Any]) -> list[dict[str, torch.Tensor]]:
        def weights() -> dict[str, torch.Tensor]:
            return {k: v.clone() for k, v in training.collector.networks.policy.model.state_dict().items()}

        seen = [weights()]
        for _ in range(4):
            rollout, metrics = one_rollout(training, run)
            training.learner.update(rollout, metrics)
            training.state.rollout += 1
            seen.append(weights())
        ppo.finish(training, run)
        return seen

    weights = with_training(tmp_path / "run", policy, COUNT_B, use, **SHORT, ema_decay=0.8)
    average = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "out" / "ema").state_dict()
    final = load_causal_lm(str(tmp_path / "run" / "out")).state_dict()
    for name in average:
        expected = 0.8**4 * weights[0][name] + sum(0.2 * 0.8 ** (4 - i) * weights[i][name] for i in range(1, 5))
        torch.testing.assert_close(average[name], expected, atol=1e-6, rtol=1e-5)
        assert torch.equal(final[name], weights[-1][name])
    assert any(not torch.equal(average[name], final[name]) for name in final)


def test_master_weights_are_fp32_under_bf16(policy: Path, tmp_path: Path) -> None:
    def use(training: ppo.Training, run: Run[Any]) -> set[torch.dtype]:
        train_all(training, run)
        return {p.dtype for parameters in training.collector.networks.trained.values() for p in parameters}

    dtypes = with_training(tmp_path / "run", policy, COUNT_B, use, **{**SHORT, "precision": "bf16"})
    assert dtypes == {torch.float32}
    assert max(row["first_minibatch_log_ratio"] for row in rows(tmp_path / "run")) < 2e-2


def test_reference_and_reward_never_move(policy: Path, tmp_path: Path) -> None:
    def use(training: ppo.Training, run: Run[Any]) -> Any:
        train_all(training, run)
        return training.collector.networks

    networks = with_training(tmp_path / "run", policy, COUNT_B, use, **{**SHORT, "total_rollouts": 10})
    original = load_causal_lm(str(policy)).state_dict()
    assert all(torch.equal(original[name], value) for name, value in networks.reference.model.state_dict().items())
    assert any(not torch.equal(original[name], value) for name, value in networks.policy.model.state_dict().items())
    train(tmp_path / "one", policy, COUNT_B, **{**SHORT, "total_rollouts": 1, "minibatches": 1, "ppo_epochs": 1})
    (first,) = rows(tmp_path / "one")
    assert (first["kl"], first["clip_fraction"], first["ratio"]) == (0.0, 0.0, pytest.approx(1.0))


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_batch(policy: Path, tmp_path: Path) -> None:
    def use(training: ppo.Training, run: Run[Any]) -> None:
        rollout, metrics = one_rollout(training, run)
        rollout.advantages[0] = math.inf
        training.learner.update(rollout, metrics)

    with pytest.raises(RuntimeError, match="is not finite at rollout 0; the minibatch was saved to"):
        with_training(tmp_path / "run", policy, COUNT_B, use, **SHORT, minibatches=1)
    saved = torch.load(tmp_path / "run" / "out" / "nonfinite_batch.pt", weights_only=False)
    assert torch.isinf(saved["advantages"]).sum() == 1
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
def test_plain_transformers_loads_what_every_arrangement_leaves(policy: Path, tmp_path: Path, roles: str) -> None:
    """Policy and value answer from their folders as they did in the loop."""
    lora = {"lora": {"r": 4, "alpha": 8}} if roles == "adapters" else {}
    prompts, responses = [[3, 7, 4], [3, 8, 4]], [[6, 7, 1], [9, 9]]

    def use(training: ppo.Training, run: Run[Any]) -> Any:
        ppo.train(training, run)
        batch = training.collector.batch(prompts, responses)
        measured = training.collector.networks.compute_logprobs_and_values(batch, with_values=True)
        ppo.finish(training, run)
        return measured

    measured = with_training(
        tmp_path / "run", policy, COUNT_B, use, **{**SHORT, "learning_rate": 2e-2}, roles=roles, **lora
    )
    out = tmp_path / "run" / "out"
    model, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    value: Any = AutoModelForSequenceClassification.from_pretrained(out / "value")
    logprobs, values = measured.logprobs.split([3, 2]), measured.values.split([3, 2])
    with torch.no_grad():
        for row, n in ((0, 3), (1, 2)):
            ids = torch.tensor([prompts[row] + responses[row]])
            logits = model(input_ids=ids).logits[0, 2:-1]
            logits[:, [0, 2, 3, 4, 5]] = float("-inf")
            expected = torch.log_softmax(logits, -1)[range(n), ids[0, 3:]]
            torch.testing.assert_close(logprobs[row], expected, atol=1e-4, rtol=1e-4)
            states = value.base_model(input_ids=ids).last_hidden_state[0, 2:-1]
            expected = value.score(states)[:, 0] - getattr(value.config, "score_offset", 0.0)
            torch.testing.assert_close(values[row], expected, atol=1e-4, rtol=1e-4)
    assert measured.values.abs().max() > 0
    assert (measured.logprobs - measured.ref_logprobs).abs().max() > 1e-3
    assert [path.name for path in (out / "value").iterdir() if path.is_dir()] in ([], ["adapter"])
    assert not any(path.is_dir() for path in out.glob("**/adapter/*")), "an adapter's files lie in its own folder"


def test_a_run_killed_in_its_final_evaluation_can_still_finish(policy: Path, tmp_path: Path) -> None:
    """The best networks stay on disk until the run has finished, and `ended` is part of the state."""
    settings = {**SHORT, "eval_rollouts": 1, "best_metric": "score", "save_steps": 1}

    class Killed(Exception):
        pass

    def use(training: ppo.Training, run: Run[Any]) -> None:
        ppo.train(training, run)
        weights = training.learner.weights()
        training.learner.load_weights(ppo.load_best(tmp_path / "run" / "out", weights))
        raise Killed

    with pytest.raises(Killed):
        with_training(tmp_path / "run", policy, COUNT_B, use, **settings)
    assert (tmp_path / "run" / "out" / "best.pt").exists()
    record = train(tmp_path / "run", policy, COUNT_B, **settings)
    whole = train(tmp_path / "whole", policy, COUNT_B, **settings)
    assert record["weights_sha256"] == whole["weights_sha256"]
    assert record["metrics"] == whole["metrics"]
    assert not (tmp_path / "run" / "out" / "best.pt").exists()


def test_a_reward_that_draws_random_numbers_resumes_exactly_with_evaluations(policy: Path, tmp_path: Path) -> None:
    """A resumed run asks about the reference's answers again: it gets the same scores, and training draws what it would have."""
    settings: dict[str, Any] = {**SHORT, "total_rollouts": 3, "eval_rollouts": 1, "save_steps": 2}
    body = "import random, numpy, torch\n    return random.random() + numpy.random.random() + float(torch.rand(()))"

    def use(training: ppo.Training, run: Run[Any]) -> None:
        ppo.train(training, run)

    with_training(tmp_path / "resumed", policy, body, use, **settings)
    resumed = train(tmp_path / "resumed", policy, body, **settings)
    whole = train(tmp_path / "whole", policy, body, **settings)
    assert resumed["resumed_from"] == [2]
    assert resumed["metrics"] == whole["metrics"]
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    history = [json.loads(x) for x in (tmp_path / "whole" / "out" / "history.jsonl").read_text().splitlines()]
    assert len({row["eval_reference_score"] for row in history if "eval_reference_score" in row}) == 1


def test_the_saved_generation_config_samples_as_trained(policy: Path, tmp_path: Path) -> None:
    """Nothing of the parent's own rules stays: generate() draws from the distribution that PPO trained."""
    settings = {"do_sample": True, "temperature": 0.3, "top_k": 1, "top_p": 0.1, "repetition_penalty": 3.0}
    (policy / "generation_config.json").write_text(json.dumps({**settings, "min_new_tokens": 2, "eos_token_id": 1}))
    train(tmp_path / "run", policy, COUNT_B, **{**SHORT, "total_rollouts": 1, "temperature": 1.5})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "out")
    ids = torch.tensor([[3, 7, 4]])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), output_scores=True, return_dict_in_generate=True, max_new_tokens=1
    )
    with torch.no_grad():
        logits = model(ids).logits[:, -1] / 1.5
    logits[:, [0, 2, 3, 4, 5]] = float("-inf")
    torch.testing.assert_close(out.scores[0], logits)
    assert model.generation_config.max_new_tokens == 3


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(b"junk")], ids=["lost", "damaged"])
def test_the_best_networks_are_restored_from_the_checkpoint(
    damage: Callable[[Path], Any], policy: Path, tmp_path: Path
) -> None:
    """A file beside the checkpoint that is lost or damaged between two starts costs nothing."""
    judge = tmp_path / "run" / "judges.py"
    judge.parent.mkdir()
    judge.write_text("def few_b(prompts, responses, rows):\n    return [-float(r.count('b')) for r in responses]\n")
    settings: dict[str, Any] = {**SHORT, "judges": ["judges:few_b"], "eval_rollouts": 1, "learning_rate": 2e-2}
    settings |= {"best_metric": "judges", "save_steps": 1}

    def use(training: ppo.Training, run: Run[Any]) -> None:
        ppo.train(training, run)

    out = tmp_path / "run" / "out"
    with_training(tmp_path / "run", policy, COUNT_B, use, **settings)
    damage(out / "best.pt")
    record = train(tmp_path / "run", policy, COUNT_B, **settings)
    assert record["resumed_from"], "it went on from a checkpoint"
    assert record["metrics"]["best_rollout"] == 0
    before, after = (load_causal_lm(str(path)).state_dict() for path in (policy, out))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_lost_best_networks_are_told_in_one_line(tmp_path: Path) -> None:
    """They are lost while the run goes on: the same command makes it again from the last checkpoint."""
    for content in (None, b"junk", b""):
        if content is not None:
            (tmp_path / "best.pt").write_bytes(content)
        with pytest.raises(UserError, match=r"best\.pt: is missing or damaged; .* start the same command again"):
            ppo.load_best(tmp_path, {})


def test_the_average_of_the_best_rollout_is_kept(policy: Path, tmp_path: Path) -> None:
    """With `best_metric` and `ema_decay` the average is that of the best rollout, not the last one's."""
    judge = tmp_path / "run" / "judges.py"
    judge.parent.mkdir()
    judge.write_text("def few_b(prompts, responses, rows):\n    return [-float(r.count('b')) for r in responses]\n")
    settings: dict[str, Any] = {**SHORT, "judges": ["judges:few_b"], "eval_rollouts": 1, "learning_rate": 2e-2}
    record = train(tmp_path / "run", policy, COUNT_B, **settings, best_metric="judges", ema_decay=0.5)
    assert record["metrics"]["best_rollout"] == 0
    before = load_causal_lm(str(policy)).state_dict()
    average = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "out" / "ema").state_dict()
    assert all(torch.equal(before[name], average[name]) for name in before)


def test_a_judge_that_says_nan_is_never_the_best(policy: Path, tmp_path: Path) -> None:
    from types import SimpleNamespace

    from pipeline.rollout.evaluation import record_if_best
    from pipeline.training.ppo_state import PPOState

    state, args = PPOState(0.1), SimpleNamespace(best_metric="gold")
    assert not record_if_best({"eval_gold": math.nan}, args, state)
    assert record_if_best({"eval_gold": -1.0}, args, state)
    assert not record_if_best({"eval_gold": math.nan}, args, state)
    assert (state.best, state.evaluations_since_best) == (-1.0, 1)


def test_a_missing_eos_score_above_finished_answers_is_warned_of(policy: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", policy, "return -5.0", **SHORT, missing_eos="replace", missing_eos_score=-1.0)
    log = (tmp_path / "run" / "out" / "log.txt").read_text()
    assert "100% of the finished responses score below missing_eos_score (-1), so not ending pays" in log
    train(tmp_path / "fine", policy, "return 5.0", **SHORT, missing_eos="replace", missing_eos_score=-1.0)
    assert "so not ending pays" not in (tmp_path / "fine" / "out" / "log.txt").read_text()
