/*
sockets.h: how ranks start and talk without MPI. `--ranks N` on one machine: the first process forks the others, before
it has touched a card. `--rank-file PATH`, on several: rank 0 writes its address there, the others read it and come.

Every rank has a socket to rank 0, and what they say goes by way of it: small things in host memory, and the NCCL id,
while gradients and parameters travel by nccl.cuh. Rank 0 prints all errors: a rank that ends sends its last
words. One that is killed closes its socket, so that all know it at once; one that answers nothing for --patience seconds
is named.
*/
#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>

static int patience, given_rank;
static const char *rank_file;
#define RANKS_OPTION \
    {"--patience", INTEGER, &patience, "600", 1, 1e9, \
     "seconds without progress after which ranks are asked, and end if one does not answer"}, \
    {"--rank-file", STRING, &rank_file, "", 0, NAME, \
     "a file on a disk of all machines, where ranks find each other: no MPI is needed"}, \
    {"--rank", INTEGER, &given_rank, "-1", 0, 65535, \
     "with --rank-file: which of --ranks this is; else Slurm's SLURM_PROCID and SLURM_NTASKS say"}, \
    ENGINE_OPTION

#include "advice.h"
#include "alike.h"

static void on_interrupt(int signal_number);
static void cannot(const char *what, const char *path);
static double *doubles(size_t count);
static void check_engine(void);  // of nccl.cuh: lets it go on, and ends where it has failed
static void abort_engine(void);

// ---- frames

enum Kind { WORDS, QUESTION, ANSWER, LAST };
typedef struct { int32_t kind, status; uint64_t bytes; } Frame;
typedef struct { char *at; size_t bytes, room; } Bytes;
typedef struct {
    int fd;                // -1: none
    int sending, owes;     // whether a frame is on its way out, and whether an answer must wait for that
    int answered, last;    // the question; whether the other one has said its last words
    Bytes come, words;     // what has come, and of that what nobody has taken yet
} Line;
static Line *lines;        // rank 0 has one to every other; these have one to rank 0, the first
static pid_t *children, first_process;  // of --ranks
static int leaving;        // whether this rank has its last words behind it
static int gathering;      // whether others still look for this one in the file
static volatile sig_atomic_t meeting_ends;  // whether a signal came while ranks met by a file

static void append(Bytes *b, const void *from, size_t bytes) {
    if (b->bytes + bytes > b->room) {
        b->room = 2 * (b->bytes + bytes);
        b->at = (char *)realloc(b->at, b->room);
        if (!b->at) die(STATUS_NUMBERS, "out of memory for %zu bytes of other ranks", b->room);
    }
    memcpy(b->at + b->bytes, from, bytes);
    b->bytes += bytes;
}
static void drop(Bytes *b, size_t bytes) {
    b->bytes -= bytes;
    memmove(b->at, b->at + bytes, b->bytes);
}

static int line_count(void) { return rank == 0 ? ranks : 1; }

// Where rank 0 has gone, one rank of each machine says so: they cannot agree on one.
static int speaks(void) {
    for (int r = 1; r < rank; r++)
        if (hosts && strcmp(hosts[r], hosts[rank]) == 0) return 0;
    return 1;
}

// ---- the end of all

static int end_status;
static void end_at_once(int signal_number) {
    (void)signal_number;
    _exit(end_status);
}

// NCCL is told to end, so that no card waits for another; if that hangs as well, a signal ends it.
__attribute__((noreturn)) static void leave(int status) {
    end_status = status;
    signal(SIGALRM, end_at_once);
    alarm(10);
    abort_engine();
    _exit(status);
}

static void close_line(Line *l) {
    if (l->fd >= 0) close(l->fd);
    l->fd = -1;
}

// Why a rank has gone without a word, if its parent can tell
static const char *death_of(int r) {
    static char text[64] = "has ended";
    int status;
    usleep(10000);
    if (!children || waitpid(children[r], &status, WNOHANG) != children[r]) return text;
    children[r] = 0;
    if (WIFSIGNALED(status)) snprintf(text, sizeof text, "was killed by signal %d", WTERMSIG(status));
    return text;
}

static void gone(int r) {
    close_line(&lines[r]);
    if (leaving) return;
    if (rank == 0) die(STATUS_NUMBERS, "rank %d, on %s, %s", r, hosts[r], death_of(r));
    if (!speaks()) leave(STATUS_NUMBERS);
    die(STATUS_NUMBERS, "rank 0, on %s, has ended", hosts[0]);
}

static void say(int of, const char *line) {
    fflush(stdout);
    fprintf(stderr, "%.*s: rank %d: %s\n", (int)strcspn(program, " "), program, of, line);
}

static void end_others(int status);

// Another rank's last words: rank 0 says them, and tells all; they end in silence.
static void heard_last(int r, int status, const char *text) {
    lines[r].last = 1;
    if (leaving) return;
    leaving = 1;
    if (rank == 0) {
        say(r, text);
        end_others(status);
    }
    leave(status);
}

// ---- what has come

static void send_frame(int r, enum Kind kind, int status, const void *words, size_t bytes);

static void send_answers(void) {
    for (int r = 0; r < line_count(); r++)
        if (lines[r].owes && !lines[r].sending) {
            lines[r].owes = 0;
            send_frame(r, ANSWER, 0, NULL, 0);
        }
}

static void take_frames(int r) {
    Line *l = &lines[r];
    Frame f;
    while (l->come.bytes >= sizeof f) {
        memcpy(&f, l->come.at, sizeof f);
        if (l->come.bytes < sizeof f + f.bytes) return;
        const char *words = l->come.at + sizeof f;
        if (f.kind == QUESTION) l->owes = 1;
        if (f.kind == ANSWER) l->answered = 1;
        if (f.kind == LAST) heard_last(r, f.status, words);
        if (f.kind == WORDS) append(&l->words, words, f.bytes);
        drop(&l->come, sizeof f + f.bytes);
    }
}

static void receive(int r) {
    char piece[1 << 14];
    while (lines[r].fd >= 0) {
        ssize_t n = recv(lines[r].fd, piece, sizeof piece, MSG_DONTWAIT);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
        if (n <= 0) {
            gone(r);
            return;
        }
        append(&lines[r].come, piece, (size_t)n);
        take_frames(r);
    }
}

// Sleeps until something comes, for so many milliseconds at most, and takes it.
static void listen_for(int ms) {
    static struct pollfd *polled;
    const int count = line_count();
    if (!polled) polled = (struct pollfd *)calloc((size_t)ranks, sizeof *polled);
    for (int r = 0; polled && r < count; r++) {
        polled[r].fd = lines[r].fd;  // poll passes over -1
        polled[r].events = POLLIN;
    }
    if (polled && poll(polled, (nfds_t)count, ms) > 0)
        for (int r = 0; r < count; r++)
            if (polled[r].revents) receive(r);
    send_answers();
}

// ---- waiting

static double quiet_since;
static int times_asked, asking;  // how often in this wait; whether it does so now
static void waiting_begins(void) {
    quiet_since = seconds();
    times_asked = 0;
}

// Rank 0 asks all, others ask it, and give it time to name who it is that does not answer.
static void ask(void) {
    const double until = seconds() + (rank == 0 ? 5 : 10);
    int left = line_count() - (rank == 0);
    asking = 1;
    for (int r = rank == 0; r < line_count(); r++) {
        lines[r].answered = 0;
        send_frame(r, QUESTION, 0, NULL, 0);
    }
    while (left > 0 && seconds() < until) {
        listen_for(5);
        left = 0;
        for (int r = rank == 0; r < line_count(); r++) left += !lines[r].answered;
    }
    asking = 0;
    times_asked++;
    if (left > 0 && rank > 0 && !speaks()) leave(STATUS_NUMBERS);
    for (int r = rank == 0; r < line_count(); r++)
        if (!lines[r].answered) die(STATUS_NUMBERS, "no progress for --patience %d seconds: rank %d, on %s, does "
                                    "not answer", patience, r, hosts[r]);
    if (rank == 0 && times_asked > 1) die(STATUS_NUMBERS, "no progress for %d seconds, though all ranks answer: NCCL "
                                    "hangs; NCCL_DEBUG=INFO says more", times_asked * patience);
}

static void end_if_signalled(void) {
    if (meeting_ends && !leaving) die(STATUS_INTERRUPTED, "--rank-file %s: interrupted before all ranks have come", rank_file);
}

// A turn of whoever waits
static void attend(int ms) {
    listen_for(ms);
    end_if_signalled();
    check_engine();
    if (!asking && seconds() - quiet_since >= (double)patience * (1 + times_asked)) ask();
}

// Sends without waiting for the other one to read, as long as there is room on the way.
static void send_frame(int r, enum Kind kind, int status, const void *words, size_t bytes) {
    Line *l = &lines[r];
    const Frame f = {kind, status, bytes};
    const int urgent = kind != WORDS;  // it is short, and nobody waits for it
    Bytes all = {NULL, 0, 0};
    if (!urgent) waiting_begins();
    append(&all, &f, sizeof f);
    if (bytes) append(&all, words, bytes);
    l->sending = 1;
    while (all.bytes > 0 && l->fd >= 0) {
        ssize_t n = send(l->fd, all.at, all.bytes, MSG_DONTWAIT | MSG_NOSIGNAL);
        const int full = n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK);
        if (n > 0) drop(&all, (size_t)n);
        else if (full && (leaving || (urgent && all.bytes == sizeof f + bytes))) break;
        else if (full) attend(1);
        else if (errno != EINTR) {
            receive(r);  // its last words may be there
            if (l->fd >= 0) gone(r);
        }
    }
    l->sending = 0;
    free(all.at);
}

// Takes what rank r has sent, as many bytes as are wanted.
static void take_words(int r, void *to, size_t bytes) {
    Line *l = &lines[r];
    waiting_begins();
    while (l->words.bytes < bytes) attend(5);
    memcpy(to, l->words.at, bytes);
    drop(&l->words, bytes);
}

// ---- last words

// All have their sockets closed by rank 0; processes of this machine that hang are killed.
static void end_others(int status) {
    const double until = seconds() + 3;
    int open = 1;
    for (int r = 1; r < ranks; r++) {
        send_frame(r, LAST, status, "", 1);
        if (lines[r].fd >= 0) shutdown(lines[r].fd, SHUT_WR);
    }
    while (open && seconds() < until) {
        listen_for(5);
        open = 0;
        for (int r = 1; r < ranks; r++) open |= lines[r].fd >= 0;
    }
    for (int r = 1; children && r < ranks; r++) {
        if (children[r] <= 0) continue;
        if (lines[r].fd >= 0) kill(children[r], SIGKILL);
        waitpid(children[r], NULL, 0);
    }
    if (gathering) unlink(rank_file);
}

static void end_all(const char *line, int status) {
    leaving = 1;
    fflush(stdout);
    if (rank > 0 && lines[0].fd >= 0) {
        const double until = seconds() + patience;
        send_frame(0, LAST, status, line, strlen(line) + 1);
        while (lines[0].fd >= 0 && !lines[0].last && seconds() < until) listen_for(20);
        if (lines[0].last) leave(status);
    }
    say(rank, line);
    if (rank == 0) end_others(status);
    else if (first_process && lines[0].fd >= 0) kill(first_process, SIGKILL);  // it hangs
    leave(status);
}

// ---- small things in host memory, by way of rank 0

static void ranks_broadcast(void *x, size_t bytes) {
    if (rank > 0) take_words(0, x, bytes);
    for (int r = 1; rank == 0 && r < ranks; r++) send_frame(r, WORDS, 0, x, bytes);
}

// Adds up a few numbers: those of rank 0, of rank 1, and so on.
static void combine_few(double *x, size_t count) {
    double *of = doubles(count);
    const size_t bytes = count * sizeof(double);
    if (rank > 0) send_frame(0, WORDS, 0, x, bytes);
    for (int r = 1; rank == 0 && r < ranks; r++) {
        take_words(r, of, bytes);
        for (size_t i = 0; i < count; i++) x[i] += of[i];
    }
    ranks_broadcast(x, bytes);
    free(of);
}

static void collect(void *all, size_t each) {  // what every rank has, to all
    char *x = (char *)all;
    if (rank > 0) send_frame(0, WORDS, 0, x + (size_t)rank * each, each);
    for (int r = 1; rank == 0 && r < ranks; r++) take_words(r, x + (size_t)r * each, each);
    ranks_broadcast(all, (size_t)ranks * each);
}

// ---- the beginning: one process becomes several

static void *zeroed(size_t count, size_t size) {
    void *p = calloc(count, size);
    if (!p) die(STATUS_NUMBERS, "out of memory for what is known of %zu ranks", count);
    return p;
}

static void name_machine(char host[HOST]) {
    struct utsname system;
    uname(&system);
    snprintf(host, HOST, "%.*s", HOST - 1, system.nodename);
}

static void make_lines(void) {
    struct rlimit files;
    lines = (Line *)zeroed((size_t)ranks, sizeof *lines);
    hosts = (char (*)[HOST])zeroed((size_t)ranks, HOST);
    for (int r = 0; r < ranks; r++) lines[r].fd = -1;
    if (getrlimit(RLIMIT_NOFILE, &files) != 0) return;
    files.rlim_cur = files.rlim_max;  // rank 0 has a socket to every other
    setrlimit(RLIMIT_NOFILE, &files);
}

static void fork_ranks(void) {
    int (*pair)[2] = (int (*)[2])zeroed((size_t)ranks, sizeof *pair);
    const int count = ranks;
    const pid_t first = getpid();
    children = (pid_t *)zeroed((size_t)ranks, sizeof *children);
    for (int r = 0; r < count; r++) name_machine(hosts[r]);
    fflush(NULL);
    for (int r = 1; r < count; r++)
        if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair[r]) != 0)
            die(STATUS_NUMBERS, "cannot make a socket for rank %d: %s", r, strerror(errno));
    for (int r = 1; r < count && rank == 0; r++) {
        pid_t child = fork();
        if (child == 0) rank = r;
        if (child < 0) {
            for (int i = 1; i < r; i++) kill(children[i], SIGKILL);
            die(STATUS_NUMBERS, "cannot start rank %d of %d: %s", r, count, strerror(errno));
        }
        children[r] = child;
    }
    for (int r = 1; r < count; r++) {
        if (rank == 0) lines[r].fd = pair[r][0];
        else if (rank == r) lines[0].fd = pair[r][1];
        if (rank > 0) close(pair[r][0]);
        if (rank != r) close(pair[r][1]);
    }
    free(pair);
    if (rank == 0) return;
    first_process = first;
    free(children);
    children = NULL;
}

// ---- or several find each other

enum { KEY = 17, ADDRESSES = 2000 };
typedef struct { char key[KEY], host[HOST]; int32_t rank, ranks; } Hello;
typedef struct { char key[KEY], answer; } Reply;
enum Answer { WELCOME = 1, FIRST, TWICE, OTHER_NUMBER };
static const char *const answers[] = {"", "", "", "has come already: --rank or SLURM_PROCID is another's as well",
                                      "has come with another --ranks or SLURM_NTASKS than rank 0"};

// A stranger who says nothing must not hold up those who wait for an answer meanwhile.
enum { HELLO_SECONDS = 1, REPLY_SECONDS = 30 };
static void prepare(int fd, int wait) {
    int on = 1;
    struct timeval limit = {wait, 0};
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
}

static void make_key(char key[KEY]) {
    static const char source[] = "/dev/urandom";
    unsigned char random[KEY / 2];
    FILE *f = fopen(source, "rb");
    if (!f || fread(random, 1, sizeof random, f) != sizeof random) cannot("read", source);
    fclose(f);
    for (size_t i = 0; i < sizeof random; i++) snprintf(key + 2 * i, 3, "%02x", random[i]);
}

// The addresses of this machine that others may reach, each after a space
static void write_addresses(char *text, size_t room) {
    struct ifaddrs *all, *a;
    char address[INET_ADDRSTRLEN];
    text[0] = 0;
    if (getifaddrs(&all) != 0) return;
    for (a = all; a; a = a->ifa_next) {
        if (!a->ifa_addr || a->ifa_addr->sa_family != AF_INET || a->ifa_flags & IFF_LOOPBACK) continue;
        const struct sockaddr_in *in = (const struct sockaddr_in *)(const void *)a->ifa_addr;
        if (!inet_ntop(AF_INET, &in->sin_addr, address, sizeof address)) continue;
        if (strlen(text) + strlen(address) + 2 < room) strcat(strcat(text, " "), address);
    }
    freeifaddrs(all);
}

static int say_hello(Hello *h, Reply *reply);

// Ends where the file is something else, or where rank 0 of another run waits by it. One that has died left what it wrote.
static void check_rank_file(void) {
    char word[16] = "";
    struct stat st;
    Hello h;
    Reply reply;
    if (stat(rank_file, &st) != 0) return;
    FILE *f = S_ISREG(st.st_mode) ? fopen(rank_file, "r") : NULL;
    const int ours = f && fscanf(f, "%15s", word) == 1 && strcmp(word, "rev_gpt2") == 0;
    if (f) fclose(f);
    if (!ours) die(STATUS_USAGE, "--rank-file: %s is there already, and no rank file", rank_file);
    if (say_hello(&h, &reply) >= 0)
        die(STATUS_USAGE, "--rank-file: rank 0 of another run, on %s, waits by %s: each run has its own", h.host, rank_file);
}

// The file is written aside and renamed, so that nobody reads half of it.
static void write_rank_file(int port, const char *key) {
    char aside[4096 + KEY], addresses[ADDRESSES];
    write_addresses(addresses, sizeof addresses);
    snprintf(aside, sizeof aside, "%s.%s", rank_file, key);
    FILE *f = fopen(aside, "w");
    if (!f) cannot("write", rank_file);
    fprintf(f, "rev_gpt2 %s %d %s%s\n", key, port, hosts[0], addresses);
    const int written = fflush(f) == 0 && fsync(fileno(f)) == 0;
    if (written && fclose(f) == 0 && rename(aside, rank_file) == 0) return;
    const int why = errno;
    unlink(aside);
    errno = why;
    cannot("write", rank_file);
}

// What somebody who connects says: a rank of this run has its key. Returns whether one has come.
static int welcome(int fd, const char *key) {
    Hello h;
    Reply reply;
    prepare(fd, HELLO_SECONDS);
    if (recv(fd, &h, sizeof h, MSG_WAITALL) != (ssize_t)sizeof h || memcmp(h.key, key, KEY) != 0) {
        close(fd);
        return 0;
    }
    reply.answer = WELCOME;
    if (h.rank == 0) reply.answer = FIRST;
    else if (h.ranks != ranks) reply.answer = OTHER_NUMBER;
    else if (h.rank < 1 || h.rank >= ranks || lines[h.rank].fd >= 0) reply.answer = TWICE;
    memcpy(reply.key, key, KEY);
    const int sent = send(fd, &reply, sizeof reply, MSG_NOSIGNAL) == (ssize_t)sizeof reply;
    if (!sent || reply.answer != WELCOME) close(fd);
    if (reply.answer == FIRST || (!sent && reply.answer == WELCOME)) return 0;  // another run's, or gone again
    if (reply.answer != WELCOME) die(STATUS_USAGE, "--rank-file %s: rank %d %s", rank_file, h.rank, answers[(int)reply.answer]);
    lines[h.rank].fd = fd;
    snprintf(hosts[h.rank], HOST, "%.*s", HOST - 1, h.host);
    return 1;
}

// Takes in who comes for some time. Returns whether one has; those who are here already may end, or ask.
static int take_in(int server, const char *key) {
    struct pollfd polled = {server, POLLIN, 0};
    const int comes = poll(&polled, 1, 100) > 0, fd = comes ? accept(server, NULL, NULL) : -1;
    if (comes && fd < 0 && errno != EINTR && errno != ECONNABORTED && errno != EAGAIN) cannot("take in", "other ranks");
    const int one = fd >= 0 && welcome(fd, key);
    listen_for(0);
    end_if_signalled();
    return one;
}

static void gather_ranks(void) {
    const double begun = seconds();
    char key[KEY] = "";
    struct sockaddr_in address;
    socklen_t length = sizeof address;
    int missing = ranks - 1, said = 0, server = socket(AF_INET, SOCK_STREAM, 0);
    memset(&address, 0, sizeof address);
    address.sin_family = AF_INET;
    check_rank_file();
    if (server < 0 || bind(server, (struct sockaddr *)&address, length) != 0 || listen(server, ranks) != 0 ||
        getsockname(server, (struct sockaddr *)&address, &length) != 0) cannot("listen for", "other ranks");
    make_key(key);
    write_rank_file(ntohs(address.sin_port), key);
    gathering = 1;
    while (missing > 0) {
        missing -= take_in(server, key);
        const double waited = seconds() - begun;
        if (missing == 0 || (waited < patience && (said || waited < 10))) continue;
        int first = 1;
        while (lines[first].fd >= 0) first++;
        if (waited >= patience) die(STATUS_DATA, "--rank-file %s: rank %d%s not come within --patience %d seconds",
                                    rank_file, first, missing > 1 ? " and others have" : " has", patience);
        said = printf("--rank-file %s: waiting for rank %d%s\n", rank_file, first, missing > 1 ? " and others" : "");
        fflush(stdout);
    }
    close(server);
    unlink(rank_file);
    gathering = 0;
}

// A connection to an address, or -1; nobody there is known in two seconds at most.
static int connect_to(const char *text, int port) {
    struct sockaddr_in address;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), error = 0;
    struct pollfd polled = {fd, POLLOUT, 0};
    socklen_t length = sizeof error;
    memset(&address, 0, sizeof address);
    address.sin_family = AF_INET;
    address.sin_port = htons((uint16_t)port);
    if (fd < 0) return -1;
    int there = inet_pton(AF_INET, text, &address.sin_addr) == 1;
    if (there && connect(fd, (struct sockaddr *)&address, sizeof address) != 0)
        there = errno == EINPROGRESS && poll(&polled, 1, 2000) == 1 &&
                getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length) == 0 && error == 0;
    if (!there) {
        close(fd);
        return -1;
    }
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK);
    prepare(fd, REPLY_SECONDS);
    return fd;
}

// Says hello to the rank 0 that has written the file. Returns the connection, or -1: a file of an earlier run leads
// nowhere, or to somebody who knows no key.
static int say_hello(Hello *h, Reply *reply) {
    char address[64];
    struct stat st;
    int port = 0, fd = -1;
    memset(h, 0, sizeof *h);
    h->rank = rank;
    h->ranks = ranks;
    errno = 0;
    FILE *f = stat(rank_file, &st) == 0 && S_ISREG(st.st_mode) ? fopen(rank_file, "r") : NULL;
    if (!f) return -1;
    if (fscanf(f, "rev_gpt2 %16s %d %63s", h->key, &port, h->host) == 3) {
        if (strcmp(h->host, hosts[rank]) == 0) fd = connect_to("127.0.0.1", port);
        while (fd < 0 && fscanf(f, "%63s", address) == 1) fd = connect_to(address, port);
    }
    fclose(f);
    Hello own = *h;
    memcpy(own.host, hosts[rank], HOST);
    if (fd >= 0 && send(fd, &own, sizeof own, MSG_NOSIGNAL) == (ssize_t)sizeof own &&
        recv(fd, reply, sizeof *reply, MSG_WAITALL) == (ssize_t)sizeof *reply && memcmp(reply->key, h->key, KEY) == 0) return fd;
    if (fd >= 0) close(fd);
    errno = 0;
    return -1;
}

static void find_first(void) {
    const double until = seconds() + patience;
    Hello h;
    Reply reply;
    while ((lines[0].fd = say_hello(&h, &reply)) < 0) {
        if (errno == EACCES || errno == ENOTDIR || errno == ELOOP) cannot("read", rank_file);
        if (meeting_ends) leave(STATUS_INTERRUPTED);  // rank 0 says so
        if (seconds() >= until) die(STATUS_DATA, "--rank-file %s: nobody there is rank 0 of this run, for "
                                    "--patience %d seconds", rank_file, patience);
        usleep(100000);
    }
    if (reply.answer != WELCOME) leave(STATUS_USAGE);  // rank 0 says why
    memcpy(hosts[0], h.host, HOST);
}

// While ranks wait for others to come signals end them with a line, and no file is left.
static void on_signal_in_meeting(int signal_number) {
    (void)signal_number;
    meeting_ends = 1;
}
static void heed_signals(int meeting) {
    static const int numbers[] = {SIGINT, SIGTERM, SIGUSR1, SIGHUP};
    static void (*before[4])(int);
    for (int i = 0; i < 4; i++)
        if (meeting) before[i] = signal(numbers[i], on_signal_in_meeting);
        else signal(numbers[i], before[i]);
    if (before[3] == SIG_IGN) signal(SIGHUP, SIG_IGN);  // nohup
}

static void join_by_file(void) {
    const int tasks = number_in("SLURM_STEP_NUM_TASKS", number_in("SLURM_NTASKS", 0));
    rank = given_rank >= 0 ? given_rank : number_in("SLURM_PROCID", -1);
    if (given_rank < 0 && ranks > 0 && tasks > 0 && ranks != tasks) die(STATUS_USAGE,
        "--ranks %d, though Slurm has %d tasks here: without --rank each of them is a rank", ranks, tasks);
    if (ranks == 0) ranks = tasks;
    if (rank < 0 || ranks < 1) die(STATUS_USAGE, "--rank-file: which rank is this, and of how many? --rank and "
                                   "--ranks say, or SLURM_PROCID and SLURM_NTASKS");
    if (rank >= ranks) die(STATUS_USAGE, "--rank %d: of %d ranks the last one is %d", rank, ranks, ranks - 1);
    make_lines();
    name_machine(hosts[rank]);
    for (char *c = hosts[rank]; *c; c++)
        if (*c == ' ') *c = '_';
    last_words = end_all;
    heed_signals(1);
    if (rank == 0) gather_ranks();
    else find_first();
}

// ---- the beginning and the end

// Where they are, and that the cores of a machine are shared
static void meet(void) {
    ranks_here = 0;
    collect(hosts, HOST);
    for (int r = 0; r < ranks; r++) ranks_here += strcmp(hosts[r], hosts[rank]) == 0;
#ifdef _OPENMP
    int sharing = ranks_here;
#ifdef __linux__
    cpu_set_t *of = (cpu_set_t *)zeroed((size_t)ranks, sizeof *of);
    sched_getaffinity(0, sizeof *of, &of[rank]);
    collect(of, sizeof *of);
    for (int r = 0; r < ranks; r++)
        if (strcmp(hosts[r], hosts[rank]) != 0) CPU_ZERO(&of[r]);  // another machine's
    const cpu_set_t own = of[rank];
    sharing = overlapping(&own, of, ranks);
    free(of);
#endif
    choose_threads(sharing);
#endif
}

// Makes of this process one of `wanted` ranks, if flags or Slurm ask for several. Returns whether they do.
static int join(int wanted) {
    int nowhere;
    ranks = wanted;
    if (given_rank >= 0 && !rank_file[0]) die(STATUS_USAGE, "--rank needs --rank-file: without, --ranks starts "
                                              "the others itself");
    if (!rank_file[0]) end_if_alone("--rank-file brings them together; mpirun starts those of `MPI=1 NCCL=1`");
    if (rank_file[0]) join_by_file();
    else if (ranks > 0) {
        make_lines();
        fork_ranks();
        last_words = end_all;
    } else {
        ranks = 1;
        return 0;
    }
    if (ranks > 1) meet();
    if (rank_file[0]) heed_signals(0);
    signal(SIGUSR1, on_interrupt);  // what Slurm's --signal may send before its time is over
    if (rank > 0 && (nowhere = open("/dev/null", O_WRONLY)) >= 0) dup2(nowhere, 1);  // rank 0 prints
    return 1;
}

// Slurm's tasks have the same flags: what is wrong with them is said by the first.
static void end_in_silence(const char *line, int status) {
    (void)line;
    fflush(stdout);
    _exit(status);
}

static void ranks_begin(void) {
    patience = 600;  // until flags say something else
    rank_file = "";
    if (number_in("SLURM_STEP_NUM_TASKS", 1) > 1 && number_in("SLURM_PROCID", 0) > 0) last_words = end_in_silence;
}

static void end_lines(void) {
    double done = 0;
    if (!lines) return;
    combine_few(&done, 1);
    leaving = 1;
    last_words = NULL;
    for (int open = rank == 0, turns = 0; open && turns < 1000; turns++) {  // or others might see its end too soon
        listen_for(5);
        open = 0;
        for (int r = 1; r < ranks; r++) open |= lines[r].fd >= 0;
    }
    for (int r = 0; r < line_count(); r++) close_line(&lines[r]);
    for (int r = 1; children && r < ranks; r++) waitpid(children[r], NULL, 0);
}
