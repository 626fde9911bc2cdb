"""The same work by transformers, peft and PyTorch, as their documentation has it."""

from __future__ import annotations

import os

import peft
import torch
import transformers

from rope_jax import bench, weights
from rope_jax.bench import clock


def limits(spec: dict) -> dict:
  """A square product, whose result PyTorch gives in the dtype of its inputs, or x + 1 in place."""
  if spec["what"] == "copy":
    x = torch.zeros(spec["mebibytes"] * 2**18)
    return dict(seconds=clock.timed(lambda: x.add_(1)), bytes=2 * x.nbytes)
  n = spec["size"]
  a, b = (torch.randn(n, n).to(_dtype(spec)) for _ in range(2))
  return dict(seconds=clock.timed(lambda: a @ b), flops=2 * n**3)


def forward(spec: dict) -> dict:
  """The loss of all tokens, or the logits of the last one."""
  model = _model(spec).eval()
  ids = torch.from_numpy(bench.random_ids(model.config.vocab_size, 1, spec["length"]))
  losses = spec["what"] == "losses"
  options = dict(labels=ids) if losses else dict(logits_to_keep=1)
  out = clock.start()

  def run(tokens: int = spec["length"]):
    part = {k: v[:, :tokens] if k == "labels" else v for k, v in options.items()}
    result = model(ids[:, :tokens], use_cache=False, **part)
    if losses:
      out["loss"] = float(result.loss)

  with torch.inference_mode():
    seconds = clock.timed(run, lambda: run(min(spec["length"], bench.WARM)))
  return dict(out, seconds=seconds)


def train(spec: dict) -> dict:
  """A step of one sequence: LoRA on a frozen base, the activations of layers made again."""
  model = _model(spec)
  ids = torch.from_numpy(bench.random_ids(model.config.vocab_size, 1, spec["length"]))
  model.config.use_cache = False
  model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
  model.enable_input_require_grads()
  targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
  lora = peft.LoraConfig(
    r=bench.LORA_RANK, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"
  )
  model = peft.get_peft_model(model, lora).train()
  trained = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
  losses: list[float] = []
  out = clock.start()

  def run():
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(float(loss.detach()))

  def warm_up():
    with torch.no_grad():
      model(input_ids=ids[:, : bench.WARM], labels=ids[:, : bench.WARM])

  seconds = clock.timed(run, warm_up if spec["length"] > bench.WARM else None)
  return dict(out, seconds=seconds, loss=losses[0], trained=sum(p.numel() for p in trained))


def generate(spec: dict) -> dict:
  """Greedy tokens through the cache; the first of them alone, too."""
  model = _model(spec).eval()
  ids = bench.random_ids(model.config.vocab_size, spec["batch"], spec["prompt"])
  ids, out = torch.from_numpy(ids), clock.start()

  def new(tokens: int):
    return model.generate(
      ids,
      attention_mask=torch.ones_like(ids),
      do_sample=False,
      min_new_tokens=tokens,
      max_new_tokens=tokens,
      pad_token_id=0,
    )

  first = clock.timed(lambda: new(1))
  return dict(out, first=first, seconds=clock.timed(lambda: new(spec["new"])))


MEASURES = dict(limits=limits, forward=forward, train=train, generate=generate)


def _dtype(spec: dict) -> torch.dtype:
  return getattr(torch, spec["dtype"])


def _model(spec: dict):
  """SmolLM2 from the file that ours is read from, or a random model with the sizes of ours."""
  if spec["model"] == "smollm2":
    directory, file = os.path.split(weights.locate("smollm2-135m")[1])
    return transformers.AutoModelForCausalLM.from_pretrained(
      directory, gguf_file=file, dtype=_dtype(spec)
    )
  sizes = bench.SMALL
  hf = transformers.LlamaConfig(
    vocab_size=sizes["vocab_size"],
    num_hidden_layers=sizes["num_layers"],
    hidden_size=sizes["d_model"],
    num_attention_heads=sizes["num_heads"],
    num_key_value_heads=sizes["num_kv_heads"],
    head_dim=sizes["head_dim"],
    intermediate_size=sizes["d_ff"],
    rms_norm_eps=sizes["norm_eps"],
    tie_word_embeddings=sizes["tie_embeddings"],
  )
  return transformers.AutoModelForCausalLM.from_config(hf, dtype=_dtype(spec))
