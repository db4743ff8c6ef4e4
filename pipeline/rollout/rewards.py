"""Scores of responses: reward models, Python functions, or a weighted sum of them.

score(["How do I boil an egg?"], ["For eight minutes."], "runs/demo/reward")
"""

from __future__ import annotations

import contextlib
import inspect
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.config.functions import RewardFunction, import_function, source_sha256
from pipeline.config.rewards import RewardSource
from pipeline.config.stages import REWARD_PARENTS
from pipeline.data.encoding import ChatEncoder, Message
from pipeline.errors import UserError, shorten
from pipeline.models.adapter_networks import AdapterRewardModel
from pipeline.models.loading import set_pad
from pipeline.models.networks import Autocast
from pipeline.models.precision import cast_frozen_linears_to_bf16
from pipeline.models.reward_model import check_one_score_head, load_scalar_model, score_ids
from pipeline.models.sharding import Sharding, gathered
from pipeline.models.tokenizers import load_tokenizer, require_pad, stop_token_ids
from pipeline.models.trials import enable_packed_attention
from pipeline.training.identity import tokenizer_hashes
from pipeline.training.lineage import Parent, verify_parent

import torch
from torch import Tensor, nn

DISAGREEMENT = "disagreement"


@dataclass(frozen=True)
class Answers:
    """Responses that are to be scored, with their prompts; all lists have one entry per response.

    prompt_ids, response_ids: in the policy's tokens, a response through its stop token where it has one.
    texts: the responses without control tokens. rows: the prompts' own rows, for functions that read other columns.
    """

    prompts: Sequence[Sequence[Message]]
    prompt_ids: Sequence[Sequence[int]]
    response_ids: Sequence[Sequence[int]]
    texts: Sequence[str]
    rows: Sequence[Mapping[str, Any]]

    def __len__(self) -> int:
        return len(self.response_ids)


@dataclass(frozen=True)
class Scores:
    """Scores of responses: the weighted sum, and every part by name; each (responses,) fp32 on the CPU."""

    scores: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class RewardPart:
    """One named, weighted part of a score.

    parent: the reward model's folder; None for a function. network: its parameters that nothing else computes with.
    """

    name: str
    weight: float
    compute: Callable[[Answers], Tensor]
    parent: Parent | None = None
    network: nn.Module | None = None


@dataclass(frozen=True)
class ScoringSetup:
    """The settings of reward models.

    stop_ids: tokens that end a response of the policy; a reward model reads such a response at its own end token.
    autocast: what its forward passes run under. cast_to_bf16: hold its linear weights in bf16 (right under autocast alone).
    loaded: models that are in memory already, by path.
    sharding: shards the models; each is whole while it scores.
    """

    encoder: ChatEncoder
    device: torch.device
    stop_ids: Sequence[int] = ()
    autocast: Autocast = contextlib.nullcontext
    cast_to_bf16: bool = False
    loaded: Mapping[str, Any] = field(default_factory=dict)
    sharding: Sharding | None = None


class Scorer:
    """Scores responses that are given as token ids of the policy's tokenizer.

    Args:
        ensemble: "sum" adds all parts by their weights. "mean" and "lower" take the parts that are models for several
            opinions of one quantity and count their mean, or their mean minus `penalty` standard deviations (Coste et al. 2024),
            once; `disagreement`, their standard deviation, is then a part of its own in the metrics.
    """

    def __init__(self, parts: Sequence[RewardPart], ensemble: str = "sum", penalty: float = 1.0):
        self.parts, self.ensemble, self.penalty = parts, ensemble, penalty

    def __call__(self, answers: Answers) -> Scores:
        """Score each response to its prompt.

        Raises:
            UserError: a part gave a score that is not finite; names the prompt and the response.
        """
        scores = {part.name: part.compute(answers) for part in self.parts}
        for name, values in scores.items():
            check_finite(values.tolist(), name, answers)
        members = [] if self.ensemble == "sum" else [part for part in self.parts if part.parent is not None]
        summed = [part for part in self.parts if part not in members]
        total = sum((part.weight * scores[part.name] for part in summed), torch.zeros(len(answers)))
        if members:
            opinions = torch.stack([part.weight * scores[part.name] for part in members])
            scores[DISAGREEMENT] = opinions.std(0, unbiased=False)
            penalty = self.penalty if self.ensemble == "lower" else 0.0
            total = total + opinions.mean(0) - penalty * scores[DISAGREEMENT]
        return Scores(total, scores)


def check_finite(values: Sequence[float], name: str, answers: Answers) -> None:
    for index, value in enumerate(values):
        if not math.isfinite(value):
            prompt = shorten(answers.prompts[index][-1]["content"])
            raise UserError(
                f"reward {name!r} gave {value} for prompt {prompt}, response {shorten(answers.texts[index])}; "
                "scores must be finite"
            )


def identity(sources: Sequence[RewardSource]) -> dict[str, Any]:
    """The identity of a recipe's `reward:`: every model, by its number, and every function's source."""
    identities: dict[str, Any] = {}
    for number, source in enumerate(sources):
        if source.model is not None:
            parent = verify_parent(source.model, REWARD_PARENTS)
            identities[f"model {number}"] = parent.as_inputs(load_tokenizer(parent.path))
        else:
            identities[str(source.function)] = source_sha256(import_function(str(source.function)))
    return identities


def part_names(sources: Sequence[RewardSource]) -> list[str]:
    """The name of each source's part in metrics: its function, or `reward_model` where there is one model only."""
    models = [source.model for source in sources if source.model is not None]
    return [str(s.function) if s.model is None else "reward_model" if len(models) == 1 else s.model for s in sources]


def build_scorer(
    sources: Sequence[RewardSource], setup: ScoringSetup, ensemble: str = "sum", penalty: float = 1.0
) -> Scorer:
    """Load and verify every reward model and function of a recipe's `reward:`."""
    named = [source.model or source.function for source in sources]
    for name in named:
        if named.count(name) > 1:
            raise UserError(f"reward: {name!r} stands twice; give each part once, with its weight")
    parts = [
        _model_part(source.model, name, source.weight, setup)
        if source.model is not None
        else _function_part(name, source.weight)
        for source, name in zip(sources, part_names(sources), strict=True)
    ]
    return Scorer(parts, ensemble, penalty)


def _model_part(path: str, name: str, weight: float, setup: ScoringSetup) -> RewardPart:
    parent = verify_parent(path, REWARD_PARENTS)
    check_one_score_head(parent.path)
    tokenizer = load_tokenizer(parent.path)
    parent.check_tokenizer(tokenizer)
    require_pad(tokenizer, path)
    loaded = setup.loaded.get(path)
    model: Any = load_scalar_model(parent.path) if loaded is None else loaded
    model.eval().requires_grad_(False)
    if setup.sharding is None:
        model.to(setup.device)
    set_pad(model, tokenizer.pad_token_id)  # an external model's own may differ
    if loaded is None:
        if hasattr(model, "score"):  # a decoder; an encoder needs its padding
            enable_packed_attention(model)
        if setup.cast_to_bf16:
            cast_frozen_linears_to_bf16(model)
        if setup.sharding is not None:
            setup.sharding.shard(model)
    same_tokenizer = tokenizer_hashes(tokenizer) == tokenizer_hashes(setup.encoder.tokenizer)
    encoder = setup.encoder if same_tokenizer else ChatEncoder(tokenizer)

    networks = [model, model.backbone] if isinstance(model, AdapterRewardModel) else [model]

    def compute(answers: Answers) -> Tensor:
        ids = _as_trained(answers, setup) if same_tokenizer else _encoded_again(answers, encoder, setup.stop_ids)
        with setup.autocast(), gathered(*networks):
            return score_ids(model, ids, tokenizer.pad_token_id)

    return RewardPart(name, weight, compute, parent, None if isinstance(model, AdapterRewardModel) else model)


def _as_trained(answers: Answers, setup: ScoringSetup) -> list[list[int]]:
    """Prompts and responses, a response that ended at any stop token read at the token that the reward model was trained on."""
    ended = [setup.encoder.finished_ids(ids, setup.stop_ids) for ids in answers.response_ids]
    return [[*prompt, *response] for prompt, response in zip(answers.prompt_ids, ended, strict=True)]


def _encoded_again(answers: Answers, encoder: ChatEncoder, stop_ids: Sequence[int]) -> list[list[int]]:
    """The text in the reward model's own tokens and template, with an end token only where the policy ended."""
    rows = zip(answers.prompts, answers.texts, answers.response_ids, strict=True)
    return [
        encoder.prompt_ids(prompt) + encoder.response_ids(text)[: None if ids and ids[-1] in stop_ids else -1]
        for prompt, text, ids in rows
    ]


# ------------------------------------------------------------------------------------------------ functions


def _function_part(name: str, weight: float) -> RewardPart:
    function = import_function(name)

    def compute(answers: Answers) -> Tensor:
        return torch.tensor(
            call_function(function, name, answers.prompts, answers.texts, answers.rows), dtype=torch.float32
        )

    return RewardPart(name, weight, compute)


def call_function(
    function: RewardFunction,
    name: str,
    prompts: Sequence[Sequence[Message]],
    texts: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
) -> list[float]:
    """The function's scores, one number per response.

    The function gets the last message of each prompt, so that a text prompt is itself.

    Raises:
        UserError: it takes other arguments, raises, or returns something else; says what and where.
    """
    last_messages = [str(prompt[-1]["content"]) for prompt in prompts]
    arguments = (last_messages, list(texts), [dict(row) for row in rows])
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        raise UserError(
            f"reward function {name!r} does not take (prompts, responses, rows): {error}; "
            "write def score(prompts, responses, rows) -> list of floats"
        ) from error
    except ValueError:  # a builtin without a signature
        pass
    try:
        returned = function(*arguments)
    except UserError:
        raise
    except Exception as error:  # the user's own code, whatever it raises
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"{where.filename}:{where.lineno}: reward function {name!r} raised {type(error).__name__}: {error}"
        ) from error
    return _numbers(returned, name, len(texts))


def _numbers(returned: Any, name: str, count: int) -> list[float]:
    if inspect.iscoroutine(returned):
        returned.close()
        raise UserError(f"reward function {name!r} is async; write an ordinary function")
    if hasattr(returned, "tolist"):  # tensors and arrays
        returned = returned.tolist()
    if isinstance(returned, str | bytes | Mapping) or not hasattr(returned, "__iter__"):
        raise UserError(f"reward function {name!r} returned {shorten(returned)}; a list of {count} scores is needed")
    values = [value.item() if hasattr(value, "item") else value for value in returned]
    if len(values) != count:
        raise UserError(f"reward function {name!r} returned {len(values)} scores for {count} responses")
    for index, value in enumerate(values):
        if not isinstance(value, int | float):
            raise UserError(f"reward function {name!r} returned {shorten(value)} for row {index}; a number is needed")
    return [float(value) for value in values]


def judge_labels(names: Sequence[str]) -> dict[str, str]:
    """Short names of judges in metrics: the module's, or `module.function` where a module judges twice."""
    modules = [name.split(":")[0] for name in names]
    return {
        module if modules.count(module) == 1 else name.replace(":", "."): name
        for module, name in zip(modules, names, strict=True)
    }


# ------------------------------------------------------------------------------------------------ finished text


class TextScorer:
    """A reward model that scores finished text; `parent` names its weights."""

    def __init__(self, reward: str, device: str | torch.device = "cpu"):
        self._encoder = ChatEncoder(load_tokenizer(reward))
        setup = ScoringSetup(self._encoder, torch.device(device), stop_ids=stop_token_ids(self._encoder))
        self._part = _model_part(reward, "reward_model", 1.0, setup)
        assert self._part.parent is not None
        self.parent = self._part.parent
        self.identity = self.parent.as_inputs(self._encoder.tokenizer)

    def __call__(self, prompts: Sequence[str | Sequence[Message]], responses: Sequence[str]) -> list[float]:
        """Centred scores of responses, each read at its end token."""
        messages = [[{"role": "user", "content": p}] if isinstance(p, str) else list(p) for p in prompts]
        prompt_ids = [self._encoder.prompt_ids(p) for p in messages]
        response_ids = [self._encoder.response_ids(r) for r in responses]
        rows: list[dict[str, Any]] = [{}] * len(responses)
        scores: list[float] = self._part.compute(Answers(messages, prompt_ids, response_ids, responses, rows)).tolist()
        return scores


def score(
    prompts: Sequence[str | Sequence[Message]], responses: Sequence[str], reward: str, device: str = "cpu"
) -> list[float]:
    """Centred scores of finished responses by a reward model's folder, in one call."""
    return TextScorer(reward, device)(prompts, responses)
