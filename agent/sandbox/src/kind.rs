//! The kinds of threads that sealed processes have: each has its own table of allowed system calls.

/// What a thread is for. One table of system calls belongs to each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Kind {
    /// The main thread of a VMM: waits, spreads the console, boots again after a reset.
    Agent,
    /// The main thread of a VMM that a person has started: its terminal instead of a control socket.
    Run,
    /// One control connection of a VMM.
    Control,
    /// One processor of the guest.
    Vcpu,
    /// A queue of a disk.
    Blk,
    /// A network card.
    Net,
    /// A console or a named port.
    Ports,
    /// Any other device: entropy, balloon, and the like.
    Device,
    /// Commits the map of a volume.
    Keeper,
    /// A snapshot of several volumes at one instant.
    Cut,
    /// Merges layers of a volume of a running VM.
    Merge,
    /// Checks the memory of a restored VM beside it.
    Check,
    /// The main thread of `serio-volumed`, and what waits for a job's client to hang up.
    Jobs,
    /// One control connection of `serio-volumed`: the jobs themselves.
    Job,
    /// The NBD server and its clients.
    Nbd,
    /// Makes the threads of its process, and does nothing else.
    Maker,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 16] = [
        Kind::Agent,
        Kind::Run,
        Kind::Control,
        Kind::Vcpu,
        Kind::Blk,
        Kind::Net,
        Kind::Ports,
        Kind::Device,
        Kind::Keeper,
        Kind::Cut,
        Kind::Merge,
        Kind::Check,
        Kind::Jobs,
        Kind::Job,
        Kind::Nbd,
        Kind::Maker,
    ];
}
