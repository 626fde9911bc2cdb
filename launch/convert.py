"""Checkpoints in and out: what one holds, and runs as directories that others load.

  python launch/convert.py show CHECKPOINT
  python launch/convert.py export --workdir=DIR --out=OUT [--format=peft] [--dtype=bfloat16]
  python launch/convert.py export --config=configs/smollm2_16k.py --out=OUT
  python launch/convert.py verify OUT [--tokens=16384] [--text=FILE]
  python launch/convert.py import CHECKPOINT --out=OUT

CHECKPOINT is a Hugging Face directory, a .gguf file or a packaged checkpoint (smollm2-135m). `show`
prints its architecture, its own rope, and the lines of a config that extends it.

`export` writes the newest checkpoint of a run (of one run of a comparison: --workdir=DIR/NAME), or,
with --config and no run, the model of config.init_from with the rope of the config. 'hf', the
default, is a whole model for transformers, LoRA merged; PSC comes with its modelling file. 'peft'
is LoRA alone. The directory has a model card, and rope_jax.json with the resolved rope, the config
and the results. It appears when all of it is written.

`verify` runs an export in transformers and in rope_jax on the same text and compares perplexities
and the losses of single tokens; it needs PyTorch and transformers.

`import` writes a checkpoint as it is, dequantised, as a Hugging Face directory. To train from a
checkpoint it need not be imported: config.init_from reads all of these.
"""

import json
import os

import cli
from absl import flags

CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string("workdir", "", "With export: directory of the run.")
OUT = flags.DEFINE_string("out", "", "With export, import: directory to make.")
FORMAT = flags.DEFINE_enum(
  "format", "hf", ["hf", "peft"], "With export: a whole model, or LoRA alone."
)
DTYPE = flags.DEFINE_enum(
  "dtype", "", ["", "float32", "bfloat16"], "Of the weights; as in the run or file if not given."
)
STEP = flags.DEFINE_integer(
  "step", None, "With export: of the checkpoint; the newest if not given."
)
FREEZE = flags.DEFINE_bool(
  "freeze", False, "With export: write a rope that depends on the length as it is at rope.context."
)
BASE_MODEL = flags.DEFINE_string(
  "base_model", "", "What to call the base model, e.g. org/name on a hub; config.init_from."
)
SHARD_GB = flags.DEFINE_float("shard_gb", 5.0, "Largest file of weights, 10^9 bytes.", 1e-6)
TOKENIZER = flags.DEFINE_bool("tokenizer", True, "Export the tokenizer, too.")
TOKENS = flags.DEFINE_integer("tokens", 2048, "With verify: how many of the text.", lower_bound=2)
TEXT = flags.DEFINE_string("text", "", "With verify: a file; the prose of Python's manual if none.")
JSON = flags.DEFINE_bool("json", False, "With show: print one JSON object and nothing else.")


def main(argv):
  command, *rest = argv[1:] or [""]
  if command not in COMMANDS:
    cli.fail(f"{command or 'no command'}: expected one of {', '.join(COMMANDS)}; --help says more")
  function, used = COMMANDS[command]
  given = [n for n in OWN_FLAGS if flags.FLAGS[n].present and n not in used]
  if given:
    cli.fail(f"--{given[0]}: {command} does not use it")
  cli.check_directory("workdir", WORKDIR.value)
  if not os.path.lexists(OUT.value):  # what is there is refused later
    cli.check_directory("out", OUT.value)
  function(rest)


def show(arguments):
  from rope_jax.weights import summary

  described = _of_checkpoint(summary.describe, _one(arguments, "show"))
  print(json.dumps(described, indent=1) if JSON.value else summary.text(described))


def export(arguments):
  if arguments:
    cli.fail(f"export: unexpected arguments {arguments}; it takes --workdir or --config")
  from rope_jax import config

  if CONFIG.value is not None:
    runs = cli.runs_of(CONFIG.value)
    if list(runs) != [""]:
      cli.fail(f"--config: a comparison of {', '.join(runs)}; export one, by --workdir=DIR/NAME")
    runs = cli.searched(runs, WORKDIR.value) if WORKDIR.value else runs
    c = runs[""]
  elif WORKDIR.value:
    try:
      c = config.read(WORKDIR.value)
    except ValueError as error:
      cli.fail(f"--workdir={WORKDIR.value}: {error}")
  else:
    cli.fail("export: give --workdir of a run, or --config")
  _write(c, WORKDIR.value)


def verify(arguments):
  from rope_jax.export import verify as verify_lib

  path = _one(arguments, "verify")
  found = _of_checkpoint(lambda p: verify_lib.verify(p, TOKENS.value, TEXT.value), path)
  print(
    f"perplexity of {found['tokens']:,} tokens: rope_jax {found['ours']:.5f}, transformers "
    f"{found['theirs']:.5f} (ratio {found['theirs'] / found['ours']:.6f}); largest difference of "
    f"a token's loss {found['difference']:.2e} nats"
  )


def import_(arguments):
  from rope_jax import presets
  from rope_jax.weights.source import open_source

  path = _one(arguments, "import")
  c = _of_checkpoint(presets.pretrained, path)
  c.model.param_dtype = open_source(path).dtype
  _write(c, "")


def _one(arguments, command) -> str:
  if len(arguments) != 1:
    cli.fail(f"{command}: name one checkpoint")
  return arguments[0]


def _of_checkpoint(function, path: str):
  try:
    return function(path)
  except ValueError as error:
    cli.fail(f"{path}: {error}".replace(f"{path}: {path}: ", f"{path}: "))


def _write(c, workdir: str):
  if not OUT.value:
    cli.fail("--out: name the directory to make")
  from rope_jax import export as export_lib
  from rope_jax import validate
  from rope_jax.train import multihost

  multihost.initialize()
  validate.validate(c, inputs=False)  # the text that it was trained on need not be here
  made = export_lib.export(
    c,
    workdir,
    OUT.value,
    format=FORMAT.value,
    dtype=DTYPE.value,
    step=STEP.value,
    freeze=FREEZE.value,
    base_model=BASE_MODEL.value,
    with_tokenizer=TOKENIZER.value,
    shard_bytes=int(SHARD_GB.value * 10**9),
  )
  if cli.is_main():
    print(f"{made['bytes']:,} bytes of weights, {made['facts']['dtype']}, in {made['out']}:")
    print("  " + "  ".join(sorted(made["files"])))


_WRITING = ("out", "dtype", "base_model", "shard_gb", "tokenizer")
COMMANDS = {
  "show": (show, ("json",)),
  "export": (export, ("config", "workdir", "format", "step", "freeze", *_WRITING)),
  "verify": (verify, ("tokens", "text")),
  "import": (import_, _WRITING),
}
OWN_FLAGS = {name for _, used in COMMANDS.values() for name in used}

if __name__ == "__main__":
  cli.start(main)
