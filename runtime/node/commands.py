"""Commands to a child process: one line of JSON each on its standard input, each answered with one line."""

import os
import sys
from collections.abc import Callable


def listen(answer: Callable[[bytes], str]) -> None:
    """Answer every line of standard input until it ends: it does when the parent ends, whatever kills it.

    Args:
        answer: gives `OK`, `OK` and a text, or `ERROR` and a text.
    """
    rest = b""
    while part := os.read(sys.stdin.fileno(), 2**16):  # not sys.stdin.read: its lock would be held at the end
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            print(answer(line), flush=True)
