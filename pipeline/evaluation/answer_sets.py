"""Several answers to each prompt, from one or several models: what labelers compare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pipeline.algorithms.seeds import rollout_seed, row_seed
from pipeline.config.stages import ANSWERING
from pipeline.data.encoding import Message
from pipeline.data.records import Record, at_row
from pipeline.errors import UserError
from pipeline.evaluation.answers import Sampler, load_sampler
from pipeline.evaluation.chat_server import ChatServer, NoServer, check_address
from pipeline.models.loading import check_context_length
from pipeline.rollout.engine import per_row_uniforms
from pipeline.training.lineage import read_lineage, verify_parent

SERVER_SEED_BITS = 31  # of the `seed` that servers take
Answers = list["Answer | Exception"]


@dataclass(frozen=True)
class Answer:
    """One response. finished: it ended at a stop token; None where a server does not say."""

    text: str
    finished: bool | None


@dataclass(frozen=True)
class SamplingRequest:
    """What is sampled. seed: with the prompt's number and the answer's it determines a local model's answer."""

    max_new_tokens: int = 64
    seed: int = 0
    stop_tokens: Sequence[str] = ()


class Answerer(Protocol):
    """A model that answers.

    source: what is written beside each of its answers. identity: of its answers, wherever a local model lies.
    """

    source: dict[str, Any]
    identity: dict[str, Any]

    def answer(self, records: Sequence[Record], rows: Sequence[int], draw: int) -> Answers:
        """An answer to each prompt.

        Args:
            rows: numbers of the prompts in their file.
            draw: number of the answer among those to one prompt.
        """
        ...


def load_answerer(name: str, temperature: float, request: SamplingRequest) -> Answerer:
    """The model of a stage's folder, an external folder or Hub id, or `http…#MODEL` of an OpenAI-compatible server.

    Raises:
        UserError: no such model, one that changed after its stage finished, or a server without the model's name.
    """
    if name.startswith(("http://", "https://")):
        return ServedModel(name, temperature, request)
    return LocalModel(name, temperature, request)


class LocalModel:
    """A causal LM in this process; its stop tokens are those that it was trained with."""

    def __init__(self, name: str, temperature: float, request: SamplingRequest):
        parent = verify_parent(name, ANSWERING)
        lineage = read_lineage(Path(parent.path)) or {}
        trained = lineage["recipe"].get("stop_tokens") or [] if lineage.get("stage") == "ppo" else []
        recipe = {
            "max_response_tokens": request.max_new_tokens,
            "temperature": temperature,
            "stop_tokens": [*trained, *request.stop_tokens],
        }
        self.sampler: Sampler = load_sampler(Path(parent.path), recipe)
        parent.check_tokenizer(self.sampler.encoder.tokenizer)
        self.seed = request.seed
        self.source = parent.as_source(name, temperature)
        self.identity = {**parent.as_inputs(self.sampler.encoder.tokenizer), "temperature": temperature}

    def answer(self, records: Sequence[Record], rows: Sequence[int], draw: int) -> Answers:
        settings = self.sampler.settings
        ids = [self._prompt_ids(record) for record in records]
        uniforms = per_row_uniforms(rollout_seed(self.seed, draw), rows, settings.max_new_tokens)
        sampled = [response.ids for response in self.sampler.engine.sample(self.sampler.model, ids, uniforms)]
        texts = self.sampler.encoder.texts(sampled)
        return [Answer(text, ids[-1] in settings.stop_ids) for text, ids in zip(texts, sampled, strict=True)]

    def _prompt_ids(self, record: Record) -> list[int]:
        with at_row(record):
            ids = self.sampler.encoder.prompt_ids(record["prompt"])
            tokens = len(ids) + self.sampler.settings.max_new_tokens
            check_context_length(self.sampler.model.config, tokens, f"this prompt ({len(ids)} tokens) + its answer")
        return ids


class ServedModel:
    """A model behind an OpenAI-compatible server, which has its own template and stop tokens. Its seeds are a wish."""

    def __init__(self, name: str, temperature: float, request: SamplingRequest):
        address, _, model = name.partition("#")
        check_address(address, "--model")
        if not model:
            raise UserError(f"--model {address} needs the model's name there: {address}#NAME")
        self.server, self.request, self.temperature = (
            ChatServer(address, model, flag="--model"),
            request,
            temperature,
        )
        self.source = self.identity = {"model": model, "server": address, "temperature": temperature}

    def answer(self, records: Sequence[Record], rows: Sequence[int], draw: int) -> Answers:
        settings: dict[str, Any] = {"max_tokens": self.request.max_new_tokens, "temperature": self.temperature}
        if self.request.stop_tokens:
            settings["stop"] = list(self.request.stop_tokens)
        seed = rollout_seed(self.request.seed, draw)
        answers = self.server.ask(
            [
                {"messages": record["prompt"], **settings, "seed": row_seed(seed, row) % 2**SERVER_SEED_BITS}
                for record, row in zip(records, rows, strict=True)
            ],
            lambda text: Answer(text, None),
        )
        for answer in answers:
            if isinstance(answer, NoServer):
                raise UserError(f"--model {self.source['server']}: {answer}; the same command goes on where it stopped")
        return answers


# ------------------------------------------------------------------------------------------------ sets


@dataclass
class Counts:
    """What became of all answers; `left_out` are prompts with fewer than two different ones."""

    rows: int = 0
    answers: int = 0
    duplicates: int = 0
    empty: int = 0
    failed: int = 0
    unfinished: int = 0
    left_out: int = 0
    failures: Counter[str] = field(default_factory=Counter)


def answer_sets(
    answerers: Sequence[Answerer], records: Sequence[Record], rows: Sequence[int], *, number: int, counts: Counts
) -> list[dict[str, Any]]:
    """Rankings without ranks: each prompt with its different answers, and where each came from.

    Args:
        answerers: answer in turn: draw i is the (i mod models)-th model's.
        rows: numbers of the prompts in their file.
        number: answers sampled per prompt.
        counts: added to.
    """
    drawn = [answerers[draw % len(answerers)].answer(records, rows, draw) for draw in range(number)]
    sources = [answerers[draw % len(answerers)].source for draw in range(number)]
    sets = []
    for position, record in enumerate(records):
        row = _different([answers[position] for answers in drawn], sources, counts)
        if len(row["responses"]) < 2:
            counts.left_out += 1
            continue
        counts.rows += 1
        own = {"id": record["id"]} if record.get("id") is not None else {}
        sets.append({"prompt": _as_given(record), **row, **own})
    return sets


def _different(answers: Sequence[Answer | Exception], sources: Sequence[dict[str, Any]], counts: Counts) -> Any:
    """`responses` and `sources` of one prompt without duplicates, empty ones and failures, which are counted."""
    responses: dict[str, dict[str, Any]] = {}
    for draw, (answer, source) in enumerate(zip(answers, sources, strict=True)):
        counts.answers += 1
        if isinstance(answer, Exception):
            counts.failed += 1
            counts.failures[str(answer)] += 1
        elif not answer.text.strip():
            counts.empty += 1
        elif answer.text in responses:
            counts.duplicates += 1
        else:
            counts.unfinished += answer.finished is False
            finished = {} if answer.finished is None else {"finished": answer.finished}
            responses[answer.text] = {**source, "draw": draw, **finished}
    return {"responses": list(responses), "sources": list(responses.values())}


def _as_given(record: Record) -> str | list[Message]:
    """The prompt's text where it is one user's message, else its messages."""
    messages = record["prompt"]
    return messages[0]["content"] if len(messages) == 1 and messages[0]["role"] == "user" else messages
