//! Holds one idle VM with one vcpu open for the life of a testbed host.
//!
//! KVM patches kernel text when the first VM of a host starts and when the last one ends. Under software emulation that
//! patching sometimes kills the host kernel (`Oops: int3`), so it happens once, before anything is tested.
#![forbid(unsafe_code)]

use anyhow::Context;
use kvm_ioctls::Kvm;

fn main() -> anyhow::Result<()> {
    let kvm = Kvm::new().context("cannot open /dev/kvm")?;
    let vm = kvm.create_vm().context("cannot create a VM")?;
    vm.create_irq_chip().context("cannot create the interrupt chip")?;
    let _vcpu = vm.create_vcpu(0).context("cannot create a vcpu")?;
    println!("hold-kvm: holding one VM");
    loop {
        std::thread::park();
    }
}
