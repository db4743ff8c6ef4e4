"""Start and end of a PPO run: open and verify inputs, build networks and rewards, save the result."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
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
from pipeline.models.networks import Networks
from pipeline.models.offload import OffloadedTensors, offloaded_networks
from pipeline.models.precision import accelerator_type, device_plan
from pipeline.models.sharding import Sharding, local
from pipeline.models.tokenizers import (
    assign_template,
    load_tokenizer,
    require_pad,
    set_stop_tokens,
    stop_token_ids,
    template_identity,
)
from pipeline.models.trials import ONE_PER_BLOCK
from pipeline.rollout.collect import Collector
from pipeline.rollout.engine import LocalEngine, SamplingSettings
from pipeline.rollout.evaluation import Evaluation
from pipeline.rollout.pretraining import PretrainingText
from pipeline.rollout.prompts import PromptSet, prepare_prompts
from pipeline.rollout.rewards import (
    DISAGREEMENT,
    Scorer,
    ScoringSetup,
    build_scorer,
    identity,
    judge_labels,
    part_names,
)
from pipeline.rollout.vllm_engine import MOST_CONNECTIONS, VLLMEngine, check_server
from pipeline.rollout.vllm_probe import Probe
from pipeline.rollout.vllm_server import VLLMServer
from pipeline.training.identity import tokenizer_hashes
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

    reference: None where it is the parent. judges: names of Python judges by their labels. stop_ids: tokens that end a
    response.
    """

    accelerator: Accelerator
    parent: Parent
    reference: Parent | None
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
    reference = verify_parent(args.reference, SUPPORT["ppo"].parents) if args.reference else None
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
    if reference is not None:
        _check_same_tokens(reference, tokenizer)
    run.output.inputs = {
        "parent": parent.as_inputs(tokenizer),
        **({"reference": reference.as_inputs(tokenizer)} if reference else {}),
        "chat_template": template_identity(args.chat_template),
        "reward": identity(args.reward),
        "judges": [source_sha256(import_function(name)) for name in judges.values()],
        "data": fingerprint([*sources, *eval_sources, *ptx_sources]),
    }
    prompts = prepare_prompts(sources, eval_sources, encoder, args)
    stop_ids = stop_token_ids(encoder, _generation_config(parent.path), args.stop_tokens)
    return PPOInputs(
        accelerator, parent, reference, rewards, sources, eval_sources, ptx_sources, encoder, prompts, judges, stop_ids
    )


def _check_same_tokens(reference: Parent, tokenizer: Any) -> None:
    """
    Raises:
        UserError: the reference has other tokens than the policy, so their log-probabilities cannot be compared.
    """
    if tokenizer_hashes(load_tokenizer(reference.path))[0] != tokenizer_hashes(tokenizer)[0]:
        raise UserError(
            f"reference {reference.path!r} has another tokenizer than the parent; name one of the same tokens"
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
    server, takes_adapters = _checked_server(inputs, run) if args.engine == "vllm" else (None, False)
    networks = build_networks(
        NetworkInputs(
            args=args,
            policy=inputs.parent.path,
            reference=(inputs.reference or inputs.parent).path,
            rewards=[reward.path for reward in inputs.rewards],
            encoder=encoder,
            stop_ids=inputs.stop_ids,
        ),
        plan,
        device if run.sharding is None else torch.device("cpu"),
    )
    sharding = None
    if run.sharding is not None:
        sharding = Sharding(run.sharding, run.processes.count, device, bf16=plan.bf16)
        networks.shard(sharding)
    loaded = (
        {networks.reward_path: networks.reward} if isinstance(networks, AdapterNetworks) and networks.reward else {}
    )
    setup = ScoringSetup(encoder, device, inputs.stop_ids, plan.autocast, plan.cast_frozen_to_bf16, loaded, sharding)
    settings = SamplingSettings(
        max_new_tokens=args.max_response_tokens,
        stop_ids=inputs.stop_ids,
        forbidden_ids=networks.policy.forbidden.tolist(),
        pad_id=encoder.tokenizer.pad_token_id,
        temperature=args.temperature,
        rows=args.generation_rows,
    )
    scorer = build_scorer(args.reward, setup, args.ensemble, args.ensemble_penalty)
    collector = Collector(
        args=args,
        processes=run.processes,
        encoder=encoder,
        networks=networks,
        engine=LocalEngine(settings),
        scorer=scorer,
        stop_ids=inputs.stop_ids,
        plan=plan,
        device=device,
        offloaded={} if args.offload == "none" else _offload(networks, scorer, device),
    )
    _set_generation_config(collector)  # before a server is sent the policy: the parent's may be one that is not saved
    return collector if server is None else _sampling_on(server, collector, inputs, run, takes_adapters=takes_adapters)


def _offload(networks: Networks, scorer: Scorer, device: torch.device) -> dict[str, OffloadedTensors]:
    """Move the frozen networks off the device, until each is needed."""
    frozen = {"reference": networks.frozen(), "reward": [p.network for p in scorer.parts if p.network is not None]}
    frozen = {name: parts for name, parts in frozen.items() if parts}
    if device.type == "cpu":
        logger.warning("ppo: `offload:` saves nothing here: the networks are in the CPU's memory already")
    elif not frozen:
        logger.warning("ppo: no frozen network can be offloaded: the policy computes with the base of its adapters")
    return {name: offloaded_networks(parts) for name, parts in frozen.items()}


def _checked_server(inputs: PPOInputs, run: Run[PPOArguments]) -> tuple[VLLMServer, bool]:
    """The recipe's server, and whether adapters are sent to it alone.

    Raises:
        UserError: it cannot sample for this recipe.
    """
    args = run.args
    server = VLLMServer(args.engine_url or "", min(args.generation_rows, MOST_CONNECTIONS))
    tokens, limits = args.max_prompt_tokens + args.max_response_tokens, "max_prompt_tokens + max_response_tokens"
    served = run.processes.from_main(
        lambda: check_server(server, inputs.encoder.tokenizer, tokens, limits, "the parent")
    )
    server.name = served.name
    rank = args.lora.r if args.roles == "adapters" and args.lora else 0
    if served.lora_rank and rank > served.lora_rank:
        raise UserError(
            f"engine_url {server.url}: its --max-lora-rank of {served.lora_rank} is below `lora: r: {rank}`; raise it, or start it "
            "without --enable-lora"
        )
    if rank and not served.lora_rank:
        logger.warning("ppo: the server takes no adapters (--enable-lora); the whole policy is sent after each update")
    return server, bool(rank and served.lora_rank)


def _sampling_on(
    server: VLLMServer, collector: Collector, inputs: PPOInputs, run: Run[PPOArguments], *, takes_adapters: bool
) -> Collector:
    """The same collector, whose policy samples on a server."""
    args, networks = collector.args, collector.networks
    engine = VLLMEngine(
        server=server,
        settings=collector.engine.settings,
        networks=networks,
        processes=collector.processes,
        device=collector.device,
        folder=Path(args.engine_weights or Path(args.output_dir) / "engine").absolute(),
        probe=Probe(server, inputs.prompts.of_rollout(0, args.prompts_per_rollout, args.seed)[0].ids),
        precision="bf16" if collector.plan.bf16 else "fp32",
        wait=args.engine_wait,
        adapters=networks if takes_adapters and isinstance(networks, AdapterNetworks) else None,
        reference=collector.offloaded.get("reference", nullcontext()),
        leave_if_interrupted=run.leave_if_interrupted,
    )
    return replace(collector, server=engine)


def prepare_pretraining(inputs: PPOInputs, collector: Collector) -> PretrainingText | None:
    """The blocks of `ptx_datasets`, or None without them."""
    if not inputs.ptx_sources:
        return None
    args, tokenizer = collector.args, inputs.encoder.tokenizer
    isolated = collector.networks.isolates_documents
    if not isolated:
        logger.warning("ppo: ptx_datasets: %s", ONE_PER_BLOCK)
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
    _save_models(average, collector, folder)
    if collector.server is not None:
        collector.server.remove_weights()
    if run.is_main:
        write_json(folder / "samples.json", evaluation.samples)
    best = f", best at rollout {state.best_rollout}" if state.best_rollout is not None else ""
    run.finish(
        parents=[
            inputs.parent.record(),
            *(reward.record() for reward in inputs.rewards),
            *([{**inputs.reference.record(), "as": "reference"}] if inputs.reference else []),
        ],
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
    networks, tokenizer = collector.networks, collector.encoder.tokenizer
    networks.save_policy(folder)
    networks.save_value(folder / "value")
    folders = [folder]
    if average is not None:
        _swap(networks.trained["policy"], average)
        networks.save_policy(folder / "ema")
        _swap(networks.trained["policy"], average)
        folders.append(folder / "ema")
    if not collector.processes.is_main:
        return
    for target in folders:
        tokenizer.save_pretrained(target)
        networks.policy.model.generation_config.save_pretrained(target)
    tokenizer.save_pretrained(folder / "value")


def _set_generation_config(collector: Collector) -> None:
    """How PPO samples, as the policy's generation config."""
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


@torch.no_grad()
def _swap(parameters: Sequence[torch.nn.Parameter], tensors: list[torch.Tensor]) -> None:
    """Exchange values in place, a tensor at a time: assigning `.data` leaves a sharded parameter's part as it is."""
    for parameter, tensor in zip(parameters, tensors, strict=True):
        before = local(parameter).clone()
        local(parameter).copy_(local(tensor))
        local(tensor).copy_(before)
