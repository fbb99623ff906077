//! The way to the host: a serial port that several threads write whole messages to.

use std::{
    fs::File,
    io::Write as _,
    sync::{Mutex, PoisonError},
};

use anyhow::{Context as _, Result};
use wrenn_lab::message::Message;

/// The port, opened.
#[derive(Debug)]
pub(crate) struct Port {
    /// A lock, because a message must not begin within another.
    file: Mutex<File>,
}

impl Port {
    pub(crate) fn new(file: File) -> Self {
        Self { file: Mutex::new(file) }
    }

    /// Says one message, and waits for as long as the host does not take it.
    pub(crate) fn send(&self, message: &Message) -> Result<()> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.write_all(&message.encode()).context("writing to the host")
    }
}
