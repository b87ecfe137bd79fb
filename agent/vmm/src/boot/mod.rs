//! From files to a first instruction: the kernel, its initrd and its command line, placed as a boot protocol wants.
//!
//! ```text
//!   file says            protocol               the first vcpu starts
//!   ELF, PVH note        PVH boot ABI           32-bit, RBX → start info
//!   ELF without          Linux 64-bit entry     64-bit, RSI → zero page
//!   "HdrS" at 0x202      Linux 64-bit entry     64-bit, RSI → zero page, the setup header copied into it
//!   anything else        refused, naming the field `kernel`
//! ```
//!
//! The files are somebody's input: each header is read once, checked, and all sums are checked sums. Guest memory is
//! written here and by nobody else before the first vcpu runs.

mod bzimage;
mod elf;
mod linux;
mod pvh;

#[cfg(test)]
mod boot_test;

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use serio_hv::vm_memory::{Bytes, GuestAddress};
use serio_hv::{BootMode, BootRegisters, GDT, GuestMemory};

use crate::layout;

/// What to boot.
#[derive(Debug)]
pub struct BootSource {
    /// bzImage or vmlinux.
    pub kernel: File,
    /// The initrd, as one file.
    pub initrd: Option<File>,
    /// The command line, without an end mark.
    pub cmdline: String,
}

/// Why a guest cannot be booted from what was given.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Neither of the formats that this VMM boots.
    #[error(
        "the kernel is neither a bzImage nor a 64-bit x86 ELF (vmlinux): give the kernel file of a distribution \
         (/boot/vmlinuz-…)"
    )]
    UnknownFormat,
    /// The file starts well and then makes no sense.
    #[error("the kernel is damaged: {what}")]
    Damaged {
        /// What does not hold.
        what: &'static str,
    },
    /// A bzImage without a 64-bit entry.
    #[error("the kernel has no 64-bit entry: a 64-bit x86 kernel of Linux 3.8 or newer is needed")]
    NotLong,
    /// A file could not be read.
    #[error("cannot read the {field}")]
    Read {
        /// `kernel` or `initrd`.
        field: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It does not fit.
    #[error(
        "the {field} needs {needed} bytes of memory up to address {end:#x}, the VM has {have}: give it more memory"
    )]
    TooBig {
        /// `kernel` or `initrd`.
        field: &'static str,
        /// Its size in memory.
        needed: u64,
        /// Where it would end.
        end: u64,
        /// RAM below the PCI hole.
        have: u64,
    },
    /// Too long for this kernel.
    #[error("the cmdline has {len} bytes, this kernel takes {max}: shorten it")]
    CmdlineTooLong {
        /// Its length.
        len: u64,
        /// The kernel's limit.
        max: u64,
    },
    /// A byte that would end it early.
    #[error("the cmdline contains a zero byte: remove it")]
    CmdlineZero,
    /// Guest memory refused a write: our own map is wrong.
    #[error("cannot write {what} to guest memory: the VM needs at least 2 MiB")]
    Write {
        /// What was written.
        what: &'static str,
        /// Why.
        #[source]
        source: serio_hv::vm_memory::GuestMemoryError,
    },
}

impl BootError {
    /// The field of the VM's configuration that is to blame.
    pub fn field(&self) -> &'static str {
        match self {
            BootError::UnknownFormat | BootError::Damaged { .. } | BootError::NotLong => "kernel",
            BootError::Read { field, .. } => field,
            BootError::CmdlineTooLong { .. } | BootError::CmdlineZero => "cmdline",
            BootError::TooBig { .. } | BootError::Write { .. } => "memory",
        }
    }

    fn write(what: &'static str) -> impl FnOnce(serio_hv::vm_memory::GuestMemoryError) -> BootError {
        move |source| BootError::Write { what, source }
    }

    fn kernel(source: std::io::Error) -> BootError {
        // Shorter than its own headers say: damaged, and not the host's fault.
        if source.kind() == std::io::ErrorKind::UnexpectedEof {
            return BootError::Damaged { what: "it ends before its headers say" };
        }
        BootError::Read { field: "kernel", source }
    }
}

/// A place in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Placed {
    pub(crate) start: u64,
    pub(crate) len: u64,
}

/// What the protocols need to know of where things are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Placement {
    pub(crate) memory_bytes: u64,
    pub(crate) initrd: Option<Placed>,
    pub(crate) cmdline_len: u64,
    pub(crate) rsdp: u64,
}

/// Limits of the kernel at hand.
#[derive(Debug, Clone, Copy)]
struct Limits {
    /// First address behind the kernel, its bss and its workspace.
    kernel_end: u64,
    /// The initrd must end at or below this.
    initrd_end_max: u64,
    /// Bytes of command line, the end mark not counted.
    cmdline_max: u64,
}

/// A kernel that lies in guest memory, not yet wired to a protocol.
enum Loaded {
    Pvh(elf::Image),
    LinuxElf(elf::Image),
    BzImage(bzimage::Image),
}

impl Loaded {
    fn limits(&self) -> Limits {
        match self {
            // COMMAND_LINE_SIZE of x86 is 2048, and an ELF has no header that would say more.
            Loaded::Pvh(image) | Loaded::LinuxElf(image) => {
                Limits { kernel_end: image.end, initrd_end_max: layout::INITRD_END_MAX, cmdline_max: 2047 }
            }
            Loaded::BzImage(image) => Limits {
                kernel_end: image.end,
                initrd_end_max: image.initrd_end_max,
                cmdline_max: image.cmdline_max.min(layout::CMDLINE_BYTES_MAX - 1),
            },
        }
    }
}

/// Places everything in `memory` and says how the first vcpu starts. `rsdp` is where the ACPI tables are.
pub fn load(
    memory: &GuestMemory,
    memory_bytes: u64,
    source: &BootSource,
    rsdp: u64,
) -> Result<BootRegisters, BootError> {
    let loaded = load_kernel(memory, memory_bytes, &source.kernel)?;
    let limits = loaded.limits();
    let initrd = match &source.initrd {
        Some(file) => load_initrd(memory, memory_bytes, file, limits)?,
        None => None,
    };
    let cmdline_len = load_cmdline(memory, &source.cmdline, limits)?;
    let placement = Placement { memory_bytes, initrd, cmdline_len, rsdp };
    let registers = match loaded {
        Loaded::Pvh(image) => pvh::prepare(memory, &placement, image.pvh_entry.unwrap_or(image.entry))?,
        Loaded::LinuxElf(image) => linux::prepare(memory, &placement, None, image.entry)?,
        Loaded::BzImage(image) => linux::prepare(memory, &placement, Some(image.header), image.entry)?,
    };
    memory
        .write_slice(&GDT::bytes(registers.mode), GuestAddress(layout::GDT_BASE))
        .map_err(BootError::write("the descriptor table"))?;
    Ok(registers)
}

fn load_kernel(memory: &GuestMemory, memory_bytes: u64, file: &File) -> Result<Loaded, BootError> {
    let mut start = [0u8; 64];
    match file.read_exact_at(&mut start, 0) {
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Err(BootError::UnknownFormat),
        other => other.map_err(|source| BootError::Read { field: "kernel", source })?,
    }
    if start.starts_with(b"\x7fELF") {
        let image = elf::load(memory, memory_bytes, file, &start)?;
        return Ok(if image.pvh_entry.is_some() { Loaded::Pvh(image) } else { Loaded::LinuxElf(image) });
    }
    if bzimage::is_bzimage(file)? {
        return Ok(Loaded::BzImage(bzimage::load(memory, memory_bytes, file)?));
    }
    Err(BootError::UnknownFormat)
}

fn load_initrd(
    memory: &GuestMemory,
    memory_bytes: u64,
    file: &File,
    limits: Limits,
) -> Result<Option<Placed>, BootError> {
    let read = |source| BootError::Read { field: "initrd", source };
    // Seeking finds the size of block devices too.
    let len = (&mut &*file).seek(SeekFrom::End(0)).map_err(read)?;
    if len == 0 {
        return Ok(None);
    }
    let low_end = layout::low_ram_end(memory_bytes);
    let end = low_end.min(limits.initrd_end_max);
    let too_big = || BootError::TooBig {
        field: "initrd",
        needed: len,
        end: limits.kernel_end.saturating_add(len),
        have: low_end,
    };
    let start = end.checked_sub(len).ok_or_else(too_big)? & !(serio_hv::PAGE_SIZE - 1);
    if start < limits.kernel_end.max(layout::HIGH_MEMORY) {
        return Err(too_big());
    }
    copy(memory, file, 0, Placed { start, len }).map_err(read)?;
    Ok(Some(Placed { start, len }))
}

fn load_cmdline(memory: &GuestMemory, cmdline: &str, limits: Limits) -> Result<u64, BootError> {
    let len = cmdline.len() as u64;
    if len > limits.cmdline_max {
        return Err(BootError::CmdlineTooLong { len, max: limits.cmdline_max });
    }
    if cmdline.bytes().any(|byte| byte == 0) {
        return Err(BootError::CmdlineZero);
    }
    // Memory of a new VM is zero, but a reboot finds the last one's: the end mark is written.
    let mut bytes = Vec::with_capacity(cmdline.len().saturating_add(1));
    bytes.extend_from_slice(cmdline.as_bytes());
    bytes.push(0);
    memory
        .write_slice(&bytes, GuestAddress(layout::CMDLINE))
        .map_err(BootError::write("the command line"))?;
    Ok(len)
}

/// Reads a part of a file straight into guest memory.
fn copy(memory: &GuestMemory, file: &File, offset: u64, to: Placed) -> std::io::Result<()> {
    (&mut &*file).seek(SeekFrom::Start(offset))?;
    let len = usize::try_from(to.len).map_err(std::io::Error::other)?;
    memory.read_exact_volatile_from(GuestAddress(to.start), &mut &*file, len).map_err(|e| {
        // What is short here is the file: the place was checked.
        std::io::Error::new(std::io::ErrorKind::UnexpectedEof, e)
    })
}

/// Checks that `[start, start + len)` is RAM above 1 MiB and below the PCI hole; returns its end.
fn check_place(memory_bytes: u64, start: u64, len: u64) -> Result<u64, BootError> {
    let end =
        start.checked_add(len).ok_or(BootError::Damaged { what: "a segment ends beyond all addresses" })?;
    let have = layout::low_ram_end(memory_bytes);
    if start < layout::HIGH_MEMORY {
        return Err(BootError::Damaged { what: "a segment lies below 1 MiB, where the VMM keeps boot data" });
    }
    if end > have {
        return Err(BootError::TooBig { field: "kernel", needed: len, end, have });
    }
    Ok(end)
}

/// The registers that both of Linux' entries and PVH share.
fn registers(mode: BootMode, entry: u64) -> BootRegisters {
    BootRegisters { mode, entry, stack: layout::BOOT_STACK, rsi: 0, rbx: 0, gdt_base: layout::GDT_BASE }
}
