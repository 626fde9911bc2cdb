"""YaRN's ablation (jquesnelle/yarn, branch ntk-by-parts): PI, NTK, NTK-by-parts, YaRN, one recipe.

Published: Llama-1 7B from 2k to 32k, 400 steps each, all weights trained; perplexity at 32k 3.568,
8.494, 2.814, 2.769, at 2k 5.704, 4.391, 4.143, 4.189; passkey at 32k .76, .00, .12, .68 (PI's is
the best one). Loss of the first step, so without training, 5.52, 5.50, 4.65, 3.02.

mini: the small Llama (window 256, bytes) at x16, before and after 60 steps of all weights at 3e-4,
a rate that stays, three seeds of base and training. It is too small to find a passkey: see
docs/evaluation.md for SmolLM2's, without training.
paper: Llama-2 7B, 4k to 64k, 400 steps of 64 sequences at 2e-5; --init_from=DIR names its weights.
"""

from __future__ import annotations

from rope_jax import config, figures, markdown, presets
from rope_jax.claims import small
from rope_jax.claims.statistics import reduction

METHODS = {"pi": "PI", "ntk": "NTK-aware", "ntk_by_parts": "NTK-by-parts", "yarn": "YaRN"}
PUBLISHED = {  # perplexity at 2k, ..., 32k; passkey at 32k
  "pi": (5.704, 4.955, 4.639, 3.972, 3.568, 0.76),
  "ntk": (4.391, 3.920, 3.731, 3.211, 8.494, 0.0),
  "ntk_by_parts": (4.143, 3.747, 3.623, 3.128, 2.814, 0.12),
  "yarn": (4.189, 3.767, 3.605, 3.088, 2.769, 0.68),
}
UNTOUCHED = {"none": "untouched"}
FACTOR = 16


def runs(preset: str, init_from: str) -> dict:
  """The untouched model, and each method before and after training."""
  out = {}
  for seed in small.SEEDS:
    if preset == "mini":
      out[small.base_name(seed)] = small.pretraining(seed)
    make = _mini if preset == "mini" else _paper
    # One base model has one result without training: there, a seed is of nothing.
    untrained = preset == "mini" or seed == small.SEEDS[0]
    if untrained:
      out[_name(seed, "none", False)] = make(seed, "none", False, init_from)
    for method in METHODS:
      for trained in (False, True) if untrained else (True,):
        out[_name(seed, method, trained)] = make(seed, method, trained, init_from)
  return out


def report(results: dict, preset: str) -> str:
  """A table before and one after training, the published ones, and the order at the window."""
  lengths = sorted({int(n) for run in results.values() for n in run["perplexity"]})
  found = sorted({int(n) for run in results.values() for n in run.get("passkey", {})})
  parts = []
  header = ("perplexity at", *(f"{n:,}" for n in lengths), *(f"passkey at {n:,}" for n in found))
  for trained in (False, True):
    rows = [
      (
        title,
        *(_shown(_values(results, method, trained, n), 3) for n in lengths),
        *(_shown(_values(results, method, trained, n, "passkey"), 2) for n in found),
      )
      for method, title in (METHODS if trained else UNTOUCHED | METHODS).items()
    ]
    title = "After the same training" if trained else "Without training"
    parts.append(f"{title} (means over seeds):\n\n{markdown.table(header, rows)}")
  rows = [(METHODS[m], *(f"{x:.3f}" for x in v[:5]), f"{v[5]:.2f}") for m, v in PUBLISHED.items()]
  header = ("perplexity at", "2,048", "4,096", "8,192", "16,384", "32,768", "passkey at 32,768")
  parts.append("Published (trained):\n\n" + markdown.table(header, rows))
  return "\n\n".join([*parts, _verdict(results, lengths)])


def figure(results: dict, preset: str, path: str) -> bool:
  """Perplexity by length and by position of the first seed, before and after training."""
  shown = {"none": (False,), "pi": (False, True), "yarn": (False, True)}
  found = {
    f"{(UNTOUCHED | METHODS)[m]}{', trained' if trained else ''}": results.get(
      _name(small.SEEDS[0], m, trained), {}
    ).get("perplexity")
    for m, which in shown.items() for trained in which
  }  # fmt: skip
  context = small.WINDOW if preset == "mini" else 4096
  found = {name: run for name, run in found.items() if run}
  if found:
    figures.by_length(found, path, original_contexts=[context])
  return bool(found)


def _verdict(results: dict, lengths: list[int]) -> str:
  """Pairs of the published order, and of what the published order has far apart."""
  n, parts = max(lengths, default=0), []
  for trained in (False, True):
    pairs = [
      ("yarn", "ntk_by_parts"),
      ("ntk_by_parts", "pi"),
      ("ntk_by_parts", "ntk"),
      ("pi", "ntk"),
    ]
    words = []
    for better, worse in pairs:
      ours, theirs = (_values(results, m, trained, n) for m in (better, worse))
      seeds = sorted(set(ours) & set(theirs))
      if not seeds:
        continue
      found = reduction([ours[s] for s in seeds], [theirs[s] for s in seeds])
      said = found.says("holds", "is the other way round")
      words.append(f"{METHODS[better]} below {METHODS[worse]} {said} ({found.shown(1, True)}%)")
    if words:
      parts.append(f"- {'after' if trained else 'without'} training, {'; '.join(words)}")
  if not parts:
    return "Verdict: too few runs."
  lines = "\n".join(parts)
  return f"Verdict, of the published order at the whole window ({n:,} tokens):\n\n{lines}"


def _shown(values: dict[int, float], digits: int) -> str:
  return f"{sum(values.values()) / len(values):.{digits}f}" if values else ""


def _values(
  results: dict, method: str, trained: bool, n: int, evaluation: str = "perplexity"
) -> dict[int, float]:
  """By seed: perplexity, or the share of passkeys found."""
  found = {s: results.get(_name(s, method, trained), {}).get(evaluation, {}) for s in small.SEEDS}
  return {s: r[str(n)][r[str(n)]["metric"]] for s, r in found.items() if str(n) in r}


def _name(seed: int, method: str, trained: bool) -> str:
  return f"yarn_s{seed}_{method}_{'trained' if trained else 'before'}"


def _mini(seed: int, method: str, trained: bool, init_from: str):
  c = small.extended(seed, FACTOR, method)
  if trained:
    c.train.update(steps=60, batch_size=1, learning_rate=3e-4, warmup_steps=10, log_every=10)
  return c


def _paper(seed: int, method: str, trained: bool, init_from: str):
  c = presets.psc_experiment(None, context=4096 * FACTOR)
  c.init_from = init_from or c.init_from
  c.seed = 42 + seed
  c.rope.scaling, c.rope.phase = method, "none"
  c.lora = config.base().lora
  c.model.param_dtype = "float32"  # all of it is trained
  c.train.update(trainable="all", steps=400 if trained else 0, batch_size=64, accumulation=8,
                 learning_rate=2e-5, schedule="linear", b2=0.95)  # fmt: skip
  c.evals.passkey = config.passkey(lengths=c.evals.perplexity.lengths)
  return c
