//! The keeper: commits the map of the head, so that flushed bits are on disk, and never before their data.
//!
//! ```text
//! copy the dirty pages ─► fdatasync data ─► write the pages ─► fdatasync map ─► answer
//! ```
//!
//! The pages are copied *before* the data are synced: every bit in the copy was set after its write had
//! completed, so that sync covers it. One commit at a time; flushes that arrive meanwhile share the next one.
//! A queue asks here only when the head's map has something to commit; else its flush is one fdatasync in its
//! own ring.

use std::{
    sync::{Arc, PoisonError},
    thread::JoinHandle,
};

use serio_sandbox::{Kind, threads};

use crate::{
    error::IoError,
    map::{BlockMap, PAGE_BYTES},
    shared::{Core, QueueShared, lock},
    uring::signal,
};

/// Its pages are on the heap.
const STACK_BYTES: usize = 256 << 10;

/// What the keeper is asked.
#[derive(Default)]
pub(crate) struct KeeperState {
    waiting: Vec<(Arc<QueueShared>, u32)>,
    busy: bool,
    stop: bool,
}

/// The thread; it ends with the last handle.
pub(crate) struct Keeper {
    core: Arc<Core>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    pub(crate) fn start(core: &Arc<Core>) -> std::io::Result<Keeper> {
        let shared = Arc::clone(core);
        let thread = threads::spawn(Kind::Keeper, "volume-keeper", STACK_BYTES, move || run(&shared))?;
        Ok(Keeper { core: Arc::clone(core), thread: Some(thread) })
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        lock(&self.core.keeper).stop = true;
        self.core.keeper_wake.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic of the keeper was reported where it happened.
            let _ = thread.join();
        }
    }
}

/// Asks for a commit on behalf of a slot. False when nothing is to be committed: the caller syncs the data itself.
pub(crate) fn ask(core: &Core, queue: &Arc<QueueShared>, slot: u32) -> bool {
    let mut state = lock(&core.keeper);
    let dirty = core.stack().head_map().is_some_and(BlockMap::any_dirty);
    // A commit under way has taken the marks of pages that are not on disk yet.
    if !dirty && !state.busy && state.waiting.is_empty() {
        return false;
    }
    state.waiting.push((Arc::clone(queue), slot));
    core.keeper_wake.notify_all();
    true
}

fn run(core: &Core) {
    let mut state = lock(&core.keeper);
    loop {
        if state.waiting.is_empty() {
            if state.stop {
                drop(state);
                // An orderly end keeps also what nobody flushed. There is nobody left to be told of a failure.
                if core.stack().head_map().is_some_and(BlockMap::any_dirty) {
                    let _ = commit(core);
                }
                return;
            }
            state = core.keeper_wake.wait(state).unwrap_or_else(PoisonError::into_inner);
            continue;
        }
        let asked = std::mem::take(&mut state.waiting);
        state.busy = true;
        drop(state);
        let result = commit(core);
        state = lock(&core.keeper);
        state.busy = false;
        for (queue, slot) in asked {
            lock(&queue.mailbox).push((slot, result));
            signal(&queue.event);
        }
    }
}

/// Makes what was written before durable: data, then map. A failed sync poisons the volume.
pub(crate) fn commit(core: &Core) -> Result<(), IoError> {
    let _one_at_a_time = lock(&core.commit);
    if core.is_poisoned() {
        return Err(IoError::Poisoned);
    }
    let stack = core.stack();
    let head = stack.head();
    let mut pages: Vec<(u64, [u8; PAGE_BYTES])> = Vec::new();
    if let Some(map) = &head.map {
        map.take_dirty(&mut pages);
    }
    let synced = |result: std::io::Result<()>, what| {
        result.map_err(|e| {
            core.poison();
            IoError::host(what, &e)
        })
    };
    synced(head.data.sync_data(), "sync of the data")?;
    let (Some(map), Some(file), false) = (&head.map, &head.map_file, pages.is_empty()) else { return Ok(()) };
    for (offset, page) in &pages {
        if let Err(e) = file.write_all_at(page, *offset) {
            // A full disk, mostly. Nothing is lost: the next flush tries again.
            pages.iter().for_each(|(offset, _)| map.mark_dirty(*offset));
            return Err(IoError::host("write of the map", &e));
        }
    }
    synced(file.sync_data(), "sync of the map")
}
