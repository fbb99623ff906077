//! The control plane against a real PostgreSQL, a real `envd`, and a host agent of the tests' own that has
//! processes where the real one has virtual machines.

mod auth;
mod bad_input;
mod commands;
mod faults;
mod files;
mod lifecycle;
mod openapi;
mod streams;
mod support;
