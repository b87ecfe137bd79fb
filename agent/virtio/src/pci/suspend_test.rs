//! A function that stops and goes on, here and on another bus.

use super::*;
use crate::FunctionState;
use crate::state::{BusRestoreError, VirtioState};

/// The same machine once more, over the same memory.
fn another(memory: &GuestMemory) -> Bench {
    let mut bench = Bench::new();
    bench.memory = memory.clone();
    let function =
        VirtioPci::new(Box::new(Probe(bench.seen.clone())), bench.platform.clone(), memory.clone()).unwrap();
    bench.bus = PciBus::new(0xc000_0000..0xd000_0000);
    bench.bus.add(Box::new(function)).unwrap();
    bench
}

/// With MSI-X, vector 1 for queue 1.
fn with_msix(bench: &Bench) -> u64 {
    let control = bench.capability(CAP_MSIX, None) + 2;
    bench.set_config(control, &0x8000u16.to_le_bytes());
    for vector in 0..3u64 {
        let entry = 0x4000 + vector * 16;
        bench.write(entry, &0xfee0_0000u32.to_le_bytes());
        bench.write(entry + 8, &(0x40 + u32::try_from(vector).unwrap()).to_le_bytes());
        bench.write(entry + 12, &[0; 4]);
    }
    control
}

/// Answers all chains of queue `index` that the driver has offered; how many.
fn answer(bench: &Bench, index: usize) -> usize {
    let mut seen = bench.seen.lock().unwrap();
    let queue = &mut seen.active.as_mut().unwrap().queues[index];
    let mut chain = crate::Chain::default();
    let mut count = 0;
    while queue.queue.pop(&mut chain).unwrap() {
        queue.queue.push_used(chain.head(), 0).unwrap();
        count += 1;
    }
    count
}

#[test]
fn a_suspended_device_goes_on_with_its_queues_and_hears_its_doorbells() {
    let bench = Bench::new();
    let mut rings = bench.bring_up();
    rings[1].offer(&[Buffer::readable(0x3_0000, 4)]).unwrap();
    rings[1].offer(&[Buffer::readable(0x3_0000, 4)]).unwrap();
    assert_eq!(answer(&bench, 1), 2);
    bench.bus.suspend().unwrap();
    bench.bus.suspend().unwrap();
    assert!(bench.seen.lock().unwrap().active.is_none());
    rings[1].offer(&[Buffer::readable(0x3_0000, 4)]).unwrap();
    assert!(bench.platform.guest_write(HOME + 0x3004), "doorbells are watched all the time");
    bench.bus.resume();
    bench.bus.resume();
    for (index, kicks) in [(0, 1), (1, 2)] {
        let seen = bench.seen.lock().unwrap();
        let queue = &seen.active.as_ref().unwrap().queues[index];
        assert_eq!(queue.kick.read().unwrap(), kicks, "each is rung once, and what was rung is kept");
    }
    assert_eq!(answer(&bench, 1), 1);
    for _ in 0..3 {
        rings[1].used().unwrap();
    }
    assert!(rings[1].used().is_none());
    bench.bus.suspend().unwrap();
    bench.set_status(0);
    bench.bus.resume();
    assert!(bench.seen.lock().unwrap().active.is_none(), "a reset ends it");
}

/// The line of queue 1's interrupt.
fn lend(bench: &Bench) -> Option<crate::LentLine> {
    bench.seen.lock().unwrap().active.as_ref().unwrap().queues[1].interrupt.lend()
}

#[test]
fn a_lent_line_is_held_while_its_vector_is_masked() {
    let bench = Bench::new();
    bench.bring_up();
    assert!(lend(&bench).is_none(), "the driver polls");
    let control = with_msix(&bench);
    let mask = |on: u8| bench.write(0x4000 + 16 + 12, &[on, 0, 0, 0]);
    mask(1);
    assert!(lend(&bench).is_none(), "it is masked");
    mask(0);
    let line = lend(&bench).unwrap();
    mask(1);
    assert_eq!(bench.read::<1>(0x5000), [0]);
    line.event().write(1).unwrap();
    assert_eq!(bench.read::<1>(0x5000), [2], "it counts as pending");
    line.event().write(1).unwrap();
    assert!(bench.platform.take_delivered().is_empty());
    mask(0);
    assert_eq!(
        bench.platform.take_delivered().iter().map(|message| message.data).collect::<Vec<_>>(),
        [0x41]
    );
    // The whole function masked, and the line given back before it is not.
    bench.set_config(control, &0xc000u16.to_le_bytes());
    line.event().write(1).unwrap();
    drop(line);
    assert_eq!(bench.read::<1>(0x5000), [2]);
    bench.set_config(control, &0x8000u16.to_le_bytes());
    assert_eq!(bench.platform.take_delivered().len(), 1);
    assert_eq!(bench.read::<1>(0x5000), [0]);
    mask(1);
    bench.seen.lock().unwrap().active.as_ref().unwrap().queues[1].interrupt.trigger();
    assert_eq!(bench.read::<1>(0x5000), [2], "as before it was ever lent");
}

#[test]
fn a_device_that_has_lent_lines_starts_again_when_they_move() {
    let bench = Bench::new();
    bench.bring_up();
    let control = with_msix(&bench);
    let kicks = || {
        let seen = bench.seen.lock().unwrap();
        seen.active
            .as_ref()
            .unwrap()
            .queues
            .iter()
            .map(|queue| queue.kick.read().unwrap_or(0))
            .collect::<Vec<_>>()
    };
    let move_queue_1 = |vector: u16| {
        bench.write(22, &1u16.to_le_bytes());
        bench.write(26, &vector.to_le_bytes());
    };
    move_queue_1(0);
    assert_eq!(kicks(), [0, 0], "nobody has lent anything");
    let line = lend(&bench).unwrap();
    move_queue_1(0);
    assert_eq!(kicks(), [0, 0], "it was there before");
    move_queue_1(2);
    assert_eq!(kicks(), [1, 1], "suspended, and gone on");
    bench.set_config(control, &0u16.to_le_bytes());
    assert_eq!(kicks(), [1, 1], "interrupts are switched off");
    assert!(lend(&bench).is_none());
    drop(line);
    bench.set_config(control, &0x8000u16.to_le_bytes());
    assert_eq!(kicks(), [0, 0]);
}

#[test]
fn a_saved_function_lives_on_elsewhere() {
    let bench = Bench::new();
    bench.set_config(0x10, &0xc100_0000u32.to_le_bytes());
    bench.set_config(0x10, &u32::try_from(HOME).unwrap().to_le_bytes());
    let mut rings = bench.bring_up();
    let control = with_msix(&bench);
    rings[1].offer(&[Buffer::readable(0x3_0000, 4)]).unwrap();
    assert_eq!(answer(&bench, 1), 1);
    bench.write(0x4000 + 12, &[1, 0, 0, 0]);
    bench.seen.lock().unwrap().active.as_ref().unwrap().queues[0].interrupt.trigger();
    bench.seen.lock().unwrap().remembered = [4, 2];
    bench.bus.suspend().unwrap();
    let saved = bench.bus.save();

    let next = another(&bench.memory);
    next.bus.restore(&saved).unwrap();
    assert_eq!(next.bus.save(), saved, "nothing is lost");
    assert_eq!(next.seen.lock().unwrap().remembered, [4, 2]);
    assert_eq!(next.platform.watched.lock().unwrap().len(), 2, "doorbells are watched before it runs");
    assert!(next.platform.take_delivered().is_empty());
    rings[1].offer(&[Buffer::readable(0x3_0000, 4)]).unwrap();
    next.bus.resume();
    assert_eq!(next.status(), 0xf);
    assert_eq!(next.seen.lock().unwrap().active.as_ref().unwrap().features, F_VERSION_1 | F_EVENT_IDX);
    // One that was on its way when it was saved is in nobody's state, so each queue's is raised.
    let data: Vec<u32> = next.platform.take_delivered().iter().map(|message| message.data).collect();
    assert_eq!(data, [0x41]);
    assert_eq!(next.read::<8>(0x5000), 1u64.to_le_bytes(), "the masked one still waits");
    next.write(0x4000 + 12, &[0; 4]);
    assert_eq!(next.platform.take_delivered().len(), 1);
    assert_eq!(next.config(control - 2) >> 16, 0x8002);
    assert_eq!(answer(&next, 1), 1, "only what the first one had not taken");
    assert!(rings[1].used().is_some() && rings[1].used().is_some());
    next.bus.reset();
    assert_eq!(u64::from(next.config(0x10)), HOME);
}

#[test]
fn another_machine_refuses_the_state() {
    let bench = Bench::new();
    bench.bring_up();
    bench.bus.suspend().unwrap();
    let saved = bench.bus.save();
    let refused = |change: &dyn Fn(&mut VirtioState)| {
        let mut states = saved.clone();
        change(states[1].virtio.as_mut().unwrap());
        let error = another(&bench.memory).bus.restore(&states).unwrap_err();
        let BusRestoreError::Function { slot: 1, source } = error else { panic!("{error}") };
        source.to_string()
    };
    let differs = "give the VM the devices";
    assert!(refused(&|state| state.device_id = 1).contains(differs));
    assert!(refused(&|state| state.driver_features |= 1 << 5).contains(differs));
    assert!(refused(&|state| state.queues[0].max = 32).contains(differs));
    assert!(refused(&|state| state.queues.truncate(1)).contains(differs));
    let damaged = "its state is damaged";
    assert!(refused(&|state| state.queues[0].size = 5).contains(damaged));
    assert!(refused(&|state| state.queues[0].size = 64).contains(damaged));
    assert!(refused(&|state| state.queue_select = 1 << 16).contains(damaged));
    assert!(refused(&|state| state.queues[1].device = 1 << 40).contains(damaged));
    assert!(refused(&|state| state.device = Some(DeviceState::new(2, []))).contains("version 2"));
    assert!(matches!(
        another(&bench.memory).bus.restore(&saved[..1]),
        Err(BusRestoreError::Count { saved: 1, made: 2 })
    ));
    assert!(another(&bench.memory).bus.restore(&[saved[1].clone(), saved[0].clone()]).is_err());
}

fn changed() -> impl Strategy<Value = (usize, u8)> {
    (0usize..600, any::<u8>())
}

proptest! {
    /// Whatever the bytes say, the bus refuses them or runs with them; reading and writing it afterwards harms nobody.
    #[test]
    fn damaged_states(changes in prop::collection::vec(changed(), 1..6), cut in 0usize..700) {
        use prost::Message;
        let bench = Bench::new();
        bench.bring_up();
        with_msix(&bench);
        bench.bus.suspend().unwrap();
        let mut saved = bench.bus.save();
        let mut bytes = saved[1].encode_to_vec();
        for (at, value) in changes {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
        }
        bytes.truncate(cut.max(8));
        let Ok(state) = FunctionState::decode(bytes.as_slice()) else { return Ok(()) };
        saved[1] = state;
        let next = another(&bench.memory);
        if next.bus.restore(&saved).is_ok() {
            next.bus.resume();
            let active = next.seen.lock().unwrap().active.is_some();
            if active {
                let mut chain = crate::Chain::default();
                let mut seen = next.seen.lock().unwrap();
                for queue in &mut seen.active.as_mut().unwrap().queues {
                    let _ = queue.queue.pop(&mut chain);
                }
            }
            next.bus.mmio_write(HOME + 20, &[0]);
            next.bus.reset();
        }
    }
}
