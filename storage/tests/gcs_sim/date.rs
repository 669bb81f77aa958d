//! Dates as HTTP and XML write them.

use std::time::{SystemTime, UNIX_EPOCH};

const MONTHS: [&str; 12] =
    ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];

/// Whole seconds since 1970.
pub fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// `Sun, 06 Nov 1994 08:49:37 GMT`.
pub fn http(time: SystemTime) -> String {
    let seconds = seconds(time);
    let days = seconds / 86_400;
    let (year, month, day) = civil(days);
    let (weekday, month) = (DAYS[(days % 7) as usize], MONTHS[month]);
    format!("{weekday}, {day:02} {month} {year} {} GMT", clock(seconds))
}

/// `1994-11-06T08:49:37.000Z`.
pub fn iso(time: SystemTime) -> String {
    let seconds = seconds(time);
    let (year, month, day) = civil(seconds / 86_400);
    let millis = time.duration_since(UNIX_EPOCH).unwrap_or_default().subsec_millis();
    format!("{year}-{:02}-{day:02}T{}.{millis:03}Z", month + 1, clock(seconds))
}

/// The seconds since 1970 that [`http`] would write so.
pub fn parse(text: &str) -> Option<u64> {
    let words: Vec<&str> = text.split(' ').collect();
    let [_, day, month, year, clock, "GMT"] = words[..] else { return None };
    let month = MONTHS.iter().position(|name| *name == month)?;
    let (day, year) = (day.parse::<u64>().ok()?, year.parse::<u64>().ok()?);
    let days = (1970..year).map(length).sum::<u64>() + (0..month).map(|m| month_length(year, m)).sum::<u64>();
    let clock: Option<Vec<u64>> = clock.split(':').map(|part| part.parse().ok()).collect();
    let [hours, minutes, seconds] = clock?[..] else { return None };
    Some((days + day.checked_sub(1)?) * 86_400 + hours * 3600 + minutes * 60 + seconds)
}

fn clock(seconds: u64) -> String {
    format!("{:02}:{:02}:{:02}", seconds / 3600 % 24, seconds / 60 % 60, seconds % 60)
}

/// Year, month from 0, day from 1.
fn civil(mut days: u64) -> (u64, usize, u64) {
    let (mut year, mut month) = (1970, 0);
    while days >= length(year) {
        days -= length(year);
        year += 1;
    }
    while days >= month_length(year, month) {
        days -= month_length(year, month);
        month += 1;
    }
    (year, month, days + 1)
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

fn length(year: u64) -> u64 {
    if is_leap(year) { 366 } else { 365 }
}

fn month_length(year: u64, month: usize) -> u64 {
    match month {
        1 if is_leap(year) => 29,
        1 => 28,
        3 | 5 | 8 | 10 => 30,
        _ => 31,
    }
}

#[test]
fn dates_come_back() {
    let at = |seconds| UNIX_EPOCH + std::time::Duration::from_millis(seconds * 1000 + 7);
    assert_eq!(http(at(784_111_777)), "Sun, 06 Nov 1994 08:49:37 GMT");
    assert_eq!(iso(at(784_111_777)), "1994-11-06T08:49:37.007Z");
    for seconds in [0, 951_782_400, 1_078_012_799, 1_735_689_599, 4_107_542_400] {
        assert_eq!(parse(&http(at(seconds))), Some(seconds));
    }
}
