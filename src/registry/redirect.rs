//! Where a redirect leads, how long that is good for, and who may see the credentials.

use super::blob_url::Origin;
use crate::limits::REDIRECT_SECONDS_DEFAULT;
use reqwest::Url;
use std::ops::Range;
use std::time::{Duration, SystemTime};

/// The statuses that name another place.
#[must_use]
pub(super) const fn is_redirect(status: u16) -> bool {
    matches!(status, 301 | 302 | 303 | 307 | 308)
}

/// Where `location` leads from `from`.
///
/// # Errors
/// Why nobody should go there, without repeating it: signatures are in it.
pub(super) fn target(from: &Url, location: &str) -> Result<Url, &'static str> {
    let url = from.join(location).map_err(|_| "a redirect to what is no URL")?;
    if Origin::of(&url).is_none() {
        return Err("a redirect to a scheme other than https and http");
    }
    if from.scheme() == "https" && url.scheme() != "https" {
        return Err("a redirect from https to http");
    }
    Ok(url)
}

/// Whether a request to `url` may carry what `origin` was to see.
#[must_use]
pub(super) fn may_carry(origin: &Origin, url: &Url) -> bool {
    Origin::of(url).as_ref() == Some(origin)
}

/// Bytes of a path that are shown: a repository's name and a digest. A server may send us to one of
/// 60 KB, and each failed read would log it.
const SHOWN_PATH_BYTES_MAX: usize = 400;

/// A URL as it may be shown: without user, query and fragment, in which signatures are.
#[must_use]
pub(super) fn shown(url: &Url) -> String {
    let Some(origin) = Origin::of(url) else { return "(no URL)".to_owned() };
    // A parsed path is ASCII.
    match url.path().get(..SHOWN_PATH_BYTES_MAX) {
        Some(front) => format!("{origin}{front}..."),
        None => format!("{origin}{}", url.path()),
    }
}

/// How long `url` is good for from `now` on: what its signature says, in the spelling of any of the
/// large stores, else what `cache_control` says, else
/// [`REDIRECT_SECONDS_DEFAULT`]. A tenth of it is left unused, so that a request does not
/// start with its last breath.
#[must_use]
pub(super) fn lifetime(url: &Url, cache_control: Option<&str>, now: SystemTime) -> Duration {
    let signed = expiry(url).map(|end| end.duration_since(now).unwrap_or_default());
    let stated = cache_control.and_then(max_age).map(Duration::from_secs);
    let default = Duration::from_secs(REDIRECT_SECONDS_DEFAULT);
    // A day is as good as for ever, and cannot overflow a clock.
    let longest = Duration::from_secs(86_400);
    let whole = match (signed, stated) {
        (Some(signed), Some(stated)) => signed.min(stated),
        (Some(only), None) | (None, Some(only)) => only,
        (None, None) => default,
    };
    whole.min(longest).mul_f64(0.9)
}

/// `max-age` of a `Cache-Control`; 0 for an answer that must not be kept.
fn max_age(header: &str) -> Option<u64> {
    let mut directives = header.split(',').map(str::trim);
    if header.split(',').any(|word| ["no-store", "no-cache"].contains(&word.trim())) {
        return Some(0);
    }
    directives.find_map(|directive| directive.strip_prefix("max-age=")?.parse().ok())
}

/// When the signature in `url` ends.
fn expiry(url: &Url) -> Option<SystemTime> {
    let get = |name: &str| {
        let found = url.query_pairs().find(|(key, _)| key.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.into_owned())
    };
    let after = |start: SystemTime, seconds: &str| {
        start.checked_add(Duration::from_secs(seconds.parse().ok()?))
    };
    let since = |date: &str, seconds: &str| {
        after(get(date).and_then(|date| compact_time(&date))?, &get(seconds)?)
    };
    since("X-Amz-Date", "X-Amz-Expires")
        .or_else(|| since("X-Goog-Date", "X-Goog-Expires"))
        // Azure.
        .or_else(|| get("se").and_then(|date| compact_time(&date)))
        // CloudFront, and the older signatures of the others: seconds since 1970.
        .or_else(|| after(SystemTime::UNIX_EPOCH, &get("Expires")?))
}

/// `20130524T000000Z` or `2013-05-24T00:00:00Z`, as a time.
fn compact_time(text: &str) -> Option<SystemTime> {
    let digits: String = text.chars().filter(|c| !matches!(c, '-' | ':')).collect();
    let (day, time) = digits.strip_suffix('Z')?.split_once('T')?;
    let is_number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if !is_number(day) || !is_number(time) || day.len() != 8 || !matches!(time.len(), 4 | 6) {
        return None;
    }
    let part = |text: &str, at: Range<usize>| text.get(at)?.parse::<u64>().ok();
    let (year, month, day) = (part(day, 0..4)?, part(day, 4..6)?, part(day, 6..8)?);
    let (hour, minute) = (part(time, 0..2)?, part(time, 2..4)?);
    let second = if time.len() == 6 { part(time, 4..6)? } else { 0 };
    if !(1970..=9999).contains(&year) || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    if hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let days = days_since_1970(year, month, day);
    let seconds = ((days * 24 + hour) * 60 + minute) * 60 + second;
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

/// Days from 1970 to a date of the Gregorian calendar from 1970 on.
fn days_since_1970(year: u64, month: u64, day: u64) -> u64 {
    // Years that begin in March have their odd day at their end.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let leap_days = year / 4 - year / 100 + year / 400;
    // 719,468 days are from the first of March of year 0 to 1970.
    year * 365 + leap_days + (month * 153 + 2) / 5 + (day - 1) - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(text: &str) -> Url {
        Url::parse(text).unwrap()
    }

    #[test]
    fn a_url_is_shown_without_its_secrets_and_not_at_any_length() {
        let long = format!("https://u:p@h/{}?sig=x", "a".repeat(60_000));
        let expected = format!("https://h/{}...", "a".repeat(SHOWN_PATH_BYTES_MAX - 1));
        assert_eq!(shown(&url(&long)), expected);
        assert_eq!(shown(&url("https://u:p@h/a?sig=x#y")), "https://h/a");
    }

    #[test]
    fn signed_urls_are_good_for_as_long_as_they_say() {
        // 2013-05-24T00:00:00Z.
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_369_353_600);
        for (query, cache_control, seconds) in [
            ("X-Amz-Date=20130524T000000Z&X-Amz-Expires=1200", None, 1080),
            ("X-Amz-Date=20130523T235000Z&X-Amz-Expires=1200", None, 540),
            ("X-Amz-Date=20130523T000000Z&X-Amz-Expires=1200", None, 0),
            ("X-Goog-Date=20130524T000000Z&X-Goog-Expires=100", None, 90),
            ("sv=2020&se=2013-05-24T00%3A10%3A00Z&sig=x", None, 540),
            ("se=2013-05-24T00%3A10Z", None, 540),
            ("Expires=1369353700&Signature=x", None, 90),
            ("Expires=1369353700", Some("private, max-age=10"), 9),
            ("x=y", Some("max-age=100"), 90),
            ("x=y", Some("no-store"), 0),
            ("x=y", Some("public"), 270),
            ("x=y", None, 270),
            ("X-Amz-Date=20139924T000000Z&X-Amz-Expires=1200", None, 270),
            ("X-Amz-Date=20130524T000000Z&X-Amz-Expires=many", None, 270),
            ("X-Amz-Expires=1200", None, 270),
            ("Expires=99999999999999999999", None, 270),
            ("Expires=18446744073709551615", None, 270),
            ("Expires=9999999999", None, 77_760),
        ] {
            let url = url(&format!("https://store.example.com/x?{query}"));
            let found = lifetime(&url, cache_control, now);
            assert_eq!(found, Duration::from_secs(seconds), "{query}");
        }
    }

    #[test]
    fn days_are_counted_as_the_calendar_has_them() {
        for (date, days) in [
            ((1970, 1, 1), 0),
            ((1970, 3, 1), 59),
            ((2000, 2, 29), 11_016),
            ((2000, 3, 1), 11_017),
            ((2024, 12, 31), 20_088),
            ((2100, 3, 1), 47_541),
        ] {
            assert_eq!(days_since_1970(date.0, date.1, date.2), days, "{date:?}");
        }
    }

    #[test]
    fn redirects_lead_nowhere_unsafe() {
        let from = url("https://reg.example.com/v2/a/blobs/x");
        for (location, expected) in [
            ("https://cdn.example.com/y?sig=1", Ok("https://cdn.example.com/y?sig=1")),
            ("//cdn.example.com/y", Ok("https://cdn.example.com/y")),
            ("/y", Ok("https://reg.example.com/y")),
            ("http://cdn.example.com/y", Err("a redirect from https to http")),
            ("file:///etc/passwd", Err("a redirect to a scheme other than https and http")),
            ("https://", Err("a redirect to what is no URL")),
        ] {
            let found = target(&from, location);
            assert_eq!(found.as_ref().map(Url::as_str), expected.as_deref(), "{location}");
        }
        let plain = url("http://reg.example.com/x");
        assert!(target(&plain, "https://cdn.example.com/").is_ok());
    }

    #[test]
    fn credentials_stay_with_their_origin() {
        let origin = Origin::of(&url("https://reg.example.com/v2/")).unwrap();
        for (place, allowed) in [
            ("https://reg.example.com/elsewhere", true),
            ("https://REG.example.com:443/", true),
            ("http://reg.example.com/", false),
            ("https://reg.example.com:5000/", false),
            ("https://sub.reg.example.com/", false),
            ("https://evil-reg.example.com/", false),
        ] {
            assert_eq!(may_carry(&origin, &url(place)), allowed, "{place}");
        }
    }

    #[test]
    fn a_url_is_shown_without_its_secrets() {
        let secret = url("https://user:pw@cdn.example.com:8443/x/y?X-Amz-Signature=s#f");
        assert_eq!(shown(&secret), "https://cdn.example.com:8443/x/y");
    }
}
