//! Page numbers, ranges and statistics from bytes: never more is given back than there is memory to give.

use serio_virtio::hostile::rings;

use super::BalloonHandle;
use super::worker::{Engine, Role};

/// Serves four rings made of these bytes, each as one of the balloon's queues; statistics are asked for in between.
pub fn requests(data: &[u8]) {
    let (rig, activation) = rings(data, 4, u64::MAX);
    let roles = [Role::Inflate, Role::Deflate, Role::Stats, Role::Reporting];
    let queues = roles.into_iter().zip(activation.queues).collect();
    let handle = BalloonHandle::new().expect("an eventfd");
    let mut engine = Engine::new(queues, handle.clone(), rig.memory.clone());
    for _ in 0..3 {
        if engine.look().is_err() {
            break;
        }
    }
    let status = handle.status();
    assert!(status.guest.at.is_none() || status.age.is_some());
}
