//! Names, sizes, ids and validated specs, shared by every process.
//!
//! Owns: values that are valid by their type; the parsing of what users type ([`ByteSize`], [`Name`]); the form of
//! resource names ([`resource`]).
//! Never: I/O, clocks, protobuf, storage.
#![forbid(unsafe_code)]

pub mod limits;
pub mod machine;
pub mod name;
pub mod net;
pub mod resource;
pub mod route;
pub mod share;
pub mod size;
pub mod spec;

pub use limits::{Cmdline, LimitError, MemorySize, VcpuCount, VolumeSize};
pub use machine::{
    Balloon, CpuBaseline, DeviceLimits, IoLimits, LimitedDevice, MachineError, MachineSpec, PageSize,
    Watchdog,
};
pub use name::{Name, NameError, VdcName};
pub use net::{Cidr, MacAddr, NetError};
pub use resource::{ResourceError, SnapshotName};
pub use route::Route;
pub use share::VdcLimits;
pub use size::{ByteSize, SizeError};
pub use spec::{
    BootFrom, BootedKernel, CloudInit, Desired, Generation, NicSpec, Quota, RestartPolicy, VmSpec,
};
