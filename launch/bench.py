"""Times ours against transformers on PyTorch, on this machine's CPU, and prints tables of ratios.

  python launch/bench.py                                   # all parts, on SmolLM2-135M
  python launch/bench.py --parts=forward,train --lengths=2048,4096 --output=docs/performance.md
  python launch/bench.py --model=tiny --lengths=128,256 --memory_lengths=128,256

It needs `pip install -e '.[peer]'`, or --nopeer for ours alone. All parts take long; the progress
lines say how far it is. Each measurement is written to WORKDIR/bench.json when it is made; the same
command goes on where it was cut off. Results of changed code need --again: only versions are
compared. docs/performance.md says what is measured.
"""

import cli
from absl import app, flags

PARTS = flags.DEFINE_list(
  "parts",
  ["limits", "forward", "train", "overhead", "generate", "memory", "compile"],
  "What to measure.",
)
LENGTHS = flags.DEFINE_list("lengths", ["2048", "4096", "8192", "16384"], "Tokens of a sequence.")
TRAIN_LENGTHS = flags.DEFINE_list(
  "train_lengths", None, "Tokens of a training step; default: those of --lengths up to 8192."
)
DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Dtypes of weights and products.")
REPEATS = flags.DEFINE_integer("repeats", 2, "Processes of each; the best counts.", lower_bound=1)
MODEL = flags.DEFINE_enum("model", "smollm2", ["smollm2", "tiny"], "SmolLM2-135M, or a toy.")
MEMORY_LENGTHS = flags.DEFINE_list(
  "memory_lengths", ["8192", "16384", "32768", "65536"], "Tokens of a sequence in the part memory."
)
PEER = flags.DEFINE_bool("peer", True, "Measure transformers, too.")
WORKDIR = flags.DEFINE_string("workdir", "runs/bench", "Directory of bench.json.")
OUTPUT = flags.DEFINE_string(
  "output", "", "Markdown file whose lines <!-- bench --> and <!-- /bench --> get the tables."
)
AGAIN = flags.DEFINE_bool("again", False, "Measure again what bench.json has.")


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")

  cli.check_directory("workdir", WORKDIR.value)
  from rope_jax import bench
  from rope_jax.bench import document, process, table

  settings = bench.settings(
    parts=PARTS.value,
    lengths=LENGTHS.value,
    train_lengths=TRAIN_LENGTHS.value,
    dtypes=DTYPES.value,
    repeats=REPEATS.value,
    model=MODEL.value,
    memory_lengths=MEMORY_LENGTHS.value,
    peer=PEER.value,
  )
  process.check(settings)
  if OUTPUT.value:
    document.check(OUTPUT.value)
  journal, planned = process.Journal(WORKDIR.value, settings.peer), bench.plan(settings)
  if AGAIN.value:
    journal.forget(planned)
  process.measure(planned, journal)
  text = table.tables(settings, journal)
  print("\n" + text)
  if OUTPUT.value:
    document.replace(OUTPUT.value, text)
  print("\n" + "\n".join(filter(None, [journal.path, OUTPUT.value])))


if __name__ == "__main__":
  cli.start(main)
