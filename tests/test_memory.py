"""Loading a checkpoint takes little more memory than its parameters."""

import json
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

from rope_jax import config, resolve, rope
from rope_jax.export import files
from rope_jax.train import ahead, sharding, state
from rope_jax.weights import families, names

LOAD = """
import resource, sys, jax
devices = int(sys.argv[2])
jax.config.update("jax_num_cpu_devices", devices)
from rope_jax import presets
from rope_jax.train import sharding, state
c = presets.pretrained(sys.argv[1])
c.model.dtype = c.model.param_dtype = "bfloat16"
c.mesh.update(data=1, fsdp=devices)
mesh = sharding.make_mesh(c.mesh, devices)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with jax.set_mesh(mesh):
  params = state.initial_variables(c, mesh, "")["params"]
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
size = sum(x.nbytes for x in jax.tree.leaves(params))
up = params["layers"]["mlp"]["up"]
print(size, (after - before) * 1024, up.addressable_shards[0].data.nbytes)
"""


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_a_checkpoint_is_never_twice_in_memory(tmp_path, devices):
  c = config.base()
  c.model.update(vocab_size=4096, num_layers=20, d_model=1024, num_heads=8, num_kv_heads=8,
                 head_dim=128, d_ff=2048, tie_embeddings=False)  # fmt: skip
  shapes = names.shapes(jax.eval_shape(lambda: state.init(c))["params"])
  tensors = [
    files.Tensor(n, s, "bfloat16", lambda s=s: np.full(s, 0.01, ml_dtypes.bfloat16))
    for n, s in shapes.items()
  ]
  files.write_shards(str(tmp_path), dict(model=tensors), 10**8, lambda size: None)
  hf = families.write(c.model, 128) | rope.to_hf(resolve.rope(c))
  (tmp_path / "config.json").write_text(json.dumps(hf))
  command = [sys.executable, "-c", LOAD, str(tmp_path), str(devices)]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  size, grown, shard = map(int, done.stdout.split())
  assert size == sum(t.nbytes for t in tensors) > 4e8
  assert grown < 1.3 * size
  assert shard * devices == 20 * 1024 * 2048 * 2


@pytest.mark.slow
@pytest.mark.parametrize("trainable, remat", [("adapters", "attention"), ("all", "full")])
def test_a_training_step_needs_memory_linear_in_the_length(trainable, remat):
  c = config.base()
  c.model.update(vocab_size=512, num_layers=2, d_model=64, num_heads=2, num_kv_heads=1, head_dim=32,
                 d_ff=128, remat=remat)  # fmt: skip
  c.rope.update(original_context=4096, context=65_536, scaling="yarn", phase="psc")
  c.lora.rank = 4
  c.train.update(trainable=trainable, batch_size=1)
  mesh = sharding.make_mesh(c.mesh, 1, devices=jax.devices()[:1])

  def temporary(length):
    c.data.length = length
    return ahead.lower(c, mesh).compile().memory_analysis().temp_size_in_bytes

  assert temporary(65_536) <= 2.1 * temporary(32_768)
