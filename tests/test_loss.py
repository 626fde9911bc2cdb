import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rope_jax.train.loss import token_losses

HIDDEN = jax.random.normal(jax.random.key(0), (2, 37, 16))
MATRIX = jax.random.normal(jax.random.key(1), (16, 29))
TARGETS = jax.random.randint(jax.random.key(2), (2, 37), 0, 29)


def plain(hidden, matrix):
  log_probabilities = jax.nn.log_softmax(hidden @ matrix)
  return -jnp.take_along_axis(log_probabilities, TARGETS[..., None], -1)[..., 0]


@pytest.mark.parametrize("chunk", [1, 5, 37, 64])
def test_chunked_loss_equals_plain_loss_in_value_and_gradient(chunk):
  weights = jax.random.uniform(jax.random.key(3), (2, 37))

  def chunked(hidden, matrix):
    return token_losses(hidden, matrix, TARGETS, chunk)

  np.testing.assert_allclose(chunked(HIDDEN, MATRIX), plain(HIDDEN, MATRIX), rtol=1e-5, atol=1e-5)
  for ours, reference in zip(
    *(
      jax.grad(lambda h, m, f=f: (f(h, m) * weights).sum(), (0, 1))(HIDDEN, MATRIX)
      for f in (chunked, plain)
    )
  ):
    np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-5)


def test_no_more_than_a_chunk_of_logits_exists():
  def memory(chunk):
    hidden, targets = jnp.zeros((1, 4096, 16)), jnp.zeros((1, 4096), int)
    matrix = jnp.zeros((16, 512))
    f = jax.jit(jax.grad(lambda h, m: token_losses(h, m, targets, chunk).sum()))
    return f.lower(hidden, matrix).compile().memory_analysis().temp_size_in_bytes

  assert memory(4096) > 4096 * 512 * 4
  assert memory(128) < 4096 * 512 * 4 / 4
