"""PPO's networks: policy, reference and value model apart, or the value as a head on the policy's backbone.

A third arrangement, adapters on one frozen base, is in `adapter_networks`. All of them answer for response tokens only, as flat
(response_tokens,) vectors, the sequences concatenated; there are no logits elsewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.models.language_model import LanguageModel
from pipeline.models.loading import disable_noise, without_checkpointing
from pipeline.models.packed import SequenceBatch, pack, pad
from pipeline.models.reward_model import ValueModel, init_head, load_scalar_model, scalar_head
from pipeline.models.sharding import Sharding, first_process, gathered, save_whole, whole
from pipeline.models.sizes import attention_savings_worth_a_group

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Autocast = Callable[[], contextlib.AbstractContextManager[Any]]
PolicyLoss = Callable[[Tensor, Tensor], Tensor]  # of log-probabilities and entropies, (response_tokens,) each
ValueLoss = Callable[[Tensor], Tensor]  # of values, (value_tokens,)
LANGUAGE_MODEL_METHODS = (
    "hidden",
    "logprobs_and_hidden",
    "text_nll",
)  # that compute with its parameters, beside forward


@dataclass(frozen=True)
class ResponseBatch:
    """Prompts with their responses as a model's input, and where the responses are read in it.

    tokens: (response_tokens,) int64 ids of all responses, concatenated.
    token_positions: (response_tokens,) index in the flattened input of the state that predicts each token.
    value_positions: (value_tokens,) index of each state that has a value: the same, and, where the score stands after the
        response, the state at the response's last token.
    """

    sequences: SequenceBatch
    tokens: Tensor
    token_positions: Tensor
    value_positions: Tensor

    def to(self, device: torch.device) -> ResponseBatch:
        tensors = {name: getattr(self, name).to(device) for name in ("tokens", "token_positions", "value_positions")}
        return replace(self, sequences=self.sequences.to(device), **tensors)


def response_batch(
    prompt_ids: Sequence[Sequence[int]],
    response_ids: Sequence[Sequence[int]],
    *,
    pad_id: int,
    packed: bool,
    score_after_response: bool,
    device: torch.device,
) -> ResponseBatch:
    """Lay out prompts and responses for one forward pass.

    Args:
        packed: concatenate the sequences (see `packed.pack`) instead of padding them.
        score_after_response: give the state at each response's last token a value too.
    """
    rows = [[*prompt, *response] for prompt, response in zip(prompt_ids, response_ids, strict=True)]
    sequences = pack(rows, pad_id, attention_savings_worth_a_group(device.type)) if packed else pad(rows, pad_id)
    token_positions: list[int] = []
    value_positions: list[int] = []
    for start, prompt, response in zip(sequences.starts.tolist(), prompt_ids, response_ids, strict=True):
        first = start + len(prompt) - 1  # the state at the prompt's last token predicts the first response token
        token_positions += range(first, first + len(response))
        value_positions += range(first, first + len(response) + int(score_after_response))
    tokens = torch.tensor([token for response in response_ids for token in response])
    return ResponseBatch(sequences, tokens, torch.tensor(token_positions), torch.tensor(value_positions)).to(device)


@dataclass(frozen=True)
class Measurements:
    """Log-probabilities and values of sampled responses, without gradients.

    logprobs, ref_logprobs: (response_tokens,) fp32, nats. values: (value_tokens,) fp32, or None where they were not asked for.
    """

    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor | None


def no_policy_loss(logprobs: Tensor, entropy: Tensor) -> Tensor:
    """The loss of a batch that counts for nothing."""
    return 0.0 * logprobs.sum()


def no_value_loss(values: Tensor) -> Tensor:
    return 0.0 * values.sum()


class Networks:
    """The interface of PPO's networks, however they share parameters.

    policy: what is trained and what samples.
    trained: the parameters of each optimizer, "policy" and "value".
    parameter_counts: of each network outside embeddings, for counting operations.
    packed: whether forward passes are padding-free.
    isolates_documents: whether documents that share a row of pretraining text do not see each other.
    sharded: whether each process holds a part of every network; all processes then make equally many passes.
    """

    packed = False
    isolates_documents = False
    sharded = False
    policy: LanguageModel
    trained: dict[str, list[nn.Parameter]]
    parameter_counts: dict[str, int]

    def __init__(self, autocast: Autocast):
        self.autocast = autocast

    def accumulate_gradients(self, batch: ResponseBatch, policy_loss: PolicyLoss | None, value_loss: ValueLoss) -> None:
        """Add the gradients of both losses to the trained parameters.

        Args:
            policy_loss: None while the value model is trained alone.
        """
        raise NotImplementedError

    def compute_logprobs_and_values(self, batch: ResponseBatch, with_values: bool) -> Measurements:
        raise NotImplementedError

    def shard(self, sharding: Sharding) -> None:
        """Shard every network, once its parameters are what they shall be."""
        raise NotImplementedError

    def sampler(self, network: str) -> contextlib.AbstractContextManager[Any]:
        """The causal LM of "policy" or "reference", to generate with; whole where it is sharded."""
        raise NotImplementedError

    def models(self) -> list[Any]:
        """The transformers models behind the networks."""
        raise NotImplementedError

    def frozen(self) -> list[nn.Module]:
        """The networks that measuring and sampling of the reference alone need."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Everything that training changes, for a checkpoint."""
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError

    def save_policy(self, folder: Path) -> None:
        """A causal LM that plain transformers loads; called by every process, written by one."""
        raise NotImplementedError

    def save_reference(self, folder: Path) -> None:
        """The reference as a causal LM; called by every process, written by one."""
        raise NotImplementedError

    def save_value(self, folder: Path) -> None:
        """A sequence classifier of one label that plain transformers loads; called by every process, written by one."""
        raise NotImplementedError


def size_of(model: Any) -> int:
    return int(model.num_parameters(exclude_embeddings=True))


class SeparateNetworks(Networks):
    """Policy, reference and value model are networks of their own (Stiennon et al. 2020; InstructGPT)."""

    def __init__(self, policy: LanguageModel, reference: LanguageModel, value: PreTrainedModel, autocast: Autocast):
        super().__init__(autocast)
        for model in (policy, reference, value):
            disable_noise(model)
        self.policy, self.value = policy.train(), ValueModel(value).train()
        self.reference = reference.eval().requires_grad_(False)
        self._list_trained()
        self.parameter_counts = {
            "policy": size_of(policy.model),
            "reference": size_of(reference.model),
            "value": size_of(value),
        }

    def _list_trained(self) -> None:
        self.trained = {"policy": list(self.policy.parameters()), "value": list(self.value.parameters())}

    def shard(self, sharding: Sharding) -> None:
        for network in (self.policy, self.reference):
            sharding.shard(network, methods=LANGUAGE_MODEL_METHODS, sum_gradients=True)
        sharding.shard(self.value, sum_gradients=True)
        self.sharded = True
        self._list_trained()

    def accumulate_gradients(self, batch: ResponseBatch, policy_loss: PolicyLoss | None, value_loss: ValueLoss) -> None:
        if policy_loss is not None:
            with self.autocast():
                logprobs, entropy = self.policy(batch.sequences, batch.token_positions, batch.tokens)
            policy_loss(logprobs, entropy).backward()
        with self.autocast():
            values = self.value(batch.sequences, batch.value_positions)
        value_loss(values).backward()

    @torch.no_grad()
    def compute_logprobs_and_values(self, batch: ResponseBatch, with_values: bool) -> Measurements:
        with self.autocast():
            where = (batch.sequences, batch.token_positions, batch.tokens)
            logprobs, ref_logprobs = (model(*where, with_entropy=False)[0] for model in (self.policy, self.reference))
            values = self.value(batch.sequences, batch.value_positions) if with_values else None
        return Measurements(logprobs, ref_logprobs, values)

    @contextlib.contextmanager
    def sampler(self, network: str) -> Any:
        chosen = self.policy if network == "policy" else self.reference
        with gathered(chosen), without_checkpointing(chosen):
            yield chosen.model

    def models(self) -> list[Any]:
        return [self.policy.model, self.reference.model, self.value.model]

    def frozen(self) -> list[nn.Module]:
        return [self.reference]

    def state_dict(self) -> dict[str, Any]:
        return {"policy": self.policy.model.state_dict(), "value": self.value.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy.model.load_state_dict(state["policy"])
        self.value.model.load_state_dict(state["value"])

    def save_policy(self, folder: Path) -> None:
        save_whole(self.policy.model, folder)

    def save_reference(self, folder: Path) -> None:
        save_whole(self.reference.model, folder)

    def save_value(self, folder: Path) -> None:
        save_whole(self.value.model, folder)


class SharedTrunkNetworks(Networks):
    """The value is a head on the policy's backbone (Ziegler et al. 2019), so one forward pass gives both. The reference is apart."""

    def __init__(self, policy: LanguageModel, reference: LanguageModel, autocast: Autocast):
        super().__init__(autocast)
        for model in (policy, reference):
            disable_noise(model)
        self.policy = policy.train()
        self.reference = reference.eval().requires_grad_(False)
        self.head = zero_head(policy.model)
        self._list_trained()
        self.parameter_counts = {"policy": size_of(policy.model), "reference": size_of(reference.model), "value": 0}

    def _list_trained(self) -> None:
        self.trained = {"policy": list(self.policy.parameters()), "value": list(self.head.parameters())}

    def shard(self, sharding: Sharding) -> None:
        for network in (self.policy, self.reference):
            sharding.shard(network, methods=LANGUAGE_MODEL_METHODS, sum_gradients=True)
        sharding.shard(self.head, sum_gradients=True)
        self.sharded = True
        self._list_trained()

    def accumulate_gradients(self, batch: ResponseBatch, policy_loss: PolicyLoss | None, value_loss: ValueLoss) -> None:
        where = (batch.sequences, batch.token_positions, batch.tokens)
        if policy_loss is None:
            with self.autocast(), torch.no_grad():
                hidden = self.policy.hidden(batch.sequences)
            value_loss(self._values(hidden, batch)).backward()
            return
        with self.autocast():
            logprobs, entropy, hidden = self.policy.logprobs_and_hidden(*where)
        assert entropy is not None
        (policy_loss(logprobs, entropy) + value_loss(self._values(hidden, batch))).backward()

    def _values(self, hidden: Tensor, batch: ResponseBatch) -> Tensor:
        return head_values(self.head, hidden[batch.value_positions])

    @torch.no_grad()
    def compute_logprobs_and_values(self, batch: ResponseBatch, with_values: bool) -> Measurements:
        with self.autocast():
            where = (batch.sequences, batch.token_positions, batch.tokens)
            logprobs, _, hidden = self.policy.logprobs_and_hidden(*where, with_entropy=False)
            ref_logprobs, _ = self.reference(*where, with_entropy=False)
            values = self._values(hidden, batch) if with_values else None
        return Measurements(logprobs, ref_logprobs, values)

    @contextlib.contextmanager
    def sampler(self, network: str) -> Any:
        chosen = self.policy if network == "policy" else self.reference
        with gathered(chosen), without_checkpointing(chosen):
            yield chosen.model

    def models(self) -> list[Any]:
        return [self.policy.model, self.reference.model]

    def frozen(self) -> list[nn.Module]:
        return [self.reference]

    def state_dict(self) -> dict[str, Any]:
        return {"policy": self.policy.model.state_dict(), "value_head": self.head.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy.model.load_state_dict(state["policy"])
        self.head.load_state_dict(state["value_head"])

    def save_policy(self, folder: Path) -> None:
        save_whole(self.policy.model, folder)

    def save_reference(self, folder: Path) -> None:
        save_whole(self.reference.model, folder)

    def save_value(self, folder: Path) -> None:
        save_whole(self.policy.model, folder)  # a classifier is loaded from a causal LM's folder, with a new head
        head = whole(self.head.weight)
        if not first_process():
            return
        value: Any = load_scalar_model(str(folder))
        with torch.no_grad():
            scalar_head(value).weight.copy_(head)
        value.save_pretrained(folder)


def zero_head(model: PreTrainedModel) -> nn.Linear:
    """A value head that starts at 0 (Ziegler et al. 2019)."""
    head = nn.Linear(model.config.get_text_config().hidden_size, 1, bias=False)
    nn.init.zeros_(head.weight)
    return head


def head_values(head: nn.Linear, hidden: Tensor) -> Tensor:
    """Values of hidden states (n, width) in the head's own precision, fp32; returns (n,)."""
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.to(head.weight.dtype))[:, 0]


def zero_value(path: str, pad_id: int, seed: int) -> PreTrainedModel:
    """A value model of its own: the policy's backbone with a zero head (Ziegler et al. 2019)."""
    value = load_scalar_model(path)
    value.config.get_text_config().pad_token_id = pad_id
    init_head(value, 0.0, seed)
    return value
