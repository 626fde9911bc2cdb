"""The same seed gives the same run, and the same data to any number of processes."""

import json

import jax
import numpy as np
import pytest
import tiny

from rope_jax.data.arrange import Arrange
from rope_jax.data.batches import Batches
from rope_jax.train import loop, sharding, state


class Store:
  """Documents of the lengths of real ones, each token of its own."""

  unscored = 0

  def __init__(self, lengths):
    self.lengths = np.asarray(lengths)
    self._starts = np.concatenate([[0], np.cumsum(lengths)])

  def __len__(self):
    return len(self.lengths)

  def slice(self, i, start, stop):
    return np.arange(self._starts[i] + start, min(self._starts[i] + stop, self._starts[i + 1]))


def batches(kind="sequential", packing="pack", seed=0):
  arrange = Arrange(kind, seed=seed, length=16, context=64, original_context=16, max_factor=4)
  store = Store(np.random.default_rng(1).integers(20, 200, 40))
  return Batches(store, length=16, batch_size=8, packing=packing, seed=seed, arrange=arrange)


KINDS = [("sequential", "pack"), ("sequential", "document"), ("pose", "document")]
KINDS += [(kind, "pack") for kind in ("e2_llm", "randomised", "clex", "mixed")]


@pytest.mark.parametrize("kind, packing", KINDS)
@pytest.mark.parametrize("processes", [2, 4, 8])
def test_the_data_do_not_depend_on_the_number_of_processes(kind, packing, processes):
  rows = 8 // processes
  for step in (0, 7, 1000):
    whole = batches(kind, packing)(step)
    # Each process has read nothing but its own rows.
    parts = [
      batches(kind, packing)(step, slice(i * rows, (i + 1) * rows)) for i in range(processes)
    ]
    assert all(part.keys() == whole.keys() for part in parts)
    for key in whole:
      np.testing.assert_array_equal(np.concatenate([p[key] for p in parts]), whole[key])


def test_the_order_is_that_of_the_seed_and_of_no_earlier_step():
  a, b = batches(), batches()
  for step in (5, 0, 300, 5):
    np.testing.assert_array_equal(a(step)["tokens"], b(step)["tokens"])
    b(step + 17)
  assert (batches(seed=1)(5)["tokens"] != a(5)["tokens"]).any()


@pytest.mark.parametrize("sizes", [dict(data=8), dict(data=2, fsdp=2, context=2), dict(context=8)])
def test_every_mesh_is_given_the_same_batch(sizes):
  split = sharding.batch_sharding(tiny.mesh(**sizes))
  placed = sharding.put_batch(lambda rows: batches()(3, rows), (8, 16), split)
  for key, expected in batches()(3).items():
    np.testing.assert_array_equal(placed[key], expected)


def test_the_same_seed_gives_the_same_run_bit_for_bit(tmp_path):
  c = tiny.run_config(tiny.text_folder(tmp_path / "text"), steps=4)
  c.model.vocab_size = 264
  c.lora.rank, c.rope.phase, c.rope.scaling = 4, "psc", "yarn"
  c.rope.original_context = 16
  c.mesh.update(fsdp=2, context=2)
  c.evals = {}
  found = []
  for name in ("a", "b"):
    loop.train(c, str(tmp_path / name))
    text = (tmp_path / name / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    mesh = sharding.make_mesh(c.mesh, 4)
    trained = jax.tree.map(np.asarray, state.run_variables(str(tmp_path / name), mesh))
    found.append(
      (trained, [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows])
    )
  assert len(found[0][1]) == 4 and found[0][1] == found[1][1]
  jax.tree.map(np.testing.assert_array_equal, found[0][0], found[1][0])
