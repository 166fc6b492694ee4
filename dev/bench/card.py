#!/usr/bin/env python3
"""
What dev/bench/card.sh asks of Python: rows out of what programs print, the table of a run, the largest batch
by plan, PyTorch's attention. Standard library alone, but for `attention`.

    card.py tokens FILE COUNT VOCABULARY            random tokens in llm.c's format
    card.py largest BYTES PROGRAM FLAGS...          the most sequences whose plan fits into so many bytes
    card.py attention DEVICE B T NH HS              PyTorch's scaled_dot_product_attention, by backend
    card.py row ROWS PART WHAT STATUS               a program's output on stdin: its rows, added to a file
    card.py table ROWS                              what is printed at the end of a run
"""
import argparse, array, csv, math, os, random, re, statistics, subprocess, sys, time

COLUMNS = ("at_s", "part", "what", "outcome", "tokens_per_s", "ms", "gib", "note")
BARS = {"H100": (430_000, 475_000), "H200": (430_000, 475_000)}  # tokens/s of GPT-2 124M: to reach, to aim at
MOST_LINES, MOST_OF_A_PART, MOST_DETAILS = 150, 26, 9
STEP = re.compile(r"^step +\d+.*?\| loss ([\d.]+|-?nan|inf).*?\| ([\d.]+) ms(?: \| (\d+) tokens/s)?", re.M)
COUNTS = re.compile(r"^(?:\w+:\s*)?(\d+) passed, (\d+) failed", re.M)
TIMED = re.compile(r"^(.+), version \d+, .*, best ([\d.]+) ms, median .* ms, (.+), (\d+)% of the limit", re.M)
PROFILED = re.compile(r"^(\w+|\(\w+\)) +(\d+) +([\d.]+) +([\d.]+)% +[\d.]+ +[\d.]+ +[\d.]+ +([\d.]+)$", re.M)
PEER = re.compile(r"^(sdpa, .+): best ([\d.]+) ms", re.M)
UNITS = {"us": 1e3, "ms": 1e6, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}  # beside ns and bytes
SANITIZED = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")


def median_of_later(values):
    """Without the first two steps, which allocate and choose, as far as there are more."""
    return statistics.median(values[2:] or values[1:] or values)


def compared(losses, file):
    """How far the losses are from those of a file, and whether that is near: bf16 against float32."""
    with open(file) as f:
        should = [float(line) for line in f]
    apart = [abs(a - b) for a, b in zip(losses, should)]
    if not should or len(losses) != len(should):
        return f"{len(losses)} steps instead of {len(should)}", False
    note = f"{len(should)} steps, at most {max(apart):.4f} apart, mean {sum(apart) / len(apart):.5f}"
    return note, max(apart) <= 0.01 and sum(apart) / len(apart) <= 0.002


def last_line(text):
    return (text.strip().splitlines() or [""])[-1][:100]


def complaint(text):
    """The last line that names an error or its program; stdout may come after it."""
    lines = [line for line in text.splitlines() if re.match(r"[\w.]+: |.*error", line, re.I)]
    return lines[-1][:100] if lines else last_line(text)


def outcome_of(status, right):
    if status in (124, 137):
        return "time over"
    if status:
        return f"failed ({status})"
    return "right" if right else "wrong"


def main_row(text, tokens, losses_file):
    """The row of the whole output, and whether what it says is right."""
    row, right, notes = {}, True, []
    steps, counts, sanitized = STEP.findall(text), COUNTS.findall(text), SANITIZED.findall(text)
    if steps:
        tokens = int((re.search(r"(\d+) tokens a step", text) or [0, tokens])[1])
        rates = [float(rate) if rate else 1000 * tokens / float(ms) for _, ms, rate in steps]
        row["tokens_per_s"] = round(median_of_later(rates))
        row["ms"] = f"{1000 * tokens / max(median_of_later(rates), 1):.1f}"
        losses = [float(loss) for loss, _, _ in steps]
        right = all(map(math.isfinite, losses))
        notes.append(f"loss {losses[0]:.3f} to {losses[-1]:.3f}")
        if losses_file:
            note, right = compared(losses, losses_file)
            notes = [note]
    peaks = [float(gib) for gib in re.findall(r"^step .*\| ([\d.]+) GiB", text, re.M)]
    peaks += [int(size) / (1 << 30) for size in re.findall(r"^peak (\d+)", text, re.M)]
    if peaks:
        row["gib"] = f"{max(peaks):.2f}"
    if any(drift != "0" for drift in re.findall(r"\| drift (\S+)", text)):
        notes.append("drift is not 0")
        right = False
    bound = re.search(r"at most ([\d.]+) of the speed of store", text)
    if bound:
        notes.append(f"bound {bound[1]}")
    if counts:
        notes.append(f"{counts[-1][0]} passed, {counts[-1][1]} failed")
        right = right and counts[-1][0] != "0" and counts[-1][1] == "0"
    for errors, hazards in sanitized:
        notes.append(f"{errors or hazards} {'errors' if errors else 'hazards'}")
        right = right and (errors or hazards) == "0"
    return {**row, "note": "; ".join(notes)}, right


def detail_rows(text):
    """A row for each kernel that was timed, each layer function of a profile, each backend."""
    for what, best, rate, share in TIMED.findall(text):
        yield {"what": what, "ms": best, "note": f"{rate}, {share}% of the limit"}
    for what, best in PEER.findall(text):
        yield {"what": what, "ms": best}
    for what, calls, ms, share, times in sorted(PROFILED.findall(text), key=lambda found: -float(found[2])):
        yield {"what": what, "ms": ms, "note": f"{share}%, {calls} calls, {times} of the floor"}
    yield from kernels_counted(text)


def kernels_counted(text):
    """Nsight Compute's CSV, from the first embedding on, where a step begins: kernels, the slowest first."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return
    sums, begun = {}, False
    for line in csv.DictReader(lines[start:]):
        name = re.sub(r"^void |\(int\)|\((?!int\)).*", "", line["Kernel Name"] or "")
        begun = begun or "embed" in name
        try:
            value = float(line["Metric Value"].replace(",", "")) * UNITS.get(line["Metric Unit"], 1)
        except (AttributeError, ValueError):  # a line cut short, or a metric that this card has not
            continue
        if begun:
            sums.setdefault(name, {}).setdefault(line["Metric Name"], []).append(value)
    total = {name: sum(kernel.get("gpu__time_duration.sum", [0])) for name, kernel in sums.items()}
    for name in sorted(sums, key=total.get, reverse=True):
        launches = len(sums[name].get("gpu__time_duration.sum", []))
        bandwidth = sum(sums[name].get("dram__bytes.sum", [0])) / max(total[name], 1)
        registers = max(sums[name].get("launch__registers_per_thread", [0]))
        note = f"{launches} launches, {bandwidth:.0f} GB/s, {registers:.0f} registers"
        yield {"what": name, "ms": f"{total[name] * 1e-6:.3f}", "note": note}


def row(o):
    text = sys.stdin.buffer.read().decode(errors="replace")
    figures, right = main_row(text, o.tokens, o.losses)
    outcome = outcome_of(o.status, right)
    if o.status not in (0, 124, 137):
        figures["note"] = "; ".join(filter(None, dict.fromkeys([figures["note"], complaint(text)])))
    figures["note"] = figures["note"] or last_line(text)
    rows = [{"what": o.what, "outcome": outcome, **figures}]
    rows += [{"outcome": "", **detail, "what": f"{o.what}: {detail['what']}"} for detail in detail_rows(text)]
    with open(o.rows, "a", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS)
        if f.tell() == 0:
            writer.writeheader()
        for each in rows:
            writer.writerow({"at_s": os.environ.get("AT", ""), "part": o.part, **each})
    print(line_of(rows[0]), flush=True)
    sys.exit(outcome != "right")


def line_of(row):
    figures = [row["what"][:60].ljust(44), (row.get("outcome") or "").ljust(9)]
    rate, ms, gib = (row.get(name) or "" for name in ("tokens_per_s", "ms", "gib"))
    for value, unit in ((f"{int(rate):>9,}" if rate else "", "tokens/s"), (ms, "ms"), (gib, "GiB")):
        figures += [value, unit] if value else []
    return " ".join([*figures, row.get("note") or ""]).rstrip()[:150]


def comparisons(rows):
    """Ours beside the bar and the peers; reverse beside store wherever both ran."""
    rates = {row["what"]: int(row["tokens_per_s"]) for row in rows if row["tokens_per_s"]}
    card = next((row["note"] for row in rows if row["what"] == "card"), "")
    bar = next((bars for name, bars in BARS.items() if name in card), None)
    ours = {what: rate for what, rate in rates.items() if re.match(r"ours .*store", what)}
    if ours:
        best = max(ours, key=ours.get)
        if bar:
            yield f"{best}: {ours[best]:,} tokens/s"
            for what, each in zip(("the bar", "the aim"), bar):
                yield f"   of {what}, {each:,}: {ours[best] / each:.3f}"
        for what, rate in rates.items():
            if re.match(r"PyTorch|llmc", what):
                mine = ours.get("ours baseline store " + what.split()[-1], ours[best])
                yield f"ours over {what}: {mine / rate:.3f}"
    for what, rate in rates.items():
        other = rates.get(what.replace("midpoint reverse", "midpoint store"))
        if "midpoint reverse" in what and other:
            yield f"{what} over store: {rate / other:.3f}"


def table(o):
    with open(o.rows, newline="") as f:
        rows = list(csv.DictReader(f))
    lines, parts = [], {}
    for each in rows:
        parts.setdefault(each["part"], []).append(each)
    for part, its in parts.items():
        lines.append(f"== {part} (from {its[0]['at_s']} s)")
        details, shown = 0, []
        for each in its:
            details = 0 if each["outcome"] else details + 1
            if details <= MOST_DETAILS and len(shown) < MOST_OF_A_PART:
                shown.append(line_of(each))
        lines += shown
        if len(its) > len(shown):
            lines.append(f"   and {len(its) - len(shown)} rows more in rows.csv")
    ends = [*comparisons(rows)]
    wrong = [each for each in rows if each["outcome"] not in ("right", "")]
    ends += [f"{len(rows)} rows, {len(wrong)} of them not right"]
    room = MOST_LINES - len(ends) - 1
    if len(lines) > room:
        lines = lines[:room - 1] + ["   and more in rows.csv"]
    print("\n".join([*lines, "== compared", *ends]))


def tokens(o):
    some = array.array("H", random.Random(1337).choices(range(o.vocabulary), k=min(o.count, 1 << 20)))
    numbers = (some * (o.count // len(some) + 1))[:o.count]
    with open(o.file, "wb") as f:
        array.array("i", [20240520, 1, o.count, o.vocabulary, *[0] * 252]).tofile(f)
        numbers.tofile(f)


def planned(command, sequences):
    done = subprocess.run([*command, "--plan", "-b", str(sequences)], capture_output=True, text=True)
    total = re.search(r"^total +(\d+)", done.stdout, re.M)
    if not total:
        sys.exit("card.py: no plan: " + last_line(done.stdout + done.stderr))
    return int(total[1])


def largest(o):
    """From one chunk on a plan is linear in the batch, so two plans tell all."""
    some = 1024
    first, second = (planned(o.command, sequences) for sequences in (some, 2 * some))
    print(some + (o.bytes - first) * some // (second - first))


def attention(o):
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    shape = o.B, o.NH, o.T, o.HS
    options = {"device": o.device, "dtype": torch.bfloat16, "requires_grad": True}
    q, k, v = (torch.randn(shape, **options) for _ in range(3))
    finish = torch.cuda.synchronize if o.device == "cuda" else lambda: None

    def best(work):
        times = []
        for _ in range(30):
            finish()
            start = time.perf_counter()
            work()
            finish()
            times.append(time.perf_counter() - start)
        return min(times) * 1e3

    def forward():
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    print("torch", torch.__version__, "CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version())
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
        try:
            with sdpa_kernel(getattr(SDPBackend, name)):
                out = forward()
                gradient = torch.randn_like(out)
                print(f"sdpa, forward, {name}: best {best(forward):.4f} ms")
                both = best(lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True))
                print(f"sdpa, backward, {name}: best {both:.4f} ms", flush=True)
        except RuntimeError as e:
            print(f"{name}: {last_line(str(e))}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(required=True, metavar="COMMAND")

    def command(function, *arguments):
        sub = commands.add_parser(function.__name__)
        for name, kind in arguments:
            sub.add_argument(name, type=kind)
        sub.set_defaults(function=function)
        return sub
    command(tokens, ("file", str), ("count", int), ("vocabulary", int))
    command(largest, ("bytes", int)).add_argument("command", nargs=argparse.REMAINDER)
    command(attention, ("device", str), ("B", int), ("T", int), ("NH", int), ("HS", int))
    command(table, ("rows", str))
    sub = command(row, ("rows", str), ("part", str), ("what", str), ("status", int))
    sub.add_argument("--tokens", type=int, default=0)
    sub.add_argument("--losses")
    o = p.parse_args()
    o.function(o)


if __name__ == "__main__":
    main()
