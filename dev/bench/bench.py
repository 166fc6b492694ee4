#!/usr/bin/env python3
"""
How fast and how large is a step of training, beside PyTorch and llm.c, on the CPU of this machine? Linux only.

    python3 dev/bench/bench.py --llmc llm.c            both tables; llm.c is a checkout of github.com/karpathy/llm.c
    python3 dev/bench/bench.py --table peers           about half an hour on two cores: ours, PyTorch and llm.c at four shapes
    python3 dev/bench/bench.py --table budget          about an hour: the quickest way to train a deep network in so much memory
    python3 dev/bench/bench.py --quick                 three minutes: does all of it work? (one round of a tiny network)
    python3 dev/bench/bench.py --table peers --shapes T1024 --contenders 'ours,torch compile' --rounds 3 --seconds 30

It builds our trainer. Each contender trains on random tokens in a process of its own, one after the other, round after
round, so that a machine that gets slower does so for all. A step is zero grad, forward, loss, backward, clipping at 1 and
AdamW (llm.c does not clip); tokens/s is from the median step of all rounds, without each process's first. Peak memory is
the whole process's. PyTorch (with g++ for `compile`) and llm.c are optional: what does not run is a row that says why.

Threads are the default, all cores, unless OMP_NUM_THREADS says otherwise; let nothing else run. CC chooses the compiler.
Tables go to stdout, progress to stderr, all numbers to --csv. Exit status: 0 done, 1 build or files, 2 usage, 130 Ctrl-C.
"""
import argparse, array, contextlib, csv, datetime, importlib.metadata, json, os, random, re, resource, shlex, signal, statistics
import subprocess, sys, tempfile, threading, time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
GIB = 1 << 30
STEP = re.compile(r"^step .*\| ([\d.]+) ms")
PRECISIONS = ("float32", "bf16")


class Shape(NamedTuple):
    L: int   # layers
    C: int   # channels
    NH: int  # heads
    B: int   # sequences an optimizer step
    T: int   # tokens a sequence

    def __str__(self):
        return " ".join(name + str(value) for name, value in zip(self._fields, self))


TINY = Shape(2, 64, 2, 4, 64)
GPT2 = [Shape(12, 768, 12, 4, T) for T in (64, 256, 1024)]
DEEP = Shape(96, 512, 8, 4, 256)

# ----------------------------------------------------------------------------------------------------------------
# PyTorch's GPT-2, in a process of its own: `bench.py torch JSON` prints a line after each step, until it is killed.

def train_with_torch(L, C, NH, B, T, V=50304, micro_batch=0, precision="float32", compiled=False, checkpointed=False,
                     device="cpu", steps=0):
    import torch
    import torch.nn.functional as F
    from torch import nn
    from torch.utils.checkpoint import checkpoint

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln1, self.ln2 = nn.LayerNorm(C), nn.LayerNorm(C)
            self.qkv, self.attproj = nn.Linear(C, 3 * C), nn.Linear(C, C)
            self.fc, self.fcproj = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

        def forward(self, x):
            b, t, _ = x.shape
            q, k, v = self.qkv(self.ln1(x)).view(b, t, 3, NH, C // NH).permute(2, 0, 3, 1, 4)
            attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.attproj(attention.transpose(1, 2).reshape(b, t, C))
            return x + self.fcproj(F.gelu(self.fc(self.ln2(x)), approximate="tanh"))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.wpe = nn.Embedding(V, C), nn.Embedding(max(1024, T), C)
            self.blocks, self.lnf = nn.ModuleList(Block() for _ in range(L)), nn.LayerNorm(C)

        def forward(self, tokens, targets):
            x = self.wte(tokens) + self.wpe.weight[:tokens.shape[1]]
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
            logits = F.linear(self.lnf(x), self.wte.weight)
            return F.cross_entropy(logits.view(-1, V), targets.reshape(-1))

    torch.manual_seed(1337)
    torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")
    network = Network().to(device)
    for p in network.parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=0.02)
    if compiled and L <= 24:
        network.compile()
    elif compiled:  # compiling so many layers as one takes many minutes; block by block they are compiled once
        for block in network.blocks:
            block.compile()
    groups = [{"params": [p for p in network.parameters() if p.dim() == 2], "weight_decay": 0.1},
              {"params": [p for p in network.parameters() if p.dim() != 2], "weight_decay": 0.0}]
    try:
        optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    except (RuntimeError, TypeError):  # an older PyTorch
        optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), foreach=True)
    micro_batch = micro_batch or B
    step = 0
    while (step := step + 1) <= (steps or step):
        tokens = torch.randint(min(V, 50257), (B, T + 1), device=device)
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for part in tokens.split(micro_batch):
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                part_loss = network(part[:, :-1], part[:, 1:]) * (micro_batch / B)
            part_loss.backward()
            loss += part_loss.item()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        print(f"step {step} | loss {loss:.4f} | {(time.perf_counter() - start) * 1000:.3f} ms", flush=True)
    if device == "cuda":
        print("peak", torch.cuda.max_memory_reserved())

# ----------------------------------------------------------------------------------------------------------------
# Measuring.

def fail(message, status=1):
    print("bench.py:", message, file=sys.stderr)
    sys.exit(status)


@dataclass
class Measured:
    ms: list = field(default_factory=list)  # of every step but each process's first
    peak: int = 0                           # bytes
    failure: str = ""

    def rate(self, shape):
        return shape.B * shape.T * 1000 / statistics.median(self.ms)


def memory_free():
    return int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024


def why(complaints, answer, code):
    """One line about a process that failed, out of what it wrote."""
    lines = [line.strip() for line in complaints.splitlines() + answer.splitlines()[-1:] if line.strip()]
    line = next((line for line in lines if "rror:" in line), lines[-1] if lines and code > 0 else "")
    if "allocat" in line:
        return "not enough memory"
    return (line or (f"killed by signal {-code}" if code < 0 else f"ended with status {code}")).replace("|", "/")[:160]


def measure(command, o, into):
    """Runs the command until its steps are enough, adding what they took to `into`. A process started by fork counts its parent's
    peak memory as its own, so nothing large may be imported here."""
    if into.failure:
        return
    ms, other, started, enough, begun, free = [], "", 0.0, False, time.monotonic(), memory_free()
    with tempfile.TemporaryFile("w+", errors="replace") as complaints:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, text=True, errors="replace", start_new_session=True)
        with contextlib.suppress(OSError, ValueError):  # what does not fit is refused memory, instead of the machine running out
            resource.prlimit(process.pid, resource.RLIMIT_DATA, (free, free))
        too_long = threading.Timer(o.patience, os.killpg, (process.pid, signal.SIGKILL))
        too_long.start()
        try:
            for line in process.stdout:
                step = STEP.search(line)
                if not step:
                    other = line if line.strip() else other
                elif not started:
                    started = time.monotonic()
                else:
                    ms.append(float(step[1]))
                    enough = len(ms) >= o.steps and time.monotonic() - started >= o.seconds
                    if enough:
                        break
        finally:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            too_long.cancel()
            too_long.join()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            process.stdout.close()
        complaints.seek(0)
        late = time.monotonic() - begun >= o.patience
        if enough or ms and late:
            into.ms += ms
            into.peak = max(into.peak, usage.ru_maxrss * 1024)
        else:
            into.failure = f"not two steps in {o.patience:g} s" if late else why(complaints.read(), other, process.returncode)


def alternate(commands, results, rounds, o, shape):
    for n in range(rounds):
        for name, command in commands.items():
            measured = results.setdefault(name, Measured())
            measure(command, o, measured)
            outcome = "failed: " + measured.failure if measured.failure else f"{measured.rate(shape):.0f} tokens/s"
            print(f"[{time.strftime('%H:%M:%S')}] {shape}, round {n + 1} of {rounds}: {name}: {outcome}", file=sys.stderr, flush=True)


def wanted(names, parts):
    return [name for name in names if any(part.strip() in str(name) for part in parts.split(","))]


def selected(o, rows):
    names = wanted(rows, o.contenders or "") or fail(f"no contender has {o.contenders} in its name: " + ", ".join(rows), 2)
    return {name: rows[name] for name in names}

# ----------------------------------------------------------------------------------------------------------------
# The contenders: what to run for them.

def ours(o, shape, mode, memory, precision, micro_batch=0, budget=0):
    flags = (f"-e d12 --layers {shape.L} --channels {shape.C} --heads {shape.NH} -b {micro_batch or shape.B} -t {shape.T} "
             f"-d {shape.B * shape.T} --mode {mode} --memory {memory} -x 1000000 -l 1e-4")
    flags += f" --precision {precision}" * ("bf16" in o.has) + f" --budget {budget}" * bool(budget)
    return [str(ROOT / "train_rev_gpt2"), "-i", str(o.work / "tokens.bin"), *flags.split()]


def pytorch(shape, **options):
    return [sys.executable, str(Path(__file__).resolve()), "torch", json.dumps({**shape._asdict(), **options})]


def peers(o, shape):
    """Everybody at one shape; those that trade time for memory, which are many, only at one, unless they are asked for."""
    rows, everybody = {}, o.contenders is not None or shape == GPT2[1]
    for precision in PRECISIONS:
        for mode, memory in (("baseline", "store"), ("midpoint", "store"), ("midpoint", "checkpoint"), ("midpoint", "reverse"), ("bdia", "reverse"),
                             ("retrofit", "reverse")):
            if precision in o.has and (everybody or (mode, memory) in (("baseline", "store"), ("midpoint", "reverse"))):
                rows[f"ours {mode} {memory} {precision}"] = ours(o, shape, mode, memory, precision)
    for precision in PRECISIONS:
        for how in ("eager", "compile"):
            for checkpointed in (False, True)[:1 + everybody]:
                rows[f"torch {how} {precision}" + " checkpoint" * checkpointed] = \
                    pytorch(shape, precision=precision, compiled=how == "compile", checkpointed=checkpointed)
    if o.llmc:
        rows["llm.c float32"] = [str(o.work / "llmc"), *map(str, shape)]
    return selected(o, rows)


def build(o):
    """Our trainer, llm.c's with its Makefile's flags, and the tokens."""
    try:
        made = subprocess.run(["make", "-B", "-s", "-C", ROOT, "train_rev_gpt2"], capture_output=True, text=True)
        if made.returncode:
            fail("make failed: " + why(made.stderr, made.stdout, made.returncode))
        answer = subprocess.run([ROOT / "train_rev_gpt2", "--help"], capture_output=True, text=True).stdout
        news = {"bf16": r"--precision .*bf16", "auto": r"--memory .*auto"}
        o.has = {"float32"} | {new for new, flag in news.items() if re.search(flag, answer)}
        if o.llmc:
            compiler = shlex.split(os.environ.get("CC", "cc"))
            flags = ["-Ofast", "-march=native", "-fopenmp", "-DOMP", "-w", "-I", o.llmc, "-o", o.work / "llmc", HERE / "llmc.c", "-lm"]
            made = subprocess.run([*compiler, *flags], capture_output=True, text=True)
            if made.returncode:
                fail("compiling llm.c failed: " + why(made.stderr, made.stdout, made.returncode))
        numbers = array.array("H", random.Random(1337).choices(range(50257), k=1 << 18))
        (o.work / "tokens.bin").write_bytes(array.array("i", [20240520, 1, len(numbers), *[0] * 253]).tobytes() + numbers.tobytes())
    except OSError as e:
        fail(f"{e.filename}: {e.strerror}")


def machine():
    def first_line(*command):
        with contextlib.suppress(OSError):
            answer = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}).stdout
            return next(iter(answer.splitlines()), "unknown")
        return "unknown"
    model = first_line("sh", "-c", "lscpu | sed -n 's/^Model name: *//p'")
    try:
        version = "torch " + importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        version = "no torch"
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    return (f"{model}, {len(os.sched_getaffinity(0))} cores, threads: {threads}; "
            f"{first_line(*shlex.split(os.environ.get('CC', 'cc')), '--version')}; {version}; Python {sys.version.split()[0]}; "
            f"{first_line('git', '-C', str(ROOT), 'describe', '--always', '--dirty')}; {datetime.date.today()}")

# ----------------------------------------------------------------------------------------------------------------
# The tables.

def record(o, table, shape, name, measured, budget="", runtime=""):
    rates = [shape.B * shape.T * 1000 / ms for ms in measured.ms]
    figures = [round(f(rates), 2) for f in (lambda _: measured.rate(shape), min, max)] if rates else ["", "", ""]
    o.rows.append([table, shape, budget, name, *figures, len(rates), measured.peak, runtime, measured.failure])
    with open(o.csv, "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow("table,shape,budget_bytes,contender,tokens_per_s,slowest,fastest,steps,peak_bytes,runtime_bytes,failure".split(","))
        writer.writerows(o.rows)


def peers_table(o):
    for shape in o.shapes:
        results, commands = {}, peers(o, shape)
        alternate(commands, results, o.rounds, o, shape)
        print(f"\n{shape}: {shape.B} sequences of {shape.T} tokens a step\n\n"
              "| | tokens/s | slowest to fastest step | steps | peak memory, GiB |\n|---|---|---|---|---|")
        for name, measured in results.items():
            rates = sorted(shape.B * shape.T * 1000 / ms for ms in measured.ms)
            print(f"| {name} | failed: {measured.failure} | | | |" if measured.failure else
                  f"| {name} | {measured.rate(shape):.1f} | {rates[0]:.1f} to {rates[-1]:.1f} | {len(rates)} | {measured.peak / GIB:.2f} |", flush=True)
            record(o, "peers", shape, name, measured)


def plan(o, *contender, **options):
    """Bytes by name, as our trainer plans them."""
    done = subprocess.run([*ours(o, *contender, **options), "--plan"], capture_output=True, text=True)
    rows = {name: int(size) for name, size in re.findall(r"^(\w+) +(\d+)  \(", done.stdout, re.M)}
    if not {"activations", "total"} <= rows.keys():
        fail("--plan gave no plan: " + why(done.stderr, done.stdout, done.returncode))
    return rows


def budget_table(o):
    shape, precision = (TINY if o.quick else DEEP), o.precision
    if precision not in o.has:
        fail(f"this trainer has no --precision {precision}", 2)
    sizes = [b for b in (1, 2, 4, 8) if b <= shape.B and (not o.quick or b in (1, shape.B))]
    least, most = (plan(o, shape, "midpoint", memory, precision) for memory in ("reverse", "store"))
    counted = least["total"] - least["activations"]  # parameters, gradients, optimizer and data: the same for all
    factor, n = most["activations"] / least["activations"], 2 if o.quick else 5
    budgets = [counted + round(least["activations"] * factor ** (i / (n - 1))) for i in range(n)]

    commands, chosen = {}, {}  # chosen[budget, column]: the contender whose figures stand there
    for budget in budgets:
        name = f"ours midpoint auto, {budget} bytes"
        chosen[budget, "ours midpoint auto"] = name, shape.B
        if "auto" in o.has:
            commands[name] = ours(o, shape, "midpoint", "auto", precision, budget=budget)
        for mode, memory in (("midpoint", "checkpoint"), ("baseline", "store")):
            fitting = [b for b in sizes if plan(o, shape, mode, memory, precision, micro_batch=b)["total"] <= budget]
            if fitting:
                name = f"ours {mode} {memory}, {max(fitting)} at a time"
                commands[name] = ours(o, shape, mode, memory, precision, micro_batch=max(fitting))
                chosen[budget, f"ours {mode} {memory}"] = name, max(fitting)
    hows, torch_columns = ("eager", "compile"), {}
    for how in hows:
        for column in ("torch", "torch checkpoint"):
            for b in sizes:
                name = f"{column.replace('torch', 'torch ' + how)}, {b} at a time"
                commands[name] = pytorch(shape, micro_batch=b, precision=precision, compiled=how == "compile",
                                         checkpointed="checkpoint" in column)
                torch_columns.setdefault(column, []).append((name, how, b))
    commands = selected(o, commands)

    trivial, runtime, results = Shape(1, 16, 1, 1, 8), {}, {}
    for how in hows:
        idle = Measured()
        once = argparse.Namespace(steps=1, seconds=0, patience=o.patience)
        measure(pytorch(trivial, V=64, precision=precision, compiled=how == "compile"), once, idle)
        runtime[how] = idle.peak
    alternate(commands, results, 1, o, shape)

    def choose():
        for budget in budgets:
            for column, candidates in torch_columns.items():
                fitting = [(results[name].rate(shape), name, b) for name, how, b in candidates
                           if name in results and results[name].ms and results[name].peak - runtime[how] <= budget]
                chosen.pop((budget, column), None)
                if fitting:
                    chosen[budget, column] = max(fitting)[1:]
    choose()
    survivors = {name for name, _ in chosen.values()}  # the other rounds are for those that are in the table
    alternate({name: commands[name] for name in commands if name in survivors}, results, o.rounds - 1, o, shape)
    choose()

    columns = ["ours midpoint auto", "ours midpoint checkpoint", "ours baseline store", *torch_columns]
    print(f"\n{shape}, {precision}: {shape.B * shape.T} tokens a step, in tokens/s; in brackets the sequences at a time, gradients being "
          f"accumulated\n(auto takes them whole). A budget is all memory a step may use, by --plan for ours; for torch the peak resident "
          f"memory, less the\n{runtime['eager'] / GIB:.2f} GiB (compiled: {runtime['compile'] / GIB:.2f}) of a process that trains one tiny "
          f"layer. * compiled\n\n| budget, GiB (activations) | {' | '.join(columns)} |\n|---{'|---' * len(columns)}|")
    for name, measured in results.items():
        record(o, "budget", shape, name, measured, runtime=next((runtime[how] for how in hows if f"torch {how}" in name), ""))
    for budget in budgets:
        cells = []
        for column in columns:
            name, b = chosen.get((budget, column), ("", 0))
            measured = results.get(name)
            tried = [results[torch_name] for torch_name, _, _ in torch_columns.get(column, []) if torch_name in results]
            if measured and measured.ms:
                cells.append(f"{measured.rate(shape):.1f}{'*' * ('compile' in name)} ({b})")
            elif measured or tried and not any(each.ms for each in tried):
                cells.append("failed: " + (measured or tried[0]).failure)
            else:
                cells.append("not run" if name or column in torch_columns and not tried else "does not fit")
            if measured:
                record(o, "budget", shape, name, measured, budget)
        print(f"| {budget / GIB:.2f} ({(budget - counted) / GIB:.2f}) | {' | '.join(cells)} |", flush=True)


def end(number, _):
    signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not keep `measure` from ending its process
    sys.exit(128 + number)


def main():
    def above_zero(kind):
        def number(text):
            if not 0 < (value := kind(text)) < 1e9:
                raise argparse.ArgumentTypeError(f"{text} is not above 0")
            return value
        return number
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.error = lambda message: fail(message + "; --help says more", 2)
    p.add_argument("--table", choices=("peers", "budget", "all"), default="all")
    p.add_argument("--llmc", metavar="FOLDER", help="llm.c's, to measure its CPU trainer as well")
    p.add_argument("--shapes", metavar="PARTS", default="", help="of the peers table, those whose name has one of these parts, such as T64,L96")
    p.add_argument("--contenders", metavar="PARTS", help="likewise, such as 'ours,torch eager'; they run at every shape ('' is all of them)")
    p.add_argument("--precision", choices=PRECISIONS, default="float32", help="of the budget table (default %(default)s)")
    p.add_argument("--rounds", type=above_zero(int), help="processes a contender (default 2, quick 1)")
    p.add_argument("--seconds", type=above_zero(float), help="a process is measured for at least (default 6, quick 1)")
    p.add_argument("--steps", type=above_zero(int), default=2, help="and for at least so many steps, the first not counted (default %(default)s)")
    p.add_argument("--patience", type=above_zero(float), default=900, help="seconds after which a process is ended (default %(default)s)")
    p.add_argument("--csv", metavar="FILE", help="where all numbers go (default: a new temporary folder)")
    p.add_argument("--quick", action="store_true", help="one round of a tiny network, to see that everything works")
    o = p.parse_args()
    o.rounds, o.seconds = o.rounds or (1 if o.quick else 2), o.seconds or (1 if o.quick else 6)
    if o.precision == "bf16" and o.table == "peers":
        fail("--precision is of the budget table; for the peers say --contenders bf16", 2)
    if o.llmc and not Path(o.llmc, "train_gpt2.c").is_file():
        fail(f"--llmc {o.llmc}: there is no train_gpt2.c; a checkout of llm.c is meant", 2)
    shapes = [TINY] if o.quick else [*GPT2, DEEP]
    o.shapes = wanted(shapes, o.shapes) or fail(f"no shape has {o.shapes} in its name: " + ", ".join(map(str, shapes)), 2)
    try:
        if o.csv:
            open(o.csv, "w").close()
        shlex.split(os.environ.get("CC", "cc"))
    except OSError as e:
        fail(f"--csv {o.csv}: {e.strerror}")
    except ValueError as e:
        fail(f"CC={os.environ['CC']}: {e}", 2)
    o.rows = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    with tempfile.TemporaryDirectory(prefix="bench_") as work:
        o.work = Path(work)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = work + "/inductor"  # so that a later round need not compile again
        build(o)
        o.csv = o.csv or str(Path(tempfile.mkdtemp(prefix="bench_"), "bench.csv"))
        print(machine(), flush=True)
        if o.table != "budget":
            peers_table(o)
        if o.table != "peers":
            budget_table(o)
    print(f"\nAll numbers: {o.csv}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["torch"]:
        try:
            train_with_torch(**json.loads(sys.argv[2]))
        except Exception as e:
            sys.exit(f"{type(e).__name__}: {(str(e).strip() or 'no reason given').splitlines()[0]}")
    else:
        main()
