"""Five simulated labelers, who rank answers by their own taste and make mistakes.

Real labelers agree with each other on about three comparisons in four. Here the disagreement has two
known sources: each labeler weighs the six parts of the rubric a little differently (taste), and each
ranking is made on utilities blurred by gaussian noise (care). Both are set below, so that the ceiling of
a reward model can be computed: no model can predict a labeler better than the labeler's own utility does.

=======  =====  ====  ======  ======  ======  =====  =====  ==========================================
labeler  names  fits  remedy  polite  no rep  short  noise  taste
=======  =====  ====  ======  ======  ======  =====  =====  ==========================================
ana       0.22  0.16    0.30    0.12    0.10   0.10   0.13  close to the rubric
ben       0.18  0.12    0.24    0.28    0.10   0.08   0.13  likes politeness
chloe     0.18  0.12    0.24    0.08    0.16   0.22   0.12  likes a short answer without repetition
dev       0.16  0.10    0.52    0.06    0.08   0.08   0.20  cares about the remedy, and works in haste
erik      0.22  0.16    0.28    0.16    0.09   0.09   0.15  likes a kind answer to the point
=======  =====  ====  ======  ======  ======  =====  =====  ==========================================

"erik" is meant to be kept out of training: his taste and noise lie within the range of the others, and a
reward model that serves him as well as it serves the rest has learned what the labelers share.
"""

from __future__ import annotations

import random
import sys
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

# A recipe names this file by its path; its neighbour must be importable then, too.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from rubric import PARTS, parts, rubric

TIE = 0.02  # neighbours in a ranking whose blurred utilities lie closer than this are called equal


class Labeler(NamedTuple):
    """One labeler: the weights of the rubric's parts (they sum to 1) and the noise of a judgement."""

    taste: dict[str, float]
    noise: float


def _labeler(*taste: float, noise: float) -> Labeler:
    return Labeler(dict(zip(PARTS, taste, strict=True)), noise)


LABELERS: dict[str, Labeler] = {
    "ana": _labeler(0.22, 0.16, 0.30, 0.12, 0.10, 0.10, noise=0.13),
    "ben": _labeler(0.18, 0.12, 0.24, 0.28, 0.10, 0.08, noise=0.13),
    "chloe": _labeler(0.18, 0.12, 0.24, 0.08, 0.16, 0.22, noise=0.12),
    "dev": _labeler(0.16, 0.10, 0.52, 0.06, 0.08, 0.08, noise=0.20),
    "erik": _labeler(0.22, 0.16, 0.28, 0.16, 0.09, 0.09, noise=0.15),
}
KEPT_OUT = "erik"


def utility(prompt: str, response: str, labeler: str) -> float:
    """What an answer is worth to a labeler, from 0 to 1, before any noise."""
    judged = parts(prompt, response)
    return sum(weight * judged[part] for part, weight in LABELERS[labeler].taste.items())


def truth(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """Noiseless utilities as a reward function: each row's own labeler, or the rubric if it names none."""
    values = []
    for prompt, response, row in zip(prompts, responses, rows, strict=True):
        labeler = row.get("labeler")
        known = labeler in LABELERS
        values.append(utility(prompt, response, labeler) if known else rubric(prompt, response))
    return values


def rank(prompt: str, responses: list[str], labeler: str, rng: random.Random) -> list[int]:
    """Rank answers as a labeler would: 1 is best, equal ranks are ties, and no rank is left out.

    One draw of noise per answer, so that a ranking is consistent with itself, as a sorted list must be.
    """
    noise = LABELERS[labeler].noise
    blurred = [utility(prompt, response, labeler) + rng.gauss(0.0, noise) for response in responses]
    order = sorted(range(len(responses)), key=lambda i: -blurred[i])
    ranks = [1] * len(responses)
    for better, worse in pairwise(order):
        ranks[worse] = ranks[better] + (blurred[better] - blurred[worse] >= TIE)
    return ranks
