"""Bugs of PPO: its equations, sampling, scores, networks and packed sequences."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

from mutations import mutation
from pipeline.algorithms.kl import k3
from pipeline.models.reward_model import score_offset
from pipeline.rollout.rollout import whiten_advantages
from pipeline.training.ppo_state import BEST

import torch
import torch.nn.functional as F


def with_args(learner: Any, **changes: Any) -> Any:
    """The same learner, whose recipe says something else."""
    twin = copy.copy(learner)
    twin.args = dataclasses.replace(learner.args, **changes)
    return twin


PPO, EQUATIONS, LOGPROBS = "pipeline.ppo:", "pipeline.algorithms.ppo:", "pipeline.algorithms.logprobs:"
NETWORKS, ADAPTERS = "pipeline.models.networks:", "pipeline.models.adapter_networks:AdapterNetworks."
PACKED, REWARD_MODEL = "pipeline.models.packed:", "pipeline.models.reward_model:"
DETAILS, ORACLE = "tests/stages/test_ppo_details.py::", "tests/stages/test_ppo_oracle.py::"
UPDATE = ORACLE + "test_the_update_is_the_oracles"
BY_HAND = "tests/algorithms/test_ppo.py::"
MODELS, ARRANGEMENTS = "tests/models/test_models.py::", "tests/models/test_networks.py::"
ENGINE = "tests/rollout/test_engine.py::test_hybrid_and_recurrent_models_sample_as_alone"
PACKING = "tests/models/test_packed.py::test_packed_sequences_answer_and_learn_as_sequences_alone"
TOKENS = "tests/models/test_tokenizers.py::"

# fmt: off
# ---------------------------------------------------------------------------------------------- sampling

@mutation("pad and unused ids may be sampled", LOGPROBS + "tempered_logits", DETAILS + "test_pad_and_unused_ids_are_never_sampled")
def _(original: Any, logits: Any, temperature: float, forbidden: Any) -> Any:
    return original(logits, temperature, None)

@mutation("positions count the padding", "pipeline.rollout.engine:CachedDecoder.__init__", ENGINE + "[GPT2Config]")
def _(original: Any, self: Any, model: Any, prompt_ids: Any, pad_id: int) -> None:
    original(self, model, prompt_ids, pad_id)
    self.positions = torch.arange(self.mask.shape[1]).repeat(len(self.mask), 1)

@mutation("other rows than the finished ones leave the batch", "pipeline.rollout.engine:CachedDecoder.append", ENGINE + "[MistralConfig]")
def _(original: Any, self: Any, tokens: Any, remaining: Any) -> None:
    original(self, tokens, torch.arange(len(remaining)))

@mutation("a sample's random numbers depend on its place in the batch", "pipeline.rollout.engine:per_row_uniforms", "tests/rollout/test_engine.py::test_uniforms_are_a_function_of_seed_and_row")
def _(original: Any, seed: int, rows: Any, length: int) -> Any:
    return original(seed, range(len(rows)), length)

@mutation("log-probabilities without the temperature", "pipeline.models.language_model:LanguageModel._chunked", "tests/models/test_language_model.py::test_response_logprobs_and_their_gradients")
def _(original: Any, self: Any, hidden: Any, tokens: Any, temperature: float, forbidden: Any, **rest: Any) -> Any:
    return original(self, hidden, tokens, 1.0, forbidden, **rest)

@mutation("only EOS ends a response", "pipeline.rollout.engine:generate", DETAILS + "test_responses_end_at_their_first_stop_token")
def _(original: Any, model: Any, prompt_ids: Any, uniforms: Any, settings: Any) -> Any:
    return original(model, prompt_ids, uniforms, dataclasses.replace(settings, stop_ids=settings.stop_ids[:1]))

@mutation("the template's end of turn is no stop token", "pipeline.models.tokenizers:stop_token_ids", TOKENS + "test_a_response_ends_at_eos_and_at_the_templates_own_end_of_turn")
def _(original: Any, encoder: Any, *rest: Any) -> Any:
    return [token for token in original(encoder, *rest) if token == encoder.eos_id or token != encoder.end_id]

@mutation("the parent's own stop tokens are forgotten", "pipeline.models.tokenizers:stop_token_ids", TOKENS + "test_a_response_ends_at_every_token_of_the_parents_generation_config")
def _(original: Any, encoder: Any, generation_config: Any = None, stop_tokens: Any = ()) -> Any:
    return original(encoder, None, stop_tokens)

@mutation("dropout stays on", "pipeline.models.loading:disable_noise", MODELS + "test_dropout_is_off_everywhere")
def _(original: Any, model: Any) -> None:
    pass

# ---------------------------------------------------------------------------------------------- scores and rewards

@mutation("the scorer forgets the offset", REWARD_MODEL + "score_ids", MODELS + "test_score_and_value_subtract_the_same_offset")
def _(original: Any, model: Any, *rest: Any, **options: Any) -> Any:
    return original(model, *rest, **options) + score_offset(model)

@mutation("the value model forgets the offset", REWARD_MODEL + "ValueModel.forward", MODELS + "test_score_and_value_subtract_the_same_offset")
def _(original: Any, self: Any, batch: Any, positions: Any) -> Any:
    return original(self, batch, positions) + self.offset

@mutation("the score is read a token too early", REWARD_MODEL + "score_ids", MODELS + "test_scores_are_read_at_the_last_token_whatever_the_batch")
def _(original: Any, model: Any, sequences: Any, *rest: Any, **options: Any) -> Any:
    return original(model, [ids[:-1] or ids for ids in sequences], *rest, **options)

@mutation("a stream loses the pieces between two windows", "pipeline.data.streaming:_pieces", "tests/data/test_streaming.py::test_a_pass_holds_the_blocks_of_the_cached_path[True]")
def _(original: Any, *rest: Any) -> list[list[int]]:
    return []

@mutation("a resumed stream trains on its window's first blocks again", "pipeline.data.streaming:StreamedBlocks.go_to", "tests/data/test_streaming.py::test_a_stream_goes_on_exactly_from_any_block")
def _(original: Any, self: Any, position: dict[str, Any]) -> None:
    original(self, {**position, "blocks": position["begin"]["blocks"]})

@mutation("a response that ended elsewhere is read at a token that the reward model never saw", "pipeline.data.encoding:ChatEncoder.finished_ids", TOKENS + "test_a_response_that_ended_anywhere_is_read_where_answers_are_trained_to_end")
def _(original: Any, self: Any, response_ids: Any, stop_ids: Any) -> Any:
    return list(response_ids)

@mutation("the missing-EOS score goes to those that ended", EQUATIONS + "missing_eos_scores", BY_HAND + "test_missing_eos")
def _(original: Any, scores: Any, finished: Any, mode: str, value: float) -> Any:
    return original(scores, ~finished, mode, value)

@mutation("the missing-EOS rule asks for EOS, not for the stop tokens", "pipeline.rollout.collect:Collector.collect", DETAILS + "test_any_stop_token_is_a_stop")
def _(original: Any, self: Any, *rest: Any, **options: Any) -> Any:
    samples = original(self, *rest, **options)
    return [dataclasses.replace(sample, finished=sample.ids[-1] == self.encoder.eos_id) for sample in samples]

@mutation("no running scale of scores", EQUATIONS + "RunningMoments.update", UPDATE + "[options12-0]")
def _(original: Any, self: Any, values: Any) -> None:
    pass

@mutation("k3 inside the reward", EQUATIONS + "kl_penalized_rewards", UPDATE + "[options0-0]")
def _(original: Any, scores: Any, logprobs: Any, ref_logprobs: Any, *rest: Any) -> Any:
    return original(scores, k3(logprobs, ref_logprobs), torch.zeros_like(logprobs), *rest)

@mutation("the penalty's sign", EQUATIONS + "kl_penalized_rewards", UPDATE + "[options0-0]")
def _(original: Any, scores: Any, logprobs: Any, ref_logprobs: Any, *rest: Any) -> Any:
    return original(scores, ref_logprobs, logprobs, *rest)

@mutation("the score at every token", EQUATIONS + "kl_penalized_rewards", BY_HAND + "test_rewards_sum_to_score_minus_penalty")
def _(original: Any, scores: Any, logprobs: Any, ref_logprobs: Any, lengths: Any, kl_coef: float, after: bool = False) -> Any:
    rewards = original(torch.zeros_like(scores), logprobs, ref_logprobs, lengths, kl_coef, after)
    return rewards + scores.repeat_interleave(lengths + int(after))

@mutation("no position after the response", EQUATIONS + "response_positions", BY_HAND + "test_rewards_sum_to_score_minus_penalty")
def _(original: Any, lengths: Any, score_after_response: bool) -> Any:
    return original(lengths, False)

@mutation("the reference is the policy of the moment", NETWORKS + "SeparateNetworks.compute_logprobs_and_values", DETAILS + "test_plain_transformers_loads_what_every_arrangement_leaves[separate]")
def _(original: Any, self: Any, batch: Any, with_values: bool) -> Any:
    measured = original(self, batch, with_values)
    return dataclasses.replace(measured, ref_logprobs=measured.logprobs)

@mutation("the KL of a response is a mean over its tokens", "pipeline.rollout.rollout:rollout_metrics", ORACLE + "test_metrics_of_a_rollout_are_sums_over_each_response")
def _(original: Any, rollout: Any) -> Any:
    metrics = original(rollout)
    return metrics | {"kl": metrics["kl"] / metrics["response_tokens"]}

@mutation("the adaptive KL follows the mean over tokens", PPO + "Learner.update", DETAILS + "test_the_coefficient_follows_the_summed_kl_of_each_rollout")
def _(original: Any, self: Any, rollout: Any, collected: Any) -> Any:
    return original(self, rollout, collected | {"kl": collected["kl"] / collected["response_tokens"]})

@mutation("the adaptive KL without its clip", "pipeline.algorithms.kl:adapt_kl_coef", DETAILS + "test_adaptive_kl_by_hand")
def _(original: Any, kl_coef: float, kl: float, target: float, episodes: int, horizon: float) -> float:
    return kl_coef * (1 + (kl / target - 1) * episodes / horizon)

@mutation("the KL coefficient never moves", PPO + "Learner.update", DETAILS + "test_the_coefficient_follows_the_summed_kl_of_each_rollout")
def _(original: Any, self: Any, rollout: Any, collected: Any) -> Any:
    coefficient = self.state.kl_coef
    metrics = original(self, rollout, collected)
    self.state.kl_coef = coefficient
    return metrics

@mutation("the KL of an update is that of the new policy from the old", "pipeline.algorithms.kl:k3", ORACLE + "test_the_kl_of_an_update_is_that_of_the_old_policy_from_the_new")
def _(original: Any, logprobs: Any, ref_logprobs: Any) -> Any:
    return original(ref_logprobs, logprobs)

# ---------------------------------------------------------------------------------------------- advantages

@mutation("bootstrapped after the end", EQUATIONS + "compute_gae", BY_HAND + "test_gae_of_three_tokens_by_hand")
def _(original: Any, rewards: Any, values: Any, lengths: Any, gamma: float, gae_lambda: float) -> Any:
    rewards = rewards.clone()
    rewards[lengths.cumsum(0) - 1] += gamma  # a value of 1
    return original(rewards, values, lengths, gamma, gae_lambda)

@mutation("lambda of the wrong power", EQUATIONS + "compute_gae", BY_HAND + "test_gae_of_three_tokens_by_hand")
def _(original: Any, rewards: Any, values: Any, lengths: Any, gamma: float, gae_lambda: float) -> Any:
    return original(rewards, values, lengths, gamma, 1.0)

@mutation("GAE carries over the end of a sequence", EQUATIONS + "compute_gae", BY_HAND + "test_gae_of_one_sequence_does_not_depend_on_the_others")
def _(original: Any, rewards: Any, values: Any, lengths: Any, gamma: float, gae_lambda: float) -> Any:
    return original(rewards, values, lengths.sum()[None], gamma, gae_lambda)

@mutation("whitening counts padding", EQUATIONS + "whiten", BY_HAND + "test_whitening")
def _(original: Any, values: Any, shift_mean: bool = True) -> Any:
    return original(F.pad(values, (0, len(values))), shift_mean)[: len(values)]

@mutation("reward whitening shifts the mean", EQUATIONS + "whiten", UPDATE + "[options8-0]")
def _(original: Any, values: Any, shift_mean: bool = True) -> Any:
    return original(values)

@mutation("advantages are whitened in each minibatch", "pipeline.rollout.rollout:Rollout.select", UPDATE + "[options0-0]")
def _(original: Any, self: Any, rows: Any) -> Any:
    return whiten_advantages(original(self, rows))

@mutation("a minibatch holds other sequences than those asked for", "pipeline.rollout.rollout:_positions_of", ORACLE + "test_selecting_sequences_keeps_their_own_tokens")
def _(original: Any, rows: Any, lengths: Any) -> Any:
    return original(sorted(rows), lengths)

# ---------------------------------------------------------------------------------------------- losses and steps

@mutation("the pessimistic branch is the optimistic one", EQUATIONS + "clipped_policy_losses", BY_HAND + "test_clipped_policy_loss")
def _(original: Any, logprobs: Any, old_logprobs: Any, advantages: Any, clip_range: float) -> Any:
    losses, clipped = original(logprobs, old_logprobs, -advantages, clip_range)
    return -losses, clipped

@mutation("the sign of the policy loss", EQUATIONS + "clipped_policy_losses", BY_HAND + "test_on_policy_gradient_is_reinforce")
def _(original: Any, logprobs: Any, old_logprobs: Any, advantages: Any, clip_range: float) -> Any:
    return original(logprobs, old_logprobs, -advantages, clip_range)

@mutation("the value loss takes the smaller branch", EQUATIONS + "clipped_value_losses", BY_HAND + "test_clipped_value_loss_by_hand")
def _(original: Any, values: Any, old_values: Any, returns: Any, value_clip_range: float) -> Any:
    near = old_values + (values - old_values).clamp(-value_clip_range, value_clip_range)
    plain, limited = (values - returns) ** 2, (near - returns) ** 2
    return 0.5 * torch.minimum(plain, limited), limited > plain

@mutation("vf_coef is not applied", PPO + "value_loss", UPDATE + "[options0-0]")
def _(original: Any, values: Any, rollout: Any, args: Any, tokens: int, sums: Any) -> Any:
    return original(values, rollout, args, tokens, sums) / args.vf_coef

@mutation("the k2 loss in other units than the advantages", PPO + "Learner.update", ORACLE + "test_an_update_takes_the_k2_loss_in_the_units_of_the_advantages")
def _(original: Any, self: Any, rollout: Any, collected: Any) -> Any:
    return original(self, rollout, collected | {"advantage_std": 1.0})

@mutation("a mean of micro-batch means", PPO + "policy_loss", ORACLE + "test_uneven_micro_batches_give_the_same_gradient")
def _(original: Any, logprobs: Any, *rest: Any, tokens: int, **options: Any) -> Any:
    return original(logprobs, *rest, tokens=len(logprobs), **options)

@mutation("an update's metrics are means of micro-batch means", "pipeline.training.metric_sums:MetricSums.add", ORACLE + "test_uneven_micro_batches_give_the_same_gradient")
def _(original: Any, self: Any, count: int, **values: Any) -> None:
    original(self, len(next(iter(values.values()))), **values)

@mutation("max_grad_norm is ignored", PPO + "Learner.step", DETAILS + "test_each_networks_gradient_is_clipped_by_its_own_norm")
def _(original: Any, self: Any, *rest: Any, **options: Any) -> Any:
    return original(with_args(self, max_grad_norm=math.inf), *rest, **options)

@mutation("minibatches have no effect", PPO + "Learner.minibatches", DETAILS + "test_optimizer_steps_are_counted_over_dataset_epochs")
def _(original: Any, self: Any, sequences: int, epoch: int) -> Any:
    return original(with_args(self, minibatches=1), sequences, epoch)

@mutation("a step for every micro-batch", PPO + "Learner.accumulate_gradients", DETAILS + "test_the_first_step_of_adam_by_hand")
def _(original: Any, self: Any, *rest: Any, **options: Any) -> Any:
    metrics = original(self, *rest, **options)
    self.optimizers["policy"].step()
    return metrics

def change_optimizers(original: Any, self: Any, arguments: Any, **options: float) -> None:
    original(self, *arguments)
    for optimizer in self.optimizers.values():
        for group in optimizer.param_groups:
            group.update(options)

@mutation("Adam's own epsilon", PPO + "Learner.__init__", DETAILS + "test_the_first_step_of_adam_by_hand")
def _(original: Any, self: Any, *arguments: Any) -> None:
    change_optimizers(original, self, arguments, eps=1e-8)

@mutation("AdamW's own weight decay", PPO + "Learner.__init__", DETAILS + "test_the_first_step_of_adam_by_hand")
def _(original: Any, self: Any, *arguments: Any) -> None:
    change_optimizers(original, self, arguments, weight_decay=0.01)

@mutation("the learning rate never changes", "pipeline.algorithms.schedules:lr_factor", DETAILS + "test_learning_rates_by_rollout")
def _(original: Any, *rest: Any, **options: Any) -> float:
    return 1.0

@mutation("the value model's warm-up trains the policy", PPO + "Learner.update", DETAILS + "test_value_warm_up_trains_the_value_alone")
def _(original: Any, self: Any, *rest: Any) -> Any:
    return original(with_args(self, value_warmup_rollouts=0), *rest)

@mutation("the value model's warm-up uses up the policy's schedule", PPO + "Learner.update", DETAILS + "test_the_policys_learning_rate_waits_for_the_value_model")
def _(original: Any, self: Any, *rest: Any) -> Any:
    metrics = original(self, *rest)
    if self.state.rollout < self.args.value_warmup_rollouts:
        self.schedules["policy"].step()
    return metrics

@mutation("ptx without its factor", "pipeline.rollout.pretraining:PretrainingText.accumulate_gradients", DETAILS + "test_ptx_adds_its_gradient_before_the_step")
def _(original: Any, self: Any, prompts: int, step: int) -> Any:
    return original(dataclasses.replace(self, args=dataclasses.replace(self.args, ptx_coef=1.0)), prompts, step)

@mutation("the moving average decays the wrong way", PPO + "Learner._average_policy", DETAILS + "test_the_moving_average_in_closed_form")
def _(original: Any, self: Any) -> None:
    original(with_args(self, ema_decay=1 - self.args.ema_decay) if self.args.ema_decay else self)

@mutation("the moving average is the last rollout's, not the best one's", PPO + "Learner.load_weights", DETAILS + "test_the_average_of_the_best_rollout_is_kept")
def _(original: Any, self: Any, state: Any) -> None:
    self.networks.load_state_dict(state["networks"])

@mutation("the best rollout is the worst", "pipeline.rollout.evaluation:record_if_best", DETAILS + "test_the_best_rollout_is_kept")
def _(original: Any, metrics: Any, args: Any, state: Any) -> bool:
    return bool(original({name: -value for name, value in metrics.items()}, args, state))

@mutation("the best networks are gone once they are loaded", "pipeline.training.ppo_state:load_best", DETAILS + "test_a_run_killed_in_its_final_evaluation_can_still_finish")
def _(original: Any, folder: Any, like: Any) -> Any:
    best = original(folder, like)
    (folder / BEST).unlink()
    return best

@mutation("a judge that says NaN is the best", "pipeline.rollout.evaluation:record_if_best", DETAILS + "test_a_judge_that_says_nan_is_never_the_best")
def _(original: Any, metrics: Any, args: Any, state: Any) -> bool:
    return bool(original({n: 1e9 if math.isnan(value) else value for n, value in metrics.items()}, args, state))

# ---------------------------------------------------------------------------------------------- networks

@mutation("adapters: the reference keeps the policy's adapter", ADAPTERS + "active", ARRANGEMENTS + "test_the_reference_of_adapters_is_the_base")
def _(original: Any, self: Any, adapter: str | None) -> Any:
    return original(self, adapter or "default")

@mutation("adapters: values are read through the policy's adapter", ADAPTERS + "active", ARRANGEMENTS + "test_adapters_train_nothing_but_themselves")
def _(original: Any, self: Any, adapter: str | None) -> Any:
    return original(self, "default" if adapter == "value" else adapter)

@mutation("adapters: the switch freezes the other adapter for good", ADAPTERS + "_activate", ARRANGEMENTS + "test_adapters_train_nothing_but_themselves")
def _(original: Any, self: Any, adapter: str) -> None:
    self.peft.set_adapter(adapter)

@mutation("shared trunk: the value's gradient stops at its head", NETWORKS + "SharedTrunkNetworks._values", ARRANGEMENTS + "test_gradients_are_those_of_the_losses_by_finite_differences[shared_trunk]")
def _(original: Any, self: Any, hidden: Any, batch: Any) -> Any:
    return original(self, hidden.detach(), batch)

@mutation("values stand a token too late", NETWORKS + "response_batch", ARRANGEMENTS + "test_the_value_at_the_state_of_the_end_token_is_the_score")
def _(original: Any, *rest: Any, **options: Any) -> Any:
    batch = original(*rest, **options)
    return dataclasses.replace(batch, value_positions=batch.value_positions + 1)

@mutation("scalar heads are cast to bf16", "pipeline.models.precision:_is_scalar_head", "tests/models/test_precision.py::test_scalar_heads_and_embeddings_stay_in_fp32")
def _(original: Any, module: Any) -> bool:
    return False

@mutation("frozen networks keep their linear layers in fp32", "pipeline.models.precision:cast_frozen_linears_to_bf16", "tests/stages/test_gpu_decisions.py::test_ppo_takes_a_gpus_decisions[separate]")
def _(original: Any, model: Any) -> None:
    pass

# ---------------------------------------------------------------------------------------------- packed sequences

@mutation("packed sequences: attention never gets the layout", PACKED + "model_inputs", PACKING + "[LlamaConfig]")
def _(original: Any, batch: Any) -> Any:
    return {name: value for name, value in original(batch).items() if name != "packing"}

@mutation("packed sequences: one begins in the one before it", PACKED + "pack", PACKING + "[LlamaConfig]")
def _(original: Any, *rest: Any) -> Any:
    batch = original(*rest)
    shifted = tuple((index - 1).clamp(min=0) for index in batch.layout.pad_index)
    return dataclasses.replace(batch, layout=dataclasses.replace(batch.layout, pad_index=shifted))

@mutation("packed sequences: gradients do not come back from attention", PACKED + "_Pad.backward", PACKING + "[LlamaConfig]")
def _(original: Any, ctx: Any, *gradients: Any) -> Any:
    first, *others = original(ctx, *gradients)
    return torch.zeros_like(first), *others

@mutation("packed sequences: the second group's answers are the first's", PACKED + "pack", PACKING + "[LlamaConfig]")
def _(original: Any, *rest: Any) -> Any:
    batch = original(*rest)
    first, index = batch.layout.pad_index[0].numel(), batch.layout.unpad_index
    wrong = torch.where(index >= first, index - first, index)
    return dataclasses.replace(batch, layout=dataclasses.replace(batch.layout, unpad_index=wrong))

@mutation("packed sequences: sliding windows are forgotten", PACKED + "_attend", PACKING + "[MistralConfig]")
def _(original: Any, q: Any, k: Any, v: Any, scaling: Any, window: Any) -> Any:
    return original(q, k, v, scaling, None)
# fmt: on
