"""The jitted training step and the jitted per-token loss."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from rope_jax import compiler
from rope_jax.model import attention
from rope_jax.model.llama import Llama, unembedding
from rope_jax.train import guard
from rope_jax.train.loss import token_losses
from rope_jax.train.predict import most_likely


def batch_losses(model: Llama, variables: dict, batch: dict, rope, chunk: int):
  """Weighted token losses of a batch (see `Batches`), float32 [B, L], as `attention.places` has it.

  Tokens go to the devices that own them; a sum does not mind their order.
  """
  batch = attention.arrange(model.config, batch)
  hidden = model.apply(
    variables,
    batch["tokens"],
    rope,
    batch["positions"],
    batch["segment_ids"],
    batch.get("fractions"),
    batch.get("short"),
  )
  losses = token_losses(hidden, unembedding(variables["params"]), batch["targets"], chunk)
  return losses * batch["weights"]


def batch_loss(model: Llama, variables: dict, batch: dict, rope, chunk: int):
  """Sum of the weighted token losses of a batch, float32."""
  return jnp.sum(batch_losses(model, variables, batch, rope, chunk))


def train_step(
  model: Llama,
  optimizer: optax.GradientTransformation,
  *,
  accumulation: int,
  chunk: int,
  placement=None,
) -> Callable:
  """The step (trainable, opt_state, frozen, batch, rope) -> (trainable, opt_state, metrics).

  `trainable` and `frozen` split the collections of the model; only the former has gradients and
  optimizer state. `rope` is an argument: other factors run the same program. The gradient is that
  of the mean loss per weighted token of the whole batch, however it is cut into micro-batches. An
  optimizer of `guard.guarded` is told the loss and the gradient norm.
  `placement` is (shardings of trainable, of opt_state), to be kept from step to step; the
  compiler's choice if None.
  """

  optimizer = optax.with_extra_args_support(optimizer)

  def step(trainable, opt_state, frozen, batch, rope):
    def loss(trainable, micro):
      return batch_loss(model, {**frozen, **trainable}, micro, rope, chunk)

    def accumulate(carry, micro):
      return jax.tree.map(jnp.add, carry, jax.value_and_grad(loss)(trainable, micro)), None

    # Strided, so that each micro-batch takes rows from every device.
    micros = jax.tree.map(lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch)
    if accumulation == 1:
      total, grads = jax.value_and_grad(loss)(trainable, jax.tree.map(lambda x: x[0], micros))
    else:
      zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, trainable))
      (total, grads), _ = jax.lax.scan(accumulate, zeros, micros)
    tokens = jnp.sum(batch["weights"])
    grads = jax.tree.map(lambda g: g / jnp.maximum(tokens, 1).astype(g.dtype), grads)
    values = dict(loss=total / jnp.maximum(tokens, 1), grad_norm=optax.global_norm(grads))
    with jax.named_scope("optimizer"):
      updates, opt_state = optimizer.update(grads, opt_state, trainable, **values)
      trainable = optax.apply_updates(trainable, updates)
    return trainable, opt_state, values | dict(tokens=tokens) | guard.metrics(opt_state)

  out = None if placement is None else (*placement, None)
  return compiler.jit(step, donate_argnums=(0, 1), out_shardings=out)


def planned_bytes(compiled) -> dict[str, int]:
  """Bytes of a device that a compiled program takes, by what for, and their `total`.

  What it finds there (`arguments`), what it gives back (`output`, of which `reused` takes the place
  of donated arguments), what it needs in between (`temporaries`), and its `code`. Empty where the
  compiler does not say.
  """
  stats = compiled.memory_analysis()
  if stats is None:
    return {}
  parts = dict(
    arguments=stats.argument_size_in_bytes,
    output=stats.output_size_in_bytes,
    reused=stats.alias_size_in_bytes,
    temporaries=stats.temp_size_in_bytes,
    code=stats.generated_code_size_in_bytes,
  )
  return dict(parts, total=sum(parts.values()) - 2 * parts["reused"])


def token_loss(model: Llama, *, chunk: int, rope_by_row: bool = False) -> Callable:
  """The jitted (variables, tokens [B, L], rope) -> losses [B, L - 1] of tokens 1 .. L-1 (nats).

  With `rope_by_row`, all numbers of the rope have a leading axis [B], a rope for each row.
  """

  def losses(variables, tokens, rope):
    # All L tokens go through the model, the last for nothing, so that block sizes divide L.
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    back = np.argsort(attention.places(model.config, tokens.shape[1]))
    tokens, targets = attention.arrange(model.config, (tokens, targets))
    hidden = model.apply(variables, tokens, rope, rope_by_row=rope_by_row)
    losses = token_losses(hidden, unembedding(variables["params"]), targets, chunk)[:, back]
    if jax.sharding.get_abstract_mesh().shape:  # every process reads them all
      losses = jax.lax.with_sharding_constraint(losses, P())
    return losses[:, :-1]

  return compiler.jit(losses)


@functools.cache  # a jitted function compiles once; evaluations ask for it again and again
def token_predictions(model: Llama, *, chunk: int) -> Callable:
  """The jitted (variables, tokens [B, L], rope) -> int32 [B, L], the most likely token after each.

  Of equally likely ones it is the first.
  """

  def predictions(variables, tokens, rope):
    back = np.argsort(attention.places(model.config, tokens.shape[1]))
    hidden = model.apply(variables, attention.arrange(model.config, tokens), rope)
    found = most_likely(hidden, unembedding(variables["params"]), chunk)[:, back]
    if jax.sharding.get_abstract_mesh().shape:  # every process reads them all
      found = jax.lax.with_sharding_constraint(found, P())
    return found

  return compiler.jit(predictions)
