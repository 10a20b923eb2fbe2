"""The line of every key and table of a TOML document: tomllib gives values, but not where they stand.

Only for text that tomllib has already parsed without error, so the scanner may trust its syntax. A path is the way to a
value through the parsed document: `("node", 1, "address")` is the key `address` of the second `[[node]]`.
"""

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass

Path = tuple[str | int, ...]

_TOKEN = re.compile(
    r"""
      (?P<string> \"{3}(?:\\.|[^\\])*?\"{3,5} | '{3}.*?'{3,5} | "(?:\\.|[^"\\\n])*" | '[^'\n]*' )
    | (?P<skip>   \#[^\n]* | [ \t\r]+ )
    | (?P<mark>   \n | [\[\]{},=.] )
    | (?P<bare>   [^\s\[\]{},=.\#"']+ )
    """,
    re.VERBOSE | re.DOTALL,
)


def find_lines(text: str) -> dict[Path, int]:
    """Map the path of every key, table and array element of a valid TOML document to its first line, counted from 1."""
    return _Scanner(text).scan()


def nearest_line(lines: dict[Path, int], path: Path) -> int | None:
    """Find the line of a path, or of the closest table around it; None if the file has neither."""
    for length in range(len(path), 0, -1):
        if path[:length] in lines:
            return lines[path[:length]]
    return None


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str  # string, mark, bare
    text: str
    line: int


class _Scanner:
    """One pass over the tokens; keeps the table that the next key belongs to."""

    def __init__(self, text: str) -> None:
        self._tokens = list(_tokens(text))
        self._position = 0
        self._lines: dict[Path, int] = {}
        self._lengths: dict[Path, int] = {}  # number of `[[...]]` tables seen so far, by path

    def scan(self) -> dict[Path, int]:
        table: Path = ()
        while self._position < len(self._tokens):
            if self._take("\n"):
                continue
            if self._peek("["):
                table = self._header()
            else:
                self._pair(table)
        return self._lines

    def _header(self) -> Path:
        self._take("[")
        is_array = self._take("[")
        path: Path = ()
        line = self._tokens[self._position].line
        for part in self._key():
            path = self._enter((*path, part), line)
        if is_array:
            # `_enter` stopped inside the previous element of this array, if there was one.
            array = path[:-1] if isinstance(path[-1], int) else path
            self._lengths[array] = self._lengths.get(array, 0) + 1
            path = self._enter(array, line)
        while self._take("]"):
            pass
        return path

    def _enter(self, path: Path, line: int) -> Path:
        """Note a table's line and step into the last element, if it is an array of tables."""
        self._lines.setdefault(path, line)
        if path in self._lengths:
            path = (*path, self._lengths[path] - 1)
            self._lines.setdefault(path, line)
        return path

    def _pair(self, table: Path) -> None:
        path = table
        line = self._tokens[self._position].line
        for part in self._key():
            path = (*path, part)
            self._lines.setdefault(path, line)
        self._take("=")
        self._value(path)

    def _key(self) -> list[str]:
        parts = []
        while True:
            token = self._tokens[self._position]
            self._position += 1
            parts.append(_unquote(token))
            if not self._take("."):
                return parts

    def _value(self, path: Path) -> None:
        if self._take("["):
            self._array(path)
        elif self._take("{"):
            self._inline_table(path)
        else:
            while self._position < len(self._tokens) and not self._peek("\n", ",", "]", "}"):
                self._position += 1

    def _array(self, path: Path) -> None:
        index = 0
        while not self._take("]"):
            if self._take("\n") or self._take(","):
                continue
            self._lines[*path, index] = self._tokens[self._position].line
            self._value((*path, index))
            index += 1

    def _inline_table(self, path: Path) -> None:
        while not self._take("}"):
            if not (self._take("\n") or self._take(",")):
                self._pair(path)

    def _peek(self, *marks: str) -> bool:
        if self._position == len(self._tokens):
            return False
        token = self._tokens[self._position]
        return token.kind == "mark" and token.text in marks

    def _take(self, mark: str) -> bool:
        found = self._peek(mark)
        self._position += found
        return found


def _tokens(text: str) -> Iterator[_Token]:
    line = 1
    for match in _TOKEN.finditer(text):
        if match.lastgroup != "skip":
            yield _Token(match.lastgroup or "", match.group(), line)
        line += match.group().count("\n")


def _unquote(token: _Token) -> str:
    if token.kind != "string":
        return token.text
    return str(tomllib.loads(f"key = {token.text}")["key"])
