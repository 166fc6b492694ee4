#!/usr/bin/env python3
"""Trains the paper's networks at a size of your choice, evaluates them, and prints the paper's tables with both figures.

    python3 dev/eval/tables.py networks OUT -i 'data/train_*.bin' -j data/val_000000.bin --choices DIR -- -e d12 -b 8 -x 5000 -l 6e-4
    python3 dev/eval/tables.py conversions OUT --model gpt2.bin -j data/val_000000.bin --choices DIR
    python3 dev/eval/tables.py conversions OUT --model gpt2.bin -j data/val_000000.bin --choices DIR -i 'data/train_*.bin' -- -x 500 -l 1e-5

What stands after -- goes to the trainer: the size, the same for all, or how the distillation goes. The networks are
trained on the same text by the same seed, one after the other, and make tables 1, 2 and 6 of the paper: losses and zero-shot
accuracies. Conversions of a baseline model, of GPT-2's blocks or Llama's, are evaluated as they are and, with -i, after distillation:
tables 5 and 7.
DIR holds files of dev/eval/choices.py; a pattern in quotes is taken too. A table has the rows that there are files for.

OUT keeps models, logs, each question's log-likelihoods (OUT/NETWORK/TASK.csv) and, in tables.json, what is done. Killed at
any time, the same command goes on, in the middle of a training too, and ends with the same figures. More networks,
conversions and choices may be asked for later; other text, flags or choices of the same name are refused.

Losses are nats a token, of the first -m batches of -b sequences. Accuracies are acc, the likeliest completion, or with
--norm acc_norm, the likeliest by its length; ± is one standard error, chance the share that guessing gets. The tables go
to standard output as Markdown, progress to standard error. Exit status: 0 done, 1 data and files, 2 usage, 130 Ctrl-C or
SIGTERM; of a training or an evaluation that fails, its own, or 3 if it was killed.
"""
import argparse
import csv
import fcntl
import glob
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from typing import NamedTuple

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.append(HERE)
from choices import TASKS, fail, trying, whole_number, write_files, writing

RECORD = "tables.json"
LOSS = re.compile(r"validation loss (\S+), .* (\d+) sequences(?:.* KL (\S+) \| same top token (\S+)%)?")
OURS = "-i", "-j", "-o", "-y", "--mode", "--distill", "--choices", "--plan", "--help", "--version"  # not for after --

# ---------------------------------------------------------------------------------------------------------------------
# what the paper has: its networks' names, and the figures of its tables

NETWORKS = {"baseline": "Baseline", "midpoint": "Midpoint (2.4)", "midpoint-a": "Midpoint (3.6)", "leapfrog": "Leapfrog",
            "hamiltonian": "Hamiltonian"}
TITLES = {"piqa": "PIQA", "arc_easy": "ARC-easy", "arc_challenge": "ARC-challenge", "openbookqa": "OpenBookQA",
          "winogrande": "WinoGrande", "hellaswag": "HellaSwag", "mmlu": "MMLU"}
TABLE_1 = {"baseline": ("2.8810", "2.9022", "2.6544", "2.6988"),
           "midpoint-a": ("2.8681", "2.9148", "2.5243", "2.6183"),
           "leapfrog": ("2.9245", "2.9432", "2.5750", "2.6091")}
TABLE_2 = {"piqa": ("51.14", "53.05", "52.83", "53.16", "52.72", "55.11"),
           "arc_easy": ("27.02", "26.14", "28.95", "23.86", "26.84", "26.49"),
           "arc_challenge": ("22.74", "22.73", "24.08", "22.41", "28.09", "26.09"),
           "openbookqa": ("24.20", "24.40", "24.20", "24.00", "23.80", "19.80"),
           "winogrande": ("49.57", "51.70", "51.85", "50.28", "50.20", "48.30")}
TABLE_5 = {"piqa": ("72.09", "70.24"), "arc_easy": ("50.88", "50.35"), "arc_challenge": ("27.76", "26.75"),
           "openbookqa": ("38.20", "35.60"), "winogrande": ("50.36", "51.62")}
TABLE_6 = {"piqa": ("50.98", "53.05", "51.14"), "arc_easy": ("26.49", "26.14", "27.02"), "arc_challenge": ("23.08", "22.73", "22.74"),
           "openbookqa": ("20.60", "24.40", "24.20"), "winogrande": ("50.75", "51.70", "49.57")}


def table_7():
    """Of each subject of MMLU, and of all: the accuracy before and after conversion, with their errors."""
    with open(os.path.join(HERE, "table7.csv"), newline="") as f:
        return {row["subject"]: (f"{row['original']} ± {row['original_error']}", f"{row['converted']} ± {row['converted_error']}")
                for row in csv.DictReader(f)}


# ---------------------------------------------------------------------------------------------------------------------
# what is to be done, and what is done

class Variant(NamedTuple):
    name: str      # in tables.json, and of its folder
    title: str     # in tables
    train: list    # the trainer's flags, or None
    evaluate: list  # the evaluation's, or None: those of the model trained


def variants(args):
    if args.what == "networks":
        return [Variant(name, NETWORKS[name], ["--mode", name], None) for name in NETWORKS if name in args.networks]
    of = ["-e", args.model]
    found = [Variant("original", "original", None, of)]
    for flags in args.convert or ["retrofit", "bdia"]:
        words = ["--mode", *flags.split()]
        found.append(Variant(flags, flags, None, of + words))
        if args.i:
            found.append(Variant(flags + ", distilled", flags + ", distilled", [*of, *words, "--distill", args.model], None))
    return found


def folder(args, variant):
    return os.path.join(args.out, re.sub(r"[^A-Za-z0-9.-]+", "_", variant.name))


def find(pattern, flag, magic, what):
    """The files of a pattern or a folder, which begin with this number."""
    names = sorted(glob.glob(os.path.join(glob.escape(pattern), "*.bin") if os.path.isdir(pattern) else pattern))
    if not names:
        fail(f"{flag} {pattern}: no such file; {what} is meant")
    for name in names:
        with trying("read", name, what + " is meant"), open(name, "rb") as f:
            if magic and f.read(4) != struct.pack("<I", magic):
                fail(f"{name} is not {what}")
    return names


def fingerprint(path, most=1 << 26):
    """By which a file is known again, whatever its folder: of so many bytes, since a text may have hundreds of gigabytes."""
    with trying("read", path, "it was there a moment ago"), open(path, "rb") as f:
        return [os.path.basename(path), os.path.getsize(path), zlib.crc32(f.read(most))]


def asked(args):
    """What all figures of a folder have in common."""
    text = {flag: [fingerprint(path, 1 << 20) for path in find(pattern, flag, None, "a file of tokens or a pattern")]
            for flag, pattern in (("-i", args.i), ("-j", args.j)) if pattern}
    model = {"--model": fingerprint(args.model)} if args.what == "conversions" else {}
    return {"kind of tables": args.what, **text, **model, "-b": args.b, "-t": args.t, "-m": args.m, "training": " ".join(args.trainer)}


def claim(out):
    """Takes the folder until this process, and what it started, has ended."""
    with writing(out):
        os.makedirs(out, exist_ok=True)
        lock = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        note(f"{out} is in use by another run, or by what one that was killed had started: waiting for its end")
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:
        pass  # the file system has no locks
    return lock


def load_record(args):
    path, now = os.path.join(args.out, RECORD), asked(args)
    others = set(os.listdir(args.out)) - {RECORD, RECORD + ".tmp"}
    if not os.path.exists(path):
        if others:
            fail(f"{args.out} holds other files, but no {RECORD}; give a new folder", 2)
        return {"asked": now, "done": {}}
    try:
        with open(path, encoding="utf-8") as f:
            record = json.load(f)
        before, _ = record["asked"], record["done"].items()
        differ = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        fail(f"cannot read {path} ({e}); remove what that run left, or give a new folder")
    if differ and others:  # what failed before it made anything may be corrected
        fail(f"{args.out} was begun with another {', '.join(differ)} ({before.get(differ[0])}, not {now.get(differ[0])}); repeat "
             "that command, or give a new folder", 2)
    return {**record, "asked": now}


def save(args, record):
    write_files(args.out, {RECORD: lambda f: f.write(json.dumps(record, indent=1, ensure_ascii=False).encode())})


# ---------------------------------------------------------------------------------------------------------------------
# doing it

def block_of(path):
    """The block that a model file's network has, as programs are called by it: slot 14, but llm.c's files have none."""
    with open(path, "rb") as f:
        header = struct.unpack("<16i", f.read(64).ljust(64, b"\0"))
    return "llama" if header[1] >= 1000 and header[14] == 1 else "gpt2"


def evaluate(args, model, *flags):
    size = ["-b", str(args.b), *(["-t", str(args.t)] if args.t else [])]
    return run(args, "eval", [*model, *size, *flags])


def run(args, does, flags):
    """What it prints. Signals reach it through this process, so that a training can save before it ends."""
    command = [os.path.join(args.programs, f"{does}_rev_{args.block}"), *flags]
    with trying("run", command[0], "make builds it, make llama for Llama's blocks; --programs says where it is"):
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   errors="replace", start_new_session=True, pass_fds=[args.lock])
    try:
        printed, complaints = process.communicate()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    if process.returncode == -signal.SIGKILL:
        fail(f"{command[0]} was killed, perhaps for want of memory; the same command goes on ({' '.join(command)})", 3)
    if process.returncode < 0:
        fail(f"{command[0]} was ended by signal {-process.returncode}, {signal.strsignal(-process.returncode)} ({' '.join(command)})")
    if process.returncode:
        why = (complaints.strip().splitlines() or [f"ended with status {process.returncode}"])[-1]
        fail(f"{why} ({' '.join(command)})", process.returncode)
    return printed


def note(line):
    sys.stderr.write(f"[{time.strftime('%H:%M:%S')}] {line}\n")  # all at once, whatever interrupts


def train(args, variant):
    """The model's name within OUT."""
    out = folder(args, variant)
    note(f"{variant.name}: training, see {out}/log.csv")
    flags = ["-i", args.i, "-j", args.j, *args.trainer, *variant.train, "-o", out, "-y", "1"]
    for flag, value in ("-n", "100"), ("-nk", "1"):  # unless these are given: the trainer refuses flags given twice
        flags += [flag, value] if flag not in args.trainer else []
    run(args, "train", flags)
    models = sorted(glob.glob(os.path.join(glob.escape(out), "model_*.bin")))
    if not models:
        fail(f"{out} holds no model after its training")
    return os.path.relpath(models[-1], args.out)


def losses(args, variant, model, text):
    against = ["--distill", args.model] if args.what == "conversions" and variant.name != "original" else []
    printed = evaluate(args, model, "-j", text, "-m", str(args.m), *against)
    found = LOSS.search(printed)
    if not found:
        fail(f"the evaluation printed no loss, but {printed:.200}")
    return list(found.groups())


def best(scores):
    return max(range(len(scores)), key=scores.__getitem__)  # of equals the first


def accuracy(path):
    """Of a table of eval_rev_gpt2 --csv: questions, those answered right, by length too, and how many guessing gets."""
    questions = {}
    with open(path, newline="") as f:
        for row in csv.DictReader(f):
            question = questions.setdefault(row["question"], (int(row["label"]), [], []))
            question[1].append(float(row["loglikelihood"]))
            question[2].append(float(row["loglikelihood"]) / max(int(row["characters"]), 1))
    right, normed, chance = 0, 0, 0.0
    for label, scores, by_length in questions.values():
        right += best(scores) == label
        normed += best(by_length) == label
        chance += 1 / len(scores)
    return [len(questions), right, normed, chance]


def choose(args, variant, model, path):
    with writing(args.out):
        os.makedirs(folder(args, variant), exist_ok=True)
    table = os.path.join(folder(args, variant), task_of(path) + ".csv")
    evaluate(args, model, "--choices", glob.escape(path), "--csv", table)
    return accuracy(table)


def task_of(path):
    return os.path.splitext(os.path.basename(path))[0]


def do(args, record, variant):
    """Whatever of it is not done yet; each piece is kept as soon as it is."""
    done = record["done"].setdefault(variant.name, {"loss": {}, "choices": {}})
    if variant.train and "model" not in done:
        done["model"] = train(args, variant)
        save(args, record)
    model = variant.evaluate or ["-e", os.path.join(args.out, done["model"])]
    for split, text in (("training", args.i), ("validation", args.j)):
        if text and split not in done["loss"]:
            note(f"{variant.name}: {split} loss")
            done["loss"][split] = losses(args, variant, model, text)
            save(args, record)
    for path in args.choices:
        is_now, was = fingerprint(path), done["choices"].get(task_of(path))
        if was and was["of"] != is_now:
            fail(f"{path} has other questions than when {variant.name} was evaluated; give another name, or a new folder", 2)
        if not was:
            note(f"{variant.name}: {task_of(path)}")
            done["choices"][task_of(path)] = {"of": is_now, "result": choose(args, variant, model, path)}
            save(args, record)


# ---------------------------------------------------------------------------------------------------------------------
# the tables

def show(title, heading, rows):
    for row in (["**" + title + "**"], [], heading, ["---"] * len(heading), *rows, []):
        print("| " + " | ".join(row) + " |" if len(row) > 1 else "".join(row))


def pooled(args, done, tasks):
    """The sum of the results of several files."""
    return [sum(numbers) for numbers in zip(*(done["choices"][task]["result"] for task in tasks))]


def with_error(args, result, percent):
    n, p = result[0], result[2 if args.norm else 1] / result[0]
    error = math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else 0
    return f"{100 * p:.2f} ± {100 * error:.2f}" if percent else f"{p:.4f} ± {error:.4f}"


def accuracy_row(args, record, title, tasks, chosen, paper, percent=True):
    results = [pooled(args, record["done"][variant.name], tasks) for variant in chosen]
    n, chance = results[0][0], results[0][3] / results[0][0]
    return [title, str(n), f"{100 * chance:.1f}" if percent else f"{chance:.4f}",
            *(with_error(args, result, percent) for result in results), *paper]


def by_task(args):
    """The choices asked for: {task: its files}, in the paper's order, then others; MMLU's subjects are one task."""
    found = {task: [] for task in TITLES}
    for path in args.choices:
        found.setdefault("mmlu" if task_of(path).startswith("mmlu_") else task_of(path), []).append(task_of(path))
    return {task: files for task, files in found.items() if files}


def accuracies(args, record, title, chosen, names, paper):
    """A row a task; `names` are the paper's columns."""
    heading = ["%", "questions", "chance", *(variant.title for variant in chosen), *("paper, " + name for name in names)]
    show(title, heading, [accuracy_row(args, record, TITLES.get(task, task), files, chosen, paper.get(task, ["-"] * len(names)))
                          for task, files in by_task(args).items()])


def network_tables(args, record, chosen):
    rows = [[variant.title, *(record["done"][variant.name]["loss"][split][0] for split in ("training", "validation")),
             *TABLE_1.get(variant.name, ["-"] * 4)] for variant in chosen]
    show("Table 1: cross-entropy loss", ["network", "training", "validation", "paper, 124M: training", "validation",
                                         "paper, 772M: training", "validation"], rows)
    if not args.choices:
        return
    names = [f"{size} {name}" for size in ("124M", "772M") for name in ("Baseline", "Midpoint", "Leapfrog")]
    # the paper's Midpoint is (3.6)
    order = ["baseline", "midpoint-a", "leapfrog", "hamiltonian"]
    second = sorted((v for v in chosen if v.name in order), key=lambda v: order.index(v.name))
    third = [v for name in ("midpoint", "midpoint-a", "baseline") for v in chosen if v.name == name]
    if second:
        accuracies(args, record, "Table 2: zero-shot accuracy", second, names, TABLE_2)
    if third:
        accuracies(args, record, "Table 6: the two midpoint networks", third, ["(2.4)", "(3.6)", "Baseline"], TABLE_6)


def conversion_tables(args, record, chosen):
    splits = ["training", "validation"] if args.i else ["validation"]
    rows = []
    for variant in chosen:
        loss = record["done"][variant.name]["loss"]
        rows.append([variant.title, *(loss[split][0] for split in splits), *(value or "-" for value in loss["validation"][2:])])
    show("Cross-entropy loss, and how near to the original", ["network", *splits, "KL", "same top token, %"], rows)
    names = ["TinyLlama", "TinyLlama converted"]
    if any(task != "mmlu" for task in by_task(args)):
        accuracies(args, record, "Table 5: zero-shot accuracy of conversions", chosen, names, TABLE_5)
    subjects = by_task(args).get("mmlu")
    if subjects:
        paper, all_of_them = table_7(), len(table_7()) - 1 == len(subjects)
        rows = [accuracy_row(args, record, "all", subjects, chosen, paper["all"] if all_of_them else ["-", "-"], percent=False)]
        for task in subjects:
            subject = task.removeprefix("mmlu_")
            rows.append(accuracy_row(args, record, subject.replace("_", " "), [task], chosen, paper.get(subject, ["-", "-"]), percent=False))
        show("Table 7: MMLU", ["subject", "samples", "chance", *(v.title for v in chosen), "paper, SmolLM2 1.7B", "converted"], rows)


# ---------------------------------------------------------------------------------------------------------------------

def add_flags(parser, conversions):
    parser.error = lambda message: fail(message + " (see --help)", 2)
    parser.add_argument("out", metavar="OUT", help="folder for everything, made if missing")
    parser.add_argument("-i", required=not conversions, metavar="TOKENS", help="training text, as the trainer takes it")
    parser.add_argument("-j", required=True, metavar="TOKENS", help="validation text")
    parser.add_argument("--choices", default="", metavar="DIR", help="files of dev/eval/choices.py: their folder, or a pattern; without: losses only")
    if conversions:
        parser.add_argument("--model", required=True, metavar="FILE", help="of a baseline")
        parser.add_argument("--convert", action="append", metavar="'retrofit --coefficient 1'", help="a mode and its flags; may be repeated; default retrofit and bdia")
    else:
        parser.add_argument("--networks", default=",".join(NETWORKS), metavar="NAMES", help="with commas, default %(default)s")
    parser.add_argument("-b", type=whole_number, default=4, metavar="N", help="evaluation: sequences a batch, default 4")
    parser.add_argument("-t", type=whole_number, metavar="N", help="evaluation: tokens a sequence, default the model's context")
    parser.add_argument("-m", type=whole_number, default=100, metavar="N", help="losses: batches, if there are that many, default 100")
    parser.add_argument("--norm", action="store_true", help="acc_norm in place of acc")
    parser.add_argument("--programs", default=ROOT, metavar="DIR", help="where the trainer and the evaluation are, default the repository's root")


def parse(words):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = lambda message: fail(message + " (see --help)", 2)
    whats = parser.add_subparsers(dest="what", required=True, metavar="networks|conversions")
    for what in "networks", "conversions":
        add_flags(whats.add_parser(what, allow_abbrev=False), what == "conversions")
    at = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:at])
    args.trainer = words[at + 1:]
    for flag in set(args.trainer) & set(OURS):
        parser.error(f"{flag} after -- is not for the trainer here: it is set for each network")
    if args.what == "networks":
        args.networks = args.networks.split(",")
        for name in args.networks:
            if name not in NETWORKS:
                parser.error(f"--networks: '{name}' is none of {','.join(NETWORKS)}")
    elif args.trainer and not args.i:
        parser.error("what stands after -- is for distillation, which needs -i")
    for flags in args.convert or [] if args.what == "conversions" else []:
        if flags.split()[:1] not in (["retrofit"], ["bdia"]):
            parser.error(f"--convert '{flags}' should begin with retrofit or bdia")
    return args


def main():
    args = parse(sys.argv[1:])
    args.choices = find(args.choices, "--choices", 20240522, "a file of dev/eval/choices.py") if args.choices else []
    args.block = "gpt2"
    if args.what == "conversions":
        args.block = block_of(find(glob.escape(args.model), "--model", 20240326, "a model file")[0])
    args.lock = claim(args.out)
    record, chosen = load_record(args), variants(args)
    save(args, record)
    for variant in chosen:
        do(args, record, variant)
    (network_tables if args.what == "networks" else conversion_tables)(args, record, chosen)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on", 130)
