#!/usr/bin/env python3
"""
What does converting a pretrained network into a reversible one cost? The figures of dev/measure/conversion.md.

    python3 dev/measure/conversion.py TEXT OUT [teacher sweep layers distill plot]

Without names, everything in this order; what OUT holds already is not done again. TEXT is trained on as bytes, its last tenth held out.
    teacher  a baseline of 12 layers, 5000 steps, the checkpoint with the best validation loss (15 minutes on two cores)
    sweep    converted by each coefficient, K and stem, nothing trained: OUT/sweep.csv (10 minutes)
    layers   how large the force is beside the state, how far one converted step misses, and a whole pass: OUT/layers.csv (PyTorch)
    distill  500 steps with KL(Y_rev, Y_fe) (4.6), on a tenth of the teacher's tokens: OUT/NAME/log.csv (20 minutes)
    plot     dev/pictures/conversion.svg and distillation.svg from these
Losses are of the first 40 batches held out, 40,960 bytes.
"""
import csv, re, shutil, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHAPE = "-e d6 --layers 12 --channels 128 --heads 4 --context 64"
BATCH = "-b 16 -t 64 -m 40"
TRAINING = "--beta2 0.99 --shuffle -q 0.1"
COEFFICIENTS = [1, 1/2, 1/4, 1/8, 1/16, 1/64]
RUNS = {  # name: flags, learning rate
    "retrofit a=1": ("--mode retrofit --coefficient 1", 3e-4),
    "retrofit a=1/4": ("--mode retrofit --coefficient 0.25", 1e-4), "retrofit a=-1/4": ("--mode retrofit --coefficient -0.25", 1e-4),
    "bdia a=1/4": ("--mode bdia --coefficient 0.25", 1e-4), "bdia a=-1/4": ("--mode bdia --coefficient -0.25", 1e-4),
    "bdia a=-1/16": ("--mode bdia --coefficient -0.0625", 1e-4)}

def run(program, flags, **files):
    """flags are words; files become -i, -j, -e, -o or --distill."""
    command = [ROOT / program, *flags.split(), *(x for flag, path in files.items() for x in (f"--{flag}" if flag[1:] else f"-{flag}", path))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"conversion.py: {' '.join(map(str, command))}: {done.stderr.strip()}")
    return done.stdout

def table(path, rows):
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows(rows)
def read(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))

def teacher(out, text):
    subprocess.run([sys.executable, ROOT / "prepro_owt.py", "--text", text, "--tokenizer", "byte", "--val", "last:10%", "--out", out], check=True)
    run("train_rev_gpt2", f"{SHAPE} {BATCH} {TRAINING} --mode baseline -x 5000 -l 1e-3 -u 100 -v 250 -n 250 -y 1", i=out / "train_000000.bin", j=out / "val_000000.bin",
            o=out / "teacher_run")
    rows = [row for row in read(out / "teacher_run/log.csv") if row["split"] == "val"]
    best = min(rows[1:], key=lambda row: float(row["loss"]))
    shutil.copy(out / f"teacher_run/model_{int(best['step']):08d}.bin", out / "teacher.bin")
    print(f"the teacher: validation loss {best['loss']} after {best['step']} steps")

def sweep(out, _):
    pattern = re.compile(r"loss ([\d.]+),.*teacher ([\d.]+) \| KL ([-\d.e+]+) \| same top token ([\d.]+)")
    kinds = [(a, 1, 2) for a in COEFFICIENTS] + [(1/4, K, 2) for K in (0, 2, 3)] + [(1/16, K, 2) for K in (0, 2, 3)] + [(a, 1, stem) for a in (1/4, 1/16) for stem in (1, 3, 4)]
    rows = [("mode", "a", "K", "stem", "loss", "teacher", "kl", "agreement")]
    for mode in ("retrofit", "bdia"):
        for size, K, stem in kinds:
            for a in (size, -size):
                if mode == "bdia" and (K != 1 or a == -1):
                    continue
                flags = f"--mode {mode} --coefficient {a} --stem {stem}" + (f" --fixed-point {K}" if mode == "retrofit" else "")
                said = run("eval_rev_gpt2", f"{BATCH} {flags}", e=out / "teacher.bin", distill=out / "teacher.bin", j=out / "val_000000.bin")
                rows.append((mode, a, K if mode == "retrofit" else "", stem, *pattern.search(said).groups()))
                print(*rows[-1])
    table(out / "sweep.csv", rows)

def layers(out, _):
    """Medians over tokens. Along the baseline's own states p_j: |f_j(p_j)| / |p_j|; how much f_{j-1} shrinks the difference of p_j and
    p_{j-1}; and by how much of |p_{j+1}| the one step to it misses, for a = 1, since that is proportional to a. Then how far a whole
    converted pass is from the baseline's state, relative."""
    sys.path.insert(0, str(ROOT / "dev/reference"))
    import torch, reference as r
    from types import SimpleNamespace
    m = r.read_model(out / "teacher.bin", torch.float64)
    tokens, _ = r.batch(r.read_tokens(out / "val_000000.bin", m.V), 0, 32, 64)
    per_layer = {name: t.unbind(0) for name, t in m.P.items() if name not in ("wte", "wpe", "lnfw", "lnfb")}
    blocks = [SimpleNamespace(m=m, **{name: t[l] for name, t in per_layer.items()}) for l in range(m.L)]
    def f(w, p):
        return r.f(m.block, w, p)
    def ratio(x, y):
        return (x.norm(dim=-1) / y.norm(dim=-1)).median().item()
    def converted(mode, a, stem=2):
        p = [x]
        for j, w in enumerate(blocks):
            force, before = f(w, p[j]), blocks[j - 1]
            if j < stem:
                p.append(p[j] + force)
            elif mode == "bdia":
                p.append(a * p[j - 1] + (1 - a) * p[j] + (1 + a) * force)
            else:
                p.append(a * p[j - 1] + (1 - a) * p[j] + force + a * f(before, p[j] - f(before, p[j])))
        return p
    passes = [("retrofit", 1), ("retrofit", -1), ("retrofit", 1/4), ("bdia", -1/4), ("bdia", -1/16)]
    with torch.no_grad():
        x = m.P["wte"][tokens] + m.P["wpe"][:64]
        p, rows = [x], []
        for j, w in enumerate(blocks):
            force, before = f(w, p[j]), blocks[j - 1]
            p.append(p[j] + force)
            if j == 0:
                rows.append([0, ratio(force, x), *[""] * 6])
                continue
            true, estimate, misses = f(before, p[j - 1]), p[j], []
            for K in range(4):
                misses.append(ratio(f(before, estimate) - true, p[j + 1]))
                estimate = p[j] - f(before, estimate)                                     # (4.7)
            rows.append([j, ratio(force, p[j]), ratio(f(before, p[j]) - true, true), *misses, ratio(force - true, p[j + 1])])
        for mode, a in passes:
            for row, here, there in zip(rows, converted(mode, a)[1:], p[1:]):
                row.append(ratio(here - there, there))
    table(out / "layers.csv", [("layer", "force", "contraction", "K0", "K1", "K2", "K3", "bdia", *(f"{mode} {a}" for mode, a in passes)), *rows])
    for row in rows:
        print(*(f"{x:.4f}" if isinstance(x, float) else x for x in row))

def folder(out, name):
    return out / name.replace(" ", "_").replace("/", "_")

def distill(out, _):
    for name, (flags, rate) in RUNS.items():
        if not (folder(out, name) / "model_00000500.bin").exists():
            said = run("train_rev_gpt2", f"{BATCH} {TRAINING} {flags} --stem 2 -x 500 -l {rate} -u 20 -v 50 -y 1", i=out / "train_000000.bin", j=out / "val_000000.bin",
                           e=out / "teacher.bin", distill=out / "teacher.bin", o=folder(out, name))
            print(name, *re.findall(r"validation (loss .*)", said)[-1:], flush=True)

def plot(out, _):
    import matplotlib
    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"svg.hashsalt": "0", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    rows, (figure, (left, right)) = read(out / "sweep.csv"), plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for mode, color in (("retrofit", "#0072b2"), ("bdia", "#d55e00")):
        for sign, style in ((1, "o-"), (-1, "s--")):
            line = sorted((abs(float(r["a"])), float(r["kl"])) for r in rows
                          if r["mode"] == mode and r["stem"] == "2" and r["K"] in ("1", "") and float(r["a"]) * sign > 0 and float(r["kl"]) > 0)
            left.loglog(*zip(*line), style, color=color, label=f"{mode}, a {'<>'[sign > 0]} 0", markersize=4)
    left.set(xlabel="|a|", ylabel="KL to the original, nats a byte", title="Converted, nothing trained")
    rows = read(out / "layers.csv")
    right.semilogy([int(r["layer"]) for r in rows], [float(r["force"]) for r in rows], "k.-", label="|f(p)| / |p|")
    for column, color, label in (("K1", "#0072b2", "retrofit, K=1"), ("K2", "#56b4e9", "retrofit, K=2"), ("K3", "#009e73", "retrofit, K=3"), ("bdia", "#d55e00", "bdia")):
        right.semilogy([int(r["layer"]) for r in rows[1:]], [float(r[column]) for r in rows[1:]], ".-", color=color, label=f"a step's miss / a, {label}")
    right.set(xlabel="layer", ylabel="relative to the state", title="One step, along the original's states")
    for axes in (left, right):
        axes.legend(fontsize=7, frameon=False)
        axes.grid(alpha=0.3)
    figure.savefig(ROOT / "dev/pictures/conversion.svg", metadata={"Date": None})
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name in RUNS:
        log = read(folder(out, name) / "log.csv")
        curve = [(int(row["step"]), float(row["loss"])) for row in log if row["split"] == "val"]
        axes.plot(*zip(*curve), ".-", label=name, markersize=4)
        of_teacher = [float(row["loss"]) for row in log if row["split"] == "val_teacher"][0]
    axes.axhline(of_teacher, color="k", linewidth=0.8, label="the original")
    axes.set(xlabel="steps of distillation", ylabel="validation loss, nats a byte", ylim=(of_teacher - 0.01, of_teacher + 0.1))
    axes.legend(fontsize=7, frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(ROOT / "dev/pictures/distillation.svg", metadata={"Date": None})

PARTS = {"teacher": (teacher, "teacher.bin"), "sweep": (sweep, "sweep.csv"), "layers": (layers, "layers.csv"), "distill": (distill, "-"), "plot": (plot, "-")}

def main():
    if len(sys.argv) < 3 or not set(sys.argv[3:]) <= set(PARTS):
        asked = sys.argv[1:] == ["--help"]
        print(__doc__.strip() if asked else "conversion.py: TEXT OUT [teacher sweep layers distill plot] is meant; --help says more", file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    text, out = Path(sys.argv[1]), Path(sys.argv[2])
    if not text.is_file():
        sys.exit(f"conversion.py: {text}: no such file")
    subprocess.run(["make", "-s", "-C", ROOT, "train_rev_gpt2", "eval_rev_gpt2"], check=True)
    for name, (part, result) in PARTS.items():
        if name in sys.argv[3:] or (len(sys.argv) == 3 and not (out / result).exists()):
            part(out, text)

if __name__ == "__main__":
    main()
