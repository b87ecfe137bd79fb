//! Hours of the meter put together to days and months of the calendar, in UTC. Pure.

use std::collections::BTreeMap;

use serio_store::meter::UsageRow;
use uuid::Uuid;

/// How long a line of a bill is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Granularity {
    /// 3600 seconds.
    Hour,
    /// Of the calendar, UTC.
    Day,
    /// Of the calendar, UTC.
    Month,
}

/// From a second since 1970 to before another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span {
    /// Its first second.
    pub start_s: i64,
    /// The first that is not in it.
    pub end_s: i64,
}

const HOUR_S: i64 = 3600;
const DAY_S: i64 = 24 * HOUR_S;

/// Year and month (1 to 12) of a day since 1970, in the Gregorian calendar; eras of 400 years, years that begin in March.
fn month_of(day: i64) -> (i64, i64) {
    let day = day + 719_468;
    let era = day.div_euclid(146_097);
    let of_era = day.rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month)
}

/// The day since 1970 on which a month begins.
fn first_day(year: i64, month: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let of_era = year.rem_euclid(400);
    let of_year = (153 * (if month > 2 { month - 3 } else { month + 9 }) + 2) / 5;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

impl Granularity {
    /// The span that an hour since 1970 lies in. Hours far outside of any calendar are their own span.
    #[must_use]
    pub fn span(self, hour: i64) -> Span {
        // The year 10000 and beyond comes from a broken clock; this also keeps the arithmetic small.
        let hour = hour.clamp(-1_000_000, 100_000_000);
        let day = hour.div_euclid(24);
        let (start_s, end_s) = match self {
            Self::Hour => (hour * HOUR_S, (hour + 1) * HOUR_S),
            Self::Day => (day * DAY_S, (day + 1) * DAY_S),
            Self::Month => {
                let (year, month) = month_of(day);
                let next = if month == 12 { (year + 1, 1) } else { (year, month + 1) };
                (first_day(year, month) * DAY_S, first_day(next.0, next.1) * DAY_S)
            }
        };
        Span { start_s, end_s }
    }
}

/// Hours put together, by span and then by vdc.
#[must_use]
pub fn spans(hours: &[UsageRow], by: Granularity) -> Vec<(Span, UsageRow)> {
    let mut sums: BTreeMap<(Span, Uuid), UsageRow> = BTreeMap::new();
    for row in hours {
        let span = by.span(row.hour);
        sums.entry((span, row.vdc))
            .and_modify(|sum| sum.amounts = sum.amounts.plus(row.amounts))
            .or_insert_with(|| row.clone());
    }
    sums.into_iter().map(|((span, _), row)| (span, row)).collect()
}

#[cfg(test)]
mod tests {
    use serio_store::meter::Amounts;

    use super::*;

    #[test]
    fn months_are_the_calendar_s() {
        // 2024-02-29T12:00Z, a leap day: `date -ud 2024-02-29T12:00 +%s` is 1709208000.
        let hour = 1_709_208_000 / 3600;
        let month = Granularity::Month.span(hour);
        assert_eq!((month.start_s, month.end_s), (1_706_745_600, 1_709_251_200));
        let day = Granularity::Day.span(hour);
        assert_eq!((day.start_s, day.end_s), (1_709_164_800, 1_709_251_200));
        // December, and the year's end: 2025-12-01 and 2026-01-01.
        let december = Granularity::Month.span(1_766_000_000 / 3600);
        assert_eq!((december.start_s, december.end_s), (1_764_547_200, 1_767_225_600));
        for hour in (-900_000..30_000_000).step_by(997) {
            let month = Granularity::Month.span(hour);
            assert!(month.start_s <= hour * 3600 && hour * 3600 < month.end_s, "{hour}");
            assert!((28..=31).contains(&((month.end_s - month.start_s) / DAY_S)), "{hour}");
        }
    }

    #[test]
    fn hours_add_up_by_vdc() {
        let row = |vdc, hour| UsageRow {
            vdc,
            name: "a".parse().unwrap(),
            hour,
            amounts: Amounts { cpu_us: 1, ..Amounts::default() },
        };
        let (one, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let rows = [row(one, 0), row(one, 23), row(other, 5), row(one, 24)];
        let sums = spans(&rows, Granularity::Day);
        let seen: Vec<_> =
            sums.iter().map(|(span, row)| (span.start_s, row.vdc, row.amounts.cpu_us)).collect();
        assert_eq!(seen, [(0, one, 2), (0, other, 1), (DAY_S, one, 1)]);
        assert_eq!(spans(&rows, Granularity::Hour).len(), 4);
        let _ = (Granularity::Month.span(i64::MAX), Granularity::Month.span(i64::MIN));
    }
}
