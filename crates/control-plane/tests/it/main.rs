//! The control plane against a real PostgreSQL, a real `envd`, and a host agent of the tests' own that has
//! processes where the real one has virtual machines.

// The generated traits return `impl Encodable`; ours name what they return, as the generator's guide advises.
#![allow(refining_impl_trait)]
#![allow(clippy::unwrap_used)]

mod auth;
mod bad_input;
mod commands;
mod edge;
mod faults;
mod files;
mod lifecycle;
mod metrics;
mod openapi;
mod persist;
mod settings;
mod snapshots;
mod storm;
mod streams;
mod support;
