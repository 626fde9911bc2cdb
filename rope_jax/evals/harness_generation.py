"""The generation_kwargs of an lm_eval task, as `Generator` has them.

The rules are those of lm_eval's Hugging Face backend, but that a key which would be ignored is an
error: with it, other texts would be scored than the task asks for.
"""

from __future__ import annotations

from typing import NamedTuple

# As lm_eval orders its names for it; 256 where there is none, as in all its backends.
MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
DEFAULT_MAX_TOKENS = 256
KNOWN = ("until", *MAX_TOKENS, "do_sample", "temperature", "top_p")


class Generation(NamedTuple):
  """How requests are continued.

  Attributes:
    until: texts before the first of which a continuation ends.
    max_new_tokens: of each continuation.
    temperature: 0 is greedy.
    top_p: as for `Generator`; 1 where greedy.
  """

  until: tuple[str, ...]
  max_new_tokens: int
  temperature: float
  top_p: float

  def enough(self, text: str) -> bool:
    """Whether a continuation has one of the texts that end it."""
    return any(end in text for end in self.until)

  def cut(self, text: str) -> str:
    """A continuation up to the first of the texts that end it."""
    for end in self.until:
      text = text.partition(end)[0]
    return text


def generation(kwargs: dict, max_length: int) -> Generation:
  """What a task asks for.

  Args:
    kwargs: its generation_kwargs.
    max_length: tokens that prompt and continuation have together at most.

  Raises:
    ValueError: for a key that is not supported, or values that no text can be generated with.
  """
  unknown = sorted(set(kwargs) - set(KNOWN))
  if unknown:
    raise ValueError(
      f"generation_kwargs.{unknown[0]}={kwargs[unknown[0]]!r} is not supported; known: "
      + ", ".join(KNOWN)
    )
  until = kwargs.get("until") or []
  until = [until] if isinstance(until, str) else until
  given = [kwargs[key] for key in MAX_TOKENS if kwargs.get(key) is not None]
  tokens = int((given or [DEFAULT_MAX_TOKENS])[0])
  if not 0 < tokens < max_length:
    raise ValueError(
      f"generation_kwargs.max_gen_toks={tokens}: expected 1 to {max_length - 1}, as max_length="
      f"{max_length} holds the prompt, too"
    )
  temperature = float(kwargs.get("temperature") or 0)
  sample = kwargs.get("do_sample")
  sample = temperature > 0 if sample is None else sample
  if sample and temperature <= 0:
    raise ValueError(
      f"generation_kwargs.temperature={temperature}: expected above 0 with do_sample"
    )
  top_p = kwargs.get("top_p")
  return Generation(
    until=tuple(end for end in until if end),
    max_new_tokens=tokens,
    temperature=temperature if sample else 0.0,
    top_p=1.0 if top_p is None or not sample else float(top_p),
  )
