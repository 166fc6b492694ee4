"""Turns multiple-choice questions into the files that eval_rev_gpt2 --choices reads.

    python3 dev/eval/choices.py piqa questions.jsonl --out DIR             makes DIR/piqa.bin; also .csv and .parquet
    python3 dev/eval/choices.py arc_easy allenai/ai2_arc --out DIR         questions from the Hugging Face hub
    python3 dev/eval/choices.py mmlu test.jsonl --shots 5 --examples dev.jsonl --out DIR     DIR/mmlu_SUBJECT.bin ...

Prompts, completions and where one ends and the other begins are those of lm-evaluation-harness's tasks of the same names:
the joint text is tokenized, and what comes after as many tokens as the context alone has is the completion. WinoGrande
is the other way round: the rest of the sentence is scored after each option. A question has these fields:

    piqa                    goal, sol1, sol2, label
    arc_easy arc_challenge  question, choices {"text": [...], "label": [...]}, answerKey
    openbookqa              question_stem, choices and answerKey likewise
    winogrande              sentence with a _, option1, option2, answer "1" or "2"
    hellaswag               activity_label, ctx_a, ctx_b, endings [...], label
    mmlu                    subject, question, choices [four], answer 0 to 3

In a .csv, choices and endings are JSON. MMLU's --shots come from --examples, the first of the same subject; a data set of
the hub has them in its split dev. Tokens are GPT-2's, bytes, or those of a tokenizer.json or tokenizer.model, beside which
tokenizer_config.json and config.json count as for prepro_owt.py. Before an empty context stands the token that begins a
text: <|endoftext|>, a newline for bytes, what these files say.

A file, little endian: 256 int32 header: 20240522, version 2, number of questions, words of the longest one, vocabulary
size (0: 50257), then zeros; then each question, in words of uint16: 65535, the number of its words with these, as its low
and its high 16 bits, the number of the right completion, from 0, and of completions; then for each completion the number
of its tokens, how many of the first are context, the characters of the choice, which acc_norm divides by, and the tokens.
For WinoGrande the choice is the sentence up to the option's end; the harness knows no acc_norm for it.

Needs the packages tiktoken for GPT-2's tokens, tokenizers or sentencepiece for a file's, pyarrow for .parquet, datasets for
the hub.
Exit status: 0 done, 1 data and files, 2 usage, 3 out of memory, 130 Ctrl-C or SIGTERM.
"""
import argparse
import csv
import functools
import json
import os
import re
import signal
import sys
from array import array

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, os.pardir))
from prepro_owt import beside, cannot_load, fail, header, load_folder, load_gpt2, load_tokenizer, need, say, trying, uint16, whole_number, \
    write_files, writing

NESTED = "choices", "endings"  # what is JSON in a .csv
MOST = 2**16 - 1


class Bad(Exception):
    """What is wrong with a question."""


# ---------------------------------------------------------------------------------------------------------------------
# questions: each task makes a list of (context, completion, choice), and the number of the right one

def text(doc, key):
    if not isinstance(doc.get(key), str):
        raise Bad(f'has no "{key}" that is a string')
    return doc[key]


def texts(doc, key, within=""):
    value = doc.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(x, str) for x in value):
        raise Bad(f'has no {within}"{key}" that is a list of strings')
    return value


def number(doc, key, count, first=0):
    """What a field that counts from `first` says, counted from 0."""
    value = str(doc.get(key))
    if not re.fullmatch("[0-9]+", value) or not first <= int(value) < first + count:
        raise Bad(f'has no "{key}" from {first} to {first + count - 1}, but {value:.40}')
    return int(value) - first


def after(context, choices):
    return [(context, " " + choice, choice) for choice in choices]


def piqa(doc):
    return after(f"Question: {text(doc, 'goal')}\nAnswer:", [text(doc, "sol1"), text(doc, "sol2")]), number(doc, "label", 2)


def lettered(doc, context, answer):
    choices = doc.get("choices")
    if not isinstance(choices, dict):
        raise Bad('has no "choices" that is an object with a "text" and a "label"')
    choices, labels = texts(choices, "text", "choices' "), texts(choices, "label", "choices' ")
    if len(choices) != len(labels) or answer not in labels:
        raise Bad(f'has no answerKey that is one of its {len(choices)} choices\' labels, but "{answer:.40}"')
    return after(context, choices), labels.index(answer)


def arc(doc):
    return lettered(doc, f"Question: {text(doc, 'question')}\nAnswer:", text(doc, "answerKey"))


def openbookqa(doc):
    return lettered(doc, text(doc, "question_stem"), text(doc, "answerKey").lstrip())


def winogrande(doc):
    before, blank, rest = text(doc, "sentence").partition("_")
    if not blank:
        raise Bad('has no _ in its "sentence"')
    choices = [before + text(doc, option) for option in ("option1", "option2")]
    return [(choice, " " + rest.strip(), choice) for choice in choices], number(doc, "answer", 2, first=1)


def clean(text):
    """HellaSwag's texts hold marks of the pages they come from, in brackets."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def hellaswag(doc):
    context = f"{text(doc, 'activity_label')}: {text(doc, 'ctx_a')} {text(doc, 'ctx_b').capitalize()}"
    endings = [clean(ending) for ending in texts(doc, "endings")]
    return after(clean(context), endings), number(doc, "label", len(endings))


def mmlu_prompt(doc):
    choices = texts(doc, "choices")
    if len(choices) != 4:
        raise Bad(f'has {len(choices)} "choices"; MMLU has four')
    lines = [f"{letter}. {choice}" for letter, choice in zip("ABCD", choices)]
    return "\n".join([text(doc, "question").strip(), *lines, "Answer:"])


def mmlu(doc, shots):
    """With shots: the list of each subject's examples as text."""
    subject = text(doc, "subject")
    context = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    return after(context + "".join(shots.get(subject, [])) + mmlu_prompt(doc), "ABCD"), number(doc, "answer", 4)


# the function; the name of the hub's configuration, the split
TASKS = {"piqa": (piqa, None, "validation"),
         "arc_easy": (arc, "ARC-Easy", "test"),
         "arc_challenge": (arc, "ARC-Challenge", "test"),
         "openbookqa": (openbookqa, "main", "test"),
         "winogrande": (winogrande, "winogrande_xl", "validation"),
         "hellaswag": (hellaswag, None, "validation"),
         "mmlu": (mmlu, "all", "test")}


# ---------------------------------------------------------------------------------------------------------------------
# where they come from: yields (where, question)

def read_jsonl(path):
    with open(path, "rb") as f:
        for i, line in enumerate(f, 1):
            where = f"{path}, line {i}"
            try:
                doc = json.loads(line.decode("utf-8-sig")) if line.strip() else None
            except (ValueError, RecursionError) as e:
                fail(f"{where} is not JSON in UTF-8 ({e}); one JSON object on each line is meant")
            if line.strip():
                yield where, doc


def read_csv(path):
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            for i, doc in enumerate(csv.DictReader(f, strict=True), 1):
                where = f"{path}, question {i}"
                if None in doc or None in doc.values():
                    fail(f"{where} has other columns than the heading, which is to name them")
                try:
                    yield where, {key: json.loads(value) if key in NESTED else value for key, value in doc.items()}
                except (ValueError, RecursionError) as e:
                    fail(f"{where} has choices or endings that are not JSON ({e})")
    except (csv.Error, UnicodeDecodeError) as e:
        fail(f"{path} is not CSV in UTF-8 ({e}); a heading, then a question a row is meant")


def read_parquet(path):
    parquet = need("pyarrow.parquet", "reading .parquet")
    try:
        docs = parquet.read_table(path).to_pylist()
    except Exception as e:  # broken files: all sorts of types
        fail(f"{path} cannot be read as parquet ({type(e).__name__}: {str(e)[:200]})")
    return ((f"{path}, question {i}", doc) for i, doc in enumerate(docs, 1))


def read_hub(name, config, split):
    if not sys.stderr.isatty():
        os.environ.update(HF_DATASETS_DISABLE_PROGRESS_BARS="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    os.environ.update(HF_HUB_VERBOSITY="error", DATASETS_VERBOSITY="critical")  # what goes wrong is told below, once
    datasets = need("datasets", "reading the hub")
    try:
        known = config in datasets.get_dataset_config_names(name)
        docs = datasets.load_dataset(name, config if known else None, split=split)
    except MemoryError:
        raise
    except Exception as e:  # network, names, splits, a full disk: all sorts of types
        cannot_load(name, e, "a .jsonl, .csv or .parquet file is meant, or the name of a data set of the hub, which has to be "
                    "downloaded at first")
    return ((f"{name}, {split}, question {i}", doc) for i, doc in enumerate(docs, 1))


READERS = {".jsonl": read_jsonl, ".json": read_jsonl, ".csv": read_csv, ".parquet": read_parquet}


def read_questions(name, config, split):
    reader = READERS.get(os.path.splitext(name)[1])
    if os.path.isfile(name) and not reader:
        fail(f"{name} is not a .jsonl, .csv or .parquet file, by its name")
    found = False
    with trying("read", name, "a .jsonl, .csv or .parquet file is meant, or the name of a data set of the hub"):
        for where, doc in reader(name) if reader else read_hub(name, config, split):
            if not isinstance(doc, dict):
                fail(f"{where} is not an object with fields")
            found = True
            yield where, doc
    if not found:
        fail(f"{name} holds no questions")


def read_shots(name, config, count):
    shots = {}
    for where, doc in read_questions(name, config, "dev"):
        try:
            example = f"{mmlu_prompt(doc)} {'ABCD'[number(doc, 'answer', 4)]}\n\n"
            shots.setdefault(text(doc, "subject"), []).append(example)
        except Bad as e:
            fail(f"{where} {e}")
    for subject, examples in shots.items():
        if len(examples) < count:
            fail(f"{name} has {len(examples)} examples of {subject}; --shots {count} needs as many")
    return {subject: examples[:count] for subject, examples in shots.items()}


# ---------------------------------------------------------------------------------------------------------------------
# tokens: of a tokenizer the function that encodes, the size of its vocabulary, and the token that begins a text

def load_file(path):
    """As prepro_owt.py has it: with the token that begins each text, if there is one, and the model's size of the vocabulary."""
    if not os.path.exists(path):
        fail(f"{path} is not a tokenizer: --tokenizer takes gpt2, byte or a file such as tokenizer.json, or its folder")
    t = load_folder(path) if os.path.isdir(path) else load_tokenizer(path, *beside(os.path.dirname(path)))
    first = next((i for i in (*t.before, t.bos, t.eos) if i is not None), t.id_of("<|endoftext|>"))
    return (lambda text, special=True: (t.before if special else []) + t.encode(text, special=True)), t.V, first


def load_tokens(name):
    if name == "byte":
        return lambda text, special=True: list(text.encode()), 256, ord("\n")
    if name != "gpt2":
        return load_file(name)
    enc = load_gpt2()  # a special token's text is that token, as in the harness
    return lambda text, special=True: enc.encode(text, allowed_special="all"), enc.n_vocab, enc.eot_token


def encode_pair(encode, first, context, completion):
    """The tokens of both, and how many of them are context."""
    if not context:
        tokens = encode(completion, False)
        if first is None:
            raise Bad("has an empty context, and nothing says what token begins a text; the tokenizer_config.json "
                      "beside the tokenizer's file does")
        return (tokens if tokens[:1] == [first] else [first] + tokens), 1
    stripped = context.rstrip()  # spaces at its end become the completion's
    head = encode(stripped)
    return head + encode(context + completion)[len(head):], len(head)


def pack(encode, first, choices, label):
    """A question's words."""
    words = array("H", [label, len(choices)])
    for k, (context, completion, choice) in enumerate(choices, 1):
        try:
            (context + completion).encode()
        except UnicodeEncodeError:
            raise Bad("has a lone surrogate, which is no character") from None
        tokens, start = encode_pair(encode, first, context, completion)
        if not 0 < start < len(tokens):
            raise Bad(f"has no token in its {'completion' if start else 'context'} {k}")
        for count, what in (len(choice), "characters"), (len(tokens), "tokens"):
            if count > MOST:
                raise Bad(f"has {count} {what} in its completion {k}; {MOST} fit")
        words.extend([len(tokens), start, len(choice), *tokens])
    return array("H", [MOST, (len(words) + 3) & MOST, (len(words) + 3) >> 16]) + words


# ---------------------------------------------------------------------------------------------------------------------
# files

def file_of(task, doc):
    if task != "mmlu":
        return task + ".bin"
    subject = text(doc, "subject")
    if not re.fullmatch("[A-Za-z0-9_-]{1,100}", subject):
        raise Bad(f'has a "subject" that cannot be part of a file\'s name: {subject:.40}')
    return f"mmlu_{subject}.bin"


def fill(questions, V, f):
    f.write(header(20240522, 2, len(questions), max(map(len, questions)), V))
    for words in questions:
        f.write(uint16(words))


def prepare(args):
    make, config, split = TASKS[args.task]
    encode, V, first = load_tokens(args.tokenizer)
    encode = functools.lru_cache(encode)  # completions share their context
    if args.task == "mmlu":
        shots = read_shots(args.examples or args.questions, config, args.shots) if args.shots else {}
        make = functools.partial(mmlu, shots=shots)
    files = {}
    for where, doc in read_questions(args.questions, config, args.split or split):
        try:
            questions = files.setdefault(file_of(args.task, doc), [])
            if args.shots and doc["subject"] not in shots:
                raise Bad(f"is of {doc['subject']}, of which there is no example")
            choices, label = make(doc)
            if len(choices) > MOST:
                raise Bad(f"has {len(choices)} choices; {MOST} fit")
            if not args.limit or len(questions) < args.limit:
                questions.append(pack(encode, first, choices, label))
        except Bad as e:
            fail(f"{where} {e}")
        if args.limit and args.task != "mmlu" and len(questions) == args.limit:
            break
    with writing(args.out):
        os.makedirs(args.out, exist_ok=True)
    write_files(args.out, {name: functools.partial(fill, questions, V) for name, questions in files.items()})
    for name, questions in files.items():
        say(f"{os.path.join(args.out, name)}  {len(questions)} questions  V {V}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = lambda message: fail(message + " (see --help)", 2)  # argparse would print its usage lines too
    parser.add_argument("task", metavar="TASK", choices=TASKS, help=" ".join(TASKS))
    parser.add_argument("questions", metavar="FILE_OR_NAME", help="a file, or a data set of the hub")
    parser.add_argument("--split", help="of the hub's data set, default the one that the harness evaluates")
    parser.add_argument("--shots", type=int, choices=range(6), metavar="N", help="examples before a question of MMLU, "
                        "0 to 5, default 0")
    parser.add_argument("--examples", metavar="FILE_OR_NAME", help="where they are")
    parser.add_argument("--tokenizer", default="gpt2", metavar="gpt2|byte|FILE", help="a tokenizer.json or tokenizer.model, or its folder; "
                        "default gpt2")
    parser.add_argument("--limit", type=whole_number, metavar="N", help="the first N questions, of each subject")
    parser.add_argument("--out", default=".", metavar="DIR", help="folder for the files, made if missing, default .")
    args = parser.parse_args()
    if args.task != "mmlu" and (args.shots is not None or args.examples):
        parser.error("--shots and --examples are for mmlu")
    if args.examples and not args.shots:
        parser.error("--examples is for --shots N, 1 to 5")
    if args.shots and not args.examples and os.path.isfile(args.questions):
        parser.error(f"--shots {args.shots} of a file needs --examples FILE")
    prepare(args)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        main()
    except MemoryError:
        fail("out of memory: all questions' tokens are held; give fewer, with --limit", 3)
    except KeyboardInterrupt:
        fail("interrupted; no file was left half-written", 130)
