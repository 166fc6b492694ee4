"""Tests ranks, dev/ranks/mpi.h, with every MPI that is installed: the same bits whatever their number, and their faults.

    python3 dev/test/test_ranks.py [brief] [TEST ...]      for example bits; without names, all; brief: two minutes

Needs a C compiler and Open MPI or MPICH (Debian: openmpi-bin libopenmpi-dev, mpich); without either it says so and passes.
Everything is built and run in a temporary folder. The last line is `N passed, N failed`, the exit status 1 if any failed.
"""
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BRIEF = "brief" in sys.argv[1:]
BUILT = shutil.ignore_patterns(".git", "*_emulated", "*_rev_gpt2", "test_program", "*.bin", "demo")
ENV = dict(os.environ, OMP_WAIT_POLICY="passive", OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
           OMPI_MCA_rmaps_base_oversubscribe="1")
SHAPE = ("-i train.txt -j train.txt -e d6 --layers 5 --channels 24 --heads 3 --context 70 -b 1 --chunk 2 --head-chunk 100 "
         "-v 2 -m 5 -n 2 -s 4 -g 5").split()
NETWORKS = ["baseline", "midpoint", "midpoint-a", "leapfrog", "hamiltonian", "bdia"]
# Stands in for dev/bench/profile.h: one rank's memory or numbers go wrong in its step 3, as the variable FAULT says.
FAULTY = r"""
static Model *watched;
static int watched_steps;
static void inject(const char *name) {
    const char *fault = getenv("FAULT"), *who = getenv("FAULTY_RANK");
    if (!fault || !watched || watched_steps != 3 || atoi(who) != rank) return;
    if (strcmp(fault, "drift") == 0 && strcmp(name, "stream_distance") == 0) ((int *)watched->cur)[7] ^= 1;
    if (strcmp(fault, "nan") == 0 && strcmp(name, "classifier") == 0) ((float *)watched->logits)[7] = NAN;
}
#define PROFILE_OPTION
#define profile(name, flops, bytes) ((void)(flops), (void)(bytes), inject(name))
#define profile_step(begins) (watched_steps += begins, watched = begins ? &j->m : NULL)
#define profile_print(m, flops_limit)
"""
passed = failed = 0


def check(good, what):
    global passed, failed
    passed, failed = passed + bool(good), failed + (not good)
    if not good:
        print(f"FAILED: {what}", flush=True)
    return good


def engines():
    """(name, compiler, mpirun) of each MPI that is installed."""
    found = []
    for name, kind in [("Open MPI", "openmpi"), ("MPICH", "mpich")]:
        if shutil.which(f"mpicc.{kind}"):  # as Debian has them side by side
            found.append((name, f"mpicc.{kind}", f"mpirun.{kind}"))
    if not found and shutil.which("mpicc") and shutil.which("mpirun"):
        found.append(("MPI", "mpicc", "mpirun"))
    return found


def make(source, *targets):
    optimized = ["CFLAGS=-O1"] if BRIEF else []  # which is sooner built
    made = subprocess.run(["make", "-B", "-s", *optimized, *targets], cwd=source, env=ENV, capture_output=True, text=True)
    check(made.returncode == 0 and not made.stderr, f"make {' '.join(targets)}: {made.stderr[-800:]}")


class Engine:
    def __init__(self, name, compiler, mpirun):
        self.name, self.mpirun, self.programs = name, mpirun, Path(f"programs_{compiler}").resolve()
        source = self.programs / "source"
        shutil.copytree(ROOT, source, ignore=BUILT)
        (source / "faulty.h").write_text(FAULTY)
        for program, more in [("train_rev_gpt2", "-Werror"), ("eval_rev_gpt2", "-Werror"),
                              ("train_rev_gpt2", "-DREV_GPT2_PROFILE='\"faulty.h\"'")]:
            make(source, program, "MPI=1", f"MPICC={compiler}", f"SAN={more}")
            (source / program).rename(self.programs / (program + ("" if more == "-Werror" else "_faulty")))

    def command(self, ranks, program, *arguments):
        return [self.mpirun, "-n", str(ranks), str(self.programs / program), *map(str, arguments)]

    def run(self, ranks, program, *arguments, **env):
        return done(self.command(ranks, program, *arguments), **env)


def done(command, **env):
    return subprocess.run(command, env=dict(ENV, **env), capture_output=True, text=True, timeout=300, errors="replace")


def own_lines(text):
    """The lines of the programs themselves, without mpirun's."""
    return [line for line in text.splitlines() if line.startswith(("train_rev_gpt2:", "eval_rev_gpt2:"))]


def one_line(engine, result, status, pattern):
    lines = own_lines(result.stderr)
    return check(result.returncode == status and len(lines) == 1 and re.search(pattern, lines[0]),
                 f"{engine.name}: status {result.returncode}, not {status}, and {pattern!r} is meant: {lines or result.stderr[-500:]}")


def files(directory, step):
    """What a run left: its model, its state and its log without times and bytes."""
    log = [line.split(",") for line in Path(directory, "log.csv").read_text().splitlines()]
    return [Path(directory, f"{what}_{step:08d}.bin").read_bytes() for what in ("model", "state")] + [
        [row[:5] + row[7:8] for row in log]]


def text_file(path, seed=1, count=6000):
    data, x = bytearray(), seed
    for _ in range(count):
        x = x * 16807 % 2147483647
        data.append(97 + x % 13)
    Path(path).write_bytes(data)


def alone(*arguments, **env):
    """One process, of a program that knows no MPI."""
    return done([str(Path("alone/train_rev_gpt2").resolve()), *map(str, arguments)], **env)


def teacher_flags(network):
    return ["--distill", "teacher/model_00000002.bin", "--coefficient", "-0.0625"] if network == "bdia" else []


def test_bits(engine):
    some = ["midpoint", "bdia"] if engine.name == "MPICH" and BRIEF else NETWORKS
    for network in some:
        for precision in ["float32"] if BRIEF and network != "midpoint" else ["float32", "bf16"]:
            for micro in [6] if BRIEF else [6, 12]:
                flags = [*SHAPE, "-x", 5, "-d", 70 * micro, "--mode", network, "--precision", precision, *teacher_flags(network)]
                check(alone(*flags, "-o", "one").returncode == 0, f"{flags} alone")
                want = files("one", 5)
                for ranks in [2, 3] if BRIEF else [1, 2, 3, 4]:
                    result = engine.run(ranks, "train_rev_gpt2", *flags, "-o", "several")
                    check(result.returncode == 0 and files("several", 5) == want,
                          f"{engine.name}: {network}, {precision}, {micro} micro-batches: {ranks} ranks differ from one: {result.stderr[-300:]}")
                    shutil.rmtree("several", ignore_errors=True)
                shutil.rmtree("one")


def test_lanes(engine):
    flags = [*SHAPE, "-x", 4, "-d", 420, "--shuffle", "--save", "bf16"]
    for lanes in [1, 4, 5]:
        alone(*flags, "--lanes", lanes, "-o", f"lanes{lanes}")
        for ranks in [3] if BRIEF else [2, 3, 4, 7]:
            engine.run(ranks, "train_rev_gpt2", *flags, "--lanes", lanes, "-o", "several")
            check(files("several", 4) == files(f"lanes{lanes}", 4), f"{engine.name}: --lanes {lanes}: {ranks} ranks differ from one")
            shutil.rmtree("several", ignore_errors=True)
    check(files("lanes1", 4)[0] != files("lanes5", 4)[0], "lanes change nothing: what is compared here?")
    result = engine.run(2, "train_rev_gpt2", *flags, "--lanes", 4, "-y", 1, "-o", "lanes5")
    one_line(engine, result, 2, "rank 0: .*--lanes 5.*resume with the same")
    for lanes in [1, 4, 5]:
        shutil.rmtree(f"lanes{lanes}")


def test_threads(engine):
    flags = [*SHAPE, "-x", 3, "-d", 210]
    alone(*flags, "-o", "one")
    for threads in [1, 2, 3]:
        engine.run(2, "train_rev_gpt2", *flags, "-o", "several", OMP_NUM_THREADS=str(threads))
        check(files("several", 3) == files("one", 3), f"{engine.name}: two ranks of {threads} threads differ from one")
        shutil.rmtree("several", ignore_errors=True)
    shutil.rmtree("one")


def write_choices(path):
    """Questions as dev/eval/choices.py writes them, of bytes."""
    body, x = b"", 5
    for question in range(40):
        completions, context = 2 + question % 3, 1 + question * 7 % 19
        words = [65535, 0, 0, question % completions, completions]
        for completion in range(completions):
            ending = 1 + (question + completion) % 5
            words += [context + ending, context, 3 * ending]
            words += [97 + (question + i) % 13 for i in range(context)]
            for _ in range(ending):
                x = x * 16807 % 2147483647
                words.append(97 + x % 13)
        words[1] = len(words)
        body += struct.pack(f"<{len(words)}H", *words)
    header = [20240522, 2, 40, 0, 256] + [0] * 251
    Path(path).write_bytes(struct.pack("<256i", *header) + body)


def test_evaluation(engine):
    write_choices("choices.bin")
    flags = ["-e", "teacher/model_00000002.bin", "-j", "train.txt", "-m", 7, "-b", 2, "--mode", "bdia", "--distill",
             "teacher/model_00000002.bin", "--choices", "choices.bin"]
    want = done([str(Path("alone/eval_rev_gpt2").resolve()), *map(str, flags), "--csv", "one.csv"])
    for ranks in [3] if BRIEF else [1, 2, 3]:
        got = engine.run(ranks, "eval_rev_gpt2", *flags, "--csv", "several.csv")
        same = [line for line in got.stdout.splitlines() if "ranks, " not in line] == want.stdout.splitlines()
        check(want.returncode == got.returncode == 0 and same and Path("several.csv").read_bytes() == Path("one.csv").read_bytes(),
              f"{engine.name}: evaluation by {ranks} ranks: {got.stdout[-500:]} {got.stderr[-300:]} not {want.stdout[-500:]} {want.stderr[-300:]}")
    flags = [*SHAPE, "-x", 3, "-d", 210, "--choices", "choices.bin"]
    alone(*flags, "-o", "one")
    engine.run(2, "train_rev_gpt2", *flags, "-o", "several")
    check(files("several", 3) == files("one", 3), f"{engine.name}: questions answered by two ranks in training")
    shutil.rmtree("several", ignore_errors=True)
    shutil.rmtree("one")


class Running:
    """A run of ranks, which something happens to after some steps."""
    def __init__(self, command, **env):
        self.out = tempfile.TemporaryFile("w+", errors="replace")
        self.error = tempfile.TemporaryFile("w+", errors="replace")
        self.command = command
        self.process = subprocess.Popen(command, env=dict(ENV, **env), stdout=self.out, stderr=self.error, start_new_session=True)

    def wait_for_step(self, directory, step):
        until = time.monotonic() + 100
        while time.monotonic() < until and self.process.poll() is None:
            try:
                if f"\n{step},train" in Path(directory, "log.csv").read_text():
                    return True
            except OSError:
                pass
            time.sleep(0.01)
        return check(False, f"{self.command}: step {step} never came: {self.ended(0).stderr[-500:]}")

    def rank(self, number):
        """The process of a rank, by what MPI put into its environment."""
        for entry in Path("/proc").iterdir():
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
                mine = os.readlink(entry / "exe").startswith(os.path.dirname(self.command[3]) + "/")
            except OSError:
                continue
            ranks = [e for e in environment if e in (b"PMI_RANK=%d" % number, b"OMPI_COMM_WORLD_RANK=%d" % number)]
            if mine and ranks and os.getsid(int(entry.name)) == self.process.pid or mine and ranks and self.descends(int(entry.name)):
                return int(entry.name)
        raise AssertionError(f"no process of rank {number}")

    def descends(self, pid):
        while pid > 1 and pid != self.process.pid:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        return pid == self.process.pid

    def ended(self, seconds):
        """Its end, which must come within so many seconds."""
        try:
            self.process.wait(seconds or 0.1)
        except subprocess.TimeoutExpired:
            if seconds:
                check(False, f"{self.command} did not end within {seconds} seconds")
            self.process.kill()
            self.process.wait()
        for f in (self.out, self.error):
            f.seek(0)
        return subprocess.CompletedProcess(self.command, self.process.returncode, self.out.read(), self.error.read())


LONG = ("-i train.txt -j train.txt -e d6 --layers 5 --channels 24 --heads 3 --context 70 -b 1 --chunk 2 --head-chunk 100 "
        "-v 20 -m 5 -n 5 -x 60 -d 420").split()


def documents_file(path, sequence=70, end=10):
    """Documents that fill sequences or do not, in sequences of their own, as bytes; one has nothing in it."""
    tokens = []
    for length in [5, 69, 200, 1, 0, 139, 70, 33, 280, 2, 3, 4]:
        tokens += [end] + [97 + (length + i * i) % 13 for i in range(length)]
        tokens += [end] * (-len(tokens) % sequence)
    header = [20240520, 1, len(tokens) + 1, 256, sequence, end]
    Path(path).write_bytes(struct.pack("<256i", *header, *[0] * 250) + struct.pack(f"<{len(tokens) + 1}H", *tokens, end))


def test_documents(engine):
    """Every rank divides by what counts in the whole step, and in the whole validation."""
    documents_file("documents.bin")
    shape = [word.replace("train.txt", "documents.bin") for word in SHAPE]
    for more in [["--shuffle"], ["--mode", "bdia", *teacher_flags("bdia")]]:
        flags = [*shape, "-x", 4, "-d", 420, *more]
        alone(*flags, "-o", "one")
        for ranks in [2, 3]:
            result = engine.run(ranks, "train_rev_gpt2", *flags, "-o", "several")
            check(result.returncode == 0 and files("several", 4) == files("one", 4),
                  f"{engine.name}: documents {more}: {ranks} ranks differ from one: {result.stderr[-300:]}")
            shutil.rmtree("several", ignore_errors=True)
        shutil.rmtree("one")
    flags = ["-e", "teacher/model_00000002.bin", "-j", "documents.bin", "-m", 0, "-b", 2]
    want = done([str(Path("alone/eval_rev_gpt2").resolve()), *map(str, flags)])
    got = engine.run(3, "eval_rev_gpt2", *flags)
    same = [line for line in got.stdout.splitlines() if "ranks, " not in line] == want.stdout.splitlines()
    check(want.returncode == got.returncode == 0 and same, f"{engine.name}: evaluation of documents: {got.stdout} not {want.stdout}")


def test_resume(engine):
    """One rank, killed; three ranks, interrupted; two ranks to the end."""
    alone(*LONG, "-o", "whole")
    run = Running(engine.command(1, "train_rev_gpt2", *LONG, "-o", "cut"))
    run.wait_for_step("cut", 17)
    os.kill(run.rank(0), signal.SIGKILL)
    run.ended(30)
    run = Running(engine.command(3, "train_rev_gpt2", *LONG, "-o", "cut", "-y", 1))
    run.wait_for_step("cut", 31)
    os.kill(run.process.pid, signal.SIGUSR1 if engine.name == "Open MPI" else signal.SIGINT)
    result = run.ended(30)
    one_line(engine, result, 130, "rank 0: interrupted after step [0-9]+; -y 1 goes on")
    result = engine.run(2, "train_rev_gpt2", *LONG, "-o", "cut", "-y", 1)
    check("resumed from cut/state_" in result.stdout and files("cut", 60) == files("whole", 60),
          f"{engine.name}: 1 rank, killed, 3 ranks, interrupted, 2 ranks: other bytes: {result.stderr[-300:]}")
    shutil.rmtree("cut")
    shutil.rmtree("whole")


def finishes(engine, directory, what):
    result = engine.run(2, "train_rev_gpt2", *LONG, "-o", directory, "-y", 1)
    check(result.returncode == 0 and files(directory, 60) == files("whole", 60), f"{engine.name}: {what}: its checkpoint does not go on: "
          f"{result.stderr[-300:]}")
    shutil.rmtree(directory)


def test_faults(engine):
    alone(*LONG, "-o", "whole")
    for victim in [1] if BRIEF else [0, 1, 2]:
        run = Running(engine.command(3, "train_rev_gpt2", *LONG, "-o", "killed"))
        run.wait_for_step("killed", 12)
        os.kill(run.rank(victim), signal.SIGKILL)
        check(run.ended(30).returncode != 0, f"{engine.name}: rank {victim} was killed, and all is well")
        finishes(engine, "killed", "a rank was killed")
    for number, name in [(signal.SIGINT, "Ctrl-C"), (signal.SIGUSR1, "SIGUSR1")]:
        # Open MPI's mpirun tells them only after so long, kills after as long again, and has a status of its own
        own = engine.name == "Open MPI" and name == "Ctrl-C"
        flags = [{"60": "3000"}.get(flag, flag) for flag in LONG] if own else LONG
        run = Running(engine.command(2, "train_rev_gpt2", *flags, "-o", "asked"), OMPI_MCA_odls_base_sigkill_timeout="2")
        run.wait_for_step("asked", 13)
        os.kill(run.process.pid, number)
        result = run.ended(30)
        one_line(engine, result, 1 if own else 130, "rank 0: interrupted after step [0-9]+")
        step = int(re.search(r"after step (\d+)", result.stderr)[1]) if "after step" in result.stderr else 0
        check(Path("asked", f"model_{step:08d}.bin").exists(), f"{engine.name}: {name}: step {step} is not saved")
        if own:  # it went further than 60 steps, maybe
            shutil.rmtree("asked")
        else:
            finishes(engine, "asked", name)
    patience = 4 if BRIEF else 20
    for victim in [0 if engine.name == "Open MPI" else 1] if BRIEF else [0, 1]:
        run = Running(engine.command(3, "train_rev_gpt2", *LONG, "-o", "stopped", "--patience", patience))
        run.wait_for_step("stopped", 12)
        os.kill(run.rank(victim), signal.SIGSTOP)
        result = run.ended(patience + 30)
        one_line(engine, result, 3, f"no progress for --patience {patience} seconds: rank {victim}, on .*, does not answer")
        finishes(engine, "stopped", "a rank was stopped")
    for fault, pattern in [("drift", "step 3: the streams did not come back"), ("nan", "step 3: the loss is not a finite number")]:
        for victim in [2] if BRIEF else [0, 2]:
            result = engine.run(3, "train_rev_gpt2_faulty", *LONG, "-o", "faulty", FAULT=fault, FAULTY_RANK=str(victim))
            shutil.rmtree("faulty", ignore_errors=True)
            one_line(engine, result, 3, f"rank {victim}: {pattern}")
    shutil.rmtree("whole")


def test_disk(engine):
    """Rank 0's disk is full: what was there stays."""
    os.mkdir("full")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", "full"], capture_output=True).returncode == 0
    if not mounted:
        print(f"{engine.name}: a full disk: left out, nothing can be mounted here")
        os.rmdir("full")
        return
    try:
        result = engine.run(2, "train_rev_gpt2", *LONG, "-o", "full/run")
        one_line(engine, result, 1, "rank 0: cannot write full/run/.*: No space left on device")
        left = sorted(path.name for path in Path("full/run").iterdir())
        states = [name[6:] for name in left if name.startswith("state_")]
        check([name[6:] for name in left if name.startswith("model_")] == states[:len(left)] or len(states) > 0 and
              not any("tmp" in name for name in left), f"{engine.name}: a full disk left {left}")
    finally:
        for _ in range(50):  # other ranks may end a moment after mpirun
            if subprocess.run(["umount", "full"], stderr=subprocess.DEVNULL).returncode == 0:
                break
            time.sleep(0.2)
        os.rmdir("full")


def test_differences(engine):
    """What ranks do not have alike ends all with one line, before anything is made."""
    short = [*map(str, SHAPE), "-x", "1", "-o", "none"]
    one, other = (str(engine.programs / name) for name in ("train_rev_gpt2", "train_rev_gpt2_faulty"))
    cases = [([one, *short], [one, *short, "--shuffle"], "rank 1: .*flags: .*--shuffle"),
             ([one, *short], [other, *short], "rank 1: .*program, checksum: ")]
    for first, second, pattern in cases:
        result = done([engine.mpirun, "-n", "1", *first, ":", "-n", "1", *second])
        one_line(engine, result, 2, pattern)
    os.mkdir("here")
    os.mkdir("there")
    text_file("here/train.txt")
    text_file("there/train.txt", seed=2)
    result = done([engine.mpirun, "-n", "1", "-wdir", os.path.abspath("here"), one, *short, ":",
                   "-n", "1", "-wdir", os.path.abspath("there"), one, *short])
    one_line(engine, result, 2, "rank 1: .*tokens: train.txt, 6000 bytes, header ")
    check(not Path("none").exists() and not Path("here/none").exists(), f"{engine.name}: a run that cannot begin has made its directory")
    one_line(engine, done([one, *short], SLURM_STEP_NUM_TASKS="2"), 2, "one of 2 processes that would not share anything: who started")
    one_line(engine, engine.run(3, "train_rev_gpt2", *short, "-d", 71), 2, "rank 0: -d 71: no multiple")
    one_line(engine, engine.run(3, "train_rev_gpt2", "-i", "missing.txt", "-x", 1), 1, "rank 0: missing.txt: No such file")
    shutil.rmtree("here")
    shutil.rmtree("there")


def test_plan(engine):
    """The moments' share is 1/ranks, and --plan --ranks, without MPI, says what mpirun would."""
    totals = {}
    for ranks in [1, 2, 4]:
        result = alone("-e", "d12", "-b", 1, "-t", 64, "-d", 64 * 8, "--plan", "--ranks", ranks)
        rows = {line.split()[0]: int(line.split()[1]) for line in result.stdout.splitlines() if re.match(r"[a-z]+ +\d+ ", line)}
        totals[ranks] = rows
        mine = engine.run(ranks, "train_rev_gpt2", "-e", "d12", "-b", 1, "-t", 64, "-d", 64 * 8, "--plan")
        check([row for row in mine.stdout.splitlines() if "GiB" in row] == [row for row in result.stdout.splitlines() if "GiB" in row],
              f"{engine.name}: the plan of {ranks} ranks")
        check(abs(rows["optimizer"] * ranks / totals[1]["optimizer"] - 1) < 1e-3, f"the moments of one of {ranks} ranks: {rows}")
    check(totals[1]["gradients"] > totals[2]["gradients"] > totals[4]["gradients"], f"the sums of gradients: {totals}")


def test_advice(engine):
    """After six steps rank 0 says what is exchanged for how long; one round a step leaves nothing to advise."""
    for lanes, pattern in [(6, r"3 of them a step.*; --lanes 2 would make it one round: [0-9.]+% more"),
                           (2, r"exchange: .* a round, 1 of them a step, .*computing a lane takes [0-9.]+ ms\n")]:
        result = engine.run(2, "train_rev_gpt2", *SHAPE, "-x", 7, "-d", 420, "--lanes", lanes, "-o", "several")
        check(result.stdout.count("exchange: ") == 1 and re.search(pattern, result.stdout), f"{engine.name}: advice: {result.stdout[-900:]}")
        shutil.rmtree("several", ignore_errors=True)


TESTS = {"bits": test_bits, "advice": test_advice, "lanes": test_lanes, "threads": test_threads, "evaluation": test_evaluation,
         "documents": test_documents, "plan": test_plan, "differences": test_differences, "resume": test_resume,
         "disk": test_disk, "faults": test_faults}


def main():
    names = [name for name in sys.argv[1:] if name != "brief"]
    unknown = [name for name in names if name not in TESTS]
    if unknown:
        print(f"test_ranks.py: there is no test {unknown[0]}, but {' '.join(TESTS)}", file=sys.stderr)
        sys.exit(2)
    if not engines():
        print("left out: there is no MPI here, neither Open MPI nor MPICH\n0 passed, 0 failed")
        return
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        shutil.copytree(ROOT, "alone", ignore=BUILT)
        make("alone", "train_rev_gpt2", "eval_rev_gpt2")
        text_file("train.txt")
        alone(*SHAPE, "-x", 2, "--mode", "baseline", "-o", "teacher")
        for name, compiler, mpirun in engines():
            engine = Engine(name, compiler, mpirun)
            for test in names or TESTS:
                start = time.monotonic()
                try:
                    TESTS[test](engine)
                except Exception as error:  # its files are in the way of no other test
                    check(False, f"{name}: {test}: {type(error).__name__}: {error}")
                print(f"{name}: {test}, {time.monotonic() - start:.0f} s", flush=True)
        os.chdir(here)
    print(f"{passed} passed, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
