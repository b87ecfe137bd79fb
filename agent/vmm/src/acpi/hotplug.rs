//! Hot plug of PCI devices (ACPI 6.5 §6.3, PCI firmware 3.3 §4.8): a slot for each device number of bus 0, the registers
//! (`machine/hotplug.rs`), and the method that tells the guest which slots to look at.

use acpi_tables::aml::{
    And, Device, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, Local, Method, Name,
    Notify, OpRegion, OpRegionSpace, Path, Scope, Store, ZERO,
};
use acpi_tables::{Aml, AmlSink};

use crate::layout;

/// What the event device calls.
pub(super) const SCAN: &str = "\\_SB_.PCI0.PSCN";

const BRIDGE: &str = "\\_SB_.PCI0";
const REGION: &str = "\\_SB_.PCI0.HPRG";
const UP: &str = "\\_SB_.PCI0.PCIU";
const DOWN: &str = "\\_SB_.PCI0.PCID";
const EJECT: &str = "\\_SB_.PCI0.PCIE";
const REGION_BYTES: u8 = 12;
const FIELD_BITS: usize = 32;

/// Device check and eject request (ACPI 6.5 §5.6.6).
const HAS_COME: u8 = 1;
const SHALL_GO: u8 = 3;

/// The device numbers that devices can have, and the bit of each.
fn slots() -> impl Iterator<Item = (u8, u32)> {
    (1u8..32).filter_map(|slot| Some((slot, 1u32.checked_shl(slot.into())?)))
}

fn device(slot: u8) -> Path {
    Path::new(&format!("\\_SB_.PCI0.SL{slot:02X}"))
}

/// Registers, slots and the method.
pub(super) fn hotplug(sink: &mut dyn AmlSink) {
    OpRegion::new(Path::new(REGION), OpRegionSpace::SystemIO, &layout::HOTPLUG_PORT, &REGION_BYTES)
        .to_aml_bytes(sink);
    // A field has no path of its own: its names go where it stands.
    let field = Field::new(
        Path::new(REGION),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        [*b"PCIU", *b"PCID", *b"PCIE"].map(|name| FieldEntry::Named(name, FIELD_BITS)).into(),
    );
    Scope::new(Path::new(BRIDGE), vec![&field]).to_aml_bytes(sink);
    slots().for_each(|(number, bit)| slot(sink, number, bit));
    scan(sink);
}

/// A slot: its number, its address, and how the guest lets go of what is in it.
fn slot(sink: &mut dyn AmlSink, number: u8, bit: u32) {
    let address = u32::from(number) << 16;
    let number_name = Name::new("_SUN".into(), &number);
    let address = Name::new("_ADR".into(), &address);
    let eject = Path::new(EJECT);
    let let_go = Store::new(&eject, &bit);
    let method = Method::new("_EJ0".into(), 1, true, vec![&let_go]);
    Device::new(device(number), vec![&number_name, &address, &method]).to_aml_bytes(sink);
}

/// Reads both registers, which clears them, and notifies each slot that they name.
fn scan(sink: &mut dyn AmlSink) {
    let (up, down) = (Path::new(UP), Path::new(DOWN));
    let (come, gone) = (Local(0), Local(1));
    let mut body = Vec::new();
    Store::new(&come, &up).to_aml_bytes(&mut body);
    Store::new(&gone, &down).to_aml_bytes(&mut body);
    for (number, bit) in slots() {
        let device = device(number);
        for (register, what) in [(&come, HAS_COME), (&gone, SHALL_GO)] {
            let is_meant = And::new(&ZERO, register, &bit);
            let notify = Notify::new(&device, &what);
            If::new(&is_meant, vec![&notify]).to_aml_bytes(&mut body);
        }
    }
    Method::new(Path::new(SCAN), 0, true, vec![&Raw(body)]).to_aml_bytes(sink);
}

/// What is encoded already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}
