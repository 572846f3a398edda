"""Rewards for the story recipe, computed from the words of a completion. Plain Python: any trainer can call them."""

from __future__ import annotations

import re
from typing import Any

NAMES = """
ant bear bee bird bug bunny butterfly camel cat chick chicken cow crab deer dinosaur dog dolphin donkey dragon duck
eagle elephant fish fox frog giraffe goat goose hamster hen hippo horse kitten lamb lion lizard mole monkey mouse
octopus owl panda parrot penguin pig pony puppy rabbit rat seal shark sheep snail snake spider squirrel swan tiger
turtle whale wolf worm zebra
"""
ANIMALS = frozenset(NAMES.split())
PLURALS = {"bunnies": "bunny", "butterflies": "butterfly", "foxes": "fox", "mice": "mouse", "puppies": "puppy", "wolves": "wolf"}


def animals(completions: list[str], enough: int = 3, **columns: Any) -> list[float]:
    """Counts the different animals in a story, as a share of `enough`, at most 1: "A cat saw two cats and a dog." gives 2/3.

    A second mention of an animal adds nothing, and neither does an animal after the first `enough`.
    """
    return [min(len(animals_in(text)), enough) / enough for text in completions]


def animals_in(text: str) -> set[str]:
    """Returns the animals of a text, each in the singular."""
    words = {PLURALS.get(word, word) for word in re.findall(r"[a-z]+", text.lower())}
    return {word if word in ANIMALS else word.removesuffix("s") for word in words} & ANIMALS
