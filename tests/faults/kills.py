"""Commands that are killed at moments drawn from a seed end as those that are left alone.

Each function runs a command once undisturbed and once in `count` lives that end by SIGKILL,
compares all that the two leave (same.py), and returns figures. What differs is an AssertionError,
and the directory with both is kept and named.

That the data came in the same order follows from the rows: no two undisturbed steps have the same
loss and gradient norm, which is asserted, and the killed run has the same at each step to the last
bit. A step that had seen another batch would have others, and all steps after it other parameters.
"""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import same
import test_search_launch
import tiny
from strikes import Command, Life, Moment, Place

FIGURES = ("kills", "inside_a_save", "before_the_first_step", "in_an_evaluation", "restarts")
EVERY = 10  # steps between evaluations in the middle
CHECKPOINT, KEEP = 3, 2

TRAIN = """
import tiny
from rope_jax import config
def get_config():
  c = tiny.run_config({folder!r}, steps={steps})
  c.rope.update(context=128, scaling="yarn", phase="psc")
  c.lora.rank = 4
  c.train.trainable = "adapters"
  c.checkpoint.update(every={checkpoint}, keep={keep})
  c.evals.perplexity = config.perplexity(
    lengths=(64, 128), num_samples=4, stride=4, document_tokens=400, every_steps={every})
  return c
"""

EVALUATION = """
import tiny
from rope_jax import config
def get_config():
  c = tiny.run_config({folder!r}, steps=0)
  c.rope.update(context=1024, scaling="yarn")
  c.evals.perplexity = config.perplexity(
    lengths=(64, 128, 256), num_samples=8, stride=16, document_tokens=600)
  c.evals.needle = config.needle(lengths=(512,), num_samples=12)
  c.evals.passkey = config.passkey(lengths=(1024,), num_samples=20, batch_size=2)
  return c
"""


def train(seed: int, count: int, kinds: tuple[str, ...] = ()) -> dict:
  """launch/train.py, killed `count` times; `kinds` of moments instead of those of the seed.

  Lives without `kinds` begin with no prepared data and no compiled programs.
  """
  steps = max(24, 8 * count)
  options = dict(steps=steps, checkpoint=CHECKPOINT, keep=KEEP, every=EVERY)
  with _folder() as folder:
    command = Command("train", _config(folder, TRAIN, **options), partial(_training, steps))
    whole, cut = Place(folder / "whole"), Place(folder / "cut")
    seconds = command.whole(whole)
    steps_of = [row for row in same.rows(whole.workdir) if "loss" in row]
    differ = {(row["loss"], row["grad_norm"]) for row in steps_of}
    assert len(differ) == steps, "two steps have the same loss and gradient norm"
    rng = np.random.default_rng(seed)
    moments = _train_moments(rng, kinds or _kinds(rng, count), steps, seconds, whole, cut)
    figures = command.killed(cut, moments, whole.caches() if kinds else ())
    return _figures(figures, same.check(cut.workdir, whole.workdir))


def evaluation(seed: int, count: int, *, brief: bool = False, again: int | None = 2) -> dict:
  """launch/eval.py of three evaluations, killed `count` times at any time.

  Args:
    seed: of the moments.
    count: kills.
    brief: keeps prepared data and compiled programs of the undisturbed run.
    again: forward batches that each kill may cost, if it comes before the results; None: all.
  """
  with _folder() as folder:
    command = Command("eval", _config(folder, EVALUATION), _evaluating, count_passes=True)
    whole, cut = Place(folder / "whole"), Place(folder / "cut")
    seconds, rng = command.whole(whole), np.random.default_rng(seed)
    batches = whole.passed()
    # Of all batches where each life begins anew; where it does not, of its share.
    most = batches if again is None else 2 * batches // (count + 1)

    def moments() -> Iterator[Moment]:
      for i in range(count):
        if i % 4 == 0 and not brief:
          yield _at_touch(rng, whole, cut, _never, first=i == 0)
        elif i % 4 < 3:
          goal = cut.passed() + int(rng.integers(1, most))
          yield Moment("at_a_batch", partial(_passed, goal), float(rng.uniform(0, 0.02)))
        else:
          yield _at_time(rng.uniform(0, seconds / 2), _never)

    figures = command.killed(cut, moments(), whole.caches() if brief else ())
    batches_cut = cut.passed()
    if again is not None:
      # A life that came to its end is done; the next one evaluates anew.
      done = figures["restarts"] - figures["kills"] + figures.get("in_what_follows", 0)
      most = batches * (1 + done) + again * figures["kills"]
      assert batches_cut <= most, f"{batches_cut} batches; expected at most {most}"
    figures |= dict(batches=batches, batches_of_all_lives=batches_cut)
    return _figures(figures, same.check(cut.workdir, whole.workdir))


def search(seed: int, count: int) -> dict:
  """launch/search.py of a comparison of two searches, killed `count` times."""
  with _folder() as folder:
    whole, cut = Place(folder / "whole"), Place(folder / "cut")
    command = Command("search", _config(folder, test_search_launch.CONFIG), _searching)
    seconds = command.whole(whole)
    total, rng = _lines(whole.workdir), np.random.default_rng(seed)

    def moments() -> Iterator[Moment]:
      for i in range(count):
        goal = round(total * (i + 1) / (0.8 * count + 1))
        beyond = partial(_journal_has, min(goal, total))
        if i % 3 == 0:
          yield _at_touch(rng, whole, cut, partial(_journal_has, goal), first=i == 0)
        elif i % 3 == 1:
          yield Moment("at_a_line", beyond, float(rng.uniform(0, 0.05)))
        else:
          yield _at_time(rng.uniform(0, seconds), beyond)

    figures = command.killed(cut, moments())
    figures |= dict(lines=total)
    return _figures(figures, same.check(cut.workdir, whole.workdir))


# ---- Moments.


def _kinds(rng, count: int) -> list[str]:
  """Kinds of moments: of all that there are about as many each, those of the end last."""
  late = count // 4
  early = ["save", "touch", "steps", "touch", "evaluation", "save", "touch", "clock"]
  early = list(rng.permutation((early * count)[: max(0, count - late - 2)]))
  return ["touch"] * min(2, count - late) + early + [("final", "touch")[i % 2] for i in range(late)]


def _train_moments(rng, kinds, steps, seconds, whole: Place, cut: Place) -> Iterator[Moment]:
  early = len(kinds) - max(1, len(kinds) // 4)
  for i, kind in enumerate(kinds):
    goal = min(steps, round(steps * (i + 1) / (early + 1)))
    reached, late = partial(_reached, goal), goal == steps
    beyond = _wrote_results if late else partial(_reached, min(steps, goal + 2 * CHECKPOINT))
    if kind == "save":
      yield Moment("at_a_save", _both(reached, _saving), float(rng.uniform(0, 0.05)))
    elif kind == "steps":
      yield Moment("at_a_step", reached, float(rng.uniform(0, 0.15)))
    elif kind == "evaluation":
      due = partial(_reached, min(steps, -(-goal // EVERY) * EVERY))
      yield Moment("at_an_evaluation", _both(due, _due), float(rng.uniform(0, 0.4)))
    elif kind == "final":
      yield Moment("at_the_end", partial(_ending, steps), float(rng.uniform(0, 0.5)))
    elif kind == "removal":
      ready = _both(partial(_saved, steps), _removing)
      yield Moment("at_a_removal", ready)
    elif kind == "touch":
      yield _at_touch(rng, whole, cut, beyond, first=i < 3)
    else:
      yield _at_time(rng.uniform(0, seconds), beyond)


def _at_touch(rng, whole: Place, cut: Place, ready, *, first: bool) -> Moment:
  """At a touch of any file that this command has touched so far, in one life or the other.

  Only the first lives prepare data and compile: theirs are the caches, and later ones' the rest.
  """
  names = whole.touches() + (cut.touches() if cut.touched.exists() else [])
  of_caches = [name.split()[1].startswith(("data", "programs")) for name in names]
  names = [name for name, cache in zip(names, of_caches) if cache == first]
  name = str(rng.choice(list(dict.fromkeys(names))))
  nth = int(rng.integers(1, 40 if "INSIDE" in name else 4)) if "checkpoints/" in name else 1
  delay = float(rng.choice([0, rng.uniform(0, 0.003)]))
  return Moment("at_a_step", ready, touch=dict(name=name, nth=nth, delay=delay))


def _at_time(seconds: float, or_when) -> Moment:
  """At a time of the life, or before it when there would be too little left for the next lives."""
  return Moment("at_a_time", lambda life: life.seconds > seconds or or_when(life))


def _never(life: Life) -> bool:
  return False


def _both(a, b):
  return lambda life: a(life) and b(life)


# ---- What can be seen of a life from outside.


def _last_row(workdir: Path) -> dict:
  """The newest whole row of metrics.jsonl, or that of a run that has not begun."""
  try:
    whole = (workdir / "metrics.jsonl").read_text().split("\n")[:-1]
  except FileNotFoundError:
    whole = []
  return json.loads(whole[-1]) if whole else dict(step=0)


def _begun(life: Life) -> bool:
  """It has read what there was; before, the rows and the directories are of earlier lives."""
  return "workdir:" in life.output


def _reached(step: int, life: Life) -> bool:
  return _begun(life) and _last_row(life.place.workdir)["step"] >= step


def _due(life: Life) -> bool:
  """An evaluation in the middle is on: the row of its step is there, and its own is not."""
  row = _last_row(life.place.workdir)
  return "loss" in row and row["step"] % EVERY == 0


def _saving(life: Life) -> bool:
  return _begun(life) and any(life.place.workdir.glob("**/checkpoints/*orbax-checkpoint-tmp*"))


def _saved(steps: int, life: Life) -> bool:
  """The checkpoint after the last step is whole."""
  return (life.place.workdir / "checkpoints" / str(steps)).is_dir()


def _removing(life: Life) -> bool:
  """Older checkpoints than are to be kept are still there."""
  kept = life.place.workdir.glob("checkpoints/*")
  return sum(p.name.isdigit() for p in kept) > KEEP


def _ending(steps: int, life: Life) -> bool:
  """All is saved, by this life or an earlier one: the evaluations of the end are on."""
  return _begun(life) and _saved(steps, life) and not _removing(life)


def _wrote_results(life: Life) -> bool:
  return "perplexity at" in life.output


def _passed(batches: int, life: Life) -> bool:
  return life.place.passed() >= batches


def _lines(workdir: Path) -> int:
  """Whole lines of all journals of searches."""
  return sum(p.read_text().count("\n") for p in workdir.glob("*/search.jsonl"))


def _journal_has(lines: int, life: Life) -> bool:
  return _lines(life.place.workdir) >= lines


def _training(steps: int, life: Life) -> str:
  """What a killed life of a training run was doing."""
  output = life.output
  if _saving(life):
    return "inside_a_save"
  if _wrote_results(life):
    return "in_what_follows"
  if _ending(steps, life) or (_begun(life) and _due(life)):
    return "in_an_evaluation"
  return "between_steps" if "\nstep " in output else "before_the_first_step"


def _evaluating(life: Life) -> str:
  if "model:" not in life.output:
    return "before_the_first_step"
  return "in_what_follows" if "perplexity: " in life.output else "in_an_evaluation"  # the last


def _searching(life: Life) -> str:
  if _saving(life):
    return "inside_a_save"
  parts = life.output.rsplit("\nsearch: ", 1)
  if len(parts) == 1:
    return "between_steps" if "\nstep " in parts[0] else "before_the_first_step"
  return "in_what_follows" if "factors: " in parts[1] else "in_a_search"


# ---- What all three share.


def _config(folder: Path, text: str, **options) -> Path:
  path = folder / "experiment.py"
  path.write_text(text.format(folder=tiny.text_folder(folder / "text"), **options))
  return path


@contextlib.contextmanager
def _folder():
  """A directory that goes when all was the same, and stays for a look when it was not."""
  folder = Path(tempfile.mkdtemp(prefix="kills-"))
  try:
    yield folder
  except BaseException as error:
    error.add_note(f"what the runs have left: {folder}")
    raise
  shutil.rmtree(folder)


def _figures(killed: dict, compared: dict) -> dict:
  return dict.fromkeys(FIGURES, 0) | killed | compared
