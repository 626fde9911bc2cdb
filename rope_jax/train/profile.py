"""Traces of a few steps, or of a forward pass, and where their time went by part of the model.

A trace is what `jax.profiler` writes, for TensorBoard and Perfetto. What it says of an operation is
its name in the compiled program; the trace has that program too, and in it the scopes of the model
from which the operation comes.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import glob
import os
import re
import time
from collections.abc import Callable, Iterator

import jax

from rope_jax import report
from rope_jax.train import multihost

# What is measured -> the scopes that it has; the first that has one of an operation's, so that what
# is inside (PSC, LoRA) is not counted as what is around it.
PARTS = {
  "optimizer": ("optimizer",),
  "loss": ("loss",),
  "attention": ("attend",),
  "psc": ("psc",),
  "lora": ("lora",),
  "rotation": ("rotate",),
  "norms": ("attention_norm", "mlp_norm", "final_norm", "q_norm", "k_norm"),
  "projections": ("attention",),
  "mlp": ("mlp",),
  "embedding": ("embedding",),
}
_COLLECTIVES = re.compile(
  r"all-(gather|reduce|to-all)|reduce-scatter|collective-|ragged-all|send|recv"
)
# Their events last as long as the operations inside, which have events of their own.
_CONTAINERS = ("while", "conditional", "call")


@dataclasses.dataclass(frozen=True)
class Operation:
  """An operation of a compiled program, over a whole trace.

  Attributes:
    name: in the program.
    scope: where in the model it comes from, as "jit(step)/jvp(Llama)/.../mlp/..."; of a fusion,
      where its result comes from.
    part: of `PARTS`, "communication" or "other".
    direction: "forward", "recomputed" (rematerialisation), "backward", or "" for the optimizer and
      where the compiler does not say.
    calls: executions.
    seconds: of all executions, on all threads and devices of this process.
  """

  name: str
  scope: str
  part: str
  direction: str
  calls: int
  seconds: float


class Steps:
  """The trace of two steps of training; a context, which ends a trace that an error left open.

  Args:
    workdir: gets profile/ and profile.txt; nothing is traced if None.
  """

  def __init__(self, workdir: str | None):
    self._workdir, self._steps, self._trace = workdir, range(0), None

  def __enter__(self) -> Steps:
    return self

  def __exit__(self, *error) -> None:
    if self._trace:
      self._trace.stop()

  def plan(self, first: int, last: int) -> None:
    """Chooses what is traced of steps first + 1 to last: two after the one that compiles."""
    if self._workdir is None:
      return
    steps = range(first + 1, last + 1)
    self._steps = steps[1:3] or steps
    if not steps and multihost.is_main():
      print(f"profile: no step to trace, as the run is finished after step {first}", flush=True)

  def step(self, step: int, before) -> contextlib.AbstractContextManager:
    """The context of a step's call, which starts the trace when `before` is computed."""
    if step not in self._steps:
      return contextlib.nullcontext()
    if self._trace is None:
      jax.block_until_ready(before)  # else the trace would begin with the rest of another step
      self._trace = _Trace(self._workdir)
    return jax.profiler.StepTraceAnnotation("train", step_num=step)

  def ends(self, step: int, interrupted: bool) -> bool:
    """Whether the trace ends after this step: it is the last, or something else comes between."""
    return self._trace is not None and (interrupted or step == self._steps[-1])

  def end(self, step: int) -> None:
    """Writes the trace and the table; the step must be done."""
    steps, trace = range(self._steps[0], step + 1), self._trace
    self._steps, self._trace = range(0), None
    what = f"step {step}" if len(steps) == 1 else f"steps {steps[0]} to {step}"
    trace.write(what, "step", len(steps))


class Longest:
  """The longest batch that evaluations run through the model as a whole, to be traced."""

  def __init__(self):
    self._call, self._shape = None, (0, 0)

  def watch(self, subject):
    """The subject, with its batches remembered."""
    losses, predictions = map(self._watched, (subject.losses, subject.predictions))
    return dataclasses.replace(subject, losses=losses, predictions=predictions)

  def trace(self, workdir: str) -> None:
    """Runs that batch once more, compiled and warm, and writes its trace and table."""
    if self._call is None:
      if multihost.is_main():
        print("profile: nothing to trace, as no evaluation runs whole sequences: perplexity, "
              "needle and posgen do", flush=True)  # fmt: skip
      return
    trace = _Trace(workdir)
    try:
      self._call()
    finally:
      trace.stop()
    rows, length = self._shape
    trace.write(f"a forward pass over {rows} x {length:,} tokens", "pass", 1)

  def _watched(self, function: Callable) -> Callable:
    def call(tokens, seq_len):
      if tokens.shape[1] > self._shape[1]:
        self._call, self._shape = functools.partial(function, tokens, seq_len), tokens.shape
      return function(tokens, seq_len)

    return call


class _Trace:
  """A trace under way."""

  def __init__(self, workdir: str):
    self._workdir, self._directory = workdir, os.path.join(workdir, "profile")
    if not multihost.is_main():  # files are named after the host, which processes may share
      self._directory = os.path.join(self._directory, f"process_{jax.process_index()}")
    self._seconds = None
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every call of Python: a trace many times as large
    options.host_tracer_level = 1  # operations and steps, not what the runtime does between them
    jax.profiler.start_trace(self._directory, profiler_options=options)
    self._began = time.perf_counter()

  def stop(self) -> None:
    if self._seconds is None:
      self._seconds = time.perf_counter() - self._began
      jax.profiler.stop_trace()

  def write(self, what: str, unit: str, number: int) -> None:
    """Ends the trace, of `number` units; the main process shows the table and writes it."""
    self.stop()
    if not multihost.is_main():
      return
    pattern = os.path.join(self._directory, "plugins", "profile", "*", "*.xplane.pb")
    path = max(glob.glob(pattern), key=os.path.getmtime)
    try:
      text = report.profiled(operations(path), what, unit, number, self._seconds)
    except ValueError as error:  # the trace is there, and a table is not worth a run
      print(f"profile: no table: {error}", flush=True)
      return
    with open(os.path.join(self._workdir, "profile.txt"), "w") as f:
      f.write(text + "\n")
    table = text.partition("\n\n")[0]  # the operations one by one are for the file
    print(f"\n{table}\nprofile: {os.path.dirname(path)}\n", flush=True)


def operations(path: str) -> list[Operation]:
  """The operations of a trace, those with the most time first.

  An operation that runs on several threads of a CPU counts as long as on the one that started it.

  Args:
    path: a file .xplane.pb of jax.profiler.

  Raises:
    ValueError: if there are none.
  """
  programs = _Programs(path)
  seconds: collections.Counter = collections.Counter()
  calls: collections.Counter = collections.Counter()
  for program, name, duration in _events(path):
    seconds[program, name] += duration
    calls[program, name] += 1
  found = []
  for (program, name), total in seconds.most_common():
    opcode, scope = programs.instruction(program, name)
    if opcode not in _CONTAINERS:
      kinds = part(scope, opcode), direction(scope)
      found.append(Operation(name, scope, *kinds, calls[program, name], total))
  if not found:
    raise ValueError(f"{path}: no operations in this trace")
  return found


def part(scope: str, opcode: str = "") -> str:
  """The part of the model that an operation belongs to: of `PARTS`, "communication" or "other"."""
  if _COLLECTIVES.match(opcode):
    return "communication"
  scopes = set(re.split(r"[/()]", scope))
  return next((name for name, of in PARTS.items() if scopes & set(of)), "other")


def direction(scope: str) -> str:
  """The pass that an operation belongs to (see `Operation`)."""
  if "rematted_computation" in scope:
    return "recomputed"
  if "transpose(" in scope:
    return "backward"
  return "" if not scope or part(scope) == "optimizer" else "forward"


def _events(path: str) -> Iterator[tuple[str, str, float]]:
  """(program, operation, seconds) of each execution of an operation, on any thread or device."""
  for plane in jax.profiler.ProfileData.from_file(path).planes:
    lines = list(plane.lines)
    # A TPU has lines of its own for steps, programs and scopes: the same time again.
    on_tpu = [line for line in lines if line.name == "XLA Ops"]
    for line in on_tpu or lines:
      for event in line.events:
        stats = dict(event.stats)
        name = stats.get("hlo_op")
        if name is None and on_tpu:  # "%fusion.1 = f32[...] fusion(...)"
          name = event.name.partition(" = ")[0].lstrip("%")
        if name is not None:
          program = f"{stats.get('hlo_module')}({stats.get('program_id')})"
          yield program, name, event.duration_ns / 1e9


class _Programs:
  """The compiled programs of a trace.

  Read from the fields of XSpace, HloProto and what they have inside, by number: the schemas are
  xla/tsl/profiler/protobuf/xplane.proto and xla/service/hlo.proto of OpenXLA.
  """

  def __init__(self, path: str):
    with open(path, "rb") as f:
      space = memoryview(f.read())
    self._protos = {}
    for plane in _all(space, 1):
      if _text(plane, 2) == "/host:metadata":
        for event in (value for entry in _all(plane, 4) for value in _all(entry, 2)):
          for proto in (x for stat in _all(event, 5) for x in _all(stat, 6)):
            self._protos[_text(event, 2)] = proto

  def instruction(self, program: str, name: str) -> tuple[str, str]:
    """(opcode, scope) of an instruction; the scope of what calls it if it has none itself.

    Both are empty for what is in no program, but of the runtime's making.
    """
    # Where the event does not say which program it is of, the largest one: a step or a forward.
    largest = sorted(self._protos, key=lambda p: -len(self._protos[p]))
    for candidate in [program] if program in self._protos else largest:
      if name in (instructions := self._instructions(candidate)):
        return instructions[name]
    return "", ""

  @functools.cache  # noqa: B019 - lives as long as the programs
  def _instructions(self, program: str) -> dict[str, tuple[str, str]]:
    found, inside, caller = {}, {}, {}
    for computation in (c for m in _all(self._protos[program], 1) for c in _all(m, 3)):
      (number,) = _all(computation, 5)
      for x in _all(computation, 2):
        name, scope = _text(x, 1), "".join(_text(metadata, 2) for metadata in _all(x, 7))
        found[name], inside[name] = (_text(x, 2), scope), number
        for called in _all(x, 38):
          packed = [called] if isinstance(called, int) else _varints(called)
          caller.update(dict.fromkeys(packed, name))

    def scope(name):
      own = found[name][1]
      return scope(caller[inside[name]]) if not own and inside[name] in caller else own

    return {name: (opcode, scope(name)) for name, (opcode, _) in found.items()}


def _all(message: memoryview, number: int) -> list:
  """The values of a field of a serialised protocol buffer: int, or bytes of what has a length."""
  return [value for field, value in _fields(message) if field == number]


def _text(message: memoryview, number: int) -> str:
  return "".join(bytes(value).decode() for value in _all(message, number))


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
  at = 0
  while at < len(message):
    tag, at = _varint(message, at)
    if tag & 7 == 0:
      value, at = _varint(message, at)
    else:
      size, at = _varint(message, at) if tag & 7 == 2 else ({1: 8, 5: 4}[tag & 7], at)
      value, at = message[at : at + size], at + size
    yield tag >> 3, value


def _varints(data: memoryview) -> Iterator[int]:
  at = 0
  while at < len(data):
    value, at = _varint(data, at)
    yield value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
  value = shift = 0
  while True:
    byte = data[at]
    value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
    if byte < 128:
      return value, at
