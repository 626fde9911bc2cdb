"""DPRoPE's ablation (arXiv 2410.01490): how many channels to interpolate.

Published: Llama-2 13B at 8k, trained, mean of LongBench-E with n-hat = 56, 64, 72, 80, 88, 96 of
128 channels: 30.71, 30.83, 30.87, 31.15, 31.06, 31.08. Performance falls with the disturbance.

mini: SmolLM2-135M from 8,192 to 16,384 tokens, not trained: perplexity of one window of Python's
manual at each n-hat of 64 channels, among them the one that t = 0 gives; all 64 would be PI. One
text and no seed: nothing is drawn at random.
paper: Llama-2 13B at 8k, not trained, perplexity on PG-19; --init_from=DIR names its weights.
"""

from __future__ import annotations

import numpy as np

from rope_jax import config, markdown, presets, resolve
from rope_jax import rope as rope_lib

DIMS = {"mini": (16, 24, 32, 36, 40, 44, 52, 58, 0), "paper": (56, 64, 72, 80, 88, 96)}
BASELINES = ("none", "pi", "yarn")
PUBLISHED = {56: 30.71, 64: 30.83, 72: 30.87, 80: 31.15, 88: 31.06, 96: 31.08}


def runs(preset: str, init_from: str) -> dict:
  """A run for each n-hat, 0 standing for t = 0, and for each baseline."""
  out = {_name(n): _config(preset, init_from, "dprope", n) for n in DIMS[preset]}
  return out | {_name(m): _config(preset, init_from, m) for m in BASELINES}


def report(results: dict, preset: str) -> str:
  """Perplexity and disturbance by n-hat, and whether the two go together."""
  lengths = sorted({int(n) for run in results.values() for n in run["perplexity"]})
  rows, pairs = [], []
  for which in (*BASELINES, *DIMS[preset]):
    run = results.get(_name(which), {}).get("perplexity", {})
    c = _config(preset, "", *((which,) if isinstance(which, str) else ("dprope", which)))
    r, base = resolve.rope(c), resolve.base(c)
    disturbed = 1e3 * float(np.mean(rope_lib.disturbance(r, base, c.rope.context)))
    changed = 2 * int((r.inv_freq < base.inv_freq * (1 - 1e-9)).sum())
    label = which if isinstance(which, str) else f"dprope, n-hat = {_label(which)}"
    columns = [run.get(str(n), {}) for n in lengths]
    cells = [f"{x['ppl']:.3f} ± {x['stderr']:.3f}" if x else "" for x in columns]
    rows.append((label, str(changed), f"{disturbed:.2f}", *cells))
    if not isinstance(which, str) and lengths and str(lengths[-1]) in run:
      column = run[str(lengths[-1])]
      pairs.append((disturbed, column["ppl"], which, column["stderr"]))
  header = ("", "channels changed", "D x 1e-3", *(f"ppl at {n:,}" for n in lengths))
  published = markdown.table(
    ("published, n-hat", *map(str, PUBLISHED)),
    [("LongBench-E", *(f"{x:.2f}" for x in PUBLISHED.values()))],
  )
  return f"{markdown.table(header, rows)}\n\n{published}\n\n{_verdict(pairs)}"


def _verdict(pairs: list[tuple[float, float, int, float]]) -> str:
  """Of (disturbance, perplexity, n-hat, standard error)."""
  if len(pairs) < 3:
    return "Verdict: too few runs."
  from scipy import stats

  by_disturbance, by_ppl = (min(pairs, key=lambda p: p[i]) for i in (0, 1))
  rank = stats.spearmanr([p[0] for p in pairs], [p[1] for p in pairs]).statistic
  if by_disturbance[2] == by_ppl[2]:
    found = "has the least perplexity"
  else:
    more = by_disturbance[1] - by_ppl[1]
    found = f"does not have the least perplexity: n-hat = {_label(by_ppl[2])} has {more:.3f} less"
    found += " (within its standard error)" if more < by_ppl[3] else ""
  return (
    f"Verdict: the least disturbance, n-hat = {_label(by_disturbance[2])}, {found}; rank "
    f"correlation of disturbance and perplexity over {len(pairs)} settings: {rank:+.2f}. "
    "Standard errors are over the tokens of one window, which all settings share."
  )


def _label(dims: int) -> str:
  return str(dims) if dims else "that of t = 0"


def _name(which: int | str) -> str:
  return f"dprope_{which}" if isinstance(which, str) else f"dprope_n{which}"


def _config(preset: str, init_from: str, scaling: str, dims: int = 0):
  c = config.base()
  if preset == "mini":
    presets.smollm2_135m(c)
    files, lengths = presets.manual(), (2048, 16_384)
  else:
    presets.llama2_7b(c)
    c.model.update(num_layers=40, d_model=5120, num_heads=40, num_kv_heads=40, d_ff=13_824)
    c.init_from, files, lengths = "Llama-2-13b-hf", "tfds:pg19/test", (2048, 8192)
  c.init_from = init_from or c.init_from
  c.rope.context = lengths[-1]
  c.rope.scaling = scaling
  if scaling == "dprope":
    c.rope.dprope.interpolated_dims = dims
  samples = 1 if preset == "mini" else 16
  c.evals.perplexity = config.perplexity(
    files=files, lengths=lengths, protocol="truncate", num_samples=samples
  )
  return c
