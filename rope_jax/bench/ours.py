"""Our side of each part, by the functions that training, evaluation and generation run."""

from __future__ import annotations

import contextlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from rope_jax import bench, compiler, config, presets, resolve
from rope_jax import rope as rope_lib
from rope_jax.bench import clock
from rope_jax.data.batches import KEYS
from rope_jax.model.config import from_config
from rope_jax.model.generate import Generator
from rope_jax.model.llama import Llama, unembedding
from rope_jax.train import ahead, flops, sharding, state
from rope_jax.train import step as step_lib
from rope_jax.train.optimizer import optimizer


def limits(spec: dict) -> dict:
  """A square product with a float32 result, or x + 1 in place."""
  if spec["what"] == "copy":
    held = [jnp.zeros(spec["mebibytes"] * 2**18, jnp.float32)]
    add = compiler.jit(lambda x: x + 1, donate_argnums=0)

    def run():
      held[0] = add(held[0]).block_until_ready()

    return dict(seconds=clock.timed(run), bytes=2 * held[0].nbytes)
  n, (a, b) = spec["size"], jax.random.split(jax.random.key(0))
  a, b = (jax.random.normal(key, (n, n)).astype(spec["dtype"]) for key in (a, b))
  product = compiler.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
  return dict(seconds=clock.timed(lambda: product(a, b).block_until_ready()), flops=2 * n**3)


def forward(spec: dict) -> dict:
  """Losses of all tokens, as perplexity is computed; or the logits of the last token."""
  c, length = _config(spec), spec["length"]
  with _mesh(c) as mesh:
    variables, tokens = state.initial_variables(c, mesh, ""), _tokens(c, mesh, length)
    model, rope = Llama(from_config(c)), resolve.rope(c, length)

    def last(variables, tokens, rope):
      hidden = model.apply(variables, tokens, rope)[:, -1]
      matrix = unembedding(variables["params"]).astype(hidden.dtype)
      return jnp.einsum("bd,dv->bv", hidden, matrix, preferred_element_type=jnp.float32)

    losses = spec["what"] == "losses"
    function = (
      step_lib.token_loss(model, chunk=c.train.loss_chunk) if losses else compiler.jit(last)
    )
    out, found = clock.start(), None
    function = function.lower(variables, tokens, rope).compile()

    def run():
      nonlocal found
      found = jax.block_until_ready(function(variables, tokens, rope))

    seconds = clock.timed(run, _nothing if length > bench.WARM else None)
    if losses:
      out["loss"] = float(found.mean())
  outputs = length if losses else 1
  return dict(out, seconds=seconds, flops=forward_flops(model.config, length, outputs))


def train(spec: dict) -> dict:
  """A step of one sequence: LoRA, or LoRA and PSC, on a frozen base."""
  c, length = _training(spec), spec["length"]
  with _mesh(c) as mesh:
    trainable, opt_state, frozen = _training_state(c, mesh)
    step = step_lib.train_step(
      Llama(from_config(c)),
      optimizer(c.train),
      accumulation=c.train.accumulation,
      chunk=c.train.loss_chunk,
      placement=jax.tree.map(lambda x: x.sharding, (trainable, opt_state)),
    )
    batch, rope, losses = _batch(c, mesh), resolve.training_rope(c), []
    adapters = sum(x.size for x in jax.tree.leaves(trainable))
    held = [trainable, opt_state]
    del trainable, opt_state  # they are donated
    out = clock.start()
    step = step.lower(*held, frozen, batch, rope).compile()

    def run():
      *held[:], metrics = jax.block_until_ready(step(*held, frozen, batch, rope))
      losses.append(float(metrics["loss"]))

    seconds = clock.timed(run, _nothing if length > bench.WARM else None)
  each = flops.train_flops_per_token(from_config(c), length, adapters, base_is_trained=False)
  return dict(out, seconds=seconds, loss=losses[0], flops=each * length, trained=adapters)


def overhead(spec: dict) -> dict:
  """What makes and applies the rotations of a forward pass, and PSC, alone."""
  c, length, dtype = _config(spec), spec["length"], spec["dtype"]
  m, rope = from_config(c), resolve.rope(c, length)
  positions = jnp.arange(length)[None]
  keys = iter(jax.random.split(jax.random.key(0), 6))
  heads = dict(q=m.num_heads, k=m.num_kv_heads)
  inputs = {
    name: jax.random.normal(next(keys), (1, length, h, m.head_dim)).astype(dtype)
    for name, h in heads.items()
  }
  phases = {
    name: {
      part: 0.1 * jax.random.normal(next(keys), (m.num_layers, h, m.head_dim, m.head_dim))
      for part in ("up", "down")
    }
    for name, h in heads.items()
  }

  def by_channel(rope, positions):
    return rope_lib.by_channel(*rope_lib.cos_sin(rope, positions))

  def rotations(x, cos, sin):
    def layer(x, _):
      return {name: rope_lib.rotate_channels(x[name], cos, sin) for name in x}, None

    return jax.lax.scan(layer, x, None, length=m.num_layers)[0]

  def calibrations(x, phases):
    def layer(x, phase):
      return {name: rope_lib.psc(x[name], **phase[name]) for name in x}, None

    return jax.lax.scan(layer, x, phases)[0]

  angles, rotate, calibrate = (compiler.jit(f) for f in (by_channel, rotations, calibrations))
  cos, sin = angles(rope, positions)
  return dict(
    angles=clock.timed(lambda: jax.block_until_ready(angles(rope, positions))),
    rotations=clock.timed(lambda: jax.block_until_ready(rotate(inputs, cos, sin))),
    psc=clock.timed(lambda: jax.block_until_ready(calibrate(inputs, phases))),
    psc_flops=psc_flops(m, length),
    forward_flops=forward_flops(m, length, length),
  )


def generate(spec: dict) -> dict:
  """Greedy tokens through the cache; the first of them alone, too."""
  c, new = _config(spec), spec["new"]
  rope = resolve.rope(c)
  with _mesh(c, spec["batch"]) as mesh:
    generator = Generator(
      Llama(from_config(c)),
      state.initial_variables(c, mesh, ""),
      lambda tokens: rope,
      depends_on_length=False,
      on_change=c.generate.on_change,
      chunk=c.generate.chunk,
    )
    prompts = list(
      bench.random_ids(c.model.vocab_size, spec["batch"], spec["prompt"]).astype(np.int32)
    )
    out = clock.start()
    first = clock.timed(lambda: generator(prompts, 1))
    return dict(out, first=first, seconds=clock.timed(lambda: generator(prompts, new)))


def memory(spec: dict) -> dict:
  """Bytes that the compiler plans for, and, where it is executed, those that the process takes."""
  trains = spec["what"] == "step"
  c = _training(dict(spec, what="lora+psc")) if trains else _config(spec)
  with _mesh(c) as mesh:
    arguments = ()
    if spec["executed"] and trains:
      rope = resolve.training_rope(c)
      arguments = (*_training_state(c, mesh), _batch(c, mesh), rope)
    elif spec["executed"]:
      tokens = _tokens(c, mesh, spec["length"])
      arguments = (state.initial_variables(c, mesh, ""), tokens, resolve.rope(c, spec["length"]))
    out = clock.start()
    lowered = ahead.lower(c, mesh) if trains else _lower_forward(c, mesh, spec["length"])
    compiled = lowered.compile()
    stats = compiled.memory_analysis()
    if arguments:
      jax.block_until_ready(compiled(*arguments))
  out["temporary_bytes"] = stats.temp_size_in_bytes
  return dict(out, argument_bytes=stats.argument_size_in_bytes)


def compilation(spec: dict) -> dict:
  """Seconds to lower and to compile the training step, from shapes."""
  c = _training(dict(spec, what="lora+psc"))
  with _mesh(c) as mesh:
    began = time.perf_counter()
    lowered = ahead.lower(c, mesh)
    between = time.perf_counter()
    lowered.compile()
  return dict(lower=between - began, compile=time.perf_counter() - between)


MEASURES = dict(
  limits=limits,
  forward=forward,
  train=train,
  overhead=overhead,
  generate=generate,
  memory=memory,
  compile=compilation,
)


def _nothing() -> None:
  """The warm-up of a program that is compiled: long runs need no other."""


# ---- Floating-point operations.


def forward_flops(m, length: int, outputs: int) -> int:
  """Of a forward pass: 2 a matrix parameter, two products of causal attention.

  Args:
    m: a `ModelConfig`.
    length: tokens of the sequence.
    outputs: tokens whose logits are computed.
  """
  head = m.d_model * m.vocab_size
  attention = m.num_layers * 2 * 2 * length / 2 * m.num_heads * m.head_dim
  return int(2 * (flops.matrix_parameters(m) - head) * length + 2 * head * outputs
             + attention * length)  # fmt: skip


def psc_flops(m, length: int) -> int:
  """Of PSC: two products [head_dim, head_dim] for each head of queries and keys."""
  return m.num_layers * (m.num_heads + m.num_kv_heads) * 2 * 2 * m.head_dim**2 * length


# ---- Models and inputs.


def _config(spec: dict):
  """The model as it was trained: its plain rope, at whatever length."""
  c = config.base()
  if spec["model"] == "smollm2":
    presets.smollm2_135m(c)
  else:
    c.model.update(bench.SMALL)
  c.model.dtype = c.model.param_dtype = spec["dtype"]
  c.rope.context = max(c.rope.original_context, spec.get("length", 0))
  return c


def _training(spec: dict):
  c = _config(spec)
  c.data.length = spec["length"]
  c.model.remat = "attention"
  c.lora.rank = bench.LORA_RANK
  c.rope.phase = "psc" if spec["what"] == "lora+psc" else "none"
  c.train.update(trainable="adapters", batch_size=1, steps=1)
  return c


@contextlib.contextmanager
def _mesh(c, rows: int = 1):
  """The mesh of a run, of one device, set."""
  mesh = sharding.make_mesh(c.mesh, rows, devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    yield mesh


def _tokens(c, mesh, length: int):
  ids = bench.random_ids(c.model.vocab_size, 1, length).astype(np.int32)
  return jax.device_put(ids, sharding.batch_sharding(mesh, rows=1))


def _training_state(c, mesh) -> tuple:
  """(trainable, optimizer state, frozen)."""
  tx = optimizer(c.train)
  trainable, frozen = state.split(c, state.initial_variables(c, mesh, ""))
  placement = sharding.shardings(mesh, jax.eval_shape(tx.init, trainable))
  return trainable, jax.jit(tx.init, out_shardings=placement)(trainable), frozen


def _batch(c, mesh) -> dict:
  """One sequence that is one document, as `Batches` would give it."""
  length = config.train_length(c)
  ids = bench.random_ids(c.model.vocab_size, 1, length).astype(np.int32)
  batch = dict(
    tokens=ids,
    targets=np.pad(ids[:, 1:], ((0, 0), (0, 1))),
    positions=np.arange(length, dtype=np.int32)[None],
    segment_ids=np.zeros((1, length), np.int32),
    weights=(np.arange(length) < length - 1).astype(np.float32)[None],
  )
  split = sharding.batch_sharding(mesh)
  return {key: jax.device_put(batch[key], split) for key in KEYS}


def _lower_forward(c, mesh, length: int):
  """`token_loss`, lowered from shapes."""
  split = sharding.batch_sharding(mesh, rows=1)
  tokens = jax.ShapeDtypeStruct((1, length), np.int32, sharding=split)
  losses = step_lib.token_loss(Llama(from_config(c)), chunk=c.train.loss_chunk)
  return losses.lower(state.abstract_variables(c, mesh), tokens, resolve.rope(c, length))
