"""Known bugs that `scripts/mutation_check.py` puts back: functions that stand in for one of the pipeline's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Mutation:
    """A bug and the test that must catch it.

    target: `module:name` or `module:Class.name` of what is replaced.
    wrong: stands in for it; gets the original function first, then the call's own arguments.
    """

    name: str
    target: str
    wrong: Callable[..., Any]
    test: str


MUTATIONS: list[Mutation] = []


def mutation(name: str, target: str, test: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds the decorated function to `MUTATIONS`."""

    def add(wrong: Callable[..., Any]) -> Callable[..., Any]:
        MUTATIONS.append(Mutation(name, target, wrong, test))
        return wrong

    return add
