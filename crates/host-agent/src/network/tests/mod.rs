//! The network as it is: real namespaces, real rules, real packets.
#![allow(clippy::print_stdout, reason = "a skipped test says so, and a measurement its numbers")]

mod adoption;
mod domains;
mod filters;
mod internet_of_names;
mod isolation;
mod life;
mod policies;
mod world;
