//! Columns for people: each as wide as its widest cell, separated by two blanks.

use crate::telemetry::printable;

/// The rows as text, one line each, without trailing blanks. Cells may hold anything.
pub(crate) fn format_table(rows: &[Vec<String>]) -> String {
    let rows: Vec<Vec<_>> =
        rows.iter().map(|row| row.iter().map(|cell| printable(cell)).collect()).collect();
    let column_count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width_of = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..column_count).map(width_of).collect();
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        let line = cells.collect::<Vec<_>>().join("  ");
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// A size for people: three digits and a binary unit. 1536 is `1.50 KiB`.
pub(crate) fn format_bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    // Ten bits are one unit; 63 bits are six of them.
    let mut unit = 0;
    while unit + 1 < UNITS.len() && bytes >> (10 * (unit + 2)) > 0 {
        unit += 1;
    }
    let shift = 10 * (unit + 1);
    let (whole, rest) = (bytes >> shift, bytes & ((1 << shift) - 1));
    // Hundredths, cut off: a size never looks larger than it is. The rest is below 2^60.
    let hundredths = ((rest >> (shift - 10)) * 100) >> 10;
    let name = UNITS.get(unit).unwrap_or(&"");
    match whole {
        0..=9 => format!("{whole}.{hundredths:02} {name}"),
        10..=99 => format!("{whole}.{} {name}", hundredths / 10),
        _ => format!("{whole} {name}"),
    }
}

/// A moment as people write it, in UTC: `2023-11-14 22:13:20.123Z`.
pub(crate) fn format_utc(unix_ms: u64) -> String {
    let (seconds, ms) = (unix_ms / 1000, unix_ms % 1000);
    let (mut day, second) = (seconds / 86_400, seconds % 86_400);
    let is_leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    // The calendar repeats after 400 years, so that no year costs more than 400 steps.
    let mut year = 1970 + day / 146_097 * 400;
    day %= 146_097;
    loop {
        let days = if is_leap(year) { 366 } else { 365 };
        if day < days {
            break;
        }
        (day, year) = (day - days, year + 1);
    }
    let february = if is_leap(year) { 29 } else { 28 };
    let mut month = 1;
    for days in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if day < days {
            break;
        }
        (day, month) = (day - days, month + 1);
    }
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{:02} {hour:02}:{minute:02}:{second:02}.{ms:03}Z", day + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let row = |cells: &[&str]| cells.iter().map(|&cell| cell.to_owned()).collect();
        let rows: Vec<Vec<String>> = vec![row(&["ID", "STATE"]), row(&["10", "x", "long"])];
        assert_eq!(format_table(&rows), "ID  STATE\n10  x      long\n");
        assert_eq!(format_table(&[]), "");
    }

    #[test]
    fn moments_are_told_in_utc() {
        for (unix_ms, text) in [
            (0, "1970-01-01 00:00:00.000Z"),
            (951_782_399_999, "2000-02-28 23:59:59.999Z"),
            (951_782_400_000, "2000-02-29 00:00:00.000Z"),
            (1_709_251_199_000, "2024-02-29 23:59:59.000Z"),
            (1_700_000_000_123, "2023-11-14 22:13:20.123Z"),
            (1_735_689_599_001, "2024-12-31 23:59:59.001Z"),
            (4_107_542_400_000, "2100-03-01 00:00:00.000Z"),
            (12_622_780_800_000, "2370-01-01 00:00:00.000Z"),
        ] {
            assert_eq!(format_utc(unix_ms), text);
        }
        assert!(format_utc(u64::MAX).ends_with(".615Z"), "any number is a moment");
    }

    #[test]
    fn a_cell_cannot_leave_its_line() {
        let rows = [vec!["/a\n9  forged".to_owned(), "\u{1b}c".to_owned()], vec!["x".repeat(14)]];
        assert_eq!(format_table(&rows), "/a\\n9  forged   \\u{1b}c\nxxxxxxxxxxxxxx\n");
    }

    #[test]
    fn sizes_have_three_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (1536, "1.50 KiB"),
            (10 * 1024 + 512, "10.5 KiB"),
            (1024 * 1024 - 1, "1023 KiB"),
            (64 << 30, "64.0 GiB"),
            (u64::MAX, "15.9 EiB"),
        ] {
            assert_eq!(format_bytes(bytes), text);
        }
    }
}
