"""The random states that a reward function or judge may draw from: python's, numpy's and torch's."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.models.precision import accelerator_type

import numpy as np
import torch
from accelerate.utils import set_seed


def random_states() -> dict[str, Any]:
    """Every random state of this process, in types that torch loads without unpickling code."""
    name, keys, *rest = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
    }
    return states | ({"cuda": torch.cuda.get_rng_state()} if accelerator_type() == "cuda" else {})


def set_random_states(states: Mapping[str, Any]) -> None:
    """Put back what `random_states` gave."""
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    if "cuda" in states and accelerator_type() == "cuda":
        torch.cuda.set_rng_state(states["cuda"])


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from `seed` inside, and go on outside as if nothing had been drawn."""
    before = random_states()
    set_seed(seed % 2**32)  # numpy takes 32 bits
    try:
        yield
    finally:
        set_random_states(before)
