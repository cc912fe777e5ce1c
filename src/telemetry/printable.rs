//! Text that came from elsewhere, made fit for a terminal and for one line of a log.
//!
//! Paths, UUIDs, digests and error texts may hold whatever a layer's author or a file's owner put
//! there: an escape sequence that rewrites the screen, a newline that forges a line of the log, a
//! mark that turns the reading direction. JSON has its own escapes and does not come here.

use std::borrow::Cow;
use std::io::{Result, Write};

/// `text` in one line that any terminal shows as it is: what would act instead of being seen is
/// written as Rust writes it (`\n`, `\u{1b}`). A backslash stays one; this is for eyes.
#[must_use]
pub fn printable(text: &str) -> Cow<'_, str> {
    if !text.contains(acts) {
        return Cow::Borrowed(text);
    }
    let mut seen = String::with_capacity(text.len() + 16);
    for character in text.chars() {
        if acts(character) {
            seen.extend(character.escape_default());
        } else {
            seen.push(character);
        }
    }
    Cow::Owned(seen)
}

/// Control characters, line and paragraph separators, and the marks that change the direction of
/// the text around them.
fn acts(character: char) -> bool {
    character.is_control()
        || matches!(character, '\u{61c}' | '\u{200e}' | '\u{200f}')
        || matches!(character, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Passes on what is written to it, each call as one printable line: `tracing_subscriber` formats
/// an event as a whole and writes it with one call.
#[derive(Debug)]
pub(super) struct Lines<W>(pub(super) W);

impl<W: Write> Write for Lines<W> {
    fn write(&mut self, event: &[u8]) -> Result<usize> {
        let line = event.strip_suffix(b"\n").unwrap_or(event);
        let text = String::from_utf8_lossy(line);
        // One call, so that the lines of several processes that share a log do not mix.
        self.0.write_all(format!("{}\n", printable(&text)).as_bytes())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_acts_on_a_terminal_is_escaped_and_nothing_else() {
        for (text, expected) in [
            ("", ""),
            ("plain /a/b c", "plain /a/b c"),
            ("a\\n", "a\\n"),
            ("two\nlines\r\n", "two\\nlines\\r\\n"),
            ("\u{1b}[2Jgone", "\\u{1b}[2Jgone"),
            ("tab\tnul\0bell\u{7}del\u{7f}", "tab\\tnul\\u{0}bell\\u{7}del\\u{7f}"),
            // The one-character form of the sequence introducer, which some terminals obey.
            ("\u{9b}31m", "\\u{9b}31m"),
            ("\u{202e}gpj.exe", "\\u{202e}gpj.exe"),
            ("\u{2028}", "\\u{2028}"),
            ("na\u{ef}ve \u{65e5}\u{672c}", "na\u{ef}ve \u{65e5}\u{672c}"),
        ] {
            assert_eq!(printable(text), expected);
        }
    }

    #[test]
    fn an_event_of_the_log_is_one_line_whatever_is_in_it() {
        let mut log = Vec::new();
        for event in [&b"WARN one\nERROR forged \x1b[31m\n"[..], b"INFO \xff\n", b"cut"] {
            Lines(&mut log).write_all(event).unwrap();
        }
        let expected = "WARN one\\nERROR forged \\u{1b}[31m\nINFO \u{fffd}\ncut\n";
        assert_eq!(String::from_utf8(log).unwrap(), expected);
    }
}
