"""Ours against transformers on PyTorch: the same work on the same machine in the same run.

Every measurement has a process of its own (`process`, `worker`), so that its peak memory is its
own. Only `ours` imports JAX and only `peer` imports PyTorch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

import numpy as np

PARTS = ("limits", "forward", "train", "overhead", "generate", "memory", "compile")
DTYPES = ("float32", "bfloat16")
MODELS = ("smollm2", "tiny")
SIDES = ("ours", "peer")

# A Llama that costs little: of --model=tiny, and of the memory by length.
SMALL = dict(
  vocab_size=512, num_layers=2, d_model=64, num_heads=2, num_kv_heads=1, head_dim=32, d_ff=128,
  norm_eps=1e-5, tie_embeddings=True,
)  # fmt: skip
PROMPT, NEW = 512, 64  # tokens of `generate`
BATCHES = (1, 8)
WARM = 2048  # tokens beyond which a run is long: it is not run once for nothing
COMPILE_LENGTH = 8192
OVERHEAD_LENGTH = TRAIN_LENGTH = 8192  # at most
COMPILED_LENGTH = 32_768  # at most, of the real model's step that is compiled and not executed
LORA_RANK = 8


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is measured; made by `settings`."""

  parts: tuple[str, ...] = PARTS
  lengths: tuple[int, ...] = (2048, 4096, 8192, 16_384)
  train_lengths: tuple[int, ...] = (2048, 4096, 8192)
  dtypes: tuple[str, ...] = DTYPES
  repeats: int = 2
  model: str = "smollm2"
  memory_lengths: tuple[int, ...] = (8192, 16_384, 32_768, 65_536)
  peer: bool = True

  @property
  def overhead_length(self) -> int:
    return max([n for n in self.lengths if n <= OVERHEAD_LENGTH], default=self.lengths[0])

  def command(self) -> str:
    """The command that measures this."""
    words = ["python launch/bench.py"]
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.name == "peer":
        words += [] if value else ["--nopeer"]
      elif value != field.default:
        text = ",".join(map(str, value)) if isinstance(value, tuple) else value
        words.append(f"--{field.name}={text}")
    return " ".join(words)


def settings(
  *, parts, lengths, dtypes, repeats, model, memory_lengths, peer, train_lengths=None
) -> Settings:
  """Settings from the values of flags, lists being lists of words.

  `train_lengths` are by default those of `lengths` that transformers can train in 24 GB.

  Raises:
    ValueError: naming the flag.
  """
  lengths = _numbers("lengths", lengths)
  if train_lengths is None:
    train_lengths = [str(n) for n in lengths if n <= TRAIN_LENGTH] or [str(lengths[0])]
  return Settings(
    parts=_some("parts", parts, PARTS),
    lengths=lengths,
    train_lengths=_numbers("train_lengths", train_lengths),
    dtypes=_some("dtypes", dtypes, DTYPES),
    repeats=repeats,
    model=_some("model", [model], MODELS)[0],
    memory_lengths=_numbers("memory_lengths", memory_lengths),
    peer=peer,
  )


def plan(s: Settings) -> list[tuple[dict, int]]:
  """All measurements in their order, as (specification, number of the repeat); sides alternate."""
  found: dict[str, tuple[dict, list]] = {}
  for part in PARTS:
    if part in s.parts:
      for spec, sides in _CELLS[part](s):
        have = found.setdefault(key(spec), (spec, []))[1]
        have += [side for side in sides if side not in have and (s.peer or side == "ours")]
  return [
    (dict(spec, side=side), repeat)
    for spec, sides in found.values()
    for repeat in range(1 if spec["part"] == "memory" else s.repeats)  # bytes do not vary
    for side in sides
  ]


def key(spec: dict) -> str:
  """Equal for equal specifications."""
  return json.dumps(spec, sort_keys=True)


def random_ids(vocab_size: int, rows: int, length: int) -> np.ndarray:
  """int64 [rows, length], the same on both sides."""
  return np.random.default_rng(0).integers(0, vocab_size, (rows, length))


# ---- The cells of each part: (specification without its side, sides).


def matmul(s: Settings, dtype: str) -> dict:
  size = 2048 if s.model == "smollm2" else 256
  return dict(part="limits", what="matmul", size=size, dtype=dtype)


def copy(s: Settings) -> dict:
  return dict(part="limits", what="copy", mebibytes=1024 if s.model == "smollm2" else 16)


def forward(s: Settings, what: str, length: int, dtype: str) -> dict:
  return dict(part="forward", what=what, model=s.model, length=length, dtype=dtype)


def train(s: Settings, what: str, length: int, dtype: str) -> dict:
  return dict(part="train", what=what, model=s.model, length=length, dtype=dtype)


def overhead(s: Settings, dtype: str) -> dict:
  return dict(part="overhead", model=s.model, length=s.overhead_length, dtype=dtype)


def generate(s: Settings, batch: int, dtype: str) -> dict:
  return dict(part="generate", model=s.model, batch=batch, prompt=PROMPT, new=NEW, dtype=dtype)


def executed(s: Settings, what: str, length: int) -> dict:
  return dict(part="memory", what=what, model="tiny", length=length, dtype="float32", executed=True)


def compiled(s: Settings, what: str, length: int, dtype: str) -> dict:
  return dict(part="memory", what=what, model=s.model, length=length, dtype=dtype, executed=False)


def compilation(s: Settings) -> dict:
  length = COMPILE_LENGTH if s.model == "smollm2" else 256
  return dict(part="compile", model=s.model, length=length, dtype=s.dtypes[0])


FORWARD = ("losses", "last")
TRAIN = ("lora", "lora+psc")
MEMORY = ("forward", "step")


def _limits(s: Settings) -> Iterator:
  yield from ((matmul(s, dtype), SIDES) for dtype in s.dtypes)
  yield copy(s), SIDES


def _forward(s: Settings) -> Iterator:
  for dtype in s.dtypes:
    yield matmul(s, dtype), ("ours",)  # what shares of the peak are of
    for length in s.lengths:
      yield from ((forward(s, what, length, dtype), SIDES) for what in FORWARD)


def _train(s: Settings) -> Iterator:
  for dtype in s.dtypes:
    yield matmul(s, dtype), ("ours",)
    for length in s.train_lengths:
      yield train(s, "lora", length, dtype), SIDES
      yield train(s, "lora+psc", length, dtype), ("ours",)


def _overhead(s: Settings) -> Iterator:
  for dtype in s.dtypes:
    yield forward(s, "losses", s.overhead_length, dtype), ("ours",)  # what it is a share of
    yield overhead(s, dtype), ("ours",)


def _generate(s: Settings) -> Iterator:
  for dtype in s.dtypes:
    yield from ((generate(s, batch, dtype), SIDES) for batch in BATCHES)


def _memory(s: Settings) -> Iterator:
  for what in MEMORY:
    yield from ((executed(s, what, length), ("ours",)) for length in s.memory_lengths)
  for dtype in s.dtypes:
    for what in MEMORY:
      for length in s.memory_lengths:
        if length <= COMPILED_LENGTH:
          yield compiled(s, what, length, dtype), ("ours",)


def _compile(s: Settings) -> Iterator:
  yield compilation(s), ("ours",)


_CELLS = dict(
  limits=_limits,
  forward=_forward,
  train=_train,
  overhead=_overhead,
  generate=_generate,
  memory=_memory,
  compile=_compile,
)


# ---- Flags.


def _some(flag: str, values: list[str], choices: tuple[str, ...]) -> tuple[str, ...]:
  if not values or set(values) - set(choices):
    raise ValueError(f"--{flag}={','.join(values)}: expected some of {', '.join(choices)}")
  return tuple(choice for choice in choices if choice in values)


def _numbers(flag: str, values: list[str]) -> tuple[int, ...]:
  # A single token has no loss.
  if not values or not all(v.isascii() and v.isdigit() and int(v) > 1 for v in values):
    raise ValueError(f"--{flag}={','.join(values)}: expected whole numbers above 1, e.g. 512,1024")
  return tuple(sorted(set(map(int, values))))
