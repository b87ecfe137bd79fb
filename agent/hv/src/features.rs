//! What a guest was shown of a processor, and a host does not have: it would find out by an invalid instruction.
//!
//! Compared is what KVM gives a new vcpu here with what was saved of one elsewhere, register by register, without the bits that
//! follow from what the guest has set up.
//!
//! Pure: leaves in, names out.

use kvm_bindings::kvm_cpuid_entry2;

use crate::baseline::{self, Reg};

/// At most so many are named.
const NAMED_MAX: usize = 12;

/// Leaf, subleaf and register of what is compared, and the bits that are not: OSXSAVE and MONITOR (the guest's CR4 and MSRs);
/// OSPKE (its CR4); VMX and SVM, which older programs showed and no guest of a snapshot uses.
const COMPARED: &[(u32, u32, Reg, u32)] = &[
    (0x1, 0, Reg::Ecx, 1 << 27 | 1 << 5 | 1 << 3),
    (0x1, 0, Reg::Edx, 0),
    (0x7, 0, Reg::Ebx, 0),
    (0x7, 0, Reg::Ecx, 1 << 4),
    (0x7, 0, Reg::Edx, 0),
    (0x7, 1, Reg::Eax, 0),
    // State components that XCR0 takes, and the forms of XSAVE.
    (0xd, 0, Reg::Eax, 0),
    (0xd, 1, Reg::Eax, 0),
    (0x8000_0001, 0, Reg::Ecx, 1 << 2),
    (0x8000_0001, 0, Reg::Edx, 0),
    (0x8000_0008, 0, Reg::Ebx, 0),
];

/// Names of features beyond the baselines (Intel SDM vol. 2A, CPUID; AMD APM vol. 3 §E).
const NAMES: &[(u32, u32, Reg, u32, &str)] = &[
    (0x1, 0, Reg::Ecx, 1, "pclmulqdq"),
    (0x1, 0, Reg::Ecx, 17, "pcid"),
    (0x1, 0, Reg::Ecx, 21, "x2apic"),
    (0x1, 0, Reg::Ecx, 24, "tsc-deadline"),
    (0x1, 0, Reg::Ecx, 25, "aes"),
    (0x1, 0, Reg::Ecx, 30, "rdrand"),
    (0x7, 0, Reg::Ebx, 0, "fsgsbase"),
    (0x7, 0, Reg::Ebx, 7, "smep"),
    (0x7, 0, Reg::Ebx, 9, "erms"),
    (0x7, 0, Reg::Ebx, 10, "invpcid"),
    (0x7, 0, Reg::Ebx, 16, "avx512f"),
    (0x7, 0, Reg::Ebx, 17, "avx512dq"),
    (0x7, 0, Reg::Ebx, 18, "rdseed"),
    (0x7, 0, Reg::Ebx, 19, "adx"),
    (0x7, 0, Reg::Ebx, 20, "smap"),
    (0x7, 0, Reg::Ebx, 21, "avx512ifma"),
    (0x7, 0, Reg::Ebx, 23, "clflushopt"),
    (0x7, 0, Reg::Ebx, 24, "clwb"),
    (0x7, 0, Reg::Ebx, 28, "avx512cd"),
    (0x7, 0, Reg::Ebx, 29, "sha"),
    (0x7, 0, Reg::Ebx, 30, "avx512bw"),
    (0x7, 0, Reg::Ebx, 31, "avx512vl"),
    (0x7, 0, Reg::Ecx, 1, "avx512vbmi"),
    (0x7, 0, Reg::Ecx, 2, "umip"),
    (0x7, 0, Reg::Ecx, 3, "pku"),
    (0x7, 0, Reg::Ecx, 6, "avx512vbmi2"),
    (0x7, 0, Reg::Ecx, 8, "gfni"),
    (0x7, 0, Reg::Ecx, 9, "vaes"),
    (0x7, 0, Reg::Ecx, 10, "vpclmulqdq"),
    (0x7, 0, Reg::Ecx, 11, "avx512vnni"),
    (0x7, 0, Reg::Ecx, 16, "la57"),
    (0x7, 0, Reg::Ecx, 22, "rdpid"),
    (0x7, 0, Reg::Edx, 22, "amx-bf16"),
    (0x7, 0, Reg::Edx, 24, "amx-tile"),
    (0x7, 0, Reg::Edx, 26, "spec-ctrl"),
    (0x7, 0, Reg::Edx, 31, "ssbd"),
    (0x7, 1, Reg::Eax, 4, "avx-vnni"),
    (0x7, 1, Reg::Eax, 5, "avx512bf16"),
    (0xd, 1, Reg::Eax, 1, "xsavec"),
    (0xd, 1, Reg::Eax, 3, "xsaves"),
    (0x8000_0001, 0, Reg::Ecx, 6, "sse4a"),
    (0x8000_0001, 0, Reg::Edx, 26, "1-gib-pages"),
    (0x8000_0001, 0, Reg::Edx, 27, "rdtscp"),
];

/// What `saved` shows and `here` does not; empty: the guest finds all that it knows.
pub(crate) fn lacking(here: &[kvm_cpuid_entry2], saved: &[kvm_cpuid_entry2]) -> Vec<String> {
    let mut missing = Vec::new();
    for &(leaf, subleaf, reg, passed_over) in COMPARED {
        let value = |leaves: &[kvm_cpuid_entry2]| {
            let found = leaves.iter().find(|entry| entry.function == leaf && entry.index == subleaf);
            found.map_or(0, |entry| reg.of(entry))
        };
        let gone = value(saved) & !value(here) & !passed_over;
        missing.extend(
            (0..u32::BITS).filter(|bit| gone >> bit & 1 == 1).map(|bit| name(leaf, subleaf, reg, bit)),
        );
    }
    let more = missing.len().saturating_sub(NAMED_MAX);
    missing.truncate(NAMED_MAX);
    missing.extend((more > 0).then(|| format!("{more} more")));
    missing
}

fn name(leaf: u32, subleaf: u32, reg: Reg, bit: u32) -> String {
    let known = NAMES.iter().find(|known| (known.0, known.1, known.2, known.3) == (leaf, subleaf, reg, bit));
    let known =
        known.map(|known| known.4).or_else(|| baseline::name(leaf, reg, bit).filter(|_| subleaf == 0));
    known.map_or_else(|| format!("bit {bit} of {reg:?} of CPUID leaf {leaf:#x}.{subleaf}"), ToOwned::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, ebx: u32, ecx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, ebx, ecx, ..Default::default() }
    }

    #[test]
    fn what_a_host_lacks_is_named() {
        let rich = [leaf(1, 0, 0, u32::MAX), leaf(7, 0, 1 << 5 | 1 << 16 | 1 << 15, 0)];
        let poor = [leaf(1, 0, 0, !(1 << 25)), leaf(7, 0, 1 << 5, 0)];
        assert_eq!(lacking(&poor, &rich), ["aes", "bit 15 of Ebx of CPUID leaf 0x7.0", "avx512f"]);
        assert_eq!(lacking(&rich, &poor), Vec::<String>::new(), "more than before is no harm");
        assert_eq!(lacking(&[leaf(1, 0, 0, 0)], &[leaf(1, 0, 0, 1 << 28 | 1 << 26)]), ["xsave", "avx"]);
        // What the guest has switched on itself.
        assert_eq!(
            lacking(&[], &[leaf(1, 0, 0, 1 << 27 | 1 << 5 | 1 << 3), leaf(7, 0, 0, 1 << 4)]),
            Vec::<String>::new()
        );
        let all = lacking(&[], &rich);
        assert_eq!((all.len(), all.last().map(String::as_str)), (NAMED_MAX + 1, Some("20 more")));
    }
}
