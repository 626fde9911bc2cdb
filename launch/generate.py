"""Continues texts with the newest checkpoint of a workdir, greedily unless --temperature is given.

  python launch/generate.py --config=configs/quickstart.py --prompt="def main(" --max_new_tokens=40
  python launch/generate.py --config=configs/smollm2_16k.py:phase=none --prompt_file=BOOK.txt

Where the workdir holds no run, the model of config.init_from continues them. Each text and what
follows must fit in config.rope.context. Prints the end of each text, a bar, and what follows; of a
comparison, each run answers. Nothing is written.
"""

import os

import cli
from absl import flags

workdir_of = cli.define_workdir()
PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to continue; may be given several times.")
PROMPT_FILE = flags.DEFINE_multi_string(
  "prompt_file", [], "File with a text to continue; may be given several times."
)
NEW = flags.DEFINE_integer("max_new_tokens", 64, "Tokens of a continuation.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float(
  "temperature", 0.0, "Of the softmax; 0 takes the likeliest token.", lower_bound=0.0
)
TOP_P = flags.DEFINE_float(
  "top_p", 1.0, "Sample from the likeliest tokens that have this probability together.", 0.0, 1.0
)
SEED = flags.DEFINE_integer("seed", 0, "Of sampling.", lower_bound=0, upper_bound=2**32 - 1)


def main(c, config_name):
  from rope_jax.data import text_builder

  prompts = list(PROMPT.value)
  for path in PROMPT_FILE.value:
    if not os.path.exists(path):
      cli.fail(f"--prompt_file={path}: no such file")
    try:
      prompts.append(text_builder.read_text(path))
    except ValueError as error:
      cli.fail(f"--prompt_file={path!r}: {error}")
  if not all(prompts) or not prompts:
    cli.fail("--prompt: give a text to continue, or a file with one by --prompt_file")
  if not TOP_P.value:
    cli.fail("--top_p=0: expected a probability above 0")
  workdir, runs = workdir_of(config_name), cli.validated_runs(c)
  runs = cli.searched(runs, workdir)

  from rope_jax.train import loop  # after the checks: this is slow to import

  options = dict(temperature=TEMPERATURE.value, top_p=TOP_P.value, seed=SEED.value)
  for name, run in runs.items():
    found = cli.checked(
      name,
      lambda c, d: loop.generate(c, d, prompts, NEW.value, **options),
      run,
      cli.directory(workdir, name),
    )
    if cli.is_main():
      for prompt, text in zip(prompts, found):
        print(f"\n{f'== {name}: ' * bool(name)}{prompt[-200:]}|{text}", flush=True)


if __name__ == "__main__":
  cli.run(main)
