"""Text on the host: tokens to text piece by piece, and the strings that end it.

A token is not a piece of text: a character may be spread over several tokens, and a tokenizer may treat the first token
of a text otherwise (SentencePiece drops its leading space). So text is decoded in a short window of tokens, and what a
later token could still change is held back.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from kvjax.errors import RequestError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are not (yet) a character."""

WINDOW = 8
"""Tokens of context that are decoded again with new ones: a window of twice as many is cut back to this many.

Tokens of single bytes may need twice this for `CONTEXT_CHARACTERS`.
"""

CONTEXT_CHARACTERS = 4
"""A window must begin at least this many characters before the text still to come.

An unfinished character has at most 3 bytes, and each is decoded as at most one character: with 4, the window begins
before it. And so what a tokenizer does to the beginning of a text happens to characters that were given out already.
"""

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""SentencePiece's byte tokens. A run of them is text only as a whole: one wrong byte turns all of it into U+FFFD."""


class TextStream:
    """Turns token ids into text as they come: the pieces, joined, equal `tokenizer.decode` of all tokens.

    Held back until later tokens settle it: the last character while it is U+FFFD, and a run of byte tokens. Special
    tokens, and ids that the tokenizer does not know, have no text. Takes time linear in the number of tokens, however
    they are split over calls.

    Exact for decoders that change past text only in these ways, as byte-level, SentencePiece (Metaspace, byte fallback)
    and WordPiece ones do.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._silent = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
        self._reset()

    def _reset(self) -> None:
        self._window: list[int] = []
        self._byte_run = 0  # byte tokens at the end of the window
        self._emitted = 0  # characters of the decoded window that were given out
        self._limit = 2 * WINDOW  # length at which the window is cut back
        self._unfinished = False  # the decoded window ends in what may be part of a character

    @property
    def holding(self) -> bool:
        """Whether tokens were given whose text is still to come."""
        return self._unfinished or self._byte_run > 0

    def push(self, tokens: Sequence[int]) -> str:
        """Takes the next tokens and returns the text that they settle, perhaps none."""
        anything_new = False
        for token in tokens:
            name = self._tokenizer.id_to_token(token)
            if name is None or token in self._silent:
                continue
            self._window.append(token)
            self._byte_run = self._byte_run + 1 if BYTE_TOKEN.fullmatch(name) else 0
            anything_new |= self._byte_run == 0
        if not anything_new:
            return ""
        text = self._tokenizer.decode(self._window[: len(self._window) - self._byte_run])
        # All but the last U+FFFD are settled: an unfinished character is decoded as a single one.
        self._unfinished = text.endswith(REPLACEMENT)
        settled = len(text) - self._unfinished
        piece = text[self._emitted : settled]
        self._emitted = settled
        if len(self._window) >= self._limit and not self._byte_run:
            self._shorten()
        return piece

    def finish(self) -> str:
        """The text held back, as it stands; the stream is then ready for a new text."""
        piece = self._tokenizer.decode(self._window)[self._emitted :]
        self._reset()
        return piece

    def _shorten(self) -> None:
        """Forgets the tokens that can no longer matter, if what remains has enough text for context."""
        size = WINDOW
        while 2 * size <= len(self._window):
            context = len(self._tokenizer.decode(self._window[-size:])) - self._unfinished
            if context >= CONTEXT_CHARACTERS:
                self._window, self._emitted, self._limit = self._window[-size:], context, 2 * size
                return
            size *= 2
        self._limit = 2 * len(self._window)


class StopStrings:
    """Watches text for stop strings and holds back what could be the beginning of one.

    The stop string that is complete first ends the text; of several complete at the same character the longest. How the
    text is split into pieces does not matter. Takes time linear in the text (Knuth, Morris, Pratt 1977).

    Attributes:
      found: the stop string that has appeared, or None. After it, all text is dropped.
    """

    def __init__(self, stop: Sequence[str]):
        if isinstance(stop, str) or any(not isinstance(s, str) or not s for s in stop):
            raise RequestError(f"stop strings must be a sequence of non-empty strings, got {stop!r}")
        # Longest first, so that it is the one found among those complete at the same character.
        self._stop = sorted(set(stop), key=lambda s: (-len(s), s))
        self._borders = [borders(s) for s in self._stop]
        self._matched = [0] * len(self._stop)
        self._held = ""
        self.found: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string has appeared."""
        return self.found is not None

    def push(self, piece: str) -> str:
        """Takes the next piece of text; returns the text that is now known to come before any stop string."""
        if self.stopped:
            return ""
        text = self._held + piece
        for end, character in enumerate(piece, len(self._held) + 1):
            for which, stop in enumerate(self._stop):
                matched = self._matched[which]
                while matched and stop[matched] != character:
                    matched = self._borders[which][matched - 1]
                matched += stop[matched] == character
                if matched == len(stop):
                    self.found = stop
                    self._held = ""
                    return text[: end - len(stop)]
                self._matched[which] = matched
        free = len(text) - max(self._matched, default=0)
        self._held = text[free:]
        return text[:free]

    def finish(self) -> str:
        """The text held back, when no more comes: it was not a stop string after all."""
        piece, self._held = self._held, ""
        self._matched = [0] * len(self._stop)
        return piece


class Truncated(NamedTuple):
    """Tokens up to the one that completed a stop string.

    Attributes:
      tokens: includes the tokens of the stop string, the last of which completed it.
      text: their text without the stop string and what follows it.
      stop: the stop string found, or None: then nothing was cut.
    """

    tokens: list[int]
    text: str
    stop: str | None


def truncate_tokens(tokens: Sequence[int], tokenizer: Tokenizer, stop: Sequence[str]) -> Truncated:
    """The smallest number of tokens whose text contains a stop string; all of them if none does.

    A stop string is looked for in decoded text, where special tokens do not appear: use stop_tokens for those. Takes
    linear time, but for runs of byte tokens that end in a stop string, where each length of the run is tried.
    """
    tokens = list(tokens)
    stream, watch = TextStream(tokenizer), StopStrings(stop)
    pieces: list[str] = []
    settled = count = 0
    for count, token in enumerate(tokens, 1):
        pieces.append(watch.push(stream.push([token])))
        if watch.stopped:
            break
        if not stream.holding:
            settled = count
    else:
        pieces.append(watch.push(stream.finish()))
        pieces.append(watch.finish())
    if not watch.stopped:
        return Truncated(tokens, "".join(pieces), None)
    # The stream waits for a later token where text is not settled; the stop may have been complete before that.
    for shorter in range(settled + 1, count):
        early = StopStrings(stop)
        text = early.push(tokenizer.decode(tokens[:shorter]))
        if early.stopped:
            return Truncated(tokens[:shorter], text, early.found)
    return Truncated(tokens[:count], "".join(pieces), watch.found)


def borders(pattern: str) -> list[int]:
    """For each prefix of the pattern, the length of its longest proper prefix that is also its suffix."""
    result = [0] * len(pattern)
    matched = 0
    for index in range(1, len(pattern)):
        while matched and pattern[matched] != pattern[index]:
            matched = result[matched - 1]
        matched += pattern[matched] == pattern[index]
        result[index] = matched
    return result
