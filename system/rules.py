"""Rules for config values: a test, and what is allowed in words."""

import math
from collections.abc import Callable
from typing import Any

Rule = tuple[Callable[[Any], bool], str]  # a test of the value; what is allowed, in words


def one_of(names: tuple[str, ...]) -> Rule:
    """One of these texts."""
    return lambda value: isinstance(value, str) and value in names, f"one of {', '.join(names)}"


def integer(low: int, high: int = 10**9) -> Rule:
    """An integer from `low` to `high`, both allowed."""
    allowed = f"an integer from {low} to {high}"
    return lambda value: type(value) is int and low <= value <= high, allowed


def number(low: float, high: float = math.inf, above: bool = False, below: bool = False) -> Rule:
    """A finite number between `low` and `high`; `above` and `below` exclude the ends."""

    def ok(value: Any) -> bool:
        ends = ([] if above else [low]) + ([] if below else [high])
        number = type(value) in (int, float) and math.isfinite(value)
        return number and (low < value < high or value in ends)

    allowed = f"a number {'above' if above else 'from'} {low:g}"
    if high < math.inf:
        allowed += f" {'and below' if below else 'to'} {high:g}"
    return ok, allowed


def either(*rules: Rule) -> Rule:
    """What any of the rules allows."""
    allowed = ", or ".join(allowed for _, allowed in rules)
    return lambda value: any(ok(value) for ok, _ in rules), allowed


def list_of(rule: Rule, least: int = 1) -> Rule:
    """A list without repetitions."""

    def ok(value: Any) -> bool:
        values = isinstance(value, list) and len(value) >= least and all(map(rule[0], value))
        return values and len(set(value)) == len(value)

    return ok, f"a list, {'[…]' if least else '[] or […]'}, of {rule[1]}"


NULL: Rule = (lambda value: value is None, "null")
YES_OR_NO: Rule = (lambda value: isinstance(value, bool), "true or false")
PATH: Rule = (
    lambda value: isinstance(value, str) and bool(value.strip()),
    "a path, in quotes of its own if it looks like a number",
)
AUTO: Rule = (lambda value: value == "auto", "auto")
