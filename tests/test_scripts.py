"""The scripts' own arithmetic."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from baseline_trigram import KneserNeyTrigram
from mutation_check import MUTATIONS, ROOT, Mutation, resolve

DOCUMENTS = [[0, 1, 2, 3, 1, 2, 4], [0, 1, 2, 4, 4, 1, 3], [0, 2, 1, 2, 4]]


@pytest.mark.parametrize("context", [(0, 1), (1, 2), (4, 4), (3, 3), (None, 0), (None, 5)])
def test_probabilities_sum_to_one(context: tuple[int | None, int]) -> None:
    model = KneserNeyTrigram(DOCUMENTS, 6)
    probabilities = [model.probability(*context, c) for c in range(6)]
    assert sum(probabilities) == pytest.approx(1)
    assert min(probabilities) > 0


def test_a_seen_trigram_by_hand() -> None:
    """P(4 | 1 2): seen three times of four after (1, 2)."""
    model = KneserNeyTrigram(DOCUMENTS, 6)
    assert model.trigrams[1, 2, 4] == 3
    assert model.contexts3[1, 2] == 4
    # Lower orders count different contexts: 4 follows 2 after (1) alone, and stands in two bigrams' company: 2 4, 4 4.
    assert model.bigrams[2, 4] == 1
    assert model.unigrams[4] == 2
    d1, d2, d3 = model.discounts
    p1 = (2 - d1) / model.total1 + d1 * len(model.unigrams) / model.total1 / 6
    p2 = (1 - d2) / model.contexts2[2] + d2 * model.types2[2] / model.contexts2[2] * p1
    assert model.probability(1, 2, 4) == pytest.approx((3 - d3) / 4 + d3 * 2 / 4 * p2)


def test_likelihood_counts_every_token_but_the_first() -> None:
    nll, tokens = KneserNeyTrigram(DOCUMENTS, 6).nll(DOCUMENTS)
    assert tokens == 6 + 6 + 4
    assert nll > 0


@pytest.mark.parametrize("bug", MUTATIONS, ids=lambda bug: bug.name)
def test_a_mutation_names_a_function_and_a_test_that_exist(bug: Mutation) -> None:
    """`scripts/mutation_check.py` stays true as the code moves."""
    _, _, target = resolve(bug.target)
    assert callable(getattr(target, "__func__", target))
    file, _, name = bug.test.partition("::")
    assert f"def {name.split('[')[0]}(" in (ROOT / file).read_text(encoding="utf-8")


def test_mutations_have_names_of_their_own() -> None:
    assert len({bug.name for bug in MUTATIONS}) == len(MUTATIONS) > 50
