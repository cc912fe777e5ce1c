//! `WWW-Authenticate`: what a server wants to see before it answers.
//!
//! The grammar is that of RFC 9110, section 11: one header may hold several challenges, each a
//! scheme with either one opaque token or named parameters, all separated by commas. Parsing is
//! bytes in, values out; a header that breaks off keeps the challenges before the break.

/// One challenge of a `WWW-Authenticate` header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Challenge {
    /// The scheme in lower case: `bearer`, `basic`.
    pub(super) scheme: String,
    /// The parameters in their order, names in lower case.
    pub(super) parameters: Vec<(String, String)>,
}

impl Challenge {
    /// The value of the first parameter of that name.
    #[must_use]
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        let found = self.parameters.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.as_str())
    }
}

/// What we can do about a challenge.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Wanted {
    /// A token that `realm` gives out.
    Bearer {
        /// URL of the token server.
        realm: String,
        /// What the token server calls this registry; may be absent.
        service: Option<String>,
        /// What the token is to allow; may be absent.
        scope: Option<String>,
    },
    /// Name and password themselves.
    Basic,
}

/// The best thing that can be done about the challenges of an answer: a token before a password.
/// `None` when none of them is of a scheme that we speak.
#[must_use]
pub(super) fn wanted<'a>(headers: impl IntoIterator<Item = &'a str>) -> Option<Wanted> {
    let all: Vec<Challenge> = headers.into_iter().flat_map(parse).collect();
    let bearer = all.iter().filter(|challenge| challenge.scheme == "bearer").find_map(|found| {
        let owned = |name| found.get(name).filter(|value| !value.is_empty()).map(str::to_owned);
        Some(Wanted::Bearer {
            realm: owned("realm")?,
            service: owned("service"),
            scope: owned("scope"),
        })
    });
    bearer.or_else(|| {
        all.iter().any(|challenge| challenge.scheme == "basic").then_some(Wanted::Basic)
    })
}

/// The challenges of one header.
#[must_use]
pub(super) fn parse(header: &str) -> Vec<Challenge> {
    let mut found: Vec<Challenge> = Vec::new();
    let mut rest = header;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let Some((name, after)) = token(rest) else { return found };
        let value = after.trim_start_matches([' ', '\t']).strip_prefix('=');
        match (value, found.last_mut()) {
            (Some(value), Some(challenge)) => {
                let value = value.trim_start_matches([' ', '\t']);
                let Some((value, after)) = quoted(value).or_else(|| unquoted(value)) else {
                    // Half a challenge asks for nothing that could be answered.
                    found.pop();
                    return found;
                };
                challenge.parameters.push((name.to_ascii_lowercase(), value));
                rest = after;
            }
            (Some(_), None) => return found,
            (None, _) => {
                let scheme = name.to_ascii_lowercase();
                found.push(Challenge { scheme, parameters: Vec::new() });
                rest = after_opaque(after).unwrap_or(after);
            }
        }
    }
}

/// A token of RFC 9110 at the start of `text`, and what follows it.
fn token(text: &str) -> Option<(&str, &str)> {
    let is_token = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
    let end = text.find(|c| !is_token(c)).unwrap_or(text.len());
    (end > 0).then(|| text.split_at(end))
}

/// The value of a parameter without quotes. Some registries put bare URLs there, which the grammar
/// forbids and which are clear all the same.
fn unquoted(text: &str) -> Option<(String, &str)> {
    let end = text.find([',', ' ', '\t', '"']).unwrap_or(text.len());
    let (value, rest) = text.split_at(end);
    (!rest.starts_with('"')).then(|| (value.to_owned(), rest))
}

/// A quoted string, without its quotes and escapes; `None` if it does not end.
fn quoted(text: &str) -> Option<(String, &str)> {
    let inner = text.strip_prefix('"')?;
    let mut value = String::new();
    let mut chars = inner.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return inner.get(at + 1..).map(|rest| (value, rest)),
            '\\' => value.push(chars.next()?.1),
            _ => value.push(c),
        }
    }
    None
}

/// What follows the opaque token of a scheme such as Negotiate, if there is one.
fn after_opaque(text: &str) -> Option<&str> {
    let opaque = text.trim_start_matches([' ', '\t']);
    let is_opaque = |c: char| c.is_ascii_alphanumeric() || "-._~+/".contains(c);
    let end = opaque.find(|c| !is_opaque(c)).unwrap_or(opaque.len());
    let rest = opaque.get(end..)?.trim_start_matches('=').trim_start_matches([' ', '\t']);
    (end > 0 && opaque.len() < text.len() && (rest.is_empty() || rest.starts_with(',')))
        .then_some(rest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Option<Wanted> {
        Some(Wanted::Bearer {
            realm: realm.to_owned(),
            service: service.map(str::to_owned),
            scope: scope.map(str::to_owned),
        })
    }

    #[test]
    fn the_challenges_of_real_registries_are_understood() {
        let hub = concat!(
            r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io","#,
            r#"scope="repository:library/redis:pull""#
        );
        for (header, expected) in [
            (
                hub,
                bearer(
                    "https://auth.docker.io/token",
                    Some("registry.docker.io"),
                    Some("repository:library/redis:pull"),
                ),
            ),
            // A scope of several actions holds a comma, within its quotes.
            (
                r#"Bearer realm="https://r/t",scope="repository:a/b:pull,push""#,
                bearer("https://r/t", None, Some("repository:a/b:pull,push")),
            ),
            (
                r#"bearer REALM="https://r/t" , Service = "s""#,
                bearer("https://r/t", Some("s"), None),
            ),
            (r#"Bearer realm=https://r/t,service=s"#, bearer("https://r/t", Some("s"), None)),
            (r#"Basic realm="Registry Realm""#, Some(Wanted::Basic)),
            (r#"Basic realm="x", Bearer realm="https://r/t""#, bearer("https://r/t", None, None)),
            (r#"Negotiate dGVzdA==, Basic realm="x""#, Some(Wanted::Basic)),
            (r#"Bearer realm="a\"b""#, bearer("a\"b", None, None)),
            ("Basic", Some(Wanted::Basic)),
            // A token without a place to get it is no offer.
            (r#"Bearer service="s""#, None),
            (r#"Bearer realm="",service="s""#, None),
            (r#"Bearer realm="https://r"#, None),
            ("Digest realm=\"x\", nonce=\"y\"", None),
            ("=, ,\"", None),
            ("", None),
        ] {
            assert_eq!(wanted([header]), expected, "{header}");
        }
    }

    #[test]
    fn several_headers_are_one_list() {
        let headers = [r#"Basic realm="x""#, r#"Bearer realm="https://r/t""#];
        assert_eq!(wanted(headers), bearer("https://r/t", None, None));
    }

    #[test]
    fn an_opaque_token_is_no_parameter() {
        let found = parse(r#"Negotiate ab=, Bearer realm="r", error="invalid_token""#);
        let schemes: Vec<&str> = found.iter().map(|found| found.scheme.as_str()).collect();
        assert_eq!(schemes, ["negotiate", "bearer"]);
        assert_eq!(found[1].get("error"), Some("invalid_token"));
        assert!(found[0].parameters.is_empty());
    }

    proptest! {
        #[test]
        fn what_was_written_by_the_grammar_is_read_back(
            parameters in prop::collection::vec(("[a-z]{1,8}", "[ -~]{0,20}"), 1..6)
        ) {
            let written = parameters.iter().map(|(name, value)| {
                format!("{name}=\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\""))
            });
            let header = format!("Bearer {}", written.collect::<Vec<_>>().join(", "));
            let scheme = "bearer".to_owned();
            prop_assert_eq!(parse(&header), vec![Challenge { scheme, parameters }]);
        }

        #[test]
        fn no_header_is_too_strange(header in "\\PC{0,200}") {
            let _ = wanted([header.as_str()]);
        }
    }
}
