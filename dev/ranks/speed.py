"""How fast ranks may be: tokens a second by a model of cards and networks. README.md says what it assumes.

    python3 dev/ranks/speed.py                          the table of README.md: an estimate, nothing in it is measured
    python3 dev/ranks/speed.py --tokens-per-second 400e3 --model 124M --ranks 8,64     with the speed of one of your cards

What a trainer measures (its line `exchange: ...`) beside a row of this says where the model is wrong.
"""
import argparse

SIZES = {"124M": (12, 768), "350M": (24, 1024), "774M": (36, 1280), "1558M": (48, 1600)}  # layers, channels
T, V, A_NODE = 1024, 50304, 8
PEAK, REACHED = 989e12, 0.40          # FLOP/s of an H100 (SXM) in bf16, and what share of it a step reaches
NVLINK, NETWORK = 450e9, 50e9         # bytes/s, each way, of a card: NVLink 4; 400 Gb/s InfiniBand
SHARE_OF_LINK, MEMORY = 0.8, 3.35e12 * 0.8
LATENCY, PIECE = 20e-6, 32 << 20      # seconds a group of messages; bytes of a piece


def flops_a_token(layers, channels):
    """Of training with one more forward pass of the blocks, as the trainer counts them"""
    forward = 24 * channels**2 + 2 * channels * T
    back = 48 * channels**2 + 5 * channels * T
    return layers * (2 * forward + back) + 6 * channels * V


def parameters(layers, channels):
    return layers * (12 * channels**2 + 13 * channels) + (V + T + 2) * channels


def exchange(P, ranks):
    """Seconds of a round, and of the parameters: every card sends each other one 4 P / ranks bytes."""
    each, near = 4 * P / ranks, min(ranks, A_NODE) - 1
    far = ranks - 1 - near
    sent = max(each * near / NVLINK, each * far / NETWORK) / SHARE_OF_LINK
    pieces = -(-each // PIECE)
    added = 12 * P / MEMORY  # each lane's shard is read, and the sum read and written
    return sent + pieces * LATENCY + added, sent + LATENCY


def step(P, ranks, count, lanes, c, overlap):
    """Seconds, of `count` micro-batches of c seconds each in so many lanes; --overlap hides all rounds but the last"""
    most = max(sum(count * (lane + 1) // lanes - count * lane // lanes for lane in range(r, lanes, ranks)) for r in range(ranks))
    a_round, of_parameters = exchange(P, ranks)
    rounds = -(-lanes // ranks)
    hidden = min(a_round, most / rounds * c) * (rounds - 1) if overlap else 0
    return most * c + rounds * a_round - hidden + of_parameters


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="124M,1558M")
    parser.add_argument("--ranks", default="8,64")
    parser.add_argument("--batch", type=int, default=0, help="sequences a micro-batch (124M 16, others 8)")
    parser.add_argument("--tokens", type=int, default=0, help="a step (64 Ki a rank, from 64 ranks on 32 Ki)")
    parser.add_argument("--tokens-per-second", type=float, default=0, help="what one card has reached")
    a = parser.parse_args()
    print("| model | ranks | tokens a step | micro-batch, its seconds | a round | parameters | lanes | tokens/s | of that many cards |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in a.model.split(","):
        P, flops, batch = parameters(*SIZES[name]), flops_a_token(*SIZES[name]), a.batch or (16 if name == "124M" else 8)
        one = a.tokens_per_second or PEAK * REACHED / flops
        c = batch * T / one
        for ranks in map(int, a.ranks.split(",")):
            count = (a.tokens or ranks * (65536 if ranks < 64 else 32768)) // (batch * T)
            for lanes, overlap in [(count, False), (count, True), (min(ranks, count), False), (1, False)]:
                speed = count * batch * T / step(P, ranks, count, lanes, c, overlap)
                a_round, of_parameters = exchange(P, ranks)
                print(f"| {name} | {ranks} | {count * batch * T:,} | {batch} x {T}, {c * 1e3:.0f} ms | {a_round * 1e3:.1f} ms | "
                      f"{of_parameters * 1e3:.1f} ms | {lanes}{', --overlap' * overlap} | {speed / 1e3:,.0f}k | {speed / one / ranks:.0%} |")


if __name__ == "__main__":
    main()
