//! What the tests and benchmarks of several crates share.
//!
//! - [`stack`]: a whole stack, started as a person starts one, on free ports and in a directory of its own.
//! - [`http`]: plain HTTP/1.1 against it, with nothing between a test and the bytes.
//! - [`mod@socket`][]: WebSockets.
//! - [`uplink`]: a namespace that stands for everything outside of a host, in which a test can put the
//!   internet, a private network and a metadata service, and ask each of them as a control.

pub mod http;
pub mod socket;
pub mod stack;
pub mod uplink;

pub use http::{Answer, Client};
pub use stack::{Stack, StackOptions};
