/*
streams.h: prints the first numbers of every state p_k in a step of training, going forward and coming back.
`make debug STREAMS=1` builds a trainer with it.

The trainer includes this file where it has empty macros otherwise, or the profiler: each layer function says its
name there before it computes. Where `stream_step` does, cur is p_k, in both directions.
*/
static const Model *shown;  // NULL: nothing is shown now
static int shown_k, shown_direction, shown_calls;  // of the calls at shown_k, how many are still to come

static void show_state(const char *name) {
    enum { NUMBERS = 4 };
    if (!shown || strcmp(name, "stream_step") != 0) return;
    if (shown_calls-- > 0) return;
    const Config *net = &shown->net;
    int chunks = (shown->B + shown->chunk - 1) / shown->chunk;
    if (shown_direction > 0 && ++shown_k == steps(net)) shown_direction = -1;
    if (shown_direction < 0 && --shown_k < 0) shown_k = 0, shown_direction = 1;  // the next micro-batch
    shown_calls = (has_estimate(net, shown_k) ? 2 : 1) * chunks - 1;

    stream_t p[NUMBERS];
    to_host(p, shown->cur, sizeof p);
    printf("p_%-3d %s", shown_k, shown_direction > 0 ? "forward" : "back   ");
    for (int i = 0; i < NUMBERS; i++)
        if (net->grid) printf(" %12.7f", ldexp(p[i].fixed, -net->grid));
        else printf(" %12.7f", p[i].real);
    printf("\n");
}

#define PROFILE_OPTION
#define profile(name, flops, bytes) ((void)(flops), (void)(bytes), show_state(name))
#define profile_step(begins) (shown = (begins) ? &j->m : NULL, shown_k = -1, shown_direction = 1, shown_calls = 0)
#define profile_print(m, flops_limit)
