//! Names of resources in the API: `vdcs/ardesio/vms/web`. One place makes and reads them.

use std::{fmt, str::FromStr};

use crate::{Name, NameError, VdcName};

/// Why a text is not the name of such a resource.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResourceError {
    /// Not of the form.
    #[error("`{text}` is not of the form {form}")]
    Form {
        /// The text.
        text: String,
        /// What it should look like.
        form: &'static str,
    },
    /// A part is not a name.
    #[error("`{text}`")]
    Part {
        /// The text.
        text: String,
        /// Why.
        #[source]
        source: NameError,
    },
}

/// The name of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SnapshotName {
    /// Its volume.
    pub volume: VdcName,
    /// Its own name.
    pub snapshot: Name,
}

impl FromStr for SnapshotName {
    type Err = NameError;

    /// As people write it: `VDC/NAME@SNAPSHOT`.
    fn from_str(text: &str) -> Result<Self, NameError> {
        let (volume, snapshot) =
            text.rsplit_once('@').ok_or_else(|| NameError::NotASnapshot(text.to_owned()))?;
        Ok(Self { volume: volume.parse()?, snapshot: snapshot.parse()? })
    }
}

impl fmt::Display for SnapshotName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.volume, self.snapshot)
    }
}

fn parts<const N: usize>(text: &str, form: &'static str) -> Result<[Name; N], ResourceError> {
    let wrong = || ResourceError::Form { text: text.to_owned(), form };
    let mut found = Vec::with_capacity(N);
    let mut given = text.split('/');
    for expected in form.split('/') {
        let part = given.next().ok_or_else(wrong)?;
        if expected.chars().all(|c| c.is_ascii_lowercase()) {
            if part != expected {
                return Err(wrong());
            }
        } else {
            found.push(part.parse().map_err(|source| ResourceError::Part { text: text.to_owned(), source })?);
        }
    }
    if given.next().is_some() {
        return Err(wrong());
    }
    found.try_into().map_err(|_| wrong())
}

/// `vdcs/VDC`.
pub fn parse_vdc(text: &str) -> Result<Name, ResourceError> {
    parts::<1>(text, "vdcs/VDC").map(|[name]| name)
}

/// `images/NAME`.
pub fn parse_image(text: &str) -> Result<Name, ResourceError> {
    parts::<1>(text, "images/NAME").map(|[name]| name)
}

/// `exports/ID`.
pub fn parse_export(text: &str) -> Result<Name, ResourceError> {
    parts::<1>(text, "exports/ID").map(|[name]| name)
}

/// `operations/ID`.
pub fn parse_operation(text: &str) -> Result<Name, ResourceError> {
    parts::<1>(text, "operations/ID").map(|[name]| name)
}

/// `vdcs/VDC/snapshots/NAME`: of the whole vdc.
pub fn parse_vdc_snapshot(text: &str) -> Result<VdcName, ResourceError> {
    parts::<2>(text, "vdcs/VDC/snapshots/NAME").map(|[vdc, name]| VdcName { vdc, name })
}

/// `vdcs/VDC/vms/NAME`.
pub fn parse_vm(text: &str) -> Result<VdcName, ResourceError> {
    parts::<2>(text, "vdcs/VDC/vms/NAME").map(|[vdc, name]| VdcName { vdc, name })
}

/// `vdcs/VDC/vms/NAME/snapshots/SNAPSHOT`.
pub fn parse_vm_snapshot(text: &str) -> Result<(VdcName, Name), ResourceError> {
    parts::<3>(text, "vdcs/VDC/vms/NAME/snapshots/SNAPSHOT")
        .map(|[vdc, name, snapshot]| (VdcName { vdc, name }, snapshot))
}

/// `vdcs/VDC/volumes/NAME`.
pub fn parse_volume(text: &str) -> Result<VdcName, ResourceError> {
    parts::<2>(text, "vdcs/VDC/volumes/NAME").map(|[vdc, name]| VdcName { vdc, name })
}

/// `vdcs/VDC/volumes/NAME/snapshots/SNAPSHOT`.
pub fn parse_snapshot(text: &str) -> Result<SnapshotName, ResourceError> {
    parts::<3>(text, "vdcs/VDC/volumes/NAME/snapshots/SNAPSHOT")
        .map(|[vdc, name, snapshot]| SnapshotName { volume: VdcName { vdc, name }, snapshot })
}

/// `vdcs/VDC`.
#[must_use]
pub fn vdc(name: &Name) -> String {
    format!("vdcs/{name}")
}

/// `images/NAME`.
#[must_use]
pub fn image(name: &Name) -> String {
    format!("images/{name}")
}

/// `vdcs/VDC/vms/NAME`.
#[must_use]
pub fn vm(name: &VdcName) -> String {
    format!("vdcs/{}/vms/{}", name.vdc, name.name)
}

/// `vdcs/VDC/volumes/NAME`.
#[must_use]
pub fn volume(name: &VdcName) -> String {
    format!("vdcs/{}/volumes/{}", name.vdc, name.name)
}

/// `vdcs/VDC/snapshots/NAME`.
#[must_use]
pub fn vdc_snapshot(name: &VdcName) -> String {
    format!("vdcs/{}/snapshots/{}", name.vdc, name.name)
}

/// `vdcs/VDC/vms/NAME/snapshots/SNAPSHOT`.
#[must_use]
pub fn vm_snapshot(vm_name: &VdcName, snapshot: &Name) -> String {
    format!("{}/snapshots/{snapshot}", vm(vm_name))
}

/// `vdcs/VDC/volumes/NAME/snapshots/SNAPSHOT`.
#[must_use]
pub fn snapshot(volume_name: &VdcName, snapshot: &Name) -> String {
    format!("{}/snapshots/{snapshot}", volume(volume_name))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn they_parse_back() {
        let web: VdcName = "ardesio/web".parse().unwrap();
        assert_eq!(parse_vm(&vm(&web)).unwrap(), web);
        assert_eq!(parse_volume(&volume(&web)).unwrap(), web);
        let point = parse_snapshot(&snapshot(&web, &"before".parse().unwrap())).unwrap();
        assert_eq!(point, SnapshotName { volume: web.clone(), snapshot: "before".parse().unwrap() });
        assert_eq!(parse_vdc_snapshot(&vdc_snapshot(&web)).as_ref(), Ok(&web));
        let of_vm = vm_snapshot(&web, &"before".parse().unwrap());
        assert_eq!(parse_vm_snapshot(&of_vm), Ok((web.clone(), "before".parse().unwrap())));
        assert!(parse_vm(&of_vm).is_err());
        let typed: SnapshotName = "ardesio/web@before".parse().unwrap();
        assert_eq!((typed.to_string().as_str(), typed.snapshot.as_str()), ("ardesio/web@before", "before"));
        assert!("ardesio/web".parse::<SnapshotName>().is_err() && "web@x".parse::<SnapshotName>().is_err());
        assert_eq!(parse_operation("operations/5f0c-1").unwrap().as_str(), "5f0c-1");
        assert_eq!(parse_vdc("vdcs/a").unwrap().as_str(), "a");
        assert!(matches!(parse_vdc("a"), Err(ResourceError::Form { .. })));
        assert!(matches!(parse_vdc("vdcs/A"), Err(ResourceError::Part { .. })));
        assert!(
            parse_vm("vdcs/a/volumes/b").is_err()
                && parse_vm("vdcs/a/vms/b/c").is_err()
                && parse_vm("").is_err()
        );
        assert!(parse_image("images/../x").is_err());
    }

    proptest! {
        #[test]
        fn nothing_panics(text in ".*") {
            let _ = (parse_vdc(&text), parse_vm(&text), parse_snapshot(&text));
        }
    }
}
