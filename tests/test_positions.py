import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rope_jax.data import POSITIONS, batches, corpus, tokenizer, tokens
from rope_jax.data.arrange import Arrange
from rope_jax.rope import positions

KEYS = jax.random.split(jax.random.key(0), 400)


def many(f, *args):
  return jax.tree.map(
    np.asarray, jax.jit(jax.vmap(f, in_axes=(0,) + (None,) * len(args)))(KEYS, *args)
  )


def test_pose_is_two_chunks_with_a_skip_in_text_and_in_positions():
  draw = functools.partial(positions.pose, length=16, context=64)
  index, position = many(lambda k: draw(k, tokens=100))
  assert (index[:, 0] == 0).all() and (position[:, 0] == 0).all()
  for values, most in ((index, 100), (position, 64)):
    assert values.max() == most - 1  # reaches the end, and no further
    steps = np.diff(values, axis=1)
    assert (steps >= 1).all() and ((steps > 1).sum(1) <= 1).all()
  splits = (np.diff(position, axis=1) > 1).argmax(1) + 1
  moved = (np.diff(position, axis=1) > 1).any(1)
  assert set(splits[moved]) == set(range(1, 9))  # 1 .. (16 + 1) // 2
  # Both skips are at the same token, of different sizes.
  both = moved & (np.diff(index, axis=1) > 1).any(1)
  assert ((np.diff(index, axis=1) > 1).argmax(1) + 1 == splits)[both].all()
  # The shift is uniform in 0 .. 64 - 16.
  shift = position[:, -1] - 15
  assert abs(shift.mean() - 24) < 2.5 and shift.min() == 0 and shift.max() == 48


def test_pose_without_more_text_skips_positions_only_and_short_documents_stay_within():
  index, position = many(lambda k: positions.pose(k, length=16, context=64))
  assert (index == np.arange(16)).all() and position.max() > 40
  index, position = many(lambda k: positions.pose(k, length=16, context=64, tokens=5))
  assert (index[:, :5] == np.arange(5)).all() and position[:, :5].max() == 63


def test_e2_llm_varies_density_and_offset_within_the_trained_angles():
  whole, fraction = many(lambda k: positions.e2_llm(k, length=16, context=64, original_context=16))
  p = whole + fraction.astype(np.float64)
  g = 1 / np.diff(p, axis=1)
  np.testing.assert_allclose(g, g[:, :1].repeat(15, 1), rtol=1e-5)
  assert set(np.round(g[:, 0]).astype(int)) == {1, 2, 3, 4}
  assert p.max() < 16 and (p.min(1) > 0).any()
  assert ((fraction >= 0) & (fraction < 1)).all()


def test_randomised_positions_are_sorted_different_and_cover_the_context():
  p = many(lambda k: positions.randomised(k, length=16, context=64))
  assert (np.diff(p, axis=1) > 0).all()
  assert set(p.ravel()) == set(range(64))


def test_clex_positions_have_both_ends_and_times_are_uniform():
  times = many(lambda k: positions.clex_time(k, max_factor=4))
  assert set(times) == {1, 2, 3, 4}
  for t in (1, 3):
    p = many(lambda k, t: positions.clex(k, t, length=8, max_factor=4), jnp.asarray(t))
    assert (p[:, 0] == 0).all() and (p[:, -1] == 8 * t - 1).all()
    assert (np.diff(p, axis=1) > 0).all()
    assert set(p.ravel()) == set(range(8 * t))


def test_mixed_windows_mark_the_tokens_of_short_segments():
  segments = jnp.array([0, 0, 0, 1, 1, 2, 2, 2, 2, -1, -1, -1, -1])
  short = positions.mixed_windows(segments, original_context=3)
  np.testing.assert_array_equal(short, [1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0])


def test_lengths_that_do_not_fit_are_refused():
  key = KEYS[0]
  for f in (positions.pose, positions.randomised):
    with pytest.raises(ValueError, match="length=65.*64"):
      f(key, length=65, context=64)
  with pytest.raises(ValueError, match="length=17.*16"):
    positions.e2_llm(key, length=17, context=64, original_context=16)


@pytest.fixture
def store(tmp_path):
  folder = tiny.text_folder(tmp_path / "text", documents=6, characters=900)
  documents = corpus.documents(folder, "train", str(tmp_path / "data"))
  return tokens.tokenize(documents, tokenizer.load("byte", ""), str(tmp_path), append_eos=False)


def made(store, kind, packing="document", **options):
  arrange = Arrange(
    kind, seed=3, length=32, context=128, original_context=32, max_factor=4, **options
  )
  return batches.Batches(store, length=32, batch_size=4, packing=packing, seed=3, arrange=arrange)


@pytest.mark.parametrize("kind", POSITIONS)
def test_batches_are_a_function_of_seed_and_step_however_they_are_cut(store, kind):
  make = made(store, kind)
  for step in (0, 5):
    whole, again = make(step), made(store, kind)(step)
    parts = [make(step, slice(a, a + 2)) for a in (0, 2)]
    for key in whole:
      np.testing.assert_array_equal(whole[key], again[key])
      np.testing.assert_array_equal(whole[key], np.concatenate([p[key] for p in parts]))
      assert whole[key].shape == (4, 32)
  different = [made(store, kind)(s)["positions"] for s in (0, 1)]
  assert (kind in ("sequential", "mixed")) == np.array_equal(*different)


def test_pose_batches_take_their_text_from_two_places_of_one_document(store):
  batch = made(store, "pose")(0)
  texts = [store[i].tolist() for i in range(len(store))]
  jumps = 0
  for row, target, position in zip(batch["tokens"], batch["targets"], batch["positions"]):
    split = int((np.diff(position) > 1).argmax()) + 1 if (np.diff(position) > 1).any() else 32
    first, second = row[:split].tolist(), row[split:].tolist()
    (text,) = [t for t in texts if t[:split] == first and contains(t, second)]
    jumps += not contains(text, row.tolist())
    np.testing.assert_array_equal(row[1:], target[:-1])
    assert position.max() < 128
  assert jumps


def contains(text, part):
  return any(text[i : i + len(part)] == part for i in range(len(text) - len(part) + 1))


def test_packed_documents_keep_their_own_positions(store):
  plain = made(store, "sequential", "pack")(2)
  for kind in ("e2_llm", "randomised"):
    batch = made(store, kind, "pack")(2)
    np.testing.assert_array_equal(batch["tokens"], plain["tokens"])
    steps = np.diff(batch["positions"].astype(float) + batch.get("fractions", 0), axis=1)
    same = np.diff(plain["segment_ids"], axis=1) == 0
    assert (steps[same] > 0).all()


def test_clex_gives_all_sequences_of_a_step_one_time(store):
  make = made(store, "clex")
  times = {make.arrange.time(step) for step in range(30)}
  assert times == {1, 2, 3, 4}
  for step in range(4):
    assert (make(step)["positions"].max(1) == 32 * make.arrange.time(step) - 1).all()


def test_mixed_batches_mark_short_documents(store):
  batch = made(store, "mixed", "pack")(1)
  for segments, short in zip(batch["segment_ids"], batch["short"]):
    for s in set(segments):
      expected = (segments == s).sum() <= 32 and s >= 0
      assert (short[segments == s] == expected).all()
