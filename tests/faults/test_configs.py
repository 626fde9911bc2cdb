"""Configs that are wrong in any way: refused by their key, before anything compiles."""

import contextlib
import sys
import tracemalloc

import alone
import fuzz_configs
import jax
import numpy as np
import pytest
import starts
import tiny

from rope_jax import config, errors, rope, validate
from rope_jax.model import context
from rope_jax.train import sharding


def test_mutated_configs_and_flags_build_or_name_their_key_and_none_compiles():
  figures = alone.run("configs", count=250)
  assert figures["configs"] == figures["built"] + figures["refused"] == 250
  assert figures["refused"] > 60 and figures["built"] > 40 and figures["models"] > 3
  assert figures["compiles"] == 0 and 0 < figures["flags_refused"] < figures["flags"]


def test_a_compile_is_noticed():
  with fuzz_configs.compiles() as compiled:
    jax.jit(lambda x: x * 3 + 41)(np.ones(5))
  assert len(compiled) >= 1


def test_a_case_is_made_again_from_its_numbers():
  assert fuzz_configs.describe(3, 14) == fuzz_configs.describe(3, 14)
  assert fuzz_configs.describe(3, 14) != fuzz_configs.describe(3, 15)


def test_what_names_no_key_or_the_wrong_one_is_a_failure():
  c, changed = config.base(), {"train.steps": -1}
  fuzz_configs.names_key("config.train.steps=-1: expected 0 or more", c, changed)
  for message in ("steps=-1", "config: bad", "config.train.clip=-1", "config.train.steps=1\n2"):
    with pytest.raises(AssertionError):
      fuzz_configs.names_key(message, c, changed)


@contextlib.contextmanager
def little_memory():
  """Fails where Python and numpy hold more than 64 MB: what is refused is not made first."""
  tracemalloc.start()
  try:
    yield
    assert tracemalloc.get_traced_memory()[1] < 2**26
  finally:
    tracemalloc.stop()


NAN, HUGE = float("nan"), 2**31
CHANGES = [
  ("train.clip", NAN),
  ("train.weight_decay", float("inf")),
  ("lora.alpha", NAN),
  ("train.learning_rate", 1e39),
  ("model.norm_eps", 1e-46),
  ("rope.theta", 1e300),
  ("train.b2", 0.9999999999),
  ("seed", HUGE),
  ("rope.context", HUGE),
  ("data.min_tokens", 2**63),
  ("evals.perplexity.start", HUGE),
  ("train.batch_size", HUGE // 64),
  ("evals.perplexity.batch_size", HUGE // 64),
  ("evals.perplexity.buckets", HUGE - 1),
  ("model.head_dim", 2**30),
  ("model.d_ff", HUGE - 1),
  ("lora.rank", HUGE - 1),
  ("train.steps", True),
  ("checkpoint.every", None),
  ("data.dir", "a\0b"),
  ("lora.targets", ("q", 1)),
  ("model.bias", (1,)),
  ("evals.perplexity.lengths", ("64",)),
  ("evals.perplexity.lengths", (True,)),
  ("search.longrope.start_tokens", (0, HUGE)),
]


@pytest.mark.parametrize("key, value", CHANGES, ids=lambda x: str(x)[:30])
def test_a_value_that_no_array_holds_is_refused_by_its_key(key, value):
  c = tiny.run_config("stdlib")
  if key == "model.d_ff":
    c.model.d_model = HUGE - 1
  if key == "lora.rank":
    c.model.num_layers = 10**6
  block = dict(fuzz_configs.leaves(c))[key]
  block[key.rpartition(".")[2]] = value
  with little_memory(), pytest.raises(ValueError, match=f"config.*{key.rpartition('.')[2]}"):
    validate.validate(c)


def test_the_largest_whole_number_is_taken():
  c = tiny.run_config("stdlib")
  c.seed = c.train.steps = errors.MOST
  validate.validate(c)


@pytest.mark.parametrize(
  "method, changes, key",
  [
    ("dprope", {"rope.context": 2**30}, "context"),
    ("dprope", {"rope.dprope.bins": 2**30}, "dprope.bins"),
    ("fope", {"rope.fope.gain": 0.5, "model.num_kv_heads": 2**24}, "num_kv_heads"),
    ("clex", {"rope.clex.time_step": 1e-30}, "clex.time_step"),
    ("clex", {"rope.clex.param_factor": 2**30}, "clex.param_factor"),
    ("dynamic_longrope", {"rope.dynamic_longrope.attention": "1e300"}, "attention"),
    (
      "yarn",
      {"rope.context": 2**26, "rope.yarn.mscale": 3e38, "rope.yarn.mscale_all_dim": 2e-38},
      "yarn.mscale",
    ),
  ],
)
def test_an_option_that_asks_for_too_much_is_refused_at_once(method, changes, key):
  c = starts.tiny_ones()[f"tiny {method}"]
  c.model.num_heads = max(c.model.num_heads, changes.get("model.num_kv_heads", 0))
  for name, value in changes.items():
    dict(fuzz_configs.leaves(c))[name][name.rpartition(".")[2]] = value
  with little_memory(), pytest.raises(ValueError, match=f"config.*{key}"):
    validate.validate(c)


def test_seeds_of_posgen_beyond_number_are_refused_at_once():
  c = starts.start("posgen", starts.load("posgen.py")).make()
  c.data.posgen.far = errors.MOST - 3
  with little_memory(), pytest.raises(ValueError, match="data.posgen.modulus"):
    validate.validate(c)


def test_a_step_of_a_search_leads_to_a_number_of_factors():
  c = starts.tiny_ones()["tiny search longrope"]
  c.search.factor = 1e30
  with pytest.raises(ValueError, match="search.longrope.step"):
    validate.validate(c)


def test_a_mesh_of_more_devices_than_numbers_is_refused():
  c = config.base()
  c.mesh.update(data=2**30, fsdp=2**30, tensor=2**4)  # 2^64, which wraps around to none
  with pytest.raises(ValueError, match="config.mesh.*18446744073709551616 devices"):
    sharding.make_mesh(c.mesh, 2**30)


def test_splitting_a_sequence_is_checked_without_its_tokens():
  with little_memory():
    assert context.check_split(2**40, 8, True) == 16
  with pytest.raises(ValueError, match="mesh.context=8.*load_balance"):
    context.check_split(2**40 + 8, 8, True)
  assert len(context.order(32, 8, True)) == 32
  with pytest.raises(ValueError, match="mesh.context=8"):
    context.order(24, 8, True)


def test_angles_are_counted_the_same_in_parts(monkeypatch):
  r = rope.resonance(tiny.base_rope())
  whole = [rope.angle_histogram(x, 1000, 36) for x in (r, tiny.base_rope())]
  monkeypatch.setattr(sys.modules["rope_jax.rope.disturbance"], "_POSITIONS", 7)
  parts = [rope.angle_histogram(x, 1000, 36) for x in (r, tiny.base_rope())]
  np.testing.assert_array_equal(whole, parts)
