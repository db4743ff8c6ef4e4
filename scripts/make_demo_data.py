"""Write the demo's synthetic data: a small shop and what it answers its customers.

Everything is drawn from seeded generators and built from the vocabulary of ``recipes/demo/rubric.py``,
so that the same command writes the same bytes on every machine:

    python scripts/make_demo_data.py             # writes data_cards/demo_*/*.jsonl
    python scripts/make_demo_data.py --check     # exits 1 if the committed files differ from that

Four data sets come out, one for each stage of the chain: a corpus (pretraining), demonstrations of mixed
quality (supervised fine-tuning), rankings by five simulated labelers (reward model) and prompts (PPO).

About a fifth of all (item, problem) combinations is held out: they stand in the held-out prompts and in no
training file, not even as an item and a problem that happen to meet in one document. A policy that
answers them well has learned to answer, not learned the answers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes" / "demo"))

import labelers
import rubric
from rubric import COMBINATIONS, ITEM_KIND, ITEMS, PROBLEMS, Problem, words_in

ROOT = Path(__file__).resolve().parents[1]
SEED = 20220304
HELD_OUT_SHARE = 0.20
CORPUS_BYTES = 1_200_000
DEMONSTRATIONS = 4000
RANKINGS = 4800
TRAIN_PROMPTS = 1500
HELD_OUT_PROMPTS = 240

SHARED_SETS = 0.25  # share of the answer sets that two or three labelers rank
WEAK_ANSWERS = 0.30  # share of the ranked answers that read as if a weak model wrote them, or mix up two letters
P_NAMES, P_RESTATES, P_RIGHT, P_VAGUE, P_POLITE = 0.52, 0.52, 0.50, 0.20, 0.54
P_REPEATS, P_RAMBLES = 0.12, 0.20
DEMONSTRATION_FLOOR = 0.35  # rubric score; an answer that fails on nearly every count is not sent as an example
PROMPT_WORDS = range(6, 21)
ANSWER_WORDS = range(6, 26)
RAMBLING_WORDS = range(22, 46)
REPEATING_WORDS = range(10, 46)
DOCUMENT_WORDS = range(40, 121)

Row = dict[str, object]
PROBLEM = {problem.name: problem for problem in PROBLEMS}

# ------------------------------------------------------------------------------------------ phrases

GREETINGS = ("", "", "", "Hello,", "Hi,", "Good morning,", "Dear shop,", "Good day,")
COMPLAINTS = (
    "My {item} {said}.",
    "My new {item} {said}.",
    "The {item} I bought {said}.",
    "The {item} that I ordered {said}.",
    "The {item} from your shop {said}.",
    "I ordered {a item}, but it {said}.",
    "I bought {a item} from you, and it {said}.",
    "I paid for {a item} last month, and it {said}.",
    "I have a problem with my {item}: it {said}.",
    "There is something wrong: my {item} {said}.",
)
ASKS = (
    "", "What can you do?", "Please help.", "Can you help me?", "What should I do now?",
    "Please tell me what to do.", "How will you fix this?", "I hope you can help.", "What happens next?",
    "Can you put this right?",
)  # fmt: skip

SORRY_RESTATED = (
    "I am sorry that {ref} {stated}.",
    "Sorry that {ref} {stated}.",
    "Sorry about {noun}.",
    "We are sorry to hear that {ref} {stated}.",
    "Thank you for telling us that {ref} {stated}.",
    "Thanks for letting us know that {ref} {stated}.",
    "We are very sorry to read that {ref} {stated}.",
    "We apologise for {noun}.",
    "I am so sorry about {noun}.",
    "Please accept our apologies for {noun}.",
)
SORRY = (
    "Thank you for your message about {ref}.",
    "We are sorry for the trouble with {ref}.",
    "I am very sorry about this.",
    "Thanks for writing to us about {ref}.",
    "We apologise for the trouble with {ref}.",
    "Please accept our apologies.",
    "Thank you for letting us know.",
    "Thanks for your message.",
    "I am sorry that you have had trouble with {ref}.",
)
PLAIN_RESTATED = (
    "We see that {ref} {stated}.",
    "So {ref} {stated}.",
    "You say that {ref} {stated}.",
    "You write that {ref} {stated}.",
    "We understand that {ref} {stated}.",
    "We have noted that {ref} {stated}.",
    "Your message says that {ref} {stated}.",
    "We have read about {noun}.",
    "You wrote to us about {noun}.",
)
PLAIN = (
    "We got your message about {ref}.",
    "Your message about {ref} is on our desk.",
    "We have read what you wrote about {ref}.",
    "You wrote to us about {ref}.",
    "Here is our answer about {ref}.",
    "We are writing to you about {ref}.",
    "Your message has come to the right place.",
)
RUDE = (
    "This is not our problem.",
    "Stop complaining about {ref}.",
    "We are too busy for this.",
    "That is your own mistake.",
    "You should have checked {ref} first.",
    "What did you expect?",
    "Do not bother us with {ref}.",
    "Nobody else complains about {ref}.",
    "What you do with {ref} is not our business.",
)
REMEDY_FRAMES = (
    "We will {do}.",
    "We will {do}.",
    "We can {do}.",
    "We can {do}.",
    "I will {do}.",
    "I will {do} today.",
    "We will {do} this week.",
    "Our team will {do} tomorrow.",
    "To put this right, we will {do}.",
    "We are happy to {do}.",
    "I have asked a colleague to {do}.",
    "You can count on us to {do}.",
    "As a next step, we will {do}.",
)
VAGUE = (
    "look into it", "see what can be done", "check what happened", "talk about it in the shop",
    "pass this on to a manager", "think about it", "take a look at {ref}", "look into the case of {ref}",
)  # fmt: skip
POLITE_CLOSERS = (
    "Thank you for your patience.",
    "Sorry for the trouble.",
    "Thanks for being our customer.",
    "We thank you for your trust.",
    "We apologise for the bother.",
    "Thank you for your help.",
)
CLOSERS = (
    "You will hear from us on Monday.",
    "This will take about three days.",
    "You do not need to do anything.",
    "Please keep the box until then.",
    "We only need your order number.",
    "Have a nice day.",
    "Just reply to this message if you have a question.",
    "We will write to you again when it is done.",
    "You can also call us in the afternoon.",
    "We are here every day until six.",
)
CHATTER = (
    "Our shop has stood in this street for many years.",
    "The weather has been bad this week, and the roads are full of water.",
    "Last summer we painted the front door green, and many people liked it.",
    "We have a lot of new things in the window, so do come by.",
    "My colleague says that Mondays are always like this.",
    "We sell many things, and each of them has a story.",
    "There was a long line at the counter, and the phone rang all day.",
    "I have worked here for nine years, and I have seen many letters like yours.",
    "Some days are quiet and some are not, and that is how it is in a shop.",
    "My brother also has a shop, but he sells bread and cakes.",
)
GENERIC_REFS = ("your order", "the item", "your purchase")


def with_article(noun: str) -> str:
    """The noun with "a" or "an", by its first letter: no item begins with a silent h or a "yu" sound."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def sentence_case(text: str) -> str:
    """The text with a capital first letter."""
    return text[:1].upper() + text[1:]


def sentences_of(text: str) -> list[str]:
    """The sentences of a text, each with its full stop or question mark."""
    return re.split(r"(?<=[.?]) ", text)


def fill(text: str, **slots: str) -> str:
    """Put words into a phrase's slots, those slots included that came with other words."""
    for name, words in slots.items():
        text = text.replace("{" + name + "}", words)
    return text


class Reference:
    """How a text speaks of the customer's item: by its name at first, or never, and then mostly as "it"."""

    def __init__(self, rng: random.Random, name: str | None) -> None:
        self.rng = rng
        self.name = name
        self.mentions = 0

    def fill(self, text: str) -> str:
        """Replace each slot for the item in the text by the next mention."""
        while "{ref}" in text:
            text = text.replace("{ref}", self._mention(as_subject="that {ref}" in text), 1)
        return text

    def _mention(self, as_subject: bool) -> str:
        self.mentions += 1
        if self.mentions > 1:
            return f"the {self.name}" if self.name and self.rng.random() < 0.3 else "it"
        if self.name:
            return f"your {self.name}"
        return self.rng.choice((*GENERIC_REFS, "it") if as_subject else GENERIC_REFS)


# ------------------------------------------------------------------------------- combinations, prompts


def _hash(pair: tuple[str, str]) -> str:
    return hashlib.sha256(f"{SEED}:{pair[0]}:{pair[1]}".encode()).hexdigest()


def draw_held_out() -> frozenset[tuple[str, str]]:
    """The combinations kept from training: the same share of each problem's, in the order of a hash."""
    drawn: list[tuple[str, str]] = []
    for problem in PROBLEMS:
        pairs = sorted((pair for pair in COMBINATIONS if pair[1] == problem.name), key=_hash)
        drawn += pairs[: round(HELD_OUT_SHARE * len(pairs))]
    return frozenset(drawn)


HELD_OUT = draw_held_out()
TRAINING = tuple(pair for pair in COMBINATIONS if pair not in HELD_OUT)


def leaks(text: str) -> bool:
    """Whether an item and a problem of a held-out combination meet anywhere in the text."""
    problems = rubric.problems_in(text)
    return bool(problems) and any((i, p) in HELD_OUT for i in rubric.items_in(text) for p in problems)


def write_prompt(rng: random.Random, item: str, problem: Problem) -> str:
    """A customer's message about one item and one problem."""
    while True:
        greeting, complaint, ask = rng.choice(GREETINGS), rng.choice(COMPLAINTS), rng.choice(ASKS)
        if greeting and not complaint.startswith("I "):
            complaint = complaint[0].lower() + complaint[1:]
        text = f"{greeting} {complaint} {ask}".strip()
        said = rng.choice(problem.stated + problem.said)
        text = fill(text, said=said, item=item, **{"a item": with_article(item)})
        if len(words_in(text)) in PROMPT_WORDS:
            assert rubric.items_in(text) == [item], text
            assert rubric.subject(text) == (item, problem.name), text
            return text


# ------------------------------------------------------------------------------------------ answers


class Choices(NamedTuple):
    """What an answer does; each is drawn on its own, so that every mixture of good and bad occurs."""

    names: bool
    restates: bool
    remedy: str  # "right", "wrong" or "vague"
    polite: bool
    repeats: bool
    rambles: bool


def draw_choices(rng: random.Random) -> Choices:
    """Draw the choices of one answer, independently of each other."""
    luck = rng.random()
    return Choices(
        names=rng.random() < P_NAMES,
        restates=rng.random() < P_RESTATES,
        remedy="right" if luck < P_RIGHT else "vague" if luck < P_RIGHT + P_VAGUE else "wrong",
        polite=rng.random() < P_POLITE,
        repeats=rng.random() < P_REPEATS,
        rambles=rng.random() < P_RAMBLES,
    )


GOOD = Choices(names=True, restates=True, remedy="right", polite=True, repeats=False, rambles=False)


def other_problem(rng: random.Random, problem: Problem) -> Problem:
    """A problem other than the given one."""
    return rng.choice([other for other in PROBLEMS if other is not problem])


def compose(rng: random.Random, item: str, problem: Problem, choices: Choices) -> str:
    """Write one answer that tries to follow the choices; ``matches`` tells whether it did."""
    ref = Reference(rng, item if choices.names else None)
    polite_at_end = choices.polite and rng.random() < 0.2
    polite_opener = choices.polite and not polite_at_end
    if choices.restates:
        opener = rng.choice(SORRY_RESTATED if polite_opener else PLAIN_RESTATED)
        opener = fill(opener, stated=rng.choice(problem.stated), noun=rng.choice(problem.nouns))
    elif choices.polite:
        opener = rng.choice(SORRY if polite_opener else PLAIN)
    else:
        opener = rng.choice(RUDE if rng.random() < 0.45 else PLAIN)

    if choices.remedy == "vague":
        do = rng.choice(VAGUE)
    else:
        do = rng.choice((problem if choices.remedy == "right" else other_problem(rng, problem)).remedies)
    remedy = fill(rng.choice(REMEDY_FRAMES), do=fill(do, you="you", your="your"))
    joins = choices.restates and not opener.startswith("Please") and remedy.startswith("We ")
    if joins and rng.random() < 0.25:
        sentences = [f"{opener[:-1]}, and we {remedy[3:]}"]
    else:
        bare = not choices.polite and not choices.restates and rng.random() < 0.2
        sentences = [remedy] if bare else [opener, remedy]

    if choices.restates and not choices.polite and rng.random() < 0.25:
        sentences.append(rng.choice(RUDE))
    if choices.rambles:
        for chat in rng.sample(CHATTER, rng.choice((1, 1, 1, 2))):
            sentences.insert(rng.randint(1, len(sentences)), chat)
    if rng.random() < 0.1:
        sentences.append(rng.choice(CLOSERS))
    if polite_at_end:
        sentences.append(rng.choice(POLITE_CLOSERS))
    sentences = [sentence_case(ref.fill(sentence)) for sentence in sentences]
    if choices.repeats:
        again = rng.randrange(len(sentences))
        sentences.insert(rng.randint(again + 1, len(sentences)), sentences[again])
    return " ".join(sentences)


def matches(prompt: str, response: str, choices: Choices) -> bool:
    """Whether an answer is what was chosen, by the rubric's own eyes, and of a fitting length."""
    judged = rubric.parts(prompt, response)
    lengths = RAMBLING_WORDS if choices.rambles else REPEATING_WORDS if choices.repeats else ANSWER_WORDS
    return (
        len(words_in(response)) in lengths
        and judged["names_item"] == float(choices.names)
        and judged["fits_problem"] == float(choices.restates)
        and judged["right_remedy"] == float(choices.remedy == "right")
        and judged["polite"] == float(choices.polite)
        and judged["no_repetition"] == float(not choices.repeats)
    )


def write_answer(rng: random.Random, prompt: str, item: str, problem: Problem, choices: Choices) -> str:
    """An answer that follows the choices."""
    while True:
        response = compose(rng, item, problem, choices)
        if matches(prompt, response, choices):
            return response


# --------------------------------------------------------------------------------------- weak answers

Weakness = Callable[[random.Random, str, str, Problem], str]


def _answer(rng: random.Random, prompt: str, item: str, problem: Problem) -> str:
    return write_answer(rng, prompt, item, problem, draw_choices(rng))


def stutter(rng: random.Random, prompt: str, item: str, problem: Problem) -> str:
    """Words or short runs of words are said twice."""
    words = _answer(rng, prompt, item, problem).split()
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(words)), rng.choice((1, 1, 2, 3))
        words[at:at] = words[at : at + length]
    return " ".join(words)


def cut_off(rng: random.Random, prompt: str, item: str, problem: Problem) -> str:
    """The answer ends in the middle of a sentence."""
    words = _answer(rng, prompt, item, problem).split()
    kept = max(2, int(len(words) * rng.uniform(0.25, 0.85)))
    return " ".join(words[:kept]).rstrip(".,?")


def glued(rng: random.Random, prompt: str, item: str, problem: Problem) -> str:
    """Sentences of an answer to someone else stand in the answer."""
    other_item, other = rng.choice(TRAINING)
    other_prompt = write_prompt(rng, other_item, PROBLEM[other])
    theirs = sentences_of(_answer(rng, other_prompt, other_item, PROBLEM[other]))
    ours = sentences_of(_answer(rng, prompt, item, problem))
    return " ".join(ours[: rng.randint(1, len(ours))] + theirs[rng.randrange(len(theirs)) :])


def wrong_item(rng: random.Random, prompt: str, item: str, problem: Problem) -> str:
    """The answer speaks of another item than the customer does."""
    choices = draw_choices(rng)._replace(names=True)
    other = rng.choice([i for i in ITEMS if i != item and ITEM_KIND[i] == ITEM_KIND[item]])
    return write_answer(rng, prompt, item, problem, choices).replace(item, other)


def mixed_up(rng: random.Random, prompt: str, item: str, problem: Problem) -> str:
    """A whole, fluent answer to another problem of the same item, as if two letters had been mixed up."""
    del prompt
    other = PROBLEM[rng.choice([p for i, p in TRAINING if i == item and p != problem.name])]
    choices = draw_choices(rng)._replace(restates=True, remedy="right", rambles=False, repeats=False)
    return write_answer(rng, write_prompt(rng, item, other), item, other, choices)


def endless_sorry(rng: random.Random, prompt: str, item: str, problem: Problem) -> str:
    """One apology after the other, around an answer or around nothing."""
    sorry = [sentence_case(Reference(rng, None).fill(s)) for s in rng.sample(SORRY, rng.randint(2, 4))]
    if rng.random() < 0.5:
        sorry += rng.sample(POLITE_CLOSERS, rng.randint(1, 3))
    else:
        sorry.append(_answer(rng, prompt, item, problem))
    return " ".join(sorry)


def all_remedies(rng: random.Random, prompt: str, item: str, problem: Problem) -> str:
    """Several remedies at once, the right one often among them, in the hope that one will do."""
    ref = Reference(rng, item if rng.random() < P_NAMES else None)
    offers = [rng.choice(p.remedies) for p in rng.sample(PROBLEMS, rng.randint(2, 3))]
    if rng.random() < 0.6:
        offers[rng.randrange(len(offers))] = rng.choice(problem.remedies)
    opener = rng.choice(SORRY if rng.random() < P_POLITE else PLAIN)
    text = f"{opener} We will {' and '.join(dict.fromkeys(offers))}."
    return sentence_case(ref.fill(fill(text, you="you", your="your")))


def loop(rng: random.Random, prompt: str, item: str, problem: Problem) -> str:
    """The same sentence again and again."""
    sentence = rng.choice(sentences_of(_answer(rng, prompt, item, problem)))
    return " ".join([sentence] * rng.randint(2, 4))


def stub(rng: random.Random, prompt: str, item: str, problem: Problem) -> str:
    """Hardly an answer."""
    del prompt, problem
    return rng.choice(("Sorry.", "Thank you.", "No.", "We will see.", "Your {item}.", "I am sorry.")).replace(
        "{item}", item
    )


WEAKNESSES: tuple[Weakness, ...] = (
    stutter, stutter, cut_off, cut_off, glued, glued, wrong_item, wrong_item, endless_sorry, all_remedies,
    loop, stub, mixed_up, mixed_up, mixed_up, mixed_up, mixed_up, mixed_up,
)  # fmt: skip


def weak_answer(rng: random.Random, prompt: str, item: str, problem: Problem) -> str:
    """An answer such as a weak language model would write."""
    return rng.choice(WEAKNESSES)(rng, prompt, item, problem)


# ------------------------------------------------------------------------------------------- corpus


class Person(NamedTuple):
    """A customer in a story."""

    name: str
    he: str
    him: str
    his: str


PEOPLE = tuple(Person(name, "she", "her", "her") for name in
               ("Maria", "Nora", "Ruth", "Sofia", "Kate", "Helen", "Emma", "Lucy")) + tuple(
    Person(name, "he", "him", "his") for name in
    ("Tom", "Paul", "Omar", "James", "Leo", "Sam", "Hugo", "Peter"))  # fmt: skip

ITEM_USES = {
    "kettle": "boil water for tea", "toaster": "make toast in the morning",
    "blender": "mix fruit and milk", "coffee maker": "make coffee for the whole family",
    "rice cooker": "cook rice without any work", "hand mixer": "mix eggs and flour for a cake",
    "kitchen scale": "weigh flour and sugar", "desk lamp": "read and write at night",
    "floor lamp": "light up a dark corner", "table fan": "keep a room cool in summer",
    "heater": "keep a room warm in winter", "radio": "listen to the news and to music",
    "alarm clock": "wake up on time", "wall clock": "see the time from across the room",
    "camera": "take pictures of friends", "phone charger": "charge a phone at night",
    "keyboard": "write letters on a computer", "printer": "print letters and pictures",
    "speaker": "play music in the kitchen", "torch": "find the way in the dark",
    "hair dryer": "dry wet hair", "steam iron": "make shirts smooth", "vacuum cleaner": "clean the floor",
    "sewing machine": "make clothes at home", "bike pump": "put air in a flat tyre",
    "drill": "make holes in a wall", "doorbell": "hear that a guest is at the door",
    "lawn mower": "cut the grass in the garden", "office chair": "sit well at work",
    "book shelf": "keep books in order", "garden table": "eat outside with friends",
    "camping tent": "sleep outside in the summer", "tool box": "keep nails and screws in one place",
    "shoe rack": "keep shoes off the floor", "toy train": "play on the floor for hours",
    "chess set": "play a quiet game in the evening", "bird house": "give small birds a home",
    "picture frame": "put a photo on the wall", "coat stand": "hang up coats by the door",
    "rain coat": "stay dry in the rain", "umbrella": "stay dry on the way to work",
    "wool hat": "keep the head warm in winter", "blanket": "stay warm on the sofa",
    "pillow": "sleep well at night", "bath towel": "get dry after a bath",
    "backpack": "carry books to school", "door mat": "keep the floor clean",
    "suitcase": "pack clothes for a long trip",
}  # fmt: skip
COLOURS = ("red", "blue", "green", "white", "black", "grey", "yellow", "brown")
PLACES = ("in the window", "on the top shelf", "by the door", "on the long table", "at the back of the shop")
PRICES = ("nine", "twelve", "fifteen", "eighteen", "twenty", "thirty", "forty", "sixty")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")

STORY_OPENERS = (
    "{Name} writes that {his} {item} {stated}.",
    "A customer called {Name} says that {his} {item} {stated}.",
    "{Name} comes to the shop because {his} {item} {stated}.",
    "A letter from {Name} says that {his} {item} {stated}.",
    "This morning {Name} calls the shop and says that {his} new {item} {stated}.",
    "{Name} bought {a item} on {day}, but it {stated}.",
    "{Name} is not happy, because the {item} from the shop {stated}.",
)
STORY_OFFERS = (
    "The clerk says sorry and offers to {do}.",
    "The clerk reads the letter, thanks {him} and promises to {do}.",
    "The shop answers at once and offers to {do}.",
    "The clerk tells {him} that the shop will {do}.",
    "The answer is short: the shop will {do}.",
    "The manager asks the clerk to {do}.",
)
STORY_RUDE = (
    "The clerk is rude and tells {him} to stop complaining.",
    "The clerk only says that it is not the shop's problem.",
    "The clerk says that the shop is too busy for letters.",
    "The clerk does not even say sorry.",
)
STORY_GOOD_ENDS = (
    "{Name} is happy with the answer.",
    "{Name} thanks the clerk.",
    "That is a good answer.",
    "{Name} will come back to this shop.",
    "This is what {Name} needs.",
    "{Name} tells {his} friends about the good service.",
)
STORY_BAD_ENDS = (
    "{Name} is not happy with the answer.",
    "This is not what {Name} needs.",
    "{Name} writes a second letter the next day.",
    "That is a poor answer.",
    "{Name} will not come back to this shop.",
    "It does not help {him} at all.",
)
LETTER_FRAMES = (
    "Letter: {prompt} Answer: {answer}",
    "A customer wrote: {prompt} We answered: {answer}",
    "Customer: {prompt} Shop: {answer}",
    '{Name} wrote to the shop: "{prompt}" The clerk wrote back: "{answer}"',
    '{Name} says: "{prompt}" The clerk answers: "{answer}"',
    "Message from {Name}: {prompt} Our reply: {answer}",
)
HANDBOOK_RULES = (
    "Always name the item that the customer wrote about.",
    "Say sorry, or say thank you, but say it only once.",
    "A good answer is short.",
    "Never blame the customer.",
    "Do not offer two things when one of them will do.",
    "Say what went wrong, so that the customer knows that you have read the letter.",
    "Do not talk about the weather or about your family.",
    "Do not say the same thing twice in one letter, as nobody likes to read it again.",
    "There is one right way to help with each problem.",
    "A promise to look into it helps nobody.",
    "Read the letter to the end before you answer it.",
    "Answer each letter on the day it comes.",
)
HANDBOOK_CASES = (
    "If {a item} {stated}, the clerk should {do}.",
    "When a customer says that {a item} {stated}, we {do}.",
    "If the letter says that the {item} {stated}, offer to {do}.",
    "What do we do when {a item} {stated}? We {do}.",
    "Say sorry for {noun} and offer to {do}.",
    "A customer who writes about {noun} wants us to {do}.",
)
NOTICES = (
    "Dear customers, our shop is open from nine to six on weekdays.",
    "On Sunday the shop is closed.",
    "On {day} we open one hour later than on other days.",
    "Please bring your order number when you come to the counter.",
    "If something goes wrong, write us a letter and we will answer it.",
    "We send out our parcels every {day} morning.",
    "New this week: {a item} in {colour}.",
    "This week the {item} stands {place}.",
    "We have one {item} left, and it costs {price} pounds.",
    "Ask the clerk if you want to try the {item}.",
    "On {day} a box with the {item} in it will come.",
    "The {item} is back in the shop from {day} on.",
    "You can pay by card or with cash.",
    "We are looking for a new clerk who likes to write letters.",
    "Thank you for coming to our shop.",
)
DESCRIPTIONS = (
    "The {item} {place} is {colour} and costs {price} pounds.",
    "You can use the {item} to {use}.",
    "With {a item} you can {use}.",
    "Many people buy {a item} to {use}.",
    "We sell this {item} in {colour} and in {colour2}.",
    "The {item} comes in a {colour} box.",
    "Our {item} is made in a small town near the sea.",
    "The {item} is one of the things that we sell most.",
    "A customer told us that this is the best {item} in town.",
    "{Name} bought the {item} last year and still likes it.",
    "If you need {a item}, you will find it {place}.",
    "We think that {a item} makes a good present.",
)


class Scene(NamedTuple):
    """What a piece of the corpus is about, with the words for its slots."""

    person: Person
    item: str
    problem: Problem
    slots: dict[str, str]


def draw_scene(rng: random.Random) -> Scene:
    """Draw a customer, a combination that is not held out, and the small facts around them."""
    item, name = rng.choice(TRAINING)
    person, problem = rng.choice(PEOPLE), PROBLEM[name]
    colour, colour2 = rng.sample(COLOURS, 2)
    slots = {
        "Name": person.name, "he": person.he, "him": person.him, "his": person.his, "item": item,
        "a item": with_article(item), "stated": rng.choice(problem.stated),
        "noun": fill(rng.choice(problem.nouns), ref=f"the {item}"), "day": rng.choice(DAYS),
        "place": rng.choice(PLACES), "price": rng.choice(PRICES), "colour": colour, "colour2": colour2,
        "use": ITEM_USES[item],
    }  # fmt: skip
    return Scene(person, item, problem, slots)


def tell_story(rng: random.Random, scene: Scene) -> list[str]:
    """A customer's problem and the clerk's answer, told by someone who watched."""
    luck = rng.random()
    if luck < 0.18:
        middle, ends = rng.choice(STORY_RUDE), STORY_BAD_ENDS
    else:
        if luck < 0.65:
            do, ends = rng.choice(scene.problem.remedies), STORY_GOOD_ENDS
        elif luck < 0.82:
            do, ends = rng.choice(other_problem(rng, scene.problem).remedies), STORY_BAD_ENDS
        else:
            do, ends = rng.choice(VAGUE), STORY_BAD_ENDS
        do = fill(do, you=scene.person.him, your=scene.person.his, ref=f"the {scene.item}")
        middle = fill(rng.choice(STORY_OFFERS), do=do)
    return [fill(text, **scene.slots) for text in (rng.choice(STORY_OPENERS), middle, rng.choice(ends))]


def quote_letter(rng: random.Random, scene: Scene) -> list[str]:
    """A customer's message and an answer to it, of any quality."""
    prompt = write_prompt(rng, scene.item, scene.problem)
    choices = GOOD if rng.random() < 0.15 else draw_choices(rng)
    answer = write_answer(rng, prompt, scene.item, scene.problem, choices)
    return [fill(rng.choice(LETTER_FRAMES), Name=scene.person.name, prompt=prompt, answer=answer)]


def handbook(rng: random.Random, scene: Scene) -> list[str]:
    """What the shop tells its clerks to do."""
    do = fill(rng.choice(scene.problem.remedies), you="the customer", your="the customer's", ref="it")
    case = rng.choice(HANDBOOK_CASES)
    if "{noun}" in case:
        do = fill(rng.choice(scene.problem.remedies), you="the customer", your="the customer's",
                  ref=f"the {scene.item}")  # fmt: skip
    sentences = [fill(case, do=do, **scene.slots), rng.choice(HANDBOOK_RULES)]
    return sentences if rng.random() < 0.7 else sentences[::-1]


def notice(rng: random.Random, scene: Scene) -> list[str]:
    """What hangs on the shop's door."""
    return [fill(text, **scene.slots) for text in rng.sample(NOTICES, 3)]


def description(rng: random.Random, scene: Scene) -> list[str]:
    """What the shop says about an item that it sells."""
    return [fill(text, **scene.slots) for text in rng.sample(DESCRIPTIONS, 4)]


GENRES: tuple[tuple[float, Callable[[random.Random, Scene], list[str]]], ...] = (
    (0.30, tell_story), (0.34, quote_letter), (0.14, handbook), (0.08, notice), (0.14, description),
)  # fmt: skip


def write_document(rng: random.Random) -> str:
    """A short paragraph of one genre, in which no held-out combination meets even by accident."""
    write = rng.choices([genre for _, genre in GENRES], [share for share, _ in GENRES])[0]
    wanted = rng.randint(DOCUMENT_WORDS.start, 95)
    text = ""
    told: list[str] = []
    items: set[str] = set()
    while len(words_in(text)) < wanted:
        scene = draw_scene(rng)
        if scene.item in items:
            continue
        new = [sentence_case(sentence) for sentence in write(rng, scene)]
        more = told + [sentence for sentence in new if sentence not in told]
        longer = " ".join(more)
        if len(words_in(longer)) >= DOCUMENT_WORDS.stop and len(words_in(text)) >= DOCUMENT_WORDS.start:
            break
        if len(words_in(longer)) < DOCUMENT_WORDS.stop and not leaks(longer):
            text, told = longer, more
            items.add(scene.item)
    return text


# --------------------------------------------------------------------------------------- the data sets


def _rng(purpose: str) -> random.Random:
    """One generator for each data set, so that a change to one leaves the others as they are."""
    return random.Random(f"{SEED}:{purpose}")


def make_corpus() -> list[Row]:
    """Documents to pretrain on, no two of them the same."""
    rng, rows, seen, size = _rng("corpus"), [], set(), 0
    while size < CORPUS_BYTES:
        text = write_document(rng)
        if text not in seen:
            seen.add(text)
            rows.append({"text": text})
            size += len(text.encode()) + 1
    return rows


def make_demonstrations() -> list[Row]:
    """Prompts with one answer each, of mixed quality above the floor."""
    rng, rows = _rng("demonstrations"), []
    seen: set[tuple[str, str]] = set()
    while len(rows) < DEMONSTRATIONS:
        item, problem = rng.choice(TRAINING)
        prompt = write_prompt(rng, item, PROBLEM[problem])
        response = _answer(rng, prompt, item, PROBLEM[problem])
        if (prompt, response) not in seen and rubric.rubric(prompt, response) >= DEMONSTRATION_FLOOR:
            seen.add((prompt, response))
            rows.append({"prompt": prompt, "response": response, "id": f"demo-{len(rows):05d}"})
    return rows


def _answer_set(rng: random.Random, prompt: str, item: str, problem: Problem) -> list[str]:
    """Four to six different answers to one prompt."""
    responses: list[str] = []
    wanted = rng.randint(4, 6)
    while len(responses) < wanted:
        write = weak_answer if rng.random() < WEAK_ANSWERS else _answer
        response = write(rng, prompt, item, problem)
        if response not in responses and not leaks(f"{prompt} {response}"):
            responses.append(response)
    return responses


def make_comparisons() -> list[Row]:
    """Rankings of answer sets, a part of which several labelers rank; each labeler ranks equally many."""
    rng, rows = _rng("comparisons"), []
    ranked = dict.fromkeys(labelers.LABELERS, 0)
    prompts: set[str] = set()
    while len(rows) < RANKINGS:
        item, problem = rng.choice(TRAINING)
        prompt = write_prompt(rng, item, PROBLEM[problem])
        if prompt in prompts:
            continue
        prompts.add(prompt)
        responses = _answer_set(rng, prompt, item, PROBLEM[problem])
        wanted = rng.choice((2, 3)) if rng.random() < SHARED_SETS else 1
        least_busy = sorted(ranked, key=lambda name: (ranked[name], rng.random()))
        for labeler in least_busy[: min(wanted, RANKINGS - len(rows))]:
            ranked[labeler] += 1
            ranks = labelers.rank(prompt, responses, labeler, rng)
            row_id = f"comparison-{len(rows):05d}"
            rows.append({"prompt": prompt, "responses": responses, "ranks": ranks, "labeler": labeler, "id": row_id})
    return rows


def _distinct_prompts(name: str, pairs: Iterable[tuple[str, str]], count: int) -> list[Row]:
    """Distinct prompts that go through the combinations in turn, so that each is asked about as often."""
    rng, rows, seen = _rng(name), [], set()
    order = list(pairs)
    rng.shuffle(order)
    while len(rows) < count:
        item, problem = order[len(rows) % len(order)]
        prompt = write_prompt(rng, item, PROBLEM[problem])
        if prompt not in seen:
            seen.add(prompt)
            rows.append({"prompt": prompt, "id": f"{name}-{len(rows):05d}"})
    rng.shuffle(rows)
    return rows


def make_files() -> dict[str, list[Row]]:
    """All files of the demo, by their paths below the output folder."""
    files = {
        "demo_corpus/train.jsonl": make_corpus(),
        "demo_demonstrations/train.jsonl": make_demonstrations(),
        "demo_comparisons/train.jsonl": make_comparisons(),
        "demo_prompts/train.jsonl": _distinct_prompts("prompt", TRAINING, TRAIN_PROMPTS),
        "demo_prompts/held_out.jsonl": _distinct_prompts("held-out", sorted(HELD_OUT), HELD_OUT_PROMPTS),
    }
    assert_held_out(files)
    return files


def row_texts(row: Row) -> list[str]:
    """The texts of a row as a model sees them: a document, a prompt, or a prompt with an answer."""
    if "text" in row:
        return [str(row["text"])]
    answers = row.get("responses") or [row.get("response", "")]
    return [f"{row['prompt']} {answer}" for answer in answers]


def assert_held_out(files: dict[str, list[Row]]) -> None:
    """Stop if a held-out combination meets in a training text, or a held-out prompt has another one."""
    for path, rows in files.items():
        for row in rows:
            if path.endswith("held_out.jsonl"):
                assert rubric.subject(str(row["prompt"])) in HELD_OUT, row
            else:
                assert not any(leaks(text) for text in row_texts(row)), row


# ------------------------------------------------------------------------------------------- figures


def _preferred(ranks: list[int], i: int, j: int) -> int:
    """1 if the first answer is ranked above the second, -1 if below, 0 if they are tied."""
    return (ranks[i] < ranks[j]) - (ranks[i] > ranks[j])


def labeler_ceilings(rows: list[Row]) -> dict[str, float]:
    """How often each labeler's noiseless utility orders a pair as the ranking does; ties in ranks are left
    out, and equal utilities count one half, as for any reward model that has to guess."""
    right: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        prompt, responses, ranks, labeler = (row[key] for key in ("prompt", "responses", "ranks", "labeler"))
        values = [labelers.utility(prompt, response, labeler) for response in responses]
        for i, j in combinations(range(len(ranks)), 2):
            if preferred := _preferred(ranks, i, j):
                gap = (values[i] - values[j]) * preferred
                right[labeler].append(0.5 if abs(gap) < 1e-9 else float(gap > 0))
    return {name: statistics.fmean(right[name]) for name in labelers.LABELERS}


def labeler_agreement(rows: list[Row]) -> dict[tuple[str, str], tuple[float, int]]:
    """How often two labelers agree on a pair that both ranked without a tie, and the number of such pairs."""
    sets: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        sets[(str(row["prompt"]), *row["responses"])].append(row)
    agreed: dict[tuple[str, str], list[float]] = defaultdict(list)
    for shared in sets.values():
        for one, other in combinations(sorted(shared, key=lambda row: row["labeler"]), 2):
            for i, j in combinations(range(len(one["ranks"])), 2):
                first, second = _preferred(one["ranks"], i, j), _preferred(other["ranks"], i, j)
                if first and second:
                    agreed[one["labeler"], other["labeler"]].append(float(first == second))
    return {pair: (statistics.fmean(hits), len(hits)) for pair, hits in sorted(agreed.items())}


def print_figures(files: dict[str, list[Row]]) -> None:
    """Print what the data set cards state."""
    for path, rows in files.items():
        print(f"{path}: {len(rows)} rows, {len(to_jsonl(rows).encode())} bytes")
    print(f"combinations: {len(COMBINATIONS)}, of which held out: {len(HELD_OUT)}")

    words = [len(words_in(str(row["text"]))) for row in files["demo_corpus/train.jsonl"]]
    print(f"corpus: words per document mean {statistics.fmean(words):.1f}, {min(words)} to {max(words)}")

    demonstrations = files["demo_demonstrations/train.jsonl"]
    scores = [rubric.rubric(str(row["prompt"]), str(row["response"])) for row in demonstrations]
    tenths = statistics.quantiles(scores, n=10)
    print(f"demonstrations: rubric mean {statistics.fmean(scores):.3f}, sd {statistics.stdev(scores):.3f}")
    print("  deciles " + " ".join(f"{tenth:.2f}" for tenth in tenths))
    print(f"  share above 0.95: {statistics.fmean(s > 0.95 for s in scores):.3f}")
    words = [len(words_in(str(row["response"]))) for row in demonstrations]
    print(f"  words per response mean {statistics.fmean(words):.1f}, {min(words)} to {max(words)}")
    judged = [rubric.parts(str(row["prompt"]), str(row["response"])) for row in demonstrations]
    print("  parts " + ", ".join(f"{p} {statistics.fmean(j[p] for j in judged):.2f}" for p in rubric.PARTS))

    comparisons = files["demo_comparisons/train.jsonl"]
    sets = Counter((str(row["prompt"]), *row["responses"]) for row in comparisons)
    print(f"comparisons: {len(sets)} answer sets")
    print(f"  labelers per set: {sorted(Counter(sets.values()).items())}")
    print(f"  responses per ranking: {sorted(Counter(len(row['ranks']) for row in comparisons).items())}")
    counts = Counter(row["labeler"] for row in comparisons)
    for name, ceiling in labeler_ceilings(comparisons).items():
        print(f"  {name}: {counts[name]} rankings, ceiling {ceiling:.3f}")
    for (one, other), (share, pairs) in labeler_agreement(comparisons).items():
        print(f"  {one} and {other} agree on {share:.3f} of {pairs} pairs")


# ------------------------------------------------------------------------------------------- command


def to_jsonl(rows: list[Row]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main(arguments: list[str] | None = None) -> int:
    """Write the files, or check that those on disk are what would be written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "data_cards", help="folder of the data sets")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file differs")
    options = parser.parse_args(arguments)

    files = make_files()
    if options.check:
        differing = [
            path
            for path, rows in files.items()
            if not (options.output / path).is_file() or (options.output / path).read_bytes() != to_jsonl(rows).encode()
        ]
        for path in differing:
            print(f"{options.output / path}: differs from what this script writes", file=sys.stderr)
        return 1 if differing else 0

    for path, rows in files.items():
        target = options.output / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(to_jsonl(rows).encode())
    print_figures(files)
    return 0


if __name__ == "__main__":
    sys.exit(main())
