"""The hidden truth of the demo: what makes a small shop's answer to a customer a good one.

A real feedback project never sees the function behind its labelers. The demo has one, in code, so that
every stage of the chain can be measured against it: simulated labelers rank by it (``labelers.py``), a
Python reward can call it (``score``), and an evaluation can tell whether a policy got better or merely
found a hole in its reward model.

A customer's message names one item and one problem; both are recognised from the message itself. Each
problem has exactly one right remedy. An answer is judged by six parts, each between 0 and 1:

=================  ======  =====================================================================
part               weight  1.0 means
=================  ======  =====================================================================
``names_item``     0.22    names the customer's item, and no other item (with another one: 0.5)
``fits_problem``   0.15    restates the customer's problem, and no other (with another one: 0.5)
``right_remedy``   0.30    offers the problem's one right remedy, and no other remedy (else 0)
``polite``         0.13    apologises or thanks, and says nothing rude (more than 3 times: 0.5)
``no_repetition``  0.10    repeats no sentence, no word at once, and hardly any three-word run
``short``          0.10    4 to 26 words; falls linearly to 0 at 45 words
=================  ======  =====================================================================

Only the standard library is used, and every pattern is compiled once, at import.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

# What an item is decides which problems it can have: a pillow has no missing part and no manual.
DEVICE, KIT, SOFT = "device", "kit", "soft"

_KINDS: dict[str, tuple[str, ...]] = {
    DEVICE: (
        "kettle", "toaster", "blender", "coffee maker", "rice cooker", "hand mixer", "kitchen scale",
        "desk lamp", "floor lamp", "table fan", "heater", "radio", "alarm clock", "wall clock", "camera",
        "phone charger", "keyboard", "printer", "speaker", "torch", "hair dryer", "steam iron",
        "vacuum cleaner", "sewing machine", "bike pump", "drill", "doorbell", "lawn mower",
    ),
    KIT: (
        "office chair", "book shelf", "garden table", "camping tent", "tool box", "shoe rack", "toy train",
        "chess set", "bird house", "picture frame", "coat stand",
    ),
    SOFT: (
        "rain coat", "umbrella", "wool hat", "blanket", "pillow", "bath towel", "backpack", "door mat",
        "suitcase",
    ),
}  # fmt: skip
ITEM_KIND: dict[str, str] = {item: kind for kind, items in _KINDS.items() for item in items}
ITEMS: tuple[str, ...] = tuple(ITEM_KIND)


class Problem(NamedTuple):
    """One thing that can go wrong with an item, and the one remedy that puts it right.

    ``stated`` and ``said`` are predicates whose subject is the item; those in ``said`` speak of "I" or
    "my", so that only the customer can use them. ``nouns`` name the problem without a subject. Remedies
    are verb phrases with the slots ``{you}``, ``{your}`` and ``{ref}`` (the item, however it is called).
    ``fits`` and ``remedy_words`` are the patterns by which an answer is judged; no text matches one
    problem's pattern by stating another problem, or by offering a remedy.
    """

    name: str
    kinds: tuple[str, ...]
    stated: tuple[str, ...]
    said: tuple[str, ...]
    nouns: tuple[str, ...]
    fits: str
    remedies: tuple[str, ...]
    remedy_words: str


_ALL = (DEVICE, KIT, SOFT)

PROBLEMS: tuple[Problem, ...] = (
    Problem(
        name="broken",
        kinds=(DEVICE, KIT),
        stated=("arrived broken", "came broken", "was broken on arrival", "arrived with a crack",
                "arrived damaged"),
        said=("was broken when I opened the box", "was cracked when I got it"),
        nouns=("the damage", "the damage to {ref}"),
        fits=r"broken|crack(?:s|ed)?|damaged?",
        remedies=("send {you} a replacement", "send {you} a replacement for {ref}",
                  "post {you} a replacement", "get a replacement out to {you}"),
        remedy_words=r"replacements?",
    ),
    Problem(
        name="faulty",
        kinds=(DEVICE,),
        stated=("stopped working after a week", "stopped working after two days", "no longer works",
                "does not work any more", "keeps failing"),
        said=("stopped working when I used it", "does not work for me"),
        nouns=("the fault", "the fault in {ref}"),
        fits=r"stop(?:s|ped)? working|no longer works?|do(?:es)? not work|faulty?|fail(?:s|ed|ing|ure)?",
        remedies=("repair {ref} free of charge", "repair {ref} in our workshop",
                  "have {ref} repaired at no cost", "arrange a free repair"),
        remedy_words=r"repair(?:s|ed|ing)?",
    ),
    Problem(
        name="colour",
        kinds=_ALL,
        stated=("is the wrong colour", "came in the wrong colour", "has the wrong colour",
                "is not the colour in the picture", "has a different colour from the picture"),
        said=("is not the colour I wanted", "is not the colour I asked for"),
        nouns=("the wrong colour", "the mistake with the colour"),
        fits=r"wrong colou?r|not the colou?r|different colou?r|with the colou?r",
        remedies=("exchange {ref} for the right colour", "swap {ref} for one in the right colour",
                  "send {you} one in the right colour", "change {ref} for the right colour"),
        remedy_words=r"(?:right|correct) colou?r",
    ),
    Problem(
        name="small",
        kinds=_ALL,
        stated=("is too small", "is much too small", "turned out too small", "is a size too small",
                "is smaller than it looks in the picture"),
        said=("is too small for me", "is smaller than I expected"),
        nouns=("the small size", "the trouble with the size"),
        fits=r"too small|smaller than|small size|with the size",
        remedies=("exchange {ref} for a larger size", "swap {ref} for a larger one",
                  "send {you} a larger size", "send {you} a larger one"),
        remedy_words=r"larger|bigger",
    ),
    Problem(
        name="late",
        kinds=_ALL,
        stated=("never arrived", "has not arrived yet", "still has not come", "is two weeks late",
                "did not come last week"),
        said=("has not arrived at my house", "has not come to my door"),
        nouns=("the late delivery", "the delay"),
        fits=r"never arrived|not arrived|not come|late|delay(?:s|ed)?",
        remedies=("trace the parcel", "trace {your} parcel", "ask the post office to trace the parcel",
                  "trace the parcel and call {you}"),
        remedy_words=r"trac(?:e|es|ed|ing)",
    ),
    Problem(
        name="charged",
        kinds=_ALL,
        stated=("was charged twice", "was billed twice", "was paid for twice", "appears twice on the bill",
                "is on the bill twice"),
        said=("was charged twice to my card", "is on my bill twice"),
        nouns=("the double charge", "the double bill"),
        fits=r"twice|double charge|double bill",
        remedies=("refund the second charge", "pay back the second charge",
                  "pay {you} back for the second charge", "take the second charge off {your} bill"),
        remedy_words=r"second charge",
    ),
    Problem(
        name="part",
        kinds=(DEVICE, KIT),
        stated=("is missing a part", "came without one of its parts", "has a part missing",
                "arrived with a part missing", "is not complete"),
        said=("was missing a part when I opened it", "is not complete as far as I can see"),
        nouns=("the incomplete box", "the incomplete delivery"),
        fits=r"missing a part|part missing|one of its parts|not complete|incomplete",
        remedies=("send {you} the missing part", "post {you} the missing part", "find {you} the missing part",
                  "get the missing part to {you}"),
        remedy_words=r"missing parts?",
    ),
    Problem(
        name="smell",
        kinds=_ALL,
        stated=("smells of smoke", "smells bad", "has a strong smell", "smells of old smoke",
                "has a bad smell"),
        said=("smells so bad that I cannot use it", "has a smell that I cannot stand"),
        nouns=("the smell", "the bad smell"),
        fits=r"smell(?:s|ed|y)?",
        remedies=("give {you} a full refund", "send {you} a full refund", "pay {you} a full refund",
                  "make a full refund to {your} card"),
        remedy_words=r"full refund",
    ),
    Problem(
        name="manual",
        kinds=(DEVICE, KIT),
        stated=("came without instructions", "arrived without instructions", "has no instructions in the box",
                "came with no instructions", "was sent without its instructions"),
        said=("came without instructions, so I cannot use it", "has no instructions that I can find"),
        nouns=("the lack of instructions", "the lost instructions"),
        fits=r"instructions?",
        remedies=("email {you} the manual", "email the manual to {you}", "send {you} the manual by email",
                  "send the manual to {your} email address"),
        remedy_words=r"manuals?",
    ),
    Problem(
        name="price",
        kinds=_ALL,
        stated=("is cheaper now", "is much cheaper this week", "costs less now", "costs less this week",
                "is sold for less now"),
        said=("costs less this week than I paid", "costs less now than I paid"),
        nouns=("the lower price", "the change in price"),
        fits=r"cheaper|costs? less|for less|lower price|in price",
        remedies=("pay {you} the difference", "refund the difference", "pay back the difference",
                  "send {you} the difference"),
        remedy_words=r"difference",
    ),
)  # fmt: skip

# Every (item, problem name) a customer can write about.
COMBINATIONS: tuple[tuple[str, str], ...] = tuple(
    (item, problem.name) for item in ITEMS for problem in PROBLEMS if ITEM_KIND[item] in problem.kinds
)

RUDE_PHRASES: tuple[str, ...] = (
    "not our problem", "your own mistake", "stop complaining", "too busy for", "do not write to us",
    "not our business", "should have checked", "what did you expect", "do not bother us",
    "nobody else complains",
)  # fmt: skip

PARTS: tuple[str, ...] = ("names_item", "fits_problem", "right_remedy", "polite", "no_repetition", "short")
WEIGHTS: dict[str, float] = {
    "names_item": 0.22,
    "fits_problem": 0.15,
    "right_remedy": 0.30,
    "polite": 0.13,
    "no_repetition": 0.10,
    "short": 0.10,
}

FEWEST_WORDS, SHORT_WORDS, LONG_WORDS = 4, 26, 45
POLITE_ENOUGH = 3  # polite words beyond this many are padding, not politeness
FREE_TRIGRAMS = 1  # repeated three-word runs that plain English has anyway
TRIGRAM_COST = 0.25


def _phrases(phrases: Iterable[str]) -> str:
    """Alternatives for whole phrases, the longest tried first."""
    longest_first = sorted(phrases, key=lambda phrase: (-len(phrase), phrase))
    return "|".join(re.escape(phrase) for phrase in longest_first)


def _whole_words(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{pattern})\b")


def _by_problem(patterns: dict[str, str]) -> re.Pattern[str]:
    """One pattern for all problems, whose matches carry the problem's name as their group."""
    return _whole_words("|".join(f"(?P<{name}>{pattern})" for name, pattern in patterns.items()))


# All patterns are made for texts in the plain form that ``_plain`` gives them.
_PROBLEM_OF_PHRASE = {phrase.casefold(): p.name for p in PROBLEMS for phrase in p.stated + p.said}
_ITEM = re.compile(rf"\b({_phrases(ITEMS)})s?\b")
_STATED = _whole_words(_phrases(_PROBLEM_OF_PHRASE))
_FITS = _by_problem({p.name: p.fits for p in PROBLEMS})
_REMEDY = _by_problem({p.name: p.remedy_words for p in PROBLEMS})
_POLITE = _whole_words(r"sorry|apolog\w+|thank\w*|regret\w*|grateful")
_RUDE = _whole_words(_phrases(RUDE_PHRASES))
_REFUSAL = _whole_words(r"can ?not|can't|will not|won't|would not|do not|don't|unable to|refuse to|never")
_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")
_SENTENCE_END = re.compile(r"[.!?]+")
_CLAUSE_END = re.compile(r"[.!?,;:]|\b(?:so|but|and)\b")
_REFUSAL_REACH = 60  # characters before an offer in which a refusal may stand


def _plain(text: str) -> str:
    """The text in lower case, with single spaces and straight apostrophes."""
    return " ".join(text.casefold().replace("\u2019", "'").split())


def words_in(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return _WORD.findall(_plain(text))


def items_in(text: str) -> list[str]:
    """The items that a text names, in order of first mention."""
    return list(dict.fromkeys(_ITEM.findall(_plain(text))))


def problems_in(text: str) -> list[str]:
    """The names of the problems that a text states, by their keywords."""
    return list(dict.fromkeys(found.lastgroup for found in _FITS.finditer(_plain(text)) if found.lastgroup))


def remedies_in(text: str) -> list[str]:
    """The problems whose remedy a text offers. "We cannot send a replacement" is no offer."""
    plain = _plain(text)
    offers = (found for found in _REMEDY.finditer(plain) if not _is_refused(plain, found.start()))
    return list(dict.fromkeys(offer.lastgroup for offer in offers if offer.lastgroup))


def _is_refused(plain: str, at: int) -> bool:
    before = plain[max(0, at - _REFUSAL_REACH) : at]
    return bool(_REFUSAL.search(_CLAUSE_END.split(before)[-1]))


@lru_cache(maxsize=8192)
def subject(prompt: str) -> tuple[str | None, str | None]:
    """The item and the problem that a customer's message is about; None for what it does not say."""
    item = next(iter(items_in(prompt)), None)
    if stated := _STATED.search(_plain(prompt)):
        return item, _PROBLEM_OF_PHRASE[stated.group()]
    return item, next(iter(problems_in(prompt)), None)


def _only(wanted: str | None, found: list[str]) -> float:
    """1 if the wanted thing alone was found, 0.5 if among others, 0 if not at all."""
    if wanted is None or wanted not in found:
        return 0.0
    return 1.0 if len(found) == 1 else 0.5


def _politeness(response: str) -> float:
    plain = _plain(response)
    polite = len(_POLITE.findall(plain))
    if polite == 0 or _RUDE.search(plain):
        return 0.0
    return 1.0 if polite <= POLITE_ENOUGH else 0.5


def _freshness(response: str, words: list[str]) -> float:
    sentences = [tuple(said) for part in _SENTENCE_END.split(response) if (said := words_in(part))]
    if len(set(sentences)) < len(sentences):
        return 0.0
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    repeated = max(0, len(trigrams) - len(set(trigrams)) - FREE_TRIGRAMS)
    doubled = sum(first == second for first, second in pairwise(words))
    return max(0.0, 1.0 - TRIGRAM_COST * repeated - 0.5 * doubled)


def _brevity(count: int) -> float:
    if count < FEWEST_WORDS:
        return 0.0
    return min(1.0, max(0.0, (LONG_WORDS - count) / (LONG_WORDS - SHORT_WORDS)))


def parts(prompt: str, response: str) -> dict[str, float]:
    """Judge an answer by the six parts, each from 0 to 1; an answer without a word gets 0 everywhere."""
    words = words_in(response)
    if not words:
        return dict.fromkeys(PARTS, 0.0)
    item, problem = subject(prompt)
    return {
        "names_item": _only(item, items_in(response)),
        "fits_problem": _only(problem, problems_in(response)),
        "right_remedy": float(problem is not None and remedies_in(response) == [problem]),
        "polite": _politeness(response),
        "no_repetition": _freshness(response, words),
        "short": _brevity(len(words)),
    }


def rubric(prompt: str, response: str) -> float:
    """How good an answer is, from 0 to 1: the weighted mean of its parts."""
    judged = parts(prompt, response)
    return sum(WEIGHTS[part] * judged[part] for part in PARTS)


def score(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """The rubric as a reward function; ``rows`` is part of the signature and is not needed here."""
    del rows
    return [rubric(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
