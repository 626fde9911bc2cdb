"""PSC (arXiv 2505.12423): it lowers perplexity over PI, YaRN and LongRoPE, the more the longer.

Published, from a secondary source: Llama-2 7B at 64k, PI 7.48 to 7.39 (1.2%), YaRN 7.32 to 7.19
(1.8%); gains grow from 16k over 32k to 64k, a larger LoRA rank does not bring them, and calibration
before the rotation is better than after it.

Each window is reached by PI, YaRN and LongRoPE (factors searched for it on the same model), each
with LoRA r=8; LoRA with as many parameters as LoRA r=8 and PSC have together (the control); and
LoRA r=8 with PSC. Runs of a seed share base model, data, order, steps and learning rate. At the
middle window, over YaRN, also: calibration after the rotation, a module that truly rotates, and
the initial scale 1/sqrt(d) in place of the released 1/d.

mini: the small Llama (1.0M parameters, window 256, bytes), x4, x8 and x16, three seeds of base and
adapters, 60 steps of 4,096 tokens from 2e-3 down to 0; perplexity of 16 held-out samples,
protocol 'truncate'. LongRoPE's search has 16 individuals and 6 generations (the paper: 64
and 40) and 2 samples.
paper: Llama-2 7B at 16k, 32k, 64k by the released recipe, on TPU, --init_from=DIR.
"""

from __future__ import annotations

import math

from rope_jax import markdown, presets
from rope_jax.claims import small
from rope_jax.claims.statistics import Interval, interval, reduction, slope

FACTORS, METHODS = (4, 8, 16), ("pi", "yarn", "longrope")
ARMS = {"lora": "LoRA r=8", "matched": "LoRA, matched", "psc": "LoRA + PSC"}
CONTROLS = {"lora": "LoRA r=8", "matched": "LoRA of as many parameters"}
MIDDLE = 8
VARIANTS = {
  "psc": "as released: before the rotation, gain, 1/d",
  "post": "after the rotation",
  "rotation": "true rotation",
  "fan_in": "initial scale 1/sqrt(d)",
}


def runs(preset: str, init_from: str) -> dict:
  """A search for each LongRoPE, the arms, and the variants of PSC."""
  build = _mini if preset == "mini" else _paper(init_from)
  out = {}
  for seed in small.SEEDS:
    if preset == "mini":
      out[small.base_name(seed)] = small.pretraining(seed)
    for factor in FACTORS:
      for method in METHODS:
        if method == "longrope":
          out[_name(seed, factor, method, "search")] = build(seed, factor, method, "search")
        for arm in ARMS:
          out[_name(seed, factor, method, arm)] = c = build(seed, factor, method, arm)
          if method == "longrope":
            c.rope.longrope.factors = "run:" + _name(seed, factor, method, "search")
    for variant in VARIANTS:
      if variant != "psc":
        out[_name(seed, MIDDLE, "yarn", variant)] = build(seed, MIDDLE, "yarn", variant)
  return out


def report(results: dict, preset: str) -> str:
  """Perplexity by length, what PSC takes off, whether that grows, the variants, a verdict."""
  lengths = sorted({int(n) for run in results.values() for n in run["perplexity"]})
  window = {f: f * (small.WINDOW if preset == "mini" else 4096) for f in FACTORS}
  below = {
    (method, factor, arm): _below(results, factor, method, arm, window[factor])
    for method in METHODS for factor in FACTORS for arm in CONTROLS
  }  # fmt: skip
  rows = []
  for method in METHODS:
    for factor in FACTORS:
      for arm, title in ARMS.items():
        found = [_values(results, factor, method, arm, n).values() for n in lengths]
        means = [f"{sum(x) / len(x):.3f}" if x else "" for x in found]
        cut = below.get((method, factor, arm))
        cut = interval(list(cut.values())).shown(2, True) if cut else ""
        rows.append((f"{method} x{factor}, {title}", *means, cut))
  header = ("", *(f"{n:,}" for n in lengths), "PSC below it at the window, %")
  return "\n\n".join(
    [
      "Perplexity, mean over seeds. Each factor is tested on documents that are as long as its "
      "window: rows of one factor compare, and those of different factors do not.",
      markdown.table(header, rows),
      _by_method(results, below, window),
      _growth(below),
      _variants(results, window[MIDDLE]),
      _verdict(below),
    ]
  )


def _below(
  results: dict, factor: int, method: str, arm: str, n: int, ours: str = "psc"
) -> dict[int, float]:
  """By how many per cent PSC, or another arm, is below an arm, by seed."""
  psc, other = (_values(results, factor, method, a, n) for a in (ours, arm))
  return {s: 100 * (1 - psc[s] / other[s]) for s in sorted(set(psc) & set(other))}


def _by_method(results: dict, below: dict, window: dict[int, int]) -> str:
  rows = []
  for method in METHODS:
    rank = [_below(results, f, method, "lora", window[f], "matched") for f in FACTORS]
    cells = [_over([below[method, f, arm] for f in FACTORS]) for arm in CONTROLS] + [_over(rank)]
    rows.append((method, *(x.shown(2, True) if x else "" for x in cells)))
  header = ("", *(f"PSC below {ARMS[a]}" for a in CONTROLS), "LoRA, matched, below LoRA r=8")
  return "At the window, in the mean of the three windows, %:\n\n" + markdown.table(header, rows)


def _over(cases: list[dict[int, float]]) -> Interval | None:
  """The mean of cases, by seed; None if one of them has no run."""
  seeds = sorted(set.intersection(*map(set, cases)))
  return interval([sum(x[s] for x in cases) / len(cases) for s in seeds]) if seeds else None


def _growth(below: dict) -> str:
  rows = []
  for method in METHODS:
    cells = [method]
    for arm in CONTROLS:
      by_factor = [below[method, factor, arm] for factor in FACTORS]
      seeds = sorted(set.intersection(*map(set, by_factor)))
      lines = [[d[s] for d in by_factor] for s in seeds]
      x = [math.log2(f) for f in FACTORS]
      cells.append(slope(x, lines).shown(2, True) if seeds else "")
    rows.append(cells)
  title = "Does it grow? Points of reduction for each doubling of the window:"
  table = markdown.table(("", *(f"against {ARMS[a]}" for a in CONTROLS)), rows)
  return f"{title}\n\n{table}"


def _variants(results: dict, n: int) -> str:
  rows = []
  released = _values(results, MIDDLE, "yarn", "psc", n)
  for variant, title in VARIANTS.items():
    found = _values(results, MIDDLE, "yarn", variant, n)
    seeds = sorted(set(found) & set(released))
    if seeds:
      ppl = f"{sum(found[s] for s in seeds) / len(seeds):.3f}"
      other = reduction([found[s] for s in seeds], [released[s] for s in seeds])
      rows.append((title, ppl, "" if variant == "psc" else other.shown(2, True)))
  title = f"Variants of PSC over YaRN x{MIDDLE}, at {n:,} tokens:"
  return title + "\n\n" + markdown.table(("", "perplexity", "below the released one, %"), rows)


def _verdict(below: dict) -> str:
  parts = []
  for arm, title in CONTROLS.items():
    cases = [x for (_, _, a), x in below.items() if a == arm and x]
    if not cases:
      continue
    each = [interval(list(x.values())) for x in cases]
    whole = _over(cases)
    parts.append(
      f"PSC is below {title} in {sum(x.mean > 0 for x in each)} of {len(each)} cases, beyond the "
      f"95% interval in {sum(x.sign > 0 for x in each)}, above it beyond the interval in "
      f"{sum(x.sign < 0 for x in each)}"
      + (f"; {whole.below()} it in the mean of all cases" if whole else "")
    )
  return "Verdict: " + ". ".join(parts or ["too few runs"]) + "."


def _values(results: dict, factor: int, method: str, arm: str, n: int) -> dict[int, float]:
  """Perplexity by seed."""
  found = {s: results.get(_name(s, factor, method, arm)) for s in small.SEEDS}
  return {
    s: run["perplexity"][str(n)]["ppl"] for s, run in found.items()
    if run and str(n) in run["perplexity"]
  }  # fmt: skip


def _name(seed: int, factor: int, method: str, arm: str) -> str:
  return f"psc_s{seed}_x{factor}_{method}_{arm}"


def _mini(seed: int, factor: int, method: str, arm: str):
  if arm == "search":
    c = small.extended(seed, factor, method)
    c.search.method = "longrope"
    c.search.fitness.num_samples = 2
    c.search.longrope.update(
      population=16, generations=6, mutations=6, crossovers=6, parents=8, start_tokens=(0,)
    )
    return c
  # PSC: 2 x 48 x 48 x (3 + 3) parameters a layer; a rank of LoRA: 4 x (144 + 144). So 24 ranks.
  c = small.adapted(seed, factor, method, rank=32 if arm == "matched" else 8)
  _phase(c, arm)
  return c


def _paper(init_from: str):
  def build(seed: int, factor: int, method: str, arm: str):
    c = presets.psc_experiment(None, context=4096 * factor)
    c.seed = 42 + seed
    c.init_from = init_from or c.init_from
    c.rope.scaling, c.rope.phase = method, "none"
    if arm == "search":
      c.lora.rank, c.lora.alpha, c.train.trainable, c.train.steps = 0, 16.0, "all", 0
      c.search.method = "longrope"
      c.search.longrope.start_tokens = (0,)
      c.search.fitness.files = "tfds:pg19/validation"
      return c
    if arm == "matched":
      c.lora.rank, c.lora.alpha = 72, 144.0
    _phase(c, arm)
    return c

  return build


def _phase(c, arm: str) -> None:
  if arm in VARIANTS:
    c.rope.phase = "psc_rotation" if arm == "rotation" else "psc"
  if arm == "post":
    c.rope.psc.calibration = "post"
  if arm == "fan_in":
    c.rope.psc.init = "fan_in"
