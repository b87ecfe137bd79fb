//! `vdc usage`: what is invoiced.

use pbjson_types::Timestamp;
use serio_api::v1::{ListUsageRequest, UsageGranularity, VdcUsage, vdc_service_client::VdcServiceClient};
use time::{Date, OffsetDateTime, format_description::well_known::Rfc3339, macros::format_description};

use crate::{
    args::{GranularityArg, UsageArgs},
    client::Client,
    error::Failure,
    names, output,
    output::Output,
};

/// A day, or an instant as RFC 3339 writes it.
fn instant(text: &str) -> Result<Timestamp, Failure> {
    let day = || {
        let date = Date::parse(text, format_description!("[year]-[month]-[day]")).ok()?;
        Some(date.midnight().assume_utc())
    };
    let time = OffsetDateTime::parse(text, &Rfc3339).ok().or_else(day);
    let time = time.ok_or_else(|| {
        Failure::Usage(format!("`{text}` is no time: write 2026-03-01 or 2026-03-01T08:00:00Z"))
    })?;
    Ok(Timestamp { seconds: time.unix_timestamp(), nanos: 0 })
}

pub(super) async fn run(client: &Client, args: UsageArgs, output: Output) -> Result<(), Failure> {
    let mut request = ListUsageRequest {
        parent: names::vdc(&args.name),
        start_time: args.from.as_deref().map(instant).transpose()?,
        end_time: args.to.as_deref().map(instant).transpose()?,
        granularity: match args.by {
            GranularityArg::Hour => UsageGranularity::Hour,
            GranularityArg::Day => UsageGranularity::Day,
            GranularityArg::Month => UsageGranularity::Month,
        }
        .into(),
        ..Default::default()
    };
    let mut usages = Vec::new();
    loop {
        let doing = format!("read the usage of vdc {}", args.name);
        let answer = client
            .call(&doing, request.clone(), |channel, request| async move {
                VdcServiceClient::new(channel).list_usage(request).await
            })
            .await?;
        usages.extend(answer.usages);
        if answer.next_page_token.is_empty() {
            break;
        }
        request.page_token = answer.next_page_token;
    }
    if args.csv {
        return output::text(&csv(&usages));
    }
    let columns = [
        "FROM",
        "VCPU H",
        "CPU H",
        "MEMORY GIB H",
        "STORAGE GIB H",
        "READ",
        "WRITTEN",
        "NET IN",
        "NET OUT",
        "ENERGY",
    ];
    output.list(&usages, &columns, row)
}

const GIB: f64 = 1_073_741_824.0;

fn row(usage: &VdcUsage) -> Vec<String> {
    let hours = |seconds: f64| format!("{:.3}", seconds / 3600.0);
    vec![
        output::time(usage.start_time.as_ref()),
        hours(usage.vcpu_seconds),
        hours(usage.cpu_seconds),
        hours(usage.memory_byte_seconds / GIB),
        format!("{:.3}", usage.storage_byte_hours / GIB),
        output::size(usage.read_bytes),
        output::size(usage.write_bytes),
        output::size(usage.network_received_bytes),
        output::size(usage.network_sent_bytes),
        usage.energy_joules.map_or_else(|| "not measured".to_owned(), |joules| format!("{joules:.0} J")),
    ]
}

/// A line of names, then a line for each; what was not measured is empty. No value can hold a comma.
fn csv(usages: &[VdcUsage]) -> String {
    let mut text = "vdc,vdc_uid,start_time,end_time,metered_seconds,vcpu_seconds,cpu_seconds,memory_byte_seconds,\
                    storage_byte_hours,read_bytes,write_bytes,read_ops,write_ops,network_received_bytes,network_sent_bytes,\
                    energy_joules,carbon_grams\n"
        .to_owned();
    for usage in usages {
        let stamp = |time: Option<&Timestamp>| output::time(time).replace(' ', "T");
        let count = |value: Option<u64>| value.map(|v| v.to_string()).unwrap_or_default();
        let number = |value: Option<f64>| value.map(|v| v.to_string()).unwrap_or_default();
        let cells = [
            names::short(&usage.vdc),
            usage.vdc_uid.clone(),
            stamp(usage.start_time.as_ref()),
            stamp(usage.end_time.as_ref()),
            usage.metered_seconds.to_string(),
            usage.vcpu_seconds.to_string(),
            usage.cpu_seconds.to_string(),
            usage.memory_byte_seconds.to_string(),
            usage.storage_byte_hours.to_string(),
            usage.read_bytes.to_string(),
            usage.write_bytes.to_string(),
            count(usage.read_ops),
            count(usage.write_ops),
            usage.network_received_bytes.to_string(),
            usage.network_sent_bytes.to_string(),
            number(usage.energy_joules),
            number(usage.carbon_grams),
        ];
        text.push_str(&format!("{}\n", cells.join(",")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_days_or_instants() {
        assert_eq!(instant("2026-03-01").unwrap().seconds, 1_772_323_200);
        assert_eq!(instant("2026-03-01T01:00:00+01:00").unwrap().seconds, 1_772_323_200);
        assert!(instant("yesterday").is_err());
    }

    #[test]
    fn csv_has_as_many_cells_as_names_and_no_guesses() {
        let usage = VdcUsage { vdc: "vdcs/ardesio".into(), vcpu_seconds: 1.5, ..Default::default() };
        let text = csv(&[usage]);
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split(',').collect()).collect();
        assert_eq!((lines[0].len(), lines[1].len()), (17, 17));
        assert_eq!((lines[1][0], lines[1][5], lines[1][15]), ("ardesio", "1.5", ""));
    }
}
