//! The time text of `qubes.SetDateTime`: `2026-11-23T04:39:00+00:00`, also `+0000`, also with `,nnnnnnnnn`.

/// Seconds since the beginning of 1970 in UTC; `None` unless the text is a whole, possible time.
#[must_use]
pub fn parse(text: &str) -> Option<i64> {
    let text = text.trim_ascii().as_bytes();
    let date = text.get(..19)?;
    for (index, separator) in [(4, b'-'), (7, b'-'), (10, b'T'), (13, b':'), (16, b':')] {
        if *date.get(index)? != separator {
            return None;
        }
    }
    let year = number(date.get(0..4)?)?;
    let month = number(date.get(5..7)?).filter(|month| (1..=12).contains(month))?;
    let day = number(date.get(8..10)?).filter(|day| (1..=days_in(year, month)).contains(day))?;
    let hour = number(date.get(11..13)?).filter(|hour| *hour < 24)?;
    let minute = number(date.get(14..16)?).filter(|minute| *minute < 60)?;
    // 60 is a leap second.
    let second = number(date.get(17..19)?).filter(|second| *second <= 60)?;
    let zone = without_fraction(text.get(19..)?)?;
    let seconds = hour * 3600 + minute * 60 + second - offset(zone)?;
    Some(days_before(year, month, day) * 86_400 + seconds)
}

/// An unsigned decimal number of at most nine digits.
fn number(digits: &[u8]) -> Option<i64> {
    if digits.is_empty() || digits.len() > 9 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    core::str::from_utf8(digits).ok()?.parse().ok()
}

/// What follows a fraction of a second, if there is one.
fn without_fraction(text: &[u8]) -> Option<&[u8]> {
    match text.split_first() {
        Some((b',' | b'.', rest)) => {
            let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
            (digits > 0).then(|| rest.get(digits..))?
        }
        _ => Some(text),
    }
}

/// How far a zone such as `+01:00`, `-0130` or `Z` is ahead of UTC, in seconds.
fn offset(zone: &[u8]) -> Option<i64> {
    let (sign, digits) = match zone.split_first()? {
        (b'Z', []) => return Some(0),
        (b'+', digits) => (1, digits),
        (b'-', digits) => (-1, digits),
        _ => return None,
    };
    let minutes = match digits.len() {
        4 => digits.get(2..)?,
        5 if digits.get(2) == Some(&b':') => digits.get(3..)?,
        _ => return None,
    };
    let hours = number(digits.get(..2)?).filter(|hours| *hours < 24)?;
    let minutes = number(minutes).filter(|minutes| *minutes < 60)?;
    Some(sign * (hours * 3600 + minutes * 60))
}

const fn is_leap(year: i64) -> bool {
    year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)
}

const fn days_in(year: i64, month: i64) -> i64 {
    match month {
        2 if is_leap(year) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days from the beginning of 1970 to this day.
fn days_before(year: i64, month: i64, day: i64) -> i64 {
    let leap_days = |year: i64| {
        let last = year - 1;
        last / 4 - last / 100 + last / 400
    };
    let months: i64 = (1..month).map(|month| days_in(year, month)).sum();
    (year - 1970) * 365 + leap_days(year) - leap_days(1970) + months + day - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_times_have_their_seconds() {
        for (text, seconds) in [
            ("1970-01-01T00:00:00+00:00", 0),
            ("2026-11-23T04:39:00+00:00\n", 1_795_408_740),
            ("2026-11-23T05:39:00+0100", 1_795_408_740),
            ("2026-11-23T04:39:00,123456789+00:00", 1_795_408_740),
            ("2000-02-29T12:00:00Z", 951_825_600),
            ("2024-12-31T23:59:60-00:30", 1_735_691_400),
            ("1969-12-31T23:59:59+00:00", -1),
        ] {
            assert_eq!(parse(text), Some(seconds), "{text}");
        }
    }

    #[test]
    fn what_is_no_time_is_refused() {
        for bad in [
            "",
            "now",
            "2026-11-23",
            "2026-11-23T04:39:00",
            "2026-13-01T00:00:00Z",
            "2026-02-29T00:00:00Z",
            "2026-11-23T24:00:00Z",
            "2026-11-23T04:60:00Z",
            "2026-11-23 04:39:00Z",
            "2026-11-23T04:39:00,Z",
            "2026-11-23T04:39:00+1",
            "2026-11-23T04:39:00+0000x",
            "+026-11-23T04:39:00Z",
            "2026-11-23T04:39:00+24:00",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
