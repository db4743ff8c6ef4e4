"""Stage 4: PPO against a score, with a KL penalty to the SFT model. Our own loop on Accelerate.

    accelerate launch pipeline/ppo.py --config recipes/demo/ppo.yaml

One rollout: sample a response to each prompt → score it → log-probabilities of policy and reference, values → rewards
shaped by KL → advantages → `ppo_epochs` × `minibatches` optimizer steps of policy and value → log → save.
Every process holds the whole rollout and takes its rows of each minibatch, so statistics are global by construction;
gradients are sums over tokens, added over processes before each step.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.algorithms.kl import adapt_kl_coef, k2, k3
from pipeline.algorithms.masking import masked_sum
from pipeline.algorithms.ppo import RunningMoments, missing_eos_scores, policy_losses, value_losses
from pipeline.algorithms.schedules import lr_factor
from pipeline.config.arguments import PPOArguments
from pipeline.config.functions import import_function, source_sha256
from pipeline.data.batching import endless, microbatches, seeded_order
from pipeline.data.collators import BlockCollator, right_pad
from pipeline.data.encoding import IGNORE, ChatEncoder, document_ids, forbidden_ids
from pipeline.data.packing import Block, pack_documents
from pipeline.data.records import Record
from pipeline.data.sources import Source, fingerprint, read_sources
from pipeline.data.splits import split_records, spread
from pipeline.errors import UserError, shorten
from pipeline.models.loading import (
    hold_in_bf16,
    load_causal_lm,
    load_tokenizer,
    refuse_beyond_context,
    require_pad,
    resolve_precision,
)
from pipeline.models.lora import read_adapter
from pipeline.models.networks import AdapterRoles, PolicyModel, Roles, SeparateRoles, SharedTrunkRoles, zero_value
from pipeline.models.packed import Batch, lay_out, prepare, worth_on
from pipeline.models.reward_model import load_scalar_model
from pipeline.rollout.rewards import DISAGREEMENT, Scorer, build_scorer, call_function, identity, judge_labels
from pipeline.rollout.rollout import (
    LocalEngine,
    Rollout,
    Shaping,
    assemble,
    response_mask_of,
    rollout_figures,
    row_uniforms,
)
from pipeline.training import history
from pipeline.training.checkpoints import writing
from pipeline.training.identity import tokenizer_hashes
from pipeline.training.json_files import write_json
from pipeline.training.lineage import Parent, read_lineage, verify_parent
from pipeline.training.stage import Run, launch
from pipeline.training.trackers import PROJECT, log_samples

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import gather_object, send_to_device, set_seed
from torch import Tensor, nn
from tqdm.auto import tqdm

logger = logging.getLogger("pipeline.ppo")  # __name__ is __main__ under accelerate launch
SUPPORTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
EVALUATION = 2**31  # seeds of evaluation samples lie apart from those of training
BEST = "best.pt"
POLICY_FIGURES = ("policy_loss", "clip_fraction", "entropy", "ratio", "update_kl")
VALUE_FIGURES = ("value_loss", "value_clip_fraction")
SHOWN = 3  # sample answers in the log at an evaluation


@dataclass
class State:
    """What a checkpoint keeps beside tensors."""

    kl_coef: float
    rollout: int = 0
    policy_steps: int = 0
    value_steps: int = 0
    flops: float = 0.0
    moments: RunningMoments = field(default_factory=RunningMoments)
    best: float | None = None
    best_rollout: int | None = None
    evaluations_since_best: int = 0

    @classmethod
    def read(cls, path: Path) -> State:
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**values, "moments": RunningMoments(**values["moments"])})


def main(run: Run[PPOArguments]) -> None:
    args = run.args
    accelerator = Accelerator(mixed_precision="no", log_with=args.trackers or None, cpu=not torch.cuda.is_available())
    refuse_backend(accelerator, args)
    parent = verify_parent(args.parent, ("sft", "ppo"))
    reward_parents = [verify_parent(source.model, ("reward",)) for source in args.reward if source.model is not None]
    sources = read_sources(args.datasets, "prompt", args.data_root)
    eval_sources = read_sources(args.eval_datasets, "prompt", args.data_root)
    ptx_sources = read_sources(args.ptx_datasets, "document", args.data_root)
    tokenizer = load_tokenizer(parent.path)
    parent.check_tokenizer(tokenizer)
    require_pad(tokenizer, args.parent)
    encoder = ChatEncoder(tokenizer)
    judges = [(label, name, import_function(name)) for label, name in judge_labels(args.judges).items()]
    refuse_metric(args, [label for label, _, _ in judges])
    run.output.inputs = {
        "parent": parent.as_inputs(tokenizer),
        "reward": identity(args.reward),
        "judges": [source_sha256(function) for _, _, function in judges],
        "data": fingerprint([*sources, *eval_sources, *ptx_sources]),
    }
    if run.already_done():
        return

    train_prompts, eval_prompts = prompts(sources, eval_sources, encoder, args)
    blocks = [b for s in ptx_sources for b in ptx_blocks(s, encoder, args)]
    checkpoint = run.output.resumable()
    state = State.read(checkpoint / "state.json") if checkpoint else State(args.kl_coef)
    set_seed(args.seed)
    roles = build_roles(args, parent, reward_parents, encoder, accelerator.device)
    loaded = {roles.reward_path: roles.reward} if isinstance(roles, AdapterRoles) and roles.reward else {}
    bf16 = resolve_precision(args.precision)
    scorer = build_scorer(args.reward, encoder, accelerator.device, loaded, args.ensemble, args.ensemble_penalty, bf16)
    loop = Loop(run, accelerator, roles, encoder, scorer, judges, blocks, state)
    if checkpoint:
        loop.load(checkpoint)
    resumed = run.begin(checkpoint)
    if args.trackers:
        name = args.run_name or f"{Path(args.output_dir).parent.name}-ppo"
        accelerator.init_trackers(
            PROJECT,
            config={k: str(v) for k, v in run.output.recipe.items()},
            init_kwargs={"wandb": {"name": name}, "trackio": {"name": name, "resume": "allow"}},
        )

    bar = tqdm(
        total=args.total_rollouts, initial=state.rollout, desc="ppo", unit="rollout", disable=not run.show_progress
    )
    ended = None
    if args.eval_rollouts and state.rollout == 0:  # where every curve starts: policy = reference
        figures, ended = loop.evaluation(eval_prompts[: args.eval_prompts])
        log(run, accelerator, 0, figures)
    while state.rollout < args.total_rollouts and ended is None:
        start = time.perf_counter()
        records = prompt_batch(train_prompts, state.rollout, args)
        rollout, figures = loop.collect(records, args.seed, state.rollout)
        figures |= loop.update(rollout, figures["kl"])
        state.rollout += 1
        figures["seconds"] = time.perf_counter() - start
        figures["episodes_per_second"] = args.prompts_per_rollout / figures["seconds"]
        figures["response_tokens_per_second"] = rollout.response_mask.sum().item() / figures["seconds"]
        evaluated = args.eval_rollouts is not None and state.rollout % args.eval_rollouts == 0
        if evaluated:
            found, ended = loop.evaluation(eval_prompts[: args.eval_prompts])
            figures |= found
        if evaluated or state.rollout % args.logging_steps == 0 or state.rollout == args.total_rollouts:
            log(run, accelerator, state.rollout, figures)
        bar.update()
        stop = run.interrupted()
        if state.rollout % args.save_steps == 0 and state.rollout < args.total_rollouts:
            loop.save()
        if stop:  # the last boundary checkpoint is what the next start resumes from
            run.leave_interrupted()

    bar.close()
    if ended:
        logger.info("ppo: ended at rollout %d: %s", state.rollout, ended)
    loop.take_best()
    metrics, samples = loop.evaluate(eval_prompts)
    results: dict[str, Any] = {key.removeprefix("eval_"): value for key, value in metrics.items()}
    results |= {
        "rollouts": state.rollout,
        "episodes": state.rollout * args.prompts_per_rollout,
        "policy_steps": state.policy_steps,
        "value_steps": state.value_steps,
        "kl_coef": state.kl_coef,
    }
    if state.best_rollout is not None:
        results |= {"best_rollout": state.best_rollout, "best_" + str(args.best_metric): state.best}
    if ended:
        results["ended"] = ended
    if run.is_main:
        loop.save_final(Path(args.output_dir))
        write_json(Path(args.output_dir) / "samples.json", samples)
    run.finish(
        parents=[parent.record(), *(reward.record() for reward in reward_parents)],
        datasets=[s.provenance() for s in [*sources, *eval_sources, *ptx_sources]],
        tokenizer=tokenizer,
        metrics=results,
        flops=state.flops,
        resumed_from=resumed,
        summary=f"held-out reward {results['score']:.3f} (SFT {results['reference_score']:.3f}) at a KL of {results['kl']:.2f} nats, "
        f"{results['response_tokens']:.1f} tokens a response, {results['stopped']:.0%} stopped"
        + (f", best at rollout {state.best_rollout}" if state.best_rollout is not None else ""),
    )
    accelerator.end_training()  # last: it also ends the process group


def refuse_backend(accelerator: Accelerator, args: PPOArguments) -> None:
    """Sharded backends need another way to sample and save; refused before anything is loaded."""
    if accelerator.distributed_type not in SUPPORTED:
        raise UserError(
            f"PPO does not run under {accelerator.distributed_type.value} yet; use one process, or DDP "
            "(recipes/accelerate/ddp.yaml)"
        )
    if args.prompts_per_rollout % accelerator.num_processes:
        raise UserError(
            f"prompts_per_rollout ({args.prompts_per_rollout}) must be a multiple of the {accelerator.num_processes} processes"
        )
    if args.prompts_per_rollout // args.minibatches < accelerator.num_processes:
        raise UserError(
            f"a minibatch of {args.prompts_per_rollout // args.minibatches} prompts is less than one a process; lower minibatches"
        )


def prompts(
    sources: list[Source], eval_sources: list[Source], encoder: ChatEncoder, args: PPOArguments
) -> tuple[list[Record], list[Record]]:
    """Training and held-out prompts with their `ids`; too long ones are refused, or counted and dropped."""
    train = [{**r, "file": s.location} for s in sources for r in s.records]
    held_out = [{**r, "file": s.location} for s in eval_sources for r in s.records]
    if not eval_sources:
        train, held_out = split_records(train, args.held_out_fraction)
    held_out = spread(held_out)
    kept: list[list[Record]] = [[], []]
    for part, records in zip(kept, (train, held_out), strict=True):
        for record in records:
            ids = encoder.prompt_ids(record["prompt"])
            if len(ids) > args.max_prompt_tokens:
                if args.long_prompts == "error":
                    raise UserError(
                        f"prompt of {len(ids)} tokens exceeds max_prompt_tokens ({args.max_prompt_tokens}): "
                        f"{shorten(record['prompt'][-1]['content'])}; raise it, or say `long_prompts: drop`",
                        file=record["file"],
                        line=record["line"],
                    )
                continue
            part.append({**record, "ids": ids})
    dropped = len(train) + len(held_out) - len(kept[0]) - len(kept[1])
    if dropped:
        logger.warning("ppo: %d prompts over max_prompt_tokens (%d) dropped", dropped, args.max_prompt_tokens)
    if not kept[0] or not kept[1]:
        raise UserError(
            f"{len(kept[0])} prompts to train on and {len(kept[1])} held out; both are needed: "
            "give `eval_datasets:` or change held_out_fraction"
        )
    return kept[0], kept[1]


def refuse_metric(args: PPOArguments, judges: list[str]) -> None:
    """`best_metric` names what evaluations will measure, or the run ends before it starts."""
    models = [source for source in args.reward if source.model is not None]
    parts = [s.function if s.model is None else "reward_model" if len(models) == 1 else s.model for s in args.reward]
    parts += [DISAGREEMENT] if args.ensemble != "sum" else []
    known = ["score", *judges, *(f"score_{part}" for part in parts)]
    if args.best_metric is not None and args.best_metric not in known:
        raise UserError(f"best_metric: no evaluation measures {args.best_metric!r}; one of {', '.join(known)}")


def ptx_blocks(source: Source, encoder: ChatEncoder, args: PPOArguments) -> list[Block]:
    """Documents packed for the language-modelling loss beside PPO's (A33)."""
    texts = [record["text"] for record in source.records]
    return pack_documents(document_ids(encoder.tokenizer, texts), args.ptx_block_tokens)


def prompt_batch(records: list[Record], rollout: int, args: PPOArguments) -> list[Record]:
    """The prompts of one rollout: a function of the rollout's number alone."""
    n = args.prompts_per_rollout
    return [records[i] for i in endless(len(records), rollout * n, n, args.seed)]


def build_roles(
    args: PPOArguments, parent: Parent, rewards: list[Parent], encoder: ChatEncoder, device: torch.device
) -> Roles:
    """The networks of the recipe's `roles:`, checked against the recipe's lengths and stop tokens."""
    stop_ids = stop_token_ids(args, encoder)
    bf16 = resolve_precision(args.precision)

    def wrap(model: Any) -> PolicyModel:
        never = forbidden_ids(encoder.tokenizer, model.get_output_embeddings().weight.shape[0])
        forbidden = [token for token in never if token not in stop_ids]  # a special token may be a stop token
        return PolicyModel(model, args.temperature, forbidden).to(device)

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)

    policy = load_causal_lm(parent.path, args.quantization)
    tokens = args.max_prompt_tokens + args.max_response_tokens
    refuse_beyond_context(policy.config, tokens, "max_prompt_tokens + max_response_tokens")
    roles: Roles
    if args.roles == "adapters":
        adapter = next((reward for reward in rewards if read_adapter(reward.path)), None)
        if adapter:
            refuse_other_base(adapter, parent)
        init = args.value_init != "policy" and adapter is not None
        if args.value_init == "reward" and not init:
            raise UserError("value_init: reward with `roles: adapters` needs a reward model trained with `lora:`")
        roles = AdapterRoles(
            policy, args.lora, wrap, autocast, parent.path, adapter.path if adapter else None, init
        ).to(device)
    elif args.roles == "shared_trunk":
        roles = SharedTrunkRoles(policy, load_causal_lm(parent.path), wrap, autocast)
        roles.head.to(device)
    else:
        value = load_value(args, parent, rewards, encoder)
        roles = SeparateRoles(policy, load_causal_lm(parent.path), value, wrap, autocast)
        roles.value.to(device)
    if bf16 and device.type != "cpu" and isinstance(roles, SeparateRoles | SharedTrunkRoles):
        hold_in_bf16(roles.reference)  # a CPU samples in fp32
    prepared = [prepare(model) for model in roles.networks()]
    roles.packed = all(prepared)
    if not roles.packed:
        logger.info("ppo: %s takes padded rows only; its padding is computed too", type(policy).__name__)
    roles.policy.refuse_transformed_logits()
    return roles


def refuse_other_base(reward: Parent, policy: Parent) -> None:
    """A reward adapter belongs to the base that it was trained on."""
    lineage = read_lineage(Path(reward.path)) or {}
    bases = [base.get("weights_sha256") for base in lineage.get("parents", [])]
    if policy.weights_sha256 not in bases:
        raise UserError(
            f"roles: adapters: the reward adapter in {reward.path!r} was trained on another base than the policy "
            f"{policy.path!r}; train the reward from that parent, or say `roles: separate`"
        )


def load_value(args: PPOArguments, parent: Parent, rewards: list[Parent], encoder: ChatEncoder) -> Any:
    """A value network: the reward model's copy (S20), or the policy's trunk with a zero head (Z19)."""
    if args.value_init != "policy" and rewards:
        same = tokenizer_hashes(load_tokenizer(rewards[0].path))[0] == tokenizer_hashes(encoder.tokenizer)[0]
        if same:
            return load_scalar_model(rewards[0].path)
        if args.value_init == "reward":
            raise UserError(
                "value_init: reward needs the policy's tokenizer, the reward model has another; say `value_init: policy`"
            )
        logger.info("ppo: the reward model has another tokenizer; the value network starts from the policy")
    return zero_value(parent.path, encoder.tokenizer.pad_token_id, args.seed)


def stop_token_ids(args: PPOArguments, encoder: ChatEncoder) -> list[int]:
    return [encoder.eos_id, *(_token_id(encoder, token) for token in args.stop_tokens)]


class Loop:
    """What one rollout does with roles, scores and two optimizers; evaluation and state."""

    def __init__(
        self,
        run: Run[PPOArguments],
        accelerator: Accelerator,
        roles: Roles,
        encoder: ChatEncoder,
        scorer: Scorer,
        judges: list[tuple[str, str, Any]],
        blocks: list[Block],
        state: State,
    ):
        self.run, self.args, self.accelerator, self.roles = run, run.args, accelerator, roles
        self.encoder, self.scorer, self.judges, self.blocks, self.state = encoder, scorer, judges, blocks, state
        args = self.args
        self.stop_ids = stop_token_ids(args, encoder)
        self.engine = LocalEngine(
            args.max_response_tokens,
            self.stop_ids,
            encoder.tokenizer.pad_token_id,
            roles.policy.forbidden.tolist(),
            args.temperature,
            args.generation_rows,
        )
        adam: dict[str, Any] = {"betas": (0.9, args.adam_beta2), "eps": args.adam_epsilon, "weight_decay": 0.0}
        value_lr = args.learning_rate if args.value_learning_rate is None else args.value_learning_rate
        self.peaks = {"policy": args.learning_rate, "value": value_lr}
        self.schedules = {"policy": args.lr_schedule, "value": args.value_lr_schedule or args.lr_schedule}
        self.optimizers = {
            name: torch.optim.AdamW(parameters, lr=self.peaks[name], fused=True, **adam)
            for name, parameters in roles.trained.items()
        }
        self.ema = [p.detach().clone() for p in roles.trained["policy"]] if args.ema_decay is not None else None
        self.reference_answers: dict[int, list[dict[str, Any]]] = {}

    # ------------------------------------------------------------------------------------------ rollout

    def collect(self, records: list[Record], seed: int, number: int) -> tuple[Rollout, dict[str, float]]:
        """Sample, score and prepare one rollout; every process gets the whole of it."""
        start = time.perf_counter()
        uniforms = row_uniforms(seed * 1_000_003 + number, range(len(records)), self.args.max_response_tokens)
        mine = list(range(len(records)))[self.run.processes.rank :: self.run.processes.count]
        responses = self.sample("policy", records, mine, uniforms)
        generated = time.perf_counter()
        answers = self.run.processes.gather(lambda: self.answers(records, mine, responses, with_values=True))
        answers.sort(key=lambda answer: answer["row"])
        rollout = self.assemble(records, answers)
        figures = {"score": self.scores(answers).mean().item(), **rollout_figures(rollout)}
        for name in answers[0]["parts"]:
            figures[f"score_{name}"] = sum(a["parts"][name] for a in answers) / len(answers)
        figures |= {"seconds_generate": generated - start, "seconds_score": time.perf_counter() - generated}
        return rollout, figures

    def sample(self, role: str, records: list[Record], rows: list[int], uniforms: Tensor) -> list[list[int]]:
        if not rows:
            return []
        with self.sampling_precision(), self.roles.sampler(role) as model:
            return self.engine.responses(model, [records[i]["ids"] for i in rows], uniforms[rows])

    def sampling_precision(self) -> Any:
        """A CPU samples in fp32 always: a token at a time, bf16 is slower there."""
        return contextlib.nullcontext() if self.accelerator.device.type == "cpu" else self.roles.autocast()

    @torch.no_grad()
    def answers(
        self, records: list[Record], rows: list[int], responses: list[list[int]], with_values: bool
    ) -> list[dict[str, Any]]:
        """Score each response, and its tokens' log-probabilities and values; plain lists, to be gathered."""
        if not rows:
            return []
        mine = [records[i] for i in rows]
        with self.roles.autocast():
            scored = self.scorer(
                [r["prompt"] for r in mine], [r["ids"] for r in mine], responses, [r["row"] for r in mine]
            )
        answers = [
            {
                "row": row,
                "response": response,
                "score": scored.scores[i].item(),
                "parts": {k: v[i].item() for k, v in scored.parts.items()},
            }
            for i, (row, response) in enumerate(zip(rows, responses, strict=True))
        ]
        lengths = [len(r["ids"]) + len(a) for r, a in zip(mine, responses, strict=True)]
        extra = self.args.score_position == "after"
        for group in microbatches(lengths, list(range(len(rows))), 4 * self.args.micro_batch_tokens):
            batch = self.tensors([mine[i]["ids"] for i in group], [responses[i] for i in group])
            found = {name: values.tolist() for name, values in self.roles.measure(batch, with_values).items()}
            for k, i in enumerate(group):
                n = len(responses[i])
                answers[i] |= {name: rows[k][: n + int(extra and name == "values")] for name, rows in found.items()}
        size = self.roles.parameters
        self.state.flops += 2.0 * sum(lengths) * self.run.processes.count * sum(size.values())
        return answers

    def assemble(self, records: list[Record], answers: list[dict[str, Any]]) -> Rollout:
        """The rollout's tensors, its scores as they are trained, rewards and advantages."""
        args = self.args
        responses = [answer["response"] for answer in answers]
        shape = response_mask_of(responses, args.score_position).shape
        tensors = {name: torch.zeros(shape) for name in ("logprobs", "ref_logprobs", "values")}
        for i, answer in enumerate(answers):
            for name, tensor in tensors.items():
                tensor[i, : len(answer[name])] = torch.tensor(answer[name])
        scores = self.scores(answers)
        if args.scale_scores == "running":
            self.state.moments.update(scores)
            scores = scores / self.state.moments.std
        if args.score_clip is not None:
            scores = scores.clamp(-args.score_clip, args.score_clip)
        shaping = Shaping(
            self.state.kl_coef,
            args.kl_estimator,
            args.score_position,
            args.whiten_rewards,
            args.whiten_advantages,
            args.gamma,
            args.gae_lambda,
        )
        return assemble(
            [r["ids"] for r in records], responses, self.stopped(answers), scores, **tensors, shaping=shaping
        )

    def stopped(self, answers: list[dict[str, Any]]) -> Tensor:
        return torch.tensor([answer["response"][-1] in self.stop_ids for answer in answers])

    def scores(self, answers: list[dict[str, Any]]) -> Tensor:
        """(answers,) scores after the rule for responses without a stop token, in the reward's own units."""
        raw = torch.tensor([answer["score"] for answer in answers])
        return missing_eos_scores(raw, self.stopped(answers), self.args.missing_eos, self.args.missing_eos_score)

    # ------------------------------------------------------------------------------------------ update

    def update(self, rollout: Rollout, kl: float) -> dict[str, float]:
        """`ppo_epochs` × `minibatches` steps of each network on one rollout.

        Args:
            kl: the rollout's KL from the reference, nats a response, which an adaptive kl_coef follows.
        """
        args, state, start = self.args, self.state, time.perf_counter()
        figures = {"kl_coef": state.kl_coef}
        for name, optimizer in self.optimizers.items():
            factor = lr_factor(
                state.rollout,
                args.total_rollouts,
                self.schedules[name],
                args.warmup_rollouts,
                warmup_from=args.warmup_from,
            )
            figures[f"{name}_lr"] = self.peaks[name] * factor
            for group in optimizer.param_groups:
                group["lr"] = self.peaks[name] * factor
        train_policy = state.rollout >= args.value_warmup_rollouts
        steps: list[dict[str, float]] = []
        epochs = 0
        for epoch in range(args.ppo_epochs):
            taken = [
                self.step(rollout, rows, train_policy) for rows in self.minibatches(len(rollout.response_ids), epoch)
            ]
            steps, epochs = steps + taken, epochs + 1
            moved = sum(step["update_kl"] for step in taken) / len(taken) if train_policy else 0.0
            if args.max_update_kl is not None and moved > args.max_update_kl:
                break
        figures |= {key: sum(step[key] for step in steps) / len(steps) for key in steps[0]}
        figures |= {"epochs": epochs, "seconds_update": time.perf_counter() - start}
        if train_policy:
            figures["ratio_first_minibatch"] = steps[0]["ratio_max_log"]
        if self.ema is not None and train_policy:
            with torch.no_grad():
                for average, parameter in zip(self.ema, self.roles.trained["policy"], strict=True):
                    average.lerp_(parameter, 1 - (args.ema_decay or 0.0))
        if args.kl_control == "adaptive" and train_policy:
            state.kl_coef = adapt_kl_coef(state.kl_coef, kl, args.kl_target, len(rollout.response_ids), args.kl_horizon)
        return figures

    def minibatches(self, rows: int, epoch: int) -> Iterator[list[int]]:
        """Row numbers of each optimizer step of an epoch, the same in every process."""
        size = rows // self.args.minibatches
        order = seeded_order((self.args.seed * 1_000_003 + self.state.rollout) * 1_009 + epoch, rows)
        for start in range(0, rows, size):
            yield order[start : start + size]

    def step(self, rollout: Rollout, rows: list[int], train_policy: bool) -> dict[str, float]:
        """One optimizer step of policy and value, each clipped by its own norm."""
        trained = ("policy", "value") if train_policy else ("value",)
        figures = self.backward(rollout, rows, train_policy)
        if self.blocks and train_policy:
            figures["ptx_loss"] = self.ptx_backward(len(rows))
        self.run.processes.sum_gradients(p for name in trained for p in self.roles.trained[name])
        if not all(map(math.isfinite, figures.values())):
            self.refuse_nonfinite(rollout, rows, "the loss")
        for name in trained:
            norm = nn.utils.clip_grad_norm_(self.roles.trained[name], self.args.max_grad_norm)
            if not torch.isfinite(norm):
                self.refuse_nonfinite(rollout, rows, f"{name}'s gradient")
            self.optimizers[name].step()
            self.optimizers[name].zero_grad()
            figures[f"{name}_grad_norm"] = norm.item()
        self.state.policy_steps += train_policy
        self.state.value_steps += 1
        return figures

    def backward(self, rollout: Rollout, rows: list[int], train_policy: bool = True) -> dict[str, float]:
        """Accumulate this process's part of one minibatch's gradients.

        Losses are means over the minibatch's tokens in all processes, however it is cut into micro-batches (A28).

        Returns:
            the minibatch's figures, over all processes.
        """
        args = self.args
        tokens, value_tokens = int(rollout.response_mask[rows].sum()), int(rollout.value_mask[rows].sum())
        kl_loss_coef = 0.0
        if args.kl_estimator == "k2":  # in the units that whitening gave the advantages
            kl_loss_coef = self.state.kl_coef / ((rollout.advantage_std + 1e-8) if args.whiten_advantages else 1.0)
        mine = rows[self.run.processes.rank :: self.run.processes.count]
        lengths = [len(p) + len(r) for p, r in zip(rollout.prompt_ids, rollout.response_ids, strict=True)]
        sums: dict[str, float] = {}
        largest = 0.0
        for group in microbatches(lengths, mine, args.micro_batch_tokens):
            batch = self.tensors([rollout.prompt_ids[i] for i in group], [rollout.response_ids[i] for i in group])
            width, mask = batch["tokens"].shape[1], batch["mask"]
            old = {
                name: getattr(rollout, name)[group, :width].to(mask.device)
                for name in ("logprobs", "ref_logprobs", "values", "advantages", "returns", "value_mask")
            }
            for found in self.roles.passes(batch, train_policy):
                shares = self.learn(found, old, mask, tokens, value_tokens, kl_loss_coef)
                largest = max(largest, shares.pop("ratio_max_log", 0.0))
                sums |= {name: sums.get(name, 0.0) + share for name, share in shares.items()}
        names = (*(POLICY_FIGURES if train_policy else ()), *VALUE_FIGURES)
        totals = torch.tensor([sums.get(name, 0.0) for name in names], dtype=torch.float64)
        totals = self.run.processes.sum(totals)
        largest = self.run.processes.max(torch.tensor([largest], dtype=torch.float64)).item()
        trained = self.roles.parameters["policy"] * train_policy + self.roles.parameters["value"]
        self.state.flops += 6.0 * sum(lengths[i] for i in rows) * trained
        figures = dict(zip(names, totals.tolist(), strict=True))
        return {**figures, "ratio_max_log": largest} if train_policy else figures

    def learn(
        self, found: Batch, old: Batch, mask: Tensor, tokens: int, value_tokens: int, kl_loss_coef: float
    ) -> dict[str, float]:
        """Gradients of one pass over a micro-batch; returns its share of the minibatch's figures.

        Args:
            found: what the pass gave; old: what the rollout has; (rows, width) each, as is mask, bool.
            tokens, value_tokens: of the minibatch, in all processes.
        """
        args = self.args
        loss = torch.zeros((), device=mask.device)
        parts: dict[str, Tensor] = {}
        shares: dict[str, Tensor] = {}
        if "logprobs" in found:
            logprobs = found["logprobs"]
            losses, clipped = policy_losses(logprobs, old["logprobs"], old["advantages"], args.clip_range)
            loss = loss + masked_sum(losses, mask) / tokens
            if kl_loss_coef:
                loss = loss + kl_loss_coef * masked_sum(k2(logprobs, old["ref_logprobs"]), mask) / tokens
            log_ratio = torch.where(mask, logprobs.detach() - old["logprobs"], 0.0)
            shares["ratio_max_log"] = log_ratio.abs().max().double()
            parts |= {"policy_loss": losses, "clip_fraction": clipped, "entropy": found["entropy"]}
            parts |= {"ratio": log_ratio.exp(), "update_kl": k3(old["logprobs"] + log_ratio, old["logprobs"])}
        if "values" in found:
            value_loss, value_clipped = value_losses(
                found["values"], old["values"], old["returns"], args.value_clip_range
            )
            loss = loss + args.vf_coef * masked_sum(value_loss, old["value_mask"]) / value_tokens
            parts |= {"value_loss": value_loss, "value_clip_fraction": value_clipped}
        loss.backward()
        for name, part in parts.items():
            counted, count = (old["value_mask"], value_tokens) if name in VALUE_FIGURES else (mask, tokens)
            shares[name] = masked_sum(part.detach().double(), counted) / count
        return dict(zip(shares, torch.stack(list(shares.values())).tolist(), strict=True))  # one copy from the device

    def ptx_backward(self, prompts: int) -> float:
        """Gradients of ptx_coef × the mean negative log-likelihood of pretraining tokens (A33, I22), added to PPO's.

        The mean is over the tokens of this step's blocks in all processes; returns it.
        """
        args = self.args
        number = max(1, round(args.ptx_ratio * prompts))
        chosen = endless(len(self.blocks), self.state.policy_steps * number, number, args.seed + 1)
        collate = BlockCollator(self.encoder.tokenizer.pad_token_id)
        tokens = int((collate([self.blocks[i] for i in chosen])["labels"][:, 1:] != IGNORE).sum())
        mine = chosen[self.run.processes.rank :: self.run.processes.count]
        total = torch.zeros(1, dtype=torch.float64)
        for group in microbatches([len(b["input_ids"]) for b in self.blocks], mine, args.micro_batch_tokens):
            batch = {k: v.to(self.accelerator.device) for k, v in collate([self.blocks[i] for i in group]).items()}
            with self.roles.autocast():
                nll = self.roles.policy.text_nll(batch["input_ids"], batch["position_ids"], batch["labels"])
            (args.ptx_coef * nll / tokens).backward()
            total += nll.detach().double().cpu()
        self.state.flops += 6.0 * tokens * self.roles.parameters["policy"]
        return self.run.processes.sum(total / tokens).item()

    def refuse_nonfinite(self, rollout: Rollout, rows: list[int], what: str) -> None:
        path = Path(self.args.output_dir) / "nonfinite_batch.pt"
        if self.run.is_main:
            torch.save({"rows": rows, **vars(rollout)}, path)
        raise RuntimeError(
            f"{what} is not finite at rollout {self.state.rollout}; the rollout was saved to {path}, "
            "the last checkpoint is as it was"
        )

    def tensors(self, prompt_ids: list[list[int]], response_ids: list[list[int]]) -> Batch:
        """The input of a micro-batch, and where its responses are read (see `PolicyModel.forward`)."""
        mask = response_mask_of(response_ids, self.args.score_position)
        prompts = torch.tensor([len(p) for p in prompt_ids])[:, None]
        lengths = torch.tensor([len(r) for r in response_ids])[:, None]
        last = lengths - int(self.args.score_position == "last")  # "after": the state at the last token has a value too
        tokens = right_pad(response_ids, 0)
        rows = [p + r for p, r in zip(prompt_ids, response_ids, strict=True)]
        device = self.accelerator.device
        batch = lay_out(rows, self.encoder.tokenizer.pad_token_id, self.roles.packed, worth_on(device))
        within = prompts - 1 + torch.minimum(torch.arange(mask.shape[1])[None], last)
        batch |= {
            "positions": batch["starts"][:, None] + within,
            "tokens": nn.functional.pad(tokens, (0, mask.shape[1] - tokens.shape[1])),
            "mask": mask,
        }
        placed: Batch = send_to_device(batch, device)
        return placed

    # ------------------------------------------------------------------------------------------ evaluation

    def evaluation(self, records: list[Record]) -> tuple[dict[str, float], str | None]:
        """An evaluation during training: figures, samples on file and in the log, the best so far; and why to end, if so."""
        args, state = self.args, self.state
        figures, samples = self.evaluate(records)
        if self.run.is_main:
            folder = Path(args.output_dir) / "samples"
            folder.mkdir(exist_ok=True)
            write_json(folder / f"rollout-{state.rollout:06d}.json", samples)
            log_samples(self.accelerator.trackers, samples, state.rollout)
            for sample in samples[:SHOWN]:
                logger.info(
                    "ppo sample: %s → %s (%.2f)",
                    shorten(sample["prompt"], 60),
                    shorten(sample["response"], 120),
                    sample["score"],
                )
        if args.best_metric is not None:
            found = figures[f"eval_{args.best_metric}"]
            if state.best is None or found > state.best:
                state.best, state.best_rollout, state.evaluations_since_best = found, state.rollout, 0
                if self.run.is_main:
                    path = Path(args.output_dir) / BEST
                    torch.save(self.roles.state(), path.with_suffix(".tmp"))
                    os.replace(path.with_suffix(".tmp"), path)
            else:
                state.evaluations_since_best += 1
        if args.stop_kl is not None and figures["eval_kl"] > args.stop_kl:
            return figures, f"a KL of {figures['eval_kl']:.2f} nats exceeds stop_kl ({args.stop_kl:g})"
        if args.patience is not None and state.evaluations_since_best >= args.patience:
            return figures, f"{args.patience} evaluations without a better {args.best_metric}"
        return figures, None

    def take_best(self) -> None:
        """Back to the best evaluation's networks, where the recipe asks for that."""
        if self.state.best_rollout is None:
            return
        self.run.processes.barrier()
        path = Path(self.args.output_dir) / BEST
        self.roles.load_state(torch.load(path, map_location="cpu", weights_only=True))
        self.run.processes.barrier()
        if self.run.is_main:
            path.unlink()

    def evaluate(self, records: list[Record]) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Held-out prompts answered by policy and reference with the same random numbers: score, KL, length, samples."""
        uniforms = row_uniforms(EVALUATION + self.args.seed, range(len(records)), self.args.max_response_tokens)
        mine = list(range(len(records)))[self.run.processes.rank :: self.run.processes.count]
        flops = self.state.flops  # evaluation is no training
        found = {}
        for role in ("policy", "reference"):
            if role == "reference" and len(records) in self.reference_answers:  # it never changes
                found[role] = self.reference_answers[len(records)]
                continue
            responses = self.sample(role, records, mine, uniforms)
            answers = self.run.processes.gather(partial(self.answers, records, mine, responses, with_values=False))
            found[role] = sorted(answers, key=lambda answer: answer["row"])
        self.reference_answers[len(records)] = found["reference"]
        self.state.flops = flops
        policy = found["policy"]
        n = len(policy)
        metrics = {
            "eval_score": self.scores(policy).mean().item(),
            "eval_reference_score": self.scores(found["reference"]).mean().item(),
            "eval_kl": sum(sum(a["logprobs"]) - sum(a["ref_logprobs"]) for a in policy) / n,
            "eval_response_tokens": sum(len(a["response"]) for a in policy) / n,
            "eval_reference_response_tokens": sum(len(a["response"]) for a in found["reference"]) / n,
            "eval_stopped": self.stopped(policy).float().mean().item(),
            "eval_prompts": n,
        }
        for part in policy[0]["parts"]:
            metrics[f"eval_score_{part}"] = sum(a["parts"][part] for a in policy) / n
        texts, reference_texts = (self.encoder.texts([a["response"] for a in found[name]]) for name in found)
        for label, judge, function in self.judges:
            asked = [records[a["row"]] for a in policy]
            verdicts = call_function(
                function, judge, [r["prompt"][-1]["content"] for r in asked], texts, [r["row"] for r in asked]
            )
            metrics[f"eval_{label}"] = sum(verdicts) / n
        samples = [
            {
                "prompt": records[a["row"]]["prompt"][-1]["content"],
                "response": texts[i],
                "reference_response": reference_texts[i],
                "score": a["score"],
                "reference_score": b["score"],
            }
            for i, (a, b) in enumerate(list(zip(policy, found["reference"], strict=True))[:32])
        ]
        return metrics, samples

    # ------------------------------------------------------------------------------------------ state

    def save(self) -> None:
        """A resumable checkpoint at a rollout's boundary, written beside and renamed in."""
        random = gather_object([torch.get_rng_state()])
        if self.run.is_main:
            target = self.run.output.folder / f"checkpoint-{self.state.rollout}"
            with writing(target) as folder:
                tensors = {
                    "roles": self.roles.state(),
                    **{name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
                    "ema": self.ema,
                    "random": random,
                }
                torch.save(tensors, folder / "tensors.pt")
                write_json(folder / "state.json", asdict(self.state))
                self.run.output.seal(folder)
            self.run.output.prune(self.args.keep_checkpoints)
        self.run.processes.barrier()

    def load(self, checkpoint: Path) -> None:
        saved = torch.load(checkpoint / "tensors.pt", map_location="cpu", weights_only=True)
        self.roles.load_state(saved["roles"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(saved[name])
        if self.ema is not None:
            for average, tensor in zip(self.ema, saved["ema"], strict=True):
                average.copy_(tensor)
        if len(saved["random"]) == self.run.processes.count:
            torch.set_rng_state(saved["random"][self.run.processes.rank])

    def save_final(self, folder: Path) -> None:
        model = self.roles.policy.model
        model.generation_config.update(
            do_sample=True,
            temperature=self.args.temperature,
            max_new_tokens=self.args.max_response_tokens,
            eos_token_id=self.stop_ids,
            pad_token_id=self.encoder.tokenizer.pad_token_id,
        )
        targets = [(folder, self.roles.save_policy), (folder / "value", self.roles.save_value)]
        for target, save in targets:
            save(target)
            self.encoder.tokenizer.save_pretrained(target)
        model.generation_config.save_pretrained(folder)
        if self.ema is not None:
            trained = self.roles.trained["policy"]
            kept = [p.detach().clone() for p in trained]
            with torch.no_grad():
                for parameter, average in zip(trained, self.ema, strict=True):
                    parameter.copy_(average)
                self.roles.save_policy(folder / "ema")
                for parameter, weights in zip(trained, kept, strict=True):
                    parameter.copy_(weights)
            self.encoder.tokenizer.save_pretrained(folder / "ema")
            model.generation_config.save_pretrained(folder / "ema")


def _token_id(encoder: ChatEncoder, token: str) -> int:
    ids = encoder.tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise UserError(f"stop_tokens: {token!r} is {len(ids)} tokens of this tokenizer; a stop token is one")
    return int(ids[0])


def log(run: Run[PPOArguments], accelerator: Accelerator, rollout: int, figures: dict[str, float]) -> None:
    if run.is_main:
        history.append(run.output.folder, {"step": rollout, **{k: round(v, 8) for k, v in figures.items()}})
        read = ("score", "kl", "response_tokens", "episodes_per_second", "eval_score", "eval_kl")
        shown = ", ".join(f"{name} {figures[name]:.3f}" for name in read if name in figures)
        logger.info("ppo rollout %d/%d: %s", rollout, run.args.total_rollouts, shown)
    accelerator.log(figures, step=rollout)


if __name__ == "__main__":
    launch("ppo", PPOArguments, main)
