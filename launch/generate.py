"""Continues a text with the newest checkpoint of a workdir.

  python launch/generate.py --config=configs/smollm2_16k.py:scaling=yarn --workdir=DIR \\
    --prompt="The capital of France is"

Where the workdir holds no run, the model of config.init_from continues it. --prompt may be given
several times; --prompt_file names files with long ones. Of a comparison, each run answers.
"""

import os

import cli
from absl import flags

workdir_of = cli.define_workdir()
PROMPT = flags.DEFINE_multi_string("prompt", [], "A text to continue.")
PROMPT_FILE = flags.DEFINE_multi_string("prompt_file", [], "A file with a text to continue.")
NEW = flags.DEFINE_integer("max_new_tokens", 64, "Tokens of a continuation.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0: the likeliest token.", lower_bound=0.0)
TOP_P = flags.DEFINE_float(
  "top_p", 1.0, "Sample from the likeliest tokens of this probability together.", 0.0, 1.0
)
SEED = flags.DEFINE_integer("seed", 0, "Of the samples.", lower_bound=0, upper_bound=2**32 - 1)


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
