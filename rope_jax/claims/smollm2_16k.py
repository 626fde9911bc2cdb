"""A real model past its window: SmolLM2-135M, 8,192 to 16,384 tokens, untrained and trained.

No paper has this model. What the papers say of theirs: extension without training breaks with PI
and holds with YaRN (YaRN, 2.4), DPRoPE disturbs least and needs the least training, Resonance
lowers YaRN's perplexity a little, PSC that of PI and YaRN after training, and short texts lose
little.

mini: every method without training; PI and YaRN after 24 steps of LoRA r=8, of LoRA with as many
parameters as LoRA r=8 and PSC (the control), and of LoRA r=8 with PSC. Training: a sequence of
2,048 tokens a step of the sources of Python's standard library, at positions that PoSE spreads
over 16,384 (a step of 16,384 tokens takes minutes on two cores), 5e-4 down to 0, one seed.
Perplexity in one pass over two held-out texts, prose (Python's manual) and code (the library's
files held out), at 2,048, 8,192 and 16,384 tokens; three passkeys of YaRN's rule at 12,288.
paper: the same with whole sequences, batches of 8, 200 steps, three seeds and 20 passkeys at each
length, for an accelerator.
"""

from __future__ import annotations

from rope_jax import config, markdown, presets
from rope_jax.claims.statistics import interval

ZERO_SHOT = {
  "untouched": dict(scaling="none"),
  "pi": dict(scaling="pi"),
  "yarn": dict(scaling="yarn"),
  "dprope": dict(scaling="dprope"),
  "resonance_yarn": dict(scaling="yarn", resonance=True),
}
TRAINED, ARMS = ("pi", "yarn"), ("lora", "matched", "psc")
TITLES = {"lora": "LoRA r=8", "matched": "LoRA r=34, as many parameters", "psc": "LoRA r=8 + PSC"}
LENGTHS = (2048, 8192, 16_384)
SEEDS = {"mini": (0,), "paper": (0, 1, 2)}


def runs(preset: str, init_from: str) -> dict:
  """Every method as it is, then the trained ones."""
  out = {f"smollm2_{name}": _base(preset, init_from, rope) for name, rope in ZERO_SHOT.items()}
  for seed in SEEDS[preset]:
    for scaling in TRAINED:
      for arm in ARMS:
        c = _base(preset, init_from, dict(scaling=scaling))
        out[f"smollm2_s{seed}_{scaling}_{arm}"] = _trained(c, preset, seed, arm)
  return out


def report(results: dict, preset: str) -> str:
  """Perplexity on both texts, passkeys, and what training and PSC bring at each length."""
  header = ["", *(f"{text} {n:,}" for text in ("prose", "code") for n in LENGTHS)]
  lengths = sorted({int(n) for run in results.values() for n in run.get("passkey", {})})
  header += [f"passkey {n:,}" for n in lengths]
  rows = []
  for title, names in _rows(preset):
    found = [results[name] for name in names if name in results]
    if not found:
      continue
    cells = [title]
    for text in ("prose", "code"):
      for n in LENGTHS:
        cells.append(interval([run[text][str(n)]["ppl"] for run in found]).shown(3))
    for n in lengths:
      hits = [run["passkey"][str(n)] for run in found if str(n) in run.get("passkey", {})]
      count = sum(h["samples"] for h in hits)
      right = round(sum(h["accuracy"] * h["samples"] for h in hits))
      cells.append(f"{right}/{count}" if count else "")
    rows.append(cells)
  return f"{markdown.table(header, rows)}\n\n{_verdict(results, preset)}"


def _verdict(results: dict, preset: str) -> str:
  return "\n\n".join(["Verdict:", _zero_shot(results), _psc(results, preset)])


def _zero_shot(results: dict) -> str:
  """The methods by perplexity at the whole window, best first, of each text."""
  lines, n = [], str(LENGTHS[-1])
  for text in ("prose", "code"):
    found = {m: results[f"smollm2_{m}"] for m in ZERO_SHOT if f"smollm2_{m}" in results}
    ppl = sorted((run[text][n]["ppl"], m) for m, run in found.items())
    if len(ppl) > 1:
      lines.append(f"{text}, {', '.join(f'{m} {p:.2f}' for p, m in ppl)}")
  what = f"Not trained, at {LENGTHS[-1]:,} tokens, from the best: "
  return what + ("; ".join(lines) + "." if lines else "too few runs.")


def _psc(results: dict, preset: str) -> str:
  parts = []
  for scaling in TRAINED:
    for text in ("prose", "code"):
      words = []
      for other in ("lora", "matched"):
        cuts = []
        for seed in SEEDS[preset]:
          a, b = (results.get(f"smollm2_s{seed}_{scaling}_{x}") for x in ("psc", other))
          if a and b:
            n = str(LENGTHS[-1])
            cuts.append(100 * (1 - a[text][n]["ppl"] / b[text][n]["ppl"]))
        if cuts:
          words.append(f"{interval(cuts).below()} {TITLES[other].split(',')[0]}")
      if words:
        parts.append(f"{scaling}, {text}: PSC {' and '.join(words)}")
  if not parts:
    return "PSC: too few runs."
  seeds = "" if len(SEEDS[preset]) > 1 else " One seed: no interval, and no verdict on PSC."
  return f"At {LENGTHS[-1]:,} tokens: {'; '.join(parts)}.{seeds}"


def _rows(preset: str) -> list[tuple[str, list[str]]]:
  out = [(f"{name}, not trained", [f"smollm2_{name}"]) for name in ZERO_SHOT]
  for scaling in TRAINED:
    for arm in ARMS:
      names = [f"smollm2_s{seed}_{scaling}_{arm}" for seed in SEEDS[preset]]
      out.append((f"{scaling}, {TITLES[arm]}", names))
  return out


def _base(preset: str, init_from: str, rope: dict):
  c = config.base()
  presets.smollm2_135m(c)
  c.init_from = init_from or c.init_from
  c.rope.context = LENGTHS[-1]
  c.rope.update(rope)
  samples = 1 if preset == "mini" else 8
  common = dict(lengths=LENGTHS, protocol="truncate")
  c.evals.prose = config.perplexity(files=presets.manual(), num_samples=1, **common)
  c.evals.code = config.perplexity(num_samples=samples, **common)
  c.evals.passkey = config.passkey(lengths=(12_288,), num_samples=3)
  if preset == "paper":
    c.evals.passkey.update(lengths=LENGTHS, num_samples=20)
  return c


def _trained(c, preset: str, seed: int, arm: str):
  c.seed = seed
  # PSC: 2 x 64 x 64 x (9 + 3) parameters a layer; a rank of LoRA on q, k, v, o:
  # 2 x (576 + 576) + 2 x (576 + 192) = 3,840. So r = 8 + 98,304 / 3,840 = 33.6.
  rank = 34 if arm == "matched" else 8
  c.lora.rank, c.lora.alpha = rank, 2.0 * rank
  if arm == "psc":
    c.rope.phase = "psc"
  c.data.min_tokens = 4096
  c.train.update(trainable="adapters", learning_rate=5e-4, warmup_steps=5, log_every=4,
                 schedule="linear")  # fmt: skip
  if preset == "mini":
    c.data.length, c.data.positions, c.data.packing = 2048, "pose", "document"
    c.train.update(steps=24, batch_size=1)
    c.checkpoint.every = 8
  else:
    c.train.update(steps=200, batch_size=8)
    c.checkpoint.every = 50
  return c
