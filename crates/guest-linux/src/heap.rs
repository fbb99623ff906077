//! How the memory of the program is shared out among its threads.

use nix::libc;

/// Makes all threads, those that are not there yet, use one heap.
///
/// By default each gets a heap of its own, and what a thread frees stays with it: with many threads that take turns
/// this is many times what is ever used at once. It must be called before the first thread is started.
pub fn share_one() {
    // SAFETY: this changes a number in the allocator, which takes its own lock to do so; no memory is touched.
    #[allow(unsafe_code)]
    let done = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    debug_assert_eq!(done, 1, "the C library knows this setting");
}
