"""Measurements as markdown tables."""

from __future__ import annotations

from rope_jax import bench
from rope_jax.bench import arithmetic
from rope_jax.bench.arithmetic import digits, size
from rope_jax.bench.found import LABELS, Found, pair, table
from rope_jax.bench.process import Journal

_WHAT = {
  "losses": "losses of all tokens",
  "last": "logits of the last token",
  "lora": "LoRA",
  "lora+psc": "LoRA + PSC",
  "forward": "forward",
  "step": "training step",
}


def tables(s: bench.Settings, journal: Journal) -> str:
  """The machine, and a section for each part."""
  found = Found(s, journal)
  sections = [_machine(found)]
  for part in s.parts:
    title, *paragraphs = _SECTIONS[part](found)
    sections += [f"### {title}", *filter(None, paragraphs)]
  return "\n\n".join(sections)


def _machine(found: Found) -> str:
  m, dates = found.machine, sorted(set(found.dates))
  names = {name: number for side in found.versions.values() for name, number in side.items()}
  when = " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else "nothing measured"
  return (
    f"{m['cpu']}, {m['cores']} cores, {m['memory_bytes'] / 2**30:.0f} GiB of memory. "
    + ", ".join(f"{name} {number}" for name, number in names.items())
    + f". {when}.\n\n```\n{found.settings.command()}\n```\n\nRatios above 1: ours is faster, or "
    f"takes less memory. Processes of each: {found.settings.repeats}; the best counts."
  )


def _limits(found: Found) -> list[str]:
  s, rows = found.settings, []
  for dtype in s.dtypes:
    spec = bench.matmul(s, dtype)
    work = 2 * spec["size"] ** 3 / 1e9
    what = f"product of {spec['size']:,} x {spec['size']:,} matrices, {dtype}, GFLOP/s"
    rows.append(_limit(found, spec, what, work))
  spec = bench.copy(s)
  what = f"x + 1 in place on {spec['mebibytes']:,} MiB, GB/s"
  rows.append(_limit(found, spec, what, 2 * spec["mebibytes"] * 2**20 / 1e9))
  note = "bfloat16 products are summed in float32; JAX's have a float32 result."
  return ["Limits of the machine", table(rows), note]


def _limit(found: Found, spec: dict, what: str, work: float) -> dict[str, str]:
  columns = pair(found, spec, lambda seconds: digits(work / seconds), "rate")
  names = {"rate, ours": "JAX", "rate, transformers": "PyTorch", "rate, ratio": "ratio"}
  return {"": what} | {names[k]: v for k, v in columns.items()}


def _forward(found: Found) -> list[str]:
  return ["Forward pass", *_work(found, bench.forward, bench.FORWARD, found.settings.lengths)]


def _train(found: Found) -> list[str]:
  note = (
    "One sequence, the base frozen, rank 8 on q, k, v and o. PSC is compared with nothing: "
    "transformers has none."
  )
  return [
    "Training step",
    *_work(found, bench.train, bench.TRAIN, found.settings.train_lengths),
    note,
  ]


def _work(found: Found, cell, whats: tuple[str, ...], lengths: tuple[int, ...]) -> list[str]:
  """Tables of speed and memory by length, and of the cost by length."""
  s, rows, fits = found.settings, [], []
  for what in whats:
    for dtype in s.dtypes:
      specs = [cell(s, what, length, dtype) for length in lengths]
      rows += [_row(found, spec) for spec in specs]
      times = [(spec["length"], found.least(spec)) for spec in specs]
      fits += _fit(what, dtype, [(length, t) for length, t in times if t])
  caption = "Our time by length, a L + b L² fitted to the rows above:" if fits else ""
  return [table(rows), _agreement(found, cell, whats, lengths), caption, table(fits)]


def _row(found: Found, spec: dict) -> dict[str, str]:
  row = {"": _WHAT[spec["what"]], "dtype": spec["dtype"], "tokens": f"{spec['length']:,}"}
  row |= pair(found, spec, lambda t: digits(spec["length"] / t), "tokens/s")
  peak, work = found.peak(spec["dtype"]), found.least(spec, field="flops")
  for side, label in LABELS.items():
    seconds = found.least(spec, side)
    known = peak and work and seconds
    share = known and arithmetic.share_of_peak(work, seconds, peak)
    row[f"of the matmul peak, {label}"] = f"{share:.0%}" if known else ""
  return row | pair(found, spec, size, "peak memory", "peak_bytes")


def _fit(what: str, dtype: str, times: list[tuple[int, float]]) -> list[dict[str, str]]:
  if len(times) < 3:  # two lengths fit exactly, whatever they are
    return []
  a, b, residual = arithmetic.fit_cost(*zip(*times))
  return [{
    "": _WHAT[what],
    "dtype": dtype,
    "a, µs a token": digits(a * 1e6),
    "b, ns a token²": digits(b * 1e9),
    "b L² = a L at tokens": f"{a / b:,.0f}" if a > 0 < b else "–",
    "largest residual": f"{residual:.1%}",
  }]  # fmt: skip


def _agreement(found: Found, cell, whats: tuple[str, ...], lengths: tuple[int, ...]) -> str:
  """That both did the same work: the same loss. The weights of the toy differ."""
  s, parts = found.settings, []
  for dtype in s.dtypes if s.model == "smollm2" else ():
    pairs = [
      [found.least(cell(s, whats[0], length, dtype), side, "loss") for side in bench.SIDES]
      for length in lengths
    ]
    gaps = [abs(a - b) for a, b in pairs if None not in (a, b)]
    parts += [f"{max(gaps):.1e} nats in {dtype}"] if gaps else []
  return f"Mean losses of the two differ by at most {', '.join(parts)}." if parts else ""


def _overhead(found: Found) -> list[str]:
  s, rows = found.settings, []
  for dtype in s.dtypes:
    spec = bench.overhead(s, dtype)
    whole = found.least(bench.forward(s, "losses", spec["length"], dtype))
    angles, rotations, psc, psc_flops, flops = (
      found.least(spec, field=name)
      for name in ("angles", "rotations", "psc", "psc_flops", "forward_flops")
    )
    if not whole or psc is None:
      continue
    rows.append({
      "dtype": dtype,
      "tokens": f"{spec['length']:,}",
      "angles, once": f"{angles / whole:.2%}",
      "rotations, all layers": f"{rotations / whole:.2%}",
      "PSC, all layers": f"{psc / whole:.2%}",
      "PSC's share of the FLOPs": f"{psc_flops / flops:.2%}",
      "time / FLOPs": f"{(psc / whole) / (psc_flops / flops):.2f}",
    })  # fmt: skip
  note = "Each compiled alone, as a share of the time of the forward pass without PSC."
  return ["What the rope and PSC cost", table(rows), note]


def _generate(found: Found) -> list[str]:
  s, rows = found.settings, []
  for dtype in s.dtypes:
    for batch in bench.BATCHES:
      spec = bench.generate(s, batch, dtype)
      rows.append({"dtype": dtype, "batch": str(batch)} | _generation(found, spec))
  note = (
    f"Greedy, {bench.NEW} tokens after a prompt of {bench.PROMPT}. Decoding is what they take "
    "longer than the first of them; that one alone is the prefill."
  )
  return ["Generation", table(rows), note]


def _generation(found: Found, spec: dict) -> dict[str, str]:
  speeds: dict[str, dict] = {"prefill": {}, "decoding": {}}
  for side in bench.SIDES:
    whole, first = (found.least(spec, side, field) for field in ("seconds", "first"))
    if whole and first:
      speeds["prefill"][side] = spec["batch"] * spec["prompt"] / first
      speeds["decoding"][side] = spec["batch"] * (spec["new"] - 1) / (whole - first)
  out = {}
  for name, of in speeds.items():
    for side, label in LABELS.items():
      shown = digits(of[side]) if side in of else found.failed(spec, side)
      out[f"{name} tokens/s, {label}"] = shown
    out[f"{name}, ratio"] = f"{of['ours'] / of['peer']:.2f}" if len(of) == 2 else ""
  return out


def _memory(found: Found) -> list[str]:
  s = found.settings
  small = ", ".join(f"{k} {bench.SMALL[k]}" for k in ("d_model", "num_layers", "vocab_size"))
  executed = _growth(
    [[bench.executed(s, what, n) for n in s.memory_lengths] for what in bench.MEMORY],
    found,
    {"occupied": lambda spec: _occupied(found, spec), "planned": _planned(found)},
  )
  lengths = [n for n in s.memory_lengths if n <= bench.COMPILED_LENGTH]
  compiled = _growth(
    [
      [bench.compiled(s, what, n, dtype) for n in lengths]
      for dtype in s.dtypes
      for what in bench.MEMORY
    ],
    found,
    {"planned": _planned(found), "arguments": lambda x: found.least(x, field="argument_bytes")},
  )
  model = "SmolLM2-135M" if s.model == "smollm2" else "The toy"
  return [
    "Memory by length",
    f"A small model ({small}), float32, executed: what the process takes above what it has when it "
    "starts to compile, and the temporary memory that the compiler plans. ×: for each doubling.",
    table(executed),
    f"{model}, compiled and not executed." if compiled else "",
    table(compiled),
  ]


def _planned(found: Found):
  return lambda spec: found.least(spec, field="temporary_bytes")


def _occupied(found: Found, spec: dict) -> float | None:
  extra = [row["peak_bytes"] - row["start_bytes"] for row in found.results(spec)]
  return min(extra, default=None)


def _growth(series: list[list[dict]], found: Found, columns: dict) -> list[dict[str, str]]:
  """Rows of series of specifications by length, with the factor of each column by doubling."""
  rows = []
  for specs in series:
    values = {name: [of(spec) for spec in specs] for name, of in columns.items()}
    lengths = [spec["length"] for spec in specs]
    for i, spec in enumerate(specs):
      row = {"": _WHAT[spec["what"]], "dtype": spec["dtype"], "tokens": f"{lengths[i]:,}"}
      for name, of in values.items():
        row[name] = found.failed(spec, "ours") if of[i] is None else size(of[i])
        known = i and of[i - 1] and of[i]
        factor = known and arithmetic.per_doubling(lengths[i - 1 : i + 1], of[i - 1 : i + 1])
        row[f"{name}, ×"] = f"{factor:.2f}" if known else ""
      rows.append(row)
  return rows


def _compile(found: Found) -> list[str]:
  spec = bench.compilation(found.settings)
  rows = []
  for cache in ("empty", "filled"):
    results = [r[cache] for r in found.results(spec) if "failed" not in r[cache]]
    if results:
      best = min(results, key=lambda r: r["process_seconds"])
      names = dict(imports="import_seconds", lowering="lower", compilation="compile")
      names["from nothing to compiled"] = "process_seconds"
      cells = {name: f"{digits(best[field])} s" for name, field in names.items()}
      rows.append({"compilation cache": cache} | cells)
  title = f"Compiling the training step, {spec['length']:,} tokens, {spec['dtype']}"
  return [title, table(rows), "LoRA + PSC."]


_SECTIONS = dict(
  limits=_limits,
  forward=_forward,
  train=_train,
  overhead=_overhead,
  generate=_generate,
  memory=_memory,
  compile=_compile,
)
