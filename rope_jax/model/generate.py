"""Continuing texts: prefill in chunks, then one token at a time, with a KV cache of static size.

Where the rope depends on the length of the sequence (dynamic NTK, LongRoPE's short and long
factors), it changes while the sequence grows, and `on_change` says what happens to the cache:

'recompute'  all of it is made again under the new rope: the same as a forward pass over the whole
             sequence, at every length. One more prefill where LongRoPE switches; one a token where
             dynamic NTK is past the original context.
'rotate'     keys are cached before rotation (after PSC's calibration) and rotated on read, as YaRN
             (arXiv 2309.00071, section 3.3) asks. Cheap, and exact in the first layer only: what
             deeper layers have cached was computed from hidden states under the ropes of then.
'capacity'   the rope of the prompt with all its new tokens, from the first: what servers that
             choose by the allocated length do.

Ropes that do not depend on the length cache rotated keys and ignore it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from rope_jax import compiler
from rope_jax.model import attention, cache, context
from rope_jax.model.config import ON_CHANGE
from rope_jax.model.llama import Llama, unembedding
from rope_jax.rope import Rope
from rope_jax.rope.limits import check_tokens

BLOCK = 16  # tokens that are made on the device before the host looks whether all are done


class Generator:
  """Continues token sequences with a model.

  Over a mesh, call it under `jax.set_mesh`: batches, heads and the cache are split as in training.

  Args:
    model: the model.
    variables: its variables, by collection.
    rope_of: tokens of a sequence -> its rope, on the host.
    depends_on_length: whether `rope_of` gives different ropes.
    on_change: one of `ON_CHANGE`.
    chunk: tokens of a prefill step, fewer for short prompts.
    vocab_size: tokens that there are; a model may have rows for more, which are never made. All of
      the model's if None.

  Raises:
    ValueError: for an unknown on_change.
  """

  def __init__(
    self,
    model: Llama,
    variables: dict,
    rope_of: Callable[[int], Rope],
    *,
    depends_on_length: bool,
    on_change: str = "recompute",
    chunk: int = 512,
    vocab_size: int | None = None,
  ):
    if on_change not in ON_CHANGE:
      raise ValueError(f"config.generate.on_change={on_change!r}: expected one of {ON_CHANGE}")
    self.model, self.variables, self.rope_of = model, variables, rope_of
    self.by_row, self.on_change, self.chunk = depends_on_length, on_change, chunk
    self.vocab_size = vocab_size
    self.rotated = not (depends_on_length and on_change == "rotate")
    self._empty = jax.jit(
      functools.partial(cache.empty, model.config, rotated=self.rotated), static_argnums=1
    )
    self._forward = compiler.jit(self._forward_, donate_argnums=1)
    self._sample = jax.jit(functools.partial(_sample, vocab_size))
    self._decode = compiler.jit(self._decode_, donate_argnums=1)

  def __call__(
    self,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    *,
    stop: Sequence[int] = (),
    until: Callable[[int, np.ndarray], bool] | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
  ) -> list[np.ndarray]:
    """New tokens of each prompt.

    Args:
      prompts: 1-D int32 ids, of any lengths; they are one batch.
      max_new_tokens: of each.
      stop: ids that end a sequence; they are not part of the result.
      until: (number of a prompt, its new tokens) -> whether they are enough; asked every few
        tokens, so that there may be more than enough.
      temperature: 0 is greedy.
      top_p: nucleus: the fewest most likely tokens with this probability together are sampled from.
      seed: of the samples.
      progress: called during the prefill with the share of it that is done.

    Raises:
      ValueError: for an empty prompt, settings out of range, or more than 2^31 - 1 tokens.
    """
    if not all(len(p) for p in prompts) or max_new_tokens < 1:
      raise ValueError("generation needs a token to start from and max_new_tokens of at least 1")
    if temperature < 0 or not 0 < top_p <= 1:
      raise ValueError(f"temperature={temperature} must be 0 or more, top_p={top_p} in (0, 1]")
    lengths, stop = np.array([len(p) for p in prompts]), np.asarray(stop, np.int32)
    new = [np.zeros(0, np.int32) for _ in prompts]
    settings = np.float32(temperature), np.float32(top_p), np.uint32(seed)
    longest, count = int(lengths.max()) + int(max_new_tokens), 0
    check_tokens("the longest prompt and max_new_tokens together", longest)

    def add(fresh) -> np.ndarray:
      """Takes in tokens [B, n]; which sequences need no more."""
      new[:] = [np.concatenate(x) for x in zip(new, np.asarray(fresh))]
      return np.array(
        [np.isin(x, stop).any() or bool(until and until(i, x)) for i, x in enumerate(new)]
      )

    done = np.zeros(len(prompts), bool)
    while count < max_new_tokens and not done.all():
      # Here all sequences have `count` new tokens, and the cache is made under their present ropes.
      grown = max_new_tokens if self.on_change == "capacity" else count
      rope = self._ropes(lengths + grown)
      end = self._next_change(lengths[~done], count, max_new_tokens)
      texts = [np.concatenate(x) for x in zip(prompts, new)]
      state, logits = self._prefill(texts, longest, rope, None if count else progress)
      token = self._sample(logits, *settings, count)
      done, count = add(token[:, None]), count + 1
      while count < end and not done.all():
        steps = min(BLOCK, end - count)
        if not self.rotated:
          each = [self._ropes(lengths + count + min(i, steps - 1)) for i in range(BLOCK)]
          rope = jax.tree.map(lambda *x: np.stack(x), *each)
        state, token, fresh = self._decode(
          self.variables, state, token, rope, count, steps, settings
        )
        done, count = add(fresh[:, :steps]), count + steps
    return [_until_stop(x, stop) for x in new]

  def logits(self, prompts: Sequence[np.ndarray], continuations: Sequence[np.ndarray]):
    """Logits of what follows each prompt, token by token through the cache.

    Args:
      prompts: 1-D int32 ids, one batch.
      continuations: 1-D int32 ids, all of one length n, fed instead of samples.

    Returns:
      float32 [B, n, V]: of the tokens of the continuations.

    Raises:
      ValueError: for more than 2^31 - 1 tokens.
    """
    lengths, out = np.array([len(p) for p in prompts]), []
    given = np.stack(continuations)
    n, state, end = given.shape[1], None, 0
    check_tokens("the longest prompt and its continuation together", int(lengths.max()) + n)
    for count in range(n):
      of = lengths + (n if self.on_change == "capacity" else count)
      rope = self._ropes(of)
      if count == end:
        texts = [np.concatenate([p, g[:count]]) for p, g in zip(prompts, given)]
        state, logits = self._prefill(texts, int(lengths.max()) + n, rope)
        end = self._next_change(lengths, count, n)
      else:
        token = given[:, count - 1 : count]
        state, logits = self._forward(self.variables, state, token, rope)
      out.append(np.asarray(logits))
    return np.stack(out, axis=1)

  # ---- The rope of each row.

  def _ropes(self, lengths: np.ndarray) -> Rope:
    """The rope, or one for each row, on the device."""
    if not self.by_row:
      return self.rope_of(int(lengths[0]))
    rows = [jax.tree.map(np.asarray, self.rope_of(int(n))) for n in lengths]
    return jax.tree.map(lambda *x: np.stack(x), *rows)

  def _next_change(self, lengths: np.ndarray, count: int, end: int) -> int:
    """The first later count of new tokens at which the cache must be made again, or `end`.

    Args:
      lengths: of the prompts that still need tokens.
      count: new tokens so far.
      end: new tokens in all.
    """
    if not self.by_row or self.on_change != "recompute":
      return end
    now = jax.tree.leaves(self._ropes(lengths + count))
    for later in range(count + 1, end):
      then = jax.tree.leaves(self._ropes(lengths + later))
      if any((a != b).any() for a, b in zip(now, then)):
        return later
    return end

  # ---- On the device.

  def _prefill(self, texts, longest: int, rope, progress=None):
    """A cache of these texts, and the logits of what follows them."""
    width, chunk, capacity = self._sizes(max(map(len, texts)), longest)
    tokens = np.zeros((len(texts), width), np.int32)
    for row, text in zip(tokens, texts):
      row[width - len(text) :] = text
    padding = np.array([width - len(t) for t in texts], np.int32)
    state = self._empty(padding, capacity)
    for i in range(0, width, chunk):
      state, logits = self._forward(self.variables, state, tokens[:, i : i + chunk], rope)
      if progress:
        logits.block_until_ready()  # what is only dispatched is not done
        progress((i + chunk) / width)
    return state, logits

  def _sizes(self, tokens: int, longest: int) -> tuple[int, int, int]:
    """(places of the prompts, of them at a time, places of the cache).

    Few different sizes, since each is compiled.
    """
    shards = attention.mesh_shape().get(context.AXIS, 1)
    chunk = min(self.chunk, 1 << max(tokens - 1, 15).bit_length())
    width = -(-tokens // chunk) * chunk
    need = -(-longest // chunk) * chunk + chunk  # made again, a text may need one chunk more
    step = max(chunk * shards, 1 << (need.bit_length() - 3))
    step = -(-step // (chunk * shards)) * chunk * shards
    capacity = -(-need // step) * step
    check_tokens("the cache, in whole chunks,", capacity)
    return width, chunk, capacity

  def _forward_(self, variables, state, tokens, rope):
    """(cache, tokens [B, T]) -> (cache, logits [B, V] of what follows)."""
    mesh, T = attention.mesh_shape(), tokens.shape[1]
    if mesh:
      parts = int(np.prod([mesh[axis] for axis in attention.ROWS]))
      rows = attention.ROWS if len(tokens) % parts == 0 else None
      along = context.AXIS if T % mesh[context.AXIS] == 0 else None
      tokens = jax.lax.with_sharding_constraint(tokens, P(rows, along))
    hidden, state = self.model.apply(variables, tokens, rope, cache=state, rope_by_row=self.by_row)
    last = hidden[:, -1]
    matrix = unembedding(variables["params"]).astype(last.dtype)
    logits = jnp.einsum("bd,dv->bv", last, matrix, preferred_element_type=jnp.float32)
    return state, _everywhere(logits)

  def _decode_(self, variables, state, token, rope, count, steps, settings):
    """Feeds `token` [B], then each sample: (cache, last token, tokens [B, BLOCK], some unused)."""

    def step(i, carry):
      state, token, made = carry
      now = rope if self.rotated else jax.tree.map(lambda x: x[i], rope)
      state, logits = self._forward_(variables, state, token[:, None], now)
      token = _sample(self.vocab_size, logits, *settings, count + i)
      return state, token, made.at[:, i].set(token)

    made = jnp.zeros((len(token), BLOCK), jnp.int32)
    state, token, made = jax.lax.fori_loop(0, steps, step, (state, token, made))
    return state, _everywhere(token), _everywhere(made)


def _sample(vocab_size, logits, temperature, top_p, seed, count):
  """int32 [B]: the most likely tokens at temperature 0, otherwise samples, a function of the seed.

  Args:
    vocab_size, temperature, top_p: as for `Generator`.
    logits: float32 [B, V].
    seed, count: of the sample: it is the count-th new token.
  """
  logits = logits[:, :vocab_size]

  def draw():
    scaled = logits / temperature
    order = jnp.argsort(-scaled, axis=-1)
    p = jnp.take_along_axis(jax.nn.softmax(scaled, axis=-1), order, axis=-1)
    before = jnp.cumsum(p, axis=-1) - p  # of all tokens that are likelier
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    ranked = jnp.where(before < top_p, ranked, -jnp.inf)
    key = jax.random.fold_in(jax.random.key(seed), count)
    chosen = jax.random.categorical(key, ranked, axis=-1)
    return jnp.take_along_axis(order, chosen[:, None], axis=-1)[:, 0]

  token = jax.lax.cond(temperature > 0, draw, lambda: jnp.argmax(logits, axis=-1))
  return _everywhere(token.astype(jnp.int32))


def _everywhere(x):
  """Whole on every device of the mesh, so that every process can read it."""
  return jax.lax.with_sharding_constraint(x, P()) if attention.mesh_shape() else x


def _until_stop(tokens: np.ndarray, stop: np.ndarray) -> np.ndarray:
  found = np.flatnonzero(np.isin(tokens, stop))
  return tokens[: found[0]] if len(found) else tokens
