// The floor: the least that a program can do to run a guest instruction. No device, no thread, no check; what a real
// machine monitor costs is measured against it.
//
// 128 MiB of memory, one vcpu in real mode that prints a newline and halts. Memory slots come before the interrupt
// chip: on some hosts the other order costs milliseconds.

#include <fcntl.h>
#include <linux/kvm.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

enum { MEMORY = 128 << 20, START = 0x1000 };

static int check(int value) {
	if (value < 0) _exit(1);
	return value;
}

int main(void) {
	static const unsigned char code[] = {0xba, 0xf8, 0x03, 0xb0, 0x0a, 0xee, 0xf4}; // mov dx,3f8  mov al,10  out  hlt
	int kvm = check(open("/dev/kvm", O_RDWR | O_CLOEXEC));
	int vm = check(ioctl(kvm, KVM_CREATE_VM, 0));
	char *memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	memcpy(memory + START, code, sizeof code);
	struct kvm_userspace_memory_region slot = {.memory_size = MEMORY, .userspace_addr = (unsigned long)memory};
	check(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot));
	check(ioctl(vm, KVM_CREATE_IRQCHIP, 0));
	int vcpu = check(ioctl(vm, KVM_CREATE_VCPU, 0));
	size_t size = check(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0));
	struct kvm_run *run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	struct kvm_sregs sregs;
	check(ioctl(vcpu, KVM_GET_SREGS, &sregs));
	sregs.cs.base = sregs.cs.selector = 0;
	check(ioctl(vcpu, KVM_SET_SREGS, &sregs));
	struct kvm_regs regs = {.rip = START, .rflags = 2};
	check(ioctl(vcpu, KVM_SET_REGS, &regs));
	for (;;) {
		check(ioctl(vcpu, KVM_RUN, 0));
		if (run->exit_reason != KVM_EXIT_IO) return 1;
		check(write(1, (char *)run + run->io.data_offset, 1));
	}
}
