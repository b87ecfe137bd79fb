//! Addresses of network cards.

use std::{
    fmt,
    net::{AddrParseError, IpAddr},
    str::FromStr,
};

use serde::{Deserialize, Serialize};

/// Why a text is not an address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NetError {
    /// Not a MAC address.
    #[error("`{0}` is not a MAC address: write six pairs of hex digits, for example 52:54:00:12:34:56")]
    Mac(String),
    /// A group address.
    #[error(
        "`{0}` is a group MAC address: a card's own has an even first pair, for example 52:54:00:12:34:56"
    )]
    MacGroup(String),
    /// Not ADDRESS/LENGTH.
    #[error("`{0}` is not an address with its network's length: write for example 192.168.7.10/24")]
    Cidr(String),
    /// The length is too large.
    #[error("`{text}` has the length {length}: at most {max}")]
    CidrLength {
        /// The text.
        text: String,
        /// As given.
        length: u8,
        /// 32 or 128.
        max: u8,
    },
}

/// The address of a card, unicast.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddr([u8; 6]);

impl MacAddr {
    /// The six bytes.
    #[must_use]
    pub const fn bytes(self) -> [u8; 6] {
        self.0
    }

    /// An address of our own from any five bytes: locally administered (the second bit), unicast (the first is 0).
    #[must_use]
    pub const fn local(tail: [u8; 5]) -> Self {
        let [a, b, c, d, e] = tail;
        Self([0x52, a, b, c, d, e])
    }
}

impl FromStr for MacAddr {
    type Err = NetError;

    fn from_str(text: &str) -> Result<Self, NetError> {
        let malformed = || NetError::Mac(text.to_owned());
        let mut bytes = [0_u8; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(malformed)?;
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(malformed());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| malformed())?;
        }
        if parts.next().is_some() {
            return Err(malformed());
        }
        if bytes[0] & 1 == 1 {
            return Err(NetError::MacGroup(text.to_owned()));
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for MacAddr {
    type Error = NetError;
    fn try_from(text: String) -> Result<Self, NetError> {
        text.parse()
    }
}

impl From<MacAddr> for String {
    fn from(mac: MacAddr) -> Self {
        mac.to_string()
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// An address and the length of its network: `192.168.7.10/24`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cidr {
    /// The address itself, not the network's.
    pub address: IpAddr,
    /// Leading bits that name the network.
    pub length: u8,
}

impl FromStr for Cidr {
    type Err = NetError;

    fn from_str(text: &str) -> Result<Self, NetError> {
        let malformed = || NetError::Cidr(text.to_owned());
        let (address, length) = text.split_once('/').ok_or_else(malformed)?;
        let address: IpAddr = address.parse().map_err(|_: AddrParseError| malformed())?;
        let length: u8 = length.parse().map_err(|_| malformed())?;
        let max = if address.is_ipv4() { 32 } else { 128 };
        if length > max {
            return Err(NetError::CidrLength { text: text.to_owned(), length, max });
        }
        Ok(Self { address, length })
    }
}

impl TryFrom<String> for Cidr {
    type Error = NetError;
    fn try_from(text: String) -> Result<Self, NetError> {
        text.parse()
    }
}

impl From<Cidr> for String {
    fn from(cidr: Cidr) -> Self {
        cidr.to_string()
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn addresses() {
        let mac: MacAddr = "52:54:00:12:34:5f".parse().unwrap();
        assert_eq!(mac.to_string(), "52:54:00:12:34:5f");
        assert!(matches!("01:00:5e:00:00:01".parse::<MacAddr>(), Err(NetError::MacGroup(_))));
        for bad in ["", "52:54:00:12:34", "52:54:00:12:34:56:78", "52:54:00:12:34:+6", "g2:54:00:12:34:56"] {
            assert!(bad.parse::<MacAddr>().is_err(), "{bad}");
        }
        assert_eq!("192.168.7.10/24".parse::<Cidr>().unwrap().to_string(), "192.168.7.10/24");
        assert_eq!("fd00::1/64".parse::<Cidr>().unwrap().length, 64);
        for bad in ["192.168.7.10", "192.168.7.10/33", "x/24", "192.168.7.10/", "::1/129"] {
            assert!(bad.parse::<Cidr>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(text in ".*") {
            let _ = text.parse::<MacAddr>();
            let _ = text.parse::<Cidr>();
        }

        #[test]
        fn our_own_addresses_are_valid(tail: [u8; 5]) {
            let mac = MacAddr::local(tail);
            prop_assert_eq!(mac.to_string().parse::<MacAddr>().unwrap(), mac);
        }
    }
}
