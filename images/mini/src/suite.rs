//! Cases: what they get, what they answer, how they are chosen and counted.
//!
//! A case is a plain function with a group and a name in a table (`cases/`). It opens the devices that it
//! needs anew and leaves nothing behind but memory. To add one, write the function and a line in the table.

use crate::acpi::Acpi;
use crate::boot::Boot;
use crate::pci::Bus;
use crate::println;
use alloc::string::String;

/// Why a case did not pass.
pub enum Failure {
    /// It failed.
    Failed(String),
    /// It cannot run on this machine.
    Skipped(String),
}

impl From<String> for Failure {
    fn from(reason: String) -> Self {
        Self::Failed(reason)
    }
}

impl From<&str> for Failure {
    fn from(reason: &str) -> Self {
        Self::Failed(reason.into())
    }
}

/// What a case answers.
pub type Outcome = Result<(), Failure>;

/// Fails the case unless a condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($reason:tt)+) => {
        if !$condition {
            return Err($crate::suite::Failure::Failed(alloc::format!($($reason)+)));
        }
    };
}

/// Ends the case as one that cannot run here.
#[macro_export]
macro_rules! skip {
    ($($reason:tt)+) => {
        return Err($crate::suite::Failure::Skipped(alloc::format!($($reason)+)))
    };
}

/// The machine under test.
pub struct Machine {
    /// What the loader told.
    pub boot: Boot,
    /// The firmware tables.
    pub acpi: Option<Acpi>,
    /// The PCI bus.
    pub bus: Option<Bus>,
}

impl Machine {
    /// The firmware tables, or the reason why there are none.
    pub fn acpi(&self) -> Result<&Acpi, Failure> {
        self.acpi.as_ref().ok_or_else(|| "no ACPI root pointer found".into())
    }
    /// The PCI bus, or the reason why there is none.
    pub fn bus(&mut self) -> Result<&mut Bus, Failure> {
        self.bus.as_mut().ok_or_else(|| "no PCI configuration space (MCFG)".into())
    }
}

/// One case.
pub struct Case {
    /// The subject: what `mini.test=GROUP` chooses.
    pub group: &'static str,
    /// Its name within the group.
    pub name: &'static str,
    /// What it does.
    pub run: fn(&mut Machine) -> Outcome,
}

fn is_chosen(case: &Case, choice: &str) -> bool {
    choice.split(',').any(|word| match word.split_once('.') {
        Some((group, name)) => group == case.group && name == case.name,
        None => word == "all" || word == case.group,
    })
}

/// Runs the chosen cases and prints the sum; true if none failed and at least one ran.
pub fn run(machine: &mut Machine, choice: &str) -> bool {
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for case in crate::cases::all().filter(|case| is_chosen(case, choice)) {
        let (group, name) = (case.group, case.name);
        match (case.run)(machine) {
            Ok(()) => {
                passed += 1;
                println!("ok {group}.{name}");
            }
            Err(Failure::Failed(reason)) => {
                failed += 1;
                println!("not ok {group}.{name}: {reason}");
            }
            Err(Failure::Skipped(reason)) => {
                skipped += 1;
                println!("skipped {group}.{name}: {reason}");
            }
        }
    }
    println!("mini: {passed} passed, {failed} failed, {skipped} skipped");
    failed == 0 && passed > 0
}
