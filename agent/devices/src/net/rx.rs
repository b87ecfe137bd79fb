//! The receive ring: chains that the driver posted, kept parsed until a packet fills them.
//!
//! With mergeable buffers one packet may span several chains; how many it took stands in its header
//! (virtio 1.2 §5.1.6.4). A `readv` therefore gets the segments of as many chains as the largest packet may
//! need, and only those that it filled are given back. The others wait, already parsed, for the next packet.

use std::collections::VecDeque;

use serio_hv::{GuestMemory, PACKET_SEGMENTS_MAX, VNET_HEADER_BYTES};
use serio_virtio::{Chain, QueueError, Segment, VirtQueue};
use vm_memory::{Bytes, GuestAddress};

/// Offset of `num_buffers` in the header.
const NUM_BUFFERS_OFFSET: u64 = 10;
/// The largest packet with segmentation offload, behind the header (virtio 1.2 §5.1.6.3.1).
const SEGMENTED_BYTES_MAX: usize = 65_550;
/// An Ethernet header.
const ETHERNET_BYTES: usize = 14;

/// What was negotiated.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    pub(super) mergeable: bool,
    /// The largest packet, with its header.
    pub(super) packet_bytes_max: usize,
}

/// The largest packet that the tap may hand over, with its header: 1526 bytes for the usual MTU.
pub(super) fn packet_bytes_max(segmented: bool, mtu: u16) -> usize {
    let packet =
        if segmented { SEGMENTED_BYTES_MAX } else { usize::from(mtu).saturating_add(ETHERNET_BYTES) };
    packet.saturating_add(VNET_HEADER_BYTES)
}

/// A posted chain. Its segments are the next ones of the common list.
#[derive(Clone, Copy, Debug)]
struct Posted {
    head: u16,
    segments: usize,
    bytes: usize,
}

/// All posted chains.
pub(super) struct Posts {
    rules: Rules,
    chains: VecDeque<Posted>,
    segments: VecDeque<Segment>,
    bytes: usize,
    scratch: Chain,
}

impl Posts {
    pub(super) fn new(rules: Rules) -> Self {
        Self {
            rules,
            chains: VecDeque::new(),
            segments: VecDeque::new(),
            bytes: 0,
            scratch: Chain::default(),
        }
    }

    /// Parses what the driver has posted since. Bounded by the ring: no more chains than descriptors.
    pub(super) fn collect(&mut self, queue: &mut VirtQueue) -> Result<(), QueueError> {
        while self.chains.len() < usize::from(queue.size()) && queue.pop(&mut self.scratch)? {
            let bytes = usize::try_from(self.scratch.writable_len()).unwrap_or(usize::MAX);
            self.segments.extend(self.scratch.writable());
            self.chains.push_back(Posted {
                head: self.scratch.head(),
                segments: self.scratch.writable().len(),
                bytes,
            });
            self.bytes = self.bytes.saturating_add(bytes);
        }
        Ok(())
    }

    /// Forgets all of them, and says how many: none of them holds anything yet.
    pub(super) fn give_up(&mut self) -> u16 {
        let count = u16::try_from(self.chains.len()).unwrap_or(u16::MAX);
        self.chains.clear();
        self.segments.clear();
        self.bytes = 0;
        count
    }

    /// Whether there is room for the largest packet. A driver whose whole ring could not hold it gets what
    /// fits: else it would wait for ever.
    pub(super) fn ready(&self, ring_size: u16) -> bool {
        let Some(first) = self.chains.front() else { return false };
        if !self.rules.mergeable || self.bytes >= self.rules.packet_bytes_max {
            return true;
        }
        first.bytes.saturating_mul(usize::from(ring_size)) < self.rules.packet_bytes_max
    }

    /// The segments for one packet, and how many bytes they hold.
    pub(super) fn room(&self) -> (impl Iterator<Item = (GuestAddress, usize)> + '_, usize) {
        let mut segments = 0usize;
        let mut bytes = 0usize;
        for chain in &self.chains {
            let next = segments.saturating_add(chain.segments);
            // The first chain is always taken; one that is too long for a packet is found out by the read.
            if segments > 0 && next > PACKET_SEGMENTS_MAX {
                break;
            }
            segments = next;
            bytes = bytes.saturating_add(chain.bytes);
            if !self.rules.mergeable || bytes >= self.rules.packet_bytes_max {
                break;
            }
        }
        let ranges = self.segments.iter().take(segments);
        (ranges.filter_map(|segment| Some((segment.address, usize::try_from(segment.len).ok()?))), bytes)
    }

    /// Whether a read of `len` bytes into `room_bytes` may have lost the end of its packet.
    pub(super) fn perhaps_cut(&self, len: usize, room_bytes: usize) -> bool {
        len >= room_bytes && room_bytes < self.rules.packet_bytes_max
    }

    /// A packet of `len` bytes has been read into [`Posts::room`]: says so in its header and gives its chains back.
    /// `None`: the header's memory cannot be written.
    pub(super) fn deliver(
        &mut self,
        memory: &GuestMemory,
        queue: &mut VirtQueue,
        len: usize,
    ) -> Option<Result<(), QueueError>> {
        let buffers = self.chains_for(len);
        self.write_num_buffers(memory, buffers)?;
        let mut rest = len;
        for _ in 0..buffers {
            let chain = self.chains.pop_front()?;
            self.segments.drain(..chain.segments.min(self.segments.len()));
            self.bytes = self.bytes.saturating_sub(chain.bytes);
            let written = rest.min(chain.bytes);
            rest = rest.saturating_sub(written);
            if let Err(error) = queue.push_used(chain.head, u32::try_from(written).unwrap_or(u32::MAX)) {
                return Some(Err(error));
            }
        }
        Some(Ok(()))
    }

    fn chains_for(&self, len: usize) -> u16 {
        let mut covered = 0usize;
        let mut count = 0u16;
        for chain in &self.chains {
            count = count.saturating_add(1);
            covered = covered.saturating_add(chain.bytes);
            if covered >= len {
                break;
            }
        }
        count
    }

    /// Writes the two bytes wherever the first segments put them.
    fn write_num_buffers(&self, memory: &GuestMemory, count: u16) -> Option<()> {
        let mut left: &[u8] = &count.to_le_bytes();
        let mut skip = NUM_BUFFERS_OFFSET;
        for segment in &self.segments {
            let len = u64::from(segment.len);
            if skip >= len {
                skip = skip.checked_sub(len)?;
                continue;
            }
            let room = usize::try_from(len.checked_sub(skip)?).ok()?;
            let (now, later) = left.split_at_checked(room.min(left.len()))?;
            let address = GuestAddress(segment.address.0.checked_add(skip)?);
            memory.write_slice(now, address).ok()?;
            left = later;
            skip = 0;
            if left.is_empty() {
                return Some(());
            }
        }
        None
    }
}
