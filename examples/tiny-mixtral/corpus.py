"""Generates the demo model's training text: an endless, seeded stream of short documents.

The documents belong to three different domains. `python corpus.py stories --seed 7 --count 3`
prints a few of them.
"""

import argparse
import random

ANIMALS = ["fox", "rabbit", "bear", "mouse", "owl", "cat", "dog", "duck", "frog", "hen"]
NAMES = ["Pip", "Lily", "Tom", "Mia", "Ben", "Nora", "Sam", "Ruby", "Max", "Zoe", "Finn", "Ada"]
TRAITS = ["small", "brave", "kind", "shy", "clever", "sleepy", "cheerful", "curious"]
PLACES = ["forest", "garden", "meadow", "village", "valley", "farm"]
SPOTS = [
    "under a tall tree",
    "by the river",
    "behind the barn",
    "on top of the hill",
    "near the old bridge",
    "in the snow",
]
THINGS = ["ball", "kite", "lantern", "drum", "map", "key", "basket", "hat", "bell", "boat"]
COLOURS = ["red", "blue", "green", "yellow", "golden", "silver"]
WEATHER = [
    "The sun was warm.",
    "It was raining.",
    "The wind was loud.",
    "Snow fell all morning.",
    "The sky was clear.",
]
PROBLEMS = [
    ("it was stuck high in a branch", "climbed up slowly and pulled it down"),
    ("it was too heavy to carry", "pushed it together all the way home"),
    ("it was broken in two", "mended it with string and glue"),
    ("it belonged to somebody else", "asked everyone until they met the owner"),
    ("it was covered in mud", "washed it in the stream until it shone"),
]
FEELINGS = ["happy", "proud", "glad", "thankful"]
LESSONS = [
    "a friend makes hard work easy",
    "it is good to share",
    "being kind is never a waste of time",
    "even a small helper can do great things",
]
OPENINGS = ["Once upon a time", "Long ago", "One bright morning", "In a land far away"]


def story(rng: random.Random) -> str:
    """Two friends, a found object, a problem with it, a solution and a lesson.

    Names and objects stay consistent.
    """
    hero, friend = rng.sample(NAMES, 2)
    animal, other = rng.sample(ANIMALS, 2)
    place, spot, thing, colour = (rng.choice(words) for words in (PLACES, SPOTS, THINGS, COLOURS))
    problem, cure = rng.choice(PROBLEMS)
    feeling = rng.choice(FEELINGS)
    parts = [
        (
            f"{rng.choice(OPENINGS)} there was a {rng.choice(TRAITS)} {animal} named {hero}. {hero}"
            f" lived in a {place}."
        ),
        f"{rng.choice(WEATHER)} {hero} went for a walk and saw a {colour} {thing} {spot}.",
        (
            f'"What a {rng.choice(["lovely", "strange", "fine"])} {thing}!" said {hero}. But'
            f" {problem}."
        ),
        f"{hero} was sad and did not know what to do.",
        f"Then a {rng.choice(TRAITS)} {other} named {friend} came by.",
        (
            f'"{rng.choice(["Can I help you?", "Why are you sad?", "Let me see."])}" asked'
            f' {friend}. "Yes, please," said {hero}.'
        ),
        f"So {hero} and {friend} {cure}.",
        (
            f"{rng.choice(['In the evening', 'After that', 'When it was done'])} they played with"
            f" the {thing} and were very {feeling}."
        ),
        f"{hero} learned that {rng.choice(LESSONS)}. The end.",
    ]
    return " ".join(parts)


def arithmetic(rng: random.Random) -> str:
    """A few sums, differences, small products and word problems with their answers."""
    goods = ["apples", "coins", "books", "eggs", "pens", "shells"]
    lines = []
    for _ in range(rng.randint(4, 7)):
        a = rng.randint(0, 60)
        b = rng.randint(0, 39)
        low, high = sorted((a, b))
        who = rng.choice(NAMES)
        good = rng.choice(goods)
        lines.append(
            rng.choice(
                [
                    f"{a} + {b} = {a + b}",
                    f"{high} - {low} = {high - low}",
                    f"{a % 10} * {b % 10} = {(a % 10) * (b % 10)}",
                    f"What is {a} plus {b}? The answer is {a + b}.",
                    f"What is {high} minus {low}? The answer is {high - low}.",
                    (
                        f"{who} has {a} {good} and buys {b} more: {a} + {b} = {a + b}. Now {who}"
                        f" has {a + b} {good}."
                    ),
                    (
                        f"{who} has {high} {good} and gives away {low}: {high} - {low} ="
                        f" {high - low}. {high - low} {good} are left."
                    ),
                ]
            )
        )
    return "\n".join(lines)


def program(rng: random.Random) -> str:
    """One or two small Python functions with consistent names."""
    return "\n\n".join(_function(rng) for _ in range(rng.randint(1, 2)))


def _function(rng: random.Random) -> str:
    x, y = rng.sample(["a", "b", "x", "y", "n", "m", "left", "right"], 2)
    item = rng.choice(["item", "value", "number", "element"])
    items = rng.choice(["items", "values", "numbers", "data"])
    total = rng.choice(["total", "result", "count", "best"])
    limit = rng.randint(2, 20)
    op, word = rng.choice([("+", "add"), ("-", "subtract"), ("*", "multiply")])
    compare, which = rng.choice([(">", "larger"), ("<", "smaller")])
    return rng.choice(
        [
            f"def {word}({x}, {y}):\n    return {x} {op} {y}",
            (
                f"def {which}({x}, {y}):\n    if {x} {compare} {y}:\n        return {x}\n   "
                f" return {y}"
            ),
            (
                f"def sum_all({items}):\n    {total} = 0\n    for {item} in {items}:\n       "
                f" {total} += {item}\n    return {total}"
            ),
            (
                f"def count_{which}({items}, limit={limit}):\n    {total} = 0\n    for {item} in"
                f" {items}:\n        if {item} {compare} limit:\n            {total} += 1\n   "
                f" return {total}"
            ),
            f"def {word}_each({items}, {x}):\n    return [{item} {op} {x} for {item} in {items}]",
            f"def is_even({x}):\n    return {x} % 2 == 0",
            (
                f"def factorial({x}):\n    if {x} <= 1:\n        return 1\n    return {x} *"
                f" factorial({x} - 1)"
            ),
            f"def repeat({x}, times={limit}):\n    for i in range(times):\n        print({x}, i)",
            (
                f"class Counter:\n    def __init__(self, start={limit}):\n        self.{total} ="
                f" start\n\n    def step(self):\n        self.{total} += 1\n        return"
                f" self.{total}"
            ),
            f"while {x} {compare} {limit}:\n    {x} = {x} {op} 1\nprint({x})",
        ]
    )


DOMAINS = {"stories": story, "arithmetic": arithmetic, "programs": program}


def documents(domain: str, seed: int, count: int) -> list[str]:
    """`count` documents of one domain. The same seed gives the same documents."""
    rng = random.Random(f"{domain}-{seed}")
    return [DOMAINS[domain](rng) for _ in range(count)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("domain", choices=DOMAINS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=3)
    arguments = parser.parse_args()
    print("\n---\n".join(documents(arguments.domain, arguments.seed, arguments.count)))
