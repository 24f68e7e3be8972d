"""Diffusers' warning about keys that a scheduler ignores, without ours.

Diffusers keeps our keys in the config of every scheduler that takes our place, and names them, with their values, at
each further exchange: after a fit the tables alone are 48 kB on the terminal.
"""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Iterable

MESSAGE = re.compile(r"The config attributes (\{.*\}) were passed to ", re.DOTALL)


class WithoutKeys(logging.Filter):
    """Takes keys out of the warning; a warning about nothing else is dropped."""

    def __init__(self, keys: Iterable[str]) -> None:
        super().__init__()
        self.keys = frozenset(keys)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to print the record, shortened where it names our keys."""
        match = MESSAGE.match(str(record.msg))
        if match is None:
            return True
        try:
            attributes = ast.literal_eval(match[1])
        except (ValueError, SyntaxError, MemoryError, RecursionError):  # values that are no literals
            return True
        others = {key: value for key, value in attributes.items() if key not in self.keys}
        record.msg = record.msg.replace(match[1], str(others), 1)
        return bool(others)


def leave_out(keys: Iterable[str]) -> None:
    """Leave keys out of the warning for the rest of this process."""
    logger = logging.getLogger("diffusers.configuration_utils")
    if not any(isinstance(each, WithoutKeys) for each in logger.filters):
        logger.addFilter(WithoutKeys(keys))
