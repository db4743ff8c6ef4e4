"""PPO's roles on networks: policy, reference and value apart, on one trunk, or as adapters of one frozen base.

A role answers for response tokens only; there are no logits elsewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipeline.algorithms.logprobs import CACHED_LOGITS, FEWEST_ROWS, LOGITS_BYTES, tempered_logits, token_logprobs
from pipeline.data.encoding import IGNORE
from pipeline.errors import UserError
from pipeline.models.loading import disable_noise, load_causal_lm
from pipeline.models.lora import lora_config, read_adapter
from pipeline.models.packed import Batch, hidden_states
from pipeline.models.reward_model import ValueModel, init_head, load_scalar_model, scalar_head, score_offset, set_offset

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import set_peft_model_state_dict
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, PreTrainedModel


class PolicyModel(nn.Module):
    """A causal LM that answers with log-probabilities of given response tokens.

    Hidden states are picked at response positions before the LM head, and a large head runs in chunks that are
    recomputed in the backward pass, so a (batch, length, vocab) tensor never exists.
    """

    def __init__(self, model: PreTrainedModel, temperature: float, forbidden: list[int]):
        super().__init__()
        self.model: Any = model
        self.forbidden: Tensor
        self.temperature = temperature
        self.register_buffer("forbidden", torch.tensor(forbidden, dtype=torch.long), persistent=False)

    def forward(self, batch: Batch, with_entropy: bool = True) -> tuple[Tensor, Tensor | None]:
        """Log-probability and, if asked for, entropy of response tokens.

        Args:
            batch: of `packed.lay_out`, and
                positions: (rows, n) int64, where in the flattened input the state stands that predicts each token.
                tokens: (rows, n) int64
                mask: (rows, n) bool, True counts.

        Returns:
            logprobs, entropy: (rows, n) fp32, 0 where masked; logprobs carry the gradient.
        """
        return self.read(self.hidden(batch), batch, with_entropy)

    def hidden(self, batch: Batch) -> Tensor:
        """(tokens, width) last hidden states."""
        return hidden_states(self.model.base_model, batch)

    def read(self, hidden: Tensor, batch: Batch, with_entropy: bool = True) -> tuple[Tensor, Tensor | None]:
        """As `forward`, from hidden states."""
        mask = batch["mask"]
        found, spread = self._chunked(
            hidden[batch["positions"][mask]], batch["tokens"][mask], self.temperature, self.forbidden, with_entropy
        )
        zeros = torch.zeros(mask.shape, dtype=torch.float32, device=hidden.device)
        return zeros.masked_scatter(mask, found), None if spread is None else zeros.masked_scatter(mask, spread)

    def text_nll(self, input_ids: Tensor, position_ids: Tensor, labels: Tensor) -> Tensor:
        """Summed negative log-likelihood of packed text, all of the model's ids, no temperature.

        Args:
            input_ids, position_ids, labels: (batch, length); positions restart with each document, labels are IGNORE
                where nothing is learnt and stand at their own token's place.
        """
        states = self.model.base_model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        hidden = states[:, :-1]
        targets = labels[:, 1:]
        counted = targets != IGNORE
        found, _ = self._chunked(hidden[counted], targets[counted], 1.0, None, with_entropy=False)
        return -found.sum()

    def _chunked(
        self, hidden: Tensor, tokens: Tensor, temperature: float, forbidden: Tensor | None, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probability and entropy of `tokens` after hidden states (n, width), a bounded number of logits at a time."""
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        n, alive = len(tokens), max(1, LOGITS_BYTES // (4 * vocabulary))
        recompute = n > alive and torch.is_grad_enabled()
        chunk = alive
        if hidden.device.type == "cpu":
            spare = -n % 64  # few shapes: oneDNN makes kernels for each
            hidden, tokens = nn.functional.pad(hidden, (0, 0, 0, spare)), nn.functional.pad(tokens, (0, spare))
            chunk = min(alive, max(FEWEST_ROWS, CACHED_LOGITS // vocabulary))

        def run(states: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor | None]:
            logits = self.model.get_output_embeddings()(states)
            return token_logprobs(tempered_logits(logits, temperature, forbidden), chosen, with_entropy)

        pieces = zip(hidden.split(chunk), tokens.split(chunk), strict=True)
        parts = [checkpoint(run, h, t, use_reentrant=False) if recompute else run(h, t) for h, t in pieces]
        entropies = [entropy for _, entropy in parts if entropy is not None]
        return torch.cat([logprobs for logprobs, _ in parts])[:n], torch.cat(entropies)[:n] if with_entropy else None

    @torch.no_grad()
    def refuse_transformed_logits(self) -> None:
        """Some architectures cap or scale logits after the head (Gemma 2, Cohere); those would be trained wrongly here."""
        device = next(self.parameters()).device
        ids = torch.arange(4, device=device)[None] % self.model.config.get_text_config().vocab_size
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        direct = self.model.get_output_embeddings()(hidden)
        if not torch.allclose(
            direct.float(), self.model(input_ids=ids, use_cache=False).logits.float(), atol=1e-4, rtol=1e-4
        ):
            raise UserError(
                f"{type(self.model).__name__} changes its logits after the LM head (soft-capping or scaling); "
                "PPO does not support that yet"
            )


class Roles:
    """What every arrangement of roles offers to PPO's loop.

    policy: trained, and what samples. trained: each optimizer's parameters, "policy" and "value".
    parameters: each network's parameters outside embeddings, for FLOPs. packed: rows lie end to end (see `packed`).
    """

    packed = False
    policy: PolicyModel
    trained: dict[str, list[nn.Parameter]]
    parameters: dict[str, int]

    def __init__(self, autocast: Callable[[], Any]):
        self.autocast = autocast

    def passes(self, batch: Batch, train_policy: bool = True) -> Iterator[Batch]:
        """Forward passes with gradients, each to be backwarded before the next is asked for: between them they give
        `logprobs`, `entropy` (unless the policy rests) and `values`, all (rows, width)."""
        raise NotImplementedError

    def measure(self, batch: Batch, with_values: bool) -> Batch:
        """`logprobs`, `ref_logprobs` and, if asked for, `values`, without gradients; all (rows, width)."""
        raise NotImplementedError

    def sampler(self, role: str) -> contextlib.AbstractContextManager[Any]:
        """The causal LM of "policy" or "reference", to generate with."""
        raise NotImplementedError

    def networks(self) -> list[Any]:
        """The transformers models behind the roles."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """Everything that training moves, for a checkpoint."""
        raise NotImplementedError

    def load_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError

    def save_policy(self, folder: Path) -> None:
        """A causal LM that plain transformers loads."""
        raise NotImplementedError

    def save_value(self, folder: Path) -> None:
        """A sequence classifier of one label that plain transformers loads."""
        raise NotImplementedError


def _size(model: Any) -> int:
    return int(model.num_parameters(exclude_embeddings=True))


class SeparateRoles(Roles):
    """Policy, reference and value as three networks (S20, I22)."""

    def __init__(
        self, policy: Any, reference: Any, value: Any, wrap: Callable[[Any], PolicyModel], autocast: Callable[[], Any]
    ):
        super().__init__(autocast)
        for model in (policy, reference, value):
            disable_noise(model)
        self.policy, self.value = wrap(policy).train(), ValueModel(value).train()
        self.reference = wrap(reference).eval().requires_grad_(False)
        self.trained = {"policy": list(self.policy.parameters()), "value": list(self.value.parameters())}
        self.parameters = {"policy": _size(policy), "reference": _size(reference), "value": _size(value)}

    def passes(self, batch: Batch, train_policy: bool = True) -> Iterator[Batch]:
        if train_policy:
            with self.autocast():
                logprobs, entropy = self.policy(batch)
            yield {"logprobs": logprobs, "entropy": entropy}
        with self.autocast():
            values = self.value(batch)
        yield {"values": values}

    @torch.no_grad()
    def measure(self, batch: Batch, with_values: bool) -> Batch:
        with self.autocast():
            found = {"logprobs": self.policy(batch, False)[0], "ref_logprobs": self.reference(batch, False)[0]}
            if with_values:
                found["values"] = self.value(batch)
        return found

    @contextlib.contextmanager
    def sampler(self, role: str) -> Iterator[Any]:
        yield (self.policy if role == "policy" else self.reference).model

    def networks(self) -> list[Any]:
        return [self.policy.model, self.reference.model, self.value.model]

    def state(self) -> dict[str, Any]:
        return {"policy": self.policy.model.state_dict(), "value": self.value.model.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.policy.model.load_state_dict(state["policy"])
        self.value.model.load_state_dict(state["value"])

    def save_policy(self, folder: Path) -> None:
        self.policy.model.save_pretrained(folder)

    def save_value(self, folder: Path) -> None:
        self.value.model.save_pretrained(folder)


class SharedTrunkRoles(Roles):
    """The value is a head on the policy's trunk (Z19); one forward pass gives both. The reference is apart."""

    def __init__(self, policy: Any, reference: Any, wrap: Callable[[Any], PolicyModel], autocast: Callable[[], Any]):
        super().__init__(autocast)
        for model in (policy, reference):
            disable_noise(model)
        self.policy = wrap(policy).train()
        self.reference = wrap(reference).eval().requires_grad_(False)
        self.head = _zero_head(policy)
        self.trained = {"policy": list(self.policy.parameters()), "value": list(self.head.parameters())}
        self.parameters = {"policy": _size(policy), "reference": _size(reference), "value": 0}

    def passes(self, batch: Batch, train_policy: bool = True) -> Iterator[Batch]:
        with self.autocast(), torch.set_grad_enabled(train_policy):
            hidden = self.policy.hidden(batch)
        with self.autocast():
            found: Batch = {"values": self._values(hidden, batch["positions"])}
            if train_policy:
                found["logprobs"], found["entropy"] = self.policy.read(hidden, batch)
        yield found

    def _values(self, hidden: Tensor, positions: Tensor) -> Tensor:
        return self.head(hidden[positions])[..., 0].float()

    @torch.no_grad()
    def measure(self, batch: Batch, with_values: bool) -> Batch:
        with self.autocast():
            hidden = self.policy.hidden(batch)
            found = {
                "logprobs": self.policy.read(hidden, batch, False)[0],
                "ref_logprobs": self.reference(batch, False)[0],
            }
            if with_values:
                found["values"] = self._values(hidden, batch["positions"])
        return found

    @contextlib.contextmanager
    def sampler(self, role: str) -> Iterator[Any]:
        yield (self.policy if role == "policy" else self.reference).model

    def networks(self) -> list[Any]:
        return [self.policy.model, self.reference.model]

    def state(self) -> dict[str, Any]:
        return {"policy": self.policy.model.state_dict(), "value_head": self.head.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.policy.model.load_state_dict(state["policy"])
        self.head.load_state_dict(state["value_head"])

    def save_policy(self, folder: Path) -> None:
        self.policy.model.save_pretrained(folder)

    def save_value(self, folder: Path) -> None:
        self.policy.model.save_pretrained(folder)  # a classifier is loaded from a causal LM's folder, with a new head
        value: Any = load_scalar_model(str(folder))
        with torch.no_grad():
            scalar_head(value).weight.copy_(self.head.weight)
        value.save_pretrained(folder)


class AdapterRoles(Roles):
    """LoRA adapters for policy and value on one frozen base; the reference is the base with adapters off.

    The policy's adapter is called `default`, as vLLM expects. Switching adapters freezes the others and, before a
    backward pass, loses or falsifies gradients without a word (measured, peft 0.21): so every pass is backwarded before
    the next, and what is trained is thawed after each switch.
    """

    def __init__(
        self,
        base: Any,
        options: Any,
        wrap: Callable[[Any], PolicyModel],
        autocast: Callable[[], Any],
        base_path: str,
        reward_path: str | None,
        init_from_reward: bool,
    ):
        super().__init__(autocast)
        disable_noise(base)
        self.base_path = base_path
        self.parameters = {name: _size(base) for name in ("policy", "reference", "value")}
        config = lora_config(base, options, "CAUSAL_LM")
        config.lora_dropout = 0.0  # A16
        reward = read_adapter(reward_path) if reward_path else None
        self.peft: Any = get_peft_model(base, config)
        self.peft.add_adapter("value", reward[0] if reward and init_from_reward else config)
        self.head, self.offset = _zero_head(base), 0.0
        self.reward: AdapterScalar | None = None
        self.reward_path = reward_path or ""
        if reward and reward_path:
            reward_config, weights, head = reward
            self.peft.add_adapter("reward", reward_config)
            set_peft_model_state_dict(self.peft, weights, adapter_name="reward")
            self.reward = AdapterScalar(self, AutoConfig.from_pretrained(reward_path), head)
            if init_from_reward:
                set_peft_model_state_dict(self.peft, weights, adapter_name="value")
                self.head.load_state_dict({"weight": head})
                self.offset = score_offset(self.reward)
        self.policy = wrap(self.peft.base_model.model).train()
        self._activate("default")
        for parameter in self._named("default") + self._named("value"):
            parameter.data = parameter.data.float()  # A35, also on a quantised base
        self.trained = {
            "policy": self._named("default"),
            "value": [*self._named("value"), *self.head.parameters()],
        }

    def to(self, device: torch.device) -> AdapterRoles:
        if not getattr(self.policy.model, "quantization_method", None):
            self.peft.to(device)
        self.policy.forbidden = self.policy.forbidden.to(device)
        self.head.to(device)
        return self

    def _named(self, adapter: str) -> list[nn.Parameter]:
        return [p for name, p in self.peft.named_parameters() if f".{adapter}." in name]

    def _activate(self, adapter: str) -> None:
        self.peft.set_adapter(adapter)
        self.peft.set_requires_grad(["default", "value"], requires_grad=True)
        if self.reward is not None:
            self.peft.set_requires_grad("reward", requires_grad=False)

    @contextlib.contextmanager
    def active(self, adapter: str | None) -> Iterator[None]:
        """One adapter on (None: none); the policy's afterwards."""
        if adapter is None:
            with self.peft.disable_adapter():
                yield
        else:
            self._activate(adapter)
            yield
        self._activate("default")

    def _values(self, batch: Batch) -> Tensor:
        hidden = self.policy.hidden(batch)
        return self.head(hidden[batch["positions"]])[..., 0].float() - self.offset

    def passes(self, batch: Batch, train_policy: bool = True) -> Iterator[Batch]:
        if train_policy:
            with self.active("default"):
                with self.autocast():
                    logprobs, entropy = self.policy(batch)
                yield {"logprobs": logprobs, "entropy": entropy}
        with self.active("value"):
            with self.autocast():
                values = self._values(batch)
            yield {"values": values}

    @torch.no_grad()
    def measure(self, batch: Batch, with_values: bool) -> Batch:
        found = {}
        with self.autocast():
            with self.active("default"):
                found["logprobs"] = self.policy(batch, False)[0]
            with self.active(None):
                found["ref_logprobs"] = self.policy(batch, False)[0]
            if with_values:
                with self.active("value"):
                    found["values"] = self._values(batch)
        return found

    @contextlib.contextmanager
    def sampler(self, role: str) -> Iterator[Any]:
        with self.active("default" if role == "policy" else None):
            yield self.policy.model

    def networks(self) -> list[Any]:
        return [self.policy.model]

    def state(self) -> dict[str, Any]:
        kept = {name: p for name, p in self.peft.named_parameters() if ".default." in name or ".value." in name}
        return {"adapters": kept, "value_head": self.head.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        named = dict(self.peft.named_parameters())
        with torch.no_grad():
            for name, saved in state["adapters"].items():
                named[name].copy_(saved)
        self.head.load_state_dict(state["value_head"])

    def save_policy(self, folder: Path) -> None:
        self._merged(folder, "default", load_causal_lm(self.base_path)).save_pretrained(folder)

    def save_value(self, folder: Path) -> None:
        merged = self._merged(folder, "value", load_scalar_model(self.base_path))
        with torch.no_grad():
            scalar_head(merged).weight.copy_(self.head.weight)
        set_offset(merged, self.offset)
        merged.save_pretrained(folder)

    def _merged(self, folder: Path, adapter: str, base: Any) -> Any:
        """The fp32 base with an adapter merged in; quantised weights would merge with their rounding."""
        self.peft.save_pretrained(str(folder / "adapter"), selected_adapters=[adapter])
        saved = folder / "adapter" / adapter if adapter != "default" else folder / "adapter"
        config = LoraConfig.from_pretrained(str(saved))
        config.task_type = None  # the value's base is a classifier
        with torch.no_grad():
            return PeftModel.from_pretrained(base, saved, config=config).merge_and_unload()


class AdapterScalar(nn.Module):
    """The reward model as an adapter of the policy's base: answers as a sequence classifier does."""

    def __init__(self, roles: AdapterRoles, config: Any, head: Tensor):
        super().__init__()
        self.roles = [roles]  # in a list: no submodule of this one
        self.config = config
        self.head = nn.Linear(head.shape[1], 1, bias=False).requires_grad_(False)
        self.head.load_state_dict({"weight": head})

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> SimpleNamespace:
        (roles,) = self.roles
        with roles.active("reward"):
            hidden = roles.policy.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        last = attention_mask.sum(1) - 1
        return SimpleNamespace(logits=self.head(hidden[torch.arange(len(last), device=last.device), last]))


def _zero_head(model: PreTrainedModel) -> nn.Linear:
    """A value head that starts at 0 (Z19)."""
    head = nn.Linear(model.config.get_text_config().hidden_size, 1, bias=False)
    nn.init.zeros_(head.weight)
    return head


def zero_value(path: str, pad_id: int, seed: int) -> PreTrainedModel:
    """A value network of its own: the policy's trunk with a zero head (Z19)."""
    value = load_scalar_model(path)
    value.config.get_text_config().pad_token_id = pad_id
    init_head(value, 0.0, seed)
    return value
