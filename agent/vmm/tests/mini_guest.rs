//! The mini guest on the machine's own `/dev/kvm`, hardware or software: `serio-vmm run` from the outside.
//!
//! Each test runs the real binary with the mini guest (images/mini) as its kernel and looks at what the guest printed,
//! at the exit code and at the disks. A machine without a usable `/dev/kvm` skips.

#![forbid(unsafe_code)]

#[path = "mini_guest/devices.rs"]
mod devices;
#[path = "guest/echo.rs"]
mod echo;
#[path = "mini_guest/hostile.rs"]
mod hostile;
#[path = "mini_guest/life.rs"]
mod life;
#[path = "mini_guest/net.rs"]
mod net;
#[path = "mini_guest/run.rs"]
mod run;
#[path = "mini_guest/small.rs"]
mod small;
#[path = "mini_guest/vsock.rs"]
mod vsock;
