//! The `wrenn` program; all of it is in the library, see [`wrenn::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    wrenn::cli::main()
}
