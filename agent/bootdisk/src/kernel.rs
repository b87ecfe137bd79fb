//! What kind of kernel a file is, by its first bytes.

/// Bytes that [`KernelKind::of`] wants to see, if the file has them.
pub const HEAD_BYTES: usize = 0x400;

/// The kinds of kernel files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelKind {
    /// Linux's own compressed image (boot protocol 2.x, "HdrS" at 0x202).
    BzImage,
    /// A 64-bit x86 ELF (vmlinux).
    Elf,
    /// A program for UEFI: a unified kernel image, a boot loader.
    Efi,
    /// None of them.
    Unknown,
}

impl KernelKind {
    /// Looks at the beginning of a file.
    #[must_use]
    pub fn of(head: &[u8]) -> Self {
        // A bzImage may be an EFI program as well ("MZ" is its EFI stub): its own header counts.
        if head.get(0x202..0x206) == Some(b"HdrS") {
            return Self::BzImage;
        }
        if head.get(..5) == Some(b"\x7fELF\x02") {
            return Self::Elf;
        }
        if head.get(..2) == Some(b"MZ") {
            return Self::Efi;
        }
        Self::Unknown
    }
}
