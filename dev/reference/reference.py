#!/usr/bin/env python3
"""
The seven networks of rev_gpt2 with GPT-2's block and with Llama's, written from the equations, with gradients by autograd.

This file shares nothing with the C trainer but the file formats and the meaning of the numbers in them. Each
network is the equation as printed, nothing is reversed, and the backward pass is PyTorch's: whatever the two
agree on was computed twice, in two ways.

Is every gradient of the C trainer right? DIR holds two small programs built from it, `gradients` (float32)
and `gradients_f64` (double), run as `gradients MODEL TOKENS B T STREAM MEMORY OUT`; OUT is the loss as one
float64, then every gradient in the model file's order. Here both are computed in float64.

    python3 dev/reference/reference.py check --gradients DIR
    python3 dev/reference/reference.py check --gradients DIR --block llama    gradients_llama and gradients_llama_f64

Does it also train as PyTorch trains? From a model file, in float32, with torch.optim.AdamW, beside a log:

    python3 dev/reference/reference.py train --model model_00000000.bin --tokens train.bin \\
        -b 4 -t 256 -x 20 -l 6e-4 -u 5 -q 0.1 -c 0.1 --log log.csv

Where there is something to compare, the last line is `N passed, N failed`, and the exit status 1 if any failed.
Shapes: B sequences, T tokens, C channels, NH heads, L layers, V the vocabulary, Vp its padded size in the file; with Llama's block
KH heads of keys and values, HS channels of a head, F of the MLP.
"""
import argparse, csv, math, subprocess, sys, tempfile
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import torch
import torch.nn.functional as F

MODES = ["baseline", "midpoint", "midpoint-a", "leapfrog", "hamiltonian", "retrofit", "bdia"]  # slot 8 of the header counts these

# ----------------------------------------------------------------------------------------------------------------
# The transformer blocks. `w` holds the weights of one layer, each matrix (out, in) as in torch.nn.Linear, and the model's sizes.
# A block is what it normalizes by, its attention, its MLP, what the embedding is and how the head begins.

def causal(q, k, v):
    """Attention of q, k, v, each (B, heads, T, HS), side by side: (B, T, heads HS)."""
    B, NH, T, HS = q.shape
    scores = q @ k.transpose(-2, -1) / math.sqrt(HS)                                         # (B, NH, T, T)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    att = scores.masked_fill(future, -math.inf).softmax(-1)
    return (att @ v).transpose(1, 2).reshape(B, T, NH * HS)

class GPT2:
    def LN1(w, x): return F.layer_norm(x, x.shape[-1:], w.ln1w, w.ln1b, eps=1e-5)
    def LN2(w, x): return F.layer_norm(x, x.shape[-1:], w.ln2w, w.ln2b, eps=1e-5)

    def Attn(w, x):
        B, T, C = x.shape
        qkv = F.linear(x, w.qkvw, w.qkvb)                                                    # (B, T, 3C)
        heads = (t.view(B, T, w.m.NH, C // w.m.NH).transpose(1, 2) for t in qkv.split(C, dim=2))
        return F.linear(causal(*heads), w.attprojw, w.attprojb)

    def MLP(w, x):
        return F.linear(F.gelu(F.linear(x, w.fcw, w.fcb), approximate="tanh"), w.fcprojw, w.fcprojb)

    def embed(m, tokens): return m.P["wte"][tokens] + m.P["wpe"][:tokens.shape[1]]

    def last(m, p): return F.layer_norm(p, (m.C,), m.P["lnfw"], m.P["lnfb"], eps=1e-5)

def rms(x, weight, eps):
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)

def rotary(m, x):
    """Pair i of a head at position t, elements i and i + HS/2, as a complex number, times exp(j t base^(-2 i / HS))."""
    t, i = torch.arange(x.shape[2], dtype=torch.float64), torch.arange(m.HS // 2, dtype=torch.float64)
    turn = torch.polar(torch.ones(len(t), len(i), dtype=torch.float64), torch.outer(t, m.base ** (-2 * i / m.HS)))
    z = torch.complex(x[..., :m.HS // 2], x[..., m.HS // 2:]) * turn.to(torch.complex(x[:1, :1, :1, :1], x[:1, :1, :1, :1]).dtype)
    return torch.cat([z.real, z.imag], -1)

class Llama:
    def LN1(w, x): return rms(x, w.ln1w, w.m.eps)
    def LN2(w, x): return rms(x, w.ln2w, w.m.eps)

    def Attn(w, x):
        m, (B, T, _) = w.m, x.shape
        heads = F.linear(x, w.qkvw).view(B, T, m.NH + 2 * m.KH, m.HS).transpose(1, 2)
        q, k, v = heads.split([m.NH, m.KH, m.KH], dim=1)
        shared = torch.arange(m.NH) // (m.NH // m.KH)  # query head n looks at key head n KH / NH
        return F.linear(causal(rotary(m, q), rotary(m, k)[:, shared], v[:, shared]), w.attprojw)

    def MLP(w, x):
        gate, up = F.linear(x, w.gateupw).split(w.m.F, dim=2)
        return F.linear(gate * torch.sigmoid(gate) * up, w.downw)

    def embed(m, tokens): return m.P["wte"][tokens]

    def last(m, p): return rms(p, m.P["lnfw"], m.eps)

BLOCKS = [GPT2, Llama]  # slot 14 of the header counts these

def f(b, w, p):
    A = b.Attn(w, b.LN1(w, p))
    return A + b.MLP(w, b.LN2(w, p + A))                                                # (2.5)

# ----------------------------------------------------------------------------------------------------------------
# The networks, from p^(0) = x to p^(L). The list p starts as [p^(-1), p^(0)] = [x, x], so that in layer l
# p[-1] is p^(l), p[-2] is p^(l-1), and what is appended is p^(l+1). (The paper numbers (2.2), (2.8), (2.9) from 1.)

def network(m, layers, x):
    b, h, p, q = m.block, m.h, [x, x], x
    for l, w in enumerate(layers):
        if m.mode == "baseline" or l in m.ordinary:
            q = p[-1] + b.Attn(w, b.LN1(w, p[-1]))                                      # (2.2)
            p.append(q + b.MLP(w, b.LN2(w, q)))
        elif m.mode == "midpoint":
            p.append(p[-2] + 2 * h * f(b, w, p[-1]))                                    # (2.4)
        elif m.mode == "midpoint-a":
            a = m.a[l]                                                                  # a_{j-1} in the paper
            p.append(a * p[-2] + (1 - a) * p[-1] + h * f(b, w, p[-1]))                  # (3.6)
        elif m.mode == "leapfrog":
            p.append(2 * p[-1] - p[-2] + h**2 * f(b, w, p[-1]))                         # (2.6)
        elif m.mode == "hamiltonian":  # with a = b = 1, and a step h before each force, 1 in the paper
            q = q + h * b.Attn(w, b.LN1(w, p[-1]))                                      # (2.8)
            p.append(p[-1] + h * b.MLP(w, b.LN2(w, q)))                                 # (2.9)
        elif m.mode == "retrofit":
            a, before, estimate = m.a[0], layers[l - 1], p[-1]
            for _ in range(m.K):
                estimate = p[-1] - f(b, before, estimate)                               # (4.7)
            p.append(a * p[-2] + (1 - a) * p[-1] + (f(b, w, p[-1]) + a * f(b, before, estimate)))  # (4.3), (4.5)
        elif m.mode == "bdia":  # Zhang, Lewis & Kleijn 2024
            a = m.a[0]
            p.append(a * p[-2] + (1 - a) * p[-1] + (1 + a) * f(b, w, p[-1]))
    return p[-1]

def logits_of(m, tokens):
    """Of the V tokens that exist: rows V to Vp of wte and headw are padding."""
    ends = {"wte", "wpe", "lnfw", "lnfb", "headw"}
    per_layer = {name: t.unbind(0) for name, t in m.P.items() if name not in ends}
    layers = [SimpleNamespace(m=m, **{name: t[l] for name, t in per_layer.items()}) for l in range(m.L)]
    p = network(m, layers, m.block.embed(m, tokens))                                    # (2.1)
    return F.linear(m.block.last(m, p), m.P.get("headw", m.P["wte"])[:m.V])             # (2.3), W tied to E, or of its own

def loss_of(m, tokens, targets):
    """Mean cross-entropy over the B*T targets."""
    return F.cross_entropy(logits_of(m, tokens).flatten(0, 1), targets.flatten())

# ----------------------------------------------------------------------------------------------------------------
# Files: 256 int32 of header, then the data, all little endian.

def shapes(m):
    """The tensors in the file's order, which is llm.c's; those of the blocks are stacked over the layers."""
    L, C = m.L, m.C
    if m.block is Llama:
        sizes = {"wte": (m.Vp, C), "ln1w": (L, C), "qkvw": (L, (m.NH + 2 * m.KH) * m.HS, C), "attprojw": (L, C, m.NH * m.HS),
                 "ln2w": (L, C), "gateupw": (L, 2 * m.F, C), "downw": (L, C, m.F), "lnfw": (C,)}
        return sizes if m.tied else sizes | {"headw": (m.Vp, C)}
    return {"wte": (m.Vp, C), "wpe": (m.maxT, C), "ln1w": (L, C), "ln1b": (L, C), "qkvw": (L, 3*C, C),
            "qkvb": (L, 3*C), "attprojw": (L, C, C), "attprojb": (L, C), "ln2w": (L, C), "ln2b": (L, C),
            "fcw": (L, 4*C, C), "fcb": (L, 4*C), "fcprojw": (L, C, 4*C), "fcprojb": (L, C), "lnfw": (C,), "lnfb": (C,)}

def split(m, flat):
    """One flat array, cut into the tensors of shapes(m)."""
    sizes = [math.prod(s) for s in shapes(m).values()]
    if flat.size != sum(sizes):
        raise ValueError(f"{flat.size} numbers where the model has {sum(sizes)}")
    parts = np.split(flat, np.cumsum(sizes)[:-1])
    return {name: part.reshape(s) for (name, s), part in zip(shapes(m).items(), parts)}

def read_model(path, dtype):
    header = np.fromfile(path, "<i4", 256)
    if len(header) < 256 or header[0] != 20240326:
        sys.exit(f"{path}: not a model file")
    mode, block = (int(header[8]), int(header[14])) if header[1] == 1003 else (0, 0)
    if header[1] not in (3, 1003) or not 0 <= mode < len(MODES) or not 0 <= block < len(BLOCKS):
        sys.exit(f"{path}: version {header[1]}, mode {mode}, block {block}: this file reads float32 (3 or 1003), modes 0 to 6, blocks 0 and 1")
    m = SimpleNamespace(**dict(zip(("maxT", "V", "L", "NH", "C", "Vp"), map(int, header[2:8]))), mode=MODES[mode], block=BLOCKS[block])
    m.KH, m.F, _, _, m.tied, m.HS = map(int, header[240:246])
    m.base, m.eps = map(float, header[242:244].view("<f4"))
    m.h = float(header[9:10].view("<f4")[0])
    m.K, stem, bits = int(header[11]), int(header[12]), header[17:25].view("<u4")
    m.ordinary = [l for l in range(min(m.L, 256)) if (l < stem if stem >= 0 else bits[l // 32] >> l % 32 & 1)]  # steps of conversions
    m.a = [int(n) / 2**int(header[13] or 4) for n in header[16:16 + m.L]]
    parts = split(m, np.fromfile(path, "<f4", offset=1024))
    m.P = {name: torch.from_numpy(part).to(dtype, copy=True).requires_grad_() for name, part in parts.items()}
    return m

def read_tokens(path, V):
    header = np.fromfile(path, "<i4", 256)
    if len(header) < 256 or header[0] != 20240520 or header[1] != 1 or (header[3] or 50257) != V:
        sys.exit(f"{path}: not a token file for a vocabulary of {V}")
    return np.memmap(path, "<u2", "r", offset=1024, shape=(int(header[2]),))

def batch(tokens, i, B, T):
    """Batch i: B*T tokens from i*B*T on, and the targets one further; after the last whole batch, the first again."""
    i %= (len(tokens) - 1) // (B * T)
    chunk = torch.from_numpy(tokens[i*B*T : (i+1)*B*T + 1].astype(np.int64))
    return chunk[:-1].view(B, T), chunk[1:].view(B, T)

# ----------------------------------------------------------------------------------------------------------------
# check: the C programs against autograd in float64, for every network.

TOLERANCE = {("gradients", "float"): 1e-4, ("gradients", "fixed"): 1e-3, ("gradients_f64", "float"): 1e-9}

def draw_a(rng, L):
    """The a_k of (3.7) in sixteenths, redrawn until both signs occur and the remainders to undo them fit 16 bits."""
    while True:
        a = np.rint(16 * (rng.choice([1, -1], L) + 0.5 * rng.uniform(-1, 1, L))).astype(int)
        R, largest = 0, 0
        for n in a:
            R = (16 * R + 15) // abs(int(n))
            largest = max(largest, R)
        if largest < 2**16 and a.min() < 0 < a.max():
            return a

CONVERSIONS = {  # coefficient in sixteenths, K, ordinary steps
    "retrofit 1": ("retrofit", 16, 1, [0, 1]), "retrofit -1/4, K=2": ("retrofit", -4, 2, [0]), "retrofit 3/16, K=3": ("retrofit", 3, 3, [0, 2, 4]),
    "bdia -1/16": ("bdia", -1, 0, [0, 1]), "bdia 1, no stem": ("bdia", 16, 0, []), "bdia -1/4, 1 3 4": ("bdia", -4, 0, [1, 3, 4])}

def write_random_model(path, name, rng, block, tied):
    """Small and odd-sized; every tensor is random, the padding of wte too, so that no zero hides a mistake."""
    m = SimpleNamespace(maxT=64, V=65, L=5, NH=3, C=60, Vp=128, block=block)
    if block is Llama:
        m.NH, m.KH, m.HS, m.F, m.tied = 6, 2, 10, 44, tied
    mode, sixteenths, K, ordinary = CONVERSIONS.get(name, (name, 0, 0, []))
    h = {"midpoint": 0.25, "leapfrog": 1 / math.sqrt(m.L)}.get(mode, 1)
    header = np.zeros(256, "<i4")
    header[:9] = 20240326, 3 if mode == "baseline" and block is GPT2 else 1003, m.maxT, m.V, m.L, m.NH, m.C, m.Vp, MODES.index(mode)
    header[9:10] = np.array([h], "<f4").view("<i4")
    header[10:13] = {"baseline": 0}.get(mode, 20), K, len(ordinary)
    if ordinary != list(range(len(ordinary))):
        header[12], header[17] = -1, sum(1 << l for l in ordinary)
    header[14], header[16] = BLOCKS.index(block), sixteenths
    if block is Llama:
        header[[240, 241, 244, 245]] = m.KH, m.F, m.tied, m.HS
        header[242:244] = np.array([1000, 1e-3], "<f4").view("<i4")
    if mode == "midpoint-a":
        header[16:16 + m.L] = draw_a(rng, m.L)
    with open(path, "wb") as out:
        out.write(header.tobytes())
        for name, shape in shapes(m).items():
            gain = name in ("ln1w", "ln2w", "lnfw")
            out.write((gain + 0.15 * rng.standard_normal(shape)).astype("<f4").tobytes())

def compare(m, loss, out, dtype):
    """Relative differences of the C program's answer: the loss, each tensor, and the padding of wte and headw (which must be 0)."""
    try:
        raw = Path(out).read_bytes()
        their_loss = np.frombuffer(raw[:8], "<f8")[0]
        theirs = split(m, np.frombuffer(raw[8:], dtype).astype(np.float64))
    except (OSError, ValueError, IndexError) as e:
        print(f"    no answer that can be read: {e}")
        return {name: math.inf for name in ["loss", *m.P, "wte[V:]"]}
    diff = {"loss": abs(their_loss - loss) / abs(loss)}
    for name, p in m.P.items():
        g = p.grad.numpy()
        diff[name] = np.linalg.norm(theirs[name] - g) / np.linalg.norm(g)
    diff["wte[V:]"] = 0.0 if not any(theirs[name][m.V:].any() for name in ("wte", "headw") if name in theirs) else math.inf
    return {name: math.inf if math.isnan(d) else float(d) for name, d in diff.items()}

def check(args):
    B, T, rng, passed, failed = 3, 37, np.random.default_rng(args.seed), 0, 0
    suffix, block = {"gpt2": ("", GPT2), "llama": ("_llama", Llama)}[args.block]
    programs = {name: Path(args.gradients, name.replace("gradients", "gradients" + suffix)).absolute() for name in ("gradients", "gradients_f64")}
    for path in programs.values():
        if not path.is_file():
            sys.exit(f"{path}: no such program")
    print(f"{'network':18} {'program':14} {'stream':7} {'memory':11} {'loss':>9} {'worst':>9}  tensor")
    with tempfile.TemporaryDirectory() as tmp:
        model, data, out = (Path(tmp, name) for name in ("model.bin", "tokens.bin", "out.bin"))
        for number, mode in enumerate([*MODES[:5], *CONVERSIONS]):
            write_random_model(model, mode, rng, block, number % 2)
            m = read_model(model, torch.float64)
            header = np.zeros(256, "<i4")
            header[:4] = 20240520, 1, B * T + 1, m.V
            data.write_bytes(header.tobytes() + rng.integers(0, m.V, B * T + 1).astype("<u2").tobytes())
            loss = loss_of(m, *batch(read_tokens(data, m.V), 0, B, T))
            loss.backward()
            for (program, stream), tolerance in TOLERANCE.items():
                for memory in ("store", "checkpoint", "reverse"):
                    if mode == "baseline" and (stream == "fixed" or memory == "reverse"):
                        continue
                    if memory == "reverse" and stream == "float" and program == "gradients" and mode in CONVERSIONS and abs(m.a[0]) < 0.5:
                        continue  # which the trainer refuses: a step back multiplies every rounding by 1/a
                    out.unlink(missing_ok=True)
                    run = subprocess.run([programs[program], model, data, str(B), str(T), stream, memory, out])
                    if run.returncode:
                        print(f"    exit status {run.returncode}")
                        out.unlink(missing_ok=True)
                    diff = compare(m, loss.item(), out, "<f8" if program == "gradients_f64" else "<f4")
                    wrong = [name for name, d in diff.items() if not d <= tolerance]
                    worst = max((name for name in diff if name != "loss"), key=diff.get)
                    print(f"{mode:18} {program:14} {stream:7} {memory:11} {diff['loss']:9.1e} {diff[worst]:9.1e}  {worst}"
                          + (f"   FAILED (beyond {tolerance:.0e}): {' '.join(wrong)}" if wrong else ""), flush=True)
                    passed, failed = passed + len(diff) - len(wrong), failed + len(wrong)
    print("comparisons, in each row the loss, each tensor's gradient, and the padded rows of wte and headw:")
    return passed, failed

# ----------------------------------------------------------------------------------------------------------------
# train: nanoGPT's recipe, beside the log of the C trainer.

def learning_rate(it, args):
    if it < args.u:
        return args.l * (it + 1) / (args.u + 1)
    cosine = 0.5 * (1 + math.cos(math.pi * (it - args.u) / (args.x - args.u)))
    return args.q * args.l + cosine * (args.l - args.q * args.l)

def train(args):
    m = read_model(args.model, torch.float32)
    tokens = read_tokens(args.tokens, m.V)
    if args.t > m.maxT or len(tokens) <= args.b * args.t:
        sys.exit(f"a batch is {args.b} x {args.t} tokens: the model reads {m.maxT} at most, the file has {len(tokens)}")
    log = {}
    if args.log:
        with open(args.log, newline="") as file:
            log = {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file) if row["split"] == "train"}
    decayed = {"wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw", "gateupw", "downw", "headw"}  # what is a matrix within one layer
    groups = [{"params": [p for name, p in m.P.items() if name in decayed], "weight_decay": args.c},
              {"params": [p for name, p in m.P.items() if name not in decayed], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.l, betas=(args.beta1, args.beta2), eps=1e-8)
    passed = failed = 0
    worst = 0.0
    for it in range(args.x):
        lr = learning_rate(it, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        loss = loss_of(m, *batch(tokens, it, args.b, args.t))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(m.P.values(), 1.0)
        optimizer.step()
        step = it + 1  # as the log counts
        line = f"step {step:5d}  loss {loss.item():.6f}  norm {norm.item():.4f}  lr {lr:.3e}"
        if args.log:
            diff = abs(log.get(step, math.inf) - loss.item())
            ok = diff <= args.tolerance  # false for NaN as well
            passed, failed, worst = passed + ok, failed + (not ok), max(worst, math.inf if math.isnan(diff) else diff)
            line += f"  log {log[step]:.6f}  difference {diff:.1e}" if step in log else "  not in the log"
            line += "" if ok else "  FAILED"
        print(line, flush=True)
    if args.log:
        print(f"worst difference of the loss {worst:.1e} (tolerance {args.tolerance:.0e}); steps:")
    return passed, failed

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    c = commands.add_parser("check", help="every gradient of the C trainer against autograd in float64")
    c.add_argument("--gradients", metavar="DIR", required=True, help="where gradients and gradients_f64 are")
    c.add_argument("--block", choices=["gpt2", "llama"], default="gpt2", help="llama: gradients_llama and gradients_llama_f64 are there")
    c.add_argument("--seed", type=int, default=1, help="of the random weights and tokens")
    t = commands.add_parser("train", help="train a model file; compare with the C trainer's log")
    t.add_argument("--model", metavar="FILE", required=True)
    t.add_argument("--tokens", metavar="FILE", required=True)
    for flag, kind, default, what in [("-b", int, 4, "sequences a batch"), ("-t", int, 256, "tokens a sequence"),
                                      ("-x", int, None, "steps"), ("-l", float, None, "learning rate"),
                                      ("-u", int, 0, "warmup steps"), ("-q", float, 0.0, "final rate, a fraction of -l"),
                                      ("-c", float, 0.0, "weight decay"), ("--beta1", float, 0.9, "of AdamW"),
                                      ("--beta2", float, 0.95, "of AdamW")]:
        t.add_argument(flag, type=kind, default=default, required=default is None, help=what)
    t.add_argument("--log", metavar="LOG.csv", help="the C trainer's log of the same run")
    t.add_argument("--tolerance", type=float, default=1e-3, help="on the loss of a step, absolute")
    args = parser.parse_args()
    passed, failed = {"check": check, "train": train}[args.command](args)
    if args.command == "check" or args.log:
        print(f"{passed} passed, {failed} failed")
    sys.exit(1 if failed else 0)

if __name__ == "__main__":
    main()
