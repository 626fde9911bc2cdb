"""launch/bench.py: what is measured, that it goes on, and what the tables make of the numbers."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from rope_jax import bench
from rope_jax.bench import arithmetic, document, machine, process, table, worker

TINY = dict(
  parts=list(bench.PARTS), lengths=["64"], dtypes=["float32"], repeats=1, model="tiny",
  memory_lengths=["32", "64"], peer=True,
)  # fmt: skip
TITLES = (
  "Limits", "Forward pass", "Training step", "What the rope and PSC cost", "Generation",
  "Memory by length", "Compiling",
)  # fmt: skip


def settings(**changes):
  return bench.settings(**(TINY | changes))


def launch(*args, **options):
  command = [sys.executable, ROOT / "launch/bench.py", "--model=tiny", *args]
  return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, **options)


@pytest.mark.slow
def test_every_part_of_the_tiny_model_has_its_table_and_is_not_measured_again(
  tmp_path, monkeypatch
):
  pytest.importorskip("peft")
  monkeypatch.setattr(bench, "BATCHES", (2,))
  s, made = settings(memory_lengths=["64"]), []

  def runner(spec):  # in this process, which has imported everything; what compiles has its own
    made.append(spec)
    return process.run(spec) if spec["part"] == "compile" else worker.measure(spec)

  process.measure(bench.plan(s), process.Journal(str(tmp_path), peer=True), runner=runner)
  assert made == [spec for spec, _ in bench.plan(s)]
  rows = json.loads((tmp_path / "bench.json").read_text())["measurements"]
  assert len(rows) == len(made) and not any("failed" in row["result"] for row in rows)
  journal = process.Journal(str(tmp_path), peer=True)
  text = table.tables(s, journal)
  for title in TITLES:
    section = text.split(f"### {title}")[1].split("###")[0]
    assert "\n|--" in section, title
  assert not re.search(r"nan|inf\b|None", text)
  process.measure(bench.plan(s), journal, runner=runner)
  assert len(made) == len(rows)


def test_a_measurement_has_a_process_of_its_own_and_a_rerun_starts_none(tmp_path):
  args = ["--parts=limits", "--dtypes=float32", "--repeats=1", "--nopeer"]
  page = tmp_path / "page.md"
  page.write_text("before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n")
  args += [f"--workdir={tmp_path}", f"--output={page}"]
  first = launch(*args)
  assert first.returncode == 0, first.stderr
  assert re.search(r"\[2/2\] limits, copy, ours: .* elapsed", first.stdout)
  text = page.read_text()
  assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
  assert "GFLOP/s" in text and str(tmp_path) not in text
  written = (tmp_path / "bench.json").stat().st_mtime_ns
  again = launch(*args)
  assert "2 of 2 measurements are there already" in again.stdout and "[1/" not in again.stdout
  assert (tmp_path / "bench.json").stat().st_mtime_ns == written
  assert page.read_text() == text


@pytest.mark.parametrize(
  "args, message",
  [
    (["--parts=forward,speed"], "--parts=forward,speed"),
    (["--parts="], "--parts="),
    (["--lengths=128,0"], "--lengths=128,0"),
    (["--lengths=-5"], "--lengths=-5"),
    (["--memory_lengths=1k"], "--memory_lengths=1k"),
    (["--train_lengths=x"], "--train_lengths=x"),
    (["--dtypes=float16"], "--dtypes=float16"),
    (["--repeats=0"], "repeats"),
    (["--model=huge"], "model"),
    (["--output=README.md"], "--output=README.md"),
    (["--output=nowhere.md"], "--output=nowhere.md"),
  ],
)
def test_bad_flags_are_refused_in_one_line_before_anything_is_measured(tmp_path, args, message):
  done = launch(*args, "--nopeer", f"--workdir={tmp_path / 'w'}")
  assert done.returncode == 2 and message in done.stderr
  assert len(done.stderr.strip().splitlines()) == 1
  assert not (tmp_path / "w").exists() and "[1/" not in done.stdout


def test_without_torch_the_error_names_the_extra(monkeypatch):
  version = machine.metadata.version

  def without(name):
    if name == "torch":
      raise machine.metadata.PackageNotFoundError(name)
    return version(name)

  monkeypatch.setattr(machine.metadata, "version", without)
  with pytest.raises(ValueError, match=r"^--peer=True: torch .*pip install -e '\.\[peer\]'") as e:
    process.check(settings())
  assert "--nopeer" in str(e.value) and "\n" not in str(e.value)
  process.check(settings(peer=False))


def test_nothing_but_peer_needs_torch_and_who_starts_processes_not_jax():
  code = (
    "import sys; from rope_jax.bench import document, process, table\n"
    "assert not {'jax', 'torch'} & set(sys.modules)\n"
    "from rope_jax.bench import ours; assert 'torch' not in sys.modules"
  )
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


def test_sides_alternate_and_no_measurement_is_planned_twice():
  planned = bench.plan(settings(lengths=["64", "128"], repeats=2))
  assert len({(bench.key(spec), repeat) for spec, repeat in planned}) == len(planned)
  cell = bench.forward(settings(), "losses", 64, "float32")
  order = [(spec["side"], r) for spec, r in planned if spec == dict(cell, side=spec["side"])]
  assert order == [("ours", 0), ("peer", 0), ("ours", 1), ("peer", 1)]
  assert settings(lengths=["4096", "16384"]).train_lengths == (4096,)
  assert settings(lengths=["16384"], train_lengths=["32768"]).train_lengths == (32_768,)
  alone = bench.plan(settings(peer=False))
  assert {spec["side"] for spec, _ in alone} == {"ours"}


def test_shares_and_ratios_of_given_numbers(tmp_path):
  s = settings(parts=["forward"], lengths=["1000"])

  def runner(spec):
    if spec["part"] == "limits":
      return dict(seconds=[0.002, 0.001])  # 2 * 256^3 = 33,554,432 FLOPs: 33.554432 GFLOP/s
    ours = spec["side"] == "ours"
    flops = dict(flops=8_388_608) if ours else {}
    return dict(flops, seconds=[0.9, 0.5 if ours else 2.0], peak_bytes=100 if ours else 250)

  journal = process.Journal(str(tmp_path), peer=True)
  process.measure(bench.plan(s), journal, runner=runner)
  text = unpadded(table.tables(s, journal))
  rows = [line.split(" | ") for line in text.splitlines() if "losses of" in line]
  # 2,000 tokens/s against 1,111; 8.388608 MFLOP in 0.5 s are 0.05% of the peak.
  assert rows[0][3:6] == ["2,000", "1,111", "1.80"]
  assert rows[0][8:] == ["100 B", "250 B", "2.50 |"]
  assert arithmetic.share_of_peak(8_388_608, 0.5, 33_554_432) == 0.5
  assert arithmetic.ratio(ours=0.5, peer=0.9) == 1.8
  assert arithmetic.per_doubling([8, 32], [3.0, 48.0]) == 4.0


def unpadded(text: str) -> str:
  """A table without the blanks that make its columns stand under each other."""
  return re.sub(" +", " ", text)


def test_tables_of_the_cost_and_of_the_memory_by_length(tmp_path):
  s = settings(parts=["train", "memory"], lengths=["1000", "2000", "4000"], peer=False)

  def runner(spec):
    n = spec.get("length", 0)
    bytes_of = dict(peak_bytes=10**6 + 2000 * n, start_bytes=10**6, temporary_bytes=n**2)
    return dict(bytes_of, seconds=[1e-6 * n + 2e-9 * n * n + 1e-9], argument_bytes=500, flops=1)

  journal = process.Journal(str(tmp_path), peer=False)
  process.measure(bench.plan(s), journal, runner=runner)
  text = unpadded(table.tables(s, journal))
  assert "| LoRA + PSC | float32 | 1.00 | 2.00 | 500 | 0.0% |" in text
  assert "| forward | float32 | 64 | 128 kB | 2.00 | 4.10 kB | 4.00 |" in text
  assert "| training step | float32 | 64 | 4.10 kB | 4.00 | 500 B | 1.00 |" in text
  assert "transformers |" not in text


def test_flops_of_a_forward_pass_and_of_psc():
  from rope_jax.bench import ours
  from rope_jax.model.config import ModelConfig

  m = ModelConfig(
    vocab_size=11, num_layers=3, d_model=4, num_heads=2, num_kv_heads=1, head_dim=2, d_ff=5
  )
  layer = 4 * 4 + 4 * 2 + 4 * 2 + 4 * 4 + 3 * 4 * 5  # q, k, v, o and the MLP
  attention = 3 * 2 * 2 * 5 * 4  # layers, products, FLOPs, half of ten tokens, channels
  assert ours.forward_flops(m, 10, 10) == 10 * (2 * (3 * layer + 44) + attention)
  assert ours.forward_flops(m, 10, 1) == 10 * (2 * 3 * layer + attention) + 2 * 44
  assert ours.psc_flops(m, 10) == 10 * 3 * (2 + 1) * 2 * 2 * 2 * 2


def test_the_fit_of_the_cost_recovers_its_terms():
  lengths = (2048, 4096, 8192, 16_384)
  a, b, residual = arithmetic.fit_cost(lengths, [3e-4 * n + 2e-8 * n * n for n in lengths])
  assert (a, b) == (pytest.approx(3e-4, rel=1e-9), pytest.approx(2e-8, rel=1e-9))
  assert residual < 1e-9
  *_, residual = arithmetic.fit_cost(lengths, [1.0, 2.0, 4.0, 12.0])
  assert 0.05 < residual < 0.5


def test_too_little_memory_is_a_result_and_any_other_failure_an_error(monkeypatch):
  def ends(status, text):
    done = subprocess.CompletedProcess([], status, stdout="", stderr=text)
    monkeypatch.setattr(process.subprocess, "run", lambda *args, **options: done)

  spec = dict(bench.copy(settings()), side="ours")
  ends(-9, "")
  assert process.run(spec) == {"failed": "out of memory"}
  ends(1, "RESOURCE_EXHAUSTED: Out of memory allocating")
  assert process.run(spec) == {"failed": "out of memory"}
  ends(1, "TypeError: no")
  with pytest.raises(RuntimeError, match="TypeError: no"):
    process.run(spec)


def test_other_versions_are_not_continued_and_again_forgets(tmp_path):
  s = settings(parts=["limits"], peer=False)
  journal, planned = process.Journal(str(tmp_path), peer=False), bench.plan(s)
  process.measure(planned, journal, runner=lambda spec: dict(seconds=[1.0]))
  assert all(journal.has(*each) for each in planned)
  journal.versions["ours"] = dict(journal.versions["ours"], jax="0")
  assert not any(journal.has(*each) for each in planned)
  journal = process.Journal(str(tmp_path), peer=False)
  journal.forget(planned[:1])
  assert [journal.has(*each) for each in planned] == [False, True]
  (tmp_path / "bench.json").write_text("[]")
  with pytest.raises(ValueError, match=f"^--workdir={tmp_path}"):
    process.Journal(str(tmp_path), peer=False)


def test_the_page_has_its_marks_and_the_command_its_flags():
  document.check(str(ROOT / "docs" / "performance.md"))
  s = settings(parts=["forward"], peer=False)
  assert s.command().split() == [
    "python", "launch/bench.py", "--parts=forward", "--lengths=64", "--train_lengths=64",
    "--dtypes=float32", "--repeats=1", "--model=tiny", "--memory_lengths=32,64", "--nopeer",
  ]  # fmt: skip
  assert dataclasses.replace(bench.Settings()).command() == "python launch/bench.py"
