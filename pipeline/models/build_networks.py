"""PPO's networks as the recipe says, on the device, with every assumption about the model tried."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.data.encoding import ChatEncoder
from pipeline.errors import UserError
from pipeline.models.adapter_networks import AdapterNetworks
from pipeline.models.language_model import LanguageModel
from pipeline.models.loading import (
    check_batched_length,
    checkpoint_activations,
    load_causal_lm,
)
from pipeline.models.lora import read_adapter
from pipeline.models.networks import Networks, SeparateNetworks, SharedTrunkNetworks, zero_value
from pipeline.models.precision import DevicePlan, cast_frozen_linears_to_bf16
from pipeline.models.reward_model import load_scalar_model
from pipeline.models.tokenizers import forbidden_token_ids, load_tokenizer, require_rows
from pipeline.models.trials import enable_packed_attention, isolates_packed_documents, require_causal

import torch

logger = logging.getLogger("pipeline.ppo")


@dataclass(frozen=True)
class NetworkInputs:
    """The inputs of `build_networks`.

    args: the recipe. policy, reference: folders of these models. rewards: folders of the reward models, in the recipe's order.
    stop_ids: never forbidden, although they may be special tokens.
    """

    args: Any
    policy: str
    reference: str
    rewards: Sequence[str]
    encoder: ChatEncoder
    stop_ids: Sequence[int]


def build_networks(inputs: NetworkInputs, plan: DevicePlan, device: torch.device) -> Networks:
    """The networks of the recipe's `roles:`.

    Raises:
        UserError: lengths beyond the model's context, a reward adapter of another base, a value model that cannot start
            where the recipe says.
    """
    args = inputs.args
    policy = load_causal_lm(inputs.policy, args.quantization)
    require_causal(policy, inputs.policy)
    require_rows(inputs.encoder.tokenizer, policy, inputs.policy)
    tokens = args.max_prompt_tokens + args.max_response_tokens
    check_batched_length(policy.config, tokens, "max_prompt_tokens + max_response_tokens")
    arrangements = {"separate": _separate, "shared_trunk": _shared_trunk, "adapters": _adapters}
    networks = arrangements[args.roles](inputs, policy, plan, device)
    takes_packed = [enable_packed_attention(model) for model in networks.models()]  # all are tried
    networks.packed = all(takes_packed)
    if not networks.packed:
        logger.warning("ppo: %s takes padded sequences only; its padding is computed too", type(policy).__name__)
    if args.gradient_checkpointing:
        for model in networks.models():
            if model.training:  # not the reference
                checkpoint_activations(model)
    if args.ptx_datasets:  # here, where the policy is whole
        networks.isolates_documents = isolates_packed_documents(networks.policy.model)
    if plan.cast_frozen_to_bf16 and isinstance(networks, SeparateNetworks | SharedTrunkNetworks):
        cast_frozen_linears_to_bf16(networks.reference)  # after packed attention was tried in fp32
    return networks


def _language_model(model: Any, inputs: NetworkInputs, device: torch.device) -> LanguageModel:
    rows = model.get_output_embeddings().weight.shape[0]
    forbidden = forbidden_token_ids(inputs.encoder.tokenizer, rows, inputs.stop_ids)
    return LanguageModel(model, inputs.args.temperature, forbidden).to(device)


def _separate(inputs: NetworkInputs, policy: Any, plan: DevicePlan, device: torch.device) -> SeparateNetworks:
    reference = _language_model(load_causal_lm(inputs.reference), inputs, device)
    value = _value_model(inputs).to(device)
    return SeparateNetworks(_language_model(policy, inputs, device), reference, value, plan.autocast)


def _shared_trunk(inputs: NetworkInputs, policy: Any, plan: DevicePlan, device: torch.device) -> SharedTrunkNetworks:
    reference = _language_model(load_causal_lm(inputs.reference), inputs, device)
    networks = SharedTrunkNetworks(_language_model(policy, inputs, device), reference, plan.autocast)
    networks.head.to(device)
    return networks


def _adapters(inputs: NetworkInputs, policy: Any, plan: DevicePlan, device: torch.device) -> AdapterNetworks:
    args = inputs.args
    adapter = next((path for path in inputs.rewards if read_adapter(path)), None)
    if args.value_init == "reward" and adapter is None:
        raise UserError("value_init: reward with `roles: adapters` needs a reward model trained with `lora:`")
    return AdapterNetworks(
        policy,
        args.lora,
        wrap=lambda model: _language_model(model, inputs, device),
        autocast=plan.autocast,
        base_path=inputs.policy,
        reward_path=adapter,
        value_from_reward=adapter is not None and args.value_init != "policy",
    ).to(device)


def _value_model(inputs: NetworkInputs) -> Any:
    """The reward model's copy (Stiennon et al. 2020), or the policy's backbone with a zero head (Ziegler et al. 2019)."""
    args, encoder = inputs.args, inputs.encoder
    if args.value_init != "policy" and inputs.rewards:
        own = load_tokenizer(inputs.rewards[0]).get_vocab() == encoder.tokenizer.get_vocab()
        if own:
            return load_scalar_model(inputs.rewards[0])
        if args.value_init == "reward":
            raise UserError(
                "value_init: reward needs the policy's tokenizer, the reward model has another; say `value_init: policy`"
            )
        logger.info("ppo: the reward model has another tokenizer; the value model starts from the policy")
    return zero_value(inputs.policy, encoder.tokenizer.pad_token_id, args.seed)


def check_same_base(reward_path: str, lineage: dict[str, Any], policy_sha256: str | None, policy: str) -> None:
    """A reward adapter belongs to the base that it was trained on."""
    bases = [base.get("weights_sha256") for base in lineage.get("parents", [])]
    if read_adapter(reward_path) and policy_sha256 not in bases:
        raise UserError(
            f"roles: adapters: the reward adapter in {reward_path!r} was trained on another base than the policy "
            f"{policy!r}; train the reward from that parent, or say `roles: separate`"
        )
