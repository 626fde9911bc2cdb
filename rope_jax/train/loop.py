"""Training, from config to results, in the order in which it happens."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

import jax
import numpy as np

from rope_jax import config as config_lib
from rope_jax import evals, report, resolve
from rope_jax import results as results_lib
from rope_jax.data import batches as batches_lib
from rope_jax.data import corpus, posgen, tokenizer, tokens
from rope_jax.data.arrange import Arrange
from rope_jax.errors import DiskError, Preempted
from rope_jax.model.config import from_config
from rope_jax.model.llama import Llama
from rope_jax.train import answers as answers_lib
from rope_jax.train import dump, flops, multihost, preemption, sharding, state
from rope_jax.train import profile as profile_lib
from rope_jax.train import step as step_lib
from rope_jax.train import subject as subject_lib
from rope_jax.train.checkpoint import Checkpoints
from rope_jax.train.guard import guarded
from rope_jax.train.lock import Lock
from rope_jax.train.metrics import Metrics
from rope_jax.train.optimizer import optimizer, schedule


def train(c, workdir: str, profile: bool = False, keep: bool = False) -> dict:
  """Trains, evaluates and saves a run; continues it if the workdir holds a part of it.

  Args:
    c: a validated config.
    workdir: gets run.json, rope.json, metrics.jsonl, TensorBoard events, checkpoints/ and
      results.json.
    profile: whether two steps are traced, to profile/ and profile.txt; of a run of no steps, what
      `evaluate` traces.
    keep: whether what the model has answered to the last evaluations is kept until `forget`.

  Returns:
    The results of the evaluations, as in results.json.

  Raises:
    ValueError: for settings that do not fit each other, the data, the devices or the workdir; for a
      workdir where another run is at work, or of which no checkpoint is whole.
    FloatingPointError: if more than config.train.max_skipped steps in a row are not finite.
    DiskError: if a checkpoint cannot be written.
    Preempted: if the notice has come; what was done is saved.
  """
  # ---- The run: new, or the one that this directory holds.
  config_lib.check_workdir(c, workdir)
  state.check_init(c, workdir)
  if c.train.steps == 0:
    results = evaluate(c, workdir, profile, keep)
    if multihost.is_main():
      config_lib.write(c, workdir)
    multihost.wait("evaluated")  # a later run of a comparison may start from this one
    return results
  mesh = sharding.make_mesh(c.mesh, c.train.batch_size // c.train.accumulation)
  sharding.check(c, mesh, [config_lib.train_length(c), *evals.lengths(c)])
  with (
    Lock(workdir, "train") as lock,
    jax.set_mesh(mesh),
    profile_lib.Steps(workdir if profile else None) as trace,
  ):
    return _train(c, workdir, mesh, lock, trace, keep)


def _train(c, workdir: str, mesh, lock: Lock, trace: profile_lib.Steps, keep: bool) -> dict:
  # ---- Data. A batch is a function of the step: nothing else to save or restore.
  text = load_tokenizer(c, workdir)
  store, fingerprint = training_documents(c, text)
  evals.check(c, text)
  facts = dict(text=fingerprint, tokenizer=text.fingerprint)
  facts |= dict(factors=resolve.fingerprint(c))
  config_lib.check_workdir(c, workdir, **facts)
  length = config_lib.train_length(c)
  arrange = Arrange(
    c.data.positions,
    seed=c.seed,
    length=length,
    context=c.rope.context,
    original_context=c.rope.original_context,
    max_factor=c.rope.clex.max_factor,
  )
  batches = batches_lib.Batches(
    store,
    length=length,
    batch_size=c.train.batch_size,
    packing=c.data.packing,
    seed=c.seed,
    min_tokens=c.data.min_tokens,
    arrange=arrange,
  )
  shape, split = (c.train.batch_size, length), sharding.batch_sharding(mesh)

  def batch_of(step):
    return sharding.put_batch(lambda rows: batches(step, rows), shape, split)

  # ---- Model and optimizer. The rope is data, passed to every step; another one never recompiles.
  model, tx = Llama(from_config(c)), guarded(optimizer(c.train), c.train.max_skipped)
  rope = resolve.training_rope(c)
  trainable, frozen = state.split(c, state.initial_variables(c, mesh, workdir))
  placement = sharding.shardings(mesh, jax.eval_shape(tx.init, trainable))
  opt_state = jax.jit(tx.init, out_shardings=placement)(trainable)

  # ---- All that could be wrong has been found: the directory is ours.
  lock.take()
  if multihost.is_main():
    sizes = dict(parameters=count(frozen) + count(trainable), trained_parameters=count(trainable))
    config_lib.write(c, workdir, **facts, **sizes)
    config_lib.write_json(os.path.join(workdir, "rope.json"), resolve.describe(c, r=rope))

  # ---- Resume: the newest whole checkpoint of this run, if there is one.
  checkpoints = Checkpoints(workdir, keep=c.checkpoint.keep)
  items = dict(trainable=trainable, opt_state=opt_state)
  first, restored, damage = checkpoints.resume(c.checkpoint.on_damage, **state.abstract_of(items))
  if first:
    trainable, opt_state = restored["trainable"], restored["opt_state"]
  del items, restored

  # ---- What is about to happen.
  adapters = count({k: v for k, v in trainable.items() if k != "params"})
  metrics = Metrics(
    workdir,
    first,
    c.train.steps,
    flops.train_flops_per_token(
      model.config, length, adapters, base_is_trained="params" in trainable
    ),
    flops.peak_flops() and flops.peak_flops() * mesh.size,
  )
  metrics.say(
    f"{damage}{report.rope_line(c)}\n"
    f"model: {count(frozen) + count(trainable):,} parameters, {count(trainable):,} trained "
    f"({', '.join(trainable)}), {count(frozen):,} frozen\n"
    f"mesh: {', '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}; "
    f"{mesh.size} x {mesh.devices.flat[0].device_kind}\n"
    f"data: {c.data.source}, {batches.total:,} tokens; "
    f"{c.train.batch_size} x {length:,} tokens a step\n"
    f"workdir: {workdir}" + (f", continued after step {first}" if first else "")
  )
  trace.plan(first, c.train.steps)

  # ---- The loop. Metrics of a step are read when the next is under way: the device never waits.
  step_fn = step_lib.train_step(
    model,
    tx,
    accumulation=c.train.accumulation,
    chunk=c.train.loss_chunk,
    placement=jax.tree.map(lambda x: x.sharding, (trainable, opt_state)),
  )
  subject_of = subject_lib.make(c, mesh, model, text)
  learning_rate = schedule(c.train)
  learning_rate(first)  # compiles its operations here, not beside a step
  pending = None

  def finish(pending):
    step, values = pending
    values = {k: float(v) for k, v in jax.device_get(values).items()}
    metrics.count(step, values.pop("tokens"))
    in_a_row, ratio = values.pop("in_a_row"), values.pop("grad_ratio")
    if in_a_row > c.train.max_skipped:
      raise FloatingPointError(stopped(step, values))
    odd = in_a_row > 0
    if odd:
      metrics.say(f"step {step}: {_shown(values)}: left out, as it is not finite")
    elif ratio > c.train.spike > 0:
      odd, values["grad_spike"] = True, ratio
      metrics.say(f"step {step}: {_shown(values)}: {ratio:.1f} times the mean of those before")
    if odd or step % c.train.log_every == 0 or step in (1, c.train.steps):
      values["learning_rate"] = float(learning_rate(step - 1 - int(values["skipped"])))
      metrics.log_training(step, values)

  def stopped(step, values):
    # Since that step nothing has changed: see `guarded`.
    time, items = arrange.time(step - 1), dict(trainable=trainable, opt_state=opt_state)
    try:
      place = dump.write(workdir, step, batches(step - 1), time, values, **items)
      then = f"look into it with launch/replay.py {place}"
    except (DiskError, OSError) as error:  # it does not hide what has happened
      then = f"the step could not be kept: {error}"
    return (
      f"step {step}: {_shown(values)}, not finite, and more than "
      f"config.train.max_skipped={c.train.max_skipped} in a row; {then}; the newest checkpoint is "
      f"from step {checkpoints.latest() or 0}"
    )

  def save(step):
    checkpoints.save(step, trainable=trainable, opt_state=opt_state)

  def evaluate_due(step):
    due = [name for name in _due(c, step) if not metrics.has(step, name)]
    if not due:
      return
    variables = {**frozen, **trainable}
    with answers_lib.kept(c, workdir, "train", variables) as answers:
      for name in due:
        metrics.write(step, _flat(name, evals.run(name, subject_of(variables, answers))))

  multihost.wait("metrics")  # all have read the rows that there were
  with contextlib.ExitStack() as until_saved:
    evaluate_due(first)  # if it was killed between the checkpoint and the evaluation
    for step, batch in enumerate(batches_lib.prefetch(batch_of, first, c.train.steps), first + 1):
      if c.data.positions == "clex":  # positions and frequencies of a step share their t
        rope = resolve.training_rope(c, arrange.time(step - 1))
      if step == first + 1:  # compiled here, and not again where it is called
        program = step_fn.lower(trainable, opt_state, frozen, batch, rope).compile()
        if planned := step_lib.planned_bytes(program):
          metrics.say(report.memory_line(planned, mesh.local_devices[0]))
      with trace.step(step, trainable):
        trainable, opt_state, values = step_fn(trainable, opt_state, frozen, batch, rope)
      if step == first + 1:  # it is compiled: from now on there is something to lose
        until_saved.enter_context(preemption.deferred())
      if pending:
        finish(pending)
      pending = step, values
      due = _due(c, step)
      saves = step % c.checkpoint.every == 0 or step == c.train.steps
      if trace.ends(step, interrupted=bool(due or saves)):
        jax.block_until_ready(trainable)
        with metrics.paused():
          trace.end(step)
      if due or saves:
        finish(pending)  # nothing that is not finite is ever saved
        pending = None
      if saves:
        save(step)
      checkpoints.poll()
      try:
        preemption.check()
        if due:
          with metrics.paused():
            evaluate_due(step)
      except Preempted as notice:
        if pending:
          finish(pending)
        save(step)
        checkpoints.close()
        metrics.close()
        raise Preempted(f"saved after step {step} in {workdir}; {notice}") from None
    checkpoints.close()

  # ---- The evaluations of the end.
  results = _evaluate(c, workdir, "train", {**frozen, **trainable}, subject_of, keep=keep)
  for name, result in results.items():
    if not metrics.has(c.train.steps, name):  # a finished run may be started again
      metrics.write(c.train.steps, _flat(name, result))
  metrics.close()
  return results


def evaluate(c, workdir: str, profile: bool = False, keep: bool = False) -> dict:
  """The evaluations of a config on the newest checkpoint of a workdir.

  If the workdir holds no run, the model of config.init_from is evaluated as it is. Of a trained
  run, rope.context and rope.factor may differ, to look beyond the context that it was trained for.
  One that was cut off goes on where it was. With `profile`, the forward pass of the longest batch
  runs once more, to profile/ and profile.txt. With `keep`, what the model has answered is kept
  until `forget`.
  """
  rows = max([e.batch_size for e in c.evals.values()], default=1)
  with (
    Lock(workdir, "evaluate") as lock,
    _opened(c, workdir, rows, evals.lengths(c)) as (variables, subject_of, text),
  ):
    evals.check(c, text)
    lock.take()
    if multihost.is_main() and not config_lib.holds_run(workdir):
      # That of a run stays: it says what was trained, not what is evaluated.
      config_lib.write_json(os.path.join(workdir, "rope.json"), resolve.describe(c))
    if not profile:
      return _evaluate(c, workdir, "evaluate", variables, subject_of, keep=keep)
    longest = profile_lib.Longest()

    def watched(variables, _):  # what is there already would leave nothing to trace
      return longest.watch(subject_of(variables))

    results = _evaluate(c, workdir, "evaluate", variables, watched, keep=keep)
    longest.trace(workdir)
    return results


def forget(c, workdir: str, trained: bool) -> None:
  """Deletes what `train` (`trained`) or `evaluate` keeps of answers: what they were for is done."""
  answers_lib.forget(workdir, "train" if trained and c.train.steps else "evaluate")


def generate(c, workdir: str, prompts: list[str], max_new_tokens: int, **options) -> list[str]:
  """Continuations of some texts, by the model that `evaluate` would evaluate.

  Args:
    c: a validated config.
    workdir: of a run, or where there is none.
    prompts: texts, one batch.
    max_new_tokens: of each.
    **options: temperature, top_p and seed of `rope_jax.model.generate.Generator`.

  Raises:
    ValueError: if a prompt and what follows it is longer than config.rope.context.
  """
  with _opened(c, workdir, len(prompts)) as (variables, subject_of, _):
    subject = subject_of(variables)
    try:
      ids = [subject.prompt(text) for text in prompts]
    except ValueError as error:
      raise ValueError(f"config.tokenizer={c.tokenizer!r}, of a prompt: {error}") from error
    found = subject.generate(ids, max_new_tokens, batch_size=len(ids), what="prefill", **options)
    return [subject.tokenizer.decode(new) for new in found]


@contextlib.contextmanager
def _opened(c, workdir: str, rows: int, lengths: Sequence[int] = ()):
  """(variables, what makes a subject of them, tokenizer) of `opened`, under its mesh."""
  with opened(c, workdir, rows, lengths) as (variables, mesh):
    text = load_tokenizer(c, workdir)
    yield variables, subject_lib.make(c, mesh, Llama(from_config(c)), text), text


@contextlib.contextmanager
def opened(c, workdir: str, rows: int, lengths: Sequence[int] = (), step: int | None = None):
  """A run's variables at its newest checkpoint, or else those of config.init_from, under a mesh.

  Args:
    c: a validated config.
    workdir: of a run, or where there is none.
    rows: sequences of a batch.
    lengths: of the sequences, tokens.
    step: of the checkpoint, instead of the newest.

  Returns:
    A context manager of (variables by collection, mesh).

  Raises:
    ValueError: if the workdir holds another run, or what divides what does not.
  """
  has_run = c.train.steps and config_lib.holds_run(workdir)
  config_lib.check_workdir(
    c, workdir, free=("rope.context", "rope.factor"), factors=resolve.fingerprint(c)
  )
  mesh = sharding.make_mesh(c.mesh, rows, must_divide=False)
  sharding.check(c, mesh, lengths)
  with jax.set_mesh(mesh):
    if has_run:
      variables = state.run_variables(workdir, mesh, step)
      which = "newest checkpoint" if step is None else f"checkpoint after step {step}"
      what = f"{which} of {workdir}"
    else:
      variables = state.initial_variables(c, mesh, workdir)
      what = f"{c.init_from or 'a randomly initialised model'}, without training"
    if multihost.is_main():
      print(f"{report.rope_line(c)}\nmodel: {what}", flush=True)
    yield variables, mesh


def training_documents(c, text) -> tuple:
  """Tokenised documents for `Batches`, and a fingerprint of what they were made from."""
  if c.data.source == "posgen":
    store = posgen.Sequences(c.data.posgen, config_lib.train_length(c))
    return store, store.fingerprint
  directory = config_lib.data_dir(c)
  documents = corpus.documents(c.data.source, "train", directory, c.data.text_key)
  store = tokens.tokenize(documents, text, directory, append_eos=c.data.append_eos)
  return store, documents.fingerprint


def load_tokenizer(c, workdir: str):
  """The tokenizer of a config, checked against the model's vocabulary."""
  try:
    text = tokenizer.load(c.tokenizer, state.init_path(c, workdir), c.data.posgen.modulus)
  except ValueError as error:
    raise ValueError(f"config.tokenizer={c.tokenizer!r}: {error}") from error
  if text.vocab_size > c.model.vocab_size:
    raise ValueError(
      f"config.model.vocab_size={c.model.vocab_size}: the tokenizer has {text.vocab_size} tokens"
    )
  return text


def count(tree) -> int:
  """Parameters in a tree."""
  return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def _due(c, step: int) -> list[str]:
  """Evaluations due in the middle of training, after this many steps."""
  middle = 0 < step < c.train.steps
  return [
    name for name, e in c.evals.items() if middle and e.every_steps and step % e.every_steps == 0
  ]


def _evaluate(c, workdir, which, variables, subject_of, *, keep: bool) -> dict:
  """Runs all evaluations; each is written, and on the screen, as soon as it is done."""
  results: dict = {}
  if not c.evals:
    return results
  with answers_lib.kept(c, workdir, which, variables, together=True, keep=keep) as answers:
    subject = subject_of(variables, answers)
    for name in c.evals:
      results[name] = evals.run(name, subject)
      if multihost.is_main():
        # Under which rope they are: of a trained run another one may be evaluated.
        config_lib.write_json(os.path.join(workdir, results_lib.ROPE_FILE), resolve.describe(c))
        config_lib.write_json(os.path.join(workdir, results_lib.RESULTS_FILE), results)
        print(report.brief(name, results[name]), flush=True)
  return results


def _shown(values: dict) -> str:
  return f"loss {values['loss']:.4g}, gradient norm {values['grad_norm']:.3g}"


def _flat(name: str, result: dict) -> dict:
  """{'8192': {'ppl': 12.3, ...}} -> {'perplexity/8192/ppl': 12.3}, scalars only."""
  out = {}
  for key, value in result.items():
    if isinstance(value, dict):
      out |= _flat(f"{name}/{key}", value)
    elif isinstance(value, (int, float)):
      out[f"{name}/{key}"] = value
  return out
