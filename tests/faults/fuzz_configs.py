"""Mutated configs: each is refused by a message that names its key, or builds; none compiles first.

A case is decided by (seed, number). What fails says them, and is seen again by

  PYTHONPATH=tests:tests/faults python -m fuzz_configs SEED NUMBER
"""

import contextlib
import resource
import signal
import sys

import conftest  # noqa: F401 - eight devices
import fuzz_flags
import jax
import numpy as np
from ml_collections import ConfigDict
from mutations import leaves, mutate
from starts import starting_points

from rope_jax import config, evals, resolve, rope, validate

SECONDS = 120  # for a check, above which it hangs
MEMORY = 2 << 30  # bytes that a check may ask for
INIT_EVERY, STEP_EVERY = 8, 50  # cases of which the model and its training step are traced
MOST_PARAMETERS, MOST_TOKENS = 10**7, 10**6  # of what is traced
COMPILED = "/jax/core/compile/backend_compile_duration"


def run(seed: int, count: int) -> dict:
  """Checks the cases 0 .. count - 1 of a seed, and command lines, at least twenty.

  Raises:
    AssertionError: at the end, if any neither built nor was refused by its key; each is printed.
  """
  figures, failed = dict(configs=0, built=0, refused=0, models=0, steps=0), []
  with compiles() as compiled:
    for number in range(count):
      before = len(compiled)
      try:
        for key in check(seed, number):
          figures[key] += 1
        assert len(compiled) == before, describe(seed, number) + " compiled something"
      except AssertionError as error:
        failed.append(str(error))
        print(error, file=sys.stderr, flush=True)
  assert not failed, f"{len(failed)} of {count}, the first: {failed[0]}"
  return figures | dict(compiles=len(compiled)) | fuzz_flags.run(seed, max(count // 50, 20))


@contextlib.contextmanager
def compiles():
  """A list that grows with each compile."""
  found = []

  def listen(event, seconds, **_):
    if event == COMPILED:
      found.append(seconds)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield found
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def case(seed: int, number: int) -> tuple[str, ConfigDict, str, bool, dict]:
  """(name of the start, mutated config, platform, whether inputs are checked, what was mutated)."""
  rng = np.random.default_rng([seed, number])
  points = starting_points()
  start = points[rng.integers(len(points))]
  c, inputs = start.make(), bool(start.inputs and rng.random() < 0.5)
  return start.name, c, start.platform, inputs, mutate(rng, c)


def describe(seed: int, number: int) -> str:
  """A case in one line."""
  name, _, platform, inputs, changes = case(seed, number)
  return f"case {seed} {number}: {name} on {platform}, inputs={inputs}, with {changes!r}:"


def check(seed: int, number: int) -> list[str]:
  """What became of a case, as the figures count it."""
  _, c, platform, inputs, changes = case(seed, number)
  try:
    with limits():
      return ["configs", *outcome(number, c, platform, inputs, changes)]
  except Exception as error:
    raise AssertionError(f"{describe(seed, number)} {type(error).__name__}: {error}") from error


def outcome(number: int, c, platform: str, inputs: bool, changes: dict) -> list[str]:
  """Validates and builds; any error that is no ValueError that names a key is passed on."""
  try:
    config.runs(c)  # as the command line does: completes the evaluations
    validate.validate(c, platform, inputs=inputs)
  except ValueError as error:
    names_key(str(error), c, changes)
    return ["refused"]
  assert_sound(c)
  found = ["built"]
  try:
    build(c)
    if number % INIT_EVERY == 0 and is_small(c):
      trace_model(c)
      found.append("models")
    if number % STEP_EVERY == 0 and is_small(c) and c.train.steps:
      trace_step(c)
      found.append("steps")
  except ValueError as error:  # what only the devices or the files tell
    names_key(str(error), c, None)
    return ["refused"]
  return found


def assert_sound(c) -> None:
  """No number that passes is infinite, none, or beyond 32 bits, alone or in a tuple."""
  for key, block in leaves(c):
    value = block[key.rpartition(".")[2]]
    for x in np.ravel(np.array(value, object)) if isinstance(value, tuple) else [value]:
      if isinstance(x, int | float):
        assert np.isfinite(x) and abs(x) < 2**128, f"config.{key}={value!r} passes"
        assert isinstance(x, float) or abs(x) < 2**31, f"config.{key}={value!r} passes"


def build(c) -> None:
  """All that is made of a config before there are arrays, on eight devices."""
  from rope_jax.model.config import from_config
  from rope_jax.search import settings
  from rope_jax.train import optimizer, sharding

  whole = settings.placeholder(c)
  lengths = sorted({config.train_length(c), *evals.lengths(c)})
  for made in (resolve.rope(whole), resolve.training_rope(whole), resolve.rope(whole, lengths[-1])):
    for x in (made.inv_freq, made.attention_scale):
      assert np.isfinite(np.asarray(x, np.float32)).all(), f"config.rope makes {x}"
  hash(from_config(c))
  optimizer.optimizer(c.train)
  rate = optimizer.schedule(c.train)
  assert callable(rate)
  mesh = sharding.make_mesh(c.mesh, c.train.batch_size // c.train.accumulation)
  sharding.check(c, mesh, lengths)


def trace_model(c) -> None:
  """The shapes of the model's variables, and where they go."""
  from rope_jax.search import settings
  from rope_jax.train import sharding, state

  mesh = sharding.make_mesh(c.mesh, c.train.batch_size // c.train.accumulation)
  state.abstract_variables(settings.placeholder(c), mesh)


def trace_step(c) -> None:
  """The training step, from shapes alone."""
  from rope_jax.search import settings
  from rope_jax.train import ahead, sharding

  mesh = sharding.make_mesh(c.mesh, c.train.batch_size // c.train.accumulation)
  ahead.lower(settings.placeholder(c), mesh)


def is_small(c) -> bool:
  """Whether a model and its batches are small enough to be traced in seconds."""
  m = c.model
  layer = m.d_model * m.head_dim * 2 * (m.num_heads + m.num_kv_heads) + 3 * m.d_model * m.d_ff
  size = m.vocab_size * m.d_model + m.num_layers * layer
  tokens = c.train.batch_size * config.train_length(c)
  return size < MOST_PARAMETERS and tokens < MOST_TOKENS


def names_key(message: str, c, changes: dict | None) -> None:
  """Fails unless a message is one line that names a key; of a single change, that key."""
  known = dict(leaves(c))
  if changes is not None and len(changes) == 1:
    known = changes
  last = {key.rpartition(".")[2] for key in known}
  # A method is named by its own name, where that is what was changed.
  last |= {x for x in known.values() if isinstance(x, str) and x in rope.SCALINGS}
  words = set("".join(x if x.isalnum() or x == "_" else " " for x in message).split())
  assert "config." in message, f"no key in {message!r}"
  assert last & words, f"none of {sorted(last)[:9]} in {message!r}"
  assert len(message.splitlines()) == 1, f"not one line: {message!r}"


@contextlib.contextmanager
def limits():
  """An error for what takes too long or asks for too much memory; for a process of its own.

  Not for a worker of pytest: limits are of the whole process, and Python drops what a signal
  raises while a destructor runs, so that the signal comes again and again until it is heard.
  """

  def hangs(*_):
    raise TimeoutError(f"more than {SECONDS} seconds")

  soft, hard = resource.getrlimit(resource.RLIMIT_AS)
  with open("/proc/self/statm") as f:
    now = int(f.read().split()[0]) * resource.getpagesize()
  before = signal.signal(signal.SIGALRM, hangs)
  resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, hard))
  signal.setitimer(signal.ITIMER_REAL, SECONDS, 1)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
  asked = [int(x) for x in sys.argv[1:3]]
  print(describe(*asked))
  print(check(*asked))
