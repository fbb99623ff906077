//! Linux interfaces that the guest agent needs, each a small safe function over system calls.
//!
//! This is one of the two crates that may hold `unsafe` code; every block carries its argument. Nothing here
//! knows of sandboxes, requests or users: policy stays in `envd`.
//!
//! | module | what it is |
//! |---|---|
//! | [`spawn`] | a child in its own session, group, user and cgroup, made by `clone3` without copying memory |
//! | [`terminal`] | a pseudo terminal: the pair, its size, its owner |
//! | [`entropy`] | giving the kernel fresh randomness and making it use it |
//! | [`heap`] | one heap for all threads |
//! | [`block`] | growing a mounted ext4 file system |
//! | [`readiness`] | waiting for a descriptor in the asynchronous runtime |
//! | [`route`] | addresses, routes and neighbours through rtnetlink |
//! | [`trim`] | telling the disk which blocks are free |
//! | [`uevent`] | waiting for the kernel to announce a device |

pub mod block;
pub mod entropy;
pub mod heap;
pub mod readiness;
pub mod route;
pub mod spawn;
pub mod terminal;
pub mod trim;
pub mod uevent;
