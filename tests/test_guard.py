"""Steps that are not finite: left out, counted, and at last kept and run again."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from rope_jax import config, validate
from rope_jax.data.batches import Batches
from rope_jax.train import dump, loop, sharding, state
from rope_jax.train.checkpoint import Checkpoints
from rope_jax.train.guard import WARMUP, guarded, metrics

PARAMS = dict(w=jnp.arange(3.0), b=jnp.ones(2))


def taken(tx, state, loss=1.0, norm=1.0, gradient=0.5, params=PARAMS):
  grads = jax.tree.map(lambda x: jnp.full_like(x, gradient), params)
  updates, state = tx.update(
    grads, state, params, loss=jnp.float32(loss), grad_norm=jnp.float32(norm)
  )
  return optax.apply_updates(params, updates), state


NAN = dict(norm=np.nan, gradient=np.nan)


@pytest.mark.parametrize("bad", [dict(loss=np.nan), dict(loss=np.inf), dict(norm=np.inf), NAN])
def test_a_step_that_is_not_finite_changes_nothing_but_its_count(bad):
  tx = guarded(optax.adam(0.1), 5)
  params, before = taken(tx, tx.init(PARAMS))
  same, after = taken(tx, before, params=params, **bad)
  jax.tree.map(np.testing.assert_array_equal, (params, before.inner), (same, after.inner))
  assert (int(after.skipped), int(after.in_a_row), int(after.taken)) == (1, 1, 1)
  _, after = taken(tx, after, params=params)
  assert (int(after.skipped), int(after.in_a_row), int(after.taken)) == (1, 0, 2)


def test_finite_steps_are_those_of_the_optimizer_itself():
  inner = optax.adamw(0.1)
  tx, alone, params, plain = guarded(inner, 0), inner.init(PARAMS), PARAMS, PARAMS
  state = tx.init(PARAMS)
  for i in range(3):
    params, state = taken(tx, state, gradient=0.3 * i - 0.2, params=params)
    grads = jax.tree.map(lambda x, i=i: jnp.full_like(x, 0.3 * i - 0.2), plain)
    updates, alone = inner.update(grads, alone, plain)
    plain = optax.apply_updates(plain, updates)
  jax.tree.map(np.testing.assert_array_equal, params, plain)


def test_after_too_many_in_a_row_nothing_is_taken_any_more():
  tx = guarded(optax.sgd(0.1), 2)
  state = tx.init(PARAMS)
  for loss in (np.nan, np.nan, 1.0, np.nan, np.nan, np.nan):
    params, state = taken(tx, state, loss=loss)
  assert int(state.in_a_row) == 3 and int(state.skipped) == 5
  same, state = taken(tx, state, params=params)
  jax.tree.map(np.testing.assert_array_equal, same, params)
  assert int(state.in_a_row) == 3 and int(state.skipped) == 5


def test_a_spike_is_measured_against_the_norms_before_it():
  tx = guarded(optax.sgd(0.0), 5)
  state = tx.init(PARAMS)
  for _ in range(WARMUP):
    _, state = taken(tx, state, norm=2.0)
    assert float(metrics(state)["grad_ratio"]) == 0
  _, after = taken(tx, state, norm=30.0)
  assert float(metrics(after)["grad_ratio"]) == 15
  _, bad = taken(tx, after, norm=np.inf)
  assert float(metrics(bad)["grad_ratio"]) == 0 and float(bad.norm) == float(after.norm) < 4
  assert metrics(optax.sgd(0.1).init(PARAMS)) == {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tiny.text_folder(tmp_path_factory.mktemp("text"))


def poisoned(monkeypatch, steps, weight=np.inf):
  """Batches of these steps (from 1) have a weight that no loss survives."""
  real = Batches.__call__

  def call(self, step, rows=slice(None)):
    batch = real(self, step, rows)
    if step + 1 in steps:
      batch["weights"][0, 5] = weight
    return batch

  monkeypatch.setattr(Batches, "__call__", call)


def rows(workdir):
  found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in found if "loss" in r]


def test_a_run_leaves_out_what_is_not_finite_and_counts_over_a_resume(
  tmp_path, folder, monkeypatch, capsys
):
  c = tiny.run_config(folder, steps=6, log_every=100, schedule="linear")
  c.evals = {}
  poisoned(monkeypatch, (2, 5))
  loop.train(c, str(tmp_path / "whole"))
  said = capsys.readouterr().out
  assert said.count("left out") == 2 and "step 2: loss" in said
  found = {r["step"]: r for r in rows(tmp_path / "whole")}
  assert set(found) == {1, 2, 5, 6}  # those are logged, whatever log_every
  assert found[2]["loss"] is None and found[6]["skipped"] == 2  # JSON has no NaN
  assert found[6]["learning_rate"] == pytest.approx(c.train.learning_rate * 3 / 6)

  c.checkpoint.every = 3
  loop.train(c, str(tmp_path / "cut"))
  shutil.rmtree(tmp_path / "cut/checkpoints/6")
  loop.train(c, str(tmp_path / "cut"))
  assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_a_run_stops_after_too_many_and_keeps_the_step(tmp_path, folder, monkeypatch):
  c = tiny.run_config(folder, steps=9, max_skipped=1)
  c.checkpoint.every = 2
  poisoned(monkeypatch, (5, 6))
  message = (
    r"step 6: loss (inf|nan).*max_skipped=1 in a row.*replay.py \S+.*checkpoint is from step 4"
  )
  with pytest.raises(FloatingPointError, match=message) as error:
    loop.train(c, str(tmp_path))
  saved = [p.name for p in (tmp_path / "checkpoints").iterdir()]
  assert sorted(name for name in saved if name.isdigit()) == ["2", "4"]

  monkeypatch.undo()  # what was kept is enough
  found = dump.replay(str(tmp_path / "nonfinite/6"))
  assert found["step"] == 6 and not np.isfinite(found["loss"])
  assert str(found["loss"]) in str(error.value)
  assert found["losses"] == dict(count=1, first=[(0, 5)])
  assert found["parameters"] == {} and "params/embedding" in found["gradients"]

  # It started from what step 4 left, as 5 was left out.
  mesh = sharding.make_mesh(config.base().mesh, 1)
  with np.load(tmp_path / "nonfinite/6/batch.npz") as batch:
    assert batch["weights"][0, 5] == np.inf and batch["tokens"].shape == (4, 64)
  kept = Checkpoints(str(tmp_path / "nonfinite/6"))
  trained = state.run_variables(str(tmp_path), mesh, 4)
  same = kept.restore(6, trainable=state.abstract_of(trained))["trainable"]
  jax.tree.map(np.testing.assert_array_equal, same, trained)
  loop.train(c, str(tmp_path))  # and without the poison it goes on


def test_a_gradient_out_of_the_ordinary_is_said_and_logged(tmp_path, folder, monkeypatch, capsys):
  c = tiny.run_config(folder, steps=WARMUP + 4, log_every=1000, spike=3.0, learning_rate=1e-5)
  c.evals = {}
  c.checkpoint.every = 1000
  poisoned(monkeypatch, (WARMUP + 2,), weight=1e3)
  loop.train(c, str(tmp_path))
  found = [r for r in rows(tmp_path) if "grad_spike" in r]
  assert [r["step"] for r in found] == [WARMUP + 2] and found[0]["grad_spike"] > 3
  assert f"step {WARMUP + 2}: " in capsys.readouterr().out


@pytest.mark.parametrize("key, value", [("max_skipped", -1), ("spike", 0.5), ("spike", -1.0)])
def test_settings_out_of_range_are_refused(key, value):
  c = tiny.run_config("stdlib")
  c.train[key] = value
  with pytest.raises(ValueError, match=f"config.train.{key}={value}"):
    validate.validate(c)
