"""The models of a live chat on the labeling page (`mode: chat` of `label.yaml`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.chat.model import ChatModel, Reply, Sampling, load_chat_model
from pipeline.config.stages import ANSWERING
from pipeline.data.messages import Message
from pipeline.errors import UserError
from pipeline.labeling.settings import Settings, setting_error
from pipeline.training.lineage import verify_parent

UNNAMED = "the model"  # in messages to labelers, who are not told which model answers


@dataclass(frozen=True)
class LabeledModels:
    """One or two models, with what is recorded of them.

    Attributes:
        sources: as `rlhf sample` writes them beside answers.
        identities: hashes of weights, settings, adapter, tokenizer and template.
    """

    models: list[ChatModel]
    sources: list[dict[str, Any]]
    identities: list[dict[str, Any]]
    sampling: Sampling

    def reply(self, model: int, messages: Sequence[Message], seed: int) -> Reply:
        return Reply(self.models[model], messages, self.sampling, seed)


def load_labeled_models(folder: Path, settings: Settings, resolve: Callable[[str], str]) -> LabeledModels:
    """Load the models that a labeling folder's settings name.

    Args:
        resolve: from a run's folder to that of a stage.

    Raises:
        UserError: there is none, it changed after its stage finished, has no chat template, or its template refuses a dialogue.
    """
    sampling = Sampling(temperature=settings.temperature, max_tokens=settings.max_tokens)
    loaded = LabeledModels([], [], [], sampling)
    for name in settings.model:
        try:
            _add(loaded, resolve(name), settings)
        except UserError as error:
            raise setting_error(folder, "model", str(error)) from error
    return loaded


def _add(loaded: LabeledModels, name: str, settings: Settings) -> None:
    model = load_chat_model(name)
    if model.notes:
        raise UserError(
            f"{name!r} has no chat template, so it cannot tell questions from answers; name an SFT or PPO stage"
        )
    parent = verify_parent(name, ANSWERING)
    parent.check_tokenizer(model.encoder.tokenizer)
    loaded.models.append(dataclasses.replace(model, name=UNNAMED))
    loaded.sources.append(parent.as_source(name, settings.temperature))
    loaded.identities.append(parent.as_inputs(model.encoder.tokenizer))
    _try_template(loaded, settings)


def _try_template(loaded: LabeledModels, settings: Settings) -> None:
    """A dialogue of two questions, so that a template that refuses one does so now."""
    system = [{"role": "system", "content": settings.system}] if settings.system.strip() else []
    question = {"role": "user", "content": "Hello"}
    loaded.reply(len(loaded.models) - 1, [*system, question, {"role": "assistant", "content": "Hello."}, question], 0)
