#!/usr/bin/env python3
"""
What does converting a real pretrained network into a reversible one cost? SmolLM2-135M-Instruct, or another Llama; conversion.py asks
the same of a small network of bytes, which it trains itself.

    python3 dev/measure/pretrained.py OUT import --model FILE.gguf --valid V.txt --train T.txt --documents D.jsonl --questions DIR
    python3 dev/measure/pretrained.py OUT [sweep grids layers choices distill finetune tune plot] [--only WORDS ...]

Each part adds rows to a table in OUT, and what is there already is not done again: killed, it goes on with the same command.
    import    the model (GGUF, or a folder of Hugging Face's), its tokenizer; V's first 40,000 characters, T, documents of 2,048 and
              of 8,192 tokens, and the questions of DIR (TASK_*.jsonl) as tokens
    sweep     modes, coefficients, iterations and ordinary steps, nothing trained: OUT/sweep.csv
    grids     integer streams on coarser and finer grids: OUT/grids.csv
    layers    force and state, what one converted step misses, how far a whole pass is off: OUT/layers.csv (PyTorch)
    choices   zero-shot accuracy of the original, of conversions and of what was distilled: OUT/choices.csv
    distill   KL(ours, the original's) (4.6) made small: OUT/distilled.csv, OUT/distill/NAME_TOKENS/log.csv
    finetune  memory and time of a step on long documents, beside PyTorch: OUT/finetune.csv
    tune      losses of fine-tuning on them, the original's and a conversion's: OUT/tuned.csv
    plot      dev/pictures/pretrained.svg from these
--only, which may be repeated, takes a piece of the names of what a part does, such as "bdia -0.0625 0-1 1" (mode, coefficient, ordinary
steps, K) of sweep. Losses are in nats a token, of 8 sequences of 512 tokens.
It needs what dev/hf/hf.py needs; torch and transformers for import, layers and finetune, matplotlib for plot.
"""
import argparse, csv, os, re, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
TASKS = ["piqa", "arc_easy", "arc_challenge", "openbookqa", "winogrande"]
COMPARED = "-b 8 -t 512 -m 1"
CHARACTERS = 40_000
B, T = 4, 512  # of a step of distillation
LONG = 2048, 8192  # tokens of a document

# ---- conversions: (mode, a, ordinary steps, K)

GRID = "--grid 14"  # what --grid auto finds for this model, said here lest it is looked for each time

def flags_of(mode, a, ordinary, K=1):
    return f"--mode {mode} --coefficient {a} --ordinary {ordinary} {GRID}" + (f" --fixed-point {K}" if mode == "retrofit" else "")

def numbers(ordinary):
    """0-2,28 are the steps 0, 1, 2 and 28."""
    ranges = [part.split("-") for part in ordinary.split(",")]
    return {k for part in ranges for k in range(int(part[0]), int(part[-1]) + 1)}

EVERYWHERE = "0-2,11-12,24-25,28-29"
SWEEP = [*(("bdia", a, ordinary, 1) for ordinary in ("0", "0-1", "0-3") for a in (-1/4, -1/16, -1/64, 1/16)),
         *(("bdia", a, ordinary, 1) for a in (-1/16, -1/4)
           for ordinary in ("0-1,28-29", "0-2,28-29", "0-2,11", "0-1,11-12", "0-2,24-25,28-29", EVERYWHERE)),
         ("bdia", -1/256, "0-1", 1), ("bdia", -1/64, "0-1,28-29", 1), ("bdia", -1/8, "0-1", 1), ("bdia", -1/32, "0-1", 1),
         *(("retrofit", a, "0-1", 1) for a in (1, 1/4, -1/4, 1/16)),
         *(("retrofit", 1/4, "0-1", K) for K in (0, 2, 3)),
         *(("retrofit", 1/4, ordinary, 1) for ordinary in ("0-2,11", "0-2,28-29", EVERYWHERE)), ("retrofit", 1, EVERYWHERE, 1)]
NAMED = {"bdia -1/64": ("bdia", -1/64, "0"), "bdia -1/16": ("bdia", -1/16, "0-1"), "bdia -1/16, 0-2,28-29": ("bdia", -1/16, "0-2,28-29"),
         "bdia -1/4": ("bdia", -1/4, "0-1"), "bdia -1/4, 0-2,28-29": ("bdia", -1/4, "0-2,28-29"),
         "retrofit 1/4": ("retrofit", 1/4, "0-1"), "retrofit -1/4": ("retrofit", -1/4, "0-1"), "retrofit 1": ("retrofit", 1, "0-1")}
RUNS = {f"{name}, rate {rate}": (NAMED[name], rate) for name in ("bdia -1/4", "bdia -1/16", "retrofit 1/4", "retrofit 1", "retrofit -1/4")
        for rate in ("1e-4", "1e-5")}

# ---- helpers

def fail(message, status=1):
    print("pretrained.py:", message, file=sys.stderr)
    sys.exit(status)

def run(command, may_fail=False):
    """What it prints; what it complains of, if it may fail."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode and not may_fail:
        fail(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    return done.stderr if done.returncode else done.stdout

def program(args, name, flags, **files):
    """flags are words; files become -e, -i, -j, -o, --distill and the like."""
    more = [x for flag, path in files.items() for x in (f"--{flag}" if flag[1:] else f"-{flag}", path)]
    return [args.programs / name, *flags.split(), *more]

def read(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))

class Table:
    """Its first columns say what a row is about; a row is written as soon as it is known."""
    def __init__(self, path, keys, values):
        self.path, self.keys, self.columns = path, keys.split(), f"{keys} {values}".split()
        rows = read(path) if path.exists() else []
        if rows and not set(self.columns) <= set(rows[0]):
            fail(f"{path} has other columns, of an earlier version: take it away")
        self.done = {tuple(row[key] for key in self.keys) for row in rows}

    def has(self, *key):
        return tuple(map(str, key)) in self.done

    def add(self, *row):
        new = not self.path.exists()
        with open(self.path, "a", newline="") as f:
            csv.writer(f).writerows([self.columns, row] if new else [row])
        print(*row, flush=True)

def folder(name):
    return re.sub("[^0-9a-z.-]+", "_", name)

def wanted(args, names):
    """Of names, or of tuples that stand for them, those asked for, or else those that hold one of the words asked for."""
    def text(name):
        return name if isinstance(name, str) else " ".join(map(str, name))
    whole = [name for name in names if text(name) in (args.only or [])]
    found = whole or [name for name in names if not args.only or any(word in text(name) for word in args.only)]
    args.names += map(text, names)
    args.met |= {word for word in args.only or [] if any(word in text(name) for name in names)}
    return found

def model(args):
    return args.out / "model.bin"

def documents(args, tokens, split="train"):
    return args.out / f"documents_{tokens}/{split}_000000.bin"

# ---- parts

def import_(args):
    out, made = args.out, args.out / "model.bin"
    gguf, tokens = args.model.suffix == ".gguf", [sys.executable, ROOT / "dev/hf/tokens.py", "encode", out / "tokenizer", "-", "-o"]
    if not made.exists():
        print(run([sys.executable, ROOT / "dev/hf/hf.py", "import", args.model, made]), end="")
    if gguf and not (out / "tokenizer").exists():
        status = subprocess.run([sys.executable, ROOT / "dev/hf/tokens.py", "gguf", args.model, out / "tokenizer"]).returncode
        if status:
            sys.exit(status if status > 0 else 3)  # it has said why, but if it was killed
    elif not (out / "tokenizer").exists():
        from transformers import AutoTokenizer
        AutoTokenizer.from_pretrained(args.model).save_pretrained(out / "tokenizer")
    if not (out / "hf").exists():
        run([sys.executable, ROOT / "dev/hf/hf.py", "export", made, out / "hf", "--tokenizer", out / "tokenizer"])
    for name, path, characters in (("val.bin", args.valid, CHARACTERS), ("train.bin", args.train, None)):
        if path and not (out / name).exists():
            subprocess.run([str(word) for word in (*tokens, out / name)], input=path.read_text()[:characters].encode(), check=True)
    for tokens_each in LONG if args.documents else []:
        if not documents(args, tokens_each).exists():
            print(run([sys.executable, ROOT / "prepro_owt.py", "--jsonl", args.documents, "--tokenizer", out / "tokenizer", "--documents",
                       tokens_each, "--val", "docs:0.05", "--out", documents(args, tokens_each).parent]), end="")
    for task in TASKS if args.questions else []:
        if not (out / f"questions/{task}.bin").exists():
            found = next(iter(sorted(args.questions.glob(f"{task}*.jsonl"))), args.questions / f"{task}.jsonl")
            print(run([sys.executable, ROOT / "dev/eval/choices.py", task, found, "--tokenizer", out / "tokenizer/tokenizer.json", "--out",
                       out / "questions"]), end="")

COMPARISON = re.compile(r"loss ([\d.]+),.*teacher ([\d.]+) \| KL ([-\d.e+]+) \| same top token ([\d.]+)")

def compare(args, flags):
    """Loss, the original's loss, KL, how often both find the same token likeliest; or what was complained of."""
    said = run(program(args, "eval_rev_llama", f"{COMPARED} {flags}", e=model(args), distill=model(args), j=args.out / "val.bin"), may_fail=True)
    found = COMPARISON.search(said)
    return found.groups() if found else said.strip().partition(": ")[2]

def planned(args, flags, name, inputs, batch=B, tokens=T):
    """Bytes of a training step by the plan."""
    said = run(program(args, "train_rev_llama", f"--plan -b {batch} -t {tokens} {flags}", e=model(args), i=inputs))
    return int(re.search(rf"^{name} +(\d+)", said, re.M)[1])

def sweep(args):
    table = Table(args.out / "sweep.csv", "mode a K ordinary", "loss original kl agreement bits")
    for mode, a, ordinary, K in wanted(args, SWEEP):
        if not table.has(mode, a, K, ordinary):
            flags = flags_of(mode, a, ordinary, K)
            result = compare(args, flags)
            if isinstance(result, str):
                fail(f"{flags}: {result}")
            bits = 8 * planned(args, flags, "kept", args.out / "val.bin") / (B * T * width(args))
            table.add(mode, a, K, ordinary, *result, f"{bits:.1f}")

def width(args):
    """C, from the model file's header."""
    with open(model(args), "rb") as f:
        return int.from_bytes(f.read(28)[24:], "little")

def grids(args):
    table = Table(args.out / "grids.csv", "mode a ordinary grid", "loss original kl agreement problem")
    for name in wanted(args, ["bdia -1/16"]):
        for grid in (8, 10, 12, 13, 14, 15, 16, 17):
            if not table.has(*NAMED[name], grid):
                result = compare(args, flags_of(*NAMED[name]).replace(GRID, f"--grid {grid}"))
                table.add(*NAMED[name], grid, *(["", "", "", "", result] if isinstance(result, str) else [*result, ""]))

def layers(args):
    """Medians over tokens, as in conversion.py. Along the original's own states p_j: |p_j|, |f_j(p_j)| / |p_j|, how much f_{j-1}
    shrinks the difference of p_j and p_{j-1}; by how much of |p_{j+1}| the one step to it misses, for a = 1, since that is
    proportional to a, beside what it would be if f were linear, r^(K+2) with K = 1. Then how far a whole converted pass is from the
    original's state, relative."""
    if (args.out / "layers.csv").exists():
        return
    sys.path.insert(0, str(ROOT / "dev/reference"))
    import torch, reference as r
    m = r.read_model(model(args), torch.float32)
    tokens, _ = r.batch(r.read_tokens(args.out / "val.bin", m.V), 0, B, T)
    weights = {name: t.unbind(0) for name, t in m.P.items() if name not in ("wte", "lnfw", "headw")}
    blocks = [SimpleNamespace(m=m, **{name: t[l] for name, t in weights.items()}) for l in range(m.L)]
    def f(j, p):
        return r.f(m.block, blocks[j], p)
    def ratio(x, y):
        return (x.norm(dim=-1) / y.norm(dim=-1)).median().item()
    def converted(mode, a, ordinary):
        p = [x]
        for j in range(m.L):
            force = f(j, p[j])
            if j in numbers(ordinary):
                p.append(p[j] + force)
            elif mode == "bdia":
                p.append(a * p[j - 1] + (1 - a) * p[j] + (1 + a) * force)
            else:
                p.append(a * p[j - 1] + (1 - a) * p[j] + force + a * f(j - 1, p[j] - f(j - 1, p[j])))
        return p
    with torch.no_grad():
        x, rows = m.block.embed(m, tokens), []
        p, forces = [x], []
        for j in range(m.L):
            forces.append(f(j, p[j]))
            p.append(p[j] + forces[j])
            row = [j, p[j].norm(dim=-1).median().item(), p[j].abs().max().item(), ratio(forces[j], p[j])]
            if j == 0:
                rows.append([*row, *[""] * 7])
                continue
            true, estimate, misses = forces[j - 1], p[j], []
            for K in range(4):
                force = f(j - 1, estimate)
                misses.append(ratio(force - true, p[j + 1]))
                shrinks = ratio(force - true, true) if K == 0 else shrinks
                estimate = p[j] - force                                                     # (4.7)
            rows.append([*row, shrinks, *misses, rows[-1][3]**3, ratio(forces[j] - true, p[j + 1])])
        for conversion in NAMED.values():
            for row, here, there in zip(rows, converted(*conversion)[1:], p[1:]):
                row.append(ratio(here - there, there))
    table = Table(args.out / "layers.csv", "layer", "state largest force contraction K0 K1 K2 K3 linear bdia")
    table.columns += NAMED
    for row in rows:
        table.add(*(f"{x:.4f}" if isinstance(x, float) else x for x in row))

# ---- choices

def best(scores):
    return max(range(len(scores)), key=scores.__getitem__)  # of equals the first

def answers(path):
    """Of each question the completion chosen, of a table of eval_rev_llama --csv."""
    scores = {}
    for row in read(path):
        scores.setdefault(int(row["question"]), []).append(float(row["loglikelihood"]))
    return {question: best(x) for question, x in scores.items()}

def networks(args):
    """A model file and flags, by name: the original, conversions as they are, what was distilled."""
    distilled = {f"{name}, {steps_of(args) * B * T}": (file, "") for name in RUNS if (file := result_of(args, name)).exists()}
    return {"original": (model(args), ""), **{name: (model(args), flags_of(*how)) for name, how in NAMED.items()}, **distilled}

def choices(args):
    table = Table(args.out / "choices.csv", "network task", "questions acc error acc_norm error_norm as_original seconds")
    for name in wanted(args, networks(args)):
        file, flags = networks(args)[name]
        for task in args.tasks.split(","):
            if table.has(name, task):
                continue
            scores, started = args.out / "choices" / folder(name) / f"{task}.csv", time.time()
            scores.parent.mkdir(parents=True, exist_ok=True)
            said = run(program(args, "eval_rev_llama", f"-t 512 {flags}", e=file, choices=args.out / f"questions/{task}.bin", csv=scores))
            acc, error, norm, error_norm, n = re.search(r"acc ([\d.]+) \+- ([\d.]+), acc_norm ([\d.]+) \+- ([\d.]+), (\d+)", said).groups()
            original = args.out / "choices/original" / f"{task}.csv"
            theirs, chosen = answers(original) if original.exists() else {}, answers(scores)
            same = sum(theirs[q] == chosen[q] for q in chosen) / len(chosen) if theirs else float("nan")
            table.add(name, task, n, acc, error, norm, error_norm, f"{same:.4f}", f"{time.time() - started:.0f}")

# ---- distillation

def steps_of(args):
    return args.distill_tokens // (B * T)

def result_of(args, name):
    steps = steps_of(args)
    return args.out / "distill" / f"{folder(name)}_{steps * B * T}" / f"model_{steps:08d}.bin"

def distill(args):
    table = Table(args.out / "distilled.csv", "run tokens", "loss original kl agreement seconds")
    for name in wanted(args, RUNS):
        (how, rate), steps, started = RUNS[name], steps_of(args), time.time()
        if table.has(name, steps * B * T):
            continue
        if not result_of(args, name).exists():
            result_of(args, name).parent.parent.mkdir(exist_ok=True)
            flags = f"{flags_of(*how)} --memory store -b {B} -t {T} -x {steps} -l {rate} -u {steps // 10} -v {max(steps // 8, 1)} -m 2 -y 1 -n 20 -nk 1"
            run(program(args, "train_rev_llama", flags, e=model(args), distill=model(args), i=args.out / "train.bin", j=args.out / "val.bin",
                        o=result_of(args, name).parent))
        said = run(program(args, "eval_rev_llama", COMPARED, e=result_of(args, name), distill=model(args), j=args.out / "val.bin"))
        found = COMPARISON.search(said) or fail(f"eval_rev_llama says no KL, but: {said.strip()[-200:]}")
        table.add(name, steps * B * T, *found.groups(), f"{time.time() - started:.0f}")

# ---- fine-tuning on long documents

TORCH = "transformers, checkpointing"
TUNED = {"baseline store": "--mode baseline --memory store", "baseline checkpoint": "--mode baseline --memory checkpoint",
         "bdia reverse": flags_of("bdia", -1/64, "0")}

def train_with_transformers(args):
    """A line a step until it is killed: zero grad, forward, loss, backward, clipping at 1, AdamW."""
    import numpy, torch
    from transformers import AutoModelForCausalLM
    network = AutoModelForCausalLM.from_pretrained(args.out / "hf", dtype=torch.float32).train()
    network.gradient_checkpointing_enable()
    network.config.use_cache = False
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = numpy.memmap(documents(args, args.tokens), "<u2", "r", offset=1024)
    for step in range(len(tokens) // args.tokens):
        started = time.perf_counter()
        x = torch.from_numpy(tokens[step * args.tokens:(step + 1) * args.tokens].astype("i8")).view(1, args.tokens)
        optimizer.zero_grad(set_to_none=True)
        loss = network(input_ids=x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        print(f"step {step + 1} | loss {loss.item():.4f} | {1000 * (time.perf_counter() - started):.3f} ms", flush=True)

def finetune(args):
    sys.path.insert(0, str(ROOT / "dev/bench"))
    import bench
    table, inputs = Table(args.out / "finetune.csv", "tokens contender", "planned activations peak ms"), documents(args, args.tokens)
    for name in wanted(args, [*TUNED, TORCH]):
        if table.has(args.tokens, name):
            continue
        if name == TORCH:
            plans, command = ["", ""], [sys.executable, Path(__file__).resolve(), args.out, "transformers", "--tokens", args.tokens]
        else:
            plans = [planned(args, TUNED[name], row, inputs, 1, args.tokens) for row in ("total", "activations")]
            command = program(args, "train_rev_llama", f"{TUNED[name]} -b 1 -t {args.tokens} -l 1e-5 -v 0", e=model(args), i=inputs)
        result = bench.Measured()
        bench.measure([str(word) for word in command], SimpleNamespace(steps=2 if args.tokens == LONG[0] else 1, seconds=0, patience=3600), result)
        if result.failure:
            fail(f"{name}: {result.failure}")
        table.add(args.tokens, name, *plans, result.peak, f"{min(result.ms):.0f}")

STEPS = 16
TUNING = f"-b 1 -t {LONG[0]} -x {STEPS} -u 2 -l 5e-5 -v 4 -m 8 -n 4 -nk 1 -y 1"

def tune(args):
    """Of losses of both networks, trained alike, that the log has at every validation."""
    table = Table(args.out / "tuned.csv", "network tokens", "loss")
    for name in wanted(args, ["baseline store", "bdia reverse"]):
        if table.has(name, STEPS * LONG[0]):
            continue
        out = args.out / "tuned" / folder(name)
        out.parent.mkdir(exist_ok=True)
        run(program(args, "train_rev_llama", f"{TUNED[name]} {TUNING}", e=model(args), i=documents(args, LONG[0]), j=documents(args, LONG[0], "val"), o=out))
        for row in read(out / "log.csv"):
            tokens = int(row["step"]) * LONG[0]
            if row["split"] == "val" and not table.has(name, tokens):
                table.add(name, tokens, row["loss"])

# ---- pictures

def plot(args):
    import matplotlib
    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"svg.hashsalt": "0", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    rows = [row for row in read(args.out / "sweep.csv") if row["mode"] == "bdia" and float(row["a"]) < 0]
    for ordinary, color in (("0", "#999999"), ("0-1", "#d55e00"), ("0-3", "#0072b2"), ("0-2,28-29", "#009e73"), (EVERYWHERE, "#cc79a7")):
        line = sorted((-float(row["a"]), float(row["kl"])) for row in rows if row["ordinary"] == ordinary)
        if line:
            left.loglog(*zip(*line), "o-", color=color, label=f"ordinary steps {ordinary}", markersize=4)
    left.set(xlabel="−a", ylabel="KL to the original, nats a token", title="bdia, nothing trained")
    rows = read(args.out / "layers.csv")
    def line(column):
        return zip(*((int(row["layer"]), float(row[column])) for row in rows if float(row[column] or 0) > 0))
    middle.semilogy(*line("force"), "k.-", label="|f(p)| / |p|")
    for column, color, label in (("K1", "#0072b2", "retrofit, K=1"), ("linear", "#56b4e9", "retrofit, if blocks were linear"),
                                 ("bdia", "#d55e00", "bdia")):
        middle.semilogy(*line(column), ".-", color=color, label=f"a step's miss / a, {label}")
    middle.set(xlabel="layer", ylabel="relative to the state", title="One step, along the original's states")
    for name in NAMED:
        right.semilogy(*line(name), ".-", label=name)
    right.set(xlabel="layer", ylabel="distance from the original, relative", title="A whole converted pass")
    for axes in (left, middle, right):
        axes.legend(fontsize=7, frameon=False, **(dict(loc="center left", bbox_to_anchor=(1, 0.5)) if axes is right else {}))
        axes.grid(alpha=0.3)
    figure.savefig(ROOT / "dev/pictures/pretrained.svg", metadata={"Date": None})

PARTS = {"import": import_, "sweep": sweep, "grids": grids, "layers": layers, "choices": choices, "distill": distill, "finetune": finetune, "tune": tune,
         "plot": plot, "transformers": train_with_transformers}
ALL = ["sweep", "grids", "layers", "choices", "distill", "finetune", "tune", "plot"]

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = lambda message: fail(message + " (see --help)", 2)  # argparse would print its usage lines too
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("parts", metavar="PART", nargs="*")
    parser.add_argument("--only", metavar="WORDS", action="append", help="a piece of names")
    parser.add_argument("--tasks", default=",".join(TASKS), help="of choices (%(default)s)")
    parser.add_argument("--tokens", type=int, default=LONG[0], choices=LONG, help="of a document, for finetune (%(default)s)")
    parser.add_argument("--distill-tokens", type=int, default=100_000, metavar="N", help="of a distillation, in whole steps of %d (%%(default)s)" % (B * T))
    parser.add_argument("--programs", type=Path, metavar="DIR", help="of train_rev_llama and eval_rev_llama, such as a card's (what make builds)")
    for name, what in (("model", "GGUF file or folder"), ("valid", "text"), ("train", "text"), ("documents", ".jsonl"),
                       ("questions", "folder")):
        parser.add_argument(f"--{name}", type=Path, metavar="PATH", help=f"import: {what}")
    args = parser.parse_intermixed_args()  # parts may stand behind flags
    args.names, args.met = [], set()
    if not set(args.parts) <= set(PARTS) or not set(args.tasks.split(",")) <= set(TASKS):
        parser.error(f"parts are {' '.join(['import', *ALL])}, tasks {','.join(TASKS)}")
    if "import" in args.parts and not args.model:
        parser.error("import needs --model")
    if "import" in args.parts and not args.model.exists():
        fail(f"{args.model}: no such file or folder")
    if "import" in args.parts:
        args.out.mkdir(parents=True, exist_ok=True)
    elif not model(args).exists():
        fail(f"{model(args)}: no such file; import makes it")
    if args.distill_tokens < B * T:
        parser.error(f"--distill-tokens {args.distill_tokens}: at least {B * T} are meant, a step's")
    args.programs = (args.programs or ROOT).resolve()
    if args.programs != ROOT:
        for name in ("train_rev_llama", "eval_rev_llama"):
            if not (args.programs / name).is_file() or not os.access(args.programs / name, os.X_OK):
                fail(f"{args.programs / name}: no such program")
    elif args.parts != ["transformers"]:
        subprocess.run(["make", "-s", "-C", ROOT, "train_rev_llama", "eval_rev_llama"], check=True, stdout=subprocess.DEVNULL)
    for part in args.parts or ALL:
        PARTS[part](args)
    for word in args.only or []:
        if args.names and word not in args.met:
            fail(f"--only {word}: nothing is called so, of: {'; '.join(dict.fromkeys(args.names))}", 2)

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
