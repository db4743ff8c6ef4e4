"""What gives a response its score: a reward model, a Python function, or a weighted sum of them.

score(["How do I boil an egg?"], ["For eight minutes."], "runs/demo/reward")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.config.functions import RewardFunction, import_function, source_sha256
from pipeline.data.encoding import ChatEncoder, Message
from pipeline.errors import UserError, shorten
from pipeline.models.loading import hold_in_bf16, load_tokenizer, require_pad, set_pad
from pipeline.models.packed import prepare
from pipeline.models.reward_model import load_scalar_model, refuse_other_heads, score_ids
from pipeline.training.identity import tokenizer_hashes
from pipeline.training.lineage import Parent, verify_parent

import torch
from torch import Tensor

DISAGREEMENT = "disagreement"


class SourceSpec(Protocol):
    """A line of a recipe's `reward:` (see `arguments.RewardSource`)."""

    @property
    def model(self) -> str | None: ...
    @property
    def function(self) -> str | None: ...
    @property
    def weight(self) -> float: ...


@dataclass(frozen=True)
class Scores:
    """Scores of a batch: the weighted sum, and every part by name; each (rows,) fp32 on the CPU."""

    scores: Tensor
    parts: dict[str, Tensor]


@dataclass
class Part:
    """One named, weighted part of a score."""

    name: str
    weight: float
    compute: Callable[
        [Sequence[Sequence[Message]], list[list[int]], list[list[int]], list[str], list[dict[str, Any]]], Tensor
    ]
    parent: Parent | None = None


class Scorer:
    """Scores responses given as token ids of the policy's tokenizer.

    Args:
        ensemble: "sum" adds all parts by their weights; "mean" and "lower" take the parts that are models for several
            opinions of one thing, and count their mean, or their mean less `penalty` standard deviations
            (Coste et al. 2024), once; `disagreement`, their standard deviation, is then a part of its own in the figures.
    """

    def __init__(self, parts: list[Part], encoder: ChatEncoder, ensemble: str = "sum", penalty: float = 1.0):
        self.parts = parts
        self.encoder = encoder
        self.ensemble, self.penalty = ensemble, penalty

    def __call__(
        self,
        prompts: Sequence[Sequence[Message]],
        prompt_ids: list[list[int]],
        response_ids: list[list[int]],
        rows: list[dict[str, Any]],
    ) -> Scores:
        """Score each response to its prompt.

        Args:
            prompts: messages; prompt_ids: the same as ids.
            response_ids: through the stop token where there is one.
            rows: the prompts' records, for functions that read other columns.

        Raises:
            UserError: a function returned the wrong number of scores, or one that is not finite; names the row.
        """
        texts = self.encoder.texts(response_ids)
        found = {part.name: part.compute(prompts, prompt_ids, response_ids, texts, rows) for part in self.parts}
        for name, values in found.items():
            for index, value in enumerate(values.tolist()):
                if not math.isfinite(value):
                    raise UserError(
                        f"reward {name!r} gave {value} for prompt {shorten(prompts[index][-1]['content'])}, "
                        f"response {shorten(texts[index])}; scores must be finite"
                    )
        members = [] if self.ensemble == "sum" else [part for part in self.parts if part.parent is not None]
        summed = [part for part in self.parts if part not in members]
        total = sum((part.weight * found[part.name] for part in summed), torch.zeros(len(response_ids)))
        if members:
            opinions = torch.stack([part.weight * found[part.name] for part in members])
            found[DISAGREEMENT] = opinions.std(0, unbiased=False)
            total = total + opinions.mean(0) - (self.penalty if self.ensemble == "lower" else 0.0) * found[DISAGREEMENT]
        return Scores(total, found)


def identity(sources: Sequence[SourceSpec]) -> dict[str, Any]:
    """What identifies the scores, in order: every model by its number, every function's source by its name."""
    found: dict[str, Any] = {}
    for number, source in enumerate(sources):
        if source.model is not None:
            parent = verify_parent(source.model, ("reward",))
            found[f"model {number}"] = parent.as_inputs(load_tokenizer(parent.path))
        else:
            found[str(source.function)] = source_sha256(import_function(str(source.function)))
    return found


def build_scorer(
    sources: Sequence[SourceSpec],
    encoder: ChatEncoder,
    device: torch.device,
    loaded: Mapping[str, Any] | None = None,
    ensemble: str = "sum",
    penalty: float = 1.0,
    autocast: bool = False,
) -> Scorer:
    """Load and verify every reward model and function of a recipe.

    Args:
        loaded: models that are there already, by path.
        autocast: it will be called under bf16 autocast alone (see `loading.hold_in_bf16`).
    """
    named = [source.model or source.function for source in sources]
    for name in named:
        if named.count(name) > 1:
            raise UserError(f"reward: {name!r} stands twice; give each part once, with its weight")
    models = [source.model for source in sources if source.model is not None]
    parts = []
    for source in sources:
        if source.model is not None:
            label = "reward_model" if len(models) == 1 else source.model
            model = (loaded or {}).get(source.model)
            parts.append(_model_part(source.model, label, source.weight, encoder, device, model, autocast))
        else:
            assert source.function is not None
            parts.append(_function_part(source.function, source.weight))
    return Scorer(parts, encoder, ensemble, penalty)


def _model_part(
    path: str,
    label: str,
    weight: float,
    encoder: ChatEncoder,
    device: torch.device,
    loaded: Any = None,
    autocast: bool = False,
) -> Part:
    parent = verify_parent(path, ("reward",))
    refuse_other_heads(parent.path)
    tokenizer = load_tokenizer(parent.path)
    parent.check_tokenizer(tokenizer)
    require_pad(tokenizer, path)
    model: Any = load_scalar_model(parent.path) if loaded is None else loaded
    model.to(device).eval().requires_grad_(False)
    set_pad(model, tokenizer.pad_token_id)  # an external model's own may differ
    if loaded is None:
        if hasattr(model, "score"):  # a decoder; an encoder needs its padding
            prepare(model)
        if autocast:
            hold_in_bf16(model)
    same_tokenizer = tokenizer_hashes(tokenizer) == tokenizer_hashes(encoder.tokenizer)
    own = ChatEncoder(tokenizer)
    stops = {encoder.eos_id}

    def compute(prompts: Any, prompt_ids: Any, response_ids: Any, texts: list[str], rows: Any) -> Tensor:
        if same_tokenizer:
            ids = [p + r for p, r in zip(prompt_ids, response_ids, strict=True)]
        else:  # the text, in the reward model's own tokens and template; EOS only where the policy ended
            ids = [
                own.prompt_ids(p) + own.response_ids(t)[: None if r[-1:] and r[-1] in stops else -1]
                for p, t, r in zip(prompts, texts, response_ids, strict=True)
            ]
        return score_ids(model, ids, tokenizer.pad_token_id)

    return Part(label, weight, compute, parent)


def _function_part(name: str, weight: float) -> Part:
    function = import_function(name)

    def compute(
        prompts: Any, prompt_ids: Any, response_ids: Any, texts: list[str], rows: list[dict[str, Any]]
    ) -> Tensor:
        values = call_function(function, name, [prompt[-1]["content"] for prompt in prompts], texts, rows)
        return torch.tensor(values, dtype=torch.float32)

    return Part(name, weight, compute)


def call_function(
    function: RewardFunction, name: str, prompts: list[str], responses: list[str], rows: list[dict[str, Any]]
) -> list[float]:
    """The function's scores, checked for number and type."""
    values = list(function(prompts, responses, rows))
    if len(values) != len(responses):
        raise UserError(f"reward function {name!r} returned {len(values)} scores for {len(responses)} responses")
    for index, value in enumerate(values):
        if not isinstance(value, int | float):
            raise UserError(f"reward function {name!r} returned {shorten(value)} for row {index}; a number is needed")
    return [float(value) for value in values]


def judge_labels(names: Sequence[str]) -> dict[str, str]:
    """Short names of judges in figures: the module's, or `module.function` where a module judges twice."""
    modules = [name.split(":")[0] for name in names]
    return {
        module if modules.count(module) == 1 else name.replace(":", "."): name
        for module, name in zip(modules, names, strict=True)
    }


class TextScorer:
    """A reward model that scores finished text; `parent` names its weights."""

    def __init__(self, reward: str, device: str | torch.device = "cpu"):
        self._encoder = ChatEncoder(load_tokenizer(reward))
        self._part = _model_part(reward, "reward_model", 1.0, self._encoder, torch.device(device))
        assert self._part.parent is not None
        self.parent = self._part.parent
        self.identity = self.parent.as_inputs(self._encoder.tokenizer)

    def __call__(self, prompts: Sequence[str | Sequence[Message]], responses: Sequence[str]) -> list[float]:
        """Centred scores of responses, each read at its EOS."""
        messages = [[{"role": "user", "content": p}] if isinstance(p, str) else list(p) for p in prompts]
        prompt_ids = [self._encoder.prompt_ids(p) for p in messages]
        response_ids = [self._encoder.response_ids(r) for r in responses]
        rows: list[dict[str, Any]] = [{}] * len(responses)
        found: list[float] = self._part.compute(messages, prompt_ids, response_ids, list(responses), rows).tolist()
        return found


def score(
    prompts: Sequence[str | Sequence[Message]], responses: Sequence[str], reward: str, device: str = "cpu"
) -> list[float]:
    """Centred scores of finished responses by a reward model's folder, in one call."""
    return TextScorer(reward, device)(prompts, responses)
