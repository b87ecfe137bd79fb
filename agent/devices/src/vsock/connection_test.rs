//! The arithmetic of credits.

use super::*;

#[test]
fn credit_wraps_and_never_underflows() {
    let key = Key { host_port: 1, guest_port: 2 };
    let mut connection = Connection::new(State::Open, key, None, 0);
    let mut told = |sent, buf_alloc, fwd_cnt| {
        connection.sent = sent;
        connection.learn_credit(&Header { buf_alloc, fwd_cnt, ..Header::default() });
        connection.credit()
    };
    assert_eq!(told(10, 100, 0), 90);
    assert_eq!(told(5, 100, u32::MAX - 4), 90);
    assert_eq!(told(200, 100, 0), 0, "the guest shrank its buffer");
    assert_eq!(told(0, 100, 50), 0, "the guest claims bytes that were never sent");
}
