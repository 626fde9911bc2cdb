import json
import re
from collections import Counter

import numpy as np
import pytest
import tiny

from rope_jax import config
from rope_jax.data.tokenizer import ByteTokenizer
from rope_jax.evals import Subject, check, evaluate, ruler, ruler_tasks, ruler_text
from rope_jax.evals.ruler_tasks import TASKS

NIAH = [name for name in TASKS if name.startswith("niah")]
BYTES = 16_384  # a length that every task fits in, in bytes


def tokens_of(name):
  return tiny.smollm2_tokenizer() if name == "smollm2" else ByteTokenizer()


def subject(tokens="bytes", change=None):
  """Solves every task by reading the prompt; `change` spoils its answers."""
  c = config.base()
  c.rope.context = 131_072
  tokens = tokens_of(tokens)

  def generate(prompts, max_new_tokens, batch_size=1, what="", until=None):
    assert what.startswith("ruler ")
    found = [solve(tokens.decode(ids)) for ids in prompts]
    return [tokens.encode(" " + ", ".join(change(x) if change else x)) for x in found]

  return Subject(c, tokens, None, generate)


def needles(text):
  return re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.(?!\S)", text)


def assignments(text):
  return re.findall(r"VAR ([A-Z]+) = (?:VAR )?([A-Z]+|\d+)", text)


def solve(text):
  """The references of a prompt, found as a reader would."""
  if "special magic" in text:
    query = re.search(r"for (\S+(?:, \S+)*(?:, and \S+)?) mentioned in", text.split("\nWhat ")[1])
    asked = query[1].replace("and ", "").split(", ")
    return [value for key in asked for k, value in needles(text) if k == key]
  if "VAR " in text:
    _, text = text.split("\n\n\n\n")
    known = {re.search(r"assigned the value (\d+)", text)[1]}
    for new, old in assignments(text):
      known |= {new} if old in known else set()
    return [name for name in known if name.isalpha()]
  if "numbered list" in text:
    listed = text.rpartition("appear most often.\n")[2].split("\nQuestion")[0]
    return [w for w, _ in Counter(re.findall(r"\d+\. (\S+)", listed)).most_common(10)]
  coded = text.split("coded words. ")[1].split("\nQuestion")[0]
  return [w for w, _ in Counter(coded.split()).most_common(4)[1:]]


def made(name, length=BYTES, tokens="bytes", **options):
  entry = config.ruler(lengths=(length,), **dict(dict(num_samples=3), **options))
  s = subject(tokens)
  return ruler.samples(entry, s, ruler_text.load(entry, s.config), name, length)


def texts(name, *args, **options):
  return [(ByteTokenizer().decode(s.ids), s.references) for s in made(name, *args, **options)]


@pytest.mark.parametrize("name", TASKS)
def test_an_honest_reader_finds_exactly_the_references(name):
  for text, references in texts(name):
    assert sorted(solve(text)) == sorted(references)
    assert len(set(references)) == len(references)


def test_every_task_scores_one_on_its_answers_and_zero_on_wrong_ones():
  entry = config.ruler(lengths=(BYTES,), num_samples=2, tasks=tuple(TASKS))
  for change, value in ((None, 1.0), (lambda found: [x[::-1] + "#" for x in found], 0.0)):
    result = evaluate(entry, subject(change=change))[str(BYTES)]
    assert json.loads(json.dumps(result)) == result
    assert list(result["tasks"]) == list(TASKS)
    assert {t["score"] for t in result["tasks"].values()} == {value} == {result["score"]}
    assert {t["samples"] for t in result["tasks"].values()} == {2} and result["samples"] == 22
    assert all(t["low"] <= value <= t["high"] for t in result["tasks"].values())
    assert (result["metric"], result["threshold"]) == ("score", 0.856)
    assert result["haystack"].startswith("pydoc_data.topics of Python 3.")


def test_a_part_of_the_references_is_a_part_of_the_score():
  entry = config.ruler(lengths=(BYTES,), num_samples=2, tasks=("niah_multivalue", "niah_single_1"))
  result = evaluate(entry, subject(change=lambda found: found[:1]))[str(BYTES)]
  assert result["tasks"]["niah_multivalue"]["score"] == 0.25
  assert result["tasks"]["niah_single_1"]["score"] == 1.0
  assert result["score"] == 0.625


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(
  "tokens, length",
  [("bytes", 8192), ("bytes", 10_000), ("smollm2", 2048), ("smollm2", 4096), ("smollm2", 6000)],
)
def test_samples_obey_their_length_and_nearly_reach_it(name, tokens, length):
  entry = config.ruler(lengths=(length,), num_samples=2)
  s = subject(tokens)
  material = ruler_text.load(entry, s.config)
  limit = length - TASKS[name].new_tokens
  for i, x in enumerate(ruler.samples(entry, s, material, name, length)):
    assert 0.95 * limit < len(x.ids) <= limit
    more, _ = ruler.prompt(entry, s, material, name, length, i, x.size + 1)
    assert len(more) > limit


@pytest.mark.parametrize("name", NIAH)
def test_each_needle_is_there_once_and_no_key_means_two_things(name):
  values = 4 if name == "niah_multivalue" else 1
  for text, references in texts(name):
    pairs = needles(text)
    assert all(text.count(r) == 1 and r in dict(map(reversed, pairs)) for r in references)
    assert len({v for _, v in pairs}) == len(pairs)
    assert set(Counter(k for k, _ in pairs).values()) == {values}
  counts = dict(niah_multikey_1=4, niah_multivalue=4, niah_multiquery=4)
  if name in ("niah_multikey_2", "niah_multikey_3"):
    assert len(pairs) > 100  # of a length of 16,384 bytes
  else:
    assert len(pairs) == counts.get(name, 1)
  assert len(references) == (4 if name in ("niah_multivalue", "niah_multiquery") else 1)
  value = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
  value = value if name in ("niah_single_3", "niah_multikey_3") else r"[1-9]\d{6}"
  assert all(re.fullmatch(value, v) for _, v in pairs)


def test_few_words_make_distinct_keys_all_the_same(tmp_path):
  (tmp_path / "words.txt").write_text("\n".join(f"word{i}" for i in range(58)))
  for text, _ in texts("niah_multikey_2", words=str(tmp_path / "words.txt")):
    keys = [key for key, _ in needles(text)]
    assert len(set(keys)) == len(keys) > 200  # of 3,364


def test_needles_are_everywhere_in_the_haystack():
  for name in ("niah_single_1", "niah_single_2", "niah_multikey_2"):
    shares = [t.index(r[0]) / len(t) for t, r in texts(name, length=4096, num_samples=40)]
    assert min(shares) < 0.25 and max(shares) > 0.75, name


@pytest.mark.parametrize("name", NIAH)
def test_niah_is_worded_as_in_ruler(name):
  many = name in ("niah_multivalue", "niah_multiquery")
  kind = "uuid" if name in ("niah_single_3", "niah_multikey_3") else "number"
  for text, references in texts(name, num_samples=1):
    if many:
      start = f"Some special magic {kind}s are hidden within the following text. Make sure to "
      start += f"memorize it. I will quiz you about the {kind}s afterwards.\n"
      asks, says = f"What are all the special magic {kind}s", f"The special magic {kind}s"
    else:
      start = f"A special magic {kind} is hidden within the following text. Make sure to "
      start += f"memorize it. I will quiz you about the {kind} afterwards.\n"
      asks, says = f"What is the special magic {kind}", f"The special magic {kind}"
    keys = list(dict.fromkeys(k for r in references for k, v in needles(text) if v == r))
    query = f"{keys[0]}, {keys[1]}, {keys[2]}, and {keys[3]}" if len(keys) > 1 else keys[0]
    end = f"\n{asks} for {query} mentioned in the provided text? "
    end += f"{says} for {query} mentioned in the provided text {'are' if many else 'is'}"
    assert text.startswith(start) and text.endswith(end)


def test_other_tasks_are_worded_as_in_ruler():
  (text, names), *_ = texts("vt")
  value = assignments(text)[-5][1]
  start = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
  end = f"\nQuestion: Find all variables that are assigned the value {value} in the text above. "
  end += "Answer: According to the chain(s) of variable assignment in the text above, 5 variables "
  end += f"are assgined the value {value}, they are:"
  shown, asked = text.split("\n\n\n\n")
  assert shown.startswith(start) and asked.startswith(start) and asked.endswith(end)
  assert all(re.fullmatch(r"[A-Z]{5}", n) for n in names)
  assert re.search(r"they are:( [A-Z]{3}){5}\Z", shown)

  (text, _), *_ = texts("cwe")
  start = "Below is a numbered list of words. In these words, some appear more often than others. "
  start += "Memorize the ones that appear most often.\n1. "
  end = "\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words "
  end += "that appear most often in the list are:"
  assert text.startswith(start) and text.endswith(end)
  assert text.count(start) == text.count(end) == 2 and f"{end}1. " in text

  (text, _), *_ = texts("fwe")
  start = "Read the following coded text and track the frequency of each coded word. Find the three"
  start += " most frequently appeared coded words. "
  end = "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
  end += "three most frequently appeared words in the above coded text? Answer: According to the "
  end += "coded text above, the three most frequently appeared words are:"
  assert text.startswith(start) and text.endswith(end)


def test_vt_is_one_chain_in_order_with_its_example_apart():
  for text, names in texts("vt"):
    shown, asked = (assignments(t) for t in text.split("\n\n\n\n"))
    assert [new for new, _ in asked] == names
    assert [old for _, old in asked][1:] == names[:-1] and asked[0][1].isdigit()
    assert [new for new, _ in shown] == text.split("\n\n\n\n")[0].split()[-5:]
    assert shown[0][1] != asked[0][1]


@pytest.mark.parametrize("length, often, seldom", [(BYTES, 30, 3), (4000, 6, 1)])
def test_cwe_has_common_words_so_many_times(length, often, seldom):
  for text, common in texts("cwe", length=length):
    listed = text.rpartition("appear most often.\n")[2].split("\nQuestion")[0]
    numbers, words = zip(*re.findall(r"(\d+)\. (\S+)", listed))
    assert [int(n) for n in numbers] == list(range(1, len(words) + 1))
    counts = Counter(words)
    assert {counts[w] for w in common} == {often} and len(common) == 10
    assert {n for w, n in counts.items() if w not in common} == {seldom}


def test_cwe_goes_on_with_made_up_words_and_says_so(tmp_path):
  words = [f"{a}{b}x" for a in "abcdefghijkl" for b in "abcdefghijkl"]
  (tmp_path / "words.txt").write_text("\n".join(words))
  entry = config.ruler(lengths=(BYTES,), num_samples=1, tasks=("cwe",))
  entry.words = str(tmp_path / "words.txt")
  entry.lengths = (8000,)
  assert evaluate(entry, subject())["8000"]["words"] == entry.words
  entry.lengths = (32_768,)
  said = evaluate(entry, subject())["32768"]["words"]
  count = int(re.fullmatch(re.escape(entry.words) + r", and (\d+) made up for cwe", said)[1])
  (sample,) = made("cwe", 32_768, num_samples=1, words=entry.words)
  text = ByteTokenizer().decode(sample.ids).rpartition("appear most often.\n")[2]
  seen = set(re.findall(r"\d+\. (\S+)", text.split("\nQuestion")[0]))
  assert sample.size == len(seen) == len(words) + count
  assert all(re.fullmatch("([a-z][aeiou]){3}", w) for w in seen - set(words))


def test_fwe_follows_zipf_and_no_rank_that_counts_is_tied():
  for size in range(TASKS["fwe"].smallest, 4000, 7):
    example = ruler_tasks.fwe(np.random.default_rng(size), size, 4096, None)
    counts = Counter(example.text.split("coded words. ")[1].split("\nQuestion")[0].split())
    ranked = counts.most_common(5)
    assert ranked[0] == ("...", int(size * 6 / np.pi**2))
    assert [w for w, _ in ranked[1:4]] == example.references
    top = [n for _, n in ranked]
    assert top[1] > top[2] > top[3] > top[4]
    assert len(counts) <= 4096 // 50


def test_the_haystack_starts_again_where_it_ends(tmp_path):
  (tmp_path / "a.txt").write_text("It was so. " * 20 + "The end.")
  (text, _), *_ = texts("niah_single_2", haystack=str(tmp_path / "*.txt"))
  assert text.count("The end.") > 10


@pytest.mark.parametrize("name", TASKS)
def test_the_same_seed_draws_the_same_and_another_does_not(name):
  a, b, other = (made(name, seed=s) for s in (1, 1, 2))
  assert all((x.ids == y.ids).all() and x.references == y.references for x, y in zip(a, b))
  assert not set(a[0].references) & set(other[0].references)
  assert not set(a[0].references) & set(a[1].references)
  if not name.startswith("fwe"):  # whose vocabulary is by length; others start from the same seed
    assert made(name, 12_000, seed=1)[0].references == a[0].references


def test_score_is_string_match_all():
  assert ruler.score(" The numbers are 12, ABC and x.", ["12", "abc", "Y", "z"]) == 0.5
  assert ruler.score("", ["1"]) == 0
  assert ruler.score("123", ["12"]) == 1  # a part of a word counts, as in RULER


def test_the_answer_begins_after_the_template():
  options = dict(num_samples=1, template="<user>{prompt}</user>")
  for name in TASKS:
    (text, _), *_ = texts(name, **options)
    assert text.startswith("<user>") and re.search(r"\?</user> |above\.</user> ", text), name


def test_the_manual_is_prose():
  assert len(ruler_text.manual()) > 100_000 and "\n" not in ruler_text.manual()
  assert ">>>" not in ruler_text.manual()[:20_000]
  assert len(ruler_text.manual_words()) > 1500
  assert all(re.fullmatch("[a-z]{4,}", w) for w in ruler_text.manual_words())


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(tasks=("niah_single_1", "qa_1")), "evals.r.tasks='qa_1'.*'fwe'"),
    (dict(tasks=()), r"evals.r.tasks=\(\)"),
    (dict(tasks=("vt", "vt")), "evals.r.tasks=.*once"),
    (dict(num_samples=0), "evals.r.num_samples=0"),
    (dict(batch_size=0), "evals.r.batch_size=0"),
    (dict(seed=-1), "evals.r.seed=-1"),
    (dict(template=""), "evals.r.template=''"),
    (dict(haystack="tfds:pg19"), "evals.r.haystack='tfds:pg19'.*SPLIT"),
    (dict(lengths=(131_073,)), "evals.r.lengths"),
  ],
)
def test_bad_settings_are_refused_by_key(options, message):
  with pytest.raises(ValueError, match=message):
    ruler.validate("evals.r", config.ruler(**options), subject().config)


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(haystack="/no/*.txt"), "haystack='/no/"),
    (dict(words="/no/words.txt"), "words='/no/words.txt'.*existing"),
    (dict(words="few.txt"), "words='few.txt'.*at least 58 words.*there are 3"),
    (dict(lengths=(600,)), "lengths=600: expected at least 2... tokens for task 'cwe'"),
    (dict(tasks=("vt",), lengths=(1024,)), "lengths=1024.*task 'vt'"),
  ],
)
def test_what_is_missing_is_found_before_training(tmp_path, monkeypatch, options, message):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "few.txt").write_text("one\ntwo\nthree\n")
  s = subject()
  s.config.evals.r = config.ruler(lengths=(BYTES,), tasks=("niah_single_2", "cwe"))
  check(s.config, s.tokenizer)
  s.config.evals.r.update(options)
  with pytest.raises(ValueError, match=f"config.evals.r: {message}"):
    check(s.config, s.tokenizer)
  if "lengths" in options:
    with pytest.raises(ValueError, match=message):
      evaluate(s.config.evals.r, s)


def test_check_measures_every_sample():
  """Not all of a task's smallest prompts are equally long."""
  of, task = subject("smollm2"), "vt"
  entry = config.ruler(lengths=(4096,), tasks=(task,), num_samples=8)
  material = ruler_text.load(entry, of.config)
  budget = ruler_tasks.TASKS[task].new_tokens
  needed = [
    budget
    + len(ruler.prompt(entry, of, material, task, 4096, i, ruler_tasks.TASKS[task].smallest)[0])
    for i in range(8)
  ]
  assert needed[0] < max(needed)
  entry.lengths = (max(needed),)
  ruler.check(entry, of)
  entry.lengths = (max(needed) - 1,)
  with pytest.raises(ValueError, match=f"at least {max(needed)} tokens for task 'vt'"):
    ruler.check(entry, of)
