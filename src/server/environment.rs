//! What a server that reads from registries takes from its environment, and its successors need,
//! too: they are started by a supervisor that somebody else, or systemd, has started.
//!
//! The state file holds it, which only root can read: an address of a proxy may have a password in
//! it. No report shows it.

use std::collections::BTreeMap;
use std::process::Command;

/// Where the cache and the credentials are, how registries are reached, what their certificates are
/// checked with, and where helpers of credentials lie.
const VARIABLES: [&str; 16] = [
    "OBD_UBLK_CACHE_DIR",
    "OBD_UBLK_PLAIN_HTTP",
    "DOCKER_CONFIG",
    "HOME",
    "PATH",
    "ALL_PROXY",
    "all_proxy",
    "HTTP_PROXY",
    "http_proxy",
    "HTTPS_PROXY",
    "https_proxy",
    "NO_PROXY",
    "no_proxy",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "XDG_RUNTIME_DIR",
];

/// Bytes of one value: a long search path is a tenth of that.
const VALUE_BYTES_MAX: usize = 4096;

/// Of the process that attaches. Values that are no text or too long are left out.
pub(super) fn of_this_process() -> BTreeMap<String, String> {
    of(|name| std::env::var(name).ok())
}

fn of(variable: impl Fn(&str) -> Option<String>) -> BTreeMap<String, String> {
    let found = |name: &&str| Some(((*name).to_owned(), variable(name)?));
    let is_sound = |(_, value): &(String, String)| value.len() <= VALUE_BYTES_MAX;
    VARIABLES.iter().filter_map(found).filter(is_sound).collect()
}

/// Lets a successor have it, and not what the supervisor was started with. Nothing is changed when
/// nothing is known: the state is of an older version.
pub(super) fn give(command: &mut Command, environment: &BTreeMap<String, String>) {
    if environment.is_empty() {
        return;
    }
    for name in VARIABLES {
        match environment.get(name) {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Attached with a cache and credentials of its own, a device used to come back with those of
    /// whoever had started the supervisor.
    #[test]
    fn a_successor_has_what_the_first_server_had_and_nothing_of_the_supervisors() {
        let long = "x".repeat(VALUE_BYTES_MAX + 1);
        let environment = of(|name| match name {
            "DOCKER_CONFIG" => Some("/c".to_owned()),
            "PATH" => Some("/bin:/usr/bin".to_owned()),
            "NO_PROXY" => Some(long.clone()),
            _ => None,
        });
        assert_eq!(environment.len(), 2);
        let mut command = Command::new("/usr/bin/env");
        command.env_clear().env("HTTPS_PROXY", "of somebody else").env("OTHER", "stays");
        give(&mut command, &environment);
        let told = String::from_utf8(command.output().unwrap().stdout).unwrap();
        let mut lines: Vec<&str> = told.lines().collect();
        lines.sort_unstable();
        assert_eq!(lines, ["DOCKER_CONFIG=/c", "OTHER=stays", "PATH=/bin:/usr/bin"]);
        let mut command = Command::new("/usr/bin/env");
        command.env_clear().env("HTTPS_PROXY", "p");
        give(&mut command, &BTreeMap::new());
        assert_eq!(command.output().unwrap().stdout, b"HTTPS_PROXY=p\n");
    }
}
