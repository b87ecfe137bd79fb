//! The registers behind ACPI's sleep and reset, and the keyboard controller's reset line.
//!
//! ```text
//!   0x600 sleep control   write SLP_EN | type 5 → the guest powers off (ACPI 6.5 §4.8.3.7)
//!   0x601 sleep status    reads 0: never woken
//!   0x602 reset           write 0xfe → reset
//!   0x64  command         write 0xfe → reset (what `reboot=kbd` and old kernels do); reads 0: nothing is busy
//! ```

use crate::end::End;
use crate::layout;

const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 7;
/// Keyboard controller: pulse its reset line.
const PULSE_RESET: u8 = 0xfe;

/// What a write to one of these ports asks for.
pub(super) fn write(port: u16, value: u8) -> Option<End> {
    let sleep_type = (value >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK;
    match port {
        layout::SLEEP_CONTROL_PORT if value & SLEEP_ENABLE != 0 && sleep_type == layout::S5_SLEEP_TYPE => {
            Some(End::PowerOff)
        }
        layout::RESET_PORT if value == layout::RESET_VALUE => Some(End::Reset),
        layout::KEYBOARD_COMMAND_PORT if value == PULSE_RESET => Some(End::Reset),
        _ => None,
    }
}

/// What these ports read as; `None`: not one of them.
pub(super) fn read(port: u16) -> Option<u8> {
    match port {
        layout::SLEEP_CONTROL_PORT
        | layout::SLEEP_STATUS_PORT
        | layout::RESET_PORT
        | layout::KEYBOARD_COMMAND_PORT => Some(0),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_exact_values_end_a_vm() {
        let s5 = SLEEP_ENABLE | layout::S5_SLEEP_TYPE << SLEEP_TYPE_SHIFT;
        assert_eq!(write(0x600, s5), Some(End::PowerOff));
        assert_eq!(write(0x602, 0xfe), Some(End::Reset));
        assert_eq!(write(0x64, 0xfe), Some(End::Reset));
        let ends = |port: u16| (0..=255u8).filter(|value| write(port, *value).is_some()).count();
        // Reserved bits of the sleep register do not matter: two below, one and two above.
        assert_eq!((ends(0x600), ends(0x601), ends(0x602), ends(0x64), ends(0x80)), (16, 0, 1, 1, 0));
    }
}
