//! The client against guests that behave, lie, flood and stay silent.

use std::sync::mpsc::channel;

use super::fake::{FakeGuest, answer_well};
use super::lines::LINE_BYTES_MAX;
use super::*;

const FIRST: Freeze = Freeze(1);

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

fn brief() -> Instant {
    Instant::now() + Duration::from_millis(50)
}

fn silent(error: &AgentError) {
    panic!("told of {error}");
}

#[test]
fn a_good_guest_is_frozen_and_thawed() {
    let guest = FakeGuest::good();
    let agent = GuestAgent::new(guest.port.clone());
    for _ in 0..3 {
        let freeze = agent.next_freeze();
        assert_eq!(agent.freeze(freeze, soon()), Ok(2));
        assert_eq!(agent.confirm(soon()), Ok(()));
        agent.settle(freeze, silent);
        assert_eq!(agent.confirm(soon()), Err(AgentError::NotFrozen));
        assert_eq!(guest.asked(), [FREEZE, STATUS, STATUS, THAW, STATUS]);
        agent.settle(freeze, silent);
        assert!(guest.asked().is_empty(), "nothing is owed any more");
    }
}

#[test]
fn a_late_thaw_does_not_undo_the_next_freeze() {
    let guest = FakeGuest::good();
    let agent = GuestAgent::new(guest.port.clone());
    let (first, second) = (agent.next_freeze(), agent.next_freeze());
    agent.freeze(first, soon()).expect("frozen");
    agent.freeze(second, soon()).expect("thawed, and frozen again");
    // Whoever was to thaw the first comes only now; and one had waited for its turn since before the second.
    agent.settle(first, silent);
    assert_eq!(agent.thaw(first, soon()), Ok(()));
    assert_eq!(agent.confirm(soon()), Ok(()));
    agent.settle(second, silent);
    assert_eq!(agent.confirm(soon()), Err(AgentError::NotFrozen));
}

#[test]
fn without_an_agent_it_is_said_at_once() {
    let agent = GuestAgent::new(HostPort::new().expect("an eventfd"));
    assert_eq!(agent.freeze(FIRST, soon()), Err(AgentError::Port(PortError::NotOpen)));
    agent.settle(FIRST, silent);
}

#[test]
fn a_silent_agent_is_not_asked_to_freeze() {
    let guest = FakeGuest::new(|_| Vec::new());
    let agent = GuestAgent::new(guest.port.clone());
    assert_eq!(agent.freeze(FIRST, brief()), Err(AgentError::Port(PortError::TimedOut)));
    assert!(guest.asked().is_empty());
    agent.settle(FIRST, silent);
}

#[test]
fn a_freeze_without_an_answer_is_thawed_when_the_agent_wakes() {
    let mut frozen = false;
    let mut late = Vec::new();
    let guest = FakeGuest::new(move |request| {
        let answer = answer_well(request, &mut frozen);
        // Its answer to the freeze comes when the next question does.
        if request["execute"] == FREEZE {
            late = answer;
            return Vec::new();
        }
        [std::mem::take(&mut late), answer].concat()
    });
    let agent = GuestAgent::new(guest.port.clone());
    assert_eq!(agent.freeze(FIRST, brief()), Err(AgentError::Port(PortError::TimedOut)));
    agent.settle(FIRST, silent);
    assert_eq!(guest.asked(), [FREEZE, THAW]);
    assert_eq!(agent.confirm(soon()), Err(AgentError::NotFrozen));
}

#[test]
fn a_thaw_is_asked_again_of_the_agent_that_comes_back() {
    let (mut frozen, mut deaf) = (false, true);
    let guest = FakeGuest::new(move |request| {
        let answer = answer_well(request, &mut frozen);
        if request["execute"] == THAW && std::mem::take(&mut deaf) {
            return b"{\"error\": {\"desc\": \"not\\u0007now\"}}\n".to_vec();
        }
        answer
    });
    let agent = GuestAgent::new(guest.port.clone());
    agent.freeze(FIRST, soon()).expect("frozen");
    let (sender, told) = channel();
    std::thread::scope(|scope| {
        scope.spawn(|| agent.settle(FIRST, |error| sender.send(error.clone()).expect("heard")));
        let said = told.recv().expect("told").to_string();
        assert_eq!(said, "the guest agent refused guest-fsfreeze-thaw: not now");
        guest.port.device().set_open(false);
        guest.port.device().set_open(true);
    });
    assert_eq!(agent.confirm(soon()), Err(AgentError::NotFrozen));
}

#[test]
fn the_end_of_the_vm_ends_every_wait() {
    let guest = FakeGuest::new(|_| Vec::new());
    let agent = GuestAgent::new(guest.port.clone());
    agent.owed.store(FIRST.0, Ordering::Release);
    std::thread::scope(|scope| {
        scope.spawn(|| agent.settle(FIRST, |_| {}));
        scope.spawn(|| assert!(agent.freeze(FIRST, soon()).is_err()));
        guest.port.end();
    });
    assert_eq!(agent.freeze(FIRST, soon()), Err(AgentError::Port(PortError::Ended)));
}

/// Answers the sync as it should be, and everything else with these bytes.
fn liar(lie: &'static [u8]) -> FakeGuest {
    FakeGuest::new(move |request| match request["execute"].as_str() {
        Some("guest-sync-delimited") => answer_well(request, &mut false),
        _ => lie.to_vec(),
    })
}

#[test]
fn lies_are_refused() {
    let nonsense = AgentError::Nonsense(FREEZE);
    let refused = |said: &str| AgentError::Refused { command: FREEZE, said: said.to_owned() };
    let cases: [(&'static [u8], AgentError); 10] = [
        (b"{\"return\": 0}\n", AgentError::Nothing),
        (b"{\"return\": -1}\n", nonsense.clone()),
        (b"{\"return\": 1e99}\n", nonsense.clone()),
        (b"{\"return\": 99999999999}\n", nonsense.clone()),
        (b"{\"return\": {}}\n", nonsense.clone()),
        (b"[]\n", nonsense.clone()),
        (b"\xff\n", nonsense.clone()),
        (b"\n", nonsense.clone()),
        (b"{\"error\": 1}\n", refused("without a reason")),
        (b"{\"return\": 1}\n{\"return\": \"thawed\"}\n", AgentError::NotFrozen),
    ];
    for (lie, error) in cases {
        let guest = liar(lie);
        assert_eq!(GuestAgent::new(guest.port.clone()).freeze(FIRST, soon()), Err(error), "{lie:?}");
    }
    let deep = [vec![b'['; LINE_BYTES_MAX - 1], vec![b'\n']].concat();
    let guest = liar(deep.leak());
    assert_eq!(GuestAgent::new(guest.port.clone()).freeze(FIRST, soon()), Err(nonsense.clone()));
    let long = [vec![b' '; 3 * LINE_BYTES_MAX], vec![b'\n']].concat();
    let guest = liar(long.leak());
    assert_eq!(GuestAgent::new(guest.port.clone()).freeze(FIRST, soon()), Err(nonsense));
}

#[test]
fn a_flood_ends_the_exchange() {
    let guest = FakeGuest::new(|_| b"{\"return\": 1}\n".repeat(1 << 17));
    let agent = GuestAgent::new(guest.port.clone());
    assert_eq!(agent.freeze(FIRST, soon()), Err(AgentError::Flood));
    // And one that never ends a line.
    let guest = FakeGuest::new(|_| vec![b'x'; 2 << 20]);
    assert_eq!(GuestAgent::new(guest.port.clone()).freeze(FIRST, soon()), Err(AgentError::Flood));
}

#[test]
fn stale_answers_are_skipped() {
    let mut frozen = false;
    let guest = FakeGuest::new(move |request| {
        let answer = answer_well(request, &mut frozen);
        if request["execute"] == "guest-sync-delimited" {
            let stale = b"{\"return\": 3}\n\xff{\"return\": 7}\n\xff[\n\xff\xff";
            return [stale.to_vec(), answer].concat();
        }
        answer
    });
    let agent = GuestAgent::new(guest.port.clone());
    assert_eq!(agent.freeze(FIRST, soon()), Ok(2));
}

#[test]
fn lines_come_out_however_they_are_cut() {
    let text = [&b"one\n"[..], b"half\xfftwo\n", &[b'y'; LINE_BYTES_MAX + 1], b"\nthree\n"].concat();
    for step in [1, 2, 3, 1000, text.len()] {
        let (mut lines, mut said) = (Lines::default(), Vec::new());
        for mut part in text.chunks(step) {
            while !part.is_empty() {
                let (used, word) = lines.feed(part);
                said.extend(word);
                part = &part[used..];
            }
        }
        let line = |text: &str| Said::Line(text.as_bytes().to_vec());
        assert_eq!(said, [line("one"), Said::Delimiter, line("two"), Said::TooLong, line("three")]);
    }
}
