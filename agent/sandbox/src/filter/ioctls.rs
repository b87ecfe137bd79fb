//! Requests of `ioctl` by name, as the kernel's headers number them: `linux/kvm.h`, `linux/if_tun.h`, `linux/fs.h`,
//! `asm-generic/ioctls.h`.

/// The guest runs: nearly all calls of a vcpu are this one, so it stands alone.
pub(super) const RUN: &[(&str, u64)] = &[("KVM_RUN", 0xae80)];

/// Devices of the guest change while it runs.
pub(super) const DEVICES: &[(&str, u64)] =
    &[("KVM_IOEVENTFD", 0x4040_ae79), ("KVM_IRQFD", 0x4020_ae76), ("KVM_SET_GSI_ROUTING", 0x4008_ae6a)];

/// What the host can do.
pub(super) const HOST: &[(&str, u64)] = &[
    ("KVM_GET_API_VERSION", 0xae00),
    ("KVM_CHECK_EXTENSION", 0xae03),
    ("KVM_GET_SUPPORTED_CPUID", 0xc008_ae05),
];

/// A VM is made.
pub(super) const MACHINE: &[(&str, u64)] = &[
    ("KVM_CREATE_VM", 0xae01),
    ("KVM_GET_VCPU_MMAP_SIZE", 0xae04),
    ("KVM_SET_USER_MEMORY_REGION", 0x4020_ae46),
    ("KVM_SET_TSS_ADDR", 0xae47),
    ("KVM_CREATE_IRQCHIP", 0xae60),
    ("KVM_CREATE_VCPU", 0xae41),
    ("KVM_SET_CPUID2", 0x4008_ae90),
    ("KVM_SET_MSRS", 0x4008_ae89),
    ("KVM_IRQFD", 0x4020_ae76),
    ("KVM_SET_REGS", 0x4090_ae82),
    ("KVM_GET_SREGS", 0x8138_ae83),
    ("KVM_SET_SREGS", 0x4138_ae84),
];

/// What a vcpu says of where the guest was when it cannot go on.
pub(super) const STATE: &[(&str, u64)] = &[("KVM_GET_REGS", 0x8090_ae81), ("KVM_GET_SREGS", 0x8138_ae83)];

/// A socket that does not block.
pub(super) const NONBLOCK: &[(&str, u64)] = &[("FIONBIO", 0x5421)];

/// A terminal is looked at, made raw, and put back.
pub(super) const TTY: &[(&str, u64)] = &[("TCGETS", 0x5401), ("TCSETSW", 0x5403)];

/// A tap: what it is, and what its guest takes.
pub(super) const TAP: &[(&str, u64)] = &[
    ("TUNGETIFF", 0x8004_54d2),
    ("TUNGETFEATURES", 0x8004_54cf),
    ("TUNSETOFFLOAD", 0x4004_54d0),
    ("TUNSETVNETHDRSZ", 0x4004_54d8),
];

/// What the state of a vcpu consists of.
pub(super) const REGISTERS: &[(&str, u64)] = &[("KVM_GET_MSR_INDEX_LIST", 0xc004_ae02)];

/// Which queues of a tap get packets.
pub(super) const STEER: &[(&str, u64)] = &[("TUNSETQUEUE", 0x4004_54d9)];

/// The kernel's own network device is looked at (`linux/vhost.h`).
pub(super) const VHOST_LAUNCH: &[(&str, u64)] =
    &[("VHOST_GET_FEATURES", 0x8008_af00), ("TUNSETSNDBUF", 0x4004_54d4)];

/// The kernel takes over the rings of a card, and gives them back.
pub(super) const VHOST: &[(&str, u64)] = &[
    ("VHOST_SET_OWNER", 0xaf01),
    ("VHOST_SET_FEATURES", 0x4008_af00),
    ("VHOST_SET_MEM_TABLE", 0x4008_af03),
    ("VHOST_SET_VRING_NUM", 0x4008_af10),
    ("VHOST_SET_VRING_ADDR", 0x4028_af11),
    ("VHOST_SET_VRING_BASE", 0x4008_af12),
    ("VHOST_SET_VRING_KICK", 0x4008_af20),
    ("VHOST_SET_VRING_CALL", 0x4008_af21),
    ("VHOST_SET_VRING_ERR", 0x4008_af22),
    ("VHOST_NET_SET_BACKEND", 0x4008_af30),
];

/// The state of a VM is taken out, or put back.
pub(super) const SAVED: &[(&str, u64)] = &[
    ("KVM_GET_REGS", 0x8090_ae81),
    ("KVM_GET_SREGS", 0x8138_ae83),
    ("KVM_GET_CPUID2", 0xc008_ae91),
    ("KVM_GET_MSR_INDEX_LIST", 0xc004_ae02),
    ("KVM_GET_MSRS", 0xc008_ae88),
    ("KVM_SET_MSRS", 0x4008_ae89),
    ("KVM_GET_FPU", 0x81a0_ae8c),
    ("KVM_SET_FPU", 0x41a0_ae8d),
    ("KVM_GET_LAPIC", 0x8400_ae8e),
    ("KVM_SET_LAPIC", 0x4400_ae8f),
    ("KVM_GET_MP_STATE", 0x8004_ae98),
    ("KVM_SET_MP_STATE", 0x4004_ae99),
    ("KVM_GET_VCPU_EVENTS", 0x8040_ae9f),
    ("KVM_SET_VCPU_EVENTS", 0x4040_aea0),
    ("KVM_GET_DEBUGREGS", 0x8080_aea1),
    ("KVM_SET_DEBUGREGS", 0x4080_aea2),
    ("KVM_GET_XSAVE", 0x9000_aea4),
    ("KVM_SET_XSAVE", 0x5000_aea5),
    ("KVM_GET_XCRS", 0x8188_aea6),
    ("KVM_SET_XCRS", 0x4188_aea7),
    ("KVM_GET_IRQCHIP", 0xc208_ae62),
    ("KVM_SET_IRQCHIP", 0x8208_ae63),
    ("KVM_GET_CLOCK", 0x8030_ae7c),
    ("KVM_SET_CLOCK", 0x4030_ae7b),
    ("KVM_KVMCLOCK_CTRL", 0xaead),
    ("KVM_GET_TSC_KHZ", 0xaea3),
    ("KVM_SET_TSC_KHZ", 0xaea2),
    ("KVM_GET_DIRTY_LOG", 0x4010_ae42),
];
