//! Rust source without its comments and literals, as tokens with line numbers.
//!
//! Not a parser: the rules need to know what is code and what is text, which braces match, and
//! which paths are written. That much a few hundred lines do without a dependency.

/// One word or one punctuation mark (`::` is one) of code. Literals are a single `""`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Token {
    /// Counted from 1.
    pub(crate) line: usize,
    pub(crate) text: String,
}

/// Cuts `source` into tokens; comments vanish.
pub(crate) fn tokens(source: &str) -> Vec<Token> {
    let chars: Vec<char> = source.chars().collect();
    let mut cursor = Cursor { chars: &chars, at: 0, line: 1 };
    let mut found = Vec::new();
    while let Some(c) = cursor.peek(0) {
        let line = cursor.line;
        let text = match c {
            '/' if cursor.peek(1) == Some('/') => cursor.skip_line(),
            '/' if cursor.peek(1) == Some('*') => cursor.skip_block_comment(),
            '"' => cursor.skip_string(),
            '\'' => cursor.skip_quote(),
            c if c.is_whitespace() => {
                cursor.bump();
                None
            }
            c if c.is_alphanumeric() || c == '_' => cursor.word(),
            ':' if cursor.peek(1) == Some(':') => {
                cursor.skip(2);
                Some("::".to_owned())
            }
            c => {
                cursor.bump();
                Some(c.to_string())
            }
        };
        found.extend(text.map(|text| Token { line, text }));
    }
    found
}

struct Cursor<'a> {
    chars: &'a [char],
    at: usize,
    line: usize,
}

impl Cursor<'_> {
    fn peek(&self, ahead: usize) -> Option<char> {
        self.chars.get(self.at + ahead).copied()
    }

    fn bump(&mut self) {
        if self.peek(0) == Some('\n') {
            self.line += 1;
        }
        self.at += 1;
    }

    fn skip(&mut self, count: usize) {
        for _ in 0..count {
            self.bump();
        }
    }

    fn skip_line(&mut self) -> Option<String> {
        while self.peek(0).is_some_and(|c| c != '\n') {
            self.bump();
        }
        None
    }

    fn skip_block_comment(&mut self) -> Option<String> {
        let mut depth = 0_usize;
        while let Some(c) = self.peek(0) {
            match (c, self.peek(1)) {
                ('/', Some('*')) => depth += 1,
                ('*', Some('/')) => depth -= 1,
                _ => {
                    self.bump();
                    continue;
                }
            }
            self.skip(2);
            if depth == 0 {
                break;
            }
        }
        None
    }

    fn skip_string(&mut self) -> Option<String> {
        self.bump();
        while let Some(c) = self.peek(0) {
            self.skip(if c == '\\' { 2 } else { 1 });
            if c == '"' {
                break;
            }
        }
        Some("\"\"".to_owned())
    }

    /// A raw string whose `hashes` and opening quote come next.
    fn skip_raw_string(&mut self, hashes: usize) -> Option<String> {
        self.skip(hashes + 1);
        while let Some(c) = self.peek(0) {
            let closes = c == '"' && (1..=hashes).all(|n| self.peek(n) == Some('#'));
            self.bump();
            if closes {
                self.skip(hashes);
                break;
            }
        }
        Some("\"\"".to_owned())
    }

    /// A character literal or a lifetime: only a literal closes its quote.
    fn skip_quote(&mut self) -> Option<String> {
        let literal = self.peek(1) == Some('\\') || self.peek(2) == Some('\'');
        self.bump();
        if !literal {
            while self.peek(0).is_some_and(|c| c.is_alphanumeric() || c == '_') {
                self.bump();
            }
            return None;
        }
        while let Some(c) = self.peek(0) {
            self.skip(if c == '\\' { 2 } else { 1 });
            if c == '\'' {
                break;
            }
        }
        Some("\"\"".to_owned())
    }

    fn word(&mut self) -> Option<String> {
        let start = self.at;
        while self.peek(0).is_some_and(|c| c.is_alphanumeric() || c == '_') {
            self.bump();
        }
        let text: String = self.chars[start..self.at].iter().collect();
        let hashes = (0..).take_while(|&n| self.peek(n) == Some('#')).count();
        match text.as_str() {
            "r" | "br" | "cr" if self.peek(hashes) == Some('"') => self.skip_raw_string(hashes),
            "b" | "c" if self.peek(0) == Some('"') => self.skip_string(),
            "b" if self.peek(0) == Some('\'') => self.skip_quote(),
            _ => Some(text),
        }
    }
}

/// A path as written; what follows generic arguments is left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PathUse {
    pub(crate) line: usize,
    pub(crate) segments: Vec<String>,
    /// How many inline `mod name { ... }` enclose it.
    pub(crate) inline_modules: usize,
    /// Inside an item marked `#[cfg(test)]`.
    pub(crate) in_test: bool,
}

/// Every path in the code. `use a::{b, c::d}` gives `a::b` and `a::c::d`.
pub(crate) fn paths(tokens: &[Token]) -> Vec<PathUse> {
    let scopes = scopes(tokens);
    let mut found = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        let follows = at > 0 && tokens[at - 1].text == "::";
        let starts = is_name(&tokens[at].text) && text(tokens, at + 1) == "::" && !follows;
        if !starts {
            at += 1;
            continue;
        }
        let mut tree = Vec::new();
        let (inline_modules, in_test) = scopes[at];
        at = path_tree(tokens, at, &[], &mut tree);
        for (line, segments) in tree {
            found.push(PathUse { line, segments, inline_modules, in_test });
        }
    }
    found
}

/// Reads one path, with groups where it has any, from `at`; returns where it ends.
fn path_tree(
    tokens: &[Token],
    mut at: usize,
    prefix: &[String],
    found: &mut Vec<(usize, Vec<String>)>,
) -> usize {
    let mut segments = prefix.to_vec();
    let line = tokens[at].line;
    loop {
        match text(tokens, at) {
            "{" => {
                at += 1;
                while !matches!(text(tokens, at), "}" | "") {
                    let end = path_tree(tokens, at, &segments, found);
                    at = if end == at { at + 1 } else { end };
                }
                return at + 1;
            }
            name if is_name(name) || name == "*" => segments.push(name.to_owned()),
            _ => break,
        }
        at += 1;
        if text(tokens, at) != "::" {
            break;
        }
        at += 1;
    }
    if segments.len() > prefix.len() {
        found.push((line, segments));
    }
    // `a as b`: the new name is no path.
    if text(tokens, at) == "as" { at + 2 } else { at }
}

/// For every token: how many inline modules enclose it, and whether one is test code.
fn scopes(tokens: &[Token]) -> Vec<(usize, bool)> {
    let mut stack: Vec<(bool, bool)> = Vec::new();
    let mut scopes = Vec::with_capacity(tokens.len());
    let (mut pending_test, mut pending_module) = (false, false);
    for (at, token) in tokens.iter().enumerate() {
        match token.text.as_str() {
            "cfg" if text(tokens, at + 1) == "(" => {
                let marks = |n| text(tokens, at + n) == "test";
                let all = text(tokens, at + 2) == "all";
                pending_test |= marks(2) || all && (3..8).any(marks);
            }
            "mod" if text(tokens, at + 2) == "{" => pending_module = true,
            ";" => (pending_test, pending_module) = (false, false),
            "{" => {
                stack.push((pending_module, pending_test));
                (pending_test, pending_module) = (false, false);
            }
            "}" => {
                stack.pop();
            }
            _ => {}
        }
        let modules = stack.iter().filter(|(module, _)| *module).count();
        scopes.push((modules, stack.iter().any(|(_, test)| *test)));
    }
    scopes
}

/// The text of the token at `at`, or nothing behind the end.
pub(crate) fn text(tokens: &[Token], at: usize) -> &str {
    tokens.get(at).map_or("", |token| token.text.as_str())
}

fn is_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_alphabetic() || c == '_')
}
