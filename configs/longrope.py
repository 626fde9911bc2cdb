"""LongRoPE's recipe (arXiv 2402.13753): Llama-2 7B to 2,097,152 tokens, in three extensions.

  python launch/search.py --config=configs/longrope.py --config.runs.to_128k.init_from=DIR \
    --config.runs.to_256k.search.init_from=DIR --workdir=runs/longrope

Factors for 128k and 256k are searched on the base model; it is trained 400 steps with the first and
600 more with the second; factors for 2,048k, which multiply those for 256k, are searched on the
result and not trained. At last the factors for 4k are searched anew, for what extension costs at
short lengths. The paper: three days of an A100 for a search, a week of eight for the first
training; for its fine-tuning text, a sample of RedPajama, PG-19 stands in. Deviation:
the paper has a second short list, for 8k. `runlocal` is the same with factors 2, 4 and 8, on a
tiny model that it trains first: minutes on a laptop.
"""

from rope_jax import config, presets


def get_config(arg=None):
  arg = config.arguments(arg, runlocal=False)
  base = tiny if arg.runlocal else llama2
  original, less = (128, 16) if arg.runlocal else (4096, 1)
  first, second, third = (2, 4, 8) if arg.runlocal else (32, 64, 512)
  runs = {}
  if arg.runlocal:
    runs["pretrain"] = presets.tiny_pretraining(200)
  start = "run:pretrain" if arg.runlocal else "Llama-2-7b-hf"
  for name, factor, source, train in (
    ("to_128k", first, start, 400),
    ("to_256k", second, "run:to_128k", 600),
    ("to_2m", third, "run:to_256k", 0),
    ("recovered", third, "run:to_256k", 0),
  ):
    runs[name] = c = base()
    c.init_from = source
    c.rope.context = original * factor
    c.rope.scaling = "longrope"
    c.train.steps = train // less
    c.search.method = "longrope"
    # n-hat brings nothing at 2,048k, and no other library has it.
    c.search.longrope.start_tokens = (0,)
    if arg.runlocal:
      c.search.longrope.update(population=8, generations=3, mutations=4, crossovers=4, parents=4)
    elif factor == third:
      c.search.longrope.update(population=32, mutations=8, crossovers=8, parents=16)
      c.search.fitness.num_samples = 3
    c.evals.perplexity.lengths = (original, original * factor)
  runs["to_256k"].search.init_from = start
  runs["to_2m"].search.base = "run:to_256k"
  runs["recovered"].search.update(factors="short", base="run:to_2m")
  runs["recovered"].search.fitness.num_samples = 5
  return config.comparison(**runs)


def llama2():
  c = config.base()
  presets.llama2_7b(c)
  c.seed = 42
  c.data.source = "tfds:pg19"
  c.search.fitness.files = "tfds:pg19/validation"
  c.train.update(batch_size=32, accumulation=4, learning_rate=2e-5, schedule="linear",
                 warmup_steps=20, b2=0.95)  # fmt: skip
  c.model.param_dtype = "float32"  # all of it is trained
  c.mesh.update(data=1, fsdp=8, context=-1)
  c.model.update(attention="splash", context_parallel="ring")
  c.evals.perplexity = config.perplexity(
    files="tfds:pg19/test", protocol="truncate", num_samples=5, batch_size=1
  )
  return c


def tiny():
  c = presets.tiny()
  c.train.update(batch_size=2, learning_rate=3e-4)
  c.evals.perplexity = config.perplexity(protocol="truncate", num_samples=16, batch_size=4)
  return c
