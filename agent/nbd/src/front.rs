//! What stands between a TLS socket and an export's Unix socket: it forces STARTTLS, learns which export the
//! client wants, and says what to send where. Pure: the caller owns sockets, TLS and the table of names.
//!
//! ```text
//! caller sends greeting() in the clear, then feeds what it reads:
//!   Clear ──NBD_OPT_STARTTLS──► StartTls: the caller does the TLS handshake, calls `tls_done`
//!   Secure ──first option that names an export──► Relay { name, send, discard }
//!     known name:   connect, read and drop `discard` bytes while sending `send`, then copy both ways
//!     unknown name: call `refuse`, send what it returns, go on feeding
//! ```
//! The export's server on the Unix socket is told the same name, so nothing needs to be rewritten.

use crate::{
    handshake::{
        ClientFlags, GREETING_BYTES, HandshakeError, OPTION_HEADER_BYTES, OptionHeader, REPLY_HEADER_BYTES,
        export_name_of, raise, reply,
    },
    wire::{Mode, opt, rep},
};

/// Options that one client may send before it names an export.
const OPTIONS_MAX: u32 = 64;

/// What the caller does next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FrontStep {
    /// Read more, and feed it.
    Read,
    /// Start the TLS handshake, after sending what [`Front::take_output`] gives.
    StartTls,
    /// The client wants this export.
    Relay {
        /// The name: the token that seriod made for the export.
        name: String,
        /// Bytes for the export's server.
        send: Vec<u8>,
        /// Bytes of the export's server that the client must not see: it has had them from this front.
        discard: usize,
    },
    /// Send the output, then close.
    Close,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Clear,
    Starting,
    Secure,
}

/// See the head of this file.
#[derive(Debug)]
pub struct Front {
    phase: Phase,
    flags: Option<ClientFlags>,
    mode: Mode,
    input: Vec<u8>,
    output: Vec<u8>,
    options: u32,
    /// The option that named an export, until the caller accepts or refuses it.
    asked: Option<u32>,
}

impl Default for Front {
    fn default() -> Self {
        Front::new()
    }
}

impl Front {
    /// A new connection, in the clear. Its output starts with the greeting.
    pub fn new() -> Front {
        Front {
            phase: Phase::Clear,
            flags: None,
            mode: Mode::Simple,
            input: Vec::new(),
            output: crate::handshake::greeting().to_vec(),
            options: 0,
            asked: None,
        }
    }

    /// What to send to the client, before anything else is done.
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    /// The TLS handshake is done; what is fed from here on was encrypted.
    pub fn tls_done(&mut self) {
        self.phase = Phase::Secure;
    }

    /// Takes what was read from the client. Feed an empty slice after [`Front::refuse`] and [`Front::tls_done`]:
    /// more may be there already.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<FrontStep, HandshakeError> {
        self.input.extend_from_slice(bytes);
        loop {
            let Some(_) = self.flags else {
                let Some((flags, _)) = self.input.split_first_chunk() else { return Ok(FrontStep::Read) };
                self.flags = Some(ClientFlags::decode(*flags)?);
                self.input.drain(..4);
                continue;
            };
            let Some((head, rest)) = self.input.split_first_chunk::<OPTION_HEADER_BYTES>() else {
                return Ok(FrontStep::Read);
            };
            let header = OptionHeader::decode(*head)?;
            if rest.len() < header.len as usize {
                return Ok(FrontStep::Read);
            }
            let step = self.option(header)?;
            if step != FrontStep::Read {
                return Ok(step);
            }
        }
    }

    /// One whole option at the front of the input.
    fn option(&mut self, header: OptionHeader) -> Result<FrontStep, HandshakeError> {
        self.options += 1;
        if self.options > OPTIONS_MAX {
            return Err(HandshakeError::TooManyOptions);
        }
        let OptionHeader { option, len } = header;
        let end = OPTION_HEADER_BYTES + len as usize;
        let payload = self.input.get(OPTION_HEADER_BYTES..end).unwrap_or_default();
        let out = &mut self.output;
        let step = match (self.phase, option) {
            (_, opt::ABORT) => {
                reply(out, option, rep::ACK, &[]);
                FrontStep::Close
            }
            (Phase::Clear, opt::STARTTLS) if payload.is_empty() => {
                reply(out, option, rep::ACK, &[]);
                // Whatever came in the clear after it could be injected by anybody: it must not be believed.
                self.phase = Phase::Starting;
                self.input.clear();
                return Ok(FrontStep::StartTls);
            }
            (_, opt::STARTTLS) => {
                // "If the server receives NBD_OPT_STARTTLS when TLS has already been negotiated": or with a payload.
                reply(out, option, rep::ERR_INVALID, b"TLS is there already, or the option has a payload");
                FrontStep::Read
            }
            // It has no error reply, so closing is all there is.
            (Phase::Clear | Phase::Starting, opt::EXPORT_NAME) => FrontStep::Close,
            (Phase::Clear | Phase::Starting, _) => {
                reply(out, option, rep::ERR_TLS_REQD, b"this server speaks only TLS: send NBD_OPT_STARTTLS");
                FrontStep::Read
            }
            (Phase::Secure, opt::STRUCTURED_REPLY | opt::EXTENDED_HEADERS) => {
                raise(&mut self.mode, option, payload, out);
                FrontStep::Read
            }
            (Phase::Secure, opt::LIST) => {
                reply(out, option, rep::ERR_POLICY, b"export names are secret here");
                FrontStep::Read
            }
            (Phase::Secure, _) => match export_name_of(option, payload) {
                Some(Ok(name)) => {
                    let name = name.to_owned();
                    self.asked = Some(option);
                    return Ok(self.relay(name));
                }
                Some(Err(())) if option == opt::EXPORT_NAME => FrontStep::Close,
                Some(Err(())) => {
                    reply(out, option, rep::ERR_INVALID, b"malformed request");
                    FrontStep::Read
                }
                None => {
                    reply(out, option, rep::ERR_UNSUP, b"this server does not know that option");
                    FrontStep::Read
                }
            },
        };
        self.input.drain(..end);
        Ok(step)
    }

    /// The input stays as it is, since `refuse` needs to drop only its first option.
    fn relay(&self, name: String) -> FrontStep {
        let flags = self.flags.map_or(0, |f| f.bits);
        let mut send = flags.to_be_bytes().to_vec();
        let mut discard = GREETING_BYTES;
        let replayed = match self.mode {
            Mode::Simple => None,
            Mode::Structured => Some(opt::STRUCTURED_REPLY),
            Mode::Extended => Some(opt::EXTENDED_HEADERS),
        };
        if let Some(option) = replayed {
            send.extend(OptionHeader::encode(option, &[]));
            discard += REPLY_HEADER_BYTES;
        }
        send.extend_from_slice(&self.input);
        FrontStep::Relay { name, send, discard }
    }

    /// The name of the last [`FrontStep::Relay`] is not known: the client is told so. Then send the output, and
    /// feed again, or close when this returns [`FrontStep::Close`].
    pub fn refuse(&mut self) -> FrontStep {
        self.refuse_as(rep::ERR_UNKNOWN, b"there is no export of that name, or it has expired")
    }

    /// As [`Front::refuse`], where there is no place for the client.
    pub fn refuse_full(&mut self) -> FrontStep {
        self.refuse_as(rep::ERR_POLICY, b"too many clients are at work already: try again later")
    }

    fn refuse_as(&mut self, kind: u32, why: &[u8]) -> FrontStep {
        let Some(option) = self.asked.take() else { return FrontStep::Read };
        if option == opt::EXPORT_NAME {
            return FrontStep::Close;
        }
        let header = self.input.split_first_chunk().map(|(head, _)| OptionHeader::decode(*head));
        if let Some(Ok(header)) = header {
            self.input.drain(..(OPTION_HEADER_BYTES + header.len as usize).min(self.input.len()));
        }
        reply(&mut self.output, option, kind, why);
        FrontStep::Read
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn go(name: &str) -> Vec<u8> {
        let mut payload = (name.len() as u32).to_be_bytes().to_vec();
        payload.extend_from_slice(name.as_bytes());
        payload.extend_from_slice(&[0, 0]);
        OptionHeader::encode(opt::GO, &payload)
    }

    fn kind(output: &[u8]) -> u32 {
        u32::from_be_bytes(output[12..16].try_into().expect("a reply"))
    }

    #[test]
    fn nothing_but_starttls_in_the_clear() {
        let mut front = Front::new();
        assert_eq!(front.take_output().len(), GREETING_BYTES);
        assert_eq!(front.feed(&[0, 0, 0, 3]), Ok(FrontStep::Read));
        assert_eq!(front.feed(&go("token")), Ok(FrontStep::Read));
        assert_eq!(kind(&front.take_output()), rep::ERR_TLS_REQD);
        // What is injected behind STARTTLS is forgotten.
        let mut start = OptionHeader::encode(opt::STARTTLS, &[]);
        start.extend(go("injected"));
        assert_eq!(front.feed(&start), Ok(FrontStep::StartTls));
        assert_eq!(kind(&front.take_output()), rep::ACK);
        front.tls_done();
        assert_eq!(front.feed(&[]), Ok(FrontStep::Read));

        assert_eq!(front.feed(&OptionHeader::encode(opt::STRUCTURED_REPLY, &[])), Ok(FrontStep::Read));
        assert_eq!(kind(&front.take_output()), rep::ACK);
        assert_eq!(front.feed(&OptionHeader::encode(opt::STARTTLS, &[])), Ok(FrontStep::Read));
        assert_eq!(kind(&front.take_output()), rep::ERR_INVALID, "it is there already");
        assert!(matches!(front.feed(&go("wrong")), Ok(FrontStep::Relay { name, .. }) if name == "wrong"));
        assert_eq!(front.refuse(), FrontStep::Read);
        assert_eq!(kind(&front.take_output()), rep::ERR_UNKNOWN);
        assert_eq!(front.feed(&[]), Ok(FrontStep::Read));
        let mut send = vec![0, 0, 0, 3];
        send.extend(OptionHeader::encode(opt::STRUCTURED_REPLY, &[]));
        send.extend(go("token"));
        let step = FrontStep::Relay { name: "token".into(), send, discard: 38 };
        assert_eq!(front.feed(&go("token")), Ok(step));
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 0..20)) {
            let mut front = Front::new();
            front.feed(&[0, 0, 0, 3]).expect("flags");
            front.tls_done();
            for chunk in chunks {
                let mut option = OptionHeader::encode(u32::from(chunk.first().copied().unwrap_or(0) % 12), &chunk);
                option.extend_from_slice(&chunk);
                if front.feed(&option).is_err() {
                    break;
                }
                front.refuse();
            }
        }
    }
}
