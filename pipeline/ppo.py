"""Stage 4: PPO against a score, with a KL penalty to the SFT model. Our own loop on Accelerate.

    accelerate launch pipeline/ppo.py --config recipes/demo/ppo.yaml

One rollout: sample a response to each prompt → score it → log-probabilities of policy and reference, values → rewards
shaped by KL → advantages → `ppo_epochs` × `minibatches` optimizer steps of policy and value → log → save.
Every process holds the whole rollout and takes its rows of each minibatch, so statistics are global by construction.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.algorithms.kl import k1, k3
from pipeline.algorithms.masking import masked_sum, whiten
from pipeline.algorithms.ppo import compute_gae, missing_eos_scores, policy_losses, shape_rewards, value_losses
from pipeline.algorithms.schedules import lr_factor
from pipeline.arguments import PPOArguments
from pipeline.checkpoints import Parent, tokenizer_hashes, verify_parent, write_json, writing
from pipeline.data.collators import right_pad
from pipeline.data.encoding import ChatEncoder, forbidden_ids
from pipeline.data.records import Record
from pipeline.data.sources import Source, fingerprint, read_sources
from pipeline.data.splits import split_records, spread
from pipeline.errors import UserError, shorten
from pipeline.metrics import history
from pipeline.models.loading import disable_dropout, load_causal_lm, load_tokenizer, require_pad, resolve_precision
from pipeline.models.roles import PolicyModel
from pipeline.models.scalar_head import ValueModel, init_head, load_scalar_model
from pipeline.rollout import Rollout, generate, row_uniforms
from pipeline.scoring import Scorer, build_scorer, call_function, identity, import_function, judge_labels, source_sha256
from pipeline.stage import Run, launch

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import DistributedDataParallelKwargs, gather_object, set_seed
from torch import Tensor, nn
from tqdm.auto import tqdm

logger = logging.getLogger("pipeline.ppo")  # __name__ is __main__ under accelerate launch
SUPPORTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
EVALUATION = 2**31  # seeds of evaluation samples lie apart from those of training


@dataclass
class State:
    """What a checkpoint keeps beside tensors."""

    rollout: int = 0
    policy_steps: int = 0
    value_steps: int = 0
    flops: float = 0.0


def main(run: Run[PPOArguments]) -> None:
    args = run.args
    bf16 = resolve_precision(args.precision)
    # Buffers never change; broadcasting them would come in another order on a rank with more micro-batches.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = Accelerator(
        mixed_precision="no",
        log_with=args.trackers or None,
        cpu=not torch.cuda.is_available(),
        kwargs_handlers=[ddp],
    )
    refuse_backend(accelerator, args)
    parent = verify_parent(args.parent, ("sft", "ppo"))
    sources = read_sources(args.datasets, "prompt", args.data_root)
    eval_sources = read_sources(args.eval_datasets, "prompt", args.data_root)

    tokenizer = load_tokenizer(parent.path)
    parent.refuse_other_tokenizer(tokenizer)
    require_pad(tokenizer, args.parent)
    encoder = ChatEncoder(tokenizer)
    scorer = build_scorer(args.reward, encoder, accelerator.device)
    judges = [(label, name, import_function(name)) for label, name in judge_labels(args.judges).items()]
    value_parent = next((part.parent for part in scorer.parts if part.parent), None)
    run.output.inputs = {
        "parent": parent.weights_sha256,
        "tokenizer": tokenizer_hashes(tokenizer),
        "reward": identity(args.reward),
        "judges": [source_sha256(function) for _, _, function in judges],
        "data": fingerprint([*sources, *eval_sources]),
    }
    if run.already_done():
        return

    train_prompts, eval_prompts = prompts(sources, eval_sources, encoder, args)
    checkpoint = run.output.resumable()
    state = State(**json.loads((checkpoint / "state.json").read_text())) if checkpoint else State()
    set_seed(args.seed)
    loop = Loop(run, args, accelerator, bf16, encoder, scorer, judges, parent, value_parent, checkpoint, state)
    resumed = run.begin(checkpoint)
    if args.trackers:
        accelerator.init_trackers(
            "rlhf-pipeline",
            config={k: str(v) for k, v in run.output.recipe.items()},
            init_kwargs={"wandb": {"name": args.run_name or f"{Path(args.output_dir).parent.name}-ppo"}},
        )

    bar = tqdm(
        total=args.total_rollouts, initial=state.rollout, desc="ppo", unit="rollout", disable=not run.show_progress
    )
    if args.eval_rollouts and state.rollout == 0:  # where every curve starts: policy = reference
        log(run, accelerator, 0, loop.evaluate(eval_prompts[: args.eval_prompts])[0])
    while state.rollout < args.total_rollouts:
        start = time.perf_counter()
        records = prompt_batch(train_prompts, state.rollout, args)
        rollout, figures = loop.collect(records, args.seed, state.rollout)
        figures |= loop.update(rollout)
        state.rollout += 1
        figures["seconds"] = time.perf_counter() - start
        figures["episodes_per_second"] = args.prompts_per_rollout / figures["seconds"]
        evaluated = args.eval_rollouts is not None and state.rollout % args.eval_rollouts == 0
        if evaluated:
            figures |= loop.evaluate(eval_prompts[: args.eval_prompts])[0]
        if evaluated or state.rollout % args.logging_steps == 0 or state.rollout == args.total_rollouts:
            log(run, accelerator, state.rollout, figures)
        bar.update()
        stop = run.interrupted()
        if state.rollout % args.save_steps == 0 and state.rollout < args.total_rollouts:
            loop.save(state)
        if stop:  # the last boundary checkpoint is what the next start resumes from
            run.leave_interrupted()

    bar.close()
    metrics, samples = loop.evaluate(eval_prompts)
    metrics = {key.removeprefix("eval_"): value for key, value in metrics.items()}
    metrics |= {
        "rollouts": state.rollout,
        "episodes": state.rollout * args.prompts_per_rollout,
        "policy_steps": state.policy_steps,
        "value_steps": state.value_steps,
        "kl_coef": args.kl_coef,
    }
    if run.is_main:
        loop.save_final(Path(args.output_dir))
        write_json(Path(args.output_dir) / "samples.json", samples)
    run.finish(
        parents=[parent.record(), *(part.parent.record() for part in scorer.parts if part.parent)],
        datasets=[s.provenance() for s in [*sources, *eval_sources]],
        tokenizer=tokenizer,
        metrics=metrics,
        flops=state.flops,
        resumed_from=resumed,
        summary=f"held-out reward {metrics['score']:.3f} (SFT {metrics['reference_score']:.3f}) at a KL of {metrics['kl']:.2f} nats, "
        f"{metrics['response_tokens']:.1f} tokens a response, {metrics['stopped']:.0%} stopped",
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


def prompt_batch(records: list[Record], rollout: int, args: PPOArguments) -> list[Record]:
    """The prompts of one rollout: seeded permutations of all prompts end to end, a function of the rollout's number alone."""
    batch, first = [], rollout * args.prompts_per_rollout
    orders: dict[int, list[int]] = {}
    for position in range(first, first + args.prompts_per_rollout):
        epoch, index = divmod(position, len(records))
        if epoch not in orders:
            generator = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
            orders[epoch] = torch.randperm(len(records), generator=generator).tolist()
        batch.append(records[orders[epoch][index]])
    return batch


def microbatches(lengths: list[int], rows: list[int], max_tokens: int) -> list[list[int]]:
    """Rows of similar length together, each group at most `max_tokens` with padding (one row at least)."""
    groups: list[list[int]] = []
    for row in sorted(rows, key=lambda r: (lengths[r], r)):
        if groups and lengths[row] * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


class Loop:
    """The four roles, two optimizers, and what one rollout does with them."""

    def __init__(
        self,
        run: Run[PPOArguments],
        args: PPOArguments,
        accelerator: Accelerator,
        bf16: bool,
        encoder: ChatEncoder,
        scorer: Scorer,
        judges: list[tuple[str, str, Any]],
        parent: Parent,
        value_parent: Parent | None,
        checkpoint: Path | None,
        state: State,
    ):
        self.run, self.args, self.accelerator, self.bf16 = run, args, accelerator, bf16
        self.encoder, self.scorer, self.judges, self.state = encoder, scorer, judges, state
        policy = load_causal_lm(str(checkpoint / "policy") if checkpoint else parent.path)
        reference = load_causal_lm(parent.path)
        limit = policy.config.get_text_config()
        self.stop_ids = [encoder.eos_id, *(_token_id(encoder, token) for token in args.stop_tokens)]
        never = forbidden_ids(encoder.tokenizer, policy.get_output_embeddings().weight.shape[0])
        self.forbidden = [token for token in never if token not in self.stop_ids]  # a special token may be a stop token
        context = getattr(limit, "max_position_embeddings", None)
        if context is not None and args.max_prompt_tokens + args.max_response_tokens > context:
            raise UserError(
                f"max_prompt_tokens + max_response_tokens ({args.max_prompt_tokens} + {args.max_response_tokens}) "
                f"exceed the model's context of {context}"
            )
        value = load_value(args, parent, value_parent, checkpoint, encoder)
        for model in (policy, reference, value):
            disable_dropout(model)
        self.reference = (
            PolicyModel(reference, args.temperature, self.forbidden).to(accelerator.device).eval().requires_grad_(False)
        )
        self.reference.refuse_transformed_logits()
        policy_model, value_model = PolicyModel(policy, args.temperature, self.forbidden), ValueModel(value)
        adam: dict[str, Any] = {"betas": (0.9, args.adam_beta2), "eps": args.adam_epsilon, "weight_decay": 0.0}
        value_lr = args.learning_rate if args.value_learning_rate is None else args.value_learning_rate
        self.peaks = {"policy": args.learning_rate, "value": value_lr}
        policy_optimizer = torch.optim.AdamW(policy_model.parameters(), lr=args.learning_rate, **adam)
        value_optimizer = torch.optim.AdamW(value_model.parameters(), lr=value_lr, **adam)
        self.policy, self.value, self.policy_optimizer, self.value_optimizer = accelerator.prepare(
            policy_model.train(), value_model.train(), policy_optimizer, value_optimizer
        )
        if checkpoint:
            saved = torch.load(checkpoint / "optimizers.pt", map_location="cpu", weights_only=True)
            self.policy_optimizer.load_state_dict(saved["policy"])
            self.value_optimizer.load_state_dict(saved["value"])
            if len(saved["random"]) == run.processes:
                torch.set_rng_state(saved["random"][run.rank])
        self.parameters = {
            "policy": policy.num_parameters(exclude_embeddings=True),
            "value": value.num_parameters(exclude_embeddings=True),
        }

    # ------------------------------------------------------------------------------------------ rollout

    def collect(self, records: list[Record], seed: int, number: int) -> tuple[Rollout, dict[str, float]]:
        """Sample, score and prepare one rollout; every process gets the whole of it."""
        args = self.args
        start = time.perf_counter()
        uniforms = row_uniforms(seed * 1_000_003 + number, range(len(records)), args.max_response_tokens)
        mine = list(range(len(records)))[self.run.rank :: self.run.processes]
        responses = self.sample(self.accelerator.unwrap_model(self.policy).model, records, mine, uniforms)
        generated = time.perf_counter()
        answers = self.run.gather(lambda: self.answers(records, mine, responses, with_values=True))
        whole = sorted(answers, key=lambda answer: answer["row"])
        rollout = self.assemble(records, whole)
        figures = self.rollout_figures(rollout, whole)
        figures |= {"seconds_generate": generated - start, "seconds_score": time.perf_counter() - generated}
        return rollout, figures

    def sample(self, model: Any, records: list[Record], rows: list[int], uniforms: Tensor) -> list[list[int]]:
        responses: list[list[int]] = []
        with self.autocast():
            for start in range(0, len(rows), self.args.generation_rows):
                part = rows[start : start + self.args.generation_rows]
                responses += generate(
                    model,
                    [records[i]["ids"] for i in part],
                    uniforms[part],
                    max_new_tokens=self.args.max_response_tokens,
                    stop_ids=self.stop_ids,
                    pad_id=self.encoder.tokenizer.pad_token_id,
                    forbidden=self.forbidden,
                    temperature=self.args.temperature,
                )
        return responses

    @torch.no_grad()
    def answers(
        self, records: list[Record], rows: list[int], responses: list[list[int]], with_values: bool
    ) -> list[dict[str, Any]]:
        """Score each response, and its tokens' log-probabilities and values; plain lists, to be gathered."""
        if not rows:
            return []
        mine = [records[i] for i in rows]
        with self.autocast():
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
        for group in microbatches(lengths, list(range(len(rows))), 4 * self.args.micro_batch_tokens):
            batch = self.tensors([mine[i]["ids"] for i in group], [responses[i] for i in group])
            with self.autocast():
                logprobs, _ = self.accelerator.unwrap_model(self.policy)(**batch)
                ref_logprobs, _ = self.reference(**batch)
                values = (
                    self.accelerator.unwrap_model(self.value)(batch["input_ids"], batch["positions"])
                    if with_values
                    else logprobs
                )
            for k, i in enumerate(group):
                n = len(responses[i])
                answers[i] |= {
                    "logprobs": logprobs[k, :n].tolist(),
                    "ref_logprobs": ref_logprobs[k, :n].tolist(),
                    "values": values[k, :n].tolist(),
                }
        tokens = sum(lengths)
        self.state.flops += (
            2.0 * tokens * self.run.processes * (2 * self.parameters["policy"] + self.parameters["value"])
        )
        return answers

    def assemble(self, records: list[Record], answers: list[dict[str, Any]]) -> Rollout:
        """Tensors of the whole rollout, KL-shaped rewards, and advantages whitened over all its tokens."""
        args = self.args
        responses = [a["response"] for a in answers]
        mask = torch.zeros(len(answers), max(map(len, responses)), dtype=torch.bool)
        tensors = {name: torch.zeros(mask.shape) for name in ("logprobs", "ref_logprobs", "values")}
        for i, answer in enumerate(answers):
            n = len(answer["response"])
            mask[i, :n] = True
            for name, tensor in tensors.items():
                tensor[i, :n] = torch.tensor(answer[name])
        scores = self.scores(answers)
        rewards = shape_rewards(scores, tensors["logprobs"], tensors["ref_logprobs"], mask, args.kl_coef)
        advantages, returns = compute_gae(rewards, tensors["values"], mask, args.gamma, args.gae_lambda)
        return Rollout(
            [r["ids"] for r in records],
            responses,
            self.stopped(answers),
            scores,
            mask,
            **tensors,
            rewards=rewards,
            advantages=whiten(advantages, mask),
            returns=returns,
        )

    def stopped(self, answers: list[dict[str, Any]]) -> Tensor:
        return torch.tensor([answer["response"][-1] in self.stop_ids for answer in answers])

    def scores(self, answers: list[dict[str, Any]]) -> Tensor:
        """(answers,) scores after the rule for responses without a stop token: what is trained and what is reported."""
        raw = torch.tensor([answer["score"] for answer in answers])
        return missing_eos_scores(raw, self.stopped(answers), self.args.missing_eos, self.args.missing_eos_score)

    def rollout_figures(self, rollout: Rollout, answers: list[dict[str, Any]]) -> dict[str, float]:
        mask = rollout.response_mask
        kl_tokens = k1(rollout.logprobs, rollout.ref_logprobs)
        residual = torch.where(mask, rollout.returns - rollout.values, 0.0)[mask]
        spread = rollout.returns[mask].var()
        figures = {
            "score": rollout.scores.mean().item(),
            "reward": rollout.rewards.sum(1).mean().item(),
            "kl": torch.where(mask, kl_tokens, 0.0).sum(1).mean().item(),
            "kl_k3": torch.where(mask, k3(rollout.logprobs, rollout.ref_logprobs), 0.0).sum(1).mean().item(),
            "response_tokens": mask.sum(1).float().mean().item(),
            "stopped": rollout.stopped.float().mean().item(),
            "value_explained_variance": (1 - residual.var() / spread).item() if spread > 0 else 0.0,
        }
        for name in answers[0]["parts"]:
            figures[f"score_{name}"] = sum(a["parts"][name] for a in answers) / len(answers)
        return figures

    # ------------------------------------------------------------------------------------------ update

    def update(self, rollout: Rollout) -> dict[str, float]:
        """`ppo_epochs` × `minibatches` steps of each network on one rollout."""
        args, start = self.args, time.perf_counter()
        factor = lr_factor(self.state.rollout, args.total_rollouts, args.lr_schedule, args.warmup_rollouts)
        for optimizer, name in ((self.policy_optimizer, "policy"), (self.value_optimizer, "value")):
            for group in optimizer.param_groups:
                group["lr"] = self.peaks[name] * factor
        steps = [self.step(rollout, rows) for rows in self.minibatches(len(rollout.response_ids))]
        figures = {key: sum(step[key] for step in steps) / len(steps) for key in steps[0]}
        figures["ratio_first_minibatch"] = steps[0]["ratio_max_log"]
        figures |= {
            "policy_lr": self.peaks["policy"] * factor,
            "value_lr": self.peaks["value"] * factor,
            "seconds_update": time.perf_counter() - start,
        }
        return figures

    def minibatches(self, rows: int) -> Iterator[list[int]]:
        """Row numbers of each optimizer step, the same in every process."""
        size = rows // self.args.minibatches
        for epoch in range(self.args.ppo_epochs):
            generator = torch.Generator().manual_seed((self.args.seed * 1_000_003 + self.state.rollout) * 1_009 + epoch)
            order = torch.randperm(rows, generator=generator).tolist()
            for start in range(0, rows, size):
                yield order[start : start + size]

    def step(self, rollout: Rollout, rows: list[int]) -> dict[str, float]:
        """One optimizer step of policy and value; losses are means over the minibatch's tokens in all processes."""
        sums = self.backward(rollout, rows)
        norms = {}
        for name, model, optimizer in (
            ("policy", self.policy, self.policy_optimizer),
            ("value", self.value, self.value_optimizer),
        ):
            norm = nn.utils.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
            if not torch.isfinite(norm):
                self.refuse_nonfinite(rollout, rows, name)
            optimizer.step()
            optimizer.zero_grad()
            norms[f"{name}_grad_norm"] = norm.item()
        self.state.policy_steps += 1
        self.state.value_steps += 1
        return {**sums, **norms}

    def backward(self, rollout: Rollout, rows: list[int]) -> dict[str, float]:
        """Accumulate the gradients of one minibatch; returns its figures, reduced over processes."""
        args = self.args
        world = self.run.processes
        tokens = rollout.response_mask[rows].sum().item()
        mine = rows[self.run.rank :: world]
        lengths = [len(p) + len(r) for p, r in zip(rollout.prompt_ids, rollout.response_ids, strict=True)]
        groups = microbatches(lengths, mine, args.micro_batch_tokens)
        totals = torch.zeros(6, dtype=torch.float64)
        largest = 0.0
        for index, group in enumerate(groups):
            batch = self.tensors([rollout.prompt_ids[i] for i in group], [rollout.response_ids[i] for i in group])
            width, mask = batch["tokens"].shape[1], batch["mask"]
            old = {
                name: getattr(rollout, name)[group, :width].to(mask.device)
                for name in ("logprobs", "values", "advantages", "returns")
            }
            last = index == len(groups) - 1
            with _sync(self.accelerator, self.policy, last):
                with self.autocast():
                    logprobs, entropy = self.policy(**batch)
                losses, clipped = policy_losses(logprobs, old["logprobs"], old["advantages"], args.clip_range)
                # DDP averages over processes; the loss is a mean over the tokens of all of them.
                self.accelerator.backward(masked_sum(losses, mask) / tokens * world)
            with _sync(self.accelerator, self.value, last):
                with self.autocast():
                    values = self.value(batch["input_ids"], batch["positions"])
                value_loss, value_clipped = value_losses(values, old["values"], old["returns"], args.value_clip_range)
                self.accelerator.backward(args.vf_coef * masked_sum(value_loss, mask) / tokens * world)
            with torch.no_grad():
                log_ratio = torch.where(mask, logprobs - old["logprobs"], 0.0)
                largest = max(largest, log_ratio.abs().max().item())
                parts = (losses, clipped.float(), value_loss, value_clipped.float(), entropy, log_ratio.exp())
                totals += torch.stack([masked_sum(part.double(), mask) for part in parts]).cpu()
        totals, largest = self.reduce(totals, largest)
        self.state.flops += 6.0 * sum(lengths[i] for i in rows) * (self.parameters["policy"] + self.parameters["value"])
        names = ("policy_loss", "clip_fraction", "value_loss", "value_clip_fraction", "entropy", "ratio")
        return {**{name: (totals[k] / tokens).item() for k, name in enumerate(names)}, "ratio_max_log": largest}

    def reduce(self, totals: Tensor, largest: float) -> tuple[Tensor, float]:
        if self.run.processes == 1:
            return totals, largest
        gathered = self.accelerator.gather(
            torch.cat([totals, torch.tensor([largest], dtype=torch.float64)])[None].to(self.accelerator.device)
        ).cpu()
        return gathered[:, :-1].sum(0), gathered[:, -1].max().item()

    def refuse_nonfinite(self, rollout: Rollout, rows: list[int], name: str) -> None:
        path = Path(self.args.output_dir) / "nonfinite_batch.pt"
        if self.run.is_main:
            torch.save({"rows": rows, **vars(rollout)}, path)
        raise RuntimeError(
            f"{name}'s gradient is not finite at rollout {self.state.rollout}; the rollout was saved to {path}"
        )

    def tensors(self, prompt_ids: list[list[int]], response_ids: list[list[int]]) -> dict[str, Tensor]:
        """Right-padded inputs of a micro-batch, no longer than its longest row (see `PolicyModel.forward`)."""
        width = max(map(len, response_ids))
        starts = torch.tensor([len(p) for p in prompt_ids])[:, None]
        steps = torch.arange(width)[None]
        lengths = torch.tensor([len(r) for r in response_ids])[:, None]
        batch = {
            "input_ids": right_pad(
                [p + r for p, r in zip(prompt_ids, response_ids, strict=True)], self.encoder.tokenizer.pad_token_id
            ),
            "positions": starts - 1 + torch.minimum(steps, lengths - 1),
            "tokens": right_pad(response_ids, 0),
            "mask": steps < lengths,
        }
        return {key: value.to(self.accelerator.device) for key, value in batch.items()}

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.accelerator.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    # ------------------------------------------------------------------------------------------ evaluation and saving

    def evaluate(self, records: list[Record]) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Held-out prompts answered by policy and reference with the same random numbers: score, KL, length, samples."""
        uniforms = row_uniforms(EVALUATION + self.args.seed, range(len(records)), self.args.max_response_tokens)
        mine = list(range(len(records)))[self.run.rank :: self.run.processes]
        flops = self.state.flops  # evaluation is no training
        found = {}
        for name, model in (
            ("policy", self.accelerator.unwrap_model(self.policy).model),
            ("reference", self.reference.model),
        ):
            responses = self.sample(model, records, mine, uniforms) if mine else []
            answers = self.run.gather(partial(self.answers, records, mine, responses, with_values=False))
            found[name] = sorted(answers, key=lambda answer: answer["row"])
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

    def save(self, state: State) -> None:
        """A resumable checkpoint at a rollout's boundary, written beside and renamed in."""
        random = gather_object([torch.get_rng_state()])
        if self.run.is_main:
            target = self.run.output.folder / f"checkpoint-{state.rollout}"
            with writing(target) as folder:
                self.accelerator.unwrap_model(self.policy).model.save_pretrained(folder / "policy")
                self.accelerator.unwrap_model(self.value).model.save_pretrained(folder / "value")
                torch.save(
                    {
                        "policy": self.policy_optimizer.state_dict(),
                        "value": self.value_optimizer.state_dict(),
                        "random": random,
                    },
                    folder / "optimizers.pt",
                )
                write_json(folder / "state.json", asdict(state))
                self.run.output.seal(folder)
            self.run.output.prune(self.args.keep_checkpoints)
        self.run.barrier()

    def save_final(self, folder: Path) -> None:
        policy = self.accelerator.unwrap_model(self.policy).model
        policy.generation_config.update(
            do_sample=True,
            temperature=self.args.temperature,
            max_new_tokens=self.args.max_response_tokens,
            eos_token_id=self.stop_ids,
            pad_token_id=self.encoder.tokenizer.pad_token_id,
        )
        policy.save_pretrained(folder)
        self.encoder.tokenizer.save_pretrained(folder)
        self.accelerator.unwrap_model(self.value).model.save_pretrained(folder / "value")
        self.encoder.tokenizer.save_pretrained(folder / "value")


def load_value(
    args: PPOArguments, parent: Parent, value_parent: Parent | None, checkpoint: Path | None, encoder: ChatEncoder
) -> Any:
    """The value network: the reward model's copy (S20), or the policy's trunk with a zero head (Z19)."""
    if checkpoint:
        return load_scalar_model(str(checkpoint / "value"))
    if args.value_init == "reward":
        assert value_parent is not None
        if tokenizer_hashes(load_tokenizer(value_parent.path))[0] != tokenizer_hashes(encoder.tokenizer)[0]:
            raise UserError(
                "value_init: reward needs the policy's tokenizer, the reward model has another; say `value_init: policy`"
            )
        return load_scalar_model(value_parent.path)
    value = load_scalar_model(parent.path)
    value.config.get_text_config().pad_token_id = encoder.tokenizer.pad_token_id
    init_head(value, 0.0, args.seed)
    return value


def _token_id(encoder: ChatEncoder, token: str) -> int:
    ids = encoder.tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise UserError(f"stop_tokens: {token!r} is {len(ids)} tokens of this tokenizer; a stop token is one")
    return int(ids[0])


def _sync(accelerator: Accelerator, model: nn.Module, last: bool) -> Any:
    """Gradients are exchanged once a step, at the last micro-batch (accumulate() would do so at a loader's end too)."""
    import contextlib

    return contextlib.nullcontext() if last else accelerator.no_sync(model)


def log(run: Run[PPOArguments], accelerator: Accelerator, rollout: int, figures: dict[str, float]) -> None:
    if run.is_main:
        history.append(run.output.folder, {"step": rollout, **{k: round(v, 8) for k, v in figures.items()}})
        read = ("score", "kl", "response_tokens", "episodes_per_second", "eval_score", "eval_kl")
        shown = ", ".join(f"{name} {figures[name]:.3f}" for name in read if name in figures)
        logger.info("ppo rollout %d/%d: %s", rollout, run.args.total_rollouts, shown)
    accelerator.log(figures, step=rollout)


if __name__ == "__main__":
    launch("ppo", PPOArguments, main)
