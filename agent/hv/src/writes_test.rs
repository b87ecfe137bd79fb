//! The log of writes: each way to write sets the bits of exactly its pages, and none before it is on.

use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory::{GuestMemory, create_memory};

const BYTES: u64 = 1 << 20;

fn taken(memory: &GuestMemory) -> Vec<u64> {
    let mut words = vec![0; 4];
    memory.iter().for_each(|region| region_log(region).take(&mut words));
    let bit = |page: &u64| words[*page as usize / 64] >> (page % 64) & 1 == 1;
    (0..BYTES / PAGE_SIZE).filter(bit).collect()
}

fn memory() -> GuestMemory {
    let memory = create_memory(BYTES).expect("memory");
    memory.write_slice(&[1; 9000], GuestAddress(0)).expect("RAM");
    memory.iter().for_each(|region| region_log(region).start());
    memory
}

#[test]
fn each_way_to_write_is_logged() {
    let memory = memory();
    assert_eq!(taken(&memory), [0; 0], "what was before is not in it");
    memory.write_slice(&[1; 2], GuestAddress(4095)).expect("RAM");
    memory.write_obj(1u32, GuestAddress(8192)).expect("RAM");
    memory.store(1u16, GuestAddress(5 * 4096), Ordering::Release).expect("RAM");
    memory.read_obj::<u64>(GuestAddress(6 * 4096)).expect("RAM");
    assert_eq!(taken(&memory), [0, 1, 2, 5]);
    assert_eq!(taken(&memory), [0; 0], "taken once");
    memory.write_slice(&vec![1; 70 * 4096], GuestAddress(60 * 4096)).expect("RAM");
    assert_eq!(taken(&memory), (60..130).collect::<Vec<_>>());
    memory.write_slice(&[], GuestAddress(0)).expect("nothing");
    memory.write_slice(&[1], GuestAddress(BYTES - 1)).expect("RAM");
    assert_eq!(taken(&memory), [255]);
    crate::release_memory(&memory, GuestAddress(100), 3 * PAGE_SIZE).expect("released");
    assert_eq!(taken(&memory), [1, 2]);
}

#[test]
fn what_the_kernel_writes_for_us_is_logged() {
    let memory = memory();
    let (mut ours, theirs) = UnixStream::pair().expect("a pair");
    ours.write_all(&[7; 5000]).expect("room");
    let room = [(GuestAddress(3 * 4096), 4096), (GuestAddress(9 * 4096), 4096), (GuestAddress(0), 4096)];
    assert_eq!(crate::receive_packet(theirs.as_fd(), &memory, room).expect("read"), 5000);
    assert_eq!(taken(&memory), [3, 9]);
    ours.write_all(&[7; 10]).expect("room");
    let mut fd = theirs.as_fd();
    memory.read_volatile_from(GuestAddress(20 * 4096), &mut fd, 10).expect("read");
    assert_eq!(taken(&memory), [20]);
    let region = memory.iter().next().expect("one");
    mark_written(&memory, region.as_ptr() as usize + 4096 * 33 + 5, 4096);
    mark_written(&memory, region.as_ptr() as usize + BYTES as usize, 4096);
    mark_written(&memory, region.as_ptr() as usize + BYTES as usize - 1, usize::MAX);
    mark_written(&memory, 0, 4096);
    assert_eq!(taken(&memory), [33, 34, 255]);
}
