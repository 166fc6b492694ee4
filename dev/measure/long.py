#!/usr/bin/env python3
"""
What does one long sequence cost? Memory and time of a step against its length, for `store`, `checkpoint`, `reverse` and for PyTorch
with checkpointing, measured; and how long it can be in so much memory, by plan. dev/measure/long.md is what it found.

    python3 dev/measure/long.py measure --csv long.csv            GPT-2 124M, 1,024 to 16,384 tokens: an hour on two cores
    python3 dev/measure/long.py ends --bytes 24GiB                the longest sequence in 24 GiB, by plan
    python3 dev/measure/long.py picture --csv long.csv --out dev/pictures/long.svg

measure: contenders take turns, as in dev/bench/bench.py, whose helpers it uses: each length and contender is a process of its own,
which takes two steps, of which the second is timed. Peak memory is the whole process's. A row that is in the file already is not
measured again. ends: --trainer train_rev_gpt2cu (or train_rev_gpt2_emulated, which needs no card) has the plan of a card.
Exit status: 0 done, 1 build or files, 2 usage, 130 Ctrl-C.
"""
import argparse, array, csv, re, subprocess, sys, tempfile
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "bench")]
import bench  # noqa: E402
import plot   # noqa: E402

GIB = 1 << 30
FIELDS = ["tokens", "contender", "planned", "peak", "ms"]
OURS = {"store": ("baseline", "store"), "checkpoint": ("baseline", "checkpoint"), "reverse": ("midpoint", "reverse")}
TORCH = "PyTorch, checkpointing"
LONGEST = 1 << 20


def planned(trainer, tokens, shape, mode, memory):
    """The bytes of a step, as `trainer --plan` says."""
    command = [trainer, "-i", tokens, "-e", "d12", "--layers", shape.L, "--channels", shape.C, "--heads", shape.NH, "-b", shape.B,
               "--context", shape.T, "--mode", mode, "--memory", memory, "--plan"]
    try:
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    except OSError as e:
        bench.fail(f"cannot run {trainer}: {e.strerror}")
    total = re.search(r"^total +(\d+)", done.stdout, re.M)
    return int(total[1]) if total else bench.fail(f"{trainer}: {done.stderr.strip()}")


def read(path):
    with open(path, newline="") as f:
        return [{k: v if k == "contender" else float(v or "nan") for k, v in row.items()} for row in csv.DictReader(f)]


def measure(args, shapes):
    o = SimpleNamespace(steps=1, seconds=0, patience=args.patience, llmc=None, has={"float32"}, work=None)
    path = Path(args.csv)
    there = {(row["tokens"], row["contender"]) for row in read(path)} if path.exists() else set()
    with tempfile.TemporaryDirectory() as work, open(path, "a", newline="") as f:
        o.work = Path(work)
        bench.build(o)
        rows = csv.DictWriter(f, FIELDS)
        if not there:
            rows.writeheader()
        for shape in shapes:
            for name in [*OURS, TORCH]:
                if (shape.T, name) in there:
                    continue
                if name == TORCH:
                    total, command = "", bench.pytorch(shape, checkpointed=True, precision=args.precision)
                else:
                    total = planned(bench.ROOT / "train_rev_gpt2", o.work / "tokens.bin", shape, *OURS[name])
                    command = [*bench.ours(o, shape, *OURS[name], args.precision), "--context", str(shape.T)]
                result = bench.Measured()
                bench.measure(command, o, result)
                ms = result.ms[0] if result.ms else ""
                rows.writerow(dict(tokens=shape.T, contender=name, planned=total, peak=result.peak or "", ms=ms))
                f.flush()
                print(f"{shape.T} tokens, {name}: {result.failure or f'{ms / 1000:.1f} s, {result.peak / GIB:.2f} GiB'}", file=sys.stderr)


def ends(args, shape):
    """The longest sequences, to a hundredth."""
    with tempfile.NamedTemporaryFile(suffix=".bin") as tokens:
        tokens.write(array.array("i", [20240520, 1, 2, *[0] * 253]).tobytes() + bytes(4))
        tokens.flush()
        for name, (mode, memory) in OURS.items():
            fits, too_long = 0, LONGEST + 1
            while too_long - fits > 1 + fits // 100:
                half = (fits + too_long) // 2
                if planned(args.trainer, tokens.name, shape._replace(T=half), mode, memory) <= args.bytes:
                    fits = half
                else:
                    too_long = half
            print(f"{name}: {'at least ' * (too_long > LONGEST)}{fits} tokens")


def picture(args):
    rows = read(args.csv)
    figure, ax = plot.axes("One long sequence: what a step of GPT-2 124M needs", "whole process, measured; dashed: 24 GiB", 0.66)
    ends = []
    for (name, label), (colour, marker) in zip([("store", "store"), (TORCH, TORCH), ("checkpoint", "checkpoint"),
                                                ("reverse", "reverse")], plot.STYLES):
        points = [(row["tokens"], row["peak"] / GIB) for row in rows if row["contender"] == name and row["peak"] == row["peak"]]
        if points:
            ax.plot(*zip(*points), color=colour, marker=marker, linewidth=2.8 if name == "reverse" else 1.9, markersize=6)
            ends.append((*points[-1], f"{label}\n{points[-1][1]:.3g} GiB at {points[-1][0]:.0f}", colour))
    ax.axhline(24, color=plot.FAINT, linestyle=(0, (4, 2)), linewidth=1)
    lengths = sorted({int(row["tokens"]) for row in rows})
    ax.set(xscale="log", yscale="log", xlabel="tokens of the sequence", ylabel="GiB, log scale")
    ax.set_xticks(lengths, [f"{length:,}" for length in lengths])
    ax.set_yticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
    ax.minorticks_off()
    plot.label_ends(ax, ends, 31)
    plot.save(figure, args.out)


def size(text):
    number = re.fullmatch(r"([\d.]+) ?(GiB|GB)", text)
    if not number:
        raise argparse.ArgumentTypeError(f"{text}: such as 24GiB or 80GB is meant")
    return float(number[1]) * (GIB if number[2] == "GiB" else 10**9)


def main():
    p = plot.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("command", choices=["measure", "ends", "picture"])
    p.add_argument("--csv", default="long.csv", metavar="FILE", help="what measure adds to and picture draws (long.csv)")
    p.add_argument("--lengths", default="1024,2048,4096,8192,16384", metavar="N,N", help="tokens of the sequence")
    p.add_argument("--shape", default="12,768,12", metavar="L,C,NH", help="layers, channels, heads (12,768,12)")
    p.add_argument("--precision", default="float32", choices=bench.PRECISIONS, help="of products (float32)")
    p.add_argument("--patience", type=float, default=3600, metavar="S", help="seconds after which a contender is given up (3600)")
    p.add_argument("--trainer", default="./train_rev_gpt2", metavar="PROGRAM", help="whose plans (./train_rev_gpt2)")
    p.add_argument("--bytes", type=size, default=24 * GIB, metavar="SIZE", help="memory there is (24GiB)")
    p.add_argument("--out", default="long.svg", metavar="FILE.svg", help="the picture (long.svg)")
    args = p.parse_args()
    try:
        L, C, NH = map(int, args.shape.split(","))
        shapes = [bench.Shape(L, C, NH, 1, int(T)) for T in args.lengths.split(",")]
    except ValueError:
        p.error("--shape and --lengths take whole numbers with commas between them")
    try:
        if args.command == "measure":
            measure(args, shapes)
        elif args.command == "ends":
            ends(args, shapes[0])
        else:
            picture(args)
    except OSError as e:
        bench.fail(f"{e.filename}: {e.strerror}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
