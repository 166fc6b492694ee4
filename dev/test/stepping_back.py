"""
What stepping back takes in transformers: the peak memory of a training step and its time, beside autograd's, which keeps
everything, and beside gradient checkpointing of each block.

    python3 dev/test/stepping_back.py [--mode MODE] [--channels C] [--batch B] [--context T] [--layers L ...]

On a GPU if there is one. Peaks are without parameters and their gradients: all but a bias of the first block are frozen, as with
an adapter, and the head is left out, which takes the same for all. Each line is measured in a process of its own.
"""
import argparse, functools, subprocess, sys, time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def memory(name):
    return int(next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name)).split()[1]) * 1024


def measure(args, L, how):
    import torch
    from torch.utils.checkpoint import checkpoint
    from hf.modeling_rev_gpt2 import RevGPT2Config, RevGPT2Model
    device = "cuda" if torch.cuda.is_available() else "cpu"
    more = {"midpoint-a": [(1.25, -0.75, 0.8125, -1.1875)[k % 4] for k in range(L)], "retrofit": [-0.0625], "bdia": [-0.0625]}
    config = RevGPT2Config(256, args.context, args.channels, args.channels // 64, n_layer=L, mode=args.mode, step_size=1 / L,
                           coefficients=more.get(args.mode, ()), stem=args.mode == "retrofit")
    model = RevGPT2Model(config).to(device).train().requires_grad_(False)
    model.h[0].ln_1.bias.requires_grad_(True)
    model.gradient_checkpointing = how == "stepping back"
    if how == "checkpointing":
        for block in model.h:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)

    def step(B, T):
        model(torch.zeros(B, T, dtype=torch.long, device=device)).last_hidden_state.square().sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
    step(1, 4)  # what libraries take once
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak from now on
        before = memory("VmRSS")
    step(args.batch, args.context)
    peak = (torch.cuda.max_memory_allocated() if device == "cuda" else memory("VmHWM")) - before
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        step(args.batch, args.context)
        seconds.append(time.perf_counter() - start)
    print(f"| {args.mode} | {L} | {how} | {peak / 2**20:.0f} | {1000 * sorted(seconds)[2]:.0f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", default="midpoint")
    parser.add_argument("--channels", type=int, default=128, help="a multiple of 64")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 24, 48])
    parser.add_argument("--how", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.how:
        return measure(args, args.layers[0], args.how)
    print("| mode | L | how | MiB | ms |\n|---|---|---|---|---|", flush=True)
    for L in args.layers:
        for how in ("autograd", "checkpointing", "stepping back"):
            subprocess.run([sys.executable, *sys.argv, "--how", how, "--layers", str(L)], check=True)


if __name__ == "__main__":
    main()
