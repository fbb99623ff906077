//! The lines that this program says of itself: on its standard error, which in a guest is the console.
//!
//! They are few, because a serial console is slow and each character costs the guest time.

use std::io::Write;

/// Writes one line. A console that cannot be written to is no reason to stop.
pub(crate) fn say(line: std::fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "envd: {line}");
}

/// An error with everything that caused it.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
