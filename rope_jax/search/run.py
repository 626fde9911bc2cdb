"""From a config to factors.json: what launch/search.py does for each run."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

import rope_jax
from rope_jax import config as config_lib
from rope_jax import evals
from rope_jax import rope as rope_lib
from rope_jax.model.config import from_config
from rope_jax.model.llama import Llama
from rope_jax.search import METHODS, figures, gradient, settings
from rope_jax.search.candidate import Candidate, Space
from rope_jax.search.fitness import SubjectFitness, TokenFitness, entry_value, rows
from rope_jax.search.journal import Journal
from rope_jax.search.settings import JOURNAL
from rope_jax.train import loop, multihost, preemption, sharding, state
from rope_jax.train import subject as subject_lib
from rope_jax.train.lock import Lock
from rope_jax.train.metrics import duration


def search(c, workdir: str, fitness: Callable | None = None) -> dict:
  """Searches for factors, or continues where a search in this workdir was cut off.

  Args:
    c: a validated config.
    workdir: gets search.jsonl (all that was computed), factors.json and figures.
    fitness: (Subject) -> value, lower is better, in place of config.search.fitness: any function
      of a model under the rope of a candidate.

  Returns:
    What factors.json holds: the factors, and where they come from.

  Raises:
    ValueError: for settings, text, factors or a workdir that do not fit each other.
  """
  return Search(c, workdir, fitness).run()


def summary(result: dict, workdir: str) -> str:
  """What was found, for the screen."""
  fitness = result["provenance"]["fitness"]
  lines = [f"{name:12}{value:12.6f}  its factors" for name, value in fitness["seeds"].items()]
  found = result.get("short_factor", result["long_factor"])
  return "\n".join(
    [
      f"fitness ({fitness['of']}), less is better",
      *lines,
      f"{'searched':12}{fitness['value']:12.6f}",
    ]
    + ["factors: " + " ".join(f"{x:.3g}" for x in found)]
    + ([f"start_tokens: {result['start_tokens']}"] if result["start_tokens"] else [])
    + [os.path.join(workdir, settings.FACTORS)]
  )


def compare(results: dict[str, dict], workdir: str) -> str:
  """Several searches of one fitness: a figure, DIR/fitness.png, and a table for the screen.

  Args:
    results: name -> what `search` returned.
    workdir: of the comparison.

  Returns:
    The best fitness of each after so many evaluations; '' where their fitness is not the same.
  """
  fitness = [r["provenance"]["fitness"] for r in results.values()]
  if len(fitness) < 2 or len({f["of"] for f in fitness}) > 1:
    return ""
  curves = {name: r["provenance"]["history"] for name, r in results.items()}
  seeds = {k: v for f in fitness for k, v in f["seeds"].items()}
  figures.fitness(
    curves,
    seeds,
    os.path.join(workdir, "fitness.png"),
    label=fitness[0]["of"],
    perplexity=fitness[0]["tokens"],
  )
  last = max(curve[-1][0] for curve in curves.values())
  marks = [n for n in (3, 10, 30, 100, 300, 1000, 3000) if n < last]
  rows = [["best fitness after", *(f"{n:,}" for n in marks), "all"]]
  for name, curve in curves.items():
    best = [min([v for n, v in curve if n <= mark], default=float("nan")) for mark in marks]
    values = [*best, curve[-1][1]]
    values = [np.exp(min(v, 700.0)) if fitness[0]["tokens"] else v for v in values]
    rows.append([name, *(f"{v:.4g}" for v in values)])
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  lines = ["  ".join([row[0].ljust(widths[0])] + [x.rjust(w) for x, w in zip(row[1:], widths[1:])])
           for row in rows]  # fmt: skip
  return "\n".join([f"{fitness[0]['of']}, by evaluations", *lines])


class Search:
  """A search of one config; see `search`."""

  def __init__(self, c, workdir: str, fitness: Callable | None = None):
    self.config, self.workdir, self._function = c, workdir, fitness
    self.method = settings.method(c)
    self.entry = settings.fitness_entry(c)
    self.stage = settings.stage(c, workdir)
    self.space = Space(self.stage.rope, self.stage.factor, self.stage.initial, c.seed)
    self.method.check(self.space)
    if fitness and c.search.method == "gradient":
      raise ValueError(
        "config.search.method='gradient': expected another, for a fitness of your own"
      )
    self._known: dict[tuple, float] = {}  # all that was evaluated, in its order
    self._curve: list[list[float]] = []  # [forward passes of the whole fitness, best so far]
    self._cost, self._cost_before = 0.0, 0.0
    self._started = self._next_line = 0.0
    self._best: Candidate | None = None
    self._fitness = None

  def run(self) -> dict:
    """The search, from the journal as far as that goes."""
    c = self.config
    model_config = settings.model_config(c)
    state.check_init(model_config, self.workdir)
    mesh = sharding.make_mesh(c.mesh, c.mesh.fsdp * jax.device_count(), must_divide=False)
    sharding.check(c, mesh, self.entry.lengths)
    with Lock(self.workdir, "train") as lock, jax.set_mesh(mesh):
      text = loop.load_tokenizer(model_config, self.workdir)
      try:
        data = None if self._function else rows(self.entry, evals.Subject(c, text, None))
      except ValueError as error:
        raise ValueError(f"config.search.fitness: {error}") from error
      lock.take()
      multihost.wait("search")
      self._journal = Journal(
        os.path.join(self.workdir, JOURNAL), self._settings(text, data), multihost.is_main()
      )
      self._make = lambda: self._fitness_of(model_config, mesh, text, data)
      self._samples = len(data.tokens) if data else 1
      found = self._searched()
      result = self._result(found)
      if multihost.is_main():
        config_lib.write_json(os.path.join(self.workdir, settings.FACTORS), result)
        self._draw(found)
    multihost.wait("searched")
    return result

  # ---- What the methods call.

  def evaluate(self, candidates: list[Candidate], title: str) -> list[float]:
    """Fitness of candidates; what is known is not evaluated again."""
    new: dict[tuple, Candidate] = {}
    for x in candidates:
      if x.key not in self._known:
        new.setdefault(x.key, x)
    waiting = list(new.values())
    while waiting:
      self._check_notice()
      size = self._group_size()
      group, waiting = waiting[:size], waiting[size:]
      self._bar.set_description(title)
      question = [dict(factors=list(x.factors), start_tokens=x.start_tokens) for x in group]
      values = self._journal.ask(dict(fitness=question), lambda g=group: self._ready()(g))
      for x, value in zip(group, values):
        self._count(x, value)
    self._say(title)
    return [self._known[x.key] for x in candidates]

  def gradient(self, at: Candidate, samples: int, step: int) -> list[float]:
    """The gradient at a candidate, see `TokenFitness.gradient`."""
    self._check_notice()
    used = min(samples, self._samples) or self._samples
    self._cost += gradient.COST * used / self._samples
    question = dict(gradient=list(at.factors), samples=samples, step=step)
    answer = self._journal.ask(
      question, lambda: self._ready().gradient(self.space.rope, at, samples, step)
    )
    if not np.all(np.isfinite(answer)):
      raise FloatingPointError(f"step {step} of the search: the gradient is {answer}")
    self._bar.update(gradient.COST * used / self._samples)
    return answer

  # ---- What happens around them.

  def _check_notice(self) -> None:
    """Between two questions to the journal, where nothing is lost."""
    preemption.check()

  def _searched(self) -> Candidate:
    total = self.method.budget(self.space)
    if self.method.name == "gradient":
      used = min(self.method.samples, self._samples) or self._samples
      total += self.method.steps * gradient.COST * used / self._samples
    replayed = self._journal.replays
    if multihost.is_main():
      c = self.config
      print(
        f"search: {c.search.method} of the {c.search.factors} factors, "
        f"{self.space.rope.original_context:,} to {self.stage.length:,} tokens (factor "
        f"{self.space.factor:g}), fitness {self._fitness_name()} of {self._samples} samples, "
        f"{total:.0f} evaluations"
        + (f"\n{self._journal.path}: what it holds is not computed again" if replayed else ""),
        flush=True,
      )
    with tqdm(total=round(total, 1), disable=None, leave=False,
              bar_format="{desc}: {l_bar}{bar}| {n:.0f}/{total:.0f} "
              "[{elapsed}<{remaining}]{postfix}") as self._bar:  # fmt: skip
      return self.method.search(self.space, self.evaluate, self.gradient)

  def _ready(self):
    if self._fitness is None:
      self._fitness = self._make()
      self._started, self._cost_before = time.monotonic(), self._cost  # of what is not replayed
    return self._fitness

  def _group_size(self) -> int:
    """Candidates at a time: as the journal has it, for a batch is computed as a whole."""
    if self._journal.replays:
      known = self._journal.peek()["question"].get("fitness", [None])
      return len(known)
    return self._ready().candidates

  def _count(self, x: Candidate, value: float) -> None:
    self._known[x.key] = value
    self._cost += 1
    if self._best is None or value < self._known[self._best.key]:
      self._best = x
    self._curve.append([round(self._cost, 6), self._known[self._best.key]])
    self._bar.set_postfix_str(f"best {self._shown(self._known[self._best.key])}", refresh=False)
    self._bar.update(1)

  def _say(self, title: str) -> None:
    """A line now and then: not of what is read from the journal, nor several a second."""
    now = time.monotonic()
    if self._journal.replays or not multihost.is_main() or now < self._next_line:
      return
    self._next_line = now + 5
    best = self._known[self._best.key]
    line = f"{title}  best {self._shown(best)}  {self._cost:.0f} evaluations"
    done, left = self._cost - self._cost_before, self._bar.total - self._cost
    if done > 0 and left > 0:
      line += f"  ETA {duration((now - self._started) / done * left)}"
    tqdm.write(line)

  def _shown(self, value: float) -> str:
    tokens = self._of_tokens()
    return f"{np.exp(min(value, 700.0)):.4f} ppl" if tokens else f"{value:.6g}"

  def _of_tokens(self) -> bool:
    """Whether it is a mean loss, whose exponential is a perplexity."""
    return self._function is None and hasattr(evals.module(self.entry.type), "rows")

  def _fitness_name(self) -> str:
    if self._function:
      return getattr(self._function, "__name__", type(self._function).__name__)
    return f"{self.entry.type} at {self.entry.lengths[0]:,} tokens"

  def _fitness_of(self, model_config, mesh, text, data):
    c = self.config
    variables = state.initial_variables(model_config, mesh, self.workdir)
    model = Llama(from_config(c))
    if data is not None:
      return TokenFitness(
        model,
        variables,
        mesh,
        data,
        self.stage.rope_of,
        candidates=c.search.batch_size,
        samples=self.entry.batch_size,
        chunk=c.train.loss_chunk,
      )

    def subject_of(rope_of):
      return subject_lib.make(c, mesh, model, text, rope_of)(variables)

    function = self._function or (lambda subject: entry_value(self.entry, subject))
    return SubjectFitness(function, subject_of, self.stage.rope_of)

  def _settings(self, text, data) -> dict:
    """All that the result depends on: settings by their key, and facts."""
    c, source = self.config, settings.model_config(self.config)
    # What says how it is computed, not what, may change; so may options of other methods.
    own = {k: v for k, v in c.search.items() if k not in (*METHODS, "fitness", "batch_size")}
    found = {f"config.search.{k}": v for k, v in own.items()}
    found |= {f"config.search.{c.search.method}.{k}": v for k, v in
              c.search[c.search.method].items()}  # fmt: skip
    how = ("batch_size", "buckets")
    found |= {f"config.search.fitness.{k}": v for k, v in self.entry.items() if k not in how}
    found |= {f"config.rope.{k}": v for k, v in c.rope.items() if not isinstance(v, ConfigDict)}
    found |= {f"config.rope.longrope.{k}": v for k, v in c.rope.longrope.items()}
    found |= {f"config.model.{k}": c.model[k] for k in _MODEL}
    found |= {f"config.{k}": c[k] for k in ("seed", "init_from")}
    given = [self.stage.before, self.stage.long, *self.stage.initial]
    found |= dict(
      init_step=settings.newest_step(state.init_path(source, self.workdir)),
      tokenizer=text.fingerprint,
      factors_given=settings.digest(given),
    )
    if self._function:
      found["function"] = self._fitness_name()
    elif data is None:
      found["config.generate.on_change"] = c.generate.on_change
    else:
      found["text"] = settings.digest([data.tokens.tolist(), data.first.tolist()])
    return found

  def _result(self, found: Candidate) -> dict:
    lists = self.stage.lists(found)
    c = self.config
    named = {x.name: self._known[x.key] for x in self._named()}
    with open(self._journal.path) as f:
      own = json.loads(f.readline())
    return dict(
      lists,
      made_for=settings.made_for(c),
      provenance=dict(
        fitness=dict(
          of=self._fitness_name(),
          value=self._known[found.key],
          tokens=self._of_tokens(),
          seeds=named,
        ),
        searched=list(found.factors),
        rope_jax=rope_jax.__version__,
        evaluations=len(self._known),
        cost=round(self._cost, 6),
        history=self._curve,
        settings=own,
      ),
    )

  def _named(self) -> list[Candidate]:
    """PI, NTK and YaRN, as far as they were evaluated: they need not have been."""
    out = [self.space.of_method(name) for name in ("pi", "ntk", "yarn")]
    return [x for x in out if x.key in self._known]

  def _draw(self, found: Candidate) -> None:
    seeds = {name: self.space.of_method(name).factors for name in ("pi", "ntk", "yarn")}
    figures.factors(
      {**seeds, self.config.search.method: found.factors},
      os.path.join(self.workdir, "factors.png"),
      critical=rope_lib.critical_pair(self.space.rope),
    )
    figures.fitness(
      {self.config.search.method: self._curve},
      {x.name: self._known[x.key] for x in self._named()},
      os.path.join(self.workdir, "fitness.png"),
      label=self._fitness_name(),
      perplexity=self._of_tokens(),
    )


# Of config.model, what the weights have a meaning under.
_MODEL = ("num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "norm_eps", "dtype")
