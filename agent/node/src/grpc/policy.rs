//! Who may call what: one table of all methods that a node serves. A method that is not in it is nobody's; a test holds the
//! table against the descriptors of the API.
//!
//! | role | may |
//! |---|---|
//! | `control-plane` | everything |
//! | `peer-agent` | read what replication needs: the node, vdcs, volumes, images |
//! | `auditor` | read everything, the audit log and the VMs' logs too |
//! | other | only ask for health |

/// What a caller is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Drives the node.
    ControlPlane,
    /// Another node's agent.
    PeerAgent,
    /// Sees all, changes nothing.
    Auditor,
    /// None of these.
    Nobody,
}

impl Role {
    /// As certificates and the audit log have it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ControlPlane => "control-plane",
            Self::PeerAgent => "peer-agent",
            Self::Auditor => "auditor",
            Self::Nobody => "none",
        }
    }

    /// The role of that name.
    #[must_use]
    pub fn of_unit(unit: &str) -> Option<Self> {
        [Self::ControlPlane, Self::PeerAgent, Self::Auditor].into_iter().find(|role| role.as_str() == unit)
    }
}

/// Who may call a method, and whether it changes something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Changes something: the control plane, and each call is in the audit log.
    Change,
    /// Reads what peers need too.
    Read,
    /// Reads what is nobody else's business.
    Inspect,
    /// Says only that the node lives: whoever came so far.
    Health,
}
use Access::{Change, Health, Inspect, Read};

impl Access {
    /// Whether a role has it.
    #[must_use]
    pub const fn allows(self, role: Role) -> bool {
        match self {
            Change => matches!(role, Role::ControlPlane),
            Inspect => matches!(role, Role::ControlPlane | Role::Auditor),
            Read => matches!(role, Role::ControlPlane | Role::Auditor | Role::PeerAgent),
            Health => true,
        }
    }

    /// Who has it, for the one who was refused.
    #[must_use]
    pub const fn who(self) -> &'static str {
        match self {
            Change => "the role control-plane",
            Inspect => "the role control-plane or auditor",
            Read => "the role control-plane, auditor or peer-agent",
            Health => "nothing",
        }
    }
}

/// All methods.
const METHODS: &[(&str, &[(&str, Access)])] = &[
    (
        "serio.v1.NodeService",
        &[
            ("GetNode", Read),
            ("GetCapacity", Read),
            ("WatchEvents", Read),
            ("WatchAudit", Inspect),
            ("VerifyAudit", Inspect),
            ("DrainNode", Change),
            ("UndrainNode", Change),
            ("FenceNode", Change),
        ],
    ),
    (
        "serio.v1.VdcService",
        &[
            ("CreateVdc", Change),
            ("GetVdc", Read),
            ("ListVdcs", Read),
            ("UpdateVdc", Change),
            ("RotateVdcKey", Change),
            ("EraseVdc", Change),
            ("DeleteVdc", Change),
            ("CreateVdcSnapshot", Change),
            ("GetVdcSnapshot", Read),
            ("ListVdcSnapshots", Read),
            // What is invoiced.
            ("ListUsage", Inspect),
            ("DeleteVdcSnapshot", Change),
        ],
    ),
    (
        "serio.v1.VmService",
        &[
            ("CreateVm", Change),
            ("GetVm", Read),
            ("ListVms", Read),
            ("UpdateVm", Change),
            ("AttachVolume", Change),
            ("DetachVolume", Change),
            ("AttachNic", Change),
            ("DetachNic", Change),
            ("StartVm", Change),
            ("StopVm", Change),
            ("RebootVm", Change),
            ("PauseVm", Change),
            ("ResumeVm", Change),
            ("SnapshotVm", Change),
            ("ListVmSnapshots", Read),
            ("DeleteVmSnapshot", Change),
            ("RestoreVm", Change),
            // Reads all that a guest has, so that it can be taken elsewhere.
            ("ExportVmSnapshot", Change),
            ("ImportVmSnapshot", Change),
            ("DeleteVm", Change),
            // Whoever types at a console changes what is behind it.
            ("AttachConsole", Change),
            // What guests print may be anything.
            ("ReadLog", Inspect),
        ],
    ),
    (
        "serio.v1.VolumeService",
        &[
            ("CreateVolume", Change),
            ("GetVolume", Read),
            ("ListVolumes", Read),
            ("DeleteVolume", Change),
            ("CreateSnapshot", Change),
            ("ListSnapshots", Read),
            ("DeleteSnapshot", Change),
            ("ResizeVolume", Change),
            ("CloneVolume", Change),
            ("RollbackVolume", Change),
            ("FlattenVolume", Change),
            ("ListChangedRanges", Read),
            ("CheckVolume", Change),
            ("CreateExport", Change),
            // The names of exports are what opens them.
            ("ListExports", Inspect),
            ("DeleteExport", Change),
        ],
    ),
    (
        "serio.v1.ImageService",
        &[
            ("ImportImage", Change),
            ("GetImageUpload", Read),
            ("GetImage", Read),
            ("ListImages", Read),
            ("DeleteImage", Change),
        ],
    ),
    (
        "serio.v1.OperationService",
        &[
            ("GetOperation", Read),
            ("ListOperations", Read),
            ("WatchOperation", Read),
            ("CancelOperation", Change),
        ],
    ),
    ("grpc.health.v1.Health", &[("Check", Health), ("Watch", Health), ("List", Health)]),
    ("grpc.reflection.v1.ServerReflection", &[("ServerReflectionInfo", Read)]),
];

/// What a method asks for: the path is `/serio.v1.VmService/GetVm`. `None`: it is not known here.
#[must_use]
pub fn access(path: &str) -> Option<Access> {
    let (service, method) = path.strip_prefix('/')?.split_once('/')?;
    let (_, methods) = METHODS.iter().find(|(name, _)| *name == service)?;
    methods.iter().find(|(name, _)| *name == method).map(|(_, access)| *access)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use prost::Message;
    use serio_api::FILE_DESCRIPTOR_SET;

    use super::*;

    /// The part of `google.protobuf.FileDescriptorSet` that names methods.
    #[derive(Clone, PartialEq, Message)]
    struct Set {
        #[prost(message, repeated, tag = "1")]
        files: Vec<ProtoFile>,
    }
    #[derive(Clone, PartialEq, Message)]
    struct ProtoFile {
        #[prost(string, tag = "2")]
        package: String,
        #[prost(message, repeated, tag = "6")]
        services: Vec<Service>,
    }
    #[derive(Clone, PartialEq, Message)]
    struct Service {
        #[prost(string, tag = "1")]
        name: String,
        #[prost(message, repeated, tag = "2")]
        methods: Vec<Method>,
    }
    #[derive(Clone, PartialEq, Message)]
    struct Method {
        #[prost(string, tag = "1")]
        name: String,
    }

    /// Served by the scheduler.
    const NOT_HERE: &[&str] = &["serio.v1.SchedulerService"];

    #[test]
    fn every_method_of_the_api_is_in_the_table_and_no_other() {
        let set = Set::decode(FILE_DESCRIPTOR_SET).unwrap();
        let mut api = BTreeSet::new();
        for file in set.files {
            for service in file.services {
                let name = format!("{}.{}", file.package, service.name);
                if !NOT_HERE.contains(&name.as_str()) {
                    api.extend(service.methods.iter().map(|method| format!("/{name}/{}", method.name)));
                }
            }
        }
        assert!(api.len() > 40, "{api:?}");
        let table: BTreeSet<String> = METHODS
            .iter()
            .filter(|(service, _)| service.starts_with("serio."))
            .flat_map(|(service, methods)| {
                methods.iter().map(move |(method, _)| format!("/{service}/{method}"))
            })
            .collect();
        let missing: Vec<_> = api.difference(&table).collect();
        assert!(missing.is_empty(), "decide in grpc/policy.rs who may call {missing:?}");
        let unknown: Vec<_> = table.difference(&api).collect();
        assert!(unknown.is_empty(), "the API has no {unknown:?}");
    }

    #[test]
    fn what_sounds_like_a_change_is_one() {
        for (service, methods) in METHODS.iter().filter(|(service, _)| service.starts_with("serio.")) {
            for (method, access) in *methods {
                let reads = ["Get", "List", "Watch", "Read", "Verify"].iter().any(|w| method.starts_with(w));
                assert_eq!(*access != Change, reads, "{service}/{method}");
            }
        }
    }

    #[test]
    fn roles() {
        let may = |role, path: &str| access(path).is_some_and(|access| access.allows(role));
        assert!(may(Role::ControlPlane, "/serio.v1.VmService/StopVm"));
        assert!(may(Role::Auditor, "/serio.v1.VmService/ListVms"));
        assert!(may(Role::Auditor, "/serio.v1.NodeService/WatchAudit"));
        assert!(!may(Role::PeerAgent, "/serio.v1.NodeService/WatchAudit"));
        assert!(may(Role::PeerAgent, "/serio.v1.VolumeService/ListChangedRanges"));
        assert!(!may(Role::PeerAgent, "/serio.v1.VmService/ReadLog"));
        assert!(!may(Role::Auditor, "/serio.v1.VmService/AttachConsole"));
        assert!(!may(Role::Nobody, "/serio.v1.VmService/ListVms"));
        assert!(may(Role::Nobody, "/grpc.health.v1.Health/Check"));
        for path in [
            "nonsense",
            "",
            "/",
            "/serio.v1.VmService",
            "/serio.v1.VmService/GetVm/",
            "serio.v1.VmService/GetVm",
        ] {
            assert_eq!(access(path), None, "{path}");
        }
        assert_eq!(Role::of_unit("none"), None);
    }
}
