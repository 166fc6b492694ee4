"""Tests dev/eval/choices.py by running it on a few questions in a temporary folder.

    python3 dev/test/test_choices.py

Needs Python; what needs another package or tiktoken's gpt2 vocabulary is skipped where it cannot be had, with a line. The
last line is `N passed, N failed`, the exit status 1 if any failed.
"""
import csv
import importlib.util
import json
import os
import struct
import subprocess
import sys
import tempfile
import traceback
from array import array

PROGRAM = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, "eval", "choices.py")
HARNESS = os.path.join(os.path.dirname(PROGRAM), "harness.py")

ARC = {"question": "What melts?", "choices": {"text": ["ice", "fire", "wind"], "label": ["A", "B", "C"]}, "answerKey": "A"}
MMLU = {"subject": "us_foreign_policy", "question": " Who writes? ", "choices": ["he", "she", "it", "we"], "answer": 2}
DEV = [{"subject": "us_foreign_policy", "question": f"Example {i}?", "choices": list("wxyz"), "answer": i % 4} for i in range(5)]
ABOUT = "The following are multiple choice questions (with answers) about us foreign policy.\n\n"
ASKED = "Who writes?\nA. he\nB. she\nC. it\nD. we\nAnswer:"

# of each task questions, and what is meant by them: the label, and of each completion the context, what is scored after it,
# and the choice, whose characters count
QUESTIONS = {
    "piqa": ([{"goal": "open a jar", "sol1": "turn the lid", "sol2": "eat it ", "label": 0},
              {"goal": "größe\n", "sol1": "é", "sol2": "", "label": "1"}],
             [(0, [("Question: open a jar\nAnswer:", " turn the lid", "turn the lid"),
                   ("Question: open a jar\nAnswer:", " eat it ", "eat it ")]),
              (1, [("Question: größe\n\nAnswer:", " é", "é"), ("Question: größe\n\nAnswer:", " ", "")])]),
    "arc_easy": ([ARC, dict(ARC, choices={"text": ["1", "2"], "label": ["1", "2"]}, answerKey="2")],
                 [(0, [("Question: What melts?\nAnswer:", " " + c, c) for c in ("ice", "fire", "wind")]),
                  (1, [("Question: What melts?\nAnswer:", " " + c, c) for c in "12"])]),
    "openbookqa": ([{"question_stem": "Ice is \t", "choices": {"text": ["cold", "hot"], "label": ["A", "B"]}, "answerKey": " B"},
                    {"question_stem": "", "choices": {"text": ["cold"], "label": ["A"]}, "answerKey": "A"}],
                   [(1, [("Ice is", " \t cold", "cold"), ("Ice is", " \t hot", "hot")]), (0, [("\n", " cold", "cold")])]),
    "winogrande": ([{"sentence": "Ann saw Bo, so _ ran_away. ", "option1": "Ann", "option2": "Bo", "answer": "2"},
                    {"sentence": "_ fell.", "option1": "Ann ", "option2": "Bo", "answer": "1"}],
                   [(1, [("Ann saw Bo, so Ann", " ran_away.", "Ann saw Bo, so Ann"), ("Ann saw Bo, so Bo", " ran_away.", "Ann saw Bo, so Bo")]),
                    (0, [("Ann", "  fell.", "Ann "), ("Bo", " fell.", "Bo")])]),
    "hellaswag": ([{"activity_label": "Tea", "ctx_a": "A pot", "ctx_b": "", "endings": ["boils", "sings"], "label": "0"},
                   {"activity_label": "Making tea", "ctx_a": "[header] How to [title] A pot  is", "ctx_b": "then IT",
                    "endings": [" boils [substeps] away. ", "[title]"], "label": "1"}],
                  [(0, [("Tea: A pot", " boils", "boils"), ("Tea: A pot", " sings", "sings")]),
                   (1, [("Making tea: How to. A pot is Then it", " boils away.", "boils away."),
                        ("Making tea: How to. A pot is Then it", " ", "")])]),
    "mmlu": ([MMLU], [(2, [(ABOUT + ASKED, " " + c, c) for c in "ABCD"])])}
QUESTIONS["arc_challenge"] = QUESTIONS["arc_easy"]


class Skip(Exception):
    pass


def check(value, what):
    if not value:
        raise AssertionError(what)


def check_equal(got, want, what):
    check(got == want, f"{what}: {got!r:.300} where {want!r:.300} was expected")


def need(package):
    if not importlib.util.find_spec(package):
        raise Skip(f"no package {package}")


def write(path, data):
    with open(path, "wb") as f:
        f.write(data if isinstance(data, bytes) else data.encode())
    return path


def jsonl(tmp, docs, name="questions.jsonl"):
    return write(os.path.join(tmp, name), "".join(json.dumps(doc) + "\n" for doc in docs))


def run(*args, **kwargs):
    return subprocess.run([sys.executable, PROGRAM, *args], stdin=subprocess.DEVNULL, capture_output=True, text=True, **kwargs)


def good(*args, **kwargs):
    p = run(*args, **kwargs)
    check_equal((p.returncode, p.stderr), (0, ""), "exit status and stderr")
    return p.stdout


def bad(status, says, *args, **kwargs):
    """It must exit with that status and one line on stderr that holds every string of `says`."""
    p = run(*args, **kwargs)
    check_equal((p.returncode, p.stdout), (status, ""), f"exit status and stdout (stderr {p.stderr!r})")
    check(p.stderr.startswith("choices.py: ") and p.stderr.endswith("\n") and p.stderr.count("\n") == 1,
          f"stderr should be one line that begins with the program's name: {p.stderr!r}")
    for s in says:
        check(s in p.stderr, f"stderr should say {s!r}: {p.stderr!r}")


def read(*path):
    """(V, [(label, [(tokens, context, characters), ...]), ...]), with every number of the format checked."""
    with open(os.path.join(*path), "rb") as f:
        data = f.read()
    head, words = struct.unpack("<256i", data[:1024]), [w for w, in struct.iter_unpack("<H", data[1024:])]
    check_equal((head[:2], any(head[5:])), ((20240522, 2), False), "header")
    questions, longest, at = [], 0, 0
    while at < len(words):
        size = words[at + 1] + 65536 * words[at + 2]
        check_equal(words[at], 65535, "a question's first word")
        label, count, i, completions = words[at + 3], words[at + 4], at + 5, []
        for _ in range(count):
            n, context, characters = words[i:i + 3]
            completions.append((words[i + 3:i + 3 + n], context, characters))
            i += 3 + n
        check_equal(i, at + size, "a question's words")
        longest, at = max(longest, size), i
        questions.append((label, completions))
    check_equal(head[2:4], (len(questions), longest), "number of questions, words of the longest")
    return head[4], questions


def meant(encode, questions):
    return [(label, [(encode(a) + encode(b), len(encode(a)), len(c)) for a, b, c in completions]) for label, completions in questions]


def as_bytes(text):
    return list(text.encode())


def gpt2():
    try:
        import tiktoken
        return tiktoken.get_encoding("gpt2")
    except Exception as e:
        raise Skip(f"no tiktoken or no vocabulary ({type(e).__name__})")


def make_tokenizer(tmp, extra=0, first=False):
    """The file of a tokenizer of words, 6 and more in its vocabulary."""
    need("tokenizers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    words = ["?", "<s>", "Question", "melts", "ice", ":"] + [f"w{i}" for i in range(extra)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>"])
    if first:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.enable_truncation(2)
    tokenizer.save(os.path.join(tmp, "tokenizer.json"))
    return os.path.join(tmp, "tokenizer.json")


# ---------------------------------------------------------------------------------------------------------------------
# tasks and tokens

def test_tasks_bytes(tmp):
    for task, (docs, questions) in QUESTIONS.items():
        name = "mmlu_us_foreign_policy" if task == "mmlu" else task
        printed = good(task, jsonl(tmp, docs), "--tokenizer", "byte", "--out", os.path.join(tmp, "new", task))
        file = os.path.join(tmp, "new", task, name + ".bin")
        check_equal(os.listdir(os.path.dirname(file)), [name + ".bin"], "files")
        check_equal(printed, f"{file}  {len(docs)} questions  V 256\n", "stdout")
        check_equal(read(file), (256, meant(as_bytes, questions)), task)


def test_tasks_gpt2(tmp):
    """Where no token spans context and completion, which holds for these, each can be encoded alone."""
    enc = gpt2()
    for task, (docs, questions) in QUESTIONS.items():
        if task == "openbookqa":  # the empty context
            docs, questions = docs[:1], questions[:1]
        if task == "piqa":  # joined, two newlines are one token
            docs, questions = docs[:1], questions[:1]
        good(task, jsonl(tmp, docs), "--out", tmp)
        name = "mmlu_us_foreign_policy" if task == "mmlu" else task
        V, got = read(tmp, name + ".bin")
        check_equal(V, 50257, "vocabulary")
        for (_, mine), (_, theirs) in zip(got, meant(enc.encode, questions)):
            for (tokens, context, characters), (other, there, count) in zip(mine, theirs):
                check_equal((enc.decode(tokens), characters), (enc.decode(other), count), f"{task}: text, characters")
                check_equal(context, there, f"{task}: context")


def test_splits_gpt2(tmp):
    """By hand. GPT-2's tokens are 24361 "Question", 25 ":", 317 " A", 198 a newline, 33706 "Answer", 17180 " apple", 4196
    " Apple", 32 "A", 220 " ", 50256 "<|endoftext|>"."""
    gpt2()
    good("piqa", jsonl(tmp, [{"goal": "A", "sol1": "apple", "sol2": "Apple", "label": 1}]), "--out", tmp)
    context = [24361, 25, 317, 198, 33706, 25]
    check_equal(read(tmp, "piqa.bin"), (50257, [(1, [(context + [17180], 6, 5), (context + [4196], 6, 5)])]), "piqa")
    # the space at the end of a context goes to the completion, which then begins with two: 220 and 17180
    obqa = {"question_stem": "A ", "choices": {"text": ["apple", "<|endoftext|>"], "label": ["A", "B"]}, "answerKey": "A"}
    good("openbookqa", jsonl(tmp, [obqa, dict(obqa, question_stem="")]), "--out", tmp)
    _, ((_, first), (_, empty)) = read(tmp, "openbookqa.bin")
    check_equal(first, [([32, 220, 17180], 1, 5), ([32, 220, 220, 50256], 1, 13)], "a context that ends with a space")
    check_equal(empty, [([50256, 17180], 1, 5), ([50256, 220, 50256], 1, 13)], "an empty context")


def test_token_across(tmp):
    """A token that spans both belongs to neither: the context's tokens are its own, the rest are those of the joint text."""
    need("tokenizers")
    from tokenizers import Tokenizer, models
    vocabulary = {token: i for i, token in enumerate(["a", "b", "c", " ", "b ", "b c"])}
    path = os.path.join(tmp, "tokenizer.json")
    Tokenizer(models.BPE(vocabulary, [("b", " "), ("b ", "c")], ignore_merges=False)).save(path)
    good("openbookqa", jsonl(tmp, [{"question_stem": "ab", "choices": {"text": ["ca", "a"], "label": ["A", "B"]}, "answerKey": "A"}]),
         "--tokenizer", path, "--out", tmp)  # ab + " ca" is a, "b c", a, of which two are as many as a, b
    check_equal(read(tmp, "openbookqa.bin"), (6, [(0, [([0, 1, 0], 2, 2), ([0, 1, 0], 2, 1)])]), "openbookqa")


def test_tokenizer_file(tmp):
    for first in False, True:  # whether it begins each text itself
        good("arc_easy", jsonl(tmp, [ARC]), "--tokenizer", make_tokenizer(tmp, first=first), "--out", tmp)
        context = [1] * first + [2, 5, 0, 3, 0, 0, 5]  # Question : What melts ? Answer :
        check_equal(read(tmp, "arc_easy.bin"), (6, [(0, [(context + [last], 7 + first, n) for last, n in ((4, 3), (0, 4), (0, 4))])]), "arc")
    empty = jsonl(tmp, [{"question_stem": "", "choices": {"text": ["ice", "<s> ice"], "label": ["A", "B"]}, "answerKey": "A"}])
    args = "openbookqa", empty, "--tokenizer", make_tokenizer(tmp), "--out", tmp
    bad(1, ["line 1", "empty context", "tokenizer_config.json"], *args)
    for config in {"bos_token": "<s>"}, {"bos_token": None, "eos_token": {"content": "<s>"}}:
        write(os.path.join(tmp, "tokenizer_config.json"), json.dumps(config))
        good(*args)
        check_equal(read(tmp, "openbookqa.bin"), (6, [(0, [([1, 4], 1, 3), ([1, 4], 1, 7)])]), "an empty context")
    write(os.path.join(tmp, "tokenizer_config.json"), json.dumps({"bos_token": "<s>", "add_bos_token": True}))
    write(os.path.join(tmp, "config.json"), json.dumps({"vocab_size": 32}))  # padding, which the model has rows for
    good("arc_easy", jsonl(tmp, [ARC]), *args[2:])
    wanted = [([1, 2, 5, 0, 3, 0, 0, 5, last], 8, n) for last, n in ((4, 3), (0, 4), (0, 4))]
    check_equal(read(tmp, "arc_easy.bin"), (32, [(0, wanted)]), "as for prepro_owt.py")
    good("arc_easy", jsonl(tmp, [ARC]), "--tokenizer", os.path.dirname(args[3]), "--out", tmp)
    check_equal(read(tmp, "arc_easy.bin"), (32, [(0, wanted)]), "its folder")
    write(os.path.join(tmp, "config.json"), json.dumps({"vocab_size": 5}))
    bad(1, ["vocab_size 5", "6 tokens"], "arc_easy", jsonl(tmp, [ARC]), *args[2:])


def test_shots(tmp):
    questions, examples = jsonl(tmp, [MMLU, dict(MMLU, subject="virology"), MMLU]), jsonl(tmp, DEV + [dict(d, subject="virology") for d in DEV], "dev.jsonl")
    shots = "".join(f"Example {i}?\nA. w\nB. x\nC. y\nD. z\nAnswer: {'ABCD'[i % 4]}\n\n" for i in range(5))
    for count in 0, 1, 5:
        out = os.path.join(tmp, str(count))
        good("mmlu", questions, "--shots", str(count), *(["--examples", examples] if count else []), "--tokenizer", "byte", "--out", out)
        check_equal(sorted(os.listdir(out)), ["mmlu_us_foreign_policy.bin", "mmlu_virology.bin"], "a file a subject")
        context = ABOUT + shots[:len(shots) // 5 * count] + ASKED
        one = (2, [(as_bytes(context + " " + c), len(context), 1) for c in "ABCD"])
        check_equal(read(out, "mmlu_us_foreign_policy.bin")[1], [one, one], f"{count} shots")
        context = context.replace("us foreign policy", "virology")
        check_equal(bytes(read(out, "mmlu_virology.bin")[1][0][1][1][0]).decode(), context + " B", f"{count} shots")


def test_sources(tmp):
    """The same questions from every kind of file give the same bytes."""
    for task, (docs, _) in QUESTIONS.items():
        args = "--tokenizer", "byte", "--out", tmp
        name = os.path.join(tmp, "mmlu_us_foreign_policy.bin" if task == "mmlu" else task + ".bin")
        good(task, jsonl(tmp, docs), *args)
        with open(name, "rb") as f:
            first = f.read()
        sources = [write(os.path.join(tmp, "b.json"), "\ufeff" + "\n\n".join(map(json.dumps, docs)))]
        with open(os.path.join(tmp, "c.csv"), "w", newline="", encoding="utf-8") as f:
            table = csv.DictWriter(f, list(docs[0]))
            table.writeheader()
            table.writerows({k: v if isinstance(v, (str, int)) else json.dumps(v) for k, v in doc.items()} for doc in docs)
        sources.append(f.name)
        if importlib.util.find_spec("pyarrow"):
            import pyarrow
            import pyarrow.parquet
            sources.append(os.path.join(tmp, "d.parquet"))
            same = [{k: str(v) if k == "label" else v for k, v in doc.items()} for doc in docs]  # a column has one type
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(same), sources[-1])
        for source in sources:
            os.remove(name)
            good(task, source, *args)
            with open(name, "rb") as f:
                check_equal(f.read(), first, f"{task} of {source}")


def test_data_set(tmp):
    """A folder is to the package datasets what a name of the hub is, with configurations and splits."""
    need("datasets")
    folder = os.path.join(tmp, "set")
    os.mkdir(folder)
    jsonl(folder, [ARC], "easy.jsonl")
    jsonl(folder, [dict(ARC, answerKey="B")], "other.jsonl")
    write(os.path.join(folder, "README.md"), "---\nconfigs:\n- config_name: ARC-Easy\n  data_files:\n  - split: test\n    path: easy.jsonl\n"
          "  - split: validation\n    path: other.jsonl\n- config_name: other\n  data_files:\n  - split: test\n    path: other.jsonl\n---\n")
    for options, label in ([], 0), (["--split", "validation"], 1):
        good("arc_easy", folder, "--tokenizer", "byte", "--out", tmp, *options)
        check_equal([label for label, _ in read(tmp, "arc_easy.bin")[1]], [label], f"{options}")
    bad(1, ["cannot load", "nosuch"], "arc_easy", folder, "--tokenizer", "byte", "--out", tmp, "--split", "nosuch")
    bad(1, ["cannot load no/such", "hub"], "arc_easy", "no/such", "--tokenizer", "byte", "--out", tmp)


def test_limit(tmp):
    docs = jsonl(tmp, [MMLU, MMLU, dict(MMLU, subject="virology"), MMLU])
    printed = good("mmlu", docs, "--tokenizer", "byte", "--out", tmp, "--limit", "2")
    check_equal([line.split("  ")[1] for line in printed.splitlines()], ["2 questions", "1 questions"], printed)
    printed = good("arc_easy", jsonl(tmp, [ARC] * 3), "--tokenizer", "byte", "--out", tmp, "--limit", "2")
    check("  2 questions" in printed, printed)


# ---------------------------------------------------------------------------------------------------------------------
# what is refused

def test_usage(tmp):
    path = jsonl(tmp, [ARC])
    for says, *args in (["TASK"], ), (["arc", "invalid", "arc_easy"], "arc", path), (["FILE_OR_NAME"], "arc_easy"), \
            (["--shots", "mmlu"], "arc_easy", path, "--shots", "1"), (["--shots", "6"], "mmlu", path, "--shots", "6"), \
            (["--examples"], "mmlu", path, "--shots", "1"), (["--examples", "--shots"], "mmlu", path, "--examples", path), \
            (["--limit", "0"], "arc_easy", path, "--limit", "0"), (["--frob"], "arc_easy", path, "--frob"):
        bad(2, says, *args)


def test_files(tmp):
    out = os.path.join(tmp, "out")
    args = "--tokenizer", "byte", "--out", out
    bad(1, ["cannot read", "none.jsonl", "No such file"], "piqa", os.path.join(tmp, "none.jsonl"), *args)
    bad(1, ["x.txt", ".jsonl, .csv or .parquet"], "piqa", write(os.path.join(tmp, "x.txt"), ""), *args)
    bad(1, ["e.jsonl", "no questions"], "piqa", write(os.path.join(tmp, "e.jsonl"), "\n\n"), *args)
    bad(1, ["line 2", "not JSON"], "arc_easy", write(os.path.join(tmp, "x.jsonl"), json.dumps(ARC) + "\n{\n"), *args)
    bad(1, ["line 1", "not JSON in UTF-8"], "piqa", write(os.path.join(tmp, "x.jsonl"), b'{"goal": "\xff"}'), *args)
    bad(1, ["line 1", "not an object"], "piqa", write(os.path.join(tmp, "x.jsonl"), "[1]"), *args)
    bad(1, ["question 2", "columns"], "piqa", write(os.path.join(tmp, "x.csv"), "goal,sol1,sol2,label\na,b,c,0\na,b\n"), *args)
    bad(1, ["question 1", "not JSON"], "openbookqa", write(os.path.join(tmp, "x.csv"), "question_stem,choices,answerKey\na,b,c\n"), *args)
    bad(1, ["x.csv", "not CSV in UTF-8"], "piqa", write(os.path.join(tmp, "x.csv"), b"goal\n\xff\n"), *args)
    bad(1, ["not a tokenizer", "gpt2, byte or a file"], "arc_easy", jsonl(tmp, [ARC]), "--tokenizer", "bytes", "--out", out) \
        if importlib.util.find_spec("tokenizers") else None
    check(not os.path.exists(out), "what is refused makes no folder")
    bad(1, ["cannot write", "--out"], "arc_easy", jsonl(tmp, [ARC]), "--tokenizer", "byte", "--out", write(os.path.join(tmp, "f"), ""))
    if importlib.util.find_spec("pyarrow"):
        bad(1, ["x.parquet", "parquet"], "piqa", write(os.path.join(tmp, "x.parquet"), "no"), *args)


def test_questions(tmp):
    """Each is refused with its line, the second, and its field; nothing is written."""
    def without(doc, key):
        return {k: v for k, v in doc.items() if k != key}
    piqa, obqa, winogrande, hellaswag = (QUESTIONS[task][0][0] for task in ("piqa", "openbookqa", "winogrande", "hellaswag"))
    for task, first, doc, says in (
            ("piqa", piqa, without(piqa, "goal"), '"goal"'), ("piqa", piqa, dict(piqa, sol2=3), '"sol2"'),
            ("piqa", piqa, dict(piqa, label=2), '"label" from 0 to 1'), ("piqa", piqa, dict(piqa, label=-1), "-1"),
            ("piqa", piqa, dict(piqa, label=True), "True"), ("piqa", piqa, dict(piqa, label=""), '"label"'),
            ("piqa", piqa, dict(piqa, goal="\ud800"), "surrogate"),
            ("piqa", piqa, dict(piqa, sol2="x" * 65536), "65536 characters in its completion 2"),
            ("piqa", piqa, dict(piqa, goal="x" * 65536), "tokens in its completion 1"),
            ("arc_easy", ARC, dict(ARC, choices=["a"]), '"choices"'), ("arc_easy", ARC, dict(ARC, answerKey="D"), '"D"'),
            ("arc_easy", ARC, dict(ARC, choices={"text": [], "label": []}), '"text"'),
            ("arc_easy", ARC, dict(ARC, choices={"text": ["a"], "label": ["A", "B"]}), "1 choices"),
            ("arc_easy", ARC, dict(ARC, choices={"text": ["a"] * 65536, "label": ["A"] * 65536}), "65536 choices"),
            ("openbookqa", obqa, dict(obqa, question_stem=" \n"), "no token in its context 1"),
            ("winogrande", winogrande, dict(winogrande, sentence="no blank"), "no _"),
            ("winogrande", winogrande, dict(winogrande, answer="0"), "from 1 to 2"),
            ("hellaswag", hellaswag, dict(hellaswag, endings="x"), '"endings"'),
            ("hellaswag", hellaswag, dict(hellaswag, label=""), '"label"'),
            ("mmlu", MMLU, dict(MMLU, choices=["a"]), "four"), ("mmlu", MMLU, dict(MMLU, subject="../x"), '"subject"'),
            ("mmlu", MMLU, dict(MMLU, subject=7), '"subject"'), ("mmlu", MMLU, dict(MMLU, answer=4), "from 0 to 3")):
        bad(1, ["questions.jsonl, line 2 ", says], task, jsonl(tmp, [first, doc]), "--tokenizer", "byte", "--out", os.path.join(tmp, "out"))
    args = "mmlu", jsonl(tmp, [MMLU]), "--tokenizer", "byte", "--out", os.path.join(tmp, "out"), "--shots", "5", "--examples"
    bad(1, ["dev.jsonl", "4 examples of us_foreign_policy", "--shots 5"], *args, jsonl(tmp, DEV[:4], "dev.jsonl"))
    bad(1, ["line 1", "us_foreign_policy", "no example"], *args, jsonl(tmp, [dict(d, subject="virology") for d in DEV], "dev.jsonl"))
    bad(1, ["dev.jsonl, line 1", '"answer"'], *args, jsonl(tmp, [without(DEV[0], "answer")], "dev.jsonl"))
    check(not os.path.exists(os.path.join(tmp, "out")), "what is refused makes no folder")


def test_largest(tmp):
    """What just fits: 65535 tokens, and a question of more than 65535 words."""
    fits = {"goal": "x" * (65535 - len("Question: \nAnswer: ab")), "sol1": "ab", "sol2": "b", "label": 0}
    good("piqa", jsonl(tmp, [fits, fits]), "--tokenizer", "byte", "--out", tmp)
    check_equal([[len(tokens) for tokens, *_ in completions] for _, completions in read(tmp, "piqa.bin")[1]], [[65535, 65534]] * 2, "tokens")
    bad(1, ["line 1", "65536 tokens in its completion 1"], "piqa", jsonl(tmp, [dict(fits, sol1="abc")]), "--tokenizer", "byte", "--out", tmp)


def test_vocabulary(tmp):
    path = jsonl(tmp, [ARC])
    good("arc_easy", path, "--tokenizer", make_tokenizer(tmp, extra=65530), "--out", tmp)
    check_equal(read(tmp, "arc_easy.bin")[0], 65536, "vocabulary")
    bad(1, ["65537", "65536 is the most"], "arc_easy", path, "--tokenizer", make_tokenizer(tmp, extra=65531), "--out", tmp)


def test_on_the_disk(tmp):
    """A new file takes the old one's place when it is complete, and one that is refused leaves the old one there."""
    good("arc_easy", jsonl(tmp, [ARC, ARC]), "--tokenizer", "byte", "--out", tmp)
    with open(os.path.join(tmp, "arc_easy.bin"), "rb") as old:
        bad(1, ["line 2"], "arc_easy", jsonl(tmp, [ARC, {}]), "--tokenizer", "byte", "--out", tmp)
        check_equal(len(read(tmp, "arc_easy.bin")[1]), 2, "questions of the old file")
        good("arc_easy", jsonl(tmp, [ARC]), "--tokenizer", "byte", "--out", tmp)
        check_equal((len(read(tmp, "arc_easy.bin")[1]), array("i", old.read(12))[2]), (1, 2), "questions, and to a reader that has it open")
    check(not [name for name in os.listdir(tmp) if name.endswith(".tmp")], "nothing is left aside")


# ---------------------------------------------------------------------------------------------------------------------
# dev/eval/harness.py

def harness(*args):
    return subprocess.run([sys.executable, HARNESS, *args], stdin=subprocess.DEVNULL, capture_output=True, text=True)


def test_harness_usage(tmp):
    for says, *args in ("FOLDER", ), ("--run --csv --files", tmp, "piqa=x"), ("TASK=QUESTIONS", tmp, "x=x", "--files", tmp), \
            ("TASK=QUESTIONS", tmp, "piqa", "--files", tmp), ("--shots", tmp, "piqa=x", "--shots", "1", "--files", tmp):
        p = harness(*args)
        check_equal((p.returncode, p.stdout, p.stderr.count("\n")), (2, "", 1), f"status, stdout, lines of {p.stderr!r}")
        check(p.stderr.startswith("harness.py: ") and says in p.stderr, f"stderr should say {says!r}: {p.stderr!r}")


def test_harness(tmp):
    """The harness splits the questions above into the same bytes; it finds one that was changed."""
    for package in "lm_eval", "accelerate", "transformers", "torch":
        need(package)
    files = []
    for task, (docs, _) in QUESTIONS.items():
        docs = [dict(doc, label=int(doc["label"])) if task == "piqa" else doc for doc in docs]  # as the harness has them
        files.append(f"{task}={jsonl(tmp, docs, task + '.jsonl')}")
        good(task, jsonl(tmp, docs, task + ".jsonl"), "--tokenizer", "byte", "--out", tmp)
    args = tmp, *files, "--tokenizer", "byte", "--files", tmp
    p = harness(*args)
    check_equal((p.returncode, p.stderr, [line.split()[2] for line in p.stdout.splitlines()[1:]]), (0, "", ["0"] * 7), p.stdout)
    with open(os.path.join(tmp, "piqa.bin"), "r+b") as f:
        f.seek(1024 + 2 * 8)
        f.write(b"q")
    p = harness(tmp, files[0], *args[-4:])
    check_equal((p.returncode, p.stdout.splitlines()[1].split()[2]), (1, "1"), p.stdout)


def main(found):
    os.environ["HF_HUB_OFFLINE"] = "1"
    passed = failed = skipped = 0
    for name, test in list(found.items()):
        if name.startswith("test_"):
            with tempfile.TemporaryDirectory() as tmp:
                os.environ["HF_HOME"] = os.path.join(tmp, "hf")
                try:
                    test(tmp)
                    passed += 1
                except Skip as e:
                    print(f"skipped {name}: {e}")
                    skipped += 1
                except Exception as e:
                    print(f"FAILED  {name}: {e}" if isinstance(e, AssertionError) else f"FAILED  {name}: {traceback.format_exc()}")
                    failed += 1
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main(globals())
