"""How a character looks to the matcher: compatibility forms, look-alikes, marks and invisibles.

Each character is folded by itself, whatever stands beside it, so a text may be folded in pieces
and every folded character can be traced back to the one it came from:

1. invisible characters (format controls, bidi controls, variation selectors, fillers, C0) go;
2. compatibility decomposition (NFKD, Unicode Standard Annex #15). This compares as NFKC does, but
   needs no neighbours, which composition would;
3. case folding of everything but ASCII, whose case the matcher needs (keys and codes have one);
4. accents and optional vowel points go (combining class 10 and above; marks that make another
   letter, as nukta, kana voicing and virama do, stay);
5. digits of every script become ASCII digits, look-alike letters become Latin letters (a compact
   table in the spirit of the skeleton of Unicode Technical Standard #39), and dashes, quotes and
   spaces become their ASCII kin.
"""

from __future__ import annotations

import unicodedata

LINE_ENDS = frozenset("\n\r\v\f\x85\u2028\u2029")


def _pairs(sources: str, targets: str) -> dict[str, str]:
    return dict(zip(sources, targets, strict=True))


# Lower case only: case folding comes first.
_LOOK_ALIKES: dict[str, str] = {
    **_pairs("авекмнорстухіјѕһԁԛԝѵӏ", "abekmhopctyxijshdqwvl"),  # Cyrillic
    **_pairs("αβεικνοτυχγρηϲϳ", "abeikvotuxypncj"),  # Greek
    **_pairs("օսցհոզ", "oughnq"),  # Armenian
    **_pairs("ᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘʀꜱᴛᴜᴠᴡʏᴢ", "abcdefghijklmnoprstuvwyz"),  # small capitals
    **_pairs("ıɩɑɡʋøđħłŧƒɨʉɵ", "iiagvodhltfiuo"),  # Latin letters with no decomposition
    "æ": "ae",
    "œ": "oe",
    **dict.fromkeys("‐‑‒–—―−⁃﹣", "-"),
    **dict.fromkeys("‘’‚‛′ʹʼˈ＇", "'"),
    **dict.fromkeys("“”„‟″«»", '"'),
    **dict.fromkeys("⁄∕⧸", "/"),
    **dict.fromkeys("∶ː꞉։", ":"),
    **dict.fromkeys("․·∙⋅。", "."),
    "∣": "|",
    "ǀ": "|",
    "‹": "<",
    "›": ">",
    "⟨": "<",
    "⟩": ">",
}

# Letters that decompose into nothing but are read as letters: (first code point, first letter).
_LETTER_RUNS = ((0x1F150, "A"), (0x1F170, "A"), (0x1F1E6, "A"))

# Default-ignorable code points that are not format controls (Unicode, DerivedCoreProperties).
_IGNORABLE_RANGES = (
    (0x034F, 0x034F),
    (0x115F, 0x1160),
    (0x17B4, 0x17B5),
    (0x180B, 0x180F),
    (0x2065, 0x2065),
    (0x3164, 0x3164),
    (0xFE00, 0xFE0F),
    (0xFFA0, 0xFFA0),
    (0xFFF0, 0xFFF8),
    (0xE0000, 0xE0FFF),
)
# Tag characters are invisible ASCII: a model reads what a person does not see, so they are read.
_TAG_SPACE, _TAG_TILDE = 0xE0020, 0xE007E
_FIRST_OPTIONAL_MARK = 10  # canonical combining classes below it make another letter


def _is_ignorable(character: str) -> bool:
    code = ord(character)
    if unicodedata.category(character) in ("Cf", "Cc"):
        return True
    return any(first <= code <= last for first, last in _IGNORABLE_RANGES)


def _fold_letter(character: str) -> str:
    code = ord(character)
    for first, letter in _LETTER_RUNS:
        if first <= code < first + 26:
            return chr(ord(letter) + code - first)
    digit = unicodedata.decimal(character, None)
    if digit is not None:
        return str(digit)
    return _LOOK_ALIKES.get(character, character)


def fold_character(character: str) -> str:
    """What one character is to the matcher: a few characters, one or none."""
    if character in LINE_ENDS:
        return "\n"
    if character.isspace() or character == "\u2800":
        return " "
    if "!" <= character <= "~":
        return character
    if _TAG_SPACE <= ord(character) <= _TAG_TILDE:
        return fold_character(chr(ord(character) - _TAG_SPACE + ord(" ")))
    if _is_ignorable(character):
        return ""
    folded: list[str] = []
    for part in unicodedata.normalize("NFKD", character):
        cased = part if part.isascii() else unicodedata.normalize("NFKD", part.casefold())
        for piece in cased:
            if unicodedata.combining(piece) >= _FIRST_OPTIONAL_MARK or _is_ignorable(piece):
                continue
            folded.append(" " if piece.isspace() else _fold_letter(piece))
    return "".join(folded)


MAX_REMEMBERED = 1 << 16


class FoldTable(dict[str, str]):
    """`fold_character`, remembered for the characters that were met."""

    def __missing__(self, character: str) -> str:
        folded = fold_character(character)
        if len(self) >= MAX_REMEMBERED:
            # A text that walks through Unicode must not fill the memory with it.
            self.clear()
        self[character] = folded
        return folded


FOLD = FoldTable()

# The matcher's views of folded text. Each keeps the length, so offsets mean the same in all.
_WORD_JOINERS = {ord("-"): " ", ord("_"): " ", ord("\n"): " "}
_LEET = {ord(a): b for a, b in _pairs("013457@$l", "oieastasi").items()}


def term_view(folded: str) -> str:
    """Folded text as terms see it: lower case, hyphens, underscores and line ends as spaces."""
    return folded.lower().translate(_WORD_JOINERS)


def leet_view(term_view_text: str) -> str:
    """A term view with the digits and signs that stand for letters read as letters."""
    return term_view_text.translate(_LEET)
