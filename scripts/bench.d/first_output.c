// first_output TEXT [-k] COMMAND…: runs COMMAND and prints the nanoseconds from before fork to TEXT on its standard
// output ("" = to the first byte). Then it kills COMMAND; with -k it prints its pid instead and leaves it running.
//
// The child's input is an open pipe, so that a program which ends with its input does not.

#define _GNU_SOURCE
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static long long now_ns(void) {
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000LL + time.tv_nsec;
}

int main(int argc, char **argv) {
	if (argc < 3) return 2;
	const char *text = argv[1];
	int keep = strcmp(argv[2], "-k") == 0;
	char **command = argv + 2 + keep;
	int out[2], in[2];
	if (pipe(out) || pipe(in)) return 1;
	long long start = now_ns();
	pid_t pid = vfork();
	if (pid == 0) {
		dup2(in[0], 0);
		dup2(out[1], 1);
		close(in[0]);
		close(in[1]);
		close(out[0]);
		close(out[1]);
		execvp(command[0], command);
		_exit(127);
	}
	close(out[1]);
	static char seen[1 << 20];
	size_t len = 0;
	long long first = 0;
	while (len + 1 < sizeof seen && now_ns() - start < 120000000000LL) {
		struct pollfd wait = {.fd = out[0], .events = POLLIN};
		if (poll(&wait, 1, 1000) == 0) continue;
		ssize_t got = read(out[0], seen + len, sizeof seen - 1 - len);
		if (got <= 0) break;
		len += got;
		if (*text == 0 || memmem(seen, len, text, strlen(text))) {
			first = now_ns();
			break;
		}
	}
	if (first == 0) fprintf(stderr, "%s: never printed \"%s\" but: %.400s\n", command[0], text, seen);
	if (keep && first) {
		printf("%d\n", pid);
		fflush(stdout);
		// Its output has a reader until this process is ended.
		pause();
	}
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
	if (first == 0) return 1;
	printf("%lld\n", first - start);
	return 0;
}
