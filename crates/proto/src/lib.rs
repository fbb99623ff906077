//! Generated Connect RPC code: the guest contract (`process`, `filesystem`) and
//! the host agent (`hostagent::v1`). It is a crate of its own because it is large.
//!
//! Clients are behind the feature `client`, so that the guest agent does not carry them.
#![allow(refining_impl_trait, unreachable_pub, elided_lifetimes_in_paths, unused_lifetimes)]
#![allow(missing_debug_implementations, clippy::all, clippy::pedantic, clippy::restriction)]

connectrpc::include_generated!();

/// The type of the detail in a `resource_exhausted` of the guest agent that is about the guest's disk. Without it, the
/// agent itself has too much to do.
pub const NO_SPACE_DETAIL: &str = "wrenn.guest.NoSpace";
