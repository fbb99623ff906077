//! Where things are in a clone, and how cargo is called in it.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Result;

use crate::step;

/// A clone of this repository.
#[derive(Debug)]
pub(crate) struct Repository {
    root: PathBuf,
}

impl Repository {
    /// The clone that this program was built from.
    pub(crate) fn find() -> Self {
        // `cargo run` says it at run time; a binary that was moved along with its clone then still finds it.
        let xtask = env::var_os("CARGO_MANIFEST_DIR")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
        Self { root: xtask.parent().map(Path::to_owned).unwrap_or(xtask) }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn path(&self, inside: &str) -> PathBuf {
        self.root.join(inside)
    }

    /// Where cargo puts what this clone builds.
    pub(crate) fn target(&self) -> PathBuf {
        env::var_os("CARGO_TARGET_DIR").map_or_else(|| self.path("target"), |target| self.root.join(target))
    }

    /// The images directory that the host agent reads.
    pub(crate) fn images(&self) -> PathBuf {
        self.target().join("images")
    }

    /// The program under development, as users get it.
    pub(crate) fn program(&self) -> PathBuf {
        self.target().join("release/wrenn")
    }

    /// A file for the output of a step that is only shown when it fails.
    pub(crate) fn log(&self, step: &str) -> PathBuf {
        self.target().join("log").join(format!("{step}.log"))
    }

    /// The files of this clone that git tracks or would: each is followed by a zero byte. One that was removed may be
    /// among them.
    pub(crate) fn files(&self) -> Result<String> {
        let list = ["ls-files", "--cached", "--others", "--exclude-standard", "-z"];
        step::output(Command::new("git").current_dir(&self.root).args(list))
    }

    /// `cargo` in this clone.
    pub(crate) fn cargo(&self) -> Command {
        let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.current_dir(&self.root);
        command
    }
}
