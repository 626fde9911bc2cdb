"""launch/tpu_pod.sh against a gcloud that records its calls and plays a slice of two workers.

A worker is a directory: what would go there over ssh runs here with that directory as its HOME.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

GCLOUD = """#!/usr/bin/env bash
printf '%s\\0' "$@" $'\\n' >>{calls}
if [[ $4 == describe ]]; then echo "${{FAKE_STATE:-ACTIVE}}"; fi
if [[ ${{FAKE_RECORDS:-}} ]]; then exit; fi
workers=(w0 w1) started=() status=0
for word; do
  case "$word" in
    --worker=[0-9]*) workers=("w${{word#*=}}") ;;
    --command=*) script=${{word#*=}} ;;
  esac
done
for worker in "${{workers[@]}}"; do
  export HOME={slice}/$worker
  if [[ $4 == scp ]]; then
    cp "$5" "$HOME/${{6#*:}}"
  elif [[ $4 == ssh ]]; then
    if [[ $worker == w1 && $script == *"${{FAKE_FAILS:-no such text}}"* ]]; then script=false; fi
    (cd && exec bash -c "$script" </dev/null) &
    started+=($!)
  fi
done
for process in "${{started[@]}}"; do wait "$process" || status=$?; done
exit "$status"
"""

# Enough of a Python for launch/venv.sh; the one in .venv notes what is installed and runs the rest.
PYTHON = """#!/usr/bin/env bash
if [[ $1 == -c ]]; then exit "${{FAKE_PYTHON_IS_OLD:-0}}"; fi
mkdir -p .venv/bin
touch .venv/bin/pip
cat >.venv/bin/python <<'END'
#!/usr/bin/env bash
if [[ $1 != -m ]]; then exec {python} "$@"; fi
echo "$@" >>~/installs.txt
exit "${{FAKE_PIP_FAILS:-0}}"
END
chmod +x .venv/bin/python
"""

TRAIN = """
import json, os, pathlib, signal, sys, time

print("the first line")  # and no flush
if "--stubborn" in sys.argv:
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  os.fork()
else:
  signal.signal(signal.SIGTERM, lambda *_: sys.exit("saved at the end"))
home = pathlib.Path.home()
(home / "new.json").write_text(json.dumps([sys.argv[1:], os.getcwd()]))
(home / "new.json").rename(home / "argv.json")
time.sleep(20)
"""

ARGS = ("--", "--config=configs/a.py", "--workdir=/mnt/shared/a")


def executable(path, text):
  path.write_text(text)
  path.chmod(0o755)


class Slice:
  def __init__(self, folder: Path):
    self.tree, self.calls_file, self.bin = folder / "tree", folder / "calls", folder / "bin"
    self.homes = [folder / "slice" / w for w in ("w0", "w1")]
    for directory in (self.tree / "launch", self.bin, *self.homes):
      directory.mkdir(parents=True)
    for script in ("tpu_pod.sh", "venv.sh"):
      shutil.copy(ROOT / "launch" / script, self.tree / "launch")
    (self.tree / "launch/train.py").write_text(TRAIN)
    (self.tree / "setup.cfg").write_text("")
    paths = dict(python=sys.executable, calls=self.calls_file, slice=folder / "slice")
    names = {k: shlex.quote(str(v)) for k, v in paths.items()}
    executable(self.bin / "gcloud", GCLOUD.format(**names))
    executable(self.bin / "hostname", '#!/usr/bin/env bash\nbasename "$HOME"\n')
    for version in ("3", "3.11", "3.12", "3.13"):
      executable(self.bin / f"python{version}", PYTHON.format(**names))
    # All that is needed on the machine that drives the slice, apart from git, tar and gcloud.
    self.bare = folder / "bare"
    self.bare.mkdir()
    for name in ("bash", "dirname", "sed"):
      (self.bare / name).symlink_to(shutil.which(name))
    self.env = {"PATH": f"{self.bin}:{os.environ['PATH']}", "ROPE_JAX_ZONE": "us-east5-a"}
    self.git("init", "--quiet")
    self.git("add", ".")

  def git(self, *args):
    # Not with GIT_DIR, which is set in a hook, and is of the tree that is tested.
    subprocess.run(["git", *args], cwd=self.tree, env=self.env, check=True)

  def process(self, words, env=None, **kwargs):
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    env = {k: v for k, v in {**self.env, **(env or {})}.items() if v is not None}
    return subprocess.Popen(words, env=env, **pipes, **kwargs)

  def __call__(self, *words, stdin="", **env):
    """The exit code, output and errors; env=None leaves a variable out."""
    process = self.process([self.tree / "launch/tpu_pod.sh", *words], env)
    out, err = process.communicate(stdin, timeout=30)
    return process.returncode, out, err

  def ok(self, *words, **kwargs):
    code, out, err = self(*words, **kwargs)
    assert code == 0, err
    return out

  def calls(self):
    """The arguments of every call of gcloud so far, which are then forgotten."""
    text = self.calls_file.read_text() if self.calls_file.exists() else ""
    self.calls_file.unlink(missing_ok=True)
    return [call.split("\0") for call in text.split("\0\n\0")[:-1]]

  def started(self):
    """Waits until the run has begun on all workers; what it was given on each of them."""
    files = [home / "argv.json" for home in self.homes]
    until = time.monotonic() + 15
    while not all(f.exists() for f in files):
      assert time.monotonic() < until, [f.read_text() for h in self.homes for f in h.rglob("*.log")]
      time.sleep(0.01)
    return [json.loads(f.read_text()) for f in files]


@pytest.fixture
def pod(tmp_path):
  return Slice(tmp_path)


@pytest.fixture
def synced(pod):
  pod.ok("sync", "pod")
  pod.calls()
  yield pod
  pod("stop", "pod", "--wait=0")


COMMANDS = {
  "create": ("create", "pod", "--type=v5p-128", "--spot"),
  "sync": ("sync", "pod"),
  "run": ("run", "pod", *ARGS, '--config.x=it\'s "a" $HOME \\ `b`;\nc & *'),
  "logs": ("logs", "pod"),
  "follow": ("logs", "pod", "--worker=1", "--follow"),
  "stop": ("stop", "pod"),
  "status": ("status", "pod"),
  "delete": ("delete", "pod", "--yes"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_dry_run_prints_what_a_run_does_and_does_nothing(pod, name):
  printed = pod.ok("--dry-run", *COMMANDS[name])
  assert pod.calls() == [] and not (pod.tree / "build").exists()
  assert pod.ok(*COMMANDS[name][:2], "--dry-run", *COMMANDS[name][2:]) == printed

  parsed = pod.process(["bash", "-n"]).communicate(printed)
  assert parsed == ("", "")
  pod.ok(*COMMANDS[name], FAKE_RECORDS="1")
  calls = pod.calls()
  assert calls and all(call[:2] == ["compute", "tpus"] for call in calls)
  pasted = pod.process(["bash", "-e"], {"FAKE_RECORDS": "1"}, cwd=pod.tree)
  pasted.communicate(printed)
  assert pasted.returncode == 0 and pod.calls() == calls


@pytest.mark.parametrize("name", ["sync", "run", "stop", "logs", "status"])
def test_what_concerns_the_run_goes_to_all_workers(pod, name):
  pod.ok(*COMMANDS[name], FAKE_RECORDS="1")
  calls = [call for call in pod.calls() if call[2] == "tpu-vm"]
  assert len(calls) == {"sync": 3, "run": 2}.get(name, 1)
  for call in calls:
    assert [a for a in call if a.startswith("--worker")] == ["--worker=all"]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_dry_run_needs_no_gcloud_and_a_run_says_where_to_get_it(pod, name):
  pod.ok("--dry-run", *COMMANDS[name], PATH=str(pod.bare))
  code, _, err = pod(*COMMANDS[name], PATH=str(pod.bare))
  assert code == 2 and "install the Google Cloud CLI" in err


@pytest.mark.parametrize(
  "words, message",
  [
    ("launch pod", "launch: unknown command"),
    ("sync", "sync needs one NAME"),
    ("sync pod pod", "sync needs one NAME"),
    ("create Pod_1 --type=v5p-8", "create needs one NAME"),
    ("create pod", "create needs --type"),
    ("create pod --type=v9-8", "--type=v9-8: no runtime is known for it; give --version"),
    ("create pod --type=v5e-16", "v5litepod-16"),
    ("sync pod --worker=0", "--worker=0: sync is for all workers: JAX hangs"),
    ("sync pod --worker=all", "sync is for all workers: JAX hangs"),
    ("run --worker=0 pod -- --workdir=/a", "run is for all workers: JAX hangs"),
    ("run pod --worker 0 -- --workdir=/a", "run is for all workers: JAX hangs"),
    ("stop pod --worker=0", "stop is for all workers: JAX hangs"),
    ("run pod -- --config=a.py", "--workdir=DIR"),
    ("run pod", "--workdir=DIR"),
    ("run pod -- --workdir=gs://b/a", "--workdir=gs://b/a: mount the bucket on all workers"),
    ("run pod -- --workdir gs://b/a", "--workdir=gs://b/a: mount the bucket on all workers"),
    ("run pod -- -workdir=gs://b/a", "--workdir=gs://b/a: mount the bucket on all workers"),
    ("run pod -- --workdir=/a --workdir=gs://b", "mount the bucket on all workers"),
    ("run pod -- --workdir=runs/a", "--workdir=runs/a: must be an absolute path"),
    ("run pod --workdir=/a", "goes after --"),
    ("run pod --script=bench -- --workdir=/a", "--script=bench: one of train, eval, search"),
    ("sync pod --script=eval", "--script=eval: not an option of sync"),
    ("stop pod -- now", "stop takes nothing after --"),
    ("stop pod --wait=soon", "--wait=soon: must be a number"),
    ("stop pod --wait", "--wait: not an option of stop"),
    ("sync pod --spot", "--spot: not an option of sync"),
    ("logs pod --zone", "--zone: not an option of logs"),
  ],
)
def test_what_is_wrong_is_said_before_anything_is_done(pod, words, message):
  code, out, err = pod(*words.split())
  assert (code, out) == (2, "") and message in err and err.startswith("error: ")
  assert pod.calls() == []


@pytest.mark.parametrize("name", COMMANDS)
def test_a_missing_zone_is_an_error(pod, name):
  code, out, err = pod(*COMMANDS[name], ROPE_JAX_ZONE=None)
  assert (code, out) == (2, "") and "--zone" in err and "ROPE_JAX_ZONE" in err
  assert pod.calls() == []


@pytest.mark.parametrize("name", COMMANDS)
def test_zone_and_project_reach_every_call_and_flags_win(pod, name):
  def given(*flags, **env):
    pod.ok(*COMMANDS[name][:2], *flags, *COMMANDS[name][2:], FAKE_RECORDS="1", **env)
    return {tuple(a for a in c if a.startswith(("--zone", "--project"))) for c in pod.calls()}

  both = dict(ROPE_JAX_ZONE="z1", ROPE_JAX_PROJECT="p1")
  assert given() == {("--zone=us-east5-a",)}
  assert given(**both) == {("--zone=z1", "--project=p1")}
  assert given("--zone=z2", "--project=p2", **both) == {("--zone=z2", "--project=p2")}


def test_without_a_command_there_is_the_usage(pod):
  code, out, usage = pod()
  assert (code, out) == (2, "")
  for command in COMMANDS.values():
    assert f"\n  {command[0]} NAME" in usage
  for words in ("--help", "-h", "run --help", "run pod -h"):
    assert pod(*words.split(), ROPE_JAX_ZONE=None) == (0, usage, "")


@pytest.mark.parametrize(
  "kind, runtime",
  [
    ("v3-32", "tpu-ubuntu2204-base"),
    ("v4-64", "tpu-ubuntu2204-base"),
    ("v5litepod-256", "v2-alpha-tpuv5-lite"),
    ("v5p-128", "v2-alpha-tpuv5"),
    ("v6e-16", "v2-alpha-tpuv6e"),
  ],
)
def test_the_runtime_follows_from_the_accelerator(pod, kind, runtime):
  start = "compute tpus queued-resources create pod --zone=us-east5-a --node-id=pod"
  pod.ok("create", "pod", f"--type={kind}")
  assert pod.calls() == [
    [*start.split(), f"--accelerator-type={kind}", f"--runtime-version={runtime}"]
  ]
  pod.ok("create", "pod", f"--type={kind}", "--version=mine", "--spot", "--", "--labels=a=b c")
  assert pod.calls()[0][7:] == [
    f"--accelerator-type={kind}", "--runtime-version=mine", "--spot", "--labels=a=b c"
  ]  # fmt: skip


def test_sync_brings_the_tracked_files_as_they_are_now(pod):
  for name in ("kept file.txt", "gone.txt", "dropped.txt"):
    (pod.tree / name).write_text("old")
  pod.git("add", ".")
  (pod.tree / "gone.txt").unlink()
  (pod.tree / "untracked.txt").write_text("")
  pod.ok("sync", "pod")
  for home in pod.homes:
    (home / "rope_jax/runs").mkdir()
    (home / "rope_jax/runs/of.txt").write_text("somebody")

  (pod.tree / "kept file.txt").write_text("new")
  pod.git("rm", "--quiet", "--force", "dropped.txt")
  pod.ok("sync", "pod")
  for home in pod.homes:
    files = {str(f.relative_to(home / "rope_jax")) for f in (home / "rope_jax").rglob("*.*")}
    files -= {".venv", ".synced", ".installed", "run.lock"}
    tracked = {"kept file.txt", "setup.cfg", "launch/tpu_pod.sh", "launch/train.py"}
    assert files == tracked | {"launch/venv.sh", "runs/of.txt"}
    assert (home / "rope_jax/kept file.txt").read_text() == "new"


def test_every_sync_installs_for_tpu(pod):
  for times in (1, 2):
    pod.ok("sync", "pod")
    for home in pod.homes:
      installs = (home / "installs.txt").read_text().splitlines()
      assert installs == ["-m pip install --quiet --editable .[tpu]"] * times


def test_a_worker_without_a_new_python_says_so_and_is_not_installed(pod):
  code, _, err = pod("sync", "pod", FAKE_PYTHON_IS_OLD="1")
  assert code != 0 and "Python 3.11 or newer, with venv, was not found" in err
  for home in pod.homes:
    assert f"{home.name}: on all workers" in err
  code, _, err = pod("run", "pod", *ARGS)
  assert code != 0 and "w0: not installed; sync first" in err


def test_after_a_sync_that_failed_nothing_runs(synced):
  assert synced("sync", "pod", FAKE_PIP_FAILS="1")[0] != 0
  code, _, err = synced("run", "pod", *ARGS)
  assert code != 0 and "w0: not installed; sync first" in err


def test_a_venv_without_pip_is_made_again(pod):
  for home in pod.homes:  # what Debian's python3 leaves, when python3-venv is missing
    (home / "rope_jax/.venv/bin").mkdir(parents=True)
    executable(home / "rope_jax/.venv/bin/python", "#!/bin/sh\nexit 1\n")
  pod.ok("sync", "pod")
  assert all((home / "installs.txt").exists() for home in pod.homes)


def test_arguments_reach_every_worker_as_they_are(synced):
  hard = [
    "",
    "a  b",
    "it's",
    "\"q\" 'q'",
    "$HOME `id` $(id)",
    "\\ \\\\",
    "a\nb",
    "* ? ~ # & | ;",
    "é",
  ]
  args = ["--config=configs/a.py:x=1", "--workdir=/mnt/my bucket", *hard, "--worker=0", "--", "-x"]
  out = synced.ok("run", "pod", "--", *args)
  assert out == "w0: started\nw1: started\n" or out == "w1: started\nw0: started\n"
  for (given, directory), home in zip(synced.started(), synced.homes):
    assert given == args and directory == str(home / "rope_jax")


def test_the_printed_command_carries_arguments_to_the_workers(synced):
  args = ["--workdir=/mnt/my bucket", 'it\'s "a" $HOME', "a\nb"]
  printed = synced.ok("--dry-run", "run", "pod", "--", *args)
  assert len(shlex.split(printed)) == 18  # two commands of nine words
  assert synced.process(["bash"]).communicate(printed)[0].count("started") == 2
  assert [given for given, _ in synced.started()] == [args, args]


def test_another_script_is_started_with_the_same_arguments(synced):
  for home in synced.homes:  # the scripts of this tree all do the same
    launch = home / "rope_jax" / "launch"
    (launch / "eval.py").write_bytes((launch / "train.py").read_bytes())
    (launch / "train.py").unlink()
  args = ["--config=configs/a.py", "--workdir=/mnt/my bucket"]
  synced.ok("run", "pod", "--script=eval", "--", *args)
  assert [given for given, _ in synced.started()] == [args, args]


def test_a_second_run_is_refused_while_there_is_one_anywhere(synced):
  synced.ok("run", "pod", *ARGS)
  synced.started()
  for again in (("run", "pod", *ARGS), ("sync", "pod")):
    code, _, err = synced(*again)
    assert code != 0 and "w0: a run is going" in err and "w1: a run is going" in err

  first, second = synced.homes  # the run ends on the second worker only
  stop = shlex.split(synced.ok("--dry-run", "stop", "pod"))[-1].removeprefix("--command=")
  assert synced.process(["bash", "-c", stop], {"HOME": str(second)}).wait() == 0
  (second / "argv.json").unlink()
  code, _, err = synced("run", "pod", *ARGS)
  assert code != 0 and "w0: a run is going" in err and "w1" not in err
  assert not (second / "argv.json").exists()

  synced.ok("stop", "pod")
  synced.ok("run", "pod", *ARGS)
  synced.started()


def test_a_start_that_failed_on_a_worker_says_what_to_do(synced):
  code, _, err = synced("run", "pod", *ARGS, FAKE_FAILS="launch/$1.py")
  assert code == 1 and "not all workers started it" in err and "tpu_pod.sh stop pod" in err


def test_stop_lets_a_run_end(synced):
  synced.ok("run", "pod", *ARGS)
  synced.started()
  status = synced.ok("status", "pod").splitlines()
  assert status[0] == "ACTIVE"
  assert sorted(status[1:]) == [f"w{i}: running; the first line" for i in (0, 1)]
  assert sorted(synced.ok("stop", "pod").splitlines()) == ["w0: stopped", "w1: stopped"]
  status = synced.ok("status", "pod").splitlines()
  assert sorted(status[1:]) == [f"w{i}: no run; saved at the end" for i in (0, 1)]
  assert sorted(synced.ok("stop", "pod").splitlines()) == ["w0: no run", "w1: no run"]


def test_stop_kills_a_run_that_does_not_end_with_its_children(synced):
  synced.ok("run", "pod", *ARGS, "--stubborn")
  synced.started()
  out = synced.ok("stop", "pod", "--wait=0")
  assert sorted(out.splitlines()) == [f"w{i}: killed, after 0 seconds" for i in (0, 1)]
  assert synced.ok("status", "pod").count("no run") == 2


def test_stop_leaves_a_process_alone_that_only_has_the_number_of_a_run(synced):
  stranger = subprocess.Popen(["sleep", "20"], start_new_session=True)
  for home in synced.homes:
    (home / "rope_jax/run.pid").write_text(str(stranger.pid))
  assert synced.ok("stop", "pod", "--wait=0").count("no run") == 2
  assert stranger.poll() is None
  stranger.kill()
  stranger.wait()


def test_logs_show_who_said_what(synced):
  code, _, err = synced("logs", "pod")
  assert code != 0 and "w0: no log yet" in err and "w1: no log yet" in err
  synced.ok("run", "pod", *ARGS)
  synced.started()
  lines = synced.ok("logs", "pod").splitlines()
  assert lines.count("w0: the first line") == lines.count("w1: the first line") == 1
  lines = synced.ok("logs", "pod", "--worker=1").splitlines()
  assert lines[-1] == "w1: the first line" and not any("w0" in line for line in lines)

  script = synced.tree / "launch/tpu_pod.sh"
  following = synced.process([script, "logs", "pod", "--follow"])
  assert "w" in following.stdout.readline()
  synced.ok("stop", "pod")
  out, _ = following.communicate(timeout=15)  # it ends with the run
  assert "w0: saved at the end" in out and "w1: saved at the end" in out


def test_a_second_log_is_added_to_the_first(synced):
  for _ in range(2):
    synced.ok("run", "pod", *ARGS)
    synced.started()
    synced.ok("stop", "pod")
    for home in synced.homes:
      (home / "argv.json").unlink()
  assert synced.ok("logs", "pod", "--worker=0").count("the first line") == 2


def test_status_asks_the_workers_only_when_there_are_any(pod):
  assert pod.ok("status", "pod", FAKE_STATE="WAITING_FOR_RESOURCES") == "WAITING_FOR_RESOURCES\n"
  assert [call[2] for call in pod.calls()] == ["queued-resources"]
  assert pod.ok("status", "pod").count("no run") == 2


def test_delete_asks_first(pod):
  for answer in ("", "n\n", "\n"):
    code, _, err = pod("delete", "pod", stdin=answer)
    assert code == 1 and "pod was not deleted" in err
  assert pod.calls() == []
  for words, answer in ((["delete", "pod"], "y\n"), (["delete", "pod", "--yes"], "")):
    pod.ok(*words, stdin=answer)
    (call,) = pod.calls()
    assert call[2:5] == ["queued-resources", "delete", "pod"] and call[-2:] == [
      "--force",
      "--quiet",
    ]


def test_shellcheck_has_no_complaints():
  scripts = sorted(str(s.relative_to(ROOT)) for s in (ROOT / "launch").glob("*.sh"))
  shellcheck = Path(sys.prefix) / "bin/shellcheck"
  assert shellcheck.exists(), "pip install -e .[test] brings it"
  found = subprocess.run([shellcheck, *scripts], cwd=ROOT, capture_output=True, text=True)
  assert found.returncode == 0 and len(scripts) >= 4, found.stdout + found.stderr
