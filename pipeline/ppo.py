"""Stage 4: PPO against a score, with a KL penalty to the SFT model (InstructGPT, section 3.5). Our own loop on Accelerate.

    accelerate launch pipeline/ppo.py --config recipes/demo/ppo.yaml

Per rollout: prompts → sampled and scored responses → KL-penalised rewards → advantages and returns →
`ppo_epochs` × `minibatches` optimizer steps of policy and value model → KL coefficient → log, evaluate, save.

Every process holds the whole rollout and takes its share of each minibatch, so statistics are those of the whole rollout.
Losses are sums over tokens divided by the minibatch's tokens, and gradients are added over processes before each step.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.algorithms.kl import adapt_kl_coef, k2, k3
from pipeline.algorithms.ppo import clipped_policy_losses, clipped_value_losses
from pipeline.algorithms.seeds import epoch_seed, rollout_seed
from pipeline.config.ppo import PPOArguments
from pipeline.data.batching import microbatches, seeded_order
from pipeline.models.networks import Networks, no_policy_loss, no_value_loss
from pipeline.models.offload import offloaded_moments
from pipeline.models.sharding import clip_grad_norm
from pipeline.rollout.alarms import Alarms, warn_of_missing_eos_score
from pipeline.rollout.collect import Collector, ruled_scores, scaled_scores, score_metrics
from pipeline.rollout.evaluation import Evaluation, HeldOutEvaluation, reason_to_end, record_if_best
from pipeline.rollout.pretraining import PretrainingText
from pipeline.rollout.prompts import Prompt, PromptSet
from pipeline.rollout.rollout import Rollout, build_rollout, rollout_metrics, whiten_advantages
from pipeline.rollout.setup import PPOInputs, open_inputs, prepare_collector, prepare_pretraining, save_result
from pipeline.training.metric_sums import MetricSums
from pipeline.training.ppo_log import PPOLog, throughput
from pipeline.training.ppo_optimizers import build_optimizers
from pipeline.training.ppo_state import PPOState, load_best, load_checkpoint, save_best, save_checkpoint
from pipeline.training.processes import Processes
from pipeline.training.run import Run
from pipeline.training.stage import launch

import torch
from accelerate.utils import set_seed
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

logger = logging.getLogger("pipeline.ppo")  # __name__ is __main__ under accelerate launch


def main(run: Run[PPOArguments]) -> None:
    inputs = open_inputs(run)
    if run.already_done():
        return
    training = prepare(run, inputs)
    train(training, run)
    finish(training, run)


@dataclass
class Training:
    """A PPO run that is ready to train."""

    inputs: PPOInputs
    prompts: PromptSet
    collector: Collector
    evaluation: HeldOutEvaluation
    learner: Learner
    state: PPOState
    log: PPOLog
    resumed_from: list[int]


def prepare(run: Run[PPOArguments], inputs: PPOInputs) -> Training:
    """Load networks, rewards and prompts, and the newest checkpoint if there is one."""
    args = run.args
    checkpoint = run.output.resumable()
    state = PPOState.read(checkpoint) if checkpoint else PPOState(args.kl_coef)
    set_seed(args.seed)
    collector = prepare_collector(inputs, run)
    pretraining = prepare_pretraining(inputs, collector)
    learner = Learner(args, run.processes, collector, pretraining, state)
    if checkpoint:
        with learner.moments:
            learner.load_state_dict(load_checkpoint(checkpoint, learner.state_dict(), run.processes))
        if functions := [source.function for source in args.reward if source.function]:
            logger.warning("ppo: reward functions start anew, with what their modules count or hold: %s", functions)
    evaluation = HeldOutEvaluation(collector, inputs.judges)
    log = PPOLog(run, inputs.accelerator)
    return Training(inputs, inputs.prompts, collector, evaluation, learner, state, log, run.begin(checkpoint))


def train(training: Training, run: Run[PPOArguments]) -> None:
    """Run the remaining rollouts, with evaluations and checkpoints between them."""
    args, state, learner, log = run.args, training.state, training.learner, training.log
    alarms = Alarms(args.max_grad_norm, "bf16" if training.collector.plan.bf16 else "fp32")
    checked = False
    with log.progress(state.rollout) as bar:
        if (
            args.eval_rollouts and state.rollout == 0 and state.ended is None
        ):  # where every curve starts: policy = reference
            log.write(0, evaluate(training, run).metrics)
        while state.rollout < args.total_rollouts and state.ended is None:
            start = time.perf_counter()
            prompts = training.prompts.of_rollout(state.rollout, args.prompts_per_rollout, args.seed)
            rollout, metrics = collect_rollout(training.collector, prompts, state)
            metrics |= learner.update(rollout, metrics)
            state.rollout += 1
            metrics |= throughput(int(rollout.lengths.sum()), len(rollout), time.perf_counter() - start)
            alarms.check(metrics, state.rollout)
            evaluated = args.eval_rollouts is not None and state.rollout % args.eval_rollouts == 0
            if evaluated:
                metrics |= evaluate(training, run).metrics
            if evaluated or state.rollout % args.logging_steps == 0 or state.rollout == args.total_rollouts:
                log.write(state.rollout, metrics)
            bar.update()
            stop = run.interrupted()
            if state.rollout % args.save_steps == 0 and state.rollout < args.total_rollouts:
                with learner.moments:
                    save_checkpoint(run.output, state, learner.state_dict(), run.processes, check=not checked)
                checked = True
            if stop:  # the last checkpoint at a boundary is what the next start resumes from
                run.leave_interrupted()
    if state.ended:
        logger.info("ppo: ended at rollout %d: %s", state.rollout, state.ended)


def collect_rollout(collector: Collector, prompts: list[Prompt], state: PPOState) -> tuple[Rollout, dict[str, float]]:
    """Sample a response to each prompt, score it, and compute KL-penalised rewards, advantages and returns."""
    args, start = collector.args, time.perf_counter()
    samples = collector.collect(prompts, rollout_seed(args.seed, state.rollout))
    if state.rollout == 0:
        warn_of_missing_eos_score(samples, args)
    scores = ruled_scores(samples, args)
    if args.scale_scores == "running":
        state.moments.update(scores)
    reward_kl_coef = state.kl_coef if args.kl_estimator == "k1" else 0.0  # k2 is a loss beside the policy's
    rollout = build_rollout(samples, scaled_scores(scores, args, state.moments), reward_kl_coef, args)
    metrics = score_metrics(samples, args) | rollout_metrics(rollout)
    metrics["seconds_collect"] = time.perf_counter() - start
    tokens = sum(len(sample.prompt_ids) + len(sample.ids) for sample in samples)
    state.flops += 2.0 * tokens * sum(collector.networks.parameter_counts.values())
    return whiten_advantages(rollout) if args.whiten_advantages else rollout, metrics


def evaluate(training: Training, run: Run[PPOArguments]) -> Evaluation:
    """Evaluate during training: write samples, save the networks if they are the best so far, decide whether the run ends."""
    args, state = run.args, training.state
    evaluation = training.evaluation.evaluate(training.prompts.held_out[: args.eval_prompts])
    training.log.samples(state.rollout, evaluation.samples)
    if record_if_best(evaluation.metrics, args, state):
        save_best(Path(args.output_dir), training.learner.weights(), run.processes)
    state.ended = reason_to_end(evaluation.metrics, args, state)
    return evaluation


def finish(training: Training, run: Run[PPOArguments]) -> None:
    """Take the best networks where the recipe asks for them, evaluate on all held-out prompts, and save."""
    args, state = run.args, training.state
    if state.best_rollout is not None:
        run.processes.barrier()
        training.learner.load_weights(load_best(Path(args.output_dir), training.learner.weights()))
    evaluation = training.evaluation.evaluate(training.prompts.held_out)
    save_result(
        run,
        training.inputs,
        training.collector,
        state=state,
        evaluation=evaluation,
        average=training.learner.average,
        resumed_from=training.resumed_from,
    )


# ------------------------------------------------------------------------------------------------ learning


class Learner:
    """Updates policy and value model on rollouts: two optimizers, each with its own schedule.

    A schedule counts the rollouts in which its network is trained.

    Attributes:
        moments: with `offload: all`, Adam's moments are on the device inside `with learner.moments` only.
    """

    def __init__(
        self,
        args: PPOArguments,
        processes: Processes,
        collector: Collector,
        pretraining: PretrainingText | None,
        state: PPOState,
    ):
        self.args, self.processes, self.collector = args, processes, collector
        self.pretraining, self.state = pretraining, state
        self.networks: Networks = collector.networks
        self.optimizers, self.schedules = build_optimizers(args, self.networks.trained)
        self.moments: AbstractContextManager[None] = nullcontext()
        if args.offload == "all":
            self.moments = offloaded_moments(self.optimizers.values())
        self.average = None
        if args.ema_decay is not None:
            self.average = [parameter.detach().clone() for parameter in self.networks.trained["policy"]]

    def update(self, rollout: Rollout, collected: dict[str, float]) -> dict[str, float]:
        """`ppo_epochs` × `minibatches` optimizer steps of each network on one rollout.

        Args:
            collected: the rollout's metrics: `kl`, nats per response, which an adaptive kl_coef follows, and `advantage_std`.

        Returns:
            metrics, means over the optimizer steps.
        """
        args, state, start = self.args, self.state, time.perf_counter()
        trained = ("policy", "value") if state.rollout >= args.value_warmup_rollouts else ("value",)
        metrics: dict[str, float] = {"kl_coef": state.kl_coef}
        metrics |= {f"{name}_lr": float(schedule.get_last_lr()[0]) for name, schedule in self.schedules.items()}
        kl_loss_coef = 0.0
        if args.kl_estimator == "k2":  # in the units that whitening gave the advantages
            scale = collected["advantage_std"] + 1e-8 if args.whiten_advantages else 1.0
            kl_loss_coef = state.kl_coef / scale
        steps: list[dict[str, float]] = []
        with self.moments:
            for epoch in range(args.ppo_epochs):
                minibatches = self.minibatches(len(rollout), epoch)
                epoch_steps = [self.step(rollout.select(rows), trained, kl_loss_coef) for rows in minibatches]
                steps += epoch_steps
                moved = sum(step.get("update_kl", 0.0) for step in epoch_steps) / len(epoch_steps)
                if args.max_update_kl is not None and moved > args.max_update_kl:
                    break
        metrics |= {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
        metrics |= {"epochs": epoch + 1, "seconds_update": time.perf_counter() - start}
        for name in trained:
            self.schedules[name].step()
        if "policy" in trained:
            metrics["first_minibatch_log_ratio"] = steps[0]["max_log_ratio"]
            metrics["max_log_ratio"] = max(step["max_log_ratio"] for step in steps)  # not a mean: one token may alarm
            self._average_policy()
            if args.kl_control == "adaptive":
                state.kl_coef = adapt_kl_coef(
                    state.kl_coef, collected["kl"], args.kl_target, len(rollout), args.kl_horizon
                )
        return metrics

    def minibatches(self, sequences: int, epoch: int) -> Iterator[list[int]]:
        """The sequences of each optimizer step of an epoch, the same in every process."""
        size = sequences // self.args.minibatches
        order = seeded_order(epoch_seed(self.args.seed, self.state.rollout, epoch), sequences)
        for start in range(0, sequences, size):
            yield order[start : start + size]

    def step(self, minibatch: Rollout, trained: tuple[str, ...], kl_loss_coef: float) -> dict[str, float]:
        """One optimizer step of each trained network, each clipped by its own gradient norm."""
        metrics = self.accumulate_gradients(minibatch, trained, kl_loss_coef)
        if self.pretraining is not None and "policy" in trained:
            loss, flops = self.pretraining.accumulate_gradients(len(minibatch), self.state.policy_steps)
            metrics["ptx_loss"] = loss
            self.state.flops += flops
        self.processes.sum_gradients(p for name in trained for p in self.networks.trained[name])
        self._check_finite(metrics, minibatch, "the loss")
        for name in trained:
            norm = clip_grad_norm(self.networks.trained[name], self.args.max_grad_norm)
            metrics[f"{name}_grad_norm"] = norm
            self._check_finite({"norm": norm}, minibatch, f"{name}'s gradient")
            self.optimizers[name].step()
            self.optimizers[name].zero_grad()
        self.state.policy_steps += "policy" in trained
        self.state.value_steps += 1
        return metrics

    def accumulate_gradients(
        self, minibatch: Rollout, trained: tuple[str, ...] = ("policy", "value"), kl_loss_coef: float = 0.0
    ) -> dict[str, float]:
        """Add this process's share of a minibatch's gradients, however it is cut into micro-batches.

        Returns:
            the minibatch's metrics, over all processes.
        """
        args, sums = self.args, MetricSums()
        tokens, value_tokens = int(minibatch.lengths.sum()), int(minibatch.value_lengths.sum())
        sequence_tokens = [len(p) + len(r) for p, r in zip(minibatch.prompt_ids, minibatch.response_ids, strict=True)]
        own_sequences = self.processes.share(range(len(minibatch)))
        groups = microbatches(sequence_tokens, own_sequences, args.micro_batch_tokens)
        for rows in self.processes.equally_many(groups) if self.networks.sharded else groups:
            if rows is None:  # another process has one more, and needs this one's part of the networks
                self.networks.accumulate_gradients(
                    self.collector.filler(), no_policy_loss if "policy" in trained else None, no_value_loss
                )
                continue
            micro_batch = minibatch.select(rows)
            inputs = self.collector.batch(micro_batch.prompt_ids, micro_batch.response_ids)
            micro_batch = micro_batch.to(self.collector.device)
            self.networks.accumulate_gradients(
                inputs,
                partial(
                    policy_loss, rollout=micro_batch, args=args, kl_loss_coef=kl_loss_coef, tokens=tokens, sums=sums
                )
                if "policy" in trained
                else None,
                partial(value_loss, rollout=micro_batch, args=args, tokens=value_tokens, sums=sums),
            )
        parameters = sum(self.networks.parameter_counts[name] for name in trained)
        self.state.flops += 6.0 * sum(sequence_tokens) * parameters
        return sums.over(self.processes, self.collector.device)

    def _average_policy(self) -> None:
        if self.average is not None and self.args.ema_decay is not None:
            with torch.no_grad():
                get_ema_multi_avg_fn(self.args.ema_decay)(self.average, self.networks.trained["policy"], None)

    def _check_finite(self, metrics: dict[str, float], minibatch: Rollout, what: str) -> None:
        if all(map(math.isfinite, metrics.values())):
            return
        path = Path(self.args.output_dir) / "nonfinite_batch.pt"
        if self.processes.is_main:
            torch.save(vars(minibatch), path)
        raise RuntimeError(
            f"{what} is not finite at rollout {self.state.rollout}; the minibatch was saved to {path}, "
            "the last checkpoint is as it was"
        )

    def state_dict(self) -> dict[str, Any]:
        state = self.weights()
        for name, optimizer in self.optimizers.items():
            state |= {name: optimizer.state_dict(), f"{name}_schedule": self.schedules[name].state_dict()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.load_weights(state)
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])
            self.schedules[name].load_state_dict(state[f"{name}_schedule"])

    def weights(self) -> dict[str, Any]:
        """The networks and the policy's moving average: what is kept of the best evaluation."""
        return {"networks": self.networks.state_dict(), "average": self.average}

    def load_weights(self, state: dict[str, Any]) -> None:
        self.networks.load_state_dict(state["networks"])
        for average, tensor in zip(self.average or [], state["average"] or [], strict=True):
            average.copy_(tensor)


def policy_loss(
    logprobs: Tensor,
    entropy: Tensor,
    rollout: Rollout,
    args: PPOArguments,
    kl_loss_coef: float,
    tokens: int,
    sums: MetricSums,
) -> Tensor:
    """The clipped surrogate, a mean over the minibatch's tokens; with `kl_estimator: k2` also the KL from the reference.

    Args:
        logprobs, entropy: (response_tokens,) of a micro-batch, under the policy as it is now.
        rollout: the same sequences as they were sampled.
        tokens: response tokens of the whole minibatch, in all processes.
    """
    losses, clipped = clipped_policy_losses(logprobs, rollout.logprobs, rollout.advantages, args.clip_range)
    log_ratio = logprobs.detach() - rollout.logprobs
    update_kl = k3(rollout.logprobs, logprobs.detach())
    sums.add(
        tokens, policy_loss=losses, clip_fraction=clipped, entropy=entropy, ratio=log_ratio.exp(), update_kl=update_kl
    )
    sums.largest("max_log_ratio", log_ratio.abs())
    if kl_loss_coef:
        losses = losses + kl_loss_coef * k2(logprobs, rollout.ref_logprobs)
    return losses.sum() / tokens


def value_loss(values: Tensor, rollout: Rollout, args: PPOArguments, tokens: int, sums: MetricSums) -> Tensor:
    """The clipped squared error of the values, a mean over the minibatch's tokens, times `vf_coef`."""
    losses, clipped = clipped_value_losses(values, rollout.values, rollout.returns, args.value_clip_range)
    sums.add(tokens, value_loss=losses, value_clip_fraction=clipped)
    return args.vf_coef * losses.sum() / tokens


if __name__ == "__main__":
    launch("ppo", PPOArguments, main)
