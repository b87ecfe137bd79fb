//! The DSDT: the devices that a guest cannot find by probing.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed,
    Method, MethodCall, Name, Notify, ONE, Package, Path, ResourceTemplate, ZERO,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::hotplug::{self, hotplug};
use super::{OEM, OEM_REVISION, OEM_TABLE};
use crate::layout;

/// Bytes of an SDT's header.
const HEADER_BYTES: u32 = 36;
/// What a power button is notified with: pressed.
const BUTTON_PRESSED: u8 = 0x80;
/// The name of the power button's device, below the system bus.
const POWER_BUTTON: &str = "\\_SB_.PWRB";

/// The device of the generation identifier, and what it is notified with: changed.
const GENERATION: &str = "\\_SB_.VGEN";
const GENERATION_CHANGED: u8 = 0x80;

/// Builds the table.
pub(super) fn dsdt() -> impl Aml {
    let mut body = Vec::with_capacity(8192);
    host_bridge(&mut body);
    hotplug(&mut body);
    serial(&mut body);
    clock(&mut body);
    power_button(&mut body);
    generation(&mut body);
    event_device(&mut body);
    sleep_states(&mut body);
    // In one piece: the builder sums up the whole table at each append.
    let mut sdt = Sdt::new(*b"DSDT", HEADER_BYTES, 2, OEM, OEM_TABLE, OEM_REVISION);
    sdt.append_slice(&body);
    sdt
}

/// The PCI host bridge: bus 0, its window for BARs, and ECAM as a resource of the board, without which Linux would
/// not use it.
fn host_bridge(sink: &mut dyn AmlSink) {
    let hid = EISAName::new("PNP0A08");
    let cid = EISAName::new("PNP0A03");
    let bus = AddressSpace::new_bus_number(0u16, 0u16);
    let ports = IO::new(0xcf8, 0xcf8, 1, 8);
    let window = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        layout::BAR_WINDOW_BASE as u32,
        (layout::BAR_WINDOW_END - 1) as u32,
        None,
    );
    let resources = ResourceTemplate::new(vec![&bus, &ports, &window]);
    let hid = Name::new("_HID".into(), &hid);
    let cid = Name::new("_CID".into(), &cid);
    let uid = Name::new("_UID".into(), &ZERO);
    let segment = Name::new("_SEG".into(), &ZERO);
    let base_bus = Name::new("_BBN".into(), &ZERO);
    let crs = Name::new("_CRS".into(), &resources);
    Device::new(Path::new("\\_SB_.PCI0"), vec![&hid, &cid, &uid, &segment, &base_bus, &crs])
        .to_aml_bytes(sink);

    let ecam = Memory32Fixed::new(true, layout::ECAM_BASE as u32, layout::ECAM_BYTES as u32);
    let resources = ResourceTemplate::new(vec![&ecam]);
    let board = EISAName::new("PNP0C02");
    let hid = Name::new("_HID".into(), &board);
    let crs = Name::new("_CRS".into(), &resources);
    Device::new(Path::new("\\_SB_.MBRD"), vec![&hid, &uid, &crs]).to_aml_bytes(sink);
}

/// COM1, a 16550 at its usual place.
fn serial(sink: &mut dyn AmlSink) {
    let uart = EISAName::new("PNP0501");
    let hid = Name::new("_HID".into(), &uart);
    let uid = Name::new("_UID".into(), &ONE);
    let interrupt = Interrupt::new(true, true, false, false, layout::COM1_GSI);
    let ports = IO::new(layout::COM1_PORT, layout::COM1_PORT, 1, 8);
    let resources = ResourceTemplate::new(vec![&interrupt, &ports]);
    let crs = Name::new("_CRS".into(), &resources);
    Device::new(Path::new("\\_SB_.COM1"), vec![&hid, &uid, &crs]).to_aml_bytes(sink);
}

/// The power button, as a control-method device (ACPI 6.5 §4.8.3.1.1.2).
fn power_button(sink: &mut dyn AmlSink) {
    let button = EISAName::new("PNP0C0C");
    let hid = Name::new("_HID".into(), &button);
    let uid = Name::new("_UID".into(), &ZERO);
    Device::new(Path::new(POWER_BUTTON), vec![&hid, &uid]).to_aml_bytes(sink);
}

/// The clock of a PC. Without an interrupt: it has no alarm.
fn clock(sink: &mut dyn AmlSink) {
    let clock = EISAName::new("PNP0B00");
    let hid = Name::new("_HID".into(), &clock);
    let ports = IO::new(layout::CLOCK_PORT, layout::CLOCK_PORT, 1, 2);
    let resources = ResourceTemplate::new(vec![&ports]);
    let crs = Name::new("_CRS".into(), &resources);
    Device::new(Path::new("\\_SB_.RTC0"), vec![&hid, &crs]).to_aml_bytes(sink);
}

/// The generation identifier ("Virtual Machine Generation ID", Microsoft 2012): drivers look for either compatible
/// id, the first of which is too long for ACPI and is what older ones know.
fn generation(sink: &mut dyn AmlSink) {
    let ids = Package::new(vec![&"VM_Gen_Counter", &"VMGENCTR"]);
    let (low, high) = (layout::GENERATION_ID as u32, (layout::GENERATION_ID >> 32) as u32);
    let address = Package::new(vec![&low, &high]);
    let hid = Name::new("_HID".into(), &"SERI0001");
    let cid = Name::new("_CID".into(), &ids);
    let ddn = Name::new("_DDN".into(), &"VM_Gen_Counter");
    let addr = Name::new("ADDR".into(), &address);
    Device::new(Path::new(GENERATION), vec![&hid, &cid, &ddn, &addr]).to_aml_bytes(sink);
}

/// The generic event device (ACPI 6.5 §5.6.9): one interrupt means that the power button was pressed, one that there
/// is a new generation identifier, one that devices have come or shall go.
fn event_device(sink: &mut dyn AmlSink) {
    let hid = Name::new("_HID".into(), &"ACPI0013");
    let uid = Name::new("_UID".into(), &ZERO);
    let interrupts = [layout::EVENT_GSI, layout::GENERATION_GSI, layout::HOTPLUG_GSI]
        .map(|gsi| Interrupt::new(true, true, false, false, gsi));
    let resources = ResourceTemplate::new(interrupts.iter().map(|interrupt| interrupt as &dyn Aml).collect());
    let crs = Name::new("_CRS".into(), &resources);
    let (button, generation) = (Path::new(POWER_BUTTON), Path::new(GENERATION));
    let pressed = Notify::new(&button, &BUTTON_PRESSED);
    let changed = Notify::new(&generation, &GENERATION_CHANGED);
    let is_button = Equal::new(&Arg(0), &layout::EVENT_GSI);
    let is_generation = Equal::new(&Arg(0), &layout::GENERATION_GSI);
    let when_pressed = If::new(&is_button, vec![&pressed]);
    let when_changed = If::new(&is_generation, vec![&changed]);
    let scan = MethodCall::new(Path::new(hotplug::SCAN), Vec::new());
    let is_hotplug = Equal::new(&Arg(0), &layout::HOTPLUG_GSI);
    let when_plugged = If::new(&is_hotplug, vec![&scan]);
    let event = Method::new("_EVT".into(), 1, true, vec![&when_pressed, &when_changed, &when_plugged]);
    Device::new(Path::new("\\_SB_.GED0"), vec![&hid, &uid, &crs, &event]).to_aml_bytes(sink);
}

/// Only "soft off".
fn sleep_states(sink: &mut dyn AmlSink) {
    let package = Package::new(vec![&layout::S5_SLEEP_TYPE, &ZERO, &ZERO, &ZERO]);
    Name::new("\\_S5_".into(), &package).to_aml_bytes(sink);
}
