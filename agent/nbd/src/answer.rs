//! What is done becomes replies: the second half of a connection.

use crate::{
    backend::{Command, Queue},
    connection::{Connection, Pending},
    handshake::context_id,
    outbox::Body,
    wire::{Head, Mode, Request, cmd, cmd_flag, error_value},
};

/// Extents in one answer to BLOCK_STATUS.
const EXTENTS_MAX: usize = 4096;

impl<Q: Queue> Connection<'_, Q> {
    /// One chunk for each of the contexts.
    pub(crate) fn block_status(&mut self, request: &Request, contexts: &[usize]) {
        let mode = self.negotiated.mode;
        let full = if request.flags & cmd_flag::REQ_ONE != 0 { 1 } else { EXTENTS_MAX };
        let extents = &mut self.extents;
        for (i, &context) in contexts.iter().enumerate() {
            extents.clear();
            self.queue.status(context, request.offset, request.len, |len, flags| {
                let count = extents.len();
                match extents.last_mut() {
                    Some(last) if last.1 == flags => last.0 = last.0.saturating_add(len),
                    _ if count == full => return false,
                    _ => extents.push((len, flags)),
                }
                true
            });
            let mut bytes = Vec::with_capacity(extents.len() * mode.extent_bytes() as usize);
            for &(len, flags) in extents.iter() {
                if mode == Mode::Extended {
                    bytes.extend(len.to_be_bytes());
                    bytes.extend(u64::from(flags).to_be_bytes());
                } else {
                    // It lies within the request, whose length is of 32 bits.
                    bytes.extend(u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
                    bytes.extend(flags.to_be_bytes());
                }
            }
            let last = i + 1 == contexts.len();
            let head = mode.status(request, context_id(context), extents.len() as u32, last);
            self.out.push(head, Body::Bytes(bytes));
        }
    }

    /// Takes what is done and makes replies of it.
    pub(crate) fn reap(&mut self) {
        let mut again = std::mem::take(&mut self.again);
        let mode = self.negotiated.mode;
        let Connection { queue, pending, free, out, pool, gone, .. } = self;
        queue.reap(|tag, result, payload| {
            let slot = tag as usize;
            let Some(Pending { request, then_flush }) = pending.get(slot).copied().flatten() else { return };
            if then_flush && result.is_ok() {
                again.push(slot);
                return;
            }
            pending[slot] = None;
            free.push(slot);
            let read = request.command == cmd::READ;
            let head: Head = match result {
                Ok(()) if read => mode.data(&request),
                Ok(()) => mode.done(&request),
                Err(host) => mode.error(&request, error_value(host)),
            };
            let mut body = Body::Nothing;
            match payload {
                Some(payload) if read && result.is_ok() => body = Body::Payload(payload),
                // The rules let at most PAYLOAD_BYTES_MAX through.
                Some(payload) => pool.give(payload, request.len as usize),
                None => {}
            }
            if !*gone {
                out.push(head, body);
            }
        });
        for slot in again.drain(..) {
            if let Some(Some(pending)) = self.pending.get_mut(slot) {
                pending.then_flush = false;
            }
            self.queue.submit(slot as u64, Command::Flush);
            self.queue.kick();
        }
        self.again = again;
    }
}
