"""Tests ranks by NCCL, dev/ranks/nccl.cuh, with the emulated twin and an emulated NCCL: the same bits whatever their number
and whoever starts them, and their faults.

    python3 dev/test/test_nccl.py [brief] [TEST ...]      for example bits; without names, all; brief: two minutes

Needs a C++ compiler; with Open MPI or MPICH ranks are started by them as well. The last line is `N passed, N failed`, the exit
status 1 if any failed.
"""
import glob
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import test_ranks
from test_ranks import BRIEF, BUILT, ENV, ROOT, check, done, documents_file, engines, files, text_file

TRAIN, EVAL = "train_rev_gpt2_emulated", "eval_rev_gpt2_emulated"
SHAPE = ("-i train.txt -j train.txt -e d6 --layers 2 --channels 16 --heads 2 --context 6 -b 1 --chunk 2 --head-chunk 50 "
         "-v 2 -m 3 -n 2 -s 2 -g 2").split()
LONG = ("-i train.txt -j train.txt -e d6 --layers 1 --channels 8 --heads 1 --context 4 -b 1 --chunk 2 --head-chunk 50 "
        "-v 20 -m 2 -n 4 -x 30 -d 20").split()
HOST = re.escape(socket.gethostname())
NETWORKS = ["baseline", "midpoint", "midpoint-a", "leapfrog", "hamiltonian", "retrofit", "bdia"]


def make(*arguments):
    quickly = ["EMULATE_OPTIMIZE=-Og"] if BRIEF else []  # compiling takes longer than running then
    made = subprocess.run(["make", "-B", "-s", "SAN=-Werror", *quickly, *arguments], cwd="source", env=ENV, capture_output=True, text=True)
    check(made.returncode == 0 and not made.stderr, f"make {' '.join(arguments)}: {made.stderr[-800:]}")


def build(folder, programs, *arguments):
    """The programs of one way to build them, in a folder of their own."""
    make(*programs, *arguments)
    os.mkdir(folder)
    for program in programs:
        Path("source", program).rename(Path(folder, program))


def words(folder, program, *arguments):
    return [str(Path(folder, program).resolve()), *map(str, arguments)]


def alone(*arguments, program=TRAIN, **env):
    return done(words("alone", program, *arguments), **env)


def forked(ranks, *arguments, **env):
    return done(words("nccl", TRAIN, *arguments, "--ranks", ranks), **env)


def slurm(ranks, *arguments, program=TRAIN, cards=("H100",)):
    """As srun starts them: the same flags, and each task's number in its environment. Their results, in order."""
    tasks = []
    for rank in range(ranks):
        mine = dict(ENV, SLURM_PROCID=str(rank), SLURM_NTASKS=str(ranks), SLURM_STEP_NUM_TASKS=str(ranks),
                    SLURM_LOCALID=str(rank), EMULATED_CARD=cards[rank % len(cards)])
        tasks.append(subprocess.Popen(words("nccl", program, *arguments), env=mine, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                      text=True, errors="replace"))
    results = []
    for task in tasks:
        out, error = task.communicate(timeout=300)
        results.append(subprocess.CompletedProcess(task.args, task.returncode, out, error))
    return results


def one_line(results, statuses, pattern, what):
    """That of all ranks together there is one line, of this pattern, and that each ends with one of these statuses."""
    results = results if isinstance(results, list) else [results]
    lines = [line for r in results for line in r.stderr.splitlines() if line.startswith(("train_rev_gpt2:", "eval_rev_gpt2:", "emulate:"))]
    check(len(lines) == 1 and re.search(pattern, lines[0]) and all(r.returncode in statuses for r in results),
          f"{what}: statuses {[r.returncode for r in results]}, not {statuses}, and {pattern!r} is meant: {lines[:4]}")
    left = os.listdir(ENV["EMULATED_FOLDER"]) + glob.glob("meet*")
    check(not left, f"{what}: this is left: {left}")
    for name in os.listdir(ENV["EMULATED_FOLDER"]):
        shutil.rmtree(Path(ENV["EMULATED_FOLDER"], name), ignore_errors=True)


def same(result, directory, step, want, what):
    results = result if isinstance(result, list) else [result]
    errors = " ".join(r.stderr[-300:] for r in results)
    check(all(r.returncode == 0 for r in results) and files(directory, step) == want, f"{what}: differs from one process: {errors}")
    shutil.rmtree(directory, ignore_errors=True)


def teacher_flags(network):
    return ["--distill", "teacher/model_00000002.bin", "--coefficient", "-0.0625"] if network in ("retrofit", "bdia") else []


def test_bits():
    for network in ["midpoint", "bdia"] if BRIEF else NETWORKS:
        flags = [*SHAPE, "-x", 2, "-d", 30, "--mode", network, *teacher_flags(network)]
        check(alone(*flags, "-o", "one").returncode == 0, f"{flags} alone")
        want = files("one", 2)
        for ranks in [2, 3] if BRIEF else [1, 2, 3]:
            same(forked(ranks, *flags, "-o", "several"), "several", 2, want, f"{network}, {ranks} ranks")
        for ranks in [2] if BRIEF else [1, 2, 3]:
            same(forked(ranks, *flags, "--overlap", "-o", "several"), "several", 2, want, f"{network}, {ranks} ranks, --overlap")
        shutil.rmtree("one")


def test_lanes():
    """Lanes change bits, the number of ranks does not; pieces are of the logits' size, or when these are small, their own."""
    for lanes in [1, 3]:
        for head in [100, 1]:
            shape = [{"50": head}.get(flag, flag) for flag in SHAPE]
            flags = [*shape, "-x", 2, "-d", 30, "--lanes", lanes, "--shuffle", "--save", "bf16"]
            alone(*flags, "-o", "one")
            for ranks in [2, 4]:
                same(forked(ranks, *flags, "-o", "several"), "several", 2, files("one", 2), f"--lanes {lanes}, {ranks} ranks, head {head}")
            shutil.rmtree("one")


def test_ways():
    """By a file and Slurm's variables, by a file and --rank, by each MPI; and the evaluation."""
    flags = [*SHAPE, "-x", 2, "-d", 24, "--mode", "leapfrog"]
    alone(*flags, "-o", "one")
    want = files("one", 2)
    for ranks in [1, 3]:
        same(slurm(ranks, *flags, "--rank-file", "meet", "-o", "several"), "several", 2, want, f"Slurm's {ranks} tasks")
        check(not Path("meet").exists(), "the rank file is left")
    Path("meet").write_text("rev_gpt2 0123456789abcdef 9 elsewhere 192.0.2.1\n")  # of a run that died at its beginning
    tasks = [subprocess.Popen(words("nccl", TRAIN, *flags, "--rank-file", "meet", "--ranks", 2, "--rank", rank, "-o", "several"), env=ENV,
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for rank in (1, 0)]
    results = [subprocess.CompletedProcess(t.args, t.wait(100), "", t.stderr.read()) for t in tasks]
    same(results, "several", 2, want, "two ranks by hand")
    for name, compiler, mpirun in engines():
        folder = f"programs_{compiler}"
        build(folder, [TRAIN], "NCCL=1", "MPI=1", f"MPICXX={compiler.replace('mpicc', 'mpicxx')}")
        for ranks in [3] if BRIEF else [1, 2, 3]:
            same(done([mpirun, "-n", str(ranks), *words(folder, TRAIN, *flags, "-o", "several")]), "several", 2, want, f"{name}, {ranks} ranks")
    shutil.rmtree("one")
    flags = ["-e", "teacher/model_00000002.bin", "-j", "documents.bin", "-m", 0, "-b", 2]
    documents_file("documents.bin", sequence=6)
    want = done(words("alone", EVAL, *flags))
    got = slurm(3, *flags, "--rank-file", "meet", program=EVAL)
    lines = [line for line in got[0].stdout.splitlines() if not re.search("ranks, |^NCCL ", line)]
    check(want.returncode == got[0].returncode == 0 and lines == want.stdout.splitlines() and not got[1].stdout,
          f"evaluation: {got[0].stdout} {got[0].stderr} not {want.stdout}")


def test_meeting():
    """What can go wrong with a file that ranks meet by"""
    short = [*SHAPE, "-x", 1, "-o", "none"]
    flags = [*short, "--rank-file", "meet"]
    Path("diary").write_text("somebody's")
    one_line(done(words("nccl", TRAIN, *short, "--rank-file", "diary", "--ranks", 2, "--rank", 0)), (2,),
             "diary is there already, and no rank file", "a diary")
    check(Path("diary").read_text() == "somebody's", "the diary is gone")
    one_line(done(words("nccl", TRAIN, *flags, "--ranks", 3, "--rank", 0, "--patience", 1)), (1,),
             "meet: rank 1 and others have not come within --patience 1", "nobody comes")
    check(not Path("meet").exists(), "a rank file is left by whom nobody came to")
    one_line(done(words("nccl", TRAIN, *flags, "--ranks", 3, "--rank", 1, "--patience", 1)), (1,), "nobody there is rank 0", "rank 0 does not come")
    one_line(done(words("nccl", TRAIN, *flags, "--ranks", 3, "--rank", 3)), (2,), "--rank 3: of 3 ranks the last one is 2", "too large a rank")
    one_line(done(words("nccl", TRAIN, *flags)), (2,), "which rank is this", "no rank")
    one_line(done(words("nccl", TRAIN, *short, "--rank", 0)), (2,), "--rank needs --rank-file", "no file")
    one_line(slurm(2, *short), (2,), "one of 2 processes that would not share anything", "srun without a file")
    one_line(slurm(3, *flags, "--seed", "x"), (2,), "--seed", "a flag that is wrong for all")
    one_line(slurm(2, *flags, cards=["H100", "A100"]), (2,), "rank 1: .*products: A100, .* H100, ", "two kinds of cards")
    for other, pattern in [(["--rank", 1, "--ranks", 3], "rank 1 has come already|others have not come"),
                           (["--rank", 2, "--ranks", 4], "rank 2 has come with another --ranks")]:
        tasks = [subprocess.Popen(words("nccl", TRAIN, *flags, *more, "--patience", 3), env=ENV, stdout=subprocess.DEVNULL,
                                  stderr=subprocess.PIPE, text=True)
                 for more in (["--rank", 0, "--ranks", 3], ["--rank", 1, "--ranks", 3], other)]
        results = [subprocess.CompletedProcess(t.args, t.wait(60), "", t.stderr.read()) for t in tasks]
        check(re.search(pattern, results[0].stderr) and results[0].returncode in (1, 2), f"{other}: {[r.stderr for r in results]}")
    one_line(forked(3, *short, "-d", 11), (2,), "rank 0: -d 11: no multiple", "-d")
    one_line(forked(2, "-i", "missing.txt", "-x", 1), (1,), "rank 0: missing.txt: No such file", "no tokens")
    one_line(forked(3, *short, EMULATED_CARDS="2"), (2,), "3 ranks on .*, which shows 2 cards", "two cards")
    one_line(forked(2, *short, EMULATED_CARDS="0"), (3,), "rank 0: CUDA: no CUDA-capable device", "no card")
    one_line(alone(*short, "--ranks", 2), (2,), "--ranks needs --plan", "--ranks of a trainer without NCCL")
    check(not Path("none").exists(), "a run that cannot begin has made its directory")


def limited(limit, command, **env):
    return done(["bash", "-c", f"ulimit {limit}; exec \"$@\"", "-", *command], **env)


class Several:
    """Ranks that meet by a file, started one after the other"""
    def __init__(self, ranks, *flags):
        self.flags, self.tasks = [*flags, "--rank-file", "meet", "--ranks", ranks], []

    def start(self, rank, *more, limit="-c 0"):
        command = words("nccl", TRAIN, *self.flags, "--rank", rank, *more)
        self.tasks.append(subprocess.Popen(["bash", "-c", f"ulimit {limit}; exec \"$@\"", "-", *command], env=ENV, stdout=subprocess.DEVNULL,
                                           stderr=subprocess.PIPE, text=True))
        return self

    def wait_for_file(self):
        until = time.monotonic() + 20
        while not Path("meet").exists() and time.monotonic() < until:
            time.sleep(0.02)
        return self

    def with_others(self):
        """Rank 0 writes, and the others come; how long they take nobody says."""
        self.start(0).wait_for_file().start(1)
        time.sleep(0.7)
        return self

    def ended(self):
        return [subprocess.CompletedProcess(t.args, t.wait(100), "", t.stderr.read()) for t in self.tasks]


def test_gathering():
    """What happens while some ranks wait for others"""
    short = [*SHAPE, "-x", 1, "-o", "none"]
    for number in [signal.SIGTERM] if BRIEF else [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]:
        for victim in [0, 1]:
            run = Several(3, *short).with_others()
            run.tasks[victim].send_signal(number)
            one_line(run.ended(), (130,), f"rank {victim}: --rank-file meet: interrupted before all", f"signal {number} to rank {victim}")
    run = Several(3, *short).with_others()
    run.tasks[1].kill()
    one_line(run.ended(), (3, -9), f"rank 0: rank 1, on {HOST}, has ended", "rank 1 is killed")
    run = Several(3, *short).with_others()
    run.tasks[0].kill()
    run.tasks[0].wait()
    Path("meet").unlink()  # which a killed rank leaves
    one_line(run.ended(), (3, -9), f"rank 1: rank 0, on {HOST}, has ended", "rank 0 is killed")
    run = Several(2, *SHAPE, "-x", 2, "-d", 30, "-o", "several").start(0).wait_for_file()
    other = done(words("nccl", TRAIN, *run.flags, "--rank", 0))
    check(other.returncode == 2 and re.search(f"rank 0 of another run, on {HOST}, waits by meet", other.stderr), f"two runs by a file: {other}")
    alone(*SHAPE, "-x", 2, "-d", 30, "-o", "one")
    same(run.start(1).ended(), "several", 2, files("one", 2), "a run whose file another one wants")
    run = Several(12, *short, "--patience", 3).start(0, limit="-n 12").wait_for_file()
    for rank in range(1, 12):
        run.start(rank)
    one_line(run.ended()[0], (1,), "rank 0: cannot take in other ranks: Too many open files", "eleven others, 12 files")


def stranger(server):
    try:
        while True:
            server.accept()[0].send(b"SSH-2.0-somebody else, who says as much as an answer has\r\n")
    except OSError:
        pass


def test_rank_files():
    """A file that is none, that cannot be written or that leads to somebody else; and limits of a process"""
    short = [*SHAPE, "-x", 1, "-o", "none"]
    one_line(Several(2, *short).start(0, limit="-f 0").ended(), (1,), "rank 0: cannot write meet: File too large", "a full disk")
    flags = words("nccl", TRAIN, *short, "--ranks", 2, "--patience", 1, "--rank-file")
    one_line(done([*flags, "train.txt/meet", "--rank", "1"]), (1,), "rank 1: cannot read train.txt/meet: Not a directory", "no directory")
    os.mkfifo("pipe")
    one_line(done([*flags, "pipe", "--rank", "0"]), (2,), "pipe is there already, and no rank file", "a pipe, rank 0")
    one_line(done([*flags, "pipe", "--rank", "1"]), (1,), "nobody there is rank 0", "a pipe, rank 1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=stranger, args=[server], daemon=True).start()
        Path("elsewhere").write_text(f"rev_gpt2 0123456789abcdef {server.getsockname()[1]} {socket.gethostname()} 127.0.0.1\n")
        one_line(done([*flags, "elsewhere", "--rank", "1"]), (1,), "nobody there is rank 0", "a stranger's port")
    result = limited("-S -n 8", words("nccl", TRAIN, *SHAPE, "-x", 1, "--ranks", 7, "-o", "several"))
    shutil.rmtree("several", ignore_errors=True)
    check(result.returncode == 0, f"seven ranks where 8 files are allowed, and more may be asked for: {result.stderr}")
    one_line(limited("-n 8", words("nccl", TRAIN, *short, "--ranks", 7)), (3,), "cannot make a socket for rank", "seven ranks, 8 files")


def test_slurm():
    """An environment that contradicts the flags, or itself"""
    by_file, forking = ["--rank-file", "meet"], ["--ranks", 2]
    for flags, env, pattern in [(forking, {"PROCID": 0, "STEP_NUM_TASKS": 4}, "one of 4 processes that would not share anything"),
                                ([*by_file, "--ranks", 4], {"PROCID": 0, "NTASKS": 2}, "--ranks 4, though Slurm has 2 tasks"),
                                (by_file, {"PROCID": 5, "NTASKS": 8, "STEP_NUM_TASKS": 1}, "--rank 5: of 1 ranks"),
                                (by_file, {"PROCID": "zero", "NTASKS": 2}, "SLURM_PROCID=zero in the environment: a whole number"),
                                (by_file, {"PROCID": 0, "NTASKS": 99999999}, "SLURM_NTASKS=99999999 in the environment"),
                                (by_file, {"PROCID": 0, "NTASKS": 1, "LOCALID": 9}, "10 ranks on .*, which shows 2 cards")]:
        env = {f"SLURM_{name}": str(value) for name, value in env.items()}
        one_line(done(words("nccl", TRAIN, *SHAPE, "-x", 1, *flags, "--patience", 1), EMULATED_CARDS="2", **env), (2,), pattern, f"{env}")


class Run(test_ranks.Running):
    def rank(self, number):
        """The first process is rank 0, and has made the others in their order."""
        if number == 0:
            return self.process.pid
        made = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return sorted(map(int, made))[number - 1]

    def left(self):
        """Which of its processes live on"""
        made = subprocess.run(["ps", "-eo", "pid=,sess=,stat="], capture_output=True, text=True).stdout
        return [line for line in made.splitlines() if line.split()[1] == str(self.process.pid) and "Z" not in line.split()[2]]


def begun(ranks, *more, step=7, **env):
    run = Run(words("nccl", TRAIN, *LONG, "-o", "run", "--ranks", ranks, *more), **env)
    run.wait_for_step("run", step)
    return run


def ended(run, seconds, statuses, pattern, what):
    until = time.monotonic() + seconds
    while (run.process.poll() is None or run.left()) and time.monotonic() < until:
        time.sleep(0.05)  # others may have something to say after the first
    result = run.ended(1)
    one_line(result, statuses, pattern, what)
    check(not run.left(), f"{what}: processes live on: {run.left()}")
    finishes(what)


def finishes(what):
    """The checkpoint goes on, with another number of ranks, to the same bytes."""
    if not check(glob.glob("run/state_*"), f"{what}: there is no checkpoint"):
        return
    same(forked(2, *LONG, "-o", "run", "-y", 1), "run", 30, files("whole", 30), f"{what}: its checkpoint does not go on")


def test_faults():
    alone(*LONG, "-o", "whole")
    for victim in [0, 2]:
        run = begun(3)
        os.kill(run.rank(victim), signal.SIGKILL)
        pattern = f"rank 1: rank 0, on {HOST}, has ended" if victim == 0 else f"rank 0: rank 2, on {HOST}, was killed by signal 9"
        ended(run, 30, (3, -9), pattern, f"rank {victim} is killed")
        run = begun(3, "--patience", 3)
        os.kill(run.rank(victim), signal.SIGSTOP)
        ended(run, 40, (3, -9), f"no progress for --patience 3 seconds: rank {victim}, on {HOST}, does not answer", f"rank {victim} is stopped")
    one_line(limited("-f 20", words("nccl", TRAIN, *LONG, "-o", "run", "--ranks", 3)), (1,), "rank 0: cannot write run/state_.*: File too large", "a full disk")
    shutil.rmtree("run")
    for number in [signal.SIGINT, signal.SIGUSR1, signal.SIGTERM]:
        run = begun(2)
        if number == signal.SIGINT:
            os.killpg(run.process.pid, number)  # as a terminal does
        else:
            os.kill(run.rank(number == signal.SIGUSR1), number)
        ended(run, 30, (130,), "rank 0: interrupted after step [0-9]+; -y 1 goes on", f"signal {number}")
    shutil.rmtree("whole")


def test_nccl_faults():
    """A communicator that fails, a card that does, and an NCCL that hangs"""
    alone(*LONG, "-o", "whole")
    for what, victim, pattern in [("abort", 1, "rank 1: NCCL: remote process exited"), ("abort", 0, "rank 0: NCCL: remote"),
                                  ("refused", 2, "rank 2: NCCL: unhandled system error"), ("card", 0, "rank 0: CUDA: unknown error"),
                                  ("card", 2, "rank 2: CUDA: unknown error"), ("hang", 1, "rank 0: no progress for 4 seconds, though all")]:
        result = forked(3, *LONG, "-o", "run", "--patience", 2, EMULATED_NCCL=f"{what} {victim} 60")
        one_line(result, (3,), pattern, f"{what} on rank {victim}")
        finishes(f"{what} on rank {victim}")
    one_line(forked(3, *LONG, "-o", "run", "--patience", 2, EMULATED_NCCL="silence 1 0"), (3,), "though all ranks answer: NCCL hangs", "no communicator")
    shutil.rmtree("whole")


def test_advice():
    flags = [{"30": "7"}.get(flag, flag) for flag in LONG]
    for ranks, more, pattern in [(2, [], r"3 of them a step.*; --lanes 2 would make it one round: [0-9.]+% more"),
                                 (2, ["--lanes", 2], r"exchange: .* a round, 1 of them a step, .*computing a lane takes [0-9.]+ ms\n")]:
        result = forked(ranks, *flags, *more, "-o", f"run{len(more)}")
        check(result.stdout.count("exchange: ") == 1 and re.search(pattern, result.stdout), f"advice, {more}: {result.stdout[-900:]}")
    check("exchange: " not in forked(1, *flags, "-o", "run").stdout, "one rank has an exchange")


TESTS = {"bits": test_bits, "lanes": test_lanes, "ways": test_ways, "meeting": test_meeting, "gathering": test_gathering,
         "rank_files": test_rank_files, "slurm": test_slurm, "advice": test_advice, "faults": test_faults, "nccl_faults": test_nccl_faults}


def main():
    names = [name for name in sys.argv[1:] if name != "brief"]
    unknown = [name for name in names if name not in TESTS]
    if unknown:
        print(f"test_nccl.py: there is no test {unknown[0]}, but {' '.join(TESTS)}", file=sys.stderr)
        sys.exit(2)
    here = os.getcwd()
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryDirectory(dir=shared) as folder:
        ENV["EMULATED_FOLDER"] = folder  # of what the emulated NCCL sends
        os.chdir(directory)
        shutil.copytree(ROOT, "source", ignore=shutil.ignore_patterns(".nvidia", *["*_emulated", "*_rev_gpt2", "*.bin", ".git"]))
        build("alone", [TRAIN, EVAL])
        build("nccl", [TRAIN, EVAL], "NCCL=1")
        text_file("train.txt")
        alone(*SHAPE, "-x", 2, "--mode", "baseline", "-o", "teacher")
        for test in names or TESTS:
            start = time.monotonic()
            try:
                TESTS[test]()
            except Exception as error:  # its files are in the way of no other test
                check(False, f"{test}: {type(error).__name__}: {error}")
            for directory in ("one", "several", "run", "whole", "meet"):
                shutil.rmtree(directory, ignore_errors=True)
            print(f"{test}, {time.monotonic() - start:.0f} s", flush=True)
        os.chdir(here)
    print(f"{test_ranks.passed} passed, {test_ranks.failed} failed")
    sys.exit(1 if test_ranks.failed else 0)


if __name__ == "__main__":
    main()
