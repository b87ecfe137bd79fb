//! Resource names of the API and back: `ardesio/web` is `vdcs/ardesio/vms/web` there.

pub use serio_types::resource::{image, snapshot, vdc, vdc_snapshot, vm, vm_snapshot, volume};

/// As people write it: the collections left out. A name of another shape stays as it is.
#[must_use]
pub fn short(resource: &str) -> String {
    let parts: Vec<&str> = resource.split('/').collect();
    match parts.as_slice() {
        ["vdcs", vdc, "vms" | "volumes", name] => format!("{vdc}/{name}"),
        ["vdcs", vdc, "vms" | "volumes", name, "snapshots", point] => format!("{vdc}/{name}@{point}"),
        ["vdcs", vdc, "snapshots", name] => format!("{vdc}@{name}"),
        ["operations", id] => (*id).to_owned(),
        ["vdcs" | "images" | "nodes" | "exports" | "placements", name] => (*name).to_owned(),
        _ => resource.to_owned(),
    }
}

/// With the noun in front, where resources of all kinds stand together: `vm ardesio/web`.
#[must_use]
pub fn with_noun(resource: &str) -> String {
    let noun = match resource.split('/').collect::<Vec<_>>().as_slice() {
        ["vdcs", _] | ["vdcs", _, "snapshots", _] => "vdc",
        ["vdcs", _, "vms", ..] => "vm",
        ["vdcs", _, "volumes", ..] => "volume",
        ["images", _] => "image",
        ["nodes", _] => "node",
        ["exports", _] => "export",
        _ => return resource.to_owned(),
    };
    format!("{noun} {}", short(resource))
}

/// A point alone: `before` of `vdcs/ardesio/volumes/web-root/snapshots/before`.
#[must_use]
pub fn short_point(name: &str) -> String {
    name.rsplit('/').next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use serio_types::VdcName;

    use super::*;

    #[test]
    fn there_and_back() {
        let name: VdcName = "ardesio/web".parse().unwrap();
        assert_eq!(vm(&name), "vdcs/ardesio/vms/web");
        assert_eq!(short(&vm(&name)), "ardesio/web");
        assert_eq!(short(&volume(&name)), "ardesio/web");
        assert_eq!(short("images/tiny"), "tiny");
        assert_eq!(short("placements/0d3c"), "0d3c");
        assert_eq!(short("vdcs/a/volumes/b/snapshots/c"), "a/b@c");
        assert_eq!(
            (short("vdcs/a/snapshots/b"), with_noun("vdcs/a/snapshots/b")),
            ("a@b".into(), "vdc a@b".into())
        );
        assert_eq!(short("odd"), "odd");
        assert_eq!(with_noun("vdcs/a/volumes/b/snapshots/c"), "volume a/b@c");
        assert_eq!((with_noun("images/tiny").as_str(), with_noun("odd").as_str()), ("image tiny", "odd"));
    }
}
