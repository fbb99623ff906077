//! The kernel's side: an inotify descriptor, which notes what happens in directories.

use std::{
    collections::VecDeque,
    mem::{MaybeUninit, size_of},
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use rustix::{
    fs::inotify::{self, CreateFlags, Reader, WatchFlags},
    io::{Errno, ioctl_fionread},
};

use super::tree::Note;

/// What is noted: just what clients are told of, because every note takes room in a queue of limited length.
const NOTED: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::MODIFY)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::MOVE_SELF)
    .union(WatchFlags::ONLYDIR);
/// How many bytes of notes are read at once.
const BUFFER: usize = 32 * 1024;
/// What the kernel writes before each name, and pads each name to a multiple of.
const HEADER: usize = size_of::<[u32; 4]>();

#[derive(Debug)]
pub(super) struct Inotify(OwnedFd);

impl Inotify {
    pub(super) fn new() -> Result<Self, Errno> {
        Ok(Self(inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?))
    }

    /// Another descriptor of the same queue, to wait with.
    pub(super) fn duplicate(&self) -> std::io::Result<OwnedFd> {
        self.0.try_clone()
    }

    /// Notes from now on what happens in a directory. The same directory has the same number, wherever it is.
    pub(super) fn watch(&self, directory: impl AsFd) -> Result<i32, Errno> {
        // By the open directory and not by its path, which may be another's by now.
        let path = format!("/proc/self/fd/{}", directory.as_fd().as_raw_fd());
        inotify::add_watch(&self.0, path, NOTED)
    }

    /// Notes no more of a directory. One that is gone is noted no more already.
    pub(super) fn release(&self, descriptor: i32) {
        let _ = inotify::remove_watch(&self.0, descriptor);
    }

    /// Whether there are notes.
    pub(super) fn has_notes(&self) -> bool {
        ioctl_fionread(&self.0).is_ok_and(|bytes| bytes > 0)
    }

    /// Reads all notes of what happened until now. What goes on meanwhile may be among them, but does not keep this from
    /// coming to an end.
    pub(super) fn read(&self, notes: &mut VecDeque<Note>) -> Result<(), Errno> {
        let waiting = usize::try_from(ioctl_fionread(&self.0)?).unwrap_or(0);
        let mut buffer = [const { MaybeUninit::uninit() }; BUFFER];
        let mut reader = Reader::new(&self.0, &mut buffer);
        let mut read = 0;
        while read < waiting || !reader.is_buffer_empty() {
            let event = match reader.next() {
                Ok(event) => event,
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error),
            };
            let name = event.file_name().map_or(&[][..], |name| name.to_bytes());
            read += HEADER + if name.is_empty() { 0 } else { (name.len() + 1).next_multiple_of(HEADER) };
            notes.push_back(Note { descriptor: event.wd(), flags: event.events(), name: name.into() });
        }
        Ok(())
    }
}
