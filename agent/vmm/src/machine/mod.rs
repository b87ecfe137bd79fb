//! One boot of one machine: made in stages, each of which can only follow the one before it.
//!
//! ```text
//!   Machine::create ──► Created ──equip──► Equipped ──load──► Loaded ──start──► Running ──join──► End
//!                       KVM VM, RAM        devices on         kernel, ACPI      vcpu threads
//!                                          the PCI bus        in RAM
//! ```
//!
//! A stage that fails or is dropped takes down what it holds: devices stop before guest memory goes away, because each
//! of them holds it. A reset is a new machine from the same [`MachineConfig`]; volumes and taps stay open meanwhile.
//! [`restore`] makes a machine that goes on where another one was saved; it is paused at first.

mod bus;
pub mod generation;
pub mod hotplug;
mod power;
mod state;
mod track;
mod vcpu;
pub(crate) mod watchdog;

use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex, Weak};
use std::thread::JoinHandle;

use serio_control::message::{FailedDevice, VcpuCounters};
use serio_hv::vm_memory::{Bytes, GuestAddress, GuestMemoryBackend as _, GuestMemoryRegion as _};
use serio_hv::{GuestMemory, IrqLine, Kvm, MemoryError, PageKind, Vcpu, Vm, VmError};
use serio_virtio::{BusError, PciBus, VirtioPci, VirtioPciError};

use crate::acpi::Tables;
use crate::boot::{self, BootError, BootSource};
use crate::console::Output;
use crate::devices::Devices;
use crate::end::{End, EndSlot};
use crate::layout;
use bus::Bus;
use hotplug::Hotplug;
use serio_devices::rtc::Rtc;
use serio_devices::serial::SerialPort;
use state::Parts;
pub use state::{MachineState, PauseError, PlatformState, SaveError, Saved, restore};
use track::Track;
use vcpu::{Gate, GateState, Vcpus};
use watchdog::Watchdog;
pub use watchdog::{WatchdogAction, WatchdogState};

/// Least memory that the layout fits in, with room for a small kernel.
const MEMORY_BYTES_MIN: u64 = 2 << 20;

/// Why a machine could not be made or started.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// A number of vcpus that cannot be.
    #[error("{asked} vcpus are refused: give 1 to {max}")]
    Vcpus {
        /// What was asked for.
        asked: u32,
        /// What this host can do.
        max: u32,
    },
    /// Less than any guest can use.
    #[error("memory of {0} bytes is refused: give at least {MEMORY_BYTES_MIN} bytes (2MiB)")]
    Memory(u64),
    /// Guest memory could not be made.
    #[error("cannot make guest memory")]
    Backing(#[from] MemoryError),
    /// KVM refused.
    #[error("cannot make the VM")]
    Vm(#[from] VmError),
    /// A device does not fit.
    #[error("cannot add a device")]
    Bus(#[from] BusError),
    /// A device has impossible queues.
    #[error("cannot add a device")]
    Device(#[from] VirtioPciError),
    /// The kernel or what goes with it is not right.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The saved state does not fit the machine.
    #[error("cannot restore the devices")]
    Restore(#[from] serio_virtio::BusRestoreError),
    /// The saved state does not fit the machine.
    #[error("{what}")]
    Saved {
        /// What is wrong with it, and what to do.
        what: String,
    },
    /// The generation identifier could not be set.
    #[error("cannot give the VM a generation identifier")]
    Generation(#[from] generation::GenerationError),
    /// A thread or an eventfd could not be made.
    #[error("cannot {what}: raise the limits of threads and open files")]
    Host {
        /// What was tried.
        what: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl MachineError {
    /// The field of the VM's configuration that is to blame, or none.
    pub fn field(&self) -> &'static str {
        match self {
            MachineError::Vcpus { .. } => "vcpus",
            MachineError::Memory(_) | MachineError::Backing(_) => "memory",
            MachineError::Boot(error) => error.field(),
            MachineError::Bus(_) | MachineError::Device(_) => "disks",
            MachineError::Restore(_) | MachineError::Saved { .. } => "restore",
            MachineError::Vm(_) | MachineError::Generation(_) | MachineError::Host { .. } => "",
        }
    }

    fn host(what: &'static str) -> impl FnOnce(std::io::Error) -> MachineError {
        move |source| MachineError::Host { what, source }
    }
}

/// What stays the same over resets.
#[derive(Debug)]
pub struct MachineConfig {
    /// How many vcpus.
    pub vcpus: u32,
    /// RAM, a multiple of 4096.
    pub memory_bytes: u64,
    /// What to boot.
    pub boot: BootSource,
    /// What happens to a guest that does not pet its watchdog.
    pub watchdog: WatchdogAction,
    /// The host's pages behind the RAM.
    pub pages: PageKind,
}

/// A VM with memory, and nothing in either.
pub struct Created {
    vm: Arc<Vm>,
    memory: GuestMemory,
    serial: Arc<SerialPort>,
    button: IrqLine,
    generation: IrqLine,
    hotplug: IrqLine,
    watchdog: WatchdogAction,
    track: Track,
}

/// A VM with its devices.
pub struct Equipped {
    created: Created,
    pci: PciBus,
    devices: Arc<Devices>,
}

/// A VM that could run now.
pub struct Loaded {
    created: Created,
    pci: PciBus,
    devices: Arc<Devices>,
    vcpus: Vec<Vcpu>,
}

/// A VM whose vcpus run. Ends when dropped.
pub struct Running {
    handle: Handle,
    /// Keeps the devices: they end with this.
    _parts: Arc<Parts>,
    threads: Vec<JoinHandle<()>>,
}

/// What can be done to a running VM, from any thread. Does nothing any more once the VM is over.
#[derive(Clone)]
pub struct Handle {
    vcpus: Vcpus,
    end: Arc<EndSlot>,
    serial: Arc<SerialPort>,
    button: Arc<IrqLine>,
    parts: Weak<Parts>,
    generation: Arc<IrqLine>,
    memory_bytes: u64,
}

/// Makes a machine and lets it run: all stages in one.
pub fn boot(
    kvm: &Kvm,
    config: &MachineConfig,
    devices: &Arc<Devices>,
    output: Arc<Output>,
    end: Arc<EndSlot>,
) -> Result<Running, MachineError> {
    Created::new(kvm, config, output)?.equip(devices, &[])?.load(kvm, config)?.start(end)
}

impl Created {
    /// Makes the VM: memory, its slots, the interrupt chip, in the order that KVM likes best.
    pub fn new(kvm: &Kvm, config: &MachineConfig, output: Arc<Output>) -> Result<Created, MachineError> {
        let max = kvm.vcpus_max();
        if config.vcpus == 0 || config.vcpus > max {
            return Err(MachineError::Vcpus { asked: config.vcpus, max });
        }
        if config.memory_bytes < MEMORY_BYTES_MIN {
            return Err(MachineError::Memory(config.memory_bytes));
        }
        let memory = serio_hv::create_memory_of(config.memory_bytes, config.pages)?;
        let vm = Vm::new(kvm, &memory)?;
        let serial = Arc::new(SerialPort::new(vm.irq_line(layout::COM1_GSI)?, output));
        Created::of(vm, memory, serial, config.watchdog)
    }

    fn of(
        vm: Arc<Vm>,
        memory: GuestMemory,
        serial: Arc<SerialPort>,
        watchdog: WatchdogAction,
    ) -> Result<Created, MachineError> {
        let button = vm.irq_line(layout::EVENT_GSI)?;
        let generation = vm.irq_line(layout::GENERATION_GSI)?;
        let hotplug = vm.irq_line(layout::HOTPLUG_GSI)?;
        let track = Track::default();
        Ok(Created { vm, memory, serial, button, generation, hotplug, watchdog, track })
    }

    /// Puts the devices on the PCI bus, in the order that the guest will see them, or at `slots`.
    pub fn equip(self, devices: &Arc<Devices>, slots: &[u8]) -> Result<Equipped, MachineError> {
        // Both ends lie below 4 GiB by the layout.
        let pci = PciBus::new(layout::BAR_WINDOW_BASE as u32..layout::BAR_WINDOW_END as u32);
        for (slot, device) in devices.make_at(slots) {
            let function = VirtioPci::new(device, Arc::new(self.vm.clone()), self.memory.clone())?;
            pci.insert(slot, Box::new(function))?;
        }
        Ok(Equipped { created: self, pci, devices: devices.clone() })
    }
}

impl Equipped {
    /// Fills memory: ACPI tables, kernel, initrd, command line. Makes the vcpus.
    pub fn load(self, kvm: &Kvm, config: &MachineConfig) -> Result<Loaded, MachineError> {
        let Equipped { created, pci, devices } = self;
        let tables = Tables::new(config.vcpus);
        created
            .memory
            .write_slice(tables.bytes(), GuestAddress(layout::ACPI_BASE))
            .and_then(|()| {
                created.memory.write_slice(&layout::RESET_CODE, GuestAddress(layout::RESET_VECTOR))
            })
            .map_err(|source| BootError::Write { what: "ACPI tables", source })?;
        generation::place(&created.memory)?;
        let registers = boot::load(&created.memory, config.memory_bytes, &config.boot, tables.rsdp())?;
        let vcpus: Vec<Vcpu> =
            (0..config.vcpus).map(|id| created.vm.vcpu(kvm, id, config.vcpus)).collect::<Result<_, _>>()?;
        if let Some(first) = vcpus.first() {
            first.set_boot_registers(&registers)?;
        }
        Ok(Loaded { created, pci, devices, vcpus })
    }
}

impl Loaded {
    /// Lets the vcpus run. `end` gets the reason when they no longer do.
    pub fn start(self, end: Arc<EndSlot>) -> Result<Running, MachineError> {
        self.start_as(end, GateState::Running, &PlatformState::default())
    }

    /// Starts the vcpus' threads, which run or wait at the gate.
    fn start_as(
        self,
        end: Arc<EndSlot>,
        gate: GateState,
        platform: &PlatformState,
    ) -> Result<Running, MachineError> {
        let Loaded { created, pci, devices, vcpus } = self;
        let serial = created.serial.clone();
        let kicks = vcpus.iter().map(Vcpu::kick).collect();
        let exits = vcpus.iter().map(|_| bus::Exits::default()).collect();
        let all = Vcpus { gate: Arc::new(Gate::new(gate)), kicks, exits };
        let bus = Arc::new(Bus {
            serial: serial.clone(),
            clock: Rtc::restored(platform.clock_index.to_le_bytes()[0], &platform.clock_memory),
            watchdog: Watchdog::new(created.watchdog, end.clone(), all.clone()),
            pci,
            hotplug: Arc::new(Hotplug::new(created.hotplug, platform.plugged)),
            devices,
            end: end.clone(),
            pci_address: AtomicU32::new(platform.pci_address),
        });
        if let Some(saved) = &platform.watchdog {
            bus.watchdog.restore(saved);
        }
        let (vm, memory, track) = (created.vm, created.memory, created.track);
        let memory_bytes = memory.iter().map(|region| region.len()).sum();
        let parts = Arc::new(Parts { bus: bus.clone(), vm, memory, life: Mutex::new(track) });
        let handle = Handle {
            vcpus: all.clone(),
            end: end.clone(),
            serial,
            button: Arc::new(created.button),
            generation: Arc::new(created.generation),
            memory_bytes,
            parts: Arc::downgrade(&parts),
        };
        let mut running = Running { handle, _parts: parts, threads: Vec::with_capacity(vcpus.len()) };
        // A thread that cannot be made: dropping `running` ends and joins those before it.
        for vcpu in vcpus {
            let thread = vcpu::spawn(vcpu, bus.clone(), all.clone(), end.clone())
                .map_err(MachineError::host("start a vcpu's thread"))?;
            running.threads.push(thread);
        }
        Ok(running)
    }
}

impl Handle {
    /// Presses the ACPI power button.
    pub fn power_button(&self) -> std::io::Result<()> {
        self.button.trigger()
    }

    /// Tells the guest that its generation identifier is another now.
    pub fn generation_changed(&self) -> std::io::Result<()> {
        self.generation.trigger()
    }

    /// Why each vcpu has left the guest since this boot, and the devices that do not work.
    pub fn counters(&self) -> (Vec<VcpuCounters>, Vec<FailedDevice>) {
        let vcpus = self.vcpus.exits.iter().map(|exits| VcpuCounters {
            port_reads: exits.port_reads.get(),
            port_writes: exits.port_writes.get(),
            memory_reads: exits.memory_reads.get(),
            memory_writes: exits.memory_writes.get(),
            kicks: exits.kicks.get(),
        });
        let failures = self.parts.upgrade().map(|parts| parts.bus.pci.failures()).unwrap_or_default();
        let failed = failures.into_iter().map(|failure| FailedDevice {
            slot: u32::try_from(failure.slot).unwrap_or(u32::MAX),
            device_id: failure.device_id.into(),
            reason: failure.reason,
        });
        (vcpus.collect(), failed.collect())
    }

    /// The guest's RAM.
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// Types on the serial port.
    pub fn type_in(&self, bytes: &[u8]) {
        self.serial.type_in(bytes);
    }

    /// How many bytes may be typed now without losing one.
    pub fn input_room(&self) -> usize {
        self.serial.input_room()
    }

    /// Whether the vcpus are stopped for a while.
    pub fn is_paused(&self) -> bool {
        self.vcpus.gate.get() == GateState::Paused
    }

    /// Whether there is a reason to end.
    pub fn is_over(&self) -> bool {
        self.end.is_set()
    }

    /// Ends the VM from outside; [`Running::join`] then returns soon.
    pub fn stop(&self, end: End) {
        self.end.set(end);
        self.vcpus.set(GateState::Over);
    }
}

impl Running {
    /// For those who talk to it while it runs.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Waits for the vcpus, stops the devices, frees the memory. Returns why it ended.
    pub fn join(mut self) -> End {
        self.wind_up();
        let silent = || End::HostError("all vcpu threads ended without a reason".to_owned());
        self.handle.end.get().unwrap_or_else(silent)
    }

    fn wind_up(&mut self) {
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                let what = "a vcpu thread panicked: this is a mistake in serio-vmm".to_owned();
                self.handle.end.set(End::HostError(what));
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.threads.is_empty() {
            self.handle.stop(End::Stopped);
            self.wind_up();
        }
    }
}
