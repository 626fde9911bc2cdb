"""Traces of training and of evaluation, and where they say the time went."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rope_jax import config, report
from rope_jax.train import loop, profile, sharding, state


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tiny.text_folder(tmp_path_factory.mktemp("text"))


def run_config(folder):
  c = tiny.run_config(folder, steps=4, schedule="cosine", warmup_steps=1)
  c.lora.rank, c.rope.phase = 4, "psc"
  c.model.update(num_layers=1, attention="dense")  # compiles soonest
  c.checkpoint.every = 100
  c.evals = config.ConfigDict()
  return c


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
  """Workdirs of a run with a profile and of one without."""
  base, c = tmp_path_factory.mktemp("runs"), run_config(folder)
  for name in ("traced", "plain"):
    loop.train(c, str(base / name), profile=name == "traced")
  return c, base / "traced", base / "plain"


def trace_of(workdir):
  (path,) = (workdir / "profile").glob("plugins/profile/*/*.xplane.pb")
  return str(path)


def lines_of(path):
  planes = jax.profiler.ProfileData.from_file(path).planes
  return [list(line.events) for plane in planes for line in plane.lines]


def test_a_trace_changes_nothing_in_the_run(runs):
  c, traced, plain = runs

  def rows(workdir):
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in found]

  assert rows(traced) == rows(plain)
  mesh = sharding.make_mesh(c.mesh, c.train.batch_size)
  jax.tree.map(
    np.testing.assert_array_equal, *(state.run_variables(str(w), mesh) for w in runs[1:])
  )
  assert not (plain / "profile").exists()


def test_a_trace_has_two_warm_steps_and_the_operations_of_both(runs):
  events = [e for line in lines_of(trace_of(runs[1])) for e in line]
  steps = [dict(e.stats)["step_num"] for e in events if e.name == "train"]
  assert sorted(map(int, steps)) == [2, 3]
  runs_of_step = {
    s["run_id"] for e in events if (s := dict(e.stats)).get("hlo_module") == "jit_step"
  }
  assert len(runs_of_step) == 2
  assert not any("Compile" in e.name for e in events)
  found = profile.operations(trace_of(runs[1]))
  once = [x for x in found if x.part == "optimizer"]
  assert once and {x.calls for x in once} == {2}


def test_a_table_has_all_parts_and_their_shares_are_one(runs):
  found = profile.operations(trace_of(runs[1]))
  seconds = {}
  for x in found:
    seconds[x.part] = seconds.get(x.part, 0) + x.seconds
  parts = {"attention", "projections", "mlp", "loss", "optimizer", "psc", "lora", "rotation"}
  assert parts | {"norms", "embedding"} <= set(seconds) and min(seconds.values()) > 0
  assert seconds.get("other", 0) < 0.4 * sum(seconds.values())
  assert {"forward", "backward"} <= {x.direction for x in found if x.part == "attention"}

  table = (runs[1] / "profile.txt").read_text()
  assert table.startswith("time of steps 2 to 3 ")
  head, *rows = re.findall(
    r"^(\w[\w ]*?) +([\d.]+)% +([\d.]+)\b", table.partition("\n\n")[0], re.M
  )[::-1]
  assert head[:2] == ("all operations", "100.0") and len(rows) == len(seconds)
  assert sum(float(share) for _, share, _ in rows) == pytest.approx(100, abs=0.05 * len(rows))
  assert sum(float(ms) for _, _, ms in rows) == pytest.approx(float(head[2]), abs=0.01 * len(rows))


def test_no_time_is_counted_twice(runs):
  """Operations lie beside each other on a thread, and those of all threads within the trace."""
  counted = {x.name for x in profile.operations(trace_of(runs[1]))}
  overlaps = 0
  for events in lines_of(trace_of(runs[1])):
    spans = sorted((e.start_ns, e.end_ns) for e in events if e.name in counted)
    overlaps += sum(max(a[1] - b[0], 0) for a, b in zip(spans, spans[1:]))
  assert overlaps < 0.02 * 1e9 * sum(x.seconds for x in profile.operations(trace_of(runs[1])))


@pytest.mark.parametrize(
  "scope, expected",
  [
    ("jit(step)/jvp(Llama)/while/body/closed_call/layers/attention/attend/while/body/exp",
     ("attention", "forward")),
    ("jit(step)/transpose(jvp(Llama))/while/body/checkpoint/rematted_computation/layers/attention/"
     "bld,dhe->blhe/dot_general", ("projections", "recomputed")),
    ("jit(step)/transpose(jvp(Llama))/while/body/checkpoint/layers/mlp/bld,df->blf/transpose",
     ("mlp", "backward")),
    ("jit(step)/jvp(Llama)/layers/mlp/lora/bld,dr->blr/dot_general", ("lora", "forward")),
    ("jit(step)/jvp(Llama)/layers/attention/rotate/psc/tanh", ("psc", "forward")),
    ("jit(step)/jvp(Llama)/layers/attention/rotate/mul", ("rotation", "forward")),
    ("jit(step)/jvp(Llama)/layers/attention/q_norm/rsqrt", ("norms", "forward")),
    ("jit(step)/transpose(jvp(loss))/while/body/bcd,dv->bcv/dot_general", ("loss", "backward")),
    ("jit(losses)/loss/while/body/reduce_max", ("loss", "forward")),
    ("jit(step)/optimizer/sqrt", ("optimizer", "")),
    ("jit(step)/jvp(Llama)/while/body/dynamic_slice", ("other", "forward")),
    ("", ("other", "")),
  ],
)  # fmt: skip
def test_operations_are_told_by_their_scope(scope, expected):
  assert (profile.part(scope), profile.direction(scope)) == expected


@pytest.mark.parametrize(
  "opcode", ["all-gather-start", "reduce-scatter", "collective-permute-done"]
)
def test_what_is_sent_is_communication_wherever_it_comes_from(opcode):
  assert profile.part("jit(step)/jvp(Llama)/layers/mlp/dot_general", opcode) == "communication"
  assert profile.part("jit(step)/jvp(Llama)/layers/mlp/dot_general", "reduce") == "mlp"


def test_steps_are_counted_from_where_a_run_resumes():
  def traced(first, last):
    steps = profile.Steps("unused")
    steps.plan(first, last)
    return [step for step in range(1, last + 1) if step in steps._steps]

  assert traced(0, 10) == [2, 3] and traced(6, 10) == [8, 9]
  assert traced(0, 2) == [2] and traced(9, 10) == [10] and traced(10, 10) == []


def test_what_comes_between_two_steps_ends_the_trace(tmp_path):
  steps, f = profile.Steps(str(tmp_path)), jax.jit(jnp.sin)
  steps.plan(0, 5)
  assert not steps.ends(1, interrupted=True)
  with steps.step(2, f(1.0)):
    jax.block_until_ready(f(1.0))
  assert steps.ends(2, interrupted=True) and not steps.ends(2, interrupted=False)
  steps.end(2)
  assert (tmp_path / "profile.txt").read_text().startswith("time of step 2 ")
  steps.step(3, None)  # does not begin another
  assert not steps.ends(3, interrupted=True)


def test_a_finished_run_says_that_there_is_no_step_to_trace(capsys):
  profile.Steps("unused").plan(4, 4)
  assert "profile: no step to trace, as the run is finished after step 4" in capsys.readouterr().out
  profile.Steps(None).plan(4, 4)
  assert not capsys.readouterr().out


def test_an_error_ends_the_trace(tmp_path):
  for _ in range(2):  # a second trace would not start beside the first
    with pytest.raises(FloatingPointError), profile.Steps(str(tmp_path)) as steps:
      steps.plan(0, 5)
      with steps.step(2, jnp.ones(())):
        raise FloatingPointError


def test_evaluations_trace_the_longest_forward_pass(folder, tmp_path, capsys):
  c = run_config(folder)
  c.train.steps = 0
  c.evals.perplexity = config.perplexity(lengths=(64, 32), stride=16, num_samples=2)
  results = loop.train(c, str(tmp_path), profile=True)
  assert set(results["perplexity"]) == {"32", "64"}
  assert "time of a forward pass over 1 x 64 tokens" in capsys.readouterr().out
  found = profile.operations(trace_of(tmp_path))
  assert {x.direction for x in found} <= {"forward", ""}
  assert {"attention", "mlp", "loss"} <= {x.part for x in found}
  assert not any(x.part == "optimizer" for x in found)


def test_where_no_sequence_runs_nothing_is_traced_and_that_is_said(capsys):
  profile.Longest().trace("unused")
  assert "profile: nothing to trace, as no evaluation" in capsys.readouterr().out


def test_on_a_tpu_only_the_line_of_operations_counts(tmp_path):
  """A trace laid out like those of a TPU: no statistics, and lines that repeat the time."""

  def f(x):
    with jax.named_scope("attend"):
      return jax.lax.fori_loop(0, x.shape[0], lambda i, y: jnp.sin(y) @ y, x)

  compiled = jax.jit(f).lower(jnp.ones((4, 4))).compile()
  module = compiled.runtime_executable().hlo_modules()[0]
  names = re.findall(r"%([\w.-]+) = .*? (while|dot|fusion)\(", compiled.as_text())
  loop_name = next(name for name, opcode in names if opcode == "while")
  inner = next(name for name, opcode in names if opcode != "while")
  proto = module.as_serialized_hlo_module_proto()
  size, length = len(proto), b""
  while size > 127:
    size, length = size >> 7, length + bytes([size & 127 | 128])
  hlo = "".join(f"\\{byte:03o}" for byte in b"\x0a" + length + bytes([size]) + proto)
  texts = [
    "jit_f",
    f"%{loop_name} = f32[4,4] while(x)",
    f"%{inner} = f32[4,4] fusion(x)",
    "runtime",
  ]
  metadata = "\n".join(
    f'event_metadata {{ key: {i} value {{ id: {i} name: "{text}" }} }}'
    for i, text in enumerate(texts, 1)
  )

  def line(name, *events):
    inside = " ".join(
      f"events {{ metadata_id: {i} offset_ps: {start}000 duration_ps: {length}000 }}"
      for i, start, length in events
    )
    return f'lines {{ name: "{name}" timestamp_ns: 1 {inside} }}'

  operations = line("XLA Ops", (2, 0, 900), (3, 0, 300), (3, 400, 300), (4, 900, 50))
  space = jax.profiler.ProfileData.text_proto_to_serialized_xspace(f"""
    planes {{ name: "/device:TPU:0" {metadata}
      {line("XLA Modules", (1, 0, 1000))} {line("Steps", (1, 0, 1000))} {operations} }}
    planes {{ name: "/host:metadata" event_metadata {{ key: 1 value {{ id: 1 name: "jit_f(7)"
      stats {{ metadata_id: 1 bytes_value: "{hlo}" }} }} }}
      stat_metadata {{ key: 1 value {{ id: 1 name: "hlo_proto" }} }} }}""")
  path = tmp_path / "trace.xplane.pb"
  path.write_bytes(space)
  found = profile.operations(str(path))
  assert [(x.name, x.part, x.calls) for x in found] == [
    (inner, "attention", 2), ("runtime", "other", 1)
  ]  # fmt: skip
  assert [x.seconds for x in found] == pytest.approx([600e-9, 50e-9])
  assert "92.3%" in report.profiled(found, "it", "step", 1, 1e-6)
