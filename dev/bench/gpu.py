#!/usr/bin/env python3
"""
The CUDA twin on a machine with a card: is it right, how fast is it beside its peers, what does reversal cost, how much fits?

    python3 dev/bench/gpu.py --llmc llm.c                  everything below, in this order: half an hour
    python3 dev/bench/gpu.py --only tests,peers,price      some of it
    python3 dev/bench/gpu.py --minutes 9 --only peers      what is left after 9 minutes is left out, and said so

    tests      builds; all tests, in bf16 and float32; kernels; compute-sanitizer; the losses of 50 steps beside the C program's
    peers      GPT-2 124M, T=1024, each at its best batch: ours, PyTorch (compiled, flash attention, fused AdamW), llm.c (without cuDNN)
    price      reverse over store at the same batch beside the bound that the flops set: 124M, 774M, L=96 C=512; and at the card's memory
    batch      the paper's Table 3: the largest batch in 24, 40, 48, 80 GB by --plan, and one step at the card's largest
    depth      the paper's Table 4: C=512, NH=8, L=16 to 96: each policy at its largest batch; store with a small micro-batch
    memory     the paper's Figure 3: memory against depth
    attention  forward and backward beside PyTorch's flash backend
    large      774M and 1558M: some steps, with the memory table
    kernels    the tables of dev/cuda

nvcc must be there; PyTorch, llm.c and compute-sanitizer are optional: what does not run is a line that says why. Tables go to stdout,
progress to stderr, all figures to dev/bench/results/ as CSV with the card, its driver and the date in the name.
Exit status: 0 done, 1 a build or a test failed, 2 usage.
"""
import argparse, array, csv, datetime, glob, json, random, re, shutil, statistics, subprocess, sys, sysconfig, tempfile, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
OURS, C_TWIN = ROOT / "train_rev_gpt2cu", ROOT / "train_rev_gpt2"
STEP = re.compile(r"^step .*\| loss ([\d.na]+) .* (\d+) tokens/s")
PARTS = ("tests", "peers", "price", "batch", "depth", "memory", "attention", "large", "kernels")
MODES = ("baseline", "midpoint", "midpoint-a", "leapfrog", "hamiltonian")
rows, failures, started = [], [], time.monotonic()


def say(*words):
    print(f"[{time.monotonic() - started:6.0f} s]", *words, file=sys.stderr, flush=True)


def record(table, what, **figures):
    rows.append({"table": table, "what": what, **figures})


def run(command, timeout=600, **options):
    """Output and exit status; what takes too long counts as failed."""
    if "--plan" not in command:
        say(" ".join(map(str, command)))
    try:
        done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=timeout, **options)
        return done.stdout, done.returncode
    except subprocess.TimeoutExpired as e:
        return (e.stdout or b"").decode(errors="replace") if isinstance(e.stdout, bytes) else e.stdout or "", 124
    except OSError as e:
        return str(e), 127


def last_line(text):
    return (text.strip().splitlines() or [""])[-1][:160]


def table(title, columns, lines):
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for line in lines:
        print("| " + " | ".join(map(str, line)) + " |")
    sys.stdout.flush()


# ----------------------------------------------------------------------------------------------------------------
# Building and training.

def nvcc_flags():
    """Where cuBLASLt is, if it came with PyTorch and not with the toolkit."""
    for include in glob.glob(sysconfig.get_paths()["purelib"] + "/nvidia/*/include/cublasLt.h"):
        home = Path(include).parent.parent
        libraries = glob.glob(str(home / "lib" / "libcublasLt.so*"))
        if libraries and not glob.glob("/usr/local/cuda/include/cublasLt.h"):
            shim = Path(tempfile.gettempdir()) / "rev_gpt2_cublas"
            shim.mkdir(exist_ok=True)
            link = shim / "libcublasLt.so"
            if not link.exists():
                link.symlink_to(libraries[0])
            return f"-I{home / 'include'} -L{shim} -Xlinker -rpath={home / 'lib'}"
    return ""


def make(*targets, **options):
    text, status = run(["make", "-B", "-s", f"NVCCFLAGS={nvcc_flags()}", *targets], cwd=options.get("cwd", ROOT))
    if status:
        print(text)
        sys.exit(f"gpu.py: make {' '.join(targets)} failed")
    for line in text.splitlines():
        print(line)  # a warning is worth reading


class Trained:
    """Some steps of one of our programs: losses, ms of all but the first two, peak bytes, the plan's rows."""
    def __init__(self, o, flags, steps=8, program=OURS, timeout=300):
        text, self.status = run([program, "-i", o.tokens, *flags.split(), "-x", steps, "-v", 0, "-l", "1e-4"], timeout)
        self.error = "" if self.status == 0 else last_line(text)
        self.losses = [float(m[1]) for m in map(STEP.match, text.splitlines()) if m]
        speeds = [float(m[2]) for m in map(STEP.match, text.splitlines()) if m]
        tokens = int((re.search(r"(\d+) tokens a step", text) or [0, 0])[1])
        self.ms = tokens * 1000 / statistics.median(speeds[2:] or speeds or [float("nan")])
        self.plan = {m[1]: int(m[2]) for m in re.finditer(r"^(\w+) +(\d+) +\(", text, re.M)}
        self.bound = float((re.search(r"at most ([\d.]+) of the speed", text) or [0, 1])[1])
        self.peak = max((float(m[1]) * (1 << 30) for m in re.finditer(r"^step .*\| ([\d.]+) GiB", text, re.M)), default=0)


def plan(flags):
    text, status = run([OURS, "--plan", *flags.split()], 60)
    return {m[1]: int(m[2]) for m in re.finditer(r"^(\w+) +(\d+) +\(", text, re.M)} if status == 0 else None


def largest_batch(flags, budget):
    """The most sequences whose plan fits; the plan grows with the batch."""
    fits, too_many = 0, 1
    def good(B):
        p = plan(f"{flags} -b {B}")
        return p is not None and p["total"] <= budget
    while good(too_many):
        fits, too_many = too_many, too_many * 2
    while too_many - fits > 1:
        half = (fits + too_many) // 2
        fits, too_many = (half, too_many) if good(half) else (fits, half)
    return fits


def policies(mode):
    return ("store", "checkpoint") if mode == "baseline" else ("store", "checkpoint", "reverse")


# ----------------------------------------------------------------------------------------------------------------
# The parts.

def tests(o):
    lines = []
    def count(what, command, timeout=600, **options):
        text, status = run(command, timeout, **options)
        counts = re.findall(r"^(\d+) passed, (\d+) failed", text, re.M)
        verdict = f"{counts[-1][0]} passed, {counts[-1][1]} failed" if counts else f"status {status}: {last_line(text)}"
        if status or not counts:
            failures.append(what)
            print("\n".join(line for line in text.splitlines() if "FAILED" in line or "ERROR" in line)[:4000])
        lines.append((what, verdict))
        record("tests", what, verdict=verdict)
    make("train_rev_gpt2cu", "test_rev_gpt2cu", "train_rev_gpt2")
    count("bf16", [ROOT / "test_rev_gpt2cu"], cwd=ROOT)
    count("kernels", ["make", "-s", "-C", ROOT / "dev" / "cuda", f"NVCCFLAGS={nvcc_flags()}", "check"])
    if shutil.which("compute-sanitizer"):
        for tool in ("memcheck", "racecheck"):
            count(f"bf16, {tool}", ["compute-sanitizer", "--tool", tool, "--error-exitcode", 9, ROOT / "test_rev_gpt2cu", "layers"], 300)
    else:
        lines.append(("compute-sanitizer", "not found"))
    # the same 50 steps on both twins: every step within 0.02, the mean within 0.005
    for mode in MODES:
        shape = f"-e d12 --layers 6 --channels 384 --heads 6 -b 4 -t 256 --mode {mode}"
        c, cuda = Trained(o, shape, 50, C_TWIN), Trained(o, shape, 50)
        apart = [abs(a - b) for a, b in zip(c.losses, cuda.losses)]
        good = len(apart) == 50 and max(apart) <= 0.02 and sum(apart) / 50 <= 0.005
        verdict = f"50 steps: at most {max(apart):.4f} apart, mean {sum(apart) / len(apart):.4f}" if apart else c.error or cuda.error
        lines.append((f"{mode} on both twins", verdict))
        record("tests", f"twins {mode}", verdict=verdict)
        if not good:
            failures.append(f"twins {mode}")
    make("test_rev_gpt2cu", "train_rev_gpt2cu", "PRECISION=FP32")
    count("float32", [ROOT / "test_rev_gpt2cu", "short"], cwd=ROOT)
    shape = "-e d12 --layers 6 --channels 384 --heads 6 -b 4 -t 256 --mode midpoint"
    apart = [abs(a - b) for a, b in zip(Trained(o, shape, 50, C_TWIN).losses, Trained(o, shape, 50).losses)]
    lines.append(("midpoint on both twins, float32", f"50 steps: at most {max(apart, default=9):.6f} apart"))
    record("tests", "twins float32", verdict=lines[-1][1])
    if max(apart, default=9) > 1e-3:
        failures.append("twins float32")
    make("train_rev_gpt2cu")
    table("Correctness", ("what", "outcome"), lines)


TORCH = """
import json, sys, time
sys.path.insert(0, {here!r})
from bench import train_with_torch
train_with_torch(**json.loads(sys.argv[1]))
"""


def torch_rate(o, B, T, L=12, C=768, NH=12, steps=8):
    script = o.work / "peer.py"
    script.write_text(TORCH.format(here=str(HERE)))
    options = dict(L=L, C=C, NH=NH, B=B, T=T, precision="bf16", compiled=True, device="cuda", steps=steps)
    text, status = run([sys.executable, script, json.dumps(options)], 300)
    ms = [float(m) for m in re.findall(r"([\d.]+) ms", text)][3:]
    peak = re.search(r"peak (\d+)", text)
    return (B * T * 1000 / statistics.median(ms), int(peak[1]) if peak else 0, "") if ms and status == 0 else (0, 0, last_line(text))


def llmc_rate(o, B, T, steps=10):
    if not o.llmc:
        return 0, 0, "no --llmc"
    if not (o.llmc / "train_gpt2cu").exists():
        text, status = run(["make", "-C", o.llmc, "train_gpt2cu", f"NVCC_LDFLAGS=-lcublas -lcublasLt", "NO_MULTI_GPU=1"], 400)
        if status:
            return 0, 0, last_line(text)
    text, status = run([o.llmc / "train_gpt2cu", "-i", o.tokens, "-j", o.tokens, "-e", "d12", "-b", B, "-t", T, "-d", B * T, "-x", steps,
                        "-v", 0, "-s", 0, "-h", 0, "-l", "1e-4"], 300, cwd=o.work)
    ms = [float(m) for m in re.findall(r"([\d.]+) ms", text)][3:]
    return (B * T * 1000 / statistics.median(ms), 0, "") if ms and status == 0 else (0, 0, last_line(text))


def peers(o):
    T, lines, best = 1024, [], {}
    contenders = {
        "ours, baseline store": lambda B: ours_rate(o, f"-e d12 -b {B} -t {T} --mode baseline", B * T),
        "PyTorch, compiled": lambda B: torch_rate(o, B, T),
        "llm.c": lambda B: llmc_rate(o, B, T),
        "ours, midpoint reverse": lambda B: ours_rate(o, f"-e d12 -b {B} -t {T} --mode midpoint", B * T)}
    for B in (8, 16, 32, 64):
        for name, rate in contenders.items():
            speed, peak, why = rate(B)
            record("peers", name, B=B, T=T, tokens_per_s=round(speed), peak=peak, why=why)
            lines.append((name, B, f"{speed:.0f}" if speed else why, f"{peak / 1e9:.1f}" if peak else ""))
            if speed > best.get(name, (0, 0))[0]:
                best[name] = speed, B
    table(f"GPT-2 124M, T = {T}, bf16, tokens/s", ("", "batch", "tokens/s", "peak GB"), lines)
    reference = best.get("ours, baseline store", (0, 0))[0]
    table("Each at its best batch", ("", "batch", "tokens/s", "ours, store, over it"),
          [(name, B, f"{speed:.0f}", f"{reference / speed:.2f}") for name, (speed, B) in best.items()])


def ours_rate(o, flags, tokens, steps=8):
    t = Trained(o, flags, steps)
    return (tokens * 1000 / t.ms, t.peak, "") if t.status == 0 and t.losses else (0, 0, t.error)


def price(o):
    lines = []
    for name, shape, B, T in (("124M", "-e d12", 32, 1024), ("774M", "-e d36", 8, 1024), ("L=96 C=512", "-e d12 --layers 96 --channels 512 --heads 8", 16, 1024)):
        store = Trained(o, f"{shape} -b {B} -t {T} --mode midpoint --memory store")
        reverse = Trained(o, f"{shape} -b {B} -t {T} --mode midpoint")
        ratio = store.ms / reverse.ms
        lines.append((name, B, f"{store.ms:.1f}", f"{reverse.ms:.1f}", f"{ratio:.3f}", f"{reverse.bound:.3f}", f"{ratio / reverse.bound:.3f}"))
        record("price", name, B=B, T=T, store_ms=store.ms, reverse_ms=reverse.ms, ratio=ratio, bound=reverse.bound, why=store.error or reverse.error)
    table("The price of reversal (midpoint), ms a step", ("", "batch", "store", "reverse", "speed of reverse over store", "bound", "of the bound"), lines)
    lines = []
    for B in (64, 256, 1024, largest_batch("-e d12 -t 1024 --mode midpoint", o.memory)):
        t = Trained(o, f"-e d12 -b {B} -t 1024 --mode midpoint", 4)
        lines.append((B, f"{B * 1024000 / t.ms:.0f}", f"{t.peak / 1e9:.1f}", t.error))
        record("price", "reverse at large batches", B=B, tokens_per_s=B * 1024000 / t.ms, peak=t.peak, why=t.error)
    table("midpoint --memory reverse, 124M, T = 1024", ("batch", "tokens/s", "peak GB", ""), lines)


def batch(o):
    lines = []
    for mode in ("baseline", "midpoint"):
        for memory in policies(mode):
            flags = f"-e d12 -t 1024 --mode {mode} --memory {memory}"
            sizes = [largest_batch(flags, gb * 1e9) for gb in (24, 40, 48, 80)]
            own = largest_batch(flags, o.memory)
            t = Trained(o, f"{flags} -b {own}", 2, timeout=400)
            lines.append((mode, memory, *sizes, own, "done" if t.status == 0 else t.error, f"{t.peak / 1e9:.2f}"))
            record("batch", f"{mode} {memory}", gb24=sizes[0], gb40=sizes[1], gb48=sizes[2], gb80=sizes[3], own=own, peak=t.peak, why=t.error)
    table("Largest batch of GPT-2 124M at T = 1024", ("", "", "24 GB", "40 GB", "48 GB", "80 GB", "this card", "two steps", "peak GB"), lines)


def depth(o):
    lines = []
    for L in (16, 32, 64, 96):
        shape = f"-e d12 --layers {L} --channels 512 --heads 8 -t 1024"
        for mode, memory in (("baseline", "store"), ("midpoint", "store"), ("midpoint", "checkpoint"), ("midpoint", "reverse")):
            B = min(largest_batch(f"{shape} --mode {mode} --memory {memory}", o.memory), 512)  # more does not change the speed
            t = Trained(o, f"{shape} -b {B} --mode {mode} --memory {memory}", 4, timeout=400)
            lines.append((L, mode, memory, B, f"{t.ms:.0f}", f"{B * 1000 / t.ms:.1f}", f"{t.peak / 1e9:.1f}", t.error))
            record("depth", f"L={L} {mode} {memory}", B=B, ms=t.ms, samples_per_s=B * 1000 / t.ms, peak=t.peak, why=t.error)
        t = Trained(o, f"{shape} -b 16 -d {256 * 1024} --mode baseline --memory store", 4, timeout=400)
        lines.append((L, "baseline", "store, 16 batches of 16", 256, f"{t.ms:.0f}", f"{256000 / t.ms:.1f}", f"{t.peak / 1e9:.1f}", t.error))
        record("depth", f"L={L} baseline store, micro-batch 16", B=256, ms=t.ms, samples_per_s=256000 / t.ms, peak=t.peak, why=t.error)
    table("C = 512, NH = 8, T = 1024: each policy at its largest batch (512 at most)", ("L", "", "", "batch", "ms a step", "samples/s", "peak GB", ""), lines)


def memory(o):
    lines = []
    for L in (2, 12, 24, 48, 96, 192):
        flags = f"-e d12 --layers {L} --channels 512 --heads 8 -t 1024 -b 32 --mode midpoint"
        cells = []
        for policy in policies("midpoint"):
            p = plan(f"{flags} --memory {policy}")
            if not p or p["total"] > o.memory:
                cells.append(f"({p['activations'] / 1e9:.1f})" if p else "")
                continue
            t = Trained(o, f"{flags} --memory {policy}", 2)
            rest = t.peak - p["parameters"] - p["gradients"] - p["optimizer"]
            cells.append(f"{rest / 1e9:.2f} ({p['activations'] / 1e9:.2f})" if t.status == 0 else t.error)
            record("memory", f"L={L} {policy}", measured=rest, planned=p["activations"])
        lines.append((L, *cells))
    table("GB of activations, measured (planned): 32 sequences of 1024, C = 512", ("L", *policies("midpoint")), lines)


ATTENTION = """
import torch, time
from torch.nn.attention import sdpa_kernel, SDPBackend
B, T, NH, hs = 16, 1024, 12, 64
q, k, v = (torch.randn(B, NH, T, hs, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
def best(f):
    times = []
    for i in range(30):
        torch.cuda.synchronize(); t = time.perf_counter(); f(); torch.cuda.synchronize(); times.append(time.perf_counter() - t)
    return min(times) * 1e3
with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    g = torch.randn_like(out)
    print("forward", best(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)))
    print("backward", best(lambda: torch.autograd.grad(out, (q, k, v), g, retain_graph=True)))
"""


def attention(o):
    theirs, status = run([sys.executable, "-c", ATTENTION], 120)
    make("attention", cwd=ROOT / "dev" / "cuda")
    text, _ = run([ROOT / "dev" / "cuda" / "attention"], 200)
    lines = []
    for direction, version in (("forward", 3), ("backward", 2)):
        mine = re.search(rf"attention, {direction}, 16 x 1024[^\n]*version {version},[^\n]*best ([\d.]+) ms", text)
        other = re.search(rf"{direction} ([\d.]+)", theirs)
        if mine and other:
            lines.append((direction, mine[1], f"{float(other[1]):.2f}", f"{float(other[1]) / float(mine[1]):.2f}"))
            record("attention", direction, ours_ms=float(mine[1]), torch_ms=float(other[1]))
        else:
            lines.append((direction, mine[1] if mine else last_line(text), other[1] if other else last_line(theirs), ""))
    table("Attention, 16 x 1024, 12 heads of 64, bf16", ("", "ours, ms", "PyTorch's flash backend, ms", "our speed over its"), lines)
    print("\n" + text)


def large(o):
    for name, flags in (("774M", "-e d36 -b 8"), ("1558M", "-e d48 -b 4")):
        t = Trained(o, f"{flags} -t 1024 --mode midpoint", 5)
        B = int(flags.split()[-1])
        table(f"{name}, {B} sequences of 1024, midpoint reverse: {B * 1024000 / t.ms:.0f} tokens/s, losses {', '.join(f'{x:.3f}' for x in t.losses) or t.error}",
              ("row", "GB"), [(row, f"{size / 1e9:.2f}") for row, size in t.plan.items()])
        record("large", name, B=B, tokens_per_s=B * 1024000 / t.ms, peak=t.peak, why=t.error)


def kernels(o):
    make("kernels", cwd=ROOT / "dev" / "cuda")
    for kernel in ("matmul", "attention", "layernorm", "classifier", "adamw", "stream_step", "embed"):
        text, status = run([ROOT / "dev" / "cuda" / kernel, "table"], 200)
        print("\n" + text)
        record("kernels", kernel, status=status)


# ----------------------------------------------------------------------------------------------------------------

def save(o):
    o.results.mkdir(parents=True, exist_ok=True)
    path = o.results / (re.sub(r"[^\w.]+", "-", f"{o.card} driver {o.driver} {datetime.date.today()}") + ".csv")
    columns = sorted({key for row in rows for key in row} - {"table", "what"})
    with open(path, "a", newline="") as f:
        writer = csv.DictWriter(f, ["table", "what", *columns])
        writer.writeheader()
        writer.writerows(rows)
    say("figures are in", path)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--llmc", type=Path, help="a checkout of llm.c")
    p.add_argument("--only", default=",".join(PARTS), help="of " + ",".join(PARTS))
    p.add_argument("--minutes", type=float, default=1e9)
    p.add_argument("--results", type=Path, default=HERE / "results")
    o = p.parse_args()
    chosen = o.only.split(",")
    if set(chosen) - set(PARTS):
        p.error("--only takes " + ",".join(PARTS))
    card, status = run(["nvidia-smi", "--query-gpu=name,driver_version,memory.free", "--format=csv,noheader,nounits"])
    if status:
        sys.exit("gpu.py: no card here: " + last_line(card))
    o.card, o.driver, free = card.strip().splitlines()[0].split(", ")
    o.memory = int(free) * (1 << 20) - (3 << 30)  # what libraries and the driver take
    print(f"{o.card}, driver {o.driver}, {int(free) / 1024:.1f} GiB free, {run(['nvcc', '--version'])[0].strip().splitlines()[-1]}, {datetime.date.today()}", flush=True)
    with tempfile.TemporaryDirectory() as work:
        o.work = Path(work)
        o.tokens = o.work / "tokens.bin"
        numbers = array.array("H", random.Random(1337).choices(range(50257), k=1 << 24))
        o.tokens.write_bytes(array.array("i", [20240520, 1, len(numbers), *[0] * 253]).tobytes() + numbers.tobytes())
        if "tests" not in chosen:
            make("train_rev_gpt2cu")
        for name in (part for part in PARTS if part in chosen):
            if time.monotonic() - started > 60 * o.minutes:
                print(f"\n{name}: left out, the time is over")
                continue
            globals()[name](o)
            save(o)
            rows.clear()
    if failures:
        sys.exit("gpu.py: failed: " + ", ".join(failures))


if __name__ == "__main__":
    main()
