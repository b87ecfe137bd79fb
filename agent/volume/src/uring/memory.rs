//! Memory of operations: guest segments or owned pages, described once as iovecs.
//!
//! A [`Buffers`] keeps what its iovecs point to alive: the `Arc` of the guest's memory, or its own
//! allocation. While an operation is under way its `Buffers` lie inside the driver, so nobody can drop them.
//! Guest memory is never a Rust reference: a guest may change it at any time.

use std::{
    alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error},
    any::Any,
    fmt,
    ptr::NonNull,
    sync::Arc,
};

use libc::iovec;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Alignment of owned memory: that of a page, which suits every O_DIRECT.
const ALIGN: usize = 4096;

/// A segment that is not guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("guest addresses {address:#x}+{len:#x} are not memory")]
pub struct GuestRangeError {
    /// First guest physical address.
    pub address: u64,
    /// Bytes.
    pub len: u64,
}

/// Page-aligned memory of its own.
struct Owned {
    at: NonNull<u8>,
    layout: Layout,
}

impl Owned {
    fn new(len: usize) -> Owned {
        let layout = Layout::from_size_align(len.max(1), ALIGN).expect("lengths are bounded by the caller");
        // SAFETY: the layout has a size of at least one byte.
        let at = NonNull::new(unsafe { alloc_zeroed(layout) }).unwrap_or_else(|| handle_alloc_error(layout));
        Owned { at, layout }
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout, and freed once.
        unsafe { dealloc(self.at.as_ptr(), self.layout) }
    }
}

enum Hold {
    Nothing,
    /// Whatever log of writes it has: nobody looks into it here.
    Guest(Arc<dyn Any + Send + Sync>),
    Owned(Owned),
}

/// The memory of one operation: guest segments, or aligned memory of its own.
pub struct Buffers {
    // Invariant: every iovec points into what `hold` keeps alive, and `len` is their sum.
    iovecs: Vec<iovec>,
    hold: Hold,
    len: u64,
}

// SAFETY: the pointers of `iovecs` point into `hold`, which is Send (an Arc of a Sync mapping, or a unique
// allocation) and travels with them.
unsafe impl Send for Buffers {}

impl fmt::Debug for Buffers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.hold {
            Hold::Nothing => "empty",
            Hold::Guest(_) => "guest",
            Hold::Owned(_) => "owned",
        };
        write!(f, "Buffers({kind}, {} bytes in {})", self.len, self.iovecs.len())
    }
}

impl Default for Buffers {
    fn default() -> Self {
        Buffers::empty()
    }
}

impl Buffers {
    /// No memory: for operations that carry none, or to be refilled with [`Buffers::refill_guest`].
    pub const fn empty() -> Buffers {
        Buffers { iovecs: Vec::new(), hold: Hold::Nothing, len: 0 }
    }

    /// `len` zeroed bytes, page-aligned.
    pub fn owned(len: usize) -> Buffers {
        let owned = Owned::new(len);
        let iovecs = vec![iovec { iov_base: owned.at.as_ptr().cast(), iov_len: len }];
        Buffers { iovecs, hold: Hold::Owned(owned), len: len as u64 }
    }

    /// Segments of a guest's memory, in order.
    pub fn guest<B: Bitmap + Send + Sync + 'static>(
        memory: &Arc<GuestMemoryMmap<B>>,
        segments: impl IntoIterator<Item = (GuestAddress, usize)>,
    ) -> Result<Buffers, GuestRangeError> {
        let mut buffers = Buffers::empty();
        buffers.refill_guest(memory, segments)?;
        Ok(buffers)
    }

    /// Like [`Buffers::guest`], but keeps the allocation of `self`: hand the value that `reap` gave back in
    /// again, and the I/O path allocates nothing. On an error `self` is empty.
    pub fn refill_guest<B: Bitmap + Send + Sync + 'static>(
        &mut self,
        memory: &Arc<GuestMemoryMmap<B>>,
        segments: impl IntoIterator<Item = (GuestAddress, usize)>,
    ) -> Result<(), GuestRangeError> {
        self.iovecs.clear();
        self.len = 0;
        for (address, len) in segments {
            for slice in memory.get_slices(address, len) {
                let Ok(slice) = slice else {
                    self.iovecs.clear();
                    self.len = 0;
                    return Err(GuestRangeError { address: address.0, len: len as u64 });
                };
                let at = slice.ptr_guard_mut().as_ptr();
                self.iovecs.push(iovec { iov_base: at.cast(), iov_len: slice.len() });
                self.len = self.len.saturating_add(slice.len() as u64);
            }
        }
        let same =
            |held: &Arc<dyn Any + Send + Sync>| std::ptr::addr_eq(Arc::as_ptr(held), Arc::as_ptr(memory));
        if !matches!(&self.hold, Hold::Guest(held) if same(held)) {
            self.hold = Hold::Guest(memory.clone());
        }
        Ok(())
    }

    /// Where a guest's segments lie in this process, `(address, bytes)`: what a read that has ended may have written. Nothing of
    /// owned memory.
    pub fn guest_parts(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        let guest = matches!(self.hold, Hold::Guest(_));
        self.iovecs.iter().filter(move |_| guest).map(|v| (v.iov_base as usize, v.iov_len))
    }

    /// Bytes in all.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// No bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Makes owned memory `len` bytes long, reusing the allocation where it suffices. What it holds is unspecified.
    pub fn resize_owned(&mut self, len: usize) {
        match (&self.hold, self.iovecs.first_mut()) {
            (Hold::Owned(owned), Some(only)) if owned.layout.size() >= len => {
                only.iov_len = len;
                self.len = len as u64;
            }
            _ => *self = Buffers::owned(len),
        }
    }

    /// The bytes of owned memory; `None` for a guest's.
    pub fn as_slice(&self) -> Option<&[u8]> {
        match &self.hold {
            Hold::Owned(owned) => {
                // SAFETY: `owned` holds at least `len` initialized bytes, and `&self` shares them: an operation
                // under way has the Buffers inside the driver, so the kernel does not write them now.
                Some(unsafe { std::slice::from_raw_parts(owned.at.as_ptr(), self.len as usize) })
            }
            Hold::Nothing => Some(&[]),
            Hold::Guest(_) => None,
        }
    }

    /// The bytes of owned memory, to be changed; `None` for a guest's.
    pub fn as_mut_slice(&mut self) -> Option<&mut [u8]> {
        match &mut self.hold {
            Hold::Owned(owned) => {
                // SAFETY: as in `as_slice`, and `&mut self` is the only access.
                Some(unsafe { std::slice::from_raw_parts_mut(owned.at.as_ptr(), self.len as usize) })
            }
            Hold::Nothing => Some(&mut []),
            Hold::Guest(_) => None,
        }
    }

    /// Fills `[start, start + len)` with zeros, as far as it lies inside.
    pub(crate) fn zero(&mut self, start: u64, len: u64) {
        for part in parts(&self.iovecs, start, len) {
            // SAFETY: `part` lies within memory that `hold` keeps alive; no reference to it exists. A guest may
            // race with this write, as with any DMA.
            unsafe { std::ptr::write_bytes(part.iov_base.cast::<u8>(), 0, part.iov_len) }
        }
    }

    /// The iovecs that cover `[start, start + len)`.
    pub(super) fn parts(&self, start: u64, len: u64) -> impl Iterator<Item = iovec> + '_ {
        parts(&self.iovecs, start, len)
    }
}

fn parts(iovecs: &[iovec], start: u64, len: u64) -> impl Iterator<Item = iovec> + '_ {
    let mut skip = start as usize;
    let mut left = len as usize;
    iovecs.iter().filter_map(move |v| {
        if skip >= v.iov_len {
            skip -= v.iov_len;
            return None;
        }
        let take = (v.iov_len - skip).min(left);
        // Within the segment: skip < iov_len.
        let part = iovec { iov_base: v.iov_base.wrapping_byte_add(skip), iov_len: take };
        skip = 0;
        left -= take;
        (take > 0).then_some(part)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_segments_are_checked_and_zeroed_in_parts() {
        let memory: Arc<GuestMemoryMmap<()>> =
            Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x4000)]).expect("memory"));
        assert!(Buffers::guest(&memory, [(GuestAddress(0x3000), 0x1001)]).is_err());
        assert!(Buffers::guest(&memory, [(GuestAddress(u64::MAX), 2)]).is_err());
        let mut b =
            Buffers::guest(&memory, [(GuestAddress(0x1000), 10), (GuestAddress(0), 5)]).expect("inside");
        assert_eq!(b.len(), 15);
        assert_eq!(b.parts(8, 4).map(|v| v.iov_len).collect::<Vec<_>>(), [2, 2]);
        use vm_memory::Bytes;
        memory.write_slice(&[7; 10], GuestAddress(0x1000)).expect("write");
        memory.write_slice(&[7; 5], GuestAddress(0)).expect("write");
        b.zero(8, 4);
        let mut got = [0; 10];
        memory.read_slice(&mut got, GuestAddress(0x1000)).expect("read");
        assert_eq!(got, [7, 7, 7, 7, 7, 7, 7, 7, 0, 0]);
        memory.read_slice(&mut got[..5], GuestAddress(0)).expect("read");
        assert_eq!(got[..5], [0, 0, 7, 7, 7]);
    }

    #[test]
    fn owned_memory_is_reused() {
        let mut b = Buffers::owned(8192);
        let at = b.as_slice().map(<[u8]>::as_ptr);
        b.resize_owned(100);
        assert_eq!((b.len(), b.as_slice().map(<[u8]>::as_ptr)), (100, at));
        b.resize_owned(8192);
        assert_eq!(b.as_slice().map(<[u8]>::as_ptr), at);
        assert_eq!(at.map(|p| p as usize % ALIGN), Some(0));
    }
}
