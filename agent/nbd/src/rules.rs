//! Which requests are carried out: pure.

use crate::{
    backend::ExportInfo,
    handshake::{Negotiated, context_id},
    wire::{Fields, Mode, PAYLOAD_BYTES_MAX, Request, cmd, cmd_flag, errno},
};

/// Whether a request may be carried out; the error value otherwise.
pub(crate) fn check(request: &Request, info: &ExportInfo, negotiated: &Negotiated) -> Result<(), u32> {
    let known = match request.command {
        cmd::READ if negotiated.mode.is_structured() => cmd_flag::FUA | cmd_flag::DF,
        cmd::WRITE if negotiated.mode == Mode::Extended => cmd_flag::FUA | cmd_flag::PAYLOAD_LEN,
        cmd::WRITE_ZEROES => cmd_flag::FUA | cmd_flag::NO_HOLE | cmd_flag::FAST_ZERO,
        cmd::BLOCK_STATUS => cmd_flag::FUA | cmd_flag::REQ_ONE,
        cmd::READ | cmd::WRITE | cmd::DISC | cmd::FLUSH | cmd::TRIM | cmd::CACHE => cmd_flag::FUA,
        _ => return Err(errno::EINVAL),
    };
    if request.flags & !known != 0 {
        return Err(errno::EINVAL);
    }
    if matches!(request.command, cmd::DISC | cmd::FLUSH) {
        return Ok(());
    }
    let changes = matches!(request.command, cmd::WRITE | cmd::TRIM | cmd::WRITE_ZEROES);
    let released = info.releases && request.command == cmd::TRIM;
    if changes && info.read_only && !released {
        return Err(errno::EPERM);
    }
    if carries(request) && request.len > u64::from(PAYLOAD_BYTES_MAX) {
        // "SHOULD NOT return NBD_EOVERFLOW except… NBD_CMD_READ when NBD_CMD_FLAG_DF is supported".
        let fragments = request.command == cmd::READ && negotiated.mode.is_structured();
        return Err(if fragments { errno::EOVERFLOW } else { errno::EINVAL });
    }
    if request.command == cmd::BLOCK_STATUS && negotiated.contexts.is_empty() {
        return Err(errno::EINVAL);
    }
    match request.offset.checked_add(request.len) {
        // "a zero-length request is unspecified": refused where data or extents are asked for.
        _ if request.len == 0 && !changes => return Err(errno::EINVAL),
        Some(end) if end <= info.size_bytes => {}
        _ if changes && request.command != cmd::TRIM => return Err(errno::ENOSPC),
        _ => return Err(errno::EINVAL),
    }
    if request.flags & cmd_flag::FAST_ZERO != 0 && !info.fast_zeroes {
        return Err(errno::ENOTSUP);
    }
    Ok(())
}

/// What a BLOCK_STATUS with a payload asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Filter {
    /// The request is none, or its payload is none: [`check`] judges it.
    None,
    /// The payload has not come whole.
    More,
    /// The request with its effect length, for these contexts only.
    Some(Request, Vec<usize>),
}

/// Reads the payload of a BLOCK_STATUS, "64 bits, effect length; n * 32 bits, list of metacontext ids to use", from the
/// front of `rest`. Unknown and repeated ids make it none.
pub(crate) fn filter(request: &Request, rest: &[u8], negotiated: &Negotiated) -> Filter {
    let says = request.command == cmd::BLOCK_STATUS && request.flags & cmd_flag::PAYLOAD_LEN != 0;
    let longest = 8 + 4 * negotiated.contexts.len() as u64;
    let fits = (8..=longest).contains(&request.len) && request.len.is_multiple_of(4);
    if negotiated.mode != Mode::Extended || !says || !fits {
        return Filter::None;
    }
    // It fits, so it is short.
    let Some(payload) = rest.get(..request.len as usize) else { return Filter::More };
    let mut fields = Fields(payload);
    let Some(len) = fields.u64() else { return Filter::None };
    let mut contexts = Vec::new();
    while let Some(id) = fields.u32() {
        match negotiated.contexts.iter().find(|context| context_id(**context) == id) {
            Some(context) if !contexts.contains(context) => contexts.push(*context),
            _ => return Filter::None,
        }
    }
    if contexts.is_empty() {
        // Nothing to answer with: "exactly one chunk per selected context".
        return Filter::None;
    }
    let flags = request.flags & !cmd_flag::PAYLOAD_LEN;
    Filter::Some(Request { flags, len, ..*request }, contexts)
}

/// Whether the command has data, either way.
pub(crate) fn carries(request: &Request) -> bool {
    matches!(request.command, cmd::READ | cmd::WRITE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_judged() {
        let negotiated =
            |mode, contexts: &[usize]| Negotiated { export: 0, mode, contexts: contexts.to_vec() };
        let info = |read_only, fast_zeroes| ExportInfo {
            name: String::new(),
            description: String::new(),
            size_bytes: 8 << 30,
            read_only,
            releases: false,
            fast_zeroes,
            contexts: vec!["base:allocation".into()],
        };
        let ask = |command, flags, offset, len| Request { flags, command, cookie: 0, offset, len };
        let (compact, extended) = (negotiated(Mode::Structured, &[0]), negotiated(Mode::Extended, &[0]));
        let (disk, slow, point) = (info(false, true), info(false, false), info(true, true));
        let fast = cmd_flag::FAST_ZERO;
        for (request, info, negotiated, answer) in [
            (ask(cmd::READ, 0, 0, 32 << 20), &disk, &compact, Ok(())),
            (ask(cmd::READ, 0, 0, (32 << 20) + 1), &disk, &compact, Err(errno::EOVERFLOW)),
            (ask(cmd::READ, 0, 8 << 30, 1), &disk, &compact, Err(errno::EINVAL)),
            (ask(cmd::WRITE, 0, 8 << 30, 1), &disk, &compact, Err(errno::ENOSPC)),
            (ask(cmd::WRITE, 0, u64::MAX, 2), &disk, &compact, Err(errno::ENOSPC)),
            (ask(cmd::WRITE, 0, 0, 1), &point, &compact, Err(errno::EPERM)),
            (ask(cmd::WRITE, cmd_flag::PAYLOAD_LEN, 0, 1), &disk, &extended, Ok(())),
            (ask(cmd::WRITE, cmd_flag::PAYLOAD_LEN, 0, 1), &disk, &compact, Err(errno::EINVAL)),
            (ask(cmd::WRITE, 0, 0, (32 << 20) + 1), &disk, &compact, Err(errno::EINVAL)),
            (ask(cmd::TRIM, 0, 0, 8 << 30), &disk, &extended, Ok(())),
            (ask(cmd::TRIM, 0, 1, 8 << 30), &disk, &extended, Err(errno::EINVAL)),
            (ask(cmd::WRITE_ZEROES, 0, 1, 8 << 30), &disk, &extended, Err(errno::ENOSPC)),
            (ask(cmd::BLOCK_STATUS, cmd_flag::PAYLOAD_LEN, 0, 12), &disk, &extended, Err(errno::EINVAL)),
            (ask(cmd::BLOCK_STATUS, cmd_flag::PAYLOAD_LEN, 0, 12), &disk, &compact, Err(errno::EINVAL)),
            (ask(cmd::TRIM, cmd_flag::PAYLOAD_LEN, 0, 1), &disk, &extended, Err(errno::EINVAL)),
            (ask(cmd::WRITE_ZEROES, fast | cmd_flag::NO_HOLE, 0, 8 << 30), &disk, &extended, Ok(())),
            (ask(cmd::WRITE_ZEROES, fast, 0, 1), &slow, &compact, Err(errno::ENOTSUP)),
            (ask(cmd::WRITE_ZEROES, 0, 0, 1), &slow, &compact, Ok(())),
            (ask(cmd::BLOCK_STATUS, 0, 0, 8 << 30), &disk, &extended, Ok(())),
            (ask(cmd::BLOCK_STATUS, 0, 0, 1), &disk, &bare(), Err(errno::EINVAL)),
            (ask(cmd::FLUSH, 0, 0, 0), &point, &compact, Ok(())),
            (ask(99, 0, 0, 0), &disk, &compact, Err(errno::EINVAL)),
        ] {
            assert_eq!(check(&request, info, negotiated), answer, "{request:?}");
        }
    }

    #[test]
    fn contexts_are_picked() {
        let negotiated = Negotiated { export: 0, mode: Mode::Extended, contexts: vec![0, 2, 5] };
        let flags = cmd_flag::PAYLOAD_LEN | cmd_flag::REQ_ONE;
        let ask = |len| Request { flags, command: cmd::BLOCK_STATUS, cookie: 1, offset: 7, len };
        let payload = |ids: &[u32]| {
            let mut bytes = 99u64.to_be_bytes().to_vec();
            bytes.extend(ids.iter().flat_map(|id| id.to_be_bytes()));
            bytes
        };
        let picked = |ids: &[u32]| filter(&ask(8 + 4 * ids.len() as u64), &payload(ids), &negotiated);
        let request = Request { flags: cmd_flag::REQ_ONE, len: 99, ..ask(0) };
        assert_eq!(picked(&[6, 1]), Filter::Some(request, vec![5, 0]));
        assert_eq!(picked(&[]), Filter::None);
        assert_eq!(picked(&[1, 1]), Filter::None, "twice");
        assert_eq!(picked(&[2]), Filter::None, "not set");
        assert_eq!(picked(&[1, 3, 6, 1]), Filter::None, "more than there are");
        assert_eq!(filter(&ask(12), &payload(&[]), &negotiated), Filter::More);
        assert_eq!(filter(&ask(10), &payload(&[1]), &negotiated), Filter::None, "not whole ids");
        let compact = Negotiated { mode: Mode::Structured, ..negotiated.clone() };
        assert_eq!(filter(&ask(12), &payload(&[1]), &compact), Filter::None);
    }

    fn bare() -> Negotiated {
        Negotiated { export: 0, mode: Mode::Structured, contexts: Vec::new() }
    }
}
