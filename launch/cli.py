"""What the entry points share: the flag --config, errors as one line, and exit codes.

0  done
2  bad input: another command is needed
3  numbers that are not finite, and the run gave up
74 the disk: full, read-only, or a file cannot be written; the same command goes on
75 preempted: the same command goes on (rope_jax/train/preemption.py)
"""

import ast
import contextlib
import errno
import functools
import hashlib
import importlib.util
import os
import platform
import re
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from rope_jax.errors import DiskError, Preempted

_NUMBERS, _DISK = 3, 74
_NEEDED = {}  # flag that must be given: an example of it
flags.disclaim_key_flags()  # --help lists what is defined here with what asks for it


def define_config():
  """Defines --config, for entry points that can do without; `run` does it for all others."""
  return config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file, with ':arguments' if it takes any (docs/configs.md). Any key of it can be set: "
    "--config.train.steps=100",
  )


def need(flag: str, example: str) -> None:
  """Says that a flag must be given."""
  _NEEDED.setdefault(flag, example)


def run(main) -> None:
  """Parses the flags and calls main(config, name of the config); bad input exits with 2."""
  config = define_config()
  need("config", "configs/quickstart.py")

  def call(argv):
    if len(argv) > 1:
      fail(f"unexpected arguments: {argv[1:]}")
    file, arguments = _config_argument()
    name = os.path.splitext(os.path.basename(file))[0]
    main(config.value, "-".join(filter(None, [name, arguments.replace(os.sep, "_")])))

  start(call)


def start(main) -> None:
  """Calls main(arguments), where --config may be left out; bad input exits with 2."""
  # Libraries' chatter: what is an error they raise, too. Our own output is printed.
  logging.set_verbosity(logging.FATAL)
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _programs())  # jax is not imported yet
  try:
    app.run(main, flags_parser=parse)
  except FloatingPointError as error:
    fail(error, _NUMBERS)
  except ValueError as error:
    if not re.search(r"config\.|--\w+", str(error)):
      raise  # not of the user's making: a bug, with its traceback
    fail(error)
  except Preempted as error:
    fail(f"preempted: {error}", Preempted.EXIT_CODE)
  except DiskError as error:
    with contextlib.suppress(SystemExit):
      fail(error, _DISK)
    os._exit(_DISK)  # what was still being written would only say at length that it cannot be
  except BrokenPipeError:  # e.g. piped into head
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
      raise
    fail(f"{error.filename or 'a file'} cannot be written: {error.strerror}", _DISK)


def runs_of(c) -> dict:
  """The runs of a config by name."""
  from rope_jax import config

  return config.runs(c)


def validated_runs(c, platform: str | None = None, runs: dict | None = None) -> dict:
  """The runs of a config by name, all checked before the first one starts.

  `platform` is that for which they are checked, without weights or text; if None, the one of this
  process, which joins the others of its run if there are any. `runs`: some of them, instead of all.
  """
  from rope_jax import validate
  from rope_jax.train import multihost, preemption

  if platform is None:
    multihost.initialize()
    preemption.install()
  runs = runs_of(c) if runs is None else runs
  for name, run in runs.items():
    checked(name, functools.partial(validate.validate, inputs=platform is None), run, platform)
  return runs


def checked(name: str, function, *args):
  """Calls the function; an error says which run of a comparison it is from."""
  try:
    return function(*args)
  except ValueError as error:
    message = re.sub(
      r"\bconfig\.(?!json)", f"config.runs.{name}." if name else "config.", str(error)
    )
    raise ValueError(message) from error


def searched(runs: dict, workdir: str) -> dict:
  """The runs, with the factors that launch/search.py has found for those that search."""
  from rope_jax.search import settings

  return {
    name: checked(name, settings.searched, run, directory(workdir, name))
    for name, run in runs.items()
  }


def is_main() -> bool:
  """Whether this process, of all that run the same, writes files and prints tables."""
  from rope_jax.train import multihost

  return multihost.is_main()


def directory(workdir: str, name: str) -> str:
  """Where a run of a comparison lives; a run alone lives in the workdir itself."""
  return os.path.join(workdir, name) if name else workdir


def define_workdir():
  """Defines --workdir; call the result with the config's name for the directory."""
  flag = flags.DEFINE_string("workdir", "", "Directory of the run; runs/CONFIG if not given.")

  def workdir(config_name):
    if flag.value.startswith("gs://"):
      fail(f"--workdir={flag.value}: mount the bucket (gcsfuse) and give the directory")
    check_directory("workdir", flag.value)
    return flag.value or os.path.join("runs", config_name)

  return workdir


def check_directory(flag: str, path: str) -> None:
  """Exits with 2 where a flag names what cannot be a directory; '' names none."""
  from rope_jax import paths

  why_not = path and paths.why_no_directory(path)
  if why_not:
    fail(f"--{flag}={path!r}: {why_not}")


def define_report():
  """Defines --report; its value is whether to write DIR/report.html."""
  return flags.DEFINE_bool("report", False, "Write WORKDIR/report.html, all results on one page.")


def define_profile():
  """Defines --profile; its value is whether to write DIR/profile, docs/performance.md."""
  return flags.DEFINE_bool(
    "profile",
    False,
    "Trace two steps, or a forward pass; where their time went is in WORKDIR/profile.txt.",
  )


def finish(results: dict, runs: dict, workdir: str, html: bool) -> None:
  """Shows the results of the run, or of each run by name: on the screen, as files in the workdir.

  Args:
    results: {run: {evaluation: ...}}.
    runs: their configs by name.
    workdir: gets results.json, a figure of each evaluation by length, and another by depth.
    html: whether it gets report.html, too.
  """
  from rope_jax import config, figures, report

  print("\n" + report.table(results))
  paths = [os.path.join(workdir, "results.json")]
  config.write_json(paths[0], results.get("", results))
  contexts = [run.rope.original_context for run in runs.values()]
  paths += figures.write(results, workdir, original_contexts=contexts)
  if html:
    from rope_jax import html as html_lib

    paths.append(os.path.join(workdir, "report.html"))
    html_lib.write([workdir], paths[-1])
  print("\n" + "\n".join(paths))


def _programs() -> str:
  """Where compiled programs are kept for the next start; another directory for another machine.

  Programs for a CPU are made of its instructions, and many machines may share a home.
  """
  try:
    with open("/proc/cpuinfo", encoding="utf-8") as f:
      cpu = next((line for line in f if line.startswith(("flags", "Features"))), "")
  except OSError:
    cpu = platform.processor()
  home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
  name = f"{platform.machine()}-{hashlib.sha256(cpu.encode()).hexdigest()[:8]}"
  return os.path.join(home, "rope_jax", "programs", name)


def _config_argument() -> tuple[str, str]:
  """FILE and ARGUMENTS of --config=FILE:ARGUMENTS."""
  for arg, following in zip(sys.argv[1:], [*sys.argv[2:], ""]):
    flag, _, value = arg.partition("=")
    if flag.lstrip("-") == "config" and arg.startswith("-"):
      file, _, arguments = (value or following).partition(":")
      return file, arguments
  return "", ""


def parse(argv):
  """Parses the flags; bad ones exit with 2."""
  file, _ = _config_argument()
  if file and not os.path.isfile(file):
    fail(f"--config={file}: no such file")
  if "--help" in argv[1:]:  # absl would exit with 1
    app.usage(shorthelp=True, writeto_stdout=True, exitcode=0)
  try:
    rest = flags.FLAGS(argv)
    missing = [f"--{flag}={example}" for flag, example in _NEEDED.items()
               if flags.FLAGS[flag].value is None]  # fmt: skip
    if missing:
      fail(f"give {' '.join(missing)}, for example; --help says more")
    return rest
  except flags.Error as error:
    fail(error)
  except (AttributeError, IndexError, KeyError, MemoryError, OSError, OverflowError, RecursionError,
          SyntaxError, TypeError, ValueError) as error:  # fmt: skip
    fail(_of_overrides(argv, error))


def _of_overrides(argv: list[str], error: Exception) -> str:
  """What is wrong with a key or a value of the config that was given on the command line.

  ml_collections raises errors of many types for a key that is not there, a value of another type,
  or one that Python cannot read; they do not say where in the config the key was looked for.
  """
  said = str(error.args[0]) if error.args else str(error)
  with contextlib.suppress(SyntaxError, ValueError):
    said = str(ast.literal_eval(said))  # an error in an error comes quoted
  said = re.sub(r"\s*\n\s*", ": ", said)
  keys = {arg: re.match(r"--?config\.([\w.]+)", arg) for arg in argv[1:]}
  given = {arg: key[1].split(".") for arg, key in keys.items() if key}
  if isinstance(error, KeyError) and (names := _names_of_runs()):
    for arg, key in given.items():
      if key[0] not in ("runs", "order") or (key[0] == "runs" and key[1:2] and key[1] not in names):
        known = ", ".join(names)
        return f"{arg}: the config is a comparison: --config.runs.NAME.KEY, NAME one of {known}"
  named = [arg for arg, key in given.items() if key[-1] in said]
  return f"{named[0]}: {said}" if named else said


def _names_of_runs() -> list[str]:
  """The runs of the comparison that --config names; none if it is no comparison."""
  file, arguments = _config_argument()
  spec = importlib.util.spec_from_file_location("config", file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  c = module.get_config(*[arguments] * bool(arguments))
  return list(c.get("runs", ()))


def fail(error, code: int = 2) -> None:
  """Prints an error in one line and exits with a code."""
  # An error inside a config file comes wrapped in its whole traceback; the last line is the error.
  text = str(error).strip()
  text = text.splitlines()[-1] if "Traceback (most" in text else r"\n".join(text.splitlines())
  print(f"error: {text}", file=sys.stderr)
  sys.exit(code)
