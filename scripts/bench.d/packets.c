// packets IFACE BYTES: sends frames of so many bytes out of an interface as fast as it takes them, until it is killed.

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

enum { BATCH = 64 };

int main(int argc, char **argv) {
	if (argc != 3) return 2;
	size_t bytes = strtoul(argv[2], NULL, 10);
	static unsigned char frame[65536];
	if (bytes < 60 || bytes > sizeof frame) return 2;
	memset(frame, 0xff, 6);
	memcpy(frame + 6, "\x02\0\0\0\0\x99\x88\xb5", 8);
	int packet = socket(AF_PACKET, SOCK_RAW, 0);
	struct sockaddr_ll to = {
		.sll_family = AF_PACKET, .sll_protocol = htons(0x88b5), .sll_ifindex = (int)if_nametoindex(argv[1]), .sll_halen = 6};
	int one = 1;
	if (packet < 0 || bind(packet, (struct sockaddr *)&to, sizeof to)) {
		perror("packets");
		return 1;
	}
	// Straight to the device: its queue is what is measured.
	setsockopt(packet, SOL_PACKET, PACKET_QDISC_BYPASS, &one, sizeof one);
	struct iovec part = {frame, bytes};
	struct mmsghdr all[BATCH];
	memset(all, 0, sizeof all);
	for (int at = 0; at < BATCH; at++) all[at].msg_hdr = (struct msghdr){.msg_iov = &part, .msg_iovlen = 1};
	for (;;) {
		if (sendmmsg(packet, all, BATCH, 0) < 0 && errno != ENOBUFS && errno != EAGAIN) {
			perror("packets");
			return 1;
		}
	}
}
