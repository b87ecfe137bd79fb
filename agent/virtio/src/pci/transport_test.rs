//! The transport as a driver sees it: through ECAM and BAR accesses on a bus.

use std::sync::Mutex;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::pci::bus::PciBus;
use crate::pci::common::{F_VERSION_1, next_status};
use crate::state::DeviceState;
use crate::testing::{Buffer, DriverQueue, FakePlatform, memory};

const ECAM_DEVICE: u64 = 1 << 15;
const HOME: u64 = 0xc000_0000;

#[derive(Default)]
struct Seen {
    active: Option<Activation>,
    resets: u32,
    refuse: bool,
    remembered: [u8; 2],
}

struct Probe(Arc<Mutex<Seen>>);

impl VirtioDevice for Probe {
    fn device_id(&self) -> u16 {
        2
    }
    fn features(&self) -> u64 {
        1 << 9
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16, 8]
    }
    fn read_config(&self, offset: u64, out: &mut [u8]) {
        for (at, byte) in (offset..).zip(out) {
            *byte = u8::try_from(at % 251).unwrap();
        }
    }
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut seen = self.0.lock().unwrap();
        if seen.refuse {
            return Err(ActivateError::QueueNotEnabled { index: 1 });
        }
        seen.active = Some(activation);
        Ok(())
    }
    fn reset(&mut self) {
        let mut seen = self.0.lock().unwrap();
        seen.active = None;
        seen.resets += 1;
    }
    fn suspend(&mut self) -> Result<Vec<ActiveQueue>, SuspendError> {
        let active = self.0.lock().unwrap().active.take();
        Ok(active.map(|activation| activation.queues).unwrap_or_default())
    }
    fn save(&self) -> DeviceState {
        DeviceState::new(1, self.0.lock().unwrap().remembered)
    }
    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        self.0.lock().unwrap().remembered = state.fixed(1)?.unwrap_or_default();
        Ok(())
    }
}

struct Bench {
    bus: PciBus,
    platform: Arc<FakePlatform>,
    memory: GuestMemory,
    seen: Arc<Mutex<Seen>>,
}

impl Bench {
    fn new() -> Self {
        let memory = memory(1 << 20);
        let platform = Arc::new(FakePlatform::default());
        let seen = Arc::new(Mutex::new(Seen::default()));
        let bus = PciBus::new(0xc000_0000..0xd000_0000);
        let function =
            VirtioPci::new(Box::new(Probe(seen.clone())), platform.clone(), memory.clone()).unwrap();
        assert_eq!(bus.add(Box::new(function)).unwrap(), 1);
        Self { bus, platform, memory, seen }
    }

    fn config(&self, at: u64) -> u32 {
        let mut out = [0; 4];
        self.bus.ecam_read(ECAM_DEVICE + at, &mut out);
        u32::from_le_bytes(out)
    }

    fn set_config(&self, at: u64, data: &[u8]) {
        self.bus.ecam_write(ECAM_DEVICE + at, data);
    }

    fn decode(&self) {
        self.set_config(4, &6u16.to_le_bytes());
    }

    fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut out = [0; N];
        assert!(self.bus.mmio_read(HOME + at, &mut out));
        out
    }

    fn write(&self, at: u64, data: &[u8]) {
        assert!(self.bus.mmio_write(HOME + at, data));
    }

    fn status(&self) -> u8 {
        self.read::<1>(20)[0]
    }

    fn set_status(&self, status: u8) {
        self.write(20, &[status]);
    }

    fn accept(&self, features: u64) {
        for half in [0u32, 1] {
            self.write(8, &half.to_le_bytes());
            self.write(12, &half_of(features, half).to_le_bytes());
        }
    }

    fn set_queue(&self, index: u16, rings: &DriverQueue) {
        self.write(22, &index.to_le_bytes());
        self.write(24, &rings.size.to_le_bytes());
        self.write(32, &rings.descriptors.to_le_bytes());
        self.write(40, &rings.driver.to_le_bytes());
        self.write(48, &rings.device.to_le_bytes());
        self.write(26, &index.to_le_bytes());
        self.write(28, &1u16.to_le_bytes());
    }

    /// What every driver does, up to DRIVER_OK.
    fn bring_up(&self) -> [DriverQueue; 2] {
        self.decode();
        self.set_status(3);
        self.accept(F_VERSION_1 | F_EVENT_IDX);
        self.set_status(0xb);
        assert_eq!(self.status(), 0xb);
        let rings =
            [DriverQueue::new(&self.memory, 0x1_0000, 16), DriverQueue::new(&self.memory, 0x2_0000, 8)];
        self.set_queue(0, &rings[0]);
        self.set_queue(1, &rings[1]);
        self.set_status(0xf);
        rings
    }

    fn capability(&self, id: u8, kind: Option<u8>) -> u64 {
        let mut at = u64::from(self.config(0x34) & 0xff);
        while at != 0 {
            let head = self.config(at).to_le_bytes();
            if head[0] == id && kind.is_none_or(|kind| head[3] == kind) {
                return at;
            }
            at = u64::from(head[1]);
        }
        panic!("no capability {id:#x} {kind:?}");
    }
}

fn half_of(value: u64, half: u32) -> u32 {
    u32::try_from((value >> (32 * half)) & 0xffff_ffff).unwrap()
}

#[test]
fn a_driver_finds_the_function_and_its_structures() {
    let bench = Bench::new();
    assert_eq!(bench.config(0), 0x1042_1af4);
    assert_eq!(bench.config(8) >> 8, 0x01_0000);
    let mut out = [0; 4];
    bench.bus.ecam_read(0, &mut out);
    assert_eq!(u32::from_le_bytes(out), 0x0008_1b36, "the host bridge");
    bench.bus.ecam_read(2 << 15, &mut out);
    assert_eq!(out, [0xff; 4], "nobody there");
    bench.bus.ecam_read(ECAM_DEVICE + (1 << 12), &mut out);
    assert_eq!(out, [0xff; 4], "one function only");
    for (kind, offset) in [(CFG_COMMON, 0), (CFG_NOTIFY, 0x3000), (CFG_ISR, 0x1000), (CFG_DEVICE, 0x2000)] {
        let at = bench.capability(CAP_VENDOR, Some(kind));
        assert_eq!(bench.config(at + 8), offset);
    }
    assert_eq!(bench.config(bench.capability(CAP_VENDOR, Some(CFG_NOTIFY)) + 16), NOTIFY_MULTIPLIER);
    let msix = bench.capability(CAP_MSIX, None);
    assert_eq!(bench.config(msix) >> 16, 2, "three vectors");
    assert_eq!((bench.config(msix + 4), bench.config(msix + 8)), (0x4000, 0x5000));
}

#[test]
fn the_bar_is_sized_moved_and_switched_off() {
    let bench = Bench::new();
    assert!(!bench.bus.mmio_read(HOME, &mut [0]), "decoding is off after power-on");
    assert_eq!(u64::from(bench.config(0x10)), HOME);
    bench.set_config(0x10, &[0xff; 4]);
    assert_eq!(bench.config(0x10), 0xffff_8000);
    bench.set_config(0x10, &u32::try_from(HOME).unwrap().to_le_bytes());
    bench.bring_up();
    let watched = || bench.platform.watched.lock().unwrap().keys().copied().collect::<Vec<_>>();
    assert_eq!(watched(), [HOME + 0x3000, HOME + 0x3004]);
    bench.set_config(0x10, &0xc100_0000u32.to_le_bytes());
    assert_eq!(watched(), [0xc100_3000, 0xc100_3004], "doorbells follow");
    assert!(!bench.bus.mmio_read(HOME, &mut [0]));
    assert!(bench.bus.mmio_read(0xc100_0000, &mut [0]));
    bench.set_config(4, &[0, 0]);
    assert!(watched().is_empty());
    assert!(!bench.bus.mmio_read(0xc100_0000, &mut [0]));
    bench.decode();
    assert_eq!(watched().len(), 2);
    bench.bus.reset();
    assert!(watched().is_empty());
    assert_eq!(u64::from(bench.config(0x10)), HOME, "home again");
    assert_eq!(bench.config(4) & 0xffff, 0);
}

#[test]
fn features_ok_needs_version_1_and_nothing_that_was_not_offered() {
    let bench = Bench::new();
    bench.decode();
    for bad in [0, F_EVENT_IDX, F_VERSION_1 | 1 << 5, F_VERSION_1 | 1 << 40] {
        bench.set_status(0);
        bench.set_status(3);
        bench.accept(bad);
        bench.set_status(0xb);
        assert_eq!(bench.status(), 3, "{bad:#x}");
        bench.set_status(0xf);
        assert_eq!(bench.status() & 0xc, 0, "no DRIVER_OK either");
    }
    assert!(bench.seen.lock().unwrap().active.is_none());
    bench.set_status(0);
    bench.set_status(3);
    bench.accept(F_VERSION_1 | 1 << 9);
    bench.set_status(0xf);
    assert_eq!(bench.status(), 0xb, "FEATURES_OK has to be read back first");
    bench.accept(0);
    bench.set_status(0xf);
    assert_eq!(bench.seen.lock().unwrap().active.as_ref().unwrap().features, F_VERSION_1 | 1 << 9);
}

#[test]
fn the_status_machine_only_moves_forward() {
    for old in 0..=255u8 {
        for written in 1..=255u8 {
            for acceptable in [false, true] {
                let new = next_status(old, written, acceptable);
                assert_eq!(new & old, old, "bits stay");
                assert_eq!(new & 64, old & 64, "NEEDS_RESET is the device's");
                if new & !old & 8 != 0 {
                    assert!(acceptable && new & 2 != 0);
                }
                if new & !old & 4 != 0 {
                    assert!(old & 8 != 0, "no DRIVER_OK without FEATURES_OK");
                }
            }
        }
    }
}

#[test]
fn a_device_runs_and_a_reset_stops_it() {
    let bench = Bench::new();
    bench.bring_up();
    {
        let seen = bench.seen.lock().unwrap();
        let active = seen.active.as_ref().unwrap();
        assert_eq!(active.queues.len(), 2);
        assert_eq!(active.queues[1].queue.size(), 8);
        assert!(bench.platform.guest_write(HOME + 0x3004));
        assert_eq!(active.queues[1].kick.read().unwrap(), 1, "by the kernel");
        bench.write(0x3000, &[0, 0]);
        assert_eq!(active.queues[0].kick.read().unwrap(), 1, "by us");
    }
    bench.set_status(0);
    assert_eq!(bench.status(), 0);
    assert!(bench.seen.lock().unwrap().active.is_none());
    assert!(bench.platform.watched.lock().unwrap().is_empty());
    bench.write(22, &1u16.to_le_bytes());
    assert_eq!(bench.read::<2>(28), [0, 0], "queues are off");
    assert_eq!(bench.read::<2>(26), [0xff, 0xff]);
    bench.bring_up();
    assert!(bench.seen.lock().unwrap().active.is_some(), "and again");
}

#[test]
fn interrupts_wait_behind_masks() {
    let bench = Bench::new();
    bench.bring_up();
    let (interrupt, config) = {
        let seen = bench.seen.lock().unwrap();
        let active = seen.active.as_ref().unwrap();
        (active.queues[1].interrupt.clone(), active.config_interrupt.clone())
    };
    interrupt.trigger();
    config.trigger();
    assert_eq!(bench.read::<1>(0x1000), [3], "without MSI-X a driver may poll");
    assert_eq!(bench.read::<1>(0x1000), [0], "reading clears");
    assert_eq!(bench.read::<1>(21), [1], "the configuration's generation");

    let control = bench.capability(CAP_MSIX, None) + 2;
    bench.set_config(control, &0xc000u16.to_le_bytes());
    let entry = 0x4000 + 16;
    bench.write(entry, &0xfee0_0000u32.to_le_bytes());
    bench.write(entry + 8, &0x41u32.to_le_bytes());
    bench.write(entry + 12, &[0; 4]);
    interrupt.trigger();
    assert_eq!(bench.read::<8>(0x5000), 2u64.to_le_bytes(), "function mask: pending");
    assert!(bench.platform.take_delivered().is_empty());
    bench.set_config(control, &0x8000u16.to_le_bytes());
    let message = serio_hv::MsiMessage { address: 0xfee0_0000, data: 0x41 };
    assert_eq!(bench.platform.take_delivered(), [message]);
    assert_eq!(bench.read::<1>(0x5000), [0]);
    bench.write(entry + 12, &[1, 0, 0, 0]);
    interrupt.trigger();
    interrupt.trigger();
    assert!(bench.platform.take_delivered().is_empty(), "vector mask");
    bench.write(entry + 8, &0x42u32.to_le_bytes());
    bench.write(entry + 12, &[0; 4]);
    assert_eq!(bench.platform.take_delivered(), [serio_hv::MsiMessage { data: 0x42, ..message }]);
    interrupt.trigger();
    assert_eq!(bench.platform.take_delivered().len(), 1);
    config.trigger();
    assert!(bench.platform.take_delivered().is_empty(), "no vector, no interrupt");
    assert_eq!(bench.platform.lines.load(Ordering::Relaxed), 1, "only what is used gets a line");
}

#[test]
fn queues_outside_of_memory_fail_the_device() {
    let bench = Bench::new();
    bench.decode();
    bench.set_status(3);
    bench.accept(F_VERSION_1);
    bench.set_status(0xb);
    for (desc, driver, device) in [
        (1 << 40, 0x1000, 0x2000),
        (u64::MAX - 15, 0x1000, 0x2000),
        (0x1008, 0x2000, 0x3000),
        (0x1000, 0, 0x3000),
        (0x1000, 0x2001, 0x3000),
        (0x1000, 0x2000, (1 << 20) - 8),
    ] {
        let mut rings = DriverQueue::new(&bench.memory, 0x1000, 16);
        (rings.descriptors, rings.driver, rings.device) = (desc, driver, device);
        bench.set_queue(0, &rings);
        assert_eq!(bench.read::<2>(28), [0, 0], "{desc:#x} {driver:#x} {device:#x}");
        assert_eq!(bench.status() & 64, 64);
        bench.set_status(0);
        bench.set_status(3);
        bench.accept(F_VERSION_1);
        bench.set_status(0xb);
    }
    bench.write(24, &3u16.to_le_bytes());
    assert_eq!(bench.read::<2>(24), [16, 0], "no power of two");
    bench.write(24, &32u16.to_le_bytes());
    assert_eq!(bench.read::<2>(24), [16, 0], "over the maximum");
}

#[test]
fn a_refused_activation_and_a_failing_device_ask_for_a_reset() {
    let bench = Bench::new();
    bench.seen.lock().unwrap().refuse = true;
    bench.bring_up();
    assert_eq!(bench.status(), 0x4f);
    let [why] = &bench.bus.failures()[..] else { panic!("one device does not work") };
    assert_eq!((why.slot, why.device_id), (1, 2));
    bench.seen.lock().unwrap().refuse = false;
    bench.set_status(0);
    bench.bring_up();
    assert_eq!(bench.status(), 0xf);
    assert!(bench.bus.failures().is_empty());
    let failure = bench.seen.lock().unwrap().active.as_ref().unwrap().failure.clone();
    failure.mark();
    assert!(failure.is_marked());
    let [why] = &bench.bus.failures()[..] else { panic!("one device does not work") };
    assert!(why.reason.contains("rings"), "not the reason of the time before: {}", why.reason);
    assert_eq!(bench.status(), 0x4f);
    assert_eq!(bench.read::<1>(0x1000), [2], "a configuration interrupt says so");
}

#[test]
fn the_window_in_configuration_space_reaches_the_bar() {
    let bench = Bench::new();
    let at = bench.capability(CAP_VENDOR, Some(CFG_PCI));
    bench.set_config(at + 8, &0x2003u32.to_le_bytes());
    bench.set_config(at + 12, &1u32.to_le_bytes());
    assert_eq!(bench.config(at + 16) & 0xff, 3);
    bench.set_config(at + 8, &20u32.to_le_bytes());
    bench.set_config(at + 16, &[3]);
    bench.decode();
    assert_eq!(bench.status(), 3);
    let before = bench.config(at + 16);
    for (offset, len) in
        [(0x2001, 4), (0x2003, 2), (0x2000, 3), (0x2000, 0), (0x2000, u32::MAX), (u32::MAX, 1)]
    {
        bench.set_config(at + 8, &u32::to_le_bytes(offset));
        bench.set_config(at + 12, &len.to_le_bytes());
        assert_eq!(bench.config(at + 16), before, "{offset:#x}+{len:#x} is no access");
    }
}

#[derive(Clone, Debug)]
enum Access {
    Config(u64, Vec<u8>),
    ReadConfig(u64, usize),
    Bar(u64, Vec<u8>),
    ReadBar(u64, usize),
}

fn access() -> impl Strategy<Value = Access> {
    // Mostly where registers are, sometimes anywhere.
    let config = prop_oneof![8 => 0u64..0x110, 1 => 0u64..0x20_0000];
    let bar = prop_oneof![
        8 => 0u64..0x40,
        2 => 0x1000u64..0x1010,
        2 => 0x2000u64..0x2100,
        2 => 0x3000u64..0x3010,
        4 => 0x4000u64..0x4040,
        1 => 0x5000u64..0x5010,
        1 => 0u64..0x9000,
    ];
    let data = prop_oneof![
        Just(vec![0u8]),
        prop::collection::vec(prop_oneof![Just(0u8), Just(0xff), 0u8..16, any::<u8>()], 1..9)
    ];
    prop_oneof![
        (config.clone(), data.clone()).prop_map(|(at, data)| Access::Config(at, data)),
        (config, 0usize..9).prop_map(|(at, len)| Access::ReadConfig(at, len)),
        (bar.clone(), data).prop_map(|(at, data)| Access::Bar(at, data)),
        (bar, 0usize..9).prop_map(|(at, len)| Access::ReadBar(at, len)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Any width, offset and alignment, from power-on or on a running device: never a panic, the kernel watches
    /// exactly the active doorbells, and what identifies the function never changes.
    #[test]
    fn any_access(up in any::<bool>(), accesses in prop::collection::vec(access(), 1..200)) {
        let bench = Bench::new();
        if up {
            bench.bring_up();
        }
        for access in accesses {
            match access {
                Access::Config(at, data) => bench.bus.ecam_write(ECAM_DEVICE + at, &data),
                Access::ReadConfig(at, len) => bench.bus.ecam_read(ECAM_DEVICE + at, &mut vec![0; len]),
                Access::Bar(at, data) => {
                    bench.bus.mmio_write(HOME + at, &data);
                }
                Access::ReadBar(at, len) => {
                    bench.bus.mmio_read(HOME + at, &mut vec![0; len]);
                }
            }
            let active = bench.seen.lock().unwrap().active.as_ref().map_or(0, |active| active.queues.len());
            let decoded = bench.config(4) & 2 != 0;
            let watched = bench.platform.watched.lock().unwrap().len();
            prop_assert_eq!(watched, if decoded { active } else { 0 });
        }
        prop_assert_eq!(bench.config(0), 0x1042_1af4);
        bench.bus.reset();
        prop_assert_eq!(bench.config(4) & 0xffff, 0);
        let mut byte = [0];
        bench.memory.read_slice(&mut byte, GuestAddress(0)).unwrap();
    }
}

#[path = "suspend_test.rs"]
mod suspend_test;
