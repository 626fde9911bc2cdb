"""The model card: what a model is, how it was made, and how good it is, from facts alone."""

from __future__ import annotations

import json

from rope_jax import report
from rope_jax.export.hf_config import MODELLING


def card(facts: dict, hf: dict, load: str) -> str:
  """README.md of an export, Markdown with the metadata that model hubs read.

  Args:
    facts: what rope_jax.json holds.
    hf: its config.json, or what that would be for an adapter.
    load: Python that loads it.
  """
  rope, base, step = facts["rope"], facts["base"], facts["step"]
  name = f"{base or 'A model'} at {rope['context']:,} tokens"
  name += ", LoRA adapter" * (facts["format"] == "peft")
  what = base or ("A model trained from scratch" if step else "A model with random weights")
  intro = f"{what}, for {rope['context']:,} tokens by rope_jax {facts['rope_jax']}."
  intro += " The licence of the base model holds for it." if base else ""
  notes = _notes(facts, hf)
  sections = [
    _metadata(base, facts["format"]),
    f"# {name}",
    intro,
    f"## Use\n\n```python\n{load}\n```",
    *(["\n".join(f"- {note}" for note in notes)] if notes else []),
    "## Position encoding\n\n" + _table(_rope_rows(rope)),
    "## Training\n\n" + _training(facts["config"], facts),
    "## Evaluation\n\n" + _evaluation(facts["results"]),
    "## Provenance\n\n`rope_jax.json` holds the resolved rope, the config of the run and these "
    "results.",
  ]
  return "\n\n".join(sections) + "\n"


def _notes(facts: dict, hf: dict) -> list[str]:
  """What its user must know."""
  out, p, t = [], hf["rope_parameters"], facts["config"]["train"]
  if "phase" in hf:
    out.append(
      "The learned phase (phase shift calibration) is not a part of any architecture of "
      f"transformers: `{MODELLING}` here computes it. Without it this is another model."
    )
  if p["rope_type"] == "longrope" and p.get("attention_factor", 1.0) != 1.0:
    out.append(
      "vLLM's longrope does not read `attention_factor`; serve it where it is read, as in "
      "transformers."
    )
  if p["rope_type"] == "dynamic" or p.get("short_factor") != p.get("long_factor"):
    out.append(
      "The frequencies depend on the length of the text. Programs differ in when they change them, "
      "and in whether they then compute the cache of keys again: of transformers, Phi-3 does."
    )
  if t["steps"] and t["rope"] == "unscaled":
    out.append("It was trained with the rope of the base model, and is scaled for use only.")
  return out


def _metadata(base: str, format: str) -> str:
  lines = [f"library_name: {'peft' if format == 'peft' else 'transformers'}"]
  lines += ["pipeline_tag: text-generation"]
  lines += [f"base_model: {json.dumps(base)}"] if base else []
  lines += ["tags:", "- rope_jax", "- long-context"]
  return "\n".join(["---", *lines, "---"])


def _rope_rows(rope: dict) -> dict:
  waves = [w for w in _flat(rope["wavelengths"]) if w is not None]
  scale = _flat(rope["attention_scale"])
  method = "as the base model has it" if rope["scaling"] == "none" else rope["scaling"]
  return {
    "method": method + " over the rope of the base" * (rope["base"] == "checkpoint"),
    "factor": f"{rope['factor']:g}",
    "resonance (whole wavelengths)": "yes" if rope["resonance"] else "no",
    "learned phase": rope["phase"],
    "theta": f"{rope['theta']:,.10g}",
    "original context": f"{rope['original_context']:,} tokens",
    "context": f"{rope['context']:,} tokens",
    "attention scale (of cos and sin)": f"{scale[0]:.9g}",
    "wavelengths": f"{min(waves):,.4f} to {max(waves):,.1f} tokens" if waves else "none",
  }


def _training(c: dict, facts: dict) -> str:
  t, lora = c["train"], c["lora"]
  if not facts["step"]:
    return "None: the weights are those of the base model." if facts["base"] else "None."
  length = c["data"]["length"] or c["rope"]["context"]
  what = {"all": "all parameters", "adapters": "adapters; the base model is frozen"}
  rows = {
    "starts from": c["init_from"],
    "steps": f"{facts['step']:,}" + f" of {t['steps']:,}" * (facts["step"] != t["steps"]),
    "seed": c["seed"],
    "data": c["data"]["source"] + f" (text {facts['text']})" * bool(facts.get("text")),
    "batch": f"{t['batch_size']} x {length:,} tokens",
    "positions": c["data"]["positions"],
    "trained": what[t["trainable"]],
    "trained parameters": f"{facts['trained_parameters']:,}"
    if facts.get("trained_parameters")
    else "",
    "LoRA": f"rank {lora['rank']}, alpha {lora['alpha']:g}, on {', '.join(lora['targets'])}"
    if lora["rank"]
    else "none",
    "learning rate": f"{t['learning_rate']:g}, {t['schedule']}, {t['warmup_steps']} warm-up steps",
  }
  return _table({k: v for k, v in rows.items() if v != ""})


def _evaluation(results: dict) -> str:
  parts = []
  for name, columns in results.items():
    if columns:
      rows = {f"{int(k):,} tokens" if k.isdigit() else k: report.cell(r)
              for k, r in columns.items()}  # fmt: skip
      parts.append(f"**{name}** ({report.metric(columns)})\n\n{_table(rows)}")
  return "\n\n".join(parts) or "None recorded."


def _table(rows: dict) -> str:
  return "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())])


def _flat(value) -> list:
  return [x for part in value for x in _flat(part)] if isinstance(value, list) else [value]
