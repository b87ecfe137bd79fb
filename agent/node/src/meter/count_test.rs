//! A host of which everything is known, metered through restarts, resets, reboots and clocks that jump.

use proptest::prelude::*;
use serio_store::meter::Amounts;
use uuid::Uuid;

use super::count::*;

#[derive(Debug, Clone)]
enum Step {
    /// Time passes, and running VMs use some.
    Run {
        ms: u64,
        cpu_us: u64,
    },
    /// The meter looks.
    Look,
    /// seriod dies and starts: what was kept is all that it has.
    Restart,
    /// A VM's process ends, or starts.
    Toggle(usize),
    /// A counter starts at 0 without a new process.
    Reset(usize),
    /// A VM's process cannot be read at the next look.
    Hide(usize),
    Reboot,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1_u64..100_000, 0_u64..1_000_000).prop_map(|(ms, cpu_us)| Step::Run { ms, cpu_us }),
        4 => Just(Step::Look),
        1 => Just(Step::Restart),
        2 => (0_usize..2).prop_map(Step::Toggle),
        1 => (0_usize..2).prop_map(Step::Reset),
        1 => (0_usize..2).prop_map(Step::Hide),
        1 => Just(Step::Reboot),
    ]
}

#[derive(Debug, Default, Clone)]
struct Vm {
    process: Option<(u64, u64)>,
    raw: u64,
    hidden: bool,
    /// It was reset since: as much may be lost as was used.
    is_reset: bool,
    /// Used since it was last looked at; lost if it ends or is reset now.
    unseen_cpu: u64,
    unseen_ms: u64,
}

#[derive(Debug)]
struct World {
    vms: [Vm; 2],
    uids: [Uuid; 2],
    vdc: Uuid,
    boot: u64,
    boot_ms: u64,
    next: u64,
    carry: Carry,
    cpu: (u64, u64),
    vcpu_ms: (u64, u64),
    lost_cpu: u64,
    lost_ms: u64,
}

impl World {
    fn look(&mut self) {
        let vms = self.vms.iter_mut().zip(self.uids).map(|(vm, uid)| {
            let hidden = std::mem::take(&mut vm.hidden);
            let process = vm.process.filter(|_| !hidden).map(|(number, start_ms)| {
                if std::mem::take(&mut vm.is_reset) {
                    self.lost_cpu += vm.unseen_cpu;
                }
                (vm.unseen_cpu, vm.unseen_ms) = (0, 0);
                ProcessLook {
                    key: number.to_string(),
                    start_ms,
                    raw: Raw { cpu_us: vm.raw, ..Raw::default() },
                }
            });
            VmLook { uid, vcpus: 1, memory_bytes: 1 << 30, process }
        });
        let vdc =
            VdcLook { uid: self.vdc, name: "a".parse().unwrap(), storage_bytes: 1 << 30, vms: vms.collect() };
        let look = Look { boot_id: self.boot.to_string(), boot_ms: self.boot_ms, vdcs: vec![vdc] };
        let counted = count(&mut self.carry, &look);
        self.cpu.1 += counted.vdcs[0].2.cpu_us;
        self.vcpu_ms.1 += counted.vdcs[0].2.vcpu_ms;
    }

    fn end(&mut self, index: usize) {
        let vm = &mut self.vms[index];
        self.lost_cpu += std::mem::take(&mut vm.unseen_cpu);
        self.lost_ms += std::mem::take(&mut vm.unseen_ms);
        vm.process = None;
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Run { ms, cpu_us } => {
                self.boot_ms += ms;
                for vm in self.vms.iter_mut().filter(|vm| vm.process.is_some()) {
                    vm.raw += cpu_us;
                    vm.unseen_cpu += cpu_us;
                    vm.unseen_ms += ms;
                    self.cpu.0 += cpu_us;
                    self.vcpu_ms.0 += ms;
                }
            }
            Step::Look => self.look(),
            Step::Restart => {
                let kept = serde_json::to_string(&self.carry).unwrap();
                self.carry = serde_json::from_str(&kept).unwrap();
            }
            Step::Toggle(index) if self.vms[index].process.is_some() => self.end(index),
            Step::Toggle(index) => {
                self.next += 1;
                self.vms[index] = Vm { process: Some((self.next, self.boot_ms)), ..Vm::default() };
            }
            Step::Reset(index) => {
                self.vms[index].is_reset = true;
                self.vms[index].raw = 0;
            }
            Step::Hide(index) => self.vms[index].hidden = true,
            Step::Reboot => {
                (0..2).for_each(|index| self.end(index));
                self.boot += 1;
                self.boot_ms = 0;
            }
        }
    }
}

proptest! {
    #[test]
    fn at_most_one_interval_is_lost_and_nothing_is_counted_twice(
        steps in proptest::collection::vec(step(), 1..80),
    ) {
        let mut world = World {
            vms: [Vm::default(), Vm::default()],
            uids: [Uuid::new_v4(), Uuid::new_v4()],
            vdc: Uuid::new_v4(),
            boot: 1,
            boot_ms: 5,
            next: 0,
            carry: Carry::default(),
            cpu: (0, 0),
            vcpu_ms: (0, 0),
            lost_cpu: 0,
            lost_ms: 0,
        };
        world.look();
        for step in &steps {
            let before = (world.cpu.1, world.vcpu_ms.1);
            world.step(step);
            prop_assert!(world.cpu.1 >= before.0 && world.vcpu_ms.1 >= before.1);
            prop_assert!(world.cpu.1 <= world.cpu.0, "counted twice: {:?}", world);
            prop_assert!(world.vcpu_ms.1 <= world.vcpu_ms.0, "time counted twice: {:?}", world);
        }
        world.vms.iter_mut().for_each(|vm| vm.hidden = false);
        world.look();
        let (cpu, vcpu) = (world.cpu.0 - world.cpu.1, world.vcpu_ms.0 - world.vcpu_ms.1);
        prop_assert!(cpu <= world.lost_cpu, "lost {} of at most {}", cpu, world.lost_cpu);
        prop_assert!(vcpu <= world.lost_ms, "lost {} of at most {}", vcpu, world.lost_ms);
    }
}

#[test]
fn amounts() {
    let mut carry = Carry::default();
    let (vdc, vm) = (Uuid::new_v4(), Uuid::new_v4());
    let look = |boot_ms, cpu_us| {
        let raw = Raw { cpu_us, ..Raw::default() };
        let process = Some(ProcessLook { key: "7:1".into(), start_ms: 10, raw });
        let vms = vec![VmLook { uid: vm, vcpus: 2, memory_bytes: 512 << 20, process }];
        let vdc = VdcLook { uid: vdc, name: "a".parse().unwrap(), storage_bytes: 3 << 20, vms };
        Look { boot_id: "b".into(), boot_ms, vdcs: vec![vdc] }
    };
    assert_eq!(count(&mut carry, &look(1000, 9)).vdcs[0].2, Amounts::default(), "before the meter was there");
    // Many short times are as much as a long one.
    let mut sum = Amounts::default();
    for ms in 1..=60_000_u64 / 7 {
        sum = sum.plus(count(&mut carry, &look(1000 + ms * 7, 9 + ms)).vdcs[0].2);
    }
    assert_eq!((sum.metered_ms, sum.vcpu_ms, sum.cpu_us), (59_997, 119_994, 8571));
    assert_eq!((sum.memory_mib_s, sum.storage_mib_s), (512 * 59_997 / 1000, 179));
}
