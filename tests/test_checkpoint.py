"""Checkpoints that are damaged, gone or cannot be written; two runs in one place."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from conftest import ROOT
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rope_jax.errors import DiskError
from rope_jax.train import loop, state
from rope_jax.train.checkpoint import Checkpoints
from rope_jax.train.digest import digest
from rope_jax.train.lock import Lock


def tree(seed):
  rng = np.random.default_rng(seed)
  return dict(
    lora=dict(a=jnp.asarray(rng.normal(size=(40, 30)), jnp.float32)),
    phase=dict(w=jnp.asarray(rng.normal(size=(7, 9)), jnp.bfloat16), n=jnp.int32(seed)),
  )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A run of two checkpoints."""
  path = tmp_path_factory.mktemp("run")
  checkpoints = Checkpoints(str(path), keep=3)
  for step in (10, 20):
    checkpoints.save(step, trainable=tree(step), opt_state=dict(count=jnp.int32(step)))
  checkpoints.close()
  return path


@pytest.fixture
def copy(saved, tmp_path):
  shutil.copytree(saved, tmp_path / "run")
  return tmp_path / "run"


def abstract():
  return state.abstract_of(dict(trainable=tree(0), opt_state=dict(count=jnp.int32(0))))


def resumed(path, on_damage="previous"):
  checkpoints = Checkpoints(str(path), keep=3)
  try:
    return checkpoints.resume(on_damage, **abstract())
  finally:
    checkpoints.close()


def assert_is(items, step):
  jax.tree.map(np.testing.assert_array_equal, items["trainable"], tree(step))
  assert int(items["opt_state"]["count"]) == step


def files(path):
  return sorted(p for p in (path / "checkpoints/20").rglob("*") if p.is_file())


def test_one_that_is_whole_is_resumed_without_a_word(copy):
  step, items, said = resumed(copy)
  assert (step, said) == (20, "")
  assert json.loads((copy / "saved.json").read_text()) == {"newest": 20}
  assert_is(items, 20)


def test_whatever_happens_to_a_file_the_values_are_right(saved, tmp_path):
  """Each file of the newest checkpoint cut, emptied, deleted, or with a bit flipped."""
  rng, outcomes = np.random.default_rng(0), {10: 0, 20: 0}
  for original in files(saved):
    data = original.read_bytes()
    for how in ("cut", "empty", "gone", "flip", "flip"):
      shutil.copytree(saved, tmp_path / "run")
      file = tmp_path / "run" / original.relative_to(saved)
      if how == "gone":
        file.unlink()
      elif how == "flip" and data:
        changed = bytearray(data)
        changed[rng.integers(len(data))] ^= 1 << rng.integers(8)
        file.write_bytes(changed)
      else:
        file.write_bytes(data[: len(data) // 2] if how == "cut" else b"")
      step, items, said = resumed(tmp_path / "run")
      outcomes[step] += 1
      assert_is(items, step)
      if step == 10:
        said = said.splitlines()
        assert len(said) == 1 and said[0].startswith("the checkpoint after step 20 is damaged (")
        assert said[0].endswith("going on from step 10")
        assert (tmp_path / "run/damaged/20").is_dir()
        assert not (tmp_path / "run/checkpoints/20").exists()  # so that it can be saved again
      shutil.rmtree(tmp_path / "run")
  assert outcomes[10] > 15 and outcomes[20] > 15  # some files are not needed


def break_data(path, step=20):
  """Flips a bit in the largest file, which holds the arrays; no library notices that."""
  inside = (path / f"checkpoints/{step}").rglob("*")
  file = max((p for p in inside if p.is_file()), key=lambda p: p.stat().st_size)
  data = bytearray(file.read_bytes())
  data[len(data) * 3 // 4] ^= 4
  file.write_bytes(data)


def test_a_run_may_be_told_to_stop(copy):
  break_data(copy)
  message = (
    "config.checkpoint.on_damage='stop': the checkpoint after step 20 .*is one after step 10"
  )
  with pytest.raises(ValueError, match=message):
    resumed(copy, "stop")
  assert (copy / "checkpoints/20").is_dir() and not (copy / "damaged").exists()


@pytest.mark.parametrize("how", ["gone", "damaged"])
@pytest.mark.parametrize("on_damage", ["previous", "stop"])
def test_a_run_never_begins_anew_by_itself(copy, how, on_damage):
  for step in (10, 20):
    if how == "gone":
      shutil.rmtree(copy / f"checkpoints/{step}")
    else:
      break_data(copy, step)
  before = sorted(copy.rglob("*"))
  with pytest.raises(ValueError, match="on_damage=.*(does not begin anew|after step 10)"):
    resumed(copy, on_damage)
  assert sorted(copy.rglob("*")) == before  # nothing was moved
  shutil.rmtree(copy)
  assert resumed(copy)[0] == 0  # of a run that has saved nothing there is nothing to say


def test_one_that_is_gone_is_missed(copy):
  shutil.rmtree(copy / "checkpoints/20")
  with pytest.raises(ValueError, match="after step 20.*it was saved and is not there"):
    resumed(copy, "stop")
  step, items, said = resumed(copy)
  assert step == 10 and "is not there" in said
  assert_is(items, 10)


def test_a_damaged_one_is_read_by_nobody(copy):
  break_data(copy)
  checkpoints = Checkpoints(str(copy))
  with pytest.raises(ValueError, match=f"{copy}: the checkpoint after step 20 is damaged"):
    checkpoints.restore(20, **abstract())
  assert_is(checkpoints.restore(10, **abstract()), 10)


def test_reading_changes_nothing_in_a_workdir(copy):
  partial = copy / "checkpoints/30.orbax-checkpoint-tmp"  # another process is saving it
  partial.mkdir()
  before = sorted(copy.rglob("*"))
  reader = Checkpoints(str(copy))
  assert reader.steps() == [10, 20]
  reader.close()
  assert sorted(copy.rglob("*")) == before
  nothing = Checkpoints(str(copy / "nothing"))
  assert nothing.latest() is None
  nothing.close()
  assert not (copy / "nothing").exists()
  Checkpoints(str(copy), keep=2).close()  # its own run: what a kill has left goes
  for _ in range(600):  # in the background
    if not partial.exists():
      return
    time.sleep(0.05)
  raise AssertionError("it is still there")


def test_those_that_a_kill_kept_from_being_removed_go_when_a_newer_one_is_whole(copy):
  shutil.copytree(copy, copy.parent / "damaged")
  for path, left in ((copy, "20"), (copy.parent / "damaged", "10")):
    if left == "10":
      break_data(path)
    checkpoints = Checkpoints(str(path), keep=1)
    assert str(checkpoints.resume("previous", **abstract())[0]) == left
    checkpoints.close()
    assert [p.name for p in (path / "checkpoints").iterdir()] == [left]


@pytest.mark.parametrize("text", ["PERMISSION_DENIED: x", "y: Input/output error [OS error 5]"])
def test_what_cannot_be_read_now_is_not_called_damaged(copy, monkeypatch, text):
  checkpoints = Checkpoints(str(copy), keep=3)

  def unreadable(*_, **__):
    raise ValueError(text)

  monkeypatch.setattr(checkpoints._manager, "restore", unreadable)
  before = sorted(copy.rglob("*"))
  with pytest.raises(DiskError, match="the checkpoint after step 20 cannot be read"):
    checkpoints.resume("previous", **abstract())
  assert sorted(copy.rglob("*")) == before


def test_a_save_that_was_whole_before_it_was_noted_is_noted(copy):
  (copy / "saved.json").write_text('{"newest": 10}')
  assert resumed(copy)[0] == 20
  assert json.loads((copy / "saved.json").read_text()) == {"newest": 20}


# ---- Checksums.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool", "uint8"])
def test_each_bit_counts(dtype):
  rng = np.random.default_rng(0)
  size = jnp.dtype(dtype).itemsize
  raw = rng.integers(0, 2 if dtype == "bool" else 256, (60, size), np.uint8)
  before = digest(dict(x=np.asarray(raw).view(jnp.dtype(dtype)).reshape(5, 12)))
  for _ in range(40):
    changed = raw.copy()
    i, bit = rng.integers(raw.size), 0 if dtype == "bool" else rng.integers(8)
    changed.flat[i] ^= 1 << bit
    after = digest(dict(x=changed.view(jnp.dtype(dtype)).reshape(5, 12)))
    assert all(a != b for a, b in zip(before["['x']"], after["['x']"]))


def test_places_count():
  x = np.arange(24, dtype=np.float32).reshape(4, 6)
  known = digest(x)[""]
  swapped = x.copy()
  swapped[0, 1], swapped[1, 0] = x[1, 0], x[0, 1]
  for other in (x[::-1], x[:, ::-1], np.roll(x, 1), x.reshape(6, 4).T.reshape(4, 6), swapped):
    assert all(a != b for a, b in zip(digest(np.ascontiguousarray(other))[""], known))


def test_checksums_are_the_same_on_every_mesh():
  x = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
  known = digest(dict(x=x))
  for mesh, spec in (
    (tiny.mesh(fsdp=4, tensor=2), P("fsdp", "tensor")),
    (tiny.mesh(data=8), P(None, "data")),
  ):
    split = jax.device_put(x, NamedSharding(mesh, spec))
    assert digest(dict(x=split)) == known


# ---- Disks.


def test_what_cannot_be_written_is_one_error_with_what_is_left(copy, monkeypatch):
  checkpoints = Checkpoints(str(copy), keep=3)

  def full(*_, **__):
    raise ValueError("Error writing: No space left on device [OS error 28]")  # as tensorstore does

  monkeypatch.setattr(checkpoints._manager, "save", full)
  message = "a checkpoint cannot be written: No space left on device; those after steps 10, 20 are"
  with pytest.raises(DiskError, match=message):
    checkpoints.save(30, trainable=tree(30), opt_state=dict(count=jnp.int32(3)))
  monkeypatch.undo()
  checkpoints.close()
  assert resumed(copy)[0] == 20


def test_other_errors_are_not_of_the_disk():
  with pytest.raises(KeyError), DiskError.explained("x", "y"):
    raise KeyError("x")
  with pytest.raises(DiskError, match="x: Read-only file system; y"), DiskError.explained("x", "y"):
    raise OSError(errno.EROFS, "whatever")
  with pytest.raises(FileNotFoundError), DiskError.explained("x", "y"):
    os.stat("/nowhere/at/all")


TOO_LARGE = """
import resource, sys
sys.argv = ["launch/train.py", "--config={config}", "--workdir={workdir}"]
sys.path.insert(0, "launch")
import jax, orbax.checkpoint, rope_jax.train.loop  # what is compiled on the way is not limited
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
exec(compile(open("launch/train.py").read(), "launch/train.py", "exec"))
"""
CONFIG = """
import tiny
def get_config():
  c = tiny.run_config({folder!r}, steps={steps})
  c.model.d_ff = {d_ff}
  c.checkpoint.every = 2
  return c
"""


def command(path, workdir, *flags):
  return [sys.executable, "launch/train.py", f"--config={path}", f"--workdir={workdir}", *flags]


def run(command, **options):
  env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
  return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, **options)


@pytest.mark.long
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(tmp_path):
  """A disk that takes no file above some size: the checkpoints of a larger model."""
  folder = tiny.text_folder(tmp_path / "text")
  path, workdir = tmp_path / "experiment.py", tmp_path / "run"
  path.write_text(CONFIG.format(folder=folder, steps=4, d_ff=4096))
  done = run(command(path, workdir, "--config.checkpoint.keep=9"))
  assert done.returncode == 0, done.stderr
  shutil.rmtree(workdir / "checkpoints/4")
  (workdir / "saved.json").write_text('{"newest": 2}')
  program = TOO_LARGE.format(config=path, workdir=workdir, limit=200_000)
  done = run([sys.executable, "-c", program])
  assert done.returncode == 74, done.stderr
  line = done.stderr.strip().splitlines()[-1]
  assert "cannot be written: File too large; those after steps 2 are whole" in line, done.stderr
  done = run(command(path, workdir))  # there is room again
  assert done.returncode == 0 and "continued after step 2" in done.stdout, done.stderr


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
  (tmp_path / "file").write_text("kept")
  c = tiny.run_config(tiny.text_folder(tmp_path / "text"))
  for bad in ("/proc/rope_jax", str(tmp_path / "file"), str(tmp_path / "file/below")):
    with pytest.raises(ValueError, match=f"--workdir={re.escape(bad)}: nothing can be written"):
      Lock(bad, "train").take()
    c.train.steps = 6 if bad == "/proc/rope_jax" else 0
    with pytest.raises(ValueError, match=f"--workdir={re.escape(bad)}: nothing can be written"):
      loop.train(c, bad)
  assert (tmp_path / "file").read_text() == "kept"


# ---- Two runs.


def test_a_workdir_is_held_by_one_at_a_time(tmp_path):
  workdir = str(tmp_path / "run")
  with Lock(workdir, "train") as first:
    assert not os.path.exists(workdir)  # bad input leaves nothing behind
    first.take()
    first.take()
    with Lock(workdir, "evaluate"):  # evaluations go on beside
      pass
    message = f"--workdir={workdir}: another run is at work there .process {os.getpid()} on "
    with pytest.raises(ValueError, match=message), Lock(workdir, "train"):
      pass
  with Lock(workdir, "train"):
    pass


def test_a_second_run_is_refused_and_the_first_not_disturbed(tmp_path):
  c = tiny.run_config(tiny.text_folder(tmp_path / "text"), steps=2)
  workdir = tmp_path / "run"
  with Lock(str(workdir), "train") as held:
    held.take()
    before = sorted(workdir.rglob("*"))
    with pytest.raises(ValueError, match="another run is at work there"):
      loop.train(c, str(workdir))
    assert sorted(workdir.rglob("*")) == before


def test_the_lock_of_a_killed_process_is_free(tmp_path):
  program = (
    "import sys, time; from rope_jax.train.lock import Lock; lock = Lock(sys.argv[1], 'train'); "
    "lock.take(); print('held', flush=True); time.sleep(600)"
  )
  env = dict(os.environ, PYTHONPATH=str(ROOT))
  process = subprocess.Popen(
    [sys.executable, "-c", program, str(tmp_path)], env=env, stdout=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == "held\n"
  with pytest.raises(ValueError, match=f"process {process.pid} on"), Lock(str(tmp_path), "train"):
    pass
  process.kill()
  process.wait()
  with Lock(str(tmp_path), "train"):
    assert Path(tmp_path, ".train.lock").read_text().startswith(f"process {os.getpid()} ")
