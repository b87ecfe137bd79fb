//! A seriod that is treated badly, beside a guest that must not notice.

use std::{
    fs,
    time::{Duration, Instant},
};

use serio_api::v1::{VmSpec, vm_service_client::VmServiceClient};
use tonic::transport::Channel;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use super::{
    Seriod,
    guest::{counts_beyond, guest_node, rounds, run, spec},
};

/// What seriod may have in memory at any moment.
pub const MEMORY_KIB_MAX: u64 = 64 << 10;
/// How long an answer about its health may take, on a busy machine.
pub const HEALTH_WITHIN: Duration = Duration::from_secs(20);

pub struct Rig {
    pub seriod: Seriod,
    /// A client from before the trouble.
    pub channel: Channel,
    /// The guest.
    pub uid: String,
    counted: u64,
}

impl Rig {
    /// `None`: it cannot run here, and why is said.
    pub async fn start(more: &str) -> Option<Self> {
        match guest_node(more).await {
            Ok((seriod, channel)) => Some(Self::with(seriod, channel, spec()).await),
            Err(why) => {
                eprintln!("skipped: {why}");
                None
            }
        }
    }

    /// With a node that is there, and another guest.
    pub async fn with(seriod: Seriod, channel: Channel, spec: VmSpec) -> Self {
        let vm = run(&mut VmServiceClient::new(channel.clone()), "web", spec).await;
        let counted = counts_beyond(&seriod, &vm.uid, 0).await;
        // From here on the peak counts.
        fs::write(format!("/proc/{}/clear_refs", seriod.pid()), "5").unwrap();
        Self { seriod, channel, uid: vm.uid, counted }
    }

    /// The most that it had in memory since the guest started.
    pub fn memory_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.seriod.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// Descriptors that it has open.
    pub fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.seriod.pid())).unwrap().count()
    }

    /// Whoever asks anew is told that it serves.
    pub async fn is_healthy(&self, during: &str) {
        let began = Instant::now();
        let asked = async {
            let mut health = HealthClient::new(self.seriod.connect().await?);
            let answer = health.check(HealthCheckRequest::default()).await?;
            Ok::<_, Box<dyn std::error::Error>>(answer.into_inner().status())
        };
        let answer = tokio::time::timeout(HEALTH_WITHIN, asked).await;
        let answer = answer.unwrap_or_else(|_| panic!("{during}: no answer about its health"));
        assert_eq!(answer.unwrap_or_else(|e| panic!("{during}: {e}")), ServingStatus::Serving);
        eprintln!("{during}: health in {:?}, {} KiB at the most", began.elapsed(), self.memory_kib());
    }

    /// It serves, is small, and the guest has counted on.
    pub async fn is_fine(&mut self, during: &str) {
        self.is_healthy(during).await;
        let memory = self.memory_kib();
        assert!(memory <= MEMORY_KIB_MAX, "{during}: {memory} KiB");
        self.counted = counts_beyond(&self.seriod, &self.uid, rounds(&self.seriod, &self.uid)).await;
    }
}
