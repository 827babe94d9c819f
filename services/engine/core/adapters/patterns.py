"""Values by patterns of module names, as PEFT's rank_pattern and alpha_pattern have them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from services.runtime.modelfiles.fields import Fields

_MOST_KEYS = 1024
# Of patterns that have a choice or a repetition: looking for them takes as many tries as a name has
# letters for each.
_MOST_CHOICES = 16
_MOST_CHARACTERS = 256
_LETTER = r"(?:[\w-]|\\?\.|\\d|\[[\w^.-]+\])"
_CHOICE = rf"(?:{_LETTER}[+*]|\((?:\?:)?[\w.|\\-]+\))"
# The part of regular expressions that modules' names are told with: one choice or repetition, for
# two could take for ever.
_KEY = re.compile(rf"\^?{_LETTER}*{_CHOICE}?{_LETTER}*\$?")


@dataclass(frozen=True, slots=True)
class ModulePatterns:
    """Numbers by regular expressions that end a module's name, at a dot or as a whole."""

    patterns: tuple[tuple[re.Pattern[str], float], ...]

    @classmethod
    def read(cls, fields: Fields, name: str, *, whole: bool = False) -> ModulePatterns:
        """Those of a table, none where it is absent. whole: whether they are ranks.

        Raises ModelFileError for a pattern that is none or could take long, and for a value that is
        no number, or no rank.
        """
        table = fields.table(name)
        if table is None:
            return cls(())
        if len(table.raw) > _MOST_KEYS:
            raise fields.error(name, f"has more than {_MOST_KEYS} patterns")
        patterns = []
        choices = 0
        for key in table.raw:
            choices += any(each in key for each in "*+(")
            if len(key) > _MOST_CHARACTERS or choices > _MOST_CHOICES:
                raise fields.error(name, "has patterns that take too long to look for")
            if not _KEY.fullmatch(key):
                raise table.error(key, "is not a name, or a pattern of names, that can be read")
            try:
                pattern = re.compile(rf"(?:.*\.)?(?:{key})$")
            except re.error as error:
                raise table.error(key, f"is no regular expression: {error}") from None
            value = table.integer(key) if whole else table.number(key)
            if whole and value < 1:
                raise table.error(key, f"{value} is no rank")
            patterns.append((pattern, value))
        return cls(tuple(patterns))

    def value(self, module: str, default: float) -> float:
        """That of the first pattern that fits, else the default."""
        return next((value for pattern, value in self.patterns if pattern.match(module)), default)
