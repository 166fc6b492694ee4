#!/usr/bin/env python3
"""
Counts the instructions that a warp executes for a tile of attention, without a card.

    make train_rev_gpt2cu CUDA_ARCH=sm_90
    python3 dev/cuda/sass.py train_rev_gpt2cu                     kernels whose names hold "attention"
    python3 dev/cuda/sass.py train_rev_gpt2cu --kernels layernorm

Reads what cuobjdump (of the CUDA Toolkit, or PyPI's nvidia-cuda-cuobjdump with nvidia-cuda-nvdisasm) prints of a
program or a .cubin. A kernel's row is about its longest loop with tensor core products, or its longest loop where
there are none: of the ways through it the one with the most products and copies to shared memory, and of those the
shortest, which is a tile that no mask touches. A loop inside counts once, and is marked by a star. Registers, and the
bytes of stack that spilled ones take, are those of the whole kernel.
"""
import argparse, collections, re, shutil, subprocess, sys

KINDS = {"products": ("HMMA",), "from shared": ("LDSM", "LDS"), "to shared": ("LDGSTS", "STS"),
         "memory": ("LDG", "STG", "LDL", "STL"), "exponentials": ("MUFU",), "shuffles": ("SHFL",),
         "float": ("FADD", "FMUL", "FFMA", "FMNMX", "FSEL", "FSETP", "F2FP"),
         "branches": ("BRA", "BSSY", "BSYNC", "BAR", "DEPBAR", "WARPSYNC", "LDGDEPBAR")}
THE_REST = "addresses and the rest"
LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P[T\d]+ )?\s*([A-Z][\w.]*)([^;]*);")
Instruction = collections.namedtuple("Instruction", "address guard opcode target")


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not done.stdout.strip():
        complaint = (done.stdout + done.stderr).strip().splitlines() or ["no device code in it"]
        sys.exit(f"sass.py: {command[-1]}: {complaint[-1]}")
    return done.stdout


def functions(path):
    """Name and instructions of each kernel, in order of their addresses."""
    name, found = None, {}
    for line in run("cuobjdump", "-sass", path).splitlines():
        if "Function :" in line:
            name = line.split(":")[1].strip()
            found[name] = []
        elif name and (m := LINE.match(line)):
            # BRA.DIV is for lanes that have parted: here it never leaves the way
            at = re.search(r"0x([0-9a-f]+)\s*$", m[4]) if re.match(r"BRA(?!\.DIV)", m[3]) else None
            conditional = bool(m[2]) or "P" in m[4]  # a branch may name its condition after its opcode
            found[name].append(Instruction(int(m[1], 16), conditional, m[3], int(at[1], 16) if at else None))
    return found


def resources(path):
    """Registers and bytes of stack of each kernel."""
    text = run("cuobjdump", "-res-usage", path)
    found = re.finditer(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", text)
    return {m[1]: (int(m[2]), int(m[3])) for m in found}


def kind_of(instruction):
    opcode = instruction.opcode.split(".")[0]
    return next((kind for kind, opcodes in KINDS.items() if opcode in opcodes), THE_REST)


def way_through(code, head, end):
    """The instructions from head to the branch at end (indices): most products, then most copies, then fewest."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    best, inside = {head: ((0, 0, 0), None)}, False
    for i in range(head, end):
        if i not in best:
            continue
        (products, copies, length), step = best[i][0], code[i]
        score = (products + step.opcode.startswith("HMMA"), copies + step.opcode.startswith("LDGSTS"), length - 1)
        to = [] if step.opcode in ("EXIT", "RET") and not step.guard else [i + 1]
        if step.target is not None:
            target = index.get(step.target, -1)
            inside |= head < target <= i
            if not step.guard:
                to = []
            if i < target <= end:
                to.append(target)
        for j in to:
            if j not in best or score > best[j][0]:
                best[j] = (score, i)
    way, i = [], end
    while i is not None:
        way.append(code[i])
        i = best[i][1] if i in best else None
    return way, inside


def hot_loop(code):
    """The way through the loop that matters; None if there is no loop."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    loops = []
    for i, step in enumerate(code):
        if step.target is not None and step.target in index and index[step.target] < i:
            body = code[index[step.target]:i + 1]
            loops.append((sum(s.opcode.startswith("HMMA") for s in body), len(body), index[step.target], i))
    return way_through(code, *max(loops)[2:]) if loops else None


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("program", help="a program or .cubin that nvcc made")
    p.add_argument("--kernels", default="attention", help="part of the kernels' names")
    o = p.parse_args()
    if not shutil.which("cuobjdump"):
        sys.exit("sass.py: cuobjdump is not on the path")
    usage, columns = resources(o.program), [*KINDS, THE_REST]
    print(f"| kernel | registers | stack | instructions | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 4) + "|")
    for name, code in functions(o.program).items():
        found = hot_loop(code) if o.kernels in name else None
        if not found or len(found[0]) == 1:
            continue
        way, inside = found
        counts = collections.Counter(map(kind_of, way))
        arguments = re.findall(r"L[ib](\d+)E", name)
        title = re.sub(r"^_Z\d+", "", name).split("I" if arguments else "P")[0]
        if arguments:
            title += f" <{', '.join(arguments)}>"
        registers, stack = usage.get(name, ("?", "?"))
        cells = [title, registers, stack, f"{len(way)}{'*' if inside else ''}", *(counts[c] for c in columns)]
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
