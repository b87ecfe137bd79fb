//! Sizes as users type and read them: `256MiB`, `4GiB`, `1TiB`; a bare number is bytes.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// A number of bytes. Parses `4GiB`, `512MiB`, `10K` (binary suffixes, the `iB` may be left out) and `4096`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "SizeText", into = "String")]
pub struct ByteSize(u64);

/// What a configuration file may hold: a number of bytes, or text.
#[derive(Deserialize)]
#[serde(untagged)]
enum SizeText {
    Bytes(u64),
    Text(String),
}

impl TryFrom<SizeText> for ByteSize {
    type Error = SizeError;
    fn try_from(value: SizeText) -> Result<Self, SizeError> {
        match value {
            SizeText::Bytes(bytes) => Ok(Self(bytes)),
            SizeText::Text(text) => text.parse(),
        }
    }
}

impl From<ByteSize> for String {
    fn from(size: ByteSize) -> Self {
        size.to_string()
    }
}

/// Why a text is not a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// No digits, or an unknown suffix.
    #[error("`{0}` is not a size: write a number with KiB, MiB, GiB or TiB, for example 256MiB")]
    Malformed(String),
    /// More than 64 bits.
    #[error("`{0}` is more than 16EiB")]
    TooLarge(String),
}

const UNITS: [(&str, u32); 6] = [("E", 60), ("P", 50), ("T", 40), ("G", 30), ("M", 20), ("K", 10)];

impl ByteSize {
    /// That many bytes.
    #[must_use]
    pub const fn from_bytes(bytes: u64) -> Self {
        Self(bytes)
    }

    /// That many MiB; saturates.
    #[must_use]
    pub const fn from_mib(mib: u64) -> Self {
        Self(mib.saturating_mul(1 << 20))
    }

    /// The bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

impl FromStr for ByteSize {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let malformed = || SizeError::Malformed(text.to_owned());
        let trimmed = text.trim();
        let digits = trimmed.find(|c: char| !c.is_ascii_digit()).unwrap_or(trimmed.len());
        let (number, suffix) = trimmed.split_at(digits);
        if number.is_empty() {
            return Err(malformed());
        }
        let number: u64 = number.parse().map_err(|_| SizeError::TooLarge(text.to_owned()))?;
        let suffix = suffix.trim();
        if suffix.is_empty() || suffix.eq_ignore_ascii_case("b") {
            return Ok(Self(number));
        }
        let shift = UNITS
            .iter()
            .find(|(unit, _)| {
                let rest =
                    suffix.get(..1).filter(|head| head.eq_ignore_ascii_case(unit)).and(suffix.get(1..));
                rest.is_some_and(|rest| rest.is_empty() || rest.eq_ignore_ascii_case("ib"))
            })
            .map(|(_, shift)| *shift)
            .ok_or_else(malformed)?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(|| SizeError::TooLarge(text.to_owned()))
    }
}

impl fmt::Display for ByteSize {
    /// The largest unit in which it is whole, so that it parses back to the same; `1536MiB`, not `1.5GiB`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, shift) in UNITS {
            if self.0 != 0 && self.0 & ((1 << shift) - 1) == 0 {
                return write!(f, "{}{unit}iB", self.0 >> shift);
            }
        }
        write!(f, "{}B", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_users_type() {
        for (text, bytes) in [
            ("256MiB", 256 << 20),
            ("4GiB", 4 << 30),
            ("4g", 4 << 30),
            ("10K", 10 << 10),
            ("4096", 4096),
            ("7B", 7),
        ] {
            assert_eq!(text.parse::<ByteSize>().unwrap().bytes(), bytes, "{text}");
        }
        for text in ["", "MiB", "4GB", "4.5GiB", "-1", "4 apples", "é", "4é"] {
            assert!(matches!(text.parse::<ByteSize>(), Err(SizeError::Malformed(_))), "{text}");
        }
        assert!(matches!("99999999999999999999".parse::<ByteSize>(), Err(SizeError::TooLarge(_))));
        assert!(matches!("16EiB".parse::<ByteSize>(), Err(SizeError::TooLarge(_))));
    }

    proptest! {
        #[test]
        fn what_is_shown_parses_back(bytes: u64) {
            prop_assert_eq!(ByteSize(bytes).to_string().parse::<ByteSize>().unwrap(), ByteSize(bytes));
        }

        #[test]
        fn nothing_panics(text in ".*") {
            let _ = text.parse::<ByteSize>();
        }
    }
}
