"""lm_eval's tasks from local files, through our model and through its own backend."""

import json
import subprocess
import sys

import jax
import numpy as np
import oracle
import pytest
import tiny
from conftest import ROOT
from test_harness import CONTEXT, Letters, _mesh, asked, lm, subject, tiny_config  # noqa: F401

from rope_jax import config, evals, report, weights
from rope_jax.data.tokenizer import ByteTokenizer
from rope_jax.evals import harness
from rope_jax.model.config import from_config
from rope_jax.model.llama import Llama
from rope_jax.train import sharding
from rope_jax.train import subject as subject_lib

pytest.importorskip("lm_eval")

WORDS = (
  "the cat sat on the mat and the dog lay by the door",
  "a boat came down the river while the rain fell on the roofs of the town",
  "she read the letter twice and put it into the fire",
  "the king had three daughters and the youngest of them was kind",
  "bread and water are enough for one who walks all day",
  "nobody knew where the road went after the old stone bridge",
)
KINDS = dict(
  choice=dict(
    output_type="multiple_choice",
    doc_to_text="{{start}}",
    doc_to_choice="choices",
    doc_to_target="label",
    metric_list=[
      dict(metric=m, aggregation="mean", higher_is_better=True) for m in ("acc", "acc_norm")
    ],
  ),
  rolling=dict(
    output_type="loglikelihood_rolling",
    doc_to_text="",
    doc_to_target="{{text}}",
    metric_list=[
      dict(metric="word_perplexity"),
      dict(metric="byte_perplexity"),
      dict(metric="bits_per_byte"),
    ],
  ),
  cloze=dict(
    output_type="generate_until",
    doc_to_text="{{text}}. {{start}}",
    doc_to_target="{{end}}",
    generation_kwargs=dict(until=["\n", "."], max_gen_toks=4, do_sample=False),
    filter_list=[
      dict(name="words", filter=[dict(function=f) for f in ("remove_whitespace", "take_first")])
    ],
    metric_list=[dict(metric="exact_match", aggregation="mean", higher_is_better=True)],
  ),
)


def write_tasks(folder, **changes):
  """Files of a task of each kind; `changes` of KIND replaces keys."""
  data = folder / "data.jsonl"
  rows = []
  for i, words in enumerate(WORDS):
    start, _, end = words.rpartition(" ")
    choices = [WORDS[(i + k) % len(WORDS)].rpartition(" ")[2] for k in range(3)]
    rows.append(dict(text=words, start=start, end=end, choices=choices, label=0))
  data.write_text("\n".join(map(json.dumps, rows)))
  paths = []
  for kind, task in KINDS.items():
    task = dict(
      task=f"tiny_{kind}",
      dataset_path="json",
      dataset_kwargs=dict(data_files=dict(test=str(data)), cache_dir=str(folder / "cache")),
      test_split="test",
      **task,
    )
    paths.append(folder / f"{kind}.yaml")
    paths[-1].write_text(json.dumps(task | changes.get(kind, {})))  # JSON is YAML
  return tuple(map(str, paths))


def entry_of(folder, changes=None, **options):
  return config.lm_eval(tasks=write_tasks(folder, **(changes or {})), **options)


def test_results_are_those_of_each_task_and_the_same_in_every_run(tmp_path):
  entry = entry_of(tmp_path, batch_size=2)
  result, again = (evals.evaluate(entry, subject()) for _ in range(2))
  assert result == again == json.loads(json.dumps(result))
  choice, rolling, cloze = (result[f"tiny_{kind}"] for kind in KINDS)
  assert (choice["metric"], rolling["metric"]) == ("acc_norm", "word_perplexity")
  assert set(choice["all"]) == {"acc", "acc_norm"} and choice["all"]["acc_norm"] in choice.values()
  assert 0 < choice["stderr"] < 1 and "stderr" not in rolling
  assert [r["samples"] for r in (choice, rolling, cloze)] == [6, 6, 6]
  assert cloze["metric"] == "exact_match,words" and cloze["truncated"] == len(WORDS)
  pairs = [(i, (i + k) % len(WORDS)) for i in range(len(WORDS)) for k in range(3)]
  starts, ends = zip(*[words.rsplit(" ", 1) for words in WORDS])
  long = sum(len(starts[i]) + 1 + len(ends[j]) > CONTEXT + 1 for i, j in pairs)
  assert 0 < long < len(pairs) and (choice["truncated"], rolling["truncated"]) == (long, 0)
  expected = lm().loglikelihood_rolling(asked(*[(words,) for words in WORDS]))
  words = sum(len(words.split()) for words in WORDS)
  assert rolling["word_perplexity"] == pytest.approx(np.exp(-sum(expected) / words), rel=1e-4)
  assert "tiny_rolling: word_perplexity" in report.table({"run": {"lm": result}})


def test_limit_examples_and_metric_are_the_entrys(tmp_path):
  seen = []

  class Seen(evals.Subject):
    def prompt(self, text):
      raise AssertionError

  options = dict(tasks=write_tasks(tmp_path)[:1], limit=2, num_fewshot=1, metric="acc")
  of = subject()
  spy = type(
    "Spy", (Letters,), dict(encode=lambda self, t: seen.append(t) or Letters.encode(self, t))
  )
  of = Seen(of.config, spy(), of.losses, of.generate, of.predictions)
  result = evals.evaluate(config.lm_eval(**options), of)["tiny_choice"]
  assert (result["metric"], result["samples"]) == ("acc", 2)
  assert any("\n\n" in t and t.endswith(WORDS[0].rpartition(" ")[0]) for t in seen)


def test_a_group_has_its_tasks(tmp_path):
  other = dict.fromkeys(KINDS["cloze"]) | KINDS["choice"] | dict(task="tiny_other")
  write_tasks(tmp_path, cloze=other)
  names = ["tiny_choice", "tiny_other"]
  (tmp_path / "group.yaml").write_text(
    json.dumps(dict(group="both", task=names, aggregate_metric_list=[dict(metric="acc")]))
  )
  (tmp_path / "bare.yaml").write_text(json.dumps(dict(group="bare", task=names)))
  options = dict(include_path=str(tmp_path), max_length=32)
  result = evals.evaluate(config.lm_eval(tasks=("both",), **options), subject())
  assert list(result) == ["both"] and list(result["both"]["tasks"]) == names
  mean = np.mean([t["all"]["acc"] for t in result["both"]["tasks"].values()])
  assert (result["both"]["metric"], result["both"]["acc"]) == ("acc", pytest.approx(mean))
  result = evals.evaluate(config.lm_eval(tasks=("bare",), **options), subject())
  assert list(result) == names


def test_a_template_reaches_the_model(tmp_path):
  seen = []
  of = subject()

  def generate(prompts, max_new_tokens, **options):
    seen.extend(Letters().decode(ids) for ids in prompts)
    return [ids[:1] for ids in prompts]

  of = evals.Subject(of.config, of.tokenizer, of.losses, generate)
  tasks = write_tasks(tmp_path, cloze=dict(gen_prefix="So"))[2:]
  evals.evaluate(config.lm_eval(tasks=tasks, template="<{prompt}>", max_length=48), of)
  assert all("<" not in t[1:] and t.endswith(">So") for t in seen) and len(seen) == len(WORDS)


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(tasks=()), r"evals.h.tasks=\(\)"),
    (dict(tasks=("a", "a")), "evals.h.tasks=.*each once"),
    (dict(batch_size=0), "evals.h.batch_size=0"),
    (dict(limit=-1), "evals.h.limit=-1"),
    (dict(seed=-1), "evals.h.seed=-1"),
    (dict(num_fewshot=-2), "evals.h.num_fewshot=-2"),
    (dict(max_length=1), "evals.h.max_length=1"),
    (dict(max_length=CONTEXT + 1), f"evals.h.max_length={CONTEXT + 1}.*context={CONTEXT}"),
    (dict(template="prompt"), "evals.h.template='prompt'"),
    (dict(metadata="[1]"), "evals.h.metadata='.1.'.*object"),
    (dict(metadata="{"), "evals.h.metadata='{'.*object"),
  ],
)
def test_bad_settings_are_refused_by_key(options, message):
  entry = config.lm_eval(**(dict(tasks=("arc_easy",)) | options))
  with pytest.raises(ValueError, match=message):
    harness.validate("evals.h", entry, tiny_config())


def test_good_settings_are_not_refused():
  entry = config.lm_eval(tasks=("arc_easy",), metadata='{"max_seq_lengths": [4096]}')
  harness.validate("evals.h", entry, tiny_config())


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch):
  monkeypatch.setitem(sys.modules, "lm_eval", None)
  with pytest.raises(ValueError, match=r"evals.h.type='lm_eval'.*pip install 'lm-eval>=0.4.13"):
    harness.validate("evals.h", config.lm_eval(tasks=("arc_easy",)), tiny_config())


def test_the_package_is_imported_only_for_its_evaluations():
  code = (
    "import sys; from rope_jax import config, evals, validate; from rope_jax.evals import harness;"
    "from rope_jax.train import loop; sys.exit('lm_eval' in sys.modules)"
  )
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_lm_eval_knows_the_model_by_name():
  from lm_eval.api.registry import get_model

  assert isinstance(lm(), get_model("rope_jax"))


@pytest.mark.parametrize(
  "changes, options, message",
  [
    ({}, dict(tasks=("no_such_task",)), "tasks=.'no_such_task'.*not a registered"),
    ({}, dict(metric="f1"), "metric='f1'.*tiny_choice.*'acc'"),
    (dict(choice=dict(num_fewshot=0)), dict(num_fewshot=2), "num_fewshot=2.*tiny_choice"),
    (dict(cloze=dict(generation_kwargs=dict(top_k=3))), {}, "tasks: 'tiny_cloze'.*top_k=3"),
    (dict(choice=dict(dataset_kwargs=dict(data_files="/no.jsonl"))), {}, "tasks=.*says.*no.jsonl"),
    (dict(choice=dict(unsafe_code=True)), {}, "tasks: 'tiny_choice'.*runs generated code"),
  ],
)
def test_tasks_that_cannot_run_are_found_before_training(tmp_path, changes, options, message):
  c = tiny_config()
  c.evals.mine = entry_of(tmp_path, changes)
  c.evals.mine.update(options)
  with pytest.raises(ValueError, match=f"config.evals.mine: {message}"):
    evals.check(c, Letters())


def test_a_rolling_task_needs_something_before_a_text(tmp_path):
  c = tiny_config()
  c.evals.mine = entry_of(tmp_path)
  with pytest.raises(ValueError, match="config.evals.mine: .*tiny_rolling.*neither BOS nor EOS"):
    evals.check(c, ByteTokenizer())
  evals.check(c, Letters())


# ---- lm_eval's own backend.


@pytest.mark.long
def test_scores_are_those_of_lm_evals_own_backend(tmp_path):
  """The same file, tasks and requests, without digits: transformers reads them otherwise."""
  from lm_eval.evaluator import simple_evaluate
  from lm_eval.models.huggingface import HFLM
  from transformers import AutoTokenizer

  # Short windows, so that rolling ones move, and contexts lose their start.
  entry = entry_of(tmp_path, max_length=32, batch_size=3)
  pairs = [("", WORDS[0]), (" and ".join(WORDS[:3]), " of the house")]
  long_text = ". ".join(WORDS)
  kwargs = dict(until=[".", "\n"], max_gen_toks=12)
  prompts = [WORDS[0], f"{WORDS[2]} and {WORDS[4]}"]
  prompts = [(words.rpartition(" ")[0], kwargs) for words in prompts]

  c = oracle.smollm2("none")
  c.rope.context = c.rope.original_context
  c.mesh.data = 1
  mesh = sharding.make_mesh(c.mesh, 1)
  with jax.set_mesh(mesh):
    model = Llama(from_config(c))
    of = subject_lib.make(c, mesh, model, tiny.smollm2_tokenizer())
    of = of(dict(params=oracle.our_params()))
    ours = evals.evaluate(entry, of)
    ours_lm = lm(of, max_length=32, batch_size=3)
    requests = [asked(*pairs), asked((long_text,)), asked(*prompts, kind="generate_until")]
    scores = ours_lm.loglikelihood(requests[0])
    (rolling,) = ours_lm.loglikelihood_rolling(requests[1])
    texts = ours_lm.generate_until(requests[2])
  assert ours_lm.truncated["t"] == 2  # one to score, one to continue
  assert len(tiny.smollm2_tokenizer().encode(long_text)) > 64

  directory, _, file = weights.locate("smollm2-135m")[1].rpartition("/")
  theirs_lm = HFLM(
    pretrained=oracle.their_checkpoint(),
    tokenizer=AutoTokenizer.from_pretrained(directory, gguf_file=file),
    max_length=32,
    batch_size=1,
  )
  theirs = simple_evaluate(theirs_lm, tasks=list(entry.tasks), bootstrap_iters=0)["results"]
  for (score, greedy), (their_score, their_greedy) in zip(
    scores, theirs_lm.loglikelihood(requests[0])
  ):
    assert score == pytest.approx(their_score, abs=5e-3) and greedy is their_greedy
  assert rolling == pytest.approx(theirs_lm.loglikelihood_rolling(requests[1])[0], rel=1e-4)
  assert texts == theirs_lm.generate_until(requests[2]) and all(texts)
  for name, column in ours.items():
    for metric, value in column["all"].items():
      exact = metric in ("acc", "acc_norm", "exact_match,words")
      assert value == pytest.approx(
        theirs[name][metric if "," in metric else f"{metric},none"], rel=0 if exact else 1e-3
      )
  assert ours["tiny_choice"]["acc_norm"] > 0.5  # of three choices
  assert ours["tiny_cloze"]["exact_match,words"] > 0.5  # the text is in the prompt
