//! VdcService.ListUsage, and conditions and energy as the API has them.

use pbjson_types::Timestamp;
use serio_api::v1;
use serio_store::meter::{Amounts, UsageRow};
use serio_types::resource;

use super::{
    Context,
    convert::{Fields, field},
    page,
};
use crate::{
    error::Error,
    health::{Condition, Severity},
    meter::{EnergyNow, Granularity, Span},
};

const MIB: f64 = 1_048_576.0;
/// Lines of one answer when nothing is said: 13 months of hours are more than a message may hold.
const PAGE: u32 = 5_000;
/// When no begin is asked.
const DAY_S: i64 = 24 * 3600;

fn stamp(seconds: i64) -> Timestamp {
    Timestamp { seconds, nanos: 0 }
}

fn to_proto(span: Span, row: &UsageRow) -> v1::VdcUsage {
    let Amounts { metered_ms, vcpu_ms, cpu_us, memory_mib_s, storage_mib_s, .. } = row.amounts;
    let more = row.amounts;
    v1::VdcUsage {
        vdc: resource::vdc(&row.name),
        vdc_uid: row.vdc.to_string(),
        start_time: Some(stamp(span.start_s)),
        end_time: Some(stamp(span.end_s)),
        metered_seconds: metered_ms as f64 / 1e3,
        vcpu_seconds: vcpu_ms as f64 / 1e3,
        cpu_seconds: cpu_us as f64 / 1e6,
        memory_byte_seconds: memory_mib_s as f64 * MIB,
        storage_byte_hours: storage_mib_s as f64 * MIB / 3600.0,
        read_bytes: more.read_bytes,
        write_bytes: more.write_bytes,
        read_ops: more.read_ops,
        write_ops: more.write_ops,
        network_received_bytes: more.net_rx_bytes,
        network_sent_bytes: more.net_tx_bytes,
        energy_joules: more.energy_mj.map(|mj| mj as f64 / 1e3),
        carbon_grams: more.carbon_mg.map(|mg| mg as f64 / 1e3),
    }
}

/// See the API.
pub(super) async fn list(
    context: &Context,
    request: v1::ListUsageRequest,
) -> Result<v1::ListUsageResponse, Error> {
    let name = field("parent", resource::parse_vdc(&request.parent))?;
    let mut fields = Fields::default();
    let by = match v1::UsageGranularity::try_from(request.granularity) {
        Ok(v1::UsageGranularity::Unspecified | v1::UsageGranularity::Hour) => Granularity::Hour,
        Ok(v1::UsageGranularity::Day) => Granularity::Day,
        Ok(v1::UsageGranularity::Month) => Granularity::Month,
        Err(_) => {
            fields.wrong("granularity", format!("{} is unknown", request.granularity));
            Granularity::Hour
        }
    };
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let to = request.end_time.map_or(i64::try_from(now.as_secs()).unwrap_or(i64::MAX), |t| t.seconds);
    let from = request.start_time.map_or(to.saturating_sub(DAY_S), |t| t.seconds);
    if from > to {
        fields.wrong("start_time", "is after end_time");
    }
    fields.done(Some(()))?;
    let rows = context.meter.usage(name, (from, to), by).await?;
    let key = |(span, row): &(Span, UsageRow)| {
        page::oldest_first(span.start_s.saturating_mul(1000), &row.vdc.to_string())
    };
    let size = if request.page_size == 0 { PAGE } else { request.page_size.min(PAGE) };
    let (rows, next_page_token) = page::cut(rows, size, &request.page_token, key)?;
    let usages = rows.iter().map(|(span, row)| to_proto(*span, row)).collect();
    Ok(v1::ListUsageResponse { usages, next_page_token })
}

/// To the wire.
#[must_use]
pub fn severity(severity: Severity) -> v1::Severity {
    match severity {
        Severity::Warning => v1::Severity::Warning,
        Severity::Critical => v1::Severity::Critical,
    }
}

pub(super) fn condition(condition: &Condition) -> v1::Condition {
    let finding = &condition.finding;
    v1::Condition {
        kind: finding.kind.as_str().to_owned(),
        subject: finding.subject.clone(),
        severity: severity(finding.severity).into(),
        since: Some(stamp(condition.since_s)),
        reason: finding.reason.clone(),
        remedy: finding.remedy.clone(),
    }
}

pub(super) fn energy(now: &EnergyNow) -> v1::Energy {
    let joules = |uj: u64| now.method.map(|_| uj as f64 / 1e6);
    v1::Energy {
        method: now.method.unwrap_or("not measured: this host has no sensor that is known").to_owned(),
        joules: joules(now.total_uj),
        idle_joules: joules(now.idle_uj),
        host_joules: joules(now.host_uj),
        watts: now.watts,
        carbon_grams_per_kwh: now.carbon_grams_per_kwh,
    }
}
