//! KVM: VM, vcpus, guest memory, irqfd, ioeventfd.
