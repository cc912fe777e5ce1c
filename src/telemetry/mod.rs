//! Where the program's words go: plain lines on standard error.
//!
//! A command's standard error is the caller's terminal; a server's is its log file once it has one
//! (which moves the descriptor and bounds the file, see [`log_to`]), so both write alike. Called
//! once by `cli`. Standard output is never written here: it carries data only. Each event is one
//! line in which nothing acts on a terminal, whatever paths and error texts hold: [`printable()`].
//!
//! The filter is `OBD_UBLK_LOG` (`debug`, `obd_ublk::image=trace`, ...) if set, otherwise the
//! level given by `-v`.
//!
//! What must outlive the server that saw it goes into a file of its own: see [`trouble`].

pub mod trouble;

mod log_file;
mod printable;

pub use log_file::log_to;
pub use printable::printable;

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

/// Makes a panic an event like others: one line, in a log of bounded size.
pub fn log_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        let text = panic.payload_as_str().unwrap_or("no text");
        tracing::error!(place, "bug: panicked: {text}");
    }));
}

/// Sends the program's words to standard error. A second call changes nothing.
pub fn init(verbosity: Verbosity) {
    let filter = EnvFilter::builder()
        .with_default_directive(verbosity.filter().into())
        .with_env_var(LOG_VARIABLE)
        .from_env_lossy();
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| printable::Lines(log_file::BoundedStderr))
        .with_ansi(false)
        .finish();
    // Not by its own `try_init`, which brings in the words of crates that use `log` where another
    // crate of the build asks for that: a tested program must say what a shipped one does.
    let _ = tracing::subscriber::set_global_default(subscriber);
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
