# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
A simulator of bAbI task 1, "single supporting fact" (Weston et al. 2015, arXiv 1502.05698).

Actors move between places; the question is where one of them is. Written from the task's public definition, so that
demo and tests have a data set without a download.
"""

from dataclasses import dataclass

import numpy as np


ACTORS = ("Mary", "John", "Daniel", "Sandra")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
MOVES = ("went to", "moved to", "journeyed to", "travelled to", "went back to")


@dataclass(frozen=True)
class BabiExample:
    """One question about a story.

    Args:
        context: The statements before the question, in order.
        question: The question.
        answer: The place, one word.
        support: Index of the statement in `context` that the answer follows from.
    """

    context: tuple[str, ...]
    question: str
    answer: str
    support: int


def simulate(num_statements: int, rng: np.random.Generator) -> BabiExample:
    """
    A story and a question about one of its actors.

    Args:
        num_statements: Number of statements, at least 1.
        rng: Source of the randomness; the same state gives the same example.

    Raises:
        ValueError: for a story without a statement.
    """
    if num_statements < 1:
        raise ValueError(f"`num_statements` must be at least 1, but is {num_statements}.")
    where: dict[str, str] = {}
    last_move: dict[str, int] = {}
    context = []
    for index in range(num_statements):
        actor = ACTORS[rng.integers(len(ACTORS))]
        # A move leads somewhere else.
        places = [place for place in PLACES if place != where.get(actor)]
        where[actor] = places[rng.integers(len(places))]
        last_move[actor] = index
        context.append(f"{actor} {MOVES[rng.integers(len(MOVES))]} the {where[actor]}.")
    asked = sorted(where)[rng.integers(len(where))]
    return BabiExample(tuple(context), f"Where is {asked}?", where[asked], last_move[asked])


def simulate_many(count: int, num_statements: int | tuple[int, int], seed: int) -> list[BabiExample]:
    """
    `count` examples, each with `num_statements` statements, or with a number drawn evenly from an inclusive range.

    Row `i` depends on `seed` and `i` alone, so that any worker can make it.
    """
    low, high = (num_statements, num_statements) if isinstance(num_statements, int) else num_statements
    examples = []
    for row in range(count):
        rng = np.random.default_rng([seed, row])
        examples.append(simulate(int(rng.integers(low, high + 1)), rng))
    return examples


__all__ = ["ACTORS", "MOVES", "PLACES", "BabiExample", "simulate", "simulate_many"]
