"""Tasks of EleutherAI's lm-evaluation-harness, which is an extra: pip install -e .[lm_eval]

The harness reads the data, makes the prompts and counts; `rope_jax.evals.harness_model` is the
model that it asks. Neither is imported before an entry of this type is used. Whether data are
looked for on the network is for HF_HUB_OFFLINE to say, as for all that reads the Hub.

With several processes all must have the same tasks and data: each makes all the requests, and takes
part in all the batches.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import random
from collections.abc import Iterator

import numpy as np

from rope_jax.errors import check as expect
from rope_jax.evals.common import check_positive
from rope_jax.evals.harness_generation import generation
from rope_jax.evals.prompts import PLACE, check_template

MAIN = ("acc_norm", "acc")  # the metric of a task that has one of these; else it is its first
BOOTSTRAP = 1000  # draws for the standard error of what is no mean: it is then known to 2%


def evaluate(entry, subject) -> dict:
  """Scores of each task or group of entry.tasks; the keys of `config.lm_eval` say what can be set.

  The same requests in batches of the same size give the same results in every run.

  Returns:
    {"arc_easy": {"metric": "acc_norm", "acc_norm", "stderr", "samples", "truncated",
    "all": {"acc_norm", "acc"}}, ...}. A group that lm_eval aggregates is a column with its
    "tasks"; the tasks of another are columns of their own. A metric that was computed after a
    filter is named with it: "exact_match,strict-match". `stderr` is lm_eval's, absent where it has
    none; `truncated` counts requests that lost the start of their context to max_length.

  Raises:
    ValueError: if a task or its data are not there, or it asks for what is not supported.
  """
  from lm_eval.evaluator import evaluate as run

  from rope_jax.evals.harness_model import RopeJaxLM

  loaded = load(entry)
  model = RopeJaxLM(
    subject,
    batch_size=entry.batch_size,
    max_length=entry.max_length,
    template=entry.template,
    seed=entry.seed,
  )
  with _one_process():
    found = run(
      lm=model,
      task_dict=loaded,
      limit=entry.limit or None,
      bootstrap_iters=BOOTSTRAP,
      log_samples=False,
      apply_chat_template=entry.template != PLACE,
      fewshot_as_multiturn=False,
    )
  return _columns(found["results"], loaded, entry.metric, model.truncated)


def validate(name: str, e, c) -> None:
  """Raises ValueError, naming the key, for settings that do not fit, or without the package."""
  expect(importlib.util.find_spec("lm_eval"), f"{name}.type", e.type,
         "its package to be there: pip install 'lm-eval>=0.4.13,<0.5'")  # fmt: skip
  expect(e.tasks and len(set(e.tasks)) == len(e.tasks), f"{name}.tasks", e.tasks,
         "at least one task, each once")  # fmt: skip
  check_positive(name, e, "batch_size")
  for key in ("limit", "seed"):
    expect(e[key] >= 0, f"{name}.{key}", e[key], "0 or more")
  expect(e.num_fewshot >= -1, f"{name}.num_fewshot", e.num_fewshot, "-1 (the task's own) or more")
  expect(e.max_length == 0 or 2 <= e.max_length <= c.rope.context, f"{name}.max_length",
         e.max_length, f"0 (rope.context) or 2 to rope.context={c.rope.context}")  # fmt: skip
  check_template(f"{name}.template", e.template)
  with contextlib.suppress(json.JSONDecodeError):
    if not e.metadata or isinstance(json.loads(e.metadata), dict):
      return
  expect(False, f"{name}.metadata", e.metadata, "'' or an object in JSON")


def check(entry, subject) -> None:
  """Loads the tasks, which reads their data.

  Raises:
    ValueError: naming what is not there or not supported.
  """
  from rope_jax.evals.harness_model import RopeJaxLM

  model = RopeJaxLM(subject, max_length=entry.max_length)
  for name, task in load(entry)["tasks"].items():
    if getattr(task, "MULTIMODAL", False) or getattr(task, "UNSAFE_CODE", False):
      raise ValueError(f"tasks: {name!r} reads images or sound, or runs generated code")
    if entry.metric and entry.metric not in task.aggregation():
      known = ", ".join(map(repr, task.aggregation()))
      raise ValueError(f"metric={entry.metric!r}: expected one of {name!r}: {known}")
    try:
      if task.OUTPUT_TYPE == "loglikelihood_rolling":
        model.prefix_token_id  # noqa: B018 - raises
      if task.OUTPUT_TYPE == "generate_until":
        generation(task.get_config("generation_kwargs") or {}, model.max_length)
    except ValueError as error:
      raise ValueError(f"tasks: {name!r}: {error}") from None


def lengths(entry) -> tuple[int, ...]:
  """None: what goes through the model is padded to what the mesh divides."""
  return ()


def load(entry) -> dict:
  """lm_eval's {"tasks": {name: Task}, "groups": {name: Group}, ...} of an entry.

  Raises:
    ValueError: if a task or its data are not there, or it takes no other number of examples.
  """
  random.seed(entry.seed)  # some tasks draw from these while they are loaded
  np.random.seed(entry.seed)  # noqa: NPY002
  names = list(entry.tasks)
  try:
    try:
      loaded = _manager(entry, False).load(names)
    except KeyError:  # the name of one of lm_eval's own, all of which take seconds to read
      loaded = _manager(entry, True).load(names)
  except (ImportError, KeyError, OSError, ValueError) as error:
    raise ValueError(f"tasks={entry.tasks}: lm_eval says: {error}") from error
  return _prepared(entry, loaded)


def _manager(entry, known: bool):
  """What finds tasks by their names; with `known` those of lm_eval itself, too."""
  from lm_eval.tasks import TaskManager

  metadata = json.loads(entry.metadata) if entry.metadata else {}
  include = entry.include_path or None
  return TaskManager(include_path=include, include_defaults=known, metadata=metadata)


def _prepared(entry, loaded: dict) -> dict:
  """The tasks with the number of examples and the seed of the entry."""
  wanted = entry.num_fewshot
  for name, task in loaded["tasks"].items():
    own = task.get_config("num_fewshot")
    if own == 0 and wanted > 0:
      raise ValueError(
        f"num_fewshot={wanted}: expected -1 or 0, as the task {name!r} says that it takes none"
      )
    task.set_config(key="num_fewshot", value=own or 0 if wanted < 0 else wanted)
    task.set_fewshot_seed(seed=entry.seed)
  return loaded


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
  """No forks for lm_eval's bootstrap: they may hang a process that has threads, as JAX's has."""
  key = "DISABLE_MULTIPROC"
  before = os.environ.get(key)
  os.environ[key] = "1"
  try:
    yield
  finally:
    os.environ.pop(key)
    if before is not None:
      os.environ[key] = before


def _columns(found: dict, loaded: dict, metric: str, truncated) -> dict:
  groups = loaded.get("groups", {})
  inside = {child for group in groups.values() for child in group.child_names}
  out = {}

  def add(item) -> None:
    name = getattr(item, "task_name", None) or item.name
    if name in groups and not item.has_aggregation:
      for child in item:
        add(child)
      return
    out[name] = _column(found[name], metric, truncated[name])
    if name in groups:
      tasks = [task.task_name for task in item.get_all_tasks()]
      out[name]["truncated"] = sum(truncated[task] for task in tasks)
      out[name]["tasks"] = {task: _column(found[task], metric, truncated[task]) for task in tasks}

  for name, item in (groups | loaded["tasks"]).items():
    if name not in inside:
      add(item)
  return out


def _column(scores: dict, metric: str, truncated: int) -> dict:
  """A task or group from lm_eval's {"acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 20}."""
  every, errors = {}, {}
  for key, value in scores.items():
    name, comma, kind = key.partition(",")
    if not comma or not isinstance(value, (int, float, np.number)):
      continue  # of the task itself, or "N/A"
    of = errors if name.endswith("_stderr") else every
    of[(name.removesuffix("_stderr"), kind)] = float(value)
  if not every:
    raise ValueError(f"lm_eval has no number for {scores.get('alias')!r}")
  preferred = (metric,) if metric else MAIN
  main = next((key for name in preferred for key in every if key[0] == name), next(iter(every)))
  label = {key: key[0] if key[1] == "none" else ",".join(key) for key in every}
  out = {"metric": label[main], label[main]: every[main]}
  if math.isfinite(error := errors.get(main, math.nan)):
    out["stderr"] = error
  samples, every = int(scores["sample_len"]), {label[key]: every[key] for key in every}
  return out | dict(samples=samples, truncated=truncated, all=every)
