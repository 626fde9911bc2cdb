"""Damaged and hostile files of every kind: a ValueError that names the file, or a valid read.

  python tests/faults files --count=2000 --seed=0

Case N of a seed is always the same. Nothing of it may run, hang, take a gigabyte or be written.
"""

import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import fuzz_corpus
import fuzz_mutations as mutations
import fuzz_readers as readers
import fuzz_watch
import numpy as np

LONGEST = 600  # characters of an error, beside the path
MOST_MB = 1000
# Of twenty cases, how many are of a kind; and who reads it.
KINDS = dict(
  hugging_face=(5, readers.checkpoint),
  gguf=(4, readers.checkpoint),
  tokenizer=(3, readers.tokens),
  factors=(2, readers.factor_lists),
  run=(2, readers.run),
  journal=(1, readers.journal),
  results=(2, readers.result_tables),
  tokens=(1, readers.token_store),
)
ORDER = [kind for kind, (share, _) in KINDS.items() for _ in range(share)]


class Fuzz:
  """Cases by number, in a directory of their own."""

  def __init__(self, root: Path, seed: int):
    self.root, self.seed, self.case = root, seed, root / "case"
    scratch = root / "good"
    scratch.mkdir()
    self.gguf = fuzz_corpus.gguf_cases(scratch)
    self.good = dict(
      hugging_face=fuzz_corpus.hugging_face(),
      gguf=[{"model.gguf": x["file"]} for x in self.gguf],
      tokenizer=fuzz_corpus.tokenizer_cases(),
      factors=fuzz_corpus.factor_cases(),
      run=[fuzz_corpus.run_files(scratch)],
      journal=[fuzz_corpus.journal_file(scratch)],
      results=fuzz_corpus.results_cases(),
      tokens=[fuzz_corpus.token_cache(scratch)],
    )
    files = [data for cases in self.good.values() for files in cases for data in files.values()]
    self.others = mutations.others(files)
    self.outside = root / "outside"
    self.outside.write_bytes(files[0])

  def make(self, number: int):
    """Writes a case; returns its kind, what was done to it, and its generator."""
    rng = np.random.default_rng([self.seed, number])
    kind = ORDER[number % len(ORDER)]
    which = int(rng.integers(len(self.good[kind])))
    self.write(self.good[kind][which])
    path = self.case / mutations.some(rng, sorted(self.good[kind][which]))
    return kind, f"{path.name} {which}: {self.damage(rng, kind, which, path)}", rng

  def write(self, files: dict[str, bytes]) -> None:
    shutil.rmtree(self.case, ignore_errors=True)
    self.case.mkdir()
    for name, data in files.items():
      (self.case / name).write_bytes(data)

  def damage(self, rng, kind: str, which: int, path: Path) -> str:
    data, chance = path.read_bytes(), rng.random()
    if chance < 0.04:
      return mutations.place(rng, path, self.outside)
    if chance < 0.08:
      path.write_bytes(mutations.some(rng, self.others))
      return "another file"
    if chance < 0.11:
      first, second = (data, mutations.some(rng, self.others))[:: 1 if rng.random() < 0.5 else -1]
      path.write_bytes(first + second)
      return "two files in one"
    end = header_end(path.name, data)
    if chance < 0.45:
      path.write_bytes(mutations.damaged(rng, data, end))
      return "bytes"
    path.write_bytes(self.structure(rng, which, path, data, end))
    return "structure"

  def structure(self, rng, which: int, path: Path, data: bytes, end: int) -> bytes:
    ending = path.suffix
    if path.name == "tokenizer.json" and rng.random() < 0.4:
      return mutations.tokenizer_file(rng, data)
    if ending == ".json":
      return mutations.json_file(rng, data)
    if ending == ".jsonl":
      return mutations.json_lines(rng, data)
    if ending == ".csv":
      return mutations.table(rng, data)
    if ending == ".safetensors":
      return mutations.safetensors_file(rng, data)
    if ending == ".gguf" and rng.random() < 0.6:

      def write(*parts):
        return fuzz_corpus.gguf_bytes(self.root / "again.gguf", *parts)

      return mutations.gguf_file(rng, self.gguf[which]["parts"], write)
    return mutations.numbers(rng, data, end)

  def read(self, kind: str, rng) -> tuple[str, str]:
    """(what became of it, why): 'read', 'refused', or what must not be."""
    before, seen = self.listing(), []
    try:
      with fuzz_watch.watch(str(self.case)) as seen:
        KINDS[kind][1](self.case, rng)
      outcome = "read", ""
    except readers.OfTheConfig as error:
      outcome = complaint(str(error), "config.") or ("refused", "")
    except ValueError as error:
      outcome = complaint(str(error), str(self.case)) or ("refused", "")
    except fuzz_watch.Hung as error:
      outcome = "hung", str(error)
    except (KeyboardInterrupt, SystemExit):
      raise
    except BaseException as error:  # Rust's panics are no Exceptions
      outcome = "bug", f"{type(error).__name__}: {str(error)[:300]}{where(error)}"
    if seen or list(self.root.rglob(mutations.BOMB)) or os.path.exists(mutations.BOMB):
      return "executed", f"{seen} {outcome}"
    if kind != "journal" and self.listing() != before:  # of that, the reader sees to it
      return "written", str(outcome)
    return outcome

  def listing(self) -> dict:
    found = {p.name: p.lstat() for p in self.case.iterdir()}
    return {name: (s.st_size, s.st_mtime_ns, s.st_mode) for name, s in found.items()}


def header_end(name: str, data: bytes) -> int:
  """Where the part of a file ends that most of the damage is done to; 0 is all of it."""
  if name.endswith(".safetensors"):
    return 8 + int.from_bytes(data[:8], "little")
  return data.rindex(b"token_embd.weight") + 60 if name.endswith(".gguf") else 0


def complaint(message: str, named: str):
  """What is wrong with the text of an error, None if it is as it should be."""
  try:
    message.encode()
  except UnicodeEncodeError:
    return "unprintable", ascii(message)[:300]
  if named not in message:
    return "nameless", message[:300]
  if len(message.splitlines()) != 1 or not message.isprintable():
    return "several lines", ascii(message)[:400]
  return ("long", message[:300]) if len(message.replace(named, "")) > LONGEST else None


def where(error: BaseException) -> str:
  trace, last = error.__traceback__, ""
  while trace:
    code = trace.tb_frame.f_code
    if "rope_jax" in code.co_filename or "faults" in code.co_filename:
      last = f" at {os.path.basename(code.co_filename)}:{trace.tb_lineno}"
    trace = trace.tb_next
  return last


def run(seed: int, count: int) -> dict:
  """Reads `count` damaged files.

  Returns:
    files, refused, read; by_kind {kind: {read, refused}}; executed and hung, which are 0;
    megabytes that memory has grown by.

  Raises:
    AssertionError: naming up to twenty cases that were neither read nor refused as they must be.
  """
  found, bugs = found_in(seed, range(count))
  assert not bugs, "\n".join(f"case {n} of seed {seed}: {what}" for n, what in bugs[:20])
  return found


def found_in(seed: int, numbers) -> tuple[dict, list]:
  counts, bugs, by_kind = Counter(), [], {kind: Counter() for kind in KINDS}
  root = Path(tempfile.mkdtemp(prefix="files"))
  try:
    fuzz = Fuzz(root, seed)
    for kind, cases in fuzz.good.items():  # whole ones are read; and all that is imported, is
      for files in cases:
        fuzz.write(files)
        outcome = fuzz.read(kind, np.random.default_rng(1))
        assert outcome == ("read", ""), (kind, outcome)
    start = fuzz_watch.peak_mb()
    for number in numbers:
      kind, damage, rng = fuzz.make(number)
      before = fuzz_watch.peak_mb()
      outcome, why = fuzz.read(kind, rng)
      if outcome in ("read", "refused") and fuzz_watch.peak_mb() > before + MOST_MB:
        outcome, why = "large", f"{fuzz_watch.peak_mb() - before} MB"
      counts[outcome] += 1
      by_kind[kind][outcome] += 1
      if outcome not in ("read", "refused"):
        bugs.append((number, f"{kind} {damage}: {outcome}: {why}"))
    grown = fuzz_watch.peak_mb() - start
  finally:
    shutil.rmtree(root, ignore_errors=True)
  return dict(
    files=sum(counts.values()),
    refused=counts["refused"],
    read=counts["read"],
    executed=counts["executed"],
    hung=counts["hung"],
    megabytes=grown,
    by_kind={kind: dict(found) for kind, found in by_kind.items()},
  ), bugs
