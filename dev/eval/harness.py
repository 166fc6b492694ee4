"""Compares eval_rev_gpt2 --choices with EleutherAI's lm-evaluation-harness, question by question.

    python3 dev/hf/hf.py export model.bin FOLDER
    python3 dev/eval/harness.py FOLDER piqa=piqa.jsonl mmlu=mmlu_test.jsonl --limit 200 --run './eval_rev_gpt2 -e model.bin'
    python3 dev/eval/harness.py FOLDER piqa=piqa.jsonl --limit 200 --csv choices.csv         what was evaluated already
    python3 dev/eval/harness.py FOLDER piqa=piqa.jsonl --limit 200 --files DIR               of DIR/piqa.bin only the tokens

The harness evaluates the network in FOLDER by its own tasks, with transformers and without network; questions are taken
from files as dev/eval/choices.py takes them. --run makes its files with dev/eval/choices.py, and evaluates each of them with
the command given and `--choices FILE --csv FILE`. --csv takes the table that such a command wrote, of files made with the
same --shots and --tokenizer: file,question,completion,tokens,characters,loglikelihood,label. Of a file that has fewer
questions, those are compared. Columns of what is printed:

    tokens      questions whose tokens, context, label or characters are others than the harness', of which 0 are meant
    |ll - ll|   the largest difference of a completion's log-likelihood
    acc         questions where another completion is the likeliest; norm: the likeliest by its length
    q/s         questions per second, of the harness without its start, of --run with it

Log-likelihoods are sums of float32's: of two right programs they differ by 1e-4 or so, and a choice only where two
completions are as near. Needs pip install 'lm-eval[hf]' tiktoken. Exit status: 0 as meant, 1 tokens that differ, or what is
wrong with data and files, 2 usage.
"""
import argparse
import contextlib
import csv
import io
import json
import logging
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from array import array
from unittest import mock

sys.path.append(os.path.dirname(os.path.abspath(__file__)))
import choices
from choices import fail, need

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1",
                  TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")


def read_file(path):
    """The questions of a file of dev/eval/choices.py: (label, [(tokens, context, characters), ...])."""
    words, questions, at = array("H"), [], 512
    with open(path, "rb") as f:
        words.frombytes(f.read())
    if sys.byteorder == "big":
        words.byteswap()
    if words[:3] != array("H", [20240522 & 65535, 20240522 >> 16, 2]):
        fail(f"{path} is not a file of dev/eval/choices.py")
    try:
        while at < len(words):
            begin, low, high, label, count = words[at:at + 5]
            completions, i = [], at + 5
            for _ in range(count):
                length, context, characters = words[i:i + 3]
                completions.append((words[i + 3:i + 3 + length].tolist(), context, characters))
                i += 3 + length
            if begin != 65535 or i != at + low + (high << 16):
                raise ValueError
            questions.append((label, completions))
            at = i
    except ValueError:
        fail(f"{path} is broken in its question {len(questions)}")
    return questions


def read_csv(path):
    """By the file's name without .bin: the log-likelihood of each (question, completion), and the path."""
    tables, paths = {}, {}
    with choices.trying("read", path, "the table of eval_rev_gpt2 --choices is meant"), open(path, newline="") as f:
        for row in csv.DictReader(f):
            try:
                name = os.path.basename(row["file"]).removesuffix(".bin")
                tables.setdefault(name, {})[int(row["question"]), int(row["completion"])] = float(row["loglikelihood"])
                paths[name] = row["file"]
            except (KeyError, TypeError, ValueError) as e:
                fail(f"{path} has a row that is not file,question,completion,...,loglikelihood,label ({e!r})")
    return tables, paths


# ---------------------------------------------------------------------------------------------------------------------
# the harness

def hf_tokenizer(name, folder):
    """As transformers has it: the folder's own, or made of the same vocabulary."""
    import tokenizers
    import transformers
    if name not in ("gpt2", "byte"):
        return transformers.AutoTokenizer.from_pretrained(os.path.dirname(os.path.abspath(name)))
    if name == "gpt2" and any(os.path.exists(os.path.join(folder, file)) for file in ("tokenizer.json", "vocab.json")):
        return transformers.AutoTokenizer.from_pretrained(folder)
    if name == "byte":
        model = tokenizers.models.BPE({f"<0x{i:02X}>": i for i in range(256)}, [], byte_fallback=True)
        return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model), eos_token="<0x0A>")
    from tiktoken.load import read_file_cached
    where = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"  # where tiktoken has them from
    vocabulary, merges = (read_file_cached(where + file).decode() for file in ("encoder.json", "vocab.bpe"))
    merges = [tuple(line.split()) for line in merges.splitlines()[1:]]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(json.loads(vocabulary), merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def make_model(args):
    """The harness' model for transformers, which also notes how it splits a context and a completion into tokens."""
    import transformers
    from lm_eval.models.huggingface import HFLM

    class Model(HFLM):
        split, seconds = {}, 0.0

        def __init__(self, tokenizer):
            if not args.files:
                transformers.utils.logging.disable_progress_bar()
                super().__init__(args.folder, tokenizer=tokenizer, device=args.device, dtype="float32",
                                 batch_size=args.batch, trust_remote_code=True)
            else:  # as far as tokens need it
                self.tokenizer, self.backend, self.add_bos_token, self.custom_prefix_token_id = tokenizer, "causal", None, None
                self._rank, self._world_size, self._device, self.enable_thinking = 0, 1, "cpu", None

        def get_model_info(self):  # for a report that nobody reads here
            return {}

        def loglikelihood(self, requests, disable_tqdm=True):
            start = time.perf_counter()
            results = super().loglikelihood(requests, disable_tqdm=True)
            self.seconds = time.perf_counter() - start
            return results

        def _loglikelihood_tokens(self, requests, **kwargs):
            self.split.update({pair: (head + tail, len(head)) for pair, head, tail in requests})
            return [(0.0, False)] * len(requests) if args.files else super()._loglikelihood_tokens(requests, **kwargs)

    return Model(hf_tokenizer(args.tokenizer, args.folder))


YAML = {"piqa": "piqa/piqa.yaml", "arc_easy": "arc/arc_easy.yaml", "arc_challenge": "arc/arc_challenge.yaml",
        "openbookqa": "openbookqa/openbookqa.yaml", "winogrande": "winogrande/default.yaml",
        "hellaswag": "hellaswag/hellaswag.yaml", "mmlu": "mmlu/default/{}.yaml"}


def local_task(task, name, docs, examples, folder):
    """The harness' own task, with these questions."""
    import lm_eval.tasks
    files = {key: os.path.join(folder, f"{name}_{key}.jsonl") for key in ("questions", "examples")}
    for path, those in zip(files.values(), (docs, examples or docs)):
        with open(path, "w", encoding="utf-8") as f:
            f.writelines(json.dumps(doc) + "\n" for doc in those)
    splits = dict.fromkeys(("train", "validation", "test"), files["questions"]) | {"dev": files["examples"]}
    path = os.path.join(folder, name + ".yaml")
    with open(path, "w", encoding="utf-8") as f:  # JSON is YAML
        json.dump({"include": os.path.join(os.path.dirname(lm_eval.tasks.__file__), YAML[task].format(name)), "task": name,
                   "dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": splits}}, f)
    return lm_eval.tasks.TaskManager(include_defaults=False).load(path)["tasks"][name]


def evaluate(model, task, args):
    """Of each question (label, [(tokens, context, characters), ...]), as in files; and the log-likelihoods."""
    import lm_eval
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()), \
            mock.patch.multiple("lm_eval.evaluator", create=True, add_env_info=mock.DEFAULT, get_git_commit_hash=mock.DEFAULT):
        # bars and warnings; and a list of all packages, which would take seconds for each of MMLU's subjects
        samples = lm_eval.simple_evaluate(model, tasks=[task], num_fewshot=args.shots, bootstrap_iters=0,
                                          log_samples=True)["samples"][task.config.task]
    questions, likelihoods = [], []
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        doc = sample["doc"]
        label = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)  # WinoGrande has several contexts
        questions.append((int(label), [(*model.split[tuple(pair)], len(choice)) for pair, choice in
                                       zip(argument_pairs(sample["arguments"]), task.doc_to_choice(doc), strict=True)]))
        likelihoods.append([float(answer[0]) for answer in sample["filtered_resps"]])
    return questions, likelihoods


def argument_pairs(arguments):
    if isinstance(arguments, dict):
        return [(one["arg_0"], one["arg_1"]) for one in arguments.values()]
    return arguments


# ---------------------------------------------------------------------------------------------------------------------

def prepare(task, path, folder, args):
    """Makes the files of a task with dev/eval/choices.py."""
    options = ["--tokenizer", args.tokenizer, "--out", folder]
    if args.limit:
        options += ["--limit", str(args.limit)]
    if task == "mmlu" and args.shots:
        options += ["--shots", str(args.shots), "--examples", args.examples]
    done = subprocess.run([sys.executable, choices.__file__, task, path, *options], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)


def run(command, path, table):
    start = time.perf_counter()
    done = subprocess.run([*shlex.split(command), "--choices", path, "--csv", table], capture_output=True, text=True)
    if done.returncode:
        fail(f"{command} --choices {path} --csv {table} ended with status {done.returncode}: {done.stderr[-300:]}")
    return time.perf_counter() - start


def best(values):
    return max(range(len(values)), key=values.__getitem__)


def compare(name, questions, likelihoods, ours, table):
    """How many questions differ in their tokens, the largest difference, and in how many another choice is made."""
    other = sum(a != b for a, b in zip(questions, ours, strict=True))
    if table is None:
        return [other, None, None, None]
    largest, acc, norm = 0.0, 0, 0
    for q, ((_, completions), theirs) in enumerate(zip(questions, likelihoods)):
        try:
            mine = [table[q, k] for k in range(len(theirs))]
        except KeyError as e:
            fail(f"the table has no question {e.args[0][0]}, completion {e.args[0][1]} of {name}")
        if not all(map(math.isfinite, mine + theirs)):
            fail(f"{name}, question {q}: log-likelihoods {mine} here, {theirs} in the harness; numbers are meant")
        lengths = [max(characters, 1e-9) for _, _, characters in completions]
        largest = max([largest] + [abs(a - b) for a, b in zip(mine, theirs)])
        acc += best(mine) != best(theirs)
        norm += best([a / n for a, n in zip(mine, lengths)]) != best([a / n for a, n in zip(theirs, lengths)])
    return [other, largest, acc, norm]


def line(name, count, other, largest, acc, norm, theirs, ours):
    def cell(value, form):
        return "-" if value is None else format(value, form)
    print(f"{name:40} {count:>9} {other:>7} {cell(largest, '.1e'):>9} {cell(acc, 'd'):>5} {cell(norm, 'd'):>5} "
          f"{cell(theirs, '.2f'):>12} {cell(ours, '.2f'):>9}", flush=True)


def compare_all(args, scratch):
    tables, paths = read_csv(args.csv) if args.csv else ({}, {})
    examples = [doc for _, doc in choices.read_questions(args.examples, "all", "dev")] if args.examples else []
    model, wrong = make_model(args), 0
    print(f"{'task':40} {'questions':>9} {'tokens':>7} {'|ll - ll|':>9} {'acc':>5} {'norm':>5} {'harness, q/s':>12} {'here, q/s':>9}")
    for task, path in args.tasks:
        docs = {}
        for where, doc in choices.read_questions(path, *choices.TASKS[task][1:]):
            try:
                docs.setdefault(choices.file_of(task, doc).removesuffix(".bin"), []).append(doc)
            except choices.Bad as e:
                fail(f"{where} {e}")
        if args.csv and not docs.keys() & tables.keys():
            fail(f"{args.csv} has no questions of {task}: no row's file is {min(docs)}.bin")
        if args.run:
            prepare(task, path, scratch, args)
        for name, those in docs.items():
            if args.csv and name not in tables:
                continue
            file, seconds = paths.get(name) or os.path.join(args.files or scratch, name + ".bin"), None
            if args.run:
                seconds = run(args.run, file, os.path.join(scratch, name + ".csv"))
                tables |= read_csv(os.path.join(scratch, name + ".csv"))[0]
            with choices.trying("read", file, "a file of dev/eval/choices.py is meant"):
                ours = read_file(file)
            those = those[:min(args.limit or len(those), len(ours))]
            ours = ours[:len(those)]
            shots = [doc for doc in examples if doc.get("subject") == those[0].get("subject")]
            questions, likelihoods = evaluate(model, local_task(task, name, those, shots, scratch), args)
            result = compare(name, questions, likelihoods, ours, None if args.files else tables.get(name))
            wrong += result[0]
            n = len(questions)
            line(name, n, *result, None if args.files else n / model.seconds, n / seconds if seconds else None)
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(message + " (see --help)", 2)
    parser.add_argument("folder", metavar="FOLDER", help="of a network for transformers, as dev/hf/hf.py export makes it")
    parser.add_argument("tasks", metavar="TASK=QUESTIONS", nargs="+", help="as for dev/eval/choices.py")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--run", metavar="COMMAND", help="what evaluates the same network, without --choices")
    how.add_argument("--csv", metavar="FILE", help="what it wrote with --csv")
    how.add_argument("--files", metavar="DIR", help="compare these files' tokens; FOLDER needs no network then")
    parser.add_argument("--limit", type=choices.whole_number, metavar="N", help="the first N questions, of each subject")
    parser.add_argument("--shots", type=int, choices=range(6), default=0, metavar="N", help="as for dev/eval/choices.py")
    parser.add_argument("--examples", metavar="FILE", help="as for dev/eval/choices.py")
    parser.add_argument("--tokenizer", default="gpt2", metavar="gpt2|byte|FILE", help="as for dev/eval/choices.py; for "
                        "gpt2 the harness has the one in FOLDER, if there is one")
    parser.add_argument("--batch", type=choices.whole_number, default=8, help="sequences the harness evaluates at once")
    parser.add_argument("--device", default="cpu", help="the harness', default cpu")
    args = parser.parse_args()
    args.tasks = [task.partition("=")[::2] for task in args.tasks]
    for task, path in args.tasks:
        if task not in choices.TASKS or not path:
            parser.error(f"'{task}' should be TASK=QUESTIONS with one of {' '.join(choices.TASKS)}")
    if args.shots and (not args.examples or any(task != "mmlu" for task, _ in args.tasks)):
        parser.error("--shots are mmlu's, from --examples")
    for package in "lm_eval", "accelerate":
        need(package, "the comparison")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["HF_DATASETS_CACHE"] = os.path.join(scratch, "cache")
        sys.exit(compare_all(args, scratch) > 0)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted", 130)
