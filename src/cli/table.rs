//! Columns for people: each as wide as its widest cell, separated by two blanks.

/// The rows as text, one line each, without trailing blanks.
pub(crate) fn format_table(rows: &[Vec<String>]) -> String {
    let column_count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width_of = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..column_count).map(width_of).collect();
    let mut text = String::new();
    for row in rows {
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
