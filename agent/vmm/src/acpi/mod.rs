//! The ACPI tables: what the machine is, for guests that look. Reduced hardware: no legacy timer, no legacy
//! interrupt controllers, no fixed power-management registers.
//!
//! ```text
//!   RSDP → XSDT → FADT → DSDT   PCI host bridge with hot-plug slots, COM1, clock, event device (power button, generation id, hot plug), S5
//!               → MADT          one local APIC a vcpu, the IO-APIC
//!               → MCFG          ECAM of bus 0
//!               → WDAT          the watchdog
//! ```
//!
//! Built as bytes, then placed at one address; the guest's own interpreter does the rest. Rebuilt at each boot.

mod dsdt;
mod hotplug;
mod wdat;

#[cfg(test)]
mod acpi_test;

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;

use crate::layout;
use serio_devices::rtc::CENTURY_REGISTER;

const OEM: [u8; 6] = *b"SERIO ";
const OEM_TABLE: [u8; 8] = *b"SERIOVMM";
const OEM_REVISION: u32 = 1;

/// FADT IA-PC boot flags (ACPI 6.5 §5.2.9.3): no VGA to probe. The bits for legacy devices and for a
/// keyboard controller stay clear, so that nobody waits for one.
const BOOT_VGA_NOT_PRESENT: u16 = 1 << 2;

/// All tables, as one block of bytes for [`layout::ACPI_BASE`]; the RSDP is at its start.
#[derive(Debug)]
pub struct Tables {
    bytes: Vec<u8>,
    /// Where each table starts, for tests and for reading them back.
    offsets: Vec<usize>,
}

impl Tables {
    /// Builds the tables of a machine with `vcpus`.
    pub fn new(vcpus: u32) -> Tables {
        let mut tables = Tables { bytes: vec![0; Rsdp::len().next_multiple_of(16)], offsets: Vec::new() };
        let dsdt = tables.add(&dsdt::dsdt());
        let pointers = [
            tables.add(&fadt(dsdt)),
            tables.add(&madt(vcpus)),
            tables.add(&mcfg()),
            tables.add(&wdat::wdat()),
        ];
        let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
        pointers.into_iter().for_each(|address| xsdt.add_entry(address));
        let xsdt = tables.add(&xsdt);
        let mut rsdp = Vec::new();
        Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
        for (slot, byte) in tables.bytes.iter_mut().zip(rsdp) {
            *slot = byte;
        }
        tables
    }

    /// What to write at [`layout::ACPI_BASE`].
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The guest address of the RSDP.
    pub fn rsdp(&self) -> u64 {
        layout::ACPI_BASE
    }

    /// Appends a table, aligned as tables like to be; returns its guest address.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let offset = self.bytes.len();
        self.offsets.push(offset);
        table.to_aml_bytes(&mut self.bytes);
        layout::ACPI_BASE + offset as u64
    }
}

fn port(port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port))
}

fn fadt(dsdt: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        // Both buttons are devices of the DSDT, not fixed registers.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        .flag(Flags::HwReducedAcpi);
    fadt.iapc_boot_arch = BOOT_VGA_NOT_PRESENT.into();
    fadt.century = CENTURY_REGISTER;
    fadt.reset_reg = port(layout::RESET_PORT);
    fadt.reset_value = layout::RESET_VALUE;
    fadt.sleep_control_reg = port(layout::SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(layout::SLEEP_STATUS_PORT);
    fadt.finalize()
}

fn madt(vcpus: u32) -> impl Aml {
    let address = LocalInterruptController::Address(layout::LOCAL_APIC_BASE as u32);
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, address);
    for id in 0..vcpus.min(255) {
        madt.add_structure(ProcessorLocalApic::new(id as u8, id as u8, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC_BASE as u32, 0));
    madt
}

fn mcfg() -> impl Aml {
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    mcfg.add_ecam(layout::ECAM_BASE, 0, 0, 0);
    mcfg
}
