"""Long texts in pieces, which have the same tokens.

The `tokenizers` library takes 150 to 400 bytes for each character of a text, and gives them back
when it is done: 100 MB would need up to 40 GB at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

# Characters of a piece. A text that is no longer is not cut.
MOST = 2**20
_REACH = 128  # characters on both sides of a cut, in which it is tried out
_TRIED = 64  # places


def pieces(encode: Callable[[str], list[int]], text: str, most: int = MOST) -> Iterator[str]:
  """The text, or pieces of it whose tokens, one after the other, are those of the text.

  It is cut before a space between two words, where pre-tokenizers begin anew. Such a place is
  tried out first: the text around it must have the same tokens in two parts as in one, which it
  has not within a token of several words, nor where a tokenizer begins each text with a space of
  its own; there this space is left to it. A text without words, a run of a quarter of `most`
  characters, is cut wherever that holds; far from there its tokens may be divided otherwise.

  Args:
    encode: ids of a text.
    text: any.
    most: characters of a piece.

  Raises:
    ValueError: if there is no such place.
  """
  start = 0
  while len(text) - start > most:
    end, following = _cut(encode, text, start + most - most // 4, start + most)
    yield text[start:end]
    start = following
  yield text[start:] if start else text


def _cut(encode, text: str, low: int, high: int) -> tuple[int, int]:
  """(end of a piece, start of the next), the end being in low .. high."""
  at = high
  for _ in range(_TRIED):
    at = text.rfind(" ", low, at)
    if at < 0:
      break
    if not text[at - 1].isspace() and not text[at + 1].isspace():
      for following in (at, at + 1):
        if _is_free(encode, text, at, following):
          return at, following
  for at in range(high, max(low, high - _TRIED), -1):
    if _is_free(encode, text, at, at):
      return at, at
  raise ValueError(
    f"it has {len(text):,} characters, and before character {high:,} no place where the tokenizer "
    "can begin anew; make several documents of it"
  )


def _is_free(encode, text: str, end: int, following: int) -> bool:
  before, after = text[max(0, end - _REACH) : end], text[following : following + _REACH]
  between = text[end:following]
  return encode(before) + encode(after) == encode(before + between + after)
