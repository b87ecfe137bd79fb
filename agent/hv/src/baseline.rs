//! CPU baselines: named sets of features, so that a VM sees the same processor on unlike hosts.
//!
//! ```text
//!   host          all that this host and its KVM have, but no virtualization inside
//!   x86-64-v2     the psABI's level 2 (about 2009): SSE4.2, SSSE3, POPCNT, CMPXCHG16B, LAHF
//!   x86-64-v3     level 3 (about 2015): also AVX2, BMI, FMA, F16C, LZCNT, MOVBE, XSAVE
//! ```
//!
//! A baseline is a list of features by name ([`FEATURES`]); what is not in it is hidden, and a host that lacks one of them
//! cannot run the VM. Three kinds of bits stay whatever the baseline, because they are the hypervisor's or the host's own:
//! what KVM emulates (x2APIC, TSC deadline, hypervisor), how leaves of the topology are found, and the bits that tell of
//! mitigations against speculation: hiding those would leave guests open. Vendor, family and model stay the host's.
//!
//! No VM gets VMX or SVM, whatever KVM offers: a guest that runs guests has state in KVM that no snapshot of ours holds, and
//! reaches the part of KVM with the longest list of escapes.
//!
//! Pure: leaves in, leaves out.

use kvm_bindings::kvm_cpuid_entry2;

/// A named set of processor features.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Baseline {
    /// The psABI's level 2.
    V2,
    /// The psABI's level 3.
    V3,
    /// Whatever this host has.
    #[default]
    Host,
}

/// No baseline has this name.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is no CPU baseline: host, x86-64-v2 or x86-64-v3")]
pub struct UnknownBaseline(pub String);

/// The host lacks features of a baseline.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("this host's processor or KVM lacks {} of {baseline}: choose a lower baseline, or another host", missing.join(", "))]
pub struct MissingFeatures {
    /// The baseline asked for.
    pub baseline: Baseline,
    /// The names of the features.
    pub missing: Vec<&'static str>,
}

impl Baseline {
    /// All of them, and their names.
    pub const ALL: [(Baseline, &'static str); 3] =
        [(Baseline::Host, "host"), (Baseline::V2, "x86-64-v2"), (Baseline::V3, "x86-64-v3")];
}

impl std::str::FromStr for Baseline {
    type Err = UnknownBaseline;

    fn from_str(text: &str) -> Result<Baseline, UnknownBaseline> {
        let found = Baseline::ALL.into_iter().find(|(_, name)| *name == text);
        found.map(|(baseline, _)| baseline).ok_or_else(|| UnknownBaseline(text.to_owned()))
    }
}

impl std::fmt::Display for Baseline {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = Baseline::ALL.into_iter().find(|(baseline, _)| baseline == self);
        f.write_str(name.map_or("", |(_, name)| name))
    }
}

/// A register of a leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reg {
    Eax,
    Ebx,
    Ecx,
    Edx,
}
use Reg::{Ebx, Ecx, Edx};

impl Reg {
    pub(crate) fn of(self, leaf: &kvm_cpuid_entry2) -> u32 {
        match self {
            Reg::Eax => leaf.eax,
            Ebx => leaf.ebx,
            Ecx => leaf.ecx,
            Edx => leaf.edx,
        }
    }
}

/// Leaf (its subleaf is 0), register, bit, name, and the lowest baseline that has it.
const FEATURES: &[(u32, Reg, u32, &str, Baseline)] = &[
    // What every 64-bit processor has.
    (0x1, Edx, 0, "fpu", Baseline::V2),
    (0x1, Edx, 1, "vme", Baseline::V2),
    (0x1, Edx, 2, "de", Baseline::V2),
    (0x1, Edx, 3, "pse", Baseline::V2),
    (0x1, Edx, 4, "tsc", Baseline::V2),
    (0x1, Edx, 5, "msr", Baseline::V2),
    (0x1, Edx, 6, "pae", Baseline::V2),
    (0x1, Edx, 7, "mce", Baseline::V2),
    (0x1, Edx, 8, "cx8", Baseline::V2),
    (0x1, Edx, 9, "apic", Baseline::V2),
    (0x1, Edx, 11, "sep", Baseline::V2),
    (0x1, Edx, 12, "mtrr", Baseline::V2),
    (0x1, Edx, 13, "pge", Baseline::V2),
    (0x1, Edx, 14, "mca", Baseline::V2),
    (0x1, Edx, 15, "cmov", Baseline::V2),
    (0x1, Edx, 16, "pat", Baseline::V2),
    (0x1, Edx, 17, "pse36", Baseline::V2),
    (0x1, Edx, 19, "clflush", Baseline::V2),
    (0x1, Edx, 23, "mmx", Baseline::V2),
    (0x1, Edx, 24, "fxsr", Baseline::V2),
    (0x1, Edx, 25, "sse", Baseline::V2),
    (0x1, Edx, 26, "sse2", Baseline::V2),
    (0x8000_0001, Edx, 11, "syscall", Baseline::V2),
    (0x8000_0001, Edx, 20, "nx", Baseline::V2),
    (0x8000_0001, Edx, 29, "lm", Baseline::V2),
    // x86-64-v2.
    (0x1, Ecx, 0, "sse3", Baseline::V2),
    (0x1, Ecx, 9, "ssse3", Baseline::V2),
    (0x1, Ecx, 13, "cmpxchg16b", Baseline::V2),
    (0x1, Ecx, 19, "sse4.1", Baseline::V2),
    (0x1, Ecx, 20, "sse4.2", Baseline::V2),
    (0x1, Ecx, 23, "popcnt", Baseline::V2),
    (0x8000_0001, Ecx, 0, "lahf", Baseline::V2),
    // x86-64-v3.
    (0x1, Ecx, 12, "fma", Baseline::V3),
    (0x1, Ecx, 22, "movbe", Baseline::V3),
    (0x1, Ecx, 26, "xsave", Baseline::V3),
    (0x1, Ecx, 28, "avx", Baseline::V3),
    (0x1, Ecx, 29, "f16c", Baseline::V3),
    (0x7, Ebx, 3, "bmi1", Baseline::V3),
    (0x7, Ebx, 5, "avx2", Baseline::V3),
    (0x7, Ebx, 8, "bmi2", Baseline::V3),
    (0x8000_0001, Ecx, 5, "lzcnt", Baseline::V3),
];

/// Bits that stay in any baseline if the host has them: leaf, register, mask.
const KEPT: &[(u32, Reg, u32)] = &[
    // x2APIC, TSC deadline, OSXSAVE (which mirrors CR4), hypervisor; HTT, which the topology sets.
    (0x1, Ecx, 1 << 21 | 1 << 24 | 1 << 27 | 1 << 31),
    (0x1, Edx, 1 << 28),
    // MD_CLEAR, SPEC_CTRL, STIBP, L1D_FLUSH, ARCH_CAPABILITIES, CORE_CAPABILITIES, SSBD.
    (0x7, Edx, 1 << 10 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 29 | 1 << 30 | 1 << 31),
    // CMP_LEGACY and TOPOEXT: the topology leaves.
    (0x8000_0001, Ecx, 1 << 1 | 1 << 22),
    // AMD repeats bits of leaf 1 here.
    (0x8000_0001, Edx, 0x0183_f3ff),
    // The TSC runs at one rate.
    (0x8000_0007, Edx, 1 << 8),
    // IBPB, IBRS, STIBP and their forms, SSBD, VIRT_SSBD, SSB_NO.
    (0x8000_0008, Ebx, 1 << 12 | 0x1f << 14 | 7 << 24),
];

/// Intel SDM vol. 2A, CPUID leaf 1.
const LEAF1_ECX_VMX: u32 = 1 << 5;
/// AMD APM vol. 3 §E.4: Fn8000_0001 ECX, and the leaf of SVM's features.
const AMD_SVM: u32 = 1 << 2;
const AMD_SVM_LEAF: u32 = 0x8000_000a;
/// Bytes of the XSAVE area with x87, SSE and AVX (Intel SDM vol. 1 §13.4).
const XSAVE_BYTES_V3: u32 = 832;
/// x87, SSE, AVX.
const XCR0_V3: u32 = 7;
/// The last basic leaf that a baseline shows.
const LEAF_MAX: u32 = 0xd;
/// `ARAT`: the local timer runs always.
const LEAF6_ARAT: u32 = 1 << 2;

/// What a VM of this baseline sees of `supported`; or what the host lacks.
pub(crate) fn apply(
    supported: &[kvm_cpuid_entry2],
    baseline: Baseline,
) -> Result<Vec<kvm_cpuid_entry2>, MissingFeatures> {
    if baseline == Baseline::Host {
        return Ok(of_host(supported));
    }
    let has = |leaf: u32, reg: Reg, bit: u32| {
        let found = supported.iter().find(|entry| entry.function == leaf && entry.index == 0);
        found.is_some_and(|entry| reg.of(entry) >> bit & 1 == 1)
    };
    let needed = FEATURES.iter().filter(|feature| feature.4 <= baseline);
    let missing: Vec<_> = needed.filter(|f| !has(f.0, f.1, f.2)).map(|f| f.3).collect();
    if !missing.is_empty() {
        return Err(MissingFeatures { baseline, missing });
    }
    Ok(supported.iter().filter_map(|entry| filter(*entry, baseline)).collect())
}

/// The feature that a bit of a leaf tells of, if a baseline has it.
pub(crate) fn name(leaf: u32, reg: Reg, bit: u32) -> Option<&'static str> {
    FEATURES.iter().find(|known| (known.0, known.1, known.2) == (leaf, reg, bit)).map(|known| known.3)
}

/// What any VM may see at most, also one for which nobody names a baseline.
pub(crate) fn of_host(supported: &[kvm_cpuid_entry2]) -> Vec<kvm_cpuid_entry2> {
    supported.iter().filter_map(|entry| without_nesting(*entry)).collect()
}

/// One leaf without virtualization inside; `None`: it is about nothing else.
fn without_nesting(mut entry: kvm_cpuid_entry2) -> Option<kvm_cpuid_entry2> {
    match entry.function {
        0x1 => entry.ecx &= !LEAF1_ECX_VMX,
        0x8000_0001 => entry.ecx &= !AMD_SVM,
        AMD_SVM_LEAF => return None,
        _ => {}
    }
    Some(entry)
}

/// The bits of a register that a baseline shows.
fn mask(leaf: u32, reg: Reg, baseline: Baseline) -> u32 {
    let listed = FEATURES.iter().filter(|f| f.0 == leaf && f.1 == reg && f.4 <= baseline);
    let kept = KEPT.iter().filter(|kept| kept.0 == leaf && kept.1 == reg);
    listed.map(|f| 1 << f.2).chain(kept.map(|kept| kept.2)).fold(0, |sum, bits| sum | bits)
}

/// One leaf as the baseline shows it; `None`: not at all.
fn filter(mut entry: kvm_cpuid_entry2, baseline: Baseline) -> Option<kvm_cpuid_entry2> {
    let leaf = entry.function;
    let masked = |value: u32, reg| value & mask(leaf, reg, baseline);
    match (leaf, entry.index) {
        (0x0, _) => entry.eax = entry.eax.min(LEAF_MAX),
        // Family and numbers, then features.
        (0x1, _) => (entry.ecx, entry.edx) = (masked(entry.ecx, Ecx), masked(entry.edx, Edx)),
        (0x6, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (entry.eax & LEAF6_ARAT, 0, 0, 0),
        (0x7, 0) => {
            entry.eax = 0;
            (entry.ebx, entry.ecx, entry.edx) = (masked(entry.ebx, Ebx), 0, masked(entry.edx, Edx));
        }
        // No counters: they differ from host to host.
        (0xa, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        (0xd, 0) if baseline >= Baseline::V3 => {
            (entry.eax, entry.ecx, entry.edx) = (entry.eax & XCR0_V3, XSAVE_BYTES_V3, 0);
        }
        (0xd, 1) if baseline >= Baseline::V3 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        (0xd, 2) if baseline >= Baseline::V3 => {}
        (0x2 | 0x4 | 0x5 | 0xb, _) => {}
        (0x8000_0001, _) => {
            (entry.ebx, entry.ecx, entry.edx) = (0, masked(entry.ecx, Ecx), masked(entry.edx, Edx));
        }
        (0x8000_0007, _) => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, masked(entry.edx, Edx));
        }
        (0x8000_0008, _) => (entry.ebx, entry.edx) = (masked(entry.ebx, Ebx), 0),
        // The hypervisor's own; names, caches and topology.
        (0x4000_0000..=0x4fff_ffff, _) => {}
        (0x8000_0000 | 0x8000_0002..=0x8000_0006 | 0x8000_001d | 0x8000_001e, _) => {}
        _ => return None,
    }
    Some(entry)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A processor that has everything, as far as anybody asks.
    fn everything() -> Vec<kvm_cpuid_entry2> {
        let full = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        };
        let mut leaves: Vec<_> = (0..0x25).map(|leaf| full(leaf, 0)).collect();
        leaves.extend([full(7, 1), full(7, 2), full(0xd, 1), full(0xd, 2), full(0xd, 5), full(0xd, 9)]);
        leaves.extend((0x8000_0000..0x8000_0022).map(|leaf| full(leaf, 0)));
        leaves.push(full(0x4000_0001, 0));
        leaves
    }

    fn leaf(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        leaves.iter().copied().find(|l| l.function == function && l.index == index).unwrap_or_default()
    }

    #[test]
    fn names_are_read_and_written() {
        for (baseline, name) in Baseline::ALL {
            assert_eq!(name.parse::<Baseline>().expect("known"), baseline);
            assert_eq!(baseline.to_string(), name);
        }
        assert!("x86-64-v4".parse::<Baseline>().expect_err("not offered").to_string().contains("x86-64-v3"));
    }

    #[test]
    fn v2_hides_avx_and_v3_shows_it() {
        let v2 = apply(&everything(), Baseline::V2).expect("all is there");
        let v3 = apply(&everything(), Baseline::V3).expect("all is there");
        const AVX2: u32 = 1 << 5;
        const AVX512F: u32 = 1 << 16;
        const AVX_XSAVE_FMA: u32 = 1 << 28 | 1 << 26 | 1 << 12;
        assert_eq!(leaf(&v2, 7, 0).ebx, 0);
        assert_eq!(leaf(&v2, 1, 0).ecx & AVX_XSAVE_FMA, 0);
        assert_eq!(leaf(&v2, 0xd, 0), kvm_cpuid_entry2::default(), "no XSAVE, no leaf for it");
        assert_eq!(leaf(&v3, 7, 0).ebx & (AVX2 | AVX512F), AVX2);
        assert_eq!(leaf(&v3, 1, 0).ecx & AVX_XSAVE_FMA, AVX_XSAVE_FMA);
        let state = leaf(&v3, 0xd, 0);
        assert_eq!((state.eax, state.ecx, state.edx), (7, 832, 0));
        assert_eq!(leaf(&v3, 0xd, 5), kvm_cpuid_entry2::default(), "no state of AVX-512");
        for leaves in [&v2, &v3] {
            assert_eq!((leaf(leaves, 7, 0).eax, leaf(leaves, 7, 0).ecx), (0, 0));
            for hidden in [0x14, 0x12, 0x1f, 0x24, 0x8000_000a, 0x8000_001f] {
                assert_eq!(leaf(leaves, hidden, 0), kvm_cpuid_entry2::default(), "{hidden:#x}");
            }
            assert_eq!(leaf(leaves, 0, 0).eax, 0xd);
            // Mitigations, x2APIC and the hypervisor stay.
            assert!(leaf(leaves, 7, 0).edx >> 31 == 1 && leaf(leaves, 1, 0).ecx >> 31 == 1);
            assert_eq!(leaf(leaves, 0x4000_0001, 0).eax, u32::MAX);
            // RDRAND, AES, VMX, MONITOR, 1 GiB pages: in no baseline.
            assert_eq!(leaf(leaves, 1, 0).ecx & (1 << 30 | 1 << 25 | 1 << 5 | 1 << 3), 0);
            assert_eq!(leaf(leaves, 0x8000_0001, 0).edx & (1 << 26), 0);
        }
    }

    #[test]
    fn no_guest_is_offered_virtualization() {
        for (baseline, _) in Baseline::ALL {
            let leaves = apply(&everything(), baseline).expect("all is there");
            assert_eq!(leaf(&leaves, 1, 0).ecx & 1 << 5, 0, "VMX of {baseline}");
            assert_eq!(leaf(&leaves, 0x8000_0001, 0).ecx & 1 << 2, 0, "SVM of {baseline}");
            assert_eq!(leaf(&leaves, 0x8000_000a, 0), kvm_cpuid_entry2::default(), "{baseline}");
        }
        // And nothing else is missing.
        let host = apply(&everything(), Baseline::Host).expect("all is there");
        assert_eq!((host.len(), leaf(&host, 7, 0).ebx), (everything().len() - 1, u32::MAX));
    }

    #[test]
    fn what_unlike_hosts_show_is_the_same() {
        // A host with exactly the features of v3, and one with everything.
        let rich = everything();
        let poor: Vec<_> = apply(&rich, Baseline::V3).expect("all is there");
        for baseline in [Baseline::V2, Baseline::V3] {
            assert_eq!(apply(&rich, baseline), apply(&poor, baseline), "{baseline}");
        }
    }

    #[test]
    fn a_host_that_lacks_something_says_what() {
        let mut old = everything();
        for entry in &mut old {
            match (entry.function, entry.index) {
                (7, 0) => entry.ebx = 0,
                (1, 0) => entry.ecx &= !(1 << 28),
                _ => {}
            }
        }
        assert!(apply(&old, Baseline::V2).is_ok());
        assert!(apply(&old, Baseline::Host).is_ok());
        let error = apply(&old, Baseline::V3).expect_err("no AVX2");
        assert_eq!(error.missing, ["avx", "bmi1", "avx2", "bmi2"]);
        let text = error.to_string();
        assert!(text.contains("avx, bmi1, avx2, bmi2 of x86-64-v3"), "{text}");
        assert_eq!(apply(&[], Baseline::V2).expect_err("nothing at all").missing.len(), 32);
    }
}
