"""Checks one text as it comes, and releases of it what no later text can turn into a match.

The whole check of a prompt is the same machine fed once, so a text is judged alike however it is
cut. State, all positions absolute:

    original   0 ... cursor (released) ... length        code points, as the text came
    folded     0 ... live[source] (decided before) ... length

Invariants (`check_integrity`): nothing before a source's `live` will yield another match; text is
released up to the earliest place where a match that redacts or blocks is pending or may still come;
matches take effect in the order in which they start, whatever source found them. Where a source has
looked no further than its `live`, matches of it may still come; only those that redact or block
have to be known before text is released.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from services.safety import injection
from services.safety.matcher import EVIDENCE_WEIGHTS, Matcher, Rule, RuleKind, evidence_sources
from services.safety.normalize import Normalizer
from services.safety.sources import Match, View
from services.safety.verdict import Action, Finding, Verdict

# Long texts are taken in pieces: it bounds memory, and lets other threads run in between.
PIECE_CHARS = 64 * 1024
# A source whose matches keep nothing from the reader looks at text once this much has come, for
# each look has its price; at once, where another source has found something.
UNHURRIED_CHARS = 192


@dataclass(slots=True)
class _Evidence:
    """Kinds of evidence seen so far for one category, with their weights."""

    weights: dict[str, float] = field(default_factory=dict)

    def add(self, kinds: list[str]) -> bool:
        """Whether any of the kinds is new."""
        before = len(self.weights)
        self.weights.update((kind, EVIDENCE_WEIGHTS[kind]) for kind in kinds)
        return len(self.weights) > before


class CheckSession:
    """The check of one text. Not safe for use by two threads at once."""

    def __init__(self, matcher: Matcher, *, released_text: str = "", text_index: int = 0) -> None:
        """`released_text` went out before: it is context, is not released again, and what lies in
        it is not reported again."""
        self.verdict = Verdict()
        self.is_blocked = False
        self.is_finished = False
        self.new_findings: list[Finding] = []  # listed ones, for the caller to take and clear
        self._matcher = matcher
        self._text_index = text_index
        self._normalizer = Normalizer()
        self._view = "\n"  # folded text from _view_start on; its first character is context
        self._view_start = -1
        self._live = [-1] * len(matcher.sources)
        self._pending: list[Match] = []  # absolute positions
        self._original = ""  # from _cursor on
        self._cursor = 0
        self._redacted_until = 0
        self._reported_until = 0
        self._allowed_until = -1
        self._covered: dict[int, int] = {}  # rule: end of its last finding
        self._evidence: dict[str, _Evidence] = {}
        self._out: list[str] = []
        if released_text:
            self._reported_until = self._cursor = len(released_text)
            for piece in _pieces(released_text):
                self._take(piece)
                self._advance(is_final=False)

    @property
    def held_chars(self) -> int:
        """Original code points that are held back now."""
        return 0 if self.is_blocked else self._normalizer.original_length - self._cursor

    @property
    def decided_chars(self) -> int:
        """Original code points that the releases so far stand for, `released_text` included."""
        return self._cursor

    def feed(self, text: str) -> str:
        """Takes text that follows; returns what may go out now, after redaction."""
        assert not self.is_finished
        for piece in _pieces(text):
            if self.is_blocked:
                break
            self._add(piece)
            self._advance(is_final=False)
        return self._drain()

    def finish(self, text: str = "") -> str:
        """Ends the text, with what is still to come of it: decides and returns what was held back.

        As `feed` and then `finish`, but looks at the text once.
        """
        assert not self.is_finished
        *pieces, last = _pieces(text) or [""]
        for piece in pieces:
            if not self.is_blocked:
                self._add(piece)
                self._advance(is_final=False)
        if not self.is_blocked:
            self._add(last)
            self._advance(is_final=True)
        self.is_finished = True
        return self._drain()

    def check_integrity(self) -> None:
        """Asserts the invariants; for tests."""
        if self.is_blocked:
            return
        assert self._cursor + len(self._original) == self._normalizer.original_length
        assert self._view_start + len(self._view) == self._normalizer.folded_length
        assert all(live > self._view_start for live in self._live) or self._view_start == -1
        assert all(match.start >= min(self._live) for match in self._pending)

    def _add(self, piece: str) -> None:
        self._take(piece)
        if self._cursor < self._normalizer.original_length:
            self._original += piece[-(self._normalizer.original_length - self._cursor) :]

    def _take(self, piece: str) -> None:
        self._view += self._normalizer.feed(piece)

    def _drain(self) -> str:
        out = "".join(self._out)
        self._out.clear()
        return out

    def _advance(self, *, is_final: bool) -> None:
        offset = self._view_start
        view = View(self._view, is_final)
        end = offset + len(self._view)
        held = end
        sources = self._matcher.sources
        waiting: list[int] = []
        for index, source in enumerate(sources):
            can_wait = not (source.holds_back or is_final or self._pending)
            if can_wait and end - self._live[index] <= UNHURRIED_CHARS:
                waiting.append(index)
                continue
            self._look(index, view)
            if source.holds_back:
                held = min(held, self._live[index])
        if self._pending:
            # What they find may change what becomes of what was found.
            for index in waiting:
                self._look(index, view)
        decided = min(self._live, default=end)
        if self._pending:
            self._decide(decided)
            rules = self._matcher.rules
            for match in self._pending:
                if rules[match.rule].action >= Action.REDACT:
                    held = min(held, match.start)
        if not self.is_blocked:
            self._release(self._normalizer.original_start(held))
        keep = min((decided, *(match.start for match in self._pending))) - 1
        if keep > offset:
            self._view = self._view[keep - offset :]
            self._view_start = keep
            self._normalizer.forget(keep)

    def _look(self, index: int, view: View) -> None:
        """Has a source look at what it has not decided yet."""
        offset = self._view_start
        source = self._matcher.sources[index]
        first = self._live[index] - offset
        live = len(self._view) if view.is_final else source.live(view, first)
        if live > first:
            for match in source.find(view, first, live):
                self._pending.append(
                    Match(match.start + offset, match.end + offset, match.rule, match.score)
                )
            self._live[index] = live + offset

    def _decide(self, decided: int) -> None:
        """Lets the matches that start before `decided` take effect."""
        ready = [match for match in self._pending if match.start < decided]
        if not ready:
            return
        self._pending = [match for match in self._pending if match.start >= decided]
        rules = self._matcher.rules
        ready.sort(
            key=lambda m: (m.start, rules[m.rule].kind is not RuleKind.ALLOWED, -m.end, m.rule)
        )
        for match in ready:
            self._apply(match, rules[match.rule])
            if self.is_blocked:
                self._pending.clear()
                return

    def _apply(self, match: Match, rule: Rule) -> None:
        if rule.kind is RuleKind.ALLOWED:
            self._allowed_until = max(self._allowed_until, match.end)
            return
        # Allowed terms that end later began earlier, for matches come in order of their starts.
        if match.end <= self._allowed_until:
            return
        score = match.score
        if rule.kind is RuleKind.FINDING:
            if match.end <= self._covered.get(match.rule, -1):
                return
            if score >= rule.threshold:
                self._covered[match.rule] = match.end
        else:
            kinds = [rule.evidence]
            if rule.kind is RuleKind.ENCODED:
                kinds = self._kinds_in_blob(match)
            evidence = self._evidence.setdefault(rule.category, _Evidence())
            if not kinds or not evidence.add(kinds):
                return
            score = injection.combined_score(evidence.weights.values())
        if score >= rule.threshold:
            self._act(rule, score, *self._normalizer.original_span(match.start, match.end))

    def _kinds_in_blob(self, match: Match) -> list[str]:
        """Evidence in what a run of base64 or hexadecimal holds, itself one kind; or nothing."""
        offset = self._view_start
        text = injection.decode_blob(self._view[match.start - offset : match.end - offset])
        if text is None:
            return []
        view = View("\n" + Normalizer().feed(text), is_final=True)
        length = len(view.folded)
        rules = {
            found.rule
            for source in evidence_sources()
            for found in source.find(view, 0, length)
        }  # fmt: skip
        kinds = [injection.EVIDENCE[rule].kind for rule in sorted(rules)]
        return [*kinds, injection.ENCODED_KIND] if kinds else []

    def _act(self, rule: Rule, score: float, start: int, end: int) -> None:
        if end <= self._reported_until:
            return
        finding = Finding(
            rule.category, score, rule.action, rule.detector, start, end, self._text_index
        )
        if self.verdict.add(finding):
            self.new_findings.append(finding)
        if rule.action is Action.BLOCK:
            self._release(start)
            self.is_blocked = True
            self._original = ""
        elif rule.action is Action.REDACT:
            if start >= self._redacted_until:
                self._release(start)
                self._out.append(self._matcher.policy.replacement)
            self._redacted_until = max(self._redacted_until, end)
            self._skip(end)

    def _release(self, until: int) -> None:
        """Lets original text out up to a position."""
        count = until - self._cursor
        if count > 0:
            self._out.append(self._original[:count])
            self._original = self._original[count:]
            self._cursor = until

    def _skip(self, until: int) -> None:
        count = until - self._cursor
        if count > 0:
            self._original = self._original[count:]
            self._cursor = until


def _pieces(text: str) -> list[str]:
    if len(text) <= PIECE_CHARS:
        return [text] if text else []
    return [text[i : i + PIECE_CHARS] for i in range(0, len(text), PIECE_CHARS)]


@dataclass(frozen=True, slots=True)
class PromptCheck:
    """What is said of the texts of a prompt, and the texts as they may be used."""

    verdict: Verdict
    texts: list[str]


class CheckCancelledError(Exception):
    """The caller of a check went away before it was done."""


def check_texts(
    matcher: Matcher,
    texts: Sequence[str],
    is_cancelled: Callable[[], bool] = lambda: False,
) -> PromptCheck:
    """Checks whole texts. After a block nothing more is looked at.

    Raises CheckCancelledError soon after `is_cancelled` says so.
    """
    verdict = Verdict()
    checked: list[str] = []
    for index, text in enumerate(texts):
        session = CheckSession(matcher, text_index=index)
        out: list[str] = []
        *pieces, last = _pieces(text) or [""]
        for piece in pieces:
            if is_cancelled():
                raise CheckCancelledError
            out.append(session.feed(piece))
        if is_cancelled():
            raise CheckCancelledError
        out.append(session.finish(last))
        checked.append("".join(out))
        for finding in session.new_findings:
            verdict.add(finding)
        if session.is_blocked:
            break
    return PromptCheck(verdict, checked)
