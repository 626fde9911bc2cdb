"""Writes hf_rope.json: what transformers computes for each rope type that it shares with us.

  python tests/goldens/make_hf_rope.py

Run it again only when the set of cases changes; the file says which version made it.
"""

import itertools
import json
import sys
from pathlib import Path
from unittest import mock

PATH = Path(__file__).parent / "hf_rope.json"


def cases():
  """(name of our method, options, rope_parameters of transformers, sequence length)."""
  shapes = [(64, 1e4, 2048), (80, 1e4, 4096), (128, 5e5, 8192), (128, 1e6, 32768)]
  # Every pair turns more than once within the window: YaRN's ramp would end past the last pair,
  # and is clamped at d - 1, not at d/2 - 1.
  shapes.append((64, 1e4, 131_072))
  for d, theta, L in shapes:
    shape = dict(head_dim=d, theta=theta, original_context=L)
    yield shape, "none", {}, dict(rope_type="default"), None
    for s in (1.0, 2.0, 5.5, 16.0):
      yield shape, "pi", dict(factor=s), dict(rope_type="linear", factor=s), None
      yarn = [
        {},
        dict(truncate=False),
        dict(beta_fast=16.0, beta_slow=2.0),
        dict(mscale=0.7, mscale_all_dim=1.0),
        dict(attention_factor=1.25),
      ]
      for options in yarn:
        theirs = dict(rope_type="yarn", original_max_position_embeddings=L, factor=s, **options)
        yield shape, "yarn", dict(factor=s, **options), theirs, None
      for options in ({}, dict(low_freq_factor=2.0, high_freq_factor=8.0)):
        theirs = dict(low_freq_factor=1.0, high_freq_factor=4.0) | options
        theirs |= dict(rope_type="llama3", original_max_position_embeddings=L, factor=s)
        yield shape, "llama3", dict(factor=s, **options), theirs, None
      for p in (0.25, 0.55, 1.0):
        theirs = dict(rope_type="proportional", factor=s, partial_rotary_factor=p)
        yield shape, "proportional", dict(factor=s, proportion=p), theirs, None
    for s, n in itertools.product((1.0, 2.0, 4.0), (L // 2, L, L + 1, 3 * L)):
      theirs = dict(rope_type="dynamic", factor=s)
      yield shape, "dynamic_ntk", dict(factor=s, seq_len=n), theirs, n
    lists = dict(
      short_factor=[1 + i / d for i in range(d // 2)],
      long_factor=[1.5 + 15 * (2 * i / d) ** 2 for i in range(d // 2)],
    )
    for s, n, attention in itertools.product((1.0, 16.0), (1, L, L + 1, 9 * L), ("su", 1.3)):
      theirs = dict(rope_type="longrope", original_max_position_embeddings=L, factor=s, **lists)
      theirs |= {} if attention == "su" else dict(attention_factor=attention)
      ours = dict(factor=s, seq_len=n, attention=attention, **lists)
      yield shape, "longrope", ours, theirs, n


def oracle(shape, theirs, seq_len, precision="float64"):
  """(inv_freq as a list, attention factor) by transformers' own functions.

  `theirs` are the rope_parameters, with or without rope_theta.

  They compute in float32, where rounding alone reaches 1.4e-6 in a llama3 case below; 'float64'
  runs the same code with another meaning of `torch.float` and `torch.float32`.
  """
  import torch
  from transformers import LlamaConfig
  from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
  from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

  d, L = shape["head_dim"], shape["original_context"]
  config = LlamaConfig(
    hidden_size=4 * d,
    num_attention_heads=4,
    head_dim=d,
    max_position_embeddings=L,
    rope_parameters=dict(rope_theta=shape["theta"]) | theirs,
  )
  dtype = getattr(torch, precision)
  to_float = torch.Tensor.double if precision == "float64" else torch.Tensor.float
  with (
    mock.patch.multiple(torch, float=dtype, float32=dtype),
    mock.patch.object(torch.Tensor, "float", to_float),
  ):
    if theirs["rope_type"] == "default":
      inv_freq, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
      inv_freq, factor = ROPE_INIT_FUNCTIONS[theirs["rope_type"]](config, "cpu", seq_len=seq_len)
  return [float(f"{x:.9g}") for x in inv_freq.double().tolist()], float(factor)


def main():
  import transformers

  rows = []
  for shape, method, ours, theirs, seq_len in cases():
    inv_freq, factor = oracle(shape, theirs, seq_len)
    rows.append(
      dict(shape=shape, method=method, options=ours, inv_freq=inv_freq, attention_factor=factor)
    )
  header = dict(transformers=transformers.__version__, made_by=Path(__file__).name)
  PATH.write_text(
    json.dumps(header)[:-1] + ',"cases": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]}\n"
  )
  print(f"{PATH}: {len(rows)} cases", file=sys.stderr)


if __name__ == "__main__":
  main()
