//! The `obd-ublk` binary: arguments in, exit code out. All logic is in the library.

fn main() -> std::process::ExitCode {
    obd_ublk::cli::main()
}
