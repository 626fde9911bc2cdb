"""Metrics to the screen, to WORKDIR/metrics.jsonl and to TensorBoard."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time

import tensorboardX

from rope_jax.train import multihost


class Metrics:
  """Rows of numbers by step. After a resume, rows past the restored step are dropped first.

  Args:
    workdir: of the run.
    first_step: steps already done.
    last_step: steps of the whole run, for the time left.
    flops_per_token: of a training step, over all devices.
    peak_flops: of all devices together, or None if not known.
  """

  def __init__(self, workdir, first_step, last_step, flops_per_token, peak_flops):
    self._write = multihost.is_main()
    self._last_step, self._flops, self._peak = last_step, flops_per_token, peak_flops
    self._path = os.path.join(workdir, "metrics.jsonl")
    self._written: set[tuple[int, str]] = set()
    self._drop_rows_after(first_step)
    if self._write:
      self._file = open(self._path, "a")  # noqa: SIM115 - closed by close()
      self._board = tensorboardX.SummaryWriter(workdir, purge_step=first_step + 1)
    self._first_step, self._tokens, self._start = first_step, 0, time.perf_counter()

  def count(self, step: int, tokens: int) -> None:
    """Counts the tokens of a step that is done; the first of a process is mostly compilation."""
    if step == self._first_step + 1:
      self._start = time.perf_counter()
    else:
      self._tokens += tokens

  @contextlib.contextmanager
  def paused(self):
    """Leaves what is not training out of the rates."""
    began = time.perf_counter()
    yield
    self._start += time.perf_counter() - began

  def log_training(self, step: int, values: dict) -> None:
    """Adds the rates so far to the metrics of a step, writes them, prints the progress line."""
    # Averages since the first step: a single step cannot be timed while the next is under way.
    seconds, steps = time.perf_counter() - self._start, step - self._first_step - 1
    rate = self._tokens / seconds
    values["tokens_per_second"] = rate
    if self._peak:
      values["mfu"] = rate * self._flops / self._peak
    self.write(step, values)
    line = f"step {step:>{len(str(self._last_step))}}/{self._last_step}"
    line += f"  loss {values['loss']:.4f}  grad {values['grad_norm']:.2e}"
    line += f"  lr {values['learning_rate']:.2e}"
    if steps:
      line += f"  {rate:,.0f} tokens/s" + (f"  MFU {values['mfu']:.1%}" if self._peak else "")
      line += f"  ETA {duration((self._last_step - step) * seconds / steps)}"
    self.say(line, progress=step < self._last_step)

  def write(self, step: int, values: dict) -> None:
    """Appends a row."""
    if self._write:
      # JSON has no NaN and no infinity.
      plain = {k: v if math.isfinite(v) else None for k, v in values.items()}
      self._file.write(json.dumps(dict(step=step, **plain)) + "\n")
      self._file.flush()
      for key, value in plain.items():
        if value is not None:
          self._board.add_scalar(key, value, step)

  def say(self, text: str, *, progress: bool = False) -> None:
    """Prints a line; on a terminal, a progress line is overwritten by the next."""
    if not self._write:
      return
    if sys.stdout.isatty():
      print(f"\r\033[K{text}", end="" if progress else "\n", flush=True)
    else:
      print(text, flush=True)

  def close(self) -> None:
    if self._write:
      self._file.close()
      self._board.close()

  def has(self, step: int, prefix: str) -> bool:
    """Whether a row of this step has values under PREFIX/."""
    return (step, prefix) in self._written

  def _drop_rows_after(self, step: int) -> None:
    """Keeps the whole rows up to a step: a kill may have cut the last, or left rows beyond."""
    if not os.path.exists(self._path):
      return
    rows = []
    with open(self._path, encoding="utf-8", errors="replace") as f:
      for number, line in enumerate(f, 1):
        if not line.endswith("\n"):
          continue  # cut off by a kill
        try:
          keeps = json.loads(line)["step"] <= step
        except (KeyError, TypeError, ValueError):
          raise ValueError(
            f"--workdir={os.path.dirname(self._path)}: metrics.jsonl, line {number}, is damaged; "
            "take the line out to go on without it"
          ) from None
        rows += [line] if keeps else []
    if self._write:
      with open(self._path + ".tmp", "w") as f:
        f.writelines(rows)
      os.replace(self._path + ".tmp", self._path)
    for row in map(json.loads, rows):
      self._written |= {(row["step"], key.partition("/")[0]) for key in row}


def duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
