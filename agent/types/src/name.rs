//! Names as users type them: `ardesio`, and inside a VDC `ardesio/web`.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// The longest name, bytes: a DNS label's, since a VM's name becomes its host name (RFC 1123 §2.1).
pub const NAME_BYTES_MAX: usize = 63;

/// A name of a vdc, vm, volume, image, snapshot or node: lower-case letters, digits and `-`, not at its ends.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

/// Why a text is not a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Nothing there.
    #[error("the name is empty")]
    Empty,
    /// Too long.
    #[error("`{0}…` is longer than {NAME_BYTES_MAX} characters")]
    TooLong(String),
    /// A character that is not allowed.
    #[error("`{name}` has the character {bad:?}: use lower-case letters, digits and -")]
    Character {
        /// The text.
        name: String,
        /// The first wrong character.
        bad: char,
    },
    /// A `-` at an end.
    #[error("`{0}` starts or ends with -")]
    Hyphen(String),
    /// Not `VDC/NAME`.
    #[error("`{0}` is not of the form VDC/NAME")]
    NotInVdc(String),
    /// Not `VDC/NAME@SNAPSHOT`.
    #[error("`{0}` is not of the form VDC/NAME@SNAPSHOT")]
    NotASnapshot(String),
}

impl Name {
    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        if text.is_empty() {
            return Err(NameError::Empty);
        }
        if text.len() > NAME_BYTES_MAX {
            return Err(NameError::TooLong(text.chars().take(16).collect()));
        }
        if let Some(bad) = text.chars().find(|c| !(c.is_ascii_lowercase() || c.is_ascii_digit() || *c == '-'))
        {
            return Err(NameError::Character { name: text.to_owned(), bad });
        }
        if text.starts_with('-') || text.ends_with('-') {
            return Err(NameError::Hyphen(text.to_owned()));
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for Name {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A name inside a vdc, shown as `VDC/NAME`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VdcName {
    /// The vdc.
    pub vdc: Name,
    /// The name inside it.
    pub name: Name,
}

impl FromStr for VdcName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let (vdc, name) = text.split_once('/').ok_or_else(|| NameError::NotInVdc(text.to_owned()))?;
        Ok(Self { vdc: vdc.parse()?, name: name.parse()? })
    }
}

impl fmt::Display for VdcName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.vdc, self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_and_bad_names() {
        for good in ["a", "ardesio", "web-1", "0", &"x".repeat(63)] {
            assert_eq!(good.parse::<Name>().unwrap().as_str(), good);
        }
        assert_eq!("".parse::<Name>(), Err(NameError::Empty));
        assert!(matches!("x".repeat(64).parse::<Name>(), Err(NameError::TooLong(_))));
        assert!(matches!("é".repeat(64).parse::<Name>(), Err(NameError::TooLong(_))));
        assert!(matches!("../etc".parse::<Name>(), Err(NameError::Character { bad: '.', .. })));
        assert!(matches!("Web".parse::<Name>(), Err(NameError::Character { bad: 'W', .. })));
        assert!(matches!("web-".parse::<Name>(), Err(NameError::Hyphen(_))));
    }

    #[test]
    fn a_name_in_a_vdc() {
        let name: VdcName = "ardesio/web".parse().unwrap();
        assert_eq!((name.vdc.as_str(), name.name.as_str()), ("ardesio", "web"));
        assert_eq!(name.to_string(), "ardesio/web");
        assert!(matches!("web".parse::<VdcName>(), Err(NameError::NotInVdc(_))));
        assert!("ardesio/web/x".parse::<VdcName>().is_err());
    }
}
