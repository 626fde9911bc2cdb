"""LongRoPE, LongRoPE2 and gradient search on a tiny Llama, eight times past its window.

  python launch/search.py --config=configs/search_tiny.py:seed=0 --workdir=runs/search_tiny_0

Pretrains a byte-level Llama at 128 tokens on the sources of Python's standard library, and searches
factors for 1,024 tokens with the papers' settings: on text of the split that it was trained on, the
table being of the other one. Nothing is trained after the search. The gradient searches have the
budget of the evolutionary one, a step counting three forward passes. Arguments: seed, of the model
and of the searches; steps of pretraining; runlocal, searches of a minute. docs/search.md has the
tables.
"""

from rope_jax import config, presets

METHODS = ("longrope", "longrope_released", "longrope_pieces", "longrope2", "longrope2_released")


def get_config(arg=None):
  arg = config.arguments(arg, seed=0, steps=1500, runlocal=False)
  runs = dict(pretrain=presets.tiny_pretraining(100 if arg.runlocal else arg.steps))
  for scaling in ("none", "pi", "ntk", "yarn"):
    runs["untouched" if scaling == "none" else scaling] = c = extended()
    c.rope.scaling = scaling
  for method in (*METHODS, "gradient"):
    runs[method] = c = extended()
    c.rope.scaling = "longrope"
    c.search.method = method
    if arg.runlocal and method != "gradient":
      c.search[method].update(population=8, generations=2, mutations=4, crossovers=4, parents=4)
  # Five samples: 64 + 40 x 32 = 1,344 evaluations are three, 126 on the way, and 2,016 steps of
  # three passes of a fifth of the samples.
  gradient = runs["gradient"].search.gradient
  gradient.steps = 10 if arg.runlocal else 2016
  gradient.every = 5 if arg.runlocal else 16
  # The same budget again, from where evolution ended.
  runs["longrope_gradient"] = c = extended()
  c.rope.scaling = "longrope"
  c.search.method = "gradient"
  c.search.initial = "run:longrope_released"
  c.search.gradient.update(gradient)
  for c in runs.values():
    c.seed = arg.seed
  return config.comparison(**runs)


def extended():
  c = presets.tiny_extended("run:pretrain")
  c.evals.perplexity.num_samples = 128
  c.evals.perplexity.batch_size = 8
  return c
