"""Writes the results of runs and comparisons, side by side, as one HTML file.

  python launch/report.py runs/quickstart runs/smooth --output=report.html

Each argument is the workdir of launch/train.py or launch/eval.py, of a run or a comparison. The
page needs no network; links to it may hide runs: report.html#hide=NAME&hide=OTHER
"""

import cli
from absl import app, flags

OUTPUT = flags.DEFINE_string(
  "output", "report.html", "File to write; one that is there is replaced."
)


def main(argv):
  from rope_jax import html

  if len(argv) == 1:
    cli.fail("name the workdirs: launch/report.py DIR [DIR ...]")
  try:
    html.write(argv[1:], OUTPUT.value)
  except ValueError as error:
    cli.fail(error)
  except OSError as error:
    cli.fail(f"--output={OUTPUT.value}: {error.strerror}")
  print(OUTPUT.value)


if __name__ == "__main__":
  app.run(main, flags_parser=cli.parse)
