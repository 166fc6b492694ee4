// What programs that use a model have in common: how they end on a signal; and a file that one writes for its user,
// which goes over nothing but a file of its kind, which begins so.

#ifndef REV_GPT2_OUTPUT
#define REV_GPT2_OUTPUT
// A signal ends the program where it next looks, and a second one at once, unless a terminal closes.
static void end_soon(int signal_number) {
    signalled = 1;
    if (signal_number == SIGHUP) return;
    signal(SIGINT, SIG_DFL);
    signal(SIGTERM, SIG_DFL);
}
static void heed_signals(void) {
    signal(SIGINT, end_soon);
    signal(SIGTERM, end_soon);
    if (signal(SIGHUP, end_soon) == SIG_IGN) signal(SIGHUP, SIG_IGN);
}

static void output_create(Output *o, const char *path, const char *begins) {
    char old[32] = "", aside[PATH + 64];
    FILE *f = access(path, F_OK) == 0 ? open_regular(path, "rb") : NULL;
    if (f && (fread(old, 1, strlen(begins), f) != strlen(begins) || strcmp(old, begins) != 0))
        die(STATUS_DATA, "%s is there already, and is of another kind", path);
    if (f) fclose(f);
    snprintf(aside, sizeof aside, "%s.tmp", path);
    if (access(aside, F_OK) == 0) die(STATUS_DATA, "cannot write %s: File exists: another program writes it "
        "now, or one that was killed left it: then remove it", aside);
    output_open(o, path, aside);
}
#endif
