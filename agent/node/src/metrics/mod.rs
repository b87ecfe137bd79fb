//! `/metrics` for Prometheus: the node, its conditions, its energy, what each vdc has used, and what each VM has counted.
//!
//! Owns: the text format (version 0.0.4) and the few lines of HTTP that serve it. Never: numbers of its own. Plain HTTP without
//! access control, so it is off unless `metrics.listen` names an address; names of vdcs are in it: listen on loopback or on a
//! network that only the monitoring sees.
//! Limits: a request has 4 KiB and 5 s, 8 are answered at once, more wait in the kernel. A VMM that does not answer within 2 s is
//! left out of that answer.

use std::{fmt::Write as _, sync::Arc, time::Duration};

use serio_store::meter::{Amounts, UsageRow};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    task::JoinSet,
    time::timeout,
};

use crate::{
    capacity::Reporter,
    health::{Condition, Health},
    meter::{EnergyNow, Meter},
    state::{Handles, holdings::Holdings},
    supervise::counters::{self, NamedCounts, escape},
};

const REQUEST_BYTES_MAX: usize = 4096;
const REQUEST_WAIT: Duration = Duration::from_secs(5);
const AT_ONCE: usize = 8;
const VMM_WAIT: Duration = Duration::from_secs(2);

/// What is shown.
#[derive(Debug, Clone)]
pub struct Sources {
    /// "a".
    pub node: String,
    /// Pressure and VMs.
    pub reporter: Reporter,
    /// Conditions.
    pub health: Health,
    /// Energy and usage.
    pub meter: Meter,
    /// The VMs' names.
    pub holdings: watch::Receiver<Holdings>,
    /// Their processes.
    pub handles: Handles,
}

/// One family of samples in the making.
struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        let labels: Vec<String> =
            labels.iter().map(|(key, value)| format!("{key}=\"{}\"", escape(value))).collect();
        let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        let _ = writeln!(self.0, "{name}{labels} {value}");
    }

    fn gauge(&mut self, name: &str, help: &str, value: f64) {
        self.family(name, "gauge", help);
        self.sample(name, &[], value);
    }
}

type Column = (&'static str, &'static str, fn(&Amounts) -> Option<f64>);

/// The counters of a vdc. Units as Prometheus wants them: seconds and bytes.
const COLUMNS: &[Column] = &[
    ("vcpu_seconds", "Vcpus of running VMs by time.", |a| Some(a.vcpu_ms as f64 / 1e3)),
    ("cpu_seconds", "Processor time of VMs.", |a| Some(a.cpu_us as f64 / 1e6)),
    ("memory_byte_seconds", "Memory of running VMs by time.", |a| Some(a.memory_mib_s as f64 * MIB)),
    ("storage_byte_seconds", "Volumes as provisioned by time.", |a| Some(a.storage_mib_s as f64 * MIB)),
    ("disk_read_bytes", "Bytes that VMs read from disks.", |a| Some(a.read_bytes as f64)),
    ("disk_written_bytes", "Bytes that VMs wrote to disks.", |a| Some(a.write_bytes as f64)),
    ("disk_reads", "Reads that reached a disk.", |a| a.read_ops.map(|n| n as f64)),
    ("disk_writes", "Writes that reached a disk.", |a| a.write_ops.map(|n| n as f64)),
    ("network_received_bytes", "Bytes to guests.", |a| Some(a.net_rx_bytes as f64)),
    ("network_sent_bytes", "Bytes from guests.", |a| Some(a.net_tx_bytes as f64)),
    ("energy_joules", "Energy attributed; absent: not measured.", |a| a.energy_mj.map(|n| n as f64 / 1e3)),
    ("carbon_grams", "CO2 of it; absent: not known.", |a| a.carbon_mg.map(|n| n as f64 / 1e3)),
];

const MIB: f64 = 1_048_576.0;

fn vdcs(text: &mut Text, totals: &[UsageRow]) {
    for (column, help, of) in COLUMNS {
        let name = format!("serio_vdc_{column}_total");
        text.family(&name, "counter", help);
        for row in totals {
            let uid = row.vdc.to_string();
            let labels = [("vdc", row.name.as_str()), ("uid", uid.as_str())];
            if let Some(value) = of(&row.amounts) {
                text.sample(&name, &labels, value);
            }
        }
    }
}

fn conditions(text: &mut Text, conditions: &[Condition]) {
    text.family("serio_condition", "gauge", "Something is wrong with the node: 1 warning, 2 critical.");
    for Condition { finding, .. } in conditions {
        let value = match finding.severity {
            crate::health::Severity::Warning => 1.0,
            crate::health::Severity::Critical => 2.0,
        };
        let labels = [("kind", finding.kind.as_str()), ("subject", finding.subject.as_str())];
        text.sample("serio_condition", &labels, value);
    }
}

fn energy(text: &mut Text, energy: &EnergyNow) {
    let measured = f64::from(u8::from(energy.method.is_some()));
    text.gauge("serio_energy_measured", "The host has a sensor that is read.", measured);
    if energy.method.is_some() {
        let parts = [
            ("all", energy.total_uj),
            ("idle", energy.idle_uj),
            ("host", energy.host_uj),
            ("vms", energy.total_uj.saturating_sub(energy.idle_uj).saturating_sub(energy.host_uj)),
        ];
        text.family(
            "serio_energy_joules_total",
            "counter",
            "Energy since the agent's start, by whose it is.",
        );
        for (part, uj) in parts {
            text.sample("serio_energy_joules_total", &[("part", part)], uj as f64 / 1e6);
        }
    }
    if let Some(watts) = energy.watts {
        text.gauge("serio_power_watts", "Over the last interval of the meter.", watts);
    }
    if let Some(grams) = energy.carbon_grams_per_kwh {
        text.gauge("serio_carbon_grams_per_kwh", "As configured or read.", grams);
    }
}

impl Sources {
    /// The whole page.
    pub async fn render(&self) -> String {
        let usage = self.reporter.current().usage;
        let totals = self.meter.totals().await.unwrap_or_default();
        let mut text = Text(String::new());
        text.family("serio_node_info", "gauge", "Which node this is.");
        let labels = [("node", self.node.as_str()), ("version", env!("CARGO_PKG_VERSION"))];
        text.sample("serio_node_info", &labels, 1.0);
        text.gauge("serio_vms_running", "VMs that run.", f64::from(usage.vms_running));
        text.gauge("serio_cpu_busy_ratio", "Busy processors over the last interval.", usage.cpu_busy);
        text.gauge(
            "serio_memory_available_bytes",
            "As the kernel says.",
            usage.memory_available_bytes as f64,
        );
        conditions(&mut text, &self.health.conditions());
        energy(&mut text, &self.meter.energy());
        vdcs(&mut text, &totals);
        text.0 += &counters::render(&self.counted().await);
        text.0
    }

    /// What the VMs have counted; all are asked at once.
    async fn counted(&self) -> Vec<NamedCounts> {
        let mut asked = JoinSet::new();
        for vdc in &self.holdings.borrow().vdcs {
            for vm in &vdc.vms {
                let Some(handle) = self.handles.vm(vm.uid) else { continue };
                let (vdc, vm) = (vdc.name.to_string(), vm.name.to_string());
                asked.spawn(async move {
                    let counts = timeout(VMM_WAIT, handle.counters()).await.ok()?.ok()?;
                    Some(NamedCounts { vdc, vm, counts })
                });
            }
        }
        let mut counted: Vec<NamedCounts> = asked.join_all().await.into_iter().flatten().collect();
        counted.sort_by(|a, b| (&a.vdc, &a.vm).cmp(&(&b.vdc, &b.vm)));
        counted
    }
}

/// Serves until dropped.
pub async fn serve(listener: TcpListener, sources: Sources) {
    let slots = Arc::new(Semaphore::new(AT_ONCE));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let sources = sources.clone();
                tokio::spawn(async move {
                    // A client that is slow or gone costs itself.
                    let _ = timeout(REQUEST_WAIT, answer(stream, &sources)).await;
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a client of metrics could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn answer(mut stream: TcpStream, sources: &Sources) -> std::io::Result<()> {
    let mut request = Vec::new();
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        let mut more = [0; 1024];
        let read = stream.read(&mut more).await?;
        request.extend_from_slice(more.get(..read).unwrap_or_default());
        if read == 0 || request.len() > REQUEST_BYTES_MAX {
            return Ok(());
        }
    }
    let line = request.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let is_metrics = line.starts_with(b"GET /metrics ") || line.starts_with(b"GET /metrics?");
    let (status, body) = if is_metrics {
        ("200 OK", sources.render().await)
    } else {
        ("404 Not Found", "there is only /metrics here\n".to_owned())
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[test]
    fn what_is_not_measured_is_absent() {
        let row = UsageRow {
            vdc: Uuid::nil(),
            name: "ardesio".parse().unwrap(),
            hour: 0,
            amounts: Amounts { vcpu_ms: 1500, storage_mib_s: 2, ..Amounts::default() },
        };
        let mut text = Text(String::new());
        vdcs(&mut text, &[row]);
        energy(&mut text, &EnergyNow::default());
        let labels = "{vdc=\"ardesio\",uid=\"00000000-0000-0000-0000-000000000000\"}";
        assert!(text.0.contains(&format!("\nserio_vdc_vcpu_seconds_total{labels} 1.5\n")), "{}", text.0);
        assert!(text.0.contains(&format!("serio_vdc_storage_byte_seconds_total{labels} 2097152\n")));
        assert!(!text.0.contains("energy_joules_total{") && text.0.contains("serio_energy_measured 0\n"));
        assert_eq!(escape("a\"b\\c\nd"), "a\\\"b\\\\c\\nd");
        for line in text.0.lines().filter(|line| !line.starts_with('#')) {
            let (_, value) = line.rsplit_once(' ').unwrap();
            assert!(value.parse::<f64>().is_ok(), "{line}");
        }
    }
}
