//! The port against a driver in memory: the handshake, bytes both ways, nobody listening, hostile rings, resets.

use std::time::{Duration, Instant};

use proptest::prelude::*;
use serio_hv::GuestMemory;
use serio_virtio::testing::{Buffer, DriverQueue, Rig, memory};
use vm_memory::{Bytes, GuestAddress};

use super::*;

const DATA: u64 = 0x10_0000;
/// Where the buffers of the control queue to the driver lie.
const CONTROL: u64 = 0x20_0000;
const LONG: Duration = Duration::from_secs(60);

struct Guest {
    ports: Ports,
    host: HostPort,
    rig: Rig,
    drivers: Vec<DriverQueue>,
    memory: GuestMemory,
}

fn soon() -> Instant {
    Instant::now() + LONG
}

fn rings(memory: &GuestMemory, event_idx: bool) -> (Vec<DriverQueue>, Rig, Activation) {
    let drivers: Vec<_> = (0..6u64).map(|q| DriverQueue::new(memory, 0x1000 + q * 0x4000, 16)).collect();
    let queues = drivers.iter().map(|driver| driver.queue(event_idx)).collect();
    let (rig, activation) = Rig::activation(memory, queues, 1 << F_MULTIPORT);
    (drivers, rig, activation)
}

impl Guest {
    fn new() -> Guest {
        let memory = memory(8 << 20);
        let (drivers, rig, activation) = rings(&memory, false);
        let host = HostPort::new().unwrap();
        let mut ports = Ports::new(GUEST_AGENT, host.clone());
        ports.activate(activation).unwrap();
        Guest { ports, host, rig, drivers, memory }
    }

    fn queue(&mut self, index: u16) -> &mut DriverQueue {
        &mut self.drivers[usize::from(index)]
    }

    fn kick(&self, index: u16) {
        self.rig.kicks[usize::from(index)].write(1).unwrap();
    }

    fn used(&mut self, index: u16) -> (u16, u32) {
        loop {
            if let Some(used) = self.queue(index).used() {
                return used;
            }
            self.rig.wait();
        }
    }

    fn tell(&mut self, id: u32, event: u16, value: u16) {
        let at = GuestAddress(DATA + 0x8000);
        let bytes = [&id.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat();
        self.memory.write_slice(&bytes, at).unwrap();
        self.queue(CONTROL_OUT).offer(&[Buffer::readable(at.0, 8)]).unwrap();
        self.kick(CONTROL_OUT);
        self.used(CONTROL_OUT);
    }

    fn told(&mut self) -> Vec<u8> {
        self.queue(CONTROL_IN).offer(&[Buffer::writable(CONTROL, 64)]).unwrap();
        self.kick(CONTROL_IN);
        let (_, len) = self.used(CONTROL_IN);
        let mut bytes = vec![0; usize::try_from(len).unwrap()];
        self.memory.read_slice(&mut bytes, GuestAddress(CONTROL)).unwrap();
        bytes
    }

    /// As Linux does it.
    fn open(&mut self) {
        self.tell(u32::MAX, 0, 1);
        assert_eq!(self.told(), [1, 0, 0, 0, 1, 0, 1, 0]);
        self.tell(1, 3, 1);
        let name = self.told();
        assert_eq!(name[..8], [1, 0, 0, 0, 7, 0, 1, 0]);
        assert_eq!(&name[8..], b"org.qemu.guest_agent.0\0");
        assert_eq!(self.told(), [1, 0, 0, 0, 6, 0, 1, 0]);
        self.tell(1, 6, 1);
        assert!(self.host.is_open());
    }

    fn send(&mut self, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(DATA)).unwrap();
        let len = u32::try_from(bytes.len()).unwrap();
        let (first, rest) = (len / 3, len - len / 3);
        self.queue(TX)
            .offer(&[Buffer::readable(DATA, first), Buffer::readable(DATA + u64::from(first), rest)])
            .unwrap();
        self.kick(TX);
    }

    fn receive(&mut self, len: u32) -> Vec<u8> {
        self.queue(RX).offer(&[Buffer::writable(DATA + 0x4_0000, len)]).unwrap();
        self.kick(RX);
        let (_, len) = self.used(RX);
        let mut bytes = vec![0; usize::try_from(len).unwrap()];
        self.memory.read_slice(&mut bytes, GuestAddress(DATA + 0x4_0000)).unwrap();
        bytes
    }
}

fn heard(session: &Session, len: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while bytes.len() < len {
        let left = len - bytes.len();
        session.receive(&mut bytes, left, soon()).unwrap();
    }
    bytes
}

#[test]
fn the_configuration_says_two_ports() {
    let ports = Ports::new(GUEST_AGENT, HostPort::new().unwrap());
    let mut config = [0xee; 16];
    ports.read_config(0, &mut config);
    assert_eq!(config, [0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    ports.read_config(u64::MAX, &mut config);
    assert_eq!(config, [0; 16]);
    assert_eq!((ports.device_id(), ports.features(), ports.queue_sizes().len()), (3, 2, 6));
}

#[test]
fn a_program_opens_the_port_and_bytes_go_both_ways() {
    let mut guest = Guest::new();
    assert!(matches!(guest.host.session(soon()), Err(PortError::NotOpen)));
    guest.open();
    guest.send(b"nobody listens");
    guest.used(TX);
    let session = guest.host.session(soon()).unwrap();
    assert!(matches!(guest.host.session(Instant::now()), Err(PortError::Busy)));
    session.send(b"hello, guest").unwrap();
    assert_eq!(guest.receive(5), b"hello");
    assert_eq!(guest.receive(100), b", guest");
    guest.send(b"hello, host");
    assert_eq!(heard(&session, 11), b"hello, host");
    guest.used(TX);

    // More than the buffer holds: the chain waits, and nothing is lost.
    let long: Vec<u8> = (0..200_000u32).map(|at| u8::try_from(at % 253).unwrap()).collect();
    guest.send(&long);
    assert!(heard(&session, long.len()) == long);
    guest.used(TX);

    // A chain that waits when the session ends is dropped, and the guest goes on.
    guest.send(&long);
    drop(session);
    guest.used(TX);
    let session = guest.host.session(soon()).unwrap();
    guest.send(b"new");
    assert_eq!(heard(&session, 3), b"new");
    assert!(!guest.rig.needs_reset());
}

#[test]
fn what_a_closed_port_was_to_get_is_gone() {
    let mut guest = Guest::new();
    guest.open();
    let session = guest.host.session(soon()).unwrap();
    session.send(b"for the first").unwrap();
    let seen = guest.host.times_opened();
    guest.tell(1, 6, 0);
    let mut bytes = Vec::new();
    assert_eq!(session.receive(&mut bytes, 10, soon()), Err(PortError::NotOpen));
    assert_eq!(session.send(b"x"), Err(PortError::NotOpen));
    assert_eq!(guest.host.wait_opened(seen, Instant::now()), Err(PortError::TimedOut));
    guest.tell(1, 6, 1);
    guest.host.wait_opened(seen, soon()).unwrap();
    // The session was with somebody else.
    assert_eq!(session.send(b"x"), Err(PortError::NotOpen));
    drop(session);
    guest.host.session(soon()).unwrap().send(b"for the second").unwrap();
    assert_eq!(guest.receive(100), b"for the second", "it outlives the session");
}

/// The handshake, the open port and a chain that is half-way survive.
#[test]
fn a_port_suspended_goes_on_as_another_one() {
    let mut guest = Guest::new();
    let next = |guest: &mut Guest| {
        let queues = guest.ports.suspend().unwrap();
        assert_eq!(queues.len(), 4);
        let mut ports = Ports::new(GUEST_AGENT, guest.host.clone());
        ports.restore(&guest.ports.save()).unwrap();
        // The old one's end must not close the port of the new one.
        let old = std::mem::replace(&mut guest.ports, ports);
        std::mem::forget(old);
        guest.ports.activate(guest.rig.again(queues, 1 << F_MULTIPORT)).unwrap();
    };
    guest.tell(u32::MAX, 0, 1);
    next(&mut guest);
    assert_eq!(guest.told(), [1, 0, 0, 0, 1, 0, 1, 0]);
    guest.tell(1, 3, 1);
    next(&mut guest);
    assert_eq!(guest.told()[4], 7);
    next(&mut guest);
    assert_eq!(guest.told()[4], 6);
    guest.tell(1, 6, 1);
    next(&mut guest);
    assert!(guest.host.is_open());
    let session = guest.host.session(soon()).unwrap();
    let long: Vec<u8> = (0..200_000u32).map(|at| u8::try_from(at % 253).unwrap()).collect();
    guest.send(&long);
    let mut got = Vec::new();
    while got.len() < long.len() {
        session.receive(&mut got, 10_000, soon()).unwrap();
        next(&mut guest);
    }
    assert!(got == long, "no byte lost, none twice");
    guest.used(TX);
    for (version, bytes) in [(1, vec![0; 8]), (2, vec![0; 9])] {
        assert!(guest.ports.restore(&DeviceState { version, bytes }).is_err());
    }
    assert!(!guest.rig.needs_reset());
}

#[test]
fn nobody_waits_for_ever() {
    let mut guest = Guest::new();
    guest.open();
    let session = guest.host.session(soon()).unwrap();
    let mut bytes = Vec::new();
    let brief = Instant::now() + Duration::from_millis(20);
    assert_eq!(session.receive(&mut bytes, 10, brief), Err(PortError::TimedOut));
    assert!(Instant::now() >= brief);
    // The guest reads nothing.
    let mut sent = 0;
    while session.send(&[0; 1000]).is_ok() {
        sent += 1000;
    }
    assert!(sent <= BUFFER_BYTES_MAX);
    assert_eq!(session.send(&[0; 1000]), Err(PortError::Full));
    let ended = std::thread::scope(|scope| {
        let waits = scope.spawn(|| session.receive(&mut bytes, 10, soon()));
        guest.host.end();
        waits.join().unwrap()
    });
    assert_eq!(ended, Err(PortError::Ended));
    drop(session);
    assert!(matches!(guest.host.session(soon()), Err(PortError::Ended)));
    assert_eq!(guest.host.wait_opened(99, soon()), Err(PortError::Ended));
}

#[test]
fn a_driver_that_repeats_itself_is_answered_once() {
    let mut guest = Guest::new();
    for _ in 0..1000 {
        guest.tell(u32::MAX, 0, 1);
        guest.tell(1, 3, 1);
        guest.tell(7, 3, 1);
        guest.tell(1, 99, 1);
    }
    let said: Vec<_> = (0..3).map(|_| guest.told()[4]).collect();
    assert_eq!(said, [1, 7, 6]);
    guest.queue(CONTROL_IN).offer(&[Buffer::writable(CONTROL, 4)]).unwrap();
    guest.kick(CONTROL_IN);
    guest.tell(u32::MAX, 0, 1);
    assert_eq!(guest.used(CONTROL_IN).1, 4, "a short buffer gets what fits");
    assert!(!guest.rig.needs_reset());
}

#[test]
fn a_reset_ends_the_talk_and_the_next_driver_begins_anew() {
    let mut guest = Guest::new();
    for round in 0..5 {
        guest.open();
        let session = guest.host.session(soon()).unwrap();
        session.send(b"lost").unwrap();
        guest.send(&[7; 100_000]);
        guest.ports.reset();
        assert!(!guest.host.is_open());
        let mut bytes = Vec::new();
        assert_eq!(session.receive(&mut bytes, 10, soon()), Err(PortError::NotOpen));
        let (drivers, rig, activation) = rings(&guest.memory, false);
        (guest.drivers, guest.rig) = (drivers, rig);
        guest.memory.write_slice(&[0; 0x1_8000], GuestAddress(0x1000)).unwrap();
        guest.ports.activate(activation).unwrap();
        assert_eq!(guest.host.times_opened(), round + 1);
    }
    guest.open();
    guest.host.session(soon()).unwrap().send(b"kept").unwrap();
    assert_eq!(guest.receive(100), b"kept");
}

#[test]
fn broken_rings_cost_the_device_only() {
    let outside = 1 << 40;
    for (queue, buffer) in [
        (CONTROL_OUT, None),
        (TX, None),
        (TX, Some(Buffer::readable(outside, 100))),
        (RX, Some(Buffer::writable(outside, 100))),
        (CONTROL_IN, Some(Buffer::writable(outside, 100))),
    ] {
        let mut guest = Guest::new();
        guest.open();
        let session = guest.host.session(soon()).unwrap();
        session.send(b"something").unwrap();
        match buffer {
            None => guest.queue(queue).offer_head(99),
            Some(buffer) => drop(guest.queue(queue).offer(&[buffer])),
        }
        guest.kick(queue);
        if queue == CONTROL_IN {
            let at = GuestAddress(DATA + 0x8000);
            guest.memory.write_slice(&[1, 0, 0, 0, 3, 0, 1, 0], at).unwrap();
            guest.queue(CONTROL_OUT).offer(&[Buffer::readable(at.0, 8)]).unwrap();
            guest.kick(CONTROL_OUT);
        }
        let mut bytes = Vec::new();
        // The device's end is the session's: it does not wait for its deadline.
        while session.receive(&mut bytes, 10, soon()).is_ok() {}
        guest.rig.wait();
        assert!(guest.rig.needs_reset(), "queue {queue}");
        guest.ports.reset();
    }
}

#[test]
fn a_driver_without_ports_finds_nothing() {
    let memory = memory(1 << 20);
    let (_rig, activation) = Rig::activation(&memory, Vec::new(), 0);
    let mut ports = Ports::new(GUEST_AGENT, HostPort::new().unwrap());
    ports.activate(activation).unwrap();
    let (_rig, activation) = Rig::activation(&memory, Vec::new(), 1 << F_MULTIPORT);
    assert!(matches!(ports.activate(activation), Err(ActivateError::QueueNotEnabled { index: 2 })));
}

#[derive(Clone, Debug)]
enum Step {
    Tell(Vec<u8>),
    Offer { queue: u16, address: u64, len: u32, writable: bool },
    Head { queue: u16, head: u16 },
    Send(usize),
    Receive,
    EndSession,
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    let message = prop_oneof![
        3 => (0u32..3, 0u16..9, 0u16..2).prop_map(|(id, event, value)| {
            [&id.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat()
        }),
        1 => prop::collection::vec(any::<u8>(), 0..20),
    ];
    let address = prop_oneof![20 => 0x10_0000u64..0x70_0000, 1 => any::<u64>()];
    let len = prop_oneof![4 => 0u32..5000, 1 => any::<u32>()];
    prop_oneof![
        6 => message.prop_map(Step::Tell),
        8 => (0u16..6, address, len, any::<bool>())
            .prop_map(|(queue, address, len, writable)| Step::Offer { queue, address, len, writable }),
        1 => (0u16..6, 0u16..40).prop_map(|(queue, head)| Step::Head { queue, head }),
        3 => (0usize..BUFFER_BYTES_MAX).prop_map(Step::Send),
        3 => Just(Step::Receive),
        1 => Just(Step::EndSession),
        1 => Just(Step::Reset),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever driver and host do: nothing panics, nothing blocks, memory stays bounded, a reset always ends.
    #[test]
    fn anything_goes(steps in prop::collection::vec(step(), 1..80)) {
        let mut guest = Guest::new();
        let mut session = None;
        let mut bytes = Vec::new();
        for step in steps {
            match step {
                Step::Tell(message) => {
                    let at = DATA + 0x8000;
                    guest.memory.write_slice(&message, GuestAddress(at)).unwrap();
                    let buffer = Buffer::readable(at, u32::try_from(message.len()).unwrap());
                    let _ = guest.queue(CONTROL_OUT).offer(&[buffer]);
                    guest.kick(CONTROL_OUT);
                }
                Step::Offer { queue, address, len, writable } => {
                    let _ = guest.queue(queue).offer(&[Buffer { address, len, writable }]);
                    guest.kick(queue);
                }
                Step::Head { queue, head } => {
                    guest.queue(queue).offer_head(head);
                    guest.kick(queue);
                }
                Step::Send(len) => {
                    session = session.or_else(|| guest.host.session(Instant::now()).ok());
                    if let Some(session) = &session {
                        let _ = session.send(&vec![b'x'; len]);
                    }
                }
                Step::Receive => {
                    session = session.or_else(|| guest.host.session(Instant::now()).ok());
                    if let Some(session) = &session {
                        bytes.clear();
                        let _ = session.receive(&mut bytes, 1000, Instant::now() + Duration::from_micros(100));
                        prop_assert!(bytes.len() <= 1000);
                    }
                }
                Step::EndSession => session = None,
                Step::Reset => {
                    guest.ports.reset();
                    guest.memory.write_slice(&[0; 0x1_8000], GuestAddress(0x1000)).unwrap();
                    let (drivers, rig, activation) = rings(&guest.memory, true);
                    (guest.drivers, guest.rig) = (drivers, rig);
                    guest.ports.activate(activation).unwrap();
                }
            }
        }
        guest.ports.reset();
        drop(session);
        // After all that the next driver is served.
        guest.memory.write_slice(&[0; 0x1_8000], GuestAddress(0x1000)).unwrap();
        let (drivers, rig, activation) = rings(&guest.memory, false);
        (guest.drivers, guest.rig) = (drivers, rig);
        guest.ports.activate(activation).unwrap();
        guest.open();
        let session = guest.host.session(soon()).unwrap();
        guest.send(b"all is well");
        prop_assert_eq!(heard(&session, 11), b"all is well");
    }
}
