//! Which requests are carried out: pure.

use crate::{
    backend::ExportInfo,
    handshake::Negotiated,
    wire::{Mode, PAYLOAD_BYTES_MAX, Request, cmd, cmd_flag, errno},
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
    if changes && info.read_only {
        return Err(errno::EPERM);
    }
    if carries(request) && request.len > u64::from(PAYLOAD_BYTES_MAX) {
        return Err(errno::EOVERFLOW);
    }
    if request.command == cmd::BLOCK_STATUS && negotiated.contexts.is_empty() {
        return Err(errno::EINVAL);
    }
    match request.offset.checked_add(request.len) {
        // "a zero-length request is unspecified": refused where data or extents are asked for.
        _ if request.len == 0 && !changes => return Err(errno::EINVAL),
        Some(end) if end <= info.size_bytes => {}
        _ if changes => return Err(errno::ENOSPC),
        _ => return Err(errno::EINVAL),
    }
    if request.flags & cmd_flag::FAST_ZERO != 0 && !info.fast_zeroes {
        return Err(errno::ENOTSUP);
    }
    Ok(())
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
            (ask(cmd::TRIM, 0, 0, 8 << 30), &disk, &extended, Ok(())),
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

    fn bare() -> Negotiated {
        Negotiated { export: 0, mode: Mode::Structured, contexts: Vec::new() }
    }
}
