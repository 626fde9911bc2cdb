"""An evaluation that is cut off goes on where it was, and ends with the same numbers."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
import tiny
from conftest import ROOT

from rope_jax import config
from rope_jax.train import answers as answers_lib
from rope_jax.train import loop, preemption
from rope_jax.train.answers import Answers


def ask(answers, question, value):
  """The answer, and whether it was computed."""
  computed = []
  found = answers.ask(question, lambda: computed.append(1) or np.asarray(value))
  return found, bool(computed)


QUESTIONS = [
  (["losses", np.arange(6, dtype=np.int32).reshape(2, 3), 64], np.float32([[0.1, np.nan], [2, 3]])),
  (["losses", np.arange(6, dtype=np.int32).reshape(2, 3), 65], np.float32([[5, 6], [7, 8]])),
  (["losses", np.arange(6, dtype=np.int32).reshape(3, 2), 64], np.float32([1])),
  (["generate", np.arange(3), 4, [1], [("seed", 2)]], np.int32([[2, 5, 6, 0]])),
  (["generate", np.arange(3), 4, [1], [("seed", 3)]], np.int32([[0, 0, 0, 0]])),
  (["predictions", np.zeros((2, 0), np.int32), 1], np.zeros((2, 0), np.int32)),
]


def filled(path, identity="x"):
  answers = Answers(str(path), identity)
  for question, value in QUESTIONS:
    found, computed = ask(answers, question, value)
    assert computed
    np.testing.assert_array_equal(found, value)
  answers.close()
  return path.read_bytes()


def test_what_was_answered_is_not_computed_again(tmp_path):
  filled(tmp_path / "a")
  again = Answers(str(tmp_path / "a"), "x")
  assert again.kept == len(QUESTIONS)
  for question, value in reversed(QUESTIONS):  # in any order
    found, computed = ask(again, question, None)
    assert not computed and found.dtype == value.dtype
    np.testing.assert_array_equal(found, value)


def test_a_question_that_comes_twice_has_two_answers(tmp_path):
  question = QUESTIONS[0][0]
  first = Answers(str(tmp_path / "a"), "x")
  for value in (1.0, 2.0):
    ask(first, question, value)
  first.close()
  again = Answers(str(tmp_path / "a"), "x")
  assert [float(ask(again, question, 9.0)[0]) for _ in range(3)] == [1.0, 2.0, 9.0]


def test_another_identity_begins_anew(tmp_path):
  filled(tmp_path / "a")
  other = Answers(str(tmp_path / "a"), "y")
  assert other.kept == 0 and ask(other, *QUESTIONS[0])[1]
  other.close()
  assert Answers(str(tmp_path / "a"), "x").kept == 0


def test_a_file_cut_anywhere_or_with_a_flipped_bit_gives_no_wrong_answer(tmp_path):
  data = filled(tmp_path / "a")
  rng = np.random.default_rng(0)
  kept = set()
  damaged = [data[:n] for n in range(0, len(data), 5)]
  for _ in range(100):
    changed = bytearray(data)
    changed[rng.integers(len(data))] ^= 1 << rng.integers(8)
    damaged.append(bytes(changed))
  for content in damaged:
    (tmp_path / "a").write_bytes(content)
    answers = Answers(str(tmp_path / "a"), "x")
    kept.add(answers.kept)
    for question, value in QUESTIONS:
      np.testing.assert_array_equal(ask(answers, question, value)[0], value)
    answers.close()
    whole = Answers(str(tmp_path / "a"), "x")
    assert whole.kept == len(QUESTIONS)  # what was cut was written again
    whole.close()
  assert kept == set(range(len(QUESTIONS)))


# ---- Evaluations of runs.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tiny.text_folder(tmp_path_factory.mktemp("text"))


def long_config(folder, **train):
  c = tiny.run_config(folder, **train)
  c.evals.passkey = config.passkey(lengths=(512,), num_samples=4, batch_size=2, max_new_tokens=3)
  c.rope.update(original_context=64, context=512, scaling="yarn")
  c.data.length = 64
  return c


class Killed(BaseException):
  pass


def killed_after(monkeypatch, count):
  """Ends everything at the count-th answer that is computed; a list of all that are."""
  computed, real = [], Answers.ask

  def dying(self, question, answer):
    def call():
      if len(computed) == count:
        raise Killed
      computed.append(question[0])
      return answer()

    return real(self, question, call)

  monkeypatch.setattr(Answers, "ask", dying)
  return computed


def test_an_evaluation_goes_on_where_it_was_killed(tmp_path, folder, monkeypatch, capsys):
  c = long_config(folder, steps=0)
  with monkeypatch.context() as patch:
    asked = killed_after(patch, None)
    whole = loop.evaluate(c, str(tmp_path / "whole"))
  assert not list((tmp_path / "whole").glob(".*.answers"))  # they were for this only
  total, made = len(asked), 0
  assert total >= 10 and set(asked) == {"losses", "generate"}
  for count in (3, 5, 1):
    with monkeypatch.context() as patch:
      asked = killed_after(patch, count)
      with pytest.raises(Killed):
        loop.evaluate(c, str(tmp_path / "cut"))
    made += len(asked)
  with monkeypatch.context() as patch:
    asked = killed_after(patch, None)
    assert loop.evaluate(c, str(tmp_path / "cut")) == whole
  assert made + len(asked) == total  # nothing twice
  assert f"evaluations: {made} answers of the model are there already" in capsys.readouterr().out
  results = [(tmp_path / d / "results.json").read_bytes() for d in ("whole", "cut")]
  assert results[0] == results[1]


def test_answers_are_those_of_one_model_under_one_rope(folder):
  c, variables = long_config(folder), dict(params=dict(w=np.arange(3.0, dtype=np.float32)))

  def identity(variables=variables, **change):
    other = c.copy_and_resolve_references()
    other.update(change)
    return answers_lib._identity(other, variables)

  known = identity()
  assert identity() == known
  assert identity(checkpoint=dict(every=7)) == known
  assert identity(dict(params=dict(w=np.arange(1, 4.0, dtype=np.float32)))) != known
  for change in (
    dict(seed=1),
    dict(rope=dict(scaling="pi")),
    dict(rope=dict(yarn=dict(beta_fast=16.0))),
    dict(evals=dict(perplexity=dict(stride=8))),
    dict(model=dict(attention="dense")),
  ):
    assert identity(**change) != known, change
  with jax.set_mesh(tiny.mesh(data=2)):
    assert identity() != known


def test_answers_of_the_runs_of_a_command_stay_until_it_ends(tmp_path, folder):
  c = tiny.run_config(folder, steps=2)
  results = loop.train(c, str(tmp_path), keep=True)
  assert (tmp_path / ".train.answers").exists()
  assert loop.train(c, str(tmp_path)) == results
  assert not (tmp_path / ".train.answers").exists()
  loop.evaluate(c, str(tmp_path), keep=True)
  loop.forget(c, str(tmp_path), trained=True)  # those of an evaluation beside it stay
  assert [p.name for p in tmp_path.glob(".*.answers")] == [".evaluate.answers"]
  for _ in range(2):
    loop.forget(c, str(tmp_path), trained=False)
    assert not list(tmp_path.glob(".*.answers"))


# ---- Preemption.


def test_a_notice_within_a_run_saves_it_first(tmp_path, folder, monkeypatch):
  c = tiny.run_config(folder, steps=6)
  c.checkpoint.every, c.evals.perplexity.every_steps = 100, 4
  whole = loop.train(c, str(tmp_path / "whole"))
  calls, real = [], preemption.check

  def check(together=True):  # evaluations in the middle are not
    calls.append(together)
    if calls == [True, True] or (not together and calls.count(False) == 3):
      raise preemption.Preempted("now")
    real(together)

  monkeypatch.setattr(preemption, "check", check)
  for after in (2, 4):
    with pytest.raises(preemption.Preempted, match=f"saved after step {after} in "):
      loop.train(c, str(tmp_path / "cut"))
    assert (tmp_path / f"cut/checkpoints/{after}").is_dir()
  assert loop.train(c, str(tmp_path / "cut")) == whole
  rows = [
    [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in
     (tmp_path / d / "metrics.jsonl").read_text().splitlines()] for d in ("whole", "cut")
  ]  # fmt: skip
  assert rows[0] == rows[1]


def test_a_notice_waits_only_where_something_would_be_lost(monkeypatch):
  left = threading.Event()
  monkeypatch.setattr(preemption, "_leave", lambda text: left.set())
  before = signal.getsignal(signal.SIGTERM)
  try:
    preemption.install()
    with preemption.deferred():
      os.kill(os.getpid(), signal.SIGTERM)
      assert preemption._requested.wait(30)
      assert not left.wait(0.3)
      with pytest.raises(preemption.Preempted):
        preemption.check()
      preemption._requested.clear()
      preemption.check()
    os.kill(os.getpid(), signal.SIGTERM)
    assert left.wait(30)
    preemption._requested.clear()
    with pytest.raises(preemption.Preempted), preemption.deferred():
      preemption._requested.set()  # after the last check
    with pytest.raises(KeyError), preemption.deferred():
      raise KeyError  # an error of its own comes first
  finally:
    preemption._requested.clear()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, before)


CONFIG = """
import tiny
def get_config():
  c = tiny.run_config({folder!r}, steps={steps})
  c.checkpoint.every = 100000
  c.checkpoint.keep = 9
  return c
"""
GRACE = 20  # seconds; a TPU VM gives 30


def launched(path, workdir, *flags):
  env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
  command = [sys.executable, "launch/train.py", f"--config={path}", f"--workdir={workdir}", *flags]
  return subprocess.Popen(
    command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )


def stopped(process, until):
  """Sends the notice as soon as something is so; (exit code, output, errors)."""
  for _ in range(6000):
    if until() or process.poll() is not None:
      break
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  output, errors = process.communicate(timeout=GRACE * 6)  # other work may be beside it
  return process.returncode, output, errors


@pytest.mark.long
def test_sigterm_saves_and_ends_with_a_code_of_its_own(tmp_path, folder):
  path, workdir = tmp_path / "experiment.py", tmp_path / "run"
  path.write_text(CONFIG.format(folder=folder, steps=1_000_000))
  metrics = workdir / "metrics.jsonl"

  def lines():
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0

  code, output, errors = stopped(launched(path, workdir), workdir.exists)  # it compiles
  assert code == 75 and errors.strip().startswith("preempted: what was done is kept"), errors
  last = 0
  for _ in range(2):
    code, output, errors = stopped(launched(path, workdir), lambda n=last: lines() > n + 5)
    assert code == 75 and "preempted: saved after step" in errors, errors
    assert "Traceback" not in errors
    steps = [int(d.name) for d in (workdir / "checkpoints").iterdir() if d.name.isdigit()]
    assert max(steps) == lines() > last  # not a step is lost
    if last:
      assert f"continued after step {last}" in output
    last = max(steps)
