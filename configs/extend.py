"""Any checkpoint of the Llama family to a longer context: Llama, Mistral, Qwen2, Qwen3, Phi-3.

  python launch/train.py --config=configs/extend.py:init_from=DIR,context=65536 --workdir=runs/long

DIR is a Hugging Face directory, a .gguf file or a packaged checkpoint; its architecture and its own
rope are read from it, and a rope that is scaled already is extended further. The recipe is that of
PSC (rope_jax/presets.py) for TPU slices of a multiple of 8 devices. Arguments: init_from, context
(tokens; four times its own if 0), scaling, phase, rank of the LoRA, and runlocal: ten steps of 512
tokens on the sources of Python's standard library, on any machine. Afterwards:

  python launch/convert.py export --workdir=runs/long --out=DIR-long
"""

from rope_jax import config, presets


def get_config(arg=None):
  arg = config.arguments(
    arg, init_from="smollm2-135m", context=0, scaling="yarn", phase="none", rank=8, runlocal=False
  )
  c = presets.pretrained(arg.init_from, extend=True)
  presets.psc_recipe(c)
  c.rope.context = arg.context or 4 * c.rope.original_context
  c.rope.scaling = arg.scaling
  c.rope.phase = arg.phase
  c.lora.rank = arg.rank
  c.lora.alpha = 2.0 * arg.rank
  lengths = (c.rope.original_context, c.rope.context)
  if arg.runlocal:
    c.data.update(source="stdlib", length=512)
    c.train.update(steps=10, batch_size=1, warmup_steps=2, log_every=1)
    lengths = (512,)
  else:
    c.model.update(dtype="bfloat16", param_dtype="bfloat16", attention="splash")
    c.model.context_parallel = "all_gather" if c.model.window else "ring"
    c.mesh.update(data=1, fsdp=8, context=-1)
    c.train.accumulation = 2
  c.evals.perplexity = config.perplexity(lengths=lengths, protocol="truncate", num_samples=4)
  return c
