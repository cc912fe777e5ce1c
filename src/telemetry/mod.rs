//! Where the program's words go: plain lines on standard error.
//!
//! A command's standard error is the caller's terminal; a server's is its log file once it has one
//! (the server moves the descriptor, see `server::isolate`), so both write the same way. Called
//! once by `cli`. Standard output is never written here: it carries data only.
//!
//! The filter is `OBD_UBLK_LOG` (`debug`, `obd_ublk::image=trace`, ...) if set, otherwise the
//! level given by `-v`.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

/// The variable that overrides the level.
pub const LOG_VARIABLE: &str = "OBD_UBLK_LOG";

/// How much is told when [`LOG_VARIABLE`] is not set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verbosity {
    /// What an operator must act on.
    Warnings,
    /// And what a server does in its life: start, ready, stop.
    Events,
    /// And why.
    Details,
    /// Everything.
    All,
}

impl Verbosity {
    /// The verbosity that `count` times `-v` adds to this one.
    #[must_use]
    pub fn raised(self, count: u8) -> Self {
        let levels = [Self::Warnings, Self::Events, Self::Details, Self::All];
        let at = levels.iter().position(|level| *level == self).unwrap_or(0);
        levels.get(at.saturating_add(usize::from(count))).copied().unwrap_or(Self::All)
    }

    fn filter(self) -> LevelFilter {
        match self {
            Self::Warnings => LevelFilter::WARN,
            Self::Events => LevelFilter::INFO,
            Self::Details => LevelFilter::DEBUG,
            Self::All => LevelFilter::TRACE,
        }
    }
}

/// Sends the program's words to standard error. A second call changes nothing.
pub fn init(verbosity: Verbosity) {
    let filter = EnvFilter::builder()
        .with_default_directive(verbosity.filter().into())
        .with_env_var(LOG_VARIABLE)
        .from_env_lossy();
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .try_init();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_v_tells_one_level_more_up_to_everything() {
        for (base, count, expected) in [
            (Verbosity::Warnings, 0, Verbosity::Warnings),
            (Verbosity::Warnings, 1, Verbosity::Events),
            (Verbosity::Events, 1, Verbosity::Details),
            (Verbosity::Warnings, 3, Verbosity::All),
            (Verbosity::Events, 255, Verbosity::All),
        ] {
            assert_eq!(base.raised(count), expected, "{base:?} and {count} times -v");
        }
    }
}
