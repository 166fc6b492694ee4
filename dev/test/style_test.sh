#!/usr/bin/env bash
# Whether each rule of dev/test/style.py can fail: a small file that keeps them all, then with one broken at a time.
style=$(dirname "$(realpath "$0")")/style.py passed=0 failed=0
dir=$(mktemp -d) && cd "$dir" || exit 1
trap 'rm -rf "$dir"' EXIT

limit() { python3 -c "import sys; sys.path.insert(0, '${style%/*}'); import style; print($1)"; }  # one of its limits
repeat() { for ((i = 0; i < $1; i++)); do echo "$2"; done; }
part() { printf '\n// -------\n// Part %s\n' "$1"; repeat 60 "// words"; }

file() {  # what is let in is in Part VI; $story, $back, $one, $after, $two ... $six come from the checks
    echo "// words"; part "I: reversal"
    cat <<END
void layer(int a, int b, int c, int d, int e, int f, int g, int h);
static void forward(int *p) {
${story:-    *p += 1;}
}
static void step_back(int *p) {
${back:-    *p -= 1;}
}
$one
static void forward_backward(int *p) {
    forward(p);
    step_back(p);
}
$after
END
    part "II: memory"; echo "$two"; part "III: conversions"; echo "$three"; part "IV: training"; echo "$four"
    part "V: the command line"; echo "$five"; part "VI: layers for the CPU"
    cat <<'END'
// a ? b : c ? d : e; in a comment; and 110 characters: éééééééééééééééééééééééééééééééééééééééééééééééééééééé
typedef struct { int x; union { int y; float z; } u; } Pair;
enum { A = 1, B = 2 };
#define SMALLER(a, b) do { (void)a; (void)b; } while (0)
void layer(int a, int b, int c, int d, int e, int f, int g, int h) {
    int i = f(a, b), j[] = {1, 2}, *k = &i;
    const char *text = "? ; ? ; \" ?", mark = '?', other = ';';
    for (i = 0, a = 1; i < 3; i++, a++) b += 1;
    for (;;) if (c) return;
    (void)d, (void)e;
    switch (a) {
    case 1: b = 2; break;
    default: b = 3; break;
    }
    f((Pair){.x = 1}, a, b = 2);
    if (f(a,
          b)) g = a ? b : c;  // the one
    else g = 1;
}
static int one(int a) { return a; }
END
    echo "$six"
}

check() {  # RULES LINE: just these are broken, the one at the first line of the file with this text
    local status found line
    file | sed "${change:-}" >file.c
    python3 "$style" file.c >out; status=$?
    found=$(sed -n 's/^FAIL  \(.\{15\}\).*/\1/p' out | sed 's/ *$//' | paste -sd, -)
    line=$(grep -nF -m 1 -- "${2:- }" file.c | cut -d: -f1)
    if [ "$found" = "$1" ] && [ $status = $((${#1} > 0)) ] && { [ -z "$2" ] || grep -q "^file.c:$line: $1: " out; }; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "broken: '$1' $2, found: '$found', status $status"
        cat out
    fi
}

check ""
four="// $(repeat 108 x | tr -d '\n')" check "width" "xxx"
two=$(repeat "$(limit "style.PARTS['II'][1]")" "// words") check "Part II"
three=$(repeat "$(limit "style.PARTS['III'][1]")" "// words") check "Part III"
four=$(repeat "$(limit "style.PARTS['IV'][1]")" "// words") check "Part IV"
five=$(repeat "$(limit "style.PARTS['V'][1]")" "// words") check "Part V"
six=$(repeat "$(limit "style.PARTS['VI'][1]")" "// words") check "Part VI"
six=$(repeat "$(limit style.LINES)" "// words") check "lines,Part VI"
one=$(repeat "$(limit "style.PARTS['I'][1]")" "// words") check "Part I"
after="static void late(void) {}" check "Part I" "static void late"
change="s/Part I: .*/Part One/" check "Part I"
change="s/Part IV: .*/Part Four/" check "Part IV"
change="s/Part III: .*/Part X/; s/Part IV: .*/Part III: conversions/; s/Part X/Part IV: training/" check "Part III,Part IV"
change="/Part/d" check "Part I,Part II,Part III,Part IV,Part V,Part VI"
story=$(repeat 41 "    *p += 1; // words") check "story"
change="s/step_back/step/" check "story,to know"
four=$'static int longest(\n    int a) {\n'$(repeat 78 "    a++;")$'\n}' check "function" "static int longest"
four=$'static int longest(\n    int a) {\n'$(repeat 77 "    a++;")$'\n}' check ""
five="static void eight(int a, int b, int (*c)(int, int), int d, int e, int f, int g, int h) {}" check "parameters" "eight"
six="static void eight(int a, int b, int c, int d, int e, int f, int g, int h) {}" check ""
one=$(repeat 3 "static int f(int a) { return a ? 1 : 0; }") check "?: in Part I"
three=$(repeat 4 "static int f(int a) { return a ? 1 : 0; }") check "?: elsewhere"
four="static int f(int a) { return g(a ? 1 : 0, a ? 0 : 1); }" check "two ternaries" "static int f"
four=$'static int f(int a) {\n    return a ? 1\n        : !a ? 0 : 2;\n}' check "two ternaries" ": !a"
two="static int f(int a) { a++; return a; }" check "two statements" "static int f"
two="    if (f(';')) return; else a = 1;" check "two statements" "    if (f("
two="    case 1: a = 1; b = 2; break;" check "two statements" "    case 1: a = 1;"
two=$'static void f(void) {\n    a = 1, b = 2;\n}' check "comma joins" "    a = 1, b"
two=$'static void f(void) {\n    a++, b--;\n}' check "comma joins" "    a++, b--"
two=$'static void f(void) {\n    if (a) a->b[1] = g(1), *c = 2;\n}' check "comma joins" "    if (a) a->b"
one=$(repeat 190 "int code;") check "comments"
one=$(for i in {1..17}; do echo "static void f$i(void) { f$((i + 1))(); }"; done) back="    f1(); // words" check "to know" "static void f17("
one=$(for i in {1..16}; do echo "static void f$i(void) { f$((i + 1))(layer(1)); }"; done) back="    f1(); // words" check ""
[ "$(python3 "$style" --know forward_backward file.c | tail -n 1)" = "18 functions to read, to follow forward_backward" ] &&
    [ "$(python3 "$style" file.c file.c | grep -c '^lines  *\([0-9]*\)  *\1$')" = 1 ] && passed=$((passed + 1)) || failed=$((failed + 1))
echo "$passed passed, $failed failed"
[ $failed = 0 ]
