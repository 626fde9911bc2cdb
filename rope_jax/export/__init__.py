"""Results out: a run, or an extended base model, as a directory that transformers and PEFT load."""

from __future__ import annotations

import json
import os
import shutil
import sys
from importlib import resources

import jax
from tqdm import tqdm

import rope_jax
from rope_jax import config as config_lib
from rope_jax import resolve
from rope_jax import results as results_lib
from rope_jax import rope as rope_lib
from rope_jax.export import card, files, peft, tensors, tokenizer
from rope_jax.train import loop, multihost, state
from rope_jax.weights import families, huggingface, locate

FORMATS = ("hf", "peft")
DTYPES = ("", "float32", "bfloat16")
PROVENANCE = "rope_jax.json"
MODELLING = "modeling_rope_jax.py"
SHARD_BYTES = 5 * 10**9


def export(
  c,
  workdir: str,
  out: str,
  *,
  format: str = "hf",
  dtype: str = "",
  step: int | None = None,
  freeze: bool = False,
  base_model: str = "",
  with_tokenizer: bool = True,
  shard_bytes: int = SHARD_BYTES,
) -> dict:
  """Writes a model for others to load; all processes of a run take part.

  'hf' is a whole model: LoRA is merged, the rope is in config.json, and transformers needs no code
  of ours, except for a learned phase (PSC), which comes with its modelling file. 'peft' is LoRA
  alone, with the rope that its base model must be given.

  Args:
    c: a validated config.
    workdir: of a run; where it holds none, the model of config.init_from is exported.
    out: directory to make; it appears when all is written.
    format: one of `FORMATS`.
    dtype: of the weights, 'float32' or 'bfloat16'; '' as they are in the run.
    step: of the checkpoint to export; None is the newest.
    freeze: write a rope that depends on the length of the sequence as it is at rope.context.
    base_model: what the card and PEFT call the base model; '' is config.init_from.
    with_tokenizer: False leaves it out, where there is none or it cannot be read.
    shard_bytes: of a file of weights.

  Returns:
    What was written: {'out', 'files', 'bytes', 'facts'}.

  Raises:
    ValueError: before anything is written, if nothing of this format is the same model.
  """
  check(c, out, format, freeze=freeze, base_type=base_type(c, workdir))
  facts = _facts(c, workdir, step, base_model)
  text = loop.load_tokenizer(c, workdir) if with_tokenizer and format == "hf" else None
  with loop.opened(c, workdir, 1, step=step) as (variables, _):
    return write(
      c,
      variables,
      out,
      text=text,
      init_path=state.init_path(c, workdir),
      facts=facts,
      format=format,
      dtype=dtype,
      freeze=freeze,
      shard_bytes=shard_bytes,
    )


def check(c, out: str, format: str = "hf", *, freeze: bool = False, base_type: str = "") -> dict:
  """Refuses what cannot be exported, before any weight is read; config.json without ids of tokens.

  Raises:
    ValueError: naming the key or the flag.
  """
  if format not in FORMATS:
    raise ValueError(f"--format={format}: expected one of {FORMATS}")
  if os.path.lexists(out):
    raise ValueError(f"--out={out} exists already; choose another, or move it away")
  if format == "peft":
    peft.check(c, base_type)
  return _config(c, format, freeze)


def write(
  c,
  variables: dict,
  out: str,
  *,
  text=None,
  init_path: str = "",
  facts: dict | None = None,
  format: str = "hf",
  dtype: str = "",
  freeze: bool = False,
  shard_bytes: int = SHARD_BYTES,
) -> dict:
  """Writes variables that are at hand; as `export` otherwise.

  Args:
    c: the config that they go with.
    variables: by collection, on one device or over the mesh that is set.
    out, format, dtype, freeze, shard_bytes: as for `export`.
    text: the tokenizer of the config, `loop.load_tokenizer`; None writes none.
    init_path: where the base model came from, for its tokenizer and special tokens.
    facts: of the run, for the card.
  """
  hf = check(c, out, format, freeze=freeze)
  dtype = dtype or ("float32" if format == "peft" else c.model.param_dtype)
  facts = _facts(c, "", None, "") if facts is None else facts
  facts = facts | dict(format=format, dtype=dtype)
  if format == "peft":
    weights = {peft.NAME: tensors.adapters(variables["lora"], dtype)}
    shard_bytes = sys.maxsize  # PEFT reads one file
  else:
    scale, fused = c.lora.alpha / max(c.lora.rank, 1), hf_type(hf) == "phi3"
    weights = dict(model=tensors.merged(variables, scale, dtype, fused=fused))
    if c.rope.phase != "none":
      weights["psc"] = tensors.phase(variables["phase"], c.model.num_layers)
  total = sum(t.nbytes for part in weights.values() for t in part)
  with files.new_directory(out, writes=multihost.is_main()) as directory, _bar(total) as bar:
    written = files.write_shards(directory, weights, shard_bytes, bar.update)
    if directory:
      written += _write_rest(directory, c, init_path, hf, facts, text)
  multihost.wait("exported")
  return dict(out=out, files=written, bytes=total, facts=facts)


def hf_type(hf: dict) -> str:
  """The architecture of a config.json of ours."""
  return hf.get("base_model_type", hf["model_type"])


def base_type(c, workdir: str) -> str:
  """The architecture of config.init_from, where it is a Hugging Face directory; else ''."""
  kind, path = locate(state.init_path(c, workdir)) if c.init_from else ("", "")
  if kind != "hf":
    return ""
  with open(os.path.join(path, "config.json")) as f:
    return json.load(f).get("model_type", "")


def _config(c, format: str, freeze: bool) -> dict:
  rope = resolve.rope(c)
  if c.rope.scaling == "clex" or (format == "hf" and c.rope.phase not in resolve.PHASES):
    raise ValueError(f"config.rope.scaling={c.rope.scaling!r}: no library has what it learned")
  try:
    out = families.write(c.model, rope.rotary_dim)
    only = ("default", "longrope") if out["model_type"] == "phi3" else None
    out |= rope_lib.to_hf(rope, freeze=freeze, only=only)
  except ValueError as error:
    raise ValueError(f"config.rope: {error}" if "config." not in str(error) else error) from None
  # The same under the keys of earlier readers, which would else run a plain rope without a word.
  parameters = out["rope_parameters"]
  out["rope_theta"] = parameters["rope_theta"]
  out["rope_scaling"] = None if parameters["rope_type"] == "default" else parameters
  if out["model_type"] == "phi3":
    out["original_max_position_embeddings"] = rope.original_context
  if c.rope.phase != "none" and format == "hf":
    name = out["architectures"][0].removesuffix("ForCausalLM")
    module = MODELLING.removesuffix(".py")
    out["base_model_type"], out["model_type"] = out["model_type"], huggingface.MODEL_TYPE
    out["architectures"] = [f"RopeJax{name}ForCausalLM"]
    kinds = dict(AutoConfig="Config", AutoModel="Model", AutoModelForCausalLM="ForCausalLM")
    out["auto_map"] = {auto: f"{module}.RopeJax{name}{kind}" for auto, kind in kinds.items()}
    out["phase"] = huggingface.phase(c.rope)
  return out


def _facts(c, workdir: str, step: int | None, base_model: str) -> dict:
  """What is known of how the model came to be."""
  run = results_lib.facts(workdir) if config_lib.holds_run(workdir) else {}
  known = {k: v for k, v in run.get("run", {}).items() if k not in ("config", "rope_jax")}
  path, results = os.path.join(workdir, results_lib.RESULTS_FILE), {}
  trained = bool(run) and c.train.steps > 0
  newest = run.get("step", 0) if trained else 0
  if os.path.exists(path) and step in (None, newest):  # of another step they are not known
    with open(path) as f:
      results = json.load(f)
  return dict(
    rope_jax=rope_jax.__version__,
    base=base_model or _base_name(c, workdir),
    step=(newest if step is None else step) if trained else 0,
    rope=resolve.describe(c),
    config=c.to_dict(),
    **known,
    results=results,
  )


def _base_name(c, workdir: str) -> str:
  """What the weights of a run come from in the end; '' if they were random."""
  if not c.init_from:
    return ""
  kind, path = locate(state.init_path(c, workdir))
  if kind == "run":
    return _base_name(config_lib.read(path), path)
  return os.path.basename(c.init_from.rstrip(os.sep))


def _write_rest(directory: str, c, init_path: str, hf: dict, facts: dict, text) -> list[str]:
  written = [PROVENANCE, "README.md"]
  facts = json.loads(json.dumps(facts))  # tuples as JSON has them
  if facts["format"] == "peft":
    files.write_json(os.path.join(directory, "adapter_config.json"), peft.config(c, facts["base"]))
    kept = ("rope_parameters", "max_position_embeddings")
    files.write_json(os.path.join(directory, peft.ROPE), {k: hf[k] for k in kept})
    written += ["adapter_config.json", peft.ROPE]
    load, name = peft.load_snippet(facts["base"]), f"{facts['base'] or 'model'}-lora"
  else:
    found, ids = [], {}
    if text is not None:
      found, ids = tokenizer.write(directory, c.tokenizer, init_path, facts["rope"]["context"])
    if "phase" in hf:
      modelling = resources.files("rope_jax.export") / MODELLING
      with resources.as_file(modelling) as path:
        shutil.copyfile(path, os.path.join(directory, MODELLING))
      written.append(MODELLING)
    hf = hf | _special(init_path, text, ids) | dict(dtype=facts["dtype"])
    files.write_json(os.path.join(directory, "config.json"), hf)
    files.write_json(
      os.path.join(directory, "generation_config.json"), _generation(c, init_path, hf)
    )
    written += [*found, "config.json", "generation_config.json"]
    load, name = _load_snippet("phase" in hf, bool(found)), facts["base"] or "model"
    name += f" at {facts['rope']['context']:,} tokens"
  files.write_json(os.path.join(directory, PROVENANCE), facts)
  with open(os.path.join(directory, "README.md"), "w", encoding="utf-8") as f:
    f.write(card.card(facts, name=name, load=load, notes=_notes(c, hf, facts["format"])))
  return written


def _special(init_path: str, text, ids: dict) -> dict:
  """Ids of special tokens: the base model's own, which may be several, or the tokenizer's."""
  own = _base_json(init_path, "config.json")
  out = {k: own[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in own}
  if out:
    return out
  out = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
  return (
    out | dict(bos_token_id=text.bos_id, eos_token_id=text.eos_id) | ids
    if text is not None
    else out
  )


def _generation(c, init_path: str, hf: dict) -> dict:
  own = _base_json(init_path, "generation_config.json")
  if "max_length" in own:  # of the base model's window
    own["max_length"] = max(own["max_length"], c.rope.context)
  special = {k: hf[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in hf}
  return own or {"_from_model_config": True, **special}


def _base_json(init_path: str, file: str) -> dict:
  """A JSON object of the base model, where that is a Hugging Face directory that has it."""
  kind, path = locate(init_path) if init_path else ("", "")
  path = os.path.join(path, file)
  if kind != "hf" or not os.path.isfile(path):
    return {}
  with open(path, encoding="utf-8") as f:
    return json.load(f)


def _load_snippet(has_phase: bool, has_tokenizer: bool) -> str:
  code = ", trust_remote_code=True" if has_phase else ""
  auto = "AutoModelForCausalLM, AutoTokenizer" if has_tokenizer else "AutoModelForCausalLM"
  lines = [
    f"from transformers import {auto}",
    "",
    f'model = AutoModelForCausalLM.from_pretrained("DIR"{code})',
  ]
  return "\n".join(
    [*lines, *(['tokenizer = AutoTokenizer.from_pretrained("DIR")'] * has_tokenizer)]
  )


def _notes(c, hf: dict, format: str) -> list[str]:
  out, p = [], hf["rope_parameters"]
  if format == "hf" and c.rope.phase != "none":
    out.append(
      "The learned phase (phase shift calibration) is not a part of any architecture of "
      f"transformers: `{MODELLING}` here computes it. Without it this is another model."
    )
  if p.get("rope_type") == "longrope" and p.get("attention_factor", 1.0) != 1.0:
    out.append(
      "vLLM's longrope does not read `attention_factor`; serve it where it is read, as in "
      "transformers."
    )
  if p.get("rope_type") == "dynamic" or p.get("short_factor") != p.get("long_factor"):
    out.append("The frequencies depend on the length of the sequence, and servers differ in when "
               "they change them.")  # fmt: skip
  if c.train.steps and c.train.rope == "unscaled":
    out.append("It was trained with the rope of the base model, and is scaled for use only.")
  return out


def _bar(total: int):
  quiet = None if jax.process_index() == 0 else True
  return tqdm(total=total, desc="exporting", unit="B", unit_scale=True, leave=False, disable=quiet)
