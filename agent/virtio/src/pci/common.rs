//! The common configuration structure (virtio 1.2 §4.1.4.3) and the device status machine (§2.1, §3.1).
//!
//! ```text
//!  0 ─► ACKNOWLEDGE ─► DRIVER ─► FEATURES_OK ─► DRIVER_OK        a driver adds bits, one after the other
//!  ▲                              (refused unless the features    NEEDS_RESET is ours alone
//!  └── writing 0 ◄── any state     are a subset with VERSION_1)
//! ```
//!
//! Reads render the whole structure as 64 bytes, so that any width at any offset works. Writes count only
//! when they hit a field exactly (§4.1.3.1); the 64-bit addresses also take two halves. Registers say
//! nothing about a running device: queues are handed over at DRIVER_OK, later writes change only what is
//! read back.

use std::sync::atomic::Ordering;

use serio_hv::GuestMemory;
use virtio_queue::{Queue, QueueT};

use crate::interrupt::{NO_VECTOR, STATUS_DRIVER_OK, STATUS_NEEDS_RESET, Shared};
use crate::state::{QueueState, RestoreError, VirtioState};

pub(crate) const STATUS_DRIVER: u8 = 2;
pub(crate) const STATUS_FEATURES_OK: u8 = 8;
/// Feature bits of the transport: §6.
pub(crate) const F_INDIRECT_DESC: u64 = 1 << 28;
pub(crate) const F_EVENT_IDX: u64 = 1 << 29;
pub(crate) const F_VERSION_1: u64 = 1 << 32;

/// Bytes of the structure as announced: up to and with `queue_reset`, in words.
pub(crate) const COMMON_BYTES: u32 = 64;
const IMAGE: usize = 64;

/// What a write asks the transport to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CommonEvent {
    Nothing,
    /// Stop the device and forget everything.
    Reset,
    /// Hand the queues to the device.
    Activate,
    /// A queue has another vector now.
    Moved,
    /// The driver asked for the impossible.
    Fail,
}

/// One queue as the driver describes it.
#[derive(Clone, Debug)]
pub(crate) struct QueueRegisters {
    max: u16,
    size: u16,
    pub(crate) enabled: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
}

impl QueueRegisters {
    fn new(max: u16) -> Self {
        Self { max, size: max, enabled: false, descriptors: 0, driver: 0, device: 0 }
    }

    /// The queue, if its rings are aligned and lie in guest memory. Its positions are 0.
    pub(crate) fn build(&self, memory: &GuestMemory, event_idx: bool) -> Option<Queue> {
        let mut queue = Queue::new(self.max).ok()?;
        queue.try_set_size(self.size).ok()?;
        queue.try_set_desc_table_address(vm_memory::GuestAddress(self.descriptors)).ok()?;
        queue.try_set_avail_ring_address(vm_memory::GuestAddress(self.driver)).ok()?;
        queue.try_set_used_ring_address(vm_memory::GuestAddress(self.device)).ok()?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        // The walker takes an available ring at 0 for one that was never set.
        (self.driver != 0 && queue.is_valid(&**memory)).then_some(queue)
    }
}

pub(crate) struct Common {
    offered: u64,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    pub(crate) queues: Vec<QueueRegisters>,
}

impl Common {
    pub(crate) fn new(device_features: u64, queue_sizes: &[u16]) -> Self {
        Self {
            offered: device_features | F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues: queue_sizes.iter().map(|max| QueueRegisters::new(*max)).collect(),
        }
    }

    pub(crate) fn reset(&mut self) {
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        for queue in &mut self.queues {
            *queue = QueueRegisters::new(queue.max);
        }
    }

    /// The registers of this structure. Positions are the caller's to add.
    pub(crate) fn save(&self, shared: &Shared) -> VirtioState {
        let vector = |index: usize| {
            shared.queue_vectors.get(index).map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire))
        };
        let queue = |(index, queue): (usize, &QueueRegisters)| QueueState {
            max: queue.max.into(),
            size: queue.size.into(),
            enabled: queue.enabled,
            descriptors: queue.descriptors,
            driver: queue.driver,
            device: queue.device,
            vector: vector(index).into(),
            position: None,
        };
        VirtioState {
            driver_features: self.driver_features,
            device_feature_select: self.device_feature_select,
            driver_feature_select: self.driver_feature_select,
            queue_select: self.queue_select.into(),
            status: shared.status.load(Ordering::Acquire).into(),
            generation: shared.generation.load(Ordering::Acquire).into(),
            config_vector: shared.config_vector.load(Ordering::Acquire).into(),
            isr: shared.isr.load(Ordering::Acquire).into(),
            queues: self.queues.iter().enumerate().map(queue).collect(),
            ..VirtioState::default()
        }
    }

    /// The registers as they were, if the device is still the same.
    pub(crate) fn restore(&mut self, shared: &Shared, state: &VirtioState) -> Result<(), RestoreError> {
        let lacking = state.driver_features & !self.offered;
        if lacking != 0 {
            let (saved, made) = (format!("{:#x}", state.driver_features), format!("{:#x}", self.offered));
            return Err(RestoreError::Differs { what: "features", saved, made });
        }
        let maxima: Vec<u32> = state.queues.iter().map(|queue| queue.max).collect();
        let made: Vec<u32> = self.queues.iter().map(|queue| queue.max.into()).collect();
        if maxima != made {
            let (saved, made) = (format!("{maxima:?}"), format!("{made:?}"));
            return Err(RestoreError::Differs { what: "queues", saved, made });
        }
        self.driver_features = state.driver_features;
        self.device_feature_select = state.device_feature_select;
        self.driver_feature_select = state.driver_feature_select;
        self.queue_select = narrow("queue_select", state.queue_select)?;
        shared.config_vector.store(saved_vector(shared, state.config_vector)?, Ordering::Release);
        for ((registers, state), vector) in
            self.queues.iter_mut().zip(&state.queues).zip(&shared.queue_vectors)
        {
            let size: u16 = narrow("queue_size", state.size)?;
            if !size.is_power_of_two() || size > registers.max {
                return Err(RestoreError::Malformed { what: format!("a queue size of {size}") });
            }
            registers.size = size;
            registers.enabled = state.enabled;
            registers.descriptors = state.descriptors;
            registers.driver = state.driver;
            registers.device = state.device;
            vector.store(saved_vector(shared, state.vector)?, Ordering::Release);
        }
        shared.isr.store(narrow("ISR", state.isr)?, Ordering::Release);
        shared.generation.store(narrow("config_generation", state.generation)?, Ordering::Release);
        shared.status.store(narrow("device_status", state.status)?, Ordering::Release);
        Ok(())
    }

    pub(crate) fn features(&self) -> u64 {
        self.driver_features
    }

    fn selected(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// The structure as it reads now.
    pub(crate) fn image(&self, shared: &Shared) -> [u8; IMAGE] {
        let mut image = [0u8; IMAGE];
        let mut put = |at: usize, value: &[u8]| {
            for (byte, value) in image.iter_mut().skip(at).zip(value) {
                *byte = *value;
            }
        };
        put(0, &self.device_feature_select.to_le_bytes());
        put(4, &half(self.offered, self.device_feature_select).to_le_bytes());
        put(8, &self.driver_feature_select.to_le_bytes());
        put(12, &half(self.driver_features, self.driver_feature_select).to_le_bytes());
        put(16, &shared.config_vector.load(Ordering::Acquire).to_le_bytes());
        put(18, &u16::try_from(self.queues.len()).unwrap_or(u16::MAX).to_le_bytes());
        put(20, &[shared.status.load(Ordering::Acquire), shared.generation.load(Ordering::Acquire)]);
        put(22, &self.queue_select.to_le_bytes());
        // A queue that does not exist reads as size 0 (§4.1.4.3.1).
        if let Some(queue) = self.selected() {
            let vector = shared
                .queue_vectors
                .get(usize::from(self.queue_select))
                .map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire));
            put(24, &queue.size.to_le_bytes());
            put(26, &vector.to_le_bytes());
            put(28, &u16::from(queue.enabled).to_le_bytes());
            put(30, &self.queue_select.to_le_bytes());
            put(32, &queue.descriptors.to_le_bytes());
            put(40, &queue.driver.to_le_bytes());
            put(48, &queue.device.to_le_bytes());
        }
        image
    }

    pub(crate) fn write(
        &mut self,
        shared: &Shared,
        memory: &GuestMemory,
        offset: u64,
        data: &[u8],
    ) -> CommonEvent {
        let mut bytes = [0u8; 8];
        for (byte, value) in bytes.iter_mut().zip(data) {
            *byte = *value;
        }
        let value = u64::from_le_bytes(bytes);
        let (word, short) = (low_u32(value), low_u16(value));
        match (offset, data.len()) {
            (0, 4) => self.device_feature_select = word,
            (8, 4) => self.driver_feature_select = word,
            (12, 4) => self.write_features(shared, word),
            (16, 2) => shared.config_vector.store(checked_vector(shared, short), Ordering::Release),
            (20, 1) => return self.write_status(shared, bytes.first().copied().unwrap_or(0)),
            (22, 2) => self.queue_select = short,
            (26, 2) => {
                if let Some(vector) = shared.queue_vectors.get(usize::from(self.queue_select)) {
                    let checked = checked_vector(shared, short);
                    if vector.swap(checked, Ordering::AcqRel) != checked {
                        return CommonEvent::Moved;
                    }
                }
            }
            (28, 2) if short == 1 => return self.enable_queue(memory),
            (24 | 32..56, _) => self.write_queue(offset, data.len(), value),
            _ => {}
        }
        CommonEvent::Nothing
    }

    fn write_features(&mut self, shared: &Shared, word: u32) {
        // Agreed is agreed (§3.1.1): only a reset opens the negotiation again.
        if shared.status.load(Ordering::Acquire) & STATUS_FEATURES_OK != 0 {
            return;
        }
        match self.driver_feature_select {
            0 => self.driver_features = with_low(self.driver_features, word),
            1 => self.driver_features = with_high(self.driver_features, word),
            _ => {}
        }
    }

    fn write_status(&mut self, shared: &Shared, written: u8) -> CommonEvent {
        if written == 0 {
            return CommonEvent::Reset;
        }
        let acceptable = self.driver_features & !self.offered == 0 && self.driver_features & F_VERSION_1 != 0;
        let old = shared.status.load(Ordering::Acquire);
        let new = next_status(old, written, acceptable);
        // Or, not store: a thread of the device may be setting NEEDS_RESET.
        shared.status.fetch_or(new, Ordering::AcqRel);
        if new & !old & STATUS_DRIVER_OK != 0 { CommonEvent::Activate } else { CommonEvent::Nothing }
    }

    fn enable_queue(&mut self, memory: &GuestMemory) -> CommonEvent {
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else {
            return CommonEvent::Fail;
        };
        queue.enabled = queue.build(memory, false).is_some();
        if queue.enabled { CommonEvent::Nothing } else { CommonEvent::Fail }
    }

    fn write_queue(&mut self, offset: u64, len: usize, value: u64) {
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else { return };
        if queue.enabled {
            return;
        }
        let word = low_u32(value);
        match (offset, len) {
            (24, 2) => {
                let size = low_u16(value);
                if size.is_power_of_two() && size <= queue.max {
                    queue.size = size;
                }
            }
            (32, 8) => queue.descriptors = value,
            (32, 4) => queue.descriptors = with_low(queue.descriptors, word),
            (36, 4) => queue.descriptors = with_high(queue.descriptors, word),
            (40, 8) => queue.driver = value,
            (40, 4) => queue.driver = with_low(queue.driver, word),
            (44, 4) => queue.driver = with_high(queue.driver, word),
            (48, 8) => queue.device = value,
            (48, 4) => queue.device = with_low(queue.device, word),
            (52, 4) => queue.device = with_high(queue.device, word),
            _ => {}
        }
    }
}

/// The status after the driver wrote `written`, which is not 0. Pure: the whole machine is here.
pub(crate) fn next_status(old: u8, written: u8, features_acceptable: bool) -> u8 {
    // Bits are only ever added, and this one is set by the device alone.
    let mut added = written & !STATUS_NEEDS_RESET;
    if !(features_acceptable && (old | written) & STATUS_DRIVER != 0) {
        added &= !STATUS_FEATURES_OK;
    }
    // The driver has to have read FEATURES_OK back, so it was there before this write.
    if old & STATUS_FEATURES_OK == 0 {
        added &= !STATUS_DRIVER_OK;
    }
    old | added
}

fn narrow<T: TryFrom<u32>>(what: &str, value: u32) -> Result<T, RestoreError> {
    T::try_from(value).map_err(|_| RestoreError::Malformed { what: format!("{what} {value:#x}") })
}

fn saved_vector(shared: &Shared, vector: u32) -> Result<u16, RestoreError> {
    Ok(checked_vector(shared, narrow("a vector", vector)?))
}

fn checked_vector(shared: &Shared, vector: u16) -> u16 {
    // A vector that cannot be mapped reads back as NO_VECTOR (§4.1.5.1.2.1).
    if vector < shared.msix.vectors() { vector } else { NO_VECTOR }
}

fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => low_u32(value),
        1 => low_u32(value >> 32),
        _ => 0,
    }
}

fn low_u32(value: u64) -> u32 {
    u32::try_from(value & 0xffff_ffff).unwrap_or(0)
}

fn low_u16(value: u64) -> u16 {
    u16::try_from(value & 0xffff).unwrap_or(0)
}

fn with_low(value: u64, word: u32) -> u64 {
    (value & !0xffff_ffff) | u64::from(word)
}

fn with_high(value: u64, word: u32) -> u64 {
    (value & 0xffff_ffff) | (u64::from(word) << 32)
}
