"""Results out: a run, or an extended base model, as a directory that transformers and PEFT load."""

from __future__ import annotations

import math
import os
import shutil
import sys
from importlib import resources

import jax
from tqdm import tqdm

import rope_jax
from rope_jax import config as config_lib
from rope_jax import reading, resolve
from rope_jax import results as results_lib
from rope_jax.export import card, files, hf_config, peft, tensors, tokenizer
from rope_jax.export import origin as origin_lib
from rope_jax.export.hf_config import MODELLING
from rope_jax.train import loop, multihost

FORMATS = ("hf", "peft")
PROVENANCE = "rope_jax.json"
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
  if multihost.is_main() and os.path.lexists(out):
    raise ValueError(f"--out={out} exists already; choose another, or move it away")
  if step is not None and not (c.train.steps and config_lib.holds_run(workdir)):
    raise ValueError(f"--step={step}: there is no trained run in --workdir={workdir!r}")
  origin = origin_lib.of(c, workdir)
  check(c, origin, format, freeze=freeze)
  facts = _facts(c, workdir, step, base_model or origin.name)
  text = loop.load_tokenizer(c, workdir) if with_tokenizer and format == "hf" else None
  with loop.opened(c, workdir, 1, step=step) as (variables, _):
    return write(
      c,
      variables,
      out,
      text=text,
      origin=origin,
      facts=facts,
      format=format,
      dtype=dtype,
      freeze=freeze,
      shard_bytes=shard_bytes,
    )


def check(c, origin: origin_lib.Origin, format: str = "hf", *, freeze: bool = False) -> dict:
  """Refuses what cannot be exported, before any weight is read; config.json without ids of tokens.

  Raises:
    ValueError: naming the key or the flag.
  """
  if format not in FORMATS:
    raise ValueError(f"--format={format}: expected one of {FORMATS}")
  if format == "peft":
    peft.check(c, origin)
  return hf_config.model(c, phase=format == "hf", freeze=freeze)


def write(
  c,
  variables: dict,
  out: str,
  *,
  text=None,
  origin: origin_lib.Origin | None = None,
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
    origin: where the base model came from; that of config.init_from if None.
    facts: of the run, for the card.
  """
  origin = origin_lib.of(c, "") if origin is None else origin
  hf = check(c, origin, format, freeze=freeze)
  dtype = dtype or ("float32" if format == "peft" else c.model.param_dtype)
  facts = _facts(c, "", None, origin.name) if facts is None else facts
  facts = _plain(facts | dict(format=format, dtype=dtype))
  if format == "peft":
    weights = {peft.NAME: tensors.adapters(variables["lora"], dtype)}
    shard_bytes = sys.maxsize  # PEFT reads one file
  else:
    scale, fused = c.lora.alpha / max(c.lora.rank, 1), hf_config.family(hf) == "phi3"
    weights = dict(model=tensors.merged(variables, scale, dtype, fused=fused))
    if c.rope.phase != "none":
      weights["psc"] = tensors.phase(variables["phase"], c.model.num_layers)
  total = sum(t.nbytes for part in weights.values() for t in part)
  with files.new_directory(out, writes=multihost.is_main()) as directory, _bar(total) as bar:
    written = files.write_shards(directory, weights, shard_bytes, bar.update)
    if directory:
      written += _write_rest(directory, c, origin, hf, facts, text)
  multihost.wait("exported")
  return dict(out=out, files=written, bytes=total, facts=facts)


def _facts(c, workdir: str, step: int | None, base: str) -> dict:
  """What is known of how the model came to be."""
  run = results_lib.facts(workdir) if config_lib.holds_run(workdir) else {}
  known = {k: v for k, v in run.get("run", {}).items() if k not in ("config", "rope_jax")}
  trained = bool(run) and c.train.steps > 0
  newest = run.get("step", 0) if trained else 0
  return dict(
    rope_jax=rope_jax.__version__,
    base=base,
    step=(newest if step is None else step) if trained else 0,
    rope=resolve.describe(c),
    config=c.to_dict(),
    **known,
    results=_results(c, workdir) if step in (None, newest) else {},
  )


def _results(c, workdir: str) -> dict:
  """The evaluations of a run, if they are of the model that is exported."""
  path = os.path.join(workdir, results_lib.RESULTS_FILE)
  if not config_lib.holds_run(workdir) or not os.path.exists(path):
    return {}
  evaluated = config_lib.read(workdir).rope
  if (evaluated.context, evaluated.factor) != (c.rope.context, c.rope.factor):
    return {}  # those two may differ from the run's: nothing is known of this rope
  return reading.read_object(path)


def _plain(value):
  """JSON that may be published: no NaN, no tuples, of the paths of this machine only their ends."""
  if isinstance(value, dict):
    return {k: _plain(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(v) for v in value]
  if isinstance(value, str) and value.startswith((os.sep, "~")):
    return ",".join(os.path.basename(x.rstrip(os.sep)) for x in value.split(","))
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_rest(directory: str, c, origin, hf: dict, facts: dict, text) -> list[str]:
  written = [PROVENANCE, "README.md"]
  if facts["format"] == "peft":
    files.write_json(os.path.join(directory, "adapter_config.json"), peft.config(c, facts["base"]))
    files.write_json(os.path.join(directory, peft.ROPE), peft.base_settings(hf))
    written += ["adapter_config.json", peft.ROPE]
    load = peft.load_snippet(facts["base"])
  else:
    found, ids = [], {}
    if text is not None:
      found, ids = tokenizer.write(directory, c.tokenizer, origin.path, facts["rope"]["context"])
      ids = dict(bos_token_id=text.bos_id, eos_token_id=text.eos_id) | ids
    if "phase" in hf:
      modelling = resources.files("rope_jax.export") / MODELLING
      with resources.as_file(modelling) as path:
        shutil.copyfile(path, os.path.join(directory, MODELLING))
      written.append(MODELLING)
    hf = hf | hf_config.special_tokens(origin.hf, ids) | dict(dtype=facts["dtype"])
    generation = hf_config.generation(origin.generation, hf, c.rope.context)
    for name, value in (("config.json", hf), ("generation_config.json", generation)):
      files.write_json(os.path.join(directory, name), value)
    written += [*found, "config.json", "generation_config.json"]
    load = hf_config.load_snippet(has_phase="phase" in hf, has_tokenizer=bool(found))
  files.write_json(os.path.join(directory, PROVENANCE), facts)
  with open(os.path.join(directory, "README.md"), "w", encoding="utf-8") as f:
    f.write(card.card(facts, hf, load))
  return written


def _bar(total: int):
  quiet = None if jax.process_index() == 0 else True
  return tqdm(total=total, desc="exporting", unit="B", unit_scale=True, leave=False, disable=quiet)
