//! For tests of devices and transports: a hypervisor that only takes notes, and a driver's side of a ring.
//!
//! Built with the feature `testing`. Panics on the test's own mistakes.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use serio_hv::GuestMemory;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::device::{Activation, ActiveQueue};
use crate::interrupt::{ConfigInterrupt, DeviceFailure, NO_VECTOR, QueueInterrupt, Shared};
use crate::msix::{CONTROL_ENABLE, Msix};
use crate::platform::{MsiMessage, MsiRoute, Platform};
use crate::queue::VirtQueue;

/// Guest memory for tests: one region from 0.
pub fn memory(bytes: usize) -> GuestMemory {
    Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes)]).unwrap())
}

/// Notes which addresses are watched, and which messages were delivered.
#[derive(Default)]
pub struct FakePlatform {
    pub watched: Mutex<BTreeMap<u64, EventFd>>,
    pub delivered: Arc<Mutex<Vec<MsiMessage>>>,
    pub bell: Option<EventFd>,
    pub lines: AtomicU64,
}

impl FakePlatform {
    /// As the kernel would: rings the doorbell at this address. `false`: nobody watches it.
    pub fn guest_write(&self, address: u64) -> bool {
        let watched = self.watched.lock().unwrap();
        watched.get(&address).inspect(|event| event.write(1).unwrap()).is_some()
    }

    /// What was delivered since the last call.
    pub fn take_delivered(&self) -> Vec<MsiMessage> {
        std::mem::take(&mut self.delivered.lock().unwrap())
    }
}

struct FakeRoute {
    message: Mutex<Option<MsiMessage>>,
    delivered: Arc<Mutex<Vec<MsiMessage>>>,
    event: EventFd,
    rings: bool,
}

impl MsiRoute for FakeRoute {
    fn route(&self, message: MsiMessage) -> io::Result<()> {
        *self.message.lock().unwrap() = Some(message);
        Ok(())
    }

    fn trigger(&self) -> io::Result<()> {
        let message = self.message.lock().unwrap().expect("only routed lines are triggered");
        self.delivered.lock().unwrap().push(message);
        if self.rings { self.event.write(1) } else { Ok(()) }
    }

    fn event(&self) -> &EventFd {
        &self.event
    }

    fn hold(&self) -> io::Result<()> {
        *self.message.lock().unwrap() = None;
        Ok(())
    }
}

impl Platform for FakePlatform {
    fn msi_route(&self) -> io::Result<Box<dyn MsiRoute>> {
        self.lines.fetch_add(1, Ordering::Relaxed);
        let bell = self.bell.as_ref().map(EventFd::try_clone).transpose()?;
        let rings = bell.is_some();
        let event = bell.map_or_else(|| EventFd::new(EFD_NONBLOCK), Ok)?;
        Ok(Box::new(FakeRoute { message: Mutex::new(None), delivered: self.delivered.clone(), event, rings }))
    }

    fn watch(&self, address: u64, event: &EventFd) -> io::Result<()> {
        let old = self.watched.lock().unwrap().insert(address, event.try_clone()?);
        assert!(old.is_none(), "{address:#x} is watched already");
        Ok(())
    }

    fn unwatch(&self, address: u64, _event: &EventFd) -> io::Result<()> {
        assert!(self.watched.lock().unwrap().remove(&address).is_some(), "{address:#x} is not watched");
        Ok(())
    }
}

/// One buffer that a driver offers.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    pub address: u64,
    pub len: u32,
    pub writable: bool,
}

impl Buffer {
    pub fn readable(address: u64, len: u32) -> Self {
        Self { address, len, writable: false }
    }

    pub fn writable(address: u64, len: u32) -> Self {
        Self { address, len, writable: true }
    }
}

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;

/// The driver's side of a split virtqueue.
pub struct DriverQueue {
    memory: GuestMemory,
    pub descriptors: u64,
    pub driver: u64,
    pub device: u64,
    pub size: u16,
    free: Vec<u16>,
    chains: BTreeMap<u16, Vec<u16>>,
    next_avail: u16,
    next_used: u16,
}

impl DriverQueue {
    /// Lays the rings out from `base` on (page-aligned pieces, at most 12 KiB + 16·size).
    pub fn new(memory: &GuestMemory, base: u64, size: u16) -> Self {
        let driver = base + (u64::from(size) * 16).next_multiple_of(4096);
        let device = driver + (u64::from(size) * 2 + 6).next_multiple_of(4096);
        Self {
            memory: memory.clone(),
            descriptors: base,
            driver,
            device,
            size,
            free: (0..size).rev().collect(),
            chains: BTreeMap::new(),
            next_avail: 0,
            next_used: 0,
        }
    }

    /// The device's side, as the transport would hand it over.
    pub fn queue(&self, event_idx: bool) -> VirtQueue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.try_set_desc_table_address(GuestAddress(self.descriptors)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(self.driver)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(self.device)).unwrap();
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        assert!(queue.is_valid(&*self.memory));
        VirtQueue::new(queue, self.memory.clone())
    }

    /// Writes one raw descriptor.
    pub fn write_descriptor(
        &self,
        table: u64,
        index: u16,
        (address, len): (u64, u32),
        flags: u16,
        next: u16,
    ) {
        let at = table + u64::from(index) * 16;
        self.memory.write_obj(address.to_le(), GuestAddress(at)).unwrap();
        self.memory.write_obj(len.to_le(), GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags.to_le(), GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(next.to_le(), GuestAddress(at + 14)).unwrap();
    }

    /// Makes a head available, whatever it points to.
    pub fn offer_head(&mut self, head: u16) {
        let slot = self.driver + 4 + u64::from(self.next_avail % self.size) * 2;
        self.memory.write_obj(head.to_le(), GuestAddress(slot)).unwrap();
        self.next_avail = self.next_avail.wrapping_add(1);
        self.memory.store(self.next_avail.to_le(), GuestAddress(self.driver + 2), Ordering::Release).unwrap();
    }

    /// Offers a chain; returns its head. `None`: not enough free descriptors.
    pub fn offer(&mut self, buffers: &[Buffer]) -> Option<u16> {
        if self.free.len() < buffers.len() {
            return None;
        }
        let indices: Vec<u16> = buffers.iter().map(|_| self.free.pop().unwrap()).collect();
        for (at, buffer) in buffers.iter().enumerate() {
            let next = indices.get(at + 1).copied();
            let flags = if next.is_some() { F_NEXT } else { 0 } | if buffer.writable { F_WRITE } else { 0 };
            let index = indices[at];
            self.write_descriptor(
                self.descriptors,
                index,
                (buffer.address, buffer.len),
                flags,
                next.unwrap_or(0),
            );
        }
        let head = indices[0];
        self.chains.insert(head, indices);
        self.offer_head(head);
        Some(head)
    }

    /// Offers a chain through an indirect table at `table`.
    pub fn offer_indirect(&mut self, table: u64, buffers: &[Buffer]) -> Option<u16> {
        let head = self.free.pop()?;
        let last = u16::try_from(buffers.len()).unwrap() - 1;
        for (index, buffer) in (0u16..).zip(buffers) {
            let more = if index < last { F_NEXT } else { 0 };
            let flags = more | if buffer.writable { F_WRITE } else { 0 };
            self.write_descriptor(table, index, (buffer.address, buffer.len), flags, index + 1);
        }
        let len = u32::from(last + 1) * 16;
        self.write_descriptor(self.descriptors, head, (table, len), F_INDIRECT, 0);
        self.chains.insert(head, vec![head]);
        self.offer_head(head);
        Some(head)
    }

    /// The next chain that the device gave back: head and bytes written.
    pub fn used(&mut self) -> Option<(u16, u32)> {
        let index: u16 = self.memory.load(GuestAddress(self.device + 2), Ordering::Acquire).unwrap();
        if u16::from_le(index) == self.next_used {
            return None;
        }
        let at = self.device + 4 + u64::from(self.next_used % self.size) * 8;
        let head: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
        let len: u32 = self.memory.read_obj(GuestAddress(at + 4)).unwrap();
        self.next_used = self.next_used.wrapping_add(1);
        let head = u16::try_from(u32::from_le(head)).unwrap();
        let indices = self.chains.remove(&head).expect("only what was offered is used, and once");
        self.free.extend(indices);
        Some((head, u32::from_le(len)))
    }

    /// With EVENT_IDX: interrupt when the device has used this many chains in all.
    pub fn set_used_event(&self, event: u16) {
        let at = self.driver + 4 + u64::from(self.size) * 2;
        self.memory.store(event.to_le(), GuestAddress(at), Ordering::SeqCst).unwrap();
    }

    /// How many chains the driver has seen used.
    pub fn used_count(&self) -> u16 {
        self.next_used
    }
}

/// An activation without a transport, and what its bells did.
pub struct Rig {
    pub memory: GuestMemory,
    pub platform: Arc<FakePlatform>,
    /// Signalled on every interrupt.
    pub bell: EventFd,
    pub kicks: Vec<EventFd>,
    shared: Arc<Shared>,
}

impl Rig {
    /// Hands over `queues`; vector q belongs to queue q, the last one to configuration changes.
    pub fn activation(memory: &GuestMemory, queues: Vec<VirtQueue>, features: u64) -> (Self, Activation) {
        let bell = EventFd::new(0).unwrap();
        let platform = Arc::new(FakePlatform { bell: Some(bell.try_clone().unwrap()), ..Default::default() });
        let vectors = u16::try_from(queues.len()).unwrap() + 1;
        let shared = Arc::new(Shared::new(Msix::new(platform.clone(), vectors), queues.len()));
        shared.msix.set_control(CONTROL_ENABLE).unwrap();
        for vector in 0..vectors {
            let at = u64::from(vector) * 16;
            shared.msix.write_table(at + 8, &u32::from(vector).to_le_bytes()).unwrap();
            shared.msix.write_table(at + 12, &[0; 4]).unwrap();
        }
        for (vector, slot) in (0u16..).zip(&shared.queue_vectors) {
            slot.store(vector, Ordering::Relaxed);
        }
        shared.config_vector.store(vectors - 1, Ordering::Relaxed);
        shared.status.store(0xf, Ordering::Relaxed);
        let mut kicks = Vec::new();
        let queues = (0u16..)
            .zip(queues)
            .map(|(index, queue)| {
                let kick = EventFd::new(EFD_NONBLOCK).unwrap();
                kicks.push(kick.try_clone().unwrap());
                let interrupt = QueueInterrupt { shared: shared.clone(), queue: index };
                ActiveQueue { index, queue, kick, interrupt }
            })
            .collect();
        let activation = Activation {
            memory: memory.clone(),
            queues,
            config_interrupt: ConfigInterrupt { shared: shared.clone() },
            features,
            failure: DeviceFailure { shared: shared.clone() },
        };
        (Self { memory: memory.clone(), platform, bell, kicks, shared }, activation)
    }

    /// Another activation with queues that a suspended device gave back, kicked as a transport does.
    pub fn again(&self, queues: Vec<ActiveQueue>, features: u64) -> Activation {
        self.kicks.iter().for_each(|kick| kick.write(1).unwrap());
        Activation {
            memory: self.memory.clone(),
            queues,
            config_interrupt: ConfigInterrupt { shared: self.shared.clone() },
            features,
            failure: DeviceFailure { shared: self.shared.clone() },
        }
    }

    /// Whether the device set DEVICE_NEEDS_RESET.
    pub fn needs_reset(&self) -> bool {
        self.shared.status.load(Ordering::Acquire) & crate::interrupt::STATUS_NEEDS_RESET != 0
    }

    /// Waits for the next interrupt.
    pub fn wait(&self) {
        self.bell.read().unwrap();
    }

    /// Lets queue `index` have no vector, as a polling driver would.
    pub fn mute(&self, index: usize) {
        self.shared.queue_vectors[index].store(NO_VECTOR, Ordering::Relaxed);
    }
}
