//! The VM against the host's own KVM, with a guest of a few bytes. Says so and passes nothing where there is none.

use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend as _, GuestMemoryRegion as _};

use crate::*;

const ENTRY: u64 = 0x1000;
const GDT_BASE: u64 = 0x500;

/// Records what the guest did; answers port 0x60 with 7.
#[derive(Default)]
struct Recorder {
    writes: Vec<(u64, Vec<u8>)>,
}

impl IoHandler for Recorder {
    fn port_read(&mut self, _port: u16, data: &mut [u8]) {
        data.fill(7);
    }
    fn port_write(&mut self, port: u16, data: &[u8]) {
        self.writes.push((u64::from(port), data.to_vec()));
    }
    fn memory_read(&mut self, _address: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn memory_write(&mut self, address: u64, data: &[u8]) {
        self.writes.push((address, data.to_vec()));
    }
}

/// A VM whose first vcpu starts at `code` in flat 32-bit mode; `None` where KVM cannot be used.
fn guest(code: &[u8]) -> Option<(Arc<Vm>, Vcpu)> {
    let kvm = match Kvm::open() {
        Ok(kvm) => kvm,
        Err(error) => {
            println!("skipped: {error}");
            return None;
        }
    };
    let memory = create_memory(1 << 20).expect("a megabyte");
    memory.write_slice(code, GuestAddress(ENTRY)).expect("fits");
    memory.write_slice(&GDT::bytes(BootMode::Protected), GuestAddress(GDT_BASE)).expect("fits");
    let vm = Vm::new(&kvm, &memory).expect("VM");
    let vcpu = vm.vcpu(&kvm, 0, 1).expect("vcpu");
    let boot = BootRegisters {
        mode: BootMode::Protected,
        entry: ENTRY,
        stack: 0x8000,
        rsi: 0,
        rbx: 0,
        gdt_base: GDT_BASE,
    };
    vcpu.set_boot_registers(&boot).expect("registers");
    vcpu.bind_to_this_thread();
    Some((vm, vcpu))
}

#[test]
fn ports_and_memory_reach_the_handler() {
    // in al, 0x60 ; out 0x80, al ; mov [0xd0000000], eax ; jmp $
    let code = [0xe4, 0x60, 0xe6, 0x80, 0xa3, 0, 0, 0, 0xd0, 0xeb, 0xfe];
    let Some((_vm, mut vcpu)) = guest(&code) else { return };
    let mut io = Recorder::default();
    while io.writes.len() < 2 {
        assert_eq!(vcpu.run(&mut io).expect("runs"), ExitReason::Handled);
    }
    assert_eq!(io.writes[0], (0x80, vec![7]));
    assert_eq!(io.writes[1], (0xd000_0000, vec![7, 0, 0, 0]));
}

#[test]
fn a_string_instruction_comes_in_items() {
    // mov esi, 0x1000 ; mov ecx, 3 ; mov dx, 0x80 ; cld ; rep outsb ; jmp $
    let code = [0xbe, 0, 0x10, 0, 0, 0xb9, 3, 0, 0, 0, 0x66, 0xba, 0x80, 0, 0xfc, 0xf3, 0x6e, 0xeb, 0xfe];
    let Some((_vm, mut vcpu)) = guest(&code) else { return };
    let mut io = Recorder::default();
    while io.writes.len() < 3 {
        vcpu.run(&mut io).expect("runs");
    }
    assert_eq!(io.writes, [(0x80, vec![0xbe]), (0x80, vec![0]), (0x80, vec![0x10])]);
}

#[test]
fn a_kick_ends_an_endless_guest() {
    let Some((_vm, mut vcpu)) = guest(&[0xeb, 0xfe]) else { return };
    let kick = vcpu.kick();
    let (sender, receiver) = mpsc::channel();
    let runner = std::thread::spawn(move || {
        vcpu.bind_to_this_thread();
        let reason = vcpu.run(&mut Recorder::default()).expect("runs");
        sender.send(reason).expect("the test waits");
    });
    // Whether the kick comes before, between or during KVM_RUN: it counts.
    kick.kick();
    let reason = receiver.recv_timeout(Duration::from_secs(30)).expect("kicked in time");
    assert_eq!(reason, ExitReason::Kicked);
    runner.join().expect("no panic");
}

#[test]
fn a_guest_without_a_fault_handler_ends_in_a_triple_fault() {
    // ud2 with an empty interrupt table
    let Some((_vm, mut vcpu)) = guest(&[0x0f, 0x0b]) else { return };
    match vcpu.run(&mut Recorder::default()) {
        Ok(reason) => assert_eq!(reason, ExitReason::TripleFault),
        // A KVM that emulates privileged guest code gives up earlier, with an error of its own.
        Err(error) => assert!(matches!(error, RunError::Internal { .. }), "{error}"),
    }
}

#[test]
fn a_doorbell_rings_without_an_exit() {
    // mov word [0xd0000000], 1 ; out 0x80, al ; jmp $
    let code = [0x66, 0xc7, 0x05, 0, 0, 0, 0xd0, 1, 0, 0xe6, 0x80, 0xeb, 0xfe];
    let Some((vm, mut vcpu)) = guest(&code) else { return };
    let event = EventFd::new(0).expect("eventfd");
    vm.ioeventfd(IoAddr::Mmio(0xd000_0000), 2, None, &event).expect("doorbell");
    let mut io = Recorder::default();
    while io.writes.is_empty() {
        vcpu.run(&mut io).expect("runs");
    }
    assert_eq!(io.writes, [(0x80, vec![0])], "the doorbell's write is not seen here");
    assert_eq!(event.read().expect("rang"), 1);
    vm.remove_ioeventfd(IoAddr::Mmio(0xd000_0000), 2, None, &event).expect("removed");
    assert!(vm.remove_ioeventfd(IoAddr::Mmio(0xd000_0000), 2, None, &event).is_err());
    assert!(matches!(vm.ioeventfd(IoAddr::Pio(1), 3, None, &event), Err(VmError::Width(3))));
}

#[test]
fn lines_can_be_routed_triggered_and_masked() {
    let Some((vm, _vcpu)) = guest(&[0xf4]) else { return };
    let line = vm.msi_line().expect("line");
    line.route(MsiMessage { address: 0xfee0_0000, data: 0x30 }).expect("routed");
    line.trigger().expect("rings");
    line.route(MsiMessage { address: 0xfee0_0000, data: 0x31 }).expect("routed again");
    drop(line);
    vm.irq_line(4).expect("pin").trigger().expect("rings");
}

/// Whether the interrupt with this vector waits in the processor's local APIC: its bit of IRR (Intel SDM 3A, 11.8.4).
fn requested(vcpu: &Vcpu, vector: usize) -> bool {
    let lapic = vcpu.save().expect("saved").lapic;
    lapic[0x200 + vector / 32 * 16 + vector % 32 / 8] >> (vector % 8) & 1 == 1
}

#[test]
fn what_is_signalled_on_a_held_line_is_delivered_later() {
    // mov dword [0xfee000f0], 0x1ff (the local APIC is enabled) ; out 0x80, al ; jmp $
    let code = [0xc7, 0x05, 0xf0, 0, 0xe0, 0xfe, 0xff, 1, 0, 0, 0xe6, 0x80, 0xeb, 0xfe];
    let Some((vm, mut vcpu)) = guest(&code) else { return };
    let mut io = Recorder::default();
    while io.writes.is_empty() {
        vcpu.run(&mut io).expect("runs");
    }
    let line = vm.msi_line().expect("line");
    line.route(MsiMessage { address: 0xfee0_0000, data: 0x30 }).expect("routed");
    line.event_fd().write(1).expect("signalled");
    let arrived = |vector| {
        let until = Instant::now() + Duration::from_secs(10);
        while !requested(&vcpu, vector) && Instant::now() < until {
            std::thread::yield_now();
        }
        requested(&vcpu, vector)
    };
    assert!(arrived(0x30), "a line that is routed delivers");
    line.hold().expect("held");
    line.hold().expect("held already");
    line.event_fd().write(1).expect("signalled");
    line.route(MsiMessage { address: 0xfee0_0000, data: 0x51 }).expect("routed again");
    assert!(arrived(0x51), "what was signalled meanwhile is delivered then");
    line.hold().expect("held");
    line.event_fd().write(3).expect("signalled");
    assert_eq!(line.event_fd().read().expect("it waits"), 3);
    line.route(MsiMessage { address: 0xfee0_0000, data: 0x52 }).expect("routed again");
    assert!(!requested(&vcpu, 0x52), "somebody else has taken it");
}

/// Counts in a register and says each number at port 0x80, so that a number lost or said twice is seen.
#[test]
fn a_saved_vcpu_goes_on_in_another_vm_over_private_memory() {
    // mov ebx, 1 ; l: mov eax, ebx ; out 0x80, eax ; inc dword [0x3000] ; inc ebx ; jmp l
    let code = [0xbb, 1, 0, 0, 0, 0x89, 0xd8, 0xe7, 0x80, 0xff, 0x05, 0, 0x30, 0, 0, 0x43, 0xeb, 0xf3];
    let Some((vm, mut vcpu)) = guest(&code) else { return };
    let mut io = Recorder::default();
    while io.writes.len() < 7 {
        assert_eq!(vcpu.run(&mut io).expect("runs"), ExitReason::Handled);
    }
    assert_eq!(vcpu.complete(&mut io).expect("completes"), ExitReason::Kicked);
    assert_eq!(io.writes.len(), 7, "nothing of the guest was executed");
    let (machine, state) = (vm.save().expect("saved"), vcpu.save().expect("saved"));
    let bytes = vm.memory().iter().next().map(|region| region.len()).expect("one region");
    let file = tempfile(vm.memory(), bytes);

    let kvm = Kvm::open().expect("as before");
    for _ in 0..2 {
        let memory = open_private_memory(file.try_clone().expect("cloned").into(), bytes).expect("mapped");
        let vm = Vm::new(&kvm, &memory).expect("VM");
        vm.restore(&machine, Duration::ZERO).expect("restored");
        let mut vcpu = vm.vcpu(&kvm, 0, 1).expect("vcpu");
        vcpu.restore(&state, Duration::ZERO).expect("restored");
        vcpu.bind_to_this_thread();
        let again = vcpu.save().expect("saved");
        assert_eq!((&again.regs, &again.sregs, &again.lapic), (&state.regs, &state.sregs, &state.lapic));
        let mut io = Recorder::default();
        while io.writes.len() < 3 {
            assert_eq!(vcpu.run(&mut io).expect("runs"), ExitReason::Handled);
        }
        let said: Vec<_> = io.writes.iter().map(|(_, data)| data[0]).collect();
        assert_eq!(said, [8, 9, 10], "and in the second time the first has changed nothing");
        let count: u32 = memory.read_obj(GuestAddress(0x3000)).expect("RAM");
        assert_eq!(count, 9);
    }
    let mut short = state.clone();
    short.regs.pop();
    let vm = Vm::new(&kvm, &create_memory(1 << 20).expect("memory")).expect("VM");
    let error = vm.vcpu(&kvm, 0, 1).expect("vcpu").restore(&short, Duration::ZERO).expect_err("refused");
    assert!(error.to_string().contains("registers has 143 bytes"), "{error}");
    // Leaf 7 (`kvm_cpuid_entry2`: function, index, flags, eax, ebx, …) with more than any processor has.
    let mut rich = state.clone();
    let leaf = rich.cpuid.chunks_mut(40).find(|leaf| leaf[..4] == 7u32.to_le_bytes() && leaf[4] == 0);
    leaf.expect("any processor for 64 bits has it")[16..20].fill(0xff);
    let error = vm.vcpu(&kvm, 1, 2).expect("vcpu").restore(&rich, Duration::ZERO).expect_err("refused");
    assert!(error.to_string().contains("of CPUID leaf 0x7.0"), "{error}");
}

/// The seconds for which it was away are no gap in its clocks, the paravirtual one and the processor's.
#[test]
fn the_clocks_of_a_restored_vm_are_not_behind() {
    const AWAY: Duration = Duration::from_secs(3600);
    // l: rdtsc ; out 0x80, eax ; mov eax, edx ; out 0x80, eax ; jmp l
    let code = [0x0f, 0x31, 0xe7, 0x80, 0x89, 0xd0, 0xe7, 0x80, 0xeb, 0xf6];
    let Some((vm, mut vcpu)) = guest(&code) else { return };
    let counter = |vcpu: &mut Vcpu| {
        let mut io = Recorder::default();
        while io.writes.len() < 2 {
            assert_eq!(vcpu.run(&mut io).expect("runs"), ExitReason::Handled);
        }
        assert_eq!(vcpu.complete(&mut io).expect("completes"), ExitReason::Kicked);
        let half = |at: usize| u32::from_le_bytes(io.writes[at].1[..4].try_into().expect("four bytes"));
        u64::from(half(1)) << 32 | u64::from(half(0))
    };
    let before = counter(&mut vcpu);
    let (mut machine, state) = (vm.save().expect("saved"), vcpu.save().expect("saved"));
    let (at, clock) = (machine.saved_at_ns.expect("dated"), machine.clock_ns.expect("read"));
    assert!(machine.passed() < Duration::from_secs(60), "{:?}", machine.passed());
    machine.saved_at_ns = Some(at + 3_600_000_000_000);
    assert_eq!(machine.passed(), Duration::ZERO, "a host whose clock is behind takes nothing away");
    machine.saved_at_ns = Some(at - 3_600_000_000_000);
    let since = Instant::now();

    let kvm = Kvm::open().expect("as before");
    let memory = create_memory(1 << 20).expect("a megabyte");
    memory.write_slice(&code, GuestAddress(ENTRY)).expect("fits");
    memory.write_slice(&GDT::bytes(BootMode::Protected), GuestAddress(GDT_BASE)).expect("fits");
    let vm = Vm::new(&kvm, &memory).expect("VM");
    let mut vcpu = vm.vcpu(&kvm, 0, 1).expect("vcpu");
    let passed = machine.passed();
    vcpu.restore(&state, passed).expect("restored");
    vm.restore(&machine, passed).expect("restored");
    vcpu.bind_to_this_thread();
    let after = counter(&mut vcpu);
    let later = Duration::from_nanos(vm.save().expect("saved").clock_ns.expect("read") - clock);
    let ticked = Duration::from_millis((after - before) / u64::from(state.tsc_khz.max(1)));
    // What the test itself took is in it, nothing else.
    let most = AWAY + since.elapsed() + Duration::from_secs(2);
    println!("away for {AWAY:?}: the paravirtual clock went on by {later:?}, the counter by {ticked:?}");
    assert!((AWAY..most).contains(&later), "{later:?}");
    // A KVM without hardware virtualization gives the guest the host's own counter, which nobody can set.
    if ticked < most - AWAY {
        println!("the counter is the host's own here: only the paravirtual clock was looked at");
    } else {
        assert!((AWAY - Duration::from_millis(2)..most).contains(&ticked), "{ticked:?}");
    }
}

fn tempfile(memory: &GuestMemory, bytes: u64) -> std::fs::File {
    let mut content = vec![0; usize::try_from(bytes).expect("small")];
    memory.read_slice(&mut content, GuestAddress(0)).expect("RAM");
    let copy = create_memory(bytes).expect("memory");
    copy.write_slice(&content, GuestAddress(0)).expect("RAM");
    let region = copy.iter().next().expect("one region");
    region.file_offset().expect("a memfd").file().try_clone().expect("cloned")
}

/// What the guest writes and what we write are in one log; nothing before it was started, nothing twice.
#[test]
fn changed_pages_are_told() {
    // mov [0x9000], eax ; out 0x80, al ; mov [0xfe000], eax ; mov [0x9000], eax ; out 0x80, al ; jmp $
    let code = [
        0xa3, 0, 0x90, 0, 0, 0xe6, 0x80, 0xa3, 0, 0xe0, 0x0f, 0, 0xa3, 0, 0x90, 0, 0, 0xe6, 0x80, 0xeb, 0xfe,
    ];
    let Some((vm, mut vcpu)) = guest(&code) else { return };
    let mut io = Recorder::default();
    let mut run_to = |count: usize| {
        while io.writes.len() < count {
            assert_eq!(vcpu.run(&mut io).expect("runs"), ExitReason::Handled);
        }
    };
    let changes = || {
        let words = vm.changes().expect("told");
        assert_eq!(words.len(), 4, "256 pages");
        (0..256u64).filter(|page| words[*page as usize / 64] >> (page % 64) & 1 == 1).collect::<Vec<_>>()
    };
    run_to(1);
    vm.start_log().expect("logs");
    assert!(changes().is_empty());
    vm.memory().write_obj(1u8, GuestAddress(0x2_0000)).expect("RAM");
    run_to(2);
    assert_eq!(changes(), [0x9, 0x20, 0xfe]);
    assert!(changes().is_empty());
    vm.start_log().expect("again");
    assert!(changes().is_empty());
}
