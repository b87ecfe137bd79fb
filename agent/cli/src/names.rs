//! Resource names of the API and back: `ardesio/web` is `vdcs/ardesio/vms/web` there.

use serio_types::{Name, VdcName};

/// `vdcs/ardesio`.
#[must_use]
pub fn vdc(name: &Name) -> String {
    format!("vdcs/{name}")
}

/// `images/tiny`.
#[must_use]
pub fn image(name: &Name) -> String {
    format!("images/{name}")
}

/// `vdcs/ardesio/vms/web`.
#[must_use]
pub fn vm(name: &VdcName) -> String {
    format!("vdcs/{}/vms/{}", name.vdc, name.name)
}

/// `vdcs/ardesio/volumes/web-root`.
#[must_use]
pub fn volume(name: &VdcName) -> String {
    format!("vdcs/{}/volumes/{}", name.vdc, name.name)
}

/// As people write it: the collections left out. A name of another shape stays as it is.
#[must_use]
pub fn short(resource: &str) -> String {
    let parts: Vec<&str> = resource.split('/').collect();
    match parts.as_slice() {
        ["vdcs", vdc, "vms" | "volumes", name] => format!("{vdc}/{name}"),
        ["vdcs", vdc, "volumes", name, "snapshots", point] => format!("{vdc}/{name}@{point}"),
        ["vdcs" | "images" | "nodes" | "exports", name] => (*name).to_owned(),
        _ => resource.to_owned(),
    }
}

/// A point alone: `before` of `vdcs/ardesio/volumes/web-root/snapshots/before`.
#[must_use]
pub fn short_point(name: &str) -> String {
    name.rsplit('/').next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        let name: VdcName = "ardesio/web".parse().unwrap();
        assert_eq!(vm(&name), "vdcs/ardesio/vms/web");
        assert_eq!(short(&vm(&name)), "ardesio/web");
        assert_eq!(short(&volume(&name)), "ardesio/web");
        assert_eq!(short("images/tiny"), "tiny");
        assert_eq!(short("vdcs/a/volumes/b/snapshots/c"), "a/b@c");
        assert_eq!(short("odd"), "odd");
    }
}
