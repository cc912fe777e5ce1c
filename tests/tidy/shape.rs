//! The shape of the code: lengths, characters, banned words, `unsafe` and the limits' reasons.

use crate::lexer::{self, text};
use crate::{SourceFile, Violation};

/// Lines of one function, braces included: what fits on a screen.
const FUNCTION_LINES_MAX: usize = 70;
/// Lines of one file, tests included.
const FILE_LINES_MAX: usize = 800;
/// Columns of one line.
const LINE_COLUMNS_MAX: usize = 100;

/// Words that mean "not finished". Halved, so that this file may name them.
const BANNED_WORDS: &[&str] =
    &[concat!("FIX", "ME"), concat!("TO", "DO"), concat!("XX", "X"), concat!("HA", "CK")];

/// Macros that must not be called.
const BANNED_MACROS: &[&str] = &["todo", "unimplemented", "dbg"];

/// The only places where `unsafe` may stand: the kernel interface, the mapped files, and one
/// file of vector instructions under `src/map/`. Besides, a benchmark that maps the file whose
/// copying is its floor, and the test that stands in for the C library's heap to count what the
/// codecs take: neither is in the program.
const UNSAFE_ROOMS: &[&str] = &[
    "src/ublk/",
    "src/source/mmap.rs",
    "src/source/shared_memory.rs",
    "benches/read_random.rs",
    "tests/no_allocation.rs",
];

/// How many lines above a block its SAFETY comment may start.
const SAFETY_REACH_LINES: usize = 12;

/// Lengths, characters and words: for Rust and shell files alike.
pub(crate) fn check_text(file: &SourceFile) -> Vec<Violation> {
    let mut found = Vec::new();
    let lines = file.text.lines().count();
    if lines > FILE_LINES_MAX {
        found.push(file.violation(lines, format!("{lines} lines, at most {FILE_LINES_MAX}")));
    }
    for (number, line) in (1..).zip(file.text.lines()) {
        let columns = line.chars().count();
        // Shell has no formatter, and breaking its long words often makes them harder to read.
        if file.path.ends_with(".rs") && columns > LINE_COLUMNS_MAX {
            let told = format!("{columns} columns, at most {LINE_COLUMNS_MAX}");
            found.push(file.violation(number, told));
        }
        if let Some(odd) = line.chars().find(|c| !c.is_ascii()) {
            found.push(file.violation(number, format!("{odd:?} is not ASCII")));
        }
        if line.ends_with([' ', '\t']) {
            found.push(file.violation(number, "white space at the end".to_owned()));
        }
        let banned = words(line).find(|word| BANNED_WORDS.contains(word));
        found.extend(banned.map(|word| file.violation(number, format!("the word {word}"))));
    }
    if !file.text.is_empty() && !file.text.ends_with('\n') {
        found.push(file.violation(lines, "no newline at the end".to_owned()));
    }
    found
}

fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split(|c: char| !c.is_alphanumeric() && c != '_')
}

/// Functions that are too long and macros that must not be called.
pub(crate) fn check_code(file: &SourceFile) -> Vec<Violation> {
    let tokens = lexer::tokens(&file.text);
    let mut found = Vec::new();
    for at in 0..tokens.len() {
        let word = text(&tokens, at);
        let line = tokens[at].line;
        if BANNED_MACROS.contains(&word) && text(&tokens, at + 1) == "!" {
            found.push(file.violation(line, format!("a call of {word}!")));
        }
        let name = text(&tokens, at + 1);
        if word != "fn" || name == "(" {
            continue;
        }
        let Some(end) = body_end(&tokens, at) else { continue };
        let lines = tokens[end].line - line + 1;
        if lines > FUNCTION_LINES_MAX {
            let told = format!("fn {name} has {lines} lines, at most {FUNCTION_LINES_MAX}");
            found.push(file.violation(line, told));
        }
    }
    found
}

/// The brace that closes the function whose `fn` is at `at`; `None` for a mere declaration.
fn body_end(tokens: &[lexer::Token], at: usize) -> Option<usize> {
    let mut depth = 0_i64;
    let mut in_body = false;
    for (index, token) in tokens.iter().enumerate().skip(at) {
        match token.text.as_str() {
            ";" if depth == 0 => return None,
            "{" if depth == 0 => (depth, in_body) = (1, true),
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth -= 1,
            _ => {}
        }
        if in_body && depth == 0 {
            return Some(index);
        }
    }
    None
}

/// `unsafe` only in its rooms, and never without its reason.
pub(crate) fn check_unsafe(files: &[SourceFile]) -> Vec<Violation> {
    let mut found = Vec::new();
    let mut vector_file: Option<&str> = None;
    for file in files.iter().filter(|file| file.path.ends_with(".rs")) {
        let tokens = lexer::tokens(&file.text);
        let lines: Vec<&str> = file.text.lines().collect();
        for at in 0..tokens.len() {
            let line = tokens[at].line;
            if tokens[at].text != "unsafe" {
                continue;
            }
            let mut allowed = UNSAFE_ROOMS.iter().any(|room| file.path.starts_with(room));
            if file.path.starts_with("src/map/") {
                allowed = *vector_file.get_or_insert(&file.path) == file.path;
            }
            if !allowed {
                found.push(file.violation(line, "unsafe outside its rooms".to_owned()));
            }
            let first = line.saturating_sub(SAFETY_REACH_LINES + 1);
            let told = lines[first..line].iter().any(|above| above.contains("SAFETY:"));
            if matches!(text(&tokens, at + 1), "{" | "impl") && !told {
                found.push(file.violation(line, "unsafe without a SAFETY comment".to_owned()));
            }
        }
    }
    found
}

/// Every bound says what it bounds and why.
pub(crate) fn check_limits(file: &SourceFile) -> Vec<Violation> {
    let mut found = Vec::new();
    let mut documented = false;
    for (number, line) in (1..).zip(file.text.lines()) {
        if line.trim_start().starts_with("pub const ") && !documented {
            found.push(file.violation(number, "a limit without its reason".to_owned()));
        }
        documented = line.trim_start().starts_with("///");
    }
    found
}
