"""Good files of every kind that is read: what `fuzz_files` damages.

A case is a directory, {name: bytes}. Its names without a directory are the files that are damaged.
"""

import io
import json

import gguf
import gguf_files
import numpy as np
import tiny
import tokenizers
from safetensors.numpy import save
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from rope_jax import config, resolve
from rope_jax.data.tokenizer import ByteTokenizer
from rope_jax.data.tokens import tokenize
from rope_jax.search.journal import Journal

PLAIN = dict(rope_type="default", rope_theta=5000.0)
YARN = dict(rope_type="yarn", rope_theta=5000.0, factor=4.0, original_max_position_embeddings=16)
LONGROPE = dict(rope_type="longrope", rope_theta=5000.0, short_factor=[1.0] * 4,
                long_factor=[1.0, 1.5, 2.0, 4.0], factor=4.0)  # fmt: skip
WORDS = ["<unk>", "<s>", "</s>", "a", "b", "c", "ab", "abc", "Ġ", "Ġa", "▁", "▁a", "<0x0A>"]


def json_bytes(value) -> bytes:
  return json.dumps(value, indent=1).encode()


# ---- Checkpoints.


def hugging_face() -> list[dict[str, bytes]]:
  """Directories with two shards and an index, or with one file; three families."""
  hf = dict(
    model_type="llama", vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=48, rms_norm_eps=1e-5, tie_word_embeddings=False,
    hidden_act="silu", max_position_embeddings=64, rope_parameters=PLAIN, torch_dtype="float32",
  )  # fmt: skip
  text = tokenizer_files("bpe")
  llama, tensors = dict(hf), gguf_files.state()
  qwen = dict(hf, model_type="qwen3", head_dim=8, tie_word_embeddings=True, rope_parameters=YARN)
  phi = dict(hf, model_type="phi3", original_max_position_embeddings=16, rope_parameters=None,
             rope_scaling=LONGROPE, sliding_window=12)  # fmt: skip
  half = {k: x.astype(np.float16) for k, x in gguf_files.state(qk_norm=True, tie=True).items()}
  return [
    {"config.json": json_bytes(llama), **shards(tensors), **text},
    {"config.json": json_bytes(qwen), **shards(half), **text},
    {"config.json": json_bytes(llama), "model.safetensors": save(tensors)},
    {"config.json": json_bytes(phi), "model.safetensors": save(fused(tensors))},
  ]


def shards(tensors: dict) -> dict[str, bytes]:
  names, of, out = list(tensors), {}, {}
  for i in range(2):
    file, part = f"model-0000{i + 1}-of-00002.safetensors", names[i::2]
    out[file] = save({name: tensors[name] for name in part})
    of |= dict.fromkeys(part, file)
  out["model.safetensors.index.json"] = json_bytes(dict(metadata={}, weight_map=of))
  return out


def fused(tensors: dict) -> dict:
  """Under the names of Phi-3."""
  out = dict(tensors)
  for i in range(2):
    layer = f"model.layers.{i}."
    q, k, v = (out.pop(f"{layer}self_attn.{x}_proj.weight") for x in "qkv")
    gate, up = (out.pop(f"{layer}mlp.{x}_proj.weight") for x in ("gate", "up"))
    out[f"{layer}self_attn.qkv_proj.weight"] = np.concatenate([q, k, v])
    out[f"{layer}mlp.gate_up_proj.weight"] = np.concatenate([gate, up])
  return out


# A tensor that is stored quantised, and the width that its blocks need.
QUANTISED = (("Q4_0", 32), ("Q4_1", 32), ("Q5_0", 32), ("Q5_1", 32), ("Q8_0", 32), ("Q4_K", 256),
             ("Q6_K", 256), ("Q2_K", 256), ("Q3_K", 256), ("Q5_K", 256), ("BF16", 32),
             ("F16", 32))  # fmt: skip


def gguf_fields(arch: str, model: str, **sizes) -> dict:
  words = WORDS + [f"t{i}" for i in range(61 - len(WORDS))]
  fields = gguf_files.metadata(arch, num_layers=1, **sizes) | {
    "general.alignment": 64, "tokenizer.ggml.model": model, "tokenizer.ggml.tokens": words,
    "tokenizer.ggml.token_type": [2, 3, 3] + [1] * 9 + [6] + [1] * 48,
    "tokenizer.ggml.scores": [-float(i) for i in range(61)],
    "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.add_bos_token": True,
  }  # fmt: skip
  if model == "gpt2":
    fields["tokenizer.ggml.pre"] = "llama-bpe"
    fields["tokenizer.ggml.merges"] = ["a b", "ab c", "Ġ a"]
  return fields


def gguf_bytes(path, arch: str, fields: dict, quantised: str, width: int) -> bytes:
  """A file of one layer whose embedding is of that quantisation, random bits in its blocks."""
  sizes = dict(num_layers=1, d_model=width)
  tensors = gguf_files.stored(arch, gguf_files.state(**sizes), **sizes)
  kind = gguf.GGMLQuantizationType[quantised]
  elements, size = gguf.GGML_QUANT_SIZES[kind]
  rows, columns = tensors.pop("token_embd.weight").shape
  bits = np.random.default_rng(0).integers(0, 256, (rows, columns // elements * size))
  gguf_files.write(path, arch, tensors, fields, {"token_embd.weight": (bits.astype("u1"), kind)})
  return path.read_bytes()


def gguf_cases(scratch) -> list[dict]:
  """Each quantisation; architectures and tokenizers take turns. `parts` make such a file again."""
  out = []
  for i, (quantised, width) in enumerate(QUANTISED):
    arch = ("llama", "qwen2", "phi3")[i % 3]
    fields = gguf_fields(arch, ("gpt2", "llama")[i % 2], d_model=width)
    parts = (arch, fields, quantised, width)
    out.append(dict(file=gguf_bytes(scratch / "good.gguf", *parts), parts=parts))
  return out


# ---- Text.


def tokenizer_files(kind: str) -> dict[str, bytes]:
  vocabulary = {w: i for i, w in enumerate(WORDS)}
  if kind == "bpe":
    t = tokenizers.Tokenizer(models.BPE(vocabulary, [("a", "b"), ("ab", "c"), ("Ġ", "a")]))
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
  elif kind == "fallback":
    t = tokenizers.Tokenizer(
      models.BPE(vocabulary, [("a", "b")], unk_token="<unk>", byte_fallback=True)
    )
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
  elif kind == "wordpiece":
    vocabulary |= {"##b": 13, "##c": 14}
    t = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    t.normalizer = normalizers.BertNormalizer()
    t.pre_tokenizer, t.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
  else:
    t = tokenizers.Tokenizer(models.Unigram([(w, -float(i)) for i, w in enumerate(WORDS)], 0))
    t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
  t.add_special_tokens(["<s>", "</s>"])
  t.enable_truncation(8)
  settings = dict(bos_token="<s>", eos_token=dict(content="</s>"))
  return {
    "tokenizer.json": t.to_str().encode(),
    "tokenizer_config.json": json_bytes(settings),
  }


def tokenizer_cases() -> list[dict[str, bytes]]:
  return [tokenizer_files(kind) for kind in ("bpe", "fallback", "wordpiece", "unigram")]


def token_cache(scratch) -> dict[str, bytes]:
  class Documents(list):
    fingerprint = "fuzz"

  texts = Documents("ab " * n for n in (4, 1, 0, 7, 30, 2))
  tokenize(texts, ByteTokenizer(), str(scratch), append_eos=False)
  (path,) = (scratch / "tokens").iterdir()
  return {f.name: f.read_bytes() for f in path.iterdir()}


# ---- Files of factors and of runs.


def factor_cases() -> list[dict[str, bytes]]:
  long = [1.0, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0]
  made_for = dict(theta=10_000.0, head_dim=16, factor=4.0)
  hf = dict(model_type="llama", rope_scaling=dict(type="longrope", long_factor=long))
  layers = [",".join(map(str, long))] * 2
  return [
    {"factors.json": json_bytes(dict(long_factor=long, short_factor=[1.0] * 8, start_tokens=2,
                                     made_for=made_for))},
    {"factors.json": json_bytes([long, long])},
    {"factors.json": json_bytes(hf)},
    {"factors.csv": layers[0].encode()},
    {"factors.csv": "\n".join(map(str, long)).encode()},
    {"factors.csv": "\r\n".join(layers).encode()},
  ]  # fmt: skip


def run_config():
  """The config of the run; also that which its file is compared with."""
  c = tiny.run_config("text")
  c.rope.update(context=128, scaling="longrope")
  c.rope.longrope.long_factor = (1.0,) * 24
  c.search.method = "evolution" if "evolution" in c.search else "longrope"
  return c


def run_files(scratch) -> dict[str, bytes]:
  config.write(run_config(), str(scratch / "run"), text="stdlib 3", factors_read="0123")
  return {"run.json": (scratch / "run" / "run.json").read_bytes(), "rope.json": rope_file()}


def rope_file() -> bytes:
  return json_bytes(resolve.describe(tiny.run_config("text")))


SETTINGS = {"search.method": "longrope", "seed": 0, "text": "0123", "init_step": None}
ANSWERS = [[2.5, 2.25, 2.0], [1.9], [1.5, float("inf")]]


def questions() -> list[dict]:
  return [dict(fitness=[dict(factors=[1.0, 1.5, i / 8], start_tokens=j) for j in range(len(a))])
          for i, a in enumerate(ANSWERS)]  # fmt: skip


def journal_file(scratch) -> dict[str, bytes]:
  journal = Journal(str(scratch / "search.jsonl"), SETTINGS)
  for question, answer in zip(questions(), ANSWERS):
    journal.ask(question, lambda answer=answer: answer)
  return {"search.jsonl": (scratch / "search.jsonl").read_bytes()}


def results_cases() -> list[dict[str, bytes]]:
  parts = [dict(start=0, end=64, ppl=3.0), dict(start=64, end=128, ppl=2.5)]
  at = dict(metric="ppl", ppl=2.75, stderr=0.25, protocol="truncate", by_position=parts)
  depths = [dict(depth=d / 2, accuracy=0.5, samples=9) for d in range(3)]
  key = dict(metric="accuracy", accuracy=0.5, low=0.25, high=0.75, samples=27, by_depth=depths)
  score = dict(metric="score", score=0.5, tasks={"vt": dict(metric="score", score=0.25)})
  one = dict(perplexity={"64": at, "128": at}, passkey={"128": key}, ruler={"128": score})
  facts = dict(config=dict(train=dict(steps=6)), parameters=1024, text="x")
  return [
    {"results.json": json_bytes(one), "rope.json": rope_file(), "run.json": json_bytes(facts)},
    {"results.json": json_bytes({"a": one, "b": {}})},
  ]


def npy(x) -> bytes:
  out = io.BytesIO()
  np.save(out, x, allow_pickle=True)
  return out.getvalue()
