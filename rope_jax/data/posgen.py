"""PosGen: token sequences of a fixed rule, to train on short ones and test on long ones.

Wang et al., Resonance RoPE (arXiv 2403.00071) section 6.1 and sheryc/resonance_rope. Every token
after j + k random ones, the seed, is h = (sum of j + k earlier tokens) mod m: of the k tokens right
before it, and of j tokens that are far away, starting at token p:

  recursive       p = l - (j + k), right before those;
  cot             p = 0, the start of the sequence;
  semi_recursive  p = floor((l - (j + k)) / 2), a pointer that moves by one every two tokens.

The p of semi_recursive is that of the released code, which gives the sequences of the paper's
Figure 2; the index that the paper prints does not.

A sequence given to a model is [EOS] x_0 x_1 ...: EOS stands for a BOS, and x_l is predicted at
position l. The vocabulary is the m digits and [UNK] [PAD] [CLS] [SEP] [EOS].

What the tasks ask of a model is less than their rules say. Two tokens in a row with the same far
tokens differ by their near ones alone, so that x_l = 2 x_{l-1} - x_{l-1-k} (mod m): in `cot` for
every token but the first after the seed, in `semi_recursive` for every second one. In `recursive`
x_l = 2 x_{l-1} - x_{l-1-j-k}, likewise. A model that sees j + k + 1 tokens can thus be right on all
of `recursive` and `cot`, and on 1/2 + 1/(2 m) of `semi_recursive` (0.53 for m = 17) while it
guesses the rest: only accuracy above that needs the far token.
"""

from __future__ import annotations

import hashlib
import itertools

import numpy as np

from rope_jax.errors import check, choice

TASKS = ("recursive", "cot", "semi_recursive")
MODES = ("disjoint", "combinations")
SPLITS = ("train", "val", "test")
SPECIAL = ("[UNK]", "[PAD]", "[CLS]", "[SEP]", "[EOS]")  # ids m, m + 1, ...

_MOST_SEEDS = 10**7  # are permuted in memory


def sequences(task: str, seeds: np.ndarray, length: int, *, modulus: int, far: int) -> np.ndarray:
  """The sequences that follow from their seeds.

  Args:
    task: one of `TASKS`.
    seeds: [N, j + k] digits below m.
    length: tokens, those of the seed included.
    modulus: m.
    far: j; the other tokens of the seed are as many as the near ones, k.

  Returns:
    int32 [N, length].
  """
  seeds = np.asarray(seeds, np.int32)
  given = seeds.shape[1]
  out = np.zeros((len(seeds), max(length, given)), np.int32)
  out[:, :given] = seeds
  for i in range(given, length):
    start = pointer(task, i, given)
    total = out[:, start : start + far].sum(1) + out[:, i - (given - far) : i].sum(1)
    out[:, i] = total % modulus
  return out[:, :length]


def pointer(task: str, place: int, given: int) -> int:
  """p: where the far tokens start that the token at a place follows from, after `given` of seed."""
  return dict(recursive=place - given, cot=0, semi_recursive=(place - given) // 2)[task]


def seeds(p, split: str) -> np.ndarray:
  """Seeds of a split, int32 [N, j + k].

  'disjoint', as the paper says: all m^(j + k) tuples in an order drawn from p.seed, of which the
  first p.held_out are for 'test', the next for 'val' and what follows for 'train'.
  'combinations', as released: the increasing tuples in order, over and over (2,380 distinct ones
  among the 10,000 for m = 17, j + k = 4), of which 'val' has the first p.held_out and 'test' the
  next. Both are seen in training, so that only the length of a test sequence is new.

  Args:
    p: config.data.posgen.
    split: one of `SPLITS`.
  """
  n, held_out = p.far + p.near, p.held_out
  if p.mode == "combinations":
    first, count = dict(train=(0, p.train_sequences), val=(0, held_out), test=(held_out,) * 2)[
      split
    ]
    rows = itertools.cycle(itertools.combinations(range(p.modulus), n))
    return np.asarray(list(itertools.islice(rows, first, first + count)), np.int32)
  order = np.random.default_rng(p.seed).permutation(p.modulus**n)
  # Test first: what is tested does not depend on how much is trained on.
  parts = dict(
    test=(0, held_out), val=(held_out, held_out), train=(2 * held_out, p.train_sequences)
  )
  first, count = parts[split]
  digits = np.unravel_index(order[first : first + count], (p.modulus,) * n)
  return np.stack(digits, axis=1).astype(np.int32)


def examples(p, split: str, length: int) -> np.ndarray:
  """[EOS] x_0 ... x_{length-1} of all sequences of a split, int32 [N, length + 1]."""
  x = sequences(p.task, seeds(p, split), length, modulus=p.modulus, far=p.far)
  return np.pad(x, ((0, 0), (1, 0)), constant_values=PosGenTokenizer(p.modulus).bos_id)


class Sequences:
  """The training split as documents for `Batches`: [EOS] x_0 ... x_{length-1}.

  Attributes:
    lengths: [documents] tokens of each.
    unscored: the seed, which follows from nothing and is not scored.
    fingerprint: of the tokens.
  """

  def __init__(self, p, length: int):
    self._tokens = examples(p, "train", length)
    self.lengths = np.full(len(self._tokens), length + 1)
    self.unscored = p.far + p.near
    self.fingerprint = f"posgen-{hashlib.sha256(self._tokens.tobytes()).hexdigest()[:16]}"

  def __len__(self) -> int:
    return len(self._tokens)

  def slice(self, i: int, start: int, stop: int) -> np.ndarray:
    return self._tokens[i, start:stop]


class PosGenTokenizer:
  """Digits and names of special tokens, separated by blanks: '[EOS] 2 0 3 1'.

  Args:
    modulus: m.
  """

  adds_bos = True

  def __init__(self, modulus: int):
    self._names = [*map(str, range(modulus)), *SPECIAL]
    self._ids = {name: i for i, name in enumerate(self._names)}
    self.vocab_size = len(self._names)
    self.bos_id = self.eos_id = self._ids["[EOS]"]
    self.fingerprint = f"posgen-{modulus}"

  def encode(self, text: str) -> np.ndarray:
    """int32 ids; raises ValueError for what is no token."""
    unknown = [name for name in text.split() if name not in self._ids]
    if unknown:
      raise ValueError(f"{unknown[0]!r} is no token of PosGen: expected {', '.join(self._names)}")
    return np.asarray([self._ids[name] for name in text.split()], np.int32)

  def decode(self, ids) -> str:
    return " ".join(self._names[int(i)] for i in ids)


def validate(c, default) -> None:
  """Checks config.data.posgen, and what else of a config goes with it.

  Args:
    c: a config.
    default: the block data.posgen of the base config.

  Raises:
    ValueError: naming the key.
  """
  d, p = c.data, c.data.posgen
  if d.source != "posgen":
    check(c.tokenizer != "posgen", "tokenizer", c.tokenizer,
          f"another, since data.source={d.source!r} is text")  # fmt: skip
    for key, value in default.items():
      check(p[key] == value, f"data.posgen.{key}", p[key],
            f"left at {value!r}, since data.source={d.source!r} does not use it")  # fmt: skip
    return
  there = "with data.source='posgen'"
  choice("data.posgen.task", p.task, TASKS)
  choice("data.posgen.mode", p.mode, MODES)
  for key, least in dict(modulus=2, far=1, near=1, train_sequences=1, held_out=1, seed=0).items():
    check(p[key] >= least, f"data.posgen.{key}", p[key], f"at least {least}")
  n = p.far + p.near
  if p.mode == "combinations":
    check(p.modulus >= n, "data.posgen.modulus", p.modulus,
          f"at least far + near = {n}, or there are no combinations")  # fmt: skip
    check(p.seed == 0, "data.posgen.seed", p.seed, "0: mode='combinations' draws nothing")
  else:
    # More than 64 of them are too many of any modulus, and their number too long to be made.
    tuples, needed = p.modulus ** min(n, 64), p.train_sequences + 2 * p.held_out
    shown = f"{tuples:,}" if tuples < 10**15 else f"{p.modulus}^{n}"
    check(tuples <= _MOST_SEEDS, "data.posgen.modulus", p.modulus,
          f"so few that there are at most {_MOST_SEEDS:,} seeds, modulus ^ (far + near), not "
          f"{shown}")  # fmt: skip
    check(needed <= tuples, "data.posgen.train_sequences", p.train_sequences,
          f"with two times held_out={p.held_out} at most the {tuples:,} seeds that there are, "
          "modulus ^ (far + near); mode='combinations' repeats them")  # fmt: skip
  check(c.tokenizer == "posgen", "tokenizer", c.tokenizer, f"'posgen' {there}")
  check(d.length > n, "data.length", d.length,
        f"above far + near = {n} {there}: the seed is not scored")  # fmt: skip
  # A row is a document of its own, with nothing at its end.
  check(d.packing == "document", "data.packing", d.packing, f"'document' {there}")
  check(not d.append_eos, "data.append_eos", d.append_eos, f"False {there}")
  check(d.min_tokens == 0, "data.min_tokens", d.min_tokens, f"0 {there}: all are as long")
  check(d.positions != "pose", "data.positions", d.positions,
        f"another {there}: skipped tokens would break its rule")  # fmt: skip
  for name, entry in c.evals.items():
    check(entry.type == "posgen", f"evals.{name}.type", entry.type, f"'posgen' {there}")
