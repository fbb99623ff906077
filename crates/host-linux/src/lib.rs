//! Linux interfaces that the host side needs, each a small safe function over system calls.
//!
//! This is one of the two crates that may hold `unsafe` code; every block carries its argument.

pub mod appearance;
pub mod block_device;
pub mod cgroup;
pub mod conntrack;
pub mod device_mapper;
pub mod disk;
pub mod lock;
pub mod loop_device;
pub mod mounts;
pub mod netns;
pub mod privileges;
pub mod process;
pub mod shared_words;
pub mod syscalls;
pub mod tap;
pub mod tsc;
pub mod usage;
pub mod userfaultfd;
