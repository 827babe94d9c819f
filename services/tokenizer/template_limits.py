"""What a chat template may make: bounds on structures and numbers; traced_text bounds text."""

from __future__ import annotations

from typing import Any

from services.tokenizer.errors import ChatTemplateError
from services.tokenizer.traced_text import MAX_ITEMS, budget

MAX_INTEGER_BITS = 4096


def check_items(count: int) -> None:
    """Raises ChatTemplateError for a structure of more than MAX_ITEMS members."""
    if count > MAX_ITEMS:
        raise ChatTemplateError(f"the template makes a list of more than {MAX_ITEMS} members")


def check_structure(value: Any) -> None:
    """Raises ChatTemplateError for too many members or characters.

    They are counted through all levels, shared ones as often as they are shared.
    """
    members = chars = 0
    open_values = [value]
    while open_values:
        current = open_values.pop()
        if isinstance(current, str):
            chars += len(current)
            budget.check(chars)
        elif isinstance(current, dict):
            members += len(current)
            open_values.extend(current.keys())
            open_values.extend(current.values())
        elif isinstance(current, (list, tuple)):
            members += len(current)
            check_items(members)
            open_values.extend(current)
        check_items(members)


def check_product(left: Any, right: Any) -> None:
    """Raises ChatTemplateError if `left * right` would be too large."""
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > MAX_INTEGER_BITS:
            raise ChatTemplateError(f"the template makes a number of over {MAX_INTEGER_BITS} bits")
        return
    sequence, times = (right, left) if isinstance(left, int) else (left, right)
    if isinstance(times, int):
        if isinstance(sequence, str):
            budget.check(len(sequence) * times)
        elif isinstance(sequence, (list, tuple)):
            check_items(len(sequence) * times)


def check_power(base: Any, exponent: Any) -> None:
    """Raises ChatTemplateError if `base ** exponent` would be too large."""
    if (
        isinstance(base, int)
        and isinstance(exponent, int)
        and base.bit_length() * exponent > MAX_INTEGER_BITS
    ):
        raise ChatTemplateError(f"the template makes a number of over {MAX_INTEGER_BITS} bits")
