//! What the kernel is given, seen at the other end of a pipe that keeps apart what came in one piece; and what is told to whom when that
//! piece fails or ends early.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EfdFlags;
use nix::unistd::pipe2;

use super::super::{Backing, Buffers, EventFd, clear, event_fd};
use super::*;
use crate::media::Media;

struct Rig {
    driver: Driver,
    event: std::sync::Arc<EventFd>,
}

/// A driver with io_uring on these files, none of which is direct.
fn rig(files: impl IntoIterator<Item = File>) -> Option<Rig> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    let event = std::sync::Arc::new(EventFd::from_flags(flags).expect("eventfd"));
    let backing = |file| Backing { media: Media::new(file), cipher: None, direct: false };
    let driver = Driver::new(64, event.clone(), files.into_iter().map(backing).collect());
    if !driver.is_ring() {
        println!("skipped: io_uring is not to be had here");
        return None;
    }
    Some(Rig { driver, event })
}

impl Rig {
    fn load(&mut self, slot: u32, len: usize) {
        let mut buffers = Buffers::owned(len);
        buffers.as_mut_slice().expect("owned").fill(slot as u8);
        self.driver.load(slot, buffers);
    }

    /// A write of the whole slot.
    fn write(&mut self, slot: u32, file: u32, offset: u64, len: u64) {
        self.load(slot, len as usize);
        self.driver.issue(slot, 7, &Io::Write { file, offset, span: Span::buffers(0, len) });
    }

    /// Submits, and gives so many answers as (slot, result), by slot.
    fn answers(&mut self, count: usize) -> Vec<(u32, i32)> {
        let mut answers = Vec::new();
        self.driver.submit();
        loop {
            clear(&self.event);
            self.driver.poll(&mut answers);
            if answers.len() >= count {
                break;
            }
            poll(&mut [PollFd::new(event_fd(&self.event), PollFlags::POLLIN)], PollTimeout::NONE)
                .expect("poll");
        }
        assert!(answers.iter().all(|answer| answer.token == 7));
        let mut answers: Vec<_> = answers.iter().map(|answer| (answer.slot, answer.result)).collect();
        answers.sort_unstable();
        answers
    }
}

fn pipe(flags: OFlag) -> (File, File) {
    let (from, to): (OwnedFd, OwnedFd) = pipe2(flags | OFlag::O_NONBLOCK).expect("pipe");
    (from.into(), to.into())
}

/// Lengths of what was written piece by piece, sorted: the kernel may take two at once in any order.
fn pieces(mut from: &File) -> Vec<usize> {
    let mut room = [0; 4096];
    let mut pieces: Vec<_> = std::iter::from_fn(|| from.read(&mut room).ok()).collect();
    pieces.sort_unstable();
    pieces
}

#[test]
fn only_neighbours_are_one_piece() {
    let (from, to) = pipe(OFlag::O_DIRECT);
    let (from_b, to_b) = pipe(OFlag::O_DIRECT);
    let Some(mut rig) = rig([to, to_b]) else { return };
    // (file, offset, length) in the order of their issue, and what each file gets.
    type Case = (&'static [(u32, u64, u64)], &'static [usize], &'static [usize]);
    let cases: [Case; 8] = [
        (&[(0, 0, 100), (0, 100, 200), (0, 300, 50)], &[350], &[]),
        (&[(0, 0, 100), (0, 101, 100)], &[100, 100], &[]),
        (&[(0, 0, 100), (0, 99, 100)], &[100, 100], &[]),
        (&[(0, 100, 100), (0, 0, 100)], &[100, 100], &[]),
        (&[(0, 512, 100), (0, 512, 100), (0, 512, 100)], &[100, 100, 100], &[]),
        (&[(0, 0, 100), (1, 100, 100), (1, 200, 10)], &[100], &[110]),
        (&[(0, 0, 10), (1, 0, 20), (0, 10, 30)], &[10, 30], &[20]),
        (&[(0, 0, 10), (0, 10, 10), (0, 0, 30), (0, 30, 30)], &[20, 60], &[]),
    ];
    for (writes, want, want_b) in cases {
        for (&(file, offset, len), slot) in writes.iter().zip(0..) {
            rig.write(slot, file, offset, len);
        }
        let all: Vec<_> = writes.iter().zip(0..).map(|(write, slot)| (slot, write.2 as i32)).collect();
        assert_eq!(rig.answers(writes.len()), all, "{writes:?}");
        assert_eq!((&*pieces(&from), &*pieces(&from_b)), (want, want_b), "{writes:?}");
    }
}

#[test]
fn a_run_ends_with_its_submission_and_at_all_that_is_no_write() {
    let (from, to) = pipe(OFlag::O_DIRECT);
    let Some(mut rig) = rig([to]) else { return };
    rig.write(0, 0, 0, 100);
    rig.driver.submit();
    rig.write(1, 0, 100, 100);
    assert_eq!(rig.answers(2), [(0, 100), (1, 100)]);
    assert_eq!(pieces(&from), [100, 100]);
    rig.write(0, 0, 0, 100);
    rig.driver.issue(2, 7, &Io::SyncData { file: 0 });
    rig.write(1, 0, 100, 100);
    // A pipe cannot be synced.
    assert_eq!(rig.answers(3), [(0, 100), (1, 100), (2, -libc::EINVAL)]);
    assert_eq!(pieces(&from), [100, 100]);
}

#[test]
fn more_than_a_ring_and_its_segments_hold() {
    let file = tempfile::tempfile().expect("file");
    let Some(mut rig) = rig([file.try_clone().expect("clone")]) else { return };
    // Each of 64 slots twice as often as the ring has entries, never two neighbours.
    let (len, count) = (512, 128);
    (0..64).for_each(|slot| rig.load(slot, len));
    for i in 0..count {
        let slot = i % 64;
        let io =
            Io::Write { file: 0, offset: u64::from(count - i) * 512, span: Span::buffers(0, len as u64) };
        rig.driver.issue(slot, 7, &io);
    }
    assert!(rig.answers(count as usize).iter().all(|answer| answer.1 == 512));
    let mut bytes = Vec::new();
    (&file).read_to_end(&mut bytes).expect("read");
    let want = |at: usize| if at == 0 { 0 } else { (count - at as u32) as u8 % 64 };
    assert!(bytes.chunks(512).enumerate().all(|(at, sector)| sector == [want(at); 512]));
}

#[test]
fn who_got_less_asks_again_and_alone() {
    let (from, to) = pipe(OFlag::empty());
    fcntl(&to, FcntlArg::F_SETPIPE_SZ(4096)).expect("a pipe of one page");
    let Some(mut rig) = rig([to]) else { return };
    for slot in 0..4 {
        rig.write(slot, 0, u64::from(slot) * 1500, 1500);
    }
    let (none, want) = (-libc::EAGAIN, [1500, 1500, 1096]);
    assert_eq!(rig.answers(4), [(0, want[0]), (1, want[1]), (2, want[2]), (3, none)]);
    assert_eq!(pieces(&from), [4096]);
    // As the queue does it: the rest of each.
    rig.driver.issue(2, 7, &Io::Write { file: 0, offset: 4096, span: Span::buffers(1096, 404) });
    rig.driver.issue(3, 7, &Io::Write { file: 0, offset: 4500, span: Span::buffers(0, 1500) });
    assert_eq!(rig.driver.joins.members.len(), 0, "they are alone");
    assert_eq!(rig.answers(2), [(2, 404), (3, 1500)]);
    assert_eq!(pieces(&from), [1904]);
    // Another operation in the same slots is not.
    rig.write(2, 0, 0, 10);
    rig.write(3, 0, 10, 10);
    assert_eq!(rig.driver.joins.members.len(), 2);
    assert_eq!(rig.answers(2), [(2, 10), (3, 10)]);
}

#[test]
fn each_gets_its_own_error() {
    let full = File::options().write(true).open("/dev/full").expect("/dev/full");
    // With files in memory alone, as /dev is, there would be no ring.
    let Some(mut rig) = rig([full, tempfile::tempfile().expect("file")]) else { return };
    let offer = |rig: &mut Rig| {
        (0..3).for_each(|slot| {
            rig.driver.issue(
                slot,
                7,
                &Io::Write { file: 0, offset: u64::from(slot) * 512, span: Span::buffers(0, 512) },
            );
        });
        rig.answers(3)
    };
    (0..3).for_each(|slot| rig.load(slot, 512));
    assert_eq!(offer(&mut rig), [0, 1, 2].map(|slot| (slot, -libc::EAGAIN)), "of all together");
    assert_eq!(offer(&mut rig), [0, 1, 2].map(|slot| (slot, -libc::ENOSPC)), "of each");
}

#[test]
fn runs_are_bounded_and_their_numbers_used_again() {
    let mut joins = Joins::default();
    let write = |i: u64, len: u64, count: usize| Run {
        file: 0,
        offset: i * len,
        len,
        first: i as usize * count,
        count,
    };
    let mut number = None;
    for _ in 0..3 {
        for (len, count, most) in [(64 << 10, 1, RUN_BYTES_MAX >> 16), (512, 8, SEGMENTS_MAX as u64 / 8)] {
            joins.begin((0, 0), write(0, len, count));
            let taken =
                1 + (1..=2000).take_while(|i| joins.extend((*i as u32, 0), &write(*i, len, count))).count();
            assert_eq!(taken as u64, most);
            let ((slot, token), run) = joins.end().expect("a run");
            assert_eq!((slot, run.len, run.count), (OF_A_RUN, most * len, most as usize * count));
            assert_eq!(*number.get_or_insert(token), token);
            let mut whole = 0;
            joins.deal(Answer { slot, token, result: run.len as i32 }, |_, all| whole += u64::from(all));
            assert_eq!(whole, most);
            assert!(joins.end().is_none());
        }
    }
    // One that is too much by itself is nobody's neighbour.
    joins.begin((5, 6), write(0, 1 << 40, 1));
    assert!(!joins.extend((0, 0), &write(1, 1 << 40, 1)));
    assert_eq!(joins.end().map(|(whose, _)| whose), Some((5, 6)));
}
