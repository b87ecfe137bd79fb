//! Disks and cards that come and go, and which device number each device has on the bus.
//!
//! ```text
//!   00:01.0 …  as launched: disks, cards, consoles, rng, ports, balloon, vsock
//!   the rest   free; a disk or card that comes takes the first
//! ```
//!
//! Invariants: a device keeps its number for as long as it is there, over resets and in a saved state; no number is
//! given twice. A disk that is gone from here is closed when the last who uses it lets go.

use std::sync::{Arc, MutexGuard, OnceLock, PoisonError};

use nix::sys::eventfd::EventFd;
use serio_devices::Trouble;
use serio_virtio::{FunctionState, VirtioDevice};

use super::{Devices, Disk, Nic};
use crate::machine::MachineState;

/// Device numbers of a bus but the host bridge's.
const SLOTS: std::ops::Range<u8> = 1..32;
/// No device number: the bus refuses it.
const NO_SLOT: u8 = u8::MAX;
/// The device type of a network card (virtio 1.3 §5).
const NET: u32 = 1;

/// What comes and goes, and where the rest is.
#[derive(Debug, Default)]
pub(super) struct Plugged {
    disks: Vec<Arc<Disk>>,
    nics: Vec<Arc<Nic>>,
    /// Of the devices that stay.
    others: Vec<u8>,
}

impl Plugged {
    fn used(&self) -> Vec<u8> {
        let disks = self.disks.iter().filter_map(|disk| disk.slot.get());
        let nics = self.nics.iter().filter_map(|nic| nic.slot.get());
        disks.chain(nics).chain(&self.others).copied().collect()
    }

    fn free(&self) -> Option<u8> {
        let used = self.used();
        SLOTS.into_iter().find(|slot| !used.contains(slot))
    }

    fn slots(&self) -> Vec<u8> {
        let slot = |slot: &OnceLock<u8>| slot.get().copied().unwrap_or(NO_SLOT);
        let disks = self.disks.iter().map(|disk| slot(&disk.slot));
        let nics = self.nics.iter().map(|nic| slot(&nic.slot));
        disks.chain(nics).chain(self.others.iter().copied()).collect()
    }

    /// Gives each device its number, those of `slots` first; without more of them the first free ones.
    fn place(&mut self, slots: &[u8], others: usize) {
        let mut given = slots.iter().copied();
        for at in 0..self.disks.len() {
            let slot = given.next().or_else(|| self.free()).unwrap_or(NO_SLOT);
            self.disks.get(at).map(|disk| disk.slot.get_or_init(|| slot));
        }
        for at in 0..self.nics.len() {
            let slot = given.next().or_else(|| self.free()).unwrap_or(NO_SLOT);
            self.nics.get(at).map(|nic| nic.slot.get_or_init(|| slot));
        }
        while self.others.len() < others {
            let slot = given.next().or_else(|| self.free()).unwrap_or(NO_SLOT);
            self.others.push(slot);
        }
    }
}

impl Devices {
    fn lock(&self) -> MutexGuard<'_, Plugged> {
        // Whole after each statement.
        self.plugged.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The disks, in the order of the VM's configuration.
    pub fn disks(&self) -> Vec<Arc<Disk>> {
        self.lock().disks.clone()
    }

    /// The cards, in the order of the VM's configuration.
    pub fn nics(&self) -> Vec<Arc<Nic>> {
        self.lock().nics.clone()
    }

    /// The disk with this name.
    pub fn disk(&self, name: &str) -> Option<Arc<Disk>> {
        self.lock().disks.iter().find(|disk| disk.name == name).cloned()
    }

    /// The card with this address.
    pub fn nic(&self, mac: &[u8]) -> Option<Arc<Nic>> {
        self.lock().nics.iter().find(|nic| nic.mac.as_slice() == mac).cloned()
    }

    /// Gives each card as many queue pairs as it was saved with, before the machine is made that goes on from there. Only one is
    /// fewer than it was given: what older programs saved. Else says why not.
    pub fn fit(&mut self, state: &MachineState) -> Result<(), String> {
        let mut plugged = self.lock();
        let disks = plugged.disks.len();
        for (at, nic) in plugged.nics.iter_mut().enumerate() {
            let Some(nic) = Arc::get_mut(nic) else { continue };
            // Another number of devices is found out later, and says so.
            let place = disks.saturating_add(at);
            let Some(saved) = saved_pairs(&state.platform.slots, &state.functions, place) else { continue };
            match (saved, nic.pairs()) {
                (saved, given) if saved == given => {}
                (1, _) => nic.taps.truncate(1),
                (saved, given) => {
                    let name = nic.name();
                    return Err(format!(
                        "the card {name} was saved with {saved} queue pairs, and has {given} now: give the VM as many vcpus as it had"
                    ));
                }
            }
        }
        Ok(())
    }

    /// One more disk, before the first boot.
    pub fn add_disk(&mut self, disk: Disk) {
        self.lock().disks.push(Arc::new(disk));
    }

    /// One more card, before the first boot.
    pub fn add_nic(&mut self, nic: Nic) {
        self.lock().nics.push(Arc::new(nic));
    }

    /// Has `bell` rung when a device gets into trouble or out of it. Before the first boot.
    pub fn watch_troubles(&mut self, bell: &Arc<EventFd>) {
        self.bell = Some(bell.clone());
        let trouble = || self.trouble();
        let mut plugged = self.lock();
        plugged.disks.iter_mut().filter_map(Arc::get_mut).for_each(|disk| disk.trouble = trouble());
        plugged.nics.iter_mut().filter_map(Arc::get_mut).for_each(|nic| nic.trouble = trouble());
    }

    /// For a device that comes later.
    pub fn trouble(&self) -> Trouble {
        let Some(bell) = self.bell.clone() else { return Trouble::default() };
        Trouble::new(move || {
            // Fails only when the counter is full, and then it has been rung.
            let _ = bell.write(1);
        })
    }

    /// The devices of one boot, with their device numbers.
    pub fn make(&self) -> Vec<(u8, Box<dyn VirtioDevice>)> {
        self.make_at(&[])
    }

    /// The same; those that have no device number yet get the ones of `slots`, in this order.
    pub fn make_at(&self, slots: &[u8]) -> Vec<(u8, Box<dyn VirtioDevice>)> {
        let others = self.others();
        let mut plugged = self.lock();
        plugged.place(slots, others.len());
        let disks = plugged.disks.iter().map(|disk| self.blk(disk));
        let nics = plugged.nics.iter().map(|nic| Devices::net(nic));
        let devices: Vec<_> = disks.chain(nics).chain(others).collect();
        plugged.slots().into_iter().zip(devices).collect()
    }

    /// The device numbers in the order of [`Devices::make`].
    pub fn slots(&self) -> Vec<u8> {
        self.lock().slots()
    }

    /// The device number that the next one gets; none: the bus is full.
    pub fn free_slot(&self) -> Option<u8> {
        self.lock().free()
    }

    /// A disk has come, at that place of the configuration.
    pub fn plug_disk(&self, position: usize, disk: Arc<Disk>, slot: u8) {
        let mut plugged = self.lock();
        disk.slot.get_or_init(|| slot);
        let position = position.min(plugged.disks.len());
        plugged.disks.insert(position, disk);
    }

    /// A card has come, at that place of the configuration.
    pub fn plug_nic(&self, position: usize, nic: Arc<Nic>, slot: u8) {
        let mut plugged = self.lock();
        nic.slot.get_or_init(|| slot);
        let position = position.min(plugged.nics.len());
        plugged.nics.insert(position, nic);
    }

    /// What was at that device number has gone.
    pub fn unplug(&self, slot: u8) {
        let mut plugged = self.lock();
        plugged.disks.retain(|disk| disk.slot.get() != Some(&slot));
        plugged.nics.retain(|nic| nic.slot.get() != Some(&slot));
    }
}

/// The queue pairs that the card at that place among all devices was saved with; none: no card was there.
fn saved_pairs(slots: &[u8], functions: &[FunctionState], place: usize) -> Option<usize> {
    // Functions are in the order of their numbers, behind the host bridge.
    let before = match slots.get(place) {
        Some(slot) => slots.iter().filter(|other| *other < slot).count(),
        None if slots.is_empty() => place,
        None => return None,
    };
    let virtio = functions.get(before.saturating_add(1))?.virtio.as_ref();
    // With several pairs there is a control queue behind them.
    virtio.filter(|virtio| virtio.device_id == NET).map(|virtio| (virtio.queues.len() / 2).max(1))
}

impl Disk {
    /// Its device number, once it has one.
    pub fn slot(&self) -> Option<u8> {
        self.slot.get().copied()
    }
}

impl Nic {
    /// Its device number, once it has one.
    pub fn slot(&self) -> Option<u8> {
        self.slot.get().copied()
    }
}

#[cfg(test)]
mod tests {
    use serio_virtio::{QueueState, VirtioState};

    use super::*;

    fn function(device_id: u32, queues: usize) -> FunctionState {
        let queues = vec![QueueState::default(); queues];
        let virtio = VirtioState { device_id, queues, ..VirtioState::default() };
        FunctionState { config: Vec::new(), virtio: Some(virtio) }
    }

    #[test]
    fn saved_cards_are_found_where_they_were() {
        // The bridge, a card that came into the first gap, a disk, entropy, the first card.
        let (bridge, card) = (FunctionState::default(), |queues| function(NET, queues));
        let functions = [bridge, card(5), function(2, 4), function(4, 1), card(9)];
        // A disk, two cards, the rest: in the order of their making.
        let slots = [2, 7, 1, 3];
        let found = |place| saved_pairs(&slots, &functions, place);
        assert_eq!([0, 1, 2, 3, 4].map(found), [None, Some(4), Some(2), None, None]);
        // Older programs: one after the other, and one pair each.
        let functions = [FunctionState::default(), function(2, 4), card(2), function(4, 1)];
        let found = |place| saved_pairs(&[], &functions, place);
        assert_eq!([0, 1, 2, 3].map(found), [None, Some(1), None, None]);
    }
}
