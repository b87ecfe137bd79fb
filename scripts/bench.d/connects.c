/* Clients that come and go. `connects storm PORT RATE`: opens RATE connections a second to 127.0.0.1, each of which waits for the
 * server's first bytes, answers four of its own and is gone; until SIGTERM, then prints how many got so far and how many did not.
 * `connects null PORT`: a server that accepts, says 18 bytes and closes: what the clients alone cost. */
#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { OPEN_MAX = 512 };
static volatile sig_atomic_t done;
static void end(int signal) { (void)signal; done = 1; }

static long long now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static struct sockaddr_in address(int port) {
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port)};
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return a;
}

static void gone(struct pollfd *p, int reset) {
    /* A reset leaves no TIME_WAIT behind: the ports would be used up within half a minute. */
    struct linger now = {.l_onoff = reset, .l_linger = 0};
    setsockopt(p->fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    close(p->fd);
    p->fd = -1;
}

static void null_server(int port) {
    int on = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in a = address(port);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (void *)&a, sizeof a) || listen(listener, 1024)) { perror("listen"); exit(1); }
    while (!done) {
        int client = accept(listener, NULL, NULL);
        if (client < 0) continue;
        if (write(client, "NBDMAGICIHAVEOPT\0\3", 18) < 0) {}
        close(client);
    }
}

static void storm(int port, long rate) {
    static struct pollfd open_now[OPEN_MAX];
    static long long since[OPEN_MAX];
    long long start = now_ns(), begun = 0, whole = 0, failed = 0, late = 0;
    struct sockaddr_in a = address(port);
    for (int i = 0; i < OPEN_MAX; i++) open_now[i].fd = -1;
    while (!done) {
        long long due = (now_ns() - start) * rate / 1000000000ll;
        for (int i = 0; i < OPEN_MAX && begun < due; i++) {
            if (open_now[i].fd >= 0) continue;
            int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
            if (fd < 0) break;
            begun++;
            open_now[i] = (struct pollfd){.fd = fd, .events = POLLIN};
            since[i] = now_ns();
            if (connect(fd, (void *)&a, sizeof a) && errno != EINPROGRESS) { failed++; gone(&open_now[i], 1); }
        }
        /* No room: these clients do not come at all. */
        if (begun < due) { late += due - begun; begun = due; }
        if (poll(open_now, OPEN_MAX, 1) <= 0) continue;
        for (int i = 0; i < OPEN_MAX; i++) {
            if (open_now[i].fd < 0) continue;
            if (open_now[i].revents) {
                char greeting[64];
                ssize_t got = read(open_now[i].fd, greeting, sizeof greeting);
                if (got > 0 && write(open_now[i].fd, "\0\0\0\3", 4) == 4) whole++; else failed++;
                gone(&open_now[i], 1);
            } else if (now_ns() - since[i] > 1000000000ll) { failed++; gone(&open_now[i], 1); }
        }
    }
    double seconds = (now_ns() - start) / 1e9;
    printf("%.0f %lld %lld %lld\n", whole / seconds, whole, failed, late);
}

int main(int argc, char **argv) {
    struct sigaction act = {.sa_handler = end};
    sigaction(SIGTERM, &act, NULL);
    signal(SIGPIPE, SIG_IGN);
    if (argc == 3 && !strcmp(argv[1], "null")) null_server(atoi(argv[2]));
    else if (argc == 4 && !strcmp(argv[1], "storm")) storm(atoi(argv[2]), atol(argv[3]));
    else return 2;
    return 0;
}
