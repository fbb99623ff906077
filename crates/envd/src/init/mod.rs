//! init
pub(crate) fn run() -> std::process::ExitCode {
    std::process::ExitCode::FAILURE
}
