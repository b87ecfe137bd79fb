//! NBD URIs, as `doc/uri.md` of the NetworkBlockDevice project has them. Pure.

use std::path::PathBuf;

use super::stream::Address;

/// The port of NBD.
const PORT: u16 = 10809;

/// A parsed URI.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uri {
    /// Where the server is.
    pub address: Address,
    /// The export's name; may be empty.
    pub export: String,
    /// `nbds`: TLS is wanted.
    pub tls: bool,
    /// Query parameters other than `socket`, decoded, in their order.
    pub parameters: Vec<(String, String)>,
}

/// Why a text is not an NBD URI that can be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{uri}` is not an NBD URI: {why}")]
pub struct UriError {
    uri: String,
    why: &'static str,
}

/// Whether a text looks like an NBD URI, so that a file name is not taken for one.
pub fn is_uri(text: &str) -> bool {
    ["nbd://", "nbds://", "nbd+unix://", "nbds+unix://"].iter().any(|scheme| text.starts_with(scheme))
}

impl std::str::FromStr for Uri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Uri, UriError> {
        parse(text).map_err(|why| UriError { uri: text.chars().take(200).collect(), why })
    }
}

fn parse(text: &str) -> Result<Uri, &'static str> {
    let (scheme, rest) = text.split_once("://").ok_or("it has no scheme, such as nbd://")?;
    let (tls, unix) = match scheme {
        "nbd" => (false, false),
        "nbds" => (true, false),
        "nbd+unix" => (false, true),
        "nbds+unix" => (true, true),
        _ => return Err("the scheme is none of nbd, nbds, nbd+unix, nbds+unix"),
    };
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let export = decode(path)?;
    let mut socket = None;
    let mut parameters = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        match key {
            "socket" => socket = Some(decode(value)?),
            _ => parameters.push((decode(key)?, decode(value)?)),
        }
    }
    let address = match (unix, socket) {
        (true, Some(path)) if !path.is_empty() => Address::Unix(PathBuf::from(path)),
        (true, _) => return Err("a Unix socket is named by ?socket=PATH"),
        (false, _) => tcp(authority)?,
    };
    Ok(Uri { address, export, tls, parameters })
}

fn tcp(authority: &str) -> Result<Address, &'static str> {
    // A user's name in front is allowed by the syntax and means nothing here.
    let authority = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']').ok_or("`[` without `]`")?;
            let port = if port.is_empty() { None } else { port.strip_prefix(':') };
            (host, port)
        }
        None => match authority.rsplit_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        },
    };
    let port = match port {
        None | Some("") => PORT,
        Some(digits) => digits.parse().map_err(|_| "the port is not a number up to 65535")?,
    };
    if host.is_empty() {
        return Err("it names no host");
    }
    Ok(Address::Tcp { host: decode(host)?, port })
}

/// RFC 3986 percent-decoding.
fn decode(text: &str) -> Result<String, &'static str> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, more)) = rest.split_first() {
        rest = more;
        if first != b'%' {
            bytes.push(first);
            continue;
        }
        let (digits, more) = rest.split_first_chunk::<2>().ok_or("a % without two digits")?;
        let digit = |b: u8| char::from(b).to_digit(16).map(|d| d as u8);
        let (Some(high), Some(low)) = (digit(digits[0]), digit(digits[1])) else {
            return Err("a % without two hexadecimal digits");
        };
        bytes.push(high << 4 | low);
        rest = more;
    }
    String::from_utf8(bytes).map_err(|_| "it is not UTF-8")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn uris_are_taken_apart() {
        let uri: Uri = "nbd://server".parse().expect("uri");
        assert_eq!(uri.address, Address::Tcp { host: "server".into(), port: 10809 });
        assert_eq!((uri.export.as_str(), uri.tls), ("", false));
        let uri: Uri = "nbds://[::1]:99/a%2fb?tls-certificates=/x%20y&z".parse().expect("uri");
        assert_eq!(uri.address, Address::Tcp { host: "::1".into(), port: 99 });
        assert_eq!((uri.export.as_str(), uri.tls), ("a/b", true));
        assert_eq!(
            uri.parameters,
            [("tls-certificates".into(), "/x y".into()), ("z".to_owned(), String::new())]
        );
        let uri: Uri = "nbd+unix:///token?socket=/run/a.sock".parse().expect("uri");
        assert_eq!((uri.address, uri.export.as_str()), (Address::Unix("/run/a.sock".into()), "token"));
        for bad in
            ["", "http://x", "nbd://", "nbd://:1", "nbd://x:99999", "nbd+unix:///x", "nbd://x/%4", "nbd://[a"]
        {
            let error = bad.parse::<Uri>().expect_err(bad);
            assert!(error.to_string().contains("not an NBD URI"), "{error}");
        }
        assert!(is_uri("nbd://x") && !is_uri("nbd.qcow2") && !is_uri("/tmp/nbd://"));
    }

    proptest! {
        #[test]
        fn any_text_is_answered(text in ".{0,80}", tail in "[a-z%/?&=\\[\\]:@0-9]{0,60}") {
            let _ = text.parse::<Uri>();
            let _ = format!("nbd://{tail}").parse::<Uri>();
            let _ = format!("nbd+unix://{tail}").parse::<Uri>();
        }
    }
}
