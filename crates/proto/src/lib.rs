//! Generated Connect RPC code: the guest contract (`process`, `filesystem`) and
//! the host agent (`hostagent::v1`). It is a crate of its own because it is large.
//!
//! Clients are behind the feature `client`, so that the guest agent does not carry them.
#![allow(refining_impl_trait, unreachable_pub, elided_lifetimes_in_paths, unused_lifetimes)]
#![allow(missing_debug_implementations, clippy::all, clippy::pedantic, clippy::restriction)]

connectrpc::include_generated!();
