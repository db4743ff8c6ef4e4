"""PPO's networks as LoRA adapters of one frozen base: policy and value are adapters, the reference is the base itself.

Switching adapters freezes the others and, between a forward pass and its backward pass, loses or falsifies gradients
silently (measured, peft 0.21). Therefore every forward pass is followed by its backward pass before the next switch, and what is
trained is unfrozen after each switch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipeline.models.language_model import LanguageModel
from pipeline.models.loading import disable_noise, load_causal_lm, without_checkpointing
from pipeline.models.lora import lora_config, read_adapter
from pipeline.models.networks import (
    LANGUAGE_MODEL_METHODS,
    Autocast,
    Measurements,
    Networks,
    PolicyLoss,
    ResponseBatch,
    ValueLoss,
    head_values,
    size_of,
    zero_head,
)
from pipeline.models.reward_model import load_scalar_model, scalar_head, score_offset, set_offset
from pipeline.models.sharding import Sharding, first_process, gathered, whole, whole_state_dict

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoConfig

POLICY = "default"  # the policy adapter's name, as vLLM expects it


class AdapterNetworks(Networks):
    """Adapters for policy and value on one frozen base, and the reward model's own where it was trained on the same base.

    Args:
        options: the recipe's `lora:`.
        wrap: makes the causal LM a `LanguageModel`.
        base_path: folder of the base, for merging at the end.
        reward_path: folder of a reward model that is an adapter of the same base.
        value_from_reward: start the value adapter from the reward model's.
    """

    def __init__(
        self,
        base: Any,
        options: Any,
        *,
        wrap: Callable[[Any], LanguageModel],
        autocast: Autocast,
        base_path: str,
        reward_path: str | None = None,
        value_from_reward: bool = False,
    ):
        super().__init__(autocast)
        self.base_path, self.reward_path = base_path, reward_path or ""
        self.parameter_counts = {name: size_of(base) for name in ("policy", "reference", "value")}
        reward = read_adapter(reward_path) if reward_path else None
        config = lora_config(base, options, "CAUSAL_LM")
        for adapter in (config, *([reward[0]] if reward else [])):
            adapter.lora_dropout = 0.0  # in training mode as well: ratios and scores would be noise
        self.peft: Any = get_peft_model(base, config)
        self.peft.add_adapter("value", reward[0] if reward and value_from_reward else config)
        self.head, self.offset = zero_head(base), 0.0
        self.reward: AdapterRewardModel | None = None
        if reward and reward_path:
            self._add_reward(reward_path, *reward, value_from_reward)
        disable_noise(self.peft)
        self.policy = wrap(self.peft.base_model.model).train()
        self._activate(POLICY)
        for parameter in self._parameters_of(POLICY) + self._parameters_of("value"):
            parameter.data = parameter.data.float()  # master weights are fp32, also on a quantised base
        self._list_trained()

    def _list_trained(self) -> None:
        self.trained = {
            "policy": self._parameters_of(POLICY),
            "value": [*self._parameters_of("value"), *self.head.parameters()],
        }

    def shard(self, sharding: Sharding) -> None:
        sharding.shard(self.policy, methods=LANGUAGE_MODEL_METHODS, sum_gradients=True)
        for head in (self.head, *([] if self.reward is None else [self.reward.head])):
            sharding.shard(head, sum_gradients=True)
        self.sharded = True
        self._list_trained()

    def _add_reward(
        self, path: str, config: LoraConfig, weights: dict[str, Tensor], head: Tensor, value_from_reward: bool
    ) -> None:
        self.peft.add_adapter("reward", config)
        set_peft_model_state_dict(self.peft, weights, adapter_name="reward")
        self.reward = AdapterRewardModel(self, AutoConfig.from_pretrained(path), head)
        if value_from_reward:
            set_peft_model_state_dict(self.peft, weights, adapter_name="value")
            self.head.load_state_dict({"weight": head})
            self.offset = score_offset(self.reward)

    def to(self, device: torch.device) -> AdapterNetworks:
        if not getattr(self.policy.model, "quantization_method", None):
            self.peft.to(device)
        self.policy.forbidden = self.policy.forbidden.to(device)
        self.head.to(device)
        if self.reward is not None:
            self.reward.head.to(device)
        return self

    def _parameters_of(self, adapter: str) -> list[nn.Parameter]:
        return [p for name, p in self.peft.named_parameters() if f".{adapter}." in name]

    def _activate(self, adapter: str) -> None:
        self.peft.set_adapter(adapter)
        self.peft.set_requires_grad([POLICY, "value"], requires_grad=True)
        if self.reward is not None:
            self.peft.set_requires_grad("reward", requires_grad=False)

    @contextlib.contextmanager
    def active(self, adapter: str | None) -> Any:
        """One adapter on (None: none); the policy's afterwards."""
        try:
            if adapter is None:
                with self.peft.disable_adapter():
                    yield
            else:
                self._activate(adapter)
                yield
        finally:
            self._activate(POLICY)

    def _values(self, batch: ResponseBatch) -> Tensor:
        hidden = self.policy.hidden(batch.sequences)
        return head_values(self.head, hidden[batch.value_positions]) - self.offset

    def accumulate_gradients(self, batch: ResponseBatch, policy_loss: PolicyLoss | None, value_loss: ValueLoss) -> None:
        if policy_loss is not None:
            with self.active(POLICY):
                with self.autocast():
                    logprobs, entropy = self.policy(batch.sequences, batch.token_positions, batch.tokens)
                policy_loss(logprobs, entropy).backward()
        with self.active("value"):
            with self.autocast():
                values = self._values(batch)
            value_loss(values).backward()

    @torch.no_grad()
    def compute_logprobs_and_values(self, batch: ResponseBatch, with_values: bool) -> Measurements:
        where = (batch.sequences, batch.token_positions, batch.tokens)
        with self.autocast():
            with self.active(POLICY):
                logprobs, _ = self.policy(*where, with_entropy=False)
            with self.active(None):
                ref_logprobs, _ = self.policy(*where, with_entropy=False)
            values = None
            if with_values:
                with self.active("value"):
                    values = self._values(batch)
        return Measurements(logprobs, ref_logprobs, values)

    @contextlib.contextmanager
    def sampler(self, network: str) -> Any:
        with (
            self.active(POLICY if network == "policy" else None),
            gathered(self.policy),
            without_checkpointing(self.policy),
        ):
            yield self.policy.model

    def models(self) -> list[Any]:
        return [self.policy.model]

    def frozen(self) -> list[nn.Module]:
        return []  # the base is the policy's too

    def state_dict(self) -> dict[str, Any]:
        adapters = {name: get_peft_model_state_dict(self.peft, adapter_name=name) for name in (POLICY, "value")}
        return {"adapters": adapters, "value_head": self.head.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, weights in state["adapters"].items():
            set_peft_model_state_dict(self.peft, weights, adapter_name=name)
        self.head.load_state_dict(state["value_head"])

    def save_policy(self, folder: Path) -> None:
        self.save_adapter(folder)
        if first_process():
            _merged(folder, load_causal_lm(self.base_path)).save_pretrained(folder)

    def save_reference(self, folder: Path) -> None:
        if first_process():
            load_causal_lm(self.base_path).save_pretrained(folder)

    def save_value(self, folder: Path) -> None:
        self.save_adapter(folder, "value")
        head = whole(self.head.weight)
        if not first_process():
            return
        merged = _merged(folder, load_scalar_model(self.base_path))
        with torch.no_grad():
            scalar_head(merged).weight.copy_(head)
        set_offset(merged, self.offset)
        merged.save_pretrained(folder)

    def save_adapter(self, folder: Path, adapter: str = POLICY) -> None:
        """An adapter alone, as `adapter/` of a folder; called by every process, written by the first."""
        state = None
        if self.sharded:  # this adapter's parts alone: the base need not be gathered
            own = {name: part for name, part in self.peft.state_dict().items() if f".{adapter}." in name}
            state = whole_state_dict(own)
        if not first_process():
            return
        self.peft.save_pretrained(
            str(folder / "adapter"), selected_adapters=[adapter], state_dict=state, save_embedding_layers=False
        )
        nested = folder / "adapter" / adapter  # peft gives every adapter but `default` a folder of its own
        if nested.is_dir():
            for file in nested.iterdir():
                file.replace(folder / "adapter" / file.name)
            nested.rmdir()


@torch.no_grad()
def _merged(folder: Path, base: Any) -> Any:
    """The fp32 base with the adapter of a folder merged in: quantised weights would be merged with their rounding."""
    config = LoraConfig.from_pretrained(str(folder / "adapter"))
    config.task_type = None  # the value model's base is a classifier
    return PeftModel.from_pretrained(base, folder / "adapter", config=config).merge_and_unload()


class AdapterRewardModel(nn.Module):
    """The reward model as an adapter of the policy's base: answers as a sequence classifier does."""

    def __init__(self, networks: AdapterNetworks, config: Any, head: Tensor):
        super().__init__()
        self._networks = [networks]  # in a list: no submodule of this one
        self.config = config
        self.head = nn.Linear(head.shape[1], 1, bias=False).requires_grad_(False)
        self.head.load_state_dict({"weight": head})

    @property
    def backbone(self) -> nn.Module:
        """The module whose parameters it computes with, beside its head."""
        return self._networks[0].policy

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """Raw scores as `logits` (rows, 1), read at each row's last token."""
        (networks,) = self._networks
        with networks.active("reward"):
            hidden = networks.policy.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        last = attention_mask.sum(1) - 1
        states = hidden[torch.arange(len(last), device=last.device), last]
        return SimpleNamespace(logits=head_values(self.head, states)[:, None])
