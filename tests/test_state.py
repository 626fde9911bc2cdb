"""Runs that start from other runs, and what a workdir knows of its run."""

import numpy as np
import pytest
import tiny

from rope_jax import config, resolve, rope
from rope_jax.train import loop, state


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tiny.text_folder(tmp_path_factory.mktemp("texts") / "text")


def test_a_run_starts_only_from_weights_with_the_same_meaning(tmp_path, folder):
  loop.train(tiny.run_config(folder, steps=1), str(tmp_path / "base"))
  for key, value in (("rope.theta", 5e5), ("model.norm_eps", 1e-3)):
    c = tiny.run_config(folder, steps=1)
    c.init_from = "run:base"
    block, name = key.split(".")
    c[block][name] = value
    with pytest.raises(ValueError, match=f"config.{key}={value}"):
      loop.train(c, str(tmp_path / "next"))


def written(path, **rope_changes):
  """The config of a run, as it stands in its workdir."""
  c = tiny.run_config(tiny.text_folder(path.parent / "text"), steps=1)
  c.rope.update(rope_changes)
  config.write(c, str(path))
  return c


@pytest.mark.parametrize(
  "source, target, message",
  [
    (dict(partial_rotary_factor=0.5), dict(), "rope.partial_rotary_factor=1.0.*0.5"),
    (dict(scaling="drope"), dict(scaling="yarn", context=128), "rope.scaling='yarn'.*'drope'"),
    (dict(scaling="yarn", context=128), dict(scaling="pi", context=256), "rope.scaling='pi'"),
    (dict(scaling="yarn", context=128),
     dict(scaling="yarn", original_context=128, context=256), "rope.original_context=128.*64"),
    (dict(resonance=True), dict(), "rope.resonance=False.*True"),
    (dict(scaling="clex", context=128), dict(), "rope.scaling='none'.*'clex'"),
    (dict(scaling="clex", context=128),
     dict(scaling="clex", context=128, clex=dict(activation="silu")), "clex.activation='silu'"),
    (dict(phase="psc"), dict(phase="psc", psc=dict(share="all")), "rope.psc.share='all'.*'none'"),
    (dict(phase="psc"), dict(), "rope.phase='none'.*'psc'"),
    # Another factor of the same method is how extension goes on.
    (dict(scaling="yarn", context=128), dict(scaling="yarn", context=256), None),
    (dict(), dict(scaling="yarn", context=128), None),
    # Or the extended rope is declared the base.
    (dict(scaling="yarn", context=128),
     dict(base="checkpoint", scaling="pi", original_context=128, context=256), None),
  ],
)  # fmt: skip
def test_a_run_that_starts_from_a_run_keeps_the_rope_of_its_weights(
  tmp_path, source, target, message
):
  written(tmp_path / "base", **source)
  c = tiny.run_config(tiny.text_folder(tmp_path / "text"), steps=1)
  c.rope.update(target)
  c.init_from = str(tmp_path / "base")
  if message is None:
    state.check_init(c, "")
    return
  with pytest.raises(ValueError, match=message):
    state.check_init(c, "")


def test_a_run_can_be_extended_from_the_rope_that_it_reached(tmp_path):
  first = written(tmp_path / "base", scaling="yarn", context=128)
  c = tiny.run_config(tiny.text_folder(tmp_path / "text"), steps=1)
  c.init_from = str(tmp_path / "base")
  c.rope.update(base="checkpoint", scaling="pi", original_context=128, context=256)
  own, r = resolve.rope(first), resolve.rope(c)
  np.testing.assert_allclose(r.inv_freq, own.inv_freq / 2)
  assert r.attention_scale == own.attention_scale > 1
  c.rope.original_context = 64
  with pytest.raises(ValueError, match="rope.original_context=64.*128"):
    resolve.rope(c)
  c.init_from = "run:base"
  with pytest.raises(ValueError, match="rope.base='checkpoint'.*a checkpoint or a run"):
    resolve.rope(c)


def test_factor_files_must_not_change_under_a_run(tmp_path, folder):
  def settings():
    c = tiny.run_config(folder, steps=1)
    c.rope.update(scaling="longrope", original_context=32)
    c.rope.longrope.factors = str(tmp_path / "f.csv")
    return c

  (tmp_path / "f.csv").write_text(",".join(["2.0"] * 8))
  facts = dict(factors=resolve.fingerprint(settings()))
  config.write(settings(), str(tmp_path / "run"), **facts)
  config.check_workdir(settings(), str(tmp_path / "run"), **facts)
  (tmp_path / "f.csv").write_text(",".join(["9.0"] * 8))
  for go_on in (loop.train, loop.evaluate):
    with pytest.raises(ValueError, match="other settings.*factors"):
      go_on(settings(), str(tmp_path / "run"))


def test_a_run_with_lists_for_each_layer_knows_itself_again(tmp_path, folder):
  c = tiny.run_config(folder, steps=1)
  c.rope.update(scaling="longrope", original_context=32)
  c.rope.longrope.long_factor = [[2.0] * 8, (3.0,) * 8]
  config.write(c, str(tmp_path))
  config.check_workdir(c, str(tmp_path))
  assert resolve.rope(config.read(str(tmp_path))).inv_freq.shape == (2, 8)


def test_a_method_of_a_notebook_is_missed_only_where_it_is_used(tmp_path, folder, monkeypatch):
  def mine(r, factor, *, power: float = 1.0):
    return r.apply("mine", r.inv_freq / factor**power, factor=factor)

  monkeypatch.setitem(rope.SCALINGS, "mine", mine)
  for name in ("none", "mine"):
    c = tiny.run_config(folder, steps=1)
    c.rope.update(scaling=name, original_context=32)
    config.write(c, str(tmp_path / name))
  monkeypatch.delitem(rope.SCALINGS, "mine")
  assert config.read(str(tmp_path / "none")).rope.scaling == "none"
  with pytest.raises(ValueError, match="'mine' is no method here"):
    config.read(str(tmp_path / "mine"))


@pytest.mark.parametrize(
  "key, value",
  [
    ("mesh.context", 2),
    ("model.attention", "dense"),
    ("model.context_parallel", "ring"),
    ("model.load_balance", False),
    ("model.remat", "matmuls"),
    ("model.block_q", 8),
    ("train.accumulation", 2),
    ("train.loss_chunk", 16),
  ],
)
def test_how_a_step_is_computed_may_change_on_resume(tmp_path, key, value):
  c = tiny.run_config("anywhere")
  config.write(c, str(tmp_path))
  block, leaf = key.split(".")
  assert c[block][leaf] != value
  c[block][leaf] = value
  config.check_workdir(c, str(tmp_path))
  c.train.learning_rate *= 2
  with pytest.raises(ValueError, match="config.train.learning_rate"):
    config.check_workdir(c, str(tmp_path))
