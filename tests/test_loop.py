"""Whole runs: training, resuming, evaluating, workdirs."""

import json
import math
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rope_jax import config, resolve
from rope_jax.data.tokenizer import ByteTokenizer
from rope_jax.train import loop, sharding, state
from rope_jax.train import step as step_lib


def final_state(workdir, c):
  mesh = sharding.make_mesh(c.mesh, c.train.batch_size)
  return jax.tree.map(np.asarray, state.run_variables(str(workdir), mesh))


def rows_of(workdir):
  with open(os.path.join(workdir, "metrics.jsonl")) as f:
    rows = [json.loads(line) for line in f]
  for row in rows:  # times differ, nothing else may
    row.pop("tokens_per_second", None)
  return rows


def adapted_config(folder):
  c = tiny.run_config(folder)
  c.lora.rank = 4
  c.rope.phase = "psc"
  c.rope.scaling = "yarn"
  c.rope.original_context = 16
  c.train.trainable = "adapters"
  return c


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tiny.text_folder(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize("make", [tiny.run_config, adapted_config])
def test_resume_is_bitwise(tmp_path, folder, make, monkeypatch):
  c = make(folder)
  whole = loop.train(c, str(tmp_path / "whole"))

  class Killed(BaseException):
    pass

  calls = []
  real = step_lib.train_step

  def dying(*args, **kwargs):
    step = real(*args, **kwargs)

    def call(*inputs):
      calls.append(1)
      if len(calls) == 6:
        raise Killed
      return step(*inputs)

    call.lower = step.lower
    return call

  with monkeypatch.context() as patch:
    patch.setattr(step_lib, "train_step", dying)
    with pytest.raises(Killed):
      loop.train(c, str(tmp_path / "cut"))
  resumed = loop.train(c, str(tmp_path / "cut"))
  jax.tree.map(
    np.testing.assert_array_equal,
    final_state(tmp_path / "whole", c),
    final_state(tmp_path / "cut", c),
  )
  assert resumed == whole
  assert (tmp_path / "whole/results.json").read_text() == (
    tmp_path / "cut/results.json"
  ).read_text()
  assert [r for r in rows_of(tmp_path / "whole") if "loss" in r] == [
    r for r in rows_of(tmp_path / "cut") if "loss" in r
  ]


def test_training_learns_and_is_evaluated_as_by_eval(tmp_path, folder):
  c = tiny.run_config(folder, steps=60, log_every=10)
  untrained = loop.evaluate(c, str(tmp_path / "none"))
  results = loop.train(c, str(tmp_path / "run"))
  losses = [r["loss"] for r in rows_of(tmp_path / "run") if "loss" in r]
  assert losses[-1] < 0.7 * losses[0]
  assert results["perplexity"]["64"]["ppl"] < 0.5 * untrained["perplexity"]["64"]["ppl"]
  assert untrained["perplexity"]["64"]["ppl"] == pytest.approx(256, rel=0.1)
  assert loop.evaluate(c, str(tmp_path / "run")) == results
  assert json.loads((tmp_path / "run/results.json").read_text()) == results
  rope = json.loads((tmp_path / "run/rope.json").read_text())
  assert rope["inv_freq"] == resolve.rope(c).inv_freq.tolist()
  assert list((tmp_path / "run").glob("events.out.tfevents.*"))


def test_the_step_is_compiled_once_and_its_memory_is_said(tmp_path, folder, capsys):
  c, compiled = adapted_config(folder), []

  def listen(event, seconds, **about):
    compiled.append((event.rpartition("/")[2], about.get("fun_name")))

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    loop.train(c, str(tmp_path))
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert compiled.count(("backend_compile_duration", "jit(step)")) == 1
  (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("memory: ")]
  total, held, rest = (float(x) for x in re.findall(r"([\d.]+) MB", line))
  assert abs(total - held - rest) < 0.2 and rest > 0
  # In float32: the parameters, two moments of those that are trained, and 4 x 64 tokens.
  run = json.loads((tmp_path / "run.json").read_text())
  numbers = run["parameters"] + 2 * run["trained_parameters"]
  assert abs(held - 4e-6 * numbers) < 0.1


def test_evaluations_run_during_training_when_due(tmp_path, folder):
  c = tiny.run_config(folder, steps=5)
  c.evals.perplexity.every_steps = 2
  c.checkpoint.every = 2
  loop.train(c, str(tmp_path))
  rows = rows_of(tmp_path)
  assert [r["step"] for r in rows if "perplexity/64/ppl" in r] == [2, 4, 5]
  loop.train(c, str(tmp_path))  # a finished run, started again, adds nothing
  assert rows_of(tmp_path) == rows


def test_a_kill_between_checkpoint_and_evaluation_loses_no_row(tmp_path, folder, monkeypatch):
  c = tiny.run_config(folder, steps=4)
  c.checkpoint.every = c.evals.perplexity.every_steps = 2

  def killed(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(loop.evals, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
      loop.train(c, str(tmp_path))
  loop.train(c, str(tmp_path))
  assert [r["step"] for r in rows_of(tmp_path) if "perplexity/64/ppl" in r] == [2, 4]
  assert [r["step"] for r in rows_of(tmp_path) if "loss" in r] == [1, 2, 3, 4]


def test_a_run_starts_from_another_run(tmp_path, folder):
  loop.train(tiny.run_config(folder), str(tmp_path / "base"))
  c = adapted_config(folder)
  c.init_from = "run:base"
  loop.train(c, str(tmp_path / "adapted"))
  base = final_state(tmp_path / "base", c)["params"]
  jax.tree.map(np.testing.assert_array_equal, base, final_state(tmp_path / "adapted", c)["params"])
  c.init_from = str(tmp_path / "adapted")
  c.lora.rank, c.rope.phase, c.train.trainable = 0, "none", "all"
  with pytest.raises(ValueError, match="config.lora.rank=0.*has 4"):
    loop.train(c, str(tmp_path / "third"))


def test_a_workdir_with_another_run_is_refused_by_key(tmp_path, folder):
  c = tiny.run_config(folder)
  config.write(c, str(tmp_path))
  c.evals.perplexity.num_samples = 1  # evaluations may change
  config.check_workdir(c, str(tmp_path))
  c.train.learning_rate = 1.0
  with pytest.raises(ValueError, match="config.train.learning_rate=1.0 .was 0.003"):
    loop.train(c, str(tmp_path))


def test_a_mistake_found_before_the_first_step_does_not_claim_the_workdir(tmp_path, folder):
  c = tiny.run_config(folder)
  for block, key, wrong, message in (
    ("model", "vocab_size", 100, "vocab_size=100"),
    ("mesh", "fsdp", 3, "mesh.data=1 x fsdp=3"),
    ("data", "min_tokens", 10**6, "min_tokens=1000000"),
  ):
    right, c[block][key] = c[block][key], wrong
    with pytest.raises(ValueError, match=message):
      loop.train(c, str(tmp_path / "run"))
    c[block][key] = right
  c.evals.perplexity.num_samples = 10**4
  with pytest.raises(ValueError, match="config.evals.perplexity: num_samples=10000"):
    loop.train(c, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_a_run_is_not_continued_on_another_text(tmp_path):
  c = tiny.run_config(tiny.text_folder(tmp_path / "text"), steps=1)
  loop.train(c, str(tmp_path / "run"))
  (tmp_path / "text" / "000.txt").write_text("changed " * 100)
  with pytest.raises(ValueError, match="other settings.*text rope_jax_text"):
    loop.train(c, str(tmp_path / "run"))


def test_a_trained_run_can_be_evaluated_beyond_its_context(tmp_path, folder):
  c = adapted_config(folder)
  c.train.steps = 1
  loop.train(c, str(tmp_path))
  c.rope.update(factor=8.0, context=128)
  c.evals.perplexity.lengths = (64, 128)
  assert set(loop.evaluate(c, str(tmp_path))["perplexity"]) == {"64", "128"}
  assert config.read(str(tmp_path)).rope.context == 64
  trained = json.loads((tmp_path / "rope.json").read_text())
  assert (trained["factor"], trained["context"]) == (4.0, 64)
  c.rope.theta = 5e5
  with pytest.raises(ValueError, match="config.rope.theta"):
    loop.evaluate(c, str(tmp_path))


def test_a_config_survives_its_file(tmp_path, folder):
  c = adapted_config(folder)
  c.rope.factor = 3.0
  c.rope.yarn.mscale = c.rope.yarn.mscale_all_dim = 0.5
  config.write(c, str(tmp_path))
  assert config.read(str(tmp_path)).to_dict() == c.to_dict()


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, folder, monkeypatch):
  c = tiny.run_config(folder)
  monkeypatch.setattr(ByteTokenizer, "vocab_size", 300)
  with pytest.raises(ValueError, match="config.model.vocab_size=256.*300"):
    loop.train(c, str(tmp_path))


def test_length_dependent_ropes_are_resolved_for_each_length(tmp_path, folder):
  c = tiny.run_config(folder, steps=0)
  c.rope.update(original_context=16, scaling="dynamic_ntk", factor=2.0)
  seen = {n: resolve.rope(c, n).inv_freq for n in (8, 16, 32, 64)}
  np.testing.assert_array_equal(seen[8], seen[16])
  assert (seen[32][1:] < seen[16][1:]).all() and (seen[64][1:] < seen[32][1:]).all()
  results = loop.evaluate(c, str(tmp_path))["perplexity"]
  assert set(results) == {"32", "64"} and math.isfinite(results["64"]["ppl"])


POSITIONS = dict(
  mixed=dict(rope__scaling="yarn", rope__context=128, rope__original_context=32),
  clex=dict(data__length=64, rope__scaling="clex", rope__context=128),
)


@pytest.mark.parametrize("positions", POSITIONS)
def test_every_arrangement_of_positions_trains(tmp_path, positions):
  """CLEX, whose frequencies differ from step to step, also resumes bit for bit."""
  folder = tiny.text_folder(tmp_path / "text")

  def settings():
    c = tiny.run_config(folder, steps=3)
    c.data.positions = positions
    for key, value in POSITIONS[positions].items():
      block, name = key.split("__")
      c[block][name] = value
    if positions == "clex":
      c.rope.clex.update(max_factor=2, time_step=0.25)
      c.train.trainable = "adapters"
    c.checkpoint.every = 2
    del c.evals.perplexity
    return c

  c = settings()
  loop.train(c, str(tmp_path / "whole"))
  mesh = sharding.make_mesh(c.mesh, 1)
  first, last = (
    state.initial_variables(c, mesh, ""),
    state.run_variables(str(tmp_path / "whole"), mesh),
  )
  trained = "phase" if positions == "clex" else "params"
  moved = jax.tree.map(lambda x, y: bool(jnp.any(x != y)), last[trained], first[trained])
  assert any(jax.tree.leaves(moved))
  described = json.loads((tmp_path / "whole" / "rope.json").read_text())
  np.testing.assert_allclose(described["inv_freq"], resolve.training_rope(c).inv_freq)
  if positions != "clex":
    return
  jax.tree.map(np.testing.assert_array_equal, last["params"], first["params"])
  with pytest.MonkeyPatch.context() as m:
    m.setattr(loop.batches_lib, "prefetch", stopping(loop.batches_lib.prefetch, 2))
    with pytest.raises(KeyboardInterrupt):
      loop.train(settings(), str(tmp_path / "cut"))
  loop.train(settings(), str(tmp_path / "cut"))
  again = state.run_variables(str(tmp_path / "cut"), mesh)
  jax.tree.map(np.testing.assert_array_equal, last, again)


def stopping(prefetch, step):
  def stopped(make, start, stop):
    for i, batch in enumerate(prefetch(make, start, stop), start):
      if i == step:
        raise KeyboardInterrupt
      yield batch

  return stopped


@pytest.mark.long
def test_every_type_of_evaluation_runs_in_training_and_alike_afterwards(tmp_path):
  c = tiny.run_config(tiny.text_folder(tmp_path / "text"), steps=2)
  c.rope.update(context=1024, scaling="dynamic_ntk")  # of which each length has its own rope
  c.data.length, c.generate.on_change = 64, "rotate"
  c.evals.perplexity.num_samples = 1
  c.evals.passkey = config.passkey(
    lengths=(512,), depths=2, num_samples=1, max_new_tokens=3, every_steps=1
  )
  c.evals.ruler = config.ruler(lengths=(1024,), tasks=("niah_single_1",), num_samples=1)
  c.evals.needle = config.needle(lengths=(512,), num_samples=2, every_steps=1)
  found = loop.train(c, str(tmp_path / "run"))
  assert set(found) == {"perplexity", "passkey", "ruler", "needle"}
  with open(tmp_path / "run/metrics.jsonl") as f:
    logged = {(r["step"], k) for r in map(json.loads, f) for k in r}
  for step in (1, 2):
    assert {(step, "passkey/512/accuracy"), (step, "needle/512/ppl")} <= logged
  assert (1, "ruler/1024/score") not in logged and (2, "ruler/1024/score") in logged
  assert loop.evaluate(c, str(tmp_path / "run")) == found
