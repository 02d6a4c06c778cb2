"""The domains: their statements by role, and the contrasts between them.

`{A}`, `{B}` and so on stand for invented words, `{true}` for an unrelated true sentence.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Contrast:
    """Two influences of a matrix, of which the first is expected to be larger.

    Each is a pair of roles: the statement trained on (or read in context), and the one whose loss is measured.
    """

    name: str
    larger: tuple[str, str]
    smaller: tuple[str, str]


@dataclass(frozen=True)
class Domain:
    """A domain: its meaning, its words, its statements by role, and its contrasts."""

    meaning: str
    words: str
    statements: dict[str, str]
    contrasts: tuple[Contrast, ...]


UNRELATED = "unrelated"
TRUE_SENTENCES = (
    "Copper conducts electricity well.",
    "Ice floats on liquid water.",
    "The heart pumps blood through the body.",
    "Most bats hunt at night.",
    "The Nile flows into the Mediterranean Sea.",
    "Salt dissolves quickly in warm water.",
    "Oak trees lose their leaves in autumn.",
    "Sound travels faster in water than in air.",
    "The moon reflects the light of the sun.",
    "Penguins lay eggs and raise their chicks on land.",
    "Glass is made mainly from sand.",
    "Bees collect nectar from many kinds of flowers.",
)


def _conclusion(premises: str, conclusion: str, reverse: str) -> Contrast:
    return Contrast("conclusion over its reversal, after both premises", (premises, conclusion), (premises, reverse))


def _one_over_two(conclusion: str) -> Contrast:
    name = "premises in one sentence over two, on the conclusion"
    return Contrast(name, ("both_in_one", conclusion), ("both_in_two", conclusion))


def _negation(premises: str, conclusion: str, negated: str) -> Contrast:
    return Contrast("conclusion over its negation, after both premises", (premises, conclusion), (premises, negated))


def _step(premises: str, premise: str, conclusion: str) -> Contrast:
    return Contrast("both premises over one, on the conclusion", (premises, conclusion), (premise, conclusion))


DOMAINS: dict[str, Domain] = {
    "belongs_to": Domain(
        "A belongs to B, and B to C",
        "ABC",
        {
            "a_in_c": "The {A} belongs to the {C}.",
            "a_in_b": "The {A} belongs to the {B}.",
            "b_contains_a": "The {B} has the {A} as one of its parts.",
            "b_in_a": "The {B} belongs to the {A}.",
            "a_not_in_c": "The {A} does not belong to the {C}.",
            "a_may_be_in_c": "Perhaps the {A} belongs to the {C}.",
            "b_in_c": "The {B} belongs to the {C}.",
            "c_in_a": "The {C} belongs to the {A}.",
            "both_in_one": "The {A} belongs to the {B}, which in turn belongs to the {C}.",
            "both_in_two": "The {A} belongs to the {B}. The {B} belongs to the {C}.",
            UNRELATED: "{true}",
        },
        (
            _conclusion("both_in_two", "a_in_c", "c_in_a"),
            _negation("both_in_two", "a_in_c", "a_not_in_c"),
            _one_over_two("a_in_c"),
            _step("both_in_two", "a_in_b", "a_in_c"),
            Contrast("statement over its reversal", ("a_in_b", "a_in_b"), ("a_in_b", "b_in_a")),
            Contrast("the same in other words over its reversal", ("a_in_b", "b_contains_a"), ("a_in_b", "b_in_a")),
        ),
    ),
    "chain_induces": Domain(
        "A brings about B, and so on to Z",
        "ABCDZ",
        {
            "a_to_z": "If {A} occurs, {Z} soon follows.",
            "a_to_b": "If {A} occurs, {B} soon follows.",
            "b_to_z": "If {B} occurs, {Z} soon follows.",
            "both_in_one": "If {A} occurs, {B} soon follows, and then {Z} follows as well.",
            "both_in_two": "If {A} occurs, {B} soon follows. If {B} occurs, {Z} soon follows.",
            "chain": "If {A} occurs, {B} soon follows. If {B} occurs, {C} soon follows. If {C} occurs, {D} soon "
            "follows. If {D} occurs, {Z} soon follows.",
            "z_to_a": "If {Z} occurs, {A} soon follows.",
            "a_not_to_z": "If {A} occurs, {Z} never follows.",
            UNRELATED: "{true}",
        },
        (
            _conclusion("both_in_two", "a_to_z", "z_to_a"),
            _negation("both_in_two", "a_to_z", "a_not_to_z"),
            _one_over_two("a_to_z"),
            _step("both_in_two", "a_to_b", "a_to_z"),
            Contrast("conclusion over its reversal, after the long chain", ("chain", "a_to_z"), ("chain", "z_to_a")),
        ),
    ),
    "transitivity": Domain(
        "A is a B, and every B has a C",
        "ABC",
        {
            "a_is_b": "Any {A} is a {B}.",
            "b_has_c": "Every {B} has a {C}.",
            "both_in_one": "Any {A} is a {B}, and every {B} has a {C}.",
            "both_in_two": "Any {A} is a {B}. Every {B} has a {C}.",
            "b_is_a": "Any {B} is a {A}.",
            "a_is_not_b": "No {A} is a {B}.",
            "a_has_c": "Every {A} has a {C}.",
            "a_comes_with_c": "A {A} comes with a {C}.",
            "c_found_on_a": "Look at a {A}, and you will find a {C}.",
            "c_has_a": "Every {C} has a {A}.",
            "a_lacks_c": "No {A} has a {C}.",
            "words": "{A}, {B}, {C}",
            UNRELATED: "{true}",
        },
        (
            _conclusion("both_in_two", "a_has_c", "c_has_a"),
            _negation("both_in_two", "a_has_c", "a_lacks_c"),
            _one_over_two("a_has_c"),
            _step("both_in_two", "a_is_b", "a_has_c"),
            Contrast("statement over its reversal", ("a_is_b", "a_is_b"), ("a_is_b", "b_is_a")),
            Contrast("statement over its negation", ("a_is_b", "a_is_b"), ("a_is_b", "a_is_not_b")),
            Contrast(
                "premises over the words alone, on the conclusion", ("both_in_two", "a_has_c"), ("words", "a_has_c")
            ),
        ),
    ),
    "squares": Domain(
        "squares are B, and B are rectangles",
        "B",
        {
            "square_is_b": "All squares are {B}s.",
            "b_is_rectangle": "All {B}s are rectangles.",
            "both_in_one": "All squares are {B}s, and all {B}s are rectangles.",
            "both_in_two": "All squares are {B}s. All {B}s are rectangles.",
            "square_is_rectangle": "All squares are rectangles.",
            "rectangle_is_square": "All rectangles are squares.",
            "b_is_square": "All {B}s are squares.",
            "rectangle_is_b": "All rectangles are {B}s.",
            UNRELATED: "{true}",
        },
        (
            _conclusion("both_in_two", "square_is_rectangle", "rectangle_is_square"),
            _one_over_two("square_is_rectangle"),
            _step("both_in_two", "square_is_b", "square_is_rectangle"),
            Contrast("statement over its reversal", ("square_is_b", "square_is_b"), ("square_is_b", "b_is_square")),
        ),
    ),
}
