"""Put known PPO bugs back, one at a time, and see a test fail for each: do the tests hold what they promise?

    python scripts/mutation_check.py [--only NAME] [--list]

Each bug is one from the papers' details (A2-A35 of the test names) or from implementations that went wrong. It is applied
to a copy of the project; the named test must pass without it and fail with it, by an assertion of its own and not by an
import or shape error. The last line is `caught N of N`.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("pipeline", "tests", "recipes", "data_cards", "scripts", "pyproject.toml")
# An assertion of the test's own, a refusal that did not come, a comparison of torch.testing.
CAUGHT = re.compile(
    r"^E +(AssertionError|assert |Failed: DID NOT RAISE|Mismatched elements|Scalars are not)", re.MULTILINE
)


@dataclass(frozen=True)
class Bug:
    """A bug: in `file`, `old` becomes `new`; `test` must catch it."""

    name: str
    file: str
    old: str
    new: str
    test: str


PPO = "pipeline/ppo.py"
MATHS = "pipeline/algorithms/ppo.py"
ROLES = "pipeline/models/networks.py"
PACKED = "pipeline/models/packed.py"
ROLLOUT = "pipeline/rollout/rollout.py"
DETAILS = "tests/stages/test_ppo_details.py::"
ORACLE = "tests/stages/test_ppo_oracle.py::"
OPTIMUM = "tests/stages/test_ppo_optimum.py::"
ARITHMETIC = "tests/algorithms/test_ppo.py::"

BUGS = [
    Bug("A2 pad and unused ids may be sampled", "pipeline/algorithms/logprobs.py", "if forbidden is not None and forbidden.numel():", "if False:",
        DETAILS + "test_a2_pad_and_unused_ids_are_never_sampled"),
    Bug("A3 positions count the padding", ROLLOUT, "positions = (mask.cumsum(1) - 1).clamp(min=0)",
        "positions = torch.arange(mask.shape[1], device=device).repeat(len(mask), 1)",
        "tests/models/test_models.py::test_sampling_with_cache_and_padding_equals_slow_sampling"),
    Bug("A14 the scorer forgets the offset", "pipeline/models/reward_model.py", ".float().cpu() - score_offset(model)", ".float().cpu()",
        "tests/models/test_models.py::test_score_and_value_subtract_the_same_offset"),
    Bug("A14 the value network forgets the offset", "pipeline/models/reward_model.py", "[..., 0].float() - self.offset", "[..., 0].float()",
        "tests/models/test_models.py::test_score_and_value_subtract_the_same_offset"),
    Bug("A16 dropout stays on", "pipeline/models/loading.py", "setattr(module, name, 0.0)", "pass",
        "tests/models/test_models.py::test_dropout_is_off_everywhere"),
    Bug("A18 log-probabilities without the temperature", ROLES, 'batch["tokens"][mask], self.temperature, self.forbidden', 'batch["tokens"][mask], 1.0, self.forbidden',
        OPTIMUM + "test_a18_temperature_is_the_same_everywhere"),
    Bug("A19 only EOS ends a response", ROLLOUT, "going = ~torch.isin(tokens, stops)", "going = ~torch.isin(tokens, stops[:1])",
        DETAILS + "test_a19_responses_end_at_their_first_stop_token"),
    Bug("A20 the missing-EOS score goes to those that stopped", MATHS, "torch.where(stopped, scores, fallback)", "torch.where(stopped, fallback, scores)",
        ARITHMETIC + "test_missing_eos"),
    Bug("A20 the penalty asks for EOS, not for the stop token", PPO, 'answer["response"][-1] in self.stop_ids', 'answer["response"][-1] == self.encoder.eos_id',
        DETAILS + "test_a20_any_stop_token_is_a_stop"),
    Bug("A21 k3 inside the reward", MATHS, "penalty = -kl_coef * k1(logprobs, ref_logprobs)",
        "penalty = -kl_coef * ((ref_logprobs - logprobs).exp() - 1 - (ref_logprobs - logprobs))", OPTIMUM + "test_d1_kl_bandit[0.5-0]"),
    Bug("A21 the penalty's sign", MATHS, "penalty = -kl_coef * k1", "penalty = kl_coef * k1", OPTIMUM + "test_d1_kl_bandit[0.5-0]"),
    Bug("A22 adaptive KL from the mean over tokens", PPO, 'loop.update(rollout, figures["kl"])', 'loop.update(rollout, figures["kl"] / figures["response_tokens"])',
        DETAILS + "test_a22_the_coefficient_follows_the_summed_kl_of_each_rollout"),
    Bug("A22 adaptive KL without its clip", "pipeline/algorithms/kl.py", "min(max(kl / target - 1.0, -0.2), 0.2)", "kl / target - 1.0",
        DETAILS + "test_a22_adaptive_kl_by_hand"),
    Bug("A22 the coefficient never moves", PPO, "state.kl_coef = adapt_kl_coef(", "_ = adapt_kl_coef(",
        DETAILS + "test_a22_the_coefficient_follows_the_summed_kl_of_each_rollout"),
    Bug("A23 the score at every token", MATHS, "return rewards.scatter_add(1, position[:, None], scores[:, None].to(rewards.dtype))",
        "return torch.where(response_mask, rewards + scores[:, None], rewards)", ARITHMETIC + "test_rewards_sum_to_score_minus_penalty"),
    Bug("A23 no value after the response", MATHS, "return response_mask | after.scatter(1, response_mask.sum(1, keepdim=True), True)", "return response_mask",
        DETAILS + "test_a23_the_score_stands_once_also_at_full_length"),
    Bug("A24 padding enters the update's figures", PPO, "masked_sum(part.detach().double(), counted)", "part.detach().double().sum()",
        ORACLE + "test_a24_garbage_after_the_end_changes_nothing"),
    Bug("A24 padding enters the reported KL", ROLLOUT, "return torch.where(mask, tokens, 0.0).sum(1).mean().item()", "return tokens.sum(1).mean().item()",
        ORACLE + "test_a24_garbage_after_the_end_changes_nothing"),
    Bug("A25 bootstrapped from padding", MATHS, "next_values = torch.zeros_like(values[:, 0])", "next_values = torch.ones_like(values[:, 0])",
        ARITHMETIC + "test_gae_of_three_tokens_by_hand"),
    Bug("A25 lambda of the wrong power", MATHS, "delta + gamma * gae_lambda * running", "delta + gamma * running",
        ARITHMETIC + "test_gae_equals_its_definition"),
    Bug("A25 GAE carries over the end of a row", MATHS, "running = torch.where(response_mask[:, t], delta + gamma * gae_lambda * running, 0.0)",
        "running = delta + gamma * gae_lambda * running + (~response_mask[:, t]).to(delta.dtype)", ARITHMETIC + "test_gae_equals_its_definition"),
    Bug("A26 whitening counts the padding", "pipeline/algorithms/masking.py", "variance = masked_mean((values - mean) ** 2, mask)",
        "variance = masked_sum((values - mean) ** 2, mask) / mask.numel()", "tests/algorithms/test_small_functions.py::test_whitening"),
    Bug("A26 reward whitening shifts the mean", ROLLOUT, "whiten(rewards, value_mask, shift_mean=False)", "whiten(rewards, value_mask)",
        ORACLE + "test_d9_the_update_is_the_oracles[options8-0]"),
    Bug("A27 the pessimistic branch is the optimistic one", MATHS, "return torch.maximum(unclipped, limited), limited > unclipped",
        "return torch.minimum(unclipped, limited), limited > unclipped", ARITHMETIC + "test_clipped_policy_loss"),
    Bug("A27 the sign of the policy loss", MATHS, "unclipped = -advantages * ratio", "unclipped = advantages * ratio",
        ARITHMETIC + "test_on_policy_gradient_is_reinforce"),
    Bug("A27 the value loss takes the smaller branch", MATHS, "0.5 * torch.maximum(plain, limited)", "0.5 * torch.minimum(plain, limited)",
        ARITHMETIC + "test_clipped_value_loss_by_hand"),
    Bug("A27 vf_coef is not applied", PPO, "loss = loss + args.vf_coef * masked_sum", "loss = loss + masked_sum",
        ORACLE + "test_d9_the_update_is_the_oracles[options0-0]"),
    Bug("A27 max_grad_norm is ignored", PPO, "self.roles.trained[name], self.args.max_grad_norm", 'self.roles.trained[name], float("inf")',
        DETAILS + "test_a27_each_networks_gradient_is_clipped_by_its_own_norm"),
    Bug("A28 a mean of micro-batch means", PPO, "masked_sum(losses, mask) / tokens", "masked_sum(losses, mask) / mask.sum()",
        ORACLE + "test_d11_uneven_micro_batches_give_the_same_gradient"),
    Bug("A29 minibatches have no effect", PPO, "size = rows // self.args.minibatches", "size = rows",
        DETAILS + "test_a29_optimizer_steps_are_counted_over_dataset_epochs"),
    Bug("A29 a step for every micro-batch", PPO, "        loss.backward()\n",
        "        loss.backward()\n        self.optimizers['policy'].step()\n", DETAILS + "test_a30_the_first_step_of_adam_by_hand"),
    Bug("A30 Adam's own epsilon", PPO, '"eps": args.adam_epsilon', '"eps": 1e-8', DETAILS + "test_a30_the_first_step_of_adam_by_hand"),
    Bug("A30 AdamW's own weight decay", PPO, '"weight_decay": 0.0', '"weight_decay": 0.01', DETAILS + "test_a30_the_first_step_of_adam_by_hand"),
    Bug("A31 the rate is computed, not set", PPO, 'group["lr"] = self.peaks[name] * factor', "pass",
        DETAILS + "test_a31_learning_rates_by_rollout_in_all_groups"),
    Bug("A33 ptx without its factor", PPO, "(args.ptx_coef * nll / tokens).backward()", "(nll / tokens).backward()",
        DETAILS + "test_a33_ptx_adds_its_gradient_before_the_step"),
    Bug("A34 the average decays the wrong way", PPO, "1 - (args.ema_decay or 0.0)", "(args.ema_decay or 0.0)",
        DETAILS + "test_a34_the_moving_average_in_closed_form"),
    Bug("D14 the reference is the policy of the moment", ROLES, '"ref_logprobs": self.reference(batch, False)[0]}', '"ref_logprobs": self.policy(batch, False)[0]}',
        OPTIMUM + "test_d1_kl_bandit[0.5-0]"),
    Bug("the k2 loss in other units than the advantages", PPO, "((rollout.advantage_std + 1e-8) if args.whiten_advantages else 1.0)", "1.0",
        ORACLE + "test_d9_the_update_is_the_oracles[options4-0]"),
    Bug("advantages whitened with the padding", ROLLOUT, "whiten(advantages, mask) if", "whiten(advantages, torch.ones_like(mask)) if",
        ORACLE + "test_d9_the_update_is_the_oracles[options0-0]"),
    Bug("no running scale of scores", PPO, "self.state.moments.update(scores)", "pass", DETAILS + "test_scores_may_be_scaled_and_clipped"),
    Bug("the value warm-up trains the policy", PPO, "train_policy = state.rollout >= args.value_warmup_rollouts", "train_policy = True",
        DETAILS + "test_value_warm_up_trains_the_value_alone"),
    Bug("adapters: the reference keeps the policy's adapter", ROLES, 'with self.active(None):\n                found["ref_logprobs"]', 'with self.active("default"):\n                found["ref_logprobs"]',
        "tests/models/test_networks.py::test_the_reference_of_adapters_is_the_base"),
    Bug("adapters: values are read through the policy's adapter", ROLES, 'with self.active("value"):\n            with self.autocast():', 'with self.active("default"):\n            with self.autocast():',
        "tests/models/test_networks.py::test_adapters_train_nothing_but_themselves"),
    Bug("adapters: the switch freezes the other adapter for good", ROLES, 'self.peft.set_requires_grad(["default", "value"], requires_grad=True)', "pass",
        "tests/models/test_networks.py::test_adapters_train_nothing_but_themselves"),
    Bug("shared trunk: the value's gradient stops at its head", ROLES, 'found: Batch = {"values": self._values(hidden, batch["positions"])}',
        'found: Batch = {"values": self._values(hidden.detach(), batch["positions"])}',
        "tests/models/test_networks.py::test_gradients_are_those_of_the_losses_by_finite_differences[shared_trunk]"),
    Bug("packed rows: a row's attention begins in the row before it", PACKED, "slots.append(slot)", "slots.append((slot - 1).clamp(min=0))",
        "tests/models/test_packed.py::test_packed_rows_answer_and_learn_as_rows_alone[LlamaConfig]"),
    Bug("packed rows: gradients do not come back from attention's rows", PACKED, "return _end_to_end(gradients, ctx.saved_tensors[0], ctx.tokens), None, *(None for _ in gradients)",
        "return gradients[0].new_zeros(ctx.tokens, *gradients[0].shape[2:]), None, *(None for _ in gradients)",
        "tests/models/test_packed.py::test_packed_rows_answer_and_learn_as_rows_alone[LlamaConfig]"),
    Bug("packed rows: the second group's answers are the first's", PACKED, "= before + real", "= real",
        "tests/models/test_packed.py::test_packed_rows_answer_and_learn_as_rows_alone[LlamaConfig]"),
    Bug("packed rows: sliding windows are forgotten", PACKED, "seen &= ~torch.ones_like(seen).tril(-window)", "pass",
        "tests/models/test_packed.py::test_packed_rows_answer_and_learn_as_rows_alone[MistralConfig]"),
    Bug("the best rollout is the worst", PPO, "found > state.best", "found < state.best", DETAILS + "test_the_best_rollout_is_kept"),
]  # fmt: skip


def copy_project(target: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / name)


def run_tests(project: Path, tests: Sequence[str]) -> tuple[int, str]:
    environment = {**os.environ, "PYTHONPATH": str(project), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-o", "addopts=", *tests],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def try_bug(bug: Bug, project: Path) -> str | None:
    """None if the bug is caught; else why it is not."""
    path = project / bug.file
    text = path.read_text(encoding="utf-8")
    if text.count(bug.old) != 1:
        return f"its place is found {text.count(bug.old)} times in {bug.file}; correct the script"
    path.write_text(text.replace(bug.old, bug.new), encoding="utf-8")
    try:
        code, output = run_tests(project, [bug.test])
    finally:
        path.write_text(text, encoding="utf-8")
    if code == 0:
        return f"{bug.test} passes with it"
    if code != 1 or not CAUGHT.search(output):
        return f"{bug.test} ends by something else than an assertion:\n{output[-1500:]}"
    return None


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", help="bugs whose name holds this")
    parser.add_argument("--list", action="store_true", help="name the bugs and end")
    args = parser.parse_args(argv)
    bugs = [bug for bug in BUGS if not args.only or args.only.lower() in bug.name.lower()]
    if args.list:
        print("\n".join(f"{bug.name}: {bug.test}" for bug in bugs))
        return
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        copy_project(project)
        code, output = run_tests(project, sorted({bug.test for bug in bugs}))
        if code != 0:
            raise SystemExit(f"the tests fail without any bug:\n{output[-4000:]}")
        caught = 0
        for bug in bugs:
            reason = try_bug(bug, project)
            caught += reason is None
            print(
                f"{'caught' if reason is None else 'MISSED'}: {bug.name}" + (f": {reason}" if reason else ""),
                flush=True,
            )
    print(f"caught {caught} of {len(bugs)}")
    raise SystemExit(0 if caught == len(bugs) else 1)


if __name__ == "__main__":
    main()
