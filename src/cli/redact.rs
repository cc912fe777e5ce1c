//! Secrets taken out of text that is going to be sent to strangers. Pure.
//!
//! Logs and errors may repeat URLs, headers and settings that people put credentials into. What
//! looks like one goes, and rather too much than too little: a report that lost a harmless word is
//! still a report. Handled are userinfo (`scheme://user:pass@host`, also without the scheme),
//! values of keys that sound secret (`"password": "x"`, `token=x`, `Authorization: Bearer x`,
//! `--secret x`, in JSON within JSON, too), bearer and basic credentials, and JSON web tokens
//! wherever they stand.

use serde_json::Value;

/// What stands in the place of a secret.
const REDACTED: &str = "[redacted]";

/// A key sounds secret when its letters and digits contain one of these.
const SECRET_WORDS: [&str; 16] = [
    "password",
    "passwd",
    "passphrase",
    "pwd",
    "secret",
    "token",
    "auth",
    "credential",
    "cred",
    "apikey",
    "accesskey",
    "privatekey",
    "signature",
    "cookie",
    "session",
    "bearer",
];

/// Whether the value of this key is to go.
fn is_secret_key(key: &str) -> bool {
    let letters = key.chars().filter(char::is_ascii_alphanumeric);
    let letters: String = letters.map(|letter| letter.to_ascii_lowercase()).collect();
    // Query parameters of signed URLs are as short as this.
    letters == "sig" || letters == "pass" || SECRET_WORDS.iter().any(|word| letters.contains(word))
}

/// The same facts without secrets: values of keys that sound secret go, other text is [`redact`]ed,
/// keys included.
pub(super) fn redact_facts(facts: Value) -> Value {
    match facts {
        Value::String(text) => Value::String(redact(&text)),
        Value::Array(items) => Value::Array(items.into_iter().map(redact_facts).collect()),
        Value::Object(fields) => {
            let redacted = fields.into_iter().map(|(key, value)| {
                let is_told = value.is_null() || value.is_boolean() || !is_secret_key(&key);
                let value = if is_told { redact_facts(value) } else { REDACTED.into() };
                (redact(&key), value)
            });
            Value::Object(redacted.collect())
        }
        other => other,
    }
}

/// The text without what looks like a secret, line by line.
pub(super) fn redact(text: &str) -> String {
    let lines = text.split_inclusive('\n').map(|line| {
        let (line, end) = line.strip_suffix('\n').map_or((line, ""), |line| (line, "\n"));
        redact_userinfo(&redact_web_tokens(&redact_values(line))) + end
    });
    lines.collect()
}

fn is_key_char(character: char) -> bool {
    character.is_ascii_alphanumeric() || matches!(character, '_' | '-' | '.')
}

/// Takes out the values of keys that sound secret.
fn redact_values(line: &str) -> String {
    let mut clean = String::with_capacity(line.len());
    let mut rest = line;
    while let Some(start) = rest.find(is_key_char) {
        let (before, from_key) = rest.split_at(start);
        clean.push_str(before);
        let end = from_key.find(|c| !is_key_char(c)).unwrap_or(from_key.len());
        let (key, behind) = from_key.split_at(end);
        clean.push_str(key);
        let value = secret_value(key, behind);
        rest = match value {
            Some((gap, end)) => {
                clean.push_str(behind.get(..gap).unwrap_or_default());
                clean.push_str(REDACTED);
                behind.get(end..).unwrap_or_default()
            }
            None => behind,
        };
    }
    clean + rest
}

/// Where the value of a secret key lies in the text behind the key, if there is one.
fn secret_value(key: &str, behind: &str) -> Option<(usize, usize)> {
    let scheme = matches!(key.to_ascii_lowercase().as_str(), "bearer" | "basic");
    if scheme && behind.starts_with(' ') {
        let gap = behind.len() - behind.trim_start().len();
        return value_end(behind, gap, ' ').filter(|end| *end > gap).map(|end| (gap, end));
    }
    if !is_secret_key(key) {
        return None;
    }
    // The key's own quotes, escaped as often as this JSON is within others.
    let after_quote = behind.trim_start_matches(['\\', '"', '\'', ']', ' ', '\t']);
    let separator = after_quote.chars().next();
    let separator = separator.filter(|c| matches!(c, ':' | '='));
    let is_flag = key.starts_with('-') && behind.starts_with(' ');
    let after = match separator {
        // `=>` and `:=` as well.
        Some(_) => after_quote.trim_start_matches([':', '=', '>', ' ', '\t']),
        None if is_flag => behind.trim_start(),
        None => return None,
    };
    let gap = behind.len() - after.len();
    let end = value_end(behind, gap, separator.unwrap_or(' '))?;
    (end > gap).then_some((gap, end))
}

/// Where the value ends that starts at `gap`: a quoted one with its quote, others where the
/// separator of their key lets them.
fn value_end(text: &str, gap: usize, separator: char) -> Option<usize> {
    let value = text.get(gap..)?;
    let opening: &str = {
        let slashes = value.len() - value.trim_start_matches('\\').len();
        let quoted = value.get(slashes..).is_some_and(|rest| rest.starts_with(['"', '\'']));
        value.get(..slashes + 1).filter(|_| quoted).unwrap_or("")
    };
    if !opening.is_empty() {
        let inner = value.get(opening.len()..)?;
        let closing = closing_quote(inner, opening);
        // A quote that is never closed: everything is suspect.
        return Some(closing.map_or(text.len(), |at| gap + opening.len() + at + opening.len()));
    }
    let stop: &[char] = match separator {
        // A header, or an object: nothing behind it is safe.
        ':' => &[],
        '=' => &[' ', '\t', '&', ';', ',', '"', '\'', ')', '>'],
        _ => &[' ', '\t', '"', '\'', ')'],
    };
    let end = value.find(stop).unwrap_or(value.len());
    Some(gap + end)
}

/// Where the quote that `opening` (slashes, then the quote) began is closed: by the same, with no
/// slash of its own ahead of it.
fn closing_quote(inner: &str, opening: &str) -> Option<usize> {
    let found = inner.match_indices(opening).map(|(at, _)| at);
    found.into_iter().find(|at| !inner.get(..*at).is_some_and(|before| before.ends_with('\\')))
}

/// Takes out JSON web tokens: three parts of base64 between dots, the first of them an object.
fn redact_web_tokens(line: &str) -> String {
    let mut clean = String::with_capacity(line.len());
    let mut rest = line;
    while let Some(start) = rest.find("eyJ") {
        let (before, token) = rest.split_at(start);
        clean.push_str(before);
        let end = token.find(|c| !is_key_char(c)).unwrap_or(token.len());
        let (token, behind) = token.split_at(end);
        let is_token = token.matches('.').count() >= 2;
        clean.push_str(if is_token { REDACTED } else { token });
        rest = behind;
    }
    clean + rest
}

/// Takes out what stands ahead of an `@` in a URL, and in words like `user:pass@host`.
fn redact_userinfo(line: &str) -> String {
    let mut clean = String::with_capacity(line.len());
    let mut rest = line;
    while let Some(start) = rest.find("://") {
        let (before, after) = rest.split_at(start + 3);
        clean.push_str(&redact_words(before));
        rest = match userinfo_end(after) {
            Some(end) => {
                clean.push_str(REDACTED);
                after.get(end..).unwrap_or_default()
            }
            None => {
                // The host and the rest of this word hold nothing more.
                let end = after.find([' ', '\t', '"', '\'']).unwrap_or(after.len());
                let end = after.find("://").map_or(end, |next| end.min(next));
                clean.push_str(after.get(..end).unwrap_or_default());
                after.get(end..).unwrap_or_default()
            }
        };
    }
    clean + &redact_words(rest)
}

/// Where the `@` is that ends the userinfo of the text behind `://`. The last one of the word: a
/// password may hold one that was not escaped, and slashes, too.
fn userinfo_end(after: &str) -> Option<usize> {
    let word_end = after.find([' ', '\t', '"', '\'', '<', '>', '`']).unwrap_or(after.len());
    let word = after.get(..word_end)?;
    let next_url = word.find("://").unwrap_or(word.len());
    if let Some(at) = word.get(..next_url)?.rfind('@') {
        return Some(at);
    }
    // A blank or a quote in the password: what follows the colon is no port.
    let authority = word.split(['/', '?', '#']).next().unwrap_or("");
    let (_, port) = authority.rsplit_once(':').filter(|_| !authority.starts_with('['))?;
    let is_port = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    let cut_off = word_end < after.len() && authority.len() == word.len() && !is_port;
    cut_off.then(|| after.find('@')).flatten()
}

/// Takes out `user:pass` of words like `user:pass@host`.
fn redact_words(text: &str) -> String {
    let is_end = |c: char| c.is_whitespace() || matches!(c, '"' | '\'' | '(' | '<' | '`' | ',');
    text.split_inclusive(is_end)
        .map(|word| match word.rfind('@') {
            Some(at) if word.get(..at).is_some_and(|before| before.contains(':')) => {
                format!("{REDACTED}{}", word.get(at..).unwrap_or_default())
            }
            _ => word.to_owned(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// No case may let through anything that says so.
    const SECRET: &str = "hunter2";

    #[test]
    fn credentials_in_urls_go_and_the_host_stays() {
        for (text, expected) in [
            ("https://u:hunter2@reg.example.com/v2/x", "https://[redacted]@reg.example.com/v2/x"),
            ("https://hunter2@reg.example.com", "https://[redacted]@reg.example.com"),
            ("HTTPS://u:hunter2@reg.example.com:5000/", "HTTPS://[redacted]@reg.example.com:5000/"),
            ("get https://u:p@hunter2@h/a: 404", "get https://[redacted]@h/a: 404"),
            ("https://u:p/hunter2@h/x", "https://[redacted]@h/x"),
            ("https://u:p#hunter2?@h/x", "https://[redacted]@h/x"),
            ("\"https://u:hunter2@h\"", "\"https://[redacted]@h\""),
            ("https://u:hun ter2 hunter2@h/", "https://[redacted]@h/"),
            ("https://u:\"hunter2\"@h/", "https://[redacted]@h/"),
            ("http://a/ http://u:hunter2@b/", "http://a/ http://[redacted]@b/"),
            ("http://a,http://u:hunter2@b/", "http://a,http://[redacted]@b/"),
            ("p2p http://p/https://u:hunter2@b/", "p2p http://p/https://[redacted]@b/"),
            ("u:hunter2@reg.example.com/x", "[redacted]@reg.example.com/x"),
            ("via(u:hunter2@reg.example.com)", "via([redacted]@reg.example.com)"),
            ("a\nhttps://u:hunter2@h\nb", "a\nhttps://[redacted]@h\nb"),
            ("ftp://u:%68hunter2%40@h", "ftp://[redacted]@h"),
            // Nothing to hide.
            ("https://reg.example.com:5000/v2/x?y=1", "https://reg.example.com:5000/v2/x?y=1"),
            ("https://[::1]:5000/a b@c", "https://[::1]:5000/a b@c"),
            ("mail me@example.org", "mail me@example.org"),
            ("", ""),
        ] {
            assert_eq!(redact(text), expected, "{text}");
            assert!(!redact(text).contains(SECRET), "{text}");
        }
    }

    #[test]
    fn values_of_keys_that_sound_secret_go() {
        for (text, expected) in [
            ("password=hunter2 next", "password=[redacted] next"),
            ("PASSWD: hunter2 and more", "PASSWD: [redacted]"),
            ("Authorization: Bearer hunter2", "Authorization: [redacted]"),
            ("\"auth\": \"hunter2\", \"b\": 1", "\"auth\": [redacted], \"b\": 1"),
            ("\"auth\":\"hunter2\\\" hunter2\",1", "\"auth\":[redacted],1"),
            ("{\\\"token\\\":\\\"hunter2\\\",1", "{\\\"token\\\":[redacted],1"),
            ("'registry_token' => 'hunter2'", "'registry_token' => [redacted]"),
            ("\"auths\":{\"r\":{\"x\":\"hunter2\"}}", "\"auths\":[redacted]"),
            ("\"secret\": \"hunter2", "\"secret\": [redacted]"),
            ("u?a=1&X-Amz-Signature=hunter2&b=2", "u?a=1&X-Amz-Signature=[redacted]&b=2"),
            ("u?sig=hunter2&b=2", "u?sig=[redacted]&b=2"),
            ("run --password hunter2 x", "run --password [redacted] x"),
            ("--api-key=hunter2 x", "--api-key=[redacted] x"),
            ("sent bearer hunter2 to x", "sent bearer [redacted] to x"),
            ("sent Basic hunter2== to x", "sent Basic [redacted] to x"),
            ("credentialFilePath: /etc/hunter2", "credentialFilePath: [redacted]"),
            ("AWS_SECRET_ACCESS_KEY=hunter2", "AWS_SECRET_ACCESS_KEY=[redacted]"),
            ("a.token = \"hunter2\"", "a.token = [redacted]"),
            ("env[\"TOKEN\"]=hunter2", "env[\"TOKEN\"]=[redacted]"),
            ("id eyJhbGciOi.eyJzdWIi.hunter2-x end", "id [redacted] end"),
            // Nothing to hide.
            ("layer 3: password", "layer 3: password"),
            ("depth=128 id: 3", "depth=128 id: 3"),
            ("eyJ is a start", "eyJ is a start"),
        ] {
            assert_eq!(redact(text), expected, "{text}");
            assert!(!redact(text).contains(SECRET), "{text}");
        }
    }

    #[test]
    fn facts_lose_secret_keys_at_any_depth_and_secrets_in_any_text() {
        let facts = json!({
            "config": "/images/a.json",
            "log": ["GET https://u:hunter2@h/", {"auth": {"deep": ["hunter2"]}}],
            "credentialConfig": {"mode": "file", "path": "hunter2"},
            "password": 7,
            "token": null,
            "authenticated": true,
            "https://u:hunter2@h": 1,
        });
        let expected = json!({
            "config": "/images/a.json",
            "log": ["GET https://[redacted]@h/", {"auth": "[redacted]"}],
            "credentialConfig": "[redacted]",
            "password": "[redacted]",
            "token": null,
            "authenticated": true,
            "https://[redacted]@h": 1,
        });
        assert_eq!(redact_facts(facts), expected);
    }

    #[test]
    fn no_text_makes_it_panic_and_what_is_clean_stays() {
        for text in [
            "://",
            "@",
            ":@",
            "auth:",
            "auth=\"",
            "token=\\",
            "\u{e9}://\u{e9}:\u{e9}@\u{e9}",
            "a:\u{e9}@",
            "bearer ",
            "--token ",
            "eyJ",
            "\"\\\\\"",
            "auth\u{e9}=x",
            "= = =",
            "password==\u{1f600}",
        ] {
            let once = redact(text);
            assert_eq!(redact(&once), once, "{text}");
        }
    }
}
