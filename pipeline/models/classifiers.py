"""Sequence classifiers for architectures that transformers has language models of, but no classifiers (5.23: Cohere, Granite,
LFM2, Mamba, …): transformers' own generic head on their body, under the name that it would have there.

Such a folder loads with `load_classifier`, not with plain transformers.
"""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification

logger = logging.getLogger(__name__)
# Language models whose body has another name than their class says: that of the model with pictures.
BODIES = {"Llama4ForCausalLM": "model"}


def classifier_class(config: PreTrainedConfig) -> Any:
    """The class that loads a sequence classifier of this configuration: transformers' own, or a generic one."""
    kind = type(config)
    if kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForSequenceClassification
    return _generic(MODEL_FOR_CAUSAL_LM_MAPPING[kind], kind)  # type: ignore[arg-type]  # a class has a hash


@functools.cache
def _generic(causal: Any, config_class: type[PreTrainedConfig]) -> Any:
    family = next(c for c in causal.__mro__ if c.__name__.endswith("PreTrainedModel") and c is not PreTrainedModel)
    name = family.__name__.removesuffix("PreTrainedModel") + "ForSequenceClassification"
    logger.warning(
        "transformers has no %s; its generic classifier is used, in a folder that plain transformers cannot load", name
    )
    values = {
        "base_model_prefix": BODIES.get(causal.__name__, causal.base_model_prefix),
        "config_class": config_class,  # the family's may be that of a model with pictures, built from its defaults
        "__init__": _init,
        "__module__": __name__,
        # transformers skips the buffers of a body, which no file holds, where it takes a class for a user's own
        "is_custom_code": classmethod(lambda cls: False),  # noqa: ARG005
    }
    return type(name, (GenericForSequenceClassification, family), values)


def _init(self: Any, config: PreTrainedConfig) -> None:
    GenericForSequenceClassification.__init__(self, config)
    # The generic classifier passes None for what a body with a recurrent state has no parameter for.
    body = getattr(self, self.base_model_prefix)
    known = set(inspect.signature(body.forward).parameters)
    body.register_forward_pre_hook(
        lambda _, given, options: (given, {k: v for k, v in options.items() if v is not None or k in known}),
        with_kwargs=True,
    )
