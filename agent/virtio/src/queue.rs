//! The one queue walker: a split virtqueue whose chains are copied out, once, within bounds.
//!
//! Ring arithmetic, EVENT_IDX and indirect tables are those of the `virtio-queue` crate. What it leaves
//! open is closed here:
//! - its chain iterator ends silently where a chain breaks (an index out of range, a loop, a table outside
//!   of memory). A chain whose last descriptor still says NEXT is therefore [`QueueError::BrokenChain`].
//! - a readable descriptor after a writable one is refused (virtio 1.2 §2.7.4.2), so a device sees two
//!   plain lists.
//! - without EVENT_IDX the driver's `VRING_AVAIL_F_NO_INTERRUPT` is honoured (§2.7.7).
//!
//! A queue belongs to one thread. After an error the ring is not to be used again: the device sets
//! `DEVICE_NEEDS_RESET` and stops.

use std::num::Wrapping;
use std::sync::atomic::Ordering;

use serio_hv::{GuestMemory, GuestRam};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

/// The most descriptors of one chain, whatever the guest writes (Linux and QEMU stay within it too).
pub const SEGMENTS_MAX: usize = 1024;

/// `VRING_AVAIL_F_NO_INTERRUPT`, virtio 1.2 §2.7.6.
const AVAIL_NO_INTERRUPT: u16 = 1;
/// Bytes of a descriptor, §2.7.5.
const DESCRIPTOR_BYTES: u32 = 16;

/// The ring makes no sense. The guest's fault; only a reset helps.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The ring itself cannot be used: outside of memory, or an impossible index.
    #[error("the virtqueue's ring is broken")]
    Ring(#[source] virtio_queue::Error),
    /// A chain ends in an index out of range, a loop, or a table that cannot be read.
    #[error("descriptor chain {head} is broken after {segments} descriptors")]
    BrokenChain {
        /// The chain's first descriptor.
        head: u16,
        /// How many could be read.
        segments: usize,
    },
    /// More than [`SEGMENTS_MAX`] descriptors.
    #[error("descriptor chain {head} has more than {SEGMENTS_MAX} descriptors")]
    TooLong {
        /// The chain's first descriptor.
        head: u16,
    },
    /// A device-readable descriptor follows a device-writable one.
    #[error("descriptor chain {head} has a readable descriptor after a writable one")]
    Order {
        /// The chain's first descriptor.
        head: u16,
    },
}

/// One buffer of a chain. Not yet known to lie in guest memory: who accesses it finds out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it begins.
    pub address: GuestAddress,
    /// How long it is, in bytes.
    pub len: u32,
}

/// A descriptor chain, copied. Keep one and pop into it again: its storage is reused.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
}

impl Chain {
    /// The index to give back with [`VirtQueue::push_used`].
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What the driver wrote for the device, in order.
    pub fn readable(&self) -> &[Segment] {
        &self.readable
    }

    /// Where the device may write, in order.
    pub fn writable(&self) -> &[Segment] {
        &self.writable
    }

    /// The bytes of all readable segments. At most 4 GiB, as the walker refuses longer chains.
    pub fn readable_len(&self) -> u64 {
        self.readable.iter().map(|segment| u64::from(segment.len)).sum()
    }

    /// The bytes of all writable segments.
    pub fn writable_len(&self) -> u64 {
        self.writable.iter().map(|segment| u64::from(segment.len)).sum()
    }

    /// Copies the first `out.len()` readable bytes, however the driver cut them up (§2.7.4: a device makes
    /// no assumption on framing), and takes them off the chain. `None`: too short, or outside of memory.
    pub fn take_header(&mut self, memory: &GuestRam, out: &mut [u8]) -> Option<()> {
        let mut filled = 0usize;
        let mut used_up = 0usize;
        for segment in &mut self.readable {
            let rest = out.get_mut(filled..)?;
            if rest.is_empty() {
                break;
            }
            let n = rest.len().min(usize::try_from(segment.len).ok()?);
            let part = rest.get_mut(..n)?;
            memory.read_slice(part, segment.address).ok()?;
            filled = filled.checked_add(n)?;
            let taken = u32::try_from(n).ok()?;
            segment.len = segment.len.checked_sub(taken)?;
            segment.address = GuestAddress(segment.address.0.checked_add(u64::from(taken))?);
            if segment.len == 0 {
                used_up = used_up.checked_add(1)?;
            } else {
                break;
            }
        }
        self.readable.drain(..used_up);
        (filled == out.len()).then_some(())
    }

    /// Takes the last writable byte off the chain: where block devices answer with their status.
    pub fn take_last_byte(&mut self) -> Option<GuestAddress> {
        loop {
            let last = self.writable.last_mut()?;
            let Some(rest) = last.len.checked_sub(1) else {
                self.writable.pop();
                continue;
            };
            let address = GuestAddress(last.address.0.checked_add(u64::from(rest))?);
            last.len = rest;
            if rest == 0 {
                self.writable.pop();
            }
            return Some(address);
        }
    }

    fn begin(&mut self, head: u16) {
        self.head = head;
        self.readable.clear();
        self.writable.clear();
    }

    fn push(&mut self, writable: bool, segment: Segment) -> Result<(), QueueError> {
        if self.readable.len().saturating_add(self.writable.len()) >= SEGMENTS_MAX {
            return Err(QueueError::TooLong { head: self.head });
        }
        if writable {
            self.writable.push(segment);
        } else if self.writable.is_empty() {
            self.readable.push(segment);
        } else {
            return Err(QueueError::Order { head: self.head });
        }
        Ok(())
    }
}

/// A virtqueue that the driver has enabled, with the memory it lies in.
#[derive(Debug)]
pub struct VirtQueue {
    queue: Queue,
    memory: GuestMemory,
}

impl VirtQueue {
    /// Takes over a queue that was checked with `Queue::is_valid`.
    pub(crate) fn new(queue: Queue, memory: GuestMemory) -> Self {
        Self { queue, memory }
    }

    /// The number of descriptors: how many chains can be under way at once.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// The memory that the ring and its buffers lie in.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Takes the next available chain into `chain`. `Ok(false)`: there is none now.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, QueueError> {
        let memory: &GuestRam = &self.memory;
        let mut available = self.queue.iter(memory).map_err(QueueError::Ring)?;
        let Some(descriptors) = available.next() else { return Ok(false) };
        chain.begin(descriptors.head_index());
        let mut ended = false;
        for descriptor in descriptors {
            chain.push(
                descriptor.is_write_only(),
                Segment { address: descriptor.addr(), len: descriptor.len() },
            )?;
            ended = !descriptor.has_next();
        }
        if !ended {
            let segments = chain.readable.len().saturating_add(chain.writable.len());
            return Err(QueueError::BrokenChain { head: chain.head, segments });
        }
        Ok(true)
    }

    /// Copies a chain once more that was taken and not given back: a device that was suspended remembers no more of one than
    /// its head. The driver must not have changed it (§2.7.13), and hurts nobody else if it has.
    pub fn take_again(&self, head: u16, chain: &mut Chain) -> Result<(), QueueError> {
        let memory: &GuestRam = &self.memory;
        chain.begin(head);
        let mut table = (GuestAddress(self.queue.desc_table()), u32::from(self.queue.size()));
        let (mut index, mut indirect) = (u32::from(head), false);
        loop {
            let segments = chain.readable.len().saturating_add(chain.writable.len());
            let broken = || QueueError::BrokenChain { head, segments };
            if index >= table.1 {
                return Err(broken());
            }
            let at = u64::from(index).saturating_mul(u64::from(DESCRIPTOR_BYTES));
            let at = table.0.0.checked_add(at).ok_or_else(broken)?;
            let descriptor: Descriptor = memory.read_obj(GuestAddress(at)).map_err(|_| broken())?;
            if descriptor.refers_to_indirect_table() {
                let whole = descriptor.len().is_multiple_of(DESCRIPTOR_BYTES);
                if indirect || !whole {
                    return Err(broken());
                }
                table = (descriptor.addr(), descriptor.len() / DESCRIPTOR_BYTES);
                (index, indirect) = (0, true);
                continue;
            }
            let segment = Segment { address: descriptor.addr(), len: descriptor.len() };
            // Refuses what is too long, so a loop ends.
            chain.push(descriptor.is_write_only(), segment)?;
            if !descriptor.has_next() {
                return Ok(());
            }
            index = u32::from(descriptor.next());
        }
    }

    /// Gives a chain back, with the number of bytes written into its writable part.
    pub fn push_used(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        self.queue.add_used(&*self.memory, head, written).map_err(QueueError::Ring)
    }

    /// Puts the last `count` chains that were taken back, as if they had not been: for those that nothing was done
    /// with. Only while no later one was given back, so that their slots in the ring are still theirs.
    pub fn put_back(&mut self, count: u16) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(count));
    }

    /// Where the descriptor table, the driver's ring and the device's ring lie.
    pub fn places(&self) -> [GuestAddress; 3] {
        [self.queue.desc_table(), self.queue.avail_ring(), self.queue.used_ring()].map(GuestAddress)
    }

    /// The next entry of the driver's ring that is to be taken.
    pub fn next_avail(&self) -> u16 {
        self.queue.next_avail()
    }

    /// Goes on behind somebody else, who has given back chains in the order in which they were offered: as far as the used ring says.
    pub fn catch_up(&mut self) -> Result<(), QueueError> {
        let used = self.queue.used_idx(&*self.memory, Ordering::Acquire).map_err(QueueError::Ring)?.0;
        let more = used.wrapping_sub(self.queue.next_used());
        self.queue.set_next_avail(self.queue.next_avail().wrapping_add(more));
        self.queue.set_next_used(used);
        Ok(())
    }

    /// How far the device has come: the next index in the available ring, and in the used ring.
    pub(crate) fn positions(&self) -> (u16, u16) {
        (self.queue.next_avail(), self.queue.next_used())
    }

    /// Asks the driver to kick again. `Ok(true)`: chains arrived meanwhile, so look again before sleeping.
    pub fn enable_kicks(&mut self) -> Result<bool, QueueError> {
        self.queue.enable_notification(&*self.memory).map_err(QueueError::Ring)
    }

    /// Tells the driver that kicks are not needed while the device is at work anyway.
    pub fn disable_kicks(&mut self) -> Result<(), QueueError> {
        self.queue.disable_notification(&*self.memory).map_err(QueueError::Ring)
    }

    /// Whether the chains given back since the last call warrant an interrupt. Call once a batch.
    pub fn interrupt_wanted(&mut self) -> Result<bool, QueueError> {
        let wanted = self.queue.needs_notification(&*self.memory).map_err(QueueError::Ring)?;
        if !wanted || self.queue.event_idx_enabled() {
            return Ok(wanted);
        }
        let flags: u16 = self
            .memory
            .load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)
            .map_err(|source| QueueError::Ring(virtio_queue::Error::GuestMemory(source)))?;
        Ok(u16::from_le(flags) & AVAIL_NO_INTERRUPT == 0)
    }

    /// How many chains wait, for statistics and tests.
    pub fn waiting(&self) -> Result<u16, QueueError> {
        let available = self.queue.avail_idx(&*self.memory, Ordering::Acquire).map_err(QueueError::Ring)?;
        Ok((available - Wrapping(self.queue.next_avail())).0)
    }
}

#[cfg(test)]
#[path = "queue_test.rs"]
mod tests;
