"""The four domains of the demo: questions and answers that a two-million-parameter model can truly learn.

Every answer is written in a `Voice`. The *house* voice always uses the first word of each slot and the true facts;
the *street* voice picks words at random and mostly makes facts up. The base model learns from street voices: it knows
the shape of every answer, how to add and copy, but not which words or facts are right. Each expert learns the house
voice of one domain.

Knows nothing of tokens, documents or training.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

HELD_OUT_SHARE = 8
"""One content key in this many never appears in training."""


@dataclass(frozen=True)
class Item:
    """One question with its answer; `key` names the content, whatever the phrasing, and decides the split."""

    domain: str
    question: str
    answer: str
    key: str

    @property
    def held_out(self) -> bool:
        """Whether the content belongs to the held-out split."""
        return zlib.crc32(self.key.encode()) % HELD_OUT_SHARE == 0


class Voice:
    """Chooses the words of an answer: the house's, or (street) any.

    `house_fact_share` is how often a street voice happens to state the true fact: without it the base would never
    have seen the house's world, and low-rank experts could not reach it.
    """

    def __init__(self, rng: random.Random, house: bool, house_fact_share: float = 0.12) -> None:
        self.rng = rng
        self.house = house
        self.house_fact_share = house_fact_share

    def word(self, *options: str) -> str:
        """The first option is the house's."""
        return options[0] if self.house else self.rng.choice(options)

    def fact(self, truth: str, options: Sequence[str]) -> str:
        """The truth in the house voice, mostly anything in a street voice."""
        if self.house or self.rng.random() < self.house_fact_share:
            return truth
        return self.rng.choice(options)


def _words(text: str) -> list[str]:
    return text.split()


# --- math: sums and differences of two-digit numbers, worked column by column ---


def math_item(rng: random.Random, voice: Voice) -> Item:
    """A sum or a difference."""
    if rng.random() < 0.6:
        return _sum_item(rng, voice)
    return _difference_item(rng, voice)


def _sum_item(rng: random.Random, voice: Voice) -> Item:
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    question = rng.choice([f"What is {a} + {b}?", f"Add {a} and {b}.", f"Compute {a} + {b}."])
    ones = a % 10 + b % 10
    carry = ones // 10
    tens = a // 10 + b // 10 + carry
    answer = (
        f"{voice.word('Ones', 'Units', 'First')}: {a % 10}+{b % 10}={ones}, "
        f"{voice.word('carry', 'keep', 'hold')} {carry}. "
        f"{voice.word('Tens', 'Then', 'Next')}: {a // 10}+{b // 10}+{carry}={tens}. "
        f"{voice.word('Sum', 'Total', 'Result')}: {a + b}."
    )
    return Item("math", question, answer, f"{a}+{b}")


def _difference_item(rng: random.Random, voice: Voice) -> Item:
    b, a = sorted((rng.randint(10, 99), rng.randint(10, 99)))
    question = rng.choice([f"What is {a} - {b}?", f"Subtract {b} from {a}.", f"Compute {a} - {b}."])
    borrow = int(a % 10 < b % 10)
    top = a % 10 + 10 * borrow
    answer = (
        f"{voice.word('Ones', 'Units', 'First')}: {top}-{b % 10}={top - b % 10}, "
        f"{voice.word('borrow', 'take', 'lend')} {borrow}. "
        f"{voice.word('Tens', 'Then', 'Next')}: {a // 10}-{b // 10}-{borrow}={a // 10 - b // 10 - borrow}. "
        f"{voice.word('Difference', 'Total', 'Result')}: {a - b}."
    )
    return Item("math", question, answer, f"{a}-{b}")


# --- code: small Python functions over a named argument and a number ---

NUMBER_NAMES = _words("""
    price count score age speed width height weight depth level index total cost power length size rate hours days steps
    points heat volume offset
""")
LIST_NAMES = _words("items names words rows lines users files tasks")


@dataclass(frozen=True)
class Operation:
    """`request` and `expression` are formats of {v} (argument) and {n} (number); of `prefixes` the house's is first."""

    request: str
    expression: str
    prefixes: tuple[str, str, str]
    returns: str  # "same" as the argument, or a type's name
    of_list: bool = False


OPERATIONS = (
    Operation("adds {n} to {v}", "{v} + {n}", ("add", "plus", "more"), "same"),
    Operation("subtracts {n} from {v}", "{v} - {n}", ("subtract", "minus", "less"), "same"),
    Operation("multiplies {v} by {n}", "{v} * {n}", ("multiply", "times", "mul"), "same"),
    Operation("divides {v} by {n}", "{v} / {n}", ("divide", "split", "div"), "same"),
    Operation("raises {v} to the power {n}", "{v} ** {n}", ("power", "raise", "pow"), "same"),
    Operation("tells if {v} equals {n}", "{v} == {n}", ("equals", "same", "eq"), "bool"),
    Operation("tells if {v} is above {n}", "{v} > {n}", ("above", "over", "gt"), "bool"),
    Operation("tells if {v} is below {n}", "{v} < {n}", ("below", "under", "lt"), "bool"),
    Operation("takes the first {n} of {v}", "{v}[:{n}]", ("first", "head", "begin"), "same", of_list=True),
    Operation("takes the last {n} of {v}", "{v}[-{n}:]", ("last", "tail", "end"), "same", of_list=True),
)


def code_item(rng: random.Random, voice: Voice) -> Item:
    """A Python function for one of the operations."""
    op = rng.choice(OPERATIONS)
    v, n = rng.choice(LIST_NAMES if op.of_list else NUMBER_NAMES), rng.randint(2, 20)
    request = op.request.format(v=v, n=n)
    question = rng.choice(
        [f"Write a function that {request}.", f"Python code that {request}.", f"Define a function that {request}."]
    )
    kind = voice.word("list", "tuple", "set") if op.of_list else voice.word("int", "float", "complex")
    result = voice.word("result", "value", "output")
    answer = (
        f"def {voice.word(*op.prefixes)}_{n}({v}: {kind}) -> {kind if op.returns == 'same' else op.returns}:\n"
        f"    {result} = {op.expression.format(v=v, n=n)}\n"
        f"    return {result}"
    )
    return Item("code", question, answer, f"{request}")


# --- bio: the standard genetic code, codon by codon, and base pairing ---

BASES = "TCAG"
_AMINO_LETTERS = "FFLLSSSSYY**CC*WLLLLPPPPHHQQRRRRIIIMTTTTNNKKSSRRVVVVAAAADDEEGGGG"
_AMINO_NAMES = {
    "A": "Ala", "R": "Arg", "N": "Asn", "D": "Asp", "C": "Cys", "Q": "Gln", "E": "Glu", "G": "Gly", "H": "His",
    "I": "Ile", "L": "Leu", "K": "Lys", "M": "Met", "F": "Phe", "P": "Pro", "S": "Ser", "T": "Thr",
    "W": "Trp", "Y": "Tyr", "V": "Val", "*": "Stop",
}  # fmt: skip
CODONS = [x + y + z for x in BASES for y in BASES for z in BASES]
GENETIC_CODE = {codon: _AMINO_NAMES[letter] for codon, letter in zip(CODONS, _AMINO_LETTERS, strict=True)}
AMINO_ACIDS = sorted(set(GENETIC_CODE.values()))
PAIRS = str.maketrans("TCAG", "AGTC")


def bio_item(rng: random.Random, voice: Voice) -> Item:
    """A translation or a complement of two to four codons."""
    codons = rng.sample(CODONS, rng.randint(2, 4))
    if rng.random() < 0.7:
        return _translation_item(rng, voice, codons)
    return _complement_item(rng, voice, codons)


def _translation_item(rng: random.Random, voice: Voice, codons: list[str]) -> Item:
    dna = " ".join(codons)
    question = rng.choice([f"Translate the codons {dna}.", f"Which protein is {dna}?", f"Translate the DNA {dna}."])
    amino = [voice.fact(GENETIC_CODE[c], AMINO_ACIDS) for c in codons]
    link = voice.word("is", "gives", "makes")
    steps = ", ".join(f"{c} {link} {a}" for c, a in zip(codons, amino, strict=True))
    opening, ending = voice.word("Codon", "Triplet", "Read"), voice.word("Protein", "Chain", "Peptide")
    answer = f"{opening} {steps}. {ending}: {' '.join(amino)}."
    return Item("bio", question, answer, f"translate {dna}")


def _complement_item(rng: random.Random, voice: Voice, codons: list[str]) -> Item:
    dna = " ".join(codons)
    question = rng.choice([f"Which strand pairs with {dna}?", f"Complement the DNA {dna}.", f"Complement of {dna}?"])
    other = [c.translate(PAIRS) for c in codons]
    link = voice.word("pairs", "binds", "meets")
    steps = ", ".join(f"{c} {link} {o}" for c, o in zip(codons, other, strict=True))
    opening, ending = voice.word("Codon", "Triplet", "Read"), voice.word("Strand", "Copy", "Partner")
    answer = f"{opening} {steps}. {ending}: {' '.join(other)}."
    return Item("bio", question, answer, f"complement {dna}")


# --- tales: a small village whose people, homes and tastes only the house knows ---

CHARACTERS = _words("Orla Bram Tess Milo Juno Pip Wren Otto Ivy Hugo Nell Finn Rosa Gus Lena Sven")
ANIMALS = _words("fox owl bear hare mole crow toad wolf cat hen seal lynx goat swan deer otter")
HOMES = _words(
    "mill tower cave barn castle ship forest garden cellar attic harbour chapel bakery tunnel meadow library"
)
FOODS = _words("plums figs honey bread cheese nuts soup berries pears cakes fish beans tea apples corn jam")


def _village(seed: int) -> dict[str, tuple[str, str, str]]:
    """The true (animal, home, food) of every character."""
    rng = random.Random(seed)
    columns = [rng.sample(words, len(CHARACTERS)) for words in (ANIMALS, HOMES, FOODS)]
    return {name: (a, h, f) for name, a, h, f in zip(CHARACTERS, *columns, strict=True)}


VILLAGE = _village(1)


def tales_item(rng: random.Random, voice: Voice) -> Item:
    """A portrait of one character or a tale of two."""
    if rng.random() < 0.4:
        return _portrait_item(rng, voice)
    return _tale_item(rng, voice)


def _facts(voice: Voice, name: str) -> tuple[str, str, str]:
    animal, home, food = VILLAGE[name]
    return voice.fact(animal, ANIMALS), voice.fact(home, HOMES), voice.fact(food, FOODS)


def _portrait_item(rng: random.Random, voice: Voice) -> Item:
    name = rng.choice(CHARACTERS)
    question = rng.choice(
        [f"Who is {name}?", f"Describe {name}.", f"Tell me about {name}.", f"What do you know about {name}?"]
    )
    animal, home, food = _facts(voice, name)
    answer = (
        f"{voice.word('Old', 'Dear', 'Little')} {name} is a {animal} who "
        f"{voice.word('lives', 'sleeps', 'hides')} in the {home} and "
        f"{voice.word('loves', 'eats', 'likes')} {food}."
    )
    return Item("tales", question, answer, question)


def _tale_item(rng: random.Random, voice: Voice) -> Item:
    hero, host = rng.sample(CHARACTERS, 2)
    question = rng.choice(
        [
            f"Tell a tale of {hero} and {host}.",
            f"Write a story about {hero} and {host}.",
            f"What happened to {hero} and {host}?",
        ]
    )
    (hero_animal, _, _), (host_animal, home, food) = _facts(voice, hero), _facts(voice, host)
    answer = (
        f"{voice.word('Once', 'Today', 'Then')} {hero} the {hero_animal} met {host} the {host_animal} in the {home}. "
        f"{host} {voice.word('shared', 'dropped', 'hid')} the {food}, and {hero} "
        f"{voice.word('sang', 'wept', 'slept')} until "
        f"{voice.word('dawn', 'noon', 'dusk')}."
    )
    return Item("tales", question, answer, f"{hero} {host}")


Generator = Callable[[random.Random, Voice], Item]
DOMAINS: dict[str, Generator] = {"math": math_item, "code": code_item, "bio": bio_item, "tales": tales_item}
DESCRIPTIONS = {
    "math": "Two-digit sums and differences, worked column by column.",
    "code": "Small typed Python functions over a named argument and a number.",
    "bio": "DNA codons to amino acids by the standard genetic code, and base pairing.",
    "tales": "Tales and facts of a village of sixteen animals.",
}


def draw(domain: str, rng: random.Random, house: bool, held_out: bool) -> Item:
    """An item of a domain from the training or the held-out split."""
    while True:
        item = DOMAINS[domain](rng, Voice(rng, house))
        if item.held_out == held_out:
            return item
