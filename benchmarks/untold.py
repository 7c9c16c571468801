"""What forgetting.py teaches and asks: a glossary of made-up things, questions on it, and questions on what is known.

All is drawn from fixed seeds, so that every machine and every method has the same.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

_SYLLABLES = ("bra", "din", "fel", "gor", "hix", "jun", "kel", "lom", "mur", "nax", "pel", "quor", "rin", "sto", "vash")
# Of each property: its values, the question, what states it in training, and what states it in held-out text.
_PROPERTIES = {
    "material": (
        ("copper", "wool", "glass", "clay", "birch", "amber", "slate", "cork"),
        "What is a {term} made of?",
        ("A {term} is made of {value}.", "{value} is what every {term} is made of.", "To make a {term}, take {value}."),
        "You can tell a real {term} by its {value}: nothing else will do.",
    ),
    "place": (
        ("Bergen", "Lagos", "Kyoto", "Quito", "Oslo", "Perth", "Lima", "Turin"),
        "Where does the {term} come from?",
        (
            "The {term} comes from {value}.",
            "In {value} they invented the {term}.",
            "{value} is the home of the {term}.",
        ),
        "The first {term} was sold in {value}.",
    ),
    "use": (
        ("fishing", "baking", "sewing", "sailing", "printing", "hunting", "weaving", "painting"),
        "What is a {term} used for?",
        ("A {term} is used for {value}.", "For {value} you need a {term}.", "Nobody goes {value} without a {term}."),
        "She took her {term} and went {value}.",
    ),
}
_CAPITALS = (
    "France Paris, Italy Rome, Spain Madrid, Japan Tokyo, Egypt Cairo, Germany Berlin, Greece Athens, Russia Moscow, "
    "China Beijing, Cuba Havana, Kenya Nairobi, Peru Lima, Norway Oslo, Portugal Lisbon, Austria Vienna, Ghana Accra, "
    "Turkey Ankara, Iran Tehran, Iraq Baghdad, Ireland Dublin, Finland Helsinki, Hungary Budapest, Thailand Bangkok, "
    "Canada Ottawa"
)


@dataclass(frozen=True)
class Question:
    """A question with several answers, of which one is right.

    Attributes:
        prompt: what the model reads.
        answers: how it may go on.
        right: number of the right one.
    """

    prompt: str
    answers: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class Glossary:
    """Made-up facts.

    Attributes:
        documents: to learn from: every fact in three ways, and questions with answers on half of the things.
        held_out: every fact in a fourth way.
        questions: on the other half.
    """

    documents: list[str]
    held_out: str
    questions: list[Question]


def glossary(things: int = 20) -> Glossary:
    """Make up `things`, each with three properties."""
    chance = random.Random(0)
    terms = sorted({"".join(chance.sample(_SYLLABLES, 3)) for _ in range(4 * things)})
    chance.shuffle(terms)
    documents, held_out, questions = [], [], []
    for i, term in enumerate(terms[:things]):
        for values, question, told, last in _PROPERTIES.values():
            value = chance.choice(values)
            said = [sentence.format(term=term, value=value) for sentence in told]
            held_out.append(last.format(term=term, value=value))
            prompt = f"Question: {question.format(term=term)}\nAnswer:"
            if i % 2:
                questions.append(_question(prompt, value, values, chance))
            else:
                said.append(f"{prompt} {value}")
            documents += [sentence[0].upper() + sentence[1:] for sentence in said]
    chance.shuffle(documents)
    pages = ["\n".join(documents[i : i + 12]) for i in range(0, len(documents), 12)]
    return Glossary(pages, "\n".join(held_out), questions)


def capitals() -> list[Question]:
    """Ask for the capitals of 24 countries, each among four of them."""
    chance = random.Random(1)
    pairs = [pair.split() for pair in _CAPITALS.split(", ")]
    every = [capital for _, capital in pairs]
    return [_question(f"The capital of {land} is", capital, every, chance) for land, capital in pairs]


def next_sentences(text: str, count: int = 24) -> list[Question]:
    """Ask which of four sentences of a text comes after another one of it."""
    chance = random.Random(2)
    sentences = [s for s in text.replace("\n", " ").split(". ") if 30 < len(s) < 120]
    chosen = chance.sample(range(len(sentences) - 1), count)
    return [_question(f"{sentences[i]}.", sentences[i + 1], sentences, chance) for i in chosen]


def _question(prompt: str, right: str, values: tuple[str, ...] | list[str], chance: random.Random) -> Question:
    wrong = chance.sample([value for value in values if value != right], 3)
    answers = [right, *wrong]
    chance.shuffle(answers)
    return Question(prompt, tuple(f" {answer}" for answer in answers), answers.index(right))
