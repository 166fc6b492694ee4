"""The style of a C file in figures, judged; of several, side by side; and what a function takes to follow.

    python3 dev/test/style.py train_rev_gpt2.c                       one file: each rule's figure and limit
    python3 dev/test/style.py train_rev_gpt2.c OTHER.c OTHER.py ...  several: a table; nothing is judged
    python3 dev/test/style.py --know step_back train_rev_gpt2.c      the functions one must read to follow it

A part begins with a rule line and a title, `// ---` and `// Part II: memory`; Part I with the file, and it
ends with forward_backward. Functions begin and end in the first column. What breaks a rule has a line
FILE:LINE: RULE: what.
"""
import collections, re, statistics, sys

# A limit that is no goal is what the part has now, with the goal behind it: who raises one says why in the commit.
PARTS = {"I": ("reversal", 700), "II": ("memory", 375),  # 180
         "III": ("conversions", 228), "IV": ("training", 1157),  # 800
         "V": ("the command line", 536), "VI": ("layers for the CPU", 1031)}  # 420, 960
LINES = 4023  # 3400
WIDTH, STORY, FUNCTION, PARAMETERS, KNOW = 110, 45, 80, 7, 16
TERNARIES_I, TERNARIES = 3, 5  # `?:` in 100 lines
COMMENTS = 1 / 3               # lines that carry one, to a line of code

STRING = r'"(?:\\.|[^"\\\n])*"|' r"'(?:\\.|[^'\\\n])*'"
TOKEN = r"//(?:\\\n|[^\n])*|/\*.*?\*/|" + STRING  # a comment or a string
PYTHON_TOKEN = r'#[^\n]*|""".*?"""|' + STRING
DIRECTIVE = r"(?m)^[ \t]*#(?:\\\n|[^\n])*"
HEAD = r"(?ms)^(?:\w[^;{}()=]*\W)?(\w+)\s*\(([^;{}]*)\)\s*"  # of a function: its name, its parameters
BODY = r"(\{[^\n]*\}[ \t]*$|\{.*?^\})"                       # on one line, or to a brace in the first column
CONTROL = r"^\s*(?:(?:else\b|do\b|case\b[^:]*:|\w+:|(?:if|for|while|switch)\s*_[_\s]*)\s*)*"
Function = collections.namedtuple("Function", "name first last parameters body")


def cover(text, pattern, by="_"):
    """Puts `by` over what the pattern finds until there is nothing, so inside first; lines stay in place."""
    found = 1
    while found:
        text, found = re.subn(pattern, lambda m: re.sub(r"[^\n]", by, m[0]), text)
    return text


class Source:
    def __init__(self, path):
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read()
        line = self.line = lambda offset: text.count("\n", 0, offset) + 1
        self.path, self.lines, self.comments, code = path, text.splitlines(), set(), text
        for m in re.finditer(PYTHON_TOKEN if path.endswith(".py") else TOKEN, text, re.S):
            comment = m[0].startswith(("//", "/*", "#", '"""'))
            if comment:
                self.comments |= {line(m.start() + word.start()) for word in re.finditer(r"\w+", m[0])}
            code = code[:m.start()] + re.sub(r"[^\n]", " " if comment else "_", m[0]) + code[m.end():]
        self.coded = {i for i, one in enumerate(code.split("\n"), 1) if one.strip()}
        # the lines of each statement's `?`; a directive ends as a statement does
        ended = re.sub(DIRECTIVE, lambda m: m[0][:-1] + ";", code)
        self.ternaries = [[line(m.start() + i) for i, c in enumerate(m[0]) if c == "?"]
                          for m in re.finditer(r"[^;{}]+", ended) if "?" in m[0]]
        if path.endswith(".py"):
            self.ternaries = [[line(m.start())] for m in re.finditer(r"\bif\b[^:]*?\belse\b", code)]
        code = cover(cover(code, DIRECTIVE, " "), r"__attribute__\s*\(\(.*?\)\)+")
        self.functions = []
        for m in re.finditer(HEAD + BODY, code):
            listed = cover(m[2], r"\([^()]*\)").strip()
            parameters = 0 if listed in ("", "void") else listed.count(",") + 1
            self.functions.append(Function(m[1], line(m.start()), line(m.end()), parameters, m[3]))
        # those declared before they are defined, with what they promise; layer functions for another file to define
        declared = [m for m in re.finditer(HEAD + ";", code) if not re.search(r"\btypedef\b", m[0])]
        self.promised = {m[1] for m in declared}
        self.layers = {m[1] for m in declared if not re.search(r"\bstatic\b", m[0])}
        # statements without what is in (), [], initializers and types
        code = cover(code, r"\b(?:struct|union)\s*\w*\s*\{[^{}]*\}|\([^()]*\)|\[[^][]*\]")
        self.statements = cover(code, r"\{[^{};]*\}")
        self.find_parts()

    def find_parts(self):  # the first and last line of each; "?": without a title, after forward_backward
        story = [f.last for f in self.functions if f.name == "forward_backward"]
        self.story_end = max(story, default=len(self.lines))
        found = [(p, i) for i, above in enumerate(self.lines[:-1], 1) if above.startswith("// ---")
                 for p, (title, _) in PARTS.items() if self.lines[i].startswith(f"// Part {p}: {title}")]
        self.titles = [p for p, _ in found]
        begins = {**dict(found), "I": 1}
        begins.setdefault("II" if "II" in begins else "?", self.story_end + 1)
        order = sorted(begins, key=begins.get)
        ends = [begins[p] - 1 for p in order[1:]] + [len(self.lines)]
        self.parts = {p: (begins[p], end) for p, end in zip(order, ends)}

    def part(self, line):
        return next(p for p, (first, last) in self.parts.items() if first <= line <= last)

    def own(self):  # the functions of Parts I to V
        return [f for f in self.functions if self.part(f.first) != "VI"
                and not (self.part(f.first) == "?" and f.name in self.layers)]

    def know(self, name):  # what it calls, and what that calls, as far as nothing promises it; None without it
        own = {f.name: f for f in self.own()}
        found, more = set(), {name} & set(own)
        while more:
            found |= more
            calls = {c for f in more for c in re.findall(r"(?<![.\w>])(\w+)\s*\(", own[f].body)}
            more = calls & set(own) - found - self.promised
        return [f for f in own.values() if f.name in found - {name}] if found else None

    def per_100(self, first, last):
        found = sum(first <= q <= last for lines in self.ternaries for q in lines)
        return 100 * found / max(last - first + 1, 1)

    def two_ternaries(self):
        return [(lines[1], f"{len(lines)} in one statement") for lines in self.ternaries if len(lines) > 1]

    def two_statements(self):  # something behind a statement's end; `case X: a; break;` is let in
        lines = [(i, re.match(r"\s*(case|default)\b", one), one.partition(";")[2].strip(" \t}"))
                 for i, one in enumerate(self.statements.split("\n"), 1)]
        wrong = [i for i, case, rest in lines if rest and not (case and rest == "break;")]
        return [(i, self.lines[i - 1].strip()) for i in wrong]

    def comma_joins(self):  # of assignments, be it behind an if; a declaration begins with two words
        found = [m for m in re.finditer(r"[^;{}]+;?", self.statements)
                 if "," in m[0] and re.search(r"=|\+\+|--", m[0])]
        wrong = [self.line(m.start() + m[0].index(",")) for m in found
                 if m[0][-1] == ";" and not re.match(r"\w+[\s*]+\w", re.sub(CONTROL, "", m[0]))]
        return [(i, self.lines[i - 1].strip()) for i in wrong]


def judge(c):
    rules = []

    def rule(name, kept, figure, limit, offenders=()):
        rules.append(f"{'ok  ' if kept else 'FAIL'}  {name:15} {figure:>24}   {limit}")
        for line, what in offenders:
            print(f"{c.path}:{line}: {name}: {what}")

    def at_most(name, limit, unit, found):  # found: a line, a number, and of what
        over = [(line, f"{number} {unit}, {of}".rstrip(", ")) for line, number, of in found if number > limit]
        most = max((number for _, number, _ in found), default=0)
        rule(name, not over, f"{most}, {len(over)} over", f"{unit}, at most {limit}", over)

    rule("lines", len(c.lines) <= LINES, str(len(c.lines)), f"of the file, at most {LINES}")
    at_most("width", WIDTH, "characters", [(i, len(one), "") for i, one in enumerate(c.lines, 1)])
    found = dict(zip([p for p in PARTS if p in c.titles], c.titles))  # in the order of the file
    for part, (title, limit) in PARTS.items():
        first, last = c.parts.get(part, (1, 0))
        length = (c.story_end if part == "I" else last) - first + 1
        after = [(f.first, f"{f.name}, after forward_backward") for f in c.functions
                 if part == "I" and c.story_end < f.first <= last]
        wrong = "no title" if part not in found else "out of order" if found[part] != part else ""
        rule(f"Part {part}", length <= limit and not after and not wrong,
             ", ".join(filter(None, [f"{length} from {first}" if last else "", wrong])),
             f"lines, {title}, at most {limit}", after)
    story = [f.last - f.first + 1 for f in c.functions if f.name in ("forward", "step_back")]
    rule("story", len(story) == 2 and sum(story) <= STORY, " + ".join(map(str, story)),
         f"lines of forward and step_back, at most {STORY}")
    at_most("function", FUNCTION, "lines", [(f.first, f.last - f.first + 1, f.name) for f in c.functions])
    at_most("parameters", PARAMETERS, "in Parts I to V", [(f.first, f.parameters, f.name) for f in c.own()])
    rates = {p: c.per_100(*lines) for p, lines in c.parts.items()}
    most = max(set(rates) - {"I"}, key=rates.get)
    for where, part, limit in ("in Part I", "I", TERNARIES_I), ("elsewhere", most, TERNARIES):
        rule(f"?: {where}", rates[part] <= limit, f"{rates[part]:.1f}, Part {part}",
             f"in 100 lines, at most {limit}")
    for find in c.two_ternaries, c.two_statements, c.comma_joins:
        rule(find.__name__.replace("_", " "), not find(), str(len(find())), "none", find())
    comments, code = (sum(i <= c.story_end for i in lines) for lines in (c.comments, c.coded))
    rule("comments", comments >= COMMENTS * code, f"{comments / max(code, 1):.3f}, Part I",
         f"lines with one to a line of code, at least {COMMENTS:.3f}")
    known = c.know("step_back")
    kept = known is not None and len(known) <= KNOW
    rule("to know", kept, str(len(known or [])), f"functions to read, to follow step_back, at most {KNOW}",
         [] if kept else [(f.first, f.name) for f in known or []])
    print(*rules, sep="\n")
    failed = sum(line.startswith("FAIL") for line in rules)
    print(f"{len(rules) - failed} passed, {failed} failed")
    return failed > 0


def table(sources):
    columns = [["", "lines", "lines of code", "widest line", "over 110", "over 120", "?: in 100 of code",
                "comments to code", "longest function", "median function", "most parameters"]]
    for c in sources:
        width, code = [len(line) for line in c.lines], len(c.coded)
        lengths = [f.last - f.first + 1 for f in c.functions] or ["-"]
        columns.append([c.path.split("/")[-1], len(c.lines), code, max(width), sum(w > 110 for w in width),
                        sum(w > 120 for w in width), f"{100 * sum(map(len, c.ternaries)) / code:.1f}",
                        f"{len(c.comments) / code:.2f}", max(lengths), statistics.median_low(lengths),
                        max([f.parameters for f in c.functions], default="-")])
    for row in zip(*columns):
        print(f"{row[0]:17}", *(f"{cell!s:>17}" for cell in row[1:]))


def main(arguments):
    if len(arguments) == 3 and arguments[0] == "--know":
        name, path = arguments[1:]
        known = Source(path).know(name)
        if known is None:
            return f"style.py: no function {name} in {path}"
        for f in known:
            print(f"{path}:{f.first}: {f.name}")
        print(f"{len(known)} functions to read, to follow {name}")
        return 0
    if not arguments or arguments[0].startswith("-"):
        return __doc__
    return judge(Source(arguments[0])) if len(arguments) == 1 else table(map(Source, arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
