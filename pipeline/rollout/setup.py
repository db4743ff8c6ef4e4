"""Start and end of a PPO run: open and verify inputs, build networks and rewards, save the result."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config.functions import import_function, source_sha256
from pipeline.config.ppo import PPOArguments
from pipeline.config.stages import REWARD_PARENTS, SUPPORT
from pipeline.data.collators import BlockCollator
from pipeline.data.encoded import encode_documents
from pipeline.data.encoding import ChatEncoder
from pipeline.data.mixing import mixture_indices
from pipeline.data.packing import Joined, pack_documents
from pipeline.data.sources import Source, fingerprint, read_sources
from pipeline.errors import UserError
from pipeline.models.adapter_networks import AdapterNetworks
from pipeline.models.build_networks import NetworkInputs, build_networks, check_same_base
from pipeline.models.precision import accelerator_type, device_plan
from pipeline.models.tokenizers import (
    assign_template,
    load_tokenizer,
    require_pad,
    set_stop_tokens,
    stop_token_ids,
    template_identity,
)
from pipeline.models.trials import isolates_packed_documents
from pipeline.rollout.collect import Collector
from pipeline.rollout.engine import LocalEngine, SamplingSettings
from pipeline.rollout.evaluation import Evaluation
from pipeline.rollout.pretraining import PretrainingText
from pipeline.rollout.prompts import PromptSet, prepare_prompts
from pipeline.rollout.rewards import DISAGREEMENT, ScoringSetup, build_scorer, identity, judge_labels, part_names
from pipeline.training.json_files import write_json
from pipeline.training.lineage import Parent, read_lineage, verify_parent
from pipeline.training.ppo_state import PPOState
from pipeline.training.run import Run

import numpy as np
import torch
from accelerate import Accelerator
from transformers import GenerationConfig

logger = logging.getLogger("pipeline.ppo")


@dataclass(frozen=True)
class PPOInputs:
    """The recipe's inputs, opened and verified.

    judges: names of Python judges by their labels. stop_ids: tokens that end a response.
    """

    accelerator: Accelerator
    parent: Parent
    rewards: list[Parent]
    sources: list[Source]
    eval_sources: list[Source]
    ptx_sources: list[Source]
    encoder: ChatEncoder
    prompts: PromptSet
    judges: dict[str, str]
    stop_ids: list[int] = field(default_factory=list)


def open_inputs(run: Run[PPOArguments]) -> PPOInputs:
    """Everything that can be refused before a model is loaded is refused here."""
    args = run.args
    accelerator = Accelerator(mixed_precision="no", log_with=args.trackers or None, cpu=accelerator_type() == "cpu")
    _check_processes(accelerator, args)
    parent = verify_parent(args.parent, SUPPORT["ppo"].parents)
    rewards = [verify_parent(source.model, REWARD_PARENTS) for source in args.reward if source.model is not None]
    sources = read_sources(args.datasets, "prompt", args.data_root, args.data_cache)
    eval_sources = read_sources(args.eval_datasets, "prompt", args.data_root, args.data_cache)
    ptx_sources = read_sources(args.ptx_datasets, "document", args.data_root, args.data_cache)
    tokenizer = load_tokenizer(parent.path)
    parent.check_tokenizer(tokenizer)
    has_template = tokenizer.chat_template or args.chat_template is not None  # else refused below
    if has_template and (note := assign_template(tokenizer, None, args.chat_template, args.output_dir)):
        logger.warning("ppo: %s", note)
    require_pad(tokenizer, args.parent)
    encoder = ChatEncoder(tokenizer)
    for note in encoder.notes:
        logger.warning("ppo: %s", note)
    judges = judge_labels(args.judges)
    _check_best_metric(args, list(judges))
    if args.roles == "adapters":
        for reward in rewards:
            check_same_base(reward.path, read_lineage(Path(reward.path)) or {}, parent.weights_sha256, parent.path)
    run.output.inputs = {
        "parent": parent.as_inputs(tokenizer),
        "chat_template": template_identity(args.chat_template),
        "reward": identity(args.reward),
        "judges": [source_sha256(import_function(name)) for name in judges.values()],
        "data": fingerprint([*sources, *eval_sources, *ptx_sources]),
    }
    prompts = prepare_prompts(sources, eval_sources, encoder, args)
    stop_ids = stop_token_ids(encoder, _generation_config(parent.path), args.stop_tokens)
    return PPOInputs(
        accelerator, parent, rewards, sources, eval_sources, ptx_sources, encoder, prompts, judges, stop_ids
    )


def _generation_config(path: str) -> GenerationConfig | None:
    return GenerationConfig.from_pretrained(path) if (Path(path) / "generation_config.json").is_file() else None


def _check_processes(accelerator: Accelerator, args: Any) -> None:
    processes = accelerator.num_processes
    if args.prompts_per_rollout % processes:
        raise UserError(
            f"prompts_per_rollout ({args.prompts_per_rollout}) must be a multiple of the {processes} processes"
        )
    minibatch = args.prompts_per_rollout // args.minibatches
    if minibatch < processes:
        raise UserError(f"a minibatch of {minibatch} prompts is less than one per process; lower minibatches")


def _check_best_metric(args: Any, judges: Sequence[str]) -> None:
    """Refuse a `best_metric` that no evaluation measures."""
    parts = [*part_names(args.reward), *([DISAGREEMENT] if args.ensemble != "sum" else [])]
    known = ["score", *judges, *(f"score_{part}" for part in parts)]
    if args.best_metric is not None and args.best_metric not in known:
        raise UserError(f"best_metric: no evaluation measures {args.best_metric!r}; one of {', '.join(known)}")


def prepare_collector(inputs: PPOInputs, run: Run[PPOArguments]) -> Collector:
    """Networks, engine and scorer on the device."""
    args, encoder, device = run.args, inputs.encoder, inputs.accelerator.device
    plan = device_plan(device.type, args.precision)
    networks = build_networks(
        NetworkInputs(args, inputs.parent.path, [reward.path for reward in inputs.rewards], encoder, inputs.stop_ids),
        plan,
        device,
    )
    loaded = (
        {networks.reward_path: networks.reward} if isinstance(networks, AdapterNetworks) and networks.reward else {}
    )
    setup = ScoringSetup(encoder, device, inputs.stop_ids, plan.autocast, plan.cast_frozen_to_bf16, loaded)
    settings = SamplingSettings(
        max_new_tokens=args.max_response_tokens,
        stop_ids=inputs.stop_ids,
        forbidden_ids=networks.policy.forbidden.tolist(),
        pad_id=encoder.tokenizer.pad_token_id,
        temperature=args.temperature,
        rows=args.generation_rows,
    )
    return Collector(
        args=args,
        processes=run.processes,
        encoder=encoder,
        networks=networks,
        engine=LocalEngine(settings),
        scorer=build_scorer(args.reward, setup, args.ensemble, args.ensemble_penalty),
        stop_ids=inputs.stop_ids,
        plan=plan,
        device=device,
    )


def prepare_pretraining(inputs: PPOInputs, collector: Collector) -> PretrainingText | None:
    """The blocks of `ptx_datasets`, or None without them."""
    if not inputs.ptx_sources:
        return None
    args, tokenizer = collector.args, inputs.encoder.tokenizer
    isolated = isolates_packed_documents(collector.networks.policy.model)
    parts = []
    for source in inputs.ptx_sources:
        documents = encode_documents(source.records, tokenizer)
        parts.append(pack_documents(documents, args.ptx_block_tokens, isolated=isolated))
    epoch = mixture_indices([len(part) for part in parts], [s.weight for s in inputs.ptx_sources], args.seed)
    return PretrainingText(
        blocks=Joined(parts),
        lengths=np.concatenate([part.lengths() for part in parts]),
        epoch=epoch,
        isolated=isolated,
        args=args,
        networks=collector.networks,
        plan=collector.plan,
        processes=collector.processes,
        collate=BlockCollator(tokenizer.pad_token_id),
        device=collector.device,
    )


def save_result(
    run: Run[PPOArguments],
    inputs: PPOInputs,
    collector: Collector,
    *,
    state: PPOState,
    evaluation: Evaluation,
    average: list[torch.Tensor] | None,
    resumed_from: list[int],
) -> None:
    """Weights, samples, metrics, lineage, and one line on the terminal.

    Args:
        average: moving average of the policy's parameters.
        resumed_from: rollouts at which the run was resumed.
    """
    args = run.args
    metrics: dict[str, Any] = {name.removeprefix("eval_"): value for name, value in evaluation.metrics.items()}
    metrics |= {
        "rollouts": state.rollout,
        "episodes": state.rollout * args.prompts_per_rollout,
        "policy_steps": state.policy_steps,
        "value_steps": state.value_steps,
        "kl_coef": state.kl_coef,
    }
    if state.best_rollout is not None:
        metrics |= {"best_rollout": state.best_rollout, f"best_{args.best_metric}": state.best}
    if state.ended:
        metrics["ended"] = state.ended
    folder = Path(args.output_dir)
    if run.is_main:
        _save_models(average, collector, folder)
        write_json(folder / "samples.json", evaluation.samples)
    best = f", best at rollout {state.best_rollout}" if state.best_rollout is not None else ""
    run.finish(
        parents=[inputs.parent.record(), *(reward.record() for reward in inputs.rewards)],
        datasets=[s.provenance() for s in [*inputs.sources, *inputs.eval_sources, *inputs.ptx_sources]],
        tokenizer=inputs.encoder.tokenizer,
        metrics=metrics,
        flops=state.flops,
        resumed_from=resumed_from,
        summary=f"held-out score {metrics['score']:.3f} (SFT {metrics['reference_score']:.3f}) at a KL of {metrics['kl']:.2f} nats, "
        f"{metrics['response_tokens']:.1f} tokens per response, {metrics['stopped']:.0%} stopped{best}",
    )
    inputs.accelerator.end_training()  # last: it also ends the process group


def _save_models(average: list[torch.Tensor] | None, collector: Collector, folder: Path) -> None:
    """Policy to `folder`, value model to `value/`, the policy's moving average to `ema/`; each loads in plain transformers."""
    networks, args = collector.networks, collector.args
    model, tokenizer = networks.policy.model, collector.encoder.tokenizer
    # A new one, because the parent's may hold other rules of sampling (top_k, top_p, penalties) that PPO samples without.
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=args.temperature,
        top_k=0,  # generate() takes the 50 likeliest where nothing is said
        top_p=1.0,
        max_new_tokens=args.max_response_tokens,
        bos_token_id=model.generation_config.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=networks.policy.forbidden.tolist() or None,
    )
    set_stop_tokens(model, collector.stop_ids)
    networks.save_policy(folder)
    networks.save_value(folder / "value")
    folders = [folder]
    if average is not None:
        _swap(networks.trained["policy"], average)
        networks.save_policy(folder / "ema")
        _swap(networks.trained["policy"], average)
        folders.append(folder / "ema")
    for target in folders:
        tokenizer.save_pretrained(target)
        model.generation_config.save_pretrained(target)
    tokenizer.save_pretrained(folder / "value")


def _swap(parameters: Sequence[torch.nn.Parameter], tensors: list[torch.Tensor]) -> None:
    """Exchange values, without a copy of either."""
    for position, parameter in enumerate(parameters):
        parameter.data, tensors[position] = tensors[position], parameter.data
