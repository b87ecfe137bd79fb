//! What a vcpu tells its guest about itself: KVM's supported CPUID, made true for this vcpu.
//!
//! KVM reports the leaves of the processor that happened to run the question; topology and identity in them belong
//! to the host. Here they become those of one socket with one thread per core. Pure: leaves in, leaves out.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use vmm_sys_util::errno;

use crate::kvm::Kvm;

/// Which vcpu, of how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Topology {
    pub(crate) id: u32,
    pub(crate) vcpus: u32,
}

impl Topology {
    /// How many bits of the APIC id number the vcpus.
    fn id_bits(self) -> u32 {
        self.vcpus.max(1).next_power_of_two().trailing_zeros()
    }
}

const LEAF1_ECX_X2APIC: u32 = 1 << 21;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_HTT: u32 = 1 << 28;
const AMD_LEGACY_MULTICORE: u32 = 1 << 1;

/// CPUID for one vcpu.
pub(crate) fn for_vcpu(kvm: &Kvm, topology: Topology) -> Result<CpuId, errno::Error> {
    let supported = kvm.cpuid.as_slice();
    let mut leaves: Vec<kvm_cpuid_entry2> =
        supported.iter().filter(|leaf| !matches!(leaf.function, 0xb | 0x1f)).copied().collect();
    for leaf in &mut leaves {
        adjust(leaf, topology, kvm.tsc_deadline);
    }
    // An old processor has neither leaf; Linux takes the xAPIC numbers of leaf 1 then.
    for function in [0xb, 0x1f] {
        if supported.iter().any(|leaf| leaf.function == function) {
            leaves.extend(extended_topology(function, topology));
        }
    }
    CpuId::from_entries(&leaves).map_err(|_| errno::Error::new(libc::E2BIG))
}

/// Cache levels: the first two belong to one core, the rest to the socket.
fn cache_sharers(eax: u32, topology: Topology) -> u32 {
    let level = (eax >> 5) & 7;
    if level >= 3 { (1 << topology.id_bits()) - 1 } else { 0 }
}

fn adjust(leaf: &mut kvm_cpuid_entry2, topology: Topology, tsc_deadline: bool) {
    let Topology { id, vcpus } = topology;
    match leaf.function {
        0x1 => {
            leaf.ebx = (leaf.ebx & 0x0000_ffff) | (vcpus.min(255) << 16) | (id << 24);
            leaf.ecx |= LEAF1_ECX_HYPERVISOR | LEAF1_ECX_X2APIC;
            if tsc_deadline {
                leaf.ecx |= LEAF1_ECX_TSC_DEADLINE;
            }
            leaf.edx &= !LEAF1_EDX_HTT;
            if vcpus > 1 {
                leaf.edx |= LEAF1_EDX_HTT;
            }
        }
        // Deterministic cache parameters (Intel); type 0 ends the list.
        0x4 if leaf.eax & 0x1f != 0 => {
            let cores = ((1u32 << topology.id_bits()) - 1).min(63);
            leaf.eax = (leaf.eax & 0x3fff) | (cache_sharers(leaf.eax, topology) << 14) | (cores << 26);
        }
        0x8000_0001 if vcpus > 1 => leaf.ecx |= AMD_LEGACY_MULTICORE,
        0x8000_0001 => leaf.ecx &= !AMD_LEGACY_MULTICORE,
        0x8000_0008 => leaf.ecx = (leaf.ecx & !0xf0ff) | (topology.id_bits() << 12) | ((vcpus - 1) & 0xff),
        // The same on AMD.
        0x8000_001d if leaf.eax & 0x1f != 0 => {
            leaf.eax = (leaf.eax & 0x3fff) | (cache_sharers(leaf.eax, topology) << 14);
        }
        // APIC id, core id with one thread each, node 0 of 1.
        0x8000_001e => (leaf.eax, leaf.ebx, leaf.ecx) = (id, id & 0xff, 0),
        _ => {}
    }
}

/// Leaves 0xb and 0x1f: one thread a core, all cores in one socket.
fn extended_topology(function: u32, topology: Topology) -> [kvm_cpuid_entry2; 3] {
    const SIGNIFICANT_INDEX: u32 = 1;
    const LEVEL_THREAD: u32 = 1;
    const LEVEL_CORE: u32 = 2;
    let level = |index, kind, shift, count| kvm_cpuid_entry2 {
        function,
        index,
        flags: SIGNIFICANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: index | kind << 8,
        edx: topology.id,
        ..Default::default()
    };
    [
        level(0, LEVEL_THREAD, 0, 1),
        level(1, LEVEL_CORE, topology.id_bits(), topology.vcpus),
        level(2, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adjusted(function: u32, eax: u32, topology: Topology) -> kvm_cpuid_entry2 {
        let mut leaf = kvm_cpuid_entry2 { function, eax, ebx: 0xaabb_ccdd, ..Default::default() };
        adjust(&mut leaf, topology, true);
        leaf
    }

    #[test]
    fn each_vcpu_names_itself() {
        for vcpus in [1, 2, 3, 8, 254] {
            for id in 0..vcpus {
                let topology = Topology { id, vcpus };
                assert_eq!(adjusted(1, 0, topology).ebx, (id << 24) | (vcpus << 16) | 0xccdd);
                assert_eq!(adjusted(0x8000_001e, 0, topology).eax, id);
                let levels = extended_topology(0xb, topology);
                assert!(levels.iter().all(|level| level.edx == id));
                assert!(vcpus <= 1 << levels[1].eax, "the shift holds all ids");
            }
        }
    }

    /// All vcpus as a driver of the host would number them: (socket, core, thread), by leaf 0xb or 0x1f (Intel's manual, vol. 3,
    /// "Extracting topology"), leaf 4 with leaf 1, and AMD's 0x80000008 and 0x8000001e.
    fn places(topology: Topology) -> [(u32, u32, u32); 4] {
        let id = topology.id;
        let by_levels = |function| {
            let [thread, core, end] = extended_topology(function, topology);
            assert_eq!(
                [thread.ecx, core.ecx, end.ecx].map(|ecx| (ecx & 0xff, ecx >> 8)),
                [(0, 1), (1, 2), (2, 0)]
            );
            assert_eq!((thread.ebx, core.ebx, end.ebx), (1, topology.vcpus, 0));
            let in_core = id & ((1 << thread.eax) - 1);
            (id >> core.eax, (id & ((1 << core.eax) - 1)) >> thread.eax, in_core)
        };
        // Addressable numbers in a socket, and of them cores: rounded up to powers of two.
        let leaf1 = adjusted(1, 0, topology);
        let numbers = if leaf1.edx & LEAF1_EDX_HTT == 0 { 1 } else { (leaf1.ebx >> 16) & 0xff };
        let socket_bits = numbers.next_power_of_two().trailing_zeros();
        let cores = (adjusted(4, 0x121, topology).eax >> 26) + 1;
        let core_bits = cores.next_power_of_two().trailing_zeros();
        assert!(core_bits <= socket_bits || numbers == 1, "more cores than threads");
        let thread_bits = socket_bits.saturating_sub(core_bits);
        let by_leaf4 = (
            id >> socket_bits,
            (id & ((1 << socket_bits) - 1)) >> thread_bits,
            id & ((1 << thread_bits) - 1),
        );
        let sizes = adjusted(0x8000_0008, 0, topology).ecx;
        assert_eq!((sizes & 0xff) + 1, topology.vcpus);
        let bits = (sizes >> 12) & 0xf;
        let amd = adjusted(0x8000_001e, 0, topology);
        assert_eq!((amd.ebx >> 8) & 0xff, 0, "one thread a core");
        assert_eq!(amd.ecx, 0, "node 0, the only one");
        [by_levels(0xb), by_levels(0x1f), by_leaf4, (amd.eax >> bits, amd.ebx & 0xff, 0)]
    }

    #[test]
    fn all_leaves_tell_the_same_place_for_every_count() {
        for vcpus in 1..=64 {
            for id in 0..vcpus {
                let topology = Topology { id, vcpus };
                assert_eq!(places(topology), [(0, id, 0); 4], "{topology:?}");
                // Whoever shares the last cache is everyone; the first two are each core's own.
                let sharers = |function, level: u32| {
                    ((adjusted(function, level << 5 | 1, topology).eax >> 14) & 0xfff) + 1
                };
                for function in [4, 0x8000_001d] {
                    assert_eq!((sharers(function, 1), sharers(function, 2)), (1, 1));
                    assert!(sharers(function, 3) >= vcpus);
                }
            }
        }
    }

    #[test]
    fn a_single_vcpu_claims_no_siblings() {
        let topology = Topology { id: 0, vcpus: 1 };
        assert_eq!(adjusted(1, 0, topology).edx & LEAF1_EDX_HTT, 0);
        assert_eq!(adjusted(4, 0x163, topology).eax >> 14, 0);
        assert_eq!(adjusted(0x8000_0008, 0, topology).ecx & 0xf0ff, 0);
    }

    #[test]
    fn only_the_last_cache_level_is_shared() {
        let topology = Topology { id: 1, vcpus: 4 };
        let sharers = |level: u32| (adjusted(4, level << 5 | 1, topology).eax >> 14) & 0xfff;
        assert_eq!((sharers(1), sharers(2), sharers(3)), (0, 0, 3));
    }
}
