"""Text of rules cut into single statements, so that every error can name its file and line.

Cedar's parser reports no lines and numbers policies by position. Here a file is cut at the
semicolons that end its statements; the statements themselves are judged by Cedar alone. Source:
Cedar's lexical grammar (`//` comments, double-quoted strings with backslash escapes).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

# A comment ends at either line break: one that went on would hide the rules after it.
_TOKEN = re.compile(r'//[^\r\n]*|"(?:[^"\\]|\\.)*"|[;]|\S', re.DOTALL)


_OPEN, _CLOSE = frozenset("([{"), frozenset(")]}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """One policy as written, from its first word to its semicolon. Lines count from 1."""

    line: int
    text: str


def statements(text: str) -> Iterator[Statement]:
    """Cut `text` at the semicolons outside strings and comments.

    What follows the last semicolon is given too, so that Cedar refuses a statement without an end
    instead of nobody seeing it.
    """
    start: int | None = None
    for token in _TOKEN.finditer(text):
        if token.group().startswith("//"):
            continue
        if start is None:
            start = token.start()
        if token.group() == ";":
            yield _statement(text, start, token.end())
            start = None
    if start is not None:
        yield _statement(text, start, len(text))


def nesting(text: str) -> int:
    """How deep brackets stand in each other, outside strings and comments."""
    depth = deepest = 0
    for token in _TOKEN.finditer(text):
        depth += (token.group() in _OPEN) - (token.group() in _CLOSE)
        deepest = max(deepest, depth)
    return deepest


def _statement(text: str, start: int, end: int) -> Statement:
    return Statement(line=text.count("\n", 0, start) + 1, text=text[start:end])
