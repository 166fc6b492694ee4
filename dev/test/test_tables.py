"""Tests dev/eval/tables.py: tiny networks, a few questions, a run that is killed again and again beside one that never is.

    python3 dev/test/test_tables.py

Needs Python and what `make` needs; the programs are built. The last line is `N passed, N failed`, the exit status 1 if any failed.
"""
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import test_choices
from test_choices import MMLU, QUESTIONS, check, check_equal, write

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, os.pardir)
PROGRAM = os.path.join(ROOT, "dev", "eval", "tables.py")
SHAPE = "-e d6 --layers 3 --channels 32 --heads 2 --context 512 -t 64 -b 4 -x 12 -l 1e-2".split()
QUIET = dict(os.environ, OMP_NUM_THREADS="2", OMP_WAIT_POLICY="passive")


def make_input(tmp):
    """Questions in a folder, and text, as tables.py wants them: its arguments."""
    for task in "piqa", "arc_easy", "openbookqa", "winogrande":
        test_choices.good(task, test_choices.jsonl(tmp, QUESTIONS[task][0] * 4), "--tokenizer", "byte", "--out", os.path.join(tmp, "choices"))
    subjects = [dict(MMLU, subject=subject, answer=k) for subject in ("anatomy", "virology") for k in range(4)]
    test_choices.good("mmlu", test_choices.jsonl(tmp, subjects), "--tokenizer", "byte", "--out", os.path.join(tmp, "choices"))
    text = "".join(f"{i} and {i * i} are a number and its square; " for i in range(2000))
    return ["-i", write(os.path.join(tmp, "train.txt"), text[:60000]), "-j", write(os.path.join(tmp, "val.txt"), text[60000:70000]),
            "--choices", os.path.join(tmp, "choices"), "-m", "3"]


def start(*args):
    return subprocess.Popen([sys.executable, PROGRAM, *args], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=QUIET)


def good(*args):
    p = start(*args)
    printed, complaints = p.communicate()
    check_equal(p.returncode, 0, f"exit status (stderr {complaints})")
    return printed


def bad(status, says, *args):
    p = start(*args)
    printed, complaints = p.communicate()
    lines = [line for line in complaints.splitlines() if not line.startswith("[")]  # progress
    check_equal((p.returncode, printed, len(lines)), (status, "", 1), f"exit status, stdout, lines of stderr {complaints!r}")
    check(lines[0].startswith("tables.py: ") and says in lines[0], f"stderr should say {says!r}: {lines[0]!r}")


def files_of(out):
    """The contents of all files but logs, which have times."""
    found = {}
    for folder, _, names in os.walk(out):
        for name in names:
            if name != "log.csv":
                with open(os.path.join(folder, name), "rb") as f:
                    found[os.path.relpath(f.name, out)] = f.read()
    return found


def rows_of(printed, title):
    """Of the table with this title: {first cell: the others}."""
    lines = printed[printed.index("**" + title):].splitlines()[2:]
    table = [line.strip("| ").split(" | ") for line in lines[:lines.index("")]]
    return {cells[0]: cells[1:] for cells in table}


def recount(path):
    """Accuracy and chance from a table of log-likelihoods, in another way than tables.py's."""
    with open(path, newline="") as f:
        rows = list(csv.DictReader(f))
    count = int(rows[-1]["question"]) + 1
    right = chance = 0
    for q in range(count):
        of_question = [row for row in rows if row["question"] == str(q)]
        of_question.sort(key=lambda row: (-float(row["loglikelihood"]), int(row["completion"])))
        right += of_question[0]["completion"] == of_question[0]["label"]
        chance += 100 / len(of_question) / count
    return right / count, chance, count


# ---------------------------------------------------------------------------------------------------------------------

def test_killed(tmp):
    """Killed wherever it is, in trainings and between evaluations, it ends with the same tables and files."""
    args, a, b = make_input(tmp), os.path.join(tmp, "a"), os.path.join(tmp, "b")
    printed = good("networks", a, *args, "--", *SHAPE, "-n", "2")
    times, stopped = 0, set()
    while times < 40:
        p = start("networks", b, *args, "--", *SHAPE, "-n", "2")
        try:
            again, complaints = p.communicate(timeout=0.15 + 0.05 * (times % 7))
            break
        except subprocess.TimeoutExpired:
            p.send_signal(signal.SIGKILL if times % 2 else signal.SIGTERM)
            again, complaints = p.communicate()
            if p.returncode == 0:  # it was done before the signal came
                break
            stopped.add(p.returncode)
            check(p.returncode < 0 or complaints.splitlines()[-1] == "tables.py: interrupted; the same command goes on", complaints)
            times += 1
    else:
        again = good("networks", b, *args, "--", *SHAPE, "-n", "2")
    check(times > 3, f"stopped {times} times only")
    check_equal(stopped - {-signal.SIGTERM}, {130, -signal.SIGKILL}, "statuses when stopped, but for those just started")
    check_equal(again, printed, "the tables")
    first, second = files_of(a), {name: data for name, data in files_of(b).items() if not name.endswith(".tmp")}
    check_equal(sorted(second), sorted(first), "the files")
    strip = [{name: data.replace(folder.encode(), b"") for name, data in files.items()} for folder, files in ((a, first), (b, second))]
    check_equal([name for name in first if strip[0][name] != strip[1][name]], [], "the files' contents")


def test_figures(tmp):
    """Accuracies are those that the table of log-likelihoods gives, and what eval_rev_gpt2 prints; nothing is done twice."""
    args, out = make_input(tmp), os.path.join(tmp, "out")
    printed = good("networks", out, *args, "--networks", "leapfrog,baseline", "--", *SHAPE)
    table, six = rows_of(printed, "Table 2"), rows_of(printed, "Table 6")
    check_equal(table["%"][2:4], ["Baseline", "Leapfrog"], "columns of table 2")
    check_equal(six["%"][2:3], ["Baseline"], "columns of table 6")
    for title, task, paper in ("PIQA", "piqa", ["51.14", "53.05"]), ("ARC-easy", "arc_easy", ["27.02", "26.14"]), \
            ("OpenBookQA", "openbookqa", ["24.20", "24.40"]), ("WinoGrande", "winogrande", ["49.57", "51.70"]):
        for column, network in (2, "baseline"), (3, "leapfrog"):
            acc, chance, count = recount(os.path.join(out, network, task + ".csv"))
            error = 100 * (acc * (1 - acc) / (count - 1)) ** 0.5
            check_equal(table[title][:2] + [table[title][column]], [str(count), f"{chance:.1f}", f"{100 * acc:.2f} ± {error:.2f}"], f"{task} of {network}")
            said = subprocess.run([os.path.join(ROOT, "eval_rev_gpt2"), "-e", os.path.join(out, network, "model_00000012.bin"), "--choices",
                                   os.path.join(tmp, "choices", task + ".bin")], capture_output=True, text=True, env=QUIET).stdout
            check(f"acc {acc:.4f} +- {error / 100:.4f}" in said, f"{acc} where eval_rev_gpt2 says {said}")
        check_equal(table[title][4:6], paper, f"the paper's {task}")
    check_equal(table["MMLU"][0], "8", "questions of MMLU")
    losses = rows_of(printed, "Table 1")
    said = subprocess.run([os.path.join(ROOT, "eval_rev_gpt2"), "-e", os.path.join(out, "leapfrog", "model_00000012.bin"), "-j", args[3], "-m", "3"],
                          capture_output=True, text=True, env=QUIET).stdout
    check(f"validation loss {losses['Leapfrog'][1]}," in said, f"{losses} where eval_rev_gpt2 says {said}")
    check_equal(losses["Leapfrog"][2:], ["2.9245", "2.9432", "2.5750", "2.6091"], "the paper's losses")
    again = good("networks", out, *args, "--networks", "leapfrog,baseline", "--programs", tmp, "--", *SHAPE)  # where there are none
    check_equal(again, printed, "the tables again")
    normed = rows_of(good("networks", out, *args, "--networks", "baseline", "--norm", "--", *SHAPE), "Table 2")
    check(re.search(r"acc_norm " + f"{float(normed['PIQA'][2].split()[0]) / 100:.4f}", subprocess.run(
        [os.path.join(ROOT, "eval_rev_gpt2"), "-e", os.path.join(out, "baseline", "model_00000012.bin"), "--choices",
         os.path.join(tmp, "choices", "piqa.bin")], capture_output=True, text=True, env=QUIET).stdout), "acc_norm")


def test_conversions(tmp):
    args, out, model = make_input(tmp), os.path.join(tmp, "out"), os.path.join(tmp, "networks/baseline/model_00000012.bin")
    good("networks", os.path.join(tmp, "networks"), *args[:4], "-m", "3", "--networks", "baseline", "--", *SHAPE)
    asked = ["conversions", out, "--model", model, *args, "--convert", "bdia", "--convert", "retrofit --coefficient 1"]
    printed = good(*asked, "--", "-t", "64", "-x", "3", "-l", "1e-4")
    losses = rows_of(printed, "Cross-entropy loss")
    check_equal(list(losses)[2:], ["original", "bdia", "bdia, distilled", "retrofit --coefficient 1", "retrofit --coefficient 1, distilled"], "networks")
    check_equal(losses["original"][2:], ["-", "-"], "the original, compared with itself")
    divergences = [float(losses[name][2]) for name in list(losses)[3:]]
    check(min(divergences) > 0 and len(set(divergences)) == 4, f"divergences of two networks, before and after: {divergences}")
    piqa, seven = rows_of(printed, "Table 5")["PIQA"], rows_of(printed, "Table 7")
    check_equal((piqa[0], piqa[-2:]), ("8", ["72.09", "70.24"]), "PIQA")
    acc, _, _ = recount(os.path.join(out, "retrofit_--coefficient_1_distilled", "piqa.csv"))
    check_equal(piqa[6].split()[0], f"{100 * acc:.2f}", "PIQA, the last column")
    check_equal(list(seven)[2:], ["all", "anatomy", "virology"], "subjects")
    check_equal(seven["virology"][-2:], ["0.4880 ± 0.0388", "0.4639 ± 0.0387"], "the paper's virology")
    check_equal(seven["all"][-2:], ["-", "-"], "the paper's mean is of all subjects")
    means = [sum(float(seven[subject][k].split()[0]) for subject in ("anatomy", "virology")) / 2 for k in range(2, 7)]
    check_equal([cell.split()[0] for cell in seven["all"][2:7]], [f"{mean:.4f}" for mean in means], "all subjects")
    with open(model, "r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(b"x")
    bad(2, "another --model", *asked, "--", "-t", "64", "-x", "3", "-l", "1e-4")


def test_llama(tmp):
    """A model of Llama's blocks is converted by the programs that have them, and evaluated with the tokens a sequence asked for."""
    args, out, model = make_input(tmp), os.path.join(tmp, "out"), os.path.join(tmp, "model_00000012.bin")
    shape = ["-e", "l135m", "--layers", "3", "--channels", "32", "--heads", "2", "--key-heads", "1", "--ffn", "64", "--context", "512"]
    subprocess.run([os.path.join(ROOT, "train_rev_llama"), "-i", args[1], *shape, *"--mode baseline -t 64 -b 4 -x 12 -l 1e-2 -o".split(), tmp], check=True,
                   stdout=subprocess.DEVNULL, env=QUIET)
    asked = ["conversions", out, "--model", model, *args, "-t", "320", "--convert", "bdia"]
    losses = rows_of(good(*asked, "--", *"-t 64 -x 3 -l 1e-4".split()), "Cross-entropy loss")
    said = subprocess.run([os.path.join(ROOT, "eval_rev_llama"), "-e", model, "-j", args[3], *"-m 3 -t 320".split()], capture_output=True,
                          text=True, env=QUIET).stdout
    check(f"validation loss {losses['original'][1]}," in said, f"{losses['original']}, {said!r}")
    check(float(losses["bdia"][2]) > 0, f"divergence: {losses['bdia']}")
    bad(2, "another -t", *asked[:-4], "-t", "64", "--convert", "bdia", "--", *"-t 64 -x 3 -l 1e-4".split())


def test_refused(tmp):
    """Other flags, text or questions than those a folder was begun with; what is wrong from the start leaves it free."""
    args, out = make_input(tmp), os.path.join(tmp, "out")
    bad(2, "networks|conversions")
    bad(2, "-i", "networks", out)
    bad(2, "--networks: 'llama'", "networks", out, *args, "--networks", "llama")
    bad(2, "--mode after --", "networks", out, *args, "--", "--mode", "bdia")
    bad(2, "should begin with retrofit or bdia", "conversions", out, "--model", args[1], *args[2:], "--convert", "leapfrog")
    bad(2, "needs -i", "conversions", out, "--model", args[1], *args[2:], "--", "-x", "1")
    bad(1, "not a model file", "conversions", out, "--model", args[1], *args[2:])
    bad(1, "no such file", "networks", out, "-i", os.path.join(tmp, "none"), *args[2:])
    bad(1, "not a file of dev/eval/choices.py", "networks", out, *args[:4], "--choices", args[1])
    bad(1, "make builds it", "networks", out, *args, "--programs", tmp, "--", *SHAPE)
    bad(2, "--frob", "networks", out, *args, "--", *SHAPE, "--frob")
    fake = write(os.path.join(tmp, "train_rev_gpt2"), "#!/bin/sh\nulimit -c 0\nkill -$SIGNAL $$\n")
    os.chmod(fake, 0o755)
    for name, status, says in ("KILL", 3, "was killed, perhaps for want of memory"), ("SEGV", 1, "was ended by signal 11"):
        QUIET["SIGNAL"] = name
        bad(status, says, "networks", os.path.join(tmp, name), *args, "--programs", tmp, "--", *SHAPE)
    del QUIET["SIGNAL"]
    one = ["networks", out, *args, "--networks", "midpoint", "--", *SHAPE]
    good(*one)
    bad(2, "another training", *one, "-u", "1")
    bad(2, "another -m", *one[:2], *args[:-1], "4", *one[-len(SHAPE) - 1:])
    shutil.copy(os.path.join(tmp, "choices", "piqa.bin"), os.path.join(tmp, "choices", "new.bin"))
    check_equal(rows_of(good(*one), "Table 6")["new"][0], "8", "questions that came later")
    test_choices.good("piqa", test_choices.jsonl(tmp, QUESTIONS["piqa"][0]), "--tokenizer", "byte", "--out", os.path.join(tmp, "choices"))
    bad(2, "piqa.bin has other questions", *one)
    write(args[3], "x" * 10000)
    bad(2, "another -j", *one)
    bad(2, "no tables.json", "networks", os.path.join(tmp, "choices"), *args, "--", *SHAPE)
    write(os.path.join(out, "tables.json"), "{")
    bad(1, "cannot read", *one)


if __name__ == "__main__":
    subprocess.run(["make", "-s", "-C", ROOT, "train_rev_gpt2", "eval_rev_gpt2", "train_rev_llama", "eval_rev_llama"], check=True)
    test_choices.main({name: test for name, test in globals().items() if name.startswith("test_") and callable(test)})
