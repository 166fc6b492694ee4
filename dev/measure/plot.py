"""Draws what train_rev_gpt2 logs and plans, as SVG pictures; needs matplotlib. dev/measure/pictures.sh makes those of the README.

    python3 dev/measure/plot.py loss RUN... --out loss.svg
    python3 dev/measure/plot.py memory --out memory.svg [--trainer ./train_rev_gpt2] [-e d12 -b 64 -t 1024 ...]

loss: each RUN is a directory that a run was given by -o; its name is the label. memory: activations against depth, as
`train_rev_gpt2 --plan` has them; flags not known here (--channels 1024) go to the trainer as they are.
Exit status: 0 done, 1 data and files, 2 usage, 130 Ctrl-C.
"""
import argparse
import csv
import io
import math
import os
import re
import subprocess
import sys

INK, FAINT, GRID = "#24292f", "#59636e", "#e4e7eb"
GREY, BLUE, PURPLE, RED = "#3c4043", "#0072b2", "#b5588d", "#d55e00"  # told apart by the colour-blind, after Okabe and Ito
STYLES = [(GREY, "o"), (BLUE, "s"), (PURPLE, "D"), (RED, "^"), ("#009e73", "v"), ("#e69f00", "P"), ("#56b4e9", "X")]
FONTS = "-apple-system, 'Segoe UI', 'Liberation Sans', Helvetica, Arial, sans-serif"  # not wider than what is measured
DEPTHS = [12, 24, 48, 96]


def plain(text):
    """On one line, without the characters that neither a terminal nor an SVG file should get."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def fail(message, status=1):
    print("plot.py:", plain(message), file=sys.stderr)
    sys.exit(status)


def read_log(run):
    """RUN/log.csv as {split: ([step...], [loss...])}."""
    path, curves, n = os.path.join(run, "log.csv"), {"train": ([], []), "val": ([], [])}, 0
    try:
        with open(path, newline="", encoding="utf-8") as f:
            for n, row in enumerate(csv.DictReader(f), 1):
                step, loss = int(row["step"]), float(row["loss"])
                if not math.isfinite(loss):
                    raise ValueError
                for values, value in zip(curves.setdefault(row["split"], ([], [])), (step, loss)):
                    values.append(value)
    except OSError as e:
        fail(f"cannot read {path}: {e.strerror}; loss takes directories that runs were given by -o")
    except (KeyError, TypeError, ValueError, csv.Error):
        fail(f"{path}, row {n}: step,split,loss,... with numbers are meant, as train_rev_gpt2 logs them")
    if n == 0:
        fail(f"{path} has no rows; let the run take a step")
    if not curves["train"][0] and not curves["val"][0]:
        fail(f"{path} has no losses to draw; a run with --distill has them if it was given -j")
    return curves


def plan(trainer, flags):
    """What `trainer --plan` says: C, B, T and the bytes of activations."""
    try:
        done = subprocess.run([os.path.join(".", trainer), "--plan", *flags], capture_output=True, text=True, errors="replace")
    except OSError as e:
        fail(f"cannot run {trainer}: {e.strerror}; make train_rev_gpt2, or say by --trainer where it is")
    if done.returncode != 0:
        fail(f"{trainer}, status {done.returncode}: {done.stderr}", 2 if done.returncode == 2 else 1)
    match = re.search(r" C (\d+),.*\nB (\d+), T (\d+),(?:.*\n)*activations +(\d+)", done.stdout)
    return map(int, match.groups()) if match else fail(f"{trainer} --plan prints no plan; is it train_rev_gpt2?")


def axes(title, note, right):
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as e:
        fail(f"matplotlib is needed ({e}): pip install matplotlib")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "rev_gpt2", "font.family": "DejaVu Sans",
                                "font.size": 10.5, "text.color": INK, "axes.labelcolor": INK, "text.parse_math": False})
    figure = Figure(figsize=(8.4, 4.7), facecolor="white")
    figure.text(0.024, 0.925, plain(title), fontsize=14, fontweight="bold")
    figure.text(0.024, 0.868, plain(note), fontsize=10, color=FAINT)
    ax = figure.add_axes((0.085, 0.125, right - 0.085, 0.69), axisbelow=True)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color(FAINT)
    ax.grid(axis="y", color=GRID, linewidth=0.9)
    ax.tick_params(which="both", length=0, colors=FAINT, labelsize=10, pad=6)
    return figure, ax


def label_ends(ax, ends, gap):
    """Writes [(x, y, text, colour)] to the right of the axes, at least `gap` points apart."""
    ends, dots = sorted(ends, key=lambda end: end[1]), ax.figure.dpi / 72
    points = [ax.transData.transform(end[:2]) / dots for end in ends]
    heights = [y for _, y in points]
    for i in [*range(1, len(ends))] * 200:
        short = max(0, gap - (heights[i] - heights[i - 1])) / 2
        heights[i - 1], heights[i] = heights[i - 1] - short, heights[i] + short
    moved = any(abs(height - y) > 1 for height, (_, y) in zip(heights, points))
    for (x, y, text, colour), (px, py), height in zip(ends, points, heights):
        pointer = dict(arrowstyle="-", color=colour, linewidth=0.8, alpha=0.6, relpos=(0, 0.5), shrinkA=2, shrinkB=7)
        ax.annotate(text, (x, y), (ax.bbox.x1 / dots + 16 - px, height - py), textcoords="offset points", color=colour,
                    va="center_baseline", linespacing=1.3, annotation_clip=False, arrowprops=pointer if moved else None)


def draw_loss(args):
    logs = [read_log(run) for run in args.runs]
    n = max(1, max(len(log["train"][0]) for log in logs) // 50)
    figure, ax = axes(args.title or "Loss in training", args.note or "lines with markers: validation; "
                      f"faint: training{f', means of {n} steps' if n > 1 else ''}", 0.79)
    ends = []
    for i, (run, log) in enumerate(zip(args.runs, logs)):
        colour, marker = STYLES[i % len(STYLES)]
        ax.plot(*([sum(v[k:k + n]) / len(v[k:k + n]) for k in range(0, len(v), n)] for v in log["train"]),
                color=colour, alpha=0.3, linewidth=1)
        ax.plot(*log["val"], color=colour, linewidth=1.5, marker=marker, markersize=5, markeredgecolor="white",
                markeredgewidth=0.6)
        x, y = (values[-1] for values in (log["val"] if log["val"][0] else log["train"]))
        ends.append((x, y, f"{plain(os.path.basename(os.path.abspath(run)))} {y:.3f}", colour))
    ax.set(xlabel="step", ylabel="loss in nats a token", xlim=(0, max(1, 1.01 * max(end[0] for end in ends))))
    ax.xaxis.get_major_locator().set_params(integer=True)
    early = [log["val"][1][1] for log in logs if len(log["val"][1]) > 2]  # the untrained network's loss is off the scale
    if early:
        low = min(min(line.get_ydata(), default=math.inf) for line in ax.lines)
        margin = 0.06 * (max(early) - low)
        ax.set_ylim(low - margin, max(early) + margin)
    label_ends(ax, ends, 15)
    return figure


def draw_memory(args, rest):
    def series(b, mode, memory):
        plans = [plan(args.trainer, ["-e", args.e, "-b", b, "-t", args.t, "--layers", str(L), "--mode", mode,
                                     "--memory", memory, *rest]) for L in DEPTHS]
        *shape, values = zip(*plans)
        return [s[0] for s in shape], [value / 2**30 for value in values]

    (C, B, T), store = series(args.b, "baseline", "store")
    lines = [("baseline, store", store, dict(color=GREY, marker="o")),
             ("baseline, checkpoint", series(args.b, "baseline", "checkpoint")[1], dict(color=BLUE, marker="s")),
             ("midpoint, reverse", series(args.b, "midpoint", "reverse")[1], dict(color=RED, marker="D", linewidth=2.8))]
    if B > 1:
        lines.append(("baseline, store, one sequence at a time", series("1", "baseline", "store")[1],
                      dict(color=GREY, marker="o", markerfacecolor="white", linestyle=(0, (4, 2)))))
    figure, ax = axes(args.title or "Reversible networks: the same activation memory at any depth", args.note or
                      f"{B} sequences of {T} tokens, C = {C}, as train_rev_gpt2 --plan has it; "
                      "one at a time: gradients are accumulated", 0.62)
    ends = []
    for name, values, style in lines:
        ax.plot(DEPTHS, values, **{"linewidth": 1.9, "markersize": 6, **style})
        first, last = f"{values[0]:.3g}", f"{values[-1]:.3g} GiB"
        span = last if last.startswith(first) else f"{first} to {last}"
        ends.append((DEPTHS[-1], values[-1], f"{name}\n{span}", style["color"]))
    ax.set(xscale="log", yscale="log", xlabel="layers", ylabel="activations in GiB, log scale")
    low, high = ax.get_ylim()
    ticks = [4.0**i for i in range(-15, 15) if low <= 4.0**i <= high]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_xticks(DEPTHS, DEPTHS)
    ax.minorticks_off()
    label_ends(ax, ends, 31)
    return figure


def save(figure, out):
    svg = io.StringIO()
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})  # the same bytes each time
    try:
        with open(out, "w", encoding="utf-8") as f:
            f.write(svg.getvalue().replace("'DejaVu Sans'", FONTS))
    except OSError as e:
        fail(f"cannot write {out}: {e.strerror}")


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print its usage lines too
        fail(message + " (see --help)", 2)


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="loss|memory")
    loss = commands.add_parser("loss", help="training and validation loss of runs", allow_abbrev=False)
    memory = commands.add_parser("memory", help="planned activations against depth", allow_abbrev=False)
    loss.add_argument("runs", nargs="+", metavar="RUN", help="directory with log.csv")
    memory.add_argument("--trainer", default="./train_rev_gpt2", metavar="PROGRAM", help="default ./train_rev_gpt2")
    memory.add_argument("-e", default="d12", metavar="MODEL", help="default d12")
    memory.add_argument("-b", default="64", metavar="N", help="sequences, default 64")
    memory.add_argument("-t", default="1024", metavar="N", help="tokens a sequence, default 1024")
    for command in loss, memory:
        command.add_argument("--out", required=True, metavar="FILE.svg", help="the picture")
        command.add_argument("--title", metavar="S", help="instead of the usual one")
        command.add_argument("--note", metavar="S", help="the line below the title, likewise")
    args, rest = parser.parse_known_args()
    if rest and args.command == "loss":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if not args.out.endswith(".svg"):
        parser.error(f"--out {args.out}: a name that ends in .svg is meant")
    save(draw_loss(args) if args.command == "loss" else draw_memory(args, rest), args.out)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
